"""Write rows into a feature file so that a kill or a power loss at any instant loses no row that was marked.

The protocol: a skeleton laid out first, rows by plain writes at known offsets, status bytes after a sync, one rename
when nothing is pending.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bbx.errors import UsageError, WriteError
from bbx.spec import Compress, InputFile, Mode, RunSpec
from bbx.store import disk, format, lock, skeleton, trust
from bbx.store.commit import Committer, failed
from bbx.store.compress import Progress, Stop, pack
from bbx.store.format import Counts
from bbx.store.rows import Rows
from bbx.store.target import Target, check_target, output_path, partial_path


class FeatureWriter:
    """One run's output, as a context manager; made by `open`, used from one thread at a time, in one process.

    `pending` are the rows that still want features, int64 ascending, as they were when the file was opened.
    """

    def __init__(
        self,
        target: Target,
        held: lock.WriterLock,
        run: RunSpec,
        keys: Sequence[str],
        attempt: Mapping[str, object],
        *,
        retry_failed: bool,
        compress: Compress,
        stop: Stop | None,
        packing: Progress | None,
    ) -> None:
        self.path = target.path
        self.run = run
        self._attempt = attempt
        self._compress = compress
        self._stop = stop
        self._packing = packing
        self._partial = partial_path(target.path)
        self._held = held
        self._pid = os.getpid()
        self._closed = False
        complete = target.state == "complete"
        self._replaces = target.path.exists()
        opened = trust.open_checked(target.path if complete else self._partial)
        try:
            self._columns = opened.facts.columns
            self._attempts = opened.rows(format.ATTEMPTS, 0, format.ATTEMPT_SLOTS)
            status = opened.status()
            if complete:
                _remove_packed_source(opened, self._partial)
        finally:
            opened.close()
        failed_rows = np.flatnonzero(status == format.FAILED)[: None if retry_failed and not complete else 0]
        status[failed_rows] = format.PENDING
        self._status = status.copy()
        self.pending: NDArray[np.int64] = np.flatnonzero(status == format.PENDING)
        self._rows: Rows | None = None
        if complete:
            return
        self._rows = rows = Rows(self._partial, self._columns, keys, blank=target.state == "new")
        try:
            rows.unmark(failed_rows)
            self._slot = self._record(rows, target)
        except BaseException:
            rows.close()
            raise
        self._committer = Committer(rows.fd, self._columns[format.STATUS], status)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        run: RunSpec,
        keys: Sequence[str],
        *,
        attempt: Mapping[str, object] | None = None,
        mode: Mode = "auto",
        retry_failed: bool = False,
        compress: Compress = "none",
        stop: Stop | None = None,
        packing: Progress | None = None,
    ) -> FeatureWriter:
        """Begin `run` over the images `keys` at `path`, or go on with it, as `check_target` says.

        `attempt` is recorded in the file as this start's time, host, device, versions and the like. `retry_failed`:
        failed rows are pending again; a finished file is `.partial` again until they are done. `compress`: how the
        finished file is packed; `stop` is then asked now and again for a signal number to stop at, and `packing` hears
        of bytes, done and in all. Raises what `check_target` does, `StartError` where another process writes there or
        the disk has too little room.
        """
        out = output_path(path)
        with disk.starting(out):
            held = lock.WriterLock(out)
            try:
                target = check_target(path, run, keys, mode, retry_failed=retry_failed)
                start = {"time": format.now(), format.BIRTH: secrets.token_hex(8), **(attempt or {})}
                if target.state == "new":
                    _lay_out(out, run, keys, format.encode_attempt(start))
                elif target.reopen:
                    out.replace(partial_path(out))
                    disk.sync_folder(out.parent)
                return cls(
                    target,
                    held,
                    run,
                    keys,
                    start,
                    retry_failed=retry_failed,
                    compress=compress,
                    stop=stop,
                    packing=packing,
                )
            except BaseException:
                held.release()
                raise

    @property
    def status(self) -> NDArray[np.uint8]:
        """0 pending, 1 done, 2 failed, uint8 `(n,)`, with rows that were written but not yet committed; a copy."""
        return self._status.copy()

    @property
    def counts(self) -> Counts:
        """Rows by status, with those that were written but not yet committed."""
        return Counts.of(self._status)

    @property
    def complete(self) -> bool:
        """Whether no row is pending."""
        return self.counts.pending == 0

    def write(
        self,
        rows: NDArray[np.int64] | Sequence[int],
        maps: Mapping[str, NDArray[Any]],
        inputs: Sequence[InputFile] = (),
    ) -> None:
        """Store `maps[stage]`, `(b, *stage.shape)` of any float type, as the `b` pending rows `rows`.

        `inputs` are their image files, one each. The rows count after the next commit, in the background every 256 MB
        or 5 seconds. What float16 cannot hold becomes an infinity: counting those is the caller's.
        Raises `UsageError` for other rows, stages or shapes, `WriteError` when the disk fails.
        """
        places = self._checked_rows(rows)
        arrays = self._checked_maps(maps, len(places))
        self._store(places, arrays, format.DONE, inputs)

    def fail(self, row: int, reason: str, input: InputFile | None = None) -> None:
        """Mark the pending row `row` as failed for `reason` (256 bytes are kept); its features become NaN."""
        places = self._checked_rows([row])
        columns = [self._columns[stage.name] for stage in self.run.stages]
        arrays = {column.name: np.full((1, *column.row_shape), np.nan, column.dtype) for column in columns}
        self._store(places, arrays, format.FAILED, [input or InputFile()], format.encode_reason(reason))

    def commit(self) -> None:
        """Return once everything written so far is on disk and marked. Raises `WriteError`."""
        self._check_usable()
        if self._rows is not None:
            self._committer.flush()

    def close(self) -> None:
        """Commit, move the file to its final name if nothing is pending, and let go of the output.

        Raises `WriteError` for what could not be committed; the file is then left as `.partial`.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        try:
            if self._rows is not None:
                self._finish(self._rows)
        finally:
            self._held.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except WriteError as second:
            if error is None:
                raise
            error.add_note(f"and closing {self._partial} failed: {second.message}")

    def _finish(self, rows: Rows) -> None:
        try:
            try:
                self._committer.stop()
                self._committer.flush()
                rows.put_attempt(self._slot, {**self._attempt, "end": format.now(), **self.counts._asdict()})
                os.fsync(rows.fd)
                written = os.fstat(rows.fd)
            finally:
                rows.close()
            if rows.error is None and not (self._committer.marked == format.PENDING).any():
                self._publish(written)
        except OSError as error:
            raise failed(f"finish {self.path}", error) from error

    def _publish(self, written: os.stat_result) -> None:
        if not self._partial.exists() or not os.path.samestat(written, self._partial.stat()):
            raise WriteError(
                f"{self._partial} is not the file that was written: it, or its folder, was replaced meanwhile",
                "is the features' folder still where it was? the same command goes on with what is there",
            )
        if self.path.exists() and not self._replaces:
            raise WriteError(
                f"{self.path} was made by another program meanwhile, and is left alone",
                f"the features are complete in {self._partial}: mv them where you want them",
            )
        if self._compress != "none":
            pack(self._partial, self.path, progress=self._packing, stop=self._stop)
            return
        self._partial.replace(self.path)
        disk.sync_folder(self.path.parent)

    def _record(self, rows: Rows, target: Target) -> int:
        """Put this start into the first free slot, or the last one where all are taken; returns which."""
        if target.state == "new":  # the skeleton has it
            return 0
        free = np.flatnonzero(self._attempts[:, 0] == 0)
        slot = int(free[0]) if len(free) else format.ATTEMPT_SLOTS - 1
        rows.put_attempt(slot, self._attempt)
        disk.make_durable(rows.fd)
        return slot

    def _check_usable(self) -> None:
        if self._closed:
            raise UsageError(f"the writer of {self.path} is closed")
        if os.getpid() != self._pid:
            raise UsageError(f"the writer of {self.path} belongs to process {self._pid}", "send the maps there")
        error = self._rows and (self._rows.error or self._committer.error)
        if error:
            raise error

    def _checked_rows(self, rows: NDArray[np.int64] | Sequence[int]) -> NDArray[np.int64]:
        self._check_usable()
        given = np.asarray(rows)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise UsageError(f"rows are a list of whole numbers, not {given.dtype} of shape {given.shape}")
        places = given.astype(np.int64)
        wrong = places[(places < 0) | (places >= len(self._status))]
        if wrong.size:
            raise UsageError(f"there is no row {wrong[0]}", f"rows are 0 to {len(self._status) - 1}")
        taken = places[self._status[places] != format.PENDING]
        if taken.size:
            raise UsageError(f"row {taken[0]} is written already", "a row that counts is never written over")
        if len(np.unique(places)) != len(places):
            raise UsageError(f"a row is given twice in {places.tolist()}")
        return places

    def _checked_maps(self, maps: Mapping[str, NDArray[Any]], count: int) -> dict[str, NDArray[Any]]:
        """The maps as they were given, each of the right shape and a float type."""
        names = [stage.name for stage in self.run.stages]
        if set(maps) != set(names):
            raise UsageError(f"got the stages {', '.join(maps) or 'none'}, and the run has {', '.join(names)}")
        arrays = {}
        for name in names:
            column, given = self._columns[name], np.asarray(maps[name])
            if given.shape != (count, *column.row_shape):
                raise UsageError(f"{name} has shape {given.shape}, not {(count, *column.row_shape)}")
            if given.dtype.kind in "cOSUMmb":
                raise UsageError(f"{name} has type {given.dtype}, which is no float type")
            arrays[name] = given
        return arrays

    def _store(
        self,
        places: NDArray[np.int64],
        arrays: Mapping[str, NDArray[Any]],
        status: int,
        inputs: Sequence[InputFile],
        reason: bytes = b"",
    ) -> None:
        """Hand rows and checksums to the system, then to the committer; an error in between leaves the rows pending."""
        if self._rows is None or not len(places):
            return
        self._rows.put(places, arrays, status, inputs or [InputFile()] * len(places), reason)
        self._status[places] = status
        self._committer.add(places, status, len(places) * self.run.row_nbytes)


def _remove_packed_source(packed: trust.OpenFile, plain: Path) -> None:
    """Finish what a kill right after packing left: the complete plain file beside the one that was packed from it."""
    if not plain.exists() or all(column.offset is not None for column in packed.facts.columns.values()):
        return
    source = trust.open_checked(plain)
    try:
        same = source.facts.birth == packed.facts.birth and not (source.status() == format.PENDING).any()
    finally:
        source.close()
    if same:
        plain.unlink()


def _lay_out(out: Path, run: RunSpec, keys: Sequence[str], attempt: bytes) -> None:
    """Put the skeleton where `.partial` goes, whole or not at all."""
    draft = out.with_name(out.name + ".partial.tmp")
    try:
        skeleton.build(draft, run, keys, attempt)
        draft.replace(partial_path(out))
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    disk.sync_folder(out.parent)
