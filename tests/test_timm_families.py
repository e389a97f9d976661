"""Every family of timm's models can be a teacher in each precision, and a student; what cannot is refused at the start.

The lists are of the timm that this project pins: a family that a newer one has is to be added.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import _registry
from torch import nn

from kdcache.errors import IncompatibleError
from kdcache.models.creation import Normalisation, create_model
from kdcache.teachers.forward import Forward
from kdcache.training.config import TrainConfig
from kdcache.training.devices import seeded
from kdcache.training.learner import Learner

CPU, CLASSES = torch.device("cpu"), 10
PLAIN = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# fmt: off
SMALLEST = {  # of each family (a module of timm.models), a model with the fewest weights
    "beit": "beit_base_patch16_224", "byoanet": "botnet26t_256", "byobnet": "test_byobnet", "cait": "cait_xxs24_224",
    "coat": "coat_tiny", "convit": "convit_tiny", "convmixer": "convmixer_768_32", "convnext": "test_convnext",
    "cpubone": "cpubone_nano", "crossvit": "crossvit_tiny_240", "csatv2": "csatv2", "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny", "davit": "davit_tiny", "deit": "deit_tiny_patch16_224", "densenet": "densenet121",
    "dla": "dla46x_c", "dpn": "dpn48b", "edgenext": "edgenext_xx_small", "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0", "efficientnet": "test_efficientnet", "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0", "efficientvit_msra": "efficientvit_m0", "eva": "vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0", "fastvit": "fastvit_t8", "focalnet": "focalnet_tiny_srf", "gcvit": "gcvit_xxtiny",
    "ghostnet": "ghostnet_050", "hardcorenas": "hardcorenas_b", "hgnet": "hgnetv2_b0", "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny", "hrnet": "hrnet_w18_small", "iformer": "iformer_t",
    "inception_next": "inception_next_atto", "inception_resnet_v2": "inception_resnet_v2", "inception_v3": "inception_v3",
    "inception_v4": "inception_v4", "lcnetv2": "lcnetv2_small", "levit": "levit_128s", "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout", "maxxvit": "test_coatnet", "metaformer": "poolformerv2_s12", "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "lcnet_035", "mobilenetv5": "mobilenetv5_base", "mobilevit": "mobilevit_xxs", "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap", "nasnet": "nasnetalarge", "nest": "nest_tiny",
    "nextvit": "nextvit_small", "nfnet": "test_nfnet", "pit": "pit_ti_224", "pnasnet": "pnasnet5large", "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m", "rdnet": "rdnet_tiny", "regnet": "regnetx_002", "repghost": "repghostnet_050",
    "repvit": "repvit_m1", "res2net": "res2next50", "resnest": "resnest14d", "resnet": "test_resnet",
    "resnetv2": "resnetv2_18", "rexnet": "rexnet_100", "selecsls": "selecsls42", "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s", "shvit": "shvit_s1", "sknet": "skresnet18", "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs", "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window16_256", "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224", "tnt": "tnt_s_legacy_patch16_224", "tresnet": "tresnet_m", "twins": "twins_svt_small",
    "vgg": "vgg11", "visformer": "visformer_tiny", "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224", "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224", "vitamin": "vitamin_small_224", "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw", "xception": "legacy_xception", "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
# fmt: on
SIDES = {  # the smallest that they take, of those that do not take 32 px
    "botnet26t_256": 64,
    "crossvit_tiny_240": 240,
    "csatv2": 64,
    "efficientformer_l1": 224,
    "inception_resnet_v2": 96,
    "inception_v3": 96,
    "inception_v4": 96,
}
REFUSED = {"gemma4_vit": ("gemma4_vit_167m_enc", 96, "its head gives logits for each group of patches")}
TOO_LARGE = {"deepseek_vit": ("deepseek_vit_412m", 126, "412 million weights: two minutes and 7 GB; it was run once, and works")}


def in_small(name: str) -> tuple[nn.Module, Normalisation, torch.Tensor]:
    """A model, its normalisation, and two views."""
    side = SIDES.get(name, 32)
    with seeded(0):
        model, normalise = create_model(name, CLASSES, input_size=side)
    views = np.random.default_rng(0).integers(0, 256, (2, 3, side, side), dtype=np.uint8)
    return model, normalise, torch.from_numpy(views)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", SMALLEST)
def test_a_model_of_every_family_is_a_teacher_in_each_precision_and_a_student(family: str, tmp_path: Path) -> None:
    model, normalise, views = in_small(SMALLEST[family])
    for precision in ("fp32", "bf16"):
        logits = Forward(model.eval(), normalise, CPU, precision)(views)  # type: ignore[arg-type]
        assert logits.shape == (2, CLASSES)
        assert logits.dtype == np.float32
        assert np.isfinite(logits).all()
    config = TrainConfig(epochs=1, batch_size=2, opt="sgd")
    learner = Learner(tmp_path, model, normalise, config, steps_per_epoch=2, seed=0, device=CPU)
    learner.step(views, lambda z: F.cross_entropy(z, torch.tensor([0, 1])), lambda z: {})
    assert learner.steps == 1
    learner.status = "complete"  # and needs no checkpoint
    learner.suspend()


@pytest.mark.exhaustive  # as even making it takes seconds
@pytest.mark.parametrize("family", REFUSED)
def test_what_gives_no_logits_is_refused(family: str) -> None:
    name, side, _ = REFUSED[family]
    with pytest.raises(IncompatibleError, match="does not give one vector of"):
        create_model(name, CLASSES, input_size=side)


def test_the_lists_have_every_family() -> None:
    families = {_registry._model_to_module[name] for name in timm.list_models() if not name.startswith("cifar_")}
    assert families - {*SMALLEST, *REFUSED, *TOO_LARGE} == set(), "new in timm"
    assert all(_registry._model_to_module[name] == family for family, name in SMALLEST.items())


def test_a_size_that_an_architecture_does_not_take_is_refused_with_its_own() -> None:
    with pytest.raises(IncompatibleError, match="cannot be made for 64 px") as raised:
        create_model("crossvit_tiny_240", CLASSES, input_size=64)
    assert "--size 240" in raised.value.fix


def crossvit() -> nn.Module:
    return timm.create_model("crossvit_tiny_240", num_classes=CLASSES, depth=((1, 1, 0),), img_size=240)


def coat() -> nn.Module:
    return timm.create_model("coat_tiny", num_classes=CLASSES, serial_depths=(1, 1, 1, 1), parallel_depth=1, img_size=32)


@pytest.mark.parametrize(("make", "side"), [(crossvit, 240), (coat, 32)])
def test_features_that_are_a_list_pass_the_head_in_float32(make: Callable[[], Any], side: int) -> None:
    with seeded(0):
        model = make().eval()
    views = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, side, side), dtype=np.uint8))
    seen: list[torch.dtype] = []
    heads = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.out_features == CLASSES]
    for head in heads:
        head.register_forward_hook(lambda layer, given, found: seen.extend((given[0].dtype, found.dtype)))
    half, whole = (Forward(model, PLAIN, CPU, precision)(views) for precision in ("bf16", "fp32"))  # type: ignore[arg-type]
    assert set(seen) == {torch.float32}
    assert len(seen) == 4 * len(heads)
    assert not np.array_equal(half, whole)
    np.testing.assert_allclose(half, whole, atol=0.03 * np.abs(whole).max())
