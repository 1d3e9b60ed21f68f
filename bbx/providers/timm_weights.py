"""timm's weights: published ones by tag or hub id, files of one's own, and what to do where they cannot be had."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from bbx.errors import UsageError, WeightsError, nearest
from bbx.weights import WRAPPERS, load_into, read_checkpoint

# What timm's files call the function that renames and resizes the tensors of published checkpoints.
_FILTERS = (
    "checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained",
    "checkpoint_filter_fn_classifier", "checkpoint_filter_fn_encoder",
)  # fmt: skip

# What `timm.create_model(checkpoint_path=…)` takes, in its order: averaged weights first.
_WRAPPERS = tuple(dict.fromkeys(("state_dict_ema", "model_ema", "state_dict", "model", *WRAPPERS)))


def tags(architecture: str) -> tuple[str, ...]:
    """The published weights of an architecture, timm's default first."""
    known = timm.models.get_arch_pretrained_cfgs(architecture)
    published = [name.partition(".")[2] for name, cfg in known.items() if cfg.has_weights]
    default: Any = timm.models.get_pretrained_cfg(architecture)
    first = default.tag if default and default.tag in published else ""
    return tuple(sorted(published, key=lambda tag: tag != first))


def check_tag(architecture: str, tag: str) -> None:
    """Raises `UsageError` with the nearest tags unless the architecture has published weights of that name."""
    known = tags(architecture)
    if tag in known:
        return
    if not known:
        raise UsageError(f"timm publishes no weights for {architecture}", "try --weights random, or a file's path")
    close = nearest(tag, known, 1)
    meant = f"did you mean {architecture}.{close[0]}? " if close else ""
    raise UsageError(f"{architecture} has no weights {tag!r} in timm", f"{meant}valid: {', '.join(known)}")


def load_published(name: str, build: Callable[[bool], nn.Module]) -> tuple[nn.Module, str]:
    """(the network with its pretrained weights, their label), by `build(True)`: from the cache, the hub or a folder."""
    if ":" not in name and not tags(name.partition(".")[0]):
        raise WeightsError(f"timm publishes no weights for {name}", "go without trained ones: --weights random")
    try:
        network = build(True)
    except UsageError:
        raise
    except Exception as error:  # the hub's client, its transport, timm and torch each raise kinds of their own
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise WeightsError(f"cannot have the weights of timm:{name}: {reason}", offline_hint(name)) from None
    cfg: Any = network.pretrained_cfg
    return network, name.partition(":")[2] or cfg.get("tag") or "pretrained"


def published_as(name: str) -> str:
    """timm's `architecture.tag` whose weights the hub id `hf-hub:org/name` is; "" for any other name."""
    source, _, place = name.partition(":")
    tagged = place.rpartition("/")[2]
    architecture, _, tag = tagged.partition(".")
    if source != "hf-hub" or not timm.models.is_model(architecture) or tag not in tags(architecture):
        return ""
    cfg: Any = timm.models.get_pretrained_cfg(tagged)
    return tagged if cfg.hf_hub_id == place else ""


def offline_hint(name: str) -> str:
    """What works without a network: the command that fetches these very weights elsewhere, and what to type here.

    Random weights only where timm knows without the place of `name` how to build the network.
    """
    source, _, place = name.partition(":") if ":" in name else ("", "", name)
    if source == "local-dir":
        return f"{place} must hold config.json and model.safetensors"
    cfg: Any = None if source else timm.models.get_pretrained_cfg(name)
    hub = place.partition("@")[0] if source else cfg.hf_hub_id
    random = "\nor go without trained ones: --weights random" if not source or published_as(name) else ""
    if hub:
        folder = hub.rpartition("/")[2]
        if source:
            return (
                f"on a machine with a network: hf download {hub} config.json model.safetensors --local-dir {folder}\n"
                f"then here: local-dir:{folder}{random}"
            )
        file = cfg.hf_hub_filename or "model.safetensors"
        return (
            f"on a machine with a network: hf download {hub} {file} --local-dir {folder}\n"
            f"then here: --weights {folder}/{file}   (or copy ~/.cache/huggingface/hub/models--* here){random}"
        )
    url = cfg.url
    return f"on a machine with a network: curl -LO {url}\nthen here: --weights {Path(url).name}{random}"


def load_file(network: nn.Module, path: Path) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Loads a file into `network`: (the label, modules of the classifier that it does not fit, notes).

    Names and sizes of published checkpoints are translated by timm's own filter of that model file; tensors that fit as
    they are stay as they are. Raises `WeightsError`.
    """
    label, (state, held) = f"file {path.name}", read_checkpoint(path, _WRAPPERS)
    state = timm.models.clean_state_dict(state)
    notes = (f"{label} holds {' and '.join(held)}: {held[0]} is taken, as timm does",) if len(held) > 1 else ()
    cfg: Any = network.pretrained_cfg
    classifiers = cfg.get("classifier") or ()
    heads = tuple(f"{name}." for name in ((classifiers,) if isinstance(classifiers, str) else classifiers))
    own = network.state_dict()
    if any(name not in state or state[name].shape != own[name].shape for name in own if not name.startswith(heads)):
        state = _filtered(state, network)
    return label, load_into(network, state, head=heads, source=label), notes


def _filtered(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    cfg: Any = network.pretrained_cfg
    files = (timm.models.model_entrypoint(cfg["architecture"]).__module__, type(network).__module__)
    filters = [getattr(sys.modules[file], name, None) for file in files for name in _FILTERS]
    for one in filter(None, filters):
        try:
            with torch.no_grad():
                found = one(dict(state), network) if len(signature(one).parameters) > 1 else one(dict(state))
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            continue  # no checkpoint that this filter knows; what does not fit is then said by name
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}
    return dict(state)


def architecture_of(folder: Path) -> str:
    """The timm architecture that a folder's `config.json` names, "" where it names none."""
    try:
        content = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return ""
    return str(content.get("architecture", "")) if isinstance(content, dict) else ""
