"""Tables of scores over tau, as the papers print them: the best of a line in bold, what ties with it underlined."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kdcache.archive import Archive
from kdcache.report.table import ROW_FIELDS, Cell, Row, Table, labels, natural, paired

__all__ = ["REST", "WHOLE", "Heatmap", "Line", "Score", "TeacherFigures", "heatmaps", "results", "teacher_figures"]

WHOLE, REST = "Ĥ(p)", "Ĥ(p̄)"  # relative entropies of the teacher's output, and of that without its top class
STARTS = {"timm": "pretrained", "random": "from scratch"}
Mark = str  # "best", "tied" or "": nothing


@dataclass(frozen=True, eq=False)
class Score:
    """A cell of a line: how it stands to the line's best one, and where it lies from the line's worst (0) to its best (1)."""

    cell: Cell
    mark: Mark
    shade: float


@dataclass(frozen=True, eq=False)
class Line:
    names: tuple[str, ...]  # one for each of the table's fields
    scores: tuple[Score | None, ...]  # one for each of its taus; None: not run to its end


@dataclass(frozen=True, eq=False)
class Heatmap:
    """Lines over tau. `fields` are the heads of the columns of names."""

    name: str
    caption: str
    fields: tuple[str, ...]
    taus: tuple[float, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class TeacherFigures:
    """One line of the temperature study's Table 1: an archive's teacher, how it was trained and its relative entropies."""

    name: str  # of the archive
    digest: str
    teacher: str
    exact: str = ""
    start: str = ""
    epochs: int | None = None  # of its training
    top1_clean: float | None = None
    top1_views: float | None = None
    entropy: float | None = None  # at tau 1
    entropy_rest: float | None = None

    @property
    def training(self) -> str:
        """How it was trained, in a few words; nothing where that is not known."""
        return (
            f"{self.start} + {self.epochs} {'epoch' if self.epochs == 1 else 'epochs'}"
            if self.start and self.epochs is not None
            else ""
        )


def teacher_figures(name: str, digest: str, alias: str, archive: Archive | None) -> TeacherFigures:
    """Of an archive called `name`, whose teacher the runs call `alias`; of one that is not there no more than this."""
    if archive is None:
        return TeacherFigures(name, digest, alias)
    card, statistics = archive.manifest.teacher, archive.manifest.statistics
    training = (card.training if card else None) or {}
    epochs = training.get("epochs")
    at_one = next((figures for figures in statistics.per_tau if figures.tau == 1), None)
    return TeacherFigures(
        name,
        digest,
        card.alias if card else alias,
        card.name if card else "",
        STARTS.get(str(training.get("start", "")), str(training.get("start", ""))),
        epochs if isinstance(epochs, int) else None,
        card.top1_clean if card else None,
        statistics.top1_views,
        at_one.entropy_mean if at_one else None,
        at_one.entropy_rest_mean if at_one else None,
    )


def results(table: Table) -> Heatmap:
    """All lines of the table, with what tells them apart."""
    fields = tuple(f for f in ROW_FIELDS if f == "control" or len({getattr(row, f) for row in table.rows}) > 1)
    return Heatmap(
        "results",
        "Test top-1 of the last epoch in percent: mean ± standard deviation (number of seeds), by tau.",
        fields,
        table.taus,
        tuple(_line(table, row, tuple(getattr(row, field) for field in fields), table.taus) for row in table.rows),
    )


def heatmaps(table: Table, teachers: Mapping[str, TeacherFigures]) -> list[Heatmap]:
    """Methods, controls and teachers over tau, each where there are several; `teachers` by archive digest."""
    plain = [row for row in table.rows if row.control == "none"]
    return [
        *_compared(table, plain, "methods", ("method",), lambda row: (row.dataset, row.teacher, row.student, row.setting)),
        *_compared(
            table,
            table.rows,
            "controls",
            ("control",),
            lambda row: (row.dataset, row.teacher, row.student, row.method, row.setting),
        ),
        *_teachers(table, plain, teachers),
    ]


def _compared(
    table: Table, rows: Sequence[Row], name: str, fields: tuple[str, ...], group: Callable[[Row], tuple[str, ...]]
) -> list[Heatmap]:
    """A table for each group of rows that has more than one with a result."""
    groups = {key: members for key, members in _grouped(table, rows, group).items() if len(members) > 1}
    places = _places(groups)
    return [
        Heatmap(
            " ".join(filter(None, (name, places[key]))),
            f"Test top-1 in percent by {fields[0]} and tau{_after(places[key])}.",
            fields,
            tuple(table.taus_of(members)),
            tuple(_line(table, row, tuple(getattr(row, f) for f in fields), table.taus_of(members)) for row in members),
        )
        for key, members in groups.items()
    ]


def _teachers(table: Table, rows: Sequence[Row], teachers: Mapping[str, TeacherFigures]) -> list[Heatmap]:
    """The temperature study's Table 1: teachers, how long they were trained and what they say, with the scores over tau."""
    found = _grouped(table, rows, lambda row: (row.dataset, row.student, row.method, _other_than_archive(row.setting)))
    groups = {key: members for key, members in found.items() if len({_digest(table, row) for row in members}) > 1}
    places = _places(groups)
    maps = []
    for key, members in groups.items():
        lines = []
        for row in members:
            known = teachers.get(_digest(table, row)) or TeacherFigures("", _digest(table, row), row.teacher)
            lines.append((known, row))
        lines.sort(key=lambda pair: (natural(pair[0].teacher), pair[0].start, pair[0].epochs or 0, pair[0].digest))
        taus = table.taus_of(members)
        maps.append(
            Heatmap(
                " ".join(filter(None, ("teachers", places[key]))),
                f"Test top-1 in percent by teacher and tau{_after(places[key])}; relative entropies at tau 1.",
                ("teacher", "start", "epochs", WHOLE, REST, "archive"),
                tuple(taus),
                tuple(_line(table, row, _described(known), taus) for known, row in lines),
            )
        )
    return maps


def _described(known: TeacherFigures) -> tuple[str, ...]:
    entropies = ("" if value is None else f"{value:.3f}" for value in (known.entropy, known.entropy_rest))
    return known.teacher, known.start, "" if known.epochs is None else str(known.epochs), *entropies, known.digest[:8]


def _grouped(table: Table, rows: Sequence[Row], group: Callable[[Row], tuple[str, ...]]) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if table.ranked(row):
            groups.setdefault(group(row), []).append(row)
    return groups


def _places(groups: Mapping[tuple[str, ...], Sequence[Row]]) -> dict[tuple[str, ...], str]:
    """What tells the groups apart, in words."""
    names = labels([members[0] for members in groups.values()], ROW_FIELDS)
    return {key: names[members[0]] for key, members in groups.items()}


def _after(place: str) -> str:
    return f", {place}" if place else ""


def _digest(table: Table, row: Row) -> str:
    return table.ranked(row)[0][1].runs[0].args.archive_digest


def _other_than_archive(setting: str) -> str:
    return ", ".join(
        part for part in setting.split(", ") if not re.fullmatch(r"archive [0-9a-f]{8}|.* \(archive [0-9a-f]{8}\)", part)
    )


def _line(table: Table, row: Row, names: tuple[str, ...], taus: Sequence[float]) -> Line:
    ranked = table.ranked(row)
    best = ranked[0][1] if ranked else None
    means = [cell.mean for _, cell in ranked]

    def score(cell: Cell | None) -> Score | None:
        if cell is None or best is None:
            return None
        shade = (cell.mean - min(means)) / (max(means) - min(means)) if len(set(means)) > 1 else 0.0
        return Score(cell, _mark(cell, best), shade)

    return Line(names, tuple(score(table.get(row, tau)) for tau in taus))


def _mark(cell: Cell, best: Cell) -> Mark:
    if cell is best:
        return "best"
    difference = paired(best, cell)
    return "tied" if difference is not None and difference.tied else ""
