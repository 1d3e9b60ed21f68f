"""Reads random rows of what a contestant wrote: `python -m tests.benchmarks.readback NAME JOB OUT --images N`.

Prints the seconds, without the imports: each row of the job's first stage by itself, the file opened once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

STAGE = "stem"


def read(name: str, output: Path, job: str, stage: str, rows: NDArray[np.int64]) -> NDArray[Any]:
    """`rows` of `stage`, `(k, …)`, out of what the contestant `name` left at `output`."""
    if name == "bbx":
        import bbx

        with bbx.open(output) as file:
            return np.stack([file[stage, int(row)] for row in rows])
    reader = import_module(f"tests.benchmarks.rivals.{name}")
    found: NDArray[Any] = reader.read(output, job, stage, rows)
    return found


def main() -> None:
    """Twice, so that the page cache is as warm for all; the second is what counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("job")
    parser.add_argument("output", type=Path)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--rows", type=int, default=100)
    options = parser.parse_args()
    rows = np.random.default_rng(1).integers(0, options.images, options.rows)
    for _ in range(2):
        started = time.perf_counter()
        read(options.name, options.output, options.job, STAGE, rows)
        seconds = time.perf_counter() - started
    json.dump({"seconds": seconds, "rows": len(rows)}, sys.stdout)


if __name__ == "__main__":
    main()
