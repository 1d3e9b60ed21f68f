"""SIGINT and SIGTERM: the first ends the loop with what is begun computed and committed; a second one ends at once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType


class Signalled(BaseException):
    """A signal's way out to `main`: no exception, so that nothing between takes it for a bad image or file."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@contextmanager
def signals() -> Iterator[Callable[[], int | None]]:
    """Gives the function that the loop asks after each batch; SIGINT and SIGTERM then end it with all work committed.

    A signal before the loop runs, or a second one, ends at once: that is safe too, only the last batches are lost.
    """
    seen: list[int] = []
    asked = False

    def stop() -> int | None:
        nonlocal asked
        asked = True
        return seen[0] if seen else None

    def handle(signum: int, _frame: FrameType | None) -> None:
        # Noted first: Python swallows an exception that is raised while a finaliser runs.
        at_once = bool(seen) or not asked
        seen.append(signum)
        if at_once:
            raise Signalled(signum)

    # One that is ignored stays so: nohup, and a shell that puts a job into the background, mean it.
    heard = [signum for signum in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(signum) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, handle) for signum in heard}
    told, sys.unraisablehook = sys.unraisablehook, _swallowed
    try:
        yield stop
    except BaseException:
        # What happened is about to be told: a further Ctrl-C must not turn that into a trace.
        before = dict.fromkeys(heard, signal.SIG_IGN)
        raise
    finally:
        sys.unraisablehook = told
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _swallowed(unraisable: sys.UnraisableHookArgs) -> None:
    """A signal that Python swallowed inside a finaliser was noted, and is obeyed after the batch: no trace of it."""
    if not isinstance(unraisable.exc_value, Signalled):
        sys.__unraisablehook__(unraisable)
