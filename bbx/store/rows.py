"""The bytes of rows, written at their places through one descriptor; which of them count is the committer's to say."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bbx.errors import StartError, UsageError, WriteError
from bbx.spec import InputFile
from bbx.store import disk, format, lock
from bbx.store.commit import failed, runs
from bbx.store.format import Column


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
        self._pool = ThreadPoolExecutor(1, "bbx-checksum")
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
        """Write features, `(k, *stage.shape)`, and facts of the rows `places`, `(k,)`, all but their marks.

        Raises `WriteError`, which stays in `error`.
        """
        if len(inputs) != len(places):
            raise UsageError(f"{len(inputs)} input files for {len(places)} rows", "one for each")
        sums = np.empty((len(places), len(arrays)), "<u4")
        with self._using:
            if self._closed:
                raise UsageError(f"the writer of {self._path} is closed")
            for column, (name, array) in enumerate(arrays.items()):
                waiting = self._pool.submit(_checksums, array)  # beside the write: both let go of the interpreter
                self._write(name, places, array)
                sums[:, column] = waiting.result()
                self._write(format.checksum_name(name), places, sums[:, column].copy())
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


def _checksums(array: NDArray[Any]) -> NDArray[np.uint32]:
    """CRC32 of each row's bytes, `(b,)`."""
    return np.array([zlib.crc32(row.data) for row in array.reshape(len(array), -1)], "<u4")


def _offset(column: Column, row: int) -> int:
    if column.offset is None:
        raise StartError(f"{column.name} is compressed, and rows cannot be added to it", "--mode overwrite")
    return column.offset + row * column.row_nbytes
