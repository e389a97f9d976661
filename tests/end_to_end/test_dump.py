"""dump-teacher: the archive depends on the recipe alone, and survives whatever stops it."""

import json
import os
import resource
import signal
import time

import numpy as np
import pytest

from kdcache.archive import open_archive
from tests.end_to_end.conftest import DUMP, data_files, start


def test_workers_and_start_view_change_no_byte(home, archive, kdcache, tmp_path):
    other = tmp_path / "other"
    result = kdcache(*DUMP, "--views", 3, "--workers", 2, "--start-view", 1, "--home", home, "--output", other)
    assert result.status == 0
    assert result.out.splitlines()[-1] == str(other)
    assert data_files(other) == data_files(archive)
    assert open_archive(other).manifest.digest == open_archive(archive).manifest.digest


def test_batch_size_keeps_the_views_and_moves_logits_by_two_steps_at_most(home, kdcache, tmp_path):
    archives = []
    for size in (32, 100):
        assert kdcache(*DUMP, "--views", 2, "--batch-size", size, "--home", home, "--output", tmp_path / str(size)).status == 0
        archives.append(open_archive(tmp_path / str(size)))
    first, second = (a.read(1, 0, a.num_samples) for a in archives)
    np.testing.assert_array_equal(first.digest, second.digest)
    np.testing.assert_array_equal(first.sample, second.sample)
    assert np.abs(first.logits - second.logits).max() <= 2 * 2.0**-9


def test_kill_9_then_the_same_command_gives_the_same_bytes(home, kdcache, tmp_path):
    arguments = [*DUMP, "--views", 30, "--home", home]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(*arguments, "--output", killed)
    deadline = time.monotonic() + 120
    while not len(list((killed / ".dump/shards").glob("*.json"))) >= 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()

    unfinished = kdcache("info", killed)
    assert unfinished.status == 6
    assert "dump-teacher" in unfinished.err.splitlines()[-1]  # the fix is the command to repeat
    finished = len(list((killed / ".dump/shards").glob("*.json")))
    assert 3 <= finished < 30, "killed too late to test anything"

    assert kdcache(*arguments, "--output", killed).status == 0
    assert kdcache(*arguments, "--output", whole).status == 0
    assert data_files(killed) == data_files(whole)
    manifests = [json.loads((folder / "kdcache.json").read_text()) for folder in (killed, whole)]
    for manifest in manifests:
        manifest["provenance"].pop("created")
        manifest["provenance"].pop("command")
    # The card names nothing but the contents, so even its checksum in the manifest is the same.
    assert manifests[0] == manifests[1]


def test_a_full_disk_is_exit_75_and_the_rerun_finishes(home, archive, kdcache, tmp_path):
    target = tmp_path / "full"

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # the logits of one shard need 28 kB

    process = start(*DUMP, "--views", 3, "--home", home, "--output", target, preexec_fn=small_files_only)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75
    assert [line.split(":")[0] for line in err.splitlines()[-3:]] == ["error", "why", "fix"]
    assert kdcache(*DUMP, "--views", 3, "--home", home, "--output", target).status == 0
    assert data_files(target) == data_files(archive)


def test_two_dumps_into_one_folder_do_no_harm(home, tmp_path, kdcache):
    target = tmp_path / "shared"
    arguments = [*DUMP, "--views", 20, "--home", home, "--output", target]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # else they spin on each other for minutes on two cores
    processes = [start(*arguments, env=one_thread) for _ in range(2)]
    outcomes = [process.communicate(timeout=180) for process in processes]
    # Whoever comes last finishes the archive; the other may find shards still in the making.
    assert sorted({process.returncode for process in processes}) in ([0], [0, 6]), outcomes
    assert kdcache("verify", target).status == 0


def test_a_second_run_has_nothing_to_do_and_more_views_append(home, archive, kdcache):
    before = data_files(archive)
    again = kdcache(*DUMP, "--views", 3, "--home", home)
    assert (again.status, again.out.strip()) == (0, str(archive))
    assert "nothing to do" in again.err
    assert data_files(archive) == before

    assert kdcache(*DUMP, "--views", 5, "--home", home).status == 0
    grown = open_archive(archive)
    assert grown.num_views == 5
    assert grown.verify().ok
    after = data_files(archive)
    shards = {name for name in before if "/c/" in name}
    assert all(after[name] == before[name] for name in shards)


def test_verify_replays_views_and_recomputes_logits(home, archive, kdcache):
    result = kdcache("verify", archive, "--replay", 200, "--home", home)
    assert result.status == 0
    assert "replay 200: ok, 200 checked" in result.out
    assert "logit vectors recomputed" in result.out


def test_verify_notices_logits_of_another_teacher(home, archive, kdcache):
    record = next((home / "teachers").glob("*/teacher.json"))
    weights = record.with_name("model.safetensors")
    from safetensors.torch import load_file, save_file

    changed = {key: value * 1.05 if "head" in key else value for key, value in load_file(weights).items()}
    save_file(changed, weights)
    result = kdcache("verify", archive, "--replay", 10, "--home", home)
    assert result.status == 5
    assert "sha256" in result.err


def test_dry_run_writes_no_archive(trained, kdcache, tmp_path):
    result = kdcache(*DUMP, "--views", 50, "--dry-run", "--home", trained, "--output", tmp_path / "none")
    assert result.status == 0
    assert "1.4 MB of logits" in result.err
    assert not (tmp_path / "none").exists()


def test_no_finetune_makes_a_missing_teacher_an_error(trained, kdcache):
    result = kdcache("dump-teacher", "--teacher", "test_resnet", "--dataset", "digits", "--no-finetune", "--home", trained)
    assert result.status == 3
    assert "fix: kdcache train-teacher --teacher test_resnet --dataset digits" in result.err


@pytest.mark.parametrize("flags", [["--codec", "f32"], ["--policy", "crd"], ["--view-seed", "7"]])
def test_another_recipe_is_another_archive(home, kdcache, flags):
    assert kdcache(*DUMP, "--views", 1, *flags, "--home", home).status == 0
    assert len(list((home / "archives").iterdir())) == 2
