"""A folder for the time of one benchmark, on the disk that is to be measured; what a killed one left is removed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bbx.errors import StartError
from bbx.store.lock import disown, own

_PREFIX, _LOCK = ".bbx-bench-", "lock"


@contextmanager
def own_folder(where: Path) -> Iterator[Path]:
    """A new folder in `where`, absolute, that is removed at the end. Raises `StartError` where it cannot be made."""
    _sweep(where)
    try:
        made = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=where)
    except OSError as problem:
        raise StartError(
            f"no folder for the measurement can be made in {where.resolve()}: {problem.strerror}",
            "bbx bench measures the disk of the current folder: cd to one that you may write to",
        ) from None
    folder = Path(made.name).resolve()
    fd = os.open(folder / f"{_LOCK}.new", os.O_RDWR | os.O_CREAT, 0o600)
    if not _lock(fd):
        os.close(fd)
        with made:
            yield folder
        return
    # It gets its name once it is locked: one that is not is left over.
    (folder / f"{_LOCK}.new").rename(folder / _LOCK)
    own(fd)
    try:
        with made:
            yield folder
    finally:
        disown(fd)


def _sweep(where: Path) -> None:
    """Removes the folders whose process is gone: the lock in them is the kernel's, and ended with it."""
    for left in where.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another's, or gone by now
            fd = os.open(left / _LOCK, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                if _lock(fd):
                    shutil.rmtree(left)
            finally:
                os.close(fd)


def _lock(fd: int) -> bool:
    """Takes the lock of an open file; False where another process has it, or no file here has any."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
