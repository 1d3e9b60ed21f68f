"""EfficientNet-Lite0: that it names the sample pictures proves weights, preprocessing and layout at once."""

import pytest
import torch
from torchvision.models import MobileNet_V2_Weights

from bbx.backbone import normalise
from bbx.errors import UsageError, WeightsError
from bbx.images import read_image
from bbx.providers import load_backbone
from tests.conftest import SAMPLES

CLASSES = MobileNet_V2_Weights.DEFAULT.meta["categories"]


@pytest.fixture(scope="module")
def lite0():
    return load_backbone("efficientnet-lite0", stages="all")


@pytest.mark.parametrize(
    ("picture", "names"),
    [
        ("chelsea.png", {"tabby", "tiger cat", "Egyptian cat"}),
        ("coffee.png", {"espresso"}),
        ("rocket.jpg", {"missile"}),
    ],
)
def test_it_names_what_is_in_the_sample_pictures(lite0, picture, names):
    pixels = torch.from_numpy(read_image(SAMPLES / picture, lite0.preprocess))[None]
    with torch.inference_mode():
        scores = lite0.network(normalise(pixels, lite0.preprocess))
    assert CLASSES[int(scores.argmax())] in names


def test_its_stages_follow_the_efficientnet_row(lite0):
    assert [(stage.name, stage.shape, stage.stride) for stage in lite0.stages] == [
        ("stem", (32, 112, 112), 2),
        ("stage1", (16, 112, 112), 2),
        ("stage2", (24, 56, 56), 4),
        ("stage3", (40, 28, 28), 8),
        ("stage4", (112, 14, 14), 16),
        ("stage5", (320, 7, 7), 32),
    ]


def test_maps_are_those_of_the_full_forward_and_of_a_batch_of_one(lite0):
    torch.manual_seed(0)
    pixels = torch.randn(3, 3, 224, 224)
    with torch.inference_mode():
        maps, alone = lite0(pixels), lite0(pixels[1:2])
        assert torch.equal(maps["stage5"], lite0.network.features[:8](pixels))
    for name, tensor in maps.items():
        assert (tensor[1:2] - alone[name]).abs().max() <= 1e-5 * tensor.abs().max()


def test_the_input_is_x_minus_127_by_128(lite0):
    values = torch.tensor([0, 127, 255], dtype=torch.uint8).view(1, 1, 3, 1).expand(1, 1, 3, 3)
    expected = torch.tensor([-127 / 128, 0, 1])
    assert torch.allclose(normalise(values, lite0.preprocess)[0, 0, 0], expected, atol=1e-7)


def test_random_weights_keep_values_in_the_range_of_float16(lite0):
    pixels = torch.from_numpy(read_image(SAMPLES / "coffee.png", lite0.preprocess))[None]
    backbone = load_backbone("efficientnet-lite0", weights="random", stages="all")
    with torch.inference_mode():
        maps = backbone(normalise(pixels, backbone.preprocess))
    assert all(0.1 < tensor.std() < 100 for tensor in maps.values()), {n: t.std() for n, t in maps.items()}


def test_odd_input_sizes_are_padded_as_tensorflow_does():
    assert load_backbone("efficientnet-lite0", stages="all", size=(225, 97)).stages[-1].shape == (320, 8, 4)


def test_weights_by_a_word_that_is_none_are_refused():
    with pytest.raises(UsageError, match="IMAGNET"):
        load_backbone("efficientnet-lite0", weights="IMAGNET")
    with pytest.raises(WeightsError, match="no weights file"):
        load_backbone("efficientnet-lite0", weights="missing.pth")
