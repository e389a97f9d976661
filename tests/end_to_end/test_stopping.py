"""distill and train-teacher, interrupted at any moment by signals, and gone on with; and the system's limit of open files."""

import functools
import os
import resource
import signal
import time

import pytest
import torch
import yaml

from kdcache.cli import run
from kdcache.training.learner import Learner
from tests.end_to_end.conftest import FEW, start, until, with_images
from tests.end_to_end.test_distill import only, same_run

EXHAUSTIVE = pytest.mark.exhaustive
TWO = ["distill", "--tau", "4,20", "--student", "test_vit", "--epochs", "2", "--batch-size", "13"]  # 12 steps an epoch


@pytest.fixture(scope="module")
def uninterrupted(few_trained, tmp_path_factory):
    """A workspace in which the two students were trained at one go."""
    home = tmp_path_factory.mktemp("uninterrupted")
    assert run([*TWO, "--archive", *with_images(next((few_trained / "archives").iterdir())), "--home", str(home)]) == 0
    return home


# Of 2 students x 12 steps x 2 epochs: 24 is the end of an epoch.
@pytest.mark.parametrize("at", [24, *(pytest.param(at, marks=EXHAUSTIVE) for at in (1, 7, 23, 25, 44))])
def test_ctrl_c_at_any_step_keeps_all_of_them(few_home, few_archive, kdcache, uninterrupted, monkeypatch, at):
    arguments, home = [*TWO, "--archive", *with_images(few_archive)], few_home
    step, steps = Learner.step, []

    def interrupted(self, *args):
        step(self, *args)
        steps.append(self)
        if len(steps) == at:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Learner, "step", interrupted)
    stopped = kdcache(*arguments, "--home", home)
    assert (stopped.status, len(steps)) == (130, at)
    assert not list(home.glob("runs/*/*/summary.json"))
    assert kdcache(*arguments, "--home", home).status == 0
    assert len(steps) == 48  # not one was done twice
    for one in uninterrupted.glob("runs/*/test_vit--*"):
        same_run(home / one.relative_to(uninterrupted), one)


@pytest.mark.exhaustive
def test_a_run_that_goes_on_records_what_it_went_on_with(few_home, kdcache, monkeypatch):
    step, steps, home = Learner.step, [], few_home
    arguments = ["distill", "--tau", "4", *FEW, "--epochs", "5", "--home", home]

    def interrupted(self, *args):
        step(self, *args)
        steps.append(1)
        if len(steps) in (3, 7):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Learner, "step", interrupted)
    levels = (0, 5, 2)
    assert [kdcache(*arguments, "--allow-drift", level).status for level in levels] == [130, 130, 0]
    args = yaml.safe_load(only(home, "runs/*/test_vit--*/args.yaml").read_text())
    sessions = [args, *args["resumed"]]
    assert [session["allow_drift"] for session in sessions] == list(levels)
    assert {"device", "command", "kdcache_version", "created"} <= set.intersection(*map(set, sessions))
    assert kdcache("report", "--home", home).status == 0


@pytest.fixture(scope="module")
def five_epochs(trained, tmp_path_factory):
    """A command's line that trains for five epochs, and the folder that it leaves in a workspace if nothing happens."""
    archive = str(next((trained / "archives").iterdir()))
    distill = ["distill", "--tau", "4", "--student", "test_resnet", "--archive", archive, "--checkpoint-interval", "1000"]
    teacher = ["train-teacher", "--teacher", "test_resnet", "--dataset", "digits", "--data-dir", str(trained / "data")]
    lines = {"distill": (distill, "runs/*/test_resnet--*"), "train-teacher": (teacher, "teachers/*test_resnet--*")}

    @functools.cache
    def of(name):
        command, pattern = lines[name]
        home = tmp_path_factory.mktemp("five-epochs")
        assert run([*command, "--epochs", "5", "--home", str(home)]) == 0
        return [*command, "--epochs", "5"], pattern, only(home, pattern)

    return of


# Signals from outside meet a dump and a study in other tests, and students and teachers at chosen steps.
@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "how"),
    [("distill", "SIGINT"), ("train-teacher", "SIGTERM"), ("distill", "SIGTERM to all"), ("train-teacher", "SIGINT to all")],
)
def test_a_signal_loses_no_epoch_and_the_same_command_goes_on(kdcache, five_epochs, tmp_path, command, how):
    arguments, pattern, uninterrupted = five_epochs(command)
    name, _, to_all = how.partition(" ")
    workers = ["--workers", 1] if to_all else []
    process = start(*arguments, *workers, "--home", tmp_path, start_new_session=True)
    until(lambda: list(tmp_path.glob(f"{pattern}/.lock")), process)
    time.sleep(1.5)
    (os.killpg if to_all else os.kill)(process.pid, getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith(f"interrupted; what was done is kept. To go on: kdcache {command} ")
    stopped = only(tmp_path, pattern)
    state = torch.load(stopped / "checkpoint.pt", weights_only=True)
    assert state["steps"] > 0
    # An epoch has 22 steps; after the last one, and before its row is written, the count may be 22.
    assert 22 * len(state["rows"]) + state["count"] == state["steps"]

    assert kdcache(*arguments, "--home", tmp_path).status == 0
    for name in ("last.safetensors" if command == "distill" else "model.safetensors", "best.safetensors"):
        assert (stopped / name).read_bytes() == (uninterrupted / name).read_bytes()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_many_students_need_no_more_open_files_than_the_system_allows(few_home):
    home = few_home
    arguments = ["distill", "--tau", ",".join(map(str, range(1, 37))), "--student", "test_vit", "--epochs", 1, "--home", home]
    arguments += ["--batch-size", 160]

    def few(hard):
        return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))

    refused = start(*arguments, preexec_fn=few(80))
    _, err = refused.communicate(timeout=120)
    assert refused.returncode == 2
    assert "36 students of one seed" in err
    assert not list(home.glob("runs/*/*/args.yaml"))
    process = start(*arguments, "--workers", 2, preexec_fn=few(128))
    until(lambda: len(list(home.glob("runs/*/*/.lock"))) == 36, process)
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode in {0, 130}, err
