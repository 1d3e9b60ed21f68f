"""Decoded pictures on the device → the network's inputs: turned upright, scaled and cut as `bbx.images.fit` says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from bbx.images.fit import AXES, margin, place
from bbx.spec import Preprocess


def empty_cells(count: int, preprocess: Preprocess, device: torch.device) -> Tensor:
    """`(b, 3, h, w)` uint8 in the colour of what no picture reaches."""
    fill = torch.tensor(margin(preprocess), dtype=torch.uint8, device=device)
    return fill[:, None, None].repeat(count, 1, *preprocess.size)


def fill_cells(
    cells: Tensor, pictures: Sequence[Tensor], turns: Sequence[Image.Transpose | None], preprocess: Preprocess
) -> None:
    """Each picture, `(3, h, w)` as it is stored, into its cell."""
    for cell, picture, turn in zip(cells, pictures, turns, strict=True):
        _fill(cell, _turned(picture, turn), preprocess)


def _turned(image: Tensor, turn: Image.Transpose | None) -> Tensor:
    """`(3, h, w)` upright."""
    swapped, mirrored_x, mirrored_y = AXES[turn]
    mirrored = [2] * mirrored_x + [1] * mirrored_y
    flipped = image.flip(mirrored) if mirrored else image  # flip always copies
    return flipped.transpose(1, 2).contiguous() if swapped else flipped


def _fill(cell: Tensor, picture: Tensor, preprocess: Preprocess) -> None:
    """`picture`, `(3, h, w)` upright, scaled and cut into `cell`, the input."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    where = place((picture.shape[2], picture.shape[1]), preprocess)
    # Whole, then cut: a part alone would be sampled at other places, and here it saves little.
    scaled = resize(picture, list(where.scaled), InterpolationMode(preprocess.interpolation), antialias=True)
    (top, left), (down, across), (y, x) = where.cut, where.part, where.at
    cell[:, y : y + down, x : x + across] = scaled[:, top : top + down, left : left + across]
