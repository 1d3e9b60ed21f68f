"""The folder of pictures that every contestant reads: JPEGs of 640×480, cut out of `sample_images`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "sample_images"
SIZE = (640, 480)


def make(folder: Path, count: int, size: tuple[int, int] = SIZE) -> Path:
    """`count` JPEGs of `size` (width, height), the same ones each time; gives the folder."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    sources = [Image.open(path).convert("RGB") for path in sorted(SAMPLES.glob("*.[jp][pn]g"))]
    for number in range(count):
        picture = sources[number % len(sources)]
        width, height = (int(side * random.uniform(0.6, 0.95)) for side in picture.size)
        left, top = random.integers(0, picture.width - width), random.integers(0, picture.height - height)
        crop = picture.crop((left, top, left + width, top + height)).resize(size)
        crop.save(folder / f"{number:06}.jpg", quality=90)
    return folder


def some(folder: Path, source: Path, count: int) -> Path:
    """`count` pictures of `source`, over and over where it has fewer, by hard links; gives `folder`."""
    folder.mkdir(parents=True)
    paths = listed(source)
    for number in range(count):
        os.link(paths[number % len(paths)], folder / f"{number:06}.jpg")
    return folder


def listed(folder: Path) -> list[Path]:
    """The pictures, in the order of their names, which is the order of the rows."""
    return sorted(folder.glob("*.jpg"))
