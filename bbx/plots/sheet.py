"""The contact sheet: the picture as the network saw it, and each stage's strongest channels beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bbx.errors import UsageError
from bbx.plots.channels import chosen_values, describe_hidden
from bbx.plots.page import (
    GREY,
    LEGEND_LINE,
    MARGIN,
    Page,
    Title,
    draw_tiles,
    framed_page,
    gaps,
    legend,
    tidy,
    unusual,
)
from bbx.plots.tiles import Census, Pixels, Tiles, checked_picture, enlarge, paint

_ROWS = 6  # tiles in a column at most
_TILE = 224  # pixels a side, about
_POINTS, _HEAD = 6.0, 22.0  # points: a caption's size, the room for a column's name and shape


class _Column(NamedTuple):
    """One stage of the sheet: a name, a map's shape `(c, h, w)`, and the chosen channels as tiles."""

    name: str
    shape: tuple[int, ...]
    tiles: Tiles
    cut: bool
    hidden: str


def contact_sheet(
    stages: Mapping[str, NDArray[Any]],
    *,
    picture: NDArray[np.uint8] | None,
    image: str = "",
    channels: str | None = None,
    scale: str = "shared",
    cmap: str | None = None,
) -> Figure:
    """The picture as the network saw it, `(H, W, 3)`, and beside it a column per stage with its strongest channels.

    `stages`: name → `(c, h, w)`, in the order to draw. All tiles have one size, so that the eye compares resolutions.
    `channels` None means the three of highest standard deviation, strongest first; at most six are drawn. Each stage
    has its own scale, printed under its column. Vectors and tokens are left out, and the subtitle says so.

    Raises `UsageError` like `channel_grid`, and where no stage is a feature map.
    """
    grids = {name: np.asarray(maps) for name, maps in stages.items() if np.ndim(maps) == 3}
    if not grids:
        raise UsageError("no stage here is a feature map", "a contact sheet needs stages of shape (c, h, w)")
    columns = [_column(name, maps, channels or "top:3:std", (scale, cmap)) for name, maps in grids.items()]
    size, thinned = _tile_size(columns)
    flat = [name for name in stages if name not in grids]
    facts = [
        f"input {picture.shape[0]} × {picture.shape[1]}" if picture is not None else "",
        f"of each stage: {channels}" if channels else "the 3 channels of highest standard deviation per stage",
        f"at most {_ROWS} a stage" if any(column.cut for column in columns) else "",
        "each tile on its own scale" if scale == "channel" else "each stage on its own scale",
        f"large maps thinned to {size[0]} × {size[1]} cells" if thinned else "",
        f"left out, having no grid: {', '.join(flat)}" if flat else "",
    ]
    facts += [f"{column.name}: {column.hidden}" for column in columns if column.hidden]
    return _draw(columns, size, picture, Title(image, "contact sheet", facts))


def _column(name: str, maps: NDArray[Any], channels: str, look: tuple[str, str | None]) -> _Column:
    values, chosen = chosen_values(maps, channels, dimensions=3)
    tiles = Tiles.of(values[:_ROWS], [str(channel) for channel in chosen[:_ROWS]], *look)
    return _Column(name, maps.shape, tiles, len(chosen) > _ROWS, describe_hidden(maps, chosen[:_ROWS]))


def _tile_size(columns: list[_Column]) -> tuple[tuple[int, int], bool]:
    """The (height, width) in pixels of every tile, a multiple of the finest map's, and whether that was thinned."""
    height, width = max((column.shape[1:] for column in columns), key=max)
    longest = max(height, width)
    if longest > 2 * _TILE:
        return (max(1, height * _TILE // longest), max(1, width * _TILE // longest)), True
    zoom = max(1, round(_TILE / longest))
    return (height * zoom, width * zoom), False


def _draw(columns: list[_Column], size: tuple[int, int], picture: Pixels | None, title: Title) -> Figure:
    """The page: the picture two tiles wide with the legend under it, then the columns."""
    pt = 2 * max(1.0, size[1] * (len(columns) + 2) / 1120)
    above, beside = gaps(_POINTS, pt)
    beside *= 2
    head, margin = round(_HEAD * pt), round(MARGIN * pt)
    large = 2 * size[1] + beside
    tall = 0 if picture is None else max(1, round(large * picture.shape[0] / picture.shape[1])) + above
    entries = unusual(Census.total([column.tiles.found for column in columns]))
    rows = max(len(column.tiles.values) for column in columns)
    pictured = large + 2 * beside if picture is not None or entries else 0
    height = max(head + rows * (size[0] + above), head + tall + above + len(entries) * LEGEND_LINE * pt)
    width = pictured + len(columns) * (size[1] + beside) - beside
    page, top = framed_page((height, width), title, dpi=72 * pt, foot=26)
    if picture is not None:
        _heading(page, (margin, top), "input", "as the network saw it")
        planes = enlarge(np.moveaxis(checked_picture(picture), -1, 0), (tall - above, large))
        page.image(np.moveaxis(planes, 0, -1).astype(np.uint8), margin, round(top) + head + above)
    legend(page, entries, margin, top + head + tall + above)
    for number, column in enumerate(columns):
        _draw_column(page, column, (margin + pictured + number * (size[1] + beside), round(top)), size)
    return page.figure


def _heading(page: Page, at: tuple[float, float], words: str, fact: str) -> None:
    page.text((at[0], at[1] + 8 * page.pt), words, 8, bold=True)
    page.text((at[0], at[1] + 16.5 * page.pt), fact, 6.5, GREY)


def _draw_column(page: Page, column: _Column, at: tuple[int, int], size: tuple[int, int]) -> None:
    """A stage's name and shape, its tiles, and under them its scale as a thin bar with its ends."""
    room = size[1] / page.pt
    _heading(page, at, tidy(column.name, int(room / 5.5)), " × ".join(map(str, column.shape)))
    tiles, x, y = column.tiles, at[0], at[1] + round(_HEAD * page.pt)
    draw_tiles(page, tiles, paint(tiles, size), columns=1, points=_POINTS, at=(x, y))
    below = y + len(tiles.values) * (size[0] + gaps(_POINTS, page.pt)[0]) + 4 * page.pt
    ramp = tiles.colours.cmap(np.linspace(0, 1, size[1]), bytes=True)[None, :, :3]
    page.image(ramp, x, below, (size[1], 4 * page.pt))
    low, high = tiles.colours.ends()
    page.text((x, below + 11 * page.pt), low, 6, GREY)
    page.text((x + size[1], below + 11 * page.pt), high, 6, GREY, ha="right")
