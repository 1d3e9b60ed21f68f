"""What the store's tests share: a small run with every shape of stage, known maps, and a finished file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from bbx.spec import Preprocess, RunSpec, Stage
from bbx.store import FeatureWriter, format

PREPROCESS = Preprocess((32, 32), 36, "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
STAGES = (
    Stage("stem", (4, 8, 8), 4, "conv1", 0),
    Stage("stage1", (8, 4, 2), 8, "layer1", 1),
    Stage("tokens", (5, 6), 0, "blocks.0"),
    Stage("pooled", (7,), 0, "head"),
)
RUN = RunSpec("toy:net", "sha256:1234", STAGES, PREPROCESS, weights="demo")
KEYS = [f"cats/{index:03}.png" for index in range(20)]


def row_maps(rows: Sequence[int], run: RunSpec = RUN) -> dict[str, NDArray[Any]]:
    """Maps `(b, *stage.shape)` that depend on nothing but row and stage: any row can be checked on its own."""
    dtype = np.float16 if run.dtype == "float16" else np.float32
    return {
        stage.name: np.stack(
            [np.random.default_rng([row, place]).standard_normal(stage.shape).astype(dtype) for row in rows]
        )
        for place, stage in enumerate(run.stages)
    }


def is_row(maps: Mapping[str, NDArray[Any]], row: int, run: RunSpec = RUN) -> bool:
    """Whether `maps[stage]`, `(*stage.shape)`, are exactly the row's."""
    return all(np.array_equal(maps[name], right[0]) for name, right in row_maps([row], run).items())


def relabel(file: h5py.File) -> None:
    """Make what the file says of itself consistent again, as whoever forges a file would."""
    part = (int(file.attrs[name]) for name in ("row_start", "row_stop", "rows_total"))
    file.attrs["bbx_label_crc32"] = format.label(file["provenance/run"].asstr()[()], *part)


def make(path: Path, run: RunSpec = RUN, keys: Sequence[str] = KEYS, failed: Sequence[int] = ()) -> Path:
    """A finished file at `path`."""
    with FeatureWriter.open(path, run, keys) as writer:
        for row in failed:
            writer.fail(row, "not an image")
        writer.write(*rest(writer, run))
    return path


def rest(writer: FeatureWriter, run: RunSpec = RUN) -> tuple[list[int], dict[str, NDArray[Any]]]:
    """Rows and maps that the writer still wants."""
    rows = [row for row in writer.pending.tolist() if writer.status[row] == 0]
    return rows, row_maps(rows, run)
