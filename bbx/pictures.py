"""Find the picture of a feature file's row again, and never another file: keys and roots in a file are not trusted.

A root that the file records counts only where it lies in the current folder or in the file's own; a key leads below its
root and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from bbx.store import FeatureFile

Locate = Callable[[int], Path | None]
"""A row's picture, or None where there is none."""


def roots(file: FeatureFile, root: str | os.PathLike[str] | None = None) -> list[Path]:
    """The folders that keys are relative to: `root` alone where the user names it, else the trusted recorded ones."""
    if root is not None:
        return [Path(root)]
    trusted = [Path.cwd().resolve(), Path(file.path).resolve().parent]
    recorded = [text for attempt in file.attempts for text in _texts(attempt.get("roots"))]
    resolved = [found for text in dict.fromkeys(recorded) if (found := _resolved(text))]
    return [found for found in resolved if any(found.is_relative_to(folder) for folder in trusted)]


def locate(file: FeatureFile, root: str | os.PathLike[str] | None = None) -> Locate:
    """A function that finds a row's picture below `root`, or below the recorded roots that may be trusted."""
    folders = roots(file, root)
    return lambda row: _below(file.keys[row], folders)


def _below(key: str, folders: Sequence[Path]) -> Path | None:
    for root in folders:
        # With several roots a key starts with the last folders of its root's path.
        for folder in (root, *root.resolve().parents)[: key.count("/") + 1]:
            try:
                path = (folder / key).resolve()
                if path.is_relative_to(root.resolve()) and path.is_file():
                    return path
            except (OSError, ValueError, RuntimeError):
                continue  # no such name can be: a NUL, a loop of links, too long
    return None


def _resolved(text: str) -> Path | None:
    try:
        return Path(text).resolve()
    except (OSError, ValueError, RuntimeError):
        return None


def _texts(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
