"""A provider of two convolutions, so that the whole command line runs in milliseconds on a known network."""

from typing import Any

import torch
from torch import nn

from bbx.backbone import Backbone
from bbx.errors import UsageError
from bbx.spec import BUILD, Build, ModelRef, Preprocess
from bbx.taps import Tap
from bbx.weights import digest, load_into, read_state_dict


class Toy(nn.Module):
    """Three stages at stride 2, 4, 8, a classifier, and a count of every module's calls."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.one = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.two = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(self.relu(self.stem(x)))
        return self.fc(self.two(self.relu(x)).mean((2, 3)))


PREPROCESS = Preprocess((32, 32), 36, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TAPS = (Tap("stem", "stem"), Tap("stage1", "one"), Tap("stage2", "two"))


def names() -> tuple[str, ...]:
    return ("toy", "toy-loud")


def list_models() -> list[dict[str, Any]]:
    return [{"name": name, "weights": ["NONE"], "parameters": 400} for name in names()]


def load(ref: ModelRef, build: Build = BUILD) -> Backbone:
    if ref.name not in names():
        raise UsageError(f"no toy {ref.name}")
    with torch.random.fork_rng():
        torch.manual_seed(build.seed)
        network = Toy()
    if ref.name == "toy-loud":  # values that float16 cannot hold
        torch.nn.init.constant_(network.two.bias, 1e6)
    untrained: tuple[str, ...] = ()
    if ref.weights not in ("auto", "random"):
        from pathlib import Path

        untrained = load_into(network, read_state_dict(Path(ref.weights)), head=("fc.",), source=f"file {ref.weights}")
    label = f"random (seed {build.seed})"
    network = network.to("meta") if build.structure else network
    checksum = "" if build.structure else digest(network)
    return Backbone(ref, network.eval(), TAPS, PREPROCESS.override(size=build.size), label, checksum, untrained)
