"""torch's switches that are the whole process's: how many threads compute, which algorithms may be chosen.

A run sets them for a time. Runs may overlap, in threads of one program: the first to come remembers what was, and the
last to go puts it back.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

_COMPILED = "TORCHINDUCTOR_CACHE_DIR"
_lock = threading.Lock()


class _Algorithms(NamedTuple):
    deterministic: bool
    warn_only: bool
    benchmark: bool


_SAME_BITS = _Algorithms(deterministic=True, warn_only=False, benchmark=False)
_usual_threads, _with_threads = 0, 0
_usual_algorithms, _with_algorithms = _SAME_BITS, 0


def usual_threads() -> int:
    """How many threads the process has torch compute with, whatever those of bbx were told meanwhile."""
    with _lock:
        return _usual_threads if _with_threads else torch.get_num_threads()


@contextmanager
def own_threads() -> Iterator[None]:
    """Threads that are started while this lasts may set numbers of their own, which torch takes as that of any to come.

    Each run puts the usual one back for its own thread, and so the last does for all.
    """
    global _usual_threads, _with_threads
    with _lock:
        _usual_threads = _usual_threads if _with_threads else torch.get_num_threads()
        _with_threads += 1
    try:
        yield
    finally:
        with _lock:
            _with_threads -= 1
            torch.set_num_threads(_usual_threads)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Has torch choose only algorithms that give the same bits each time."""
    global _usual_algorithms, _with_algorithms
    if not wanted:
        yield
        return
    with _lock:
        if not _with_algorithms:
            _usual_algorithms = _Algorithms(
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
                torch.backends.cudnn.benchmark,
            )
            _choose(_SAME_BITS)
        _with_algorithms += 1
    try:
        yield
    finally:
        with _lock:
            _with_algorithms -= 1
            if not _with_algorithms:
                _choose(_usual_algorithms)


def _choose(wanted: _Algorithms) -> None:
    folder = os.environ.get(_COMPILED)
    torch.use_deterministic_algorithms(wanted.deterministic, warn_only=wanted.warn_only)
    torch.backends.cudnn.benchmark = wanted.benchmark
    if folder is None:  # torch has told its compiler, which then names a folder in /tmp for all that comes
        os.environ.pop(_COMPILED, None)
