"""Have narrow linear layers computed by oneDNN, from packed weights, where torch's own choice, MKL, is slow.

torch asks MKL for every float32 product on x86; oneDNN is built in beside it, and is what `torch.compile` takes. On a
Zen 3 core (25088, 96) @ (96, 288) runs at 50 GFLOP/s by MKL and at 74 by oneDNN, (6272, 192) @ (192, 576) at 70 and 74;
from 384 inputs on MKL is as good or better. Up to 192 inputs both gave the same bits.
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

MOST_INPUTS = 192
_OPS: Any = torch.ops.mkldnn


class PackedWeight(Tensor):
    """A linear layer's weight `(n, k)` that brings its packed form into `F.linear`, whoever calls that."""

    packed: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> PackedWeight:
        """Of a float32 weight; it shares the memory."""
        made = weight.detach().as_subclass(cls)
        made.packed = _OPS._reorder_linear_weight(weight.detach())
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Anything but `F.linear` of float32 sees plain tensors."""
        with torch._C.DisableTorchFunctionSubclass():
            if func is not F.linear or kwargs or not isinstance(args[1], cls) or not _is_plain(args[0]):
                return func(*args, **kwargs or {})
            given, weight, *bias = args
            return _OPS._linear_pointwise(given, weight.packed, bias[0] if bias else None, "none", [], "")


def pack(backbone: Backbone) -> int:
    """Replaces the weights of narrow linear layers in `backbone.network`; how many. The old ones stay as they are."""
    layers = _narrow(backbone)
    for layer in layers:
        layer._parameters["weight"] = PackedWeight.of(layer.weight)  # type: ignore[assignment]
    return len(layers)


def packs(backbone: Backbone) -> bool:
    """Whether there is anything to pack."""
    return bool(_narrow(backbone))


def _narrow(backbone: Backbone) -> list[nn.Linear]:
    return [
        module
        for module in backbone.network.modules()
        if type(module) is nn.Linear and module.in_features <= MOST_INPUTS and _is_plain(module.weight)
    ]


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


@cache
def packing_pays() -> bool:
    """Whether this is a machine on which oneDNN's product is the faster one, as far as measured: an AMD processor."""
    backends: Any = torch.backends
    cpuinfo = Path("/proc/cpuinfo")
    return (
        backends.mkl.is_available() and backends.mkldnn.is_available() and hasattr(_OPS, "_linear_pointwise")
        and cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
    )  # fmt: skip
