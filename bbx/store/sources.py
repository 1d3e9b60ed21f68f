"""The files that a merge reads, opened and checked, and what any two of them must have in common."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from bbx.errors import FileError, RunMismatchError, UsageError
from bbx.spec import RunSpec
from bbx.store import format, skeleton, trust
from bbx.store.format import RowFacts
from bbx.store.target import partial_path

Overlap = Literal["refuse", "first", "last"]
MOST_NAMES = 1000
"""Keys that a list names; beyond them it only counts."""


@dataclass(frozen=True, slots=True)
class Names:
    """`count` images, the first of them by key."""

    count: int = 0
    keys: tuple[str, ...] = ()

    @classmethod
    def of(cls, keys: Sequence[bytes]) -> Names:
        """From keys as stored."""
        return cls(len(keys), tuple(map(format.decode_key, keys[:MOST_NAMES])))

    def __str__(self) -> str:
        return ", ".join(map(repr, self.keys[:3])) + ", …" * (self.count > 3)


@dataclass(frozen=True, slots=True)
class Source:
    """One file to merge: its marks, uint8 `(n,)`, and its keys as stored."""

    path: Path
    opened: trust.OpenFile
    status: NDArray[np.uint8]
    keys: list[bytes]

    @property
    def run(self) -> RunSpec:
        """What made it."""
        return self.opened.facts.run

    @property
    def part(self) -> skeleton.Part:
        """Which rows of its job it holds."""
        return skeleton.Part(self.opened.facts.row_start, self.opened.facts.rows_total)

    @property
    def rows(self) -> int:
        """How many those are."""
        return self.opened.facts.rows

    @property
    def is_shard(self) -> bool:
        """Whether its job has more rows than it holds."""
        return self.opened.facts.rows_total > self.rows


@dataclass(frozen=True, slots=True)
class Piece:
    """`count` rows from `first` on of a source, by its place in the list, that become the rows from `at` on."""

    source: int
    first: int
    count: int
    at: int


class Join(Protocol):
    """How sources become one file; read-only, its rows in blocks."""

    how: Literal["rows", "stages"]
    sources: Sequence[Source]
    run: RunSpec
    keys: list[bytes]
    part: skeleton.Part
    overlapping: Names
    spoilt: Names

    def pieces(self, stage: str, first: int, last: int) -> list[Piece]:
        """Where the features of the rows `first` to `last`, half-open, lie; a row that is in none is all NaN."""

    def facts(self, first: int, last: int) -> RowFacts:
        """What is known of those rows, `sums` in the order of the run's stages. Raises `FileError` if damaged."""


@contextlib.contextmanager
def open_sources(paths: Iterable[str | os.PathLike[str]]) -> Iterator[list[Source]]:
    """Open every file, and close them all at the end.

    Raises `FileError` for one that is missing, unfinished or damaged, `UsageError` for none, or one given twice.
    """
    given = [Path(path) for path in paths]
    if not given:
        raise UsageError("there are no files to merge", "name two or more")
    with contextlib.ExitStack() as stack:
        sources: list[Source] = []
        for path in given:
            opened = trust.open_checked(_finished(path))
            stack.callback(opened.close)
            for other in sources:
                if os.path.samestat(os.fstat(opened.fd), os.fstat(other.opened.fd)):
                    raise UsageError(f"{path} is given twice" + f", as {other.path} too" * (path != other.path))
            keys = [key for block in opened.key_blocks() for key in block]
            sources.append(Source(path, opened, opened.status(), keys))
        yield sources


def _finished(path: Path) -> Path:
    """`path`, unless only its unfinished `.partial` is there, which is read where it is named itself."""
    unfinished = partial_path(path)
    if not path.exists() and unfinished.exists():
        raise FileError(
            f"{path} is not finished: {unfinished} has what there is",
            "run the same bbx extract command again to go on",
        )
    return path


def compare_runs(first: Source, other: Source, *, stages: bool) -> None:
    """Raise `RunMismatchError` unless both are of one run, its stages left aside unless `stages`."""
    runs = [source.run if stages else replace(source.run, stages=()) for source in (first, other)]
    differences = runs[0].differences(runs[1])
    if not differences:
        return
    (name, here, there), *others = differences
    also = f" (and so do {', '.join(one[0] for one in others)})" if others else ""
    raise RunMismatchError(
        f"{other.path} belongs to another run than {first.path}: "
        f"{name} is {there} in {other.path} and {here} in {first.path}{also}",
        "only files of one run are merged",
    )


def refuse_pending(source: Source, rows: NDArray[np.int64]) -> None:
    """Raise `FileError` if there are `rows`, those of `source` that are wanted and not computed yet."""
    if len(rows):
        names = Names.of([source.keys[row] for row in rows[:4]])
        raise FileError(
            f"{len(rows)} rows of {source.path} are pending: {Names(len(rows), names.keys)}",
            "the bbx extract command that made it continues it; then merge",
        )
