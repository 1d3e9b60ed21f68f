"""`bbx extract`: a call of `bbx.extract`, with its plan, progress and summary told."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from bbx.cli.app import (
    EXIT_CODES,
    Batch,
    Config,
    DecodeOption,
    Exif,
    Json,
    Layers,
    MaxPixels,
    Model,
    NormOption,
    Quiet,
    Resize,
    Seed,
    Size,
    Stages,
    Timeout,
    Tokens,
    Weights,
    app,
    given,
    loading,
    parse_batch_size,
    parse_size,
    print_json,
)
from bbx.cli.signals import signals
from bbx.machine import cores
from bbx.spec import ChannelsLast, Compress, Dtype, Engine, Mode, OnError, Pool, Precision

if TYPE_CHECKING:
    from bbx.plan import Plan


@app.command(epilog=EXIT_CODES)
def extract(
    images: Annotated[
        list[str] | None, typer.Argument(help="Folders, files, globs, @list.txt, or - for paths on stdin")
    ] = None,
    model: Model = None,
    config: Config = None,
    stages: Stages = None,
    layers: Layers = None,
    weights: Weights = None,
    seed: Seed = None,
    size: Size = None,
    resize_mode: Resize = None,
    exif: Exif = None,
    decode: DecodeOption = None,
    norm: NormOption = None,
    tokens: Tokens = None,
    batch_size: Batch = None,
    workers: Annotated[int | None, typer.Option(help="Decoding processes (default: one per core)", min=1)] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps (default: auto)", metavar="D")
    ] = None,
    engine: Annotated[
        Engine | None, typer.Option(help="compile: torch.compile, for long jobs (default: eager)")
    ] = None,
    channels_last: Annotated[
        ChannelsLast | None, typer.Option(help="Memory layout in computing (default: auto)")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="On disk (default: float32)")] = None,
    precision: Annotated[Precision | None, typer.Option(help="In computing (default: float32)")] = None,
    pool: Annotated[Pool | None, typer.Option(help="Store a vector per stage instead of a map (default: none)")] = None,
    like: Annotated[
        str | None, typer.Option(help="As this feature file was made, in all that is not said here", metavar="FILE")
    ] = None,
    skip_in: Annotated[
        str | None,
        typer.Option(help="Only images that this feature file does not hold, or not as they are", metavar="FILE"),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="The feature file (default: features.h5)")
    ] = None,
    mode: Annotated[
        Mode | None, typer.Option(help="auto resumes the same run, refuses another's file (default: auto)")
    ] = None,
    retry_failed: Annotated[
        bool | None, typer.Option("--retry-failed", help="Compute the failed rows of the output again")
    ] = None,
    compress: Annotated[Compress | None, typer.Option(help="Pack the finished file (default: none)")] = None,
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic", help="The same bits each time, also after a kill")
    ] = None,
    image_timeout: Timeout = None,
    max_pixels: MaxPixels = None,
    digest: Annotated[
        bool | None, typer.Option("--digest/--no-digest", help="Record each image file's BLAKE2b (default: yes)")
    ] = None,
    on_error: Annotated[
        OnError | None, typer.Option(help="A bad image: a failed row, or the end (default: skip)")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="More of the plan")] = False,
) -> None:
    """Extract stem and stages of a backbone for every image into one HDF5 file."""
    with ExitStack() as stack:
        stop = stack.enter_context(signals())  # from here on, for the imports take their time too
        with loading():
            from bbx.images.process import started_ahead

            stack.enter_context(started_ahead(0 if dry_run else workers or cores()))
            from bbx import facts, run_report, runner

        options = given(
            model=model, config=config, stages=stages, layers=layers, weights=weights, seed=seed, size=parse_size(size),
            resize_mode=resize_mode, exif=exif, decode=decode, norm=norm, tokens=tokens,
            batch_size=parse_batch_size(batch_size), workers=workers, device=device,
            engine=engine, channels_last=channels_last, dtype=dtype, precision=precision,
            pool=pool, like=like, skip_in=skip_in, output=output, mode=mode, retry_failed=retry_failed,
            compress=compress, deterministic=deterministic, image_timeout=image_timeout, max_pixels=max_pixels,
            digest=digest, on_error=on_error,
        )  # fmt: skip
        plans: list[Plan] = []

        def on_plan(plan: Plan) -> None:
            plans.append(plan)
            if not quiet:
                run_report.plan(plan, verbose=verbose)

        progress = None if quiet else stack.enter_context(run_report.progress())
        summary = runner.extract(images, dry_run=dry_run, on_plan=on_plan, progress=progress, stop=stop, **options)
    if not quiet and not dry_run:
        run_report.summary(summary)
    if as_json:
        print_json(facts.of_run(plans[0], summary, dry_run=dry_run))
    elif not dry_run:
        typer.echo(os.fsencode(summary.output))  # bytes: a file name need not be text
    raise typer.Exit(0 if dry_run else summary.exit_code)
