"""Where the stem of each of timm's model files is: the table that `timm` reads, with nothing else in it.

timm itself says where the stages are (`feature_info`, computed by `forward_intermediates`), but not where the stem is:
its index 0 is the stem in some files, a piece of the stem before its pooling in others, the first stage in the rest.
Here a stem is everything before the first block of the first stage, its pooling and the position embedding included,
as in torchvision's table, so that `stageN` means one thing in every library.
"""

from __future__ import annotations

from dataclasses import dataclass

from bbx.taps import Layout


@dataclass(frozen=True, slots=True)
class Family:
    """One row: model files of timm (`timm.models.<file>`), and the module whose output is their stem.

    `stem` is empty where no module gives it. `before` names entries of `feature_info` that belong to the stem without
    being inside that module. `prefixed`: the stem holds the prefix tokens already; elsewhere they are added later.
    `tokens`: a plain ViT, whose blocks give `(b, prefix + h·w, d)`. `modules`, where given, are hooks on all taps that
    replace timm's own choice, and `native` is the module of the last stage under `--norm native`. `grid`: whether timm
    forms the maps; it does not where that needs a tensor's value, which neither the meta device nor a compiled graph
    has. `meta`: whether shapes are found on the meta device; an LSTM runs there step by step in Python, slower than
    the real one on a CPU.
    """

    files: str
    stem: str
    layout: Layout = "nchw"
    prefixed: bool = False
    before: tuple[str, ...] = ()
    tokens: bool = False
    modules: tuple[str, ...] = ()
    native: str = ""
    grid: bool = True
    meta: bool = True


INDEX_0 = "(timm's index 0)"
"""In place of a stem's module: the one that `feature_info` names first."""

_DENSENET = ("features.pool0", *(f"features.denseblock{number}" for number in (1, 2, 3, 4)))

FAMILIES = (
    # timm's index 0 lies before the stem's pooling, or before its last convolution.
    Family("resnet", "maxpool", before=("act1",)),
    Family("senet", "pool0", before=("layer0",)),
    Family("dpn", "features.conv1_pool", before=("features.conv1_1",)),
    Family("hrnet", "act2", before=("stem",)),
    # timm's last map is after the final norm; torchvision's, and the raw one, is the block itself.
    Family("densenet", "features.pool0", modules=_DENSENET, native="features.norm5"),
    # timm's index 0 is the stem, under another name.
    Family("ghostnet repghost", "act1", before=("conv_stem",)),
    Family("mobilenetv5", "conv_stem", before=("bn1",)),
    Family("tresnet", "body.conv1", before=("",)),
    # timm's index 0 is the stem or inside it, or is the first stage: seen by its name.
    Family("efficientnet mobilenetv3", "bn1"),
    Family("byobnet cspnet cspnext maxxvit nfnet resnetv2 selecsls vovnet", "stem"),
    # timm's index 0 is the stem.
    Family("csatv2 dla inception_resnet_v2 inception_v3 inception_v4 nasnet pnasnet regnet vgg xception", INDEX_0),
    # timm's index 0 is the first stage.
    Family("convnext cpubone davit edgenext efficientformer efficientformer_v2 efficientvit_mit fastvit", "stem"),
    Family("focalnet gcvit hgnet iformer inception_next lcnetv2 levit lowformer metaformer nextvit", "stem"),
    Family("rdnet repvit rexnet", "stem"),
    Family("starnet swiftformer xception_aligned convmixer", "stem"),
    Family("mambaout", "stem", "nhwc"),
    Family("sequencer", "stem", "nhwc", meta=False),
    Family("efficientvim efficientvit_msra fasternet nest shvit swin_transformer_v2_cr tiny_vit volo", "patch_embed"),
    Family("swin_transformer swin_transformer_v2 pvt_v2 hieradet_sam2", "patch_embed", "nhwc"),
    Family("hiera", "patch_embed", "tokens"),
    Family("pit visformer", "pos_drop"),
    # Plain ViTs: one stage per block.
    Family("vision_transformer deit eva naflexvit", "norm_pre", "tokens", prefixed=True, tokens=True),
    Family("beit tnt", "pos_drop", "tokens", prefixed=True, tokens=True),
    Family("cait convit xcit", "pos_drop", "tokens", tokens=True),
    Family("vision_transformer_relpos", "patch_embed", "tokens", tokens=True),
    Family("mlp_mixer", "stem", "tokens", tokens=True),
    Family("qwen3_vit deepseek_vit", "patch_embed", "nhwc", tokens=True),
    Family("gemma4_vit", "patch_embed", "tokens", tokens=True, grid=False),
    Family("vision_transformer_sam", "norm_pre", "nhwc"),
    # No module gives the stem: several branches, or tuples that are no map.
    Family("coat crossvit mvitv2 twins", ""),
)

FAMILY_OF = {file: family for family in FAMILIES for file in family.files.split()}
