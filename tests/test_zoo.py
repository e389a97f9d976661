"""The CIFAR models: as published in size, shape, names and numbers, and models of timm like any other."""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from kdcache.cli import run
from kdcache.errors import IncompatibleError, NotFoundError
from kdcache.models.cifar import TOP1, ZOO, CifarNet
from kdcache.models.creation import create_model, load_weights, weights_digest
from kdcache.models.names import ALIASES, list_models, resolve
from tests.weights import save_weights

# Parameters for 100 classes, of CRD's networks; and the feature maps `[F, s, s]` of an image of 32 px.
PUBLISHED = {
    "cifar_resnet8": (83_892, (64, 8, 8)),
    "cifar_resnet14": (181_108, (64, 8, 8)),
    "cifar_resnet20": (278_324, (64, 8, 8)),
    "cifar_resnet32": (472_756, (64, 8, 8)),
    "cifar_resnet44": (667_188, (64, 8, 8)),
    "cifar_resnet56": (861_620, (64, 8, 8)),
    "cifar_resnet110": (1_736_564, (64, 8, 8)),
    "cifar_resnet8x4": (1_233_540, (256, 8, 8)),
    "cifar_resnet32x4": (7_433_860, (256, 8, 8)),
    "cifar_resnet50": (23_705_252, (2048, 4, 4)),
    "cifar_wrn_16_1": (180_916, (64, 8, 8)),
    "cifar_wrn_16_2": (703_284, (128, 8, 8)),
    "cifar_wrn_40_1": (569_780, (64, 8, 8)),
    "cifar_wrn_40_2": (2_255_156, (128, 8, 8)),
    "cifar_wrn_28_2": (1_479_220, (128, 8, 8)),
    "cifar_wrn_16_4": (2_772_020, (256, 8, 8)),
    "cifar_wrn_28_4": (5_872_180, (256, 8, 8)),
    "cifar_vgg8": (3_965_028, (512, 4, 4)),
    "cifar_vgg11": (9_277_284, (512, 4, 4)),
    "cifar_vgg13": (9_462_180, (512, 4, 4)),
    "cifar_vgg16": (14_774_436, (512, 4, 4)),
    "cifar_vgg19": (20_086_692, (512, 4, 4)),
    "cifar_mobilenetv2": (812_836, (1280, 2, 2)),
    "cifar_shufflenetv1": (949_258, (960, 4, 4)),
    "cifar_shufflenetv2": (1_355_528, (1024, 4, 4)),
}

# The first three logits that CRD's own code gives for the `pattern`s below as weights and image, in float64.
LOGITS = {
    "cifar_resnet20": (1.094961659, -8.309952771, 1.364881339),
    "cifar_resnet8x4": (-0.233399665, -0.462905411, -0.038749476),
    "cifar_resnet50": (-0.784616542, -0.498860036, -0.330537373),
    "cifar_wrn_16_2": (-0.176890773, 0.355585893, -0.271783955),
    "cifar_vgg8": (-1.572894645, -0.176195733, -0.252678014),
    "cifar_mobilenetv2": (-5.881040694, -0.604795452, -0.020485308),
    "cifar_shufflenetv1": (0.405785122, 0.703688035, -0.926048858),
    "cifar_shufflenetv2": (-1.608532413, -0.770934694, -0.236872329),
}


@pytest.fixture(scope="module", params=PUBLISHED)
def named(request: pytest.FixtureRequest) -> tuple[str, CifarNet]:
    """Each model for 100 classes, one after the other."""
    return request.param, made(request.param)


def made(name: str, classes: int = 100) -> CifarNet:
    model, _ = create_model(name, classes, input_size=32)
    assert isinstance(model, CifarNet)
    return model


# ---------------------------------------------------------------- the networks


def test_the_zoo_is_what_is_tested_here() -> None:
    assert set(PUBLISHED) == set(ZOO) == set(list_models("cifar_*"))
    assert set(TOP1) < set(ZOO)


@pytest.mark.exhaustive
def test_parameters_and_maps_are_those_of_the_papers(named: tuple[str, CifarNet]) -> None:
    name, model = named
    count, (features, side, _) = PUBLISHED[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    # VGG pools once more at 64 px; the others' maps grow with the image.
    for size, larger in ((32, side), (64, side if "vgg" in name else 2 * side)):
        with torch.inference_mode():
            maps = model.eval().forward_features(torch.zeros(2, 3, size, size))
            assert maps.shape == (2, features, larger, larger)
            assert model.forward_head(maps).shape == (2, 100)


@pytest.mark.exhaustive
def test_gradients_reach_every_parameter(named: tuple[str, CifarNet]) -> None:
    name, model = named
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(model.train()(images).square().sum(), list(model.parameters()))
    for (key, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert gradient.isfinite().all()
        # What a convolution of VGG adds, batch norm takes away again: only rounding is left of these biases' gradients.
        constant = parameter.ndim == 1 and "vgg" in name and isinstance(model.get_submodule(key.rpartition(".")[0]), nn.Conv2d)
        assert constant or gradient.any(), key


def test_resnets_are_as_deep_as_their_names_say() -> None:
    for name in ZOO:
        if "resnet" in name:
            layers = [key for key, layer in ZOO[name]().named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
            assert len([key for key in layers if "shortcut" not in key]) == int(re.findall(r"\d+", name)[0])


def pattern(shape: tuple[int, ...], start: int) -> Tensor:
    """Numbers in [-1, 1] that are the same on every machine."""
    n = torch.arange(torch.Size(shape).numel())
    return (((37 * n * n + 101 * start) % 1009).double() / 504 - 1).reshape(shape)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", LOGITS)
def test_logits_are_those_of_the_published_code(name: str) -> None:
    model = timm.create_model(name).double().eval()
    state = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
    for i, (key, value) in enumerate(state.items()):
        numbers = pattern(tuple(value.shape), i)
        if value.ndim > 1:
            numbers *= (4 / value[0].numel()) ** 0.5
        else:
            numbers = numbers / 4 + (key.endswith(("weight", "running_var")))
        value.copy_(numbers)
    with torch.inference_mode():
        logits = model(pattern((1, 3, 32, 32), 7))[0, :3]
    assert logits.tolist() == pytest.approx(LOGITS[name], abs=2e-9)


def test_start_values_are_those_of_the_published_code() -> None:
    for name, layer, std in (
        ("cifar_resnet8x4", "stages.2.0.conv2", (2 / (9 * 256)) ** 0.5),
        ("cifar_wrn_16_2", "stages.2.1.conv1", (2 / (9 * 128)) ** 0.5),
        ("cifar_vgg8", "stages.3.0", (2 / (9 * 512)) ** 0.5),
        ("cifar_vgg8", "fc", 0.01),
        ("cifar_mobilenetv2", "tail.0", (2 / 1280) ** 0.5),
        ("cifar_mobilenetv2", "fc", 0.01),
        ("cifar_shufflenetv2", "tail.0", (1 / 3 / 464) ** 0.5),  # PyTorch's: uniform, of variance 1 / (3 fan-in)
    ):
        assert made(name).get_submodule(layer).weight.std().item() == pytest.approx(std, rel=0.03), (name, layer)


# ---------------------------------------------------------------- as models of timm


@pytest.mark.exhaustive
def test_the_zoo_waits_until_it_is_asked_for(run_python: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    done = run_python("""
import sys, kdcache, kdcache.archive, kdcache.models.creation
print(*[name for name in ("timm", "kdcache.models.cifar") if name in sys.modules])
""")
    assert done.stdout.split() == []


def test_timms_own_names_stay_as_they_are() -> None:
    makers = {name: timm.model_entrypoint(name).__module__ for name in timm.list_models()}
    assert {name for name, module in makers.items() if not module.startswith("timm.")} == set(ZOO)
    assert not [name for name in ZOO if hasattr(timm.models, name)]  # which has all of timm's
    assert makers["vgg13"] == "timm.models.vgg"
    assert timm.models.get_pretrained_cfg("vgg13").hf_hub_id == "timm/vgg13.tv_in1k"


def test_aliases_are_free_names_of_models_that_there_are() -> None:
    timms = set(list_models())
    assert not timms & set(ALIASES)
    for alias, exact in ALIASES.items():
        assert resolve(alias) == resolve(exact) == exact
    assert resolve("resnet8x4") == "cifar_resnet8x4"
    assert resolve("wrn40_2") == "cifar_wrn_40_2"
    assert resolve("vgg13") == "vgg13"
    with pytest.raises(NotFoundError, match="cifar_resnet8x4"):
        resolve("cifar_resnet8x5")


def test_inputs_are_normalised_as_cifar100_is() -> None:
    _, normalise = create_model("cifar_wrn_16_1", 10, input_size=32)
    assert normalise.mean == (0.5071, 0.4867, 0.4408)
    assert normalise.std == (0.2675, 0.2565, 0.2761)
    assert made("cifar_resnet8").pretrained_cfg["input_size"] == (3, 32, 32)


def test_classifiers_are_replaced_as_timm_does() -> None:
    model = made("cifar_resnet8", 10)
    images = torch.rand(2, 3, 32, 32)
    assert model.get_classifier().weight.shape == (10, 64)
    model.reset_classifier(7)
    assert (model.num_classes, model(images).shape) == (7, (2, 7))
    model.reset_classifier(0, "avg")
    assert torch.equal(model.eval()(images), model.forward_head(model.forward_features(images), pre_logits=True))
    with pytest.raises(ValueError, match="max"):
        model.reset_classifier(7, "max")
    assert timm.create_model("cifar_vgg8", in_chans=1, drop_rate=0.5)(torch.rand(2, 1, 32, 32)).shape == (2, 100)


def test_pretrained_weights_are_refused_by_name() -> None:
    with pytest.raises(NotFoundError, match="'cifar_resnet8' has no pretrained weights") as caught:
        create_model("cifar_resnet8", 100, input_size=32, pretrained=True)
    assert "--checkpoint" in caught.value.fix
    with pytest.raises(RuntimeError, match="No pretrained weights exist for cifar_resnet8"):
        timm.create_model("cifar_resnet8", pretrained=True)


def test_published_accuracies_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["models"]) == 0
    lines = [" ".join(line.split()) for line in capfd.readouterr().out.splitlines()]
    assert "resnet32x4 cifar_resnet32x4 CIFAR-100: 79.42 % (CRD)" in lines
    assert "cifar_vgg13 CIFAR-100: 74.64 % (CRD)" in lines
    assert "wrn28_4 cifar_wrn_28_4 CIFAR-100: 78.60 % (logit standardization, table 5)" in lines
    assert "tv_rn50 resnet50.tv_in1k ImageNet: 76.16 % (teacher of distillation papers)" in lines
    assert "cifar_wrn_16_1" in lines


def test_models_are_found_by_alias_and_by_timm_name(capfd: pytest.CaptureFixture[str]) -> None:
    def found(pattern: str) -> list[str]:
        assert run(["models", pattern]) == 0
        return [" ".join(line.split()) for line in capfd.readouterr().out.splitlines()[3:] if line.strip()]

    assert found("rn50") == ["rn50 resnet50.a1_in1k"]
    teacher = "tv_rn50 resnet50.tv_in1k ImageNet: 76.16 % (teacher of distillation papers)"
    assert found("resnet50") == ["rn50 resnet50.a1_in1k", teacher, "resnet50"]
    assert found("*wrn_40_2") == ["wrn40_2 cifar_wrn_40_2 CIFAR-100: 75.61 % (CRD)"]
    assert found("resnet50.tv*") == [teacher, "resnet50.tv2_in1k"]
    assert run(["models", "rn50", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == ["resnet50.a1_in1k"]


def test_of_a_model_that_is_not_there_close_names_are_said(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "resnet5"]) == NotFoundError.exit_code
    captured = capfd.readouterr()
    assert captured.out == ""
    what, why, fix = captured.err.splitlines()
    assert "unknown model 'resnet5'" in what
    assert "resnet50" in why
    assert fix == "fix: list what there is with: kdcache models '*'"


# ---------------------------------------------------------------- weights


def test_weights_survive_a_file(tmp_path: Path) -> None:
    model, again = made("cifar_resnet8"), made("cifar_resnet8")
    save_weights(model, tmp_path / "a.safetensors")
    assert weights_digest(model) != weights_digest(again)
    assert load_weights(again, tmp_path / "a.safetensors") == []
    assert weights_digest(model) == weights_digest(again)
    with pytest.raises(IncompatibleError, match="100 classes, 10 are needed"):
        load_weights(made("cifar_resnet8", 10), tmp_path / "a.safetensors")
    assert load_weights(made("cifar_resnet8", 10), tmp_path / "a.safetensors", replace_head=True) == ["fc.bias", "fc.weight"]


def conv(key: str, *shape: int, bias: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{key}.weight", shape
    if bias:
        yield f"{key}.bias", shape[:1]


def norm(key: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((f"{key}.{part}", (width,)) for part in ("weight", "bias", "running_mean", "running_var"))
    yield f"{key}.num_batches_tracked", ()


def of_resnet(stem: int, widths: tuple[int, ...], n: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in a checkpoint of CRD's resnet.py."""
    yield from (*conv("conv1", stem, 3, 3, 3), *norm("bn1", stem))
    before = stem
    for stage, width in enumerate(widths, start=1):
        for block in (f"layer{stage}.{i}" for i in range(n)):
            yield from (*conv(f"{block}.conv1", width, before, 3, 3), *norm(f"{block}.bn1", width))
            yield from (*conv(f"{block}.conv2", width, width, 3, 3), *norm(f"{block}.bn2", width))
            if before != width:
                yield from (*conv(f"{block}.downsample.0", width, before, 1, 1), *norm(f"{block}.downsample.1", width))
            before = width
    yield from conv("fc", 100, before, bias=True)


def of_resnet50() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in a checkpoint of CRD's resnetv2.py."""
    yield from (*conv("conv1", 64, 3, 3, 3), *norm("bn1", 64))
    before = 64
    for stage, (inner, n) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in (f"layer{stage}.{i}" for i in range(n)):
            yield from (*conv(f"{block}.conv1", inner, before, 1, 1), *norm(f"{block}.bn1", inner))
            yield from (*conv(f"{block}.conv2", inner, inner, 3, 3), *norm(f"{block}.bn2", inner))
            yield from (*conv(f"{block}.conv3", 4 * inner, inner, 1, 1), *norm(f"{block}.bn3", 4 * inner))
            if before != 4 * inner:
                yield from (*conv(f"{block}.shortcut.0", 4 * inner, before, 1, 1), *norm(f"{block}.shortcut.1", 4 * inner))
            before = 4 * inner
    yield from conv("linear", 100, before, bias=True)


def of_wrn(n: int, k: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in a checkpoint of CRD's wrn.py."""
    yield from conv("conv1", 16, 3, 3, 3)
    before = 16
    for stage, width in enumerate((16 * k, 32 * k, 64 * k), start=1):
        for block in (f"block{stage}.layer.{i}" for i in range(n)):
            yield from (*norm(f"{block}.bn1", before), *conv(f"{block}.conv1", width, before, 3, 3))
            yield from (*norm(f"{block}.bn2", width), *conv(f"{block}.conv2", width, width, 3, 3))
            if before != width:
                yield from conv(f"{block}.convShortcut", width, before, 1, 1)
            before = width
    yield from (*norm("bn1", before), *conv("fc", 100, before, bias=True))


def of_vgg(counts: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in a checkpoint of CRD's vgg.py."""
    before = 3
    for stage, (width, count) in enumerate(zip((64, 128, 256, 512, 512), counts, strict=True)):
        for i in range(count):
            yield from conv(f"block{stage}.{3 * i}", width, before, 3, 3, bias=True)
            yield from norm(f"block{stage}.{3 * i + 1}", width)
            before = width
    yield from conv("classifier", 100, 512, bias=True)


@pytest.mark.parametrize(
    ("name", "shapes", "theirs", "ours"),
    [
        ("cifar_resnet56", of_resnet(16, (16, 32, 64), 9), "layer3.0.downsample.1.bias", "stages.2.0.shortcut.1.bias"),
        ("cifar_resnet32x4", of_resnet(32, (64, 128, 256), 5), "bn1.running_mean", "stem.1.running_mean"),
        ("cifar_resnet50", of_resnet50(), "linear.weight", "fc.weight"),
        ("cifar_wrn_40_2", of_wrn(6, 2), "block3.layer.0.convShortcut.weight", "stages.2.0.shortcut.weight"),
        ("cifar_wrn_28_2", of_wrn(4, 2), "block2.layer.3.conv2.weight", "stages.1.3.conv2.weight"),
        ("cifar_wrn_16_4", of_wrn(2, 4), "block1.layer.1.bn2.bias", "stages.0.1.bn2.bias"),
        ("cifar_wrn_28_4", of_wrn(4, 4), "bn1.running_var", "tail.0.running_var"),
        ("cifar_vgg13", of_vgg((2, 2, 2, 2, 2)), "block4.3.bias", "stages.3.3.bias"),
    ],
)
def test_teachers_of_crd_and_mdistiller_are_read(
    name: str, shapes: Iterator[tuple[str, tuple[int, ...]]], theirs: str, ours: str, tmp_path: Path
) -> None:
    state = {key: torch.rand(shape) if shape else torch.tensor(7) for key, shape in shapes}
    torch.save({"epoch": 240, "model": state, "accuracy": torch.tensor(70.0)}, tmp_path / "ckpt_epoch_240.pth")
    model = made(name)
    assert load_weights(model, tmp_path / "ckpt_epoch_240.pth") == []
    read = model.state_dict()
    assert torch.equal(read[ours], state[theirs])
    assert sum(map(torch.count_nonzero, read.values())) == sum(map(torch.count_nonzero, state.values()))

    # Those of PyTorch 0.4.0 have no counters.
    torch.save({key: value for key, value in state.items() if value.ndim}, tmp_path / "old.pth")
    assert load_weights(model, tmp_path / "old.pth") == []
