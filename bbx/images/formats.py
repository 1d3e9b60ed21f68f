"""What Pillow can open, asked of Pillow itself: the suffixes to take on trust, the signatures of everything else."""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Callable
from functools import cache

from PIL import Image, ImageFile

# Enough for the header of every format that has to be opened to be believed.
HEADER_NBYTES = 1 << 16

# Signatures that no text begins with: the first bytes alone make the claim, however little follows them.
_SURE = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "AVIF", "JPEG2000", "PSD", "EPS")

# What `warnings.filterwarnings("ignore", module=r"PIL\.")` puts in the list.
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


@cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's formats without those it only names: the stubs (HDF5, GRIB, …) and MPEG.

    In the order to try them: the unmistakable first, last those without a signature, which parse before they refuse.
    """
    Image.init()
    names = [name for name in Image.ID if name in Image.OPEN and name != "MPEG" and not _is_stub(name)]
    return tuple(sorted(names, key=lambda name: (name not in _SURE, Image.OPEN[name][1] is None)))


def _is_stub(name: str) -> bool:
    factory = Image.OPEN[name][0]
    return isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)


@cache
def trusted_suffixes() -> frozenset[str]:
    """The suffixes, in lower case with their dot, of the formats that Pillow decodes (`.mpo` is opened as JPEG)."""
    readable = {*readable_formats(), "MPO"}
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in readable)


def claimed_format(header: bytes) -> str | None:
    """The format whose unmistakable signature `header` begins with, None for any other content."""
    return next((name for name in claiming_formats(header) if name in _SURE), None)


def is_image(header: bytes) -> bool:
    """Whether a file that begins with `header`, its first `HEADER_NBYTES` bytes, is an image or claims to be one.

    Formats without a signature (TGA, SPIDER, …) are never guessed: nearly any content would do for them.
    """
    claimants = claiming_formats(header)
    if not claimants or any(name in _SURE for name in claimants):
        return bool(claimants)
    silence_pillow()
    try:
        Image.open(io.BytesIO(header), formats=claimants)
    except Image.DecompressionBombError:
        return True
    except Exception:  # Plugins raise anything at all on data that only looked like theirs.
        return False
    return True


def claiming_formats(header: bytes) -> list[str]:
    """The formats whose plugins take `header`, of which 16 bytes are looked at, for theirs; none means no image."""
    start = header[:16]
    found = []
    for name, accept in _acceptors():
        try:
            claims = accept(start)
        except (IndexError, struct.error):  # Shorter than the signature.
            continue
        # A text instead of True says why this build of Pillow cannot open it.
        if claims and not isinstance(claims, str):
            found.append(name)
    return found


@cache
def _acceptors() -> tuple[tuple[str, Callable[[bytes], bool | str]], ...]:
    return tuple((name, accept) for name in readable_formats() if (accept := Image.OPEN[name][1]))


def silence_pillow() -> None:
    """Ignore the warnings of Pillow's modules, for the whole process, since `catch_warnings` is not thread-safe.

    Every one of them is about a file; a file that matters is decoded or becomes a reason.
    """
    if warnings.filters[:1] != [_QUIET]:
        warnings.filterwarnings("ignore", module=r"PIL\.")
