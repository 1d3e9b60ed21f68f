"""Figures together: as the pages of one PDF, or as pixels for whoever has a window."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bbx.errors import WriteError


def save_pages(figures: Iterable[Figure], path: str | Path) -> int:
    """Writes each figure as a page of the PDF at `path`, undated; gives their number. Raises `WriteError`."""
    from matplotlib.backends.backend_pdf import PdfPages  # brings fontTools, a quarter of a second, for PDF alone

    count = 0
    try:
        with PdfPages(path, metadata={"CreationDate": None}) as pages:
            for figure in figures:
                pages.savefig(figure)
                count += 1
    except (OSError, zlib.error) as error:  # a full disk surfaces as either, by what was being flushed
        Path(path).unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise WriteError(f"cannot write {path}: {reason}", "choose another place with -o") from None
    return count


def pixels(figure: Figure) -> NDArray[Any]:
    """The figure drawn: `(height, width, 4)` uint8 RGBA."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())
