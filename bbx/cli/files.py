"""The commands about feature files that are there: `verify`, `diff`, `merge`, `export`."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Annotated

import typer

from bbx.cli.app import EXIT_CODES, Json, MaxPixels, Quiet, Timeout, Weights, app, given, loading, print_json
from bbx.cli.signals import signals
from bbx.spec import Compress

AllStages = Annotated[str | None, typer.Option(help="stem,stage2 · 0,-1 · stem..stage2 (default: all)", metavar="LIST")]
Root = Annotated[str | None, typer.Option(help="The folder of the file's images", metavar="FOLDER")]


@app.command(epilog=EXIT_CODES)
def verify(
    file: Annotated[str, typer.Argument(help="A feature file")],
    recompute: Annotated[int | None, typer.Option(help="Extract K random rows again, and compare", metavar="K")] = None,
    root: Root = None,
    weights: Weights = None,
    device: Annotated[str | None, typer.Option(help="For --recompute (default: auto)", metavar="D")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the choice of rows (default: 0)", metavar="N")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Of a row's largest value (default: 1e-05, more for float16)", metavar="X")
    ] = None,
    image_timeout: Timeout = None,
    max_pixels: MaxPixels = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a feature file: structure, marks, every row's checksum and seal; and extract some rows again."""
    with signals():
        with loading():
            from bbx import reports
            from bbx.verify import verify as check

        options = given(
            recompute=recompute, root=root, weights=weights, device=device, seed=seed, tolerance=tolerance,
            image_timeout=image_timeout, max_pixels=max_pixels,
        )  # fmt: skip
        with nullcontext() if quiet else reports.progress("checking") as progress:
            verdict = check(file, progress=progress, **options)
    print_json(reports.facts_of(verdict)) if as_json else reports.verdict(verdict, quiet=quiet)
    raise typer.Exit(verdict.exit_code)


@app.command(epilog=EXIT_CODES)
def diff(
    a: Annotated[str, typer.Argument(help="A feature file", metavar="A")],
    b: Annotated[str, typer.Argument(help="Another one", metavar="B")],
    stages: AllStages = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Of a row's largest value (default: 1e-05)", metavar="X")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two feature files: features per stage, images, and what was recorded of how they were made."""
    with signals():
        with loading():
            from bbx import reports
            from bbx.diff import diff as compare

        options = given(stages=stages, tolerance=tolerance)
        with nullcontext() if quiet else reports.progress("comparing") as progress:
            found = compare(a, b, progress=progress, **options)
    print_json(reports.facts_of(found)) if as_json else reports.difference(found, quiet=quiet)
    raise typer.Exit(found.exit_code)


@app.command()
def merge(
    files: Annotated[list[str], typer.Argument(help="Feature files: of other images, or of other stages")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The merged file")],
    virtual: Annotated[bool, typer.Option("--virtual", help="Refer to the files instead of copying them")] = False,
    compress: Annotated[Compress | None, typer.Option(help="Pack the merged file (default: none)")] = None,
    overlap: Annotated[
        str | None,
        typer.Option(help="Of an image with two different maps: refuse, first, last (default: refuse)", metavar="WORD"),
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="new, or overwrite a feature file (default: new)", metavar="WORD")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put feature files together: the rows of many, or the stages of files with the same rows."""
    with signals():
        with loading():
            from bbx import reports
            from bbx.provenance import command_facts
            from bbx.store.merge import merge as put_together

        options = given(compress=compress, overlap=overlap, mode=mode)
        with nullcontext() if quiet else reports.progress("merging") as progress:
            merged = put_together(files, output, virtual=virtual, attempt=command_facts(), progress=progress, **options)
    if not quiet:
        reports.merged(merged)
    print_json(reports.facts_of(merged)) if as_json else typer.echo(os.fsencode(merged.path))


@app.command()
def export(
    file: Annotated[str, typer.Argument(help="A feature file")],
    to: Annotated[str, typer.Option(help="npy, zarr, safetensors, or parquet (pooled stages)", metavar="FORMAT")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="PATH", help="Default: beside the file, by its name")
    ] = None,
    stages: AllStages = None,
    missing: Annotated[
        str | None, typer.Option(help="Failed and pending rows: skip, or nan (default: skip)", metavar="WORD")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the finished rows for other programs: one .npy per stage, Zarr, safetensors or Parquet."""
    with signals():
        with loading():
            from bbx import reports
            from bbx.export import export as write

        options = given(to=to, stages=stages, missing=missing)
        with nullcontext() if quiet else reports.progress("exporting") as progress:
            exported = write(file, output=output, overwrite=overwrite, progress=progress, **options)
    if not quiet:
        reports.exported(exported)
    if as_json:
        print_json(reports.facts_of(exported))
    else:
        for path in exported.paths:
            typer.echo(os.fsencode(path))
