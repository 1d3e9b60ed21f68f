"""Rows are read by stage and by image, from any thread or process; a row that does not count never passes as one."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from bbx.errors import FileError, UsageError
from bbx.spec import RunSpec
from bbx.store import FeatureFile, FeatureWriter, RowError, open_finished_or_partial
from tests.test_store_toys import KEYS, RUN, is_row, make, rest, row_maps


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("reader") / "f.h5", failed=[4])


@pytest.fixture
def out(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(original, tmp_path / "f.h5"))


@pytest.fixture
def file(out: Path) -> Iterator[FeatureFile]:
    with FeatureFile(out) as file:
        yield file


@pytest.fixture
def unfinished(tmp_path: Path) -> Iterator[Path]:
    with FeatureWriter.open(tmp_path / "u.h5", RUN, KEYS) as writer:
        writer.write([0, 1], row_maps([0, 1]))
        writer.commit()
        yield tmp_path / "u.h5"


def compressed(out: Path, run: RunSpec = RUN) -> Path:
    """The same file as `bbx extract --compress` will make it: the stages in chunks of one image, shuffled, deflated."""
    with h5py.File(out, "r+") as file:
        for stage in run.stages:
            data = file[stage.name][:]
            del file[stage.name]
            chunk = (1, *stage.shape)
            file.create_dataset(stage.name, data=data, chunks=chunk, shuffle=True, compression="gzip", fletcher32=True)
    return out


def all_right(file: FeatureFile) -> bool:
    return all(is_row({name: file[name, row] for name in file.stages}, row) for row in file.done.tolist())


# What a file says


def test_stages_are_named_in_network_order(file: FeatureFile) -> None:
    assert list(file.stages) == ["stem", "stage1", "tokens", "pooled"]
    assert file.stages["stage1"] == RUN.stages[1]
    with pytest.raises(TypeError):
        file.stages["more"] = RUN.stages[1]  # type: ignore[index]


def test_file_knows_its_run_rows_and_keys(file: FeatureFile) -> None:
    assert file.run == RUN
    assert (len(file), file.rows, file.rows_total, file.keys) == (20, range(20), 20, KEYS)
    assert file.nbytes == 20 * RUN.row_nbytes
    assert file.index(KEYS[7]) == 7


def test_status_is_given_by_row_and_by_count(file: FeatureFile) -> None:
    assert file.counts == (19, 1, 0)
    assert file.done.tolist() == [row for row in range(20) if row != 4]
    assert file.pending.size == 0
    assert file.status.tolist() == [2 if row == 4 else 1 for row in range(20)]
    assert file.failed == {KEYS[4]: "not an image"}


# Rows


@pytest.mark.parametrize("row", [3, -17, KEYS[3], np.int64(3), np.uint8(3)])
def test_row_is_found_by_number_and_by_key(file: FeatureFile, row: int | str) -> None:
    assert is_row({name: file[name][row] for name in file.stages}, 3)
    assert is_row({name: file[name, row] for name in file.stages}, 3)


def test_row_has_its_stages_shape(file: FeatureFile) -> None:
    assert {name: file[name, 0].shape for name in file.stages} == {stage.name: stage.shape for stage in RUN.stages}
    view = file["stem"]
    assert (view.shape, view.dtype, len(view), view.nbytes) == ((20, 4, 8, 8), np.dtype("<f4"), 20, 20 * 1024)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (slice(5, 9), [5, 6, 7, 8]),
        (slice(19, 5, -5), [19, 14, 9]),
        ([7, KEYS[2], 3], [7, 2, 3]),
        (np.array([1, 1, 0]), [1, 1, 0]),
        (np.arange(20) == 6, [6]),
        (range(10, 12), [10, 11]),
        (slice(0, 0), []),
    ],
)
def test_several_rows_are_stacked(file: FeatureFile, rows: object, expected: list[int]) -> None:
    got = file["stage1"][rows]  # type: ignore[index]
    assert got.shape == (len(expected), 8, 4, 2)
    for index, row in enumerate(expected):
        np.testing.assert_array_equal(got[index], row_maps([row])["stage1"][0])


def test_stage_is_iterated_row_by_row(out: Path, tmp_path: Path) -> None:
    with FeatureFile(make(tmp_path / "whole.h5")) as file:
        assert np.array_equal(np.stack(list(file["pooled"])), row_maps(range(20))["pooled"])


def test_row_is_read_into_a_given_buffer(file: FeatureFile) -> None:
    buffer = np.empty((4, 8, 8), "f4")
    file["stem"].read_into(KEYS[9], buffer)
    np.testing.assert_array_equal(buffer, row_maps([9])["stem"][0])


@pytest.mark.parametrize("buffer", [np.empty((4, 8, 8)), np.empty((4, 8, 7), "f4"), np.empty((8, 8, 4), "f4").T])
def test_buffer_of_another_kind_is_refused(file: FeatureFile, buffer: np.ndarray) -> None:
    with pytest.raises(UsageError, match="buffer"):
        file["stem"].read_into(0, buffer)


def test_float16_comes_back_as_float16(tmp_path: Path) -> None:
    run = replace(RUN, dtype="float16")
    with FeatureFile(make(tmp_path / "h.h5", run)) as file:
        assert file["stem", 0].dtype == np.float16
        assert is_row({name: file[name, 2] for name in file.stages}, 2, run)


def test_compressed_file_reads_the_same(out: Path) -> None:
    with FeatureFile(compressed(out)) as file:
        assert file["stem"].column.offset is None
        assert all_right(file)
        assert file.verify_row("stem", 4)
        np.testing.assert_array_equal(file["stage1"][5:8], row_maps([5, 6, 7])["stage1"])


def test_changed_byte_is_seen_by_verify_row(out: Path) -> None:
    with h5py.File(out, "r+") as plain:
        plain["stem"][3, 0, 0, 0] += 1
    with FeatureFile(out) as file:
        assert not file.verify_row("stem", 3)
        assert file.verify_row("stem", KEYS[2])


# Rows that do not count


def test_failed_row_raises_naming_row_key_and_reason(file: FeatureFile) -> None:
    for ask in (
        lambda: file["stem", 4],
        lambda: file["stem"][3:6],
        lambda: file["stem"].read_into(4, np.empty((4, 8, 8), "f4")),
    ):
        with pytest.raises(RowError, match=r"row 4, 'cats/004\.png', failed: not an image") as caught:
            ask()
        assert 'missing="nan"' in caught.value.hint


def test_pending_row_raises(unfinished: Path) -> None:
    with FeatureFile(unfinished, partial=True) as file:
        with pytest.raises(RowError, match=r"row 2, 'cats/002\.png', is pending"):
            file["stem", 2]
        with pytest.raises(RowError, match="pending"):
            file.verify_row("stem", 2)


def test_missing_rows_are_nan_when_asked_for(file: FeatureFile) -> None:
    got = file["stem"].get(slice(3, 6), missing="nan")
    assert np.isnan(got[1]).all()
    np.testing.assert_array_equal(got[[0, 2]], row_maps([3, 5])["stem"])
    assert np.isnan(file["stem"].get(KEYS[4], missing="nan")).all()


@pytest.mark.parametrize(
    ("item", "message", "hint"),
    [
        ("stagee1", "no stage 'stagee1'", "did you mean 'stage1'"),
        (3, "no stage 3", "stem, stage1"),
        (("stem", "cats/03.png"), "no image 'cats/03.png'", "did you mean 'cats/"),
        (("stem", 20), "no row 20", "0 to 19"),
        (("stem", -21), "no row -21", "0 to 19"),
        (("stem", True), "no row True", ""),
        (("stem", 1.5), "1.5 is no row", ""),
        (("stem", [1, None]), "no row None", ""),
        (("stem", 1, 2), "one row", ""),
    ],
)
def test_unknown_stage_key_or_row_is_a_usage_error(file: FeatureFile, item: object, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        file[item]  # type: ignore[index]
    assert hint in caught.value.hint


# Files that are there, or not


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none\.h5 does not exist"):
        FeatureFile(tmp_path / "none.h5")


def test_unfinished_file_says_how_to_open_it(unfinished: Path) -> None:
    with pytest.raises(FileError, match="is not finished") as caught:
        FeatureFile(unfinished)
    assert "partial=True" in caught.value.hint
    assert "same bbx extract command" in caught.value.hint


def test_partial_falls_back_to_the_finished_file(out: Path) -> None:
    with FeatureFile(out, partial=True) as file:
        assert all_right(file)


def test_a_look_opens_whichever_is_there(out: Path, unfinished: Path, tmp_path: Path) -> None:
    for path, done in ((out, 19), (unfinished, 2)):
        with open_finished_or_partial(path) as file:
            assert file.counts.done == done
    with pytest.raises(FileError, match="does not exist"):
        open_finished_or_partial(tmp_path / "none.h5")


def test_refresh_sees_new_rows_also_after_the_final_rename(tmp_path: Path) -> None:
    writer = FeatureWriter.open(tmp_path / "g.h5", RUN, KEYS)
    with FeatureFile(tmp_path / "g.h5", partial=True) as file:
        assert file.counts.done == 0
        writer.write(*rest(writer))
        writer.close()
        assert file.counts.done == 0
        file.refresh()
        assert file.counts.done == 20
        assert all_right(pickle.loads(pickle.dumps(file)))


def test_closed_file_says_so(out: Path) -> None:
    file = FeatureFile(out)
    file.close()
    with pytest.raises(UsageError, match="closed"):
        file["stem", 0]


# Threads and processes


@pytest.mark.parametrize("packed", [False, True])
def test_threads_read_at_once(out: Path, packed: bool) -> None:
    with FeatureFile(compressed(out) if packed else out) as file, ThreadPoolExecutor(8) as pool:
        rows = file.done.tolist() * 10
        assert all(pool.map(lambda row: is_row({name: file[name, row] for name in file.stages}, row), rows))


def check_in_child(file: FeatureFile) -> None:
    sys.exit(0 if all_right(file) and file.index(KEYS[3]) == 3 and len(file.attempts) == 1 else 1)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("packed", [False, True])
def test_processes_read_on_their_own_handles(out: Path, method: str, packed: bool) -> None:
    with FeatureFile(compressed(out) if packed else out) as file:
        file["stem", 0]
        children = [
            multiprocessing.get_context(method).Process(target=check_in_child, args=(file,))
            for _ in range(1 if method == "spawn" else 3)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0] * len(children)
        assert all_right(file)


def test_pickle_carries_no_handle_and_no_keys(out: Path) -> None:
    with FeatureFile(out) as file:
        assert file.keys == KEYS
        data = pickle.dumps(file)
    assert KEYS[3].encode() not in data
    with pickle.loads(data) as again:
        assert list(again.stages) == list(file.stages)
        assert all_right(again)


def test_pickled_reader_refuses_a_file_that_took_the_place(out: Path) -> None:
    with FeatureFile(out) as file:
        data = pickle.dumps(file)
    out.unlink()
    make(out, keys=KEYS[::-1])
    with h5py.File(out, "r+") as plain:
        plain["provenance/attempts"][0, :9] = np.frombuffer(b'{"a": 1} ', np.uint8)
    with pytest.raises(FileError, match="replaced"):
        pickle.loads(data)["stem", 0]


def test_row_error_crosses_a_process(file: FeatureFile) -> None:
    with pytest.raises(RowError) as caught:
        file["stem", 4]
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.message, again.hint) == (caught.value.message, caught.value.hint)


def test_two_readers_of_one_file_do_not_disturb_each_other(out: Path) -> None:
    first, second = FeatureFile(out), FeatureFile(out)
    first.close()
    assert all_right(second)
    second.close()


def test_copied_file_reads_the_same(out: Path, tmp_path: Path) -> None:
    with FeatureFile(shutil.copy(out, tmp_path / "copy.h5")) as file:
        assert all_right(file)


def test_importing_the_store_loads_neither_torch_nor_plots() -> None:
    code = "import sys, bbx.store; print([m for m in ('torch', 'matplotlib', 'rich', 'PIL') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
