"""Who knows which model: a name becomes a provider's model in `resolve`, and a backbone in `load_backbone`.

A provider is one or more modules with `names()`, `load(ref, build)` and, for what cannot be listed (tags, folders, ids
of a hub), `find(name)`. A module is imported when it is needed. To add one: a file beside this one, a line in `table`,
an extra in pyproject.toml, its rows in the catalogue (`python -m tests.catalog`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bbx.errors import UsageError, WeightsError, nearest
from bbx.providers import catalog, saved
from bbx.providers.aliases import TWINS, twins
from bbx.providers.listing import list_models
from bbx.providers.table import EXTRAS, PROVIDERS, fold, imported, is_installed, squeeze
from bbx.spec import Build, Decode, ExifMode, ModelRef, Norm, ResizeMode, one_of

if TYPE_CHECKING:
    from bbx.backbone import Backbone

# Prefixes by which timm names a place.
_HUBS = ("hf-hub", "local-dir")

__all__ = ["PROVIDERS", "list_models", "load_backbone", "load_structure", "resolve"]


def resolve(model: str | ModelRef, *, weights: str = "auto") -> ModelRef:
    """The provider and the exact name that `model` means.

    `provider:name`; an alias; any provider's name, in the table's order; a folder with a `config.json`; an `org/name`
    of the Hugging Face hub. Case, `-` and `_` do not matter in listed names. Raises `UsageError` with the nearest
    names, `MissingExtraError` with the line to type when a package is missing.
    """
    ref = model if isinstance(model, ModelRef) else ModelRef.parse(model, weights)
    # A plain word is a folder only where no list knows it: an empty folder `resnet18` must not hide the model.
    if ref.provider in _HUBS or (not ref.provider and ("/" in ref.name or ref.name.startswith(("~", ".")))):
        ref = _placed(ref)
        if saved.is_saved(Path(ref.name)):
            return _saved(ref)
    if ref.provider and ref.provider not in PROVIDERS:
        close = nearest(ref.provider, PROVIDERS, 1) or list(PROVIDERS)
        raise UsageError(
            f"no provider {ref.provider!r}", f"providers: {', '.join(PROVIDERS)}; try {close[0]}:{ref.name}"
        )
    here = [ref.provider] if ref.provider else [name for name in PROVIDERS if is_installed(name)]
    for alike in (fold, squeeze):
        for provider in ["", *here]:
            known = (
                {name: ModelRef(provider, name) for name in _names(provider)} if provider else _aliases(ref.provider)
            )
            found = [name for name in known if alike(name) == alike(ref.name)]
            if len(found) > 1:
                raise UsageError(f"{str(ref)!r} names more than one model", f"did you mean {' or '.join(found)}?")
            if found:
                return replace(known[found[0]], weights=ref.weights)
    if not ref.provider and Path(ref.name).is_dir():
        ref = _placed(ref)
        return _saved(ref) if saved.is_saved(Path(ref.name)) else ref
    for provider in here:
        for module in PROVIDERS[provider]:
            find = getattr(imported(module), "find", None)
            if find and (name := find(ref.name)):
                return ModelRef(provider, name, ref.weights)
    raise _unknown(ref, here)


def load_backbone(
    model: str | ModelRef,
    *,
    weights: str = "auto",
    seed: int = 0,
    stages: str | Iterable[str | int] | None = None,
    layers: str | Iterable[str] = (),
    size: int | tuple[int, int] | None = None,
    resize_mode: ResizeMode | None = None,
    exif: ExifMode | None = None,
    decode: Decode | None = None,
    norm: Norm = "raw",
    tokens: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Backbone:
    """The backbone `model` names, giving `stages` (default: the last) and `layers` (module paths or globs).

    `weights`: `auto` (the default pretrained ones), `random` (by `seed`), a file, or the provider's name for some.
    `size`, input (height, width) in pixels, `resize_mode`, `exif` and `decode` override the weights' own preprocessing.
    `norm`: `raw` maps, or `native`, what the library's own backbone class gives. `tokens`: the stages of a plain ViT as
    `(t, d)`. `options`: the library's own arguments of the model. Raises `UsageError`, `StartError` and its kin.
    """
    ref = resolve(model, weights=weights)
    folder = Path(ref.weights)
    content = saved.read_config(folder) if saved.is_saved(folder) else None
    one_of("--resize-mode", resize_mode or "crop", ResizeMode)
    one_of("--exif", exif or "apply", ExifMode)
    one_of("--decode", decode or "exact", Decode)
    one_of("--norm", norm, Norm)
    height_width = (size, size) if isinstance(size, int) else size
    if height_width is not None and (len(height_width) != 2 or not all(isinstance(side, int) for side in height_width)):
        raise UsageError(f"size {size!r} is no size", "pixels, such as 224, or (height, width)")
    build = Build(seed=seed, size=height_width, norm=norm, tokens=tokens, options=options or {})
    if content:
        backbone = _from_folder(ref, content, folder, _agreed(content.build, build, folder))
    else:
        backbone = _load(ref, build)
    preprocess = backbone.preprocess.override(mode=resize_mode, exif=exif, decode=decode)
    return replace(backbone, preprocess=preprocess).select(stages, layers=layers)


def load_structure(
    model: str | ModelRef,
    *,
    weights: str = "auto",
    size: tuple[int, int] | None = None,
    norm: Norm = "raw",
    tokens: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Backbone:
    """The backbone without weights, on torch's meta device: its stages and shapes, at once and without a download.

    `weights` still chooses the preprocessing.
    """
    ref = resolve(model, weights=weights)
    build = Build(size=size, structure=True, norm=norm, tokens=tokens, options=options or {})
    if saved.is_saved(folder := Path(ref.weights)):
        content = saved.read_config(folder)
        ref = replace(ref, weights="random")
        build = replace(_agreed(content.build, build, folder), structure=True)
    return _load(ref, build).select("all")


def _saved(ref: ModelRef) -> ModelRef:
    """The model of a folder that bbx saved: its provider's, with the folder as its weights."""
    if ref.weights != "auto":
        raise UsageError(f"{ref.name} is saved with its weights", "leave --weights out")
    return replace(ModelRef.parse(saved.read_config(Path(ref.name)).model), weights=ref.name)


def _agreed(own: Build, wish: Build, folder: Path) -> Build:
    """How a saved backbone is built, with another size or as tokens if wished; its norm and options are its own."""
    if wish.options or (wish.norm != "raw" and wish.norm != own.norm):
        raise UsageError(
            f"{folder} is saved with its own norm ({own.norm}) and options", "leave --norm and options out"
        )
    return replace(own, size=wish.size or own.size, tokens=wish.tokens)


def _from_folder(ref: ModelRef, content: saved.Saved, folder: Path, build: Build) -> Backbone:
    """What `AutoBackbone.save_pretrained` wrote: built empty, then filled."""
    if str(replace(ref, weights="auto")) != content.model:
        raise WeightsError(f"{folder} holds a {content.model}, not a {ref}", f"--model {folder}")
    backbone = saved.load_weights(folder, _load(replace(ref, weights="random"), build))
    return replace(backbone, preprocess=(content.preprocess or backbone.preprocess).override(size=build.size))


def _load(ref: ModelRef, build: Build) -> Backbone:
    for module in map(imported, PROVIDERS[ref.provider]):
        find = getattr(module, "find", None)
        if ref.name in module.names() or (find and find(ref.name)):
            backbone: Backbone = replace(module.load(ref, build), norm=build.norm, tokens=build.tokens)
            return _as_tokens(backbone) if build.tokens else backbone
    raise _unknown(ref, [ref.provider])


def _as_tokens(backbone: Backbone) -> Backbone:
    taps = tuple(replace(tap, layout="as is") if tap.layout == "tokens" else tap for tap in backbone.taps)
    if not any(tap.layout == "as is" for tap in taps):
        raise UsageError(f"{backbone.ref} has no tokens: its stages are maps", "leave --tokens out")
    return replace(backbone, taps=taps)


def _placed(ref: ModelRef) -> ModelRef:
    """With the provider that a hub's prefix, a folder's configuration or an `org/name` speaks of."""
    if ref.provider in _HUBS:
        return replace(ref, provider="timm", name=str(ref))
    if ref.provider:
        return ref
    folder = Path(ref.name).expanduser()
    config = folder / "config.json"
    path = os.path.normpath(folder)  # the same folder, the same run
    if config.is_file():
        try:
            content = json.loads(config.read_text())
        except ValueError as error:
            raise UsageError(f"{config} is no JSON: {error}", "is the folder a saved model?") from None
        if "bbx_version" in content:
            return replace(ref, name=path)
        if "model_type" in content:
            return replace(ref, provider="transformers", name=path)
        if "architecture" in content:
            return replace(ref, provider="timm", name=f"local-dir:{path}")
        raise UsageError(
            f"{config} says neither model_type (transformers) nor architecture (timm)", "is the folder a saved model?"
        )
    if folder.is_dir() or ref.name.startswith(("./", "../", "/", "~")):
        raise UsageError(f"{ref.name} holds no config.json", "give a model's name, or the folder of a saved model")
    if ref.name.count("/") == 1:
        timm = ref.name.startswith("timm/")
        return (
            replace(ref, provider="timm", name=f"hf-hub:{ref.name}") if timm else replace(ref, provider="transformers")
        )
    return ref


def _aliases(provider: str) -> dict[str, ModelRef]:
    known = {}
    for alias in TWINS:
        rows = twins(alias)
        at = provider or next(iter(rows))
        if at in rows:
            known[alias] = ModelRef(at, rows[at])
    return known


def _names(provider: str) -> list[str]:
    if catalog.is_current(provider):
        return list(catalog.rows(provider))
    return [name for module in PROVIDERS[provider] for name in imported(module).names()]


def _unknown(ref: ModelRef, here: Iterable[str]) -> UsageError:
    known = [*_aliases(ref.provider), *(name for provider in here for name in _names(provider))]
    close = nearest(ref.name, known)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    missing = [name for name in EXTRAS if not ref.provider and not is_installed(name)]
    more = f"; pip install 'bbx[all]' adds the models of {' and '.join(missing)}" if missing else ""
    return UsageError(f"{str(ref)!r} is no model that bbx knows", f"{hint}bbx models lists the names{more}")
