"""float32 products are float32, or TF32 where asked for, and the process keeps the choice that it had."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bbx import products as module
from bbx.products import products

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SWITCHES = (torch.backends.cuda.matmul, torch.backends.cudnn)
NEW_WORDS = pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch has had these words since 2.9")


def allowed() -> list[bool]:
    return [switch.allow_tf32 for switch in SWITCHES]


@pytest.fixture(params=[True, False])
def usual(request):
    """torch's, set to `request.param`; put back by hand, for cuDNN's is no attribute that can be deleted."""
    before = allowed()
    for switch in SWITCHES:
        switch.allow_tf32 = request.param
    yield [request.param] * 2
    for switch, value in zip(SWITCHES, before, strict=True):
        switch.allow_tf32 = value


def wait_for(true: Callable[[], bool]) -> None:
    last = time.monotonic() + 60
    while not true():
        assert time.monotonic() < last
        time.sleep(0.001)


def raising() -> None:
    raise ZeroDivisionError


def test_the_process_keeps_its_own_choice_of_tf32(usual):
    for wanted in (True, False):
        with products(CUDA, tf32=wanted):
            assert allowed() == [wanted, wanted]
        with pytest.raises(ZeroDivisionError), products(CUDA, tf32=wanted):
            raising()
        assert allowed() == usual


def test_forwards_that_want_the_same_share_and_others_wait(usual):
    went: list[str] = []
    joined, first_may_go = threading.Event(), threading.Event()

    def share() -> None:
        with products(CUDA, tf32=False):
            assert allowed() == [False, False]
            joined.set()

    def other() -> None:
        with products(CUDA, tf32=True):
            assert allowed() == [True, True]
            went.append("other")

    def late() -> None:  # wants what is there, but does not overtake
        with products(CUDA, tf32=False):
            assert allowed() == [False, False]
            went.append("late")

    def first() -> None:
        with products(CUDA, tf32=False):
            first_may_go.wait(60)
            assert allowed() == [False, False]
            went.append("first")

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(first)]
        wait_for(lambda: len(module._inside) == 1)
        pool.submit(share).result(60)
        assert joined.is_set()
        for count, work in enumerate((other, late), 1):
            running.append(pool.submit(work))
            wait_for(lambda count=count: len(module._waiting) == count)
        assert went == []
        first_may_go.set()
        for one in running:
            one.result(60)
    assert went == ["first", "other", "late"]
    assert allowed() == usual


def test_a_forward_within_a_forward_goes_by_the_outer_one(usual):
    with products(CUDA, tf32=False), products(CUDA, tf32=True):
        assert allowed() == [False, False]
    assert allowed() == usual


def test_many_threads_leave_what_was_there(usual):
    def work(wanted: bool) -> None:
        for _ in range(200):
            with products(CUDA, tf32=wanted):
                assert allowed() == [wanted, wanted]

    with ThreadPoolExecutor(4) as pool:
        for one in [pool.submit(work, turn % 2 == 0) for turn in range(4)]:
            one.result(60)
    assert allowed() == usual


def test_a_cpu_waits_for_nobody_and_leaves_cudas_switches_alone(usual):
    with products(CPU, tf32=False):
        assert not module._inside
        assert allowed() == usual

    def compute() -> list[bool]:
        with products(CPU, tf32=False):
            return allowed()

    def other() -> list[bool]:
        with products(CUDA, tf32=False):
            return allowed()

    with ThreadPoolExecutor(2) as pool:
        with products(CUDA, tf32=True):
            waits = pool.submit(other)
            wait_for(lambda: len(module._waiting) == 1)
            assert pool.submit(compute).result(60) == [True, True]
            assert not waits.done()
        assert waits.result(60) == [False, False]
    assert allowed() == usual


def test_forwards_on_a_cpu_keep_none_on_cuda_waiting(usual, monkeypatch):
    monkeypatch.setattr(module, "_lessened", lambda: True)
    with ThreadPoolExecutor(1) as pool, products(CPU, tf32=False):
        for wanted in (True, False):
            assert pool.submit(lambda wanted=wanted: _allowed_within(wanted)).result(60) == [wanted, wanted]
    assert allowed() == usual


def _allowed_within(wanted: bool) -> list[bool]:
    with products(CUDA, tf32=wanted):
        return allowed()


def test_what_is_interrupted_on_its_way_leaves_nothing_behind(usual, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("_choose", "_restoring"):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, interrupt)
            with pytest.raises(KeyboardInterrupt), products(CUDA, tf32=not usual[0]):
                pass
        assert (allowed(), len(module._inside), len(module._waiting)) == (usual, 0, 0)
        with products(CUDA, tf32=not usual[0]):
            assert allowed() == [not usual[0]] * 2
    assert allowed() == usual


# Each in a process of its own, for some of torch's words cannot be unsaid.
KEPT = """
import torch
from bbx.products import products
backends = torch.backends
cudnn, mkldnn = backends.cudnn, backends.mkldnn
parts = [backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
{said}
def words():
    found = [part.fp32_precision for part in parts]
    try:
        return [*found, torch.get_float32_matmul_precision()]
    except RuntimeError:  # torch cannot tell, for the older word does not fit the newer ones
        return found
before = words()
for device in ("cpu", "cuda"):
    for wanted in (True, False):
        with products(torch.device(device), tf32=wanted and device == "cuda"):
            assert backends.mkldnn.matmul.fp32_precision in ("none", "ieee"), words()
            assert backends.mkldnn.conv.fp32_precision in ("none", "ieee"), words()
            if device == "cuda":
                assert [backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32] == [wanted, wanted]
        assert words()[: len(before)] == before, (device, wanted, words(), before)
# What only follows from what is said of all kinds, still does.
if "backends.fp32_precision" in {said!r}:
    backends.fp32_precision = "ieee"
    assert [part.fp32_precision for part in parts] == ["ieee"] * 6, words()
"""


@NEW_WORDS
@pytest.mark.parametrize(
    "said",
    ["", "backends.cuda.matmul.fp32_precision = 'tf32'", "backends.cudnn.conv.fp32_precision = 'ieee'",
     "backends.fp32_precision = 'tf32'", "backends.mkldnn.matmul.fp32_precision = 'bf16'",
     "for part in parts: part.fp32_precision = 'ieee'", *(f"torch.set_float32_matmul_precision({word!r})"
     for word in ("medium", "high", "highest"))],
)  # fmt: skip
def test_what_a_process_says_by_torchs_words_it_keeps(said):
    subprocess.run([sys.executable, "-c", KEPT.format(said=said)], check=True)


SEEN = """
import torch, bbx, bbx.providers
bbx.providers.PROVIDERS["toy"] = ("tests.toy",)
matmul = torch.backends.mkldnn.matmul
backbone = bbx.load_backbone("toy", stages="all")
backbone.stages
backbone.network.register_forward_pre_hook(lambda *_: print(matmul.fp32_precision))
torch.set_float32_matmul_precision("medium")
backbone(torch.zeros(1, 3, *backbone.preprocess.size))
print(matmul.fp32_precision)
"""


@NEW_WORDS
def test_a_cpu_computes_float32_whatever_the_process_allows():
    ran = subprocess.run([sys.executable, "-c", SEEN], check=True, capture_output=True, text=True)
    assert ran.stdout.split() == ["ieee", "bf16"]
