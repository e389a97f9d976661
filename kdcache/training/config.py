"""The options that several commands share, declared once: how models are trained, which views are drawn, where and how fast.

Nothing here needs torch.
"""

import math
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator

from kdcache.errors import UsageError
from kdcache.options import Betas, Bytes, Floats, Integers, Names, Option, Options
from kdcache.system.workers import require_workers
from kdcache.views.crops import CenterCrop
from kdcache.views.policy import Filter, RendererChoice, ViewPolicy

__all__ = [
    "HowTested",
    "Memory",
    "RenderOptions",
    "Runtime",
    "StudentRuntime",
    "StudentTraining",
    "TrainConfig",
    "Training",
    "ViewOptions",
    "under_present_names",
]

SMALLEST_CROP = 0.01  # of the short side
MODEL_FORMS = "hf-hub:ORG/NAME[@REVISION], local-dir:PATH or package.module:function"


class Training(Options):
    """How a model is trained, as far as teachers and students have it in common.

    The defaults are the temperature study's for students (its section 3.1); for teachers, what is not given is a recipe's.
    """

    panel: ClassVar[str] = "How to train"

    batch_size: Annotated[int, Field(ge=2), Option("Images per step.", short="-b")] = 64  # of one, batch norms know nothing
    opt: Annotated[str, Option("Optimiser, a timm name.")] = "adamw"
    lr: Annotated[float, Field(gt=0), Option("Learning rate.")] = 0.002
    momentum: Annotated[float, Field(ge=0, lt=1), Option("Momentum of SGD and its kin.")] = 0.9
    sched: Annotated[
        Literal["cosine", "step"], Option("Half a period of a cosine, step by step; or --decay-rate at --decay-epochs.")
    ] = "cosine"
    decay_epochs: Annotated[Integers, Option("Epochs after which the step schedule lowers the rate, such as 150,180,210.")] = ()
    decay_rate: Annotated[float, Field(gt=0, le=1), Option("What the rate is multiplied by there.")] = 0.1
    amp: Annotated[
        bool | None,
        Option(
            "Run models in bf16 where that is safe; losses and weights stay float32 [on GPUs that compute in bf16].",
            off="--no-amp",
        ),
    ] = None  # which is settled, and recorded, where the device is known: a plan does not know it
    model_ema_decay: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | None,
        Option("Also keep and test a moving average of the weights, such as 0.999.", former="ema_decay"),
    ] = None
    val_interval: Annotated[int, Field(ge=1), Option("Epochs from one test to the next; the last one is always tested.")] = 1
    weight_decay: Annotated[float, Field(ge=0), Option("Weight decay; of biases and norms only with --decay-all.")] = 0.05
    clip_grad: Annotated[
        Annotated[float, Field(ge=0), AfterValidator(lambda norm: norm or None)] | None,
        Option("Largest L2 norm of one layer's gradient; 0: no clipping.", none="0"),
    ] = 1.0
    decay_all: Annotated[bool, Option("Weight decay of biases and norms too, which timm leaves out.", off="--no-decay-all")] = (
        False
    )
    head_init: Annotated[
        Literal["zero", "timm"],
        Option("A new classifier on pretrained weights starts at zero, or at random as timm's does."),
    ] = "zero"
    warmup_epochs: Annotated[float, Field(ge=0), Option("Epochs in which the rate rises to --lr in a line, of all epochs.")] = 0.0
    warmup_lr: Annotated[float, Field(ge=0), Option("Learning rate that the warm-up starts at.")] = 1e-5
    min_lr: Annotated[float, Field(ge=0), Option("Learning rate that the cosine ends at.")] = 0.0
    layer_decay: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | None,
        Option("Rate of a layer as a share of that of the layer above it, such as 0.75; the head has --lr."),
    ] = None
    drop_path: Annotated[
        Annotated[float, Field(ge=0, lt=1)] | None, Option("Stochastic depth: largest drop rate of a block [the model's].")
    ] = None
    opt_betas: Annotated[Betas | None, Option("Betas of Adam and its kin, such as 0.9,0.95 [the optimiser's].")] = None


class StudentTraining(Training):
    """The same for a grid of students: every optimiser at every learning rate, or at its own."""

    opt: Annotated[Names, Option("Optimisers, timm names, with their own settings if any: adamw,sgd:lr=0.05,momentum=0.9.")] = (
        "adamw",
    )  # type: ignore[assignment]
    lr: Annotated[Floats, Option("Learning rates.")] = (0.002,)  # type: ignore[assignment]


class TrainConfig(Training):
    """How one model is trained, for so many epochs: nothing is left to a recipe.

    UsageError for a schedule without epochs, and for rates of a schedule that contradict each other or have no effect.
    """

    epochs: Annotated[int, Field(ge=1), Option("Times that every sample is seen.")]

    def model_post_init(self, context: Any) -> None:
        if self.sched == "step" and not self.decay_epochs:
            raise UsageError(
                "the schedule step without epochs",
                why="it lowers the learning rate after certain epochs, and none is named",
                fix="name them, for example: --decay-epochs 150,180,210",
            )
        if self.min_lr and self.sched == "step":
            raise UsageError(
                f"--min-lr {self.min_lr:g} with the schedule step",
                why="only the cosine ends at it: a step multiplies the rate by --decay-rate",
                fix="leave --min-lr out, or use --sched cosine",
            )
        if self.min_lr > self.lr:
            raise UsageError(
                f"--min-lr {self.min_lr:g} with --lr {self.lr:g}",
                why="a cosine falls from --lr to --min-lr, which is higher",
                fix=f"--min-lr {self.lr / 100:g}",
            )
        if not self.warmup_epochs:
            if self.warmup_lr != type(self).model_fields["warmup_lr"].default:
                raise UsageError(
                    f"--warmup-lr {self.warmup_lr:g} without a warm-up",
                    why="a warm-up starts at it, and lasts for 0 epochs",
                    fix=f"--warmup-epochs 1 --warmup-lr {self.warmup_lr if self.warmup_lr <= self.lr else 0:g}",
                )
        elif self.warmup_epochs >= self.epochs:
            raise UsageError(
                f"--warmup-epochs {self.warmup_epochs:g} of {self.epochs} epochs",
                why="they are a part of all epochs, and --lr would never be reached",
                fix=f"--warmup-epochs {self.epochs / 10:g}",
            )
        elif self.warmup_lr > self.lr:
            raise UsageError(
                f"--warmup-lr {self.warmup_lr:g} with --lr {self.lr:g}",
                why="a warm-up rises from --warmup-lr to --lr, which is lower",
                fix="--warmup-lr 0",
            )

    def identity(self) -> dict[str, Any]:
        """Tells two trainings apart: an option that is added later leaves the identity of trainings without it as it was.

        It says what was asked for, not what a machine makes of it: `amp` is in it where it was asked for.
        Options have their former names here, by which the folders of runs and teachers are found. `head_init` is not among
        them: it decides on trainings with a new head only, and whether a training has one is known to its caller.
        """
        former = _former_names(type(self))
        stated = self.model_dump(mode="json", exclude_defaults=True, exclude={"head_init"})
        return {former[name]: value for name, value in stated.items()}

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, as a share of `lr`.

        It is that of timm's schedulers with `t_in_epochs=False` and `warmup_prefix=False`: a warm-up takes the place of the
        schedule's first epochs.
        """
        warm = self.warmup_epochs * steps_per_epoch
        if step < warm:
            start = self.warmup_lr / self.lr
            return start + step * (1 - start) / warm
        if self.sched == "cosine":
            floor = self.min_lr / self.lr
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / (steps_per_epoch * self.epochs)))
        return float(self.decay_rate ** sum(step >= epoch * steps_per_epoch for epoch in self.decay_epochs))


@cache
def _former_names(kind: type[Options]) -> dict[str, str]:
    """By its name, what each option was called at first. Asked for every student of a grid."""
    return {name: each.option.former or name for name, each in kind.declared().items()}


class ViewOptions(Options):
    """Which views are drawn, from which canvas."""

    policy: Annotated[
        str | None,
        Option("View policy: a preset or YAML file, with changes if any: pets:hflip=0,randaugment.m=9 [the dataset's]."),
    ] = None
    size: Annotated[Annotated[int, Field(ge=8)] | None, Option("Side of a view in pixels [the policy's].")] = None
    canvas: Annotated[Annotated[int, Field(ge=8)] | None, Option("Side of the decoded images in pixels [the dataset's].")] = None


class HowTested(Options):
    """How test images are shown: by default as the model's pretrained configuration says, where a dataset has photographs."""

    panel: ClassVar[str] = "How to test"

    test_policy: Annotated[
        str | None,
        Option(
            "model: as the model's pretrained configuration says; or a view policy without randomness, such as eval, "
            "eval:crop.mode=squash, none [the dataset's: model, or none where images are small]."
        ),
    ] = None
    crop_pct: Annotated[
        Annotated[float, Field(ge=SMALLEST_CROP, le=1)] | None,
        Option("Share of the resized short side that a test view shows, as in timm [the test policy's]."),
    ] = None
    interpolation: Annotated[Filter | None, Option("How test images are resized [the test policy's].")] = None

    def drawn(self, size: int) -> ViewPolicy:
        """The test policy (other than "model"), a draft at `size` pixels. UsageError if its views would be random."""
        spec = self.test_policy or "none"
        draft = ViewPolicy.draft(spec, size=size, filter=self.interpolation)
        if not draft.is_fixed:
            raise UsageError(
                f"test policy {spec!r} is random",
                why="every test has to show the same views, or its figures mean nothing",
                fix="use model, eval or none, or a centre crop with hflip=0 and without the random pieces",
            )
        if self.crop_pct is None:
            return draft
        assert isinstance(draft.crop, CenterCrop)
        return draft.model_copy(update={"crop": draft.crop.model_copy(update={"fraction": self.crop_pct, "resize": None})})

    def otherwise(self, suggested: str) -> "HowTested":
        """These options, with the test policy `suggested` if none is asked for."""
        return self.but(test_policy=self.test_policy or suggested)

    def identity(self) -> dict[str, Any]:
        """Tells two ways of testing apart; empty for the whole image made square, which earlier versions always showed."""
        assert self.test_policy is not None
        drawn = "model" if self.test_policy == "model" else self.drawn(8).model_dump(mode="json")
        whole = ViewPolicy.draft("none", size=8).model_dump(mode="json")
        return {} if drawn == whole else {"test": drawn, **self.model_dump(mode="json", include={"crop_pct", "interpolation"})}


class RenderOptions(Options):
    """Which device does the work, and how it draws views."""

    panel: ClassVar[str] = "Where and how fast"

    device: Annotated[str, Option("auto, cpu, cuda, cuda:1, ...")] = "auto"
    renderer: Annotated[RendererChoice, Option("How views are drawn, all to the same bytes; auto: the faster one here.")] = "auto"


class Runtime(RenderOptions):
    """Where a command works and how fast, which changes no result on a CPU."""

    workers: Annotated[int, Field(ge=0), Option("Processes that render views ahead; 0 renders inline.", short="-j")] = 0

    @field_validator("workers")
    @classmethod
    def _useful(cls, workers: int) -> int:
        require_workers(workers)
        return workers


class Memory(Options):
    """How much students that are trained at once may take."""

    panel: ClassVar[str] = "Where and how fast"

    memory: Annotated[Bytes | None, Option("Memory of students that train at once, such as 12GB [most of what is free].")] = None


class StudentRuntime(Memory, Runtime):
    """Where students are trained and how fast."""

    checkpoint_interval: Annotated[float, Field(ge=0), Option("Seconds between checkpoints.")] = 30.0
    channels_last: Annotated[bool, Option("Keep a pixel's channels together; suits GPUs.")] = False
    compile: Annotated[bool, Option("Compile the students (torch.compile).", former="compiled")] = False
    graph: Annotated[
        bool | None,
        Option(
            "Replay a student's step as a CUDA graph; off by itself where that would change a bit [on GPUs].", off="--no-graph"
        ),
    ] = None
    parallel: Annotated[
        Literal["auto", "students", "batches"],
        Option("What torchrun's processes divide [students, if there are as many as processes, or else each batch]."),
    ] = "auto"


FORMER = {
    each.option.former: name
    for kind in (Training, StudentRuntime)
    for name, each in kind.declared().items()
    if each.option.former
}


def under_present_names(record: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from `args.yaml` or `teacher.json` under the names that options have now."""
    return {FORMER.get(name, name): value for name, value in record.items()}
