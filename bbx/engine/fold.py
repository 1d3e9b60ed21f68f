"""Fold each batch normalisation into the convolution before it: the same sum, one pass over every map less.

Which pairs there are is seen in a forward, not read off names: a normalisation counts where what it takes is the very
tensor that a convolution gave. What hooks cannot see (a second reader of that tensor) a comparison of all stages does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from bbx.backbone import Backbone
from bbx.taps import keep_marks

TOLERANCE = 1e-5
"""Of a stage's largest value: what folding may change. It is measured at a few 1e-7."""

# By name, for timm need not be there: its subclass of Conv2d pads by itself, and that of BatchNorm2d activates as well.
_CONVOLUTIONS = ("Conv2d", "Conv2dSame")
_AFTERWARDS: dict[str, Callable[[Any], nn.Module]] = {
    "BatchNorm2d": lambda _norm: nn.Identity(),
    "FrozenBatchNorm2d": lambda _norm: nn.Identity(),
    "BatchNormAct2d": lambda norm: nn.Sequential(norm.drop, norm.act),
}
"""What stays of each kind of normalisation once its sum is the convolution's."""


def fold(backbone: Backbone) -> bool:
    """Folds what can be folded in `backbone.network`, in place; False where nothing was, or it would change values.

    Parameters are replaced, never written to: a network that shares them keeps its own.
    """
    network = backbone.network
    pixels = _noise(backbone)
    pairs, before = _pairs(backbone, pixels)
    if not pairs:
        return False
    undo = [_apply(network, convolution, norm) for convolution, norm in pairs]
    try:
        with torch.inference_mode():
            after = backbone(pixels)
        same = all(_difference(before[name], after[name]) <= TOLERANCE for name in before)
    except (AttributeError, RuntimeError, TypeError):  # the network looks into the module that is no longer there
        same = False
    if not same:
        for restore in reversed(undo):
            restore()
    return same


def _noise(backbone: Backbone) -> Tensor:
    """One image of noise, the same each time, `(1, 3, h, w)`."""
    like = next(backbone.network.parameters())
    generator = torch.Generator().manual_seed(0)
    return torch.randn((1, 3, *backbone.preprocess.size), generator=generator).to(like.device)


def _pairs(backbone: Backbone, pixels: Tensor) -> tuple[list[tuple[str, str]], dict[str, Tensor]]:
    """Paths of convolution and normalisation, and the stages as they are; a tapped convolution must stay itself."""
    network = backbone.network
    tapped = {tap.module for tap in backbone.wanted or backbone.taps[-1:]}
    makers: dict[int, str] = {}
    alive: list[Tensor] = []  # so that no other tensor gets the identity of one that was freed
    calls: Counter[str] = Counter()
    found: dict[str, str] = {}

    def made(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            calls[path] += 1
            alive.append(output)
            makers[id(output)] = path

        return hook

    def taken(path: str) -> Callable[[nn.Module, Any], None]:
        def hook(_module: nn.Module, inputs: Any) -> None:
            calls[path] += 1
            if inputs and id(inputs[0]) in makers:
                found[path] = makers[id(inputs[0])]

        return hook

    with ExitStack() as hooks, torch.inference_mode():
        for path, module in network.named_modules():
            if type(module).__name__ in _CONVOLUTIONS:
                hooks.callback(module.register_forward_hook(made(path)).remove)
            elif type(module).__name__ in _AFTERWARDS:
                hooks.callback(module.register_forward_pre_hook(taken(path)).remove)
        before = backbone(pixels)
    users = Counter(found.values())
    pairs = [(conv, norm) for norm, conv in found.items()
             if calls[conv] == calls[norm] == users[conv] == 1 and conv not in tapped
             and _sums(network.get_submodule(norm), network.get_submodule(conv))]  # fmt: skip
    return pairs, {name: tensor.clone() for name, tensor in before.items()}


def _sums(norm: Any, convolution: Any) -> bool:
    """Whether the normalisation is a fixed sum that nobody listens to, and both have weights of their own."""
    fixed = not norm.training and isinstance(getattr(norm, "running_var", None), Tensor)
    heard = norm._forward_hooks or norm._forward_pre_hooks
    return fixed and not heard and not any(hasattr(module, "parametrizations") for module in (norm, convolution))


def _apply(network: nn.Module, convolution: str, norm: str) -> Callable[[], None]:
    """Makes one pair one; the returned call makes it two again."""
    conv, old = network.get_submodule(convolution), network.get_submodule(norm)
    weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    conv._parameters["weight"], conv._parameters["bias"] = map(_frozen, _folded(conv, old))
    parent, _, name = norm.rpartition(".")
    holder = network.get_submodule(parent)
    new = _AFTERWARDS[type(old).__name__](old)
    keep_marks(old, new)
    setattr(holder, name, new.eval())

    def restore() -> None:
        conv._parameters["weight"], conv._parameters["bias"] = weight, bias
        setattr(holder, name, old)

    return restore


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


def _difference(before: Tensor, after: Tensor) -> float:
    largest = before.abs().max().clamp_min(torch.finfo(before.dtype).tiny)
    return float((before - after).abs().max() / largest)
