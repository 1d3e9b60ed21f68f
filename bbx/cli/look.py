"""The commands that only look: `show`, `stages`, `models`, `info`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from bbx.cli.app import (
    Config,
    DecodeOption,
    Exif,
    Json,
    Layers,
    Model,
    NormOption,
    Resize,
    Seed,
    Size,
    Stages,
    Tokens,
    Weights,
    app,
    backbone,
    given,
    loading,
    note,
    parse_size,
    print_json,
)
from bbx.errors import UsageError, nearest
from bbx.spec import Scale

# Up to here `info` checks every row's seal, at a tenth of a second.
_CHECKED_ROWS = 100_000


@app.command()
def show(
    source: Annotated[str, typer.Argument(help="A feature file, or with --model an image")],
    image: Annotated[
        list[str] | None, typer.Option(help="Key, glob of keys, or row; repeatable", metavar="KEY")
    ] = None,
    stages: Stages = None,
    channels: Annotated[
        str | None, typer.Option(help="0:64 · 3,17 · top:16 (by mean) · top:16:max · top:16:std", metavar="LIST")
    ] = None,
    scale: Annotated[
        Scale | None, typer.Option(help="One range for all channels, or each its own (default: shared)")
    ] = None,
    cmap: Annotated[str | None, typer.Option(help="A matplotlib colour map", metavar="NAME")] = None,
    overlay: Annotated[bool, typer.Option("--overlay", help="Draw the channels over the picture")] = False,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="A folder, or a name.png, .svg, .pdf", metavar="PATH")
    ] = None,
    root: Annotated[str | None, typer.Option(help="The folder of the file's images", metavar="FOLDER")] = None,
    window: Annotated[bool, typer.Option("--window", help="Open windows instead of writing files")] = False,
    model: Model = None,
    layers: Layers = None,
    weights: Weights = None,
    seed: Seed = None,
    size: Size = None,
    resize_mode: Resize = None,
    exif: Exif = None,
    decode: DecodeOption = None,
    norm: NormOption = None,
    tokens: Tokens = None,
    config: Config = None,
) -> None:
    """Draw channel grids of stem and stages, and a contact sheet: of a feature file, or straight from an image."""
    with loading(), _figures_without_help():
        from bbx import show as drawing

    options = given(
        layers=layers, weights=weights, seed=seed, size=parse_size(size), resize_mode=resize_mode, exif=exif,
        decode=decode, norm=norm, tokens=tokens,
    )  # fmt: skip
    if model or config:
        if image or root:
            raise UsageError("--image and --root choose from a feature file, not with --model", "name the image itself")
        wanted = stages if stages or layers else "all"
        subjects = drawing.from_image(source, backbone(model, config, stages=wanted, **options))
    elif options:
        raise UsageError(f"--{next(iter(options)).replace('_', '-')} needs --model", "bbx show image.jpg --model NAME")
    else:
        subjects = drawing.from_file(source, root=root, tell=note, **given(images=image, stages=stages))
    figures = drawing.draw(subjects, drawing.Look(channels, scale, cmap, overlay))
    if window:
        drawing.open_windows(figures)
        return
    for path in drawing.save(figures, output, source=source):
        typer.echo(os.fsencode(path))


@contextmanager
def _figures_without_help() -> Iterator[None]:
    """Around the first import of matplotlib's figures: it writes a help text for each of a hundred classes meanwhile.

    That is two fifths of the import, for texts which nobody can ask a command for.
    """
    try:
        from matplotlib.artist import Artist
    except ValueError as error:  # which it makes of a wrong MPLBACKEND
        if "MPLBACKEND" not in os.environ:
            raise
        raise UsageError(f"matplotlib cannot be loaded: {error}", "unset MPLBACKEND") from None

    name = "_update_set_signature_and_docstring"  # a private name: where a matplotlib has none, it writes its texts
    writes = vars(Artist).get(name)
    if writes is not None:
        setattr(Artist, name, classmethod(lambda _kind: None))
    try:
        yield
    finally:
        if writes is not None:
            setattr(Artist, name, writes)


@app.command(name="stages")
def stages_command(
    model: Annotated[str | None, typer.Argument(help="swin-tiny, resnet50, …: see bbx models")] = None,
    config: Config = None,
    weights: Weights = None,
    size: Size = None,
    norm: NormOption = None,
    tokens: Tokens = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="The same architecture in all libraries, with the same random weights")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print what stem and stages of a backbone are: module, channels, stride, size, cost, preprocessing."""
    with loading():
        from bbx import console, facts

    options = given(weights=weights, size=parse_size(size), norm=norm, tokens=tokens)
    if model is None and config is None:
        raise UsageError("which model? bbx stages NAME", "bbx models lists them")
    if compare:
        with loading():
            from bbx.compare import compare as side_by_side

        if config or set(options) - {"size"}:
            raise UsageError("--compare takes a model's name and --size alone", f"bbx stages {model} --compare")
        result = side_by_side(str(model), **options)
        print_json(facts.of_comparison(result)) if as_json else console.comparison(result)
        return
    from bbx.parameters import parameters_until

    found = backbone(model, config, structure=True, **options)
    parameters = parameters_until(found)
    if as_json:
        print_json(facts.of_stages(found, parameters))
    else:
        console.stages(str(found.ref), found.stages, parameters, found.preprocess, found.notes)


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="A glob: 'swin*', 'timm:*'")] = "*",
    provider: Annotated[str | None, typer.Option(help="packaged, torchvision, timm or transformers")] = None,
    family: Annotated[str | None, typer.Option(help="A glob: resnet, 'swin*'")] = None,
    parameters: Annotated[str | None, typer.Option(help="A range: ..30M, 5M..30M, 1B..", metavar="RANGE")] = None,
    stride: Annotated[int | None, typer.Option(help="Of the last stage, in pixels")] = None,
    here: Annotated[bool, typer.Option("--here", help="Only those with weights on this machine")] = False,
    as_json: Json = False,
) -> None:
    """List the models: name, alias, provider, family, parameters, stride, weights (* on this machine)."""
    with loading():
        from bbx.providers import list_models

    filters = given(provider=provider, family=family, parameters=parameters, stride=stride)
    found = list_models(pattern, here=here, **filters)
    if not found:
        more = "".join(f" --{name} {value}" for name, value in filters.items()) + " --here" * here
        close = nearest(pattern, {name for row in list_models() for name in (row["name"], row["alias"]) if name})
        meant = f"did you mean {' or '.join(close)}? " if close else ""
        raise UsageError(f"no model matches {pattern!r}{more}", f"{meant}bbx models lists all of them")
    if as_json:
        print_json(found)
    else:
        from bbx import console

        console.models(found)


@app.command()
def info(file: Annotated[str, typer.Argument(help="A feature file")], as_json: Json = False) -> None:
    """Print what a feature file holds, and how it was made."""
    with loading():
        from bbx import facts
        from bbx.store import open_finished_or_partial

        if not as_json:
            from bbx import console  # brings Rich, which JSON has no use for

    with open_finished_or_partial(file) as opened:
        if len(opened) <= _CHECKED_ROWS:
            opened.check_marks()
        elif not as_json:
            console.note(f"{len(opened):,} rows: their seals are not checked here; bbx verify {file} does")
        if as_json:
            print_json(facts.of_file(opened))
        else:
            console.info(opened)
