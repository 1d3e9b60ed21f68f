"""A row counts once it is on disk, a failing disk is an error and never a wrong row, and one run has one writer."""

from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from bbx.errors import BbxError, FileError, RunMismatchError, StartError, UsageError, WriteError
from bbx.store import FeatureFile, FeatureWriter, Target, check_target, commit, disk, rows, skeleton
from tests.test_store_toys import KEYS, RUN, is_row, make, rest, row_maps

HOLD = """
import pathlib, sys
from bbx.store.lock import WriterLock
WriterLock(pathlib.Path(sys.argv[1]))
print(1, flush=True)
input()
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "f.h5"


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


def refuse(code: int) -> Callable[..., int]:
    def call(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return call


def status_on_disk(out: Path) -> list[int]:
    with h5py.File(f"{out}.partial") as file:
        return file["status"][:].tolist()


# Rows


def test_written_rows_are_read_back_exactly(out: Path) -> None:
    with FeatureFile(make(out)) as file:
        assert all(is_row({name: file[name, row] for name in file.stages}, row) for row in range(20))
        assert all(file.verify_row(name, row) for name in file.stages for row in range(20))


def test_rows_may_come_in_any_order_and_layout(out: Path) -> None:
    with FeatureWriter.open(out, RUN, KEYS) as writer:
        for rows in ([7, 3, 4, 5], [0], list(range(19, 7, -1)), [6, 1, 2]):
            writer.write(rows, {name: np.asfortranarray(array) for name, array in row_maps(rows).items()})
    with FeatureFile(out) as file:
        assert all(is_row({name: file[name, row] for name in file.stages}, row) for row in range(20))


@pytest.mark.parametrize("dtype", [">f4", "f8", "f2"])
def test_any_float_type_is_cast_to_the_runs(out: Path, dtype: str) -> None:
    maps = {name: array.astype(dtype) for name, array in row_maps(range(20)).items()}
    with FeatureWriter.open(out, RUN, KEYS) as writer:
        writer.write(range(20), maps)
    with FeatureFile(out) as file:
        np.testing.assert_array_equal(file["stem"][:], maps["stem"].astype("f4"))


def test_failed_row_holds_nan_and_its_reason(out: Path) -> None:
    with FeatureFile(make(out, failed=[4])) as file, h5py.File(out) as plain:
        assert file.failed == {KEYS[4]: "not an image"}
        assert plain["status"][4] == 2
        assert all(np.isnan(plain[name][4]).all() for name in file.stages)
        assert all(file.verify_row(name, 4) for name in file.stages)


def test_a_value_beyond_float16_is_an_infinity_in_its_own_place_only(out: Path) -> None:
    run = replace(RUN, dtype="float16")
    maps = {name: array.astype("f4") for name, array in row_maps(range(20), run).items()}
    maps["stage1"][3, 0, 0, 0] = 70000.0
    with FeatureWriter.open(out, run, KEYS) as writer:
        writer.write(range(20), maps)
    with FeatureFile(out) as file:
        stored = file["stage1"][:]
        assert np.argwhere(np.isinf(stored)).tolist() == [[3, 0, 0, 0]]
        assert file.verify_row("stage1", 3)


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        ([20], {}, "no row 20"),
        ([-1], {}, "no row -1"),
        ([0.5], {}, "whole numbers"),
        ([1], {}, "row 1 is written already"),
        ([2], {"stem": np.zeros((1, 4, 8, 7))}, "stem has shape"),
        ([2], {"stem": np.zeros((2, 4, 8, 8))}, "stem has shape"),
        ([2], {"extra": np.zeros(1)}, "got the stages"),
        ([2], {"stem": np.zeros((1, 4, 8, 8), complex)}, "no float type"),
    ],
)
def test_wrong_call_is_refused_and_writes_nothing(out: Path, rows: list[int], change: dict, message: str) -> None:
    with FeatureWriter.open(out, RUN, KEYS) as writer:
        writer.write([1], row_maps([1]))
        with pytest.raises(UsageError, match=message):
            writer.write(rows, {**row_maps([2]), **change})
        assert writer.counts == (1, 0, 19)


def test_row_given_twice_is_refused(out: Path) -> None:
    with FeatureWriter.open(out, RUN, KEYS) as writer, pytest.raises(UsageError, match="twice"):
        writer.write([3, 3], row_maps([3, 3]))


# Commits


def test_row_is_pending_on_disk_until_it_is_committed(out: Path) -> None:
    with FeatureWriter.open(out, RUN, KEYS) as writer:
        writer.write([2, 3], row_maps([2, 3]))
        assert writer.counts == (2, 0, 18)
        assert sum(status_on_disk(out)) == 0
        writer.commit()
        assert status_on_disk(out)[:5] == [0, 0, 1, 1, 0]


def test_status_is_written_only_after_a_sync(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    write_at, sync = disk.write_at, disk.make_durable
    with FeatureWriter.open(out, RUN, KEYS) as writer:
        monkeypatch.setattr(
            disk, "write_at", lambda fd, data, at: (events.append(f"write {len(data)}"), write_at(fd, data, at))
        )
        monkeypatch.setattr(disk, "make_durable", lambda fd: (events.append("sync"), sync(fd)))
        writer.write([0], row_maps([0]))
        writer.commit()
        assert events.count("write 1") > events[: events.index("sync")].count("write 1")
        assert events[-3:] == ["sync", "write 1", "sync"]


def test_commit_starts_in_the_background_when_enough_waits(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = threading.Event()
    mark = commit.Committer._mark
    monkeypatch.setattr(commit, "COMMIT_NBYTES", 1)
    monkeypatch.setattr(commit.Committer, "_mark", lambda *given: (mark(*given), committed.set()))
    with FeatureWriter.open(out, RUN, KEYS) as writer:
        writer.write([0], row_maps([0]))
        assert committed.wait(60)
        assert status_on_disk(out)[0] == 1


def test_commit_starts_in_the_background_after_a_while(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = threading.Event()
    mark = commit.Committer._mark
    monkeypatch.setattr(commit, "COMMIT_SECONDS", 0.01)
    monkeypatch.setattr(commit.Committer, "_mark", lambda *given: (mark(*given), committed.set()))
    with FeatureWriter.open(out, RUN, KEYS) as writer:
        writer.write([0], row_maps([0]))
        assert committed.wait(60)


def test_the_system_begins_to_write_between_commits_and_marks_nothing(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()
    begin = disk.begin_writing
    monkeypatch.setattr(commit, "_AHEAD_NBYTES", 1)
    monkeypatch.setattr(disk, "begin_writing", lambda fd: (begin(fd), begun.set()))
    monkeypatch.setattr(disk, "make_durable", None)  # nobody may call it
    with monkeypatch.context() as patch:
        patch.setattr(commit, "COMMIT_SECONDS", 3600.0)
        writer = FeatureWriter.open(out, RUN, KEYS)
        writer.write([0], row_maps([0]))
        assert begun.wait(60)
        assert sum(status_on_disk(out)) == 0
    monkeypatch.undo()
    writer.close()
    assert status_on_disk(out)[0] == 1


def test_many_begun_writes_put_no_commit_off(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = threading.Event()
    mark = commit.Committer._mark
    monkeypatch.setattr(commit, "_AHEAD_NBYTES", 1)
    monkeypatch.setattr(commit, "COMMIT_SECONDS", 0.05)
    monkeypatch.setattr(commit.Committer, "_mark", lambda *given: (mark(*given), committed.set()))
    with FeatureWriter.open(out, RUN, KEYS) as writer:
        for row in range(20):
            writer.write([row], row_maps([row]))
            if committed.wait(0.01):
                break
        assert committed.wait(60)


@pytest.mark.parametrize("layout", ["as they lie on disk", "channels last", "float64", "big-endian"])
def test_maps_of_any_layout_are_stored_alike_in_one_piece_or_in_many(
    out: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_PIECE_NBYTES", 1500)  # of stem's rows one, of the others' several
    maps = row_maps(range(20))
    with FeatureWriter.open(out, RUN, KEYS) as writer:
        order = [*range(0, 20, 2), *range(19, 0, -2)]
        given = {name: np.ascontiguousarray(values[order]) for name, values in maps.items()}
        if layout == "channels last":
            given = {name: np.moveaxis(np.moveaxis(one, 1, -1).copy(), -1, 1) for name, one in given.items()}
            assert not given["stem"].flags.c_contiguous
        elif layout != "as they lie on disk":
            given = {name: one.astype(">f4" if layout == "big-endian" else np.float64) for name, one in given.items()}
        writer.write(order, given)
    with FeatureFile(out) as file:
        assert all(is_row({name: file[name, row] for name in file.stages}, row) for row in range(20))
        assert all(file.verify_row(name, row) for name in file.stages for row in range(20))


def test_file_opens_with_plain_h5py_while_it_is_written(out: Path) -> None:
    with FeatureWriter.open(out, RUN, KEYS) as writer:
        writer.write([0], row_maps([0]))
        with h5py.File(f"{out}.partial") as file:
            assert file["stem"].shape == (20, 4, 8, 8)


def test_no_hdf5_program_can_open_it_for_writing_meanwhile(out: Path) -> None:
    with FeatureWriter.open(out, RUN, KEYS), pytest.raises(BlockingIOError):
        h5py.File(f"{out}.partial", "r+")


# A disk that fails


def test_short_writes_are_continued(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: max(1, len(data) // 3)], at))
    with FeatureFile(make(out)) as file:
        assert all(is_row({name: file[name, row] for name in file.stages}, row) for row in range(20))


def test_full_disk_while_writing_keeps_what_was_written_before(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = FeatureWriter.open(out, RUN, KEYS)
    writer.write([0, 1], row_maps([0, 1]))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse(errno.ENOSPC))
        with pytest.raises(WriteError, match="No space left") as caught:
            writer.write([2], row_maps([2]))
    assert "run the same command again" in caught.value.hint
    with pytest.raises(WriteError):
        writer.write([3], row_maps([3]))
    writer.close()
    assert status_on_disk(out)[:5] == [1, 1, 0, 0, 0]


def test_failed_sync_leaves_rows_pending_and_is_not_retried(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    writer = FeatureWriter.open(out, RUN, KEYS)
    writer.write(*rest(writer))

    def sync(fd: int) -> None:
        calls.append(fd)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", sync)
    for call in (writer.commit, writer.commit, lambda: writer.fail(3, "x"), writer.close):
        with pytest.raises(WriteError, match="Input/output error"):
            call()
    assert len(calls) == 1
    assert sum(status_on_disk(out)) == 0
    assert names(out) == ["f.h5.partial"]


def test_error_of_the_background_thread_surfaces_in_the_next_call(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = FeatureWriter.open(out, RUN, KEYS)
    writer.write([0], row_maps([0]))
    monkeypatch.setattr(os, "fdatasync", refuse(errno.ENOSPC))
    writer._committer._commit()  # as the thread does, at a known moment
    with pytest.raises(WriteError, match="No space left"):
        writer.write([1], row_maps([1]))
    with pytest.raises(WriteError):
        writer.close()


def test_error_in_the_with_block_is_not_masked(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = FeatureWriter.open(out, RUN, KEYS)
    writer.write([0], row_maps([0]))
    monkeypatch.setattr(os, "fdatasync", refuse(errno.EIO))
    with pytest.raises(ZeroDivisionError) as caught, writer:
        raise ZeroDivisionError
    assert "closing" in caught.value.__notes__[0]


def test_error_in_the_with_block_commits_what_is_written(out: Path) -> None:
    writer = FeatureWriter.open(out, RUN, KEYS)
    writer.write([0], row_maps([0]))
    with pytest.raises(ZeroDivisionError), writer:
        raise ZeroDivisionError
    assert status_on_disk(out)[0] == 1
    assert names(out) == ["f.h5.partial"]


# The start


def test_disk_without_room_is_refused_with_both_figures(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_fallocate", refuse(errno.ENOSPC))
    with pytest.raises(StartError, match=r"need .* bytes\), and .* has .* bytes\) free"):
        FeatureWriter.open(out, RUN, KEYS)
    assert names(out) == []


def test_run_larger_than_the_disk_is_refused_before_hdf5_writes(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skeleton.h5py, "File", None)
    with pytest.raises(StartError, match="free"):
        FeatureWriter.open(out, replace(RUN, stages=(replace(RUN.stages[0], shape=(10**6, 10**4, 10**3)),)), KEYS)


def test_file_system_that_cannot_reserve_goes_on_sparse(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_fallocate", lambda *_: False)
    make(out)
    assert check_target(out, RUN, KEYS).state == "complete"


@pytest.mark.skipif(sys.platform != "linux", reason="fallocate(2) is Linux")
def test_space_is_really_reserved(out: Path) -> None:
    FeatureWriter.open(out, RUN, KEYS).close()
    found = Path(f"{out}.partial").stat()
    assert found.st_blocks * 512 >= found.st_size


def test_missing_folder_is_named_with_a_mkdir(tmp_path: Path) -> None:
    for call in (check_target, FeatureWriter.open):
        with pytest.raises(StartError, match="none") as caught:
            call(tmp_path / "none" / "f.h5", RUN, KEYS)
        assert caught.value.hint == f"mkdir -p {tmp_path / 'none'}"


def test_read_only_folder_is_a_start_error(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", refuse(errno.EROFS))
    with pytest.raises(StartError, match="Read-only file system"):
        FeatureWriter.open(out, RUN, KEYS)


def test_draft_of_a_killed_start_is_overwritten(out: Path) -> None:
    Path(f"{out}.partial.tmp").write_bytes(b"half a skeleton")
    make(out)
    assert names(out) == ["f.h5"]


def test_image_listed_twice_is_refused(out: Path) -> None:
    with pytest.raises(StartError, match=r"'cats/003\.png' is listed twice"):
        FeatureWriter.open(out, RUN, [*KEYS, KEYS[3]])


# One writer


def test_finished_run_leaves_nothing_but_its_file(out: Path) -> None:
    make(out)
    assert names(out) == ["f.h5"]


def test_second_writer_is_told_who_holds_the_output(out: Path) -> None:
    with (
        FeatureWriter.open(out, RUN, KEYS),
        pytest.raises(StartError, match=rf"held by process {os.getpid()} on host"),
    ):
        FeatureWriter.open(out, RUN, KEYS)


def test_lock_ends_with_a_killed_process_and_its_file_blocks_nobody(out: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(StartError, match=f"process {holder.pid}"):
        FeatureWriter.open(out, RUN, KEYS)
    holder.kill()
    holder.communicate()
    assert names(out) == ["f.h5.lock"]
    make(out)
    assert names(out) == ["f.h5"]


def test_forked_child_neither_holds_the_lock_nor_writes(out: Path) -> None:
    writer = FeatureWriter.open(out, RUN, KEYS)
    said, say = os.pipe()
    wait, go = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            writer.write([0], row_maps([0]))
        except BaseException as error:
            os.write(say, type(error).__name__.encode())
        writer.close()
        os.read(wait, 1)
        os._exit(0)
    assert os.read(said, 100) == b"UsageError"
    writer.close()
    FeatureWriter.open(out, RUN, KEYS).close()  # while the child is alive
    os.write(go, b"x")
    os.waitpid(child, 0)
    for fd in (said, say, wait, go):
        os.close(fd)
    assert sum(status_on_disk(out)) == 0


# Modes


def test_nothing_there_is_new(out: Path) -> None:
    assert check_target(out, RUN, KEYS) == Target(out, "new", 20, 0, 0)
    assert names(out) == []


def test_same_run_resumes_at_its_pending_rows(out: Path) -> None:
    with FeatureWriter.open(out, RUN, KEYS) as writer:
        writer.write([1, 2], row_maps([1, 2]))
        writer.fail(5, "bad")
    assert check_target(out, RUN, KEYS) == Target(out, "resume", 17, 2, 1)
    with FeatureWriter.open(out, RUN, KEYS) as writer:
        assert writer.pending.tolist() == [row for row in range(20) if row not in (1, 2, 5)]
        writer.write(*rest(writer))
        assert writer.complete
    with FeatureFile(out) as file:
        assert len(file.attempts) == 2
        assert file.counts == (19, 1, 0)


def test_finished_run_is_complete_and_not_touched(out: Path) -> None:
    before = make(out).stat()
    assert check_target(out, RUN, KEYS) == Target(out, "complete", 0, 20, 0)
    with FeatureWriter.open(out, RUN, KEYS) as writer:
        assert writer.complete
        assert writer.pending.size == 0
    assert out.stat() == before
    assert names(out) == ["f.h5"]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (replace(RUN, dtype="float16"), "dtype is float32 there and float16 here"),
        (replace(RUN, pool="avg", precision="bf16"), r"pool is none there and avg here \(and so do precision\)"),
        (replace(RUN, preprocess=replace(RUN.preprocess, resize=40)), "preprocess.resize is 36 there and 40 here"),
        (
            replace(RUN, stages=RUN.stages[:1]),
            r"stages is 4 \(stem, stage1, tokens, pooled\) there and 1 \(stem\) here",
        ),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_run_is_refused_naming_the_field(out: Path, run: object, message: str, finished: bool) -> None:
    make(out) if finished else FeatureWriter.open(out, RUN, KEYS).close()
    for call in (check_target, FeatureWriter.open):
        with pytest.raises(RunMismatchError, match=message) as caught:
            call(out, run, KEYS)
        assert "--mode overwrite" in caught.value.hint


def test_weights_label_does_not_make_another_run(out: Path) -> None:
    make(out)
    assert check_target(out, replace(RUN, weights="other label"), KEYS).state == "complete"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([*KEYS, "new.png"], "row 20 is no image there and 'new.png' here; 20 images there, 21 here, 1 new"),
        (KEYS[:-1], f"row 19 is '{KEYS[19]}' there and no image here; 20 images there, 19 here, 1 gone"),
        ([*KEYS[:3], "x", *KEYS[4:]], f"row 3 is '{KEYS[3]}' there and 'x' here; .* 1 new .'x'.*, 1 gone"),
        (KEYS[::-1], "row 0 .* the same ones in another order"),
    ],
)
def test_other_images_are_refused_naming_the_first_row(out: Path, keys: list[str], message: str) -> None:
    make(out)
    with pytest.raises(RunMismatchError, match=message):
        check_target(out, RUN, keys)


def test_mode_new_wants_nothing_there(out: Path) -> None:
    assert check_target(out, RUN, KEYS, "new").state == "new"
    FeatureWriter.open(out, RUN, KEYS).close()
    with pytest.raises(RunMismatchError, match="partial exists already"):
        check_target(out, RUN, KEYS, "new")


def test_mode_resume_wants_something_there(out: Path) -> None:
    with pytest.raises(StartError, match="nothing to resume"):
        check_target(out, RUN, KEYS, "resume")


def test_unknown_mode_is_named(out: Path) -> None:
    with pytest.raises(UsageError, match="'append'"):
        check_target(out, RUN, KEYS, "append")  # type: ignore[arg-type]


def test_overwrite_keeps_the_old_file_until_the_new_one_is_complete(out: Path) -> None:
    make(out)
    other = replace(RUN, pool="avg")
    with FeatureWriter.open(out, other, KEYS, mode="overwrite") as writer:
        writer.write([0], row_maps([0]))
    with FeatureFile(out) as file:
        assert file.run == RUN
    with FeatureWriter.open(out, other, KEYS, mode="resume") as writer:
        assert writer.counts.done == 1
        writer.write(*rest(writer))
    with FeatureFile(out) as file:
        assert file.run == other
    assert names(out) == ["f.h5"]


def test_interrupted_overwrite_is_pointed_out(out: Path) -> None:
    make(out)
    FeatureWriter.open(out, replace(RUN, pool="avg"), KEYS, mode="overwrite").close()
    with pytest.raises(RunMismatchError) as caught:
        check_target(out, replace(RUN, pool="avg"), KEYS)
    assert "--mode resume" in caught.value.hint


def test_file_that_appears_meanwhile_is_not_replaced(out: Path) -> None:
    writer = FeatureWriter.open(out, RUN, KEYS)
    writer.write(*rest(writer))
    out.write_text("precious")
    with pytest.raises(WriteError, match="left alone"):
        writer.close()
    assert out.read_text() == "precious"
    assert status_on_disk(out) == [1] * 20


@pytest.mark.parametrize("kind", ["text", "empty", "folder", "hdf5"])
def test_something_else_at_the_output_is_refused(out: Path, kind: str) -> None:
    if kind == "folder":
        out.mkdir()
    elif kind == "hdf5":
        h5py.File(out, "w").close()
    else:
        out.write_text("notes" if kind == "text" else "")
    with pytest.raises(FileError) as caught:
        check_target(out, RUN, KEYS)
    assert caught.value.hint
    assert isinstance(caught.value, BbxError)


def test_link_to_the_output_is_followed(out: Path, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    out.symlink_to(tmp_path / "big" / "real.h5")
    make(out)
    assert out.is_symlink()
    assert (tmp_path / "big" / "real.h5").is_file()


def test_attempts_beyond_the_slots_replace_the_last(out: Path) -> None:
    for number in range(18):
        FeatureWriter.open(out, RUN, KEYS, attempt={"number": number}).close()
    with FeatureFile(out, partial=True) as file:
        assert [attempt["number"] for attempt in file.attempts] == [*range(15), 17]


def test_run_spans_processes(out: Path) -> None:
    """A spawned process goes on where another stopped: nothing depends on memory."""
    with FeatureWriter.open(out, RUN, KEYS) as writer:
        writer.write([0], row_maps([0]))
    child = multiprocessing.get_context("spawn").Process(target=make, args=(out,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert check_target(out, RUN, KEYS).state == "complete"
