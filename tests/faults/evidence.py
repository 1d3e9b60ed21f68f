"""What a feature file holds, against the file of a run that nothing happened to; read with h5py alone.

A resumed run may compute an image among other neighbours than the undisturbed run did, and torch then gives other last
bits. So features are the same within a tolerance, and checksums and seals are held against the file itself; with
`--deterministic` all bits are the same, and everything is compared with the undisturbed run.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from bbx.store import FeatureFile

DONE, FAILED = 1, 2
# Differs from start to start by design.
_STARTS = "provenance/attempts"
# Of the largest value of a row: what two orders of the same sum make of it, and a last bit of float16.
_TOLERANCE = {"<f4": 1e-6, "<f2": 2**-10}


@dataclass(frozen=True)
class Truth:
    """Every dataset of an undisturbed run. `rows`: those with a row per image. `exact`: to be met bit for bit."""

    data: dict[str, NDArray]
    rows: tuple[str, ...]
    stages: tuple[str, ...]
    exact: bool

    def __len__(self) -> int:
        return len(self.data["status"])

    @classmethod
    def of(cls, path: Path, *, exact: bool) -> Truth:
        """Reads `path`, and makes sure that it can tell rows apart, far beyond the tolerance, in every stage."""
        data = datasets(path)
        count = len(data["status"])
        rows = tuple(name for name, values in data.items() if values.shape[:1] == (count,))
        stages = tuple(name for name in rows if f"checksum/{name}" in data)
        done = data["status"] == DONE
        assert stages
        for name in stages:
            assert np.isnan(data[name][~done]).all()
            flat = _flat(data[name][done])
            scale = np.abs(flat).max()
            apart = min(np.abs(flat[:row] - flat[row]).max(axis=1).min() for row in range(1, len(flat)))
            assert apart > 4 * _TOLERANCE[data[name].dtype.str] * scale, f"{name}: two images have the same features"
        return cls(data, rows, stages, exact)

    def compared(self) -> tuple[str, ...]:
        """The datasets, one row per image, that a row must have as the undisturbed run has them, bit for bit."""
        loose = () if self.exact else (*self.stages, *(f"checksum/{name}" for name in self.stages), "provenance/seal")
        return tuple(name for name in self.rows if name not in loose)


def datasets(path: Path) -> dict[str, NDArray]:
    """All datasets but the starts, by name."""
    found: dict[str, NDArray] = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    # Soft links in /plot lead to the same datasets, and are not visited.
    return {name: np.asarray(values) for name, values in found.items() if name != _STARTS}


def wrong_rows(path: Path, truth: Truth) -> list[str]:
    """What is not right about the rows that count in `path`; a file that does not open raises."""
    data = datasets(path)
    rows = np.flatnonzero(data["status"])
    wrong = []
    for name in truth.compared():
        here = np.arange(len(truth)) if name in ("path", "image") else rows
        got, right = data[name][here], truth.data[name][here]
        wrong += _told(name, here, _rows(got == right) | _rows((got != got) & (right != right)))
    for name in truth.stages:
        got, right = data[name][rows], truth.data[name][rows]
        wrong += _told(name, rows, _close(got, right))
        sums = np.array([zlib.crc32(np.ascontiguousarray(row).data) for row in got], np.uint32)
        wrong += _told(f"checksum/{name}", rows, sums == data[f"checksum/{name}"][rows])
    return wrong


def _rows(equal: NDArray) -> NDArray:
    return equal.all(axis=tuple(range(1, equal.ndim)))


def _close(got: NDArray, right: NDArray) -> NDArray:
    """Which rows are the same, NaN where NaN is right."""
    flat, other = (_flat(values) for values in (got, right))
    room = _TOLERANCE[got.dtype.str] * np.abs(other).max(axis=1, initial=0.0)
    near = np.abs(flat - other).max(axis=1, initial=0.0) <= room
    return near | (np.isnan(flat).all(axis=1) & np.isnan(other).all(axis=1))


def _flat(values: NDArray) -> NDArray:
    return values.reshape(len(values), math.prod(values.shape[1:])).astype(np.float64)


def _told(name: str, rows: NDArray, same: NDArray) -> list[str]:
    bad = rows[~same].tolist()
    return [f"{name} of rows {bad[:10]} ({len(bad)} in all)"] if bad else []


def marked(path: Path) -> set[int]:
    """Rows that are done or failed."""
    with h5py.File(path) as file:
        return set(np.flatnonzero(file["status"][:]).tolist())


def check(folder: Path, truth: Truth, before: set[int] | None = None, name: str = "features.h5") -> set[int]:
    """Whatever there is opens, and holds nothing wrong; rows marked `before` still are. Returns the marked rows."""
    final, partial = folder / name, folder / f"{name}.partial"
    now: set[int] = set()
    for place in (partial, final):
        if place.exists():
            wrong = wrong_rows(place, truth)
            assert not wrong, f"{place}: {wrong}"
            now = marked(place)
            with FeatureFile(final, partial=place == partial) as file:
                assert len(file.broken_seals()) == 0
    if final.exists():
        assert len(now) == len(truth), f"{final} has its final name, and {len(truth) - len(now)} pending rows"
    gone = (before or set()) - now
    assert not gone, f"rows {sorted(gone)[:10]} were marked and are no more"
    return now


def assert_same(folder: Path, truth: Truth, name: str = "features.h5") -> None:
    """The output is complete, and holds what the undisturbed run holds, in every dataset but the starts."""
    data = datasets(folder / name)
    assert data.keys() == truth.data.keys()
    for other in set(data) - set(truth.rows):
        np.testing.assert_array_equal(data[other], truth.data[other], err_msg=other)
    assert len(check(folder, truth, name=name)) == len(truth)
    left = {path.name for path in folder.glob(f"{name}*")}
    # A kill between the last rename and the end leaves its lock file, which nobody holds and which stops nobody.
    assert left <= {name, f"{name}.lock"}, f"left behind: {left}"
