"""Answers about tau, methods and controls from the results, in words and as paired differences."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kdcache.report.records import STUDENT
from kdcache.report.table import ONE_SEED, ROW_FIELDS, UNPAIRED, Cell, PairedDifference, Row, Table, labels, paired

__all__ = ["Answer", "Contrast", "answers", "contrasts", "method_contrasts", "overview"]


@dataclass(frozen=True)
class Answer:
    """The best tau of one row of control none. `name` distinguishes it from the other answers."""

    name: str
    tau: float | None = None  # None: no run has finished
    best: Cell | None = None
    second_tau: float | None = None
    second: Cell | None = None
    difference: PairedDifference | None = None  # best minus second over shared seeds; None: no shared seed

    @property
    def own_temperature(self) -> bool:
        return self.best is not None and self.best.own_temperature

    @property
    def instead_of_tau(self) -> str:
        """What the row has in place of a tau that can be tuned."""
        without = self.best is not None and self.best.without_teacher
        return "has no teacher, and so no temperature" if without else "finds its temperature by itself"

    @property
    def source(self) -> str:
        return self.best.source if self.best else ""

    @property
    def headline(self) -> str:
        if self.best is None:
            return "no run has finished, so there is no best tau yet."
        spread = f" % ({ONE_SEED})"
        if self.best.std is not None:
            spread = f" ± {self.best.std:.2f} % (mean ± std, n = {self.best.n} seeds)"
        opening = f"best tau is {self.tau:g}, with"
        if self.own_temperature:
            opening = f"it {self.instead_of_tau};"
        return f"{opening} test top-1 {self.best.mean:.2f}{spread}."

    @property
    def detail(self) -> str:
        if self.best is None or self.own_temperature:
            return ""
        if self.second is None:
            return "Only this tau has results, so there is nothing to compare it with."
        return f"Difference to the second best, tau {self.second_tau:g} ({self.second.spoken}): {self.difference or UNPAIRED}."


@dataclass(frozen=True)
class Contrast:
    """A control against none, at the best tau of none; or a method against another one, each at its own best tau."""

    name: str
    variant: str  # the control or method under test
    tau: float
    cell: Cell
    base: str  # the control or method that it is compared with
    difference: PairedDifference | None  # None: no seed in common


def answers(table: Table) -> list[Answer]:
    """For each row of control none: its best tau, and its difference to the second best."""
    results = []
    for row, name in _without_control(table).items():
        (tau, best), (second_tau, second), *_ = [*table.ranked(row), (None, None), (None, None)]
        difference = paired(best, second) if best and second else None
        results.append(Answer(name, tau, best, second_tau, second, difference))
    return results


def overview(results: Sequence[Answer]) -> str:
    """Summary of many answers: how often each tau was best, and how often by more than seed noise."""
    tuned = [answer for answer in results if answer.second is not None and not answer.own_temperature]
    if not tuned:
        return "No row has results at two taus, so there is no best tau."
    often = [f"{tau:g} in {count}" for tau, count in Counter(answer.tau for answer in tuned).most_common()]
    ahead = sum(
        answer.difference is not None and answer.difference.significant and answer.difference.mean > 0 for answer in tuned
    )
    pairs = sum(answer.difference is not None and answer.difference.low is not None for answer in tuned)
    sentence = f"Best tau, of {len(tuned)} row{'s' * (len(tuned) > 1)} with several: {', '.join(often)}. "
    if not pairs:
        return sentence + "No row has two seeds of two taus, so none can be told from seed noise."
    return sentence + f"It is ahead of the second best by more than seed noise in {ahead} of {pairs}."


def contrasts(table: Table) -> list[Contrast]:
    """Every control against none, at the best tau of none."""
    results = []
    for row, name in _without_control(table).items():
        for tau, best in table.ranked(row)[:1]:
            for other in table.rows:
                cell = table.get(other, tau)
                if cell and other != row and dataclasses.replace(other, control="none") == row:
                    results.append(Contrast(name, other.control, tau, cell, "none", paired(cell, best)))
    return results


def method_contrasts(table: Table) -> list[Contrast]:
    """Every method of control none against kd (a z-score method: against the same method without), at their best taus.

    Where there is no kd, and for kd itself, against the students that learned from labels alone.

    Options and settings of the two may differ, as published ones do, if the archive has only one row to compare with. A
    setting that differs is named.
    """
    plain = {row: table.ranked(row)[0] for row in table.rows if row.control == "none" and table.ranked(row)}
    names = labels(list(plain), ("dataset", "teacher", "student", "setting"))
    archive = {row: cell.runs[0].args.archive_digest for row, (_, cell) in plain.items()}
    results = []
    for row, (tau, cell) in plain.items():
        if row.baseline:
            continue  # it is what others are compared with
        others = [other for other in plain if _pair(other) == _pair(row) and archive[other] == archive[row] and other != row]
        if (base := _base(row, others)) is not None:
            setting = f" ({base.setting})" if base.setting != row.setting else ""
            results.append(Contrast(names[row], row.method, tau, cell, base.method + setting, paired(cell, plain[base][1])))
    return results


def _base(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row that a row's method is compared with: one of the other `rows` of its teacher and student, or None."""
    name = row.method.partition(":")[0]
    for wanted in dict.fromkeys((name[1:] if name.startswith("z") else "kd", "kd", STUDENT)):
        named = [other for other in rows if other.method.partition(":")[0] == wanted]
        same = [other for other in named if other.setting == row.setting]
        plain = [other for other in same if other.method == wanted]
        bare = [other for other in same if other.method == f"{wanted}:tau_squared=False"]  # as the temperature study has kd
        for choice in (plain,) if wanted == name else (plain, bare, same, named):
            if len(choice) == 1:
                return choice[0]
    return None


def _pair(row: Row) -> tuple[str, str, str]:
    return row.dataset, row.teacher, row.student


def _without_control(table: Table) -> dict[Row, str]:
    """Rows of control none with distinguishing names."""
    return labels([row for row in table.rows if row.control == "none"], ROW_FIELDS)
