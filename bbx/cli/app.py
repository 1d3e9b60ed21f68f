"""The Typer application that the commands register with, and what several of them share: options and small parsers."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bbx.errors import UsageError
from bbx.spec import BatchSize, Decode, ExifMode, Norm, ResizeMode

if TYPE_CHECKING:
    from bbx.backbone import Backbone

EXIT_CODES = (
    "Exit codes: 0 all rows done · 1 internal error · 2 usage · 3 cannot start, or the disk failed · "
    "4 finished, some rows failed (verify: are damaged; diff: differ) · 5 all rows failed · "
    "130/143 interrupted, the same command continues · 141 nobody reads stdout any more."
)

app = typer.Typer(
    help="Feature maps of any vision backbone, stage by stage, from a folder of images into one HDF5 file, and drawn.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    # Plain help: Rich's panels bring a Markdown parser, and take as long again as everything else that --help does.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="swin-tiny, resnet50, …: see bbx models", metavar="NAME")
]
Stages = Annotated[
    str | None, typer.Option(help="stem,stage2 · 0,-1 · stem..stage2 · all (default: the last)", metavar="LIST")
]
Batch = Annotated[
    str | None,
    typer.Option(
        "--batch-size",
        metavar="N",
        help="Images in a batch, or auto: measured (default: 64; on a CPU, a few at once, of 8; of 4 with attention)",
    ),
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
DecodeOption = Annotated[
    Decode | None,
    typer.Option(
        "--decode",
        help="fast: nearly the same pixels for less; gpu: by the CUDA device, in bbx's own process (default: exact)",
    ),
]
Config = Annotated[
    str | None, typer.Option(help="A .yaml, .toml or .json file: backbone, neck and head", metavar="FILE")
]
NormOption = Annotated[
    Norm | None, typer.Option("--norm", help="native: what the library's own backbone class gives (default: raw)")
]
Tokens = Annotated[bool | None, typer.Option("--tokens", help="A plain ViT's stages as tokens, class token kept")]
Timeout = Annotated[float | None, typer.Option(help="Seconds that one image may take (default: 60.0)", metavar="S")]
MaxPixels = Annotated[int | None, typer.Option(help="Of the largest image to decode (default: 178956970)", metavar="N")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Errors only")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout")]


@app.callback(invoke_without_command=True)
def common(version: Annotated[bool, typer.Option("--version", help="Print the version")] = False) -> None:
    """Options of `bbx` itself."""
    if version:
        from bbx import __version__

        typer.echo(f"bbx {__version__}")
        raise typer.Exit


@contextmanager
def loading() -> Iterator[None]:
    """Around the imports of a command: the collector goes through every new object meanwhile, and none is garbage.

    Nor does any of them become so: it need not look at them ever again. From here on it works, which it has not since
    the process began.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def note(text: str) -> None:
    """One line of talk; Rich is loaded where there is something to say."""
    from bbx import console

    console.note(text)


def given(**options: Any) -> dict[str, Any]:
    """Only what was typed; the rest is left to the library's defaults."""
    return {name: value for name, value in options.items() if value is not None}


def backbone(model: str | None, config: str | None, *, structure: bool = False, **options: Any) -> Backbone:
    if config is None:
        with loading():
            from bbx.providers import load_backbone, load_structure

        return load_structure(str(model), **options) if structure else load_backbone(str(model), **options)
    with loading():
        from bbx.assembly import assemble

    if wrong := set(options) & {"weights", "tokens"}:
        raise UsageError(f"--{wrong.pop()} does not go with --config", "the configuration says the weights")
    return assemble(config, model=model or "", structure=structure, **options)


def parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:[x×,](\d+))?", text.strip().lower())
    if not match:
        raise UsageError(f"--size {text!r} is no size", "pixels, such as 224, or HEIGHTxWIDTH, such as 224x320")
    return int(match[1]), int(match[2] or match[1])


def parse_batch_size(text: str | None) -> BatchSize | None:
    if text is None:
        return None
    if text == "auto":
        return "auto"
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", text.strip()):
        hint = "a whole number from 1 to 999999999, or auto, which measures: bbx extract --help"
        raise UsageError(f"--batch-size {text!r} is no number of images", hint)
    return int(text)


def print_json(data: object) -> None:
    from bbx.facts import finite

    typer.echo(json.dumps(finite(data), allow_nan=False))
