"""A file that somebody else made is an error or a right answer: no crash, no other file's bytes, no huge allocation."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from bbx.errors import BbxError, FileError
from bbx.store import FeatureFile, check_target, format, trust
from tests.test_store_toys import KEYS, RUN, make, relabel, row_maps


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("trust") / "f.h5", failed=[4])


@pytest.fixture
def out(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(original, tmp_path / "f.h5"))


def replaced(file: h5py.File, name: str, **options: object) -> None:
    """Put a dataset of other options in the place of `name`."""
    options = {"shape": file[name].shape, "dtype": file[name].dtype, **options}
    del file[name]
    file.create_dataset(name, **options)  # type: ignore[arg-type]


def external_link(file: h5py.File) -> None:
    del file["stem"]
    file["stem"] = h5py.ExternalLink("/etc/passwd", "/stem")


def external_link_in_a_corner(file: h5py.File) -> None:
    file.create_group("notes/more")["away"] = h5py.ExternalLink("other.h5", "/")


def soft_link(file: h5py.File) -> None:
    file.move("stem", "elsewhere")
    file["stem"] = h5py.SoftLink("/elsewhere")


def external_storage(file: h5py.File) -> None:
    replaced(file, "stem", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


def external_status(file: h5py.File) -> None:
    replaced(file, "status", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(shape=file["stem"].shape, dtype="f4")
    layout[:] = h5py.VirtualSource("/tmp/other.h5", "stem", shape=file["stem"].shape)
    del file["stem"]
    file.create_virtual_dataset("stem", layout)


def unknown_filter(file: h5py.File) -> None:
    replaced(file, "stem", compression="lzf", chunks=(1, 4, 8, 8))


def huge_deflated(file: h5py.File) -> None:
    replaced(file, "stem", shape=(20, 4, 1 << 30, 8), chunks=(1, 1, 1024, 8), compression="gzip")


def other_shape(file: h5py.File) -> None:
    replaced(file, "stem", shape=(19, 4, 8, 8))


def other_dtype(file: h5py.File) -> None:
    replaced(file, "stem", dtype=">f4")


def group_for_dataset(file: h5py.File) -> None:
    del file["stem"]
    file.create_group("stem")


def no_checksum(file: h5py.File) -> None:
    del file["checksum/stage1"]


def bad_status(file: h5py.File) -> None:
    file["status"][3] = 7


def huge_json(file: h5py.File) -> None:
    replaced(file, "provenance/run", shape=(), data="[" * (format.MAX_RUN_NBYTES + 1))


def deep_json(file: h5py.File) -> None:
    replaced(file, "provenance/run", shape=(), data="[" * 100_000)


def lying_shapes(file: h5py.File) -> None:
    run = json.loads(RUN.to_json())
    run["stages"][0]["shape"] = [4, 8, 1 << 50]
    file["provenance/run"][()] = json.dumps(run)


def changed_run(file: h5py.File) -> None:
    file["provenance/run"][()] = replace(RUN, model="other").to_json()


def negative_rows(file: h5py.File) -> None:
    file.attrs["row_start"] = -5


def more_rows(file: h5py.File) -> None:
    file.attrs["row_stop"] = file.attrs["rows_total"] = 1 << 60
    relabel(file)


def rows_as_text(file: h5py.File) -> None:
    file.attrs["row_start"] = "zero"


def newer_format(file: h5py.File) -> None:
    file.attrs["bbx_format_version"] = "2.0"


def other_format(file: h5py.File) -> None:
    file.attrs["bbx_format"] = np.arange(5)


ATTACKS: dict[Callable[[h5py.File], None], str] = {
    external_link: "leads out of the file",
    external_link_in_a_corner: "leads out of the file",
    soft_link: "/stem is only a link",
    external_storage: "not stored in one piece",
    external_status: "not stored in one piece",
    virtual: "outside the folder",
    unknown_filter: "/stem needs HDF5 filter 32000",
    huge_deflated: "/stem is float32",
    other_shape: "/stem is float32",
    other_dtype: "/stem is >f4",
    group_for_dataset: "/stem is no dataset",
    no_checksum: "/checksum/stage1 is missing",
    bad_status: "status 7",
    huge_json: "too long",
    deep_json: "run description is damaged",
    lying_shapes: "digest",
    changed_run: "digest",
    negative_rows: "rows -5 to 20 of 20",
    more_rows: "has shape",
    rows_as_text: "row_start is no whole number",
    newer_format: "format 2.0",
    other_format: "not one of bbx",
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_hostile_file_is_refused(out: Path, attack: Callable[[h5py.File], None]) -> None:
    with h5py.File(out, "r+") as file:
        attack(file)
    with pytest.raises(FileError, match=ATTACKS[attack]) as caught:
        FeatureFile(out)
    assert str(out) in caught.value.message
    assert caught.value.hint


def test_deflated_stage_cannot_be_larger_than_deflate_allows(tmp_path: Path) -> None:
    shape = (1 << 10, 1 << 10, 1 << 10)
    run = replace(RUN, stages=(replace(RUN.stages[0], shape=shape),))
    small = make(tmp_path / "f.h5", replace(run, stages=(replace(RUN.stages[0], shape=(1, 1, 1)),)))
    with h5py.File(small, "r+") as file:
        file["provenance/run"][()] = run.to_json()
        file.attrs["bbx_run_sha256"] = run.sha256
        relabel(file)
        replaced(file, "stem", shape=(20, *shape), chunks=(1, 1, 1024, 1024), compression="gzip")
    with pytest.raises(FileError, match="more than this file can"):
        FeatureFile(small)


def test_lying_string_lengths_are_refused_before_anything_is_allocated(out: Path) -> None:
    with h5py.File(out) as file:
        offset = file["path"].id.get_offset()
    with out.open("r+b") as raw:
        raw.seek(offset + 3 * 16)
        raw.write((4_000_000_000).to_bytes(4, "little"))
    with FeatureFile(out) as opened, pytest.raises(FileError, match="longer than the file"):
        _ = opened.keys


@pytest.mark.parametrize("part", [0.01, 0.5, 0.9, 0.999])
def test_truncated_file_is_refused(out: Path, part: float) -> None:
    data = out.read_bytes()
    out.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(FileError):
        FeatureFile(out)


@pytest.mark.parametrize("data", [b"", b"text", bytes(5000), b"\x89HDF\r\n\x1a\n" + b"\xff" * 3000])
def test_something_else_is_refused(out: Path, data: bytes) -> None:
    out.write_bytes(data)
    with pytest.raises(FileError, match=r"f\.h5"):
        FeatureFile(out)


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is a folder"):
        FeatureFile(tmp_path)


@pytest.mark.parametrize("moment", ["_descriptor", "inspect"])
def test_a_file_that_is_moved_while_it_is_opened_is_an_error_that_says_so(out: Path, monkeypatch, moment) -> None:
    before = getattr(trust, moment)

    def moved_after(*args: object) -> object:
        result = before(*args)
        out.rename(out.with_name("moved.h5"))
        return result

    monkeypatch.setattr(trust, moment, moved_after)
    with pytest.raises(FileError, match="went away while it was opened") as caught:
        FeatureFile(out)
    assert str(out) in caught.value.message
    assert caught.value.hint


def test_torn_attempt_is_told_and_not_raised(out: Path) -> None:
    with h5py.File(out, "r+") as file:
        file["provenance/attempts"][1, :4] = np.frombuffer(b'{"a"', np.uint8)
    with FeatureFile(out) as opened:
        assert opened.attempts[1] == {"unreadable": '{"a"'}


def test_loop_of_groups_ends(out: Path) -> None:
    with h5py.File(out, "r+") as file:
        file.create_group("loop")["back"] = file["/"]
    with FeatureFile(out) as opened:
        assert opened.keys == KEYS


def test_virtual_rows_inside_the_folder_are_read_unless_forbidden(out: Path, original: Path) -> None:
    shutil.copy(original, out.parent / "shard.h5")
    with h5py.File(out, "r+") as file:
        layout = h5py.VirtualLayout(shape=file["stem"].shape, dtype="f4")
        layout[:] = h5py.VirtualSource("shard.h5", "stem", shape=file["stem"].shape)
        del file["stem"]
        file.create_virtual_dataset("stem", layout, fillvalue=np.nan)
    with FeatureFile(out) as opened:
        np.testing.assert_array_equal(opened["stem", 3], row_maps([3])["stem"][0])
    with pytest.raises(FileError, match="lies in other files"):
        FeatureFile(out, allow_virtual=False)
    (out.parent / "shard.h5").unlink()
    with pytest.raises(FileError, match=r"shard\.h5 does not exist"):
        FeatureFile(out)


def test_virtual_rows_outside_the_folder_are_refused_always(out: Path) -> None:
    with h5py.File(out, "r+") as file:
        virtual(file)
    with pytest.raises(FileError, match="outside the folder"):
        FeatureFile(out)


@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 30))])
def test_mutated_file_gives_an_error_or_the_right_rows(original: Path, tmp_path: Path, seed: int) -> None:
    """Fifty files per seed, each with a few bytes changed; what passes its checksum is what was written."""
    rng = np.random.default_rng(seed)
    whole = np.frombuffer(original.read_bytes(), np.uint8)
    with h5py.File(original) as file:
        first_row = min(file[name].id.get_offset() for name in ("stem", "stage1"))
    place, right = tmp_path / "m.h5", row_maps(range(len(KEYS)))
    for _ in range(50):
        data = whole.copy()
        # Most of the damage where HDF5's own structures lie.
        limit = len(data) if rng.random() < 0.3 else min(first_row, 30_000)
        where = rng.integers(0, limit, rng.integers(1, 9))
        data[where] = rng.choice([0, 1, 0x7F, 0xFF, rng.integers(256)], len(where))
        place.write_bytes(data.tobytes())
        _read_all(place, right)


def _read_all(place: Path, right: dict[str, np.ndarray]) -> None:
    with contextlib.suppress(BbxError), FeatureFile(place) as file:
        _ = file.keys, file.attempts, file.failed
        for name in file.stages:
            for row in file.done[:4].tolist():
                got = file[name, row]
                if file.run == RUN and file.verify_row(name, row):
                    assert np.array_equal(got, right[name][row])
    with contextlib.suppress(BbxError):
        check_target(place, RUN, KEYS)
