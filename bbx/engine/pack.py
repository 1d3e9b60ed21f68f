"""Have linear layers computed by oneDNN, from packed weights, where torch's own choice, MKL, is slower.

torch asks MKL for every float32 product on x86; oneDNN is built in beside it, and is what `torch.compile` takes. On a
Zen 3 core (25088, 96) @ (96, 288) runs at 50 GFLOP/s by MKL and at 74 by oneDNN, (6272, 192) @ (192, 576) at 70 and 74;
from 384 inputs on MKL is as good or better. On Zen 4, where oneDNN alone takes AVX-512, it is a tenth faster at all
sizes: the forward of swin-tiny to stage2 by 9 %, of ViT-B/16 by 8, of DINOv2 by 10, of ConvNeXt-Tiny by 16. Up to 192
inputs both gave the same bits; beyond, maps differ by at most 1.3e-6 of their largest value, and a trial decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbx.backbone import Backbone
from bbx.engine.fold import Pairs, fold
from bbx.engine.replica import replica
from bbx.engine.trial import hard_pixels, maps_of, same

NARROW, ANY = 192, 1 << 62
"""Layers of up to so many inputs are packed: those whose bits stay the same, or all."""
_MOST_NBYTES = 1 << 30
"""Of packed weights, which come beside the others: where all were more, only narrow ones are packed."""
_OPS: Any = torch.ops.mkldnn
_LINEAR = F.linear  # as it is now: some libraries (TorchLens) put wrappers of their own in its place


class PackedWeight(Tensor):
    """A linear layer's weight `(n, k)` that brings its packed form into `F.linear`, whoever calls that.

    It is packed when it is first used: of layers past the deepest stage asked for, none is.
    """

    packed: Tensor | None

    @classmethod
    def of(cls, weight: Tensor) -> PackedWeight:
        """Of a float32 weight; it shares the memory."""
        made = weight.detach().as_subclass(cls)
        made.packed = None
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Anything but `F.linear` of float32 sees plain tensors."""
        with torch._C.DisableTorchFunctionSubclass():
            if func is not _LINEAR or kwargs or not isinstance(args[1], cls) or not _is_plain(args[0]):
                return func(*args, **kwargs or {})
            given, weight, *bias = args
            if weight.packed is None:  # two streams may come to it at once, and make the same
                weight.packed = _OPS._reorder_linear_weight(weight)
            return _OPS._linear_pointwise(given, weight.packed, bias[0] if bias else None, "none", [], "")


def pack(backbone: Backbone, most_inputs: int) -> None:
    """Replaces the weights of linear layers of up to `most_inputs` in `backbone.network`; the old ones stay."""
    for layer in _layers(backbone, most_inputs):
        layer._parameters["weight"] = PackedWeight.of(layer.weight)  # type: ignore[assignment]


def packable(backbone: Backbone, pairs: Pairs, *, wide: bool) -> int:
    """Up to how many inputs packing pays here and keeps the values, 0 where there is nothing to pack.

    `pairs` are folded, too. `wide`: the job is long enough for a trial, which wide layers need.
    """
    most = faster_up_to()
    layers = _layers(backbone, most)
    if most > NARROW and len(layers) > len(_layers(backbone, NARROW)):
        fits = sum(layer.weight.nbytes for layer in layers) <= _MOST_NBYTES
        if not (wide and fits and _stays(backbone, pairs, most)):
            most = NARROW
    return most if _layers(backbone, most) else 0


def _stays(backbone: Backbone, pairs: Pairs, most_inputs: int) -> bool:
    """Whether any layer that runs is packed, and the maps stay as they are with all that is folded besides.

    Tried once, on a replica; not so where it cannot be tried, for want of memory or because oneDNN refuses.
    """
    known: dict[Pairs, bool] = backbone.__dict__.setdefault("_packs", {})
    if pairs not in known:
        trial = replica(backbone)
        pixels = hard_pixels(trial)
        try:
            before = maps_of(trial, pixels)
            fold(trial.network, pairs)
            pack(trial, most_inputs)
            after = maps_of(trial, pixels)
            weights = [one for one in trial.network.parameters() if isinstance(one, PackedWeight)]
            known[pairs] = any(one.packed is not None for one in weights) and same(before, after)
        except RuntimeError:  # what is the network's own, the run itself meets
            known[pairs] = False
    return known[pairs]


def _layers(backbone: Backbone, most_inputs: int) -> list[nn.Linear]:
    return [
        module
        for module in backbone.network.modules()
        if type(module) is nn.Linear and module.in_features <= most_inputs and _is_plain(module.weight)
    ]


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


@cache
def faster_up_to() -> int:
    """Up to how many inputs oneDNN's product is the faster one, as far as measured: on AMD's processors."""
    backends: Any = torch.backends
    cpuinfo = Path("/proc/cpuinfo")
    if not (backends.mkl.is_available() and backends.mkldnn.is_available() and hasattr(_OPS, "_linear_pointwise")):
        return 0
    words = cpuinfo.read_text() if cpuinfo.exists() else ""
    return 0 if "AuthenticAMD" not in words else ANY if "avx512f" in words.split() else NARROW
