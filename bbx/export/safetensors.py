"""Features as safetensors: a folder of shards, each with some rows of every stage and the keys of those rows.

A shard holds one tensor per stage, `(k, c, h, w)`, with `image` int64 `(k,)`, each row's place in the whole job, and
`status` uint8 `(k,)`; its metadata are the texts `run`, `keys` (a JSON list, in the tensors' order) and `rows` (which
of the export's). One shard is `features.safetensors`; of more, `features.safetensors.index.json` names each one's rows.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bbx.errors import UsageError
from bbx.export.place import FACTS, only_holds, read_facts, write_json
from bbx.export.source import VERSION, Source
from bbx.store import check_room

SUFFIX = "_safetensors"
SHARD_NBYTES = 1 << 30
"""By default: the library wants a whole shard in memory."""
_MOST_SHARD_NBYTES = (1 << 32) - 1
# The library refuses headers above 100 MB; the metadata's own quoting of the JSON can double what is counted here.
_KEYS_NBYTES = 32 * 1024 * 1024
_INDEX = "features.safetensors.index.json"


def check_shard_nbytes(nbytes: int) -> None:
    """Raise `UsageError` for a shard of 4 GiB or more, which not every file system and reader takes, or of none."""
    if not 0 < nbytes <= _MOST_SHARD_NBYTES:
        raise UsageError(f"a shard of {nbytes} bytes is out of range", "1 byte to 4 GiB; one row at least is in each")


def check(source: Source) -> None:
    """Raise `UsageError` for a name that the format keeps for itself."""
    if any(stage.name == "__metadata__" for stage in source.stages):
        raise UsageError("safetensors cannot hold a stage named __metadata__", "name the others with --stages")


def write(source: Source, place: Path) -> tuple[str, ...]:
    """Shard after shard, each gathered block by block."""
    check_room(place.parent, source.nbytes)
    place.mkdir()
    spans = _shards(source)
    names = _names(len(spans))
    for name, (first, last) in zip(names, spans, strict=True):
        _write_shard(source, place / name, first, last)
    index = (_INDEX,) if len(spans) > 1 else ()
    if index:
        shards = [{"file": name, "rows": list(span)} for name, span in zip(names, spans, strict=True)]
        write_json(place / _INDEX, {"metadata": {"total_size": source.nbytes}, "shards": shards})
    write_json(place / FACTS, source.facts([*names, *index, FACTS]))
    return (*names, *index)


def _shards(source: Source) -> list[tuple[int, int]]:
    """Half-open ranges of positions, cut where features or keys fill a shard."""
    most = max(source.shard_nbytes // source.row_nbytes, 1)
    cuts, keys_nbytes = [0], 0
    for first, last in source.spans(1):
        for place, key in enumerate(source.keys(first, last), first):
            keys_nbytes += len(json.dumps(key)) + 2
            if place - cuts[-1] == most or (keys_nbytes > _KEYS_NBYTES and place > cuts[-1]):
                cuts.append(place)
                keys_nbytes = len(json.dumps(key)) + 2
    return list(zip(cuts, [*cuts[1:], len(source)], strict=True))


def _names(count: int) -> tuple[str, ...]:
    if count == 1:
        return ("features.safetensors",)
    return tuple(f"features-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1))


def _write_shard(source: Source, path: Path, first: int, last: int) -> None:
    tensors: dict[str, NDArray[Any]] = {
        "image": source.images[first:last].astype("<i8"),
        "status": source.status[first:last].copy(),
    }
    for stage in source.stages:
        tensor = tensors[stage.name] = np.empty((last - first, *stage.shape), source.dtype)
        for start, stop in source.spans(stage.values * source.dtype.itemsize, first, last):
            tensor[start - first : stop - first] = source.block(stage.name, start, stop)
    _save(tensors, path, {**_metadata(source, source.keys(first, last)), "rows": f"{first}-{last}"})


def _metadata(source: Source, keys: Sequence[str]) -> dict[str, str]:
    return {"bbx_export": VERSION, "run": source.file.run.to_json(), "keys": json.dumps(keys)}


def _save(tensors: dict[str, NDArray[Any]], path: Path, metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # how the library says that the disk is full
        raise OSError(errno.EIO, str(error)) from error


def is_export(path: Path) -> bool:
    """Whether `path` is a folder that `write` made, with nothing else in it."""
    return only_holds(path, read_facts(path / FACTS), "safetensors")
