"""What a run is before it starts and what it came to: `Plan` and `Summary`, and what they are made of."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from bbx.backbone import Backbone
from bbx.engine import EngineSettings, Work, usual_threads
from bbx.errors import EXIT_ALL_FAILED, EXIT_SOME_FAILED, StartError, UsageError
from bbx.images import DecodeSettings, ImageList
from bbx.provenance import command_facts
from bbx.providers.table import EXTRAS
from bbx.spec import Compress, RunSpec
from bbx.store import Target, check_room


@dataclass(frozen=True, slots=True)
class Rates:
    """Images/s of decoding, of computing and of writing to the disk, each measured alone.

    `cores`: the images/s that the cores allow where decoding and computing take the same ones.
    """

    decode: float
    compute: float
    store: float
    cores: float | None = None

    @property
    def limit(self) -> str:
        """Which is least."""
        rates = {"compute": self.compute, "decode": self.decode, "store": self.store}
        return min(rates, key=rates.__getitem__)

    @property
    def least(self) -> float:
        """The rate of `limit`."""
        return min(self.compute, self.decode, self.store)

    @property
    def expected(self) -> float:
        """Images/s of the whole, in which all goes on at once."""
        return self.least if self.cores is None else min(self.least, self.cores)


@dataclass(frozen=True)
class Plan:
    """All that is known before the first image is decoded.

    `fresh`: the mode begins anew, so that the same command would not continue it. `notes`: what a user should know.
    `rates`: what this machine makes of it, where that was measured.
    """

    images: ImageList
    backbone: Backbone
    run: RunSpec
    output: Path
    target: Target
    device: torch.device
    batch_size: int
    workers: int
    free_nbytes: int
    decoding: DecodeSettings
    engine: EngineSettings
    deterministic: bool = False
    retry_failed: bool = False
    fresh: bool = False
    compress: Compress = "none"
    notes: tuple[str, ...] = ()
    rates: Rates | None = None

    @property
    def needed_nbytes(self) -> int:
        """Bytes of disk not yet taken: all of a new run's rows, none of a resumed one's; and those of a packed copy."""
        whole = len(self.images) * self.run.row_nbytes
        packed = whole if self.compress != "none" and self.target.state != "complete" else 0
        return packed + (whole if self.target.state == "new" else 0)

    @property
    def padded(self) -> bool:
        """Whether every batch keeps its shape: for the same bits each time, or because compiled code is for one."""
        return self.deterministic or self.engine.engine == "compile"

    @property
    def work(self) -> Work:
        """What becomes of every batch."""
        return Work(self.run.dtype, self.run.pool, self.batch_size)

    def decoders(self, rows: int) -> int:
        """How many decoding processes `rows` images are worth."""
        return min(self.workers, 1 + rows // 8)

    def check_disk(self) -> None:
        """Raises `StartError` when the disk cannot hold the features."""
        check_room(self.target.path, self.needed_nbytes)


# A run of a million bad images must not keep a million reasons in memory.
FAILURES_KEPT = 1000


@dataclass
class Summary:
    """What a run came to. Times in seconds; decode, compute and write overlap, so they add up to more than `wall`.

    `failed` counts the failed rows, `failures` holds key and reason of the first of them (the file holds all),
    `overflow` counts the values per stage that float16 could not hold, `nonfinite` those that were NaN or infinite as
    the network gave them. `notes` is what was changed on the way, such as a batch halved for want of memory.
    `packed` is the share of the features that `compress` has dealt with.
    """

    output: Path
    rows: int
    done: int = 0
    failed: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    extracted: int = 0
    overflow: dict[str, int] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    packed: float = 0.0
    wall: float = 0.0
    decode: float = 0.0
    compute: float = 0.0
    write: float = 0.0

    def add_failure(self, key: str, reason: str) -> None:
        """Counts a failed row."""
        self.failed += 1
        if len(self.failures) < FAILURES_KEPT:
            self.failures[key] = reason

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
    wish = wish.strip().lower()
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


def free_nbytes(output: Path) -> int:
    """Free bytes on the disk where `output`, or what it is a link to, will lie."""
    return shutil.disk_usage(output.resolve().parent).free


def described(device: torch.device) -> str:
    """`device` and its make, as a start records it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device} ({name})"


def attempt(plan: Plan) -> dict[str, object]:
    """Who, where and with what, for the file's provenance."""
    library = plan.run.model.partition(":")[0]
    packages = ("bbx", "torch", "torchvision", "numpy", "pillow", "h5py", *(name for name in EXTRAS if name == library))
    return {
        "device": described(plan.device),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        **command_facts(),
        "weights": plan.run.weights,
        "roots": [str(Path(root).absolute()) for root in plan.images.roots[:8]],
        "batch_size": plan.batch_size,
        "workers": plan.workers,
        "threads": usual_threads(),
        "stream_threads": plan.engine.threads,
        "engine": plan.engine.describe(),
        "deterministic": plan.deterministic,
    }
