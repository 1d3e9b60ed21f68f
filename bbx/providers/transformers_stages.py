"""Where the stages and the roles of an assembled transformers network leave it, as outlets. Not itself a provider."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bbx.errors import UsageError
from bbx.providers.transformers_configs import kind_of
from bbx.providers.transformers_families import FAMILIES, Family, module_list
from bbx.providers.transformers_roles import Task
from bbx.roles import Outlet

if TYPE_CHECKING:
    from torch import nn

# Backbone types whose stages are not plain outputs of modules: their roles are the maps that the backbone gives.
_WHOLE = ("dinat",)
# Backbone types whose stages give their patches in a row.
_TOKENS = ("focalnet", "pvt_v2")
# Backbone types that drop the prefix tokens even where they leave the patches in a row.
_BARE = ("dinov3_vit", "sapiens2")


def _within(network: nn.Module, task: Task) -> tuple[str, str]:
    """(what stands before the paths of the row, the backbone's path): another task's class may hold the row's."""
    there = {name for name, _ in network.named_modules()}
    for before in ("", *task.within):
        for path in task.backbones:
            if f"{before}{path}" in there:
                return before, f"{before}{path}"
    raise UsageError(
        f"{type(network).__name__}: bbx does not know where its backbone is", f"it knows {task.task} of this type"
    )


def roles(network: nn.Module, task: Task) -> tuple[Outlet, ...]:
    """The row's roles where they are in this very class, and those that it has besides."""
    before, _ = _within(network, task)
    moved = [replace(one, module=f"{before}{one.module}" if one.module else "") for one in task.outlets]
    return (*moved, *(task.besides if before else ()))


def backbone_path(network: nn.Module, task: Task) -> str:
    there = {name for name, _ in network.named_modules()}
    _, path = _within(network, task)
    return f"{path}._backbone" if f"{path}._backbone" in there else path  # transformers' wrapper of a timm network


def stages(network: nn.Module, path: str, *, native: bool) -> tuple[Outlet, ...]:
    """The backbone's stages, from its own modules: what the model uses of them is another matter."""
    module: Any = network.get_submodule(path)
    kind = kind_of(module)
    if hasattr(module, "feature_info"):
        return _timm_stages(path, module)
    if kind.startswith("sam2_hiera"):
        ends = [sum(module.config.blocks_per_stage[: n + 1]) - 1 for n in range(len(module.config.blocks_per_stage))]
        modules = ("patch_embed", *(f"blocks.{end}" for end in ends))
        return tuple(Outlet(_name(n), f"{path}.{one}", form="nhwc") for n, one in enumerate(modules))
    family = FAMILIES.get(kind)
    if kind == "dpt":  # its own plain ViT
        family = Family("encoder.layer", "embeddings", prefix=lambda _config: 1)
    if family is None or kind in _WHOLE or (native and kind != "dpt"):
        return _own_maps(path, module, family)
    return _family_stages(path, module, family)


def _own_maps(path: str, module: Any, family: Family | None) -> tuple[Outlet, ...]:
    """What the backbone class itself gives, for the stages that the model asked it for."""
    form: dict[str, Any] = {}
    if family and family.prefix and (family.flat or not getattr(module.config, "reshape_hidden_states", True)):
        form = {"form": "tokens", "prefix": 0 if kind_of(module) in _BARE else family.prefix(module.config)}
    names = enumerate(module.out_features)
    return tuple(Outlet(f"backbone.{name}", path, ("feature_maps", at), **form) for at, name in names)


def _name(number: int) -> str:
    return f"backbone.stage{number}" if number else "backbone.stem"


def _family_stages(path: str, module: Any, family: Family) -> tuple[Outlet, ...]:
    _, _, modules = module_list(module, family)
    kind, config = kind_of(module), module.config
    form: dict[str, Any] = {}
    if kind == "hiera":  # its stages' own outputs are in the order of its windows; the encoder puts them right
        hidden = [("reshaped_hidden_states", number) for number in range(len(modules) + 1)]
        return tuple(Outlet(_name(n), f"{path}.encoder", pick, "nhwc") for n, pick in enumerate(hidden))
    if family.merges or family.prefix or kind in _TOKENS:
        form = {"form": "tokens", "prefix": family.prefix(config) if family.prefix else 0}
    elif kind in ("lw_detr_vit", "rf_detr_dinov2"):
        side = config.num_windows_side if kind == "lw_detr_vit" else config.num_windows
        form = {"form": "windows", "side": side, "prefix": int(kind == "rf_detr_dinov2")}
    found = []
    for number in range(0 if family.stem else 1, len(modules) + 1):
        at = f"{family.stages}.{number - 1}" if number else family.stem
        if number and family.merges and kind != "focalnet":  # the stage's own output is already merged for the next one
            blocks: Any = module.get_submodule(f"{at}.blocks")
            at = f"{at}.blocks.{len(blocks) - 1}"
        pick = (1,) if number and kind == "focalnet" else ()
        plain = number == 0 and kind == "lw_detr_vit"  # cut into windows only after the embedding
        found.append(Outlet(_name(number), f"{path}.{at}", pick, **({} if plain else form)))
    return tuple(found)


def _timm_stages(path: str, module: Any) -> tuple[Outlet, ...]:
    """timm's feature network: children named after its feature modules, its own layout."""
    infos = module.feature_info.info
    children = dict(module.named_children())
    form: Any = str(getattr(getattr(module, "output_fmt", None), "value", "nchw")).lower()
    stem = re.fullmatch(r"act1|bn1|conv\w*|stem\w*|features\.norm0", infos[0]["module"])
    found = []
    for at, info in enumerate(infos):
        number = at if stem else at + 1
        child = info["module"].replace(".", "_")
        child = "maxpool" if number == 0 and "maxpool" in children else child
        if child in children:
            found.append(Outlet(_name(number), f"{path}.{child}", form=form))
        elif at in module.feature_info.out_indices:
            given = list(module.feature_info.out_indices).index(at)
            found.append(Outlet(_name(number), path, (given,), form=form))
    return tuple(found)
