"""The engine: streams, layout, folding and compiling change nothing but the time, to a stated tolerance."""

from __future__ import annotations

import copy
import ctypes
import os
import platform
import resource
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bbx
from bbx import runner
from bbx.backbone import Backbone, normalise
from bbx.engine import EngineSettings, choose, kept_memory, settings, usual_batch
from bbx.engine.memory import keep
from bbx.engine.pack import ANY, NARROW, PackedWeight, PointwiseWeight
from bbx.engine.prepare import prepared
from bbx.engine.remake import Remake, remake
from bbx.engine.replica import replica
from bbx.engine.switches import deterministic, own_threads, usual_threads
from bbx.engine.trial import hard_pixels
from bbx.errors import StartError, UsageError
from bbx.providers import load_backbone, load_structure
from bbx.runner import extract
from tests.conftest import EXTRAS
from tests.test_loop import TOLERANCE, largest_difference

CPU = torch.device("cpu")
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is tested is a switch of glibc's allocator")
# A shift of all values at which folding rounds by 5e-6 to 1e-5 of the largest.
SHIFT = 400.0
# Libraries that run networks in ways of their own: by methods, and by hooks that they keep installed.
OTHERS = [
    model
    for model in ("timm:vit_tiny_patch16_224", "timm:resnet18", "transformers:swin", "transformers:dinov2")
    if model.partition(":")[0] in EXTRAS
]
# Families whose blocks differ: plain, squeezed and excited, dense, shuffled, branching; and what has no BatchNorm.
FOLDED = ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "regnet_y_400mf", "shufflenet_v2_x0_5"]
UNFOLDED = ["swin_t", "vgg11", "convnext_tiny"]
SLOW_FOLDED = [
    "resnet50", "efficientnet_b0", "vgg11_bn", "googlenet", "inception_v3", "mnasnet0_5",
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


def check_prepared(model: str, *, folds: bool, stages: str = "all") -> None:
    backbone = stirred(load_backbone(model, weights="random", stages=stages))
    pixels = noise(backbone)
    before = maps_of(backbone, pixels)
    fast = prepared(backbone, EngineSettings(channels_last=True, folded=True))
    assert (norms(fast) < norms(backbone)) == folds
    assert apart(before, maps_of(fast, pixels.contiguous(memory_format=torch.channels_last))) <= TOLERANCE
    assert apart(before, maps_of(backbone, pixels)) == 0.0  # the weights it shares are as they were


@pytest.fixture
def any_rounding(monkeypatch):
    """Folding wherever the promise of 1e-5 holds, beyond the trial's own bound."""
    monkeypatch.setattr("bbx.engine.trial.TOLERANCE", TOLERANCE)


@pytest.mark.parametrize("model", FOLDED)
def test_a_folded_network_in_channels_last_gives_the_same_stages(model):
    check_prepared(model, folds=True)


def test_lite0_folds_as_far_as_its_values_stay():
    # Its random weights are its release's: at stage5 folding rounds by 5.2e-6, where 5e-6 is allowed.
    check_prepared("efficientnet-lite0", folds=True, stages="stage4")


def test_lite0_folded_to_its_end_keeps_the_promise(any_rounding):
    check_prepared("efficientnet-lite0", folds=True)


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
    assert remake(backbone, channels_last=False, threads=1).pairs == ()
    assert norms(backbone) == 1
    assert apart(before, maps_of(backbone, noise(backbone))) == 0.0


def of_modules(*modules: nn.Module) -> Backbone:
    """A backbone whose one stage is all of `modules`, the same each time."""
    from bbx.spec import ModelRef
    from bbx.taps import Tap
    from tests.toy import PREPROCESS

    network = nn.Sequential(nn.Sequential(*modules)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return Backbone(ModelRef("", "small"), network, (Tap("stem", "0"),), PREPROCESS, "random", "")


BEFORE_CONVOLUTION = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
ON_VECTORS = (nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.BatchNorm1d(4), nn.Unflatten(2, (30, 30)))


@pytest.mark.parametrize("modules", [BEFORE_CONVOLUTION, ON_VECTORS, (Twice(),)])
def test_what_does_not_fold_is_not_said_to(modules):
    backbone = of_modules(*modules)
    settings = choose(backbone, CPU, rows=5000, batch_size=8)
    assert "batch norm folded" not in settings.describe()
    assert norms(prepared(backbone, settings)) == 1
    folds = of_modules(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert "batch norm folded" in choose(folds, CPU, rows=5000, batch_size=8).describe()


def test_folding_is_tried_once_and_changes_nothing_meanwhile(monkeypatch):
    calls = []
    real = Backbone.__call__
    monkeypatch.setattr(Backbone, "__call__", lambda self, pixels: calls.append(self) or real(self, pixels))
    backbone = of_modules(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for _ in range(2):
        settings = choose(backbone, CPU, rows=5000, batch_size=8)
        assert norms(prepared(backbone, settings)) == 0
    assert len(calls) == 2  # without, and with
    assert backbone not in calls
    assert norms(backbone) == 1


@pytest.mark.parametrize("variance", [1.0, 1e-4])
def test_folding_that_rounds_too_much_is_not_done(variance):
    def shifted(by: float) -> Backbone:
        # A large value is added and taken away again, which folding never adds: two roundings in place of none.
        backbone = of_modules(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16))
        convolution, norm = backbone.network[0]
        convolution.bias.data.fill_(by)
        norm.running_mean.fill_(by)
        norm.running_var.fill_(variance)
        return backbone

    assert remake(shifted(0), channels_last=False, threads=1).pairs
    assert not remake(shifted(SHIFT), channels_last=False, threads=1).pairs


@pytest.mark.parametrize("model", ["efficientnet-lite0", "resnet18", "mobilenet_v3_small", "densenet121"])
def test_pictures_of_next_to_no_contrast_keep_their_values_too(model):
    # Lite0 is trained: of a flat picture its layers leave a hundredth, and folding rounds that by 4e-5.
    trained = model == "efficientnet-lite0"
    backbone = load_backbone(model, stages="all") if trained else stirred(load_backbone(model, weights="random"))
    backbone = backbone.select("all")
    random = np.random.default_rng(3)
    levels = random.integers(0, 255, (6, 1, 1, 1))
    cells = (levels + random.integers(0, 2, (6, *backbone.preprocess.size, 3))).astype(np.uint8)
    pixels = normalise(torch.from_numpy(cells), backbone.preprocess)
    fast = prepared(backbone, choose(backbone, CPU, rows=5000, batch_size=8))
    assert (norms(fast) == norms(backbone)) == trained
    before, after = maps_of(backbone, pixels), maps_of(fast, pixels)
    for name, maps in before.items():
        for one, other in zip(maps, after[name], strict=True):
            assert (one - other).abs().max() <= TOLERANCE * one.abs().max(), name


@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v3_small"])
@pytest.mark.parametrize("variance", [1e-2, 1e-4])
def test_tiny_variances_fold_only_as_far_as_the_values_stay(model, variance):
    backbone = load_backbone(model, weights="random", stages="all")
    for module in backbone.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(variance)
    fast = prepared(backbone, choose(backbone, CPU, channels_last="no", rows=5000, batch_size=8))
    assert apart(maps_of(backbone, noise(backbone)), maps_of(fast, noise(backbone))) <= TOLERANCE


def test_of_runs_side_by_side_the_last_puts_torchs_switches_back():
    def number() -> int:
        with ThreadPoolExecutor(1) as fresh:
            return fresh.submit(torch.get_num_threads).result()

    def set_to_one() -> None:
        with ThreadPoolExecutor(1) as own:
            own.submit(torch.set_num_threads, 1).result()

    usual, others = torch.get_num_threads(), os.environ.copy()
    torch.set_num_threads(3)
    one, other = ([own_threads(), deterministic(True)] for _ in range(2))
    for run in (one, other):
        assert usual_threads() == 3
        for switched in run:
            switched.__enter__()
        set_to_one()
    for run in (one, other):  # the first to come is the first to go
        assert torch.are_deterministic_algorithms_enabled()
        for switched in run:
            switched.__exit__(None, None, None)
    assert not torch.are_deterministic_algorithms_enabled()
    assert (number(), usual_threads()) == (3, 3)
    torch.set_num_threads(usual)
    assert os.environ.copy() == others


def test_a_user_without_a_home_keeps_torchs_own_folder(monkeypatch):
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(settings.Path, "home", nowhere)
    settings.keep_compiled()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_without_memory_to_try_it_nothing_is_folded(monkeypatch):
    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    backbone = of_modules(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    wide = of_modules(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Linear(900, 900), nn.Unflatten(2, (30, 30)))
    assert backbone.stages  # measured while there was memory
    assert wide.stages
    monkeypatch.setattr(Backbone, "_run", full)
    assert remake(backbone, channels_last=False, threads=1) == Remake()
    monkeypatch.setattr("bbx.engine.pack.faster_up_to", lambda: ANY)
    assert remake(wide, channels_last=False, threads=1) == Remake()


def test_folding_keeps_no_map_that_the_network_is_done_with():
    class Watch(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            alive.append(sum(one() is not None for one in made))
            return pixels

    def note(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        made.append(weakref.ref(output))

    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    blocks = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)) for _ in range(4)]
    backbone = of_modules(*blocks, Watch())
    assert backbone.stages
    for block in blocks:
        block[0].register_forward_hook(note)
    alive.clear()
    assert len(remake(backbone, channels_last=False, threads=1).pairs) == 4
    assert alive[0] == 0


@pytest.mark.parametrize("most", [NARROW, ANY], ids=["narrow", "any"])
@pytest.mark.parametrize("model", ["swin_t", "convnext_tiny", "vit_b_32"])
def test_packed_layers_give_the_same_stages(model, most):
    backbone = load_backbone(model, weights="random", stages="all")
    before = maps_of(backbone, noise(backbone))
    fast = prepared(backbone, EngineSettings(packed=most))
    again = replica(fast)  # as every stream has one
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        after = maps_of(again, noise(backbone))
    layers = [one for one in backbone.network.modules() if type(one) is nn.Linear and one.in_features <= most]
    past = [one for one in layers if one.out_features == 1000]  # the classifier
    ran = {event.key: event.count for event in profile.key_averages()}
    assert ran.get("mkldnn::_linear_pointwise", 0) == len(layers) - len(
        past
    )  # swin gives its weights to F.linear itself
    weights = [one for one in again.network.parameters() if isinstance(one, PackedWeight)]
    assert [one.packed is None for one in weights].count(True) == len(past)
    assert apart(before, after) <= (1e-6 if most == NARROW else 5e-6)
    assert apart(before, maps_of(backbone, noise(backbone))) == 0.0


def test_a_packed_weight_is_a_plain_tensor_to_all_but_linear():
    layer = nn.Linear(6, 4)
    weight, pixels = PackedWeight.of(layer.weight), torch.randn(2, 5, 6)
    with torch.inference_mode():
        for given in (pixels, pixels[:0], pixels[0, 0], pixels.transpose(0, 1), pixels.double().float()):
            assert torch.allclose(F.linear(given, weight, layer.bias), layer(given), atol=1e-6)
        assert torch.allclose(F.linear(pixels, weight), F.linear(pixels, layer.weight), atol=1e-6)
        assert torch.equal(F.linear(input=pixels, weight=weight), F.linear(pixels, layer.weight))
        assert torch.equal(F.linear(pixels.double(), weight.double()), F.linear(pixels.double(), layer.weight.double()))
        assert torch.equal(F.linear(weight, pixels[0]), F.linear(layer.weight, pixels[0]))
        for made in (weight + 1, weight.t(), weight @ pixels[0].t(), torch.cat([weight, weight])):
            assert type(made) is torch.Tensor
    assert copy.deepcopy(weight) is weight


@pytest.mark.parametrize("model", ["resnet50", "mobilenet_v2", "densenet121"])
def test_packed_convolutions_of_one_cell_give_the_same_stages_and_take_no_detour(model):
    backbone = stirred(load_backbone(model, weights="random", stages="all"))
    pixels = noise(backbone).contiguous(memory_format=torch.channels_last)
    before = maps_of(backbone, pixels)
    fast = prepared(backbone, EngineSettings(channels_last=True, packed=ANY))
    again = replica(fast)

    def ran(one: Backbone) -> dict[str, int]:
        """By torch's operations, on one thread."""
        torch.set_num_threads(1)  # there torch gives such convolutions to MKL
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            maps.update(maps_of(one, pixels))
        return {event.key: event.count for event in profile.key_averages()}

    maps: dict[str, torch.Tensor] = {}
    with own_threads(), ThreadPoolExecutor(1) as stream:
        assert "aten::_slow_conv2d_forward" not in stream.submit(ran, again).result()
    weights = [one for one in again.network.parameters() if isinstance(one, PointwiseWeight)]
    assert any(one.ran for one in weights)  # not those past the last stage
    assert apart(before, maps) <= 5e-6
    assert apart(before, maps_of(backbone, pixels)) == 0.0


def test_a_convolutions_weight_is_a_plain_tensor_to_all_but_convolutions_channels_last():
    layer, packed = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1, bias=False)
    weight, pixels = PointwiseWeight.of(layer.weight), torch.randn(2, 6, 5, 7)
    packed._parameters["weight"] = weight  # type: ignore[assignment]
    packed.bias = layer.bias
    last = pixels.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        for given, ran in ((pixels, False), (pixels[0], False), (last.double().float(), True), (last, True)):
            weight.ran = False
            assert torch.allclose(packed(given), layer(given), atol=1e-6)
            assert weight.ran == ran
        assert packed(last).is_contiguous(memory_format=torch.channels_last)
        assert packed(last[:0]).shape == (0, 4, 5, 7)
        assert torch.equal(F.conv2d(last, weight, stride=2), F.conv2d(last, layer.weight, stride=2))
        assert torch.equal(F.conv2d(last, weight, None, 2), F.conv2d(last, layer.weight, None, 2))
        assert torch.equal(F.conv2d(last.double(), weight.double()), F.conv2d(last.double(), layer.weight.double()))
        for made in (weight + 1, weight.flatten(1), torch.cat([weight, weight])):
            assert type(made) is torch.Tensor
    assert copy.deepcopy(packed).weight is weight


def test_what_is_tried_is_tried_on_as_many_threads_as_it_runs_on(monkeypatch, two_threads):
    def seen(backbone: Backbone, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        threads.append(torch.get_num_threads())
        return maps_of(backbone, pixels)

    threads: list[int] = []
    monkeypatch.setattr("bbx.engine.remake.maps_of", seen)
    backbone = load_backbone("resnet18", weights="random", stages="stem")
    for size in (8, 64):  # two batches at once, or one on both threads
        choose(backbone, CPU, rows=5000, batch_size=size)
    assert threads == [1, 2]


class Nosy(nn.Module):
    """A network that looks into its normalisation, which folding takes away, and runs a layer of one cell."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.cell = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        made = self.norm(self.conv(pixels)) + self.norm.running_mean.sum()
        return self.cell(made)


@pytest.mark.parametrize(("last", "packed"), [("yes", ANY), ("no", 0)])
def test_where_all_together_fails_what_is_kept_is_what_runs(monkeypatch, last, packed):
    monkeypatch.setattr("bbx.engine.pack.faster_up_to", lambda: ANY)
    how = choose(of_modules(Nosy()), CPU, channels_last=last, rows=5000, batch_size=8)
    assert (how.folded, how.packed) == (False, packed)


def test_a_stage_that_cannot_be_compared_leaves_the_network_as_it_is():
    class Whole(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.long()

    how = choose(of_modules(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Whole()), CPU, rows=5000, batch_size=8)
    assert not how.folded


def test_where_only_narrow_layers_run_not_all_are_said_to_be_packed(monkeypatch):
    monkeypatch.setattr("bbx.engine.pack.faster_up_to", lambda: ANY)
    backbone = of_modules(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Unflatten(2, (30, 30)), nn.Linear(30, 30))
    backbone.network.add_module("past", nn.Linear(900, 2))
    assert choose(backbone.select("stem"), CPU, channels_last="no", rows=5000, batch_size=8).packed == NARROW


def test_what_is_tried_is_tried_in_the_layout_in_which_it_runs(monkeypatch):
    monkeypatch.setattr("bbx.engine.pack.faster_up_to", lambda: ANY)
    backbone = load_backbone("resnet50", weights="random", stages="stage1")
    ways = [choose(backbone, CPU, channels_last=last, rows=5000, batch_size=8) for last in ("yes", "no")]
    assert [(way.folded, way.packed) for way in ways] == [(True, ANY), (True, 0)]  # its convolutions are packed in one


def test_layers_are_packed_where_that_pays(monkeypatch):
    def is_packed(model: str, **changes: Any) -> int:
        backbone = load_backbone(model, weights="random").to(CPU, precision=changes.pop("precision", "float32"))
        return choose(backbone, CPU, **{"rows": 5000, "batch_size": 8, **changes}).packed

    monkeypatch.setattr("bbx.engine.pack.faster_up_to", lambda: NARROW)
    assert is_packed("swin_t") == NARROW
    assert not is_packed("resnet18")  # its one linear layer is the classifier's, of 512 inputs
    monkeypatch.setattr("bbx.engine.pack.faster_up_to", lambda: ANY)
    assert is_packed("swin_t") == ANY
    assert is_packed("swin_t", rows=10) == NARROW  # too few to try what wide layers change
    assert not is_packed("resnet18")  # its classifier does not run
    with monkeypatch.context() as patched:
        patched.setattr("bbx.engine.pack._MOST_NBYTES", 10 << 20)
        assert is_packed("swin_t") == NARROW
    with monkeypatch.context() as patched:
        patched.setattr("bbx.engine.trial.TOLERANCE", -1.0)
        assert is_packed("swin_t") == NARROW
    assert not is_packed("swin_t", precision="bf16")
    assert not is_packed("swin_t", engine="compile")
    monkeypatch.setattr("bbx.engine.pack.faster_up_to", lambda: 0)
    assert not is_packed("swin_t")


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


@pytest.mark.parametrize(("model", "size"), [("swin_t", 4), ("vit_b_32", 4), ("resnet18", 8), ("convnext_tiny", 8)])
def test_a_cpu_is_given_smaller_batches_where_it_computes_attention(model, size):
    backbone = load_structure(model)
    assert usual_batch(backbone, CPU) == size
    assert usual_batch(backbone, torch.device("cuda")) == 64


@pytest.mark.parametrize(
    ("threads", "rows", "batch_size", "expected"),
    [
        (1, 1000, 8, (1, 1)), (2, 1000, 8, (2, 1)), (8, 1000, 8, (8, 1)), (12, 1000, 8, (6, 2)), (15, 1000, 8, (7, 2)),
        (9, 1000, 8, (8, 1)), (20, 1000, 8, (8, 2)), (64, 1000, 8, (8, 8)), (6, 1000, 16, (3, 2)),
        (7, 1000, 16, (3, 2)), (3, 1000, 32, (1, 3)),
        (8, 17, 8, (2, 4)), (8, 1, 8, (1, 8)),  # fewer batches than threads: each gets more of them
        (8, 1000, 32, (2, 4)), (8, 1000, 64, (1, 8)), (8, 1000, 500, (1, 8)),  # 64 images in all, or one batch
    ],
)  # fmt: skip
def test_few_threads_are_left_over_and_no_more_than_64_images_are_held(
    monkeypatch, threads, rows, batch_size, expected
):
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    chosen = choose(load_backbone("toy", weights="random"), CPU, rows=rows, batch_size=batch_size)
    assert (chosen.streams, chosen.threads) == expected
    assert chosen.streams * chosen.threads >= 0.8 * threads


def test_a_container_has_threads_for_its_quota(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    monkeypatch.setattr(settings, "quota", lambda: 1.5)
    chosen = choose(load_backbone("toy", weights="random"), CPU, rows=1000, batch_size=8)
    assert (chosen.streams, chosen.threads) == (2, 1)


def test_a_compiler_that_does_not_work_is_named_and_no_defect_of_bbx(monkeypatch, pictures, tmp_path):
    def broken(*_args, **_kwargs):
        raise RuntimeError("CppCompileError: C++ compile error\n\nPython.h: No such file")

    monkeypatch.setattr(settings, "COMPILE_PAYS", {"cpu": 0.0})
    monkeypatch.setattr(torch, "compile", lambda *_args, **_kwargs: broken)
    with pytest.raises(StartError, match="--engine compile failed: CppCompileError"):
        extract(pictures, model="toy", output=tmp_path / "f.h5", engine="compile", device="cpu")
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(StartError, match="--engine compile failed") as caught:
        extract(pictures, model="toy", output=tmp_path / "f.h5", engine="compile", device="cpu")
    assert "leave it out" in caught.value.hint


CACHE = """
import os, torch
from bbx.engine import choose
from bbx.providers import load_backbone
choose(load_backbone("resnet18", weights="random"), torch.device("cpu"), engine="compile", rows=10**6, batch_size=8)
from torch._inductor.runtime.cache_dir_utils import cache_dir
print(cache_dir())
"""


def test_compiled_code_is_kept_in_the_users_cache(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", CACHE], check=True, capture_output=True, text=True, env=environment)
    assert ran.stdout.splitlines()[-1] == str(tmp_path / "bbx" / "inductor")


def test_a_short_job_is_not_folded(monkeypatch):
    backbone = load_backbone("resnet18", weights="random")
    few, many = (choose(backbone, CPU, rows=rows, batch_size=8).folded for rows in (10, 1000))
    assert (few, many) == (False, True)


def test_compiling_waits_for_a_job_that_pays_for_it_and_the_plan_says_so(bbx_cli, pictures):
    options = ("--weights", "random", "--engine", "compile", "--device", "cpu", "--dry-run")
    ran = bbx_cli("extract", "--model", "resnet18", *options, pictures)
    assert ran.code == 0
    assert "--engine compile pays from about 10 min of computing on; here are " in ran.err
    assert "eager" in ran.err
    assert "the first batch waits" not in ran.err


def test_what_is_left_decides_whether_compiling_pays(pictures, tmp_path, monkeypatch):
    asked: list[int] = []
    real = runner._eager_seconds

    def seconds(backbone: Backbone, device: torch.device, run: object, rows: int, last: str) -> float:
        asked.append(rows)
        assert real(backbone, device, run, rows, last) > 0 or not rows
        return 599.0

    monkeypatch.setattr(runner, "_eager_seconds", seconds)
    options = {"model": "resnet18", "weights": "random", "stages": "stem", "device": "cpu", "engine": "compile"}
    (pictures / "003.png").write_bytes(b"not an image")
    plans = []
    extract(pictures, output=tmp_path / "f.h5", on_plan=plans.append, **options)
    extract(pictures, output=tmp_path / "f.h5", on_plan=plans.append, retry_failed=True, **options)
    assert asked == [7, 1]
    assert [plan.engine.engine for plan in plans] == ["eager", "eager"]
    assert "here are 10 min" in plans[0].notes[0]


def test_a_deterministic_run_compiles_at_the_word(pictures, tmp_path, monkeypatch):
    plans = []
    monkeypatch.setattr(runner, "_eager_seconds", lambda *_: pytest.fail("measured"))
    extract(
        pictures, model="resnet18", weights="random", stages="stem", device="cpu", engine="compile", dry_run=True,
        deterministic=True, output=tmp_path / "f.h5", on_plan=plans.append,
    )  # fmt: skip
    assert plans[0].engine.engine == "compile"


def test_a_run_that_compiles_says_that_it_waits_for_that():
    backbone = load_backbone("resnet18", weights="random")
    many = choose(backbone, CPU, engine="compile", rows=10**6, batch_size=8)
    assert many.engine == "compile"
    assert "the first batch waits" in many.why
    assert choose(backbone, CPU, rows=10**6, batch_size=8).why == ""


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
    monkeypatch.setenv("CXX", "/opt/cxx")
    with pytest.raises(StartError, match="the one that CXX names, /opt/cxx, does not run"):
        choose(load_backbone("resnet18", weights="random"), CPU, engine="compile", rows=10**6, batch_size=8)


def test_a_job_too_short_for_it_asks_for_no_compiler(monkeypatch):
    monkeypatch.setattr(settings, "_missing_compiler", lambda _device: pytest.fail("asked"))
    backbone = load_backbone("resnet18", weights="random")
    assert choose(backbone, CPU, engine="compile", rows=5, batch_size=8, seconds=1.0).engine == "eager"


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
    monkeypatch.setattr(settings, "COMPILE_PAYS", {"cpu": 0.0})
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
import ctypes, resource, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a fault may be of a huge page where the system likes them
import torch
from contextlib import nullcontext
from bbx.engine import kept_memory
with kept_memory() if sys.argv[1] == "kept" else nullcontext():
    torch.ones(16 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 << 20)  # 64 MiB, beyond what glibc ever keeps by itself: a fault for every page
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@GLIBC
def test_memory_of_one_batch_serves_the_next():
    # In processes of their own, where nothing else has cut the heap into pieces.
    kept, usual = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True).stdout)
        for how in ("kept", "usual")
    )
    pages = (64 << 20) // resource.getpagesize()
    assert kept <= 2 * pages < 5 * pages < usual  # a piece or two may be new, where something came to lie between


@pytest.mark.parametrize(
    ("largest", "set_"),
    [(1 << 40, {-3: 1 << 30}), (32 << 20, {-3: 32 << 20}), (1 << 20, {})],
    ids=["new", "old", "odd"],
)
def test_a_glibc_that_refuses_is_asked_for_less_or_left_alone(largest, set_):
    found: dict[int, int] = {}

    class Libc:
        @staticmethod
        def mallopt(option: int, value: int) -> int:
            taken = option != -3 or value <= largest
            found.update({option: value} if taken else {})
            return int(taken)

    assert keep(Libc) is bool(set_)
    assert found == ({**set_, -8: 1, -1: (1 << 31) - 1, 1: 0} if set_ else {})


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_a_user_who_tunes_the_allocator_is_left_alone(monkeypatch, name):
    kept: list[object] = []
    for tuned in ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(tuned, raising=False)
    monkeypatch.setattr("bbx.engine.memory.keep", kept.append)
    with kept_memory():
        usual = len(kept)
    monkeypatch.setenv(name, "glibc.malloc.arena_max=2")
    with kept_memory():
        assert len(kept) == usual
    assert usual == (platform.libc_ver()[0] == "glibc")


@GLIBC
def test_what_was_kept_goes_back_at_the_end(pictures, tmp_path, monkeypatch):
    trimmed = []
    libc = ctypes.CDLL(None)

    class Spy:
        gnu_get_libc_version = mallopt = staticmethod(lambda *_: 1)
        malloc_trim = staticmethod(lambda room: trimmed.append(room) or libc.malloc_trim(room))
        malloc, given_back = libc.malloc, 0

        def free(self, piece: ctypes.c_void_p) -> None:
            self.given_back += 1
            libc.free(piece)

    spy = Spy()
    monkeypatch.setattr("bbx.engine.memory._glibc", lambda: spy)
    extract(pictures, model="toy", output=tmp_path / "f.h5")
    assert trimmed == [0]
    assert spy.given_back == 2 * 7 * 3_000  # the small pieces set aside, and those between them


def test_what_gives_other_bits_is_said_by_other_words():
    ways = [
        EngineSettings(),
        EngineSettings(packed=NARROW),
        EngineSettings(packed=ANY),
        EngineSettings(folded=True),
        EngineSettings(fused=True),
    ]
    assert len({way.describe() for way in ways}) == len(ways)


def test_folding_and_packing_together_keep_the_promise(any_rounding, monkeypatch):
    monkeypatch.setattr("bbx.engine.pack.faster_up_to", lambda: ANY)
    rest = (nn.Flatten(2), nn.Linear(900, 900), nn.Unflatten(2, (30, 30)))
    backbone = stirred(of_modules(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *rest))
    how = choose(backbone, CPU, rows=5000, batch_size=8)
    assert (how.folded, how.packed) == (True, ANY)
    assert apart(maps_of(backbone, noise(backbone)), maps_of(prepared(backbone, how), noise(backbone))) <= TOLERANCE
    pairs = remake(backbone, channels_last=False, threads=how.threads).pairs
    # Both are tried together: what folding leaves of the bound is what packing may take. Then each by itself.
    seen = []

    def differs(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
        seen.append((before, after))
        return len(seen) == 2

    monkeypatch.setattr("bbx.engine.remake.same", differs)
    assert remake(replica(backbone), channels_last=False, threads=how.threads) == Remake(pairs=pairs)  # none is narrow
    befores, (together, folded) = zip(*seen, strict=True)
    for before in befores:
        assert apart(before, maps_of(backbone, hard_pixels(backbone))) <= 1e-6  # but for the threads
    parts = [apart(befores[0], after) for after in (together, folded)]
    assert all(0 < part <= TOLERANCE for part in parts)
    assert parts[0] != parts[1]


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
