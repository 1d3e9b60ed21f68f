"""The names that papers and hubs use, and what each library calls the same architecture.

One row per architecture: with one name it is found in any library (`swin-tiny`, `timm:swin-tiny`), and
`bbx stages swin-tiny --compare` puts the libraries side by side. The rows of one alias are the same network, stage by
stage, under the same weights (a test holds them to it); the weights that each library publishes are others.
"""

from __future__ import annotations

# alias: (torchvision, timm, transformers), "" where a library has no such network. The first is meant by the bare name.
TWINS: dict[str, tuple[str, str, str]] = {
    "swin-tiny": ("swin_t", "swin_tiny_patch4_window7_224", "microsoft/swin-tiny-patch4-window7-224"),
    "swin-small": ("swin_s", "swin_small_patch4_window7_224", "microsoft/swin-small-patch4-window7-224"),
    "swin-base": ("swin_b", "swin_base_patch4_window7_224", "microsoft/swin-base-patch4-window7-224"),
    "swinv2-tiny": ("swin_v2_t", "swinv2_tiny_window8_256", "microsoft/swinv2-tiny-patch4-window8-256"),
    "swinv2-small": ("swin_v2_s", "swinv2_small_window8_256", "microsoft/swinv2-small-patch4-window8-256"),
    "swinv2-base": ("swin_v2_b", "swinv2_base_window8_256", "microsoft/swinv2-base-patch4-window8-256"),
    "convnext-tiny": ("convnext_tiny", "convnext_tiny", "facebook/convnext-tiny-224"),
    "convnext-small": ("convnext_small", "convnext_small", "facebook/convnext-small-224"),
    "convnext-base": ("convnext_base", "convnext_base", "facebook/convnext-base-224"),
    "resnet-18": ("resnet18", "resnet18", "microsoft/resnet-18"),
    "resnet-34": ("resnet34", "resnet34", "microsoft/resnet-34"),
    "resnet-50": ("resnet50", "resnet50", "microsoft/resnet-50"),
    "resnet-101": ("resnet101", "resnet101", "microsoft/resnet-101"),
    "resnet-152": ("resnet152", "resnet152", "microsoft/resnet-152"),
    "resnext-50": ("resnext50_32x4d", "resnext50_32x4d", ""),
    "vit-base-16": ("vit_b_16", "vit_base_patch16_224", "google/vit-base-patch16-224"),
    "vit-base-32": ("vit_b_32", "vit_base_patch32_224", ""),
    "vit-large-16": ("vit_l_16", "vit_large_patch16_224", ""),
    "vit-large-32": ("vit_l_32", "vit_large_patch32_224", ""),
    "vit-huge-14": ("vit_h_14", "vit_huge_patch14_224", ""),
    "maxvit-tiny": ("maxvit_t", "", ""),
    "efficientnet-b0": ("efficientnet_b0", "efficientnet_b0", ""),
    "efficientnet-v2-s": ("efficientnet_v2_s", "efficientnetv2_s", ""),
    "mobilenet-v2": ("mobilenet_v2", "mobilenetv2_100", ""),
    "mobilenet-v3-large": ("mobilenet_v3_large", "mobilenetv3_large_100", ""),
    "mobilenet-v3-small": ("mobilenet_v3_small", "mobilenetv3_small_100", ""),
    "mnasnet-1-0": ("mnasnet1_0", "mnasnet_100", ""),
    "densenet-121": ("densenet121", "densenet121", ""),
    "vgg-11": ("vgg11", "vgg11", ""),
    "vgg-16": ("vgg16", "vgg16", ""),
    "inception-v3": ("inception_v3", "inception_v3", ""),
    "regnet-x-400mf": ("regnet_x_400mf", "regnetx_004_tv", ""),
    "regnet-y-400mf": ("regnet_y_400mf", "regnety_004", ""),
    "dinov2-small": ("", "vit_small_patch14_dinov2", "facebook/dinov2-small"),
    "dinov2-base": ("", "vit_base_patch14_dinov2", "facebook/dinov2-base"),
    "dinov2-large": ("", "vit_large_patch14_dinov2", "facebook/dinov2-large"),
}

LIBRARIES = ("torchvision", "timm", "transformers")


def twins(alias: str) -> dict[str, str]:
    """Provider → its own name for `alias`, for the providers that have it."""
    return {library: name for library, name in zip(LIBRARIES, TWINS[alias], strict=True) if name}
