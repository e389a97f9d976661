"""The command that says what others will cost."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kdcache.cli.making import BatchOption, CanvasOption, PolicyOption, SizeOption, TeacherOption
from kdcache.cli.options import (
    ConfigOption,
    DataDirOption,
    DatasetOption,
    DeviceOption,
    HomeOption,
    JsonOption,
    RendererOption,
    floats,
    integers,
    size_in_bytes,
    specs,
    temperatures,
    workspace,
)
from kdcache.cli.output import bars, print_json, print_table

__all__ = ["plan"]


def plan(
    teacher: TeacherOption,
    dataset: DatasetOption,
    tau: Annotated[str | None, typer.Option("--tau", help="Temperatures, such as 1,4,20 [1, or the preset's]")] = None,
    method: Annotated[str | None, typer.Option("--method", help="Methods; see kdcache methods [kd, or the preset's]")] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="Published settings, paper:METHOD:DATASET.")] = None,
    control: Annotated[str, typer.Option("--control", help="none, ls-global, ls-instance, bottom:K, topk:K.")] = "none",
    student: Annotated[str, typer.Option("--student", help="Aliases or timm names [the dataset's].")] = "",
    init: Annotated[str, typer.Option("--init", help="What students start from; here only their number counts.")] = "random",
    seed: Annotated[str, typer.Option("--seed", help="Seeds, such as 0-2.")] = "0",
    epochs: Annotated[int | None, typer.Option(min=1, help="[the dataset's recipe]")] = None,
    views: Annotated[int | None, typer.Option(min=1, help="Views of every sample in the dump [the dataset's recipe]")] = None,
    policy: PolicyOption = None,
    size: SizeOption = None,
    canvas: CanvasOption = None,
    batch_size: BatchOption = 64,
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"] | None, typer.Option(help="Of the teacher [fp16 on a GPU, fp32 on a CPU]")
    ] = None,
    codec: Annotated[str, typer.Option(help="How logits are stored: i16 or f16 (2 bytes), f32, u8 (1 byte).")] = "i16",
    layout: Annotated[str, typer.Option(help="How files are laid out: zarr, hdf5, webdataset.")] = "zarr",
    share_order: Annotated[bool, typer.Option("--share-order", help="All seeds on one stream.")] = False,
    opt: Annotated[str, typer.Option(help="Optimisers of the students, timm names.")] = "adamw",
    lr: Annotated[str, typer.Option(help="Learning rates; here only their number counts.")] = "0.002",
    momentum: Annotated[float, typer.Option(min=0, help="Of SGD and its kin.")] = 0.9,
    amp: Annotated[bool, typer.Option("--amp", help="Run students in bf16 where that is safe.")] = False,
    model_ema: Annotated[
        float | None, typer.Option("--model-ema-decay", help="Also keep a moving average of the weights, such as 0.999.")
    ] = None,
    val_interval: Annotated[int, typer.Option(min=1, help="Epochs from one test to the next.")] = 1,
    memory: Annotated[
        str | None, typer.Option(help="What students trained at once may take, such as 12GB [what is free]")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=2, help="Training images, of a dataset that is not here.")] = None,
    classes: Annotated[int | None, typer.Option(min=2, help="Classes, of a dataset that is not here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Allow ttm and wttm beyond tau 10.")] = False,
    device: DeviceOption = "auto",
    renderer: RendererOption = "auto",
    as_json: JsonOption = False,
    home: HomeOption = Path(),
    data_dir: DataDirOption = None,
    config: ConfigOption = None,
) -> None:
    """Say what a dump and a grid of students will cost: disk, memory, hours measured here, and when it pays. Fetches nothing."""
    from kdcache.students.costs import plan_costs
    from kdcache.students.grid import DistillConfig
    from kdcache.teachers.dump import DumpConfig

    dump = DumpConfig(
        teacher=teacher,
        dataset=dataset,
        views=views,
        policy=policy,
        size=size,
        canvas=canvas,
        batch_size=batch_size,
        precision=precision,
        codec=codec,
        layout=layout,
        device=device,
        renderer=renderer,
    )
    grid = DistillConfig(
        taus=temperatures(tau) if tau is not None else (),
        methods=specs(method, "--method") if method is not None else (),
        presets=specs(preset, "--preset") if preset is not None else (),
        controls=specs(control),
        students=specs(student),
        inits=specs(init, "--init"),
        seeds=integers(seed, "--seed"),
        epochs=epochs,
        batch_size=batch_size,
        share_order=share_order,
        opts=specs(opt, "--opt"),
        lrs=floats(lr, "--lr"),
        momentum=momentum,
        amp=amp,
        ema_decay=model_ema,
        val_interval=val_interval,
        memory=None if memory is None else size_in_bytes(memory, "--memory"),
        force=force,
        device=device,
    )
    with bars() as progress:
        costs = plan_costs(dump, grid, workspace(home, data_dir), progress, samples=samples, classes=classes)
        if costs.storage.needed > costs.storage.free:
            progress.say(
                f"warning: {_size(costs.storage.needed)} will be needed, and the disk has {_size(costs.storage.free)} free"
            )
        if costs.memory_free < max(one.memory.kept + one.memory.passing for one in costs.students):
            progress.say(f"warning: the largest student may not fit into the {_size(costs.memory_free)} of memory that are free")
    if as_json:
        print_json(_as_dict(costs))
    else:
        _print(costs, teacher)


def _as_dict(costs: Any) -> dict[str, Any]:
    """Fields, and what follows from them."""
    found = dataclasses.asdict(costs)
    found["storage"]["needed"] = costs.storage.needed
    found["hours"]["saving"] = costs.hours.saving
    found["further"] = costs.further
    for one, student in zip(costs.students, found["students"], strict=True):
        student["memory"] |= {"kept": one.memory.kept, "passing": one.memory.passing}
    return found


def _print(costs: Any, teacher: str) -> None:
    storage, hours, first = costs.storage, costs.hours, costs.students[0]
    number = sum(one.students for one in costs.students)
    ways = ", ".join(f"{costs.groups.count(size)} x {size}" for size in sorted(set(costs.groups), reverse=True))
    print_table(
        ["what", "how much", ""],
        [
            ["archive", _size(storage.archive), f"{costs.views} views of {costs.samples} samples, {costs.classes} classes"],
            ["canvases", _size(storage.canvases), "decoded images that are not there yet"],
            ["runs", _size(storage.runs), f"weights of {number} students"],
            ["free disk", _size(storage.free), ""],
        ],
        title="disk",
    )
    rows: list[list[Any]] = [
        ["render a view", _ms(costs.render), ""],
        ["teacher", _ms(costs.teacher), teacher],
    ]
    for one in costs.students:
        each = f"{one.name}, {one.students} of them" + (f", {one.views} views a step" if one.views > 1 else "")
        rows.append(["student, step", _ms(one.step), each])
        rows.append(["student, test", _ms(one.test), ""])
    rows.append(["a further student", f"{costs.further:.0%}", f"of the first {first.name} with its rendering"])
    print_table(["what", "an image", ""], rows, title=f"speed, measured on {costs.device}")
    print_table(
        ["what", "how much", ""],
        [
            *(
                [f"{one.name}", f"{_size(one.memory.kept)} + {_size(one.memory.passing)}", "kept, during a step"]
                for one in costs.students
            ),
            ["room for students", _size(costs.memory_free), ""],
            ["trained at once", ways, "streams x students on each"],
        ],
        title="memory",
    )
    print_table(
        ["what", "hours", ""],
        [
            ["dump", _hours(hours.dump), ""],
            ["distill", _hours(hours.distill), f"{number} students of {costs.epochs} epochs"],
            ["online", _hours(hours.online), "the same students with the teacher in every step, each by itself"],
            ["saving", _hours(hours.saving), f"{hours.saving / hours.online:.0%}"],
        ],
        title="time",
    )
    enough = costs.break_even_students
    print(f"The dump costs as much as the teacher in {costs.break_even_epochs} student epochs online.")
    students = f"from {enough} student{'s' * (enough != 1)} on" if enough else "for no number of students"
    print(f"Packed as above, it pays {students} of {costs.epochs} epochs.")
    print("Assumed: one device; rendering, teacher and students take turns on it; training the teacher, building canvases and")
    print("writing are left out; pixels and weights are random, the loss is kd; tests are on all test images.")


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}"
