"""Folders that were copied over one another: what is in them is never taken for what their name says."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from kdcache.system.seals import SEAL
from tests.end_to_end.conftest import FEW
from tests.end_to_end.test_distill import only

DISTIL = ["distill", *FEW, "--epochs", "1"]


@pytest.fixture
def common(few_home: Path, few_trained: Path) -> list[str]:
    images = f"arrays:{few_trained.parent / 'digits'}"
    return ["--teacher", "test_vit", "--dataset", images, "--canvas", "32", "--home", str(few_home)]


def refused(result, words: str) -> str:
    assert result.status in {4, 5}, result.err
    assert words in result.err
    return result.err.rpartition(": ")[2].strip()


def test_an_archive_under_another_ones_name_is_not_complete(few_home, common, kdcache):
    first = only(few_home, "archives/*")
    dump = ["dump-teacher", *common, "--views", "3"]
    assert kdcache(*dump, "--policy", "digits", "--view-seed", "1").status == 0
    second = next(path for path in (few_home / "archives").iterdir() if path != first)
    shutil.rmtree(first)
    shutil.copytree(second, first)
    fix = refused(kdcache(*dump, "--policy", "digits"), "is not the archive that its name says: it has another views")
    assert fix == f"mv {first} {first}.aside"
    first.rename(f"{first}.aside")
    assert kdcache(*dump, "--policy", "digits").status == 0


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (["--tau", "4"], ["--tau", "20"], "its tau is 20.0, not 4.0"),
        (["--lr", "0.002"], ["--lr", "0.001"], "its lr is 0.001, not 0.002"),
        (["--method", "kd"], ["--method", "dist"], "its method is"),
        (["--opt", "adamw"], ["--opt", "sgd"], "its opt is sgd, not adamw"),
        (["--clip-grad", "1"], ["--clip-grad", "0"], "its clip_grad is None, not 1.0"),
        ([], ["--student-size", "16"], "its folder is test_vit-16px--kd--tau"),
    ],
)
def test_a_run_under_another_ones_name_is_not_trained_already(few_home, kdcache, first, second, said):
    assert kdcache(*DISTIL, *first, "--home", few_home).status == 0
    four = only(few_home, "runs/*/*/")
    assert kdcache(*DISTIL, *second, "--home", few_home).status == 0
    other = next(run for run in few_home.glob("runs/*/*/") if run != four)
    shutil.rmtree(four)
    shutil.copytree(other, four)
    result = kdcache(*DISTIL, *first, "--home", few_home)
    assert refused(result, said) == f"mv {four} {four}.aside"
    four.rename(f"{four}.aside")
    assert kdcache(*DISTIL, *first, "--home", few_home).status == 0
    again = kdcache(*DISTIL, *first, "--home", few_home)
    assert "1 of 1 students are trained already" in again.err


@pytest.mark.parametrize(("option", "first", "second"), [("codec", "i16", "f32"), ("layout", "zarr", "hdf5")])
def test_an_archive_of_another_form_is_not_complete(few_home, common, kdcache, option, first, second):
    dump, before = ["dump-teacher", *common, "--policy", "digits", "--views", "1"], set((few_home / "archives").glob("*/"))
    made = []
    for value in (first, second):
        assert kdcache(*dump, "--view-seed", "7", f"--{option}", value).status == 0
        made += set((few_home / "archives").glob("*/")) - before - set(made)
    shutil.rmtree(made[0])
    shutil.copytree(made[1], made[0])
    again = kdcache(*dump, "--view-seed", "7", f"--{option}", first)
    refused(again, f"is not the archive that its name says: it has another {option}")


def test_a_run_that_does_not_say_what_it_is_of_is_not_trained_already(few_home, kdcache):
    """What a record lacks is not what was asked for."""
    assert kdcache(*DISTIL, "--home", few_home).status == 0
    file = only(few_home, "runs/*/*/args.yaml")
    args = yaml.safe_load(file.read_text())
    for lost in ({"method"}, {"control"}, {"student"}, {"archive_digest"}, {*args}):
        file.write_text(yaml.safe_dump({key: value for key, value in args.items() if key not in lost}))
        result = kdcache(*DISTIL, "--home", few_home)
        refused(result, "it does not say the")
        assert f"mv {file.parent} {file.parent}.aside" in result.err


@pytest.mark.parametrize("recorded", [True, False])
def test_a_canvas_under_another_ones_name_is_not_used(few_home, kdcache, recorded):
    train, test = (only(few_home, f"data/*-{split}-*px-*/") for split in ("train", "test"))
    shutil.rmtree(test)
    shutil.copytree(train, test)
    if not recorded:  # as canvases were written before
        record = json.loads((test / "canvas.json").read_text())
        (test / "canvas.json").write_text(json.dumps({key: value for key, value in record.items() if key not in {"state", SEAL}}))
    result = kdcache(*DISTIL, "--tau", "4", "--home", few_home)
    assert refused(result, "is another one: ") == f"mv {test} {test}.aside"
    test.rename(f"{test}.aside")
    assert kdcache(*DISTIL, "--tau", "4", "--home", few_home).status == 0


def test_views_of_another_size_than_a_folders_teacher_sees_are_refused(few_home, common, kdcache):
    first = only(few_home, "teachers/*/")
    dump = ["dump-teacher", *common, "--policy", "digits", "--views", "1"]
    result = kdcache(*dump, "--size", "64", "--teacher-folder", first)
    assert result.status == 5, result.err
    assert "sees images of 32 px, the views have 64 px" in result.err
    train = shlex.split(result.err.rpartition(": kdcache ")[2].strip())
    how = ["--canvas", "32", "--policy", "digits", "--from-scratch", "--epochs", "1"]
    assert kdcache(*train, *how, "--home", few_home).status == 0
    for size in ("32", "64"):  # as the error says
        assert kdcache(*dump, "--size", size, "--no-finetune").status == 0


def test_another_teachers_weights_are_not_exported_or_dumped(few_home, common, kdcache):
    first = only(few_home, "teachers/*/")
    train = ["train-teacher", *common, "--policy", "digits", "--from-scratch", "--epochs", "1", "--seed", "1"]
    assert kdcache(*train).status == 0
    second = next(path for path in (few_home / "teachers").glob("*/") if path != first)
    shutil.copy(second / "model.safetensors", first / "model.safetensors")
    for command in (
        ["export", first, "--output", few_home / "exported"],
        ["dump-teacher", *common, "--policy", "digits", "--view-seed", "1", "--teacher-folder", first],
    ):
        result = kdcache(*command)
        assert result.status == 5, result.err
        assert f"{first / 'model.safetensors'} is not the file that its record describes" in result.err
    assert not (few_home / "exported").exists()


def test_weights_of_another_run_are_not_exported_and_start_nothing(few_home, kdcache):
    how = ["--epochs", "1", "--model-ema-decay", "0.9", "--home", few_home]
    assert kdcache("distill", *FEW, "--tau", "4,20", *how).status == 0
    first, second = sorted(few_home.glob("runs/*/*/"))
    for which in ("last", "best", "ema"):
        kept = (first / f"{which}.safetensors").read_bytes()
        shutil.copy(second / f"{which}.safetensors", first / f"{which}.safetensors")
        result = kdcache("export", first, f"--{which}", "--output", few_home / "exported")
        assert refused(result, "is not the file that its record describes") == f"mv {first} {first}.aside"
        assert not (few_home / "exported").exists()
        (first / f"{which}.safetensors").write_bytes(kept)
    shutil.copy(second / "last.safetensors", first / "last.safetensors")
    refused(kdcache(*DISTIL, "--init", first, "--home", few_home), "the BLAKE3 of these weights differs from summary.json")
    (first / "last.safetensors").unlink()  # as one that another program wrote: without a seal
    save_file(load_file(second / "last.safetensors"), first / "last.safetensors")
    refused(kdcache("export", first, "--output", few_home / "exported"), "or written by another program")


def test_a_teacher_under_another_ones_name_is_not_trained_already(few_home, common, kdcache):
    how = ["--policy", "digits", "--from-scratch", "--epochs", "1"]
    assert kdcache("train-teacher", *common, *how, "--seed", "1").status == 0
    before = set((few_home / "teachers").glob("*/"))
    assert kdcache("train-teacher", *common, *how, "--seed", "2", "--lr", "0.003").status == 0
    (other,) = set((few_home / "teachers").glob("*/")) - before
    (own,) = (each for each in before if json.loads((each / "teacher.json").read_text())["training"]["seed"] == 1)
    own.rename(few_home / "own")
    shutil.copytree(other, own)
    fix = refused(kdcache("train-teacher", *common, *how, "--seed", "1"), "has another teacher: its seed is 2, not 1")
    assert fix == f"mv {own} {own}.aside"
    shutil.rmtree(own)
    assert kdcache("train-teacher", *common, *how, "--seed", "1", "--lr", "0.003").status == 0
    (rate,) = set((few_home / "teachers").glob("*/")) - before - {other}
    shutil.copytree(rate, own)
    refused(kdcache("train-teacher", *common, *how, "--seed", "1"), f"has another teacher: made as {rate.name}")
    shutil.rmtree(own)
    (few_home / "own").rename(own)
    assert "already trained" in kdcache("train-teacher", *common, *how, "--seed", "1").err
    shutil.copy(other / "model.safetensors", own / "model.safetensors")
    refused(kdcache("train-teacher", *common, *how, "--seed", "1"), "is not the file that its record describes")
    for init in (own, own / "model.safetensors"):
        result = kdcache("distill", *FEW, "--student", "test_vit", "--init", init, "--epochs", "1", "--home", few_home)
        refused(result, "is not the file that its record describes")
