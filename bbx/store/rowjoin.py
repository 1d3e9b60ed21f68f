"""Join the rows of files of one run: shards in the order of the job, other files in the order given."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bbx.errors import FileError, RunMismatchError, StartError
from bbx.store import carry, format, skeleton
from bbx.store.format import RowFacts
from bbx.store.sources import MOST_NAMES, Names, Overlap, Piece, Source, compare_runs, refuse_pending

_RANK = np.array([0, 2, 1])  # by status: a done row before a failed one, that before a pending one


class RowJoin:
    """Every image once. Raises `StartError` and its kin for what cannot be joined; see `bbx.store.merge.merge`."""

    how: Literal["rows", "stages"] = "rows"
    spoilt = Names()

    def __init__(self, sources: Sequence[Source], overlap: Overlap) -> None:
        for other in sources[1:]:
            compare_runs(sources[0], other, stages=True)
        self.sources = sources
        self.run = sources[0].run
        self._known_sums: dict[int, NDArray[np.uint32]] = {}
        shards = _are_shards(sources)
        # One entry per row of each source: where it is from, and where it goes.
        self._source = np.repeat(np.arange(len(sources)), [source.rows for source in sources])
        self._row = np.concatenate([np.arange(source.rows) for source in sources])
        place = np.arange(len(self._row))
        if shards:
            place = np.concatenate([np.arange(source.rows) + source.part.start for source in sources])
        kept, self.overlapping = self._once(place, overlap, shards=shards)
        kept = kept[np.argsort(place[kept], kind="stable")]
        self.part = self._shard(place[kept], kept) if shards else skeleton.WHOLE
        self._source, self._row = self._source[kept], self._row[kept]
        for number, source in enumerate(sources):
            rows = self._row[self._source == number]
            refuse_pending(source, rows[source.status[rows] == format.PENDING])
        self.keys = [
            sources[number].keys[row] for number, row in zip(self._source.tolist(), self._row.tolist(), strict=True)
        ]

    def pieces(self, stage: str, first: int, last: int) -> list[Piece]:
        """Where the rows lie: the same for every stage."""
        source, row = self._source[first:last], self._row[first:last]
        cuts = np.flatnonzero((source[1:] != source[:-1]) | (row[1:] != row[:-1] + 1)) + 1
        edges = [0, *cuts.tolist(), len(row)]
        return [
            Piece(int(source[start]), int(row[start]), stop - start, first + start) for start, stop in pairwise(edges)
        ]

    def facts(self, first: int, last: int) -> RowFacts:
        """As the sources have them."""
        found = []
        for piece in self.pieces("", first, last):
            source = self.sources[piece.source]
            keys = source.keys[piece.first : piece.first + piece.count]
            found.append(carry.read_facts(source.opened, piece.first, keys))
        return RowFacts(
            self.keys[first:last],
            *(
                np.concatenate([getattr(facts, name) for facts in found])
                for name in ("status", "reasons", "nbytes", "mtimes", "digests", "sums")
            ),
        )

    def _once(self, place: NDArray[np.int64], overlap: Overlap, *, shards: bool) -> tuple[NDArray[np.int64], Names]:
        """The entries that stay, and the keys that came twice; the one that stays takes the first one's place."""
        groups = self._twice()
        keep = np.ones(len(place), bool)
        unlike: list[tuple[bytes, int, int]] = []
        for key, entries in groups.items():
            if shards and len(set(place[entries])) > 1:
                raise self._elsewhere(entries)
            best = entries[0]
            for entry in entries[1:]:
                best = self._better(key, best, entry, overlap, unlike)
            keep[entries] = False
            keep[best] = True
            place[best] = place[entries].min()
        if unlike:
            key, one, other = unlike[0]
            paths = [self.sources[self._source[entry]].path for entry in (one, other)]
            raise StartError(
                f"{len(unlike)} images have other features in one file than in another, {paths[0]} and {paths[1]} "
                f"for one: {Names.of([item[0] for item in unlike[:4]])}",
                f"--overlap first or --overlap last says which to take; bbx diff {paths[0]} {paths[1]} compares them",
            )
        return np.flatnonzero(keep), Names(len(groups), Names.of(list(groups)[:MOST_NAMES]).keys)

    def _twice(self) -> dict[bytes, list[int]]:
        """The entries of each key that stands in more than one file; eight bytes a key for all others."""
        hashes = np.fromiter((hash(key) for source in self.sources for key in source.keys), np.int64, len(self._row))
        order = np.argsort(hashes, kind="stable")
        same = hashes[order][1:] == hashes[order][:-1]
        candidates = np.unique(np.concatenate([order[1:][same], order[:-1][same]]))
        groups: dict[bytes, list[int]] = defaultdict(list)
        for entry in candidates.tolist():
            groups[self._key(entry)].append(entry)
        for entries in groups.values():
            homes = self._source[entries]
            if len(np.unique(homes)) < len(entries):
                path = self.sources[homes[0]].path
                raise FileError(f"{path} is damaged: the key {self._name(entries[0])} stands there twice")
        return {key: entries for key, entries in groups.items() if len(entries) > 1}

    def _better(self, key: bytes, one: int, other: int, overlap: Overlap, unlike: list[tuple[bytes, int, int]]) -> int:
        """Which of two entries of a key to take; two that differ go to `unlike` where nothing says which."""
        ranks = [_RANK[self.sources[self._source[entry]].status[self._row[entry]]] for entry in (one, other)]
        if ranks[0] != ranks[1]:
            return one if ranks[0] > ranks[1] else other
        sums = [self._sums(int(self._source[entry]))[self._row[entry]] for entry in (one, other)]
        if ranks[0] == _RANK[format.DONE] and not np.array_equal(*sums):
            if overlap == "refuse":
                unlike.append((key, one, other))
            return other if overlap == "last" else one
        return one

    def _sums(self, source: int) -> NDArray[np.uint32]:
        """Every checksum of a source, `(n, stages)`."""
        if source not in self._known_sums:
            opened = self.sources[source].opened
            self._known_sums[source] = carry.sums(opened, 0, opened.facts.rows)
        return self._known_sums[source]

    def _shard(self, place: NDArray[np.int64], entries: NDArray[np.int64]) -> skeleton.Part:
        """The part of the job that the rows, ascending, are; they must be each other's next."""
        total = self.sources[0].part.total
        steps = np.diff(place)
        if (steps == 0).any():
            raise self._elsewhere(entries[np.argmin(steps) :][:2].tolist())
        gaps = np.flatnonzero(steps > 1)
        if len(gaps):
            ranges = [range_text(int(place[gap]) + 1, int(place[gap + 1])) for gap in gaps[:20]]
            raise StartError(
                f"no file holds rows {', '.join(ranges)}{', …' * (len(gaps) > 20)} of {total}, counted from 0",
                "name the shards that hold them too",
            )
        return skeleton.Part(int(place[0]), total)

    def _elsewhere(self, entries: list[int]) -> RunMismatchError:
        """The error for shards that were cut from different lists of images."""
        one, other = entries[:2]
        rows = [int(self._row[e]) + self.sources[self._source[e]].part.start for e in (one, other)]
        paths = [self.sources[self._source[entry]].path for entry in (one, other)]
        return RunMismatchError(
            f"{paths[1]} belongs to another list of images than {paths[0]}: "
            f"row {rows[1]} is {self._name(other)} there, and row {rows[0]} is {self._name(one)} here",
            "only shards of one job are merged",
        )

    def _key(self, entry: int) -> bytes:
        source: Source = self.sources[int(self._source[entry])]
        return source.keys[int(self._row[entry])]

    def _name(self, entry: int) -> str:
        return repr(format.decode_key(self._key(entry)))


def _are_shards(sources: Sequence[Source]) -> bool:
    """Whether all are parts of one job; raises `StartError` when only some are."""
    if not any(source.is_shard for source in sources):
        return False
    first = sources[0]
    for other in sources[1:]:
        if other.part.total != first.part.total or not (first.is_shard and other.is_shard):
            raise StartError(
                f"{first.path} holds {_holds(first)}, and {other.path} {_holds(other)}: they are no shards of one job",
                "merge the shards of each job first, in full; then the files",
            )
    return True


def _holds(source: Source) -> str:
    start = source.part.start
    return f"rows {range_text(start, start + source.rows)} of {source.part.total}" if source.is_shard else "all rows"


def range_text(start: int, stop: int) -> str:
    """`3, 6` → `"3 to 5"`."""
    return f"{start} to {stop - 1}" if stop - start > 1 else str(start)
