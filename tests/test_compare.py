"""`compare`: what each library calls a stage, what it lacks, and what is said where it is not here."""

import json
import sys
from dataclasses import asdict

import pytest

from bbx.compare import compare
from bbx.errors import MissingExtraError, UsageError


@pytest.fixture
def core_alone(monkeypatch):
    """As on a machine with neither timm nor transformers."""
    for name in ("timm", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, f"bbx.providers.{name}", raising=False)


def test_a_library_that_is_not_installed_is_a_column_with_the_line_to_type(core_alone):
    found = compare("mobilenet-v3-small")
    assert (found.reference, found.size) == ("torchvision", (224, 224))
    assert [(column.library, column.status, column.hint) for column in found.columns] == [
        ("torchvision", "compared", ""),
        ("timm", "not installed", "pip install 'bbx[timm]'"),
        ("transformers", "no twin", ""),
    ]
    assert [column.reason for column in found.columns[1:]] == [
        "timm is not installed",
        "bbx knows no twin of mobilenet-v3-small in transformers",
    ]


def test_where_no_library_can_build_the_model_its_error_is_the_answer(core_alone):
    with pytest.raises(MissingExtraError) as caught:
        compare("dinov2-small")
    assert caught.value.hint == "pip install 'bbx[timm]'"
    with pytest.raises(UsageError) as refused:
        compare("vit-base-32", size=250)
    assert "--size 224" in refused.value.hint


def test_a_column_says_what_the_library_calls_each_stage_and_what_comes_out(core_alone):
    column = compare("resnet-18", size=64).columns[0]
    assert [(cell.stage, cell.called, cell.shape, cell.stride) for cell in column.cells] == [
        ("stem", "maxpool", (64, 16, 16), 4),
        ("stage1", "layer1", (64, 16, 16), 4),
        ("stage2", "layer2", (128, 8, 8), 8),
        ("stage3", "layer3", (256, 4, 4), 16),
        ("stage4", "layer4", (512, 2, 2), 32),
    ]
    assert {(cell.place, cell.norm, cell.difference) for cell in column.cells} == {(None, "", None)}


@pytest.mark.parametrize(
    ("name", "paddings"),
    [
        ("resnet-18", ["ceil"] * 5),
        ("densenet-121", ["ceil", "ceil", "floor", "floor", "floor"]),
        ("squeezenet1_1", ["unpadded"] * 4),
        pytest.param("maxvit-tiny", ["assert"] * 5, marks=pytest.mark.slow),
        pytest.param("inception-v3", ["unpadded"] * 5, marks=pytest.mark.slow),
        pytest.param("vgg-11", ["exact", *["floor"] * 5], marks=pytest.mark.slow),
    ],
)
def test_padding_is_measured_one_pixel_past_the_stride(core_alone, name, paddings):
    assert [cell.padding for cell in compare(name).columns[0].cells] == paddings


@pytest.mark.parametrize("name", ["Swin_Tiny", "swin_t", "torchvision:swin-tiny", "torchvision:swin_t"])
def test_a_row_is_found_by_any_of_its_names(core_alone, monkeypatch, name):
    import bbx.compare

    monkeypatch.setattr(bbx.compare, "_measured", stop)
    with pytest.raises(UsageError, match="torchvision:swin_t"):
        compare(name)


def stop(model, *_):
    raise UsageError(model)


def test_a_model_in_no_row_of_the_dictionary_stands_alone(core_alone):
    found = compare("squeezenet1_1", size=64)
    assert found.name == "squeezenet1_1"
    assert [column.status for column in found.columns] == ["compared", "no twin", "no twin"]


def test_an_unknown_name_is_an_error_with_the_nearest():
    with pytest.raises(UsageError) as caught:
        compare("swin-tinny")
    assert "swin-tiny" in caught.value.hint


def test_a_comparison_is_plain_data_and_the_same_for_the_same_seed(core_alone):
    first, second = (compare("mobilenet-v3-small", size=(64, 96), seed=3) for _ in range(2))
    assert first == second
    assert json.loads(json.dumps(asdict(first)))["size"] == [64, 96]
    assert first.stages == ("stem", "stage1", "stage2", "stage3", "stage4")
