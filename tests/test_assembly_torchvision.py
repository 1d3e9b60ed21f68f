"""torchvision's detection and segmentation models by role: shapes, values, early exit, published weights."""

import re
from pathlib import Path

import pytest
import torch
import torchvision

from bbx.errors import UsageError, WeightsError
from bbx.providers.torchvision_tasks import TASKS, load, names
from bbx.spec import Build, ModelRef
from bbx.stages import storable_name
from tests.test_assembly import calls

PIXELS = torch.randn(2, 3, 128, 96, generator=torch.Generator().manual_seed(0))


def loaded(name: str, weights: str = "random", **build: object):
    return load(ModelRef("torchvision", name, weights), Build(**{"size": (128, 96), **build}))


def truth(network: torch.nn.Module, name: str, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Roles by torchvision's own calls, one after the other."""
    body = network.backbone.body(pixels)
    fpn = network.backbone.fpn(body)
    found = {f"backbone.stage{number}": one for number, one in enumerate(body.values(), 5 - len(body))}
    found |= {f"neck.p{level}": one for level, one in enumerate(fpn.values(), 6 - len(body))}
    assert name == "fasterrcnn_resnet50_fpn"
    logits, boxes = network.rpn.head(list(fpn.values()))
    for level, (one, other) in enumerate(zip(logits, boxes, strict=True), 2):
        found |= {f"head.rpn.cls_logits.p{level}": one, f"head.rpn.bbox_pred.p{level}": other}
    return found


def test_faster_rcnn_is_read_as_torchvision_computes_it():
    backbone = loaded("fasterrcnn_resnet50_fpn").select("all")
    with torch.inference_mode():
        got, expected = backbone(PIXELS), truth(backbone.network, "fasterrcnn_resnet50_fpn", PIXELS)
        own = torchvision.models.get_model("fasterrcnn_resnet50_fpn", weights=None, weights_backbone=None).eval()
        own.load_state_dict(backbone.network.state_dict())  # every parameter is the model's own
        assert torch.equal(own.backbone(PIXELS)["0"], got["neck.p2"])
    assert set(got) == {"backbone.stem", *expected}
    assert all(torch.equal(got[name], one) for name, one in expected.items())
    assert [(s.shape, s.stride) for s in backbone.stages if s.name == "neck.p4"] == [((256, 8, 6), 16)]


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("deeplabv3_mobilenet_v3_large", {"out": "stage5"}),
        pytest.param("deeplabv3_resnet50", {"out": "stage4", "aux": "stage3"}, marks=pytest.mark.slow),
    ],
)
def test_deeplab_is_read_as_torchvision_computes_it(name, stages):
    backbone = loaded(name).select("all")
    with torch.inference_mode():
        got, maps = backbone(PIXELS), backbone.network.backbone(PIXELS)
        whole = backbone.network(PIXELS)
        assert all(torch.equal(got[f"backbone.{stage}"], maps[key]) for key, stage in stages.items())
        for role, key in (("head.classifier", "out"), ("head.aux_classifier", "aux")):
            full = torch.nn.functional.interpolate(got[role], size=(128, 96), mode="bilinear", align_corners=False)
            assert torch.equal(full, whole[key])
    dilated = 8 if "resnet" in name else 16
    strides = {stage.name: stage.stride for stage in backbone.stages}
    assert (strides[f"backbone.{stages['out']}"], strides["head.classifier"]) == (dilated, dilated)


@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_fpn", "lraspp_mobilenet_v3_large"])
def test_nothing_past_the_deepest_role_runs(name):
    backbone = loaded(name)
    roles = ["backbone.stem", "backbone.stage3", "backbone.stage5"]
    roles += ["neck.p5"] * ("neck.p5" in backbone.stage_names)
    counts = [calls(backbone.select(role), PIXELS) for role in (*roles, backbone.stage_names[-1])]
    assert counts == sorted(set(counts))
    inner = {name for name, _ in backbone.network.named_modules() if name.startswith("backbone.")}
    assert counts[-1] > counts[-2]
    assert counts[roles.index("backbone.stage5")] <= len(inner)


@pytest.mark.parametrize(
    ("name", "eps"),
    [
        ("fasterrcnn_mobilenet_v3_large_320_fpn", 1e-5),
        pytest.param("fasterrcnn_resnet50_fpn", 0.0, marks=pytest.mark.slow),
    ],
)
def test_the_frozen_batch_norms_of_published_weights_are_kept(name, eps, tmp_path, monkeypatch):
    # A random state dict under the official name is, for torchvision, the official one.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    member = torchvision.models.get_model_weights(name).DEFAULT
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    cached = tmp_path / "hub" / "checkpoints" / Path(member.url).name
    cached.parent.mkdir(parents=True)
    torch.save(state, cached)
    own = torchvision.models.get_model(name, weights=member, weights_backbone=None).eval()
    backbone = loaded(name, "auto").select("neck.p5")
    assert backbone.weights == member.name
    norms = [one for one in backbone.network.backbone.body.modules() if "BatchNorm" in type(one).__name__]
    assert {(type(one).__name__, one.eps) for one in norms} == {("FrozenBatchNorm2d", eps)}
    with torch.inference_mode():
        expected = own.backbone(PIXELS)["3" if "resnet" in name else "0"]
        assert torch.equal(backbone(PIXELS)["neck.p5"], expected)


@pytest.mark.parametrize(
    ("name", "old"),
    [
        ("fasterrcnn_mobilenet_v3_large_320_fpn", 5),
        pytest.param("maskrcnn_resnet50_fpn", 13, marks=pytest.mark.slow),
        pytest.param("retinanet_resnet50_fpn", 14, marks=pytest.mark.slow),
    ],
)
def test_the_old_names_in_published_detection_files_are_understood(name, old, tmp_path):
    torch.manual_seed(0)
    builder = {"weights": None, "weights_backbone": None}
    model = torchvision.models.get_model(name, **builder)

    def before(key: str) -> str:
        key = re.sub(r"(fpn\.(?:inner|layer)_blocks\.\d+)\.0\.(weight|bias)$", r"\1.\2", key)
        key = re.sub(r"(rpn\.head\.conv)\.0\.0\.(weight|bias)$", r"\1.\2", key)
        key = re.sub(r"(mask_head)\.(\d)\.0\.(\w+)$", lambda m: f"{m[1]}.mask_fcn{int(m[2]) + 1}.{m[3]}", key)
        return re.sub(r"(head\.\w+_head\.conv)\.(\d)\.0\.(\w+)$", lambda m: f"{m[1]}.{2 * int(m[2])}.{m[3]}", key)

    state = {before(key): value for key, value in model.state_dict().items()}
    assert len({key.rpartition(".")[0] for key in set(state) - set(model.state_dict())}) == old
    torchvision.models.get_model(name, **builder).load_state_dict(state)  # whose names torchvision understands
    torch.save(model.state_dict(), tmp_path / "new.pth")
    torch.save(state, tmp_path / "old.pth")
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "parallel.pth")
    new, *older = (loaded(name, str(tmp_path / file)) for file in ("new.pth", "old.pth", "parallel.pth"))
    assert {one.weights_digest for one in older} == {new.weights_digest}
    assert {one.untrained for one in (new, *older)} == {()}


def test_a_file_with_other_classes_leaves_out_the_roles_that_it_does_not_fit(tmp_path):
    model = torchvision.models.get_model(
        "lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=4
    )
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    backbone = loaded("lraspp_mobilenet_v3_large", str(tmp_path / "mine.pth"))
    assert not any(name.startswith("head.") for name in backbone.stage_names)
    assert "classifier" in " ".join(backbone.notes)
    with pytest.raises(WeightsError, match="do not fit"):
        backbone.select(layers="classifier.low_classifier")
    options = {"num_classes": 4}
    fitting = load(
        ModelRef("torchvision", "lraspp_mobilenet_v3_large", str(tmp_path / "mine.pth")),
        Build(size=(64, 64)),
        config={"options": options},
    )
    assert fitting.select("head.classifier").stages[0].shape == (4, 8, 8)


def test_preprocessing_is_the_detectors_own_and_stated():
    sizes = {name: loaded(name, size=None, structure=True).preprocess for name in ("fcos_resnet50_fpn", "ssd300_vgg16")}
    assert (sizes["fcos_resnet50_fpn"].size, sizes["fcos_resnet50_fpn"].mode) == ((800, 800), "pad")
    assert (sizes["ssd300_vgg16"].size, sizes["ssd300_vgg16"].mode) == ((300, 300), "squash")
    assert sizes["ssd300_vgg16"].std == pytest.approx((1 / 255,) * 3)


def test_an_unknown_model_is_named_with_the_nearest():
    with pytest.raises(UsageError, match="no task model") as caught:
        loaded("fasterrcnn_resnet51_fpn")
    assert "fasterrcnn_resnet50_fpn" in caught.value.hint


LEVELS = {  # the pyramid's levels, and the strides that their names stand for
    "rcnn_resnet": ("p2", "p3", "p4", "p5", "p6"),
    "rcnn_mobilenet": ("p5", "p5_2", "p6"),
    "retinanet": ("p3", "p4", "p5", "p6", "p7"),
    "fcos": ("p3", "p4", "p5", "p6", "p7"),
    "ssd300": ("p3", "p4", "p5", "p6", "p6_2", "p6_3"),
    "ssdlite": ("p4", "p5", "p6", "p7", "p8", "p9"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_every_model_gives_its_roles(name):
    backbone = loaded(name, size=(512, 512), structure=True).select("all")
    levels = next((levels for key, levels in LEVELS.items() if all(part in name for part in key.split("_"))), ())
    roles = [stage.name for stage in backbone.stages]
    assert [role.removeprefix("neck.") for role in roles if role.startswith("neck.")] == list(levels)
    assert roles[0] == "backbone.stem"
    assert any(role.startswith("head.") for role in roles)
    for stage in backbone.stages:
        if level := stage.name.partition(".p")[2]:
            rows = 512 / 2 ** int(level.partition("_")[0])
            assert "_" in level or abs(stage.shape[1] - rows) <= 1


def test_every_row_of_the_table_is_used():
    import re

    assert all(any(re.fullmatch(task.pattern, name) for name in names()) for task in TASKS)
    assert all(sum(bool(re.fullmatch(task.pattern, name)) for task in TASKS) == 1 for name in names())
    assert len(names()) == 18


def test_every_role_can_be_stored_under_its_own_name():
    roles = {outlet.name.replace("*", "6_2") for task in TASKS for outlet in task.outlets}
    assert {role for role in roles if storable_name(role) != role} == set()


def test_options_are_recorded():
    texts = [
        loaded("lraspp_mobilenet_v3_large", structure=True, options=options).config
        for options in ({}, {"num_classes": 4})
    ]
    assert texts == ["", '{"model": "lraspp_mobilenet_v3_large", "options": {"num_classes": 4}}']
