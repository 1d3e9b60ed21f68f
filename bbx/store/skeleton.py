"""Build the empty file: every dataset laid out, contiguous and preallocated, so that HDF5 never touches it again.

Writing a row afterwards is a plain write at a known offset, and no crash can meet HDF5's metadata half changed.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from bbx.errors import StartError
from bbx.spec import RunSpec, Stage
from bbx.store import disk, format

_BLOCK = 16_384


def build(path: Path, run: RunSpec, keys: Sequence[str], attempt: bytes) -> None:
    """Create the skeleton for `keys` at `path`, durable. Raises `StartError` where it has no room, `OSError`."""
    _check_fits(path, run, keys)
    with h5py.File(
        path,
        "w",
        libver=("earliest", "v110"),
        alignment_threshold=format.ALIGN_FROM,
        alignment_interval=format.ALIGN_TO,
        track_times=False,
        locking="best-effort",
    ) as file:
        _root_attributes(file, run, len(keys))
        _rows(file, run, keys)
        for stage in run.stages:
            _stage(file, stage)
        _plot(file, run.stages)
        _text(file, format.RUN, run.to_json())
        file[format.ATTEMPTS][0] = np.frombuffer(attempt, np.uint8)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        disk.reserve(path, fd, os.fstat(fd).st_size)
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_fits(path: Path, run: RunSpec, keys: Sequence[str]) -> None:
    """Meet a full disk here with an error: HDF5 itself crashes the process when its own writes fail."""
    texts = sum(map(len, keys)) * 2
    small = (1 << 20) + texts + len(keys) * (16 + 8 + 1 + format.FAILURE_NBYTES + (4 + 8) * len(run.stages) + 64)
    whole = small + run.row_nbytes * len(keys)
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


def _root_attributes(file: h5py.File, run: RunSpec, rows: int) -> None:
    file.attrs.update(
        {
            "NX_class": "NXroot",
            "default": "plot",
            "creator": f"bbx {metadata.version('bbx')}",
            "bbx_format": format.FORMAT,
            "bbx_format_version": format.VERSION,
            "bbx_run_sha256": run.sha256,
            "coordinates": f"{format.PATH} {format.STATUS}",
            "row_start": np.int64(0),
            "row_stop": np.int64(rows),
            "rows_total": np.int64(rows),
        }
    )


def _rows(file: h5py.File, run: RunSpec, keys: Sequence[str]) -> None:
    """Everything with one element per image: the index, the keys, and the empty columns."""
    rows = len(keys)
    image = _create(file, format.IMAGE, "<i8", (rows,))
    image.make_scale(format.IMAGE)
    image.attrs["long_name"] = "row index over all shards"
    for start in range(0, rows, _BLOCK):
        image[start : start + _BLOCK] = np.arange(start, min(start + _BLOCK, rows))
    path = _create(file, format.PATH, h5py.string_dtype("utf-8"), (rows,))
    path.attrs["long_name"] = "image, relative to its root"
    for start, block in zip(range(0, rows, _BLOCK), _blocks(keys), strict=True):
        path[start : start + _BLOCK] = np.array([format.encode_key(key) for key in block], dtype=object)
    for column in format.columns(run):
        dtype = h5py.string_dtype("utf-8", format.FAILURE_NBYTES) if column.name == format.FAILURE else column.dtype
        length = format.ATTEMPT_SLOTS if column.name == format.ATTEMPTS else rows
        made = _create(file, column.name, dtype, (length, *column.row_shape))
        if column.name != format.ATTEMPTS:
            made.dims[0].attach_scale(image)
    path.dims[0].attach_scale(image)
    file[format.STATUS].attrs["flag_values"] = np.arange(3, dtype=np.uint8)
    file[format.STATUS].attrs["flag_meanings"] = " ".join(format.STATUS_WORDS)


def _blocks(keys: Sequence[str]) -> Iterator[list[str]]:
    rest = iter(keys)
    while block := list(itertools.islice(rest, _BLOCK)):
        yield block


def _create(file: h5py.File, name: str, dtype: Any, shape: tuple[int, ...]) -> h5py.Dataset:
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
        scale = _create(file, name, values.dtype, values.shape)
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
    made = _create(file, name, h5py.string_dtype("utf-8"), ())
    made[()] = data
