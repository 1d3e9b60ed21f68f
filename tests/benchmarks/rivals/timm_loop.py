"""timm's features_only, a DataLoader, rows appended through h5py: the thirty lines that most people write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.benchmarks.rivals.networks import TIMM
from tests.benchmarks.rivals.task import Task, batches, run

# The child whose output is the stem, which features_only does not give, and the features that it gives.
_STEM = {"A": "patch_embed", "B": "maxpool", "C": "bn1"}
_INDICES = {"A": (0, 1), "B": (1, 2), "C": (0, 1, 2, 3, 4)}


def extract(task: Task) -> None:
    """One HDF5 file, a dataset per stage."""
    spec, paths = TIMM[task.job], task.paths
    network = spec.build(features_only=True, out_indices=_INDICES[task.job]).to(task.device)
    stem: list[Tensor] = []
    network.get_submodule(_STEM[task.job]).register_forward_hook(lambda _m, _i, output: stem.append(output))
    with h5py.File(task.output, "w") as file, torch.inference_mode():
        file["names"] = np.array([path.name for path in paths], h5py.string_dtype())
        start = 0
        for batch in batches(task, spec.transform(network)):
            stem.clear()
            maps = network(batch)
            for stage, value in zip(spec.modules, [*stem, *maps], strict=True):
                turned = value.permute(0, 3, 1, 2).contiguous() if spec.nhwc else value
                made = spec.finished(turned).cpu().numpy()
                if stage not in file:
                    file.create_dataset(stage, (len(paths), *made.shape[1:]), "f4", chunks=(1, *made.shape[1:]))
                file[stage][start : start + len(made)] = made
            start += len(batch)


def read(output: Path, job: str, stage: str, rows: NDArray[np.int64]) -> NDArray[Any]:
    """`(k, …)`, row by row."""
    with h5py.File(output) as file:
        return np.stack([file[stage][row] for row in rows])


if __name__ == "__main__":
    run(extract)
