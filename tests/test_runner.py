"""The whole job from Python: every row its own image's, failed rows apart, resumed runs equal to whole ones."""

import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import bbx
from bbx.backbone import normalise
from bbx.errors import ImageError, InterruptedRunError, RunMismatchError, StartError, UsageError
from bbx.images import Decoders, read_image
from bbx.providers import load_backbone
from bbx.runner import extract

# Values in batches of different sizes differ by rounding only.
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def rows_of(path: Path) -> dict[str, dict[str, np.ndarray]]:
    with bbx.open(path) as file:
        return {file.keys[row]: {stage: file[stage][row] for stage in file.stages} for row in file.done}


def assert_same_rows(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for key, maps in expected.items():
        for stage, value in maps.items():
            np.testing.assert_allclose(got[key][stage], value, **TOLERANCE, err_msg=f"{key} {stage}")


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_every_row_holds_its_own_images_maps(pictures, tmp_path, batch_size):
    out = tmp_path / "f.h5"
    summary = extract(pictures, model="toy", stages="all", batch_size=batch_size, output=out)
    assert (summary.rows, summary.done, summary.failed, summary.exit_code) == (7, 7, 0, 0)
    backbone = load_backbone("toy", stages="all")
    for key, maps in rows_of(out).items():
        pixels = torch.from_numpy(read_image(pictures / key, backbone.preprocess))[None]
        with torch.inference_mode():
            truth = backbone(normalise(pixels, backbone.preprocess))
        for stage, value in maps.items():
            np.testing.assert_allclose(value, truth[stage][0].numpy(), **TOLERANCE)


def bomb(path: Path, whole: bytes) -> None:
    """A PNG that claims 60,000 × 60,000 pixels."""
    import struct
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path.write_bytes(whole[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + whole[33:])


def fifo(path: Path, _whole: bytes) -> None:
    """Nothing that may ever be opened."""
    path.unlink()
    os.mkfifo(path)


def dangling(path: Path, _whole: bytes) -> None:
    """A link to nowhere."""
    path.unlink()
    path.symlink_to("nowhere.png")


WAYS_TO_BREAK = (
    lambda path, whole: path.write_bytes(whole[: len(whole) // 2]),
    lambda path, _: path.write_bytes(b""),
    lambda path, _: path.write_bytes(b"<!DOCTYPE html><html>"),
    lambda path, whole: path.write_bytes(whole[:30]),
    lambda path, _: path.write_bytes(bytes(500)),
    lambda path, whole: path.write_bytes(whole[:60] + bytes(60) + whole[120:]),
    lambda path, _: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop"),
    bomb,
    fifo,
    dangling,
)


def test_bad_images_are_failed_rows_and_leave_their_neighbours_alone(tmp_path, picture):
    for number in range(100):
        picture(tmp_path / "clean" / f"{number:03}.png", number)
        picture(tmp_path / "dirty" / f"{number:03}.png", number)
    bad = [f"{number:03}.png" for number in range(0, 100, 10)]
    for name, way in zip(bad, WAYS_TO_BREAK, strict=True):
        way(tmp_path / "dirty" / name, (tmp_path / "dirty" / name).read_bytes())
    extract(tmp_path / "clean", model="toy", stages="all", output=tmp_path / "clean.h5")
    summary = extract(tmp_path / "dirty", model="toy", stages="all", output=tmp_path / "dirty.h5")
    assert sorted(summary.failures) == bad
    assert len(set(summary.failures.values())) == len(bad)  # each says what is wrong with this very one
    assert summary.exit_code == 4
    clean = rows_of(tmp_path / "clean.h5")
    assert_same_rows(rows_of(tmp_path / "dirty.h5"), {key: maps for key, maps in clean.items() if key not in bad})
    with bbx.open(tmp_path / "dirty.h5") as file:
        assert file.failed == summary.failures
        assert np.isnan(file["stem"].get(bad[0], missing="nan")).all()


def test_all_images_bad_is_its_own_exit_code(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.png").write_bytes(b"")
    assert extract(tmp_path / "bad", model="toy", output=tmp_path / "f.h5").exit_code == 5


def test_on_error_fail_stops_at_the_first_bad_image_and_can_go_on_once_it_is_mended(pictures, tmp_path, picture):
    (pictures / "003.png").write_bytes(b"")
    options = {"model": "toy", "batch_size": 2, "output": tmp_path / "f.h5"}
    with pytest.raises(ImageError, match=r"003\.png"):
        extract(pictures, on_error="fail", **options)
    picture(pictures / "003.png", 3)
    summary = extract(pictures, on_error="fail", **options)
    assert (summary.done, summary.extracted, summary.failed) == (7, 5, 0)


def test_the_same_run_again_has_nothing_to_do(pictures, tmp_path):
    extract(pictures, model="toy", output=tmp_path / "f.h5")
    before = (tmp_path / "f.h5").stat().st_mtime_ns
    summary = extract(pictures, model="toy", output=tmp_path / "f.h5")
    assert (summary.done, summary.extracted) == (7, 0)
    assert (tmp_path / "f.h5").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 1}, "weights_digest"),
        ({"stages": "stem"}, "stages"),
        ({"dtype": "float16"}, "dtype"),
        ({"pool": "avg"}, "pool"),
        ({"resize_mode": "pad"}, "preprocess.mode"),
        ({"exif": "ignore"}, "preprocess.exif"),
        ({"precision": "bf16"}, "precision"),
        ({"size": 48}, "preprocess.size"),
    ],
)
def test_another_runs_file_is_refused_by_the_field_that_differs(pictures, tmp_path, change, field):
    extract(pictures, model="toy", output=tmp_path / "f.h5")
    with pytest.raises(RunMismatchError, match=field):
        extract(pictures, model="toy", output=tmp_path / "f.h5", **change)
    summary = extract(pictures, model="toy", output=tmp_path / "f.h5", mode="overwrite", **change)
    assert summary.extracted == 7


def test_other_images_are_another_run(pictures, tmp_path, picture):
    extract(pictures, model="toy", output=tmp_path / "f.h5")
    picture(pictures / "zzz.png", 9)
    with pytest.raises(RunMismatchError, match=r"zzz\.png"):
        extract(pictures, model="toy", output=tmp_path / "f.h5")


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_run_stopped_by_a_signal_is_committed_and_goes_on(pictures, tmp_path, after):
    asked = iter(range(99))
    options = {"model": "toy", "stages": "all", "batch_size": 2}
    with pytest.raises(InterruptedRunError) as caught:
        extract(pictures, output=tmp_path / "f.h5", stop=lambda: 15 if next(asked) >= after else None, **options)
    assert caught.value.exit_code == 143
    assert not (tmp_path / "f.h5").exists()
    with bbx.FeatureFile(tmp_path / "f.h5", partial=True) as file:
        # What was begun is finished, the oldest batch in any case; what no stream had begun is not.
        assert 2 <= len(file.done) <= 2 * (after + 1)
        assert len(file.done) % 2 == 0
    extract(pictures, output=tmp_path / "f.h5", **options)
    extract(pictures, output=tmp_path / "whole.h5", **options)
    assert_same_rows(rows_of(tmp_path / "f.h5"), rows_of(tmp_path / "whole.h5"))


@pytest.mark.parametrize("mode", ["new", "overwrite"])
def test_a_run_begun_anew_and_stopped_names_the_mode_that_continues_it(pictures, tmp_path, mode):
    options = {"model": "toy", "batch_size": 2, "output": tmp_path / "f.h5"}
    with pytest.raises(InterruptedRunError, match="stopped") as caught:
        extract(pictures, mode=mode, stop=lambda: 2, **options)
    assert "--mode resume" in caught.value.hint
    assert extract(pictures, mode="resume", **options).extracted == 5


def test_only_the_first_reasons_are_kept_in_memory_and_all_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("bbx.plan.FAILURES_KEPT", 3)
    (tmp_path / "in").mkdir()
    for number in range(9):
        (tmp_path / "in" / f"{number}.png").write_bytes(b"")
    summary = extract(tmp_path / "in", model="toy", output=tmp_path / "f.h5")
    assert (summary.failed, len(summary.failures), summary.exit_code) == (9, 3, 5)
    with bbx.open(tmp_path / "f.h5") as file:
        assert len(file.failed) == 9


def test_weights_with_another_classifier_are_another_run_where_a_layer_of_it_is_stored(pictures, tmp_path):
    from tests.toy import Toy

    state = Toy().state_dict()
    torch.save(state, tmp_path / "a.pth")
    torch.save({**state, "fc.weight": state["fc.weight"] + 1}, tmp_path / "b.pth")
    options = {"model": "toy", "layers": "fc", "output": tmp_path / "f.h5"}
    extract(pictures, weights=str(tmp_path / "a.pth"), **options)
    with pytest.raises(RunMismatchError, match="weights_digest"):
        extract(pictures, weights=str(tmp_path / "b.pth"), **options)


def test_a_signal_after_the_last_batch_finds_nothing_to_interrupt(pictures, tmp_path):
    summary = extract(pictures, model="toy", batch_size=7, stop=lambda: 2, output=tmp_path / "f.h5")
    assert summary.done == 7


@pytest.mark.parametrize(("pool", "reduce"), [("avg", np.mean), ("max", np.max)])
def test_pooled_stages_are_vectors(pictures, tmp_path, pool, reduce):
    extract(pictures, model="toy", stages="all", output=tmp_path / "maps.h5")
    extract(pictures, model="toy", stages="all", pool=pool, output=tmp_path / "vectors.h5")
    vectors = rows_of(tmp_path / "vectors.h5")
    for key, maps in rows_of(tmp_path / "maps.h5").items():
        for stage, value in maps.items():
            np.testing.assert_allclose(vectors[key][stage], reduce(value, axis=(1, 2)), rtol=1e-4, atol=1e-6)


def test_float16_is_the_rounded_value_and_overflow_is_counted(pictures, tmp_path):
    extract(pictures, model="toy", stages="all", output=tmp_path / "full.h5")
    summary = extract(pictures, model="toy", stages="all", dtype="float16", output=tmp_path / "half.h5")
    assert summary.overflow == {}
    half = rows_of(tmp_path / "half.h5")
    for key, maps in rows_of(tmp_path / "full.h5").items():
        assert half[key]["stage2"].dtype == np.float16
        np.testing.assert_allclose(half[key]["stage2"], maps["stage2"], rtol=1e-3, atol=1e-4)
    summary = extract(pictures, model="toy-loud", stages="all", dtype="float16", output=tmp_path / "loud.h5")
    assert summary.overflow == {"stage2": 7 * 8 * 4 * 4}
    assert np.isposinf(rows_of(tmp_path / "loud.h5")["000.png"]["stage2"]).all()


def test_layers_are_stored_beside_stages_in_network_order(pictures, tmp_path):
    extract(pictures, model="toy", stages="stage2", layers="one,stem", output=tmp_path / "f.h5")
    with bbx.open(tmp_path / "f.h5") as file:
        assert list(file.stages) == ["stem", "one", "stage2"]
        assert file["one"][0].shape == (6, 8, 8)


def test_a_dry_run_plans_and_writes_nothing(pictures, tmp_path):
    plans = []
    extract(pictures, model="toy", output=tmp_path / "f.h5", dry_run=True, on_plan=plans.append)
    assert (len(plans[0].images), plans[0].run.row_nbytes, plans[0].target.state) == (7, 4 * 8 * 4 * 4, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures"]


def test_a_disk_too_small_is_refused_before_anything_is_written(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: types.SimpleNamespace(free=1000))
    with pytest.raises(StartError, match="1 KB") as caught:
        extract(pictures, model="toy", output=tmp_path / "f.h5")
    assert "--dtype float16" in caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures"]


@pytest.mark.parametrize(
    "option",
    [{"batch_size": 0}, {"workers": 0}, {"dtype": "float8"}, {"pool": "sum"}, {"mode": "append"}, {"on_error": "x"},
     {"precision": "fp8"}, {"device": "gpu"}, {"exif": "maybe"}, {"resize_mode": "stretch"}],
)  # fmt: skip
def test_a_value_that_is_none_of_the_words_is_a_usage_error(pictures, tmp_path, option):
    with pytest.raises(UsageError) as caught:
        extract(pictures, model="toy", output=tmp_path / "f.h5", **option)
    assert caught.value.hint


def test_a_missing_device_or_folder_is_a_start_error(pictures, tmp_path):
    with pytest.raises(StartError, match="cuda:7"):
        extract(pictures, model="toy", device="cuda:7", output=tmp_path / "f.h5")
    with pytest.raises(StartError, match="nowhere"):
        extract(pictures, model="toy", output=tmp_path / "nowhere" / "f.h5")


def test_each_image_is_decoded_once(pictures, tmp_path, monkeypatch):
    read = []
    submit = Decoders.submit
    monkeypatch.setattr(
        Decoders, "submit", lambda self, path, slot: (read.append(Path(path).name), submit(self, path, slot))[1]
    )
    extract(pictures, model="toy", output=tmp_path / "f.h5", batch_size=2)
    assert sorted(read) == [f"{number:03}.png" for number in range(7)]


def test_the_attempt_records_who_and_with_what(pictures, tmp_path):
    extract(pictures, model="toy", output=tmp_path / "f.h5")
    with bbx.open(tmp_path / "f.h5") as file:
        attempt = file.attempts[0]
        assert file.run.model == "toy:toy"
        assert attempt["versions"]["torch"] == torch.__version__.split("+")[0]
        assert attempt["roots"] == [str(pictures)]
        assert {"time", "host", "device", "command"} <= attempt.keys()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_data_loader_reads_the_rows_in_its_workers(pictures, tmp_path, method):
    (pictures / "002.png").write_bytes(b"")
    extract(pictures, model="toy", stages="all", output=tmp_path / "f.h5")
    dataset = bbx.FeatureDataset(tmp_path / "f.h5", stages="stem,stage2")
    assert dataset.keys == [f"{number:03}.png" for number in (0, 1, 3, 4, 5, 6)]
    truth = rows_of(tmp_path / "f.h5")
    dataset[0]  # a handle is open before the workers start
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context=method)
    items = [batch["stem"] for batch in loader]
    assert torch.equal(torch.cat(items), torch.stack([torch.from_numpy(truth[key]["stem"]) for key in dataset.keys]))


KILLED = """
import sys, os, signal
sys.path.insert(0, {root!r})
import bbx.providers, bbx.runner
bbx.providers.PROVIDERS["toy"] = ("tests.toy",)
def progress(summary):
    if {limit} and summary.extracted >= {limit}:
        os.kill(os.getpid(), signal.SIGKILL)
bbx.runner.extract({images!r}, model="toy", stages="all", batch_size=4, output={out!r}, progress=progress)
"""


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_the_uninterrupted_one(tmp_path, picture):
    for number in range(60):
        picture(tmp_path / "in" / f"{number:03}.png", number)
    extract(tmp_path / "in", model="toy", stages="all", output=tmp_path / "whole.h5")
    root, out = str(Path(__file__).parent.parent), str(tmp_path / "f.h5")
    killed = 0
    for limit in (4, 8, 12, 20, 36, 0):
        code = KILLED.format(root=root, images=str(tmp_path / "in"), out=out, limit=limit)
        ran = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        killed += ran.returncode == -9
        with bbx.FeatureFile(out, partial=not Path(out).exists()) as file:
            assert all(file.verify_row(stage, int(row)) for row in file.done for stage in file.stages)
    assert killed == 5, ran.stderr
    assert_same_rows(rows_of(Path(out)), rows_of(tmp_path / "whole.h5"))


MEMORY = """
import sys
sys.path.insert(0, {root!r})
import bbx.providers, bbx.runner
bbx.providers.PROVIDERS["toy"] = ("tests.toy",)
summary = bbx.runner.extract({images!r}, model="toy", stages="all", size=224, output={out!r})
assert summary.done == {count}
# Not getrusage: its maximum starts at the parent's size, which would hide any growth.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_images(tmp_path, picture):
    peaks = {}
    for count in (200, 2000):
        folder = tmp_path / str(count)
        for number in range(count):
            picture(folder / f"{number:05}.jpg", number, size=(256, 256))
        root = str(Path(__file__).parent.parent)
        code = MEMORY.format(root=root, images=str(folder), out=str(tmp_path / f"{count}.h5"), count=count)
        ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        peaks[count] = int(ran.stdout)
    assert peaks[2000] <= 1.05 * peaks[200], peaks


def test_numbers_of_any_kind_are_taken_and_what_is_none_is_told(pictures, tmp_path):
    given = {"model": "toy", "output": tmp_path / "f.h5", "mode": "overwrite"}
    assert extract(pictures, max_pixels=10**400, image_timeout=10**400, **given).done == 7
    numbers = {"size": np.int64(32), "seed": np.int64(1), "workers": np.int64(1), "batch_size": np.int64(2),
               "max_pixels": np.int64(10**7), "image_timeout": np.float32(50)}  # fmt: skip
    assert extract(pictures, **numbers, **given).done == 7
    with bbx.open(tmp_path / "f.h5") as file:
        assert file.run.preprocess.size == (32, 32)
        assert file.attempts[0]["batch_size"] == 2
    wrongs = {"size": (32.0, (32,), "32"), "seed": (0.5, -1, 1 << 63), "workers": ("2", 2.5), "image_timeout": ("2",),
              "max_pixels": (float("nan"),), "batch_size": ("8", 0, np.array([3, 4]))}  # fmt: skip
    for seed in (0.5, np.int64(-1)):
        with pytest.raises(UsageError, match="--seed cannot be"):
            bbx.load_backbone("efficientnet-lite0", weights="random", seed=seed)
    assert bbx.load_backbone("efficientnet-lite0", weights="random", seed=np.int64(1 << 40)).weights
    for name, wrong in ((name, wrong) for name, some in wrongs.items() for wrong in some):
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} cannot be"):
            extract(pictures, **{name: wrong}, **given)
