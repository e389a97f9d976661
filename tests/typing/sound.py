"""What a user's typed program does with kdcache: a training loop, its own components, reading. mypy --strict finds no error."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import kdcache
from kdcache.datasets import DATASETS, Recipe, Sample, Split
from kdcache.methods import METHODS, LogitMethod, State
from kdcache.targets import CONTROLS, Control, Targets


def train(path: Path, student: nn.Module) -> float:
    archive: kdcache.Archive = kdcache.open_archive(path)
    assert archive.manifest.canvas is not None
    digits = kdcache.datasets.build("digits")
    canvas: kdcache.Canvas = kdcache.Workspace(".").canvas(digits, "train", archive.manifest.canvas.size)
    stream = kdcache.CachedTargets(archive, canvas, batch_size=64, seed=0)
    method = kdcache.methods.build("ctkd")
    state = method.new_state()
    learner = method.new_optimizer(state)
    control = kdcache.targets.control("bottom", k=3)
    total = 0.0
    for epoch in range(3):
        state.epoch = epoch + 1
        for batch in stream:
            images: Tensor = batch.images.float() / 127.5 - 1
            loss: Tensor = method(student(images), batch.targets(4.0, control), state)
            torch.autograd.backward(loss)
            if learner is not None:
                learner.step()
            total += loss.item()
    return total


def read(path: str) -> NDArray[np.float64]:
    try:
        archive = kdcache.open_archive(path)
    except kdcache.errors.NotFoundError as error:
        raise SystemExit(f"{error.what}: {error.fix}") from None
    logits: NDArray[np.float32] = archive.read(0, 0, archive.num_samples).logits
    whole, rest = kdcache.stats.relative_entropy(logits, 4.0)
    policy: kdcache.ViewPolicy = kdcache.ViewPolicy.load("pets")
    rows = policy.parameters(0, archive.num_samples, np.full((archive.num_samples, 2), 224))
    pixels: Tensor = kdcache.views.render(torch.zeros(archive.num_samples, 3, 8, 8, dtype=torch.uint8), rows)
    return np.asarray(whole + rest + pixels.shape[0])


@METHODS.register("mine")
@dataclass(frozen=True, kw_only=True)
class Mine(LogitMethod):
    """Squared differences of logits."""

    power: float = 2.0

    uses_tau: ClassVar[bool] = False

    def distance(self, student: Tensor, teacher: Tensor, targets: Targets, state: State | None) -> Tensor:
        return (student - teacher).abs().pow(self.power).mean()


@CONTROLS.register("mine")
@dataclass(frozen=True)
class Halved(Control):
    """Logits of half the size."""

    def __call__(self, targets: Targets, rng_key: Tensor) -> Targets:
        return targets.with_logits(targets.logits / 2)


@DATASETS.register("mine")
@dataclass(frozen=True)
class Nothing:
    """No images."""

    licence: ClassVar[str | None] = None
    recipe: ClassVar[Recipe] = Recipe("none", 32, 1, "test_resnet", 1, False)

    def open(self, data: Path, progress: object = None, *, fetch: bool = True) -> "Nothing":
        return self

    def class_names(self) -> Sequence[str]:
        return ["a", "b"]

    def samples(self, split: Split) -> Sequence[Sample]:
        return []

    def fingerprint(self) -> str:
        return "1"
