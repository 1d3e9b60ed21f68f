"""Read feature files in a child process: HDF5 itself can crash on a damaged one, and that must be an error, too.

The child loads HDF5 and opens the files while this process reads the command line, which takes Typer as long.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from bbx.errors import FileError, InterruptedRunError, StartError

READING = ("info", "show", "verify", "diff", "export")
"""The commands that open files which anybody may have made. Extraction and merging are not among them: a second process
of theirs could outlive the one that holds the lock."""

_HELP = {"-h", "--help"}
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_OPEN_SECONDS = 10
_HEAR_SECONDS = 1.0
"""A child that clears up after a Ctrl-C is not to be told of it twice: one to this process alone waits as long."""
_HINT = "the file is damaged: take another copy of it"
_CRASHES = {
    getattr(signal, name) for name in ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL") if hasattr(signal, name)
}


def can_shield(words: list[str]) -> bool:
    """Whether the command line `words` is one that reads files, on a system that has children of this kind."""
    return words[:1] != [] and words[0] in READING and hasattr(os, "fork") and not _HELP & set(words)


def shielded(command: Callable[..., None], ending: Callable[[Callable[[], object]], NoReturn]) -> Callable[..., None]:
    """The same `command`, to be called once, for a child to carry out, which starts here and now.

    A Ctrl-C of a terminal reaches both. Until the call the child dies of it and the parent tells it; from then on the
    child tells it, and the parent waits, or passes on what reached it alone.

    In the child, `ending` calls it and exits, whatever comes of it; the call here exits as the child did, or raises
    `FileError` where that crashed. A child that is not called, for the command line was wrong, goes by itself.
    """
    parent, mask = os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        receiving, sending = os.pipe()
        heard, tell = os.pipe()
        pid = os.fork()
    except OSError as error:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        hint = "end what else runs, or raise the limit on processes (ulimit -u) or on open files (ulimit -n)"
        raise StartError(f"no process can be started to read the file in: {error.strerror}", hint) from error
    if pid == 0:
        os.close(sending)
        os.close(heard)
        os.set_blocking(tell, False)
        _end_with(parent)
        handler = signal.getsignal(signal.SIGINT)
        if handler != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent tells of a Ctrl-C until it has called
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        with suppress(Exception):  # whatever it is comes again when it is called
            # Whichever words are names of feature files, an option's too: the command line is still to be read.
            _try_to_open([Path(word) for word in sys.argv[2:] if not word.startswith("-")])
        with os.fdopen(receiving, "rb") as pipe:
            words = pipe.read()
        if not words:
            os._exit(0)
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)  # so the parent knows which signals reached it
        signal.signal(signal.SIGINT, handler)
        ending(lambda: command(**json.loads(words)))
    os.close(receiving)
    os.close(tell)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    @functools.wraps(command)  # which Typer takes the options from
    def call(**words: Any) -> None:
        _let_pass(pid, mask, heard)
        with suppress(BrokenPipeError), os.fdopen(sending, "wb") as pipe:  # broken: it crashed as it opened a file
            pipe.write(json.dumps(words).encode())
        _end_as(pid)

    return call


def _let_pass(pid: int, mask: set[Any], heard: int) -> None:
    """Leaves signals to the child: a terminal's Ctrl-C reaches it by itself, one to this process alone does not."""

    def pass_on(signum: int, _frame: FrameType | None) -> None:
        with suppress(OSError):  # it has just ended
            if signum == signal.SIGINT and _has_heard(heard):
                return
            os.kill(pid, signum)

    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, pass_on)
    signal.signal(signal.SIGTERM, pass_on)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _has_heard(pipe: int) -> bool:
    """Whether the child hears of a Ctrl-C, too, in a moment, or is gone: its signals' numbers come through `pipe`."""
    until = time.monotonic() + _HEAR_SECONDS
    while select.select([pipe], [], [], max(until - time.monotonic(), 0))[0]:
        numbers = os.read(pipe, 64)
        if not numbers or signal.SIGINT in numbers:
            return True
    return False


def _end_as(pid: int) -> NoReturn:
    """Exits as the child does. Raises `FileError` where HDF5 crashes it, `InterruptedRunError` for an early Ctrl-C."""
    _, status, used = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_IGN)  # there is nobody left to end
    if -code == signal.SIGINT:
        raise InterruptedRunError("stopped by SIGINT", "the same command starts again")
    if -code == signal.SIGXCPU:
        _check_limit(used.ru_utime + used.ru_stime)
        raise FileError(f"HDF5 does not come to an end with it: {_command()}", _HINT)
    if -code in _CRASHES:
        raise FileError(f"HDF5 crashed on it ({signal.Signals(-code).name}): {_command()}", _HINT)
    sys.exit(128 - code if code < 0 else code)


def _check_limit(seconds: float) -> None:
    """Raises `StartError` where the user's own limit on computing time ended a process that took `seconds` of it."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_CPU)
    if 0 <= soft <= round(seconds):
        raise StartError(f"the limit on computing time, {soft} s, is reached: {_command()}", "raise it (ulimit -t)")


def _end_with(parent: int) -> None:
    """On Linux: a parent that is killed takes this process with it."""
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _try_to_open(files: list[Path]) -> None:
    """Opens each feature file among `files`, and has the system end this process if that takes too long.

    HDF5 circles over some for ever, in which it hears no signal of Python's. Opening alone has a limit of computing
    time; what comes after may take as long as it takes.
    """
    import resource

    from bbx.store import open_finished_or_partial
    from bbx.store.target import partial_path

    for file in files:
        if not (_is_hdf5(file) or (file.name and _is_hdf5(partial_path(file)))):
            continue
        soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
        most = int(time.process_time()) + 1 + _OPEN_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (most if soft < 0 else min(most, soft), hard))
        with suppress(Exception):  # an error comes again where it is told
            open_finished_or_partial(file).close()
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _is_hdf5(path: Path) -> bool:
    try:
        if not path.is_file():  # a pipe would be waited for
            return False
        with path.open("rb") as file:
            return file.read(8) == b"\x89HDF\r\n\x1a\n"
    except (OSError, ValueError):
        return False


def _command() -> str:
    return " ".join(["bbx", *sys.argv[1:]])
