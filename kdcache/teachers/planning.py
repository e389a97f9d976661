"""From what `train-teacher` is asked for to what is trained: model, recipe, settings, views, start and folders.

All that can be refused is refused here, before anything is decoded where that is possible.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcache.datasets import Source, published_name
from kdcache.datasets.canvas import Canvas, require_intact
from kdcache.errors import IncompatibleError, UsageError
from kdcache.models.classes import said_digest
from kdcache.models.creation import Normalisation, create_model, has_new_head, load_weights, published
from kdcache.models.names import WEIGHTS, folder_name, is_factory, public_name, resolve, weights_identity
from kdcache.models.recorded import require_recorded
from kdcache.system.files import set_aside
from kdcache.system.progress import Progress
from kdcache.teachers import as_is
from kdcache.teachers.config import TeacherConfig
from kdcache.teachers.head import linear_head, suitable_start
from kdcache.teachers.recipes import RECIPES, TeacherRecipe, durations_of, settings_of, teacher_recipe
from kdcache.training.config import Training, under_present_names
from kdcache.training.devices import seeded
from kdcache.training.optimizers import make_optimizer
from kdcache.training.tested import model_filter, views_of_tests
from kdcache.views.policy import ViewPolicy
from kdcache.workspace import Workspace, dataset_label, parse_dataset, read_teacher, require_writable

__all__ = ["FOLDER", "TeacherPlan"]

FOLDER = "folder"  # in a teacher's record: the name that its folder was made with
VIEW_SEED = 0x7EAC4E5  # the teacher's own views; those of a dump have the policy's seed


class TeacherPlan:
    """What a configuration comes to, for a teacher of each of `durations`: each has its settings and its folder.

    Made where the canvases are decoded, if they are not there; `source` and `canvas`, of the training images, are the
    dataset's where they are at hand already. Raises what is wrong with the configuration.
    """

    def __init__(
        self, config: TeacherConfig, workspace: Workspace, progress: Progress, source: Source | None, canvas: Canvas | None
    ) -> None:
        self.config, self.workspace, self.progress = config, workspace, progress
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
            views_of_tests(self.how_tested, self.exact, self.policy.size)
        self.smoothing = recipe.smoothing if config.smoothing is None else config.smoothing
        self.settings = {
            epochs: settings_of(recipe, config.training, epochs, self.exact, scratch) for epochs in self.durations if epochs
        }
        self.checkpoint_sha256 = weights_identity(config.checkpoint) if config.checkpoint else None
        self._require_trainable()
        as_is.require_use(config.classes, self.durations, config.head_epochs)
        self.taken = self._take_as_is() if 0 in self.durations and not config.head_epochs else None

        self.train_canvas = (
            canvas
            if canvas is not None
            else workspace.canvas(self.source, "train", config.views.canvas, progress, tell=True, building=self._require_room)
        )
        self.test_canvas = workspace.canvas(self.source, "test", config.views.canvas, progress, building=self._require_room)
        for each in (self.train_canvas, self.test_canvas):
            require_intact(each)
        self._settle_views()
        self._settle_head()
        if not all((self.folder(epochs) / "teacher.json").is_file() for epochs in self.durations):
            self._require_room()

    def _require_room(self) -> None:
        """Better before images are decoded and teachers trained."""
        require_writable(self.workspace.teachers)

    def _take_as_is(self) -> as_is.AsIs:
        """The weights as they are, with the outputs that are this dataset's classes."""
        taken = as_is.take(
            self.exact,
            tuple(self.source.open(self.workspace.data, self.progress).class_names()),
            self.config.subject,
            self.start,
            checkpoint=self.config.checkpoint,
            classes=self.config.classes,
            input_size=self.policy.size,
        )
        for line in taken.note():
            self.progress.say(line)
        return taken

    def _settle_head(self) -> None:
        """Whether the model's head is new, and what the recipe wants of it then."""
        pretrained, classes = self.start in {"checkpoint", "timm"}, len(self.train_canvas.card.class_names)
        self.new_head = pretrained and has_new_head(self.exact, classes, self.config.checkpoint)
        if self.config.recipe is None and self.recipe_name == "lp-ft" and not self.new_head:  # without one, it is the study's
            self.recipe_name, self.recipe = "study", RECIPES["study"]
        if self.new_head:
            self._suit_head()

    def _suit_head(self) -> None:
        """Leave out what the recipe wants of a new head, and this model's cannot do."""
        open_init = "head_init" not in self.config.training.given() and self.training.head_init == "zero"
        open_probe = self.config.head_epochs is None and self.recipe.head_epochs > 0
        if not (open_init or open_probe):
            return
        with seeded(self.config.seed):
            model = self.model(pretrained=False)
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
                made = self.model(pretrained=False) if self.taken is None else self.taken.make()[0]
            own = model_filter(self.exact, self.policy.size, made)
            self.policy, self.shown = self.policy.settled(own), self.shown.settled(own)

    def _start(self, recipe: TeacherRecipe) -> tuple[as_is.Start, bool]:
        """Where weights come from, and whether rates are those of training from scratch."""
        config = self.config
        suits = self.source.recipe.pretrained if recipe.pretrained is None else recipe.pretrained
        scratch = not suits
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

    def begun(self, epochs: int) -> dict[str, Any]:
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
            if self.taken is not None and not self.taken.mapping.whole:
                begun["classes_sha256"] = self.taken.mapping.digest
        return begun | {key: value for key, value in (("mean", config.mean), ("std", config.std)) if value is not None}

    def said(self, epochs: int) -> dict[str, str]:
        """By what dump-teacher finds weights that were taken as --classes says."""
        return {} if epochs or self.config.classes is None else {"said_sha256": said_digest(self.config.classes)}

    def folder(self, epochs: int) -> Path:
        settings, begun = self.settings[epochs].identity() if epochs else {"epochs": 0}, self.begun(epochs)
        if epochs and self.train_canvas.all_square:  # whose views have not changed since version 1 of policies
            begun["policy"] = self.policy.as_version_1().model_dump(mode="json")
        identity = json.dumps([self.name, settings, begun | self.how_tested.identity()], sort_keys=True)
        label = f"{dataset_label(self.source)}--{folder_name(self.config.subject.teacher)}"
        return self.workspace.teachers / f"{label}--{hashlib.sha256(identity.encode()).hexdigest()[:8]}"

    def require_own(self, epochs: int) -> None:
        """Raise IncompatibleError if the folder of a teacher of so many epochs has another one: it was copied or renamed."""
        folder = self.folder(epochs)
        record = read_teacher(folder)
        # Views differ where they have not changed since version 1 of policies; that, and settings, are in the folder's name.
        begun = {key: value for key, value in self.begun(epochs).items() if key != "policy"}
        wanted = json.loads(json.dumps({"name": self.name, "epochs": epochs, **begun, FOLDER: folder.name}))
        there = {**under_present_names(record["training"]), "name": record["name"], FOLDER: record.get(FOLDER, folder.name)}
        if other := [name for name, value in wanted.items() if there.get(name, value) != value]:
            what = (
                f"its {other[0]} is {there[other[0]]}, not {wanted[other[0]]}"
                if other != [FOLDER]
                else f"made as {there[FOLDER]}"
            )
            raise IncompatibleError(
                f"{folder} has another teacher: {what}",
                why="the folder was copied, renamed or exchanged: folders are named after how a teacher was made",
                fix=f"give it its own name again; or set it aside, and repeat the command: {set_aside(folder)}",
            )
        if (folder / WEIGHTS).is_file():
            require_recorded(folder / WEIGHTS)

    def model(self, *, pretrained: bool) -> nn.Module:
        names, size = self.train_canvas.card.class_names, self.policy.size
        options: Any = {"pretrained": pretrained, "class_names": names, "drop_path": self.training.drop_path}
        model, own = create_model(self.exact, len(names), input_size=size, **options)
        self.show_as_asked(model, own)
        return model

    def show_as_asked(self, model: nn.Module, own: Normalisation) -> None:
        """Fix how pixels are normalised and test images shown: as asked for, or as the model says."""
        assumed = own.assumed and not (self.config.mean and self.config.std)
        self.normalise = Normalisation(self.config.mean or own.mean, self.config.std or own.std, assumed)
        self.tested = views_of_tests(self.how_tested, self.exact, self.policy.size, model)

    def finished_model(self, folder: Path) -> nn.Module:
        """The model that was trained there."""
        model = self.model(pretrained=False)
        load_weights(model, next(file for file in (folder / "last.safetensors", folder / "model.safetensors") if file.is_file()))
        return model
