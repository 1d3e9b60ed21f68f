"""A file that HDF5 may write to whatever the disk does: HDF5 crashes the process when its own writes fail.

So it never sees that. The first error is remembered, and whatever comes after it is taken without a word; the caller
asks for the error, and throws the file away.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from bbx.store import disk


class SafeFile:
    """What HDF5 takes for a file: its writes and truncations of `fd` never fail before its eyes.

    `error` is the first that did. What is written after it is lost, and reads as zeros.
    """

    def __init__(self, fd: int) -> None:
        self.error: OSError | None = None
        self._fd = fd
        self._at = 0
        self._end = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to `offset` bytes."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._end}[whence]
        return self._at

    def tell(self) -> int:
        """Where the next read or write begins, in bytes."""
        return self._at

    def write(self, data: disk.Buffer) -> int:
        """Take all of `data`."""
        nbytes = memoryview(data).nbytes
        self._try(lambda: disk.write_at(self._fd, data, self._at))
        self._at += nbytes
        self._end = max(self._end, self._at)
        return nbytes

    def truncate(self, size: int | None = None) -> int:
        """Set the file's length to `size` bytes."""
        self._end = self._at if size is None else size
        self._try(lambda: os.ftruncate(self._fd, self._end))
        return self._end

    def readinto(self, buffer: disk.Buffer) -> int:
        """Fill `buffer` from here on."""
        view = memoryview(buffer).cast("B")
        view[:] = bytes(len(view))
        kept = max(0, min(len(view), self._end - self._at))
        try:
            disk.read_at(self._fd, view[:kept], self._at)
        except (OSError, EOFError) as error:
            self.error = self.error or OSError(str(error))
        self._at += len(view)
        return len(view)

    read = readinto  # h5py takes nothing for a file that has no `read`, and calls `readinto`

    def flush(self) -> None:
        """Nothing waits here."""

    def check(self) -> None:
        """Raise the first error, if there was one."""
        if self.error is not None:
            raise self.error

    def _try(self, act: Callable[[], None]) -> None:
        if self.error is None:
            try:
                act()
            except OSError as error:
                self.error = error
