"""The measurements of `bbx bench`, in the order of the pipeline; the plan is that of `bbx extract` itself."""

from __future__ import annotations

import os
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bbx.bench.folder import own_folder
from bbx.bench.pictures import make_pictures
from bbx.bench.result import Bench
from bbx.engine import EngineSettings, choose, forward_rate, grow, usual_threads
from bbx.errors import StartError, UsageError
from bbx.images import find_images
from bbx.plan import Plan, Rates, Summary, attempt, free_nbytes
from bbx.rates import LONG, decode_rate, measured, sample, write_rate
from bbx.runner import extract
from bbx.spec import BatchSize, Decode, Dtype, Engine, Precision
from bbx.store import FeatureWriter, size_text

END_SECONDS = 2.0
"""About how long the extraction at the end takes."""
_STORED_NBYTES, _STORED_ROWS = 64_000_000, 512
_END_NBYTES = 1_000_000_000
_FEWEST = 64
# Compiled code has to gain this much to be worth its minute.
_COMPILE_GAIN = 1.05

Images = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def bench(
    model: str,
    images: Images | None = None,
    *,
    stages: str | Sequence[str | int] | None = None,
    device: str = "auto",
    batch_size: BatchSize | None = None,
    workers: int | None = None,
    precision: Precision = "float32",
    dtype: Dtype = "float32",
    weights: str | None = None,
    size: int | tuple[int, int] | None = None,
    engine: Engine = "eager",
    tell: Callable[[str], None] | None = None,
) -> Bench:
    """Measures what `bbx.extract` with these options does here.

    `images` as there, by default 64 made ones; `weights`, too, by default random, for speed does not ask what they are.
    Files are written into a folder of their own below the current one, which is removed. `engine`: `compile` measures
    compiled code, too. `tell` hears what is being measured. Raises what `bbx.extract` does.
    """
    say = tell or (lambda _what: None)
    options: dict[str, Any] = {
        "model": model, "stages": stages, "device": device, "batch_size": batch_size, "workers": workers,
        "precision": precision, "dtype": dtype, "weights": weights or "random", "size": size,
    }  # fmt: skip
    with own_folder(Path()) as folder:
        made = images is None or not (isinstance(images, str | os.PathLike) or len(images))
        say("the model; decoding, computing and writing alone")
        paths = make_pictures(folder) if made else _paths(images)
        plan = _plan(folder, _links(folder, paths, LONG - 1), options)
        command = _command({**options, "weights": weights}, images)
        return _measured(plan, folder, paths, options, engine=engine, made=made, command=command, say=say)


def _measured(
    plan: Plan,
    folder: Path,
    paths: Sequence[Path],
    options: dict[str, Any],
    *,
    engine: Engine,
    made: bool,
    command: Callable[[int, Engine], str],
    say: Callable[[str], None],
) -> Bench:
    where, backbone, work = plan.device, plan.backbone, plan.work
    alone, workers = plan.rates, plan.decoders(len(plan.images))
    if alone is None:
        raise StartError(plan.notes[-1], "make room on the disk of the current folder, or go to another one")
    say("fast decoding")
    fast = replace(plan.decoding, preprocess=plan.decoding.preprocess.override(decode="fast"))
    decode_fast = decode_rate(sample(plan.images, workers), fast, workers, device=where)
    decode_gpu = _gpu_rate(plan)
    say("the forward in other ways")
    one_stream = EngineSettings(threads=usual_threads())
    plain = forward_rate(backbone, where, work, one_stream).rate
    whole = forward_rate(backbone.select(backbone.stage_names[-1]), where, work, plan.engine).rate
    compiled = None
    if engine == "compile":
        how = choose(backbone, where, engine="compile", rows=10**9, batch_size=work.batch_size)
        compiled = forward_rate(backbone, where, work, how).rate
    say("the forward by batch size")
    growth = grow(
        backbone, where, work, lambda size: choose(backbone, where, rows=10**9, batch_size=size), most=10**9
    )  # fmt: skip
    say("the store")
    stored, raw = _store_rates(plan, folder)
    store = stored / plan.run.row_nbytes
    rates = replace(alone, store=store)
    say("all together")
    end_to_end, rows, said = _end_to_end(plan, folder, paths, rates, options)
    best: Engine = "compile" if compiled and compiled > _COMPILE_GAIN * alone.compute else "eager"
    best_size = growth.best if best == "eager" else plan.batch_size  # that of the compiled code that was measured
    return Bench(
        model=plan.run.model, weights=plan.run.weights, stages=tuple(stage.name for stage in plan.run.stages),
        device=str(attempt(plan)["device"]), precision=plan.run.precision, dtype=plan.run.dtype,
        images=len(paths), made=made, batch_size=plan.batch_size, workers=plan.workers, engine=plan.engine,
        rates=rates, decode_fast=decode_fast, decode_gpu=decode_gpu, plain=plain, compiled=compiled,
        whole=whole, batches=growth.tried, batches_why=growth.why,
        store_nbytes=stored, raw_nbytes=raw, end_to_end=end_to_end, end_rows=rows,
        best_engine=best, best_batch_size=best_size, command=command(best_size, best),
        notes=(*_notes(plan, rates, {"fast": decode_fast, "gpu": decode_gpu}), *said),
    )  # fmt: skip


def _paths(images: Images | None) -> list[Path]:
    """The images to measure with, spread over all that are named."""
    assert images is not None
    found = find_images([images] if isinstance(images, str | os.PathLike) else images)
    rows = np.unique(np.linspace(0, len(found) - 1, LONG - 1).astype(int))
    return [Path(found.path(int(row))).absolute() for row in rows]


def _links(folder: Path, paths: Sequence[Path], count: int) -> list[str]:
    """`count` names for `paths`, one after the other and again: a job of any length from a handful of pictures."""
    names = [folder / "links" / f"{number:05}{paths[number % len(paths)].suffix}" for number in range(count)]
    names[0].parent.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        if not name.is_symlink():
            name.symlink_to(paths[number % len(paths)])
    return [str(name) for name in names]


def _plan(folder: Path, links: list[str], options: dict[str, Any]) -> Plan:
    """What `bbx extract` would do with a long job, whatever the disk says to that, and the rates for it."""
    plans: list[Plan] = []
    try:
        extract(links, output=folder / "end.h5", dry_run=True, on_plan=plans.append, **options)
    except StartError:
        if not plans:
            raise
    return plans[0] if plans[0].rates or plans[0].needed_nbytes <= plans[0].free_nbytes else measured(plans[0])


def _store_rates(plan: Plan, folder: Path) -> tuple[float, float]:
    """Bytes/s of bbx's store, and of writing as many bytes plainly, in turns; the median of each."""
    run, batch = plan.run, min(plan.batch_size, 8)
    batches = max(1, min(_STORED_NBYTES // run.row_nbytes, _STORED_ROWS) // batch)
    random = np.random.default_rng(0)
    maps = {
        stage.name: random.standard_normal((batch, *stage.shape), np.float32).astype(run.dtype) for stage in run.stages
    }
    nbytes = batches * batch * run.row_nbytes
    stored, raw = [], []
    for turn in range(2):
        raw.append(write_rate(folder, nbytes))
        keys = [str(row) for row in range(batches * batch)]
        path = folder / f"store{turn}.h5"
        with FeatureWriter.open(path, run, keys) as writer:
            started = time.perf_counter()
            for first in range(0, len(keys), batch):
                writer.write(np.arange(first, first + batch), maps)
        stored.append(nbytes / (time.perf_counter() - started))
        path.unlink()
    return statistics.median(stored), statistics.median(raw)


def _end_to_end(
    plan: Plan, folder: Path, paths: Sequence[Path], rates: Rates, options: dict[str, Any]
) -> tuple[float, int, list[str]]:
    """Images/s of an extraction once it is under way, how many images it took, and what is to be said of them.

    Raises `StartError` where all are: their rates would be of nothing.
    """
    room = max(1, min(_END_NBYTES, free_nbytes(folder / "end.h5") // 4) // plan.run.row_nbytes)
    # As many as keep busy what a long job starts: streams, and decoding processes.
    least = max(_FEWEST, max(6, 2 * plan.engine.streams) * plan.batch_size, 8 * plan.workers)
    most = min(room, LONG - 1)
    count = min(max(least, int(rates.expected * END_SECONDS)), most)
    seen: list[tuple[int, float]] = []

    def progress(summary: Summary) -> None:
        seen.append((summary.extracted + summary.failed, summary.wall))

    links = _links(folder, paths, count)
    ran = extract(links, output=folder / "end.h5", progress=progress, **{**options, "batch_size": plan.batch_size})
    if not ran.done:
        raise StartError(f"not one image can be read: {next(iter(ran.failures.values()))}", "name other images")
    notes = [f"{ran.failed} of {len(links)} images cannot be read, and are in the rates"] if ran.failed else []
    if most < least:
        room_text = f"{size_text(_END_NBYTES)}, a quarter of the disk's room, or {LONG - 1:,} images"
        notes.append(f"all together was measured with {count:,} images: the {least:,} that keep busy what a long job "
                     f"starts are more than {room_text} (--batch-size)")  # fmt: skip
    # The first batches wait for decoders to start.
    first = next((one for one in seen if one[0] >= count / 4), seen[-1])
    last = seen[-1]
    rows, seconds = (last[0] - first[0], last[1] - first[1]) if last[0] > first[0] else last
    return rows / seconds, count, notes


def _command(options: dict[str, Any], images: Images | None) -> Callable[[int, Engine], str]:
    """Makes the command line that extracts with a batch size and an engine; options left out stay so."""
    usual = {"device": "auto", "precision": "float32", "dtype": "float32"}
    words = ["bbx", "extract"]
    for name, value in options.items():
        if value is not None and value != usual.get(name) and name != "batch_size":
            text = "x".join(map(str, value)) if name == "size" and isinstance(value, tuple) else value
            text = ",".join(map(str, text)) if isinstance(text, list | tuple) else text
            words += [f"--{name}", str(text)]
    given = [images] if isinstance(images, str | os.PathLike) else images or ["images/"]
    named = [os.fspath(one) for one in given]

    def command(batch_size: int, engine: Engine) -> str:
        how = ["--engine", engine] if engine != "eager" else []
        return shlex.join([*words, "--batch-size", str(batch_size), *how, *named])

    return command


def _gpu_rate(plan: Plan) -> float | None:
    """Images/s that the run's own device decodes, if it can."""
    decoding = replace(plan.decoding, preprocess=replace(plan.decoding.preprocess, decode="gpu"))
    try:
        workers = plan.decoders(len(plan.images))
        return decode_rate(sample(plan.images, workers), decoding, workers, device=plan.device)
    except (UsageError, StartError):  # not this device, not these weights' resize
        return None


def _notes(plan: Plan, rates: Rates, others: Mapping[Decode, float | None]) -> tuple[str, ...]:
    notes = [*plan.backbone.notes, *plan.notes]
    best = max(others, key=lambda word: others[word] or 0)
    if rates.limit == "decode" and (others[best] or 0) > rates.decode:
        notes.append(f"decoding is the limit: --decode {best} gives nearly the same pixels for less")
    if rates.limit == "store" and plan.run.dtype == "float32":
        notes.append("the store is the limit: --dtype float16 halves what is written, --pool avg makes it a vector")
    return tuple(notes)
