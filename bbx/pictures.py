"""Find the picture of a feature file's row again, and never another file: keys and roots in a file are not trusted.

A root that the file records counts only where it lies in the current folder or in the file's own; a key leads below its
root and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bbx.spec import InputFile
from bbx.store import FeatureFile

Locate = Callable[[int], Path | None]
"""A row's picture, or None where there is none."""


def is_near(path: Path, file: str | os.PathLike[str] | None) -> bool:
    """Whether `path`, which a feature file names, lies below the current folder or below the folder of `file`."""
    trusted = [Path.cwd().resolve(), *([Path(file).resolve().parent] if file is not None else [])]
    found = _resolved(path)
    return found is not None and any(found.is_relative_to(folder) for folder in trusted)


def recorded_roots(file: FeatureFile) -> list[str]:
    """The folders of the images as all starts recorded them, each once, trusted or not."""
    return list(dict.fromkeys(text for attempt in file.attempts for text in _texts(attempt.get("roots"))))


def roots(file: FeatureFile, root: str | os.PathLike[str] | None = None) -> list[Path]:
    """The folders that keys are relative to: `root` alone where the user names it, else the trusted recorded ones."""
    if root is not None:
        return [Path(root)]
    return [Path(text).resolve() for text in recorded_roots(file) if is_near(Path(text), file.path)]


def locate(file: FeatureFile, root: str | os.PathLike[str] | None = None) -> Locate:
    """A function that finds a row's picture below `root`, or below the recorded roots that may be trusted.

    Where several folders have one of that name, the one of the recorded size and time is it.
    """
    folders = roots(file, root)

    def find(row: int) -> Path | None:
        found = list(_below(file.keys[row], folders))
        if len(found) < 2:
            return found[0] if found else None
        recorded = file.inputs([row])[0]._replace(digest=b"")
        return next((path for path in found if facts_of(path) == recorded), found[0])

    return find


def facts_of(path: Path) -> InputFile:
    """Size and time of what is at `path` now, all zero where nothing is."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return InputFile()
    return InputFile.of(found.st_size, found.st_mtime_ns)


def _below(key: str, folders: Sequence[Path]) -> Iterator[Path]:
    for root in folders:
        # With several roots a key starts with the last folders of its root's path.
        for folder in (root, *root.resolve().parents)[: key.count("/") + 1]:
            try:
                path = (folder / key).resolve()
                if path.is_relative_to(root.resolve()) and path.is_file():
                    yield path
            except (OSError, ValueError, RuntimeError):
                continue  # no such name can be: a NUL, a loop of links, too long


def _resolved(path: Path) -> Path | None:
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):
        return None


def _texts(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str) and "\0" not in item] if isinstance(value, list) else []
