"""A zarr export: the file's layout as a group, each chunk whole images, and bit for bit the same rows."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zarr

from bbx.errors import FileError, StartError, UsageError, WriteError
from bbx.export import export
from bbx.export import zarr as module
from bbx.spec import Stage
from bbx.store import FeatureFile, StageView, format
from tests.test_export import DONE, HOSTILE, damage, files_limited, nothing_left, same
from tests.test_store_toys import RUN, make


@pytest.fixture
def features(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return make(tmp_path / "in" / "features.h5", failed=[4])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "made.zarr"


def read(out: Path) -> dict[str, Any]:
    group = zarr.open_group(out, mode="r")
    keys = [format.decode_key(str(text).encode()) for text in group["path"][:]]
    return {**{name: array[...] for name, array in group.arrays()}, "keys": keys}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("missing", "rows"), [("skip", DONE), ("nan", list(range(20)))])
def test_every_value_comes_back(tmp_path, out, dtype, missing, rows):
    path = make(tmp_path / "f.h5", replace(RUN, dtype=dtype), failed=[4])
    made = export(path, "zarr", out, missing=missing)
    assert same(path, rows, read(out))
    assert (made.paths, made.rows, made.failed) == ((out,), len(rows), 1)


def test_many_chunks_and_shards_give_the_same_values_each_read_once(features, out, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_NBYTES", 2 * RUN.stages[0].values * 4)
    monkeypatch.setattr(module, "SHARD_NBYTES", 6 * RUN.stages[0].values * 4)
    seen: list[int] = []
    get = StageView.get

    def watched(view: StageView, rows: Any, **options: Any) -> Any:
        block = get(view, rows, **options)
        seen.extend(rows if view.name == "stem" else ())
        assert block.nbytes <= module.SHARD_NBYTES
        return block

    with monkeypatch.context() as watching:
        watching.setattr(StageView, "get", watched)
        export(features, "zarr", out)
    stem = zarr.open_group(out, mode="r")["stem"]
    assert (stem.chunks, stem.shards) == ((2, 4, 8, 8), (6, 4, 8, 8))
    assert seen == DONE
    assert same(features, DONE, read(out))


def test_a_chunk_of_large_maps_is_one_image(tmp_path, out):
    path = make(tmp_path / "f.h5", replace(RUN, stages=(Stage("stage1", (64, 32, 32), 8, "x"),)))
    export(path, "zarr", out)
    assert zarr.open_group(out, mode="r")["stage1"].chunks == (1, 64, 32, 32)


def test_arrays_name_their_axes_as_the_feature_file_does(features, out):
    export(features, "zarr", out)
    group = zarr.open_group(out, mode="r")
    assert group["stage1"].metadata.dimension_names == ("image", "stage1_channel", "stage1_y", "stage1_x")
    assert group["tokens"].metadata.dimension_names == ("image", "tokens_token", "tokens_feature")
    assert group["path"].metadata.dimension_names == ("image",)
    assert group["stage1_y"][:].tolist() == [3.5, 11.5, 19.5, 27.5]
    assert group["stage1_y"].metadata.dimension_names == ("stage1_y",)


def test_the_group_says_where_it_comes_from_and_opens_in_one_read(features, out):
    export(features, "zarr", out)
    group = zarr.open_consolidated(out)
    with FeatureFile(features) as file:
        assert group.attrs["run"] == json.loads(file.run.to_json())
    assert group.attrs["coordinates"] == "path status"
    assert group["stage1"].attrs["stride"] == 8


def test_an_export_warns_of_nothing(features, out):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(features, "zarr", out)


def test_the_export_lies_beside_its_file_by_default(features):
    assert export(features, "zarr").output == features.parent / "features.zarr"


def test_keys_are_data_and_never_names(tmp_path, out):
    path = make(tmp_path / "f.h5", keys=HOSTILE)
    before = set(tmp_path.rglob("*"))
    export(path, "zarr", out)
    assert read(out)["keys"] == HOSTILE
    assert {made.relative_to(out).parts[0] for made in set(tmp_path.rglob("*")) - before - {out}} == {
        "zarr.json", "image", "path", "status", "stem", "stem_channel", "stem_y", "stem_x", "stage1", "stage1_channel",
        "stage1_y", "stage1_x", "tokens", "tokens_token", "tokens_feature", "pooled", "pooled_channel",
    }  # fmt: skip


def test_a_damaged_row_stops_the_export_by_name(features, out):
    damage(features, "pooled", 9)
    with pytest.raises(FileError, match=r"row 9, 'cats/009.png'.*pooled.*bbx verify"):
        export(features, "zarr", out)
    assert nothing_left(out)


def test_overwrite_replaces_an_export_and_nothing_else(features, out):
    export(features, "zarr", out, stages="stem")
    with pytest.raises(StartError, match="--overwrite"):
        export(features, "zarr", out)
    export(features, "zarr", out, overwrite=True)
    assert same(features, DONE, read(out))
    (out / "stem" / "notes.txt").write_text("mine")
    with pytest.raises(StartError, match="not overwritten"):
        export(features, "zarr", out, overwrite=True)
    assert list(out.parent.iterdir()) == [out]


def test_another_programs_group_is_not_overwritten(features, out):
    zarr.create_group(out)
    with pytest.raises(StartError, match="not overwritten"):
        export(features, "zarr", out, overwrite=True)


def test_a_full_disk_leaves_nothing(features, out):
    with files_limited(4096), pytest.raises(WriteError, match="make room"):
        export(features, "zarr", out)
    assert nothing_left(out)


def test_an_interrupted_export_leaves_nothing(features, out):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(features, "zarr", out, progress=interrupt)
    assert nothing_left(out)


@pytest.mark.parametrize("name", ["zarr.json", "__stage", "..."])
def test_zarr_keeps_some_names_for_itself(tmp_path, out, name):
    path = make(tmp_path / "f.h5", replace(RUN, stages=(Stage(name, (3,), 0, "x"),)))
    with pytest.raises(UsageError, match="zarr cannot hold"):
        export(path, "zarr", out)
    assert nothing_left(out)
