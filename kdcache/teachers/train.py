"""train-teacher: finetune a timm model on a dataset, train it from scratch, or take its weights as they are.

Teachers of several durations are trained in lockstep on one stream of views, each by a schedule of its own; what each of
them becomes is what it would have become alone.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from kdcache.datasets import DATASETS, Source
from kdcache.datasets.canvas import Canvas, require_intact
from kdcache.errors import IncompatibleError, UsageError
from kdcache.models.classes import said_digest
from kdcache.models.creation import (
    Normalisation,
    create_model,
    described,
    licence,
    load_weights,
    published,
    timm_config,
    weights_digest,
)
from kdcache.models.names import CONFIG, folder_name, is_factory, public_name, resolve
from kdcache.models.preprocessing import preprocessing
from kdcache.replay.stream import ViewStream
from kdcache.system.energy import UNKNOWN, Spent, total
from kdcache.system.files import write_atomically
from kdcache.system.interrupts import Stopped, stopped_between_steps
from kdcache.system.progress import Progress, Silent
from kdcache.teachers import as_is
from kdcache.teachers.config import TeacherConfig
from kdcache.teachers.forward import Forward
from kdcache.teachers.recipes import TeacherRecipe, teacher_recipe
from kdcache.teachers.registry import REPORT_VIEWS, Exam, Teacher, compared, doubt, file_digest
from kdcache.training.config import TrainConfig
from kdcache.training.devices import metered, resolve_device, seeded
from kdcache.training.learner import Learner
from kdcache.training.lockstep import Pace, charge, in_lockstep
from kdcache.training.tested import doubts, model_filter, views_of_tests
from kdcache.views.policy import ViewPolicy
from kdcache.workspace import Workspace, dataset_label, parse_dataset, read_record, read_teacher, require_writable, versions

__all__ = ["train_teacher", "train_teachers"]

VIEW_SEED = 0x7EAC4E5  # the teacher's own views; those of a dump have the policy's seed
REPORTS = 20  # times in a training


def train_teacher(config: TeacherConfig, workspace: Workspace, progress: Progress | None = None) -> Teacher:
    """`train_teachers` of a single duration."""
    (teacher,) = train_teachers(config, workspace, progress)
    return teacher


def train_teachers(
    config: TeacherConfig,
    workspace: Workspace,
    progress: Progress | None = None,
    *,
    source: Source | None = None,
    canvas: Canvas | None = None,
) -> list[Teacher]:
    """Train as configured, one teacher for each number of epochs; what was trained just so before is returned as it is.

    `source` and `canvas`, of the training images, are the dataset's where they are at hand already.
    """
    progress = progress or Silent()
    job = _Job(config, workspace, progress, source, canvas)
    made: dict[int, Teacher] = {}
    for epochs in job.durations:
        folder = job.folder(epochs)
        if (folder / "teacher.json").is_file():
            progress.say(f"teacher: {folder} (already {'trained' if epochs else 'tested'})")
            made[epochs] = Teacher(folder, read_teacher(folder))
        elif not epochs:
            made[epochs] = job.register()
        elif (row := _finished(folder)) is not None:  # and its process ended before it could say so
            made[epochs] = job.record(epochs, job.finished_model(folder), row)
    fresh = [epochs for epochs in job.durations if epochs not in made]
    if fresh:
        made |= job.train(fresh)
    teachers = [made[epochs] for epochs in job.durations]
    for line in [*compared(teachers), *filter(None, map(doubt, teachers))]:
        progress.say(line)
    return teachers


class _Job:
    """What a configuration comes to: names and recipe resolved, canvases there, settings for each number of epochs."""

    def __init__(
        self, config: TeacherConfig, workspace: Workspace, progress: Progress, source: Source | None, canvas: Canvas | None
    ) -> None:
        self.config, self.workspace, self.progress = config, workspace, progress
        self.device = resolve_device(config.runtime.device)
        self.source = source or parse_dataset(config.subject.dataset, progress)
        self.exact = resolve(config.subject.teacher, "teacher")
        self.name = public_name(self.exact)
        suggested = self.source.recipe
        self.recipe_name, recipe = teacher_recipe(config.recipe, self.exact, DATASETS.name_of(self.source))
        self.start, scratch = self._start(recipe)
        self.durations = self._durations(recipe)
        drawn = ViewPolicy.draft(config.views.policy or recipe.policy or suggested.policy, size=config.views.size)
        self.policy = drawn.model_copy(update={"seed": VIEW_SEED, "mix": None})
        self.shown = ViewPolicy.draft(config.views.policy or suggested.policy, size=self.policy.size)  # as a dump has them
        self.how_tested = config.tested.otherwise(suggested.test_policy)
        self.smoothing = _given(config.smoothing, recipe.smoothing)
        self.settings = {epochs: _settings(config, recipe, epochs, self.exact, scratch) for epochs in self.durations if epochs}
        self.checkpoint_sha256 = file_digest(config.checkpoint) if config.checkpoint else None
        require_writable(workspace.teachers)
        as_is.require_use(config.classes, self.durations)
        if 0 in self.durations:  # what cannot be taken as it is is refused before anything is decoded
            self._as_is = as_is.take(
                self.exact,
                tuple(self.source.open(workspace.data, progress).class_names()),
                config.subject,
                self.start,
                checkpoint=config.checkpoint,
                classes=config.classes,
                input_size=self.policy.size,
            )
            for line in self._as_is.note():
                progress.say(line)
        self.train_canvas = (
            canvas if canvas is not None else workspace.canvas(self.source, "train", config.views.canvas, progress, tell=True)
        )
        self.test_canvas = workspace.canvas(self.source, "test", config.views.canvas, progress)
        for canvas in (self.train_canvas, self.test_canvas):
            require_intact(canvas)
        self._settle_views()
        self._ahead: Any = {"workers": config.runtime.workers, "renderer": config.runtime.renderer}

    def _settle_views(self) -> None:
        """Give views with the filter "auto" that of the model's configuration, which a factory's model carries with it."""
        if "auto" in {self.policy.filter, self.shown.filter}:
            made: nn.Module | None = None
            if is_factory(self.exact):
                names = self.train_canvas.card.class_names
                size = self.policy.size
                made = (
                    self._as_is.make()[0]
                    if 0 in self.durations
                    else create_model(self.exact, len(names), input_size=size, class_names=names)[0]
                )
            own = model_filter(self.exact, self.policy.size, made)
            self.policy, self.shown = self.policy.settled(own), self.shown.settled(own)

    def _start(self, recipe: TeacherRecipe) -> tuple[as_is.Start, bool]:
        """Where weights come from, and whether rates are those of training from scratch."""
        config = self.config
        scratch = not _given(recipe.pretrained, self.source.recipe.pretrained)
        if config.epochs and not any(config.epochs):
            scratch = False  # what is taken as it is has been trained
        if config.from_scratch is not None:
            scratch = config.from_scratch
        elif is_factory(self.exact):
            return "checkpoint" if config.checkpoint else "factory", scratch
        elif not scratch and not config.checkpoint and published(self.exact) is None:
            self.progress.say(f"{self.name} has no published weights: it is trained from scratch")
            scratch = True
        return "checkpoint" if config.checkpoint else "random" if scratch else "timm", scratch

    def _durations(self, recipe: TeacherRecipe) -> list[int]:
        config, suggested = self.config, self.source.recipe
        if config.epochs == "paper":
            if not suggested.durations:
                raise UsageError(
                    f"--epochs paper for {config.subject.dataset}",
                    why="the temperature study compares durations on pets and cifar100 only",
                    fix="name them, for example: --epochs 20,50,200,400",
                )
            return list(suggested.durations)
        durations = list(dict.fromkeys(config.epochs)) or [_given(recipe.epochs, suggested.teacher_epochs)]
        if 0 in durations and self.start == "random":
            raise UsageError(
                f"{config.subject.teacher} from scratch in 0 epochs",
                why="weights are taken as they are"
                + (f" unless --epochs says more: {config.subject.dataset} suggests it" if not config.epochs else "")
                + ", and random ones know nothing",
                fix="say for how long to train: --epochs 100, or which weights to take: --checkpoint FILE",
            )
        return durations

    def _begun(self, epochs: int) -> dict[str, Any]:
        """What a teacher of so many epochs is made from, beside its settings."""
        config = self.config
        begun: dict[str, Any] = {
            "start": self.start,
            "checkpoint_sha256": self.checkpoint_sha256,
            "canvas_digest": self.train_canvas.digest,
            "test_digest": self.test_canvas.digest,
        }
        if epochs:
            begun |= {"smoothing": self.smoothing, "seed": config.seed, "policy": self.policy.model_dump(mode="json")}
        else:
            begun["size"] = self.policy.size
            if not self._as_is.mapping.whole:
                begun["classes_sha256"] = self._as_is.mapping.digest
        return begun | {key: value for key, value in (("mean", config.mean), ("std", config.std)) if value is not None}

    def _said(self, epochs: int) -> dict[str, str]:
        """By what dump-teacher finds weights that were taken as --classes says."""
        return {} if epochs or self.config.classes is None else {"said_sha256": said_digest(self.config.classes)}

    def folder(self, epochs: int) -> Path:
        settings, begun = self.settings[epochs].identity() if epochs else {"epochs": 0}, self._begun(epochs)
        if epochs and self.train_canvas.all_square:  # whose views have not changed since version 1 of policies
            begun["policy"] = self.policy.as_version_1().model_dump(mode="json")
        identity = json.dumps([self.name, settings, begun | self.how_tested.identity()], sort_keys=True)
        label = f"{dataset_label(self.source)}--{folder_name(self.config.subject.teacher)}"
        return self.workspace.teachers / f"{label}--{hashlib.sha256(identity.encode()).hexdigest()[:8]}"

    def _model(self, *, pretrained: bool) -> tuple[nn.Module, Normalisation]:
        names = self.train_canvas.card.class_names
        model, own = create_model(self.exact, len(names), input_size=self.policy.size, pretrained=pretrained, class_names=names)
        return model, self._as_asked(model, own)

    def _as_asked(self, model: nn.Module, own: Normalisation) -> Normalisation:
        assumed = own.assumed and not (self.config.mean and self.config.std)
        self.normalise = Normalisation(self.config.mean or own.mean, self.config.std or own.std, assumed)
        self.tested = views_of_tests(self.how_tested, self.exact, self.policy.size, model)
        return self.normalise

    def finished_model(self, folder: Path) -> nn.Module:
        """The model that was trained there."""
        model, _ = self._model(pretrained=False)
        load_weights(model, next(file for file in (folder / "last.safetensors", folder / "model.safetensors") if file.is_file()))
        return model

    def register(self) -> Teacher:
        """Test weights as they are, and keep them as a teacher."""
        folder, (model, own) = self.folder(0), self._as_is.make()
        self._as_asked(model, own)
        model = model.to(self.device).eval()
        self.progress.say(f"teacher: {self._titled}, weights as they are: they are tested, not trained")
        self._describe(model, selected=not self._as_is.mapping.whole)
        forward = Forward(model, self.normalise, self.device, "fp32")
        row = self._tests(model).of(lambda views: torch.from_numpy(forward(views)))
        if not all(map(math.isfinite, row.values())):
            raise IncompatibleError(
                f"teacher {self.config.subject.teacher} gives logits that are not finite",
                why="its weights are broken, or were made for another input",
                fix="check them, and the model's name",
            )
        weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        write_atomically(folder / "model.safetensors", save(weights))
        return self.record(0, model, row)

    @property
    def _titled(self) -> str:
        return f"{self.config.subject.teacher} = {self.name}, {self.policy.size} px, start {self.start}"

    def _tests(self, model: nn.Module) -> Exam:
        self.progress.say(f"tests: {self.tested.title}")
        for note in doubts(self.how_tested, self.tested, self.exact, self.test_canvas, model):
            self.progress.say(note)
        return Exam(self.test_canvas, self.tested.policy, self.train_canvas, self.shown, self._ahead)

    def train(self, durations: Sequence[int]) -> dict[int, Teacher]:
        """Train teachers of these durations in lockstep, each of which is recorded at its end."""
        config, settings = self.config, self.settings[durations[0]]
        steps = sum(epochs * (len(self.train_canvas) // settings.batch_size) for epochs in durations)
        self.progress.say(
            f"teacher: {self._titled}, {', '.join(map(str, durations))} epochs on {config.subject.dataset} ({steps} steps), "
            f"recipe {self.recipe_name}"
        )
        self._say_doubts(durations)
        stream = ViewStream(
            self.train_canvas,
            self.policy,
            batch_size=settings.batch_size,
            seed=config.seed,
            device=str(self.device),
            **self._ahead,
        )
        learners: dict[int, Learner] = {}
        for epochs in durations:
            with seeded(config.seed):
                model, normalise = self._model(pretrained=self.start == "timm")
                redrawn = load_weights(model, config.checkpoint, replace_head=True) if config.checkpoint else []
            if redrawn and not learners:
                self.progress.say(f"{config.checkpoint} has other classes: {', '.join(redrawn)} start at random")
            if not learners:
                self._describe(model)
            learners[epochs] = Learner(
                self.folder(epochs),
                model,
                normalise,
                self.settings[epochs],
                steps_per_epoch=len(stream),
                seed=config.seed,
                device=self.device,
            )
        made: dict[int, Teacher] = {}

        def keep_finished() -> None:
            for epochs, learner in learners.items():
                if learner.status == "complete" and epochs not in made:
                    made[epochs] = self.record(epochs, learner.model, learner.last)

        keep_finished()  # whose process ended just after their last checkpoint
        _fit(
            list(learners.values()),
            stream,
            self._tests(learners[durations[0]].model),
            self.smoothing,
            keep_finished,
            self.progress,
        )
        for learner in learners.values():
            if learner.status == "diverged":
                raise IncompatibleError(
                    f"teacher {config.subject.teacher} diverged in epoch {learner.epoch - 1}",
                    why="its loss is not finite any more",
                    fix=f"use a smaller --lr than {learner.config.lr:g}",
                )
        return made

    def _describe(self, model: nn.Module, *, selected: bool = False) -> None:
        digest, pretrained = weights_digest(model), self.start == "timm"
        self.progress.say(described(self.exact, model, self.normalise, digest, pretrained=pretrained, selected=selected))

    def _say_doubts(self, durations: Sequence[int]) -> None:
        known, size = published(self.exact), self.policy.size
        if self.start == "timm" and known is not None and known.input_size >= 2 * size:
            self.progress.say(
                f"views have {size} px, and the weights know {known.input_size} px images: little of that is left (which size "
                f"the temperature study had for CIFAR100 is unknown). --size {known.input_size} enlarges them, for students too"
            )
        for settings in (self.settings[epochs] for epochs in durations):
            if settings.sched == "step" and min(settings.decay_epochs) >= settings.epochs:
                late = ",".join(map(str, settings.decay_epochs))
                self.progress.say(f"{settings.epochs} epochs end before the learning rate falls, at --decay-epochs {late}")

    def record(self, epochs: int, model: nn.Module, row: dict[str, float]) -> Teacher:
        """Make a teacher of a finished folder: `row` has its figures on the test images, and its entropies."""
        folder, config = self.folder(epochs), self.config
        settings = self.settings[epochs].model_dump(mode="json") | {"recipe": self.recipe_name} if epochs else {"epochs": 0}
        entropies = {
            "tau": 1.0,
            "clean": {"rows": len(self.test_canvas), "entropy": row["test_entropy"], "entropy_rest": row["test_entropy_rest"]},
            "views": {
                "rows": min(REPORT_VIEWS, len(self.train_canvas)),
                "policy": self.shown.digest,
                "entropy": row["views_entropy"],
                "entropy_rest": row["views_entropy_rest"],
            },
        }
        record = {
            "alias": public_name(config.subject.teacher),
            "name": self.name,
            "dataset": DATASETS.spec(self.source),
            "dataset_label": dataset_label(self.source),
            "class_names": list(self.train_canvas.card.class_names),
            **({"classes": mapped} if not epochs and (mapped := self._as_is.record()) else {}),
            "input_size": self.policy.size,
            "mean": self.normalise.mean,
            "std": self.normalise.std,
            "weights_sha256": weights_digest(model),
            # Weights finetuned from published ones are under their licence; of others only their owner knows.
            "weights_licence": licence(self.exact) if self.start == "timm" else None,
            "test_views": self.tested.model_dump(mode="json"),
            "interpolation": preprocessing(self.exact, self.policy.size, model).interpolation,  # "auto" in the views of a dump
            "top1_clean": row["test_top1"],
            "entropies": entropies,
            "training": {**settings, **self._begun(epochs), **self._said(epochs)},
            **({"cost": cost} if (cost := _cost(folder).known()) else {}),
            "versions": versions(),
            "command": config.command,
        }
        if (folder / "last.safetensors").is_file():
            (folder / "last.safetensors").rename(folder / "model.safetensors")
        made_as = timm_config(
            self.exact, model, self.normalise, self.tested.timm_fields(), self.policy.size, self.train_canvas.card.class_names
        )
        if made_as is not None:
            write_atomically(folder / CONFIG, made_as)
        write_atomically(folder / "teacher.json", (json.dumps(record, indent=1) + "\n").encode())
        self.progress.say(f"teacher: {folder}, top-1 {row['test_top1']:.2f} %")
        return Teacher(folder, record)


def _given(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _settings(config: TeacherConfig, recipe: TeacherRecipe, epochs: int, exact: str, scratch: bool) -> TrainConfig:
    """What the flags say, and else the recipe; and where that is silent, what suits the model."""
    given, published = config.training.given(), dict(recipe.training)
    if given.get("sched", published.get("sched")) != published.get("sched"):
        published.pop("decay_epochs", None)  # they are those of another schedule
    return TrainConfig(**(_suitable(exact, scratch) | published | given), epochs=epochs)


def _suitable(exact: str, scratch: bool) -> dict[str, float]:
    """Learning rate and weight decay: the temperature study's for finetuning; from scratch, its students' rate."""
    is_vit = "vit" in exact and "mobilevit" not in exact
    if scratch:
        return {"lr": 0.002, "weight_decay": 0.05}
    return {"lr": 5e-5, "weight_decay": 0.1} if is_vit else {"lr": 5e-4, "weight_decay": 0.05}


def _fit(
    learners: Sequence[Learner],
    stream: ViewStream,
    tests: Exam,
    smoothing: float,
    keep_finished: Callable[[], None],
    progress: Progress,
) -> None:
    pace, early, seen = Pace(learners), Pace(learners), 0
    with metered(learners[0].device) as meter:
        try:
            with stopped_between_steps() as check:
                for epoch, active, epochs_batches in in_lockstep(learners, lambda learner: learner, stream):
                    for batch, due in epochs_batches:

                        def loss_of(logits: Tensor, labels: Tensor = batch.label_a) -> Tensor:
                            return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)

                        for learner in due:
                            learner.step(batch.images, loss_of, lambda logits: {})
                            check()
                        seen += 1
                        if seen == 2:
                            early = Pace(learners)  # the first batches of all take longer
                        elif seen == 12:
                            left = _duration(early.seconds_left)
                            progress.say(f"training takes about {left} more, without the tests after epochs")
                        progress.update("train teacher", pace.done, pace.total, f"{pace.seconds_left:.0f} s left")
                    testing = [learner for learner in active if learner.tests_next]
                    tested = dict(zip(testing, tests.tested(testing, check) if testing else (), strict=True))
                    for learner, row in tested.items():
                        of = learner.config.epochs
                        if epoch + 1 == of or (epoch + 1) % -(-of // REPORTS) == 0:
                            row |= tests.on_views(learner.predict)
                            check()
                    charge(active, meter.lap())
                    for learner in active:
                        learner.end_epoch(tested.get(learner, {}), view=epoch)
                    keep_finished()
        except Stopped:
            charge([learner for learner in learners if learner.status == "training"], meter.lap())
            for learner in learners:
                learner.suspend()
            raise


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{seconds < 10 * size:d}f} {unit}"
    return f"{seconds:.0f} s"


def _cost(folder: Path) -> Spent:
    """What training took, by its log; nothing is known of weights that were taken as they are."""
    log = folder / "metrics.jsonl"
    return total(Spent.of(json.loads(line)) for line in log.read_text().splitlines()) if log.is_file() else UNKNOWN


def _finished(folder: Path) -> dict[str, float] | None:
    """The last row of metrics of a training that is over; None if it is not."""
    weights = any((folder / name).is_file() for name in ("last.safetensors", "model.safetensors"))
    if not weights or not (folder / "summary.json").is_file() or (folder / "checkpoint.pt").is_file():
        return None
    if read_record(folder / "summary.json").get("status") != "complete":
        return None
    row: dict[str, float] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return row
