"""Pack a finished, plain file into a compressed one: every image its own chunk, shuffled and deflated.

That pair of filters is the one that every build of HDF5 reads. The chunks are encoded here, in threads, and handed to
HDF5 as they are. Extraction itself always writes the plain file, so its promises hold unchanged; packing comes after,
beside it, and a kill in between leaves the plain file as it was.

HDF5 crashes the process when its own writes fail, so it never sees that: it writes through a `SafeFile`.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import signal
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from bbx.errors import InterruptedRunError, StartError, WriteError
from bbx.machine import cores
from bbx.store import carry, disk, format, skeleton, trust
from bbx.store.checksum import crc32
from bbx.store.format import Column
from bbx.store.safefile import SafeFile

Progress = Callable[[int, int], None]
"""Told the bytes of features that are dealt with, and those that there are in all."""
Stop = Callable[[], int | None]

CHUNK_NBYTES = 8 << 20
"""An image whose features are larger is split along its first axis; two images never share a chunk."""
_LEVEL = 1
_BLOCK = 16_384

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


def pack(source: Path, out: Path, *, progress: Progress | None = None, stop: Stop | None = None) -> None:
    """Make the compressed file `out` of `source`, a feature file with no pending row, and remove `source`.

    `out` is written as `<out>.packing`, read back and compared with the checksums of every row, and only then moved to
    its name. Killed at any instant, either `source` is whole or `out` is; called again, it starts over. `stop` is asked
    after each row and returns a signal number to stop at.

    Raises `WriteError` when the disk fails, `FileError` for a source that is damaged, `InterruptedRunError`; `source`
    then stays as it was.
    """
    draft = out.with_name(out.name + ".packing")
    disk.refuse_link(draft)
    if source == draft:
        raise StartError(f"{source} is the name of a draft of {out}", "rename it first")
    try:
        opened = trust.open_checked(source)
        try:
            if (opened.status() == format.PENDING).any():
                raise StartError(f"{source} has pending rows, and only a finished file is packed")
            _Packing(opened, draft, progress, stop).work()
        finally:
            opened.close()
        draft.replace(out)
        disk.sync_folder(out.parent)
        source.unlink()
        disk.sync_folder(source.parent)
    except (OSError, zlib.error) as error:
        raise _failed(out, source, error) from error
    finally:
        draft.unlink(missing_ok=True)


def _failed(out: Path, source: Path, error: OSError | zlib.error) -> WriteError:
    return WriteError(
        f"the disk failed to write {out}, compressed: {getattr(error, 'strerror', None) or error}",
        f"{source} has every row, uncompressed; make room if the disk is full, and run the same command again",
    )


class _Packing:
    """One source on its way into `draft`."""

    def __init__(self, opened: trust.OpenFile, draft: Path, progress: Progress | None, stop: Stop | None) -> None:
        self.source = opened
        self.run = opened.facts.run
        self.rows = opened.facts.rows
        self.draft = draft
        self._progress = progress
        self._stop = stop
        self._total = self.run.row_nbytes * self.rows
        self._done = 0
        self._broken_off = False

    def work(self) -> None:
        """Write the draft, durable, and compare it. Raises `OSError`, `FileError`."""
        # HDF5 runs in a thread of its own: Ctrl-C raises in the main one only, and must not break off a write of HDF5.
        with ThreadPoolExecutor(1, "bbx-pack") as hdf5:
            for step in (self._write, self._compare):
                done = hdf5.submit(step)
                try:
                    done.result()
                except BaseException:
                    self._broken_off = True
                    raise

    def _write(self) -> None:
        fd = os.open(self.draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            self._write_facts(fd, self._write_hdf5(SafeFile(fd)))
            os.fsync(fd)
        finally:
            os.close(fd)

    def _write_hdf5(self, target: SafeFile) -> dict[str, Column]:
        """Everything that HDF5 has to write; returns the columns, the plain ones placed."""
        facts = self.source.facts
        keys = [format.decode_key(key) for block in self.source.key_blocks() for key in block]
        part = skeleton.Part(facts.row_start, facts.rows_total)
        attempt = format.encode_attempt(None)
        try:
            with h5py.File(target, "w", libver=skeleton.LIBVER, track_times=False) as file:
                columns = skeleton.lay_out(file, self.run, keys, attempt, part=part, make_stage=chunked)
                for stage in self.run.stages:
                    self._write_stage(target, file[stage.name], facts.columns[stage.name])
                return columns
        finally:
            target.check()  # whatever HDF5 made of it, the disk's own word comes first

    def _write_stage(self, target: SafeFile, data: h5py.Dataset, column: Column) -> None:
        encode = functools.partial(_encoded, self.source, column, data.chunks)
        for row, chunks in enumerate(_threaded(encode, range(self.rows))):
            for place, chunk in enumerate(chunks):
                start = (row, place * data.chunks[1], *(0,) * (data.ndim - 2))
                data.id.write_direct_chunk(start, chunk)
                target.check()
            self._step(column.row_nbytes)

    def _write_facts(self, fd: int, columns: dict[str, Column]) -> None:
        """Everything but the features, as it was; the marks last."""
        carry.write_attempts(fd, columns, carry.attempts(self.source))
        stages = [stage.name for stage in self.run.stages]
        start = 0
        for keys in self.source.key_blocks():
            carry.write_facts(fd, columns, stages, start, carry.read_facts(self.source, start, keys), status=False)
            start += len(keys)
        disk.make_durable(fd)
        offset = columns[format.STATUS].offset
        assert offset is not None
        disk.write_at(fd, self.source.status(), offset)

    def _compare(self) -> None:
        """Read every row of the draft as a reader would and compare it with the checksum that the source has for it."""
        packed = trust.open_checked(self.draft)
        try:
            for stage in self.run.stages:
                self._compare_stage(packed, packed.facts.columns[stage.name])
        finally:
            packed.close()

    def _compare_stage(self, packed: trust.OpenFile, column: Column) -> None:
        data = packed.file[column.name]
        starts = [place * data.chunks[1] for place in range(math.ceil(data.shape[1] / data.chunks[1]))]
        rest = (0,) * (data.ndim - 2)
        raw = ([data.id.read_direct_chunk((row, at, *rest))[1] for at in starts] for row in range(self.rows))
        wanted: NDArray[Any] = np.empty(0, np.uint32)
        for row, found in enumerate(_threaded(functools.partial(_crc32, column), raw)):
            if row % _BLOCK == 0:
                wanted = self.source.rows(format.checksum_name(column.name), row, min(_BLOCK, self.rows - row))
            if found != wanted[row % _BLOCK]:
                raise self._unlike(column, row, found)
            self._step(column.row_nbytes)

    def _unlike(self, column: Column, row: int, found: int) -> Exception:
        """Whose fault a difference is: the source's, if its own row is what was packed."""
        if crc32(self.source.rows(column.name, row, 1).data) != found:
            return OSError(None, f"row {row} of {column.name} came back otherwise than it was written")
        key = next(key for at, key in enumerate(self._keys()) if at == row)
        return carry.damaged(self.source, row, key, f"does not match its checksum in {column.name}")

    def _keys(self) -> Iterator[bytes]:
        return (key for block in self.source.key_blocks() for key in block)

    def _step(self, nbytes: int) -> None:
        signum = signal.SIGINT if self._broken_off else self._stop and self._stop()
        if signum:
            raise InterruptedRunError(
                f"stopped by {signal.Signals(signum).name}; {self.source.path} has every row, uncompressed",
                "the same command continues",
                signum=signum,
            )
        # Written and compared: each counts one half.
        self._done += nbytes
        if self._progress:
            self._progress(self._done // 2, self._total)


def chunked(file: h5py.File, column: Column, rows: int) -> None:
    """The stage as chunks of one image each, or of one image's first part; shuffled and deflated."""
    first, *rest = column.row_shape
    most = max(1, CHUNK_NBYTES * first // column.row_nbytes)
    chunk = (1, math.ceil(first / math.ceil(first / most)), *rest)
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_chunk(chunk)
    plan.set_shuffle()
    plan.set_deflate(_LEVEL)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    plan.set_obj_track_times(False)
    space = h5py.h5s.create_simple((rows, *column.row_shape))
    kind = h5py.h5t.py_create(column.dtype, logical=True)
    h5py.h5d.create(file.id, column.name.encode(), kind, space, plan)


def _encoded(source: trust.OpenFile, column: Column, chunk: tuple[int, ...], row: int) -> list[bytes]:
    """The chunks of a row of the plain `source`, the last one filled up with zeros, as HDF5 wants it."""
    values = source.rows(column.name, row, 1)[0]
    encoded = []
    for start in range(0, len(values), chunk[1]):
        piece = values[start : start + chunk[1]]
        if len(piece) < chunk[1]:
            piece = np.concatenate([piece, np.zeros((chunk[1] - len(piece), *chunk[2:]), column.dtype)])
        encoded.append(_deflate()(_shuffled(piece)))
    return encoded


def _crc32(column: Column, chunks: list[bytes]) -> int:
    """CRC32 of the row's bytes that `chunks` hold. Raises `zlib.error`."""
    crc, left = 0, column.row_nbytes
    for data in chunks:
        planes = np.frombuffer(zlib.decompress(data), np.uint8).reshape(column.dtype.itemsize, -1)
        values = np.empty(planes.shape[::-1], np.uint8)
        for place, plane in enumerate(planes):  # four times as fast as the transpose's tobytes()
            values[:, place] = plane
        piece = values.reshape(-1)[:left]
        crc, left = crc32(piece.data, crc), left - len(piece)
    return crc


def _shuffled(values: NDArray[Any]) -> bytes:
    """First bytes of all values, then all second bytes, and so on."""
    return values.reshape(-1).view(np.uint8).reshape(-1, values.dtype.itemsize).T.tobytes()


@functools.cache
def _deflate() -> Callable[[bytes], bytes]:
    """ISA-L where it is installed; else zlib looking for runs only, twice as fast as its level 1, and no larger."""
    try:
        isal = importlib.import_module("isal.isal_zlib")
    except ImportError:
        return _deflate_zlib
    return functools.partial(isal.compress, level=_LEVEL)


def _deflate_zlib(data: bytes) -> bytes:
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    return packer.compress(data) + packer.flush()


def _threaded(function: Callable[[_Item], _Made], items: Iterable[_Item]) -> Iterator[_Made]:
    """`function` of each item, in order, in as many threads as there are cores, a few items ahead."""
    threads = cores()
    waiting: deque[Future[_Made]] = deque()
    with ThreadPoolExecutor(threads, "bbx-deflate") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
