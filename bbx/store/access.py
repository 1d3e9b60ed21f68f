"""Reach a feature file's bytes from whatever process and thread asks.

An `Access` is a path and plain facts; its handles belong to one process, are opened there on first use, and stay behind
when it is pickled or forked. Contiguous rows are read without HDF5 and its lock, so threads read at the same time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bbx.errors import FileError, UsageError
from bbx.store import format, trust
from bbx.store.format import Column
from bbx.store.target import partial_path


@dataclass(frozen=True, slots=True)
class _Handle:
    pid: int
    opened: trust.OpenFile
    lock: threading.Lock


_opening = threading.Lock()
_left_behind: list[_Handle] = []
"""Handles of the parent process: closing them here would release the parent's lock on the file."""


def _after_fork() -> None:
    global _opening
    _opening = threading.Lock()  # a thread of the parent may have held the old one


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Access:
    """Reads of one file; `facts` are those of the checked file, and every later opening must find the same ones."""

    def __init__(self, path: Path, *, partial: bool, allow_virtual: bool) -> None:
        self.path = path
        self._partial = partial
        self._allow_virtual = allow_virtual
        self._closed = False
        opened = trust.open_checked(self._place(), allow_virtual=allow_virtual)
        self.facts = opened.facts
        self._handle: _Handle | None = _Handle(os.getpid(), opened, threading.Lock())

    def rows(self, name: str, start: int, count: int) -> NDArray[Any]:
        """`count` rows of a contiguous column from row `start`, `(count, *row_shape)`."""
        return self._open().opened.rows(name, start, count)

    def status(self) -> NDArray[np.uint8]:
        """The commit record as it is now, uint8 `(n,)`."""
        return self._open().opened.status()

    def keys(self) -> list[str]:
        """Every row's key."""
        handle = self._open()
        with handle.lock, trust.guarded(self.path):
            return [format.decode_key(data) for block in handle.opened.key_blocks() for data in block]

    def broken_seals(self) -> NDArray[np.int64]:
        """The rows, done or failed, whose seal does not match."""
        handle = self._open()
        with handle.lock:
            return handle.opened.broken_seals()

    def is_broken(self, row: int, key: bytes) -> bool:
        """Whether the seal of one row, stored under `key`, does not match."""
        opened = self._open().opened
        if not self.facts.sealed:
            return False
        return bool(opened.row_facts(row, [key]).seals()[0] != opened.rows(format.SEAL, row, 1)[0])

    @property
    def finished(self) -> bool:
        """Whether the file has its final name."""
        return not self._place().name.endswith(".partial")

    def fill(self, column: Column, ranges: Iterable[tuple[int, int]], out: NDArray[Any]) -> None:
        """Read `ranges` of rows, half-open, one after the other into `out`, C-contiguous `(k, *row_shape)`."""
        handle = self._open()
        done = 0
        for first, last in ranges:
            part = out[done : done + last - first]
            handle.opened.fill(column.name, first, last, part, lock=handle.lock)
            done += last - first

    def close(self) -> None:
        """Close this process's handles, for good."""
        self._closed = True
        handle, self._handle = self._handle, None
        if handle is None:
            return
        if handle.pid != os.getpid():
            _left_behind.append(handle)
            return
        with handle.lock:
            handle.opened.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def _open(self) -> _Handle:
        """This process's handle."""
        handle = self._handle
        if handle is not None and handle.pid == os.getpid():
            return handle
        if self._closed:
            raise UsageError(f"{self.path} is closed", "read inside the with block")
        with _opening:
            handle = self._handle
            if handle is None or handle.pid != os.getpid():
                if handle is not None:
                    _left_behind.append(handle)
                opened = trust.open_checked(self._place(), allow_virtual=self._allow_virtual)
                if opened.facts != self.facts:
                    opened.close()
                    raise FileError(f"{self.path} was replaced by another file since it was opened", "open it again")
                handle = self._handle = _Handle(os.getpid(), opened, threading.Lock())
        return handle

    def _place(self) -> Path:
        unfinished = partial_path(self.path)
        if self._partial and unfinished.exists():
            return unfinished
        if not self._partial and not self.path.exists() and unfinished.exists():
            raise FileError(
                f"{self.path} is not finished: {unfinished} has what there is",
                "run the same bbx extract command again to go on, or open it as it is with partial=True (--partial)",
            )
        return self.path
