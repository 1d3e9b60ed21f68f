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
from bbx.gpu_decode import decoders_for
from bbx.images import DecodeSettings, ImageList, cell_dtype
from bbx.machine import cores
from bbx.plan import Plan, Rates

LONG = 5_000
"""Images from which on a run is worth measuring first."""
EAGER_RATE = "--engine compile: what limits the run was measured with eager code"
# Images at least, and of each process; a slot for so many at most, since what is in it is nobody's.
_DECODED, _EACH, _SLOTS = 32, 4, 8
# So many images are one batch to a GPU, and over before they are measured.
_GPU_TURNS = 8
_WRITTEN_NBYTES, _BLOCK_NBYTES = 64_000_000, 4_000_000
# A plan does not wait as long for an image as a run does.
_PATIENCE = 5.0


def measured(plan: Plan) -> Plan:
    """`plan` with its rates; where the machine refuses to be measured, with a note of that: the run itself decides."""
    try:
        rates = rates_of(plan)
    except (OSError, BbxError) as problem:
        return replace(plan, notes=(*plan.notes, f"what limits the run could not be measured: {problem}"))
    said = (EAGER_RATE,) if plan.engine.engine == "compile" else ()
    return replace(plan, rates=rates, notes=(*plan.notes, *said))


def rates_of(plan: Plan) -> Rates:
    """Measures with the images, the streams and the disk of `plan`. Writes no file. Raises `OSError`, `BbxError`.

    Compiled code takes a minute to make, and the run makes its own: eager code is measured in its place.
    """
    workers, engine = plan.decoders(plan.target.pending), replace(plan.engine, engine="eager")
    decode = decode_rate(sample(plan.images, workers), plan.decoding, workers, device=plan.device)
    compute = forward_rate(plan.backbone, plan.device, plan.work, engine).rate
    store = write_rate(plan.output.resolve().parent) / plan.run.row_nbytes
    return Rates(decode, compute, store, shared_rate(plan.device, engine, decode, workers, compute))


def shared_rate(
    device: torch.device, engine: EngineSettings, decode: float, workers: int, compute: float
) -> float | None:
    """Images/s that the cores allow for `decode` and `compute` at once, each measured on its own share of them."""
    if device.type != "cpu":
        return None
    # Of a core that poses as two, a decoder takes a half, and a thread of torch's all.
    decoding = min(1.0, workers / cores())
    computing = min(1.0, engine.streams * engine.threads / real_cores())
    return 1 / (decoding / decode + computing / compute)


def real_cores(root: Path = Path("/")) -> int:
    """How many cores this process may use, those that pose as two counted once, as far as Linux tells. `root` is /."""
    if not hasattr(os, "sched_getaffinity"):
        return cores()
    files = [root / f"sys/devices/system/cpu/cpu{one}/topology/thread_siblings_list" for one in os.sched_getaffinity(0)]
    return len({file.read_text() for file in files}) if all(file.exists() for file in files) else cores()


def sample(images: ImageList, workers: int = 1) -> list[str]:
    """The paths of some of the images, spread over all of them: several for each of `workers`."""
    rows = np.unique(np.linspace(0, len(images) - 1, max(_DECODED, _EACH * workers)).astype(int))
    return [images.path(int(row)) for row in rows]


def decode_rate(paths: Sequence[str], settings: DecodeSettings, workers: int, *, device: torch.device) -> float:
    """Images/s of `workers` processes, or of `device`, over `paths`; one that cannot be read takes its time, too."""
    if settings.preprocess.decode == "gpu":
        paths = [*paths] * _GPU_TURNS
    slots = np.zeros((min(len(paths), _SLOTS), *settings.preprocess.size, 3), cell_dtype(settings.preprocess))
    with decoders_for(workers, replace(settings, timeout=min(settings.timeout, _PATIENCE)), device) as decoders:
        # As many at once as there are processes, so that each has started, and has all that it imports.
        for reading in [decoders.submit(paths[turn % len(paths)], slots[turn % len(slots)]) for turn in range(workers)]:
            reading.result()
        started = time.perf_counter()
        for reading in [decoders.submit(path, slots[turn % len(slots)]) for turn, path in enumerate(paths)]:
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
