"""A Parquet export: one row per image, its vectors bit for bit, read by any Parquet reader."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from bbx.errors import FileError, StartError, UsageError, WriteError
from bbx.export import export, source
from bbx.spec import Stage
from bbx.store import FeatureFile, format
from tests.test_export import DONE, HOSTILE, damage, files_limited, nothing_left, same
from tests.test_store_toys import RUN, make

POOLED = replace(RUN, pool="avg", stages=(Stage("stage1", (8,), 0, "layer1", 1), Stage("stage2", (300,), 0, "x", 2)))


@pytest.fixture
def features(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return make(tmp_path / "in" / "features.h5", POOLED, failed=[4])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "made.parquet"


def read(out: Path) -> dict[str, Any]:
    table = parquet.read_table(out)
    stages = [name for name in table.column_names if name not in ("key", "row", "status")]
    vectors = {}
    for name in stages:
        column = table[name].combine_chunks()
        vectors[name] = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return {
        **vectors,
        "keys": [format.decode_key(text.encode()) for text in table["key"].to_pylist()],
        "image": table["row"].to_numpy(),
        "status": np.array([format.STATUS_WORDS.index(word) for word in table["status"].to_pylist()]),
    }


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("missing", "rows"), [("skip", DONE), ("nan", list(range(20)))])
def test_every_value_comes_back(tmp_path, out, dtype, missing, rows):
    path = make(tmp_path / "f.h5", replace(POOLED, dtype=dtype), failed=[4])
    made = export(path, "parquet", out, missing=missing)
    assert same(path, rows, read(out))
    assert (made.paths, made.rows, made.failed, made.nbytes) == ((out,), len(rows), 1, out.stat().st_size)


def test_columns_are_key_row_status_and_a_fixed_list_per_stage(features, out):
    export(features, "parquet", out)
    schema = parquet.read_schema(out)
    assert schema.names == ["key", "row", "status", "stage1", "stage2"]
    assert schema.field("key").type == arrow.string()
    assert schema.field("row").type == arrow.int64()
    assert schema.field("stage2").type == arrow.list_(arrow.float32(), 300)


def test_row_groups_are_blocks(features, out, monkeypatch):
    monkeypatch.setattr(source, "BLOCK_NBYTES", 8 * POOLED.row_nbytes)
    export(features, "parquet", out)
    groups = parquet.read_metadata(out)
    assert [groups.row_group(number).num_rows for number in range(groups.num_row_groups)] == [8, 8, 3]
    assert same(features, DONE, read(out))


def test_the_schema_says_where_the_rows_come_from(features, out):
    export(features, "parquet", out)
    facts = json.loads(parquet.read_schema(out).metadata[b"bbx_export"])
    with FeatureFile(features) as file:
        assert facts["run"] == json.loads(file.run.to_json())


def test_vectors_among_maps_are_exported_when_named(tmp_path, out):
    path = make(tmp_path / "f.h5", failed=[4])
    export(path, "parquet", out, stages="pooled")
    with FeatureFile(path) as file:
        assert np.array_equal(read(out)["pooled"], file["pooled"].get(DONE))


def test_a_stage_cannot_be_called_like_a_column(tmp_path, out):
    path = make(tmp_path / "f.h5", replace(RUN, stages=(Stage("row", (3,), 0, "x"),)))
    with pytest.raises(UsageError, match="column row"):
        export(path, "parquet", out)


def test_the_export_lies_beside_its_file_by_default(features):
    assert export(features, "parquet").output == features.parent / "features.parquet"


def test_keys_are_data(tmp_path, out):
    path = make(tmp_path / "f.h5", POOLED, keys=HOSTILE)
    export(path, "parquet", out)
    assert read(out)["keys"] == HOSTILE
    assert list(out.parent.iterdir()) == [out]


def test_a_damaged_row_stops_the_export_by_name(features, out):
    damage(features, "stage2", 9)
    with pytest.raises(FileError, match=r"row 9, 'cats/009.png'.*stage2.*bbx verify"):
        export(features, "parquet", out)
    assert nothing_left(out)


def test_overwrite_replaces_an_export_and_nothing_else(features, out):
    export(features, "parquet", out, stages="stage1")
    with pytest.raises(StartError, match="--overwrite"):
        export(features, "parquet", out)
    export(features, "parquet", out, overwrite=True)
    assert same(features, DONE, read(out))
    for foreign in (b"a photograph", None):
        if foreign is None:
            parquet.write_table(arrow.table({"a": [1]}), out)
        else:
            out.write_bytes(foreign)
        before = out.read_bytes()
        with pytest.raises(StartError, match="not overwritten"):
            export(features, "parquet", out, overwrite=True)
        assert out.read_bytes() == before


def test_a_full_disk_leaves_nothing(features, out):
    with files_limited(4096), pytest.raises(WriteError, match="make room"):
        export(features, "parquet", out)
    assert nothing_left(out)


def test_an_interrupted_export_leaves_nothing(features, out):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(features, "parquet", out, progress=interrupt)
    assert nothing_left(out)
