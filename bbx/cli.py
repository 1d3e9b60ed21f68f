"""The commands, each a call of one library function; `main` is the only place that exits.

Nothing heavy is imported here: `--help` and completion stay instant, and each command pays for what it uses. Options
left out are left to the library, where the defaults live.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from bbx.errors import BbxError, InterruptedRunError, UsageError, WriteError, nearest
from bbx.spec import Dtype, ExifMode, Mode, Norm, OnError, Pool, Precision, ResizeMode, Scale

if TYPE_CHECKING:
    from types import FrameType

    from bbx.backbone import Backbone
    from bbx.plan import Plan

EXIT_CODES = (
    "Exit codes: 0 all rows done · 1 internal error · 2 usage · 3 cannot start, or the disk failed · "
    "4 finished, some rows failed · 5 all rows failed · 130/143 interrupted, the same command continues."
)

app = typer.Typer(
    help="Feature maps of any vision backbone, stage by stage, from a folder of images into one HDF5 file, and drawn.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="swin-tiny, resnet50, …: see bbx models", metavar="NAME")
]
Stages = Annotated[
    str | None, typer.Option(help="stem,stage2 · 0,-1 · stem..stage2 · all (default: the last)", metavar="LIST")
]
Layers = Annotated[str | None, typer.Option(help="Any module paths or globs: 'features.*.norm1'", metavar="LIST")]
Weights = Annotated[
    str | None, typer.Option(help="auto, random, a .safetensors/.pth file, or a name (default: auto)", metavar="W")
]
Seed = Annotated[int | None, typer.Option(help="Of random weights (default: 0)", metavar="N")]
Size = Annotated[
    str | None, typer.Option(help="Input in pixels, 224 or HEIGHTxWIDTH, not the weights' own", metavar="N")
]
Resize = Annotated[ResizeMode | None, typer.Option(help="How the picture is fitted to the input (default: crop)")]
Exif = Annotated[ExifMode | None, typer.Option(help="The orientation tag of photographs (default: apply)")]
Config = Annotated[
    str | None, typer.Option(help="A .yaml, .toml or .json file: backbone, neck and head", metavar="FILE")
]
NormOption = Annotated[
    Norm | None, typer.Option("--norm", help="native: what the library's own backbone class gives (default: raw)")
]
Tokens = Annotated[bool | None, typer.Option("--tokens", help="A plain ViT's stages as tokens, class token kept")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout")]


@app.callback(invoke_without_command=True)
def common(version: Annotated[bool, typer.Option("--version", help="Print the version")] = False) -> None:
    """Options of `bbx` itself."""
    if version:
        from bbx import __version__

        typer.echo(f"bbx {__version__}")
        raise typer.Exit


@app.command(epilog=EXIT_CODES)
def extract(
    images: Annotated[list[str], typer.Argument(help="Folders, files, globs, @list.txt, or - for paths on stdin")],
    model: Model = None,
    config: Config = None,
    stages: Stages = None,
    layers: Layers = None,
    weights: Weights = None,
    seed: Seed = None,
    size: Size = None,
    resize_mode: Resize = None,
    exif: Exif = None,
    norm: NormOption = None,
    tokens: Tokens = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images computed at once (default: 8 on a CPU, 64 elsewhere)", min=1)
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Decoding threads (default: one per core)", min=1)] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps (default: auto)", metavar="D")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="On disk (default: float32)")] = None,
    precision: Annotated[Precision | None, typer.Option(help="In computing (default: float32)")] = None,
    pool: Annotated[Pool | None, typer.Option(help="Store a vector per stage instead of a map (default: none)")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="The feature file (default: features.h5)")
    ] = None,
    mode: Annotated[
        Mode | None, typer.Option(help="auto resumes the same run, refuses another's file (default: auto)")
    ] = None,
    on_error: Annotated[
        OnError | None, typer.Option(help="A bad image: a failed row, or the end (default: skip)")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing")] = False,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="More of the plan")] = False,
) -> None:
    """Extract stem and stages of a backbone for every image into one HDF5 file."""
    with _signals() as stop:  # from here on, for the imports take their time too
        from bbx import console, facts, runner

        options = _given(
            model=model, config=config, stages=stages, layers=layers, weights=weights, seed=seed, size=_size(size),
            resize_mode=resize_mode,
            exif=exif, norm=norm, tokens=tokens, batch_size=batch_size, workers=workers, device=device, dtype=dtype,
            precision=precision,
            pool=pool, output=output, mode=mode, on_error=on_error,
        )  # fmt: skip
        plans: list[Plan] = []

        def on_plan(plan: Plan) -> None:
            plans.append(plan)
            if not quiet:
                console.plan(plan, verbose=verbose)

        with nullcontext() if quiet else console.progress() as progress:
            summary = runner.extract(images, dry_run=dry_run, on_plan=on_plan, progress=progress, stop=stop, **options)
    if not quiet and not dry_run:
        console.summary(summary)
    if as_json:
        _print_json(facts.of_run(plans[0], summary, dry_run=dry_run))
    elif not dry_run:
        typer.echo(os.fsencode(summary.output))  # bytes: a file name need not be text
    raise typer.Exit(0 if dry_run else summary.exit_code)


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
    norm: NormOption = None,
    tokens: Tokens = None,
    config: Config = None,
) -> None:
    """Draw channel grids of stem and stages, and a contact sheet: of a feature file, or straight from an image."""
    from bbx import console
    from bbx import show as drawing

    options = _given(
        layers=layers, weights=weights, seed=seed, size=_size(size), resize_mode=resize_mode, exif=exif, norm=norm,
        tokens=tokens,
    )  # fmt: skip
    if model or config:
        if image or root:
            raise UsageError("--image and --root choose from a feature file, not with --model", "name the image itself")
        wanted = stages if stages or layers else "all"
        subjects = drawing.from_image(source, _backbone(model, config, stages=wanted, **options))
    elif options:
        raise UsageError(f"--{next(iter(options)).replace('_', '-')} needs --model", "bbx show image.jpg --model NAME")
    else:
        subjects = drawing.from_file(source, root=root, tell=console.note, **_given(images=image, stages=stages))
    figures = drawing.draw(subjects, drawing.Look(channels, scale, cmap, overlay))
    if window:
        drawing.open_windows(figures)
        return
    for path in drawing.save(figures, output, source=source):
        typer.echo(os.fsencode(path))


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
    from bbx import console, facts

    options = _given(weights=weights, size=_size(size), norm=norm, tokens=tokens)
    if model is None and config is None:
        raise UsageError("which model? bbx stages NAME", "bbx models lists them")
    if compare:
        from bbx.compare import compare as side_by_side

        if config or set(options) - {"size"}:
            raise UsageError("--compare takes a model's name and --size alone", f"bbx stages {model} --compare")
        result = side_by_side(str(model), **options)
        _print_json(facts.of_comparison(result)) if as_json else console.comparison(result)
        return
    from bbx.backbone import parameters_until

    backbone = _backbone(model, config, structure=True, **options)
    parameters = parameters_until(backbone)
    if as_json:
        _print_json(facts.of_stages(backbone, parameters))
    else:
        console.stages(str(backbone.ref), backbone.stages, parameters, backbone.preprocess, backbone.notes)


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
    from bbx import console
    from bbx.providers import list_models

    filters = _given(provider=provider, family=family, parameters=parameters, stride=stride)
    found = list_models(pattern, here=here, **filters)
    if not found:
        more = "".join(f" --{name} {value}" for name, value in filters.items()) + " --here" * here
        close = nearest(pattern, {name for row in list_models() for name in (row["name"], row["alias"]) if name})
        meant = f"did you mean {' or '.join(close)}? " if close else ""
        raise UsageError(f"no model matches {pattern!r}{more}", f"{meant}bbx models lists all of them")
    if as_json:
        _print_json(found)
    else:
        console.models(found)


@app.command()
def info(file: Annotated[str, typer.Argument(help="A feature file")], as_json: Json = False) -> None:
    """Print what a feature file holds, and how it was made."""
    from bbx import console, facts
    from bbx.store import open_finished_or_partial

    with open_finished_or_partial(file) as opened:
        if as_json:
            _print_json(facts.of_file(opened))
        else:
            console.info(opened)


def main() -> None:
    """The `bbx` command: runs it, prints any error on stderr, exits with its documented code."""
    # A feature file from a stranger must not make HDF5 load a filter plugin; read when h5py is first imported.
    os.environ.setdefault("HDF5_PLUGIN_PRELOAD", "::")
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except BbxError as problem:
        _fail(problem)
    except _Signalled as stopped:
        name = signal.Signals(stopped.signum).name
        _fail(
            InterruptedRunError(f"stopped by {name}", "the same command starts or continues it", signum=stopped.signum)
        )
    except OSError as problem:
        _fail(WriteError(f"the system refused: {problem}", "is the disk full, or the pipe closed?"))
    except Exception as problem:
        _fail(_misused(problem) or _internal(problem))


class _Signalled(BaseException):
    """A signal's way out to `main`: no exception, so that nothing between takes it for a bad image or file."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def _fail(problem: BbxError) -> NoReturn:
    from bbx import console

    console.error(problem)
    if "--json" in sys.argv:
        _print_json({"error": problem.message, "hint": problem.hint, "exit_code": problem.exit_code})
    sys.exit(problem.exit_code)


def _misused(problem: Exception) -> UsageError | None:
    """Typer's own complaint about the command line (it vendors click, so that its class has no public name)."""
    tell = getattr(problem, "format_message", None)
    if tell is None or getattr(problem, "exit_code", None) != UsageError.exit_code:
        return None
    context = getattr(problem, "ctx", None)
    return UsageError(tell(), f"{context.command_path if context else 'bbx'} --help")


def _internal(problem: Exception) -> BbxError:
    """An error nobody foresaw, with its trace, for the bug report."""
    trace = "".join(traceback.format_exception(problem))
    return BbxError(
        f"internal error, {type(problem).__name__}: {problem}\n{trace}", "a defect of bbx: please report it"
    )


@contextmanager
def _signals() -> Iterator[Callable[[], int | None]]:
    """Gives the function that the loop asks after each batch; SIGINT and SIGTERM then end it with all work committed.

    A signal before the loop runs, or a second one, ends at once: that is safe too, only the last batches are lost.
    """
    seen: list[int] = []
    asked = False

    def stop() -> int | None:
        nonlocal asked
        asked = True
        return seen[0] if seen else None

    def handle(signum: int, _frame: FrameType | None) -> None:
        # Noted first: Python swallows an exception that is raised while a finaliser runs.
        at_once = bool(seen) or not asked
        seen.append(signum)
        if at_once:
            raise _Signalled(signum)

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _given(**options: Any) -> dict[str, Any]:
    """Only what was typed; the rest is left to the library's defaults."""
    return {name: value for name, value in options.items() if value is not None}


def _backbone(model: str | None, config: str | None, *, structure: bool = False, **options: Any) -> Backbone:
    if config is None:
        from bbx.providers import load_backbone, load_structure

        return load_structure(str(model), **options) if structure else load_backbone(str(model), **options)
    from bbx.assembly import assemble

    if wrong := set(options) & {"weights", "tokens"}:
        raise UsageError(f"--{wrong.pop()} does not go with --config", "the configuration says the weights")
    return assemble(config, model=model or "", structure=structure, **options)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:[x×,](\d+))?", text.strip().lower())
    if not match:
        raise UsageError(f"--size {text!r} is no size", "pixels, such as 224, or HEIGHTxWIDTH, such as 224x320")
    return int(match[1]), int(match[2] or match[1])


def _print_json(data: object) -> None:
    typer.echo(json.dumps(data))
