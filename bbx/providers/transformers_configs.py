"""Configurations of transformers: made of fields that they know, changed, and told as facts. Not itself a provider."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bbx.errors import MissingExtraError, UsageError, nearest
from bbx.providers.table import is_installed

if TYPE_CHECKING:
    from torch import nn

# What transformers raises for configurations and inputs that do not fit.
FAULTS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError)
# What a configuration says of its saving, not of the network; of the labels, their number counts.
_BOOKKEEPING = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "id2label",
                "label2id")  # fmt: skip


def configured(kind: Any, fields: Mapping[str, Any], also: Sequence[str] = ()) -> Any:
    """`kind(**fields)`, every field one that it knows. Through JSON first: some defaults are tuples that break it."""
    plain = kind()
    known = {*plain.to_dict(), *also, "num_labels"} - {"model_type", "transformers_version", "_name_or_path"}
    for name in fields:
        if name not in known and not _is_field(plain, name):
            close = nearest(name, known, 1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise UsageError(f"{kind.__name__} has no {name!r}", f"{meant}valid: {', '.join(sorted(known))}")
    lists = {name: list(value) for name, value in plain.to_dict().items() if isinstance(value, tuple)}
    try:
        return kind(**{**lists, **fields})
    except FAULTS as error:
        raise UsageError(
            f"{kind.__name__} cannot be built: {line_of(error)}", "see transformers' own documentation"
        ) from None


def set_field(config: Any, name: str, value: Any) -> None:
    """Sets a field that the configuration has; raises `UsageError` for another, and for a value that does not fit."""
    if not _is_field(config, name):
        close = nearest(name, config.to_dict(), 1)
        raise UsageError(f"{type(config).__name__} has no {name!r}", f"did you mean {close[0]}?" if close else "")
    try:
        setattr(config, name, value)
    except FAULTS as error:
        raise UsageError(f"{name}: {value!r} does not fit: {line_of(error)}") from None


def _is_field(config: Any, name: str) -> bool:
    """Whether `name` is a value of the configuration, and none of its methods."""
    return not name.startswith("_") and hasattr(config, name) and not callable(getattr(config, name))


def need_timm(config: Any) -> None:
    """Raises `MissingExtraError` where the model's backbone is timm's and timm is not installed."""
    inner = getattr(config, "backbone_config", None)
    if str(getattr(inner, "model_type", "")).startswith("timm") and not is_installed("timm"):
        raise MissingExtraError("timm")


def facts_of(config: Any) -> dict[str, Any]:
    """What the network is built from, without what a configuration says of its saving."""
    facts: dict[str, Any] = json.loads(json.dumps(_without(config.to_diff_dict()), sort_keys=True, default=str))
    return {**facts, "num_labels": getattr(config, "num_labels", 0)}


def _without(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without(one) for key, one in value.items() if key not in _BOOKKEEPING}
    return value


def kind_of(module: nn.Module) -> str:
    """A backbone's type, empty for a module that is none of transformers'."""
    # Of the class: MaskFormer makes its own Swin's configuration from another's fields, `model_type` among them.
    config: Any = getattr(module, "config", None)
    return str(getattr(type(config), "model_type", ""))


def line_of(error: Exception) -> str:
    """The first line of what a library says."""
    return str(error).strip().partition("\n")[0]
