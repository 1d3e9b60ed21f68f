"""One file of many holds exactly their rows, or the merge is refused in words that say which file and which row."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from bbx.errors import FileError, RunMismatchError, StartError, UsageError, WriteError
from bbx.spec import InputFile, RunSpec
from bbx.store import FeatureFile, FeatureWriter, carry, compress, format, rowjoin
from bbx.store import virtual as virtual_stages
from bbx.store.compress import pack
from bbx.store.lock import WriterLock
from bbx.store.merge import merge
from bbx.store.sources import Names
from tests.test_compress import CAN_MOUNT, MOUNTS, flip
from tests.test_store_toys import KEYS, RUN, STAGES, is_row, relabel, row_maps

HALF = replace(RUN, dtype="float16")
WAYS = {"copied": {}, "virtual": {"virtual": True}, "compressed": {"compress": "gzip"}}


def some(
    path: Path, rows: Sequence[int], run: RunSpec = RUN, *, failed: Sequence[int] = (), shard: bool = False
) -> Path:
    """A file with the `rows` of `KEYS`, as the toys make them; `shard`: a part of a job of all keys."""
    names = [stage.name for stage in RUN.stages]
    with FeatureWriter.open(path, run, [KEYS[row] for row in rows]) as writer:
        for place, row in enumerate(rows):
            fact = InputFile(1000 + row, row, bytes([row + 1]) * 16)
            if row in failed:
                writer.fail(place, f"{path.stem}: not an image", fact)
                continue
            every = row_maps([row], replace(run, stages=STAGES))
            assert set(every) == set(names)
            writer.write([place], {stage.name: every[stage.name] for stage in run.stages}, [fact])
    if shard:
        with h5py.File(path, "r+") as file:
            file.attrs.update({"row_start": rows[0], "row_stop": rows[-1] + 1, "rows_total": len(KEYS)})
            relabel(file)
            file["image"][...] = rows
    return path


def check(path: Path, rows: Sequence[int], run: RunSpec = RUN, failed: Sequence[int] = ()) -> None:
    """The file holds the toys' `rows` in this order, whole and sealed, through bbx and through plain h5py."""
    with FeatureFile(path) as file, h5py.File(path) as plain:
        assert file.run == run
        assert file.keys == [KEYS[row] for row in rows]
        assert set(file.failed) == {KEYS[row] for row in failed}
        assert not len(file.broken_seals())
        assert [one.nbytes for one in file.inputs()] == [1000 + row for row in rows]
        for place, row in enumerate(rows):
            assert all(file.verify_row(stage, place) for stage in file)
            right = row_maps([row], replace(run, stages=STAGES))
            for stage in file:
                found = plain[stage][place]
                assert np.isnan(found).all() if row in failed else np.array_equal(found, right[stage][0])
                if row not in failed:
                    assert np.array_equal(file[stage, place], found)


def halves(run: RunSpec) -> tuple[RunSpec, RunSpec]:
    """The run with its first two stages only, and with the others only."""
    return replace(run, stages=STAGES[:2]), replace(run, stages=STAGES[2:])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("run", [RUN, HALF], ids=["float32", "float16"])
def test_rows_of_files_are_put_together(tmp_path: Path, run: RunSpec, packed: bool, way: str) -> None:
    one = some(tmp_path / "one.h5", range(0, 8), run, failed=[3])
    two = some(tmp_path / "two.h5", range(12, 20), run)
    three = some(tmp_path / "three.h5", range(8, 12), run, failed=[9, 11])
    if packed:
        pack(two.rename(tmp_path / "two.h5.partial"), two)
    before = [path.read_bytes() for path in (one, two, three)]
    merged = merge([one, two, three], tmp_path / "all.h5", **WAYS[way])
    rows = [*range(8), *range(12, 20), *range(8, 12)]
    check(tmp_path / "all.h5", rows, run, failed=[3, 9, 11])
    assert (merged.how, merged.rows, merged.failed.count, merged.missing) == ("rows", 20, 3, ())
    assert merged.failed.keys == (KEYS[3], KEYS[9], KEYS[11])
    assert before == [path.read_bytes() for path in (one, two, three)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.h5", "one.h5", "three.h5", "two.h5"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("run", [RUN, HALF], ids=["float32", "float16"])
def test_stages_of_files_with_the_same_rows_are_put_together(
    tmp_path: Path, run: RunSpec, packed: bool, way: str
) -> None:
    first, second = halves(run)
    one = some(tmp_path / "one.h5", range(20), first, failed=[3, 5])
    two = some(tmp_path / "two.h5", range(20), second, failed=[5, 9])
    if packed:
        pack(one.rename(tmp_path / "one.h5.partial"), one)
    merged = merge([two, one], tmp_path / "all.h5", **WAYS[way])
    check(tmp_path / "all.h5", range(20), run, failed=[3, 5, 9])
    assert (merged.how, merged.failed.count, merged.spoilt) == ("stages", 3, Names(2, (KEYS[3], KEYS[9])))
    assert merged.stages == ("stem", "stage1", "tokens", "pooled")
    with FeatureFile(tmp_path / "all.h5") as file:
        assert file.failed[KEYS[3]] == "one: not an image"
        assert file.failed[KEYS[9]] == "two: not an image"


@pytest.mark.parametrize("way", WAYS)
def test_shards_are_put_in_the_order_of_their_job(tmp_path: Path, way: str) -> None:
    parts = [range(0, 6), range(6, 7), range(7, 20)]
    paths = [some(tmp_path / f"{rows[0]}.h5", rows, failed=[6], shard=True) for rows in parts]
    merged = merge([paths[2], paths[0], paths[1]], tmp_path / "all.h5", **WAYS[way])
    check(tmp_path / "all.h5", range(20), failed=[6])
    assert merged.missing == ()
    with FeatureFile(tmp_path / "all.h5") as file:
        assert (file.rows, file.rows_total) == (range(20), 20)


def test_shards_in_the_middle_of_a_job_make_a_larger_shard(tmp_path: Path) -> None:
    paths = [some(tmp_path / f"{rows[0]}.h5", rows, shard=True) for rows in (range(9, 12), range(4, 9))]
    merged = merge(paths, tmp_path / "all.h5")
    check(tmp_path / "all.h5", range(4, 12))
    assert merged.missing == ((0, 4), (12, 20))
    with FeatureFile(tmp_path / "all.h5") as file, h5py.File(tmp_path / "all.h5") as plain:
        assert (file.rows, file.rows_total) == (range(4, 12), 20)
        assert plain["image"][:].tolist() == list(range(4, 12))


def test_shards_with_a_gap_are_refused_and_the_gap_is_named(tmp_path: Path) -> None:
    paths = [some(tmp_path / f"{rows[0]}.h5", rows, shard=True) for rows in (range(0, 3), range(4, 9), range(12, 20))]
    with pytest.raises(StartError, match="no file holds rows 3, 9 to 11 of 20, counted from 0"):
        merge(paths, tmp_path / "all.h5")
    assert not (tmp_path / "all.h5").exists()


def test_shards_of_other_lists_of_images_are_refused(tmp_path: Path) -> None:
    one = some(tmp_path / "one.h5", range(0, 6), shard=True)
    two = some(tmp_path / "two.h5", range(6, 12), shard=True)
    with h5py.File(two, "r+") as file:
        file.attrs.update({"row_start": 5, "row_stop": 11})
        relabel(file)
    with pytest.raises(RunMismatchError, match=r"two.h5 belongs to another list of images than .*one.h5: row 5"):
        merge([one, two], tmp_path / "all.h5")
    some(tmp_path / "whole.h5", range(12, 20))
    with pytest.raises(StartError, match=r"one.h5 holds rows 0 to 5 of 20, and .*whole.h5 all rows: they"):
        merge([one, tmp_path / "whole.h5"], tmp_path / "all.h5")


def test_an_image_in_several_files_is_taken_once_and_done_before_failed(tmp_path: Path) -> None:
    one = some(tmp_path / "one.h5", range(0, 10), failed=[7])
    two = some(tmp_path / "two.h5", range(5, 20), failed=[5, 15])
    merged = merge([one, two], tmp_path / "all.h5")
    check(tmp_path / "all.h5", range(20), failed=[15])
    assert merged.overlapping == Names(5, tuple(KEYS[5:10]))


def test_the_names_of_a_long_list_are_bounded_and_its_length_is_not() -> None:
    names = Names.of([b"%d" % number for number in range(5000)])
    assert (names.count, len(names.keys)) == (5000, 1000)


@pytest.mark.parametrize("way", ["copied", "virtual"])
def test_other_features_of_one_image_are_refused_until_it_is_said_which_to_take(tmp_path: Path, way: str) -> None:
    one, two = some(tmp_path / "one.h5", range(0, 4)), tmp_path / "two.h5"
    with FeatureWriter.open(two, RUN, KEYS[2:6]) as writer:
        writer.write([0, 1, 2, 3], row_maps([12, 13, 4, 5]))
    with pytest.raises(StartError, match=r"2 images have other features .*: 'cats/002.png', 'cats/003.png'") as caught:
        merge([one, two], tmp_path / "all.h5")
    assert "--overlap first or --overlap last" in caught.value.hint
    for overlap, rows in (("first", [0, 1, 2, 3, 4, 5]), ("last", [0, 1, 12, 13, 4, 5])):
        merge([one, two], tmp_path / "all.h5", overlap=overlap, mode="overwrite", **WAYS[way])  # type: ignore[arg-type]
        with FeatureFile(tmp_path / "all.h5") as file:
            assert file.keys == KEYS[:6]
            assert all(is_row({name: file[name, at] for name in file}, row) for at, row in enumerate(rows))


def test_pending_rows_are_refused_unless_another_file_has_them(tmp_path: Path) -> None:
    with FeatureWriter.open(tmp_path / "one.h5", RUN, KEYS[:10]) as writer:
        writer.write([0, 1, 2], row_maps([0, 1, 2]))
    with pytest.raises(FileError, match=r"one.h5 is not finished: .*one.h5.partial") as caught:
        merge([tmp_path / "one.h5"], tmp_path / "all.h5")
    assert "bbx extract" in caught.value.hint
    named = tmp_path / "one.h5.partial"
    with pytest.raises(FileError, match=r"7 rows of .*one.h5.partial are pending: 'cats/003.png', .*, …") as caught:
        merge([named], tmp_path / "all.h5")
    assert "bbx extract command that made it continues it" in caught.value.hint
    merge([named, some(tmp_path / "two.h5", range(3, 20))], tmp_path / "all.h5")
    with FeatureFile(tmp_path / "all.h5") as file:
        assert file.keys == KEYS
        assert all(is_row({name: file[name, row] for name in file}, row) for row in range(20))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (replace(RUN, weights_digest="sha256:5"), "weights_digest is sha256:5 in .*two.h5 and sha256:1234 in .*one.h5"),
        (HALF, "dtype is float16 in .*two.h5 and float32 in .*one.h5"),
        (replace(RUN, preprocess=replace(RUN.preprocess, mode="squash")), "preprocess.mode is squash in .*two.h5"),
        (replace(RUN, model="toy:other", dtype="float16"), r"model is toy:other in .*\(and so do dtype\)"),
        (replace(HALF, stages=STAGES[:2]), "dtype is float16 in"),
    ],
)
def test_other_runs_are_refused_by_the_field_and_both_values(tmp_path: Path, other: RunSpec, words: str) -> None:
    one, two = some(tmp_path / "one.h5", range(0, 4)), some(tmp_path / "two.h5", range(4, 8), other)
    with pytest.raises(RunMismatchError, match=f"two.h5 belongs to another run than .*one.h5: {words}"):
        merge([one, two], tmp_path / "all.h5")


def test_labels_of_a_run_may_differ(tmp_path: Path) -> None:
    one = some(tmp_path / "one.h5", range(0, 4))
    two = some(tmp_path / "two.h5", range(4, 8), replace(RUN, weights="another label", source='{"model": "net"}'))
    merge([one, two], tmp_path / "all.h5")
    check(tmp_path / "all.h5", range(8))


def test_other_stages_of_other_images_are_refused_with_the_reason(tmp_path: Path) -> None:
    first, second = halves(RUN)
    one, two = some(tmp_path / "one.h5", range(0, 8), first), some(tmp_path / "two.h5", range(0, 9), second)
    with pytest.raises(RunMismatchError, match=r"stages stem, stage1, .*two.h5 tokens, pooled, and their images"):
        merge([one, two], tmp_path / "all.h5")


def test_a_stage_in_two_files_must_be_the_same_in_both(tmp_path: Path) -> None:
    one = some(tmp_path / "one.h5", range(20), replace(RUN, stages=STAGES[:2]))
    two = some(tmp_path / "two.h5", range(20), replace(RUN, stages=STAGES[1:]))
    merge([one, two], tmp_path / "all.h5")
    check(tmp_path / "all.h5", range(20))
    three = tmp_path / "three.h5"
    with FeatureWriter.open(three, replace(RUN, stages=STAGES[1:]), KEYS) as writer:
        maps = row_maps(range(20))
        maps["stage1"][4] += 1
        writer.write(range(20), {stage.name: maps[stage.name] for stage in STAGES[1:]})
    with pytest.raises(StartError, match=r"stage1 of 1 images differs between .*: 'cats/004.png'"):
        merge([one, three], tmp_path / "all.h5", mode="overwrite")
    other = replace(RUN, stages=(replace(STAGES[1], module="layer9"), *STAGES[2:]))
    four = some(tmp_path / "four.h5", range(20), other)
    with pytest.raises(RunMismatchError, match=r"stage1 of .*one.h5 .*four.h5: 8x4x2 of layer1 there, .*layer9 here"):
        merge([four, one], tmp_path / "all.h5", mode="overwrite")


def test_stages_of_a_picture_that_changed_in_between_are_refused(tmp_path: Path) -> None:
    first, second = halves(RUN)
    one, two = some(tmp_path / "one.h5", range(20), first), tmp_path / "two.h5"
    with FeatureWriter.open(two, second, KEYS) as writer:
        facts = [InputFile(1000 + row, 0, bytes([row + 1 + (row == 6)]) * 16) for row in range(20)]
        writer.write(range(20), {stage.name: row_maps(range(20))[stage.name] for stage in STAGES[2:]}, facts)
    with pytest.raises(StartError, match=r"row 6, 'cats/006.png', was made from another picture in .*two.h5"):
        merge([one, two], tmp_path / "all.h5")


@pytest.mark.parametrize("way", ["copied", "compressed"])
def test_a_damaged_row_is_named_and_never_merged(tmp_path: Path, way: str) -> None:
    one, two = some(tmp_path / "one.h5", range(0, 8)), some(tmp_path / "two.h5", range(8, 20))
    flip(two, "tokens", 3)
    with pytest.raises(FileError, match=r"row 3, 'cats/011.png', of .*two.h5 does not match its checksum in tokens"):
        merge([one, two], tmp_path / "all.h5", **WAYS[way])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.h5", "two.h5"]


@pytest.mark.parametrize("way", WAYS)
def test_a_row_with_a_broken_seal_is_never_merged(tmp_path: Path, way: str) -> None:
    one, two = some(tmp_path / "one.h5", range(0, 8)), some(tmp_path / "two.h5", range(8, 20))
    flip(one, "provenance/input_mtime", 5)
    with pytest.raises(FileError, match=r"row 5, 'cats/005.png', of .*one.h5 is not what its seal says") as caught:
        merge([two, one], tmp_path / "all.h5", **WAYS[way])
    assert caught.value.hint.startswith(f"bbx verify {one}")


def test_starts_of_the_sources_are_kept_and_the_merge_is_the_last(tmp_path: Path) -> None:
    paths = [some(tmp_path / f"{row:02}.h5", [row]) for row in range(20)]
    merge(paths, tmp_path / "all.h5", attempt={"command": "bbx merge *.h5"})
    with FeatureFile(tmp_path / "all.h5") as file, FeatureFile(paths[14]) as other:
        assert len(file.attempts) == format.ATTEMPT_SLOTS
        assert file.attempts[14]["id"] == other.attempts[0]["id"]
        assert file.attempts[-1]["command"] == "bbx merge *.h5"
        assert file.attempts[-1]["merged_from"].startswith(f"00.h5 (run {RUN.sha256[:16]}), 01.h5")


def test_output_is_neither_replaced_unasked_nor_one_of_the_sources(tmp_path: Path) -> None:
    one, two, out = some(tmp_path / "one.h5", [1]), some(tmp_path / "two.h5", [2]), tmp_path / "all.h5"
    merge([one], out)
    with pytest.raises(RunMismatchError, match=r"all.h5 exists already"):
        merge([one, two], out)
    merge([one, two], out, mode="overwrite")
    check(out, [1, 2])
    with pytest.raises(UsageError, match=r"two.h5 is the output and one of the files"):
        merge([one, two], two, mode="overwrite")
    (tmp_path / "photo.h5").write_bytes(b"not yours")
    with pytest.raises(FileError, match=r"photo.h5 is not overwritten"):
        merge([one, two], tmp_path / "photo.h5", mode="overwrite")
    with pytest.raises(StartError, match="mkdir -p"):
        merge([one, two], tmp_path / "no" / "all.h5")
    held = WriterLock(tmp_path / "new.h5")
    with pytest.raises(StartError, match=f"held by process {os.getpid()}"):
        merge([one, two], tmp_path / "new.h5")
    held.release()


def test_wrong_calls_say_what_is_wrong(tmp_path: Path) -> None:
    one, out = some(tmp_path / "one.h5", [1]), tmp_path / "all.h5"
    with pytest.raises(UsageError, match="there are no files to merge"):
        merge([], out)
    with pytest.raises(UsageError, match=r"one.h5 is given twice"):
        merge([one, tmp_path / "." / "one.h5"], out)
    with pytest.raises(FileError, match=r"two.h5 does not exist"):
        merge([one, tmp_path / "two.h5"], out)
    with pytest.raises(UsageError, match="--virtual copies nothing"):
        merge([one], out, virtual=True, compress="gzip")
    with pytest.raises(UsageError, match="--compress cannot be 'gzp'") as caught:
        merge([one], out, compress="gzp")  # type: ignore[arg-type]
    assert "did you mean gzip?" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["one.h5"]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, 0])
def test_where_the_system_copies_no_ranges_bbx_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object) -> int:
        if code:
            raise OSError(code, os.strerror(code))
        return 0

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    monkeypatch.setattr(carry, "_BUFFER_NBYTES", 1000)
    one, two = some(tmp_path / "one.h5", range(0, 8)), some(tmp_path / "two.h5", range(8, 20))
    merge([one, two], tmp_path / "all.h5")
    check(tmp_path / "all.h5", range(20))


@pytest.mark.parametrize("way", WAYS)
def test_progress_ends_at_all_bytes(tmp_path: Path, way: str) -> None:
    told: list[tuple[int, int]] = []
    one, two = some(tmp_path / "one.h5", range(0, 8)), some(tmp_path / "two.h5", range(8, 20))
    merge([one, two], tmp_path / "all.h5", progress=lambda *facts: told.append(facts), **WAYS[way])
    assert told == sorted(told)
    assert all(done == total for done, total in told[-1:])


def linked(folder: Path) -> Path:
    """A virtual file over two others, one of them in a folder below."""
    (folder / "parts 100%b").mkdir()
    one = some(folder / "one.h5", range(0, 8), failed=[3])
    two = some(folder / "parts 100%b" / "two.h5", range(8, 20))
    merge([one, two], folder / "all.h5", virtual=True)
    return folder / "all.h5"


def test_a_virtual_file_goes_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    out = linked(tmp_path / "here")
    assert out.stat().st_size < (tmp_path / "here" / "one.h5").stat().st_size
    check(out, range(20), failed=[3])
    (tmp_path / "here").rename(tmp_path / "there")
    check(tmp_path / "there" / "all.h5", range(20), failed=[3])
    with pytest.raises(FileError, match="lies in other files"):
        FeatureFile(tmp_path / "there" / "all.h5", allow_virtual=False)


def test_a_virtual_file_can_be_copied_into_a_real_one(tmp_path: Path) -> None:
    out = linked(tmp_path)
    merge([out], tmp_path / "real.h5")
    out.unlink()
    shutil.rmtree(tmp_path / "parts 100%b")
    check(tmp_path / "real.h5", range(20), failed=[3])


def replaced_source(one: Path) -> None:
    some(one.with_name("new.h5"), range(0, 8), replace(RUN, model="toy:other"), failed=[3]).replace(one)


def other_rows(one: Path) -> None:
    some(one.with_name("new.h5"), range(10, 18), failed=[13]).replace(one)


def fewer_rows(one: Path) -> None:
    some(one.with_name("new.h5"), range(0, 7), failed=[3]).replace(one)


def failed_meanwhile(one: Path) -> None:
    some(one.with_name("new.h5"), range(0, 8), failed=[3, 4]).replace(one)


def other_stages(one: Path) -> None:
    some(one.with_name("new.h5"), range(0, 8), halves(RUN)[0], failed=[3]).replace(one)


def itself(one: Path) -> None:
    os.replace(one.with_name("all.h5"), one)  # noqa: PTH105 - what a slip of the hand does
    one.with_name("all.h5").symlink_to(one)


def gone(one: Path) -> None:
    one.unlink()


def no_features(one: Path) -> None:
    one.write_bytes(b"text")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replaced_source, "belongs to another run: model is toy:other there"),
        (other_rows, "row 0 of .*one.h5 is another one than was merged"),
        (fewer_rows, "has 7 rows, and had 8"),
        (failed_meanwhile, "row 4 of .*one.h5 is another one than was merged"),
        (other_stages, "has no stage tokens like the one that was merged"),
        (itself, "rows are taken from the file itself"),
        (gone, "does not exist"),
        (no_features, "damaged, or no feature file"),
    ],
)
def test_a_virtual_file_with_another_source_is_an_error_and_never_other_values(tmp_path: Path, change, words) -> None:
    out = linked(tmp_path)
    change(tmp_path / "one.h5")
    with pytest.raises(FileError, match=words):
        FeatureFile(out)


def test_a_row_whose_source_went_away_after_opening_is_an_error(tmp_path: Path) -> None:
    out = linked(tmp_path)
    with h5py.File(out) as file:
        sums = file["checksum/stem"][:]
        (tmp_path / "one.h5").unlink()
        virtual_stages.refuse_fill(file["stem"][8:], lambda: sums[8:])
        rows = file["stem"][:4]
        assert np.isnan(rows).all()  # so says HDF5, without a word
        virtual_stages.refuse_fill(rows[3:], lambda: sums[3:4])  # that one did fail
        with pytest.raises(FileError, match="went away"):
            virtual_stages.refuse_fill(rows, lambda: sums[:4])


def test_sources_of_a_virtual_file_lie_beside_or_below_it_and_are_real(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = some(tmp_path / "a" / "one.h5", range(0, 8)), some(tmp_path / "b" / "two.h5", range(8, 20))
    with pytest.raises(StartError, match=r"two.h5 lies outside .*/a, the output's folder"):
        merge([one, two], tmp_path / "a" / "all.h5", virtual=True)
    (tmp_path / "a" / "two.h5").symlink_to(two)
    with pytest.raises(StartError, match=r"two.h5 lies outside .*/a, the output's folder"):
        merge([one, tmp_path / "a" / "two.h5"], tmp_path / "a" / "all.h5", virtual=True)
    merge([one, two], tmp_path / "all.h5", virtual=True)
    with pytest.raises(StartError, match=r"all.h5 is virtual itself"):
        merge([tmp_path / "all.h5"], tmp_path / "more.h5", virtual=True)


def test_too_many_places_are_refused_as_virtual_and_copied_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(virtual_stages, "MOST_PIECES", 4)
    first = some(tmp_path / "one.h5", range(20), failed=range(0, 20, 2))
    second = some(tmp_path / "two.h5", range(20), failed=range(1, 20, 2))
    with pytest.raises(StartError, match="stem would take its rows from 20 places, and --virtual does up to 4"):
        merge([first, second], tmp_path / "all.h5", virtual=True)
    merge([first, second], tmp_path / "all.h5")
    check(tmp_path / "all.h5", range(20))


def hostile(out: Path, name: str, stage: str = "stem", rows: slice = slice(0, 20)) -> None:
    """Put another mapping into a virtual file."""
    with h5py.File(out, "r+") as file:
        shape = file["stem"].shape
        layout = h5py.VirtualLayout(shape, "<f4")
        layout[rows] = h5py.VirtualSource(name, stage, shape)[rows]
        del file["stem"]
        file.create_virtual_dataset("stem", layout, fillvalue=np.nan)


@pytest.mark.parametrize(
    ("name", "stage", "rows", "words"),
    [
        (".", "stem", slice(0, 20), "outside the folder|the file itself"),
        ("all.h5", "stem", slice(0, 20), "the file itself"),
        ("copy.h5", "stem", slice(0, 20), "lies in other files"),
        ("../x/real.h5", "stem", slice(0, 20), "outside the folder"),
        ("/etc/passwd", "stem", slice(0, 20), "outside the folder"),
        ("real.h5", "tokens", slice(0, 20), "no stage of that name"),
        ("real.h5", "stem", slice(0, 19), "takes row 19 from no file"),
        ("real.h5", "stem", slice(0, 20, 2), "parts of rows"),
    ],
)
def test_odd_mappings_are_refused(tmp_path: Path, name: str, stage: str, rows: slice, words: str) -> None:
    real = some(tmp_path / "real.h5", range(20))
    out = tmp_path / "all.h5"
    merge([real], out, virtual=True)
    shutil.copy(out, tmp_path / "copy.h5")
    check(tmp_path / "copy.h5", range(20))
    hostile(out, name, stage, rows)
    with pytest.raises(FileError, match=words):
        FeatureFile(out)


def merge_it(folder: str, way: str) -> None:
    """The victim of the tests below."""
    compress.CHUNK_NBYTES = 1 << 12
    paths = [Path(folder) / name for name in ("one.h5", "two.h5")]
    os.write(1, b"merging\n")
    try:
        merge(paths, Path(folder) / "all.h5", **WAYS[way])
    except (WriteError, StartError) as error:
        os.write(1, error.message.encode())
        sys.exit(3)


@pytest.mark.parametrize("room", [0.0, 0.2] if CAN_MOUNT else [])
def test_a_full_disk_is_an_error_that_leaves_the_sources(tmp_path: Path, room: float) -> None:
    rows = [some(tmp_path / "one.h5", range(0, 8)), some(tmp_path / "two.h5", range(8, 20))]
    small, nbytes = tmp_path / "disk", sum(path.stat().st_size for path in rows)
    small.mkdir()
    script = (
        f"mount -t tmpfs -o size={int(nbytes * (1 + room)) + (1 << 19)} none {small} && "
        f"cp {rows[0]} {rows[1]} {small} && cd {Path(__file__).parent.parent} && "
        f"{sys.executable} -c \"from tests.test_merge import *; merge_it('{small}', 'copied')\"; code=$?; "
        f"ls {small}; cmp {rows[0]} {small}/one.h5 && exit $code"
    )
    ran = subprocess.run([*MOUNTS, "sh", "-c", script], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (3, "")
    assert "features need" in ran.stdout or "No space left" in ran.stdout
    assert ran.stdout.endswith("one.h5\ntwo.h5\n")


@pytest.mark.parametrize(
    ("way", "calls"), [*(("copied", calls) for calls in (0, 1, 12, 60)), ("virtual", 12), ("compressed", 400)]
)
def test_a_disk_that_fails_is_an_error_that_leaves_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, calls: int
) -> None:
    one, two = some(tmp_path / "one.h5", range(0, 8)), some(tmp_path / "two.h5", range(8, 20))
    left = iter(range(calls))
    real = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if next(left, None) is None:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, data[: max(1, len(data) // 2)], offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(WriteError, match=r"failed to write .*all.h5.*: Input/output error") as caught:
            merge([one, two], tmp_path / "all.h5", **WAYS[way])
    assert "the files to merge are as they were" in caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.h5", "two.h5"]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_killed_at_any_instant_the_sources_are_whole_and_it_runs_again(tmp_path: Path, way: str) -> None:
    chance, kills = random.Random(way), 0
    one, two = some(tmp_path / "one.h5", range(0, 8), failed=[2]), some(tmp_path / "two.h5", range(8, 20))
    before, out = (one.read_bytes(), two.read_bytes()), tmp_path / "all.h5"
    while kills < 12:
        victim = subprocess.Popen(
            [sys.executable, "-c", f"from tests.test_merge import *; merge_it('{tmp_path}', '{way}')"],
            stdout=subprocess.PIPE,
        )
        assert victim.stdout is not None
        victim.stdout.readline()
        try:
            victim.wait(chance.uniform(0, 0.08))
        except subprocess.TimeoutExpired:
            victim.kill()
            kills += 1
        victim.communicate()
        assert (one.read_bytes(), two.read_bytes()) == before
        if out.exists():
            check(out, range(20), failed=[2])
            out.unlink()
    merge([one, two], out, **WAYS[way])
    check(out, range(20), failed=[2])
    assert sorted(path.name for path in tmp_path.glob("*.h5*")) == [
        "all.h5",
        "one.h5",
        "two.h5",
    ]


def test_ranges_are_said_in_whole_rows() -> None:
    assert [rowjoin.range_text(3, 6), rowjoin.range_text(3, 4)] == ["3 to 5", "3"]


def test_compressed_sources_of_a_virtual_file_are_decoded_within_bounds(tmp_path: Path, monkeypatch) -> None:
    one = some(tmp_path / "one.h5", range(0, 8))
    pack(one, tmp_path / "packed.h5")
    two = some(tmp_path / "two.h5", range(8, 20))
    merge([tmp_path / "packed.h5", two], tmp_path / "all.h5", virtual=True)
    read = h5py.Dataset.read_direct

    def refused(*_: object) -> None:
        raise AssertionError("HDF5 decodes")

    monkeypatch.setattr(h5py.Dataset, "read_direct", refused)
    with FeatureFile(tmp_path / "all.h5") as file:
        maps = row_maps(range(20))
        for stage in file.stages:
            np.testing.assert_array_equal(file[stage][:], maps[stage])
            np.testing.assert_array_equal(file[stage][[7, 8, 3]], maps[stage][[7, 8, 3]])
    monkeypatch.setattr(h5py.Dataset, "read_direct", read)
    with FeatureFile(tmp_path / "all.h5") as file:
        (tmp_path / "packed.h5").unlink()
        with pytest.raises(FileError, match=r"packed\.h5"):
            _ = file["stem"][0]
