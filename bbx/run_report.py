"""What an extraction tells its user on stderr: the plan, the progress, what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bbx.console import failures, open_console, plain, rate_text, shape_text

if TYPE_CHECKING:
    from bbx.plan import Plan, Rates, Summary

# Seconds between lines where there is no terminal to draw a bar on.
LINE_EVERY = 5.0


def plan(what: Plan, *, verbose: bool = False) -> None:
    """What is about to be done, on stderr."""
    from bbx.store import size_text

    run, images = what.run, what.images
    grid = Table.grid(padding=(0, 2))
    skipped = f" (skipped: {images.skipped:,} that are no images)" if images.skipped else ""
    grid.add_row("images", plain(f"{len(images):,}{skipped} from {', '.join(images.roots[:4])}"))
    grid.add_row("model", plain(f"{run.model}, weights {run.weights}"))
    grid.add_row("input", plain(run.preprocess.describe()))
    if run.norm != "raw":
        grid.add_row("norm", plain(run.norm))
    grid.add_row(
        "device", plain(f"{what.device}, {run.precision}, batches of {what.batch_size}, {what.workers} decoders")
    )
    grid.add_row("engine", plain(what.engine.describe()))
    for stage in run.stages:
        nbytes = stage.values * (2 if run.dtype == "float16" else 4)
        grid.add_row("stage", plain(f"{stage.name}  {shape_text(stage.shape)}  {size_text(nbytes)} per image"))
    pooled = f", {run.pool}-pooled" if run.pool != "none" else ""
    total = len(images) * run.row_nbytes
    needed = f"{size_text(total)} ({run.dtype}{pooled}); {size_text(what.free_nbytes)} free"
    grid.add_row("output", plain(f"{what.output}  {needed}"))
    if what.rates:
        packing = f", and then the packing by {what.compress}" if what.compress != "none" else ""
        grid.add_row("limit", plain(rates_text(what.rates, what.target.pending) + packing))
    target = what.target
    if target.state == "resume":
        grid.add_row("resume", plain(f"{target.done:,} done, {target.failed:,} failed, {target.pending:,} to do"))
    if target.state == "new" and what.retry_failed:
        grid.add_row("retry", plain("there is no output yet, and so no failed row"))
    if what.deterministic:
        grid.add_row("bits", plain("deterministic: the same on this machine each time"))
    if what.compress != "none" and target.state != "complete":
        grid.add_row("packed", plain(f"by {what.compress} at the end; until then both take their room"))
    if target.state == "complete":
        grid.add_row("complete", plain("this very run is there already: nothing to do"))
    if verbose:
        grid.add_row("digest", plain(f"run {run.sha256[:16]}, weights {run.weights_digest[:16]}"))
    console = open_console(stderr=True)
    console.print(grid)
    for line in (*what.backbone.notes, *images.warnings, *what.notes):
        console.print(Text("note: ", "yellow") + plain(line), soft_wrap=True)
    if run.dtype == "float16":
        console.print(Text("note: ", "yellow") + plain("netCDF4-python (xarray's first choice) crashes on float16; "
                                                       "h5py and h5netcdf read it"), soft_wrap=True)  # fmt: skip


@contextmanager
def progress() -> Iterator[Callable[[Summary], None]]:
    """Gives the function to call after each batch: a bar on a terminal, a line every few seconds elsewhere."""
    console = open_console(stderr=True)
    if not console.is_terminal:
        yield _line_writer(console)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.fields[what]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.1f} images/s"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]}"),
    )
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task("", total=None, rate=0.0, failed="", what="extracting")

    told = 0

    def update(summary: Summary) -> None:
        nonlocal told
        told = _tell_new(console, summary, told)
        failed = f"{summary.failed:,} failed" if summary.failed else ""
        seen = summary.done + summary.failed
        rate = summary.images_per_second
        what = f"packing {summary.packed:.0%}" if summary.packed else "extracting"
        bar.update(task, total=summary.rows, completed=seen, rate=rate, failed=failed, what=what)
        bar.start()  # not before the first batch: until then the plan is printed

    try:
        yield update
    finally:
        bar.stop()


def _line_writer(console: Console) -> Callable[[Summary], None]:
    last = time.monotonic()
    told = 0

    def write(summary: Summary) -> None:
        nonlocal last, told
        told = _tell_new(console, summary, told)
        if time.monotonic() - last < LINE_EVERY:
            return
        last = time.monotonic()
        seen = summary.done + summary.failed
        rate = summary.images_per_second
        left = clock_text((summary.rows - seen) / rate) if rate else "?"
        if summary.packed:
            console.print(plain(f"packing, {summary.packed:.0%}"))
            return
        text = f"{seen:,}/{summary.rows:,} images, {rate:.1f} images/s, {left} to go, {summary.failed:,} failed"
        console.print(plain(text))

    return write


def _tell_new(console: Console, summary: Summary, told: int) -> int:
    """What was changed on the way, said once; returns how many notes have been told."""
    for line in summary.notes[told:]:
        console.print(Text("note: ", "yellow") + plain(line), soft_wrap=True)
    return len(summary.notes)


def summary(result: Summary) -> None:
    """What came of it, on stderr."""
    console = open_console(stderr=True)
    grid = Table.grid(padding=(0, 2))
    grid.add_row("rows", plain(f"{result.rows:,}: {result.done:,} done, {result.failed:,} failed"))
    if result.extracted:
        grid.add_row(
            "speed", plain(f"{result.images_per_second:.1f} images/s, {result.extracted:,} in {result.wall:.1f} s")
        )
        split = (
            f"decode {result.decode:.1f} s, compute {result.compute:.1f} s, write {result.write:.1f} s (overlapping)"
        )
        grid.add_row("time", plain(split))
    for stage, count in result.overflow.items():
        grid.add_row("overflow", plain(f"{stage}: {count:,} values are beyond float16 and stored as infinity"))
    for stage, count in result.nonfinite.items():
        grid.add_row("not finite", plain(f"{stage}: {count:,} values are NaN or infinite as the network gave them"))
    for line in result.notes:
        grid.add_row("note", plain(line))
    console.print(grid)
    failures(console, result.failures, result.failed, f"bbx info --json {result.output} lists all")


def rates_text(rates: Rates, rows: int) -> str:
    """What limits a run of `rows` images, in which company, and how long they take."""
    alone = {"decode": rates.decode, "compute": rates.compute, "store": rates.store}
    others = ", ".join(f"{name} {rate_text(rate)}" for name, rate in alone.items() if name != rates.limit)
    shared = f"; {rate_text(rates.expected)} on shared cores" if rates.expected < rates.least else ""
    long = duration_text(rows / rates.expected)
    return f"{rates.limit}: {rate_text(rates.least)} images/s ({others}){shared}: about {long} for {rows:,} images"


def clock_text(seconds: float) -> str:
    """`107892.0` → `29:58:12`: hours do not begin again with each day."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest:02}"


def duration_text(seconds: float) -> str:
    """`32400` → `9 h`, rounded as a guess is."""
    for unit, length, until in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < until * length:
            return f"{max(1, round(seconds / length))} {unit}"
    return f"{seconds / 86400:.3g} days"
