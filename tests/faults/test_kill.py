"""`bbx extract` killed at any instant, again and again: no row lost, none wrong, in the end the right file."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.faults.evidence import assert_same, check
from tests.faults.host import all_end_within
from tests.faults.tamper import Fault
from tests.faults.victim import Request

pytestmark = pytest.mark.slow

# One line per kind of run; 16 kills each and per seed.
SETTINGS = {
    "float32": ("--stages", "stem,stage1,stage2"),
    "float16": ("--stages", "stem,stage1,stage2", "--dtype", "float16"),
    "pooled": ("--stages", "stem,stage1,stage2", "--pool", "avg"),
    "layers": ("--stages", "stage1,stage2", "--layers", "relu"),
    "odd-batches": ("--stages", "stem,stage2", "--batch-size", "5", "--workers", "2"),
    "deterministic": ("--stages", "stem,stage1,stage2", "--deterministic"),
    "compressed": ("--stages", "stage1,stage2", "--compress", "gzip"),
    "single-images": ("--stages", "stem,stage2", "--batch-size", "1"),
}
KILLS = 16
# A decode worker whose parent is gone ends by itself; this is only how long the test waits before it says no.
ORPHAN_SECONDS = 30.0


def clear(folder: Path) -> None:
    """Nothing there any more: the run begins anew."""
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("setting", SETTINGS)
def test_killed_at_random_instants_and_resumed_it_loses_no_row(server, case, tmp_path, scale, setting, seed):
    job = case(*SETTINGS[setting])
    chance = random.Random(f"{setting} {seed}")
    marked: set[int] = set()
    kills = whole = 0
    while kills < KILLS * scale or not whole:
        victim = server.start(Request(job.words, str(tmp_path)))
        # Once there were enough, the run may come to its end, however slow the machine has become.
        enough = kills >= KILLS * scale
        if not enough and not victim.ended_within(job.instant(chance, len(job.truth) - len(marked))):
            workers = victim.children()
            victim.kill(group=chance.random() < 0.5)
            assert all_end_within(workers, ORPHAN_SECONDS), "a decode worker outlived its parent"
        ended = victim.end()
        kills += ended.code == -signal.SIGKILL
        assert ended.code in (-signal.SIGKILL, 4), (ended, list(tmp_path.iterdir()))
        marked = check(tmp_path, job.truth, marked)
        if ended.code == 4:  # it came through: again from the start
            assert_same(tmp_path, job.truth)
            whole += 1
            marked = set()
            clear(tmp_path)


# The few calls that lay out, sync, rename and finish; and of all calls, most of which write rows, a sample.
CALLS = {"open": 1, "ftruncate": 3, "fallocate": 2, "fsync": 4, "replace": 2, "fdatasync": 6, "": 18}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call or "any")
def test_killed_just_before_a_system_call_it_loses_no_row(server, case, tmp_path, scale, call):
    job = case(*SETTINGS["float32"])
    chance = random.Random(call)
    for after in range(CALLS[call]) if call else chance.sample(range(400), round(CALLS[call] * scale)):
        first = server.run(Request(job.words, str(tmp_path), fault=Fault(call, after, kill=True)))
        assert first.code in (-signal.SIGKILL, 4), first.err
        marked = check(tmp_path, job.truth)
        assert server.run(Request(job.words, str(tmp_path))).code == 4
        check(tmp_path, job.truth, marked)
        assert_same(tmp_path, job.truth)
        clear(tmp_path)
