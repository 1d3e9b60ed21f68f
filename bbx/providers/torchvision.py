"""All classification models of torchvision, their stages named by one table.

Row by row the table says which module's output ends the stem and each stage. A stage ends at the last block before the
next spatial reduction; a stem includes its own pooling (ResNet, DenseNet, ShuffleNet); convolutions and norms that only
the classifier uses are excluded, but for MobileNetV3's last, which torchvision's own detection models take as a stage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models.vision_transformer import interpolate_embeddings

from bbx.backbone import Backbone
from bbx.errors import UsageError, nearest
from bbx.spec import BUILD, Build, ModelRef, Preprocess
from bbx.taps import Layout, Tap
from bbx.weights import check_file, digest, fetch, load_into, read_state_dict, seeded

Paths = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """One row: the models whose name matches `pattern`, and the modules whose outputs are stem, stage1, stage2, …"""

    pattern: str
    modules: Paths | Callable[[nn.Module], Paths]
    layout: Layout = "nchw"
    prefix: int = 0


def _features(*numbers: int) -> Paths:
    return tuple(f"features.{number}" for number in numbers)


def _vgg(network: nn.Module) -> Paths:
    # The last ReLU before each pool, then the last pool itself.
    layers: Any = network.features
    pools = [place for place, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
    return _features(*(pool - 1 for pool in pools), pools[-1])


def _vit(network: nn.Module) -> Paths:
    blocks: Any = network.get_submodule("encoder.layers")
    return ("encoder.dropout", *(f"encoder.layers.{name}" for name, _ in blocks.named_children()))


FAMILIES = (
    Family(r"alexnet", _features(1, 4, 11)),
    Family(r"vgg\d+(_bn)?", _vgg),
    Family(r"squeezenet1_0", _features(1, 5, 10, 12)),
    Family(r"squeezenet1_1", _features(1, 4, 7, 12)),
    Family(r"densenet\d+", ("features.pool0", *(f"features.denseblock{n}" for n in (1, 2, 3, 4)))),
    Family(r"(wide_)?res(net|next).*", ("maxpool", "layer1", "layer2", "layer3", "layer4")),
    Family(r"googlenet", ("conv1", "conv3", "inception3b", "inception4e", "inception5b")),
    Family(r"inception_v3", ("Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c")),
    Family(r"mobilenet_v2", _features(0, 1, 3, 6, 13, 17)),
    Family(r"mobilenet_v3_large", _features(0, 1, 3, 6, 12, 16)),
    Family(r"mobilenet_v3_small", _features(0, 1, 3, 8, 12)),
    Family(r"mnasnet.*", tuple(f"layers.{n}" for n in (2, 7, 8, 9, 11, 13))),
    # torchvision's attribute names are one ahead of ours: its `stage2` is the first after the stem.
    Family(r"shufflenet_v2.*", ("maxpool", "stage2", "stage3", "stage4")),
    Family(r"regnet_.*", ("stem", *(f"trunk_output.block{n}" for n in (1, 2, 3, 4)))),
    Family(r"efficientnet_b\d", _features(0, 1, 2, 3, 5, 7)),
    Family(r"efficientnet_v2_s", _features(0, 1, 2, 3, 5, 6)),
    Family(r"efficientnet_v2_[ml]", _features(0, 1, 2, 3, 5, 7)),
    Family(r"convnext_.*", _features(0, 1, 3, 5, 7)),
    Family(r"swin_.*", _features(0, 1, 3, 5, 7), "nhwc"),
    Family(r"maxvit_t", ("stem", *(f"blocks.{n}" for n in range(4)))),
    Family(r"vit_.*", _vit, "tokens", prefix=1),
)

# Name prefixes of everything that only the classifier uses, in any family.
HEAD = ("fc.", "classifier.", "head.", "heads.")


@cache
def names() -> tuple[str, ...]:
    """The names that `load` takes."""
    return tuple(torchvision.models.list_models(module=torchvision.models))


def list_models() -> list[dict[str, Any]]:
    """`name`, `weights` (enum members, default first) and `parameters` of each model."""
    found = []
    for name in names():
        enum = torchvision.models.get_model_weights(name)
        default = enum.DEFAULT
        weights = [default.name, *(member.name for member in enum if member is not default)]
        found.append({"name": name, "weights": weights, "parameters": default.meta["num_params"]})
    return found


def load(ref: ModelRef, build: Build = BUILD) -> Backbone:
    """The model `ref` names, with the weights it names. torchvision has no backbone class, so `native` is `raw`.

    Raises `WeightsError` when the weights cannot be had, `UsageError` for an unknown name or an impossible size.
    """
    if ref.name not in names():
        close = nearest(ref.name, names())
        raise UsageError(f"torchvision has no model {ref.name!r}", f"nearest: {', '.join(close)}" if close else "")
    enum = torchvision.models.get_model_weights(ref.name)
    member, path = _which_weights(ref, enum)
    transforms = (member or enum.DEFAULT).transforms()
    preprocess = Preprocess(
        size=(transforms.crop_size[0],) * 2,
        resize=transforms.resize_size[0],
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    ).override(size=build.size)
    options = {**_builder_options(ref.name, preprocess.size, pretrained=member is not None), **build.options}
    label, untrained = f"random (seed {build.seed})", tuple[str, ...]()
    if build.structure:
        network = _build_structure(ref.name, options).to("meta")
    elif member or path:
        network = _build_structure(ref.name, options)  # drawing random values takes longer than reading the trained
        state, label = _read_weights(member, path)
        untrained = _fill(network, state, label)
        if untrained:
            network = _build(ref.name, options, build.seed)
            _fill(network, state, label)
    else:
        network = _build(ref.name, options, build.seed)
    taps = _taps(ref.name, network)
    # The same tensors normalised once more inside the model are another model.
    facts = "transform_input" if options.get("transform_input") else ""
    checksum = "" if build.structure else digest(network, options=facts)
    own = {**build.options, **({facts: True} if facts else {})}
    config = json.dumps(own, sort_keys=True) if own else ""
    return Backbone(ref, network.eval(), taps, preprocess, label, checksum, untrained, config=config)


def _taps(name: str, network: nn.Module) -> tuple[Tap, ...]:
    family = next(family for family in FAMILIES if re.fullmatch(family.pattern, name))
    modules = family.modules if isinstance(family.modules, tuple) else family.modules(network)
    stages = ("stem", *(f"stage{number}" for number in range(1, len(modules))))
    return tuple(
        Tap(stage, module, family.layout, family.prefix) for stage, module in zip(stages, modules, strict=True)
    )


def _which_weights(ref: ModelRef, enum: Any) -> tuple[Any, Path | None]:
    """(enum member, file): one of them, or neither for random weights."""
    wish = ref.weights
    if wish == "random":
        return None, None
    if wish in ("auto", "DEFAULT"):
        return enum.DEFAULT, None
    by_name = {member.name.lower(): member for member in enum}
    short = wish.rpartition(".")[2].lower() if wish.lower().startswith(enum.__name__.lower() + ".") else wish.lower()
    if short in by_name:
        return by_name[short], None
    path = Path(wish).expanduser()
    if path.is_file() or path.suffix or len(path.parts) > 1:
        check_file(path)
        # An official file under its official name is that enum's: the same preprocessing, the same model options.
        return next((member for member in enum if Path(member.url).name == path.name), None), path
    close = nearest(wish, by_name, 1)
    meant = f"did you mean {by_name[close[0]].name}? " if close else ""
    valid = ", ".join(member.name for member in enum)
    raise UsageError(f"{ref.name} has no weights {wish!r}", f"{meant}valid: auto, random, {valid}, or a file's path")


def _builder_options(name: str, size: tuple[int, int], *, pretrained: bool) -> dict[str, Any]:
    if name in ("googlenet", "inception_v3"):
        # The auxiliary classifiers serve training only; `transform_input` re-normalises for the published weights.
        return {"aux_logits": False, "transform_input": pretrained, "init_weights": False}
    if name.startswith("vit_"):
        if size[0] != size[1]:
            raise UsageError(f"{name} takes square input only, not {size[0]}x{size[1]}", "give one number to --size")
        patch = int(name.rpartition("_")[2])
        if size[0] % patch:
            fitting = max(size[0] // patch, 1) * patch
            raise UsageError(f"{name} needs a size divisible by {patch}, not {size[0]}", f"try --size {fitting}")
        return {"image_size": size[0]}
    return {"input_size": size} if name == "maxvit_t" else {}


def _build(name: str, options: dict[str, Any], seed: int) -> nn.Module:
    with seeded(seed):
        try:
            network: nn.Module = torchvision.models.get_model(name, weights=None, **options)
        except ValueError as error:  # MaxViT, for a size that its windows do not divide
            raise UsageError(f"{name} cannot be built for this size: {error}", "leave --size out") from None
        except TypeError as error:
            raise UsageError(f"{name} cannot be built so: {error}", "see torchvision's builder") from None
    return network


class _Unallocated(TorchFunctionMode):
    """Makes parameters without memory. `torch.device("meta")` would not do: RegNet reads tensors while it is built."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def _build_structure(name: str, options: dict[str, Any]) -> nn.Module:
    """The network with its buffers, and most of its parameters still to come."""
    with _Unallocated():
        return _build(name, options, 0)


def _read_weights(member: Any, path: Path | None) -> tuple[dict[str, Tensor], str]:
    if path is None:
        return read_state_dict(fetch(member.url, name=str(member), hint=_offline_hint(member))), member.name
    return read_state_dict(path), f"file {path.name}"


def _fill(network: nn.Module, state: dict[str, Tensor], label: str) -> tuple[str, ...]:
    return load_into(network, state, head=HEAD, source=label, current=_current)


def _current(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Published files under today's names and sizes: DenseNet's dotted ones, ViT's layers and position embedding."""
    dotted = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)")
    layer = re.compile(r"(encoder\.layers\..*\.mlp)\.linear_([12])\.(weight|bias)")
    state = {
        layer.sub(lambda found: f"{found[1]}.{3 * (int(found[2]) - 1)}.{found[3]}", dotted.sub(r"\1\2", name)): value
        for name, value in state.items()
    }
    embedding = "encoder.pos_embedding"
    own = network.state_dict().get(embedding)
    if own is not None and embedding in state and state[embedding].shape != own.shape:
        vit: Any = network
        with suppress(ValueError):  # no square of patches: its shape is told with all that does not fit
            state = dict(interpolate_embeddings(vit.image_size, vit.patch_size, state))
    return state


def _offline_hint(member: Any) -> str:
    name = Path(member.url).name
    return (
        f"on a machine with a network: curl -LO {member.url}\n"
        f"then here: --weights {name}   (or put it into {torch.hub.get_dir()}/checkpoints/)\n"
        "or go without trained ones: --weights random\n"
        "or take the model whose weights came with bbx: --model efficientnet-lite0"
    )
