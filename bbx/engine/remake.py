"""What is done to a network so that it runs faster on a CPU, as far as a trial finds its values unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from bbx.backbone import Backbone
from bbx.engine.fold import Pairs, fold, foldable
from bbx.engine.pack import NARROW, is_used, pack, packable
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
    least = replace(safe(backbone), pairs=foldable(backbone))
    most = replace(least, fused=fusable(backbone), packed=packable(backbone, wide=True))
    if most == least:
        return least
    wishes = dict.fromkeys((most, replace(most, packed=least.packed), replace(most, fused=False)))
    try:
        pixels = hard_pixels(backbone)
        before = maps_of(replica(backbone), pixels)
        return next((wish for wish in wishes if wish != least and _holds(backbone, wish, pixels, before)), least)
    except RuntimeError:  # too little memory, or oneDNN refuses; what is the network's own, the run itself meets
        return least


def _holds(backbone: Backbone, wish: Remake, pixels: Tensor, before: Mapping[str, Tensor]) -> bool:
    """Whether all that is wished for has a part in the maps, and they stay as they were `before`."""
    trial = replica(backbone)
    wish.apply(trial)
    after = maps_of(trial, pixels)
    has_part = (not wish.fused or ran(trial)) and (wish.packed <= NARROW or is_used(trial))
    return has_part and same(before, after)
