"""SIGTERM, Ctrl-C, a stopped process, and a second one on the same output: all end, or go on, with nothing lost."""

from __future__ import annotations

import fcntl
import random
import signal
import socket
from pathlib import Path

import pytest

from tests.faults.conftest import Case
from tests.faults.evidence import assert_same, check
from tests.faults.host import Server, Victim
from tests.faults.test_kill import SETTINGS, clear
from tests.faults.victim import Request

pytestmark = pytest.mark.slow

ROUNDS = 16


@pytest.fixture(scope="session")
def lockless() -> Server:
    """A server whose victims are told to HDF5's own file locking."""
    with Server(HDF5_USE_FILE_LOCKING="FALSE") as running:
        yield running


@pytest.fixture(params=["hdf5-locks", "no-hdf5-locks"])
def locking(request: pytest.FixtureRequest, server: Server) -> Server:
    """The server with HDF5's file locking, and one without: bbx does not rely on it."""
    return server if request.param == "hdf5-locks" else request.getfixturevalue("lockless")


def strike(victim: Victim, job: Case, pending: int, chance: random.Random, *, pace: float = 1.0) -> bool:
    """Waits for a random instant after the handlers are there, in two of three cases one while rows are written.

    False where the run is over by then. `pace`: how long a run takes now, times what it took when it was measured.
    """
    if not victim.listens():
        return False
    if chance.random() < 0.3:
        return not victim.ended_within(chance.uniform(0, job.least))
    while not (victim.folder / "features.h5.partial").exists():
        if victim.ended_within(0.001):
            return False
    return not victim.ended_within(chance.uniform(0, pace * (job.seconds - job.least) * pending / len(job.truth)))


@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_run_with_all_finished_images_committed(server, case, tmp_path, scale, name, group):
    signum = signal.Signals[name]
    job = case(*SETTINGS["single-images"])
    chance = random.Random(f"{name} {group}")
    marked: set[int] = set()
    rounds = committed = 0
    pace = 1.0
    # More where the machine has become so much slower, or faster, that no signal came while rows were written.
    while rounds < ROUNDS * scale or (not committed and rounds < 4 * ROUNDS * scale):
        rounds += 1
        victim = server.start(Request(job.words, str(tmp_path), commit_nbytes=1 << 40, commit_seconds=3600.0))
        if strike(victim, job, len(job.truth) - len(marked), chance, pace=pace):
            victim.kill(signum, group=group)
        ended = victim.end()
        before, marked = marked, check(tmp_path, job.truth, marked)
        if not (tmp_path / "features.h5").exists():
            assert ended.code == 128 + signum, ended.err
            assert ended.out == ""
            assert "the same command" in ended.err
            assert "internal error" not in ended.err
            # Nothing but the signal made it commit.
            committed += len(marked) > len(before)
            pace *= 1.0 if len(marked) > len(before) else 1.2
        else:
            pace *= 0.7
            assert_same(tmp_path, job.truth)
            marked = set()
            clear(tmp_path)
    assert committed
    assert server.run(Request(job.words, str(tmp_path))).code == 4
    assert_same(tmp_path, job.truth)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_it_at_once_and_safely(server, case, tmp_path, scale, name):
    signum = signal.Signals[name]
    job = case(*SETTINGS["float32"])
    chance = random.Random(name)
    marked: set[int] = set()
    for _ in range(round(ROUNDS * scale)):
        victim = server.start(Request(job.words, str(tmp_path)))
        if strike(victim, job, len(job.truth) - len(marked), chance):
            victim.kill(signum, group=True)
            victim.ended_within(chance.choice([0.0, 0.001, 0.01]))
            victim.kill(signum, group=True)
        ended = victim.end()
        marked = check(tmp_path, job.truth, marked)
        if (tmp_path / "features.h5").exists():
            marked = set()
            clear(tmp_path)
        else:
            # The second one may fall into the last moments, when the first one's handler is gone already.
            assert ended.code in (128 + signum, -signum), ended.err
    assert server.run(Request(job.words, str(tmp_path))).code == 4
    assert_same(tmp_path, job.truth)


@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
def test_a_run_that_was_stopped_for_a_while_comes_to_the_same(server, case, tmp_path, scale, group):
    job = case(*SETTINGS["float32"])
    chance = random.Random(f"stop {group}")
    for _ in range(round(4 * scale)):
        victim = server.start(Request(job.words, str(tmp_path)))
        for _ in range(3):
            if victim.ended_within(job.instant(chance, len(job.truth)) / 4):
                break
            victim.kill(signal.SIGSTOP, group=group)
            assert not victim.ended_within(chance.uniform(0.05, 0.5))
            victim.kill(signal.SIGCONT, group=group)
        ended = victim.end()
        assert ended.code == 4, ended.err
        assert_same(tmp_path, job.truth)
        clear(tmp_path)


def held(folder: Path) -> bool:
    """Whether another process holds the lock of the output."""
    lock = folder / "features.h5.lock"
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_second_process_on_the_same_output_is_refused_and_told_the_owner(locking, case, tmp_path):
    job = case(*SETTINGS["float32"])
    first = locking.start(Request(job.words, str(tmp_path)))
    while not (tmp_path / "features.h5.partial").exists():
        assert not first.ended_within(0.001)
    first.kill(signal.SIGSTOP)  # it holds what it holds, for as long as this takes
    assert held(tmp_path)
    aside = tmp_path / "aside"
    aside.mkdir()
    for words in (
        (*job.words, "-o", str(tmp_path / "features.h5")),
        (*job.words, "-o", str(tmp_path / "features.h5"), "--mode", "overwrite"),
        (*job.words, "-o", str(tmp_path / "features.h5"), "--mode", "resume"),
    ):
        second = locking.run(Request(words, str(aside)))
        assert (second.code, second.out) == (3, ""), second.err
        assert f"process {first.pid} on host {socket.gethostname()}" in second.err
        assert "Traceback" not in second.err
    first.kill(signal.SIGCONT)
    assert first.end().code == 4
    assert_same(tmp_path, job.truth)
    assert not (tmp_path / "features.h5.lock").exists()


def test_of_many_that_start_at_once_one_wins_and_the_others_are_refused(locking, case, tmp_path):
    job = case(*SETTINGS["float32"])
    racers = []
    for number in range(5):
        folder = tmp_path / str(number)
        folder.mkdir()
        racers.append(locking.start(Request((*job.words, "-o", str(tmp_path / "features.h5")), str(folder))))
    ended = [racer.end() for racer in racers]
    # One may also start after another's end, and then finds it done.
    assert {one.code for one in ended} <= {3, 4}
    assert 4 in {one.code for one in ended}
    assert all("is held by" in one.err for one in ended if one.code == 3)
    assert_same(tmp_path, job.truth)


@pytest.mark.parametrize("left", ["{host} {pid}\n", "elsewhere 4711\n", "", "\0\0 garbage \n\n", "x" * 100_000])
def test_a_lock_file_that_nobody_holds_stops_nobody(locking, case, tmp_path, left):
    job = case(*SETTINGS["float32"])
    victim = locking.start(Request(job.words, str(tmp_path)))
    while not (tmp_path / "features.h5.partial").exists():
        assert not victim.ended_within(0.001)
    victim.kill()
    victim.end()
    lock = tmp_path / "features.h5.lock"
    assert lock.read_text().split() == [socket.gethostname(), str(victim.pid)]
    lock.write_text(left.format(host=socket.gethostname(), pid=victim.pid))
    ended = locking.run(Request(job.words, str(tmp_path)))
    assert ended.code == 4, ended.err
    assert_same(tmp_path, job.truth)
    assert not lock.exists()


def test_a_lock_that_is_held_stops_even_where_its_file_names_nobody(locking, case, tmp_path):
    job = case(*SETTINGS["float32"])
    with (tmp_path / "features.h5.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = locking.run(Request(job.words, str(tmp_path)))
    assert (ended.code, ended.out) == (3, "")
    assert "another process" in ended.err
    assert not (tmp_path / "features.h5.partial").exists()
