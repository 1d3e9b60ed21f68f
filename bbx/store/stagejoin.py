"""Join the stages of files that hold the same images in the same order, each computed by the same model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bbx.errors import RunMismatchError, StartError
from bbx.spec import Stage
from bbx.store import carry, format
from bbx.store.checksum import crc32
from bbx.store.commit import runs
from bbx.store.format import RowFacts
from bbx.store.sources import Names, Piece, Source, compare_runs, refuse_pending


class StageJoin:
    """Every stage once. A row that failed in one file and not in another fails: its stages would not belong together.

    Raises `StartError` and its kin for what cannot be joined; see `bbx.store.merge.merge`.
    """

    how: Literal["rows", "stages"] = "stages"
    overlapping = Names()

    def __init__(self, sources: Sequence[Source]) -> None:
        for other in sources[1:]:
            compare_runs(sources[0], other, stages=False)
            _check_same_rows(sources[0], other)
        for source in sources:
            refuse_pending(source, np.flatnonzero(source.status == format.PENDING))
        self.sources = sources
        self.run = replace(sources[0].run, stages=_in_network_order(sources))
        self.keys = sources[0].keys
        self.part = sources[0].part
        self._failed = np.any([source.status == format.FAILED for source in sources], axis=0)
        held = np.all([source.status == format.FAILED for source in sources], axis=0)
        self.spoilt = Names.of([self.keys[row] for row in np.flatnonzero(self._failed & ~held)])
        # The source of each stage, and that of each stage that others have too.
        self._home = {stage.name: self._holders(stage.name)[0] for stage in self.run.stages}
        for stage in self.run.stages:
            for number in self._holders(stage.name)[1:]:
                self._check_equal(stage, self._home[stage.name], number)

    def pieces(self, stage: str, first: int, last: int) -> list[Piece]:
        """Where the rows lie: in the stage's own file, but for those that failed elsewhere."""
        home = self._home[stage]
        there = ~self._failed[first:last] | (self.sources[home].status[first:last] == format.FAILED)
        rows = first + np.flatnonzero(there)
        return [Piece(home, start, stop - start, start) for start, stop in runs(rows)]

    def facts(self, first: int, last: int) -> RowFacts:
        """Marks, reasons and input files of all sources put together, and the checksums of each stage's own."""
        keys = self.keys[first:last]
        found = [carry.read_facts(source.opened, first, keys) for source in self.sources]
        reasons, nbytes, mtimes, digests = (
            getattr(found[0], name).copy() for name in ("reasons", "nbytes", "mtimes", "digests")
        )
        for source, facts in zip(self.sources[1:], found[1:], strict=True):
            self._check_same_inputs(source, first, (nbytes, digests), facts)
            reasons = np.where(reasons == b"", facts.reasons, reasons)
            unknown = nbytes == 0
            nbytes[unknown], mtimes[unknown] = facts.nbytes[unknown], facts.mtimes[unknown]
            untaken = ~digests.any(axis=1)
            digests[untaken] = facts.digests[untaken]
        status = np.where(self._failed[first:last], format.FAILED, format.DONE).astype(np.uint8)
        sums = [self._sums(found, stage, status) for stage in self.run.stages]
        return RowFacts(keys, status, reasons, nbytes, mtimes, digests, np.stack(sums, axis=1))

    def _sums(self, found: list[RowFacts], stage: Stage, status: NDArray[np.uint8]) -> NDArray[np.uint32]:
        home = self._home[stage.name]
        names = [one.name for one in self.sources[home].run.stages]
        sums = found[home].sums[:, names.index(stage.name)]
        spoilt = (status == format.FAILED) & (found[home].status != format.FAILED)
        return np.where(spoilt, _nan_crc32(stage, self.run.dtype), sums).astype(np.uint32)

    def _holders(self, stage: str) -> list[int]:
        return [n for n, source in enumerate(self.sources) if stage in [one.name for one in source.run.stages]]

    def _check_equal(self, stage: Stage, one: int, other: int) -> None:
        """Raise `StartError` where a row of a stage that two files hold has other features in each."""
        pair = [self.sources[number] for number in (one, other)]
        name = format.checksum_name(stage.name)
        sums = [source.opened.rows(name, 0, source.rows) for source in pair]
        unlike = np.flatnonzero((sums[0] != sums[1]) & ~self._failed)
        if len(unlike):
            first = Names(len(unlike), Names.of([self.keys[row] for row in unlike[:4]]).keys)
            raise StartError(
                f"{stage.name} of {len(unlike)} images differs between {pair[0].path} and {pair[1].path}: {first}",
                f"bbx diff {pair[0].path} {pair[1].path} compares them; leave one out",
            )

    def _check_same_inputs(
        self, source: Source, first: int, mine: tuple[NDArray[np.int64], NDArray[np.uint8]], facts: RowFacts
    ) -> None:
        """Raise `StartError` for a picture that changed between two extractions."""
        nbytes, digests = mine
        known = (nbytes != 0) & (facts.nbytes != 0)
        taken = digests.any(axis=1) & facts.digests.any(axis=1)
        changed = np.flatnonzero((known & (nbytes != facts.nbytes)) | (taken & (digests != facts.digests).any(axis=1)))
        if len(changed):
            row = int(changed[0])
            raise StartError(
                f"row {first + row}, {format.decode_key(self.keys[first + row])!r}, was made from another picture in "
                f"{source.path} than in {self.sources[0].path}: the file changed in between",
                "extract the stages of one of them again",
            )


def _check_same_rows(first: Source, other: Source) -> None:
    stages = [", ".join(stage.name for stage in source.run.stages[:6]) for source in (first, other)]
    if other.keys == first.keys and other.part == first.part:
        return
    rows = zip(first.keys, other.keys, strict=False)
    at = next((row for row, (mine, theirs) in enumerate(rows) if mine != theirs), min(first.rows, other.rows))
    there, here = (
        repr(format.decode_key(source.keys[at])) if at < source.rows else "no image" for source in (other, first)
    )
    raise RunMismatchError(
        f"{first.path} has the stages {stages[0]}, {other.path} {stages[1]}, and their images differ too: row {at} is "
        f"{there} there and {here} here",
        "rows are merged of files with the same stages, stages of files with the same images in the same order: "
        "merge in two steps",
    )


def _in_network_order(sources: Sequence[Source]) -> tuple[Stage, ...]:
    """Every stage once: by its place among the backbone's; one that has none stays behind the one it followed."""
    found: dict[str, tuple[float, Stage]] = {}
    for source in sources:
        after = math.inf if all(stage.index is None for stage in source.run.stages) else -1.0
        for stage in source.run.stages:
            after = after if stage.index is None else float(stage.index)
            known = found.setdefault(stage.name, (after, stage))[1]
            if known != stage:
                holder = next(one for one in sources if known in one.run.stages)
                raise RunMismatchError(
                    f"the stage {stage.name} of {source.path} is another one than that of {holder.path}: "
                    f"{'x'.join(map(str, stage.shape))} of {stage.module} there, "
                    f"{'x'.join(map(str, known.shape))} of {known.module} here",
                    "only files of one run are merged",
                )
    return tuple(stage for _, stage in sorted(found.values(), key=lambda item: item[0]))


def _nan_crc32(stage: Stage, dtype: str) -> int:
    return crc32(np.full(stage.shape, np.nan, "<f2" if dtype == "float16" else "<f4").data)
