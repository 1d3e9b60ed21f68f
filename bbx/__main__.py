"""The `bbx` command, also `python -m bbx`."""

from __future__ import annotations

import gc
import os
import signal
from typing import NoReturn


def run() -> NoReturn:
    """Runs the command; exits with its code."""
    gc.disable()  # until the command has loaded what it needs: see `bbx.cli.app.loading`
    # Until there is somebody to tell of a Ctrl-C, and something to save, it just ends the process.
    before = signal.getsignal(signal.SIGINT)
    if before == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _open_streams()
    from bbx.cli import run as command

    signal.signal(signal.SIGINT, before)
    command()


def _open_streams() -> None:
    """Has 0, 1 and 2 be what they are taken for, also where the caller closed them: else they would be files of ours.

    What a library prints on its errors would then be written into a feature file.
    """
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(opened, True)
    os.close(opened)


if __name__ == "__main__":
    run()
