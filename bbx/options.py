"""What `extract` is told, checked before anything is loaded: numbers of any kind as Python's own, words as they are."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from bbx.errors import UsageError
from bbx.spec import (
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
_WHOLE = ("workers", "max_pixels")


def sides(size: Any) -> tuple[int, int] | None:
    """`224` or `(height, width)`, in pixels, as the latter; None stays so. Raises `UsageError`."""
    pair = size if isinstance(size, tuple | list) else (size, size)
    if size is None:
        return None
    if len(pair) != 2 or not all(isinstance(side, Integral) for side in pair):
        raise UsageError(f"--size cannot be {size!r}", "whole pixels: 224, or (height, width)")
    return int(pair[0]), int(pair[1])


def check_numbers(**options: float | None) -> None:
    """Raises `UsageError` for what is no number above zero."""
    for name, value in options.items():
        kind = Integral if name in _WHOLE else Real
        if value is not None and not (isinstance(value, kind) and value > 0):
            hint = f"a {'whole ' * (kind is Integral)}number above 0; leave it out for the default"
            raise UsageError(f"--{name.replace('_', '-')} cannot be {value!r}", hint)


def check_batch_size(value: Any, *, deterministic: bool) -> None:
    """Raises `UsageError` unless it is a number above zero, or `auto` where that may be."""
    auto = isinstance(value, str) and value == "auto"
    if auto and deterministic:
        raise UsageError(
            "--deterministic does not go with --batch-size auto, which may measure another size each time",
            "give --batch-size a number, or leave it out",
        )
    if value is not None and not auto and not (isinstance(value, Integral) and int(value) > 0):
        raise UsageError(f"--batch-size cannot be {value!r}", "a whole number from 1 on, or auto, which measures")


def check_words(options: Mapping[str, Any]) -> None:
    """Raises `UsageError` unless each value is one of its option's words."""
    for name, value in options.items():
        if name in _WORDS:
            one_of(f"--{name.replace('_', '-')}", value, _WORDS[name])
