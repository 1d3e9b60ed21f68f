"""A feature file is laid out as the format says, and plain h5py is all that it takes to see that."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from bbx.errors import StartError, UsageError
from bbx.spec import RunSpec, Stage
from bbx.store import FeatureFile, FeatureWriter, format
from tests.test_store_toys import KEYS, RUN, make


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory):
    with h5py.File(make(tmp_path_factory.mktemp("layout") / "f.h5")) as file:
        yield file


def test_root_attributes_name_format_run_and_rows(file: h5py.File) -> None:
    attributes = dict(file.attrs)
    assert attributes.pop("creator").startswith("bbx ")
    assert attributes == {
        "NX_class": "NXroot",
        "default": "plot",
        "bbx_format": "bbx-features",
        "bbx_format_version": "1.1",
        "bbx_run_sha256": RUN.sha256,
        "coordinates": "path status",
        "row_start": 0,
        "row_stop": 20,
        "rows_total": 20,
        "bbx_label_crc32": zlib.crc32(f"{RUN.to_json()}\n0 20 20".encode()),
    }


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("image", "<i8", (20,)),
        ("status", "u1", (20,)),
        ("stem", "<f4", (20, 4, 8, 8)),
        ("tokens", "<f4", (20, 5, 6)),
        ("pooled", "<f4", (20, 7)),
        ("stem_channel", "<i4", (4,)),
        ("stem_y", "<f4", (8,)),
        ("stage1_x", "<f4", (2,)),
        ("tokens_token", "<i4", (5,)),
        ("tokens_feature", "<i4", (6,)),
        ("pooled_channel", "<i4", (7,)),
        ("checksum/stem", "<u4", (20,)),
        ("provenance/attempts", "u1", (16, 4096)),
        ("provenance/failure", "S256", (20,)),
        ("provenance/input_nbytes", "<i8", (20,)),
        ("provenance/input_mtime", "<i8", (20,)),
        ("provenance/input_digest", "u1", (20, 16)),
        ("provenance/seal", "<u4", (20,)),
    ],
)
def test_dataset_is_contiguous_of_its_type(file: h5py.File, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    data = file[name]
    assert (data.dtype, data.shape, data.chunks) == (np.dtype(dtype), shape, None)
    plan = data.id.get_create_plist()
    assert plan.get_layout() == h5py.h5d.CONTIGUOUS
    assert plan.get_alloc_time() == h5py.h5d.ALLOC_TIME_EARLY
    assert plan.get_fill_time() == h5py.h5d.FILL_TIME_NEVER


def test_path_and_run_are_utf8_text(file: h5py.File) -> None:
    for name in ("path", "provenance/run"):
        assert h5py.check_string_dtype(file[name].dtype) == ("utf-8", None)
    assert file["path"].asstr()[:].tolist() == KEYS
    assert RunSpec.from_json(file["provenance/run"].asstr()[()]) == RUN


def test_large_objects_are_aligned(tmp_path: Path) -> None:
    run = replace(RUN, stages=(Stage("a", (64, 32, 32), 4, "a"), Stage("b", (64, 32, 32), 4, "b")))
    FeatureWriter.open(tmp_path / "f.h5", run, KEYS).close()
    with h5py.File(tmp_path / "f.h5.partial") as file:
        assert [file[name].id.get_offset() % 4096 for name in "ab"] == [0, 0]


def test_superblock_is_the_oldest(tmp_path: Path) -> None:
    data = make(tmp_path / "f.h5").read_bytes()
    assert data[:8] == b"\x89HDF\r\n\x1a\n"
    assert data[8] == 0  # HDF5 1.8 and older read version 0


def test_stage_has_a_scale_on_every_axis(file: h5py.File) -> None:
    scales = {name: [dim[0].name for dim in file[name].dims] for name in ("stem", "tokens", "pooled")}
    assert scales == {
        "stem": ["/image", "/stem_channel", "/stem_y", "/stem_x"],
        "tokens": ["/image", "/tokens_token", "/tokens_feature"],
        "pooled": ["/image", "/pooled_channel"],
    }


def test_rows_share_the_image_scale(file: h5py.File) -> None:
    for name in ("path", "status", "checksum/stem", "provenance/failure"):
        assert file[name].dims[0][0].name == "/image"
    assert file["image"][:].tolist() == list(range(20))


def test_y_and_x_are_cell_centres_in_input_pixels(file: h5py.File) -> None:
    assert file["stage1_x"][:].tolist() == [3.5, 11.5]
    assert file["stage1_x"].attrs["units"] == "pixel"


def test_stage_attributes(file: h5py.File) -> None:
    attributes = file["stage1"].attrs
    assert (attributes["module"], attributes["stride"], attributes["interpretation"]) == ("layer1", 8, "image")
    assert "stage1" in attributes["long_name"]


def test_status_says_what_its_numbers_mean(file: h5py.File) -> None:
    assert file["status"].attrs["flag_values"].tolist() == [0, 1, 2]
    assert file["status"].attrs["flag_meanings"].split() == ["pending", "done", "failed"]


@pytest.mark.parametrize(
    ("stage", "axes"),
    [("stem", ["channel", "y", "x"]), ("tokens", ["token", "feature"]), ("pooled", ["channel"])],
)
def test_plot_links_lead_to_the_stage(file: h5py.File, stage: str, axes: list[str]) -> None:
    group = file["plot"][stage]
    assert (file["plot"].attrs["NX_class"], file["plot"].attrs["default"]) == ("NXentry", "stem")
    assert (group.attrs["NX_class"], group.attrs["signal"]) == ("NXdata", "features")
    assert group.attrs["axes"].tolist() == [".", *axes]
    for name, target in (("features", stage), *((axis, f"{stage}_{axis}") for axis in axes)):
        assert isinstance(group.get(name, getlink=True), h5py.SoftLink)
        assert group[name] == file[target]


def test_attempts_are_json_in_slots(tmp_path: Path) -> None:
    with FeatureWriter.open(tmp_path / "f.h5", RUN, KEYS, attempt={"device": "cpu"}):
        pass
    with h5py.File(tmp_path / "f.h5.partial") as file:
        slots = file["provenance/attempts"][:]
    facts = json.loads(slots[0].tobytes().rstrip(b"\0"))
    assert facts["device"] == "cpu"
    assert {"time", "host"} <= set(facts)
    assert not slots[1:].any()


def test_float16_run_is_stored_as_float16(tmp_path: Path) -> None:
    with h5py.File(make(tmp_path / "f.h5", replace(RUN, dtype="float16"))) as file:
        assert file["stem"].dtype == "<f2"


@pytest.mark.parametrize(
    "key",
    [
        "plain",
        "日本/é.png",
        "line\nbreak",
        "bad \udcff byte",
        "\\udcff",
        "\\u005cudcff",
        "\\u00e9",
        "a\\b",
        "\ud800",
        "",
    ],
)
def test_any_file_name_round_trips_through_valid_utf8(key: str) -> None:
    data = format.encode_key(key)
    data.decode("utf-8", "strict")
    assert format.decode_key(data) == key


def test_non_utf8_names_survive_in_a_file(tmp_path: Path) -> None:
    keys = ["ok.png", "bad\udcff.png", "\\udcff"]
    with FeatureFile(make(tmp_path / "f.h5", keys=keys)) as file:
        assert file.keys == keys
        assert file.index("bad\udcff.png") == 1


@pytest.mark.parametrize("key", ["nul\0byte", "x" * 70_000])
def test_key_that_hdf5_cannot_hold_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(UsageError):
        FeatureWriter.open(tmp_path / "f.h5", RUN, [key])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["image", "stem_y", "plot", "a/b"])
def test_stage_name_of_the_files_own_is_refused(tmp_path: Path, name: str) -> None:
    run = replace(RUN, stages=(Stage(name, (1, 1, 1), 1, "m"),))
    with pytest.raises(UsageError, match=name):
        FeatureWriter.open(tmp_path / "f.h5", run, KEYS)


def test_no_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="no images"):
        FeatureWriter.open(tmp_path / "f.h5", RUN, [])


def test_long_attempt_is_cut_to_valid_json() -> None:
    slot = format.encode_attempt({"command": "é" * 9000, "device": "cpu", "nested": {"a": "b" * 3000}})
    facts = format.decode_attempt(slot)
    assert len(slot) == 4096
    assert slot[-1] == 0
    assert facts["device"] == "cpu"
    assert facts["nested"] == {"a": "b" * 3000}
    assert facts["command"].startswith("éé")


def test_reason_is_cut_between_characters() -> None:
    data = format.encode_reason("é" * 300)
    assert data.decode() == "é" * 128
    assert format.encode_reason("a" + "é" * 300).decode() == "a" + "é" * 127
