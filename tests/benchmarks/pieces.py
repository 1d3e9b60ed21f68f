"""bbx's own pieces, each alone, in a process of its own: `python -m tests.benchmarks.pieces PIECE JOB IMAGES OUT`.

Prints one JSON object. `forward`: the loop of `bbx extract` on ready pixels with a sink that keeps nothing; `decode`:
its decoders with nobody to compute; `store`: its writer given ready arrays; `rows`: single rows read back, against
`np.load`; `layers`: the modules that run past the deepest stage asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Self
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

import bbx
from bbx.engine import kept_memory
from bbx.gpu_decode import decoders_for
from bbx.images import Decoders, decode_one
from bbx.images.decoders import Answer
from bbx.loop import run_loop
from bbx.plan import Plan, Summary
from bbx.spec import InputFile
from bbx.store import FeatureWriter
from tests.benchmarks import machine, measure
from tests.benchmarks.jobs import JOBS, Job

_READ_ROWS = 100
# What the store alone is given: enough for several of its commits.
_STORE_NBYTES = 1 << 30
_STORE_ROUNDS = 3


def plan_of(job: Job, images: Path, output: Path, options: Sequence[str] = ()) -> Plan:
    """What `bbx extract` would go by."""
    plans: list[Plan] = []
    bbx.extract(images, model=job.model, weights="random", stages=job.stages, pool=job.pool, output=output,
                mode="overwrite", dry_run=True, on_plan=plans.append, **keywords(options))  # fmt: skip
    return plans[0]


def keywords(options: Sequence[str]) -> dict[str, Any]:
    """`--batch-size 4 --deterministic` → `{"batch_size": 4, "deterministic": True}`."""
    found: dict[str, Any] = {}
    for place, word in enumerate(options):
        if not word.startswith("--"):
            continue
        value = options[place + 1] if place + 1 < len(options) else "--"
        name = word.removeprefix("--").replace("-", "_")
        found[name] = True if value.startswith("--") else int(value) if value.isdigit() else value
    return found


class NullSink:
    """Takes everything and keeps nothing; counts the bytes."""

    nbytes = 0

    def write(self, rows: NDArray[np.int64], maps: Mapping[str, NDArray[Any]], inputs: Sequence[InputFile]) -> None:
        """Counts."""
        self.nbytes += sum(value.nbytes for value in maps.values())

    def fail(self, row: int, reason: str, input: InputFile | None = None) -> None:
        """No picture of the benchmark is bad."""
        raise RuntimeError(f"row {row}: {reason}")


class Ready:
    """In the place of `Decoders`: every picture is one that was decoded before, copied into its slot at once."""

    cells: NDArray[Any]
    notes: tuple[str, ...] = ()

    def __init__(self, *_: object) -> None:
        pass

    def submit(self, path: str, slot: NDArray[Any]) -> Future[Answer]:
        """A future that is done."""
        slot[...] = self.cells
        done: Future[Answer] = Future()
        done.set_result(Answer("", InputFile(), 0.0))
        return done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def clocks() -> tuple[float, float]:
    """Seconds of the wall, and of this process's CPUs."""
    return time.perf_counter(), time.process_time()


def forward(plan: Plan) -> dict[str, float]:
    """The engine alone, as `bbx extract` would run it: what all rows take more than a quarter of them do.

    That leaves out the making of streams, what is done to a network once, and first batches, which find no memory.
    """
    found = decode_one(plan.images.path(0), plan.run.preprocess)
    assert not isinstance(found, str), found
    Ready.cells = found
    rows = np.arange(len(plan.images))
    sink = NullSink()
    with mock.patch("bbx.loop.decoders_for", Ready), kept_memory():
        run_loop(plan, sink, rows[: 2 * plan.batch_size], Summary(plan.output, len(rows)))  # to warm up
        counts, taken = (len(rows) // 4, len(rows)), []
        for count in counts:
            before = clocks()
            run_loop(plan, sink, rows[:count], Summary(plan.output, len(rows)))
            taken.append([now - then for now, then in zip(clocks(), before, strict=True)])
    seconds, used = (long - short for short, long in zip(*taken, strict=True))
    if min(seconds, used) <= 0:
        raise RuntimeError(f"{counts[1]} images are too few to measure {plan.device}: --images")
    return {"images": counts[1] - counts[0], "seconds": seconds, "cpu": used}


def decode(plan: Plan) -> dict[str, float]:
    """All pictures through the decoders, a few batches ahead; CPU seconds of both ends of their pipes."""
    slots = np.empty((4 * plan.workers, *plan.run.preprocess.size, 3), np.uint8)
    waiting: deque[Future[Answer]] = deque()

    def through(decoders: Decoders, count: int) -> None:
        for row in range(count):
            waiting.append(decoders.submit(plan.images.path(row), slots[row % len(slots)]))
            while len(waiting) >= len(slots) or (row + 1 == count and waiting):
                answer = waiting.popleft().result()
                assert not answer.reason, answer.reason

    count = len(plan.images)
    with decoders_for(plan.workers, plan.decoding, plan.device) as decoders:
        through(decoders, min(count, 4 * plan.workers))  # until all of them have started
        started, cpu = time.perf_counter(), measure.cpu_of_tree(os.getpid())
        through(decoders, count)
        seconds, cpu = time.perf_counter() - started, measure.cpu_of_tree(os.getpid()) - cpu
    return {"images": count, "seconds": seconds, "cpu": cpu}


def store(plan: Plan, repeats: int) -> dict[str, float]:
    """The writer given ready arrays, and as many bytes written raw, plainly and early, in turn; all until on disk."""
    size = plan.batch_size
    batches = min(max(1, _STORE_NBYTES // (size * plan.run.row_nbytes)), -(-len(plan.images) // size))
    keys = [f"{row:06}.jpg" for row in range(batches * size)]
    random = np.random.default_rng(0)
    maps = {
        stage.name: random.standard_normal((size, *stage.shape), np.float32).astype(plan.run.dtype)
        for stage in plan.run.stages
    }
    ours, theirs, early, cpu = [], [], [], []
    raw = plan.output.with_suffix(".raw")
    # The first is to warm up. And many: where the page cache takes memory that nobody had before, a virtual machine
    # writes at a tenth of its rate, to whichever side that happens (0.7 to 7 GB/s, by chance, of the same calls).
    for _ in range(_STORE_ROUNDS * repeats + 1):
        measure.remove(plan.output)
        os.sync()
        started, before = time.perf_counter(), time.process_time()
        with FeatureWriter.open(plan.output, plan.run, keys) as writer:
            for start in range(0, len(keys), size):
                writer.write(np.arange(start, start + size), maps, [InputFile(1, 1, b"0" * 16)] * size)
        ours.append(time.perf_counter() - started)
        cpu.append(time.process_time() - before)
        nbytes = plan.output.stat().st_size
        measure.remove(plan.output)
        os.sync()
        theirs.append(machine.raw_write(raw, nbytes))
        os.sync()
        early.append(machine.raw_write(raw, nbytes, early=True))
    return {
        "images": len(keys), "seconds": statistics.median(ours[1:]), "raw": statistics.median(theirs[1:]),
        "early": statistics.median(early[1:]), "cpu": statistics.median(cpu[1:]), "nbytes": nbytes,
    }  # fmt: skip


def rows(output: Path, folder: Path, repeats: int) -> dict[str, float]:
    """Seconds of 100 random rows, each by itself: of `output`, and as an .npy per row; both written anew, both warm."""
    with bbx.open(output) as file:
        stage = next(iter(file.stages))
        copy = folder / "copy.h5"
        copy.write_bytes(output.read_bytes())
        for row in range(len(file)):
            np.save(folder / f"{row}.npy", file[stage, row])
        chosen = np.random.default_rng(1).integers(0, len(file), _READ_ROWS).tolist()
    ours, theirs = [], []
    with bbx.open(copy) as file:
        view = file[stage]
        for _ in range(repeats + 1):
            started = time.perf_counter()
            for row in chosen:
                view[row]
            middle = time.perf_counter()
            for row in chosen:
                np.load(folder / f"{row}.npy")
            ours.append(middle - started)
            theirs.append(time.perf_counter() - middle)
    return {
        "rows": _READ_ROWS, "seconds": statistics.median(ours[1:]), "npy": statistics.median(theirs[1:]),
        "nbytes": view.nbytes // len(view),
    }  # fmt: skip


def past_deepest(backbone: Any, run: Any) -> int:
    """How many modules `run(pixels)` calls after the one whose output is the deepest stage asked for."""
    network, deepest = backbone.network, backbone.stages[-1].module
    over, past = False, 0

    def entered(_module: Any, _inputs: Any) -> None:
        nonlocal past
        past += over

    def left(_module: Any, _inputs: Any, _output: Any) -> None:
        nonlocal over
        over = True

    hooks = [module.register_forward_pre_hook(entered) for module in network.modules()]
    hooks.append(network.get_submodule(deepest).register_forward_hook(left))
    with torch.inference_mode():
        run(torch.zeros(1, 3, *backbone.preprocess.size))
    for hook in hooks:
        hook.remove()
    if not over:
        raise RuntimeError(f"{deepest} never ran")
    return past


def layers(job: Job) -> dict[str, int]:
    """Modules run past the deepest stage: by the backbone, and by the network itself, which goes to its end."""
    backbone = bbx.load_backbone(job.model, weights="random", stages=job.stages)
    _ = backbone.stages  # measures, which is a forward of its own
    return {"past": past_deepest(backbone, backbone), "whole": past_deepest(backbone, backbone.network)}


def main() -> None:
    """Prints what one piece took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("piece", choices=("forward", "decode", "store", "rows", "layers", "machine"))
    parser.add_argument("job", choices=tuple(JOBS))
    parser.add_argument("images", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", type=int, default=machine.cores())
    parser.add_argument("--bbx-options", default="")
    given = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
    torch.set_num_threads(given.cores)
    job = JOBS[given.job]
    plan = partial(plan_of, job, given.images, given.output, given.bbx_options.split())
    work: dict[str, Callable[[], Mapping[str, float]]] = {
        "forward": lambda: forward(plan()),
        "decode": lambda: decode(plan()),
        "store": lambda: store(plan(), given.repeats),
        "rows": lambda: rows(given.images, given.output, given.repeats),
        "layers": lambda: layers(job),
        "machine": lambda: {"bandwidth": machine.memory_bandwidth(), "product": machine.product_peak()},
    }
    json.dump(work[given.piece](), sys.stdout)


if __name__ == "__main__":
    main()
