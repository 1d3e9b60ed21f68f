"""One set of weights in every library: no name lost on the way, and the same values come out at every stage."""

import pytest
import torch
import transformers

import bbx.compare
from bbx.compare import compare
from bbx.errors import UsageError, WeightsError
from bbx.providers import load_backbone, load_structure
from bbx.providers.aliases import TWINS, twins
from bbx.transplant import FAMILIES, _rows, transplant

# One model of each family, the smallest that its aliases have, and how far apart the values may be: 0 means the same
# bits. torchvision's attention is nn.MultiheadAttention in one piece, transformers' Swin adds the position bias and the
# mask in another order.
FAMILY_MODELS = {
    "swin-tiny": 1e-6, "swinv2-tiny": 0, "resnet-18": 0, "resnet-50": 0, "resnext-50": 0, "convnext-tiny": 0,
    "vit-base-16": 1e-6, "dinov2-small": 0, "efficientnet-b0": 0, "efficientnet-v2-s": 0,
    "mobilenet-v2": 0, "mobilenet-v3-large": 0, "mobilenet-v3-small": 0, "mnasnet-1-0": 0, "regnet-x-400mf": 0,
    "regnet-y-400mf": 0, "densenet-121": 0, "vgg-11": 0, "inception-v3": 0,
}  # fmt: skip
QUICK = ("resnet-18", "mobilenet-v3-small")


def family_of(alias):
    return bbx.compare._family(alias)


def shapes(library, name):
    """The state dict of a library's model, on the meta device."""
    size = (224, 224) if name == "vit_h_14" else None  # torchvision's largest weights are for 518
    return load_structure(f"{library}:{name}", weights="random", size=size).network.state_dict()


def filled(state):
    """Bytes in place of floats: `transplant` moves values without looking at them."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(0, 256, value.shape, dtype=torch.uint8, generator=generator)
        for name, value in state.items()
    }


def unfilled(state):
    return {name: torch.full(value.shape, 255, dtype=torch.uint8) for name, value in state.items()}


def slow_but(quick):
    return [alias if alias in quick else pytest.param(alias, marks=pytest.mark.slow) for alias in FAMILY_MODELS]


def test_every_row_of_the_dictionary_has_a_family_and_every_family_is_tried():
    rows = {alias: family_of(alias) for alias in TWINS if len(twins(alias)) > 1}
    assert all(rows.values())
    tried = {family_of(alias) for alias in FAMILY_MODELS}
    assert tried == set(rows.values())
    # One has no alias of its own, the other is part of MaskFormer.
    assert set(FAMILIES) - tried == {"wide-resnet", "maskformer-swin"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_slots_of_a_row_pair_up(family):
    for table in FAMILIES[family].rows.values():
        for row in _rows(table):
            for part in filter(None, row.parts):
                assert [len(slot) for slot in part.slots] == [len(slot) for slot in row.hub.slots]


@pytest.mark.parametrize("alias", slow_but((*QUICK, "swin-tiny")))
def test_there_and_back_again_gives_the_same_tensors(alias):
    family = family_of(alias)
    states = {library: filled(shapes(library, name)) for library, name in twins(alias).items()}
    if "attn.qkv.bias" in " ".join(states.get("torchvision", ())) and family == "swinv2":
        zero_the_keys_bias(states["torchvision"])
    for source, state in states.items():
        for target in states.keys() - {source}:
            there = transplant(state, family, source, target, into=unfilled(states[target]))
            back = transplant(there, family, target, source, into=unfilled(state))
            lost = {name for name in state if not torch.equal(back[name], state[name])}
            assert lost == not_of_the_backbone(state, family, source, target)
            assert len(lost) < len(state) / 2


def zero_the_keys_bias(state):
    """Swin V2's keys have no bias: torchvision stores one and overwrites it with zeros in its forward."""
    for name, value in state.items():
        if name.endswith("attn.qkv.bias"):
            value.view(3, -1)[1] = 0


def not_of_the_backbone(state, family, source, target):
    """Names that stay behind: heads, buffers that follow from the architecture, a final norm that one side lacks."""
    heads = ("head", "fc.", "classifier", "conv_head", "bn2.", "pre_logits", "pooler", "heads.", "AuxLogits")
    derived = ("relative_position_index", "relative_coords_table", "mask_token")
    last = {"efficientnet": "features.8.", "efficientnet-v2": "features.7.", "mobilenet-v2": "features.18."}
    names = {
        name
        for name in state
        if name.startswith(heads) or any(word in name for word in derived) or name.startswith("hidden_states_norms")
    }
    if source == "torchvision":
        names |= {name for name in state if family in last and name.startswith(last[family])}
        names |= {name for name in state if family == "mnasnet" and name.startswith(("layers.14.", "layers.15."))}
    if family == "swinv2" and target == "transformers":  # its backbone class has no final norm
        names |= {name for name in state if name.startswith("norm.")}
    if family == "dinov2":  # the raw backbone has none
        names |= {name for name in state if name.startswith(("norm.", "layernorm."))}
    return names


@pytest.mark.slow
@pytest.mark.parametrize("alias", [alias for alias in TWINS if len(twins(alias)) > 1])
def test_every_name_of_every_row_finds_its_place(alias):
    states = {library: shapes(library, name) for library, name in twins(alias).items()}
    for source, state in states.items():
        for target, into in states.items():
            moved = transplant(state, family_of(alias), source, target, into=into)
            assert {name: value.shape for name, value in moved.items()} == {
                name: value.shape for name, value in into.items()
            }


@pytest.mark.parametrize("alias", slow_but(QUICK))
def test_all_libraries_give_the_same_maps_at_every_stage(alias):
    found = compare(alias)
    assert [column.library for column in found.columns if column.status == "compared"] == list(twins(alias))
    for column in found.columns:
        assert column.reason == "" or column.status == "no twin"
        if column.library not in twins(alias) or column.library == found.reference:
            continue
        limit = 0 if alias == "swin-tiny" and column.library == "timm" else FAMILY_MODELS[alias]
        assert [cell.stage for cell in column.cells] == list(found.stages)
        assert {cell.stage: cell.difference for cell in column.cells if not cell.difference <= limit} == {}


def test_a_weight_that_went_astray_shows(monkeypatch):
    def careless(*names, into):
        moved = transplant(*names, into=into)
        return moved | {"blocks.2.0.bn1.bias": moved["blocks.2.0.bn1.bias"] + 1e-3}

    monkeypatch.setattr(bbx.compare, "transplant", careless)
    assert [cell.difference > 0 for cell in compare("mobilenet-v3-small").columns[1].cells] == [0, 0, 0, 1, 1]


def test_norms_are_given_one_eps_and_the_comparison_says_so(monkeypatch):
    timm = compare("mobilenet-v3-small").columns[1]
    assert timm.notes == ("BatchNorm eps is 1e-05 here; set to torchvision's 0.001 for the comparison",)
    monkeypatch.setattr(bbx.compare, "_equalise", lambda *_: ())
    assert max(cell.difference for cell in compare("mobilenet-v3-small").columns[1].cells) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("alias", ["swin-tiny", "resnet-18", "convnext-tiny", "dinov2-small", "densenet-121"])
def test_native_norms_are_those_of_the_table(alias):
    # Swin at 224 has a stage of one window, where transformers' own class shifts and its ordinary forward does not.
    size = {"dinov2-small": 224, "swin-tiny": 256}.get(alias)
    for column in compare(alias, size=size).columns:
        assert column.status in ("compared", "no twin")
        if column.status == "no twin":
            continue
        raw, native = (
            load_backbone(f"{column.library}:{column.model}", weights="random", stages="all", size=size, norm=norm)
            for norm in ("raw", "native")
        )
        pixels = torch.randn(1, 3, *raw.preprocess.size)
        with torch.inference_mode():
            plain, normed = raw(pixels), native(pixels)
        assert {name for name in plain if not torch.equal(plain[name], normed[name])} == {
            cell.stage for cell in column.cells if cell.norm
        }
        for cell in column.cells:
            if cell.norm.startswith(("LayerNorm", "the final LayerNorm")):  # weight 1, bias 0
                channels_last = plain[cell.stage].permute(0, 2, 3, 1)
                eps = float(cell.norm.rpartition(" ")[2])
                wanted = torch.nn.functional.layer_norm(channels_last, channels_last.shape[-1:], eps=eps)
                assert torch.allclose(normed[cell.stage], wanted.permute(0, 3, 1, 2), atol=1e-5)


def test_maskformers_own_swin_takes_the_weights_of_swin():
    options = {"embed_dim": 24, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "out_indices": [1, 2, 3, 4]}
    source = transformers.SwinBackbone(transformers.SwinConfig(**options)).eval()
    target = transformers.MaskFormerSwinBackbone(transformers.MaskFormerSwinConfig(**options)).eval()
    bbx.compare._stir(source, 0)
    state = transplant(source.state_dict(), "swin", "transformers", "maskformer", into=target.state_dict())
    target.load_state_dict(state, strict=True)
    pixels = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        wanted, got = source(pixels).feature_maps, target(pixels).feature_maps
    for one, other in zip(wanted, got, strict=True):
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()


@pytest.fixture(scope="module")
def resnets():
    return {library: filled(shapes(library, name)) for library, name in twins("resnet-18").items()}


@pytest.mark.parametrize(("source", "target"), [("torchvision", "timm"), ("transformers", "torchvision"),
                                                ("timm", "transformers")])  # fmt: skip
def test_a_name_too_many_is_an_error_that_lists_it(resnets, source, target):
    state = {**resnets[source], "layer9.0.extra.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match=rf"1 of {source} without a place: layer9.0.extra.weight"):
        transplant(state, "resnet", source, target, into=resnets[target])


@pytest.mark.parametrize(
    ("source", "target", "gone", "left"),
    [
        ("torchvision", "timm", "layer2.0.conv1.weight", "layer2.0.conv1.weight"),
        ("timm", "transformers", "bn1.running_var", "embedder.embedder.normalization.running_var"),
        ("transformers", "torchvision", "embedder.embedder.convolution.weight", "conv1.weight"),
    ],
)
def test_a_name_too_few_is_an_error_that_lists_what_it_would_fill(resnets, source, target, gone, left):
    state = {name: value for name, value in resnets[source].items() if name != gone}
    with pytest.raises(WeightsError) as caught:
        transplant(state, "resnet", source, target, into=resnets[target])
    assert caught.value.message.endswith(f"of resnet: 1 of {target} left unfilled: {left}")


def test_one_third_too_few_leaves_the_whole_unfilled():
    swin = {library: filled(shapes(library, name)) for library, name in twins("swin-tiny").items()}
    gone = next(name for name in swin["transformers"] if name.endswith("layers.2.blocks.1.attention.k_proj.weight"))
    state = {name: value for name, value in swin["transformers"].items() if name != gone}
    with pytest.raises(WeightsError) as caught:
        transplant(state, "swin", "transformers", "timm", into=swin["timm"])
    assert caught.value.message.endswith("of swin: 1 of timm left unfilled: layers.2.blocks.1.attn.qkv.weight")


def test_a_tensor_of_another_shape_is_an_error_that_gives_both(resnets):
    state = {**resnets["torchvision"], "conv1.weight": torch.zeros(64, 3, 3, 3)}
    with pytest.raises(WeightsError, match=r"1 of another shape: conv1\.weight \(64, 3, 7, 7\) from \(64, 3, 3, 3\)"):
        transplant(state, "resnet", "torchvision", "timm", into=resnets["timm"])


def test_a_deeper_network_does_not_fit(resnets):
    with pytest.raises(WeightsError, match=r"of timm left unfilled: layer1\.2\.conv1\.weight"):
        transplant(resnets["torchvision"], "resnet", "torchvision", "timm", into=shapes("timm", "resnet34"))


@pytest.mark.parametrize(
    ("family", "target", "words"),
    [("resnest", "timm", "nearest: resnet"), ("resnet", "keras", "torchvision, timm, transformers"),
     ("vgg", "transformers", "torchvision, timm")],
)  # fmt: skip
def test_what_has_no_table_is_a_usage_error(family, target, words):
    with pytest.raises(UsageError) as caught:
        transplant({}, family, "torchvision", target, into={})
    assert words in caught.value.hint
