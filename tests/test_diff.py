"""Two feature files are compared image by image: how far apart, where first, and which recorded fields differ."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from bbx.diff import cosines, diff, relative_errors
from bbx.errors import FileError, UsageError
from bbx.spec import RunSpec, Stage
from bbx.store import FeatureWriter
from tests.test_store_toys import KEYS, RUN, STAGES, make, row_maps


def written(
    path: Path,
    rows: Sequence[int],
    *,
    run: RunSpec = RUN,
    keys: Sequence[str] = KEYS,
    change: dict[tuple[int, str], object] | None = None,
    attempt: dict[str, object] | None = None,
) -> Path:
    """A file whose row i is that of `KEYS[rows[i]]`, with `change[i, stage]` added to it."""
    maps = row_maps(rows, run)
    for (place, stage), amount in (change or {}).items():
        maps[stage][place] = maps[stage][place] + amount
    with FeatureWriter.open(path, run, [keys[row] for row in rows], attempt=attempt) as writer:
        writer.write(range(len(rows)), maps)
    return path


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return written(tmp_path / "a.h5", range(20))


def test_a_file_is_the_same_as_itself(a: Path) -> None:
    found = diff(a, a)
    assert found.same
    assert found.exit_code == 0
    assert [(stage.stage, stage.rows, stage.equal, stage.beyond) for stage in found.stages] == [
        (stage.name, 20, 20, 0) for stage in STAGES
    ]
    assert all(stage.worst_error == stage.mean_error == 0 for stage in found.stages)
    assert all(stage.least_cosine == pytest.approx(1) for stage in found.stages)
    assert found.first is None
    assert found.fields == ()


def test_rows_are_matched_by_key_in_whatever_order(a: Path, tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(20).tolist()
    found = diff(a, written(tmp_path / "b.h5", order))
    assert found.same
    assert all(stage.equal == 20 for stage in found.stages)


def test_one_changed_row_is_named_with_its_error_and_stage(a: Path, tmp_path: Path) -> None:
    b = written(tmp_path / "b.h5", range(20), change={(7, "stage1"): 0.5, (11, "stem"): 1e-3})
    found = diff(a, b)
    assert not found.same
    assert found.exit_code == 4
    assert found.first is not None
    key, stage, error = found.first
    mine = row_maps([7])["stage1"]
    assert (key, stage) == (KEYS[7], "stage1")
    assert error == pytest.approx(0.5 / np.abs(mine).max(), rel=1e-5)
    stem, stage1, *others = found.stages
    assert (stage1.worst_error, stage1.worst_key, stage1.least_cosine_key) == (error, KEYS[7], KEYS[7])
    assert (stage1.equal, stage1.beyond) == (19, 1)
    assert stage1.mean_error == pytest.approx(error / 20)
    expected = (mine * (mine + 0.5)).sum() / np.linalg.norm(mine) / np.linalg.norm(mine + 0.5)
    assert stage1.least_cosine == pytest.approx(expected, rel=1e-5)
    assert (stem.worst_key, stem.beyond) == (KEYS[11], 1)
    assert all(other.equal == 20 for other in others)


def test_the_first_image_is_first_in_the_order_of_a(a: Path, tmp_path: Path) -> None:
    b = written(tmp_path / "b.h5", list(range(20))[::-1], change={(2, "stem"): 1.0, (9, "pooled"): 1.0})
    first = diff(a, b).first  # rows 2 and 9 of b are images 17 and 10
    assert first is not None
    assert first[:2] == (KEYS[10], "pooled")
    first = diff(b, a).first
    assert first is not None
    assert first[:2] == (KEYS[17], "stem")


def test_what_lies_within_the_tolerance_is_the_same(a: Path, tmp_path: Path) -> None:
    b = written(tmp_path / "b.h5", range(20), change={(7, "stage1"): 1e-4})
    assert not diff(a, b).same
    found = diff(a, b, tolerance=1e-3)
    assert found.same
    assert found.stages[1].equal == 19
    assert found.stages[1].worst_error > 0


def test_another_type_on_disk_is_compared_by_value_and_named(a: Path, tmp_path: Path) -> None:
    b = written(tmp_path / "b.h5", range(20), run=replace(RUN, dtype="float16"))
    found = diff(a, b, tolerance=2**-10)
    assert found.same
    assert all(0 < stage.worst_error < 2**-10 for stage in found.stages)
    assert ("dtype", "float32", "float16") in found.fields
    assert not diff(a, b).same


def test_stages_of_one_file_alone_are_named(a: Path, tmp_path: Path) -> None:
    other = Stage("stage2", (3, 2, 2), 16, "layer2", 2)
    b = written(tmp_path / "b.h5", range(20), run=replace(RUN, stages=(*STAGES[:2], other)))
    found = diff(a, b)
    assert found.stages_only_a == ("tokens", "pooled")
    assert found.stages_only_b == ("stage2",)
    assert [stage.stage for stage in found.stages] == ["stem", "stage1"]
    assert found.same
    assert found.fields[0][0] == "stages"


def test_files_without_a_common_stage_are_not_the_same(a: Path, tmp_path: Path) -> None:
    b = written(tmp_path / "b.h5", range(20), run=replace(RUN, stages=(Stage("stage2", (3, 2, 2), 16, "layer2", 2),)))
    found = diff(a, b)
    assert found.stages == ()
    assert found.exit_code == 4


def test_a_stage_of_another_shape_is_named_and_not_compared(a: Path, tmp_path: Path) -> None:
    larger = replace(STAGES[0], shape=(4, 16, 16))
    b = written(tmp_path / "b.h5", range(20), run=replace(RUN, stages=(larger, *STAGES[1:])))
    found = diff(a, b)
    assert found.shapes == (("stem", (4, 8, 8), (4, 16, 16)),)
    assert "stem" not in [stage.stage for stage in found.stages]
    assert not found.same


def test_only_the_stages_asked_for_are_compared(a: Path, tmp_path: Path) -> None:
    b = written(tmp_path / "b.h5", range(20), change={(3, "stem"): 1.0})
    assert [stage.stage for stage in diff(a, b, stages="stage1,tokens").stages] == ["stage1", "tokens"]
    assert diff(a, b, stages="stage1,tokens").same
    with pytest.raises(UsageError, match="stage7"):
        diff(a, b, stages="stage7")


def test_images_of_one_file_alone_are_counted_and_named(a: Path, tmp_path: Path) -> None:
    b = written(tmp_path / "b.h5", [5, 3, *range(8, 20)])
    found = diff(a, b)
    assert found.only_a.count == 6
    assert found.only_a.keys == tuple(KEYS[row] for row in (0, 1, 2, 4, 6, 7))
    assert found.only_b.count == 0
    assert all(stage.equal == stage.rows == 14 for stage in found.stages)
    assert not found.same
    assert diff(b, a).only_b == found.only_a


def test_files_of_other_images_have_nothing_to_compare(a: Path, tmp_path: Path) -> None:
    b = written(tmp_path / "b.h5", range(20), keys=[f"dogs/{row}.png" for row in range(20)])
    found = diff(a, b)
    assert (found.only_a.count, found.only_b.count) == (20, 20)
    assert len(found.only_a.keys) == 10
    assert all(stage.rows == 0 and math.isnan(stage.worst_error) for stage in found.stages)
    assert not found.same


def test_an_image_that_failed_in_one_file_is_named(a: Path, tmp_path: Path) -> None:
    b = make(tmp_path / "b.h5", failed=[4])
    found = diff(a, b)
    assert found.done_only_a.keys == (KEYS[4],)
    assert found.done_only_b.count == 0
    assert all(stage.rows == 19 for stage in found.stages)
    assert not found.same
    assert diff(b, a).done_only_b == found.done_only_a


def test_an_image_that_failed_in_both_is_no_difference(tmp_path: Path) -> None:
    assert diff(make(tmp_path / "a.h5", failed=[4]), make(tmp_path / "b.h5", failed=[4])).same


def test_an_unfinished_file_is_compared_as_far_as_it_goes(a: Path, tmp_path: Path) -> None:
    with FeatureWriter.open(tmp_path / "b.h5", RUN, KEYS) as writer:
        writer.write([2, 3], row_maps([2, 3]))
    found = diff(a, tmp_path / "b.h5")
    assert found.done_only_a.count == 18
    assert all(stage.equal == stage.rows == 2 for stage in found.stages)


def test_damaged_rows_are_named_and_not_compared(a: Path, tmp_path: Path) -> None:
    b = written(tmp_path / "b.h5", range(20))
    with h5py.File(b, "r+") as file:
        file["stem"][6, 0, 0, 0] += 100
    found = diff(a, b)
    assert found.damaged_b.keys == (KEYS[6],)
    assert found.damaged_a.count == 0
    assert found.stages[0].rows == found.stages[0].equal == 19
    assert found.stages[1].rows == 20
    assert not found.same


def test_rows_of_zeros_are_equal_and_give_no_nan(tmp_path: Path) -> None:
    zero = {(row, "stem"): -row_maps([row])["stem"][0] for row in (0, 1)}
    a = written(tmp_path / "a.h5", range(20), change=zero)
    b = written(tmp_path / "b.h5", range(20), change=zero)
    found = diff(a, b)
    assert found.same
    assert (found.stages[0].worst_error, found.stages[0].mean_error) == (0, 0)
    lone = diff(a, written(tmp_path / "c.h5", range(20)))
    assert lone.stages[0].worst_error == math.inf
    assert lone.stages[0].least_cosine == 0


def test_nan_and_infinity_count_as_equal_where_both_have_them(tmp_path: Path) -> None:
    odd = {(0, "pooled"): np.array([np.nan, np.inf, 0, 0, 0, 0, -np.inf])}
    a = written(tmp_path / "a.h5", range(20), change=odd)
    assert diff(a, written(tmp_path / "b.h5", range(20), change=odd)).same
    found = diff(a, written(tmp_path / "c.h5", range(20)))
    assert found.stages[-1].worst_error == math.inf
    assert found.first == (KEYS[0], "pooled", math.inf)


@pytest.mark.parametrize(
    ("a", "b", "error", "cosine"),
    [
        ([1, -2], [1, -2], 0, 1),
        ([1, -2], [1, -1], 0.5, 3 / math.sqrt(10)),
        ([0, 0], [0, 0], 0, 1),
        ([0, 0], [1, 0], math.inf, 0),
        ([1, 0], [0, 0], 1, 0),
        ([1, math.nan], [1, math.nan], 0, 1),
        ([1, math.inf], [1, -math.inf], math.inf, 1),
        ([1, math.nan], [1, 1], math.inf, 1),
        ([65504, 1], [-65504, 1], 2, -1),
        ([3e38, 3e38], [-3e38, -3e38], 2, -1),
    ],
)
def test_error_and_cosine_of_a_row(a: list[float], b: list[float], error: float, cosine: float) -> None:
    mine, theirs = np.array([a], "f4"), np.array([b], "f4")
    assert relative_errors(mine, theirs)[0] == pytest.approx(error)
    assert cosines(mine, theirs)[0] == pytest.approx(cosine, abs=1e-6)


def test_the_recorded_fields_that_differ_are_named_with_both_values(tmp_path: Path) -> None:
    run = replace(RUN, weights_digest="sha256:5678", preprocess=replace(RUN.preprocess, mode="squash"))
    a = written(tmp_path / "a.h5", range(20), attempt={"device": "cpu", "versions": {"torch": "2.4", "numpy": "2.0"}})
    b = written(
        tmp_path / "b.h5",
        range(20),
        run=run,
        attempt={"device": "cuda:0", "versions": {"torch": "2.5", "numpy": "2.0"}},
    )
    found = diff(a, b)
    assert found.fields == (
        ("preprocess.mode", "crop", "squash"),
        ("weights_digest", "sha256:1234", "sha256:5678"),
        ("device", "cpu", "cuda:0"),
        ("versions.torch", "2.4", "2.5"),
    )
    assert found.same  # of the features, which is what the exit code is about


def test_starts_that_say_something_odd_do_no_harm(a: Path, tmp_path: Path) -> None:
    b = written(tmp_path / "b.h5", range(20), attempt={"device": ["cpu"], "versions": "2.4"})
    assert diff(a, b).fields == (("device", "–", "['cpu']"),)


def test_a_file_that_names_an_image_twice_is_refused(a: Path, tmp_path: Path) -> None:
    b = written(tmp_path / "b.h5", range(20))
    b.write_bytes(b.read_bytes().replace(KEYS[3].encode(), KEYS[2].encode()))
    with pytest.raises(FileError, match="names an image twice"):
        diff(a, b)


def test_what_is_no_feature_file_is_refused(a: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="does not exist"):
        diff(a, tmp_path / "none.h5")


def test_a_tolerance_below_zero_is_refused(a: Path) -> None:
    with pytest.raises(UsageError, match="tolerance"):
        diff(a, a, tolerance=-1)


def test_progress_counts_the_rows_of_every_stage(a: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bbx.diff._BLOCK_NBYTES", 4 * 256 * 40)  # four rows of the stem
    seen: list[tuple[int, int]] = []
    assert diff(a, a, progress=lambda done, total: seen.append((done, total))).same
    assert seen[0] == (4, 80)
    assert seen[-1] == (80, 80)
    assert seen == sorted(seen)


def test_blocks_do_not_change_what_is_found(a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    b = written(tmp_path / "b.h5", list(range(20))[::-1], change={(2, "stem"): 1.0, (9, "pooled"): 1.0})
    whole = diff(a, b)
    monkeypatch.setattr("bbx.diff._BLOCK_NBYTES", 1)
    single = diff(a, b)
    assert single.first == whole.first
    assert [stage.worst_error for stage in single.stages] == [stage.worst_error for stage in whole.stages]


def test_comparing_loads_no_torch(a: Path) -> None:
    code = "import sys; from bbx.diff import diff; assert diff(*sys.argv[1:]).same; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(a), str(a)], check=True)
