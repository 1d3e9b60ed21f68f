"""The commands, each a call of one library function; `main` is the only place that exits.

Nothing heavy is imported here: `--help` and completion stay instant, and each command pays for what it uses. Options
left out are left to the library, where the defaults live.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import NoReturn

import typer

from bbx.cli.app import app, print_json
from bbx.cli.bench import bench
from bbx.cli.extraction import extract
from bbx.cli.files import diff, export, merge, verify
from bbx.cli.look import info, models, show, stages_command
from bbx.cli.shield import READING, shielded
from bbx.cli.signals import Signalled
from bbx.errors import BbxError, InterruptedRunError, UsageError, WriteError

__all__ = [
    "app",
    "bench",
    "diff",
    "export",
    "extract",
    "info",
    "main",
    "merge",
    "models",
    "run",
    "show",
    "stages_command",
    "verify",
]

_ORDER = (extract, show, stages_command, models, info, verify, diff, bench, merge, export)
app.registered_commands.sort(key=lambda command: _ORDER.index(command.callback))  # as the help lists them
for _command in app.registered_commands:
    _command.short_help = (_command.callback.__doc__ or "").partition("\n\n")[0]  # which the help does not cut short


def run() -> None:
    """The `bbx` command: as `main`, and proof against files on which HDF5 crashes."""
    if hasattr(os, "fork") and sys.argv[1:2] and sys.argv[1] in READING:
        try:
            shielded(main)
        except BbxError as problem:
            _fail(problem)
    main()


def main() -> NoReturn:
    """Runs the command, prints any error on stderr, exits with its documented code."""
    # A feature file from a stranger must not make HDF5 load a filter plugin; read when h5py is first imported.
    os.environ.setdefault("HDF5_PLUGIN_PRELOAD", "::")
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except BbxError as problem:
        _fail(problem)
    except Signalled as stopped:
        name = signal.Signals(stopped.signum).name
        _fail(
            InterruptedRunError(f"stopped by {name}", "the same command starts or continues it", signum=stopped.signum)
        )
    except typer.Abort:  # Ctrl-C, where no command was prepared for it
        _fail(InterruptedRunError("stopped by SIGINT", "the same command starts again"))
    except OSError as problem:
        _fail(WriteError(f"the system refused: {problem}", "is the disk full, or the pipe closed?"))
    except Exception as problem:
        _fail(_misused(problem) or _internal(problem))


def _fail(problem: BbxError) -> NoReturn:
    from bbx import console

    console.error(problem)
    if "--json" in sys.argv:
        print_json({"error": problem.message, "hint": problem.hint, "exit_code": problem.exit_code})
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
