"""One writer per output: an advisory lock on `<output>.lock`, which ends with its process however that ends.

The lock file names its holder for the error message; the lock itself is the kernel's, so a file left over by a killed
process blocks nobody. A clean release removes the file while still holding the lock, and a taker that locked a file
which was removed meanwhile sees that and starts again: no moment has two holders.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import warnings
from pathlib import Path

from bbx.errors import StartError

_NO_LOCKS_HERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)
_ours: set[int] = set()


def own(fd: int) -> int:
    """Have forked children close `fd`: a data loader that outlives its parent must not hold its lock."""
    _ours.add(fd)
    return fd


def disown(fd: int) -> None:
    """Close `fd` and forget it."""
    _ours.discard(fd)
    os.close(fd)


def _after_fork() -> None:
    for fd in _ours:
        os.close(fd)
    _ours.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class WriterLock:
    """The right to write one output, from construction to `release`. Raises `StartError` naming the holder."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(path.name + ".lock")
        self._fd = self._take()
        os.ftruncate(self._fd, 0)
        os.write(self._fd, f"{socket.gethostname()} {os.getpid()}\n".encode())

    def _take(self) -> int:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
            try:
                if not try_lock(fd, shared=False):
                    raise StartError(f"{self.path} is held by {self._holder()}", "wait for that run, or stop it")
                if self._still_there(fd):
                    return own(fd)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _still_there(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), self.path.stat())
        except FileNotFoundError:
            return False

    def _holder(self) -> str:
        try:
            words = self.path.read_text(errors="replace").split()
        except OSError:
            words = []
        return f"process {words[1]} on host {words[0]}" if len(words) == 2 else "another process"

    def release(self) -> None:
        """Remove the lock file, then let go."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            # Windows removes no open file, and its lock ends at close.
            if sys.platform != "win32" and self._still_there(fd):
                self.path.unlink(missing_ok=True)
            disown(fd)


def try_lock(fd: int, *, shared: bool) -> bool:
    """Take the advisory lock that HDF5 itself uses; False where another process holds it."""
    if sys.platform == "win32":
        import msvcrt

        if shared:  # a Windows lock would keep readers out
            return True
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
        warnings.warn("this file system has no locks: start no second run on the same output", stacklevel=4)
    return True
