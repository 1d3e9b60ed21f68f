"""What is measured: three jobs, each as a command line of bbx."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import failed
from tests.benchmarks.pictures import ROOT


@dataclass(frozen=True)
class Job:
    """A model and its stages, from a folder of JPEGs to float32 on disk. `pool` as bbx has it."""

    name: str
    model: str
    stages: str
    pool: str = "none"

    def words(self) -> tuple[str, ...]:
        """What makes the job, as `bbx extract` takes it: random weights, for speed does not ask what they are."""
        chosen = ("--model", self.model, "--weights", "random", "--stages", self.stages)
        return chosen if self.pool == "none" else (*chosen, "--pool", self.pool)


JOBS = {
    "A": Job("A", "swin-tiny", "stem,stage1,stage2"),
    "B": Job("B", "resnet-50", "stem,stage1,stage2"),
    "C": Job("C", "efficientnet-lite0", "all", "avg"),
}


def bbx(*words: object) -> list[str]:
    """The command line `bbx …` of this checkout, in this interpreter; to be run in `ROOT`."""
    return [sys.executable, "-m", "bbx", *map(str, words)]


def extract(job: Job, images: Path, output: Path, options: Sequence[str] = ()) -> list[str]:
    """The command line of bbx that does `job`."""
    words = (*job.words(), *options)
    return bbx("extract", *words, "--mode", "overwrite", "-q", "-o", output, images)


def plan(job: Job, images: Path, options: Sequence[str] = ()) -> dict[str, Any]:
    """What bbx is about to do, such as `batch_size` and `workers`: its own `--dry-run --json`. Raises `RunError`."""
    command = bbx("extract", *job.words(), *options, "--dry-run", "--json", "-q", "-o", "none.h5", images)
    ran = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if ran.returncode:
        raise failed(ran.stderr, ran.returncode)
    found: dict[str, Any] = json.loads(ran.stdout)
    return found
