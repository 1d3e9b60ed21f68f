"""Decide what a run may do with its output, by looking only: begin it, go on with it, or leave it, for it is complete.

The plan and `--dry-run` print this answer, and the writer acts on the same one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from bbx.errors import FileError, RunMismatchError, StartError, UsageError
from bbx.spec import Mode, RunSpec
from bbx.store import format, trust

State = Literal["new", "resume", "complete"]
_OTHERWISE = "--mode overwrite replaces it, -o other.h5 leaves it alone"


@dataclass(frozen=True, slots=True)
class Target:
    """The output as found: whether this run is `new` there, can `resume`, or is `complete`, and its rows by status.

    `reopen`: it is finished, and goes on all the same, for its failed rows are to be tried again.
    """

    path: Path
    state: State
    pending: int
    done: int
    failed: int
    reopen: bool = False


def partial_path(path: Path) -> Path:
    """Where an unfinished output lies. Raises `FileError` for a path without a file's name, such as `.`"""
    if not path.name:
        raise FileError(f"{str(path)!r} is a folder, not a feature file", "name the file in it, such as features.h5")
    return path.with_name(path.name + ".partial")


def output_path(path: str | os.PathLike[str]) -> Path:
    """`path` with a final symbolic link followed, since a rename would replace the link and not the file."""
    given = Path(path)
    return given.resolve() if given.is_symlink() else given


def check_target(
    path: str | os.PathLike[str], run: RunSpec, keys: Sequence[str], mode: Mode = "auto", *, retry_failed: bool = False
) -> Target:
    """What `run` over the images `keys` finds at `path`; changes nothing on disk.

    `auto` begins, resumes or leaves be whatever fits; `new` wants nothing there; `resume` wants something of this run
    there (and finishes an interrupted overwrite); `overwrite` begins anew whatever is there. With `retry_failed`,
    failed rows count as pending.

    Raises `RunMismatchError` naming what differs, `FileError` for a file that is not bbx's, `StartError` for a missing
    or unwritable folder, `UsageError` for a run, keys or a mode that no file can have.
    """
    if mode not in get_args(Mode):
        raise UsageError(f"unknown mode {mode!r}", f"one of {', '.join(get_args(Mode))}")
    format.check_run(run)
    check_keys(keys)
    out = output_path(path)
    _check_folder(out)
    partial = partial_path(out)
    new = Target(out, "new", len(keys), 0, 0)
    if mode == "overwrite":
        _check_ours(out)
        return new
    if mode == "new":
        for place in (out, partial):
            if place.exists():
                raise RunMismatchError(f"{place} exists already", _OTHERWISE)
        return new
    if out.exists() and not (mode == "resume" and partial.exists()):
        found = _complete(out, run, keys)
        return _retried(found) if retry_failed else found
    if partial.exists():
        found = _compared(out, partial, run, keys)
        return replace(found, pending=found.pending + found.failed, failed=0) if retry_failed else found
    if mode == "resume":
        raise StartError(f"there is nothing to resume: neither {out} nor {partial} exists", "leave out --mode resume")
    return new


def _retried(found: Target) -> Target:
    """A finished file whose failed rows are to be tried again."""
    if not found.failed:
        return found
    with_offsets = trust.open_checked(found.path)
    with_offsets.close()
    if any(column.offset is None for column in with_offsets.facts.columns.values()):
        raise FileError(
            f"{found.path} is compressed: its failed rows cannot be written again",
            f"--skip-in {found.path} -o more.h5 extracts what it lacks, and bbx merge puts them together",
        )
    unfinished = partial_path(found.path)
    if unfinished.exists():
        raise StartError(f"{unfinished} is in the way of retrying rows of {found.path}", "finish or delete it first")
    return Target(found.path, "resume", found.failed, found.done, 0, reopen=True)


def check_keys(keys: Sequence[str]) -> None:
    """Raise `StartError` for no keys or one given twice. Eight bytes a key, since a set of a million is 100 MB."""
    if not len(keys):
        raise StartError("there are no images to write rows for")
    hashes = np.fromiter(map(hash, keys), np.int64, len(keys))
    hashes.sort()
    if (hashes[1:] == hashes[:-1]).any():
        seen: set[str] = set()
        for key in keys:
            if key in seen:
                raise StartError(f"the image {key!r} is listed twice", "each row needs its own key")
            seen.add(key)


def _check_folder(out: Path) -> None:
    if not out.parent.is_dir():
        raise StartError(f"the folder {out.parent} does not exist", f"mkdir -p {out.parent}")
    if out.is_dir():
        raise FileError(f"{out} is a folder", f"name a file in it: -o {out / 'features.h5'}")
    if not os.access(out.parent, os.W_OK):
        raise StartError(f"the folder {out.parent} cannot be written to", "choose another one with -o")


def _check_ours(out: Path) -> None:
    """Raise `FileError` where `out` holds anything but features: a slip in -o must not cost a photograph."""
    if not out.exists():
        return
    try:
        trust.open_checked(out).close()
    except FileError as error:
        raise FileError(
            f"{out} is not overwritten, for it is no feature file: {error.message}",
            "choose another name with -o, or delete it yourself if it may go",
        ) from None


def _complete(out: Path, run: RunSpec, keys: Sequence[str]) -> Target:
    hint = _OTHERWISE
    if partial_path(out).exists():
        hint += "; --mode resume goes on with the unfinished .partial beside it"
    found = _compared(out, out, run, keys, hint)
    if found.pending:
        raise FileError(
            f"{out} has {found.pending} pending rows, which a finished file never has",
            f"mv {out} {partial_path(out)} and run the same command again",
        )
    return Target(out, "complete", 0, found.done, found.failed)


def _compared(out: Path, place: Path, run: RunSpec, keys: Sequence[str], hint: str = _OTHERWISE) -> Target:
    """The state of `place`, which must hold this very run."""
    try:
        opened = trust.open_checked(place)
    except FileError as error:
        another = "choose another name with -o, or delete it yourself if it may go"
        raise FileError(error.message, "; ".join(filter(None, (error.hint, another)))) from None
    try:
        _compare_run(place, opened.facts.run, run, hint)
        with trust.guarded(place):
            _compare_keys(opened, keys, hint)
        counts = format.Counts.of(opened.status())
    finally:
        opened.close()
    return Target(out, "resume", counts.pending, counts.done, counts.failed)


def _compare_run(place: Path, there: RunSpec, here: RunSpec, hint: str) -> None:
    differences = here.differences(there)
    if not differences:
        return
    (name, mine, theirs), *others = differences
    also = f" (and so do {', '.join(other[0] for other in others)})" if others else ""
    raise RunMismatchError(f"{place} belongs to another run: {name} is {theirs} there and {mine} here{also}", hint)


def _compare_keys(opened: trust.OpenFile, keys: Sequence[str], hint: str) -> None:
    """Compare block by block, so that a million equal keys cost no memory; only a difference is worth two sets."""
    rest = iter(keys)
    row = 0
    for block in opened.key_blocks():
        here = [format.encode_key(key) for key in islice(rest, len(block))]
        if here != block:
            pairs = zip(here, block, strict=False)
            row += next((i for i, (mine, theirs) in enumerate(pairs) if mine != theirs), len(here))
            break
        row += len(block)
    else:
        if next(rest, None) is None:
            return
    raise RunMismatchError(_key_difference(opened, keys, row), hint)


def _key_difference(opened: trust.OpenFile, keys: Sequence[str], row: int) -> str:
    there = [format.decode_key(data) for block in opened.key_blocks() for data in block]
    new, gone = set(keys).difference(there), set(there).difference(keys)
    at = [repr(names[row]) if row < len(names) else "no image" for names in (there, keys)]
    changes = [
        f"{len(names)} {word} ({', '.join(map(repr, sorted(names)[:3]))}{', …' if len(names) > 3 else ''})"
        for word, names in (("new", new), ("gone", gone))
        if names
    ]
    return (
        f"{opened.path} belongs to another list of images: row {row} is {at[0]} there and {at[1]} here; "
        f"{len(there)} images there, {len(keys)} here, {', '.join(changes) or 'the same ones in another order'}"
    )
