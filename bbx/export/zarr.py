"""Features as a zarr group of format 3, laid out like the feature file: one array per stage, `path`, and axes.

`xarray.open_zarr` reads it, by dimension names and consolidated metadata. A chunk holds whole images: one, or of small
ones as many as fit in 64 KiB. Chunks lie together in shards of 32 MB, so that a million images are not a million files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bbx.errors import MissingExtraError, UsageError
from bbx.export.place import only_holds, read_facts
from bbx.export.source import Source
from bbx.spec import Stage
from bbx.store import format

SUFFIX = ".zarr"
CHUNK_NBYTES = 64 * 1024
SHARD_NBYTES = 32 * 1024 * 1024
_KEY_ROWS = 16_384
_METADATA = "zarr.json"


def check(source: Source) -> None:
    """Raise `MissingExtraError`, or `UsageError` for a name that zarr keeps for itself."""
    _library()
    for stage in source.stages:
        if stage.name == _METADATA or stage.name.startswith("__") or not stage.name.strip("."):
            raise UsageError(f"zarr cannot hold a stage named {stage.name}", "name the others with --stages")


def _library() -> Any:
    try:
        import zarr
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "zarr", "pip install 'bbx[zarr]'") from None
    return zarr


def write(source: Source, place: Path) -> tuple[str, ...]:
    """Array after array; every shard is written once, whole."""
    axes = {f"{stage.name}_{axis}": (stage, axis) for stage in source.stages for axis in format.axes(stage)}
    names = [stage.name for stage in source.stages]
    facts = source.facts([_METADATA, *names, *axes, format.IMAGE, format.PATH, format.STATUS])
    group = _library().create_group(place, attributes={**facts, "coordinates": "path status"})
    for stage in source.stages:
        _write_stage(source, stage, group)
    for name, (stage, axis) in axes.items():
        length = stage.shape[format.axes(stage).index(axis)]
        _write_whole(group, name, format.coordinates(stage, axis, length), name, _units(axis))
    _write_whole(group, format.IMAGE, source.images, format.IMAGE, {})
    flags = {"flag_values": list(range(len(format.STATUS_WORDS))), "flag_meanings": " ".join(format.STATUS_WORDS)}
    _write_whole(group, format.STATUS, source.status, format.IMAGE, flags)
    _write_keys(source, group)
    with warnings.catch_warnings():
        # The library notes that format 3 does not standardise this; xarray looks for it, and others pass it by.
        warnings.simplefilter("ignore")
        _library().consolidate_metadata(place)
    return (".",)


def _write_stage(source: Source, stage: Stage, group: Any) -> None:
    row_nbytes = stage.values * source.dtype.itemsize
    images = min(max(CHUNK_NBYTES // row_nbytes, 1), len(source))
    shard = images * max(min(SHARD_NBYTES // (images * row_nbytes), -(-len(source) // images)), 1)
    array = group.create_array(
        stage.name,
        shape=(len(source), *stage.shape),
        dtype=source.dtype,
        chunks=(images, *stage.shape),
        shards=(shard, *stage.shape),
        fill_value=np.nan,
        dimension_names=(format.IMAGE, *(f"{stage.name}_{axis}" for axis in format.axes(stage))),
        attributes={"long_name": f"features of {stage.name}", "module": stage.module, "stride": stage.stride},
    )
    for first, last in _steps(len(source), shard):
        array[first:last] = source.block(stage.name, first, last)


def _steps(count: int, step: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + step, count)) for first in range(0, count, step))


def _units(axis: str) -> dict[str, Any]:
    return {"units": "pixel"} if axis in ("y", "x") else {}


def _write_whole(group: Any, name: str, values: NDArray[Any], axis: str, attributes: dict[str, Any]) -> None:
    """An array of one number per image or per cell, `(n,)`."""
    array = group.create_array(
        name, shape=values.shape, dtype=values.dtype, chunks="auto", dimension_names=(axis,), attributes=attributes
    )
    array[:] = values


def _write_keys(source: Source, group: Any) -> None:
    array = group.create_array(
        format.PATH, shape=(len(source),), dtype=str, chunks=(_KEY_ROWS,), dimension_names=(format.IMAGE,)
    )
    for first, last in _steps(len(source), _KEY_ROWS):
        array[first:last] = np.array(source.texts(first, last), dtype=object)


def is_export(path: Path) -> bool:
    """Whether `path` is a group that `write` made, with nothing else in it."""
    attributes = read_facts(path / _METADATA).get("attributes")
    return isinstance(attributes, dict) and only_holds(path, attributes, "zarr")
