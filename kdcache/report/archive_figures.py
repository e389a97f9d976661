"""Figures of one archive: its teacher's output at each temperature."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter

from kdcache.archive import Statistics, TauDetail, TauStatistics
from kdcache.report.figures import COLOURS, Drawing
from kdcache.stats import label_smoothing

__all__ = ["archive_drawings", "moments_drawing", "one_page", "sorted_softmax"]

SHOWN_RANKS = 20  # ranks of the sorted softmax, as in the temperature study's Fig. 4
MOST_TAUS = 9  # side by side: those of the temperature study
MOST_WIDTH = 11.5  # of a figure, inches
MOST_TICKS = 6
WHOLE, REST = r"$\hat{H}(p)$", r"$\hat{H}(\bar{p})$"


def archive_drawings(statistics: Statistics, num_classes: int, place: str) -> list[Drawing]:
    """All figures of an archive. `place` is its name in captions. Without statistics' details there is only one figure."""
    drawings = [_tau_entropies(statistics, place)]
    if statistics.details:
        drawings += [
            _entropy_histograms(statistics, place),
            sorted_softmax(statistics, num_classes, place),
            moments_drawing(statistics, place),
        ]
    return drawings


def one_page(drawings: Sequence[Drawing], place: str) -> Drawing:
    """One figure with these figures below each other. `place` is the archive's name."""
    width, heights = max(d.size[0] for d in drawings), [d.size[1] + 0.3 for d in drawings]

    def draw(figure: Figure) -> None:
        parts = figure.subfigures(len(drawings), 1, squeeze=False, height_ratios=heights)
        for part, drawing in zip(parts[:, 0], drawings, strict=True):
            part.suptitle(f"{drawing.name.capitalize()}, {place}", x=0.01, ha="left", fontsize=10)
            drawing.draw(part)

    joined = " ".join(drawing.alt for drawing in drawings)
    return Drawing(drawings[0].name, " ".join(drawing.caption for drawing in drawings), joined, (width, sum(heights)), draw)


def _tau_entropies(statistics: Statistics, place: str) -> Drawing:
    figures = sorted(statistics.per_tau, key=lambda f: f.tau)
    taus = [f.tau for f in figures]
    lines = (
        (WHOLE, [f.entropy_mean for f in figures], [f.entropy_quantiles for f in figures], COLOURS[0]),
        (REST, [f.entropy_rest_mean for f in figures], [f.entropy_rest_quantiles for f in figures], COLOURS[1]),
    )

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for label, means, quantiles, colour in lines:
            low, _, _, _, high = np.array(quantiles).T
            axes.fill_between(taus, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(taus, means, color=colour, marker="o", markersize=5, label=label)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(taus))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(taus, [f"{tau:g}" for tau in taus])
        axes.set(xlabel="tau (log scale)", ylabel="relative entropy")
        for text in figure.legend(loc="outside right upper").get_texts():
            text.set_parse_math(True)

    caption = (
        f"Relative entropy of the teacher's output over tau, {place}: means, and from the 5 % to the 95 % quantile. "
        "The upper line leaves the top class out; 1 is uniform."
    )
    spoken = "; ".join(f"tau {f.tau:g}: {f.entropy_mean:.3f} and {f.entropy_rest_mean:.3f}" for f in figures)
    alt = f"Mean relative entropies with and without the top class over tau, {place}. {spoken}."
    return Drawing("entropy over tau", caption, alt, (7.0, 3.6), draw)


def _entropy_histograms(statistics: Statistics, place: str) -> Drawing:
    assert statistics.details
    pairs = list(zip(statistics.per_tau, statistics.details.per_tau, strict=True))
    kinds = (
        (WHOLE, COLOURS[0], [(f.entropy_mean, d.entropy_histogram) for f, d in pairs]),
        (REST, COLOURS[1], [(f.entropy_rest_mean, d.entropy_rest_histogram) for f, d in pairs]),
    )

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(pairs), 2, squeeze=False, sharex="col")
        for column, (label, colour, values) in enumerate(kinds):
            for axes, (mean, counts) in zip(panels[:, column], values, strict=True):
                edges = np.linspace(0, 1, len(counts) + 1)
                axes.stairs(100 * np.array(counts) / sum(counts), edges, fill=True, color=colour, alpha=0.85)
                axes.axvline(mean, color="#000000", linestyle="--", linewidth=1)
                axes.set_xlim(0, 1)
                axes.yaxis.set_major_locator(NullLocator())
            panels[-1, column].set_xlabel(f"{label}, all rows", parse_math=True)
        for axes, (f, _) in zip(panels[:, 0], pairs, strict=True):
            axes.set_ylabel(f"tau {f.tau:g}", rotation=0, ha="right", va="center")

    caption = (
        f"Rows of the archive by relative entropy at every tau, {place}: of the whole softmax (left) and without its top class "
        "(right). Each histogram has a height of its own; dashed, the means."
    )
    spoken = "; ".join(f"tau {f.tau:g}: {f.entropy_mean:.3f} and {f.entropy_rest_mean:.3f}" for f, _ in pairs)
    alt = f"Histograms of relative entropy at each tau, {place}. Means with and without the top class: {spoken}."
    return Drawing("entropy histograms", caption, alt, (8.0, 0.7 + 0.75 * len(pairs)), draw)


def sorted_softmax(statistics: Statistics, num_classes: int, place: str) -> Drawing:
    """Mean sorted softmax, beside the label smoothing of the same entropy (temperature study, Fig. 4)."""
    details = statistics.details
    assert details
    shown = _spread(list(zip(statistics.per_tau, details.per_tau, strict=True)))
    count = next((n for n, rank in enumerate(details.ranks) if rank > SHOWN_RANKS), len(details.ranks))
    ranks = np.array(details.ranks[:count])

    def draw(figure: Figure) -> None:
        panels = figure.subplots(2, len(shown), squeeze=False, sharey="row", sharex="col")
        for (upper, lower), (f, detail) in zip(panels.T, shown, strict=True):
            smoothed = label_smoothing(detail.smoothing_sorted_mean, num_classes)[:count]
            bars: tuple[tuple[Axes, Any, str], ...] = (
                (upper, detail.sorted_mean[:count], COLOURS[0]),
                (lower, smoothed, "#777777"),
            )
            for axes, heights, colour in bars:
                axes.barh(ranks, heights, height=0.85, color=colour)
                axes.set_ylim(count + 0.5, 0.5)
                axes.set_xlim(0, 1.08 * max(detail.sorted_mean[0], smoothed[0]))
                axes.grid(visible=False)
            upper.set_title(f"tau {f.tau:g}")
            lower.set_title(f"alpha {detail.smoothing_sorted_mean:.3g}", fontsize=9)
            lower.xaxis.set_major_locator(MaxNLocator(2 if len(shown) > 4 else MOST_TICKS))
            lower.tick_params(axis="x", labelsize=8)
        figure.supxlabel("mean probability; every tau has a scale of its own", fontsize=9.5)
        panels[0, 0].set_ylabel("rank, teacher")
        panels[1, 0].set_ylabel("rank, label smoothing")

    caption = (
        f"Mean sorted softmax of the teacher at rising tau (top {count} of {num_classes} classes), {place}; below, label "
        "smoothing of the same entropy. The axes end where the largest bar does."
    )
    spoken = "; ".join(f"tau {f.tau:g}: top class {d.sorted_mean[0]:.3g}, second {d.sorted_mean[1]:.3g}" for f, d in shown)
    alt = f"Bars of the mean sorted softmax and of matched label smoothing, {place}. {spoken}."
    return Drawing("sorted softmax", caption, alt, (min(1.0 + 2.3 * len(shown), MOST_WIDTH), 4.8), draw)


def moments_drawing(statistics: Statistics, place: str) -> Drawing:
    """Rows by mean and standard deviation of their logits, with both margins (logit standardization, Fig. 5)."""
    assert statistics.details
    moments = statistics.details.moments
    counts = 100 * np.array(moments.counts) / statistics.rows
    mean_edges, std_edges = (
        np.linspace(*r, n + 1) for r, n in zip((moments.mean_range, moments.std_range), counts.shape, strict=True)
    )

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(2, 2, width_ratios=(3, 1), height_ratios=(1, 3))
        axes = figure.add_subplot(grid[1, 0])
        image = axes.pcolormesh(mean_edges, std_edges, np.ma.masked_equal(counts.T, 0), cmap=colormaps["viridis"])
        axes.plot(moments.mean, moments.std, marker="x", color="#D55E00", markersize=9, markeredgewidth=2)
        axes.set(xlabel="mean of a row's logits", ylabel="standard deviation of a row's logits")
        axes.xaxis.set_major_locator(MaxNLocator(MOST_TICKS))
        top, right = figure.add_subplot(grid[0, 0], sharex=axes), figure.add_subplot(grid[1, 1], sharey=axes)
        top.stairs(counts.sum(axis=1), mean_edges, fill=True, color=COLOURS[0], alpha=0.85)
        right.stairs(counts.sum(axis=0), std_edges, fill=True, color=COLOURS[0], alpha=0.85, orientation="horizontal")
        for margin in (top.yaxis, right.xaxis):
            margin.set_major_formatter(PercentFormatter(decimals=0))
        top.tick_params(labelbottom=False)
        right.tick_params(labelleft=False)
        figure.colorbar(image, ax=right, label="rows (%)")

    caption = f"Rows by mean and standard deviation of their logits, {place}. The cross is at the means over all rows."
    alt = (
        f"Two-dimensional histogram of the logits' mean and standard deviation per row, {place}. Mean {moments.mean:.3g} "
        f"({moments.mean_range[0]:.3g} to {moments.mean_range[1]:.3g}), deviation {moments.std:.3g} "
        f"({moments.std_range[0]:.3g} to {moments.std_range[1]:.3g})."
    )
    return Drawing("logit moments", caption, alt, (7.0, 4.6), draw)


def _spread(pairs: Sequence[tuple[TauStatistics, TauDetail]]) -> list[tuple[TauStatistics, TauDetail]]:
    """At most `MOST_TAUS` pairs, evenly spaced on the log scale of tau, with both ends."""
    if len(pairs) <= MOST_TAUS:
        return list(pairs)
    logs = np.log([figures.tau for figures, _ in pairs])
    wanted = np.linspace(logs.min(), logs.max(), MOST_TAUS)
    return [pairs[n] for n in dict.fromkeys(int(np.abs(logs - log).argmin()) for log in wanted)]
