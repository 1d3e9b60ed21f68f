"""How a network is run here: threads, layout, what is remade of it, compiling. Nothing changes a value beyond 1e-5."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bbx.backbone import Backbone
from bbx.engine.pack import NARROW
from bbx.engine.remake import Remake, remake, safe
from bbx.engine.switches import usual_threads
from bbx.errors import StartError, UsageError
from bbx.machine import quota
from bbx.spec import ChannelsLast, Engine

# The interpreter's lock is one for all streams, and each holds the activations of a batch of its own.
MOST_STREAMS = 8
MOST_IMAGES = 64
"""Images in all streams together, where a batch alone is not larger."""
TRIAL_PAYS = 128
"""Images from which on what changes last bits pays for the few forwards that try how much it changes them."""
COMPILE_PAYS = {"cpu": 600.0, "cuda": 60.0}
"""Seconds of eager computing from which on compiling may pay: it takes 10 to 250 s. It saves a tenth of ResNet-50 on
Zen 3 and Zen 4 cores, and loses 6 and 12 % of swin-tiny, which is eager's packing (and more by now: its fused blocks);
on an H100 it saves 0.06 ms of swin-tiny's 0.2. `mode="max-autotune"` took 95 s in place of 59 for swin-tiny, on Zen 4,
and gave the same rate. CUDA graphs would save launches, of which there is no want: that H100 computed 4,942 images/s,
and stored 582."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """`streams` batches at once, each on `threads` threads; the rest is done to the network once.

    `folded`: batch normalisation goes into the convolution before it; `fused`: Swin blocks run a few images at a time;
    `packed`: linear layers of up to so many inputs, and 1×1 convolutions with them, are oneDNN's.
    `why` is what a user should know of the choice.
    """

    engine: Engine = "eager"
    channels_last: bool = False
    folded: bool = False
    fused: bool = False
    packed: int = 0
    streams: int = 1
    threads: int = 1
    why: str = ""

    def describe(self) -> str:
        """A few words for the plan."""
        packed = "packed" if self.packed <= NARROW else "all packed"  # other bits
        facts = {
            "channels last": self.channels_last,
            "batch norm folded": self.folded,
            "blocks fused": self.fused,
            packed: bool(self.packed),
        }
        words = [self.engine, *(word for word, true in facts.items() if true)]
        return ", ".join([*words, f"{self.streams} × {self.threads} thread{'s' * (self.threads > 1)}"])


def choose(
    backbone: Backbone,
    device: torch.device,
    *,
    engine: Engine = "eager",
    channels_last: ChannelsLast = "auto",
    rows: int,
    batch_size: int,
    seconds: float = math.inf,
) -> EngineSettings:
    """What is fastest for `rows` images, as far as the caller has not said. Raises `UsageError`, `StartError`.

    `seconds`: how long eager code would compute; where that is too short for compiling to pay, it is not done.
    """
    why = ""
    if engine == "compile":
        _check_compiles(backbone, device)
        pays = COMPILE_PAYS[device.type]
        if seconds < pays:
            engine, here = "eager", f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
            why = f"--engine compile pays from about {pays / 60:.0f} min of computing on; here are {here}"
        else:
            _check_compiler(device)
            why = "--engine compile: the first batch waits for the code, a minute or so"
    last = channels_last == "yes" or (channels_last == "auto" and _gains_by_channels_last(backbone, device))
    compiled, on_cpu = engine == "compile", device.type == "cpu"
    budget = max(1, min(usual_threads(), math.ceil(min(quota(), 1 << 20))))
    # Compiled code is for one thread at a time; on an accelerator one thread keeps the queue of work full.
    streams = 1 if compiled or not on_cpu else _streams(budget, rows, batch_size)
    threads = max(1, budget // streams)
    made = Remake()
    # Inductor does as much by itself, on an H100 it gained nothing, and in a lower precision it would round otherwise.
    if on_cpu and not compiled and backbone.precision == "float32":
        tries = rows >= TRIAL_PAYS
        made = remake(backbone, channels_last=last, threads=threads) if tries else safe(backbone, channels_last=last)
    return EngineSettings(
        engine,
        channels_last=last,
        folded=bool(made.pairs),
        fused=made.fused,
        packed=made.packed,
        streams=streams,
        threads=threads,
        why=why,
    )


def usual_batch(backbone: Backbone, device: torch.device) -> int:
    """How many images a batch has where nobody says it.

    Of whole runs on two cores, 2, 4, 8, 16 and 32 at a time: on attention 4 were a twentieth faster than 8 (swin-tiny,
    ViT-B/16) and took a fifth less memory, convolutions lost up to a tenth by them (ConvNeXt), and no more were faster.
    """
    if device.type != "cpu":
        return 64
    return 4 if any("Attention" in type(module).__name__ for module in backbone.network.modules()) else 8


def _streams(budget: int, rows: int, batch_size: int) -> int:
    """As many as may be, unless more than a fifth of the threads were left over: each stream has the same number."""
    batches = -(-rows // max(1, batch_size))
    most = max(1, min(budget, batches, MOST_STREAMS, MOST_IMAGES // max(1, batch_size)))
    return next(streams for streams in range(most, 0, -1) if streams * (budget // streams) >= 0.8 * budget)


def _gains_by_channels_last(backbone: Backbone, device: torch.device) -> bool:
    """Whether convolutions are most of the network's work.

    Measured: 1.0 to 1.5 times as fast on a CPU for convnets, nothing for transformers (ConvNeXt's blocks are linear
    layers but for one). On an H100, ResNet-50 gains a tenth in TF32 and fp16, and loses a fifth in float32.
    """
    kinds = [type(module) for module in backbone.network.modules()]
    convnet = sum(issubclass(kind, nn.Conv2d) for kind in kinds) > sum(issubclass(kind, nn.Linear) for kind in kinds)
    return convnet and (device.type == "cpu" or (device.type == "cuda" and backbone.precision != "float32"))


def _check_compiles(backbone: Backbone, device: torch.device) -> None:
    """Raises where `torch.compile` would not go with what is asked for."""
    if any(tap.free for tap in backbone.wanted):
        raise UsageError("--engine compile does not go with --layers", "leave one of them out")
    if device.type not in COMPILE_PAYS:
        raise UsageError(f"--engine compile is for cpu and cuda, not {device.type}", "leave it out")


def _check_compiler(device: torch.device) -> None:
    """Raises where this machine cannot compile."""
    named = os.environ.get("CXX", "") if device.type == "cpu" else ""
    missing = _missing_compiler(device)
    if missing and named:
        raise StartError(
            f"--engine compile needs {missing}, and the one that CXX names, {named}, does not run",
            "unset CXX, or have it name another; or leave --engine compile out",
        )
    if missing:
        raise StartError(f"--engine compile needs {missing}, which this machine lacks", "install it, or leave it out")


def keep_compiled() -> None:
    """Has what is compiled lie in the user's cache: torch's own choice is in /tmp, which batch systems empty."""
    with suppress(RuntimeError):  # a user without a home is left with torch's choice
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home / "bbx" / "inductor"))


def _missing_compiler(device: torch.device) -> str:
    from importlib.util import find_spec

    if device.type == "cuda":
        return "" if find_spec("triton") else "the package triton"
    keep_compiled()  # torch looks once, when its compiler is imported
    from torch._inductor import cpp_builder

    finder: Any = cpp_builder.get_cpp_compiler
    try:
        finder()
    except Exception:  # torch's own class for it has moved between its versions
        return "a C++ compiler (g++ or clang++)"
    return ""
