"""`bbx models`: every model of every provider from the catalogue, filtered, with what is on this machine marked."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from bbx.errors import UsageError, nearest
from bbx.providers import catalog
from bbx.providers.aliases import TWINS, twins
from bbx.providers.table import PROVIDERS, fold, imported, is_installed, squeeze

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


def list_models(
    pattern: str = "*",
    *,
    provider: str | None = None,
    family: str | None = None,
    parameters: str | None = None,
    stride: int | None = None,
    here: bool = False,
) -> list[dict[str, Any]]:
    """Every model that matches the glob `pattern` (by name, alias or `provider:name`) and all the filters.

    A row: `name`, `alias`, `provider`, `family`, `parameters`, `stride` of the last stage in pixels, `stages` (how
    many, stem included), `weights` (default first), `here` (which of them are on this machine), `installed`. What is
    not known is None. `family` is a glob, `parameters` a range (`..30M`, `5M..30M`), `here` keeps models with weights
    here. Case, `-` and `_` do not matter. Raises `UsageError`.
    """
    if provider is not None and provider not in PROVIDERS:
        close = nearest(provider, PROVIDERS, 1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"no provider {provider!r}", f"{meant}providers: {', '.join(PROVIDERS)}")
    low, high = _range(parameters)
    rows = [row for at in PROVIDERS if provider in (None, at) for row in _rows(at)]
    for alike in (fold, squeeze):
        found = [row for row in rows if _matches(row, pattern, alike)]
        if found:
            break
    kept = [
        row
        for row in found
        if (family is None or fnmatch.fnmatchcase(fold(row["family"] or ""), fold(family)))
        and (parameters is None or (row["parameters"] is not None and low <= row["parameters"] <= high))
        and (stride is None or row["stride"] == stride)
    ]
    for row in kept:
        row["here"] = [name for name in row["weights"] if _is_here(row, name)]
    return [row for row in kept if row["here"] or not here]


def _rows(provider: str) -> list[dict[str, Any]]:
    alias_of = {f"{at}:{name}": alias for alias in TWINS for at, name in twins(alias).items()}
    listed, installed = catalog.rows(provider), is_installed(provider)  # which asks the file system: once, not per row
    names = list(listed)
    more: dict[str, dict[str, Any]] = {}
    if installed and not catalog.is_current(provider):
        # Another version than the catalogue's: the library itself says which names it has.
        for module in map(imported, PROVIDERS[provider]):
            facts = {row["name"]: row for row in module.list_models()} if hasattr(module, "list_models") else {}
            more.update({name: facts.get(name, {}) for name in module.names()})
        names = list(more)
    return [
        {
            "name": name,
            "alias": alias_of.get(f"{provider}:{name}", ""),
            "provider": provider,
            **dict.fromkeys(("family", "parameters", "stride", "stages")),
            "weights": [],
            **more.get(name, {}),
            **listed.get(name, {}),
            "installed": installed,
        }
        for name in names
    ]


def _matches(row: Mapping[str, Any], pattern: str, alike: Callable[[str], str]) -> bool:
    tags = [f"{row['name']}.{weights}" for weights in row["weights"]] if row["provider"] == "timm" else []
    names = [row["name"], *tags]
    texts = [row["alias"], *names, *(f"{row['provider']}:{name}" for name in names)]
    return any(fnmatch.fnmatchcase(alike(text), alike(pattern)) for text in texts if text)


def _range(text: str | None) -> tuple[float, float]:
    if text is None:
        return 0, float("inf")
    low, dots, high = text.partition("..")
    ends = [re.fullmatch(r"(\d+(?:\.\d+)?)([kmbg]?)", end.strip().lower()) for end in (low, high) if end]
    if not dots or not ends or not all(ends):
        raise UsageError(f"--parameters {text!r} is no range", "type ..30M, 5M..30M or 1B..")
    values = [float(end[1]) * _UNITS[end[2]] for end in ends if end]
    return (values[0] if low else 0), (values[-1] if high else float("inf"))


def _is_here(row: Mapping[str, Any], weights: str) -> bool:
    """Whether these weights are in the cache that the row's library would look in."""
    provider, name = row["provider"], row["name"]
    if provider == "packaged":
        return True
    if provider == "timm":
        return f"timm/{name}.{weights}" in _hub_cache()
    if provider == "transformers":
        return weights in _hub_cache()
    return row.get("files", {}).get(weights) in _torch_cache()


@cache
def _torch_cache() -> frozenset[str]:
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "torch"
    folder = Path(home).expanduser() / "hub" / "checkpoints"
    return frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()


@cache
def _hub_cache() -> frozenset[str]:
    """The ids of the Hugging Face hub that have a snapshot with weights on this machine."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    folder = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    found = set()
    for place in folder.glob("models--*") if folder.is_dir() else ():
        files = place.glob("snapshots/*/*")
        if any(file.suffix in (".safetensors", ".bin", ".pth") for file in files):
            found.add(place.name.removeprefix("models--").replace("--", "/"))
    return frozenset(found)
