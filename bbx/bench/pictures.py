"""Pictures to measure with where the user has none: as hard to decode as photographs are, and never blank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

COUNT = 64
_WIDTH, _HEIGHT = 640, 480


def make_pictures(folder: Path) -> list[Path]:
    """64 JPEGs of 640×480 in `folder`, the same each time: 1/f noise, as photographs have it, with some edges."""
    from PIL import Image, ImageDraw

    random = np.random.default_rng(0)
    field = _pink(random, 2 * _HEIGHT, 2 * _WIDTH)
    paths = [folder / f"{number:02}.jpg" for number in range(COUNT)]
    for path in paths:
        top, left = random.integers(0, _HEIGHT), random.integers(0, _WIDTH)
        picture = Image.fromarray(np.ascontiguousarray(field[top : top + _HEIGHT, left : left + _WIDTH]))
        draw = ImageDraw.Draw(picture)
        for _ in range(8):
            x, y, width, height = random.integers(0, (_WIDTH, _HEIGHT, _WIDTH // 3, _HEIGHT // 3)).tolist()
            draw.rectangle((x, y, x + width, y + height), outline=tuple(random.integers(0, 256, 3).tolist()), width=3)
        picture.save(path, quality=90)
    return paths


def _pink(random: np.random.Generator, height: int, width: int) -> NDArray[Any]:
    """`(h, w, 3)` uint8 whose amplitude falls with the frequency."""
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falling = 1 / np.maximum(np.hypot(rows, columns), 1 / width)
    channels = []
    for _ in range(3):
        field = np.fft.irfft2(np.fft.rfft2(random.standard_normal((height, width))) * falling, s=(height, width))
        channels.append(np.clip(128 + 48 * field / field.std(), 0, 255))
    return np.stack(channels, axis=2).astype(np.uint8)
