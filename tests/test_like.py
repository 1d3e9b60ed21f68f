"""More of the same run: like a file, without what a file holds, and its failed rows again."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import bbx
from bbx.errors import StartError, UsageError, WeightsError
from bbx.rebuild import rebuild
from bbx.runner import extract
from bbx.spec import RunSpec
from tests.test_store_toys import RUN


@pytest.fixture
def done(bbx_cli, pictures, tmp_path) -> Path:
    """`features.h5` of the toy model, in the current folder, with options of every kind."""
    model = ("--model", "toy", "--weights", "random", "--seed", 3, "--stages", "stem,stage1", "--size", 48)
    ran = bbx_cli("extract", *model, "--dtype", "float16", "--exif", "ignore", "pictures")
    assert ran.code == 0, ran.err
    return tmp_path / "features.h5"


def test_like_a_file_is_the_same_run(bbx_cli, done) -> None:
    assert bbx_cli("extract", "--like", "features.h5", "-o", "again.h5", "pictures").code == 0
    with bbx.open(done) as one, bbx.open("again.h5") as other:
        assert one.run == other.run
        assert one.run.source == other.run.source
        assert one.run.dtype == "float16"
        np.testing.assert_array_equal(one["stem"][:], other["stem"][:])
    assert bbx_cli("diff", "features.h5", "again.h5").code == 0


def test_like_a_file_with_another_stage_adds_that_stage(bbx_cli, done) -> None:
    ran = bbx_cli("extract", "--like", "features.h5", "--stages", "stage2", "-o", "more.h5")  # its own images
    assert ran.code == 0, ran.err
    with bbx.open(done) as one, bbx.open("more.h5") as other:
        assert list(other.stages) == ["stage2"]
        assert other.keys == one.keys
        assert [field for field, _, _ in one.run.differences(other.run)] == ["stages"]
    assert bbx_cli("merge", "features.h5", "more.h5", "-o", "all.h5").code == 0
    assert list(bbx.open("all.h5").stages) == ["stem", "stage1", "stage2"]
    assert bbx_cli("verify", "all.h5", "--recompute", 3).code == 0


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (["--pool", "avg"], {"pool", "stages"}),
        (["--dtype", "float32"], {"dtype"}),
        (["--size", "32"], {"preprocess.size", "preprocess.resize", "stages"}),
        (["--seed", "4"], {"weights_digest"}),
        (["--layers", "one"], {"stages"}),
    ],
)
def test_what_else_is_given_is_the_only_difference(bbx_cli, done, words, fields) -> None:
    assert bbx_cli("extract", "--like", "features.h5", *words, "-o", "other.h5", "pictures").code == 0
    with bbx.open(done) as one, bbx.open("other.h5") as other:
        assert {field for field, _, _ in one.run.differences(other.run)} == fields


def test_layers_are_recorded_and_asked_for_again(bbx_cli, pictures) -> None:
    bbx_cli("extract", "--model", "toy", "--stages", "stem", "--layers", "one,two", pictures)
    assert bbx_cli("extract", "--like", "features.h5", "-o", "again.h5", pictures).code == 0
    with bbx.open("features.h5") as one, bbx.open("again.h5") as other:
        assert one.run == other.run
        assert len(one.stages) == 3


def test_a_configuration_is_recorded_and_built_again(bbx_cli, pictures, tmp_path) -> None:
    (tmp_path / "my.yaml").write_text(
        "backbone: {model: resnet18, weights: random}\nneck: {type: fpn, out_channels: 8}\n"
    )
    words = ("--config", "my.yaml", "--stages", "backbone.stage1,neck.p2", "--pool", "avg")
    assert bbx_cli("extract", *words, pictures).code == 0
    (tmp_path / "my.yaml").unlink()
    assert bbx_cli("extract", "--like", "features.h5", "-o", "again.h5", pictures).code == 0
    assert bbx_cli("diff", "features.h5", "again.h5").code == 0


def test_other_weights_than_the_files_are_refused_with_both_digests(bbx_cli, pictures, tmp_path) -> None:
    from safetensors.torch import save_file

    from tests.toy import Toy

    save_file(Toy().state_dict(), tmp_path / "w.safetensors")
    assert bbx_cli("extract", "--model", "toy", "--weights", "./w.safetensors", pictures).code == 0
    assert bbx_cli("extract", "--like", "features.h5", "-o", "again.h5", pictures).code == 0
    save_file(Toy().state_dict(), tmp_path / "w.safetensors")
    ran = bbx_cli("extract", "--like", "features.h5", "-o", "third.h5", pictures)
    assert ran.code == 3
    assert "the weights are not those of the file" in ran.err
    assert len(re.findall(r"[0-9a-f]{64}", ran.err)) == 2
    assert (
        bbx_cli("extract", "--like", "features.h5", "--weights", "./w.safetensors", "-o", "third.h5", pictures).code
        == 0
    )


def test_a_path_from_a_file_is_not_followed_elsewhere(bbx_cli, pictures, tmp_path, monkeypatch) -> None:
    from safetensors.torch import save_file

    from tests.toy import Toy

    far, here = tmp_path / "far", tmp_path / "here"
    far.mkdir()
    here.mkdir()
    save_file(Toy().state_dict(), far / "w.safetensors")
    assert (
        bbx_cli("extract", "--model", "toy", "--weights", far / "w.safetensors", "-o", here / "f.h5", pictures).code
        == 0
    )
    monkeypatch.chdir(here)
    ran = bbx_cli("extract", "--like", "f.h5", "-o", "g.h5", pictures)
    assert (ran.code, f"--weights {far / 'w.safetensors'}" in ran.err) == (3, True)
    ran = bbx_cli("extract", "--like", "f.h5", "--weights", far / "w.safetensors", "-o", "g.h5")
    assert (ran.code, str(pictures) in ran.err) == (3, True)


def test_a_file_that_does_not_say_how_it_was_asked_for_is_built_by_its_labels(bbx_cli, done) -> None:
    with bbx.open(done) as file:
        data = {**json.loads(file.run.to_json())}
        run = file.run
    del data["source"]
    older = RunSpec.from_json(json.dumps(data))
    assert older == run
    backbone = rebuild(older)
    assert backbone.weights_digest == run.weights_digest
    assert [stage.name for stage in backbone.stages] == ["stem", "stage1"]


def test_a_rebuilt_backbone_gives_the_stages_asked_for(done) -> None:
    with bbx.open(done) as file:
        backbone = rebuild(file.run, stages=["stage1"], near=done)
        assert [stage.name for stage in backbone.stages] == ["stage1"]
        assert backbone.preprocess == file.run.preprocess
        other = {**json.loads(file.run.to_json()), "weights_digest": "0" * 64}
        with pytest.raises(WeightsError, match="not those of the file"):
            rebuild(RunSpec.from_json(json.dumps(other)), near=done)


def test_no_images_and_no_file_to_take_them_from_is_a_usage_error(bbx_cli) -> None:
    ran = bbx_cli("extract", "--model", "toy")
    assert ran.code == 2
    assert "which images?" in ran.err


def test_only_images_that_a_file_does_not_hold(bbx_cli, done, picture, tmp_path) -> None:
    picture(tmp_path / "pictures" / "new.png", 50)
    picture(tmp_path / "pictures" / "003.png", 51)
    os.utime(tmp_path / "pictures" / "004.png", ns=(1, 1))  # touched, the same content
    ran = bbx_cli("extract", "--like", "features.h5", "--skip-in", "features.h5", "-o", "new.h5", "pictures")
    assert ran.code == 0
    assert "6 of 8 images are in features.h5" in ran.err
    assert "1 changed since and are extracted again: '003.png'" in ran.err
    with bbx.open("new.h5") as file:
        assert file.keys == ["003.png", "new.png"]
    whole = bbx_cli("merge", "features.h5", "new.h5", "-o", "all.h5", "--overlap", "last")
    assert whole.code == 0, whole.err
    with bbx.open("all.h5") as file, bbx.open("new.h5") as new:
        assert len(file) == 8
        np.testing.assert_array_equal(file["stem", "003.png"], new["stem", "003.png"])
    again = bbx_cli("extract", "--like", "all.h5", "--skip-in", "all.h5", "-o", "none.h5", "pictures")
    assert again.code == 3
    assert "there is nothing to extract: 8 of 8 images are in all.h5" in again.err


def test_failed_rows_are_not_held_and_size_alone_tells_without_digests(bbx_cli, pictures, picture) -> None:
    (pictures / "002.png").write_bytes(b"bad")
    bbx_cli("extract", "--model", "toy", "--no-digest", pictures)
    picture(pictures / "002.png", 2)
    os.utime(pictures / "001.png", ns=(1, 1))  # nothing vouches for the content
    ran = bbx_cli("extract", "--model", "toy", "--skip-in", "features.h5", "-o", "new.h5", pictures)
    assert bbx.open("new.h5").keys == ["001.png", "002.png"]
    assert "1 changed since" in ran.err


def test_rows_keep_their_own_pictures_when_others_are_skipped(pictures, picture, tmp_path) -> None:
    for number in range(5):
        picture(tmp_path / "more" / f"{number:03}.png", 100 + number)
    both = [pictures, tmp_path / "more"]
    extract([pictures / "001.png", pictures / "004.png"], model="toy", output=tmp_path / "some.h5")
    extract(both, model="toy", stages="all", output=tmp_path / "whole.h5")
    held = tmp_path / "held.h5"
    extract(both, model="toy", output=held)
    for gone in (pictures / "000.png", tmp_path / "more" / "003.png"):
        picture(gone, 7 if gone.parent == pictures else 8, size=(60, 50))
    summary = extract(both, model="toy", stages="all", skip_in=held, output=tmp_path / "new.h5")
    extract(both, model="toy", stages="all", output=tmp_path / "now.h5")
    assert summary.rows == 2
    with bbx.open(tmp_path / "new.h5") as new, bbx.open(tmp_path / "now.h5") as now:
        assert new.keys == ["more/003.png", "pictures/000.png"] or new.keys == ["pictures/000.png", "more/003.png"]
        for key in new.keys:
            np.testing.assert_allclose(new["stage2", key], now["stage2", key], rtol=1e-6, atol=1e-7)


def test_failed_rows_are_tried_again_by_one_word(bbx_cli, pictures, picture) -> None:
    (pictures / "002.png").write_bytes(b"bad")
    (pictures / "005.png").write_bytes(b"bad too")
    assert bbx_cli("extract", "--model", "toy", pictures).code == 4
    picture(pictures / "002.png", 2)
    ran = bbx_cli("extract", "--model", "toy", "--retry-failed", pictures)
    assert ran.code == 4
    assert "7: 6 done, 1 failed" in ran.err
    picture(pictures / "005.png", 5)
    assert bbx_cli("extract", "--model", "toy", "--retry-failed", pictures).code == 0
    assert bbx_cli("extract", "--model", "toy", "--retry-failed", pictures).code == 0  # nothing left to retry
    extract(pictures, model="toy", output="whole.h5")
    assert bbx_cli("diff", "features.h5", "whole.h5").code == 0
    assert bbx_cli("verify", "features.h5", "--recompute", 7, "--root", pictures).code == 0


def test_a_dry_run_of_a_retry_says_what_is_to_do(bbx_cli, pictures) -> None:
    (pictures / "002.png").write_bytes(b"bad")
    bbx_cli("extract", "--model", "toy", pictures)
    ran = bbx_cli("extract", "--model", "toy", "--retry-failed", "--dry-run", pictures)
    assert "6 done, 0 failed, 1 to do" in ran.err
    assert Path("features.h5").exists()


def test_a_compressed_run_is_resumed_finished_and_read_as_any(bbx_cli, pictures, tmp_path) -> None:
    from bbx.errors import InterruptedRunError

    options = {"model": "toy", "stages": "all", "batch_size": 2, "compress": "gzip"}
    with pytest.raises(InterruptedRunError):
        extract(pictures, output=tmp_path / "f.h5", stop=lambda: 15, **options)
    extract(pictures, output=tmp_path / "f.h5", **options)
    extract(pictures, output=tmp_path / "plain.h5", **{**options, "compress": "none"})
    with bbx.open(tmp_path / "f.h5") as packed, bbx.open(tmp_path / "plain.h5") as plain:
        assert packed.packed
        assert not plain.packed
        assert packed.run == plain.run
        for stage in plain.stages:
            np.testing.assert_array_equal(packed[stage][:], plain[stage][:])
    assert bbx_cli("verify", "f.h5").code == 0
    assert bbx_cli("extract", "--model", "toy", "--stages", "all", "-o", "f.h5", pictures).code == 0  # complete
    ran = bbx_cli("extract", "--model", "toy", "--stages", "all", "--compress", "gzip", "-o", "plain.h5", pictures)
    assert "bbx merge" in ran.err


def test_a_compressed_files_failed_rows_are_merged_in(bbx_cli, pictures, picture) -> None:
    (pictures / "002.png").write_bytes(b"bad")
    bbx_cli("extract", "--model", "toy", "--compress", "gzip", pictures)
    ran = bbx_cli("extract", "--model", "toy", "--retry-failed", pictures)
    assert ran.code == 3
    assert "--skip-in" in ran.err
    picture(pictures / "002.png", 2)
    assert bbx_cli("extract", "--model", "toy", "--skip-in", "features.h5", "-o", "more.h5", pictures).code == 0
    ran = bbx_cli("merge", "features.h5", "more.h5", "-o", "all.h5", "--compress", "gzip")
    assert ran.code == 0, ran.err
    assert bbx.open("all.h5").counts == (7, 0, 0)


def test_the_start_says_with_what_and_when_it_ended(bbx_cli, done) -> None:
    start = json.loads(bbx_cli("info", "--json", "features.h5").out)["attempts"][0]
    assert {
        "time",
        "end",
        "host",
        "device",
        "versions",
        "command",
        "cwd",
        "revision",
        "roots",
        "weights",
    } <= start.keys()
    assert start["command"].startswith("bbx extract --model toy")
    assert start["done"] == 7
    assert torch.__version__.startswith(start["versions"]["torch"])


def test_the_revision_is_that_of_bbx_and_of_no_repository_around_it(monkeypatch, tmp_path) -> None:
    import subprocess

    from bbx import provenance

    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    lonely = tmp_path / "site" / "bbx"
    shutil.copytree(Path(provenance.__file__).parent, lonely)
    monkeypatch.setattr(provenance, "__file__", str(lonely / "provenance.py"))
    monkeypatch.setattr("importlib.metadata.Distribution.read_text", lambda *_: None)
    assert provenance.revision() is None


def test_a_number_that_makes_no_sense_is_refused(pictures, tmp_path) -> None:
    for option in ("batch_size", "workers", "image_timeout", "max_pixels"):
        with pytest.raises(UsageError, match=option.replace("_", "-")):
            extract(pictures, model="toy", output=tmp_path / "f.h5", **{option: 0})


def test_an_unfinished_overwrite_is_not_taken_for_a_retry(pictures, tmp_path) -> None:
    (pictures / "002.png").write_bytes(b"bad")
    extract(pictures, model="toy", output=tmp_path / "f.h5")
    (tmp_path / "f.h5.partial").write_bytes((tmp_path / "f.h5").read_bytes())
    with pytest.raises(StartError, match="in the way"):
        extract(pictures, model="toy", output=tmp_path / "f.h5", retry_failed=True)


def test_packing_is_told_while_it_goes_on(pictures, tmp_path) -> None:
    told: list[float] = []
    extract(pictures, model="toy", compress="gzip", output=tmp_path / "f.h5", progress=lambda s: told.append(s.packed))
    assert told[0] == 0
    assert told[-1] == 1


def forged(path: Path, **changes: object) -> None:
    """Changes what the file says of how its model was asked for, as whoever forges a file would."""
    from tests.test_store_toys import relabel

    with h5py.File(path, "r+") as file:
        run = json.loads(file["provenance/run"].asstr()[()])
        run["source"] = json.dumps({**json.loads(run["source"]), **changes})
        file["provenance/run"][()] = json.dumps(run, sort_keys=True)
        relabel(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": "../../outside/w.pth"},
        {"weights": "~/w.pth"},
        {"weights": "/etc/passwd"},
        {"model": "transformers:/tmp"},
        {"model": "timm:local-dir:/tmp"},
        {"model": "../elsewhere"},
        {"config": {"backbone": {"model": "resnet18", "weights": "/etc/passwd"}}},
        {"config": {"backbone": {"model": ["/etc"]}}},
    ],
)
def test_no_path_of_any_form_is_followed_from_a_strangers_file(bbx_cli, done, changes) -> None:
    forged(done, **changes)
    for words in (
        ("extract", "--like", "features.h5", "-o", "x.h5", "pictures"),
        ("verify", "--recompute", 1, "features.h5"),
    ):
        ran = bbx_cli(*words)
        assert ran.code == 3
        assert "a path from a file is not followed" in ran.err


@pytest.mark.parametrize(
    "changes",
    [{"seed": 10**40}, {"seed": "0"}, {"config": 5}, {"config": "/etc/passwd"}, {"size": [1]}, {"size": {"a": 1}},
     {"model": 7}, {"weights": "a\0b"}, {"tokens": 3}],
)  # fmt: skip
def test_nonsense_in_a_file_is_an_error_of_the_file(bbx_cli, done, changes) -> None:
    forged(done, **changes)
    ran = bbx_cli("extract", "--like", "features.h5", "-o", "x.h5", "pictures")
    assert ran.code == 3
    assert "does not say how its model was asked for" in ran.err


def test_nonsense_nested_deeper_than_python_goes_is_one_too() -> None:
    from bbx.rebuild import request_of

    with pytest.raises(bbx.BbxError, match="does not say how"):
        request_of(replace(RUN, source="[" * 100_000))


@pytest.mark.parametrize("digits", [19, 5000])
def test_a_seed_that_can_be_none_is_one_too(digits: int) -> None:
    from bbx.rebuild import request_of

    with pytest.raises(bbx.BbxError, match="does not say how"):  # more than one can be, or than Python reads
        request_of(replace(RUN, source="", weights=f"random (seed {'9' * digits})"))


@pytest.mark.parametrize("key", ["../secret.png", "/tmp/secret.png", "a/../../secret.png"])
def test_keys_that_lead_out_of_their_folder_are_not_followed(bbx_cli, tmp_path, picture, key) -> None:
    from bbx.store import FeatureWriter

    picture(tmp_path / "secret.png")
    extract(picture(tmp_path / "in" / "a.png").parent, model="toy", output=tmp_path / "honest.h5")
    with bbx.open(tmp_path / "honest.h5") as honest:
        run = honest.run
    with FeatureWriter.open(tmp_path / "f.h5", run, [key], attempt={"roots": [str(tmp_path / "in")]}) as writer:
        writer.fail(0, "not there")
    ran = bbx_cli("extract", "--like", "f.h5", "-o", "x.h5")
    assert ran.code == 3
    assert "leads out of its folder" in ran.err


def test_images_of_several_folders_are_not_guessed_at(bbx_cli, tmp_path, picture) -> None:
    for number, folder in enumerate(("a", "b")):
        picture(tmp_path / folder / f"{number}.png", number)
        extract(tmp_path / folder, model="toy", output=tmp_path / f"{folder}.h5")
    picture(tmp_path / "a" / "1.png", 99)  # of the name of b's
    assert bbx_cli("merge", "a.h5", "b.h5", "-o", "all.h5").code == 0
    assert bbx_cli("extract", "--like", "all.h5", "--stages", "stem", "-o", "x.h5").code == 0
    assert bbx.open("x.h5").inputs() == bbx.open("all.h5").inputs()  # each its own, by the recorded size and time
    assert bbx_cli("verify", "all.h5", "--recompute", 2).code == 0
    picture(tmp_path / "b" / "1.png", 98)
    ran = bbx_cli("extract", "--like", "all.h5", "--stages", "stem", "-o", "y.h5")
    assert ran.code == 3
    assert "in none of 2 folders '1.png' is the file that it was" in ran.err


def test_a_picture_that_changed_since_is_named(bbx_cli, done, pictures, picture) -> None:
    picture(pictures / "003.png", 77)
    ran = bbx_cli("extract", "--like", "features.h5", "--stages", "stage2", "-o", "more.h5")
    assert ran.code == 0
    assert "1 images are not what they were when features.h5 was made: '003.png'" in ran.err
    ran = bbx_cli("merge", "features.h5", "more.h5", "-o", "all.h5")
    assert ran.code == 3
    assert "003.png" in ran.err


def test_a_retry_needs_no_word_but_its_own(bbx_cli, pictures, picture) -> None:
    (pictures / "002.png").write_bytes(b"bad")
    assert bbx_cli("extract", "--model", "toy", "pictures").code == 4
    picture(pictures / "002.png", 2)
    assert bbx_cli("extract", "--retry-failed").code == 0
    assert bbx.open("features.h5").counts == (7, 0, 0)


def test_a_picture_of_a_time_beyond_2262_is_a_row_like_any(tmp_path, picture) -> None:
    path = picture(tmp_path / "in" / "far.png")
    os.utime(path, ns=(10**19, 10**19))
    assert extract(tmp_path / "in", model="toy", output=tmp_path / "f.h5").done == 1
    assert bbx.open(tmp_path / "f.h5").inputs()[0].mtime_ns == (1 << 63) - 1
    with pytest.raises(StartError, match="nothing to extract"):
        extract(tmp_path / "in", model="toy", skip_in=tmp_path / "f.h5", output=tmp_path / "g.h5")


def test_what_a_kill_right_after_packing_left_is_cleared(bbx_cli, pictures, tmp_path) -> None:
    options = {"model": "toy", "output": tmp_path / "f.h5", "compress": "gzip"}
    extract(pictures, model="toy", output=tmp_path / "f.h5")
    plain = (tmp_path / "f.h5").read_bytes()
    (tmp_path / "f.h5").rename(tmp_path / "f.h5.partial")
    extract(pictures, **options)  # packs what is complete
    (tmp_path / "f.h5.partial").write_bytes(plain)
    extract(pictures, **options)
    assert sorted(path.name for path in tmp_path.glob("f.h5*")) == ["f.h5"]
    assert bbx.open(tmp_path / "f.h5").packed
