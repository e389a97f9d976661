"""Logit moments of students beside their teacher's, from what runs have left to the report's page."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import kdcache
from kdcache.archive import Archive, moment_histogram
from kdcache.errors import IntegrityError
from kdcache.report import collect, summarise, write_report
from kdcache.report.figures import Drawing
from kdcache.report.moment_figures import moment_drawings
from tests.reports import RunFolders


@pytest.fixture
def make_run(tmp_path: Path) -> RunFolders:
    return RunFolders(tmp_path / "runs" / "demo")


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    logits = np.random.default_rng(0).normal(1.0, 2.0, size=(2, 40, 5)).astype(np.float32)
    return kdcache.write_archive(tmp_path / "archives/demo", logits, list("abcde"))


def leave(run: Path, mean: float, rows: int = 200) -> None:
    """What a run leaves whose rows are about `mean`, with deviations about 1."""
    drawn = np.random.default_rng(1).normal(scale=0.1, size=(2, rows))
    drawn += np.array([[mean], [1.0]]) - drawn.mean(axis=1, keepdims=True)
    (run / "logit_moments.json").write_text(moment_histogram(*drawn).model_dump_json())


def drawings(make_run: RunFolders, archive: Archive | None = None) -> list[Drawing]:
    table = summarise(collect([make_run.base]))
    teachers = {"d1" * 32: archive.manifest.statistics} if archive else {}
    return moment_drawings(table, table.rows, "here", teachers)


def test_of_each_row_its_best_tau_is_drawn_beside_the_teacher(make_run: RunFolders, archive: Archive) -> None:
    leave(make_run(90.0, tau=1.0), mean=5.0)
    leave(make_run(91.0, tau=4.0), mean=-3.0)
    leave(make_run(92.0, tau=4.0, control_spec="ls-global"), mean=7.0)
    leave(make_run(80.0, method_spec="zkd"), mean=0.5)
    (drawing,) = drawings(make_run, archive)
    assert archive.manifest.statistics.details is not None
    teacher = archive.manifest.statistics.details.moments
    assert f"kd, tau 4: mean -3, deviation 1, the teacher's {teacher.mean:.3g} and {teacher.std:.3g}" in drawing.alt
    assert "in orange the teacher over the archive; crosses" in drawing.caption
    assert "orange" not in drawings(make_run)[0].caption
    assert "zkd, tau 1: mean 0.5, deviation 1," in drawing.alt
    assert "mean 5, deviation" not in drawing.alt
    assert "mean 7, deviation" not in drawing.alt
    figure = Figure(figsize=drawing.size)
    drawing.draw(figure)
    joint = figure.axes[0]
    crosses = [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in joint.lines]  # type: ignore[index]
    assert crosses == [pytest.approx((-3.0, 1.0), abs=1e-9), (teacher.mean, teacher.std)]


def test_bars_at_the_sides_are_the_rows_that_were_counted(make_run: RunFolders) -> None:
    run = make_run(90.0)
    (run / "logit_moments.json").write_text(
        moment_histogram(np.array([0.0, 0.0, 1.0]), np.array([2.0, 4.0, 4.0])).model_dump_json()
    )
    (drawing,) = drawings(make_run)
    figure = Figure(figsize=drawing.size)
    drawing.draw(figure)
    _, top, right = figure.axes
    along_mean, along_std = (axes.patches[0].get_data().values for axes in (top, right))  # type: ignore[attr-defined]
    assert (along_mean[0], along_mean[-1], along_mean.sum()) == (1.0, 0.5, 1.5)
    assert (along_std[0], along_std[-1], along_std.sum()) == (0.5, 1.0, 1.5)


def test_runs_of_earlier_versions_have_none(make_run: RunFolders, tmp_path: Path) -> None:
    run = make_run(90.0)
    assert drawings(make_run) == []
    assert "like the teacher's?" not in write_report([tmp_path / "runs"], tmp_path / "out").html.read_text()
    leave(run, mean=0.0)
    page = write_report([tmp_path / "runs"], tmp_path / "out").html.read_text()
    assert page.index("How did training go?") < page.index("like the teacher's?") < page.index("<h2>Results")


@pytest.mark.parametrize("text", ["", "{}", '{"mean": 1e999}', "[" * 100_000])
def test_damaged_moments_are_named(make_run: RunFolders, text: str) -> None:
    run = make_run(90.0)
    (run / "logit_moments.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"logit_moments\.json"):
        drawings(make_run)
