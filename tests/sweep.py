"""What an architecture's stages are, measured: functions for a pool of processes, for tests and the catalogue."""

from __future__ import annotations

from typing import Any

import torch

from bbx.backbone import Backbone
from bbx.spec import Build, ModelRef
from bbx.taps import capture, channels_first


def measure_timm(name: str) -> dict[str, Any]:
    """`name`, `family` (timm's file), `parameters`, `size`, `weights`, `stages` (name, channels, stride), `faults`.

    One forward at the model's own size, without weights. `stride` is the input's height over the map's, or where that
    is not what timm declares, as `Backbone.stages` has it, measured at two sizes. `faults` are the ways in which what
    came out is not what is declared, by bbx or by timm's own metadata.
    """
    import timm

    from bbx.providers.timm import load
    from bbx.providers.timm_weights import tags

    torch.set_num_threads(1)
    backbone = load(ModelRef("timm", name, "random"), Build(structure=True))
    maps = maps_of(backbone)
    strides = _strides(backbone, maps)
    return {
        "name": name,
        "family": timm.models.model_entrypoint(name).__module__.rpartition(".")[2],
        "parameters": sum(parameter.numel() for parameter in backbone.network.parameters()),
        "size": backbone.preprocess.size,
        "weights": list(tags(name)),
        "stages": [(tap, found.shape[1], round(strides[tap])) for tap, found in maps.items()],
        "faults": _faults(backbone, maps, strides),
    }


def maps_of(backbone: Backbone) -> dict[str, torch.Tensor]:
    """Every stage's map, channels first, of one blank image, without a second forward for exact strides."""
    like = next(backbone.network.parameters())
    pixels = torch.zeros((1, 3, *backbone.preprocess.size), device=like.device)
    with torch.inference_mode():
        forward = backbone.forward
        raw = forward(pixels, backbone.taps) if forward else capture(backbone.network, backbone.taps, pixels)
    return {tap.name: channels_first(raw[tap.name], tap, pixels) for tap in backbone.taps}


def _declared(backbone: Backbone, maps: dict[str, torch.Tensor]) -> dict[str, Any]:
    """timm's `feature_info` of each stage but the stem."""
    network: Any = backbone.network
    stages = [name for name in maps if name != "stem"]
    infos = list(getattr(network.feature_info, "info", network.feature_info))[-len(stages) :]
    return dict(zip(stages, infos, strict=False))


def _strides(backbone: Backbone, maps: dict[str, torch.Tensor]) -> dict[str, float]:
    height = backbone.preprocess.size[0]
    strides = {name: height / found.shape[2] for name, found in maps.items()}
    if all(strides[name] == info["reduction"] for name, info in _declared(backbone, maps).items()):
        return strides
    return {stage.name: stage.stride for stage in backbone.select("all").stages}


def _faults(backbone: Backbone, maps: dict[str, torch.Tensor], strides: dict[str, float]) -> list[str]:
    faults = []
    names = [f"stage{number}" for number in range(1, len(maps) + 1)]
    if list(maps) not in (names[:-1] and ["stem", *names[:-1]], names):
        faults.append(f"names {list(maps)}")
    declared = _declared(backbone, maps)
    network: Any = backbone.network
    fixed = network.pretrained_cfg.get("fixed_input_size")
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
        # A network of one size shows its stride to a row at the border alone.
        rows = backbone.preprocess.size[0] / info["reduction"] if info else height
        rounded = fixed and abs(rows - height) <= 1
        if info and strides[name] != info["reduction"] and not rounded:
            faults.append(f"{name} has stride {strides[name]:g}, timm declares {info['reduction']}")
    return faults
