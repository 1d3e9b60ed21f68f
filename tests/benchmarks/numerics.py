"""What each engine, layout, precision and decoder changes: largest relative difference per stage from exact float32.

Every set of options below is tried on every job; one that bbx refuses is an error in the table, never left out.
"""

from __future__ import annotations

from collections.abc import Iterator

from bbx.diff import diff
from tests.benchmarks import jobs, measure
from tests.benchmarks.jobs import JOBS
from tests.benchmarks.measure import RunError
from tests.benchmarks.report import Row
from tests.benchmarks.settings import Settings

# What the others are held against: every lever off, folding, which has no option, included.
EXACT = ("--precision", "float32", "--engine", "eager", "--channels-last", "no", "--decode", "exact")
# Folding and compiling wait for jobs that pay for them; here they are to happen, or not, whatever the number of images.
_CODE = """import bbx.engine.settings as s; s.FOLD_PAYS = {fold}; s.COMPILE_PAYS = dict.fromkeys(s.COMPILE_PAYS, 1)
from bbx.cli import main; main()"""
# Each on top of EXACT.
OPTIONS: tuple[tuple[str, ...], ...] = (
    (),  # as a user has it who says nothing
    ("--precision", "bf16"),
    ("--engine", "compile"),
    ("--engine", "compile", "--precision", "bf16"),
    ("--channels-last", "yes"),
    ("--channels-last", "no"),
    ("--decode", "fast"),
)
# Of a row's largest value: what the default may differ by.
DEFAULT_TOLERANCE = 1e-5
_IMAGES = 24


def numerics(settings: Settings) -> Iterator[Row]:
    """A line per job and set of options."""
    images = settings.some(min(_IMAGES, settings.images))
    exact, other = settings.folder / "exact.h5", settings.folder / "other.h5"
    for name in settings.jobs:
        measure.run(_always(jobs.extract(JOBS[name], images, exact, EXACT), fold=1 << 60), exact)
        for options in OPTIONS:
            measured = f"numerics, job {name}: {' '.join(options) or 'as it is'}"
            try:
                measure.run(_always(jobs.extract(JOBS[name], images, other, options), fold=1), other)
            except RunError as error:
                yield Row(measured, f"refused: {error}", error=True)
                continue
            stages = diff(exact, other).stages
            told = ", ".join(f"{stage.stage} {stage.worst_error:.1e}" for stage in stages)
            yield Row(measured, told, max(stage.worst_error for stage in stages))
    measure.remove(exact)
    measure.remove(other)


def _always(command: list[str], *, fold: int) -> list[str]:
    """The same command line with batch norm folded from `fold` images on, and compiling from the first."""
    python, _, _, *words = command
    return [python, "-c", _CODE.format(fold=fold), *words]
