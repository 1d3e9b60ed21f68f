"""Keep the memory of one batch for the next: on a CPU, glibc's habit of giving it back costs as much as a layer.

A batch's activations are tens of megabytes each. glibc maps such pieces anew and returns them when they are freed, so
that the kernel clears every page of every layer of every batch again: at 32 images that doubles the CPU time of
swin-tiny (133 ms an image against 63). `mallopt(3)` is glibc's own switch for it.

What is kept must fit again. torch has every piece begin at a multiple of 64 bytes, which leaves a crack of up to 96 at
either end; glibc puts small pieces there, and the large one, once free, is too short for the next of its size. With two
streams the heap was half cracked pieces (swin-tiny, 800 images: 1,310 MB of memory, 1,180 with small pieces set aside).
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# <malloc.h>
_M_MXFAST, _M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = 1, -1, -3, -8
# The largest piece that is not mapped by itself. Older releases (2.31's is one) refuse more than the second.
_LARGEST = (1 << 30, 32 << 20)
# One arena: those of threads are cut into pieces of 64 MB, and pieces that fall empty are returned all the same.
# And no small free piece apart from the rest: a crack is part of its neighbour again as soon as that is free.
_KEEPING = {_M_ARENA_MAX: 1, _M_TRIM_THRESHOLD: (1 << 31) - 1, _M_MXFAST: 0}
# What glibc comes to by itself as large pieces are freed, and as many arenas as it would have made (a limit that it
# looks at once: a process in which threads were started meanwhile stays with one).
_USUAL = {
    _M_ARENA_MAX: 8 * (os.cpu_count() or 1), _M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 64 << 20, _M_MXFAST: 128,
}  # fmt: skip
# Sizes that fit into a crack, and how many of each are set aside: 2 MB in all, in some 30 ms.
_SMALL, _SPARE = range(24, 121, 16), 3_000
# A user who has set one of these knows better.
_TUNED = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")

_jobs = 0
_between: list[Any] = []
_counting = threading.Lock()


@contextmanager
def kept_memory() -> Iterator[None]:
    """Has freed memory stay with the process for the time of a job; afterwards what is free goes back to the system.

    It has to begin before the threads that allocate are started, and does nothing without glibc, or where the
    environment tunes it. Of jobs within a job, or beside it, the last to end gives back.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    global _jobs, _between
    with _counting:
        _jobs += 1
        if _jobs == 1 and keep(libc):
            _between = set_aside(libc)
    try:
        yield
    finally:
        with _counting:
            _jobs -= 1
            if not _jobs:
                for piece in _between:
                    libc.free(piece)
                _between = []
                for option, value in _USUAL.items():
                    libc.mallopt(option, value)
                libc.malloc_trim(0)


def keep(libc: Any) -> bool:
    """Sets what keeps memory. All or nothing: any of them ends glibc's own search for a good threshold."""
    if not any(libc.mallopt(_M_MMAP_THRESHOLD, largest) for largest in _LARGEST):
        return False
    for option, value in _KEEPING.items():
        libc.mallopt(option, value)
    return True


def set_aside(libc: Any) -> list[Any]:
    """Has glibc find free small pieces elsewhere than in cracks; what lies between them, lest they become one."""
    libc.malloc.restype = ctypes.c_void_p
    pairs = [(libc.malloc(size), libc.malloc(_SMALL[0])) for size in _SMALL for _ in range(_SPARE)]
    for piece, _ in pairs:
        libc.free(ctypes.c_void_p(piece))
    return [ctypes.c_void_p(between) for _, between in pairs]


def _glibc() -> ctypes.CDLL | None:
    tuned = any(name in os.environ for name in _TUNED) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
