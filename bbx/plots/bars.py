"""Bars: a pooled stage, one number per channel."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bbx.plots.channels import chosen_values, describe_channels
from bbx.plots.page import GREY, Title, foot_room, footer, framed_page
from bbx.plots.tiles import NAN, NEGINF, POSINF, Floats, Tiles, paint

_STEPS = [step * 10**power for power in range(12) for step in (1, 2, 5)]


def vector_bars(
    vector: NDArray[Any], *, image: str = "", stage: str = "", channels: str | None = None, cmap: str | None = None
) -> Figure:
    """The values of a pooled stage `(c,)` as bars in channel order, and as a strip of colour below them.

    `channels` None means all of them. Raises `UsageError` like `channel_grid`.
    """
    values, chosen = chosen_values(vector, channels or "all", dimensions=1)
    tiles = Tiles.of(values[:, None, None], [""] * len(values), "shared", cmap)
    facts = [f"vector of {len(vector)}", describe_channels(chosen, len(vector), channels or "")]
    page, top = framed_page((300, 1120), Title(image, stage, facts), dpi=144, foot=foot_room(tiles))
    left, width = 36 * page.pt, page.width - 46 * page.pt
    _bars(page.axes_at(left, top, width, 250), values, chosen)
    strip = paint(tiles, (1, 1))[:, 0, 0][None]
    page.image(strip, left, top + 250 + 16 * page.pt, (width, 9 * page.pt))
    footer(page, tiles, top + 300 + 9 * page.pt)
    return page.figure


def _bars(axes: Axes, values: Floats, chosen: list[int]) -> None:
    count = len(values)
    axes.stairs(np.where(np.isfinite(values), values, 0.0), np.arange(count + 1) - 0.5, fill=True, color="#3b528b")
    axes.axhline(0, color=GREY, linewidth=0.5)
    marks = (np.isnan(values), NAN), (np.isposinf(values), POSINF), (np.isneginf(values), NEGINF)
    for mask, colour in marks:
        where = np.flatnonzero(mask)
        axes.vlines(where, 0, 1, transform=axes.get_xaxis_transform(), color=np.array(colour) / 255, linewidth=1)
    step = next(step for step in _STEPS if step * 24 >= count)
    ticks = range(0, count, step)
    axes.set_xticks(ticks, labels=[str(chosen[tick]) for tick in ticks])
    axes.set_xlim(-0.5, count - 0.5)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set(color=GREY, linewidth=0.5)
    axes.tick_params(labelsize=6.5, length=2, width=0.5, color=GREY, labelcolor=GREY)
