"""Thousands of mutated feature files: `bbx info`, `show` and `verify` give an error or the right answer, and end.

A shard of cases is a process of its own, `python -m tests.faults.test_fuzz FOLDER CASE…`, warm and with one thread. It
forks a child per command: the console entry `bbx.cli.run`, with limits on time and memory, its output in files. What
the untouched file says is the truth; `objections` is the judge. A case that fails is run again by its name.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import hashlib
import io
import json
import os
import pickle
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from bbx.spec import Preprocess
from tests.faults import mutations
from tests.faults.mutations import KINDS, ORIGINALS, Case, Original

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
SHARDS, FILES = 8, 255
"""So many tests of so many mutated files each."""
PATIENCE = 40.0
"""Seconds of a clock on a machine that may be busy; bbx itself gives HDF5 ten of computing to open a file."""
CIRCLES = 15
"""Seconds of computing after which a process without the shield is taken to circle inside HDF5; most need a half."""
ROOM = 1 << 30
"""Bytes of address space that a command may take beyond what the warm process has."""
DRAWN, WHOLE = 21, 97
"""Of so many files one is drawn by `bbx show`, and one goes through all processes that the console entry starts; as
does every file on which a command crashes without them."""
SHOW = ("show", "f.h5", "--image", "0", "--channels", "0:2", "-o", "drawn")
COMMANDS = {"info": ("info", "f.h5"), "json": ("info", "--json", "f.h5"), "verify": ("verify", "f.h5"), "show": SHOW}
CODES = {"info": (0, 2, 3), "json": (0, 2, 3), "verify": (0, 3, 4), "show": (0, 2, 3), "look": (0,), "mutate": (0,)}
LINES = 6
"""Lines that an error may have, hint included."""
UNPRINTABLE = re.compile("[\0-\\x08\\x0b-\\x1f\\x7f-\\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
INTERNAL = re.compile(r"Traceback|internal error|Fatal Python|Exception ignored")
# Not HDF5's own "memory allocation failed": an absurd size that it met with an error, within ROOM.
MEMORY = re.compile(r"MemoryError|[Uu]nable to allocate|bad_alloc")


# The children


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code (negative: the signal), what it printed, and whether it had to be killed."""

    code: int
    out: str
    err: str
    hung: bool = False


class Children:
    """Runs calls in forked children, in `folder`, one at a time."""

    def __init__(self) -> None:
        self._room = _address_space() + ROOM

    def run(self, call: Callable[[], int], folder: Path) -> Ended:
        """`call()` in a child, its exit code the result."""
        pid = os.fork()
        if pid == 0:
            self._child(call, folder)
        watch = os.pidfd_open(pid)
        hung = not select.select([watch], [], [], PATIENCE)[0]
        os.close(watch)
        if hung:
            os.killpg(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out, err = ((folder.parent / name).read_text(errors="backslashreplace") for name in ("said.out", "said.err"))
        return Ended(code, out, err, hung)

    def _child(self, call: Callable[[], int], folder: Path) -> NoReturn:
        code = 70
        try:
            os.setsid()
            os.chdir(folder)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            redirect(folder.parent / "said")
            gc.disable()
            resource.setrlimit(resource.RLIMIT_AS, (self._room, self._room))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            code = call()
        except SystemExit as end:  # also that of the shield's own child
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def command(words: Sequence[str], *, whole: bool) -> Callable[[], int]:
    """`bbx WORDS`: as its console entry runs it (`whole`), or in one process where that starts several."""

    def call() -> int:
        import typer.main

        import bbx.images
        from bbx import cli
        from bbx.images.decoders import decode_one
        from bbx.store import metadata

        bbx.images.decode_one = decode_one
        sys.argv = ["bbx", *words]
        metadata.subprocess = subprocess
        if whole:
            # The parser that `warm` keeps calls the commands as they were, without the shield.
            typer.main.get_command = getattr(typer.main.get_command, "__wrapped__", typer.main.get_command)
            cli.run()
        metadata.subprocess = SimpleNamespace(  # type: ignore[assignment]
            run=compared_here, DEVNULL=None, TimeoutExpired=subprocess.TimeoutExpired
        )
        cli.main()

    return call


def compared_here(command: Sequence[str], **_options: Any) -> SimpleNamespace:
    """Stands in for the process that `store.metadata` starts: the same call, in this one; 20 times faster."""
    from bbx.store import metadata

    with contextlib.redirect_stdout(io.StringIO()) as said:
        metadata.main(command[-1])
    return SimpleNamespace(stdout=said.getvalue().encode(), stderr=b"", returncode=0)


def limited(call: Callable[[], int]) -> Callable[[], int]:
    """`call` in a process that the system ends where it circles."""

    def within() -> int:
        resource.setrlimit(resource.RLIMIT_CPU, (CIRCLES, CIRCLES))
        return call()

    return within


def decoded_here(path: str | os.PathLike[str], preprocess: Preprocess) -> Any:
    """Stands in for `bbx.images.decode_one`, which starts a process: the same pixels or reason; 20 times faster."""
    from bbx.errors import ImageError
    from bbx.images import read_image

    try:
        return read_image(path, preprocess)
    except ImageError as error:
        return error.message


def together(work: Path, report: Path) -> Callable[[], int]:
    """All commands but `show`, and `look`; their output and codes in files in `work`."""

    def call() -> int:
        codes: dict[str, int] = {}
        for word in ("info", "json", "verify"):
            redirect(work / word)
            try:
                command(COMMANDS[word], whole=False)()
            except SystemExit as end:
                codes[word] = int(end.code or 0)
            sys.stdout.flush()
            sys.stderr.flush()
        (work / "codes").write_text(json.dumps(codes))
        redirect(work / "said")
        return look(report)()

    return call


def redirect(place: Path) -> None:
    """What is printed from now on goes to `<place>.out` and `<place>.err`."""
    for number, end in ((1, "out"), (2, "err")):
        made = os.open(f"{place}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(made, number)
        os.close(made)


def look(report: Path) -> Callable[[], int]:
    """Writes what the library reads from the file: the subjects of `bbx show`, then all that a program would ask."""

    def call() -> int:
        import bbx.images
        from bbx.errors import BbxError

        bbx.images.decode_one = decoded_here  # pictures are not what was mutated
        seen: dict[str, Any] = {}
        for what, ask in (("subjects", _subjects), ("facts", _facts)):
            try:
                seen[what] = ask()
            except BbxError as error:
                seen[what] = f"{type(error).__name__}: {error}"
        report.write_bytes(pickle.dumps(seen))
        return 0

    return call


def _digest(array: Any) -> Any:
    return array if array is None else (str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest())


def _subjects() -> list[tuple[Any, ...]]:
    from bbx import show

    return [
        (one.row, one.key, {name: _digest(maps) for name, maps in one.maps.items()}, one.strides, _digest(one.picture))
        for one in show.from_file("f.h5")
    ]


def _facts() -> dict[str, Any]:
    from bbx import facts
    from bbx.store import open_finished_or_partial

    with open_finished_or_partial("f.h5") as file:
        inputs = file.inputs()
        rows = {
            row: (
                file.keys[row],
                int(file.status[row]),
                inputs[row],
                [_digest(file[name][row]) for name in file.stages] if file.status[row] == 1 else None,
            )
            for row in range(len(file))
            if file.status[row]
        }
        rest = (len(file), file.rows, file.rows_total, file.run.source, file.run.weights)
        return {"rows": rows, "failed": file.failed, "attempts": file.attempts, "run": facts.of_spec(file.run),
                "rest": rest}  # fmt: skip


class Watch:
    """Sees every opening of a file in a folder, whichever library does it (inotify)."""

    _OPENED, _NONBLOCK = 0x20, 0o4000

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(self._NONBLOCK)
        if self._fd < 0 or libc.inotify_add_watch(self._fd, os.fsencode(folder), self._OPENED) < 0:
            raise OSError(ctypes.get_errno(), "inotify")

    def seen(self) -> bool:
        """Whether anything was opened since the last call."""
        try:
            return bool(os.read(self._fd, 1 << 16))
        except BlockingIOError:
            return False


# The judge


@dataclass
class Seen:
    """What came of all commands on one file."""

    ended: dict[str, Ended] = field(default_factory=dict)
    subjects: Any = None
    facts: Any = None
    strayed: bool = False

    def read(self, report: Path) -> None:
        """Take over what `look` wrote."""
        if report.exists():
            told = pickle.loads(report.read_bytes())
            self.subjects, self.facts = told["subjects"], told["facts"]


def objections(case: Case, original: Original, right: Seen, seen: Seen) -> Iterator[str]:
    """Everything that is wrong with what bbx said of one mutated file."""
    if seen.strayed:
        yield "a file outside the folder was opened"
    for name, ended in seen.ended.items():
        yield from (f"{name}: {what}" for what in manners(name, ended))
    # In a 1.0 file rows with their checksums may change places, and nothing can tell.
    if KINDS[case.kind].forged or (case.kind == "rows swapped" and not original.sealed):
        return
    if seen.ended["verify"].code == 0:
        yield from (f"verify says all is well: {what}" for what in unlike(original, right.facts, seen.facts))
    yield from (f"show: {what}" for what in wrong_subjects(original, right.subjects, seen.subjects))
    yield from wrong_info(original, right, seen)


def manners(name: str, ended: Ended) -> Iterator[str]:
    """What no file excuses."""
    text = ended.out + ended.err
    if name == "look" and (ended.hung or -ended.code in (signal.SIGSEGV, signal.SIGKILL)):
        return  # HDF5's crash or endless loop, which the shield is for: the library has none, as SECURITY.md says
    if ended.hung:
        yield f"hung for {PATIENCE:g} s"
    elif ended.code not in CODES[name]:
        yield f"exit code {ended.code}: {text[-400:]!r}"
    if INTERNAL.search(text):
        yield f"internal: {text[-600:]!r}"
    if found := MEMORY.search(text):
        yield f"memory: {found[0]}: {text[-300:]!r}"
    if found := UNPRINTABLE.search(text):
        yield f"unprintable {found[0]!r} in {text[max(0, found.start() - 60) : found.end() + 60]!r}"
    if ended.code in (2, 3) and not ("error: " in ended.err and len(ended.err.splitlines()) <= LINES):
        yield f"no short error: {ended.err[-400:]!r}"
    if name == "verify" and ended.code == 4 and "damaged: " not in ended.out:
        yield f"damage without a word: {ended.out[-400:]!r}"
    if name == "json" and ended.code == 0:
        try:
            json.loads(ended.out, parse_constant=_no_json)
        except ValueError as error:
            yield f"no JSON: {error}"


def _no_json(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


def unlike(original: Original, right: Any, found: Any) -> Iterator[str]:
    """How the file's facts differ from the truth, though nothing was found.

    A pending row of an unfinished file counts for nothing, and will be done again. Without seals, in format 1.0, only
    features and the run are vouched for.
    """
    if isinstance(found, str) or found is None:
        yield f"but it cannot be read: {found}"
        return
    for row, (key, status, inputs, maps) in found["rows"].items():
        mine = right["rows"].get(row)
        if mine is None:
            yield f"row {row} counts, and did not"
        elif status != mine[1] or maps != mine[3]:
            yield f"row {row} has status {status}, not {mine[1]}, or other features"
        elif original.sealed and (key, inputs) != (mine[0], mine[2]):
            yield f"row {row} is {key!r} of {inputs}, not {mine[0]!r} of {mine[2]}"
    if original.finished and set(found["rows"]) != set(right["rows"]):
        yield f"rows {sorted(set(right['rows']) - set(found['rows']))} are pending"
    if not original.sealed:
        if _compared(found["run"]) != _compared(right["run"]):
            yield "the run is another"
        return
    for name in ("attempts", "run", "rest"):
        if found[name] != right[name]:
            yield f"the {name} differ: {_difference(right[name], found[name])}"
    if not set(found["failed"].items()) <= set(right["failed"].items()):
        yield f"the reasons differ: {found['failed']}"


def wrong_subjects(original: Original, right: Any, found: Any) -> Iterator[str]:
    """What `bbx show` would draw and should not."""
    if isinstance(found, str) or found is None:
        return
    truth = {one[0]: one for one in right}
    for one in found:
        mine = truth.get(one[0], (None, None, None, None, None))
        # A 1.0 file can say whose picture a row is, and nothing vouches for it. No picture is no wrong one.
        same = one == (*mine[:4], one[4] and mine[4]) if original.sealed else one[2] == mine[2]
        if not same:
            yield f"row {one[0]} is {one}, not {mine}"[:700]
    if original.finished and original.sealed and len(found) != len(right):
        yield f"{len(found)} rows are shown, not {len(right)}, and nothing is said"


def wrong_info(original: Original, right: Seen, seen: Seen) -> Iterator[str]:
    """What `bbx info` says that is not so, and that it does not name itself."""
    if seen.ended["json"].code != 0:
        if seen.ended["info"].code == 0:
            yield "info: says more without --json"
        return
    try:
        mine, found = (json.loads(one.ended["json"].out) for one in (right, seen))
    except ValueError:
        return
    named = any(list(attempt) == ["unreadable"] for attempt in found["attempts"])
    if named and seen.ended["verify"].code == 0:
        yield "info: a start is unreadable, and verify has not seen it"
    for name in mine:
        if name == "attempts" and named:
            continue
        if not original.finished and name in ("done", "failed", "failures", "pending"):
            continue  # judged together below
        if not original.sealed and name in ("attempts", "failures", "path"):
            continue
        one, other = (_compared(value) if name == "run" and not original.sealed else value
                      for value in (mine[name], found[name]))  # fmt: skip
        if one != other:
            yield f"info --json: {name} differs: {_difference(one, other)}"
    if not original.finished and (found["done"] > mine["done"] or found["failed"] > mine["failed"]):
        yield f"info --json: {found['done']} done, {found['failed']} failed"
    same = mine == found
    if same and seen.ended["info"].out != right.ended["info"].out:
        yield f"info: {seen.ended['info'].out[-700:]!r}"


def _compared(run: dict[str, Any]) -> dict[str, Any]:
    """A run without its labels, which no digest covers."""
    return {name: value for name, value in run.items() if name not in ("weights", "source")}


def _difference(mine: Any, found: Any) -> str:
    if isinstance(mine, dict) and isinstance(found, dict):
        names = [name for name in {**mine, **found} if mine.get(name) != found.get(name)]
        return ", ".join(f"{name}: {str(found.get(name))[:120]}" for name in names)
    return f"{str(found)[:300]}"


# The shard's process


class Examiner:
    """Mutates files and gives them to bbx, all below `folder`."""

    def __init__(self, folder: Path) -> None:
        self._children = Children()
        self._work = folder / "work"
        self.originals = mutations.prepare(folder / "home")
        mutations.copy_work(folder / "home", self._work)
        self._watch = Watch(self._work / "outside")
        self._right: dict[str, Seen] = {}

    def untouched(self, name: str) -> Seen:
        """What the untouched file says, which is asked once."""
        if name not in self._right:
            seen = self._quickly(self._work / name, self._fresh()) or Seen()
            wrong = [what for command, ended in seen.ended.items() for what in manners(command, ended)]
            if wrong or any(ended.code for ended in seen.ended.values()) or isinstance(seen.facts, str):
                raise RuntimeError(f"the untouched {name}: {wrong}, {seen}")
            self._right[name] = seen
        return self._right[name]

    def warm(self) -> None:
        """One call of each command in this process: what they import, and the parser of the command line, is kept."""
        import typer.main

        typer.main.get_command = functools.cache(typer.main.get_command)
        for words in COMMANDS.values():
            with contextlib.chdir(self._work / "plain"), contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())):
                with pytest.raises(SystemExit) as ended:
                    command(words, whole=False)()
                assert not ended.value.code, words
        with contextlib.chdir(self._work / "plain"):
            look(self._fresh())()
        shutil.rmtree(self._work / "plain" / "drawn")

    def examine(self, case: Case) -> tuple[Seen, list[str]]:
        """One case: what was seen, and what there is to object to."""
        original, folder = self.originals[case.original], self._work / case.original
        right = self.untouched(case.original)
        place = folder / original.target
        made = self._children.run(lambda: mutations.mutate(case, original, place) or 0, folder)
        if made.code:
            raise RuntimeError(f"{case} cannot be made: {made.err[-900:]}")
        self._watch.seen()
        drawn = case.seed % DRAWN == 0
        seen = None if case.seed % WHOLE == 0 else self._quickly(folder, self._fresh())
        if seen and drawn:
            seen.ended["show"] = self._drawn(folder)
        # What goes wrong in one process is judged by what it does in several, as the console entry has it.
        if seen is None or self._watch.seen() or list(objections(case, original, right, seen)):
            seen = self._thoroughly(folder, self._fresh(), drawn=drawn)
            seen.strayed = self._watch.seen()
        place.unlink()
        place.write_bytes(original.data)
        return seen, list(objections(case, original, right, seen))

    def _drawn(self, folder: Path) -> Ended:
        shutil.rmtree(folder / "drawn", ignore_errors=True)
        return self._children.run(command(COMMANDS["show"], whole=True), folder)

    def _fresh(self) -> Path:
        report = self._work / "report"
        report.unlink(missing_ok=True)
        return report

    def _quickly(self, folder: Path, report: Path) -> Seen | None:
        """All commands in one child, one after the other; None where it did not come through."""
        ended = self._children.run(limited(together(self._work, report)), folder)
        if ended.code:
            return None
        seen = Seen()
        for word, code in json.loads((self._work / "codes").read_text()).items():
            out, err = ((self._work / f"{word}.{end}").read_text(errors="backslashreplace") for end in ("out", "err"))
            seen.ended[word] = Ended(code, out, err)
        seen.ended["look"] = ended
        seen.read(report)
        return seen

    def _thoroughly(self, folder: Path, report: Path, *, drawn: bool) -> Seen:
        """Each command by itself, as its console entry runs it."""
        seen = Seen()
        for word, words in COMMANDS.items():
            if word != "show":
                seen.ended[word] = self._children.run(command(words, whole=True), folder)
        if drawn:
            seen.ended["show"] = self._drawn(folder)
        seen.ended["look"] = self._children.run(limited(look(report)), folder)
        seen.read(report)
        return seen


# The judge is judged: what each of these breaks, the harness must object to.


def _no_checksums() -> None:
    from bbx.store import check

    real = check.read_checked

    def believing(access: Any, stage: str, rows: Any) -> Any:
        values, good = real(access, stage, rows)
        return values, good | True

    check.read_checked = believing


def _no_seals() -> None:
    import numpy as np

    from bbx.store import trust

    trust.OpenFile.broken_seals = lambda _self: np.empty(0, np.int64)  # type: ignore[method-assign]


def _no_row_check() -> None:
    from bbx.store import FeatureFile

    FeatureFile.check_row = lambda *_args: None  # type: ignore[method-assign]


def _raises() -> None:
    from bbx import facts

    facts.of_file = lambda _file: {}["rows"]  # type: ignore[assignment,return-value]


def _hangs() -> None:
    from bbx import console

    globals()["PATIENCE"] = 1.0
    console.info = lambda _file: time.sleep(60)  # type: ignore[assignment]


def _strays() -> None:
    from bbx import console

    console.info = lambda _file: Path(f"../{mutations.CANARY}").read_bytes()  # type: ignore[assignment]


def _allocates() -> None:
    import numpy as np

    from bbx import console

    console.info = lambda _file: np.zeros(1 << 32, np.uint8)  # type: ignore[assignment]


def _trusts_text() -> None:
    from rich.text import Text

    from bbx import console

    console.plain = lambda text: Text(str(text))


SABOTAGE: dict[str, tuple[Callable[[], None], str, str]] = {
    "no checksums": (_no_checksums, "flip features", "verify says all is well"),
    "no seals": (_no_seals, "flip keys", "verify says all is well"),
    "no row check": (_no_row_check, "flip features", "show: row"),
    "raises": (_raises, "added", "internal"),
    "hangs": (_hangs, "added", "hung"),
    "strays": (_strays, "added", "outside the folder"),
    "allocates": (_allocates, "added", "memory"),
    "trusts text": (_trusts_text, "added", "info: "),
}
"""How bbx is broken, on which kind of file it shows, and what the objection is."""


def serve(folder: Path, words: Sequence[str]) -> int:
    """Examines the cases on stdin, one a line, and prints what came of each as JSON."""
    import bbx.reports
    import bbx.show
    import bbx.verify  # noqa: F401  (all warm before the forks)

    examiner = Examiner(folder)
    examiner.warm()
    if words:
        for name in ("plain", "odd"):
            examiner.untouched(name)  # the truth, while it is known
        SABOTAGE[" ".join(words)][0]()
    gc.freeze()
    for line in sys.stdin:
        case = Case.of(line.strip())
        seen, found = examiner.examine(case)
        codes = {name: ended.code for name, ended in seen.ended.items()}
        sys.stdout.write(json.dumps({"case": str(case), "codes": codes, "objections": found}) + "\n")
        sys.stdout.flush()
    return 0


def examined(folder: Path, cases: Sequence[Case], sabotage: str = "") -> list[dict[str, Any]]:
    """What came of the cases, in a process of their own."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.faults.test_fuzz", str(folder), *sabotage.split()],
        cwd=ROOT,
        # One thread each: a process with more cannot be forked safely, and OpenBLAS would start some.
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
             "MPLBACKEND": "agg", "HDF5_PLUGIN_PRELOAD": "::"},
        input="".join(f"{case}\n" for case in cases),
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


# The tests


@pytest.mark.parametrize("shard", range(SHARDS))
def test_a_mutated_file_is_an_error_or_the_right_answer(tmp_path: Path, scale: float, shard: int) -> None:
    count = round(FILES * scale)
    found = examined(tmp_path, mutations.cases(shard * count, (shard + 1) * count))
    assert len(found) == count
    wrong = {one["case"]: one["objections"] for one in found if one["objections"]}
    assert not wrong, json.dumps(wrong, indent=1)
    # Otherwise the mutations missed all that matters, or no file was let through at all.
    codes = [one["codes"]["verify"] for one in found]
    assert {0, 3, 4} <= set(codes)


def test_every_kind_meets_every_original() -> None:
    cases = mutations.cases(0, SHARDS * FILES)
    assert len(cases) >= 2000
    assert len({str(case) for case in cases}) == len(cases)
    assert {(case.kind, case.original) for case in cases} == {(kind, name) for kind in KINDS for name in ORIGINALS}


@pytest.mark.parametrize("how", SABOTAGE)
def test_the_harness_objects_to_a_bbx_that(tmp_path: Path, how: str) -> None:
    _, kind, objection = SABOTAGE[how]
    cases = [Case(kind, name, seed) for name in ("plain", "odd") for seed in range(1, 5)]
    found = examined(tmp_path, cases, how)
    assert any(objection in text for one in found for text in one["objections"]), found


if __name__ == "__main__":
    sys.exit(serve(Path(sys.argv[1]), sys.argv[2:]))
