"""Make one feature file of many: the rows of files of one run, or the stages of files with the same rows.

Nothing is taken on trust. The system copies the features (`copy_file_range`, which on some file systems shares the
blocks), and what then stands in the new file is read and compared with each row's checksum, so that the copy itself is
what was checked. A file is written under a name of its own and has no marked row before all of it is on disk.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from bbx.errors import StartError, UsageError, WriteError
from bbx.spec import Compress, one_of
from bbx.store import carry, disk, format, lock, skeleton, trust
from bbx.store.checksum import crc32
from bbx.store.compress import Progress, pack
from bbx.store.format import Column, RowFacts
from bbx.store.rowjoin import RowJoin
from bbx.store.sources import Join, Names, Overlap, Source, open_sources
from bbx.store.stagejoin import StageJoin
from bbx.store.target import check_target, output_path
from bbx.store.virtual import Piece as VirtualPiece
from bbx.store.virtual import maker

MergeMode = Literal["new", "overwrite"]

_MOST_ROWS = 16_384
_MOST_NBYTES = 64 << 20
_AGAIN = "make room if the disk is full, and run the same command again; the files to merge are as they were"


@dataclass(frozen=True, slots=True)
class Merged:
    """What came of a merge.

    `how`: whether the `rows` of the sources were put together, or their `stages`. `failed`: the rows that are marked
    so; `spoilt`: those of them that were done in some sources. `overlapping`: images that stood in several sources, and
    stand in the file once. `missing`: half-open ranges of the job's rows that no source held, before and after the
    file's own.
    """

    path: Path
    how: Literal["rows", "stages"]
    rows: int
    stages: tuple[str, ...]
    sources: tuple[Path, ...]
    failed: Names
    spoilt: Names
    overlapping: Names
    missing: tuple[tuple[int, int], ...]


def merge(
    paths: Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    virtual: bool = False,
    compress: Compress = "none",
    mode: MergeMode = "new",
    overlap: Overlap = "refuse",
    attempt: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Merge the feature files `paths` into `output`; files of the same stages by rows, of the same rows by stages.

    Rows: of one run in every field; shards of a job in its order, without gaps, other files in the order given. An
    image that several hold is taken once: a done row before a failed or a pending one, and of two done ones with
    different features what `overlap` says. Stages: of one run but for the stages, the same images in the same order;
    a row that failed in one of the files fails.

    `virtual` leaves the features where they are, in the output's folder or below it: the file refers to them, and their
    bytes are not read. `compress="gzip"` packs the file. `mode`: `new` wants nothing there, `overwrite` replaces a
    feature file. `attempt` is recorded as this start. Killed at any instant, the sources are untouched, and the output
    is whole or not there; called again, it starts over.

    Raises `UsageError`, `RunMismatchError` naming the field, `StartError` for gaps, overlaps and a full disk,
    `FileError` for a damaged row, `WriteError`.
    """
    one_of("--compress", compress, Compress)
    one_of("--mode", mode, MergeMode)
    one_of("--overlap", overlap, Overlap)
    if virtual and compress != "none":
        raise UsageError("--virtual copies nothing, so there is nothing to compress", "leave one of the two out")
    out = output_path(output)
    with open_sources(paths) as sources, disk.starting(out):
        _refuse_output_among(sources, out)
        join = _join(sources, overlap)
        held = lock.WriterLock(out)
        try:
            check_target(out, join.run, [format.decode_key(key) for key in join.keys], mode)
            work = _Merge(join, out, _starts(sources, attempt), progress, packed=compress == "gzip")
            work.run(virtual=virtual)
        finally:
            held.release()
        return work.merged([source.path for source in sources])


def _refuse_output_among(sources: Sequence[Source], out: Path) -> None:
    drafts = {out.with_name(out.name + ending).resolve() for ending in (".merging", ".packing")}
    for source in sources:
        if source.path.resolve() in drafts:
            raise UsageError(f"{source.path} has the name of a draft of {out}", "give another name with -o")
        if out.exists() and os.path.samestat(os.fstat(source.opened.fd), out.stat()):
            raise UsageError(f"{out} is the output and one of the files to merge", "give another name with -o")


def _join(sources: Sequence[Source], overlap: Overlap) -> Join:
    """Which of the two merges is meant follows from the files."""
    if all(source.run.stages == sources[0].run.stages for source in sources):
        return RowJoin(sources, overlap)
    return StageJoin(sources)


def _starts(sources: Sequence[Source], attempt: Mapping[str, object] | None) -> list[bytes]:
    """The first start of each source, as many as there is room for, and this one as the last."""
    firsts = [start for source in sources for start in carry.attempts(source.opened)[:1]]
    names = ", ".join(f"{source.path.name} (run {source.run.sha256[:16]})" for source in sources)
    this = {"time": format.now(), format.BIRTH: secrets.token_hex(8), **(attempt or {}), "merged_from": names}
    return [*firsts[: format.ATTEMPT_SLOTS - 1], format.encode_attempt(this)]


class _Merge:
    """One join on its way into `out`."""

    def __init__(self, join: Join, out: Path, starts: list[bytes], progress: Progress | None, *, packed: bool) -> None:
        self._join = join
        self._out = out
        self._draft = out.with_name(out.name + ".merging")
        self._starts = starts
        self._progress = progress
        self._packed = packed
        self._marks = np.zeros(len(join.keys), np.uint8)
        self._done = 0

    def run(self, *, virtual: bool) -> None:
        """Write the file under its draft's name, then move it to its own."""
        make = maker(self._virtual_pieces()) if virtual else skeleton.contiguous
        try:
            columns = skeleton.build(
                self._draft,
                self._join.run,
                [format.decode_key(key) for key in self._join.keys],
                self._starts[0],
                part=self._join.part,
                make_stage=make,
                stage_nbytes=0 if virtual else None,
            )
            try:
                self._fill(columns)
                self._publish()
            except OSError as error:
                raise WriteError(f"the disk failed to write {self._out}: {error.strerror or error}", _AGAIN) from error
        finally:
            self._draft.unlink(missing_ok=True)

    def merged(self, sources: Sequence[Path]) -> Merged:
        """The facts, after `run`."""
        join, part = self._join, self._join.part
        stop, total = part.start + len(join.keys), part.total or len(join.keys)
        failed = np.flatnonzero(self._marks == format.FAILED)
        return Merged(
            path=self._out,
            how=join.how,
            rows=len(join.keys),
            stages=tuple(stage.name for stage in join.run.stages),
            sources=tuple(sources),
            failed=Names.of([join.keys[row] for row in failed]),
            spoilt=join.spoilt,
            overlapping=join.overlapping,
            missing=tuple(gap for gap in ((0, part.start), (stop, total)) if gap[0] < gap[1]),
        )

    def _fill(self, columns: Mapping[str, Column]) -> None:
        """Everything row by row, in blocks; the marks when all of it is on disk."""
        names = [stage.name for stage in self._join.run.stages]
        largest = max(columns[name].row_nbytes for name in names)
        block = max(1, min(_MOST_ROWS, _MOST_NBYTES // largest))
        fd = os.open(self._draft, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
        try:
            carry.write_attempts(fd, columns, self._starts)
            for first in range(0, len(self._marks), block):
                facts = self._join.facts(first, min(first + block, len(self._marks)))
                if (facts.status == format.PENDING).any():  # a retry began since the sources were opened
                    raise StartError(
                        "a source is being written to: some of its rows are pending now", "wait for that run"
                    )
                self._marks[first : first + block] = facts.status
                carry.write_facts(fd, columns, names, first, facts, status=False)
                for place, name in enumerate(names):
                    if columns[name].offset is not None:
                        self._copy(fd, columns[name], first, len(facts.keys))
                        self._compare(fd, columns[name], first, facts, place)
            disk.make_durable(fd)
            disk.write_at(fd, self._marks, carry.place(columns[format.STATUS], 0))
            os.fsync(fd)
        finally:
            os.close(fd)

    def _copy(self, fd: int, column: Column, first: int, count: int) -> None:
        """The features of `count` rows from `first` on, NaN where no source has them."""
        end = first
        for piece in self._join.pieces(column.name, first, first + count):
            self._blank(fd, column, end, piece.at)
            opened, at = self._join.sources[piece.source].opened, carry.place(column, piece.at)
            there = opened.facts.columns[column.name]
            if there.offset is not None:
                nbytes = piece.count * column.row_nbytes
                carry.copy_range(opened.fd, carry.place(there, piece.first), fd, at, nbytes)
            else:
                disk.write_at(fd, carry.read_rows(opened, there, piece.first, piece.count), at)
            end = piece.at + piece.count
        self._blank(fd, column, end, first + count)

    def _blank(self, fd: int, column: Column, first: int, last: int) -> None:
        if first < last:
            disk.write_at(
                fd, np.full((last - first, *column.row_shape), np.nan, column.dtype), carry.place(column, first)
            )

    def _compare(self, fd: int, column: Column, first: int, facts: RowFacts, place: int) -> None:
        """Read back what was written, and raise the error for a row that is not what its source says of it."""
        rows = np.empty((len(facts.keys), column.row_nbytes), np.uint8)
        disk.read_at(fd, rows, carry.place(column, first))
        for at, (row, wanted) in enumerate(zip(rows, facts.sums[:, place].tolist(), strict=True)):
            if crc32(row.data) != wanted:
                raise self._damaged(column, first + at, wanted)
        self._done += rows.nbytes
        self._step(0)

    def _damaged(self, column: Column, row: int, wanted: int) -> Exception:
        for piece in self._join.pieces(column.name, row, row + 1):
            opened = self._join.sources[piece.source].opened
            found = carry.read_rows(opened, opened.facts.columns[column.name], piece.first, 1)
            if crc32(found.data) != wanted:
                what = f"does not match its checksum in {column.name}"
                return carry.damaged(opened, piece.first, self._join.keys[row], what)
        return OSError(None, f"row {row} of {column.name} came back otherwise than it was written")

    def _publish(self) -> None:
        if self._packed:
            try:
                pack(self._draft, self._out, progress=lambda done, _: self._step(done))
            except WriteError as error:
                raise WriteError(error.message, _AGAIN) from error
            return
        trust.open_checked(self._draft).close()
        self._draft.replace(self._out)
        disk.sync_folder(self._out.parent)

    def _step(self, packed: int) -> None:
        if self._progress:
            total = self._join.run.row_nbytes * len(self._marks)
            self._progress(self._done + packed, total * (2 if self._packed else 1))

    def _virtual_pieces(self) -> dict[str, list[VirtualPiece]]:
        """What each stage takes from where. Raises `StartError` for a source that a virtual file cannot refer to."""
        names = [_relative(source, self._out) for source in self._join.sources]
        found: dict[str, list[VirtualPiece]] = {}
        for stage in self._join.run.stages:
            found[stage.name] = []
            for piece in self._join.pieces(stage.name, 0, len(self._join.keys)):
                source = self._join.sources[piece.source]
                if source.opened.file[stage.name].is_virtual:
                    raise StartError(
                        f"{source.path} is virtual itself, and a virtual file takes rows from real ones only",
                        "merge the files that it was made of, or leave --virtual out",
                    )
                found[stage.name].append(
                    VirtualPiece(names[piece.source], source.rows, piece.first, piece.count, piece.at)
                )
        return found


def _relative(source: Source, out: Path) -> str:
    """The source's name as a virtual file in the output's folder gives it."""
    folder, place = out.parent.resolve(), source.path.resolve()
    if folder not in place.parents:
        raise StartError(
            f"{source.path} lies outside {folder}, the output's folder",
            "--virtual refers to files in that folder or below it: choose another -o, or leave --virtual out",
        )
    if place.name.endswith(".partial"):
        raise StartError(
            f"{source.path} changes its name when it is finished", "finish it first, or leave --virtual out"
        )
    return place.relative_to(folder).as_posix()
