"""The loop and its overlap: images → batches → backbone → sink.

Three things go on at once: worker processes decode, the engine's streams compute, and one thread lays out and writes.
Between them stand queues of a few batches, so memory does not grow with the number of images.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bbx.engine import Streams, deterministic
from bbx.errors import ImageError, InterruptedRunError
from bbx.gpu_decode import decoders_for
from bbx.images import Decoders, cell_dtype
from bbx.images.process import Answer
from bbx.plan import Plan, Summary
from bbx.spec import InputFile, OnError
from bbx.writing import Bad, Job, Sink, Writing, Written

# Batches that wait to be computed beyond those that are being so, and to be written: more only cost memory.
_AHEAD, _BEHIND = 1, 2

Progress = Callable[[Summary], None]


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
    where not one image fits into the device's memory, and what `sink` raises. Left by a signal, it has let go of the
    batches that no stream had begun, but for the oldest: their rows stay pending.
    """
    left = len(rows)
    started = time.perf_counter()

    def report(written: Written) -> None:
        _count(summary, written, plan.images.keys)
        summary.wall = time.perf_counter() - started
        if progress:
            progress(summary)

    with (
        decoders_for(plan.decoders(len(rows)), plan.decoding, plan.device) as decoders,
        deterministic(plan.deterministic),
        Streams(plan.backbone, plan.device, plan.work, plan.engine) as streams,
        Writing(sink, streams.depth + _BEHIND, report) as writing,
    ):
        started = time.perf_counter()
        try:
            for batch in _decoded(plan, rows, decoders, ahead=streams.depth + _AHEAD):
                good, bad = batch.collect(summary)
                if bad and on_error == "fail":
                    key = plan.images.keys[bad[0].row]
                    raise ImageError(f"{key}: {bad[0].reason}", "leave --on-error fail out to record it and go on")
                computing = streams.submit(*batch.pixels(good, padded=plan.padded)) if len(good) else None
                writing.add(Job(batch.rows[good], batch.inputs(good), computing, bad))
                left -= len(batch.rows)
                if left and (signum := stop and stop()):
                    writing.drop()
                    raise _interrupted(plan, signum)
            while len(writing):
                writing.next()
                if (signum := stop and stop()) and writing.drop():
                    raise _interrupted(plan, signum)
        finally:
            summary.notes += decoders.notes


def _count(summary: Summary, written: Written, keys: Sequence[str]) -> None:
    summary.done, summary.extracted = summary.done + written.done, summary.extracted + written.done
    summary.write += written.seconds
    for one in written.bad:
        summary.add_failure(keys[one.row], one.reason)
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
    for chunk in _chunks(rows, plan.batch_size, _ends(plan)):
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


def _ends(plan: Plan) -> Callable[[int], int] | None:
    """Where a batch ends, by any of its rows; None where rows are few and scattered.

    A run that is resumed computes the batches that an uninterrupted one would have. What is left for the last round of
    the streams, they share, lest most of them be idle; unless batches keep their shape.
    """
    size, total = plan.batch_size, len(plan.images)
    if plan.retry_failed and not plan.deterministic:
        return None
    return partial(_end, size=size, total=total, streams=1 if plan.padded else plan.engine.streams)


def _end(row: int, *, size: int, total: int, streams: int) -> int:
    """The row before which the batch of `row` ends: `streams` compute `total` rows, `size` at a time."""
    rounds = total - total % (size * streams)
    start, count = (0, size) if row < rounds else (rounds, -(-(total - rounds) // streams))
    return start + ((row - start) // count + 1) * count


def _chunks(rows: NDArray[np.int64], size: int, end: Callable[[int], int] | None = None) -> Iterator[NDArray[np.int64]]:
    """`rows`, ascending, `size` at a time, or fewer where `end` of the first says so."""
    start = 0
    while start < len(rows):
        stop = start + size
        if end:
            stop = start + int(np.searchsorted(rows[start:stop], end(int(rows[start]))))
        yield rows[start:stop]
        start = min(stop, len(rows))
