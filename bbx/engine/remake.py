"""What is done to a network so that it runs faster on a CPU, as far as a trial finds its values unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from bbx.backbone import Backbone
from bbx.engine.fold import Pairs, fold, foldable, may_fold
from bbx.engine.pack import is_used, pack, packable
from bbx.engine.replica import replica
from bbx.engine.swin import fusable, fuse, ran
from bbx.engine.trial import hard_pixels, maps_of, same


@dataclass(frozen=True, slots=True)
class Remake:
    """Pairs of convolution and batch norm to fold, whether blocks are fused, and up to how many inputs are packed."""

    pairs: Pairs = ()
    fused: bool = False
    packed: int = 0

    def apply(self, backbone: Backbone) -> None:
        """In place; parameters are replaced, never written to."""
        fold(backbone.network, self.pairs)
        if self.fused:
            fuse(backbone)
        if self.packed:
            pack(backbone, self.packed)


def safe(backbone: Backbone) -> Remake:
    """What needs no trial, for it changes no bit."""
    return Remake(packed=packable(backbone, wide=False))


def remake(backbone: Backbone) -> Remake:
    """All that pays here and keeps every map to `trial.TOLERANCE`; tried once, on replicas."""
    known = backbone.__dict__
    if "_remake" not in known:
        known["_remake"] = _tried(backbone)
    found: Remake = known["_remake"]
    return found


def _tried(backbone: Backbone) -> Remake:
    """All of it together, and only where that changes too much one after the other, each on top of what holds."""
    kept = safe(backbone)
    fused, packed = fusable(backbone), packable(backbone, wide=True)
    if not fused and packed == kept.packed and not may_fold(backbone):
        return kept
    pixels = hard_pixels(backbone)
    try:
        pairs, before = foldable(replica(backbone), pixels)
    except RuntimeError:  # too little memory, say; what is the network's own, the run itself meets
        return kept
    least, most, holds = kept, *_try(backbone, Remake(pairs, fused, packed), kept, pixels, before)
    if holds:
        return most
    for part in ({"pairs": most.pairs}, {"fused": most.fused}, {"packed": most.packed}):
        wish = replace(kept, **part)
        if wish not in (kept, most) and _try(backbone, wish, least, pixels, before)[1]:
            kept = wish
    return kept


def _try(
    backbone: Backbone, wish: Remake, least: Remake, pixels: Tensor, before: Mapping[str, Tensor]
) -> tuple[Remake, bool]:
    """What of `wish` has a part in the maps, and whether they stay as they were `before`."""
    trial = replica(backbone)
    try:
        wish.apply(trial)
        after = maps_of(trial, pixels)
    # The network looks into a module that is no longer there; oneDNN refuses; memory is short.
    except (AttributeError, RuntimeError, TypeError):
        return wish, False
    real = replace(wish, fused=wish.fused and ran(trial), packed=wish.packed if is_used(trial) else least.packed)
    return real, same(before, after)
