"""The report's figures of what runs kept of some test images: by class, and of features in the plane."""

from collections.abc import Mapping, Sequence

from kdcache.report.class_figures import class_drawing
from kdcache.report.feature_figures import Points, feature_drawing
from kdcache.report.figures import Drawing
from kdcache.report.output_pages import output_pages
from kdcache.report.table import Row, Table

__all__ = ["output_drawings"]


def output_drawings(table: Table, studies: Mapping[str, Sequence[Row]], weights: Mapping[str, str]) -> dict[str, list[Drawing]]:
    """Figures of rows by place, in two sections; `weights` maps archive digests to their teachers' weights."""
    classes, features = [], []
    known: Points = {}
    for place, rows in studies.items():
        for page in output_pages(table, rows, place, weights):
            classes.append(class_drawing(page))
            features.append(feature_drawing(page, known))
    return {"classes": list(filter(None, classes)), "features": list(filter(None, features))}
