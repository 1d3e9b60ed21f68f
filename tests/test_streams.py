"""Several streams at once: errors, signals, a full memory, kills and retries end as they do with one."""

from __future__ import annotations

import faulthandler
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bbx
from bbx.backbone import Backbone
from bbx.cli.signals import Signalled
from bbx.engine import Computed
from bbx.engine.compute import Compute
from bbx.engine.pack import ANY
from bbx.errors import ImageError, InterruptedRunError, RunMismatchError, StartError, WriteError
from bbx.plan import Plan
from bbx.runner import extract
from bbx.spec import InputFile
from bbx.store import FeatureWriter
from bbx.writing import Bad, Job, Writing
from tests.faults.evidence import datasets
from tests.test_loop import TOLERANCE, largest_difference

ROOT = Path(__file__).parent.parent
IMAGES, BATCH = 24, 2
OPTIONS = {"model": "toy", "stages": "all", "batch_size": BATCH, "device": "cpu", "workers": 1}


def children() -> set[str]:
    """This process's own, on Linux."""
    found: set[str] = set()
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
            found.update(task.read_text().split())
    return found


@pytest.fixture(autouse=True)
def three_threads():
    """A budget of three threads, so three streams; afterwards no thread of bbx is left, nor a process."""
    before, others, threads = torch.get_num_threads(), children(), set(threading.enumerate())
    torch.set_num_threads(3)
    faulthandler.dump_traceback_later(300, exit=True)  # what hangs, hangs in a thread that pytest cannot end
    yield
    faulthandler.cancel_dump_traceback_later()
    assert torch.get_num_threads() == 3  # a run leaves this as it was
    torch.set_num_threads(before)
    left = set(threading.enumerate()) - threads  # another test's may live on in the traceback that pytest shows
    assert [one.name for one in left if one.name.startswith("bbx")] == []
    assert children() <= others


@pytest.fixture
def album(tmp_path: Path, picture) -> Path:
    for number in range(IMAGES):
        picture(tmp_path / "album" / f"{number:03}.png", number)
    return tmp_path / "album"


def whiten(album: Path, row: int) -> None:
    """Marks a picture so that what computes it can tell."""
    Image.new("RGB", (48, 40), "white").save(album / f"{row:03}.png")


def is_white(pixels: np.ndarray) -> bool:
    return bool((pixels == 255).all(axis=(1, 2, 3)).any())


def done_rows(path: Path) -> list[int]:
    with bbx.FeatureFile(path, partial=True) as file:
        return file.done.tolist()


def assert_same_file(one: Path, other: Path) -> None:
    mine, theirs = datasets(one), datasets(other)
    assert mine.keys() == theirs.keys()
    for name, values in mine.items():
        np.testing.assert_array_equal(values, theirs[name], err_msg=name)


class Gate:
    """Holds every batch that a stream begins, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = 0
        self.opened = threading.Event()
        real, counting = Compute.maps, threading.Lock()

        def held(compute: Compute, *batch: np.ndarray) -> Computed:
            with counting:
                self.begun += 1
            assert self.opened.wait(60)
            return real(compute, *batch)

        monkeypatch.setattr(Compute, "maps", held)

    def open_soon(self) -> None:
        """Once whoever called has had time to go on."""
        timer = threading.Timer(1.0, self.opened.set)
        timer.daemon = True
        timer.start()

    def stop(self, after: int, then: Callable[[], int]) -> Callable[[], int | None]:
        """What the loop asks after each batch: at the one numbered `after`, all streams being at work, `then()`."""
        asked = iter(range(1, 999))

        def ask() -> int | None:
            if next(asked) < after:
                return None
            last = time.monotonic() + 60
            while self.begun < 3:
                assert time.monotonic() < last, "fewer streams than three"
                time.sleep(0.001)
            self.open_soon()
            return then()

        return ask


@pytest.mark.parametrize("batch", [0, 4, IMAGES // BATCH - 1])
def test_an_error_in_a_stream_ends_the_run_and_what_came_before_is_committed(album, tmp_path, monkeypatch, batch):
    real = Compute.maps

    def broken(self: Compute, pixels: np.ndarray, kept: np.ndarray) -> Computed:
        if is_white(pixels):
            raise RuntimeError("shape mismatch")
        return real(self, pixels, kept)

    whiten(album, batch * BATCH + 1)
    plans: list[Plan] = []
    with monkeypatch.context() as patched:
        patched.setattr(Compute, "maps", broken)
        with pytest.raises(RuntimeError, match="shape mismatch"):
            extract(album, output=tmp_path / "f.h5", on_plan=plans.append, **OPTIONS)
    assert (plans[0].engine.streams, plans[0].engine.threads) == (3, 1)
    done = done_rows(tmp_path / "f.h5")
    assert done[: batch * BATCH] == list(range(batch * BATCH))
    assert not {batch * BATCH, batch * BATCH + 1} & set(done)
    extract(album, output=tmp_path / "f.h5", **OPTIONS)
    extract(album, output=tmp_path / "whole.h5", **OPTIONS)
    assert_same_file(tmp_path / "f.h5", tmp_path / "whole.h5")


@pytest.mark.parametrize("batch", [0, 4, IMAGES // BATCH - 1])
def test_an_error_of_the_disk_ends_the_run_and_what_came_before_is_committed(album, tmp_path, monkeypatch, batch):
    real = FeatureWriter.write

    def full(self: FeatureWriter, rows: np.ndarray, *rest: object) -> None:
        if rows[0] >= batch * BATCH:
            raise WriteError(f"no room for row {rows[0]}")
        real(self, rows, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(FeatureWriter, "write", full)
        with pytest.raises(WriteError, match=f"row {batch * BATCH}$"):
            extract(album, output=tmp_path / "f.h5", **OPTIONS)
    assert done_rows(tmp_path / "f.h5") == list(range(batch * BATCH))
    assert extract(album, output=tmp_path / "f.h5", **OPTIONS).extracted == IMAGES - batch * BATCH


@pytest.mark.parametrize("batches", range(1, IMAGES // BATCH, 3))
def test_stopped_after_any_batch_and_resumed_it_comes_to_the_same_file(album, tmp_path, batches):
    (album / "005.png").write_bytes(b"not an image")
    (album / "016.png").write_bytes(b"not an image")
    (album / "017.png").write_bytes(b"not an image")
    asked = iter(range(1, 999))
    with pytest.raises(InterruptedRunError):
        extract(album, output=tmp_path / "f.h5", stop=lambda: 15 if next(asked) >= batches else None, **OPTIONS)
    assert extract(album, output=tmp_path / "f.h5", **OPTIONS).failed == 3
    extract(album, output=tmp_path / "whole.h5", **OPTIONS)
    assert_same_file(tmp_path / "f.h5", tmp_path / "whole.h5")


def test_the_first_signal_waits_for_batches_that_are_begun_and_for_no_other(album, tmp_path, monkeypatch):
    (album / "001.png").write_bytes(b"not an image")
    (album / "009.png").write_bytes(b"not an image")
    gate, told = Gate(monkeypatch), []
    with pytest.raises(InterruptedRunError):
        extract(album, output=tmp_path / "f.h5", stop=gate.stop(6, lambda: 15),
                progress=lambda summary: told.append((summary.done, summary.failed)), **OPTIONS)  # fmt: skip
    assert gate.begun == 3
    assert told[-1] == (5, 1)
    assert done_rows(tmp_path / "f.h5") == [0, 2, 3, 4, 5]
    with bbx.FeatureFile(tmp_path / "f.h5", partial=True) as file:
        assert list(file.failed) == ["001.png"]  # 009.png was let go of with its batch
    assert extract(album, output=tmp_path / "f.h5", **OPTIONS).failed == 2


def test_a_signal_while_the_last_batches_are_computed_is_obeyed(album, tmp_path, monkeypatch):
    real = Compute.maps

    def slow(self: Compute, *batch: np.ndarray) -> Computed:
        if not stopped.wait(0 if is_white(batch[0]) else 60):
            assert is_white(batch[0])
        return real(self, *batch)

    # Six batches are as many as may wait: all are on their way when the first is waited for, and that one alone ends.
    whiten(album, 0)
    asked, stopped = iter(range(1, 999)), threading.Event()

    def stop() -> int | None:
        if next(asked) <= 5:
            return None
        timer = threading.Timer(1.0, stopped.set)
        timer.start()
        return 2

    monkeypatch.setattr(Compute, "maps", slow)
    with pytest.raises(InterruptedRunError):
        extract(album, output=tmp_path / "f.h5", stop=stop, **{**OPTIONS, "batch_size": IMAGES // 6})
    done = done_rows(tmp_path / "f.h5")
    assert done == list(range(len(done)))
    assert 4 <= len(done) < IMAGES


def test_a_second_signal_waits_for_no_batch_that_is_not_begun_and_writes_none(album, tmp_path, monkeypatch):
    def signalled() -> int:
        raise Signalled(2)

    gate = Gate(monkeypatch)
    with pytest.raises(Signalled):
        extract(album, output=tmp_path / "f.h5", stop=gate.stop(6, signalled), **OPTIONS)
    assert gate.begun == 3
    assert done_rows(tmp_path / "f.h5") == []
    assert extract(album, output=tmp_path / "f.h5", **OPTIONS).extracted == IMAGES


def test_two_streams_that_run_out_of_memory_at_once_halve_the_batch_once(album, tmp_path, monkeypatch):
    real, storing = Backbone.__call__, Compute._stored
    both, failures, counting = threading.Barrier(2), [], threading.Lock()

    def with_nan(self: Backbone, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        made = {name: tensor.clone() for name, tensor in real(self, pixels).items()}
        made["stem"][:, 0] = float("nan")
        return made

    def full(self: Compute, name: str, tensor: torch.Tensor, *rest: object) -> torch.Tensor:
        if name != "stem" and len(tensor) > 4:  # the stem is counted by then
            with counting:
                failures.append(len(tensor))
                first = len(failures) <= 2
            if first:
                both.wait(60)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return storing(self, name, tensor, *rest)

    options = {**OPTIONS, "batch_size": 6}
    monkeypatch.setattr(Backbone, "__call__", with_nan)
    whole = extract(album, output=tmp_path / "whole.h5", **options)
    monkeypatch.setattr(Compute, "_stored", full)
    halved = extract(album, output=tmp_path / "halved.h5", **options)
    assert len(failures) >= 2
    assert [note for note in halved.notes if "out of memory" in note] == [
        "cpu is out of memory with 6 images at once: on with 3 (--batch-size)"
    ]
    assert halved.nonfinite == whole.nonfinite == {"stem": IMAGES * 16 * 16}
    mine, theirs = datasets(tmp_path / "halved.h5"), datasets(tmp_path / "whole.h5")
    for stage in ("stem", "stage1", "stage2"):
        np.testing.assert_allclose(mine[stage], theirs[stage], rtol=0, atol=TOLERANCE * np.nanmax(np.abs(mine[stage])))


def test_failed_rows_are_retried(album, tmp_path):
    good = {row: (album / f"{row:03}.png").read_bytes() for row in (0, 7, 8, 9, 23)}
    for row in good:
        (album / f"{row:03}.png").write_bytes(b"not yet")
    assert extract(album, output=tmp_path / "f.h5", **OPTIONS).failed == len(good)
    for row, data in good.items():
        (album / f"{row:03}.png").write_bytes(data)
    again = extract(album, output=tmp_path / "f.h5", retry_failed=True, **OPTIONS)
    assert (again.extracted, again.failed, again.done) == (len(good), 0, IMAGES)
    extract(album, output=tmp_path / "whole.h5", **OPTIONS)
    assert largest_difference(tmp_path / "f.h5", tmp_path / "whole.h5") <= TOLERANCE


KILLED = """
import os, signal, sys, torch
from bbx.engine import pack, settings
from bbx.runner import extract
from bbx.store import commit

def kill(summary):
    if summary.done >= 8:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(3)
commit.COMMIT_NBYTES = 1
settings.TRIAL_PAYS, pack.faster_up_to, settings.quota = 1, lambda: pack.ANY, lambda: 3.0
extract(sys.argv[1], model=sys.argv[2], weights="random", stages="0-2", batch_size=2, device="cpu", workers=1,
        deterministic=True, output=sys.argv[3], progress=kill)
"""


@pytest.mark.parametrize(("model", "how"), [("resnet18", "batch norm folded"), ("swin_t", "packed")])
def test_deterministic_bits_survive_a_kill_with_folded_and_packed_layers(album, tmp_path, monkeypatch, model, how):
    for row in range(14, IMAGES):
        (album / f"{row:03}.png").unlink()
    monkeypatch.setattr("bbx.engine.settings.TRIAL_PAYS", 1)
    monkeypatch.setattr("bbx.engine.pack.faster_up_to", lambda: ANY)
    options = {**OPTIONS, "model": model, "weights": "random", "stages": "0-2", "deterministic": True}
    plans: list[Plan] = []
    extract(album, output=tmp_path / "whole.h5", on_plan=plans.append, **options)
    words = [sys.executable, "-c", textwrap.dedent(KILLED), str(album), model, str(tmp_path / "f.h5")]
    killed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    torch.set_num_threads(2)  # other streams, as many threads each
    rest = extract(album, output=tmp_path / "f.h5", on_plan=plans.append, **options)
    torch.set_num_threads(3)
    assert 0 < rest.extracted < 14
    assert [plan.engine.streams for plan in plans] == [3, 2]
    assert all(how in plan.engine.describe() for plan in plans)
    assert_same_file(tmp_path / "f.h5", tmp_path / "whole.h5")


# What decides the bits of a --deterministic run


def begun(album: Path, path: Path, **options: object) -> dict[str, object]:
    """A run of few batches, begun with `options` and stopped; the options."""
    whole = {**OPTIONS, "batch_size": 12, "deterministic": True, **options}
    with pytest.raises(InterruptedRunError):
        extract(album, output=path, stop=lambda: 15, **whole)
    return whole


@pytest.mark.parametrize("before", [2, 4])
def test_a_resumed_deterministic_run_with_other_threads_per_batch_is_refused(album, tmp_path, before):
    torch.set_num_threads(before)  # two batches: two streams of one or two threads each
    options = begun(album, tmp_path / "f.h5")
    torch.set_num_threads(6 - before)
    with pytest.raises(RunMismatchError, match="threads per batch") as caught:
        extract(album, output=tmp_path / "f.h5", **options)
    assert f"OMP_NUM_THREADS={before} before the same command" in caught.value.hint
    assert "--mode overwrite" in caught.value.hint
    torch.set_num_threads(before)
    assert extract(album, output=tmp_path / "f.h5", **options).extracted == 12
    torch.set_num_threads(3)


def test_a_resumed_deterministic_run_may_have_other_streams(album, tmp_path):
    torch.set_num_threads(2)
    options = begun(album, tmp_path / "f.h5")
    plans: list[Plan] = []
    torch.set_num_threads(1)
    try:
        assert extract(album, output=tmp_path / "f.h5", on_plan=plans.append, **options).extracted == 12
    finally:
        torch.set_num_threads(3)
    assert plans[0].notes == ()
    with bbx.open(tmp_path / "f.h5") as file:
        assert [start["engine"].rpartition(", ")[2] for start in file.attempts] == ["2 × 1 thread", "1 × 1 thread"]


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        ({"batch_size": 6}, "batch size", "--batch-size 12"),
        ({"channels_last": "no"}, "engine", "--channels-last"),
        ({}, "torch", "pip install torch=="),
    ],
)
def test_a_resumed_deterministic_run_is_refused_by_what_would_change_its_bits(
    album, tmp_path, monkeypatch, change, name, words
):
    options = begun(album, tmp_path / "f.h5")
    if not change:
        monkeypatch.setattr("bbx.plan.metadata.version", lambda package: "0.1")
    with pytest.raises(RunMismatchError, match=f"begun with {name}") as caught:
        extract(album, output=tmp_path / "f.h5", **{**options, **change})
    assert words in caught.value.hint
    loose = {**options, **change, "deterministic": False}
    assert extract(album, output=tmp_path / "f.h5", **loose).extracted == 12


def test_rows_of_another_machine_or_without_the_option_are_told_of(album, tmp_path, monkeypatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("socket.gethostname", lambda: "node7")
        options = begun(album, tmp_path / "f.h5", deterministic=False)
    plans: list[Plan] = []
    extract(album, output=tmp_path / "f.h5", on_plan=plans.append, **{**options, "deterministic": True})
    assert ["without --deterministic" in note or "node7" in note for note in plans[0].notes] == [True, True]


def test_a_batch_that_memory_does_not_hold_ends_a_deterministic_run(album, tmp_path, monkeypatch):
    real = Backbone.__call__

    def full(self: Backbone, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        if len(pixels) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, pixels)

    monkeypatch.setattr(Backbone, "__call__", full)
    options = {**OPTIONS, "deterministic": True, "output": tmp_path / "f.h5"}
    with pytest.raises(StartError, match="12 images at once, and fewer would give other last bits") as caught:
        extract(album, **{**options, "batch_size": 12})
    assert "--batch-size 6" in caught.value.hint
    # No row was done so far, so that another batch size mixes nothing; nor does that start count against a later one.
    options["batch_size"] = 6
    with pytest.raises(InterruptedRunError):
        extract(album, stop=lambda: 15, **options)
    assert extract(album, **options).done == IMAGES


# The writing alone, whose batches are told what becomes of them


class Kept:
    """A sink that takes any row but those `refused`."""

    def __init__(self, *refused: int) -> None:
        self.rows: list[int] = []
        self.failed: list[int] = []
        self._refused = refused

    def write(self, rows: np.ndarray, maps: object, inputs: object) -> None:
        if rows[0] in self._refused:
            raise WriteError(f"no room for row {rows[0]}")
        self.rows += rows.tolist()

    def fail(self, row: int, reason: str, input: InputFile | None = None) -> None:
        self.failed.append(row)


def job(row: int) -> tuple[Job, Future[Computed]]:
    """A batch of one good row and a bad one."""
    computing: Future[Computed] = Future()
    return Job(np.array([row]), [InputFile()], computing, [Bad(row + 100, "bad", InputFile())]), computing


def leave(writing: Writing, jobs: Sequence[Job], error: BaseException, then: Callable[[], object]) -> None:
    """Adds `jobs`, does `then`, and leaves by `error`."""
    with writing:
        for one in jobs:
            writing.add(one)
        then()
        raise error


def test_what_no_stream_has_begun_is_let_go_of_with_its_bad_rows():
    sink, told = Kept(), []
    writing = Writing(sink, 9, told.append)
    jobs, futures = zip(*map(job, range(4)), strict=True)

    def drop() -> None:
        futures[1].set_running_or_notify_cancel()
        assert writing.drop() == 2
        for future in futures[:2]:
            future.set_result(Computed())

    with pytest.raises(InterruptedRunError):
        leave(writing, jobs, InterruptedRunError("stopped"), drop)
    assert [future.cancelled() for future in futures] == [False, False, True, True]
    assert (sink.rows, sink.failed) == ([0, 1], [100, 101])
    assert [(one.done, len(one.bad)) for one in told] == [(1, 1), (1, 1), (0, 0), (0, 0)]


@pytest.mark.parametrize("error", [Signalled(2), KeyboardInterrupt(), WriteError("full"), RuntimeError("broken")])
def test_any_other_error_begins_nothing_and_writes_nothing_more(error):
    sink = Kept()
    jobs, (running, waiting) = zip(*map(job, range(2)), strict=True)

    def begin() -> None:
        running.set_running_or_notify_cancel()
        threading.Timer(0.5, running.set_result, [Computed()]).start()

    with pytest.raises(type(error)):
        leave(Writing(sink, 9, lambda _: None), jobs, error, begin)
    assert waiting.cancelled()
    assert (sink.rows, sink.failed) == ([], [])


@pytest.mark.parametrize("error", [InterruptedRunError("stopped"), ImageError("bad")])
def test_a_write_that_fails_on_the_way_out_is_a_note_of_the_first_error(error):
    sink = Kept(1)
    jobs, futures = zip(*map(job, range(3)), strict=True)
    for future in futures:
        future.set_result(Computed())
    with pytest.raises(type(error)) as caught:
        leave(Writing(sink, 9, lambda _: None), jobs, error, lambda: None)
    assert caught.value.__notes__ == ["and not all images before that were written: no room for row 1"]
    assert sink.rows[0] == 0
