"""A job by bbx and by its rivals, in alternation: images per second, start, CPU, memory, disk, reading back.

A rival runs as its docs show it (`docs`: their batch size, and decoding where they do it), and once more with bbx's
number of decoding processes (`equal`), there at the batch size that suits it better, its docs' or bbx's.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.benchmarks import jobs, measure
from tests.benchmarks.jobs import Job
from tests.benchmarks.measure import RunError, Taken
from tests.benchmarks.pictures import ROOT
from tests.benchmarks.report import Row
from tests.benchmarks.rivals import RIVALS, Rival
from tests.benchmarks.settings import Settings

DOCS_BATCH = 32
_MOST_ROWS = 100


@dataclass(frozen=True)
class Contestant:
    """One way to do a job. `form` is `docs` or `equal`, empty for bbx."""

    name: str
    form: str = ""
    batch_size: int = 0
    workers: int = 0

    @property
    def label(self) -> str:
        """As the table has it."""
        if not self.form:
            return self.name
        return f"{self.name} {self.form} (batch {self.batch_size}, {self.workers} decoders)"

    def command(self, job: Job, images: Path, output: Path, settings: Settings) -> list[str]:
        """What to run."""
        if not self.form:
            return jobs.extract(job, images, output, settings.options)
        words = (job.name, images, output, "--batch-size", self.batch_size, "--workers", self.workers)
        return [settings.python(self.name), "-m", f"tests.benchmarks.rivals.{self.name}", *map(str, words)]


@dataclass(frozen=True)
class Result:
    """Medians of one contestant: `whole` with all pictures, `start` with one; `back` seconds to read rows back."""

    contestant: Contestant
    images: int
    whole: Taken
    start: Taken
    peak: int
    back: float

    @property
    def rate(self) -> float:
        """Images per second, cold start included."""
        return self.images / self.whole.seconds

    @property
    def steady(self) -> float:
        """Images per second once it runs; NaN where the pictures are too few to tell it from the start."""
        return measure.steady_rate(self.images, self.whole, self.start)

    def row(self, job: Job, note: str = "") -> Row:
        """Its line of the table."""
        per = (self.whole.cpu - self.start.cpu) / max(self.images - 1, 1)
        value = (
            f"{self.rate:.2f} images/s, {self.steady:.2f} once it runs · start {self.start.seconds:.1f} s · "
            f"on disk after {self.whole.synced:.1f} s · CPU {1000 * per:.0f} ms/image · peak {self.peak / 1e6:,.0f} MB"
            f" · {self.whole.nbytes / 1e6:,.1f} MB · rows back {1000 * self.back:.2f} ms each"
        )
        return Row(f"job {job.name}: {self.contestant.label}", f"{value}{f' · {note}' * bool(note)}", self.rate)


def contest(job: Job, settings: Settings) -> list[Row]:
    """Every contestant's line, those of rivals that do not take part, and the ratios."""
    plan = jobs.plan(job, settings.pictures, settings.options)
    own = Contestant("bbx")
    results: dict[Contestant, Result] = {}
    rows: list[Row] = []
    entered: dict[Contestant, tuple[int, float]] = {}
    for choice in [(own,), *_choices(job, settings, plan["batch_size"], plan["workers"])]:
        try:
            best, peak, back = _best(job, settings, choice)
            entered[best] = (peak, back)
        except RunError as error:
            rows.append(Row(f"job {job.name}: {choice[0].label}", f"failed: {error}", error=choice == (own,)))
    wholes, starts = _timed(job, settings, list(entered))
    for one, (peak, back) in entered.items():
        results[one] = Result(
            one, settings.images, measure.median(wholes[one.label]), measure.median(starts[one.label]), peak, back
        )
    notes = {rival.name: "; ".join(filter(None, (rival.keeps, rival.differs.get(job.name)))) for rival in RIVALS}
    rows = [*(result.row(job, notes.get(one.name, "")) for one, result in results.items()), *rows]
    return [*rows, *_absent(job, settings), *_ratios(job, results, settings)]


def _choices(job: Job, settings: Settings, batch: int, workers: int) -> Iterator[tuple[Contestant, ...]]:
    """What takes part; of several in a tuple only the fastest goes on."""
    for rival in RIVALS:
        if _why_not(rival, job, settings):
            continue
        yield (Contestant(rival.name, "docs", DOCS_BATCH, rival.docs_workers),)
        if rival.equal:
            yield tuple(Contestant(rival.name, "equal", size, workers) for size in sorted({DOCS_BATCH, batch}))


def _why_not(rival: Rival, job: Job, settings: Settings) -> str:
    if not settings.wants(rival.name):
        return "not asked for (--rivals)"
    if job.name in rival.cannot:
        return f"cannot: {rival.cannot[job.name]}"
    if rival.name not in settings.pythons and not rival.installed:
        return f"not installed: {rival.needs} (tests/benchmarks/requirements.txt)"
    return ""


def _absent(job: Job, settings: Settings) -> Iterator[Row]:
    for rival in RIVALS:
        if reason := _why_not(rival, job, settings):
            yield Row(f"job {job.name}: {rival.name}", reason)
        elif not rival.equal:
            yield Row(f"job {job.name}: {rival.name} equal", "cannot: its loader takes no workers")


def _best(job: Job, settings: Settings, choice: Sequence[Contestant]) -> tuple[Contestant, int, float]:
    """The warm-up, where memory is sampled: (the fastest of `choice`, its peak in bytes, seconds per row read back)."""
    output = settings.folder / "out"
    found = []
    for one in choice:
        taken = measure.run(one.command(job, settings.pictures, output, settings), output, sample=True)
        found.append((taken.seconds, one.label, one, taken.peak, _read_back(one, job, settings, output)))
    _, _, best, peak, back = min(found)
    return best, peak, back


def _read_back(one: Contestant, job: Job, settings: Settings, output: Path) -> float:
    """Seconds per random row."""
    words = (one.name, job.name, output, "--images", settings.images, "--rows", min(_MOST_ROWS, settings.images))
    command = [settings.python(one.name), "-m", "tests.benchmarks.readback", *map(str, words)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RunError((ran.stderr.strip().splitlines() or ["no words"])[-1])
    found = json.loads(ran.stdout)
    return float(found["seconds"]) / int(found["rows"])


def _timed(
    job: Job, settings: Settings, contestants: Sequence[Contestant]
) -> tuple[dict[str, list[Taken]], dict[str, list[Taken]]]:
    """By label, in turn: what all pictures took, and what one took."""
    output = settings.folder / "out"
    few = settings.some(1)
    sides = {}
    for one in contestants:
        for what, images in (("whole", settings.pictures), ("start", few)):
            command = one.command(job, images, output, settings)
            sides[f"{what} {one.label}"] = partial(measure.run, command, output)
    taken = measure.alternate(sides, settings.repeats)
    measure.remove(output)
    wholes, starts = ({one.label: taken[f"{what} {one.label}"] for one in contestants} for what in ("whole", "start"))
    return wholes, starts


def _ratios(job: Job, results: dict[Contestant, Result], settings: Settings) -> Iterator[Row]:
    """bbx against the best with equal workers, and against AutoBackbone's docs."""
    own = next((result for one, result in results.items() if not one.form), None)
    equal = [result for one, result in results.items() if one.form == "equal"]
    docs = [result for one, result in results.items() if (one.name, one.form) == ("autobackbone", "docs")]
    best = max(equal, key=lambda result: result.rate, default=None)
    yield _ratio(f"job {job.name} ÷ best rival given equal workers", own, best)
    backbone = next(rival for rival in RIVALS if rival.name == "autobackbone")
    if settings.wants(backbone.name) and job.name not in backbone.cannot:
        yield _ratio(f"job {job.name} ÷ AutoBackbone as its docs show it", own, docs[0] if docs else None)


def _ratio(measured: str, own: Result | None, other: Result | None) -> Row:
    if own is None or other is None:
        return Row(measured, "nothing to compare with", error=True)
    ratio, steady = own.rate / other.rate, own.steady / other.steady
    value = f"{ratio:.2f} × whole process, {steady:.2f} × once it runs ({own.rate:.1f} and {other.rate:.1f} images/s;"
    return Row(measured, f"{value} {other.contestant.label})", ratio)
