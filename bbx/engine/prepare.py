"""Make a backbone ready to run as `EngineSettings` say: a network of its own around the same weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bbx.backbone import Backbone, is_out_of_memory
from bbx.engine.remake import Remake, remake
from bbx.engine.replica import replica
from bbx.engine.settings import EngineSettings, keep_compiled
from bbx.errors import StartError
from bbx.taps import LastingTaps, Tap


def prepared(backbone: Backbone, settings: EngineSettings) -> Backbone:
    """`backbone` run as `settings` say: same stages, same weights, values equal to 1e-5 of a stage's largest.

    The network is a copy of its own, and the weights are shared where nothing changes them.
    """
    ready = replica(backbone)
    how = Remake(settings.channels_last, (), settings.fused, settings.packed)
    if settings.folded:
        tried = remake(backbone, channels_last=settings.channels_last, threads=settings.threads)
        how = replace(how, pairs=tried.pairs)
    how.apply(ready)
    return compiled(ready) if settings.engine == "compile" else ready


def compiled(backbone: Backbone) -> Backbone:
    """`backbone` through `torch.compile`; compiling happens in the first call.

    The next process compiles anew, for torch keeps no graph whose weights are frozen into it; on a CPU what the C++
    compiler made of its parts lies on disk by then (on one core, resnet18 to stage1: 16 s, then 6).
    """
    keep_compiled()
    # It warns of a CUDA toolkit without a GPU, which on a CPU is of no interest to anyone.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return backbone.around(backbone.network, Compiled(backbone, backbone.measured_taps))


class Compiled:
    """`Backbone.forward` by `torch.compile`, of the taps that it was made for."""

    def __init__(self, backbone: Backbone, taps: Sequence[Tap]) -> None:
        self._taps = taps
        self._names = tuple(tap.name for tap in taps)
        self._ran = False
        try:
            self._run: Any = torch.compile(_Graph(backbone, taps), dynamic=False)
        except RuntimeError as error:  # such as a Python that this torch cannot compile for
            raise _failed(error) from error

    def __call__(self, pixels: Tensor, taps: Sequence[Tap]) -> dict[str, Tensor]:
        """Each tap's raw output for `pixels`; a shape that is new is compiled first."""
        import torch._inductor.config as inductor

        # Frozen weights are folded and packed, which inductor does outside inference mode only.
        freezing = inductor.patch(freezing=pixels.device.type == "cpu")
        with torch.inference_mode(False), torch.no_grad(), freezing:
            try:
                outputs = self._run(pixels.clone() if pixels.is_inference() else pixels)
            except Exception as error:  # torch's own and the compilers' behind it are of many kinds
                if self._ran or is_out_of_memory(error):
                    raise
                raise _failed(error) from error
        self._ran = True
        raw = dict(zip(self._names, outputs, strict=True))
        return {tap.name: raw[tap.name] for tap in taps}


def _failed(error: Exception) -> StartError:
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return StartError(f"--engine compile failed: {first.strip()}", "leave it out, or mend the compiler on this machine")


class _Graph(nn.Module):
    """What is compiled: pixels → raw outputs in the order of the taps."""

    def __init__(self, backbone: Backbone, taps: Sequence[Tap]) -> None:
        super().__init__()
        self.network = backbone.network
        self._wanted = taps
        self._forward = backbone.forward
        self._lasting = None if backbone.forward else LastingTaps(backbone.network, taps)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """`(b, 3, h, w)` → each tap's output."""
        if self._lasting is not None:
            raw = self._lasting.capture(self.network, self._wanted, pixels)
        else:
            assert self._forward is not None
            raw = self._forward(pixels, self._wanted)
        return tuple(raw[tap.name] for tap in self._wanted)
