"""distill with every method: students of all of them on one stream, and what a method learns is resumed exactly."""

import json
import os
import signal

import pytest
import yaml

from kdcache import CachedTargets, open_archive
from kdcache.datasets import DATASETS
from kdcache.methods import METHODS
from kdcache.methods.presets import PRESETS
from kdcache.report import collect, summarise
from kdcache.report.costs import costs
from kdcache.training.learner import Learner
from kdcache.workspace import Workspace
from tests.end_to_end.conftest import DUMP, FEW, with_images
from tests.end_to_end.test_distill import only, same_run

QUICK = ["--student", "test_vit", "--epochs", "1", "--batch-size", "719"]  # two steps
QUICKER = [*FEW, "--epochs", "1"]


@pytest.mark.slow
def test_every_method_trains_beside_the_others(few_home, kdcache):
    home = few_home
    result = kdcache("distill", "--method", ",".join(METHODS), "--tau", 4, *QUICKER, "--home", home)
    assert result.status == 0, result.err
    summaries = [json.loads(path.read_text()) for path in home.glob("runs/*/*/summary.json")]
    assert [summary["status"] for summary in summaries] == ["complete"] * len(list(METHODS))
    weights = {path.read_bytes() for path in home.glob("runs/*/*/last.safetensors")}
    assert len(weights) == len(summaries)  # each became something else
    rows = {path.parent.name.split("--")[1]: json.loads(path.read_text()) for path in home.glob("runs/*/*/metrics.jsonl")}
    assert 15 < rows["ctkd"]["temperature"] < 16
    assert "temperature" not in rows["kd"]


def test_every_epoch_says_what_the_student_shows(home, archive, kdcache):
    assert kdcache("distill", "--method", "kd", "--tau", "4", *QUICK, "--home", home).status == 0
    run = only(home, "runs/*/test_vit--*")
    row = json.loads((run / "metrics.jsonl").read_text())
    assert 0 < row["student_entropy"] < 1
    assert 0 <= row["agreement"] <= 100
    assert row["divergence"] > 0
    assert -1 <= row["correlation"] <= 1
    entropies = json.loads((run / "test_entropies.json").read_text())
    assert (entropies["classes"], sum(entropies["counts"])) == (10, 359)
    assert 0 < entropies["mean"] <= 1
    assert row["logit_std"] > 0
    assert row["grad_norm"] > 0
    assert "logit_mean" in row
    assert "second_view" not in row
    stream = CachedTargets(open_archive(archive), Workspace(home).canvas(DATASETS.build("digits"), "train", 32), 719, seed=0)
    assert row["batch_order"] == stream.order_digest(0) != stream.order_digest(1)
    assert yaml.safe_load((run / "args.yaml").read_text())["batch_order"].endswith("seed 0, batches of 719, the last one dropped")


@pytest.mark.exhaustive
def test_mlkd_is_shown_two_views_beside_students_of_one_and_resumes(few_home, few_archive, kdcache, tmp_path, monkeypatch):
    home = few_home
    arguments = ["distill", "--preset", "paper:mlkd:cifar100,paper:kd:cifar100", "--student", "test_vit", "--epochs", 2]
    arguments += ["--batch-size", 80, "--archive", *with_images(few_archive)]
    whole = tmp_path / "whole"
    assert kdcache(*arguments, "--home", whole).status == 0
    assert kdcache(*arguments[:2], "paper:kd:cifar100", *arguments[3:], "--home", tmp_path / "alone").status == 0
    one, two = "runs/*/test_vit--kd-*", "runs/*/test_vit--mlkd-*"
    same_run(only(whole, one), only(tmp_path / "alone", one))  # whoever trains beside it
    rows = [json.loads(line) for line in (only(whole, two) / "metrics.jsonl").open()]
    assert all(row["view"] != row["second_view"] for row in rows)
    stop_after(monkeypatch, 5)  # in the second epoch: a step of mlkd, none of kd
    assert kdcache(*arguments, "--home", home).status == 130
    assert kdcache(*arguments, "--home", home).status == 0
    for pattern in (one, two):
        same_run(only(home, pattern), only(whole, pattern))


@pytest.mark.exhaustive
def test_second_views_from_an_archive_of_a_stronger_policy(home, archive, kdcache):
    strong = home / "archives" / "strong"
    policy = "digits:randaugment.n=3"
    dumped = kdcache(*DUMP, "--views", 1, "--policy", policy, "--output", strong, "--home", home)
    assert dumped.status == 0, dumped.err
    arguments = ["distill", "--method", "mlkd", "--archive", archive, *QUICK, "--home", home]
    assert kdcache(*arguments).status == 0
    assert kdcache(*arguments, "--second-archive", "strong").status == 0
    runs = sorted(home.glob("runs/*/test_vit--mlkd*"))
    assert len(runs) == 2  # not taken for each other
    recorded = [yaml.safe_load((run / "args.yaml").read_text()) for run in runs]
    digests = {args.get("second_archive_digest") for args in recorded}
    assert digests == {None, open_archive(strong).digest}
    itself = kdcache(*arguments, "--second-archive", archive, "--dry-run")
    assert "1 of them trained already" in itself.err
    unused = kdcache("distill", "--method", "kd", "--archive", archive, "--second-archive", "strong", *QUICK, "--home", home)
    assert "without a method of two views" in unused.err
    table = summarise(collect([home / "runs"]))
    assert len(table.rows) == 2  # two experiments, not a repeated one
    assert not table.repeated
    both = kdcache("distill", "--method", "kd,mlkd", "--archive", archive, "--second-archive", "strong", *QUICK, "--home", home)
    assert both.status == 0, both.err
    used = {found.manifest.digest: found for found in map(open_archive, (archive, strong))}
    epoch = open_archive(archive).num_samples
    saved = {(cost.second, cost.students, cost.online, cost.passes) for cost in costs(collect([home / "runs"]), used)}
    assert saved == {("", 2, 3 * epoch, 3 * epoch), ("strong", 1, 2 * epoch, 4 * epoch)}  # kd was shown none of the second ones
    alone = kdcache("distill", "--method", "mlkd", "--archive", strong, *QUICK, "--home", home)
    assert alone.status == 2
    assert "holds one view" in alone.err
    assert kdcache("distill", "--method", "mlkd:views=1", "--archive", strong, *QUICK, "--dry-run", "--home", home).status == 0


def test_presets_set_what_was_published_and_tau_overrides_theirs(home, archive, kdcache):
    dry = [*QUICK, "--dry-run", "--home", home]
    found = kdcache("distill", "--preset", "paper:dkd:cifar100:vgg13-vgg8,paper:wttm:cifar100:vgg13-vgg8", *dry)
    assert found.status == 0, found.err
    assert "dkd:ce_weight=1.0,beta=6.0 tau 4 " in found.out
    assert "wttm:kd_weight=2.25,ce_weight=1.0 tau 10 " in found.out  # published: no --force is asked for
    assert " kd " not in found.out
    others = kdcache("distill", "--preset", "paper:dkd:cifar100", "--method", "kd", "--tau", "2,3", *dry)
    assert [others.out.count(f"{name} tau {tau} ") for name in ("kd", "dkd:ce_weight=1.0") for tau in (2, 3)] == [1] * 4
    listed = json.loads(kdcache("methods", "--presets", "--json").out)
    assert [row["preset"] for row in listed] == [preset.name for preset in PRESETS.values()]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("paper:dkd:cifar10", "paper:dkd:cifar100"),
        ("dkd:cifar100", "paper:dkd:cifar100"),
        ("paper:ttm:cifar100", "name the pair"),
        ("paper:kd:cifar100:resnet56-resnet20", "those of the dataset: paper:kd:cifar100"),
        ("paper:zrld:imagenet", "paper:zrld:cifar100"),
        ("paper", "kdcache methods --presets"),
    ],
)
def test_an_unknown_preset_is_refused_with_what_is_close(home, archive, kdcache, spec, words):
    result = kdcache("distill", "--preset", spec, *QUICK, "--home", home)
    assert result.status == 2
    assert [line.partition(":")[0] for line in result.err.splitlines()[-3:]] == ["error", "why", "fix"]
    assert words in result.err


def stop_after(monkeypatch, count: int) -> None:
    """Ctrl-C after so many steps of students."""
    step, steps = Learner.step, []

    def interrupted(self, *args):
        step(self, *args)
        steps.append(self)
        if len(steps) == count:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Learner, "step", interrupted)


@pytest.mark.exhaustive
def test_a_learned_temperature_is_resumed_exactly(home, archive, kdcache, tmp_path, monkeypatch):
    arguments = ["distill", "--method", "ctkd:lambda_epochs=2", "--student", "test_vit", "--epochs", 2]
    arguments += ["--batch-size", 359, "--archive", archive]
    whole = tmp_path / "whole"
    assert kdcache(*arguments, "--home", whole).status == 0
    stop_after(monkeypatch, 3)
    assert kdcache(*arguments, "--home", home).status == 130
    assert kdcache(*arguments, "--home", home).status == 0
    runs = [only(place, "runs/*/test_vit--*") for place in (home, whole)]
    same_run(*runs)
    rows = [json.loads(line) for line in (runs[0] / "metrics.jsonl").open()]
    assert rows[0]["temperature"] != rows[1]["temperature"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "maxlogit", "--tau", "1,4"], "does not look at tau"),
        (["--method", "ctkd,zctkd", "--tau", "4"], "does not look at tau"),
        (["--method", "ce,kd", "--control", "bottom:3"], "learns from labels alone"),
        (["--method", "ce:smoothing=1"], "smoothing of method ce"),
        (["--method", "maxlogit", "--control", "ls-global"], "entropy at tau"),
        (["--method", "zkd", "--tau", "4", "--control", "ls-instance"], "however strong"),
        (["--method", "zmlkd", "--control", "ls-global"], "however strong"),
        (["--method", "wttm", "--tau", "4,11"], "--force"),
        (["--method", "ctkd:instance=1"], "never published"),
        (["--method", "rld:confidence_tau=0"], "greater than 0"),
        (["--method", "mlkd:temperatures=3+x"], "valid number"),
        (["--method", "mlkd:temperatures=3,5"], "unknown method '5'"),
        (["--method", "dkd:label_rule=both"], "teacher_argmax"),
        (["--method", "kd:ce_weight=nan"], "ce_weight of method kd"),
        (["--method", "kd:kd_weight=-1"], "greater than or equal to 0"),
        (["--method", "kd:kd_weight=0"], "always be 0"),
        (["--method", "kd:4"], "given by name"),
        (["--method", "dkd:beta=1,beta=2"], "beta twice"),
        (["--method", "dkd:warmup_epochs=-1"], "warmup_epochs"),
        (["--method", ""], "names nothing"),
        (["--preset", ""], "names nothing"),
        (["--tau", "4,1e200"], "temperatures lie between"),
        (["--tau", "1e-30"], "temperatures lie between"),
        (["--opt", "foo"], "optimiser 'foo'"),
        (["--batch-size", "99999"], "1438 samples"),
        (["--second-archive", ""], "without a name"),
        (["--method", "mlkd:views=3"], "views of method mlkd"),
        (["--control", "topk:9"], "9 with 10 classes"),
        (["--control", "bottom:9"], "9 with 10 classes"),
        (["--control", "bottom"], "without k"),
        (["--control", "bottom:k=1.5"], "k of control bottom"),
        (["--control", "bottom:k=3,per=epoch"], "'view' or 'sample'"),
        (["--preset", "paper:maxlogit:cifar100", "--control", "ls-instance"], "entropy at tau"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(home, archive, kdcache, arguments, said):
    result = kdcache("distill", *QUICK, *arguments, "--dry-run", "--home", home)
    assert result.status == 2
    assert said in result.err
    assert [line.partition(":")[0] for line in result.err.splitlines()[-3:]] == ["error", "why", "fix"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "rld:label_rule=teacher_argmax"], "rld is dkd"),
        (["--method", "dist", "--tau", "1,20"], "tau_squared=0"),
        (["--method", "zkd", "--tau", "20"], "unit variance"),
        (["--method", "kd,ctkd", "--tau", "4,20"], "--tau is not for it"),
        (["--method", "kd,ce", "--tau", "4,20"], "has no temperature, --tau is not for it"),
        (["--method", "wttm", "--tau", "10"], "the largest of its paper"),
        (["--method", "dkd"], "grows over 20 epochs"),
        (["--method", "kd:student_tau=1", "--tau", "1,40"], "the teacher is nearly uniform"),
        (["--method", "rld:warmup_epochs=0,mlkd", "--control", "none,ls-instance"], "temperatures of their own"),
        (["--method", "kd,dist:tau_squared=0,zkd,rld:warmup_epochs=1", "--tau", "1,4"], ""),
    ],
)
def test_grids_that_may_not_show_what_they_are_meant_to_are_commented_on(home, archive, kdcache, arguments, said):
    result = kdcache("distill", *arguments, *QUICK, "--dry-run", "--home", home)
    assert result.status == 0
    assert said in result.err
    assert said or not any(word in result.err for word in ("rld is", "tau_squared=0", "variance", "grows", "own"))


def test_force_and_mixed_grids(home, archive, kdcache):
    forced = kdcache("distill", "--method", "wttm", "--tau", "20", "--force", *QUICK, "--dry-run", "--home", home)
    assert forced.status == 0
    mixed = kdcache("distill", "--method", "kd,maxlogit", "--tau", "1,4", *QUICK, "--dry-run", "--home", home)
    assert mixed.status == 0
    assert mixed.out.count(" maxlogit tau own ") == 1
    assert mixed.out.count(" kd ") == 2
