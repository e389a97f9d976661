"""Students and teachers that do not fit into memory at once: they are trained one after another, and become the same."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

from kdcache.models.creation import create_model
from kdcache.students.student import Student
from kdcache.teachers.forward import Forward
from kdcache.training import learner
from kdcache.training.clipping import Clipping
from tests.end_to_end.conftest import FEW, with_images
from tests.end_to_end.test_distill import same_run
from tests.end_to_end.test_teachers import same_teacher
from tests.weights import save_weights


def runs(home):
    return {folder.name: folder for folder in sorted(home.glob("runs/*/*--seed*"))}


@pytest.fixture
def exhausted(monkeypatch):
    """Let gradients be clipped, and then, at certain steps of all, memory be out: in the midst of a step."""
    alive: list[weakref.ref] = []

    def at(*steps: int, kind=torch.OutOfMemoryError, text="CUDA out of memory. Tried to allocate 2.00 GiB."):
        count, clip, make = 0, Clipping.__call__, learner.make_optimizer
        seen: list[int] = []

        def clipped(*arguments):
            nonlocal count
            count += 1
            if count in steps:
                raise kind(text)
            return clip(*arguments)

        def made(model, config):
            gc.collect()
            seen.append(sum(each() is not None for each in alive))
            alive.append(weakref.ref(model))
            return make(model, config)

        monkeypatch.setattr(Clipping, "__call__", clipped)
        monkeypatch.setattr(learner, "make_optimizer", made)
        return seen

    return at


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "steps",  # of three students with two steps an epoch: in the second epoch and once more in a half, or before any checkpoint
    [(8, 10), pytest.param((2,), marks=pytest.mark.exhaustive)],
)
@pytest.mark.slow
def test_students_that_run_out_of_memory_are_divided_and_become_the_same(
    few_home, few_archive, kdcache, tmp_path, exhausted, steps
):
    grid = [
        "distill",
        "--epochs",
        "2",
        *FEW,
        "--archive",
        *with_images(few_archive),
        "--tau",
        "1,2,4",
        "--checkpoint-interval",
        "0",
    ]
    alone = tmp_path / "alone"
    assert kdcache(*grid, "--home", alone).status == 0
    seen = exhausted(*steps)
    done = kdcache(*grid, "--memory", "100GB", "--home", few_home)
    assert done.status == 0, done.err
    assert "out of memory with 3 students at once: 2 and then 1 go on from their last checkpoints" in done.err
    assert seen[-3] == 0, "what the first attempt held was given back"
    assert runs(few_home).keys() == runs(alone).keys()
    for name, folder in runs(few_home).items():
        same_run(folder, runs(alone)[name])
        assert not (folder / "checkpoint.pt").exists()


@pytest.mark.exhaustive
def test_a_student_that_does_not_fit_alone_can_be_trained_on_smaller_batches(few_home, few_archive, kdcache, exhausted):
    exhausted(2)
    done = kdcache("distill", "--epochs", "1", *FEW, "--archive", *with_images(few_archive), "--home", few_home)
    assert done.status == 75
    error, why, fix = done.err.splitlines()[-3:]
    assert error.startswith("error: student test_vit kd tau 1")
    assert error.endswith("memory of cpu, with batches of 80")
    assert why == "why: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert "--batch-size 40;" in fix
    assert "--memory" in fix


@pytest.mark.slow
def test_a_student_that_does_not_fit_alone_leaves_the_others_to_be_trained(few_home, few_archive, kdcache, monkeypatch):
    """In its own group, and in those that come after it."""
    step, count = Student.step, 0

    def stepped(*arguments):
        nonlocal count
        count += 1
        if count <= 3:  # with all three of the first seed, with two of them, and with one
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        step(*arguments)

    monkeypatch.setattr(Student, "step", stepped)
    grid = [
        "distill",
        "--epochs",
        "1",
        *FEW,
        "--tau",
        "1,2,4",
        "--seed",
        "0,1",
        "--archive",
        *with_images(few_archive),
        "--home",
        few_home,
    ]
    done = kdcache(*grid)
    assert done.status == 75, done.err
    assert done.err.splitlines()[-3].startswith("error: student test_vit kd tau 1")
    trained = [folder for folder in runs(few_home).values() if (folder / "summary.json").is_file()]
    assert len(trained) == 5
    assert kdcache(*grid).status == 0, "the locks were given back"


@pytest.mark.exhaustive
def test_other_errors_are_not_taken_for_a_lack_of_memory(few_home, few_archive, kdcache, exhausted):
    exhausted(2, kind=RuntimeError, text="mat1 and mat2 shapes cannot be multiplied")
    done = kdcache("distill", "--epochs", "1", *FEW, "--tau", "1,2", "--archive", *with_images(few_archive), "--home", few_home)
    assert done.status == 1
    assert "mat1 and mat2" in done.err


@pytest.mark.exhaustive
@pytest.mark.slow
def test_teachers_that_run_out_of_memory_are_divided_and_become_the_same(few_trained, kdcache, tmp_path, exhausted):
    place = ["--dataset", f"arrays:{few_trained.parent / 'digits'}", "--canvas", "32", "--policy", "digits"]
    both = ["train-teacher", "--teacher", "test_vit", *place, "--from-scratch", "--batch-size", "80", "--epochs", "1,2"]
    assert kdcache(*both, "--home", tmp_path / "alone").status == 0
    seen = exhausted(2)
    done = kdcache(*both, "--home", tmp_path / "home")
    assert done.status == 0, done.err
    assert "out of memory with 2 teachers at once: 1 and then 1 go on from their last checkpoints" in done.err
    assert seen[-2] == 0, "what the first attempt held was given back"
    for line in done.out.splitlines():
        same_teacher(Path(line), tmp_path / "alone/teachers" / Path(line).name)


@pytest.mark.exhaustive
def test_a_teacher_that_does_not_fit_can_be_trained_on_smaller_batches(few_trained, kdcache, tmp_path, exhausted):
    place = ["--dataset", f"arrays:{few_trained.parent / 'digits'}", "--canvas", "32", "--policy", "digits"]
    exhausted(1)
    one = ["train-teacher", "--teacher", "test_vit", *place, "--from-scratch", "--batch-size", "80", "--epochs", "1"]
    done = kdcache(*one, "--home", tmp_path)
    assert done.status == 75
    error, _, fix = done.err.splitlines()[-3:]
    assert error == "error: teacher test_vit does not fit into the memory of cpu, with batches of 80"
    assert "--batch-size 40" in fix


def test_too_little_memory_for_weights_as_they_are_can_be_repeated(few_trained, kdcache, tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Forward, "__call__", full)
    model, _ = create_model("test_vit", 10, input_size=32)
    save_weights(model, tmp_path / "ten.safetensors")
    place = ["--dataset", f"arrays:{few_trained.parent / 'digits'}", "--canvas", "32", "--policy", "digits"]
    start = ["--checkpoint", tmp_path / "ten.safetensors", "--epochs", "0"]
    done = kdcache("train-teacher", "--teacher", "test_vit", *place, *start, "--home", tmp_path / "home")
    assert done.status == 75, done.err
    error, why, fix = done.err.splitlines()[-3:]
    assert error == "error: no memory is left on cpu or its host for teacher test_vit"
    assert why == "why: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert fix == "fix: end what else uses that memory and repeat the command"
