"""Protects a student's step on a GPU, without one: the host waits for nothing in it, and its small kernels are few."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcache.methods import METHODS
from kdcache.models.creation import Normalisation, create_model
from kdcache.targets import CONTROLS, Targets, row_keys
from kdcache.training.clipping import Clipping
from kdcache.training.config import TrainConfig
from kdcache.training.devices import seeded
from kdcache.training.learner import Learner
from kdcache.training.metrics import agreement, correlation, divergence
from tests.stand_ins import Launches, launched, stand_in_gpu

ROWS, CLASSES, SIZE = 8, 10, 32
FITTED_TO = np.eye(ROWS, CLASSES, dtype=np.float32)  # teacher logits


def steps_on_the_stand_in(
    folder: Path, model: str | None = None, method: str = "kd", control: str = "none", **config: Any
) -> Launches:
    """What the second step of a student launches, copies and waits for; without a model's name, of a linear one."""
    made: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, CLASSES))
    normalise = Normalisation((0.5,) * 3, (0.5,) * 3)
    if model is not None:
        with seeded(0):
            made, normalise = create_model(model, CLASSES, input_size=SIZE)
    loss = METHODS.parse(method).fit([FITTED_TO], 4.0)
    with stand_in_gpu() as gpu:
        state = loss.new_state().to(gpu)
        optimizer = loss.new_optimizer(state)
        settings = TrainConfig(epochs=1, amp=False).but(**config)
        how: dict[str, Any] = {"learned": (state, optimizer)} if optimizer is not None else {}
        learner = Learner(folder, made, normalise, settings, steps_per_epoch=9, seed=0, device=gpu, **how)
        views = [torch.empty(ROWS, 3, SIZE, SIZE, dtype=torch.uint8, device=gpu) for _ in range(loss.views_per_step)]
        logits = torch.empty(ROWS, CLASSES, device=gpu)
        label = torch.empty(ROWS, dtype=torch.int64, device=gpu)
        other = Targets(logits, 4.0, label, label, torch.empty(ROWS, device=gpu))
        targets = Targets(logits, 4.0, label, label, other.lam, second=other if len(views) == 2 else None)
        change = CONTROLS.parse(control)
        keys = row_keys("digest", 0, label)

        def step() -> None:
            changed = change(targets, keys)

            def measure(z: Tensor) -> dict[str, Tensor]:
                figures = {"agreement": agreement(z, logits), "divergence": divergence(z, logits, 4.0)}
                return figures | {"correlation": correlation(z, logits)} | loss.figures(state)

            learner.step(views, lambda z: loss(z, changed, state), measure)

        launched(step)
        found = launched(step)
        learner.status = "complete"
        learner.suspend()
    return found


@pytest.mark.parametrize(
    ("model", "how"),
    [
        ("test_resnet", {}),
        ("test_vit", {"model_ema_decay": 0.99, "opt": "sgd"}),
        ("cifar_resnet8x4", {"amp": True, "clip_grad": None}),
        ("test_vit", {"layer_decay": 0.7}),
        ("test_resnet", {"drop_path": None, "opt": "lion"}),
    ],
    ids=str,
)
def test_a_step_waits_for_nothing(tmp_path: Path, model: str, how: dict[str, Any]) -> None:
    found = steps_on_the_stand_in(tmp_path, model, **how)
    assert not found.waits, found.waits
    assert found.copies == 0  # nothing is copied that a step before has copied


@pytest.mark.parametrize("method", list(METHODS))
def test_no_method_waits(tmp_path: Path, method: str) -> None:
    found = steps_on_the_stand_in(tmp_path, method=method)
    assert (found.waits, found.copies) == ({}, 0)


@pytest.mark.parametrize("control", ["bottom:3", "topk:3"])
def test_no_control_waits(tmp_path: Path, control: str) -> None:
    assert not steps_on_the_stand_in(tmp_path, control=control).waits


def test_correlations_are_those_of_the_rows_and_those_of_constant_rows_are_0() -> None:
    z, v = torch.randn(2, ROWS, CLASSES, generator=torch.Generator().manual_seed(0)) * 3 + 40
    expected = np.mean([np.corrcoef(one, other)[0, 1] for one, other in zip(z.double(), v.double(), strict=True)])
    assert correlation(z, v).item() == pytest.approx(expected, abs=1e-5)
    assert correlation(3 * z + 1, z).item() == pytest.approx(1)
    assert correlation(torch.full_like(z, 3.3), v).item() == pytest.approx(0, abs=1e-6)
    assert correlation(z.bfloat16(), v).item() == pytest.approx(expected, abs=0.02)


def gradients(device: torch.device, layers: int) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.empty(number % 5 + 1, 7, device=device)) for number in range(layers)]
    parameters.append(nn.Parameter(torch.empty(4, 3, 2, 2, device=device).contiguous(memory_format=torch.channels_last)))
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    return parameters


def test_clipping_takes_as_many_kernels_for_one_layer_as_for_many() -> None:
    with stand_in_gpu() as gpu:
        counts = []
        for layers in (1, 10, 200):
            clip = Clipping(gradients(gpu, layers), 1.0)
            clip()
            found = launched(clip)
            assert not found.waits
            counts.append(found.kernels)
    assert counts[0] == counts[1] == counts[2] <= 16, counts


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipping_at_once_gives_the_bits_of_clipping_one_by_one(max_norm: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7,), (3, 2000), (1,), (5, 4, 3, 3), (1024,), ()]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    grads[3] = grads[3].contiguous(memory_format=torch.channels_last)
    grads.append(torch.randn(1, generator=generator).expand(6, 2))  # as a sum's gradient has it: of one number
    norms = torch.stack(torch._foreach_norm(grads))
    scales = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    found = Clipping([], max_norm).scaled(grads, scales)
    for one, before, scale in zip(found, grads, scales, strict=True):
        assert torch.equal(one, before * scale)
        assert one.shape == before.shape
        assert one.stride() == (before.stride() if before.numel() != 12 or before.ndim != 2 else (2, 1))


def test_pixels_are_normalised_to_the_bits_they_always_had() -> None:
    normalise = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    views = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) * 255 for values in (normalise.mean, normalise.std))
    assert torch.equal(normalise(views), (views.float() - mean) / std)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("opt", ["adamw", "sgd", "lion"])
@pytest.mark.parametrize("method", list(METHODS))
def test_a_gpu_waits_for_nothing_in_a_step(tmp_path: Path, method: str, opt: str, amp: bool) -> None:
    gpu, loss = torch.device("cuda"), METHODS.parse(method).fit([FITTED_TO], 4.0)
    made, normalise = create_model("test_resnet", CLASSES, input_size=SIZE)
    state = loss.new_state().to(gpu)
    optimizer = loss.new_optimizer(state)
    how: dict[str, Any] = {"learned": (state, optimizer)} if optimizer is not None else {}
    settings = TrainConfig(epochs=1, opt=opt, amp=amp, model_ema_decay=0.9)
    learner = Learner(tmp_path, made, normalise, settings, steps_per_epoch=9, seed=0, device=gpu, **how)
    views = [torch.randint(0, 256, (ROWS, 3, SIZE, SIZE), dtype=torch.uint8, device=gpu) for _ in range(loss.views_per_step)]
    logits, label = torch.randn(ROWS, CLASSES, device=gpu), torch.arange(ROWS, device=gpu)
    targets = Targets(logits, 4.0, label, label, torch.rand(ROWS, device=gpu))
    targets = targets if len(views) == 1 else replace(targets, second=targets)

    def step() -> None:
        learner.step(
            views, lambda z: loss(z, targets, state), lambda z: {"agreement": agreement(z, logits)} | loss.figures(state)
        )

    step()
    step()
    torch.cuda.set_sync_debug_mode("error")  # type: ignore[no-untyped-call]
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")  # type: ignore[no-untyped-call]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_a_gpu_clips_as_a_cpu_does(max_norm: float) -> None:
    shapes = [(7,), (3, 2000), (5, 4, 3, 3), ()]
    on_host = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    there = [nn.Parameter(parameter.detach().to("cuda")) for parameter in on_host]
    for one, other in zip(on_host, there, strict=True):
        one.grad = torch.randn(one.shape)
        other.grad = one.grad.to("cuda")
    totals = [Clipping(parameters, max_norm)() for parameters in (on_host, there)]
    torch.testing.assert_close(totals[1].cpu(), totals[0])
    for one, other in zip(on_host, there, strict=True):
        torch.testing.assert_close(other.grad.cpu(), one.grad)  # type: ignore[union-attr]
