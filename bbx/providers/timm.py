"""Every architecture of timm: its own maps, `forward_intermediates`, under bbx's names, and a stem where there is one.

Never `features_only`, which leaves out stems, gives some maps channels-last, and runs some networks to their end. Those
maps are raw but for DenseNet's last, which timm takes after the final norm: `--norm native` gives that one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn
from torch.overrides import TorchFunctionMode

from bbx.backbone import Backbone
from bbx.errors import UsageError, WeightsError
from bbx.providers.timm_families import FAMILY_OF
from bbx.providers.timm_forward import Intermediates, family_of, taps_of
from bbx.providers.timm_weights import (
    architecture_of,
    check_tag,
    load_file,
    load_published,
    offline_hint,
    published_as,
    tags,
)
from bbx.spec import BUILD, Build, ModelRef, Preprocess, ResizeMode
from bbx.taps import Tap
from bbx.weights import check_file, digest, seeded

_MODES: dict[str, ResizeMode] = {"center": "crop", "squash": "squash", "border": "pad"}
# Arguments of `create_model` that are bbx's to give.
_NOT_OPTIONS = (
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "features_only",
    "out_indices", "feature_cls", "in_chans", "scriptable", "exportable", "no_jit",
)  # fmt: skip


# What writes values in place and changes no shape.
_FILLING = frozenset(
    ("normal_", "uniform_", "fill_", "zero_", "erfinv_", "mul_", "add_", "sub_", "div_", "clamp_", "copy_")
)


@cache
def names() -> tuple[str, ...]:
    """The architectures; `find` knows their weights' tags, hub ids and folders besides."""
    return tuple(timm.list_models())


def find(name: str) -> str | None:
    """The exact name behind `architecture.tag`, `hf-hub:org/name`, `org/name`, `local-dir:PATH` or a model's folder.

    A tag that the architecture does not have is left for `load`, which names the nearest.
    """
    source, colon, place = name.partition(":")
    if colon:
        return name if source in ("hf-hub", "local-dir") and place else None
    if architecture_of(Path(name).expanduser()) in names():
        return f"local-dir:{name}"
    architecture, dot, tag = name.partition(".")
    folded = {known.lower(): known for known in names()}
    exact = folded.get(architecture.lower().replace("-", "_"))
    if dot and tag and exact:
        return f"{exact}.{next((known for known in tags(exact) if known == tag.lower().replace('-', '_')), tag)}"
    return f"hf-hub:{name}" if name.count("/") == 1 and all(name.split("/")) else None


def load(ref: ModelRef, build: Build = BUILD) -> Backbone:
    """The model `ref` names: an architecture, `architecture.tag`, `hf-hub:org/name` or `local-dir:PATH`.

    `ref.weights` may also be a tag. Raises `WeightsError` when the weights cannot be had, `UsageError` for an unknown
    name, an impossible size, or tokens of a network that has none.
    """
    name, path = _which(ref)
    if build.structure or path or ref.weights == "random":
        name = published_as(name) or name  # timm itself knows how to build it: no hub is needed
    config = _configuration(name)
    size = _size(config, build)
    preprocess = _preprocess(config, size)
    options = _options(config, build, size)
    if size and size != _preprocess(config, None).size:
        _check_size(name, options, preprocess.size, meta=_on_meta(config))
    label, untrained, notes = f"random (seed {build.seed})", tuple[str, ...](), tuple[str, ...]()
    if build.structure:
        network = _build(name, options, build, meta=_on_meta(config))
    elif ref.weights == "random" or path:
        network = _build(name, options, build)
        if path:
            label, untrained, notes = load_file(network, path)
    else:
        network, label = load_published(name, lambda pretrained: _build(name, options, build, pretrained=pretrained))
    network.eval()
    if build.tokens and not family_of(network).tokens:
        raise UsageError(f"{ref} has no tokens: its blocks give maps, of several strides", "leave --tokens out")
    taps, index = taps_of(network, tokens=build.tokens, native=build.norm == "native")
    forward = Intermediates.of(network, taps, index, tokens=build.tokens) if index else None
    checksum = "" if build.structure else digest(network)
    text = _text(name, build.options)
    notes = (*_notes(taps), *notes)
    return Backbone(ref, network, taps, preprocess, label, checksum, untrained, notes, forward=forward, config=text)


def _which(ref: ModelRef) -> tuple[str, Path | None]:
    """(the name that timm takes, a weights file): the tag of `ref.weights`, if it is one, goes into the name."""
    name = ref.name
    architecture, _, tag = name.partition(".")
    if ":" not in name:
        if architecture not in names():
            raise UsageError(f"timm has no model {name!r}", "bbx models 'timm:*' lists the names")
        if tag:
            check_tag(architecture, tag)
    if ref.weights in ("auto", "random"):
        return name, None
    path = Path(ref.weights).expanduser()
    if path.is_file() or path.suffix in (".safetensors", ".pth", ".pt", ".bin") or len(path.parts) > 1:
        check_file(path)
        return name, path
    if ":" in name:
        raise UsageError(f"{name} has one set of weights, no {ref.weights!r}", "valid: auto, random, or a file's path")
    wish = ref.weights.removeprefix(f"{architecture}.")
    check_tag(architecture, wish)
    return f"{architecture}.{wish}", None


def _configuration(name: str) -> dict[str, Any]:
    """timm's `pretrained_cfg` of a name; for a hub id or a folder, from its config.json."""
    if ":" not in name:
        known: Any = timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
        return {"architecture": name.partition(".")[0], **known.to_dict()}
    try:
        # Of the arguments that this resolves, none builds anything.
        return dict(timm.models.resolve_model_input_args(name)["pretrained_cfg"])
    except Exception as error:  # the hub's client, its transport, json and timm each raise kinds of their own
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise WeightsError(f"cannot have the configuration of timm:{name}: {reason}", offline_hint(name)) from None


def _text(name: str, options: Mapping[str, Any]) -> str:
    """What the network is built from where its name does not say it: a folder's or hub id's arguments, options."""
    if ":" not in name:
        return json.dumps(dict(options), sort_keys=True) if options else ""
    own = dict(timm.models.resolve_model_input_args(name))
    architecture, config = own.pop("model_name"), own.pop("pretrained_cfg")
    own.pop("pretrained_model_args", None)  # the same once more
    if own.get("in_chans") == 3:
        del own["in_chans"]
    # What timm takes from the configuration where the arguments do not say it.
    facts = {"num_classes": config["num_classes"]} if config["num_classes"] >= 0 else {}
    if config["fixed_input_size"]:
        facts["img_size"] = list(config["input_size"][1:])
    return json.dumps({**facts, **own, **options, "architecture": architecture}, sort_keys=True, default=str)


def _preprocess(config: Mapping[str, Any], size: tuple[int, int] | None) -> Preprocess:
    resolve: Any = resolve_model_data_config
    data = resolve(None, pretrained_cfg=config)
    height, width = data["input_size"][1:]
    own = Preprocess(
        size=(height, width),
        resize=math.floor(min(height, width) / data["crop_pct"]),
        # `random` is of training: timm's own evaluation falls back to bicubic.
        interpolation="bicubic" if data["interpolation"] == "random" else data["interpolation"],
        mean=_floats(data["mean"]),
        std=_floats(data["std"]),
        mode=_MODES[data["crop_mode"]],
    )
    if size is None or size == own.size:
        return own
    checked = own.override(size=size)  # refuses what is no size; its rounding is not timm's
    return Preprocess(
        checked.size, math.floor(min(size) / data["crop_pct"]), own.interpolation, own.mean, own.std, own.mode
    )


def _floats(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue


def _on_meta(config: Mapping[str, Any]) -> bool:
    family = FAMILY_OF.get(timm.models.model_entrypoint(config["architecture"]).__module__.rpartition(".")[2])
    return family is None or family.meta


def _size(config: Mapping[str, Any], build: Build) -> tuple[int, int] | None:
    """The input size that is asked for, by timm's own word `img_size` too, where the network is built for one size."""
    side = build.options.get("img_size") if config.get("fixed_input_size") else None
    if build.size or side is None:
        return build.size
    height, width = (side, side) if isinstance(side, int) else side
    return int(height), int(width)


def _options(config: Mapping[str, Any], build: Build, size: tuple[int, int] | None) -> dict[str, Any]:
    """Arguments of `create_model`: the user's own, and the size for a network that is built for one."""
    if taken := [name for name in build.options if name in _NOT_OPTIONS]:
        raise UsageError(f"{taken[0]} is no option of a timm model in bbx", "see --size, --weights, --stages")
    sized = {"img_size": size} if config.get("fixed_input_size") and size else {}
    return {**build.options, **sized}


class _Unfilled(TorchFunctionMode):
    """Leaves out the writing of initial values, half the time of a build on the meta device, which has no values."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if args and isinstance(args[0], torch.Tensor) and getattr(func, "__name__", "") in _FILLING:
            return args[0]
        return func(*args, **(kwargs or {}))


def _build(
    name: str, options: Mapping[str, Any], build: Build, *, pretrained: bool = False, meta: bool = False
) -> nn.Module:
    with ExitStack() as building:
        building.enter_context(seeded(build.seed))
        for context in (torch.device("meta"), _Unfilled()) if meta else ():
            building.enter_context(context)
        try:
            network: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
        except TypeError as error:
            if not build.options:
                raise
            raise UsageError(f"{name} cannot be built with these options: {error}", "see timm's own of it") from None
    return network.to("meta") if meta else network


def _check_size(name: str, options: Mapping[str, Any], size: tuple[int, int], *, meta: bool) -> None:
    """Raises `UsageError` with the nearest size that works where the network takes no input of `size`."""
    fault = _fault(name, options, size, meta=meta)
    if not fault:
        return
    for near in _near(*size):
        if not _fault(name, {**options, **({"img_size": near} if "img_size" in options else {})}, near, meta=meta):
            wish = f"{near[0]}" if near[0] == near[1] else f"{near[0]}x{near[1]}"
            raise UsageError(f"timm:{name} takes no input of {size[0]}x{size[1]}: {fault}", f"try --size {wish}")
    raise UsageError(f"timm:{name} takes no input of {size[0]}x{size[1]}: {fault}", "leave --size out")


def _fault(name: str, options: Mapping[str, Any], size: tuple[int, int], *, meta: bool) -> str:
    """Why the network cannot be built for, or run on, an input of `size`; tried without weights."""
    try:
        network = _build(name, options, BUILD, meta=meta).eval()
        taps, index = taps_of(network)
        forward = Intermediates.of(network, taps, index, tokens=False) if index else None
        pixels = torch.zeros((1, 3, *size), device="meta" if meta else "cpu")
        with torch.inference_mode():
            _ = forward(pixels, taps[-1:]) if forward else network(pixels)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return next(iter(str(error).splitlines()), "") or type(error).__name__
    return ""


def _near(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Sizes to try, nearest first: both sides multiples of the units that networks are built of."""
    found = {
        (max(height // unit + up, 1) * unit, max(width // unit + up, 1) * unit)
        for unit in (4, 7, 8, 14, 16, 32, 56, 64, 128, 224)
        for up in (0, 1)
    }
    yield from sorted(found, key=lambda near: (abs(near[0] - height) + abs(near[1] - width), near))


def _notes(taps: tuple[Tap, ...]) -> tuple[str, ...]:
    if taps[0].name == "stem":
        return ()
    return ("no stem: no module of this network gives one map before its first stage; index 0 stays empty",)
