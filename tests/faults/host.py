"""The test's side: a server that forks victims, and the handle on one victim: wait, signal, look at its children."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.faults.victim import Request

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 120.0
"""Seconds after which a process that should have ended has hung: far more than any run here takes."""


class Server:
    """Forks victims. `prefix` is a command that the server runs under, such as unshare's."""

    def __init__(self, prefix: Sequence[str] = (), **environment: str) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.faults.victim"],
            cwd=ROOT,
            # One thread each: a process with more cannot be forked safely, and OpenBLAS would start some.
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
                 "MKL_NUM_THREADS": "1", "COLUMNS": "200", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )  # fmt: skip
        self._started: Counter[str] = Counter()

    def start(self, request: Request) -> Victim:
        """Forks a process for `request`; every second one in a folder computes by two streams, not by one."""
        number = self._started[request.folder]
        self._started[request.folder] += 1
        asked = replace(request, threads=1 + number % 2)
        return Victim(self, self.ask(asked.to_json()), Path(request.folder))

    def run(self, request: Request) -> Ended:
        """Forks a process for `request`, and waits for its end."""
        return self.start(request).end()

    def ask(self, text: str) -> int:
        """The server's answer, a number."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(text + "\n")
        answer = self.process.stdout.readline()
        assert answer, "the server died"
        return int(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Ended:
    """How a victim ended: its exit status (−9: killed), and what it said."""

    code: int
    out: str
    err: str


@dataclass
class Victim:
    """A running victim. Its pid is its own until `end`, for the server reaps it only then."""

    server: Server
    pid: int
    folder: Path
    _pidfd: int = field(default=-1, repr=False)

    def __post_init__(self) -> None:
        self._pidfd = os.pidfd_open(self.pid)

    def ended_within(self, seconds: float) -> bool:
        """Whether it ends in `seconds`; returns as soon as it does."""
        return bool(select.select([self._pidfd], [], [], max(0.0, seconds))[0])

    def kill(self, signum: int = signal.SIGKILL, *, group: bool = False) -> None:
        """Sends a signal to it, or to its whole group, which it has not formed yet where it is just being born."""
        if group:
            with suppress(ProcessLookupError):
                return os.killpg(self.pid, signum)
        return os.kill(self.pid, signum)

    def end(self) -> Ended:
        """Waits for its end; one that hangs is killed, and the test fails."""
        hung = not self.ended_within(PATIENCE)
        if hung:
            self.kill(signal.SIGCONT, group=True)
            self.kill(signal.SIGABRT)
            self.ended_within(5)
            self.kill(group=True)
        code = self.server.ask(str(self.pid))
        os.close(self._pidfd)
        said = [(self.folder / name) for name in ("said.out", "said.err")]
        out, err = (path.read_text(errors="replace") if path.exists() else "" for path in said)
        assert not hung, f"the victim hung\n{err}"
        return Ended(code, out, err)

    def listens(self) -> bool:
        """Waits until it handles SIGTERM, and SIGINT with it; False where it ended before."""
        while not self.ended_within(0.001):
            if _signals(self.pid, "SigCgt") >> (signal.SIGTERM - 1) & 1:
                return True
        return False

    def children(self) -> list[int]:
        """Pidfds of the processes that it started and that live."""
        found = []
        for task in Path(f"/proc/{self.pid}/task").glob("*/children"):
            for pid in task.read_text().split():
                with suppress(ProcessLookupError):  # it has just ended
                    found.append(os.pidfd_open(int(pid)))
        return found


def all_end_within(pidfds: list[int], seconds: float) -> bool:
    """Whether all these processes end in `seconds`; closes the descriptors."""
    ended = [bool(select.select([fd], [], [], seconds)[0]) for fd in pidfds]
    for fd in pidfds:
        os.close(fd)
    return all(ended)


def _signals(pid: int, field: str) -> int:
    """A mask of signals from /proc, 0 where the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1], 16) for line in lines if line.startswith(field)), 0)
