"""Weights from files: whole, safe, for this very model, or refused with the keys that do not fit."""

import http.server
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import bbx
from bbx.errors import WeightsError
from bbx.providers import load_backbone
from bbx.runner import extract
from bbx.weights import fetch, read_state_dict
from tests.toy import Toy


@pytest.fixture
def state():
    torch.manual_seed(7)
    return Toy().state_dict()


def stem_of(path) -> torch.Tensor:
    return load_backbone("toy", weights=str(path)).network.stem.weight


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_a_state_dict_is_loaded(tmp_path, state, suffix):
    path = tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert torch.equal(stem_of(path), state["stem.weight"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}},
    ],
)
def test_a_training_checkpoint_is_unwrapped(tmp_path, state, wrap):
    torch.save(wrap(state), tmp_path / "w.pth")
    assert torch.equal(stem_of(tmp_path / "w.pth"), state["stem.weight"])


@pytest.mark.parametrize("change", ["gone", "other classes"])
def test_only_the_classifier_may_differ_and_that_is_noted(tmp_path, state, change):
    for name in ("fc.weight", "fc.bias"):
        state[name] = state[name][:3].clone()
        if change == "gone":
            del state[name]
    torch.save(state, tmp_path / "w.pth")
    backbone = load_backbone("toy", weights=str(tmp_path / "w.pth"))
    assert torch.equal(backbone.network.stem.weight, state["stem.weight"])
    assert "do not fit fc, which no stage uses" in backbone.notes[0]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda s: s.pop("one.weight"), ["1 missing", "one.weight"]),
        (lambda s: s.__setitem__("three.weight", torch.zeros(1)), ["1 unexpected", "three.weight"]),
        (lambda s: s.__setitem__("one.bias", torch.zeros(9)), ["1 of another shape", "one.bias"]),
    ],
)
def test_keys_that_do_not_fit_are_listed_and_refused(tmp_path, state, edit, words):
    edit(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError) as caught:
        load_backbone("toy", weights=str(tmp_path / "w.pth"))
    assert all(word in caught.value.message for word in words)


class Bomb:
    def __reduce__(self):
        return print, ("this code must never run",)


def test_code_in_a_weights_file_is_refused_not_run(tmp_path, capsys):
    torch.save({"stem.weight": Bomb()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="does not run code"):
        read_state_dict(tmp_path / "w.pth")
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content"), [("w.pth", b"not weights"), ("w.safetensors", b"\x00" * 40), ("w.pth", b"")]
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=name):
        read_state_dict(tmp_path / name)


def test_a_cut_file_is_named(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"w\.pth"):
        read_state_dict(tmp_path / "w.pth")


def test_the_digest_follows_every_value(tmp_path, state):
    digests = []
    for name in ("", "fc.weight", "stem.weight"):
        if name:
            state[name] = state[name] + 1.0
        torch.save(state, tmp_path / "w.pth")
        digests += [load_backbone("toy", weights=str(tmp_path / "w.pth")).weights_digest for _ in range(2)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_a_layer_of_a_classifier_that_the_weights_lack_is_refused(tmp_path, state):
    del state["fc.weight"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="--layers fc needs fc, which the weights"):
        load_backbone("toy", weights=str(tmp_path / "w.pth"), layers="fc")
    assert load_backbone("toy", weights=str(tmp_path / "w.pth"), layers="two").stages


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t.to_sparse(), "sparse"),
        (lambda t: t.to("meta"), "meta"),
        (lambda t: t.to(torch.complex64), "complex"),
    ],
)
def test_tensors_that_are_no_plain_numbers_are_refused(tmp_path, state, change, word):
    state["one.bias"] = change(state["one.bias"])
    torch.save(dict(state), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=f"one.bias is .*{word}"):
        load_backbone("toy", weights=str(tmp_path / "w.pth"))


def test_another_structure_of_the_classifier_is_noted_and_a_foreign_one_refused(tmp_path, state):
    torch.save({**state, "fc.extra": torch.zeros(1)}, tmp_path / "w.pth")
    assert "do not fit fc" in load_backbone("toy", weights=str(tmp_path / "w.pth")).notes[0]
    torch.save({**state, "head.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"1 unexpected \(head\.weight\)"):
        load_backbone("toy", weights=str(tmp_path / "w.pth"))


@pytest.fixture
def server(tmp_path):
    """A web server on this machine, of the files in `tmp_path/served`."""
    (tmp_path / "served").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "served"))

        def log_message(self, *args):
            """Silent."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}", tmp_path / "served"
        serving.shutdown()


def test_weights_are_fetched_once_and_kept(server, tmp_path, monkeypatch, state):
    import hashlib

    url, folder = server
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    torch.save(state, folder / "tmp.pth")
    digest = hashlib.sha256((folder / "tmp.pth").read_bytes()).hexdigest()[:8]
    served = (folder / "tmp.pth").rename(folder / f"toy-{digest}.pth")
    first = fetch(f"{url}/{served.name}", name="toy", hint="")
    served.unlink()
    assert fetch(f"{url}/{served.name}", name="toy", hint="") == first
    assert torch.equal(read_state_dict(first)["stem.weight"], state["stem.weight"])


def test_a_download_that_fails_or_is_not_what_it_claims_leaves_nothing(server, tmp_path, monkeypatch):
    url, folder = server
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (folder / "toy-00000000.pth").write_bytes(b"something else")
    for name, reason in (("gone-12345678.pth", "404"), ("toy-00000000.pth", "hash")):
        with pytest.raises(WeightsError, match=reason) as caught:
            fetch(f"{url}/{name}", name="the toy", hint="type this")
        assert caught.value.hint == "type this"
    assert list((tmp_path / "cache" / "hub" / "checkpoints").iterdir()) == []


def test_random_weights_are_the_seeds_in_threads_too():
    alone = load_backbone("resnet18", weights="random").weights_digest
    before = torch.random.get_rng_state()
    with ThreadPoolExecutor(3) as threads:
        found = {
            one.weights_digest for one in threads.map(lambda _: load_backbone("resnet18", weights="random"), range(3))
        }
    assert found == {alone}
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_weights_are_float32_on_the_cpu_whatever_the_processs_defaults(pictures, tmp_path, default):
    extract(pictures, model="resnet18", weights="random", stages="stem", output=tmp_path / "usual.h5", device="cpu")
    change, back = (torch.set_default_device, "cpu") if default == "meta" else (torch.set_default_dtype, torch.float32)
    change(default)
    try:
        extract(pictures, model="resnet18", weights="random", stages="stem", output=tmp_path / "f.h5", device="cpu")
        assert torch.empty(0).device.type == "meta" or torch.empty(0).dtype == default
    finally:
        change(back)
    with bbx.open(tmp_path / "usual.h5") as one, bbx.open(tmp_path / "f.h5") as other:
        np.testing.assert_array_equal(one["stem", :], other["stem", :])
