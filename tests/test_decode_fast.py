"""`--decode fast`: nearly the pixels of `exact`, within what is stated here, and recorded as what it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

import bbx
from bbx.errors import ImageError, UsageError
from bbx.images import fit, read_image
from bbx.images.read import decode
from bbx.providers import load_backbone
from bbx.runner import features
from bbx.spec import Preprocess, RunSpec

SAMPLES = sorted(path for path in (Path(__file__).parent.parent / "sample_images").iterdir() if path.suffix != ".md")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EXACT = Preprocess((224, 224), 256, "bicubic", MEAN, STD)
FAST = replace(EXACT, decode="fast")
# Of 255, on photographs: where nothing but the resize is cheaper, and where a JPEG is decoded at a fraction.
RESIZED, DRAFTED = 1, 12


def photo(path: Path, size: tuple[int, int], sample: int = 0, orientation: int = 1) -> Path:
    """A sample picture scaled to `size` (width, height), with grain, as a file of the suffix's kind."""
    image = Image.open(SAMPLES[sample]).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    grain = np.random.default_rng(sample).normal(0, 3, (size[1], size[0], 1))
    image = Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(path, exif=exif, **({"quality": 90} if path.suffix == ".jpg" else {"compress_level": 1}))
    return path


def apart(path: Path, exact: Preprocess = EXACT) -> np.ndarray:
    """What fast differs by from exact, in steps of 255."""
    one, other = (read_image(path, replace(exact, decode=word)).astype(int) for word in ("exact", "fast"))
    return np.abs(one - other)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_sample_pictures_differ_by_one_step_in_one_value_of_a_thousand(path, interpolation):
    found = apart(path, replace(EXACT, interpolation=interpolation))
    assert found.max() <= RESIZED
    assert found.mean() < 1e-3


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(1920, 1080), (1079, 1923), (2048, 2048)])
def test_a_large_jpeg_is_decoded_at_a_fraction_and_differs_a_little(tmp_path, size, interpolation):
    found = apart(photo(tmp_path / "x.jpg", size), replace(EXACT, interpolation=interpolation))
    assert 0 < found.max() <= DRAFTED
    assert 0.01 < found.mean() < 0.6


def test_a_large_picture_of_another_kind_is_averaged_before(tmp_path):
    found = apart(photo(tmp_path / "x.png", (1920, 1080)))
    assert 0 < found.max() <= DRAFTED


@pytest.mark.parametrize(("suffix", "mode"), [(".jpg", "crop"), (".jpg", "squash"), (".jpg", "pad"), (".png", "crop")])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_and_mode_shows_the_same_place(tmp_path, suffix, orientation, mode):
    path = photo(tmp_path / f"x{suffix}", (1021, 767), sample=1, orientation=orientation)
    for exact in (replace(EXACT, mode=mode), replace(EXACT, size=(160, 320), mode=mode, resize=172)):
        found = apart(path, exact)
        assert found.max() <= 2 * DRAFTED
        assert found.mean() < 0.6


@pytest.mark.parametrize(
    ("size", "format_", "factor"),
    [((4000, 3000), "JPEG", 4), ((768, 768), "JPEG", 2), ((767, 900), "JPEG", 1), ((3072, 9000), "MPO", 8),
     ((4000, 3000), "PNG", 1)],
)  # fmt: skip
def test_a_fraction_is_never_below_one_and_a_half_times_what_the_resize_needs(size, format_, factor):
    image = Image.new("RGB", size)
    image.format = format_
    assert fit.draft(image, None, FAST) == fit.Draft(size, factor)


def test_an_image_processor_of_transformers_gets_a_fraction_of_the_same_aspect():
    image = Image.new("RGB", (4000, 3004))
    image.format = "JPEG"
    assert fit.draft(image, None, replace(FAST, size=(64, 64), resize=64, processor="{}")).factor == 4
    assert fit.draft(image, None, replace(FAST, size=(64, 64), resize=64)).factor == 8
    image.format = "PNG"
    assert fit.draft(image, None, replace(FAST, processor="{}")).factor == 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (31, 33), (256, 256), (224, 224), (225, 223), (3000, 40)])
def test_odd_sizes_give_whole_inputs(tmp_path, shape):
    path = tmp_path / "x.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape[::-1], 3), np.uint8)).save(path)
    for mode in ("crop", "squash", "pad"):
        assert apart(path, replace(EXACT, size=(32, 32), resize=36, mode=mode)).max() <= 60  # noise is the worst case


def test_a_bad_file_has_the_same_reason(tmp_path):
    whole = photo(tmp_path / "x.jpg", (1600, 1200)).read_bytes()
    for number, length in enumerate((10, 300, 5_000, len(whole) // 2, len(whole) - 9)):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(whole[:length])
        assert decode(path, FAST).reason == decode(path, EXACT).reason != ""
    narrow = tmp_path / "narrow.jpg"
    Image.new("RGB", (1, 10_000)).save(narrow)
    assert decode(narrow, FAST).reason == decode(narrow, EXACT).reason
    with pytest.raises(ImageError, match="too long and narrow"):
        read_image(narrow, FAST)


@pytest.mark.parametrize("model", ["torchvision:resnet50", "torchvision:swin_t", "efficientnet-lite0"])
def test_every_stage_stays_near_exact(tmp_path, model):
    path = photo(tmp_path / "x.jpg", (1600, 1200), sample=2)
    weights = "auto" if "lite0" in model else "random"
    exact = load_backbone(model, weights=weights, stages="all")
    fast = load_backbone(model, weights=weights, stages="all", decode="fast")
    (_, one), (_, other) = features(exact, path), features(fast, path)
    for stage, values in one.items():
        relative = np.abs(values - other[stage]).mean() / np.abs(values).mean()
        assert 0 < relative < TOLERANCE, stage


TOLERANCE = 0.1
"""Mean difference of a stage over its mean size, for a JPEG decoded at a fraction."""


def test_older_runs_keep_their_digest_and_a_fast_one_says_so():
    exact = RunSpec("m", "d", (), EXACT)
    fast = replace(exact, preprocess=FAST)
    assert "decode" not in json.loads(exact.to_json())["preprocess"]
    assert RunSpec.from_json(fast.to_json()) == fast != exact
    assert fast.sha256 != exact.sha256
    assert exact.differences(fast) == [("preprocess.decode", "exact", "fast")]
    assert FAST.describe() == EXACT.describe() + ", decode fast"
    with pytest.raises(bbx.BbxError, match="unknown decode"):
        RunSpec.from_json(fast.to_json().replace('"fast"', '"quick"'))


def test_the_command_records_repeats_and_recomputes_it(tmp_path, bbx_cli):
    (tmp_path / "in").mkdir()
    for number in range(2):
        photo(tmp_path / "in" / f"{number}.jpg", (640, 480), number)
    for name, words in (("exact.h5", ()), ("fast.h5", ("--decode", "fast"))):
        assert bbx_cli("extract", "in", "--model", "toy", "-o", name, *words).code == 0
    assert bbx_cli("extract", "--like", "fast.h5", "-o", "again.h5").code == 0
    with bbx.open(tmp_path / "exact.h5") as exact, bbx.open(tmp_path / "fast.h5") as fast:
        with bbx.open(tmp_path / "again.h5") as again:
            assert fast.run.preprocess.decode == again.run.preprocess.decode == "fast"
            np.testing.assert_array_equal(fast["stage2"][:], again["stage2"][:])
        assert not np.array_equal(exact["stage2"][:], fast["stage2"][:])
    assert bbx_cli("verify", "fast.h5", "--recompute", "2").code == 0
    refused = bbx_cli("extract", "in", "--model", "toy", "-o", "exact.h5", "--decode", "fast")
    assert refused.code == 3
    assert "decode" in refused.err
    assert bbx_cli("show", "in/0.jpg", "--model", "toy", "--decode", "fast", "-o", "drawn").code == 0
    assert bbx_cli("extract", "in", "--model", "toy", "--decode", "quick").code == 2
    with pytest.raises(UsageError, match="--decode cannot be 'quick'"):
        load_backbone("toy", decode="quick")


def test_exact_leaves_out_only_what_changes_no_bit():
    random = np.random.default_rng(0)
    for _ in range(400):
        width, height, size = (int(value) for value in random.integers(1, 150, 3))
        resize = int(2 ** random.integers(1, 8))
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
        preprocess = Preprocess((size, size), resize, str(random.choice(["bilinear", "bicubic", "lanczos"])), MEAN, STD)
        down, across = fit._scaled(width, height, preprocess)
        whole = image.resize((across, down), fit.resampling(preprocess))
        left, top = round(max(0, across - size) / 2), round(max(0, down - size) / 2)
        cut = whole.crop((left, top, left + min(size, across), top + min(size, down)))
        np.testing.assert_array_equal(fit.exactly(image, preprocess), fit._filled(cut, preprocess))
