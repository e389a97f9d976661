"""A student's step on a GPU: its time, its launches, what the host waits for, and whether it moves between devices."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdcache.bench.gpu.measuring import Found, Setting, kernels, learner_of, waits, written
from kdcache.bench.turns import Result, taking_turns
from kdcache.methods import build
from kdcache.models.creation import create_model
from kdcache.targets import Targets, control, row_keys
from kdcache.training.devices import seeded
from kdcache.training.learner import Learner
from kdcache.training.metrics import agreement, divergence
from kdcache.training.optimizers import make_optimizer

__all__ = ["no_waits", "resume", "smoothing", "step"]

TAU = 4.0
LAUNCHES = 40  # of ls-instance's targets of a batch
MOVED = 1e-2  # largest difference of a weight that has been trained in turns on both devices, as a share of the largest weight


def _stepping(learner: Learner, views: Tensor, logits: Tensor) -> Callable[[], None]:
    """A step as in distill, on given views and teacher logits."""
    method, targets = build("kd"), Targets(logits, TAU)

    def work() -> None:
        learner.step(
            views,
            lambda z: method(z, targets),
            lambda z: {"agreement": agreement(z, logits), "divergence": divergence(z, logits, TAU)},
        )

    return work


def _batch(batch: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Views and teacher logits."""
    drawn = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, (batch, 3, size, size), generator=drawn, dtype=torch.uint8)
    return views.to(device), torch.randn(batch, 10, generator=drawn).mul(3).to(device)


def step(setting: Setting) -> Found:
    """A learner's step against plain PyTorch on the same batch; with a bound where the model is what takes the time."""
    large, small = ("resnet18", 224, 256, 1.05), ("cifar_resnet8x4", 32, 64, None)
    results, details = [], {}
    for name, size, batch, bound in (("test_vit", 32, 8, 1.05),) if setting.tiny else (large, small):
        amp = setting.gpu
        learner = learner_of(setting, name, size, batch, folder=f"step-{name}", amp=amp)
        views, logits = _batch(batch, size, setting.device)
        ours = _stepping(learner, views, logits)
        bare = _bare(setting, name, size, views, logits, learner)
        sides = [setting.waiting(side) for side in (ours, bare)]
        taken, least = taking_turns(f"bench gpu: step {name}", setting.seconds / 2, setting.progress, *sides)
        written(learner)
        details[f"{name}/{size}, {batch}"] = {"ms": round(1e3 * taken, 3), "bare_ms": round(1e3 * least, 3)}
        if bound is not None:
            results.append(Result(f"step {name}/{size}", "learner's, with figures", "bare step", taken / least, bound))
    return Found(results, details)


def _bare(setting: Setting, name: str, size: int, views: Tensor, logits: Tensor, learner: Learner) -> Callable[[], None]:
    """The same step in plain PyTorch, with the learner's own optimiser of another model."""
    with seeded(0):
        model, normalise = create_model(name, 10, input_size=size)
    model.to(setting.device).train()
    optimizer, method, targets = make_optimizer(model, learner.config), build("kd"), Targets(logits, TAU)

    def work() -> None:
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=bool(learner.config.amp)):
            predicted = model(normalise(views))
        loss = method(predicted, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return work


def smoothing(setting: Setting, count: Callable[[Setting, Callable[[], object]], int] = kernels) -> Found:
    """Kernels of a batch's targets under each control, 64 x 100."""
    logits = torch.randn(64, 100, generator=torch.Generator().manual_seed(0)).mul(3).to(setting.device)
    keys = row_keys("bench", 0, torch.arange(64)).to(setting.device)
    found = {}
    for name, options in (("ls-instance", {}), ("ls-global", {}), ("bottom", {"k": 5}), ("none", {})):
        made = control(name, **options).fit([logits.cpu().numpy()], TAU)
        found[name] = count(setting, lambda made=made: made(Targets(logits, TAU), keys))  # type: ignore[misc]
    instance = Result("launches of ls-instance", "targets of 64 x 100", "kernels and copies", found["ls-instance"], LAUNCHES)
    return Found([instance], {"kernels": found})


def no_waits(setting: Setting, places_of: Callable[[Setting, Callable[[], object]], Counter[str]] = waits) -> Found:
    """Whether the host waits for the device in a step, with each thing that a step may have."""
    name, size, batch = ("test_vit", 32, 8) if setting.tiny else ("cifar_resnet8x4", 32, 64)
    ways: dict[str, dict[str, Any]] = {
        "usual": {},
        "bf16 and average": {"amp": True, "model_ema_decay": 0.999},
        "sgd": {"opt": "sgd"},
    }
    results, details = [], {}
    for way, options in ways.items():
        learner = learner_of(setting, name, size, batch, folder=f"waits-{way.replace(' ', '-')}", **options)
        found = places_of(setting, _stepping(learner, *_batch(batch, size, setting.device)))
        written(learner)
        results.append(Result(f"waits of a step, {way}", "times the host waits", "-", sum(found.values()), 0))
        if found:
            details[way] = dict(found.most_common(10))
    return Found(results, details)


def resume(setting: Setting) -> Found:
    """A run that is begun on a CPU and goes on on the GPU, and back, against a run of the CPU alone."""
    cpu, name, size, batch = torch.device("cpu"), "test_vit", 32, 8

    def trained(folder: str, *devices: torch.device) -> tuple[int, dict[str, Tensor]]:
        for device in devices:
            learner = learner_of(setting, name, size, batch, folder=folder, device=device, amp=False)
            work = _stepping(learner, *_batch(batch, size, device))
            for _ in range(3):
                work()
            learner.suspend()
        return learner.steps, {key: value.float().cpu() for key, value in learner.model.state_dict().items()}

    steps, moved = trained("moved", cpu, setting.device, cpu)
    _, alone = trained("alone", cpu, cpu, cpu)
    difference = max(float((moved[key] - alone[key]).abs().max()) for key in alone)
    largest = max(float(value.abs().max()) for value in alone.values())
    results = [
        Result("steps lost between devices", "of nine", "-", 9 - steps, 0),
        Result("weights after both devices", "largest difference", "the CPU's largest", difference / largest, MOVED),
    ]
    return Found(results)
