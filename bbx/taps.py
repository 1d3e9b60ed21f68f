"""Where stages leave a network: hooks with early exit, layouts, and modules asked for by path."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from threading import Lock, RLock
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bbx.errors import UsageError, nearest
from bbx.stages import storable_name

Layout = Literal["nchw", "nhwc", "tokens", "as is"]


@dataclass(frozen=True, slots=True)
class Tap:
    """Where a stage leaves the network: the output of `module`, in `layout`, at its `calls`-th call.

    `tokens` are `(b, prefix + h·w, c)`, of which the first `prefix` (class token, registers) are no part of the map.
    A `free` tap was asked for by path, not by stage name: its layout is found by measuring.
    """

    name: str
    module: str
    layout: Layout = "nchw"
    prefix: int = 0
    calls: int = 1
    free: bool = False


_NEVER = "it never runs in a forward"
_OVERWRITTEN = "_bbx_overwritten"


class _Stop(Exception):
    """Raised by the last hook, so that nothing after it runs; never leaves `capture`."""


def capture(
    network: nn.Module,
    taps: Sequence[Tap],
    pixels: Tensor,
    *,
    run: Callable[[Tensor], object] | None = None,
    stop: bool = True,
) -> dict[str, Tensor]:
    """Each tap's raw output for `pixels` `(b, 3, h, w)`, in firing order; nothing past the last of them runs.

    `run` is what to call where it is not the network itself; without `stop` it runs to its own end. An output that a
    later layer writes over in place is copied: that is seen outside inference mode, where tensors count their changes,
    hence in the dry forward of every backbone, and marked on the module, so that it stays known.
    """
    caught, overwritten = _caught(network, taps, pixels, run or network, stop=stop)
    if not overwritten:
        return caught
    for tap in overwritten:
        setattr(network.get_submodule(tap.module), _OVERWRITTEN, True)
    return _caught(network, taps, pixels, run or network, stop=stop)[0]


def keep_marks(old: nn.Module, new: nn.Module) -> None:
    """Has `new`, which takes the place of `old` in a network, be known as written over where `old` was."""
    if _is_copied(old):
        setattr(new, _OVERWRITTEN, True)


def _is_copied(module: nn.Module, *, free: bool = False) -> bool:
    return free or getattr(module, _OVERWRITTEN, False)


def _caught(
    network: nn.Module, taps: Sequence[Tap], pixels: Tensor, run: Callable[[Tensor], object], *, stop: bool
) -> tuple[dict[str, Tensor], list[Tap]]:
    """What the taps gave, and those of them whose output was changed since."""
    caught: dict[str, Tensor] = {}
    changes: dict[str, int] = {}
    calls: Counter[str] = Counter()

    def hook(tap: Tap) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, _inputs: Any, output: Any) -> None:
            calls[tap.name] += 1
            if calls[tap.name] == tap.calls:
                tensor = output if isinstance(output, Tensor) else output[0]
                caught[tap.name] = tensor = tensor.clone() if _is_copied(module, free=tap.free) else tensor
                if not (torch.compiler.is_compiling() or tensor.is_inference()):
                    changes[tap.name] = tensor._version
                if stop and len(caught) == len(taps):
                    raise _Stop

        return keep

    with ExitStack() as hooks:
        for tap in taps:
            hooks.callback(network.get_submodule(tap.module).register_forward_hook(hook(tap)).remove)
        with suppress(_Stop):
            run(pixels)
    return caught, [tap for tap in taps if tap.name in changes and caught[tap.name]._version != changes[tap.name]]


_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_ADDING = Lock()


def exclusive(network: nn.Module) -> AbstractContextManager[Any]:
    """Held while `network` runs under hooks, or cut short: two threads in one network would hear each other.

    A graph that `torch.compile` traces contains no lock; compiled code is for one thread at a time.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    with _ADDING:
        return _LOCKS.setdefault(network, RLock())


class LastingTaps:
    """The hooks of `capture` installed once and for good, so that `torch.compile` traces through them.

    Modules carry them when they are copied or saved, so they are objects and not closures. Asleep outside a call.
    """

    def __init__(self, network: nn.Module, taps: Sequence[Tap]) -> None:
        self.caught: dict[str, Tensor] = {}
        self.wanted: tuple[str, ...] = ()
        for tap in taps:
            network.get_submodule(tap.module).register_forward_hook(_Keep(self, tap.name))

    def capture(self, network: nn.Module, wanted: Sequence[Tap], pixels: Tensor) -> dict[str, Tensor]:
        """As the function `capture`."""
        caught: dict[str, Tensor] = {}
        self.wanted, self.caught = tuple(tap.name for tap in wanted), caught
        try:
            network(pixels)
        except _Stop:
            return caught
        finally:
            self.wanted, self.caught = (), {}  # nothing is kept alive
        return caught


class _Keep:
    def __init__(self, taps: LastingTaps, name: str) -> None:
        self.taps = taps
        self.name = name

    def __call__(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        if self.name not in self.taps.wanted:
            return
        tensor = output if isinstance(output, Tensor) else output[0]
        self.taps.caught[self.name] = tensor.clone() if _is_copied(module) else tensor
        if len(self.taps.caught) == len(self.taps.wanted):
            raise _Stop


def channels_first(output: Tensor, tap: Tap, pixels: Tensor) -> Tensor:
    """A raw output as `(b, c, fh, fw)`; what forms no grid stays `(b, t, d)` or `(b, c)`. A view, not a copy."""
    if tap.layout == "nhwc":
        return output.permute(0, 3, 1, 2)
    if tap.layout == "tokens":
        patches = output[:, tap.prefix :]
        height, width = pixels.shape[-2:]
        rows = round((patches.shape[1] * height / width) ** 0.5)
        return patches.transpose(1, 2).reshape(len(patches), patches.shape[2], rows, -1)
    return output


def free_taps(network: nn.Module, paths: Sequence[str], pixels: Tensor) -> tuple[list[Tap], list[str]]:
    """Taps for module paths and globs, with how often each is called, from one whole forward; and notes."""
    if not paths:
        return [], []
    modules = dict(network.named_modules())
    found = {path: _matching(modules, path) for path in paths}
    outputs = _call_counts(network, [name for names in found.values() for name in names], pixels)
    taps: dict[str, Tap] = {}
    notes = []
    for path, names in found.items():
        unfit = {name: outputs[name] for name in names if isinstance(outputs[name], str)}
        if len(unfit) == len(names):
            name, reason = next(iter(unfit.items()))
            raise UsageError(f"module {name!r} cannot be extracted: {reason}", "ask for the module that contains it")
        if unfit:
            name, reason = next(iter(unfit.items()))
            notes.append(f"--layers {path}: {len(unfit)} modules left out, such as {name} ({reason})")
        for name in names:
            calls = outputs[name]
            if isinstance(calls, int):
                taps[name] = Tap(storable_name(name), name, "as is", calls=calls, free=True)
    return list(taps.values()), notes


def _matching(modules: dict[str, nn.Module], path: str) -> list[str]:
    if path in modules and path:
        return [path]
    names = [name for name in modules if name and fnmatch.fnmatchcase(name, path)]
    if not names:
        close = ", ".join(nearest(path, modules)) or ", ".join(list(modules)[1:6])
        raise UsageError(f"no module {path!r} in the network", f"nearest: {close}")
    return names


def _call_counts(network: nn.Module, names: Sequence[str], pixels: Tensor) -> dict[str, int | str]:
    """How often each module runs in one whole forward, or why its output cannot be a stage."""
    counts: dict[str, int | str] = dict.fromkeys(names, _NEVER)

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def count(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, (tuple, list)) and output else output
            before = counts[name]
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                counts[name] = f"it gives a {type(tensor).__name__}, not a tensor of numbers"
            elif tensor.shape[0] != len(pixels) or not 2 <= tensor.ndim <= 4:
                counts[name] = f"it gives {tuple(tensor.shape)} for one image, not (1, c, h, w), (1, t, d) or (1, c)"
            else:
                counts[name] = before + 1 if isinstance(before, int) else 1

        return count

    with ExitStack() as hooks, torch.inference_mode():
        for name in counts:
            hooks.callback(network.get_submodule(name).register_forward_hook(hook(name)).remove)
        try:
            network(pixels)
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = f"the network breaks off before it: {str(error).partition(chr(10))[0]}"
            counts.update((name, reason) for name, count in counts.items() if count == _NEVER)
    return counts


def settled(tap: Tap, output: Tensor, other: Tensor) -> Tap:
    """A free tap with its layout: where height and width are is seen by which axes follow the input's size."""
    if not tap.free or output.ndim != 4:
        return tap
    moving = tuple(axis for axis in (1, 2, 3) if output.shape[axis] != other.shape[axis])
    return replace(tap, layout="nhwc" if moving == (1, 2) else "nchw")
