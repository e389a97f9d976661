"""Figures over training epochs: accuracy, the quantities of TTM's Figs. 1 and 2 (arXiv 2402.11148), and logit moments."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from kdcache.archive import LogitMoments, Statistics
from kdcache.report.figures import MOST_LINES, MOST_PANELS, TEACHER, Drawing, Lines, pages_of, short
from kdcache.report.table import Cell, Row, Table, labels

__all__ = ["training_drawings"]

MOST_POINTS = 400  # points per curve
MOST_MARKERS = 60
MOST_TICKS = 5  # ticks take most of the drawing time
Range = tuple[float, float, float]  # mean, 5 % and 95 % quantile over the rows


@dataclass(frozen=True)
class _Column:
    """One drawn column of metrics.jsonl. `teacher` and `teacher_at` give the teacher's value, the latter at a tau."""

    name: str
    label: str
    words: str
    zoomed: bool = False  # the axis fits the values after the first fifth of the epochs
    logarithmic: bool = False
    teacher: Callable[[Statistics], Range | None] = lambda statistics: None
    teacher_at: Callable[[Statistics, float], float | None] = lambda statistics, tau: None


@dataclass(frozen=True)
class _Kind:
    name: str
    columns: tuple[_Column, ...]
    shared: bool  # whether all panels have the same scale
    beside: str = ""  # caption about the teacher's lines, for curves by tau
    beside_many: str = ""  # the same for curves by row


def _entropy_at(statistics: Statistics, tau: float) -> float | None:
    return next((figures.entropy_mean for figures in statistics.per_tau if figures.tau == tau), None)


def _entropy(statistics: Statistics) -> Range | None:
    value = _entropy_at(statistics, 1.0)
    return None if value is None else (value, value, value)


def _mean(statistics: Statistics) -> Range | None:
    details = statistics.details
    return (details.moments.mean, *_most(details.moments, axis=1)) if details else None


def _deviation(statistics: Statistics) -> Range | None:
    details = statistics.details
    return (details.moments.std, *_most(details.moments, axis=0)) if details else None


def _most(moments: LogitMoments, *, axis: int) -> tuple[float, float]:
    """5 % and 95 % quantiles of the rows' means (axis 1) or deviations (axis 0), to the precision of a histogram bin."""
    counts = np.array(moments.counts).sum(axis=axis)
    edges = np.linspace(*(moments.mean_range if axis else moments.std_range), len(counts) + 1)
    share = np.cumsum(counts) / counts.sum()
    return float(edges[np.searchsorted(share, 0.05)]), float(edges[np.searchsorted(share, 0.95) + 1])


KINDS = (
    _Kind(
        "training",
        (
            _Column(
                "test_top1", "test top-1 (%)", "test top-1, on an axis zoomed to what comes after the first fifth", zoomed=True
            ),
            _Column(
                "agreement", "agreement with the teacher (%)", "training views on which student and teacher name the same class"
            ),
        ),
        shared=False,
    ),
    _Kind(
        "student entropy and divergence",
        (
            _Column(
                "student_entropy",
                "student's mean H(q), tau 1",
                "mean relative entropy H(q) of the student's output, tau 1",
                teacher=_entropy,
                teacher_at=_entropy_at,
            ),
            _Column(
                "divergence",
                "mean D(p_tau || q), nats",
                "mean divergence of the student's output at tau 1 from the teacher's at tau",
                logarithmic=True,
            ),
        ),
        shared=True,
        beside="; dashed in grey, the teacher's entropy at tau 1, and thinly dashed in a curve's colour that at its tau",
        beside_many="; dashed, the teacher's entropy at tau 1",
    ),
    _Kind(
        "student logits",
        (
            _Column("logit_mean", "mean of a row's logits", "mean of a row's logits", teacher=_mean),
            _Column("logit_std", "deviation of a row's logits", "standard deviation of a row's logits", teacher=_deviation),
        ),
        shared=True,
        beside="; dashed, the teacher's over the archive, with nine rows of ten in the grey band",
        beside_many="; dashed, the teacher's over the archive, with nine rows of ten in the grey band",
    ),
)


@dataclass(frozen=True)
class _Entry:
    """One curve of a panel: the seeds of a cell."""

    label: str  # text in the legend
    colour: Any
    dashes: Any
    tau: float
    cell: Cell
    beside: str = ":"  # dashes of the teacher's line at this tau; empty: no line


_CurvePanel = tuple[str, list[_Entry]]  # title, curves


def training_drawings(table: Table, rows: Sequence[Row], place: str, teachers: Mapping[str, Statistics]) -> list[Drawing]:
    """Curves by epoch for control none, one per tau: accuracy and agreement, H(q) and D(p_tau || q), logit moments.

    With more rows than panels, each row is one curve, at its best tau. `teachers` maps archive digests to statistics.
    Columns that no run logged are left out.
    """
    rows = [row for row in rows if row.control == "none" and table.ranked(row)]
    many = len(rows) > MOST_PANELS
    panels = _best_of_rows(table, rows) if many else _by_tau(table, rows)
    logged = {name for row in rows for _, cell in table.ranked(row) for run in cell.runs for name in _logged(run.curves)}
    drawings = []
    for kind in KINDS:
        if columns := [column for column in kind.columns if column.name in logged]:
            drawings += [_page(some, place, kind, columns, teachers, many=many) for some in pages_of(panels)]
    return drawings


def _by_tau(table: Table, rows: Sequence[Row]) -> list[_CurvePanel]:
    """One panel per row, with one curve per tau."""
    taus = table.taus_of(rows)
    # Taus are ordered, so their colours come from a sequential map, which is readable without hue.
    colours = dict(zip(taus, colormaps["viridis"](np.linspace(0.0, 0.86, len(taus))), strict=True))
    titles = labels(rows, ("student", "method", "setting"))
    return [
        (titles[row], [_Entry(f"{tau:g}", colours[tau], "-", tau, cell) for tau in taus if (cell := table.get(row, tau))])
        for row in rows
    ]


def _best_of_rows(table: Table, rows: Sequence[Row]) -> list[_CurvePanel]:
    """Panels of several rows, with one curve per row, at its best tau."""
    panels = [("", list(rows[start : start + MOST_LINES])) for start in range(0, len(rows), MOST_LINES)]
    lines = Lines(panels)
    best_panels = []
    for title, panel in panels:
        entries = []
        for row in panel:
            tau, cell = table.ranked(row)[0]
            colour, _, dashes = lines.look(row)
            entries.append(_Entry(f"{short(lines.name(row), 40)}, tau {tau:g}", colour, dashes, tau, cell, ""))
        best_panels.append((title, entries))
    return best_panels


def _logged(curves: Mapping[str, NDArray[np.float64]]) -> list[str]:
    return [name for name, values in curves.items() if np.isfinite(values).any()]


def _page(
    panels: list[_CurvePanel],
    place: str,
    kind: _Kind,
    columns: Sequence[_Column],
    teachers: Mapping[str, Statistics],
    *,
    many: bool,
) -> Drawing:
    cells = [entry.cell for _, entries in panels for entry in entries]
    used = {run.args.archive_digest for cell in cells for run in cell.runs} & teachers.keys()
    compared = any(column.teacher(teachers[digest]) for digest in used for column in columns)
    one_length = len({run.args.epochs for cell in cells for run in cell.runs}) == 1

    def draw(figure: Figure) -> None:
        grid = figure.subplots(
            len(panels),
            len(columns),
            squeeze=False,
            sharex="col" if one_length else False,
            sharey="col" if kind.shared else False,
        )
        for line, (title, entries) in zip(grid, panels, strict=True):
            line[0].set_title(short(title, 60))
            for axes, column in zip(line, columns, strict=True):
                _draw(axes, entries, column, teachers)
        for axes in grid[:-1].flat if one_length else ():
            axes.set_xlabel("")
        looks = {entry.label: (entry.colour, entry.dashes) for _, entries in panels for entry in entries}
        if not many:
            looks = dict(sorted(looks.items(), key=lambda look: float(look[0])))
        handles = {
            label: Line2D([], [], color=colour, linestyle=dashes, linewidth=2) for label, (colour, dashes) in looks.items()
        }
        if compared:
            handles["teacher"] = Line2D([], [], **TEACHER)
        title = "at the best tau" if many else "tau"
        figure.legend(handles.values(), handles.keys(), title=title, loc="outside right upper", alignment="left")

    words = columns[0].words if len(columns) == 1 else f"left, {columns[0].words}; right, {columns[1].words}"
    caption = f"{kind.name.capitalize()} by epoch with control none, {place}, means over the seeds: {words}"
    if many:
        caption += "; a line for each row of the results, at its best tau"
    if compared:
        caption += kind.beside_many if many else kind.beside
    caption += ". Means over an epoch's training batches." if kind.shared else "."
    alt = f"Curves by epoch, {place}: {words}. At the end, {_ends(panels, columns)}"
    width = 4.6 * max(len(columns), 1.5) + (2.4 if many else 0.0)
    return Drawing(f"{kind.name} {place}", caption, alt, (width, 0.7 + 2.7 * len(panels)), draw)


def _draw(axes: Axes, entries: Sequence[_Entry], column: _Column, teachers: Mapping[str, Statistics]) -> None:
    late: list[float] = []
    digests: set[str] = set()
    lowest = np.inf
    for entry in entries:
        epoch, mean = entry.cell.curve(column.name)
        if not len(epoch):
            continue
        shown = _thinned(len(epoch))
        sparse = len(epoch) < 3 or (len(epoch) < epoch[-1] + 1 and len(epoch) <= MOST_MARKERS)
        look: dict[str, Any] = {"color": entry.colour, "linestyle": entry.dashes, "marker": "." if sparse else None}
        axes.plot(epoch[shown] + 1, mean[shown], linewidth=1.6, **look)
        late += list(mean[len(mean) // 5 :])
        lowest = min(lowest, float(mean.min()))
        used = {run.args.archive_digest for run in entry.cell.runs} & teachers.keys()
        for digest in sorted(used) if entry.beside and entry.tau != 1 else ():
            value = column.teacher_at(teachers[digest], entry.tau)
            if value is not None:
                axes.axhline(value, color=entry.colour, linestyle=entry.beside, linewidth=1.1)
        digests |= used
    for digest in sorted(digests):
        if teacher_range := column.teacher(teachers[digest]):
            value, low, high = teacher_range
            axes.axhline(value, **TEACHER)
            if high > low:
                axes.axhspan(low, high, color="#000000", alpha=0.06, linewidth=0)
    if column.zoomed and late:
        margin = 0.05 + 0.04 * (max(late) - min(late))
        axes.set_ylim(min(late) - margin, max(late) + margin)
    axes.yaxis.set_major_locator(MaxNLocator(MOST_TICKS))
    if column.logarithmic and 0 < lowest < np.inf:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")  # plain numbers, since math text is off (names from the runs)
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="epochs trained", ylabel=column.label)
    axes.xaxis.set_major_locator(MaxNLocator(MOST_TICKS, integer=True, min_n_ticks=1))


def _thinned(count: int) -> NDArray[np.int64]:
    """Indices of the drawn points of a curve: all, or `MOST_POINTS` evenly spaced ones with both ends."""
    return np.unique(np.linspace(0, count - 1, min(count, MOST_POINTS)).round().astype(np.int64))


def _ends(panels: Sequence[_CurvePanel], columns: Sequence[_Column]) -> str:
    """The final values of the first panels' curves in words, for the alt text."""
    phrases = []
    for title, entries in panels[:4]:
        for column in columns:
            ends = []
            for entry in entries:
                _, mean = entry.cell.curve(column.name)
                name = entry.label if not entry.beside else f"tau {entry.tau:g}"
                ends += [f"{mean[-1]:.4g} at {name}"] if len(mean) else []
            phrases.append(f"{title + ', ' if title else ''}{column.label}: {', '.join(ends) or 'not logged'}")
    return "; ".join(phrases) + "."
