"""Plain reads and writes at an offset, made durable, with the few differences between operating systems kept here."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bbx.errors import StartError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_MOST_NBYTES = 1 << 30
"""Per call: Linux takes no more than 2 GiB, and macOS refuses it."""
_SYNC_FILE_RANGE_WRITE = 2
_seek_lock = threading.Lock()
Buffer = Any  # whatever memoryview() takes; collections.abc.Buffer needs Python 3.12


def write_at(fd: int, data: Buffer, offset: int) -> None:
    """Write all of `data` at `offset` bytes, however few bytes each call takes. Raises `OSError`."""
    rest = memoryview(data).cast("B")
    while rest:
        count = _pwrite(fd, rest[:_MOST_NBYTES], offset)
        if count <= 0:
            raise OSError(errno.EIO, "the system wrote nothing and gave no reason")
        rest, offset = rest[count:], offset + count


def read_at(fd: int, buffer: Buffer, offset: int) -> None:
    """Fill `buffer` from `offset` bytes. Raises `OSError`, `EOFError` where the file ends before."""
    rest = memoryview(buffer).cast("B")
    while rest:
        count = _pread(fd, rest[:_MOST_NBYTES], offset)
        if count <= 0:
            raise EOFError("the file ends inside a row")
        rest, offset = rest[count:], offset + count


def _pwrite(fd: int, data: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _seek_lock:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def _pread(fd: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    with _seek_lock:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def make_durable(fd: int) -> None:
    """Return once everything written to `fd` is on the disk itself. Raises `OSError`; never retry after one."""
    if sys.platform == "darwin":
        import fcntl

        try:
            # macOS' fsync stops at the drive's cache.
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EINVAL):
                raise
            os.fsync(fd)
    else:
        getattr(os, "fdatasync", os.fsync)(fd)


def begin_writing(fd: int) -> None:
    """Have the system begin to put what was written to `fd` on the disk, and wait for none of it; a hint, no promise.

    It reports no error and takes none away: the next `make_durable` still meets it (Linux's sync_file_range, without
    its waiting flags, leaves the descriptor's error state alone).
    """
    if call := _sync_file_range():
        call(fd, 0, 0, _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable; Windows has no such call and needs none."""
    if sys.platform == "win32":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def refuse_link(path: Path) -> None:
    """Raise `StartError` where a file that is about to be made is a link: what it leads to is somebody else's."""
    if path.is_symlink():
        raise StartError(f"{path} is a symbolic link, where bbx makes a file of its own", f"rm {path}")


def check_room(path: Path, nbytes: int) -> None:
    """Raise `StartError`, with both figures, where the file system of `path` has less than `nbytes` free."""
    free = shutil.disk_usage(path.parent).free
    if nbytes > free:
        raise no_room(path, nbytes)


def no_room(path: Path, nbytes: int) -> StartError:
    """The error for a disk that cannot hold `nbytes` more."""
    free = shutil.disk_usage(path.parent).free
    return StartError(
        f"the features need {size_text(nbytes)} ({nbytes} bytes), "
        f"and {path.parent} has {size_text(free)} ({free} bytes) free",
        "make room, choose another folder with -o, or ask for fewer stages, --pool or --dtype float16",
    )


def reserve(path: Path, fd: int, nbytes: int) -> None:
    """Claim `nbytes` of disk for the open file, so that a full disk is met now and not after hours.

    A file system that cannot claim stays sparse, once its free space is checked. Raises `StartError`.
    """
    try:
        if not _fallocate(fd, nbytes):
            check_room(path, nbytes)
    except OSError as error:
        if error.errno in _FULL:
            raise no_room(path, nbytes) from None
        if error.errno == errno.EFBIG:
            raise too_big(path, nbytes) from None
        raise


def too_big(path: Path, nbytes: int) -> StartError:
    """The error for a file system whose largest file is smaller than `nbytes`."""
    return StartError(
        f"the file system of {path.parent} holds no single file of {size_text(nbytes)}",
        "split the images into several runs, or choose another file system with -o",
    )


def _fallocate(fd: int, nbytes: int) -> bool:
    """fallocate(2) itself, since glibc's `posix_fallocate` writes every block where the system call is missing."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if call is None:
        return False
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while call(fd, 0, 0, nbytes) != 0:
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def size_text(nbytes: float) -> str:
    """`1500000000` → `"1.5 GB"`."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"


@contextlib.contextmanager
def starting(path: Path) -> Iterator[None]:
    """Turn an `OSError` met before the first row into a `StartError` that says what to do."""
    try:
        yield
    except OSError as error:
        hint = "choose a folder that you may write to with -o"
        if not path.parent.is_dir():
            hint = f"mkdir -p {path.parent}"
        raise StartError(f"cannot write {path}: {error.strerror or error}", hint) from error
