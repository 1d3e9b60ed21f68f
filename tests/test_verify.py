"""Whatever byte of a feature file was changed, `bbx verify` finds it; what it recomputes is what the file holds."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

import bbx.store.check
from bbx import runner
from bbx.errors import FileError, StartError, UsageError, WeightsError
from bbx.images.source import digest_file
from bbx.pictures import locate
from bbx.spec import InputFile
from bbx.store import FeatureFile, FeatureWriter, format, metadata
from bbx.store.check import Finding, Health, check_file
from bbx.store.compress import pack
from bbx.verify import Verdict, verify
from tests.conftest import SAMPLES
from tests.test_store_toys import KEYS, RUN, row_maps

FAILED_ROW = 4


def fill(writer: FeatureWriter) -> None:
    """All rows, one of them failed, each with its input file."""
    rows = [row for row in range(20) if row != FAILED_ROW]
    inputs = [InputFile(100 + row, 10**18 + row, hashlib.blake2b(b"%d" % row, digest_size=16).digest()) for row in rows]
    writer.write(rows, row_maps(rows), inputs)
    writer.fail(FAILED_ROW, "truncated", InputFile(7, 8))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "f.h5"
    with FeatureWriter.open(path, RUN, KEYS, attempt={"command": "bbx extract"}) as writer:
        fill(writer)
    return path


@pytest.fixture
def out(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(original, tmp_path / "f.h5"))


def place(path: Path, name: str, row: int = 0) -> int:
    """Where a dataset's row begins in the file."""
    with h5py.File(path) as file:
        data = file[name]
        return int(data.id.get_offset() + row * data.id.get_storage_size() // len(data))


def flip(path: Path, at: int, bits: int = 1) -> None:
    """Change one byte of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ bits]))


def whats(health: Health) -> set[tuple[str, str | None, int | None]]:
    return {(found.what, found.stage, found.row) for found in health.damage}


# The file by itself


def test_an_untouched_file_is_sound(out: Path) -> None:
    seen: list[tuple[int, int]] = []
    verdict = verify(out, progress=lambda done, total: seen.append((done, total)))
    health = verdict.health
    assert verdict.exit_code == 0
    assert health.sound
    assert health.damage == ()
    assert (health.finished, health.sealed, health.notes, health.nonfinite) == (True, True, (), {})
    assert health.counts == (19, 1, 0)
    assert (health.checked, health.nbytes) == (20, 20 * RUN.row_nbytes)
    assert seen[-1] == (health.nbytes, health.nbytes)


@pytest.mark.parametrize(
    ("name", "row", "bits", "expected"),
    [
        ("stem", 3, 1, {("features", "stem", 3)}),
        ("pooled", 19, 128, {("features", "pooled", 19)}),
        ("stage1", FAILED_ROW, 1, {("features", "stage1", FAILED_ROW)}),
        ("checksum/tokens", 3, 1, {("checksum", "tokens", 3), ("seal", None, 3)}),
        ("provenance/seal", 3, 1, {("seal", None, 3)}),
        ("provenance/input_nbytes", 3, 1, {("seal", None, 3)}),
        ("provenance/input_mtime", 3, 1, {("seal", None, 3)}),
        ("provenance/input_digest", 3, 1, {("seal", None, 3)}),
        ("status", 3, 1, {("mark", None, 3)}),  # done, now pending
        ("provenance/failure", FAILED_ROW, 1, {("seal", None, FAILED_ROW)}),
        ("provenance/failure", 3, 65, {("seal", None, 3), ("reason", None, 3)}),
        ("image", 3, 1, {("metadata", None, None)}),
        ("stem_y", 3, 1, {("metadata", None, None)}),
        ("tokens_feature", 0, 1, {("metadata", None, None)}),
    ],
)
def test_a_changed_byte_is_found_and_placed(
    out: Path, name: str, row: int, bits: int, expected: set[tuple[str, str | None, int | None]]
) -> None:
    flip(out, place(out, name, row), bits)
    verdict = verify(out)
    assert whats(verdict.health) == expected
    assert verdict.exit_code == 4
    assert verdict.health.damaged_rows == len({row for _, _, row in expected if row is not None})
    assert all(found.key == (None if found.row is None else KEYS[found.row]) for found in verdict.health.damage)


def test_a_done_row_that_is_marked_failed_is_found(out: Path) -> None:
    flip(out, place(out, "status", 3), 1 ^ 2)
    found = whats(check_file(out))
    assert ("seal", None, 3) in found
    assert ("reason", None, 3) in found  # it has none
    assert {("mark", stage.name, 3) for stage in RUN.stages} <= found  # it holds features


def test_a_failed_row_that_is_marked_done_is_found(out: Path) -> None:
    flip(out, place(out, "status", FAILED_ROW), 1 ^ 2)
    assert whats(check_file(out)) == {("seal", None, FAILED_ROW), ("reason", None, FAILED_ROW)}


def test_a_changed_key_is_found(out: Path) -> None:
    data = out.read_bytes()
    out.write_bytes(data.replace(KEYS[3].encode(), b"dogs/003.png"))
    (found,) = check_file(out).damage
    assert (found.what, found.row, found.key) == ("seal", 3, "dogs/003.png")


def test_a_key_that_stands_twice_is_found(out: Path) -> None:
    out.write_bytes(out.read_bytes().replace(KEYS[3].encode(), KEYS[2].encode()))
    found = check_file(out).damage
    assert ("key", 3, f"row 3, {KEYS[2]}: the key stands at row 2 already") in [
        (one.what, one.row, one.text) for one in found
    ]


def test_a_key_that_is_no_text_is_found_and_not_raised(out: Path) -> None:
    out.write_bytes(out.read_bytes().replace(KEYS[3].encode(), b"cats/\xff03.png"))
    health = check_file(out)
    assert whats(health) == {("seal", None, 3), ("key", None, 3)}
    assert health.damage[0].key == r"cats/\xff03.png"


def test_swapped_rows_are_found_for_a_seal_holds_one_key(out: Path) -> None:
    with h5py.File(out, "r+") as file:
        for stage in RUN.stages:
            for name in (stage.name, f"checksum/{stage.name}"):
                file[name][3], file[name][5] = file[name][5], file[name][3]
    assert whats(check_file(out)) == {("seal", None, 3), ("seal", None, 5)}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"stem features", b"stem_features"),
        (b"conv1\0", b"conv2\0"),
        (b"spectrum", b"spectrus"),
        (b"NXentry", b"NXentrx"),
        (b"pending done failed", b"pending gone failed"),
        (b"/stem_channel", b"/stem_channeI"),
        (b"row index over", b"row_index over"),
        (b"DIMENSION_SCALE", b"DIMENSION_SKALE"),
        (b"interpretation", b"interpretatiom"),
        (b"pixel", b"pikel"),
    ],
)
def test_a_changed_attribute_name_or_link_is_damage(out: Path, old: bytes, new: bytes) -> None:
    data = out.read_bytes()
    assert old in data
    out.write_bytes(data.replace(old, new, 1))
    health = check_file(out)
    assert {found.what for found in health.damage} == {"metadata"}
    assert verify(out).exit_code == 4


def test_a_changed_run_description_is_a_file_error(out: Path) -> None:
    data = out.read_bytes()
    assert data.count(b'"toy:net"') == 1
    out.write_bytes(data.replace(b'"toy:net"', b'"toy:nit"'))
    with pytest.raises(FileError, match="does not match its own digest"):
        verify(out)


def test_a_changed_start_is_found(out: Path) -> None:
    data = out.read_bytes()
    out.write_bytes(data.replace(b'"bbx extract"', b'"bbx_extract"'))
    (found,) = check_file(out).damage
    assert (found.what, found.row) == ("start", None)
    assert "start 1" in found.text


def test_a_byte_between_the_starts_is_found(out: Path) -> None:
    flip(out, place(out, format.ATTEMPTS, 5) + 99)
    assert whats(check_file(out)) == {("start", None, None)}


def test_an_added_object_or_attribute_is_a_note_and_no_damage(out: Path) -> None:
    with h5py.File(out, "r+") as file:
        file["labels"] = np.arange(20)
        file["labels"].dims[0].attach_scale(file["image"])
        file.create_group("plot/mine")
        file["stem"].attrs["comment"] = "the first one"
    health = check_file(out)
    assert health.sound
    assert health.notes == (
        "/labels is not bbx's",
        "/plot/mine is not bbx's",
        "/stem has an attribute 'comment' of its own",
    )


@pytest.mark.parametrize("name", ["plot/stem", "plot", "stem_y", "image"])
def test_a_missing_object_is_damage(out: Path, name: str) -> None:
    with h5py.File(out, "r+") as file:
        del file[name]
    found = check_file(out).damage
    assert {one.what for one in found} == {"metadata"}
    assert f"/{name} is missing, not a {'group' if 'plot' in name else 'dataset'}" in [one.text for one in found]


def test_a_scale_that_was_detached_is_damage(out: Path) -> None:
    with h5py.File(out, "r+") as file:
        file["stem"].dims[2].detach_scale(file["stem_y"])
    assert {found.what for found in check_file(out).damage} == {"metadata"}


def test_an_attribute_that_crashes_hdf5_is_damage_and_no_crash(out: Path) -> None:
    """A list of references said to be longer than it is: HDF5 2.0 reads past its end."""
    with h5py.File(out) as file:
        address = h5py.h5o.get_info(file["stem"].id).addr
    data = out.read_bytes()
    at = data.index(b"\1\0\0\0\0\x08", data.index(b"DIMENSION_LIST\0", address))  # one reference, at 0x800 in the heap
    flip(out, at, 0x7E)
    health = check_file(out)
    assert {found.what for found in health.damage} == {"metadata"}


@pytest.mark.parametrize(
    ("signum", "kind", "words"),
    [
        ("SIGKILL", StartError, r"was killed \(SIGKILL\)"),
        ("SIGXCPU", FileError, "opening it does not end within 120 s of computing"),
        ("SIGSEGV", FileError, r"opening it crashes HDF5 \(SIGSEGV\)"),
    ],
)
def test_a_comparison_that_the_system_ends_is_not_the_files_fault(
    out: Path, monkeypatch: pytest.MonkeyPatch, signum: str, kind: type[Exception], words: str
) -> None:
    code = f"""import os, signal; print('"the file"', flush=True); os.kill(os.getpid(), signal.{signum})"""
    monkeypatch.setattr(metadata, "_COMMAND", code)
    with pytest.raises(kind, match=words):
        check_file(out)


def test_nan_and_infinity_from_the_network_are_told_and_no_damage(tmp_path: Path) -> None:
    maps = row_maps(range(20))
    maps["stem"][3, 0, 0, :2] = np.nan
    maps["stem"][7, 1, 1, 1] = -np.inf
    with FeatureWriter.open(tmp_path / "f.h5", RUN, KEYS) as writer:
        writer.write(range(20), maps)
    verdict = verify(tmp_path / "f.h5")
    assert verdict.exit_code == 0
    assert list(verdict.health.nonfinite) == ["stem"]
    odd = verdict.health.nonfinite["stem"]
    assert (odd.nan, odd.infinite, odd.rows, odd.keys) == (2, 1, 2, (KEYS[3], KEYS[7]))


def test_an_unfinished_file_is_sound_as_far_as_it_goes(tmp_path: Path) -> None:
    with FeatureWriter.open(tmp_path / "f.h5", RUN, KEYS) as writer:
        writer.write([2, 3, 9], row_maps([2, 3, 9]))
        writer.fail(FAILED_ROW, "truncated")
    for path in (tmp_path / "f.h5", tmp_path / "f.h5.partial"):
        health = check_file(path)
        assert health.sound
        assert not health.finished
        assert (health.checked, health.counts) == (4, (3, 1, 16))
    flip(tmp_path / "f.h5.partial", place(tmp_path / "f.h5.partial", "stem", 9))
    assert whats(check_file(tmp_path / "f.h5")) == {("features", "stem", 9)}


def test_a_pending_row_of_an_unfinished_file_may_hold_anything(tmp_path: Path) -> None:
    with FeatureWriter.open(tmp_path / "f.h5", RUN, KEYS) as writer:
        writer.write([2], row_maps([2]))
    flip(tmp_path / "f.h5.partial", place(tmp_path / "f.h5.partial", "stem", 9))
    assert check_file(tmp_path / "f.h5").sound


def test_a_file_of_format_1_0_is_checked_as_far_as_it_goes(out: Path) -> None:
    with h5py.File(out, "r+") as file:
        file.attrs["bbx_format_version"] = "1.0"
        for name in (format.INPUT_NBYTES, format.INPUT_MTIME, format.INPUT_DIGEST, format.SEAL):
            del file[name]
    health = check_file(out)
    assert health.sound
    assert not health.sealed
    assert "format 1.0" in health.notes[0]
    flip(out, place(out, "stem", 3))
    assert whats(check_file(out)) == {("features", "stem", 3)}


def test_a_compressed_stage_that_cannot_be_decoded_is_damage_of_its_rows(out: Path) -> None:
    packed = out.with_name("packed.h5")
    pack(out, packed)
    assert check_file(packed).sound
    with h5py.File(packed) as file:
        chunk = file["stem"].id.get_chunk_info_by_coord((3, 0, 0, 0))
    for at in range(chunk.size):
        flip(packed, chunk.byte_offset + at, 0xFF)
    health = check_file(packed)
    assert whats(health) == {("features", "stem", 3)}


def test_findings_are_kept_up_to_a_bound_and_all_counted(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bbx.store.check, "DAMAGE_KEPT", 5)
    start, end = place(out, "stem"), place(out, "stem", 19)
    data = bytearray(out.read_bytes())
    data[start:end] = bytes(end - start)
    out.write_bytes(data)
    health = check_file(out)
    assert len(health.damage) == 5
    assert health.damage_total == health.damaged_rows == 19


def test_a_block_holds_few_rows_of_a_large_stage(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bbx.store.check, "_BLOCK_NBYTES", 1)
    flip(out, place(out, "stem", 3))
    assert whats(check_file(out)) == {("features", "stem", 3)}


def test_what_is_no_feature_file_is_a_file_error(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("not HDF5")
    for path, message in ((tmp_path / "text.h5", "no feature file"), (tmp_path / "none.h5", "does not exist")):
        with pytest.raises(FileError, match=message):
            verify(path)


def test_checking_alone_loads_no_torch(out: Path) -> None:
    code = "import sys; from bbx.verify import verify; verify(sys.argv[1]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(out)], check=True)


# Rows once more


@pytest.fixture
def extracted(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    runner.extract("pictures", model="toy:toy", weights="random", stages="all", output="features.h5")
    return tmp_path / "features.h5"


def outcomes(verdict: Verdict) -> dict[str, str]:
    return {row.key: row.outcome for row in verdict.recomputed}


def test_recomputed_rows_are_equal(extracted: Path) -> None:
    verdict = verify(extracted, recompute=5)
    assert verdict.exit_code == 0
    assert len(verdict.recomputed) == 5
    for row in verdict.recomputed:
        assert (row.outcome, row.why) == ("equal", ())
        assert set(row.errors) == {"stem", "stage1", "stage2"}
        assert max(row.errors.values()) < 1e-6
    assert verdict.changes == ()


def test_the_rows_are_chosen_by_seed(extracted: Path) -> None:
    chosen = [list(outcomes(verify(extracted, recompute=3, seed=seed))) for seed in (0, 0, 1, 2)]
    assert chosen[0] == chosen[1]
    assert len({tuple(keys) for keys in chosen}) > 1
    assert len(verify(extracted, recompute=100).recomputed) == 7


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"pool": "avg"}, {"pool": "max", "dtype": "float16"}])
def test_recomputed_rows_are_equal_whatever_is_stored(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runner.extract("pictures", model="toy:toy", weights="random", stages="all", output="f.h5", **options)  # type: ignore[arg-type]  # words
    verdict = verify("f.h5", recompute=7)
    assert set(outcomes(verdict).values()) == {"equal"}
    assert verdict.tolerance == (2**-10 if "dtype" in options else 1e-5)


def test_the_packaged_model_is_recomputed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SAMPLES, "samples")
    runner.extract("samples", model="efficientnet-lite0", stages="stem,-1", output="f.h5")
    verdict = verify("f.h5", recompute=2)
    assert set(outcomes(verdict).values()) == {"equal"}
    assert verdict.exit_code == 0


def test_features_of_another_image_are_found_though_all_checksums_hold(extracted: Path) -> None:
    with FeatureFile(extracted) as file:
        maps = {name: file[name][:] for name in file.stages}
        run, keys, attempt, inputs = file.run, file.keys, file.attempts[0], file.inputs()
    for array in maps.values():
        array[[2, 3]] = array[[3, 2]]
    extracted.unlink()
    with FeatureWriter.open(extracted, run, keys, attempt=attempt) as writer:
        writer.write(range(7), maps, inputs)
    verdict = verify(extracted, recompute=7)
    assert verdict.health.sound
    assert verdict.exit_code == 4
    assert [row.key for row in verdict.differing] == ["002.png", "003.png"]
    assert all(row.outcome == "differs" and max(row.errors.values()) > 0.01 for row in verdict.differing)
    assert all(row.why == () for row in verdict.differing)  # the pictures are the same: nothing explains it


def test_a_changed_picture_explains_its_row(extracted: Path, pictures: Path, picture: Callable[..., Path]) -> None:
    picture(pictures / "002.png", seed=99)
    verdict = verify(extracted, recompute=7)
    (row,) = verdict.differing
    assert (row.key, row.outcome) == ("002.png", "differs")
    assert "content changed" in row.why[0]
    assert verdict.exit_code == 4


def test_a_picture_that_was_only_touched_is_equal(extracted: Path, pictures: Path) -> None:
    os.utime(pictures / "002.png", (1, 1))
    verdict = verify(extracted, recompute=7)
    assert verdict.exit_code == 0
    assert all(row.why == () for row in verdict.recomputed)


def test_a_missing_picture_is_not_confirmed(extracted: Path, pictures: Path) -> None:
    (pictures / "002.png").unlink()
    verdict = verify(extracted, recompute=7)
    (row,) = verdict.differing
    assert (row.key, row.outcome, row.errors) == ("002.png", "missing", {})
    assert verdict.exit_code == 4


def test_a_picture_that_cannot_be_read_any_more_says_why(extracted: Path, pictures: Path) -> None:
    (pictures / "002.png").write_bytes(b"not a picture")
    (row,) = verify(extracted, recompute=7).differing
    assert row.outcome == "unreadable"
    assert len(row.why) == 2
    assert "content changed" in row.why[1]


def test_a_damaged_row_is_named_as_the_reason(extracted: Path) -> None:
    flip(extracted, place(extracted, "stage2", 2) + 3, 0x40)
    verdict = verify(extracted, recompute=7)
    (row,) = verdict.differing
    assert row.key == "002.png"
    assert row.why == ("its stored stage2 is damaged",)
    assert whats(verdict.health) == {("features", "stage2", 2)}


def test_other_versions_and_another_device_are_told(extracted: Path) -> None:
    with FeatureFile(extracted) as file:
        maps = {name: file[name][:] for name in file.stages}
        run, keys, attempt = file.run, file.keys, file.attempts[0]
    extracted.unlink()
    attempt |= {"device": "cuda:0 (NVIDIA H100)", "versions": {**attempt["versions"], "torch": "1.0", "evil": "1"}}
    with FeatureWriter.open(extracted, run, keys, attempt=attempt) as writer:
        writer.write(range(7), maps)
    verdict = verify(extracted, recompute=1, device="cpu")
    assert verdict.exit_code == 0
    torch_now, device_now = verdict.changes
    assert torch_now.startswith("torch was 1.0 and is ")
    assert device_now == "the features were computed on cuda:0, and now on cpu"


def test_other_weights_are_refused_before_anything_is_checked(extracted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FeatureFile(extracted) as file:
        maps = {name: file[name][:] for name in file.stages}
        run, keys, attempt = file.run, file.keys, file.attempts[0]
    extracted.unlink()
    with FeatureWriter.open(extracted, replace(run, weights_digest="sha256:0"), keys, attempt=attempt) as writer:
        writer.write(range(7), maps)
    monkeypatch.setattr("bbx.verify.check_file", lambda *_, **__: pytest.fail("checked"))
    with pytest.raises(WeightsError, match=re.escape("sha256:0")):
        verify(extracted, recompute=1)


def test_pictures_elsewhere_need_a_root(extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "away").mkdir()
    moved = tmp_path / "away" / "features.h5"
    extracted.rename(moved)
    monkeypatch.chdir(tmp_path / "away")
    with pytest.raises(StartError, match="cannot be found") as raised:
        verify("features.h5", recompute=2)
    assert "--root" in raised.value.hint
    assert verify("features.h5", recompute=2, root=tmp_path / "pictures").exit_code == 0


@pytest.mark.parametrize(
    "key", ["../secret.png", "/etc/passwd", "a/../../secret.png", "sub/../../secret.png", "x\\..\\y"]
)
def test_a_key_never_leads_out_of_its_root(tmp_path: Path, picture: Callable[..., Path], key: str) -> None:
    picture(tmp_path / "secret.png")
    (tmp_path / "root" / "sub").mkdir(parents=True)
    with FeatureWriter.open(tmp_path / "f.h5", RUN, [key]) as writer:
        writer.write([0], row_maps([0]))
    with FeatureFile(tmp_path / "f.h5") as file:
        assert locate(file, tmp_path / "root")(0) is None


def test_a_link_below_the_root_does_not_lead_out_of_it(tmp_path: Path, picture: Callable[..., Path]) -> None:
    picture(tmp_path / "secret.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "root" / "b.png").symlink_to("b.png")
    with FeatureWriter.open(tmp_path / "f.h5", RUN, ["a.png", "b.png"]) as writer:
        writer.write([0, 1], row_maps([0, 1]))
    with FeatureFile(tmp_path / "f.h5") as file:
        assert [locate(file, tmp_path / "root")(row) for row in (0, 1)] == [None, None]


def test_a_recorded_root_elsewhere_is_not_followed(tmp_path: Path, picture: Callable[..., Path]) -> None:
    picture(tmp_path / "away" / "a.png")
    (tmp_path / "here").mkdir()
    roots = [str(tmp_path / "away"), "/etc", "x\0y", 7]
    with FeatureWriter.open(tmp_path / "here" / "f.h5", RUN, ["a.png"], attempt={"roots": roots}) as writer:
        writer.write([0], row_maps([0]))
    with FeatureFile(tmp_path / "here" / "f.h5") as file:
        assert locate(file)(0) is None
        assert locate(file, tmp_path / "away")(0) == tmp_path / "away" / "a.png"


def test_the_digest_is_that_of_the_extraction(extracted: Path, pictures: Path) -> None:
    with FeatureFile(extracted) as file:
        assert file.inputs([2])[0] == digest_file(pictures / "002.png")


@pytest.mark.parametrize("options", [{"recompute": -1}, {"tolerance": -1.0}])
def test_negative_numbers_are_refused(out: Path, options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"--(recompute|tolerance) cannot be -1"):
        verify(out, **options)  # type: ignore[arg-type]  # int and float


def test_a_finding_of_the_file_itself_has_no_row() -> None:
    assert (Finding("metadata", "x").row, Finding("metadata", "x").key) == (None, None)


@pytest.mark.slow
def test_any_changed_bit_of_the_metadata_gives_an_answer(out: Path) -> None:
    """No crash, no hang, and what is called sound reads as it was written."""
    chance = np.random.default_rng(0)
    data = out.read_bytes()
    with h5py.File(out) as file:
        rows = [file[column.name] for column in format.columns(RUN)]
        spans = [(one.id.get_offset(), one.id.get_offset() + one.id.get_storage_size()) for one in rows]
    places = [at for at, byte in enumerate(data) if byte and not any(start <= at < end for start, end in spans)]
    damaged = 0
    for _ in range(60):
        out.write_bytes(data)
        flip(out, int(chance.choice(places)), 1 << int(chance.integers(8)))
        try:
            damaged += not check_file(out).sound
        except FileError:
            damaged += 1
    assert damaged >= 40
