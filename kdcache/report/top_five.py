"""Top-1 and top-5 side by side, teachers' above students', as tables on ImageNet have them (logit standardization, Table 3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kdcache.report.heatmap import TeacherFigures
from kdcache.report.table import ROW_FIELDS, Cell, Table, labels

__all__ = ["TopFive", "top_five"]

COLUMN = "test_top5"


@dataclass(frozen=True)
class TopFive:
    """One line: a teacher, or a row of the table of results at its best tau. Scores in percent of the test images."""

    name: str
    kind: str  # teacher or student
    tau: float | None  # None: a teacher's, or one that the method finds by itself
    top1: float | None
    top1_std: float | None
    top5: float | None
    top5_std: float | None
    seeds: int
    source: str = ""


def top_five(table: Table, teachers: Mapping[str, TeacherFigures]) -> list[TopFive]:
    """Lines of all rows that have logged their top-5, each teacher (by archive digest) before its students.

    Empty where nobody has, and where every top-5 is 100 %, as with five classes or fewer.
    """
    names = labels(table.rows, ROW_FIELDS)
    lines: list[TopFive] = []
    told: set[str] = set()
    for row in table.rows:
        for tau, cell in table.ranked(row)[:1]:
            known = teachers.get(cell.runs[0].args.archive_digest)
            if known is not None and known.top5_clean is not None and known.digest not in told:
                told.add(known.digest)
                name = " ".join(filter(None, (known.teacher, f"({known.training})" if known.training else "")))
                lines.append(TopFive(name, "teacher", None, known.top1_clean, None, known.top5_clean, None, 0, known.name))
            scores = _final(cell)
            if scores:
                name = names[row] or row.method
                own = None if cell.own_temperature else tau
                lines.append(TopFive(name, "student", own, cell.mean, cell.std, *_spread(scores), len(scores), cell.source))
    found = [line.top5 for line in lines if line.kind == "student" and line.top5 is not None]
    return lines if any(top5 < 100 for top5 in found) else []


def _final(cell: Cell) -> list[float]:
    """Top-5 after the last epoch, of each seed that has it."""
    last = [run.curves[COLUMN][-1] for run in cell.runs if COLUMN in run.curves and run.epochs_done]
    return [float(value) for value in last if np.isfinite(value)]


def _spread(scores: Sequence[float]) -> tuple[float, float | None]:
    return float(np.mean(scores)), float(np.std(scores, ddof=1)) if len(scores) > 1 else None
