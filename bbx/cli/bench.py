"""`bbx bench`: what this machine makes of a model."""

from __future__ import annotations

from typing import Annotated

import typer

from bbx.cli.app import Batch, Json, Size, Stages, app, given, loading, parse_batch_size, parse_size, print_json
from bbx.cli.signals import signals
from bbx.spec import Dtype, Engine, Precision


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="swin-tiny, resnet50, …: see bbx models")],
    images: Annotated[list[str] | None, typer.Argument(help="As of bbx extract (default: 64 made pictures)")] = None,
    stages: Stages = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps (default: auto)", metavar="D")
    ] = None,
    batch_size: Batch = None,
    workers: Annotated[int | None, typer.Option(help="Decoding processes (default: one per core)", min=1)] = None,
    engine: Annotated[
        Engine | None, typer.Option(help="compile: measure torch.compile, too, which takes a minute")
    ] = None,
    precision: Annotated[Precision | None, typer.Option(help="In computing (default: float32)")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="On disk (default: float32)")] = None,
    weights: Annotated[str | None, typer.Option(help="As of bbx extract (default: random)", metavar="W")] = None,
    size: Size = None,
    as_json: Json = False,
) -> None:
    """Measure decode, forward, store and all together on this machine, and say which engine and batch size to use."""
    with signals():
        with loading():
            from bbx import facts, speed
            from bbx.bench import bench as measure

        options = given(
            stages=stages, device=device, batch_size=parse_batch_size(batch_size), workers=workers, engine=engine,
            precision=precision, dtype=dtype, weights=weights, size=parse_size(size),
        )  # fmt: skip
        with speed.telling() as tell:
            found = measure(model, images, tell=tell, **options)
    print_json(facts.of_bench(found)) if as_json else speed.bench(found)
