"""Talk, in Rich: the plan, the progress, the tables, the error; never on stdout, which is for data.

Names of files and stages come from outside, so they are drawn as plain text: no markup, no control characters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bbx.errors import BbxError

if TYPE_CHECKING:
    from bbx.compare import Comparison
    from bbx.plan import Plan, Rates, Summary
    from bbx.spec import Preprocess, Stage
    from bbx.store import FeatureFile

# Seconds between lines where there is no terminal to draw a bar on.
LINE_EVERY = 5.0
_FAILURES_SHOWN = 10
_NUMERIC = ("index", "channels", "stride", "bytes per image", "parameters", "rows", "equal", "beyond", "largest error",
            "mean error", "least cosine", "images/s")  # fmt: skip


def open_console(*, stderr: bool) -> Console:
    """stderr for talk, stdout for data."""
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 140  # a log file has no width; 80 would fold every path
    return console


def plain(text: object) -> Text:
    """Untrusted text: control characters are shown as escapes, markup as written."""
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text))
    return Text(shown)


def error(problem: BbxError) -> None:
    """The error and its hint, on stderr."""
    console = open_console(stderr=True)
    console.print(Text("error: ", "bold red") + _lines(problem.message), soft_wrap=True)
    for line in problem.hint.splitlines():
        console.print(Text("  hint: ", "cyan") + plain(line), soft_wrap=True)
    for line in getattr(problem, "__notes__", ()):
        console.print(plain(line))


def note(text: str) -> None:
    """One line of talk, on stderr."""
    open_console(stderr=True).print(plain(text), soft_wrap=True)


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
    if what.compress != "none":
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
        left = time.strftime("%H:%M:%S", time.gmtime((summary.rows - seen) / rate)) if rate else "?"
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
    _failures(console, result.failures, result.failed, f"bbx info --json {result.output} lists all")


def stages(
    title: str,
    found: Sequence[Stage],
    parameters: Mapping[str, int],
    preprocess: Preprocess,
    notes: Sequence[str] = (),
) -> None:
    """`bbx stages`, on stdout."""
    from bbx.store import size_text

    shown = table("stage", "index", "module", "channels", "stride", "height × width", "bytes per image", "parameters")
    for stage in found:
        grid = shape_text(stage.shape[1:]) if len(stage.shape) == 3 else "-"
        row = (stage.name, stage.index, stage.module, stage.channels, f"{stage.stride:g}", grid,
               size_text(4 * stage.values), f"{parameters[stage.name]:,}")  # fmt: skip
        shown.add_row(*(plain(cell) for cell in row))
    console = open_console(stderr=False)
    console.print(plain(title))
    console.print(shown)
    console.print(plain(f"preprocessing: {preprocess.describe()}"), soft_wrap=True)
    for line in notes:
        console.print(Text("note: ", "yellow") + plain(line), soft_wrap=True)


def comparison(result: Comparison) -> None:
    """`bbx stages --compare`, on stdout: stage by stage, one line per library."""
    console = open_console(stderr=False)
    height, width = result.size
    console.print(plain(f"{result.name}: the same random weights (seed {result.seed}), input {height}×{width}"))
    shown = table("stage", "library", "its name", "index", "channels × height × width", "stride", "native norm",
                   "border", "largest relative difference")  # fmt: skip
    for name in result.stages:
        for column in result.columns:
            for cell in (cell for cell in column.cells if cell.stage == name):
                same = "reference" if column.library == result.reference else "other shape"
                told = same if cell.difference is None else "equal" if not cell.difference else f"{cell.difference:.1e}"
                row = (name, column.library, cell.called, "-" if cell.place is None else cell.place,
                       shape_text(cell.shape), f"{cell.stride:g}", cell.norm or "none", cell.padding, told)  # fmt: skip
                shown.add_row(*(plain(part) for part in row))
    console.print(shown)
    for column in result.columns:
        told = f"{column.library}: {column.model or '-'}"
        if column.reason:
            told += f" · {column.status}: {column.reason}" + (f" ({column.hint})" if column.hint else "")
        console.print(plain(told), soft_wrap=True)
        for line in column.notes:
            console.print(plain(f"  {line}"), soft_wrap=True)


def models(found: Sequence[Mapping[str, Any]]) -> None:
    """`bbx models`, on stdout."""
    # Without Rich: laying out 1,500 rows of its table takes it seconds.
    rows = [("name", "alias", "provider", "family", "parameters", "stride", "weights")]
    for model in found:
        weights = [f"{name}*" if name in model["here"] else name for name in model["weights"]]
        parameters = "" if model["parameters"] is None else f"{model['parameters']:,}"
        stride = "" if model["stride"] is None else f"{model['stride']:g}"
        names = (model["name"], model["alias"], model["provider"], model["family"] or "")
        rows.append((*names, parameters, stride, ", ".join(weights)))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    out = open_console(stderr=False)
    for number, row in enumerate(rows):
        left = "  ".join(cell.ljust(width) for cell, width in zip(row[:4], widths, strict=False))
        right = "  ".join(cell.rjust(width) for cell, width in zip(row[4:6], widths[4:], strict=False))
        out.out(f"{left}  {right}  {row[6]}".rstrip(), style="bold" if number == 0 else None)
    stderr = open_console(stderr=True)
    if any(model["here"] for model in found):
        stderr.print(plain("* on this machine"))
    for name in sorted({model["provider"] for model in found if not model["installed"]}):
        stderr.print(plain(f"{name} is not installed: pip install 'bbx[{name}]'"))


def info(file: FeatureFile) -> None:
    """`bbx info`, on stdout."""
    from bbx.store import size_text

    console = open_console(stderr=False)
    run, counts = file.run, file.counts
    grid = Table.grid(padding=(0, 2))
    grid.add_row("file", plain(f"{file.path}  {size_text(file.nbytes)}"))
    rows = f"{len(file):,}: {counts.done:,} done, {counts.failed:,} failed, {counts.pending:,} pending"
    grid.add_row("rows", plain(rows))
    if counts.pending:
        grid.add_row("unfinished", plain("the bbx extract command that began it continues it"))
    grid.add_row("model", plain(f"{run.model}, weights {run.weights}"))
    grid.add_row("digest", plain(f"weights {run.weights_digest}"))
    grid.add_row("input", plain(run.preprocess.describe()))
    made = f"{run.dtype}, computed in {run.precision}, pool {run.pool}, norm {run.norm}{', tokens' * run.tokens}"
    grid.add_row("values", plain(made))
    if run.config:
        grid.add_row("config", plain(run.config))
    for attempt in file.attempts:
        known = ("time", "end", "host", "device", "merged_from", "unreadable")
        facts = ", ".join(f"{name} {attempt[name]}" for name in known if attempt.get(name))
        grid.add_row("start", plain(facts))
    console.print(grid)
    shown = table("stage", "shape", "stride", "module")
    for stage in file.stages.values():
        cells = (stage.name, shape_text((len(file), *stage.shape)), f"{stage.stride:g}", stage.module)
        shown.add_row(*(plain(cell) for cell in cells))
    console.print(shown)
    _failures(console, file.failed, counts.failed, "bbx info --json lists all")


def _failures(console: Console, reasons: Mapping[str, str], count: int, more: str) -> None:
    for key, reason in islice(reasons.items(), _FAILURES_SHOWN):
        console.print(Text("failed: ", "yellow") + plain(f"{key}: {reason}"), soft_wrap=True)
    if count > _FAILURES_SHOWN:
        console.print(plain(f"… and {count - _FAILURES_SHOWN:,} more: {more}"), soft_wrap=True)


def rates_text(rates: Rates, rows: int) -> str:
    """What limits a run of `rows` images, in which company, and how long they take."""
    alone = {"decode": rates.decode, "compute": rates.compute, "store": rates.store}
    others = ", ".join(f"{name} {rate_text(rate)}" for name, rate in alone.items() if name != rates.limit)
    shared = f"; {rate_text(rates.expected)} on shared cores" if rates.expected < rates.least else ""
    long = duration_text(rows / rates.expected)
    return f"{rates.limit}: {rate_text(rates.least)} images/s ({others}){shared}: about {long} for {rows:,} images"


def rate_text(value: float) -> str:
    """Three digits: `31.2`, `280`, `12,300`."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration_text(seconds: float) -> str:
    """`32400` → `9 h`, rounded as a guess is."""
    for unit, length, until in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < until * length:
            return f"{max(1, round(seconds / length))} {unit}"
    return f"{seconds / 86400:.3g} days"


def shape_text(shape: Sequence[int]) -> str:
    """`(96, 56, 56)` → `96×56×56`."""
    return "×".join(map(str, shape))


def table(*headers: str) -> Table:
    """An empty table with these columns, numbers to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        numeric = header in _NUMERIC
        made.add_column(header, justify="right" if numeric else "left", no_wrap=header in ("name", "stage"))
    return made


def grid_of(lines: Iterable[tuple[str, str]]) -> Table:
    """Words beside what they name."""
    grid = Table.grid(padding=(0, 2))
    for word, text in lines:
        grid.add_row(word, plain(text))
    return grid


def _lines(text: str) -> Text:
    return Text("\n").join(plain(line) for line in text.splitlines() or [""])
