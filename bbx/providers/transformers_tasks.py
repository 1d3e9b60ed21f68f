"""transformers' assembled models: a backbone with its neck and heads, read role by role.

The values are those of the model's own forward. Built from a checkpoint, or from a configuration: any backbone that the
class takes, as a configuration object (its name alone would send transformers to the network), with random weights or
with pretrained ones put into its place, every tensor accounted for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from bbx.backbone import Backbone
from bbx.errors import UsageError, nearest
from bbx.processor import IMAGENET_MEAN, IMAGENET_STD, preprocess_of
from bbx.providers.transformers_families import FAMILIES, Family, module_list
from bbx.providers.transformers_parts import (
    FAULTS,
    Inner,
    absent,
    configured,
    from_pretrained,
    kind_of,
    line_of,
    set_field,
    type_of,
)
from bbx.providers.transformers_roles import TASKS, Task
from bbx.roles import Outlet, Reader, settled, taps
from bbx.spec import BUILD, Build, ModelRef, Preprocess
from bbx.weights import check_file, digest, load_into, read_state_dict

# Inputs to name a pyramid's levels at, where the network takes them: small, and 128 pixels apart.
_SIZES = ((256, 256), (384, 384))
# Backbone types whose stages are not plain outputs of modules: their roles are the maps that the backbone gives.
_WHOLE = ("dinat", "hiera")
# Backbone types that drop the prefix tokens even where they leave the patches in a row.
_BARE = ("dinov3_vit", "sapiens2")


def names() -> tuple[str, ...]:
    """The names that `load` takes besides folders and hub ids: model types."""
    return tuple(TASKS)


def list_models() -> list[dict[str, Any]]:
    """`name` and `weights` of each model type; how many parameters there are, its configuration says."""
    return [{"name": name, "weights": [task.hub], "parameters": 0} for name, task in TASKS.items()]


def find(name: str) -> str | None:
    """The name itself if it is a folder or hub id with the configuration of one of the types, else None."""
    return name if name in TASKS or type_of(name) in TASKS else None


def load(ref: ModelRef, build: Build = BUILD, *, config: Mapping[str, Any] | None = None) -> Backbone:
    """The model `ref` names (a type, a folder, a hub id), its taps by role.

    `config` may hold `backbone`, the fields of a transformers backbone configuration with its `model_type` (or `model`:
    `timm:…`, a folder, a hub id) and `weights`, and `options`, other fields of the model's configuration. A model on
    another backbone than its checkpoint's has random weights, its backbone aside. Raises `UsageError`, `WeightsError`.
    """
    given = dict(config or {})
    source, task = _source(ref)
    options = {**task.defaults, **build.options, **given.get("options", {})}
    own, inner = _configuration(source, task, options, given.get("backbone"))
    make = partial(_built, _class(task, own), own, build.seed)
    network, label = (make("meta"), "") if build.structure else _weighted(ref, source, own, make, inner=inner)
    network = network.get_submodule(task.part)
    named = _outlets(network, task, build)
    if named is None and build.structure:  # some forwards read values, which the meta device has not
        network = make("cpu").get_submodule(task.part)
        named = _outlets(network, task, build)
    outlets = named if named is not None else _outlets(network, task, build, loud=True) or ()
    notes: tuple[str, ...] = ()
    if inner and inner.weights != "random" and not build.structure:
        path = _backbone_path(network, task)
        said, notes = inner.load(network.get_submodule(path))
        label = f"{label}, backbone {said}"
    preprocess, said_notes = _preprocess(ref, source, task)
    return Backbone(
        ref,
        network,
        taps(outlets),
        preprocess.override(size=build.size),
        label or f"random (seed {build.seed})",
        "" if build.structure else digest(network),
        notes=(*said_notes, *notes),
        forward=Reader(network, outlets),
        config=json.dumps({"model": ref.name, **given}, sort_keys=True) if given else "",
    )


def _source(ref: ModelRef) -> tuple[str, Task]:
    """Where the checkpoint is (empty: nowhere), and the row of its type."""
    if ref.name in TASKS:
        return (TASKS[ref.name].hub if ref.weights == "auto" else ""), TASKS[ref.name]
    kind = type_of(ref.name)
    if kind in TASKS:
        return ref.name, TASKS[kind]
    close = nearest(ref.name, TASKS)
    raise UsageError(f"{ref.name!r} is no assembled model of transformers", f"nearest: {', '.join(close or TASKS)}")


def _class(task: Task, config: Any) -> Any:
    """The class that the checkpoint was saved from, where it is another task of the same model; else the row's."""
    stem = re.sub(r"For\w+$", "For", task.task)
    saved = [name for name in config.architectures or () if name.startswith(stem) and hasattr(transformers, name)]
    kind = getattr(transformers, saved[0] if saved and stem.endswith("For") else task.task)
    return kind if kind.config_class is type(config) else getattr(transformers, task.task)


def _configuration(source: str, task: Task, options: Mapping[str, Any], backbone: Any) -> tuple[Any, Inner | None]:
    """The model's configuration, a checkpoint's or the class's own, with `options` and, if given, the `backbone`."""
    kind = getattr(transformers, task.task).config_class
    if not backbone and not source:
        return configured(kind, options), None
    if not backbone:
        try:
            config = kind.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise absent(source, error) from None
        for name, value in options.items():
            if name not in task.defaults:
                set_field(config, name, value)
        return config, None
    inner = Inner(backbone, task)
    return configured(kind, {**options, "backbone_config": inner.config}, also=("backbone_config",)), inner


def _built(kind: Any, config: Any, seed: int, device: str) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=()), torch.device(device):
            torch.manual_seed(seed)
            network: nn.Module = kind(config)
    except FAULTS as error:
        hint = "does the class take this backbone with these stages?"
        raise UsageError(f"{kind.__name__} cannot be built: {line_of(error)}", hint) from None
    return network.eval()


def _weighted(
    ref: ModelRef, source: str, config: Any, make: partial[nn.Module], *, inner: Inner | None
) -> tuple[nn.Module, str]:
    """The network with the weights that `ref` names, and what they are called."""
    if inner or ref.weights == "random":
        if ref.weights not in ("auto", "random"):
            raise UsageError(
                "a model on a configured backbone has no weights as a whole", "put weights: under backbone:"
            )
        return make("cpu"), ""
    if ref.weights == "auto":
        network, _ = from_pretrained(make.args[0], source, config)
        return network, source
    network, path = make("cpu"), Path(ref.weights).expanduser()
    check_file(path)
    load_into(network, read_state_dict(path), head=(), source=f"file {path.name}")
    return network, f"file {path.name}"


def _outlets(network: nn.Module, task: Task, build: Build, *, loud: bool = False) -> tuple[Outlet, ...] | None:
    """The roles with their names, from small inputs where the network takes them, else from its own size.

    None where no forward succeeds, unless `loud`: then its error.
    """
    stages = _stages(network, _backbone_path(network, task), native=build.norm == "native")
    for sizes in (_SIZES, (build.size or task.size,)):
        try:
            named = settled(network, (*stages, *task.outlets), sizes)
            with torch.inference_mode():
                # A forward on the meta device must also go to its end.
                if next(network.parameters()).is_meta:
                    network(torch.zeros((1, 3, *sizes[0]), device="meta"))
        except FAULTS as error:
            reason = error
            continue
        return named
    if loud:
        size = build.size or task.size
        raise UsageError(f"no input of {size[0]}x{size[1]} goes through {task.task}: {line_of(reason)}", "try --size")
    return None


def _backbone_path(network: nn.Module, task: Task) -> str:
    there = {name for name, _ in network.named_modules()}
    path = next(path for path in task.backbones if path in there)
    return f"{path}._backbone" if f"{path}._backbone" in there else path  # transformers' wrapper of a timm network


def _stages(network: nn.Module, path: str, *, native: bool) -> tuple[Outlet, ...]:
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
    return tuple(Outlet(f"backbone.{name}", path, ("feature_maps", place), **form) for place, name in names)


def _name(number: int) -> str:
    return f"backbone.stage{number}" if number else "backbone.stem"


def _family_stages(path: str, module: Any, family: Family) -> tuple[Outlet, ...]:
    _, _, stages = module_list(module, family)
    kind, config = kind_of(module), module.config
    form: dict[str, Any] = {}
    if family.merges or family.prefix or kind == "focalnet":
        form = {"form": "tokens", "prefix": family.prefix(config) if family.prefix else 0}
    elif kind in ("lw_detr_vit", "rf_detr_dinov2"):
        side = config.num_windows_side if kind == "lw_detr_vit" else config.num_windows
        form = {"form": "windows", "side": side, "prefix": int(kind == "rf_detr_dinov2")}
    found = []
    for number in range(0 if family.stem else 1, len(stages) + 1):
        place = f"{family.stages}.{number - 1}" if number else family.stem
        if number and family.merges:  # the stage's own output is already merged for the next one
            blocks: Any = module.get_submodule(f"{place}.blocks")
            place = f"{place}.blocks.{len(blocks) - 1}"
        pick = (1,) if number and kind == "focalnet" else ()
        plain = number == 0 and kind == "lw_detr_vit"  # cut into windows only after the embedding
        found.append(Outlet(_name(number), f"{path}.{place}", pick, **({} if plain else form)))
    return tuple(found)


def _timm_stages(path: str, module: Any) -> tuple[Outlet, ...]:
    """timm's feature network: children named after its feature modules, its own layout."""
    infos = module.feature_info.info
    children = dict(module.named_children())
    form: Any = str(getattr(getattr(module, "output_fmt", None), "value", "nchw")).lower()
    stem = re.fullmatch(r"act1|bn1|conv\w*|stem\w*|features\.norm0", infos[0]["module"])
    found = []
    for place, info in enumerate(infos):
        number = place if stem else place + 1
        child = info["module"].replace(".", "_")
        child = "maxpool" if number == 0 and "maxpool" in children else child
        if child in children:
            found.append(Outlet(_name(number), f"{path}.{child}", form=form))
        elif place in module.feature_info.out_indices:
            given = list(module.feature_info.out_indices).index(place)
            found.append(Outlet(_name(number), path, (given,), form=form))
    return tuple(found)


def _preprocess(ref: ModelRef, source: str, task: Task) -> tuple[Preprocess, tuple[str, ...]]:
    """The image processor's numbers where there is one, else a stated default."""
    if source and ref.weights != "random" and (found := preprocess_of(source)):
        return found
    note = f"{ref.name} states no preprocessing here: squashed to {task.size[0]}x{task.size[1]}, ImageNet mean and std"
    preprocess = Preprocess(task.size, min(task.size), "bilinear", IMAGENET_MEAN, IMAGENET_STD, "squash")
    return preprocess, (note,)
