"""One image file → the uint8 pixels the network sees, or an `ImageError` whose message is the row's reason.

Bit-equal to the library's own transform of the same upright picture, `torchvision.transforms._presets` on the PIL path,
unless `decode="fast"` is asked for (`fit`): what `decode="gpu"` leaves to this module (`bbx.gpu_decode`) is exact.
TIFF's orientation is applied by Pillow while decoding, so that `exif="ignore"` cannot undo it.
"""

from __future__ import annotations

import errno
import os
import re
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from bbx.errors import ImageError
from bbx.images import fit, source
from bbx.images.formats import claimed_format, readable_formats, silence_pillow
from bbx.spec import InputFile, Preprocess

# Where Pillow itself speaks of a decompression bomb.
MAX_PIXELS = 2 * 89_478_485
_REASON_LENGTH = 200
# Pillow's plugins say it in as many ways.
_ENDS_EARLY = re.compile(r"truncated|not enough|EOF|but only got|incomplete|no more images", re.IGNORECASE)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_OPEN_REASONS = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ELOOP: "a symbolic link that leads to itself",
    errno.ENAMETOOLONG: "the file name is too long",
}


class Decoded(NamedTuple):
    """What came of one file: its pixels, `(h, w, 3)`, or the reason why there are none, and the file as it was."""

    pixels: NDArray[Any] | None
    reason: str
    file: InputFile


def read_image(path: str | os.PathLike[str], preprocess: Preprocess, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """The first frame of `path` as `(h, w, 3)` RGB uint8, `(h, w)` being `preprocess.size`, in `out` if given.

    Thread-safe, and it never waits: only regular files are opened. Raises `ImageError` with a reason of one line for
    whatever is wrong with the file, `UsageError` for a preprocessing that Pillow does not know.
    """
    decoded = decode(path, preprocess, digest=False)
    if decoded.pixels is None:
        raise ImageError(decoded.reason)
    if out is None:
        return decoded.pixels
    out[...] = decoded.pixels
    return out


def decode(
    path: str | os.PathLike[str], preprocess: Preprocess, *, max_pixels: int = MAX_PIXELS, digest: bool = True
) -> Decoded:
    """As `read_image`, a failure being an answer like any other; `digest`: the content's is taken too."""
    fit.resampling(preprocess)
    silence_pillow()
    text = os.fspath(path)
    facts = InputFile()
    try:
        with source.open_regular(text) as file:
            facts = source.facts_of(file)
            content = source.held(file, facts)
            if digest and content is not file:
                facts = facts._replace(digest=source.digest(content))
            image = _identify(content, max_pixels)
            pixels = prepare(image, preprocess, draft=_draft(image, preprocess))
            if content is file:  # a large one, and no rubbish, else it would not have got here
                facts_now = facts._replace(digest=source.digest(file)) if digest else facts
                source.check_unchanged(file, facts)
                facts = facts_now
    except Exception as error:  # Pillow's plugins raise anything at all on bad data.
        # The text alone leaves: the error would keep the half-decoded image alive.
        return Decoded(None, _reason(error, max_pixels), facts)
    return Decoded(pixels, "", facts)


def prepare(image: Image.Image, preprocess: Preprocess, *, draft: fit.Draft | None = None) -> NDArray[Any]:
    """`image` upright, as RGB, scaled and cut by `preprocess`: `(h, w, 3)` uint8.

    A transformers image processor may give float32 instead (`bbx.processor.cell_dtype`). `draft`: what the pixels of
    `image` stand for, where they are to be decoded at a fraction.

    Raises `ImageError` where the picture has no mapping to 8 bits or would be scaled beyond 2**26 pixels, and
    whatever Pillow raises where `image` is not loaded yet and fails to.
    """
    image.load()
    turn = turn_of(image) if preprocess.exif == "apply" else None
    rgb = _to_rgb(image)
    if preprocess.decode == "fast" and not preprocess.processor:
        return fit.fast(rgb, turn, draft or fit.Draft(rgb.size), preprocess)
    if turn is not None:
        rgb = rgb.transpose(turn)
    if preprocess.processor:
        from bbx.processor import geometry

        return geometry(rgb, preprocess)
    return fit.exactly(rgb, preprocess)


def _draft(image: Image.Image, preprocess: Preprocess) -> fit.Draft | None:
    if preprocess.decode != "fast":
        return None
    return fit.draft(image, turn_of(image) if preprocess.exif == "apply" else None, preprocess)


def _identify(file: BinaryIO, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(file, formats=readable_formats())
    except UnidentifiedImageError:
        file.seek(0)
        header = file.read(64)
    else:
        if image.format == "EPS":
            # Whatever the suffix says: a program fed by a stranger's file, with no limit on its time.
            raise ImageError("EPS is drawn by an external program (Ghostscript), which bbx does not run")
        if image.width * image.height > max_pixels:
            raise ImageError(f"too large ({image.width * image.height} pixels, limit {max_pixels})")
        return image
    if claimed := claimed_format(header):
        raise ImageError(f"damaged or truncated {claimed} (its header cannot be read)")
    raise ImageError(f"not an image (starts with {_shown_start(header)})")


def _shown_start(header: bytes) -> str:
    text = header.removeprefix(b"\xef\xbb\xbf").lstrip()[:24].split(b"\n")[0].rstrip()
    if text and all(32 <= byte < 127 for byte in text):
        return repr(text.decode("ascii"))
    return "bytes " + header[:8].hex(" ")


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What makes `image` upright by the rules of `ImageOps.exif_transpose`; broken EXIF counts as none."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # The parsers of EXIF and XMP raise anything at all on bad data.
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """`image.convert("RGB")`, save that 16-bit grey gives its high byte, as Pillow gives for 16-bit colour.

    Pillow alone would saturate it to white. Other integers and floats have no agreed range: only 0..255 passes.
    """
    if image.mode == "RGB":
        return image
    # Pillow before 11 reads 16-bit PNG as "I", and every Pillow reads 16-bit PGM so, scaled to 0..65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 255):
            raise ImageError(f"values from {low:g} to {high:g} have no defined mapping to 8 bits")
    if "transparency" in image.info:
        # Opaque RGB is wanted; with the entry, Pillow warns, or fails where it is malformed.
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _reason(error: Exception, max_pixels: int) -> str:
    """What is wrong in plain words: one line of ASCII, the same on every run. Pillow is never told the path."""
    if isinstance(error, ImageError):
        return _one_line(error.message)
    if isinstance(error, OSError) and error.errno is not None:
        text = _OPEN_REASONS.get(error.errno) or f"cannot be read ({os.strerror(error.errno)})"
        return _one_line(text)
    if isinstance(error, MemoryError):
        return "out of memory while decoding"
    text = str(error) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        pixels = [*re.findall(r"\d+", text), "?"][0]
        return f"too large ({pixels} pixels, limit {max_pixels})"
    if _ENDS_EARLY.search(text):
        detail = re.sub(r"^image file is truncated(?: \((.*)\))?$|^Truncated File Read$", r"\1", text)
        return _one_line(f"truncated ({detail or 'the file ends too early'})")
    named = text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"
    return _one_line(f"damaged or truncated ({named})")


def _one_line(text: str) -> str:
    text = re.sub(r"<[^<>]*( at 0x| name=)[^<>]*>", "the file", text)
    ascii_only = text.encode("ascii", "backslashreplace").decode("ascii")
    plain = " ".join(re.sub(r"[\x00-\x1f\x7f]+", " ", ascii_only).split())
    return plain if len(plain) <= _REASON_LENGTH else plain[: _REASON_LENGTH - 3] + "..."
