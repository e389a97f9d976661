"""Several processes that torchrun starts together train what one process trains."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from kdcache.models.creation import create_model
from kdcache.students.student import Student
from kdcache.system.distributed import Team
from kdcache.training.clipping import Clipping
from kdcache.training.learner import Learner
from kdcache.training.wrapping import with_synchronised_norms
from tests.end_to_end.conftest import FEW, until, with_images, without_costs
from tests.end_to_end.forks import Forked
from tests.end_to_end.test_distill import same_run
from tests.end_to_end.test_teachers import same_teacher
from tests.end_to_end.test_training_options import rows
from tests.weights import save_weights

SHORT = ["--epochs", "2", *FEW]


def torchrun(*arguments, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kdcache"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def two_processes(folder: Path, *arguments, prepare=None, statuses=(0, 0), gpus=""):
    """Two processes, told what torchrun tells those that it starts; what both wrote to stdout, and to stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    folder.mkdir()
    processes = [
        Forked(
            *arguments,
            out=folder / f"{rank}.out",
            err=folder / f"{rank}.err",
            environment={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank, "CUDA_VISIBLE_DEVICES": gpus},
            prepare=prepare,
        )
        for rank in "01"
    ]
    assert tuple(process.end(180) for process in processes) == statuses, [process.err.read_text() for process in processes]
    return ["".join(getattr(process, name).read_text() for process in processes) for name in ("out", "err")]


def runs(home):
    return {folder.name: folder for folder in sorted(home.glob("runs/*/*--seed*"))}


@pytest.mark.exhaustive
@pytest.mark.slow
def test_processes_divide_the_students_and_change_none_of_them(few_home, few_archive, kdcache, tmp_path):
    grid = ["distill", *SHORT, "--archive", *with_images(few_archive), "--tau", "1,4", "--seed", "0,1"]
    alone = tmp_path / "alone"
    assert kdcache(*grid, "--home", alone).status == 0
    out, err = two_processes(tmp_path / "said", *grid, "--home", few_home)
    assert "2 processes: each trains 2 of 4 students" in err
    assert out.count("test_vit--kd") == 4  # one table, of all students
    assert runs(few_home).keys() == runs(alone).keys()
    for name, folder in runs(few_home).items():
        same_run(folder, runs(alone)[name])


def _count_questions():
    """Say at the end, when the processes wait for each other, how often they asked each other until then."""
    asked, any_of, wait = [], Team.any, Team.wait
    Team.any = lambda team, mine: asked.append(mine) or any_of(team, mine)
    Team.wait = lambda team: wait(team) or (asked and print(f"asked {len(asked)} times", file=sys.stderr))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_processes_that_divide_every_batch_find_the_losses_of_one(few_home, few_archive, kdcache, tmp_path):
    """Also of methods that relate samples or classes of a batch, learn something themselves, or see two views."""
    grid = ["distill", *SHORT, "--archive", *with_images(few_archive), "--method", "kd,dist,ctkd,mlkd", "--control", "bottom:2"]
    grid += ["--parallel", "batches", "--opt", "sgd", "--lr", "0.01", "--model-ema-decay", "0.9"]
    alone = tmp_path / "alone"
    assert kdcache(*grid, "--home", alone).status == 0
    _, err = two_processes(tmp_path / "said", *grid, "--home", few_home, prepare=_count_questions)
    assert "2 processes: each has 40 views of every batch" in err
    # Once a batch, and each of four students whether it is time for a checkpoint, after the first of two epochs.
    assert set(re.findall(r"asked (\d+) times", err)) == {"8"}
    assert len(runs(few_home)) == 4
    for name, folder in runs(few_home).items():
        other = runs(alone)[name]
        assert yaml.safe_load((folder / "args.yaml").read_text())["processes"] == 2
        for ours, theirs in zip(rows(folder), rows(other), strict=True):
            assert ours["batch_order"] == theirs["batch_order"]
            assert ours["device_seconds"] > 0
            without_costs(theirs)
            compared = [key for key in theirs if key not in {"batch_order", "test_top1", "test_top5", "ema_top1"}]
            assert [ours[key] for key in compared] == pytest.approx([theirs[key] for key in compared], rel=2e-3, abs=2e-5), name
        for file in ("last.safetensors", "ema.safetensors"):
            weights, expected = load_file(folder / file), load_file(other / file)
            assert max(np.abs(weights[key] - expected[key]).max() for key in expected) < 1e-4, (name, file)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_processes_stop_together_and_go_on_together(few_home, few_archive, tmp_path):
    home = few_home
    grid = ["distill", "--epochs", "4", "--batch-size", "8", "--student", "test_vit", "--archive", *with_images(few_archive)]
    grid += ["--parallel", "batches", "--checkpoint-interval", "0", "--home", home]
    process = torchrun(*grid, start_new_session=True)
    until(lambda: any(folder.joinpath("checkpoint.pt").is_file() for folder in runs(home).values()), process)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on, to all at slightly different times
    process.communicate(timeout=60)
    (stopped,) = runs(home).values()
    assert not (stopped / "summary.json").exists()
    other = tmp_path / "other"
    two_processes(tmp_path / "whole", *grid[:-1], other)
    two_processes(tmp_path / "resumed", *grid)
    same_run(*(next(iter(runs(place).values())) for place in (home, other)))


@pytest.fixture
def teacher(few_trained, tmp_path):
    """How to train teachers on `few_home`'s digits, from weights of other classes."""
    model, _ = create_model("test_vit", 5, input_size=32)
    save_weights(model, tmp_path / "five.safetensors")
    place = ["--dataset", f"arrays:{few_trained.parent / 'digits'}", "--canvas", "32", "--policy", "digits"]
    start = ["--checkpoint", tmp_path / "five.safetensors", "--head-epochs", "1", "--batch-size", "80"]
    return ["train-teacher", "--teacher", "test_vit", *place, *start]


@pytest.mark.slow
def test_processes_that_divide_every_batch_train_the_teacher_of_one(teacher, kdcache, tmp_path):
    """Its head, too, which is trained first."""
    several = [*teacher, "--epochs", "2", "--opt", "sgd", "--lr", "0.01", "--model-ema-decay", "0.9"]
    assert kdcache(*several, "--home", tmp_path / "alone").status == 0
    out, err = two_processes(tmp_path / "said", *several, "--home", tmp_path / "both")
    assert "2 processes: each has 40 views of every batch" in err
    ours, theirs = (next((tmp_path / home).glob("teachers/*")) for home in ("both", "alone"))
    assert out.splitlines() == [str(ours)], "one of them speaks"
    assert ours.name == theirs.name
    assert json.loads((ours / "teacher.json").read_text())["processes"] == 2
    for our, their in zip(rows(ours), rows(theirs), strict=True):
        assert our["device_seconds"] > 0
        without_costs(their)
        compared = [key for key in their if key not in {"test_top1", "test_top5", "ema_top1"}]
        assert [our[key] for key in compared] == pytest.approx([their[key] for key in compared], rel=2e-3, abs=2e-5)
    for file in ("model.safetensors", "ema.safetensors", "head.safetensors"):
        weights, expected = load_file(ours / file), load_file(theirs / file)
        assert max(np.abs(weights[key] - expected[key]).max() for key in expected) < 1e-4, file


@pytest.mark.exhaustive
@pytest.mark.slow
def test_processes_divide_the_teachers_and_change_none_of_them(teacher, kdcache, tmp_path):
    both = [*teacher, "--epochs", "1,2"]
    alone = kdcache(*both, "--home", tmp_path / "alone")
    assert alone.status == 0
    out, err = two_processes(tmp_path / "said", *both, "--home", tmp_path / "both")
    assert "2 processes: each trains 1 of 2 teachers" in err
    assert [Path(line).name for line in out.splitlines()] == [Path(line).name for line in alone.out.splitlines()]
    for line in out.splitlines():
        same_teacher(Path(line), tmp_path / "alone/teachers" / Path(line).name)


def _without_memory_once():
    """In the second process, in the midst of a step of the second epoch."""
    clip, count = Clipping.__call__, 0

    def clipped(*arguments):
        nonlocal count
        count += 1
        if count == 8 and os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return clip(*arguments)

    Clipping.__call__ = clipped


@pytest.mark.exhaustive
@pytest.mark.slow
def test_processes_divide_their_students_together_when_one_of_them_is_out_of_memory(few_home, few_archive, kdcache, tmp_path):
    grid = [
        "distill",
        *SHORT,
        "--archive",
        *with_images(few_archive),
        "--tau",
        "1,2,4",
        "--parallel",
        "batches",
        "--checkpoint-interval",
        "0",
    ]
    alone = tmp_path / "alone"
    assert kdcache(*grid, "--home", alone).status == 0
    _, err = two_processes(tmp_path / "said", *grid, "--home", few_home, prepare=_without_memory_once)
    assert "out of memory with 3 students at once: 2 and then 1 go on from their last checkpoints" in err
    assert len(runs(few_home)) == 3
    for name, folder in runs(few_home).items():
        for ours, theirs in zip(rows(folder), rows(runs(alone)[name]), strict=True):
            assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=2e-3)


def _without_memory_at_first():
    """In the second process, in its first two steps: with all of its students, and with the first one alone."""
    step, count = Student.step, 0

    def stepped(*arguments):
        nonlocal count
        count += 1
        if count <= 2 and os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        step(*arguments)

    Student.step = stepped


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "trained"), [("batches", 1), ("students", 3)])
def test_processes_train_all_students_but_those_that_do_not_fit(few_home, few_archive, tmp_path, parallel, trained):
    taus = "1,2" if parallel == "batches" else "1,2,4,8"
    grid = ["distill", *SHORT, "--archive", *with_images(few_archive), "--tau", taus, "--parallel", parallel, "--home", few_home]
    two_processes(tmp_path / "said", *grid, prepare=_without_memory_at_first, statuses=(75, 75))
    assert sum((folder / "summary.json").is_file() for folder in runs(few_home).values()) == trained
    for rank in "01":
        error = (tmp_path / "said" / f"{rank}.err").read_text().splitlines()[-3]
        assert error.startswith("error: student test_vit kd tau ")
        assert "does not fit into the memory of cpu" in error


def _fail_in_the_third_step():
    step = Learner.step

    def failing(self, *arguments):
        if self.steps == 2 and os.environ["RANK"] == "1":
            raise ZeroDivisionError("division by zero")
        step(self, *arguments)

    Learner.step = failing


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_which_name_it(few_home, few_archive, tmp_path):
    grid = ["distill", *SHORT, "--archive", *with_images(few_archive), "--parallel", "batches", "--home", few_home]
    begun = time.monotonic()
    two_processes(tmp_path / "said", *grid, prepare=_fail_in_the_third_step, statuses=(75, 1))
    assert time.monotonic() - begun < 60
    first, second = ((tmp_path / "said" / f"{rank}.err").read_text() for rank in "01")
    assert "error: ZeroDivisionError: division by zero" in second
    assert "error: process 1 of 2 failed: ZeroDivisionError: division by zero" in first
    assert "why: this one cannot go on without it" in first
    assert "Traceback" not in first + second


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@two_gpus
@pytest.mark.gpu
@pytest.mark.parametrize(("prepare", "statuses"), [(_fail_in_the_third_step, (75, 1)), (_without_memory_once, (0, 0))])
def test_gpus_that_wait_for_one_that_failed_are_set_free(few_home, few_archive, tmp_path, prepare, statuses):
    """By NCCL, a kernel that waits for another GPU waits for ever: it is broken off."""
    grid = [
        "distill",
        *SHORT,
        "--archive",
        *with_images(few_archive),
        "--tau",
        "1,2,4",
        "--parallel",
        "batches",
        "--home",
        few_home,
    ]
    begun = time.monotonic()
    _, err = two_processes(tmp_path / "said", *grid, prepare=prepare, statuses=statuses, gpus="0,1")
    assert time.monotonic() - begun < 60
    assert ("out of memory with 3 students" if statuses == (0, 0) else "process 1 of 2 failed: ZeroDivisionError") in err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
def test_processes_on_one_gpu_are_refused_by_name(few_home, few_archive, tmp_path):
    grid = ["distill", *SHORT, "--archive", *with_images(few_archive), "--home", few_home]
    _, err = two_processes(tmp_path / "said", *grid, statuses=(2, 2), gpus="0")
    assert "error: processes 0 and 1 have the same GPU" in err


def test_norms_that_processes_share_keep_the_models_weights():
    """Their arithmetic needs GPUs; that a student of several GPUs is saved under the same names does not."""
    for name in ("resnet18", "efficientnet_b0"):  # torch's norms, and timm's own with their activation
        model, _ = create_model(name, 10, input_size=32)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        shared = with_synchronised_norms(model)
        assert sum(isinstance(each, torch.nn.SyncBatchNorm) for each in shared.modules()) > 10
        assert not any(type(each) is torch.nn.BatchNorm2d for each in shared.modules())
        after = shared.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)


def test_processes_that_do_not_know_where_to_meet_are_told_how(few_home, few_archive, kdcache, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    result = kdcache("distill", *SHORT, "--archive", *with_images(few_archive), "--home", few_home)
    assert result.status == 2
    assert "error: 3 processes without MASTER_ADDR and MASTER_PORT" in result.err
    assert "fix: start them with torchrun" in result.err
