"""timm's weights: from the Hugging Face cache, from folders and files, and never by running their code."""

import json
import pickle
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from bbx.auto import AutoBackbone
from bbx.backbone import Backbone
from bbx.errors import UsageError, WeightsError
from bbx.providers.timm import find, load
from bbx.spec import Build, ModelRef
from bbx.weights import digest


def model(name: str, weights: str | Path = "auto", **build: Any) -> Backbone:
    return load(ModelRef("timm", name, str(weights)), Build(**build))


@pytest.fixture
def trained() -> torch.nn.Module:
    """A network whose weights are no seed's."""
    torch.manual_seed(77)
    return timm.create_model("test_resnet.r160_in1k")


@pytest.fixture
def cached(trained, monkeypatch, tmp_path) -> str:
    """The hub id of a model in this machine's Hugging Face cache."""
    root = tmp_path / "hub" / "models--timm--test_resnet.r160_in1k"
    snapshot = root / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    timm.models.save_for_hf(trained, snapshot, safe_serialization=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return "timm/test_resnet.r160_in1k"


def test_the_cache_of_the_hub_is_enough(cached, trained):
    for name, label in (
        (f"hf-hub:{cached}", cached), ("test_resnet.r160_in1k", "r160_in1k"), ("test_resnet", "r160_in1k"),
    ):  # fmt: skip
        backbone = model(name)
        assert (backbone.weights, backbone.weights_digest) == (label, digest(trained))
    assert model("test_resnet", "r160_in1k").weights == "r160_in1k"
    assert model(f"hf-hub:{cached}", structure=True).weights_digest == ""
    with pytest.raises(UsageError, match="one set of weights"):
        model(f"hf-hub:{cached}", "a1_in1k")


def test_a_folder_that_timm_saved(trained, tmp_path):
    timm.models.save_for_hf(trained, tmp_path / "saved", safe_serialization=True)
    assert find(str(tmp_path / "saved")) == f"local-dir:{tmp_path / 'saved'}"
    backbone = model(f"local-dir:{tmp_path / 'saved'}")
    assert backbone.weights_digest == digest(trained)
    assert str(tmp_path / "saved") in backbone.weights
    (tmp_path / "saved" / "model.safetensors").unlink()
    (tmp_path / "saved" / "pytorch_model.bin").unlink(missing_ok=True)
    with pytest.raises(WeightsError, match="No suitable checkpoints") as caught:
        model(f"local-dir:{tmp_path / 'saved'}")
    assert "model.safetensors" in caught.value.hint


@pytest.mark.parametrize("file", ["w.safetensors", "w.pth"])
def test_a_file_of_ones_own(trained, tmp_path, file):
    state = trained.state_dict()
    save_file(state, tmp_path / file) if file.endswith("safetensors") else torch.save(
        {"state_dict": state}, tmp_path / file
    )
    backbone = model("test_resnet", tmp_path / file)
    assert (backbone.weights, backbone.untrained, backbone.weights_digest) == (f"file {file}", (), digest(trained))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("average", ["state_dict_ema", "model_ema"])
def test_of_a_training_checkpoint_the_averaged_weights_are_taken_as_timm_takes_them(trained, tmp_path, average, prefix):
    state = {f"{prefix}{name}": value for name, value in trained.state_dict().items()}
    zeros = {name: torch.zeros_like(value) for name, value in state.items()}
    # As timm's train.py writes it, its arguments included.
    torch.save({"arch": "x", "state_dict": zeros, "args": Namespace(lr=0.1), average: state}, tmp_path / "last.pth.tar")
    own = timm.create_model("test_resnet", checkpoint_path=str(tmp_path / "last.pth.tar"))
    backbone = model("test_resnet", tmp_path / "last.pth.tar")
    assert backbone.weights_digest == digest(own) == digest(trained)
    assert backbone.notes == (f"file last.pth.tar holds {average} and state_dict: {average} is taken, as timm does",)
    torch.save({average: None, "state_dict": state}, tmp_path / "one.pth")
    alone = model("test_resnet", tmp_path / "one.pth")
    assert (alone.weights_digest, alone.notes) == (digest(trained), ())


def test_a_file_with_another_classifier_still_fits(tmp_path):
    other = timm.create_model("test_resnet", num_classes=7)
    torch.save(other.state_dict(), tmp_path / "seven.pth")
    backbone = model("test_resnet", tmp_path / "seven.pth")
    assert backbone.untrained == ("fc",)
    assert torch.equal(backbone.network.layer4[0].conv1.weight, other.layer4[0].conv1.weight)


def test_a_file_of_another_size_is_resampled_as_timm_does(tmp_path):
    state = timm.create_model("test_vit", num_classes=10).state_dict()
    torch.save(state, tmp_path / "vit.pth")
    backbone = model("test_vit", tmp_path / "vit.pth", size=(192, 192)).select("stage1")
    assert backbone.stages[0].shape[1:] == (12, 12)
    own = timm.create_model("test_vit", num_classes=10, img_size=192)
    expected = timm.models.vision_transformer.checkpoint_filter_fn(dict(state), own)["pos_embed"]
    assert torch.equal(backbone.network.pos_embed, expected)


def test_names_of_published_checkpoints_are_translated(tmp_path):
    # torchvision's names for a DenseNet; timm's own filter knows them.
    state = timm.create_model("densenet121").state_dict()
    old = {name.replace(".norm1.", ".norm.1.").replace(".conv1.", ".conv.1."): value for name, value in state.items()}
    old = {name: value for name, value in old.items() if not name.endswith("num_batches_tracked")}  # of before them
    assert not old.keys() <= state.keys()
    torch.save(old, tmp_path / "old.pth")
    loaded = model("densenet121", tmp_path / "old.pth").network
    name = "features.denseblock1.denselayer1.conv1.weight"
    assert torch.equal(loaded.state_dict()[name], state[name])


class Trap:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("trapped"),)


@pytest.mark.parametrize("wrong", ["another model", "junk", "a pickle with code"])
def test_a_wrong_file_is_refused_in_words(wrong, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if wrong == "another model":
        torch.save(timm.create_model("test_vit").state_dict(), "w.pth")
    elif wrong == "junk":
        Path("w.pth").write_bytes(b"no weights at all")
    else:
        Path("w.pth").write_bytes(pickle.dumps({"state_dict": Trap()}))
    with pytest.raises(WeightsError, match=r"w\.pth"):
        model("test_resnet", "w.pth")
    assert not Path("trapped").exists()


# Keywords of `timm.create_model`, and of `save_for_hf`: what the folder alone says.
@pytest.mark.parametrize(
    ("name", "made", "prepared"),
    [
        ("test_resnet", {"num_classes": 7, "act_layer": "silu"}, {"crop_pct": 0.8, "mean": (0.5, 0.4, 0.3)}),
        ("test_resnet", {"num_classes": 0}, {"input_size": (3, 96, 96), "crop_mode": "squash"}),
        ("test_vit", {"num_classes": 5, "img_size": 192, "depth": 2}, {}),
        ("vit_tiny_patch16_224", {"num_classes": 5, "img_size": 160, "depth": 2}, {}),
    ],
)
def test_a_model_of_a_folder_is_saved_without_need_of_that_folder(name, made, prepared, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(77)
    own = timm.create_model(name, **made)
    timm.models.save_for_hf(own, "own", safe_serialization=True, data_config=prepared)
    first = AutoBackbone.from_pretrained("own")
    first.save_pretrained("saved")
    pixels = torch.randn(1, 3, *first.preprocess.size, generator=torch.Generator().manual_seed(1))
    shutil.rmtree("own")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    second = AutoBackbone.from_pretrained("../saved")
    assert second.config.model == f"timm:{name}"
    assert digest(second.network) == digest(own)
    assert second.preprocess == first.preprocess
    with torch.inference_mode():
        expected, got = first(pixels).feature_maps, second(pixels).feature_maps
    assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))


def test_folders_that_differ_in_an_argument_alone_are_built_from_different_things(tmp_path):
    for layer in ("relu", "silu"):
        timm.models.save_for_hf(timm.create_model("test_resnet", act_layer=layer), tmp_path / layer)
    one, other = (model(f"local-dir:{tmp_path / layer}", structure=True).config for layer in ("relu", "silu"))
    assert json.loads(one) | {"act_layer": "silu"} == json.loads(other) != json.loads(one)


def test_an_image_size_given_as_timm_does_is_the_input_size_where_the_network_is_built_for_one():
    backbone = model("vit_tiny_patch16_224", "random", structure=True, options={"img_size": 160, "depth": 1})
    assert backbone.preprocess.size == (160, 160)
    with pytest.raises(UsageError, match="img_size"):
        model("test_resnet", "random", structure=True, options={"img_size": 160})
