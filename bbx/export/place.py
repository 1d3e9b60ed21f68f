"""Where an export is built, and how it comes to stand under its name: whole and durable, or not at all.

It grows inside `<output>.tmp/`, whose own mark tells it from a folder of the user's, and is renamed from there. What a
killed export left in it, the next one clears; the lock says whether one is still at work.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bbx.errors import StartError, WriteError
from bbx.store import disk
from bbx.store.lock import WriterLock

FACTS = "export.json"
_MARK, _MARK_TEXT = "being-written-by-bbx-export", "bbx export builds its output in this folder\n"
_NEW, _OLD = "new", "replaced"
# What lies below the first level of an export: the arrays of a zarr group, and nothing in the other formats.
_INNER = re.compile(r"[^/]+/(zarr\.json|c(/\d+)*)")

IsExport = Callable[[Path], bool]


def refuse_existing(output: Path, is_export: IsExport, *, overwrite: bool) -> None:
    """Raise `StartError` where `output` exists, unless `overwrite` is asked for and it is an export."""
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise StartError(f"{output} exists already", "--overwrite replaces it, -o another name leaves it alone")
    if not is_export(output):
        raise StartError(
            f"{output} is not overwritten, for it is no export of bbx in this format, or holds other things too",
            "choose another name with -o, or delete it yourself if it may go",
        )


@contextlib.contextmanager
def published(output: Path, is_export: IsExport, *, overwrite: bool) -> Iterator[Path]:
    """A path where the export is to be built; after the block it is `output`. An error in the block leaves nothing.

    Raises `StartError` where `output` cannot be begun, `WriteError` for an `OSError` in the block or after it.
    """
    if not output.parent.is_dir():
        raise StartError(f"the folder {output.parent} does not exist", f"mkdir -p {output.parent}")
    shelter = output.with_name(output.name + ".tmp")
    with disk.starting(output):
        lock = WriterLock(output)
    try:
        with disk.starting(output):
            _begin(shelter, output)
        try:
            try:
                refuse_existing(output, is_export, overwrite=overwrite)
                yield shelter / _NEW
                _sync(shelter / _NEW)
                # Again, for the writing may have taken hours, in which somebody else made something there.
                refuse_existing(output, is_export, overwrite=overwrite)
                _rename(shelter, output)
            finally:
                _clear(shelter, output)
        except OSError as error:
            raise _failed(output, shelter, error) from error
    finally:
        lock.release()


def _begin(shelter: Path, output: Path) -> None:
    if os.path.lexists(shelter):
        try:
            ours = not shelter.is_symlink() and (shelter / _MARK).read_text() == _MARK_TEXT
        except (OSError, ValueError):
            ours = False
        if not ours:
            raise StartError(f"{shelter} exists, where the export is built", "move it away, or choose another -o")
        _clear(shelter, output)
    shelter.mkdir()
    try:
        (shelter / _MARK).write_text(_MARK_TEXT)
    except BaseException:
        _clear(shelter, output)
        raise


def _rename(shelter: Path, output: Path) -> None:
    if output.is_dir():
        # A folder is not replaced in one step: a kill between these two lines is mended by `_clear`.
        output.rename(shelter / _OLD)
    (shelter / _NEW).replace(output)
    disk.sync_folder(output.parent)


def _clear(shelter: Path, output: Path) -> None:
    """Remove the shelter; an older export that was on its way out when all stopped goes back first."""
    if (shelter / _OLD).exists() and not os.path.lexists(output):
        (shelter / _OLD).rename(output)
    for inside in (_NEW, _OLD):
        if (shelter / inside).is_dir():
            shutil.rmtree(shelter / inside)
        else:
            (shelter / inside).unlink(missing_ok=True)
    (shelter / _MARK).unlink(missing_ok=True)
    shelter.rmdir()


def _failed(output: Path, shelter: Path, error: OSError) -> WriteError:
    left = f"the next export clears what is left in {shelter}" if shelter.exists() else "nothing of it was left behind"
    return WriteError(
        f"{output} could not be written: {error.strerror or error}",
        f"{left}: make room if the disk is full, or choose another place with -o",
    )


def _sync(place: Path) -> None:
    for path in [place, *place.rglob("*")]:
        if path.is_dir():
            disk.sync_folder(path)
        else:
            fd = os.open(path, os.O_RDWR)
            try:
                disk.make_durable(fd)
            finally:
                os.close(fd)


def nbytes_of(place: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return sum(path.stat().st_size for path in [place, *place.rglob("*")] if path.is_file())


def write_json(path: Path, data: dict[str, Any]) -> None:
    """`data` as JSON in ASCII: a key with lone surrogates comes back as it was."""
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="ascii")


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of an export that `path` holds, empty for any other file."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def only_holds(folder: Path, facts: dict[str, Any], to: str) -> bool:
    """Whether `facts` are those of an export to `to`, and there is nothing in `folder` that it did not put there."""
    holds = facts.get("holds")
    if folder.is_symlink() or "bbx_export" not in facts or facts.get("to") != to or not isinstance(holds, list):
        return False
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            return False
        if name not in holds and not (name.split("/")[0] in holds and _INNER.fullmatch(name)):
            return False
    return True
