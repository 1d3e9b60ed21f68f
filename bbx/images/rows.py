# ruff: noqa: PTH118, PTH206
# A million rows are built from strings; as Path objects they would take minutes.
"""The rows of a run: where each image lies, and the key that tells it from every other."""

from __future__ import annotations

import itertools
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter


@dataclass(slots=True)
class ImageList:
    """The rows of a run: row i has the key `keys[i]` and is read from `path(i)`.

    A key is relative to its root, with "/" separators, unique; what is not UTF-8 in it is surrogate-escaped, as in
    `os.fsdecode`. `skipped` counts the files that are no image; `warnings` (at most 22) says what else was left out.
    """

    keys: list[str]
    roots: list[str]
    skipped: int = 0
    warnings: list[str] = field(default_factory=list)
    # (first row, folder, length of what the keys have in front of the path within that folder)
    _runs: list[tuple[int, str, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def path(self, row: int) -> str:
        """The path to open for `row`; relative where the input was."""
        row = range(len(self.keys))[row]
        _, folder, cut = self._runs[bisect_right(self._runs, row, key=itemgetter(0)) - 1]
        return os.path.join(folder, self.keys[row][cut:])

    def only(self, rows: Sequence[int], *, warnings: Iterable[str] = ()) -> ImageList:
        """The list of `rows`, ascending, alone, with `warnings` added."""
        starts = [start for start, _, _ in self._runs]
        runs = [
            (bisect_left(rows, start), folder, cut) for start, (_, folder, cut) in zip(starts, self._runs, strict=True)
        ]
        keys = [self.keys[row] for row in rows]
        return ImageList(keys, self.roots, self.skipped, [*self.warnings, *warnings], runs)


@dataclass(slots=True)
class Run:
    """Rows that follow each other under one root: `names` are relative to `root`, whose identity is `absolute`.

    While single files are still being collected their root is unknown: `root` is empty, and `names` are absolute.
    """

    root: str
    absolute: str
    names: list[str]


def lay_out(runs: list[Run], *, skipped: int, warnings: list[str]) -> ImageList:
    """The list of all `runs`, in their order, each file once; changes `runs`."""
    if repeats := _drop_repeats(runs):
        warnings = [*warnings, f"named more than once, each being one row: {repeats}"]
    _root_files(runs)
    runs = [run for run in runs if run.names]
    prefixes = _prefixes(runs)
    keys: list[str] = []
    places: list[tuple[int, str, int]] = []
    for run in runs:
        prefix = prefixes[run.absolute]
        places.append((len(keys), run.root, len(prefix)))
        keys += [prefix + name for name in run.names] if prefix else run.names
    return ImageList(keys, list(dict.fromkeys(run.root for run in runs)), skipped, warnings, places)


def _root_files(runs: list[Run]) -> None:
    """Gives the runs of single files their root: the deepest folder that all of them are in."""
    files = [run for run in runs if not run.root]
    # With its separator at the end, a folder sorts before all it holds, and the extremes span everything between.
    folders = _parents(files)
    if not folders:
        return
    common = os.path.commonpath([min(folders), max(folders)])
    cut = len(os.path.join(common, ""))
    for run in files:
        run.root = run.absolute = common
        run.names = [name[cut:].replace(os.sep, "/") for name in run.names]


def _parents(files: Iterable[Run]) -> set[str]:
    """The folders that single files are in, each with its separator at the end."""
    return {name[: name.rindex(os.sep) + 1] for run in files for name in run.names}


def _drop_repeats(runs: list[Run]) -> int:
    """Removes the rows whose file has one already, which only roots inside one another can give; returns how many."""
    folders = [os.path.join(run.absolute, "") for run in runs if run.root]
    tops = sorted([*folders, *_parents(run for run in runs if not run.root)]) if folders else []
    if not any(inner.startswith(outer) for outer, inner in itertools.pairwise(tops)):
        return 0
    seen: set[str] = set()
    repeats = 0
    for run in runs:
        paths = [os.path.join(run.absolute, name) for name in run.names]
        fresh = [path not in seen for path in paths]
        run.names = list(itertools.compress(run.names, fresh))
        seen.update(paths)
        repeats += fresh.count(False)
    return repeats


def _prefixes(runs: list[Run]) -> dict[str, str]:
    """What goes in front of each root's keys: nothing where they are unique, else the shortest ends that part them."""
    parts = {run.absolute: [part for part in run.absolute.split(os.sep) if part] for run in runs}
    prefixes = dict.fromkeys(parts, "")
    depth = 0
    while not _are_unique(runs, prefixes) and depth < max(map(len, parts.values())):
        depth += 1
        prefixes = {root: "".join(f"{part}/" for part in ends[-depth:]) for root, ends in parts.items()}
    return prefixes


def _are_unique(runs: list[Run], prefixes: dict[str, str]) -> bool:
    if len(prefixes) < 2:
        return True
    keys = {prefixes[run.absolute] + name for run in runs for name in run.names}
    return len(keys) == sum(len(run.names) for run in runs)
