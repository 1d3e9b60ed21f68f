"""Read feature files in a child process: HDF5 itself can crash on a damaged one, and that must be an error, too."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from bbx.errors import FileError

READING = ("info", "show", "verify", "diff", "export")
"""The commands that open files which anybody may have made. Extraction and merging are not among them: a second process
of theirs could outlive the one that holds the lock."""

_CRASHES = {
    getattr(signal, name) for name in ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL") if hasattr(signal, name)
}


def shielded(main: Callable[[], NoReturn]) -> None:
    """Runs `main`, which exits, in a child, and exits as it did. Raises `FileError` where it crashed."""
    pid = os.fork()
    if pid == 0:
        main()

    def pass_on(signum: int, _frame: FrameType | None) -> None:
        os.kill(pid, signum)

    # A terminal's Ctrl-C reaches the child by itself; a SIGTERM to this process alone does not.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, pass_on)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if -code in _CRASHES:
        name = signal.Signals(-code).name
        words = " ".join(sys.argv[1:])
        raise FileError(f"HDF5 crashed on it ({name}): bbx {words}", "the file is damaged: take another copy of it")
    sys.exit(128 - code if code < 0 else code)
