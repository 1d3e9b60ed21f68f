"""Whether a network keeps its values where it is run in another way: tried on itself, with pictures that round most."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bbx.backbone import Backbone

TOLERANCE = 5e-6
"""Of a map's largest value: what a way of running may change. Measured of folding: 3e-7 to 4.7e-6; between flat
pictures it differs by a factor of 1.8, and all together stays below 1e-5."""


def hard_pixels(backbone: Backbone) -> Tensor:
    """Noise, and a dark and a white picture of next to no contrast, the same each time, `(3, 3, h, w)`.

    Where a picture is flat, trained weights take away nearly all of it again: what is left rounds ten times as much.
    """
    like, preprocess = next(backbone.network.parameters()), backbone.preprocess
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((3, *preprocess.size), generator=generator)
    step = torch.randint(0, 2, noise.shape, generator=generator) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    flat = [(picture - mean) / std for picture in (0.02 + step, 1 - step)]
    return torch.stack([noise, *flat]).to(like.device)


def maps_of(backbone: Backbone, pixels: Tensor) -> dict[str, Tensor]:
    """Each stage, as it is kept while the network runs again."""
    with torch.inference_mode():
        return {name: tensor.clone() for name, tensor in backbone(pixels).items()}


def same(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """Whether no map of any image has changed by more than `TOLERANCE`."""
    return all(_difference(before[name], after[name]) <= TOLERANCE for name in before)


def _difference(before: Tensor, after: Tensor) -> float:
    """The largest of any image, relative to that image's largest value."""
    largest = before.abs().flatten(1).amax(1).clamp_min(torch.finfo(before.dtype).tiny)
    return float(((before - after).abs().flatten(1).amax(1) / largest).max())
