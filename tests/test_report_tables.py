"""Tables over tau, of teachers and of costs: on the page and as LaTeX."""

import csv
import math
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import kdcache
from kdcache.archive import TEACHER_ENTROPIES, ArchiveWriter
from kdcache.report import Report, Row, collect, summarise, write_report
from kdcache.report.heatmap import Heatmap, TeacherFigures, heatmaps, results, teacher_figures
from kdcache.report.latex import latex_escaped
from tests.archives import teacher_card
from tests.reports import Page, RunFolders

NOTHING = "\N{EN DASH}"


@pytest.fixture
def make_run(tmp_path: Path) -> RunFolders:
    return RunFolders(tmp_path / "runs" / "demo")


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here looks at them, and drawing them takes most of a report's time."""
    monkeypatch.setattr("kdcache.report.html.render_figure", lambda drawing, name: (b"<svg></svg>", b""))


def make_archive(path: Path, epochs: int, views: int = 2, **provenance: Any) -> kdcache.Archive:
    """Of a teacher finetuned for so long; 40 samples of 5 classes."""
    card = teacher_card(
        alias="vit_s", training={"start": "timm", "epochs": epochs}, top1_clean=91.25, weights_sha256=f"{epochs:064x}"
    )
    writer = ArchiveWriter(path, num_views=views, num_samples=40, class_names=list("abcde"), teacher=card, provenance=provenance)
    logits = np.random.default_rng(epochs).normal(scale=np.log(epochs), size=(views, 40, 5)).astype(np.float32)
    for view, block in writer.missing():
        writer.write(view, block, logits[view, list(writer.positions(block))])
    return writer.finalize()


def with_top5(path: Path, top5: float) -> kdcache.Archive:
    """An archive as above, of a teacher whose top-5 is known."""
    card = teacher_card(alias="rn34", training={"start": "timm", "epochs": 0}, top1_clean=73.31, top5_clean=top5)
    writer = ArchiveWriter(path, num_views=1, num_samples=40, class_names=list("abcdefg"), teacher=card)
    for view, block in writer.missing():
        rows = len(writer.positions(block))
        writer.write(view, block, np.random.default_rng(0).normal(size=(rows, 7)).astype(np.float32))
    return writer.finalize()


def whole(make_run: RunFolders) -> Heatmap:
    return results(summarise(collect([make_run.base])))


def marks(heatmap: Heatmap) -> list[list[str | None]]:
    return [[score and score.mark for score in line.scores] for line in heatmap.lines]


def report_of(make_run: RunFolders, tmp_path: Path) -> tuple[Report, str]:
    report = write_report([make_run.base], tmp_path / "out")
    return report, report.html.read_text("utf-8")


# Marks


def test_the_best_is_marked_what_ties_with_it_too_and_missing_cells_stay_missing(make_run: RunFolders) -> None:
    for tau, tops in ((1.0, [80.0, 80.3, 80.7]), (4.0, [90.0, 91.0, 92.0]), (10.0, [91.0, 90.5, 90.5])):
        for seed, top in enumerate(tops):
            make_run(top, tau=tau, seed=seed)
    make_run(70.0, tau=20.0, control_spec="ls-global")
    assert marks(whole(make_run)) == [["", "best", "tied", None], [None, None, None, "best"]]


@pytest.mark.parametrize(("other", "mark"), [([90.0], "tied"), ([89.9], ""), ([], None)])
def test_one_seed_ties_only_with_its_equal(make_run: RunFolders, other: list[float], mark: str | None) -> None:
    make_run(90.0, tau=1.0)
    make_run(50.0, tau=20.0)
    for top in other:
        make_run(top, tau=4.0)
    line = whole(make_run).lines[0]
    if mark is None:
        assert len(line.scores) == 2
    else:
        assert line.scores[1] is not None
        assert line.scores[1].mark == mark


def test_the_same_difference_in_every_seed_is_no_tie(make_run: RunFolders) -> None:
    for seed in range(3):
        make_run(90.0 + seed, tau=1.0, seed=seed)
        make_run(89.0 + seed, tau=4.0, seed=seed)
    assert marks(whole(make_run)) == [["best", ""]]


def test_shades_go_from_the_worst_to_the_best_of_a_line(make_run: RunFolders) -> None:
    for tau, top in ((1.0, 80.0), (4.0, 85.0), (20.0, 90.0)):
        make_run(top, tau=tau)
    make_run(10.0, control_spec="ls-global")
    assert [[score.shade if score else None for score in line.scores] for line in whole(make_run).lines] == [
        [0.0, 0.5, 1.0],
        [0.0, None, None],
    ]


# Settings


def test_second_views_of_another_archive_are_told_of_the_rows_that_have_them(make_run: RunFolders) -> None:
    make_run(90.0, method_spec="kd")
    make_run(91.0, method_spec="mlkd")
    make_run(92.0, method_spec="mlkd", second_archive="archives/strong", second_archive_digest="e5" * 32)
    rows = summarise(collect([make_run.base])).rows
    assert sorted((row.method, row.setting) for row in rows) == [
        ("kd", ""),
        ("mlkd", ""),
        ("mlkd", "second views e5e5e5e5"),
    ]


# Weights


def test_methods_stand_side_by_side_at_every_weight(make_run: RunFolders) -> None:
    scores = {"kd": (73.6, 74.4, 63.5), "zkd,score=scaled": (73.8, 75.9, 76.2), "zkd": (74.1, 76.1, None)}
    for method, tops in scores.items():
        name, _, option = method.partition(",")
        for weight, top in zip((0.9, 3.0, 18.0), tops, strict=True):
            spec = ",".join(filter(None, (f"{name}:kd_weight={weight:g},ce_weight=0.1", option)))
            if top is not None:
                make_run(top, method={"name": name, "kd_weight": weight}, method_spec=spec, tau=2.0)
    make_run(50.0, method={"name": "kd", "kd_weight": 0.9}, method_spec="kd:kd_weight=0.9,ce_weight=0.1", tau=1.0)
    make_run(99.0, method={"name": "own"}, method_spec="own")  # has no weight
    [found] = [each for each in heatmaps(summarise(collect([make_run.base])), {}) if each.name.startswith("weights")]
    assert (found.fields, found.columns) == (("weight",), ("kd", "zkd", "zkd score=scaled"))
    shown = [(line.names, [score and round(score.cell.mean, 1) for score in line.scores]) for line in found.lines]
    assert shown == [(("0.9",), [73.6, 74.1, 73.8]), (("3",), [74.4, 76.1, 75.9]), (("18",), [63.5, None, 76.2])]
    assert [[score and score.mark for score in line.scores] for line in found.lines] == [
        ["", "best", ""],
        ["", "best", ""],
        ["", None, "best"],
    ]


def test_without_weights_to_compare_there_is_no_such_table(make_run: RunFolders) -> None:
    for weight, method in ((0.9, "kd"), (9.0, "zkd")):  # each as published
        make_run(90.0, method={"name": method, "kd_weight": weight}, method_spec=f"{method}:kd_weight={weight:g}")
    make_run(90.0, method={"name": "own"}, method_spec="own")
    assert not [each for each in heatmaps(summarise(collect([make_run.base])), {}) if each.name.startswith("weights")]


# Top-5


def test_top_5_stands_beside_top_1_at_the_best_tau_below_the_teachers(make_run: RunFolders, tmp_path: Path) -> None:
    archive = with_top5(tmp_path / "archives" / "demo", 91.42)
    of = {"archive": str(archive.path), "archive_digest": archive.digest, "archive_name": "demo", "teacher": "rn34"}
    for tau, tops, fives in ((1.0, (60.0, 61.0), (80.0, 82.0)), (4.0, (70.0, 72.0), (90.0, 93.0))):
        for seed, (top, five) in enumerate(zip(tops, fives, strict=True)):
            make_run(top, tau=tau, seed=seed, curves={"test_top5": [1.0, five]}, method_spec="kd", **of)
    make_run(69.0, method_spec="zkd", **of)  # of an earlier version, which has no top-5
    make_run(68.0, method_spec="ttm", own_temperature=True, curves={"test_top5": [1.0, 88.0]}, **of)
    report, text = report_of(make_run, tmp_path)
    section = re.search(r"<h3>Top-1 and top-5</h3>.*?</table>", text, re.DOTALL)
    assert section is not None
    rows = [re.sub(r"<[^>]*>|\s+", " ", row).split() for row in section[0].split("<tr>")[2:]]
    assert rows == [
        ["teacher", "rn34", "(pretrained", "+", "0", "epochs)", NOTHING, "73.31", "91.42", NOTHING],
        ["student", "kd", "4", "71.00", "±", "1.41", "91.50", "±", "2.12", "2"],
        ["student", "ttm", NOTHING, "68.00", "88.00", "1"],
    ]
    latex = (tmp_path / "out/tables/top-5.tex").read_text()
    assert tmp_path / "out/tables/top-5.tex" in report.tables
    assert r"student & kd & 4 & 71.00 & 1.41 & 91.50 & 2.12 & 2 \\" in latex
    assert r"teacher & rn34 (pretrained + 0 epochs) & -- & 73.31 & -- & 91.42 & -- & -- \\" in latex


@pytest.mark.parametrize("fives", [None, [100.0, 100.0]])
def test_a_top_5_that_says_nothing_is_no_table(make_run: RunFolders, tmp_path: Path, fives: list[float] | None) -> None:
    make_run(90.0, curves={"test_top5": fives} if fives else None)
    _, text = report_of(make_run, tmp_path)
    assert "Top-1 and top-5" not in text
    assert not (tmp_path / "out/tables/top-5.tex").exists()


# Which tables there are


def test_methods_and_controls_have_tables_where_there_are_several(make_run: RunFolders) -> None:
    for method in ("kd", "ttm"):
        for tau in (1.0, 4.0):
            make_run(90.0 + tau, method_spec=method, tau=tau)
    make_run(80.0, control_spec="ls-global")
    make_run(80.0, method_spec="dkd", status="unfinished")
    found = heatmaps(summarise(collect([make_run.base])), {})
    assert [(each.name, each.fields, [line.names for line in each.lines]) for each in found] == [
        ("methods", ("method",), [("kd",), ("ttm",)]),
        ("controls", ("control",), [("none",), ("ls-global",)]),
    ]


def test_teachers_of_one_architecture_are_told_apart_by_their_epochs(make_run: RunFolders, tmp_path: Path) -> None:
    teachers = {}
    for epochs in (400, 20):
        archive = make_archive(tmp_path / f"archives/a{epochs}", epochs)
        digest = archive.manifest.digest
        teachers[digest] = teacher_figures(f"a{epochs}", digest, "vit_s", archive)
        for tau in (1.0, 20.0):
            make_run(90.0 - epochs / 100 + tau / 10, tau=tau, archive_digest=digest, archive_name=f"a{epochs}")
    (found,) = heatmaps(summarise(collect([make_run.base])), teachers)
    assert found.name == "teachers"
    assert [line.names[:3] for line in found.lines] == [("vit_s", "pretrained", "20"), ("vit_s", "pretrained", "400")]
    brief, long = (teachers[digest] for digest in sorted(teachers, key=lambda digest: teachers[digest].epochs or 0))
    assert [line.names[3] for line in found.lines] == [f"{known.entropy:.3f}" for known in (brief, long)]
    assert brief.entropy is not None
    assert long.entropy is not None
    assert brief.entropy > long.entropy
    table = summarise(collect([make_run.base]), {digest: known.training for digest, known in teachers.items()})
    assert {row.setting for row in table.rows} == {
        f"pretrained + {known.epochs} epochs (archive {known.digest[:8]})" for known in teachers.values()
    }
    (same,) = heatmaps(table, teachers)
    assert [line.names for line in same.lines] == [line.names for line in found.lines]


def test_entropies_of_clean_images_stand_beside_those_of_the_views(make_run: RunFolders, tmp_path: Path) -> None:
    made = make_archive(tmp_path / "archives/a20", 20)
    records = ({"entropy": 0.1234, "entropy_rest": 0.9}, {"entropy": "0.1", "entropy_rest": 2.0}, "none", None)
    shown = []
    for record in records:
        manifest = made.manifest.model_copy(update={"provenance": {TEACHER_ENTROPIES: record}})
        known = teacher_figures("a20", manifest.digest, "vit_s", SimpleNamespace(manifest=manifest))  # type: ignore[arg-type]
        shown.append((known.entropy_clean, known.entropy_rest_clean))
    assert shown == [(0.1234, 0.9), (None, None), (None, None), (None, None)]
    teachers = {}
    for number, clean in enumerate((0.25, None)):
        digest = f"d{number}" * 32
        make_run(90.0 - 10 * number, archive_digest=digest)
        make_run(85.0 - 10 * number, archive_digest=digest, tau=4.0)
        teachers[digest] = TeacherFigures(
            f"a{number}", digest, "vit_s", "", "pretrained", 20 + number, None, None, 0.5, 0.9, entropy_clean=clean
        )
    (found,) = heatmaps(summarise(collect([make_run.base])), teachers)
    assert [line.names[3:7] for line in found.lines] == [("0.500", "0.900", "0.250", ""), ("0.500", "0.900", "", "")]
    shades = [[score.shade for score in line.scores if score] for line in found.lines]
    assert shades == [[1.0, pytest.approx(2 / 3)], [pytest.approx(1 / 3), 0.0]], "one scale for all teachers"
    text = report_of(make_run, tmp_path)[0]
    table = next(path for path in text.tables if path.name == "teachers-and-archives.tex").read_text("utf-8")
    assert r"$\hat{H}(p)$ clean & $\hat{H}(\bar{p})$ clean \\" in table


def test_starts_stand_beside_what_they_know_alone(make_run: RunFolders, tmp_path: Path) -> None:
    make_run(70.0)
    for init, own, top in (("finetuned", 89.721, 91.0), ("target", 60.0, 90.0), ("pretrained", None, 88.0)):
        for tau in (1.0, 20.0):
            make_run(top + tau / 20, tau=tau, init=init, init_top1=own, init_sha256=None if own is None else str(own) * 12)
    known = TeacherFigures("demo", "d1" * 32, "vit_s", top1_clean=92.56)
    maps = {found.name: found for found in heatmaps(summarise(collect([make_run.base])), {"d1" * 32: known})}
    found = maps["starts"]
    assert found.fields == ("student", "start", "alone (%)")
    assert [line.names for line in found.lines] == [
        ("rn18", "random", ""),
        ("rn18", "target", "60.00"),
        ("rn18", "pretrained", ""),
        ("rn18", "finetuned", "89.72"),
    ]
    assert [[score.mark if score else None for score in line.scores] for line in found.lines][1:] == [["", "best"]] * 3
    assert "Teacher vit_s: 92.56 %." in found.caption
    page = report_of(make_run, tmp_path)[1]
    assert "<td>finetuned</td><td>89.72</td>" in page


def test_methods_of_several_pairs_stand_beside_each_other(make_run: RunFolders, tmp_path: Path) -> None:
    for student, beta, lift in (("resnet20", 2.0, 0.0), ("vgg8", 6.0, 3.0)):
        for seed in range(2):
            make_run(70.0 + lift + seed / 4, student=student, seed=seed, tau=4.0, method_spec="kd:ce_weight=0.1")
            make_run(71.0 - lift + seed / 4, student=student, seed=seed, tau=4.0, method_spec=f"dkd:beta={beta:g}")
    make_run(60.0, student="vgg8", method_spec="dkd:beta=6")  # at another tau
    make_run(90.0, student="vgg8", method_spec="ttm")
    report, text = report_of(make_run, tmp_path)
    (found,) = (each for each in heatmaps(report.table, {}) if each.name == "pairs")
    assert (found.fields, found.columns, found.over) == (("student",), ("dkd", "kd", "ttm"), "method")
    assert [line.names for line in found.lines] == [("resnet20",), ("vgg8",)]
    means = [[score and score.cell.mean for score in line.scores] for line in found.lines]
    assert means == [[71.125, 70.125, None], [68.125, 73.125, 90.0]]
    assert marks(found) == [["best", "", None], ["", "", "best"]]
    assert "each method at its best tau" in text
    latex = (tmp_path / "out/tables/pairs.tex").read_text("utf-8")
    assert r"student & dkd & kd & ttm \\" in latex.splitlines()
    assert any(line.startswith("% vgg8, method ttm, n = 1: seed 0") for line in latex.splitlines())


def test_two_methods_of_one_name_are_told_apart(make_run: RunFolders) -> None:
    for student in ("resnet20", "vgg8"):
        make_run(70.0, student=student, method_spec="wttm:ce_weight=1", method={"name": "wttm", "ce_weight": 1.0})
        make_run(71.0, student=student, method_spec="wttm", method={"name": "wttm", "ce_weight": 0.0})
        for beta in (2, 6):
            make_run(60.0, student=student, method_spec=f"dkd:beta={beta}", method={"name": "dkd", "ce_weight": 1.0})
    (found,) = (each for each in heatmaps(summarise(collect([make_run.base])), {}) if each.name == "pairs")
    assert found.columns == ("dkd:beta=2", "dkd:beta=6", "wttm", "wttm with CE")


# Where numbers come from


def test_every_score_names_its_runs_and_archive_and_leads_to_them(make_run: RunFolders, tmp_path: Path) -> None:
    for seed in range(2):
        make_run(90.0 + seed, seed=seed, folder=f"of-seed-{seed}")
    _, text = report_of(make_run, tmp_path)
    page = Page(text)
    scores = [attributes for tag, attributes in page.tags if tag == "td" and "heat" in (attributes.get("class") or "")]
    assert scores
    assert {attributes["title"] for attributes in scores} == {
        f"seed 0 demo/of-seed-0, seed 1 demo/of-seed-1; archive {'d1' * 32}"
    }
    first = re.search(r'<tr id="(run-\d+)"><td class="path">of-seed-0<', text)
    assert first is not None
    assert f'<a href="#{first[1]}">(2)</a>' in text


def test_the_headline_and_the_controls_name_their_runs(make_run: RunFolders, tmp_path: Path) -> None:
    make_run(90.0, folder="plain")
    make_run(80.0, folder="smooth", control_spec="ls-global")
    _, text = report_of(make_run, tmp_path)
    assert f'<strong title="seed 0 demo/plain; archive {"d1" * 32}">Best tau' in text
    assert f'title="seed 0 demo/smooth; archive {"d1" * 32}">80.00 (1)<' in text


# Teachers and costs


def test_archives_and_their_teachers_are_listed_also_where_they_are_not_there(make_run: RunFolders, tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "archives/demo", 20)
    make_run(90.0, archive_digest=archive.manifest.digest)
    make_run(90.0, archive_digest="e2" * 32, archive_name="lost", archive="archives/lost", teacher="rn50")
    report, text = report_of(make_run, tmp_path)
    entropy = next(figures.entropy_mean for figures in archive.manifest.statistics.per_tau if figures.tau == 1)
    table = next(path for path in report.tables if path.name == "teachers-and-archives.tex").read_text("utf-8")
    (here,) = [line for line in table.splitlines() if line.startswith("demo &")]
    assert here.startswith(f"demo & {archive.manifest.digest[:8]} & vit\\_s & pretrained & 20 & 91.25 & -- & {entropy:.3f} &")
    assert "lost & e2e2e2e2 & rn50 & -- & -- & -- & -- & -- & -- & -- & -- \\\\" in table
    assert ">91.25</td>" in text


def lines_of(report: Report, table: str, name: str) -> list[list[str]]:
    """The cells after name and digest, of the lines of an archive in a table."""
    text = next(path for path in report.tables if path.name == f"{table}.tex").read_text("utf-8")
    return [line.removesuffix(" \\\\").split(" & ")[2:] for line in text.splitlines() if line.startswith(f"{name} &")]


def test_costs_are_what_was_recorded(make_run: RunFolders, tmp_path: Path) -> None:
    """Hours and watt-hours of a teacher and a dump of 80 passes; of students that have seen 360 online."""
    cost = {"passes": 80, "device_seconds": 1800.0, "gpu_joules": 7200.0, "cpu_joules": 3600.0}
    teacher = {"device_seconds": 36000.0, "gpu_joules": 36000.0}
    archive = make_archive(tmp_path / "archives/demo", 20, cost=cost, teacher_cost=teacher)
    digest = archive.manifest.digest
    spent = {"device_seconds": [360.0] * 3, "gpu_joules": [60.0, 60.0, 240.0]}
    make_run([10.0, 20.0, 30.0], archive_digest=digest, curves=spent)
    make_run([10.0, 20.0], archive_digest=digest, seed=1, status="unfinished", curves=spent)
    make_run(90.0, archive_digest=digest, method_spec="mlkd", curves=spent | {"second_view": [1, 0]})
    make_run(90.0, archive_digest="e2" * 32, archive_name="lost", archive="archives/lost")
    report, text = report_of(make_run, tmp_path)
    megabytes = f"{archive.nbytes / 1e6:.1f}"
    assert lines_of(report, "costs", "demo") == [["10", "10", "0.5", "3", megabytes, "3", "7", "0.7", "0.167"]]
    assert lines_of(report, "savings", "demo") == [["80", "360", "4.5", "0.5", "2.25", "1.75", "0.667"]]
    assert lines_of(report, "costs", "lost") == [["--"] * 5 + ["1", "2", "--", "--"]]
    assert lines_of(report, "savings", "lost") == [["--"] * 7]
    assert "are of whole GPUs, or of GPUs and CPU packages, whoever used them" in " ".join(text.split())
    for title, shown in (("GPUs and CPU packages", "3.00"), ("GPUs", "10.00"), ("GPUs", "0.17")):
        assert f'title="{title}">{shown}</td>' in text


def test_costs_that_are_not_all_recorded_are_missing(make_run: RunFolders, tmp_path: Path) -> None:
    """Nothing is added up from a part, nothing is guessed, and nonsense in an archive is no cost."""
    part = make_archive(tmp_path / "archives/part", 20, cost={"passes": 79, "device_seconds": 1.0})
    wrong = make_archive(tmp_path / "archives/wrong", 30, cost={"passes": 80, "device_seconds": "long"}, teacher_cost=[1])
    for archive in (part, wrong):
        name, digest = archive.name, archive.manifest.digest
        make_run([1.0, 2.0], archive_name=name, archive_digest=digest, curves={"device_seconds": [360.0, 360.0]})
        make_run([1.0, 2.0], archive_name=name, archive_digest=digest, curves={"cpu_joules": [1.0, math.nan]}, seed=1)
    report, text = report_of(make_run, tmp_path)
    for archive in (part, wrong):
        (line,) = lines_of(report, "costs", archive.name)
        assert line == ["--"] * 4 + [f"{archive.nbytes / 1e6:.1f}", "2", "4", "--", "--"]
        assert lines_of(report, "savings", archive.name) == [["80", "160", "2", "--", "--", "--", "1"]]
    assert "No counter of energy could be read" in text


def test_archives_of_second_views_are_counted_where_they_were_shown(make_run: RunFolders, tmp_path: Path) -> None:
    cost = {"device_seconds": 3600.0}
    first = make_archive(tmp_path / "archives/demo", 20, cost={"passes": 80, **cost})
    other = make_archive(tmp_path / "archives/other", 30, views=3, cost={"passes": 120, **cost})
    recorded: dict[str, Any] = {
        "archive_digest": first.manifest.digest,
        "second_archive": "archives/other",
        "second_archive_digest": other.manifest.digest,
    }
    make_run([1.0, 2.0, 3.0], method_spec="mlkd", curves={"second_view": [0, 1, 2]}, **recorded)
    make_run([1.0, 2.0], method_spec="kd", **recorded)  # as earlier versions wrote of methods that show one view
    report, text = report_of(make_run, tmp_path)
    assert lines_of(report, "savings", "demo, second views of other") == [["200", "240", "1.2", "2", "2.4", "0.4", "0.833"]]
    assert lines_of(report, "savings", "demo") == [["80", "80", "1", "1", "1", "0", "1"]]
    (both,) = lines_of(report, "costs", "demo, second views of other")
    assert both[4] == f"{(first.nbytes + other.nbytes) / 1e6:.1f}"
    assert "<br>second views of other</span>" in text
    assert lines_of(report, "teachers-and-archives", "other"), "it is shown as the others are"
    make_run([1.0], method_spec="mlkd", curves={"second_view": [0]}, **recorded | {"second_archive_digest": "e2" * 32})
    report = write_report([make_run.base], tmp_path / "again")
    assert ["--"] * 7 in lines_of(report, "savings", "demo, second views of other")


def test_the_file_of_runs_has_what_each_of_them_took(make_run: RunFolders, tmp_path: Path) -> None:
    make_run([1.0, 2.0], curves={"device_seconds": [1.5, 2.5], "gpu_joules": [100.0, 50.0]})
    make_run([1.0, 2.0], seed=1, curves={"device_seconds": [1.5, math.nan]})
    report, _ = report_of(make_run, tmp_path)
    with report.csv.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["device_seconds"], row["gpu_joules"], row["cpu_joules"]) for row in rows] == [("4.0", "150.0", ""), ("", "", "")]
    assert not any(name.startswith("last_") and "joules" in name for name in rows[0])


# LaTeX


def test_latex_tables_are_whole_and_say_where_their_numbers_come_from(make_run: RunFolders, tmp_path: Path) -> None:
    for tau, tops in ((1.0, [80.0, 80.3, 80.7]), (4.0, [90.0, 91.0, 92.0]), (10.0, [91.0, 90.5, 90.5])):
        for seed, top in enumerate(tops):
            make_run(top, tau=tau, seed=seed)
    make_run(70.0, tau=20.0, control_spec="bottom:5")
    report, _ = report_of(make_run, tmp_path)
    text = (tmp_path / "out/tables/results.tex").read_text("utf-8")
    assert {path.name for path in report.tables} == {
        "results.tex",
        "controls.tex",
        "teachers-and-archives.tex",
        "costs.tex",
        "savings.tex",
    }
    table = text[text.index(r"\begin{tabular}") : text.index(r"\end{tabular}")].splitlines()
    assert table[:3] == [
        r"\begin{tabular}{lrrrr}",
        r"\toprule",
        r"control & $\tau = 1$ & $\tau = 4$ & $\tau = 10$ & $\tau = 20$ \\",
    ]
    assert table[4:6] == [
        r"none & \kdheat{0}80.33\,{\scriptsize$\pm$\,0.35}\,{\scriptsize(3)}"
        r" & \kdheat{40}\textbf{91.00}\,{\scriptsize$\pm$\,1.00}\,{\scriptsize(3)}"
        r" & \kdheat{39}\underline{90.67}\,{\scriptsize$\pm$\,0.29}\,{\scriptsize(3)} & -- \\",
        r"bottom:5 & -- & -- & -- & \kdheat{0}\textbf{70.00}\,{\scriptsize(1)} \\",
    ]
    assert table[-2].endswith(r"standard deviation over seeds, number of seeds in brackets} \\")
    assert f"% bottom:5, tau 20, n = 1: seed 0 demo/run-10; archive {'d1' * 32}" in text.splitlines()


def test_latex_says_once_how_many_seeds_all_scores_have(make_run: RunFolders, tmp_path: Path) -> None:
    for seed in range(2):
        make_run(90.0 + seed, seed=seed)
    report_of(make_run, tmp_path)
    lines = (tmp_path / "out/tables/results.tex").read_text("utf-8").splitlines()
    assert any(line.endswith(r"over seeds, $n = 2$} \\") for line in lines)
    assert not any("(2)" in line for line in lines if not line.startswith("%"))


def test_names_from_the_runs_are_text_in_latex(make_run: RunFolders, tmp_path: Path) -> None:
    evil = "50% & \\input{x}_$^~#{}\n\\end{tabular}"
    make_run(90.0, control_spec=evil, folder="a\nb\\end{tabular}")
    make_run(90.0, tau=4.0)
    report, _ = report_of(make_run, tmp_path)
    assert latex_escaped("a\\b{%}") == r"a\textbackslash{}b\{\%\}"
    for path in report.tables:
        code = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("%")]
        assert sum(r"\end{tabular}" in line for line in code) == 1
        assert r"\input" not in "".join(code)
        columns = len(re.sub(r"\\begin{tabular}", "", next(line for line in code if "begin{tabular}" in line)).strip("{}"))
        rows = [line for line in code if line.endswith(r"\\") and r"\multicolumn" not in line]
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in rows} == {columns}


def test_the_row_of_a_table_is_that_of_the_page(make_run: RunFolders, tmp_path: Path) -> None:
    make_run(90.0)
    report, _ = report_of(make_run, tmp_path)
    assert report.table.rows == (Row("pets", "vit_s", "rn18", "kd", "none"),)
    assert all(path.parent == tmp_path / "out/tables" for path in report.tables)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed (Debian: texlive-latex-extra)")
@pytest.mark.parametrize("shades", ["", r"\usepackage[table]{xcolor}\newcommand{\kdheat}[1]{\cellcolor{blue!#1}}"])
def test_latex_takes_the_tables(make_run: RunFolders, tmp_path: Path, shades: str) -> None:
    archive = make_archive(tmp_path / "archives/of_20 & more", epochs=20)
    for seed in range(2):
        for control, top in (("none", 90.0), ("bottom:5", 85.0)):
            where = {"archive": str(archive.path), "archive_digest": archive.manifest.digest, "archive_name": "of_20 & more"}
            make_run(top + seed, seed=seed, control_spec=control, student=r"rn_18 {100%} \# $x^2$ ~", **where)
    make_run(80.0, tau=4.0, control_spec="bottom:5")
    report, _ = report_of(make_run, tmp_path)
    parts = [rf"\section{{t}}\input{{{path.with_suffix('').as_posix()}}}" for path in report.tables]
    text = r"\documentclass{article}\usepackage{booktabs}" + shades + r"\begin{document}" + "\n".join(parts) + r"\end{document}"
    (tmp_path / "paper.tex").write_text(text, "utf-8")
    call = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "paper.pdf").read_bytes().startswith(b"%PDF")


def test_cells_that_spreadsheets_would_compute_are_text() -> None:
    from kdcache.report.html import csv_cell

    assert [csv_cell(text) for text in ("=1+1", "+x", "-x", "@x", "\tx", "\rx")] == ["'=1+1", "'+x", "'-x", "'@x", "'\tx", "'\rx"]
    assert [csv_cell(value) for value in ("-0.5", "+1e-3", "kd", -0.5, None)] == ["-0.5", "+1e-3", "kd", -0.5, None]
