"""Backbone → neck → head from a configuration: `assemble(…)` gives an ordinary `Backbone` whose stages are roles.

A feature pyramid and a head of torchvision's fit on any backbone of any provider, for the maps that bbx gives are
channels-first everywhere; levels are named by the power of two of their measured stride (`neck.p2` is at 1/4). Classes
of a library that bring their own neck and heads are left to that library's `…_tasks` module.
"""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from bbx.backbone import Backbone
from bbx.errors import UsageError, nearest
from bbx.providers import load_backbone, load_structure
from bbx.providers.table import PROVIDERS, fold, imported
from bbx.recipe import Model, Pyramid, checked, read, tidied
from bbx.spec import BUILD, Build, Decode, ExifMode, ModelRef, Norm, ResizeMode
from bbx.stages import align_stages
from bbx.taps import Tap, capture, channels_first
from bbx.weights import digest, seeded


def assemble(
    config: str | os.PathLike[str] | Mapping[str, Any],
    *,
    model: str = "",
    seed: int = 0,
    size: int | tuple[int, int] | None = None,
    stages: str | Iterable[str | int] | None = None,
    layers: str | Iterable[str] = (),
    norm: Norm = "raw",
    resize_mode: ResizeMode | None = None,
    exif: ExifMode | None = None,
    decode: Decode | None = None,
    structure: bool = False,
) -> Backbone:
    """The model that `config`, a mapping or a .yaml, .toml or .json file, describes; `stages` as `load_backbone`'s.

    Either a backbone with torchvision's neck and head on it:
    `{backbone: {model: swin-tiny, weights: auto, stages: [stage1, …, stage4]}, neck: {type: fpn, out_channels: 256,
    extra: none | pool | p6p7}, head: {type: fcn | deeplab | none, num_classes: 21, in: p2}}`; or a class of a library,
    `{model: maskformer, backbone: {model_type: resnet, depths: […], weights: …}, options: {num_labels: 5}}`, whose
    `model:` may be given as `model`. Other options as `load_backbone`'s; `seed` is that of all random weights.
    Raises `UsageError`, `StartError` and its kin.
    """
    recipe = checked(read(config), model=model)
    height_width = (size, size) if isinstance(size, int) else size
    build = Build(seed=seed, size=height_width, norm=norm, structure=structure)
    backbone = load_model(recipe, build) if isinstance(recipe, Model) else load_pyramid(recipe, build)
    preprocess = backbone.preprocess.override(mode=resize_mode, exif=exif, decode=decode)
    backbone = replace(backbone, preprocess=preprocess)
    return backbone.select("all" if structure and stages is None else stages, layers=layers)


def load_model(recipe: Model, build: Build = BUILD) -> Backbone:
    """The class that `recipe` names, by the module that knows it."""
    weights = recipe.weights or ("random" if recipe.backbone else "auto")
    ref = ModelRef.parse(recipe.model, weights)
    known: list[str] = []
    for provider, module in _tasks(ref.provider):
        name = next((one for one in module.names() if fold(one) == fold(ref.name)), ref.name)
        known += module.names()
        if name in module.names() or (hasattr(module, "find") and module.find(name)):
            exact = ModelRef(provider, tidied(name), weights)
            parts = {"backbone": dict(recipe.backbone), "options": dict(recipe.options)}
            backbone: Backbone = module.load(exact, build, config={key: part for key, part in parts.items() if part})
            return backbone
    close = nearest(ref.name, known)
    raise UsageError(f"{recipe.model!r} is no assembled model", f"did you mean {' or '.join(close)}?" if close else "")


def _tasks(only: str) -> Iterator[tuple[str, Any]]:
    """The modules that know classes with necks and heads of their own, with their providers."""
    for provider, modules in PROVIDERS.items():
        for module in modules if only in ("", provider) else ():
            if module.endswith("_tasks"):
                yield provider, imported(module)


def load_pyramid(recipe: Pyramid, build: Build = BUILD) -> Backbone:
    """The backbone of `recipe` with its neck and head, whose random weights follow from `build.seed`."""
    inner = _inner(recipe, build)
    seed, device = build.seed, "meta" if build.structure else "cpu"
    with seeded(seed, device):
        network = Assembled(recipe, inner)
    parts = "".join(f"+{part}" for part in (recipe.neck, recipe.head) if part != "none")
    added = f", {' and '.join(parts[1:].split('+'))} random (seed {seed})" if parts else ""
    return Backbone(
        replace(inner.ref, name=f"{tidied(inner.ref.name)}{parts}"),
        network.eval(),
        network.taps,
        inner.preprocess,
        f"backbone {inner.weights}{added}",
        "" if build.structure else digest(network, options=inner.weights_digest),
        notes=inner.notes,
        forward=network.read,
        config=_text(recipe, inner),
    )


def _text(recipe: Pyramid, inner: Backbone) -> str:
    """The recipe, and what the backbone was built from where its name does not say it."""
    facts = json.loads(recipe.to_json())
    if inner.config:
        facts["built_from"] = json.loads(inner.config)
    return json.dumps(facts, sort_keys=True)


@dataclass(frozen=True, slots=True)
class _Level:
    """A map that the neck takes, or gives: its name, channels, and stride in pixels."""

    name: str
    channels: int
    stride: float


class Assembled(nn.Module):
    """`backbone`, `neck` (a feature pyramid) and `head` (`classifier`), each optional but the first.

    `forward`: pixels `(b, 3, h, w)` → every role's map `(b, c, fh, fw)`.
    """

    def __init__(self, recipe: Pyramid, inner: Backbone) -> None:
        super().__init__()
        self.inner = inner
        self.backbone = inner.network
        self.sources = tuple(stage.name for stage in inner.stages)
        levels = _levels(inner)
        self.neck: nn.Module | None = None
        if recipe.neck == "fpn":
            self.neck, levels = _pyramid(recipe, levels)
        self.levels = tuple(level.name for level in levels)
        self.head: nn.Module | None = None
        if recipe.head != "none":
            self.head, self.level = _head(recipe, levels, self.sources)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Every role, in network order; the modules are where the weights are."""
        found = [replace(tap, name=f"backbone.{tap.name}", module=_below(tap), layout="nchw", prefix=0)
                 for tap in self.inner.taps]  # fmt: skip
        found += [Tap(f"neck.{level}", "neck") for level in self.levels if self.neck]
        return (*found, *([Tap("head.classifier", "head")] if self.head else []))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Every role's map by name."""
        return self.read(pixels, self.taps)

    def read(self, pixels: Tensor, wanted: Sequence[Tap]) -> dict[str, Tensor]:
        """A `Backbone.forward`: the maps of `wanted`, the neck and the head run only for their own."""
        names = {tap.name for tap in wanted if not tap.free}
        beyond = any(not name.startswith("backbone.") for name in names)
        stages = {name.removeprefix("backbone.") for name in names} | set(self.sources if beyond else ())
        maps = {f"backbone.{name}": one for name, one in self._stages(pixels, stages).items()} if stages else {}
        if beyond and self.neck:
            given = OrderedDict((str(place), maps[f"backbone.{name}"]) for place, name in enumerate(self.sources))
            maps.update(zip((f"neck.{level}" for level in self.levels), self.neck(given).values(), strict=True))
        if "head.classifier" in names and self.head:
            maps["head.classifier"] = self.head(maps[self.level])
        found = {tap.name: maps[tap.name] for tap in self.taps if tap.name in names}
        free = [tap for tap in wanted if tap.free]
        return found | (capture(self, free, pixels) if free else {})

    def _stages(self, pixels: Tensor, names: set[str]) -> dict[str, Tensor]:
        taps = [tap for tap in self.inner.taps if tap.name in names]
        run = self.inner.forward
        raw = run(pixels, taps) if run else capture(self.inner.network, taps, pixels)
        return {tap.name: channels_first(raw[tap.name], tap, pixels) for tap in taps}


def _below(tap: Tap) -> str:
    return f"backbone.{tap.module}" if tap.module else ""


def _inner(recipe: Pyramid, build: Build) -> Backbone:
    """The backbone, giving the stages that the neck takes."""
    seed = build.seed if recipe.seed is None else recipe.seed
    shared: dict[str, Any] = {"size": build.size, "norm": build.norm, "options": recipe.options}
    if build.structure:
        inner = load_structure(recipe.model, weights=recipe.weights, **shared)
    else:
        inner = load_backbone(recipe.model, weights=recipe.weights, seed=seed, **shared)
    if not recipe.stages:
        return inner.select([name for name in inner.stage_names if name != "stem"])
    by_number = isinstance(recipe.stages[0], int)
    given: dict[str, Any] = {"out_indices" if by_number else "out_features": list(recipe.stages)}
    names, _ = align_stages(inner.stage_names, **given)
    return inner.select(names)


def _levels(inner: Backbone) -> list[_Level]:
    named: list[_Level] = []
    for stage in inner.stages:
        if len(stage.shape) != 3:
            raise UsageError(
                f"{inner.ref}: {stage.name} is no map, so no neck or head fits on it", "choose other stages"
            )
        named.append(_Level(_unused(named, stage.stride), stage.channels, stage.stride))
    return named


def _unused(named: Sequence[_Level], stride: float) -> str:
    """`p2` for stride 4; a second level of that stride is `p2_2`."""
    name = f"p{round(math.log2(stride))}"
    count = sum(level.name.partition("_")[0] == name for level in named)
    return f"{name}_{count + 1}" if count else name


def _pyramid(recipe: Pyramid, levels: list[_Level]) -> tuple[nn.Module, list[_Level]]:
    from torchvision.ops import feature_pyramid_network as fpn

    strides = [level.stride for level in levels]
    if len(levels) < 2 or strides != sorted(strides):
        fault = f"strides {', '.join(f'{stride:g}' for stride in strides)}"
        raise UsageError(f"a feature pyramid needs two levels or more, fine to coarse, not {fault}", "add to stages:")
    width = recipe.out_channels
    extra = {"none": None, "pool": fpn.LastLevelMaxPool, "p6p7": lambda: fpn.LastLevelP6P7(width, width)}[recipe.extra]
    neck = fpn.FeaturePyramidNetwork([level.channels for level in levels], width, extra_blocks=extra and extra())
    given = [replace(level, channels=width) for level in levels]
    for _ in range({"none": 0, "pool": 1, "p6p7": 2}[recipe.extra]):
        stride = given[-1].stride * 2
        given.append(_Level(_unused(given, stride), width, stride))
    return neck, given


def _head(recipe: Pyramid, levels: list[_Level], sources: Sequence[str]) -> tuple[nn.Module, str]:
    """The head, and the name of the map that it takes."""
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead
    from torchvision.models.segmentation.fcn import FCNHead

    neck = recipe.neck != "none"
    known = dict(zip([level.name for level in levels] if neck else sources, levels, strict=True))
    wish = recipe.level.removeprefix("neck.").removeprefix("backbone.") or (levels[0].name if neck else sources[-1])
    if wish not in known:
        close = nearest(wish, known, 1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"head.in: no level {wish!r}", f"{meant}valid: {', '.join(known)}")
    kind = {"fcn": FCNHead, "deeplab": DeepLabHead}[recipe.head]
    return kind(known[wish].channels, recipe.num_classes), f"{'neck' if neck else 'backbone'}.{wish}"
