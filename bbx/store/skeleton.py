"""Build the empty file: every dataset laid out, contiguous and preallocated, so that HDF5 never touches it again.

Writing a row afterwards is a plain write at a known offset, and no crash can meet HDF5's metadata half changed. Only
the stages of a packed or a virtual file lie otherwise: what makes them is an argument, and all else is the same.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from bbx.errors import StartError
from bbx.spec import RunSpec, Stage
from bbx.store import disk, format
from bbx.store.format import Column

_BLOCK = 16_384
LIBVER = ("earliest", "v110")
"""What HDF5 1.10 can read."""

MakeStage = Callable[[h5py.File, Column, int], object]
"""Creates the dataset of a stage, a column of so many rows."""


@dataclass(frozen=True, slots=True)
class Part:
    """Which rows of a job a file holds: those from `start` on, of `total`; by itself, all of them."""

    start: int = 0
    total: int | None = None


WHOLE = Part()


def contiguous(file: h5py.File, column: Column, rows: int) -> None:
    """The stage in one piece, its bytes there from the start."""
    create(file, column.name, column.dtype, (rows, *column.row_shape))


def build(
    path: Path,
    run: RunSpec,
    keys: Sequence[str],
    attempt: bytes,
    *,
    part: Part = WHOLE,
    make_stage: MakeStage = contiguous,
    stage_nbytes: int | None = None,
) -> dict[str, Column]:
    """Create the skeleton for `keys` at `path`, durable; returns its columns by name, placed as `lay_out` says.

    `stage_nbytes`: what all stages take in the file, by default what contiguous ones do. Raises `StartError` where it
    has no room, `OSError`.
    """
    _check_fits(path, run, keys, run.row_nbytes * len(keys) if stage_nbytes is None else stage_nbytes)
    with h5py.File(
        path,
        "w",
        libver=LIBVER,
        alignment_threshold=format.ALIGN_FROM,
        alignment_interval=format.ALIGN_TO,
        track_times=False,
        locking="best-effort",
    ) as file:
        columns = lay_out(file, run, keys, attempt, part=part, make_stage=make_stage)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        disk.reserve(path, fd, os.fstat(fd).st_size)
        os.fsync(fd)
    finally:
        os.close(fd)
    return columns


def lay_out(
    file: h5py.File,
    run: RunSpec,
    keys: Sequence[str],
    attempt: bytes,
    *,
    part: Part = WHOLE,
    make_stage: MakeStage = contiguous,
) -> dict[str, Column]:
    """Create everything in the open, empty `file`; returns its columns by name, those that lie in one piece placed."""
    _root_attributes(file, run, len(keys), part)
    _rows(file, run, keys, part.start, make_stage)
    for stage in run.stages:
        _stage(file, stage)
    _plot(file, run.stages)
    _text(file, format.RUN, run.to_json())
    file[format.ATTEMPTS][0] = np.frombuffer(attempt, np.uint8)
    made = {column.name: (column, file[column.name]) for column in format.columns(run)}
    return {name: replace(column, offset=data.id.get_offset()) for name, (column, data) in made.items()}


def _check_fits(path: Path, run: RunSpec, keys: Sequence[str], stage_nbytes: int) -> None:
    """Meet a full disk here with an error: HDF5 itself crashes the process when its own writes fail."""
    disk.refuse_link(path)
    # What escapes may make of a key; HDF5 adds some bytes to each text.
    texts = sum(len(key) * (2 if key.isascii() else 6) + 64 for key in keys)
    row = sum(column.row_nbytes for column in format.columns(run) if column.name != format.ATTEMPTS) - run.row_nbytes
    small = (1 << 20) + texts + len(keys) * (row + 64 + 8 * len(run.stages))
    whole = small + stage_nbytes
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        disk.check_room(path, whole)
        try:
            os.ftruncate(fd, whole)
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            raise disk.too_big(path, whole) from None
        os.ftruncate(fd, 0)
        disk.reserve(path, fd, small)
    finally:
        os.close(fd)


def _root_attributes(file: h5py.File, run: RunSpec, rows: int, part: Part) -> None:
    from importlib import metadata  # for reading nobody needs it

    stop = part.start + rows
    total = stop if part.total is None else part.total
    file.attrs.update(
        {
            "NX_class": "NXroot",
            "default": "plot",
            "creator": f"bbx {metadata.version('bbx')}",
            "bbx_format": format.FORMAT,
            "bbx_format_version": format.VERSION,
            "bbx_run_sha256": run.sha256,
            "coordinates": f"{format.PATH} {format.STATUS}",
            "row_start": np.int64(part.start),
            "row_stop": np.int64(stop),
            "rows_total": np.int64(total),
            "bbx_label_crc32": np.uint32(format.label(run.to_json(), part.start, stop, total)),
        }
    )


def _rows(file: h5py.File, run: RunSpec, keys: Sequence[str], first: int, make_stage: MakeStage) -> None:
    """Everything with one element per image: the index from `first` on, the keys, and the empty columns."""
    rows = len(keys)
    image = create(file, format.IMAGE, "<i8", (rows,))
    image.make_scale(format.IMAGE)
    image.attrs["long_name"] = "row index over all shards"
    for start in range(0, rows, _BLOCK):
        image[start : start + _BLOCK] = np.arange(first + start, first + min(start + _BLOCK, rows))
    path = create(file, format.PATH, h5py.string_dtype("utf-8"), (rows,))
    path.attrs["long_name"] = "image, relative to its root"
    for start, block in zip(range(0, rows, _BLOCK), _blocks(keys), strict=True):
        path[start : start + _BLOCK] = np.array([format.encode_key(key) for key in block], dtype=object)
    stages = {stage.name for stage in run.stages}
    for column in format.columns(run):
        if column.name in stages:
            make_stage(file, column, rows)
            continue
        dtype = h5py.string_dtype("utf-8", format.FAILURE_NBYTES) if column.name == format.FAILURE else column.dtype
        length = format.ATTEMPT_SLOTS if column.name == format.ATTEMPTS else rows
        made = create(file, column.name, dtype, (length, *column.row_shape))
        if column.name != format.ATTEMPTS:
            made.dims[0].attach_scale(image)
    path.dims[0].attach_scale(image)
    file[format.STATUS].attrs["flag_values"] = np.arange(3, dtype=np.uint8)
    file[format.STATUS].attrs["flag_meanings"] = " ".join(format.STATUS_WORDS)


def _blocks(keys: Sequence[str]) -> Iterator[list[str]]:
    rest = iter(keys)
    while block := list(itertools.islice(rest, _BLOCK)):
        yield block


def create(file: h5py.File, name: str, dtype: Any, shape: tuple[int, ...]) -> h5py.Dataset:
    """A contiguous dataset whose bytes exist from the start, unfilled: a new file reads as 0 there."""
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.CONTIGUOUS)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plan.set_obj_track_times(False)
    # HDF5 insists on filling variable-length strings.
    if h5py.check_string_dtype(np.dtype(dtype)) is None or np.dtype(dtype).itemsize == format.FAILURE_NBYTES:
        plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    kind = h5py.h5t.py_create(np.dtype(dtype), logical=True)
    space = h5py.h5s.create_simple(shape)
    return h5py.Dataset(h5py.h5d.create(file.id, name.encode(), kind, space, plan, lcpl=links))


def _stage(file: h5py.File, stage: Stage) -> None:
    """Label the stage's dataset, with one scale per axis, for xarray and other readers of dimension scales."""
    data = file[stage.name]
    axes = format.axes(stage)
    data.attrs["long_name"] = f"{stage.name} features"
    data.attrs["module"] = stage.module
    data.attrs["stride"] = float(stage.stride)
    data.attrs["interpretation"] = "image" if "y" in axes else "spectrum"
    data.dims[0].label = format.IMAGE
    data.dims[0].attach_scale(file[format.IMAGE])
    for dim, (axis, length) in enumerate(zip(axes, stage.shape, strict=True), start=1):
        name = f"{stage.name}_{axis}"
        values = format.coordinates(stage, axis, length)
        scale = create(file, name, values.dtype, values.shape)
        scale[...] = values
        scale.make_scale(name)
        scale.attrs["long_name"] = f"{axis} of {stage.name}"
        if axis in ("y", "x"):
            scale.attrs["units"] = "pixel"
        data.dims[dim].label = name
        data.dims[dim].attach_scale(scale)


def _plot(file: h5py.File, stages: Sequence[Stage]) -> None:
    """NeXus' view of the stages, by soft links, so that H5Web and silx plot the file as is."""
    plot = file.create_group("plot")
    plot.attrs["NX_class"] = "NXentry"
    plot.attrs["default"] = stages[0].name
    for stage in stages:
        group = plot.create_group(stage.name)
        group.attrs["NX_class"] = "NXdata"
        group.attrs["signal"] = "features"
        group.attrs["axes"] = [".", *format.axes(stage)]
        group["features"] = h5py.SoftLink(f"/{stage.name}")
        for axis in format.axes(stage):
            group[axis] = h5py.SoftLink(f"/{stage.name}_{axis}")


def _text(file: h5py.File, name: str, text: str) -> None:
    data = text.encode()
    if len(data) > format.MAX_RUN_NBYTES:
        raise StartError(f"the run description has {len(data)} bytes, more than {format.MAX_RUN_NBYTES}")
    made = create(file, name, h5py.string_dtype("utf-8"), ())
    made[()] = data
