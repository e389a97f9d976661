"""What `train-teacher` and `dump-teacher` are asked for. Nothing here needs torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from kdcache.archive import ArchivePlan, new_plan
from kdcache.options import LARGEST_INTEGER, Option, Options, Share, Triple, Usual, integers
from kdcache.training.config import MODEL_FORMS, HowTested, Runtime, Training, ViewOptions

__all__ = [
    "USUAL",
    "Accepted",
    "DumpConfig",
    "DumpRecipe",
    "Precision",
    "TeacherAndData",
    "TeacherConfig",
    "UsualDump",
    "usual_dump",
]

Precision = Literal["fp32", "fp16", "bf16"]
Seed = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]
Durations = Annotated[
    tuple[int, ...] | Literal["paper"], BeforeValidator(lambda value: value if value == "paper" else integers(value))
]


@dataclass(frozen=True)
class UsualDump:
    """With what a kind of device computes logits, unless told otherwise."""

    precision: Precision
    batch_size: int


USUAL = {"cuda": UsualDump("fp16", 256), "cpu": UsualDump("fp32", 64)}


def usual_dump(device_type: str) -> UsualDump:
    """That of a GPU for `cuda`, and a CPU's for all else."""
    return USUAL.get(device_type, USUAL["cpu"])


class TeacherAndData(Options):
    """A model as a teacher of a dataset."""

    teacher: Annotated[str, Option(f"Alias (vit_s, rn50, ...), timm name, {MODEL_FORMS}.")]
    dataset: Annotated[str, Option("Dataset name, folder of images, torch/NAME, hf:ORG/NAME or module:function.")]


class Processes(Options):
    """What several processes do."""

    panel: ClassVar[str] = "Where and how fast"

    parallel: Annotated[
        Literal["auto", "teachers", "batches"],
        Option("What torchrun's processes divide [teachers, if there are as many as processes, or else each batch]."),
    ] = "auto"


class TeacherConfig(Options):
    """What to train: a teacher for each of `epochs`. What is not given is the recipe's, or suits model and dataset."""

    subject: TeacherAndData
    epochs: Annotated[
        Durations,
        Option(
            "A teacher for each, such as 20,50,200,400, trained at once; paper: the temperature study's; 0: weights as they "
            "are [the recipe's, or the dataset's]."
        ),
    ] = ()
    recipe: Annotated[
        str | None,
        Option(
            "Settings, where flags do not say otherwise: study and crd, as published, or lp-ft [crd for CIFAR's own models; "
            "study for the papers' datasets; lp-ft for a new head on others]."
        ),
    ] = None
    head_epochs: Annotated[
        Annotated[int, Field(ge=0)] | None,
        Option("Train the head alone first, on frozen features, for so many epochs [the recipe's]."),
    ] = None
    views: ViewOptions = ViewOptions()
    training: Annotated[Training, Usual("the recipe's")] = Training()
    tested: HowTested = HowTested()
    smoothing: Annotated[Annotated[float, Field(ge=0, le=1)] | None, Option("Label smoothing [0.1].")] = None
    seed: Annotated[Seed, Option("Seed of the initial weights and of the order.")] = 0
    from_scratch: Annotated[
        bool | None, Option("Start at random or from timm's weights [as suits the dataset].", off="--pretrained")
    ] = None
    checkpoint: Annotated[
        Path | None, Option("Start from these weights (.safetensors, .pth, .ckpt, .npz); FILE#NAME for one set of several.")
    ] = None
    classes: Annotated[
        Path | None,
        Option(
            "Which outputs are which classes, with --epochs 0: a file with a name for each output, or JSON by class; "
            "imagenet-1k, ... or dataset [by name]."
        ),
    ] = None
    mean: Annotated[Triple | None, Option("Of pixels in [0, 1], that the checkpoint was trained with [the model's].")] = None
    std: Annotated[Triple | None, Option("Likewise.")] = None
    runtime: Runtime = Runtime()
    processes: Processes = Processes()
    command: str = Field("", exclude=True)


class DumpRecipe(Options):
    """What decides on the logits of a dump and on its files: not who computes them, where, and how fast."""

    shown: ViewOptions = ViewOptions()
    views: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Option("Views of every sample; more than before appends [the dataset's recipe]."),
    ] = None
    view_seed: Annotated[Seed | None, Option("Seed of the views [0].")] = None
    batch_size: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Option("Images per step [as the archive was begun, or 256 on a GPU, 64 on a CPU].", short="-b"),
    ] = None
    precision: Annotated[Precision | None, Option("Of the teacher [fp16 on a GPU, fp32 on a CPU].")] = None
    codec: Annotated[str, Option("How logits are stored: i16 or f16 (2 bytes), f32, u8 (1 byte).")] = "i16"
    layout: Annotated[str, Option("How files are laid out: zarr, hdf5, webdataset.")] = "zarr"
    shard_rows: Annotated[Annotated[int, Field(ge=1)] | None, Option("Rows of a shard [64 MiB of logits].")] = None

    def rows(self, views: int, samples: int, class_names: Sequence[str]) -> ArchivePlan:
        """The rows of the archive that a dump of so many views and samples would write."""
        return new_plan(
            num_views=views,
            num_samples=samples,
            class_names=class_names,
            codec=self.codec,
            layout=self.layout,
            shard_rows=self.shard_rows,
        )


class Accepted(Options):
    """What is dumped although it was found to be no teacher's logits, or in no right order. The archive records what occurred."""

    panel: ClassVar[str] = "Teachers that are refused otherwise"

    accept_random_teacher: Annotated[bool, Option("Logits that are others each time: dropout, noise.")] = False
    accept_batch_dependent_teacher: Annotated[bool, Option("Logits that depend on the other images of a batch.")] = False
    accept_probabilities: Annotated[bool, Option("Outputs that are probabilities, or their logarithms.")] = False
    accept_constant_teacher: Annotated[bool, Option("Logits that are the same for all images, or all classes.")] = False
    accept_class_order: Annotated[bool, Option("Classes that are right more often in another order.")] = False


class DumpConfig(Options):
    """What to dump, from which teacher, to where."""

    subject: TeacherAndData
    recipe: DumpRecipe = DumpRecipe()
    finetune: Annotated[bool, Option("Train the teacher first if there is none.", off="--no-finetune")] = True
    teacher_folder: Annotated[Path | None, Option("This trained teacher, not the newest.")] = None
    teacher_epochs: Annotated[
        Annotated[int, Field(ge=0)] | None,
        Option("The newest trained for so many epochs; 0: with weights as they are [any]."),
    ] = None
    checkpoint: Annotated[
        Path | None, Option("The teacher's weights, as they are unless --teacher-epochs says more (.safetensors, .pth).")
    ] = None
    classes: Annotated[
        Path | None,
        Option(
            "Which outputs of weights as they are are which classes: a file with a name for each output, or JSON by class; "
            "imagenet-1k, ... or dataset [by name]."
        ),
    ] = None
    output: Annotated[Path | None, Option("Archive folder [HOME/archives/NAME].", short="-o")] = None
    start_view: Annotated[int, Field(ge=0), Option("View to begin with; changes nothing in the archive.")] = 0
    shard: Annotated[
        Share | None, Option("I/N: write every N-th shard only, from number I on; for arrays of jobs [all shards].")
    ] = None
    accepted: Accepted = Accepted()
    runtime: Runtime = Runtime()
    command: str = Field("", exclude=True)
