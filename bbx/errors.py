"""Every error bbx raises on purpose, each with the exit code that the command line turns it into.

Library code raises these and never prints; `cli.main` is the only place that exits. The codes are documented in the
README and stand here once: 0 done, 1 internal error, 2 usage, 3 cannot start, 4 some rows failed, 5 all rows failed,
130 and 143 interrupted by SIGINT and SIGTERM.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_SOME_FAILED = 4
EXIT_ALL_FAILED = 5


class BbxError(Exception):
    """An error with a message that names the thing and a hint that says what to type instead."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def __reduce__(self) -> tuple[type[BbxError], tuple[str, str]]:
        # The default would lose the hint when the error crosses a process.
        return type(self), (self.message, self.hint)


class UsageError(BbxError, ValueError):
    """The call itself is wrong: an unknown model, stage or value."""

    exit_code = 2


class StartError(BbxError):
    """The call is right, but the run cannot start: weights, disk, input."""

    exit_code = 3


class WeightsError(StartError):
    """The weights asked for cannot be had here, or do not fit the model."""


class MissingExtraError(StartError):
    """A package that only an extra of bbx brings is not installed; made from its name, which is the extra's."""

    def __init__(self, package: str, hint: str = "") -> None:
        super().__init__(f"{package} is not installed", hint or f"pip install 'bbx[{package}]'")

    def __reduce__(self) -> tuple[type[BbxError], tuple[str, str]]:
        return type(self), (self.message.partition(" ")[0], self.hint)


class RunMismatchError(StartError):
    """The output file belongs to another run; the message names the field that differs."""


class FileError(StartError):
    """A feature file is missing, damaged, untrusted, or of another format."""


class WriteError(BbxError):
    """The output could not be written; what was committed before stays and can be resumed."""

    exit_code = 3


class ContractError(BbxError):
    """A backbone gave other maps than it declared: a defect of its provider, never of the input."""


class ImageError(BbxError):
    """One image cannot be read; the message is the reason that its row records."""

    exit_code = EXIT_SOME_FAILED


class InterruptedRunError(BbxError):
    """A signal stopped the run after its last batch was committed; the same command continues it."""

    def __init__(self, message: str, hint: str = "", *, signum: int = 2) -> None:
        super().__init__(message, hint)
        self.signum = signum
        self.exit_code = 128 + signum


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The `count` names of `known` that look most like `word`, best first, empty when none does."""
    by_fold = {name.lower().replace("_", "-"): name for name in known}
    close = difflib.get_close_matches(word.lower().replace("_", "-"), by_fold, n=count, cutoff=0.5)
    return [by_fold[fold] for fold in close]
