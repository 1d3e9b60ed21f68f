"""`--decode gpu`: plain JPEGs decoded, scaled and cut on the CUDA device, all else by the worker processes, exactly."""

from __future__ import annotations

import torch

from bbx.gpu_decode.decoders import DeviceDecoders
from bbx.gpu_decode.device import can_decode, check, check_device
from bbx.images import Decoders, DecodeSettings

__all__ = ["DeviceDecoders", "can_decode", "check", "check_device", "decoders_for"]


def decoders_for(count: int, settings: DecodeSettings, device: torch.device) -> Decoders:
    """What decodes as `settings` ask, for a network on `device`. Raises as `check` does."""
    if settings.preprocess.decode != "gpu":
        return Decoders(count, settings)
    check(settings.preprocess, device)
    return DeviceDecoders(count, settings, device)
