"""An export holds the file's rows, in its order and bit for bit, and stands whole under its name or not at all."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open

from bbx.errors import FileError, MissingExtraError, StartError, UsageError, WriteError
from bbx.export import export, source
from bbx.spec import Stage
from bbx.store import FeatureFile, FeatureWriter, StageView
from tests.test_store_reader import compressed
from tests.test_store_toys import KEYS, RUN, make, relabel, row_maps

FORMATS = ("npy", "safetensors")
DONE = [row for row in range(20) if row != 4]
HOSTILE = [
    "../../x",
    "/etc/passwd",
    "CON",
    "a\nb",
    "..",
    "%s{}",
    "\x1b[31m",
    "-rf",
    "ü",
    "\udcff.png",
    'a"b\\u0041',
    "[red]",
]


@pytest.fixture
def features(tmp_path: Path) -> Path:
    """Twenty rows, of which row 4 failed, in a folder of their own."""
    (tmp_path / "in").mkdir()
    return make(tmp_path / "in" / "features.h5", failed=[4])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "made"


def read_npy(out: Path) -> dict[str, Any]:
    """An npy export: its arrays, and `keys`, a list."""
    arrays = {path.stem: np.load(path, allow_pickle=False, mmap_mode="r") for path in out.glob("*.npy")}
    return {**arrays, "keys": json.loads((out / "keys.json").read_text())}


def read_safetensors(out: Path) -> dict[str, Any]:
    """A safetensors export, its shards one after the other."""
    parts: dict[str, list[NDArray[Any]]] = {}
    keys: list[str] = []
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, "numpy") as shard:
            for name in shard.keys():  # noqa: SIM118 - the handle is no mapping
                parts.setdefault(name, []).append(shard.get_tensor(name))
            keys += json.loads(shard.metadata()["keys"])
    return {**{name: np.concatenate(arrays) for name, arrays in parts.items()}, "keys": keys}


READ: dict[str, Callable[[Path], dict[str, Any]]] = {"npy": read_npy, "safetensors": read_safetensors}


def same(path: Path, rows: list[int], got: dict[str, Any]) -> bool:
    """Whether `got` is exactly those rows of the file: keys, rows, status, and every value, NaN where none is."""
    with FeatureFile(path, partial=not path.exists()) as file:
        return (
            list(got["keys"]) == [file.keys[row] for row in rows]
            and got["image"].tolist() == [row + file.rows.start for row in rows]
            and got["status"].tolist() == file.status[rows].tolist()
            and all(
                got[name].dtype == file[name].dtype
                and np.array_equal(got[name], file[name].get(rows, missing="nan"), equal_nan=True)
                for name in file.stages
            )
        )


def damage(path: Path, stage: str, row: int) -> None:
    """Flip one bit of the row's features."""
    with h5py.File(path) as file:
        offset = file[stage].id.get_offset() + row * file[stage][0].nbytes + 5
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))


@contextmanager
def files_limited(nbytes: int) -> Iterator[None]:
    """No file of this process can grow past `nbytes`: the system refuses the write as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def nothing_left(out: Path) -> bool:
    """Whether the folder of `out` is as empty as it was."""
    return list(out.parent.iterdir()) == []


# What an export holds


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("to", FORMATS)
def test_every_value_comes_back_and_failed_rows_are_left_out(tmp_path, out, to, dtype):
    path = make(tmp_path / "f.h5", replace(RUN, dtype=dtype), failed=[4])
    made = export(path, to, out)
    assert same(path, DONE, READ[to](out))
    assert (made.rows, made.failed, made.pending, made.stages) == (19, 1, 0, ("stem", "stage1", "tokens", "pooled"))


@pytest.mark.parametrize("to", FORMATS)
def test_missing_rows_keep_their_place_as_nan_when_asked(features, out, to):
    made = export(features, to, out, missing="nan")
    got = READ[to](out)
    assert same(features, list(range(20)), got)
    assert np.isnan(got["stage1"][4]).all()
    assert (made.rows, made.failed) == (20, 1)


@pytest.mark.parametrize("to", FORMATS)
def test_an_unfinished_file_gives_the_rows_that_it_has(tmp_path, out, to):
    with FeatureWriter.open(tmp_path / "u.h5", RUN, KEYS) as writer:
        writer.write([7, 2], row_maps([7, 2]))
        writer.commit()
        made = export(tmp_path / "u.h5", to, out)
        assert same(tmp_path / "u.h5", [2, 7], READ[to](out))
    assert (made.rows, made.pending) == (2, 18)


@pytest.mark.parametrize("to", FORMATS)
def test_a_compressed_file_gives_the_same_values(features, out, to):
    export(compressed(features), to, out)
    assert same(features, DONE, READ[to](out))


def test_a_shards_rows_are_those_of_the_whole_job(features, out):
    with h5py.File(features, "r+") as file:
        file.attrs.update({"row_start": 100, "row_stop": 120, "rows_total": 400})
        relabel(file)
    export(features, "npy", out)
    assert read_npy(out)["image"].tolist() == [100 + row for row in DONE]
    assert same(features, DONE, read_npy(out))


@pytest.mark.parametrize(
    ("wanted", "names"), [("stage1", ("stage1",)), ("pooled,stem", ("stem", "pooled")), ([1], ("stage1",))]
)
def test_stages_are_chosen_by_name_and_index(features, out, wanted, names):
    assert export(features, "npy", out, stages=wanted).stages == names
    assert {path.stem for path in out.glob("*.npy")} == {*names, "image", "status"}


@pytest.mark.parametrize("to", FORMATS)
def test_an_export_says_where_it_comes_from(features, out, to):
    made = export(features, to, out)
    facts = json.loads((out / "export.json").read_text())
    with FeatureFile(features) as file:
        assert facts["run"] == json.loads(file.run.to_json())
        assert facts["attempts"] == file.attempts
    assert facts["rows_by_status"] == {"done": 19, "failed": 1, "pending": 0}
    assert made.nbytes == sum(path.stat().st_size for path in out.iterdir())
    assert all(path.is_file() for path in made.paths)


@pytest.mark.parametrize("to", FORMATS)
def test_keys_are_data_and_never_names(tmp_path, out, to):
    path = make(tmp_path / "f.h5", keys=HOSTILE)
    before = set(tmp_path.rglob("*"))
    export(path, to, out)
    assert read_keys(to, out) == HOSTILE
    known = {"image", "status", "keys", "export", "features", *(stage.name for stage in RUN.stages)}
    assert {made.stem for made in set(tmp_path.rglob("*")) - before - {out}} <= known


def read_keys(to: str, out: Path) -> list[str]:
    keys: list[str] = READ[to](out)["keys"]
    return keys


def test_npy_needs_no_pickle_and_holds_no_objects(features, out):
    export(features, "npy", out)
    assert {np.load(path, allow_pickle=False).dtype.kind for path in out.glob("*.npy")} == {"f", "i", "u"}


# Shards of safetensors


def test_one_shard_goes_without_number_and_index(features, out):
    made = export(features, "safetensors", out)
    assert [path.name for path in made.paths] == ["features.safetensors"]


def test_shards_are_cut_at_their_size_and_indexed(features, out):
    made = export(features, "safetensors", out, shard_nbytes=8 * RUN.row_nbytes + 1)
    names = [f"features-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert [path.name for path in made.paths] == [*names, "features.safetensors.index.json"]
    assert json.loads(made.paths[-1].read_text())["shards"] == [
        {"file": name, "rows": rows} for name, rows in zip(names, ([0, 8], [8, 16], [16, 19]), strict=True)
    ]
    assert same(features, DONE, read_safetensors(out))


def test_a_row_larger_than_a_shard_has_one_of_its_own(features, out):
    assert len(export(features, "safetensors", out, shard_nbytes=1).paths) == 20
    assert same(features, DONE, read_safetensors(out))


def test_long_keys_cut_shards_too(tmp_path, out, monkeypatch):
    path = make(tmp_path / "f.h5")
    monkeypatch.setattr("bbx.export.safetensors._KEYS_NBYTES", 5 * len('"cats/000.png", '))
    assert len(export(path, "safetensors", out).paths) == 5
    assert same(path, list(range(20)), read_safetensors(out))


@pytest.mark.parametrize("nbytes", [0, -1, 1 << 32])
def test_a_shard_has_a_size_below_4_gib(features, out, nbytes):
    with pytest.raises(UsageError, match="shard"):
        export(features, "safetensors", out, shard_nbytes=nbytes)


# Memory


@pytest.mark.parametrize("to", FORMATS)
def test_rows_are_read_once_and_a_block_at_a_time(features, out, to, monkeypatch):
    monkeypatch.setattr(source, "BLOCK_NBYTES", 4 * RUN.stages[0].values * 4)
    blocks: dict[str, list[NDArray[Any]]] = {}
    get = StageView.get

    def watched(view: StageView, rows: Any, **options: Any) -> NDArray[Any]:
        block = get(view, rows, **options)
        blocks.setdefault(view.name, []).append(np.asarray(rows))
        assert block.nbytes <= source.BLOCK_NBYTES
        return block

    monkeypatch.setattr(StageView, "get", watched)
    export(features, to, out)
    assert [len(rows) for rows in blocks["stem"]] == [4, 4, 4, 4, 3]
    assert all(np.concatenate(rows).tolist() == DONE for rows in blocks.values())


def test_progress_counts_bytes_up_to_all_of_them(features, out, monkeypatch):
    monkeypatch.setattr(source, "BLOCK_ROWS", 5)
    heard: list[tuple[int, int]] = []
    export(features, "npy", out, progress=lambda done, total: heard.append((done, total)))
    assert len(heard) == 4 * len(RUN.stages)
    assert heard == sorted(heard)
    assert heard[-1] == (19 * RUN.row_nbytes, 19 * RUN.row_nbytes)


# Nothing wrong is handed on


@pytest.mark.parametrize("to", FORMATS)
def test_a_damaged_row_stops_the_export_by_name(features, out, to):
    damage(features, "tokens", 9)
    with pytest.raises(FileError, match=r"row 9, 'cats/009.png'.*tokens.*bbx verify"):
        export(features, to, out)
    assert nothing_left(out)


def test_damage_in_a_stage_that_is_not_asked_for_does_not_matter(features, out):
    damage(features, "tokens", 9)
    assert export(features, "npy", out, stages="stage1").rows == 19


def test_a_row_whose_key_was_changed_stops_the_export(features, out):
    with h5py.File(features, "r+") as file:
        file["path"][3] = "dogs/003.png"
    with pytest.raises(FileError, match=r"seals of 1 rows, such as 3"):
        export(features, "npy", out)
    assert nothing_left(out)


def test_a_file_without_a_finished_row_is_not_exported(tmp_path, out):
    FeatureWriter.open(tmp_path / "u.h5", RUN, KEYS).close()
    with pytest.raises(StartError, match="no finished row"):
        export(tmp_path / "u.h5", "npy", out)
    assert nothing_left(out)


# The output


@pytest.mark.parametrize(("to", "name"), [("npy", "features_npy"), ("safetensors", "features_safetensors")])
def test_the_export_lies_beside_its_file_by_default(features, to, name):
    assert export(features, to).output == features.parent / name
    assert sorted(path.name for path in features.parent.iterdir()) == ["features.h5", name]


def test_a_partial_file_named_as_such_gives_the_same_name(tmp_path):
    with FeatureWriter.open(tmp_path / "u.h5", RUN, KEYS) as writer:
        writer.write([0], row_maps([0]))
        writer.commit()
        assert export(tmp_path / "u.h5.partial", "npy").output == tmp_path / "u_npy"


@pytest.mark.parametrize("to", FORMATS)
def test_an_existing_output_is_refused_and_stays(features, out, to):
    out.mkdir()
    with pytest.raises(StartError, match=r"exists already.*--overwrite"):
        export(features, to, out)
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("to", FORMATS)
def test_overwrite_replaces_an_export(features, out, to):
    export(features, to, out, stages="stem", shard_nbytes=1)
    export(features, to, out, overwrite=True)
    assert same(features, DONE, READ[to](out))
    assert list(out.parent.iterdir()) == [out]


def an_empty_folder(out: Path, features: Path) -> None:
    out.mkdir()


def a_photograph(out: Path, features: Path) -> None:
    out.write_bytes(b"\x89PNG")


def a_note_in_the_export(out: Path, features: Path) -> None:
    export(features, "npy", out)
    (out / "notes.txt").write_text("mine")


def a_link_in_the_export(out: Path, features: Path) -> None:
    export(features, "npy", out)
    (out / "stem.npy").unlink()
    (out / "stem.npy").symlink_to(features)


def another_format(out: Path, features: Path) -> None:
    export(features, "safetensors", out)


def broken_facts(out: Path, features: Path) -> None:
    export(features, "npy", out)
    (out / "export.json").write_text("[" * 100_000)


def the_features_themselves(out: Path, features: Path) -> None:
    shutil.copy(features, out)


@pytest.mark.parametrize(
    "there",
    [
        an_empty_folder, a_photograph, a_note_in_the_export, a_link_in_the_export, another_format, broken_facts,
        the_features_themselves,
    ],
)  # fmt: skip
def test_overwrite_deletes_nothing_but_an_export(features, out, there):
    there(out, features)
    before = {path: path.lstat().st_ino for path in out.parent.rglob("*")}
    with pytest.raises(StartError, match="not overwritten"):
        export(features, "npy", out, overwrite=True)
    assert {path: path.lstat().st_ino for path in out.parent.rglob("*")} == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_during_the_export_is_not_replaced(features, out, overwrite):
    def make_folder(done: int, total: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "mine.txt").write_text("mine")

    with pytest.raises(StartError, match="overwrit"):
        export(features, "npy", out, overwrite=overwrite, progress=make_folder)
    assert [path.name for path in out.parent.rglob("*")] == ["made", "mine.txt"]


def test_a_link_is_followed_and_stays_a_link(features, out):
    link = out.parent / "link"
    link.symlink_to(out)
    assert export(features, "npy", link).output == out
    assert link.is_symlink()


@pytest.mark.parametrize("name", [".", "..", "made.npy"])
def test_an_output_that_cannot_name_a_folder_is_refused(features, out, monkeypatch, name):
    monkeypatch.chdir(out.parent)
    with pytest.raises(UsageError):
        export(features, "npy", name)


def test_a_missing_folder_is_named(features, out):
    with pytest.raises(StartError, match=r"nowhere does not exist.*mkdir -p"):
        export(features, "npy", out.parent / "nowhere" / "made")


# Whole or not at all


@pytest.mark.parametrize("to", FORMATS)
def test_a_full_disk_leaves_nothing(features, out, to):
    with files_limited(4096), pytest.raises(WriteError, match=r"made could not be written.*make room"):
        export(features, to, out)
    assert nothing_left(out)


@pytest.mark.parametrize("to", FORMATS)
def test_a_disk_that_fills_during_overwrite_leaves_the_old_export(features, out, to):
    export(features, to, out, stages="pooled")
    with files_limited(4096), pytest.raises(WriteError):
        export(features, to, out, overwrite=True)
    assert list(out.parent.iterdir()) == [out]
    assert READ[to](out)["pooled"].shape == (19, 7)


@pytest.mark.parametrize("to", FORMATS)
def test_too_little_room_is_seen_before_the_first_row(features, out, to, monkeypatch):
    usage = shutil.disk_usage(out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StartError, match="1000 bytes"):
        export(features, to, out, progress=lambda done, total: pytest.fail("a row was read"))
    assert nothing_left(out)


def test_a_sync_that_fails_leaves_nothing(features, out, monkeypatch):
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("bbx.store.disk.make_durable", fail)
    with pytest.raises(WriteError, match="Input/output error"):
        export(features, "npy", out)
    assert nothing_left(out)


@pytest.mark.parametrize("to", FORMATS)
def test_an_interrupted_export_leaves_nothing(features, out, to):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(features, to, out, progress=interrupt)
    assert nothing_left(out)


@pytest.mark.parametrize("to", FORMATS)
def test_a_killed_export_is_not_there_and_the_next_one_clears_up(features, out, to):
    code = f"import os; from bbx.export import export; export({str(features)!r}, {to!r}, {str(out)!r}, " + (
        "progress=lambda done, total: os.kill(os.getpid(), 9))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert not out.exists()
    assert not nothing_left(out)
    export(features, to, out)
    assert same(features, DONE, READ[to](out))
    assert list(out.parent.iterdir()) == [out]


def test_a_kill_between_the_two_renames_of_an_overwrite_loses_no_export(features, out):
    export(features, "npy", out)
    code = (
        "import os, pathlib; from bbx.export import export\n"
        "pathlib.Path.replace = lambda *names: os.kill(os.getpid(), 9)\n"
        f"export({str(features)!r}, 'npy', {str(out)!r}, stages='pooled', overwrite=True)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert not out.exists()
    with pytest.raises(StartError, match="exists already"):
        export(features, "npy", out, stages="pooled", progress=lambda done, total: pytest.fail("a row was read"))
    assert same(features, DONE, read_npy(out))


def test_a_folder_of_the_users_where_the_export_is_built_stays(features, out):
    theirs = out.parent / "made.tmp" / "new"
    theirs.mkdir(parents=True)
    with pytest.raises(StartError, match=r"made\.tmp exists"):
        export(features, "npy", out)
    assert theirs.is_dir()


def test_a_second_export_to_the_same_place_is_refused(features, out):
    def again(done: int, total: int) -> None:
        with pytest.raises(StartError, match=f"held by process {os.getpid()}"):
            export(features, "npy", out)

    export(features, "npy", out, progress=again)
    assert same(features, DONE, read_npy(out))


# What a format cannot hold


def test_parquet_refuses_maps_and_says_how_to_pool(features, out):
    with pytest.raises(UsageError, match=r"stem is \(4, 8, 8\).*--pool avg"):
        export(features, "parquet", out)
    assert nothing_left(out)


def test_safetensors_keeps_one_name_for_itself(tmp_path, out):
    path = make(tmp_path / "f.h5", replace(RUN, stages=(Stage("__metadata__", (3,), 0, "x"),)))
    with pytest.raises(UsageError, match="__metadata__"):
        export(path, "safetensors", out)


@pytest.mark.parametrize(
    ("to", "module", "extra"), [("zarr", "zarr", "bbx[zarr]"), ("parquet", "pyarrow", "bbx[parquet]")]
)
def test_a_missing_library_is_named_with_its_extra(features, out, monkeypatch, to, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"{module} is not installed \(pip install '") as raised:
        export(features, to, out, stages="pooled")
    assert extra in raised.value.hint
    assert nothing_left(out)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"to": "zar"}, "did you mean zarr"), ({"missing": "keep"}, "skip, nan"), ({"stages": "stage"}, "stage1")],
)
def test_a_wrong_word_gets_the_right_ones(features, out, options, said):
    with pytest.raises(UsageError, match=said):
        export(features, **{"to": "npy", "output": out, **options})
