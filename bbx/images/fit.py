"""A picture scaled and cut to the input, in two ways: `exactly` as the weights' own library does, or `fast`.

`exactly` is bit-equal to `torchvision/transforms/functional.py` (`resize`, `center_crop`) on the PIL path; Pillow's
shortcuts (`draft`, `reducing_gap`, `box`) change pixels, and only `fast` takes them, but for a `box` that is proven.
Of trained EfficientNet-Lite0's maps of five photographs of 1920 x 1080, `fast` changes 2 to 11 % in rms, and single
cells by up to 27 % of a map's largest value; of noise, by up to 60 %.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bbx.errors import ImageError, UsageError
from bbx.spec import Preprocess

# A 1 x 10000 picture scaled to a short side of 256 would be 655 million pixels; 2**26 of them are 256 MiB in Pillow.
_MAX_SCALED_PIXELS = 1 << 26
# `fast`: how many times the scaled picture the decoded or averaged one is at least, in both directions.
_GAP = 1.5
# Pillow takes a box as 32-bit floats, which hold this many steps without rounding.
_FLOAT32_STEPS = 1 << 24
# What each turn does to the axes: (swapped, mirrored in x, mirrored in y) of the stored picture, to find a place in it.
AXES = {
    None: (False, False, False),
    Image.Transpose.FLIP_LEFT_RIGHT: (False, True, False),
    Image.Transpose.ROTATE_180: (False, True, True),
    Image.Transpose.FLIP_TOP_BOTTOM: (False, False, True),
    Image.Transpose.TRANSPOSE: (True, False, False),
    Image.Transpose.ROTATE_270: (True, False, True),
    Image.Transpose.TRANSVERSE: (True, True, True),
    Image.Transpose.ROTATE_90: (True, True, False),
}


class Draft(NamedTuple):
    """What a picture's pixels stand for: all of `size`, the stored (width, height), at 1/`factor`."""

    size: tuple[int, int]
    factor: int = 1


def resampling(preprocess: Preprocess) -> Image.Resampling:
    """Pillow's filter. Raises `UsageError` for a name that it does not know."""
    try:
        return Image.Resampling[preprocess.interpolation.upper()]
    except KeyError:
        known = ", ".join(name.lower() for name in Image.Resampling.__members__)
        raise UsageError(f"no interpolation {preprocess.interpolation!r}", f"Pillow has {known}") from None


def exactly(image: Image.Image, preprocess: Preprocess) -> NDArray[np.uint8]:
    """The upright RGB `image` scaled and cut: `(h, w, 3)`. Raises `ImageError` beyond 2**26 scaled pixels."""
    height, width = _scaled(image.width, image.height, preprocess)
    _check_scaled(image.size, height, width)
    left, across = _middle(width, preprocess.size[1])
    top, down = _middle(height, preprocess.size[0])
    x = _Axis.of(image.width, width, left, across)
    y = _Axis.of(image.height, height, top, down)
    if _vertical_first(image.size, (x.pixels, y.pixels)) != _vertical_first(image.size, (width, height)):
        x, y = _Axis(0, image.width, width, left), _Axis(0, image.height, height, top)
    if (width, height) != image.size:
        box = (x.start, y.start, x.stop, y.stop)
        image = image.resize((x.pixels, y.pixels), resampling(preprocess), box=box)
    if image.size != (across, down):
        image = image.crop((x.first, y.first, x.first + across, y.first + down))
    return _filled(image, preprocess)


def fast(image: Image.Image, turn: Image.Transpose | None, draft: Draft, preprocess: Preprocess) -> NDArray[np.uint8]:
    """As `exactly`, of an RGB `image` that is not turned yet: only what the input shows is scaled, averaged before."""
    swapped, mirrored_x, mirrored_y = AXES[turn]
    height, width = _scaled(*_swapped(draft.size, swapped), preprocess)
    _check_scaled(_swapped(draft.size, swapped), height, width)
    (left, across), (top, down) = _middle(width, preprocess.size[1]), _middle(height, preprocess.size[0])
    stored = _swapped((width, height), swapped)
    first, count = _swapped((left, top), swapped), _swapped((across, down), swapped)
    box: list[float] = []
    for axis, mirrored in enumerate((mirrored_x, mirrored_y)):
        start = stored[axis] - first[axis] - count[axis] if mirrored else first[axis]
        end = draft.size[axis] / draft.factor  # the last pixel of a draft may be a part of one
        box += [start * end / stored[axis], min(end, (start + count[axis]) * end / stored[axis])]
    part = image.resize(count, resampling(preprocess), (box[0], box[2], box[1], box[3]), reducing_gap=_GAP)
    return _filled(part if turn is None else part.transpose(turn), preprocess)


def draft(image: Image.Image, turn: Image.Transpose | None, preprocess: Preprocess) -> Draft:
    """Lets a JPEG that is not loaded yet be decoded at 1/2, 1/4 or 1/8, which never is below the scaled size.

    An image processor of transformers works out sizes by its own rules: for one, the fraction divides both sides, so
    that the aspect stays what it was.
    """
    whole = image.size
    if image.format not in ("JPEG", "MPO") or resampling(preprocess) is Image.Resampling.NEAREST:
        return Draft(whole)
    swapped = AXES[turn][0]
    height, width = _scaled(*_swapped(whole, swapped), preprocess)
    least = _swapped((math.ceil(width * _GAP), math.ceil(height * _GAP)), swapped)
    for factor in (8, 4, 2):
        enough = all(side >= factor * want for side, want in zip(whole, least, strict=True))
        if enough and not (preprocess.processor and any(side % factor for side in whole)):
            image.draft(None, (whole[0] // factor, whole[1] // factor))
            return Draft(whole, factor)
    return Draft(whole)


class Place(NamedTuple):
    """Where an upright picture goes, each (down, across): of `scaled`, `part` from `cut` on, at `at` of the input."""

    scaled: tuple[int, int]
    cut: tuple[int, int]
    part: tuple[int, int]
    at: tuple[int, int]


def place(size: tuple[int, int], preprocess: Preprocess) -> Place:
    """Of a picture of `size`, (width, height). Raises `ImageError` beyond 2**26 scaled pixels."""
    height, width = _scaled(*size, preprocess)
    _check_scaled(size, height, width)
    (top, down), (left, across) = _middle(height, preprocess.size[0]), _middle(width, preprocess.size[1])
    # floor, as torchvision pads
    at = (preprocess.size[0] - down) // 2, (preprocess.size[1] - across) // 2
    return Place((height, width), (top, left), (down, across), at)


def margin(preprocess: Preprocess) -> list[int]:
    """The colour of what a picture does not reach: the mean in mode `pad`, else black."""
    return [round(value * 255) for value in preprocess.mean] if preprocess.mode == "pad" else [0, 0, 0]


class _Axis(NamedTuple):
    """One direction of a resize: what is read, from `start` to `stop`, the `pixels` it gives, the `first` wanted."""

    start: float
    stop: float
    pixels: int
    first: int

    @classmethod
    def of(cls, have: int, scaled: int, first: int, count: int) -> _Axis:
        """Of `scaled` pixels, `count` from `first` on are wanted: the others are left out where no bit changes by it.

        Pillow's centre of an output pixel is `start + (x + 0.5) * (stop - start) / pixels`. Where one pixel's share is
        a whole number of 1/2**n, none of its steps rounds, from wherever it starts.
        """
        steps = scaled // math.gcd(have, scaled)
        if have != scaled and steps & (steps - 1) == 0 and have * steps < _FLOAT32_STEPS:
            return cls(first * have / scaled, (first + count) * have / scaled, count, 0)
        return cls(0, have, scaled, first)


def _vertical_first(have: tuple[int, int], scaled: tuple[int, int]) -> bool:
    """Which pass Pillow takes first, and rounds to bytes: `ImagingResampleInner` of Pillow 13, older ones never do."""
    less_x, less_y = have[0] - scaled[0], have[1] - scaled[1]
    return less_y > 0 and less_y > 2 * less_x


def _scaled(width: int, height: int, preprocess: Preprocess) -> tuple[int, int]:
    """(height, width) that the upright picture is scaled to, before its centre is cut."""
    if preprocess.mode == "squash":
        return preprocess.box
    return (_inside if preprocess.mode == "pad" else _covering)(width, height, preprocess.box)


def _covering(have_width: int, have_height: int, box: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the picture scaled to cover `box`; truncates the longer side as torchvision does."""
    height, width = box
    if have_width * height <= have_height * width:  # for a square crop, torchvision's rule
        return int(width * have_height / have_width), width
    return height, int(height * have_width / have_height)


def _inside(have_width: int, have_height: int, box: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the picture scaled to touch `box` from inside, at least one pixel each way."""
    height, width = box
    if have_width * height <= have_height * width:
        return height, max(1, round(height * have_width / have_height))
    return max(1, round(width * have_height / have_width)), width


def _check_scaled(have: tuple[int, int], height: int, width: int) -> None:
    # Pillow scales the width first, so that the picture in between has the source's height.
    if (width, height) != have and width * max(height, have[1]) > _MAX_SCALED_PIXELS:
        source = f"{have[0]} x {have[1]}"
        raise ImageError(f"too long and narrow ({source} pixels would be scaled to {width} x {height})")


def _middle(have: int, want: int) -> tuple[int, int]:
    """The first pixel and their number of the middle of a side; Python's round, to even, as torchvision's."""
    return round(max(0, have - want) / 2), min(have, want)


def _filled(image: Image.Image, preprocess: Preprocess) -> NDArray[np.uint8]:
    """`image` amid the input's `(h, w, 3)`; what it does not reach is the mean in mode `pad`, else black."""
    height, width = preprocess.size
    if image.size == (width, height):
        return np.array(image)
    if width * height > _MAX_SCALED_PIXELS:
        raise ImageError(f"the input's {width} x {height} pixels are too many")
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[...] = margin(preprocess)
    left, top = (width - image.width) // 2, (height - image.height) // 2  # floor, as torchvision pads
    canvas[top : top + image.height, left : left + image.width] = np.asarray(image)
    return canvas


def _swapped(pair: tuple[int, int], swapped: bool) -> tuple[int, int]:
    return pair[::-1] if swapped else pair
