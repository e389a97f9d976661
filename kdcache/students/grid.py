"""The grid of students: every combination of student, method, control, temperature and seed, and whether it makes sense."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from kdcache.archive import Average, Ensemble
from kdcache.errors import NotFoundError, UsageError, unknown_name
from kdcache.methods import METHODS, Method
from kdcache.methods.presets import preset
from kdcache.models.creation import resolve
from kdcache.models.names import folder_name, is_factory, public_name
from kdcache.replay.prefetch import RendererChoice
from kdcache.replay.stream import require_batch_size, require_second
from kdcache.system.progress import Progress, Silent
from kdcache.targets import CONTROLS, Control
from kdcache.training.learner import TrainConfig, require_optimizer
from kdcache.workspace import Workspace, archive_source, dataset_label

__all__ = ["DistillConfig", "StudentSpec", "doubts", "open_archives", "plan_students"]

STARTS = ("random", "pretrained", "target", "finetuned")
SMALLEST_TAU, LARGEST_TAU = 1e-2, 1e4
OPTIMIZER_SETTINGS = ("lr", "weight_decay", "momentum")
LONGEST_LABEL = 150  # characters, of what a run's folder says before its digest


@dataclass(frozen=True)
class DistillConfig:
    """What to train: all combinations of the sequences. How: by default as the temperature study does (its section 3.1)."""

    archives: Sequence[str] = ()  # none: the only one, or the newest; several: the average of them
    average: Average = "logits"  # or of their probabilities at each student's tau
    second_archive: str | None = None  # where methods of two views get the second one, if not from the same archives
    taus: Sequence[float] = ()  # none: 1, and of a preset its own
    methods: Sequence[str] = ()  # none: kd, unless there are presets
    presets: Sequence[str] = ()  # published settings beside those methods, `paper:<method>:<dataset>`
    controls: Sequence[str] = ("none",)
    students: Sequence[str] = ()  # empty: the dataset's own
    inits: Sequence[str] = ("random",)  # what students start from: see `find_start`
    seeds: Sequence[int] = (0,)
    epochs: int | None = None
    batch_size: int = 64
    share_order: bool = False  # students of all seeds see the batches of seed 0
    opts: Sequence[str] = ("adamw",)  # timm names, with settings of their own if any: `sgd:lr=0.05,momentum=0.9`
    lrs: Sequence[float] = (0.002,)  # of optimisers without their own
    weight_decay: float = 0.05
    clip_grad: float | None = 1.0
    momentum: float = 0.9
    sched: Literal["cosine", "step"] = "cosine"
    decay_epochs: Sequence[int] = ()
    decay_rate: float = 0.1
    amp: bool = False
    ema_decay: float | None = None
    val_interval: int = 1
    dataset: str | None = None  # where the images are now, if not where the dump found them
    strict: bool = False
    force: bool = False  # temperatures at which a method is not meant to be used
    allow_drift: int = 0
    device: str = "auto"
    workers: int = 0
    renderer: RendererChoice = "auto"
    checkpoint_interval: float = 30.0  # seconds
    memory: int | None = None  # bytes that students trained at once may take of their device; None: most of what is free
    channels_last: bool = False
    compiled: bool = False
    parallel: Literal["auto", "students", "batches"] = "auto"  # what the processes that torchrun started divide
    command: str = ""


@dataclass(frozen=True)
class Start:
    """What a student starts from: random weights, timm's `pretrained` ones, or those of a `file` of this sha256."""

    name: str = "random"  # as typed
    pretrained: bool = False
    file: Path | None = None
    sha256: str = ""

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

    @property
    def title(self) -> str:
        start = "" if self.start.name == "random" else f" from {self.start.name}"
        what = f"{METHODS.spec(self.method)} tau {self.tau_text} {CONTROLS.spec(self.control)}"
        how = f" {self.optimizer_text}" if self.optimizer_text else ""
        return f"{self.student}{start} {what}{how} seed {self.seed}"

    @property
    def optimizer_text(self) -> str:
        """The optimiser with its learning rate; nothing for the one that is used unless another is asked for."""
        how, usual = self.settings, TrainConfig(epochs=1)
        return "" if (how.opt, how.lr) == (usual.opt, usual.lr) else f"{how.opt} lr {how.lr:g}"

    @property
    def tau_text(self) -> str:
        return f"{self.tau:g}" if self.method.uses_tau else "own"


def open_archives(config: DistillConfig, workspace: Workspace, progress: Progress) -> tuple[Ensemble, Ensemble]:
    """The archives that students are trained from, and those that second views come from: the same, unless another is named."""
    archive = workspace.open_ensemble(config.archives, config.average, progress, strict=config.strict)
    if config.second_archive is None:
        return archive, archive
    second = workspace.open_ensemble([config.second_archive], config.average, progress, strict=config.strict)
    return archive, archive if second.digest == archive.digest else second


def plan_students(config: DistillConfig, archive: Ensemble, second: Ensemble, workspace: Workspace) -> list[StudentSpec]:
    """The grid of students with the folder of each. UsageError for a grid that makes no sense.

    All are trained for as many epochs, in batches of one size.
    """
    wanted = {"--control": config.controls, "--seed": config.seeds, "--init": config.inits, "--opt": config.opts}
    for option, values in {**wanted, "--lr": config.lrs}.items():
        if not values:
            raise UsageError(f"{option} names nothing", why="the grid of students would be empty", fix=f"give {option} a value")
    for tau in config.taus:
        if not SMALLEST_TAU <= tau <= LARGEST_TAU:
            raise UsageError(
                f"tau {tau:g}",
                why=f"temperatures lie between {SMALLEST_TAU:g} and {LARGEST_TAU:g}: beyond, float32 leaves nothing to learn",
                fix="use for example --tau 1,4,20",
            )
    source = archive_source(archive, config.dataset)
    recipe = source.recipe
    how_trained = _settings(config, config.epochs or recipe.student_epochs)
    require_batch_size(config.batch_size, archive.num_samples)
    for optimizer in {settings.opt for settings in how_trained}:
        require_optimizer(optimizer)
    names = {student: resolve(student, "student") for student in config.students or (recipe.student,)}
    whats = [CONTROLS.parse(spec) for spec in config.controls]
    grid = [(how, what, tau) for how, taus in _methods_and_taus(config) for what in whats for tau in taus]
    for what in whats:
        what.check(archive.num_classes)
    for how, what, tau in grid:
        _require_sense(how, what, tau, config)
    if any(how.views_per_step == 2 for how, _, _ in grid):
        require_second(archive, second)
    elif config.second_archive is not None:
        raise UsageError(
            f"--second-archive {config.second_archive} without a method of two views",
            why="second views are shown to mlkd and zmlkd only",
            fix="leave it out, or use --method mlkd",
        )
    label = dataset_label(source)
    starts = {(init, name): find_start(init, name, label, workspace) for init in config.inits for name in names.values()}
    specs = []
    for seed, (student, name), init, settings, (how, what, tau) in itertools.product(
        config.seeds, names.items(), config.inits, how_trained, grid
    ):
        start, order_seed = starts[init, name], 0 if config.share_order else seed
        archives = [archive.digest] + [second.digest] * (how.views_per_step == 2 and second is not archive)
        begun = [] if init == "random" else ["pretrained" if start.pretrained else start.sha256]
        order = [] if order_seed == seed else [f"order {order_seed}"]
        trained = [METHODS.to_dict(how), CONTROLS.to_dict(what), tau, seed, *order, settings.identity()]
        identity = json.dumps([*archives, public_name(name), *begun, *trained], sort_keys=True)
        spec = StudentSpec(student, name, how, what, tau, seed, order_seed, settings, workspace.runs / archive.name, start)
        named = folder_name(student) if init == "random" else f"{folder_name(student)}-{start.label}"
        how_optimised = [spec.optimizer_text.replace(" lr ", "-lr")] if spec.optimizer_text else []
        parts = (named, METHODS.spec(how), f"tau{spec.tau_text}", CONTROLS.spec(what), *how_optimised, f"seed{seed}")
        title = re.sub(r"[^\w.+-]", "-", "--".join(parts))[:LONGEST_LABEL]
        specs.append(replace(spec, folder=spec.folder / f"{title}--{hashlib.sha256(identity.encode()).hexdigest()[:6]}"))
    return list({spec.folder: spec for spec in specs}.values())


def _settings(config: DistillConfig, epochs: int) -> list[TrainConfig]:
    """How students are trained: one for each optimiser at each learning rate, or at its own."""
    found = []
    for spec in config.opts:
        opt, _, text = spec.partition(":")
        own = dict(part.partition("=")[::2] for part in text.split(",")) if text else {}
        if wrong := own.keys() - OPTIMIZER_SETTINGS:
            raise unknown_name(f"setting of optimiser {opt}", min(wrong), OPTIMIZER_SETTINGS)
        for lr in [own["lr"]] if "lr" in own else config.lrs:
            chosen = {"lr": lr, "weight_decay": config.weight_decay, "momentum": config.momentum, "opt": opt} | own
            found.append(
                TrainConfig(
                    epochs=epochs,
                    batch_size=config.batch_size,
                    clip_grad=config.clip_grad,
                    sched=config.sched,
                    decay_epochs=tuple(config.decay_epochs),
                    decay_rate=config.decay_rate,
                    amp=config.amp,
                    ema_decay=config.ema_decay,
                    val_interval=config.val_interval,
                    **chosen,
                )
            )
    return list(dict.fromkeys(found))


def find_start(init: str, exact: str, label: str, workspace: Workspace) -> Start:
    """What students of the model `exact` start from (temperature study, section 4.4).

    `random`; `pretrained`: timm's weights; `target`: the newest model of that name that train-teacher trained on this dataset
    (of that `label`) from scratch; `finetuned`: likewise from timm's weights; or a file of weights, or a folder that holds one.
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
        how = "from scratch" if init == "target" else "from its pretrained weights"
        for folder, record in workspace.teacher_records(Silent()):
            begun = "factory" if is_factory(exact) else start
            if (record["name"], record.get("dataset_label"), record["training"].get("start")) == (
                public_name(exact),
                label,
                begun,
            ):
                return _start_of(init, folder / "model.safetensors")
        raise NotFoundError(
            f"--init {init}: no {public_name(exact)} trained on {label} {how}",
            why=f"there is none in {workspace.teachers}",
            fix=f"train it first: kdcache train-teacher --teacher {exact} --dataset {label.partition('-')[0]} {flag}",
        )
    path = Path(init)
    files = [path] if path.is_file() else [path / name for name in ("model.safetensors", "last.safetensors")]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise NotFoundError(
            f"--init {init!r} is not there",
            why=f"it is {', '.join(STARTS)}, a file of weights, or the folder of a teacher or run",
            fix="write one of these names, or a path that is there",
        )
    return _start_of(init, found)


def _start_of(init: str, file: Path) -> Start:
    with file.open("rb") as weights:
        return Start(init, file=file, sha256=hashlib.file_digest(weights, "sha256").hexdigest())


def _methods_and_taus(config: DistillConfig) -> Iterator[tuple[Method, Sequence[float]]]:
    """Methods at each temperature, and presets at theirs unless others are asked for. Those that set their own are there once."""
    found: list[tuple[Method, float]] = [(preset(name).build(), preset(name).tau) for name in config.presets]
    found += [(METHODS.parse(spec), 1.0) for spec in config.methods or (() if config.presets else ("kd",))]
    if config.taus and not any(how.uses_tau for how, _ in found):
        names = ", ".join(METHODS.name_of(how) for how, _ in found)
        raise UsageError(
            f"{names} with --tau {','.join(f'{tau:g}' for tau in config.taus)}",
            why="its temperature is found by the method itself, which does not look at tau",
            fix="leave --tau out",
        )
    for how, tau in found:
        yield how, config.taus if config.taus and how.uses_tau else (tau,)


def _require_sense(how: Method, what: Control, tau: float, config: DistillConfig) -> None:
    """UsageError for a combination of method, control and temperature that means nothing."""
    name, its_control = METHODS.name_of(how), CONTROLS.name_of(what)
    if what.smooths and (not how.uses_tau or how.unit_variance):
        raise UsageError(
            f"{name} with --control {its_control}",
            why="label smoothing is matched to the entropy at tau, which this method does not use"
            if not how.uses_tau
            else "z-scores of smoothed targets are the same however strong the smoothing is",
            fix="use --control none or bottom:K, or another method",
        )
    largest = how.largest_tau
    if tau > largest and not config.force:
        raise UsageError(
            f"{name} with tau {tau:g}",
            why=f"its student is not tempered, and is pushed to the uniform distribution; its paper's largest tau is {largest:g}",
            fix="use a smaller tau, or --force",
        )


def doubts(specs: Sequence[StudentSpec], epochs: int, config: DistillConfig) -> Iterator[str]:
    """What is worth knowing about a grid that can be trained, but may not show what it is meant to show."""
    taus: dict[Method, set[float]] = {}
    for student in specs:
        taus.setdefault(student.method, set()).add(student.tau)
    for how, its_taus in taus.items():
        if config.taus and not how.uses_tau:
            yield f"{METHODS.spec(how)}: finds its temperature by itself, --tau is not for it"
        for doubt in how.doubts(its_taus, epochs):
            yield f"{METHODS.spec(how)}: {doubt}"
    smoothing = {student.control for student in specs if student.control.smooths}
    partly = [METHODS.spec(how) for how in taus if not how.only_at_tau]
    if smoothing and partly:
        yield (
            f"{', '.join(partly)}: also look at the targets at temperatures of their own, "
            f"where {', '.join(map(CONTROLS.spec, smoothing))} have another entropy than the teacher"
        )
