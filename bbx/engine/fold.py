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

import torch
from torch import Tensor, nn

from bbx.backbone import Backbone, is_out_of_memory
from bbx.engine.replica import replica
from bbx.taps import keep_marks

TOLERANCE = 5e-6
"""Of a map's largest value: what folding may change. Measured: 3e-7 to 4.1e-6; between flat pictures it differs by a
factor of 1.8, and all together stays below 1e-5."""
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


def foldable(backbone: Backbone) -> Pairs:
    """What folds in `backbone`; empty where nothing does, or its values would change. Tried once, on a replica."""
    known = backbone.__dict__
    if "_foldable" not in known:
        known["_foldable"] = _tried(backbone)
    pairs: Pairs = known["_foldable"]
    return pairs


def fold(network: nn.Module, pairs: Pairs) -> None:
    """Folds in place. Parameters are replaced, never written to: a network that shares them keeps its own."""
    for convolution, norm in pairs:
        _apply(network, convolution, norm)


def _tried(backbone: Backbone) -> Pairs:
    kinds = {type(module).__name__ for module in backbone.network.modules()}
    if not kinds & set(_AFTERWARDS):
        return ()
    trial = replica(backbone)
    pixels = _hard(trial)
    try:
        pairs, before = _pairs(trial, pixels)
    except RuntimeError as error:
        if is_out_of_memory(error):
            return ()
        raise
    if not pairs:
        return ()
    fold(trial.network, pairs)
    try:
        with torch.inference_mode():
            after = trial(pixels)
        same = all(_difference(before[name], after[name]) <= TOLERANCE for name in before)
    except (AttributeError, RuntimeError, TypeError):  # the network looks into the module that is no longer there
        same = False
    return pairs if same else ()


def _hard(backbone: Backbone) -> Tensor:
    """Noise, and a dark and a white picture of next to no contrast, the same each time, `(3, 3, h, w)`.

    Where a picture is flat, trained weights take away nearly all of it again: what is left rounds ten times as much.
    """
    like, preprocess = next(backbone.network.parameters()), backbone.preprocess
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((3, *preprocess.size), generator=generator)
    step = torch.randint(0, 2, noise.shape, generator=generator) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    flat = [(picture - mean) / std for picture in (0.02 + step, 1 - step)]
    return torch.stack([noise, *flat]).to(like.device)


def _pairs(backbone: Backbone, pixels: Tensor) -> tuple[Pairs, dict[str, Tensor]]:
    """What may fold, and the stages as they are; a tapped convolution must stay itself."""
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
    return tuple(pairs), {name: tensor.clone() for name, tensor in before.items()}


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


def _difference(before: Tensor, after: Tensor) -> float:
    """The largest of any image, relative to that image's largest value."""
    largest = before.abs().flatten(1).amax(1).clamp_min(torch.finfo(before.dtype).tiny)
    return float(((before - after).abs().flatten(1).amax(1) / largest).max())
