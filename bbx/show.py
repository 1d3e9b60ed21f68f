"""What `bbx show` does: a feature file, or an image and a model, drawn as figures on disk."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bbx import plots
from bbx.errors import ImageError, StartError, UsageError
from bbx.pictures import locate
from bbx.spec import Preprocess, Scale
from bbx.stages import select_stages
from bbx.store import FeatureFile, open_finished_or_partial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bbx.backbone import Backbone

# Without --image a file of a million rows is not drawn whole.
DEFAULT_IMAGES = 8


# Stages side by side in one contact sheet; more would be too small to see.
_SHEET_STAGES = 6
# Suffixes that mean a picture, and not a folder's name with a dot in it.
_NOT_DRAWN = (".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".eps", ".ps")


@dataclass(frozen=True)
class Subject:
    """One image with its maps: `maps[stage]` `(c, h, w)`, and `read`, which gives its picture or None."""

    key: str
    row: int
    maps: dict[str, NDArray[Any]]
    strides: dict[str, float]
    read: Callable[[], NDArray[np.uint8] | None]

    @cached_property
    def picture(self) -> NDArray[np.uint8] | None:
        """`(h, w, 3)` uint8 as the network saw it; read when asked for, since a grid alone does not show it."""
        return self.read()


@dataclass(frozen=True)
class Look:
    """How figures are drawn; None leaves it to the plot."""

    channels: str | None = None
    scale: Scale | None = None
    cmap: str | None = None
    overlay: bool = False


def from_file(
    path: str | os.PathLike[str],
    *,
    images: Sequence[str] = (),
    stages: str | Iterable[str | int] = "all",
    root: str | os.PathLike[str] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Iterator[Subject]:
    """The images of a feature file to draw: keys, globs of keys or row numbers, default the first few finished rows.

    `root` is the folder that the keys are relative to, for drawing the pictures themselves. Without it the recorded
    folder is used if it lies in the current folder or beside the file, for paths in a file are not to be trusted.
    `tell` hears what is left out (a picture: once it is asked for). Raises `UsageError` for an unknown key or stage,
    `FileError` for a bad file.
    """
    tell = tell or (lambda _: None)
    if Path(path).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif"):
        raise UsageError(f"{path} looks like an image, not a feature file", "an image needs --model NAME")
    with open_finished_or_partial(path) as file:
        names = select_stages(list(file.stages), stages)
        rows = _rows(file, images, tell)
        find = locate(file, root)
        for row in rows:
            file.check_row(row, names)
            key, maps = file.keys[row], {name: file[name][row] for name in names}
            warn = partial(tell, f"the picture of {key} is not drawn: name its folder with --root")
            read = partial(_picture, find(row), file.run.preprocess, warn if row == rows[0] else None)
            yield Subject(key, row, maps, {name: file.stages[name].stride for name in names}, read)


def from_image(path: str | os.PathLike[str], backbone: Backbone) -> Iterator[Subject]:
    """One image straight through a model, no file between. Raises `StartError` for what is no readable image."""
    from bbx.runner import features

    try:
        picture, maps = features(backbone, path)
    except ImageError as error:
        raise StartError(f"{path}: {error.message}", "name an image, or a feature file without --model") from None
    strides = {stage.name: stage.stride for stage in backbone.stages}
    yield Subject(Path(path).name, 0, maps, strides, lambda: picture)


def draw(subjects: Iterable[Subject], look: Look) -> Iterator[tuple[Subject, str, Figure]]:
    """(subject, what, figure): for each subject one figure per stage, and where they are several a contact sheet."""
    for subject in subjects:
        if look.overlay and subject.picture is None:
            raise StartError(f"there is no picture of {subject.key} to draw on", "name its folder with --root")
        given = _given(image=subject.key, channels=look.channels, scale=look.scale, cmap=look.cmap)
        overlay = subject.picture if look.overlay else None
        for stage, maps in subject.maps.items():
            figure = plots.channel_grid(maps, stage=stage, stride=subject.strides[stage], overlay=overlay, **given)
            yield subject, stage, figure
        grids = [item for item in subject.maps.items() if item[1].ndim == 3]
        if look.overlay and not grids:
            raise UsageError("--overlay draws maps over the picture, and here is none", "leave --overlay out")
        for start in range(0, len(grids) if len(grids) > 1 else 0, _SHEET_STAGES):
            name = f"sheet{start // _SHEET_STAGES + 1}" if len(grids) > _SHEET_STAGES else "sheet"
            some = dict(grids[start : start + _SHEET_STAGES])
            yield subject, name, plots.contact_sheet(some, picture=subject.picture, **given)


def save(figures: Iterable[tuple[Subject, str, Figure]], output: str | None, *, source: str) -> Iterator[Path]:
    """Writes each figure and gives its path.

    `output`: a folder (default: the source's name with `_grids`), a `.pdf` (all figures, a page each), or a `.png` or
    `.svg` name, into which image and stage are put when there is more than one figure.
    """
    target = Path(output or f"{Path(source.removesuffix('.partial')).stem}_grids")
    kind = target.suffix.lower() if output and not target.is_dir() else ""
    if kind == ".pdf":
        _make_folder(target.parent)
        plots.save_pages((figure for _, _, figure in figures), target)
        yield target
        return
    single = kind in (".png", ".svg")
    if kind in _NOT_DRAWN:
        raise UsageError(f"cannot draw into {target.name}", "a name ending in .png, .pdf or .svg, or a folder")
    waiting: tuple[Path, Figure] | None = None
    rows: dict[str, int] = {}
    for number, (subject, what, figure) in enumerate(figures):
        name = _file_name(subject)
        if rows.setdefault(name, subject.row) != subject.row:
            name = f"{name}-{subject.row}"  # cat.jpg and cat.png
        name = f"{name}.{what}"
        path = target.with_name(f"{target.stem}.{name}{target.suffix}") if single else target / f"{name}.png"
        if single and number == 0:
            waiting = (path, figure)  # the plain name, if it stays the only one
            continue
        if waiting:
            yield _saved(*waiting)
            waiting = None
        yield _saved(path, figure)
    if waiting:
        yield _saved(target, waiting[1])


def open_windows(figures: Iterable[tuple[Subject, str, Figure]]) -> None:
    """A window per figure, until they are closed; raises `StartError` where there is no display."""
    from matplotlib import pyplot

    if pyplot.get_backend().lower() == "agg":
        raise StartError("there is no display to open a window on", "leave --window out: files are written instead")
    for _, _, figure in figures:
        # Drawn as pixels: the figure belongs to no window, and moving it into one differs by toolkit.
        shown = pyplot.figure(figsize=figure.get_size_inches(), dpi=figure.dpi)
        shown.figimage(plots.pixels(figure))
    pyplot.show()


def _saved(path: Path, figure: Figure) -> Path:
    _make_folder(path.parent)
    plots.save(figure, path)
    return path


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(f"cannot make {folder}: {error.strerror}", "choose another place with -o") from None


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _rows(file: FeatureFile, images: Sequence[str], tell: Callable[[str], None]) -> list[int]:
    done = [int(row) for row in file.done]
    if not images:
        if not done:
            raise StartError(f"{file.path} has no finished row", "bbx info says why")
        if len(done) > DEFAULT_IMAGES:
            tell(f"drawing the first {DEFAULT_IMAGES} of {len(done)} images; choose with --image KEY")
        return done[:DEFAULT_IMAGES]
    rows: dict[int, None] = {}
    finished, without = set(done), 0
    for wish in images:
        found = [row for row, key in enumerate(file.keys) if key == wish]  # a key may look like a glob
        found = found or [row for row, key in enumerate(file.keys) if fnmatch.fnmatchcase(key, wish)]
        if not found:
            found = [int(wish) if re.fullmatch(r"\d+", wish) and int(wish) < len(file) else file.index(wish)]
        rows.update(dict.fromkeys(row for row in found if row in finished))
        gone = [row for row in found if row not in finished]
        without += len(gone)
        if len(gone) == 1:
            reason = file.failed.get(file.keys[gone[0]], "still pending")
            tell(f"{file.keys[gone[0]]} has no features: {reason}")
    if without > 1:
        tell(f"{without} of the images asked for have no features: bbx info says why")
    if not rows:
        raise StartError("none of the images asked for has features", "bbx info says which failed, and why")
    return list(rows)


def _picture(path: Path | None, preprocess: Preprocess, warn: Callable[[], None] | None) -> NDArray[np.uint8] | None:
    """What is at `path`, as the network saw it; `warn` is called where that is no picture, or none any more."""
    if path is not None:
        from bbx.images import decode_one

        # By bbx's own resize: drawing needs neither transformers' image processor nor torch.
        decoded = decode_one(path, replace(preprocess, processor=""))
        if isinstance(decoded, np.ndarray):
            return decoded
    if warn is not None:
        warn()
    return None  # the features are worth drawing without it


def _file_name(subject: Subject) -> str:
    """A file name from a key, which may hold anything: safe characters only, told apart by row where any was lost."""
    stem = subject.key.removesuffix(PurePosixPath(subject.key).suffix)
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:120].strip("_")
    return safe if safe == stem else f"{safe or 'image'}-{subject.row}"
