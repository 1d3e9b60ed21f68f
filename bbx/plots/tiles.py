"""Feature maps → coloured tiles → one mosaic: plain arrays, so that what is drawn can be tested without a picture.

One rule of colour: zero is dark and strong is bright. Values that are never negative take `magma`, from 0 on unless all
lie far above it; others take a diverging map with a dark middle, centred on 0. The shared range ends at the 0.5 and
99.5 percentiles (99 % of |values| where it is centred): trained networks have single cells at twice the range of all
others, which would dim every tile. `shared` is the default, because per-channel scales turn the padding's faint border
of a nearly dead channel into its brightest feature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Colormap
from numpy.typing import NDArray

from bbx.errors import UsageError, nearest
from bbx.spec import Scale

Floats = NDArray[np.float64]
Pixels = NDArray[np.uint8]

# Neon, since no perceptually uniform colour map passes there.
NAN, POSINF, NEGINF = (255, 0, 255), (64, 255, 0), (0, 229, 255)
PAPER, INK = (236, 237, 240), (206, 209, 215)
_DIVERGING = {"berlin", "managua", "vanimo", "RdBu", "RdGy", "RdYlBu", "RdYlGn", "Spectral"}
_DIVERGING |= {"coolwarm", "seismic", "bwr", "PiYG", "PRGn", "BrBG", "PuOr"}


@dataclass(frozen=True)
class Census:
    """What is unusual in maps `(c, h, w)`: `dead` (all zero) and `constant` per channel `(c,)`, and cells counted."""

    dead: NDArray[np.bool_]
    constant: NDArray[np.bool_]
    nan: int
    posinf: int
    neginf: int

    @classmethod
    def total(cls, parts: list[Census]) -> Census:
        """Several maps' censuses as one."""
        dead, constant = (np.concatenate([getattr(part, name) for part in parts]) for name in ("dead", "constant"))
        return cls(
            dead, constant, *(sum(getattr(part, name) for part in parts) for name in ("nan", "posinf", "neginf"))
        )


def census(maps: Floats) -> Census:
    """Count it. A channel of one cell is neither dead nor constant."""
    flat = maps.reshape(len(maps), -1)
    same = (flat == flat[:, :1]).all(1) & np.isfinite(flat[:, 0]) & (flat.shape[1] > 1)
    nan, posinf, neginf = (int(mask.sum()) for mask in (np.isnan(maps), np.isposinf(maps), np.isneginf(maps)))
    return Census(same & (flat[:, 0] == 0), same & (flat[:, 0] != 0), nan, posinf, neginf)


@dataclass(frozen=True)
class Colours:
    """How values become colours: `low` and `high` `(c, 1, 1)` are the ends, `clipped` the fractions below and above."""

    cmap: Colormap
    scale: Scale
    low: Floats
    high: Floats
    centred: bool = False
    clipped: tuple[float, float] = (0.0, 0.0)

    def strengths(self, maps: Floats) -> Floats:
        """`maps` `(c, h, w)` on 0..1, low to high; 0 where not finite."""
        span = self.high - self.low
        values = np.where(np.isfinite(maps), maps, self.low)
        return np.clip((values - self.low) / np.where(span > 0, span, 1.0), 0.0, 1.0)

    def ends(self) -> tuple[str, str]:
        """The two ends in words."""
        if self.scale == "channel":
            return "min", "max"
        below, above = ("≤ " if self.clipped[0] else ""), ("≥ " if self.clipped[1] else "")
        low, high = (f"{float(end[0, 0, 0]):.3g}".replace("-", "\u2212") for end in (self.low, self.high))
        return below + low, above + high


def choose_colours(maps: Floats, scale: str, cmap: str | None) -> Colours:
    """Colours for `maps` `(c, h, w)`; raises `UsageError` for an unknown `scale` or `cmap`."""
    if scale not in get_args(Scale):
        raise UsageError(f"{scale!r} is no scale", "valid: " + ", ".join(get_args(Scale)))
    finite = np.isfinite(maps)
    if scale == "channel":
        low = np.where(finite, maps, np.inf).min((1, 2), keepdims=True)
        high = np.where(finite, maps, -np.inf).max((1, 2), keepdims=True)
        some = np.isfinite(low)
        return Colours(find_cmap(cmap or "magma"), "channel", np.where(some, low, 0.0), np.where(some, high, 1.0))
    values = maps[finite]
    signed = bool(values.size and values.min() < 0)
    name = cmap or ("magma" if not signed else "berlin" if "berlin" in colormaps else "RdBu_r")
    centred = signed and name.removesuffix("_r") in _DIVERGING
    low_end, high_end = shared_range(values, centred)
    count = max(1, values.size)
    clipped = float((values < low_end).sum() / count), float((values > high_end).sum() / count)
    low, high = (np.full((len(maps), 1, 1), end) for end in (low_end, high_end))
    return Colours(find_cmap(name), "shared", low, high, centred, clipped)


def shared_range(values: Floats, centred: bool) -> tuple[float, float]:
    """The ends of one scale for finite `values` `(n,)`, as the module's docstring states them."""
    if not values.size:
        return 0.0, 1.0
    if centred:
        size = np.abs(values)
        end = float(np.percentile(size, 99)) or float(size.max())
        return -end, end
    low, high = (float(end) for end in np.percentile(values, (0.5, 99.5)))
    if low < high:
        return (0.0 if float(values.min()) >= 0 and low < high / 2 else low), high
    # So sparse that the percentiles meet: the exact range, else all that there is to see would be clipped.
    return float(values.min()), float(values.max())


def find_cmap(name: str) -> Colormap:
    """Matplotlib's colour map of that name; `UsageError` with the nearest names where there is none."""
    if name not in colormaps:
        close = nearest(name, colormaps) or ["magma", "viridis", "berlin"]
        raise UsageError(f"no colour map {name!r}", f"did you mean {', '.join(close)}? (any name of matplotlib's)")
    return colormaps[name]


@dataclass(frozen=True)
class Tiles:
    """Channels ready to draw: `values` `(n, h, w)`, a caption for each, their colours and what is unusual in them."""

    values: Floats
    captions: list[str]
    colours: Colours
    found: Census

    @classmethod
    def of(cls, values: Floats, captions: list[str], scale: str, cmap: str | None) -> Tiles:
        """The tiles of `values`, coloured by `choose_colours`."""
        return cls(values, captions, choose_colours(values, scale, cmap), census(values))

    def reason(self, number: int) -> str:
        """Why tile `number` has nothing to show, empty where it has."""
        if self.found.dead[number]:
            return "dead"
        return f"const\n{self.values[number].flat[0]:.4g}" if self.found.constant[number] else ""


def checked_picture(picture: NDArray[Any]) -> Pixels:
    """`picture` without its alpha, `(h, w, 3)`; raises `UsageError` for anything but 8-bit colour."""
    if picture.ndim != 3 or picture.shape[2] not in (3, 4) or picture.dtype != np.uint8 or not picture.size:
        raise UsageError(f"a picture of shape {picture.shape} and type {picture.dtype}", "give (h, w, 3) of uint8")
    return np.asarray(picture[..., :3], np.uint8)


def paint(tiles: Tiles, size: tuple[int, int], picture: Pixels | None = None) -> Pixels:
    """One picture per tile, `(n, *size, 3)`: the maps enlarged without smoothing, what is unusual marked.

    Over a `picture` `(H, W, 3)` the maps are smoothed, and opaque where they are strong.
    """
    maps, colours, found = tiles.values, tiles.colours, tiles.found
    rows, columns = (_nearest_index(old, new) for old, new in zip(maps.shape[1:], size, strict=True))
    marks = _marks(maps)[:, rows][:, :, columns]
    heat = colours.strengths(maps)
    if picture is None:
        painted = colours.cmap(heat, bytes=True)[..., :3][:, rows][:, :, columns]
    else:
        heat = enlarge(heat, size)
        opacity = (np.abs(2 * heat - 1) if colours.centred else heat)[..., None]
        grey = enlarge((checked_picture(picture) @ np.array([0.299, 0.587, 0.114]))[None], size)[..., None]
        # A colour map that is dark at zero carries part of its strength already: weighed twice, weak cells look muddy.
        dark = max(colours.cmap(0.5 if colours.centred else 0.0)[:3]) < 0.2
        heat_part = colours.cmap(heat, bytes=True)[..., :3] * (np.sqrt(opacity) if dark else opacity)
        painted = (0.85 * grey * (1 - opacity) + heat_part).clip(0, 255).astype(np.uint8)
    for code, colour in enumerate((NAN, POSINF, NEGINF), 1):
        painted[marks == code] = colour
    painted[found.dead | found.constant] = hatching(size)
    return np.asarray(painted, np.uint8)


def hatching(size: tuple[int, int]) -> Pixels:
    """A tile `(*size, 3)` of grey diagonals: nothing to see here."""
    y, x = np.indices(size)
    period = max(6, max(size) // 12)
    lines = (x + y) % period < max(1, period // 5)
    return np.where(lines[..., None], np.array(INK, np.uint8), np.array(PAPER, np.uint8))


def _marks(maps: Floats) -> NDArray[np.uint8]:
    return np.isnan(maps) + 2 * np.isposinf(maps).astype(np.uint8) + 3 * np.isneginf(maps).astype(np.uint8)


def _nearest_index(old: int, new: int) -> NDArray[np.intp]:
    return (np.arange(new) * 2 + 1) * old // (2 * new)


def enlarge(planes: NDArray[Any], size: tuple[int, int]) -> Floats:
    """`planes` `(c, h, w)` → `(c, *size)`: bilinear, cell centres aligned as a network's cells lie on its input."""
    out = np.asarray(planes, np.float64)
    for axis, new in ((1, size[0]), (2, size[1])):
        old = out.shape[axis]
        place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        below = np.floor(place).astype(int)
        share = (place - below).reshape((-1, 1) if axis == 1 else (-1,))
        above = np.minimum(below + 1, old - 1)
        out = out.take(below, axis) * (1 - share) + out.take(above, axis) * share
    return out


def columns_for(count: int, shape: tuple[int, int]) -> int:
    """How many columns make `count` tiles of `shape` (h, w) a page of about 5:4 with a full last row."""

    def badness(columns: int) -> float:
        rows = -(-count // columns)
        aspect = columns * shape[1] / (rows * shape[0])
        return abs(math.log(aspect / 1.25)) + 6 * (rows * columns - count) / count

    return min(range(1, count + 1), key=badness)


def mosaic(tiles: Pixels, columns: int, gap: tuple[int, int]) -> tuple[Pixels, NDArray[np.intp]]:
    """`tiles` `(n, h, w, 3)` on one white picture, and the `(x, y)` pixel of each tile's corner `(n, 2)`.

    `gap` (above, right) is what each tile keeps free, in pixels; the last column's is cut off.
    """
    count, height, width, _ = tiles.shape
    rows = -(-count // columns)
    board = np.full((rows, height + gap[0], columns, width + gap[1], 3), 255, np.uint8)
    row, column = np.divmod(np.arange(count), columns)
    board[row, gap[0] :, column, :width] = tiles
    picture = board.reshape(rows * (height + gap[0]), columns * (width + gap[1]), 3)
    corners = np.stack([column * (width + gap[1]), row * (height + gap[0]) + gap[0]], 1)
    return picture[:, : columns * (width + gap[1]) - gap[1]], corners
