"""The loop and its overlap: images → batches → backbone → sink, with `extract` as the whole job.

Three things go on at once: worker threads decode (Pillow lets go of the interpreter while it decodes and scales, and a
thread costs neither a copy nor a process), the calling thread computes, and one thread lays out and writes. Between
them stand queues of a few batches, so memory does not grow with the number of images.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bbx.assembly import assemble
from bbx.backbone import Backbone, normalise
from bbx.errors import ImageError, InterruptedRunError, UsageError
from bbx.images import find_images, read_image
from bbx.plan import Plan, Summary, attempt, cores, find_device, free_nbytes
from bbx.providers import load_backbone, resolve
from bbx.spec import (
    Dtype,
    ExifMode,
    Mode,
    ModelRef,
    Norm,
    OnError,
    Pool,
    Precision,
    Preprocess,
    ResizeMode,
    RunSpec,
    Stage,
    one_of,
)
from bbx.store import FeatureFile, FeatureWriter, Target, check_target

# On a CPU eight images were the fastest of 4, 8, 16 and 32 (swin-tiny, two cores): larger maps fall out of its caches.
BATCH_SIZES = {"cpu": 8}
# Batches that may wait before and after the backbone: two keep it fed, more only cost memory.
_AHEAD, _BEHIND = 2, 2


class Sink(Protocol):
    """Where rows go. `maps` holds `(b, *stage.shape)` per stage, C-contiguous, in the run's dtype."""

    def write(self, rows: NDArray[np.int64], maps: Mapping[str, NDArray[Any]]) -> None:
        """Takes the maps of `rows`."""

    def fail(self, row: int, reason: str) -> None:
        """Takes the reason why `row` has no maps."""


Progress = Callable[[Summary], None]


def extract(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    model: str | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    stages: str | Iterable[str | int] | None = None,
    layers: str | Iterable[str] = (),
    weights: str = "auto",
    seed: int = 0,
    size: int | tuple[int, int] | None = None,
    resize_mode: ResizeMode | None = None,
    exif: ExifMode = "apply",
    norm: Norm = "raw",
    tokens: bool = False,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    precision: Precision = "float32",
    pool: Pool = "none",
    output: str | os.PathLike[str] = "features.h5",
    mode: Mode = "auto",
    on_error: OnError = "skip",
    dry_run: bool = False,
    stdin: Iterable[bytes] | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
    stop: Callable[[], int | None] | None = None,
) -> Summary:
    """Extracts feature maps of `images` into one HDF5 file; called again after a kill, it goes on where it was.

    `model` names a backbone; `config`, a mapping or a YAML, TOML or JSON file, describes one with neck and head
    (`bbx.assemble`). `images`: folders, files, globs, `@list.txt`, `-` (paths from `stdin`). `stages` as in
    `select_stages` (default: the last), `layers` any module paths or globs. `weights`: `auto`, `random` (by `seed`), a
    file, or the library's name for some.
    `size` (pixels, or (height, width)), `resize_mode` and `exif` override the weights' own preprocessing.
    `norm`: `raw` maps, or `native`, what the library's own backbone class gives; `tokens`: a plain ViT's stages as
    `(t, d)`, prefix tokens kept.
    `dtype` is on disk, `precision` in computing; `pool` stores `(c,)` per stage instead of `(c, h, w)`.
    `batch_size`: images at once, default 8 on a CPU and 64 elsewhere; `workers`: decoding threads, default the cores.
    `mode`: `auto` resumes the same run and refuses another's file; `new`, `resume`, `overwrite` insist.
    `on_error`: a bad image is a failed row (`skip`) or ends the run (`fail`). `stop` is asked after each batch and
    returns a signal number to stop at. `progress` is called after each batch.

    Raises `UsageError`, `StartError` and its kin (weights, input, disk, another run's file), `WriteError`,
    `InterruptedRunError`, and with `on_error="fail"` `ImageError`. A failed row is no error: see `Summary.failures`.
    """
    _check_words(dtype, precision, pool, mode, on_error)
    if any(count is not None and count < 1 for count in (batch_size, workers)):
        raise UsageError("--batch-size and --workers are at least 1", "leave them out for the defaults")
    where = find_device(device)
    inputs = [images] if isinstance(images, (str, os.PathLike)) else images
    named = _named(model, weights) if config is None else ""
    found = find_images(inputs, stdin=stdin)  # before the weights, which may be a download
    if config is not None:
        if weights != "auto" or tokens:
            raise UsageError("--weights and --tokens do not go with --config", "the configuration says the weights")
        backbone = assemble(
            config, model=model or "", seed=seed, size=size, resize_mode=resize_mode, exif=exif, norm=norm,
            stages=stages, layers=layers,
        )  # fmt: skip
    else:
        backbone = load_backbone(
            named, seed=seed, stages=stages, layers=layers, size=size, resize_mode=resize_mode, exif=exif, norm=norm,
            tokens=tokens,
        )  # fmt: skip
    backbone = backbone.to(where, precision=precision)
    run = RunSpec(
        model=str(backbone.ref),
        weights=backbone.weights,
        weights_digest=backbone.weights_digest,
        stages=tuple(_stored(stage, pool) for stage in backbone.stages),
        preprocess=backbone.preprocess,
        dtype=dtype,
        pool=pool,
        precision=precision,
        norm=backbone.norm,
        tokens=backbone.tokens,
        config=backbone.config,
    )
    path = Path(output)
    target = check_target(path, run, found.keys, mode)
    workers = workers or cores()
    batch_size = min(batch_size or BATCH_SIZES.get(where.type, 64), len(found))
    plan = Plan(found, backbone, run, path, target, where, batch_size, workers, free_nbytes(path))
    if on_plan:
        on_plan(plan)
    plan.check_disk()
    summary = Summary(path, len(found), done=target.done)
    for key, reason in _failed_before(target).items():
        summary.add_failure(key, reason)
    if dry_run or target.state == "complete":
        return summary
    with FeatureWriter.open(path, run, found.keys, attempt=attempt(plan), mode=mode) as writer:
        fresh = mode in ("new", "overwrite")
        _loop(plan, writer, writer.pending, summary, on_error=on_error, progress=progress, stop=stop, fresh=fresh)
    return summary


def _named(model: str | None, weights: str) -> ModelRef:
    if model is None:
        raise UsageError(
            "which model? --model NAME", "bbx models lists them; --model efficientnet-lite0 needs no network"
        )
    return resolve(model, weights=weights)


def _check_words(*values: str) -> None:
    """Raises `UsageError` unless each value is one of its option's words."""
    options = (
        ("dtype", Dtype),
        ("precision", Precision),
        ("pool", Pool),
        ("mode", Mode),
        ("on-error", OnError),
    )
    for (option, words), value in zip(options, values, strict=True):
        one_of(f"--{option}", value, words)


def features(backbone: Backbone, path: str | os.PathLike[str]) -> tuple[NDArray[np.uint8], dict[str, NDArray[Any]]]:
    """One image, no file between: the input as the network saw it `(h, w, 3)`, and each stage's map `(c, h, w)`.

    Raises `ImageError`.
    """
    cells = read_image(path, backbone.preprocess)
    device = next(backbone.network.parameters(), torch.empty(0)).device
    with torch.inference_mode():
        maps = backbone(normalise(torch.from_numpy(cells)[None].to(device), backbone.preprocess))
    picture = cells if cells.dtype == np.uint8 else read_image(path, replace(backbone.preprocess, processor=""))
    return picture, {name: tensor[0].float().cpu().numpy() for name, tensor in maps.items()}


def _failed_before(target: Target) -> dict[str, str]:
    if not target.failed:
        return {}
    with FeatureFile(target.path, partial=target.state == "resume") as file:
        return dict(file.failed)


def _loop(
    plan: Plan,
    sink: Sink,
    rows: NDArray[np.int64],
    summary: Summary,
    *,
    on_error: OnError,
    progress: Progress | None,
    stop: Callable[[], int | None] | None,
    fresh: bool,
) -> None:
    started = time.perf_counter()
    writes: deque[Future[int]] = deque()
    left = len(rows)

    def report(written: Future[int]) -> None:
        count = written.result()
        summary.done, summary.extracted = summary.done + count, summary.extracted + count
        summary.wall = time.perf_counter() - started
        if progress:
            progress(summary)

    with (
        ThreadPoolExecutor(plan.workers, "bbx-decode") as decoders,
        ThreadPoolExecutor(1, "bbx-write") as writer,
        torch.inference_mode(),
    ):
        try:
            for batch in _decoded(plan, rows, decoders):
                good, pixels, bad = batch.collect(summary)
                if bad and on_error == "fail":
                    key = plan.images.keys[bad[0][0]]
                    raise ImageError(f"{key}: {bad[0][1]}", "leave --on-error fail out to record it and go on")
                maps = _compute(plan, pixels, summary) if len(good) else {}
                for row, reason in bad:
                    summary.add_failure(plan.images.keys[row], reason)
                writes.append(writer.submit(_write, sink, good, maps, bad, summary))
                while len(writes) > _BEHIND:
                    report(writes.popleft())
                left -= len(batch.rows)
                if left and (signum := stop and stop()):
                    raise InterruptedRunError(
                        f"stopped by {signal.Signals(signum).name}; every finished image is in {plan.output}.partial",
                        "the same command continues it"
                        if not fresh
                        else "the same command with --mode resume continues it",
                        signum=signum,
                    )
        finally:
            decoders.shutdown(wait=False, cancel_futures=True)
            while writes:
                report(writes.popleft())


@dataclass
class _Batch:
    """Rows on their way through the decoders, into one buffer `(b, h, w, 3)`."""

    rows: NDArray[np.int64]
    buffer: NDArray[Any]
    reads: list[Future[tuple[str | None, float]]]

    def collect(self, summary: Summary) -> tuple[NDArray[np.int64], NDArray[Any], list[tuple[int, str]]]:
        """Waits; the good rows, their pixels, and the bad rows with their reasons."""
        results = [read.result() for read in self.reads]
        summary.decode += sum(seconds for _, seconds in results)
        bad = [(int(row), reason) for row, (reason, _) in zip(self.rows, results, strict=True) if reason]
        if not bad:
            return self.rows, self.buffer, bad
        # Only the good ones are computed: a bad image's slot holds whatever was decoded before it broke.
        kept = np.array([reason is None for reason, _ in results])
        return self.rows[kept], self.buffer[kept], bad


def _decoded(plan: Plan, rows: NDArray[np.int64], decoders: ThreadPoolExecutor) -> Iterator[_Batch]:
    """Batches in row order, each handed out as soon as it was submitted and `_AHEAD` more were."""
    ahead: deque[_Batch] = deque()
    cells = _cell_dtype(plan.run.preprocess)
    for start in range(0, len(rows), plan.batch_size):
        chunk = rows[start : start + plan.batch_size]
        buffer = np.empty((len(chunk), *plan.run.preprocess.size, 3), cells)
        reads = [decoders.submit(_read, plan, int(row), slot) for row, slot in zip(chunk, buffer, strict=True)]
        ahead.append(_Batch(chunk, buffer, reads))
        if len(ahead) > _AHEAD:
            yield ahead.popleft()
    yield from ahead


def _cell_dtype(preprocess: Preprocess) -> np.dtype[Any]:
    if not preprocess.processor:
        return np.dtype(np.uint8)
    from bbx.processor import cell_dtype

    return cell_dtype(preprocess)


def _read(plan: Plan, row: int, slot: NDArray[Any]) -> tuple[str | None, float]:
    started = time.perf_counter()
    try:
        read_image(plan.images.path(row), plan.run.preprocess, slot)
        reason = None
    except ImageError as error:
        reason = error.message
    return reason, time.perf_counter() - started


def _compute(plan: Plan, pixels: NDArray[Any], summary: Summary) -> dict[str, Tensor]:
    """Maps in the disk's dtype, on the host, not yet laid out: that is the writing thread's work."""
    started = time.perf_counter()
    batch = normalise(torch.from_numpy(pixels).to(plan.device, non_blocking=True), plan.backbone.preprocess)
    maps = {}
    for name, tensor in plan.backbone(batch).items():
        pooled = _pooled(tensor.float(), plan.run.pool)
        if not pooled.sum().isfinite():  # one pass; a NaN or infinity anywhere reaches the sum
            odd = pooled.numel() - int(pooled.isfinite().sum())
            if odd:  # the sum of finite values may overflow by itself
                summary.nonfinite[name] = summary.nonfinite.get(name, 0) + odd
        if plan.run.dtype == "float16":
            half = pooled.half()
            lost = int((half.isinf() & ~pooled.isinf()).sum())
            if lost:
                summary.overflow[name] = summary.overflow.get(name, 0) + lost
            pooled = half
        maps[name] = pooled.contiguous().cpu() if plan.device.type != "cpu" else pooled
    summary.compute += time.perf_counter() - started
    return maps


def _pooled(maps: Tensor, pool: Pool) -> Tensor:
    if pool == "none" or maps.ndim == 2:
        return maps
    axes = (-2, -1) if maps.ndim == 4 else (1,)
    return maps.mean(axes) if pool == "avg" else maps.amax(axes)


def _stored(stage: Stage, pool: Pool) -> Stage:
    if pool == "none":
        return stage
    return replace(stage, shape=(stage.channels,), stride=0.0)


def _write(
    sink: Sink, rows: NDArray[np.int64], maps: Mapping[str, Tensor], bad: list[tuple[int, str]], summary: Summary
) -> int:
    started = time.perf_counter()
    if len(rows):
        sink.write(rows, {name: tensor.contiguous().numpy() for name, tensor in maps.items()})
    for row, reason in bad:
        sink.fail(row, reason)
    summary.write += time.perf_counter() - started
    return len(rows)
