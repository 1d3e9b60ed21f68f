"""Image processors of transformers: what bbx does in two halves has the bits of calling them whole."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers", reason="the extra bbx[transformers] is not installed")

import transformers

from bbx.errors import UsageError, WeightsError
from bbx.processor import cell_dtype, default_preprocess, floats, geometry, preprocess_of
from bbx.spec import Preprocess

SAMPLES = sorted(path for path in (Path(__file__).parent.parent / "sample_images").iterdir() if path.suffix != ".md")
# Those registered for backbone types, and others that such checkpoints come with.
FIXED = ("ViT", "ConvNext", "Bit", "DINOv3ViT", "Pvt", "PPLCNet", "Beit", "Segformer", "Sapiens2", "Tipsv2", "DPT",
         "RTDetr", "CLIP", "MobileViT", "DeiT")  # fmt: skip
SMALL = {
    "ConvNext": {"size": {"shortest_edge": 224}},
    "Sapiens2": {"size": {"height": 128, "width": 96}},
    "Beit": {"do_center_crop": True, "crop_size": 200, "do_reduce_labels": True},
}


@pytest.fixture(scope="module")
def pictures():
    return [Image.open(path).convert("RGB") for path in SAMPLES]


def saved(folder, name, backend, **options):
    suffix = "Pil" if backend == "pil" else ""
    kind = getattr(transformers, f"{name}ImageProcessor{suffix}", None)
    if kind is not None:
        kind(**options).save_pretrained(folder)
    return kind


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize("name", FIXED)
def test_both_halves_have_the_bits_of_the_whole(name, backend, pictures, tmp_path):
    if not saved(tmp_path, name, backend, **SMALL.get(name, {})):
        assert backend == "pil"  # some exist for torchvision only
        return
    preprocess, notes = preprocess_of(tmp_path, backend=backend)
    whole = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert (notes, preprocess.processor_name) == ((), f"{name}ImageProcessor")
    cells = [geometry(picture, preprocess) for picture in pictures]
    assert {(one.shape, one.dtype) for one in cells} == {((*preprocess.size, 3), cell_dtype(preprocess))}
    got = floats(torch.from_numpy(np.stack(cells)), preprocess)
    for picture, one in zip(pictures, got, strict=True):
        assert torch.equal(one, whole(picture, return_tensors="pt").pixel_values[0])
    assert got.is_contiguous()


def test_only_dinov3_rescales_before_it_resizes_and_needs_float_cells(tmp_path):
    for name, dtype in (("ViT", np.uint8), ("DINOv3ViT", np.float32)):
        saved(tmp_path / name, name, "torchvision")
        assert cell_dtype(preprocess_of(tmp_path / name)[0]) == dtype


def test_the_mirrored_channels_of_pp_lcnet_are_kept(tmp_path):
    saved(tmp_path, "PPLCNet", "torchvision")
    preprocess, _ = preprocess_of(tmp_path)
    red = geometry(Image.new("RGB", (300, 300), (255, 0, 0)), preprocess)
    assert red[0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("name", "size"),
    [("Detr", (800, 800)), ("MaskFormer", (800, 800)), ("TextNet", (640, 640)), ("VitPose", (256, 192)),
     ("EfficientNet", (346, 346))],
)  # fmt: skip
def test_what_cannot_be_halved_keeps_its_numbers_and_says_so(name, size, tmp_path):
    kind = saved(tmp_path, name, "torchvision")
    preprocess, notes = preprocess_of(tmp_path)
    assert preprocess.processor == ""
    assert len(notes) == 1
    assert "ImageProcessor" in notes[0]
    assert preprocess.size == size
    assert preprocess.mean == tuple(kind.image_mean)


@pytest.mark.parametrize(
    ("name", "size", "described"),
    [
        ("ViT", (96, 128), "resize to 96x128 (bilinear)"),
        ("Bit", (160, 160), "resize 160 (bicubic), centre crop 160x160"),
        ("ConvNext", (224, 224), "resize 256 (bicubic), centre crop 224x224"),
        ("PPLCNet", (112, 112), "resize 128 (bilinear), centre crop 112x112"),
    ],
)
def test_another_size_is_prepared_for_by_the_same_processor(name, size, described, tmp_path, pictures):
    saved(tmp_path, name, "torchvision")
    preprocess, _ = preprocess_of(tmp_path, size=size)
    assert preprocess.size == size
    assert preprocess.describe().startswith(f"{name}ImageProcessor: {described}")
    assert geometry(pictures[0], preprocess).shape == (*size, 3)


def test_a_users_size_or_mode_takes_the_processor_out(tmp_path):
    saved(tmp_path, "ViT", "torchvision")
    preprocess, _ = preprocess_of(tmp_path)
    assert preprocess.override(size=(224, 224)).processor != ""
    assert preprocess.override(size=(64, 64)).processor == ""


def test_a_configuration_of_another_time_is_read(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(
        '{"feature_extractor_type": "ViTFeatureExtractor", "size": 64, "resample": 3, "do_resize": true,'
        ' "do_normalize": true, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    preprocess, notes = preprocess_of(tmp_path)
    assert (preprocess.size, preprocess.interpolation, notes) == ((64, 64), "bicubic", ())


def test_a_mapping_does_as_a_file_does(tmp_path):
    config = transformers.ViTImageProcessor(size={"height": 32, "width": 32}).to_dict()
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert preprocess_of(config) == preprocess_of(tmp_path)


def test_nothing_there_is_none_and_a_damaged_file_an_error(tmp_path):
    assert preprocess_of(tmp_path) is None
    assert preprocess_of("no-one/nothing") is None
    for text in ("{", "[]", "{}", '{"image_processor_type": "Path"}', '{"image_processor_type": "PreTrainedModel"}'):
        (tmp_path / "preprocessor_config.json").write_text(text)
        with pytest.raises(WeightsError):
            preprocess_of(tmp_path)


def test_a_processor_named_by_a_file_must_be_one():
    hostile = Preprocess((8, 8), 8, "bilinear", (0, 0, 0), (1, 1, 1),
                         processor='{"image_processor_type": "PreTrainedModel", "bbx": {"backend": "torchvision",'
                                   ' "cells": "uint8"}}')  # fmt: skip
    with pytest.raises(UsageError):
        geometry(Image.new("RGB", (9, 9)), hostile)


def test_many_threads_share_one_processor(tmp_path, pictures):
    saved(tmp_path, "Bit", "torchvision")
    preprocess, _ = preprocess_of(tmp_path)
    expected = geometry(pictures[0], preprocess)
    got = []
    threads = [threading.Thread(target=lambda: got.append(geometry(pictures[0], preprocess))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert all((one == expected).all() for one in got)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [("swin", "resize to 224x224 (bilinear)"), ("dinov2", "resize 224 (bicubic)"), ("resnet", "resize 256 (bicubic)"),
     ("vitdet", "resize 256 (bicubic), centre crop 224x224"), ("nothing", "resize 256 (bicubic), centre crop")],
)  # fmt: skip
def test_the_default_is_imagenets_with_the_types_own_resize(model_type, words):
    preprocess = default_preprocess(model_type, (224, 224))
    assert preprocess.describe().startswith(words)
    assert (preprocess.mean, preprocess.processor) == ((0.485, 0.456, 0.406), "")
