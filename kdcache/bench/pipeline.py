"""Benchmarks of the pipeline from images to students: start-up, rendering, dump, distillation."""

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kdcache.archive import Archive, ArchiveWriter, CanvasCard, write_archive
from kdcache.bench.turns import Result, taking_turns
from kdcache.datasets import DATASETS
from kdcache.datasets.canvas import Canvas
from kdcache.methods import build
from kdcache.models.creation import create_model
from kdcache.replay.prefetch import choose_renderer
from kdcache.replay.stream import Batch, CachedTargets
from kdcache.system.progress import Progress
from kdcache.targets import Targets
from kdcache.teachers.forward import Forward
from kdcache.teachers.shards import write_shards
from kdcache.training.config import TrainConfig
from kdcache.training.devices import seeded
from kdcache.training.learner import Learner
from kdcache.training.metrics import agreement, divergence
from kdcache.views.policy import InceptionCrop, Mix, PadCrop, RandAugment, ViewPolicy, ViewTable
from kdcache.views.probe import digests
from kdcache.views.rendering import render_positions
from kdcache.workspace import Workspace

__all__ = ["digits_canvas", "distill", "dump", "open_writer", "startup", "views"]

BATCH = 64


def startup(seconds: float, folder: Path, progress: Progress) -> list[Result]:
    write_archive(folder / "archive", np.zeros((1, 8, 4), np.float32), list("abcd"))
    help_cpu, info_wall = [], []
    for turn in range(5):
        help_cpu.append(_run("--help")[0])
        info_wall.append(_run("info", str(folder / "archive"))[1])
        progress.update("bench startup", turn + 1, 5)
    return [
        Result("--help", "CPU seconds", "-", float(np.median(help_cpu)), 0.5),
        Result("info", "wall seconds", "-", float(np.median(info_wall)), 1.0),
    ]


def _run(*arguments: str) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of one command in its own process."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "kdcache", *arguments], check=True, stdout=subprocess.DEVNULL)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def _canvas(folder: Path, size: int, progress: Progress) -> Canvas:
    return Workspace(folder).canvas(DATASETS.build("digits"), "test", size, progress)


def digits_canvas(folder: Path, size: int, samples: int, progress: Progress) -> Canvas:
    """The digits' canvas, repeated up to `samples` samples."""
    canvas = _canvas(folder, size, progress)
    chosen = np.arange(samples) % len(canvas)
    return replace(
        canvas,
        pixels=np.ascontiguousarray(canvas.pixels[chosen]),
        labels=canvas.labels[chosen],
        sizes=canvas.sizes[chosen],
        keys=tuple(f"{canvas.keys[sample]}/{number}" for number, sample in enumerate(chosen)),
        card=canvas.card.model_copy(update={"num_samples": samples}),
    )


def views(seconds: float, folder: Path, progress: Progress) -> list[Result]:
    """Measure rendering on one thread against torchvision on PIL images, and version 2 of policies against version 1; the
    table of draws, and the probe.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = _views_cpu(seconds / 4, 224, 336, 64, 1 / 1.2, folder, progress)
        results += _views_cpu(seconds / 4, 32, 32, 256, 1 / 5, folder, progress)
        results += _versions(seconds / 2, folder, progress)
    finally:
        torch.set_num_threads(threads)
    return results


def _versions(seconds: float, folder: Path, progress: Progress) -> list[Result]:
    """Views and tables of draws of photographs of many shapes, in version 2 of policies against version 1."""
    canvas, many = _canvas(folder, 336, progress), 1_280_000
    policies = [ViewPolicy.load(f"pets:version={version}") for version in (2, 1)]
    positions = np.arange(64)
    tables = [policy.parameters(0, len(canvas), _shapes(len(canvas))) for policy in policies]
    renderer = choose_renderer("auto", policies[0], canvas.size, len(positions), torch.device("cpu"))

    def views_of(table: ViewTable) -> Callable[[], object]:
        return lambda: render_positions(canvas.pixels, table, positions, renderer)

    new, old = taking_turns("bench views: versions", seconds / 2, progress, *map(views_of, tables))
    sizes = _shapes(many)
    draws = [lambda policy=policy: policy.parameters(0, many, sizes) for policy in policies]
    table, before = taking_turns("bench views: table", seconds / 2, progress, *draws)
    progress.say(f"table of {many:,} samples: version 2 {table:.2f} s, version 1 {before:.2f} s")
    return [
        Result("photographs 336 to 224 px, one thread", "version 2", "version 1", new / old, 1.02),
        Result("table of 1.28 million samples", "wall seconds", "-", table, 3.0),
    ]


def _shapes(count: int) -> NDArray[np.int64]:
    """Sizes of photographs, in shares as phones and cameras take them."""
    return np.array([(3024, 4032), (4032, 3024), (500, 375), (1920, 1080), (1000, 1000)])[np.arange(count) % 5]


def _views_cpu(
    seconds: float, size: int, canvas_size: int, batch: int, bound: float, folder: Path, progress: Progress
) -> list[Result]:
    from torchvision.transforms import v2

    canvas = _canvas(folder, canvas_size, progress)
    policy = ViewPolicy(size=size, crop=InceptionCrop() if size == 224 else PadCrop(), randaugment=RandAugment())
    table, positions = policy.parameters(0, len(canvas), canvas.sizes), np.arange(batch)
    cpu = torch.device("cpu")
    renderer = choose_renderer("auto", policy, canvas.size, batch, cpu)
    samples = [canvas.pixels[sample].transpose(1, 2, 0) for sample in table.sample[positions]]
    pictures = [Image.fromarray(np.ascontiguousarray(pixels)) for pixels in samples]
    crop = v2.RandomResizedCrop(size) if size == 224 else v2.RandomCrop(size, padding=4)
    pipeline = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.RandAugment(2, 14), v2.PILToTensor()])

    def theirs() -> None:
        torch.stack([pipeline(picture) for picture in pictures])

    def ours() -> Tensor:
        return render_positions(canvas.pixels, table, positions, renderer)

    mixed = policy.model_copy(update={"mix": Mix()}).parameters(0, len(canvas), canvas.sizes)  # MixUp and CutMix, as in training

    latest: list[Tensor] = []

    def whole() -> None:
        latest[:] = [render_positions(canvas.pixels, mixed, positions, renderer)]

    sides = ours, theirs, whole, lambda: digests(latest[0])
    rendering, peer, with_mixing, probing = taking_turns(f"bench views {size} px", seconds, progress, *sides)
    progress.say(f"{size} px: {renderer} renderer {batch / rendering:.0f} views/s, torchvision {batch / peer:.0f} views/s")
    return [
        Result(f"views {canvas_size} to {size} px, one thread", renderer, "torchvision v2 on PIL", rendering / peer, bound),
        Result(f"probe {size} px", "digests", "rendering, with mixing", probing / with_mixing, 0.02),
    ]


def open_writer(path: Path, canvas: Canvas, policy: ViewPolicy, views: int) -> ArchiveWriter:
    return ArchiveWriter(
        path,
        num_views=views,
        num_samples=len(canvas),
        class_names=canvas.card.class_names,
        labels=canvas.labels,
        keys=canvas.keys,
        policy=policy,
        source=canvas.card,
        canvas=CanvasCard.of(canvas, policy),
    )


def dump(seconds: float, folder: Path, progress: Progress) -> list[Result]:
    """Measure a dump (resnet18, 224 px, CPU): rendering, forward, fingerprint, writing, against the forward passes alone."""
    canvas, policy = _canvas(folder, 256, progress), ViewPolicy.load("imagenet")
    with seeded(0):
        model, normalise = create_model("resnet18", 10, input_size=224)
    forward = Forward(model.eval(), normalise, torch.device("cpu"), "fp32")
    shapes = [min(BATCH, len(canvas) - start) for start in range(0, len(canvas), BATCH)]
    batches = [torch.randint(0, 256, (n, 3, 224, 224), dtype=torch.uint8) for n in shapes]
    count = iter(range(1 << 30))

    def bare() -> None:
        with torch.inference_mode():
            for views in batches:
                model(normalise(views))

    def dump() -> None:
        writer = open_writer(folder / f"archive-{next(count)}", canvas, policy, views=1)
        write_shards(writer, forward, canvas, batch_size=BATCH)
        writer.finalize()

    ours, theirs = taking_turns("bench dump", seconds, progress, dump, bare)
    return [Result("dump resnet18/224 cpu", "dump of one view", "bare forward", ours / theirs, 1.25)]


def distill(seconds: float, folder: Path, progress: Progress) -> list[Result]:
    """Measure a student's step with its whole pipeline, the step alone, and nine students on one stream."""
    results = _stream_step(seconds / 3, folder / "stream", progress)
    results += _bare_step(seconds / 3, folder / "step", progress)
    results += _packed(seconds / 3, folder / "packed", progress)
    return results


def _stream_step(seconds: float, folder: Path, progress: Progress) -> list[Result]:
    """Measure the pipeline (resnet18, 64 px, CPU): reading to training, against training on one fixed batch."""
    canvas, policy = _canvas(folder, 72, progress), ViewPolicy.load("imagenet", size=64)
    with seeded(0):
        models = [create_model("resnet18", 10, input_size=64) for _ in range(2)]
    stream = CachedTargets(_archive(folder / "archive", canvas, policy), canvas, BATCH, seed=0)
    method = build("kd")
    config = TrainConfig(epochs=10**6, batch_size=BATCH, clip_grad=None)
    (model, normalise), (other, _) = models
    learner = Learner(folder / "run", model, normalise, config, steps_per_epoch=len(stream), seed=0, device=torch.device("cpu"))
    bare_learner = Learner(
        folder / "bare", other, normalise, config, steps_per_epoch=len(stream), seed=0, device=torch.device("cpu")
    )
    fixed = next(iter(stream))
    assert fixed.logits is not None
    fixed_targets = Targets(fixed.logits, 4.0)

    def step(batch: Batch) -> None:
        assert batch.logits is not None
        targets, teacher = Targets(batch.logits, 4.0), batch.logits
        learner.step(batch.images, lambda z: method(z, targets), lambda z: {"agreement": agreement(z, teacher)})

    def distill() -> None:
        for batch in stream:
            step(batch)

    def bare() -> None:
        for _ in range(len(stream)):
            loss = method(other(normalise(fixed.images)), fixed_targets)
            bare_learner.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            bare_learner.optimizer.step()

    ours, theirs = taking_turns("bench distill", seconds, progress, distill, bare)
    return [Result("distill resnet18/64 cpu", "step of the stream", "bare step, fixed batch", ours / theirs, 1.15)]


class _Random(Forward):
    """A teacher with no cost."""

    def launch(self, views: Tensor) -> Tensor:
        rng = np.random.default_rng(len(views))
        return torch.from_numpy(rng.normal(0, 3, (len(views), 10)).astype(np.float32))


def _archive(path: Path, canvas: Canvas, policy: ViewPolicy) -> Archive:
    """An archive of two views of a canvas, with random logits."""
    writer = open_writer(path, canvas, policy, views=2)
    model, normalise = create_model("test_vit", 10, input_size=32)
    write_shards(writer, _Random(model, normalise, torch.device("cpu"), "fp32"), canvas, batch_size=BATCH)
    return writer.finalize()


def _distill_step(learner: Learner, batch: Batch, tau: float) -> None:
    """One student step on a batch, as in distill."""
    assert batch.logits is not None
    targets, teacher, method = Targets(batch.logits, tau), batch.logits, build("kd")
    learner.step(
        batch.images,
        lambda z: method(z, targets),
        lambda z: {"agreement": agreement(z, teacher), "divergence": divergence(z, teacher, tau)},
    )


def _bare_step(seconds: float, folder: Path, progress: Progress) -> list[Result]:
    """Measure a learner's step (resnet18, 224 px, CPU) on given views and logits, against plain PyTorch."""
    batch = 16
    with seeded(0):
        (model, normalise), (other, _) = (create_model("resnet18", 10, input_size=224) for _ in range(2))
        views, logits = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8), torch.randn(batch, 10).mul(3)
    config = TrainConfig(epochs=10**6, batch_size=batch)
    learner, bare_learner = (
        Learner(folder / name, module, normalise, config, steps_per_epoch=100, seed=0, device=torch.device("cpu"))
        for name, module in (("run", model), ("bare", other))
    )
    method, targets = build("kd"), Targets(logits, 4.0)
    label = torch.zeros(batch, dtype=torch.int64)
    shown = Batch(views, label, label, label, label.float(), 0, np.arange(batch), logits)

    def ours() -> None:
        _distill_step(learner, shown, 4.0)

    def bare() -> None:
        loss = method(other(normalise(views)), targets)
        bare_learner.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        bare_learner.optimizer.step()

    taken, least = taking_turns("bench distill: step", seconds, progress, ours, bare)
    return [
        Result("step resnet18/224 cpu", "clipping, figures, own random numbers", "bare step, same batch", taken / least, 1.05)
    ]


def _packed(seconds: float, folder: Path, progress: Progress) -> list[Result]:
    """Measure nine temperatures on one stream against nine streams, with rendering as slow as a student."""
    name, device = "test_vit", torch.device("cpu")
    canvas, policy = digits_canvas(folder, 336, 2 * BATCH, progress), ViewPolicy.load("imagenet", size=32)
    stream = CachedTargets(_archive(folder / "archive", canvas, policy), canvas, BATCH, seed=0)
    taus = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 20.0, 40.0)
    learners = []
    for tau in taus:
        with seeded(0):
            model, normalise = create_model(name, 10, input_size=32)
        config = TrainConfig(epochs=10**6, batch_size=BATCH)
        made = Learner(folder / f"{tau:g}", model, normalise, config, steps_per_epoch=len(stream), seed=0, device=device)
        learners.append(made)

    def together() -> None:
        for batch in stream:
            for learner, tau in zip(learners, taus, strict=True):
                _distill_step(learner, batch, tau)

    def apart() -> None:
        for learner, tau in zip(learners, taus, strict=True):
            for batch in stream:
                _distill_step(learner, batch, tau)

    packed, separate = taking_turns("bench distill: nine students", seconds, progress, together, apart)
    return [Result(f"nine students {name}/32 cpu", "one stream", "a stream for each", packed / separate, 0.5)]
