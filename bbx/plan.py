"""What a run is before it starts and what it came to: `Plan` and `Summary`, and what they are made of."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from bbx.backbone import Backbone
from bbx.errors import EXIT_ALL_FAILED, EXIT_SOME_FAILED, StartError, UsageError
from bbx.images import ImageList
from bbx.spec import RunSpec
from bbx.store import Target, size_text


@dataclass(frozen=True)
class Plan:
    """All that is known before the first image is decoded."""

    images: ImageList
    backbone: Backbone
    run: RunSpec
    output: Path
    target: Target
    device: torch.device
    batch_size: int
    workers: int
    free_nbytes: int

    @property
    def needed_nbytes(self) -> int:
        """Bytes of disk that are not yet taken: all of a new run's rows, none of a resumed one's."""
        return len(self.images) * self.run.row_nbytes if self.target.state == "new" else 0

    def check_disk(self) -> None:
        """Raises `StartError` when the disk cannot hold the features."""
        if self.needed_nbytes > self.free_nbytes:
            raise StartError(
                f"the features need {size_text(self.needed_nbytes)}, but the disk of {self.output} has "
                f"{size_text(self.free_nbytes)} free",
                "choose another disk with -o, fewer --stages, --dtype float16 (half), or --pool avg (vectors)",
            )


@dataclass
class Summary:
    """What a run came to. Times in seconds; decode, compute and write overlap, so they add up to more than `wall`.

    `failed` holds every failed row's key and reason, `overflow` the values per stage that float16 could not hold.
    """

    output: Path
    rows: int
    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    extracted: int = 0
    overflow: dict[str, int] = field(default_factory=dict)
    wall: float = 0.0
    decode: float = 0.0
    compute: float = 0.0
    write: float = 0.0

    @property
    def images_per_second(self) -> float:
        """Of this start, not counting rows that an earlier one did."""
        return self.extracted / self.wall if self.wall else 0.0

    @property
    def exit_code(self) -> int:
        """0 all rows done, 4 some failed, 5 all failed."""
        if not self.failed:
            return 0
        return EXIT_SOME_FAILED if self.done else EXIT_ALL_FAILED


def find_device(wish: str) -> torch.device:
    """The device `wish` names, `auto` being the fastest kind there is. Raises `UsageError`, `StartError`."""
    mps = torch.backends.mps.is_available()
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(wish)
    except RuntimeError:
        raise UsageError(f"no device {wish!r}", "devices: auto, cpu, cuda, cuda:0, mps") from None
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(mps)}.get(device.type, 0)
    if (device.index or 0) >= there:
        raise StartError(f"this machine has no device {wish}", "try --device auto")
    return device


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_nbytes(output: Path) -> int:
    """Free bytes on the disk of `output`. Raises `StartError` where its folder does not exist."""
    folder = output.absolute().parent
    if not folder.is_dir():
        raise StartError(f"the output's folder {folder} does not exist", f"mkdir -p {shlex.quote(str(folder))}")
    return shutil.disk_usage(folder).free


def attempt(plan: Plan) -> dict[str, object]:
    """Who, where and with what, for the file's provenance."""
    packages = ("bbx", "torch", "torchvision", "numpy", "pillow", "h5py")
    name = torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else platform.machine()
    return {
        "device": f"{plan.device} ({name})",
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        "command": shlex.join(sys.argv),
        "weights": plan.run.weights,
        "roots": [str(Path(root).absolute()) for root in plan.images.roots[:8]],
        "batch_size": plan.batch_size,
        "workers": plan.workers,
    }
