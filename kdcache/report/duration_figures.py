"""Students of several durations, as in the temperature study: accuracy over durations (Fig. 2), and over tau (Fig. 3)."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from kdcache.report.figures import COLOURS, Drawing, short
from kdcache.report.table import Cell, Row, Table, natural

__all__ = ["duration_drawings", "of_several_durations"]

MOST_LINES, MOST_COLUMNS = 4, 3  # of panels in one figure
MOST_TICKS = 5
MOST_SPOKEN = 4  # panels whose numbers are in the alt text
WIDTH, HEIGHT = 10.5, 2.35  # of a figure and of one line of panels, inches


@dataclass
class _Training:
    """Rows that differ in their number of epochs only: one panel."""

    student: str
    setting: str  # what else differs, without the epochs
    rows: dict[int, Row] = field(default_factory=dict)  # by epochs, ascending

    @property
    def longest(self) -> int:
        return max(self.rows)


@dataclass(frozen=True)
class _Page:
    """The panels of one figure: a line for each setting, a column for each student."""

    table: Table
    settings: tuple[str, ...]
    students: tuple[str, ...]
    trainings: tuple[_Training, ...]

    @property
    def taus(self) -> list[float]:
        return self.table.taus_of(row for training in self.trainings for row in training.rows.values())

    @property
    def epochs(self) -> list[int]:
        return sorted({epochs for training in self.trainings for epochs in training.rows})

    def get(self, training: _Training, epochs: int, tau: float) -> Cell | None:
        return self.table.get(training.rows[epochs], tau) if epochs in training.rows else None

    def panels(self, figure: Figure) -> Iterator[tuple[Axes, _Training, int, bool]]:
        """Axes with a title, the training that they show, its column, and whether it is the last one of its line.

        All panels share their horizontal axis, and those of a line the vertical one.
        """
        grid = figure.subplots(len(self.settings), len(self.students), squeeze=False, sharex=True, sharey="row")
        by_place = {(training.setting, training.student): training for training in self.trainings}
        for line, setting in enumerate(self.settings):
            shown = [column for column, student in enumerate(self.students) if (setting, student) in by_place]
            for column, student in enumerate(self.students):
                axes = grid[line, column]
                if column not in shown:
                    axes.set_visible(False)
                    continue
                names = [student] if len(self.students) > 1 or not setting else []
                axes.set_title(short(", ".join([*names, *filter(None, [setting])]), 60))
                axes.yaxis.set_major_locator(MaxNLocator(MOST_TICKS))
                if column == shown[0]:
                    axes.set_ylabel("test top-1 (%)")
                yield axes, by_place[setting, student], column, column == shown[-1]


def of_several_durations(table: Table, rows: Sequence[Row]) -> list[Row]:
    """The rows with results that have one beside them which differs in its number of epochs only."""
    return [row for trainings in _grouped(table, rows).values() for training in trainings for row in training.rows.values()]


def duration_drawings(table: Table, rows: Sequence[Row], place: str) -> list[Drawing]:
    """For each method and control trained for several durations: top-1 over the durations with a line for each tau, then top-1
    over tau with the shorter trainings in grey. Empty if nothing was trained for several durations.
    """
    drawings = []
    groups = _grouped(table, rows)
    methods, controls = ({key[number] for key in groups} for number in (0, 1))
    for (method, control), trainings in groups.items():
        which = [place] + [method] * (len(methods) > 1) + [control] * (len(controls) > 1)
        for page in _pages(table, trainings):
            drawings += [_over_durations(page, ", ".join(which)), _over_tau(page, ", ".join(which))]
    return drawings


def _grouped(table: Table, rows: Sequence[Row]) -> dict[tuple[str, str], list[_Training]]:
    """Trainings of at least two durations by method and control."""
    found: dict[tuple[str, str, str, str], dict[int, Row]] = {}
    for row in rows:
        if ranked := table.ranked(row):
            rest = ", ".join(part for part in row.setting.split(", ") if not re.fullmatch(r"epochs \d+", part))
            key = row.method, row.control, rest, row.student
            found.setdefault(key, {})[ranked[0][1].runs[0].args.epochs] = row
    groups: dict[tuple[str, str], list[_Training]] = {}
    for (method, control, rest, student), by_epochs in found.items():
        if len(by_epochs) > 1:
            groups.setdefault((method, control), []).append(_Training(student, rest, dict(sorted(by_epochs.items()))))
    return groups


def _pages(table: Table, trainings: Sequence[_Training]) -> Iterator[_Page]:
    # Lines of one optimiser stand together: settings name it last.
    settings = sorted({each.setting for each in trainings}, key=lambda text: [natural(part) for part in text.split(", ")[::-1]])
    students = list(dict.fromkeys(training.student for training in trainings))
    for line in range(0, len(settings), MOST_LINES):
        for column in range(0, len(students), MOST_COLUMNS):
            lines, columns = settings[line : line + MOST_LINES], students[column : column + MOST_COLUMNS]
            some = [each for each in trainings if each.setting in lines and each.student in columns]
            if some:
                lines = [setting for setting in lines if any(each.setting == setting for each in some)]
                columns = [student for student in columns if any(each.student == student for each in some)]
                yield _Page(table, tuple(lines), tuple(columns), tuple(some))


def _over_durations(page: _Page, place: str) -> Drawing:
    # Taus are ordered, so their colours come from a sequential map, which is readable without hue.
    colours = dict(zip(page.taus, colormaps["viridis"](np.linspace(0.0, 0.9, len(page.taus))), strict=True))

    def draw(figure: Figure) -> None:
        for axes, training, _, _ in page.panels(figure):
            for tau, colour in colours.items():
                known = [(epochs, cell) for epochs in training.rows if (cell := page.get(training, epochs, tau))]
                if known:
                    x, cells = zip(*known, strict=True)
                    spread = [0.0 if cell.std is None else cell.std for cell in cells]
                    axes.errorbar(
                        x,
                        [cell.mean for cell in cells],
                        spread,
                        color=colour,
                        marker="o",
                        markersize=3.5,
                        linewidth=1.4,
                        capsize=2,
                    )
            _ticks(axes, page.epochs, 2)
            _label_below(axes, "epochs (log scale)")
        handles = [Line2D([], [], color=colour, marker="o", markersize=4) for colour in colours.values()]
        names = [f"{tau:g}" for tau in colours]
        figure.legend(handles, names, title="tau", loc="outside right upper", alignment="left")

    caption = (
        f"Final test top-1 of students over the number of epochs that they were trained for, {place}: a line for each tau, means "
        "over the seeds with their standard deviation. Each duration is a training of its own, with a whole schedule "
        "(temperature study, Fig. 2)."
    )
    alt = f"Test top-1 over the number of epochs, a line for each tau, {place}. {_spoken(page)}"
    return Drawing(f"durations {place}", caption, alt, (WIDTH, 0.4 + HEIGHT * len(page.settings)), draw)


def _over_tau(page: _Page, place: str) -> Drawing:
    longest = max(training.longest for training in page.trainings)
    shorter = [epochs for epochs in page.epochs if any(epochs < training.longest for training in page.trainings)]
    greys = {epochs: f"{shade:.3f}" for epochs, shade in zip(shorter, np.linspace(0.82, 0.42, len(shorter)), strict=True)}

    def means(training: _Training, epochs: int) -> list[float]:
        cells = [page.get(training, epochs, tau) for tau in page.taus]
        return [cell.mean if cell else math.nan for cell in cells]  # a missing tau breaks the line

    def draw(figure: Figure) -> None:
        behind: dict[str, list[Axes]] = {setting: [] for setting in page.settings}
        for axes, training, column, last in page.panels(figure):
            right = axes.twinx()
            right.set_zorder(axes.get_zorder() - 1)
            axes.patch.set_visible(False)
            right.grid(visible=False)
            for epochs in training.rows:
                if epochs < training.longest:
                    right.plot(page.taus, means(training, epochs), color=greys[epochs], marker=".", markersize=5, linewidth=1.1)
            right.yaxis.set_major_locator(MaxNLocator(MOST_TICKS))
            right.tick_params(axis="y", labelright=last, right=last, colors="#777777")
            right.spines["right"].set_visible(last)
            if last:
                right.set_ylabel("shorter (%)", color="#666666")
            behind[training.setting].append(right)
            cells = [page.get(training, training.longest, tau) for tau in page.taus]
            std = [cell.std if cell and cell.std is not None else math.nan for cell in cells]
            axes.errorbar(
                page.taus,
                means(training, training.longest),
                std,
                color=COLOURS[column],
                marker="o",
                markersize=5,
                linewidth=1.6,
                capsize=2.5,
            )
            _ticks(axes, page.taus, 10)
            _label_below(axes, "tau (log scale)")
        for line in behind.values():  # twins share nothing by themselves
            low, high = (function(axes.get_ylim()[end] for axes in line) for end, function in enumerate((min, max)))
            for axes in line:
                axes.set_ylim(low, high)
        handles = {f"{longest} (longest)": Line2D([], [], color="#333333", marker="o", markersize=5)}
        handles |= {f"{epochs}": Line2D([], [], color=grey, marker=".") for epochs, grey in reversed(greys.items())}
        figure.legend(handles.values(), handles.keys(), title="epochs", loc="outside right upper", alignment="left")

    caption = (
        f"Final test top-1 over tau, {place}. In colour, on the scale at the left, the students that were trained longest "
        f"({longest} epochs), with the standard deviation over the seeds; in grey, on the scale at the right, those that were "
        f"trained for {_listed(shorter)} epochs, each with a whole schedule of its own. Panels of a line share their scales "
        "(temperature study, Fig. 3)."
    )
    alt = f"Test top-1 over tau of the longest trainings, and of the shorter ones in grey, {place}. {_spoken(page)}"
    return Drawing(f"tau {place}", caption, alt, (WIDTH, 0.4 + HEIGHT * len(page.settings)), draw)


def _ticks(axes: Axes, places: Sequence[float], base: int) -> None:
    axes.set_xscale("log", base=base)
    axes.xaxis.set_major_locator(FixedLocator(list(places)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(places), [f"{place:g}" for place in places])
    margin = max(1.06, (places[-1] / places[0]) ** 0.05)
    axes.set_xlim(places[0] / margin, places[-1] * margin)


def _label_below(axes: Axes, text: str) -> None:
    place = axes.get_subplotspec()
    if place is None or place.is_last_row():
        axes.set_xlabel(text)


def _listed(numbers: Sequence[int]) -> str:
    *before, last = map(str, numbers)
    return f"{', '.join(before)} and {last}" if before else last


def _spoken(page: _Page) -> str:
    """The best tau of each duration in words."""
    phrases = []
    for training in page.trainings[:MOST_SPOKEN]:
        best = [
            f"tau {tau:g} with {cell.mean:.2f} % after {epochs}"
            for epochs, row in training.rows.items()
            for tau, cell in page.table.ranked(row)[:1]
        ]
        phrases.append(f"{', '.join(filter(None, [training.student, training.setting]))}: best is {', '.join(best)} epochs")
    if len(page.trainings) > MOST_SPOKEN:
        phrases.append(f"{len(page.trainings) - MOST_SPOKEN} more panels are in the table of results")
    return "; ".join(phrases) + "."
