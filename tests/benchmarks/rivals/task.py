"""What every rival is told, and the usual way to feed it: PIL, the library's transforms, a DataLoader. Knows no bbx."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Transform = Callable[[Image.Image], Any]


@dataclass(frozen=True)
class Task:
    """A job on a folder of JPEGs, computed on `device`.

    `workers`: decoding processes, 0: decoded where it is computed, as most docs do.
    """

    job: str
    images: Path
    output: Path
    batch_size: int = 32
    workers: int = 0
    device: str = "cpu"

    @property
    def paths(self) -> list[Path]:
        """The pictures, in row order."""
        return sorted(self.images.glob("*.jpg"))


class Pictures(torch.utils.data.Dataset[Any]):
    """A transformed picture per index; with a label of 0 where a library's docs want pairs."""

    def __init__(self, paths: list[Path], transform: Transform, *, labelled: bool = False) -> None:
        self._paths, self._transform, self._labelled = paths, transform, labelled

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Any:
        value = self._transform(Image.open(self._paths[index]).convert("RGB"))
        return (value, 0) if self._labelled else value


def batches(task: Task, transform: Transform) -> Iterator[Tensor]:
    """`(b, 3, h, w)` on the task's device, one batch after the other."""
    if task.workers:
        loader = torch.utils.data.DataLoader(
            Pictures(task.paths, transform), batch_size=task.batch_size, num_workers=task.workers,
            pin_memory=task.device != "cpu",
        )  # fmt: skip
        yield from (batch.to(task.device, non_blocking=True) for batch in loader)
        return
    paths = task.paths
    for start in range(0, len(paths), task.batch_size):
        some = paths[start : start + task.batch_size]
        yield torch.stack([transform(Image.open(path).convert("RGB")) for path in some]).to(task.device)


def from_batches(load: Callable[[Path], Any], files: list[Path], rows: NDArray[np.int64]) -> NDArray[Any]:
    """`rows` out of files that hold a batch each, all but the last of one length; each file is loaded when it is asked.

    Nothing is kept between rows: that is what such a format costs at random.
    """
    length = len(load(files[0]))
    return np.stack([np.asarray(load(files[row // length])[row % length]) for row in rows])


def run(extract: Callable[[Task], None]) -> None:
    """`python -m tests.benchmarks.rivals.NAME JOB IMAGES OUT`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices="ABC")
    parser.add_argument("images", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    extract(Task(**vars(parser.parse_args())))
