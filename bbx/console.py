"""Talk, in Rich, on stderr, and the tables that a user asked for, on stdout; of a run, `run_report` tells.

Names of files and stages come from outside, so they are drawn as plain text: no markup, no control characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bbx.errors import BbxError

if TYPE_CHECKING:
    from bbx.compare import Comparison
    from bbx.spec import Preprocess, Stage
    from bbx.store import FeatureFile

_FAILURES_SHOWN = 10
_NUMERIC = ("index", "channels", "stride", "bytes per image", "parameters", "rows", "equal", "beyond", "largest error",
            "mean error", "least cosine", "images/s")  # fmt: skip


class _Console(Console):
    """Rich's own ends the process with 1 where nobody reads any more, whichever stream it is."""

    def _check_buffer(self) -> None:
        """Writes. Talk that cannot be told (no reader, no terminal, a full disk) is let go of; data is not."""
        try:
            super()._check_buffer()
        except OSError:
            if not self.stderr:
                raise
            self.quiet = True

    def on_broken_pipe(self) -> None:
        """Called in Rich's `except`: an error as any other, which `main` has a code for."""
        raise


def open_console(*, stderr: bool) -> Console:
    """stderr for talk, stdout for data."""
    console = _Console(stderr=stderr, highlight=False, markup=False, emoji=False)
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
    failures(console, file.failed, counts.failed, "bbx info --json lists all")


def failures(console: Console, reasons: Mapping[str, str], count: int, more: str) -> None:
    """The first of `count` images that failed, and why; `more` says what lists all."""
    for key, reason in islice(reasons.items(), _FAILURES_SHOWN):
        console.print(Text("failed: ", "yellow") + plain(f"{key}: {reason}"), soft_wrap=True)
    if count > _FAILURES_SHOWN:
        console.print(plain(f"… and {count - _FAILURES_SHOWN:,} more: {more}"), soft_wrap=True)


def rate_text(value: float) -> str:
    """Three digits: `31.2`, `280`, `12,300`."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


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
