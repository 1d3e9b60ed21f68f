"""Which parameters each stage of a backbone uses: what `freeze` freezes, and `bbx stages` counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from bbx.backbone import Backbone
from bbx.taps import Tap


def parameters_by_stage(backbone: Backbone) -> dict[str, tuple[str, ...]]:
    """The names of the parameters that each stage is the first to use, whether or not it was selected."""
    every = backbone.select("all")
    network = backbone.network
    modules = {name for name, _ in network.named_modules() if name}
    with _evaluating(network):
        used_by = _used(every, [tap for tap in every.measured_taps if tap.module in modules])
        for tap in every.taps:
            if tap.name not in used_by:  # no module's output is its map: what runs for it alone is what it uses
                used_by[tap.name] = _used(backbone.select([tap.name]), ())[""]
    found: dict[str, tuple[str, ...]] = {}
    before: set[str] = set()
    for name in every.stage_names:
        own = used_by[name] - before
        found[name] = tuple(key for key, _ in network.named_parameters() if key in own)
        before |= used_by[name]
    return found


def parameters_until(backbone: Backbone) -> dict[str, int]:
    """How many parameters run until each stage's map is out."""
    size_of = {name: parameter.numel() for name, parameter in backbone.network.named_parameters()}
    total, counts = 0, {}
    for stage, names in parameters_by_stage(backbone).items():
        total += sum(size_of[name] for name in names)
        counts[stage] = total
    return counts


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """A forward in training mode would move the statistics of batch norms; each module's mode is its own afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _used(backbone: Backbone, taps: Sequence[Tap]) -> dict[str, set[str]]:
    """Names of the parameters of all modules that had run when each tap's module was left, and under "" at the end."""
    network = backbone.network
    name_of = {id(parameter): name for name, parameter in network.named_parameters()}
    used: set[str] = set()
    snapshots: dict[str, set[str]] = {}
    by_module: dict[int, list[Tap]] = {}
    for tap in taps:
        by_module.setdefault(id(network.get_submodule(tap.module)), []).append(tap)

    # A module whose children are run without it (timm's networks by `forward_intermediates`) is used with them.
    around: dict[int, list[nn.Module]] = {}
    for name, module in network.named_modules():
        parts = name.split(".") if name else []
        around[id(module)] = [network.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]

    def entered(module: nn.Module, _inputs: Any) -> None:
        for one in around[id(module)]:
            used.update(name_of[id(parameter)] for parameter in one.parameters(recurse=False))

    def left(module: nn.Module, _inputs: Any, _output: Any) -> None:
        # Some parents use a child's weights without calling it (attention), so a finished module counts whole.
        used.update(name_of[id(parameter)] for parameter in module.parameters() if id(parameter) in name_of)
        for tap in by_module.get(id(module), ()):
            snapshots[tap.name] = set(used)

    with ExitStack() as hooks, torch.inference_mode():
        for module in network.modules():
            hooks.callback(module.register_forward_pre_hook(entered).remove)
            hooks.callback(module.register_forward_hook(left).remove)
        backbone(backbone.blank(backbone.preprocess.size))
    return {**snapshots, "": used}
