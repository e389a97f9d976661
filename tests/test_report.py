"""Run folders in, a table, figures and one offline page out."""

import csv
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import kdcache
from kdcache.errors import IntegrityError, NotFoundError, UsageError
from kdcache.report import Experiment, Published, Report, Row, Table, collect, paired, summarise, write_report
from kdcache.report.answers import answers, contrasts, method_contrasts, overview
from tests.reports import Page, RunFolders
from tests.servers import FaultyServer


@pytest.fixture
def make_run(tmp_path: Path) -> RunFolders:
    return RunFolders(tmp_path / "runs" / "demo")


@pytest.fixture
def archive(tmp_path: Path) -> kdcache.Archive:
    return demo(tmp_path)


def demo(folder: Path) -> kdcache.Archive:
    logits = np.random.default_rng(0).normal(scale=2.0, size=(2, 40, 5)).astype(np.float32)
    return kdcache.write_archive(folder / "archives/demo", logits, [f"class {c}" for c in range(5)])


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports with empty figures, for tests that look at the words: to draw them takes nearly all of the time."""
    monkeypatch.setattr("kdcache.report.html.render_figure", lambda drawing, name: (b"<svg></svg>", b""))


def table_of(tmp_path: Path) -> Table:
    return summarise(collect([tmp_path / "runs"]))


ROW = Row("pets", "vit_s", "rn18", "kd", "none")


# Reading


def test_collect_finds_runs_at_and_below_each_path_once(make_run: RunFolders, tmp_path: Path) -> None:
    folders = {make_run(seed=0), make_run(seed=1)}
    assert {record.folder for record in collect([tmp_path])} == folders
    assert {record.folder for record in collect([tmp_path / "runs", *folders])} == folders


def test_collect_reads_metrics_by_epoch(make_run: RunFolders) -> None:
    run = make_run([10.0, 20.0, 30.0])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 1, "test_top1": 21.0, "test_ece": None}) + "\n")  # repeated after a resume
    curves = collect([run])[0].curves
    assert curves["test_top1"].tolist() == [10.0, 21.0, 30.0]
    assert np.isnan(curves["test_ece"]).all()


@pytest.mark.parametrize("missing", ["nowhere", "empty"])
def test_collect_without_runs_is_not_found(make_run: RunFolders, tmp_path: Path, missing: str) -> None:
    make_run()
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match=missing) as error:
        collect([tmp_path / "runs", tmp_path / missing])
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("args.yaml", "student: [rn18"),
        ("args.yaml", "student: rn18"),
        ("args.yaml", "[" * 200_000),
        ("args.yaml", "- " * 200_000),
        ("args.yaml", "\udcff"),
        ("metrics.jsonl", '{"epoch": 0}\n{"epo\n'),
        ("metrics.jsonl", '{"epoch": 0, "test_top1": "high"}\n'),
        ("metrics.jsonl", "[" * 200_000),
        ("metrics.jsonl", None),
        ("summary.json", '{"status": "complete", "epochs": 2}'),
        ("summary.json", "{"),
        ("args.yaml", None),
    ],
)
def test_damage_names_the_file(make_run: RunFolders, name: str, content: str | None) -> None:
    path = make_run() / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(IntegrityError) as error:
        collect([path.parent])
    assert str(path) in str(error.value)


def test_an_unfinished_run_may_end_in_half_a_line(make_run: RunFolders) -> None:
    run = make_run([10.0, 20.0], status="unfinished")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "te')
    record = collect([run])[0]
    assert (record.status, record.epochs_done, record.final_top1) == ("unfinished", 2, None)


# Results


def test_cells_are_mean_std_and_number_of_seeds(make_run: RunFolders, tmp_path: Path) -> None:
    for seed, top in enumerate([90.0, 91.0, 95.0]):
        make_run(top, seed=seed)
    cell = table_of(tmp_path).get(ROW, 1.0)
    assert cell is not None
    assert (cell.mean, cell.n) == (92.0, 3)
    assert cell.std == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert str(cell) == "92.00 ± 2.65 (3)"


def test_missing_cells_stay_missing(make_run: RunFolders, tmp_path: Path) -> None:
    make_run(90.0, tau=1.0)
    make_run(92.0, tau=20.0)
    make_run(80.0, tau=4.0, control_spec="bottom:5")
    table = table_of(tmp_path)
    assert table.taus == (1.0, 4.0, 20.0)
    assert table.get(ROW, 4.0) is None
    one_seed = table.get(ROW, 1.0)
    assert one_seed is not None
    assert one_seed.std is None


def test_rows_follow_the_controls(make_run: RunFolders, tmp_path: Path) -> None:
    for control in ("bottom:20", "ls-instance", "bottom:5", "none", "ls-global"):
        make_run(control_spec=control)
    assert [row.control for row in table_of(tmp_path).rows] == ["none", "ls-global", "ls-instance", "bottom:5", "bottom:20"]


@pytest.mark.parametrize("change", [{"opt": "sgd"}, {"epochs": 64}, {"archive_digest": "e2" * 32}, {"init": "random"}])
def test_another_recipe_is_no_other_seed(make_run: RunFolders, tmp_path: Path, change: dict[str, Any]) -> None:
    make_run(90.0, **({"init": "pretrained"} if "init" in change else {}))
    make_run(80.0, **change)
    table = table_of(tmp_path)
    assert len(table.rows) == 2
    assert all(cell.n == 1 for cell in table.cells.values())
    assert any(str(next(iter(change.values())))[:8] in row.setting for row in table.rows)


def test_of_a_repeated_run_the_newer_one_counts(make_run: RunFolders, tmp_path: Path) -> None:
    make_run(90.0, created="2026-02-01T00:00:00+00:00")
    old = make_run(80.0, created="2026-01-01T00:00:00+00:00")
    table = table_of(tmp_path)
    cell = table.get(ROW, 1.0)
    assert cell is not None
    assert (cell.mean, cell.n) == (90.0, 1)
    assert [record.folder for record in table.repeated] == [old]


def test_paired_difference_against_the_t_table(make_run: RunFolders, tmp_path: Path) -> None:
    for seed, (low, high) in enumerate([(90.0, 91.0), (92.0, 94.0), (94.0, 97.0)]):
        make_run(low, seed=seed)
        make_run(high, seed=seed, tau=4.0)
    make_run(50.0, seed=9, tau=4.0)  # no partner: not in the difference
    table = table_of(tmp_path)
    difference = paired(table.cells[ROW, 4.0], table.cells[ROW, 1.0])
    assert difference is not None
    assert (difference.mean, difference.n) == (2.0, 3)
    half = 4.302652729911275 * 1.0 / math.sqrt(3)  # t at 0.975 with 2 degrees of freedom
    assert [difference.low, difference.high] == pytest.approx([2 - half, 2 + half])
    assert not difference.significant


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ([88.0, 88.15, 88.2], "more than seed noise"),
        ([88.0, 88.1, 88.2], "the same in every seed: no spread to judge it by"),
        ([89.0, 90.2, 90.1], "no significant difference"),
        ([89.0], "one seed: no spread can be given"),
        ([], "nothing to compare"),
    ],
)
def test_the_answer_says_how_sure_it_is(make_run: RunFolders, tmp_path: Path, second: list[float], words: str) -> None:
    for seed, top in enumerate([90.0, 90.1, 90.2]):
        make_run(top, seed=seed, tau=20.0)
    for seed, top in enumerate(second):
        make_run(top, seed=seed)
    (answer,) = answers(table_of(tmp_path))
    assert answer.headline == "best tau is 20, with test top-1 90.10 ± 0.10 % (mean ± std, n = 3 seeds)."
    assert words in answer.detail


def test_one_seed_has_no_spread(make_run: RunFolders, tmp_path: Path) -> None:
    make_run(90.0, tau=4.0)
    (answer,) = answers(table_of(tmp_path))
    assert answer.headline == "best tau is 4, with test top-1 90.00 % (one seed: no spread can be given)."


def test_controls_are_compared_at_the_best_tau(make_run: RunFolders, tmp_path: Path) -> None:
    for seed in range(2):
        for tau, control, top in ((1, "none", 90.0), (4, "none", 92.0), (1, "ls-global", 91.0), (4, "ls-global", 89.0)):
            make_run(top + seed, tau=tau, control_spec=control, seed=seed)
    (contrast,) = contrasts(table_of(tmp_path))
    assert (contrast.variant, contrast.tau) == ("ls-global", 4.0)
    assert contrast.difference is not None
    assert contrast.difference.mean == -3.0


@pytest.mark.usefixtures("undrawn")
def test_methods_are_compared_with_kd_each_at_its_best_tau(make_run: RunFolders, tmp_path: Path) -> None:
    for seed, noise in enumerate([0.0, 0.1, 0.3]):
        for tau, method, top in ((1, "kd", 90.0), (4, "kd", 92.0), (1, "ttm", 91.0), (10, "ttm", 93.0 + noise), (2, "dkd", 90.0)):
            make_run(top + seed, tau=tau, method_spec=method, seed=seed)
    make_run(50.0, method_spec="ttm", student="mnv4")  # whose kd has no result
    better, worse = sorted(method_contrasts(table_of(tmp_path)), key=lambda contrast: -contrast.cell.mean)
    assert (better.variant, better.tau, worse.variant) == ("ttm", 10.0, "dkd")
    assert better.difference is not None
    assert worse.difference is not None
    assert better.difference.mean == pytest.approx(1 + 0.4 / 3)
    assert better.difference.verdict == "more than seed noise"
    assert worse.difference.mean == -2.0
    text = write_report([tmp_path / "runs"], tmp_path / "out").html.read_text("utf-8")
    assert "minus kd" in text


@pytest.mark.usefixtures("undrawn")
def test_methods_of_z_scores_are_compared_with_the_same_method_without(make_run: RunFolders, tmp_path: Path) -> None:
    tops = {"kd:ce_weight=0.1": 70.0, "zkd:ce_weight=0.1": 72.0, "dkd:beta=8": 71.0, "zdkd:beta=72": 74.0, "zmlkd": 75.0}
    for method, top in tops.items():
        for seed in range(2):
            lr = 0.025 if method == "zmlkd" else 0.05  # settings may differ, where there is only one to compare with
            make_run(top + seed, method_spec=method, seed=seed, lr=lr)
    found = {contrast.variant: contrast for contrast in method_contrasts(table_of(tmp_path))}
    assert {what: contrast.base for what, contrast in found.items()} == {
        "zkd:ce_weight=0.1": "kd:ce_weight=0.1",
        "dkd:beta=8": "kd:ce_weight=0.1",
        "zdkd:beta=72": "dkd:beta=8",
        "zmlkd": "kd:ce_weight=0.1 (lr 0.05)",
    }
    assert found["zdkd:beta=72"].difference is not None
    assert found["zdkd:beta=72"].difference.mean == 3.0
    assert "compared with" in write_report([tmp_path / "runs"], tmp_path / "out").html.read_text("utf-8")


def test_a_method_is_not_compared_where_it_is_not_clear_with_what(make_run: RunFolders, tmp_path: Path) -> None:
    for method in ("kd:ce_weight=0.1", "kd:ce_weight=1", "ttm"):
        make_run(90.0, method_spec=method)
    assert method_contrasts(table_of(tmp_path)) == []
    make_run(89.0, method_spec="kd")
    found = {contrast.variant: contrast.base for contrast in method_contrasts(table_of(tmp_path))}
    assert found == {"kd:ce_weight=0.1": "kd", "kd:ce_weight=1": "kd", "ttm": "kd"}


def test_methods_of_different_archives_are_not_compared(make_run: RunFolders, tmp_path: Path) -> None:
    make_run(90.0, archive_digest="a1" * 32)
    make_run(80.0, archive_digest="b2" * 32, method_spec="zkd")
    assert method_contrasts(table_of(tmp_path)) == []


# The report


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """2 taus x 2 controls x 2 seeds of 3 epochs, an archive and a contact sheet."""
    return fill(tmp_path)


def fill(folder: Path) -> Path:
    make_run, archive = RunFolders(folder / "runs" / "demo"), demo(folder)
    for tau in (1.0, 20.0):
        for control in ("none", "ls-global"):
            for seed in range(2):
                top = 90.0 + tau / 8 - (control != "none") + seed / 4
                make_run([50.0, 80.0, top], tau=tau, control_spec=control, seed=seed, archive_digest=archive.manifest.digest)
    Image.new("RGB", (8, 8), "teal").save(folder / "runs/demo/views.png")
    return folder


class Watch:
    """Remembers what progress is told."""

    def __init__(self) -> None:
        self.steps: dict[str, list[tuple[int, int]]] = {}

    def update(self, task: str, done: int, total: int, note: str = "") -> None:
        self.steps.setdefault(task, []).append((done, total))

    def say(self, text: str) -> None:
        return


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report, Watch]:
    """The report of a `study`, written once, and what was told of its progress. Shared: do not change its files."""
    folder, watch = fill(tmp_path_factory.mktemp("study")), Watch()
    return folder, write_report([folder / "runs"], folder / "out", progress=watch), watch


def test_report_is_one_offline_page(written: tuple[Path, Report, Watch]) -> None:
    _, report, _ = written
    page = Page(report.html.read_text("utf-8"))
    assert page.text.startswith("<!DOCTYPE html>")
    assert all(value.startswith(("#", "data:")) for value in page.fetched)
    assert "@import" not in page.text
    assert len(page.ids) == len(set(page.ids))
    targets = {value[1:] for value in page.fetched if value.startswith("#")}
    assert targets <= set(page.ids)
    assert "<?xml" not in page.text
    assert all(dict(attrs).get("aria-label") for tag, attrs in page.tags if tag == "svg")
    assert all(dict(attrs).get("alt") for tag, attrs in page.tags if tag == "img")
    assert "Best tau is 20, with test top-1 92.62 ± 0.18 %" in page.text
    assert page.text.count("<svg") == 7
    assert page.text.count('<img src="data:image/png;base64,') == 1


def test_report_files(written: tuple[Path, Report, Watch]) -> None:
    _, report, _ = written
    assert {path.suffix for path in report.figures} == {".svg", ".png"}
    assert all(path.stat().st_size > 1000 for path in report.figures)
    with report.csv.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert {float(row["final_top1"]) for row in rows if row["control_spec"] == "none"} == {90.125, 90.375, 92.5, 92.75}
    assert all(row["run_folder"] and len(row["archive_digest"]) == 64 and row["last_student_entropy"] == "0.5" for row in rows)


@pytest.mark.exhaustive
def test_figures_are_the_same_bytes_again(written: tuple[Path, Report, Watch], tmp_path: Path) -> None:
    folder, first, _ = written
    second = write_report([folder / "runs"], tmp_path / "again")
    assert [path.read_bytes() for path in first.figures] == [path.read_bytes() for path in second.figures]
    assert first.html.read_bytes() == second.html.read_bytes()


@pytest.mark.usefixtures("undrawn")
def test_archive_that_moved_with_its_workspace_is_found(study: Path) -> None:
    moved = study / "elsewhere"
    moved.mkdir()
    for name in ("runs", "archives"):
        (study / name).rename(moved / name)
    assert "cannot be shown" not in write_report([moved / "runs"], study / "out").html.read_text("utf-8")


@pytest.mark.usefixtures("undrawn")
def test_an_archive_at_an_address_is_shown_once_it_was_pulled_and_not_fetched_before(study: Path) -> None:
    with FaultyServer(study / "archives") as server:
        for args in study.glob("runs/*/*/args.yaml"):
            record = yaml.safe_load(args.read_text())
            args.write_text(yaml.safe_dump(record | {"archive": f"{server.url}/{record['archive_name']}"}))
        here = (study / "archives").rename(study / "elsewhere")
        page = write_report([study / "runs"], study / "out").html.read_text("utf-8")
        assert not server.requests
    assert f"where kdcache pull {server.url}/" in page
    here.rename(study / "archives")
    assert "cannot be shown" not in write_report([study / "runs"], study / "out").html.read_text("utf-8")


@pytest.mark.usefixtures("undrawn")
def test_missing_archive_and_contact_sheet_are_said(make_run: RunFolders, tmp_path: Path) -> None:
    make_run()
    report = write_report([tmp_path / "runs"], tmp_path / "out")
    text = report.html.read_text("utf-8")
    assert "The entropies of archive demo cannot be shown: no archive at archives/demo." in text
    assert "No contact sheet of views: there is no" in text


@pytest.mark.usefixtures("undrawn")
def test_another_archive_in_its_place_is_not_shown(make_run: RunFolders, archive: kdcache.Archive, tmp_path: Path) -> None:
    make_run()
    text = write_report([tmp_path / "runs"], tmp_path / "out").html.read_text("utf-8")
    assert f"now has digest {archive.manifest.digest[:8]}" in text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("status", ["unfinished", "diverged"])
def test_runs_without_a_result_are_listed_and_not_averaged(make_run: RunFolders, tmp_path: Path, status: str) -> None:
    make_run(90.0, seed=0)
    make_run(10.0, seed=1, status=status, folder="the-odd-one")
    report = write_report([tmp_path / "runs"], tmp_path / "out")
    cell = report.table.get(ROW, 1.0)
    assert cell is not None
    assert (cell.mean, cell.n) == (90.0, 1)
    text = report.html.read_text("utf-8")
    assert f"<code>the-odd-one</code> {status} after 2 of 2 epochs" in text
    assert ("train_loss is nan" in text) == (status == "diverged")


def test_report_of_unfinished_runs_only(make_run: RunFolders, tmp_path: Path) -> None:
    make_run(status="unfinished")
    report = write_report([tmp_path / "runs"], tmp_path / "out")
    assert "No run has finished" in Page(report.html.read_text("utf-8")).text
    assert report.figures == ()


def test_strings_from_the_runs_are_text(make_run: RunFolders, tmp_path: Path) -> None:
    evil = "<script>alert('$x^$ & \"y\"')</script>"
    for number, tau in enumerate((1.0, 4.0)):
        names = {"student": evil, "dataset": f"{evil}../..", "teacher": evil, "method_spec": evil, "control_spec": "none"}
        make_run(90.0 + number, tau=tau, archive_name=evil, command=f"{evil}\n]]>", **names)
        make_run(80.0 + number, tau=tau, archive_name=evil, **(names | {"control_spec": evil, "student": evil + "2"}))
    report = write_report([tmp_path / "runs"], tmp_path / "out")
    page = Page(report.html.read_text("utf-8"))
    assert "<script>alert" not in page.text
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert all(path.parent == tmp_path / "out/figures" for path in report.figures)


@pytest.mark.exhaustive
def test_dollar_signs_in_names_are_drawn_as_they_are(make_run: RunFolders, tmp_path: Path) -> None:
    """Between two of them matplotlib sees a formula, and this one is broken."""
    evil, made = "$\\frac{$", {"teacher": "a$_$b$", "dataset": "$^^$"}
    logits = np.random.default_rng(0).normal(size=(1, 40, 3)).astype(np.float32)
    archive = kdcache.write_archive(tmp_path / f"archives/{evil}", logits, [evil, "$2$", "$"])
    for number, tau in enumerate((1.0, 4.0)):
        for control in ("none", evil):
            names = {"student": evil + str(number), "method_spec": evil, "control_spec": control, "archive_name": evil}
            make_run(90.0, tau=tau, archive=str(archive.path), archive_digest=archive.manifest.digest, **names, **made)
    report = write_report([tmp_path / "runs"], tmp_path / "out")
    drawn = "".join(path.read_text("utf-8") for path in report.figures if path.suffix == ".svg")
    assert len(report.figures) == 14  # SVG and PNG of seven figures
    assert drawn.count(evil) >= 3


@pytest.mark.usefixtures("undrawn")
def test_several_datasets_methods_and_archives(make_run: RunFolders, tmp_path: Path) -> None:
    for number, dataset in enumerate(("pets", "cifar100")):
        for method in ("kd", "zkd", "dkd", "ttm", "dist"):
            for control in ("none", "bottom:5"):
                names = {"dataset": dataset, "method_spec": method, "control_spec": control}
                make_run(tau=2.0, archive_digest=f"{number}" * 64, archive_name=f"{dataset}--vit_s", **names)
    report = write_report([tmp_path / "runs"], tmp_path / "out")
    page = Page(report.html.read_text("utf-8"))
    assert len(page.ids) == len(set(page.ids))
    assert page.text.count("<h3>Archive") == 2
    assert len(report.figures) == 2 * (2 * 4 + 3)  # SVG and PNG of four figures per dataset, and three of all methods


def test_out_must_be_a_folder(make_run: RunFolders, tmp_path: Path) -> None:
    make_run()
    (tmp_path / "out").touch()
    with pytest.raises(UsageError, match="is a file"):
        write_report([tmp_path / "runs"], tmp_path / "out")


def test_progress_is_told(written: tuple[Path, Report, Watch]) -> None:
    _, _, watch = written
    assert {task: seen[-1] for task, seen in watch.steps.items()} == {"reading runs": (8, 8), "drawing figures": (7, 7)}


def test_reports_need_no_torch(study: Path) -> None:
    script = f"""
import sys
import kdcache.report
assert not {{"numpy", "matplotlib", "jinja2"}} & set(sys.modules), "import kdcache.report is light"
from pathlib import Path
kdcache.report.write_report([Path({str(study / "runs")!r})], Path({str(study / "out")!r}))
loaded = {{"torch", "torchvision", "timm", "matplotlib.pyplot"}} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_optimiser_with_one_rate_says_enough(make_run: RunFolders, tmp_path: Path) -> None:
    make_run(90.0)
    make_run(91.0, opt="sgd", lr=0.05, weight_decay=0.0005)
    assert {row.setting for row in table_of(tmp_path).rows} == {"opt adamw", "opt sgd"}
    make_run(92.0, opt="sgd", lr=0.1, weight_decay=0.0005)
    settings = {row.setting for row in table_of(tmp_path).rows}
    assert settings == {"opt adamw", "opt sgd, lr 0.05", "opt sgd, lr 0.1"}


def test_an_option_that_only_some_runs_have_tells_them_apart(make_run: RunFolders, tmp_path: Path) -> None:
    make_run(90.0, layer_decay=None)
    make_run(91.0, layer_decay=0.75)
    assert {row.setting for row in table_of(tmp_path).rows} == {"layer_decay none", "layer_decay 0.75"}


def test_runs_of_before_have_the_defaults_of_newer_options(make_run: RunFolders, tmp_path: Path) -> None:
    make_run(90.0)
    make_run(91.0, warmup_epochs=5.0, test="crop 0.95 of the short side, bicubic", opt_betas="", layer_decay=None)
    rows = {row.setting for row in table_of(tmp_path).rows}
    assert rows == {
        "test whole image made square, bilinear, warmup_epochs 0",
        "test crop 0.95 of the short side, bicubic, warmup_epochs 5",
    } or rows == {
        "warmup_epochs 0, test whole image made square, bilinear",
        "warmup_epochs 5, test crop 0.95 of the short side, bicubic",
    }


def test_bf16_tells_runs_apart_and_how_they_were_run_does_not(make_run: RunFolders, tmp_path: Path) -> None:
    make_run(90.0)  # of a version that had bf16 only where it was asked for
    make_run(91.0, seed=1, amp=False, graph="on")
    make_run(92.0, seed=2, amp=False, graph="off (--no-graph)")
    assert {row.setting for row in table_of(tmp_path).rows} == {""}
    make_run(93.0, amp=True)
    assert {row.setting for row in table_of(tmp_path).rows} >= {"amp False", "amp True"}


@pytest.mark.usefixtures("undrawn")
def test_of_many_rows_the_best_taus_are_counted(make_run: RunFolders, tmp_path: Path) -> None:
    for number in range(5):
        for seed in range(3):
            make_run(90.0 + seed, student=f"rn{number}", tau=1.0, seed=seed)
            make_run(88.0 + number + seed + 0.1 * (seed == 1), student=f"rn{number}", tau=4.0, seed=seed)
    found = answers(table_of(tmp_path))
    assert (
        overview(found)
        == "Best tau, of 5 rows with several: 4 in 3, 1 in 2. It is ahead of the second best by more than seed noise in 4 of 5."
    )
    text = write_report([tmp_path / "runs"], tmp_path / "out").html.read_text()
    assert "Best tau, of 5 rows with several" in text
    assert Page(text).tags.count(("td", {"class": "runs"})) == 5


def test_what_has_one_tau_only_is_not_counted_among_best_taus(make_run: RunFolders, tmp_path: Path) -> None:
    make_run(90.0, tau=4.0)
    make_run(91.0, method_spec="ctkd", own_temperature=True)
    make_run(status="unfinished", student="rn34", tau=4.0)
    assert overview(answers(table_of(tmp_path))) == "No row has results at two taus, so there is no best tau."
    make_run(89.0, tau=1.0)
    said = "Best tau, of 1 row with several: 4 in 1. No row has two seeds of two taus, so none can be told from seed noise."
    assert overview(answers(table_of(tmp_path))) == said


def test_a_best_tau_that_is_behind_on_the_seeds_that_both_have_is_not_ahead(make_run: RunFolders, tmp_path: Path) -> None:
    for tau, tops in ((4.0, [70.0, 70.0, 80.0]), (1.0, [72.0, 72.1])):
        for seed, top in enumerate(tops):
            make_run(top, tau=tau, seed=seed)
    (answer,) = answers(table_of(tmp_path))
    assert answer.difference is not None
    assert answer.difference.significant
    assert overview([answer]).endswith("in 0 of 1.")


@pytest.mark.usefixtures("undrawn")
def test_a_report_opens_with_what_was_asked(make_run: RunFolders, tmp_path: Path) -> None:
    make_run(90.0)
    asked = Experiment("Tau & co", "a paper, Fig. 1", "Is <larger> better?", "tau", "It is.")
    text = write_report([tmp_path / "runs"], tmp_path / "out", experiment=asked).html.read_text()
    assert "<h1>Tau &amp; co</h1>" in text
    assert text.index("Is &lt;larger&gt; better?") < text.index("a paper, Fig. 1") < text.index('class="answer"')
    assert "Smoke version" not in text
    small = dataclasses.replace(asked, smoke=True)
    assert "Smoke version" in write_report([tmp_path / "runs"], tmp_path / "out", experiment=small).html.read_text()


@pytest.mark.usefixtures("undrawn")
def test_the_papers_own_numbers_stand_in_grey_beside_those_that_repeat_them(make_run: RunFolders, tmp_path: Path) -> None:
    for tau in (1.0, 4.0):
        make_run(90.0, tau=tau, method_spec="kd:tau_squared=0")
    common = (("student", "rn18"), ("method", "kd"))
    numbers = (
        Published("Table 7", (*common, ("tau", 4)), 77.77),
        Published("Table 7", (("student", "rn18"), ("method", "dkd")), 66.66),
        Published("Table 8", (*common, ("tau", "4"), ("dataset", "pets")), 55.55),
    )
    asked = Experiment("Tau", "a paper", "Is it?", "tau", "It is.", published=numbers)
    text = write_report([tmp_path / "runs"], tmp_path / "out", experiment=asked).html.read_text()
    assert "In grey, the paper's own numbers" in text
    assert 'Table 8">55.55</span>' in text, "the one that says most of the run"
    assert "66.66" not in text
    assert "77.77" not in text, "another number says more of the run"
    without = write_report([tmp_path / "runs"], tmp_path / "out").html.read_text()
    assert 'class="paper"' not in without
    assert "In grey, the paper" not in without


def test_the_sheet_of_views_beside_the_runs_is_no_run(make_run: RunFolders, tmp_path: Path) -> None:
    run = make_run()
    sheet = run.parent / "views.png"
    sheet.write_bytes(b"PNG")
    assert [record.folder for record in collect([sheet, run])] == [run]  # as `kdcache report runs/*/*` has them
    with pytest.raises(NotFoundError):
        collect([sheet])
