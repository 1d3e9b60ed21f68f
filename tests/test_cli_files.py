"""`verify`, `diff`, `merge`, `export` at the shell: what they print, where, and the codes that they exit with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

import bbx
from bbx.cli.shield import _HEAR_SECONDS


@pytest.fixture
def done(bbx_cli, pictures, tmp_path) -> Path:
    """`features.h5`, all stages, in the current folder."""
    assert bbx_cli("extract", "--model", "toy", "--stages", "all", "-q", "pictures").code == 0
    return tmp_path / "features.h5"


def spoil(path: Path, name: str, row: int = 3) -> None:
    """Flips a bit of a row."""
    with h5py.File(path) as file:
        data = file[name]
        offset = data.id.get_offset() + row * data.id.get_storage_size() // len(data)
    with path.open("r+b") as raw:
        raw.seek(offset)
        byte = raw.read(1)[0]
        raw.seek(offset)
        raw.write(bytes([byte ^ 1]))


def test_verify_says_what_it_checked_and_that_it_is_sound(bbx_cli, done) -> None:
    ran = bbx_cli("verify", "features.h5")
    assert ran.code == 0
    assert "7 rows" in ran.out
    assert "sound" in ran.out
    assert ran.err == ""


def test_verify_names_a_damaged_row_and_exits_with_4(bbx_cli, done) -> None:
    spoil(done, "stage1")
    ran = bbx_cli("verify", "features.h5")
    assert ran.code == 4
    assert "003.png" in ran.out
    assert "DAMAGED" in ran.out
    told = json.loads(bbx_cli("verify", "--json", "features.h5").out)
    assert (told["exit_code"], told["health"]["damage"][0]["key"]) == (4, "003.png")
    quiet = bbx_cli("verify", "-q", "features.h5")
    assert quiet.out.startswith("damaged: ")


def test_verify_recomputes_what_is_asked_for(bbx_cli, done, pictures, picture) -> None:
    ran = bbx_cli("verify", "features.h5", "--recompute", 7)
    assert ran.code == 0
    assert "7 of 7 rows confirmed" in ran.out
    picture(pictures / "004.png", 99)
    ran = bbx_cli("verify", "features.h5", "--recompute", 7)
    assert ran.code == 4
    assert "differs: 004.png" in ran.out
    assert "content changed" in ran.out


def test_show_and_info_refuse_what_is_damaged(bbx_cli, done) -> None:
    spoil(done, "provenance/failure")
    for words in (("info",), ("show", "--image", "3")):
        ran = bbx_cli(*words, "features.h5")
        assert ran.code == 3
        assert "bbx verify features.h5" in ran.err
    assert bbx_cli("show", "--image", "2", "--stages", "stem", "features.h5").code == 0


def test_diff_is_0_for_the_same_and_4_for_others(bbx_cli, done) -> None:
    bbx_cli("extract", "--model", "toy", "--stages", "all", "--dtype", "float16", "-q", "-o", "half.h5", "pictures")
    assert bbx_cli("diff", "features.h5", "features.h5").code == 0
    ran = bbx_cli("diff", "features.h5", "half.h5")
    assert ran.code == 4
    assert "recorded dtype: float32 and float16" in ran.out
    assert "first image that differs: 000.png, in stem" in ran.out
    assert bbx_cli("diff", "features.h5", "half.h5", "--tolerance", "1e-3").code == 0
    told = json.loads(bbx_cli("diff", "--json", "features.h5", "half.h5").out)
    assert told["exit_code"] == 4
    assert {stage["stage"] for stage in told["stages"]} == {"stem", "stage1", "stage2"}


def test_merge_prints_the_file_as_data_and_the_rest_as_talk(bbx_cli, done, picture, tmp_path) -> None:
    picture(tmp_path / "more" / "900.png", 900)
    bbx_cli("extract", "--like", "features.h5", "-q", "-o", "more.h5", "more")
    ran = bbx_cli("merge", "features.h5", "more.h5", "-o", "all.h5")
    assert (ran.code, ran.out) == (0, "all.h5\n")
    assert "8 rows, stages stem, stage1, stage2, from 2 files by rows" in ran.err
    assert bbx.open("all.h5").attempts[-1]["command"].startswith("bbx merge features.h5")
    again = bbx_cli("merge", "features.h5", "more.h5", "-o", "all.h5")
    assert again.code == 3
    told = json.loads(bbx_cli("merge", "--json", "-q", "--virtual", "features.h5", "more.h5", "-o", "v.h5").out)
    assert (told["rows"], told["how"]) == (8, "rows")
    for command in ("info", "verify"):
        assert bbx_cli(command, "v.h5").code == 0
    assert bbx_cli("diff", "all.h5", "v.h5").code == 0
    assert bbx_cli("export", "v.h5", "--to", "npy").code == 0


def test_merge_of_another_run_names_the_field(bbx_cli, done) -> None:
    bbx_cli("extract", "--like", "features.h5", "--seed", 5, "--weights", "random", "-q", "-o", "other.h5", "pictures")
    ran = bbx_cli("merge", "features.h5", "other.h5", "-o", "all.h5")
    assert ran.code == 3
    assert "weights_digest" in ran.err


def test_export_prints_what_other_programs_open(bbx_cli, done) -> None:
    ran = bbx_cli("export", "features.h5", "--to", "npy", "--stages", "stage1")
    assert ran.code == 0
    assert np.load("features_npy/stage1.npy").shape == (7, 6, 8, 8)
    assert "features_npy/stage1.npy" in ran.out.splitlines()
    assert bbx_cli("export", "features.h5", "--to", "npy").code == 3
    assert bbx_cli("export", "features.h5", "--to", "npy", "--overwrite").code == 0
    ran = bbx_cli("export", "features.h5", "--to", "parkett")
    assert ran.code == 2
    assert "parquet" in ran.err


@pytest.mark.parametrize("command", ["verify", "diff", "merge", "export", "info"])
def test_a_file_that_is_none_is_an_error_of_one_line_for_every_command(bbx_cli, tmp_path, command) -> None:
    (tmp_path / "a.h5").write_text("<html>")
    more = {"diff": ["a.h5"], "merge": ["-o", "b.h5"], "export": ["--to", "npy"]}.get(command, [])
    ran = bbx_cli(command, "a.h5", *more)
    assert ran.code == 3
    assert ran.err.startswith("error: ")
    assert "Traceback" not in ran.err
    gone = bbx_cli(command, "gone.h5", *(["gone.h5"] if command == "diff" else more), "--json")
    assert json.loads(gone.out)["exit_code"] == 3


MEETING = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import bbx.cli, bbx.store.reader

def crash(*_, **__):
    os.kill(os.getpid(), signal.{fate})

def wait(*_, **__):
    print("here", flush=True)
    open("never").read()

def clear(*_, **__):
    try:
        wait()
    finally:
        time.sleep({seconds})
        print("cleared", flush=True)

def compute(*_, **__):
    while True:
        pass

if "{fate}" == "parse":
    import typer.core
    typer.core.TyperCommand.make_context = wait
bbx.store.reader.FeatureFile.__init__ = globals().get("{fate}", crash)
sys.argv = ["bbx", "info", "x.h5"]
bbx.cli.run()
"""


def meeting(tmp_path: Path, fate: str, limit: str = "") -> subprocess.Popen[str]:
    """`bbx info x.h5`, where HDF5 crashes by a signal, or it or the reading of the command line waits for ever.

    Or clears up, as one signal ends it, for longer than the shield waits; or computes for ever.
    """
    code = MEETING.format(root=str(Path(__file__).parent.parent), fate=fate, seconds=1.5 * _HEAR_SECONDS)
    pipe = subprocess.PIPE
    command = ["bash", "-c", f'{limit}exec "$@"', "bash", sys.executable, "-c", code]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path, start_new_session=True)


@pytest.mark.parametrize("ahead", [False, True], ids=["when called", "before it is called"])
@pytest.mark.parametrize("fate", ["SIGSEGV", "SIGABRT", "SIGBUS"])
def test_a_crash_of_hdf5_is_an_error_of_the_file(tmp_path: Path, fate: str, ahead: bool) -> None:
    if ahead:
        (tmp_path / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    run = meeting(tmp_path, fate)
    assert f"HDF5 crashed on it ({fate}): bbx info x.h5" in run.communicate()[1]
    assert run.returncode == 3


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_command_behind_the_shield(tmp_path: Path, signum: int, code: int) -> None:
    os.mkfifo(tmp_path / "never")
    run = meeting(tmp_path, "wait")
    assert run.stdout is not None
    assert run.stdout.readline() == "here\n"
    run.send_signal(signum)  # to this process alone, as a supervisor does, and not to its group
    assert run.communicate()[1].count("error: stopped by SIGINT") == (signum == signal.SIGINT)
    assert run.returncode == code


@pytest.mark.parametrize("words", [("info",), ("verify",)])
def test_a_starter_that_ignores_ended_processes_is_told_how_it_ended(done: Path, words: tuple[str, ...]) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    command = [sys.executable, "-m", "bbx", *words, done.name]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=done.parent, preexec_fn=ignore)
    assert (ran.returncode, "error" in ran.stderr) == (0, False)


@pytest.mark.parametrize(
    ("words", "code"),
    [(("info", "nope.h5", "--json"), 3), (("verify", "--bad"), 2), (("stages", "nope"), 2), (("merge", "f.h5"), 2)],
)
def test_an_error_that_nobody_reads_has_its_exit_code(done: Path, words: tuple[str, ...], code: int) -> None:
    nobody, talk = os.pipe()
    os.close(nobody)
    command = [sys.executable, "-m", "bbx", *words]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=talk, text=True, check=False, cwd=done.parent)
    os.close(talk)
    assert ran.returncode == code
    assert ("--json" in words) == (f'"exit_code": {code}' in ran.stdout)


def test_a_lower_limit_of_the_users_own_on_computing_is_kept(done: Path) -> None:
    command = f"ulimit -t 60; exec {sys.executable} -m bbx verify {done.name}"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=done.parent)
    assert (ran.returncode, "error" in ran.stderr) == (0, False)


def test_a_wrong_backend_of_matplotlib_is_named(done: Path) -> None:
    command = [sys.executable, "-m", "bbx", "show", done.name]
    wrong = {**os.environ, "MPLBACKEND": "nonsense"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=done.parent, env=wrong)
    assert ran.returncode == 2
    assert "nonsense" in ran.stderr
    assert "unset MPLBACKEND" in ran.stderr


@pytest.mark.parametrize("fate", ["parse", "wait"], ids=["the command line is read", "a file is opened ahead"])
def test_a_ctrl_c_is_told_once_while(tmp_path: Path, fate: str) -> None:
    os.mkfifo(tmp_path / "never")
    if fate == "wait":
        (tmp_path / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    run = meeting(tmp_path, fate)
    assert run.stdout is not None
    assert run.stdout.readline() == "here\n"
    os.killpg(run.pid, signal.SIGINT)
    assert run.communicate() == ("", "error: stopped by SIGINT\n  hint: the same command starts again\n")
    assert run.returncode == 130


@pytest.mark.parametrize("end", [os.kill, os.killpg], ids=["its process", "its group"])
def test_what_clears_up_after_a_ctrl_c_is_not_told_of_it_again(tmp_path: Path, end: Callable[[int, int], None]) -> None:
    os.mkfifo(tmp_path / "never")
    run = meeting(tmp_path, "clear")
    assert run.stdout is not None
    assert run.stdout.readline() == "here\n"
    end(run.pid, signal.SIGINT)
    assert run.communicate() == ("cleared\n", "error: stopped by SIGINT\n  hint: the same command starts again\n")
    assert run.returncode == 130


@pytest.mark.parametrize("ahead", [False, True], ids=["when called", "before it is called"])
def test_a_limit_of_the_users_own_on_computing_is_not_the_files_fault(tmp_path: Path, ahead: bool) -> None:
    if ahead:
        (tmp_path / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    run = meeting(tmp_path, "compute", limit="ulimit -S -t 3; ")
    assert "the limit on computing time, 3 s, is reached: bbx info x.h5" in run.communicate()[1]
    assert run.returncode == 3


@pytest.mark.parametrize("name", [b"\xff.h5", "\N{SNOWMAN} 1.h5".encode(), b"{}.h5"])
def test_a_file_of_any_name_reaches_the_command_behind_the_shield(done: Path, name: bytes) -> None:
    done.rename(done.with_name(os.fsdecode(name)))
    command = [sys.executable, "-m", "bbx", "info", name]
    ran = subprocess.run(command, capture_output=True, check=False, cwd=done.parent)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert b"stage1" in ran.stdout


def test_what_is_wrong_with_the_command_line_is_told_once_and_at_once(done: Path) -> None:
    command = [sys.executable, "-m", "bbx", "info", done.name, "--jsn"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=done.parent)
    assert (ran.returncode, ran.stdout, ran.stderr.count("error: ")) == (2, "", 1)
    assert "--json" in ran.stderr


def test_a_pipe_is_no_feature_file_and_is_not_waited_for(done: Path) -> None:
    os.mkfifo(done.parent / "pipe.h5")
    command = [sys.executable, "-m", "bbx", "info", "pipe.h5"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=done.parent, timeout=60)
    assert (ran.returncode, ran.stdout) == (3, "")
    assert "pipe.h5 is no regular file" in ran.stderr


BROKEN = """
import os, resource, sys
sys.path.insert(0, {root!r})
import bbx.cli, bbx.cli.shield

def refused(*_, **__):
    raise OSError(11, "Resource temporarily unavailable")

if "{fate}" == "open":
    bbx.cli.shield._try_to_open = refused
else:
    setattr(os, "{fate}", refused)
sys.argv = ["bbx", "info", *{words!r}]
bbx.cli.run()
"""


def broken(done: Path, fate: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`bbx info WORDS` where a call of the shield fails."""
    code = BROKEN.format(root=str(Path(__file__).parent.parent), fate=fate, words=words)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=done.parent)


@pytest.mark.parametrize("fate", ["fork", "pipe"])
def test_a_system_that_refuses_the_shield_is_an_error_that_says_so(done: Path, fate: str) -> None:
    ran = broken(done, fate, done.name)
    assert (ran.returncode, ran.stdout) == (3, "")
    assert ran.stderr.startswith("error: no process can be started to read the file in: Resource temporarily")
    assert "ulimit -u" in ran.stderr
    assert broken(done, fate, "--help").returncode == 0


def test_what_fails_ahead_is_not_told_before_it_fails_again(done: Path) -> None:
    ran = broken(done, "open", done.name)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "stage1" in ran.stdout


def test_a_locale_without_the_signs_of_a_table_is_no_error(done: Path) -> None:
    command = [sys.executable, "-m", "bbx", "info", done.name]
    narrow = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX"}
    narrow.pop("PYTHONIOENCODING", None)
    ran = subprocess.run(command, capture_output=True, check=False, cwd=done.parent, env=narrow)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert b"stage1" in ran.stdout


def test_no_command_outlives_its_parent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "never")
    run = meeting(tmp_path, "wait")
    assert run.stdout is not None
    assert run.stdout.readline() == "here\n"
    child = next(int(text) for text in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split())
    run.kill()
    run.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split(")")[1]:
        assert time.monotonic() < deadline
        os.sched_yield()


def test_rows_of_large_pictures_are_confirmed_under_the_limit_they_were_made_with(bbx_cli, tmp_path, picture) -> None:
    picture(tmp_path / "in" / "a.png", size=(48, 40))
    bbx_cli("extract", "--model", "toy", "in")
    assert bbx_cli("verify", "features.h5", "--recompute", 1, "--max-pixels", 1000).code == 4
    assert bbx_cli("verify", "features.h5", "--recompute", 1, "--max-pixels", 2000).code == 0


def test_export_and_merge_refuse_a_row_whose_mark_was_changed(bbx_cli, done) -> None:
    with h5py.File(done) as file:
        offset = file["status"].id.get_offset()
    for mark in (0, 2):
        with done.open("r+b") as raw:
            raw.seek(offset + 3)
            raw.write(bytes([mark]))
        for words in (
            ("export", "features.h5", "--to", "npy"),
            ("info", "features.h5"),
            ("merge", "features.h5", "-o", "m.h5"),
        ):
            ran = bbx_cli(*words)
            assert ran.code == 3, (mark, words)


@pytest.mark.parametrize("name", ["m.h5.merging", "m.h5.lock", "m.h5.packing"])
def test_a_link_in_the_place_of_a_draft_is_not_followed(bbx_cli, done, tmp_path, name) -> None:
    (tmp_path / "precious.txt").write_text("precious")
    (tmp_path / name).symlink_to(tmp_path / "precious.txt")
    compress = ["--compress", "gzip"] * name.endswith("packing")
    assert bbx_cli("merge", "features.h5", "-o", "m.h5", *compress).code == 3
    assert (tmp_path / "precious.txt").read_text() == "precious"


def test_a_source_with_a_drafts_name_is_not_destroyed(bbx_cli, done, tmp_path) -> None:
    done.rename(tmp_path / "m.h5.merging")
    before = (tmp_path / "m.h5.merging").read_bytes()
    assert bbx_cli("merge", "m.h5.merging", "-o", "m.h5").code == 2
    assert (tmp_path / "m.h5.merging").read_bytes() == before
