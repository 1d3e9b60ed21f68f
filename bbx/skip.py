"""Which images a feature file does not hold yet: those that are new, and those that changed since."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from bbx.errors import ImageError, StartError
from bbx.images import ImageList, digest_file
from bbx.spec import InputFile
from bbx.store import FeatureFile, open_finished_or_partial

_NAMED = 5


@dataclass(frozen=True, slots=True)
class Unheld:
    """The rows of a list that a file lacks, ascending, and among them those that it holds in an older version."""

    rows: list[int]
    changed: list[str]


def unheld(images: ImageList, file: FeatureFile) -> Unheld:
    """The images that `file` has no done row of, or of another content: by size, mtime, then digest."""
    held = {file.keys[row]: row for row in file.done.tolist()}
    recorded = file.inputs()
    rows, changed = [], []
    for row, key in enumerate(images.keys):
        if key not in held:
            rows.append(row)
        elif has_changed(images.path(row), recorded[held[key]]):
            rows.append(row)
            changed.append(key)
    return Unheld(rows, changed)


def skip_held(images: ImageList, path: str | os.PathLike[str]) -> ImageList:
    """`images` without those that the feature file at `path` holds; its warnings name the changed ones.

    Raises `StartError` where none is left.
    """
    with open_finished_or_partial(path) as file:
        found = unheld(images, file)
        unknown = not file.sealed
    told = f"{len(images) - len(found.rows):,} of {len(images):,} images are in {path}"
    if not found.rows:
        raise StartError(f"there is nothing to extract: {told}", "new and changed images would be")
    notes = [told]
    if unknown:
        notes.append(f"{path} does not record its image files: whether one changed cannot be told")
    if found.changed:
        some = ", ".join(map(repr, found.changed[:_NAMED])) + ", …" * (len(found.changed) > _NAMED)
        notes.append(f"{len(found.changed):,} changed since and are extracted again: {some}")
    return images.only(found.rows, warnings=notes)


def has_changed(path: str, before: InputFile) -> bool:
    """Whether the file at `path` is another one; content decides where its digest was taken, and mtime where not."""
    if before == InputFile():
        return False  # a file of format 1.0 does not say
    try:
        facts = Path(path).stat()
        if InputFile.of(facts.st_size, facts.st_mtime_ns) == before._replace(digest=b""):
            return False
        if facts.st_size != before.nbytes or not before.digest:
            return True
        return digest_file(path).digest != before.digest
    except (OSError, ImageError):
        return True  # its row will say what is wrong
