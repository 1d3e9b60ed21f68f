"""The process that the faults happen to: the real command line, forked from a warm process on request.

Starting `bbx` costs two seconds, nearly all of it torch. So one server imports everything once and then forks, before
any thread exists, a child per run; the child is a fresh process with its own group, that calls `bbx.cli.main()`.
Requests and replies are JSON lines on the server's stdin and stdout: `Request` → pid, pid → exit status.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

from tests.faults.tamper import Fault

_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Request:
    """One run: `words` after `bbx`, run in `folder`, what it says in the files `said.out` and `said.err` there.

    `commit_nbytes`, `commit_seconds`: when a commit starts. `record`: a file for the system calls about `output`, and
    `fault`: which of them go wrong, and how. `file_limit`: RLIMIT_FSIZE in bytes. `ticks`: seconds between SIGALRMs.
    `threads`: as OMP_NUM_THREADS would have it, which comes too late for a process that has loaded torch.
    """

    words: tuple[str, ...]
    folder: str
    output: str = "features.h5"
    commit_nbytes: int = 1 << 15
    commit_seconds: float = 0.02
    record: str = ""
    fault: Fault | None = None
    file_limit: int = 0
    ticks: float = 0.0
    threads: int = 1

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        data = json.loads(text)
        fault = data.pop("fault")
        return cls(**{**data, "words": tuple(data["words"])}, fault=Fault(**fault) if fault else None)


def serve() -> int:
    """Forks a child per request until stdin ends. In a child it does not return, but raises as `main` does."""
    _warm()
    # Workers whose parent was killed come here, so that they can be seen to end.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ended: dict[int, int] = {}
    for line in iter(sys.stdin.readline, ""):
        if line.strip().isdigit():
            pid = int(line)
            while pid not in ended:
                gone, status = os.wait()
                ended[gone] = os.waitstatus_to_exitcode(status)
            _say(ended.pop(pid))
            continue
        if len(os.listdir("/proc/self/task")) != 1:  # noqa: PTH208 (no objects needed)
            raise RuntimeError("a process with threads cannot be forked safely")
        child = os.fork()
        if child == 0:
            run(Request.from_json(line))
        ended.pop(child, None)  # an orphan of the same number, reaped long ago
        _say(child)
    return 0


def run(request: Request) -> NoReturn:
    """The child: everything as the kernel and the shell would set it up, then `bbx`."""
    os.setsid()
    os.chdir(request.folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "said.out"), (2, "said.err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    # One that hangs is ended by SIGABRT, and tells where each thread was.
    faulthandler.enable(2, all_threads=True)
    from bbx.store import commit

    commit.COMMIT_NBYTES, commit.COMMIT_SECONDS = request.commit_nbytes, request.commit_seconds
    if request.record or request.fault:
        from tests.faults import tamper

        tamper.install(request.output, request.record, request.fault)
    if request.file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request.file_limit, request.file_limit))
    if request.ticks:
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, request.ticks, request.ticks)
    import torch

    torch.set_num_threads(request.threads)
    try:
        code = command(*request.words)
    except KeyboardInterrupt:  # as the interpreter does with one that nobody caught
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    # As the interpreter ends, but for the taking apart of all modules: that takes longer than a whole run.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def command(*words: str) -> int:
    """`bbx WORDS`, in this process; its exit code."""
    from bbx import cli

    sys.argv = ["bbx", *words]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _say(number: int) -> None:
    os.write(1, b"%d\n" % number)


def _warm() -> None:
    """Imports all that a run imports, by a run that starts no thread, and registers the toy model."""
    from PIL import Image

    import bbx.providers

    bbx.providers.PROVIDERS["toy"] = ("tests.toy",)
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder, "a.png")
        Image.new("RGB", (40, 30)).save(picture)
        with patch("bbx.runner.measured", lambda plan: plan):  # a dry run measures, and that takes threads
            code = command("extract", "-q", "--model", "toy", "--dry-run", "-o", f"{folder}/f.h5", str(picture))
    if code:
        raise RuntimeError(f"the warming run ended with {code}")


if __name__ == "__main__":
    sys.exit(serve())
