"""The bytes of rows, written at their places through one descriptor; which of them count is the committer's to say.

Linux takes one write into a file at a time (ext4, page cache, two cores: 7.7 GB/s by one thread, 7.7 by two, 13.5 into
two files), so one thread does nothing but write; a few more lay the rows out and check-sum them, ahead of it. Who needs
more has two processes write two files, and `bbx merge --virtual`.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bbx.errors import StartError, UsageError, WriteError
from bbx.machine import cores
from bbx.spec import InputFile
from bbx.store import disk, format, lock
from bbx.store.checksum import crc32
from bbx.store.commit import failed, runs
from bbx.store.format import Column

_PIECE_NBYTES = 4 << 20
"""Rows are laid out, check-summed and written so much at a time: small enough for a CPU's caches, large for a call."""
_THREADS = 4
"""At most: with them one thread's writes are what is waited for."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some rows of one stage: `values` `(k, *row_shape)`, of any float type and order, from `first` of the batch on."""

    column: Column
    stage: int
    first: int
    values: NDArray[Any]

    def ready(self) -> tuple[NDArray[Any], NDArray[np.uint32]]:
        """The rows as they go to disk, and the CRC32 of each, `(k,)`."""
        with np.errstate(over="ignore"):
            rows = np.ascontiguousarray(self.values, dtype=self.column.dtype)
        return rows, np.array([crc32(row.data) for row in rows.reshape(len(rows), -1)], "<u4")


class Rows:
    """The rows of an unfinished file at `path`, whose `columns` have their places and whose rows are named by `keys`.

    `blank`: no earlier start has written into it. Raises `StartError` where another program has the file open to write.
    """

    def __init__(self, path: Path, columns: Mapping[str, Column], keys: Sequence[str], *, blank: bool) -> None:
        self.error: WriteError | None = None
        self._path = path
        self._columns = columns
        self._keys = keys
        self._blank = blank
        self.fd = lock.own(os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)))
        if not lock.try_lock(self.fd, shared=True):  # so that no HDF5 program opens the file to write
            lock.disown(self.fd)
            raise StartError(f"{path} is open for writing in another program", "close it there")
        self._threads = min(_THREADS, cores())
        self._pool = ThreadPoolExecutor(self._threads, "bbx-checksum")
        # A thread that outlived an interrupt must not write to a descriptor that is somebody else's by then.
        self._using = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Let go of the file."""
        with self._using:
            self._closed = True
            self._pool.shutdown()
            lock.disown(self.fd)

    def put(
        self,
        places: NDArray[np.int64],
        arrays: Mapping[str, NDArray[Any]],
        status: int,
        inputs: Sequence[InputFile],
        reason: bytes,
    ) -> None:
        """Write features, `(k, *stage.shape)` of any float type, and facts of the rows `places`, all but their marks.

        Raises `WriteError`, which stays in `error`.
        """
        if len(inputs) != len(places):
            raise UsageError(f"{len(inputs)} input files for {len(places)} rows", "one for each")
        sums = np.empty((len(places), len(arrays)), "<u4")
        with self._using:
            if self._closed:
                raise UsageError(f"the writer of {self._path} is closed")
            for piece, rows, found in self._laid_out(arrays):
                last = piece.first + len(rows)
                sums[piece.first : last, piece.stage] = found
                self._write(piece.column.name, places[piece.first : last], rows)
            for stage, name in enumerate(arrays):
                self._write(format.checksum_name(name), places, sums[:, stage].copy())
            self._put_facts(places, status, inputs, reason, sums)

    def put_attempt(self, slot: int, attempt: Mapping[str, object]) -> None:
        """Record a start; one page, written whole: a power loss takes the old text or the new one. Raises `OSError`."""
        disk.write_at(self.fd, format.encode_attempt(attempt), _offset(self._columns[format.ATTEMPTS], slot))

    def unmark(self, places: NDArray[np.int64]) -> None:
        """Make rows pending on disk, before any byte of theirs is written again. Raises `OSError`."""
        for first, last in runs(places):
            disk.write_at(self.fd, bytes(last - first), _offset(self._columns[format.STATUS], first))
        if len(places):
            disk.make_durable(self.fd)

    def _laid_out(
        self, arrays: Mapping[str, NDArray[Any]]
    ) -> Iterator[tuple[_Piece, NDArray[Any], NDArray[np.uint32]]]:
        """Each piece with what `ready` makes of it, in order, few of them in memory; a small batch without threads."""
        pieces = list(self._pieces(arrays))
        if len(pieces) == len(arrays) and sum(array.nbytes for array in arrays.values()) < _PIECE_NBYTES:
            yield from ((piece, *piece.ready()) for piece in pieces)
            return
        waiting: deque[tuple[_Piece, Future[tuple[NDArray[Any], NDArray[np.uint32]]]]] = deque()
        for piece in pieces:
            waiting.append((piece, self._pool.submit(piece.ready)))
            if len(waiting) > 2 * self._threads:
                first, ready = waiting.popleft()
                yield first, *ready.result()
        yield from ((piece, *ready.result()) for piece, ready in waiting)

    def _pieces(self, arrays: Mapping[str, NDArray[Any]]) -> Iterator[_Piece]:
        for stage, (name, array) in enumerate(arrays.items()):
            column = self._columns[name]
            count = max(1, _PIECE_NBYTES // column.row_nbytes)
            for first in range(0, len(array), count):
                yield _Piece(column, stage, first, array[first : first + count])

    def _put_facts(
        self,
        places: NDArray[np.int64],
        status: int,
        inputs: Sequence[InputFile],
        reason: bytes,
        sums: NDArray[np.uint32],
    ) -> None:
        keys = [format.encode_key(self._keys[place]) for place in places]
        reasons = np.full(len(places), reason, f"S{format.FAILURE_NBYTES}")
        files = format.input_arrays(inputs)
        facts = format.RowFacts(keys, np.full(len(places), status, np.uint8), reasons, *files, sums)
        if reason or not self._blank:  # an earlier start may have written a reason
            self._write(format.FAILURE, places, reasons)
        if format.SEAL in self._columns:
            self._write(format.INPUT_NBYTES, places, facts.nbytes)
            self._write(format.INPUT_MTIME, places, facts.mtimes)
            self._write(format.INPUT_DIGEST, places, facts.digests)
            self._write(format.SEAL, places, facts.seals())

    def _write(self, name: str, places: NDArray[np.int64], values: NDArray[Any]) -> None:
        """`values`, `(k, *row_shape)`, at the rows `places`, `(k,)`: one call per run of consecutive rows."""
        column = self._columns[name]
        done = 0
        try:
            for first, last in runs(places):
                count = last - first
                disk.write_at(self.fd, values[done : done + count].view(np.uint8), _offset(column, first))
                done += count
        except OSError as error:
            self.error = failed(f"write to {self._path}", error)
            raise self.error from error


def _offset(column: Column, row: int) -> int:
    if column.offset is None:
        raise StartError(f"{column.name} is compressed, and rows cannot be added to it", "--mode overwrite")
    return column.offset + row * column.row_nbytes
