"""A warm server per test process, an album with bad pictures in it, and what a run of it comes to undisturbed."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.faults.evidence import Truth
from tests.faults.host import Server
from tests.faults.victim import Request

IMAGES = 320
# A truncated picture, text, nothing at all; the four in a row are more than half a batch.
BAD = {3: "cut", 40: "text", 41: "empty", 42: "cut", 43: "text", 128: "empty", 255: "cut", 319: "text"}
BASE = ("extract", "--model", "toy", "--weights", "random", "--workers", "1")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The process that victims are forked from."""
    with Server() as running:
        # Its answer says that it is warm: from here on, times are those of victims.
        assert running.run(Request(("--version",), str(tmp_path_factory.mktemp("asked")))).code == 0
        yield running


@pytest.fixture(scope="session")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `IMAGES` small pictures, each another one, some of them bad."""
    folder = tmp_path_factory.mktemp("album")
    chance = np.random.default_rng(20)
    for number in range(IMAGES):
        path = folder / f"{number:04}.png"
        Image.fromarray(chance.integers(0, 256, (30, 40, 3), np.uint8)).save(path)
        spoil(path, BAD.get(number, ""))
        # Rows record it: no two alike.
        os.utime(path, ns=(10**18 + number, 10**18 + number))
    return folder


def spoil(path: Path, how: str) -> None:
    """Makes a bad picture of a good one."""
    if how == "cut":
        path.write_bytes(path.read_bytes()[:900])
    elif how:
        path.write_text("a letter" if how == "text" else "")


@dataclass
class Case:
    """A command, the truth about it, and how many seconds it takes: whole, and when there is nothing left to do."""

    words: tuple[str, ...]
    truth: Truth
    path: Path
    seconds: float
    least: float

    def instant(self, chance: random.Random, pending: int) -> float:
        """An instant of a run that has `pending` rows left to do, uniform over all of it."""
        return chance.uniform(0, self.least + (self.seconds - self.least) * pending / len(self.truth))


@pytest.fixture(scope="session")
def case(server: Server, album: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """`case("--pool", "avg")`: that command over the album, run once undisturbed; kept for the session."""
    known: dict[tuple[str, ...], Case] = {}

    def make(*options: str) -> Case:
        if options not in known:
            folder = tmp_path_factory.mktemp("truth")
            words = (*BASE, *options, str(album))
            started = time.perf_counter()
            ended = server.run(Request(words, str(folder)))
            seconds = time.perf_counter() - started
            assert ended.code == 4, ended.err  # some rows failed, as they must
            started = time.perf_counter()
            assert server.run(Request(words, str(folder))).code == 4
            least = time.perf_counter() - started
            path = folder / "features.h5"
            truth = Truth.of(path, exact="--deterministic" in options)
            assert np.flatnonzero(truth.data["status"] == 2).tolist() == sorted(BAD)
            known[options] = Case(words, truth, path, seconds, least)
        return known[options]

    return make


@pytest.fixture(scope="session")
def scale(request: pytest.FixtureRequest) -> float:
    """How many times the usual number of faults: --faults-scale."""
    return float(request.config.getoption("--faults-scale", os.environ.get("BBX_FAULTS_SCALE", "1")))
