"""The machine: its name for the README, and what its memory, its cores and its disk can do at most."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path

import numpy as np

from bbx.machine import cores
from bbx.store.disk import begin_writing

_BUFFER = 32 << 20


def describe(write_rate: float = 0.0, device: str = "cpu") -> str:
    """One line: device, CPU, cores, memory, the disk's bytes per second where they were measured, versions, date."""
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    disk = [f"disk writes {write_rate / 1e6:,.0f} MB/s"] if write_rate else []
    versions = [f"{name} {metadata.version(name)}" for name in ("bbx", "torch")]
    parts = [
        *([] if device == "cpu" else [_accelerator(device)]),
        f"{cpu[1] if cpu else platform.machine()}, {cores()} cores", f"{memory:.0f} GiB", *disk,
        f"Python {platform.python_version()}", *versions, date.today().isoformat(),
    ]  # fmt: skip
    return " · ".join(parts)


def _accelerator(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device)


def memory_bandwidth() -> float:
    """Bytes per second of a copy by all cores, read and written both counted."""
    import torch

    source, target = torch.ones(64 << 20), torch.empty(64 << 20)  # 256 MiB each: beyond any cache
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source))


def product_peak() -> float:
    """Floating-point operations per second of float32 matrix products by all cores."""
    import torch

    side = 2048
    one, other = torch.rand(side, side), torch.rand(side, side)
    return 2 * side**3 / _fastest(lambda: one @ other)


def raw_write(path: Path, nbytes: int, *, early: bool = False) -> float:
    """Seconds of a sequential write of `nbytes` in large pieces, until fsync says that they are on disk.

    `early`: with bbx's own tricks, the file laid out before and each piece on its way to the disk at once.
    """
    piece = memoryview(np.random.default_rng(0).bytes(_BUFFER))
    started = time.perf_counter()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if early:
        os.posix_fallocate(descriptor, 0, nbytes)
    left = nbytes
    while left:
        left -= os.write(descriptor, piece[: min(left, _BUFFER)])
        if early:
            begin_writing(descriptor)
    os.fsync(descriptor)
    os.close(descriptor)
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def _fastest(work: Callable[[], object], repeats: int = 10) -> float:
    """Seconds of the fastest."""
    least = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - started)
    return least
