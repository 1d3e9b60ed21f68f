"""Carry rows over into another file: features as they are, and what the file says of them unless a seal is broken."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bbx.errors import FileError
from bbx.store import disk, format, trust
from bbx.store.format import Column, RowFacts

_NO_RANGE_COPY = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)
_BUFFER_NBYTES = 64 << 20


def read_facts(opened: trust.OpenFile, start: int, keys: Sequence[bytes]) -> RowFacts:
    """What `opened` says of its rows from `start` on, whose stored keys are `keys`; a 1.0 file knows no input files.

    Raises `FileError` for a row whose seal does not match: something in it was changed since it was written.
    """
    if not opened.facts.sealed:
        return _unsealed(opened, start, keys)
    facts = opened.row_facts(start, keys)
    stored = opened.rows(format.SEAL, start, len(keys))
    broken = np.flatnonzero((facts.status != format.PENDING) & (facts.seals() != stored))
    if len(broken):
        row = int(broken[0])
        raise damaged(opened, start + row, keys[row], "is not what its seal says")
    return facts


def _unsealed(opened: trust.OpenFile, start: int, keys: Sequence[bytes]) -> RowFacts:
    none = np.zeros(len(keys), np.int64)
    return RowFacts(
        keys,
        status=opened.rows(format.STATUS, start, len(keys)).astype(np.uint8, copy=False),
        reasons=opened.rows(format.FAILURE, start, len(keys)).astype(f"S{format.FAILURE_NBYTES}", copy=False),
        nbytes=none,
        mtimes=none,
        digests=np.zeros((len(keys), format.DIGEST_NBYTES), np.uint8),
        sums=sums(opened, start, len(keys)),
    )


def sums(opened: trust.OpenFile, start: int, count: int) -> NDArray[np.uint32]:
    """The recorded CRC32 of `count` rows from `start` on, `(count, stages)`, stages in the run's order."""
    names = [format.checksum_name(stage.name) for stage in opened.facts.run.stages]
    return np.stack([opened.rows(name, start, count).astype(np.uint32, copy=False) for name in names], axis=1)


def write_facts(
    fd: int, columns: Mapping[str, Column], stages: Sequence[str], start: int, facts: RowFacts, *, status: bool
) -> None:
    """Write `facts`, sealed anew, as the rows from `start` on of the file open at `fd`; the marks only with `status`.

    `stages` name the columns of `facts.sums`. Raises `OSError`.
    """
    named = {
        format.FAILURE: facts.reasons,
        format.INPUT_NBYTES: facts.nbytes,
        format.INPUT_MTIME: facts.mtimes,
        format.INPUT_DIGEST: facts.digests,
        format.SEAL: facts.seals(),
        **{format.checksum_name(stage): facts.sums[:, place] for place, stage in enumerate(stages)},
        **({format.STATUS: facts.status} if status else {}),
    }
    for name, values in named.items():
        data = np.ascontiguousarray(values, dtype=columns[name].dtype)
        disk.write_at(fd, data.view(np.uint8), place(columns[name], start))


def write_attempts(fd: int, columns: Mapping[str, Column], slots: Sequence[bytes]) -> None:
    """Write the starts, at most as many as there are slots. Raises `OSError`."""
    disk.write_at(fd, b"".join(slots), place(columns[format.ATTEMPTS], 0))


def attempts(opened: trust.OpenFile) -> list[bytes]:
    """Every start that `opened` records, as a slot of this version."""
    slots = [slot.tobytes() for slot in opened.rows(format.ATTEMPTS, 0, format.ATTEMPT_SLOTS) if slot[0]]
    told = [format.decode_attempt(slot, sealed=opened.facts.sealed) for slot in slots]
    # A start that says neither when nor where must not get this moment and this host.
    return [format.encode_attempt({"time": "", "host": "", **facts}) for facts in told]


def place(column: Column, row: int) -> int:
    """Where the row begins, in bytes."""
    assert column.offset is not None
    return column.offset + row * column.row_nbytes


def read_rows(opened: trust.OpenFile, column: Column, first: int, count: int) -> NDArray[Any]:
    """Rows of a stage, however it is stored."""
    rows = np.empty((count, *column.row_shape), column.dtype)
    opened.fill(column.name, first, first + count, rows)
    return rows


def copy_range(source: int, start: int, target: int, at: int, nbytes: int) -> None:
    """Copy bytes from file to file, in the system where it can do that. Raises `OSError`."""
    while nbytes and hasattr(os, "copy_file_range"):
        try:
            count = os.copy_file_range(source, target, nbytes, start, at)
        except OSError as error:
            if error.errno not in _NO_RANGE_COPY:
                raise
            break
        if not count:
            break  # some file systems say so instead of refusing
        start, at, nbytes = start + count, at + count, nbytes - count
    while nbytes:
        buffer = bytearray(min(nbytes, _BUFFER_NBYTES))
        disk.read_at(source, buffer, start)
        disk.write_at(target, buffer, at)
        start, at, nbytes = start + len(buffer), at + len(buffer), nbytes - len(buffer)


def damaged(opened: trust.OpenFile, row: int, key: bytes, what: str) -> FileError:
    """The error for a row that is not what was written."""
    return FileError(
        f"row {row}, {format.decode_key(key)!r}, of {opened.path} {what}: the file is damaged",
        f"bbx verify {opened.path} names every such row",
    )
