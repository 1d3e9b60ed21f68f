"""A disk that is full, fails, shrinks or goes away: a clear error, nothing lost that was committed, and on from there.

Each fault is injected into the calls of the process itself, everywhere; where the system lets a test mount a small file
system of its own (a user namespace: most Linux machines, few containers), the full disk is a real one besides.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.conftest import Case
from tests.faults.evidence import assert_same, check
from tests.faults.host import Ended, Server
from tests.faults.tamper import Fault
from tests.faults.test_kill import SETTINGS, clear
from tests.faults.victim import Request

pytestmark = pytest.mark.slow

SMALL = 16 << 20
_UNSHARE = ("unshare", "-Urm", "--propagation", "private")


@functools.cache
def can_mount() -> bool:
    """Whether a process may have mounts of its own here."""
    if not shutil.which("unshare"):
        return False
    words = [*_UNSHARE, "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/mnt"]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def assert_clear(ended: Ended, *words: str) -> None:
    """The run stopped as it should: exit code 3, nothing on stdout, one error that says `words`."""
    assert (ended.code, ended.out) == (3, ""), ended.err
    assert "Traceback" not in ended.err
    assert "internal error" not in ended.err
    assert ended.err.count("error: ") == 1
    assert "hint: " in ended.err
    for word in words:
        assert word in ended.err, f"{word}\n{ended.err}"


def goes_on(server: Server, job: Case, folder: Path, before: set[int]) -> None:
    """Nothing committed is lost, and the same command ends in the right file."""
    marked = check(folder, job.truth, before)
    ended = server.run(Request(job.words, str(folder)))
    assert ended.code == 4, ended.err
    check(folder, job.truth, marked)
    assert_same(folder, job.truth)


# What the disk answers: to which call, from which one on, and what bbx must say.
FAULTS = {
    "full": (Fault("pwrite", errno=errno.ENOSPC, short=True), "No space left", 300),
    "over-quota": (Fault("pwrite", errno=errno.EDQUOT, short=True), "quota", 300),
    "failing-write": (Fault("pwrite", errno=errno.EIO), "Input/output error", 300),
    "one-failing-write": (Fault("pwrite", errno=errno.EIO, once=True), "Input/output error", 300),
    "failing-sync": (Fault("fdatasync", errno=errno.EIO), "Input/output error", 12),
    "one-failing-sync": (Fault("fdatasync", errno=errno.EIO, once=True), "Input/output error", 12),
    "full-at-sync": (Fault("fdatasync", errno=errno.ENOSPC), "No space left", 12),
    "read-only": (Fault("pwrite", errno=errno.EROFS), "Read-only file system", 300),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_disk_that_fails_under_the_run_stops_it_with_nothing_lost(server, case, tmp_path, scale, name):
    job = case(*SETTINGS["float32"])
    fault, words, calls = FAULTS[name]
    chance = random.Random(name)
    hits = 0
    for _ in range(round(3 * scale)):
        marked: set[int] = set()
        for most in (calls, calls // 4):  # it fails, and fails again where it went on
            after = replace(fault, after=chance.randrange(most), seed=chance.randrange(99))
            ended = server.run(Request(job.words, str(tmp_path), fault=after))
            if ended.code != 4:  # the call may be one more than there are
                assert_clear(ended, words)
                hits += 1
            marked = check(tmp_path, job.truth, marked)
            if not (tmp_path / "features.h5").exists():
                assert not (tmp_path / "features.h5.lock").exists()
        goes_on(server, job, tmp_path, marked)
        clear(tmp_path)
    assert hits >= 3 * scale


# The calls that lay out and finish the file, each failing in turn: where it began, it is as if nothing had been.
LAST_AND_FIRST = {
    "open": (errno.EACCES, errno.EROFS, errno.ENOSPC),
    "ftruncate": (errno.EIO, errno.EFBIG, errno.ENOSPC),
    "fallocate": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    "fsync": (errno.EIO, errno.ENOSPC),
    "replace": (errno.EROFS, errno.EIO, errno.ENOSPC),
}


@pytest.mark.parametrize("call", LAST_AND_FIRST)
def test_a_failure_while_the_file_is_laid_out_or_finished_is_told_and_harms_nothing(server, case, tmp_path, call):
    job = case(*SETTINGS["pooled"])
    told = 0
    for after in range({"open": 1, "ftruncate": 3, "fallocate": 2, "fsync": 4, "replace": 2}[call]):
        for code in LAST_AND_FIRST[call]:
            ended = server.run(Request(job.words, str(tmp_path), fault=Fault(call, after, code, once=True)))
            if ended.code != 4:
                assert_clear(ended)
                told += 1
            assert not (tmp_path / "features.h5.partial.tmp").exists()
            goes_on(server, job, tmp_path, set())
            clear(tmp_path)
    assert told >= len(LAST_AND_FIRST[call])


def test_a_disk_that_takes_writes_in_small_pieces_gets_all_of_them(server, case, tmp_path, scale):
    job = case(*SETTINGS["float32"])
    for seed in range(round(3 * scale)):
        ended = server.run(Request(job.words, str(tmp_path), fault=Fault("pwrite", short=True, seed=seed)))
        assert ended.code == 4, ended.err
        assert_same(tmp_path, job.truth)
        clear(tmp_path)


def test_a_disk_that_takes_nothing_and_says_nothing_is_an_error_not_a_loop(server, case, tmp_path):
    job = case(*SETTINGS["float32"])
    ended = server.run(Request(job.words, str(tmp_path), fault=Fault("pwrite", 100, nothing=True)))
    assert_clear(ended, "wrote nothing")
    goes_on(server, job, tmp_path, set())


def test_calls_that_signals_interrupt_are_made_again(server, case, tmp_path):
    job = case(*SETTINGS["float32"])
    ended = server.run(Request(job.words, str(tmp_path), ticks=0.0005))
    assert ended.code == 4, ended.err
    assert_same(tmp_path, job.truth)


def test_a_limit_on_the_size_of_files_is_an_error_not_a_signal(server, case, tmp_path):
    job = case(*SETTINGS["float32"])
    size = job.path.stat().st_size
    ended = server.run(Request(job.words, str(tmp_path), file_limit=size // 2))
    assert_clear(ended, "no single file")
    assert not list(tmp_path.glob("features.h5*"))
    # The limit may also come between two starts: then it is met by a row.
    victim = server.run(Request(job.words, str(tmp_path), fault=Fault("fdatasync", 5, kill=True)))
    assert victim.code == -signal.SIGKILL
    marked = check(tmp_path, job.truth)
    ended = server.run(Request(job.words, str(tmp_path), file_limit=size // 2))
    assert_clear(ended, "File too large")
    goes_on(server, job, tmp_path, marked)


@pytest.mark.parametrize("room", [0, 100_000, 1_000_000])
def test_a_disk_without_fallocate_that_has_too_little_room_says_so_first(server, case, tmp_path, room):
    job = case(*SETTINGS["float32"])
    ended = server.run(Request(job.words, str(tmp_path), fault=Fault("none", no_fallocate=True, room=room)))
    assert_clear(ended, "free")
    assert not list(tmp_path.glob("features.h5*"))
    ended = server.run(Request(job.words, str(tmp_path), fault=Fault("none", no_fallocate=True)))
    assert ended.code == 4
    assert_same(tmp_path, job.truth)


@pytest.mark.parametrize("how", ["moved", "removed", "replaced"])
def test_an_output_folder_that_goes_away_under_the_run_is_an_error(server, case, tmp_path, scale, how):
    job = case(*SETTINGS["float32"])
    chance = random.Random(how)
    aside = tmp_path / "aside"
    aside.mkdir()
    for number in range(round(3 * scale)):
        folder, moved = tmp_path / f"out{number}", tmp_path / f"moved{number}"
        folder.mkdir()
        words = (*job.words, "-o", str(folder / "features.h5"))
        victim = server.start(Request(words, str(aside)))
        while not (folder / "features.h5.partial").exists():
            assert not victim.ended_within(0.001)
        assert not victim.ended_within(chance.uniform(0, (job.seconds - job.least) / 3))
        victim.kill(signal.SIGSTOP)
        if (folder / "features.h5").exists():
            victim.kill(signal.SIGCONT)
            assert victim.end().code == 4
            continue
        folder.rename(moved)
        if how == "removed":
            shutil.rmtree(moved)
        elif how == "replaced":
            folder.mkdir()
            (folder / "features.h5.partial").write_bytes(b"another's")
        victim.kill(signal.SIGCONT)
        assert_clear(victim.end(), str(folder))
        if how == "replaced":
            assert {path.name for path in folder.iterdir()} == {"features.h5.partial"}
            assert (folder / "features.h5.partial").read_bytes() == b"another's"
        if how != "removed":
            marked = check(moved, job.truth)
            (moved / "features.h5.lock").unlink(missing_ok=True)  # its name was out of the run's reach
            ended = server.run(Request((*job.words, "-o", str(moved / "features.h5")), str(aside)))
            assert ended.code == 4, ended.err
            check(moved, job.truth, marked)
            assert_same(moved, job.truth)


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_folder_that_may_not_be_written_to_is_an_error_before_anything_else(server, case, tmp_path, mode):
    job = case(*SETTINGS["float32"])
    folder, aside = tmp_path / "out", tmp_path / "aside"
    folder.mkdir()
    aside.mkdir()
    folder.chmod(mode)
    try:
        # Root may write where nobody may: then it must come out right instead.
        allowed = os.access(folder, os.W_OK)
        ended = server.run(Request((*job.words, "-o", str(folder / "features.h5")), str(aside)))
        if allowed:
            assert ended.code == 4
        else:
            assert_clear(ended, "cannot be written to")
    finally:
        folder.chmod(0o755)
    if allowed:
        assert_same(folder, job.truth)


if can_mount():  # decided here, so that a machine without shows fewer tests, not skipped ones

    @pytest.fixture(scope="module")
    def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path, Path]]:
        """A server in whose world a folder is a disk of 16 MB: it, the folder there, and the same seen from here."""
        folder = tmp_path_factory.mktemp("small")
        script = 'mount -t tmpfs -o size="$1" none "$2" && shift 2 && exec "$@"'
        with Server((*_UNSHARE, "sh", "-c", script, "sh", str(SMALL), str(folder))) as server:
            server.run(Request(("--version",), str(tmp_path_factory.mktemp("asked"))))  # it answers: it is mounted
            yield server, folder, Path(f"/proc/{server.process.pid}/root{folder}")

    def free(place: Path, nbytes: int) -> None:
        """Leaves so much room on the small disk."""
        clear(place)
        room = shutil.disk_usage(place).free - nbytes
        (place / "ballast").write_bytes(bytes(max(0, room)))

    @pytest.mark.parametrize("room", [0, 4096, 1 << 16, 1 << 20, 1 << 21])
    def test_a_disk_that_is_full_from_the_start_is_told_before_the_first_image(small, case, tmp_path, room):
        server, folder, place = small
        job = case(*SETTINGS["float32"])
        free(place, room)
        words = (*job.words, "-o", str(folder / "features.h5"))
        assert_clear(server.run(Request(words, str(tmp_path))))
        assert not list(place.glob("features.h5*"))
        (place / "ballast").unlink()
        assert server.run(Request(words, str(tmp_path))).code == 4
        assert_same(place, job.truth)

    def test_a_disk_that_fills_up_under_the_run_stops_it_with_nothing_lost(small, case, tmp_path, scale):
        server, folder, place = small
        job = case(*SETTINGS["float32"])
        chance = random.Random("ballast")
        words = (*job.words, "-o", str(folder / "features.h5"))
        for _ in range(round(6 * scale)):
            clear(place)
            # Without fallocate: a file that has its blocks meets no full disk.
            fault = Fault("pwrite", chance.randrange(200), no_fallocate=True, ballast=str(folder / "ballast"))
            ended = server.run(Request(words, str(tmp_path), output=str(folder / "features.h5"), fault=fault))
            assert_clear(ended, "No space left")
            marked = check(place, job.truth)
            (place / "ballast").unlink()
            assert server.run(Request(words, str(tmp_path))).code == 4
            check(place, job.truth, marked)
            assert_same(place, job.truth)

    def test_a_disk_that_was_made_read_only_between_two_starts_is_an_error(small, case, tmp_path):
        server, folder, place = small
        job = case(*SETTINGS["float32"])
        words = (*job.words, "-o", str(folder / "features.h5"))
        clear(place)
        kill = Fault("fdatasync", 8, kill=True)
        assert server.run(Request(words, str(tmp_path), output=str(folder / "features.h5"), fault=kill)).code < 0
        marked = check(place, job.truth)
        inside = ("nsenter", f"--target={server.process.pid}", "--user", "--mount", "--preserve-credentials")
        subprocess.run([*inside, "mount", "-o", "remount,ro", str(folder)], check=True)
        try:
            assert_clear(server.run(Request(words, str(tmp_path))))
            assert check(place, job.truth, marked) == marked
        finally:
            subprocess.run([*inside, "mount", "-o", "remount,rw", str(folder)], check=True)
        assert server.run(Request(words, str(tmp_path))).code == 4
        assert_same(place, job.truth)
