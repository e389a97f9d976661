"""Methods beside each other: curves over epochs and seconds, students from labels alone as the baseline, entropies of tests."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdcache.archive import entropy_histogram
from kdcache.errors import IntegrityError
from kdcache.report import collect, summarise, write_report
from kdcache.report.answers import answers, method_contrasts
from kdcache.report.figures import Drawing, tau_curves
from kdcache.report.heatmap import heatmaps
from kdcache.report.method_figures import entropy_drawings, method_drawings
from kdcache.report.table import Table
from tests.reports import NOT_TESTED, RunFolders

LABELS: dict[str, Any] = {"method": {"name": "ce", "smoothing": 0.0}, "method_spec": "ce", "own_temperature": True}


@pytest.fixture
def make_run(tmp_path: Path) -> RunFolders:
    return RunFolders(tmp_path / "runs" / "demo")


def table_of(make_run: RunFolders) -> Table:
    return summarise(collect([make_run.base]))


def axes_of(drawing: Drawing) -> list[Axes]:
    figure = Figure(figsize=drawing.size)
    drawing.draw(figure)
    return list(figure.axes)


def lines_of(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """Points by colour."""
    points = {}
    for line in axes.lines:
        x, y = (np.ravel(values).astype(float).tolist() for values in (line.get_xdata(), line.get_ydata()))
        points[str(line.get_color())] = x, y
    return points


def test_methods_of_a_pair_share_a_panel_and_labels_alone_have_no_divergence(make_run: RunFolders) -> None:
    methods: list[tuple[str, dict[str, Any], float]] = [
        ("kd", {"tau": 4.0}, 0.3),
        ("wttm", {"tau": 4.0}, 0.6),
        ("ce", LABELS, 0.2),
    ]
    for student in ("rn18", "cn_p"):
        for method, change, entropy in methods:
            for seed in (0, 1):
                curves = {
                    "student_entropy": [0.9, entropy + 0.1 * seed],
                    "divergence": [2.0, 0.5],
                    "correlation": [0.5, 0.75],
                    "train_loss": [4.0, 2.0],
                }
                make_run(90.0, student=student, seed=seed, curves=curves, **{"method_spec": method} | change)
    drawings = {drawing.name: drawing for drawing in method_drawings(table_of(make_run))}
    assert list(drawings) == ["entropy and divergence of methods", "loss and correlation of methods", "seconds of methods"]
    upper, other, divergence, _ = axes_of(drawings["entropy and divergence of methods"])
    assert [axes.get_title() for axes in (upper, other)] == ["vit_s → cn_p", "vit_s → rn18"]
    ends = {colour: y[-1] for colour, (_, y) in lines_of(upper).items()}
    assert sorted(ends.values()) == pytest.approx([0.25, 0.35, 0.65])
    assert ends["#555555"] == pytest.approx(0.25)
    assert "#555555" not in lines_of(divergence)
    assert len(lines_of(divergence)) == 2
    assert "Dashed in grey, the student from labels alone." in drawings["entropy and divergence of methods"].caption
    _, _, correlation, _ = axes_of(drawings["loss and correlation of methods"])
    assert all(y == pytest.approx([0.5, 0.25]) for _, y in lines_of(correlation).values())
    assert "student alone 0.25" in drawings["entropy and divergence of methods"].alt


def test_accuracy_is_drawn_over_the_seconds_at_which_it_was_measured(make_run: RunFolders) -> None:
    for method, seconds in (("zkd", 2.0), ("maxlogit", 1.0)):
        for seed in (0, 1):
            make_run([NOT_TESTED, 60.0, 80.0], method_spec=method, seed=seed, curves={"seconds": [seconds + seed] * 3})
    (drawing,) = [each for each in method_drawings(table_of(make_run)) if each.name == "seconds of methods"]
    time, accuracy = axes_of(drawing)
    assert sorted(y for _, y in lines_of(time).values()) == [[1.5, 3.0, 4.5], [2.5, 5.0, 7.5]]
    assert sorted(lines_of(accuracy).values()) == [([3.0, 4.5], [60.0, 80.0]), ([5.0, 7.5], [60.0, 80.0])]


def test_one_method_is_not_compared_with_itself(make_run: RunFolders) -> None:
    make_run(90.0, tau=1.0)
    make_run(91.0, tau=4.0)
    assert method_drawings(table_of(make_run)) == []


def test_labels_alone_are_the_first_column_and_a_level_line(make_run: RunFolders) -> None:
    for student in ("rn18", "cn_p"):
        for seed, top in ((0, 70.0), (1, 72.0)):
            make_run(top, student=student, seed=seed, **LABELS)
            for tau in (2.0, 4.0):
                make_run(top + tau, student=student, seed=seed, tau=tau, method_spec="zkd")
    table = table_of(make_run)
    (pairs,) = [each for each in heatmaps(table, {}) if each.name == "pairs"]
    assert pairs.columns == ("student alone", "zkd")
    assert "Student alone: from labels, by the same recipe." in pairs.caption
    assert [line.scores[0].cell.mean for line in pairs.lines if line.scores[0]] == [71.0, 71.0]
    contrasts = {(each.name, each.variant): each for each in method_contrasts(table)}
    assert {each.base for each in contrasts.values()} == {"ce"}, "there is no kd"
    difference = contrasts["cn_p", "zkd"].difference
    assert difference is not None
    assert difference.mean == 4.0
    spoken = [answer.headline for answer in answers(table) if answer.name == "cn_p, ce"]
    assert spoken == ["it has no teacher, and so no temperature; test top-1 71.00 ± 1.41 % (mean ± std, n = 2 seeds)."]

    assert all(each.variant != "ce" for each in contrasts.values())
    make_run(90.0, archive_digest="e2" * 32, **LABELS)  # on another teacher's archive
    make_run(90.0, archive_digest="e2" * 32, tau=2.0, method_spec="zkd")
    assert [each.name for each in heatmaps(table_of(make_run), {}) if each.name.startswith("teachers")] == ["teachers"], (
        "only zkd"
    )
    rows = [row for row in table.rows if row.student == "cn_p"]
    (drawing,) = tau_curves(table, rows, "here")
    axes = axes_of(drawing)[0]
    level = [line for line in axes.lines if line.get_color() == "#555555" and line.get_linestyle() == "--"]
    assert [float(np.ravel(line.get_ydata())[0]) for line in level] == [71.0]
    assert "Dashed in grey, ce: the student from labels alone." in drawing.caption
    assert "finds its temperature by itself" not in drawing.caption


def test_entropies_of_tests_are_histograms_on_common_axes(make_run: RunFolders, tmp_path: Path) -> None:
    changes: list[tuple[dict[str, Any], list[float]]] = [
        (LABELS, [0.1, 0.1, 0.3]),
        ({"tau": 1.0}, [0.2, 0.4, 0.6]),
        ({"tau": 4.0}, [0.5, 0.9, 0.7]),
    ]
    for change, relative in changes:
        left = make_run(90.0, **change) / "test_entropies.json"
        left.write_text(entropy_histogram(np.array(relative), 100).model_dump_json())
    make_run(90.0, method_spec="ttm")  # runs of before have none
    (drawing,) = entropy_drawings(table_of(make_run))
    panels = axes_of(drawing)
    assert [panel.get_title() for panel in panels] == ["student alone", "kd, tau 1", "kd, tau 4"]
    means = [float(np.ravel(line.get_xdata())[0]) for line in panels[2].lines]
    assert means == pytest.approx([0.7 * np.log(100), np.log(100) / 6])
    assert "kd, tau 4: 3.22" in drawing.alt
    page = write_report([make_run.base], tmp_path / "report").html.read_text("utf-8")
    assert "How sure are students of their answers?" in page
    assert "Methods beside each other" in page

    left.write_text("{}")
    with pytest.raises(IntegrityError, match=r"test_entropies\.json"):
        entropy_drawings(table_of(make_run))
