"""Rows by mean and standard deviation of their logits, student beside teacher (logit standardization, Fig. 5)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray

from kdcache.archive import LogitMoments, Statistics
from kdcache.report.figures import COLOURS, FIELDS, MOST_PANELS, Drawing, short
from kdcache.report.records import RunRecord
from kdcache.report.table import Row, Table, labels

__all__ = ["moment_drawings"]

COLUMNS = 2
MOST_TICKS = 4
STUDENT, TEACHER = (COLOURS[0], "#00263d"), (COLOURS[1], "#4a1f00")  # rows, and the cross at their means
_MomentPanel = tuple[str, RunRecord, LogitMoments, LogitMoments | None]  # title, run, the student's and the teacher's


def moment_drawings(table: Table, rows: Sequence[Row], place: str, teachers: Mapping[str, Statistics]) -> list[Drawing]:
    """One panel for each row of control none with logged moments: the first seed at the best tau.

    `teachers` maps archive digests to their statistics.
    """
    rows = [row for row in rows if row.control == "none" and table.ranked(row)]
    names = labels(rows, FIELDS)
    panels: list[_MomentPanel] = []
    for row in rows:
        tau, cell = table.ranked(row)[0]
        if (moments := cell.runs[0].logit_moments()) is not None:
            statistics = teachers.get(cell.runs[0].args.archive_digest)
            beside = statistics.details.moments if statistics and statistics.details else None
            title = ", ".join(filter(None, (names[row], "" if cell.own_temperature else f"tau {tau:g}")))
            panels.append((title, cell.runs[0], moments, beside))
    return [_page(panels[start : start + MOST_PANELS], place) for start in range(0, len(panels), MOST_PANELS)]


def _page(panels: Sequence[_MomentPanel], place: str) -> Drawing:
    columns = min(len(panels), COLUMNS)
    lines = math.ceil(len(panels) / columns)

    def draw(figure: Figure | SubFigure) -> None:
        parts = figure.subfigures(lines, columns, squeeze=False).flat
        for part, (title, _, student, teacher) in zip(parts, panels, strict=False):
            part.suptitle(short(title, 60), x=0.02, ha="left", fontsize=10)
            _draw(part, student, teacher)

    seeds = ", ".join(map(str, sorted({run.args.seed for _, run, _, _ in panels})))
    known = sum(teacher is not None for _, _, _, teacher in panels)
    orange = f", in orange the teacher over the archive{'' if known == len(panels) else ', where it is known'}" if known else ""
    caption = (
        f"Rows by mean and standard deviation of their logits, {place}, control none. In blue the student at its best tau on "
        f"training views of its last epoch (seed {seeds}){orange}; crosses are at the means. At the sides, the same as "
        "histograms, each with a height of its own."
    )
    phrases = []
    for title, _, student, teacher in panels:
        beside = f", the teacher's {teacher.mean:.3g} and {teacher.std:.3g}" if teacher else ""
        phrases.append(f"{title + ': ' if title else ''}mean {student.mean:.3g}, deviation {student.std:.3g}{beside}")
    alt = f"Two-dimensional histograms of logit mean and standard deviation, {place}. {'; '.join(phrases)}."
    size = (7.0, 4.2) if columns == 1 else (10.5, 3.6 * lines)
    return Drawing(f"logit moments of students {place}", caption, alt, size, draw)


def _draw(figure: SubFigure, student: LogitMoments, teacher: LogitMoments | None) -> None:
    grid = figure.add_gridspec(2, 2, width_ratios=(4, 1), height_ratios=(1, 3))
    axes = figure.add_subplot(grid[1, 0])
    top, right = figure.add_subplot(grid[0, 0], sharex=axes), figure.add_subplot(grid[1, 1], sharey=axes)
    for moments, (colour, cross) in ((student, STUDENT), (teacher, TEACHER)):
        if moments is None:
            continue
        counts, (means, deviations) = np.array(moments.counts, np.float64), _edges(moments)
        shades = LinearSegmentedColormap.from_list(colour, ["#ffffff", colour])
        shown = np.ma.masked_equal(counts.T, 0) ** 0.5  # so that sparse bins are visible
        axes.pcolormesh(means, deviations, shown, cmap=shades, vmin=0, alpha=0.75)
        axes.plot(moments.mean, moments.std, marker="x", color=cross, markersize=8, markeredgewidth=2)
        along_mean, along_std = counts.sum(axis=1), counts.sum(axis=0)
        look: dict[str, Any] = {"fill": True, "color": colour, "alpha": 0.6}
        top.stairs(along_mean / along_mean.max(), means, **look)
        right.stairs(along_std / along_std.max(), deviations, orientation="horizontal", **look)
    axes.set(xlabel="mean of a row's logits", ylabel="deviation of a row's logits")
    axes.xaxis.set_major_locator(MaxNLocator(MOST_TICKS))
    axes.yaxis.set_major_locator(MaxNLocator(MOST_TICKS))
    for margin in (top.yaxis, right.xaxis):
        margin.set_major_locator(NullLocator())
    top.tick_params(labelbottom=False)
    right.tick_params(labelleft=False)


def _edges(moments: LogitMoments) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    bins = len(moments.counts) + 1
    return np.linspace(*moments.mean_range, bins), np.linspace(*moments.std_range, bins)
