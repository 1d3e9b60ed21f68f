"""Open a feature file that anybody may have made, and believe nothing in it that was not checked (`inspection`)."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from bbx.errors import BbxError, FileError
from bbx.spec import RunSpec
from bbx.store import chunks, disk, format, virtual
from bbx.store.inspection import Facts, dataset, inspect, text_lengths

_BLOCK = 16_384
_HINT = "take another copy of it, or extract it again"
_NO_LOCK = contextlib.nullcontext()


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A checked file: HDF5's handle, a plain descriptor for contiguous rows, and the facts.

    `packed_sources` are those of a virtual file that are compressed: HDF5 would decode them without a bound.
    """

    path: Path
    file: h5py.File
    fd: int
    facts: Facts
    packed_sources: frozenset[str] = frozenset()

    def close(self) -> None:
        """Close both handles."""
        with guarded(self.path):
            self.file.close()
        os.close(self.fd)

    def rows(self, name: str, start: int, count: int) -> NDArray[np.generic]:
        """`count` rows of a contiguous column from row `start`, `(count, *row_shape)`."""
        column = self.facts.columns[name]
        assert column.offset is not None
        out = np.empty((count, *column.row_shape), column.dtype)
        with guarded(self.path):
            disk.read_at(self.fd, out.view(np.uint8), column.offset + start * column.row_nbytes)
        return out

    def fill(
        self, name: str, first: int, last: int, out: NDArray[Any], *, lock: AbstractContextManager[Any] = _NO_LOCK
    ) -> None:
        """Read rows `first` to `last`, half-open, of a stage, however it is stored, into `out`, C-contiguous.

        `lock` is held around the calls of HDF5. Raises `FileError`.
        """
        column = self.facts.columns[name]
        with guarded(self.path):
            if column.offset is not None:
                disk.read_at(self.fd, out.view(np.uint8), column.offset + first * column.row_nbytes)
                return
            with lock:
                data = self.file[name]
                if data.is_virtual:
                    self._fill_from_sources(data, name, first, last, out)
                    return
            chunks.read(data, first, last, out, lock=lock)

    def _fill_from_sources(self, data: h5py.Dataset, name: str, first: int, last: int, out: NDArray[Any]) -> None:
        if not self.packed_sources:
            data.read_direct(out, np.s_[first:last])
            sums = functools.partial(self.rows, format.checksum_name(name), first, last - first)
            virtual.refuse_fill(out, sums)
            return
        out.fill(np.nan)  # a row that none of the files holds is not done
        for piece in virtual.pieces(data):
            start, stop = max(first, piece.at), min(last, piece.at + piece.count)
            if start < stop:
                source = open_checked(_source(self.path, piece.name), allow_virtual=False)
                try:
                    _check_piece(source, self.file, name, piece)
                    shift = piece.first - piece.at
                    source.fill(name, start + shift, stop + shift, out[start - first : stop - first])
                finally:
                    source.close()

    def status(self) -> NDArray[np.uint8]:
        """The commit record as it is now, uint8 `(n,)`."""
        status = self.rows(format.STATUS, 0, self.facts.rows).astype(np.uint8, copy=False)
        if status.max() > format.FAILED:
            raise FileError(f"{self.path} is damaged: a row has status {status.max()}", _HINT)
        return status

    def row_facts(self, start: int, keys: Sequence[bytes]) -> format.RowFacts:
        """What the file, a sealed one, says of the rows from `start` whose stored keys are `keys`."""

        def column(name: str) -> NDArray[Any]:
            return self.rows(name, start, len(keys))

        return format.RowFacts(
            keys,
            status=column(format.STATUS),
            reasons=column(format.FAILURE),
            nbytes=column(format.INPUT_NBYTES),
            mtimes=column(format.INPUT_MTIME),
            digests=column(format.INPUT_DIGEST),
            sums=np.stack([column(format.checksum_name(stage.name)) for stage in self.facts.run.stages], axis=1),
        )

    def broken_seals(self) -> NDArray[np.int64]:
        """The rows, done or failed, whose seal is not that of what the file says of them; none in a 1.0 file."""
        found, start = [np.empty(0, np.int64)], 0
        for keys in self.key_blocks() if self.facts.sealed else ():
            facts = self.row_facts(start, keys)
            stored = self.rows(format.SEAL, start, len(keys))
            found.append(start + np.flatnonzero((facts.status != format.PENDING) & (facts.seals() != stored)))
            start += len(keys)
        return np.concatenate(found)

    def key_blocks(self) -> Iterator[list[bytes]]:
        """Every row's key as stored, in blocks of bounded size."""
        with guarded(self.path):
            path = dataset(self.file, format.PATH)
            lengths = text_lengths(self.fd, path, self.facts.rows)
            size = os.fstat(self.fd).st_size
            if lengths.max() > format.MAX_KEY_NBYTES or int(lengths.sum()) > size:
                raise FileError(f"{self.path} is damaged: its keys are longer than the file")
            for start in range(0, self.facts.rows, _BLOCK):
                yield path[start : start + _BLOCK].tolist()


@contextlib.contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Turn whatever HDF5 raises over a damaged file, which may be anything, into a `FileError`."""
    try:
        yield
    except FileError as error:
        message = error.message if str(path) in error.message else f"{path}: {error.message}"
        raise FileError(message, error.hint or _HINT) from None
    except BbxError:
        raise
    except FileNotFoundError:
        raise went_away(path) from None
    except BlockingIOError as error:
        raise FileError(f"{path} is open for writing in another program", "close it there") from error
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        raise FileError(f"{path} is damaged, or no feature file ({text[:300]})", _HINT) from error


def went_away(path: Path) -> FileError:
    """The error for a file that was there a moment ago."""
    return FileError(
        f"{path} went away while it was opened", "see where it, or its folder, was moved to, and try again"
    )


def open_checked(path: Path, *, allow_virtual: bool = True) -> OpenFile:
    """Open `path` read-only and check all of it but the rows. Raises `FileError`."""
    while True:
        fd = _descriptor(path)
        try:
            with guarded(path):
                file = h5py.File(path, "r", locking="best-effort")
            try:
                packed: set[str] = set()
                check = functools.partial(_check_sources, path=path, packed=packed) if allow_virtual else None
                with guarded(path):
                    facts = inspect(file, fd, path, check)
                if os.path.samestat(os.fstat(fd), path.stat()):
                    return OpenFile(path, file, fd, facts, frozenset(packed))
            except BaseException:
                file.close()
                raise
            file.close()
        except FileNotFoundError:
            os.close(fd)
            raise went_away(path) from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # the path changed hands between the two opens: look again


def _descriptor(path: Path) -> int:
    try:
        if path.is_file():
            return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        reason = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
    except (OSError, ValueError) as error:
        reason = f"cannot be read: {error}"
    raise FileError(f"{path} {reason}", "give the .h5 file that bbx extract made")


def _check_sources(data: h5py.Dataset, path: Path, packed: set[str]) -> None:
    """Every row of a virtual dataset is still the one that was merged, by the mark and checksum that this file has.

    It lies in a checked file of the same run, beside or below `path`, that takes no rows from elsewhere itself.
    """
    run = RunSpec.from_json(data.file[format.RUN][()].decode())
    linked = [one for stage in run.stages if (one := dataset(data.file, stage.name)).is_virtual]
    if data.name != linked[0].name:
        return  # with the first one, all were checked: each source is opened once
    sources: dict[str, dict[str, list[virtual.Piece]]] = {}
    for one in linked:
        stage, rows = one.name.strip("/"), data.file[format.STATUS][()] == format.DONE
        for piece in virtual.pieces(one):
            sources.setdefault(piece.name, {}).setdefault(stage, []).append(piece)
            rows[piece.at : piece.at + piece.count] = False
        if rows.any():
            raise FileError(f"{one.name} takes row {np.argmax(rows)} from no file")
    for name, stages in sources.items():
        opened = open_checked(_source(path, name), allow_virtual=False)
        try:
            for stage, pieces in stages.items():
                _check_same_run(opened.facts.run, run, stage, opened.path)
                if opened.facts.columns[stage].offset is None:
                    packed.add(name)
                for piece in pieces:
                    _check_piece(opened, data.file, stage, piece)
        finally:
            opened.close()


def _source(path: Path, name: str) -> Path:
    """Where the source `name` of the virtual file at `path` lies."""
    folder = path.resolve().parent
    place = virtual.place(folder, name)
    if place == path.resolve():
        raise FileError("rows are taken from the file itself")
    # HDF5 looks beside the name that it was given, which may be a link from another folder.
    if path.parent.resolve() != folder and (path.parent / name).exists():
        raise FileError(f"rows are taken from {name!r}, which lies beside the link {path} too")
    return place


def _check_piece(opened: OpenFile, file: h5py.File, stage: str, piece: virtual.Piece) -> None:
    """The rows of a source have the marks and checksums that `file` has for them, plain columns checked before."""
    last = piece.first + piece.count
    if last > opened.facts.rows or piece.rows not in (0, opened.facts.rows):
        raise FileError(f"{opened.path} has {opened.facts.rows} rows, and had {last} or more when it was merged")
    for name in (format.STATUS, format.checksum_name(stage)):
        same = opened.rows(name, piece.first, piece.count) == file[name][piece.at : piece.at + piece.count]
        if not same.all():
            row = piece.first + int(np.argmin(same))
            raise FileError(f"row {row} of {opened.path} is another one than was merged", "merge the files again")


def _check_same_run(there: RunSpec, here: RunSpec, stage: str, place: Path) -> None:
    """`stage` of a source is the one that was merged, computed in the same way."""
    differences = replace(here, stages=()).differences(replace(there, stages=()))
    for name, mine, theirs in differences:
        raise FileError(f"{place} belongs to another run: {name} is {theirs} there and {mine} here")
    wanted = next(one for one in here.stages if one.name == stage)
    if wanted not in there.stages:
        raise FileError(f"{place} has no stage {stage} like the one that was merged", "merge the files again")
