"""The loop and its overlap: images → batches → backbone → sink.

Three things go on at once: worker processes decode, the engine's streams compute, and one thread lays out and writes.
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
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bbx.engine import Computed, Streams
from bbx.errors import ImageError, InterruptedRunError
from bbx.images import Decoders, cell_dtype
from bbx.images.decoders import Answer
from bbx.plan import Plan, Summary
from bbx.spec import InputFile, OnError

# Batches that wait to be computed beyond those that are being so, and to be written: more only cost memory.
_AHEAD, _BEHIND = 1, 2


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


class _Written(NamedTuple):
    """What came of a batch: how many rows are done, how they were computed, and the seconds of writing them."""

    done: int
    computed: Computed | None
    seconds: float


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
    with (
        Decoders(plan.decoders(len(rows)), plan.decoding) as decoders,
        deterministic(plan.deterministic),
        Streams(plan.backbone, plan.device, plan.work, plan.engine) as streams,
        ThreadPoolExecutor(1, "bbx-write", initializer=torch.set_num_threads, initargs=(1,)) as writer,
    ):
        writes: deque[Future[_Written]] = deque()
        left = len(rows)
        started = time.perf_counter()

        def report(written: _Written) -> None:
            _count(summary, written)
            summary.wall = time.perf_counter() - started
            if progress:
                progress(summary)

        try:
            for batch in _decoded(plan, rows, decoders, ahead=streams.depth + _AHEAD):
                good, bad = batch.collect(summary)
                if bad and on_error == "fail":
                    key = plan.images.keys[bad[0].row]
                    raise ImageError(f"{key}: {bad[0].reason}", "leave --on-error fail out to record it and go on")
                computed = streams.submit(*batch.pixels(good, padded=plan.padded)) if len(good) else None
                for one in bad:
                    summary.add_failure(plan.images.keys[one.row], one.reason)
                writes.append(writer.submit(_write, sink, batch, good, computed, bad))
                while len(writes) > streams.depth + _BEHIND:
                    report(writes.popleft().result())
                left -= len(batch.rows)
                if left and (signum := stop and stop()):
                    raise _interrupted(plan, signum)
        finally:
            while writes:
                report(writes.popleft().result())


def _count(summary: Summary, written: _Written) -> None:
    summary.done, summary.extracted = summary.done + written.done, summary.extracted + written.done
    summary.write += written.seconds
    if written.computed is not None:
        summary.compute += written.computed.seconds
        summary.notes += written.computed.notes
        written.computed.add_counts(summary.nonfinite, summary.overflow)


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

    def pixels(self, good: NDArray[np.int64], *, padded: bool) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """What to compute, `(b, h, w, 3)`, and which rows of that are the good ones.

        `padded`: the batch keeps its shape, and what is computed of an empty slot is dropped.
        """
        if padded:
            return self.buffer, self.slots[good]
        return self.buffer if len(good) == len(self.rows) else self.buffer[good], np.arange(len(good))

    def inputs(self, good: NDArray[np.int64]) -> list[InputFile]:
        """The image files of the good ones."""
        return [self.reads[place].result().file for place in good]


def _decoded(plan: Plan, rows: NDArray[np.int64], decoders: Decoders, *, ahead: int) -> Iterator[_Batch]:
    """Batches in row order, each handed out as soon as it was submitted and `ahead` more were."""
    waiting: deque[_Batch] = deque()
    for chunk in _chunks(rows, plan.batch_size, aligned=plan.deterministic or not plan.retry_failed):
        # Padded: each row at its own place of a whole batch, whatever became of its neighbours.
        slots = chunk % plan.batch_size if plan.deterministic else np.arange(len(chunk))
        buffer = _buffer(plan, plan.batch_size if plan.padded else len(chunk))
        reads = [
            decoders.submit(plan.images.path(int(row)), buffer[slot]) for row, slot in zip(chunk, slots, strict=True)
        ]
        waiting.append(_Batch(chunk, slots, buffer, reads))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def _buffer(plan: Plan, count: int) -> NDArray[Any]:
    """Room for the pixels of `count` images, all zero; where a GPU fetches them, in memory that it can read itself."""
    shape, cells = (count, *plan.run.preprocess.size, 3), cell_dtype(plan.run.preprocess)
    if plan.device.type != "cuda":
        return np.zeros(shape, cells)
    kind = torch.from_numpy(np.empty(0, cells)).dtype
    return torch.zeros(shape, dtype=kind, pin_memory=True).numpy()


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
    sink: Sink, batch: _Batch, good: NDArray[np.int64], computing: Future[Computed] | None, bad: list[Bad]
) -> _Written:
    computed = computing.result() if computing else None
    if computed:
        computed.wait()
    started = time.perf_counter()
    if computed:
        arrays = {name: tensor.contiguous().numpy() for name, tensor in computed.maps.items()}
        sink.write(batch.rows[good], arrays, batch.inputs(good))
        computed.maps.clear()
    for one in bad:
        sink.fail(one.row, one.reason, one.file)
    return _Written(len(good), computed, time.perf_counter() - started)
