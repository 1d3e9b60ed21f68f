"""The one table: what was measured, its floor, met or not; on the terminal, as JSON, and as the README shows it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

MARKS = ("<!-- benchmarks -->", "<!-- /benchmarks -->")
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
    "start-up: bbx --help": Floor(most=0.3),
    "start-up: bbx info": Floor(most=0.5),
    "start-up: bbx show of one grid": Floor(most=1.5),
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
        return FLOORS.get(self.measure)

    @property
    def verdict(self) -> Literal["met", "missed", "error", ""]:
        """Nothing where there is no floor; a floor without a number is an error, not a pass."""
        if self.error or (self.floor and self.number is None):
            return "error"
        if self.floor is None or self.number is None:
            return ""
        return "met" if self.floor.holds(self.number) else "missed"


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


def write_json(path: Path, machine: str, rows: Sequence[Row]) -> None:
    """All rows as data."""
    found = [{**asdict(row), "floor": str(row.floor or ""), "verdict": row.verdict} for row in rows]
    path.write_text(json.dumps({"machine": machine, "rows": found}, indent=1, ensure_ascii=False) + "\n")


def markdown(machine: str, rows: Sequence[Row]) -> str:
    """The rows that have a floor, as the README shows them, with the machine named."""
    lines = [machine, "", "| measured | value | floor |", "|---|---|---|"]
    lines += [f"| {row.measure} | {_bold(row)} | {row.floor} |" for row in rows if row.floor]
    return "\n".join(lines)


def _bold(row: Row) -> str:
    return row.value if row.verdict == "met" else f"**{row.verdict}**: {row.value}"


def write_readme(path: Path, machine: str, rows: Sequence[Row]) -> None:
    """Puts the table between the marks of `path`. Raises `ValueError` where it has none."""
    text = path.read_text()
    before, mark, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise ValueError(f"{path} has no {MARKS[0]} … {MARKS[1]}")
    path.write_text(f"{before}{mark}\n{markdown(machine, rows)}\n{end}{after}")
