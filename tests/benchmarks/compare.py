"""A job by bbx and by its rivals, in alternation: images per second, start, CPU, memory, disk, reading back.

A rival runs as its docs show it (`docs`: their batch size, and decoding where they do it), once more with bbx's number
of decoding processes (`equal`), and with bbx's batch size besides (`tuned`), which no docs would tell it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
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
# A rival that took this many times as long as the fastest to warm up is timed once: no ratio is taken from it.
_FAR = 1.25
# A ratio is asked for however slow they are: a rival and its form, the second on a GPU.
_FLOORED, _LOOP = (("autobackbone", "docs"),), ("timm_loop", "equal")


@dataclass(frozen=True)
class Contestant:
    """One way to do a job. `forms` are those of `docs`, `equal` and `tuned` that it is, none for bbx."""

    name: str
    forms: tuple[str, ...] = ()
    batch_size: int = 0
    workers: int = 0

    @property
    def label(self) -> str:
        """As the table has it."""
        if not self.forms:
            return self.name
        return f"{self.name} {' = '.join(self.forms)} (batch {self.batch_size}, {self.workers} decoders)"

    def command(self, job: Job, images: Path, output: Path, settings: Settings) -> list[str]:
        """What to run."""
        if not self.forms:
            return jobs.extract(job, images, output, settings.words)
        words = (job.name, images, output, "--batch-size", self.batch_size, "--workers", self.workers)
        words += ("--device", settings.device)
        return [settings.python(self.name), "-m", f"tests.benchmarks.rivals.{self.name}", *map(str, words)]


@dataclass(frozen=True)
class Result:
    """Medians of one contestant's `runs`: `whole` with all pictures, `start` with one; `back` seconds to read a row."""

    contestant: Contestant
    images: int
    runs: int
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
            f"{self.rate:.2f} images/s, {_told(self.steady)} once it runs · start {self.start.seconds:.1f} s · "
            f"on disk after {self.whole.synced:.1f} s · CPU {_told(1000 * per, '.0f')} ms/image · "
            f"peak {self.peak / 1e6:,.0f} MB"
            f" · {self.whole.nbytes / 1e6:,.1f} MB · rows back {1000 * self.back:.2f} ms each · "
            f"{self.runs} run{'s' * (self.runs > 1)}"
        )
        return Row(f"job {job.name}: {self.contestant.label}", f"{value}{f' · {note}' * bool(note)}", self.rate)


def contest(job: Job, settings: Settings) -> list[Row]:
    """Every contestant's line, those of rivals that do not take part, and the ratios."""
    plan = jobs.plan(job, settings.pictures, settings.words)
    own = Contestant("bbx")
    rows: list[Row] = []
    entered: dict[Contestant, tuple[Taken, float]] = {}
    for one in [own, *_rivals(job, settings, plan["batch_size"], plan["workers"])]:
        try:
            entered[one] = _warm_up(job, settings, one)
        except RunError as error:
            rows.append(Row(f"job {job.name}: {one.label}", f"failed: {error}", error=one == own))
    near = [one for one in entered if _is_near(one, entered, settings)]
    taken = _timed(job, settings, near, settings.repeats)
    taken |= _timed(job, settings, [one for one in entered if one not in near], 1)
    results = {
        one: Result(
            one, settings.images, len(taken[one][0]), *map(measure.median, taken[one]), entered[one][0].peak, back
        )
        for one, (_, back) in entered.items()
    }
    notes = {rival.name: "; ".join(filter(None, (rival.keeps, rival.differs.get(job.name)))) for rival in RIVALS}
    rows = [*(result.row(job, notes.get(one.name, "")) for one, result in results.items()), *rows]
    return [*rows, *_absent(job, settings), *_ratios(job, results, settings)]


def _rivals(job: Job, settings: Settings, batch: int, workers: int) -> Iterator[Contestant]:
    """What takes part besides bbx; forms that come to the same are one."""
    for rival in RIVALS:
        if _why_not(rival, job, settings):
            continue
        forms = {"docs": (DOCS_BATCH, rival.docs_workers)}
        if rival.equal:
            forms |= {"equal": (DOCS_BATCH, workers), "tuned": (batch, workers)}
        for chosen in dict.fromkeys(forms.values()):
            yield Contestant(rival.name, tuple(form for form, one in forms.items() if one == chosen), *chosen)


def _is_near(one: Contestant, entered: Mapping[Contestant, tuple[Taken, float]], settings: Settings) -> bool:
    """Whether a ratio may be taken from it: of each form the fastest and those near, and whatever has a floor."""
    named = _FLOORED if settings.device == "cpu" else (*_FLOORED, _LOOP)
    if not one.forms or any(one.name == name and form in one.forms for name, form in named):
        return True
    seconds = {other: taken.seconds for other, (taken, _) in entered.items()}
    return any(
        seconds[one] <= _FAR * min(seconds[other] for other in entered if form in other.forms)
        for form in one.forms
        if form != "docs"
    )


def _why_not(rival: Rival, job: Job, settings: Settings) -> str:
    if not settings.wants(rival.name):
        return "not asked for (--rivals)"
    if job.name in rival.cannot:
        return f"cannot: {rival.cannot[job.name]}"
    if settings.device != "cpu" and not rival.moves:
        return f"not on {settings.device}: its docs compute on the CPU"
    if rival.name not in settings.pythons and not rival.installed:
        return f"not installed: {rival.needs} (tests/benchmarks/requirements.txt)"
    return ""


def _absent(job: Job, settings: Settings) -> Iterator[Row]:
    for rival in RIVALS:
        if reason := _why_not(rival, job, settings):
            yield Row(f"job {job.name}: {rival.name}", reason)
        elif not rival.equal:
            yield Row(f"job {job.name}: {rival.name} equal", "cannot: its loader takes no workers")


def _warm_up(job: Job, settings: Settings, one: Contestant) -> tuple[Taken, float]:
    """A run in which memory is sampled, and the seconds per row read back from what it made."""
    output = settings.folder / "out"
    taken = measure.run(one.command(job, settings.pictures, output, settings), output, sample=True)
    return taken, _read_back(one, job, settings, output)


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
    job: Job, settings: Settings, contestants: Sequence[Contestant], repeats: int
) -> dict[Contestant, tuple[list[Taken], list[Taken]]]:
    """All in turn: what all pictures took, and what one took."""
    output = settings.folder / "out"
    few = settings.some(1)
    sides = {}
    for one in contestants:
        for what, images in (("whole", settings.pictures), ("start", few)):
            command = one.command(job, images, output, settings)
            sides[f"{what} {one.label}"] = partial(measure.run, command, output)
    taken = measure.alternate(sides, repeats)
    measure.remove(output)
    return {one: (taken[f"whole {one.label}"], taken[f"start {one.label}"]) for one in contestants}


def _ratios(job: Job, results: dict[Contestant, Result], settings: Settings) -> Iterator[Row]:
    """bbx against the best with equal workers, the best with its batch size, too, and against AutoBackbone's docs."""
    own = next((result for one, result in results.items() if not one.forms), None)
    for form, words in (("equal", "equal workers"), ("tuned", "equal workers and bbx's batch size")):
        # Of those that were timed as often as bbx, and in turn with it.
        given = [result for one, result in results.items() if form in one.forms and result.runs == settings.repeats]
        best = max(given, key=lambda result: result.rate, default=None)
        yield _ratio(f"job {job.name} ÷ best rival given {words}", own, best)
    if settings.device != "cpu" and settings.wants("timm_loop"):
        loops = [result for one, result in results.items() if one.name == "timm_loop" and "equal" in one.forms]
        yield _ratio(f"job {job.name} ÷ timm loop given equal workers, on a GPU", own, loops[0] if loops else None)
    docs = [result for one, result in results.items() if one.name == "autobackbone" and "docs" in one.forms]
    backbone = next(rival for rival in RIVALS if rival.name == "autobackbone")
    if settings.wants(backbone.name) and job.name not in backbone.cannot:
        yield _ratio(f"job {job.name} ÷ AutoBackbone as its docs show it", own, docs[0] if docs else None)


def _ratio(measured: str, own: Result | None, other: Result | None) -> Row:
    if own is None or other is None:
        return Row(measured, "nothing to compare with", error=True)
    ratio, steady = own.rate / other.rate, own.steady / other.steady
    rates = f"{own.rate:.1f} and {other.rate:.1f} images/s of {own.images}; {other.contestant.label}"
    return Row(measured, f"{ratio:.2f} × whole process, {_told(steady)} × once it runs ({rates})", ratio)


def _told(number: float, form: str = ".2f") -> str:
    """A dash for what noise has swallowed: so few pictures do not tell it from the start."""
    return f"{number:{form}}" if number > 0 else "–"
