"""Every architecture of timm, and the values of one of every model file: minutes, hence slow."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import timm
import torch

from bbx.backbone import Backbone
from bbx.providers import catalog
from bbx.providers.timm import load, names
from bbx.providers.timm_families import FAMILY_OF
from bbx.spec import Build, ModelRef
from bbx.taps import channels_first
from tests.catalog import timm_row
from tests.sweep import measure_timm
from tests.test_backbone import calls_of

pytestmark = pytest.mark.slow

# Architectures that are not as declared, each with the reason. None, with timm 1.0.31.
EXCEPTIONS: dict[str, str] = {}

# The smallest architecture of each of timm's model files, and what makes the large ones small enough for a CPU.
SMALLEST: dict[str, dict[str, Any]] = {
    "beitv2_base_patch16_224": {"depth": 3}, "halonet_h1": {}, "test_byobnet": {}, "cait_xxs24_224": {},
    "coat_tiny": {}, "convit_tiny": {}, "convmixer_768_32": {}, "test_convnext": {}, "cpubone_nano": {},
    "crossvit_tiny_240": {}, "csatv2": {}, "cs3darknet_focus_s": {}, "cspnext_tiny": {}, "davit_tiny": {},
    "deepseek_vit_412m": {"depth": 2}, "deit_tiny_patch16_224": {}, "deit_tiny_distilled_patch16_224": {},
    "densenet121": {}, "dla46x_c": {}, "dpn48b": {}, "edgenext_xx_small": {}, "efficientformer_l1": {},
    "efficientformerv2_s0": {}, "test_efficientnet": {}, "efficientvim_m1": {}, "efficientvit_b0": {},
    "efficientvit_m0": {}, "vit_tiny_patch16_dinov3_qkvb": {}, "fasternet_t0": {}, "fastvit_t8": {},
    "focalnet_tiny_srf": {}, "gcvit_xxtiny": {}, "gemma4_vit_167m_enc": {"depth": 2}, "ghostnet_050": {},
    "hardcorenas_b": {}, "hgnetv2_b0": {}, "hiera_tiny_224": {}, "sam2_hiera_tiny": {}, "hrnet_w18_small": {},
    "iformer_t": {}, "inception_next_atto": {}, "inception_resnet_v2": {}, "inception_v3": {}, "inception_v4": {},
    "lcnetv2_small": {}, "levit_128s": {}, "lowformer_b0": {}, "test_mambaout": {}, "test_coatnet": {},
    "poolformerv2_s12": {}, "gmlp_ti16_224": {}, "mobilenetv3_small_050": {}, "mobilenetv5_base": {},
    "mobilevit_xxs": {}, "mvitv2_tiny": {}, "naflexvit_base_patch16_parfac_gap": {"depth": 2}, "nasnetalarge": {},
    "nest_tiny_jx": {}, "nextvit_small": {}, "test_nfnet": {}, "pit_ti_224": {}, "pnasnet5large": {}, "pvt_v2_b0": {},
    "qwen3_vit_88m": {"depth": 2}, "rdnet_tiny": {}, "regnetx_002": {}, "repghostnet_050": {}, "repvit_m1": {},
    "res2next50": {}, "resnest14d": {}, "test_resnet": {}, "resnetv2_18": {}, "rexnet_100": {}, "selecsls42": {},
    "legacy_seresnet18": {}, "sequencer2d_s": {}, "shvit_s1": {}, "skresnet18": {}, "starnet_s050": {},
    "swiftformer_xs": {}, "swin_tiny_patch4_window7_224": {}, "swinv2_tiny_window16_256": {}, "swinv2_cr_tiny_384": {},
    "tiny_vit_5m_224": {}, "tnt_s_legacy_patch16_224": {}, "tresnet_m": {}, "twins_svt_small": {}, "vgg11": {},
    "visformer_tiny": {}, "test_vit": {}, "vit_tiny_r_s16_p8_224": {}, "test_vit_relpos": {},
    "samvit_base_patch16_224": {"depth": 3}, "vitamin_small_224": {}, "volo_d1_224": {}, "ese_vovnet19b_slim_dw": {},
    "legacy_xception": {}, "xception41p": {}, "xcit_nano_12_p8_384": {},
}  # fmt: skip

# Networks whose first stage needs all, or more, of what the last needs.
WHOLE = {
    "hrnet_w18_small": "all branches leave the trunk together",
    "coat_tiny": "the stages after the first leave the parallel trunk together",
}


def test_every_architecture_gives_what_it_declares():
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(measure_timm, names(), chunksize=8))
    assert [row["name"] for row in rows] == timm.list_models()
    faulty = {row["name"]: row["faults"] for row in rows if row["faults"]}
    print(f"{len(rows)} architectures; exceptions: {EXCEPTIONS or 'none'}")  # noqa: T201 the list is to be seen
    assert set(faulty) == set(EXCEPTIONS), faulty
    if catalog.is_current("timm"):  # as measured with this very version
        listed = catalog.rows("timm")
        assert {row["name"]: timm_row(row) for row in rows} == listed, "python -m tests.catalog writes it anew"
    assert {row["family"] for row in rows if row["stages"][0][0] != "stem"} == {"coat", "crossvit", "mvitv2", "twins"}


def test_one_of_every_model_file_is_tried_below():
    files = {timm.models.model_entrypoint(name).__module__ for name in names()}
    assert {timm.models.model_entrypoint(name).__module__ for name in SMALLEST} == files
    assert {type(timm.create_model(name)).__module__ for name in ("test_resnet",)} <= files
    assert {f"timm.models.{file}" for file in FAMILY_OF} <= files


@pytest.mark.parametrize("name", SMALLEST)
def test_values_are_timms_own_and_no_more_is_run(name):
    torch.set_num_threads(1)
    backbone = load(ModelRef("timm", name, "random"), Build(options=SMALLEST[name]))
    pixels = torch.randn(1, 3, *backbone.preprocess.size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        truth = _truth(backbone, pixels)
    assert list(truth) == list(backbone.stage_names)
    counts = []
    for stage in dict.fromkeys([*backbone.stage_names[:2], backbone.stage_names[-1]]):
        alone = backbone.select(stage)
        counts.append(len(calls_of(alone, pixels)))
        with torch.inference_mode():
            got = alone(pixels)[stage]
        assert torch.isfinite(got).all()
        assert torch.equal(got, truth[stage]), stage
    if name not in WHOLE:
        assert counts == sorted(set(counts)), counts


def _truth(backbone: Backbone, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each stage by timm's own full `forward_intermediates`, or by a hook; the stem by a hook in a full forward."""
    network: Any = backbone.network
    heard: dict[str, torch.Tensor] = {}
    hooked = [tap for tap in backbone.taps if tap.name == "stem" or backbone.forward is None]
    handles = [
        network.get_submodule(tap.module).register_forward_hook(
            lambda _module, _inputs, output, tap=tap: _keep(heard, tap.name, output)
        )
        for tap in hooked
    ]
    _ = network.forward_intermediates(pixels) if backbone.forward else network(pixels)
    for handle in handles:
        handle.remove()
    truth = {tap.name: channels_first(heard[tap.name], tap, pixels) for tap in hooked}
    if backbone.forward:
        maps = network.forward_intermediates(pixels, intermediates_only=True)
        stages = [name for name in backbone.stage_names if name != "stem"]
        truth |= dict(zip(stages, maps[-len(stages) :], strict=True))
    return truth


def _keep(heard: dict[str, torch.Tensor], name: str, output: Any) -> None:
    """The first call's output: a module may run once per stage."""
    heard.setdefault(name, (output if isinstance(output, torch.Tensor) else output[0]).clone())
