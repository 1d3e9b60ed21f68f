"""Power lost at any moment: the file opens, rows that count are right, and the run goes on to the right end."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest

from tests.faults import replay
from tests.faults.conftest import BAD, Case
from tests.faults.evidence import Truth, assert_same, check
from tests.faults.tamper import Fault
from tests.faults.test_kill import SETTINGS, clear
from tests.faults.victim import Request

pytestmark = pytest.mark.slow

IMAGES = 60
RESUMED = 9
"""Of so many images one is gone on from; the others are only looked at, which is fifty times faster."""


def record(server, words: Sequence[str], folder: Path) -> list[replay.Event]:
    """The calls of an undisturbed run in `folder`, which may hold an older run's output."""
    log = folder / "record"
    ended = server.run(Request(tuple(words), str(folder), record=str(log)))
    assert ended.code == 4, ended.err
    events = replay.load(log)
    now = {path.name: path.read_bytes() for path in folder.glob("features.h5*")}
    # Nothing escaped the recorder: the record alone makes the very file.
    assert replay.whole(events) == now
    return events


def begun(server, job: Case, folder: Path) -> None:
    """A killed run, with some rows committed and some not: on a slow disk few syncs are all that there are."""
    for syncs in (12, 8, 6, 5, 4):
        ended = server.run(Request(job.words, str(folder), fault=Fault("fdatasync", syncs, kill=True)))
        assert ended.code in (-signal.SIGKILL, 4)  # it may have come to its end before
        if 0 < len(check(folder, job.truth)) < len(job.truth):
            return
        clear(folder)
    raise AssertionError("no moment was found at which some rows are committed")


def lay(folder: Path, files: dict[str, bytes]) -> Path:
    """The files in a new folder."""
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def bad_images(
    events: Sequence[replay.Event], truth: Truth, folder: Path, *, without: Collection[str] = (), last: int = 0
) -> list[str]:
    """What is wrong with forty images, where something is, of a disk on which some syncs do nothing."""
    chance = random.Random(len(events))
    found = []
    for number in range(40):
        place = lay(folder / f"bad{number}", replay.crash(events, chance, without=without, last=last))
        try:
            check(place, truth)
        except (AssertionError, OSError) as error:
            found.append(str(error))
        shutil.rmtree(place)
    return found


@pytest.mark.parametrize("path", ["fresh", "resumed", "retried"])
@pytest.mark.parametrize("setting", ["float32", "pooled"])
def test_after_a_loss_of_power_every_row_that_counts_is_right(server, case, tmp_path, scale, bbx_cli, setting, path):
    job = case(*SETTINGS[setting])
    home = tmp_path / "home"
    home.mkdir()
    if path == "resumed":
        begun(server, job, home)
    words = job.words
    if path == "retried":
        assert server.run(Request(words, str(home))).code == 4
        words = (*words, "--retry-failed")
    before = check(home, job.truth)
    if path == "retried":
        before -= set(BAD)  # those are pending again, until they have failed once more
    events = record(server, words, home)
    chance = random.Random(f"{setting} {path}")
    partly = 0
    for number in range(round(IMAGES * scale)):
        place = lay(tmp_path / f"image{number}", replay.crash(events, chance))
        marked = check(place, job.truth, before)
        partly += 0 < len(marked) < len(job.truth)
        if any(place.glob("features.h5*")) and not (place / "features.h5.partial.tmp").exists():
            ran = bbx_cli("info", place / "features.h5")
            assert ran.code == 0, ran.err
        if number % RESUMED == 0:
            assert server.run(Request(job.words, str(place))).code == 4
            assert_same(place, job.truth)
        shutil.rmtree(place)
    # Otherwise the moments were badly chosen.
    assert partly > IMAGES * scale / (20 if path == "retried" else 4)


def test_the_replay_finds_a_writer_that_marks_rows_before_they_are_on_disk(server, case, tmp_path):
    """The harness can fail: the same record, on a disk whose fdatasync does nothing, loses rows."""
    job = case(*SETTINGS["float32"])
    home = tmp_path / "home"
    home.mkdir()
    events = record(server, job.words, home)
    assert not bad_images(events, job.truth, tmp_path)
    found = bad_images(events, job.truth, tmp_path, without=["fdatasync"])
    assert len(found) > 10
    assert any("stage1 of rows" in what for what in found)


def test_the_replay_finds_a_writer_that_renames_before_its_rows_are_on_disk(server, case, tmp_path):
    job = case(*SETTINGS["float32"])
    home = tmp_path / "home"
    home.mkdir()
    events = record(server, job.words, home)
    # Without the syncs of the end, the name may get to the disk before the last marks do.
    late = {event[0] for event in events[-len(events) // 10 :] if event[1] == "sync" and event[2] != "folder"}
    assert late
    assert not bad_images(events, job.truth, tmp_path, last=4)
    careless = [event for event in events if event[1] != "synced" or event[2] not in late]
    found = bad_images(careless, job.truth, tmp_path, last=4)
    assert len(found) > 5
