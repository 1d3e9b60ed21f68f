"""timm: bbx's stages are timm's own maps under torchvision's numbering; names, sizes, preprocessing, compiling."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image, ImageOps

from bbx.backbone import Backbone, normalise
from bbx.errors import BbxError, UsageError, WeightsError
from bbx.images import read_image
from bbx.providers.timm import find, load, names
from bbx.providers.timm_weights import tags
from bbx.spec import Build, ModelRef
from tests.conftest import SAMPLES
from tests.test_backbone import calls_of

REFERENCE = json.loads((Path(__file__).parent / "goldens" / "torchvision_stages.json").read_text())
# timm's name of a network: torchvision's.
TWINS = {
    "resnet50": "resnet50", "resnext50_32x4d": "resnext50_32x4d", "convnext_tiny": "convnext_tiny",
    "swin_tiny_patch4_window7_224": "swin_t", "swinv2_tiny_window8_256": "swin_v2_t",
    "efficientnet_b0": "efficientnet_b0", "efficientnetv2_s": "efficientnet_v2_s", "mobilenetv2_100": "mobilenet_v2",
    "mobilenetv3_large_100": "mobilenet_v3_large", "mobilenetv3_small_100": "mobilenet_v3_small",
    "mnasnet_100": "mnasnet1_0", "densenet121": "densenet121", "vgg11": "vgg11", "inception_v3": "inception_v3",
    "regnety_004": "regnet_y_400mf", "regnetx_004_tv": "regnet_x_400mf", "vit_base_patch32_224": "vit_b_32",
}  # fmt: skip


def model(name: str, weights: str | Path = "random", **build: Any) -> Backbone:
    """As `load_backbone("timm:…")` would, all stages selected."""
    return load(ModelRef("timm", name, str(weights)), Build(**build)).select("all")


def pixels_of(backbone: Backbone, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *backbone.preprocess.size, generator=torch.Generator().manual_seed(1))


QUICK = ("resnet50", "mobilenetv3_large_100", "densenet121", "vit_base_patch32_224")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TWINS]
)
def test_a_stage_is_what_torchvision_calls_so(name):
    expected = REFERENCE[TWINS[name]]
    backbone = model(name, structure=True, size=(expected["input"],) * 2)
    assert [(stage.name, stage.shape) for stage in backbone.stages] == [
        (stage["name"], (stage["channels"], *stage["hw"])) for stage in expected["stages"]
    ]


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("resnet18", ["maxpool", "layer1", "layer2", "layer3", "layer4"]),
        ("legacy_seresnet18", ["pool0", "layer1", "layer2", "layer3", "layer4"]),
        ("convnext_atto", ["stem.1", "stages.0", "stages.1", "stages.2", "stages.3"]),
        ("densenet121", ["features.pool0", *(f"features.denseblock{n}" for n in (1, 2, 3, 4))]),
        ("vit_tiny_patch16_224", ["norm_pre", *(f"blocks.{n}" for n in range(12))]),
    ],
)
def test_where_the_stages_leave(name, modules):
    assert [stage.module for stage in model(name, structure=True).stages] == modules


def test_native_differs_for_densenet_alone_whose_last_map_timm_normalises():
    backbone = model("densenet121", norm="native")
    assert [tap.module for tap in backbone.taps][-2:] == ["features.denseblock3", "features.norm5"]
    pixels = pixels_of(backbone)
    with torch.inference_mode():
        last = backbone.network.forward_intermediates(pixels, indices=[4], intermediates_only=True)[0]
        assert torch.equal(backbone(pixels)["stage4"], last)
    assert model("resnet18", structure=True, norm="native").taps == model("resnet18", structure=True).taps


@pytest.mark.parametrize("name", ["crossvit_tiny_240", "twins_svt_small"])
def test_a_network_without_a_stem_says_so_and_keeps_its_numbers(name):
    backbone = load(ModelRef("timm", name, "random"), Build(structure=True))
    assert "no stem" in backbone.notes[0]
    first = backbone.select("all").stages[0]
    assert (first.name, first.index) == ("stage1", 1)
    with pytest.raises(UsageError, match="no stem"):
        backbone.select("stem")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "mobilenetv3_small_050", "test_mambaout"])
def test_maps_are_channels_first_and_timms_own_bit_for_bit(name):
    backbone = model(name)
    pixels, heard = pixels_of(backbone), []
    stem = backbone.network.get_submodule(backbone.taps[0].module)
    with torch.inference_mode():
        handle = stem.register_forward_hook(lambda _module, _inputs, output: heard.append(output.clone()))
        backbone.network(pixels)
        handle.remove()
        truth = backbone.network.forward_intermediates(pixels, intermediates_only=True)
        got = backbone(pixels)
    assert list(got) == [stage.name for stage in backbone.stages]
    for stage, (name, found) in zip(backbone.stages, got.items(), strict=True):
        assert (name, tuple(found.shape)) == (stage.name, (2, *stage.shape))
    for one, other in zip(reversed(list(got.values())[1:]), reversed(truth), strict=False):
        assert torch.equal(one, other)
    first = got["stem"].flatten(2).sort(-1).values.sort(1).values  # whatever the layout of the stem's module
    raw = heard[0][:, backbone.taps[0].prefix :] if heard[0].ndim == 3 else heard[0]
    raw = raw.flatten(2) if raw.shape[1] == got["stem"].shape[1] else raw.reshape(2, -1, raw.shape[-1]).transpose(1, 2)
    assert torch.equal(first, raw.sort(-1).values.sort(1).values)


@pytest.mark.parametrize(
    ("name", "stages", "last", "past"),
    [
        ("test_resnet", "stem", "maxpool", "layer1"),
        ("test_resnet", "stage1", "layer1", "layer2"),
        ("dpn48b", "stem", "features.conv1_pool", "features.conv2_1"),
        ("test_vit", "stem", "norm_pre", "blocks.0"),
        ("test_vit", "stem..stage2", "blocks.1", "blocks.2"),
        ("mobilenetv3_small_050", "stage1", "blocks.0", "blocks.1"),
        ("densenet121", "stage1", "features.denseblock1", "features.transition1"),
    ],
)
def test_nothing_past_the_deepest_stage_runs(name, stages, last, past):
    backbone = model(name).select(stages)
    assert backbone.stages
    called = calls_of(backbone, pixels_of(backbone, 1))
    assert any(leaf.startswith(last) for leaf in called)
    assert not any(leaf.startswith((past, "norm.", "head", "fc", "classifier")) for leaf in called)


def test_layers_by_path_come_beside_stages():
    backbone = model("test_resnet").select("stem,stage1", layers="layer2.0.conv1")
    pixels = pixels_of(backbone)
    with torch.inference_mode():
        got = backbone(pixels)
        assert torch.equal(got["layer2.0.conv1"], backbone.network.layer2[0].conv1(got["stage1"]))
    assert list(got) == ["stem", "stage1", "layer2.0.conv1"]


@pytest.mark.parametrize(
    ("name", "prefix"), [("test_vit", 1), ("deit_tiny_distilled_patch16_224", 2), ("xcit_nano_12_p16_224", 0)]
)
def test_tokens_keep_what_the_maps_strip(name, prefix):
    tokens, maps = model(name, tokens=True), model(name)
    pixels = pixels_of(maps)
    with torch.inference_mode():
        whole, grid = tokens(pixels), maps(pixels)
    assert list(whole) == list(grid)
    for stage, found in whole.items():
        assert found.shape[1] == prefix + grid[stage][0, 0].numel()
        assert torch.equal(found[:, prefix:].transpose(1, 2), grid[stage].flatten(2))


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "samvit_base_patch16_224"])
def test_tokens_of_a_network_of_maps_are_refused(name):
    with pytest.raises(UsageError, match="no tokens"):
        model(name, structure=True, tokens=True)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("stages", ["stem", "stage2", "stem,stage1,stage4"])
def test_compiled_without_a_graph_break(name, stages):
    backbone = model(name).select(stages)
    pixels, taps = pixels_of(backbone, 1), backbone._measured[0]
    torch._dynamo.reset()
    compiled = torch.compile(lambda batch: backbone.forward(batch, taps), backend="eager", fullgraph=True)
    with torch.inference_mode():
        expected, got = backbone.forward(pixels, taps), compiled(pixels)
    assert list(got) == list(expected)
    assert all(torch.equal(got[stage], expected[stage]) for stage in expected)


def test_gradients_flow_to_the_pixels():
    backbone = model("test_vit").select("stage1")
    pixels = pixels_of(backbone, 1).requires_grad_()
    backbone(pixels)["stage1"].sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().max() > 0


def test_the_same_seed_gives_the_same_weights_and_the_callers_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    digests = [model("test_resnet", seed=seed).weights_digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ("resnet50.a1_in1k", "resnet50.a1_in1k"),
        ("ResNet50.A1-in1k", "resnet50.a1_in1k"),
        ("timm/resnet50.a1_in1k", "hf-hub:timm/resnet50.a1_in1k"),
        ("hf-hub:somebody/model@main", "hf-hub:somebody/model@main"),
        ("resnet5", None),
        ("nothing.at_all", None),
        ("http://x/y", None),
    ],
)
def test_names_beyond_the_list_are_found(text, exact):
    assert find(text) == exact


def test_every_architecture_is_named_and_its_default_weights_come_first():
    assert list(names()) == timm.list_models()
    assert tags("resnet50")[0] == timm.models.get_pretrained_cfg("resnet50").tag
    assert "a1_in1k" in tags("resnet50")
    assert tags("coatnet_0_224") == ()


@pytest.mark.parametrize(
    ("name", "weights", "kind", "message", "hint"),
    [
        ("resnet18.a1_in2k", "random", UsageError, "a1_in2k", "did you mean resnet18.a1_in1k?"),
        ("resnet18", "a2_in9k", UsageError, "a2_in9k", "resnet18.a2_in1k"),
        ("resnet18", "nowhere.pth", WeightsError, "nowhere.pth", "--weights random"),
        ("resnet-eighteen", "random", UsageError, "resnet-eighteen", "bbx models"),
        ("coatnet_0_224", "auto", WeightsError, "publishes no weights", "--weights random"),
        ("local-dir:/nowhere", "random", WeightsError, "/nowhere", "config.json"),
        ("hf-hub:timm/resnet18.a1_in1k", "auto", WeightsError, "resnet18", "hf download timm/resnet18.a1_in1k"),
        ("hf-hub:timm/resnet18.a1_in1k", "auto", WeightsError, "resnet18", "--weights random"),
        ("hf-hub:somebody/net", "random", WeightsError, "somebody/net", "hf download somebody/net config.json"),
        ("hf-hub:timm/resnet18.mine", "random", WeightsError, "resnet18.mine", "then here: local-dir:resnet18.mine"),
        ("resnet18.a1_in1k", "auto", WeightsError, "resnet18.a1_in1k",
         "hf download timm/resnet18.a1_in1k model.safetensors --local-dir resnet18.a1_in1k"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_says_what_works(name, weights, kind, message, hint, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BbxError) as caught:
        model(name, weights)
    assert caught.type is kind
    assert message in caught.value.message
    assert hint in caught.value.hint
    if weights == "random":
        assert "--weights random" not in caught.value.hint, "that was typed already"


def test_how_to_build_what_timm_publishes_needs_no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub, own = (model(name, size=(64, 64)) for name in ("hf-hub:timm/test_resnet.r160_in1k", "test_resnet.r160_in1k"))
    assert (str(hub.ref), hub.weights_digest) == ("timm:hf-hub:timm/test_resnet.r160_in1k", own.weights_digest)
    assert (hub.preprocess, hub.stages) == (own.preprocess, own.stages)
    structure = model("hf-hub:timm/test_resnet.r160_in1k", "auto", structure=True)
    assert structure.preprocess == model("test_resnet.r160_in1k", structure=True).preprocess
    torch.save(own.network.state_dict(), tmp_path / "w.pth")
    assert model("hf-hub:timm/test_resnet.r160_in1k", tmp_path / "w.pth").weights_digest == own.weights_digest


@pytest.mark.parametrize(
    ("options", "word"), [({"features_only": True}, "features_only"), ({"no_such_option": 1}, "no_such_option")]
)
def test_options_are_timms_own_arguments(options, word):
    assert model("test_vit", structure=True, options={"depth": 2}).stage_names == ("stem", "stage1", "stage2")
    with pytest.raises(UsageError, match=word):
        model("resnet18", structure=True, options=options)


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("resnet18", (100, 130), (4, 5)),
        ("vit_tiny_patch16_224", (224, 320), (14, 20)),
        ("swin_tiny_patch4_window7_224", (256, 320), (8, 10)),
    ],
)
def test_another_size(name, size, grid):
    backbone = model(name, structure=True, size=size)
    assert backbone.preprocess.size == size
    assert backbone.stages[-1].shape[1:] == grid


@pytest.mark.parametrize(
    ("name", "size", "near"),
    [
        ("hiera_tiny_224", 250, "--size 256"),
        pytest.param("maxvit_pico_rw_256", 250, "--size 256", marks=pytest.mark.slow),
    ],
)
def test_a_size_that_a_network_cannot_take_names_the_nearest_that_it_can(name, size, near):
    with pytest.raises(UsageError) as caught:
        model(name, structure=True, size=(size, size))
    assert near in caught.value.hint


# Each way in which timm prepares a picture: centre, squash at full size (not square) and at less, border.
@pytest.mark.parametrize(
    "name",
    [
        "resnet50", "vgg11", "vit_base_patch16_sapiens2", "deepseek_vit_412m", "dm_nfnet_f0", "tf_efficientnetv2_b3",
        "vit_medium_patch16_gap_384",
    ],
)  # fmt: skip
@pytest.mark.parametrize("picture", ["chelsea.png", "grace_hopper.jpg"])
def test_preprocessing_is_timms_own_bit_for_bit(name, picture):
    backbone = load(ModelRef("timm", name, "random"), Build(structure=True))
    data = timm.data.resolve_model_data_config(backbone.network)
    upright = ImageOps.exif_transpose(Image.open(SAMPLES / picture)).convert("RGB")
    expected = timm.data.create_transform(**data, is_training=False)(upright)
    pixels = torch.from_numpy(read_image(SAMPLES / picture, backbone.preprocess))[None]
    assert torch.equal(normalise(pixels, backbone.preprocess)[0], expected)
