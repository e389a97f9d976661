"""Figures of students that were trained for several durations."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdcache.report import collect, summarise, write_report
from kdcache.report.duration_figures import duration_drawings
from kdcache.report.figures import Drawing
from tests.reports import RunFolders

BARE = {"method": {"name": "kd", "tau_squared": False}, "method_spec": "kd:tau_squared=False"}
SGD = {"opt": "sgd", "lr": 0.05, "weight_decay": 0.0005}


@pytest.fixture
def make_run(tmp_path: Path) -> RunFolders:
    return RunFolders(tmp_path / "runs" / "demo")


def drawn(make_run: RunFolders) -> list[Drawing]:
    table = summarise(collect([make_run.base]))
    return duration_drawings(table, table.rows, "here")


def axes_of(drawing: Drawing) -> list[Axes]:
    figure = Figure(figsize=drawing.size)
    drawing.draw(figure)
    return [axes for axes in figure.axes if axes.get_visible()]


def points(axes: Axes) -> list[list[tuple[float, float]]]:
    """Of the lines of an axes, without their error bars."""
    lines = [line for line in axes.lines if line.get_marker() in {"o", "."}]
    return [list(zip(np.ravel(line.get_xdata()).tolist(), np.ravel(line.get_ydata()).tolist(), strict=True)) for line in lines]


def run_grid(make_run: RunFolders, durations: tuple[int, ...] = (1, 2, 4)) -> None:
    for epochs in durations:
        for tau in (1.0, 10.0):
            for seed in range(2):
                make_run([10.0 * epochs + tau / 10 + seed] * epochs, tau=tau, seed=seed)


def test_top_1_is_drawn_over_durations_with_a_line_for_each_tau(make_run: RunFolders) -> None:
    run_grid(make_run)
    durations, _ = drawn(make_run)
    (axes,) = axes_of(durations)
    assert points(axes) == [[(1, 10.6), (2, 20.6), (4, 40.6)], [(1, 11.5), (2, 21.5), (4, 41.5)]]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "4"]
    assert "Fig. 2" in durations.caption


def test_in_grey_are_the_shorter_trainings_and_not_an_earlier_epoch(make_run: RunFolders) -> None:
    run_grid(make_run)
    _, over_tau = drawn(make_run)
    left, right = axes_of(over_tau)
    assert points(left) == [[(1, 40.6), (10, 41.5)]]
    assert points(right) == [[(1, 10.6), (10, 11.5)], [(1, 20.6), (10, 21.5)]]
    shades = [float(str(line.get_color())) for line in right.lines]
    assert shades == sorted(shades, reverse=True), "the longer, the darker"
    assert right.get_zorder() < left.get_zorder()
    assert "trained for 1 and 2 epochs" in over_tau.caption
    assert "half-way" not in over_tau.caption


def test_panels_share_their_axes_line_by_line(make_run: RunFolders) -> None:
    for student in ("rn18", "mnv4"):
        for top, recipe in ((0.0, {}), (40.0, SGD)):
            for epochs in (1, 4):
                for tau in (1.0, 4.0):
                    make_run([top + 5 * epochs + tau + 7 * (student == "rn18")] * epochs, tau=tau, student=student, **recipe)
    durations, over_tau = drawn(make_run)
    panels = axes_of(durations)
    assert [axes.get_title() for axes in panels] == [
        "mnv4, opt adamw",
        "rn18, opt adamw",
        "mnv4, opt sgd",
        "rn18, opt sgd",
    ]
    assert panels[0].get_ylim() == panels[1].get_ylim() != panels[2].get_ylim() == panels[3].get_ylim()
    assert len({axes.get_xlim() for axes in panels}) == 1
    axes = axes_of(over_tau)
    behind = [each for each in axes if points(each) and len(points(each)[0]) == 2 and each.get_zorder() < 0]
    assert len(axes) == 8
    assert behind[0].get_ylim() == behind[1].get_ylim() != behind[2].get_ylim() == behind[3].get_ylim()


def test_each_loss_has_figures_of_its_own_and_what_has_one_duration_stays_a_curve(make_run: RunFolders, tmp_path: Path) -> None:
    run_grid(make_run, (1, 2))
    for epochs in (1, 2):
        make_run([50.0] * epochs, **BARE)
    make_run([70.0], student="cn_p")
    assert [drawing.name for drawing in drawn(make_run)] == [
        f"{kind} here, {method}" for method in ("kd", "kd:tau_squared=False") for kind in ("durations", "tau")
    ]
    report = write_report([make_run.base], tmp_path / "report")
    names = [figure.name for figure in report.figures if figure.suffix == ".svg" and figure.name.startswith(("tau", "durations"))]
    assert names == [
        *("durations_pets_teacher_vit_s_kd.svg", "tau_pets_teacher_vit_s_kd.svg"),
        *("durations_pets_teacher_vit_s_kd_tau_squared_False.svg", "tau_pets_teacher_vit_s_kd_tau_squared_False.svg"),
        "tau_pets_teacher_vit_s.svg",
    ]
    page = report.html.read_text()
    assert (
        "Loss: that of kd is multiplied by tau\N{SUPERSCRIPT TWO}, as in published code; that of kd:tau_squared=False is not"
        in page
    )


def test_a_tau_that_a_duration_lacks_breaks_the_line(make_run: RunFolders) -> None:
    run_grid(make_run, (1, 2))
    make_run([60.0] * 2, tau=4.0)
    durations, over_tau = drawn(make_run)
    assert [(2, 60.0)] in points(axes_of(durations)[0])
    grey = points(axes_of(over_tau)[1])[0]
    assert np.isnan(grey[1][1])


def test_students_of_one_duration_have_no_such_figures(make_run: RunFolders) -> None:
    run_grid(make_run, (2,))
    make_run([70.0] * 2, tau=4.0, batch_size=256)
    make_run([None, 3.0], tau=4.0, status="unfinished", epochs=9)
    assert drawn(make_run) == []
