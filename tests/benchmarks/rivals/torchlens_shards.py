"""TorchLens' extract_dataset: shards on disk with a ledger and checksums, resumable; the caller decodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchlens.dataset_extraction import extract_dataset, load_extraction

from tests.benchmarks.rivals.networks import TIMM
from tests.benchmarks.rivals.task import Pictures, Task, run


class _Lazy:
    """One picture after the other, decoded as it is asked for, or ahead in the workers of a DataLoader."""

    def __init__(self, task: Task, transform: Any) -> None:
        self._pictures, self._workers = Pictures(task.paths, transform), task.workers

    def __iter__(self) -> Iterator[Tensor]:
        if self._workers:
            loader = torch.utils.data.DataLoader(self._pictures, batch_size=None, num_workers=self._workers)
            yield from loader
            return
        yield from (self._pictures[place] for place in range(len(self._pictures)))

    def __len__(self) -> int:
        return len(self._pictures)


def extract(task: Task) -> None:
    """A folder of shards."""
    spec = TIMM[task.job]
    network = spec.build()
    extract_dataset(
        network, _Lazy(task, spec.transform(network)), dict(spec.modules), batch_size=task.batch_size,
        output_dir=task.output, stimulus_ids=[path.name for path in task.paths], dtype="float32", progress=False,
        pool="spatial_mean" if spec.pooled else None,
    )  # fmt: skip


def read(output: Path, job: str, stage: str, rows: NDArray[np.int64]) -> NDArray[Any]:
    """`(k, …)`: the whole stage is loaded, for it has no reader by row."""
    return np.asarray(load_extraction(output, [stage]).activations[stage])[rows]


if __name__ == "__main__":
    run(extract)
