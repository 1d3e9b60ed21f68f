"""What the machine allows, and how near bbx comes to it: each piece alone, and the promises that are no contest."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bbx.errors import BbxError
from tests.benchmarks import jobs, machine, measure
from tests.benchmarks.jobs import JOBS, Job
from tests.benchmarks.pictures import ROOT
from tests.benchmarks.report import Row
from tests.benchmarks.settings import Settings

# How many times the pictures the longer of two runs has, whose difference is what a run takes under way.
_LONGER = 3


def limits(settings: Settings) -> Iterator[Row]:
    """All of them, for job A where a job is meant."""
    job = JOBS["A"]
    parts: dict[str, Callable[[], Iterable[Row]]] = {
        "machine": lambda: _machine(settings),
        "pieces": lambda: _pieces(job, settings),
        "store": lambda: _store(job, settings),
        "kill + resume": lambda: _killed(job, settings),
        "memory": lambda: [_memory(job, settings)],
        "layers": lambda: _layers(settings),
        "start-up": lambda: _start_up(job, settings),
    }
    for name, part in parts.items():
        try:
            yield from part()
        except (measure.RunError, BbxError) as error:  # the other parts still have something to say
            yield Row(f"limits, {name}", f"failed: {error}", error=True)


def piece(name: str, job: Job, settings: Settings, *words: object, cores: int = 0) -> dict[str, Any]:
    """What `pieces` measured, in a process of its own."""
    output = settings.folder / "piece.h5"
    given = words or (settings.pictures, output)
    command = [sys.executable, "-m", "tests.benchmarks.pieces", name, job.name, *map(str, given)]
    command += ["--repeats", str(settings.repeats), "--cores", str(cores or machine.cores())]
    command += [f"--bbx-options={' '.join(settings.words)}"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    measure.remove(output)
    if ran.returncode:
        raise measure.RunError(f"{name}: {(ran.stderr.strip().splitlines() or ['no words'])[-1]}")
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def _machine(settings: Settings) -> Iterator[Row]:
    found = piece("machine", JOBS["A"], settings)
    yield Row("limit: memory bandwidth", f"{found['bandwidth'] / 1e9:.1f} GB/s, read and written", found["bandwidth"])
    yield Row("limit: float32 matrix products", f"{found['product'] / 1e9:.0f} GFLOP/s", found["product"])


def _pieces(job: Job, settings: Settings) -> Iterator[Row]:
    """Decode, forward and store alone, and the end-to-end rate beside what their CPU time allows on these cores.

    All in turn, a piece a process: what this machine does in a second is not the same from one minute to the next.
    """
    once = replace(settings, repeats=1)
    output = settings.folder / "out"
    sizes = {"short": settings.images, "long": _LONGER * settings.images}
    sides: dict[str, Callable[[], Any]] = {
        name: partial(measure.run, jobs.extract(job, settings.some(size), output, settings.words), output)
        for name, size in sizes.items()
    }
    sides |= {name: partial(piece, name, job, once) for name in ("decode", "forward", "store")}
    if settings.device == "cpu":
        sides["alone"] = partial(piece, "forward", job, once, cores=1)
    found = measure.alternate(sides, settings.repeats)
    cpu = {name: statistics.median(map(_per, found[name])) for name in sides if name not in sizes}
    rates = {}
    for name, told in (("decode", "decode"), ("forward", "forward, null sink"), ("store", "store")):
        rates[name] = statistics.median(one["images"] / one["seconds"] for one in found[name])
        yield Row(f"limit: {told} alone", f"{rates[name]:.1f} images/s, CPU {cpu[name]:.1f} ms/image", rates[name])
    short, long = (measure.median(found[name]).seconds for name in sizes)
    rate = (sizes["long"] - sizes["short"]) / max(long - short, 1e-9)
    yield from _of_cores(rate, cpu) if settings.device == "cpu" else _of_pieces(rate, rates)


def _of_pieces(rate: float, rates: Mapping[str, float]) -> Iterator[Row]:
    """On a GPU, where a piece is what is waited for: `rate` beside the slowest of them."""
    least = min(rates, key=rates.__getitem__)
    value = f"{rate / rates[least]:.3f} ({rate:.1f} of {rates[least]:.1f} images/s: {least})"
    yield Row("end to end ÷ least of decode, forward and store, on a GPU", value, rate / rates[least])


def _of_cores(rate: float, cpu: Mapping[str, float]) -> Iterator[Row]:
    """On a CPU, where all pieces want the same cores: `rate` beside what their `cpu`, ms an image, allows."""
    count = machine.cores()
    yield Row("limit: forward alone on one core", f"CPU {cpu['alone']:.1f} ms/image", cpu["alone"])
    # Each part as the engine runs it, on all cores, which share caches and memory; beside it, by a core to itself.
    ideal, by_one = (1000 * count / (cpu["decode"] + cpu[name] + cpu["store"]) for name in ("forward", "alone"))
    parts = " + ".join(f"{name} {cpu[name]:.1f}" for name in ("decode", "forward", "store"))
    other = f"{rate / by_one:.3f} by the {cpu['alone']:.1f} ms of a forward on one core alone"
    value = f"{rate / ideal:.3f} ({rate:.2f} of {ideal:.2f} images/s; {parts} ms on {count} cores; {other})"
    yield Row("end to end ÷ what CPU time allows", value, rate / ideal)


def _per(found: dict[str, Any]) -> float:
    """CPU milliseconds per image."""
    return 1000.0 * found["cpu"] / found["images"]


def _store(job: Job, settings: Settings) -> Iterator[Row]:
    """The writer against plain writes; single rows read back against `np.load`."""
    found = piece("store", job, settings)
    written = found["nbytes"] / found["raw"]
    yield Row("limit: raw write + fsync", f"{written / 1e6:,.0f} MB/s", written)
    ratio = found["raw"] / found["seconds"]
    ours = found["nbytes"] / found["seconds"]
    yield Row("store alone ÷ raw write + fsync", f"{ratio:.3f} ({ours / 1e6:,.0f} of {written / 1e6:,.0f} MB/s)", ratio)
    early = found["nbytes"] / found["early"]
    told = f"{ours / early:.3f} ({early / 1e6:,.0f} MB/s)"
    yield Row("store alone ÷ raw write, laid out before and sent early", told, ours / early)
    output, folder = settings.folder / "out", settings.folder / "npy"
    measure.run(jobs.extract(job, settings.pictures, output, settings.words), output)
    folder.mkdir()
    found = piece("rows", job, settings, output, folder)
    measure.remove(folder)
    ratio = found["npy"] / found["seconds"]
    each = [1e6 * found[name] / found["rows"] for name in ("seconds", "npy")]
    yield Row(
        "random row read ÷ np.load of one row's .npy",
        f"{ratio:.2f} ({each[0]:.0f} and {each[1]:.0f} µs for {found['nbytes'] / 1e6:.1f} MB)",
        ratio,
    )


def _killed(job: Job, settings: Settings) -> Iterator[Row]:
    """SIGKILL half-way, and the same command again: what that costs over a run that was left alone, in turn with it."""
    output = settings.folder / "out"
    command = [word for word in jobs.extract(job, settings.pictures, output, settings.words)]
    command[command.index("overwrite")] = "auto"
    few = jobs.extract(job, settings.some(1), output, settings.words)
    taken = [_interrupted(command, few, output) for _ in range(settings.repeats)]
    cost, whole, start, kept = (statistics.median(column) for column in zip(*taken, strict=True))
    value = f"{cost:.1f} s over an undisturbed run of {whole:.1f} s, a start of {start:.1f} s among them; "
    value += f"{kept:.0f} of {settings.images} rows were kept at the kill half-way"
    yield Row("kill + resume", value, cost)


def _interrupted(command: Sequence[str], few: Sequence[str], output: Path) -> tuple[float, float, float, int]:
    """Seconds that a kill half-way costs, of the whole without it, of a start; and how many rows were kept."""
    whole = measure.run(command, output).seconds
    start = measure.run(few, output).seconds
    measure.remove(output)
    os.sync()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen(command, cwd=ROOT, env=measure.environment(), **quiet)
    time.sleep((whole + start) / 2)
    child.kill()
    child.wait()
    kept = _done(output)
    began = time.perf_counter()
    again = subprocess.run(command, cwd=ROOT, env=measure.environment(), capture_output=True, text=True, check=False)
    resumed = time.perf_counter() - began
    measure.remove(output)
    if again.returncode:
        raise measure.failed(again.stderr, again.returncode)
    return (whole + start) / 2 + resumed - whole, whole, start, kept


def _done(output: Path) -> int:
    import bbx

    if not output.with_name(f"{output.name}.partial").exists():
        return 0
    with bbx.open(output, partial=True) as file:
        return int(file.counts.done)


def _memory(job: Job, settings: Settings) -> Row:
    """The resident peak of the process that computes and writes; a decoder holds one picture."""
    output, few = settings.folder / "out", settings.images
    sides = {
        str(count): partial(measure.run, jobs.extract(job, settings.some(count), output, settings.words), output)
        for count in (few, 10 * few)
    }
    taken = measure.alternate(sides, settings.repeats)
    peaks = [statistics.median(one.peak for one in runs) for runs in taken.values()]
    measure.remove(output)
    ratio = peaks[1] / peaks[0]
    value = f"{ratio:.3f} × ({peaks[1] / 1e6:,.0f} MB with {10 * few} images, {peaks[0] / 1e6:,.0f} with {few})"
    return Row("peak memory at 10 × the images", value, ratio)


def _layers(settings: Settings) -> Iterator[Row]:
    """Over all jobs; the network's own count shows that there was something to leave out."""
    past, told = 0, []
    for name in settings.jobs:
        found = piece("layers", JOBS[name], settings)
        past += found["past"]
        told.append(f"{name}: {found['past']} of {found['whole']}")
    yield Row("layers run past the deepest stage", f"job {', '.join(told)}", past)


def _start_up(job: Job, settings: Settings) -> Iterator[Row]:
    """What a user waits for where nothing is computed."""
    output = settings.folder / "features.h5"
    measure.run(jobs.extract(job, settings.some(1), output, settings.words), output)
    drawn = settings.folder / "drawn"
    grid = ("show", output, "--image", "000000.jpg", "--stages", "stage1", "-o", drawn / "grid.png")
    commands = {"bbx --help": ("--help",), "bbx info": ("info", output), "bbx show of one grid": grid}
    sides = {name: partial(measure.run, jobs.bbx(*words)) for name, words in commands.items()}
    for side in sides.values():
        side()
    for name, taken in measure.alternate(sides, settings.repeats).items():
        seconds = measure.median(taken).seconds
        yield Row(f"start-up: {name}", f"{seconds:.2f} s", seconds)
