"""distill with every method: students of all of them on one stream, and what a method learns is resumed exactly."""

import json
import os
import signal

import pytest

from kdcache.methods import method
from kdcache.training import Learner
from tests.end_to_end.test_distill import only, same_run

QUICK = ["--student", "test_resnet", "--epochs", "1", "--batch-size", "719"]  # two steps


def test_every_method_trains_beside_the_others(home, archive, kdcache):
    result = kdcache("distill", "--method", ",".join(method), "--tau", 4, *QUICK, "--home", home)
    assert result.status == 0, result.err
    summaries = [json.loads(path.read_text()) for path in home.glob("runs/*/*/summary.json")]
    assert [summary["status"] for summary in summaries] == ["complete"] * len(list(method))
    weights = {path.read_bytes() for path in home.glob("runs/*/*/last.safetensors")}
    assert len(weights) == len(summaries)  # each became something else
    rows = {path.parent.name.split("--")[1]: json.loads(path.read_text()) for path in home.glob("runs/*/*/metrics.jsonl")}
    assert 15 < rows["ctkd"]["temperature"] < 16
    assert "temperature" not in rows["kd"]


def test_a_learned_temperature_is_resumed_exactly(home, archive, kdcache, tmp_path, monkeypatch):
    arguments = ["distill", "--method", "ctkd:lambda_epochs=2", "--student", "test_resnet", "--epochs", 2]
    arguments += ["--batch-size", 359, "--archive", archive]
    whole = tmp_path / "whole"
    assert kdcache(*arguments, "--home", whole).status == 0
    step, steps = Learner.step, []

    def interrupted(self, *args):
        step(self, *args)
        steps.append(self)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Learner, "step", interrupted)
    assert kdcache(*arguments, "--home", home).status == 130
    assert kdcache(*arguments, "--home", home).status == 0
    runs = [only(place, "runs/*/test_resnet--*") for place in (home, whole)]
    same_run(*runs)
    rows = [json.loads(line) for line in (runs[0] / "metrics.jsonl").open()]
    assert rows[0]["temperature"] != rows[1]["temperature"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "maxlogit", "--tau", "1,4"], "finds its temperature by itself"),
        (["--method", "ctkd", "--tau", "4"], "finds its temperature by itself"),
        (["--method", "maxlogit", "--control", "ls-global"], "entropy at tau"),
        (["--method", "wttm", "--tau", "4,10"], "--force"),
        (["--method", "ctkd:instance=1"], "never published"),
        (["--method", "rld:confidence_tau=0"], "number above 0"),
        (["--method", "mlkd:temperatures=3+x"], "numbers above 0"),
        (["--method", "dkd:label_rule=both"], "teacher_argmax"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(home, archive, kdcache, arguments, said):
    result = kdcache("distill", *arguments, *QUICK, "--dry-run", "--home", home)
    assert result.status == 2
    assert said in result.err
    assert [line.partition(":")[0] for line in result.err.splitlines()[-3:]] == ["error", "why", "fix"]


def test_force_and_mixed_grids(home, archive, kdcache):
    forced = kdcache("distill", "--method", "wttm", "--tau", "10", "--force", *QUICK, "--dry-run", "--home", home)
    assert forced.status == 0
    mixed = kdcache("distill", "--method", "kd,maxlogit", "--tau", "1,4", *QUICK, "--dry-run", "--home", home)
    assert mixed.status == 0
    assert mixed.out.count(" maxlogit ") == 1
    assert mixed.out.count(" kd ") == 2
