"""One decoding process and the pipes to it; `worker` is the other end.

It takes a third of a second to start, and does so unasked: what it is to decode, and how, it is told when it is taken.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from numpy.typing import NDArray

from bbx.errors import StartError
from bbx.spec import InputFile

# The very modules that this process sees, wherever they come from; -P: nothing from the current folder besides.
_COMMAND = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from bbx.images.worker import main; main()"
# Its pipes close before a process that crashes has ended: time to learn of what.
_LAST_WORDS = 2.0
# What a start may take, on a busy network disk.
_START_SECONDS = 300.0
# Processes, open files, memory: what fewer processes need less of.
_NO_ROOM = (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# Started ahead at most: enough for the first batches, and little to throw away where there is nothing to decode.
_MOST_AHEAD = 8

_ahead: list[Process] = []
_taking = threading.Lock()


@contextmanager
def started_ahead(count: int) -> Iterator[None]:
    """Has up to `count` processes start while the caller loads what it needs; those that nobody took end with it."""
    try:
        for _ in range(min(count, _MOST_AHEAD)):
            try:
                process = Process()
            except StartError:  # whoever needs one will say so
                break
            with _taking:
                _ahead.append(process)
        yield
    finally:
        with _taking:
            left = _ahead.copy()
            _ahead.clear()
        for process in left:
            process.kill()
        for process in left:
            process.reap()


class Answer(NamedTuple):
    """What came of one image: the reason why it has no pixels, if any, its file, and the seconds that it took."""

    reason: str
    file: InputFile
    seconds: float


class Process:
    """One decoding process and the pipes to it."""

    def __init__(self) -> None:
        self.overdue = False
        self._ready = False
        self._busy = False
        self._seconds = 0.0
        self._clock = threading.Lock()
        if not sys.executable:  # Python is a part of another program
            raise StartError("no decoding process can be started: sys.executable says nothing", "set it to a python3")
        # What is no text there, Python passes over, too.
        places = [place for place in sys.path if isinstance(place, str)]
        command = [sys.executable, "-P", "-c", _COMMAND, json.dumps(places)]
        # Had it none, its answers would go where its errors are to go.
        errors = None if _is_inherited(2) else subprocess.DEVNULL
        # One decoder is one thread, in torch too, where a transformers processor needs it.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # A new process has this thread's signal mask: a Ctrl-C that meets it before it can ignore it does no harm.
        blocked = hasattr(signal, "pthread_sigmask")
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM)) if blocked else set()
        try:
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, bufsize=1 << 16
            )
        except OSError as error:
            hint = "try fewer --workers" if error.errno in _NO_ROOM else f"is {sys.executable} a Python that runs?"
            raise StartError(f"no decoding process can be started: {error.strerror}", hint) from error
        finally:
            if blocked:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    @staticmethod
    def taken() -> Process:
        """One that was started ahead, else a new one. Raises `StartError`."""
        with _taking:
            if _ahead:
                return _ahead.pop()
        return Process()

    def greet(self, settings: dict[str, Any]) -> None:
        """Waits until it can decode as `settings` say. Raises `StartError`: no image is to blame."""
        try:
            self._begin()
            ready = self._ask(settings)
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


def _is_inherited(descriptor: int) -> bool:
    try:
        return os.get_inheritable(descriptor)
    except OSError:  # it is closed
        return False


def _close(pipe: Any) -> None:
    try:
        pipe.close()
    except OSError:  # What was buffered for a dead process goes nowhere, and that is right.
        return
