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
from bbx.errors import MissingExtraError, UsageError, nearest
from bbx.processor import IMAGENET_MEAN, IMAGENET_STD, preprocess_of
from bbx.providers.transformers_configs import FAULTS, configured, facts_of, kind_of, line_of, need_timm, set_field
from bbx.providers.transformers_families import FAMILIES
from bbx.providers.transformers_parts import Inner, from_pretrained, is_offline, place, type_of
from bbx.providers.transformers_roles import TASKS, Task
from bbx.providers.transformers_stages import backbone_path, roles, stages
from bbx.providers.transformers_weights import cannot_load, quiet
from bbx.recipe import tidied
from bbx.roles import Outlet, Reader, settled, taps
from bbx.spec import BUILD, Build, ModelRef, Preprocess
from bbx.weights import check_file, digest, load_into, read_state_dict, seeded

# Inputs to name a pyramid's levels at, where the network takes them: small, and 128 pixels apart.
_SIZES = ((256, 256), (384, 384))


def names() -> tuple[str, ...]:
    """The names that `load` takes besides folders and hub ids: model types."""
    return tuple(TASKS)


def list_models() -> list[dict[str, Any]]:
    """`name` and `weights` of each model type; how many parameters there are, its configuration says."""
    return [{"name": name, "weights": [task.hub], "parameters": None} for name, task in TASKS.items()]


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
    need_timm(own)
    make = partial(_built, _class(task, own), own, build.seed)
    network, label = (make("meta"), "") if build.structure else _weighted(ref, source, own, make, inner=inner)
    network = network.get_submodule(task.part)
    named = _outlets(network, task, build)
    if named is None and build.structure:  # some forwards read values, which the meta device has not
        network = make("cpu").get_submodule(task.part)
        named = _outlets(network, task, build)
    outlets = named if named is not None else _outlets(network, task, build, loud=True) or ()
    label = label or f"random (seed {build.seed})"
    preprocess, notes = _preprocess(ref, source, task, build)
    path = backbone_path(network, task)
    notes += _shift_note(network.get_submodule(path), preprocess.size, native=build.norm == "native")
    if inner and inner.weights != "random" and not build.structure:
        said, more = inner.load(network.get_submodule(path))
        label, notes = f"backbone {said}, the rest {label}", (*notes, *more)
    facts = facts_of(own)
    return Backbone(
        ref,
        network,
        taps(outlets),
        preprocess,
        label,
        "" if build.structure else digest(network, options=json.dumps(facts, sort_keys=True)),
        notes=notes,
        forward=Reader(network, outlets),
        config=_text(ref, given, build, facts) if source or given or build.options else "",
    )


def _text(ref: ModelRef, given: Mapping[str, Any], build: Build, facts: Mapping[str, Any]) -> str:
    """What was asked for, canonically, and what the network was built from."""
    backbone = {
        key: tidied(str(value)) if key in ("model", "weights") else value
        for key, value in dict(given.get("backbone", {})).items()
    }
    options = {**build.options, **given.get("options", {})}
    asked = {key: part for key, part in (("backbone", backbone), ("options", options)) if part}
    return json.dumps({"model": tidied(ref.name), **asked, "configuration": facts}, sort_keys=True, default=str)


def _shift_note(module: nn.Module, size: tuple[int, int], *, native: bool) -> tuple[str, ...]:
    """Where Swin's own class shifts the windows of a stage that is one window wide, as the model alone does not."""
    family, config = FAMILIES.get(kind_of(module)), getattr(module, "config", None)
    if native or not (family and family.shifts and config):
        return ()
    strides = [config.patch_size * 2**number for number in range(len(config.depths))]
    narrow = [number for number, stride in enumerate(strides, 1) if min(size) // stride <= config.window_size]
    if not narrow:
        return ()
    stages = ", ".join(f"stage{number}" for number in narrow)
    return (
        f"{stages}: one window wide here, and shifted all the same, as the assembled model computes it; "
        "the backbone alone, raw, does not shift it, so that its map is another",
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
            with quiet():
                config = kind.from_pretrained(place(source), local_files_only=is_offline())
        except Exception as error:  # OSError, ValueError, KeyError, JSON's: whatever a damaged file brings about
            raise cannot_load(place(source), error) from None
        for name, value in options.items():
            if name not in task.defaults:
                set_field(config, name, value)
        return config, None
    inner = Inner(backbone, task)
    return configured(kind, {**options, "backbone_config": inner.config}, also=("backbone_config",)), inner


def _built(kind: Any, config: Any, seed: int, device: str) -> nn.Module:
    try:
        with seeded(seed, device), quiet():
            network: nn.Module = kind(config)
    except ImportError as error:  # a package that transformers wants for this class alone: scipy, for matching losses
        wanted = re.search(r"pip install ([\w-]+)", str(error))
        if wanted is None:
            raise
        raise MissingExtraError(wanted[1], f"pip install {wanted[1]}") from None
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
    found = stages(network, backbone_path(network, task), native=build.norm == "native")
    for sizes in (_SIZES, (build.size or task.size,)):
        try:
            named = settled(network, (*found, *roles(network, task)), sizes)
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


def _preprocess(ref: ModelRef, source: str, task: Task, build: Build) -> tuple[Preprocess, tuple[str, ...]]:
    """The image processor's numbers where there is one, else a stated default."""
    if source and (found := preprocess_of(place(source), local=_local(ref), size=build.size)):
        return found
    size = build.size or task.size
    note = f"{ref.name} states no preprocessing here: squashed to {size[0]}x{size[1]}, ImageNet mean and std"
    preprocess = Preprocess(task.size, min(task.size), "bilinear", IMAGENET_MEAN, IMAGENET_STD, "squash")
    return preprocess.override(size=build.size), (note,)


def _local(ref: ModelRef) -> bool:
    return is_offline() or ref.weights == "random"
