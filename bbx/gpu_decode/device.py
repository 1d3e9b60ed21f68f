"""Whether a device decodes JPEGs, asked before the first image: of its kind, of the preprocessing, and by doing it."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bbx.errors import StartError, UsageError
from bbx.spec import Preprocess

KINDS = ("cuda",)
"""Devices that decode; the tests add the CPU, by torchvision's decoder there."""
_INTERPOLATIONS = ("bilinear", "bicubic")  # torchvision has no other with antialias on every device
# A file that a GPU decoded goes on with no other pixels: hence "an output of its own".
_ELSE = "--decode fast gives nearly the same pixels for less on any device, into an output of its own"
_HINT = f"gpu needs a torchvision that was built for CUDA, with nvJPEG; {_ELSE}"
# Steps of 255, mean: torchvision's own tests allow nvJPEG two, on photographs.
_FAR = 4.0


def can_decode(device: torch.device) -> bool:
    """Whether `device` is of a kind that decodes."""
    return device.type in KINDS


def check_device(device: torch.device) -> None:
    """Raises `UsageError` unless `device` is of a kind that decodes."""
    if not can_decode(device):
        raise UsageError(
            f"--decode gpu needs a CUDA device, and this run is on {device}",
            _ELSE,
        )


def check(preprocess: Preprocess, device: torch.device) -> None:
    """Raises `UsageError` where `device` cannot do what `preprocess` asks for, `StartError` where this torch cannot."""
    if preprocess.decode != "gpu":
        return
    check_device(device)
    if preprocess.processor:
        name = preprocess.processor_name or "an image processor"
        raise UsageError(
            f"--decode gpu does not go with {name} of transformers, which works on the CPU",
            "--decode fast does, and so does exact, the default",
        )
    if preprocess.interpolation not in _INTERPOLATIONS:
        raise UsageError(
            f"--decode gpu scales by {' or '.join(_INTERPOLATIONS)}, and these weights want {preprocess.interpolation}",
            "--decode fast does that, and so does exact, the default",
        )
    _try_out(device)


def decode_jpegs(jpegs: list[Tensor], device: torch.device) -> list[Tensor]:
    """`(3, h, w)` uint8 on `device` of each file's bytes; raises whatever torchvision does, for all of them alike.

    EXIF is left to apply: torchvision implements `apply_exif_orientation` on the CPU alone.
    """
    from torchvision.io import ImageReadMode, decode_jpeg  # deprecated since 0.29: it may be gone

    decoded: list[Tensor] = decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=device)
    return decoded


@cache
def _try_out(device: torch.device) -> None:
    """Raises `StartError` unless `device` decodes pictures in colour and a grey one as Pillow does."""
    files = [_sample(), _sample(subsampling=0), _sample(subsampling=2), _sample("L")]
    try:
        if device.type == "cuda":  # The decoder waits for none of the kernels that still use what memory it gets.
            torch.cuda.synchronize(device)
        found = decode_jpegs([torch.frombuffer(file.getbuffer(), dtype=torch.uint8) for file in files], device)
        pictures = [one.cpu().permute(1, 2, 0).numpy() for one in found]
    except Exception as error:  # Not built with nvJPEG, a driver that is too old, a torchvision without decode_jpeg.
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise StartError(f"{device} decodes no JPEG: {words[0][:200]}", _HINT) from error
    for file, picture in zip(files, pictures, strict=True):
        wanted = np.asarray(Image.open(file).convert("RGB")).astype(int)
        if picture.shape != wanted.shape or np.abs(picture - wanted).mean() > _FAR:
            raise StartError(f"{device} decodes a JPEG to other pixels than Pillow does", _HINT)


def _sample(mode: str = "RGB", *, subsampling: int = -1) -> io.BytesIO:
    """A JPEG of colours that change slowly; both its sides end within a block."""
    across, down = np.meshgrid(np.linspace(0, 255, 70), np.linspace(0, 255, 50))
    file = io.BytesIO()
    picture = Image.fromarray(np.stack([across, down, 255 - across], -1).astype(np.uint8)).convert(mode)
    picture.save(file, "JPEG", quality=95, subsampling=subsampling)
    return file
