"""transformers' AutoBackbone and image processor, rows written through h5py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoBackbone, ConvNextImageProcessor, ResNetConfig, SwinConfig, ViTImageProcessor

from tests.benchmarks.rivals.networks import SEED
from tests.benchmarks.rivals.task import Task, batches, run

_STAGES = ("stem", "stage1", "stage2")
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def extract(task: Task) -> None:
    """One HDF5 file, a dataset per stage."""
    kind = {"A": SwinConfig, "B": ResNetConfig}[task.job]
    torch.manual_seed(SEED)
    network = AutoBackbone.from_config(kind(out_features=list(_STAGES))).eval().to(task.device)
    count, start = len(task.paths), 0
    with h5py.File(task.output, "w") as file, torch.inference_mode():
        for batch in _batches(task):
            for stage, value in zip(network.out_features, network(batch).feature_maps, strict=True):
                rows = file.require_dataset(stage, (count, *value.shape[1:]), "f4", chunks=(1, *value.shape[1:]))
                rows[start : start + len(value)] = value.cpu().numpy()
            start += len(batch)


def _batches(task: Task) -> Any:
    """As the docs do, the processor gets a list of pictures; in the workers of a DataLoader, one at a time."""
    processor = _processor(task.job)
    if task.workers:
        return batches(task, lambda picture: processor(picture, return_tensors="pt")["pixel_values"][0])
    return _listed(task, processor)


def _listed(task: Task, processor: Any) -> Any:
    for start in range(0, len(task.paths), task.batch_size):
        some = task.paths[start : start + task.batch_size]
        yield processor([Image.open(path).convert("RGB") for path in some], return_tensors="pt")["pixel_values"].to(
            task.device
        )


def _processor(job: str) -> Any:
    """What the hub's microsoft/swin-tiny-patch4-window7-224 and microsoft/resnet-50 say."""
    if job == "A":
        return ViTImageProcessor(image_mean=_MEAN, image_std=_STD, resample=3)
    return ConvNextImageProcessor(
        size={"shortest_edge": 224}, crop_pct=0.875, image_mean=_MEAN, image_std=_STD, resample=3
    )


def read(output: Path, job: str, stage: str, rows: NDArray[np.int64]) -> NDArray[Any]:
    """`(k, c, h, w)`, row by row."""
    with h5py.File(output) as file:
        return np.stack([file[stage][row] for row in rows])


if __name__ == "__main__":
    run(extract)
