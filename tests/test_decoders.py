"""A decoder that crashes, hangs or raises costs one row; nothing it does reaches the run or its neighbours."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bbx
from bbx.errors import StartError
from bbx.images import Decoders, DecodeSettings, decoders, process, read_image
from bbx.runner import extract
from tests.toy import PREPROCESS

# A decoder whose fate hangs on the file's name; the rest is the very worker that bbx runs.
FATES = """
import os, signal, sys, time
from bbx.images import worker
real = worker.decode
def decode(path, *rest, **options):
    name = os.path.basename(path)
    if "segfault" in name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "once" in name and not os.path.exists(path + ".seen"):
        open(path + ".seen", "x").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if "memory" in name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "hang" in name:
        while True:
            time.sleep(3600)
    if "exit" in name:
        sys.exit(7)
    if "strange" in name:
        raise type("Strange", (BaseException,), {})("from a plugin")
    if "half" in name:
        os.write(worker_out, b'{"reason": "", "file": [1, 2')
        os._exit(3)
    if "talk" in name:
        print("a library that prints", flush=True)
        os.write(1, b"and one in C")
    return real(path, *rest, **options)
worker.decode = decode
private = worker._private_stdout
def _private_stdout():
    global worker_out
    pipe = private()
    worker_out = pipe.fileno()
    return pipe
worker._private_stdout = _private_stdout
worker.main()
"""
REASONS = {
    "segfault": r"the decoder crashed \(SIGSEGV\)",
    "memory": r"the decoder was killed \(SIGKILL; is the memory full\?\)",
    "hang": r"took longer than 1 s to decode \(--image-timeout\)",
    "exit": "decoding raised SystemExit",
    "strange": "decoding raised Strange",
    "half": r"the decoder crashed \(exit code 3\)",
}


@pytest.fixture
def fates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoders that obey file names."""
    code = f"import sys, json; sys.path[:] = json.loads(sys.argv[1]); exec({FATES!r})"
    monkeypatch.setattr(process, "_COMMAND", code)


@pytest.mark.parametrize("fate", REASONS)
def test_a_decoder_that_dies_costs_one_row(tmp_path: Path, picture, fates: None, fate: str) -> None:
    for number in range(24):
        picture(tmp_path / "in" / f"{number:03}{fate if number == 9 else ''}.png", number)
    bad = f"009{fate}.png"
    summary = extract(tmp_path / "in", model="toy", output=tmp_path / "f.h5", workers=2, batch_size=4, image_timeout=1)
    assert (summary.done, summary.failed) == (23, 1)
    with bbx.open(tmp_path / "f.h5") as file:
        assert list(file.failed) == [bad]
        assert re.fullmatch(REASONS[fate], file.failed[bad])
        assert file.inputs([bad])[0].nbytes == (tmp_path / "in" / bad).stat().st_size or fate in ("exit", "strange")
    (tmp_path / "in" / bad).unlink()
    extract(tmp_path / "in", model="toy", output=tmp_path / "rest.h5", workers=1, batch_size=4)
    with bbx.open(tmp_path / "f.h5") as file, bbx.open(tmp_path / "rest.h5") as rest:
        for key in rest.keys:
            np.testing.assert_allclose(file["stage2", key], rest["stage2", key], rtol=1e-6, atol=1e-7)


def test_a_decoder_that_was_its_neighbours_victim_gets_a_second_chance(tmp_path: Path, picture, fates: None) -> None:
    for number in range(8):
        picture(tmp_path / "in" / f"{number}{'once' * (number == 3)}.png", number)
    assert extract(tmp_path / "in", model="toy", output=tmp_path / "f.h5").done == 8


def test_what_a_library_prints_is_not_taken_for_pixels(tmp_path: Path, picture, fates: None) -> None:
    path = picture(tmp_path / "talk.png")
    slot = np.zeros((32, 32, 3), np.uint8)
    with Decoders(1, DecodeSettings(PREPROCESS)) as pool:
        assert pool.submit(str(path), slot).result().reason == ""
    np.testing.assert_array_equal(slot, read_image(path, PREPROCESS))


def test_a_slot_without_an_image_is_zero(tmp_path: Path, picture, fates: None) -> None:
    slot = np.ones((32, 32, 3), np.uint8)
    with Decoders(1, DecodeSettings(PREPROCESS)) as pool:
        assert pool.submit(str(picture(tmp_path / "segfault.png")), slot).result().reason
    assert not slot.any()


def test_time_that_a_stopped_process_did_not_have_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    one = object.__new__(process.Process)
    one._clock, one._busy, one._seconds, one._ready, one.overdue = (
        threading.Lock(),
        True,
        0,
        True,
        False,
    )
    killed = []
    monkeypatch.setattr(one, "kill", lambda: killed.append(True))
    for _ in range(10):
        one.tick(2 * decoders._TICK, 6)
    assert not killed
    one.tick(2, 6)
    assert killed
    assert one.overdue


def test_a_decoder_that_cannot_start_is_no_images_fault(tmp_path: Path, picture, monkeypatch) -> None:
    monkeypatch.setattr(process, "_COMMAND", "raise SystemExit(5)")
    picture(tmp_path / "in" / "a.png")
    with pytest.raises(StartError, match=r"a decoding process ended at once .*exit code 5"):
        extract(tmp_path / "in", model="toy", output=tmp_path / "f.h5")
    monkeypatch.undo()
    assert bbx.FeatureFile(tmp_path / "f.h5", partial=True).counts == (0, 0, 1)


def test_the_digest_is_of_the_bytes_that_were_decoded(tmp_path: Path, picture) -> None:
    import hashlib

    path = picture(tmp_path / "in" / "a.png")
    extract(tmp_path / "in", model="toy", output=tmp_path / "f.h5")
    extract(tmp_path / "in", model="toy", output=tmp_path / "g.h5", digest=False)
    right = (path.stat().st_size, path.stat().st_mtime_ns, hashlib.blake2b(path.read_bytes(), digest_size=16).digest())
    assert bbx.open(tmp_path / "f.h5").inputs() == [right]
    assert bbx.open(tmp_path / "g.h5").inputs() == [(*right[:2], b"")]


@pytest.mark.parametrize(("limit", "decoded"), [(1920, True), (1919, False), (1, False)])
def test_the_largest_image_to_decode_is_the_users_choice(tmp_path: Path, picture, limit: int, decoded: bool) -> None:
    picture(tmp_path / "in" / "a.png", size=(48, 40))
    summary = extract(tmp_path / "in", model="toy", output=tmp_path / "f.h5", max_pixels=limit)
    assert summary.done == decoded
    if not decoded:
        assert f"too large (1920 pixels, limit {limit})" in summary.failures["a.png"]


def test_a_limit_above_pillows_own_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    Image.new("1", (16_000, 12_000)).save(tmp_path / "in" / "large.png")
    options = {"model": "toy", "output": tmp_path / "f.h5", "mode": "overwrite"}
    assert "too large" in extract(tmp_path / "in", **options).failures["large.png"]
    assert extract(tmp_path / "in", max_pixels=192_000_000, **options).done == 1


def test_a_file_that_changes_while_it_is_read_is_a_failed_row(tmp_path: Path, picture, monkeypatch) -> None:
    from bbx.images import read, source

    path = picture(tmp_path / "a.png")
    real = source.facts_of

    def grown(file):
        found = real(file)
        with path.open("ab") as more:
            more.write(b"x")
        return found

    monkeypatch.setattr(source, "facts_of", grown)
    assert read.decode(path, PREPROCESS).reason == "the file changed while it was read"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_decoder_outlives_its_run(tmp_path: Path, picture, fates: None, how: int) -> None:
    """Not even one that hangs, though nobody is left to end it."""
    picture(tmp_path / "in" / "hang.png")
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from bbx.images import DecodeSettings, Decoders, process
from tests.toy import PREPROCESS
import numpy as np
process._COMMAND = {process._COMMAND!r}
pool = Decoders(1, DecodeSettings(PREPROCESS))
pool.submit({str(tmp_path / "in" / "hang.png")!r}, np.zeros((32, 32, 3), np.uint8))
while not pool._processes or not pool._processes[0]._ready: pass
print(pool._processes[0]._child.pid, flush=True)
pool._threads.shutdown()
"""
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert run.stdout is not None
    decoder = int(run.stdout.readline())
    run.send_signal(how)
    run.wait()
    deadline = time.monotonic() + 30
    while _runs(decoder):
        assert time.monotonic() < deadline
        os.sched_yield()


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
    except OSError:
        return False


def test_processes_started_ahead_are_taken_and_the_rest_ended(tmp_path: Path, picture) -> None:
    slot = np.zeros((32, 32, 3), np.uint8)
    with process.started_ahead(2):
        first, second = process._ahead
        with Decoders(1, DecodeSettings(PREPROCESS)) as pool:
            assert pool.submit(str(picture(tmp_path / "a.png")), slot).result().reason == ""
            assert pool._processes == [second]
            assert process._ahead == [first]
        assert not second.alive()
        assert first.alive()
    assert not first.alive()
    assert process._ahead == []


def test_a_process_that_is_asked_nothing_says_nothing() -> None:
    command = [sys.executable, "-c", process._COMMAND, json.dumps(sys.path)]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"", b"")


def test_what_is_no_text_among_pythons_places_is_passed_over(tmp_path: Path, picture, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(process.sys, "path", [tmp_path, *sys.path])
    picture(tmp_path / "in" / "a.png")
    assert extract(tmp_path / "in", model="toy", output=tmp_path / "f.h5").done == 1


def test_a_python_within_another_program_is_told_what_to_set(tmp_path: Path, picture, monkeypatch) -> None:
    monkeypatch.setattr(process.sys, "executable", "")
    picture(tmp_path / "in" / "a.png")
    with pytest.raises(StartError, match=r"sys\.executable"):
        extract(tmp_path / "in", model="toy", output=tmp_path / "f.h5")


def test_what_cannot_be_started_ahead_is_told_by_whoever_needs_it(monkeypatch) -> None:
    monkeypatch.setattr(process.sys, "executable", "/nonexistent")
    with process.started_ahead(2):
        assert process._ahead == []
    slot = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(StartError, match="no decoding process can be started"), \
            Decoders(1, DecodeSettings(PREPROCESS)) as pool:  # fmt: skip
        pool.submit("a.png", slot).result()
