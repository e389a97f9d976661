"""Which runs' kept outputs are drawn: of every row the first seed at its best tau, on pages of one teacher and student each."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdcache.report.figures import FIELDS, pages_of
from kdcache.report.records import RunRecord
from kdcache.report.table import Row, Table, labels
from kdcache.training.outputs import TEACHER_OUTPUTS, TEST_OUTPUTS, KeptOutputs

__all__ = ["OutputPage", "Student", "output_pages"]


@dataclass(frozen=True, eq=False)
class Student:
    """A run of a row with what it kept."""

    title: str
    run: RunRecord
    outputs: KeptOutputs

    @property
    def file(self) -> Path:
        return self.run.folder / TEST_OUTPUTS


@dataclass(frozen=True, eq=False)
class OutputPage:
    """Students of one teacher and one architecture. `teacher` is None where its outputs are not there, or of other data."""

    place: str
    teacher: KeptOutputs | None
    students: tuple[Student, ...]

    @property
    def teacher_file(self) -> Path:
        return self.students[0].run.folder.parent / TEACHER_OUTPUTS

    @property
    def seeds(self) -> str:
        return ", ".join(map(str, sorted({student.run.args.seed for student in self.students})))


def output_pages(table: Table, rows: Sequence[Row], place: str, weights: Mapping[str, str]) -> Iterator[OutputPage]:
    """Pages of the rows of control none whose runs kept outputs; those of one student are read at a time.

    `weights` maps archive digests to their teachers' weights, by which the outputs beside the runs are known to be theirs.
    """
    rows = [row for row in rows if row.control == "none" and table.ranked(row)]
    for name, members in _by_student(rows, place):
        titles = labels(members, [field for field in FIELDS if field != "student"])
        found: dict[tuple[str, KeptOutputs | None], list[Student]] = {}
        teachers: dict[str, KeptOutputs | None] = {}
        for row in members:
            tau, cell = table.ranked(row)[0]
            run = cell.runs[0]
            if (outputs := run.outputs()) is None:
                continue
            digest = run.args.archive_digest
            if digest not in teachers:
                teachers[digest] = _teacher_of(run, weights.get(digest))
            teacher = teachers[digest]
            of_both = teacher.of_both(outputs) if teacher is not None else None
            title = ", ".join(filter(None, (titles[row] or row.method, "" if cell.own_temperature else f"tau {tau:g}")))
            found.setdefault((digest, teacher if of_both else None), []).append(Student(title, run, outputs))
        for (_, teacher), students in found.items():
            yield from (OutputPage(name, teacher, tuple(some)) for some in pages_of(students))


def _by_student(rows: Sequence[Row], place: str) -> Iterator[tuple[str, list[Row]]]:
    """Rows of each architecture, with the name of their pages."""
    several = len({row.student for row in rows}) > 1
    for student in dict.fromkeys(row.student for row in rows):
        yield f"{place}, student {student}" if several else place, [row for row in rows if row.student == student]


def _teacher_of(run: RunRecord, weights: str | None) -> KeptOutputs | None:
    outputs = run.teacher_outputs()
    return None if outputs is None or weights not in {None, outputs.weights} else outputs
