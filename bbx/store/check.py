"""Check a whole feature file: every row against its checksum and seal, and every object against the format.

It reads all bytes once, in blocks, and never writes. Damage is collected and not raised: what is wrong with one row
says nothing against the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bbx.errors import FileError
from bbx.spec import RunSpec
from bbx.store import format, metadata, trust
from bbx.store.access import Access
from bbx.store.checksum import crc32
from bbx.store.commit import runs
from bbx.store.format import Counts
from bbx.store.target import partial_path

DAMAGE_KEPT = 1000
KEYS_KEPT = 5
_BLOCK_NBYTES = 8 << 20
"""Features read at a time: small enough for a CPU's caches, since each byte is looked at twice."""
_REASON_ROWS = 4096

Progress = Callable[[int, int], None]
"""`(nbytes, total)`: bytes of features that were read, and of all there are to read."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is damaged; `text` says which and how, in a sentence.

    `what`: features, checksum, seal, mark, key, reason, start (a recorded start of the run) or metadata (everything
    else). `stage`, `row` and `key` where it concerns one.
    """

    what: str
    text: str
    stage: str | None = None
    row: int | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class NonFinite:
    """Values of a stage that are NaN or infinite in rows that are done: as the network gave them, hence no damage.

    `rows` counts the rows that hold any, `keys` names the first of them.
    """

    nan: int
    infinite: int
    rows: int
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Health:
    """What a check of a whole file found.

    `finished`: the file has its final name. `sealed`: its rows have seals (format 1.1). `damage` holds the first
    findings, `damage_total` counts all, `damaged_rows` the rows that any of them concerns. `checked` rows, done or
    failed, were compared with their checksums, `nbytes` of features in all.
    """

    path: Path
    run: RunSpec
    counts: Counts
    finished: bool
    sealed: bool
    checked: int
    nbytes: int
    damage: tuple[Finding, ...]
    damage_total: int
    damaged_rows: int
    nonfinite: dict[str, NonFinite]
    notes: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damage_total


def check_file(path: str | os.PathLike[str], *, progress: Progress | None = None) -> Health:
    """Check all of the feature file at `path`, or of its `.partial` where only that is there.

    Raises `FileError` for what cannot be opened as a feature file at all.
    """
    place = Path(path)
    partial = not place.exists() and partial_path(place).exists()
    there = partial_path(place) if partial else place
    # First, and elsewhere: this process meets only what HDF5 was seen to survive.
    report = metadata.report(there) if there.is_file() else metadata.Report()
    access = Access(place, partial=partial, allow_virtual=True)
    try:
        opened = trust.open_checked(there)
        try:
            if opened.facts != access.facts:
                raise FileError(f"{place} was replaced by another file just now", "try again")
            return _Check(access, opened, report).health(progress or _unheard)
        finally:
            opened.close()
    finally:
        access.close()


def read_checked(access: Access, stage: str, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """`rows` of a stage, `(k, *stage.shape)`, and which of them match their checksum, `(k,)`.

    A row that HDF5 cannot decode, or the disk not read, is NaN and does not match.
    """
    column = access.facts.columns[stage]
    values = np.empty((len(rows), *column.row_shape), column.dtype)
    readable = np.ones(len(rows), bool)
    try:
        access.fill(column, runs(rows), values)
    except FileError:
        for place, row in enumerate(rows.tolist()):
            try:
                access.fill(column, [(row, row + 1)], values[place : place + 1])
            except FileError:
                readable[place] = False
                values[place] = np.nan
    sums = np.empty(len(rows), "<u4")
    access.fill(access.facts.columns[format.checksum_name(stage)], runs(rows), sums)
    found = np.array([crc32(row.data) for row in values.reshape(len(rows), -1)], "<u4")
    return values, readable & (found == sums)


def _unheard(_nbytes: int, _total: int) -> None:
    """The progress that nobody follows."""


class _Check:
    """One pass over one file, and what it found."""

    def __init__(self, access: Access, opened: trust.OpenFile, report: metadata.Report) -> None:
        self._access = access
        self._opened = opened
        self._metadata = report
        self._status = opened.status()
        self._finished = not opened.path.name.endswith(".partial")
        self._damage: list[Finding] = []
        self._total = 0
        self._damaged = np.zeros(len(self._status), bool)
        self._keys = [key for block in opened.key_blocks() for key in block]
        self._broken = np.zeros(len(self._status), bool)
        self._nbytes = 0

    def health(self, progress: Progress) -> Health:
        """Run every check."""
        facts = self._access.facts
        rows = np.flatnonzero(self._status != format.PENDING)
        self._check_marks()
        self._check_keys()
        self._check_seals()
        self._check_reasons()
        self._check_starts()
        for text in self._metadata.damage:
            self._add("metadata", text)
        total = len(rows) * facts.run.row_nbytes
        odd = {stage.name: self._check_stage(stage.name, rows, progress, total) for stage in facts.run.stages}
        return Health(
            path=self._opened.path,
            run=facts.run,
            counts=Counts.of(self._status),
            finished=self._finished,
            sealed=facts.sealed,
            checked=len(rows),
            nbytes=self._nbytes,
            damage=tuple(self._damage),
            damage_total=self._total,
            damaged_rows=int(self._damaged.sum()),
            nonfinite={name: found for name, found in odd.items() if found.rows},
            notes=(*self._general_notes(), *self._metadata.notes),
        )

    def _add(self, what: str, text: str, *, stage: str | None = None, row: int | None = None) -> None:
        self._total += 1
        key = None
        if row is not None:
            self._damaged[row] = True
            key = self._key(row)
            text = f"row {row}, {key}{f', {stage}' if stage else ''}: {text}"
        if len(self._damage) < DAMAGE_KEPT:
            self._damage.append(Finding(what, text, stage, row, key))

    def _key(self, row: int) -> str:
        data = self._keys[row]
        try:
            return format.decode_key(data)
        except UnicodeDecodeError:
            return data.decode("utf-8", "backslashreplace")

    def _check_marks(self) -> None:
        for row in np.flatnonzero(self._status == format.PENDING).tolist() if self._finished else ():
            self._add("mark", "the row is pending, in a file that is finished", row=row)

    def _check_keys(self) -> None:
        first: dict[bytes, int] = {}
        for row, data in enumerate(self._keys):
            if first.setdefault(data, row) != row:
                self._add("key", f"the key stands at row {first[data]} already", row=row)
            try:
                format.decode_key(data)
            except UnicodeDecodeError:
                self._add("key", "the key is no UTF-8 text", row=row)

    def _check_seals(self) -> None:
        rows = self._opened.broken_seals()
        self._broken[rows] = True
        for row in rows.tolist():
            text = "the seal does not match: key, mark, reason, input file, a checksum or the seal itself was changed"
            self._add("seal", text, row=row)

    def _check_reasons(self) -> None:
        for start in range(0, len(self._status), _REASON_ROWS):
            status = self._status[start : start + _REASON_ROWS]
            given = self._access.rows(format.FAILURE, start, len(status)) != b""
            for row in np.flatnonzero((status == format.DONE) & given).tolist():
                self._add("reason", "the row is done, and has a reason why it failed", row=start + row)
            for row in np.flatnonzero((status == format.FAILED) & ~given).tolist():
                self._add("reason", "the row is failed, and has no reason", row=start + row)

    def _check_starts(self) -> None:
        slots = self._access.rows(format.ATTEMPTS, 0, format.ATTEMPT_SLOTS)
        if not slots[0].any():
            self._add("start", "no start of the run is recorded")
        for number, slot in enumerate(slots):
            facts = format.decode_attempt(slot.tobytes(), sealed=self._access.facts.sealed) if slot[0] else None
            if slot.any() and (facts is None or list(facts) == ["unreadable"]):
                self._add("start", f"the record of start {number + 1} is torn or was changed")

    def _check_stage(self, name: str, rows: NDArray[np.int64], progress: Progress, total: int) -> NonFinite:
        per = max(1, _BLOCK_NBYTES // self._access.facts.columns[name].row_nbytes)
        nan = infinite = count = 0
        keys: list[str] = []
        for start in range(0, len(rows), per):
            block = rows[start : start + per]
            values, good = read_checked(self._access, name, block)
            flat = values.reshape(len(block), -1)
            self._check_rows(name, block, flat, good)
            finite = np.isfinite(flat).all(axis=1)
            odd = np.flatnonzero(good & ~finite & (self._status[block] == format.DONE))
            nan += int(np.isnan(flat[odd]).sum())
            infinite += int(np.isinf(flat[odd]).sum())
            count += len(odd)
            keys += [self._key(row) for row in block[odd[: KEYS_KEPT - len(keys)]].tolist()]
            self._nbytes += flat.nbytes
            progress(self._nbytes, total)
        return NonFinite(nan, infinite, count, tuple(keys))

    def _check_rows(
        self, name: str, rows: NDArray[np.int64], flat: NDArray[np.float32], good: NDArray[np.bool_]
    ) -> None:
        for row in rows[~good].tolist():
            if self._broken[row]:
                self._add("checksum", "features and checksum do not match, and the seal is broken", stage=name, row=row)
            else:
                self._add("features", "the features were changed: their checksum is another", stage=name, row=row)
        failed = np.flatnonzero(good & (self._status[rows] == format.FAILED))
        for place in failed[~np.isnan(flat[failed]).all(axis=1)].tolist():
            self._add("mark", "the row is failed, and holds features", stage=name, row=int(rows[place]))

    def _general_notes(self) -> list[str]:
        facts = self._access.facts
        notes = []
        if not facts.sealed:
            notes.append("format 1.0 has no seals: that a row belongs to its key cannot be checked")
        if facts.rows != facts.rows_total:
            stop = facts.row_start + facts.rows
            notes.append(f"the file is a shard: rows {facts.row_start} to {stop} of {facts.rows_total}")
        return notes
