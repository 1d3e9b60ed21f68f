"""transformers' assembled models by role: shapes, values of the library's own forward, early exit, pretrained parts."""

import io
import json

import pytest
import torch
import transformers

import bbx
from bbx.assembly import assemble
from bbx.errors import BbxError, MissingExtraError, UsageError, WeightsError
from bbx.providers import transformers_tasks
from bbx.providers.transformers_roles import TASKS
from bbx.spec import Build, ModelRef
from bbx.stages import storable_name
from tests.test_assembly import calls

PIXELS = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
          "layer_type": "basic"}  # fmt: skip
SWIN = {"model_type": "swin", "embed_dim": 12, "depths": [1, 2, 1, 2], "num_heads": [1, 2, 3, 4], "window_size": 4,
        "image_size": 128}  # fmt: skip
_FORMER = {"feature_size": 32, "hidden_dim": 32, "mask_feature_size": 32, "encoder_layers": 1, "decoder_layers": 3,
           "num_attention_heads": 2, "encoder_feedforward_dim": 16, "dim_feedforward": 16,
           "num_queries": 6}  # fmt: skip
_DETR = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 6,
         "num_labels": 4}  # fmt: skip
_DECODER = {"model_type": "detr", "use_timm_backbone": False, **{k: v for k, v in _DETR.items() if k != "num_labels"}}
_DPT = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24,
        "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 12, 12], "fusion_hidden_size": 16,
        "image_size": 128}  # fmt: skip

_MASKFORMER = {"decoder_config": _DECODER, "fpn_feature_size": 32, "mask_feature_size": 32, "num_labels": 4}
_UPERNET = {"hidden_size": 16, "auxiliary_in_channels": 24, "auxiliary_channels": 8, "num_labels": 4}

MODELS = {
    "maskformer": {"backbone": RESNET, "options": _MASKFORMER},
    "mask2former": {"backbone": SWIN, "options": {**_FORMER, "num_labels": 4}},
    "detr": {"backbone": RESNET, "options": _DETR},
    "upernet": {"backbone": RESNET, "options": _UPERNET},
    "dpt": {"options": _DPT},
}  # fmt: skip


def built(name: str, **options: object):
    return assemble({"weights": "random", **MODELS[name]}, model=name, size=128, stages="all", **options)


def grid(tokens: torch.Tensor, prefix: int = 0) -> torch.Tensor:
    side = int((tokens.shape[1] - prefix) ** 0.5)
    return tokens[:, prefix:].transpose(1, 2).unflatten(2, (side, side))


def stages(maps) -> dict[str, torch.Tensor]:
    return {f"backbone.stage{n}" if n else "backbone.stem": one for n, one in enumerate(maps)}


def maskformer(network):
    out = network(PIXELS, output_hidden_states=True)
    encoder = network.model.pixel_level_module.encoder(PIXELS, output_hidden_states=True)
    coarse_to_fine = out.pixel_decoder_hidden_states
    return stages(encoder.hidden_states) | {
        "neck.p4": coarse_to_fine[0], "neck.p3": coarse_to_fine[1], "neck.p2": coarse_to_fine[2],
        "neck.mask": out.pixel_decoder_last_hidden_state,
        "head.transformer_module": out.transformer_decoder_last_hidden_state,
        "head.class_predictor": out.class_queries_logits, "head.masks": out.masks_queries_logits,
    }  # fmt: skip


def mask2former(network):
    out = network(PIXELS, output_hidden_states=True)
    encoder = network.model.pixel_level_module.encoder(PIXELS, output_hidden_states=True)
    coarse_to_fine = out.pixel_decoder_hidden_states
    return stages(encoder.hidden_states) | {
        "neck.p5": coarse_to_fine[0], "neck.p4": coarse_to_fine[1], "neck.p3": coarse_to_fine[2],
        "neck.mask": out.pixel_decoder_last_hidden_state,
        "head.transformer_module": out.transformer_decoder_last_hidden_state,
        "head.class_predictor": out.class_queries_logits, "head.masks": out.masks_queries_logits,
    }  # fmt: skip


def detr(network):
    out = network(PIXELS)
    encoder = network.model.backbone.model(PIXELS, output_hidden_states=True)
    return stages(encoder.hidden_states) | {
        "neck.p5": network.model.input_projection(encoder.feature_maps[-1]),
        "neck.encoder": grid(out.encoder_last_hidden_state),
        "head.decoder": out.last_hidden_state,
        "head.class_labels_classifier": out.logits,
        "head.bbox_predictor": network.bbox_predictor(out.last_hidden_state),
    }


def upernet(network):
    encoder = network.backbone(PIXELS, output_hidden_states=True)
    maps, head = list(encoder.feature_maps), network.decode_head
    sums = [lateral(one) for lateral, one in zip(head.lateral_convs, maps, strict=False)] + [head.psp_forward(maps)]
    for level in (3, 2, 1):
        size = sums[level - 1].shape[2:]
        sums[level - 1] = sums[level - 1] + torch.nn.functional.interpolate(sums[level], size=size, mode="bilinear")
    levels = [conv(one) for conv, one in zip(head.fpn_convs, sums, strict=False)]
    logits = head(maps)
    whole = torch.nn.functional.interpolate(logits, size=(128, 128), mode="bilinear", align_corners=False)
    assert torch.equal(whole, network(PIXELS).logits)
    return stages(encoder.hidden_states) | {
        "neck.p2": levels[0], "neck.p3": levels[1], "neck.p4": levels[2], "neck.p5": head.psp_forward(maps),
        "head.decode_head": logits, "head.auxiliary_head": network.auxiliary_head(maps),
    }  # fmt: skip


def dpt(network):
    out = network(PIXELS, output_hidden_states=True)
    hidden = network.dpt(PIXELS, output_hidden_states=True).hidden_states
    neck = network.neck([hidden[1], hidden[2], hidden[3], hidden[4]], 8, 8)
    return stages([grid(one, 1) for one in hidden]) | {
        "neck.p4": neck[0], "neck.p3": neck[1], "neck.p2": neck[2], "neck.p1": neck[3],
        "head.head": out.predicted_depth[:, None],
    }  # fmt: skip


TRUTH = {"maskformer": maskformer, "mask2former": mask2former, "detr": detr, "upernet": upernet, "dpt": dpt}


@pytest.mark.parametrize("name", MODELS)
def test_roles_are_what_the_librarys_own_forward_computes(name):
    backbone = built(name)
    with torch.inference_mode():
        got, expected = backbone(PIXELS), TRUTH[name](backbone.network)
    assert set(got) - set(expected) <= {"neck.fpn_bottleneck", *(f"neck.reassemble.p{n}" for n in (2, 3, 4, 5))}
    assert {role: torch.equal(got[role], one) for role, one in expected.items()} == dict.fromkeys(expected, True)


SHAPES = {
    "maskformer": {"backbone.stage4": (32, 4, 4), "neck.p2": (32, 32, 32), "neck.p4": (32, 8, 8),
                   "neck.mask": (32, 32, 32), "head.class_predictor": (6, 5), "head.masks": (6, 32, 32)},
    "mask2former": {"backbone.stem": (12, 32, 32), "backbone.stage4": (96, 4, 4), "neck.p3": (32, 16, 16),
                    "neck.p5": (32, 4, 4), "neck.mask": (32, 32, 32), "head.class_predictor": (6, 5)},
    "detr": {"backbone.stem": (8, 32, 32), "neck.p5": (16, 4, 4), "neck.encoder": (16, 4, 4),
             "head.class_labels_classifier": (6, 5), "head.bbox_predictor": (6, 4)},
    "upernet": {"backbone.stage1": (8, 32, 32), "neck.p2": (16, 32, 32), "neck.p5": (16, 4, 4),
                "neck.fpn_bottleneck": (16, 32, 32), "head.decode_head": (4, 32, 32), "head.auxiliary_head": (4, 8, 8)},
    "dpt": {"backbone.stage4": (24, 8, 8), "neck.reassemble.p2": (8, 32, 32), "neck.p4": (16, 8, 8),
            "neck.p1": (16, 64, 64), "head.head": (1, 128, 128)},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_strides_are_those_of_the_names(name):
    found = {stage.name: stage for stage in built(name).stages}
    assert {role: found[role].shape for role in SHAPES[name]} == SHAPES[name]
    for role, stage in found.items():
        if level := role.partition(".p")[2]:
            assert stage.stride == 2 ** int(level)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_past_the_deepest_role_runs(name):
    backbone = built(name)
    first = next(one for one in backbone.stage_names if one.startswith("neck."))
    deepest = [one for one in backbone.stage_names if one.startswith("backbone.")][-1]
    counts = [calls(backbone.select(role), PIXELS) for role in ("backbone.stage1", deepest, first, "all")]
    assert counts == sorted(set(counts))


@pytest.mark.parametrize("name", ["maskformer", "detr"])
def test_native_stages_are_what_the_backbone_hands_to_the_neck(name):
    backbone = built(name, norm="native")
    own = [role for role in backbone.stage_names if role.startswith("backbone.")]
    assert own == [f"backbone.stage{number}" for number in (1, 2, 3, 4)]


DINOV2 = {"model_type": "dinov2", "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 16,
          "image_size": 128}  # fmt: skip


def test_dpt_on_a_backbone_reads_its_tokens_as_maps():
    config = {"backbone": DINOV2, "options": {name: one for name, one in _DPT.items() if "backbone" not in name}}
    raw, native = (assemble(config, model="dpt", size=128, stages="all", norm=norm) for norm in ("raw", "native"))
    network = raw.network
    with torch.inference_mode():
        got, own, out = raw(PIXELS), network.backbone(PIXELS, output_hidden_states=True), network(PIXELS)
        for number, one in enumerate(own.hidden_states):
            assert torch.equal(got[f"backbone.stage{number}" if number else "backbone.stem"], grid(one, 1))
        normed = native(PIXELS)
        for number, one in enumerate(own.feature_maps, 1):
            assert torch.equal(normed[f"backbone.stage{number}"], grid(one, 1))
        assert torch.equal(got["head.head"][:, 0], out.predicted_depth)
    assert [name for name in raw.stage_names if name.startswith("neck.p")] == [f"neck.p{n}" for n in (1, 2, 3, 4)]


WINDOWED = {
    "lw_detr": {"model_type": "lw_detr_vit", "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
                "window_block_indices": [0, 2], "pretrain_image_size": 128, "image_size": 128,
                "out_features": ["stage2", "stage4"]},
    "rf_detr": {"model_type": "rf_detr_dinov2", "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
                "patch_size": 16, "num_windows": 2, "image_size": 128, "apply_layernorm": False,
                "out_features": ["stage2", "stage4"]},
}  # fmt: skip


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_are_put_back_where_they_were(name):
    config = {"backbone": WINDOWED[name], "options": {"num_queries": 6}}
    raw, native = (assemble(config, model=name, size=128, stages="all", norm=norm) for norm in ("raw", "native"))
    with torch.inference_mode():
        got, own = raw(PIXELS), native(PIXELS)
    for stage in ("backbone.stage2", "backbone.stage4"):
        assert torch.equal(got[stage], own[stage])
    assert got["backbone.stem"].shape == got["backbone.stage1"].shape == own["backbone.stage4"].shape


def test_layers_by_path_are_read_beside_the_roles():
    backbone = built("detr").select("backbone.stage1", layers="class_labels_classifier")
    with torch.inference_mode():
        got, own = backbone(PIXELS), backbone.network(PIXELS)
    assert torch.equal(got["class_labels_classifier"], own.logits)


def test_a_backbone_may_be_given_as_transformers_own_configuration_object():
    fields = {name: value for name, value in RESNET.items() if name != "model_type"}
    own = transformers.ResNetConfig(**fields, out_features=["stage1", "stage2", "stage3", "stage4"])
    config = {**MODELS["detr"], "backbone": own}
    assert assemble(config, model="detr", size=128).weights_digest == built("detr").weights_digest


def test_the_configuration_is_recorded_canonically():
    backbone = built("detr")
    recorded = json.loads(backbone.config)
    built_from = recorded.pop("configuration")
    assert recorded == {"model": "detr", **MODELS["detr"]}
    assert (built_from["d_model"], built_from["backbone_config"]["hidden_act"]) == (16, "relu")
    assert backbone.weights == "random (seed 0)"
    assert built("detr", seed=1).weights_digest != backbone.weights_digest == built("detr").weights_digest


def test_pretrained_backbone_weights_are_put_into_their_place(tmp_path):
    torch.manual_seed(7)
    own = transformers.ResNetBackbone(transformers.ResNetConfig(**RESNET, out_features=["stage4"]))
    own.save_pretrained(tmp_path / "resnet")
    torch.save(own.state_dict(), tmp_path / "resnet.pth")
    for weights in (tmp_path / "resnet", tmp_path / "resnet.pth"):
        config = {**MODELS["maskformer"], "backbone": {**RESNET, "weights": str(weights)}}
        backbone = assemble(config, model="maskformer", size=128)
        inner = backbone.network.model.pixel_level_module.encoder.state_dict()
        assert set(inner) == set(own.state_dict())
        assert all(torch.equal(inner[name], value) for name, value in own.state_dict().items())
        assert f"{weights.name}" in backbone.weights
    other = assemble({**MODELS["maskformer"]}, model="maskformer", size=128)
    assert other.weights_digest != backbone.weights_digest


def test_a_classifiers_checkpoint_serves_as_backbone_and_its_missing_norms_are_said(tmp_path):
    torch.manual_seed(7)
    own = transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN))
    own.save_pretrained(tmp_path / "swin")
    config = {**MODELS["mask2former"], "backbone": {**SWIN, "weights": str(tmp_path / "swin")}}
    backbone = assemble(config, model="mask2former", size=128)
    inner = backbone.network.model.pixel_level_module.encoder.swin.state_dict()
    kept = {name: value for name, value in own.swin.state_dict().items() if "mask_token" not in name}
    assert all(torch.equal(inner[name], value) for name, value in kept.items())
    again = transformers_tasks.load(ModelRef("transformers", "mask2former", "random"), config=config)
    assert "8 tensors hidden_states_norms.*" in " ".join(again.notes)  # weight and bias at each of four stages


def test_maskformers_own_swin_takes_swin_weights_under_other_names(tmp_path):
    torch.manual_seed(7)
    own = transformers.SwinBackbone(
        transformers.SwinConfig(**SWIN, out_features=["stage1", "stage2", "stage3", "stage4"])
    ).eval()
    own.save_pretrained(tmp_path / "swin")
    config = {**MODELS["maskformer"], "backbone": {**SWIN, "weights": str(tmp_path / "swin")}}
    backbone = assemble(config, model="maskformer", size=128, stages="all")
    with torch.inference_mode():
        got, expected = backbone(PIXELS), own(PIXELS, output_hidden_states=True).hidden_states
    for number in (1, 2, 3, 4):
        assert (got[f"backbone.stage{number}"] - expected[number]).abs().max() <= 1e-5 * expected[number].abs().max()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"hidden_sizes": [8, 16, 24, 40]}, "of another shape"),
        ({"depths": [2, 1, 1, 1]}, "missing"),
        ({"depths": [1, 1, 1, 2]}, "missing"),
    ],
)
def test_backbone_weights_that_do_not_fit_are_refused_with_the_keys(tmp_path, changed, words):
    own = transformers.ResNetBackbone(transformers.ResNetConfig(**RESNET))
    torch.save(own.state_dict(), tmp_path / "resnet.pth")
    weights = {**RESNET, **changed, "weights": str(tmp_path / "resnet.pth")}
    with pytest.raises(WeightsError) as caught:
        assemble({**MODELS["maskformer"], "backbone": weights}, model="maskformer", size=128)
    assert words in caught.value.message
    assert "encoder.stages." in caught.value.message


def test_weights_of_another_type_are_refused_with_both_names(tmp_path):
    transformers.SwinBackbone(transformers.SwinConfig(**SWIN)).save_pretrained(tmp_path / "swin")
    config = {**MODELS["detr"], "backbone": {**RESNET, "weights": str(tmp_path / "swin")}}
    with pytest.raises(WeightsError, match=r"is a resnet, .* is a swin"):
        assemble(config, model="detr")


def test_a_saved_model_is_loaded_from_its_folder(tmp_path):
    source = built("detr").network
    source.save_pretrained(tmp_path / "mine")
    assert transformers_tasks.find(str(tmp_path / "mine")) == str(tmp_path / "mine")
    assert transformers_tasks.find(str(tmp_path)) is None
    ref = ModelRef("transformers", str(tmp_path / "mine"))
    backbone = transformers_tasks.load(ref, Build(size=(128, 128))).select("all")
    assert backbone.weights == str(tmp_path / "mine")
    with torch.inference_mode():
        got, expected = backbone(PIXELS), source(PIXELS)
    assert torch.equal(got["head.class_labels_classifier"], expected.logits)


def test_a_timm_backbone_under_detr_is_read_stage_by_stage(tmp_path):
    import timm

    torch.manual_seed(7)
    own = timm.create_model("resnet18").eval()
    torch.save(own.state_dict(), tmp_path / "resnet18.pth")
    given = {"model": "timm:resnet18", "weights": str(tmp_path / "resnet18.pth")}
    backbone = assemble({"backbone": given, "options": _DETR}, model="detr", size=128, stages="all")
    with torch.inference_mode():
        got, expected = backbone(PIXELS), own.forward_intermediates(PIXELS, intermediates_only=True)
    for number in (1, 2, 3, 4):  # the batch norms are DETR's frozen ones: another order of rounding
        assert (got[f"backbone.stage{number}"] - expected[number]).abs().max() <= 1e-5 * expected[number].abs().max()
    assert got["backbone.stem"].shape[1:] == (64, 32, 32)


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("maskfromer", {}, "did you mean maskformer"),
        ("detr", {"backbone": {**RESNET, "depth": [1]}}, "did you mean depths"),
        ("detr", {"backbone": {"model_type": "resnett"}}, "did you mean resnet"),
        ("detr", {"backbone": RESNET, "options": {"num_querys": 3}}, "did you mean num_queries"),
        ("detr", {"backbone": {**RESNET, "stages": ["stage2", "stage1"]}}, "same order"),
        ("detr", {"backbone": RESNET, "weights": "mine.pth"}, "put weights: under backbone:"),
        ("detr", {"backbon": RESNET}, "did you mean backbone"),
        ("upernet", {"backbone": {**RESNET, "stages": [4]}}, "UperNetForSemanticSegmentation"),
    ],
)
def test_a_configuration_that_is_wrong_says_what_would_be_right(name, config, words):
    with pytest.raises(UsageError) as caught:
        assemble({"weights": "random", **config} if "backbone" not in config else config, model=name, size=128)
    assert words in f"{caught.value.message} {caught.value.hint}"


def test_checkpoints_that_cannot_be_had_say_what_works_offline(tmp_path, monkeypatch):
    with pytest.raises(WeightsError) as caught:
        assemble({"model": "detr"})
    assert "facebook/detr-resnet-50" in caught.value.message
    assert "--weights random" in caught.value.hint


NECKS = {
    "maskformer": "neck.p2 neck.p3 neck.p4 neck.mask", "mask2former": "neck.p3 neck.p4 neck.p5 neck.mask",
    "oneformer": "neck.p3 neck.p4 neck.p5 neck.mask", "detr": "neck.p5 neck.encoder",
    "conditional_detr": "neck.p5 neck.encoder", "table-transformer": "neck.p5 neck.encoder",
    "dab-detr": "neck.p5 neck.encoder", "deformable_detr": "neck.p3 neck.p4 neck.p5 neck.p6 neck.encoder",
    "rt_detr": "neck.p3 neck.p4 neck.p5", "rt_detr_v2": "neck.p3 neck.p4 neck.p5", "d_fine": "neck.p3 neck.p4 neck.p5",
    "deimv2": "neck.p3 neck.p4 neck.p5", "lw_detr": "neck.p4", "rf_detr": "neck.p4",
    "upernet": "neck.p2 neck.p3 neck.p4 neck.p5 neck.fpn_bottleneck", "dpt": "neck.p1 neck.p2 neck.p3 neck.p4",
    "depth_anything": "neck.p1 neck.p2 neck.p3 neck.p4", "prompt_depth_anything": "neck.p1 neck.p2 neck.p3 neck.p4",
    "zoedepth": "neck.p1 neck.p2 neck.p3 neck.p4 neck.p5", "chmv2": "neck.p1 neck.p2 neck.p3 neck.p4",
    "tipsv2_dpt": "neck.p1 neck.p2 neck.p3 neck.p4", "vitpose": "", "pp_ocrv5_mobile_det": "neck.p2",
    "sam2": "neck.p2 neck.p3 neck.p4 neck.p5", "sam2_vision_model": "neck.p2 neck.p3 neck.p4 neck.p5",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_every_type_builds_and_gives_the_roles_of_its_row(name):
    size = TASKS[name].size
    small = size in ((512, 512), (640, 640)) and name != "lw_detr"  # it needs as many cells as it has queries
    build = Build(structure=True, size=(256, 256) if small else size)
    backbone = transformers_tasks.load(ModelRef("transformers", name, "random"), build).select("all")
    roles = [stage.name for stage in backbone.stages]
    necks = [role for role in backbone.stage_names if role.startswith("neck.") and "reassemble" not in role]
    assert " ".join(necks) == NECKS[name]
    assert sorted(roles) == sorted(backbone.stage_names)
    stages = [stage for stage in backbone.stages if stage.name.startswith("backbone.")]
    assert len(stages) >= 4
    assert all(len(stage.shape) == 3 for stage in stages)
    assert name.startswith(("oneformer", "sam2")) or any(role.startswith("head.") for role in roles)


def test_every_role_can_be_stored_under_its_own_name():
    roles = {outlet.name.replace("*", "2") for task in TASKS.values() for outlet in task.outlets}
    assert {role for role in roles if storable_name(role) != role} == set()
    assert {role.partition(".")[0] for role in roles} == {"neck", "head"}


_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_WINDOWS = {"embed_dim": 12, "depths": [1, 2, 1, 2], "num_heads": [1, 2, 3, 4], "window_size": 4, "image_size": 128}
HIERARCHICAL = {
    "bit": {**_STAGES, "embedding_size": 8, "num_groups": 4},
    "convnext": {"depths": [1, 1, 1, 1]},
    "convnextv2": {"depths": [1, 1, 1, 1]},
    "dinov3_convnext": _STAGES,
    "focalnet": {"embed_dim": 8, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 64]},
    "hgnet_v2": {"hidden_sizes": [128, 512, 1024, 2048]},
    "hiera": {"embed_dim": 12, "num_heads": [1, 2, 3, 4], "depths": [1, 1, 1, 1], "image_size": [128, 128]},
    "maskformer-swin": _WINDOWS,
    "pp_lcnet": {"scale": 0.25},
    "pp_lcnet_v3": {"scale": 0.25},
    "pvt_v2": {"hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 3, 4], "depths": [1, 1, 1, 1]},
    "resnet": {**_STAGES, "embedding_size": 8, "layer_type": "basic"},
    "rt_detr_resnet": {**_STAGES, "embedding_size": 8, "layer_type": "basic"},
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "textnet": {},
}  # fmt: skip


@pytest.mark.parametrize("norm", ["raw", "native"])
@pytest.mark.parametrize("kind", HIERARCHICAL)
def test_stages_of_an_inner_backbone_are_those_of_the_backbone_alone(kind, norm):
    given, options = HIERARCHICAL[kind], {"hidden_size": 8, "auxiliary_channels": 8, "num_labels": 4}
    backbone = assemble(
        {"backbone": {"model_type": kind, **given}, "options": options}, model="upernet", size=128, stages="all",
        norm=norm,
    )  # fmt: skip
    alone = bbx.load_backbone(
        f"transformers:{kind}", weights="random", options=given, size=128, stages="all", norm=norm
    )
    alone.network.load_state_dict(backbone.network.backbone.state_dict(), strict=False)
    with torch.inference_mode():
        got, expected = backbone(PIXELS), alone(PIXELS)
    # One window wide, Swin's class shifts it all the same: said in a note.
    shifted = ["stage4"] if norm == "raw" and kind in ("swin", "maskformer-swin") else []
    noted = [note for note in backbone.notes if "shifted all the same" in note]
    assert [note.partition(":")[0] for note in noted] == shifted
    numbers = (1, 2, 3, 4) if norm == "native" else range(int("stem" not in expected), 5)
    for stage in [f"stage{number}" if number else "stem" for number in numbers]:
        one, other = got[f"backbone.{stage}"], expected[stage]
        assert one.shape == other.shape
        assert torch.equal(one, other) == (stage not in shifted), stage


def test_the_code_in_a_folder_is_never_run_nor_asked_about(tmp_path, monkeypatch):
    folder, ran = tmp_path / "mine", tmp_path / "ran"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}})
    )
    (folder / "evil.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import ResNetConfig\nclass EvilConfig(ResNetConfig):\n    model_type = 'evil'\n"
    )
    answers = io.StringIO("y\ny\n")
    monkeypatch.setattr("sys.stdin", answers)
    for model in ({"model": "detr", "backbone": {"model": str(folder), "weights": "random"}}, {"model": str(folder)}):
        with pytest.raises(BbxError) as caught:
            assemble(model, size=128)
        assert str(folder) in caught.value.message
    assert not ran.exists()
    assert answers.tell() == 0


def test_weights_with_more_layers_than_the_backbone_are_refused(tmp_path):
    for kind in (transformers.ResNetBackbone, transformers.ResNetForImageClassification):
        kind(transformers.ResNetConfig(**{**RESNET, "depths": [2, 1, 1, 1]})).save_pretrained(tmp_path / "deep")
        config = {**MODELS["detr"], "backbone": {**RESNET, "weights": str(tmp_path / "deep")}}
        with pytest.raises(WeightsError, match="unexpected") as caught:
            assemble(config, model="detr", size=128)
        assert "encoder.stages.0.layers.1" in caught.value.message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"encoder_layers": 0}, "unexpected"),
        ({"encoder_layers": 2}, "missing"),
        ({"d_model": 32}, "of another shape"),
    ],
)
def test_a_saved_model_is_never_loaded_in_part(tmp_path, options, words):
    built("detr").network.save_pretrained(tmp_path / "mine")
    ref = ModelRef("transformers", str(tmp_path / "mine"))
    with pytest.raises(WeightsError, match=words):
        transformers_tasks.load(ref, Build(size=(128, 128), options=options))


def test_what_a_folder_says_is_recorded_and_another_activation_is_another_run(tmp_path):
    built("detr").network.save_pretrained(tmp_path / "mine")
    ref, file = ModelRef("transformers", str(tmp_path / "mine")), tmp_path / "mine" / "config.json"
    before = transformers_tasks.load(ref, Build(size=(128, 128)))
    content = json.loads(file.read_text())
    content["activation_function"] = "gelu"
    file.write_text(json.dumps(content))
    after = transformers_tasks.load(ref, Build(size=(128, 128)))
    assert json.loads(before.config)["configuration"]["activation_function"] == "relu"
    assert json.loads(after.config)["configuration"]["activation_function"] == "gelu"
    assert before.weights_digest != after.weights_digest
    inner = {**MODELS["detr"], "backbone": {"model": str(tmp_path / "resnet"), "weights": "random"}}
    transformers.ResNetBackbone(transformers.ResNetConfig(**RESNET)).save_pretrained(tmp_path / "resnet")
    assert json.loads(assemble(inner, model="detr", size=128).config)["configuration"]["backbone_config"]["depths"]


def test_options_without_a_backbone_are_recorded():
    ref = ModelRef("transformers", "dpt", "random")
    plain, changed = (
        transformers_tasks.load(ref, Build(size=(128, 128), options={**_DPT, **more}))
        for more in ({}, {"hidden_act": "relu"})
    )
    assert json.loads(changed.config)["options"]["hidden_act"] == "relu"
    assert plain.config != changed.config
    assert plain.weights_digest != changed.weights_digest


def test_a_panoptic_detr_is_read_where_its_detr_is(tmp_path):
    inner = transformers.ResNetConfig(
        **{**RESNET, "hidden_sizes": [8, 16, 24, 32]}, out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    sizes = {**_DETR, "d_model": 64, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
    torch.manual_seed(7)
    own = transformers.DetrForSegmentation(transformers.DetrConfig(**sizes, backbone_config=inner)).eval()
    own.save_pretrained(tmp_path / "panoptic")
    ref = ModelRef("transformers", str(tmp_path / "panoptic"))
    backbone = transformers_tasks.load(ref, Build(size=(128, 128))).select("all")
    with torch.inference_mode():
        got, expected = backbone(PIXELS), own(PIXELS)
    assert torch.equal(got["head.class_labels_classifier"], expected.logits)
    assert torch.equal(got["head.masks"], expected.pred_masks)
    assert got["backbone.stage4"].shape == (2, 32, 4, 4)


@pytest.mark.parametrize(
    "config", [{"model": "detr", "weights": "random"}, {"model": "detr", "backbone": {"model": "timm:resnet18"}}]
)
def test_a_timm_backbone_without_timm_says_what_to_install(config, monkeypatch):
    for module in ("configs", "parts"):
        monkeypatch.setattr(f"bbx.providers.transformers_{module}.is_installed", lambda _name: False)
    with pytest.raises(MissingExtraError, match="timm") as caught:
        assemble(config, size=128)
    assert "pip install 'bbx[timm]'" in caught.value.hint


def test_a_segmenting_dpt_gives_its_classes_as_channels(tmp_path):
    config = transformers.DPTConfig(**_DPT, num_labels=5, architectures=["DPTForSemanticSegmentation"])
    config.save_pretrained(tmp_path / "dpt")
    ref = ModelRef("transformers", str(tmp_path / "dpt"), "random")
    backbone = transformers_tasks.load(ref, Build(size=(128, 128), structure=True)).select("head.head")
    assert backbone.stages[0].shape == (5, 128, 128)


@pytest.mark.parametrize("name", ["to_dict", "_attn_implementation_internal", "from_pretrained"])
def test_an_option_is_a_field_and_no_method(name, tmp_path):
    with pytest.raises(UsageError, match=f"has no '{name}'"):
        assemble({**MODELS["detr"], "options": {name: 3}}, model="detr", size=128)
    built("detr").network.save_pretrained(tmp_path / "mine")
    with pytest.raises(UsageError, match=f"has no '{name}'"):
        transformers_tasks.load(ModelRef("transformers", str(tmp_path / "mine")), Build(options={name: 3}))


def test_preprocessing_is_fetched_where_there_is_a_network_and_for_the_size_asked_for(tmp_path, monkeypatch):
    built("detr").network.save_pretrained(tmp_path / "mine")
    asked = []
    monkeypatch.setattr(transformers_tasks, "is_offline", lambda: False)
    monkeypatch.setattr(transformers_tasks, "preprocess_of", lambda source, **options: asked.append((source, options)))
    ref = ModelRef("transformers", str(tmp_path / "mine"))
    backbone = transformers_tasks.load(ref, Build(size=(128, 160)))
    assert asked == [(str(tmp_path / "mine"), {"local": False, "size": (128, 160)})]
    assert "squashed to 128x160" in " ".join(backbone.notes)


def test_the_names_of_configured_backbones_are_those_known_elsewhere():
    hidden = {}
    for given in ({"model": "swin-tiny"}, {"model": "microsoft/resnet-50"}, {"model": "transformers:Swin_Tiny"}):
        config = {"backbone": {**given, "weights": "random"}, "options": _MASKFORMER}
        backbone = assemble(config, model="maskformer", size=128, stages="all", structure=True)
        hidden[given["model"]] = [one.channels for one in backbone.stages if one.name.startswith("backbone.stage")]
    with pytest.raises(WeightsError, match="microsoft/swin-tiny") as caught:
        assemble({"backbone": {"model": "swin-tiny"}, "options": _MASKFORMER}, model="maskformer", size=128)
    assert "hf download" in caught.value.hint
    assert hidden["swin-tiny"] == hidden["transformers:Swin_Tiny"] == [96, 192, 384, 768]
    assert hidden["microsoft/resnet-50"] == [256, 512, 1024, 2048]


def test_a_timm_backbone_of_four_maps_is_read_and_one_of_another_layout_refused():
    backbone = assemble(
        {"backbone": {"model": "timm:convnext_atto", "weights": "random"}, "options": _DETR}, model="detr", size=128,
        stages="all",
    )  # fmt: skip
    strides = {one.name: one.stride for one in backbone.stages if one.name.startswith("backbone.stage")}
    assert strides == {"backbone.stage1": 4, "backbone.stage2": 8, "backbone.stage3": 16, "backbone.stage4": 32}
    with pytest.raises(UsageError, match="channels last"):
        assemble({"backbone": {"model": "timm:swin-tiny", "weights": "random"}}, model="upernet", size=128)


def test_weights_of_timm_are_named_by_a_tag_or_a_path_below_the_home_folder(tmp_path, monkeypatch):
    import timm

    given = {"model": "timm:resnet18", "weights": "a1_in1k"}
    made = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained=False, **rest: made(name.partition(".")[0], **rest)
    )
    config = {"backbone": given, "options": _DETR}
    assert "timm resnet18.a1_in1k" in assemble(config, model="detr", size=128).weights
    with pytest.raises(UsageError, match="no weights 'a9'") as caught:
        assemble({"backbone": {**given, "weights": "a9"}, "options": _DETR}, model="detr", size=128)
    assert "resnet18.a1_in1k" in caught.value.hint
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "r.pth")
    config = {"backbone": {**given, "weights": "~/r.pth"}, "options": _DETR}
    assert assemble(config, model="detr", size=128).weights == "backbone file r.pth, the rest random (seed 0)"


def test_another_spelling_of_a_path_is_the_same_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(transformers.ResNetBackbone(transformers.ResNetConfig(**RESNET)).state_dict(), "r.pth")
    texts = {
        assemble({**MODELS["detr"], "backbone": {**RESNET, "weights": weights}}, model="detr", size=128).config
        for weights in ("r.pth", "./r.pth", ".//r.pth")
    }
    assert len(texts) == 1


def test_reports_of_the_library_do_not_reach_the_user(tmp_path, capfd):
    transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN)).save_pretrained(tmp_path / "swin")
    capfd.readouterr()
    config = {**MODELS["mask2former"], "backbone": {**SWIN, "weights": str(tmp_path / "swin")}}
    assemble(config, model="mask2former", size=128)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_how_many_parameters_is_not_known_of_a_type():
    assert {row["parameters"] for row in transformers_tasks.list_models()} == {None}


@pytest.mark.parametrize("model", ["maskformer", "upernet", "detr"])
def test_a_configuration_object_that_asks_for_no_stages_gets_those_that_the_class_needs(model):
    config = transformers.ResNetConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 32, 64], embedding_size=8, layer_type="basic"
    )
    backbone = assemble({"model": model, "backbone": config}, structure=True, size=128)
    assert {f"backbone.stage{number}" for number in range(1, 5)} <= set(backbone.stage_names)
    assert any(name.startswith("neck.") for name in backbone.stage_names)


def test_a_package_that_a_class_alone_wants_is_named_with_its_pip_line(monkeypatch):
    def wants_scipy(self, config):
        raise ImportError(
            "MaskFormerLoss requires the scipy library. You can install it with pip:\n`pip install scipy`."
        )

    monkeypatch.setattr(transformers.MaskFormerForInstanceSegmentation, "__init__", wants_scipy)
    with pytest.raises(MissingExtraError, match="pip install scipy"):
        assemble({"model": "maskformer", "backbone": {"model_type": "resnet"}}, structure=True)
