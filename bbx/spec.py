"""The nouns that every other module speaks: which model, which stages, which preprocessing, which run.

Frozen values of the standard library only, so that a reader of a feature file needs neither torch nor numpy for them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral
from typing import Any, Literal, NamedTuple, get_args

from bbx.errors import FileError, UsageError, nearest

ResizeMode = Literal["crop", "squash", "pad"]
ExifMode = Literal["apply", "ignore"]
Decode = Literal["exact", "fast", "gpu"]
Dtype = Literal["float32", "float16"]
Precision = Literal["float32", "tf32", "bf16", "fp16"]
Pool = Literal["none", "avg", "max"]
Mode = Literal["auto", "new", "resume", "overwrite"]
OnError = Literal["skip", "fail"]
Scale = Literal["shared", "channel"]
Norm = Literal["raw", "native"]
Compress = Literal["none", "gzip"]
Engine = Literal["eager", "compile"]
ChannelsLast = Literal["auto", "yes", "no"]
BatchSize = int | Literal["auto"]

# Fields that say how a run came about, and not what it computes.
_LABELS = ("weights", "source")

# An input of 8192 × 8192: beyond it lie typing errors and hostile files.
_MOST_PIXELS = 1 << 26


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
class Build:
    """How a provider is to build a model.

    `seed` is of random weights, `size` the input's (height, width) in pixels where it is not the weights' own.
    `structure`: no weights at all, parameters on torch's meta device, for shapes only. `norm`: `raw` gives what the
    model computes in its ordinary forward, `native` what the library's own backbone class returns (transformers'
    extra norms). `tokens`: the stages of a plain ViT as `(t, d)`, its prefix tokens kept. `options` are the library's
    own arguments of the model: fields of a transformers configuration, arguments of timm's or torchvision's builder.
    """

    seed: int = 0
    size: tuple[int, int] | None = None
    structure: bool = False
    norm: Norm = "raw"
    tokens: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


BUILD = Build()
"""As the weights have it: what a provider builds when nothing is said."""


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


SEEDS = range(1 << 63)
"""What torch takes as a seed, and every file can hold."""


def seed_of(seed: Any) -> int:
    """A seed, any kind of whole number, as Python's own. Raises `UsageError` where it is not one of `SEEDS`."""
    if not isinstance(seed, Integral) or int(seed) not in SEEDS:
        raise UsageError(f"--seed cannot be {seed!r}", "a whole number from 0 to 2^63 - 1")
    return int(seed)


@dataclass(frozen=True, slots=True)
class Preprocess:
    """How an image becomes the network's input. Stated by the provider, for it belongs to the weights.

    `size` is the input's (height, width) in pixels; its short side stands for `resize` pixels of the scaled picture, so
    that the box of the scaling is `size` enlarged by `resize / min(size)`. Mode `crop`: scale to cover the box;
    `squash`: scale to the box, ignoring the aspect; `pad`: scale to fit inside it. Then the centre is cut, and what the
    picture does not reach is filled, with `mean` in mode `pad`.
    `interpolation` is Pillow's filter name; `mean` and `std` are per RGB channel, on a 0..1 scale.
    `exif`: whether the orientation tag is applied first, so that the network sees the picture as a person does.
    `processor`: where it is not empty, the JSON text of the transformers image processor that does all but the
    orientation; the numbers then only describe it.
    `decode`: `exact`, the pixels of the weights' own library, or `fast`, nearly the same for less: a JPEG decoded at a
    fraction, only what the input shows scaled (`bbx.images.fit`); or `gpu`, nearly the same by the CUDA device's own
    decoder (`bbx.gpu_decode`).
    """

    size: tuple[int, int]
    resize: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mode: ResizeMode = "crop"
    exif: ExifMode = "apply"
    processor: str = ""
    decode: Decode = "exact"

    def override(
        self,
        *,
        size: tuple[int, int] | None = None,
        mode: ResizeMode | None = None,
        exif: ExifMode | None = None,
        decode: Decode | None = None,
    ) -> Preprocess:
        """A copy with the user's wishes; a new `size` keeps the weights' own ratio of resize to crop.

        A `mode` of `squash` or `pad` that is asked for shows the whole picture, whatever the weights' own cuts off.
        Another size or mode is no longer what an image processor of transformers does: bbx's own resize takes over.
        """
        changed = self
        if (size or self.size) != self.size or (mode or self.mode) != self.mode:
            self._check_plain()
            changed = replace(changed, processor="")
        if size is not None and size != self.size:
            if min(size) < 1 or math.prod(size) > _MOST_PIXELS:
                raise UsageError(f"size {size[0]}x{size[1]} is out of range", "give pixels, such as --size 224")
            ratio = self.resize / min(self.size)
            changed = replace(changed, size=size, resize=round(min(size) * ratio))
        if mode in ("squash", "pad"):
            changed = replace(changed, resize=min(changed.size))
        return replace(changed, mode=mode or self.mode, exif=exif or self.exif, decode=decode or self.decode)

    def _check_plain(self) -> None:
        """Raises `UsageError` where the image processor does to values what the numbers here cannot say."""
        facts = json.loads(self.processor or "{}")
        odd = [name for name in ("do_flip_channel_order", "rescale_offset") if facts.get(name)]
        if not math.isclose(float(facts.get("rescale_factor") or 1 / 255) * 255, 1):
            odd.append(f"rescale_factor {facts['rescale_factor']}")
        if odd:
            raise UsageError(
                f"{self.processor_name} has {', '.join(odd)}, which bbx's own resizing would leave out",
                "leave --size and --resize-mode out: this model's input is what its processor makes",
            )

    @property
    def box(self) -> tuple[int, int]:
        """(height, width) to which, or to cover or fit inside which, a picture is scaled before its centre is cut."""
        short = min(self.size)
        # The product comes first so that the short side is exact.
        return round(self.size[0] * self.resize / short), round(self.size[1] * self.resize / short)

    @property
    def processor_name(self) -> str:
        """The class of the image processor, empty where bbx itself resizes and normalises."""
        found = re.search(r'"image_processor_type": ?"(\w+)"', self.processor)
        return found[1] if found else ""

    def describe(self) -> str:
        """One line, as the plan and `bbx stages` print it."""
        height, width = self.box
        cut = f", centre crop {self.size[0]}x{self.size[1]}"
        how = {
            "crop": f"resize {self.resize} ({self.interpolation})",
            "squash": f"resize to {height}x{width} ({self.interpolation}), aspect ignored",
            "pad": f"resize into {height}x{width} ({self.interpolation}), padded with the mean",
        }[self.mode] + (cut if self.mode == "crop" or self.box != self.size else "")
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        by = f"{self.processor_name}: " if self.processor_name else ""
        decode = "" if self.decode == "exact" else f", decode {self.decode}"
        return f"{by}{how}, mean ({mean}), std ({std}), EXIF orientation {self.exif}{decode}"


class InputFile(NamedTuple):
    """An image file as it was when its row was made: size in bytes, mtime in nanoseconds, BLAKE2b-128 of its content.

    `digest` is empty where it was not taken.
    """

    nbytes: int = 0
    mtime_ns: int = 0
    digest: bytes = b""

    @classmethod
    def of(cls, nbytes: int, mtime_ns: int) -> InputFile:
        """A file by its stat; a time beyond the year 2262, which 64 bits of nanoseconds cannot hold, is their end."""
        return cls(nbytes, max(-(1 << 63), min(mtime_ns, (1 << 63) - 1)))


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What makes a run this run: two runs are the same exactly when these are equal (but for the last two, labels).

    `config` is the JSON text of what the model was built from where its name does not say it. `norm` and `tokens` as in
    `Build`. `source` is the JSON text of the arguments that the backbone was asked for with, so that it can be built
    again; `weights` says in a few words where they come from.
    """

    model: str
    weights_digest: str
    stages: tuple[Stage, ...]
    preprocess: Preprocess
    dtype: Dtype = "float32"
    pool: Pool = "none"
    precision: Precision = "float32"
    norm: Norm = "raw"
    tokens: bool = False
    config: str = ""
    weights: str = field(default="", compare=False)
    source: str = field(default="", compare=False)

    @property
    def row_nbytes(self) -> int:
        """Bytes per image on disk."""
        return sum(stage.values for stage in self.stages) * (2 if self.dtype == "float16" else 4)

    @property
    def sha256(self) -> str:
        """Hex digest of the fields that are compared."""
        return run_digest(self._written())

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
        return json.dumps(self._written(), sort_keys=True)

    def _written(self) -> dict[str, Any]:
        """As data, without what says nothing more than files say that are older than the field."""
        data = asdict(self)
        for holder, name, usual in (
            (data, "norm", "raw"),
            (data, "tokens", False),
            (data, "config", ""),
            (data, "source", ""),
            (data["preprocess"], "processor", ""),
            (data["preprocess"], "decode", "exact"),
        ):
            if holder[name] == usual:
                del holder[name]
        return data

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
        for name, allowed in (("dtype", Dtype), ("pool", Pool), ("precision", Precision), ("norm", Norm)):
            if getattr(run, name) not in get_args(allowed):
                raise FileError(f"the run description has an unknown {name}: {getattr(run, name)!r}")
        if preprocess.mode not in get_args(ResizeMode) or preprocess.exif not in get_args(ExifMode):
            raise FileError(f"the run description has an unknown preprocessing: {preprocess.mode}, {preprocess.exif}")
        if preprocess.decode not in get_args(Decode):
            raise FileError(f"the run description has an unknown decode: {preprocess.decode!r}")
        if not (min(*preprocess.size, preprocess.resize) > 0 and math.prod(preprocess.size) <= _MOST_PIXELS):
            raise FileError(f"the run description has an impossible input size: {preprocess.size}")
        return run


def run_digest(data: Mapping[str, Any]) -> str:
    """Hex SHA-256 of a run as data, as a file has it, its labels left out."""
    compared = {name: value for name, value in data.items() if name not in _LABELS}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()


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
    if declared == "bool":
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {type(value).__name__}, not bool")
        return
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
