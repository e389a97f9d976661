"""Methods beside each other for every pair of teacher and student: over epochs, over seconds, and by the students' entropies.

H(q) and D(p_tau || q) are TTM's Figs. 1 and 2, the histograms its Fig. 3 (arXiv 2402.11148); loss and correlation, and seconds,
are Figs. 1 and 2 of the max-logit temperature.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from kdcache.archive import EntropyHistogram
from kdcache.report.figures import BASELINE, COLOURS, DASHES, Drawing, short
from kdcache.report.heatmap import method_names
from kdcache.report.table import Cell, Row, Table

__all__ = ["entropy_drawings", "method_drawings"]

COLUMNS = 4  # pairs, or histograms, beside each other
MOST_HISTOGRAMS = 12  # on a page
FEW_TAUS = 4  # of a method, each of which has a histogram
MOST_POINTS = 400  # of a curve
MOST_TICKS = 5
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def _mean(column: str) -> Callable[[Cell], Curve]:
    def curve(cell: Cell) -> Curve:
        epoch, mean = cell.curve(column)
        return epoch + 1, mean

    return curve


def _uncorrelated(cell: Cell) -> Curve:
    epoch, mean = cell.curve("correlation")
    return epoch + 1, 1 - mean


def _seconds(cell: Cell) -> Curve:
    """Seconds up to the end of each epoch, counted from the first: nothing where an epoch's are not known."""
    epoch, mean = cell.curve("seconds")
    if not np.array_equal(epoch, np.arange(len(epoch))):
        return np.empty(0), np.empty(0)
    return epoch + 1, mean.cumsum()


def _over_seconds(cell: Cell) -> Curve:
    (epochs, seconds), (tested, top1) = _seconds(cell), cell.curve("test_top1")
    there = np.isin(tested + 1, epochs)
    return seconds[np.isin(epochs, tested + 1)], top1[there]


@dataclass(frozen=True)
class _Quantity:
    label: str
    words: str
    curve: Callable[[Cell], Curve]
    over: str = "epochs trained"
    logarithmic: bool = False
    of_teachers: bool = False  # means nothing for students without one


@dataclass(frozen=True)
class _Kind:
    name: str
    quantities: tuple[_Quantity, ...]
    note: str = ""


KINDS = (
    _Kind(
        "entropy and divergence of methods",
        (
            _Quantity("student's mean H(q), tau 1", "mean relative entropy of the student's output", _mean("student_entropy")),
            _Quantity(
                "mean D(p_tau || q), nats",
                "mean divergence of the student's output from the teacher's at the method's tau",
                _mean("divergence"),
                logarithmic=True,
                of_teachers=True,
            ),
        ),
        "Means over an epoch's training batches",
    ),
    _Kind(
        "loss and correlation of methods",
        (
            _Quantity(
                "training loss", "training loss, of each method with its own weights", _mean("train_loss"), logarithmic=True
            ),
            _Quantity(
                "1 - correlation of logits",
                "1 minus the mean correlation of a row's logits with the teacher's",
                _uncorrelated,
                logarithmic=True,
            ),
        ),
        "Means over an epoch's training batches",
    ),
    _Kind(
        "seconds of methods",
        (
            _Quantity("seconds of its steps", "seconds of a student's own steps so far", _seconds),
            _Quantity("test top-1 (%)", "test top-1 over these seconds", _over_seconds, over="seconds of its steps"),
        ),
        "Views and cached targets are shared by all students, and in no one's seconds",
    ),
)


@dataclass(frozen=True)
class _Line:
    row: Row
    name: str
    tau: float
    cell: Cell


Pair = tuple[str, list[_Line]]  # teacher and student, methods


def method_drawings(table: Table) -> list[Drawing]:
    """Curves of every method at its best tau, a column for each pair, where a pair has several methods."""
    pairs = [pair for pair in _pairs(table) if len(pair[1]) > 1]
    looks = _looks(pairs)
    drawings = []
    for kind in KINDS:
        shown = [
            pair for pair in pairs if any(len(quantity.curve(line.cell)[0]) for quantity in kind.quantities for line in pair[1])
        ]
        for start in range(0, len(shown), COLUMNS):
            drawings.append(_page(kind, shown[start : start + COLUMNS], looks, start // COLUMNS))
    return drawings


def _pairs(table: Table, most_taus: int = 1) -> list[Pair]:
    """The rows of control none by dataset, teacher, student and setting; labels alone come first.

    A row with at most so many temperatures has them all, one with more its best one.
    """
    rows = [row for row in table.rows if row.control == "none" and table.ranked(row)]
    names = method_names(table, rows)
    groups: dict[tuple[str, ...], list[_Line]] = {}
    for row in rows:
        ranked = table.ranked(row)
        chosen = sorted(ranked, key=lambda pair: pair[0]) if len(ranked) <= most_taus else ranked[:1]
        lines = [_Line(row, names[row], tau, cell) for tau, cell in chosen]
        groups.setdefault((row.dataset, row.teacher, row.student, row.setting), []).extend(lines)
    several = {place: len({key[number] for key in groups}) > 1 for place, number in (("dataset", 0), ("setting", 3))}
    pairs = []
    for (dataset, teacher, student, setting), lines in groups.items():
        more = [text for text, wanted in ((dataset, several["dataset"]), (setting, several["setting"])) if wanted and text]
        pairs.append((", ".join([f"{teacher} → {student}", *more]), lines))
    return pairs


def _looks(pairs: Sequence[Pair]) -> dict[str, dict[str, Any]]:
    """A colour and dashes for each method, the same in all panels."""
    named = {line.name: line.row.baseline for _, lines in pairs for line in lines}
    coloured = [name for name, baseline in named.items() if not baseline]
    looks: dict[str, dict[str, Any]] = {}
    for name in named:
        turn, which = divmod(coloured.index(name), len(COLOURS)) if name in coloured else (0, 0)
        looks[name] = {"color": COLOURS[which], "linestyle": DASHES[turn % len(DASHES)]}
        if name not in coloured:
            looks[name] = {"color": BASELINE[0], "linestyle": BASELINE[2]}
    return looks


def _page(kind: _Kind, pairs: Sequence[Pair], looks: dict[str, dict[str, Any]], number: int) -> Drawing:
    used = list(dict.fromkeys(line.name for _, lines in pairs for line in lines))

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(kind.quantities), len(pairs), squeeze=False)
        for column, (title, lines) in zip(grid.T, pairs, strict=True):
            column[0].set_title(short(title, 44), fontsize=9)
            for axes, quantity in zip(column, kind.quantities, strict=True):
                _draw(axes, quantity, lines, looks)
        for axes, quantity in zip(grid[:, 0], kind.quantities, strict=True):
            axes.set_ylabel(quantity.label)
        handles = [Line2D([], [], linewidth=2, **looks[name]) for name in used]
        figure.legend(handles, [short(name, 36) for name in used], title="method", loc="outside right upper", alignment="left")

    words = "; below, ".join(quantity.words for quantity in kind.quantities)
    caption = (
        f"{kind.name.capitalize()}, for each pair of teacher and student, every method at its best tau, means over the seeds: "
        f"above, {words}. {kind.note}."
    )
    if any(line.row.baseline for _, lines in pairs for line in lines):
        caption += " Dashed in grey, the student from labels alone."
    alt = f"Curves of {', '.join(used)} for {'; '.join(title for title, _ in pairs)}: {words}. At the end, {_ends(kind, pairs)}"
    size = (3.4 * max(len(pairs), 2) + 1.8, 0.6 + 2.4 * len(kind.quantities))
    return Drawing(kind.name + (f" {number + 1}" if number else ""), caption, alt, size, draw)


def _draw(axes: Axes, quantity: _Quantity, lines: Sequence[_Line], looks: dict[str, dict[str, Any]]) -> None:
    lowest = math.inf
    for line in lines:
        x, y = quantity.curve(line.cell)
        if not len(x) or (quantity.of_teachers and line.cell.without_teacher):
            continue
        shown = np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_POINTS)).round().astype(int))
        axes.plot(x[shown], y[shown], linewidth=1.5, marker="." if len(x) < 3 else None, **looks[line.name])
        lowest = min(lowest, float(y.min()))
    axes.yaxis.set_major_locator(MaxNLocator(MOST_TICKS))
    if quantity.logarithmic and 0 < lowest < math.inf:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(quantity.over)
    axes.xaxis.set_major_locator(MaxNLocator(MOST_TICKS, integer=quantity.over.startswith("epochs"), min_n_ticks=1))


def _ends(kind: _Kind, pairs: Sequence[Pair]) -> str:
    """The last values of the first pair in words."""
    phrases = []
    for quantity in kind.quantities:
        ends = [(line.name, quantity.curve(line.cell)[1]) for line in pairs[0][1]]
        known = ", ".join(f"{name} {values[-1]:.4g}" for name, values in ends if len(values))
        phrases.append(f"{quantity.label} of {pairs[0][0]}: {known or 'not logged'}")
    return "; ".join(phrases) + "."


# ---------------------------------------------------------------- histograms of entropies


def entropy_drawings(table: Table) -> list[Drawing]:
    """Test images by the entropy of the students' outputs: for pairs of several, a panel for each, of its first seed."""
    drawings = []
    for title, lines in _pairs(table, most_taus=FEW_TAUS):
        panels = [(line, found) for line in lines if (found := line.cell.runs[0].test_entropies()) is not None]
        for start in range(0, len(panels), MOST_HISTOGRAMS) if len(panels) > 1 else ():
            drawings.append(_histograms(title, panels[start : start + MOST_HISTOGRAMS], panels))
    return drawings


def _histograms(
    pair: str, panels: Sequence[tuple[_Line, EntropyHistogram]], every: Sequence[tuple[_Line, EntropyHistogram]]
) -> Drawing:
    """`every` panel of the pair decides on the axes, and has the student from labels alone that others are compared with."""
    alone = next((found for line, found in every if line.row.baseline), None)
    columns = min(len(panels), COLUMNS)
    end = max(_nats(found)[1][np.flatnonzero(found.counts)[-1] + 1] for _, found in every)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False, sharex=True, sharey=True)
        for axes, (line, found) in zip(grid.flat, panels, strict=False):
            share, edges = _nats(found)
            axes.stairs(share, edges, fill=True, color=BASELINE[0] if line.row.baseline else COLOURS[0], alpha=0.85)
            axes.axvline(_mean_nats(found), color="#000000", linewidth=1.2)
            if alone is not None and not line.row.baseline:
                axes.axvline(_mean_nats(alone), color=BASELINE[0], linestyle=BASELINE[2], linewidth=1.2)
            axes.set_title(short(_named(line), 36), fontsize=9)
            axes.set_xlim(0, end)
        for axes in grid[-1]:
            axes.set_xlabel("H(q), nats")
        for axes in grid[:, 0]:
            axes.set_ylabel("test images (%)")
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)

    beside = "; dashed in grey, that of the student from labels alone" if alone is not None else ""
    seeds = ", ".join(map(str, sorted({line.cell.runs[0].args.seed for line, _ in panels})))
    caption = (
        f"Test images by the Shannon entropy of the students' outputs after the last epoch, {pair} (seed {seeds}). The line "
        f"is at the mean{beside}."
    )
    means = "; ".join(f"{_named(line)}: {_mean_nats(found):.3g}" for line, found in panels)
    alt = f"Histograms of entropies of the students' outputs, {pair}. Means in nats: {means}."
    size = (2.6 * max(columns, 2) + 0.6, 2.5 * math.ceil(len(panels) / columns))
    return Drawing(f"entropies of students {pair}", caption, alt, size, draw)


def _named(line: _Line) -> str:
    return line.name if line.cell.own_temperature else f"{line.name}, tau {line.tau:g}"


def _nats(found: EntropyHistogram) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Percent of the images in each bin, and the bins' edges in nats."""
    counts = np.array(found.counts, np.float64)
    return 100 * counts / counts.sum(), np.linspace(0, math.log(found.classes), len(counts) + 1)


def _mean_nats(found: EntropyHistogram) -> float:
    return found.mean * math.log(found.classes)
