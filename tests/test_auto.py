"""The contract of every bbx backbone: what transformers' own backbone tests check, for all providers alike."""

import copy
import inspect
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

import bbx
from bbx import AutoBackbone, AutoImageProcessor, BackboneConfig
from bbx.errors import FileError, UsageError, WeightsError
from bbx.providers import resolve
from bbx.stages import align_stages, select_stages
from tests.conftest import EXTRAS, SAMPLES

# One line per provider and kind of network: hooks, tokens, channels-last, no stem, an own forward.
MODELS = [
    "toy",
    "efficientnet-lite0",
    "torchvision:resnet18",
    "torchvision:swin_t",
    "torchvision:vit_b_32",
    *(["timm:resnet18", "timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224"] * ("timm" in EXTRAS)),
    *(["transformers:resnet", "transformers:swin", "transformers:pvt_v2"] * ("transformers" in EXTRAS)),
]
PIXELS = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


@cache
def built(model: str) -> AutoBackbone:
    return AutoBackbone.from_config(BackboneConfig(model))


@pytest.fixture
def model(request: pytest.FixtureRequest) -> AutoBackbone:
    one = built(request.param)
    yield one
    one.out_indices = None
    one.eval()


def pixels(model: AutoBackbone) -> torch.Tensor:
    height, width = model.preprocess.size
    return PIXELS[:, :, :height, :width]


every = pytest.mark.parametrize("model", MODELS, indirect=True)


@every
def test_neither_given_means_the_last_stage(model):
    assert model.out_features == model.config.out_features == [model.stage_names[-1]]
    assert model.out_indices == [int(model.stage_names[-1].removeprefix("stage"))]


@every
def test_one_map_per_stage_with_the_declared_channels_and_strides(model):
    first = int(model.stage_names[0] != "stem")
    model.out_indices = (first, -1)
    with torch.no_grad():
        outputs = model(pixels(model))
    assert isinstance(outputs.feature_maps, tuple)
    assert len(outputs.feature_maps) == len(model.channels) == len(model.strides) == 2
    assert [tuple(one.shape[:2]) for one in outputs.feature_maps] == [(2, channels) for channels in model.channels]
    heights = [round(one.shape[2] * stride) for one, stride in zip(outputs.feature_maps, model.strides, strict=True)]
    assert all(abs(height - model.preprocess.size[0]) <= 32 for height in heights)
    assert outputs.hidden_states is None
    assert outputs.attentions is None
    assert outputs.to_tuple() == (outputs.feature_maps,)


@every
def test_channels_of_every_stage_are_known(model):
    assert len(model.num_features) == len(model.stage_names)
    assert list(model.out_feature_channels.items()) == list(zip(model.stage_names, model.num_features, strict=True))


@every
def test_hidden_states_are_all_stages_when_asked(model):
    with torch.no_grad():
        outputs = model(pixels(model), output_hidden_states=True)
    assert [one.shape[1] for one in outputs.hidden_states] == model.num_features
    assert torch.equal(outputs.hidden_states[-1], outputs.feature_maps[0])
    assert len(outputs.to_tuple()) == 2


@every
def test_assigning_either_keeps_the_other_in_step_and_none_resets(model):
    names = model.stage_names
    model.out_features = [names[0], names[-1]]
    first = int(names[0] != "stem")
    assert model.out_indices == [first, first + len(names) - 1]
    model.out_indices = [-1]
    assert model.out_features == [names[-1]]
    assert model.out_indices == [first + len(names) - 1]
    model.out_features = [names[1]]
    with torch.no_grad():
        assert model(pixels(model)).feature_maps[0].shape[1] == model.num_features[1]
    model.out_features = None
    assert model.out_features == [names[-1]]
    model.out_indices = [-2]
    model.out_indices = None
    assert model.out_features == [names[-1]]


# Not the toy, whose stem is written over by the ReLU behind it, on purpose.
@pytest.mark.parametrize("model", MODELS[1:], indirect=True)
def test_a_selection_gives_the_same_bits_as_all_stages(model):
    with torch.no_grad():
        whole = model(pixels(model), output_hidden_states=True).hidden_states
        for place, name in enumerate(model.stage_names[:3]):
            model.out_features = [name]
            assert torch.equal(model(pixels(model)).feature_maps[0], whole[place])


@every
def test_gradients_flow_and_a_copy_has_a_life_of_its_own(model):
    model.out_features = [model.stage_names[1]]
    other = copy.deepcopy(model)
    other.train()
    other(pixels(model)).feature_maps[0].square().mean().backward()
    with_gradients = {name for name, parameter in other.named_parameters() if parameter.grad is not None}
    assert with_gradients
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        other.eval()
        before = model(pixels(model)).feature_maps[0]
        for name, parameter in other.named_parameters():
            if name in with_gradients:
                parameter.add_(1)
        assert torch.equal(model(pixels(model)).feature_maps[0], before)
        assert not torch.equal(other(pixels(model)).feature_maps[0], before)


@every
def test_compiled_without_a_graph_break_it_gives_the_same(model):
    torch._dynamo.reset()
    model.out_features = model.stage_names[:2]
    with torch.no_grad():
        expected = model(pixels(model)).feature_maps
        got = torch.compile(model, backend="eager", fullgraph=True)(pixels(model)).feature_maps
    # Not to the bit: eager attention of torch.nn takes another path than the one that can be traced.
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@every
def test_saved_and_loaded_it_is_the_same(model, tmp_path):
    model.out_features = [model.stage_names[0], model.stage_names[2]]
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoBackbone.from_pretrained(tmp_path / "saved")
    assert loaded.config == model.config
    assert loaded.preprocess == model.preprocess
    with torch.no_grad():
        pairs = zip(loaded(pixels(model)).feature_maps, model(pixels(model)).feature_maps, strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    other = AutoBackbone.from_pretrained(tmp_path / "saved", out_features=[model.stage_names[1]])
    assert other.out_features == [model.stage_names[1]]
    assert AutoImageProcessor.from_pretrained(tmp_path / "saved").preprocess == model.preprocess


@every
def test_the_first_argument_of_forward_is_pixel_values(model):
    assert next(iter(inspect.signature(model.forward).parameters)) == "pixel_values"


@every
def test_threads_do_not_hear_each_other(model):
    inputs = [pixels(model)[:1] + number for number in range(3)]
    with torch.no_grad():
        alone = [model(one).feature_maps[0] for one in inputs]

    def call(number: int) -> bool:
        with torch.no_grad():
            return torch.equal(model(inputs[number % 3]).feature_maps[0], alone[number % 3])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(12)))


WRONG = [
    ({"out_indices": 2}, "not a list"),
    ({"out_indices": [99]}, "index 99"),
    ({"out_indices": [-99]}, "index -99"),
    ({"out_indices": [True]}, "True"),
    ({"out_indices": [1.0]}, "1.0"),
    ({"out_indices": []}, "empty"),
    ({"out_indices": [2, 1]}, "order"),
    ({"out_indices": [1, 1]}, "twice"),
    ({"out_features": "stage1"}, "not a list"),
    ({"out_features": []}, "empty"),
    ({"out_features": ["stage2", "stage1"]}, "order"),
    ({"out_features": ["stage1", "stage1"]}, "twice"),
    ({"out_features": ["stege1"]}, "did you mean stage1"),
    ({"out_features": ["stage1"], "out_indices": [2]}, "not the same stages"),
    ({"out_features": ["stage1", "stage2"], "out_indices": [1]}, "not the same stages"),
    ({"out_indices": [1], "out_features": []}, "empty"),
]


@pytest.mark.parametrize("name", [name for name in MODELS if name in ("toy", "timm:resnet18", "transformers:pvt_v2")])
@pytest.mark.parametrize(("wish", "words"), WRONG)
def test_a_wrong_selection_is_a_value_error_listing_the_stages_at_every_door(name, wish, words):
    doors = [lambda: BackboneConfig(name, **wish), lambda: AutoBackbone.from_pretrained(name, weights="random", **wish)]
    if len(wish) == 1:
        ((option, value),) = wish.items()
        doors += [lambda: setattr(built(name), option, value), lambda: setattr(built(name).config, option, value)]
    for door in doors:
        with pytest.raises(ValueError, match="stage1 ") as caught:
            door()
        assert words in str(caught.value)
    assert built(name).out_features == built(name).stage_names[-1:]


def test_both_given_may_say_the_same_in_two_ways():
    config = BackboneConfig("toy", out_features=["stem", "stage2"], out_indices=(0, -1))
    assert config.out_indices == [0, 2]


def test_without_a_stem_index_0_is_nobodys():
    names = ("stage1", "stage2", "stage3")
    for features, indices in ((None, [0]), (["stem"], None), (None, [-4])):
        with pytest.raises(ValueError, match=r"no stem.*stage1 \(1\)"):
            align_stages(names, features, indices)
    assert align_stages(names, None, [1]) == (("stage1",), (1,))
    assert align_stages(names) == (("stage3",), (3,))
    assert select_stages(names, "1..-1") == names
    with pytest.raises(UsageError, match="no stem"):
        select_stages(names, "0")


def test_the_same_seed_is_the_same_network():
    first, same, other = (AutoBackbone.from_config(BackboneConfig("toy", seed=seed)) for seed in (3, 3, 4))
    values = [one(PIXELS[:1, :, :32, :32]).feature_maps[0] for one in (first, same, other)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_frozen_stages_do_not_learn_and_their_batch_norms_stand_still():
    model = AutoBackbone.from_config(BackboneConfig("torchvision:resnet18")).freeze("stem,stage1")
    model.train()
    statistics = model.network.bn1.running_mean.clone(), model.network.layer2[0].bn1.running_mean.clone()
    model(PIXELS[:, :, :64, :64]).feature_maps[0].sum().backward()
    assert model.network.conv1.weight.grad is None
    assert model.network.layer1[0].conv1.weight.grad is None
    assert model.network.layer2[0].conv1.weight.grad is not None
    assert torch.equal(model.network.bn1.running_mean, statistics[0])
    assert not torch.equal(model.network.layer2[0].bn1.running_mean, statistics[1])
    model.freeze(())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.network.bn1.training
    with pytest.raises(ValueError, match="did you mean stage1"):
        model.freeze("stege1")


def test_freezing_while_training_moves_no_statistics():
    model = AutoBackbone.from_config(BackboneConfig("torchvision:resnet18")).train()
    before = {name: value.clone() for name, value in model.network.named_buffers()}
    model.freeze("stem")
    assert all(torch.equal(value, before[name]) for name, value in model.network.named_buffers())
    assert model.network.layer1[0].bn1.training


@pytest.mark.parametrize(
    "name", ["torchvision:vit_b_32", *(["timm:vit_tiny_patch16_224"] * ("timm" in EXTRAS)),
             *(["transformers:dinov2"] * ("transformers" in EXTRAS))],
)  # fmt: skip
def test_a_frozen_stage_gives_the_same_after_a_step(name):
    options = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 3} if "dinov2" in name else {}
    model = AutoBackbone.from_config(BackboneConfig(name, out_indices=[0, 1, 2], options=options)).freeze(["stem"])
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1.0)
    before = model(PIXELS[:1]).feature_maps
    sum(one.square().mean() for one in before).backward()
    optimizer.step()
    after = model(PIXELS[:1]).feature_maps
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[2], after[2])
    model.freeze("all")
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_it_learns_inside_another_network():
    backbone = AutoBackbone.from_config(BackboneConfig("toy", out_indices=[1, 2]))
    network = torch.nn.ModuleDict({"backbone": backbone, "head": torch.nn.Linear(backbone.channels[-1], 1)})
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    inputs, target = PIXELS[:, :, :32, :32], torch.tensor([[1.0], [-1.0]])
    losses = []
    for _ in range(100):
        output = network["head"](network["backbone"](inputs).feature_maps[-1].mean((2, 3)))
        loss = (output - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_attention_maps_are_refused_where_there_are_none():
    with pytest.raises(UsageError, match="attention"):
        built("toy")(PIXELS[:, :, :32, :32], output_attentions=True)


if "timm" in EXTRAS:

    @pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "coat_tiny", "crossvit_tiny_240"])
    def test_what_transformers_timm_backbone_gets_wrong_is_right(name):
        # There: channels-last maps, no such backbone at all, and indices that do nothing when they are set late.
        model = AutoBackbone.from_config(BackboneConfig(f"timm:{name}", out_indices=[1]))
        model.out_indices = [1, 2]
        height, width = model.preprocess.size
        with torch.no_grad():
            maps = model(torch.randn(1, 3, height, width)).feature_maps
        assert [one.shape[1] for one in maps] == model.channels
        assert len(maps) == 2


if "transformers" in EXTRAS:

    def test_attention_maps_when_asked():
        model = built("transformers:swin")
        maps = model(PIXELS[:1], output_attentions=True).attentions
        assert [one.shape[1] for one in maps] == [3, 6, 12, 24]  # heads
        torch.testing.assert_close(maps[0].sum(-1), torch.ones(maps[0].shape[:-1]))


def test_a_saved_folder_is_a_models_name_at_the_shell_too(bbx_cli, pictures, tmp_path):
    AutoBackbone.from_config(BackboneConfig("toy", seed=5)).save_pretrained(tmp_path / "mine")
    ran = bbx_cli("extract", "--model", "mine", "--stages", "stem", "-q", "pictures")
    assert ran.code == 0, ran.err
    one = AutoBackbone.from_pretrained(tmp_path / "mine", out_indices=[0])
    processor = AutoImageProcessor.from_pretrained(tmp_path / "mine")
    with bbx.open("features.h5") as file, torch.inference_mode():
        expected = one(**processor(pictures / "003.png", return_tensors="pt")).feature_maps[0][0]
        np.testing.assert_allclose(file["stem"]["003.png"], expected.numpy(), rtol=1e-5, atol=1e-6)


def test_a_model_with_neck_and_heads_is_no_backbone():
    with pytest.raises(UsageError, match=r"no backbone.*bbx\.assemble"):
        BackboneConfig("torchvision:lraspp_mobilenet_v3_large")


if "transformers" in EXTRAS:

    def test_a_saved_norm_is_recorded_and_not_overruled(bbx_cli, pictures, tmp_path):
        options = {"depths": [1, 1], "num_heads": [2, 2], "embed_dim": 8, "window_size": 2, "image_size": 32}
        config = BackboneConfig("transformers:swin", norm="native", options=options)
        AutoBackbone.from_config(config).save_pretrained(tmp_path / "mine")
        ran = bbx_cli("extract", "--model", "./mine", "--stages", "all", pictures)
        assert ran.code == 0, ran.err
        with bbx.open("features.h5") as file:
            assert file.run.norm == "native"
        assert "native" in bbx_cli("info", "features.h5").out
        with pytest.raises(UsageError, match="its own norm"):
            bbx.load_backbone("./mine", options={"depths": [2, 2]})

    def test_a_backbone_from_a_folder_outlives_it(tmp_path):
        import transformers

        small = transformers.ResNetConfig(depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8)
        transformers.ResNetBackbone(small).save_pretrained(tmp_path / "theirs")
        model = AutoBackbone.from_pretrained(tmp_path / "theirs", out_indices=[1])
        model.save_pretrained(tmp_path / "mine")
        shutil.rmtree(tmp_path / "theirs")
        loaded = AutoBackbone.from_pretrained(tmp_path / "mine")
        assert torch.equal(loaded(PIXELS).feature_maps[0], model(PIXELS).feature_maps[0])


def test_pooled_tokens_are_another_run_than_pooled_maps(bbx_cli, pictures):
    words = (
        "extract",
        "--model",
        "torchvision:vit_b_32",
        "--weights",
        "random",
        "--stages",
        "stem",
        "--pool",
        "avg",
        pictures,
    )
    assert bbx_cli(*words, "--tokens").code == 0
    ran = bbx_cli(*words)
    assert ran.code == 3
    assert "tokens" in ran.err


def test_a_folder_of_a_models_name_does_not_hide_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()
    (tmp_path / "swin-tiny").mkdir()
    assert str(resolve("resnet18")) == "torchvision:resnet18"
    assert str(resolve("swin-tiny")) == "torchvision:swin_t"
    AutoBackbone.from_config(BackboneConfig("toy")).save_pretrained(tmp_path / "mine")
    assert str(resolve("mine")) == str(resolve("./mine")) == str(resolve(str(tmp_path / "mine"))) == "toy:toy"


def test_weights_of_another_size_are_saved_with_it(tmp_path):
    model = AutoBackbone.from_pretrained("torchvision:vit_b_32", weights="random", size=64, out_indices=[1])
    model.save_pretrained(tmp_path / "mine")
    loaded = AutoBackbone.from_pretrained(tmp_path / "mine")
    assert loaded.preprocess.size == (64, 64)
    assert torch.equal(loaded(PIXELS[:, :, :64, :64])[0][0], model(PIXELS[:, :, :64, :64])[0][0])
    assert loaded.config.stages[1].shape == (768, 2, 2)


def test_a_damaged_folder_is_named(tmp_path):
    AutoBackbone.from_config(BackboneConfig("toy")).save_pretrained(tmp_path / "mine")
    config = tmp_path / "mine" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "build": {"sede": 1}}))
    with pytest.raises(FileError, match=r"config\.json is damaged"):
        AutoBackbone.from_pretrained(tmp_path / "mine")
    config.write_text(json.dumps({**content, "model": "toy:toy-loud"}))
    AutoBackbone.from_pretrained(tmp_path / "mine")
    config.write_text(json.dumps({**content, "model": "torchvision:resnet18"}))
    with pytest.raises(WeightsError, match=r"model\.safetensors does not fit torchvision:resnet18"):
        AutoBackbone.from_pretrained(tmp_path / "mine")


PICTURE = Image.open(SAMPLES / "chelsea.png").convert("RGB")


def test_the_processor_takes_pictures_of_every_kind():
    processor = AutoImageProcessor.from_pretrained("efficientnet-lite0")
    array = np.asarray(PICTURE)
    kinds = [PICTURE, SAMPLES / "chelsea.png", array, torch.from_numpy(array.copy()), array.transpose(2, 0, 1)]
    batch = processor(kinds, return_tensors="pt").pixel_values
    assert batch.shape == (5, 3, 224, 224)
    assert all(torch.equal(batch[0], other) for other in batch[1:])
    assert isinstance(processor(PICTURE, return_tensors="np")["pixel_values"], np.ndarray)
    assert [one.shape for one in processor([PICTURE, PICTURE])["pixel_values"]] == [(3, 224, 224)] * 2
    assert processor(PICTURE, "pt").to("meta").pixel_values.is_meta
    assert AutoImageProcessor.from_pretrained("toy", size=(32, 64))(PICTURE, "pt").pixel_values.shape == (1, 3, 32, 64)


@pytest.mark.parametrize("wrong", [3, np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), []])
def test_what_is_no_picture_is_refused(wrong):
    with pytest.raises(UsageError, match=r"picture|image"):
        AutoImageProcessor.from_pretrained("toy")(wrong)


def test_the_processor_is_torchvisions_own_transform():
    from torchvision.models import ResNet50_Weights

    processor = AutoImageProcessor.from_pretrained("resnet-50")
    expected = ResNet50_Weights.DEFAULT.transforms()(PICTURE)[None]
    assert torch.equal(processor(PICTURE, return_tensors="pt").pixel_values, expected)
