"""Threads read the files, one thread has the device decode those that wait, and worker processes take what it cannot.

The pixels come back to the host, 150 kB per image, so that the rest of the pipeline is what it always is. They are near
`exact`'s, not equal: nvJPEG rounds its inverse DCT and enlarges the chroma in its own way (torchvision's own tests
allow it a mean of 2 steps of 255), and torchvision's antialiased resize rounds once where Pillow does twice. Unlike a
worker, nvJPEG is no process of its own: a picture that crashed it would end the run, and no --image-timeout reaches it.
So only plain JPEGs go there (`bbx.images.jpeg`); another, or one that it refuses or leaves undone, is decoded exactly.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bbx.errors import BbxError
from bbx.gpu_decode.canary import check_marked, mark, untouched
from bbx.gpu_decode.cells import empty_cells, fill_cells
from bbx.gpu_decode.device import decode_jpegs
from bbx.gpu_decode.jobs import BATCH, Job, batches, look
from bbx.images import Decoders, DecodeSettings
from bbx.images.process import Answer

_READERS = 8
# Why a picture is left to a worker; torchvision's errors do not tell the second's two reasons apart.
_KIND, _UNDONE = "other than plain baseline JPEG", "left undone by the GPU's decoder"
_REFUSED = "refused by the GPU's decoder, or for want of its memory"
_TICK = 0.25
# What a batch may take to end once all is to end: a device that hangs is not waited for.
_PATIENCE = 10.0

DecodeJpegs = Callable[[list[Tensor], torch.device], list[Tensor]]


class _Decoded(NamedTuple):
    """Of a batch: `(b, h, w, 3)` on the host, and which of them the device left undone."""

    pixels: NDArray[np.uint8]
    undone: list[bool]


class DeviceDecoders(Decoders):
    """As `Decoders`, of which there are `count`; `decode` is what `device` decodes by."""

    def __init__(
        self, count: int, settings: DecodeSettings, device: torch.device, *, decode: DecodeJpegs = decode_jpegs
    ) -> None:
        super().__init__(count, settings)
        self._device, self._decode_jpegs = device, decode
        # torchvision's decoder writes to memory that kernels on the caller's stream may still read, for it waits for
        # none of them (pytorch/vision#9606). A stream of its own, idle between batches, has memory of its own.
        self._stream: torch.cuda.Stream | None = None
        self._files: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        # Bounded: what waits stays on the disk.
        self._waiting: queue.Queue[Job] = queue.Queue(BATCH)
        self._batch: Sequence[Job] = ()
        self._left_over: Counter[str] = Counter()
        self._counting = threading.Lock()
        # Daemons: a program ends although one of them hangs in a driver, or on a disk.
        self._own_threads: list[threading.Thread] = []
        try:
            if device.type == "cuda":
                self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for name, work in [*[("bbx-read", self._read_files)] * min(count, _READERS), ("bbx-gpu", self._serve)]:
                thread = threading.Thread(target=work, name=name, daemon=True)
                thread.start()
                self._own_threads.append(thread)
        except BaseException:
            self.close()
            raise

    def submit(self, path: str, slot: NDArray[Any]) -> Future[Answer]:
        """Decodes `path` into `slot`, `(h, w, 3)`; a slot without an image is all zero."""
        if self._closing.is_set():
            raise _closed()
        job = Job(path, slot, Future())
        self._files.put(job)
        return job.answer

    def close(self) -> None:
        """Ends all threads and processes; an image that still waits is cancelled, or fails."""
        self._closing.set()
        try:
            for job in _emptied(self._files):
                job.answer.cancel()
            for _ in self._own_threads:
                self._files.put(None)
            last = time.monotonic() + _PATIENCE
            for thread in self._own_threads:
                thread.join(max(0.0, last - time.monotonic()))
            for job in (*self._batch, *_emptied(self._waiting)):  # Nobody else will.
                job.end(_closed())
        finally:
            super().close()

    @property
    def notes(self) -> tuple[str, ...]:
        """How many images the processes decoded, and why."""
        with self._counting:
            found = dict(self._left_over)
        why = ", ".join(f"{count} {'image' if count == 1 else 'images'} {reason}" for reason, count in found.items())
        return (f"--decode gpu left to the CPU, which decodes exactly: {why}",) if found else ()

    def _read_files(self) -> None:
        while job := self._files.get():
            try:
                self._read(job)
            except (
                BaseException
            ) as error:  # Whoever waits for the answer hears of it: a thread that ends does not tell.
                job.end(error)

    def _read(self, job: Job) -> None:
        if not job.answer.set_running_or_notify_cancel():
            return
        started = time.perf_counter()
        try:
            suits = look(job, self._settings)
        except Exception:  # Whatever it is, the worker meets it too, and has words for it.
            suits = False
        job.seconds = time.perf_counter() - started
        if not (suits and self._queued(job)):
            self._hand_over(job, _KIND)

    def _queued(self, job: Job) -> bool:
        """Waits for room among those that wait; False where all is to end."""
        while not self._closing.is_set():
            with contextlib.suppress(queue.Full):
                self._waiting.put(job, timeout=_TICK)
                return True
        return False

    def _serve(self) -> None:
        while not self._closing.is_set():
            for batch in batches(self._next(), self._settings.preprocess.size):
                self._batch = batch
                try:
                    with torch.cuda.stream(self._stream):  # None: of no effect
                        self._decode_batch(batch)
                except BaseException as error:  # As in `_read_files`.
                    for job in batch:
                        job.end(error)
                self._batch = ()

    def _next(self) -> list[Job]:
        """Those that wait, up to a batch of them; none after a while."""
        found: list[Job] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._waiting.get(timeout=_TICK))
            while len(found) < BATCH:
                found.append(self._waiting.get_nowait())
        return found

    def _decode_batch(self, jobs: Sequence[Job]) -> None:
        """All at once, then with all memory that is free, then one by one: an error does not say which is meant."""
        started = time.perf_counter()
        for _ in range(min(len(jobs), 2)):
            if decoded := self._tried(jobs):
                self._answer(jobs, decoded, (time.perf_counter() - started) / len(jobs))
                return
            self._settle()
        for job in jobs:
            if len(jobs) > 1:
                self._decode_batch([job])
            else:
                self._hand_over(job, _REFUSED)

    def _tried(self, jobs: Sequence[Job]) -> _Decoded | None:
        if self._closing.is_set():
            return None
        try:
            return self._decoded(jobs)
        except Exception:  # Out of memory, refused, moved: all RuntimeErrors. It leaves, for it holds the tensors.
            return None

    def _settle(self) -> None:
        """Waits until a decoder that raised has ended what it began; then nobody keeps memory that it may want."""
        if self._device.type == "cuda" and not self._closing.is_set():
            with contextlib.suppress(RuntimeError):  # of a lost device: then every batch raises, and none is believed
                torch.cuda.synchronize(self._device)
                torch.cuda.empty_cache()

    def _decoded(self, jobs: Sequence[Job]) -> _Decoded:
        jpegs = [torch.frombuffer(job.jpeg.getbuffer(), dtype=torch.uint8) for job in jobs if job.jpeg]
        shapes = [(3, *job.size[::-1]) for job in jobs]
        cells = empty_cells(len(jobs), self._settings.preprocess, self._device)
        marked = mark(shapes, self._device)
        pictures = self._decode_jpegs(jpegs, self._device)
        if [tuple(picture.shape) for picture in pictures] != shapes:
            raise ValueError("decoded to other sizes")
        check_marked(pictures, marked)
        undone = untouched(pictures)
        fill_cells(cells, pictures, [job.turn for job in jobs], self._settings.preprocess)
        return _Decoded(cells.permute(0, 2, 3, 1).contiguous().cpu().numpy(), undone)

    def _answer(self, jobs: Sequence[Job], decoded: _Decoded, seconds: float) -> None:
        for job, cells, undone in zip(jobs, decoded.pixels, decoded.undone, strict=True):
            if undone:
                self._hand_over(job, _UNDONE)
            else:
                job.slot[...] = cells
                job.end(Answer("", job.file, job.seconds + seconds))

    def _hand_over(self, job: Job, why: str) -> None:
        """Has a process decode it, or where they are closed fails it."""
        job.jpeg = None
        if self._closing.is_set():
            job.end(_closed())
            return
        try:
            working = super().submit(job.path, job.slot)
        except BaseException as error:  # no thread more, or closed meanwhile
            job.end(error)
            return
        with self._counting:
            self._left_over[why] += 1
        working.add_done_callback(lambda done: job.end(_outcome(done)))


def _emptied(jobs: queue.SimpleQueue[Job | None] | queue.Queue[Job]) -> Iterator[Job]:
    with contextlib.suppress(queue.Empty):
        while True:
            if job := jobs.get_nowait():
                yield job


def _outcome(done: Future[Answer]) -> Answer | BaseException:
    return _closed() if done.cancelled() else done.exception() or done.result()


def _closed() -> BbxError:
    return BbxError("the decoders were closed")
