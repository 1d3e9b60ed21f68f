"""One architecture side by side in all libraries: what each calls its stages, and whether their values are the same.

The values are not looked up but computed there and then: the first library's network gets random weights, the others
the same ones by `transplant`, all get the same random pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from bbx.backbone import Backbone
from bbx.errors import BbxError, MissingExtraError
from bbx.providers import load_backbone, resolve
from bbx.providers.aliases import LIBRARIES, TWINS, twins
from bbx.spec import Stage
from bbx.transplant import FAMILIES, transplant

Status = Literal["compared", "no twin", "not installed", "failed"]
Padding = Literal["floor", "ceil", "unpadded", "exact", "assert"]

# What `--norm native` adds to the raw maps, by family and library, and to which stages; all
# others return their maps as they are. Sources: transformers 5.23's backbone classes (`hidden_states_norms` of Swin and
# ConvNeXt, `apply_layernorm` of DINOv2) and timm's `feature_info` of DenseNet.
NATIVE_NORMS = {
    ("swin", "transformers"): ("LayerNorm of its own, eps 1e-05", "every"),
    ("convnext", "transformers"): ("LayerNorm of its own, eps 1e-06", "every"),
    ("dinov2", "transformers"): ("the final LayerNorm, eps 1e-06", "every"),
    ("densenet", "timm"): ("the final BatchNorm and ReLU", "last"),
}
# Whose position embedding transformers interpolates from the configuration's size; here it must have the input's.
_ONE_SIZE = ("vit", "dinov2")
_NORM_LAYERS = {"BatchNorm": nn.BatchNorm2d, "LayerNorm": nn.LayerNorm}


@dataclass(frozen=True, slots=True)
class Cell:
    """One stage in one library.

    `called` is the library's own name for it and `place` its own index (None where it has none), `shape` `(c, h, w)`,
    `stride` in input pixels per cell, `norm` what the library's own backbone class adds (empty: nothing). `padding` is
    what becomes of an input that the stride does not divide: its border is cropped (`floor`) or padded (`ceil`), it is
    refused (`assert`), or it cannot be, at stride 1 (`exact`); `unpadded` convolutions crop every input.
    `difference` is max|Δ| / max|value| against the first library; None for that one, and where shapes differ.
    """

    stage: str
    called: str
    place: int | None
    shape: tuple[int, ...]
    stride: float
    norm: str
    padding: Padding
    difference: float | None


@dataclass(frozen=True, slots=True)
class Column:
    """One library: its name for the model, its cells, or why there are none (`reason`) and what to type (`hint`)."""

    library: str
    model: str
    status: Status
    cells: tuple[Cell, ...] = ()
    notes: tuple[str, ...] = ()
    reason: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All libraries' columns; `reference` is the library that the others are measured against, `size` in pixels."""

    name: str
    size: tuple[int, int]
    seed: int
    reference: str
    columns: tuple[Column, ...]

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages, as any of the libraries has them, in network order."""
        longest = max((column.cells for column in self.columns), key=len)
        return tuple(cell.stage for cell in longest)


def compare(name: str, *, size: int | tuple[int, int] | None = None, seed: int = 0) -> Comparison:
    """The model `name` (an alias, or any library's own name) in all libraries, with random weights by `seed`.

    `size` is the input's (height, width) in pixels, by default that of the first library's own preprocessing. A library
    that is not installed, has no such network or cannot build it has a column that says so. Raises `UsageError` for an
    unknown name, and the first library's own error where none of them can be built.
    """
    alias, names = _dictionary_row(name)
    reference: _Measured | None = None
    columns: list[Column] = []
    errors: list[BbxError] = []
    for library in LIBRARIES:
        column = Column(library, names.get(library, ""), "compared")
        if library not in names:
            columns.append(replace(column, status="no twin", reason=f"bbx knows no twin of {alias} in {library}"))
            continue
        try:
            measured = _measured(f"{library}:{names[library]}", _family(alias), reference, size, seed)
        except BbxError as error:
            status: Status = "not installed" if isinstance(error, MissingExtraError) else "failed"
            columns.append(replace(column, status=status, reason=error.message, hint=error.hint))
            errors.append(error)
            continue
        reference = reference or measured
        cells = tuple(_cell(stage, measured, reference, _family(alias)) for stage in measured.backbone.stages)
        columns.append(replace(column, cells=cells, notes=measured.notes))
    if reference is None:
        raise errors[0]
    return Comparison(alias, reference.size, seed, reference.library, tuple(columns))


def _dictionary_row(name: str) -> tuple[str, dict[str, str]]:
    """The dictionary's alias for `name`, and each library's own name; a model that stands in no row is a row alone."""
    folded = name.strip().lower().replace("_", "-")
    if folded in TWINS:
        return folded, twins(folded)
    ref = resolve(name)
    plain = ref.name.partition(".")[0] if ref.provider == "timm" else ref.name  # a tag names weights, not a network
    for alias in TWINS:
        if twins(alias).get(ref.provider) in (plain, ref.name):
            return alias, twins(alias)
    return ref.name, {ref.provider: ref.name}


def _family(alias: str) -> str:
    """The family whose name the alias begins with, the longest; empty where there is no table of it."""
    return max((family for family in FAMILIES if alias.startswith(family)), key=len, default="")


@dataclass(frozen=True, slots=True)
class _Measured:
    library: str
    backbone: Backbone
    maps: dict[str, Tensor]
    paddings: dict[str, Padding]
    notes: tuple[str, ...]

    @property
    def size(self) -> tuple[int, int]:
        return self.backbone.preprocess.size


def _measured(
    model: str, family: str, reference: _Measured | None, size: int | tuple[int, int] | None, seed: int
) -> _Measured:
    """`model` with the reference's weights, or stirred random ones where there is none yet, run on random pixels."""
    at = reference.size if reference else size
    options = (
        {"image_size": reference.size[0]}
        if reference and model.startswith("transformers:") and family in _ONE_SIZE
        else {}
    )
    backbone = load_backbone(model, weights="random", seed=seed, stages="all", size=at, options=options)
    library, network, notes = backbone.ref.provider, backbone.network, tuple[str, ...]()
    if reference is None:
        _stir(network, seed)
    else:
        source = reference.backbone.network
        notes = tuple(_equalise(network, source, reference.library))
        state = transplant(source.state_dict(), family, reference.library, library, into=network.state_dict())
        network.load_state_dict(state)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn((1, 3, *backbone.preprocess.size), generator=generator)
    with torch.inference_mode():
        maps = backbone(pixels)
    return _Measured(library, backbone, maps, _paddings(backbone), notes)


def _stir(network: nn.Module, seed: int) -> None:
    """Fresh numbers for tensors of one repeated value: a layer scale of 1e-6 would hide whatever it scales."""
    generator = torch.Generator().manual_seed(seed)
    for value in network.state_dict().values():
        if value.is_floating_point() and value.numel() > 1 and bool((value == value.flatten()[0]).all()):
            drawn = torch.rand(value.shape, generator=generator)
            value.copy_(drawn + 0.5 if value.flatten()[0] == 1 else (drawn - 0.5) / 5)


def _equalise(network: nn.Module, source: nn.Module, library: str) -> Iterator[str]:
    """Gives norms the reference's eps, which no state dict holds, and says so."""
    for kind, layer in _NORM_LAYERS.items():
        own, wanted = _eps(network, layer), _eps(source, layer)
        if len(own) == len(wanted) == 1 and own != wanted:
            eps = wanted.pop()
            for module in network.modules():
                if isinstance(module, layer):
                    cast(Any, module).eps = eps
            yield f"{kind} eps is {own.pop():g} here; set to {library}'s {eps:g} for the comparison"
        elif own - wanted:
            yield f"{kind} eps differ and were left: {_listed(own)} here, {_listed(wanted)} in {library}"


def _eps(network: nn.Module, layer: type[nn.Module]) -> set[float]:
    return {float(cast(Any, module).eps) for module in network.modules() if isinstance(module, layer)}


def _listed(values: set[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(values)) or "none"


def _paddings(backbone: Backbone) -> dict[str, Padding]:
    """What each stage makes of an input that its stride divides, and of one that is a pixel larger."""
    largest = max(int(stage.stride) for stage in backbone.stages) or 1
    height, width = (side // largest * largest for side in backbone.preprocess.size)
    with torch.inference_mode():
        try:
            even, odd = (backbone(torch.zeros(1, 3, height + more, width + more)) for more in (0, 1))
        except (AssertionError, RuntimeError, ValueError):
            return {stage.name: "assert" for stage in backbone.stages}
    return {
        stage.name: _padding(stage, height, even[stage.name].shape[2], odd[stage.name].shape[2])
        for stage in backbone.stages
    }


def _padding(stage: Stage, height: int, even: int, odd: int) -> Padding:
    if even < height / stage.stride:
        return "unpadded"
    if stage.stride == 1:
        return "exact"
    return "ceil" if odd > even else "floor"


def _cell(stage: Stage, measured: _Measured, reference: _Measured, family: str) -> Cell:
    called, place = _called(measured.backbone, stage)
    got, wanted = measured.maps[stage.name], reference.maps.get(stage.name)
    difference = None
    if measured is not reference and wanted is not None and wanted.shape == got.shape:
        difference = float((got - wanted).abs().max() / wanted.abs().max())
    return Cell(
        stage.name, called, place, stage.shape, stage.stride,
        _native_norm(stage, measured, family), measured.paddings[stage.name], difference,
    )  # fmt: skip


def _native_norm(stage: Stage, measured: _Measured, family: str) -> str:
    text, where = NATIVE_NORMS.get((family, measured.library), ("", "every"))
    return text if where == "every" or stage.name == measured.backbone.stage_names[-1] else ""


def _called(backbone: Backbone, stage: Stage) -> tuple[str, int | None]:
    """The library's own name and index of a stage: timm's by `feature_info`, transformers' by `stage_names`."""
    network: Any = backbone.network
    if backbone.ref.provider == "timm":
        modules = [entry["module"] for entry in network.feature_info]
        return stage.module, modules.index(stage.module) if stage.module in modules else None
    if backbone.ref.provider == "transformers":
        names = getattr(network, "stage_names", None)
        return (names[stage.index], stage.index) if names else (f"hidden_states[{stage.index}]", stage.index)
    return stage.module, None
