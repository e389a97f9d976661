"""train-teacher: finetune a timm model on a dataset, train it from scratch, or take its weights as they are.

Teachers of several durations are trained in lockstep on one stream of views, each by a schedule of its own; what each of
them becomes is what it would have become alone.
"""

import contextlib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdcache.datasets import DATASETS, Source
from kdcache.datasets.canvas import Canvas
from kdcache.errors import IncompatibleError, RetryError
from kdcache.models.creation import described, licence, load_weights, published, timm_config, weights_digest
from kdcache.models.heads import zero_head
from kdcache.models.names import CONFIG, public_name
from kdcache.models.preprocessing import preprocessing
from kdcache.replay.stream import ViewStream
from kdcache.system.distributed import ALONE, Team, joined, this_rank
from kdcache.system.energy import total
from kdcache.system.files import write_atomically
from kdcache.system.progress import Progress, Silent
from kdcache.system.seals import WEIGHTS_SEALS, sealed_record
from kdcache.teachers.config import TeacherConfig
from kdcache.teachers.finetuning import cost_of, finetune, finished_row
from kdcache.teachers.forward import Forward
from kdcache.teachers.head import HEAD, Head, head_settings, read_head, train_head
from kdcache.teachers.planning import FOLDER, TeacherPlan
from kdcache.teachers.recipes import own_flags
from kdcache.teachers.registry import REPORT_VIEWS, Exam, Teacher, compared, doubt, registered, teacher_at
from kdcache.training.checkpoint import copied, tidy, weights_seals, write_weights
from kdcache.training.devices import enough_memory, memory_elsewhere, resolve_device, seeded
from kdcache.training.keeping import kept_outputs
from kdcache.training.learner import Learner
from kdcache.training.lockstep import in_halves_if_needed, raise_unfit, smaller_batches, suspended_at_errors
from kdcache.training.outputs import TEST_OUTPUTS
from kdcache.training.tested import doubts
from kdcache.views.policy import ViewPolicy
from kdcache.workspace import Workspace, dataset_label, read_record, versions

__all__ = ["train_teacher", "train_teachers"]

HEAD_SEED = 0x7EAC4EAD  # of the views that a head is trained on alone


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
    team: Team | None = None,
) -> list[Teacher]:
    """Train as configured, one teacher for each number of epochs; what was trained just so before is returned as it is.

    `source` and `canvas`, of the training images, are the dataset's where they are at hand already. The processes that
    torchrun started train some of the teachers each, or all of them train every teacher together; with `team` ALONE, this
    process trains by itself whatever others there are.
    """
    device = resolve_device(config.runtime.device)
    beforehand = enough_memory(  # what comes before training, or takes its place
        f"no memory is left on {device} or its host for teacher {config.subject.teacher}", fix=memory_elsewhere(device)
    )
    with joined(this_rank(), device) if team is None else contextlib.nullcontext(team) as team, beforehand:
        progress = progress if progress is not None and team.first else Silent()
        with team.first_alone():  # it decodes the dataset, and fetches weights
            plan = TeacherPlan(config, workspace, progress, source, canvas)
            job = _Job(plan, device, team, progress)
        if team.first:
            job.keep_what_is_there()
        team.wait()
        missing = [epochs for epochs in plan.durations if not (plan.folder(epochs) / "teacher.json").is_file()]
        if missing := team.shared(missing)[0]:
            with enough_memory(*job.too_large(team)):
                job.train(missing)
        team.wait()
        teachers = [teacher_at(plan.folder(epochs)) for epochs in plan.durations]
    labels = plan.train_canvas.labels
    for line in [*compared(teachers), *filter(None, (doubt(teacher, labels) for teacher in teachers))]:
        progress.say(line)
    return teachers


class _Job:
    """Makes the teachers of a plan, all processes of `team` together or some of them each."""

    def __init__(self, plan: TeacherPlan, device: torch.device, team: Team, progress: Progress) -> None:
        self.plan, self.device, self.team, self.progress = plan, device, team, progress
        self._described = False
        runtime = plan.config.runtime
        self._ahead: Any = {"workers": runtime.workers, "renderer": runtime.renderer}

    def too_large(self, team: Team) -> tuple[str, str]:
        """What happened if a teacher does not fit into memory, its batches divided among `team`, and how to mend it."""
        size = self.plan.training.batch_size
        return (
            f"teacher {self.plan.config.subject.teacher} does not fit into the memory of {self.device}, with batches of {size}",
            f"end what else uses it, or train it on {smaller_batches(size, team)}",
        )

    def keep_what_is_there(self) -> None:
        """Make teachers of weights as they are, and of folders whose process ended before it could say that it was over."""
        plan = self.plan
        for epochs in plan.durations:
            folder = plan.folder(epochs)
            if (folder / "teacher.json").is_file():
                plan.require_own(epochs)
                self.progress.say(f"teacher: {folder} (already {'trained' if epochs else 'tested'})")
                registered(folder, plan.said(epochs).get("said_sha256"))
            elif not epochs and not plan.head_epochs(0):
                self._register()
            elif (row := finished_row(folder)) is not None:
                self._record(epochs, plan.finished_model(folder), row)
            else:
                continue
            tidy(folder)

    def _register(self) -> None:
        """Test weights as they are, and keep them as a teacher."""
        plan, taken = self.plan, self.plan.taken
        assert taken is not None
        model, own = taken.make()
        plan.show_as_asked(model, own)
        model = model.to(self.device).eval()
        self.progress.say(f"teacher: {self._titled}, weights as they are: they are tested, not trained")
        self._describe(model, selected=not taken.mapping.whole)
        forward = Forward(model, plan.normalise, self.device, "fp32")
        row = self._tests(model, ALONE).of(lambda views: torch.from_numpy(forward(views)))
        if not all(map(math.isfinite, row.values())):
            raise IncompatibleError(
                f"teacher {plan.config.subject.teacher} gives logits that are not finite",
                why="its weights are broken, or were made for another input",
                fix="check them, and the model's name",
            )
        self._keep(model, row)

    def _keep(self, model: nn.Module, row: dict[str, float]) -> None:
        """Make a teacher of a model that is not finetuned."""
        write_weights(self.plan.folder(0) / "model.safetensors", copied(model))
        self._record(0, model, row)

    @property
    def _titled(self) -> str:
        plan = self.plan
        return f"{plan.config.subject.teacher} = {plan.name}, {plan.policy.size} px, start {plan.start}"

    def _tests(self, model: nn.Module, team: Team) -> Exam:
        plan = self.plan
        self.progress.say(f"tests: {plan.tested.title}")
        for note in doubts(plan.how_tested, plan.tested, plan.exact, plan.test_canvas, model):
            self.progress.say(note)
        return Exam(
            plan.test_canvas, plan.tested.policy, plan.train_canvas, plan.shown, self._ahead | {"device": self.device}, team
        )

    def train(self, durations: Sequence[int]) -> None:
        """Train teachers of these durations, each of which is recorded at its end."""
        plan, config, team = self.plan, self.plan.config, self.team
        finetuned = [epochs for epochs in durations if epochs]
        steps = sum(epochs * (len(plan.train_canvas) // plan.training.batch_size) for epochs in durations)
        self.progress.say(
            f"teacher: {self._titled}, {', '.join(map(str, durations))} epochs on {config.subject.dataset} ({steps} steps), "
            f"recipe {plan.recipe_name}{own_flags(config)}"
        )
        if plan.recipe_name == "lp-ft" and plan.new_head:
            self.progress.say(
                "recipe lp-ft is the temperature study's, except that a new head starts at zero and is trained alone first; "
                "--recipe study does as the paper does"
            )
        self._say_doubts(durations)
        divided = team.size > 1 and _by_teachers(config, len(finetuned), team.size)
        if divided:
            each = f"each trains {len(finetuned) / team.size:.3g} of {len(finetuned)} teachers"
            self.progress.say(f"{team.size} processes: {each}")
        elif team.size > 1:
            self.progress.say(f"{team.size} processes: each has {plan.training.batch_size // team.size} views of every batch")
        together = ALONE if divided else team
        with team.first_alone():  # it fetches weights
            first = self._started()
        if together.size > 1 and self.device.type != "cuda" and any(isinstance(each, _BatchNorm) for each in first.modules()):
            device = self.device.type
            self.progress.say(f"{plan.name}: on a {device}, batch normalisation sees each process's part of a batch only")
        tests = self._tests(first, together)
        with team.first_alone() if divided else contextlib.nullcontext():  # the others find its head
            head = self._head(durations, first, tests, together)
        if head is not None:
            self.progress.say(f"the head alone, on frozen features, has a top-1 of {head.row['test_top1']:.2f} %")
            if 0 in durations and team.first:
                self._keep(self._started(head), head.row)
        del first
        if divided:
            finetuned = finetuned[slice(*(len(finetuned) * number // team.size for number in (team.number, team.number + 1)))]

        def finetune_at_once(part: list[int]) -> None:
            self._finetune(part, head, tests, together)

        def is_recorded(epochs: int) -> bool:
            return (plan.folder(epochs) / "teacher.json").is_file()

        unfit: list[RetryError] = []
        if finetuned:
            with team.apart() if divided else contextlib.nullcontext():
                unfit = in_halves_if_needed(
                    finetuned,
                    finetune_at_once,
                    is_recorded,
                    lambda epochs: self.too_large(together),
                    "teachers",
                    together,
                    self.progress,
                )
        if divided:
            team.wait()  # for a process that fails before, torchrun would end all others
            unfit = list(itertools.chain.from_iterable(team.shared(unfit)))
        raise_unfit(unfit, len(durations), "teachers")

    def _finetune(self, durations: Sequence[int], head: Head | None, tests: Exam, team: Team) -> None:
        """Train teachers of these durations at once."""
        plan = self.plan
        stream = self._stream(plan.policy, team)
        learners: dict[int, Learner] = {}

        def keep_finished() -> None:
            for epochs, learner in learners.items():
                if learner.status == "complete" and team.first and not (plan.folder(epochs) / "teacher.json").is_file():
                    self._record(epochs, learner.model, learner.last, team)

        with suspended_at_errors(lambda: list(learners.values()), team):
            for epochs in durations:
                learners[epochs] = Learner(
                    plan.folder(epochs),
                    self._started(head),
                    plan.normalise,
                    plan.settings[epochs],
                    steps_per_epoch=len(stream),
                    seed=plan.config.seed,
                    device=self.device,
                    team=team,
                )
        keep_finished()  # whose process ended just after their last checkpoint
        finetune(list(learners.values()), stream, tests, plan.smoothing, keep_finished, team, self.progress)
        for learner in learners.values():
            if learner.status == "diverged":
                raise IncompatibleError(
                    f"teacher {plan.config.subject.teacher} diverged in epoch {learner.epoch - 1}",
                    why="its loss is not finite any more",
                    fix=f"use a smaller --lr than {learner.config.lr:g}",
                )

    def _stream(self, policy: ViewPolicy, team: Team) -> ViewStream:
        return ViewStream(
            self.plan.train_canvas,
            policy,
            batch_size=self.plan.training.batch_size,
            seed=self.plan.config.seed,
            device=str(self.device),
            part=(team.number, team.size),
            progress=self.progress,
            **self._ahead,
        )

    def _started(self, head: Head | None = None) -> nn.Module:
        """The model that training starts from, with this head."""
        plan, checkpoint = self.plan, self.plan.config.checkpoint
        with seeded(plan.config.seed):
            model = plan.model(pretrained=plan.start == "timm")
            redrawn = load_weights(model, checkpoint, replace_head=True) if checkpoint else []
        zero = plan.new_head and plan.training.head_init == "zero"
        if zero:
            zero_head(model, plan.name)
        if not self._described:
            if redrawn:
                how = "zero" if zero else "random"
                self.progress.say(f"{checkpoint} has other classes: {', '.join(redrawn)} start at {how}")
            self._describe(model)
            self._described = True
        if head is not None:
            head.put_into(model)
        return model

    def _head(self, durations: Sequence[int], model: nn.Module, tests: Exam, team: Team) -> Head | None:
        """The head that these teachers start with: kept by an earlier command, or trained now. None if they need none."""
        plan = self.plan
        epochs = plan.head_epochs(max(durations))
        if not epochs:
            return None
        folders = [plan.folder(each) for each in durations]
        head = next(filter(None, (read_head(plan.folder(each)) for each in plan.durations)), None)
        team.wait()  # before the first process may write one
        if head is None:
            fresh = plan.policy.model_copy(update={"seed": HEAD_SEED})
            settings = head_settings(epochs, plan.training.batch_size, plan.training.amp)
            self.progress.say(f"first the head alone, on frozen features: {epochs} epochs")
            stream = self._stream(fresh, team)
            return train_head(
                model, plan.normalise, plan.name, folders, stream, settings, plan.smoothing, tests, team, self.progress
            )
        for folder in folders if team.first else ():
            if not (folder / HEAD).is_file():
                head.write(folder)
        return head

    def _describe(self, model: nn.Module, *, selected: bool = False) -> None:
        plan = self.plan
        digest, pretrained = weights_digest(model), plan.start == "timm"
        self.progress.say(described(plan.exact, model, plan.normalise, digest, pretrained=pretrained, selected=selected))

    def _say_doubts(self, durations: Sequence[int]) -> None:
        plan = self.plan
        known, size = published(plan.exact), plan.policy.size
        if plan.start == "timm" and known is not None and known.input_size >= 2 * size:
            self.progress.say(
                f"views have {size} px, and the weights know {known.input_size} px images: little of that is left (and "
                f"less than the temperature study's accuracies need). --size {known.input_size} enlarges them, for students too"
            )
        for settings in (plan.settings[epochs] for epochs in durations if epochs):
            if settings.sched == "step" and min(settings.decay_epochs) >= settings.epochs:
                late = ",".join(map(str, settings.decay_epochs))
                self.progress.say(f"{settings.epochs} epochs end before the learning rate falls, at --decay-epochs {late}")

    def _record(self, epochs: int, model: nn.Module, row: dict[str, float], team: Team = ALONE) -> None:
        """Make a teacher of a finished folder: `row` has its figures on the test images, and its entropies."""
        plan = self.plan
        folder, config = plan.folder(epochs), plan.config
        settings: dict[str, Any] = {"epochs": 0}
        if epochs:
            settings = plan.settings[epochs].model_dump(mode="json", exclude={"head_init"}) | {"recipe": plan.recipe_name}
            settings["amp"] = read_record(folder / "summary.json").get("amp", False)  # as it was, whatever was asked for
        if plan.new_head and (epochs or plan.head_epochs(epochs)):
            settings["head_init"] = plan.training.head_init
        mapped = plan.taken.record() if plan.taken is not None and not epochs and not plan.head_epochs(0) else None
        cost, head = cost_of(folder), read_head(folder)
        if head is not None:
            settings["head_top1"] = head.row["test_top1"]
            settings.setdefault("amp", head.amp)
            cost = total([cost, head.spent]) if epochs else head.spent
        entropies = {
            "tau": 1.0,
            "clean": {
                "rows": len(plan.test_canvas),
                "entropy": row["test_entropy"],
                "entropy_rest": row["test_entropy_rest"],
            },
            "views": {
                "rows": min(REPORT_VIEWS, len(plan.train_canvas)),
                "policy": plan.shown.digest,
                "entropy": row["views_entropy"],
                "entropy_rest": row["views_entropy_rest"],
            },
        }
        record = {
            "alias": public_name(config.subject.teacher),
            "name": plan.name,
            "dataset": DATASETS.spec(plan.source),
            "dataset_label": dataset_label(plan.source),
            "class_names": list(plan.train_canvas.card.class_names),
            **({"classes": mapped} if mapped else {}),
            "input_size": plan.policy.size,
            "mean": plan.normalise.mean,
            "std": plan.normalise.std,
            "weights_sha256": weights_digest(model),
            # Weights finetuned from published ones are under their licence; of others only their owner knows.
            "weights_licence": licence(plan.exact) if plan.start == "timm" else None,
            "test_views": plan.tested.model_dump(mode="json"),
            "interpolation": preprocessing(plan.exact, plan.policy.size, model).interpolation,  # "auto" in the views of a dump
            "top1_clean": row["test_top1"],
            **({"top5_clean": row["test_top5"]} if "test_top5" in row else {}),
            "entropies": entropies,
            "training": {**settings, **plan.begun(epochs), **plan.said(epochs)},
            **({"cost": cost.known()} if cost.known() else {}),
            **({"processes": team.size} if team.size > 1 else {}),  # that had a part of every batch
            "versions": versions(),
            "command": config.command,
        }
        if (folder / "last.safetensors").is_file():
            (folder / "last.safetensors").rename(folder / "model.safetensors")
        record[FOLDER] = folder.name
        record[WEIGHTS_SEALS] = weights_seals(folder)
        made_as = timm_config(
            plan.exact,
            model,
            plan.normalise,
            plan.tested.timm_fields(),
            plan.policy.size,
            plan.train_canvas.card.class_names,
        )
        if made_as is not None:
            write_atomically(folder / CONFIG, made_as)
        self._keep_outputs(model, folder, str(record["weights_sha256"]))
        write_atomically(folder / "teacher.json", sealed_record(record))
        self.progress.say(f"teacher: {folder}, top-1 {row['test_top1']:.2f} %")

    def _keep_outputs(self, model: nn.Module, folder: Path, weights: str) -> None:
        """Write what the teacher says of some test images, for the reports on its students."""
        plan = self.plan
        forward = Forward(model.eval(), plan.normalise, next(model.parameters()).device, "fp32")

        def predict(views: Tensor) -> Tensor:
            return torch.from_numpy(forward(views))

        kept = kept_outputs(model, predict, plan.test_canvas, plan.tested.policy, weights)
        write_atomically(folder / TEST_OUTPUTS, kept.as_file())


def _by_teachers(config: TeacherConfig, teachers: int, processes: int) -> bool:
    """Whether processes divide the teachers among them, which needs no exchange and changes no result; or else every batch."""
    parallel = config.processes.parallel
    return parallel == "teachers" or (parallel == "auto" and teachers >= processes)
