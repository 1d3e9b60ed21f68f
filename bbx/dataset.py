"""A feature file as a torch Dataset, for training on features straight from disk."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bbx.stages import select_stages
from bbx.store import FeatureFile


class FeatureDataset(Dataset[dict[str, Tensor]]):
    """The finished rows of a feature file: item i is `{stage: (c, h, w)}`, read when it is asked for.

    `stages` as in `select_stages`, default all. Failed and pending rows are left out; `keys[i]` names item i's image.
    Each process opens the file for itself when it first reads, so DataLoader workers may be forked or spawned.
    """

    def __init__(
        self, path: str | os.PathLike[str], stages: str | Iterable[str | int] = "all", *, partial: bool = False
    ) -> None:
        self.file = FeatureFile(path, partial=partial)
        self.stages = select_stages(list(self.file.stages), stages)
        self.rows = self.file.done

    @property
    def keys(self) -> list[str]:
        """The images' keys, in item order."""
        keys = self.file.keys
        return [keys[row] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        row = int(self.rows[item])
        return {stage: torch.from_numpy(self.file[stage][row]) for stage in self.stages}
