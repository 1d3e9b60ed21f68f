"""`bbx models`: what is listed, from a catalogue that is measured, without importing what it lists."""

import json
import subprocess
import sys

import pytest

from bbx.errors import MissingExtraError, UsageError
from bbx.providers import catalog, list_models, listing, load_backbone, resolve, table


@pytest.fixture(autouse=True)
def caches_forgotten():
    yield
    for cached in (listing._hub_cache, listing._torch_cache, catalog.rows, catalog.is_current):
        cached.cache_clear()


# A library of another version than the catalogue's is imported, and asked: not what is meant here.
CURRENT = "from bbx.providers import catalog; catalog.is_current = lambda provider: True\n"


def test_all_libraries_are_listed_without_importing_any():
    code = (
        f"{CURRENT}import sys; from bbx.providers import list_models; rows = list_models();"
        "print(len({row['provider'] for row in rows}), len(rows) > 1500,"
        "[name for name in ('torch', 'timm', 'transformers') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == "4 True []"


def test_every_row_has_its_facts():
    rows = [row for row in list_models() if row["provider"] != "toy"]
    for row in rows:
        assert row["name"]
        assert row["family"], row
        assembled = row["stages"] is None
        assert assembled or (row["parameters"] > 0 and row["stride"] >= 1 and row["stages"] > 1), row


@pytest.mark.parametrize(
    ("filters", "inside", "outside"),
    [
        ({"provider": "timm"}, "resnet18", "swin_t"),
        ({"family": "swin*"}, "swin_t", "resnet18"),
        ({"parameters": "..12M"}, "resnet18", "resnet50"),
        ({"parameters": "20M..26M"}, "resnet50", "resnet18"),
        ({"parameters": "1B.."}, "vit_giant_patch14_dinov2", "resnet18"),
        ({"stride": 16}, "vit_b_16", "resnet18"),
        ({"family": "resnet", "parameters": "..12m", "provider": "torchvision"}, "resnet18", "resnet50"),
    ],
)
def test_filters(filters, inside, outside):
    names = {row["name"] for row in list_models(**filters)}
    assert inside in names
    assert outside not in names


def test_a_tag_finds_its_architecture_and_a_wrong_name_the_nearest(bbx_cli):
    assert [row["name"] for row in list_models("timm:resnet50.a1_in1k")] == ["resnet50"]
    ran = bbx_cli("models", "resnet5O")
    assert ran.code == 2
    assert "did you mean resnet50" in ran.err


@pytest.mark.parametrize(
    ("filters", "words"),
    [({"provider": "tim"}, "mean timm"), ({"parameters": "30M"}, r"\.\.30M"), ({"parameters": "x..y"}, "range")],
)
def test_a_filter_that_says_nothing_is_refused(filters, words):
    with pytest.raises(UsageError, match=words):
        list_models(**filters)


def test_weights_on_this_machine_are_marked(bbx_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "torch/hub/checkpoints").mkdir(parents=True)
    (tmp_path / "torch/hub/checkpoints/resnet18-f37072fd.pth").touch()
    for name, file in (("timm--resnet18.a1_in1k", "model.safetensors"), ("microsoft--resnet-50", "config.json")):
        (tmp_path / f"hub/models--{name}/snapshots/1").mkdir(parents=True)
        (tmp_path / f"hub/models--{name}/snapshots/1/{file}").touch()
    here = {(row["provider"], row["name"]): row["here"] for row in list_models("*resnet*")}
    assert here["torchvision", "resnet18"] == ["IMAGENET1K_V1"]
    assert here["timm", "resnet18"] == ["a1_in1k"]
    assert here["transformers", "microsoft/resnet-50"] == []  # its configuration alone
    ran = bbx_cli("models", "--here")
    assert "a1_in1k*" in ran.out
    assert "efficientnet-lite0" in ran.out
    assert len(ran.out.splitlines()) == 4
    assert "on this machine" in ran.err


def test_all_libraries_take_one_reading_of_the_catalogue_and_one_look_for_each_package(monkeypatch):
    looked = []
    monkeypatch.setattr(listing, "is_installed", lambda provider: not looked.append(provider))
    catalog._content.cache_clear()
    assert len(list_models()) > 1500
    assert str(resolve("resnet18")) == "torchvision:resnet18"
    assert catalog._content.cache_info().misses == 1
    assert len(looked) == len(table.PROVIDERS)


def test_the_catalogue_is_current_for_the_version_that_it_was_measured_with_alone(monkeypatch):
    measured = json.loads(catalog.FILE.read_text())["versions"]
    for change, current in (("", True), (".post1", False)):
        catalog.is_current.cache_clear()
        monkeypatch.setattr("importlib.metadata.version", lambda name, change=change: measured[name] + change)
        assert [catalog.is_current(name) for name in ("torchvision", "timm", "transformers")] == [current] * 3
        assert catalog.is_current("packaged")


def test_another_version_of_a_library_is_asked_for_its_names(monkeypatch, tmp_path):
    content = json.loads(catalog.FILE.read_text())
    content["versions"]["torchvision"] = "0.1"
    del content["models"]["torchvision"]["resnet18"]
    (tmp_path / "catalog.json").write_text(json.dumps(content))
    monkeypatch.setattr(catalog, "FILE", tmp_path / "catalog.json")
    catalog.rows.cache_clear()
    catalog.is_current.cache_clear()
    names = {row["name"] for row in list_models(provider="torchvision")}
    assert {"resnet18", "swin_t"} <= names
    assert str(resolve("resnet18")) == "torchvision:resnet18"


@pytest.mark.parametrize("provider", ["timm", "transformers"])
def test_a_missing_package_is_an_error_with_its_pip_line(provider, monkeypatch, bbx_cli):
    for name in list(sys.modules):
        if name.split(".")[0] == provider or name.startswith(f"bbx.providers.{provider}"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, provider, None)  # what Python does for a package that is not there
    monkeypatch.setattr(table, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'bbx\[{provider}\]'"):
        load_backbone(f"{provider}:resnet-18", weights="random")
    ran = bbx_cli("stages", f"{provider}:resnet-18")
    assert ran.code == 3
    assert f"hint: pip install 'bbx[{provider}]'" in ran.err
    ran = bbx_cli("models", f"{provider}:*resnet*18")
    assert f"pip install 'bbx[{provider}]'" in ran.err
    with pytest.raises(UsageError, match=r"pip install 'bbx\[all\]'"):
        resolve("no-such-thing")
