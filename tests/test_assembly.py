"""Backbone → neck → head from a configuration: any backbone, torchvision's pyramid and heads, files that are wrong."""

import json
from collections import OrderedDict

import pytest
import torch
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import bbx
from bbx.assembly import assemble
from bbx.errors import UsageError, WeightsError
from tests.conftest import EXTRAS

TOY = {"model": "toy", "weights": "random"}
FPN = {
    "neck": {"type": "fpn", "out_channels": 16, "extra": "pool"},
    "head": {"type": "fcn", "num_classes": 5, "in": "p3"},
}
BACKBONES = [
    "torchvision:swin_t",
    *(["timm:resnet18"] * ("timm" in EXTRAS)),
    *(["transformers:microsoft/resnet-18"] * ("transformers" in EXTRAS)),
]
PIXELS = torch.randn(2, 3, 128, 64, generator=torch.Generator().manual_seed(0))


def recipe(model: str = "toy", **parts: object) -> dict[str, object]:
    return {"backbone": {"model": model, "weights": "random"}, **FPN, **parts}


def calls(backbone, pixels: torch.Tensor) -> int:
    """How many modules without children run in one call."""
    backbone(pixels)  # measured beforehand
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_: ran.append(""))
        for module in backbone.network.modules()
        if not list(module.children())
    ]
    backbone(pixels)
    for handle in handles:
        handle.remove()
    return len(ran)


@pytest.mark.parametrize("model", BACKBONES)
def test_a_pyramid_and_a_head_fit_on_any_backbone(model):
    backbone = assemble(recipe(model), size=(128, 64), stages="all")
    widths = {"backbone.stem": 96 if "swin" in model else 64}
    stages = [(stage.name, stage.shape[1:], stage.stride) for stage in backbone.stages]
    assert stages == [
        ("backbone.stem", (32, 16), 4), ("backbone.stage1", (32, 16), 4), ("backbone.stage2", (16, 8), 8),
        ("backbone.stage3", (8, 4), 16), ("backbone.stage4", (4, 2), 32), ("neck.p2", (32, 16), 4),
        ("neck.p3", (16, 8), 8), ("neck.p4", (8, 4), 16), ("neck.p5", (4, 2), 32), ("neck.p6", (2, 1), 64),
        ("head.classifier", (16, 8), 8),
    ]  # fmt: skip
    channels = {stage.name: stage.channels for stage in backbone.stages}
    assert channels["backbone.stem"] == widths["backbone.stem"]
    assert {channels[name] for name in channels if name.startswith("neck.")} == {16}
    assert channels["head.classifier"] == 5


@pytest.mark.parametrize("model", BACKBONES)
def test_the_maps_are_those_of_the_parts_put_together_by_hand(model):
    backbone = assemble(recipe(model), size=(128, 64), stages="all")
    network = backbone.network
    with torch.inference_mode():
        got = backbone(PIXELS)
        names = ("stage1", "stage2", "stage3", "stage4")
        maps = OrderedDict((name, got[f"backbone.{name}"]) for name in names)
        fpn = FeaturePyramidNetwork([one.shape[1] for one in maps.values()], 16, extra_blocks=LastLevelMaxPool())
        fpn.load_state_dict(network.neck.state_dict())
        neck = list(fpn(maps).values())
        head = FCNHead(16, 5).eval()
        head.load_state_dict(network.head.state_dict())
        assert all(torch.equal(one, got[f"neck.p{level}"]) for level, one in enumerate(neck, 2))
        assert torch.equal(head(neck[1]), got["head.classifier"])
        alone = network.inner.select("all")(PIXELS)
    assert all(torch.equal(one, got[f"backbone.{name}"]) for name, one in alone.items())


def test_backbone_stages_never_run_the_neck_nor_the_neck_the_head():
    backbone = assemble(recipe(), size=64)
    pixels = PIXELS[:, :, :64]
    counts = [calls(backbone.select(name), pixels) for name in ("backbone.stage1", "backbone.stage2", "neck.p2", "all")]
    assert counts == sorted(set(counts))
    neck = 2 * 2 + 1  # lateral and output convolutions at each of the two levels, and the pool
    assert counts[2] - counts[1] == neck
    assert counts[3] - counts[2] == len(list(backbone.network.head.children()))


def test_the_neck_needs_only_its_own_stages():
    given = {"model": "torchvision:resnet18", "weights": "random", "stages": ["stage1", "stage2"]}
    backbone = assemble({"backbone": given, "neck": {"type": "fpn", "extra": "none"}}, size=64)
    assert backbone.stage_names[-2:] == ("neck.p2", "neck.p3")
    assert calls(backbone.select("neck.p2"), PIXELS) < calls(backbone.select("backbone.stage3"), PIXELS)


def test_levels_of_one_stride_are_told_apart():
    given = {"model": "torchvision:mobilenet_v2", "weights": "random", "out_indices": [0, 1, 2]}
    backbone = assemble({"backbone": given, "neck": {"extra": "p6p7"}}, size=128)
    assert backbone.stage_names[-5:] == ("neck.p1", "neck.p1_2", "neck.p2", "neck.p3", "neck.p4")
    assert [stage.stride for stage in backbone.select("neck.p1..neck.p4").stages] == [2, 2, 4, 8, 16]


def test_a_head_without_a_neck_takes_a_stage():
    backbone = assemble({"backbone": TOY, "head": {"type": "deeplab", "num_classes": 3, "in": "stage2"}}, size=64)
    assert backbone.stages[0].shape == (3, 8, 8)
    assert not any(name.startswith("neck.") for name in backbone.stage_names)


def test_the_seed_is_that_of_neck_and_head_and_the_callers_generator_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    digests = [assemble(recipe(), size=64, seed=seed).weights_digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(before, torch.get_rng_state())


def test_the_structure_needs_no_weights():
    backbone = assemble({**recipe(), "backbone": {"model": "toy"}}, size=64, structure=True)
    assert next(backbone.network.parameters()).is_meta
    assert [stage.shape for stage in backbone.stages] == [
        stage.shape for stage in assemble(recipe(), size=64, stages="all").stages
    ]


def test_layers_by_path_are_read_beside_the_roles():
    backbone = assemble(recipe(), size=64, stages="neck.p2", layers="head.0,backbone.relu")
    got = backbone(PIXELS[:, :, :64])
    assert set(got) == {"neck.p2", "head.0", "backbone.relu"}


def test_gradients_reach_the_backbone():
    backbone = assemble(recipe(), size=64, stages="head.classifier")
    backbone(PIXELS)["head.classifier"].sum().backward()
    assert backbone.network.backbone.stem.weight.grad.abs().sum() > 0


YAML = """
backbone: {model: toy, weights: random, stages: [stage1, stage2], seed: 0}
neck: {type: fpn, out_channels: 16, extra: pool}
head: {type: fcn, num_classes: 5, in: p3}
"""
TOML = """
[backbone]
model = "toy"
weights = "random"
stages = ["stage1", "stage2"]
[neck]
out_channels = 16
extra = "pool"
[head]
type = "fcn"
num_classes = 5
in = "p3"
"""


def test_a_file_says_the_same_in_every_notation(tmp_path):
    mapping = recipe(backbone={**TOY, "stages": ["stage1", "stage2"]})
    texts = {"my.toml": TOML, "my.json": json.dumps(mapping)} | {"my.yaml": YAML}
    expected = assemble(mapping, size=64)
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        backbone = assemble(tmp_path / name, size=64)
        assert backbone.config == expected.config
        assert backbone.weights_digest == expected.weights_digest
    assert json.loads(expected.config)["out_channels"] == 16


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gone.toml", None, "No such file"),
        ("bad.toml", "[neck\n", "line 1"),
        ("bad.json", '{\n"neck": }', "line 2"),
        ("list.json", "[1]", "holds a list"),
        ("my.txt", "neck", "neither .yaml"),
        ("bad.yaml", "neck: {\n  a: ]", "line 2"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as caught:
        assemble(tmp_path / name)
    assert words in caught.value.message
    assert name in caught.value.message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"backbon": {}}, "did you mean backbone?"),
        ({"backbone": {"model": "resnet18", "weight": "random"}}, "did you mean weights?"),
        (recipe(neck={"type": "fpm"}), "did you mean fpn?"),
        (recipe(neck={"out_channels": "16"}), "not a whole number"),
        (recipe(neck={"out_channels": 0}), "positive"),
        (recipe(neck=[1]), "not keys and values"),
        (recipe(head={"type": "fcn", "in": "p9"}), "valid: p2, p3"),
        (recipe(head={"type": "fcn", "num_classes": True}), "not a whole number"),
        (recipe(backbone={**TOY, "stages": ["stage2", "stage1"]}), "network's order"),
        (recipe(backbone={**TOY, "stages": ["stage9"]}), "valid stages"),
        (recipe(backbone={**TOY, "stages": ["stage2"]}), "two levels"),
        (recipe(backbone={**TOY, "stages": "all"}), "not a list"),
        (recipe(backbone={"model": "resnet18", "stages": ["stage1"], "out_indices": [1]}), "both"),
        (recipe(backbone={}), "names no backbone"),
        (recipe(backbone={"model": "resnet-5o", "weights": "random"}), "resnet-50"),
        ({"model": "fasterrcnn_resnet50_fpn", "backbone": {"model_type": "resnet"}}, "built on resnet50 only"),
    ],
)  # fmt: skip
def test_a_configuration_that_is_wrong_says_what_would_be_right(config, words):
    with pytest.raises(UsageError) as caught:
        assemble(config, size=64)
    assert words in f"{caught.value.message} {caught.value.hint}"


def test_weights_that_cannot_be_had_are_an_error_and_not_random_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsError):
        assemble({"backbone": {"model": "torchvision:resnet18"}, "neck": {}})


def test_what_the_configuration_says_is_recorded_and_another_one_is_another_run(bbx_cli, pictures, tmp_path):
    text = "backbone: {model: resnet18, weights: random}\nneck: {type: fpn, out_channels: 8}\n"
    (tmp_path / "my.yaml").write_text(text)
    words = ("extract", "--config", "my.yaml", "--stages", "backbone.stage2,neck.p3", "--size", "64", "-q", pictures)
    ran = bbx_cli(*words)
    assert ran.code == 0, ran.err
    with bbx.open(tmp_path / "features.h5") as file:
        assert [(stage.name, stage.shape) for stage in file.stages.values()] == [
            ("backbone.stage2", (128, 8, 8)),
            ("neck.p3", (8, 8, 8)),
        ]
        recorded = json.loads(file.run.config)
    assert (recorded["model"], recorded["out_channels"]) == ("resnet18", 8)
    assert bbx_cli(*words).code == 0
    (tmp_path / "my.yaml").write_text(text.replace("8}", "8, extra: pool}"))
    other = bbx_cli(*words)
    assert other.code == 3
    assert "config" in other.err


def test_a_model_beside_a_pyramid_is_told_where_it_belongs(bbx_cli, tmp_path):
    (tmp_path / "my.json").write_text('{"backbone": {"model": "toy"}, "neck": {"type": "fpn"}}')
    ran = bbx_cli("stages", "resnet18", "--config", "my.json")
    assert ran.code == 2
    assert "backbone: {model: resnet-18}" in ran.err
    (tmp_path / "my.yaml").write_text("backbone: resnet-18")
    assert "backbone: {model: resnet-18}" in bbx_cli("stages", "--config", "my.yaml").err
    (tmp_path / "my.yaml").write_text("backbone: [")
    assert bbx_cli("stages", "--config", "my.yaml").err.count("cannot be parsed") == 1


def test_a_configuration_excludes_what_it_says_itself(bbx_cli, pictures, tmp_path):
    (tmp_path / "my.json").write_text('{"backbone": {"model": "resnet18", "weights": "random"}}')
    for option in (("--weights", "random"), ("--tokens",)):
        ran = bbx_cli("extract", "--config", "my.json", *option, pictures)
        assert ran.code == 2
        assert "--config" in ran.err
    listed = json.loads(bbx_cli("stages", "--config", "my.json", "--size", "64", "--json").out)
    assert [stage["name"] for stage in listed["stages"]][:3] == ["backbone.stem", "backbone.stage1", "backbone.stage2"]


def test_an_explicit_seed_of_the_backbone_wins():
    explicit = {**TOY, "seed": 0}
    by_seed = {
        (given.get("seed"), seed): assemble({"backbone": given}, size=64, seed=seed).weights_digest
        for given in (TOY, explicit)
        for seed in (0, 1)
    }
    assert by_seed[0, 0] == by_seed[0, 1] == by_seed[None, 0] != by_seed[None, 1]


def test_another_spelling_of_a_path_is_the_same_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(bbx.load_backbone("resnet18", weights="random").network.state_dict(), "r18.pth")
    monkeypatch.setenv("HOME", str(tmp_path))
    configs = {
        weights: assemble({"backbone": {"model": "resnet18", "weights": weights}, "neck": {}}, size=64).config
        for weights in ("r18.pth", "./r18.pth", "~/r18.pth", str(tmp_path / "r18.pth"))
    }
    assert configs["r18.pth"] == configs["./r18.pth"]
    assert configs["~/r18.pth"] == configs[str(tmp_path / "r18.pth")]


def test_what_the_backbone_was_built_from_is_recorded():
    given = {"model": "torchvision:resnet18", "weights": "random", "options": {"width_per_group": 64}}
    recorded = json.loads(assemble({"backbone": given, "neck": {}}, size=64).config)
    assert recorded["built_from"] == {"width_per_group": 64}


def test_random_parts_are_named_in_the_label():
    backbone = assemble(recipe(), size=64)
    assert backbone.weights.endswith(", fpn and fcn random (seed 0)")
