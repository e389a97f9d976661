"""train-teacher: finetune a timm model on a dataset, train it from scratch, or take its weights as they are.

Teachers of several durations are trained in lockstep on one stream of views, each by a schedule of its own; what each of
them becomes is what it would have become alone.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from kdcache.datasets import DATASETS, Source, published_name
from kdcache.datasets.canvas import Canvas, require_intact
from kdcache.errors import IncompatibleError, UsageError
from kdcache.models.classes import said_digest
from kdcache.models.creation import (
    Normalisation,
    create_model,
    described,
    has_new_head,
    licence,
    load_weights,
    published,
    timm_config,
    weights_digest,
)
from kdcache.models.heads import zero_head
from kdcache.models.names import CONFIG, folder_name, is_factory, public_name, resolve
from kdcache.models.preprocessing import preprocessing
from kdcache.replay.stream import ViewStream
from kdcache.system.energy import total
from kdcache.system.files import write_atomically
from kdcache.system.progress import Progress, Silent
from kdcache.teachers import as_is
from kdcache.teachers.config import TeacherConfig
from kdcache.teachers.finetuning import cost_of, finetune, finished_row
from kdcache.teachers.forward import Forward
from kdcache.teachers.head import HEAD, Head, head_settings, linear_head, read_head, suitable_start, train_head
from kdcache.teachers.recipes import RECIPES, TeacherRecipe, durations_of, own_flags, settings_of, teacher_recipe
from kdcache.teachers.registry import REPORT_VIEWS, Exam, Teacher, compared, doubt, file_digest, registered
from kdcache.training.checkpoint import copied
from kdcache.training.config import Training
from kdcache.training.devices import resolve_device, seeded
from kdcache.training.learner import Learner
from kdcache.training.optimizers import make_optimizer
from kdcache.training.tested import doubts, model_filter, views_of_tests
from kdcache.views.policy import ViewPolicy
from kdcache.workspace import Workspace, dataset_label, parse_dataset, read_record, require_writable, versions

__all__ = ["train_teacher", "train_teachers"]

VIEW_SEED = 0x7EAC4E5  # the teacher's own views; those of a dump have the policy's seed
HEAD_SEED = 0x7EAC4EAD  # those that its head is trained on alone


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
            made[epochs] = registered(folder, job.said(epochs).get("said_sha256"))
        elif not epochs and not job.head_epochs(0):
            made[epochs] = job.register()
        elif (row := finished_row(folder)) is not None:  # and its process ended before it could say so
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
        self.recipe_name, recipe = teacher_recipe(config.recipe, self.exact, published_name(self.source))
        self.recipe, self.training = recipe, Training(**dict(recipe.training) | config.training.given())
        self.start, scratch = self._start(recipe)
        self.durations = durations_of(config, recipe, suggested, self.start)
        drawn = ViewPolicy.draft(config.views.policy or recipe.policy or suggested.policy, size=config.views.size)
        self.policy = drawn.model_copy(update={"seed": VIEW_SEED, "mix": None})
        self.shown = ViewPolicy.draft(config.views.policy or suggested.policy, size=self.policy.size)  # as a dump has them
        self.how_tested = config.tested.otherwise(suggested.test_policy)
        if not is_factory(self.exact):  # whose model has to be made first
            views_of_tests(self.how_tested, self.exact, self.policy.size)  # refused before anything is decoded
        self.smoothing = _given(config.smoothing, recipe.smoothing)
        self.settings = {
            epochs: settings_of(recipe, config.training, epochs, self.exact, scratch) for epochs in self.durations if epochs
        }
        self.checkpoint_sha256 = file_digest(config.checkpoint) if config.checkpoint else None
        require_writable(workspace.teachers)
        self._described = False
        self._require_trainable()
        self._as_they_are = 0 in self.durations and not config.head_epochs
        as_is.require_use(config.classes, self.durations, config.head_epochs)
        if self._as_they_are:  # what cannot be taken as it is is refused before anything is decoded
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
        pretrained, classes = self.start in {"checkpoint", "timm"}, len(self.train_canvas.card.class_names)
        self.new_head = pretrained and has_new_head(self.exact, classes, config.checkpoint)
        if config.recipe is None and self.recipe_name == "lp-ft" and not self.new_head:  # without one, it is the study's
            self.recipe_name, self.recipe = "study", RECIPES["study"]
        if self.new_head:
            self._suit_head()
        self._ahead: Any = {"workers": config.runtime.workers, "renderer": config.runtime.renderer}

    def _suit_head(self) -> None:
        """Leave out what the recipe wants of a new head, and this model's cannot do."""
        open_init = "head_init" not in self.config.training.given() and self.training.head_init == "zero"
        open_probe = self.config.head_epochs is None and self.recipe.head_epochs > 0
        if not (open_init or open_probe):
            return
        with seeded(self.config.seed):
            model = self._model(pretrained=False)
        wanted = "zero" if open_init else "timm"
        head_init, probe, notes = suitable_start(model, self.name, self.policy.size, wanted, probe=open_probe)
        if open_init:
            self.training = self.training.but(head_init=head_init)
        if open_probe and not probe:
            self.recipe = replace(self.recipe, head_epochs=0)
        for note in notes:
            self.progress.say(note)

    def _settle_views(self) -> None:
        """Give views with the filter "auto" that of the model's configuration, which a factory's model carries with it."""
        if "auto" in {self.policy.filter, self.shown.filter}:
            made: nn.Module | None = None
            if is_factory(self.exact):
                made = self._as_is.make()[0] if self._as_they_are else self._model(pretrained=False)
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

    def _require_trainable(self) -> None:
        """Refuse what the model cannot be trained by, as far as that is known before anything is decoded."""
        config, asked = self.config, self.config.training
        if config.head_epochs and self.start == "random":
            raise UsageError(
                f"--head-epochs {config.head_epochs} from scratch",
                why="a head learns from the features of trained weights, and random ones have none",
                fix="leave --head-epochs out, or start from weights: --pretrained or --checkpoint FILE",
            )
        of_optimizer = asked.layer_decay is not None or asked.opt_betas is not None
        if is_factory(self.exact) or not (config.head_epochs or of_optimizer or asked.drop_path is not None):
            return
        with seeded(config.seed):
            model, _ = create_model(self.exact, 10, input_size=self.policy.size, drop_path=self.training.drop_path)
        if self.settings and of_optimizer:
            make_optimizer(model, next(iter(self.settings.values())))
        if config.head_epochs:
            linear_head(model, self.name, self.policy.size, torch.device("cpu"))

    def head_epochs(self, epochs: int) -> int:
        """Epochs in which the head of a teacher of so many epochs is trained alone. Recipes are for new heads to finetune."""
        suggested = self.recipe.head_epochs if epochs and self.new_head else 0
        return suggested if self.config.head_epochs is None else self.config.head_epochs

    def _begun(self, epochs: int) -> dict[str, Any]:
        """What a teacher of so many epochs is made from, beside its settings."""
        config = self.config
        begun: dict[str, Any] = {
            "start": self.start,
            "checkpoint_sha256": self.checkpoint_sha256,
            "canvas_digest": self.train_canvas.digest,
            "test_digest": self.test_canvas.digest,
        }
        if head := self.head_epochs(epochs):
            begun |= {"head_epochs": head}
            if not epochs:  # else it is among the settings
                begun |= self.training.model_dump(include={"batch_size", "amp"}, exclude_none=True)
        if (epochs or head) and self.new_head and self.training.head_init == "zero":
            begun |= {"head_init": "zero"}
        if epochs or head:
            begun |= {"smoothing": self.smoothing, "seed": config.seed, "policy": self.policy.model_dump(mode="json")}
        else:
            begun["size"] = self.policy.size
            if not self._as_is.mapping.whole:
                begun["classes_sha256"] = self._as_is.mapping.digest
        return begun | {key: value for key, value in (("mean", config.mean), ("std", config.std)) if value is not None}

    def said(self, epochs: int) -> dict[str, str]:
        """By what dump-teacher finds weights that were taken as --classes says."""
        return {} if epochs or self.config.classes is None else {"said_sha256": said_digest(self.config.classes)}

    def folder(self, epochs: int) -> Path:
        settings, begun = self.settings[epochs].identity() if epochs else {"epochs": 0}, self._begun(epochs)
        if epochs and self.train_canvas.all_square:  # whose views have not changed since version 1 of policies
            begun["policy"] = self.policy.as_version_1().model_dump(mode="json")
        identity = json.dumps([self.name, settings, begun | self.how_tested.identity()], sort_keys=True)
        label = f"{dataset_label(self.source)}--{folder_name(self.config.subject.teacher)}"
        return self.workspace.teachers / f"{label}--{hashlib.sha256(identity.encode()).hexdigest()[:8]}"

    def _model(self, *, pretrained: bool) -> nn.Module:
        names, size = self.train_canvas.card.class_names, self.policy.size
        options: Any = {"pretrained": pretrained, "class_names": names, "drop_path": self.training.drop_path}
        model, own = create_model(self.exact, len(names), input_size=size, **options)
        self._show_as_asked(model, own)
        return model

    def _show_as_asked(self, model: nn.Module, own: Normalisation) -> None:
        """Fix how pixels are normalised and test images shown: as asked for, or as the model says."""
        assumed = own.assumed and not (self.config.mean and self.config.std)
        self.normalise = Normalisation(self.config.mean or own.mean, self.config.std or own.std, assumed)
        self.tested = views_of_tests(self.how_tested, self.exact, self.policy.size, model)

    def finished_model(self, folder: Path) -> nn.Module:
        """The model that was trained there."""
        model = self._model(pretrained=False)
        load_weights(model, next(file for file in (folder / "last.safetensors", folder / "model.safetensors") if file.is_file()))
        return model

    def register(self) -> Teacher:
        """Test weights as they are, and keep them as a teacher."""
        model, own = self._as_is.make()
        self._show_as_asked(model, own)
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
        return self._kept(model, row)

    def _kept(self, model: nn.Module, row: dict[str, float]) -> Teacher:
        """Make a teacher of a model that is not finetuned."""
        write_atomically(self.folder(0) / "model.safetensors", save(copied(model)))
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
        config, batch_size = self.config, self.training.batch_size
        steps = sum(epochs * (len(self.train_canvas) // batch_size) for epochs in durations)
        self.progress.say(
            f"teacher: {self._titled}, {', '.join(map(str, durations))} epochs on {config.subject.dataset} ({steps} steps), "
            f"recipe {self.recipe_name}{own_flags(config)}"
        )
        if self.recipe_name == "lp-ft" and self.new_head:
            self.progress.say(
                "recipe lp-ft is the temperature study's, except that a new head starts at zero and is trained alone first; "
                "--recipe study does as the paper does"
            )
        self._say_doubts(durations)
        first = self._started()
        tests = self._tests(first)
        head = self._head(durations, first, tests)
        if head is not None:
            self.progress.say(f"the head alone, on frozen features, has a top-1 of {head.row['test_top1']:.2f} %")
        made: dict[int, Teacher] = {}
        if 0 in durations and head is not None:
            made[0] = self._kept(self._started(head), head.row)
        stream = self._stream(self.policy)
        learners = {
            epochs: Learner(
                self.folder(epochs),
                first if head is None and epochs == durations[0] else self._started(head),
                self.normalise,
                self.settings[epochs],
                steps_per_epoch=len(stream),
                seed=config.seed,
                device=self.device,
            )
            for epochs in durations
            if epochs
        }

        def keep_finished() -> None:
            for epochs, learner in learners.items():
                if learner.status == "complete" and epochs not in made:
                    made[epochs] = self.record(epochs, learner.model, learner.last)

        keep_finished()  # whose process ended just after their last checkpoint
        if learners:
            finetune(list(learners.values()), stream, tests, self.smoothing, keep_finished, self.progress)
        for learner in learners.values():
            if learner.status == "diverged":
                raise IncompatibleError(
                    f"teacher {config.subject.teacher} diverged in epoch {learner.epoch - 1}",
                    why="its loss is not finite any more",
                    fix=f"use a smaller --lr than {learner.config.lr:g}",
                )
        return made

    def _stream(self, policy: ViewPolicy) -> ViewStream:
        return ViewStream(
            self.train_canvas,
            policy,
            batch_size=self.training.batch_size,
            seed=self.config.seed,
            device=str(self.device),
            **self._ahead,
        )

    def _started(self, head: Head | None = None) -> nn.Module:
        """The model that training starts from, with this head."""
        config = self.config
        with seeded(config.seed):
            model = self._model(pretrained=self.start == "timm")
            redrawn = load_weights(model, config.checkpoint, replace_head=True) if config.checkpoint else []
        zero = self.new_head and self.training.head_init == "zero"
        if zero:
            zero_head(model, self.name)
        if not self._described:
            if redrawn:
                how = "zero" if zero else "random"
                self.progress.say(f"{config.checkpoint} has other classes: {', '.join(redrawn)} start at {how}")
            self._describe(model)
            self._described = True
        if head is not None:
            head.put_into(model)
        return model

    def _head(self, durations: Sequence[int], model: nn.Module, tests: Exam) -> Head | None:
        """The head that these teachers start with: kept by an earlier command, or trained now. None if they need none."""
        epochs = self.head_epochs(max(durations))
        if not epochs:
            return None
        folders = [self.folder(each) for each in durations]
        head = next(filter(None, (read_head(self.folder(each)) for each in self.durations)), None)
        if head is None:
            fresh = self.policy.model_copy(update={"seed": HEAD_SEED})
            settings = head_settings(epochs, self.training.batch_size, self.training.amp)
            self.progress.say(f"first the head alone, on frozen features: {epochs} epochs")
            return train_head(
                model,
                self.normalise,
                self.name,
                folders,
                self._stream(fresh),
                settings,
                self.smoothing,
                tests,
                self.progress,
            )
        for folder in folders:
            if not (folder / HEAD).is_file():
                head.write(folder)
        return head

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
        for settings in (self.settings[epochs] for epochs in durations if epochs):
            if settings.sched == "step" and min(settings.decay_epochs) >= settings.epochs:
                late = ",".join(map(str, settings.decay_epochs))
                self.progress.say(f"{settings.epochs} epochs end before the learning rate falls, at --decay-epochs {late}")

    def record(self, epochs: int, model: nn.Module, row: dict[str, float]) -> Teacher:
        """Make a teacher of a finished folder: `row` has its figures on the test images, and its entropies."""
        folder, config = self.folder(epochs), self.config
        settings: dict[str, Any] = {"epochs": 0}
        if epochs:
            settings = self.settings[epochs].model_dump(mode="json", exclude={"head_init"}) | {"recipe": self.recipe_name}
            settings["amp"] = read_record(folder / "summary.json").get("amp", False)  # as it was, whatever was asked for
        if self.new_head and (epochs or self.head_epochs(epochs)):
            settings["head_init"] = self.training.head_init
        mapped = None if epochs or self.head_epochs(epochs) else self._as_is.record()
        cost, head = cost_of(folder), read_head(folder)
        if head is not None:
            settings["head_top1"] = head.row["test_top1"]
            settings.setdefault("amp", head.amp)
            cost = total([cost, head.spent]) if epochs else head.spent
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
            **({"classes": mapped} if mapped else {}),
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
            "training": {**settings, **self._begun(epochs), **self.said(epochs)},
            **({"cost": cost.known()} if cost.known() else {}),
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
