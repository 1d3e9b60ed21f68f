"""The page around the tiles: a figure measured in pixels, its texts, colour bars and legend, and saving it.

Texts come from file names, which anyone may have chosen: they are never read as mathtext or TeX.
"""

from __future__ import annotations

import unicodedata
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as MplPath
from matplotlib.textpath import text_to_path
from numpy.typing import NDArray

from bbx.errors import UsageError, WriteError
from bbx.plots.tiles import NAN, NEGINF, POSINF, Census, Colours, Pixels, Tiles, hatching, mosaic

BLACK, GREY, ALARM = "#15181d", "#5b626c", "#c0008f"
LEGEND_LINE = 11.0  # points
MARGIN = 10.0  # points
NARROWEST = 560  # pixels of content at 144 dpi, so that a title has room
_FORMATS: dict[str, dict[str, Any]] = {
    # Level 3 takes half the time of the default and a twentieth more space.
    ".png": {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": 3}},
    ".pdf": {"metadata": {"CreationDate": None}},
    ".svg": {"metadata": {"Date": None}},
}
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_WIDE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Hiragino Sans", "PingFang SC", "Microsoft YaHei", "Meiryo")


class Page:
    """A figure whose one full-size axes counts in pixels from the top left; `pt` is pixels per typographic point."""

    def __init__(self, width: float, height: float, *, dpi: float = 144.0) -> None:
        self.width, self.height, self.pt = width, height, dpi / 72
        # The hair more keeps the renderer's rounding down from losing a pixel.
        self.figure = Figure(figsize=((width + 0.01) / dpi, (height + 0.01) / dpi), dpi=dpi, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self._frame()

    def _frame(self) -> None:
        self.axes.set(xlim=(0, self.width), ylim=(self.height, 0), aspect="auto")

    def image(self, pixels: Pixels, x: float, y: float, size: tuple[float, float] | None = None) -> None:
        """Draw `pixels` `(h, w, 3)`, one to one unless `size` (width, height) says otherwise."""
        width, height = size or (pixels.shape[1], pixels.shape[0])
        # With an alpha channel matplotlib takes a path that is six times as fast.
        pixels = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
        self.axes.imshow(pixels, extent=(x, x + width, y + height, y), interpolation="nearest")
        self._frame()

    def text(
        self,
        place: tuple[float, float],
        words: str,
        points: float,
        colour: str = BLACK,
        *,
        ha: Literal["left", "center", "right"] = "left",
        va: Literal["baseline", "center", "center_baseline"] = "baseline",
        bold: bool = False,
    ) -> None:
        """Literal `words` at a pixel, `points` large; alignment in matplotlib's words."""
        made = self.axes.text(*place, words, color=colour, ha=ha, va=va, parse_math=False, usetex=False)
        made.set(fontsize=points, fontweight="bold" if bold else "normal")
        if not words.isascii():
            installed = {font.name for font in font_manager.fontManager.ttflist}
            made.set_fontfamily(["DejaVu Sans", *(name for name in _WIDE_FONTS if name in installed)])

    def captions(self, places: NDArray[Any], words: list[str], points: float, colour: str) -> None:
        """Many short `words` at pixels `(n, 2)`, left on the baseline, as one shape: a thousand texts take seconds."""
        if not words:
            return
        font = font_manager.FontProperties(family="DejaVu Sans", size=100)
        signs = set("".join(words))
        glyphs = {sign: text_to_path.get_text_path(font, sign, ismath=False) for sign in signs}
        steps = {sign: text_to_path.get_text_width_height_descent(sign, font, ismath=False)[0] for sign in signs}
        scale = points * self.pt / 100
        vertices: list[NDArray[Any]] = []
        codes: list[int] = []
        for word, (x, y) in zip(words, places, strict=True):
            for sign in word:
                outline, kinds = glyphs[sign]
                vertices.append(np.reshape(outline, (-1, 2)) * (scale, -scale) + (x, y))
                codes.extend(kinds)
                x += steps[sign] * scale
        shape = MplPath(np.concatenate(vertices), codes)
        self.axes.add_artist(PathPatch(shape, facecolor=colour, linewidth=0))

    def axes_at(self, x: float, y: float, width: float, height: float) -> Axes:
        """Another axes whose box is these pixels."""
        box = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)


def tidy(text: str, limit: int) -> str:
    """`text` on one line without control characters, shortened in its middle to `limit` columns (a CJK sign is two)."""
    clean = "".join("\ufffd" if unicodedata.category(sign) in _UNPRINTABLE else sign for sign in text)
    if _columns(clean) <= limit:
        return clean
    keep = len(clean)
    while keep > 2 and _columns(clean[: -(-keep // 2)] + clean[len(clean) - keep // 2 :]) > limit - 1:
        keep -= 1
    return f"{clean[: -(-keep // 2)]}…{clean[len(clean) - keep // 2 :]}"


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text)


def wrapped(facts: list[str], limit: int) -> list[str]:
    """`facts` joined by middle dots into lines of at most about `limit` columns, never broken inside a fact."""
    lines = [""]
    for fact in filter(None, facts):
        joined = f"{lines[-1]}  ·  {fact}" if lines[-1] else fact
        if len(joined) <= limit:
            lines[-1] = joined
        else:
            lines.append(fact)
    return [line for line in lines if line]


def colour_bar(page: Page, colours: Colours, box: tuple[float, float, float, float], label: str) -> None:
    """A horizontal bar in the pixel `box` (x, y, width, height) with its `label` under it."""
    low, high = float(colours.low[0, 0, 0]), float(colours.high[0, 0, 0])
    own = colours.scale == "channel"
    norm = Normalize(0, 1) if own else Normalize(low, high if high > low else low + 1)
    below, above = colours.clipped
    extend = "both" if below and above else "min" if below else "max" if above else "neither"
    axes = page.axes_at(*box)
    bar = page.figure.colorbar(
        ScalarMappable(norm, colours.cmap), cax=axes, orientation="horizontal", extend=extend, extendfrac=0.03
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=6.5, length=2, width=0.5, color=GREY, labelcolor=GREY, pad=2)
    if own:
        bar.set_ticks([0, 1], labels=["min", "max"])
    page.text((box[0], box[1] + box[3] + 18 * page.pt), label, 6.5, GREY)


def unusual(found: Census) -> list[tuple[str, Pixels]]:
    """Words and a swatch for each thing in `found` that there is at all."""
    cells = [("NaN", found.nan, NAN), ("+inf", found.posinf, POSINF), ("\u2212inf", found.neginf, NEGINF)]
    entries = [
        (f"{word}: {_counted(count, 'value')}", np.full((1, 1, 3), sign, np.uint8)) for word, count, sign in cells
    ]
    kinds = [("dead (all 0)", int(found.dead.sum())), ("constant", int(found.constant.sum()))]
    entries += [(f"{word}: {_counted(count, 'channel')}", hatching((18, 18))) for word, count in kinds]
    counts = [count for _, count, _ in cells] + [count for _, count in kinds]
    return [entry for entry, count in zip(entries, counts, strict=True) if count]


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def legend(page: Page, entries: list[tuple[str, Pixels]], x: float, y: float) -> None:
    """`unusual`'s entries as lines downwards from pixel `(x, y)`."""
    for words, swatch in entries:
        page.image(swatch, x, y, (8 * page.pt, 8 * page.pt))
        page.text((x + 12 * page.pt, y + 4 * page.pt), words, 6.5, GREY, va="center_baseline")
        y += LEGEND_LINE * page.pt


class Title(NamedTuple):
    """What stands over a plot: the image's key, the stage, and facts for the lines below."""

    image: str
    stage: str
    facts: list[str]


def framed_page(board: tuple[float, float], title: Title, *, dpi: float, foot: float) -> tuple[Page, float]:
    """A page around a board of `(height, width)` pixels with its header written, and the pixel where the board begins.

    `foot`: room under the board, in points.
    """
    pt = dpi / 72
    width = max(board[1], NARROWEST) + 2 * MARGIN * pt
    lines = wrapped([tidy(fact, 80) for fact in title.facts], int((width / pt - 2 * MARGIN) / (7.5 * 0.56)))
    top = (MARGIN + 17 + 11 * len(lines)) * pt
    page = Page(width, top + board[0] + foot * pt, dpi=dpi)
    room = int((width / pt - 2 * MARGIN) / (11 * 0.66))
    stage = tidy(title.stage, room // 2)
    name = tidy(title.image, room - len(stage) - 3)
    heading = "  ·  ".join(filter(None, (name, stage))) or "feature maps"
    page.text((MARGIN * pt, (MARGIN + 10) * pt), heading, 11, bold=True)
    for number, line in enumerate(lines):
        page.text((MARGIN * pt, (MARGIN + 22 + 11 * number) * pt), line, 7.5, GREY)
    return page, top


def draw_tiles(
    page: Page, tiles: Tiles, pixels: Pixels, *, columns: int, points: float, at: tuple[float, float]
) -> None:
    """A mosaic of painted `pixels` `(n, h, w, 3)` at a pixel, captions of `points` over the tiles, reasons in them."""
    board, corners = mosaic(pixels, columns, gaps(points, page.pt))
    page.image(board, *at)
    height, width = pixels.shape[1:3]
    places = corners + at
    odd = ~np.isfinite(tiles.values).all((1, 2))
    for mask, colour in ((~odd, GREY), (odd, ALARM)):
        picked = np.flatnonzero(mask)
        page.captions(places[picked] + (0, -2.4 * page.pt), [tiles.captions[i] for i in picked], points, colour)
    for i in np.flatnonzero(tiles.found.dead | tiles.found.constant):
        reason = tiles.reason(int(i))
        fits = min(7.0, width * 0.9 / (0.62 * max(map(len, reason.split("\n"))) * page.pt))
        x, y = places[i]
        page.text((x + width / 2, y + height / 2), reason, fits, BLACK, ha="center", va="center")


def gaps(points: float, pt: float) -> tuple[int, int]:
    """Pixels above and beside a tile whose caption is `points` large, at `pt` pixels per point."""
    return round((points + 3) * pt), round(max(1.0, points / 2) * pt)


def footer(page: Page, tiles: Tiles, y: float, note: str = "") -> None:
    """At pixel row `y` the colour bar, saying what its ends mean, and the legend beside it."""
    colours, entries = tiles.colours, unusual(tiles.found)
    margin = MARGIN * page.pt
    width = min((page.width - 2 * margin) * (0.62 if entries else 1.0), 300 * page.pt)
    label = "activation" if 1 in (len(tiles.values), tiles.values[0].size) else "activation, one scale for all tiles"
    if colours.scale == "channel":
        label = "each tile from its own minimum to its own maximum"
    if sum(colours.clipped):
        label += f" · {sum(colours.clipped):.1%} of values lie beyond the ends"
    colour_bar(page, colours, (margin, y, width, 6 * page.pt), label + note)
    legend(page, entries, margin + width + 16 * page.pt, y - 2 * page.pt)


def foot_room(tiles: Tiles) -> float:
    """The points that `footer` takes."""
    return 42 + LEGEND_LINE * max(0, len(unusual(tiles.found)) - 3)


def save(figure: Figure, path: str | Path) -> None:
    """Write `figure` as its suffix says, `.png`, `.pdf` or `.svg`: the same bytes for the same figure, no dates.

    Raises `UsageError` for another suffix and `WriteError` where the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in _FORMATS:
        raise UsageError(f"cannot draw into {path.name!r}", f"the name must end in {', '.join(_FORMATS)}")
    settings: dict[Any, Any] = {
        "svg.hashsalt": "bbx",
        "savefig.bbox": None,
        "savefig.transparent": False,
        "savefig.facecolor": "auto",
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A sign that no installed font has is drawn as an empty box; the picture is still right.
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from", category=UserWarning)
        try:
            figure.savefig(path, format=kind[1:], dpi=figure.dpi, **_FORMATS[kind])
        except OSError as error:
            raise WriteError(f"cannot write {path}: {error.strerror or error}") from error
