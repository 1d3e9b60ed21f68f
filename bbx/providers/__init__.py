"""Who knows which model: the table of providers, the aliases, and the two ways in, `load_backbone` and `list_models`.

A provider is a module with `names()`, `list_models()` and `load(ref, …)`; it is imported when it is needed, so
that this table costs nothing. To add one: a file beside this one, a line here, an extra in pyproject.toml.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from bbx.errors import UsageError, nearest
from bbx.spec import ExifMode, ModelRef, ResizeMode, one_of

if TYPE_CHECKING:
    from bbx.backbone import Backbone

# In the order in which they are asked for a name without a provider.
PROVIDERS = {
    "packaged": "bbx.providers.packaged",
    "torchvision": "bbx.providers.torchvision",
}

# Names as papers and hubs write them, where they are not the provider's own but for case, `-` and `_`.
ALIASES = {
    "swin-tiny": "torchvision:swin_t",
    "swin-small": "torchvision:swin_s",
    "swin-base": "torchvision:swin_b",
    "swinv2-tiny": "torchvision:swin_v2_t",
    "swinv2-small": "torchvision:swin_v2_s",
    "swinv2-base": "torchvision:swin_v2_b",
    "vit-base-16": "torchvision:vit_b_16",
    "vit-base-32": "torchvision:vit_b_32",
    "vit-large-16": "torchvision:vit_l_16",
    "vit-large-32": "torchvision:vit_l_32",
    "vit-huge-14": "torchvision:vit_h_14",
    "maxvit-tiny": "torchvision:maxvit_t",
}


def resolve(model: str | ModelRef, *, weights: str = "auto") -> ModelRef:
    """The provider and the exact name that `model` means: `provider:name`, an alias, or any provider's name.

    Case, `-` and `_` do not matter. Raises `UsageError` with the nearest names.
    """
    ref = model if isinstance(model, ModelRef) else ModelRef.parse(model, weights)
    if ref.provider and ref.provider not in PROVIDERS:
        close = nearest(ref.provider, PROVIDERS, 1) or list(PROVIDERS)
        raise UsageError(
            f"no provider {ref.provider!r}", f"providers: {', '.join(PROVIDERS)}; try {close[0]}:{ref.name}"
        )
    known = {alias: ModelRef.parse(target) for alias, target in ALIASES.items()}
    known = {alias: target for alias, target in known.items() if ref.provider in ("", target.provider)}
    for provider in [ref.provider] if ref.provider else PROVIDERS:
        for name in import_module(PROVIDERS[provider]).names():
            known.setdefault(name, ModelRef(provider, name))
    found = [name for name in known if _fold(name) == _fold(ref.name)] or [
        name for name in known if _squeeze(name) == _squeeze(ref.name)
    ]
    if len(found) == 1:
        return replace(known[found[0]], weights=ref.weights)
    close = found or nearest(ref.name, known)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    fault = "names more than one model" if found else "is no model that bbx knows"
    raise UsageError(f"{str(ref)!r} {fault}", f"{hint}bbx models lists the names")


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
) -> Backbone:
    """The backbone `model` names, giving `stages` (default: the last) and `layers` (module paths or globs).

    `weights`: `auto` (the default pretrained ones), `random` (by `seed`), a file's path, or an enum member's name.
    `size`, input (height, width) in pixels, `resize_mode` and `exif` override the weights' own preprocessing.
    Raises `UsageError`, `WeightsError`.
    """
    ref = resolve(model, weights=weights)
    one_of("--resize-mode", resize_mode or "crop", ResizeMode)
    one_of("--exif", exif or "apply", ExifMode)
    height_width = (size, size) if isinstance(size, int) else size
    if height_width is not None and (len(height_width) != 2 or not all(isinstance(side, int) for side in height_width)):
        raise UsageError(f"size {size!r} is no size", "pixels, such as 224, or (height, width)")
    backbone: Backbone = import_module(PROVIDERS[ref.provider]).load(ref, seed=seed, size=height_width)
    preprocess = backbone.preprocess.override(mode=resize_mode, exif=exif)
    return replace(backbone, preprocess=preprocess).select(stages, layers=layers)


def load_structure(model: str | ModelRef, *, weights: str = "auto", size: tuple[int, int] | None = None) -> Backbone:
    """The backbone without weights, on torch's meta device: its stages and shapes, at once and without a download.

    `weights` still chooses the preprocessing.
    """
    ref = resolve(model, weights=weights)
    backbone: Backbone = import_module(PROVIDERS[ref.provider]).load(ref, size=size, structure=True)
    return backbone.select("all")


def list_models(pattern: str = "*") -> list[dict[str, Any]]:
    """`name`, `alias`, `provider`, `weights` (default first) and `parameters` of every model matching the glob.

    The pattern is matched against name, alias and `provider:name`; case, `-` and `_` do not matter.
    """
    alias_of = {target: alias for alias, target in ALIASES.items()}
    models = [
        {"name": model["name"], "alias": alias_of.get(f"{provider}:{model['name']}", ""), "provider": provider, **model}
        for provider, module in PROVIDERS.items()
        for model in import_module(module).list_models()
    ]

    def matching(fold: Callable[[str], str]) -> list[dict[str, Any]]:
        return [
            model
            for model in models
            for texts in [(model["name"], model["alias"], f"{model['provider']}:{model['name']}")]
            if any(fnmatch.fnmatchcase(fold(text), fold(pattern)) for text in texts if text)
        ]

    return matching(_fold) or matching(_squeeze)


def _fold(name: str) -> str:
    return name.lower().replace("-", "_")


def _squeeze(name: str) -> str:
    # Tried second: it would make regnet_x_1_6gf and regnet_x_16gf one.
    return _fold(name).replace("_", "")
