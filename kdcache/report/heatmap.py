"""Tables of scores over tau or methods, as in the papers: the best of a line is bold, ties with it are underlined."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kdcache.archive import TEACHER_ENTROPIES, Archive
from kdcache.report.records import STUDENT
from kdcache.report.table import ROW_FIELDS, Cell, Row, Table, labels, natural, paired

__all__ = [
    "CLEAN",
    "REST",
    "WHOLE",
    "Heatmap",
    "Line",
    "Score",
    "TeacherFigures",
    "heatmaps",
    "method_names",
    "results",
    "teacher_figures",
]

WHOLE, REST = "Ĥ(p)", "Ĥ(p̄)"  # relative entropies of the teacher's output, with and without its top class
ALONE = "student alone"  # heads the column of students that learned from labels alone, as in the papers' tables
CLEAN = " clean"  # after them: of the clean test images; else of the training views, as the archive has them
PAIR = ("dataset", "teacher", "student")
WEIGHT = "kd_weight"  # the option of methods
STARTS = {"timm": "pretrained", "random": "from scratch"}
STARTING = {name: place for place, name in enumerate(("random", "target", "pretrained", "finetuned"))}  # as in Table 2
Mark = str  # "best", "tied" or "" (neither)


@dataclass(frozen=True, eq=False)
class Score:
    """One score of a line: its mark, and its place between the line's worst (0) and best (1) score."""

    cell: Cell
    mark: Mark
    shade: float


@dataclass(frozen=True, eq=False)
class Line:
    names: tuple[str, ...]  # one per field of the table
    scores: tuple[Score | None, ...]  # one per column of the table; None: no complete run


@dataclass(frozen=True, eq=False)
class Heatmap:
    """Lines of scores over taus or methods. `fields` head the columns of names, `columns` those of scores."""

    name: str
    caption: str
    fields: tuple[str, ...]
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    over: Literal["tau", "method"] = "tau"


@dataclass(frozen=True)
class TeacherFigures:
    """One line of the temperature study's Table 1: an archive's teacher, its training and its relative entropies."""

    name: str  # the archive's name
    digest: str
    teacher: str
    exact: str = ""
    start: str = ""
    epochs: int | None = None  # epochs of its training
    top1_clean: float | None = None
    top1_views: float | None = None
    entropy: float | None = None  # H(p) / log C at tau 1
    entropy_rest: float | None = None
    top5_clean: float | None = None
    entropy_clean: float | None = None  # the same of the clean test images, as train-teacher found them
    entropy_rest_clean: float | None = None

    @property
    def training(self) -> str:
        """The training in a few words; empty if unknown."""
        return (
            f"{self.start} + {self.epochs} {'epoch' if self.epochs == 1 else 'epochs'}"
            if self.start and self.epochs is not None
            else ""
        )


def teacher_figures(name: str, digest: str, alias: str, archive: Archive | None) -> TeacherFigures:
    """Figures of the teacher of archive `name`, called `alias` in the runs. A missing archive gives names only."""
    if archive is None:
        return TeacherFigures(name, digest, alias)
    card, statistics = archive.manifest.teacher, archive.manifest.statistics
    training = (card.training if card else None) or {}
    epochs = training.get("epochs")
    start = STARTS.get(str(training.get("start", "")), str(training.get("start", "")))
    alone = ", head alone" if not epochs and training.get("head_epochs") else ""
    at_one = next((figures for figures in statistics.per_tau if figures.tau == 1), None)
    return TeacherFigures(
        name,
        digest,
        card.alias if card else alias,
        card.name if card else "",
        start + alone,
        epochs if isinstance(epochs, int) else None,
        card.top1_clean if card else None,
        statistics.top1_views,
        at_one.entropy_mean if at_one else None,
        at_one.entropy_rest_mean if at_one else None,
        card.top5_clean if card else None,
        *(_share(archive.manifest.provenance.get(TEACHER_ENTROPIES), key) for key in ("entropy", "entropy_rest")),
    )


def _share(record: object, key: str) -> float | None:
    """A relative entropy in a record of unknown origin; None if it has none."""
    value = record.get(key) if isinstance(record, Mapping) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1.001 else None


def results(table: Table) -> Heatmap:
    """The table of all results, with the fields that distinguish its lines."""
    fields = tuple(f for f in ROW_FIELDS if f == "control" or len({getattr(row, f) for row in table.rows}) > 1)
    return Heatmap(
        "results",
        "Test top-1 of the last epoch in percent: mean ± standard deviation (number of seeds), by tau.",
        fields,
        _texts(table.taus),
        tuple(_line(tuple(getattr(row, f) for f in fields), _over(table, row, table.taus)) for row in table.rows),
    )


def heatmaps(table: Table, teachers: Mapping[str, TeacherFigures]) -> list[Heatmap]:
    """Tables that compare several methods, controls or teachers: methods by pair, and each of them over tau.

    `teachers` maps archive digests to figures.
    """
    plain = [row for row in table.rows if row.control == "none"]
    return [
        *_pairs(table, plain),
        *_weights(table, plain),
        *_compared(table, plain, "methods", ("method",), lambda row: (row.dataset, row.teacher, row.student, row.setting)),
        *_compared(
            table,
            table.rows,
            "controls",
            ("control",),
            lambda row: (row.dataset, row.teacher, row.student, row.method, row.setting),
        ),
        *_teachers(table, [row for row in plain if not _without_teacher(table, row)], teachers),
        *starts(table, plain, teachers),
    ]


def _compared(
    table: Table, rows: Sequence[Row], name: str, fields: tuple[str, ...], group: Callable[[Row], tuple[str, ...]]
) -> list[Heatmap]:
    """One table for each group that has several rows with results."""
    groups = {key: members for key, members in _grouped(table, rows, group).items() if len(members) > 1}
    places = _places(groups)
    return [
        Heatmap(
            " ".join(filter(None, (name, places[key]))),
            f"Test top-1 in percent by {fields[0]} and tau{_after(places[key])}.",
            fields,
            _texts(table.taus_of(members)),
            tuple(_line(tuple(getattr(row, f) for f in fields), _over(table, row, table.taus_of(members))) for row in members),
        )
        for key, members in groups.items()
    ]


def _pairs(table: Table, rows: Sequence[Row]) -> list[Heatmap]:
    """Methods side by side for every pair of teacher and student, as in papers on CIFAR-100."""
    pairs = _grouped(table, rows, lambda row: tuple(getattr(row, field) for field in PAIR))
    names = method_names(table, [row for members in pairs.values() for row in members])
    columns = tuple(
        dict.fromkeys(
            names[row] for row in sorted(names, key=lambda row: (not row.baseline, row.method != "kd", natural(row.method)))
        )
    )
    if len(pairs) < 2 or len(columns) < 2:
        return []
    fields = tuple(field for number, field in enumerate(PAIR) if len({pair[number] for pair in pairs}) > 1)
    lines = []
    for members in pairs.values():
        best: dict[str, Cell] = {}
        for row in members:
            cell = table.ranked(row)[0][1]
            best[names[row]] = max(best.get(names[row], cell), cell, key=lambda scored: scored.mean)
        lines.append(_line(tuple(getattr(members[0], field) for field in fields), [best.get(column) for column in columns]))
    caption = "Test top-1 in percent by pair of teacher and student, each method at its best tau (and setting, of several)."
    if ALONE in columns:
        caption += f" {ALONE.capitalize()}: from labels, by the same recipe."
    return [Heatmap("pairs", caption, fields, columns, tuple(lines), over="method")]


def _weights(table: Table, rows: Sequence[Row]) -> list[Heatmap]:
    """Methods side by side at every weight of their loss, as in logit standardization's Table 4, where weights are compared."""
    methods = {row: table.ranked(row)[0][1].runs[0].args.method for row in rows if table.ranked(row)}
    weights = {row: float(method[WEIGHT]) for row, method in methods.items() if WEIGHT in method}  # labels alone have none
    grouped = _grouped(table, list(weights), lambda row: (row.dataset, row.teacher, row.student, row.setting))
    groups, named = {}, {}
    for key, members in grouped.items():
        weight = {row: weights[row] for row in members}
        others = {row: [part for part in re.split("[:,]", row.method) if not part.startswith(f"{WEIGHT}=")] for row in members}
        shared = set.intersection(*map(set, others.values()))
        names = {row: " ".join(part for part in others[row] if part not in shared or part == others[row][0]) for row in members}
        places = {(weight[row], names[row]) for row in members}
        if len(places) == len(members) and len(set(weight.values())) > 1 and len(set(names.values())) < len(members):
            groups[key], named[key] = members, (weight, names)
    titles = _places(groups)
    maps = []
    for key, members in groups.items():
        weight, names = named[key]
        columns = tuple(dict.fromkeys(names[row] for row in sorted(members, key=lambda row: row.order)))
        lines = []
        for number in sorted(set(weight.values())):
            cells = {names[row]: table.ranked(row)[0][1] for row in members if weight[row] == number}
            lines.append(_line((f"{number:g}",), [cells.get(column) for column in columns]))
        caption = f"Test top-1 in percent by weight of the distillation, each method at its best tau{_after(titles[key])}."
        name = " ".join(filter(None, ("weights", titles[key])))
        maps.append(Heatmap(name, caption, ("weight",), columns, tuple(lines), over="method"))
    return maps


def method_names(table: Table, rows: Sequence[Row]) -> dict[Row, str]:
    """Short method names without options, which may differ between pairs.

    Where a pair has two rows of one name, the name tells whether labels are used too; if that is not enough, all options.
    """

    def name(row: Row) -> str:
        short = row.method.partition(":")[0]
        return ALONE if row.baseline else row.method if short == STUDENT else short

    def with_labels(row: Row) -> str:
        return f"{name(row)} with CE" if table.ranked(row)[0][1].runs[0].args.method.get("ce_weight") else name(row)

    names: dict[Row, str] = {}
    for which in dict.fromkeys(map(name, rows)):
        members = [row for row in rows if name(row) == which]
        for naming in (name, with_labels, lambda row: row.method):
            named = {row: naming(row) for row in members}
            places = [(row.dataset, row.teacher, row.student, row.setting, named[row]) for row in members]
            if len(set(places)) == len(places):
                break
        names |= named
    return names


def _teachers(table: Table, rows: Sequence[Row], teachers: Mapping[str, TeacherFigures]) -> list[Heatmap]:
    """Teachers with their training, entropies and scores over tau, as in the temperature study's Table 1."""
    grouped = _grouped(table, rows, lambda row: (row.dataset, row.student, row.method, _other_than_archive(row.setting)))
    groups = {key: members for key, members in grouped.items() if len({_digest(table, row) for row in members}) > 1}
    places = _places(groups)
    maps = []
    for key, members in groups.items():
        lines = []
        for row in members:
            known = teachers.get(_digest(table, row)) or TeacherFigures("", _digest(table, row), row.teacher)
            lines.append((known, row))
        lines.sort(key=lambda pair: (natural(pair[0].teacher), pair[0].start, pair[0].epochs or 0, pair[0].digest))
        taus = table.taus_of(members)
        scale = [cell.mean for row in members for _, cell in table.ranked(row)]  # one for all lines: students of some are worse
        maps.append(
            Heatmap(
                " ".join(filter(None, ("teachers", places[key]))),
                f"Test top-1 in percent by teacher and tau{_after(places[key])}; darker is better within this table. Relative "
                "entropies at tau 1, of the training views and of the clean test images (temperature study, Table 1).",
                ("teacher", "start", "epochs", WHOLE, REST, WHOLE + CLEAN, REST + CLEAN, "archive"),
                _texts(taus),
                tuple(_line(_described(known), _over(table, row, taus), scale) for known, row in lines),
            )
        )
    return maps


def starts(table: Table, rows: Sequence[Row], teachers: Mapping[str, TeacherFigures]) -> list[Heatmap]:
    """Students by what they started from, with the accuracy of the start itself, as in the temperature study's Table 2."""

    def other(setting: str) -> str:
        return ", ".join(part for part in setting.split(", ") if not re.fullmatch(r"(init|head_init|weights) \S+", part))

    grouped = _grouped(table, rows, lambda row: (row.dataset, row.teacher, row.method, other(row.setting)))
    groups = {key: members for key, members in grouped.items() if len({_init(table, row) for row in members}) > 1}
    names = labels([members[0] for members in groups.values()], ("dataset", "teacher", "method"))
    maps = []
    for (_, _, _, setting), members in groups.items():
        place = ", ".join(filter(None, (names[members[0]], setting if len({key[3] for key in groups}) > 1 else "")))
        top1 = getattr(teachers.get(_digest(table, members[0])), "top1_clean", None)
        teacher = f" Teacher {members[0].teacher}: {top1:.2f} %." if top1 is not None else ""
        members.sort(key=lambda row: (natural(row.student), STARTING.get(_init(table, row), len(STARTING)), natural(row.setting)))
        taus = table.taus_of(members)
        lines = []
        for row in members:
            own = table.ranked(row)[0][1].runs[0].args.start_top1
            named = (row.student, _init(table, row), "" if own is None else f"{own:.2f}")
            lines.append(_line(named, _over(table, row, taus)))
        maps.append(
            Heatmap(
                " ".join(filter(None, ("starts", place))),
                f"Test top-1 in percent by student, start and tau{_after(place)}.{teacher} Alone: the top-1 of the start itself, "
                "before distillation (temperature study, Table 2).",
                ("student", "start", "alone (%)"),
                _texts(taus),
                tuple(lines),
            )
        )
    return maps


def _init(table: Table, row: Row) -> str:
    return table.ranked(row)[0][1].runs[0].args.start


def _described(known: TeacherFigures) -> tuple[str, ...]:
    values = (known.entropy, known.entropy_rest, known.entropy_clean, known.entropy_rest_clean)
    entropies = ("" if value is None else f"{value:.3f}" for value in values)
    return known.teacher, known.start, "" if known.epochs is None else str(known.epochs), *entropies, known.digest[:8]


def _grouped(table: Table, rows: Sequence[Row], group: Callable[[Row], tuple[str, ...]]) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if table.ranked(row):
            groups.setdefault(group(row), []).append(row)
    return groups


def _places(groups: Mapping[tuple[str, ...], Sequence[Row]]) -> dict[tuple[str, ...], str]:
    """Distinguishing names of the groups."""
    names = labels([members[0] for members in groups.values()], ROW_FIELDS)
    return {key: names[members[0]] for key, members in groups.items()}


def _after(place: str) -> str:
    return f", {place}" if place else ""


def _without_teacher(table: Table, row: Row) -> bool:
    return any(cell.without_teacher for _, cell in table.ranked(row))


def _digest(table: Table, row: Row) -> str:
    return table.ranked(row)[0][1].runs[0].args.archive_digest


def _other_than_archive(setting: str) -> str:
    return ", ".join(
        part
        for part in setting.split(", ")
        if not re.fullmatch(r"(archive|second views) [0-9a-f]{8}|.* \(archive [0-9a-f]{8}\)", part)
    )


def _texts(taus: Sequence[float]) -> tuple[str, ...]:
    return tuple(f"{tau:g}" for tau in taus)


def _over(table: Table, row: Row, taus: Sequence[float]) -> list[Cell | None]:
    return [table.get(row, tau) for tau in taus]


def _line(names: tuple[str, ...], cells: Sequence[Cell | None], scale: Sequence[float] = ()) -> Line:
    """A line of a table. Shades go from the worst to the best of `scale`, or else of the line."""
    known = [cell for cell in cells if cell is not None]
    best = max(known, key=lambda cell: cell.mean, default=None)
    means = scale or [cell.mean for cell in known]

    def score(cell: Cell | None) -> Score | None:
        if cell is None or best is None:
            return None
        shade = (cell.mean - min(means)) / (max(means) - min(means)) if len(set(means)) > 1 else 0.0
        return Score(cell, _mark(cell, best), shade)

    return Line(names, tuple(map(score, cells)))


def _mark(cell: Cell, best: Cell) -> Mark:
    if cell is best:
        return "best"
    difference = paired(best, cell)
    return "tied" if difference is not None and difference.tied else ""
