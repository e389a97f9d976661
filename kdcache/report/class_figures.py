"""What students say of classes, beside what the teacher says (logit standardization, Fig. 3): heatmaps of differences."""

from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray

from kdcache.report.figures import COLOURS, Drawing, short
from kdcache.report.output_pages import OutputPage
from kdcache.training.outputs import KeptOutputs

__all__ = ["Differences", "class_drawing", "differences"]

# title, what of it is told in words
KINDS = (
    ("logits", "distance of mean logits"),
    ("z-scores", "distance of mean z-scores"),
    ("correlation", "difference of the classes' correlations"),
)
MOST_BARS = 100  # logits of one image that are drawn as bars; more of them as a line
MOST_CELLS = 100  # of a side of a heatmap, each a block of several classes where there are more
DARKEST = 0.99  # quantile of a student's differences at which its scale would end
SHADES = 24  # of which a page with many heatmaps stays small
MOST_TICKS = 4
HALF = 0.5


@dataclass(frozen=True)
class Differences:
    """How far a student is from its teacher in each pair of classes, by kind of `KINDS`.

    Distances `[M, C]` are those of the mean rows of the M classes that have images, without their own logit (0 there), as in
    the published code; the difference of correlations is `[C, C]`.
    """

    tables: tuple[NDArray[np.float32], ...]

    @property
    def means(self) -> tuple[float, ...]:
        return tuple(float(table.mean()) for table in self.tables)

    @property
    def largest(self) -> tuple[float, ...]:
        return tuple(float(table.max()) for table in self.tables)


def differences(student: KeptOutputs, teacher: KeptOutputs) -> Differences:
    """The differences of outputs of the same images."""
    z, v = student.logits.astype(np.float64), teacher.logits.astype(np.float64)
    found = []
    for mine, theirs in ((z, v), (_scores(z), _scores(v))):
        present, which = np.unique(student.label, return_inverse=True)
        sums = np.zeros((len(present), z.shape[1]))
        np.add.at(sums, which, mine - theirs)
        distance = np.abs(sums / np.bincount(which)[:, None])
        distance[np.arange(len(present)), present] = 0.0
        found.append(distance)
    found.append(np.abs(_correlation(z) - _correlation(v)))
    return Differences(tuple(table.astype(np.float32) for table in found))


def _scores(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """z-scores by the sample's deviation, as the published code has them; of a constant row 0."""
    centred = logits - logits.mean(axis=1, keepdims=True)
    deviation = logits.std(axis=1, ddof=1, keepdims=True)
    scores: NDArray[np.float64] = np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 0)
    return scores


def _correlation(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson's correlation of the classes' logits over the images, `[C, C]`; 0 with a class whose logit never changes."""
    centred = logits - logits.mean(axis=0)
    norm = np.linalg.norm(centred, axis=0)
    unit = np.divide(centred, norm, out=np.zeros_like(centred), where=norm > 1e-9 * np.abs(logits).max(axis=0, initial=1e-9))
    correlation: NDArray[np.float64] = unit.T @ unit
    return correlation


def class_drawing(page: OutputPage) -> Drawing | None:
    """A line of panels for each student of a page; None where the teacher's outputs are not known."""
    lines: list[tuple[str, _Image, Differences]] = []
    count = classes = 0
    for student in page.students:
        both = page.teacher.of_both(student.outputs) if page.teacher is not None else None
        if both is not None:
            lines.append((student.title, _Image.of(both[1], both[0]), differences(both[1], both[0])))
            count, classes = both[0].logits.shape
    if not lines:
        return None
    # One student with large logits, which z-scores allow, would leave all others pale.
    ends = [float(np.median([np.quantile(line[2].tables[kind], DARKEST) for line in lines])) or 1.0 for kind in range(len(KINDS))]

    def draw(figure: Figure) -> None:
        reds = colormaps["Reds"].resampled(SHADES)
        parts = figure.subfigures(len(lines), 1, squeeze=False)[:, 0]
        for part, (title, image, found) in zip(parts, lines, strict=True):
            part.suptitle(short(title, 90), x=0.01, ha="left", fontsize=10)
            bars, *maps = part.subplots(1, 1 + len(KINDS), width_ratios=(1.5, 1, 1, 1))
            _draw_bars(bars, image)
            for kind, (axes, table) in enumerate(zip(maps, found.tables, strict=True)):
                shown = axes.imshow(_in_blocks(table), cmap=reds, vmin=0, vmax=ends[kind], aspect="auto", interpolation="none")
                axes.grid(visible=False)
                axes.set_title(f"{KINDS[kind][0]}: mean {found.means[kind]:.3g}, max {found.largest[kind]:.3g}", fontsize=8.5)
                for axis in (axes.xaxis, axes.yaxis):
                    axis.set_major_locator(NullLocator())
                part.colorbar(shown, ax=axes, ticks=MaxNLocator(MOST_TICKS))

    blocks = f" Of more than {MOST_CELLS} classes, cells are means over neighbours." if classes > MOST_CELLS else ""
    caption = (
        f"Students and teacher by class, {page.place}: at the left the logits of one test image, bars the student's and the line "
        "the teacher's, its label's class marked. Then how far they are apart, darker is further: in the mean logits of each "
        "class's images (lines) at every class (columns), in the same of z-scores, and in the correlations of two classes' logits"
        ". Distances at an image's own class are left out, as published. Each kind has one scale, which some exceed. "
        f"From {count} test images of {classes} classes, at each method's best tau (seed {page.seeds}).{blocks}"
    )
    spoken = "; ".join(
        f"{title}: " + ", ".join(f"{words} {mean:.3g}" for (_, words), mean in zip(KINDS, found.means, strict=True))
        for title, _, found in lines
    )
    alt = f"Heatmaps of differences between students and teacher by class, {page.place}. Means: {spoken}."
    return Drawing(f"classes {page.place}", caption, alt, (11.0, 0.2 + 2.35 * len(lines)), draw)


def _in_blocks(table: NDArray[np.float32]) -> NDArray[np.float32]:
    """The table with at most `MOST_CELLS` a side: means of blocks, where it is larger."""
    for axis in (0, 1):
        size = table.shape[axis]
        if size > MOST_CELLS:
            starts = np.arange(MOST_CELLS) * size // MOST_CELLS
            counts = np.diff(starts, append=size).reshape((-1, 1) if axis == 0 else (1, -1))
            table = np.add.reduceat(table, starts, axis=axis) / counts
    return table


@dataclass(frozen=True, eq=False)
class _Image:
    """The logits of the first image that the teacher gets right, or else of the first one."""

    student: NDArray[np.float32]
    teacher: NDArray[np.float32]
    label: int

    @classmethod
    def of(cls, student: KeptOutputs, teacher: KeptOutputs) -> "_Image":
        right = np.flatnonzero(teacher.logits.argmax(axis=1) == teacher.label)
        image = int(right[0]) if len(right) else 0
        return cls(student.logits[image].copy(), teacher.logits[image].copy(), int(student.label[image]))


def _draw_bars(axes: Axes, image: _Image) -> None:
    values, theirs, label = image.student, image.teacher, image.label
    edges = np.arange(len(values) + 1) - HALF
    if len(values) <= MOST_BARS:
        axes.bar(np.arange(len(values)), values, width=0.8, color=COLOURS[0], linewidth=0)
    else:
        axes.stairs(values, edges, color=COLOURS[0], linewidth=0.7)
    axes.stairs(theirs, edges, color=COLOURS[1], linewidth=0.9, baseline=None)
    axes.axvspan(label - HALF, label + HALF, color="#dddddd", zorder=0, linewidth=0)
    deviations = [float(each.std(ddof=1)) for each in (values, theirs)]
    axes.set_title(f"one image: deviation {deviations[0]:.3g}, teacher's {deviations[1]:.3g}", fontsize=8.5)
    axes.set_xlim(-HALF, len(values) - HALF)
    axes.xaxis.set_major_locator(MaxNLocator(MOST_TICKS, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(MOST_TICKS))
