"""torchextractor, and a torch.save per batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchextractor
from numpy.typing import NDArray

from tests.benchmarks.rivals.networks import ANY
from tests.benchmarks.rivals.task import Task, batches, from_batches, run


def extract(task: Task) -> None:
    """A folder, `START.pt` per batch."""
    spec = ANY[task.job]
    network = spec.build().to(task.device)
    extractor = torchextractor.Extractor(network, list(spec.modules.values()))
    task.output.mkdir()
    start = 0
    with torch.inference_mode():
        for batch in batches(task, spec.transform(network)):
            _, maps = extractor(batch)
            # Cloned: the tensors are the network's own, which it may write over.
            kept = {stage: spec.finished(maps[module]).clone().cpu() for stage, module in spec.modules.items()}
            torch.save(kept, task.output / f"{start:07}.pt")
            start += len(batch)


def read(output: Path, job: str, stage: str, rows: NDArray[np.int64]) -> NDArray[Any]:
    """`(k, …)`, as the network laid them out."""
    return from_batches(lambda path: torch.load(path)[stage], sorted(output.glob("*.pt")), rows)


if __name__ == "__main__":
    run(extract)
