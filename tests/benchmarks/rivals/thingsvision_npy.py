"""thingsvision's Python API: its own loader, which takes no workers, and an .npy per 8 batches and module.

Runs in a virtual environment of its own: see requirements.txt, and `--python thingsvision_npy=PATH`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from thingsvision import get_extractor
from thingsvision.utils.data import DataLoader, ImageDataset

from tests.benchmarks.rivals.networks import TIMM
from tests.benchmarks.rivals.task import Task, run


def extract(task: Task) -> None:
    """A folder, a sub-folder per module; features would all stay in memory without `output_dir`."""
    spec = TIMM[task.job]
    extractor = get_extractor(model_name=spec.name, source="timm", device="cpu", pretrained=False)
    backend = extractor.get_backend()
    dataset = ImageDataset(
        root=str(task.images), out_path=str(task.output), backend=backend, transforms=extractor.get_transformations()
    )
    extractor.extract_features(
        batches=DataLoader(dataset=dataset, batch_size=task.batch_size, backend=backend),
        module_names=list(spec.modules.values()), flatten_acts=False, output_type="ndarray",
        output_dir=str(task.output), step_size=8,
    )  # fmt: skip


def read(output: Path, job: str, stage: str, rows: NDArray[np.int64]) -> NDArray[Any]:
    """`(k, …)`, as the network laid them out."""
    files = sorted((output / TIMM[job].modules[stage]).glob("*.npy"))
    lengths = np.cumsum([len(np.load(path, mmap_mode="r")) for path in files])
    places = np.searchsorted(lengths, rows, side="right")
    starts = np.concatenate([[0], lengths])[places]
    return np.stack([np.load(files[place])[row] for place, row in zip(places, rows - starts, strict=True)])


if __name__ == "__main__":
    run(extract)
