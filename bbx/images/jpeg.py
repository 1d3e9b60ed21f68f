"""Which JPEGs every decoder is sure to decode as libjpeg does, by what their headers say: the plain ones.

The others are rarer, and decoders part company over them: colours that are not YCbCr, arithmetic coding, 12 bits, a
file that was cut off, a scan per component. Progressive ones gain nothing on a GPU either: nvJPEG has the CPU undo
their Huffman code, one after the other.
"""

from __future__ import annotations

import re
from io import BytesIO

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

# Of (width, height): what the hardware engines take, and nothing so small that a block is most of it.
_SIDES = range(16, 16385)
# Of the first component, the others having one sample each: 4:4:4, 4:2:2, 4:2:0, 4:4:0.
_SAMPLINGS = ((1, 1), (2, 1), (2, 2), (1, 2))
_COLOURS = ((1, 2, 3), (0, 1, 2))
_FRAME, _SCAN, _END = 0xC0, 0xDA, b"\xff\xd9"
_NO_FRAMES = (0xC4, 0xC8, 0xCC)
# In a scan: not a stuffed byte, a restart or a fill byte.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def open_plain(content: BytesIO) -> JpegImageFile | None:
    """The JPEG in `content`, not loaded; None unless it is plain. Raises what Pillow does."""
    if not _is_baseline(content.getbuffer()):
        return None
    image = Image.open(content, formats=("JPEG",))
    # A multi-picture JPEG calls itself MPO.
    if image.format != "JPEG" or not isinstance(image, JpegImageFile) or not _is_usual(image):
        return None
    return image


def _is_baseline(jpeg: memoryview) -> bool:
    """Huffman-coded in a single scan, which ends with the file and holds no marker that has no place in it.

    Where a file was cut, patched or overwritten inside and libjpeg gives it up, there is such a marker; a GPU's decoder
    might not say a word.
    """
    components, at = 0, 2
    while at + 10 <= len(jpeg) and jpeg[at] == 0xFF:
        marker, start = jpeg[at + 1], at + 4
        at += 2 + int.from_bytes(jpeg[at + 2 : start], "big")
        if marker == _SCAN:
            found = _MARKER.search(jpeg, at)
            return jpeg[start] == components and found is not None and jpeg[found.start() :] == _END
        if marker & 0xF0 == 0xC0 and marker not in _NO_FRAMES:
            components = jpeg[start + 5] if marker == _FRAME and not components else -1
    return False


def _is_usual(image: JpegImageFile) -> bool:
    """Grey, or YCbCr beyond doubt, with a sampling that every decoder knows; Pillow itself refuses but 8 bits."""
    if image.width not in _SIDES or image.height not in _SIDES:
        return False
    samplings = [tuple(one[1:3]) for one in image.layer]
    if image.mode == "L":
        return samplings == [(1, 1)]
    sure = tuple(one[0] for one in image.layer) in _COLOURS and image.info.get("adobe_transform", 1) == 1
    return image.mode == "RGB" and sure and samplings[0] in _SAMPLINGS and samplings[1:] == [(1, 1), (1, 1)]
