"""The engine: streams, layout, folding and compiling change nothing but the time, to a stated tolerance."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bbx
from bbx.backbone import Backbone
from bbx.engine import EngineSettings, choose, settings
from bbx.engine.fold import fold
from bbx.engine.prepare import prepared, replica
from bbx.errors import StartError, UsageError
from bbx.providers import load_backbone
from bbx.runner import extract
from tests.conftest import EXTRAS
from tests.test_loop import TOLERANCE, largest_difference

CPU = torch.device("cpu")
# Libraries that run networks in ways of their own: by methods, and by hooks that they keep installed.
OTHERS = [
    model
    for model in ("timm:vit_tiny_patch16_224", "timm:resnet18", "transformers:swin", "transformers:dinov2")
    if model.partition(":")[0] in EXTRAS
]
# Families whose blocks differ: plain, squeezed and excited, dense, shuffled, branching; and what has no BatchNorm.
FOLDED = ["resnet18", "efficientnet-lite0", "mobilenet_v3_small", "densenet121", "regnet_y_400mf", "shufflenet_v2_x0_5"]
UNFOLDED = ["swin_t", "vgg11", "convnext_tiny"]
SLOW_FOLDED = [
    "resnet50", "efficientnet_b0", "mobilenet_v2", "vgg11_bn", "googlenet", "inception_v3", "mnasnet0_5",
    "wide_resnet50_2", "resnext50_32x4d", "regnet_x_400mf", "densenet169",
]  # fmt: skip


def noise(backbone: Backbone, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((count, 3, *backbone.preprocess.size), generator=generator)


def maps_of(backbone: Backbone, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        return {name: tensor.clone() for name, tensor in backbone(pixels).items()}


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of any stage, relative to that stage's largest value."""
    assert list(one) == list(other)
    return max(float((one[name] - other[name]).abs().max() / one[name].abs().max()) for name in one)


def norms(backbone: Backbone) -> int:
    return sum("BatchNorm" in type(module).__name__ for module in backbone.network.modules())


def stirred(backbone: Backbone) -> Backbone:
    """Statistics as training leaves them: fresh ones are 0 and 1, and folding them wrongly would not show."""
    generator = torch.Generator().manual_seed(2)
    for module in backbone.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return backbone


def check_prepared(model: str, *, folds: bool) -> None:
    backbone = stirred(load_backbone(model, weights="random", stages="all"))
    pixels = noise(backbone)
    before = maps_of(backbone, pixels)
    fast = prepared(backbone, EngineSettings(channels_last=True, folded=True))
    assert (norms(fast) < norms(backbone)) == folds
    assert apart(before, maps_of(fast, pixels.contiguous(memory_format=torch.channels_last))) <= TOLERANCE
    assert apart(before, maps_of(backbone, pixels)) == 0.0  # the weights it shares are as they were


@pytest.mark.parametrize("model", FOLDED)
def test_a_folded_network_in_channels_last_gives_the_same_stages(model):
    check_prepared(model, folds=True)


@pytest.mark.parametrize("model", UNFOLDED)
def test_a_network_without_batch_norm_is_left_alone(model):
    check_prepared(model, folds=False)


@pytest.mark.slow
@pytest.mark.parametrize("model", SLOW_FOLDED)
def test_folding_holds_for_every_family(model):
    check_prepared(model, folds=True)


def test_a_convolution_that_is_asked_for_stays_itself():
    backbone = stirred(load_backbone("resnet18", weights="random", stages="stem", layers="layer1.0.conv1,layer1.0.bn2"))
    before = maps_of(backbone, noise(backbone))
    fast = prepared(backbone, EngineSettings(folded=True))
    assert isinstance(fast.network.layer1[0].bn1, nn.BatchNorm2d)
    assert isinstance(fast.network.layer1[0].bn2, nn.Identity)  # its own output is the convolution's now
    assert apart(before, maps_of(fast, noise(backbone))) <= TOLERANCE


class Twice(nn.Module):
    """A convolution whose output goes two ways, which no hook can see."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        made = self.conv(pixels)
        return self.norm(made) + made


def test_a_network_that_folding_would_change_is_left_as_it_was():
    from bbx.spec import ModelRef
    from bbx.taps import Tap
    from tests.toy import PREPROCESS

    network = nn.Sequential(Twice()).eval()
    backbone = stirred(Backbone(ModelRef("", "twice"), network, (Tap("stem", "0"),), PREPROCESS, "random", ""))
    before = maps_of(backbone, noise(backbone))
    assert not fold(backbone)
    assert norms(backbone) == 1
    assert apart(before, maps_of(backbone, noise(backbone))) == 0.0


@pytest.mark.parametrize("model", ["resnet18", "swin_t", "torchvision:deeplabv3_resnet50", *OTHERS])
def test_a_replica_runs_modules_of_its_own_around_the_same_weights(model):
    backbone = load_backbone(model, weights="random", stages=[0, 1])
    other = replica(backbone)
    assert {id(one) for one in backbone.network.parameters()} == {id(one) for one in other.network.parameters()}
    ran: list[str] = []
    for path, module in backbone.network.named_modules():
        module.register_forward_pre_hook(lambda *_, path=path: ran.append(path))
    theirs = maps_of(other, noise(backbone, 1))
    assert not ran
    assert apart(maps_of(backbone, noise(backbone, 1)), theirs) == 0.0
    assert ran


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2  # a run leaves this as it was
    torch.set_num_threads(before)


@pytest.mark.parametrize("model", ["toy", "resnet18", "swin_t", *OTHERS])
def test_two_streams_give_every_row_its_own_maps(pictures, tmp_path, two_threads, model):
    options = {"model": model, "weights": "random", "stages": "0-2", "device": "cpu"}
    plans = []
    extract(pictures, output=tmp_path / "two.h5", batch_size=1, on_plan=plans.append, **options)
    torch.set_num_threads(1)
    extract(pictures, output=tmp_path / "one.h5", batch_size=1, on_plan=plans.append, **options)
    torch.set_num_threads(2)
    assert [plan.engine.streams for plan in plans] == [2, 1]
    assert largest_difference(tmp_path / "one.h5", tmp_path / "two.h5") <= TOLERANCE


@pytest.mark.parametrize(
    ("model", "last"), [("resnet18", True), ("vgg11", True), ("swin_t", False), ("vit_b_32", False)]
)
def test_convnets_are_computed_channels_last(model, last):
    backbone = load_backbone(model, weights="random")
    assert choose(backbone, CPU, rows=100, batch_size=8).channels_last is last
    assert choose(backbone, CPU, channels_last="yes", rows=100, batch_size=8).channels_last
    assert not choose(backbone, CPU, channels_last="no", rows=100, batch_size=8).channels_last


def test_a_short_job_is_not_folded(monkeypatch):
    backbone = load_backbone("resnet18", weights="random")
    few, many = (choose(backbone, CPU, rows=rows, batch_size=8).folded for rows in (10, 1000))
    assert (few, many) == (False, True)


def test_compiling_waits_for_a_job_that_pays_for_it_and_the_plan_says_so(bbx_cli, pictures):
    options = ("--weights", "random", "--engine", "compile", "--device", "cpu", "--dry-run")
    ran = bbx_cli("extract", "--model", "resnet18", *options, pictures)
    assert ran.code == 0
    assert "--engine compile pays from about 2,000 images on" in ran.err
    assert "eager" in ran.err


def test_compiling_does_not_go_with_free_layers(bbx_cli, pictures):
    ran = bbx_cli("extract", "--model", "toy", "--layers", "one", "--engine", "compile", pictures)
    assert ran.code == 2
    assert "--engine compile does not go with --layers" in ran.err


def test_without_a_compiler_compiling_is_refused(monkeypatch):
    from torch._inductor import cpp_builder

    def none() -> str:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(StartError, match="C\\+\\+ compiler") as caught:
        choose(load_backbone("resnet18", weights="random"), CPU, engine="compile", rows=10**6, batch_size=8)
    assert "leave it out" in caught.value.hint


def test_an_engine_that_does_not_exist_is_named(pictures, tmp_path):
    with pytest.raises(UsageError, match="--engine") as caught:
        extract(pictures, model="toy", output=tmp_path / "f.h5", engine="compiled")
    assert "compile" in caught.value.hint


@pytest.mark.slow
@pytest.mark.parametrize("model", ["toy", "resnet18", "swin_t"])
def test_compiled_code_gives_the_same_rows_a_bad_one_and_a_last_batch_among_them(
    pictures, tmp_path, monkeypatch, model
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(settings, "COMPILE_PAYS", {"cpu": 1})
    (pictures / "003.png").write_bytes(b"not an image")
    options = {"model": model, "weights": "random", "stages": "0-2", "batch_size": 4, "device": "cpu"}
    extract(pictures, output=tmp_path / "eager.h5", **options)
    plans = []
    done = extract(pictures, output=tmp_path / "compiled.h5", engine="compile", on_plan=plans.append, **options)
    assert plans[0].engine.engine == "compile"
    assert done.failed == 1
    with bbx.open(tmp_path / "eager.h5") as one, bbx.open(tmp_path / "compiled.h5") as other:
        for stage in one.stages:
            a, b = one[stage].get(one.done), other[stage].get(other.done)
            assert np.abs(a - b).max() <= TOLERANCE * np.abs(a).max(), stage


FAULTS = """
import resource, sys, torch
from contextlib import nullcontext
from bbx.engine import kept_memory
with kept_memory() if sys.argv[1] == "kept" else nullcontext():
    torch.ones(16 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 << 20)  # 64 MiB, beyond what glibc ever keeps by itself: 16,384 pages, hence faults, each
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is tested is a switch of glibc's allocator")
def test_memory_of_one_batch_serves_the_next():
    # In processes of their own, where nothing else has cut the heap into pieces.
    kept, usual = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True).stdout)
        for how in ("kept", "usual")
    )
    assert kept <= 2 * 16_384 < 5 * 16_384 < usual  # a piece or two may be new, where something came to lie between


def test_what_was_kept_goes_back_at_the_end(pictures, tmp_path, monkeypatch):
    trimmed = []
    libc = ctypes.CDLL(None)

    class Spy:
        gnu_get_libc_version = mallopt = staticmethod(lambda *_: 1)
        malloc_trim = staticmethod(lambda room: trimmed.append(room) or libc.malloc_trim(room))

    monkeypatch.setattr("bbx.engine.memory._glibc", Spy)
    extract(pictures, model="toy", output=tmp_path / "f.h5")
    assert trimmed == [0]


def test_the_file_says_how_it_was_computed(pictures, tmp_path: Path):
    extract(pictures, model="resnet18", weights="random", output=tmp_path / "f.h5", device="cpu")
    with bbx.open(tmp_path / "f.h5") as file:
        assert file.attempts[0]["engine"].startswith("eager, channels last, 1 ×")


def test_what_a_batch_counted_before_its_memory_ran_out_is_not_counted_twice(pictures, tmp_path, monkeypatch):
    from bbx.engine.compute import Compute

    def broken(self: Backbone, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: tensor.fill_(float("nan")) for name, tensor in real(self, pixels).items()}

    def full_once(self: Compute, name: str, *rest: object) -> torch.Tensor:
        stored.append(name)
        if len(stored) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return storing(self, name, *rest)

    real, storing, stored = Backbone.__call__, Compute._stored, []
    monkeypatch.setattr(Backbone, "__call__", broken)
    options = {"model": "toy", "stages": "all", "batch_size": 4, "device": "cpu"}
    whole = extract(pictures, output=tmp_path / "whole.h5", **options)
    monkeypatch.setattr(Compute, "_stored", full_once)
    halved = extract(pictures, output=tmp_path / "halved.h5", **options)
    assert any("out of memory" in note for note in halved.notes)
    assert halved.nonfinite == whole.nonfinite != {}
