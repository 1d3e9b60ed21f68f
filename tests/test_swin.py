"""Swin blocks run a few images at a time: the values of torchvision's own, at any size, where nobody looks inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bbx.backbone import Backbone
from bbx.engine import EngineSettings, choose
from bbx.engine.pack import ANY, NARROW, PackedWeight, gelu_of
from bbx.engine.prepare import prepared
from bbx.engine.replica import replica
from bbx.engine.swin import SwinBlock, fusable
from bbx.providers import load_backbone
from bbx.taps import _OVERWRITTEN
from tests.conftest import EXTRAS
from tests.test_engine import CPU, apart, maps_of, noise
from tests.test_loop import TOLERANCE

FUSED = EngineSettings(fused=True)
# torchvision pads where windows do not fit (200), has a single one that it does not shift (96: 3 by 3 tokens at
# stage4), and one in one direction alone.
SIZES = [224, 200, 96, (64, 256)]
OTHERS = [name for name in ("timm:swin-tiny", "transformers:swin") if name.partition(":")[0] in EXTRAS]


def stirred(model: str, *, stages: str = "all", **options: Any) -> Backbone:
    """With what torchvision begins with zeros, or all alike: biases, the keys' among them, positions, temperatures."""
    backbone = load_backbone(model, weights="random", stages=stages, **options)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in backbone.network.named_parameters():
        if name.endswith(("bias", "bias_table")):
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        if name.endswith("logit_scale"):  # one head's temperature beyond the bound
            parameter.data[0] = 5.0
    return backbone


def blocks(backbone: Backbone) -> tuple[int, int]:
    """How many are the engine's, and how many torchvision's."""
    kinds = [type(module) for module in backbone.network.modules()]
    return kinds.count(SwinBlock), sum(kind.__name__.startswith("SwinTransformerBlock") for kind in kinds)


def check(backbone: Backbone, packed: int = 0) -> None:
    before = maps_of(backbone, noise(backbone, 3))
    fast = prepared(backbone, EngineSettings(fused=True, packed=packed))
    count = blocks(backbone)[1]
    assert (blocks(fast), count > 0) == ((count, 0), True)
    assert apart(before, maps_of(fast, noise(backbone, 3))) <= TOLERANCE
    assert apart(before, maps_of(replica(fast), noise(backbone, 3))) <= TOLERANCE  # as every stream has one
    assert apart(before, maps_of(backbone, noise(backbone, 3))) == 0.0  # the weights it shares are as they were


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("model", ["swin_t", "swin_v2_t"])
def test_fused_blocks_give_the_same_stages_at_any_size(model, size):
    check(stirred(model, size=size))


@pytest.mark.parametrize("packed", [NARROW, ANY], ids=["narrow", "any"])
@pytest.mark.parametrize("model", ["swin_t", "swin_v2_t"])
def test_fused_and_packed_together_they_give_the_same_stages(model, packed):
    check(stirred(model), packed)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["swin_s", "swin_b", "swin_v2_s", "swin_v2_b"])
def test_fused_blocks_give_the_same_stages_in_every_size_of_the_family(model):
    check(stirred(model))


def test_another_size_than_before_is_cut_anew():
    backbone = stirred("swin_t")
    fast = prepared(backbone, FUSED)
    for size in (224, 160, 224):
        pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(size))
        assert apart(maps_of(backbone, pixels), maps_of(fast, pixels)) <= TOLERANCE / 2


def test_a_block_that_is_looked_into_stays_as_it_is():
    backbone = stirred("swin_t", stages="stage1", layers="features.1.0.attn,features.1.1,features.3.1.mlp.0")
    assert fusable(backbone)
    fast = prepared(backbone, FUSED)
    assert [type(fast.network.get_submodule(path)) is SwinBlock for path in
            ("features.1.0", "features.1.1", "features.3.0", "features.3.1")] == [False, True, True, False]  # fmt: skip
    assert apart(maps_of(backbone, noise(backbone)), maps_of(fast, noise(backbone))) <= TOLERANCE / 2


def test_a_block_that_somebody_listens_to_or_has_changed_stays_as_it_is():
    backbone = load_backbone("swin_t", weights="random")
    features = backbone.network.features
    features[1][0].attn.qkv.register_forward_hook(lambda *_: None)
    features[1][1].mlp[1] = nn.ReLU()
    features[3][0].norm1 = nn.Identity()
    features[3][1].train()
    features[5][0].mlp[1] = nn.GELU("tanh")
    features[5][1].register_forward_pre_hook(lambda *_: None)
    fast = prepared(backbone, FUSED)
    kept = [type(fast.network.features[stage][block]) is SwinBlock for stage in (1, 3, 5) for block in (0, 1)]
    assert kept == [False] * 6
    assert blocks(fast)[0] == 6


def test_a_block_that_is_known_to_be_written_over_stays_known():
    backbone = load_backbone("swin_t", weights="random")
    setattr(backbone.network.features[1][0], _OVERWRITTEN, True)
    fused = prepared(backbone, FUSED).network.features[1]
    assert [getattr(block, _OVERWRITTEN, False) for block in fused] == [True, False]


@pytest.mark.parametrize("model", ["resnet18", "vit_b_32", *OTHERS])
def test_what_has_no_such_blocks_is_left_alone(model):
    backbone = load_backbone(model, weights="random")
    assert not fusable(backbone)
    assert not choose(backbone, CPU, rows=5000, batch_size=8).fused


def test_blocks_are_fused_where_that_pays_and_is_said(monkeypatch):
    monkeypatch.setattr("bbx.engine.pack.faster_up_to", lambda: ANY)
    backbone = load_backbone("swin_t", weights="random", stages="stage1")
    assert "blocks fused, all packed" in choose(backbone, CPU, rows=5000, batch_size=8).describe()
    second = load_backbone("swin_v2_t", weights="random", stages="stage1")
    assert "blocks fused, all packed" in choose(second, CPU, rows=5000, batch_size=8).describe()
    assert not choose(backbone, CPU, rows=10, batch_size=8).fused  # too few to try what it changes
    assert not choose(backbone.select("stem"), CPU, rows=5000, batch_size=8).fused  # no block runs
    assert not choose(backbone, CPU, engine="compile", rows=5000, batch_size=8).fused
    assert not choose(backbone.to(CPU, precision="bf16"), CPU, rows=5000, batch_size=8).fused
    with monkeypatch.context() as patched:
        patched.setattr("bbx.engine.trial.TOLERANCE", -1.0)
        assert not choose(backbone.select("stage2"), CPU, rows=5000, batch_size=8).fused


def test_where_wide_layers_change_too_much_blocks_are_fused_all_the_same(monkeypatch):
    monkeypatch.setattr("bbx.engine.pack.faster_up_to", lambda: ANY)
    tried = []

    def differs(_before: object, _after: object) -> bool:
        tried.append(1)
        return len(tried) == 2

    monkeypatch.setattr("bbx.engine.remake.same", differs)
    how = choose(load_backbone("swin_t", weights="random"), CPU, rows=5000, batch_size=8)
    assert (how.fused, how.packed) == (True, 192)


def test_gelu_behind_a_packed_layer_is_the_same():
    layer, pixels = nn.Linear(96, 384), torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain = layer(pixels)
        assert torch.equal(gelu_of(layer, pixels), F.gelu(plain))
        layer._parameters["weight"] = PackedWeight.of(layer.weight)  # type: ignore[assignment]
        assert torch.allclose(gelu_of(layer, pixels), F.gelu(plain), rtol=0, atol=1e-6)
