"""What `distill` and `plan` are asked for. Nothing here needs torch."""

from typing import Annotated, ClassVar

from pydantic import Field

from kdcache.archive import Average
from kdcache.options import Integers, Names, Option, Options, Several, Temperatures, Words
from kdcache.teachers.config import DumpRecipe, TeacherAndData
from kdcache.training.config import MODEL_FORMS, HowTested, Memory, RenderOptions, StudentRuntime, StudentTraining

__all__ = ["DistillConfig", "Grid", "PlanConfig"]


class Grid(Options):
    """Which students: all combinations of those options that take several values."""

    panel: ClassVar[str] = "Which students"

    tau: Annotated[Temperatures, Option("Temperatures, such as 1,4,20 [1, or the preset's].")] = ()
    method: Annotated[
        Names,
        Option(
            "Methods; see kdcache methods. kd is tau^2 KL, as in published code; kd:tau_squared=0, without tau^2, is the "
            "temperature study's [kd, or the preset's]."
        ),
    ] = ()
    preset: Annotated[Names, Option("Published settings, paper:METHOD:DATASET; see kdcache methods --presets.")] = ()
    control: Annotated[Names, Option("none, ls-global, ls-instance, bottom:K, topk:K.")] = ("none",)
    student: Annotated[Names, Option(f"Aliases, timm names, {MODEL_FORMS} [the dataset's].")] = ()
    student_size: Annotated[
        Words,
        Option(
            "Side of the views that students see, in pixels, made from the teacher's; own: of the student's pretrained "
            "configuration [the teacher's]."
        ),
    ] = ()
    init: Annotated[
        Words,
        Option("What students start from: random, pretrained, target, finetuned, or weights (a path)."),
    ] = ("random",)
    seed: Annotated[Integers, Option("Seeds, such as 0-2.")] = (0,)
    epochs: Annotated[Annotated[int, Field(ge=1)] | None, Option("[the dataset's recipe].")] = None
    training: StudentTraining = StudentTraining()
    tested: HowTested = HowTested()
    share_order: Annotated[bool, Option("Show all seeds the batches of seed 0, on one stream.")] = False
    force: Annotated[bool, Option("Allow ttm and wttm beyond tau 10, and tests on training images.")] = False


class DistillConfig(Options):
    """What to train, from which archives. By default as the temperature study does (its section 3.1)."""

    panel: ClassVar[str] = "From which archive"

    archive: Annotated[
        Several,
        Option("Archive folder or name [the only or newest one]; given several times: their average.", repeated=True),
    ] = ()
    average: Annotated[Average, Option("Of several archives: their logits, or their softmaxes at each student's tau.")] = "logits"
    second_archive: Annotated[str | None, Option("Where mlkd's second views come from [the same archive].")] = None
    grid: Grid = Grid()
    dataset: Annotated[str | None, Option("Where the images are now [as in the dump].")] = None
    strict: Annotated[bool, Option("Do not choose between several archives.")] = False
    allow_drift: Annotated[int, Field(ge=0), Option("Accept views whose grid means are this many grey levels off.")] = 0
    runtime: StudentRuntime = StudentRuntime()
    command: str = Field("", exclude=True)


class PlanConfig(Options):
    """A dump and a grid of students whose costs are to be known."""

    subject: TeacherAndData
    recipe: DumpRecipe = DumpRecipe()
    grid: Grid = Grid()
    samples: Annotated[Annotated[int, Field(ge=2)] | None, Option("Training images, of a dataset that is not here.")] = None
    classes: Annotated[Annotated[int, Field(ge=2)] | None, Option("Classes, of a dataset that is not here.")] = None
    drawing: RenderOptions = RenderOptions()
    room: Memory = Memory()
