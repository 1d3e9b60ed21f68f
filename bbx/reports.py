"""What `verify`, `diff`, `merge` and `export` found, told in Rich; talk on stderr, their findings on stdout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from bbx.console import grid_of, note, open_console, plain, shape_text, table

if TYPE_CHECKING:
    from bbx.diff import Difference
    from bbx.export import Exported
    from bbx.store.merge import Merged
    from bbx.store.sources import Names
    from bbx.verify import Verdict

_SHOWN = 10


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Gives the function to call with `(done, total)`; a bar on a terminal, silence in a log."""
    console = open_console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    bar = Progress(
        TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console, transient=True
    )
    task = bar.add_task("", total=None)
    with bar:
        yield lambda done, total: bar.update(task, total=total, completed=done)


def facts_of(result: Any) -> dict[str, Any]:
    """A frozen result as plain data, for `--json`."""
    facts = asdict(result)
    if hasattr(result, "exit_code"):
        facts["exit_code"] = result.exit_code
    return facts


def verdict(result: Verdict, *, quiet: bool = False) -> None:
    """`bbx verify`, on stdout."""
    from bbx.store import size_text

    health = result.health
    console = open_console(stderr=False)
    for finding in health.damage:
        console.print(plain(f"damaged: {finding.text}"), soft_wrap=True)
    if health.damage_total > len(health.damage):
        console.print(plain(f"… and {health.damage_total - len(health.damage):,} more"), soft_wrap=True)
    for row in result.differing:
        console.print(plain(f"{row.outcome}: {row.key}{_errors(row.errors)}{_because(row.why)}"), soft_wrap=True)
    if quiet:
        return
    counts = health.counts
    lines = [
        ("file", f"{health.path}" + ("" if health.finished else " (unfinished)")),
        ("rows", f"{counts.done:,} done, {counts.failed:,} failed, {counts.pending:,} pending"),
        ("checked", f"{health.checked:,} rows, {size_text(health.nbytes)} of features"),
    ]
    for stage, odd in health.nonfinite.items():
        some = ", ".join(odd.keys[:3])
        lines.append(
            ("not finite", f"{stage}: {odd.nan:,} NaN, {odd.infinite:,} infinite in {odd.rows:,} rows ({some})")
        )
    if result.recomputed:
        confirmed = [row for row in result.recomputed if row.outcome == "equal"]
        largest = max((error for row in confirmed for error in row.errors.values()), default=0.0)
        told = f"{len(confirmed):,} of {len(result.recomputed):,} rows confirmed, largest relative difference"
        lines.append(("recomputed", f"{told} of those {largest:.1e} (tolerance {result.tolerance:.1e})"))
    lines += [("other now", text) for text in result.changes]
    lines += [("note", text) for text in health.notes]
    damage = f"{health.damage_total:,} findings in {health.damaged_rows:,} rows"
    doubt = f"; {len(result.differing):,} recomputed rows are NOT CONFIRMED" if result.differing else ""
    lines.append(("verdict", ("sound" if health.sound else f"DAMAGED: {damage}") + doubt))
    console.print(grid_of(lines))


def difference(result: Difference, *, quiet: bool = False) -> None:
    """`bbx diff`, on stdout."""
    console = open_console(stderr=False)
    if not quiet:
        shown = table("stage", "rows", "equal", "beyond", "largest error", "of", "mean error", "least cosine", "of ")
        for stage in result.stages:
            cells = (
                stage.stage,
                f"{stage.rows:,}",
                f"{stage.equal:,}",
                f"{stage.beyond:,}",
                f"{stage.worst_error:.2e}",
                stage.worst_key,
                f"{stage.mean_error:.2e}",
                f"{stage.least_cosine:.7f}",
                stage.least_cosine_key,
            )
            shown.add_row(*(plain(cell) for cell in cells))
        console.print(shown)
        console.print(plain(f"errors: max|a − b| / max|a| of a row; beyond: more than {result.tolerance:g}"))
    for text, named in (
        (f"only in {result.a}", result.only_a), (f"only in {result.b}", result.only_b),
        (f"done only in {result.a}", result.done_only_a), (f"done only in {result.b}", result.done_only_b),
        (f"damaged in {result.a}", result.damaged_a), (f"damaged in {result.b}", result.damaged_b),
    ):  # fmt: skip
        if named.count:
            console.print(plain(f"{text}: {named.count:,} images ({_some(named.keys, named.count)})"), soft_wrap=True)
    for path, names in ((result.a, result.stages_only_a), (result.b, result.stages_only_b)):
        if names:
            console.print(plain(f"stages only in {path}: {', '.join(names)}"), soft_wrap=True)
    for name, shape, other in result.shapes:
        console.print(plain(f"{name} is {shape_text(shape)} and {shape_text(other)}: not compared"), soft_wrap=True)
    for field, mine, theirs in result.fields:
        console.print(plain(f"recorded {field}: {mine} and {theirs}"), soft_wrap=True)
    if result.first:
        key, name, error = result.first
        console.print(plain(f"first image that differs: {key}, in {name}, by {error:.2e}"), soft_wrap=True)
    if not quiet:
        console.print(plain("the same within the tolerance" if result.same else "the files differ"))


def merged(result: Merged) -> None:
    """`bbx merge`, on stderr."""

    def told(word: str, names: Names) -> None:
        if names.count:
            note(f"{names.count:,} {word}: {_some(names.keys, names.count)}")

    stages = ", ".join(result.stages)
    note(f"{result.rows:,} rows, stages {stages}, from {len(result.sources)} files by {result.how}")
    told("images stood in several files, and stand here once", result.overlapping)
    told("rows are failed", result.failed)
    told("of them done in some of the files", result.spoilt)
    for start, stop in result.missing:
        note(f"rows {start:,} to {stop - 1:,} of the whole job are in none of the files")


def exported(result: Exported) -> None:
    """`bbx export`, on stderr."""
    from bbx.store import size_text

    note(f"{result.rows:,} rows, stages {', '.join(result.stages)}, {size_text(result.nbytes)} in {result.output}")
    without = result.failed + result.pending
    if without:
        what = "are left out" if result.missing == "skip" else "hold NaN"
        note(f"{without:,} rows without features {what}: {result.failed:,} failed, {result.pending:,} pending")


def _errors(errors: dict[str, float]) -> str:
    return "".join(f", {stage} by {error:.2e}" for stage, error in errors.items())


def _because(why: Sequence[str]) -> str:
    return f": {'; '.join(why)}" if why else ""


def _some(keys: Sequence[str], count: int) -> str:
    return ", ".join(keys[:_SHOWN]) + (", …" if count > _SHOWN else "")
