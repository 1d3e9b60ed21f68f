"""What `bbx verify` does: a feature file checked whole and, on request, some of its rows extracted once more.

The check needs no network and no picture. What is recomputed shows what no checksum can: that a row's features are
those of its picture, by the model that the file names.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bbx.changes import changed, changes, no_gpu
from bbx.diff import TOLERANCE, relative_errors
from bbx.errors import EXIT_SOME_FAILED, StartError, UsageError
from bbx.images import MAX_PIXELS, Decoders, DecodeSettings, cell_dtype
from bbx.images.decoders import TIMEOUT
from bbx.pictures import Locate, locate, roots
from bbx.spec import Precision
from bbx.store import FeatureFile
from bbx.store.check import Health, Progress, check_file, read_checked

if TYPE_CHECKING:
    from bbx.backbone import Backbone

Outcome = Literal["equal", "differs", "missing", "unreadable"]

# What rounding alone may make of a row's largest value, on disk and in computing.
_FLOAT16 = 2.0**-10
# The latter between a CPU in float32 and an H100, over seven networks: 5e-3, 3e-2 and 2e-1 at most (float32: 7e-6).
ROUNDING: dict[Precision, float] = {"float32": 0.0, "tf32": 2.0**-7, "fp16": 2.0**-4, "bf16": 2.0**-2}
_LEFT_TO_CPU = "the GPU's decoder may have left this picture to the CPU, then or now"


@dataclass(frozen=True, slots=True)
class Recomputed:
    """One row, extracted again.

    `errors` are max|a − b| / max|a| per stage, `a` being the stored row, and empty where there was nothing to compare:
    the picture is `missing` or `unreadable`. `why`: what may explain it, as far as it can be known.
    """

    row: int
    key: str
    outcome: Outcome
    errors: dict[str, float]
    why: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a file is worth: its health, and the rows that were recomputed.

    `tolerance` is the largest error that counted as equal. `changes`: what is other than when the file was made, such
    as a library's version.
    """

    health: Health
    recomputed: tuple[Recomputed, ...]
    tolerance: float
    changes: tuple[str, ...]

    @property
    def differing(self) -> tuple[Recomputed, ...]:
        """The recomputed rows that are not equal, or could not be compared."""
        return tuple(row for row in self.recomputed if row.outcome != "equal")

    @property
    def exit_code(self) -> int:
        """0 all good, 4 something is damaged, or a row that was to be recomputed is not confirmed."""
        return 0 if self.health.sound and not self.differing else EXIT_SOME_FAILED


def verify(
    path: str | os.PathLike[str],
    *,
    recompute: int = 0,
    root: str | os.PathLike[str] | None = None,
    seed: int = 0,
    weights: str | None = None,
    device: str = "auto",
    tolerance: float | None = None,
    image_timeout: float = TIMEOUT,
    max_pixels: int = MAX_PIXELS,
    progress: Progress | None = None,
    on_row: Callable[[Recomputed], None] | None = None,
) -> Verdict:
    """Check the feature file at `path`, or its `.partial`; extract `recompute` of its rows, chosen by `seed`, again.

    `root` is the folder that the keys are relative to; without it the recorded one counts where it lies in the current
    folder or in the file's. `weights` says where the recorded weights are now, if elsewhere. `tolerance` is of a row's
    largest value; by default 1e-5, or what the file's own dtype and precision round to. `progress` hears of the check,
    `on_row` of each row that was recomputed. `image_timeout` and `max_pixels` as in `bbx.extract`.

    Raises `FileError` for what is no feature file, `StartError` where the pictures cannot be found, `WeightsError`
    where the recorded weights cannot be had, `UsageError`.
    """
    if recompute < 0:
        raise UsageError(f"--recompute cannot be {recompute}", "--recompute 20 extracts 20 rows again")
    if tolerance is not None and not tolerance >= 0:
        raise UsageError(f"--tolerance cannot be {tolerance}", "0 or a small number, such as 1e-5")
    if not recompute:
        return Verdict(check_file(path, progress=progress), (), TOLERANCE if tolerance is None else tolerance, ())
    with FeatureFile(path, partial=not Path(path).exists()) as file:
        if not roots(file, root):
            raise StartError(f"the pictures of {path} cannot be found", "name their folder with --root FOLDER")
        _check_decode(file, device, tolerance)
        # Before the check, which may take long: what cannot be recomputed is said at once.
        backbone = _backbone(file, weights, device)
        health = check_file(path, progress=progress)
        rounding = (TOLERANCE, ROUNDING[file.run.precision], _FLOAT16 if file.run.dtype == "float16" else 0.0)
        limit = max(rounding) if tolerance is None else tolerance
        decoding = DecodeSettings(file.run.preprocess, image_timeout, max_pixels)
        again = _Again(file, backbone, locate(file, root), limit, decoding)
        found = []
        for row in again.rows(_chosen(file, recompute, seed)):
            found.append(row)
            if on_row:
                on_row(row)
        return Verdict(health, tuple(found), limit, tuple(changes(file, device=_device_of(backbone))))


def _chosen(file: FeatureFile, count: int, seed: int) -> list[int]:
    done = file.done
    places = random.Random(seed).sample(range(len(done)), min(count, len(done)))
    return [int(done[place]) for place in sorted(places)]


def _check_decode(file: FeatureFile, device: str, tolerance: float | None) -> None:
    """Raises `StartError` where a GPU decoded the pictures and none does here, unless the user says what to allow."""
    from bbx.plan import find_device

    why = no_gpu(file.run.preprocess, str(find_device(device)))
    if why and tolerance is None:
        raise StartError(
            f"a GPU decoded the pictures of {file.path}, and to other pixels than any CPU: {why}",
            "recompute on such a GPU, or say what may differ: with --tolerance 0.1 the CPU decodes them, exactly",
        )


def _backbone(file: FeatureFile, weights: str | None, device: str) -> Backbone:
    from bbx.plan import find_device
    from bbx.rebuild import rebuild

    where = find_device(device)
    return rebuild(file.run, weights=weights, near=file.path).to(where, precision=file.run.precision)


class _Again:
    """The extraction of single rows, and its comparison with what is stored."""

    def __init__(
        self, file: FeatureFile, backbone: Backbone, find: Locate, limit: float, decoding: DecodeSettings
    ) -> None:
        self._decoding = decoding
        self._file = file
        self._backbone = backbone
        self._find = find
        self._limit = limit

    def rows(self, rows: Sequence[int]) -> Iterator[Recomputed]:
        """Each row, as it is done."""
        with _decoders(self._decoding, _device_of(self._backbone)) as decoders:
            for row in rows:
                yield self._row(row, decoders)

    def _row(self, row: int, decoders: Decoders) -> Recomputed:
        key, path = self._file.keys[row], self._find(row)
        if path is None:
            return Recomputed(row, key, "missing", {}, ("the picture is not there any more",))
        pixels = np.zeros((1, *self._file.run.preprocess.size, 3), cell_dtype(self._file.run.preprocess))
        answer = decoders.submit(os.fspath(path), pixels[0]).result()
        since = changed(self._file.inputs([row])[0], answer.file)
        if answer.reason:
            return Recomputed(row, key, "unreadable", {}, (answer.reason, *since))
        errors, damaged = self._compare(row, self._maps(pixels))
        if all(error <= self._limit for error in errors.values()):
            return Recomputed(row, key, "equal", errors, (*damaged, *since))
        gpu = self._file.run.preprocess.decode == "gpu"
        why = (*damaged, *since, *([_LEFT_TO_CPU] if gpu else []))
        return Recomputed(row, key, "differs", errors, why)

    def _maps(self, pixels: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """`(1, h, w, 3)` → each stage's row as it would be stored, `(1, *shape)`."""
        import torch

        from bbx.backbone import normalise
        from bbx.engine import pooled

        run = self._file.run
        with torch.inference_mode():
            batch = torch.from_numpy(pixels).to(_device_of(self._backbone))
            maps = self._backbone(normalise(batch, self._backbone.preprocess))
            made = {name: pooled(tensor.float(), run.pool).cpu() for name, tensor in maps.items()}
        return {name: (tensor.half() if run.dtype == "float16" else tensor).numpy() for name, tensor in made.items()}

    def _compare(self, row: int, maps: dict[str, NDArray[Any]]) -> tuple[dict[str, float], list[str]]:
        errors, why = {}, []
        for name, stage in self._file.stages.items():
            stored, good = read_checked(self._file._access, name, np.array([row]))
            if not good[0]:
                why.append(f"its stored {name} is damaged")
            if name in maps and maps[name].shape == stored.shape:
                errors[name] = float(relative_errors(stored.reshape(1, -1), maps[name].reshape(1, -1))[0])
            else:
                errors[name] = math.inf
                why.append(f"the model gives no {name} of shape {stage.shape} any more")
        return errors, why


def _decoders(settings: DecodeSettings, device: str) -> Decoders:
    """One, as the run had it; without the device for that, whatever decodes exactly."""
    if settings.preprocess.decode != "gpu" or no_gpu(settings.preprocess, device):
        return Decoders(1, settings)
    import torch

    from bbx.gpu_decode import decoders_for

    return decoders_for(1, settings, torch.device(device))


def _device_of(backbone: Backbone) -> str:
    parameter = next(backbone.network.parameters(), None)
    return "cpu" if parameter is None else str(parameter.device)
