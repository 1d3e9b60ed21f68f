"""torchvision's create_feature_extractor, and an .npz per image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.models.feature_extraction import create_feature_extractor

from tests.benchmarks.rivals.networks import TORCHVISION
from tests.benchmarks.rivals.task import Task, batches, run


def extract(task: Task) -> None:
    """A folder, `NAME.npz` per picture."""
    spec = TORCHVISION[task.job]
    network = spec.build().to(task.device)
    extractor = create_feature_extractor(network, {module: stage for stage, module in spec.modules.items()})
    task.output.mkdir()
    names = iter(task.paths)
    with torch.inference_mode():
        for batch in batches(task, spec.transform(network)):
            maps = {stage: value.cpu() for stage, value in extractor(batch).items()}
            for place in range(len(batch)):
                row = {stage: value[place].numpy() for stage, value in maps.items()}
                np.savez(task.output / f"{next(names).stem}.npz", **row)


def read(output: Path, job: str, stage: str, rows: NDArray[np.int64]) -> NDArray[Any]:
    """`(k, …)`, as the network laid them out."""
    files = sorted(output.glob("*.npz"))
    return np.stack([np.load(files[row])[stage] for row in rows])


if __name__ == "__main__":
    run(extract)
