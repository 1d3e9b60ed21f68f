"""What the network sees of a file: torchvision's own pixels, upright; and a plain reason where a file is bad."""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from bbx.errors import ImageError, UsageError
from bbx.images import prepare, read_image
from bbx.spec import Preprocess, ResizeMode

SAMPLES = sorted(path for path in (Path(__file__).parent.parent / "sample_images").iterdir() if path.suffix != ".md")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESS = Preprocess((32, 32), 36, "bilinear", MEAN, STD)


def uncut(size: tuple[int, int], mode: ResizeMode = "squash") -> Preprocess:
    return PREPROCESS.override(size=size, mode=mode)


SMALL = uncut((6, 8))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), np.uint8))


def picture(width: int = 60, height: int = 40) -> Image.Image:
    """Smooth, with four different corners, so that lossy formats keep it and no turn looks like another."""
    y, x = np.mgrid[0:height, 0:width]
    values = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1)
    return Image.fromarray(values.astype(np.uint8))


def pixels(path: Path, preprocess: Preprocess | None = None) -> np.ndarray:
    """All of the file's own pixels, unless `preprocess` says otherwise."""
    if preprocess is None:
        with Image.open(path) as image:
            size = image.size
        preprocess = uncut(size[::-1])
    return read_image(path, preprocess)


def reason(path: str | os.PathLike[str]) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(path, PREPROCESS)
    text = caught.value.message
    assert text == text.strip()
    assert text.isascii()
    assert "\n" not in text
    assert 0 < len(text) <= 200
    assert os.fspath(path) not in text
    assert caught.value.__context__ is None, "would keep the image in memory"
    return text


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


# Bit-equal to torchvision


@functools.cache
def sample(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def library(image: Image.Image, size: int, resize: int, interpolation: str) -> torch.Tensor:
    filter_name = InterpolationMode(interpolation)
    return ImageClassification(crop_size=size, resize_size=resize, interpolation=filter_name)(image)


def ours(image: Image.Image, size: int, resize: int, interpolation: str) -> torch.Tensor:
    array = prepare(image, Preprocess((size, size), resize, interpolation, MEAN, STD))
    assert array.shape == (size, size, 3)
    assert array.dtype == np.uint8
    tensor = torch.from_numpy(array).permute(2, 0, 1).to(torch.float32).div(255)
    return (tensor - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "resize"), [(224, 256), (224, 232), (97, 100), (64, 48)])
@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_real_pictures_are_bit_equal_to_the_library(path, size, resize, interpolation):
    image = sample(path)
    assert torch.equal(ours(image, size, resize, interpolation), library(image, size, resize, interpolation))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos", "box", "hamming"])
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 7), (7, 1), (2, 3), (31, 33), (36, 36), (35, 36), (37, 36), (32, 32), (101, 67), (67, 101), (500, 36),
     (36, 501), (301, 20), (20, 333), (3, 200)],
)  # fmt: skip
def test_odd_sizes_are_bit_equal_to_the_library(shape, interpolation):
    image = noise(*shape)
    for size, resize in ((32, 36), (33, 36), (32, 37), (40, 36), (41, 36), (1, 1)):
        assert torch.equal(ours(image, size, resize, interpolation), library(image, size, resize, interpolation))


def test_many_random_shapes_are_bit_equal_to_the_library():
    random = np.random.default_rng(0)
    for _ in range(150):
        width, height, size, resize = (int(value) for value in random.integers(1, 70, 4))
        image = noise(width, height)
        assert torch.equal(ours(image, size, resize, "bilinear"), library(image, size, resize, "bilinear"))


def test_the_file_gives_what_the_opened_image_gives():
    path = next(path for path in SAMPLES if path.suffix == ".jpg")
    with Image.open(path) as image:
        expected = prepare(image, PREPROCESS)
    assert np.array_equal(read_image(path, PREPROCESS), expected)


def test_the_result_goes_into_the_given_array():
    batch = np.zeros((3, 32, 32, 3), np.uint8)
    out = read_image(SAMPLES[0], PREPROCESS, batch[1])
    assert np.shares_memory(out, batch)
    assert np.array_equal(batch[1], read_image(str(SAMPLES[0]), PREPROCESS))
    assert not batch[[0, 2]].any()


def test_a_bad_image_leaves_the_given_array_alone(tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(SAMPLES[-1].read_bytes()[:5000])
    out = np.full((32, 32, 3), 7, np.uint8)
    with pytest.raises(ImageError):
        read_image(path, PREPROCESS, out)
    assert (out == 7).all()


def test_an_array_of_another_shape_is_the_callers_error():
    with pytest.raises(ValueError, match="broadcast"):
        read_image(SAMPLES[0], PREPROCESS, np.zeros((31, 32, 3), np.uint8))


def test_an_unknown_interpolation_is_the_callers_error():
    with pytest.raises(UsageError, match="cubist") as caught:
        read_image(SAMPLES[0], replace(PREPROCESS, interpolation="cubist"))
    assert "bicubic" in caught.value.hint


def test_threads_read_what_one_reads_alone():
    alone = [read_image(path, PREPROCESS) for path in SAMPLES]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda path: read_image(path, PREPROCESS), SAMPLES * 6))
    assert all(np.array_equal(array, alone[row % len(SAMPLES)]) for row, array in enumerate(together))


# The other modes


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (1, 50), (50, 1), (24, 48)])
def test_a_crop_that_is_no_square_covers_the_enlarged_box_and_takes_its_centre(shape):
    image = noise(*shape)
    array = prepare(image, replace(PREPROCESS, size=(24, 48), resize=30))
    scale = max(30 / image.height, 60 / image.width)
    width, height = int(image.width * scale + 1e-9), int(image.height * scale + 1e-9)
    left, top = round((width - 48) / 2), round((height - 24) / 2)
    expected = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + 48, top + 24))
    assert np.array_equal(array, np.asarray(expected))


@pytest.mark.parametrize("shape", [(60, 40), (1, 1), (1, 3000), (3000, 1), (48, 24)])
def test_squash_scales_straight_to_the_size(shape):
    array = prepare(noise(*shape), uncut((24, 48)))
    assert np.array_equal(array, np.asarray(noise(*shape).resize((48, 24), Image.Resampling.BILINEAR)))


@pytest.mark.parametrize("shape", [(60, 40), (1, 1), (48, 24)])
def test_squash_at_more_than_the_size_cuts_the_centre(shape):
    array = prepare(noise(*shape), replace(PREPROCESS, size=(24, 48), resize=30, mode="squash"))
    scaled = noise(*shape).resize((60, 30), Image.Resampling.BILINEAR)
    assert np.array_equal(array, np.asarray(scaled.crop((6, 3, 54, 27))))


def test_a_whole_picture_that_is_asked_for_is_whole_and_what_the_weights_cut_is_said():
    own = replace(PREPROCESS, size=(192, 192), resize=213, mode="squash")
    assert "resize to 213x213 (bilinear), aspect ignored, centre crop 192x192" in own.describe()
    assert own.override(size=(96, 96)).box == (106, 106)
    for mode, words in (("squash", "resize to 192x192 (bilinear), aspect"), ("pad", "resize into 192x192 (bilinear)")):
        asked = own.override(mode=mode)
        assert (asked.box, asked.size) == ((192, 192), (192, 192))
        assert words in asked.describe()
        assert "crop" not in asked.describe()


def test_pad_at_more_than_the_size_cuts_what_is_outside_and_fills_what_is_not_reached():
    array = prepare(noise(40, 100), replace(PREPROCESS, size=(32, 32), resize=40, mode="pad"))
    scaled = noise(40, 100).resize((16, 40), Image.Resampling.BILINEAR)
    expected = Image.new("RGB", (32, 32), (124, 116, 104))
    expected.paste(scaled.crop((0, 4, 16, 36)), (8, 0))
    assert np.array_equal(array, np.asarray(expected))


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (48, 24), (10, 10), (47, 23), (300, 7)])
def test_pad_shows_the_whole_picture_amid_the_mean(shape):
    array = prepare(noise(*shape), uncut((24, 48), "pad"))
    assert array.shape == (24, 48, 3)
    inner = ImageOps.contain(noise(*shape), (48, 24), Image.Resampling.BILINEAR)
    left, top = (48 - inner.width) // 2, (24 - inner.height) // 2
    expected = Image.new("RGB", (48, 24), (124, 116, 104))
    expected.paste(inner, (left, top))
    assert np.array_equal(array, np.asarray(expected))


@pytest.mark.parametrize("shape", [(1, 10_000), (10_000, 1)])
def test_a_line_fits_squash_and_pad_but_is_too_narrow_to_crop_at_the_usual_size(shape):
    usual = Preprocess((224, 224), 256, "bilinear", MEAN, STD)
    for mode in ("squash", "pad"):
        assert prepare(noise(*shape), usual.override(mode=mode)).shape == (224, 224, 3)
    with pytest.raises(ImageError, match="too long and narrow"):
        prepare(noise(*shape), usual)
    assert prepare(noise(*shape), replace(usual, size=(28, 28), resize=32)).shape == (28, 28, 3)


# Upright


def tagged(path: Path, image: Image.Image, orientation: int, **options) -> Path:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return saved(path, image, exif=exif, **options)


# What turns an upright picture into the one that a camera held that way would store.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".jpg"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_gives_the_upright_picture(tmp_path, orientation, suffix):
    stored = picture() if STORED[orientation] is None else picture().transpose(STORED[orientation])
    options = {".webp": {"lossless": True}, ".jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    path = tagged(tmp_path / f"x{suffix}", stored, orientation, **options)
    array = read_image(path, uncut((40, 60)))
    with Image.open(path) as image:
        assert np.array_equal(array, np.asarray(ImageOps.exif_transpose(image).convert("RGB")))
    assert np.abs(array.astype(int) - np.asarray(picture())).max() <= (6 if suffix == ".jpg" else 0)
    assert np.array_equal(read_image(path, PREPROCESS), prepare(Image.fromarray(array), PREPROCESS))


def test_orientation_may_be_ignored(tmp_path):
    path = tagged(tmp_path / "x.png", picture(), 6)
    ignoring = replace(uncut((40, 60)), exif="ignore")
    assert np.array_equal(read_image(path, ignoring), np.asarray(picture()))


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"rubbish", b"Exif\0\0MM\0*\0\0"])
def test_broken_exif_counts_as_none(tmp_path, exif):
    path = saved(tmp_path / "x.webp", picture(), exif=exif, lossless=True)
    assert np.array_equal(pixels(path), np.asarray(picture()))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path, orientation):
    path = tagged(tmp_path / "x.png", picture(), orientation)
    assert np.array_equal(pixels(path), np.asarray(picture()))


# Every kind of picture


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", ".png"), ("1", ".png"), ("LA", ".png"), ("RGBA", ".png"), ("P", ".png"), ("P", ".gif"), ("L", ".jpg"),
     ("CMYK", ".jpg"), ("CMYK", ".tif"), ("YCbCr", ".tif"), ("LAB", ".tif"), ("RGBA", ".webp"), ("RGB", ".avif"),
     ("1", ".tif"), ("P", ".bmp"), ("RGB", ".jp2"), ("RGB", ".ppm"), ("1", ".pbm"), ("RGB", ".tga"), ("RGB", ".qoi"),
     ("RGB", ".ico"), ("RGB", ".sgi"), ("RGB", ".dds"), ("RGB", ".pcx"), ("1", ".xbm"), ("1", ".msp")],
)  # fmt: skip
def test_every_mode_becomes_rgb_as_pillow_converts_it(tmp_path, mode, suffix):
    image = picture().convert("RGB").convert(mode) if mode != "LA" else picture().convert("L").convert("LA")
    path = saved(tmp_path / f"x{suffix}", image)
    with Image.open(path) as opened:
        assert np.array_equal(pixels(path), np.asarray(opened.convert("RGB")))


@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_a_palette_with_transparency_gives_its_colours_without_a_warning(tmp_path, transparency):
    image = picture().quantize(256)
    path = saved(tmp_path / "x.png", image, transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        array = pixels(path)
        with Image.open(path) as opened:
            assert np.array_equal(prepare(opened, uncut((40, 60))), array)
            assert "transparency" in opened.info, "prepare changes nothing of its input"
    assert np.array_equal(array, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm", ".jp2"])
def test_16_bit_grey_gives_its_high_byte(tmp_path, suffix):
    values = np.linspace(0, 65535, 40 * 60).astype(np.uint16).reshape(40, 60)
    path = saved(tmp_path / f"x{suffix}", Image.fromarray(values))
    array = pixels(path)
    assert np.array_equal(array, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, -1))


def test_16_bit_grey_of_either_byte_order(tmp_path):
    values = np.arange(0, 48000, 1000, dtype=">u2").reshape(6, 8)
    image = Image.frombytes("I;16B", (8, 6), values.tobytes())
    assert np.array_equal(prepare(image, SMALL)[..., 0], values >> 8)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


def test_16_bit_colour_gives_its_high_byte_too(tmp_path):
    values = np.arange(0, 65535, 65535 // (6 * 8 * 3), dtype=">u2")[: 6 * 8 * 3].reshape(6, 8, 3)
    (tmp_path / "x.png").write_bytes(png(8, 6, 16, 2, b"".join(b"\0" + row.tobytes() for row in values)))
    assert np.array_equal(read_image(tmp_path / "x.png", SMALL), values >> 8)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_32_bit_values_within_a_byte_pass_as_pillow_has_them(tmp_path, kind):
    image = Image.fromarray(np.arange(48, dtype=kind).reshape(6, 8) * 5)
    path = saved(tmp_path / "x.tif", image)
    assert np.array_equal(read_image(path, SMALL), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("value", [-1, 256, 70000, -0.5, 255.5, float("nan"), float("inf")])
def test_32_bit_values_of_another_range_have_no_mapping(tmp_path, value):
    values = np.zeros((6, 8), np.float32 if isinstance(value, float) else np.int32)
    values[3, 4] = value
    path = saved(tmp_path / "x.tif", Image.fromarray(values))
    assert "no defined mapping to 8 bits" in reason(path)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif", ".mpo", ".avif"])
def test_of_several_frames_the_first_counts(tmp_path, suffix):
    first, second = Image.new("RGB", (60, 40), "red"), Image.new("RGB", (60, 40), "blue")
    options = {".webp": {"lossless": True}, ".gif": {"duration": 9}, ".avif": {"quality": 100}}.get(suffix, {})
    path = saved(tmp_path / f"x{suffix}", first, save_all=True, append_images=[second], **options)
    assert np.abs(pixels(path).astype(int) - (255, 0, 0)).max() <= 3


def test_progressive_jpeg_and_icc_profiles_are_decoded_as_pillow_does(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = saved(tmp_path / "x.jpg", picture(), progressive=True, icc_profile=profile)
    with Image.open(path) as image:
        assert image.info["progressive"]
        assert image.info["icc_profile"]
        assert np.array_equal(pixels(path), np.asarray(image))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_wrong_suffix_does_not_matter(tmp_path, kind):
    for suffix in (".jpg", ".png", ".tga", ".gif"):
        path = saved(tmp_path / f"{kind}{suffix}", picture(), format=kind)
        assert pixels(path).shape == (40, 60, 3)


# Bad files


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"", "zero bytes"),
     (b"<!DOCTYPE html>\n<html>", "not an image (starts with '<!DOCTYPE html>')"),
     (b"\xef\xbb\xbf\n{\"error\": \"not found\"}", "not an image (starts with '{\"error\": \"not found\"}')"),
     (b"just text", "not an image (starts with 'just text')"),
     (bytes(300), "not an image (starts with bytes 00 00 00 00 00 00 00 00)"),
     (b"\n", "not an image (starts with bytes 0a)"),
     (b"\x89HDF\r\n\x1a\n" + bytes(99), "not an image (starts with bytes 89 48 44 46 0d 0a 1a 0a)"),
     (b"\x89PNG\r\n\x1a\n", "damaged or truncated PNG (its header cannot be read)"),
     (b"\xff\xd8\xff\xe0", "damaged or truncated JPEG (its header cannot be read)"),
     (b"P5 99999 99999 255\n", "too large (9999800001 pixels, limit 178956970)"),
     (b"P6 abc 3 255\n", "damaged or truncated (ValueError: invalid literal for int() with base 10: b'abc')"),
     (b"BM" + bytes(12) + b"\x29" + bytes(60), "damaged or truncated (Unsupported BMP header type (41))")],
)  # fmt: skip
def test_a_bad_file_has_a_plain_reason(tmp_path, data, expected):
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    assert reason(path) == expected


FORMATS = {
    "JPEG": {},
    "PNG": {},
    "GIF": {},
    "WEBP": {},
    "TIFF": {"compression": "tiff_lzw"},
    "BMP": {},
    "AVIF": {},
    "JPEG2000": {},
    "QOI": {},
    "PPM": {},
    "TGA": {},
    "ICO": {},
    "DDS": {},
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_fails_wherever_it_is_cut(tmp_path, kind):
    whole = io.BytesIO()
    noise(50, 40).save(whole, kind, **FORMATS[kind])
    data = whole.getvalue()
    path = tmp_path / "x.jpg"
    for cut in sorted({*range(1, 40), *range(40, len(data) * 9 // 10, max(1, len(data) // 20))}):
        path.write_bytes(data[:cut])
        first = reason(path)
        assert first == reason(path)
        assert any(word in first for word in ("truncated", "not an image", "damaged")), first


def test_a_file_cut_in_its_pixels_is_called_truncated(tmp_path):
    path = tmp_path / "x"
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "QOI", "PPM"):
        whole = io.BytesIO()
        noise(50, 40).save(whole, kind)
        path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        assert reason(path).startswith("truncated ("), kind


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_bytes_give_pixels_or_a_reason_never_a_crash(tmp_path, kind):
    whole = io.BytesIO()
    noise(20, 16).save(whole, kind, **FORMATS[kind])
    random = np.random.default_rng(0)
    path = tmp_path / "x.jpg"
    for _ in range(40):
        data = bytearray(whole.getvalue())
        for place in random.integers(0, min(len(data), 600), 4):
            data[place] = random.integers(0, 256)
        path.write_bytes(data)
        try:
            assert read_image(path, PREPROCESS).shape == (32, 32, 3)
            continue
        except ImageError as error:
            first = error.message
        assert reason(path) == first


@pytest.mark.parametrize("side", [11_000, 14_000, 60_000])
def test_pillows_bomb_limit_is_kept_and_its_warning_is_not_heard(tmp_path, side):
    path = tmp_path / "x.png"
    path.write_bytes(png(side, side, 1, 0, b""))
    first = reason(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = reason(path)
    assert text == first
    assert text.startswith(f"too large ({side * side} pixels, limit 178956970)" if side > 13_400 else "truncated (")


def test_compressed_text_that_explodes_is_a_reason(tmp_path):
    bomb = png_chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(1 << 21)))
    (tmp_path / "x.png").write_bytes(png(1, 1, 8, 0, b"\0\0", bomb))
    assert "Decompressed data too large" in reason(tmp_path / "x.png")


def test_what_is_no_file_has_a_plain_reason(tmp_path):
    assert reason(tmp_path / "gone.jpg") == "no such file"
    assert reason(tmp_path / "gone" / "x.jpg") == "no such file"
    (tmp_path / "folder.jpg").mkdir()
    assert reason(tmp_path / "folder.jpg") == "a folder, not a file"
    assert reason("/dev/zero") == "a device, not a regular file"
    assert reason(tmp_path / ("x" * 300)) == "the file name is too long"
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    assert reason(tmp_path / "gone.jpg") == "no such file"
    (tmp_path / "file").write_bytes(b"x")
    assert reason(tmp_path / "file" / "x.jpg") == "no such file"
    assert "null" in reason(tmp_path / "x\0.jpg")


def test_a_name_that_occurs_in_its_reason_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("e").write_bytes(b"")
    with pytest.raises(ImageError, match=r"^zero bytes$"):
        read_image("e", PREPROCESS)


def test_a_fifo_is_never_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "x.jpg")
    assert reason(tmp_path / "x.jpg") == "a FIFO, not a regular file"
    # Exchanged between the look and the open.
    regular = os.stat(SAMPLES[0])  # noqa: PTH116 - the replaced method is Path.stat
    monkeypatch.setattr(Path, "stat", lambda self: regular)
    with pytest.raises(ImageError, match="a FIFO, not a regular file"):
        read_image(tmp_path / "x.jpg", PREPROCESS)


@pytest.mark.parametrize(
    ("error", "expected"),
    [(PermissionError(13, "Permission denied"), "permission denied"),
     (FileNotFoundError(2, "vanished"), "no such file"),
     (OSError(5, "whatever the C library says"), "cannot be read (Input/output error)"),
     (OSError(116, "stale"), f"cannot be read ({os.strerror(116)})")],
)  # fmt: skip
def test_an_open_that_fails_has_a_plain_reason(monkeypatch, error, expected):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr(os, "open", failing)
    assert reason(SAMPLES[0]) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [(MemoryError(), "out of memory while decoding"),
     (EOFError("no more images in GIF file"), "truncated (no more images in GIF file)"),
     (zlib.error("Error -3 while decompressing data"),
      "damaged or truncated (error: Error -3 while decompressing data)"),
     (struct.error(""), "damaged or truncated (error: error)"),
     (KeyError("exif"), "damaged or truncated (KeyError: 'exif')"),
     (RecursionError("deep\n  \x1bdown"), "damaged or truncated (RecursionError: deep down)"),
     (OSError("cannot use <_io.BufferedReader name=5>"), "damaged or truncated (cannot use the file)"),
     (ValueError("é" * 400), "damaged or truncated (ValueError: " + ("\\xe9" * 60)[:163] + "..."),
    ],
)  # fmt: skip
def test_whatever_a_plugin_throws_becomes_a_reason(monkeypatch, error, expected):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr(Image.Image, "load", failing)
    with pytest.raises(ImageError) as caught:
        read_image(next(path for path in SAMPLES if path.suffix == ".jpg"), PREPROCESS)
    assert caught.value.message == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_not_a_bad_image(monkeypatch, error):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr(Image, "open", failing)
    with pytest.raises(error):
        read_image(SAMPLES[0], PREPROCESS)


def test_no_file_stays_open(tmp_path):
    bad = tmp_path / "x.jpg"
    bad.write_bytes(SAMPLES[-1].read_bytes()[:5000])
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count, not paths
    gc.disable()
    try:
        for _ in range(5):
            reason(bad)
            read_image(SAMPLES[0], PREPROCESS)
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - a count, not paths
    finally:
        gc.enable()


def test_nothing_is_printed(tmp_path):
    (tmp_path / "x.jpg").write_bytes(SAMPLES[-1].read_bytes()[:5000])
    bad_tiff = io.BytesIO()
    noise(50, 40).save(bad_tiff, "TIFF", compression="tiff_lzw")
    (tmp_path / "y.tif").write_bytes(bad_tiff.getvalue()[:3000] + bytes(2000))
    code = (
        "import sys; from bbx.images import read_image; from bbx.spec import Preprocess; from bbx.errors import *\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_image(path, Preprocess((8, 8), 8, 'bilinear', (0, 0, 0), (1, 1, 1)))\n"
        "    except ImageError: pass\n"
    )
    paths = [str(tmp_path / "x.jpg"), str(tmp_path / "y.tif")]
    done = subprocess.run([sys.executable, "-W", "always", "-c", code, *paths], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


@pytest.mark.parametrize("name", ["drawing.eps", "holiday.jpg"])
def test_eps_is_never_handed_to_ghostscript_whatever_its_name(tmp_path, monkeypatch, name):
    (tmp_path / "gs").write_text("#!/bin/sh\ntouch ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n")
    with pytest.raises(ImageError, match="Ghostscript"):
        read_image(tmp_path / name, PREPROCESS)
    assert not (tmp_path / "ran").exists()
