"""What `--json` prints: the facts that the console draws, as plain data with stable names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bbx.backbone import Backbone
    from bbx.bench import Bench
    from bbx.compare import Comparison
    from bbx.plan import Plan, Rates, Summary
    from bbx.spec import RunSpec, Stage
    from bbx.store import FeatureFile


def finite(value: Any) -> Any:
    """`value` as JSON can hold it: paths as text, and NaN and infinity, which it lacks, as text too."""
    if isinstance(value, dict):
        return {str(name): finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value


def of_run(plan: Plan, summary: Summary, *, dry_run: bool) -> dict[str, Any]:
    """`bbx extract`: the plan, and unless it was a dry run, what came of it; times in seconds, sizes in bytes."""
    planned = {
        "output": str(plan.output),
        "state": plan.target.state,
        "images": len(plan.images),
        "skipped": plan.images.skipped,
        "warnings": [*plan.backbone.notes, *plan.images.warnings, *plan.notes],
        "device": str(plan.device),
        "batch_size": plan.batch_size,
        "workers": plan.workers,
        "engine": asdict(plan.engine),
        "deterministic": plan.deterministic,
        "compress": plan.compress,
        "nbytes": len(plan.images) * plan.run.row_nbytes,
        "free_nbytes": plan.free_nbytes,
        "rates": of_rates(plan.rates) if plan.rates else None,
        "run": of_spec(plan.run),
    }
    if dry_run:
        return {**planned, "dry_run": True, "exit_code": 0}
    times = {name: round(getattr(summary, name), 3) for name in ("wall", "decode", "compute", "write")}
    return {
        **planned,
        "rows": summary.rows,
        "done": summary.done,
        "failed": summary.failed,
        "failures": summary.failures,
        "extracted": summary.extracted,
        "overflow": summary.overflow,
        "nonfinite": summary.nonfinite,
        "notes": summary.notes,
        "seconds": times,
        "images_per_second": round(summary.images_per_second, 3),
        "exit_code": summary.exit_code,
    }


def of_rates(rates: Rates) -> dict[str, Any]:
    """Images/s of each part alone and expected of the whole, and which part is the limit."""
    return {**asdict(rates), "limit": rates.limit, "expected": rates.expected}


def of_bench(result: Bench) -> dict[str, Any]:
    """`bbx bench`: rates in images/s, the store's in bytes/s, and what they come to."""
    shares = ("early_exit", "store_share", "share", "expected_share")
    return {
        **asdict(result),
        "rates": of_rates(result.rates),
        **{name: getattr(result, name) for name in shares},
        "exit_code": 0,
    }


def of_stages(backbone: Backbone, parameters: Mapping[str, int]) -> dict[str, Any]:
    """`bbx stages`: each stage with its cost in float32, and the preprocessing."""
    stages = [
        {**of_stage(stage), "nbytes": 4 * stage.values, "parameters": parameters[stage.name]}
        for stage in backbone.stages
    ]
    preprocess, notes = asdict(backbone.preprocess), list(backbone.notes)
    return {"model": str(backbone.ref), "stages": stages, "preprocess": preprocess, "notes": notes}


def of_comparison(comparison: Comparison) -> dict[str, Any]:
    """`bbx stages --compare`."""
    return asdict(comparison)


def of_file(file: FeatureFile) -> dict[str, Any]:
    """`bbx info`."""
    counts = file.counts
    return {
        "path": str(file.path),
        "nbytes": file.nbytes,
        "rows": len(file),
        "done": counts.done,
        "failed": counts.failed,
        "failures": file.failed,
        "pending": counts.pending,
        "run": of_spec(file.run),
        "attempts": file.attempts,
    }


def of_spec(run: RunSpec) -> dict[str, Any]:
    """What makes the run, as the file records it."""
    return {**asdict(run), "sha256": run.sha256, "stages": [of_stage(stage) for stage in run.stages]}


def of_stage(stage: Stage) -> dict[str, Any]:
    """Name, index, module, shape, channels, stride."""
    return {**asdict(stage), "channels": stage.channels}
