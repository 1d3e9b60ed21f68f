"""What bbx knows of each of transformers' backbone types: where its stages are, and what it adds to them.

Measured with transformers 5.23; a test holds the table to its `MODEL_FOR_BACKBONE_MAPPING`. Not itself a provider.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

Maps = Callable[[Any, Tensor, int], list[Tensor]]


@dataclass(frozen=True, slots=True)
class Family:
    """One backbone type.

    `stages` is the ModuleList whose n-th module ends stage n, `stem` the module that ends the stem (empty: none).
    `norms` are what the backbone class adds to each map: gone under `raw`. `after` runs past the last stage and serves
    no map. `merges`: a stage's module ends by merging patches for the next one, after the map is taken.
    `prefix` is the number of a ViT's tokens that are no patches; None where the hidden states are no plain tokens.
    `raw`, where the class's own maps are not what the ordinary forward calls its stages, gives the maps from the stem
    to a depth. `shifts`: the class shifts windows where its ordinary forward would not. `flat`: its maps are tokens.
    `sizes`: `any` input, one `fixed` size, or patches that divide into `windows`; `size` is the usual side in pixels
    where the configuration's is that of the position embedding. `attends`: attention maps come out when asked for.
    `recorded`: transformers collects the hidden states by hooks on the stages.
    `plain`: transformers has no backbone class for the type; its base model's hidden states are the stages.
    """

    stages: str
    stem: str = ""
    norms: str = ""
    after: tuple[str, ...] = ()
    merges: bool = False
    prefix: Callable[[Any], int] | None = None
    raw: Maps | None = None
    shifts: bool = False
    flat: bool = False
    sizes: Literal["any", "fixed", "windows"] = "any"
    size: int = 0
    attends: bool = False
    recorded: bool = False
    plain: bool = False


def _one(_config: Any) -> int:
    return 1


def _registers(config: Any) -> int:
    return 1 + int(config.num_register_tokens)


def _focalnet(network: Any, pixels: Tensor, depth: int) -> list[Tensor]:
    """The class's own maps are taken after the downsampling to the next stage."""
    hidden, grid = network.focalnet.embeddings(pixels)
    maps = [_on_grid(hidden, grid)]
    for stage in network.focalnet.encoder.stages[:depth]:
        here = grid
        hidden, whole, after = stage(hidden, here)
        grid = after[-2:]
        maps.append(_on_grid(whole, here))
    return maps


def _on_grid(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    height, width = grid
    return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)


def _dinov3_convnext(network: Any, pixels: Tensor, depth: int) -> list[Tensor]:
    """The class's own stem is the picture itself; each stage here begins with its downsampling."""
    maps: list[Tensor] = []
    hidden = pixels
    for number, stage in enumerate(network.model.stages[: max(depth, 1)]):
        for layer in stage.downsample_layers:
            hidden = layer(hidden)
        if number == 0:
            maps.append(hidden)
        if number < depth:
            for layer in stage.layers:
                hidden = layer(hidden)
            maps.append(hidden)
    return maps


_CONVNEXT = Family("encoder.stages", "embeddings", norms="hidden_states_norms", recorded=True)
_RESNET = Family("encoder.stages", "embedder")
_DINOV2 = Family("encoder.layer", "embeddings", norms="layernorm", prefix=_one, attends=True, size=224, recorded=True)
_REGISTERS = Family("encoder.layer", "embeddings", norms="layernorm", prefix=_registers, attends=True, recorded=True)
_DINOV3 = Family("model.layer", "embeddings", norms="norm", prefix=_registers, attends=True, recorded=True)
_PP_LCNET = Family("encoder.blocks", "encoder.convolution", recorded=True)

FAMILIES: dict[str, Family] = {
    "beit": Family(
        "beit.layers", "beit.embeddings", after=("beit.layernorm",), prefix=_one, attends=True, recorded=True
    ),
    "bit": Family("bit.encoder.stages", "bit.embedder", after=("bit.norm", "bit.pooler")),
    "convnext": _CONVNEXT,
    "convnextv2": _CONVNEXT,
    # Not tried by bbx's tests: natten, which it needs, is compiled for one torch and one CUDA at a time.
    "dinat": Family("encoder.levels", "embeddings", norms="hidden_states_norms", merges=True),
    "dinov2": _DINOV2,
    "dinov2_with_registers": _REGISTERS,
    "dinov3_convnext": Family(
        "model.stages", "model.stages.0.downsample_layers.1", raw=_dinov3_convnext, recorded=True
    ),
    "dinov3_vit": _DINOV3,
    "focalnet": Family(
        "focalnet.encoder.stages", "focalnet.embeddings", after=("focalnet.layernorm", "focalnet.pooler"),
        merges=True, raw=_focalnet,
    ),
    "hgnet_v2": _RESNET,
    "hiera": Family("encoder.stages", "embeddings", norms="hidden_states_norms", sizes="fixed", attends=True),
    "lw_detr_vit": Family("encoder.layer", "embeddings", sizes="windows", attends=True, recorded=True),
    "maskformer-swin": Family(
        "model.encoder.layers", norms="hidden_states_norms", after=("model.layernorm", "model.pooler"),
        merges=True, shifts=True,
    ),
    "pixio": Family(
        "pixio.layers", "pixio.embeddings", norms="layernorm", after=("pixio.layernorm",),
        prefix=lambda config: int(config.n_cls_tokens), attends=True, recorded=True,
    ),
    "pp_lcnet": _PP_LCNET,
    "pp_lcnet_v3": _PP_LCNET,
    "pp_lcnet_v4": _PP_LCNET,
    "pvt_v2": Family("encoder.layers"),
    "resnet": _RESNET,
    "rf_detr_dinov2": Family(
        "encoder.layer", "embeddings", norms="layernorm", sizes="windows", attends=True, recorded=True
    ),
    "rt_detr_resnet": _RESNET,
    "sapiens2": _DINOV3,
    "swin": Family(
        "swin.encoder.layers", "swin.embeddings", norms="hidden_states_norms", after=("swin.layernorm",),
        merges=True, shifts=True, attends=True,
    ),
    "swinv2": Family("encoder.layers", "embeddings", merges=True, attends=True),
    "textnet": Family("textnet.encoder.stages", "textnet.stem", after=("textnet.pooler",)),
    "tipsv2": _REGISTERS,
    "tipsv2_vision_model": _REGISTERS,
    # Its stages are branches side by side from one map, which is its stem.
    "uvdoc_backbone": Family("bridge.bridge", "resnet", recorded=True),
    "vitdet": Family("encoder.layer", "embeddings"),
    "vitpose_backbone": Family(
        "encoder.layer", "embeddings", norms="layernorm", prefix=lambda _config: 0, flat=True, sizes="fixed",
        attends=True, recorded=True,
    ),
    "vit": Family(
        "layers", "embeddings", after=("layernorm",), prefix=_one, attends=True, recorded=True, plain=True
    ),
    "deit": Family(
        "layers", "embeddings", after=("layernorm",), prefix=lambda _config: 2, attends=True, recorded=True, plain=True
    ),
}  # fmt: skip


def _swin(width: int, depths: list[int], heads: list[int], **rest: Any) -> dict[str, Any]:
    return {"embed_dim": width, "depths": depths, "num_heads": heads, **rest}


def _stages(widths: list[int], depths: list[int], **rest: Any) -> dict[str, Any]:
    return {"hidden_sizes": widths, "depths": depths, **rest}


def _vit(width: int, layers: int, heads: int, **rest: Any) -> dict[str, Any]:
    return {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, **rest}


_BASIC: dict[str, Any] = {"layer_type": "basic"}
_V2 = {"window_size": 8, "image_size": 256}
_PATCH14: dict[str, Any] = {"patch_size": 14, "image_size": 518}

# Hub id: (type, what its configuration changes). Structure and random weights of these need no network.
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "microsoft/resnet-18": ("resnet", _stages([64, 128, 256, 512], [2, 2, 2, 2], **_BASIC)),
    "microsoft/resnet-34": ("resnet", _stages([64, 128, 256, 512], [3, 4, 6, 3], **_BASIC)),
    "microsoft/resnet-50": ("resnet", _stages([256, 512, 1024, 2048], [3, 4, 6, 3])),
    "microsoft/resnet-101": ("resnet", _stages([256, 512, 1024, 2048], [3, 4, 23, 3])),
    "microsoft/resnet-152": ("resnet", _stages([256, 512, 1024, 2048], [3, 8, 36, 3])),
    "microsoft/swin-tiny-patch4-window7-224": ("swin", _swin(96, [2, 2, 6, 2], [3, 6, 12, 24])),
    "microsoft/swin-small-patch4-window7-224": ("swin", _swin(96, [2, 2, 18, 2], [3, 6, 12, 24])),
    "microsoft/swin-base-patch4-window7-224": ("swin", _swin(128, [2, 2, 18, 2], [4, 8, 16, 32])),
    "microsoft/swinv2-tiny-patch4-window8-256": ("swinv2", _swin(96, [2, 2, 6, 2], [3, 6, 12, 24], **_V2)),
    "microsoft/swinv2-small-patch4-window8-256": ("swinv2", _swin(96, [2, 2, 18, 2], [3, 6, 12, 24], **_V2)),
    "microsoft/swinv2-base-patch4-window8-256": ("swinv2", _swin(128, [2, 2, 18, 2], [4, 8, 16, 32], **_V2)),
    "facebook/convnext-tiny-224": ("convnext", _stages([96, 192, 384, 768], [3, 3, 9, 3])),
    "facebook/convnext-small-224": ("convnext", _stages([96, 192, 384, 768], [3, 3, 27, 3])),
    "facebook/convnext-base-224": ("convnext", _stages([128, 256, 512, 1024], [3, 3, 27, 3])),
    "facebook/convnextv2-tiny-1k-224": ("convnextv2", _stages([96, 192, 384, 768], [3, 3, 9, 3])),
    "facebook/dinov2-small": ("dinov2", _vit(384, 12, 6, **_PATCH14)),
    "facebook/dinov2-base": ("dinov2", _vit(768, 12, 12, **_PATCH14)),
    "facebook/dinov2-large": ("dinov2", _vit(1024, 24, 16, **_PATCH14)),
    "google/vit-base-patch16-224": ("vit", _vit(768, 12, 12, intermediate_size=3072)),
    "facebook/deit-tiny-distilled-patch16-224": ("deit", _vit(192, 12, 3, intermediate_size=768)),
    "facebook/deit-small-distilled-patch16-224": ("deit", _vit(384, 12, 6, intermediate_size=1536)),
    "facebook/deit-base-distilled-patch16-224": ("deit", _vit(768, 12, 12, intermediate_size=3072)),
    "microsoft/focalnet-tiny": ("focalnet", {"embed_dim": 96, "depths": [2, 2, 6, 2], "focal_levels": [2, 2, 2, 2]}),
    "google/bit-50": ("bit", _stages([256, 512, 1024, 2048], [3, 4, 6, 3])),
}


def stage_module(family: Family, number: int) -> str:
    """The dotted name of the module that ends stage `number`; 0 is the stem."""
    return f"{family.stages}.{number - 1}" if number else family.stem


def module_list(network: nn.Module, family: Family) -> tuple[nn.Module, str, nn.ModuleList]:
    """(parent, attribute, list) of the stages."""
    parent, _, name = family.stages.rpartition(".")
    holder = network.get_submodule(parent)
    return holder, name, getattr(holder, name)
