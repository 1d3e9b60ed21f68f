"""Make a backbone ready to run as `EngineSettings` say: a network of its own around the same weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bbx.backbone import Backbone
from bbx.engine.fold import fold
from bbx.engine.settings import EngineSettings
from bbx.taps import LastingTaps, Tap


def prepared(backbone: Backbone, settings: EngineSettings) -> Backbone:
    """`backbone` run as `settings` say: same stages, same weights, values equal to 1e-5 of a stage's largest.

    The network is a copy of its own, and the weights are shared where nothing changes them.
    """
    ready = replica(backbone)
    if settings.channels_last:
        _channels_last(ready.network)
    if settings.folded:
        fold(ready)
    return compiled(ready) if settings.engine == "compile" else ready


def replica(backbone: Backbone) -> Backbone:
    """The same backbone with modules of its own, so that two threads can run it at once; parameters are shared."""
    network = backbone.network
    shared: list[Tensor] = [*network.parameters(), *network.buffers()]
    # The provider's way to the maps holds the network, too: both are copied as one.
    made, forward = copy.deepcopy((network, backbone.forward), {id(tensor): tensor for tensor in shared})
    return backbone.around(made, forward)


def _channels_last(network: nn.Module) -> None:
    """As `network.to(memory_format=...)`, but with new parameters: the old ones belong to others, too."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim == 4:
                laid_out = parameter.detach().contiguous(memory_format=torch.channels_last)
                module._parameters[name] = nn.Parameter(laid_out, requires_grad=False)


def compiled(backbone: Backbone) -> Backbone:
    """`backbone` through `torch.compile`; compiling happens in the first call, and is kept on disk for the next run."""
    # torch's own choice is a folder in /tmp, which batch systems empty after each job.
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home / "bbx" / "inductor"))
    return backbone.around(backbone.network, Compiled(backbone, backbone.measured_taps))


class Compiled:
    """`Backbone.forward` by `torch.compile`, of the taps that it was made for."""

    def __init__(self, backbone: Backbone, taps: Sequence[Tap]) -> None:
        self._taps = taps
        self._names = tuple(tap.name for tap in taps)
        self._run: Any = torch.compile(_Graph(backbone, taps), dynamic=False)

    def __call__(self, pixels: Tensor, taps: Sequence[Tap]) -> dict[str, Tensor]:
        """Each tap's raw output for `pixels`; a shape that is new is compiled first."""
        import torch._inductor.config as inductor

        # Frozen weights are folded and packed, which inductor does outside inference mode only.
        freezing = inductor.patch(freezing=pixels.device.type == "cpu")
        with torch.inference_mode(False), torch.no_grad(), freezing:
            outputs = self._run(pixels.clone() if pixels.is_inference() else pixels)
        raw = dict(zip(self._names, outputs, strict=True))
        return {tap.name: raw[tap.name] for tap in taps}


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
