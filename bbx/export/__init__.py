"""What `bbx export` does: the features of a file in another library's format, row for row and bit for bit.

Four formats, one module each. All read through `Source`, which checks every row before it is handed on, and write
inside `published`, so that an export is there whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from bbx.errors import StartError, UsageError
from bbx.export import npy, parquet, safetensors, zarr
from bbx.export.place import nbytes_of, published, refuse_existing
from bbx.export.source import Missing, Source
from bbx.spec import one_of
from bbx.stages import select_stages
from bbx.store import FeatureFile, open_finished_or_partial

To = Literal["npy", "zarr", "safetensors", "parquet"]


class Format(Protocol):
    """What a module of this package supplies.

    `SUFFIX` is added to the feature file's name to make the export's. `check` raises for what the format cannot hold,
    before anything is written. `write` builds the export at a path where nothing is yet, and returns the paths to open,
    relative to it. `is_export` tells an export of this format from anything else, which is never overwritten.
    """

    SUFFIX: str

    def check(self, source: Source, /) -> None: ...
    def write(self, source: Source, place: Path, /) -> tuple[str, ...]: ...
    def is_export(self, path: Path, /) -> bool: ...


FORMATS: dict[str, Format] = {"npy": npy, "zarr": zarr, "safetensors": safetensors, "parquet": parquet}


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: `paths` are what other programs open, `output` the file or folder that holds them all.

    `rows` were exported, of which `failed + pending` hold NaN with `missing="nan"`; with `"skip"` those are left out.
    `nbytes` is the export's size on disk.
    """

    output: Path
    paths: tuple[Path, ...]
    rows: int
    failed: int
    pending: int
    stages: tuple[str, ...]
    missing: Missing
    nbytes: int


def export(
    path: str | os.PathLike[str],
    to: To,
    output: str | os.PathLike[str] | None = None,
    *,
    stages: str | Iterable[str | int] = "all",
    missing: Missing = "skip",
    overwrite: bool = False,
    shard_nbytes: int = safetensors.SHARD_NBYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write the features of the file at `path`, or of its unfinished `.partial`, as `to`.

    `output` is beside the file by default: `features_npy/`, `features.zarr`, `features_safetensors/` or
    `features.parquet`. `missing` says what becomes of rows that failed or are pending: `skip` leaves them out, `nan`
    keeps their place. `overwrite` replaces an earlier export in the same format and nothing else. `shard_nbytes` is the
    most that one safetensors file holds, and what it costs in memory. `progress(done, total)` hears of bytes read.

    Raises `UsageError` for a stage or a format that does not fit, `StartError` for an output that exists,
    `MissingExtraError`, `FileError` for a damaged row, `WriteError` for a full disk; then nothing is left behind.
    """
    one_of("--to", to, To)
    one_of("--missing", missing, Missing)
    safetensors.check_shard_nbytes(shard_nbytes)
    form = FORMATS[to]
    with open_finished_or_partial(path) as file:
        place = _place(file, to, form.SUFFIX, output)
        names = select_stages(list(file.stages), stages)
        source = Source(file, names, to, missing=missing, shard_nbytes=shard_nbytes, progress=progress)
        if not len(source):
            raise StartError(f"{file.path} has no finished row to export", "run its bbx extract command again")
        form.check(source)
        refuse_existing(place, form.is_export, overwrite=overwrite)
        source.check_seals()
        with published(place, form.is_export, overwrite=overwrite) as new:
            written = form.write(source, new)
        counts = file.counts
    paths = tuple(place / name for name in written)
    return Exported(place, paths, len(source), counts.failed, counts.pending, names, missing, nbytes_of(place))


def _place(file: FeatureFile, to: To, suffix: str, output: str | os.PathLike[str] | None) -> Path:
    """Where the export goes, a final symbolic link followed, since a rename would replace the link itself."""
    if output is None:
        stem = Path(file.path.name.removesuffix(".partial")).stem
        return file.path.with_name(stem + suffix)
    given = Path(output)
    place = given.resolve() if given.is_symlink() else given
    if place.name in ("", ".."):
        raise UsageError(f"{str(output)!r} has no name of its own", "name the export, such as -o features" + suffix)
    if place.suffix == f".{to}" != suffix:
        raise UsageError(f"an export to {to} is a folder, and {place.name} reads as a file", f"-o {place.stem}")
    return place
