"""Have linear layers and 1×1 convolutions computed by oneDNN, where torch's own choice, MKL, is slower.

torch asks MKL for every float32 product on x86; oneDNN is built in beside it, and is what `torch.compile` takes. On a
Zen 3 core (25088, 96) @ (96, 288) runs at 50 GFLOP/s by MKL and at 74 by oneDNN, (6272, 192) @ (192, 576) at 70 and 74;
from 384 inputs on MKL is as good or better. On Zen 4, where oneDNN alone takes AVX-512, it is a tenth faster at all
sizes: the forward of swin-tiny to stage2 by 9 %, of ViT-B/16 by 8, of DINOv2 by 10, of ConvNeXt-Tiny by 16. A 1×1
convolution torch gives to MKL on one thread only: ResNet-50 gains 7 % there, EfficientNets and MobileNets 8. Up to 192
inputs both gave the same bits; beyond, maps differ by at most 3e-6 of their largest value, and a trial decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbx.backbone import Backbone

NARROW, ANY = 192, 1 << 62
"""Layers of up to so many inputs are packed: those whose bits stay the same, or all."""
_MOST_NBYTES = 1 << 30
"""Of packed weights, which come beside the others: where all were more, only narrow ones are packed."""
_OPS: Any = torch.ops.mkldnn
# As they are now: some libraries (TorchLens) put wrappers of their own in their place.
_LINEAR, _CONV = F.linear, F.conv2d
_MKLDNN_CONV: Any = torch.mkldnn_convolution
_POINTWISE = ((1, 1), (0, 0), (1, 1), 1)  # stride, padding, dilation and groups, as `nn.Conv2d` passes them on


class FastWeight(Tensor):
    """A float32 weight that has oneDNN compute what its layer is for; to anything else it is a plain tensor."""

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """Of a layer's weight; it shares the memory."""
        return weight.detach().as_subclass(cls)

    def __deepcopy__(self, _memo: object) -> Self:
        """Weights are shared, and never written to."""
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Whatever `func`, torch sees no subclass."""
        with torch._C.DisableTorchFunctionSubclass():
            if kwargs or func not in (_LINEAR, _CONV) or not isinstance(args[1], cls) or not args[1].takes(func, args):
                return func(*args, **kwargs or {})
            return args[1].computed(args[0], args[2] if len(args) > 2 else None)

    def takes(self, func: Callable[..., Any], args: Sequence[Any]) -> bool:
        """Whether the call `func(input, self, …)` is one for oneDNN."""
        raise NotImplementedError

    def computed(self, given: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer makes of `given`."""
        raise NotImplementedError


class PackedWeight(FastWeight):
    """A linear layer's weight `(n, k)` that brings its packed form into `F.linear`, whoever calls that.

    It is packed when it is first used: of layers past the deepest stage asked for, none is.
    """

    packed: Tensor | None = None

    def takes(self, func: Callable[..., Any], args: Sequence[Any]) -> bool:
        """`F.linear` of float32."""
        return func is _LINEAR and _is_plain(args[0])

    def computed(self, given: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
        """`(…, k)` → `(…, n)`; with `gelu`, what comes of it afterwards, while it is in the cache."""
        with torch._C.DisableTorchFunctionSubclass():
            if self.packed is None:  # two streams may come to it at once, and make the same
                self.packed = _OPS._reorder_linear_weight(self)
            then, which = ("gelu", "none") if gelu else ("none", "")
            made: Tensor = _OPS._linear_pointwise(given, self.packed, bias, then, [], which)
            return made


class PointwiseWeight(FastWeight):
    """A 1×1 convolution's weight `(n, k, 1, 1)` that has `F.conv2d` computed by oneDNN wherever maps are channels last.

    With less than 16 images on one thread torch takes a loop of MKL's products for these alone.
    """

    ran: bool = False

    def takes(self, func: Callable[..., Any], args: Sequence[Any]) -> bool:
        """`F.conv2d` of float32, channels last, as a module calls it."""
        return func is _CONV and args[3:] == _POINTWISE and _is_last(args[0])

    def computed(self, given: Tensor, bias: Tensor | None) -> Tensor:
        """`(b, k, h, w)` → `(b, n, h, w)`."""
        self.ran = True
        made: Tensor = _MKLDNN_CONV(given, self, bias, padding=(0, 0), stride=(1, 1), dilation=(1, 1), groups=1)
        return made


def gelu_of(layer: nn.Linear, given: Tensor) -> Tensor:
    """`F.gelu(layer(given))`, in one pass where the layer is packed: the same bits (x86), a twentieth faster."""
    weight = layer._parameters["weight"]
    if isinstance(weight, PackedWeight) and _is_plain(given):
        return weight.computed(given, layer.bias, gelu=True)
    return F.gelu(layer(given))


def pack(backbone: Backbone, most_inputs: int) -> None:
    """Replaces weights of layers of up to `most_inputs` in `backbone.network`; the old ones stay as they are."""
    for layer in _layers(backbone, most_inputs):
        kind = PackedWeight if isinstance(layer, nn.Linear) else PointwiseWeight
        layer._parameters["weight"] = kind.of(layer.weight)  # type: ignore[assignment]


def packable(backbone: Backbone, *, wide: bool) -> int:
    """Up to how many inputs packing pays here, 0 where there is nothing to pack; `wide` layers change the last bits."""
    most = faster_up_to()
    layers, narrow = _layers(backbone, most), _layers(backbone, NARROW)
    fit = sum(layer.weight.nbytes for layer in layers if isinstance(layer, nn.Linear)) <= _MOST_NBYTES
    if wide and fit and len(layers) > len(narrow) and most > NARROW:
        return most
    return min(most, NARROW) if narrow else 0


def is_used(backbone: Backbone) -> bool:
    """Whether any packed layer has run that may change last bits: a wide one, or a convolution."""
    weights = list(backbone.network.parameters())
    wide = any(isinstance(one, PackedWeight) and one.packed is not None and one.shape[1] > NARROW for one in weights)
    return wide or any(isinstance(one, PointwiseWeight) and one.ran for one in weights)


def _layers(backbone: Backbone, most_inputs: int) -> list[nn.Linear | nn.Conv2d]:
    """Linear ones; and, where all are packed, convolutions of one cell."""
    return [
        module
        for module in backbone.network.modules()
        if (_is_linear(module, most_inputs) or (most_inputs > NARROW and _is_pointwise(module)))
        and _is_plain(module.weight)
    ]


def _is_linear(module: nn.Module, most_inputs: int) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear and module.in_features <= most_inputs


def _is_pointwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    if type(module) is not nn.Conv2d:
        return False
    rest = (module.stride, module.padding, module.dilation, module.groups)
    return (module.kernel_size, module.padding_mode, rest) == ((1, 1), "zeros", _POINTWISE)


def _is_last(tensor: Tensor) -> bool:
    return (
        tensor.ndim == 4
        and len(tensor) > 0
        and _is_plain(tensor)
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )


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
