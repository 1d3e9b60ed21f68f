"""What `extract` is told, checked before anything is loaded: numbers of any kind as Python's own, words as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from bbx.errors import UsageError
from bbx.spec import (
    BatchSize,
    ChannelsLast,
    Compress,
    Decode,
    Dtype,
    Engine,
    ExifMode,
    Mode,
    Norm,
    OnError,
    Pool,
    Precision,
    ResizeMode,
    one_of,
)

_WORDS = {
    "dtype": Dtype, "precision": Precision, "pool": Pool, "norm": Norm, "mode": Mode, "on_error": OnError,
    "compress": Compress, "resize_mode": ResizeMode, "exif": ExifMode, "decode": Decode, "engine": Engine,
    "channels_last": ChannelsLast,
}  # fmt: skip


def sides(size: Any) -> tuple[int, int] | None:
    """`224` or `(height, width)`, in pixels, as the latter; None stays so. Raises `UsageError`."""
    pair = size if isinstance(size, tuple | list) else (size, size)
    if size is None:
        return None
    if len(pair) != 2 or not all(isinstance(side, Integral) for side in pair):
        raise UsageError(f"--size cannot be {size!r}", "whole pixels: 224, or (height, width)")
    return int(pair[0]), int(pair[1])


def whole(name: str, value: Any) -> int:
    """A whole number above zero, of whatever kind, as Python's own. Raises `UsageError`."""
    if not (isinstance(value, Integral) and int(value) > 0):
        raise _no_number(name, value, "whole number")
    return int(value)


def number(name: str, value: Any) -> float:
    """As `whole`, but for the fraction."""
    try:
        found = float(value) if isinstance(value, Real) else 0.0
    except OverflowError:
        found = math.inf
    if not found > 0:
        raise _no_number(name, value, "number")
    return found


def _no_number(name: str, value: Any, kind: str) -> UsageError:
    hint = f"a {kind} above 0; leave it out for the default"
    return UsageError(f"--{name.replace('_', '-')} cannot be {value!r}", hint)


def batch_size_of(value: Any, *, deterministic: bool) -> BatchSize | None:
    """A number above zero, of whatever kind, as Python's own; or `auto` where that may be. Raises `UsageError`."""
    if value is None:
        return None
    auto = isinstance(value, str) and value == "auto"
    if auto and deterministic:
        raise UsageError(
            "--deterministic does not go with --batch-size auto, which may measure another size each time",
            "give --batch-size a number, or leave it out",
        )
    if auto:
        return "auto"
    if not (isinstance(value, Integral) and int(value) > 0):
        raise UsageError(f"--batch-size cannot be {value!r}", "a whole number from 1 on, or auto, which measures")
    return int(value)


def check_words(options: Mapping[str, Any]) -> None:
    """Raises `UsageError` unless each value is one of its option's words."""
    for name, value in options.items():
        if name in _WORDS:
            one_of(f"--{name.replace('_', '-')}", value, _WORDS[name])
