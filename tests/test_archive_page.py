"""Reports of archives without students."""

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy import special

import kdcache
from kdcache.archive import derive
from kdcache.cli import run
from kdcache.report import Experiment, write_archive_page
from tests.reports import Page

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "v1"
TAUS = (1, 2, 3, 4, 5, 7, 10, 20, 40)


def make(path: Path, seed: int = 0, classes: int = 30) -> tuple[kdcache.Archive, np.ndarray]:
    logits = np.random.default_rng(seed).normal(scale=3, size=(2, 40, classes)).astype(np.float32)
    return kdcache.write_archive(path, logits, [f"c{number}" for number in range(classes)], codec="f32"), logits


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcache.report.archive_page.render_figure", lambda drawing, name: (b"<svg></svg>", b""))


@pytest.mark.usefixtures("no_figures")
def test_the_page_says_what_each_temperature_leaves(tmp_path: Path) -> None:
    logits = {name: make(tmp_path / name, seed)[1] for seed, name in enumerate(("one", "two"))}
    asked = Experiment("Shapes", "some paper", "What is left?", "tau", "Little.", smoke=True)
    page = write_archive_page([tmp_path / "one", tmp_path / "two", tmp_path / "one"], tmp_path / "out", experiment=asked)
    rows = list(csv.DictReader(page.csv.open()))
    assert [(row["archive"], float(row["tau"])) for row in rows] == [(name, tau) for name in logits for tau in TAUS]
    for row in rows:
        mean = -np.sort(-special.softmax(logits[row["archive"]].reshape(-1, 30) / float(row["tau"]), axis=1)).mean(axis=0)
        found = [float(row[key]) for key in ("top", "second", "rank_minus_last")]
        np.testing.assert_allclose(found, [mean[0], mean[1], mean[19] - mean[29]], rtol=1e-4, atol=1e-7)
    text = page.html.read_text()
    parsed = Page(text)
    assert not [name for name in parsed.fetched if not name.startswith(("#", "data:"))]
    for said in ("Shapes", "What is left?", "Smoke version", "2 archives, without students"):
        assert said in text
    names = {figure.name for figure in page.figures}
    assert {"sorted_softmax_one.svg", "sorted_softmax_two.png", "entropy_over_tau_one.svg"} <= names


def test_all_nine_temperatures_are_in_one_figure(tmp_path: Path) -> None:
    make(tmp_path / "one")
    page = write_archive_page([tmp_path / "one"], tmp_path / "out")
    svg = next(figure for figure in page.figures if figure.name == "sorted_softmax_one.svg").read_text()
    assert [tau for tau in TAUS if f">tau {tau}<" in svg] == list(TAUS)
    assert svg.count(">alpha ") == 9
    text = page.html.read_text()
    ids = Page(text).ids
    assert len(ids) == len(set(ids))


@pytest.mark.usefixtures("no_figures")
def test_archives_of_before_are_measured_and_those_of_few_classes_are_whole(tmp_path: Path) -> None:
    page = write_archive_page([GOLDEN], tmp_path / "out")
    rows = list(csv.DictReader(page.csv.open()))
    assert [float(row["tau"]) for row in rows] == list(TAUS)
    assert all(float(row["rank_minus_last"]) >= 0 for row in rows)
    make(tmp_path / "few", classes=2)
    few = next(csv.DictReader(write_archive_page([tmp_path / "few"], tmp_path / "again").csv.open()))
    assert (few["rank"], float(few["rank_minus_last"])) == ("2", 0.0)


@pytest.mark.usefixtures("no_figures")
def test_the_command_tells_archives_from_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    archive, _ = make(tmp_path / "one")
    derive(archive, tmp_path / "figures-only", contents="statistics")
    assert run(["report", str(tmp_path / "one"), str(tmp_path / "figures-only"), "--output", str(tmp_path / "out")]) == 0
    assert capfd.readouterr().out.strip() == str(tmp_path / "out/index.html")
    (tmp_path / "runs").mkdir()
    assert run(["report", str(tmp_path / "one"), str(tmp_path / "runs")]) == 2
    error, why, fix = capfd.readouterr().err.splitlines()[-3:]
    assert error.startswith(f"error: {tmp_path / 'one'} is an archive")
    assert why.startswith("why:")
    assert run([*fix.partition(", or kdcache ")[2].split(), "-o", str(tmp_path / "again")]) == 0
    (tmp_path / "file").write_text("")
    assert run(["report", str(tmp_path / "one"), "-o", str(tmp_path / "file")]) == 2
