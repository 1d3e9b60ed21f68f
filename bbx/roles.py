"""The roles of an assembled network, `backbone.*`, `neck.*`, `head.*`: where each map leaves it and what it is called.

A provider states `Outlet`s, plain data. Maps of a pyramid are named by the stride that a dry forward measures, never by
their position: some necks give the coarse map first, some the fine one. Reading stops after the last map asked for, so
that a backbone's stages never run the neck, and the neck's maps never the head.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bbx.errors import ContractError
from bbx.taps import Layout, Tap

Form = Literal["nchw", "nhwc", "tokens", "windows", "plane", "as is"]
_LAYOUTS: dict[Form, Layout] = {
    "nchw": "nchw", "nhwc": "nhwc", "tokens": "tokens", "windows": "nhwc", "plane": "nchw", "as is": "as is",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outlet:
    """A tensor's way out: of what `module` gives at its `call`-th call, the part that `pick` walks to.

    `pick` holds attribute names and positions; what is still a tuple at its end gives its first tensor. A `name` that
    ends in `.p*` stands for every map in that part, one outlet each once `settled`; `call` 0 then means every call.
    `form`: a tap's layouts; `windows`, tokens `(b·side², prefix + t, c)` of a map cut into `side` × `side` windows;
    `plane`, `(b, h, w)` where it has one channel.
    The first `prefix` tokens are no part of the map. `optional`: left out where `module` is not
    in the network.
    """

    name: str
    module: str
    pick: tuple[str | int, ...] = ()
    form: Form = "nchw"
    prefix: int = 0
    call: int = 1
    side: int = 1
    optional: bool = False

    @property
    def tap(self) -> Tap:
        """What a `Backbone` lists."""
        return Tap(self.name, self.module, _LAYOUTS[self.form], self.prefix if self.form == "tokens" else 0)


@dataclass(frozen=True, slots=True)
class Reader:
    """A `Backbone.forward`: the network's outlets by name, read with early exit."""

    network: nn.Module
    outlets: tuple[Outlet, ...]

    def __call__(self, pixels: Tensor, taps: Sequence[Tap]) -> dict[str, Tensor]:
        by_name = {outlet.name: outlet for outlet in self.outlets}
        wanted = [
            Outlet(tap.name, tap.module, form="as is", call=tap.calls) if tap.free else by_name[tap.name]
            for tap in taps
        ]
        caught = read(self.network, wanted, pixels)
        free = {tap.name for tap in taps if tap.free}  # an operation in place may write over any module's output
        return {name: tensor.clone() if name in free else tensor for name, tensor in caught.items()}


class _Stop(Exception):
    """Raised by the last hook, so that nothing after it runs; never leaves this module."""


def read(network: nn.Module, outlets: Sequence[Outlet], pixels: Tensor) -> dict[str, Tensor]:
    """Each outlet's tensor for `pixels` `(b, 3, h, w)`, in firing order; nothing past the last of them runs."""
    caught: dict[str, Tensor] = {}

    def keep(module: str, call: int, output: Any) -> None:
        for outlet in outlets:
            if (outlet.module, outlet.call) == (module, call):
                caught[outlet.name] = _formed(_first(_picked(output, outlet.pick)), outlet, pixels)
        if len(caught) == len(outlets):
            raise _Stop

    _watch(network, {outlet.module for outlet in outlets}, keep, pixels)
    return caught


def settled(network: nn.Module, outlets: Iterable[Outlet], sizes: Sequence[tuple[int, int]]) -> tuple[Outlet, ...]:
    """The outlets that `network` has, each `p*` as one per map, fine to coarse, named by its stride's power of two.

    `sizes`: one or two inputs (h, w) to measure at. Of maps with equal strides, the later ones are `p5_2`, `p5_3`.
    Raises `ContractError` where a `p*` finds no map.
    """
    there = {name for name, _ in network.named_modules()}
    kept = [outlet for outlet in outlets if outlet.module in there or not outlet.optional]
    stars = [outlet for outlet in kept if outlet.name.endswith(".p*")]
    like = next(network.parameters())
    rows: list[dict[Outlet, int]] = []
    for size in sizes if stars else ():
        with torch.inference_mode():
            rows.append(_rows(network, stars, torch.zeros((1, 3, *size), device=like.device, dtype=like.dtype)))
    named: dict[str, Outlet] = {}
    for outlet in kept:
        if outlet not in stars:
            named[outlet.name] = outlet
            continue
        found = {one: _stride([row[one] for row in rows], sizes) for one in rows[0] if one.name == outlet.name}
        if not found:
            raise ContractError(f"{outlet.name}: module {outlet.module} gives no map")
        named.update((one.name, one) for one in _by_stride(outlet.name.removesuffix("*"), found))
    return tuple(named.values())


def taps(outlets: Iterable[Outlet]) -> tuple[Tap, ...]:
    """What a `Backbone` lists, in the same order."""
    return tuple(outlet.tap for outlet in outlets)


def _watch(network: nn.Module, modules: Iterable[str], seen: Callable[[str, int, Any], None], pixels: Tensor) -> None:
    """Calls `seen(module, call, output)` at each call of `modules` in one forward, until it raises `_Stop`."""
    calls: Counter[str] = Counter()

    def hook(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def fired(_module: nn.Module, _inputs: Any, output: Any) -> None:
            calls[path] += 1
            seen(path, calls[path], output)

        return fired

    with ExitStack() as hooks:
        for path in modules:
            hooks.callback(network.get_submodule(path).register_forward_hook(hook(path)).remove)
        try:
            network(pixels)
        except _Stop:
            return


def _rows(network: nn.Module, stars: Sequence[Outlet], pixels: Tensor) -> dict[Outlet, int]:
    """Every map of the `p*` outlets, and how many rows it has."""
    rows: dict[Outlet, int] = {}
    left = {outlet for outlet in stars if outlet.call}

    def count(module: str, call: int, output: Any) -> None:
        for outlet in stars:
            if outlet.module == module and outlet.call in (0, call):
                for pick, tensor in _maps(_picked(output, outlet.pick), outlet.pick):
                    rows[replace(outlet, pick=pick, call=call)] = tensor.shape[-2]
                left.discard(outlet)
        if not left and all(outlet.call for outlet in stars):
            raise _Stop

    _watch(network, {outlet.module for outlet in stars}, count, pixels)
    return rows


def _by_stride(prefix: str, strides: dict[Outlet, float]) -> Iterator[Outlet]:
    seen: Counter[str] = Counter()
    for outlet, stride in sorted(strides.items(), key=lambda pair: pair[1]):
        name = f"{prefix}{round(math.log2(stride))}"
        seen[name] += 1
        yield replace(outlet, name=f"{name}_{seen[name]}" if seen[name] > 1 else name)


def _stride(rows: Sequence[int], sizes: Sequence[tuple[int, int]]) -> float:
    """Input pixels per row: from the rows gained as the input grows, so that rounding at the border cancels out."""
    gained = rows[-1] - rows[0]
    return (sizes[-1][0] - sizes[0][0]) / gained if gained else sizes[0][0] / rows[0]


def _picked(output: Any, pick: Sequence[str | int]) -> Any:
    for step in pick:
        output = output[step] if isinstance(step, int) or isinstance(output, dict) else getattr(output, step)
    return output


def _first(part: Any) -> Tensor:
    while not isinstance(part, Tensor):
        part = next(iter(part.values())) if isinstance(part, dict) else part[0]
    return part


def _maps(part: Any, pick: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Tensor]]:
    """Every map `(b, c, h, w)` in nested tuples, lists and dicts, with the way to it."""
    if isinstance(part, Tensor):
        if part.ndim == 4:
            yield pick, part
    elif isinstance(part, dict):
        for key, value in part.items():
            yield from _maps(value, (*pick, key))
    elif isinstance(part, (tuple, list)):
        for place, value in enumerate(part):
            yield from _maps(value, (*pick, place))


def _formed(tensor: Tensor, outlet: Outlet, pixels: Tensor) -> Tensor:
    """In one of a tap's layouts."""
    if outlet.form == "plane" and tensor.ndim == 3:
        return tensor.unsqueeze(1)
    if outlet.form == "windows":
        batch, side = len(pixels), outlet.side
        tokens = tensor[:, outlet.prefix :]
        height, width = pixels.shape[-2:]
        rows = round((tokens.shape[1] * height / width) ** 0.5)
        tiles = tokens.reshape(batch, side, side, rows, -1, tokens.shape[-1])
        return tiles.transpose(2, 3).reshape(batch, side * rows, -1, tokens.shape[-1])
    return tensor
