"""Bytes of odd and damaged pictures, made from nothing: what Pillow writes, taken apart, and what it would never write.

Every maker is deterministic. `corpus.KINDS` says what each of them is for and what has to become of it.
"""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import ExifTags, Image, ImageCms

SIZE = (50, 40)


def noise(seed: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    """No two rows alike, and nothing that a compressor could shorten: each byte of the file matters."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def smooth(size: tuple[int, int] = (60, 40)) -> Image.Image:
    """Four different corners, so that no turn looks like another."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    values = np.stack([x * 255 // size[0], y * 255 // size[1], (x + y) * 255 // (size[0] + size[1])], -1)
    return Image.fromarray(values.astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The file that Pillow writes."""
    out = io.BytesIO()
    image.save(out, kind, **options)  # type: ignore[arg-type]  # options of a plugin
    return out.getvalue()


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    """`data` with the one `old` in it exchanged; a maker whose file has changed under it fails here."""
    if data.count(old) != 1:
        raise ValueError(f"{old!r} is there {data.count(old)} times")
    return data.replace(old, new)


# PNG


def chunk(kind: bytes, data: bytes, *, crc: int | None = None) -> bytes:
    """A chunk of a PNG, with its own checksum unless another is given."""
    return (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)
    )


def png(
    size: tuple[int, int], depth: int, colour: int, rows: bytes, *, before: bytes = b"", interlace: int = 0
) -> bytes:
    """A PNG of `rows` (filter bytes included), `before` standing between header and data."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlace))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def raw_rows(values: np.ndarray) -> bytes:
    """`(h, …)` values as the unfiltered rows of a PNG."""
    return b"".join(b"\0" + row.tobytes() for row in values)


def deep(channels: int) -> np.ndarray:
    """16-bit values `(40, 60, channels)`, big-endian as PNG has them."""
    return np.linspace(0, 65535, 40 * 60 * channels).astype(">u2").reshape(40, 60, channels)


def adam7(values: np.ndarray) -> bytes:
    """An interlaced PNG of `(h, w, 3)` bytes."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = b"".join(raw_rows(part) for x, y, dx, dy in passes if (part := values[y::dy, x::dx]).size)
    return png((values.shape[1], values.shape[0]), 8, 2, rows, interlace=1)


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """(kind, data) of each chunk of a sound PNG."""
    found, at = [], 8
    while at < len(data):
        length = struct.unpack_from(">I", data, at)[0]
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def rebuilt(change: Callable[[bytes, bytes], bytes]) -> bytes:
    """A sound PNG, each chunk replaced by what `change` makes of it."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(change(kind, data) for kind, data in chunks(encoded(noise(), "PNG")))


def bad_crc(kind: bytes) -> bytes:
    """A PNG whose chunks of `kind` have a wrong checksum."""
    comment = encoded(noise(), "PNG")[33:]
    whole = encoded(noise(), "PNG")[:33] + chunk(b"tEXt", b"Comment\0hello") + comment
    parts = ((name, data) for name, data in chunks(whole))
    return whole[:8] + b"".join(chunk(name, data, crc=1 if name == kind else None) for name, data in parts)


@cache
def bilevel(side: int) -> bytes:
    """A real 1-bit PNG of `side` x `side` pixels, all of them there, in a few kilobytes."""
    return png((side, side), 1, 0, (b"\0" + bytes((side + 7) // 8)) * side)


def inflating_pixels(nbytes: int) -> bytes:
    """A picture of 8 x 8 pixels whose data go on for `nbytes` after the last of them."""
    return png((8, 8), 8, 0, (b"\0" + bytes(range(0, 240, 30))) * 8 + bytes(nbytes))


def text_bomb(kind: bytes, nbytes: int, *, times: int = 1) -> bytes:
    """A PNG of one pixel with `times` compressed texts or profiles of `nbytes` each."""
    packed = zlib.compress(bytes(nbytes))
    head = {b"zTXt": b"Comment\0\0", b"iTXt": b"Comment\0\1\0\0\0", b"iCCP": b"profile\0\0"}[kind]
    return png((1, 1), 8, 0, b"\0\0", before=chunk(kind, head + packed) * times)


# JPEG


def jpeg(**options: object) -> bytes:
    """A baseline JPEG without an EXIF block."""
    return encoded(smooth(), "JPEG", **{"quality": 90, **options})


def adobe(transform: int) -> bytes:
    """A CMYK JPEG whose Adobe marker says `transform`: 0 is CMYK, 2 is YCCK."""
    data = encoded(smooth().convert("CMYK"), "JPEG")
    at = data.index(b"\xff\xee") + 4
    if data[at : at + 5] != b"Adobe":
        raise ValueError("Pillow no longer writes the Adobe marker")
    return data[: at + 11] + bytes([transform]) + data[at + 12 :]


def frame_header(data: bytes) -> int:
    """Where the SOF marker of a JPEG is."""
    return next(at for kind in (b"\xff\xc0", b"\xff\xc2") if (at := data.find(kind)) >= 0)


def jpeg_as(marker: int) -> bytes:
    """A baseline JPEG that claims another process: 0xC9 arithmetic coding, 0xC3 lossless, …"""
    data = jpeg()
    at = frame_header(data) + 1
    return data[:at] + bytes([marker]) + data[at + 1 :]


def jpeg_sized(width: int, height: int) -> bytes:
    """A JPEG whose frame header lies about its size."""
    data = jpeg()
    at = frame_header(data) + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def jpeg_precision(bits: int) -> bytes:
    """A JPEG that says its samples have `bits` bits."""
    data = jpeg()
    at = frame_header(data) + 4
    return data[:at] + bytes([bits]) + data[at + 1 :]


def after_start(extra: bytes) -> bytes:
    """A JPEG with `extra` right after its first marker."""
    data = jpeg()
    return data[:2] + extra + data[2:]


def before_scan(extra: bytes) -> bytes:
    """A JPEG with `extra` between its tables and its scan."""
    data = jpeg()
    at = data.index(b"\xff\xda")
    return data[:at] + extra + data[at:]


def without(marker: bytes) -> bytes:
    """A JPEG without its segments of this marker: tables that are not there."""
    data = jpeg()
    while (at := data.find(marker)) >= 0:
        data = data[:at] + data[at + 2 + struct.unpack_from(">H", data, at + 2)[0] :]
    return data


def restarts(damage: Callable[[bytes], bytes] = bytes) -> bytes:
    """A JPEG with a restart marker after every two blocks, its scan changed by `damage`."""
    data = jpeg(restart_marker_blocks=2)
    at = data.index(b"\xff\xda")
    if b"\xff\xd1" not in data[at:]:
        raise ValueError("Pillow no longer writes restart markers")
    return data[:at] + damage(data[at:])


# EXIF


def exif(orientation: object = 6, *, kind: int = 3, count: int = 1, next_ifd: int = 0) -> bytes:
    """An EXIF block (TIFF, little-endian) with one tag, Orientation, of the given type, count and raw value."""
    value = orientation if isinstance(orientation, bytes) else struct.pack("<I", orientation)
    entry = struct.pack("<HHHI", 1, ExifTags.Base.Orientation, kind, count) + value.ljust(4, b"\0")[:4]
    return b"Exif\0\0II*\0\x08\0\0\0" + entry + struct.pack("<I", next_ifd)


BROKEN_EXIF = {
    "nothing": b"Exif\0\0",
    "rubbish": b"Exif\0\0" + bytes(range(64)),
    "no folder": b"Exif\0\0II*\0\xff\xff\xff\xff",
    "cut in its folder": exif()[:20],
    "thousands of entries": b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(40),
    "folder that leads to itself": exif(1, next_ifd=8),
    "sub-folder that leads to itself": b"Exif\0\0II*\0\x08\0\0\0"
    + struct.pack("<HHHII", 1, 0x8769, 4, 1, 8)
    + bytes(4),
    "a value far outside": exif(struct.pack("<I", 0xFFFFFFF0), kind=2, count=1000),
    "a count of four billion": exif(struct.pack("<I", 8), count=0xFFFFFFFF),
    "a type that does not exist": exif(kind=99),
    "orientation as a fraction over zero": exif(struct.pack("<I", 8), kind=5),
}


def xmp(orientation: int) -> bytes:
    """An XMP packet that says how the camera was held."""
    return (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>'
    ) % orientation


# TIFF


def tiff(
    size: tuple[int, int], data: bytes, *, bits: int = 8, sample: int = 1, samples: int = 1, order: str = "<",
    extra: tuple[tuple[int, int, int, int], ...] = (), next_ifd: int = 0, strip: int | None = None,
) -> bytes:  # fmt: skip
    """An uncompressed TIFF of one strip with the tags that it needs; `extra` holds (tag, type, count, value)."""
    photometric = 2 if samples == 3 else 1
    fields = {tag: (tag, kind, 1, value) for tag, kind, value in (
        (256, 4, size[0]), (257, 4, size[1]), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8),
        (277, 3, samples), (278, 4, size[1]), (279, 4, len(data) if strip is None else strip), (339, 3, sample),
    )}  # fmt: skip
    fields |= {field[0]: field for field in extra}
    entries = b"".join(
        struct.pack(f"{order}HHI", *field[:3])
        + (
            struct.pack(f"{order}HH", field[3], 0)
            if (field[1], field[2]) == (3, 1)
            else struct.pack(f"{order}I", field[3])
        )
        for field in sorted(fields.values())
    )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(fields)) + entries + struct.pack(f"{order}I", next_ifd)


def grey_tiff(**options: object) -> bytes:
    """A plain 8-bit TIFF of 60 x 40 grey pixels, with `tiff`'s options."""
    return tiff((60, 40), np.asarray(smooth().convert("L")).tobytes(), **options)  # type: ignore[arg-type]


def number_tiff(values: np.ndarray) -> bytes:
    """A TIFF of `(h, w)` numbers of any NumPy type."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    sample = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    bits = values.dtype.itemsize * 8
    return tiff((values.shape[1], values.shape[0]), values.tobytes(), bits=bits, sample=sample, order=order)


def ramp(low: float, high: float, kind: str) -> np.ndarray:
    """Numbers from `low` to `high`, `(40, 60)`."""
    return np.linspace(low, high, 2400).astype(kind).reshape(40, 60)


def with_value(value: float) -> np.ndarray:
    """Zeros with one odd number amid them."""
    values = np.zeros((40, 60), np.float32)
    values[20, 30] = value
    return values


# The rest


def webp_canvas(width: int, height: int) -> bytes:
    """An animated WebP whose extended header lies about the canvas."""
    data = encoded(smooth(), "WEBP", save_all=True, append_images=[noise(1, (60, 40))], lossless=True)
    at = data.index(b"VP8X") + 12
    return data[:at] + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + data[at + 6 :]


def webp_lossless(width: int, height: int) -> bytes:
    """A lossless WebP whose own header lies."""
    data = encoded(smooth(), "WEBP", lossless=True)
    at = data.index(b"VP8L") + 9
    return data[:at] + struct.pack("<I", (width - 1) | (height - 1) << 14) + data[at + 4 :]


def jpeg2000_sized(width: int, height: int, *, kind: str = "jp2") -> bytes:
    """A JPEG 2000 whose codestream, and where there is one its header box, lies about the size."""
    data = encoded(smooth(), "JPEG2000", no_jp2=kind == "j2k")
    at = data.index(b"\xff\x51") + 6
    data = data[:at] + struct.pack(">II", width, height) + data[at + 8 :]
    if kind == "jp2":
        box = data.index(b"ihdr") + 4
        data = data[:box] + struct.pack(">II", height, width) + data[box + 8 :]
    return data


def gif_screen(width: int, height: int) -> bytes:
    """A GIF whose logical screen is not its frame's size."""
    data = encoded(smooth(), "GIF")
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


def gif_frame_at(x: int, y: int) -> bytes:
    """A GIF whose only frame lies elsewhere on its screen."""
    data = encoded(smooth(), "GIF")
    at = data.index(b"\x2c" + bytes(4))
    return data[: at + 1] + struct.pack("<HH", x, y) + data[at + 5 :]


def bmp(size: tuple[int, int], data: bytes, *, bits: int = 24, compression: int = 0, palette: bytes = b"") -> bytes:
    """A BMP with the plain header of 40 bytes; a negative height means that the top row comes first."""
    offset = 54 + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, *size, 1, bits, compression, len(data), 0, 0, len(palette) // 4, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + info + palette + data


def bmp_top_down() -> bytes:
    """A BMP whose rows stand the other way round."""
    return bmp((60, -40), np.asarray(smooth())[..., ::-1].tobytes())


def bmp_run_lengths() -> bytes:
    """A BMP of run lengths: 16 x 4 pixels of four greys."""
    palette = b"".join(bytes([value, value, value, 0]) for value in range(256))
    return bmp((16, 4), b"".join(bytes([16, 60 * row, 0, 0]) for row in range(4)) + b"\0\1", bits=8, compression=1,
               palette=palette)  # fmt: skip


def bmp_deltas() -> bytes:
    """A BMP of run lengths that jumps far outside its picture."""
    palette = bytes(1024)
    return bmp((16, 4), b"\0\2\xff\xff" * 50 + b"\x10\x07\0\1", bits=8, compression=1, palette=palette)


def ico_around(inner: bytes) -> bytes:
    """An icon that says 16 x 16 and holds `inner`."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


def icns_around(inner: bytes) -> bytes:
    """An Apple icon that says 256 x 256 and holds `inner`."""
    return b"icns" + struct.pack(">I", 16 + len(inner)) + b"ic08" + struct.pack(">I", 8 + len(inner)) + inner


def fits(*cards: str, data: bytes = b"") -> bytes:
    """A FITS file of these header cards."""
    return b"".join(card.ljust(80).encode() for card in (*cards, "END")).ljust(2880) + data


def fits_table(side: int, nbytes: int) -> bytes:
    """A compressed FITS table of a black picture of `side` x `side` pixels that unpacks to `nbytes`, 4 being a pixel.

    Pillow unpacks it in Python, pixel by pixel.
    """
    table = ("XTENSION= 'BINTABLE'", "BITPIX  = 8", "NAXIS   = 2", "NAXIS1  = 8", "NAXIS2  = 8",
             "ZIMAGE  = T", "ZCMPTYPE= 'GZIP_1  '", "ZBITPIX = 8", "ZNAXIS  = 2", f"ZNAXIS1 = {side}",
             f"ZNAXIS2 = {side}", "ZTILE1  = 8")  # fmt: skip
    head = fits("SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 0")
    return head + fits(*table, data=bytes(64) + gzip.compress(bytes(nbytes)))


def profile() -> bytes:
    """A sound ICC profile."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def frames() -> list[Image.Image]:
    """What follows the first frame."""
    return [noise(seed, (60, 40)) for seed in (1, 2)]
