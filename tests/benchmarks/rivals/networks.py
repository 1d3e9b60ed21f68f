"""The jobs' networks where a rival takes any module: its library's name, and the module of each stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SEED = 0


@dataclass(frozen=True)
class Network:
    """`modules`: stage → dotted name. `nhwc`: its maps are `(b, h, w, c)`. `pooled`: the job wants a vector per map."""

    library: str
    name: str
    modules: Mapping[str, str]
    nhwc: bool = False
    pooled: bool = False

    def build(self, **options: Any) -> nn.Module:
        """With random weights; `options` are timm's own."""
        torch.manual_seed(SEED)
        if self.library == "timm":
            import timm

            return timm.create_model(self.name, pretrained=False, **options).eval()
        import torchvision

        return torchvision.models.get_model(self.name, weights=None).eval()

    def transform(self, network: nn.Module) -> Any:
        """The library's own for the published weights, from a PIL picture."""
        if self.library == "timm":
            import timm

            return timm.data.create_transform(**timm.data.resolve_data_config(network.pretrained_cfg, model=network))
        import torchvision

        return torchvision.models.get_model_weights(self.name).DEFAULT.transforms()

    def finished(self, maps: Tensor) -> Tensor:
        """What the job stores of a stage's output: the map as it is, or its mean."""
        return maps.mean((2, 3)) if self.pooled else maps


TIMM = {
    "A": Network("timm", "swin_tiny_patch4_window7_224",
                 {"stem": "patch_embed", "stage1": "layers.0", "stage2": "layers.1"}, nhwc=True),
    "B": Network("timm", "resnet50", {"stem": "maxpool", "stage1": "layer1", "stage2": "layer2"}),
    "C": Network("timm", "tf_efficientnet_lite0",
                 {"stem": "bn1", "stage1": "blocks.0", "stage2": "blocks.1", "stage3": "blocks.2", "stage4": "blocks.4",
                  "stage5": "blocks.6"}, pooled=True),
}  # fmt: skip
TORCHVISION = {
    "A": Network("torchvision", "swin_t", {"stem": "features.0", "stage1": "features.1", "stage2": "features.3"},
                 nhwc=True),
    "B": Network("torchvision", "resnet50", {"stem": "maxpool", "stage1": "layer1", "stage2": "layer2"}),
}  # fmt: skip
# Where a library takes any module: torchvision's, as most docs have it, and timm's where torchvision has none.
ANY = {**TIMM, **TORCHVISION}
