"""Benchmark against timm's online distillation, with its own task and data pipeline, as in its train script.

Both sides train the same student of the same teacher with the same batch size and optimiser. timm reads decoded images from
memory and runs the teacher in every step; kdcache reads a canvas and cached logits. Neither decodes JPEG.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from kdcache.archive import Archive
from kdcache.bench.pipeline import digits_canvas, open_writer
from kdcache.bench.turns import Result, taking_turns
from kdcache.datasets.canvas import Canvas
from kdcache.methods import build
from kdcache.models.creation import create_model
from kdcache.replay.stream import Batch, CachedTargets
from kdcache.system.progress import Progress
from kdcache.teachers.forward import Forward
from kdcache.teachers.shards import write_shards
from kdcache.training.config import TrainConfig
from kdcache.training.devices import seeded
from kdcache.training.learner import Learner
from kdcache.training.metrics import agreement, divergence
from kdcache.views.policy import ViewPolicy

__all__ = ["rival"]

CLASSES, TAU = 10, 4.0
TAUS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 20.0, 40.0)


@dataclass(frozen=True)
class _Setting:
    teacher: str
    student: str
    size: int  # side of a view in pixels
    canvas: int
    batch: int
    batches: int  # batches per epoch
    cached: float  # bounds on the ratio to an online epoch: of an epoch from the cache, and of one of nine packed students
    packed: float | None
    amp: bool = False

    def label(self, device: torch.device) -> str:
        return f"{self.teacher} to {self.student}/{self.size} {'gpu' if device.type == 'cuda' else 'cpu'}"


ON_CPU = (
    _Setting("resnet34", "resnet18", 64, 72, batch=32, batches=4, cached=0.75, packed=None),
    _Setting("resnet18", "test_vit", 32, 32, batch=64, batches=4, cached=0.6, packed=0.5),
)
ON_GPU = (_Setting("vit_small_patch16_224", "resnet18", 224, 336, batch=256, batches=8, cached=0.75, packed=0.75, amp=True),)


def rival(seconds: float, folder: Path, progress: Progress) -> list[Result]:
    """Measure student epochs from a cache against timm's online distillation, and the break-even point of the dump."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = ON_GPU if device.type == "cuda" else ON_CPU
    return [
        result
        for number, setting in enumerate(settings)
        for result in _measure(setting, device, seconds / len(settings), folder / str(number), progress)
    ]


def _measure(setting: _Setting, device: torch.device, seconds: float, folder: Path, progress: Progress) -> list[Result]:
    samples, label = setting.batch * setting.batches, setting.label(device)
    canvas = digits_canvas(folder, setting.canvas, samples, progress)
    policy = ViewPolicy.load("imagenet", size=setting.size)
    with seeded(0):
        teacher, normalise = create_model(setting.teacher, CLASSES, input_size=setting.size)
    teacher = teacher.eval().to(device)
    forward = Forward(teacher, normalise, device, "fp16" if device.type == "cuda" else "fp32")
    dumps = iter(range(1 << 30))

    def dump() -> Archive:
        writer = open_writer(folder / f"archive-{next(dumps)}", canvas, policy, views=1)
        write_shards(writer, forward, canvas, batch_size=setting.batch)
        return writer.finalize()

    stream = CachedTargets(dump(), canvas, setting.batch, seed=0, device=str(device))
    config = TrainConfig(epochs=10**6, batch_size=setting.batch, amp=setting.amp)
    count = len(TAUS) if setting.packed else 1
    learners = [_learner(folder / f"run-{number}", setting, config, len(stream), device) for number in range(count)]
    online = _online(setting, teacher, canvas, config, device)
    views = torch.zeros(setting.batch, 3, setting.size, setting.size, dtype=torch.uint8, device=device)

    def finished(work: Callable[[], object]) -> Callable[[], None]:
        def turn() -> None:
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return turn

    def cached() -> None:
        for batch in stream:
            _step(learners[0], batch, TAU)

    def packed() -> None:
        for batch in stream:
            for learner, tau in zip(learners, TAUS, strict=True):
                _step(learner, batch, tau)

    def teaching() -> None:  # the teacher's part of the online side alone
        normal = normalise(views)
        with torch.inference_mode(), _autocast(setting, device):
            for _ in range(setting.batches):
                teacher(normal)

    sides = [online, cached, dump, teaching, *([packed] if setting.packed else [])]
    theirs, ours, dumping, alone, *others = taking_turns(f"bench rival {label}", seconds, progress, *map(finished, sides))
    speeds = {"timm online": theirs, "from the cache": ours} | {
        f"each of {count} packed": together / count for together in others
    }
    progress.say(
        f"{label}: images/s: {', '.join(f'{name} {samples / taken:.0f}' for name, taken in speeds.items())}; "
        f"the teacher is {alone / theirs:.0%} of a step online; the dump costs {dumping / samples * 1e3:.2f} ms a view"
    )
    saved = theirs - ours
    results = [
        Result(f"student epoch {label}", "from the cache", "timm online", ours / theirs, setting.cached),
        # Student epochs after which the dump of one view per sample pays off; all of them may show that view.
        Result(
            f"break-even {label}", "dump of a view", "saved in a student epoch", dumping / saved if saved > 0 else np.inf, 2.0
        ),
    ]
    if setting.packed:
        value = others[0] / count / theirs
        results.append(Result(f"student epoch {label}", f"one of {count} on a stream", "timm online", value, setting.packed))
    return results


def _learner(folder: Path, setting: _Setting, config: TrainConfig, steps: int, device: torch.device) -> Learner:
    with seeded(0):
        model, normalise = create_model(setting.student, CLASSES, input_size=setting.size)
    return Learner(folder, model, normalise, config, steps_per_epoch=steps, seed=0, device=device)


def _step(learner: Learner, batch: Batch, tau: float) -> None:
    """One student step on a batch, as in distill."""
    targets, method = batch.targets(tau), build("kd")
    assert batch.logits is not None
    teacher = batch.logits
    learner.step(
        batch.images,
        lambda logits: method(logits, targets),
        lambda logits: {"agreement": agreement(logits, teacher), "divergence": divergence(logits, teacher, tau)},
    )


def _autocast(setting: _Setting, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=setting.amp)


# ---------------------------------------------------------------- timm


class _Pictures:
    """Decoded images in memory, as a dataset for timm's loaders."""

    def __init__(self, canvas: Canvas) -> None:
        pixels = np.ascontiguousarray(canvas.pixels.transpose(0, 2, 3, 1))
        self._items = [(Image.fromarray(image), int(label)) for image, label in zip(pixels, canvas.labels, strict=True)]
        self.transform: Callable[[Image.Image], Any] | None = None  # timm's loader sets it

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        image, label = self._items[number]
        assert self.transform is not None
        return self.transform(image), label


def _online(
    setting: _Setting, teacher: nn.Module, canvas: Canvas, config: TrainConfig, device: torch.device
) -> Callable[[], None]:
    """A function for one epoch of timm's train.py with `--kd-model-name`, `--aa rand-m14-n2 --mixup 1 --cutmix 1`, AdamW."""
    import timm.data
    import timm.loss
    import timm.optim

    data, losses, optimizers = (cast(Any, part) for part in (timm.data, timm.loss, timm.optim))
    with seeded(0):
        student, normalise = create_model(setting.student, CLASSES, input_size=setting.size)
    student = student.to(device).train()
    optimizer = optimizers.create_optimizer_v2(student, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay)
    on_gpu = device.type == "cuda"
    mixing = {"mixup_alpha": 1.0, "cutmix_alpha": 1.0, "label_smoothing": 0.0, "num_classes": CLASSES}
    mixup = None if on_gpu else data.Mixup(**mixing)
    workers = os.cpu_count() or 1 if on_gpu else 0  # as on kdcache's side, which renders in this process on the CPU
    loader = data.create_loader(
        _Pictures(canvas),
        (3, setting.size, setting.size),
        setting.batch,
        is_training=True,
        auto_augment="rand-m14-n2",
        interpolation="bilinear",
        mean=normalise.mean,
        std=normalise.std,
        num_workers=workers,
        collate_fn=data.FastCollateMixup(**mixing) if on_gpu else None,  # timm's prefetcher normalises on the GPU
        use_prefetcher=on_gpu,
        pin_memory=on_gpu,
        device=device,
        persistent_workers=workers > 0,
    )
    task = _task(student, teacher, losses.SoftTargetCrossEntropy(), device)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in loader:
            yield mixup(images, labels) if mixup is not None else (images, labels)

    def epoch() -> None:
        for images, labels in batches():
            with _autocast(setting, device):
                loss = task(images, labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def _task(
    student: nn.Module, teacher: nn.Module, criterion: nn.Module, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """timm's own distillation task; for versions without one, the code of their train script."""
    try:
        from timm.task import LogitDistillationTask
    except ImportError:

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            logits = student(images)
            with torch.no_grad():
                wanted = teacher(images)
            soft = F.log_softmax(logits / TAU, dim=-1), F.log_softmax(wanted / TAU, dim=-1)
            divergence = F.kl_div(*soft, reduction="batchmean", log_target=True) * TAU**2
            return criterion(logits, labels) + divergence  # type: ignore[no-any-return]

        return loss
    task = LogitDistillationTask(student, teacher, criterion=criterion, temperature=TAU, device=device, verbose=False)
    return lambda images, labels: task(images, labels)["loss"]
