"""Stages that lie in other files: which rows of which file make up a virtual dataset, and nothing odder than that.

HDF5 itself reads fill values, and says nothing, where a source is missing; it crashes over a dataset that is its own
source. So bbx writes and reads one shape of mapping only, whole rows of a file named by a relative path, and checks
each source when the file is opened (`trust`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from bbx.errors import FileError, StartError
from bbx.store import skeleton
from bbx.store.checksum import crc32
from bbx.store.format import Column

MOST_PIECES = 4096
"""HDF5 goes through all pieces of a virtual dataset at each read."""


@dataclass(frozen=True, slots=True)
class Piece:
    """`count` rows from `first` on of the source file `name` at the rows from `at` on.

    `rows`: how many the source has; 0 where a mapping does not say it.
    """

    name: str
    rows: int
    first: int
    count: int
    at: int


def maker(pieces: dict[str, list[Piece]]) -> skeleton.MakeStage:
    """Makes the stages as virtual datasets of their `pieces`, file names relative; a row of none is NaN.

    Raises `StartError` for more pieces than are sensible.
    """
    for stage, parts in pieces.items():
        if len(parts) > MOST_PIECES:
            raise StartError(
                f"{stage} would take its rows from {len(parts)} places, and --virtual does up to {MOST_PIECES}",
                "leave --virtual out: a copy has no such limit",
            )

    def make(file: h5py.File, column: Column, rows: int) -> None:
        layout = h5py.VirtualLayout((rows, *column.row_shape), column.dtype)
        for piece in pieces[column.name]:
            name = piece.name.replace("%", "%%")  # HDF5 counts blocks by %b
            source = h5py.VirtualSource(name, column.name, (piece.rows, *column.row_shape), column.dtype)
            layout[piece.at : piece.at + piece.count] = source[piece.first : piece.first + piece.count]
        file.create_virtual_dataset(column.name, layout, fillvalue=np.nan)

    return make


def pieces(data: h5py.Dataset) -> list[Piece]:
    """What a virtual dataset is made of. Raises `FileError` for any mapping but whole rows of a stage of that name."""
    found = []
    for source in data.virtual_sources():
        name = source.file_name.replace("%%", "\0")
        if "%" in name or source.dset_name.strip("/") != data.name.strip("/"):
            raise FileError(
                f"{data.name} takes rows from {source.dset_name!r} of {source.file_name!r}, no stage of that name"
            )
        at, count = _rows(data, source.vspace, data.shape)
        first, rows = 0, count  # a source taken whole says no more
        if source.src_space.get_select_type() != h5py.h5s.SEL_ALL:
            (first, same), rows = _rows(data, source.src_space, (source.src_space.shape[0], *data.shape[1:])), 0
            if count != same:
                raise FileError(f"{data.name} takes {same} rows of {source.file_name!r} for {count}")
        found.append(Piece(name.replace("\0", "%"), rows, first, count, at))
    found.sort(key=lambda piece: piece.at)
    for one, after in pairwise(found):
        if after.at < one.at + one.count:
            raise FileError(f"{data.name} takes row {after.at} from two places")
    return found


def _rows(data: h5py.Dataset, space: h5py.h5s.SpaceID, shape: tuple[int, ...]) -> tuple[int, int]:
    """The first and the number of the rows that `space` selects, all of each."""
    if space.shape != shape or not space.get_select_npoints():
        raise FileError(f"{data.name} takes rows of shape {space.shape[1:]} for {data.shape[1:]}")
    low, high = space.get_select_bounds()
    size = np.subtract(high, low) + 1
    if tuple(size[1:]) != shape[1:] or int(np.prod(size)) != space.get_select_npoints():
        raise FileError(f"{data.name} takes parts of rows")
    return int(low[0]), int(size[0])


def place(folder: Path, name: str) -> Path:
    """The source `name` of a virtual file in `folder`. Raises `FileError` for one that lies elsewhere."""
    found = (folder / name).resolve()
    absolute = name.startswith(("/", "\\")) or re.match("[A-Za-z]:", name)
    if absolute or folder not in found.parents:
        raise FileError(f"rows are taken from {name!r}, outside the folder of the file", "copy all files into one")
    return found


def refuse_fill(rows: NDArray[Any], sums: Callable[[], NDArray[Any]]) -> None:
    """Raise `FileError` where HDF5 read `rows`, `(k, *row_shape)`, from a source that is gone: it gives NaN for them.

    `sums` gives the checksums `(k,)` that the file has for the rows; it is asked only if a row is all NaN.
    """
    flat = rows.reshape(len(rows), -1)
    odd = [row for row in np.flatnonzero(np.isnan(flat[:, 0])) if np.isnan(flat[row]).all()]
    if not odd:
        return
    wanted = sums()
    for row in odd:
        if crc32(flat[row].data) != int(wanted[row]):
            raise FileError("a file that rows are taken from went away, or cannot be opened", "open the file again")
