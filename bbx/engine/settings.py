"""How a network is run on this machine: threads, layout, folding, compiling. None of it changes a value beyond 1e-5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bbx.backbone import Backbone
from bbx.errors import StartError, UsageError
from bbx.spec import ChannelsLast, Engine

# Each stream holds the activations of a batch of its own, and the interpreter's lock is one for all.
MOST_STREAMS = 8
FOLD_PAYS = 64
"""Images from which on folding pays for its two forwards of one image and the comparison."""
COMPILE_PAYS = {"cpu": 2_000, "cuda": 300_000}
"""Images from which on compiling pays: it takes 10 to 120 s, and saves 5 ms an image on a core, 0.06 on an H100."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """`streams` batches at once, each on `threads` threads; the rest is done to the network once.

    `folded`: batch normalisation goes into the convolution before it. `why` is what a user should know of the choice.
    """

    engine: Engine = "eager"
    channels_last: bool = False
    folded: bool = False
    streams: int = 1
    threads: int = 1
    why: str = ""

    def describe(self) -> str:
        """A few words for the plan."""
        words = [self.engine, "channels last" if self.channels_last else "", "batch norm folded" if self.folded else ""]
        words.append(f"{self.streams} × {self.threads} thread{'s' * (self.threads > 1)}")
        return ", ".join(word for word in words if word)


def choose(
    backbone: Backbone,
    device: torch.device,
    *,
    engine: Engine = "eager",
    channels_last: ChannelsLast = "auto",
    rows: int,
    batch_size: int,
) -> EngineSettings:
    """What is fastest for `rows` images, as far as the caller has not said. Raises `UsageError`, `StartError`."""
    why = ""
    if engine == "compile":
        _check_compiles(backbone, device)
        pays = COMPILE_PAYS.get(device.type, 0)
        if rows < pays:
            engine, why = "eager", f"--engine compile pays from about {pays:,} images on; here are {rows:,}"
    last = channels_last == "yes" or (channels_last == "auto" and _gains_by_channels_last(backbone, device))
    compiled, on_cpu = engine == "compile", device.type == "cpu"
    budget = torch.get_num_threads()
    batches = -(-rows // max(1, batch_size))
    # Compiled code is for one thread at a time; on an accelerator one thread keeps the queue of work full.
    streams = 1 if compiled or not on_cpu else max(1, min(budget, MOST_STREAMS, batches))
    return EngineSettings(
        engine,
        channels_last=last,
        folded=on_cpu and not compiled and rows >= FOLD_PAYS and _folds(backbone),
        streams=streams,
        threads=max(1, budget // streams),
        why=why,
    )


def _gains_by_channels_last(backbone: Backbone, device: torch.device) -> bool:
    """Whether convolutions are most of the network's work.

    Measured: 1.0 to 1.5 times as fast on a CPU for convnets, nothing for transformers (ConvNeXt's blocks are linear
    layers but for one). On an H100, ResNet-50 gains a tenth in TF32 and fp16, and loses a fifth in float32.
    """
    kinds = [type(module) for module in backbone.network.modules()]
    convnet = sum(issubclass(kind, nn.Conv2d) for kind in kinds) > sum(issubclass(kind, nn.Linear) for kind in kinds)
    return convnet and (device.type == "cpu" or (device.type == "cuda" and backbone.precision != "float32"))


def _folds(backbone: Backbone) -> bool:
    """Inductor folds by itself, on an H100 it gained nothing, and in a lower precision it would change the rounding."""
    norms = any("BatchNorm" in type(module).__name__ for module in backbone.network.modules())
    return norms and backbone.precision == "float32"


def _check_compiles(backbone: Backbone, device: torch.device) -> None:
    """Raises where `torch.compile` cannot be had."""
    if any(tap.free for tap in backbone.wanted):
        raise UsageError("--engine compile does not go with --layers", "leave one of them out")
    if device.type not in COMPILE_PAYS:
        raise UsageError(f"--engine compile is for cpu and cuda, not {device.type}", "leave it out")
    missing = _missing_compiler(device)
    if missing:
        raise StartError(f"--engine compile needs {missing}, which this machine lacks", "install it, or leave it out")


def _missing_compiler(device: torch.device) -> str:
    from importlib.util import find_spec

    if device.type == "cuda":
        return "" if find_spec("triton") else "the package triton"
    from torch._inductor import cpp_builder

    finder: Any = cpp_builder.get_cpp_compiler
    try:
        finder()
    except Exception:  # torch's own class for it has moved between its versions
        return "a C++ compiler (g++ or clang++)"
    return ""
