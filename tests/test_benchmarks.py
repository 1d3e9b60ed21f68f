"""What the benchmarks rest on: the rivals do the same job, and the pieces tell the truth. No timing is asserted."""

import io
import sys
from dataclasses import replace
from datetime import date
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import bbx
from bbx.images import decode_one
from tests.benchmarks import compare, limits, measure, numerics, pictures
from tests.benchmarks.__main__ import added, contests, parsed
from tests.benchmarks.compare import Contestant
from tests.benchmarks.jobs import JOBS, Job
from tests.benchmarks.measure import RunError, Taken
from tests.benchmarks.pieces import NullSink, forward, keywords, past_deepest, plan_of, rows
from tests.benchmarks.report import FLOORS, HELD, MARKS, Row, draw, unmeasured, write_json, write_readme
from tests.benchmarks.rivals import RIVALS, Rival
from tests.benchmarks.rivals.task import Task
from tests.benchmarks.settings import Settings

# What bbx calls a rival's network: of the same library, hence of the same random weights and preprocessing.
MODELS = {
    "timm_loop": "timm:resnet-50", "torchvision_fx": "resnet-50", "autobackbone": "transformers:resnet",
    "torchextractor_save": "resnet-50", "captum_av": "resnet-50", "torchlens_shards": "timm:resnet-50",
}  # fmt: skip
# Of a stage's largest value. transformers' processor resizes by torchvision's uint8 filter, bbx here by Pillow's.
TOLERANCE = {"autobackbone": 5e-3}
TOY = Job("T", "toy", "stem,stage1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pictures.make(tmp_path_factory.mktemp("jpegs") / "pictures", 3)


@pytest.mark.parametrize("name", [rival.name for rival in RIVALS if rival.installed and rival.name in MODELS])
def test_a_rival_gives_what_bbx_gives(name, folder, tmp_path):
    rival = import_module(f"tests.benchmarks.rivals.{name}")
    rival.extract(Task("B", folder, tmp_path / "theirs", batch_size=2))
    bbx.extract(folder, model=MODELS[name], weights="random", stages=JOBS["B"].stages, norm="native", workers=1,
                output=tmp_path / "ours.h5")  # fmt: skip
    order = np.array([2, 0, 1])
    with bbx.open(tmp_path / "ours.h5") as file:
        for stage in file.stages:
            theirs, ours = rival.read(tmp_path / "theirs", "B", stage, order), file[stage, order]
            assert (theirs.dtype, theirs.shape) == (ours.dtype, ours.shape)
            assert np.abs(theirs - ours).max() <= TOLERANCE.get(name, 1e-5) * np.abs(ours).max()


def test_forms_that_come_to_the_same_are_one(monkeypatch):
    monkeypatch.setattr(compare, "RIVALS", [Rival("loop", needs="torch", keeps="", docs_workers=2)])
    both = list(compare._rivals(JOBS["A"], Settings(Path()), batch=8, workers=2))
    assert [(one.forms, one.batch_size) for one in both] == [(("docs", "equal"), 32), (("tuned",), 8)]
    assert both[0].label == "loop docs = equal (batch 32, 2 decoders)"


def test_all_that_take_part_compute_on_the_device_asked_for(monkeypatch):
    pair = [Rival("loop", needs="torch", keeps="", moves=True), Rival("still", needs="torch", keeps="")]
    monkeypatch.setattr(compare, "RIVALS", pair)
    settings = Settings(Path(), device="cuda:1")
    both = [Contestant("bbx"), *compare._rivals(JOBS["A"], settings, batch=8, workers=2)]
    assert {one.name for one in both} == {"bbx", "loop"}
    for one in both:
        words = one.command(JOBS["A"], Path("images"), Path("out"), settings)
        assert words[words.index("--device") + 1] == "cuda:1"
    assert any("not on cuda:1" in row.value for row in compare._absent(JOBS["A"], settings) if "still" in row.measure)


def test_a_ratio_is_taken_only_from_what_was_timed_often():
    own, docs = Contestant("bbx"), Contestant("autobackbone", ("docs",), 32, 0)
    equal = [Contestant(f"rival{place}", ("equal",), 32, 2) for place in range(3)]
    seconds = dict(zip([own, docs, *equal], (99.0, 99.0, 10.0, 12.0, 13.0), strict=True))
    entered = {one: (Taken(taken, taken, taken, 0, 0), 0.0) for one, taken in seconds.items()}
    near = [one for one in entered if compare._is_near(one, entered, Settings(Path()))]
    assert near == [own, docs, *equal[:2]]
    results = {
        one: compare.Result(one, 100, 5 if one in near else 1, taken, replace(taken, seconds=0.5), 0, 0.0)
        for one, (taken, _) in entered.items()
    }
    # What was slow to warm up, and fast the once that it was timed, is in no ratio.
    results[equal[2]] = replace(results[equal[2]], whole=replace(results[equal[2]].whole, seconds=1.0))
    ratios = {row.measure: row for row in compare._ratios(JOBS["A"], results, Settings(Path(), repeats=5))}
    best = ratios["job A ÷ best rival given equal workers"]
    assert "rival0 equal" in best.value
    assert best.number == pytest.approx(10 / 99)
    assert "÷ timm loop" not in " ".join(ratios)


def test_what_noise_has_swallowed_is_no_number():
    one = Taken(2, 2, 2, 0, 0)
    row = compare.Result(Contestant("bbx"), 4, 1, one, replace(one, seconds=3, cpu=3), 0, 0.0).row(JOBS["A"])
    assert "2.00 images/s, – once it runs" in row.value
    assert "CPU – ms/image" in row.value


def test_on_a_gpu_other_floors_count():
    own, loop = Contestant("bbx"), Contestant("timm_loop", ("docs", "equal"), 32, 16)
    entered = {Contestant("fx", ("equal",), 32, 16): (Taken(1, 1, 1, 0, 0), 0.0), loop: (Taken(9, 9, 9, 0, 0), 0.0)}
    assert [compare._is_near(loop, entered, Settings(Path(), device=device)) for device in ("cpu", "cuda")] == [
        False,
        True,
    ]
    start = Taken(1, 1, 1, 0, 0)
    results = {
        one: compare.Result(one, 100, 5, replace(start, seconds=seconds), start, 0, 0.0)
        for one, seconds in ((own, 3.0), (loop, 9.0))
    }
    rows = list(compare._ratios(JOBS["B"], results, Settings(Path(), device="cuda", rivals=("timm_loop",))))
    row = next(row for row in rows if row.measure == "job B ÷ timm loop given equal workers, on a GPU")
    assert (row.number, row.verdict) == (pytest.approx(3), "met")
    rows += limits._of_pieces(90.0, {"decode": 300.0, "forward": 200.0, "store": 100.0})
    assert (rows[-1].number, rows[-1].verdict) == (0.9, "met")
    assert "store" in rows[-1].value
    assert unmeasured(rows) == ["job A ÷ timm loop given equal workers, on a GPU"]
    assert unmeasured([]) == list(FLOORS)
    both = unmeasured([*rows, Row("end to end ÷ what CPU time allows", "1", 1.0)])
    assert "job A ÷ best rival given equal workers" in both
    assert "job A ÷ timm loop given equal workers, on a GPU" in both


@pytest.mark.parametrize("words", [("--images", "0"), ("--repeats", "-1"), ("--images", "many"), ("--jobs", "D")])
def test_an_odd_command_line_is_refused(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    with pytest.raises(SystemExit, match="2"):
        parsed()
    assert words[1] in capsys.readouterr().err


def test_a_job_that_bbx_refuses_is_an_error_in_the_table_with_its_words(tmp_path):
    settings = Settings(tmp_path, images=1, jobs=("C",), options=("--batch-size", "none"))
    (row,) = contests(settings)
    assert row.verdict == "error"
    assert "--batch-size 'none' is no number of images" in row.value


def test_the_pictures_are_the_same_each_time(folder, tmp_path):
    again = pictures.make(tmp_path / "again", 3)
    assert [one.read_bytes() for one in pictures.listed(again)] == [one.read_bytes() for one in pictures.listed(folder)]
    many = pictures.listed(pictures.some(tmp_path / "many", folder, 7))
    assert len(many) == 7
    assert many[3].read_bytes() == many[0].read_bytes()


def test_a_process_is_measured_with_all_it_started(tmp_path):
    child = "x = bytearray(b'1') * (100 << 20); sum(range(10**6)); import time; time.sleep(1)"
    code = (
        "import subprocess, sys; open(sys.argv[1], 'wb').write(b'x' * 1000);"
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    output = tmp_path / "out"
    output.write_bytes(b"old")
    taken = measure.run([sys.executable, "-c", code, str(output)], output, sample=True)
    assert taken.peak > 100 << 20
    assert taken.nbytes == 1000
    assert taken.cpu > 0
    assert 1 < taken.seconds <= taken.synced


def test_a_process_that_fails_says_why():
    with pytest.raises(RunError, match=r"^error: no$"):
        measure.run([sys.executable, "-c", "import sys; sys.stderr.write('x\\nerror: no\\nhint\\n'); sys.exit(3)"])


def test_the_start_is_taken_off_the_rate():
    whole, start = Taken(12, 0, 0, 0, 0), Taken(2, 0, 0, 0, 0)
    assert measure.steady_rate(101, whole, start) == 10
    assert np.isnan(measure.steady_rate(101, start, whole))


def test_sides_take_turns():
    order = []
    sides = {name: lambda name=name: order.append(name) or Taken(1, 1, 1, 1, 1) for name in "ab"}
    assert {name: len(taken) for name, taken in measure.alternate(sides, 2).items()} == {"a": 2, "b": 2}
    assert order == ["a", "b", "a", "b"]


def test_the_forward_alone_is_what_all_rows_take_more_than_a_quarter_of_them(folder, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(NullSink, "write", lambda self, rows, maps, inputs: written.extend(rows.tolist()))
    many = pictures.some(tmp_path / "many", folder, 8)
    plan = plan_of(TOY, many, tmp_path / "none.h5", ("--batch-size", "2"))
    assert plan.batch_size == 2
    before = decode_one(plan.images.path(0), plan.run.preprocess)
    monkeypatch.setattr("tests.benchmarks.pieces.decode_one", lambda *_: before)
    monkeypatch.setattr("bbx.images.decoders.Process", None)  # nothing is decoded
    taken = iter([(0.0, 0.0), (2.0, 3.0), (5.0, 10.0), (11.0, 20.0)])  # start and end of the quarter, and of all
    monkeypatch.setattr("tests.benchmarks.pieces.clocks", lambda: next(taken))
    assert forward(plan) == {"images": 6, "seconds": 4.0, "cpu": 7.0}
    assert written == [0, 1, 2, 3, 0, 1, *range(8)]
    assert not (tmp_path / "none.h5").exists()


def test_single_rows_are_read_from_both_kinds_of_file(folder, tmp_path):
    bbx.extract(folder, model="toy", stages="stem", output=tmp_path / "toy.h5", weights="random")
    (tmp_path / "npy").mkdir()
    found = rows(tmp_path / "toy.h5", tmp_path / "npy", 1)
    assert found["nbytes"] == 4 * 16 * 16 * 4
    with bbx.open(tmp_path / "npy" / "copy.h5") as file:
        assert np.array_equal(np.load(tmp_path / "npy" / "1.npy"), file["stem", 1])


def test_modules_past_the_deepest_stage_are_counted():
    backbone = bbx.load_backbone("toy", weights="random", stages="stage1")
    _ = backbone.stages
    assert past_deepest(backbone, backbone) == 0
    assert past_deepest(backbone, backbone.network) == 3  # relu, two, fc


def test_options_become_keywords():
    words = ["--batch-size", "4", "--deterministic", "--precision", "bf16"]
    assert keywords(words) == {"batch_size": 4, "deterministic": True, "precision": "bf16"}


def test_a_refused_option_is_an_error_in_the_table(folder, tmp_path, monkeypatch):
    def run(command, output):
        options = keywords(command[command.index("--stages") + 2 : command.index("--mode")])
        if "no_such_option" in options:
            raise RunError("error: No such option: --no-such-option")
        options["device"] = "cpu"  # there may be no other
        try:
            bbx.extract(folder, model="toy", weights="random", stages="all", output=output, mode="overwrite", **options)
        except bbx.BbxError as error:
            raise RunError(str(error)) from None

    monkeypatch.setattr(
        numerics, "OPTIONS", ((), ("--precision", "bf16"), ("--no-such-option", "1"), ("--decode", "fast"))
    )
    monkeypatch.setattr(numerics.measure, "run", run)
    monkeypatch.setattr(Settings, "pictures", folder)
    monkeypatch.setattr(Settings, "large", lambda *_: folder)
    same, bf16, refused, fast, large = numerics.numerics(Settings(tmp_path, images=2, jobs=("A",)))
    assert same.verdict == "met"
    assert same.floor.most < bf16.number < 0.1
    assert refused.verdict == "error"
    assert "--no-such-option" in refused.value
    assert [fast.measure, large.measure] == [f"numerics, job A: --decode fast{of}" for of in ("", " of 1920×1080")]
    settings = Settings(tmp_path, images=2, jobs=("A",), device="cuda")
    on_cuda = [row.measure for row in numerics.numerics(settings)]
    assert [name.partition(": ")[2] for name in on_cuda[4:]] == [
        "--precision tf32", "--decode gpu", "--decode fast of 1920×1080", "--decode gpu of 1920×1080"
    ]  # fmt: skip


def test_the_table_says_what_is_met():
    least, most = "store alone ÷ raw write + fsync", "start-up: bbx info"
    table = [
        Row(least, "0.95", 0.95), Row(least, "0.85", 0.85), Row(most, "0.4 s", 0.4), Row(most, "0.6 s", 0.6),
        Row(most, "it failed"), Row(least, "nan", float("nan")), Row("job A: timm", "not installed"),
    ]  # fmt: skip
    assert [row.verdict for row in table] == ["met", "missed", "met", "missed", "error", "missed", ""]
    shown = io.StringIO()
    draw(table, Console(file=shown, width=120))
    lines = shown.getvalue().splitlines()
    assert lines[0].split() == ["measure", "value", "floor", "met"]
    assert lines[1].split()[-4:] == ["0.95", "≥", "0.9", "met"]
    assert "not installed" in lines[len(table)]
    absent = len(FLOORS) - 2
    assert all(line.startswith("not measured: ") for line in lines[len(table) + 1 :][:absent])
    assert [line.partition(":")[0] for line in lines[len(table) + 1 + absent :]] == [
        row.measure.partition(":")[0] for row in table[:6]
    ]
    assert set(HELD) <= set(FLOORS)


def test_rows_of_earlier_runs_stand_where_nothing_newer_does_and_say_their_day(tmp_path):
    old, late = tmp_path / "old.json", tmp_path / "late.json"
    write_json(old, "a machine · torch 2 · 2001-02-03", [Row("a", "1", 1.0), Row("b", "1"), Row("c", "1", error=True)])
    write_json(late, f"a machine · {date.today().isoformat()}", [Row("b", "2", 2.0)])
    told = added([Row("a", "3")], [old, late])
    assert {row.measure: row for row in told} == {
        "a": Row("a", "3"), "b": Row("b", "2", 2.0), "c": Row("c", "1 (2001-02-03)", error=True)
    }  # fmt: skip


def test_the_readme_gets_the_rows_that_have_a_floor(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    tuned = Row("job B ÷ best rival given equal workers and bbx's batch size", "1.3 ×", 1.3)
    bf16 = [Row(f"numerics, job {job}: --precision bf16", "", number) for job, number in (("A", 0.0123), ("B", 0.4))]
    refused = Row("numerics, job A: --decode fast", "refused", error=True)
    every = [Row(name, "1", 1.0) for name in FLOORS]
    write_readme(path, "a machine", [tuned, *every, Row("limit: raw write", "9"), *bf16, refused])
    lines = path.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert lines[2:4] == ["| a machine | | floor |", "|---|---|---|"]
    assert lines[4] == f"| {tuned.measure} | 1.3 × |  |"
    assert len([line for line in lines if line.startswith("| job")]) == 4
    told = "; by option, the worst stage: --precision bf16 (A 1e-02, B 4e-01), --decode fast (A failed) | ≤ 1e-05 |"
    assert lines[-4].endswith(told)
    assert lines[-3] == (
        "| start-up: bbx --help, bbx info, bbx show of one grid "
        "| **missed**: 1 · **missed**: 1 · 1 | ≤ 0.3, ≤ 0.5, ≤ 1.5 |"
    )
    assert not any("raw write |" in line for line in lines)
    write_readme(path, "a machine", [Row(name, "1", 1.0) for name in list(FLOORS)[:-2]])
    assert f"| **not measured**: {', '.join(list(FLOORS)[-2:])} | | |" in path.read_text()
    path.write_text("none")
    with pytest.raises(ValueError, match="has no"):
        write_readme(path, "", [])
