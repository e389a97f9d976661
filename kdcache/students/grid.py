"""The grid of students: every combination of student, method, control, temperature and seed, and whether it makes sense."""

import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kdcache.archive import Ensemble
from kdcache.datasets import DATASETS, Source
from kdcache.errors import NotFoundError, UsageError, unknown_name
from kdcache.methods import METHODS, Method
from kdcache.methods.presets import preset
from kdcache.methods.tempered import LARGEST_TAU, SMALLEST_TAU
from kdcache.models.names import folder_name, is_factory, own_size, public_name, resolve, split_weights, weights_identity
from kdcache.replay.subject import Subject, require_batch_size, require_second
from kdcache.students.config import DistillConfig, Grid
from kdcache.system.files import lacking
from kdcache.system.progress import Progress, Silent
from kdcache.targets import CONTROLS, Control
from kdcache.training.config import HowTested, StudentTraining, TrainConfig
from kdcache.training.optimizers import require_optimizer
from kdcache.workspace import Workspace, dataset_label, parse_dataset, unknown_source

__all__ = ["StudentSpec", "doubts", "open_archives", "plan_ahead", "plan_students"]

STARTS = ("random", "pretrained", "target", "finetuned")
OPTIMIZER_SETTINGS = ("lr", "weight_decay", "momentum")
WHOLE_IMAGES = HowTested(test_policy="none")
MOST_SHRINKING = 31  # a bicubic line of a student's view takes 4 * 31 + 1 lines of the teacher's; see views.resample
SMALLEST_SIZE, LARGEST_SIZE = 8, 4096  # of a view, pixels
LONGEST_LABEL = 150  # characters, of what a run's folder says before its digest


@dataclass(frozen=True)
class Start:
    """What a student starts from: random weights, timm's `pretrained` ones, or those of a `file` of this sha256.

    Either may be of other classes: then its classifier is a new one.
    """

    name: str = "random"  # as typed
    pretrained: bool = False
    file: Path | None = None
    sha256: str = ""
    new_head: bool = False
    top1: float | None = None  # of it itself, in percent on the test images, where that is known

    @property
    def label(self) -> str:
        """For folders: its name, or the beginning of the digest of weights that have none."""
        return self.name if self.name in STARTS else self.sha256[:6]


@dataclass(frozen=True)
class StudentSpec:
    """One student of the grid."""

    student: str  # as typed
    name: str  # exact, of a local folder with its place
    method: Method
    control: Control
    tau: float
    seed: int  # of its initial weights and its random numbers
    order_seed: int  # of its batches; students of one order seed share a stream
    settings: TrainConfig
    folder: Path
    start: Start = Start()
    tested: HowTested = WHOLE_IMAGES
    size: int | None = None  # of the views that it sees; None: the teacher's

    @property
    def title(self) -> str:
        start = "" if self.start.name == "random" else f" from {self.start.name}"
        targets = f"{METHODS.spec(self.method)} tau {self.tau_text} {CONTROLS.spec(self.control)}"
        size = f" {self.size} px" if self.size else ""
        optimised = f" {self.optimizer_text}" if self.optimizer_text else ""
        return f"{self.student}{size}{start} {targets}{optimised} seed {self.seed}"

    @property
    def optimizer_text(self) -> str:
        """The optimiser with its learning rate; nothing for the one that is used unless another is asked for."""
        settings, usual = self.settings, TrainConfig(epochs=1)
        return "" if (settings.opt, settings.lr) == (usual.opt, usual.lr) else f"{settings.opt} lr {settings.lr:g}"

    @property
    def tau_text(self) -> str:
        if self.method.uses_tau:
            return f"{self.tau:g}"
        return "own" if self.method.uses_teacher else "none"


def open_archives(config: DistillConfig, workspace: Workspace, progress: Progress) -> tuple[Ensemble, Ensemble]:
    """The archives that students are trained from, and those that second views come from: the same, unless another is named."""
    archive = workspace.open_ensemble(config.archive, config.average, progress, strict=config.strict)
    if config.second_archive is None:
        return archive, archive
    second = workspace.open_ensemble([config.second_archive], config.average, progress, strict=config.strict)
    return archive, archive if second.digest == archive.digest else second


def plan_students(
    grid: Grid, first: Subject, workspace: Workspace, *, second: Subject | None = None, dataset: str | None = None
) -> list[StudentSpec]:
    """The grid of students of the archive `first` with the folder of each. UsageError for a grid that makes no sense.

    All are trained for as many epochs, in batches of one size. Second views, for methods of two, are those of `second`, or of
    the same archive; images are those of `dataset`, or where the dump found them.
    """
    training = grid.training
    wanted = {"--control": grid.control, "--seed": grid.seed, "--init": grid.init, "--opt": training.opt, "--lr": training.lr}
    for option, values in wanted.items():
        if not values:
            raise UsageError(f"{option} names nothing", why="the grid of students would be empty", fix=f"give {option} a value")
    for tau in grid.tau:
        if not SMALLEST_TAU <= tau <= LARGEST_TAU:
            raise UsageError(
                f"tau {tau:g}",
                why=f"temperatures lie between {SMALLEST_TAU:g} and {LARGEST_TAU:g}: beyond, float32 leaves nothing to learn",
                fix="use for example --tau 1,4,20",
            )
    named = dataset or first.dataset
    if named is None:
        raise unknown_source(first.location, first.policy)
    source = parse_dataset(named)
    recipe = source.recipe
    trainings = _trainings(training, grid.epochs or recipe.student_epochs)
    require_batch_size(training.batch_size, first.samples)
    for optimizer, betas in {(each.opt, each.opt_betas) for each in trainings}:
        require_optimizer(optimizer, betas)
    exact_names = {student: resolve(student, "student", run=False) for student in grid.student or (recipe.student,)}
    targets = [CONTROLS.parse(spec) for spec in grid.control]
    losses = [(loss, control, tau) for loss, taus in _methods_and_taus(grid) for control in targets for tau in taus]
    for control in targets:
        control.check(len(first.classes))
    for loss, control, tau in losses:
        _require_sense(loss, control, tau, force=grid.force)
    if any(loss.views_per_step == 2 for loss, _, _ in losses):
        require_second(first, second or first)
    elif second is not None:
        raise UsageError(
            f"--second-archive {second.location} without a method of two views",
            why="second views are shown to mlkd and zmlkd only",
            fix="leave it out, or use --method mlkd",
        )
    tested = grid.tested.otherwise(recipe.test_policy)
    teachers_size = first.policy.size if first.policy else None
    sizes = {name: _sizes(grid.student_size, student, name, teachers_size) for student, name in exact_names.items()}
    starts = {
        (init, name): _with_head(find_start(init, name, source, workspace), name, len(first.classes))
        for init in grid.init
        for name in exact_names.values()
    }
    specs = []
    for seed, (student, name, size), init, settings, (loss, control, tau) in itertools.product(
        grid.seed,
        [(student, exact, size) for student, exact in exact_names.items() for size in sizes[exact]],
        grid.init,
        trainings,
        losses,
    ):
        start, order_seed = starts[init, name], 0 if grid.share_order else seed
        other = second if loss.views_per_step == 2 and second is not None and second.digest != first.digest else None
        archives = [each.digest for each in (first, other) if each is not None]
        begun = [] if init == "random" else ["pretrained" if start.pretrained else start.sha256]
        begun += ["head at zero"] if start.new_head and settings.head_init == "zero" else []
        order = [] if order_seed == seed else [f"order {order_seed}"]
        seen = [*([f"{size} px"] if size else []), *([shown] if (shown := tested.identity()) else [])]
        trained = [public_name(name), *begun, METHODS.to_dict(loss), CONTROLS.to_dict(control), tau, seed, *order, *seen]
        identity = json.dumps([*archives, *trained, settings.identity()], sort_keys=True)
        runs = workspace.runs / first.name
        spec = StudentSpec(student, name, loss, control, tau, seed, order_seed, settings, runs, start, tested, size)
        begins = folder_name(student) + (f"-{size}px" if size else "") + ("" if init == "random" else f"-{start.label}")
        optimised = [spec.optimizer_text.replace(" lr ", "-lr")] if spec.optimizer_text else []
        parts = (begins, METHODS.spec(loss), f"tau{spec.tau_text}", CONTROLS.spec(control), *optimised, f"seed{seed}")
        title = re.sub(r"[^\w.+-]", "-", "--".join(parts))[:LONGEST_LABEL]
        specs.append(replace(spec, folder=spec.folder / f"{title}--{hashlib.sha256(identity.encode()).hexdigest()[:6]}"))
    return list({spec.folder: spec for spec in specs}.values())


def _sizes(wanted: Sequence[str], student: str, name: str, teachers: int | None) -> list[int | None]:
    """The sizes of views that the model `name` is to see; None for those of the teacher."""
    sizes: list[int | None] = []
    for text in wanted:
        if text == "own" and is_factory(name):
            raise UsageError(
                f"--student-size own with --student {student}",
                why="a function's model states no size of its own",
                fix="give it in pixels, for example: --student-size 160",
            )
        if text != "own" and not (text.isascii() and text.isdigit() and SMALLEST_SIZE <= int(text) <= LARGEST_SIZE):
            raise UsageError(
                f"--student-size {text}",
                why=f"it is own, or a side of {SMALLEST_SIZE} to {LARGEST_SIZE} pixels",
                fix="use for example --student-size 160",
            )
        size = own_size(name) if text == "own" else int(text)
        if teachers and teachers > MOST_SHRINKING * size:
            raise UsageError(
                f"--student-size {text} of views of {teachers} px",
                why=f"sums over lines of pixels are exact only for views at most {MOST_SHRINKING} times as large",
                fix=f"use --student-size {-(-teachers // MOST_SHRINKING)} or more",
            )
        sizes.append(None if size == teachers else size)
    return list(dict.fromkeys(sizes)) or [None]


def plan_ahead(grid: Grid, first: Subject, workspace: Workspace, second: Subject | None = None) -> list[tuple[StudentSpec, str]]:
    """The students of an archive that is not there yet, each with its start, which may well be trained only after this plan."""
    specs = plan_students(grid.but(init="random"), first, workspace, second=second)
    return [(spec, init) for spec in specs for init in dict.fromkeys(grid.init)]


def _trainings(training: StudentTraining, epochs: int) -> list[TrainConfig]:
    """How students are trained: every optimiser at every learning rate, or at its own."""
    trainings = []
    for spec in training.opt:
        opt, _, text = spec.partition(":")
        own = dict(part.partition("=")[::2] for part in text.split(",")) if text else {}
        if wrong := own.keys() - OPTIMIZER_SETTINGS:
            raise unknown_name(f"setting of optimiser {opt}", min(wrong), OPTIMIZER_SETTINGS)
        for lr in [own["lr"]] if "lr" in own else training.lr:
            trainings.append(TrainConfig(**(training.given() | {"epochs": epochs, "opt": opt, "lr": lr} | own)))
    return list(dict.fromkeys(trainings))


def find_start(init: str, exact: str, source: Source, workspace: Workspace) -> Start:
    """What students of the model `exact` start from (temperature study, section 4.4).

    `random`; `pretrained`: timm's weights; `target`: the newest model of that name that train-teacher trained on the dataset
    `source` from scratch; `finetuned`: likewise from timm's weights; or a file of weights, or a folder that holds one.
    """
    if init == "pretrained" and is_factory(exact):
        raise UsageError(
            f"--init pretrained with --student {exact}",
            why="it has the weights that its function gives it, and kdcache knows of no others",
            fix="leave --init out: whatever the function returns is what training starts from",
        )
    if init in {"random", "pretrained"}:
        return Start(init, pretrained=init == "pretrained")
    if init in {"target", "finetuned"}:
        start, flag = ("random", "--from-scratch") if init == "target" else ("timm", "--pretrained")
        origin = "from scratch" if init == "target" else "from its pretrained weights"
        label = dataset_label(source)
        for folder, record in workspace.teacher_records(Silent()):
            begun = "factory" if is_factory(exact) else start
            if (record["name"], record.get("dataset_label"), record["training"].get("start")) == (
                public_name(exact),
                label,
                begun,
            ):
                return replace(_start_of(init, folder / "model.safetensors"), top1=record.get("top1_clean"))
        command = ["kdcache", "train-teacher", "--teacher", exact, "--dataset", DATASETS.spec(source)]
        raise NotFoundError(
            f"--init {init}: no {public_name(exact)} trained on {label} {origin}",
            why=f"there is none in {workspace.teachers}",
            fix=f"train it first: {shlex.join(command)} {flag}",
        )
    path = Path(init)
    files = [path] if split_weights(path)[0].is_file() else [path / name for name in ("model.safetensors", "last.safetensors")]
    weights = next((file for file in files if split_weights(file)[0].is_file()), None)
    if weights is None:
        raise NotFoundError(
            f"--init {init!r} {'is not there' if not path.exists() else 'has no weights' if path.is_dir() else lacking(path)}",
            why=f"it is {', '.join(STARTS)}, a file of weights, or the folder of a teacher or run",
            fix="write one of these names, or a path that is there",
        )
    return _start_of(init, weights)


def _start_of(init: str, file: Path) -> Start:
    return Start(init, file=file, sha256=weights_identity(file))


def _with_head(start: Start, exact: str, classes: int) -> Start:
    """The same start, which knows whether its classifier is a new one."""
    if start.name == "random":
        return start
    from kdcache.models.creation import has_new_head  # which needs torch

    return replace(start, new_head=has_new_head(exact, classes, start.file))


def _methods_and_taus(grid: Grid) -> Iterator[tuple[Method, Sequence[float]]]:
    """Methods at each temperature, and presets at theirs unless others are asked for. A method that sets its own has one."""
    losses: list[tuple[Method, float]] = [(preset(name).build(), preset(name).tau) for name in grid.preset]
    losses += [(METHODS.parse(spec), 1.0) for spec in grid.method or (() if grid.preset else ("kd",))]
    if grid.tau and not any(loss.uses_tau for loss, _ in losses):
        names = ", ".join(METHODS.name_of(loss) for loss, _ in losses)
        raise UsageError(
            f"{names} with --tau {','.join(f'{tau:g}' for tau in grid.tau)}",
            why="the method does not look at tau: it finds its temperature by itself, or has none",
            fix="leave --tau out",
        )
    for loss, tau in losses:
        yield loss, grid.tau if grid.tau and loss.uses_tau else (tau,)


def _require_sense(loss: Method, control: Control, tau: float, *, force: bool) -> None:
    """UsageError for a combination of method, control and temperature that means nothing."""
    name = METHODS.name_of(loss)
    if not loss.uses_teacher and CONTROLS.name_of(control) != "none":
        raise UsageError(
            f"{name} with --control {CONTROLS.name_of(control)}",
            why="a control changes the teacher's targets, and this method learns from labels alone",
            fix="use --control none, or another method",
        )
    if control.smooths and (not loss.uses_tau or loss.unit_variance):
        raise UsageError(
            f"{name} with --control {CONTROLS.name_of(control)}",
            why="label smoothing is matched to the entropy at tau, which this method does not use"
            if not loss.uses_tau
            else "z-scores of smoothed targets are the same however strong the smoothing is",
            fix="use --control none or bottom:K, or another method",
        )
    largest = loss.largest_tau
    if tau > largest and not force:
        raise UsageError(
            f"{name} with tau {tau:g}",
            why=f"its student is not tempered, and is pushed to the uniform distribution; its paper's largest tau is {largest:g}",
            fix="use a smaller tau, or --force",
        )


def doubts(specs: Sequence[StudentSpec], grid: Grid, views_size: int) -> Iterator[str]:
    """Notes on a grid that can be trained, but may not show what it is meant to show; the teacher's views have `views_size`."""
    if larger := sorted({student.size for student in specs if student.size and student.size > views_size}):
        yield (
            f"students see views of {', '.join(map(str, larger))} px, made from the teacher's of {views_size} px: they are "
            "enlarged, and hold no more than the teacher saw"
        )
    epochs, taus = specs[0].settings.epochs, dict[Method, set[float]]()
    for student in specs:
        taus.setdefault(student.method, set()).add(student.tau)
    for loss, its_taus in taus.items():
        if grid.tau and not loss.uses_tau:
            how = "finds its temperature by itself" if loss.uses_teacher else "has no temperature"
            yield f"{METHODS.spec(loss)}: {how}, --tau is not for it"
        for doubt in loss.doubts(its_taus, epochs):
            yield f"{METHODS.spec(loss)}: {doubt}"
    smoothing = {student.control for student in specs if student.control.smooths}
    partly = [METHODS.spec(loss) for loss in taus if not loss.only_at_tau]
    if smoothing and partly:
        yield (
            f"{', '.join(partly)}: also look at the targets at temperatures of their own, "
            f"where {', '.join(map(CONTROLS.spec, smoothing))} have another entropy than the teacher"
        )
