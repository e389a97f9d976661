"""Features of test images in the plane, by t-SNE (logit standardization, Fig. 4): do a student's classes lie apart?"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from kdcache.report.figures import Drawing, short
from kdcache.report.output_pages import OutputPage
from kdcache.training.outputs import KeptOutputs

__all__ = ["Points", "feature_drawing", "in_the_plane", "silhouette"]

COLUMNS = 3
LARGEST_PERPLEXITY = 30.0  # scikit-learn's default
FEWEST = 8  # images, below which neighbours mean nothing
FEWEST_STUDENTS = 2
MOST_POINTS = 500  # in the plane: the time of t-SNE grows faster than their number
ITERATIONS = 500
MARKERS = ("o", "^", "s", "D", "v")
COLOURS_OF_A_MAP = 20


Points = dict[Path, NDArray[np.float64]]  # of features that are in the plane already, by their file


@dataclass(frozen=True, eq=False)
class _Panel:
    title: str
    file: Path
    label: NDArray[np.int32]
    silhouette: float | None

    @property
    def told(self) -> str:
        return "" if self.silhouette is None else f": silhouette {self.silhouette:.2f}"


def silhouette(outputs: KeptOutputs) -> float | None:
    """The mean silhouette of the classes in the features, from -1 to 1: the larger, the further they lie apart.

    None with fewer than two classes of several images.
    """
    from sklearn.metrics import silhouette_score

    classes, counts = np.unique(outputs.label, return_counts=True)
    if outputs.features is None or not 2 <= len(classes) < len(outputs.label) or counts.max() < 2:
        return None
    return float(silhouette_score(outputs.features.astype(np.float64), outputs.label))


def in_the_plane(outputs: KeptOutputs) -> NDArray[np.float64]:
    """Features that are not all the same as points `[P, 2]`, by t-SNE: those of the first images, of which classes have as many
    as of all. Equal features give equal points."""
    from sklearn.manifold import TSNE  # which takes a second to import

    assert outputs.features is not None
    features = outputs.features[:MOST_POINTS].astype(np.float64)
    features -= features.mean(axis=0)
    perplexity = min(LARGEST_PERPLEXITY, (len(features) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=0, max_iter=ITERATIONS, n_jobs=1)
    points: NDArray[np.float64] = tsne.fit_transform(features / np.abs(features).max())
    return points


def feature_drawing(page: OutputPage, known: Points) -> Drawing | None:
    """A panel for each student of a page with features, after the teacher's if it is known; None without two to compare.

    Points that are found are added to those that are `known`, so that a teacher's are found once.
    """
    wanted = [("teacher", page.teacher_file, page.teacher)] if page.teacher is not None else []
    wanted += [(student.title, student.file, student.outputs) for student in page.students]
    panels = [
        _Panel(title, file, outputs.label, silhouette(outputs)) for title, file, outputs in wanted if _has_features(outputs)
    ]
    if sum(panel.file != page.teacher_file for panel in panels) < FEWEST_STUDENTS:
        return None
    columns = min(COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(lines, columns, squeeze=False).flat
        for each, panel in zip(axes, panels, strict=False):
            if panel.file not in known:
                known[panel.file] = in_the_plane(KeptOutputs.read(panel.file))
            _draw(each, panel, known[panel.file])
        for each in figure.axes[len(panels) :]:
            each.set_axis_off()

    shown, count = min(MOST_POINTS, len(panels[0].label)), len(panels[0].label)
    classes = len(np.unique(panels[0].label[:shown]))
    caption = (
        f"Features of {shown} test images of {classes} classes in the plane, by t-SNE, {page.place}: what the classifier sees, a "
        "colour and mark for each class, which repeat where there are many. Beside a title stands the mean silhouette of the "
        f"classes in the features of all {count} themselves: the larger, the further classes lie apart. Students at their best "
        f"tau (seed {page.seeds})."
    )
    if left_out := len(wanted) - len(panels):
        caption += f" {left_out} more kept no features, or all the same."
    spoken = "; ".join(f"{panel.title}{panel.told or ': no silhouette'}" for panel in panels)
    alt = f"Maps of features by t-SNE, {page.place}. {spoken}."
    return Drawing(f"features {page.place}", caption, alt, (3.5 * columns, 0.2 + 3.2 * lines), draw)


def _has_features(outputs: KeptOutputs) -> bool:
    return outputs.features is not None and len(outputs) >= FEWEST and bool(np.ptp(outputs.features, axis=0).any())


def _draw(axes: Axes, panel: _Panel, points: NDArray[np.float64]) -> None:
    axes.set_title(f"{short(panel.title, 48)}\n{panel.told.removeprefix(': ')}".rstrip(), fontsize=8.5)
    label = panel.label[: len(points)]
    turn, colour = np.divmod(label, COLOURS_OF_A_MAP)
    for number, marker in enumerate(MARKERS):
        which = turn % len(MARKERS) == number
        if which.any():
            look: dict[str, Any] = {"c": colormaps["tab20"](colour[which]), "marker": marker, "rasterized": True}
            axes.scatter(points[which, 0], points[which, 1], s=8, linewidths=0, alpha=0.8, **look)
    axes.grid(visible=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(NullLocator())
