"""The nouns that every other module speaks: which model, which stages, which preprocessing, which run.

Frozen values of the standard library only, so that a reader of a feature file needs neither torch nor numpy for them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from bbx.errors import FileError, UsageError, nearest

ResizeMode = Literal["crop", "squash", "pad"]
ExifMode = Literal["apply", "ignore"]
Dtype = Literal["float32", "float16"]
Precision = Literal["float32", "tf32", "bf16", "fp16"]
Pool = Literal["none", "avg", "max"]
Mode = Literal["auto", "new", "resume", "overwrite"]
OnError = Literal["skip", "fail"]
Scale = Literal["shared", "channel"]

# An input of 8192 × 8192: beyond it lie typing errors and hostile files.
_MOST_PIXELS = 1 << 26
_STAGE_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_TAKEN_NAMES = frozenset({"image", "path", "status", "checksum", "provenance", "plot", ".", ".."})


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model by name: `provider:name`, where an empty provider means "whoever knows that name"."""

    provider: str
    name: str
    weights: str = "auto"

    @classmethod
    def parse(cls, text: str, weights: str = "auto") -> ModelRef:
        """`"timm:resnet50.a1_in1k"` → `ModelRef("timm", "resnet50.a1_in1k")`; `str()` gives the text back."""
        provider, colon, name = text.strip().partition(":")
        if not colon:
            provider, name = "", provider
        if not name:
            raise UsageError(f"{text!r} names no model", "bbx models lists the names")
        return cls(provider.lower(), name, weights)

    def __str__(self) -> str:
        return f"{self.provider}:{self.name}" if self.provider else self.name


@dataclass(frozen=True, slots=True)
class Stage:
    """One output of a backbone, as measured by a dry forward, never as declared by metadata.

    `shape` is one image's: `(c, h, w)` for a feature map, `(t, d)` for tokens that form no grid, `(c,)` for a vector.
    `stride` is in input pixels per cell (0 where there is no grid), `module` the dotted name in the network, `index`
    the place among the backbone's stages, stem = 0 (None for a module asked for by path).
    """

    name: str
    shape: tuple[int, ...]
    stride: float
    module: str
    index: int | None = None

    @property
    def channels(self) -> int:
        """Channels of a map, features of a token, length of a vector."""
        return self.shape[-1] if len(self.shape) == 2 else self.shape[0]

    @property
    def values(self) -> int:
        """Numbers per image."""
        return math.prod(self.shape)


def one_of(option: str, value: str, words: Any) -> None:
    """Raises `UsageError` unless `value` is one of `words`, a `Literal`."""
    valid = get_args(words)
    if value not in valid:
        close = nearest(str(value), valid, 1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"{option} cannot be {value!r}", f"{meant}valid: {', '.join(valid)}")


def storable_name(name: str) -> str:
    """`name` as a feature file can hold it: names that would clash with the file's own datasets get `.out` appended.

    Raises `UsageError` where a character can be in no dataset name. Source of the rule: the file format's "Layout".
    """
    if not _STAGE_NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot name a stage", "letters, digits, '_', '.' and '-' only")
    clashes = name in _TAKEN_NAMES or name.endswith(("_channel", "_y", "_x", "_token", "_feature"))
    return f"{name}.out" if clashes else name


def select_stages(available: Sequence[str], wanted: str | Iterable[str | int] | None = None) -> tuple[str, ...]:
    """The stages `wanted` of `available`, in network order: the one place where names and indices meet.

    `wanted` is a comma-separated text or a sequence of names, indices, negative indices and ranges (`stem..stage2`,
    `0-2`, `1..-1`), or `all`; None means the last stage. Any order, repeats allowed.

    Raises `UsageError` naming the valid stages and the nearest match.
    """
    if wanted is None:
        return (available[-1],)
    words = wanted.split(",") if isinstance(wanted, str) else list(wanted)
    words = [word.strip() if isinstance(word, str) else word for word in words]
    chosen: set[int] = set()
    for word in words:
        chosen.update(_positions(available, word))
    if not chosen:
        raise UsageError("no stage was asked for", f"valid stages: {', '.join(available)}")
    return tuple(available[position] for position in sorted(chosen))


def _positions(available: Sequence[str], word: str | int) -> Iterable[int]:
    if word == "":
        return ()
    if word == "all":
        return range(len(available))
    if isinstance(word, int) or word in available:
        return (_position(available, word),)
    if match := re.fullmatch(r"(.+?)\.\.(.+)|(\d+)-(\d+)", word):
        first, last = (_position(available, end) for end in match.groups() if end is not None)
        if first > last:
            raise UsageError(f"the range {word!r} runs backwards", f"type {match.expand(_swapped(match))}")
        return range(first, last + 1)
    return (_position(available, word),)


def _swapped(match: re.Match[str]) -> str:
    return r"\2..\1" if match[1] is not None else r"\4-\3"


def _position(available: Sequence[str], word: str | int) -> int:
    if isinstance(word, str):
        folded = [name.lower() for name in available]
        if word.lower() in folded:
            return folded.index(word.lower())
        if not re.fullmatch(r"-?\d+", word):
            close = nearest(word, available, 1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise UsageError(f"no stage {word!r}", f"{meant}valid stages: {_numbered(available)}")
    index = int(word)
    if isinstance(word, bool) or not -len(available) <= index < len(available):
        raise UsageError(f"no stage with index {word}", f"valid stages: {_numbered(available)}")
    return index % len(available)


def _numbered(available: Sequence[str]) -> str:
    return ", ".join(f"{name} ({index})" for index, name in enumerate(available))


@dataclass(frozen=True, slots=True)
class Preprocess:
    """How an image becomes the network's input. Stated by the provider, for it belongs to the weights.

    `size` is the input's (height, width) in pixels. Mode `crop`: scale the short side to `resize` pixels, cut the
    centre; `squash`: scale to `size`, ignoring the aspect; `pad`: scale to fit inside `size`, fill with `mean`.
    `interpolation` is Pillow's filter name; `mean` and `std` are per RGB channel, on a 0..1 scale.
    `exif`: whether the orientation tag is applied first, so that the network sees the picture as a person does.
    """

    size: tuple[int, int]
    resize: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mode: ResizeMode = "crop"
    exif: ExifMode = "apply"

    def override(
        self, *, size: tuple[int, int] | None = None, mode: ResizeMode | None = None, exif: ExifMode | None = None
    ) -> Preprocess:
        """A copy with the user's wishes; a new `size` keeps the weights' own ratio of resize to crop."""
        changed = self
        if size is not None and size != self.size:
            if min(size) < 1 or math.prod(size) > _MOST_PIXELS:
                raise UsageError(f"size {size[0]}x{size[1]} is out of range", "give pixels, such as --size 224")
            ratio = self.resize / min(self.size)
            changed = replace(changed, size=size, resize=round(min(size) * ratio))
        return replace(changed, mode=mode or self.mode, exif=exif or self.exif)

    def describe(self) -> str:
        """One line, as the plan and `bbx stages` print it."""
        height, width = self.size
        how = {
            "crop": f"resize {self.resize} ({self.interpolation}), centre crop {height}x{width}",
            "squash": f"resize to {height}x{width} ({self.interpolation}), aspect ignored",
            "pad": f"resize into {height}x{width} ({self.interpolation}), padded with the mean",
        }[self.mode]
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"{how}, mean ({mean}), std ({std}), EXIF orientation {self.exif}"


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What makes a run this run: two runs are the same exactly when these are equal (`weights`, a label, aside)."""

    model: str
    weights_digest: str
    stages: tuple[Stage, ...]
    preprocess: Preprocess
    dtype: Dtype = "float32"
    pool: Pool = "none"
    precision: Precision = "float32"
    weights: str = field(default="", compare=False)

    @property
    def row_nbytes(self) -> int:
        """Bytes per image on disk."""
        return sum(stage.values for stage in self.stages) * (2 if self.dtype == "float16" else 4)

    @property
    def sha256(self) -> str:
        """Hex digest of the fields that are compared."""
        compared = {name: value for name, value in asdict(self).items() if name != "weights"}
        return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()

    def differences(self, other: RunSpec) -> list[tuple[str, str, str]]:
        """`(field, mine, theirs)` for each compared field that differs, nested fields by dotted name."""
        found: list[tuple[str, str, str]] = []
        # What a user chose comes before what follows from it: another size or pool gives other shapes too.
        follows = ("stages", "weights_digest")
        for item in sorted((item for item in fields(self) if item.compare), key=lambda item: item.name in follows):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if mine == theirs:
                continue
            if isinstance(mine, Preprocess):
                pairs = [(f"preprocess.{f.name}", getattr(mine, f.name), getattr(theirs, f.name)) for f in fields(mine)]
                found += [(name, str(a), str(b)) for name, a, b in pairs if a != b]
            elif item.name == "stages":
                found.append(("stages", *_unlike(mine, theirs)))
            else:
                found.append((item.name, str(mine), str(theirs)))
        return found

    def to_json(self) -> str:
        """The text that the feature file records."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> RunSpec:
        """The run that `to_json` wrote; raises `FileError` for anything else, since files are not trusted."""
        try:
            data = json.loads(text)
            stages = tuple(_checked(Stage, stage) for stage in data.pop("stages"))
            preprocess = _checked(Preprocess, data.pop("preprocess"))
            run: RunSpec = _checked(cls, {**data, "stages": stages, "preprocess": preprocess})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FileError(f"the run description is damaged ({type(error).__name__}: {error})") from None
        for name, allowed in (("dtype", Dtype), ("pool", Pool), ("precision", Precision)):
            if getattr(run, name) not in get_args(allowed):
                raise FileError(f"the run description has an unknown {name}: {getattr(run, name)!r}")
        if preprocess.mode not in get_args(ResizeMode) or preprocess.exif not in get_args(ExifMode):
            raise FileError(f"the run description has an unknown preprocessing: {preprocess.mode}, {preprocess.exif}")
        if not (min(*preprocess.size, preprocess.resize) > 0 and math.prod(preprocess.size) <= _MOST_PIXELS):
            raise FileError(f"the run description has an impossible input size: {preprocess.size}")
        return run


def _unlike(mine: Sequence[Stage], theirs: Sequence[Stage]) -> tuple[str, str]:
    """Both sides in a few words: the names where they differ, else the first stage that differs in shape or module."""
    names = tuple(", ".join(stage.name for stage in side[:6]) + ", …" * (len(side) > 6) for side in (mine, theirs))
    if [stage.name for stage in mine] != [stage.name for stage in theirs]:
        return f"{len(mine)} ({names[0]})", f"{len(theirs)} ({names[1]})"
    one, other = next(pair for pair in zip(mine, theirs, strict=True) if pair[0] != pair[1])
    return tuple(f"{s.name} {'x'.join(map(str, s.shape))} of {s.module}" for s in (one, other))  # type: ignore[return-value]


def _checked(kind: type[Any], data: dict[str, Any]) -> Any:
    """`kind(**data)` with JSON's lists as tuples, refusing values of another type than the dataclass's defaults."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    made = kind(**values)
    for item in fields(kind):
        _check_type(item.name, str(item.type), getattr(made, item.name))
    return made


def _check_type(name: str, declared: str, value: object) -> None:
    words: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "tuple": (tuple,)}
    kind = declared.split("[")[0].split(" ")[0]
    expected = words.get(kind, (str, Preprocess))
    if isinstance(value, bool) or not (isinstance(value, expected) or (value is None and "None" in declared)):
        raise TypeError(f"{name} is {type(value).__name__}, not {declared}")
    if not isinstance(value, tuple) or declared == "tuple[Stage, ...]":
        return
    numbers: tuple[type, ...] = (int, float) if "float" in declared else (int,)
    if not all(isinstance(part, numbers) and not isinstance(part, bool) for part in value):
        raise TypeError(f"{name} holds something that is not a number")
    if "..." not in declared and len(value) != declared.count(",") + 1:
        raise TypeError(f"{name} has {len(value)} numbers, not {declared}")
