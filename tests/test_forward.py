"""Protects a teacher's forward passes: float32 where it is meant, half precision as autocast has it, and no waiting host."""

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdcache.models.creation import Normalisation, create_model
from kdcache.system.transfer import Landing
from kdcache.teachers import forward as module
from kdcache.teachers.forward import Forward, suited_memory_format, with_half_weights
from kdcache.teachers.noise import in_float64
from kdcache.training.devices import seeded
from kdcache.views.probe import grid_means, grid_sums, grids
from tests.stand_ins import launched, stand_in_gpu

CPU = torch.device("cpu")
HALF = Normalisation((0.5,) * 3, (0.5,) * 3)
FAMILIES = ["test_vit", "test_resnet", "test_convnext", "test_efficientnet", "test_mambaout", "test_byobnet"]


def views(count: int, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


class Watched(nn.Module):
    """Notes with which precision of float32 it runs. Logits beyond float16's range make it repeat a batch."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.body, self.head, self.scale = nn.Linear(3, 4), nn.Linear(4, 2), scale
        self.seen: list[tuple[str, str, torch.dtype]] = []

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.mean(dim=(2, 3))) * self.scale

    def forward_head(self, x: torch.Tensor) -> torch.Tensor:
        places = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
        self.seen.append((*(place.fp32_precision for place in places), x.dtype))
        return self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


IEEE = ("ieee", "ieee", torch.float32)


@pytest.mark.parametrize(
    ("precision", "scale", "seen"),
    [("fp32", 1.0, [IEEE]), ("fp16", 1.0, [IEEE]), ("fp16", 1e6, [IEEE, IEEE])],
    ids=["fp32", "the head of fp16", "a batch beyond fp16"],
)
def test_float32_is_ieee_wherever_it_is_meant(precision: Any, scale: float, seen: list[Any]) -> None:
    model = Watched(scale).eval()
    logits = Forward(model, HALF, CPU, precision)(views(5))
    assert model.seen == seen
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_that_are_cast_once_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with seeded(0):
        model, normalise = create_model(name, 7, input_size=32)
    model.eval()
    expected = Forward(model, normalise, CPU, "bf16")(views(2))
    monkeypatch.setattr(module, "_CASTING", {"cpu"})
    forward = Forward(model, normalise, CPU, "bf16")
    found = forward(views(2))
    np.testing.assert_array_equal(found, expected)
    assert forward._half is not model, "they were cast"
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    halved = [layer for layer in forward._half.modules() if type(layer) in (nn.Linear, nn.Conv2d)]
    assert {layer.weight.dtype for layer in halved} == {torch.bfloat16}
    shared = {weight.data_ptr() for weight in model.parameters()} & {weight.data_ptr() for weight in forward._half.parameters()}
    assert shared or name == "test_byobnet", "norms are not copied"


def test_a_plain_models_head_keeps_float32_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 30 * 30, 5), nn.ReLU(), nn.Linear(5, 4)
    ).eval()
    expected = Forward(model, HALF, CPU, "bf16")(views(3))
    monkeypatch.setattr(module, "_CASTING", {"cpu"})
    forward = Forward(model, HALF, CPU, "bf16")
    np.testing.assert_array_equal(forward(views(3)), expected)
    kinds = [layer.weight.dtype for layer in forward._half if hasattr(layer, "weight")]
    assert kinds == [torch.bfloat16, torch.bfloat16, torch.float32]


class Standardised(nn.Module):
    """Computes with a layer's weights before it uses them, as autocast does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.conv.weight / self.conv.weight.std() + 0.123
        return self.head(nn.functional.conv2d(x, weight, self.conv.bias).mean(dim=(2, 3)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_a_model_computes_with_are_not_cast() -> None:
    torch.manual_seed(0)
    normed = nn.utils.weight_norm(nn.Linear(4, 4))  # its weight is made from others in every pass
    for model in (Standardised().eval(), nn.Sequential(Standardised(), normed).eval()):
        expected = Forward(model, HALF, CPU, "bf16")(views(3))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_CASTING", {"cpu"})
            np.testing.assert_array_equal(Forward(model, HALF, CPU, "bf16")(views(3)), expected)


def test_two_layers_with_one_weight_keep_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4))
    model[1].weight = model[0].weight
    halved = with_half_weights(model, torch.bfloat16)
    assert halved[0].weight is halved[1].weight is model[0].weight
    assert halved[0].bias.dtype == torch.bfloat16


def test_channels_last_is_for_half_precision_convolutions_on_gpus_that_can_run_so() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return y.view(len(x), -1)  # of what lies with channels last there is no such view

    model, _ = create_model("test_resnet", 4, input_size=32)
    assert module._runs_with_channels_last(model.eval(), 32, CPU, "bf16")
    assert all(weight.is_contiguous() for weight in model.parameters()), "as it was"
    assert not module._runs_with_channels_last(Flat(), 32, CPU, "bf16")
    assert suited_memory_format(model, 32, CPU, "bf16") == "contiguous"
    gpu = torch.device("cuda")
    assert suited_memory_format(model, 32, gpu, "fp32") == "contiguous"
    assert suited_memory_format(nn.Linear(2, 2), 32, gpu, "fp16") == "contiguous"


def test_views_with_channels_last_give_the_same_logits_to_rounding() -> None:
    with seeded(0):
        model, normalise = create_model("test_resnet", 4, input_size=32)
    one = Forward(model.eval(), normalise, CPU, "fp32")(views(4))
    other = Forward(model, normalise, CPU, "fp32", "channels_last")
    assert other._inputs(views(4)).is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(other(views(4)), one, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_host_waits_for_a_batch_once_when_its_results_are_needed(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # the stand-in has none
    with stand_in_gpu() as gpu:
        model, _ = create_model("test_resnet", 4, input_size=32)
        forward = Forward(model.eval().to(gpu), lambda x: x.float() / 255, gpu, precision)  # type: ignore[arg-type]
        images = views(4).to(gpu)
        forward.launch(images)
        landings: list[Landing] = []

        def batch() -> None:
            logits = forward.launch(images)
            landings.append(Landing(logits, forward.finite(logits), grid_sums(images)))

        found = launched(batch)
        assert not found.waits
        assert found.kernels > 10
        logits, finite, sums = landings[0].wait()
    assert (logits.shape, finite.shape, sums.shape) == ((4, 4), (), (4, 4, 4))
    assert {tensor.device for tensor in (logits, finite, sums)} == {CPU}


@pytest.mark.parametrize("side", [1, 3, 16, 33])
def test_grids_are_the_means_of_their_sums(side: int) -> None:
    images = views(3, side)
    np.testing.assert_array_equal(grid_means(grid_sums(images), side), grids(images))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_on_a_gpu_weights_that_are_cast_once_change_no_bit(name: str, precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, size = torch.device("cuda"), 32
    with seeded(0):
        model, normalise = create_model(name, 7, input_size=size)
    model = model.eval().to(gpu)
    shape = suited_memory_format(model, size, gpu, precision)
    forward = Forward(model, normalise, gpu, precision, shape)
    found = forward(views(64, size))
    assert forward._half is not model
    monkeypatch.setattr(module, "_CASTING", set())
    np.testing.assert_array_equal(found, Forward(model, normalise, gpu, precision, shape)(views(64, size)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_float32_on_a_gpu_is_as_close_to_float64_as_on_a_cpu() -> None:
    """TF32, torch's default for convolutions, is a thousand times as far off."""
    with seeded(0):
        model, normalise = create_model("test_resnet", 7, input_size=32)
    model.eval()
    exact = in_float64(Forward(model, normalise, CPU, "fp32"))(views(64))
    found = torch.from_numpy(Forward(model.cuda(), normalise, torch.device("cuda"), "fp32")(views(64)))
    assert (found - exact).abs().max() < 1e-4 * exact.std()
