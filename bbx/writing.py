"""What is on its way from the streams to the sink: one thread that writes, in order, and what becomes of it at the end.

A run that comes to its end, or to an orderly stop, writes all that is computed; any other error lets go of the rest.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from bbx.engine import Computed
from bbx.errors import ImageError, InterruptedRunError
from bbx.spec import InputFile


class Sink(Protocol):
    """Where rows go. `maps` holds `(b, *stage.shape)` per stage, C-contiguous, in the run's dtype."""

    def write(self, rows: NDArray[np.int64], maps: Mapping[str, NDArray[Any]], inputs: Sequence[InputFile]) -> None:
        """Takes the maps of `rows`, and their image files."""

    def fail(self, row: int, reason: str, input: InputFile | None = None) -> None:
        """Takes the reason why `row` has no maps."""


@dataclass(frozen=True, slots=True)
class Bad:
    """A row whose image could not be read."""

    row: int
    reason: str
    file: InputFile


@dataclass(frozen=True, slots=True)
class Job:
    """One batch: its good rows, their files and the maps to come, where there are such rows; and its bad ones."""

    rows: NDArray[np.int64]
    inputs: Sequence[InputFile]
    computing: Future[Computed] | None
    bad: Sequence[Bad]


@dataclass(frozen=True, slots=True)
class Written:
    """What came of a batch: how many rows are done, which failed, how they were computed, the seconds of writing."""

    done: int = 0
    bad: Sequence[Bad] = ()
    computed: Computed | None = None
    seconds: float = 0.0


class Writing:
    """Writes jobs in the order given, `most` of them waiting, as a context manager; `report` hears of each.

    Left by `ImageError` or `InterruptedRunError`, it writes what is computed, or being so; left by another error, a
    second signal among them, it ends after the row that it is at: no batch is then begun, and what is pending stays so.
    """

    def __init__(self, sink: Sink, most: int, report: Callable[[Written], None]) -> None:
        self._sink = sink
        self._most = most
        self._report = report
        self._given_up = False
        self._waiting: deque[tuple[Job, Future[Written]]] = deque()
        self._thread = ThreadPoolExecutor(1, "bbx-write", initializer=torch.set_num_threads, initargs=(1,))

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, job: Job) -> None:
        """Queues `job`; raises what writing an earlier one did."""
        self._waiting.append((job, self._thread.submit(self._write, job)))
        while len(self) > self._most:
            self.next()

    def next(self) -> None:
        """Returns once the oldest job is written; raises what computing or writing it did."""
        self._report(self._waiting.popleft()[1].result())

    def drop(self) -> int:
        """Lets go of jobs that no stream has begun; how many. The oldest stays, so that every start gets on.

        Their rows stay pending as one, the bad ones too: a resumed run then computes the same batches.
        """
        newest_first = list(self._waiting)[:0:-1]
        return sum(job.computing is not None and job.computing.cancel() for job, _ in newest_first)

    def _write(self, job: Job) -> Written:
        try:
            computed = job.computing.result() if job.computing else None
        except CancelledError:
            return Written()
        if computed:
            computed.wait()
        if self._given_up:
            return Written()
        started = time.perf_counter()
        if computed:
            arrays = {name: tensor.contiguous().numpy() for name, tensor in computed.maps.items()}
            self._sink.write(job.rows, arrays, job.inputs)
            computed.maps.clear()
        for one in job.bad:
            self._sink.fail(one.row, one.reason, one.file)
        return Written(len(job.rows), job.bad, computed, time.perf_counter() - started)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        orderly = error is None or isinstance(error, ImageError | InterruptedRunError)
        try:
            while orderly and self._waiting:
                self.next()
        except Exception as second:
            if error is None:
                raise
            error.add_note(f"and not all images before that were written: {second}")
        finally:
            self._give_up()
            self._thread.shutdown()

    def _give_up(self) -> None:
        """Has nothing begin any more."""
        self._given_up = True
        for job, writing in self._waiting:
            writing.cancel()
            if job.computing:
                job.computing.cancel()
