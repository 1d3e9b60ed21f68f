"""A backbone: pixels in, one feature map per stage out, with no layer run past the deepest stage asked for.

A provider supplies a network and, for each stage, the module whose output it is (a `Tap`); everything that all
backbones share is here and in `taps`: hooks with early exit, channels-first layout, shapes and strides measured by dry
forwards, and the check that what comes out is what was declared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor, nn

from bbx.errors import ContractError, StartError, UsageError, WeightsError
from bbx.products import products
from bbx.spec import ModelRef, Norm, Precision, Preprocess, Stage
from bbx.stages import select_stages
from bbx.taps import Tap, capture, channels_first, exclusive, free_taps, settled

# The CPU's allocator says the second, on Windows the third.
_NO_MEMORY = (
    "out of memory", "can't allocate memory", "not enough memory", "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip

Forward = Callable[[Tensor, Sequence[Tap]], dict[str, Tensor]]
"""`(pixels, taps)` → each tap's raw output, in its own layout, having run nothing past the last one."""


@dataclass(frozen=True)
class Backbone:
    """`backbone(pixels)` maps `(b, 3, h, w)`, preprocessed, to `{stage name: (b, c, fh, fw)}`, channels first.

    `taps` are all stages in network order, `wanted` the ones that a call computes (`select` changes them).
    `weights` says where the weights come from, `weights_digest` is the SHA-256 of their values, `untrained` names
    the modules of the classifier that they do not fit, `notes` is what a user should know. In evaluation mode;
    gradients flow unless the caller forbids them. `forward` is the provider's own way to the maps where hooks will
    not do, `attend` its way to the attention maps `(b, heads, t, t)`. `config` is the JSON text of what the network was
    built from where its name does not say it: an assembled model, options, a folder. `norm` and `tokens`
    say how it was built.
    """

    ref: ModelRef
    network: nn.Module
    taps: tuple[Tap, ...]
    preprocess: Preprocess
    weights: str
    weights_digest: str
    untrained: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    wanted: tuple[Tap, ...] = ()
    forward: Forward | None = None
    precision: Precision = "float32"
    config: str = ""
    norm: Norm = "raw"
    tokens: bool = False
    attend: Callable[[Tensor], tuple[Tensor, ...]] | None = None

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Every stage there is, in network order."""
        return tuple(tap.name for tap in self.taps)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that a call computes, in network order, as measured at the preprocessing's size."""
        return self._measured[1]

    def select(self, stages: str | Iterable[str | int] | None = None, *, layers: str | Iterable[str] = ()) -> Backbone:
        """The same network computing other stages: by `select_stages`' rules, plus `layers`, any module paths or globs.

        With neither, the last stage; with layers alone, only those. Raises `UsageError` naming what would be valid.
        """
        paths = [path.strip() for path in layers.split(",")] if isinstance(layers, str) else list(layers)
        if isinstance(layers, str) and not any(paths):
            raise UsageError("--layers names no module", "leave it out, or name some: 'features.3,features.*.norm1'")
        free, notes = free_taps(self.network, [path for path in paths if path], self.blank(self.preprocess.size))
        names = select_stages(self.stage_names, stages) if stages is not None or not free else ()
        wanted = [tap for tap in self.taps if tap.name in names]
        for tap in free:
            self._check_trained(tap)
            stage = next((stage for stage in self.taps if stage.name == tap.name), None)
            if stage and stage.module != tap.module:  # ShuffleNet has a module `stage2` that is no stage2
                tap = replace(tap, name=f"{tap.name}.out")
            if stage not in wanted or tap.module != (stage and stage.module):
                wanted.append(tap)
        if self.untrained:
            notes.append(f"the weights ({self.weights}) do not fit {', '.join(self.untrained)}, which no stage uses")
        return replace(self, wanted=tuple(wanted), notes=tuple(dict.fromkeys((*self.notes, *notes))))

    def _check_trained(self, tap: Tap) -> None:
        for module in self.untrained:
            if f"{tap.module}.".startswith(f"{module}.") or f"{module}.".startswith(f"{tap.module}."):
                raise WeightsError(
                    f"--layers {tap.module} needs {module}, which the weights ({self.weights}) do not fit",
                    "give weights with this very classifier, or ask for a layer before it",
                )

    def to(self, device: str | torch.device, *, precision: Precision = "float32") -> Backbone:
        """The backbone on `device`, computing in `precision`; outputs keep the precision they were computed in.

        float32 means float32: on CUDA, TF32 is switched on only when asked for (torch allows it in convolutions).
        """
        kind = torch.device(device).type
        if precision == "tf32" and kind != "cuda":
            raise UsageError(f"precision tf32 exists on CUDA devices only, not on {kind}", "try --precision bf16")
        self.network.to(device)
        return replace(self, precision=precision)

    def around(self, network: nn.Module, forward: Forward | None) -> Backbone:
        """The same stages from another network, one that gives the same maps: nothing is measured again."""
        other = replace(self, network=network, forward=forward, attend=None)
        other.__dict__["_measured"] = self._measured
        return other

    @property
    def measured_taps(self) -> tuple[Tap, ...]:
        """The taps of `stages`, their layouts settled."""
        return self._measured[0]

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """`(b, 3, h, w)` → `{name: (b, c, fh, fw)}` in stage order; raises `ContractError` on any other output."""
        taps, stages = self._measured
        raw = self._run(pixels, taps)
        measured_size = tuple(pixels.shape[-2:]) == self.preprocess.size
        maps = {}
        for tap, stage in zip(taps, stages, strict=True):
            if tap.name not in raw:
                raise ContractError(f"stage {tap.name} of {self.ref}: module {tap.module} gave nothing")
            maps[tap.name] = channels_first(raw[tap.name], tap, pixels)
            self._check(maps[tap.name], stage, len(pixels), whole=measured_size)
        return maps

    def blank(self, size: tuple[int, int]) -> Tensor:
        """`(1, 3, h, w)` of no picture, `size` being `(h, w)`: what shapes are measured with, where the network is."""
        like = next(self.network.parameters(), torch.empty(0))
        return torch.zeros((1, 3, *size), device=like.device, dtype=like.dtype)

    def _run(self, pixels: Tensor, taps: Sequence[Tap]) -> dict[str, Tensor]:
        lower = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        casting = torch.autocast(pixels.device.type, dtype=lower) if lower else nullcontext()
        with casting, products(pixels.device, tf32=self.precision == "tf32"), exclusive(self.network):
            return self.forward(pixels, taps) if self.forward else capture(self.network, taps, pixels)

    def _check(self, got: Tensor, stage: Stage, batch: int, *, whole: bool) -> None:
        declared = (batch, *stage.shape)
        fits = tuple(got.shape) == declared if whole else tuple(got.shape[:2]) == declared[:2]
        if not fits or got.ndim != len(declared):
            raise ContractError(f"stage {stage.name} of {self.ref} gave {tuple(got.shape)}, declared {declared}")

    @cached_property
    def _measured(self) -> tuple[tuple[Tap, ...], tuple[Stage, ...]]:
        """The wanted taps in the order they fire, layouts settled, and the stages that they give."""
        wanted = self.wanted or self.taps[-1:]
        size = self.preprocess.size
        # Not inference mode, whose tensors do not tell that they were written over.
        with torch.inference_mode(False), torch.no_grad():
            try:
                first = self._run(self.blank(size), wanted)
            except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
                reason = str(error).partition("\n")[0]
                if is_out_of_memory(error):
                    raise StartError(
                        f"{self.ref} finds too little memory for one image of {size[0]}x{size[1]} pixels: {reason}",
                        "try a smaller --size, or another --device",
                    ) from None
                raise UsageError(
                    f"{self.ref} cannot take an input of {size[0]}x{size[1]} pixels: {reason}",
                    "leave --size out, or try a larger one" if max(size) < 1024 else "try a smaller --size",
                ) from None
            other = _other_size(*size)
            try:
                second = self._run(self.blank(other), wanted)
            except (AssertionError, LookupError, RuntimeError, TypeError, ValueError):
                second, other = first, size  # a network of one fixed size, such as a ViT
        first_index = int(self.taps[0].name == "stage1")  # a network without a stem: index N is stageN all the same
        index = {tap.name: place for place, tap in enumerate(self.taps, first_index)}
        taps, stages = [], []
        for name, output in first.items():  # a dict in firing order
            tap = settled(next(tap for tap in wanted if tap.name == name), output, second[name])
            if tap.free and output.ndim == 4 and output.shape == second[name].shape:
                tap = self._settled_by_grids(tap, output)
            pairs = ((output, size), (second[name], other))
            shapes = [tuple(channels_first(raw, tap, self.blank(at)).shape[1:]) for raw, at in pairs]
            stride = _stride(shapes, size, other)
            taps.append(tap)
            stages.append(Stage(name, shapes[0], stride, tap.module, None if tap.free else index[name]))
        if missing := [tap for tap in wanted if tap.name not in first]:
            raise ContractError(f"stage {missing[0].name} of {self.ref}: module {missing[0].module} never ran")
        return tuple(taps), tuple(stages)

    def _settled_by_grids(self, tap: Tap, output: Tensor) -> Tap:
        """For a network of one size, whose axes do not move: a map is what has the grid of one of its stages."""
        pixels = self.blank(self.preprocess.size)
        maps = [
            channels_first(raw, self.taps[i], pixels) for i, raw in enumerate(self._run(pixels, self.taps).values())
        ]
        grids = {tuple(one.shape[-2:]) for one in maps}
        if tuple(output.shape[2:]) in grids:
            return tap
        if tuple(output.shape[1:3]) in grids:
            return replace(tap, layout="nhwc")
        raise UsageError(
            f"{tap.module} gives {tuple(output.shape[1:])}, and it cannot be seen which axes are height and width",
            "ask for the module that contains it",
        )


def is_out_of_memory(error: Exception) -> bool:
    """Whether `error` says that a device's memory is full, as torch and the libraries below it put it."""
    return any(word in str(error) for word in _NO_MEMORY)


def normalise(batch: Tensor, preprocess: Preprocess) -> Tensor:
    """`(b, h, w, 3)` uint8 RGB → `(b, 3, h, w)` float32 network input, on the batch's device.

    The same operations in the same order as torchvision's `convert_image_dtype` and `normalize`, hence the same bits;
    where a transformers image processor is the preprocessing, that processor's own.
    """
    if preprocess.processor:
        from bbx.processor import floats

        return floats(batch, preprocess)
    pixels = batch.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return pixels.sub_(_by_channel(preprocess.mean, pixels.device)).div_(_by_channel(preprocess.std, pixels.device))


@cache
def _by_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """`(3, 1, 1)`; kept, for on a GPU to copy them is to wait for all that was queued."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)


def _other_size(height: int, width: int) -> tuple[int, int]:
    """A second size to measure at: both sides differ by a multiple of 64, hence of every usual stride."""
    return (height - 64 if height >= 192 else height + 64), (width - 128 if width >= 256 else width + 128)


def _stride(shapes: Sequence[tuple[int, ...]], size: tuple[int, int], other: tuple[int, int]) -> float:
    """Input pixels per cell, by height: the number that explains the cells of both sizes, borders rounded as may be.

    How many cells are gained as the input grows tells it best, since what is cut off or added at the border cancels
    out; for few cells that is blurred too, and of the numbers that fit, a power of two is the likeliest.
    """
    if len(shapes[0]) != 3:
        return 0.0
    rows, columns = shapes[0][1:]
    sides = [*zip(size, shapes[0][1:], strict=True), *zip(other, shapes[1][1:], strict=True)]
    gained = [
        abs(size[axis] - other[axis]) / abs(shapes[0][axis + 1] - shapes[1][axis + 1])
        for axis in (0, 1)
        if shapes[0][axis + 1] != shapes[1][axis + 1]
    ]
    if not gained:
        return size[0] / rows
    guesses = [*gained, size[0] / rows, size[1] / columns, 2.0 ** round(math.log2(size[0] / rows))]
    # A border costs a cell or two, unpadded convolutions a tenth of them.
    fitting = [one for one in guesses if all(abs(side / one - cells) < max(2.5, 0.1 * cells) for side, cells in sides)]
    ranked = sorted(fitting, key=lambda guess: (not math.log2(guess).is_integer(), not guess.is_integer()))
    return ranked[0] if ranked else gained[0]
