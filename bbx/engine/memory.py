"""Keep the memory of one batch for the next: on a CPU, glibc's habit of giving it back costs as much as a layer.

A batch's activations are tens of megabytes each. glibc maps such pieces anew and returns them when they are freed, so
that the kernel clears every page of every layer of every batch again: at 32 images that doubles the CPU time of
swin-tiny (133 ms an image against 63). `mallopt(3)` is glibc's own switch for it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# One arena: those of threads are cut into pieces of 64 MB, and pieces that fall empty are returned all the same.
_KEEPING = {_M_ARENA_MAX: 1, _M_MMAP_THRESHOLD: 1 << 30, _M_TRIM_THRESHOLD: (1 << 31) - 1}
# What glibc comes to by itself as large pieces are freed, and as many arenas as it would have made.
_USUAL = {_M_ARENA_MAX: 8 * (os.cpu_count() or 1), _M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 64 << 20}

_jobs = 0
_counting = threading.Lock()


@contextmanager
def kept_memory() -> Iterator[None]:
    """Has freed memory stay with the process for the time of a job; afterwards what is free goes back to the system.

    It has to begin before the threads that allocate are started, and does nothing without glibc. Of jobs within a job,
    or beside it, the last to end gives back.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    _set(libc, _KEEPING, change=1)
    try:
        yield
    finally:
        if _set(libc, _USUAL, change=-1):
            libc.malloc_trim(0)


def _set(libc: ctypes.CDLL, options: dict[int, int], *, change: int) -> bool:
    """Has the allocator follow the first job to begin and the last to end; whether this is one of them."""
    global _jobs
    with _counting:
        before, _jobs = _jobs, _jobs + change
        if before and _jobs:
            return False
        for option, value in options.items():
            libc.mallopt(option, value)
        return True


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
