"""Vectors as one Parquet file: a row per image, with key, row and status, and a list of fixed length per stage.

`key` is the text that `/path` stores, `row` the image's row in the whole job, `status` a word. Where it comes from is
JSON under `bbx_export` in the schema's metadata. Only vectors: no Parquet reader knows what to do with a map.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from bbx.errors import MissingExtraError, UsageError
from bbx.export.source import Source

SUFFIX = ".parquet"
_COLUMNS = ("key", "row", "status")
_FACTS = b"bbx_export"


def check(source: Source) -> None:
    """Raise `MissingExtraError`, or `UsageError` for a stage of maps or one named like another column."""
    maps = [stage for stage in source.stages if len(stage.shape) > 1]
    if maps:
        shape = ", ".join(map(str, maps[0].shape))
        raise UsageError(
            f"parquet holds vectors only, and {maps[0].name} is ({shape})",
            "bbx extract --pool avg makes vectors; npy, zarr and safetensors hold maps too",
        )
    for stage in source.stages:
        if stage.name in _COLUMNS:
            raise UsageError(f"parquet has a column {stage.name} already", "name the other stages with --stages")
    _library()


def _library() -> tuple[Any, Any]:
    """`(pyarrow, pyarrow.parquet)`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "pyarrow", "pip install 'bbx[parquet]'") from None
    return pyarrow, pyarrow.parquet


def write(source: Source, place: Path) -> tuple[str, ...]:
    """Row group after row group, each one block."""
    arrow, parquet = _library()
    schema = _schema(source, arrow)
    # Dictionaries of floats only cost time; the three words of the status are what they are for.
    with place.open("xb") as stream, parquet.ParquetWriter(stream, schema, use_dictionary=["status"]) as writer:
        for first, last in source.spans(source.row_nbytes):
            writer.write_table(_table(source, arrow, schema, first, last))
    return (".",)


def _schema(source: Source, arrow: Any) -> Any:
    value = arrow.from_numpy_dtype(source.dtype)
    fields = [("key", arrow.string()), ("row", arrow.int64()), ("status", arrow.string())]
    fields += [(stage.name, arrow.list_(value, stage.values)) for stage in source.stages]
    return arrow.schema(fields, metadata={_FACTS: json.dumps(source.facts([]))})


def _table(source: Source, arrow: Any, schema: Any, first: int, last: int) -> Any:
    vectors = [
        arrow.FixedSizeListArray.from_arrays(
            arrow.array(source.block(stage.name, first, last).reshape(-1)), type=schema.field(stage.name).type
        )
        for stage in source.stages
    ]
    rows = arrow.array(source.images[first:last].astype(np.int64))
    texts = arrow.array(source.texts(first, last), arrow.string())
    words = arrow.array(source.words(first, last), arrow.string())
    return arrow.Table.from_arrays([texts, rows, words, *vectors], schema=schema)


def is_export(path: Path) -> bool:
    """Whether `path` is a Parquet file that `write` made."""
    arrow, parquet = _library()
    if not path.is_file():
        return False
    try:
        metadata = parquet.read_schema(path).metadata or {}
    except (OSError, arrow.ArrowException):
        return False
    return _FACTS in metadata
