"""What each engine, layout, precision and decoder changes: largest relative difference per stage from exact float32.

Every set of options below is tried on every job; one that bbx refuses is an error in the table, never left out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bbx.diff import diff
from tests.benchmarks import jobs, measure
from tests.benchmarks.jobs import JOBS
from tests.benchmarks.measure import RunError
from tests.benchmarks.report import Row
from tests.benchmarks.settings import Settings

# What the others are held against: every lever off, folding and packing, which have no option, included.
EXACT = ("--precision", "float32", "--engine", "eager", "--channels-last", "no", "--decode", "exact")
# They and compiling wait for jobs and machines that pay for them; here they are to happen, or not, whatever it pays.
_CODE = """import bbx.engine.settings as s; s.FOLD_PAYS = 1 if {levers} else 1 << 60; s.packing_pays = lambda: {levers}
s.COMPILE_PAYS = dict.fromkeys(s.COMPILE_PAYS, 1)
from bbx.cli import main; main()"""
# Each on top of EXACT.
OPTIONS: tuple[tuple[str, ...], ...] = (
    (),  # as a user has it who says nothing
    ("--precision", "bf16"),
    ("--precision", "fp16"),
    ("--engine", "compile"),
    ("--engine", "compile", "--precision", "bf16"),
    ("--channels-last", "yes"),
    ("--channels-last", "no"),
    ("--decode", "fast"),
    *([("--decode", "gpu")] if torch.cuda.is_available() else []),
)
_IMAGES = 24


def numerics(settings: Settings) -> Iterator[Row]:
    """A line per job and set of options."""
    images, where = settings.some(min(_IMAGES, settings.images)), ("--device", settings.device)
    exact, other = settings.folder / "exact.h5", settings.folder / "other.h5"
    for name in settings.jobs:
        measure.run(_with(jobs.extract(JOBS[name], images, exact, (*where, *EXACT)), levers=False), exact)
        for options in OPTIONS:
            measured = f"numerics, job {name}: {' '.join(options) or 'as it is'}"
            try:
                measure.run(_with(jobs.extract(JOBS[name], images, other, (*where, *options)), levers=True), other)
            except RunError as error:
                yield Row(measured, f"refused: {error}", error=True)
                continue
            stages = diff(exact, other).stages
            told = ", ".join(f"{stage.stage} {stage.worst_error:.1e}" for stage in stages)
            yield Row(measured, told, max(stage.worst_error for stage in stages))
    measure.remove(exact)
    measure.remove(other)


def _with(command: list[str], *, levers: bool) -> list[str]:
    """The same command line, batch norm folded and narrow layers packed always or never, compiled from one image on."""
    python, _, _, *words = command
    return [python, "-c", _CODE.format(levers=levers), *words]
