"""What each library calls the same tensors, family by family: the tables behind `transplant`.

A row pairs name prefixes of a family's *hub* (torchvision, where it has the family) with another library's; the rest of
the name is carried over, and the first row that fits counts:

- `#` is a number, `*` any text without a dot; both are carried over, in their order;
- `{1,3,5}` and `{0,1,2}` are paired place by place, `0..3` inside is a range;
- `<q|k|v>` are thirds of the hub's tensor along its first axis; an empty one is zeros that the library does not store.

What is left out stays the target's own: heads (everything after the last stage but a final norm), transformers' extra
norms of a backbone, and buffers that follow from the architecture. A final norm, by the hub's name, serves no stage as
it is: it goes over where both sides have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Rows = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture family: by library, `rows` from the hub's names to its own, and the names left out."""

    hub: str
    rows: Mapping[str, Rows]
    left_out: Mapping[str, tuple[str, ...]]
    final_norm: str = ""


def _same(*names: str) -> Rows:
    return tuple((name, name) for name in names)


def _blocks(hub: str, other: str, block: tuple[str, str]) -> tuple[str, str]:
    return hub + block[0], other + block[1]


# Blocks of the MobileNet and EfficientNet kind in torchvision, and in timm; `SE` has squeeze-and-excitation.
_EXPANDED = (".block.{0.0,0.1,1.0,1.1,2.0,2.1}", ".{conv_pw,bn1,conv_dw,bn2,conv_pwl,bn3}")
_EXPANDED_SE = (
    ".block.{0.0,0.1,1.0,1.1,2.fc1,2.fc2,3.0,3.1}",
    ".{conv_pw,bn1,conv_dw,bn2,se.conv_reduce,se.conv_expand,conv_pwl,bn3}",
)
_SEPARABLE = (".block.{0.0,0.1,1.0,1.1}", ".{conv_dw,bn1,conv_pw,bn2}")
_SEPARABLE_SE = (
    ".block.{0.0,0.1,1.fc1,1.fc2,2.0,2.1}",
    ".{conv_dw,bn1,se.conv_reduce,se.conv_expand,conv_pw,bn2}",
)
_FUSED = (".block.{0.0,0.1}", ".{conv,bn1}")
_FUSED_EXPANDED = (".block.{0.0,0.1,1.0,1.1}", ".{conv_exp,bn1,conv_pwl,bn2}")
_CONV_STEM = ("features.0.{0,1}", "{conv_stem,bn1}")


SWIN = Family(
    "torchvision",
    {
        "timm": (
            ("features.0.{0,2}", "patch_embed.{proj,norm}"),
            ("features.{1,3,5,7}.#.mlp.{0,3}", "layers.{0..3}.blocks.#.mlp.{fc1,fc2}"),
            ("features.{1,3,5,7}.#", "layers.{0..3}.blocks.#"),
            ("features.{2,4,6}", "layers.{1,2,3}.downsample"),
            ("norm", "norm"),
        ),
        "transformers": (
            ("features.0.{0,2}", "embeddings.{patch_embeddings.projection,norm}"),
            ("features.{1,3,5,7}.#.{norm1,norm2}", "encoder.layers.{0..3}.blocks.#.{layernorm_before,layernorm_after}"),
            ("features.{1,3,5,7}.#.attn.qkv", "encoder.layers.{0..3}.blocks.#.attention.<q_proj|k_proj|v_proj>"),
            ("features.{1,3,5,7}.#.attn.proj", "encoder.layers.{0..3}.blocks.#.attention.o_proj"),
            (
                "features.{1,3,5,7}.#.attn.relative_position_bias_table",
                "encoder.layers.{0..3}.blocks.#.attention.relative_position_bias.relative_position_bias_table",
            ),
            ("features.{1,3,5,7}.#.mlp.{0,3}", "encoder.layers.{0..3}.blocks.#.mlp.{fc1,fc2}"),
            ("features.{2,4,6}", "encoder.layers.{0,1,2}.downsample"),
            ("norm", "layernorm"),
        ),
    },
    {
        "torchvision": ("head", "features.{1,3,5,7}.#.attn.relative_position_index"),
        "timm": ("head", "layers.#.blocks.#.attn.relative_position_index", "layers.#.blocks.#.attn_mask"),
        "transformers": ("classifier", "hidden_states_norms"),
    },
    "norm",
)

# The bias of the keys changes nothing here: torchvision zeroes it in its forward, the others have none.
SWINV2 = Family(
    "torchvision",
    {
        "timm": (
            ("features.0.{0,2}", "patch_embed.{proj,norm}"),
            ("features.{1,3,5,7}.#.attn.qkv.bias", "layers.{0..3}.blocks.#.attn.<q_bias||v_bias>"),
            ("features.{1,3,5,7}.#.mlp.{0,3}", "layers.{0..3}.blocks.#.mlp.{fc1,fc2}"),
            ("features.{1,3,5,7}.#", "layers.{0..3}.blocks.#"),
            ("features.{2,4,6}", "layers.{1,2,3}.downsample"),
            ("norm", "norm"),
        ),
        "transformers": (
            ("features.0.{0,2}", "embeddings.{patch_embeddings.projection,norm}"),
            ("features.{1,3,5,7}.#.{norm1,norm2}", "encoder.layers.{0..3}.blocks.#.{layernorm_before,layernorm_after}"),
            ("features.{1,3,5,7}.#.attn.qkv.bias", "encoder.layers.{0..3}.blocks.#.attention.self.<query||value>.bias"),
            ("features.{1,3,5,7}.#.attn.qkv", "encoder.layers.{0..3}.blocks.#.attention.self.<query|key|value>"),
            ("features.{1,3,5,7}.#.attn.logit_scale", "encoder.layers.{0..3}.blocks.#.attention.self.logit_scale"),
            (
                "features.{1,3,5,7}.#.attn.cpb_mlp",
                "encoder.layers.{0..3}.blocks.#.attention.self.continuous_position_bias_mlp",
            ),
            ("features.{1,3,5,7}.#.attn.proj", "encoder.layers.{0..3}.blocks.#.attention.output.dense"),
            ("features.{1,3,5,7}.#.mlp.{0,3}", "encoder.layers.{0..3}.blocks.#.{intermediate.dense,output.dense}"),
            ("features.{2,4,6}", "encoder.layers.{0,1,2}.downsample"),
            ("norm", "layernorm"),
        ),
    },
    {
        "torchvision": (
            "head",
            "features.{1,3,5,7}.#.attn.{relative_position_index,relative_coords_table}",
        ),
        "timm": ("head", "layers.#.blocks.#.{attn_mask,attn.k_bias}"),
        "transformers": ("classifier",),
    },
    "norm",
)

RESNET = Family(
    "torchvision",
    {
        "timm": _same("conv1", "bn1", "layer#"),
        "transformers": (
            ("{conv1,bn1}", "embedder.embedder.{convolution,normalization}"),
            ("layer{1..4}.#.downsample.{0,1}", "encoder.stages.{0..3}.layers.#.shortcut.{convolution,normalization}"),
            ("layer{1..4}.#.conv{1..3}", "encoder.stages.{0..3}.layers.#.layer.{0..2}.convolution"),
            ("layer{1..4}.#.bn{1..3}", "encoder.stages.{0..3}.layers.#.layer.{0..2}.normalization"),
        ),
    },
    {"torchvision": ("fc",), "timm": ("fc",), "transformers": ("classifier",)},
)

CONVNEXT = Family(
    "torchvision",
    {
        "timm": (
            ("features.0.{0,1}", "stem.{0,1}"),
            ("features.{1,3,5,7}.#.layer_scale", "stages.{0..3}.blocks.#.gamma"),
            ("features.{1,3,5,7}.#.block.{0,2,3,5}", "stages.{0..3}.blocks.#.{conv_dw,norm,mlp.fc1,mlp.fc2}"),
            ("features.{2,4,6}", "stages.{1,2,3}.downsample"),
        ),
        "transformers": (
            ("features.0.{0,1}", "embeddings.{patch_embeddings,layernorm}"),
            ("features.{1,3,5,7}.#.layer_scale", "encoder.stages.{0..3}.layers.#.layer_scale_parameter"),
            (
                "features.{1,3,5,7}.#.block.{0,2,3,5}",
                "encoder.stages.{0..3}.layers.#.{dwconv,layernorm,pwconv1,pwconv2}",
            ),
            ("features.{2,4,6}", "encoder.stages.{1,2,3}.downsampling_layer"),
        ),
    },
    {
        "torchvision": ("classifier",),
        "timm": ("head",),
        "transformers": ("classifier", "layernorm", "hidden_states_norms"),
    },
)

VIT = Family(
    "torchvision",
    {
        "timm": (
            ("{class_token,encoder.pos_embedding,conv_proj}", "{cls_token,pos_embed,patch_embed.proj}"),
            ("encoder.layers.encoder_layer_#.{ln_1,ln_2}", "blocks.#.{norm1,norm2}"),
            ("encoder.layers.encoder_layer_#.self_attention.in_proj_{weight,bias}", "blocks.#.attn.qkv.{weight,bias}"),
            ("encoder.layers.encoder_layer_#.self_attention.out_proj", "blocks.#.attn.proj"),
            ("encoder.layers.encoder_layer_#.mlp.{0,3}", "blocks.#.mlp.{fc1,fc2}"),
            ("encoder.ln", "norm"),
        ),
        "transformers": (
            (
                "{class_token,encoder.pos_embedding,conv_proj}",
                "embeddings.{cls_token,position_embeddings,patch_embeddings.projection}",
            ),
            ("encoder.layers.encoder_layer_#.{ln_1,ln_2}", "layers.#.{layernorm_before,layernorm_after}"),
            (
                "encoder.layers.encoder_layer_#.self_attention.in_proj_{weight,bias}",
                "layers.#.attention.<q_proj|k_proj|v_proj>.{weight,bias}",
            ),
            ("encoder.layers.encoder_layer_#.self_attention.out_proj", "layers.#.attention.o_proj"),
            ("encoder.layers.encoder_layer_#.mlp.{0,3}", "layers.#.mlp.{fc1,fc2}"),
            ("encoder.ln", "layernorm"),
        ),
    },
    {
        "torchvision": ("heads",),
        "timm": ("head",),
        "transformers": ("classifier", "pooler", "embeddings.mask_token"),
    },
    "encoder.ln",
)

DINOV2 = Family(
    "timm",
    {
        "transformers": (
            (
                "{cls_token,pos_embed,patch_embed.proj}",
                "embeddings.{cls_token,position_embeddings,patch_embeddings.projection}",
            ),
            ("blocks.#.{norm1,norm2,mlp}", "encoder.layer.#.{norm1,norm2,mlp}"),
            ("blocks.#.ls{1,2}.gamma", "encoder.layer.#.layer_scale{1,2}.lambda1"),
            ("blocks.#.attn.qkv", "encoder.layer.#.attention.<q_proj|k_proj|v_proj>"),
            ("blocks.#.attn.proj", "encoder.layer.#.attention.o_proj"),
            ("norm", "layernorm"),
        )
    },
    {"timm": ("head",), "transformers": ("classifier", "embeddings.mask_token")},
    "norm",
)

EFFICIENTNET = Family(
    "torchvision",
    {
        "timm": (
            _CONV_STEM,
            _blocks("features.1.#", "blocks.0.#", _SEPARABLE_SE),
            _blocks("features.{2..7}.#", "blocks.{1..6}.#", _EXPANDED_SE),
        )
    },
    {"torchvision": ("features.8", "classifier"), "timm": ("conv_head", "bn2", "classifier")},
)

EFFICIENTNET_V2 = Family(
    "torchvision",
    {
        "timm": (
            _CONV_STEM,
            _blocks("features.1.#", "blocks.0.#", _FUSED),
            _blocks("features.{2,3}.#", "blocks.{1,2}.#", _FUSED_EXPANDED),
            _blocks("features.{4..7}.#", "blocks.{3..6}.#", _EXPANDED_SE),
        )
    },
    # The head's convolution is number 7 in the small one, 8 in the others, which have a stage more.
    {
        "torchvision": (
            "features.{7,8}.0.weight",
            "features.{7,8}.1.{weight,bias,running_mean,running_var,num_batches_tracked}",
            "classifier",
        ),
        "timm": ("conv_head", "bn2", "classifier"),
    },
)

MOBILENET_V2 = Family(
    "torchvision",
    {
        "timm": (
            _CONV_STEM,
            ("features.1.conv.{0.0,0.1,1,2}", "blocks.0.0.{conv_dw,bn1,conv_pw,bn2}"),
            (
                "features.{2..17}.conv.{0.0,0.1,1.0,1.1,2,3}",
                "blocks.{1.0,1.1,2.0,2.1,2.2,3.0,3.1,3.2,3.3,4.0,4.1,4.2,5.0,5.1,5.2,6.0}"
                ".{conv_pw,bn1,conv_dw,bn2,conv_pwl,bn3}",
            ),
        )
    },
    {"torchvision": ("features.18", "classifier"), "timm": ("conv_head", "bn2", "classifier")},
)

MOBILENET_V3_LARGE = Family(
    "torchvision",
    {
        "timm": (
            _CONV_STEM,
            _blocks("features.1", "blocks.0.0", _SEPARABLE),
            _blocks("features.{2,3,7..10}", "blocks.{1.0,1.1,3.0,3.1,3.2,3.3}", _EXPANDED),
            _blocks("features.{4..6,11..15}", "blocks.{2.0,2.1,2.2,4.0,4.1,5.0,5.1,5.2}", _EXPANDED_SE),
            ("features.16.{0,1}", "blocks.6.0.{conv,bn1}"),
        )
    },
    {"torchvision": ("classifier",), "timm": ("conv_head", "classifier")},
)

MOBILENET_V3_SMALL = Family(
    "torchvision",
    {
        "timm": (
            _CONV_STEM,
            _blocks("features.1", "blocks.0.0", _SEPARABLE_SE),
            _blocks("features.{2,3}", "blocks.{1.0,1.1}", _EXPANDED),
            _blocks("features.{4..11}", "blocks.{2.0,2.1,2.2,3.0,3.1,4.0,4.1,4.2}", _EXPANDED_SE),
            ("features.12.{0,1}", "blocks.5.0.{conv,bn1}"),
        )
    },
    {"torchvision": ("classifier",), "timm": ("conv_head", "classifier")},
)

MNASNET = Family(
    "torchvision",
    {
        "timm": (
            ("layers.{0,1}", "{conv_stem,bn1}"),
            ("layers.{3,4,6,7}", "blocks.0.0.{conv_dw,bn1,conv_pw,bn2}"),
            ("layers.{8..13}.#.layers.{0,1,3,4,6,7}", "blocks.{1..6}.#.{conv_pw,bn1,conv_dw,bn2,conv_pwl,bn3}"),
        )
    },
    {"torchvision": ("layers.{14,15}", "classifier"), "timm": ("conv_head", "bn2", "classifier")},
)

# torchvision counts a stage's blocks from 0, timm from 1; no RegNet has a stage of more than 40.
REGNET = Family(
    "torchvision",
    {
        "timm": (
            ("stem.{0,1}", "stem.{conv,bn}"),
            *(
                row
                for s in (1, 2, 3, 4)
                for there, here in [(f"trunk_output.block{s}.block{s}-{{0..39}}", f"s{s}.b{{1..40}}")]
                for row in (
                    (there + ".proj.{0,1}", here + ".downsample.{conv,bn}"),
                    (there + ".f.{a,b,c}.{0,1}", here + ".{conv1,conv2,conv3}.{conv,bn}"),
                    (there + ".f.se", here + ".se"),
                )
            ),
        )
    },
    {"torchvision": ("fc",), "timm": ("head",)},
)

DENSENET = Family("torchvision", {"timm": _same("features")}, {"torchvision": ("classifier",), "timm": ("classifier",)})
VGG = Family(
    "torchvision", {"timm": _same("features")}, {"torchvision": ("classifier",), "timm": ("pre_logits", "head")}
)
INCEPTION_V3 = Family(
    "torchvision",
    {"timm": _same("Conv2d_*", "Mixed_*")},
    {"torchvision": ("fc", "AuxLogits"), "timm": ("fc", "AuxLogits")},
)

# The Swin inside MaskFormer is a class of its own, with its norms in a list: `maskformer` stands for it as a library.
MASKFORMER_SWIN = Family(
    "transformers",
    {
        "maskformer": (
            ("{embeddings,layernorm}", "model.{embeddings,layernorm}"),
            ("encoder.layers.#.{downsample}", "model.encoder.layers.#.{downsample}"),
            (
                "encoder.layers.#.blocks.#.{layernorm_before,layernorm_after}",
                "model.encoder.layers.#.blocks.#.{layernorm_before,layernorm_after}",
            ),
            (
                "encoder.layers.#.blocks.#.attention.{q_proj,k_proj,v_proj,o_proj}",
                "model.encoder.layers.#.blocks.#.attention.{self.query,self.key,self.value,output.dense}",
            ),
            (
                "encoder.layers.#.blocks.#.attention.relative_position_bias.relative_position_bias_table",
                "model.encoder.layers.#.blocks.#.attention.self.relative_position_bias_table",
            ),
            ("encoder.layers.#.blocks.#.mlp.fc1", "model.encoder.layers.#.blocks.#.intermediate.dense"),
            ("encoder.layers.#.blocks.#.mlp.fc2", "model.encoder.layers.#.blocks.#.output.dense"),
            ("hidden_states_norms.stage{1..4}", "hidden_states_norms.{0..3}"),
        )
    },
    {
        "transformers": ("classifier", "hidden_states_norms.stem"),
        "maskformer": ("model.encoder.layers.#.blocks.#.attention.self.relative_position_index",),
    },
    "layernorm",
)

FAMILIES = {
    "swin": SWIN,
    "swinv2": SWINV2,
    "resnet": RESNET,
    "resnext": RESNET,
    "wide-resnet": RESNET,
    "convnext": CONVNEXT,
    "vit": VIT,
    "dinov2": DINOV2,
    "efficientnet": EFFICIENTNET,
    "efficientnet-v2": EFFICIENTNET_V2,
    "mobilenet-v2": MOBILENET_V2,
    "mobilenet-v3-large": MOBILENET_V3_LARGE,
    "mobilenet-v3-small": MOBILENET_V3_SMALL,
    "mnasnet": MNASNET,
    "regnet": REGNET,
    "densenet": DENSENET,
    "vgg": VGG,
    "inception-v3": INCEPTION_V3,
    "maskformer-swin": MASKFORMER_SWIN,
}
