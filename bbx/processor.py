"""Pictures prepared by transformers' own image processors, bit for bit, in the two halves that bbx needs.

`geometry` runs in a decoding thread and gives cells of one fixed size, `floats` runs on the device. The second half is
a table of the processor's own answers for each of the 256 values, so that its order of rounding, its channel order and
its backend are kept on any device. What cannot be halved so is found by trying, not by the class's name.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from bbx.errors import UsageError, WeightsError
from bbx.spec import Preprocess, ResizeMode

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers
# (height, width) of pictures to try a processor on: larger and smaller than its output, wide and tall.
_TRIALS = ((61, 97), (300, 90), (24, 40), (256, 256))
_NO_RESIZE = {"do_resize": False, "do_center_crop": False, "do_pad": False}
_building = threading.Lock()


def preprocess_of(
    source: str | Path | Mapping[str, Any],
    *,
    size: tuple[int, int] | None = None,
    backend: str | None = None,
    local: bool = True,
) -> tuple[Preprocess, tuple[str, ...]] | None:
    """What the image processor of `source` does, and notes; None where `source` has no processor's configuration.

    `source` is a folder or hub id with a `preprocessor_config.json`, or such a file's content. `size` is another
    (height, width) to prepare for, `backend` transformers' (`torchvision`, `pil`; None: its own choice); `local`
    forbids the network. A processor whose output size follows the picture cannot fill one array: its mean and std are
    kept, with a note. Raises `WeightsError` for a configuration that cannot be used.
    """
    try:
        processor = _from_mapping(source, backend) if isinstance(source, Mapping) else _from_folder(
            source, backend, local=local
        )  # fmt: skip
        if processor is None:
            return None
        preprocess, notes = _halved(processor if size is None else _sized(processor, size))
        return preprocess.override(size=size), notes
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        name = "the image processor" if isinstance(source, Mapping) else f"{source}: preprocessor_config.json"
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise WeightsError(f"{name} cannot be used ({reason})", "is the file whole? fetch it again") from None


def geometry(picture: Image, preprocess: Preprocess) -> NDArray[Any]:
    """The upright RGB `picture` resized and cut by the image processor: `(h, w, 3)` of `cell_dtype(preprocess)`.

    Thread-safe. Raises whatever transformers raises for a picture that it cannot take.
    """
    return _cells(_built(preprocess.processor), picture, whole=cell_dtype(preprocess) == np.uint8)


def cell_dtype(preprocess: Preprocess) -> np.dtype[Any]:
    """What `geometry` gives: uint8, or float32 for a processor that rescales before it resizes (DINOv3)."""
    dtype: np.dtype[Any] = np.dtype(_parsed(preprocess.processor)["bbx"]["cells"])
    return dtype


def floats(batch: Tensor, preprocess: Preprocess) -> Tensor:
    """`(b, h, w, 3)` from `geometry` → `(b, 3, h, w)` float32 `pixel_values`, on the batch's device."""
    import torch

    pixels = batch.permute(0, 3, 1, 2).contiguous()
    if pixels.dtype != torch.uint8:
        return cast("Tensor", _normalised(_built(preprocess.processor), pixels))
    table = _table(preprocess.processor).to(pixels.device)
    return torch.stack([table[channel][pixels[:, channel].int()] for channel in range(3)], dim=1)


def default_preprocess(model_type: str, size: tuple[int, int]) -> Preprocess:
    """What bbx assumes where no processor is configured: ImageNet's mean and std, and the resize usual for the type.

    That of transformers' processor class where one is registered for `model_type`, else a crop of 7/8, bicubic.
    """
    from transformers.models.auto import image_processing_auto

    registered: Any = image_processing_auto
    classes: dict[str, str] = registered.IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}
    if "torchvision" not in classes:
        return Preprocess(size, round(min(size) / 0.875), "bicubic", IMAGENET_MEAN, IMAGENET_STD)
    mode, resize, interpolation = _manner(_sized(_class(classes["torchvision"], "torchvision")(), size))
    return Preprocess(size, resize if mode == "crop" else min(size), interpolation, IMAGENET_MEAN, IMAGENET_STD, mode)


def _from_folder(source: str | Path, backend: str | None, *, local: bool) -> Any:
    import transformers

    auto: Any = transformers.AutoImageProcessor
    if Path(source).is_dir() and not any(
        (Path(source) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")
    ):
        return None
    try:
        return auto.from_pretrained(str(source), local_files_only=local, backend=backend, trust_remote_code=False)
    except OSError as error:
        if Path(source).is_dir():
            raise ValueError(str(error)) from None
        return None  # a repository without one, or not in the cache


def _from_mapping(config: Mapping[str, Any], backend: str | None) -> Any:
    name = str(config.get("image_processor_type", ""))
    return _class(name.removesuffix("Fast"), backend or "torchvision").from_dict(dict(config))


def _class(name: str, backend: str) -> Any:
    import transformers

    name = name.removesuffix("Pil") + ("Pil" if backend == "pil" else "")
    kind = getattr(transformers, name, None)
    # The name may come out of a feature file, which nobody vouches for.
    if not (isinstance(kind, type) and issubclass(kind, transformers.BaseImageProcessor)):
        raise UsageError(f"transformers has no image processor {name!r}", "is another version of it installed here?")
    return kind


def _halved(processor: Any) -> tuple[Preprocess, tuple[str, ...]]:
    """The processor's numbers, and its JSON text if its two halves give what the whole gives on every trial."""
    pictures = [_trial(height, width) for height, width in _TRIALS]
    name = type(processor).__name__
    try:
        wholes = [_pixel_values(processor, picture) for picture in pictures]
    except (TypeError, ValueError, RuntimeError) as error:  # it wants more than a picture, or its numbers do not fit
        reason = str(error).partition("\n")[0]
        return _described(processor), (f"{name} fails on a picture alone ({reason}); its size, mean and std are used",)
    shapes = {tuple(whole.shape) for whole in wholes}
    plain = _described(processor, *(tuple(wholes[0].shape[2:]) if len(shapes) == 1 else ()))
    if len(shapes) > 1:
        note = (
            f"{name} gives each picture another size; here every picture is squashed to "
            f"{plain.size[0]}x{plain.size[1]}, with its mean and std"
        )
        return plain, (note,)
    for cells in ("uint8", "float32"):
        made = replace(plain, processor=_text(processor, cells))
        try:
            if all(_equal(picture, made, whole) for picture, whole in zip(pictures, wholes, strict=True)):
                return made, ()
        except (TypeError, ValueError, RuntimeError):
            continue  # EfficientNet's cannot normalise without rescaling, so that it has no second half
    return plain, (f"{name} does more than bbx can repeat; its size, mean and std are used, by bbx's own resize",)


def _sized(processor: Any, size: tuple[int, int]) -> Any:
    """The processor preparing for another `size`, its ratio of resize to crop kept."""
    config = processor.to_dict()
    mode, resize, _ = _manner(processor)
    own = _square(processor)
    height, width = size
    if mode == "crop" and own and getattr(processor, "do_center_crop", False):
        short = round(min(size) * resize / min(own))
        config["crop_size"] = {"height": height, "width": width}
        config |= {"resize_short": short} if "resize_short" in config else {"size": {"shortest_edge": short}}
    elif "shortest_edge" in dict(processor.size or {}) and hasattr(processor, "crop_pct") and height == width:
        config["size"] = {"shortest_edge": height}
    else:
        config["size"] = {"height": height, "width": width}
    return type(processor).from_dict(config)


def _equal(picture: Image, preprocess: Preprocess, whole: Any) -> bool:
    import torch

    cells = geometry(picture, preprocess)
    return cells.dtype == cell_dtype(preprocess) and torch.equal(
        floats(torch.from_numpy(cells[None]), preprocess), whole
    )


def _trial(height: int, width: int) -> Image:
    from PIL import Image

    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8))


def _pixel_values(processor: Any, images: Any, **options: Any) -> Any:
    import torch

    with torch.inference_mode():
        return processor(images, return_tensors="pt", **options)["pixel_values"]


def _cells(processor: Any, picture: Image, *, whole: bool) -> NDArray[Any]:
    """What the processor resizes and cuts to: its own 0..255, or, where it rescales first, the rescaled floats."""
    options = {"do_rescale": False, "do_normalize": False} if whole else {"do_normalize": False}
    values = _pixel_values(processor, picture, **options)[0].permute(1, 2, 0)
    return np.ascontiguousarray(values.numpy())


def _normalised(processor: Any, pixels: Tensor) -> Any:
    if not processor.do_normalize:
        return pixels
    return processor.normalize(pixels, processor.image_mean, processor.image_std)


@lru_cache(maxsize=32)
def _table(text: str) -> Any:
    """`(3, 256)` float32: what the processor makes of each value in each channel of its output."""
    values = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), (16, 16, 3))
    from PIL import Image

    return _pixel_values(_built(text), Image.fromarray(values.copy()), **_NO_RESIZE)[0].reshape(3, 256)


def _text(processor: Any, cells: str) -> str:
    config = {**processor.to_dict(), "bbx": {"backend": processor.backend, "cells": cells}}
    return json.dumps(config, sort_keys=True, default=str)


@lru_cache(maxsize=32)
def _parsed(text: str) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(text))


_processors: dict[str, Any] = {}


def _built(text: str) -> Any:
    """The processor that `text` describes, built once however many threads ask."""
    with _building:
        if text not in _processors:
            config = _parsed(text)
            kind = _class(config["image_processor_type"].removesuffix("Fast"), config["bbx"]["backend"])
            _processors[text] = kind.from_dict({name: value for name, value in config.items() if name != "bbx"})
        return _processors[text]


def _described(processor: Any, height: int = 0, width: int = 0) -> Preprocess:
    """The processor in plain numbers, for people and for sizes other than its own."""
    mode, resize, interpolation = _manner(processor)
    if not height:
        height, width = _square(processor) or (224, 224)
        mode = "squash"
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if processor.do_normalize:
        mean, std = _three(processor.image_mean), _three(processor.image_std)
    return Preprocess(
        (height, width), resize if mode == "crop" else min(height, width), interpolation,
        mean, std, mode,
    )  # fmt: skip


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue


def _manner(processor: Any) -> tuple[ResizeMode, int, str]:
    """(mode, pixels of the short side before a crop, filter)."""
    size = dict(processor.size or {})
    short = getattr(processor, "resize_short", None) or size.get("shortest_edge") or size.get("height") or 224
    crop_pct = getattr(processor, "crop_pct", None)
    if crop_pct and short < 384:  # ConvNext's rule: from 384 on, no crop
        short, crops = int(short / crop_pct), True
    else:
        crops = bool(getattr(processor, "do_center_crop", False))
    resample = processor.resample
    name = getattr(resample, "name", None) or getattr(resample, "value", None) or _FILTERS[int(resample or 2)]
    return ("crop" if crops else "squash"), int(short), str(name).lower()


def _square(processor: Any) -> tuple[int, int] | None:
    """(height, width) that the processor's configuration names, a short side standing for both."""
    crop = dict(processor.crop_size or {}) if getattr(processor, "do_center_crop", False) else {}
    size = crop or dict(processor.size or {})
    side = size.get("shortest_edge") or size.get("longest_edge")
    height, width = size.get("height") or side, size.get("width") or side
    return (int(height), int(width)) if height and width else None
