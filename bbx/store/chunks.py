"""Decode the chunks of a compressed stage, never to more bytes than a chunk may hold.

HDF5's own deflate lets a chunk grow to whatever it inflates to: a file of 2 MB can take gigabytes. So bbx reads chunks
as they are stored and undoes the filters itself: shuffle, deflate and fletcher32, with any shape of chunk.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from bbx.errors import FileError
from bbx.store.disk import size_text

_NO_LOCK = contextlib.nullcontext()
_SUM_NBYTES = 4
_SUM_BLOCK = 1 << 16
"""Words added up at once: the weighted sum of that many fits 64 bits."""


def read(
    data: h5py.Dataset,
    first: int,
    last: int,
    out: NDArray[Any],
    *,
    lock: AbstractContextManager[Any] = _NO_LOCK,
) -> None:
    """Read rows `first` to `last`, half-open, of a chunked dataset into `out`, C-contiguous `(last - first, *row)`.

    `lock` is held around the calls of HDF5, not while a chunk is decoded. Holds one chunk at a time. Raises `FileError`
    for a chunk that is missing, damaged, or larger than it may be.
    """
    if first == last:
        return
    with lock:
        plan = _Plan.of(data)
    buffer = np.empty(plan.most, np.uint8)
    for start in plan.starts(first, last):
        with lock:
            mask, stored = _stored(data, start, buffer)
        values = np.frombuffer(plan.decoded(stored, mask), plan.dtype).reshape(plan.chunk)
        low = (max(start[0], first), *start[1:])
        high = tuple(map(min, (last, *plan.shape[1:]), map(sum, zip(start, plan.chunk, strict=True))))
        there = (slice(low[0] - first, high[0] - first), *map(slice, low[1:], high[1:]))
        here = (slice(one - at, end - at) for one, end, at in zip(low, high, start, strict=True))
        out[there] = values[tuple(here)]


def _stored(data: h5py.Dataset, start: tuple[int, ...], buffer: NDArray[np.uint8]) -> tuple[int, memoryview]:
    """The filter mask and the bytes of the chunk at `start` as they lie in the file, at most `buffer`'s."""
    try:
        # Refuses a chunk larger than the buffer before reading it. Asking for its place first would do so too, and goes
        # through all chunks before it: a minute per thousand rows in a file of a million.
        mask, stored = data.id.read_direct_chunk(start, out=buffer)
    except (OSError, RuntimeError, ValueError) as error:
        raise FileError(_unreadable(data, start, len(buffer), error)) from error
    return mask, stored


def _unreadable(data: h5py.Dataset, start: tuple[int, ...], most: int, error: Exception) -> str:
    """Why HDF5 did not give the chunk at `start`."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        place = data.id.get_chunk_info_by_coord(start)
        if place.byte_offset is None:
            return f"{data.name} has no chunk at {start}, and its rows should be there"
        if place.size > most:
            return f"a chunk of {data.name} takes {place.size} bytes, and may take {most}"
    return f"a chunk of {data.name} cannot be read ({error})"


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a dataset is cut into chunks and encoded; `filters` are (code, first parameter), in order of writing."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    filters: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, data: h5py.Dataset) -> _Plan:
        """The plan of a checked dataset."""
        plan = data.id.get_create_plist()
        found = (plan.get_filter(index) for index in range(plan.get_nfilters()))
        filters = tuple((code, values[0] if values else 0) for code, _, values, _ in found)
        return cls(data.name, data.dtype, data.shape, plan.get_chunk(), filters)

    @property
    def nbytes(self) -> int:
        """Bytes of a decoded chunk."""
        return math.prod(self.chunk) * self.dtype.itemsize

    @property
    def most(self) -> int:
        """Bytes that an encoded chunk may have: what zlib makes of noise, and a fletcher32."""
        return self.nbytes + self.nbytes // 1000 + 4096 + _SUM_NBYTES

    def starts(self, first: int, last: int) -> Iterator[tuple[int, ...]]:
        """The first element of every chunk that has a part in the rows `first` to `last`."""
        rest = (range(0, whole, part) for whole, part in zip(self.shape[1:], self.chunk[1:], strict=True))
        return itertools.product(range(first - first % self.chunk[0], last, self.chunk[0]), *rest)

    def decoded(self, stored: memoryview, mask: int) -> bytes | memoryview:
        """A chunk without its filters but those that `mask` says were left out, of exactly `nbytes`."""
        applied = [one for place, one in enumerate(self.filters) if not mask >> place & 1]
        codes = [code for code, _ in applied]
        result: bytes | memoryview = stored
        for place in reversed(range(len(applied))):
            code, parameter = applied[place]
            nbytes = self.nbytes + _SUM_NBYTES * codes[:place].count(h5py.h5z.FILTER_FLETCHER32)
            result = _UNDO[code](self.name, result, parameter, nbytes)
        if len(result) != self.nbytes:
            raise FileError(f"a chunk of {self.name} has {len(result)} bytes for {self.nbytes}")
        return result


def _inflated(name: str, data: bytes | memoryview, level: int, nbytes: int) -> bytes:
    """`data` inflated; `nbytes` is all that it may come to."""
    unpacker = zlib.decompressobj()
    try:
        result = unpacker.decompress(data, nbytes + 1)
    except zlib.error as error:
        raise FileError(f"a chunk of {name} is damaged (zlib: {error})") from None
    if len(result) > nbytes:
        raise FileError(f"a chunk of {name} holds more than it may: {size_text(nbytes)}")
    if not unpacker.eof:
        raise FileError(f"a chunk of {name} is damaged (zlib: it is cut off)")
    return result


def _unshuffled(name: str, data: bytes | memoryview, size: int, nbytes: int) -> bytes | memoryview:
    """`data` in its own order, of elements of `size` bytes; bytes beyond the last whole one were left in place."""
    count = len(data) // size if size > 1 else 0
    if count < 2:
        return data
    flat = np.frombuffer(data, np.uint8)
    result = np.empty_like(flat)
    for place, plane in enumerate(flat[: count * size].reshape(size, count)):
        result[place : count * size : size] = plane
    result[count * size :] = flat[count * size :]
    return result.data


def _without_sum(name: str, data: bytes | memoryview, unused: int, nbytes: int) -> memoryview:
    """`data` less the checksum at its end, which must be right."""
    body, end = memoryview(data)[:-_SUM_NBYTES], bytes(data[-_SUM_NBYTES:])
    wanted = int.from_bytes(end, "little")
    # HDF5 leaves either 0 or 65535 where a sum comes to a multiple of 65535.
    if len(end) < _SUM_NBYTES or _fletcher32(body) != (wanted & 0xFFFF) % 0xFFFF | (wanted >> 16) % 0xFFFF << 16:
        raise FileError(f"a chunk of {name} is damaged (fletcher32: its checksum is another)")
    return body


def _fletcher32(data: memoryview) -> int:
    """HDF5's checksum of `data`, both sums taken modulo 65535."""
    words = np.frombuffer(data, ">u2", len(data) // 2)
    low = high = 0
    for start in range(0, len(words), _SUM_BLOCK):
        block = words[start : start + _SUM_BLOCK].astype(np.uint64)
        high += len(block) * low + int(block @ np.arange(len(block), 0, -1, dtype=np.uint64))
        low += int(block.sum())
    if len(data) % 2:
        low += data[-1] << 8
        high += low
    return high % 0xFFFF << 16 | low % 0xFFFF


_UNDO: dict[int, Callable[[str, bytes | memoryview, int, int], bytes | memoryview]] = {
    h5py.h5z.FILTER_DEFLATE: _inflated,
    h5py.h5z.FILTER_SHUFFLE: _unshuffled,
    h5py.h5z.FILTER_FLETCHER32: _without_sum,
}
