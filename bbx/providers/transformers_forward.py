"""Running transformers' backbones: only as far as the deepest stage asked for, with or without the class's extra norms.

transformers runs the whole network whatever is asked. Here its list of stages is cut for the time of one call, so that
the class's own code still makes the maps. While `torch.compile` traces, nothing is cut: what no map needs is then
removed as dead code. Not itself a provider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from bbx.providers.transformers_families import Family, module_list
from bbx.providers.transformers_weights import quiet
from bbx.taps import Tap, capture


@dataclass(frozen=True)
class StageMaps:
    """`Backbone.forward` of a backbone class: an object, not a closure, so that a copied network has one of its own."""

    network: Any
    family: Family
    makes: Callable[[Any, Family, Tensor, dict[str, int]], dict[str, Tensor]]
    merging: bool

    def __call__(self, pixels: Tensor, taps: Sequence[Tap]) -> dict[str, Tensor]:
        """Each tap's map for `pixels` `(b, 3, h, w)`, nothing past the deepest of them having run."""
        free = [tap for tap in taps if tap.free]
        wanted = {tap.name: _depth(tap.name) for tap in taps if not tap.free}
        found: dict[str, Tensor] = {}
        if wanted and torch.compiler.is_compiling():
            found = self.makes(self.network, self.family, pixels, wanted)
        elif wanted:
            with cut(self.network, self.family, wanted, merging=self.merging):
                found = self.makes(self.network, self.family, pixels, wanted)
        found = {name: found[name] for name in wanted}
        return {**found, **capture(self.network, free, pixels)} if free else found


def forward_of(network: Any, family: Family, *, tokens: bool, raw: bool) -> StageMaps:
    """`(pixels, taps)` → each tap's map.

    `tokens`: a ViT's hidden states, prefix tokens and all. `raw`: `raw_network` has been applied to `network`.
    """
    maybe_install_capturing_hooks(network)  # now, for torch.compile cannot trace the lock that this takes
    merging = not family.merges or (family.raw is not None and not raw)
    makes = _tokens if tokens or family.plain else _maps if not (raw and family.raw) else _raw_maps
    return StageMaps(network, family, makes, merging)


def raw_network(network: Any, family: Family) -> None:
    """Takes out of `network` what the backbone class adds to the ordinary forward: extra norms, needless shifts."""
    if family.norms:
        holder, name = _placed(network, family.norms)
        norms = getattr(holder, name)
        if isinstance(norms, nn.ModuleDict):
            norms.update({stage: nn.Identity() for stage in norms})
        elif isinstance(norms, nn.ModuleList):
            setattr(holder, name, nn.ModuleList(nn.Identity() for _ in norms))
        else:
            setattr(holder, name, nn.Identity())
    if family.shifts:
        for stage in module_list(network, family)[2]:
            stage.register_forward_pre_hook(_shift_as_the_model)


@dataclass(frozen=True)
class Attention:
    """`Backbone.attend`: attention of each layer `(b, heads, t, t)`; where windows attend, `b` counts them.

    By the eager implementation, which alone gives them; maps are computed with the usual one before and after. Of Swin
    transformers gives a stage's last layer only.
    """

    network: Any

    def __call__(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """For `pixels` `(b, 3, h, w)`."""
        before = self.network.config._attn_implementation
        with quiet():
            self.network.set_attn_implementation("eager")
            try:
                return tuple(self.network(pixels, output_attentions=True).attentions)
            finally:
                self.network.set_attn_implementation(before)


@contextmanager
def cut(network: Any, family: Family, wanted: dict[str, int], *, merging: bool) -> Iterator[None]:
    """`network` ending at the deepest of the `wanted` stages, giving those only; itself again afterwards.

    Without `merging`, the last stage left does not downsample for a next one.
    """
    holder, name, stages = module_list(network, family)
    depth = max(wanted.values())
    kept = list(stages[:depth])
    with ExitStack() as undo:
        for path in family.after:
            _set(undo, *_placed(network, path), nn.Identity())
        if kept and not merging:
            _set(undo, kept[-1], "downsample", None)
        if not kept and family.recorded:
            # Hidden states are recorded by hooks on the layers, the stem as the first one's input: it stays, idle.
            kept = [stages[0]]
            stages[0].forward = _idle
            undo.callback(delattr, stages[0], "forward")
        _set(undo, holder, name, nn.ModuleList(kept))
        if not family.plain:
            before = list(network.out_features)
            undo.callback(setattr, network.config, "out_features", before)
            network.config.out_features = [stage for stage in network.stage_names if stage in wanted]
        yield


def _maps(network: Any, _family: Family, pixels: Tensor, _wanted: dict[str, int]) -> dict[str, Tensor]:
    return dict(zip(network.out_features, network(pixels).feature_maps, strict=True))


def _raw_maps(network: Any, family: Family, pixels: Tensor, wanted: dict[str, int]) -> dict[str, Tensor]:
    assert family.raw is not None  # for mypy: this is chosen where it is set
    maps = family.raw(network, pixels, max(wanted.values()))
    return {name: maps[depth] for name, depth in wanted.items()}


def _tokens(network: Any, family: Family, pixels: Tensor, wanted: dict[str, int]) -> dict[str, Tensor]:
    if family.plain:
        output = network(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
    else:
        output = network(pixels, output_hidden_states=True)
    return {name: _normed(network, family, name)(output.hidden_states[depth]) for name, depth in wanted.items()}


def _normed(network: Any, family: Family, stage: str) -> Any:
    """The norm that the class applies to `stage`, its configuration deciding."""
    config = network.config
    applies = getattr(config, "apply_layernorm", getattr(config, "normalize_backbone_outputs", True))
    if config.model_type == "dinov3_vit" and stage == network.stage_names[-1]:
        applies = True
    return network.get_submodule(family.norms) if family.norms and applies else nn.Identity()


def _depth(stage: str) -> int:
    return 0 if stage == "stem" else int(stage.removeprefix("stage"))


def _idle(hidden: Tensor, *_rest: Any, **_options: Any) -> Tensor:
    return hidden


def _shift_as_the_model(stage: Any, inputs: Any) -> None:
    """Swin's own rule, which the backbone class leaves out: a side that is one window wide is not shifted.

    Source: `SwinLayer.set_shift_and_window_size`, which the backbone class skips so as not to shrink the window.
    """
    height, width = inputs[1]
    for number, block in enumerate(stage.blocks):
        one_window = min(height, width) <= block.window_size
        block.shift_size = 0 if number % 2 == 0 or one_window else block.window_size // 2


def _placed(network: Any, path: str) -> tuple[Any, str]:
    parent, _, name = path.rpartition(".")
    return network.get_submodule(parent), name


def _set(undo: ExitStack, holder: Any, name: str, value: Any) -> None:
    undo.callback(setattr, holder, name, getattr(holder, name))
    setattr(holder, name, value)
