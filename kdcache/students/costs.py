"""plan: what a dump and a grid of students will cost, measured on a few batches, beside online distillation of the same grid.

Nothing is fetched, trained or kept. Pixels are random, and so are the weights: neither changes how long anything takes.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.archive import stored_bytes
from kdcache.datasets import Counts, Source
from kdcache.datasets.canvas import canvas_path
from kdcache.errors import NotFoundError
from kdcache.methods import build
from kdcache.models.creation import create_model
from kdcache.models.names import resolve
from kdcache.replay.chunks import rendering_memory, seconds_on_gpu
from kdcache.replay.prefetch import choose_renderer
from kdcache.replay.subject import Subject
from kdcache.students.config import PlanConfig
from kdcache.students.grid import StudentSpec, doubts, plan_ahead
from kdcache.system.progress import Progress, Silent
from kdcache.system.room import free_bytes
from kdcache.targets import Targets
from kdcache.teachers.config import DumpRecipe, usual_dump
from kdcache.teachers.forward import Forward, suited_memory_format
from kdcache.training.config import TrainConfig
from kdcache.training.devices import resolve_device, seeded
from kdcache.training.learner import Learner
from kdcache.training.memory import Footprint, fitting, footprint, groups_that_fit, room
from kdcache.views.policy import ViewPolicy
from kdcache.views.probe import digests
from kdcache.views.rendering import render_positions
from kdcache.workspace import Workspace, parse_dataset

__all__ = ["Costs", "Storage", "StudentCost", "Times", "plan_costs"]

PROBE_BATCH = 4  # images, of a first batch that tells how many more can be tried
PATIENCE = 2.5  # seconds that a measured batch may take, on the CPU
TURNS = 5
MOST_STUDENTS = 100_000  # beyond which a break-even point is none


@dataclass(frozen=True)
class Storage:
    """Bytes on disk: what there will be, and of it what is not there yet."""

    archive: int
    canvases: int  # of both splits, those not built yet
    runs: int  # weights of all students, the last and the best
    free: int

    @property
    def needed(self) -> int:
        return self.archive + self.canvases + self.runs


@dataclass(frozen=True)
class StudentCost:
    """One kind of student: what tells its speed and memory apart from others'."""

    name: str
    students: int
    views: int  # of each sample in a step
    step: float  # seconds a view
    test: float  # seconds a test image
    memory: Footprint


@dataclass(frozen=True)
class Times:
    """Hours of the whole plan."""

    dump: float
    distill: float  # students that fit into memory together share a stream
    online: float  # every student by itself: rendering and the teacher in every step

    @property
    def saving(self) -> float:
        return self.online - self.dump - self.distill


@dataclass(frozen=True)
class Costs:
    """What a dump and a grid cost. Speeds are seconds for one view of one sample."""

    device: str
    samples: int
    tested: int  # test images
    classes: int
    views: int
    epochs: int
    storage: Storage
    render: float
    teacher: float
    students: tuple[StudentCost, ...]
    groups: tuple[int, ...]  # students that train at once
    memory_free: int
    hours: Times
    break_even_epochs: int  # student epochs after which dumping was cheaper than the teacher in every step
    break_even_students: int | None  # likewise whole students, packed as they fit; None: never

    @property
    def further(self) -> float:
        """What another student on the same stream costs, relative to the first one: it renders nothing."""
        first = self.students[0]
        return first.step / (first.step + self.render)


def plan_costs(config: PlanConfig, workspace: Workspace, progress: Progress | None = None) -> Costs:
    """Measure what a dump and then its students would cost on this machine.

    NotFoundError for a dataset that is not there, unless its source knows how many images and classes it has, or they are given.
    """
    progress, recipe = progress or Silent(), config.recipe
    device = resolve_device(config.drawing.device)
    source = parse_dataset(config.subject.dataset, progress)
    exact = resolve(config.subject.teacher, "teacher")
    policy = ViewPolicy.load(recipe.shown.policy or source.recipe.policy, size=recipe.shown.size, seed=recipe.view_seed)
    canvas, views = recipe.shown.canvas or source.recipe.canvas, recipe.views or source.recipe.student_epochs
    counts = _counts(source, config, workspace)
    specs = _students(config, counts, views, policy, workspace)
    epochs = specs[0].settings.epochs
    for doubt in doubts(specs, config.grid, policy.size):
        progress.say(doubt)

    kinds = list(dict.fromkeys(map(_kind, specs)))
    done, total = 0, 2 + 2 * len(kinds)

    def measured(seconds: float) -> float:
        nonlocal done
        done += 1
        progress.update("plan: measuring", done, total)
        return seconds

    render = measured(_rendering(policy, canvas, config, device))
    teacher = measured(_teacher(exact, counts.classes, policy.size, recipe, device))
    costs: dict[tuple[Any, ...], StudentCost] = {}
    for kind in kinds:
        same = [spec.settings for spec in specs if _kind(spec) == kind]
        name, seen, size, *_ = kind
        size = size or policy.size
        memory = footprint(name, counts.classes, size, same[0], views=seen, device=device)
        done += 1
        step, test = _learning(name, counts.classes, size, same[0], seen, device)
        costs[kind] = StudentCost(name, len(same), seen, measured(step), test, memory)

    free = room(device, config.room.memory, rendering_memory(counts.train, canvas, policy.size, device))
    groups = [group for stream in _streams(specs) for group in _packed([costs[_kind(each)] for each in stream], free)]
    shown, tests = epochs * counts.train, -(-epochs // config.grid.training.val_interval) * counts.test
    alone = [shown * one.views * (render + teacher + one.step) + tests * one.test for one in _each(groups)]
    together = [
        shown * max(one.views for one in group) * render + sum(shown * one.views * one.step + tests * one.test for one in group)
        for group in groups
    ]
    dumping = views * counts.train * (render + teacher)
    first = costs[kinds[0]]
    return Costs(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        samples=counts.train,
        tested=counts.test,
        classes=counts.classes,
        views=views,
        epochs=epochs,
        storage=_storage(source, recipe, counts, canvas, views, [costs[_kind(each)].memory for each in specs], workspace),
        render=render,
        teacher=teacher,
        students=tuple(costs.values()),
        groups=tuple(len(group) for group in groups),
        memory_free=free,
        hours=Times(dumping / 3600, sum(together) / 3600, sum(alone) / 3600),
        break_even_epochs=math.ceil(dumping / (counts.train * teacher)),
        break_even_students=_break_even(
            dumping,
            packed=max(1, fitting([first.memory] * 1000, free)),
            rendering=shown * first.views * render,
            teaching=shown * first.views * teacher,
        ),
    )


def _break_even(dumping: float, *, packed: int, rendering: float, teaching: float) -> int | None:
    """The fewest students of a grid that is cheaper with the dump: each saves the teacher, and its rendering if it is shared."""
    for students in range(1, MOST_STUDENTS):
        streams = -(-students // packed)
        if dumping + streams * rendering <= students * (rendering + teaching):
            return students
    return None


def _counts(source: Source, config: PlanConfig, workspace: Workspace) -> Counts:
    samples, classes, dataset = config.samples, config.classes, config.subject.dataset
    known: Counts | None = getattr(source, "counts", None)
    if samples is None or classes is None:
        try:
            images = source.open(workspace.data, fetch=False)
            train, test = (len(images.samples(split)) for split in ("train", "test"))
            known = Counts(train, test, len(images.class_names()))
        except NotFoundError as error:
            if known is None:
                raise NotFoundError(
                    f"how many images {dataset} has is not known",
                    why=f"it is not there: {error.what}",
                    fix=f"give --samples and --classes; or {error.fix}",
                ) from None
    known = known or Counts(0, 0, 0)
    return replace(known, train=samples or known.train, classes=classes or known.classes)


def _students(config: PlanConfig, counts: Counts, views: int, policy: ViewPolicy, workspace: Workspace) -> list[StudentSpec]:
    """Every student, by the rules of distill, of an archive that is not there yet."""
    subject, dataset = config.subject, config.subject.dataset
    place = f"{subject.teacher} on {dataset}" + (f", policy {shown}" if (shown := config.recipe.shown.policy) else "")
    classes = tuple(map(str, range(counts.classes)))
    archive = Subject("plan", "plan", place, range(views), counts.train, classes, policy, dataset)
    return [spec for spec, _ in plan_ahead(config.grid, archive, workspace)]


def _kind(spec: StudentSpec) -> tuple[Any, ...]:
    """What students have in common that are equally fast and large."""
    training = spec.settings
    return (
        spec.name,
        spec.method.views_per_step,
        spec.size,
        training.batch_size,
        training.opt,
        training.momentum > 0,
        training.amp,
        training.model_ema_decay is not None,
        training.layer_decay is not None,
        training.drop_path,
        training.opt_betas,
    )


def _streams(specs: Sequence[StudentSpec]) -> Iterator[list[StudentSpec]]:
    """Students that can share a stream."""
    for _, group in groupby(sorted(specs, key=lambda spec: spec.order_seed), key=lambda spec: spec.order_seed):
        yield list(group)


def _packed(students: Sequence[StudentCost], free: int) -> Iterator[Sequence[StudentCost]]:
    """Students of one stream, in groups that fit into memory at once."""
    for part in groups_that_fit([student.memory for student in students], free):
        yield students[part]


def _each(groups: Sequence[Sequence[StudentCost]]) -> Iterator[StudentCost]:
    for group in groups:
        yield from group


def _storage(
    source: Source,
    recipe: DumpRecipe,
    counts: Counts,
    canvas: int,
    views: int,
    students: Sequence[Footprint],
    workspace: Workspace,
) -> Storage:
    rows = recipe.rows(views, counts.train, list(map(str, range(counts.classes))))
    canvases = 0
    for split, count in (("train", counts.train), ("test", counts.test)):
        try:
            there = canvas_path(source, split, canvas, workspace.data).is_dir()  # type: ignore[arg-type]
        except NotFoundError:
            there = False
        canvases += 0 if there else count * 3 * canvas**2
    runs = sum(2 * memory.weights + memory.average for memory in students)
    return Storage(stored_bytes(rows), canvases, runs, free_bytes(workspace.archives))


# ---------------------------------------------------------------- measuring


def _per_image(work: Callable[[int], object], batch_size: int, device: torch.device) -> float:
    """Seconds an image of `work(count)`: on a GPU in whole batches, on the CPU in batches that do not take long."""

    def seconds(count: int) -> float:
        started = time.perf_counter()
        work(count)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    tried = min(PROBE_BATCH, batch_size)
    quick = min(seconds(tried) for _ in range(2))  # the first turn compiles and allocates
    if device.type == "cuda":
        count = batch_size
        seconds(count)
    else:
        count = min(batch_size, max(tried, int(PATIENCE / quick * tried)))
    begin, taken = time.perf_counter(), [seconds(count)]
    while len(taken) < TURNS and time.perf_counter() - begin < 2 * PATIENCE:
        taken.append(seconds(count))
    return min(taken) / count  # what else this machine does now is no part of the work


def _rendering(policy: ViewPolicy, canvas: int, config: PlanConfig, device: torch.device) -> float:
    where = device if device.type == "cuda" else torch.device("cpu")
    batch = max(2, config.recipe.batch_size or usual_dump(device.type).batch_size)
    renderer = choose_renderer(config.drawing.renderer, policy, canvas, batch, where)
    if where.type == "cuda" and renderer == "device":
        return seconds_on_gpu(policy, canvas, where)
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, canvas, canvas), dtype=np.uint8)
    table = policy.parameters(0, batch, np.ones((batch, 2), int))
    return _per_image(lambda count: digests(render_positions(pixels, table, np.arange(count), renderer, where)), batch, where)


def _views(count: int, size: int, device: torch.device) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=device)


def _teacher(name: str, classes: int, size: int, recipe: DumpRecipe, device: torch.device) -> float:
    usual = usual_dump(device.type)
    batch_size, precision = recipe.batch_size or usual.batch_size, recipe.precision or usual.precision
    with seeded(0):
        model, normalise = create_model(name, classes, input_size=size)
        views = _views(batch_size, size, device)
    model = model.eval().to(device)
    forward = Forward(model, normalise, device, precision, suited_memory_format(model, size, device, precision))
    return _per_image(lambda count: forward(views[:count]), batch_size, device)


def _learning(name: str, classes: int, size: int, config: TrainConfig, seen: int, device: torch.device) -> tuple[float, float]:
    """Seconds of a training step for each view, and of a test image; the loss is kd's, which others take as long as."""
    with seeded(0):
        model, normalise = create_model(name, classes, input_size=size, drop_path=config.drop_path)
        views = _views(config.batch_size, size, device)
        teacher = torch.randn(config.batch_size, classes).mul(3).to(device)
    method = build("kd")
    with tempfile.TemporaryDirectory(prefix="kdcache-plan-") as folder:
        learner = Learner(Path(folder), model, normalise, config, steps_per_epoch=10**6, seed=0, device=device)

        def step(count: int) -> None:
            targets = Targets(teacher[:count], 4.0)
            learner.step(
                [views[:count]] * seen,
                lambda logits: torch.stack([method(part, targets) for part in torch.split(logits, count)]).sum(),
                lambda logits: {},
            )

        # Batch normalisation has nothing to normalise with one.
        taken = _per_image(lambda count: step(max(2, count)), config.batch_size, device) / seen
        tested = _per_image(lambda count: learner.predict(views[:count]), config.batch_size, device)
        learner.status = "complete"  # there is nothing to keep of it
        learner.suspend()
    return taken, tested
