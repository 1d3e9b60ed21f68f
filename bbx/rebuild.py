"""How a backbone is asked for, recorded in the feature file as text, and the same one built from that again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from bbx.assembly import assemble
from bbx.backbone import Backbone
from bbx.errors import FileError, StartError, UsageError, WeightsError
from bbx.images import ImageList
from bbx.pictures import facts_of, is_near, recorded_roots
from bbx.providers import load_backbone, resolve
from bbx.recipe import read as read_config
from bbx.skip import has_changed
from bbx.spec import SEEDS, Decode, ExifMode, InputFile, Norm, ResizeMode, RunSpec
from bbx.store import open_finished_or_partial

_RANDOM = re.compile(r"random \(seed (\d+)\)")
_UNSAID = ("the file does not say how its model was asked for", "name --model and --weights yourself")


@dataclass(frozen=True, slots=True)
class Request:
    """What `bbx.extract` is told about its backbone, stages aside: the arguments of `load_backbone` or `assemble`."""

    model: str = ""
    weights: str = "auto"
    seed: int = 0
    size: tuple[int, int] | None = None
    resize_mode: ResizeMode | None = None
    exif: ExifMode = "apply"
    decode: Decode = "exact"
    norm: Norm = "raw"
    tokens: bool = False
    config: Mapping[str, Any] | None = None

    def build(self, stages: str | Iterable[str | int] | None = None, layers: str | Iterable[str] = ()) -> Backbone:
        """The backbone, giving `stages` and `layers`. Raises `UsageError`, `StartError` and its kin."""
        shared: dict[str, Any] = {
            "seed": self.seed, "size": self.size, "resize_mode": self.resize_mode, "exif": self.exif,
            "decode": self.decode, "norm": self.norm, "stages": stages, "layers": layers,
        }  # fmt: skip
        if self.config is not None:
            if self.weights != "auto" or self.tokens:
                raise UsageError("--weights and --tokens do not go with --config", "the configuration says the weights")
            return assemble(self.config, model=self.model, **shared)
        if not self.model:
            hint = "bbx models lists them; --model efficientnet-lite0 needs no network"
            raise UsageError("which model? --model NAME", hint)
        return load_backbone(resolve(self.model, weights=self.weights), tokens=self.tokens, **shared)

    def to_json(self) -> str:
        """The text that the file records: paths made absolute, for the command may be given elsewhere."""
        data = asdict(self)
        for name in ("model", "weights"):
            # A word without a separator is a name first: a folder beside it does not make it a path.
            if os.sep in data[name] and Path(data[name]).expanduser().exists():
                data[name] = str(Path(data[name]).expanduser().absolute())
        return json.dumps(data, sort_keys=True, default=str)


def config_of(config: str | os.PathLike[str] | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The content of a configuration, so that the file can hold it."""
    return None if config is None else read_config(config)


def request_of(run: RunSpec, near: str | os.PathLike[str] | None = None, *, instead: Collection[str] = ()) -> Request:
    """How the backbone of `run` was asked for.

    A path of weights or of a saved model is data from a file: it counts only below the current folder, or below that
    of `near`, the feature file, unless the caller has its own `instead`: arguments that are not taken from the file.
    Raises `WeightsError`, `FileError`.
    """
    if not run.source:
        seed = _seed(run.weights)
        weights = "auto" if seed is None else "random"
        return Request(run.model, weights, seed or 0, norm=run.norm, tokens=run.tokens)
    request = _request(run.source)
    texts = [("--model", request.model), ("--weights", request.weights)]
    texts += [("--config", text) for text in _texts(request.config)]
    for option, text in texts:
        path = _as_path(text)
        if path is not None and option[2:] not in instead and not is_near(path, near):
            raise WeightsError(
                f"the file names {text}, which lies neither below the current folder nor below the file's",
                f"a path from a file is not followed; if you trust it: {option} {text}",
            )
    return request


def _request(text: str) -> Request:
    """The request that `to_json` wrote, every field of its type: files are not trusted. Raises `FileError`."""
    try:
        data = json.loads(text)
        known = {item.name for item in fields(Request)}
        size = tuple(data["size"]) if data.get("size") else None
        request = Request(**{name: value for name, value in data.items() if name in known} | {"size": size})
        right = (
            all(isinstance(item, str) and "\0" not in item for item in (request.model, request.weights))
            and type(request.seed) is int
            and request.seed in SEEDS
            and (size is None or (len(size) == 2 and all(type(side) is int and 0 < side < 1 << 16 for side in size)))
            and (request.config is None or isinstance(request.config, Mapping))
            and type(request.tokens) is bool
            and not any("\0" in item for item in _texts(request.config))
        )
    except (ValueError, TypeError, AttributeError, RecursionError):
        right = False
    if not right:
        raise FileError(*_UNSAID)
    return request


def _seed(weights: str) -> int | None:
    """That of random ones. Raises `FileError` where it can be none, for files are not trusted."""
    found = _RANDOM.fullmatch(weights)
    if found and (len(found[1]) > len(str(SEEDS[-1])) or int(found[1]) not in SEEDS):
        raise FileError(*_UNSAID)
    return int(found[1]) if found else None


def _texts(value: object) -> Iterator[str]:
    """Every text in a configuration."""
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _texts(item)


def _as_path(text: str) -> Path | None:
    """What a model's name or weights lead to on this disk, None for a mere name (a hub id has a separator, too)."""
    path = Path(re.sub(r"^(\w[\w-]*:)+", "", text)).expanduser()
    return path if path.is_absolute() or ".." in path.parts or _exists(path) else None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def rebuild(
    run: RunSpec,
    *,
    stages: Iterable[str] | None = None,
    weights: str | None = None,
    near: str | os.PathLike[str] | None = None,
) -> Backbone:
    """The backbone that a file records, built again: giving the run's `stages` (default: all), by its preprocessing.

    `weights` says where they are now, `near` is the feature file (`request_of`). Raises `WeightsError` with both
    digests where the weights are not those of the file, and what loading a model raises.
    """
    request = request_of(run, near, instead=("weights",) if weights else ())
    request = replace(request, weights=weights) if weights else request
    names = None if stages is None else set(stages)
    chosen, layers = stages_of(run, names)
    backbone = request.build(chosen, layers)
    check_weights(backbone, run)
    return replace(backbone, preprocess=run.preprocess)


def check_weights(backbone: Backbone, run: RunSpec) -> None:
    """Raises `WeightsError` where the weights are not those that made the file."""
    if backbone.weights_digest != run.weights_digest:
        raise WeightsError(
            f"the weights are not those of the file: {run.weights} had digest {run.weights_digest}, and "
            f"{backbone.weights} has {backbone.weights_digest}",
            "name them: --weights FILE",
        )


def stages_of(run: RunSpec, names: Iterable[str] | None = None) -> tuple[list[str] | None, list[str]]:
    """The run's stages by name, and its free layers by module path; of `names` only, if given."""
    wanted = [stage for stage in run.stages if names is None or stage.name in names]
    chosen = [stage.name for stage in wanted if stage.index is not None]
    return chosen or None, [stage.module for stage in wanted if stage.index is None]


def options_of(path: str | os.PathLike[str], given: Collection[str]) -> tuple[RunSpec, dict[str, Any]]:
    """The run of a feature file, and the arguments of `extract` that make one like it, but for those `given`."""
    with open_finished_or_partial(path) as file:
        run = file.run
    request = request_of(run, path, instead=given)
    stages, layers = stages_of(run)
    told = {item.name: getattr(request, item.name) for item in fields(Request)}
    return run, {
        **told,
        "stages": stages,
        "layers": layers,
        "dtype": run.dtype,
        "precision": run.precision,
        "pool": run.pool,
    }


def images_of(path: str | os.PathLike[str]) -> ImageList:
    """The images of a feature file, row by row, where they were: below the current folder or the file's, not elsewhere.

    Where they lay in several folders, each is the one of its name that has the recorded size and time. What changed
    since is named in the list's warnings. Raises `StartError` where an image cannot be told so.
    """
    command = f"bbx extract --like {path}"
    with open_finished_or_partial(path) as file:
        roots, keys, recorded = recorded_roots(file), file.keys, file.inputs()
        done = set(file.done.tolist())
    if not roots:
        raise StartError(f"{path} does not say where its images lay", f"name them: {command} FOLDER")
    for root in roots:
        if not is_near(Path(root), path):
            raise StartError(
                f"images of {path} lay in {root}, neither below the current folder nor below the file's",
                f"a path from a file is not followed; if you trust it: {command} {root}",
            )
    for key in keys:
        if key.startswith("/") or ".." in key.split("/") or "\0" in key:
            raise StartError(f"the key {key!r} of {path} leads out of its folder", f"name the images: {command} FOLDER")
    if len(roots) == 1:
        images = ImageList(keys, roots, _runs=[(0, roots[0], 0)])
    else:
        images = _of_several(
            keys, roots, recorded, f"name their folders: bbx extract --like {path} --skip-in {path} FOLDER"
        )
    changed = [key for row, key in enumerate(keys) if row in done and has_changed(images.path(row), recorded[row])]
    if changed:
        some = ", ".join(map(repr, changed[:5])) + ", …" * (len(changed) > 5)
        images.warnings.append(f"{len(changed):,} images are not what they were when {path} was made: {some}")
    return images


def _of_several(keys: list[str], roots: list[str], recorded: list[InputFile], hint: str) -> ImageList:
    runs: list[tuple[int, str, int]] = []
    for row, (key, before) in enumerate(zip(keys, recorded, strict=True)):
        found = [root for root in roots if facts_of(Path(root, key)) == before._replace(digest=b"")]
        if not found or before == InputFile():
            raise StartError(f"in none of {len(roots)} folders {key!r} is the file that it was", hint)
        if not runs or runs[-1][1] != found[0]:
            runs.append((row, found[0], 0))
    return ImageList(keys, roots, _runs=runs)
