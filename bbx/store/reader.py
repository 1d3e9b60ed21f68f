"""Read a feature file: by stage, by image, from any thread or process, and never a row that does not count.

Rows that are pending or failed raise, unless NaN is asked for in their place.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self, overload

import numpy as np
from numpy.typing import NDArray

from bbx.errors import EXIT_SOME_FAILED, BbxError, FileError, UsageError, nearest
from bbx.spec import InputFile, RunSpec, Stage
from bbx.store import format
from bbx.store.access import Access
from bbx.store.checksum import crc32
from bbx.store.commit import runs
from bbx.store.format import Column, Counts

Missing = Literal["raise", "nan"]
RowKey = int | str | np.integer[Any]
Rows = RowKey | slice | Sequence[RowKey] | NDArray[Any]


# Reasons are read a megabyte at a time: one by one, those of a bad folder would take minutes.
_REASON_ROWS = 4096


class RowError(BbxError, LookupError):
    """The row asked for holds no features: it is pending, or its image failed."""

    exit_code = EXIT_SOME_FAILED


class FeatureFile:
    """An open feature file: `file["stage1", "cat.png"]` is that image's map, `(c, h, w)`.

    A context manager, picklable, safe to use from threads and after a fork. `partial=True` opens the unfinished
    `<path>.partial` where there is one; its rows by status are those of the last `refresh()`. Virtual datasets are
    followed into files of the same folder and nowhere else, or with `allow_virtual=False` not at all.

    Raises `FileError` for a file that is missing, damaged, not bbx's, or not to be trusted.
    """

    def __init__(self, path: str | os.PathLike[str], *, partial: bool = False, allow_virtual: bool = True) -> None:
        self.path = Path(path)
        self._access = Access(self.path, partial=partial, allow_virtual=allow_virtual)
        self._keys: list[str] | None = None
        self._index: dict[str, int] | None = None
        self.stages: Mapping[str, Stage] = MappingProxyType({stage.name: stage for stage in self.run.stages})
        self.refresh()

    @property
    def run(self) -> RunSpec:
        """What made the file: model, weights, preprocessing, stages."""
        return self._access.facts.run

    @property
    def rows(self) -> range:
        """The file's rows among those of the whole job: a shard's range, `range(n)` for a whole file."""
        return range(self._access.facts.row_start, self._access.facts.row_start + self._access.facts.rows)

    @property
    def rows_total(self) -> int:
        """Rows of the whole job, over all shards."""
        return self._access.facts.rows_total

    @property
    def nbytes(self) -> int:
        """Bytes of all features, uncompressed."""
        return len(self) * self.run.row_nbytes

    @property
    def keys(self) -> list[str]:
        """Every row's key, in row order; read on first use."""
        if self._keys is None:
            self._keys = self._access.keys()
        return self._keys

    @property
    def status(self) -> NDArray[np.uint8]:
        """0 pending, 1 done, 2 failed, uint8 `(n,)`, as of the last `refresh()`; read-only."""
        return self._status

    @property
    def counts(self) -> Counts:
        """Rows by status: `(done, failed, pending)`."""
        return Counts.of(self._status)

    @property
    def done(self) -> NDArray[np.int64]:
        """Rows that hold features, int64 ascending."""
        return np.flatnonzero(self._status == format.DONE)

    @property
    def pending(self) -> NDArray[np.int64]:
        """Rows not written yet, int64 ascending."""
        return np.flatnonzero(self._status == format.PENDING)

    @property
    def failed(self) -> dict[str, str]:
        """Key → reason of each row whose image failed."""
        keys = self.keys
        found: dict[str, str] = {}
        for start in range(0, len(self), _REASON_ROWS):
            rows = np.flatnonzero(self._status[start : start + _REASON_ROWS] == format.FAILED)
            if len(rows):
                block = self._access.rows(format.FAILURE, start, min(_REASON_ROWS, len(self) - start))
                found.update((keys[start + row], format.decode_reason(block[row])) for row in rows)
        return found

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """One dict per start of the run, oldest first: time, host, device, versions, command line."""
        slots = self._access.rows(format.ATTEMPTS, 0, format.ATTEMPT_SLOTS)
        return [format.decode_attempt(slot.tobytes(), sealed=self.sealed) for slot in slots if slot[0]]

    @property
    def packed(self) -> bool:
        """Whether the features are compressed, or lie in other files: not one plain piece per stage."""
        return any(column.offset is None for column in self._access.facts.columns.values())

    @property
    def sealed(self) -> bool:
        """Whether every row has a seal and its input's facts; files of format 1.0 have neither."""
        return self._access.facts.sealed

    def refresh(self) -> None:
        """Read the status column again, for a file that is being written."""
        self._status = self._access.status()
        self._status.flags.writeable = False

    def index(self, key: str) -> int:
        """The row of `key`. Raises `UsageError` with the nearest key."""
        if self._index is None:
            self._index = {name: row for row, name in enumerate(self.keys)}
            if len(self._index) != len(self):
                self._index = None
                raise FileError(f"{self.path} is damaged: a key stands there twice")
        try:
            return self._index[key]
        except (KeyError, TypeError):
            close = nearest(key, self.keys, 1) if isinstance(key, str) and len(self) <= 100_000 else []
            some = ", ".join(map(repr, self.keys[:3]))
            hint = f"did you mean {close[0]!r}?" if close else f"keys are {some}, …; rows are 0 to {len(self) - 1}"
            raise UsageError(f"{self.path} has no image {key!r}", hint) from None

    def verify_row(self, stage: str, row: RowKey) -> bool:
        """Whether the row's bytes, also a failed row's NaN, match their CRC32. Raises `RowError` when pending."""
        view = self[stage]
        place = self._row(row)
        if self._status[place] == format.PENDING:
            raise self._missing(place)
        data = np.empty((1, *view.shape[1:]), view.dtype)
        self._access.fill(view.column, [(place, place + 1)], data)
        expected = self._access.rows(format.checksum_name(stage), place, 1)[0]
        return crc32(data.data) == int(expected)

    def broken_seals(self) -> NDArray[np.int64]:
        """The rows, done or failed, whose key, mark, reason, input facts or checksums were changed; int64 ascending."""
        return self._access.broken_seals()

    def check_row(self, row: RowKey, stages: Iterable[str]) -> None:
        """Raise `FileError` unless the row's seal and its checksums of `stages` hold, `RowError` when it is pending."""
        place = self._row(row)
        damaged = [stage for stage in stages if not self.verify_row(stage, place)]
        if self._access.is_broken(place, format.encode_key(self.keys[place])):
            damaged.append("seal")
        if damaged:
            raise FileError(
                f"{self.path} is damaged: row {place}, {self.keys[place]!r} ({', '.join(damaged)})",
                f"bbx verify {self.path} lists all of it",
            )

    def check_marks(self) -> None:
        """Raise `FileError` unless every row's seal holds, and no row of a finished file is pending."""
        hint = f"bbx verify {self.path} lists all of it"
        if self._access.finished and self.counts.pending:
            raise FileError(f"{self.path} is damaged: {self.counts.pending} rows of a finished file are pending", hint)
        if len(broken := self.broken_seals()):
            raise FileError(f"{self.path} is damaged: the seals of {len(broken)} rows, such as {broken[0]}", hint)

    def inputs(self, rows: Sequence[RowKey] | slice = slice(None)) -> list[InputFile]:
        """The image file of each of `rows` as it was when the row was made; all zero in a file of format 1.0."""
        places = self._rows(rows)
        if not self.sealed or not len(places):
            return [InputFile()] * len(places)
        first, count = int(places.min()), int(places.max() - places.min()) + 1
        names = (format.INPUT_NBYTES, format.INPUT_MTIME, format.INPUT_DIGEST)
        nbytes, mtimes, digests = (self._access.rows(name, first, count)[places - first] for name in names)
        return [
            InputFile(int(size), int(mtime), digest.tobytes() if digest.any() else b"")
            for size, mtime, digest in zip(nbytes, mtimes, digests, strict=True)
        ]

    def close(self) -> None:
        """Close this process's handles; the file cannot be read any more."""
        self._access.close()

    def __len__(self) -> int:
        return self._access.facts.rows

    @overload
    def __getitem__(self, item: str) -> StageView: ...
    @overload
    def __getitem__(self, item: tuple[str, Rows]) -> NDArray[Any]: ...
    def __getitem__(self, item: str | tuple[str, Rows]) -> StageView | NDArray[Any]:
        name, *rest = item if isinstance(item, tuple) else (item,)
        if name not in self.stages:
            close = nearest(name, self.stages, 1) if isinstance(name, str) else []
            meant = f"did you mean {close[0]!r}? " if close else ""
            raise UsageError(f"{self.path} has no stage {name!r}", f"{meant}its stages: {', '.join(self.stages)}")
        if len(rest) > 1:
            raise UsageError("give a stage and one row or key", 'file["stage1", "cat.png"]')
        view = StageView(self, self._access.facts.columns[name])
        return view[rest[0]] if rest else view

    def __contains__(self, stage: object) -> bool:
        return stage in self.stages

    def __iter__(self) -> Iterator[str]:
        return iter(self.stages)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", ".join(f"{count} {word}" for word, count in self.counts._asdict().items())
        return f"<FeatureFile {str(self.path)!r}: {', '.join(self.stages)}; {state}>"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_keys": None, "_index": None, "stages": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.stages = MappingProxyType({stage.name: stage for stage in self.run.stages})

    def _row(self, row: RowKey) -> int:
        if isinstance(row, str):
            return self.index(row)
        try:
            place = operator.index(row)
        except TypeError:
            place = len(self)
        if isinstance(row, bool) or not -len(self) <= place < len(self):
            raise UsageError(f"{self.path} has no row {row!r}", f"rows are 0 to {len(self) - 1}, or keys")
        return place % len(self)

    def _rows(self, wanted: slice | Sequence[RowKey] | NDArray[Any]) -> NDArray[np.int64]:
        if isinstance(wanted, slice):
            return np.arange(len(self))[wanted]
        if isinstance(wanted, np.ndarray) and wanted.dtype == bool and wanted.shape == (len(self),):
            return np.flatnonzero(wanted)
        return np.array([self._row(row) for row in wanted], np.int64)

    def _reason(self, row: int) -> str:
        return format.decode_reason(self._access.rows(format.FAILURE, row, 1)[0])

    def _missing(self, row: int) -> RowError:
        ask = 'view.get(row, missing="nan") gives NaN instead'
        if self._status[row] == format.FAILED:
            return RowError(f"row {row}, {self.keys[row]!r}, failed: {self._reason(row)}", ask)
        return RowError(f"row {row}, {self.keys[row]!r}, is pending: not computed yet", f"refresh() looks again; {ask}")


class StageView:
    """One stage of a file, row by row: `view[row_or_key]` is `(c, h, w)`, a slice or list of them stacks.

    A row that holds no features raises `RowError`, unless `get(…, missing="nan")` asks for NaN in its place.
    """

    def __init__(self, file: FeatureFile, column: Column) -> None:
        self.file = file
        self.column = column

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.column.name

    @property
    def shape(self) -> tuple[int, ...]:
        """`(n, c, h, w)`; `(n, t, d)` for tokens, `(n, c)` for vectors."""
        return (len(self.file), *self.column.row_shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32 or float16."""
        return self.column.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the stage, uncompressed."""
        return len(self) * self.column.row_nbytes

    def get(self, rows: Rows, *, missing: Missing = "raise") -> NDArray[Any]:
        """One row, or several stacked `(k, c, h, w)`: `rows` is a row, key, slice, list of them, or mask `(n,)`.

        `missing="nan"` gives NaN for rows that are pending or failed, where `"raise"` raises `RowError`.
        """
        if missing not in ("raise", "nan"):
            raise UsageError(f"unknown value {missing!r} for missing", "raise or nan")
        if isinstance(rows, (int, str, np.integer)):
            place = self.file._row(rows)
            out = np.empty(self.column.row_shape, self.dtype)
            if missing == "raise" or self.file.status[place] == format.DONE:
                self.read_into(place, out)
            else:
                out.fill(np.nan)
            return out
        if not isinstance(rows, (slice, list, range, np.ndarray)) or (isinstance(rows, np.ndarray) and rows.ndim != 1):
            raise UsageError(
                f"{rows!r} is no row of {self.name}", "a row, a key, a slice or a list; then [channel, y, x]"
            )
        return self._stacked(self.file._rows(rows), missing)

    def read_into(self, row: RowKey, buffer: NDArray[Any]) -> None:
        """Read one row into `buffer`, `(c, h, w)`, C-contiguous, of the stage's type."""
        place = self.file._row(row)
        right = buffer.shape == self.column.row_shape and buffer.dtype == self.dtype
        if not (right and buffer.flags.c_contiguous and buffer.flags.writeable):
            raise UsageError(f"the buffer is not a C-contiguous {self.dtype} array of shape {self.column.row_shape}")
        if self.file.status[place] != format.DONE:
            raise self.file._missing(place)
        self.file._access.fill(self.column, [(place, place + 1)], buffer[np.newaxis])

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, rows: Rows) -> NDArray[Any]:
        return self.get(rows)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self.get(row) for row in range(len(self)))

    def __repr__(self) -> str:
        return f"<StageView {self.name!r}: {self.dtype} {self.shape} of {str(self.file.path)!r}>"

    def _stacked(self, rows: NDArray[np.int64], missing: Missing) -> NDArray[Any]:
        out = np.empty((len(rows), *self.column.row_shape), self.dtype)
        there = self.file.status[rows] == format.DONE
        if missing == "raise" and not there.all():
            raise self.file._missing(int(rows[np.argmin(there)]))
        out[~there] = np.nan
        # Where rows are missing the others go one by one, so that each lands beside its gap.
        parts = [slice(None)] if there.all() else [slice(at, at + 1) for at in np.flatnonzero(there)]
        for part in parts:
            self.file._access.fill(self.column, runs(rows[part]), out[part])
        return out


def open_finished_or_partial(path: str | os.PathLike[str]) -> FeatureFile:
    """The file at `path`, or where there is only an unfinished `<path>.partial`, that. Raises as `FeatureFile` does."""
    return FeatureFile(path, partial=not Path(path).exists())
