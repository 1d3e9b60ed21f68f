"""Pictures of feature maps: arrays in, matplotlib Figure out, nothing shown and no global state."""

from collections.abc import Callable

from matplotlib.figure import Figure

from bbx.plots.bars import vector_bars
from bbx.plots.channels import parse_channels
from bbx.plots.grid import channel_grid, token_matrix
from bbx.plots.page import save
from bbx.plots.pages import pixels, save_pages
from bbx.plots.sheet import contact_sheet

PLOTS: dict[str, Callable[..., Figure]] = {
    "grid": channel_grid,
    "sheet": contact_sheet,
    "tokens": token_matrix,
    "vector": vector_bars,
}

__all__ = [
    "PLOTS",
    "channel_grid",
    "contact_sheet",
    "parse_channels",
    "pixels",
    "save",
    "save_pages",
    "token_matrix",
    "vector_bars",
]
