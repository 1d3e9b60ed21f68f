"""An image on its way to the device: its file, read and looked at; and which of them are decoded at once."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from bbx.images import DecodeSettings
from bbx.images.fit import AXES, place
from bbx.images.formats import silence_pillow
from bbx.images.jpeg import open_plain
from bbx.images.process import Answer
from bbx.images.read import turn_of
from bbx.images.source import digest, facts_of, held, open_regular
from bbx.spec import InputFile

BATCH = 32
"""As many are decoded at once: torchvision's decoder holds one lock, and the hardware's engines want batches."""
# Decoded and scaled.
_BATCH_PIXELS = 1 << 26
# A larger file or picture is the workers': what is held, here and on the device, stays small beside the maps.
_MOST_NBYTES, _MOST_PIXELS = 1 << 24, 1 << 25


@dataclass(slots=True)
class Job:
    """An image on its way; what follows `answer` is known once its file was read. `size` is (width, height)."""

    path: str
    slot: NDArray[Any]
    answer: Future[Answer]
    jpeg: io.BytesIO | None = None
    size: tuple[int, int] = (0, 0)
    turn: Image.Transpose | None = None
    file: InputFile = field(default_factory=InputFile)
    seconds: float = 0.0

    def end(self, answer: Answer | BaseException) -> None:
        """Answers, unless that was done: what hung, and goes on after all, comes too late."""
        with contextlib.suppress(InvalidStateError):
            if isinstance(answer, BaseException):
                self.answer.set_exception(answer)
            else:
                self.answer.set_result(answer)


def look(job: Job, settings: DecodeSettings) -> bool:
    """Reads the file of `job`; whether it is one for the device. Raises anything at all."""
    silence_pillow()
    with open_regular(job.path) as file:
        job.file = facts_of(file)
        if job.file.nbytes > _MOST_NBYTES:
            return False
        content = held(file, job.file)
    assert isinstance(content, io.BytesIO)  # so small a one is held
    image = open_plain(content)
    if image is None or image.width * image.height > min(_MOST_PIXELS, settings.max_pixels):
        return False
    job.turn = turn_of(image) if settings.preprocess.exif == "apply" else None
    place(image.size[::-1] if AXES[job.turn][0] else image.size, settings.preprocess)
    if settings.digest:
        job.file = job.file._replace(digest=digest(content))
    job.size, job.jpeg = image.size, content
    return True


def batches(jobs: Sequence[Job], cell: tuple[int, int]) -> Iterator[list[Job]]:
    """`jobs` in parts whose pixels are few enough: those of the pictures, and of an input of `cell` for each."""
    batch: list[Job] = []
    pixels = 0
    for job in jobs:
        more = math.prod(job.size) + math.prod(cell)
        if batch and pixels + more > _BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
        batch.append(job)
        pixels += more
    if batch:
        yield batch
