"""Measuring: the batch size that `auto` picks, the limit that the plan names, `bbx bench`. No figure is asserted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bbx.backbone import Backbone
from bbx.cli.signals import Signalled
from bbx.engine import EngineSettings, Growth, Tried, Work, choose, forward_rate, grow, noise, probe, settings
from bbx.errors import StartError, UsageError
from bbx.plan import Plan, Rates
from bbx.providers import load_backbone
from bbx.rates import shared_rate
from bbx.runner import extract
from tests.test_loop import memory_of

CPU = torch.device("cpu")
WORK = Work("float32", "none", 8)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measurement is made, in a moment."""
    monkeypatch.setattr(probe, "SECONDS", 0.001)
    monkeypatch.setattr("bbx.bench.measure.END_SECONDS", 0.01)
    monkeypatch.setattr("bbx.bench.measure._STORED_NBYTES", 1_000_000)


@pytest.fixture
def backbone() -> Backbone:
    return load_backbone("toy", stages="all")


def is_rate(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0


def rates_of_sizes(monkeypatch: pytest.MonkeyPatch, rates: dict[int, float]) -> list[int]:
    """Has each batch size its rate; gives the sizes that are tried."""
    seen: list[int] = []

    def rate(_backbone: object, _device: object, work: Work, _settings: object) -> Tried:
        seen.append(work.batch_size)
        return Tried(work.batch_size, rates.get(work.batch_size, 1.0))

    monkeypatch.setattr(probe, "forward_rate", rate)
    return seen


def growth_of(backbone: Backbone, *, most: int = 64) -> Growth:
    return grow(backbone, CPU, WORK, lambda size: choose(backbone, CPU, rows=100, batch_size=size), most=most)


def plan_of(images: Path, **options: object) -> Plan:
    plans: list[Plan] = []
    extract(images, model="toy", output=images.parent / "f.h5", on_plan=plans.append, **options)
    return plans[0]


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("rates", "tried", "best"),
    [
        ({1: 0.9, 2: 2}, [1], 1),
        ({1: 100, 2: 200, 4: 205, 8: 206}, [1, 2, 4, 8], 2),
        ({1: 100, 2: 90, 4: 80}, [1, 2, 4], 1),
        ({1: 100, 2: 100, 4: 200, 8: 200, 16: 210}, [1, 2, 4, 8, 16], 4),
        ({1: 100, 2: 200, 4: 300, 8: 400, 16: 500, 32: 600, 64: 700}, [1, 2, 4, 8, 16, 32, 64], 64),
        ({1: 100, 2: 104, 4: 108, 8: 50}, [1, 2, 4], 2),
    ],
)
def test_batches_grow_until_two_doublings_gain_too_little(backbone, monkeypatch, rates, tried, best):
    seen = rates_of_sizes(monkeypatch, rates)
    growth = growth_of(backbone)
    assert seen == tried
    assert growth.best == best
    assert f"--batch-size auto is {best}," in growth.describe()


@pytest.mark.parametrize(("most", "tried"), [(1, [1]), (3, [1, 2, 3]), (5, [1, 2, 4, 5])])
def test_a_batch_beyond_the_number_of_rows_is_not_tried(backbone, monkeypatch, most, tried):
    seen = rates_of_sizes(monkeypatch, {size: 2.0**size for size in range(10)})
    growth_of(backbone, most=most)
    assert seen == tried


def test_memory_that_is_full_ends_the_growth(backbone, monkeypatch):
    monkeypatch.setattr(Backbone, "__call__", memory_of(2))
    monkeypatch.setattr(probe, "GAIN", -1.0)  # whatever its rate, a doubling counts as gain
    growth = growth_of(backbone)
    assert [one.batch_size for one in growth.tried] == [1, 2]
    assert growth.why == "the memory does not hold 4"


def test_a_device_that_cannot_hold_the_first_batch_is_tried_with_smaller_ones(backbone, monkeypatch):
    monkeypatch.setattr(Backbone, "__call__", memory_of(3))
    monkeypatch.setattr(probe, "_FIRST", {"cpu": 16})
    growth = growth_of(backbone)
    assert [one.batch_size for one in growth.tried] == [2]
    assert growth.best == 2
    monkeypatch.setattr(Backbone, "__call__", memory_of(0))
    with pytest.raises(StartError, match="too little memory for one image"):
        growth_of(backbone)


def test_growth_stops_before_the_memory_of_a_machine_is_full(backbone, monkeypatch):
    monkeypatch.setattr(probe, "GAIN", -1.0)
    monkeypatch.setattr(probe, "available_nbytes", lambda: -1.0)
    assert growth_of(backbone).why == "the memory that is free might not hold 2"


def test_the_forward_is_measured_on_noise_through_the_runs_own_streams(backbone, monkeypatch):
    seen: list[torch.Tensor] = []
    real = Backbone.__call__

    def call(self: Backbone, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(pixels)
        return real(self, pixels)

    monkeypatch.setattr(Backbone, "__call__", call)
    settings = choose(backbone, CPU, rows=1000, batch_size=8)
    assert is_rate(forward_rate(backbone, CPU, WORK, settings).rate)
    assert len(seen) >= 2 * settings.streams
    assert {len(pixels) for pixels in seen} == {8}
    assert all(pixels.std() > 0.5 for pixels in seen)
    assert len(set(noise(backbone.preprocess, 2).ravel().tolist())) == 256


def test_auto_picks_a_size_that_was_tried_and_says_what_it_found(bbx_cli, pictures):
    ran = bbx_cli("extract", "--json", "--model", "toy", "--batch-size", "auto", pictures)
    facts = json.loads(ran.out)
    assert (ran.code, facts["done"]) == (0, 7)
    note = next(line for line in facts["warnings"] if line.startswith("--batch-size auto is"))
    assert f" {facts['batch_size']}: " in note.replace("(", " ")
    assert facts["batch_size"] in (1, 2, 4, 7)
    assert note in ran.err
    again = json.loads(bbx_cli("extract", "--json", "--model", "toy", "--batch-size", "auto", pictures).out)
    assert not any("auto" in line for line in again["warnings"])  # nothing is to do


def test_none_stays_the_fixed_default(pictures):
    assert plan_of(pictures, batch_size=None).batch_size == 7
    assert plan_of(pictures, batch_size=3).batch_size == 3


@pytest.mark.parametrize("text", ["0", "-3", "x", "1.5", "", "٣", "AUTO2"])
def test_a_batch_size_that_is_none_is_refused(bbx_cli, pictures, text):
    ran = bbx_cli("extract", "--model", "toy", "--batch-size", text, pictures)
    assert ran.code == 2
    assert "--batch-size" in ran.err
    assert "or auto" in ran.err


def test_auto_does_not_go_with_deterministic(pictures):
    with pytest.raises(UsageError, match="--deterministic does not go with --batch-size auto"):
        plan_of(pictures, batch_size="auto", deterministic=True)
    with pytest.raises(UsageError, match="--batch-size cannot be 'many'"):
        plan_of(pictures, batch_size="many")


def test_a_dry_run_says_what_will_be_the_limit_and_writes_nothing(bbx_cli, pictures, tmp_path):
    (pictures / "003.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    before = files_below(tmp_path)
    ran = bbx_cli("extract", "--json", "--dry-run", "--model", "toy", pictures)
    rates = json.loads(ran.out)["rates"]
    assert set(rates) == {"decode", "compute", "store", "cores", "limit", "expected"}
    assert all(is_rate(rates[name]) for name in ("decode", "compute", "store", "cores", "expected"))
    assert rates[rates["limit"]] == min(rates["decode"], rates["compute"], rates["store"])
    assert f"limit   {rates['limit']}: " in ran.err
    assert "for 7 images" in ran.err
    assert files_below(tmp_path) == before


def test_a_long_run_is_measured_and_a_short_one_is_not(pictures, monkeypatch):
    assert plan_of(pictures).rates is None
    monkeypatch.setattr("bbx.runner.LONG", 7)
    assert plan_of(pictures).rates is None  # all done: nothing to measure for
    rates = plan_of(pictures, mode="overwrite").rates
    assert rates is not None
    assert is_rate(rates.expected)


def test_a_machine_that_refuses_to_be_measured_does_not_stop_the_run(pictures, monkeypatch):
    def full(*_args: object, **_options: object) -> None:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr("bbx.runner.LONG", 1)
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    plan = plan_of(pictures)
    assert plan.rates is None
    assert "Disk quota exceeded" in plan.notes[-1]


@pytest.fixture
def measured_with(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineSettings, bool]]:
    """How each forward was measured for a plan: by which settings, and by deterministic algorithms or not."""
    seen: list[tuple[EngineSettings, bool]] = []

    def rate(_backbone: object, _device: object, work: Work, settings: EngineSettings) -> Tried:
        seen.append((settings, torch.are_deterministic_algorithms_enabled()))
        return Tried(work.batch_size, 50.0)

    monkeypatch.setattr("bbx.rates.forward_rate", rate)
    return seen


def test_a_run_that_compiles_is_measured_with_eager_code_and_its_plan_says_so(pictures, monkeypatch, measured_with):
    monkeypatch.setattr(settings, "COMPILE_PAYS", {"cpu": 0.0})
    plan = plan_of(pictures, engine="compile", device="cpu", dry_run=True)
    assert plan.engine.engine == "compile"
    assert [how.engine for how, _ in measured_with] == ["eager"]
    notes = "\n".join(plan.notes)
    assert "the first batch waits for the code" in notes
    assert "was measured with eager code" in notes
    assert "eager" not in "\n".join(plan_of(pictures, dry_run=True).notes)


def test_a_deterministic_run_is_measured_with_deterministic_algorithms(pictures, measured_with):
    plan_of(pictures, dry_run=True, deterministic=True)
    plan_of(pictures, dry_run=True)
    assert [deterministic for _, deterministic in measured_with] == [True, False]


def test_a_core_that_poses_as_two_is_one_to_torch(monkeypatch):
    monkeypatch.setattr("bbx.rates.cores", lambda: 16)
    monkeypatch.setattr("bbx.rates.real_cores", lambda: 8)
    eight = EngineSettings(streams=8)
    assert shared_rate(CPU, eight, decode=100, workers=16, compute=50) == pytest.approx(1 / (1 / 100 + 1 / 50))
    assert shared_rate(CPU, eight, decode=100, workers=8, compute=50) == pytest.approx(1 / (0.5 / 100 + 1 / 50))
    assert shared_rate(torch.device("cuda"), eight, decode=100, workers=8, compute=50) is None


def test_the_time_of_packing_is_not_in_the_estimate_and_the_plan_says_so(bbx_cli, pictures):
    packed = bbx_cli("extract", "--dry-run", "--model", "toy", "--compress", "gzip", pictures)
    assert "for 7 images, and then the packing by gzip" in " ".join(packed.err.split())
    assert "and then the" not in bbx_cli("extract", "--dry-run", "--model", "toy", pictures).err


@pytest.mark.parametrize(
    ("rates", "limit", "expected"),
    [
        (Rates(280, 31, 600), "compute", 31),
        (Rates(20, 31, 600), "decode", 20),
        (Rates(280, 31, 3, 25), "store", 3),
        (Rates(280, 31, 600, 25), "compute", 25),
    ],
)
def test_the_least_is_the_limit_and_shared_cores_are_told(rates, limit, expected):
    from bbx.run_report import rates_text

    assert (rates.limit, rates.expected) == (limit, expected)
    text = rates_text(rates, 1_000_000)
    assert text.startswith(f"{limit}: {rates.least} images/s (")
    assert ("on shared cores" in text) == (expected == 25)


def test_the_limit_reads_as_a_sentence():
    from bbx.run_report import duration_text, rates_text

    told = "compute: 31 images/s (decode 280, store 600): about 9 h for 1,000,000 images"
    assert rates_text(Rates(280, 31, 600), 1_000_000) == told
    assert [duration_text(s) for s in (0.2, 42, 300, 32400, 864000)] == ["1 s", "42 s", "5 min", "9 h", "10 days"]


def test_hours_to_go_do_not_begin_again_with_each_day():
    from bbx.run_report import clock_text

    assert [clock_text(s) for s in (0.4, 61, 107_892, 864_000)] == ["00:00:00", "00:01:01", "29:58:12", "240:00:00"]


@pytest.mark.parametrize(
    "options", [(), ("--batch-size", "auto", "--dtype", "float16", "--size", "48", "--workers", 1)]
)
def test_bench_measures_everything_and_leaves_nothing(bbx_cli, tmp_path, options):
    ran = bbx_cli("bench", "toy", "--stages", "stem,stage1", "--json", *options)
    facts = json.loads(ran.out)
    assert ran.code == facts["exit_code"] == 0
    assert set(facts) >= {"model", "stages", "device", "engine", "rates", "decode_fast", "plain", "compiled", "whole",
                          "batches", "early_exit", "store_share", "end_to_end", "share", "best_engine",
                          "best_batch_size", "command"}  # fmt: skip
    rates = [facts[name] for name in ("decode_fast", "plain", "whole", "early_exit", "store_nbytes", "raw_nbytes",
                                      "store_share", "end_to_end", "share", "expected_share")]  # fmt: skip
    assert all(map(is_rate, [*rates, *(facts["rates"][name] for name in ("decode", "compute", "store", "expected"))]))
    assert facts["compiled"] is None
    assert facts["best_batch_size"] in [one["batch_size"] for one in facts["batches"]]
    assert facts["share"] == facts["end_to_end"] / facts["rates"][facts["rates"]["limit"]]
    assert (facts["images"], facts["made"], facts["stages"]) == (64, True, ["stem", "stage1"])
    assert files_below(tmp_path) == []


def test_the_command_that_bench_ends_with_runs(bbx_cli, pictures, tmp_path):
    (pictures / "003.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    ran = bbx_cli("bench", "toy", pictures, "--stages", "0-1", "--size", "48x32", "--dtype", "float16")
    assert ran.code == 0, ran.err
    assert all(word in ran.out for word in ("decode", "--decode fast", "forward", "store", "end to end", "early exit"))
    command = ran.out.splitlines()[-1].split()
    assert command[:2] == ["bbx", "extract"]
    assert "--weights" not in command
    assert files_below(tmp_path) == ["pictures", *(f"pictures/{number:03}.png" for number in range(7))]
    again = bbx_cli(*command[1:], "--json")
    assert (again.code, json.loads(again.out)["done"]) == (4, 6)


def test_the_command_has_the_weights_that_were_asked_for(bbx_cli, tmp_path):
    ran = bbx_cli("bench", "toy", "--weights", "random")
    assert ran.code == 0, ran.err
    assert " --weights random " in ran.out.splitlines()[-1]


def test_bench_tells_of_unreadable_images_and_measures_the_others(bbx_cli, tmp_path, picture):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    ran = bbx_cli("bench", "toy", "bad", "--json")
    assert ran.code == 3
    assert "not one image can be read" in ran.err
    assert files_below(tmp_path) == ["bad", "bad/1.png"]
    picture(tmp_path / "bad" / "2.png")
    ran = bbx_cli("bench", "toy", "bad", "--json")
    assert ran.code == 0, ran.err
    facts = json.loads(ran.out)
    assert is_rate(facts["end_to_end"])
    assert any("images cannot be read, and are in the rates" in note for note in facts["notes"])


def test_bench_says_what_is_wrong_and_leaves_nothing(bbx_cli, tmp_path):
    assert bbx_cli("bench", "toy", "--stages", "stage9").code == 2
    assert bbx_cli("bench", "toy", "nowhere").code in (2, 3)
    assert bbx_cli("bench", "toy", "--batch-size", "0").code == 2
    assert files_below(tmp_path) == []


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has decoding and the end of a bench measured in no time; gives how many processes decoded."""
    seen: list[int] = []

    def rate(_paths: object, _settings: object, workers: int, *, device: object) -> float:
        seen.append(workers)
        return 100.0

    monkeypatch.setattr("bbx.rates.decode_rate", rate)
    monkeypatch.setattr("bbx.bench.measure.decode_rate", rate)
    monkeypatch.setattr("bbx.bench.measure._end_to_end", lambda *_: (10.0, 64, []))
    return seen


def test_bench_measures_the_engine_of_a_long_job(bbx_cli, decoding):
    facts = json.loads(bbx_cli("bench", "toy", "--json", "--workers", 12, "--batch-size", 96).out)
    assert set(decoding) == {12}
    assert facts["batch_size"] == 96


def test_the_extraction_at_the_end_keeps_within_its_room_and_says_so(bbx_cli, monkeypatch):
    monkeypatch.setattr("bbx.bench.measure._END_NBYTES", 200_000)
    ran = bbx_cli("bench", "toy", "--stages", "stem", "--batch-size", 20, "--json")
    facts = json.loads(ran.out)
    assert ran.code == 0, ran.err
    assert facts["end_rows"] == 200_000 // (4 * 16 * 16 * 4) < 6 * 20
    assert any("the 120 that keep busy" in note and "--batch-size" in note for note in facts["notes"])


def test_where_compiled_code_wins_its_own_batch_size_is_told(bbx_cli, monkeypatch, decoding):
    from bbx import rates
    from bbx.bench import measure

    def rate(_backbone: object, _device: object, work: Work, settings: EngineSettings) -> Tried:
        return Tried(work.batch_size, 500.0 if settings.engine == "compile" else 100.0)

    for place in (measure, rates, probe):
        monkeypatch.setattr(place, "forward_rate", rate)
    monkeypatch.setattr("bbx.engine.settings._missing_compiler", lambda _device: "")
    facts = json.loads(bbx_cli("bench", "toy", "--engine", "compile", "--batch-size", 3, "--json").out)
    assert (facts["best_engine"], facts["best_batch_size"]) == ("compile", 3)
    assert "--batch-size 3 --engine compile" in facts["command"]


def test_bench_needs_no_disk_for_a_long_job(bbx_cli, tmp_path, monkeypatch, decoding):
    def full(_path: Path, needed: int) -> None:
        if needed > 1_000_000:
            raise StartError("the disk is full")

    monkeypatch.setattr("bbx.plan.check_room", full)
    monkeypatch.setattr("bbx.runner.free_nbytes", lambda _path: 1_000_000)
    ran = bbx_cli("bench", "toy", "--stages", "all", "--json")
    assert ran.code == 0, ran.err
    assert is_rate(json.loads(ran.out)["rates"]["decode"])
    assert files_below(tmp_path) == []


def test_a_folder_that_may_not_be_written_to_is_named(bbx_cli, tmp_path, monkeypatch):
    def refused(*_args: object, **_options: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refused)
    ran = bbx_cli("bench", "toy", "--json")
    facts = json.loads(ran.out)
    assert ran.code == 3
    assert facts["error"] == f"no folder for the measurement can be made in {tmp_path}: Permission denied"
    assert "cd to one" in facts["hint"]


KILLED = """
import os, signal
from pathlib import Path
from bbx.bench.folder import own_folder
with own_folder(Path()) as folder:
    (folder / "links").mkdir()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_bench_left_is_removed_by_the_next_and_no_more(tmp_path):
    from bbx.bench.folder import own_folder

    (tmp_path / ".bbx-bench-mine").mkdir()
    with own_folder(tmp_path) as held:
        subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, check=False, capture_output=True)
        assert len(files_below(tmp_path)) == 6  # three folders, two locks, and the links of the one killed
        with own_folder(tmp_path) as own:
            assert sorted(tmp_path.iterdir()) == sorted([held, own, tmp_path / ".bbx-bench-mine"])
        assert files_below(held) == ["lock"]
    assert files_below(tmp_path) == [".bbx-bench-mine"]


def test_a_bench_that_is_stopped_begins_again_and_a_run_goes_on(bbx_cli, pictures, monkeypatch):
    def stopped(*_args: object, **_options: object) -> None:
        raise Signalled(2)

    monkeypatch.setattr("bbx.bench.bench", stopped)
    monkeypatch.setattr("bbx.runner.find_images", stopped)
    bench, extraction = bbx_cli("bench", "toy"), bbx_cli("extract", "--model", "toy", pictures)
    assert bench.code == extraction.code == 130
    assert "the same command starts again" in bench.err
    assert "the same command starts or continues it" in extraction.err


def test_made_pictures_are_the_same_each_time_and_never_blank(tmp_path):
    import numpy as np
    from PIL import Image

    from bbx.bench.pictures import make_pictures

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one, other = ([path.read_bytes() for path in make_pictures(tmp_path / name)] for name in ("a", "b"))
    assert one == other
    assert len(set(one)) == 64
    picture = Image.open(tmp_path / "a" / "07.jpg")
    assert picture.size == (640, 480)
    assert np.asarray(picture).std() > 20
