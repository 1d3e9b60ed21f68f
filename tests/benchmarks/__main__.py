"""`python -m tests.benchmarks`: everything, and one table. README.md's is made by `--readme`.

python -m tests.benchmarks --only jobs --jobs A --images 24 --repeats 1
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.benchmarks import machine
from tests.benchmarks.compare import contest
from tests.benchmarks.jobs import JOBS
from tests.benchmarks.limits import limits
from tests.benchmarks.measure import RunError
from tests.benchmarks.numerics import numerics
from tests.benchmarks.pictures import ROOT
from tests.benchmarks.report import Row, draw, read_json, unmeasured, write_json, write_readme
from tests.benchmarks.rivals import RIVALS
from tests.benchmarks.settings import Settings


def contests(settings: Settings) -> Iterator[Row]:
    """All jobs, one after the other."""
    for name in settings.jobs:
        try:
            yield from contest(JOBS[name], settings)
        except RunError as error:  # the other jobs still have something to say
            yield Row(f"job {name}: bbx", f"failed: {error}", error=True)


PARTS: dict[str, Callable[[Settings], Iterator[Row]]] = {"jobs": contests, "limits": limits, "numerics": numerics}


def parsed() -> argparse.Namespace:
    """What was asked for."""
    names = [rival.name for rival in RIVALS]
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=_listed, default=[*PARTS], help=f"of {','.join(PARTS)}, or ''")
    parser.add_argument("--jobs", type=_listed, default=[*JOBS], help="of A,B,C")
    parser.add_argument("--rivals", type=_listed, default=[], help=f"of {','.join(names)}")
    parser.add_argument("--images", type=_count, default=200)
    parser.add_argument("--repeats", type=_count, default=5, help="of each process; the median counts")
    parser.add_argument("--device", default="cpu", metavar="D", help="where all sides compute: cpu, cuda")
    parser.add_argument("--bbx-options", default="", help='passed on to bbx extract, such as "--batch-size 16"')
    parser.add_argument("--python", action="append", default=[], metavar="RIVAL=PATH", help="an interpreter of its own")
    parser.add_argument("--folder", type=Path, help="where files go: the disk that is measured (default: temporary)")
    parser.add_argument("--earlier", type=Path, action="append", default=[], metavar="JSON",
                        help="another run's, for rows that this one does not measure")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="all rows, as data")
    parser.add_argument("--readme", type=Path, nargs="?", const=ROOT / "README.md", help="put the table into it")
    given = parser.parse_args()
    for option, valid in (("only", [*PARTS]), ("jobs", [*JOBS]), ("rivals", names)):
        if unknown := set(getattr(given, option)) - set(valid):
            parser.error(f"--{option}: {', '.join(sorted(unknown))}: not of {', '.join(valid)}")
    return given


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _listed(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def main() -> int:
    """0 where every floor is met and nothing went wrong, else 1."""
    given = parsed()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        settings = Settings(
            Path(folder), given.images, given.repeats, tuple(given.jobs), tuple(given.bbx_options.split()),
            tuple(given.rivals), dict(pair.split("=", 1) for pair in given.python), given.device,
        )  # fmt: skip
        for part in given.only:
            for row in PARTS[part](settings):
                rows.append(row)
                sys.stderr.write(f"{row.measure}: {row.value} {row.verdict}\n")
                if given.json:  # at every row: the whole takes hours
                    write_json(given.json, _machine(rows, given.device), rows)
    rows = added(rows, given.earlier)
    name = _machine(rows, given.device)
    sys.stdout.write(f"{name}\n")
    draw(rows)
    if given.readme:
        write_readme(given.readme, name, rows)
    return int(any(row.verdict in ("missed", "error") for row in rows) or bool(unmeasured(rows)))


def added(rows: Sequence[Row], earlier: Sequence[Path]) -> list[Row]:
    """`rows`, and of the runs before, the latest first, what is not among them."""
    found = {row.measure: row for row in rows}
    for path in reversed(earlier):
        found = {row.measure: row for row in read_json(path)} | found
    return list(found.values())


def _machine(rows: Sequence[Row], device: str) -> str:
    written = next((row.number for row in rows if row.measure == "limit: raw write + fsync"), None)
    return machine.describe(written or 0.0, device)


if __name__ == "__main__":
    sys.exit(main())
