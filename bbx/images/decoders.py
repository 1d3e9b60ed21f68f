"""Decode in processes of their own, so that an image which crashes its decoder, or never ends, costs one row.

A thread feeds each process and reads the pixels back into the batch's buffer. Plain pipes: shared memory would save a
copy of a tenth of a millisecond, and be left behind by a kill.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from bbx.errors import BbxError, StartError
from bbx.images.read import MAX_PIXELS
from bbx.spec import InputFile, Preprocess

TIMEOUT = 60.0
"""Seconds that one image may take."""

# The very modules that this process sees, wherever they come from; -P: nothing from the current folder besides.
_COMMAND = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from bbx.images.worker import main; main()"
_TICK = 0.25
# Its pipes close before a process that crashes has ended: time to learn of what.
_LAST_WORDS = 2.0
# What a start may take, on a busy network disk.
_START_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """How images are decoded; `timeout` in seconds per image, `max_pixels` the largest picture, `digest` of content."""

    preprocess: Preprocess
    timeout: float = TIMEOUT
    max_pixels: int = MAX_PIXELS
    digest: bool = True


class Answer(NamedTuple):
    """What came of one image: the reason why it has no pixels, if any, its file, and the seconds that it took."""

    reason: str
    file: InputFile
    seconds: float


class Decoders:
    """`count` processes that decode, as a context manager; `submit` hands an image to whichever is free."""

    def __init__(self, count: int, settings: DecodeSettings) -> None:
        self._settings = settings
        self._threads = ThreadPoolExecutor(count, "bbx-decode")
        self._own = threading.local()
        self._processes: list[_Process] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._watch = threading.Thread(target=self._watchdog, name="bbx-watchdog", daemon=True)
        self._watch.start()

    def submit(self, path: str, slot: NDArray[Any]) -> Future[Answer]:
        """Decodes `path` into `slot`, `(h, w, 3)`; a slot without an image is all zero."""
        return self._threads.submit(self._decode, path, slot)

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

    def _process(self) -> _Process:
        process: _Process | None = getattr(self._own, "process", None)
        if process is None or process.overdue:
            process = _Process()
            with self._lock:
                self._processes = [one for one in self._processes if one.alive()] + [process]
            if self._closing.is_set():
                process.kill()
            process.greet(self._settings)
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


class _Process:
    """One decoding process and the pipes to it."""

    def __init__(self) -> None:
        self.overdue = False
        self._ready = False
        self._busy = False
        self._seconds = 0.0
        self._clock = threading.Lock()
        command = [sys.executable, "-P", "-c", _COMMAND, json.dumps(sys.path)]
        # One decoder is one thread, in torch too, where a transformers processor needs it.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # A new process has this thread's signal mask: a Ctrl-C that meets it before it can ignore it does no harm.
        blocked = hasattr(signal, "pthread_sigmask")
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM)) if blocked else set()
        try:
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=1 << 16
            )
        except OSError as error:
            raise StartError(f"no decoding process can be started: {error.strerror}", "try fewer --workers") from error
        finally:
            if blocked:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def greet(self, settings: DecodeSettings) -> None:
        """Waits until it can decode. Raises `StartError`: no image is to blame."""
        facts = {
            "preprocess": asdict(settings.preprocess),
            "max_pixels": settings.max_pixels,
            "digest": settings.digest,
        }
        try:
            self._begin()
            ready = self._ask(facts)
        except (OSError, ValueError):
            ready = None
        finally:
            self._end()
        if ready is None:
            self.kill()
            hint = "its own words stand above; is bbx installed where this Python finds it?"
            raise StartError(f"a decoding process ended at once ({self.epitaph(_START_SECONDS)})", hint)
        self._ready = True

    def decode(self, path: str, slot: NDArray[Any]) -> Answer | None:
        """The answer, with the pixels in `slot`; None where the process died of it."""
        try:
            self._begin()
            head = self._ask(path)
            if head is None:
                return None
            nbytes, mtime_ns, digest = head["file"]
            if not head["reason"] and not self._fill(slot):
                return None
            return Answer(head["reason"], InputFile(nbytes, mtime_ns, bytes.fromhex(digest)), head["seconds"])
        except (OSError, ValueError, KeyError, TypeError):  # A pipe that broke, a line that was cut off.
            return None
        finally:
            self._end()

    def tick(self, seconds: float, limit: float) -> None:
        """`seconds` have passed; beyond `limit` with one image it is killed."""
        with self._clock:
            self._seconds += seconds
            if self._busy and self._seconds > (limit if self._ready else _START_SECONDS):
                self.overdue = True
                self.kill()

    def _begin(self) -> None:
        with self._clock:
            self._busy, self._seconds = True, 0.0

    def _end(self) -> None:
        with self._clock:
            self._busy = False

    def kill(self) -> None:
        """Ends it."""
        self._child.kill()

    def reap(self, patience: float = 0.0) -> int:
        """Waits `patience` seconds for its own end, then makes one; its exit code."""
        try:
            code = self._child.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe:
                _close(pipe)
        return code

    def alive(self) -> bool:
        """Whether it still runs."""
        return self._child.poll() is None

    def epitaph(self, limit: float) -> str:
        """Why it died."""
        code = self.reap(patience=0.0 if self.overdue else _LAST_WORDS)
        if self.overdue:
            return f"took longer than {limit:g} s to decode (--image-timeout)"
        if code == -signal.SIGKILL:
            return "the decoder was killed (SIGKILL; is the memory full?)"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
        return f"the decoder crashed ({name})"

    def _ask(self, request: object) -> dict[str, Any] | None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(request).encode() + b"\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        answer = json.loads(line) if line.endswith(b"\n") else None
        return answer if isinstance(answer, dict) else None

    def _fill(self, slot: NDArray[Any]) -> bool:
        assert self._child.stdout is not None
        rest = memoryview(slot.data).cast("B")
        while rest:
            count = self._child.stdout.readinto(rest)  # type: ignore[attr-defined]  # typeshed: IO has none
            if not count:
                return False
            rest = rest[count:]
        return True


def _close(pipe: Any) -> None:
    try:
        pipe.close()
    except OSError:  # What was buffered for a dead process goes nowhere, and that is right.
        return


def _facts(path: str) -> InputFile:
    """Size and mtime of a file whose decoder did not live to tell."""
    try:
        found = Path(path).stat()
    except OSError:
        return InputFile()
    return InputFile.of(found.st_size, found.st_mtime_ns)
