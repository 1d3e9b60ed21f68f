"""What each engine, layout, precision and decoder changes: largest relative difference per stage from exact float32.

Every set of options below is tried on every job; one that bbx refuses is an error in the table, never left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from bbx.diff import diff
from tests.benchmarks import jobs, measure
from tests.benchmarks.jobs import JOBS
from tests.benchmarks.measure import RunError
from tests.benchmarks.report import Row
from tests.benchmarks.settings import Settings

# What the others are held against: every lever off, folding and packing, which have no option, included.
EXACT = ("--precision", "float32", "--engine", "eager", "--channels-last", "no", "--decode", "exact")
# They and compiling wait for jobs and machines that pay for them; here they are to happen, or not, whatever it pays.
_CODE = """import bbx.engine.settings as s, bbx.engine.pack as p; s.TRIAL_PAYS = 1 if {levers} else 1 << 60
p.faster_up_to = lambda: p.ANY if {levers} else 0
s.COMPILE_PAYS = dict.fromkeys(s.COMPILE_PAYS, 0.0)
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
)
ON_CUDA = (("--precision", "tf32"), ("--decode", "gpu"))
_IMAGES = 24
# Trained where the weights come with bbx: random ones keep their values in a narrow range.
_TRAINED = ("C",)


def numerics(settings: Settings) -> Iterator[Row]:
    """A line per job and set of options; decoding by pictures of full HD, too, which `fast` takes at a fraction."""
    usual, large = settings.some(min(_IMAGES, settings.images)), settings.large(min(_IMAGES, settings.images))
    for name in settings.jobs:
        everything = (*OPTIONS, *(ON_CUDA if settings.device.startswith("cuda") else ()))
        yield from _of_job(name, usual, everything, "", settings)
        yield from _of_job(name, large, [one for one in everything if "--decode" in one], " of 1920×1080", settings)


def _of_job(
    name: str, images: Path, everything: Sequence[Sequence[str]], told_of: str, settings: Settings
) -> Iterator[Row]:
    where = ("--device", settings.device, *(("--weights", "auto") if name in _TRAINED else ()))
    exact, other = settings.folder / "exact.h5", settings.folder / "other.h5"
    try:
        measure.run(_with(jobs.extract(JOBS[name], images, exact, (*where, *EXACT)), levers=False), exact)
    except RunError as error:
        yield Row(f"numerics, job {name}: exact{told_of}", f"failed: {error}", error=True)
        return
    for options in everything:
        measured = f"numerics, job {name}: {' '.join(options) or 'as it is'}{told_of}"
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
