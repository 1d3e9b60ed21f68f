"""What an architecture's stages are, measured: functions for a pool of processes, for tests and the catalogue."""

from __future__ import annotations

from typing import Any

import torch

from bbx.backbone import Backbone
from bbx.spec import Build, ModelRef
from bbx.taps import capture, channels_first


def measure_timm(name: str) -> dict[str, Any]:
    """`name`, `family` (timm's file), `parameters`, `size`, `weights`, `stages` (name, channels, stride), `faults`.

    One forward at the model's own size, without weights. `stride` is the input's height over the map's, rounded;
    `faults` are the ways in which what came out is not what is declared, by bbx or by timm's own metadata.
    """
    import timm

    from bbx.providers.timm import load
    from bbx.providers.timm_weights import tags

    torch.set_num_threads(1)
    backbone = load(ModelRef("timm", name, "random"), Build(structure=True))
    maps = maps_of(backbone)
    height = backbone.preprocess.size[0]
    stages = [(tap, tuple(found.shape[1:]), height / found.shape[2]) for tap, found in maps.items()]
    return {
        "name": name,
        "family": timm.models.model_entrypoint(name).__module__.rpartition(".")[2],
        "parameters": sum(parameter.numel() for parameter in backbone.network.parameters()),
        "size": backbone.preprocess.size,
        "weights": list(tags(name)),
        "stages": [(tap, shape[0], round(stride)) for tap, shape, stride in stages],
        "faults": _faults(backbone, maps),
    }


def maps_of(backbone: Backbone) -> dict[str, torch.Tensor]:
    """Every stage's map, channels first, of one blank image, without a second forward for exact strides."""
    like = next(backbone.network.parameters())
    pixels = torch.zeros((1, 3, *backbone.preprocess.size), device=like.device)
    with torch.inference_mode():
        forward = backbone.forward
        raw = forward(pixels, backbone.taps) if forward else capture(backbone.network, backbone.taps, pixels)
    return {tap.name: channels_first(raw[tap.name], tap, pixels) for tap in backbone.taps}


def _faults(backbone: Backbone, maps: dict[str, torch.Tensor]) -> list[str]:
    faults = []
    names = [f"stage{number}" for number in range(1, len(maps) + 1)]
    if list(maps) not in (names[:-1] and ["stem", *names[:-1]], names):
        faults.append(f"names {list(maps)}")
    network: Any = backbone.network
    infos = list(getattr(network.feature_info, "info", network.feature_info))[-len([m for m in maps if m != "stem"]) :]
    declared = dict(zip([name for name in maps if name != "stem"], infos, strict=False))
    before = (1 << 20, 1 << 20)
    for name, found in maps.items():
        if found.ndim != 4:
            faults.append(f"{name} is {tuple(found.shape)}, no (b, c, h, w)")
            continue
        height, width = found.shape[2:]
        if height > before[0] or width > before[1]:
            faults.append(f"{name} is larger than the stage before it: {(height, width)} after {before}")
        before = (height, width)
        info = declared.get(name)
        if info and info["num_chs"] != found.shape[1]:
            faults.append(f"{name} has {found.shape[1]} channels, timm declares {info['num_chs']}")
        if info and abs(backbone.preprocess.size[0] / height / info["reduction"] - 1) > 0.2:
            faults.append(f"{name} is {height} high, timm declares stride {info['reduction']}")
    return faults
