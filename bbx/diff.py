"""What `bbx diff` does: two feature files, image by image, as facts about how far apart their features are.

Rows are matched by key, so the files may hold them in any order; nothing but the two files is needed, and of them a few
rows at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bbx.errors import EXIT_SOME_FAILED, FileError, UsageError
from bbx.stages import select_stages
from bbx.store import FeatureFile, format, open_finished_or_partial
from bbx.store.check import read_checked

TOLERANCE = 1e-5
"""Of a row's largest value: on one machine, batch size and threads move a float32 network's maps by less."""
_NAMED = 10
# Both files' rows of a block, as stored and in float64, are to stay below it.
_BLOCK_NBYTES = 64 << 20

Progress = Callable[[int, int], None]
"""`(rows, total)`: rows that were compared, over all stages, and how many there are."""


@dataclass(frozen=True, slots=True)
class Named:
    """Some images: how many, and the first of their keys."""

    count: int = 0
    keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StageDifference:
    """One stage over all rows that both files have.

    A row's relative error is max|a − b| / max|a|: 0 where both are zero, infinite where only `a` is, or where one has a
    NaN or infinity and the other has not the same. `equal` rows are so bit by bit (in value, if the types differ),
    `beyond` have an error beyond the tolerance. `mean_error` is the mean of the rows' errors. The cosine similarity is
    that of two rows as vectors, 1 where both are zero. NaN where no row was compared.
    """

    stage: str
    rows: int
    equal: int
    beyond: int
    worst_error: float
    worst_key: str
    mean_error: float
    least_cosine: float
    least_cosine_key: str


@dataclass(frozen=True, slots=True)
class Difference:
    """How two files differ.

    `only_a`, `only_b`: images of one file alone. `done_only_a`, `done_only_b`: images of both that have features in one
    alone. `damaged_a`, `damaged_b`: images whose features do not match their checksum in a compared stage, and are not
    compared there. `stages_only_a`, `stages_only_b`; `shapes`: (stage, a's shape, b's) of stages that cannot be
    compared. `first` is the first image, in a's order, beyond the tolerance in any stage: (key, stage, error).
    `fields`: (recorded field, a's value, b's), of the run and of the last start of each.
    """

    a: Path
    b: Path
    tolerance: float
    stages: tuple[StageDifference, ...]
    only_a: Named
    only_b: Named
    done_only_a: Named
    done_only_b: Named
    damaged_a: Named
    damaged_b: Named
    stages_only_a: tuple[str, ...]
    stages_only_b: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    first: tuple[str, str, float] | None
    fields: tuple[tuple[str, str, str], ...]

    @property
    def same(self) -> bool:
        """Whether both hold the same images, done alike, and every compared stage of each is within the tolerance."""
        rows = (self.only_a, self.only_b, self.done_only_a, self.done_only_b, self.damaged_a, self.damaged_b)
        compared = bool(self.stages) and not self.shapes
        return compared and not any(named.count for named in rows) and not any(stage.beyond for stage in self.stages)

    @property
    def exit_code(self) -> int:
        """0 the same within the tolerance, 4 not."""
        return 0 if self.same else EXIT_SOME_FAILED


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    stages: str | Iterable[str | int] = "all",
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
) -> Difference:
    """Compare the feature files `a` and `b`, finished or `.partial`, in the stages that both have.

    `stages` as in `select_stages`, of those. Raises `UsageError` for a stage that not both have, `FileError` for a file
    that is none, or that names an image twice.
    """
    if not tolerance >= 0:
        raise UsageError(f"the tolerance cannot be {tolerance}", "0 or a small number, such as 1e-5")
    with open_finished_or_partial(a) as one, open_finished_or_partial(b) as other:
        shared = [name for name in one.stages if name in other.stages]
        names = select_stages(shared, stages) if shared or stages != "all" else ()
        shapes = [(name, one.stages[name].shape, other.stages[name].shape) for name in names]
        unlike = tuple(item for item in shapes if item[1] != item[2])
        pairs = _Pairs(one, other)
        compared = [name for name, mine, theirs in shapes if mine == theirs]
        ledger = _Ledger(pairs, tolerance, progress, len(compared))
        found = tuple(ledger.compare(name) for name in compared)
        return Difference(
            a=one.path,
            b=other.path,
            tolerance=tolerance,
            stages=found,
            only_a=pairs.only_a,
            only_b=pairs.only_b,
            done_only_a=pairs.done_only_a,
            done_only_b=pairs.done_only_b,
            damaged_a=_named(one, ledger.damaged[0]),
            damaged_b=_named(other, ledger.damaged[1]),
            stages_only_a=tuple(name for name in one.stages if name not in other.stages),
            stages_only_b=tuple(name for name in other.stages if name not in one.stages),
            shapes=unlike,
            first=ledger.first,
            fields=(*one.run.differences(other.run), *_unlike_starts(one.attempts, other.attempts)),
        )


def relative_errors(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """max|a − b| / max|a| of each row of `a` and `b`, `(k, n)`, as `StageDifference` defines it: `(k,)`."""
    mine, theirs = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(mine) & np.isfinite(theirs)
    alike = (finite | (mine == theirs) | (np.isnan(mine) & np.isnan(theirs))).all(axis=1)
    mine[~finite] = theirs[~finite] = 0
    largest = np.abs(mine).max(axis=1)
    apart = np.abs(mine - theirs).max(axis=1)
    errors: NDArray[np.float64] = np.divide(apart, largest, out=np.full(len(mine), math.inf), where=largest > 0)
    errors[apart == 0] = 0
    errors[~alike] = math.inf
    return errors


def cosines(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Cosine similarity of each row of `a` and `b`, `(k, n)`, over the values that are finite in both: `(k,)`."""
    mine, theirs = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(mine) & np.isfinite(theirs)
    mine[~finite] = theirs[~finite] = 0
    lengths = [np.linalg.norm(rows, axis=1) for rows in (mine, theirs)]
    product = lengths[0] * lengths[1]
    found = np.divide(np.einsum("kn,kn->k", mine, theirs), product, out=np.zeros(len(mine)), where=product > 0)
    found[(lengths[0] == 0) & (lengths[1] == 0)] = 1
    limited: NDArray[np.float64] = np.clip(found, -1, 1)
    return limited


class _Pairs:
    """The rows of both files by key: `rows_a[i]` and `rows_b[i]` are one image, done in both, in a's order."""

    def __init__(self, one: FeatureFile, other: FeatureFile) -> None:
        self.files = (one, other)
        theirs = _index(other)
        mine = _index(one)
        partner = np.array([theirs.get(key, -1) for key in one.keys], np.int64)
        both = np.flatnonzero(partner >= 0)
        done_a = one.status[both] == format.DONE
        done_b = other.status[partner[both]] == format.DONE
        self.rows_a: NDArray[np.int64] = both[done_a & done_b]
        self.rows_b: NDArray[np.int64] = partner[self.rows_a]
        self.only_a = _named(one, np.flatnonzero(partner < 0))
        self.only_b = _named(other, [row for row, key in enumerate(other.keys) if key not in mine])
        self.done_only_a = _named(one, both[done_a & ~done_b])
        self.done_only_b = _named(one, both[done_b & ~done_a])


class _Ledger:
    """What the comparison of the stages, one after the other, comes to."""

    def __init__(self, pairs: _Pairs, tolerance: float, progress: Progress | None, stages: int) -> None:
        self.damaged: tuple[set[int], set[int]] = (set(), set())
        self.first: tuple[str, str, float] | None = None
        self._first_row = len(pairs.files[0])
        self._pairs = pairs
        self._tolerance = tolerance
        self._progress = progress
        self._total = stages * len(pairs.rows_a)
        self._seen = 0

    def compare(self, name: str) -> StageDifference:
        """One stage, block by block."""
        keys = self._pairs.files[0].keys
        rows = equal = beyond = 0
        total, worst, least = 0.0, (-1.0, ""), (2.0, "")
        for places, mine, theirs in self._blocks(name):
            alike = _equal(mine, theirs)
            errors, angles = np.zeros(len(places)), np.ones(len(places))
            if not alike.all():  # the usual row is equal, and comparing bytes is ten times as fast
                errors[~alike] = relative_errors(mine[~alike], theirs[~alike])
                angles[~alike] = cosines(mine[~alike], theirs[~alike])
            rows += len(places)
            equal += int(alike.sum())
            far = np.flatnonzero(errors > self._tolerance)
            beyond += len(far)
            total += float(errors.sum())
            high, low = int(errors.argmax()), int(angles.argmin())
            if errors[high] > worst[0]:
                worst = (float(errors[high]), keys[places[high]])
            if angles[low] < least[0]:
                least = (float(angles[low]), keys[places[low]])
            if len(far) and places[far[0]] < self._first_row:
                self._first_row = int(places[far[0]])
                self.first = (keys[self._first_row], name, float(errors[far[0]]))
        if not rows:
            worst, least = (math.nan, ""), (math.nan, "")
        mean = total / rows if rows else math.nan
        return StageDifference(name, rows, equal, beyond, *worst, mean, *least)

    def _blocks(self, name: str) -> Iterable[tuple[NDArray[np.int64], NDArray[Any], NDArray[Any]]]:
        """Rows of a, and both files' undamaged values of them, `(k, n)`."""
        one, other = self._pairs.files
        values = one.stages[name].values
        per = max(1, _BLOCK_NBYTES // (values * 2 * (4 + 8 + 8)))
        for start in range(0, len(self._pairs.rows_a), per):
            places = self._pairs.rows_a[start : start + per]
            partners = self._pairs.rows_b[start : start + per]
            mine, good_a = read_checked(one._access, name, places)
            theirs, good_b = read_checked(other._access, name, partners)
            self.damaged[0].update(places[~good_a].tolist())
            self.damaged[1].update(partners[~good_b].tolist())
            good = good_a & good_b
            if good.any():
                yield places[good], mine[good].reshape(good.sum(), -1), theirs[good].reshape(good.sum(), -1)
            self._seen += len(places)
            if self._progress:
                self._progress(self._seen, self._total)


def _index(file: FeatureFile) -> dict[str, int]:
    rows = {key: row for row, key in enumerate(file.keys)}
    if len(rows) != len(file):
        raise FileError(f"{file.path} names an image twice", f"bbx verify {file.path} says which")
    return rows


def _named(file: FeatureFile, rows: Iterable[int] | NDArray[np.int64]) -> Named:
    places = sorted(int(row) for row in rows)
    return Named(len(places), tuple(file.keys[row] for row in places[:_NAMED]))


def _equal(mine: NDArray[Any], theirs: NDArray[Any]) -> NDArray[np.bool_]:
    """Which rows are the same bits, or where the types differ, the same values, `(k,)`."""
    if mine.dtype == theirs.dtype:
        return np.array([one.tobytes() == other.tobytes() for one, other in zip(mine, theirs, strict=True)], bool)
    same: NDArray[np.bool_] = ((mine == theirs) | (np.isnan(mine) & np.isnan(theirs))).all(axis=1)
    return same


def _unlike_starts(mine: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Device and versions of the last starts, where they differ; files are not trusted to hold any."""
    one, other = (_start(attempts) for attempts in (mine, theirs))
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return [(name, one.get(name, "–"), other.get(name, "–")) for name in names]


def _start(attempts: Sequence[dict[str, Any]]) -> dict[str, str]:
    # The last that computed anything: a merge is a start, too.
    last: dict[str, Any] = next((attempt for attempt in reversed(attempts) if "versions" in attempt), {})
    versions = last.get("versions")
    found = {f"versions.{name}": str(text) for name, text in versions.items()} if isinstance(versions, dict) else {}
    return {**({"device": str(last["device"])} if "device" in last else {}), **found}
