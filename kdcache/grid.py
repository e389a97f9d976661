"""The grid of students: every combination of student, method, control, temperature and seed, and whether it makes sense."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdcache.archive import Average, Ensemble
from kdcache.errors import UsageError
from kdcache.methods import Method, method
from kdcache.methods.base import ZScored
from kdcache.methods.presets import preset
from kdcache.models import resolve
from kdcache.prefetch import RendererChoice
from kdcache.progress import Progress
from kdcache.stream import require_second
from kdcache.targets import Control, controls
from kdcache.training import TrainConfig
from kdcache.workspace import Workspace, archive_source

__all__ = ["DistillConfig", "StudentSpec", "doubts", "open_archives", "plan_students", "views_per_step"]


@dataclass(frozen=True)
class DistillConfig:
    """What to train: all combinations of the sequences. `train` defaults to the temperature study's recipe."""

    archives: Sequence[str] = ()  # none: the only one, or the newest; several: the average of them
    average: Average = "logits"  # or of their probabilities at each student's tau
    second_archive: str | None = None  # where methods of two views get the second one, if not from the same archives
    taus: Sequence[float] = ()  # none: 1, and of a preset its own
    methods: Sequence[str] = ()  # none: kd, unless there are presets
    presets: Sequence[str] = ()  # published settings beside those methods, `paper:<method>:<dataset>`
    controls: Sequence[str] = ("none",)
    students: Sequence[str] = ()  # empty: the dataset's own
    seeds: Sequence[int] = (0,)
    epochs: int | None = None
    batch_size: int = 64
    opt: str = "adamw"
    lr: float = 0.002
    weight_decay: float = 0.05
    clip_grad: float | None = 1.0
    dataset: str | None = None  # where the images are now, if not where the dump found them
    strict: bool = False
    force: bool = False  # temperatures at which a method is not meant to be used
    allow_drift: int = 0
    device: str = "auto"
    workers: int = 0
    renderer: RendererChoice = "auto"
    checkpoint_interval: float = 30.0  # seconds
    command: str = ""


@dataclass(frozen=True)
class StudentSpec:
    """One student of the grid."""

    student: str  # as typed
    name: str  # exact timm name
    method: Method
    control: Control
    tau: float
    seed: int
    folder: Path

    @property
    def title(self) -> str:
        return f"{self.student} {method.spec(self.method)} tau {self.tau:g} {controls.spec(self.control)} seed {self.seed}"


def open_archives(config: DistillConfig, workspace: Workspace, progress: Progress) -> tuple[Ensemble, Ensemble]:
    """The archives that students are trained from, and those that second views come from: the same, unless another is named."""
    archive = workspace.open_ensemble(config.archives, config.average, progress, strict=config.strict)
    if config.second_archive is None:
        return archive, archive
    return archive, workspace.open_ensemble([config.second_archive], config.average, progress, strict=config.strict)


def plan_students(
    config: DistillConfig, archive: Ensemble, second: Ensemble, workspace: Workspace
) -> tuple[list[StudentSpec], TrainConfig]:
    """The grid of students with the folder of each, and how they are trained. UsageError for a grid that makes no sense."""
    for option, values in {"--control": config.controls, "--seed": config.seeds}.items():
        if not values:
            raise UsageError(f"{option} names nothing", why="the grid of students would be empty", fix=f"give {option} a value")
    for tau in config.taus:
        if not (math.isfinite(tau) and tau > 0):
            raise UsageError(f"tau {tau}", why="a temperature is a positive number", fix="use for example --tau 1,4,20")
    recipe = archive_source(archive, config.dataset).recipe
    settings = TrainConfig(
        epochs=config.epochs or recipe.student_epochs,
        batch_size=config.batch_size,
        opt=config.opt,
        lr=config.lr,
        weight_decay=config.weight_decay,
        clip_grad=config.clip_grad,
    )
    names = {student: resolve(student, "student") for student in config.students or (recipe.student,)}
    whats = [controls.parse(spec) for spec in config.controls]
    hows = list(_methods_and_taus(config))
    for what in whats:
        what.check(archive.num_classes)
    if any(views_per_step(how) == 2 for how, _ in hows):
        require_second(archive, second)
    grid = [(how, what, tau) for how, taus in hows for what in whats for tau in taus]
    for how, what, tau in grid:
        _require_sense(how, what, tau, config)
    specs = []
    for seed, (student, name), (how, what, tau) in itertools.product(config.seeds, names.items(), grid):
        archives = [archive.digest] + [second.digest] * (views_per_step(how) == 2 and second is not archive)
        identity = json.dumps(
            [*archives, name, method.to_dict(how), controls.to_dict(what), tau, seed, settings.model_dump()], sort_keys=True
        )
        parts = (student, method.spec(how), f"tau{tau:g}", controls.spec(what), f"seed{seed}")
        label = "--".join(parts).replace(":", "-").replace("/", "_").replace("=", "-").replace(",", "-")
        folder = workspace.runs / archive.name / f"{label}--{hashlib.sha256(identity.encode()).hexdigest()[:6]}"
        specs.append(StudentSpec(student, name, how, what, tau, seed, folder))
    return list({spec.folder: spec for spec in specs}.values()), settings


def views_per_step(how: Method) -> int:
    """How many views of each sample a method wants; one, if it does not say."""
    return int(getattr(how, "views_per_step", 1))


def _methods_and_taus(config: DistillConfig) -> Iterator[tuple[Method, Sequence[float]]]:
    """Methods at each temperature, and presets at theirs unless others are asked for. Those that set their own are there once."""
    for name in config.presets:
        found = preset(name)
        how = found.build()
        yield how, config.taus if config.taus and _uses_tau(how) else (found.tau,)
    for spec in config.methods or (() if config.presets else ("kd",)):
        how = method.parse(spec)
        if not _uses_tau(how) and config.taus and len(config.methods) == 1:
            raise UsageError(
                f"--method {spec} with --tau {', '.join(f'{tau:g}' for tau in config.taus)}",
                why=f"{method.name_of(how)} finds its temperature by itself and does not look at tau",
                fix="leave --tau out",
            )
        yield how, config.taus if config.taus and _uses_tau(how) else (1.0,)


def _uses_tau(how: Method) -> bool:
    return bool(getattr(how, "uses_tau", True))


def _require_sense(how: Method, what: Control, tau: float, config: DistillConfig) -> None:
    """UsageError for a combination of method, control and temperature that means nothing."""
    name, its_control = method.name_of(how), controls.name_of(what)
    if not _uses_tau(how) and its_control.startswith("ls-"):
        raise UsageError(
            f"--method {name} with --control {its_control}",
            why="label smoothing is matched to the entropy at tau, which this method does not use",
            fix="use --control none or bottom:K, or another method",
        )
    if name in {"ttm", "wttm"} and tau >= 10 and not config.force and (config.taus or not config.presets):
        raise UsageError(
            f"--method {name} with --tau {tau:g}",
            why="its student is not tempered, and is pushed to the uniform distribution; of the paper's tau 10 is the largest",
            fix="use a smaller tau, or --force",
        )


def doubts(specs: Sequence[StudentSpec]) -> list[str]:
    """What is worth knowing about a grid that can be trained, but may not show what it is meant to show."""
    found = []
    taus: dict[Method, set[float]] = {}
    for student in specs:
        taus.setdefault(student.method, set()).add(student.tau)
    for how, its_taus in taus.items():
        name, spec = method.name_of(how), method.spec(how)
        if name in {"rld", "zrld"} and getattr(how, "label_rule", None) == "teacher_argmax":
            found.append(f"{spec}: of the teacher's own top class, rld is dkd with TCKD at confidence_tau; dkd says so plainly")
        if name == "dist" and getattr(how, "tau_squared", False) and len(its_taus) > 1:
            found.append(
                f"{spec}: a correlation has no scale, so tau^2 makes its gradient grow with tau; "
                "compare temperatures with dist:tau_squared=0"
            )
        if isinstance(how, ZScored) and max(its_taus) >= 10:
            found.append(f"{spec}: scores have unit variance, so that tau {max(its_taus):g} is far softer than it is for kd")
    return found
