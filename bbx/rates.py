"""What will limit a run: images/s of decoding, computing and writing, each measured alone and in a second or so."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bbx.engine import EngineSettings, forward_rate
from bbx.errors import BbxError
from bbx.images import Decoders, DecodeSettings, ImageList, cell_dtype
from bbx.plan import Plan, Rates, cores

LONG = 5_000
"""Images from which on a run is worth measuring first."""
_DECODED = 32
_WRITTEN_NBYTES, _BLOCK_NBYTES = 64_000_000, 4_000_000
# A plan does not wait as long for an image as a run does.
_PATIENCE = 5.0


def measured(plan: Plan) -> Plan:
    """`plan` with its rates; where the machine refuses to be measured, with a note of that: the run itself decides."""
    try:
        rates = rates_of(plan)
    except (OSError, BbxError) as problem:
        return replace(plan, notes=(*plan.notes, f"what limits the run could not be measured: {problem}"))
    return replace(plan, rates=rates)


def rates_of(plan: Plan) -> Rates:
    """Measures with the images, the streams and the disk of `plan`. Writes no file. Raises `OSError`, `BbxError`."""
    workers = plan.decoders(plan.target.pending)
    decode = decode_rate(sample(plan.images), plan.decoding, workers)
    compute = forward_rate(plan.backbone, plan.device, plan.work, plan.engine).rate
    store = write_rate(plan.output.resolve().parent) / plan.run.row_nbytes
    return Rates(decode, compute, store, shared_rate(plan.device, plan.engine, decode, workers, compute))


def shared_rate(
    device: torch.device, engine: EngineSettings, decode: float, workers: int, compute: float
) -> float | None:
    """Images/s that the cores allow for `decode` and `compute` at once, each measured on its own share of them."""
    if device.type != "cpu":
        return None
    there = cores()
    return there / (min(workers, there) / decode + min(engine.streams * engine.threads, there) / compute)


def sample(images: ImageList) -> list[str]:
    """The paths of some of the images, spread over all of them."""
    rows = np.unique(np.linspace(0, len(images) - 1, _DECODED).astype(int))
    return [images.path(int(row)) for row in rows]


def decode_rate(paths: Sequence[str], settings: DecodeSettings, workers: int) -> float:
    """Images/s of `workers` processes over `paths`; one that cannot be read takes its time like any other."""
    slots = np.zeros((len(paths), *settings.preprocess.size, 3), cell_dtype(settings.preprocess))
    with Decoders(workers, replace(settings, timeout=min(settings.timeout, _PATIENCE))) as decoders:
        # As many at once as there are processes, so that each has started, and has all that it imports.
        for reading in [decoders.submit(paths[turn % len(paths)], slots[0].copy()) for turn in range(workers)]:
            reading.result()
        started = time.perf_counter()
        for reading in [decoders.submit(path, slot) for path, slot in zip(paths, slots, strict=True)]:
            reading.result()
        return len(paths) / (time.perf_counter() - started)


def write_rate(folder: Path, nbytes: int = _WRITTEN_NBYTES) -> float:
    """Bytes/s to the disk of `folder`, of noise, until they are on it; in a file without a name. Raises `OSError`."""
    block = np.random.default_rng(0).bytes(min(nbytes, _BLOCK_NBYTES))
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        started = time.perf_counter()
        for _ in range(-(-nbytes // len(block))):
            file.write(block)
        getattr(os, "fdatasync", os.fsync)(file.fileno())
        return file.tell() / (time.perf_counter() - started)
