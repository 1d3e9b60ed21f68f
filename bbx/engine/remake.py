"""What is done to a network so that it runs faster on a CPU, as far as a trial finds its values unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bbx.backbone import Backbone
from bbx.engine.fold import Pairs, fold, foldable, may_fold
from bbx.engine.pack import is_used, pack, packable
from bbx.engine.replica import replica
from bbx.engine.swin import fusable, fuse, ran
from bbx.engine.switches import own_threads
from bbx.engine.trial import hard_pixels, maps_of, same


@dataclass(frozen=True, slots=True)
class Remake:
    """The layout; pairs of convolution and norm to fold; whether blocks are fused; what layers are packed."""

    channels_last: bool = False
    pairs: Pairs = ()
    fused: bool = False
    packed: int = 0

    def apply(self, backbone: Backbone) -> None:
        """In place; parameters are replaced, never written to."""
        if self.channels_last:
            _channels_last(backbone.network)
        fold(backbone.network, self.pairs)
        if self.fused:
            fuse(backbone)
        if self.packed:
            pack(backbone, self.packed)


def safe(backbone: Backbone, *, channels_last: bool) -> Remake:
    """What needs no trial."""
    return Remake(channels_last, packed=packable(backbone, wide=False))


def remake(backbone: Backbone, *, channels_last: bool, threads: int) -> Remake:
    """All that pays here and keeps every map to `trial.TOLERANCE`, in that layout and on as many threads.

    Tried once, on replicas: torch chooses among its ways by how many threads there are.
    """
    known: dict[tuple[bool, int], Remake] = backbone.__dict__.setdefault("_remakes", {})
    way = channels_last, threads
    if way not in known:
        with own_threads():
            torch.set_num_threads(threads)
            known[way] = _tried(backbone, safe(backbone, channels_last=channels_last))
    return known[way]


def _tried(backbone: Backbone, kept: Remake) -> Remake:
    """All of it together, and only where that changes too much one after the other, each on top of what is `kept`."""
    fused, packed = fusable(backbone), packable(backbone, wide=True)
    if not fused and packed == kept.packed and not may_fold(backbone):
        return kept
    pixels, plain = hard_pixels(backbone), replica(backbone)
    if kept.channels_last:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        _channels_last(plain.network)
    try:
        pairs, before = foldable(plain, pixels)
    except Exception:  # too little memory, say; what is the network's own, the run itself meets
        return kept
    most, holds = _try(backbone, Remake(kept.channels_last, pairs, fused, packed), kept, pixels, before)
    if holds:
        return most
    for part in ({"pairs": most.pairs}, {"fused": most.fused}, {"packed": most.packed}):
        wish = replace(kept, **part)
        if wish not in (kept, most):
            real, holds = _try(backbone, wish, kept, pixels, before)
            kept = real if holds else kept
    return kept


def _try(
    backbone: Backbone, wish: Remake, least: Remake, pixels: Tensor, before: Mapping[str, Tensor]
) -> tuple[Remake, bool]:
    """What of `wish` has a part in the maps, beyond `least`, and whether they stay as they were `before`."""
    try:
        trial = replica(backbone)
        wish.apply(trial)
        holds = same(before, maps_of(trial, pixels))
    except Exception:  # it looks into a module that is no longer there; oneDNN refuses; memory is short
        return wish, False
    real = replace(wish, fused=wish.fused and ran(trial), packed=wish.packed if is_used(trial) else least.packed)
    return real, holds


def _channels_last(network: nn.Module) -> None:
    """As `network.to(memory_format=...)`, but with new parameters: the old ones belong to others, too."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim == 4:
                laid_out = parameter.detach().contiguous(memory_format=torch.channels_last)
                module._parameters[name] = nn.Parameter(laid_out, requires_grad=False)
