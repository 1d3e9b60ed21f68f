"""The command line as a user meets it: what is printed where, and every documented exit code."""

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import bbx
from bbx.cli.signals import signals

ROOT = Path(__file__).parent.parent


def toy_command(*words: object) -> list[str]:
    """The command in a process of its own, with the toy model."""
    code = "import bbx.providers; bbx.providers.PROVIDERS['toy'] = ('tests.toy',); from bbx.__main__ import run; run()"
    return [sys.executable, "-c", code, *map(str, words)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def test_extract_prints_the_plan_and_the_summary_as_talk_and_the_file_as_data(bbx_cli, pictures):
    (pictures / "README.txt").write_text("no image")
    ran = bbx_cli("extract", "--model", "toy", "--stages", "stem,stage1", pictures)
    assert (ran.code, ran.out) == (0, "features.h5\n")
    for words in ("7 (skipped: 1 that are no images)", "toy:toy", "4×16×16", "6×8×8", "1.54 KB per image", "free",
                  "7 done, 0 failed", "decode", "compute", "write", "images/s"):  # fmt: skip
        assert words in ran.err, words


def test_quiet_prints_the_file_only(bbx_cli, pictures):
    ran = bbx_cli("extract", "-q", "--model", "toy", pictures)
    assert (ran.out, ran.err) == ("features.h5\n", "")


def test_json_is_one_object_with_the_same_facts(bbx_cli, pictures):
    (pictures / "005.png").write_bytes(b"")
    ran = bbx_cli("extract", "--json", "--model", "toy", "--stages", "all", "--pool", "avg", "-o", "f.h5", pictures)
    facts = json.loads(ran.out)
    assert (ran.code, facts["exit_code"], facts["rows"], facts["done"]) == (4, 4, 7, 6)
    assert list(facts["failures"]) == ["005.png"]
    assert [stage["shape"] for stage in facts["run"]["stages"]] == [[4], [6], [8]]
    assert facts["output"] == "f.h5"
    assert facts["seconds"].keys() == {"wall", "decode", "compute", "write"}


def test_json_tells_an_error_too(bbx_cli, pictures):
    ran = bbx_cli("extract", "--json", "--model", "tooy", pictures)
    assert json.loads(ran.out)["exit_code"] == ran.code == 2
    assert "toy" in ran.err


def test_a_dry_run_stops_at_the_plan(bbx_cli, pictures, tmp_path):
    ran = bbx_cli("extract", "--dry-run", "--json", "--model", "toy", pictures)
    facts = json.loads(ran.out)
    assert (ran.code, facts["dry_run"], facts["nbytes"], facts["images"]) == (0, True, 7 * 512, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_exit_0_when_done_and_again_when_it_was_done_before(bbx_cli, pictures):
    assert bbx_cli("extract", "--model", "toy", pictures).code == 0
    again = bbx_cli("extract", "--model", "toy", pictures)
    assert (again.code, again.out) == (0, "features.h5\n")
    assert "nothing to do" in again.err


def test_exit_1_on_an_internal_error_with_its_trace(bbx_cli, pictures, monkeypatch):
    monkeypatch.setattr("bbx.runner.find_images", lambda *_, **__: 1 / 0)
    ran = bbx_cli("extract", "--model", "toy", pictures)
    assert ran.code == 1
    assert "ZeroDivisionError" in ran.err
    assert "Traceback" in ran.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["extract", "--model", "swin-tinny", "."], "swin-tiny"),
        (["extract", "."], "--model"),
        (["extract", "--model", "toy", "--stages", "stage7", "."], "stem (0), stage1 (1), stage2 (2)"),
        (["extract", "--model", "toy", "--dtype", "float8", "."], "float16"),
        (["extract", "--model", "toy", "--size", "big", "."], "224x320"),
        (["extract", "--model", "toy", "--no-such-option", "."], "--no-such-option"),
        (["stages", "resnet-5O"], "resnet-50"),
        (["models", "nothing*"], "bbx models"),
        (["show", "x.h5", "--weights", "random"], "--model"),
        (["nonsense"], "nonsense"),
    ],
)
def test_exit_2_on_a_wrong_call_with_what_would_be_right(bbx_cli, pictures, words, said):
    ran = bbx_cli(*(pictures if word == "." else word for word in words))
    assert ran.code == 2
    assert said in " ".join(ran.err.replace("│", " ").split())
    assert ran.out == ""


def test_exit_3_when_the_run_cannot_start(bbx_cli, pictures, tmp_path):
    for words, said in (
        (["extract", "--model", "toy", "nowhere"], "nowhere"),
        (["extract", "--model", "toy", pictures, "-o", "no/such/folder.h5"], "mkdir"),
        (["extract", "--model", "toy", pictures, "--weights", "gone.pth"], "gone.pth"),
        (["extract", "--model", "toy", pictures, "--device", "cuda:9"], "cuda:9"),
        (["extract", "--model", "swin-tiny", pictures, "--weights", "missing.safetensors"], "missing.safetensors"),
        (["info", "gone.h5"], "gone.h5"),
        (["show", "gone.h5"], "gone.h5"),
    ):
        ran = bbx_cli(*words)
        assert (ran.code, ran.out) == (3, ""), words
        assert said in ran.err
        assert "hint:" in ran.err
    (tmp_path / "empty").mkdir()
    assert bbx_cli("extract", "--model", "toy", "empty").code == 3


def test_exit_3_for_another_runs_file_naming_the_field(bbx_cli, pictures):
    bbx_cli("extract", "--model", "toy", pictures)
    ran = bbx_cli("extract", "--model", "toy", "--dtype", "float16", pictures)
    assert ran.code == 3
    assert all(word in ran.err for word in ("dtype", "float16", "float32", "--mode overwrite"))


def test_exit_4_when_some_rows_failed_and_5_when_all_did(bbx_cli, pictures, tmp_path):
    (pictures / "000.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    ran = bbx_cli("extract", "--model", "toy", pictures)
    assert ran.code == 4
    assert "failed: 000.png: " in ran.err
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"")
    assert bbx_cli("extract", "--model", "toy", "bad", "-o", "bad.h5").code == 5


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_exit_130_and_143_when_interrupted_and_the_same_command_continues(tmp_path, picture, signum, code):
    for number in range(400):
        picture(tmp_path / "in" / f"{number:03}.png", number)
    words = toy_command("extract", "--model", "toy", "--batch-size", "1", "--workers", "1", "in")
    with subprocess.Popen(words, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as running:
        while not (line := running.stderr.readline()).startswith("output"):
            assert line, "ended before the plan was printed"
        running.send_signal(signum)
        _, err = running.communicate(timeout=60)
    assert running.returncode == code, err
    assert "the same command" in err
    again = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert "400 done" in again.stderr
    assert (tmp_path / "features.h5").exists()


def test_a_signal_is_obeyed_even_where_any_exception_is_taken_for_a_bad_image(bbx_cli, pictures, monkeypatch):
    from bbx.images import Decoders

    submit = Decoders.submit

    def interrupted(*given):
        os.kill(os.getpid(), signal.SIGTERM)  # reaches the main thread wherever it is
        return submit(*given)

    monkeypatch.setattr(Decoders, "submit", interrupted)
    assert bbx_cli("extract", "--model", "toy", "--batch-size", "1", pictures).code == 143


def test_json_survives_names_that_are_no_text(bbx_cli, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / os.fsdecode(b"bad\xff\x9b.png")).write_bytes(b"")
    ran = bbx_cli("extract", "--json", "--model", "toy", "in")
    assert ran.out.isascii()
    assert (ran.code, json.loads(ran.out)["failed"]) == (5, 1)


def test_lists_and_stdin_name_images_for_batch_jobs(bbx_cli, pictures, tmp_path):
    paths = [str(path) for path in sorted(pictures.iterdir())[:3]]
    (tmp_path / "list.txt").write_text("\n".join([*paths, str(pictures / "gone.png")]))
    ran = bbx_cli("extract", "--json", "--model", "toy", "@list.txt", "-o", "a.h5")
    assert (ran.code, json.loads(ran.out)["rows"], list(json.loads(ran.out)["failures"])) == (4, 4, ["gone.png"])
    ran = bbx_cli("extract", "--json", "--model", "toy", "-", "-o", "b.h5", stdin="\n".join(paths).encode())
    assert json.loads(ran.out)["done"] == 3


def test_a_pipe_gets_lines_of_progress_not_a_bar(bbx_cli, pictures, monkeypatch):
    monkeypatch.setattr("bbx.run_report.LINE_EVERY", 0)
    ran = bbx_cli("extract", "--model", "toy", "--batch-size", "3", pictures)
    assert "3/7 images" in ran.err
    assert "7/7 images" in ran.err
    assert "\x1b" not in ran.err


def test_stages_tells_all_there_is_to_know_without_weights(bbx_cli):
    ran = bbx_cli("stages", "swin-tiny")
    assert ran.code == 0
    for words in (
        "torchvision:swin_t",
        "stage2",
        "features.3",
        "192",
        "28×28",
        "602 KB",
        "1,195,842",
        "resize 232 (bicubic)",
    ):
        assert words in ran.out, words
    facts = json.loads(bbx_cli("stages", "swin-tiny", "--json").out)
    assert [stage["shape"] for stage in facts["stages"][:3]] == [[96, 56, 56], [96, 56, 56], [192, 28, 28]]
    assert [stage["index"] for stage in facts["stages"]] == [0, 1, 2, 3, 4]
    assert facts["preprocess"]["size"] == [224, 224]


def test_stages_follows_the_size_and_the_weights(bbx_cli):
    sized = json.loads(bbx_cli("stages", "resnet18", "--size", "96x128", "--json").out)
    assert sized["stages"][1]["shape"] == [64, 24, 32]
    swag = json.loads(bbx_cli("stages", "vit_b_16", "--weights", "IMAGENET1K_SWAG_E2E_V1", "--json").out)
    assert swag["preprocess"]["size"] == [384, 384]


def test_models_lists_by_pattern(bbx_cli):
    found = json.loads(bbx_cli("models", "swin*", "--provider", "torchvision", "--json").out)
    names = {model["name"] for model in found}
    assert names == {"swin_b", "swin_s", "swin_t", "swin_v2_b", "swin_v2_s", "swin_v2_t"}
    ran = bbx_cli("models", "swin-tiny")
    assert all(word in ran.out for word in ("swin_t", "swin-tiny", "torchvision", "28,288,354", "IMAGENET1K_V1"))


def test_info_prints_the_file_without_torch(bbx_cli, pictures, tmp_path):
    (pictures / "001.png").write_bytes(b"")
    bbx_cli("extract", "--model", "toy", "--stages", "all", pictures)
    ran = bbx_cli("info", "features.h5")
    assert ran.code == 0
    for words in ("7: 6 done, 1 failed, 0 pending", "toy:toy", "stage2", "7×8×4×4", "001.png", "float32"):
        assert words in ran.out, words
    facts = json.loads(bbx_cli("info", "features.h5", "--json").out)
    assert (facts["rows"], facts["done"], list(facts["failures"])) == (7, 6, ["001.png"])
    code = "import sys; sys.argv[1:] = ['info', 'features.h5']\ntry:\n    from bbx.cli import main; main()\n" \
           "finally:\n    assert 'torch' not in sys.modules"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


def test_names_from_outside_cannot_paint_the_terminal(bbx_cli, tmp_path, picture):
    picture(tmp_path / "in" / "ok.png")
    (tmp_path / "in" / "[red]x\x1b[2J\n.png").write_bytes(b"")
    ran = bbx_cli("extract", "--model", "toy", "in")
    assert "\x1b" not in ran.err
    assert "[red]x\\x1b[2J\\n.png" in ran.err
    assert "\x1b" not in bbx_cli("info", "features.h5").out


def test_float16_overflow_is_reported(bbx_cli, pictures):
    ran = bbx_cli("extract", "--model", "toy-loud", "--dtype", "float16", pictures)
    assert "stage2: 896 values are beyond float16" in ran.err


def test_version_and_help(bbx_cli):
    assert bbx_cli("--version").out.startswith("bbx 0.")
    help_text = bbx_cli("extract", "--help").out
    assert "130/143" in " ".join(help_text.split())
    assert bbx_cli("--help").code == 0


def test_completion_installs(tmp_path):
    script = tmp_path / "bbx"
    script.write_text(f"#!{sys.executable}\nfrom bbx.cli import main\nmain()\n")
    script.chmod(0o755)
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "SHELL": "/bin/bash",
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    ran = subprocess.run(
        [script, "--install-completion", "bash"], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert list(tmp_path.rglob("*bbx*.sh"))


def test_a_slip_in_o_costs_no_photograph(bbx_cli, pictures):
    photo = pictures / "003.png"
    before = photo.read_bytes()
    for mode in ("auto", "overwrite", "new", "resume"):
        ran = bbx_cli("extract", "--model", "toy", "--mode", mode, "-o", photo, pictures)
        assert (ran.code, photo.read_bytes() == before) == (3, True)
        assert "-o" in ran.err


@pytest.mark.parametrize("size", ["2", "1", "100000", "99999999999999999999", "0"])
def test_a_size_that_no_network_takes_is_a_usage_error(bbx_cli, pictures, size):
    ran = bbx_cli("extract", "--model", "inception-v3", "--weights", "random", "--size", size, pictures)
    assert ran.code == 2
    assert "--size" in ran.err
    assert "Traceback" not in ran.err


def test_option_errors_are_told_as_json_too(bbx_cli, pictures):
    ran = bbx_cli("extract", "--json", "--batch-size", "x", "--model", "toy", pictures)
    assert ran.code == json.loads(ran.out)["exit_code"] == 2
    assert "bbx extract --help" in ran.err


@pytest.mark.parametrize("path", [".", "/", "", "/dev/null"])
def test_a_path_that_is_no_file_is_named(bbx_cli, path):
    for command in ("info", "show"):
        assert bbx_cli(command, path).code == 3


def test_values_that_are_not_finite_are_counted(bbx_cli, pictures, tmp_path):
    import torch

    from tests.toy import Toy

    state = Toy().state_dict()
    state["two.bias"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    ran = bbx_cli("extract", "--model", "toy", "--weights", "nan.pth", pictures)
    assert "stage2: 112 values are NaN or infinite" in ran.err


def test_a_full_standard_output_is_an_error_of_one_line(tmp_path):
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(toy_command("models"), stdout=full, stderr=subprocess.PIPE, text=True, check=False,
                             env=ENVIRONMENT)  # fmt: skip
    assert ran.returncode == 3
    assert re.fullmatch(r"error: the system refused: .*No space left on device\n  hint: .*\n", ran.stderr)


@pytest.mark.parametrize("words", [["models", "--json"], ["info", "none.h5", "--json"]])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stream_that_is_full_costs_no_more_than_what_it_would_have_said(tmp_path, words, stream):
    with Path("/dev/full").open("w") as full:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: full}
        ran = subprocess.run(toy_command(*words), **streams, text=True, check=False, env=ENVIRONMENT)
    assert ran.returncode == (0 if words[0] == "models" and stream == "stderr" else 3)
    assert "Traceback" not in f"{ran.stdout}{ran.stderr}"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_images_are_read_and_rows_are_whole_whatever_streams_the_caller_closed(pictures, tmp_path, closed):
    words = shlex.join(toy_command("extract", "--model", "toy", "-q", pictures, "-o", tmp_path / "f.h5"))
    ran = subprocess.run(f"{words} {closed}", shell=True, check=False, env=ENVIRONMENT)
    assert ran.returncode == 0
    with bbx.open(tmp_path / "f.h5") as file:
        assert len(file.done) == 7


@pytest.mark.parametrize("words", [["models"], ["models", "--json"], ["--help"], ["info", "f.h5"]])
def test_a_reader_that_is_gone_is_told_apart_from_an_error(bbx_cli, pictures, words, tmp_path):
    assert bbx_cli("extract", "-q", "--model", "toy", pictures, "-o", "f.h5").code == 0
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(toy_command(*words), stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
                         env=ENVIRONMENT, cwd=tmp_path)  # fmt: skip
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (141, "")


@pytest.mark.parametrize("where", ["a pipe", "a terminal", "a full disk"])
def test_a_run_whose_talk_nobody_reads_goes_on(pictures, tmp_path, where):
    reader, writer = os.pipe() if where == "a pipe" else pty.openpty()
    os.close(reader)
    if where == "a full disk":
        os.close(writer)
        writer = os.open("/dev/full", os.O_WRONLY)
    words = ("extract", "--model", "toy", "--batch-size", 1, pictures, "-o", tmp_path / "f.h5")
    ran = subprocess.run(toy_command(*words), stdout=subprocess.PIPE, stderr=writer, text=True, check=False,
                         env=ENVIRONMENT)  # fmt: skip
    os.close(writer)
    assert (ran.returncode, ran.stdout) == (0, f"{tmp_path / 'f.h5'}\n")


def test_too_little_memory_is_no_defect_of_bbx(bbx_cli, monkeypatch, pictures):
    def refused(*_args, **_kwargs):
        raise ImportError("libtorch_cpu.so: failed to map segment from shared object")

    monkeypatch.setattr("bbx.runner.extract", refused)
    ran = bbx_cli("extract", "--model", "toy", pictures)
    assert ran.code == 3
    assert "ulimit -v" in ran.err


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop() is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("stream", [1, 2])
def test_a_stream_that_the_caller_has_closed_is_not_missed(stream):
    words = shlex.join(toy_command("models", "toy", "--json"))
    ran = subprocess.run(
        f"{words} {stream}>&-", shell=True, capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def test_the_help_states_the_librarys_defaults():
    import inspect

    from bbx import cli
    from bbx.runner import USUAL, extract

    given = {name: item.default for name, item in inspect.signature(extract).parameters.items()} | USUAL
    shown = {}
    for name, item in inspect.signature(cli.extract).parameters.items():
        option = next(
            iter(getattr(inspect.get_annotations(cli.extract, eval_str=True)[name], "__metadata__", ())), None
        )
        if match := re.search(r"\(default: (.+)\)", getattr(option, "help", "") or ""):
            shown[name] = match[1]
            assert item.default is None  # left to the library
    words = {name: value for name, value in given.items() if isinstance(value, str | int | float)}
    stated = {name: str(value) for name, value in words.items() if value not in (False, True, "")}
    assert stated.items() <= shown.items()


def test_a_reader_that_is_gone_by_the_last_flush_is_told_apart_too():
    code = (
        "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1); sys.stdout = open(1, 'w', closefd=False);"
        "sys.stdout.write('kept back'); from bbx.cli import _leave; _leave(SystemExit(0))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert (ran.returncode, ran.stderr) == (141, "")
