"""A process killed at any instant loses no marked row and leaves no wrong one, and its run ends in the same file."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from bbx.spec import Stage
from bbx.store import FeatureWriter, commit
from tests.test_store_toys import RUN, row_maps

KILL_RUN = replace(RUN, stages=(Stage("stem", (8, 16, 16), 4, "conv1", 0), Stage("stage1", (64, 8, 8), 8, "layer1", 1)))
KILL_KEYS = [f"{index:04}.png" for index in range(400)]
BATCH = 4
KILLS = 48


def write_all(out: Path) -> None:
    """The victim: writes all that is pending, and commits as often as it can."""
    commit.COMMIT_NBYTES = 1 << 16
    os.write(1, b"starting\n")
    with FeatureWriter.open(out, KILL_RUN, KILL_KEYS) as writer:
        rows = writer.pending.tolist()
        os.write(1, b"writing\n")
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            if batch[0] % 100 == 0:
                writer.fail(batch.pop(0), "every hundredth")
            writer.write(batch, row_maps(batch, KILL_RUN))


@functools.cache
def expected() -> dict[str, np.ndarray]:
    return row_maps(range(len(KILL_KEYS)), KILL_RUN)


def check(place: Path, before: set[int]) -> set[int]:
    """Every marked row is right; none that was marked before is missing. Returns the marked rows."""
    with h5py.File(place) as file:
        status = file["status"][:]
        for row in np.flatnonzero(status):
            for name, right in expected().items():
                got = file[name][row]
                assert np.isnan(got).all() if status[row] == 2 else np.array_equal(got, right[row])
                assert zlib.crc32(got.tobytes()) == file["checksum"][name][row]
    marked = set(np.flatnonzero(status).tolist())
    assert before <= marked
    return marked


def assert_same(first: Path, second: Path) -> None:
    """Two files hold the same datasets; only their starts may differ."""
    names: list[str] = []
    with h5py.File(first) as one, h5py.File(second) as other:
        one.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        names.remove("provenance/attempts")
        for name in names:
            np.testing.assert_array_equal(one[name][()], other[name][()], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kill_at_any_instant_loses_nothing(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    kills, marked = 0, set[int]()
    out = tmp_path / "f.h5"
    while kills < KILLS // 3 or not out.exists():
        if out.exists():
            # Finished before enough kills: once more from the start.
            assert check(out, marked) == set(range(len(KILL_KEYS)))
            out.unlink()
            marked = set()
        victim = subprocess.Popen(
            [sys.executable, "-c", f"from tests.test_store_kill import *; write_all(Path({str(out)!r}))"],
            stdout=subprocess.PIPE,
        )
        assert victim.stdout is not None
        victim.stdout.readline()
        start = chance.random() < 0.3  # some kills while the skeleton is built, most while rows are written
        try:
            if not start:
                victim.stdout.readline()
            victim.wait(chance.uniform(0, 0.02 if start else 0.3))
        except subprocess.TimeoutExpired:
            victim.kill()
            kills += 1
        victim.communicate()
        partial = Path(f"{out}.partial")
        if partial.exists():
            marked = check(partial, marked)
    write_all(tmp_path / "whole.h5")
    assert check(out, marked) == set(range(len(KILL_KEYS)))
    assert_same(out, tmp_path / "whole.h5")
