"""The loop: batches on a grid of rows, halved where memory runs out, and the same bits each time if that is asked."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import bbx
from bbx.backbone import Backbone
from bbx.errors import InterruptedRunError, StartError, UsageError
from bbx.loop import _chunks, _end
from bbx.runner import extract

DEVICES = ["cpu", *(["cuda"] * torch.cuda.is_available())]
TOLERANCE = 1e-5
"""Of a row's largest value: what batch size, threads and devices may change in float32, as the README says."""
MODELS = ("resnet18", "swin_t", "efficientnet_b0", "vit_b_32")


def stage_values(path: Path) -> dict[str, np.ndarray]:
    with bbx.open(path) as file:
        return {stage: file[stage].get(slice(None), missing="nan") for stage in file.stages}


def largest_difference(a: Path, b: Path) -> float:
    one, other = stage_values(a), stage_values(b)
    worst = 0.0
    for stage, mine in one.items():
        for x, y in zip(mine, other[stage], strict=True):
            worst = max(worst, float(np.abs(x - y).max() / np.abs(x).max()))
    return worst


def memory_of(most: int, *, text: str = "CUDA out of memory. Tried to allocate 2.00 GiB"):
    """A backbone's call that fails with more than `most` images, as a device does."""
    real = Backbone.__call__

    def call(self: Backbone, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        if len(pixels) > most:
            raise torch.OutOfMemoryError(text) if "CUDA" in text else RuntimeError(text)
        return real(self, pixels)

    return call


@pytest.mark.parametrize(
    ("rows", "streams", "expected"),
    [
        (range(10), 1, [4, 4, 2]),
        (range(2, 10), 1, [2, 4, 2]),
        ([0, 1, 5, 6, 7, 8], 1, [2, 3, 1]),
        ([0, 1, 5, 6, 7, 8], 0, [4, 2]),
        ([3, 103, 203], 1, [1, 1, 1]),
        ([], 1, []),
        (range(12), 2, [4, 4, 2, 2]),  # the last batch would be computed alone
        (range(13), 2, [4, 4, 3, 2]),
        (range(16), 2, [4, 4, 4, 4]),
        (range(9), 2, [4, 4, 1]),
        (range(3), 2, [2, 1]),
        (range(5, 12), 2, [3, 2, 2]),
        ([0, 9, 10, 11], 2, [1, 1, 2]),
    ],
)
def test_batches_are_cut_where_an_uninterrupted_run_would_cut_them(rows, streams, expected) -> None:
    total = max([*rows, 0]) + 1
    end = partial(_end, size=4, total=total, streams=streams) if streams else None
    found = list(_chunks(np.array(rows, np.int64), 4, end))
    assert [len(chunk) for chunk in found] == expected
    assert [row for chunk in found for row in chunk] == list(rows)


@pytest.mark.parametrize(
    "text", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory"]
)
@pytest.mark.parametrize(("most", "batches"), [(4, "on with 4"), (1, "on with 1"), (3, "on with 2")])
def test_a_batch_that_memory_does_not_hold_is_halved_and_that_is_said(
    bbx_cli, pictures, tmp_path, monkeypatch, most, batches, text
) -> None:
    extract(pictures, model="toy", stages="all", output=tmp_path / "whole.h5", batch_size=8)
    monkeypatch.setattr(Backbone, "__call__", memory_of(most, text=text))
    ran = bbx_cli("extract", "--model", "toy", "--stages", "all", "--batch-size", 8, "--device", "cpu", pictures)
    assert ran.code == 0
    assert f"cpu is out of memory with {7 if most == 4 else ''}" in ran.err
    assert batches in ran.err
    assert largest_difference(tmp_path / "features.h5", tmp_path / "whole.h5") <= TOLERANCE


def test_an_image_that_memory_does_not_hold_alone_ends_the_run(pictures, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Backbone, "__call__", memory_of(0))
    with pytest.raises(StartError, match="too little memory for one image") as caught:
        extract(pictures, model="toy", output=tmp_path / "f.h5")
    assert "--size" in caught.value.hint
    assert caught.value.exit_code == 3


def test_another_runtime_error_is_not_taken_for_a_lack_of_memory(pictures, tmp_path, monkeypatch) -> None:
    def broken(self: Backbone, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(Backbone, "__call__", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        extract(pictures, model="toy", output=tmp_path / "f.h5")


def test_an_operation_that_has_no_deterministic_form_is_named(pictures, tmp_path, monkeypatch) -> None:
    def undetermined(self: Backbone, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")

    monkeypatch.setattr(Backbone, "__call__", undetermined)
    with pytest.raises(UsageError, match="toy:toy: cumsum_cuda_kernel"):
        extract(pictures, model="toy", output=tmp_path / "f.h5", deterministic=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", ["toy", "resnet18", "swin_t"])
def test_the_same_command_gives_the_same_bytes(pictures, tmp_path, model, device) -> None:
    options = {"model": model, "weights": "random", "stages": "0-2", "device": device, "deterministic": True}
    for name in ("a.h5", "b.h5"):
        extract(pictures, output=tmp_path / name, batch_size=4, **options)
    assert largest_difference(tmp_path / "a.h5", tmp_path / "b.h5") == 0.0
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("lenient", [True, False])
def test_what_the_process_said_of_determinism_stands_again(pictures, tmp_path, lenient) -> None:
    torch.use_deterministic_algorithms(True, warn_only=lenient)
    try:
        extract(pictures, model="toy", output=tmp_path / "f.h5", deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() is lenient
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", DEVICES)
def test_deterministic_bytes_survive_a_kill_a_bad_neighbour_and_a_retry(pictures, tmp_path, picture, device) -> None:
    options = {"model": "resnet18", "weights": "random", "stages": "0-2", "device": device, "deterministic": True,
               "batch_size": 4}  # fmt: skip
    extract(pictures, output=tmp_path / "whole.h5", **options)
    good = (pictures / "002.png").read_bytes()
    (pictures / "002.png").write_bytes(b"not yet")
    with pytest.raises(InterruptedRunError):
        extract(pictures, output=tmp_path / "f.h5", stop=lambda: 15, **options)
    assert extract(pictures, output=tmp_path / "f.h5", **options).failed == 1
    (pictures / "002.png").write_bytes(good)
    assert extract(pictures, output=tmp_path / "f.h5", retry_failed=True, **options).extracted == 1
    assert largest_difference(tmp_path / "f.h5", tmp_path / "whole.h5") == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_batch_size_threads_and_devices_change_no_more_than_the_tolerance(pictures, tmp_path, model) -> None:
    options = {"model": model, "weights": "random", "stages": "all"}
    reference = tmp_path / "reference.h5"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        extract(pictures, output=reference, batch_size=1, device="cpu", **options)
        for device in DEVICES:
            for batch_size, count in ((3, 1), (7, 1), (7, 2)):
                torch.set_num_threads(count)
                name = tmp_path / f"{device}-{batch_size}-{count}.h5"
                extract(pictures, output=name, batch_size=batch_size, device=device, **options)
                assert largest_difference(reference, name) <= TOLERANCE, name
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("model", ["resnet18", "swin_t"])
def test_batch_sizes_agree_within_the_tolerance(pictures, tmp_path, model) -> None:
    for batch_size in (1, 7):
        extract(pictures, model=model, weights="random", stages="0-2", output=tmp_path / f"{batch_size}.h5",
                batch_size=batch_size)  # fmt: skip
    assert largest_difference(tmp_path / "1.h5", tmp_path / "7.h5") <= TOLERANCE


def test_an_input_too_large_for_the_memory_is_told_from_one_that_the_network_cannot_take(monkeypatch) -> None:
    backbone = bbx.load_backbone("toy", stages="all")

    def full(self: Backbone, *_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.15 GiB")

    monkeypatch.setattr(Backbone, "_run", full)
    with pytest.raises(StartError, match="too little memory for one image of 32x32 pixels"):
        _ = backbone.select("stem").stages
