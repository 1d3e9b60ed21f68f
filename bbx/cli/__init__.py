"""The commands, each a call of one library function; `main` is the only place that exits.

Nothing heavy is imported here: `--help` and completion stay instant, and each command pays for what it uses. Options
left out are left to the library, where the defaults live.
"""

from __future__ import annotations

import atexit
import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

import typer

from bbx.cli.app import app, print_json
from bbx.cli.bench import bench
from bbx.cli.extraction import extract
from bbx.cli.files import diff, export, merge, verify
from bbx.cli.look import info, models, show, stages_command
from bbx.cli.shield import can_shield, shielded
from bbx.cli.signals import Signalled
from bbx.errors import BbxError, InterruptedRunError, StartError, UsageError, WriteError

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

_NO_READER = 141
"""The exit code where whoever read standard output is gone: 128 + SIGPIPE, what a shell has of any such program."""
_CTRL_C = 130
"""What Typer gives back for a Ctrl-C that it caught; no command of bbx has this result of its own."""
_NO_MEMORY = ("failed to map segment", "annot allocate memory")
_ORDER = (extract, show, stages_command, models, info, verify, diff, bench, merge, export)
app.registered_commands.sort(key=lambda command: _ORDER.index(command.callback))  # as the help lists them
for _command in app.registered_commands:
    _command.short_help = (_command.callback.__doc__ or "").partition("\n\n")[0]  # which the help does not cut short


def run() -> NoReturn:
    """The `bbx` command: as `main`, proof against files on which HDF5 crashes, and gone once it is done."""
    if hasattr(signal, "SIGCHLD"):  # whoever started this may ignore it: then nobody learns how a process ended
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a locale that has no × is no error
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _run()
    except SystemExit as ended:
        _leave(ended)


def _run() -> NoReturn:
    # Typer builds every command that it knows, at 5 ms each, to run one.
    wanted = [
        one for one in app.registered_commands if (one.name or getattr(one.callback, "__name__", "")) in sys.argv[1:2]
    ]
    app.registered_commands = wanted or app.registered_commands

    def command() -> object:
        for one in wanted:
            if one.callback and can_shield(sys.argv[1:]):
                one.callback = shielded(one.callback, _ending)
        return app(standalone_mode=False)

    _ending(command)


def main() -> NoReturn:
    """Runs the command, prints any error on stderr, exits with its documented code."""
    _ending(lambda: app(standalone_mode=False))


def _ending(command: Callable[[], object]) -> NoReturn:
    """Calls `command`, and exits with the documented code of whatever comes of it, any error on stderr.

    A command behind the shield goes through it twice: in the child, and in the parent, which only ends as the child.
    """
    # A feature file from a stranger must not make HDF5 load a filter plugin; read when h5py is first imported.
    os.environ.setdefault("HDF5_PLUGIN_PRELOAD", "::")
    try:
        code = command()  # what Typer has made of an Exit, or of a Ctrl-C
        if code == _CTRL_C:
            raise KeyboardInterrupt
        sys.exit(code or 0)  # type: ignore[arg-type]
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # which Typer makes an exit of its own
            _refused(ended.__context__)
        raise
    except BbxError as problem:
        _fail(problem)
    except Signalled as stopped:
        name = signal.Signals(stopped.signum).name
        again = "starts or continues it" if sys.argv[1:2] == ["extract"] else "starts again"
        _fail(InterruptedRunError(f"stopped by {name}", f"the same command {again}", signum=stopped.signum))
    except (typer.Abort, KeyboardInterrupt):  # Ctrl-C, where no command was prepared for it
        _interrupted()
    except OSError as problem:
        _refused(problem)
    except Exception as problem:
        _fail(_misused(problem) or _starved(problem) or _internal(problem))


def _leave(ended: SystemExit) -> NoReturn:
    """Ends this process as `ended` says, without taking it to pieces: half a second, where torch is loaded.

    What was registered to be done at the end is done, and what was printed is out; the system takes the rest.
    """
    atexit._run_exitfuncs()
    code = ended.code
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: the caller has closed it
        try:
            stream.flush()
        except OSError as problem:
            if not code and stream is sys.stdout:  # else an error has been told, or talk was
                try:
                    _refused(problem)
                except SystemExit as worse:
                    code = worse.code
    os._exit(code if isinstance(code, int) else int(code is not None))


def _fail(problem: BbxError) -> NoReturn:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what happened is being told
    with suppress(OSError):  # the streams may be what failed: the exit code tells it all the same
        try:
            from bbx import console
        except (ImportError, MemoryError):  # too little memory for Rich, too
            print(f"error: {problem.message}\n  hint: {problem.hint}", file=sys.stderr)  # noqa: T201 # the one place
        else:
            console.error(problem)
    with suppress(OSError):
        if "--json" in sys.argv:
            print_json({"error": problem.message, "hint": problem.hint, "exit_code": problem.exit_code})
    sys.exit(problem.exit_code)


def _interrupted() -> NoReturn:
    _fail(InterruptedRunError("stopped by SIGINT", "the same command starts again"))


def _refused(problem: OSError) -> NoReturn:
    if isinstance(problem, BrokenPipeError):  # `bbx models | head`: no error, and nobody to tell
        sys.exit(_NO_READER)
    full = problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    _fail(WriteError(f"the system refused: {problem}", "is the disk full?" if full else "is every path right?"))


def _misused(problem: Exception) -> UsageError | None:
    """Typer's own complaint about the command line (it vendors click, so that its class has no public name)."""
    tell = getattr(problem, "format_message", None)
    if tell is None or getattr(problem, "exit_code", None) != UsageError.exit_code:
        return None
    context = getattr(problem, "ctx", None)
    # pydantic's own words before those that it was given
    return UsageError(tell().replace("Value error, ", ""), f"{context.command_path if context else 'bbx'} --help")


def _starved(problem: Exception) -> StartError | None:
    """What a limit on memory makes of an import, or of an allocation."""
    if not isinstance(problem, MemoryError) and not any(words in str(problem) for words in _NO_MEMORY):
        return None
    hint = "raise the limit on memory (ulimit -v, the batch system's), or end what else uses it"
    return StartError(f"there is too little memory: {problem or type(problem).__name__}", hint)


def _internal(problem: Exception) -> BbxError:
    """An error nobody foresaw, with its trace, for the bug report."""
    trace = "".join(traceback.format_exception(problem))
    return BbxError(
        f"internal error, {type(problem).__name__}: {problem}\n{trace}", "a defect of bbx: please report it"
    )
