"""Fold each batch normalisation into the convolution before it: the same sum, one pass over every map less.

Which pairs there are is seen in a forward, not read off names: a normalisation counts where what it takes is the very
tensor that a convolution gave. What hooks cannot see (a second reader of that tensor) a comparison of all stages does.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from bbx.backbone import Backbone
from bbx.engine.trial import maps_of
from bbx.taps import keep_marks

Pairs = tuple[tuple[str, str], ...]
"""Paths of a convolution and the normalisation after it."""

# By name, for timm need not be there: its subclass of Conv2d pads by itself, and that of BatchNorm2d activates as well.
_CONVOLUTIONS = ("Conv2d", "Conv2dSame")
_AFTERWARDS: dict[str, Callable[[Any], nn.Module]] = {
    "BatchNorm2d": lambda _norm: nn.Identity(),
    "FrozenBatchNorm2d": lambda _norm: nn.Identity(),
    "BatchNormAct2d": lambda norm: nn.Sequential(norm.drop, norm.act),
}
"""What stays of each kind of normalisation once its sum is the convolution's."""


def may_fold(backbone: Backbone) -> bool:
    """Whether there is any batch normalisation at all."""
    return not {type(module).__name__ for module in backbone.network.modules()}.isdisjoint(_AFTERWARDS)


def fold(network: nn.Module, pairs: Pairs) -> None:
    """Folds in place. Parameters are replaced, never written to: a network that shares them keeps its own."""
    for convolution, norm in pairs:
        _apply(network, convolution, norm)


def foldable(backbone: Backbone, pixels: Tensor) -> tuple[Pairs, dict[str, Tensor]]:
    """What may fold, as seen while `backbone` computes `pixels`, and its stages; a tapped convolution stays itself."""
    network = backbone.network
    tapped = {tap.module for tap in backbone.wanted or backbone.taps[-1:]}
    # Weak, for at a large input all maps of a network are gigabytes.
    makers: dict[int, tuple[weakref.ref[Tensor], str]] = {}
    calls: Counter[str] = Counter()
    found: dict[str, str] = {}

    def made(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            calls[path] += 1
            makers[id(output)] = weakref.ref(output), path

        return hook

    def taken(path: str) -> Callable[[nn.Module, Any], None]:
        def hook(_module: nn.Module, inputs: Any) -> None:
            calls[path] += 1
            maker = makers.get(id(inputs[0])) if inputs else None
            # Another tensor may have got the identity of one that is gone.
            if maker and maker[0]() is inputs[0]:
                found[path] = maker[1]

        return hook

    with ExitStack() as hooks:
        for path, module in network.named_modules():
            if type(module).__name__ in _CONVOLUTIONS:
                hooks.callback(module.register_forward_hook(made(path)).remove)
            elif type(module).__name__ in _AFTERWARDS:
                hooks.callback(module.register_forward_pre_hook(taken(path)).remove)
        before = maps_of(backbone, pixels)
    users = Counter(found.values())
    pairs = [(conv, norm) for norm, conv in found.items()
             if calls[conv] == calls[norm] == users[conv] == 1 and conv not in tapped
             and _sums(network.get_submodule(norm), network.get_submodule(conv))]  # fmt: skip
    return tuple(pairs), before


def _sums(norm: Any, convolution: Any) -> bool:
    """Whether the normalisation is a fixed sum that nobody listens to, and both have weights of their own."""
    fixed = not norm.training and isinstance(getattr(norm, "running_var", None), Tensor)
    heard = norm._forward_hooks or norm._forward_pre_hooks
    return fixed and not heard and not any(hasattr(module, "parametrizations") for module in (norm, convolution))


def _apply(network: nn.Module, convolution: str, norm: str) -> None:
    """Makes one pair one."""
    conv, old = network.get_submodule(convolution), network.get_submodule(norm)
    conv._parameters["weight"], conv._parameters["bias"] = map(_frozen, _folded(conv, old))
    parent, _, name = norm.rpartition(".")
    new = _AFTERWARDS[type(old).__name__](old)
    keep_marks(old, new)
    setattr(network.get_submodule(parent), name, new.eval())


def _folded(conv: Any, norm: Any) -> Iterator[Tensor]:
    """Weight and bias of the convolution that does both, summed in float64 as a rounding is all that may change."""
    scale = norm.running_var.double().add(norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = 0.0 if norm.bias is None else norm.bias.double()
    bias = 0.0 if conv.bias is None else conv.bias.double()
    weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
    yield weight.to(conv.weight.dtype)
    yield ((bias - norm.running_mean.double()) * scale + shift).to(conv.weight.dtype)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
