"""The loop and its overlap: images → batches → backbone → sink.

Three things go on at once: worker processes decode, the calling thread computes, and one thread lays out and writes.
Between them stand queues of a few batches, so memory does not grow with the number of images.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bbx.backbone import is_out_of_memory, normalise
from bbx.errors import ImageError, InterruptedRunError, StartError, UsageError
from bbx.images import Decoders, cell_dtype
from bbx.images.decoders import Answer
from bbx.plan import Plan, Summary
from bbx.spec import InputFile, OnError, Pool

# Batches that may wait before and after the backbone: two keep it fed, more only cost memory.
_AHEAD, _BEHIND = 2, 2


class Sink(Protocol):
    """Where rows go. `maps` holds `(b, *stage.shape)` per stage, C-contiguous, in the run's dtype."""

    def write(self, rows: NDArray[np.int64], maps: Mapping[str, NDArray[Any]], inputs: Sequence[InputFile]) -> None:
        """Takes the maps of `rows`, and their image files."""

    def fail(self, row: int, reason: str, input: InputFile | None = None) -> None:
        """Takes the reason why `row` has no maps."""


Progress = Callable[[Summary], None]


@dataclass(frozen=True, slots=True)
class Bad:
    """A row whose image could not be read."""

    row: int
    reason: str
    file: InputFile


def run_loop(
    plan: Plan,
    sink: Sink,
    rows: NDArray[np.int64],
    summary: Summary,
    *,
    on_error: OnError = "skip",
    progress: Progress | None = None,
    stop: Callable[[], int | None] | None = None,
) -> None:
    """Takes `rows` from their images to `sink`, and counts them in `summary`.

    Raises `ImageError` where `on_error` is `fail`, `InterruptedRunError` where `stop` names a signal, `StartError`
    where not one image fits into the device's memory, and what `sink` raises.
    """
    started = time.perf_counter()
    writes: deque[Future[int]] = deque()
    left = len(rows)
    compute = _Compute(plan, summary)

    def report(written: Future[int]) -> None:
        count = written.result()
        summary.done, summary.extracted = summary.done + count, summary.extracted + count
        summary.wall = time.perf_counter() - started
        if progress:
            progress(summary)

    with (
        Decoders(min(plan.workers, 1 + len(rows) // 8), plan.decoding) as decoders,
        ThreadPoolExecutor(1, "bbx-write") as writer,
        deterministic(plan.deterministic),
        torch.inference_mode(),
    ):
        try:
            for batch in _decoded(plan, rows, decoders):
                good, bad = batch.collect(summary)
                if bad and on_error == "fail":
                    key = plan.images.keys[bad[0].row]
                    raise ImageError(f"{key}: {bad[0].reason}", "leave --on-error fail out to record it and go on")
                maps = compute.maps(batch, good) if len(good) else {}
                for one in bad:
                    summary.add_failure(plan.images.keys[one.row], one.reason)
                writes.append(writer.submit(_write, sink, batch, good, maps, bad, summary))
                while len(writes) > _BEHIND:
                    report(writes.popleft())
                left -= len(batch.rows)
                if left and (signum := stop and stop()):
                    raise _interrupted(plan, signum)
        finally:
            while writes:
                report(writes.popleft())


def _interrupted(plan: Plan, signum: int) -> InterruptedRunError:
    mode = " with --mode resume" if plan.fresh else ""
    return InterruptedRunError(
        f"stopped by {signal.Signals(signum).name}; every finished image is in {plan.output}.partial",
        f"the same command{mode} continues it",
        signum=signum,
    )


@dataclass
class _Batch:
    """Rows on their way through the decoders: row `rows[i]` into `buffer[slots[i]]`, of `(b, h, w, 3)`."""

    rows: NDArray[np.int64]
    slots: NDArray[np.int64]
    buffer: NDArray[Any]
    reads: list[Future[Answer]]

    def collect(self, summary: Summary) -> tuple[NDArray[np.int64], list[Bad]]:
        """Waits; which of `rows` are good, as indices into them, and the bad ones."""
        answers = [read.result() for read in self.reads]
        summary.decode += sum(answer.seconds for answer in answers)
        bad = [
            Bad(int(row), answer.reason, answer.file)
            for row, answer in zip(self.rows, answers, strict=True)
            if answer.reason
        ]
        return np.flatnonzero([not answer.reason for answer in answers]), bad

    def inputs(self, good: NDArray[np.int64]) -> list[InputFile]:
        """The image files of the good ones."""
        return [self.reads[place].result().file for place in good]


def _decoded(plan: Plan, rows: NDArray[np.int64], decoders: Decoders) -> Iterator[_Batch]:
    """Batches in row order, each handed out as soon as it was submitted and `_AHEAD` more were."""
    ahead: deque[_Batch] = deque()
    cells = cell_dtype(plan.run.preprocess)
    for chunk in _chunks(rows, plan.batch_size, aligned=plan.deterministic or not plan.retry_failed):
        if plan.deterministic:
            # Each row at its own place of a whole batch, whatever became of its neighbours.
            slots, buffer = chunk % plan.batch_size, np.zeros((plan.batch_size, *plan.run.preprocess.size, 3), cells)
        else:
            slots, buffer = np.arange(len(chunk)), np.empty((len(chunk), *plan.run.preprocess.size, 3), cells)
        reads = [
            decoders.submit(plan.images.path(int(row)), buffer[slot]) for row, slot in zip(chunk, slots, strict=True)
        ]
        ahead.append(_Batch(chunk, slots, buffer, reads))
        if len(ahead) > _AHEAD:
            yield ahead.popleft()
    yield from ahead


def _chunks(rows: NDArray[np.int64], size: int, *, aligned: bool) -> Iterator[NDArray[np.int64]]:
    """`rows`, ascending, `size` at a time; `aligned`: cut where row numbers are multiples of `size`.

    A run that is resumed then computes the batches that an uninterrupted one would have.
    """
    start = 0
    while start < len(rows):
        stop = start + size
        if aligned:
            stop = start + int(np.searchsorted(rows[start:stop], (rows[start] // size + 1) * size))
        yield rows[start:stop]
        start = min(stop, len(rows))


class _Compute:
    """Pixels to maps in the disk's dtype, on the host, not yet laid out: that is the writing thread's work."""

    def __init__(self, plan: Plan, summary: Summary) -> None:
        self._plan = plan
        self._summary = summary
        self._most = plan.batch_size

    def maps(self, batch: _Batch, good: NDArray[np.int64]) -> dict[str, Tensor]:
        """The maps of the good rows; where memory runs out, by half as many images at a time from then on."""
        started = time.perf_counter()
        if self._plan.deterministic:  # the batch keeps its shape; what is computed of an empty slot is dropped
            pixels, kept = batch.buffer, batch.slots[good]
        else:
            whole = len(good) == len(batch.rows)
            pixels, kept = batch.buffer if whole else batch.buffer[good], np.arange(len(good))
        parts: list[dict[str, Tensor]] = []
        done = 0
        while done < len(pixels):
            some = pixels[done : done + self._most]
            here = kept[(kept >= done) & (kept < done + len(some))] - done
            part = self._attempt(some, torch.from_numpy(here))
            if part is None:
                self._halve(len(some))
            else:
                parts.append(part)
                done += len(some)
        self._summary.compute += time.perf_counter() - started
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts[1:] else parts[0]

    def _attempt(self, pixels: NDArray[Any], kept: Tensor) -> dict[str, Tensor] | None:
        """None where the memory does not suffice; the error is gone by then, and with it what it kept alive."""
        try:
            return self._forward(pixels, kept)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                if "deterministic" in str(error):
                    raise UsageError(f"{self._plan.run.model}: {error}", "leave --deterministic out") from None
                raise
        return None

    def _halve(self, count: int) -> None:
        if self._plan.device.type == "cuda":
            torch.cuda.empty_cache()
        if count == 1:
            raise StartError(
                f"{self._plan.device} has too little memory for one image of {self._plan.run.model}",
                "choose another --device, a smaller --size, or end what else uses its memory",
            )
        self._most = -(-count // 2)
        self._summary.notes.append(
            f"{self._plan.device} is out of memory with {count} images at once: on with {self._most} (--batch-size)"
        )

    def _forward(self, pixels: NDArray[Any], kept: Tensor) -> dict[str, Tensor]:
        plan = self._plan
        batch = normalise(torch.from_numpy(pixels).to(plan.device, non_blocking=True), plan.backbone.preprocess)
        maps = {}
        for name, tensor in plan.backbone(batch).items():
            made = tensor if len(kept) == len(pixels) else tensor[kept.to(tensor.device)]
            made = self._counted(name, pooled(made.float(), plan.run.pool))
            maps[name] = made.contiguous().cpu() if plan.device.type != "cpu" else made
        return maps

    def _counted(self, name: str, values: Tensor) -> Tensor:
        """`values` in the disk's dtype; counts those that are not finite, and those that float16 cannot hold."""
        nonfinite, overflow = self._summary.nonfinite, self._summary.overflow
        if not values.sum().isfinite():  # one pass; a NaN or infinity anywhere reaches the sum
            odd = values.numel() - int(values.isfinite().sum())
            if odd:  # the sum of finite values may overflow by itself
                nonfinite[name] = nonfinite.get(name, 0) + odd
        if self._plan.run.dtype != "float16":
            return values
        half = values.half()
        lost = int((half.isinf() & ~values.isinf()).sum())
        if lost:
            overflow[name] = overflow.get(name, 0) + lost
        return half


def pooled(maps: Tensor, pool: Pool) -> Tensor:
    """`(b, c, h, w)` or tokens → `(b, c)` where `pool` says so."""
    if pool == "none" or maps.ndim == 2:
        return maps
    axes = (-2, -1) if maps.ndim == 4 else (1,)
    return maps.mean(axes) if pool == "avg" else maps.amax(axes)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Has torch choose only algorithms that give the same bits each time."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for on CUDA
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def _write(
    sink: Sink,
    batch: _Batch,
    good: NDArray[np.int64],
    maps: Mapping[str, Tensor],
    bad: list[Bad],
    summary: Summary,
) -> int:
    started = time.perf_counter()
    if len(good):
        arrays = {name: tensor.contiguous().numpy() for name, tensor in maps.items()}
        sink.write(batch.rows[good], arrays, batch.inputs(good))
    for one in bad:
        sink.fail(one.row, one.reason, one.file)
    summary.write += time.perf_counter() - started
    return len(good)
