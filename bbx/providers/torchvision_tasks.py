"""torchvision's detection and segmentation models, as far as they give maps: backbone, pyramid, dense head.

A detector is read without its `transform` (bbx resizes) and without proposals, boxes and non-maximum suppression, whose
number changes from picture to picture. Its backbone's stages are those of the classification table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection, segmentation
from torchvision.ops import FrozenBatchNorm2d

from bbx.backbone import Backbone
from bbx.errors import UsageError, nearest
from bbx.providers.torchvision import FAMILIES
from bbx.roles import Outlet, Reader, settled, taps
from bbx.spec import BUILD, Build, ModelRef, Preprocess
from bbx.weights import check_file, digest, fetch, load_into, read_state_dict, seeded

# Sizes (h, w) to name the pyramid's levels at: the coarsest level still gains a row from one to the other.
_SIZES = ((1024, 1024), (1536, 1536))
_HEADS = ("roi_heads.", "rpn.", "head.", "classifier.", "aux_classifier.")
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# The convolutions of these heads are shared by all levels: one call, one map, each.
_FPN = (Outlet("neck.p*", "backbone.fpn"),)
_RPN = (
    Outlet("head.rpn.cls_logits.p*", "rpn.head.cls_logits", call=0),
    Outlet("head.rpn.bbox_pred.p*", "rpn.head.bbox_pred", call=0),
)
_RETINA = (
    *_FPN,
    Outlet("head.cls_logits.p*", "head.classification_head.cls_logits", call=0),
    Outlet("head.bbox_reg.p*", "head.regression_head.bbox_reg", call=0),
)
_SSD = (
    Outlet("neck.p*", "backbone"),
    *(
        Outlet(f"head.{name}.p*", f"head.{head}.module_list.{level}")
        for head, name in (("classification_head", "cls_logits"), ("regression_head", "bbox_reg"))
        for level in range(6)
    ),
)


@dataclass(frozen=True, slots=True)
class Task:
    """One row: builders whose name matches `pattern`, the classification model inside, where its modules went, heads.

    `moved` turns a module's path in the classification model into its path here. `frozen`: with published weights the
    builder makes the batch norms of the backbone constants, with an epsilon of 0 for those named in `_NO_EPSILON`.
    """

    pattern: str
    inner: str
    moved: tuple[tuple[str, str], ...]
    outlets: tuple[Outlet, ...]
    frozen: bool = False


_BODY, _FLAT = ((r"(.*)", r"backbone.body.\1"),), ((r"(?:features\.)?(.*)", r"backbone.\1"),)
_CLASSIFIERS = (Outlet("head.classifier", "classifier"), Outlet("head.aux_classifier", "aux_classifier", optional=True))
TASKS = (
    Task(r"(faster|mask|keypoint)rcnn_resnet50_fpn", "resnet50", _BODY, (*_FPN, *_RPN), frozen=True),
    Task(r"(faster|mask)rcnn_resnet50_fpn_v2", "resnet50", _BODY, (*_FPN, *_RPN)),
    Task(
        r"fasterrcnn_mobilenet_v3_large_(320_)?fpn",
        "mobilenet_v3_large",
        ((r"features\.(.*)", r"backbone.body.\1"),),
        (*_FPN, *_RPN),
        frozen=True,
    ),
    Task(r"retinanet_resnet50_fpn", "resnet50", _BODY, _RETINA, frozen=True),
    Task(r"retinanet_resnet50_fpn_v2", "resnet50", _BODY, _RETINA),
    Task(
        r"fcos_resnet50_fpn",
        "resnet50",
        _BODY,
        (*_RETINA, Outlet("head.bbox_ctrness.p*", "head.regression_head.bbox_ctrness", call=0)),
        frozen=True,
    ),
    # VGG's second half lies in the first extra block; its last pool is not there (the rows 23 and 30 of VGG-16).
    Task(
        r"ssd300_vgg16",
        "vgg16",
        (
            (r"features\.(2[3-9])", r"backbone.extra.0.\1-23"),
            (r"features\.30", r""),
            (r"features\.(.*)", r"backbone.features.\1"),
        ),
        _SSD,
    ),
    # The network is cut inside its block 13, after the expansion.
    Task(
        r"ssdlite320_mobilenet_v3_large",
        "mobilenet_v3_large",
        ((r"features\.(1[3-9])", r"backbone.features.1.\1-13"), (r"features\.(.*)", r"backbone.features.0.\1")),
        _SSD,
    ),
    Task(r"(fcn|deeplabv3)_resnet(50|101)", "resnet50", _FLAT, _CLASSIFIERS),
    Task(r"(deeplabv3|lraspp)_mobilenet_v3_large", "mobilenet_v3_large", _FLAT, _CLASSIFIERS),
)
_NO_EPSILON = re.compile(r"(FasterRCNN|MaskRCNN|KeypointRCNN|RetinaNet)_ResNet50_FPN_Weights\.COCO_V1")


class Dense(nn.Module):
    """A detector's backbone and dense head, under their own names: pixels `(b, 3, h, w)` → the head's raw outputs."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        for name, child in detector.named_children():
            if name != "transform":
                self.add_module(name, child)

    def forward(self, pixels: Tensor) -> Any:
        """Whatever the head gives, per level or concatenated."""
        parts: Any = self
        head = parts.rpn.head if hasattr(self, "rpn") else parts.head
        return head(list(parts.backbone(pixels).values()))


@cache
def names() -> tuple[str, ...]:
    """The names that `load` takes."""
    return tuple(torchvision.models.list_models(module=detection) + torchvision.models.list_models(module=segmentation))


def list_models() -> list[dict[str, Any]]:
    """`name`, `weights` (enum members, default first) and `parameters` of each model."""
    found = []
    for name in names():
        enum = torchvision.models.get_model_weights(name)
        weights = [enum.DEFAULT.name, *(member.name for member in enum if member is not enum.DEFAULT)]
        found.append({"name": name, "weights": weights, "parameters": enum.DEFAULT.meta["num_params"]})
    return found


_LEAF = r"\.(weight|bias)$"
# As torchvision's modules rename what is of their first version: FPN, RPN, Mask R-CNN, RetinaNet.
_OLD_NAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"(fpn\.(?:inner|layer)_blocks\.\d+)" + _LEAF, r"\1.0.\2"),
    (r"(rpn\.head\.conv)" + _LEAF, r"\1.0.0.\2"),
    (r"(mask_head)\.mask_fcn(\d+)" + _LEAF, lambda found: f"{found[1]}.{int(found[2]) - 1}.0.{found[3]}"),
    (r"(head\.\w+_head\.conv)\.(\d+)" + _LEAF, lambda found: f"{found[1]}.{int(found[2]) // 2}.0.{found[3]}"),
)


def load(ref: ModelRef, build: Build = BUILD, *, config: Mapping[str, Any] | None = None) -> Backbone:
    """The model `ref` names, its taps by role.

    `config` may hold `options`, further arguments of its builder, such as `num_classes`. Raises `WeightsError` when the
    weights cannot be had, `UsageError` for an unknown name or impossible arguments.
    """
    if ref.name not in names():
        close = nearest(ref.name, names())
        raise UsageError(f"torchvision has no task model {ref.name!r}", f"nearest: {', '.join(close)}" if close else "")
    task = next(task for task in TASKS if re.fullmatch(task.pattern, ref.name))
    member, path = _which_weights(ref)
    state, label = _state(member, path) if not build.structure else ({}, "")
    given = dict(config or {})
    if given.get("backbone"):
        raise UsageError(
            f"{ref.name} is built on {task.inner} only", "leave backbone: out, or assemble one with neck: fpn"
        )
    options = {**build.options, **given.get("options", {})}
    if ref.name in torchvision.models.list_models(module=segmentation) and not ref.name.startswith("lraspp"):
        # The published weights have an auxiliary head; without weights there is one so that its role can be read.
        options.setdefault("aux_loss", not state or any(key.startswith("aux_classifier.") for key in state))
    skeleton = _build(ref.name, options, build.seed, device="meta")
    outlets = settled(_dense_part(skeleton), (*_stages(task), *task.outlets), _SIZES)
    model = skeleton if build.structure else _build(ref.name, options, build.seed, device="cpu")
    preprocess = _preprocess(model).override(size=build.size)
    network, untrained = _dense_part(model), tuple[str, ...]()
    eps = 0.0 if _NO_EPSILON.fullmatch(str(member)) else 1e-5
    if state:
        if task.frozen and member:
            _freeze(network.get_submodule("backbone"), eps)
        untrained = load_into(network, state, head=_HEADS, source=label, current=_current)
    notes = _notes(network, untrained, preprocess)
    outlets = tuple(out for out in outlets if not f"{out.module}.".startswith(tuple(f"{m}." for m in untrained)))
    facts = f"frozen batch norm, eps {eps}" if task.frozen and member and state else ""
    return Backbone(
        ref,
        network.eval(),
        taps(outlets),
        preprocess,
        label or f"random (seed {build.seed})",
        "" if build.structure else digest(network, options=facts),
        untrained,
        notes,
        forward=Reader(network, outlets),
        config=_text(ref, options) if given or build.options else "",
    )


def _current(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Files of before 2022 under today's names: a convolution is part of a block of its own since."""
    own = network.state_dict()

    def current(name: str) -> str:
        if name in own:
            return name
        found = [re.sub(pattern, new, name) for pattern, new in _OLD_NAMES]
        return next((one for one in found if one in own), name)

    return {current(name): value for name, value in state.items()}


def _text(ref: ModelRef, options: Mapping[str, Any]) -> str:
    return json.dumps({"model": ref.name, "options": options}, sort_keys=True, default=str)


def _stages(task: Task) -> tuple[Outlet, ...]:
    """The backbone's stages by the classification table, where its modules are here."""
    family = next(family for family in FAMILIES if re.fullmatch(family.pattern, task.inner))
    with torch.device("meta"):
        plain = torchvision.models.get_model(task.inner, weights=None)
    modules = family.modules if isinstance(family.modules, tuple) else family.modules(plain)
    there = [(number, _moved(task, module)) for number, module in enumerate(modules)]
    return tuple(Outlet(f"backbone.stage{n}" if n else "backbone.stem", module) for n, module in there if module)


def _moved(task: Task, module: str) -> str:
    for pattern, target in task.moved:
        if match := re.fullmatch(pattern, module):
            # `….25-23` is the place in a list that begins with the 23rd.
            return re.sub(r"(\d+)-(\d+)$", lambda both: str(int(both[1]) - int(both[2])), match.expand(target))
    raise UsageError(f"no rule for {module}")


def _which_weights(ref: ModelRef) -> tuple[Any, Path | None]:
    """(enum member, file): one of them, both for an official file under its own name, or neither for random weights."""
    enum, wish = torchvision.models.get_model_weights(ref.name), ref.weights
    if wish == "random":
        return None, None
    if wish in ("auto", "DEFAULT"):
        return enum.DEFAULT, None
    by_name = {member.name.lower(): member for member in enum}
    if found := by_name.get(wish.rpartition(".")[2].lower()):
        return found, None
    path = Path(wish).expanduser()
    if not (path.is_file() or path.suffix or len(path.parts) > 1):
        valid = ", ".join(member.name for member in enum)
        raise UsageError(f"{ref.name} has no weights {wish!r}", f"valid: auto, random, {valid}, or a file's path")
    check_file(path)
    return next((member for member in enum if Path(member.url).name == path.name), None), path


def _state(member: Any, path: Path | None) -> tuple[dict[str, Tensor], str]:
    if path is not None:
        return read_state_dict(path), f"file {path.name}"
    if member is None:
        return {}, ""
    hint = f"on a machine with a network: curl -LO {member.url}\nthen here: --weights {Path(member.url).name}"
    fetched = fetch(member.url, name=str(member), hint=f"{hint}\nor go without trained ones: --weights random")
    return read_state_dict(fetched), member.name


def _build(name: str, options: Mapping[str, Any], seed: int, *, device: str) -> nn.Module:
    with seeded(seed, device):
        try:
            # Without `weights_backbone=None` a builder fetches ImageNet weights for its backbone.
            network: nn.Module = torchvision.models.get_model(name, weights=None, weights_backbone=None, **options)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{name} cannot be built with {dict(options)}: {error}", "see its builder") from None
    return network.eval()


def _dense_part(model: nn.Module) -> nn.Module:
    return Dense(model) if hasattr(model, "transform") else model


def _freeze(module: nn.Module, eps: float) -> None:
    """Batch norms as constants, as the builders make them for published weights: another order of rounding."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child.num_features, eps))
        else:
            _freeze(child, eps)


def _preprocess(model: nn.Module) -> Preprocess:
    """A detector's own mean, std and short side, padded to a square as it pads; 520 for segmentation, its preset's."""
    transform: Any = getattr(model, "transform", None)
    if transform is None:
        return Preprocess((520, 520), 520, "bilinear", *_IMAGENET)
    mean, std = _rgb(transform.image_mean), _rgb(transform.image_std)
    if transform.fixed_size:
        width, height = transform.fixed_size
        return Preprocess((height, width), min(height, width), "bilinear", mean, std, "squash")
    side = transform.min_size[-1]
    return Preprocess((side, side), side, "bilinear", mean, std, "pad")


def _rgb(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue


def _notes(network: nn.Module, untrained: tuple[str, ...], preprocess: Preprocess) -> tuple[str, ...]:
    notes = []
    if isinstance(network, Dense):
        rows, columns = preprocess.size
        notes.append(f"read at {rows}x{columns}, without the detector's own resize, boxes and suppression")
    if untrained:
        notes.append(f"the weights do not fit {', '.join(untrained)}: no head.* role reads from there")
    return tuple(notes)
