"""What bbx knows of each of transformers' assembled models: where its backbone, its neck and its heads are.

Measured against transformers 5.23; a test builds every row. Left out, because their forward needs more than pixels and
no part of them that has a neck does with pixels alone: grounding_dino, mm_grounding_dino and omdet_turbo (a text),
vitmatte (a trimap as fourth channel), tvp (a video and a question). It is not itself a provider.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bbx.roles import Outlet


@dataclass(frozen=True, slots=True)
class Task:
    """One model type: its class in transformers, `hub` the checkpoint meant by the bare name, roles, usual input.

    `backbones` are the paths where the backbone may be, the first that is there counts. `needs` are the stages that the
    model takes from a backbone of four stages. `part` is the module whose forward needs pixels only, empty: the whole;
    paths begin there. `defaults`: without them the class's own default configuration cannot be built or run.
    `tokens`: the model wants its backbone's maps as tokens. `within`: what stands before every path where the class of
    another task holds this one (panoptic DETR holds a DETR); `besides` are the roles which that class has alone.
    """

    task: str
    hub: str
    backbones: tuple[str, ...]
    outlets: tuple[Outlet, ...]
    size: tuple[int, int] = (512, 512)
    needs: tuple[int, ...] = (1, 2, 3, 4)
    part: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tokens: bool = False
    within: tuple[str, ...] = ()
    besides: tuple[Outlet, ...] = ()


def _as_is(name: str, module: str, *pick: str | int) -> Outlet:
    return Outlet(name, module, pick, "as is")


def _mask2former(pixel_decoder: str) -> tuple[Outlet, ...]:
    return (
        Outlet("neck.p*", pixel_decoder, ("multi_scale_features",)),
        Outlet("neck.mask", pixel_decoder, ("mask_features",)),
    )


def _several(name: str, modules: str, most: int = 6) -> tuple[Outlet, ...]:
    """The levels of a ModuleList, as many as there are."""
    return tuple(Outlet(name, f"{modules}.{level}", optional=True) for level in range(most))


_DETR = (
    Outlet("neck.p*", "model.input_projection"),
    Outlet("neck.encoder", "model.encoder", ("last_hidden_state",), "tokens"),
    _as_is("head.decoder", "model.decoder", "last_hidden_state"),
)
# What the whole model gives where the predictions of a head are refined further.
_LOGITS, _BOXES = _as_is("head.logits", "", "logits"), _as_is("head.pred_boxes", "", "pred_boxes")
_DETECTED = (_as_is("head.decoder", "model.decoder", "last_hidden_state"), _LOGITS, _BOXES)
_DETR_HEAD = (
    _as_is("head.class_labels_classifier", "class_labels_classifier"),
    _as_is("head.bbox_predictor", "bbox_predictor"),
)
_MASKS = (Outlet("head.masks", "", ("pred_masks",)),)
_HYBRID = (Outlet("neck.p*", "model.encoder", ("last_hidden_state",)), *_DETECTED)
_DPT_NECK = (
    Outlet("neck.reassemble.p*", "neck.reassemble_stage", optional=True),
    Outlet("neck.p*", "neck"),
)
_DPT = (
    *_DPT_NECK,
    Outlet("head.head", "head", form="plane"),
    Outlet("head.auxiliary_head", "auxiliary_head", optional=True),
)
_RT = (2, 3, 4)

TASKS: dict[str, Task] = {
    "maskformer": Task(
        "MaskFormerForInstanceSegmentation",
        "facebook/maskformer-swin-base-ade",
        ("model.pixel_level_module.encoder",),
        (
            Outlet("neck.p*", "model.pixel_level_module.decoder.fpn"),
            Outlet("neck.mask", "model.pixel_level_module.decoder", ("last_hidden_state",)),
            _as_is("head.transformer_module", "model.transformer_module", "last_hidden_state"),
            _as_is("head.class_predictor", "", "class_queries_logits"),
            Outlet("head.masks", "", ("masks_queries_logits",)),
        ),
    ),
    "mask2former": Task(
        "Mask2FormerForUniversalSegmentation",
        "facebook/mask2former-swin-small-coco-instance",
        ("model.pixel_level_module.encoder",),
        (
            *_mask2former("model.pixel_level_module.decoder"),
            _as_is("head.transformer_module", "model.transformer_module", "last_hidden_state"),
            _as_is("head.class_predictor", "", "class_queries_logits"),
            Outlet("head.masks", "", ("masks_queries_logits",)),
        ),
    ),
    # Its heads need the task as text besides; these roles do not.
    "oneformer": Task(
        "OneFormerForUniversalSegmentation",
        "shi-labs/oneformer_ade20k_swin_tiny",
        ("encoder",),
        _mask2former("decoder"),
        part="model.pixel_level_module",
    ),
    "detr": Task(
        "DetrForObjectDetection",
        "facebook/detr-resnet-50",
        ("model.backbone.model",),
        (*_DETR, *_DETR_HEAD),
        within=("detr.",),
        besides=_MASKS,
    ),
    "conditional_detr": Task(
        "ConditionalDetrForObjectDetection",
        "microsoft/conditional-detr-resnet-50",
        ("model.backbone.model",),
        (*_DETR, *_DETR_HEAD),
        within=("conditional_detr.",),
        besides=_MASKS,
    ),
    "table-transformer": Task(
        "TableTransformerForObjectDetection",
        "microsoft/table-transformer-detection",
        ("model.backbone.conv_encoder.model",),
        (*_DETR, *_DETR_HEAD),
    ),
    "dab-detr": Task(
        "DabDetrForObjectDetection",
        "IDEA-Research/dab-detr-resnet-50",
        ("model.backbone.conv_encoder.model",),
        (*_DETR, _as_is("head.class_embed", "class_embed"), _BOXES),
    ),
    "deformable_detr": Task(
        "DeformableDetrForObjectDetection",
        "SenseTime/deformable-detr",
        ("model.backbone.model",),
        (
            *_several("neck.p*", "model.input_proj"),
            _as_is("neck.encoder", "model.encoder", "last_hidden_state"),
            *_DETECTED,
        ),
        needs=_RT,
    ),
    "rt_detr": Task(
        "RTDetrForObjectDetection", "PekingU/rtdetr_r50vd", ("model.backbone.model",), _HYBRID, (640, 640), _RT
    ),
    "rt_detr_v2": Task(
        "RTDetrV2ForObjectDetection", "PekingU/rtdetr_v2_r50vd", ("model.backbone.model",), _HYBRID, (640, 640), _RT
    ),
    "d_fine": Task(
        "DFineForObjectDetection",
        "ustc-community/dfine-xlarge-coco",
        ("model.backbone.model",),
        _HYBRID,
        (640, 640),
        _RT,
    ),
    "deimv2": Task(
        "Deimv2ForObjectDetection",
        "Intellindust/DEIMv2_HGNetv2_N_COCO",
        ("model.conv_encoder.model",),
        (Outlet("neck.p*", "model.encoder", ("feature_maps",)), *_DETECTED),
        (640, 640),
        _RT,
    ),
    "lw_detr": Task(
        "LwDetrForObjectDetection",
        "AnnaZhang/lwdetr_small_60e_coco",
        ("model.backbone.backbone",),
        (Outlet("neck.p*", "model.backbone.projector"), *_DETECTED),
        (640, 640),
        defaults={"projector_scale_factors": [1.0]},
    ),
    "rf_detr": Task(
        "RfDetrForObjectDetection",
        "Roboflow/rf-detr-base",
        ("model.backbone.backbone",),
        (Outlet("neck.p*", "model.backbone.projector"), *_DETECTED),
        (560, 560),
        within=("model.",),
        besides=_MASKS,
    ),
    # Pyramid pooling makes the coarsest level, lateral sums the others; all levels meet in the bottleneck.
    "upernet": Task(
        "UperNetForSemanticSegmentation",
        "openmmlab/upernet-convnext-tiny",
        ("backbone",),
        (
            Outlet("neck.p*", "decode_head.bottleneck"),
            *_several("neck.p*", "decode_head.fpn_convs", 3),
            Outlet("neck.fpn_bottleneck", "decode_head.fpn_bottleneck"),
            Outlet("head.decode_head", "decode_head"),
            Outlet("head.auxiliary_head", "auxiliary_head", optional=True),
        ),
    ),
    "dpt": Task(
        "DPTForDepthEstimation",
        "Intel/dpt-large",
        ("backbone", "dpt.embeddings.backbone", "dpt"),
        _DPT,
        (384, 384),
        tokens=True,
    ),
    "depth_anything": Task(
        "DepthAnythingForDepthEstimation",
        "LiheYoung/depth-anything-small-hf",
        ("backbone",),
        _DPT,
        (518, 518),
        tokens=True,
    ),
    "prompt_depth_anything": Task(
        "PromptDepthAnythingForDepthEstimation",
        "depth-anything/prompt-depth-anything-vits-hf",
        ("backbone",),
        _DPT,
        (518, 518),
        tokens=True,
    ),
    "zoedepth": Task(
        "ZoeDepthForDepthEstimation",
        "Intel/zoedepth-nyu",
        ("backbone",),
        (
            *_DPT_NECK,
            Outlet("head.relative_head", "relative_head", (0,), "plane"),
            Outlet("head.metric_head", "metric_head", (0,)),
        ),
        (384, 384),
        tokens=True,
    ),
    "chmv2": Task(
        "CHMv2ForDepthEstimation",
        "facebook/dinov3-vitl16-chmv2-dpt-head",
        ("backbone",),
        (
            Outlet("neck.reassemble.p*", "head.reassemble_stage"),
            *_several("neck.p*", "head.fusion_layers"),
            Outlet("head.head", "head"),
            Outlet("head.features_to_depth", "features_to_depth"),
        ),
        (416, 416),
    ),
    "tipsv2_dpt": Task(
        "Tipsv2DptForDepthEstimation",
        "google/tipsv2-b14-dpt",
        ("backbone",),
        (*_DPT_NECK, Outlet("head.decoder", "decoder")),
        (448, 448),
        tokens=True,
    ),
    "vitpose": Task(
        "VitPoseForPoseEstimation",
        "usyd-community/vitpose-base-simple",
        ("backbone",),
        (Outlet("head.head", "head"),),
        (256, 192),
    ),
    "pp_ocrv5_mobile_det": Task(
        "PPOCRV5MobileDetForObjectDetection",
        "PaddlePaddle/PP-OCRv5_mobile_det_safetensors",
        ("model.backbone",),
        (Outlet("neck.p*", "model.neck"), Outlet("head.head", "head")),
    ),
    # The mask decoder of SAM 2 needs prompts; its image encoder does not.
    "sam2": Task(
        "Sam2Model",
        "facebook/sam2.1-hiera-tiny",
        ("backbone",),
        (Outlet("neck.p*", "neck", (0,)),),
        (1024, 1024),
        part="vision_encoder",
    ),
    "sam2_vision_model": Task(
        "Sam2VisionModel", "facebook/sam2.1-hiera-tiny", ("backbone",), (Outlet("neck.p*", "neck", (0,)),), (1024, 1024)
    ),
}
