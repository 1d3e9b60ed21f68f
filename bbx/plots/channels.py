"""Which channels to draw: the little language of `--channels`."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bbx.errors import UsageError

_FORMS = "write indices (3,17), ranges (0:64, ::4), top:16, top:16:max, top:16:std, or all"


def parse_channels(text: str, maps: NDArray[Any]) -> list[int]:
    """The channels of `maps` `(c, …)` that `text` names, in the order named, each once.

    Comma-separated: an index (`5`, `-1` the last), a Python range (`0:64`, `::4`; it may end beyond the last channel,
    so that one range serves all stages), `top:N[:mean|max|std]` (strongest first, by finite values only), or `all`.

    Raises `UsageError` for anything else, for an index out of range, and where nothing is left.
    """
    chosen: dict[int, None] = {}
    for word in text.split(","):
        chosen.update(dict.fromkeys(_channels(word.strip(), maps)))
    if not chosen:
        raise UsageError(f"{text!r} selects no channel", f"channels are {_span(len(maps))}; {_FORMS}")
    return list(chosen)


def _channels(word: str, maps: NDArray[Any]) -> list[int]:
    count = len(maps)
    if word in ("", "all"):
        return list(range(count)) if word else []
    if re.fullmatch(r"-?\d{1,9}", word):
        if not -count <= int(word) < count:
            raise UsageError(f"there is no channel {word}", f"channels are {_span(count)}")
        return [int(word) % count]
    if match := re.fullmatch(r"(-?\d{1,9})?:(-?\d{1,9})?(?::(-?[1-9]\d{0,8})?)?", word):
        return list(range(count))[slice(*(int(part) if part else None for part in match.groups()))]
    if match := re.fullmatch(r"top:([1-9]\d{0,8})(?::(mean|max|std))?", word):
        return strongest(maps, match[2] or "mean")[: int(match[1])]
    raise UsageError(f"{word!r} is no selection of channels", f"{_FORMS}; channels are {_span(count)}")


def strongest(maps: NDArray[Any], by: str) -> list[int]:
    """Every channel of `maps` `(c, …)`, strongest first by its finite values' `mean`, `max` or `std`; ties by index."""
    scores = np.array([_score(channel, by) for channel in maps])
    return [int(channel) for channel in np.argsort(-scores, kind="stable")]


def _score(channel: NDArray[Any], by: str) -> float:
    values = np.asarray(channel, np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return -np.inf
    # Scaled first, for the square of a large finite number is infinite.
    scale = float(np.abs(values).max()) or 1.0
    return scale * float(getattr(np, by)(values / scale))


def describe_channels(chosen: list[int], count: int, rule: str) -> str:
    """`chosen` of `count` channels in words: what is drawn, and so what is not."""
    if len(chosen) == count and chosen == sorted(chosen):
        return "its only channel" if count == 1 else f"all {count} channels"
    if chosen == list(range(chosen[0], chosen[-1] + 1)):
        return f"channels {_span(len(chosen), chosen[0])} of {count}"
    return f"{len(chosen)} of {count} channels ({rule})"


def describe_hidden(maps: NDArray[Any], chosen: list[int]) -> str:
    """A warning where channels of `maps` `(c, h, w)` that are not `chosen` hold NaN or inf, else empty."""
    odd = ~np.isfinite(maps).all((1, 2))
    odd[chosen] = False
    return f"NaN or inf in {odd.sum()} channels not shown" if odd.any() else ""


def _span(count: int, first: int = 0) -> str:
    return f"{first}–{first + count - 1}" if count > 1 else str(first) if count else "none"


def chosen_values(maps: NDArray[Any], channels: str, dimensions: int) -> tuple[NDArray[np.float64], list[int]]:
    """The rows of `maps` `(c, …)` that `channels` names, as float64, in which halves and integers do not overflow."""
    if np.ndim(maps) != dimensions or not np.size(maps):
        raise UsageError(f"nothing to draw in an array of shape {np.shape(maps)}", "a feature map is (c, h, w)")
    chosen = parse_channels(channels, maps)
    return np.asarray(maps[chosen], np.float64), chosen
