"""The configuration of an assembled model, from a YAML, TOML or JSON file or a mapping: read, checked, frozen.

Two kinds. A `Pyramid`: any bbx backbone with a feature pyramid and a head of torchvision's. A `Model`: an assembled
class of a library, by its model type or a checkpoint, on a backbone of one's own.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from bbx.errors import UsageError, nearest

Extra = Literal["none", "pool", "p6p7"]
Head = Literal["none", "fcn", "deeplab"]
Neck = Literal["none", "fpn"]


@dataclass(frozen=True, slots=True)
class Pyramid:
    """A backbone, `neck` over its `stages`, `head` on one level (`level`: "" is the finest, or the last stage).

    `stages`, names or indices in network order; empty: all but the stem. `seed` of the backbone's random weights
    (None: the run's), `options` the library's own arguments of it.
    """

    model: str
    weights: str = "auto"
    stages: tuple[str, ...] | tuple[int, ...] = ()
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    neck: Neck = "fpn"
    out_channels: int = 256
    extra: Extra = "none"
    head: Head = "none"
    num_classes: int = 21
    level: str = ""

    def to_json(self) -> str:
        """Canonical: the same model, the same text. Without the seed, which the digest of the weights speaks for."""
        facts = {**asdict(self), "model": tidied(self.model), "weights": tidied(self.weights)}
        del facts["seed"]
        return json.dumps(facts, sort_keys=True, default=str)


@dataclass(frozen=True, slots=True)
class Model:
    """An assembled class: `model` names it, `backbone` is what it is built on, `options` its other arguments."""

    model: str
    weights: str = ""
    backbone: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


# Key: (field, type, words that it may be). `in` is a word of Python, hence `level`.
_BACKBONE: dict[str, tuple[str, type, Any]] = {
    "model": ("model", str, None),
    "weights": ("weights", str, None),
    "stages": ("stages", list, None),
    "out_indices": ("stages", list, None),
    "seed": ("seed", int, None),
    "options": ("options", dict, None),
}
_NECK: dict[str, tuple[str, type, Any]] = {
    "type": ("neck", str, Neck),
    "out_channels": ("out_channels", int, None),
    "extra": ("extra", str, Extra),
}
_HEAD: dict[str, tuple[str, type, Any]] = {
    "type": ("head", str, Head),
    "num_classes": ("num_classes", int, None),
    "in": ("level", str, None),
}
_PARTS = {"backbone": _BACKBONE, "neck": _NECK, "head": _HEAD}
_MODEL = ("model", "weights", "backbone", "options")


def tidied(name: str) -> str:
    """A model's name or the path of its folder or file, one path in one spelling: `./r18.pth` is `r18.pth`."""
    return os.path.normpath(Path(name).expanduser()) if name else ""


def read(config: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    """The content of the file at `config`, or `config` itself; raises `UsageError` with the line that is at fault."""
    if isinstance(config, Mapping):
        return config
    path = Path(config).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"cannot read the configuration {path}: {reason}", "a .yaml, .toml or .json file") from None
    content = _parsed(path, text)
    if not isinstance(content, Mapping):
        raise UsageError(
            f"{path} holds a {type(content).__name__}, not keys and values", "backbone: {model: swin-tiny}"
        )
    return content


def checked(content: Mapping[str, Any], *, model: str = "") -> Pyramid | Model:
    """`content` as a recipe, each key known and of its type; `model`, from outside, takes the place of `model:`."""
    if model or "model" in content:
        if {"neck", "head"} & set(content):
            raise UsageError(
                f"model {model or content['model']} goes with no neck and head of the configuration's own",
                "for a pyramid, name the backbone in the file alone: backbone: {model: resnet-18}",
            )
        _known(content, _MODEL, "the configuration")
        parts = {name: _mapping(content, name) for name in ("backbone", "options")}
        name = _typed("model", model or content["model"], str)
        return Model(name, _typed("weights", content.get("weights") or "", str), **parts)
    _known(content, _PARTS, "the configuration")
    fields: dict[str, Any] = {"neck": "fpn" if "neck" in content else "none"}
    for part, keys in _PARTS.items():
        given = _mapping(content, part)
        _known(given, keys, part)
        if {"stages", "out_indices"} <= set(given):
            raise UsageError("backbone has both stages and out_indices", "give one of them")
        for key, value in given.items():
            name, kind, words = keys[key]
            if value is not None:
                fields[name] = _value(f"{part}.{key}", value, kind, words)
    if "model" not in fields:
        raise UsageError("the configuration names no backbone", "backbone: {model: swin-tiny}, or model: maskformer")
    return Pyramid(**fields)


def _parsed(path: Path, text: str) -> Any:
    kind = path.suffix.lower()
    try:
        if kind == ".toml":
            return tomllib.loads(text)
        if kind == ".json":
            return json.loads(text)
        if kind in (".yaml", ".yml"):
            return _yaml(path, text)
    except UsageError:
        raise
    except ValueError as error:  # both decoders name the line
        raise UsageError(f"{path} cannot be parsed: {error}", f"is it {kind[1:].upper()}?") from None
    raise UsageError(f"{path} is neither .yaml, .toml nor .json", "name the file by what is in it")


def _yaml(path: Path, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UsageError(f"{path} cannot be parsed: {where}{reason}", "is it YAML?") from None


def _known(given: Mapping[str, Any], keys: Sequence[str] | Mapping[str, Any], part: str) -> None:
    for key in given:
        if key not in keys:
            close = nearest(str(key), keys, 1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise UsageError(f"{part} has no key {key!r}", f"{meant}valid: {', '.join(keys)}")


def _mapping(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    given: Any = content.get(name) or {}
    if hasattr(given, "to_diff_dict"):  # a configuration object of transformers
        left_out = ["transformers_version", "stage_names", "out_indices"]
        if given.to_dict().get("out_features") == list(getattr(given, "stage_names", ()))[-1:]:
            # What a configuration says that was asked nothing: the class then takes the stages that it needs.
            left_out.append("out_features")
        given = {key: value for key, value in given.to_diff_dict().items() if key not in left_out}
    if not isinstance(given, Mapping):
        told = f"{{model: {given}}}" if name == "backbone" and isinstance(given, str) else "{…}"
        raise UsageError(f"{name} is {given!r}, not keys and values", f"{name}: {told}")
    return given


def _value(name: str, value: Any, kind: type, words: Any) -> Any:
    if kind is list:
        if not isinstance(value, (list, tuple)) or not value:
            raise UsageError(f"{name} is {value!r}, not a list", f"{name.rpartition('.')[2]}: [stage1, stage2]")
        inner = type(value[0]) if type(value[0]) in (str, int) else str
        return tuple(_typed(name, one, inner) for one in value)
    if kind is dict:
        return dict(_mapping({name: value}, name))
    value = _typed(name, value, kind)
    if words and value not in get_args(words):
        close = nearest(str(value), get_args(words), 1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"{name} cannot be {value!r}", f"{meant}valid: {', '.join(get_args(words))}")
    if kind is int and value < (name != "backbone.seed"):
        raise UsageError(f"{name} is {value}", "a positive whole number")
    return value


def _typed(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        word = {str: "a text", int: "a whole number"}[kind]
        raise UsageError(f"{name} is {value!r}, not {word}", f"{name}: …")
    return value
