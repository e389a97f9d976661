"""The report's figures. They use matplotlib's object interface: no global state, no window system."""

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import NDArray

from kdcache.report.table import Cell, Row, Table, labels

__all__ = [
    "BASELINE",
    "COLOURS",
    "DASHES",
    "MOST_LINES",
    "MOST_PANELS",
    "TEACHER",
    "Drawing",
    "Lines",
    "control_dots",
    "entropy_histograms",
    "pages_of",
    "render_figure",
    "short",
    "tau_curves",
]

# Okabe and Ito's palette, safe for the common colour blindnesses. Its yellow is left out: too faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9.5,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
    "legend.title_fontsize": 9.5,
    "svg.fonttype": "none",  # text stays text: searchable, selectable, readable by screen readers
    "text.parse_math": False,  # names from the runs may contain dollar signs
    "xtick.color": "#333333",
    "ytick.color": "#333333",
}
TEACHER: dict[str, Any] = {"color": "#555555", "linestyle": "--", "linewidth": 1.2}
MOST_LINES = 8  # lines per panel, where rows can be split into panels
MOST_EARLIER = 3  # panels with at most so many lines also show an earlier epoch
MOST_PANELS = 8  # panels per figure
BASELINE = ("#555555", "", "--")  # colour, marker and dashes of students that learned from labels alone
TOP1 = "test top-1, last epoch (%)"
FIELDS = ("student", "method", "control", "setting")
Panel = tuple[str, list[Row]]  # title, rows
Panels = TypeVar("Panels")


@dataclass(frozen=True)
class Drawing:
    """A figure to be drawn: `size` in inches, `alt` text for screen readers."""

    name: str
    caption: str
    alt: str
    size: tuple[float, float]
    draw: Callable[[Figure], None]


def render_figure(drawing: Drawing, salt: str) -> tuple[bytes, bytes]:
    """The figure as (SVG, PNG). Equal data give equal bytes. The ids inside the SVG depend on `salt`."""
    svg, png = io.BytesIO(), io.BytesIO()
    with style.context(["default", STYLE | {"svg.hashsalt": salt}]):
        figure = Figure(figsize=drawing.size, layout="constrained")
        drawing.draw(figure)
        engine = figure.get_layout_engine()
        assert engine is not None
        engine.execute(figure)
        figure.set_layout_engine("none")  # freeze the layout for both formats
        # savefig would draw each format twice, to settle a layout that is already final here.
        FigureCanvasSVG(figure).print_svg(svg, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))  # type: ignore[no-untyped-call]
        figure.set_dpi(160)
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None}, pil_kwargs={"compress_level": 3})  # type: ignore[no-untyped-call]
    return svg.getvalue(), png.getvalue()


def tau_curves(table: Table, rows: Sequence[Row], place: str) -> list[Drawing]:
    """Final test top-1 over tau, one line per student, method and control."""
    panels = _panels(table, rows, (("setting",), ("student", "setting"), ("student", "control", "setting")))
    lines = Lines(panels)

    def page(some: list[Panel]) -> Drawing:
        def draw(figure: Figure) -> None:
            for axes, panel in _grid(figure, some):
                _draw_tau_curves(axes, table, panel, lines)
            lines.legend(figure, some, markers=True)

        caption = f"Final test top-1 over tau, {place}: means over the seeds with their standard deviation, and single seeds."
        cells = [cell for _, panel in some for row in panel for _, cell in table.ranked(row)]
        if any(cell.own_temperature and not cell.without_teacher for cell in cells):
            caption += " A line without slope is of a method that finds its temperature by itself."
        if any(row.baseline for _, panel in some for row in panel):
            caption += " Dashed in grey, ce: the student from labels alone."
        if any(_earlier(table, row) for _, panel in some if len(panel) <= MOST_EARLIER for row in panel):
            caption += (
                " In grey, on the scale at the right, the means about half-way through the epochs, at a higher learning rate."
            )
        alt = f"Test top-1 over tau, {place}. {_spoken(table, some, lines)}"
        return Drawing(f"tau {place}", caption, alt, _size(len(some)), draw)

    return [page(some) for some in pages_of(panels)]


def control_dots(table: Table, rows: Sequence[Row], place: str) -> list[Drawing]:
    """Final test top-1 of each control beside control none, at every tau. Empty without a second control."""
    panels = _panels(table, rows, (("student", "method", "setting"),))
    panels = [panel for panel in panels if len(panel[1]) > 1]
    lines = Lines(panels)

    def page(some: list[Panel]) -> Drawing:
        def draw(figure: Figure) -> None:
            for axes, panel in _grid(figure, some):
                _draw_controls(axes, table, panel, lines)
            lines.legend(figure, some, markers=False)

        caption = (
            f"Controls, {place}. Bars are means over the seeds with their standard deviation, dots single seeds. "
            "The axis is zoomed to the data and does not start at 0."
        )
        alt = f"Test top-1 of each control at each tau, {place}. {_spoken(table, some, lines)}"
        return Drawing(f"controls {place}", caption, alt, _size(len(some)), draw)

    return [page(some) for some in pages_of(panels)]


def entropy_histograms(place: str, values: Mapping[str, NDArray[np.float64]], means: Mapping[str, float]) -> Drawing:
    """Histograms of relative entropies in [0, 1]. The keys of `values` and `means` are `entropy` and `entropy_rest`."""
    shown = {
        "entropy": (r"$\hat{H}(p)$ at tau 1, all classes", COLOURS[0], 0.0),
        "entropy_rest": (r"$\hat{H}(\bar{p})$ at tau 1, without the top class", COLOURS[1], None),
    }

    def draw(figure: Figure) -> None:
        for axes, (key, (label, colour, low)) in zip(figure.subplots(1, 2), shown.items(), strict=True):
            data = values[key]
            start = low if low is not None else min(math.floor(20 * float(np.quantile(data, 0.002))) / 20, 0.95)
            weights = np.full(len(data), 100 / len(data))
            axes.hist(np.clip(data, start, 1), bins=50, range=(start, 1), weights=weights, color=colour, alpha=0.85)
            axes.axvline(means[key], color="#000000", linestyle="--", linewidth=1.2)
            right = means[key] > (start + 1) / 2
            axes.annotate(
                f"mean {means[key]:.3f}",
                (means[key], 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(-5 if right else 5, -2),
                textcoords="offset points",
                ha="right" if right else "left",
                va="top",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )
            axes.set_xlabel(label, parse_math=True)
            axes.set_ylabel("views (%)")
            axes.set_xlim(start, 1)

    caption = (
        f"Relative entropy of the teacher's output, {place}: of the whole softmax, and of the classes below the top one. "
        "0 is certainty, 1 is uniform. The second axis may start above 0."
    )
    alt = (
        f"Two histograms of the teacher's relative entropy at tau 1, {place}. Mean over all classes {means['entropy']:.3f}, "
        f"mean without the top class {means['entropy_rest']:.3f}."
    )
    return Drawing(f"entropy {place}", caption, alt, (9.2, 3.2), draw)


def _draw_tau_curves(axes: Axes, table: Table, panel: Sequence[Row], lines: "Lines") -> None:
    taus = table.taus_of([row for row in panel if not row.baseline]) or table.taus_of(panel)
    step = max(1.012, (taus[-1] / taus[0]) ** 0.012)  # shifts lines so that error bars at one tau do not overlap
    for number, row in enumerate(panel):
        colour, marker, dashes = lines.look(row)
        if row.baseline:
            _draw_baseline(axes, table.ranked(row)[0][1])
            continue
        nudge = step ** (number - (len(panel) - 1) / 2)
        cells = [table.get(row, tau) for tau in taus]
        x = np.array(taus, np.float64) * nudge
        for own in filter(None, cells):  # a method without tau has one result for every tau
            if own.own_temperature:
                axes.axhline(own.mean, color=colour, linestyle=dashes, linewidth=1, alpha=0.6)
        mean = [cell.mean if cell else math.nan for cell in cells]  # a missing tau breaks the line
        std = [cell.std if cell and cell.std is not None else math.nan for cell in cells]
        bars = axes.errorbar(x, mean, std, color=colour, marker=marker, linestyle=dashes, markersize=5, capsize=2.5, elinewidth=1)
        bars.lines[0].set_linewidth(1.5)
        _seeds(axes, x, cells, colour)
    _draw_earlier(axes, table, panel, lines)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(taus))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(taus, [f"{tau:g}" for tau in taus])
    axes.set_xlim(taus[0] / 1.18, taus[-1] * 1.18)
    axes.set(xlabel="tau (log scale)", ylabel=TOP1)


def _draw_baseline(axes: Axes, cell: Cell) -> None:
    """The students from labels alone, as a line across all temperatures with their standard deviation."""
    colour, _, dashes = BASELINE
    axes.axhline(cell.mean, color=colour, linestyle=dashes, linewidth=1.5)
    if cell.std is not None:
        axes.axhspan(cell.mean - cell.std, cell.mean + cell.std, color=colour, alpha=0.12, linewidth=0)


def _draw_earlier(axes: Axes, table: Table, panel: Sequence[Row], lines: "Lines") -> None:
    """Draw the curves at an earlier epoch behind the final ones, on a second axis (temperature study, Fig. 3)."""
    earlier_cells = [
        (row, earlier) for row in panel if not row.baseline and len(panel) <= MOST_EARLIER and (earlier := _earlier(table, row))
    ]
    if not earlier_cells:
        return
    right = axes.twinx()
    right.set_zorder(axes.get_zorder() - 1)
    axes.patch.set_visible(False)
    taus = table.taus_of(row for row, _ in earlier_cells)
    for row, (_, means) in earlier_cells:
        _, marker, dashes = lines.look(row)
        values = [means.get(tau, math.nan) for tau in taus]  # a missing tau breaks this line too
        right.plot(taus, values, color="#999999", marker=marker, linestyle=dashes, markersize=4, linewidth=1)
    epochs = sorted({epoch for _, (epoch, _) in earlier_cells})
    right.set_ylabel(f"after {' or '.join(map(str, epochs))} {'epoch' if epochs == [1] else 'epochs'} (%)", color="#666666")
    right.spines["right"].set_visible(True)
    right.grid(visible=False)


def _earlier(table: Table, row: Row) -> tuple[int, dict[float, float]] | None:
    """(epoch, mean top-1 by tau) of the last tested epoch in the first half of training that all taus of a row share."""
    curves = {tau: cell.curve("test_top1") for tau, cell in sorted(table.ranked(row))}
    if not curves:
        return None
    shared = reduce(np.intersect1d, (epoch for epoch, _ in curves.values())) + 1
    shared = shared[shared <= min(run.args.epochs for _, cell in table.ranked(row) for run in cell.runs) / 2]
    if not len(shared):
        return None
    last = int(shared[-1])
    return last, {tau: float(mean[epoch == last - 1][0]) for tau, (epoch, mean) in curves.items()}


def _draw_controls(axes: Axes, table: Table, panel: Sequence[Row], lines: "Lines") -> None:
    taus = table.taus_of(panel)
    step = 0.78 / len(panel)
    for number in range(1, len(taus), 2):
        axes.axvspan(number - 0.5, number + 0.5, color="#f4f4f4", linewidth=0)
    for number, row in enumerate(panel):
        colour, _, _ = lines.look(row)
        cells = [table.get(row, tau) for tau in taus]
        x = np.arange(len(taus), dtype=np.float64) + (number - (len(panel) - 1) / 2) * step
        mean = np.array([cell.mean if cell else math.nan for cell in cells])
        std = [cell.std if cell and cell.std is not None else math.nan for cell in cells]
        axes.errorbar(x, mean, std, color=colour, linestyle="", capsize=3, elinewidth=1.2)
        axes.hlines(mean, x - 0.36 * step, x + 0.36 * step, color=colour, linewidth=3)
        _seeds(axes, x + 0.22 * step, cells, colour)
    axes.set_xticks(range(len(taus)), [f"{tau:g}" for tau in taus])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.5, len(taus) - 0.5)
    axes.set(xlabel="tau", ylabel=TOP1)


def _seeds(axes: Axes, x: NDArray[np.float64], cells: Sequence[Cell | None], colour: str) -> None:
    points = [(where, value) for where, cell in zip(x, cells, strict=True) if cell for value in cell.values.values()]
    axes.plot(*zip(*points, strict=True), linestyle="", marker="o", markersize=3.6, color=colour, alpha=0.45, markeredgewidth=0)


def _panels(table: Table, rows: Sequence[Row], choices: Sequence[tuple[str, ...]]) -> list[Panel]:
    """Rows with results as panels, split by the first of `choices` that leaves at most `MOST_LINES` lines in each."""
    rows = [row for row in rows if table.ranked(row)]
    panels: dict[tuple[str, ...], list[Row]] = {}
    for fields in choices:
        panels = {}
        for row in rows:
            panels.setdefault(tuple(getattr(row, field) for field in fields), []).append(row)
        if max(map(len, panels.values()), default=0) <= MOST_LINES:
            break
    titles = labels(rows, fields)
    return [(titles[panel[0]], panel) for panel in panels.values()]


def pages_of(panels: list[Panels]) -> list[list[Panels]]:
    return [panels[start : start + MOST_PANELS] for start in range(0, len(panels), MOST_PANELS)]


class Lines:
    """Names and styles of the lines of panels. A name holds what differs within a panel, and has one style everywhere."""

    def __init__(self, panels: Sequence[Panel]) -> None:
        fields = [f for f in FIELDS if any(len({getattr(row, f) for row in rows}) > 1 for _, rows in panels)] or ["control"]
        self._title = ", ".join(fields)
        self._names = {row: ", ".join(filter(None, (getattr(row, f) for f in fields))) for _, rows in panels for row in rows}
        self._order = list(dict.fromkeys(self._names.values()))
        self._coloured = list(dict.fromkeys(name for row, name in self._names.items() if not row.baseline))

    def name(self, row: Row) -> str:
        return self._names[row]

    def look(self, row: Row) -> tuple[str, str, str]:
        """(colour, marker, dashes) of a row."""
        if row.baseline:
            return BASELINE
        turn, which = divmod(self._coloured.index(self._names[row]), len(COLOURS))
        return COLOURS[which], MARKERS[(which + turn) % len(MARKERS)], DASHES[turn % len(DASHES)]

    def legend(self, figure: Figure, panels: Sequence[Panel], *, markers: bool) -> None:
        handles = {}
        for row in (row for _, rows in panels for row in rows):
            colour, marker, dashes = self.look(row)
            look: dict[str, Any] = {"marker": marker, "linestyle": dashes, "markersize": 5} if markers else {"linewidth": 3}
            handles[self.name(row)] = Line2D([], [], color=colour, **look)
        names = sorted(handles, key=self._order.index)
        shown = [short(name, 44) for name in names]
        figure.legend([handles[name] for name in names], shown, title=self._title, loc="outside right upper", alignment="left")


def _grid(figure: Figure, panels: Sequence[Panel]) -> Iterator[tuple[Axes, Sequence[Row]]]:
    """Titled axes for the panels, two per line."""
    columns = min(len(panels), 2)
    for number, (title, panel) in enumerate(panels):
        axes = figure.add_subplot(math.ceil(len(panels) / columns), columns, number + 1, title=short(title, 60))
        yield axes, panel
        if number % columns:
            axes.set_ylabel("")


def _size(panels: int) -> tuple[float, float]:
    return (7.6, 3.9) if panels == 1 else (10.5, 0.3 + 3.3 * math.ceil(panels / 2))


def _spoken(table: Table, panels: Sequence[Panel], lines: Lines) -> str:
    """The numbers of the first rows in words, for the alt text."""
    rows = [row for _, panel in panels for row in panel]
    phrases = []
    for row in rows[:8]:
        cells = ((tau, table.get(row, tau)) for tau in table.taus)
        phrases.append(f"{lines.name(row)}: " + ", ".join(f"{cell.mean:.2f} % at tau {tau:g}" for tau, cell in cells if cell))
    if len(rows) > 8:
        phrases.append(f"{len(rows) - 8} more lines are in the table of results")
    return "; ".join(phrases) + "."


def short(text: str, length: int) -> str:
    """The printable part of `text`, at most `length` characters long."""
    text = "".join(c for c in text if c.isprintable())
    return text if len(text) <= length else text[: length - 1] + "…"
