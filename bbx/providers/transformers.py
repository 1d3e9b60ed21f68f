"""Backbones of Hugging Face transformers: by type, by hub id, or from the folder of a saved model.

A configuration is mapped to its backbone class here, never through `AutoBackbone.from_pretrained`: that fails for every
folder and without a network. What a stage is, `transformers_families` says type by type.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import is_offline_mode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING, MODEL_MAPPING

from bbx.backbone import Backbone
from bbx.errors import MissingExtraError, UsageError, WeightsError, nearest
from bbx.processor import default_preprocess, preprocess_of
from bbx.providers.transformers_families import FAMILIES, KNOWN, Family, stage_module
from bbx.providers.transformers_forward import Attention, forward_of, raw_network
from bbx.providers.transformers_weights import cannot_load, empty_network, loaded_network, quiet, random_network
from bbx.spec import BUILD, Build, ModelRef, Preprocess
from bbx.taps import Tap
from bbx.weights import check_file, digest

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What a configuration says of its saving, not of the network.
_BOOKKEEPING = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "out_features",
                "out_indices", "id2label", "label2id")  # fmt: skip


def names() -> tuple[str, ...]:
    """The types that can be built here, and the hub ids whose structure is known without a network."""
    return (*(name for name in FAMILIES if name != "dinat" or _has_natten()), *KNOWN)


def find(name: str) -> str | None:
    """`name` where it is a folder that transformers saved, or has the form of a hub id; else None."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return name if _speaks_of_a_type(folder / "config.json") else None
    if folder.exists() or not _HUB_ID.fullmatch(name) or name.startswith(("timm/", "./", "../")):
        return None
    return name


def list_models() -> list[dict[str, Any]]:
    """`name`, `family` (the type) and `weights` of each name; types have no weights of their own."""
    types = [{"name": name, "family": name, "weights": []} for name in names() if name not in KNOWN]
    return types + [{"name": name, "family": kind, "weights": ["hub"]} for name, (kind, _) in KNOWN.items()]


def load(ref: ModelRef, build: Build = BUILD) -> Backbone:
    """The model `ref` names: a type, a hub id, or a folder.

    Weights: `auto` (the hub's or the folder's own), `random`, or a file's path. Raises `WeightsError` when they cannot
    be had or do not fit, `UsageError` for a type without a backbone, an option or a size that it does not take.
    """
    with quiet():
        config = _config(ref, build.options)
    family = _family(ref, config)
    if ref.weights == "auto" and ref.name in FAMILIES and not build.structure:
        raise WeightsError(
            f"{ref.name} is a type, which has no weights of its own",
            "--weights random, or name a folder or a hub id, or --weights FILE",
        )
    preprocess, notes = _preprocess(ref, config, family, build)
    notes += _suit(ref, config, family, preprocess.size)
    kind, options = _kind(config, family)
    raw = build.norm == "raw"
    label, untrained = f"random (seed {build.seed})", tuple[str, ...]()
    if build.structure:
        network = empty_network(kind, config, options)
    elif ref.weights == "random":
        network = random_network(kind, config, options, seed=build.seed)
    else:
        source, label = _source(ref)
        network, untrained, more = loaded_network(kind, config, options, source=source, family=family, raw=raw)
        notes += more
    network.eval()
    text = _text(ref, config, build.options)
    if raw:
        raw_network(network, family)
    return Backbone(
        ref, network, _taps(network, family, tokens=build.tokens), preprocess, label,
        "" if build.structure else digest(network, options=text), untrained, notes,
        forward=forward_of(network, family, tokens=build.tokens and family.prefix is not None, raw=raw), config=text,
        attend=Attention(network) if family.attends else None,
    )  # fmt: skip


def _config(ref: ModelRef, options: Mapping[str, Any]) -> Any:
    """The configuration of `ref` with the user's `options`, as read from disk or hub, or from the table."""
    if ref.name in FAMILIES:
        return _made(ref.name, ref.name, options)
    if ref.name in KNOWN and ref.weights != "auto":
        return _made(ref.name, KNOWN[ref.name][0], {**KNOWN[ref.name][1], **options})
    try:
        config = transformers.AutoConfig.from_pretrained(
            _place(ref.name), local_files_only=is_offline_mode(), trust_remote_code=False
        )
        config = getattr(config, "vision_config", config) if config.model_type == "tipsv2" else config
    except Exception as error:  # OSError, ValueError, KeyError, JSON's: whatever a damaged file brings about
        if ref.name in KNOWN and not Path(ref.name).exists() and isinstance(error, OSError):
            return _made(ref.name, KNOWN[ref.name][0], {**KNOWN[ref.name][1], **options})
        raise _no_config(ref.name, error) from None
    for name, value in options.items():
        _check_option(config, ref.name, name)
        setattr(config, name, value)
    return config


def _no_config(name: str, error: Exception) -> UsageError | WeightsError:
    unknown = re.search(r"model type `([^`]+)`", str(error))
    if unknown:
        close = nearest(unknown[1], FAMILIES, 1)
        meant = f"did you mean {close[0]}? " if close else ""
        return UsageError(f"{name} is of the type {unknown[1]!r}, which transformers does not know", f"{meant}{_TYPES}")
    if not Path(name).expanduser().is_dir() and not _HUB_ID.fullmatch(name):
        close = nearest(name, names(), 3)
        return UsageError(f"transformers has no backbone {name!r}", f"nearest: {', '.join(close)}" if close else _TYPES)
    return cannot_load(_place(name), error)


def _made(name: str, model_type: str, options: Mapping[str, Any]) -> Any:
    """A configuration of `model_type`, of which Tipsv2's own is two in one: text and vision."""
    kind = CONFIG_MAPPING["tipsv2_vision_model" if model_type == "tipsv2" else model_type]
    for option in options:
        _check_option(kind(), name, option)
    try:
        config = kind(**options)
    except Exception as error:  # huggingface_hub's strict dataclasses have errors of their own
        raise UsageError(f"{name} cannot be configured so: {str(error).partition(chr(10))[0]}") from None
    return config


def _check_option(config: Any, name: str, option: str) -> None:
    if option.startswith("_") or not hasattr(config, option) or callable(getattr(config, option)):
        valid = [key for key in config.to_dict() if not key.startswith("_")]
        close = nearest(option, valid, 1)
        raise UsageError(f"{name} has no option {option!r}", f"did you mean {close[0]}?" if close else "")


_TYPES = f"types with a backbone: {', '.join(FAMILIES)}"


def _family(ref: ModelRef, config: Any) -> Family:
    kind = config.model_type
    if kind == "timm_backbone":
        raise UsageError(
            f"{ref.name} is a wrapper around timm", f"use timm:{getattr(config, 'backbone', None) or 'NAME'}"
        )
    if kind == "dinat" and not _has_natten():
        raise MissingExtraError("natten", "pip install natten (it must fit the torch that is installed)")
    if kind not in FAMILIES:
        inner = getattr(config, "backbone_config", None) or getattr(config, "vision_config", None)
        inside = getattr(inner, "model_type", "")
        hint = (
            f"its backbone is of the type {inside}; an assembled model is asked for by its own type\n" if inside else ""
        )
        raise UsageError(f"{ref.name} is of the type {kind!r}, which has no backbone class", f"{hint}{_TYPES}")
    return FAMILIES[kind]


def _kind(config: Any, family: Family) -> tuple[Any, dict[str, Any]]:
    """(class, its arguments) with every stage asked for, so that every extra norm exists."""
    if family.plain:
        return MODEL_MAPPING[type(config)], {"add_pooling_layer": False}
    return MODEL_FOR_BACKBONE_MAPPING[type(config)], {}


def _suit(ref: ModelRef, config: Any, family: Family, size: tuple[int, int]) -> tuple[str, ...]:
    """Makes `config` ask for every stage, as maps, at `size`; returns notes. Raises `UsageError` for the size."""
    notes: tuple[str, ...] = ()
    for name, value in vars(config).items():
        if isinstance(value, tuple) and name in ("hidden_sizes", "depths"):
            setattr(config, name, list(value))  # ConvNeXt and FocalNet add them to lists
    if not family.plain:
        config.out_features = [name for name in config.stage_names if family.stem or name != "stem"]
    if getattr(config, "add_fpn", False):
        config.add_fpn = False
        notes = ("the configuration's own FPN is a neck, and left out",)
    if hasattr(config, "reshape_hidden_states"):
        config.reshape_hidden_states = True
    if family.sizes == "windows":
        per_side = getattr(config, "num_windows_side", None) or config.num_windows
        _check_sides(ref, size, (config.patch_size * per_side,) * 2)
    elif family.sizes == "fixed":
        _fix_size(ref, config, size)
    return notes


def _fix_size(ref: ModelRef, config: Any, size: tuple[int, int]) -> None:
    own = _pair(config.image_size)
    if size == own:
        return
    if ref.weights != "random" and ref.name not in FAMILIES:
        raise UsageError(
            f"{ref.name} was trained for one size, {own[0]}x{own[1]}, and takes no other", "leave --size out"
        )
    units = _pair(getattr(config, "patch_stride", config.patch_size))
    masked = _pair(getattr(config, "masked_unit_size", 1))
    _check_sides(ref, size, (units[0] * masked[0], units[1] * masked[1]))
    config.image_size = list(size)


def _check_sides(ref: ModelRef, size: tuple[int, int], units: tuple[int, int]) -> None:
    if any(side % unit for side, unit in zip(size, units, strict=True)):
        near = "x".join(str(max(1, round(side / unit)) * unit) for side, unit in zip(size, units, strict=True))
        raise UsageError(
            f"{ref.name} needs sides divisible by {units[0]}, not {size[0]}x{size[1]}", f"try --size {near}"
        )


def _preprocess(ref: ModelRef, config: Any, family: Family, build: Build) -> tuple[Preprocess, tuple[str, ...]]:
    """The model's own image processor if it has one, else what bbx assumes for the type."""
    if ref.name not in FAMILIES:
        local = is_offline_mode() or ref.weights == "random"
        found = preprocess_of(_place(ref.name), local=local, size=build.size)
        if found:
            return found
    size = (family.size, family.size) if family.size else _pair(getattr(config, "image_size", None) or 224)
    preprocess = default_preprocess(config.model_type, size).override(size=build.size)
    assumed = "no preprocessor_config.json comes with the weights: ImageNet's mean and std are assumed"
    return preprocess, (assumed,) if ref.weights != "random" and not build.structure else ()


def _taps(network: Any, family: Family, *, tokens: bool) -> tuple[Tap, ...]:
    if family.plain:
        stages: list[str] = ["stem", *(f"stage{n + 1}" for n in range(network.config.num_hidden_layers))]
    else:
        stages = list(network.out_features)
    flat = family.plain or family.flat or (tokens and family.prefix is not None)
    prefix = family.prefix(network.config) if flat and family.prefix else 0
    first = int(stages[0] != "stem")
    return tuple(
        Tap(name, stage_module(family, number), "tokens" if flat else "nchw", prefix)
        for number, name in enumerate(stages, first)
    )


def _source(ref: ModelRef) -> tuple[str | Path, str]:
    """(what to load, how to call it)."""
    if ref.weights != "auto":
        path = Path(ref.weights).expanduser()
        check_file(path)
        return path, f"file {path.name}"
    place = _place(ref.name)
    return place, f"folder {Path(place).name}" if Path(place).is_dir() else f"hub {place}"


def _text(ref: ModelRef, config: Any, options: Mapping[str, Any]) -> str:
    """The configuration as JSON where the name does not say it: a folder's, an unknown hub id's, one with options."""
    if not options and (ref.name in FAMILIES or (ref.name in KNOWN and not Path(ref.name).exists())):
        return ""
    facts = {name: value for name, value in config.to_diff_dict().items() if name not in _BOOKKEEPING}
    return json.dumps(facts, sort_keys=True, default=str)


def _place(name: str) -> str:
    """A folder's path with `~` expanded, or the hub id."""
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


def _pair(size: Any) -> tuple[int, int]:
    values = list(size) if isinstance(size, (list, tuple)) else [size, size]
    return int(values[-2]), int(values[-1])


def _speaks_of_a_type(file: Path) -> bool:
    """Whether transformers wrote it; a file that is damaged is claimed too, so that `load` can say so."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return True
    return isinstance(content, dict) and "architecture" not in content


def _has_natten() -> bool:
    utils: Any = transformers.utils
    return bool(utils.is_natten_available())
