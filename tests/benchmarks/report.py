"""The one table: what was measured, its floor, met or not; on the terminal, as JSON, and as the README shows it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

MARKS = ("<!-- benchmarks -->", "<!-- /benchmarks -->")
# Rows of one kind, which the README has in one line.
_GROUPS = ("numerics, ", "start-up: ")
_STYLES = {"met": "green", "missed": "bold red", "error": "bold red", "": ""}


@dataclass(frozen=True)
class Floor:
    """What must be reached: at `least`, or at `most`."""

    least: float | None = None
    most: float | None = None

    def holds(self, number: float) -> bool:
        """Whether `number` is good enough; NaN never is."""
        return (self.least is None or number >= self.least) and (self.most is None or number <= self.most)

    def __str__(self) -> str:
        return f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"


# What the issue asks for, by the measure's name.
FLOORS = {
    "job A ÷ best rival given equal workers": Floor(least=1.5),
    "job A ÷ AutoBackbone as its docs show it": Floor(least=3),
    "job B ÷ best rival given equal workers": Floor(least=1.5),
    "end to end ÷ what CPU time allows": Floor(least=0.95),
    "store alone ÷ raw write + fsync": Floor(least=0.9),
    "random row read ÷ np.load of one row's .npy": Floor(least=0.8),
    "peak memory at 10 × the images": Floor(most=1.02),
    "layers run past the deepest stage": Floor(most=0),
    "numerics, job A: as it is": Floor(most=1e-5),
    "numerics, job B: as it is": Floor(most=1e-5),
    "numerics, job C: as it is": Floor(most=1e-5),
    "start-up: bbx --help": Floor(most=0.3),
    "start-up: bbx info": Floor(most=0.5),
    "start-up: bbx show of one grid": Floor(most=1.5),
}


# Of these, what a run on a GPU never measures.
_OF_A_CPU = "end to end ÷ what CPU time allows"
# And on a GPU, where cores have little to do with it.
GPU_FLOORS = {
    "job A ÷ timm loop given equal workers, on a GPU": Floor(least=2),
    "job B ÷ timm loop given equal workers, on a GPU": Floor(least=2),
    "end to end ÷ least of decode, forward and store, on a GPU": Floor(least=0.9),
}

# What holds each number, found by profilers on the machine of the README's table.
HELD = {
    "job A ÷ best rival given equal workers": "three quarters of bbx's forward are swin's own linear layers, at this "
    "machine's rate of products, a seventh its attention; saved are window copies, masks, page faults, and waiting",
    "job A ÷ AutoBackbone as its docs show it": "importing torch is half of bbx's start, without torch's compiler",
    "job B ÷ best rival given equal workers": "oneDNN's convolutions, nine tenths of the forward, at this machine's "
    "rate of products; batch norm is gone",
    "end to end ÷ what CPU time allows": "streams and decoders share one cache and one memory",
    "store alone ÷ raw write + fsync": "a copy into the system's cache and two checksums, 0.4 s of CPU for 600 MB; "
    "it beats the plain write because the disk begins at once",
    "random row read ÷ np.load of one row's .npy": "one read of the row, at an offset that is known; no header",
    "peak memory at 10 × the images": "what is alive, 0.5 GB at most, is the same after 200 images as after 2,000; the "
    "rest is free pieces of glibc's one heap, which two streams come to share in time; trimming gains nothing, for the "
    "next batches take all of it again; batches of 4 need a fifth less of it than of 8, and fused blocks a fifth again",
    "start-up: bbx info": "the interpreter, Typer and the commands 0.12 s, numpy and h5py 0.17 s, Rich and the file "
    "0.06 s; the command line is read beside them, by Typer with pydantic in 0.13 s",
    "start-up: bbx show of one grid": "matplotlib: import 0.25 s, without the help texts of its "
    "classes, which are as much again; drawing 0.2 s, PNG 0.25 s",
}


@dataclass(frozen=True)
class Row:
    """A line of the table: `value` in words; `number` is what a floor is held against; `error`: it could not be had."""

    measure: str
    value: str
    number: float | None = None
    error: bool = False

    @property
    def floor(self) -> Floor | None:
        """What must be reached, if anything."""
        return FLOORS.get(self.measure) or GPU_FLOORS.get(self.measure)

    @property
    def verdict(self) -> Literal["met", "missed", "error", ""]:
        """Nothing where there is no floor; a floor without a number is an error, not a pass."""
        if self.error or (self.floor and self.number is None):
            return "error"
        if self.floor is None or self.number is None:
            return ""
        return "met" if self.floor.holds(self.number) else "missed"


def unmeasured(rows: Sequence[Row]) -> list[str]:
    """The floors that nothing in `rows` was held against: a GPU's where there are rows of one, a CPU's likewise."""
    names = {row.measure for row in rows}
    wanted = [*GPU_FLOORS] if names & set(GPU_FLOORS) else []
    wanted += [*FLOORS] if _OF_A_CPU in names or not wanted else []
    return [name for name in wanted if name not in names]


def draw(rows: Sequence[Row], console: Console | None = None) -> None:
    """The table, on stdout."""
    shown = Table("measure", "value", "floor", "met", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        cells = (row.measure, row.value, str(row.floor or ""), Text(row.verdict, _STYLES[row.verdict]))
        shown.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    console.print(shown)
    for name in unmeasured(rows):
        console.print(Text(f"not measured: {name} ({(FLOORS | GPU_FLOORS)[name]})"), soft_wrap=True)
    for row in rows:
        if row.measure in HELD:
            console.print(Text(f"{row.measure}: held by {HELD[row.measure]}"), soft_wrap=True)


def write_json(path: Path, machine: str, rows: Sequence[Row]) -> None:
    """All rows as data."""
    found = [{**asdict(row), "floor": str(row.floor or ""), "verdict": row.verdict} for row in rows]
    path.write_text(json.dumps({"machine": machine, "rows": found}, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> list[Row]:
    """The rows of an earlier run, which say of what day they are where it was another than today."""
    data = json.loads(path.read_text())
    day = data["machine"].rpartition(" · ")[2]
    told = "" if day == date.today().isoformat() else f" ({day})"
    return [Row(row["measure"], row["value"] + told, row["number"], row["error"]) for row in data["rows"]]


def markdown(machine: str, rows: Sequence[Row]) -> str:
    """The rows that have a floor, the jobs' other ratios, and what each option changes at most, the machine named."""
    lines = [f"| {machine} | | floor |", "|---|---|---|"]
    shown = [row for row in rows if row.floor or " ÷ best rival" in row.measure]
    lines += [f"| {row.measure} | {_bold(row)} | {row.floor or ''} |" for row in shown if not _group(row)]
    for group in _GROUPS:
        if same := [row for row in shown if _group(row) == group]:
            names = ", ".join(row.measure.removeprefix(group) for row in same)
            floors = ", ".join(dict.fromkeys(str(row.floor) for row in same))
            told = " · ".join(map(_bold, same)) + (_changes(rows) if group == "numerics, " else "")
            lines.append(f"| {group}{names} | {told} | {floors} |")
    if absent := unmeasured(shown):
        lines.append(f"| **not measured**: {', '.join(absent)} | | |")
    return "\n".join(lines)


def _changes(rows: Sequence[Row]) -> str:
    """`; by option, the worst stage: --precision bf16 (A 8e-03, B 2e-02), …`."""
    found: dict[str, list[str]] = {}
    for row in rows:
        job, _, option = row.measure.removeprefix("numerics, job ").partition(": ")
        if row.measure.startswith("numerics, ") and row.floor is None:
            found.setdefault(option, []).append(f"{job} {'failed' if row.number is None else f'{row.number:.0e}'}")
    by_option = ", ".join(f"{option} ({', '.join(told)})" for option, told in found.items())
    return f"; by option, the worst stage: {by_option}" if found else ""


def _group(row: Row) -> str:
    return next((group for group in _GROUPS if row.measure.startswith(group)), "")


def _bold(row: Row) -> str:
    return f"**{row.verdict}**: {row.value}" if row.verdict in ("missed", "error") else row.value


def write_readme(path: Path, machine: str, rows: Sequence[Row]) -> None:
    """Puts the table between the marks of `path`. Raises `ValueError` where it has none."""
    text = path.read_text()
    before, mark, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise ValueError(f"{path} has no {MARKS[0]} … {MARKS[1]}")
    path.write_text(f"{before}{mark}\n{markdown(machine, rows)}\n{end}{after}")
