"""Whole processes, run in alternation: seconds, CPU seconds, memory of the process and all it started, bytes on disk.

Linux only: memory is the proportional set size (PSS) of the whole tree, in which pages that processes share are counted
once. It is sampled in rounds of their own, so that the sampling takes no time from what is timed.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.benchmarks.pictures import ROOT

# Reading the memory map of a process of a gigabyte takes milliseconds.
_EVERY = 0.2
_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")

T = TypeVar("T")


class RunError(Exception):
    """A process that ended with an error; the text is the last that it said."""


@dataclass(frozen=True)
class Taken:
    """What one process took. `synced`: until the disk has it all; `peak` and `nbytes` in bytes.

    `cpu` counts the process and all it waited for; `peak` is sampled, of the whole tree, or else, exactly, that of the
    largest process.
    """

    seconds: float
    synced: float
    cpu: float
    peak: int
    nbytes: int


def run(command: Sequence[str], output: Path | None = None, *, sample: bool = False) -> Taken:
    """Runs `command` in the checkout, `output` (a file or folder) removed before. Raises `RunError`."""
    if output is not None:
        remove(output)
    os.sync()  # what an earlier run left to be written would be paid for by this one
    with tempfile.TemporaryFile() as said:
        started = time.perf_counter()
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=said, env=environment())
        with _Sampled(child.pid if sample else 0) as sampled:
            _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        os.sync()
        synced = time.perf_counter() - started
        if child.returncode:
            said.seek(0)
            raise failed(said.read().decode(errors="replace"), child.returncode)
    nbytes = size(output) if output is not None else 0
    return Taken(seconds, synced, used.ru_utime + used.ru_stime, sampled.peak or used.ru_maxrss << 10, nbytes)


def environment() -> dict[str, str]:
    """That of every process that is measured."""
    found = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    # An installed package has its bytecode; with this set, a checkout would be compiled at every start.
    found.pop("PYTHONDONTWRITEBYTECODE", None)
    return found


def failed(said: str, code: int) -> RunError:
    """What a process that ended with `code` said of it."""
    words = said.strip().splitlines() or [f"exit code {code}"]
    return RunError(next((line for line in words if line.startswith("error:")), words[-1]))


def alternate(sides: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Every side `repeats` times, in turn: A B C A B C …, so that what slows the machine slows all of them."""
    taken: dict[str, list[T]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            taken[name].append(side())
    return taken


def median(taken: Sequence[Taken]) -> Taken:
    """Of each field by itself."""
    return Taken(
        statistics.median(one.seconds for one in taken),
        statistics.median(one.synced for one in taken),
        statistics.median(one.cpu for one in taken),
        max(one.peak for one in taken),
        taken[0].nbytes,
    )


def steady_rate(images: int, whole: Taken, start: Taken) -> float:
    """Images per second of a run of `images` without its start, a run of one; NaN where the difference is noise."""
    seconds = whole.seconds - start.seconds
    return (images - 1) / seconds if seconds > 0 else math.nan


def remove(output: Path) -> None:
    """Whatever is at `output`, and what bbx leaves beside it when it is killed."""
    for path in output.parent.glob(f"{output.name}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(one.stat().st_size for one in ([path] if path.is_file() else path.rglob("*")) if one.is_file())


def tree(root: int) -> Iterator[int]:
    """`root` and all processes below it, by their ids."""
    parents = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            parents[int(entry.name)] = int(fields[1])
    below = {root}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    yield from below


def cpu_of_tree(root: int) -> float:
    """CPU seconds, by now, of `root` and the processes below it that still run."""
    ticks = 0
    for pid in tree(root):
        if fields := _stat(pid):
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the command's name: state, parent, …; nothing where it has ended."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def pss(root: int) -> int:
    """Bytes of memory of `root` and all below it."""
    total = 0
    for pid in tree(root):
        try:
            lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
        except OSError:  # it ended meanwhile
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


class _Sampled:
    """While entered, looks at the memory of a process and its children; `peak` is the most that was seen, in bytes."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._over.is_set():
            self.peak = max(self.peak, pss(self._pid))
            self._over.wait(_EVERY)

    def __enter__(self) -> _Sampled:
        if self._pid:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._pid:
            self._thread.join()
