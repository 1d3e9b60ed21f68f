"""How timm's networks give their maps: `forward_intermediates` for stages, a hook for the stem, one pass for both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from bbx.providers.timm_families import FAMILY_OF, INDEX_0, Family
from bbx.taps import Layout, Tap, capture


def family_of(network: nn.Module) -> Family:
    """The table's row for a network: by the file of its class, since several files of timm share a class."""
    return FAMILY_OF[type(network).__module__.rpartition(".")[2]]


def taps_of(
    network: nn.Module, *, tokens: bool = False, native: bool = False
) -> tuple[tuple[Tap, ...], dict[str, int]]:
    """All taps in network order, and timm's index of each stage that `forward_intermediates` is to give."""
    family = family_of(network)
    if family.modules:
        last = family.native if native else family.modules[-1]
        names = ("stem", *(f"stage{number}" for number in range(1, len(family.modules))))
        return tuple(map(Tap, names, (*family.modules[:-1], last))), {}
    infos: Any = getattr(network.feature_info, "info", network.feature_info)
    said = [str(info["module"]) for info in infos]
    stem = said[0] if family.stem == INDEX_0 else family.stem
    skipped = 0
    while stem and (said[skipped] in (stem, *family.before) or said[skipped].startswith(f"{stem}.")):
        skipped += 1
    prefix: Any = getattr(network, "num_prefix_tokens", 0) if family.prefixed else 0
    layout: Layout = "as is" if tokens and family.layout == "tokens" else family.layout
    taps = [Tap("stem", _innermost(network, stem), layout, prefix)] if stem else []
    stage_layout: Layout = "as is" if tokens else "nchw" if family.grid else "tokens"
    paths = [_path(network, name) for name in said]
    for number, path in enumerate(paths[skipped:], 1):
        taps.append(Tap(f"stage{number}", path if paths.count(path) == 1 else "", stage_layout))
    return tuple(taps), {f"stage{number}": skipped + number - 1 for number in range(1, len(said) - skipped + 1)}


def _path(network: nn.Module, name: str) -> str:
    """The module that timm calls `name`, which may lie inside the `encoder` of a classifier; "" where there is none."""
    modules = dict(network.named_modules())
    return next((path for path in (name, f"encoder.{name}") if path in modules), "")


def _innermost(network: nn.Module, name: str) -> str:
    """Some networks run a Sequential stem child by child, so that no hook on it fires; its last child does."""
    path = _path(network, name)
    module = network.get_submodule(path)
    while isinstance(module, nn.Sequential) and len(module) and type(module).forward is nn.Sequential.forward:
        child, module = list(module.named_children())[-1]
        path = f"{path}.{child}"
    return path


class _Listener:
    """A hook that stays on the stem, for compiled code: a graph cannot contain the registering of one."""

    def __init__(self) -> None:
        self.listening = False
        self.heard: Tensor | None = None

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if self.listening:
            self.heard = output if isinstance(output, Tensor) else output[0]


@dataclass(frozen=True)
class Intermediates:
    """`Backbone.forward` of a timm network.

    `index` is timm's index of each stage, `listener` hooked to the stem, `prefixed` whether blocks hold prefix tokens.
    """

    network: nn.Module
    index: Mapping[str, int]
    listener: _Listener
    tokens: bool = False
    prefixed: bool = False

    @classmethod
    def of(cls, network: nn.Module, taps: Sequence[Tap], index: Mapping[str, int], *, tokens: bool) -> Intermediates:
        """With the listener in its place."""
        listener = _Listener()
        if taps[0].name == "stem":
            network.get_submodule(taps[0].module).register_forward_hook(listener)
        # Where the class token joins after the blocks (CaiT, XCiT), timm has no such argument.
        takes = "return_prefix_tokens" in signature(_part(network).forward_intermediates).parameters
        return cls(network, index, listener, tokens, takes and getattr(_part(network), "num_prefix_tokens", 0) > 0)

    def __call__(self, pixels: Tensor, taps: Sequence[Tap]) -> dict[str, Tensor]:
        """Each tap's output for `pixels` `(b, 3, h, w)`; nothing past the deepest stage runs."""
        stages = sorted(
            (tap.name for tap in taps if not tap.free and tap.name in self.index), key=self.index.__getitem__
        )
        stem = [tap for tap in taps if not tap.free and tap.name not in self.index]
        free = [tap for tap in taps if tap.free]
        maps: list[Tensor] = []
        caught: dict[str, Tensor] = {}

        def run(batch: Tensor) -> None:
            # For the stem alone, stage1: some networks stop for their index 0 before the stem's own pooling.
            maps.extend(self._intermediates(batch, [self.index[name] for name in stages or ["stage1"]]))

        if torch.compiler.is_compiling() and stem:
            self.listener.listening = True
            run(pixels)
            caught = {"stem": self.listener.heard} if self.listener.heard is not None else {}
            self.listener.listening, self.listener.heard = False, None
        elif stem or stages:
            caught = capture(self.network, stem, pixels, run=run, stop=not stages)
        caught.update(zip(stages, maps, strict=False))  # for the stem alone, a compiled pass gives stage1 besides
        return {**caught, **(capture(self.network, free, pixels) if free else {})}

    def _intermediates(self, pixels: Tensor, indices: list[int]) -> list[Tensor]:
        options: dict[str, Any] = {"indices": indices, "stop_early": True, "intermediates_only": True}
        if not self.tokens and family_of(self.network).grid:
            maps: list[Tensor] = _part(self.network).forward_intermediates(pixels, **options)
            return maps
        options["output_fmt"] = "NLC"
        if not self.tokens or not self.prefixed:
            maps = _part(self.network).forward_intermediates(pixels, **options)
            return maps
        pairs = _part(self.network).forward_intermediates(pixels, return_prefix_tokens=True, **options)
        return [torch.cat((prefix, patches), 1) for patches, prefix in pairs]


def _part(network: Any) -> Any:
    """What has the blocks: a classifier around an encoder would run the encoder's final norm too."""
    encoder = getattr(network, "encoder", None)
    return encoder if hasattr(encoder, "forward_intermediates") else network
