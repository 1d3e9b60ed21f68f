"""Features as `.npy`: a folder with one array per stage, `(n, c, h, w)`, and the keys as JSON beside them.

`<stage>.npy` holds the features, `image.npy` int64 `(n,)` each one's row in the whole job, `status.npy` uint8 `(n,)`
(0 pending, 1 done, 2 failed), `keys.json` a list of keys in the same order, `export.json` where it all comes from. No
stage can be called image or status, so no name stands for two things. Nothing is pickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bbx.export.place import FACTS, only_holds, read_facts, write_json
from bbx.export.source import Source
from bbx.store import check_room

SUFFIX = "_npy"
_KEYS = "keys.json"


def check(source: Source) -> None:
    """Everything fits."""


def write(source: Source, place: Path) -> tuple[str, ...]:
    """Stage after stage, streamed: a memory map is written at a third of the disk's speed (see format.md)."""
    check_room(place.parent, source.nbytes)
    place.mkdir()
    arrays = tuple(f"{name}.npy" for name in (*(stage.name for stage in source.stages), "image", "status"))
    for stage in source.stages:
        with (place / f"{stage.name}.npy").open("xb") as stream:
            _header(stream, source.dtype, (len(source), *stage.shape))
            for first, last in source.spans(stage.values * source.dtype.itemsize):
                stream.write(source.block(stage.name, first, last).data)
    for name, values in (("image", source.images.astype("<i8")), ("status", source.status)):
        np.save(place / f"{name}.npy", values, allow_pickle=False)
    _write_keys(source, place / _KEYS)
    write_json(place / FACTS, source.facts([*arrays, _KEYS, FACTS]))
    return (*arrays, _KEYS)


def _header(stream: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, facts)


def _write_keys(source: Source, path: Path) -> None:
    """A JSON list, one key a line, never whole in memory as text."""
    with path.open("x", encoding="ascii") as stream:
        opening = "[\n"
        for first, last in source.spans(1):
            for key in source.keys(first, last):
                stream.write(opening + json.dumps(key))
                opening = ",\n"
        stream.write("\n]\n")


def is_export(path: Path) -> bool:
    """Whether `path` is a folder that `write` made, with nothing else in it."""
    return only_holds(path, read_facts(path / FACTS), "npy")
