"""Decode in processes of their own, so that an image which crashes its decoder, or never ends, costs one row.

A thread feeds each process and reads the pixels back into the batch's buffer. Plain pipes: shared memory would save a
copy of a tenth of a millisecond, and be left behind by a kill.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bbx.errors import BbxError
from bbx.images.process import Answer, Process
from bbx.images.read import MAX_PIXELS
from bbx.spec import InputFile, Preprocess

TIMEOUT = 60.0
"""Seconds that one image may take."""

_TICK = 0.25


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """How images are decoded; `timeout` in seconds per image, `max_pixels` the largest picture, `digest` of content."""

    preprocess: Preprocess
    timeout: float = TIMEOUT
    max_pixels: int = MAX_PIXELS
    digest: bool = True


class Decoders:
    """`count` processes that decode, as a context manager; `submit` hands an image to whichever is free."""

    def __init__(self, count: int, settings: DecodeSettings) -> None:
        self._settings = settings
        self._threads = ThreadPoolExecutor(count, "bbx-decode")
        self._own = threading.local()
        self._processes: list[Process] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._watch = threading.Thread(target=self._watchdog, name="bbx-watchdog", daemon=True)
        self._watch.start()

    def submit(self, path: str, slot: NDArray[Any]) -> Future[Answer]:
        """Decodes `path` into `slot`, `(h, w, 3)`; a slot without an image is all zero."""
        return self._threads.submit(self._decode, path, slot)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how the images were decoded."""
        return ()

    def close(self) -> None:
        """Ends all processes, whatever they are at."""
        self._closing.set()
        with self._lock:
            for process in self._processes:
                process.kill()
        self._threads.shutdown(cancel_futures=True)
        self._watch.join()
        for process in self._processes:
            process.reap()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _decode(self, path: str, slot: NDArray[Any]) -> Answer:
        started = time.perf_counter()
        died = ""
        for _ in range(2):  # A decoder that crashed may have been the victim of its neighbours' memory: once more.
            process = self._process()
            answer = process.decode(path, slot)
            if answer is not None:
                return answer
            slot[...] = 0
            self._own.process = None
            if self._closing.is_set():
                raise BbxError("the decoders were closed")
            died = process.epitaph(self._settings.timeout)
            if process.overdue:
                break
        return Answer(died, _facts(path), time.perf_counter() - started)

    def _process(self) -> Process:
        process: Process | None = getattr(self._own, "process", None)
        if process is None or process.overdue:
            process = Process.taken()
            with self._lock:
                self._processes = [one for one in self._processes if one.alive()] + [process]
            if self._closing.is_set():
                process.kill()
            process.greet(asdict(self._settings))
            self._own.process = process
        return process

    def _watchdog(self) -> None:
        """Kills what takes too long. Seconds are counted in small steps: a process that was stopped has not worked."""
        last = time.monotonic()
        while not self._closing.wait(_TICK):
            now = time.monotonic()
            step, last = min(now - last, 2 * _TICK), now
            with self._lock:
                for process in self._processes:
                    process.tick(step, self._settings.timeout)


def decode_one(path: str | os.PathLike[str], preprocess: Preprocess) -> NDArray[Any] | str:
    """One image in a process of its own, `(h, w, 3)` in the preprocessing's cells; or the reason why it has none."""
    cells = np.zeros((*preprocess.size, 3), cell_dtype(preprocess))
    with Decoders(1, DecodeSettings(preprocess, digest=False)) as decoders:
        answer = decoders.submit(os.fspath(path), cells).result()
    return answer.reason or cells


def cell_dtype(preprocess: Preprocess) -> np.dtype[Any]:
    """Of decoded pixels: uint8, but for some of transformers' image processors."""
    if not preprocess.processor:
        return np.dtype(np.uint8)
    from bbx.processor import cell_dtype as of_processor

    return of_processor(preprocess)


def _facts(path: str) -> InputFile:
    """Size and mtime of a file whose decoder did not live to tell."""
    try:
        found = Path(path).stat()
    except OSError:
        return InputFile()
    return InputFile.of(found.st_size, found.st_mtime_ns)
