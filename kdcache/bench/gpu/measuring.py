"""What the checks of a GPU share: where they run, how long work takes there, how much it launches, and when the host waits."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.archive import Archive
from kdcache.bench.pipeline import open_writer
from kdcache.bench.turns import Result
from kdcache.datasets.canvas import Canvas
from kdcache.models.creation import create_model
from kdcache.system.progress import Progress
from kdcache.training.config import TrainConfig
from kdcache.training.devices import seeded
from kdcache.training.learner import Learner
from kdcache.views.policy import ViewPolicy
from kdcache.views.probe import fingerprint
from kdcache.views.rendering import render_positions

__all__ = ["Found", "NotHereError", "Setting", "kernels", "learner_of", "random_archive", "settled", "waits", "written"]


class NotHereError(Exception):
    """What a check needs is not on this machine: the reason why it is left out."""


@dataclass(frozen=True)
class Setting:
    """Where a check runs and for how long. `tiny` is the same in small, as tests have it on a CPU."""

    device: torch.device
    folder: Path
    seconds: float
    progress: Progress
    tiny: bool = False

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done all work."""
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def waiting(self, work: Callable[[], object]) -> Callable[[], None]:
        """`work` until the device has done it."""

        def waited() -> None:
            work()
            self.wait()

        return waited


@dataclass(frozen=True)
class Found:
    """What a check has found: results with bounds, and whatever else is worth knowing."""

    results: list[Result]
    details: dict[str, Any] = field(default_factory=dict)


def settled(setting: Setting, work: Callable[[], object]) -> None:
    """Do `work` until what happens at its first time (compilation, choice of kernels, allocation) is over."""
    for _ in range(3):
        work()
    setting.wait()


def kernels(setting: Setting, work: Callable[[], object]) -> int:
    """Kernels and copies that `work` starts on a GPU, as the profiler counts them."""
    if not setting.gpu:
        raise NotHereError("only launches on a GPU are counted")
    from torch.profiler import ProfilerActivity, profile

    settled(setting, work)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        setting.wait()
    return sum(event.device_type.name == "CUDA" for event in found.events())


def waits(setting: Setting, work: Callable[[], object]) -> Counter[str]:
    """Where `work` makes the host wait for a GPU, as torch reports it: lines of source, with counts."""
    settled(setting, work)
    with _reported(setting) as places:
        work()
    setting.wait()
    return places


@contextmanager
def _reported(setting: Setting) -> Iterator[Counter[str]]:
    places: Counter[str] = Counter()
    with warnings.catch_warnings(action="ignore"):  # torch tells that this is a prototype, in words like those looked for below
        if setting.gpu:
            torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            yield places
        finally:
            if setting.gpu:
                torch.cuda.set_sync_debug_mode("default")
    for each in seen:
        if "called a synchronizing" in str(each.message):
            places[f"{Path(each.filename).name}:{each.lineno}"] += 1


def learner_of(
    setting: Setting, name: str, size: int, batch: int, *, folder: str, device: torch.device | None = None, **options: Any
) -> Learner:
    """A learner of a new model of ten classes; `options` are those of `TrainConfig`."""
    with seeded(0):
        model, normalise = create_model(name, 10, input_size=size)
    config = TrainConfig(**{"epochs": 10**6, "batch_size": batch} | options)
    where = setting.folder / folder
    return Learner(where, model, normalise, config, steps_per_epoch=100, seed=0, device=device or setting.device)


def written(learner: Learner) -> None:
    """End a learner whose checkpoint nobody needs."""
    learner.status = "complete"
    learner.suspend()


def random_archive(path: Path, canvas: Canvas, policy: ViewPolicy, views: int) -> Archive:
    """An archive of some views of a canvas, with random logits in the place of a teacher's."""
    writer = open_writer(path, canvas, policy, views)
    drawn = np.random.default_rng(0)
    for view, block in writer.missing():
        positions = np.array(writer.positions(block))
        table = policy.parameters(view, len(canvas), canvas.sizes)
        digest, probe = fingerprint(render_positions(canvas.pixels, table, positions))
        logits = drawn.normal(0, 3, (len(positions), len(canvas.card.class_names))).astype(np.float32)
        writer.write(view, block, logits, sample=table.sample[positions], digest=digest, probe=probe)
    return writer.finalize()
