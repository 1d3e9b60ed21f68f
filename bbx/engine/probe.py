"""Measure a backbone on this machine: images/s of its forward, through the very streams that a run uses."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bbx.backbone import Backbone
from bbx.engine.compute import Computed, Work
from bbx.engine.memory import kept_memory
from bbx.engine.settings import EngineSettings
from bbx.engine.streams import Streams
from bbx.machine import available_nbytes
from bbx.spec import Preprocess

SECONDS = 0.5
"""How long a rate is measured, once it is warm."""
GAIN = 0.05
"""What a doubling has to gain to be worth its memory."""
# A CPU is full with few images at once; an accelerator is not, and few would only be slow to try.
_FIRST = {"cpu": 1}
_MOST = {"cpu": 128}
_FIRST_ELSEWHERE, _MOST_ELSEWHERE = 16, 1024
# What a batch costs beyond its images is milliseconds: where it takes this long, a larger one has nothing to gain.
_LONG_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Tried:
    """A batch size, its images/s, and on a CPU the memory that it took.

    `full`: the device's memory did not hold it, and the rate is that of smaller batches.
    """

    batch_size: int
    rate: float
    nbytes: int = 0
    full: bool = False


@dataclass(frozen=True, slots=True)
class Growth:
    """The batch sizes that the memory held, ascending, and why no larger one was tried."""

    tried: tuple[Tried, ...]
    why: str

    @property
    def best(self) -> int:
        """The smallest batch size that none beats by more than `GAIN`."""
        most = max(one.rate for one in self.tried)
        return next(one.batch_size for one in self.tried if one.rate * (1 + GAIN) >= most)

    def describe(self) -> str:
        """One line for the plan."""
        rates = ", ".join(f"{one.batch_size}: {one.rate:.3g}" for one in self.tried)
        return f"--batch-size auto is {self.best}, of images/s measured ({rates}); {self.why}"


def grow(
    backbone: Backbone,
    device: torch.device,
    work: Work,
    settings_of: Callable[[int], EngineSettings],
    *,
    most: int,
) -> Growth:
    """Tries batch sizes up to `most`, each twice the one before, while it pays; `settings_of` is asked for each.

    Raises as `Compute.maps` does. Compiled code is for one batch size and takes a minute to make: where the run
    compiles, eager code is measured instead.
    """
    cap = max(1, min(_MOST.get(device.type, _MOST_ELSEWHERE), most))
    size = min(_FIRST.get(device.type, _FIRST_ELSEWHERE), cap)
    tried: list[Tried] = []
    idle, why = 0, ""
    while not why:
        settings = replace(settings_of(size), engine="eager")
        one = forward_rate(backbone, device, replace(work, batch_size=size), settings)
        if one.full and not tried:
            size //= 2  # down to what the memory holds; one image alone that is too much raises
            continue
        best = max((other.rate for other in tried), default=0.0)
        idle = 0 if one.rate > best * (1 + GAIN) else idle + 1
        if not one.full:
            tried.append(one)
        why = _why_no_more(one, cap, idle, seconds=settings.streams * size / one.rate)
        size = min(2 * size, cap)
    return Growth(tuple(tried), why)


def _why_no_more(last: Tried, cap: int, idle: int, *, seconds: float) -> str:
    if last.full:
        return f"the memory does not hold {last.batch_size}"
    if idle == 2:
        return "more gain nothing"
    if last.batch_size == cap:
        return "more were not tried"
    if seconds > _LONG_SECONDS:
        return f"a batch takes {seconds:.1f} s as it is"
    # On a CPU nobody says that memory is full: the system ends the process.
    if 2 * last.nbytes > available_nbytes():
        return f"the memory that is free might not hold {2 * last.batch_size}"
    return ""


def forward_rate(backbone: Backbone, device: torch.device, work: Work, settings: EngineSettings) -> Tried:
    """Images/s of `work` on noise, in batches of its size."""
    preprocess, size = backbone.preprocess, work.batch_size
    before = _resident_nbytes()
    pixels, rows = noise(preprocess, size, pinned=device.type == "cuda"), np.arange(size)
    with kept_memory(), Streams(backbone, device, work, settings) as streams:
        # Warm: a stream's first batch finds its kernels and its memory, or compiles.
        full = any([_halved(one) for one in [streams.submit(pixels, rows) for _ in range(settings.streams)]])
        waiting: deque[Future[Computed]] = deque()
        started, count = time.perf_counter(), 0
        # In whole rounds, for at the end all but one stream would wait.
        while not count or count % settings.streams or time.perf_counter() - started < SECONDS:
            waiting.append(streams.submit(pixels, rows))
            count += 1
            if len(waiting) == streams.depth:
                full |= _halved(waiting.popleft())
        for one in waiting:
            full |= _halved(one)
        rate = count * size / (time.perf_counter() - started)
        # While memory is kept, what the process has is the most that it had.
        return Tried(size, rate, max(0, _resident_nbytes() - before) if device.type == "cpu" else 0, full)


def _halved(computing: Future[Computed]) -> bool:
    """Waits for a batch; whether the memory was too small for it."""
    computed = computing.result()
    computed.wait()
    return bool(computed.notes)


def noise(preprocess: Preprocess, count: int, *, pinned: bool = False) -> NDArray[Any]:
    """`(count, h, w, 3)` decoded pixels that no network finds easy, as zeros may be; the same each time."""
    shape = (count, *preprocess.size, 3)
    random = np.random.default_rng(0)
    cells: NDArray[Any] = random.integers(0, 256, shape, np.uint8)
    if preprocess.processor:
        from bbx.processor import cell_dtype

        if cell_dtype(preprocess) != np.uint8:
            cells = random.random(shape, np.float32)
    return torch.from_numpy(cells).pin_memory().numpy() if pinned else cells


def _resident_nbytes() -> int:
    """The memory of this process, as far as the system tells."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
