"""Keep the memory of one batch for the next: on a CPU, glibc's habit of giving it back costs as much as a layer.

A batch's activations are tens of megabytes each. glibc maps such pieces anew and returns them when they are freed, so
that the kernel clears every page of every layer of every batch again: at 32 images that doubles the CPU time of
swin-tiny (133 ms an image against 63). `mallopt(3)` is glibc's own switch for it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MAPPED_FROM_NBYTES = 1 << 30
_NEVER_TRIMMED = (1 << 31) - 1


def keep_memory() -> None:
    """Has freed memory stay with the process, in one arena, whichever thread frees it; does nothing without glibc.

    One arena: those of threads are cut into pieces of 64 MB, and pieces that fall empty are returned all the same. For
    that, this has to be called before the threads that allocate are started.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_NBYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIMMED)


@contextmanager
def kept_memory() -> Iterator[None]:
    """`keep_memory` for the time of a job; afterwards what is free goes back to the system."""
    keep_memory()
    try:
        yield
    finally:
        libc = _glibc()
        if libc is not None:
            libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
