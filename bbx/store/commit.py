"""Mark rows as done, and only once their bytes are on disk: the one place that decides what a crash may take.

A background thread syncs the file, then writes the status bytes of the rows that were written before that sync. Between
two syncs it has the system begin to write, so that the disk is never idle and a sync finds little left to do.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from bbx.errors import WriteError
from bbx.store import disk
from bbx.store.format import Column

COMMIT_NBYTES = 256 * 1024 * 1024
COMMIT_SECONDS = 5.0
"""A commit starts when this many bytes wait, or this long after the last."""
_AHEAD_NBYTES = 16 << 20
"""The system begins to write when it was handed so many more bytes."""

_RETRY = "make room if the disk is full, and run the same command again: it goes on where this stopped"


@dataclass(frozen=True, slots=True)
class _Written:
    rows: NDArray[np.int64]
    status: int


class Committer:
    """Takes rows whose bytes were handed to the system, and marks them in the file open at `fd`.

    `marked` is the status column as the file has it. One failed sync ends it for good: what the system
    then holds of the rows is unknown, so they stay pending (a second fdatasync would call lost pages safe).
    """

    def __init__(self, fd: int, column: Column, status: NDArray[np.uint8]) -> None:
        self.marked = status
        self.error: WriteError | None = None
        self._fd = fd
        self._column = column
        self._written: list[_Written] = []
        self._waiting_nbytes = 0
        self._unbegun_nbytes = 0
        self._due = False
        self._wake = threading.Event()
        self._stopping = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="bbx-commit", daemon=True)
        self._thread.start()

    def add(self, rows: NDArray[np.int64], status: int, nbytes: int) -> None:
        """Queue `rows`, int64 `(k,)`, whose `nbytes` bytes are written but not yet durable."""
        self._written.append(_Written(rows, status))
        self._waiting_nbytes += nbytes
        self._unbegun_nbytes += nbytes
        if self._waiting_nbytes >= COMMIT_NBYTES:
            self._waiting_nbytes = self._unbegun_nbytes = 0
            self._due = True
            self._wake.set()
        elif self._unbegun_nbytes >= _AHEAD_NBYTES:
            self._unbegun_nbytes = 0
            self._wake.set()

    def flush(self) -> None:
        """Return once every row added so far is durable, and marked durably. Raises `WriteError`."""
        self._commit()
        if self.error is None:
            try:
                disk.make_durable(self._fd)
            except OSError as error:
                self.error = failed("commit the last rows", error)
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """End the thread; a commit that is under way ends first."""
        self._stopping = True
        self._wake.set()
        interrupt: BaseException | None = None
        while self._thread.is_alive():
            try:
                self._thread.join()
            except BaseException as error:  # Ctrl-C: not before the thread is done with the descriptor.
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _run(self) -> None:
        latest = time.monotonic() + COMMIT_SECONDS
        while not self._stopping:
            self._wake.wait(max(0.0, latest - time.monotonic()))
            self._wake.clear()
            try:
                if not self._due and time.monotonic() < latest:
                    with suppress(Exception):  # a hint, and no row depends on it
                        disk.begin_writing(self._fd)
                    continue
                self._due = False
                self._commit()
            except Exception as error:  # Whatever it is, a thread that died unheard would commit nothing more.
                self.error = WriteError(f"committing rows failed: {type(error).__name__}: {error}", _RETRY)
            latest = time.monotonic() + COMMIT_SECONDS

    def _commit(self) -> None:
        with self._lock:
            batch = list(self._written)
            if not batch or self.error is not None:
                return
            try:
                disk.make_durable(self._fd)
                self._mark(batch)
            except OSError as error:
                self.error = failed("commit rows", error)
                return
            # Last, so that an interrupt before it leaves the rows queued: marking twice does no harm.
            del self._written[: len(batch)]

    def _mark(self, batch: list[_Written]) -> None:
        assert self._column.offset is not None
        for written in batch:
            for first, last in runs(written.rows):
                count = last - first
                disk.write_at(self._fd, bytes([written.status]) * count, self._column.offset + first)
                self.marked[first:last] = written.status


def runs(rows: NDArray[np.int64]) -> list[tuple[int, int]]:
    """`[3, 4, 5, 9]` → `[(3, 6), (9, 10)]`: consecutive rows as half-open ranges, in the order given."""
    if len(rows) == 0:
        return []
    cuts = np.flatnonzero(rows[1:] != rows[:-1] + 1) + 1
    edges = [0, *cuts.tolist(), len(rows)]
    return [(int(rows[start]), int(rows[stop - 1]) + 1) for start, stop in pairwise(edges)]


def failed(what: str, error: OSError) -> WriteError:
    """The error for a write that the system refused."""
    return WriteError(f"the disk failed to {what}: {error.strerror or error}", _RETRY)
