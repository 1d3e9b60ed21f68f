"""captum's AV: a .pt per batch and layer; it takes a DataLoader of pairs, and has no say in what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum._utils.av import AV
from numpy.typing import NDArray

from tests.benchmarks.rivals.networks import ANY
from tests.benchmarks.rivals.task import Pictures, Task, from_batches, run


def extract(task: Task) -> None:
    """A folder, `av/JOB/default/MODULE/NUMBER.pt`."""
    spec = ANY[task.job]
    network = spec.build()
    pictures = Pictures(task.paths, spec.transform(network), labelled=True)
    loader = torch.utils.data.DataLoader(pictures, batch_size=task.batch_size, num_workers=task.workers)
    with torch.no_grad():
        AV.generate_dataset_activations(
            str(task.output), network, task.job, list(spec.modules.values()), loader, load_from_disk=True
        )


def read(output: Path, job: str, stage: str, rows: NDArray[np.int64]) -> NDArray[Any]:
    """`(k, …)`, as the network laid them out."""
    folder = output / "av" / job / "default" / ANY[job].modules[stage]
    return from_batches(torch.load, sorted(folder.glob("*.pt"), key=lambda path: int(path.stem)), rows)


if __name__ == "__main__":
    run(extract)
