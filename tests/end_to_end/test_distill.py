"""distill: paired students, exact resume, and refusal of views that are not the teacher's."""

import json
import os
import signal

import numpy as np
import pytest
import yaml

from kdcache import open_archive
from kdcache.errors import IntegrityError
from kdcache.training.outputs import TEACHER_OUTPUTS, TEST_OUTPUTS, KeptOutputs
from tests.end_to_end.conftest import FEW, STUDENT, until, with_images, without_costs
from tests.end_to_end.forks import Started


def only(folder, pattern):
    found = list(folder.glob(pattern))
    assert len(found) == 1, found
    return found[0]


def test_students_in_lockstep_equal_students_alone(few_home, few_archive, kdcache, tmp_path):
    home, student = few_home, [*FEW, "--epochs", "2"]
    together = kdcache("distill", "--tau", "1,20", "--control", "none,bottom:3", *student, "--home", home)
    assert together.status == 0, together.err
    alone = tmp_path / "alone"
    here = ["--archive", *with_images(few_archive), "--home", alone]
    result = kdcache("distill", "--tau", "20", "--control", "bottom:3", *student, *here)
    assert result.status == 0, result.err
    pattern = "runs/*/test_vit--kd--tau20--bottom-3--seed0--*"
    for name in ("last.safetensors", "best.safetensors"):
        assert (only(home, pattern) / name).read_bytes() == (only(alone, pattern) / name).read_bytes()
    runs = list(home.glob("runs/*/*/last.safetensors"))
    assert len({run.read_bytes() for run in runs}) == len(runs) == 4  # every combination became something else


@pytest.mark.exhaustive
def test_run_folders_say_everything(distilled):
    folder = only(distilled, "runs/*/test_vit--*")
    archive = open_archive(only(distilled, "archives/*"))
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert (args["tau"], args["control_spec"], args["seed"], args["student"]) == (4.0, "none", 0, "test_vit")
    assert args["archive_digest"] == archive.digest
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert summary["final_top1"] == rows[-1]["test_top1"]
    assert len((folder / "summary.csv").read_text().splitlines()) == 3
    assert not (folder / "checkpoint.pt").exists()
    moments = json.loads((folder / "logit_moments.json").read_text())
    assert sum(map(sum, moments["counts"])) == archive.num_samples // 128 * 128  # in whole batches
    assert moments["mean"] == pytest.approx(rows[-1]["logit_mean"], abs=1e-6)
    assert moments["std"] == pytest.approx(rows[-1]["logit_std"], abs=1e-6)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_kill_9_then_the_same_command_ends_with_the_same_weights(home, archive, kdcache, tmp_path):
    arguments = ["--tau", "4", "--student", "test_resnet", "--epochs", "2", "--archive", archive, "--checkpoint-interval", "0"]
    whole = tmp_path / "whole"
    assert kdcache("distill", *arguments, "--home", whole).status == 0
    process = Started("distill", *arguments, "--home", home)
    until(lambda: list(home.glob("runs/*/*/checkpoint.pt")), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    pattern = "runs/*/test_resnet--*"
    assert not (only(home, pattern) / "summary.json").exists(), "killed too late to test anything"
    assert kdcache("distill", *arguments, "--home", home).status == 0
    same_run(only(home, pattern), only(whole, pattern))


def same_run(one, other):
    for name in ("last.safetensors", "best.safetensors", "logit_moments.json", TEST_OUTPUTS):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (one, other)]
    for row in logs[0] + logs[1]:
        without_costs(row)
    assert logs[0] == logs[1]


def test_students_and_their_teacher_keep_what_they_say_of_the_same_test_images(distilled):
    run, teacher = only(distilled, "runs/*/test_vit--*"), only(distilled, "teachers/*/teacher.json").parent
    student = KeptOutputs.read(run / TEST_OUTPUTS)
    beside = run.parent / TEACHER_OUTPUTS
    assert beside.read_bytes() == (teacher / TEST_OUTPUTS).read_bytes()
    both = KeptOutputs.read(beside).of_both(student)
    assert both is not None
    assert len(both[0]) == len(student) == 359
    assert KeptOutputs.read(beside).weights == json.loads((teacher / "teacher.json").read_text())["weights_sha256"]
    # Of digits all test images are kept: their top-1 is the one that was recorded.
    for kept, top1 in (
        (student, json.loads((run / "summary.json").read_text())["final_top1"]),
        (both[0], json.loads((teacher / "teacher.json").read_text())["top1_clean"]),
    ):
        assert 100 * (kept.logits.argmax(axis=1) == kept.label).mean() == pytest.approx(top1, abs=0.3)
        assert kept.features is not None


@pytest.mark.parametrize("content", ["[]", "{", "\udcff", "resumed: 7"])
def test_a_damaged_configuration_of_a_run_is_not_written_over(distilled, kdcache, content):
    args = only(distilled, "runs/*/test_vit--*/args.yaml")
    args.with_name("summary.json").unlink()
    args.write_bytes(content.encode(errors="surrogateescape"))
    result = kdcache("distill", "--tau", 4, *STUDENT, "--home", distilled)
    assert result.status == 4
    assert str(args) in result.err
    assert args.read_bytes() == content.encode(errors="surrogateescape")


@pytest.mark.exhaustive
def test_an_archive_may_be_named_by_a_dot(home, archive, kdcache, monkeypatch):
    monkeypatch.chdir(archive)
    assert kdcache("distill", "--archive", ".", "--tau", 4, *STUDENT, "--home", home).status == 0
    run = only(home, f"runs/{archive.name}/test_vit--*")
    args = yaml.safe_load((run / "args.yaml").read_text())
    assert (args["archive"], args["archive_name"]) == (str(archive), archive.name)


def test_what_is_fitted_to_an_archive_is_no_option(home, kdcache):
    result = kdcache("distill", "--control", "ls-global:deficit=5", "--dry-run", "--home", home)
    assert result.status == 2
    assert "unknown option of control ls-global 'deficit'" in result.err
    assert "deficit" not in kdcache("methods").out


def test_a_place_that_cannot_hold_runs_is_noticed_at_once(home, archive, kdcache, tmp_path):
    (tmp_path / "runs").write_text("a file")
    result = kdcache("distill", "--tau", 4, *STUDENT, "--archive", archive, "--home", tmp_path)
    assert result.status == 2
    assert f"{tmp_path / 'runs'} is a file" in result.err
    assert not (tmp_path / "data").exists()


def test_trained_students_are_not_trained_again(distilled, kdcache):
    weights = only(distilled, "runs/*/test_vit--*/last.safetensors")
    written = weights.stat().st_mtime_ns
    result = kdcache("distill", "--tau", "4,7", *STUDENT, "--home", distilled)
    assert result.status == 0
    assert "1 of 2 students are trained already" in result.err
    assert weights.stat().st_mtime_ns == written


def test_one_changed_pixel_stops_training_and_names_the_view(home, archive, kdcache):
    pixels = only(home, "data/digits-train-32px-*/pixels.npy")
    image = np.load(pixels, mmap_mode="r+")
    image[700, 1, 16, 16] ^= 1
    image.flush()
    result = kdcache("distill", "--tau", "4", *STUDENT, "--home", home)
    assert result.status == 5
    assert "is not what the teacher saw" in result.err
    assert "digits/" in result.err
    assert [line.split(":")[0] for line in result.err.splitlines()[-3:]] == ["error", "why", "fix"]
    replayed = kdcache("verify", archive, "--replay", 1438 * 3, "--home", home)
    assert replayed.status == 5
    assert "full: ok" in replayed.out  # the archive is sound, and nobody should be told to delete it
    assert "replay 4314: DIFFERS" in replayed.out
    assert "canvas: its pixels were changed after it was built" in replayed.err
    assert "fix: set the canvas aside" in replayed.err


def test_a_flipped_byte_in_a_shard_stops_training(home, archive, kdcache):
    shard = archive / "logits/c/1/0/0"
    damaged = bytearray(shard.read_bytes())
    damaged[1000] ^= 16
    shard.write_bytes(damaged)
    for command in (["distill", "--tau", "4", "--control", "ls-global", *STUDENT, "--home", home], ["verify", archive]):
        result = kdcache(*command)
        assert result.status == 4
        assert "logits/c/1/0/0" in result.err


def test_a_diverging_student_is_stopped_and_reported(home, kdcache):
    result = kdcache("distill", "--tau", "1", "--opt", "sgd", "--lr", "1e30", "--clip-grad", "0", *STUDENT, "--home", home)
    assert result.status == 0
    assert "diverged" in result.out
    summary = json.loads(only(home, "runs/*/*/summary.json").read_text())
    assert summary["status"] == "diverged"
    assert "loss" in summary["reason"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--method", "kdd"], 2, "close to it: kd"),
        (["--control", "ls-gobal"], 2, "ls-global"),
        (["--control", "bottom:9"], 2, "10 classes"),
        (["--control", "bottom"], 2, "bottom without k"),
        (["--control", "bottom:x"], 2, "'x'"),
        (["--student", "test_resnt"], 3, "test_resnet"),
        (["--tau", "0"], 2, "--tau '0'"),
        (["--tau", "warm"], 2, "warm"),
        (["--opt", "adamx"], 2, "adamx"),
        (["--dataset", "digts"], 3, "digits"),
        (["--batch-size", "2000"], 2, "1438 samples"),
        (["--archive", "nowhere"], 3, "nowhere"),
        (["--device", "cuda:99"], 2, "cuda:99"),
        (["--canvas", "3"], 2, "--canvas"),
    ],
)
def test_bad_input_is_three_lines_and_leaves_no_run(home, kdcache, arguments, status, words):
    result = kdcache("distill", *STUDENT, "--home", home, *arguments)
    assert result.status == status
    lines = result.err.splitlines()[-3:]
    assert [line.split(":")[0] for line in lines] == ["error", "why", "fix"]
    assert words in " ".join(lines)
    assert "Traceback" not in result.err
    assert not list(home.glob("runs/*/*/args.yaml"))


def test_no_archive_at_all_tells_how_to_make_one(tmp_path, kdcache):
    result = kdcache("distill", "--tau", "20", "--home", tmp_path)
    assert result.status == 3
    assert "fix: make one first, for example: kdcache dump-teacher" in result.err


def test_several_archives_take_the_newest_with_a_note_and_strict_refuses(home, archive, kdcache):
    import shutil

    shutil.copytree(archive, archive.with_name("older"))
    os.utime(archive.with_name("older") / "kdcache.json", (1, 1))
    result = kdcache("distill", "--dry-run", "--home", home)
    assert result.status == 0
    assert f"{archive} (the newest of 2" in result.err
    assert kdcache("distill", "--strict", "--home", home).status == 2


def test_a_newer_format_is_refused_with_the_version_that_reads_it(home, archive, kdcache):
    file = archive / "kdcache.json"
    manifest = json.loads(file.read_text()) | {"format_version": 2, "readable_by": "3.1.4"}
    file.write_text(json.dumps(manifest))
    result = kdcache("distill", "--tau", "4", *STUDENT, "--home", home)
    assert result.status == 5
    assert "kdcache>=3.1.4" in result.err


def test_logits_of_another_view_are_refused_with_their_right_place(few_home, few_archive, kdcache):
    """Every checksum inside the two files is right, and so are the views that are rendered."""
    files = [few_archive / f"logits/c/{view}/0/0" for view in (0, 1)]
    right = [file.read_bytes() for file in files]
    for file, data in zip(files, reversed(right), strict=True):
        file.write_bytes(data)
    distill = ("distill", "--tau", "4", *FEW, "--epochs", "2", "--home", few_home)
    result = kdcache(*distill)
    assert result.status == IntegrityError.exit_code, result.err
    named = [place for place in ("logits/c/0/0/0", "logits/c/1/0/0") if place in result.err]
    assert len(named) == 2, result.err
    assert "does not hold the logits of view" in result.err
    checked = kdcache("verify", "--quick", few_archive)  # as the error advises
    assert checked.status == IntegrityError.exit_code
    assert "2 damaged" in checked.err
    for file, data in zip(files, right, strict=True):
        file.write_bytes(data)
    assert kdcache(*distill).status == 0


def test_options_come_from_flag_then_environment_then_config(home, kdcache, tmp_path, monkeypatch):
    config = tmp_path / "study.yaml"
    config.write_text("tau: [1, 4]\nseed: 0-1\nstudent: test_resnet\n")
    titles = kdcache("distill", "--config", config, "--dry-run", "--home", home).out
    assert all(f"test_resnet kd tau {tau} none seed {seed}" in titles for tau in (1, 4) for seed in (0, 1))
    monkeypatch.setenv("KDCACHE_DISTILL_TAU", "7")
    titles = kdcache("distill", "--config", config, "--dry-run", "--home", home).out
    assert "tau 7 none seed 1" in titles
    assert "tau 4" not in titles
    titles = kdcache("distill", "--config", config, "--dry-run", "--tau", "10", "--home", home).out
    assert "tau 10 none seed 0" in titles
    assert "tau 7" not in titles
    config.write_text("taus: [1, 4]\n")
    refused = kdcache("distill", "--config", config, "--home", home)
    assert refused.status == 2
    assert "tau" in refused.err


def test_a_run_that_another_process_trains_is_left_alone(distilled, kdcache):
    import filelock

    folder = only(distilled, "runs/*/test_vit--*")
    (folder / "summary.json").unlink()
    with filelock.FileLock(folder / ".lock"):
        result = kdcache("distill", "--tau", "4", *STUDENT, "--home", distilled)
    assert result.status == 75
    assert "is being trained by another process" in result.err
