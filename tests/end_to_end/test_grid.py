"""What the grid of students is made of besides methods, controls and temperatures, and how many are trained at once."""

import functools
import json

import pytest
import torch
import yaml

from kdcache.archive import open_archive
from kdcache.replay.subject import Subject
from kdcache.report import collect, summarise
from kdcache.students.config import Grid
from kdcache.students.grid import plan_students
from kdcache.workspace import Workspace
from tests.end_to_end.conftest import FEW, with_images
from tests.end_to_end.test_distill import only, same_run
from tests.end_to_end.test_training_options import rows

SHORT = [*FEW, "--epochs", "2"]


def args_of(run):
    return yaml.safe_load((run / "args.yaml").read_text())


def test_optimisers_and_learning_rates_are_a_dimension_of_the_grid(few_home, few_archive, kdcache, tmp_path):
    result = kdcache("distill", *SHORT, "--opt", "adamw,sgd:lr=0.05,momentum=0.5", "--lr", "0.002,0.01", "--home", few_home)
    assert result.status == 0, result.err
    found = {(a["opt"], a["lr"], a["momentum"]) for a in map(args_of, few_home.glob("runs/*/test_*--*"))}
    assert found == {("adamw", 0.002, 0.9), ("adamw", 0.01, 0.9), ("sgd", 0.05, 0.5)}
    alone = tmp_path / "alone"
    sgd = ["--opt", "sgd", "--lr", "0.05", "--momentum", "0.5"]
    assert kdcache("distill", *SHORT, *sgd, "--archive", *with_images(few_archive), "--home", alone).status == 0
    same_run(only(alone, "runs/*/*sgd-*"), only(few_home, "runs/*/*sgd-*"))
    settings = {row.setting for row in summarise(collect([few_home / "runs"])).rows}
    assert len(settings) == 3  # rows of their own, not seeds of one


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--opt", "sgd:rate=3"], "rate"),
        (["--opt", "nothing"], "nothing"),
        (["--opt", "sgd:lr=fast"], "lr"),
        (["--lr", ""], "--lr"),
        (["--lr", "-1"], "lr"),
        (["--memory", "much"], "--memory 'much'"),
        (["--val-interval", "0"], "val-interval"),
    ],
)
def test_settings_that_cannot_be_are_refused(few_home, kdcache, arguments, words):
    result = kdcache("distill", *SHORT, *arguments, "--home", few_home)
    assert result.status == 2
    assert words in result.err
    assert "Traceback" not in result.err
    assert not list(few_home.glob("runs/*/*"))


@pytest.mark.exhaustive
def test_students_of_all_seeds_may_share_one_order(few_home, few_archive, kdcache, tmp_path):
    together, alone = tmp_path / "together", tmp_path / "alone"
    common = ["distill", *SHORT, "--student", "test_resnet", "--archive", *with_images(few_archive), "--share-order"]
    assert kdcache(*common, "--seed", "0,1", "--home", together).status == 0
    assert kdcache(*common, "--seed", "1", "--home", alone).status == 0
    runs = {args_of(run)["seed"]: run for run in together.glob("runs/*/test_*--*")}
    same_run(runs[1], only(alone, "runs/*/test_*--*"))
    orders = [[row["batch_order"] for row in rows(run)] for run in runs.values()]
    assert orders[0] == orders[1]
    assert "seed 0" in args_of(runs[1])["batch_order"]
    assert runs[0].joinpath("last.safetensors").read_bytes() != runs[1].joinpath("last.safetensors").read_bytes()
    # Seed 0 has its own order either way: it is the same student, and another seed is not.
    plain = kdcache(*common[:-1], "--seed", "0,1", "--dry-run", "--home", together)
    assert "2 students of 2 epochs, 1 of them trained already" in plain.err


@pytest.mark.exhaustive
def test_students_that_do_not_fit_into_memory_are_trained_in_groups(few_home, few_archive, kdcache, tmp_path):
    apart = tmp_path / "apart"
    common = ["distill", *SHORT, "--archive", *with_images(few_archive), "--tau", "1,4"]
    assert kdcache(*common, "--home", few_home).status == 0
    result = kdcache(*common, "--memory", "1MB", "--home", apart)
    assert result.status == 0
    assert "they are trained in groups, one after another" in result.err
    assert "distill 2/2: 4/4 done" in result.err
    runs = {run.name: run for run in few_home.glob("runs/*/test_*--*")}
    assert len(runs) == 2
    for name, run in runs.items():
        same_run(run, next(apart.glob(f"runs/*/{name}")))


@pytest.mark.exhaustive
def test_testing_every_few_epochs_changes_no_weights(few_home, few_archive, kdcache, tmp_path):
    often, seldom = tmp_path / "often", tmp_path / "seldom"
    common = ["distill", *SHORT[:-1], "3", "--archive", *with_images(few_archive)]
    assert kdcache(*common, "--home", often).status == 0
    assert kdcache(*common, "--val-interval", "2", "--home", seldom).status == 0
    runs = [only(place, "runs/*/test_*--*") for place in (often, seldom)]
    weights = [(run / "last.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    tested = [[row.get("test_top1") for row in rows(run)] for run in runs]
    assert tested[1] == [None, tested[0][1], tested[0][2]]
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    assert summaries[0]["final_top1"] == summaries[1]["final_top1"]
    assert summaries[1]["best_top1"] == max(top for top in tested[1] if top is not None)


@pytest.mark.exhaustive
def test_channels_last_and_compiled_students_learn_the_same(few_home, few_archive, kdcache, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # without a minute of C++
    common = [
        "distill",
        *SHORT,
        "--student",
        "test_resnet",
        "--archive",
        *with_images(few_archive),
        "--opt",
        "sgd",
        "--lr",
        "0.01",
    ]
    assert kdcache(*common, "--home", few_home).status == 0
    fast = tmp_path / "fast"
    result = kdcache(*common, "--channels-last", "--compile", "--home", fast)
    assert result.status == 0, result.err
    runs = [only(place, "runs/*/test_*--*") for place in (few_home, fast)]
    assert runs[0].name == runs[1].name  # how fast a student is trained is not what it is
    ours, theirs = rows(runs[1]), rows(runs[0])
    for key in ("train_loss", "test_loss", "grad_norm"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=1e-2)
    assert args_of(runs[1])["compile"]
    assert args_of(runs[1])["channels_last"]


def test_a_model_that_cannot_be_compiled_is_three_lines(few_home, few_archive, kdcache, monkeypatch):
    def broken(model):
        def forward(*inputs):
            raise RuntimeError("no compiler here")

        return forward

    monkeypatch.setattr(torch, "compile", broken)
    result = kdcache("distill", *SHORT, "--archive", *with_images(few_archive), "--compile", "--home", few_home)
    assert result.status == 5
    assert "why: no compiler here" in result.err
    assert "fix: leave --compile out" in result.err


@pytest.mark.exhaustive
def test_a_grid_of_ten_thousand_students_is_planned_quickly(few_home, few_archive):
    """Not timed: it ends at all, which one that read an archive for every student would not."""
    grid = Grid(tau=range(1, 101), seed=range(100), student=["test_resnet"])
    found = plan_students(grid, Subject.of(open_archive(few_archive)), Workspace(few_home))
    assert len({spec.folder for spec in found}) == 10_000
