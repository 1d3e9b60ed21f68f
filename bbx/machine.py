"""What this process may use of the machine, as far as Linux tells: cores and memory, and what control groups leave."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_ROOT = Path("/")


class _Files(NamedTuple):
    """What a version of control groups calls its files, and its page cache."""

    most: str
    now: str
    cache: tuple[str, ...]


# By the controller, which /proc/self/cgroup names for version 1 alone.
_MEMORY = {
    "": _Files("memory.max", "memory.current", ("inactive_file", "active_file")),
    "memory": _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}


def cores(root: Path = _ROOT) -> int:
    """How many cores this process may use: a quota of less than their time, such as a container's, is fewer cores."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(bound, quota(root))))


def quota(root: Path = _ROOT) -> float:
    """The time that control groups leave this process, in cores; infinite where they say nothing. `root` is `/`."""
    found = [float("inf")]
    for folder, controller in _groups(root, ("", "cpu")):
        files = [folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"] if controller else [folder / "cpu.max"]
        words = [word for file in files if file.exists() for word in file.read_text().split()]
        # No limit is the word `max`, or in version 1 a quota of -1.
        if len(words) == 2 and words[0].isdigit():
            found.append(int(words[0]) / int(words[1]))
    return min(found)


def available_nbytes(root: Path = _ROOT) -> float:
    """The memory that is free to take for this process; infinite where the system does not say. `root` is `/`."""
    found = [float("inf")]
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        found += [1024.0 * nbytes for name, nbytes in _numbers(meminfo) if name == "MemAvailable:"]
    for folder, controller in _groups(root, _MEMORY):
        files = _MEMORY[controller]
        most, now = folder / files.most, folder / files.now
        # No limit is the word `max`, or in version 1 a number beyond any machine's.
        if most.exists() and now.exists() and (text := most.read_text().strip()).isdigit():
            cache = sum(nbytes for name, nbytes in _numbers(folder / "memory.stat") if name in files.cache)
            found.append(float(int(text) - int(now.read_text()) + cache))  # pages of files are given up for others
    return min(found)


def _groups(root: Path, controllers: Iterable[str]) -> Iterator[tuple[Path, str]]:
    """The folders of this process's control groups, and those around them, each of which may have a limit."""
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.exists() else ():
        _, named, path = line.split(":", 2)
        for controller in set(named.split(",")) & set(controllers):
            top = root / "sys/fs/cgroup" / controller
            inner = top / path.lstrip("/")
            # In a container the path may be the host's, while what is mounted begins at the container's own group.
            for folder in (inner, *inner.parents):
                if folder.exists() and folder.is_relative_to(top):
                    yield folder, controller


def _numbers(file: Path) -> Iterator[tuple[str, int]]:
    """The lines `name number …` of a file of the kernel's."""
    for line in file.read_text().splitlines() if file.exists() else ():
        name, number, *_ = line.split()
        yield name, int(number)
