"""`--decode gpu`: near `exact`, for the very same images and reasons; by the CPU, behind the seam of the device.

Where there is a CUDA device, the values are tested on it, too. Without one torchvision decodes with libjpeg.
"""

from __future__ import annotations

import io
import json
import platform
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import bbx
from bbx.errors import BbxError, InterruptedRunError, StartError, UsageError
from bbx.gpu_decode import DeviceDecoders, canary, check, decoders, decoders_for, device
from bbx.gpu_decode.decoders import _REFUSED, _UNDONE
from bbx.gpu_decode.device import decode_jpegs
from bbx.gpu_decode.jobs import Job, batches
from bbx.image_processor import AutoImageProcessor
from bbx.images import Decoders, DecodeSettings, find_images
from bbx.images.decoders import Answer
from bbx.plan import Plan, Summary
from bbx.providers import load_backbone
from bbx.rates import decode_rate, sample
from bbx.runner import extract, features
from bbx.spec import InputFile, Preprocess, RunSpec
from bbx.verify import verify
from tests.faults.corpus import KINDS, Fails, build
from tests.test_decode_fast import EXACT, SAMPLES, photo

CPU = torch.device("cpu")
LEFT = "--decode gpu left to the CPU, which decodes exactly: "
GPU = replace(EXACT, decode="gpu")


@dataclass(frozen=True)
class Way:
    """A device, and what its pixels may differ by, of 255: the largest, and a picture's mean; for photographs."""

    device: torch.device
    largest: int
    mean: float


# With grain. On the CPU only the resize differs. In bytes it rounds elsewhere; found: 2, and a mean of 0.21 at most,
# where a picture is squashed and enlarged. In floats, as on a GPU, it rounds once, and clips nothing between its two
# directions, as Pillow does; found: 9, at edges under bicubic, and a mean of 0.21. nvJPEG enlarges the chroma in its
# own way besides: torchvision's own tests allow it a mean of 2.
WAYS = {"bytes": Way(CPU, 2, 0.25), "floats": Way(CPU, 10, 0.25), "cuda": Way(torch.device("cuda"), 96, 2.25)}


@pytest.fixture(params=[name for name in WAYS if name != "cuda" or torch.cuda.is_available()])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    """Each device that is there, and the CPU with the resize of a GPU, too."""
    if request.param == "floats":
        name = "torchvision.transforms.v2.functional._geometry._do_native_uint8_resize_on_cpu"
        monkeypatch.setattr(name, lambda interpolation: False)
    return WAYS[request.param]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU counts as a device that decodes."""
    monkeypatch.setattr(device, "KINDS", ("cuda", "cpu"))


def read(decoders: Decoders, paths: Sequence[Path], preprocess: Preprocess) -> tuple[np.ndarray, list[Answer]]:
    """What became of all `paths`, submitted at once: `(b, h, w, 3)`, and the answers."""
    slots = np.zeros((len(paths), *preprocess.size, 3), np.uint8)
    futures = [decoders.submit(str(path), slot) for path, slot in zip(paths, slots, strict=True)]
    return slots, [future.result(60) for future in futures]


def both(
    paths: Sequence[Path], exact: Preprocess = EXACT, way: Way = WAYS["bytes"], **options: Any
) -> tuple[np.ndarray, np.ndarray, str]:
    """The pixels of `exact` and of `gpu`, which agree in all else; and what the latter left to the CPU."""
    with Decoders(2, DecodeSettings(exact)) as decoders:
        wanted, told = read(decoders, paths, exact)
    gpu = replace(exact, decode="gpu")
    with DeviceDecoders(2, DecodeSettings(gpu), way.device, **options) as decoders:
        found, said = read(decoders, paths, gpu)
        notes = decoders.notes
    assert [(answer.reason, answer.file) for answer in said] == [(answer.reason, answer.file) for answer in told]
    return wanted.astype(int), found.astype(int), " ".join(notes)


def near(wanted: np.ndarray, found: np.ndarray, way: Way = WAYS["bytes"]) -> None:
    apart = np.abs(wanted - found)
    assert apart.max() <= way.largest
    assert max(one.mean() for one in apart) < way.mean


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_photographs_are_near_exact_and_none_is_left_to_the_cpu(tmp_path, way, interpolation):
    sizes = [(640, 480), (480, 640), (300, 200), (1920, 1080), (250, 251), (100, 80)]
    paths = [photo(tmp_path / f"{number}.jpg", size, number % len(SAMPLES)) for number, size in enumerate(sizes)]
    wanted, found, notes = both([*paths, *(path for path in SAMPLES if path.suffix == ".jpg")],
                                replace(EXACT, interpolation=interpolation), way)  # fmt: skip
    near(wanted, found, way)
    assert not notes


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_every_orientation_and_mode_shows_the_same_place(tmp_path, way, mode):
    paths = [photo(tmp_path / f"{turn}.jpg", (331, 247), 1, turn) for turn in range(1, 9)]
    for exact in (replace(EXACT, mode=mode), replace(EXACT, size=(160, 320), resize=172, mode=mode)):
        wanted, found, notes = both(paths, exact, way)
        near(wanted, found, way)
        assert not notes
    wanted, found, _ = both(paths, replace(EXACT, exif="ignore", mode=mode), way)
    near(wanted, found, way)
    assert (wanted == wanted[0]).all()


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2},
                                     {"restart_marker_rows": 1}, {"optimize": True}])  # fmt: skip
def test_usual_ways_to_write_a_jpeg_are_decoded_by_the_device(tmp_path, way, options):
    image = Image.open(photo(tmp_path / "x.png", (300, 260)))
    image.save(tmp_path / "colour.jpg", quality=90, **options)
    image.convert("L").save(tmp_path / "grey.jpg", quality=90, **{**options, "subsampling": 0})
    for value in (0, 31, 128, 255):
        Image.new("RGB", (300, 260), (value,) * 3).save(tmp_path / f"flat{value}.jpg", **options)
    wanted, found, notes = both(sorted(tmp_path.glob("*.jpg")), way=way)
    near(wanted, found, way)
    assert not notes


def unusual(folder: Path) -> list[Path]:
    """Pictures that a GPU may decode otherwise than libjpeg, or not at all."""
    image = Image.open(photo(folder / "picture.png", (300, 260)))
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.save(folder / "rgb.jpg", keep_rgb=True)
    image.save(folder / "progressive.jpg", progressive=True)
    image.save(folder / "x.webp")
    image.save(folder / "two.mpo", save_all=True, append_images=[image])
    image.resize((15, 300)).save(folder / "narrow.jpg")
    image.save(folder / "plain.jpg")
    plain = (folder / "plain.jpg").read_bytes()
    (folder / "tail.jpg").write_bytes(plain + b"\0\0")
    for name, marker in (("arithmetic", 0xC9), ("extended", 0xC1)):
        (folder / f"{name}.jpg").write_bytes(plain.replace(b"\xff\xc0", bytes([0xFF, marker]), 1))
    (folder / "named jpg.png").write_bytes(plain[:-1])
    (folder / "plain.jpg").unlink()
    return sorted(folder.iterdir())


def test_whatever_is_no_plain_jpeg_is_decoded_exactly(tmp_path):
    paths = unusual(tmp_path)
    wanted, found, notes = both(paths)
    np.testing.assert_array_equal(wanted, found)
    assert notes == f"{LEFT}{len(paths)} images other than plain baseline JPEG"


def test_bad_files_keep_their_reasons_wherever_they_are_cut_or_changed(tmp_path):
    whole = photo(tmp_path / "x.jpg", (640, 480)).read_bytes()
    for number, length in enumerate((0, 1, 10, 300, 5_000, len(whole) // 2, len(whole) - 2, len(whole) - 1)):
        (tmp_path / f"cut{number}.jpg").write_bytes(whole[:length])
    (tmp_path / "end.jpg").write_bytes(whole[:300] + b"\xff\xd9")
    (tmp_path / "text.jpg").write_bytes(b"not a picture")
    (tmp_path / "folder.jpg").mkdir()
    Image.new("RGB", (16, 10_000)).save(tmp_path / "narrow.jpg")
    paths = [*sorted(tmp_path.iterdir()), tmp_path / "absent.jpg"]
    wanted, found, _ = both(paths, replace(EXACT, resize=1500))  # 16 x 10000, scaled to 1500, is too long
    near(wanted, found)
    assert (found.reshape(len(found), -1).max(1) > 0).sum() == 1
    with DeviceDecoders(1, DecodeSettings(GPU, max_pixels=1000), CPU) as decoders:
        assert read(decoders, [tmp_path / "x.jpg"], GPU)[1][0].reason == "too large (307200 pixels, limit 1000)"


def test_every_kind_of_bad_and_odd_picture_ends_as_with_exact(tmp_path):
    # Large ones, and those that never end, are told apart by the workers' limits, which are the same.
    corpus = build(tmp_path / "in", [kind for kind in KINDS if "bomb" not in kind.name])
    paths = [tmp_path / "in" / key for key in corpus.rows]
    wanted, found, _ = both(paths, replace(EXACT, size=(32, 32), resize=36))
    near(wanted, found)
    assert sum(isinstance(kind.expect, Fails) for kind in corpus.odd.values()) > 50


def spoilt(jpeg: bytes, seed: int) -> bytes:
    """A JPEG whose start and end are well, and something in between is not."""
    random = np.random.default_rng(seed)
    at = int(random.integers(900, len(jpeg) - 3000))
    changed = bytearray(jpeg)
    for place in random.integers(900, len(jpeg) - 10, 5):
        changed[place] ^= 1 << int(random.integers(8))
    middles = (random.bytes(1000) + jpeg[at + 1000 :], bytes(1000) + jpeg[at + 1000 :], jpeg[at + 2000 :], b"\xff\xd9")
    return [bytes(changed), *(jpeg[:at] + rest for rest in middles)][seed % 5]


def undone(jpegs: list[torch.Tensor], where: torch.device) -> list[torch.Tensor]:
    """In the place of the decoder: it writes nothing, half of it, or all but a block; and it says nothing."""
    pictures = []
    for number, jpeg in enumerate(jpegs):
        width, height = Image.open(io.BytesIO(jpeg.numpy().tobytes())).size
        picture = canary.marks(width, where).expand(3, height, width).clone()
        if number % 3 == 1:
            picture[:, : height // 2] = 0
        elif number % 3 == 2:
            block = picture[:, 40:48, 64:72].clone()
            picture[:] = 0
            picture[:, 40:48, 64:72] = block
        pictures.append(picture)
    return pictures


def test_what_the_device_leaves_undone_is_decoded_exactly_and_given_up_where_exact_does(tmp_path):
    whole = [photo(tmp_path / "x.jpg", (640, 480)).read_bytes()]
    Image.open(tmp_path / "x.jpg").save(tmp_path / "x.jpg", quality=90, restart_marker_rows=1)
    whole.append((tmp_path / "x.jpg").read_bytes())
    for seed in range(80):
        (tmp_path / f"{seed:02}.jpg").write_bytes(spoilt(whole[seed % 2], seed))
    wanted, found, notes = both(sorted(tmp_path.iterdir()), decode=undone)
    assert sum(not picture.any() for picture in wanted) > 10  # given up
    np.testing.assert_array_equal(wanted, found)
    assert int(notes.partition(f" images {_UNDONE}")[0].split()[-1]) > 30


def test_memory_is_marked_where_the_next_pictures_will_lie(monkeypatch):
    shapes = [(3, 16, 24), (3, 33, 17)]
    other, lasting = ([torch.zeros(shape, dtype=torch.uint8) for shape in shapes] for _ in range(2))
    heap = [*other, *lasting * canary._TRIES]  # the first are of memory that is new
    monkeypatch.setattr(canary, "STEADY", ("cpu",))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda shape, **_: heap.pop(0))
        addresses = canary.mark(shapes, CPU)
    assert addresses == [block.data_ptr() for block in lasting]
    assert canary.untouched(lasting) == [True, True]
    assert canary.untouched(other) == [False, False]
    lasting[1][:] = 7
    assert canary.untouched(lasting) == [True, False]
    canary.check_marked(lasting, addresses)
    with pytest.raises(canary.Moved):
        canary.check_marked(lasting[::-1], addresses)


def test_a_picture_in_memory_that_was_not_marked_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(canary, "STEADY", ("cpu",))
    monkeypatch.setattr(decoders, "mark", lambda shapes, where: [1] * len(shapes))
    wanted, found, notes = both([photo(tmp_path / f"{number}.jpg", (300, 240), number) for number in range(3)])
    np.testing.assert_array_equal(wanted, found)
    assert notes == f"{LEFT}3 images {_REFUSED}"


def failing(jpegs: list[torch.Tensor], where: torch.device, *, of: int, error: type[Exception]) -> list[torch.Tensor]:
    """The decoder, which raises where one of the files has `of` bytes."""
    if any(len(jpeg) == of for jpeg in jpegs):
        raise error("no partial results")
    return decode_jpegs(jpegs, where)


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, ValueError])
def test_one_that_the_device_refuses_among_good_ones_goes_to_the_cpu_alone(tmp_path, error):
    paths = [photo(tmp_path / f"{number}.jpg", (300 + number, 240), number % 3) for number in range(6)]
    decode = partial(failing, of=paths[3].stat().st_size, error=error)
    wanted, found, notes = both(paths, decode=decode)
    near(wanted, found)
    np.testing.assert_array_equal(wanted[3], found[3])
    assert notes == f"{LEFT}1 image {_REFUSED}"


def test_a_batch_that_fails_is_tried_once_more_as_a_whole(tmp_path):
    paths = [photo(tmp_path / f"{number}.jpg", (300, 240), number % 3) for number in range(6)]
    sizes: list[int] = []

    def short_of_memory(jpegs: list[torch.Tensor], where: torch.device) -> list[torch.Tensor]:
        sizes.append(len(jpegs))
        while len(sizes) == 1 and made[0]._waiting.qsize() < 5:  # The first goes alone, the others wait for it.
            threading.Event().wait(0.01)
        if len(sizes) == 2:
            raise RuntimeError("Error while decoding JPEG images: CUDA out of memory")
        return decode_jpegs(jpegs, where)

    made: list[DeviceDecoders] = []
    with DeviceDecoders(2, DecodeSettings(GPU), CPU, decode=short_of_memory) as device_decoders:
        made.append(device_decoders)
        first = device_decoders.submit(str(paths[0]), np.zeros((224, 224, 3), np.uint8))
        while not sizes:
            threading.Event().wait(0.01)
        _, said = read(device_decoders, paths[1:], GPU)
        assert not first.result(60).reason
        assert not any(answer.reason for answer in said)
        assert not device_decoders.notes
    assert sizes == [1, 5, 5]


def test_a_device_that_gives_another_picture_than_the_header_says_is_not_believed(tmp_path):
    def crooked(jpegs: list[torch.Tensor], where: torch.device) -> list[torch.Tensor]:
        return [one.transpose(1, 2) for one in decode_jpegs(jpegs, where)]

    wanted, found, notes = both([photo(tmp_path / "x.jpg", (300, 240))], decode=crooked)
    np.testing.assert_array_equal(wanted, found)
    assert _REFUSED in notes


def test_many_images_at_once_are_decoded_in_batches_and_each_in_its_own_slot(tmp_path):
    paths = [photo(tmp_path / f"{number}.jpg", (64, 48), number % len(SAMPLES)) for number in range(90)]
    sizes: list[int] = []

    def counting(jpegs: list[torch.Tensor], where: torch.device) -> list[torch.Tensor]:
        sizes.append(len(jpegs))
        return decode_jpegs(jpegs, where)

    wanted, found, _ = both(paths, replace(EXACT, size=(32, 32), resize=36), decode=counting)
    near(wanted, found)
    assert sum(sizes) == 90
    assert max(sizes) <= 32


@pytest.mark.parametrize("waiting", [3, 120])
def test_closing_ends_everything_while_images_wait(tmp_path, monkeypatch, waiting):
    path = photo(tmp_path / "x.jpg", (64, 48))
    inside, go_on = threading.Event(), threading.Event()

    def slow(jpegs: list[torch.Tensor], where: torch.device) -> list[torch.Tensor]:
        inside.set()
        assert go_on.wait(60)
        return decode_jpegs(jpegs, where)

    device_decoders = DeviceDecoders(2, DecodeSettings(GPU), CPU, decode=slow)
    slot = np.zeros((224, 224, 3), np.uint8)
    futures = [device_decoders.submit(str(path), slot) for _ in range(waiting)]
    assert inside.wait(60)
    closing = device_decoders._closing.set
    monkeypatch.setattr(device_decoders._closing, "set", lambda: (closing(), go_on.set()))
    device_decoders.close()
    ends = [CancelledError if one.cancelled() else type(one.exception(0)) for one in futures]
    assert set(ends) <= {CancelledError, BbxError, type(None)}
    if waiting == 120:
        # One batch is on the device, one waits for it, two are being read: no more was taken from the disk.
        assert sum(end is CancelledError for end in ends) >= 120 - 2 * 32 - 2
    else:
        assert type(None) in ends  # What was on the device came to its end.
    device_decoders.close()  # twice does no harm
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("bbx-gpu", "bbx-read"))]
    with pytest.raises(BbxError, match="the decoders were closed"):
        device_decoders.submit(str(path), slot)


def test_closing_does_not_wait_for_a_device_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(decoders, "_PATIENCE", 0.3)
    path = photo(tmp_path / "x.jpg", (64, 48))
    inside, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def hanging(jpegs: list[torch.Tensor], where: torch.device) -> list[torch.Tensor]:
        inside.set()
        assert go_on.wait(60)
        ended.set()
        return decode_jpegs(jpegs, where)

    device_decoders = DeviceDecoders(2, DecodeSettings(GPU), CPU, decode=hanging)
    futures = [device_decoders.submit(str(path), np.zeros((224, 224, 3), np.uint8)) for _ in range(100)]
    assert inside.wait(60)
    closing = threading.Thread(target=device_decoders.close, daemon=True)
    closing.start()
    closing.join(30)
    assert not closing.is_alive()
    assert all(one.cancelled() or type(one.exception(0)) is BbxError for one in futures)
    serving = [thread for thread in threading.enumerate() if thread.name == "bbx-gpu"]
    assert all(thread.daemon for thread in serving)
    go_on.set()
    assert ended.wait(60)
    for thread in serving:  # It comes too late, and does no harm.
        thread.join(60)
        assert not thread.is_alive()


def test_an_error_that_nobody_foresaw_is_told_and_nothing_hangs(tmp_path, monkeypatch):
    good, other = photo(tmp_path / "x.jpg", (64, 48)), photo(tmp_path / "x.png", (64, 48))

    def no_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    def exits(job: Job, settings: DecodeSettings) -> bool:
        raise SystemExit(1)

    with DeviceDecoders(1, DecodeSettings(GPU), CPU) as device_decoders:
        with monkeypatch.context() as patch:
            patch.setattr(Decoders, "submit", no_thread)
            told = device_decoders.submit(str(other), np.zeros((224, 224, 3), np.uint8)).exception(60)
        assert "can't start new thread" in str(told)
        narrow = device_decoders.submit(str(good), np.zeros((224, 1, 3), np.uint8))
        assert isinstance(narrow.exception(60), ValueError)
        with monkeypatch.context() as patch:
            patch.setattr(decoders, "look", exits)
            told = device_decoders.submit(str(good), np.zeros((224, 224, 3), np.uint8)).exception(60)
        assert isinstance(told, SystemExit)
        assert not read(device_decoders, [good, other], GPU)[1][0].reason  # and all goes on


def test_what_is_decoded_at_once_counts_the_inputs_too():
    jobs = [Job("", np.empty(0), Future(), size=(640, 480)) for _ in range(32)]
    assert [len(part) for part in batches(jobs, (224, 224))] == [32]
    assert max(len(part) for part in batches(jobs, (4096, 4096))) == 3


def test_an_extraction_is_whole_recorded_resumed_and_recomputed(tmp_path, bbx_cli, on_cpu):
    for number in range(20):
        photo(tmp_path / "in" / f"{number:02}.jpg", (120, 90), number % 3) if number else (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.jpg").write_bytes((tmp_path / "in" / "01.jpg").read_bytes()[:400])
    photo(tmp_path / "in" / "other.png", (90, 120))
    extract(tmp_path / "in", model="toy", output=tmp_path / "exact.h5", batch_size=4, device="cpu")
    summary = extract(
        tmp_path / "in", model="toy", output=tmp_path / "gpu.h5", batch_size=4, decode="gpu", device="cpu"
    )
    assert (summary.done, list(summary.failures)) == (20, ["bad.jpg"])
    assert summary.notes == [LEFT + "2 images other than plain baseline JPEG"]
    with bbx.open(tmp_path / "exact.h5") as exact, bbx.open(tmp_path / "gpu.h5") as gpu:
        assert gpu.run.preprocess.decode == "gpu"
        assert gpu.inputs() == exact.inputs()
        assert dict(gpu.failed) == dict(exact.failed)
        for key in [key for key in gpu.keys if key not in gpu.failed]:
            np.testing.assert_allclose(gpu["stage2", key], exact["stage2", key], atol=0.02)
    refused = bbx_cli("extract", "in", "--model", "toy", "-o", "exact.h5", "--decode", "gpu", "--device", "cpu")
    assert refused.code == 3
    assert "decode" in refused.err
    assert bbx_cli("verify", "gpu.h5", "--recompute", "20", "--device", "cpu").code == 0
    assert bbx_cli("extract", "--like", "gpu.h5", "-o", "again.h5", "--device", "cpu").code == 4
    shown = bbx_cli("show", "in/01.jpg", "--model", "toy", "--decode", "gpu", "-o", "drawn")
    assert shown.code == 0, shown.err
    _, maps = features(load_backbone("toy", decode="gpu"), tmp_path / "in" / "01.jpg")
    with bbx.open(tmp_path / "gpu.h5") as gpu:
        np.testing.assert_allclose(gpu["stage2", "01.jpg"], maps["stage2"], rtol=1e-5, atol=1e-6)


def test_a_run_that_is_stopped_still_says_what_was_left_to_the_cpu(tmp_path, pictures, on_cpu):
    heard: list[Summary] = []
    with pytest.raises(InterruptedRunError):
        extract(pictures, model="toy", output=tmp_path / "x.h5", batch_size=2, decode="gpu", device="cpu",
                progress=heard.append, stop=lambda: signal.SIGTERM)  # fmt: skip
    assert "images other than plain baseline JPEG" in heard[-1].notes[0]


def test_a_file_of_a_gpu_is_not_held_against_the_cpus_pixels(tmp_path, bbx_cli, monkeypatch):
    (tmp_path / "in").mkdir()
    photo(tmp_path / "in" / "0.jpg", (120, 90))
    with monkeypatch.context() as patch:
        patch.setattr(device, "KINDS", ("cpu",))
        extract(tmp_path / "in", model="toy", output=tmp_path / "gpu.h5", decode="gpu", device="cpu")
    assert bbx_cli("verify", "gpu.h5").code == 0
    refused = bbx_cli("verify", "gpu.h5", "--recompute", "1", "--device", "cpu")
    assert refused.code == 3
    said = " ".join(refused.err.split())
    assert "a GPU decoded the pictures of" in said
    assert "--decode gpu needs a CUDA device, and this run is on cpu" in said
    assert "--tolerance 0.1" in refused.err
    allowed = bbx_cli("verify", "gpu.h5", "--recompute", "1", "--device", "cpu", "--tolerance", "0.1")
    assert allowed.code == 0
    tight = bbx_cli("verify", "gpu.h5", "--recompute", "1", "--device", "cpu", "--tolerance", "1e-9")
    assert tight.code == 4
    said = " ".join((tight.out + tight.err).split())
    assert "decoded by a GPU, and now by the CPU" in said
    assert "the GPU's decoder may have left this picture to the CPU, then or now" in said
    again = bbx_cli("extract", "--like", "gpu.h5", "-o", "again.h5", "--device", "cpu")
    assert again.code == 2
    said = " ".join(again.err.split())
    assert "--decode gpu needs a CUDA device" in said
    assert "--decode fast gives nearly the same pixels for less on any device, into an output of its own" in said
    assert bbx_cli("extract", "--like", "gpu.h5", "--decode", "fast", "-o", "again.h5", "--device", "cpu").code == 0
    assert bbx_cli("show", "gpu.h5", "-o", "drawn").code == 0


def test_another_gpu_is_named_where_rows_are_recomputed(tmp_path, on_cpu, monkeypatch):
    (tmp_path / "in").mkdir()
    photo(tmp_path / "in" / "0.jpg", (120, 90))
    extract(tmp_path / "in", model="toy", output=tmp_path / "gpu.h5", decode="gpu", device="cpu")
    same = verify(tmp_path / "gpu.h5", recompute=1, root=tmp_path / "in", device="cpu")
    assert (same.exit_code, same.changes) == (0, ())
    monkeypatch.setattr("bbx.plan.described", lambda where: f"{where} (NVIDIA T4)")
    changes = verify(tmp_path / "gpu.h5", recompute=1, root=tmp_path / "in", device="cpu").changes
    assert changes == (f"the pictures were decoded by {platform.machine()}, and now by NVIDIA T4, "
                       "which may round otherwise",)  # fmt: skip


def test_a_gpu_that_decodes_nothing_is_found_out_before_the_file_is_checked(tmp_path, on_cpu, monkeypatch):
    (tmp_path / "in").mkdir()
    photo(tmp_path / "in" / "0.jpg", (120, 90))
    extract(tmp_path / "in", model="toy", output=tmp_path / "gpu.h5", decode="gpu", device="cpu")

    def not_built(jpegs: list[torch.Tensor], where: torch.device) -> list[torch.Tensor]:
        raise RuntimeError("not compiled with nvJPEG support")

    monkeypatch.setattr(device, "decode_jpegs", not_built)
    device._try_out.cache_clear()
    heard: list[int] = []
    again = partial(verify, tmp_path / "gpu.h5", recompute=1, root=tmp_path / "in", device="cpu",
                    progress=lambda *_: heard.append(1))  # fmt: skip
    with pytest.raises(
        StartError, match=r"a GPU decoded the pictures of .*: cpu decodes no JPEG: not compiled"
    ) as told:
        again()
    assert "--tolerance 0.1" in told.value.hint
    assert not heard
    verdict = again(tolerance=0.1)
    assert verdict.exit_code == 0
    assert verdict.changes == ("the pictures were decoded by a GPU, and now by the CPU, exactly",)


def test_without_a_cuda_device_it_is_refused_at_once_with_what_to_type(tmp_path, bbx_cli, picture, monkeypatch):
    picture(tmp_path / "in" / "0.jpg")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for words in (("extract", "in", "--model", "toy", "-o", "x.h5"), ("show", "in/0.jpg", "--model", "toy")):
        refused = bbx_cli(*words, "--decode", "gpu")
        assert refused.code == 2, refused.err
        said = " ".join(refused.err.split())
        assert "--decode gpu needs a CUDA device, and this run is on cpu" in said
        assert "--decode fast" in said
    assert not list(tmp_path.glob("x.h5*"))
    with pytest.raises(UsageError, match="there is no decode='gpu'"):
        AutoImageProcessor.from_pretrained("toy", decode="gpu")


def test_what_the_device_cannot_do_is_refused_before_the_first_image(on_cpu):
    check(GPU, CPU)
    check(EXACT, torch.device("meta"))
    with pytest.raises(UsageError, match="these weights want lanczos"):
        check(replace(GPU, interpolation="lanczos"), CPU)
    with pytest.raises(UsageError, match="does not go with ViTImageProcessor of transformers"):
        check(replace(GPU, processor=json.dumps({"image_processor_type": "ViTImageProcessor"})), CPU)
    with pytest.raises(UsageError, match="--deterministic does not go with --decode gpu"):
        extract("absent", model="toy", decode="gpu", device="cpu", deterministic=True)
    with decoders_for(1, DecodeSettings(EXACT), CPU) as decoders:
        assert type(decoders) is Decoders


@pytest.mark.parametrize(
    ("made", "words"),
    [(RuntimeError("not compiled with nvJPEG support\nmore"), "cpu decodes no JPEG: not compiled with nvJPEG support"),
     ("L", "other pixels than Pillow"), ("4:4:4", "other pixels than Pillow"), ("4:2:0", "other pixels than Pillow")],
)  # fmt: skip
def test_a_torchvision_that_cannot_is_found_out_at_the_start(on_cpu, monkeypatch, made, words):
    def kind(jpeg: torch.Tensor) -> str:
        image = Image.open(io.BytesIO(jpeg.numpy().tobytes()))
        assert all(side % 8 for side in image.size)
        return {(1, "L"): "L", (1, "RGB"): "4:4:4", (2, "RGB"): "4:2:0"}[image.layer[0][1], image.mode]

    def decode(jpegs: list[torch.Tensor], where: torch.device) -> list[torch.Tensor]:
        if isinstance(made, RuntimeError):
            raise made
        pictures = decode_jpegs(jpegs, where)
        return [255 - one if kind(jpeg) == made else one for jpeg, one in zip(jpegs, pictures, strict=True)]

    monkeypatch.setattr(device, "decode_jpegs", decode)
    device._try_out.cache_clear()
    with pytest.raises(StartError, match=words) as told:
        decoders_for(1, DecodeSettings(GPU), CPU)
    assert "--decode fast" in told.value.hint


def test_bench_measures_it_where_a_device_decodes(bbx_cli, on_cpu):
    ran = bbx_cli("bench", "toy", "--stages", "stem", "--size", "32", "--device", "cpu")
    assert ran.code == 0, ran.err
    assert "--decode gpu" in ran.out


def test_the_plan_measures_what_will_decode(tmp_path, on_cpu, monkeypatch):
    (tmp_path / "in").mkdir()
    for number in range(3):
        photo(tmp_path / "in" / f"{number}.jpg", (64, 48), number)
    monkeypatch.setattr("bbx.runner.LONG", 1)
    plans: list[Plan] = []
    extract(tmp_path / "in", model="toy", output=tmp_path / "x.h5", decode="gpu", dry_run=True, on_plan=plans.append,
            device="cpu")  # fmt: skip
    assert plans[0].rates is not None
    assert plans[0].rates.decode > 0


class Noting:
    """In the place of decoders: it notes what it is asked for."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.slots: dict[int, int] = {}

    def __enter__(self) -> Noting:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, path: str, slot: np.ndarray) -> Future[Answer]:
        self.paths.append(path)
        self.slots[slot.ctypes.data] = slot.nbytes
        done: Future[Answer] = Future()
        done.set_result(Answer("", InputFile(), 0.0))
        return done


@pytest.mark.parametrize("decode", ["exact", "gpu"])
def test_measuring_takes_little_memory_and_several_images_for_each_worker(tmp_path, picture, monkeypatch, decode):
    noting = Noting()
    monkeypatch.setattr("bbx.rates.decoders_for", lambda *_: noting)
    picture(tmp_path / "0.png")
    for number in range(1, 300):
        (tmp_path / f"{number}.png").symlink_to("0.png")
    images = find_images([tmp_path])
    assert len(sample(images)) == 32
    paths = sample(images, 64)
    assert len(set(paths)) == len(paths) == 256
    decode_rate(paths, DecodeSettings(replace(EXACT, decode=decode, size=(2048, 2048))), 64, device=CPU)
    assert len(noting.paths) == 64 + 256 * (8 if decode == "gpu" else 1)
    assert sum(noting.slots.values()) <= 8 * 2048 * 2048 * 3


def test_it_is_part_of_the_run():
    exact, fast, gpu = (RunSpec("m", "d", (), replace(EXACT, decode=word)) for word in ("exact", "fast", "gpu"))
    assert RunSpec.from_json(gpu.to_json()) == gpu != exact
    assert len({exact.sha256, fast.sha256, gpu.sha256}) == 3
    assert exact.differences(gpu) == [("preprocess.decode", "exact", "gpu")]
    assert GPU.describe() == EXACT.describe() + ", decode gpu"


def test_a_device_that_has_no_stream_left_leaves_no_thread(monkeypatch):
    def none(_device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("torch.cuda.Stream", none)
    before = set(threading.enumerate())
    with pytest.raises(torch.OutOfMemoryError):
        DeviceDecoders(1, DecodeSettings(GPU), torch.device("cuda"))
    assert set(threading.enumerate()) <= before
