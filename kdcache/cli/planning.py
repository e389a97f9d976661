"""The command that says what others will cost."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cli.options import ConfigOption, DataDirOption, HomeOption, JsonOption, workspace
from kdcache.cli.output import bars, print_json, print_table

if TYPE_CHECKING:
    from kdcache.students.config import PlanConfig

__all__ = ["plan"]


def plan(
    options: "PlanConfig",
    as_json: JsonOption = False,
    home: HomeOption = Path(),
    data_dir: DataDirOption = None,
    config: ConfigOption = None,
) -> None:
    """Say what a dump and a grid of students will cost: disk, memory, hours measured here, and when it pays. Fetches nothing."""
    from kdcache.students.costs import plan_costs

    with bars() as progress:
        costs = plan_costs(options, workspace(home, data_dir), progress)
        if costs.storage.needed > costs.storage.free:
            progress.say(
                f"warning: {_size(costs.storage.needed)} will be needed, and the disk has {_size(costs.storage.free)} free"
            )
        if costs.memory_free < max(kind.memory.kept + kind.memory.passing for kind in costs.students):
            progress.say(f"warning: the largest student may not fit into the {_size(costs.memory_free)} of memory that are free")
    if as_json:
        print_json(_as_dict(costs))
    else:
        _print(costs, options.subject.teacher)


def _as_dict(costs: Any) -> dict[str, Any]:
    """Fields, and what follows from them."""
    shown = dataclasses.asdict(costs)
    shown["storage"]["needed"] = costs.storage.needed
    shown["hours"]["saving"] = costs.hours.saving
    shown["further"] = costs.further
    for cost, student in zip(costs.students, shown["students"], strict=True):
        student["memory"] |= {"kept": cost.memory.kept, "passing": cost.memory.passing}
    return shown


def _print(costs: Any, teacher: str) -> None:
    storage, hours, first = costs.storage, costs.hours, costs.students[0]
    number = sum(cost.students for cost in costs.students)
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
    for cost in costs.students:
        label = f"{cost.name}, {cost.students} of them" + (f", {cost.views} views a step" if cost.views > 1 else "")
        rows.append(["student, step", _ms(cost.step), label])
        rows.append(["student, test", _ms(cost.test), ""])
    rows.append(["a further student", f"{costs.further:.0%}", f"of the first {first.name} with its rendering"])
    print_table(["what", "an image", ""], rows, title=f"speed, measured on {costs.device}")
    print_table(
        ["what", "how much", ""],
        [
            *(
                [f"{cost.name}", f"{_size(cost.memory.kept)} + {_size(cost.memory.passing)}", "kept, during a step"]
                for cost in costs.students
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
