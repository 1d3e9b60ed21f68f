"""Stands between bbx and the system, in the victim: writes down every call about one output, and makes some go wrong.

Wrapped are `os.open`, `pwrite`, `write`, `fdatasync`, `fsync`, `ftruncate`, `replace`, `rename`, `unlink` and bbx's own
fallocate. HDF5 writes natively, but only into the draft of the skeleton, and that is read whole where it is fsynced. A
test replays the whole record and compares with the file itself: a call that escaped would show.
"""

from __future__ import annotations

import itertools
import os
import pickle
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What may fail, and what a kill may come before: the calls that change the output.
CALLS = ("open", "pwrite", "write", "fdatasync", "fsync", "ftruncate", "replace", "rename", "unlink", "fallocate")


@dataclass(frozen=True)
class Fault:
    """From the `after`-th call named `call` (or any of CALLS, where it is empty) about the output: what happens.

    `errno`: raised from then on, or `once`; a `pwrite` that fails for want of room first takes a part (`short`).
    `kill`: SIGKILL before the call. `short` alone: every pwrite takes some of the bytes; `nothing`: none, and says so.
    `no_fallocate`: a file system without it; `room`: bytes it says are free. `ballast`: a file, written until the disk
    is full.
    """

    call: str = ""
    after: int = 0
    errno: int = 0
    once: bool = False
    short: bool = False
    nothing: bool = False
    kill: bool = False
    no_fallocate: bool = False
    room: int = -1
    ballast: str = ""
    seed: int = 0


def install(output: str, record: str, fault: Fault | None) -> None:
    """Wraps the calls of this process about `output`, its drafts and its folder."""
    tap = _Tap(Path(output).absolute(), Path(record) if record else None, fault or Fault())
    for name in CALLS:
        if name != "fallocate":
            setattr(os, name, tap.wrapped(name, getattr(os, name)))
    from bbx.store import disk

    disk._fallocate = tap.wrapped("fallocate", disk._fallocate)  # type: ignore[assignment]
    if tap.fault.no_fallocate:
        disk._fallocate = lambda fd, nbytes: False
    if tap.fault.room >= 0:
        import shutil

        usage = shutil.disk_usage
        shutil.disk_usage = lambda path: usage(path)._replace(free=tap.fault.room)  # type: ignore[assignment]


class _Tap:
    def __init__(self, output: Path, record: Path | None, fault: Fault) -> None:
        self.output = str(output)
        self.folder = str(output.parent)
        self.fault = fault
        self._chance = random.Random(fault.seed)
        self._real_write = os.write
        self._record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) if record else -1
        self._lock = threading.RLock()
        self._numbers = itertools.count()
        self._hits = 0
        if record:
            for path in sorted(Path(self.folder).glob(f"{output.name}*")):
                if not path.name.endswith(".lock"):
                    self.note("file", path.stat().st_ino, path.name, path.read_bytes())

    def note(self, *facts: Any) -> int:
        """Puts down one event and returns its number."""
        with self._lock:
            number = next(self._numbers)
            if self._record >= 0:
                data = pickle.dumps((number, *facts))
                assert self._real_write(self._record, data) == len(data)
            return number

    def wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """`real`, watched where it is about the output."""

        def call(*args: Any, **options: Any) -> Any:
            place = self._about(name, args)
            if place is None:
                return real(*args, **options)
            args = self._meet(name, args)
            return self._noted(name, place, real, args, options)

        return call

    def _about(self, name: str, args: tuple[Any, ...]) -> str | None:
        """The path that the call is about, "" for the folder; None where it is not about the output."""
        if isinstance(args[0], int):
            path = str(Path(f"/proc/self/fd/{args[0]}").readlink()).removesuffix(" (deleted)")
        else:
            path = str(Path(args[0]).absolute())
        if name == "open" and not args[1] & (os.O_CREAT | os.O_TRUNC):
            return None
        if name == "fsync" and path == self.folder:
            return ""
        return path if path.startswith(self.output) and not path.endswith(".lock") else None

    def _meet(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Lets the fault happen, if it is its turn; gives the call's arguments back, perhaps with fewer bytes."""
        fault = self.fault
        with self._lock:
            if fault.call not in ("", name):
                return args
            hit = self._hits
            self._hits += 1
        if hit < fault.after or (fault.once and hit > fault.after):
            return args
        if fault.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.ballast and hit == fault.after:
            self._fill(fault.ballast)
        if fault.nothing:
            return (args[0], b"", args[2])
        if fault.short and name == "pwrite" and (not fault.errno or hit == fault.after) and len(args[1]) > 1:
            return (args[0], args[1][: self._chance.randrange(1, len(args[1]))], args[2])
        if fault.errno:
            raise OSError(fault.errno, os.strerror(fault.errno))
        return args

    def _fill(self, ballast: str) -> None:
        fd = os.open(ballast, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        size = 1 << 16
        while size:
            try:
                self._real_write(fd, bytes(size))
            except OSError:
                size //= 2
        os.close(fd)

    def _noted(self, name: str, place: str, real: Callable[..., Any], args: tuple[Any, ...], options: Any) -> Any:
        """The call, between two notes: one with what it is about to do, one once it is done."""
        file = Path(place).name
        if name == "open":
            there = Path(place).exists()
            fd = real(*args, **options)
            inode = os.fstat(fd).st_ino
            if not there:
                self.note("create", inode, file)
            elif args[1] & os.O_TRUNC:
                self.note("size", inode, 0)
            return fd
        if name == "fsync" and file.endswith(".tmp"):  # what HDF5 wrote
            with Path(place).open("rb") as whole:
                inode = os.fstat(args[0]).st_ino
                data = whole.read()
            self.note("written", self.note("write", inode, 0, data), len(data))
            self.note("size", inode, len(data))
        number = self._announce(name, file, args)
        result = real(*args, **options)
        if name in ("pwrite", "write"):
            self.note("written", number, result)
        elif name in ("fsync", "fdatasync"):
            self.note("synced", number)
        elif name == "fallocate" and result:
            inode = os.fstat(args[0]).st_ino
            self.note("size", inode, max(os.fstat(args[0]).st_size, args[1]))
        return result

    def _announce(self, name: str, file: str, args: tuple[Any, ...]) -> int:
        if name == "pwrite":
            return self.note("write", os.fstat(args[0]).st_ino, args[2], bytes(args[1]))
        if name == "write":
            where = os.lseek(args[0], 0, os.SEEK_CUR)
            return self.note("write", os.fstat(args[0]).st_ino, where, bytes(args[1]))
        if name in ("fsync", "fdatasync"):
            return self.note("sync", name if file else "folder", os.fstat(args[0]).st_ino)
        if name == "ftruncate":
            return self.note("size", os.fstat(args[0]).st_ino, args[1])
        if name in ("replace", "rename"):
            return self.note("rename", file, Path(args[1]).name)
        if name == "unlink":
            return self.note("unlink", file)
        return -1
