"""transformers: every backbone type that builds here, raw and native, cut short and whole, against the classes' own."""

import pytest
import torch

pytest.importorskip("transformers", reason="the extra bbx[transformers] is not installed")

from transformers import CONFIG_MAPPING, SwinModel
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING, MODEL_FOR_BACKBONE_MAPPING_NAMES

from bbx.errors import MissingExtraError, UsageError
from bbx.providers import transformers as provider
from bbx.providers.transformers_families import FAMILIES, KNOWN, stage_module
from bbx.spec import Build, ModelRef

CONVNEXT = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1]}
RESNET = {"embedding_size": 8, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 2, 1]}
VIT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64}
SWIN = {"embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "image_size": 56}
SAPIENS = {"num_key_value_heads_per_layer": [2, 2, 2]}
# Options that make each type small.
SMALL = {
    "beit": VIT,
    "bit": {**RESNET, "num_groups": 2},
    "convnext": CONVNEXT,
    "convnextv2": CONVNEXT,
    "dinov2": {**VIT, "image_size": 56},
    "dinov2_with_registers": VIT,
    "dinov3_convnext": CONVNEXT,
    "dinov3_vit": {**VIT, "num_register_tokens": 2},
    "focalnet": {"embed_dim": 8, "hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]},
    "hgnet_v2": {},
    "hiera": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "image_size": [64, 64]},
    "lw_detr_vit": {**VIT, "pretrain_image_size": 64, "window_block_indices": [0, 1]},
    "maskformer-swin": SWIN,
    "pixio": VIT,
    "pp_lcnet": {"scale": 0.25},
    "pp_lcnet_v3": {"scale": 0.25},
    "pp_lcnet_v4": {},
    "pvt_v2": {"hidden_sizes": [8, 16, 40, 64], "depths": [1, 1, 1, 1]},
    "resnet": RESNET,
    "rf_detr_dinov2": {**VIT, "image_size": 112, "window_block_indexes": [0, 2]},
    "rt_detr_resnet": RESNET,
    "sapiens2": {**VIT, "num_register_tokens": 2, **SAPIENS},
    "swin": SWIN,
    "swinv2": SWIN,
    "textnet": {"image_size": 64},
    "tipsv2": {**VIT, "image_size": 56},
    "tipsv2_vision_model": {**VIT, "image_size": 56},
    "uvdoc_backbone": {},
    "vitdet": VIT,
    "vitpose_backbone": {**VIT, "image_size": [64, 48]},
    "vit": {**VIT, "intermediate_size": 32},
    "deit": {**VIT, "intermediate_size": 32},
}
BIG = ("hgnet_v2", "pp_lcnet_v3", "pp_lcnet_v4", "uvdoc_backbone", "textnet")  # no option makes these small
WITH_CLASS = [name for name in SMALL if not FAMILIES[name].plain]


def quick_and_slow(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in BIG else name for name in names]


def load(name, *, weights="random", **build):
    options = {**SMALL.get(name, {}), **build.pop("options", {})}
    return provider.load(ModelRef("transformers", name, weights), Build(options=options, **build)).select("all")


def picture_for(backbone, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, 3, *backbone.preprocess.size)


def class_of(name, network):
    """The library's own backbone class with the same weights, every stage asked for."""
    own = MODEL_FOR_BACKBONE_MAPPING[type(network.config)]._from_config(network.config).eval()
    own.load_state_dict(network.state_dict())
    return own


def test_the_table_holds_every_type_of_the_mapping():
    assert set(MODEL_FOR_BACKBONE_MAPPING_NAMES) - set(FAMILIES) == {"timm_backbone"}
    assert set(FAMILIES) - set(MODEL_FOR_BACKBONE_MAPPING_NAMES) == {"vit", "deit"}
    assert set(FAMILIES) - set(SMALL) == {"dinat"}


@pytest.mark.parametrize("name", quick_and_slow(WITH_CLASS))
def test_native_is_the_classes_own_feature_maps_bit_for_bit(name):
    backbone = load(name, norm="native")
    pixels = picture_for(backbone)
    own = class_of(name, backbone.network)
    with torch.inference_mode():
        expected, got = own(pixels).feature_maps, backbone(pixels)
    assert list(got) == own.out_features
    for theirs, ours in zip(expected, got.values(), strict=True):
        if theirs.ndim == 3:  # VitPose leaves its maps flat
            theirs = theirs.transpose(1, 2).reshape(ours.shape)
        assert torch.equal(theirs, ours)


@pytest.mark.parametrize("norm", ["raw", "native"])
@pytest.mark.parametrize("name", quick_and_slow(SMALL))
def test_cut_short_gives_the_same_and_runs_nothing_past_its_stage(name, norm):
    backbone = load(name, norm=norm)
    pixels = picture_for(backbone, 1)
    with torch.inference_mode():
        whole = backbone(pixels)
        for stage in backbone.stage_names:
            one = backbone.select(stage)
            assert len(one.stages) == 1  # measured now, so that only the call below is watched
            got, ran = watched(one, pixels)
            assert torch.equal(got[stage], whole[stage])
            assert beyond(name, stage, ran, norm) == []
        again = backbone(pixels)
    assert all(torch.equal(whole[stage], again[stage]) for stage in whole)


def watched(backbone, pixels):
    """The maps, and the paths of all leaf modules that ran for them."""
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda _m, _i, _o, path=path: ran.append(path))
        for path, module in backbone.network.named_modules()
        if not list(module.children())
    ]
    maps = backbone(pixels)
    for handle in handles:
        handle.remove()
    return maps, ran


def beyond(name, stage, ran, norm):
    """Of the modules that `ran`, those past the end of `stage` or of no use to it."""
    family = FAMILIES[name]
    depth = 0 if stage == "stem" else int(stage.removeprefix("stage"))
    last = [path for path in ran if path.startswith(f"{stage_module(family, depth)}.")]
    later = [path for path in ran if path.startswith(f"{family.stages}.")]
    later = [path for path in later if int(path[len(family.stages) + 1 :].split(".")[0]) >= max(depth, 1)]
    if depth == 0:  # only DINOv3's ConvNeXt has its stem inside of stage 1
        later += [p for p in ran if p.startswith(f"{family.stages}.0.") and ".downsample_layers." not in p]
    unused = [path for path in ran if path in family.after or path.startswith(tuple(f"{p}." for p in family.after))]
    merging = [
        path for path in last if ".downsample." in path and family.merges and not (norm == "native" and family.raw)
    ]
    norms = [path for path in ran if family.norms and path.startswith(family.norms) and path.split(".")[-1] != stage]
    extra = [path for path in norms if family.norms == "hidden_states_norms" and name != "maskformer-swin"]
    return later + unused + merging + extra


@pytest.mark.parametrize("name", quick_and_slow(SMALL))
def test_stages_are_in_order_and_strides_do_not_shrink(name):
    backbone = load(name)
    stages = backbone.stages
    stem = FAMILIES[name].stem != ""
    count = len(stages) - stem
    assert [stage.name for stage in stages] == ["stem"] * stem + [f"stage{n}" for n in range(1, count + 1)]
    assert [stage.index for stage in stages] == list(range(1 - stem, count + 1))
    strides = [stage.stride for stage in stages]
    assert strides == sorted(strides)
    assert strides[0] >= 2
    for stage, made in zip(stages, backbone(picture_for(backbone)).values(), strict=True):
        assert made.shape == (2, *stage.shape)
        assert made.ndim == 4


@pytest.mark.parametrize("name", quick_and_slow(SMALL))
def test_the_structure_has_the_shapes_of_the_real_thing(name):
    structure = load(name, structure=True)
    assert all(parameter.is_meta for parameter in structure.network.parameters())
    assert structure.weights_digest == ""
    assert [(s.name, s.shape, s.stride) for s in structure.stages] == [
        (s.name, s.shape, s.stride) for s in load(name).stages
    ]


def test_default_shapes_are_those_of_the_papers():
    shapes = {
        name: [stage.shape for stage in load(name, structure=True, options={}).stages]
        for name in ("microsoft/resnet-50", "microsoft/swin-tiny-patch4-window7-224", "microsoft/focalnet-tiny")
    }
    pyramid = [(96, 56, 56), (96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)]
    resnet = [(64, 56, 56), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
    assert list(shapes.values()) == [resnet, pyramid, pyramid]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*KNOWN, *(name for name in FAMILIES if name != "dinat")])
def test_every_name_has_a_structure_without_a_network(name):
    backbone = provider.load(ModelRef("transformers", name), Build(structure=True)).select("all")
    assert len(backbone.stages) >= 4


@pytest.mark.parametrize("size", [(224, 224), (256, 320), (448, 224)])
def test_raw_swin_is_what_the_whole_model_computes(size):
    backbone = load("swin", size=size, options={**SWIN, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 2]})
    whole = SwinModel(backbone.network.config, add_pooling_layer=False).eval()
    whole.load_state_dict(backbone.network.swin.state_dict())
    pixels = picture_for(backbone, 1)
    with torch.inference_mode():
        expected = whole(pixels, output_hidden_states=True, output_hidden_states_before_downsampling=True)
        got = backbone(pixels)
        native = load("swin", size=size, norm="native", options={"depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 2]})(
            pixels
        )
    assert all(torch.equal(a, b) for a, b in zip(expected.reshaped_hidden_states, got.values(), strict=True))
    assert not torch.allclose(got["stage4"], native["stage4"], atol=1e-3)


def test_a_grid_smaller_than_swins_window_still_gives_maps():
    backbone = load("swin", size=(96, 160), options={"depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 2]})
    assert backbone.stages[-1].shape == (64, 3, 5)
    assert backbone(picture_for(backbone))["stage4"].isfinite().all()


def test_raw_maskformer_swin_is_raw_swin():
    size, options = (224, 224), {"depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 2]}
    swin, maskformer = (load(name, size=size, options=options) for name in ("swin", "maskformer-swin"))
    renamed = {}
    for name, value in swin.network.swin.state_dict().items():
        for new, old in (("attention.q_proj", "attention.self.query"), ("attention.k_proj", "attention.self.key"),
                         ("attention.v_proj", "attention.self.value"), ("attention.o_proj", "attention.output.dense"),
                         ("attention.relative_position_bias.", "attention.self."), ("mlp.fc1", "intermediate.dense"),
                         ("mlp.fc2", "output.dense")):  # fmt: skip
            name = name.replace(new, old)
        renamed[f"model.{name}"] = value
    maskformer.network.load_state_dict(renamed, strict=False)
    assert set(renamed) <= set(maskformer.network.state_dict())
    pixels = picture_for(swin, 1)
    with torch.inference_mode():
        ours, theirs = swin(pixels), maskformer(pixels)
    for stage in theirs:
        assert (ours[stage] - theirs[stage]).abs().max() <= 1e-6 * ours[stage].abs().max()


def test_raw_drops_the_final_norm_of_dinov2_and_native_applies_it():
    raw, native = load("dinov2"), load("dinov2", norm="native")
    pixels = picture_for(raw)
    with torch.inference_mode():
        maps, normed = raw(pixels), native(pixels)
        by_hand = native.network.layernorm(maps["stage2"].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.allclose(by_hand, normed["stage2"], atol=1e-6)


def test_raw_focalnet_is_taken_before_the_downsampling():
    raw, native = load("focalnet"), load("focalnet", norm="native")
    assert [stage.stride for stage in raw.stages] == [4, 4, 8, 16, 32]
    assert [stage.stride for stage in native.stages] == [4, 8, 16, 32, 32]


def test_the_raw_stem_of_dinov3_convnext_is_not_the_picture():
    raw, native = load("dinov3_convnext"), load("dinov3_convnext", norm="native")
    pixels = picture_for(raw)
    assert raw.stages[0].shape == (8, 56, 56)
    assert torch.equal(native(pixels)["stem"], pixels)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("dinov2", 1), ("dinov2_with_registers", 5), ("dinov3_vit", 3), ("beit", 1), ("pixio", 8), ("sapiens2", 3),
     ("tipsv2_vision_model", 2), ("vitpose_backbone", 0), ("vit", 1), ("deit", 2)],
)  # fmt: skip
def test_tokens_keep_their_prefix_and_hold_the_map(name, prefix):
    maps, tokens = load(name), load(name, tokens=True)
    pixels = picture_for(maps)
    with torch.inference_mode():
        as_maps, as_tokens = maps(pixels), tokens.forward(pixels, tokens.taps)
    for stage, one in as_maps.items():
        assert as_tokens[stage].shape == (2, prefix + one.shape[2] * one.shape[3], one.shape[1])
        assert torch.equal(as_tokens[stage][:, prefix:].transpose(1, 2).reshape(one.shape), one)
    assert {tap.layout for tap in tokens.taps} == {"tokens"}


@pytest.mark.parametrize("name", ["dinov2", "dinov3_vit", "vitpose_backbone", "sapiens2"])
def test_native_tokens_are_normed_as_native_maps_are(name):
    maps, tokens = load(name, norm="native"), load(name, norm="native", tokens=True)
    pixels = picture_for(maps)
    with torch.inference_mode():
        as_maps, as_tokens = maps(pixels), tokens.forward(pixels, tokens.taps)
    for stage, one in as_maps.items():
        patches = as_tokens[stage][:, -one.shape[2] * one.shape[3] :]
        assert torch.equal(patches.transpose(1, 2).reshape(one.shape), one)


@pytest.mark.parametrize("name", [name for name in SMALL if FAMILIES[name].attends])
def test_attention_sums_to_one_and_leaves_the_maps_as_they_were(name):
    backbone = load(name)
    pixels = picture_for(backbone, 1)
    with torch.inference_mode():
        before, attentions, after = backbone(pixels), backbone.attend(pixels), backbone(pixels)
    assert len(attentions) in (len(before) - 1, len(before))
    for attention in attentions:
        assert attention.ndim == 4 + (name == "hiera")  # whose windows have an axis of their own
        assert torch.allclose(attention.sum(-1), torch.ones(()), atol=1e-5)
    assert all(torch.equal(before[stage], after[stage]) for stage in before)


def test_several_backbones_share_a_network_whatever_was_asked_of_it_before():
    every = load("swin")
    pixels = picture_for(every)
    last, stem = every.select("stage2"), every.select("stem")
    with torch.inference_mode():
        maps = every(pixels)
        assert torch.equal(stem(pixels)["stem"], maps["stem"])
        assert torch.equal(last(pixels)["stage2"], maps["stage2"])
        with pytest.raises(RuntimeError):
            stem(torch.zeros(2, 5, 56, 56))  # fails inside the cut network
        assert all(torch.equal(maps[name], value) for name, value in every(pixels).items())


def test_modules_by_path_come_with_the_stages():
    backbone = load("swin").select("stage1", layers="swin.encoder.layers.1.blocks.0,swin.layernorm")
    maps = backbone(picture_for(backbone))
    assert list(maps) == ["stage1", "swin.encoder.layers.1.blocks.0", "swin.layernorm"]
    assert maps["swin.layernorm"].shape == (2, 49, 16)


def test_gradients_reach_the_stem_and_not_what_was_cut():
    backbone = load("resnet").select("stage2")
    backbone(picture_for(backbone))["stage2"].sum().backward()
    parameters = dict(backbone.network.named_parameters())
    assert parameters["embedder.embedder.convolution.weight"].grad.abs().sum() > 0
    assert all(value.grad is None for name, value in parameters.items() if name.startswith("encoder.stages.3."))


@pytest.mark.parametrize("norm", ["raw", "native"])
@pytest.mark.parametrize(
    "name", ["vit", *(pytest.param(name, marks=pytest.mark.slow) for name in SMALL if name not in ("vit", *BIG))]
)
def test_it_compiles_without_a_graph_break(name, norm):
    backbone = load(name, norm=norm)
    pixels = picture_for(backbone, 1)
    wanted = [backbone.taps[0], backbone.taps[-2]]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: backbone.forward(x, wanted), backend="eager", fullgraph=True)
    with torch.no_grad():
        got, expected = compiled(pixels), backbone.forward(pixels, wanted)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("name", "size", "hint"),
    [("lw_detr_vit", (100, 128), "128x128"), ("rf_detr_dinov2", (224, 230), "224x224"), ("hiera", (70, 64), "64x64"),
     ("vitpose_backbone", (64, 50), "64x48")],
)  # fmt: skip
def test_a_size_that_a_type_cannot_take_names_one_that_it_can(name, size, hint):
    with pytest.raises(UsageError) as caught:
        load(name, size=size)
    assert hint in caught.value.hint
    height, width = map(int, hint.split("x"))
    assert load(name, size=(height, width)).stages[-1].shape[1] >= 1


@pytest.mark.parametrize(
    ("name", "size"),
    [("lw_detr_vit", (64, 128)), ("rf_detr_dinov2", (112, 168)), ("hiera", (64, 96)), ("vitpose_backbone", (96, 64)),
     ("vit", (96, 80)), ("dinov2", (70, 84)), ("swin", (60, 92)), ("convnext", (65, 97)), ("beit", (96, 80))],
)  # fmt: skip
def test_another_size_gives_another_grid(name, size):
    backbone = load(name, size=size)
    assert backbone.preprocess.size == size
    maps = backbone(picture_for(backbone))
    assert all(value.shape[1:] == stage.shape for value, stage in zip(maps.values(), backbone.stages, strict=True))


def test_the_seed_decides_and_the_callers_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    digests = [load("swin", seed=seed).weights_digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(before, torch.get_rng_state())


def test_dinat_without_natten_says_what_to_install():
    from transformers.utils import is_natten_available

    if is_natten_available():
        assert "dinat" in provider.names()
    else:
        assert "dinat" not in provider.names()
        with pytest.raises(MissingExtraError) as caught:
            load("dinat")
        assert "pip install natten" in caught.value.hint


def test_configurations_whose_tuples_break_the_classes_are_mended():
    for name in ("convnext", "convnextv2", "focalnet"):
        assert isinstance(CONFIG_MAPPING[name]().hidden_sizes, (tuple, list))
        assert provider.load(ModelRef("transformers", name), Build(structure=True)).select("all").stages
