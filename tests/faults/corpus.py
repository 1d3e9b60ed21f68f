"""The corpus of bad and odd inputs: a visible table of what there is, how it is made, and what has to become of it.

`build` lays it out in a folder: each odd file in a folder of its own, and after each of them a good picture, so that a
row that slips shows. Everything is seeded; what is special about a file system (FIFOs, devices, links) is made too.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from tests.faults import oddities as odd
from tests.faults.oddities import encoded, frames, jpeg, noise, png, smooth

Turn = Image.Transpose


@dataclass(frozen=True)
class Decoded:
    """Decoded exactly as Pillow does it, then turned upright by `turn`."""

    turn: Turn | None = None


@dataclass(frozen=True)
class Fails:
    """A failed row whose reason matches; `ours`: by a rule of bbx or the file system, Pillow is not asked."""

    reason: str
    ours: bool = False


@dataclass(frozen=True)
class Skipped:
    """No row: named by a warning that matches `warning`, unless that is empty, and counted unless it is a folder."""

    warning: str = ""
    counted: bool = True


# The bytes of a file, or what puts it at a path.
Maker = bytes | Callable[[Path], None]


@dataclass(frozen=True)
class Kind:
    """One fault or oddity. `files` gives makers by file name; `together` keeps them in one folder."""

    name: str
    files: Callable[[], Mapping[str, Maker]]
    expect: Decoded | Fails | Skipped
    together: bool = False


@dataclass
class Corpus:
    """A corpus on disk. `odd` and `sentinels` are keys of rows in no particular order; `absent` are paths without."""

    root: Path
    odd: dict[str, Kind] = field(default_factory=dict)
    absent: dict[str, Kind] = field(default_factory=dict)
    sentinels: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[str]:
        """The keys as bbx has to find them: names sorted folder by folder."""
        return sorted([*self.odd, *self.sentinels], key=lambda key: key.split("/"))


def build(root: Path, kinds: Sequence[Kind] | None = None) -> Corpus:
    """Lays out `kinds`, by default all, under `root`."""
    corpus = Corpus(root)
    for kind in KINDS if kinds is None else kinds:
        folder = ""
        for name, maker in kind.files().items():
            if not (kind.together and folder):
                folder = f"{len(corpus.sentinels):03} {kind.name}"
            key = f"{folder}/{name}"
            path = root / key
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(maker, bytes):
                path.write_bytes(maker)
            else:
                maker(path)
            (corpus.absent if isinstance(kind.expect, Skipped) else corpus.odd)[key] = kind
            if not (kind.together and f"{folder}.png" in corpus.sentinels):
                corpus.sentinels.append(f"{folder}.png")
                sentinel(root / f"{folder}.png", len(corpus.sentinels))
    return corpus


def sentinel(path: Path, seed: int) -> None:
    """A good picture, unlike every other."""
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8))
    small.resize((48, 40), Image.Resampling.BICUBIC).save(path, "PNG")


def one(name: str, make: Callable[[], Maker]) -> Callable[[], Mapping[str, Maker]]:
    """A kind of a single file."""
    return lambda: {name: make()}


def many(**makers: Callable[[], Maker]) -> Callable[[], Mapping[str, Maker]]:
    """A kind of several files: `many(x_png=…)` makes `x.png`."""
    return lambda: {".".join(name.rsplit("_", 1)): make() for name, make in makers.items()}


def at(put: Callable[[Path], None]) -> Callable[[], Maker]:
    """A file that is more than bytes: `put` gets its path."""
    return lambda: put


def named(*names: str) -> Callable[[], Mapping[str, Maker]]:
    """Good pictures, each another one, under odd names."""
    return lambda: {name: encoded(noise(number, (20, 16)), "PNG") for number, name in enumerate(names, 1000)}


# Cut short


def cuts(suffix: str, make: Callable[[], bytes], shares: tuple[float, ...] = (0.1, 0.35, 0.6, 0.85)) -> Kind:
    """A file cut off inside its signature and at these shares of its length."""

    def files() -> Mapping[str, Maker]:
        data = make()
        return {f"{place}{suffix}": data[:place] for place in sorted({11, *(int(len(data) * part) for part in shares)})}

    return Kind(f"truncated{suffix}", files, Fails(r"truncated|damaged|not an image"))


def _cut(suffix: str, kind: str, mode: str = "RGB", **options: object) -> Kind:
    return cuts(suffix, lambda: encoded(noise().convert(mode), kind, **options))


TRUNCATED = (
    _cut(".baseline.jpg", "JPEG"),
    _cut(".progressive.jpg", "JPEG", progressive=True),
    _cut(".png", "PNG"),
    _cut(".gif", "GIF"),
    _cut(".lossy.webp", "WEBP"),
    _cut(".lossless.webp", "WEBP", lossless=True),
    _cut(".plain.tif", "TIFF"),
    _cut(".lzw.tif", "TIFF", compression="tiff_lzw"),
    _cut(".deflate.tif", "TIFF", compression="tiff_adobe_deflate"),
    _cut(".jpeg.tif", "TIFF", compression="jpeg"),
    _cut(".fax.tif", "TIFF", "1", compression="group4"),
    _cut(".bmp", "BMP"),
    _cut(".ppm", "PPM"),
    _cut(".jp2", "JPEG2000"),
    _cut(".j2k", "JPEG2000", no_jp2=True),
    _cut(".avif", "AVIF"),
    _cut(".ico", "ICO"),
    _cut(".tga", "TGA"),
    _cut(".rle.tga", "TGA", compression="tga_rle"),
    _cut(".pcx", "PCX"),
    _cut(".sgi", "SGI"),
    _cut(".dds", "DDS"),
    _cut(".qoi", "QOI"),
    _cut(".dib", "DIB"),
    _cut(".msp", "MSP", "1"),
    _cut(".xbm", "XBM", "1"),
    _cut(".blp", "BLP", "P"),
)

# No pictures at all

NOTHING = "not an image"
NO_PICTURES = (
    Kind("zero bytes", many(x_jpg=bytes, x_tif=bytes), Fails("^zero bytes$")),
    Kind("one byte", many(x_jpg=lambda: b"\xff", x_png=lambda: b"\x89"), Fails(f"{NOTHING}|damaged")),
    Kind(
        "text",
        many(x_jpg=lambda: b"hello, world\n" * 40, x_xbm=lambda: b"#define nothing\n"),
        Fails(f"{NOTHING}|damaged"),
    ),
    Kind("text in UTF-16", one("x.png", lambda: "hello, world".encode("utf-16")), Fails(NOTHING)),
    Kind("HTML", one("x.jpg", lambda: b"<!DOCTYPE html><html><body>404</body></html>"), Fails("<!DOCTYPE html>")),
    Kind("an error in JSON", one("x.webp", lambda: b'{"error": "not found"}'), Fails("error")),
    Kind("SVG", one("x.png", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>'), Fails("<svg")),
    Kind(
        "a pointer of Git LFS",
        one("x.jpg", lambda: b"version https://git-lfs.github.com/spec/v1\n"),
        Fails("git-l|vers"),
    ),
    Kind("a PDF", one("x.jpg", lambda: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj"), Fails("%PDF")),
    Kind("a ZIP", one("x.jpg", lambda: b"PK\3\4\x14" + bytes(200)), Fails(NOTHING)),
    Kind("a program", one("x.jpg", lambda: b"\x7fELF\2\1\1" + bytes(200)), Fails(NOTHING)),
    Kind("a film", one("x.avif", lambda: b"\0\0\0\x18ftypisom\0\0\0\0isomavc1" + bytes(99)), Fails(NOTHING)),
    Kind("a feature file", one("x.png", lambda: b"\x89HDF\r\n\x1a\n" + bytes(99)), Fails(NOTHING)),
    Kind("zeros", many(x_png=lambda: bytes(5000), x_tga=lambda: bytes(5000)), Fails(f"{NOTHING}|damaged")),
    Kind(
        "random noise",
        lambda: {
            f"{n}{suffix}": np.random.default_rng(n).bytes(5000)
            for n, suffix in enumerate((".png", ".jpg", ".tif", ".tga", ".pcx", ".bmp"))
        },
        Fails(f"{NOTHING}|damaged|truncated"),
    ),
    Kind(
        "a drawing for Ghostscript",
        many(
            x_eps=lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n",
            x_jpg=lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n",
        ),
        Fails("Ghostscript", ours=True),
    ),
    Kind("text without a suffix", one("README", lambda: b"hello, world\n"), Skipped()),
    Kind(
        "another file's suffix", many(x_txt=lambda: b"hello", x_json=lambda: b"{}", x_mp4=lambda: bytes(99)), Skipped()
    ),
    Kind("a half-downloaded file", one("x.jpg.part", lambda: b"<html>"), Skipped()),
)

# Too large

TOO_LARGE = r"^too large \(\d+ pixels, limit \d+\)$"
BOMBS = (
    Kind(
        "PNG that says 100000 x 100000",
        one("x.png", lambda: png((100_000, 100_000), 8, 2, bytes(999))),
        Fails(TOO_LARGE),
    ),
    Kind("PNG of 20000 x 20000 real pixels", one("x.png", lambda: odd.bilevel(20_000)), Fails(TOO_LARGE)),
    Kind("PNG that says 11000 x 11000", one("x.png", lambda: png((11_000, 11_000), 1, 0, b"")), Fails("truncated")),
    Kind("pixels that inflate without end", one("x.png", lambda: odd.inflating_pixels(1 << 26)), Decoded()),
    Kind(
        "texts that inflate",
        many(
            ztxt_png=lambda: odd.text_bomb(b"zTXt", 1 << 24),
            itxt_png=lambda: odd.text_bomb(b"iTXt", 1 << 24),
        ),
        Fails("Decompressed data too large"),
    ),
    Kind(
        "a profile that inflates",
        one("x.png", lambda: odd.text_bomb(b"iCCP", 1 << 24)),
        Fails("Decompressed data too large"),
    ),
    Kind(
        "seventy texts of a megabyte",
        one("x.png", lambda: odd.text_bomb(b"zTXt", 1 << 20, times=70)),
        Fails("Too much memory"),
    ),
    Kind("TIFF of billions of pixels", one("x.tif", lambda: odd.tiff((100_000, 100_000), bytes(99))), Fails(TOO_LARGE)),
    Kind("GIF with a huge screen", one("x.gif", lambda: odd.gif_screen(65535, 65535)), Fails(TOO_LARGE)),
    Kind("GIF with a frame far away", one("x.gif", lambda: odd.gif_frame_at(65000, 65000)), Fails(TOO_LARGE)),
    Kind(
        "WebP that lies",
        many(
            canvas_webp=lambda: odd.webp_canvas(16384, 16384),
            wide_webp=lambda: odd.webp_canvas(1 << 24, 255),
            lossless_webp=lambda: odd.webp_lossless(16384, 16384),
        ),
        Fails(TOO_LARGE),
    ),
    Kind(
        "JPEG 2000 that lies",
        many(
            x_jp2=lambda: odd.jpeg2000_sized(2**31 - 1, 2**31 - 1),
            x_j2k=lambda: odd.jpeg2000_sized(2**31 - 1, 2**31 - 1, kind="j2k"),
        ),
        Fails(TOO_LARGE),
    ),
    Kind("JPEG that says 65500 x 65500", one("x.jpg", lambda: odd.jpeg_sized(65500, 65500)), Fails(TOO_LARGE)),
    Kind(
        "BMP that lies",
        many(
            huge_bmp=lambda: odd.bmp((2**31 - 1, 2**31 - 1), bytes(99)),
            wide_bmp=lambda: odd.bmp((-60, 40), bytes(9999)),
            high_bmp=lambda: odd.bmp((60, -(2**31)), bytes(9999)),
        ),
        Fails(TOO_LARGE),
    ),
    Kind(
        "an icon around a bomb",
        many(
            x_ico=lambda: odd.ico_around(odd.bilevel(20_000)),
            x_icns=lambda: odd.icns_around(odd.bilevel(20_000)),
        ),
        Fails(TOO_LARGE),
    ),
    Kind(
        "old formats that lie",
        many(
            x_ppm=lambda: b"P6 99999 99999 255\n",
            x_tga=lambda: struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 65535, 65535, 24, 0) + bytes(9),
            x_qoi=lambda: b"qoif" + struct.pack(">IIBB", 2**32 - 1, 2**32 - 1, 3, 0),
            x_sgi=lambda: struct.pack(">HBBHHHH", 474, 0, 1, 3, 65535, 65535, 3).ljust(512, b"\0"),
            x_psd=lambda: b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 300_000, 300_000, 8, 3) + bytes(16),
            x_ras=lambda: struct.pack(">IIIIIIII", 0x59A66A95, 2**31, 2**31, 8, 0, 1, 0, 0),
            x_xbm=lambda: b"#define a_width 99999\n#define a_height 99999\nstatic char a_bits[] = {\n0x00",
            x_xpm=lambda: b'/* XPM */\nstatic char*a[]={\n"99999 99999 1 1",\n"a c #000000",\n',
        ),
        Fails(TOO_LARGE),
    ),
    Kind(
        "an empty picture that says 5000 x 5000",
        many(
            x_ppm=lambda: b"P6 5000 5000 255\n123",
            plain_ppm=lambda: b"P3 5000 5000 255 9 9 9",
            x_bmp=lambda: odd.bmp((5000, 5000), bytes(99)),
            x_webp=lambda: odd.webp_lossless(5000, 5000),
        ),
        Fails("truncated|damaged"),
    ),
    Kind("FITS that unpacks without end", one("x.fits", lambda: odd.fits_table(8, 1 << 26)), Decoded()),
)

# Odd shapes and colours

SHAPES = (
    Kind(
        "one pixel",
        many(
            x_png=lambda: encoded(noise(0, (1, 1)), "PNG"),
            x_jpg=lambda: encoded(noise(0, (1, 1)), "JPEG"),
            x_gif=lambda: encoded(noise(0, (1, 1)), "GIF"),
        ),
        Decoded(),
    ),
    Kind("a line of 1 x 10000", one("x.png", lambda: encoded(noise(0, (1, 10_000)), "PNG")), Decoded()),
    Kind("a line of 10000 x 1", one("x.png", lambda: encoded(noise(0, (10_000, 1)), "PNG")), Decoded()),
    Kind(
        "a line too long to be scaled",
        many(
            x_png=lambda: png((60_000, 1), 1, 0, bytes(7501)), x_bmp=lambda: encoded(Image.new("L", (1, 60_000)), "BMP")
        ),
        Fails("too long and narrow", ours=True),
    ),
    Kind(
        "no pixels",
        many(
            x_png=lambda: png((0, 0), 8, 2, b""),
            x_jpg=lambda: odd.jpeg_sized(60, 0),
            x_jp2=lambda: odd.jpeg2000_sized(0, 0),
        ),
        Fails("damaged"),
    ),
    Kind("CMYK JPEG", one("x.jpg", lambda: odd.adobe(0)), Decoded()),
    Kind("YCCK JPEG", one("x.jpg", lambda: odd.adobe(2)), Decoded()),
    Kind("JPEG that stores RGB", one("x.jpg", lambda: encoded(smooth(), "JPEG", keep_rgb=True)), Decoded()),
    Kind("grey JPEG", one("x.jpg", lambda: encoded(smooth().convert("L"), "JPEG")), Decoded()),
    Kind("16-bit grey PNG", many(x_png=lambda: png((60, 40), 16, 0, odd.raw_rows(odd.deep(1)))), Decoded()),
    Kind("16-bit colour PNG", one("x.png", lambda: png((60, 40), 16, 2, odd.raw_rows(odd.deep(3)))), Decoded()),
    Kind(
        "16-bit PNG with alpha",
        many(
            la_png=lambda: png((60, 40), 16, 4, odd.raw_rows(odd.deep(2))),
            rgba_png=lambda: png((60, 40), 16, 6, odd.raw_rows(odd.deep(4))),
        ),
        Decoded(),
    ),
    Kind(
        "PNG of 1, 2 and 4 bits",
        many(
            one_png=lambda: png((64, 4), 1, 0, (b"\0" + b"\x0f" * 8) * 4),
            two_png=lambda: png((32, 4), 2, 0, (b"\0" + b"\x1b" * 8) * 4),
            four_png=lambda: png((16, 4), 4, 0, (b"\0" + bytes(range(8))) * 4),
        ),
        Decoded(),
    ),
    Kind("interlaced PNG", one("x.png", lambda: odd.adam7(np.asarray(smooth()))), Decoded()),
    Kind(
        "16-bit TIFF",
        many(
            x_tif=lambda: odd.number_tiff(odd.ramp(0, 65535, "<u2")),
            motorola_tif=lambda: odd.number_tiff(odd.ramp(0, 65535, ">u2")),
            colour_tif=lambda: odd.tiff((60, 40), odd.ramp(0, 65535, "<u2").repeat(3).tobytes(), bits=16, samples=3),
        ),
        Decoded(),
    ),
    Kind(
        "16-bit PGM and JPEG 2000",
        many(
            x_pgm=lambda: b"P5 60 40 65535\n" + odd.ramp(0, 65535, ">u2").tobytes(),
            x_jp2=lambda: encoded(Image.fromarray(odd.ramp(0, 65535, "<u2")), "JPEG2000"),
        ),
        Decoded(),
    ),
    Kind(
        "signed TIFF within a byte",
        many(
            short_tif=lambda: odd.number_tiff(odd.ramp(0, 255, "<i2")),
            int_tif=lambda: odd.number_tiff(odd.ramp(0, 255, ">i4")),
        ),
        Decoded(),
    ),
    Kind(
        "signed TIFF below nought",
        one("x.tif", lambda: odd.number_tiff(odd.ramp(-300, 300, "<i2"))),
        Fails("no defined mapping to 8 bits", ours=True),
    ),
    Kind(
        "32-bit TIFF beyond a byte",
        one("x.tif", lambda: odd.number_tiff(odd.ramp(0, 1e9, "<i4"))),
        Fails("no defined mapping to 8 bits", ours=True),
    ),
    Kind(
        "float TIFF within a byte",
        many(
            x_tif=lambda: odd.number_tiff(odd.ramp(0, 255, "<f4")),
            one_tif=lambda: odd.number_tiff(odd.ramp(0, 1, ">f4")),
        ),
        Decoded(),
    ),
    Kind(
        "float TIFF beyond a byte",
        one("x.tif", lambda: odd.number_tiff(odd.ramp(-2, 70000, "<f4"))),
        Fails("no defined mapping to 8 bits", ours=True),
    ),
    Kind(
        "float TIFF with NaN and infinity",
        many(
            nan_tif=lambda: odd.number_tiff(odd.with_value(float("nan"))),
            inf_tif=lambda: odd.number_tiff(odd.with_value(float("inf"))),
        ),
        Fails("no defined mapping to 8 bits", ours=True),
    ),
    Kind("64-bit float TIFF", one("x.tif", lambda: odd.number_tiff(odd.ramp(0, 1, "<f8"))), Fails("damaged")),
    Kind(
        "portable float map", one("x.pfm", lambda: b"Pf\n2 2\n-1.0\n" + struct.pack("<4f", 0, 1, 100, 255)), Decoded()
    ),
    Kind(
        "palette",
        many(
            x_png=lambda: encoded(smooth().quantize(64), "PNG"),
            x_bmp=lambda: encoded(smooth().quantize(64), "BMP"),
            x_tif=lambda: encoded(smooth().quantize(64), "TIFF"),
        ),
        Decoded(),
    ),
    Kind(
        "palette with one transparent colour",
        many(
            x_png=lambda: encoded(smooth().quantize(64), "PNG", transparency=3),
            x_gif=lambda: encoded(smooth().quantize(64), "GIF", transparency=3),
        ),
        Decoded(),
    ),
    Kind(
        "palette with alpha per colour",
        one("x.png", lambda: encoded(smooth().quantize(64), "PNG", transparency=bytes(range(64)))),
        Decoded(),
    ),
    Kind(
        "palette that is too short",
        one(
            "x.png",
            lambda: png(
                (60, 40),
                8,
                3,
                odd.raw_rows(np.asarray(smooth().convert("L"))),
                before=odd.chunk(b"PLTE", bytes(range(30))),
            ),
        ),
        Decoded(),
    ),
    Kind(
        "palette that is not there",
        one("x.png", lambda: png((60, 40), 8, 3, odd.raw_rows(np.asarray(smooth().convert("L"))))),
        Decoded(),
    ),
    Kind(
        "grey and colour with a transparent value",
        many(
            grey_png=lambda: encoded(smooth().convert("L"), "PNG", transparency=7),
            colour_png=lambda: encoded(smooth(), "PNG", transparency=(1, 2, 3)),
        ),
        Decoded(),
    ),
    Kind(
        "LA",
        many(
            x_png=lambda: encoded(smooth().convert("LA"), "PNG"), x_tif=lambda: encoded(smooth().convert("LA"), "TIFF")
        ),
        Decoded(),
    ),
    Kind("PA", one("x.tif", lambda: encoded(smooth().quantize(16).convert("PA"), "TIFF")), Decoded()),
    Kind(
        "RGBA",
        lambda: {f"x.{kind}": encoded(alpha(), kind.upper()) for kind in ("png", "webp", "tiff", "tga", "ico")},
        Decoded(),
    ),
    Kind(
        "1-bit",
        lambda: {
            f"x.{kind}": encoded(smooth().convert("1"), kind.upper())
            for kind in ("png", "tiff", "bmp", "ppm", "xbm", "msp", "gif", "pcx")
        },
        Decoded(),
    ),
    Kind(
        "CMYK, LAB and YCbCr TIFF",
        lambda: {f"{mode}.tif": encoded(smooth().convert(mode), "TIFF") for mode in ("CMYK", "LAB", "YCbCr", "RGBX")},
        Decoded(),
    ),
    Kind("grey TIFF whose nought is white", one("x.tif", lambda: odd.grey_tiff(extra=((262, 3, 1, 0),))), Decoded()),
    Kind(
        "TIFF in planes",
        one(
            "x.tif",
            lambda: odd.tiff(
                (60, 40), np.moveaxis(np.asarray(smooth()), 2, 0).tobytes(), samples=3, extra=((284, 3, 1, 2),)
            ),
        ),
        Decoded(),
    ),
    Kind(
        "compressed TIFF",
        lambda: {
            f"{name}.tif": encoded(smooth(), "TIFF", compression=name)
            for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "zstd", "lzma")
        },
        Decoded(),
    ),
    Kind("BigTIFF", one("x.tif", lambda: encoded(smooth(), "TIFF", big_tiff=True)), Decoded()),
    Kind("BMP from the top down", one("x.bmp", odd.bmp_top_down), Decoded()),
    Kind("BMP of run lengths", many(x_bmp=odd.bmp_run_lengths, jumping_bmp=odd.bmp_deltas), Decoded()),
    Kind(
        "PPM with comments and an odd maximum",
        many(comment_pgm=lambda: b"P5 # a\n2 # b\n2 255\nabcd", maximum_pgm=lambda: b"P5 2 2 100 \0\1\x32\x64"),
        Decoded(),
    ),
    Kind(
        "old and rare formats",
        lambda: {
            f"x.{suffix}": encoded(smooth(), kind)
            for suffix, kind in (
                ("pcx", "PCX"),
                ("sgi", "SGI"),
                ("dds", "DDS"),
                ("qoi", "QOI"),
                ("dib", "DIB"),
                ("jp2", "JPEG2000"),
                ("avif", "AVIF"),
                ("ico", "ICO"),
                ("tga", "TGA"),
            )
        },
        Decoded(),
    ),
    Kind(
        "GIF frame beside its screen",
        many(small_gif=lambda: odd.gif_screen(1, 1), away_gif=lambda: odd.gif_frame_at(30, 20)),
        Decoded(),
    ),
)


def alpha() -> Image.Image:
    """Half transparent, colours under it and all."""
    image = smooth().convert("RGBA")
    image.putalpha(smooth().convert("L"))
    return image


# Several pictures in one file: the first counts


def several(kind: str, **options: object) -> bytes:
    """A file of three pictures."""
    return encoded(smooth(), kind, save_all=True, append_images=frames(), **options)


ANIMATED = (
    Kind("animated GIF", many(x_gif=lambda: several("GIF", duration=9, disposal=2)), Decoded()),
    Kind(
        "animated WebP",
        many(lossy_webp=lambda: several("WEBP"), lossless_webp=lambda: several("WEBP", lossless=True)),
        Decoded(),
    ),
    Kind(
        "animated PNG",
        many(x_png=lambda: several("PNG"), hidden_png=lambda: several("PNG", default_image=True)),
        Decoded(),
    ),
    Kind("animated AVIF", one("x.avif", lambda: several("AVIF")), Decoded()),
    Kind("TIFF of several pages", one("x.tif", lambda: several("TIFF")), Decoded()),
    Kind("TIFF whose pages go round in a circle", one("x.tif", lambda: odd.grey_tiff(next_ifd=2408)), Decoded()),
    Kind("MPO of several pictures", many(x_mpo=lambda: several("MPO"), x_jpg=lambda: several("MPO")), Decoded()),
    Kind("MPO cut in its second picture", one("x.mpo", lambda: several("MPO")[:-600]), Decoded()),
    Kind(
        "animation cut in its second frame",
        many(
            x_gif=lambda: (data := several("GIF"))[: len(data) * 4 // 5],
            x_png=lambda: (data := several("PNG"))[: len(data) * 4 // 5],
        ),
        Decoded(),
    ),
    Kind(
        "animated WebP cut in its second frame",
        one("x.webp", lambda: several("WEBP", lossless=True)[:-3000]),
        Fails("damaged"),
    ),
)

# Held upside down

TURNS = {1: None, 2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE,
         6: Turn.ROTATE_270, 7: Turn.TRANSVERSE, 8: Turn.ROTATE_90}  # fmt: skip
_TAGGED = (("jpg", "JPEG", {}), ("png", "PNG", {}), ("webp", "WEBP", {"lossless": True}))


def held(block: bytes) -> Callable[[], Mapping[str, Maker]]:
    """The picture with this EXIF block in JPEG, PNG and WebP."""
    return lambda: {f"x.{suffix}": encoded(smooth(), kind, exif=block, **options) for suffix, kind, options in _TAGGED}


def by_xmp() -> Mapping[str, Maker]:
    """The orientation in an XMP packet, and nowhere else."""
    packet = odd.xmp(6)
    return {"x.jpg": encoded(smooth(), "JPEG", xmp=packet), "x.webp": encoded(smooth(), "WEBP", xmp=packet)}


UPRIGHT = (
    *(Kind(f"EXIF orientation {number}", held(odd.exif(number)), Decoded(turn)) for number, turn in TURNS.items()),
    # Pillow turns a TIFF while it decodes it.
    Kind(
        "orientations of TIFF",
        lambda: {f"{number}.tif": odd.grey_tiff(extra=((274, 3, 1, number),)) for number in TURNS},
        Decoded(),
    ),
    Kind("EXIF orientation 0", held(odd.exif(0)), Decoded()),
    Kind("EXIF orientation 9", held(odd.exif(9)), Decoded()),
    Kind("EXIF orientation 65535", held(odd.exif(65535)), Decoded()),
    Kind("EXIF orientation in words", held(odd.exif(b"six\0", kind=2, count=4)), Decoded()),
    Kind("EXIF orientation as a long number", held(odd.exif(6, kind=4)), Decoded(Turn.ROTATE_270)),
    Kind("EXIF orientation as a float", held(odd.exif(struct.pack("<f", 6.0), kind=11)), Decoded(Turn.ROTATE_270)),
    Kind("EXIF orientation twice over", held(odd.exif(struct.pack("<HH", 6, 3), count=2)), Decoded(Turn.ROTATE_270)),
    Kind("orientation in XMP", by_xmp, Decoded(Turn.ROTATE_270)),
    *(Kind(f"broken EXIF ({name})", held(block), Decoded()) for name, block in odd.BROKEN_EXIF.items()),
)

# Profiles and texts


def profiled(profile: bytes) -> Callable[[], Mapping[str, Maker]]:
    """The picture with this ICC profile."""
    return lambda: {f"x.{suffix}": encoded(smooth(), kind, icc_profile=profile) for suffix, kind in (
        ("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("tif", "TIFF"))}  # fmt: skip


EXTRAS = (
    Kind("ICC profile", profiled(odd.profile()), Decoded()),
    Kind("broken ICC profile", profiled(b"rubbish" * 20), Decoded()),
    Kind("huge ICC profile", profiled(np.random.default_rng(0).bytes(900_000)), Decoded()),
    Kind(
        "ICC profile in one of two parts",
        one("x.jpg", lambda: odd.after_start(b"\xff\xe2\0\x15ICC_PROFILE\0\1\2abc")),
        Decoded(),
    ),
    Kind("longest comment", one("x.jpg", lambda: odd.after_start(b"\xff\xfe\xff\xff" + b"x" * 65533)), Decoded()),
)

# Damaged PNG and JPEG


def _swap(kind: bytes, change: Callable[[bytes], bytes]) -> Callable[[], bytes]:
    """A PNG whose chunks of `kind` are `change` of their data."""
    return lambda: odd.rebuilt(lambda name, data: change(data) if name == kind else odd.chunk(name, data))


DAMAGED = (
    Kind(
        "PNG: bad checksum of the pixels or the end",
        many(idat_png=lambda: odd.bad_crc(b"IDAT"), iend_png=lambda: odd.bad_crc(b"IEND")),
        Decoded(),
    ),
    Kind(
        "PNG: bad checksum of the header or a text",
        many(ihdr_png=lambda: odd.bad_crc(b"IHDR"), text_png=lambda: odd.bad_crc(b"tEXt")),
        Fails("damaged or truncated PNG"),
    ),
    Kind("PNG: no end", one("x.png", lambda: encoded(noise(), "PNG")[:-12]), Decoded()),
    Kind("PNG: rubbish after the end", one("x.png", lambda: encoded(noise(), "PNG") + b"rubbish" * 200), Decoded()),
    Kind(
        "PNG: no pixels",
        many(
            none_png=_swap(b"IDAT", lambda _: b""),
            early_png=_swap(b"IDAT", lambda data: odd.chunk(b"IEND", b"") + odd.chunk(b"IDAT", data)),
        ),
        Fails("damaged"),
    ),
    Kind(
        "PNG: one byte per chunk",
        one(
            "x.png",
            _swap(b"IDAT", lambda data: b"".join(odd.chunk(b"IDAT", data[at : at + 1]) for at in range(len(data)))),
        ),
        Decoded(),
    ),
    Kind(
        "PNG: empty chunks",
        one("x.png", _swap(b"IDAT", lambda data: odd.chunk(b"IDAT", b"") * 50 + odd.chunk(b"IDAT", data))),
        Decoded(),
    ),
    Kind("PNG: two headers", one("x.png", _swap(b"IHDR", lambda data: odd.chunk(b"IHDR", data) * 2)), Decoded()),
    Kind(
        "PNG: an unknown chunk that matters",
        one("x.png", _swap(b"IDAT", lambda data: odd.chunk(b"ABCD", b"x") + odd.chunk(b"IDAT", data))),
        Decoded(),
    ),
    Kind(
        "PNG: a chunk of two gigabytes",
        one("x.png", _swap(b"IDAT", lambda data: struct.pack(">I", 2**31 - 1) + b"tEXtabc" + data)),
        Fails("truncated"),
    ),
    Kind(
        "PNG: a hole in the pixels",
        many(
            sum_png=_swap(b"IDAT", lambda data: odd.chunk(b"IDAT", data[:-4] + b"abcd")),
            hole_png=_swap(b"IDAT", lambda data: odd.chunk(b"IDAT", data[:100] + bytes(100) + data[200:])),
        ),
        Fails("damaged"),
    ),
    Kind("PNG: three bits", one("x.png", lambda: png((60, 40), 3, 0, bytes(9999))), Fails("damaged")),
    Kind("JPEG: progressive", one("x.jpg", lambda: jpeg(progressive=True)), Decoded()),
    Kind("JPEG: no end", one("x.jpg", lambda: jpeg()[:-2]), Fails("truncated")),
    Kind("JPEG: rubbish after the end", one("x.jpg", lambda: jpeg() + b"rubbish" * 200), Decoded()),
    Kind("JPEG: two in one", one("x.jpg", lambda: jpeg() + encoded(noise(), "JPEG")), Decoded()),
    Kind("JPEG: restart markers", one("x.jpg", odd.restarts), Decoded()),
    Kind(
        "JPEG: restart markers lost and wrong",
        many(
            lost_jpg=lambda: odd.restarts(lambda scan: scan.replace(b"\xff\xd1", b"", 1)),
            wrong_jpg=lambda: odd.restarts(lambda scan: scan.replace(b"\xff\xd1", b"\xff\xd5", 1)),
            hole_jpg=lambda: odd.restarts(lambda scan: scan[:100] + bytes(100) + scan[200:]),
        ),
        Decoded(),
    ),
    Kind(
        "JPEG: rubbish between segments",
        many(x_jpg=lambda: odd.before_scan(b"garbage"), fill_jpg=lambda: odd.before_scan(b"\xff" * 50)),
        Decoded(),
    ),
    Kind("JPEG: rubbish after the start", one("x.jpg", lambda: odd.after_start(b"garbage")), Fails(NOTHING)),
    Kind("JPEG: no Huffman tables", one("x.jpg", lambda: odd.without(b"\xff\xc4")), Decoded()),
    Kind("JPEG: no quantisation tables", one("x.jpg", lambda: odd.without(b"\xff\xdb")), Fails("damaged")),
    Kind(
        "JPEG: higher or lower than it says",
        many(high_jpg=lambda: odd.jpeg_sized(60, 20), low_jpg=lambda: odd.jpeg_sized(60, 80)),
        Decoded(),
    ),
    Kind("JPEG: 12 bits", one("x.jpg", lambda: odd.jpeg_precision(12)), Fails("damaged")),
    # Pillow cannot write arithmetic coding; the decoder makes a picture of any bytes.
    Kind("JPEG: arithmetic-coded by its header", one("x.jpg", lambda: odd.jpeg_as(0xC9)), Decoded()),
    Kind(
        "JPEG: lossless or hierarchical by its header",
        lambda: {f"{marker:x}.jpg": odd.jpeg_as(marker) for marker in (0xC3, 0xC5, 0xCA, 0xCB)},
        Fails("damaged"),
    ),
    Kind("JPEG: markers only", one("x.jpg", lambda: b"\xff\xd8\xff\xd9"), Fails("damaged")),
    Kind("JPEG: a segment without an end", one("x.jpg", lambda: jpeg()[:2] + b"\xff\xe1\xff\xff"), Fails("truncated")),
    Kind(
        "TIFF: pixels outside the file",
        one("x.tif", lambda: odd.grey_tiff(extra=((273, 4, 1, 0xFFFFFFF0),))),
        Fails("truncated"),
    ),
    Kind(
        "TIFF: four billion strips",
        one("x.tif", lambda: odd.grey_tiff(extra=((273, 4, 0xFFFFFFFF, 8),))),
        Fails("damaged"),
    ),
    Kind(
        "TIFF: a text of two gigabytes",
        one("x.tif", lambda: odd.grey_tiff(extra=((270, 2, 0x7FFFFFFF, 8),))),
        Decoded(),
    ),
    Kind(
        "TIFF: no folder",
        many(
            empty_tif=lambda: b"II*\0" + struct.pack("<I", 8) + bytes(6),
            away_tif=lambda: b"II*\0" + struct.pack("<I", 9999) + bytes(60),
        ),
        Fails("damaged"),
    ),
    Kind(
        "TIFF: unknown compression or depth",
        many(
            compression_tif=lambda: odd.grey_tiff(extra=((259, 3, 1, 34712),)),
            bits_tif=lambda: odd.grey_tiff(extra=((258, 3, 1, 7),)),
        ),
        Fails("damaged"),
    ),
    Kind(
        "TIFF: not compressed as it says",
        one("x.tif", lambda: odd.grey_tiff(extra=((259, 3, 1, 5),))),
        Fails("damaged"),
    ),
    Kind("WebP: a canvas smaller than its frames", one("x.webp", lambda: odd.webp_canvas(59, 40)), Fails("damaged")),
    Kind("JPEG 2000: larger than it says", one("x.jp2", lambda: odd.jpeg2000_sized(120, 80)), Decoded()),
)

# Suffixes and names

_LIES = (
    ("PNG", "jpg"),
    ("JPEG", "png"),
    ("GIF", "tif"),
    ("WEBP", "jpeg"),
    ("TIFF", "gif"),
    ("BMP", "webp"),
    ("PNG", "tga"),
)
NAMES = (
    Kind("wrong suffix", lambda: {f"{kind}.{suffix}": encoded(smooth(), kind) for kind, suffix in _LIES}, Decoded()),
    Kind(
        "no suffix, an unknown one, or capitals",
        named("photograph", "x.dat", "x.PNG", "x.JpEg", "x.png ", "x.png.bak"),
        Decoded(),
    ),
    Kind("names with spaces", named("a b.png", "  .png", "trailing .png", "\u00a0\u2003.png"), Decoded()),
    Kind("names in many scripts", named("写真.png", "фото.png", "صورة.png", "📷.png", "İ.PNG", "ß.png"), Decoded()),
    Kind("twins of NFC and NFD", named("caf\u00e9.png", "cafe\u0301.png"), Decoded(), together=True),
    Kind("twins but for capitals", named("A.png", "a.png", "A.PNG"), Decoded(), together=True),
    Kind("twins but for the suffix", named("cat.png", "cat.jpg", "cat"), Decoded(), together=True),
    Kind(
        "names that break lines",
        named("a\nb.png", "\n.png", "a\r\nb.png", "tab\t.png", "\u2028.png", "\x85.png"),
        Decoded(),
    ),
    Kind("names with %", named("%s%n%d.png", "100%.png", "%00.png", "%2e%2e%2f.png"), Decoded()),
    Kind("names with leading dashes", named("-rf.png", "--help.png", "-.png", "--"), Decoded()),
    Kind(
        "names that are patterns",
        named("*.png", "?.png", "[a-z].png", "**", "{a,b}.png", "!x.png"),
        Decoded(),
        together=True,
    ),
    Kind("names of 255 bytes", named("x" * 251 + ".png", "é" * 125 + "x.png", "x" * 255), Decoded()),
    Kind(
        "names that are not UTF-8",
        named(os.fsdecode(b"\xff\xfe.png"), os.fsdecode(b"caf\xe9.png"), os.fsdecode(b"\xed\xa0\x80.png")),
        Decoded(),
    ),
    Kind(
        "names for a shell",
        named(
            "$(touch pwned).png",
            "`touch pwned`.png",
            "a;b|c&d>e.png",
            "quo\"te's.png",
            "back\\slash.png",
            "$HOME.png",
            "#.png",
            "~.png",
        ),
        Decoded(),
    ),
    Kind(
        "names in Rich markup",
        named("[red]x[/].png", "[bold blink]x.png", "[/].png", "[link=http:x]y.png", ":smile:.png"),
        Decoded(),
    ),
    Kind(
        "names that paint the terminal",
        named(
            "\x1b[31mred\x1b[0m.png",
            "\x1b]0;title\x07.png",
            "\x9b31m.png",
            "\x08\x08.png",
            "\x7f.png",
            "\u202egnp.exe.png",
            "\u200b\ufeff.png",
        ),
        Decoded(),
    ),
    Kind("names in TeX", named("$x^2$.png", "$\\frac{.png", "a$b.png", "x_{.png"), Decoded()),
    Kind("names of devices", named("CON.png", "nul.png", "...png.png".lstrip("."), "aux"), Decoded()),
    Kind(
        "names that fail",
        lambda: {
            name: b"no picture"
            for name in (
                "\x1b[31mred.png",
                "a\nb.png",
                "[red]x.png",
                os.fsdecode(b"\xff.png"),
                "failed: other.png: gone.jpg",
            )
        },
        Fails(NOTHING),
    ),
    Kind(
        "names that are skipped",
        lambda: {name: at(os.mkfifo)() for name in ("\x1b[31mred", "a\nb", "[red]x", os.fsdecode(b"\xff"))},
        Skipped("is no regular file"),
    ),
)

# What is no file


def link(target: str) -> Callable[[], Maker]:
    """A symbolic link that says `target`."""
    return at(lambda path: path.symlink_to(target))


def _linked_picture(path: Path) -> None:
    aside = path.parent / ".aside"
    aside.mkdir()
    sentinel(aside / "x", 5000)
    path.symlink_to(".aside/x")


def _linked_folder(path: Path) -> None:
    # "inner.png" in a folder that is only reached by the link.
    path.parent.rmdir()
    aside = path.parent.parent / ".aside"
    aside.mkdir()
    sentinel(aside / path.name, 5001)
    path.parent.symlink_to(".aside")


def _bind(path: Path) -> None:
    # By a short name: an address holds 108 bytes only.
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


def _shut_file(path: Path) -> None:
    sentinel(path, 5002)
    path.chmod(0)


def _shut_folder(path: Path) -> None:
    path.mkdir()
    sentinel(path / "inner.png", 5003)
    path.chmod(0)


SPECIAL = (
    Kind("a link to a picture", one("x.jpg", at(_linked_picture)), Decoded()),
    Kind("a link to a folder", one("folder.png/inner.png", at(_linked_folder)), Decoded()),
    Kind(
        "a link that leads nowhere",
        many(x_png=link("nowhere.png"), x_jpg=link("/nonexistent/x.jpg")),
        Fails("^no such file$", ours=True),
    ),
    Kind("a link that leads to itself", one("x.png", link("x.png")), Fails("leads to itself", ours=True)),
    Kind("a FIFO without a writer", one("x.png", at(os.mkfifo)), Fails("^a FIFO, not a regular file$", ours=True)),
    Kind("a socket", one("x.png", at(_bind)), Fails("^a socket, not a regular file$", ours=True)),
    Kind(
        "a link to an endless device",
        many(zero_png=link("/dev/zero"), random_jpg=link("/dev/urandom")),
        Fails("^a device, not a regular file$", ours=True),
    ),
    Kind("a file nobody may read", one("x.png", at(_shut_file)), Fails("^permission denied$", ours=True)),
    Kind("a folder nobody may read", one("inner", at(_shut_folder)), Skipped("Permission denied", counted=False)),
    Kind("a file of unknown suffix nobody may read", one("x.dat", at(_shut_file)), Skipped("Permission denied")),
    Kind("a link to nothing, of unknown suffix", one("x.dat", link("nowhere")), Skipped("leads nowhere")),
    Kind("a device of unknown suffix", one("x", link("/dev/zero")), Skipped("is no regular file")),
    Kind("a folder that leads to itself", one("inner", link(".")), Skipped("leads back into itself", counted=False)),
)

KINDS = (*TRUNCATED, *NO_PICTURES, *BOMBS, *SHAPES, *ANIMATED, *UPRIGHT, *EXTRAS, *DAMAGED, *NAMES, *SPECIAL)
