"""Memory of models in training, measured on small batches, and the memory that is available.

Students in lockstep step one after another. Together they need the memory that each keeps between steps, plus once the
temporary memory of the largest step.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.models.creation import create_model
from kdcache.system.gpu import free_memory
from kdcache.training.config import StudentRuntime, TrainConfig
from kdcache.training.devices import seeded
from kdcache.training.learner import Learner

__all__ = ["Footprint", "available_memory", "fitting", "footprint", "groups_that_fit", "room"]

TRIED = (2, 4)  # samples in the measured batches; memory grows linearly with the batch
BACKWARD_COPIES = 3  # copies of the largest activation: gradients on both sides of a layer, and of a branch still to be added
LOSS_COPIES = 16  # copies of the logits, made by a loss and the logged figures
SPARE = 1.25  # allocated over used temporary memory, since freed blocks do not always fit again
GROWN = 1.125  # size over contents of a buffer that grows while it is written
SHARE = 0.8  # share of the free memory for models: these are estimates, and other programs need some
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")

NEVER_WRITTEN = StudentRuntime(checkpoint_interval=1e9)


@dataclass(frozen=True)
class Footprint:
    """Bytes of one model in training. `best` and `checkpoint` are in host memory, the rest is on its device."""

    device: str  # type of the device; on the CPU all memory is the host's
    weights: int  # parameters and buffers
    optimizer: int
    average: int  # averaged weights, if kept
    held: int  # gradients that stay until the next step
    best: int  # copy of the best weights
    gradients: int  # gradients that do not stay
    activations: int  # at the batch size, with temporary memory of loss and backward
    inputs: int
    checkpoint: int  # while a checkpoint is written

    @property
    def kept(self) -> int:
        """Bytes on the device between steps."""
        return self.weights + self.optimizer + self.average + self.held + (self.best if self.device == "cpu" else 0)

    @property
    def passing(self) -> int:
        """Temporary bytes on the device during a step."""
        # Optimisers that update all tensors at once copy them, after the activations are freed.
        step = round(SPARE * (self.gradients + max(self.inputs + self.activations, 2 * self.weights)))
        return max(step, self.checkpoint) if self.device == "cpu" else step

    @property
    def kept_on_host(self) -> int:
        return self.kept if self.device == "cpu" else self.best

    @property
    def passing_on_host(self) -> int:
        return self.passing if self.device == "cpu" else self.checkpoint


def fitting(models: Iterable[Footprint], available: int) -> int:
    """Number of leading models that can train in lockstep in `available` bytes of their device."""
    kept = passing = count = 0
    for model in models:
        kept, passing = kept + model.kept, max(passing, model.passing)
        if kept + passing > available:
            break
        count += 1
    return count


def groups_that_fit(models: Sequence[Footprint], available: int) -> Iterator[slice]:
    """Split models into groups that can train in lockstep. A model that may not fit forms a group of its own."""
    start = 0
    while start < len(models):
        count = max(1, fitting(models[start:], available))
        yield slice(start, start + count)
        start += count


def footprint(
    name: str, num_classes: int, input_size: int, config: TrainConfig, *, views: int = 1, device: str | torch.device = "cpu"
) -> Footprint:
    """What a model of that exact name takes in training, when its loss wants `views` of each sample."""
    # What moves no figure is the same for all: students that differ in it are measured once.
    small = TrainConfig(
        epochs=1,
        opt=config.opt,
        momentum=config.momentum,
        amp=config.amp,
        model_ema_decay=config.model_ema_decay and 0.5,
        drop_path=config.drop_path,
        opt_betas=config.opt_betas,
    )
    measured = _measured(name, num_classes, input_size, small, torch.device(device))
    rows = config.batch_size * views
    pixels = rows * 3 * input_size**2
    activations = views * measured.saved_at(config.batch_size) + BACKWARD_COPIES * measured.largest_at(config.batch_size)
    return Footprint(
        device=torch.device(device).type,
        weights=measured.weights,
        optimizer=measured.optimizer,
        average=measured.average,
        held=measured.held,
        best=measured.weights,
        gradients=measured.gradients - measured.held,
        activations=activations + LOSS_COPIES * 4 * rows * num_classes,
        inputs=pixels + 4 * pixels,  # uint8 images, and float32 ones while they are normalised
        checkpoint=int(GROWN * (measured.weights + measured.optimizer + measured.average)) + 2 * measured.weights,
    )


@dataclass(frozen=True)
class _Measured:
    weights: int
    optimizer: int
    average: int
    gradients: int
    held: int
    saved: tuple[int, int]  # bytes saved for the backward pass, for each batch size in TRIED
    largest: tuple[int, int]  # bytes of the largest saved tensor

    def saved_at(self, batch_size: int) -> int:
        return _line(self.saved, batch_size)

    def largest_at(self, batch_size: int) -> int:
        return _line(self.largest, batch_size)


def _line(values: tuple[int, int], at: int) -> int:
    """The line through the values measured for TRIED, at batch size `at`."""
    slope = (values[1] - values[0]) / (TRIED[1] - TRIED[0])
    return max(0, round(values[0] + slope * (at - TRIED[0])))


@cache
def _measured(name: str, num_classes: int, input_size: int, config: TrainConfig, device: torch.device) -> _Measured:
    """Measure two real steps of a learner by counting its tensors."""
    with seeded(0):
        model, normalise = create_model(name, num_classes, input_size=input_size, drop_path=config.drop_path)
    with tempfile.TemporaryDirectory(prefix="kdcache-footprint-") as folder:
        learner = Learner(
            Path(folder), model, normalise, config, steps_per_epoch=len(TRIED) + 1, seed=0, device=device, runtime=NEVER_WRITTEN
        )
        sizes = [_step(learner, count, num_classes, input_size) for count in TRIED]
        gradients = [p.grad for p in learner.parameters if p.grad is not None]
        measured = _Measured(
            weights=_bytes(model.state_dict().values()),
            optimizer=_bytes(_tensors(learner.optimizer.state)),
            average=0 if learner.average is None else _bytes(learner.average.state_dict().values()),
            gradients=_bytes(learner.parameters),
            held=_bytes(gradients),
            saved=(sizes[0][0], sizes[1][0]),
            largest=(sizes[0][1], sizes[1][1]),
        )
        learner.status = "complete"  # nothing of it needs saving
        learner.suspend()
    return measured


def _step(learner: Learner, count: int, num_classes: int, input_size: int) -> tuple[int, int]:
    """Run one step on `count` samples: (bytes that autograd saves without weights, bytes of the largest saved tensor)."""
    own = {tensor.untyped_storage().data_ptr() for tensor in learner.model.state_dict().values()}
    saved: dict[int, Tensor] = {}  # by address; the references keep addresses from being reused

    def save(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in own:
            saved.setdefault(address, tensor.detach())
        return tensor

    views = torch.zeros(count, 3, input_size, input_size, dtype=torch.uint8, device=learner.device)
    labels = torch.arange(count, device=learner.device) % num_classes
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        learner.step(views, lambda logits: F.cross_entropy(logits, labels), lambda logits: {})
    sizes = [tensor.untyped_storage().nbytes() for tensor in saved.values()]
    return sum(sizes), max(sizes)


def _tensors(values: object) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def room(device: str | torch.device, asked: int | None = None, taken: int = 0) -> int:
    """Bytes for models in training: the requested amount, or most of the free memory of which `taken` bytes are for others."""
    return asked or int(SHARE * max(0, available_memory(device) - taken))


def available_memory(device: str | torch.device) -> int:
    """Bytes that this process can still allocate on a device; on the host within the limits of its control groups."""
    device = torch.device(device)
    if device.type == "cuda":
        return free_memory(device)
    return min([psutil.virtual_memory().available, *_control_groups()])


def _control_groups() -> Iterator[int]:
    """Bytes that each control group of this process, and its parents, still allow (versions 1 and 2, see cgroups(7)).

    psutil reports only the whole machine. Systems other than Linux have no control groups.
    """
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        limit, usage, reclaimable = names
        # In a container, the group may be mounted as the root, where its path does not exist.
        steps = Path(path.lstrip("/"))
        for group in (root / step for step in (steps, *steps.parents)):
            try:
                allowed = (group / limit).read_text().strip()
                used = int((group / usage).read_text())
                stat = dict(part.split() for part in (group / "memory.stat").read_text().splitlines())
            except OSError:  # the root group of version 2 has no such files
                continue
            if allowed != "max":
                yield max(0, int(allowed) - used + int(stat.get(reclaimable, 0)))
