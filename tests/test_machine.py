"""How much memory and how many cores there are, by what Linux says: of files made here, as each kind of machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from bbx.machine import available_nbytes, cores, quota
from bbx.rates import real_cores

GIB = 1 << 30


def machine(root: Path, files: dict[str, object]) -> Path:
    """A file system of `files` below `root`, with 8 GiB available."""
    for name, text in {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {8 * GIB // 1024} kB", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def group(folder: str, most: object, now: int, inactive: int = 0, active: int = 0) -> dict[str, object]:
    """A control group of version 2, whose page cache was used or not of late."""
    stat = f"anon 5\nfile {9 * GIB}\ninactive_file {inactive}\nactive_file {active}"
    where = f"sys/fs/cgroup/{folder}"
    return {f"{where}/memory.max": most, f"{where}/memory.current": now, f"{where}/memory.stat": stat}


def old_group(folder: str, most: int, now: int, cache: int) -> dict[str, object]:
    """A control group of version 1."""
    where = f"sys/fs/cgroup/memory/{folder}"
    stat = f"inactive_file 1\ntotal_inactive_file {cache}\ntotal_active_file 0"
    return {
        f"{where}/memory.limit_in_bytes": most,
        f"{where}/memory.usage_in_bytes": now,
        f"{where}/memory.stat": stat,
    }


@pytest.mark.parametrize(
    ("groups", "own", "free"),
    [
        ({}, "0::/", 8 * GIB),
        (group("", 4 * GIB, GIB), "0::/", 3 * GIB),
        (group("", 4 * GIB, 3 * GIB, GIB, GIB), "0::/", 3 * GIB),  # pages of files are no memory in use
        (group("", "max", 3 * GIB), "0::/", 8 * GIB),
        (group("job/step", 4 * GIB, GIB), "0::/job/step", 3 * GIB),
        (group("job", 2 * GIB, GIB) | group("job/step", 4 * GIB, GIB), "0::/job/step", GIB),
        (group("other", GIB, GIB), "0::/job", 8 * GIB),
        (group("", 4 * GIB, GIB), "0::/as/the/host/calls/it", 3 * GIB),
        (old_group("job", 4 * GIB, 2 * GIB, GIB), "5:cpu:/\n4:memory,hugetlb:/job\n0::/", 3 * GIB),
        (old_group("job", 2**63 - 4096, 2 * GIB, 0), "4:memory:/job", 8 * GIB),
        (old_group("job", 4 * GIB, 2 * GIB, GIB), "4:cpuset:/job", 8 * GIB),
    ],
)
def test_the_memory_that_is_free_is_the_least_of_machine_and_groups(tmp_path, groups, own, free):
    assert available_nbytes(machine(tmp_path, {"proc/self/cgroup": own, **groups})) == free


def test_a_system_that_says_nothing_limits_nothing(tmp_path):
    assert available_nbytes(tmp_path) == float("inf")


def test_cores_that_pose_as_two_count_once(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: {0, 1, 4}, raising=False)
    monkeypatch.setattr("bbx.rates.cores", lambda: 3)
    assert real_cores(tmp_path) == 3
    siblings = {0: "0,4", 1: "1,5", 4: "0,4"}
    files = {f"sys/devices/system/cpu/cpu{one}/topology/thread_siblings_list": two for one, two in siblings.items()}
    assert real_cores(machine(tmp_path, files)) == 2


@pytest.mark.parametrize(
    ("files", "own", "expected"),
    [
        ({}, "0::/", float("inf")),
        ({"cpu.max": "max 100000"}, "0::/", float("inf")),
        ({"cpu.max": "200000 100000"}, "0::/", 2),
        ({"job/cpu.max": "50000 100000", "cpu.max": "200000 100000"}, "0::/job", 0.5),
        ({"job/cpu.max": "max 100000", "cpu.max": "150000 100000"}, "0::/job", 1.5),
        ({"cpu/job/cpu.cfs_quota_us": -1, "cpu/job/cpu.cfs_period_us": 100000}, "3:cpu,cpuacct:/job", float("inf")),
        ({"cpu/job/cpu.cfs_quota_us": 300000, "cpu/job/cpu.cfs_period_us": 100000}, "3:cpu,cpuacct:/job\n0::/", 3),
    ],
)
def test_a_quota_of_time_is_what_groups_leave(tmp_path, files, own, expected):
    root = machine(
        tmp_path, {"proc/self/cgroup": own} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    )
    assert quota(root) == expected


@pytest.mark.parametrize(("quota", "expected"), [("max 100000", 6), ("250000 100000", 3), ("1000 100000", 1)])
def test_cores_are_no_more_than_a_container_has_time_for(tmp_path, monkeypatch, quota, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(6)), raising=False)
    root = machine(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": quota})
    assert cores(root) == expected
