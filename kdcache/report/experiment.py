"""The study that runs belong to, and the numbers of its paper, which a report shows in grey beside those of the runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kdcache.report.records import RunArgs
from kdcache.report.table import Cell

__all__ = ["KNOWN_BY", "Experiment", "Published", "published_for"]


def _name(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


# By what a paper's number is known, and what a run has of that.
KNOWN_BY: dict[str, Callable[[RunArgs], object]] = {
    "dataset": lambda args: args.dataset,
    "teacher": lambda args: args.teacher,
    "student": lambda args: args.student,
    "method": lambda args: args.method_spec,
    "control": lambda args: args.control_spec,
    "tau": lambda args: args.tau,
    "epochs": lambda args: args.epochs,
    "opt": lambda args: args.opt,
    "batch-size": lambda args: args.batch_size,
    "kd-weight": lambda args: args.method.get("kd_weight", 1),
    "ce-weight": lambda args: args.method.get("ce_weight", 0),
    "score": lambda args: args.method.get("score", "z"),
    "init": lambda args: (args.model_extra or {}).get("init", "random"),
}


@dataclass(frozen=True)
class Published:
    """A test top-1 in percent that stands in a paper's `table`, for the runs with these facts, by names of `KNOWN_BY`."""

    table: str
    facts: tuple[tuple[str, str | float], ...]
    top1: float

    def is_of(self, args: RunArgs) -> bool:
        return all(_agree(name, value, KNOWN_BY[name](args)) for name, value in self.facts)


def _agree(name: str, stated: str | float, found: object) -> bool:
    if _name(stated) == _name(found):
        return True
    # A name alone is that of a method or dataset with whatever options.
    return name in {"method", "control", "dataset"} and ":" not in str(stated) and str(found).partition(":")[0] == stated


@dataclass(frozen=True)
class Experiment:
    """The study that runs belong to. `smoke`: they are of its smoke version, and their numbers mean nothing."""

    title: str
    paper: str
    question: str
    varies: str
    expected: str
    smoke: bool = False
    published: tuple[Published, ...] = ()  # the paper's own numbers


def published_for(numbers: Sequence[Published]) -> Callable[[Cell], Published | None]:
    """What finds the paper's number for a cell of the table: the one that says most of its runs. None where there is none."""

    def found(cell: Cell) -> Published | None:
        fitting = [number for number in numbers if number.is_of(cell.runs[0].args)]
        return max(fitting, key=lambda number: len(number.facts), default=None)

    return found
