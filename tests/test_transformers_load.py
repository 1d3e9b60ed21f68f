"""transformers: names, folders, the hub's cache, weights and what is wrong with them, all without a network."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers", reason="the extra bbx[transformers] is not installed")

import huggingface_hub.constants
import transformers as library
from safetensors.torch import load_file, save_file

from bbx.errors import UsageError, WeightsError
from bbx.providers import transformers as provider
from bbx.spec import Build, ModelRef

SWIN = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "image_size": 56, "num_labels": 3}


def load(name, weights="auto", **build):
    return made(name, weights, **build).select("all")


def made(name, weights="auto", **build):
    return provider.load(ModelRef("transformers", str(name), weights), Build(**build))


@pytest.fixture
def swin(tmp_path):
    """A folder as `save_pretrained` leaves it for a classifier, with its image processor."""
    torch.manual_seed(3)
    network = library.SwinForImageClassification(library.SwinConfig(**SWIN)).eval()
    network.save_pretrained(tmp_path / "swin")
    library.ViTImageProcessor(size={"height": 56, "width": 56}).save_pretrained(tmp_path / "swin")
    return tmp_path / "swin", network


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`hub("org/name", folder)` puts a folder into a Hugging Face cache of this test's own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for module in (library.utils.hub, huggingface_hub.file_download):
        for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, str(tmp_path / "hub"))

    def put(name, folder):
        commit = "0123456789abcdef0123456789abcdef01234567"
        place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(commit)
        shutil.copytree(folder, place / "snapshots" / commit)

    return put


def test_a_folder_gives_its_weights_and_its_preprocessing(swin):
    folder, network = swin
    backbone = load(folder)
    pixels = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        expected = network.swin(pixels, output_hidden_states=True, output_hidden_states_before_downsampling=True)
        got = backbone(pixels)
    assert all(torch.equal(a, b) for a, b in zip(expected.reshaped_hidden_states, got.values(), strict=True))
    assert backbone.preprocess.processor_name == "ViTImageProcessor"
    assert (backbone.preprocess.size, backbone.preprocess.mean) == ((56, 56), (0.5, 0.5, 0.5))
    assert (backbone.weights, made(folder).notes, backbone.untrained) == ("folder swin", (), ())
    assert json.loads(backbone.config)["embed_dim"] == 8


def test_a_folder_is_found_however_its_path_is_written(swin, monkeypatch):
    folder, _ = swin
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    digests = set()
    for name in (str(folder), "./swin", "swin/", "~/swin", "../" + folder.parent.name + "/swin"):
        assert provider.find(name) == name
        digests.add(load(name).weights_digest)
    assert len(digests) == 1


def test_a_folder_of_a_saved_backbone_keeps_its_own_extra_norms(tmp_path):
    torch.manual_seed(0)
    config = library.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])
    config.out_features = config.stage_names
    network = library.ConvNextBackbone(config).eval()
    for norm in network.hidden_states_norms.values():
        torch.nn.init.normal_(norm.weight)
    network.save_pretrained(tmp_path)
    native, raw = load(tmp_path, norm="native"), load(tmp_path)
    pixels = torch.randn(1, 3, *native.preprocess.size)
    with torch.inference_mode():
        assert all(
            torch.equal(a, b) for a, b in zip(network(pixels).feature_maps, native(pixels).values(), strict=True)
        )
        assert not torch.allclose(native(pixels)["stage1"], raw(pixels)["stage1"])
    assert made(tmp_path, norm="native").notes == made(tmp_path).notes  # no processor, and nothing of norms
    assert native.weights_digest != raw.weights_digest


def test_a_classifiers_folder_has_no_extra_norms_and_native_says_so(swin):
    folder, _ = swin
    assert "weight 1, bias 0" in made(folder, norm="native").notes[0]
    assert made(folder).notes == ()


def test_half_precision_weights_are_computed_with_in_float32(swin, tmp_path):
    _, network = swin
    network.half().save_pretrained(tmp_path / "half")
    assert {value.dtype for value in load(tmp_path / "half").network.parameters()} == {torch.float32}


def test_a_hub_id_in_the_cache_is_used_offline(swin, hub):
    hub("someone/swin", swin[0])
    backbone = load("someone/swin")
    assert provider.find("someone/swin") == "someone/swin"
    assert backbone.weights == "hub someone/swin"
    state = load(swin[0]).network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in backbone.network.state_dict().items())
    assert json.loads(backbone.config)["depths"] == [1, 2]  # the cache may be another one when it is loaded again
    assert backbone.preprocess.processor_name == "ViTImageProcessor"
    assert load("someone/swin", "random").weights == "random (seed 0)"


@pytest.mark.parametrize("name", ["someone/nothing", "microsoft/swin-tiny-patch4-window7-224"])
def test_a_hub_id_that_is_not_here_says_what_to_type(name, hub):
    with pytest.raises(WeightsError) as caught:
        load(name)
    assert "HF_HUB_OFFLINE" in caught.value.message
    assert f"hf download {name}\n" in caught.value.hint
    assert "--weights random" in caught.value.hint


def test_a_known_hub_id_has_random_weights_and_a_structure_without_a_network(hub):
    assert load("facebook/convnext-tiny-224", structure=True).stages[-1].shape == (768, 7, 7)
    assert load("microsoft/resnet-18", "random").stages[-1].shape == (512, 7, 7)


def test_a_type_has_no_weights_of_its_own():
    with pytest.raises(WeightsError) as caught:
        load("swin")
    assert "--weights random" in caught.value.hint


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_a_file_of_weights_is_loaded_by_todays_names(swin, tmp_path, suffix):
    folder, network = swin
    state = network.state_dict()
    path = tmp_path / f"mine{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    backbone = load("swin", str(path), options={name: SWIN[name] for name in ("embed_dim", "depths", "num_heads")})
    from_folder = load(folder).network.state_dict()
    assert all(torch.equal(value, from_folder[name]) for name, value in backbone.network.state_dict().items())
    assert backbone.weights == f"file mine{suffix}"


OLD_NAMES = {
    "attention.q_proj": "attention.self.query",
    "attention.k_proj": "attention.self.key",
    "attention.v_proj": "attention.self.value",
    "attention.o_proj": "attention.output.dense",
    "attention.relative_position_bias.relative": "attention.self.relative",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def test_the_key_names_of_older_checkpoints_are_understood(swin, tmp_path):
    folder, network = swin
    old = {}
    for name, value in network.state_dict().items():
        for today, before in OLD_NAMES.items():
            name = name.replace(today, before)
        old[name] = value
    shutil.copytree(folder, tmp_path / "old")
    save_file(old, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    assert set(old) != set(network.state_dict())
    pixels = torch.randn(1, 3, 56, 56)
    with torch.inference_mode():
        assert torch.equal(load(tmp_path / "old")(pixels)["stage2"], load(folder)(pixels)["stage2"])


def _without(state, part):
    return {name: value for name, value in state.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: _without(state, "layers.1.blocks.1.mlp"), ["missing", "layers.1.blocks.1.mlp"]),
        (lambda state: {**state, "swin.embeddings.norm.bias": torch.zeros(9)}, ["of another shape", "norm.bias"]),
        (lambda state: {**state, "swin.encoder.layers.2.x.weight": torch.zeros(9)}, ["unexpected", "layers.2.x"]),
        (lambda state: {"nothing.weight": torch.zeros(2)}, ["missing"]),
    ],
)
def test_weights_that_do_not_fit_name_their_keys(swin, change, words):
    folder, network = swin
    save_file(change(network.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError) as caught:
        load(folder)
    for word in words:
        assert word in caught.value.message


def test_a_final_norm_that_no_stage_uses_may_miss_but_cannot_be_asked_for(swin):
    folder, network = swin
    save_file(_without(network.state_dict(), "swin.layernorm"), folder / "model.safetensors", metadata={"format": "pt"})
    backbone = load(folder)
    assert backbone.untrained == ("swin.layernorm",)
    assert backbone(torch.zeros(1, 3, 56, 56))["stage2"].isfinite().all()
    with pytest.raises(WeightsError):
        backbone.select(layers="swin.layernorm")


def test_a_missing_norm_that_native_uses_is_an_error_and_raw_does_without(tmp_path):
    config = library.Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56)
    network = library.Dinov2Model(config)
    network.save_pretrained(tmp_path)
    save_file(_without(load_file(tmp_path / "model.safetensors"), "layernorm.") , tmp_path / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    assert load(tmp_path).stages
    with pytest.raises(WeightsError) as caught:
        load(tmp_path, norm="native")
    assert "layernorm.weight" in caught.value.message


@pytest.mark.parametrize(
    ("file", "content"),
    [("model.safetensors", b"\x08\0\0\0\0\0\0\0{damaged"), ("model.safetensors", b""), ("config.json", b"{"),
     ("preprocessor_config.json", b"{"), ("preprocessor_config.json", b'{"image_processor_type": "OsImageProcessor"}'),
     ("preprocessor_config.json", b'{"image_processor_type": "ViTImageProcessor", "size": "big"}')],
)  # fmt: skip
def test_a_damaged_folder_is_an_error_and_no_traceback(swin, file, content):
    (swin[0] / file).write_bytes(content)
    assert provider.find(str(swin[0])) == str(swin[0])
    with pytest.raises(WeightsError):
        load(swin[0])


def test_a_folder_without_weights_says_so(swin):
    (swin[0] / "model.safetensors").unlink()
    with pytest.raises(WeightsError) as caught:
        load(swin[0])
    assert "--weights random" in caught.value.hint
    assert load(swin[0], "random").stages


def test_missing_processor_is_noted_and_imagenets_numbers_assumed(swin):
    (swin[0] / "preprocessor_config.json").unlink()
    backbone = made(swin[0])
    assert "ImageNet" in backbone.notes[0]
    assert backbone.preprocess.mean == (0.485, 0.456, 0.406)
    assert backbone.preprocess.processor == ""


def test_another_size_goes_through_the_same_image_processor(swin):
    preprocess = load(swin[0], size=(84, 112)).preprocess
    assert (preprocess.size, preprocess.processor_name) == ((84, 112), "ViTImageProcessor")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "clip"}, ["clip", "no backbone class", "dinov2"]),
        ({"model_type": "bert"}, ["bert", "no backbone class"]),
        ({"model_type": "swim"}, ["swim", "did you mean swin"]),
        ({"model_type": "timm_backbone", "backbone": "resnet18"}, ["use timm:resnet18"]),
    ],
)
def test_a_configuration_without_a_backbone_says_what_there_is(tmp_path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError) as caught:
        load(tmp_path)
    for word in words:
        assert word in f"{caught.value.message} {caught.value.hint}"


def test_an_assembled_models_folder_names_the_backbone_inside(tmp_path):
    library.MaskFormerConfig(backbone_config=library.ResNetConfig()).save_pretrained(tmp_path)
    with pytest.raises(UsageError) as caught:
        load(tmp_path)
    assert "resnet" in caught.value.hint


@pytest.mark.parametrize(("name", "near"), [("swim", "swin"), ("dinov4", "dinov2"), ("resnett", "resnet")])
def test_an_unknown_type_is_named_with_the_nearest(name, near):
    with pytest.raises(UsageError) as caught:
        load(name)
    assert near in caught.value.hint


def test_an_unknown_option_is_named_with_the_nearest():
    with pytest.raises(UsageError) as caught:
        load("swin", "random", options={"embed_dims": 8})
    assert "embed_dim" in caught.value.hint


def test_what_find_claims(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    assert provider.find(str(tmp_path)) is None  # timm's
    assert provider.find("timm/resnet18.a1_in1k") is None
    assert provider.find("org/name") == "org/name"
    assert provider.find("nothing") is None
    assert provider.find("/no/such/folder") is None


def test_loading_is_silent(swin, capfd):
    load(swin[0], norm="native")
    assert capfd.readouterr() == ("", "")


def test_tipsv2_is_taken_out_of_its_two_towers(tmp_path):
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    network = library.Tipsv2Model(library.Tipsv2Config(vision_config=vision, text_config=text)).eval()
    network.save_pretrained(tmp_path)
    backbone = load(tmp_path, tokens=True)
    pixels = torch.randn(1, 3, 56, 56)
    with torch.inference_mode():
        whole = network.vision_model(pixels, output_hidden_states=True).hidden_states
        assert torch.equal(backbone.forward(pixels, backbone.taps)["stage1"], whole[1])


def test_vit_and_deit_classifiers_give_their_hidden_states(tmp_path):
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "intermediate_size": 32,
    }
    for kind in (library.ViTForImageClassification, library.DeiTForImageClassification):
        network = kind(kind.config_class(**small)).eval()
        network.save_pretrained(tmp_path / kind.__name__)
        backbone = load(tmp_path / kind.__name__, tokens=True)
        pixels = torch.randn(1, 3, 64, 64)
        with torch.inference_mode():
            hidden = network(pixels, output_hidden_states=True).hidden_states
            got = backbone.forward(pixels, backbone.taps)
        assert [torch.equal(a, b) for a, b in zip(hidden, got.values(), strict=True)] == [True, True, True]
