"""Channel grids: one tile per channel of a feature map, and the one matrix that tokens without a grid make."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bbx.plots.bars import vector_bars
from bbx.plots.channels import chosen_values, describe_channels, describe_hidden
from bbx.plots.page import Title, draw_tiles, foot_room, footer, framed_page, gaps
from bbx.plots.tiles import Pixels, Tiles, columns_for, paint

DEFAULT_CHANNELS = 64
_WIDTH, _HEIGHT = 1120, 560  # pixels: the mosaic's usual width, a tile's largest height
_LARGEST_MAP = 448  # cells a side that a tile can show one to one


def channel_grid(
    maps: NDArray[Any],
    *,
    image: str = "",
    stage: str = "",
    stride: float = 0.0,
    channels: str | None = None,
    scale: str = "shared",
    cmap: str | None = None,
    overlay: NDArray[np.uint8] | None = None,
) -> Figure:
    """One tile per channel of `maps` `(c, h, w)`; a vector `(c,)` and tokens `(t, d)` go to their own plots.

    `image` (its key), `stage` and `stride` (input pixels per cell) are facts for the title. `channels` is read by
    `parse_channels`; None means the first 64. `scale`: `shared`, one scale for all tiles, so that tiles compare, or
    `channel`, each tile from its own minimum to maximum, so that faint patterns show. `cmap` None: see `tiles`.
    `overlay` `(H, W, 3)`: the picture as the network saw it, to draw each channel on as heat.

    Raises `UsageError` for an unknown channel, scale or colour map, and for maps without a cell.
    """
    maps = np.asarray(maps)
    if np.ndim(maps) == 1:
        return vector_bars(maps, image=image, stage=stage, channels=channels, cmap=cmap)
    if np.ndim(maps) == 2:
        return token_matrix(maps, image=image, stage=stage, channels=channels, scale=scale, cmap=cmap)
    values, chosen = chosen_values(maps, channels or f":{DEFAULT_CHANNELS}", dimensions=3)
    facts = [
        " × ".join(map(str, np.shape(maps))),
        f"stride {stride:g}" if stride else "",
        describe_channels(chosen, len(maps), channels or ""),
        "over the picture" if overlay is not None else "",
        describe_hidden(maps, chosen),
    ]
    tiles = Tiles.of(values, [str(channel) for channel in chosen], scale, cmap)
    return _grid(tiles, Title(image, stage, facts), overlay)


def token_matrix(
    tokens: NDArray[Any],
    *,
    image: str = "",
    stage: str = "",
    channels: str | None = None,
    scale: str = "shared",
    cmap: str | None = None,
) -> Figure:
    """Tokens `(t, d)` that form no grid, as one matrix: a row per token, a column per feature chosen by `channels`."""
    values, chosen = chosen_values(np.transpose(tokens), channels or "all", dimensions=2)
    facts = [
        f"{tokens.shape[0]} tokens × {tokens.shape[1]} features",
        describe_channels(chosen, tokens.shape[1], channels or "").replace("channel", "feature"),
    ]
    return _grid(Tiles.of(values.T[None], ["tokens ↓   features →"], scale, cmap), Title(image, stage, facts), None)


def _grid(tiles: Tiles, title: Title, overlay: Pixels | None) -> Figure:
    """The page: header, mosaic, colour bar, legend. Denser where the mosaic is larger, so that texts keep in step."""
    shape = tiles.values.shape[1:]
    step = -(-max(shape) // _LARGEST_MAP)
    if step > 1:
        title.facts.append(f"one cell in {step} drawn, each way")
    columns = columns_for(len(tiles.values), shape)
    size = _tile_size(shape, columns, step)
    dpi = 144 * max(1.0, columns * size[1] / _WIDTH)
    points = min(6.0, size[1] * 0.95 / (0.64 * max(map(len, tiles.captions)) * dpi / 72))
    above, beside = gaps(points, dpi / 72)
    width = columns * (size[1] + beside) - beside
    height = -(-len(tiles.values) // columns) * (size[0] + above)
    page, top = framed_page((height, width), title, dpi=dpi, foot=foot_room(tiles))
    pixels = paint(tiles, size, overlay)
    draw_tiles(page, tiles, pixels, columns=columns, points=points, at=(round((page.width - width) / 2), round(top)))
    footer(page, tiles, top + height + 9 * page.pt, "" if overlay is None else " · stronger = more opaque")
    return page.figure


def _tile_size(shape: tuple[int, int], columns: int, step: int) -> tuple[int, int]:
    """Pixels (height, width) of a tile: whole pixels per cell, so that no cell is drawn larger than another."""
    height, width = (-(-side // step) for side in shape)
    zoom = max(1, round(min(max(_WIDTH / columns, 40) / width, _HEIGHT / height)))
    return height * zoom, width * zoom
