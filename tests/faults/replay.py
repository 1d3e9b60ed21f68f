"""From the record of a writer's system calls, the folder as a loss of power at any moment may leave it.

What a completed sync covered is there. Of what came later any part may be: each write is torn into its 4 KiB pages, and
each page is there or not, whatever came before or after it; so are changes of size. Renames follow the same rule with
the folder's sync, but keep their order, as every journal keeps it. Writes that overlap keep their order too, since they
meet in the same page of the system's cache.
"""

from __future__ import annotations

import io
import itertools
import pickle
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGE = 4096
Event = tuple[Any, ...]


def load(path: Path) -> list[Event]:
    """The events of a record, in the order in which they happened."""
    data = path.read_bytes()
    stream = io.BytesIO(data)
    events = []
    while stream.tell() < len(data):
        events.append(pickle.load(stream))
    assert [event[0] for event in events] == list(range(len(events)))
    return events


def whole(events: Sequence[Event]) -> dict[str, bytes]:
    """The files by name, with everything on disk."""
    return _Moment(events).folder(random.Random(0), keep=1.0)


def crash(
    events: Sequence[Event], chance: random.Random, *, without: Collection[str] = (), last: int = 0
) -> dict[str, bytes]:
    """The files by name after a loss of power at a random moment, or at one of the `last` ones.

    `without`: kinds of sync (`fdatasync`, `fsync`, `folder`) that do nothing on this disk.
    """
    stop = chance.randrange(max(1, len(events) - last) if last else 1, len(events) + 1)
    return _Moment(events[:stop], without).folder(chance, keep=chance.choice([0.0, 0.05, 0.5, 0.95, 1.0]))


@dataclass
class _Moment:
    """What had been asked of the system, and which of it a sync had covered."""

    events: Sequence[Event]
    without: Collection[str] = ()
    # For each file, and None for the folder: all events before this one are on disk.
    safe: dict[int | None, int] = field(default_factory=dict)
    written: dict[int, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        syncs = {event[0]: event for event in self.events if event[1] == "sync"}
        for number, kind, *facts in self.events:
            if kind == "synced":
                begun, _, how, inode = syncs[facts[0]]
                if how not in self.without:
                    place = None if how == "folder" else inode
                    self.safe[place] = max(begun, self.safe.get(place, 0))
            elif kind == "written":
                # When it was done, and how many bytes it took.
                self.written[facts[0]] = (number, facts[1])

    def folder(self, chance: random.Random, keep: float) -> dict[str, bytes]:
        """The files by name; of what is not safe each piece is there with the probability `keep`."""
        files: dict[int, bytearray] = {}
        for number, kind, *facts in self.events:
            if kind in ("file", "create"):
                files.setdefault(facts[0], bytearray(facts[2] if kind == "file" else b""))
            elif kind == "size" and (self._is_safe(number, facts[0]) or chance.random() < keep):
                _resize(files[facts[0]], facts[1])
            elif kind == "write":
                inode, offset, data = facts
                done, count = self.written.get(number, (len(self.events) << 1, len(data)))
                sure = self._is_safe(done, inode)
                for start, stop in _pages(offset, offset + count):
                    if sure or chance.random() < keep:
                        part = data[start - offset : stop - offset]
                        if len(files[inode]) < stop:
                            _resize(files[inode], stop)
                        files[inode][start:stop] = part
        return {name: bytes(files[inode]) for name, inode in self._names(chance, keep).items()}

    def _is_safe(self, done: int, place: int | None) -> bool:
        return done < self.safe.get(place, -1)

    def _names(self, chance: random.Random, keep: float) -> dict[str, int]:
        changes = [event for event in self.events if event[1] in ("create", "rename", "unlink")]
        sure = sum(event[0] < self.safe.get(None, -1) for event in changes)
        reached = len(changes) if keep == 1.0 else chance.randint(sure, len(changes))
        names = {event[3]: event[2] for event in self.events if event[1] == "file"}
        for _, kind, *facts in changes[:reached]:
            if kind == "create":
                names[facts[1]] = facts[0]
            elif kind == "rename":
                names[facts[1]] = names.pop(facts[0])
            else:
                names.pop(facts[0], None)
        return names


def _pages(start: int, stop: int) -> list[tuple[int, int]]:
    """`start` to `stop`, in bytes, cut where pages end."""
    edges = [start, *range((start // PAGE + 1) * PAGE, stop, PAGE), stop]
    return [(a, b) for a, b in itertools.pairwise(edges) if a < b]


def _resize(file: bytearray, size: int) -> None:
    if size < len(file):
        del file[size:]
    else:
        file.extend(bytes(size - len(file)))
