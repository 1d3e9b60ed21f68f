"""What every backbone promises: the maps asked for, channels first, and not one layer more."""

import pytest
import torch
from torch import nn

from bbx.backbone import Backbone, _stride, normalise
from bbx.errors import ContractError, UsageError
from bbx.parameters import parameters_until
from bbx.providers import load_backbone
from bbx.spec import ModelRef, Preprocess
from bbx.taps import Tap
from tests.toy import PREPROCESS, TAPS, Toy


def calls_of(backbone: Backbone, pixels: torch.Tensor) -> list[str]:
    """The leaf modules that one call runs."""
    called: list[str] = []
    leaves = [(name, module) for name, module in backbone.network.named_modules() if not list(module.children())]
    handles = [m.register_forward_pre_hook(lambda *_, name=name: called.append(name)) for name, m in leaves]
    with torch.inference_mode():
        backbone(pixels)
    for handle in handles:
        handle.remove()
    return called


def test_maps_come_by_name_in_network_order_with_the_declared_shapes():
    backbone = load_backbone("toy", stages="stage2,stem")
    maps = backbone(torch.randn(5, 3, 32, 32))
    assert {name: tuple(tensor.shape) for name, tensor in maps.items()} == {
        "stem": (5, 4, 16, 16),
        "stage2": (5, 8, 4, 4),
    }
    assert [(stage.name, stage.index, stage.shape, stage.stride) for stage in backbone.stages] == [
        ("stem", 0, (4, 16, 16), 2.0),
        ("stage2", 2, (8, 4, 4), 8.0),
    ]


@pytest.mark.parametrize(
    ("stages", "run"),
    [("stem", ["stem"]), ("stage1", ["stem", "relu", "one"]), ("all", ["stem", "relu", "one", "relu", "two"])],
)
def test_nothing_past_the_deepest_stage_runs(stages, run):
    backbone = load_backbone("toy", stages=stages)
    assert [stage.name for stage in backbone.stages]  # measured, so that only the call itself is counted
    assert calls_of(backbone, torch.randn(2, 3, 32, 32)) == run


@pytest.mark.parametrize(
    ("model", "stages", "last", "past"),
    [
        ("swin_t", "stem..stage2", "features.3", "features.4"),
        ("resnet18", "stage1", "layer1", "layer2"),
        ("vit_b_32", "stage2", "encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_2"),
        ("densenet121", "stem", "features.pool0", "features.denseblock1"),
    ],
)
def test_early_exit_in_real_networks(model, stages, last, past):
    backbone = load_backbone(model, weights="random", stages=stages)
    assert backbone.stages
    called = calls_of(backbone, torch.randn(1, 3, 224, 224))
    assert any(name.startswith(last) for name in called)
    assert not any(name.startswith(past) for name in called)


def test_neither_given_means_the_last_stage():
    assert [stage.name for stage in load_backbone("toy").stages] == ["stage2"]


def test_a_layer_is_what_it_was_before_a_later_in_place_operation():
    # `stem` is written over by the in-place ReLU that follows it.
    backbone = load_backbone("toy", stages="stage2", layers="stem")
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone(pixels)["stem"], backbone.network.stem(pixels))
    assert backbone(pixels)["stem"].min() < 0


def test_layers_by_glob_alone_replace_the_default_stage():
    backbone = load_backbone("toy", layers="t*,one")
    assert [(stage.name, stage.index) for stage in backbone.stages] == [("one", None), ("two", None)]


def test_a_module_that_runs_twice_gives_its_last_output():
    backbone = load_backbone("toy", layers="relu")
    pixels = torch.randn(1, 3, 32, 32)
    network = backbone.network
    assert torch.equal(backbone(pixels)["relu"], network.relu(network.one(network.relu(network.stem(pixels)))))


def test_channels_last_layers_are_found_by_measuring_and_turned():
    backbone = load_backbone("swin_t", weights="random", stages="stage2", layers="features.3.0.attn,features.0.0")
    assert {stage.name: stage.shape for stage in backbone.stages} == {
        "features.0.0": (96, 56, 56),
        "features.3.0.attn": (192, 28, 28),
        "stage2": (192, 28, 28),
    }


def test_a_layer_with_the_name_of_another_stage_keeps_apart():
    # ShuffleNet's attribute `stage2` is its stage1.
    backbone = load_backbone("shufflenet_v2_x0_5", weights="random", stages="stage2", layers="stage2,stage3")
    assert {stage.name: (stage.module, stage.index) for stage in backbone.stages} == {
        "stage2.out": ("stage2", None),
        "stage2": ("stage3", 2),
        "stage3.out": ("stage3", None),
    }


def test_layers_of_a_network_of_one_size_are_maps_only_where_a_stages_grid_says_so():
    backbone = load_backbone("maxvit_t", weights="random", layers="blocks.0.layers.0,stem.0")
    assert [stage.shape for stage in backbone.stages] == [(64, 112, 112), (64, 56, 56)]
    window = load_backbone(
        "maxvit_t", weights="random", layers="blocks.0.layers.0.layers.window_attention.attn_layer.0"
    )
    with pytest.raises(UsageError, match="which axes"):
        assert window.stages


def test_token_layers_stay_tokens():
    backbone = load_backbone("vit_b_32", weights="random", layers="encoder.layers.encoder_layer_0.ln_1,heads")
    assert [stage.shape for stage in backbone.stages] == [(50, 768), (1000,)]
    with torch.inference_mode():
        assert backbone(torch.randn(2, 3, 224, 224))["heads"].shape == (2, 1000)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("onee", ["'onee'", "one"]),
        ("bogus.*", ["bogus.*"]),
        ("never", ["never runs"]),
        ("tuple", ["tensor of numbers"]),
    ],
)
def test_a_module_that_cannot_be_a_stage_is_refused_with_the_reason(path, words):
    class Odd(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.never = nn.Conv2d(3, 4, 1)
            self.tuple = Shape()

        def forward(self, x):
            self.tuple(x)
            return super().forward(x)

    class Shape(nn.Module):
        def forward(self, x):
            return x.shape

    backbone = Backbone(ModelRef("toy", "odd"), Odd().eval(), TAPS, PREPROCESS, "", "")
    with pytest.raises(UsageError) as caught:
        backbone.select(layers=path)
    assert all(word in f"{caught.value.message} {caught.value.hint}" for word in words)


def test_layers_of_an_input_too_small_for_the_network_say_so():
    with pytest.raises(UsageError, match="breaks off before it: "):
        load_backbone("inception_v3", weights="random", layers="Mixed_7c", size=40)
    assert load_backbone("inception_v3", weights="random", layers="Conv2d_1a_3x3", size=40).stages


def test_an_output_other_than_declared_is_a_contract_error():
    class Changing(Toy):
        wide = False

        def forward(self, x):
            return super().forward(x if not self.wide else torch.cat([x, x]))

    backbone = Backbone(ModelRef("toy", "changing"), Changing().eval(), TAPS, PREPROCESS, "", "").select("stem")
    pixels = torch.randn(2, 3, 32, 32)
    backbone(pixels)
    backbone.network.wide = True
    with pytest.raises(ContractError, match=r"stem of toy:changing gave \(4, 4, 16, 16\), declared \(2, 4, 16, 16\)"):
        backbone(pixels)


def test_a_tap_that_never_fires_is_a_contract_error():
    network = Toy().eval()
    network.dead = nn.Identity()
    backbone = Backbone(ModelRef("toy", "dead"), network, (Tap("stem", "dead"),), PREPROCESS, "", "")
    with pytest.raises(ContractError, match="never ran"):
        assert backbone.stages


def test_other_input_sizes_pass_with_the_same_channels():
    assert load_backbone("toy")(torch.randn(1, 3, 64, 48))["stage2"].shape == (1, 8, 8, 6)


@pytest.mark.parametrize(
    ("stride", "sizes", "cells"),
    [
        (2, ((299, 299), (235, 171)), ((147, 147), (115, 83))),  # unpadded convolutions
        (14, ((224, 224), (160, 352)), ((16, 16), (11, 25))),
        (14, ((518, 518), (454, 390)), ((37, 37), (32, 27))),
        (32, ((299, 299), (235, 171)), ((8, 8), (6, 4))),
        (64, ((96, 224), (160, 352)), ((2, 4), (3, 6))),
        (128, ((800, 800), (736, 672)), ((7, 7), (6, 6))),
        (16, ((224, 224), (224, 224)), ((14, 14), (14, 14))),  # one size only
    ],
)
def test_strides_see_through_what_borders_cost(stride, sizes, cells):
    assert _stride([(8, *one) for one in cells], *sizes) == stride


def test_gradients_flow_when_the_caller_wants_them():
    backbone = load_backbone("toy", stages="stage1")
    backbone(torch.randn(2, 3, 32, 32))["stage1"].sum().backward()
    assert backbone.network.stem.weight.grad is not None


def test_hooks_are_gone_after_a_call_even_one_that_failed():
    backbone = load_backbone("toy", stages="all")
    assert backbone.stages
    with pytest.raises(RuntimeError):
        backbone(torch.randn(2, 5, 32, 32))
    assert all(not module._forward_hooks for module in backbone.network.modules())


def test_parameters_up_to_a_stage_count_what_has_run():
    network = load_backbone("toy").network
    sizes = [sum(p.numel() for p in part.parameters()) for part in (network.stem, network.one, network.two)]
    counts = parameters_until(load_backbone("toy"))
    assert list(counts.values()) == [sizes[0], sum(sizes[:2]), sum(sizes)]


def test_normalising_gives_torchvisions_own_bits():
    from torchvision.transforms import functional

    batch = torch.randint(0, 256, (2, 9, 7, 3), dtype=torch.uint8)
    preprocess = Preprocess((9, 7), 9, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    floats = functional.convert_image_dtype(batch.permute(0, 3, 1, 2), torch.float)
    assert torch.equal(normalise(batch, preprocess), functional.normalize(floats, preprocess.mean, preprocess.std))


def test_lower_precision_computes_lower_and_stays_close():
    backbone = load_backbone("toy", stages="stage2")
    pixels = torch.randn(2, 3, 32, 32)
    exact, lower = backbone(pixels)["stage2"], backbone.to("cpu", precision="bf16")(pixels)["stage2"]
    assert lower.dtype == torch.bfloat16
    assert (exact - lower.float()).abs().max() < 0.02 * exact.abs().max()
    with pytest.raises(UsageError, match="tf32"):
        backbone.to("cpu", precision="tf32")


def test_a_stage_is_the_same_whatever_other_stages_are_asked_for():
    # In the toy, stem and stage1 are both written over by the in-place ReLU on the way to the next one.
    pixels = torch.randn(2, 3, 32, 32)
    alone = {name: load_backbone("toy", stages=name)(pixels)[name] for name in ("stem", "stage1", "stage2")}
    together = load_backbone("toy", stages="all")
    with torch.inference_mode():
        maps = together(pixels)
    assert all(torch.equal(maps[name], alone[name]) for name in alone)
    assert alone["stage1"].min() < 0


def test_compiled_and_uncompiled_stages_agree_where_a_later_layer_writes_over_them():
    from bbx.taps import LastingTaps

    backbone = load_backbone("toy", stages="all")
    pixels = torch.randn(2, 3, 32, 32)
    lasting = LastingTaps(backbone.network, backbone.taps)
    with torch.no_grad():
        assert backbone.stages  # the dry forward
        raw = lasting.capture(backbone.network, backbone.taps, pixels)
        assert all(torch.equal(raw[name], values) for name, values in backbone(pixels).items())
