"""`AutoImageProcessor`: pictures as a model takes them, in transformers' words.

The same code that `bbx extract` runs, hence the same bits: decoded upright, resized and cut as the weights want it,
normalised to `pixel_values`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bbx.backbone import normalise
from bbx.errors import UsageError
from bbx.images import prepare, read_image
from bbx.providers import load_structure, saved
from bbx.spec import Decode, ExifMode, Preprocess, ResizeMode, one_of

Picture = Image.Image | str | os.PathLike[str] | NDArray[Any] | Tensor


class BatchFeature(dict[str, Any]):
    """`{"pixel_values": …}`, for `model(**inputs)`; the value is an attribute too."""

    @property
    def pixel_values(self) -> Any:
        """`(b, 3, h, w)`, or a list of `(3, h, w)`."""
        return self["pixel_values"]

    def to(self, device: str | torch.device) -> BatchFeature:
        """The tensors on `device`."""
        return BatchFeature({name: value.to(device) for name, value in self.items()})


class AutoImageProcessor:
    """`processor(images, return_tensors="pt")` → `{"pixel_values": (b, 3, h, w)}`, by the model's own preprocessing."""

    def __init__(self, preprocess: Preprocess) -> None:
        if preprocess.decode == "gpu":
            raise UsageError(
                "an image processor decodes on the CPU: there is no decode='gpu'", "decode='fast' or 'exact'"
            )
        self.preprocess = preprocess

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        weights: str = "auto",
        size: int | tuple[int, int] | None = None,
        resize_mode: ResizeMode | None = None,
        exif: ExifMode | None = None,
        decode: Decode | None = None,
    ) -> AutoImageProcessor:
        """The preprocessing of the weights that `model` names (nothing is downloaded for torchvision and timm).

        `size`, (height, width) in pixels, `resize_mode`, `exif` and `decode` override it. Raises `UsageError`,
        `WeightsError`.
        """
        height_width = (size, size) if isinstance(size, int) else size
        folder = Path(model)
        own = saved.read_config(folder).preprocess if saved.is_saved(folder) else None
        preprocess = own or load_structure(str(model), weights=weights, size=height_width).preprocess
        return cls(preprocess.override(size=height_width, mode=resize_mode, exif=exif, decode=decode))

    def __call__(
        self, images: Picture | Sequence[Picture], return_tensors: Literal["pt", "np"] | None = None
    ) -> BatchFeature:
        """One picture or several: PIL images, paths, or RGB arrays and tensors, uint8 `(h, w, 3)` or `(3, h, w)`.

        `return_tensors`: `pt` a tensor, `np` an array, `(b, 3, h, w)`; None a list of arrays `(3, h, w)`, float32.
        Raises `UsageError` for what is no picture, `ImageError` for a file that cannot be read.
        """
        if return_tensors is not None:
            one_of("return_tensors", return_tensors, Literal["pt", "np"])
        several: Sequence[Any] = images if isinstance(images, (list, tuple)) else [images]
        if not several:
            raise UsageError("no image was given", "a picture, or a list of them")
        cells = np.stack([self._cells(picture) for picture in several])
        pixels = normalise(torch.from_numpy(cells), self.preprocess)
        if return_tensors == "pt":
            return BatchFeature(pixel_values=pixels)
        array = pixels.numpy()
        return BatchFeature(pixel_values=array if return_tensors == "np" else list(array))

    def _cells(self, picture: Picture) -> NDArray[Any]:
        if isinstance(picture, (str, os.PathLike)):
            return read_image(picture, self.preprocess)
        return prepare(picture if isinstance(picture, Image.Image) else _from_array(picture), self.preprocess)

    def __repr__(self) -> str:
        return f"AutoImageProcessor({self.preprocess.describe()})"


def _from_array(picture: object) -> Image.Image:
    array = picture.detach().cpu().numpy() if isinstance(picture, Tensor) else picture
    if not isinstance(array, np.ndarray):
        raise UsageError(f"a {type(picture).__name__} is no picture", "give a PIL image, a path, or a uint8 array")
    if array.dtype != np.uint8 or array.ndim != 3 or 3 not in (array.shape[0], array.shape[2]):
        raise UsageError(
            f"an array of {array.dtype} {array.shape} is no picture", "uint8, (h, w, 3) or (3, h, w), in RGB"
        )
    return Image.fromarray(array if array.shape[2] == 3 else np.ascontiguousarray(array.transpose(1, 2, 0)))
