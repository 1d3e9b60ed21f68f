"""The file an image comes from: opened only where it is a regular one, known by size, mtime and digest of content."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from pathlib import Path
from typing import BinaryIO

from bbx.errors import ImageError
from bbx.spec import InputFile

# Files up to here are read once and decoded from memory, so that what is decoded is what the digest is of.
_HELD_NBYTES = 64 << 20
_CHUNK_NBYTES = 1 << 20
_SPECIAL_FILES = (
    (stat.S_ISFIFO, "FIFO"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


def open_regular(path: str) -> BinaryIO:
    """`path` opened for reading; a FIFO, which would wait for its writer, or a device is never opened."""
    _check_regular(Path(path).stat())
    # Should the file be exchanged for a FIFO right here, O_NONBLOCK keeps the open from waiting.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_regular(os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def facts_of(file: BinaryIO) -> InputFile:
    """Size and mtime of an open file."""
    found = os.fstat(file.fileno())
    return InputFile.of(found.st_size, found.st_mtime_ns)


def held(file: BinaryIO, facts: InputFile) -> BinaryIO:
    """The content in memory, or where it is large the file itself."""
    if facts.nbytes > _HELD_NBYTES:
        return file
    content = file.read(facts.nbytes + 1)  # more would be set aside in full; that one byte tells of a file that grew
    check_unchanged(file, facts)
    return io.BytesIO(content)


def check_unchanged(file: BinaryIO, facts: InputFile) -> None:
    """Raises `ImageError` where the file is not what it was."""
    if facts_of(file) != facts:
        raise ImageError("the file changed while it was read")


def digest(content: BinaryIO) -> bytes:
    """BLAKE2b-128 of all of `content`, which is left at its start."""
    hashed = hashlib.blake2b(digest_size=16)
    content.seek(0)
    while chunk := content.read(_CHUNK_NBYTES):
        hashed.update(chunk)
    content.seek(0)
    return hashed.digest()


def digest_file(path: str | os.PathLike[str]) -> InputFile:
    """What `path` is now, digest included. Raises `ImageError`, `OSError`."""
    with open_regular(os.fspath(path)) as file:
        return facts_of(file)._replace(digest=digest(file))


def _check_regular(facts: os.stat_result) -> None:
    if stat.S_ISDIR(facts.st_mode):
        raise ImageError("a folder, not a file")
    if not stat.S_ISREG(facts.st_mode):
        kind = next((word for test, word in _SPECIAL_FILES if test(facts.st_mode)), "special file")
        raise ImageError(f"a {kind}, not a regular file")
    if facts.st_size == 0:
        raise ImageError("zero bytes")
