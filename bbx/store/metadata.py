"""Compare a file's HDF5 objects with those that `skeleton.build` lays out for its run: the part no checksum covers.

Links, groups, types, shapes, attributes, dimension scales and NeXus' plot are compared one by one; what a user added is
told and does no harm.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from bbx.errors import FileError, StartError
from bbx.store import format, skeleton, trust

_BLOCK = 1 << 20
_SECONDS = 600.0
_CPU_SECONDS = 120
_OPENING = "the file"
# The very modules that this process sees; -P: nothing from the current folder besides.
_COMMAND = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from bbx.store.metadata import main; main(sys.argv[2])"
)
# HDF5 itself keeps attributes below 64 KB; what is larger is not read.
_ATTRIBUTE_NBYTES = 1 << 20
_NOTED = 20
# Attributes that say nothing of the run, or that opening the file checks already.
_BY_VALUE = ("creator", "row_start", "row_stop", "rows_total", "bbx_format_version", "bbx_run_sha256",
             "bbx_label_crc32")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Report:
    """What differs from the file that bbx lays out for this run, and what is there beside it, each a sentence."""

    damage: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def report(path: Path) -> Report:
    """Compare the file at `path`, in a process of its own: HDF5 crashes over some damaged attributes.

    Raises `FileError` where it does so, or never ends, before the file is even open, `StartError` where no process can
    be started, or it is ended from outside.
    """
    command = [sys.executable, "-P", "-c", _COMMAND, json.dumps(sys.path), os.fspath(path.absolute())]
    try:
        ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=False)
        _check_outside(path, ran)
        output, end = ran.stdout, _end(ran)
    except subprocess.TimeoutExpired as error:
        output, end = error.stdout or b"", f"does not end within {_SECONDS:g} s"
    lines = [json.loads(line) for line in output.splitlines(keepends=True) if line.endswith(b"\n")]
    if lines and isinstance(lines[-1], dict):
        return Report(tuple(lines[-1]["damage"]), tuple(lines[-1]["notes"]))
    if not lines:
        raise StartError(f"the process that compares {path} with its format {end}", "is bbx installed whole?")
    if lines[-1] == _OPENING:
        raise FileError(f"{path} is damaged: opening it {end}", "copy it again, or extract it again")
    return Report((f"reading {lines[-1]} {end}",))


def main(path: str) -> None:
    """What `report` runs: says where it is, line by line, and ends with all that it found."""

    def say(data: object) -> None:
        sys.stdout.write(json.dumps(data) + "\n")
        sys.stdout.flush()

    _limit_time()
    say(_OPENING)
    found = Report()
    with contextlib.suppress(FileError):  # which the other process will meet as well, and raise
        opened = trust.open_checked(Path(path))
        say(f"/{format.PATH}")
        for _ in opened.key_blocks():  # likewise read there once more
            continue
        say(f"/{format.IMAGE}")
        found = Report(tuple(_image_index(opened)))
        rest = _compare(opened, say)
        found = Report(found.damage + rest.damage, rest.notes)
    say({"damage": found.damage, "notes": found.notes})


def _limit_time() -> None:
    """HDF5 goes round in circles over some damaged files: then the system ends it."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
        if soft < 0 or soft > _CPU_SECONDS:  # else the user's own, which `_check_outside` knows
            resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, hard))


def _check_outside(path: Path, ran: subprocess.CompletedProcess[bytes]) -> None:
    """Raises `StartError` where it was not the file that ended the process, but the system, or the user's limit."""
    if sys.platform == "win32":
        return
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_CPU)
    what = f"the process that compares {path} with its format"
    if -ran.returncode == signal.SIGXCPU and 0 <= soft <= _CPU_SECONDS:
        raise StartError(f"{what} reached the limit on computing time, {soft} s", "raise it (ulimit -t)")
    if -ran.returncode == signal.SIGKILL:
        raise StartError(f"{what} was killed (SIGKILL)", "is the memory full, or a limit of the batch system reached?")


def _compare(opened: trust.OpenFile, say: Callable[[str], None]) -> Report:
    # In memory, and the stages without their values: nothing here takes room by what the file claims to hold.
    with h5py.File("expected", "w", driver="core", backing_store=False, track_times=False) as expected:
        skeleton.lay_out(expected, opened.facts.run, ["image"], format.encode_attempt(None), make_stage=_unallocated)
        names = ["", *(name for name in _names(expected) if opened.facts.sealed or name not in _later())]
        pair = _Pair(expected, opened, names)
        damage = []
        for name in names:
            say(f"/{name}")
            damage += pair.unlike(name)
        return Report((*damage, *_creator(opened.file)), tuple(_added(expected, opened.file, names)))


def _end(ran: subprocess.CompletedProcess[bytes]) -> str:
    """How it came to an end that it did not mean."""
    if sys.platform != "win32" and -ran.returncode == signal.SIGXCPU:
        return f"does not end within {_CPU_SECONDS} s of computing"
    if -ran.returncode in set(signal.Signals):
        return f"crashes HDF5 ({signal.Signals(-ran.returncode).name})"
    words = ran.stderr.decode("utf-8", "replace").strip().splitlines()
    return f"fails ({words[-1][:200] if words else f'exit code {ran.returncode}'})"


def _unallocated(file: h5py.File, column: format.Column, rows: int) -> None:
    file.create_dataset(column.name, (rows, *column.row_shape), column.dtype)


def _image_index(opened: trust.OpenFile) -> list[str]:
    """What is wrong with `/image`, which counts the rows from `row_start` on."""
    facts = opened.facts
    try:
        with trust.guarded(opened.path):
            image = opened.file[format.IMAGE]
            if image.shape != (facts.rows,) or image.dtype.kind != "i" or not _in_one_piece(image):
                return [f"/{format.IMAGE} does not hold {facts.rows} whole numbers in one piece"]
            for start in range(0, facts.rows, _BLOCK):
                stop = min(start + _BLOCK, facts.rows)
                wrong = np.flatnonzero(image[start:stop] != np.arange(start, stop) + facts.row_start)
                if wrong.size:
                    row = start + int(wrong[0])
                    return [f"/{format.IMAGE} says {image[row]} at row {row}, which is {facts.row_start + row}"]
    except FileError as error:
        return [f"/{format.IMAGE} cannot be read ({error.message})"]
    return []


class _Pair:
    """The file as it should be beside the file as it is; `names` are the objects that both should have."""

    def __init__(self, expected: h5py.File, opened: trust.OpenFile, names: list[str]) -> None:
        self._path = opened.path
        self._files = (expected, opened.file)
        self._names = set(names)
        self._sealed = opened.facts.sealed
        self._places = tuple(self._addresses(file) for file in self._files)
        self._by_row = {format.IMAGE, format.PATH, *opened.facts.columns} - {format.ATTEMPTS}

    def unlike(self, name: str) -> list[str]:
        """How `/name` differs."""
        try:
            with trust.guarded(self._path):
                kinds = [_kind(file, name) for file in self._files]
                if kinds[0] != kinds[1]:
                    return [f"/{name} is {kinds[1]}, not {kinds[0]}"]
                if kinds[0].startswith("a link"):
                    return []
                return [*self._data(name), *self._attributes(name)]
        except FileError as error:
            return [f"/{name} cannot be read ({error.message})"]

    def _data(self, name: str) -> Iterator[str]:
        """Type, shape of a row, and where it is a scale, its values."""
        expected, found = (file[name or "/"] for file in self._files)
        if not isinstance(expected, h5py.Dataset):
            return
        if _type(expected.dtype) != _type(found.dtype):
            yield f"/{name} has type {found.dtype}, not {expected.dtype}"
            return
        rows = int(name in self._by_row)
        if expected.shape[rows:] != found.shape[rows:]:
            yield f"/{name} has shape {found.shape}, not {expected.shape}"
        elif name not in self._by_row and name not in (format.ATTEMPTS, format.RUN):
            if not _in_one_piece(found):
                yield f"/{name} is not stored in one piece in the file"
            elif not np.array_equal(expected[...], found[...]):
                yield f"/{name} holds other coordinates than its stage has"

    def _attributes(self, name: str) -> Iterator[str]:
        expected, found = (file[name or "/"] for file in self._files)
        for word in expected.attrs:
            if word == "bbx_label_crc32" and not self._sealed:
                continue
            if word not in found.attrs:
                yield f"/{name} lacks the attribute {word}"
            elif not name and word in _BY_VALUE:
                continue
            else:
                values = [self._value(side, item, word) for side, item in enumerate((expected, found))]
                if not self._same(word, *values):
                    yield f"the attribute {word} of /{name} is {_short(values[1])}, not {_short(values[0])}"

    def _value(self, side: int, owner: Any, word: str) -> Any:
        """An attribute as plain data; references as the names that they lead to, None where they lead astray."""
        raw = owner.attrs.get_id(word)
        if raw.get_storage_size() > _ATTRIBUTE_NBYTES:
            return f"{raw.get_storage_size()} bytes"
        value = owner.attrs[word]
        if word == "DIMENSION_LIST":
            return [[self._target(side, reference) for reference in references] for references in value]
        if word == "REFERENCE_LIST":
            return [(self._target(side, reference), int(dimension)) for reference, dimension in value]
        if isinstance(value, h5py.Empty):
            return "nothing"
        return _type(raw.dtype), np.asarray(value).tolist()

    def _same(self, word: str, expected: Any, found: Any) -> bool:
        if word != "REFERENCE_LIST" or not isinstance(found, list):
            return bool(expected == found)
        # A user's own dataset may use the scale as well; one that format 1.0 lacks does not.
        return {item for item in expected if item[0] in self._names} <= set(found)

    def _addresses(self, file: h5py.File) -> dict[int, str]:
        found = {}
        for name in self._names:
            try:
                if _kind(file, name) == "a dataset":
                    found[h5py.h5o.get_info(file[name].id).addr] = name
            except Exception:  # HDF5 raises anything over a damaged object, which `unlike` then names.
                continue
        return found

    def _target(self, side: int, reference: Any) -> str | None:
        try:
            return self._places[side].get(h5py.h5o.get_info(self._files[side][reference].id).addr, "(added)")
        except Exception:  # a reference that leads nowhere raises anything
            return None


def _names(file: h5py.File) -> list[str]:
    """Every object by its path, parents first."""
    found, waiting = [], [""]
    while waiting:
        parent = waiting.pop()
        for word in file[parent or "/"]:
            name = f"{parent}/{word}".strip("/")
            found.append(name)
            if _kind(file, name) == "a group":
                waiting.append(name)
    return found


def _kind(file: h5py.File, name: str) -> str:
    if not name:
        return "a group"
    parent, _, word = name.rpartition("/")
    group = file.get(parent or "/")
    link = group.get(word, getlink=True) if isinstance(group, h5py.Group) and word in group else None
    if isinstance(link, h5py.SoftLink):
        return f"a link to {link.path}"
    if link is None:
        return "missing"
    return "a group" if group.get(word, getclass=True) is h5py.Group else "a dataset"


def _later() -> tuple[str, ...]:
    """The datasets that format 1.0 does not have."""
    return (format.INPUT_NBYTES, format.INPUT_MTIME, format.INPUT_DIGEST, format.SEAL)


def _type(dtype: np.dtype[Any]) -> tuple[str, Any, bool]:
    return str(dtype), h5py.check_string_dtype(dtype), h5py.check_ref_dtype(dtype) is not None


def _in_one_piece(data: h5py.Dataset) -> bool:
    plan = data.id.get_create_plist()
    return plan.get_layout() == h5py.h5d.CONTIGUOUS and not plan.get_external_count()


def _creator(file: h5py.File) -> list[str]:
    """The version of bbx that laid the file out may be any, but it is a text that says so."""
    creator = file.attrs.get("creator")
    if isinstance(creator, str) and creator.startswith("bbx ") and creator.isprintable():
        return []
    return [f"the attribute creator of / is {_short(creator)}"]


def _added(expected: h5py.File, file: h5py.File, names: list[str]) -> list[str]:
    """What stands in the file and is not bbx's."""
    found = []
    for name in names:
        try:
            if _kind(expected, name).startswith("a link") or _kind(file, name) != _kind(expected, name):
                continue
            ours, theirs = expected[name or "/"], file[name or "/"]
            found += [
                f"/{name} has an attribute {word!r} of its own" for word in theirs.attrs if word not in ours.attrs
            ]
            if isinstance(ours, h5py.Group):
                found += [f"/{name}/{word} is not bbx's".replace("//", "/") for word in theirs if word not in ours]
        except Exception:  # `unlike` has named the damage
            continue
    more = [f"and {len(found) - _NOTED} more such"] if len(found) > _NOTED else []
    return found[:_NOTED] + more


def _short(value: object) -> str:
    text = repr(value[-1] if isinstance(value, tuple) and value else value)
    return text if len(text) <= 80 else f"{text[:77]}…"
