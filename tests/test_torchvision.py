"""torchvision: every model's stages as measured for the reference, values as in its own full forward."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

import bbx
from bbx.errors import UsageError, WeightsError
from bbx.providers import list_models, load_backbone, load_structure, resolve
from bbx.providers.torchvision import FAMILIES, names
from bbx.weights import digest

REFERENCE = json.loads((Path(__file__).parent / "goldens" / "torchvision_stages.json").read_text())
# One model of each row of the table; the smallest that its family has.
FAMILY_MODELS = (
    "alexnet", "vgg11_bn", "squeezenet1_0", "squeezenet1_1", "densenet121", "resnet18", "googlenet", "inception_v3",
    "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5", "regnet_y_400mf",
    "efficientnet_b0", "efficientnet_v2_s", "efficientnet_v2_m", "convnext_tiny", "swin_t", "maxvit_t", "vit_b_32",
)  # fmt: skip


def test_the_reference_holds_every_classification_model():
    assert sorted(REFERENCE) == sorted(names())
    assert len(REFERENCE) == 80


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(REFERENCE))
def test_stages_and_preprocessing_are_those_of_the_reference(name):
    expected = REFERENCE[name]
    backbone = load_structure(name, size=(expected["input"], expected["input"]))
    assert [(stage.name, stage.module, stage.shape) for stage in backbone.stages] == [
        (stage["name"], stage["module"], (stage["channels"], *stage["hw"])) for stage in expected["stages"]
    ]
    expected, preprocess = expected["preprocess"], load_structure(name).preprocess
    assert (list(preprocess.size[:1]), [preprocess.resize]) == (expected["crop"], expected["resize"])
    assert (list(preprocess.mean), list(preprocess.std)) == (expected["mean"], expected["std"])
    assert preprocess.interpolation == expected["interpolation"]


def test_every_row_of_the_table_is_tried_below():
    import re

    rows = [family.pattern for family in FAMILIES]
    tried = {next(row for row in rows if re.fullmatch(row, name)) for name in FAMILY_MODELS}
    assert sorted(tried) == sorted(rows)


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_values_are_the_modules_own_in_a_full_forward(name):
    size = REFERENCE[name]["input"]
    backbone = load_backbone(name, weights="random", stages="all", size=size)
    assert [stage.shape for stage in backbone.stages] == [
        (stage["channels"], *stage["hw"]) for stage in REFERENCE[name]["stages"]
    ]
    torch.manual_seed(1)
    pixels = torch.randn(2, 3, size, size)
    truth: dict[str, torch.Tensor] = {}
    handles = [
        backbone.network.get_submodule(stage.module).register_forward_hook(
            lambda _m, _i, output, name=stage.name: truth.__setitem__(name, output.clone())
        )
        for stage in backbone.stages
    ]
    with torch.inference_mode():
        backbone.network(pixels)
        for handle in handles:
            handle.remove()
        got, alone = backbone(pixels), backbone(pixels[:1])
    for name, value in truth.items():
        if got[name].shape != value.shape:  # undo the layout: NHWC, or tokens behind a class token
            value = value.permute(0, 3, 1, 2) if value.ndim == 4 else value[:, 1:].transpose(1, 2).view_as(got[name])
        assert torch.equal(got[name], value)
        assert (alone[name] - got[name][:1]).abs().max() <= 1e-5 * got[name].abs().max()


def test_swin_tiny_at_224_is_what_the_readme_says():
    stages = load_backbone("swin-tiny", weights="random", stages=[0, 1, 2]).stages
    assert [stage.shape for stage in stages] == [(96, 56, 56), (96, 56, 56), (192, 28, 28)]
    assert [stage.stride for stage in stages] == [4, 4, 8]


def test_strides_are_exact_where_border_rounding_blurs_the_ratio():
    strides = {name: [stage.stride for stage in load_structure(name).stages] for name in ("alexnet", "inception_v3")}
    assert strides == {"alexnet": [4, 8, 16], "inception_v3": [2, 4, 8, 16, 32]}


@pytest.mark.parametrize(
    ("text", "provider", "name"),
    [
        ("swin-tiny", "torchvision", "swin_t"),
        ("Swin_T", "torchvision", "swin_t"),
        ("ResNet-50", "torchvision", "resnet50"),
        ("torchvision:vit-base-16", "torchvision", "vit_b_16"),
        ("regnet-x-1-6gf", "torchvision", "regnet_x_1_6gf"),
        ("regnet_x_16gf", "torchvision", "regnet_x_16gf"),
        ("EFFICIENTNET-LITE0", "packaged", "efficientnet-lite0"),
    ],
)
def test_names_forgive_case_and_separators(text, provider, name):
    assert (resolve(text).provider, resolve(text).name) == (provider, name)


@pytest.mark.parametrize(
    ("text", "near"),
    [("swin-tinny", "swin-tiny"), ("resnet-5o", "resnet-50"), ("torchvison:swin_t", "torchvision:swin_t"),
     ("regnetx16gf", "regnet_x_1_6gf")],
)  # fmt: skip
def test_an_unknown_model_is_named_with_the_nearest(text, near):
    with pytest.raises(UsageError) as caught:
        resolve(text)
    assert near in caught.value.hint


def test_the_same_seed_gives_the_same_weights_and_the_callers_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    digests = [load_backbone("resnet18", weights="random", seed=seed).weights_digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(before, torch.get_rng_state())


def test_weights_that_cannot_be_had_say_what_works_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        load_backbone("swin-tiny")
    assert "Swin_T_Weights.IMAGENET1K_V1" in caught.value.message
    for words in ("curl -LO https://", "--weights swin_t-704ceda3.pth", "--weights random", "efficientnet-lite0"):
        assert words in caught.value.hint


def test_an_unknown_enum_member_is_named_with_the_valid_ones():
    with pytest.raises(UsageError) as caught:
        load_backbone("resnet50", weights="IMAGENET1K_V3")
    assert "IMAGENET1K_V2" in caught.value.hint


def test_cached_weights_are_used_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    member = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    cached = tmp_path / "hub" / "checkpoints" / Path(member.url).name
    cached.parent.mkdir(parents=True)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), cached)
    for wish in ("auto", "IMAGENET1K_V1", "resnet18_weights.imagenet1k_v1"):
        assert load_backbone("resnet18", weights=wish).weights == "IMAGENET1K_V1"


QUICK = ("mnasnet0_5", "swin_t", "maxvit_t")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILY_MODELS]
)
def test_a_network_that_was_built_without_values_has_those_of_the_file(tmp_path, name):
    random, path = load_backbone(name, weights="random", seed=5), tmp_path / "w.safetensors"
    save_file({name: value.contiguous() for name, value in random.network.state_dict().items()}, path)
    trained = load_backbone(name, weights=str(path))
    path.write_bytes(bytes(path.stat().st_size))  # it may have been mapped into memory
    assert digest(trained.network) == digest(random.network)
    assert [p.requires_grad for p in trained.network.parameters()] == [
        p.requires_grad for p in random.network.parameters()
    ]


def test_a_file_in_half_precision_and_without_a_classifier_is_filled_up_by_the_seed(tmp_path):
    random, path = load_backbone("resnet18", weights="random", seed=5).network.state_dict(), tmp_path / "w.pth"
    halves = {name: value.half() for name, value in random.items() if not name.startswith("fc.")}
    halves["conv1.weight"] = halves["conv1.weight"].contiguous(memory_format=torch.channels_last)
    torch.save(halves, path)
    trained = load_backbone("resnet18", weights=str(path), seed=5).network.state_dict()
    assert {value.dtype for value in trained.values()} == {torch.float32, torch.int64}
    assert all(value.is_contiguous() for value in trained.values())
    assert torch.equal(trained["fc.weight"], random["fc.weight"])
    assert torch.equal(trained["layer4.1.conv2.weight"], halves["layer4.1.conv2.weight"].float())
    torch.save({**halves, "fc.weight": random["fc.weight"], "fc.bias": random["fc.bias"]}, path)
    whole = load_backbone("resnet18", weights=str(path)).network.state_dict()
    assert {value.dtype for value in whole.values()} == {torch.float32, torch.int64}
    assert all(value.is_contiguous() for value in whole.values())


def test_the_old_names_in_published_densenet_files_are_understood(tmp_path):
    import re

    network = torchvision.models.densenet121(weights=None)
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", k): v for k, v in network.state_dict().items()}
    assert any(".norm.1." in name for name in old)
    torch.save(old, tmp_path / "densenet.pth")
    loaded = load_backbone("densenet121", weights=str(tmp_path / "densenet.pth")).network
    assert torch.equal(loaded.features.denseblock1.denselayer1.conv1.weight,
                       network.features.denseblock1.denselayer1.conv1.weight)  # fmt: skip


def test_an_official_file_by_its_name_is_that_enums(tmp_path):
    # The published GoogLeNet weights want the input normalised once more, inside the model.
    name = Path(torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1.url).name
    network = torchvision.models.googlenet(weights=None, init_weights=False)
    for path in (tmp_path / name, tmp_path / "mine.pth"):
        torch.save(network.state_dict(), path)
    official, mine = (load_backbone("googlenet", weights=str(tmp_path / file)) for file in (name, "mine.pth"))
    assert (official.network.transform_input, mine.network.transform_input) == (True, False)
    assert official.weights_digest != mine.weights_digest


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_old_names_in_published_vit_files_are_understood(tmp_path, prefix):
    network = torchvision.models.vit_b_32(weights=None)
    old = {
        name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): value
        for name, value in network.state_dict().items()
    }
    assert sum("linear_" in name for name in old) == 48
    torchvision.models.vit_b_32(weights=None).load_state_dict(old)  # whose names torchvision understands
    torch.save({f"{prefix}{name}": value for name, value in old.items()}, tmp_path / "vit.pth")
    assert load_backbone("vit_b_32", weights=str(tmp_path / "vit.pth")).weights_digest == digest(network)


def test_a_vit_takes_another_size_by_interpolating_its_position_embedding(tmp_path):
    torch.save(torchvision.models.vit_b_32(weights=None).state_dict(), tmp_path / "vit.pth")
    backbone = load_backbone("vit_b_32", weights=str(tmp_path / "vit.pth"), stages="stage1", size=320)
    assert backbone.stages[0].shape == (768, 10, 10)
    assert backbone.stages[0].stride == 32


@pytest.mark.parametrize("shape", [(1, 48, 768), (50, 768), (2, 50, 768)])
def test_a_position_embedding_that_is_none_of_a_square_does_not_fit(tmp_path, shape):
    state = torchvision.models.vit_b_32(weights=None).state_dict() | {"encoder.pos_embedding": torch.zeros(shape)}
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(WeightsError, match=r"1 of another shape \(encoder\.pos_embedding\)"):
        load_backbone("vit_b_32", weights=str(tmp_path / "vit.pth"))


@pytest.mark.parametrize(
    ("name", "size", "words"), [("vit_b_32", 250, "--size 224"), ("vit_b_32", (224, 320), "one number")]
)
def test_a_size_that_a_model_cannot_take_is_a_usage_error(name, size, words):
    with pytest.raises(UsageError) as caught:
        load_backbone(name, weights="random", size=size)
    assert words in caught.value.hint


def test_models_are_listed_with_aliases_weights_and_parameters():
    swin = list_models("torchvision:swin_t")[0]
    assert (swin["name"], swin["alias"], swin["weights"]) == ("swin_t", "swin-tiny", ["IMAGENET1K_V1"])
    assert (swin["parameters"], swin["stride"], swin["stages"]) == (28288354, 32, 5)
    assert {model["name"] for model in list_models("regnet_x_1_6gf")} == {"regnet_x_1_6gf"}


def test_a_model_is_loaded_without_the_compiler_which_comes_once_it_is_asked_for():
    code = """
import sys
import bbx
bbx.load_backbone("resnet18", weights="random").stages
assert "torchvision.ops" in sys.modules
assert "torch._dynamo" not in sys.modules
from torchvision.ops import roi_align
supported = roi_align.__globals__["is_compile_supported"]
assert supported("meta") is False
import torch._dynamo.utils as real
assert supported is not real.is_compile_supported
assert supported("cpu") == real.is_compile_supported("cpu")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_whoever_wants_more_of_the_compiler_meanwhile_gets_it(tmp_path):
    (tmp_path / "torchvision.py").write_text("from torch._dynamo.utils import is_compile_supported, same\n")
    code = """
from bbx.providers.postponed import import_torchvision
import_torchvision()
import torchvision

import bbx
import torch._dynamo.utils as real
assert torchvision.same is real.same
assert torchvision.is_compile_supported("cpu") == real.is_compile_supported("cpu")
"""
    path = os.pathsep.join([str(tmp_path), str(Path(bbx.__file__).parents[1])])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})
