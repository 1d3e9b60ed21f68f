"""The nouns: models by name, stages by name or index, runs that are the same or say why not."""

from dataclasses import replace

import pytest

from bbx.errors import FileError, UsageError
from bbx.spec import ModelRef, Preprocess, RunSpec, Stage
from bbx.stages import select_stages, storable_name

NAMES = ("stem", "stage1", "stage2", "stage3", "stage4")
PREPROCESS = Preprocess((224, 224), 256, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RUN = RunSpec("torchvision:swin_t", "ab12", (Stage("stem", (96, 56, 56), 4.0, "features.0", 0),), PREPROCESS)


@pytest.mark.parametrize("text", ["timm:resnet50.a1_in1k", "swin-tiny", "torchvision:swin_t"])
def test_a_model_reference_reads_back_as_written(text):
    assert str(ModelRef.parse(text)) == text


@pytest.mark.parametrize(
    ("wanted", "got"),
    [
        (None, ["stage4"]),
        ("stem,stage2", ["stem", "stage2"]),
        ("stage2,stem,stage2", ["stem", "stage2"]),
        ("0,-1", ["stem", "stage4"]),
        ("stem..stage2", ["stem", "stage1", "stage2"]),
        ("0-2", ["stem", "stage1", "stage2"]),
        ("-2..-1", ["stage3", "stage4"]),
        ("all", list(NAMES)),
        ("Stage1", ["stage1"]),
        (" stem , 3 ", ["stem", "stage3"]),
        ([0, "stage1", -1], ["stem", "stage1", "stage4"]),
        ((1,), ["stage1"]),
    ],
)
def test_names_indices_and_ranges_select_in_network_order(wanted, got):
    assert list(select_stages(NAMES, wanted)) == got


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("stage9", ["'stage9'", "stage4"]),
        ("stege1", ["did you mean stage1", "stem (0)", "stage4 (4)"]),
        ("5", ["index 5", "stage4 (4)"]),
        ("-6", ["index -6"]),
        ("3-1", ["backwards", "1-3"]),
        ("stage2..stem", ["backwards", "stem..stage2"]),
        ("", ["no stage"]),
        ([], ["no stage"]),
        ([True], ["index True"]),
    ],
)
def test_a_wrong_stage_is_named_with_what_would_be_right(wanted, words):
    with pytest.raises(UsageError) as caught:
        select_stages(NAMES, wanted)
    assert all(word in f"{caught.value.message} {caught.value.hint}" for word in words)


def test_names_that_would_clash_with_the_files_own_datasets_are_changed():
    assert storable_name("path") == "path.out"
    assert storable_name("blocks.3.proj_x") == "blocks.3.proj_x.out"
    assert storable_name("features.3.0.attn") == "features.3.0.attn"
    with pytest.raises(UsageError, match="a/b"):
        storable_name("a/b")


def test_a_new_size_keeps_the_ratio_of_resize_to_crop():
    assert PREPROCESS.override(size=(112, 112)).resize == 128
    assert PREPROCESS.override(size=(224, 224)) == PREPROCESS
    assert PREPROCESS.override(mode="pad", exif="ignore").mode == "pad"


def test_a_run_reads_back_equal():
    assert RunSpec.from_json(RUN.to_json()) == RUN


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": "torchvision:swin_s"}, "model"),
        ({"weights_digest": "cd"}, "weights_digest"),
        ({"dtype": "float16"}, "dtype"),
        ({"pool": "avg"}, "pool"),
        ({"precision": "bf16"}, "precision"),
        ({"stages": (Stage("stem", (96, 28, 28), 4.0, "features.0", 0),)}, "stages"),
        ({"preprocess": replace(PREPROCESS, mode="pad")}, "preprocess.mode"),
        ({"preprocess": replace(PREPROCESS, exif="ignore")}, "preprocess.exif"),
    ],
)
def test_two_runs_differ_by_any_field_and_name_it(change, field):
    other = replace(RUN, **change)
    assert [name for name, _, _ in RUN.differences(other)] == [field]
    assert other.sha256 != RUN.sha256


def test_the_label_of_the_weights_makes_no_other_run():
    moved = replace(RUN, weights="file copy.pth")
    assert moved == RUN
    assert moved.sha256 == RUN.sha256
    assert RUN.differences(moved) == []


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", RUN.to_json()[:-9], RUN.to_json().replace('"float32"', '"float8"'),
     RUN.to_json().replace("96", '"96"'), RUN.to_json().replace("[224, 224]", "[224]")],
)  # fmt: skip
def test_a_damaged_run_description_is_a_file_error(text):
    with pytest.raises(FileError):
        RunSpec.from_json(text)


@pytest.mark.parametrize(
    ("fact", "named"),
    [
        ('"do_flip_channel_order": true', "do_flip_channel_order"),
        ('"rescale_offset": true', "rescale_offset"),
        ('"rescale_factor": 1.0', "rescale_factor 1.0"),
    ],
)
def test_an_image_processor_whose_values_no_resize_of_bbx_gives_is_not_replaced(fact, named):
    odd = replace(PREPROCESS, processor=f'{{"image_processor_type": "MobileViTImageProcessor", {fact}}}')
    with pytest.raises(UsageError, match=f"MobileViTImageProcessor has {named}") as caught:
        odd.override(mode="squash")
    assert "--resize-mode" in caught.value.hint
    assert odd.override(exif="ignore").processor == odd.processor
    usual = replace(PREPROCESS, processor='{"rescale_factor": 0.00392156862745098, "do_flip_channel_order": false}')
    assert usual.override(mode="squash").processor == ""
