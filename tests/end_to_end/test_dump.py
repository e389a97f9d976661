"""dump-teacher: the archive depends on the recipe alone, and survives whatever stops it."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kdcache import workspace as workspace_module
from kdcache.archive import ArchiveWriter, Licences, open_archive
from kdcache.archive.format.manifest import SEAL
from kdcache.datasets import canvas as canvas_module
from kdcache.models.creation import Normalisation
from kdcache.system import seals
from kdcache.system.progress import Silent
from kdcache.teachers import dump, planning, shards
from kdcache.teachers.config import DumpConfig
from kdcache.teachers.forward import Forward
from kdcache.teachers.shards import write_shards
from kdcache.training.devices import resolve_device
from kdcache.views.policy import ViewPolicy
from kdcache.workspace import Workspace
from tests.end_to_end.conftest import DUMP, data_files, start, until
from tests.end_to_end.forks import Started


@pytest.mark.exhaustive
def test_workers_and_start_view_change_no_byte(home, archive, kdcache, tmp_path):
    other = tmp_path / "other"
    result = kdcache(*DUMP, "--views", 3, "--workers", 2, "--start-view", 1, "--home", home, "--output", other)
    assert result.status == 0
    assert result.out.splitlines()[-1] == str(other)
    assert data_files(other) == data_files(archive)
    assert open_archive(other).manifest.digest == open_archive(archive).manifest.digest


@pytest.mark.exhaustive
def test_both_renderers_give_the_same_archive(home, kdcache, tmp_path):
    policy = "cifar:jitter.hue=0.1,jitter.brightness=0.4,erase.probability=0.3,filter=bicubic,crop.kind=inception"
    contents = []
    for renderer in ("reference", "device"):
        options = ["--views", 2, "--policy", policy, "--renderer", renderer, "--output", tmp_path / renderer]
        assert kdcache(*DUMP, *options, "--home", home).status == 0
        contents.append((open_archive(tmp_path / renderer).manifest.digest, data_files(tmp_path / renderer)))
    assert contents[0] == contents[1]


@pytest.mark.exhaustive
def test_batch_size_keeps_the_views_and_moves_logits_by_two_steps_at_most(home, kdcache, tmp_path):
    archives = []
    for size in (32, 100):
        assert kdcache(*DUMP, "--views", 2, "--batch-size", size, "--home", home, "--output", tmp_path / str(size)).status == 0
        archives.append(open_archive(tmp_path / str(size)))
    first, second = (a.read(1, 0, a.num_samples) for a in archives)
    np.testing.assert_array_equal(first.digest, second.digest)
    np.testing.assert_array_equal(first.sample, second.sample)
    assert np.abs(first.logits - second.logits).max() <= 2 * 2.0**-9


@pytest.mark.exhaustive
@pytest.mark.slow
def test_kill_9_then_the_same_command_gives_the_same_bytes(home, kdcache, tmp_path):
    arguments = [*DUMP, "--views", 12, "--home", home]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = Started(*arguments, "--output", killed)
    until(lambda: len(list((killed / ".dump/shards").glob("*.json"))) >= 3, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()

    unfinished = kdcache("info", killed)
    assert unfinished.status == 6
    assert "dump-teacher" in unfinished.err.splitlines()[-1]  # the fix is the command to repeat
    finished = len(list((killed / ".dump/shards").glob("*.json")))
    assert 3 <= finished < 12, "killed too late to test anything"

    assert kdcache(*arguments, "--output", killed).status == 0
    assert kdcache(*arguments, "--output", whole).status == 0
    assert data_files(killed) == data_files(whole)
    manifests = [json.loads((folder / "kdcache.json").read_text()) for folder in (killed, whole)]
    for manifest in manifests:
        for who in ("command", "created", "cost"):
            manifest["provenance"].pop(who)
        assert manifest.pop(SEAL)
    # The card names nothing but the contents, so even its checksum in the manifest is the same.
    assert manifests[0] == manifests[1]


@pytest.mark.exhaustive  # tests/test_archive.py fills the disk of a writer
def test_a_full_disk_is_exit_75_and_the_rerun_finishes(home, archive, kdcache, tmp_path):
    target = tmp_path / "full"

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # the logits of one shard need 28 kB

    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # else it leaves 20,000 bytes of compiled modules behind
    process = start(*DUMP, "--views", 3, "--home", home, "--output", target, preexec_fn=small_files_only, env=env)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75
    assert [line.split(":")[0] for line in err.splitlines()[-3:]] == ["error", "why", "fix"]
    assert kdcache(*DUMP, "--views", 3, "--home", home, "--output", target).status == 0
    assert data_files(target) == data_files(archive)


@pytest.mark.exhaustive
def test_two_dumps_into_one_folder_do_no_harm(home, tmp_path, kdcache):
    target = tmp_path / "shared"
    arguments = [*DUMP, "--views", 8, "--home", home, "--output", target]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # else they spin on each other for minutes on two cores
    processes = [Started(*arguments, env=one_thread) for _ in range(2)]
    outcomes = [process.communicate(timeout=180) for process in processes]
    # Whoever comes last finishes the archive; the other may leave while shards are still in the making.
    assert [process.returncode for process in processes] == [0, 0], outcomes
    assert [out.splitlines()[-1] for out, _ in outcomes] == [str(target)] * 2
    assert open_archive(target).manifest.provenance["cost"]["passes"] == 8 * 1438, "no shard is counted twice or not at all"
    assert kdcache("verify", target).status == 0


def test_a_dump_says_what_it_and_its_teacher_took(home, archive):
    provenance = open_archive(archive).manifest.provenance
    teacher = json.loads(next(home.glob("teachers/*/teacher.json")).read_text())
    log = [json.loads(line) for line in next(home.glob("teachers/*/metrics.jsonl")).open()]
    assert provenance["cost"]["passes"] == 3 * 1438
    assert provenance["cost"]["device_seconds"] > 0
    assert provenance["teacher_cost"] == teacher["cost"]
    assert teacher["cost"]["device_seconds"] == pytest.approx(sum(row["device_seconds"] for row in log))
    assert all(row["device_seconds"] > row["seconds"] for row in log), "rendering and tests are included"


def contents(folder):
    """All files; of the manifest, what does not say who made the archive when."""
    manifest = json.loads((folder / "kdcache.json").read_text())
    for who in ("command", "created", "cost"):
        manifest["provenance"].pop(who)
    assert manifest.pop(SEAL)
    return {**data_files(folder), "kdcache.json": manifest, "README.md": (folder / "README.md").read_bytes()}


def test_shares_of_a_dump_add_up_to_the_same_archive(home, archive, kdcache, tmp_path, monkeypatch):
    share = [*DUMP, "--views", 3, "--home", home, "--output", tmp_path / "a", "--shard"]
    first = kdcache(*share, "1/2")
    assert (first.status, first.out.strip()) == (0, str(tmp_path / "a"))
    assert "2 shards are left to other processes" in first.err
    assert sorted(path.stem for path in (tmp_path / "a/.dump/shards").iterdir()) == ["1-0"]
    again = kdcache(*share, "1/2")
    assert again.status == 0
    unfinished = kdcache("info", tmp_path / "a")
    assert unfinished.status == 6
    assert "dump-teacher" in unfinished.err
    assert "--shard" not in unfinished.err  # which would not finish it
    monkeypatch.setenv("KDCACHE_DUMP_TEACHER_SHARD", "0/2")
    assert kdcache(*share[:-1]).status == 0
    assert contents(tmp_path / "a") == contents(archive)
    late = kdcache("finalize", tmp_path / "a")  # as the last step of a job whose processes have seen to it themselves
    assert (late.status, late.out.strip()) == (0, str(tmp_path / "a"))
    assert "nothing to do" in late.err
    assert kdcache("finalize", tmp_path).status == 3


@pytest.mark.parametrize("share", ["2/2", "-1/2", "0/0", "1", "a/b", "1/2/3", "", "0/20000"])
def test_a_share_that_is_none_is_a_usage_error(kdcache, share, tmp_path):
    result = kdcache(*DUMP, "--shard", share, "--home", tmp_path)
    assert result.status == 2
    assert f"--shard {share!r}" in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.exhaustive  # the next test has its processes one after the other
def test_processes_of_a_torchrun_share_a_dump_and_the_first_speaks_for_all(home, archive, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "kdcache"]
    arguments = [*DUMP, "--views", 3, "--home", home, "--output", tmp_path / "a"]
    done = subprocess.run([*torchrun, *map(str, arguments)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "a")]
    assert done.stderr.count("teacher: test_vit = test_vit from") == 1
    assert contents(tmp_path / "a") == contents(archive)


def test_processes_of_a_torchrun_divide_a_share_and_only_the_first_is_heard(home, archive, kdcache, tmp_path, monkeypatch):
    arguments = [*DUMP, "--views", 3, "--shard", "0/1", "--home", home, "--output", tmp_path / "a"]
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    result = kdcache(*arguments)
    assert (result.status, result.out, result.err) == (0, "", "")
    assert [path.stem for path in (tmp_path / "a/.dump/shards").iterdir()] == ["1-0"]
    monkeypatch.setenv("RANK", "2")
    wrong = kdcache(*arguments)
    assert wrong.status == 2
    assert "RANK=2 WORLD_SIZE=2 LOCAL_RANK=1" in wrong.err
    monkeypatch.setenv("RANK", "0")
    assert kdcache(*arguments).out.strip() == str(tmp_path / "a")
    assert contents(tmp_path / "a") == contents(archive)


def test_each_process_of_a_torchrun_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda:1")
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("cuda:0") == torch.device("cuda:0")


def test_a_missing_teacher_is_trained_by_one_process_while_others_wait(trained, tmp_path, monkeypatch):
    calls = []

    def train(config, workspace, progress, *, source, canvas, team):
        calls.append(config.subject.teacher)
        time.sleep(0.3)
        shutil.copytree(trained / "teachers", workspace.teachers, dirs_exist_ok=True)
        return [dump.find_teacher("test_vit", canvas, 32, workspace, progress)]

    monkeypatch.setattr(dump, "train_teachers", train)
    place = Workspace(tmp_path, trained / "data")
    plan = dump.plan_dump(DumpConfig(teacher="test_vit", dataset="digits"), place)
    with ThreadPoolExecutor(3) as pool:
        teachers = list(pool.map(lambda _: dump.ensured_teacher(plan, place, Silent()), range(3)))
    assert calls == ["test_vit"]
    assert len({teacher.folder for teacher in teachers}) == 1
    assert not list(tmp_path.glob("teachers/.*"))


def test_a_dump_that_will_not_fit_is_told_before_and_fills_the_disk_all_the_same(home, archive, kdcache, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    told = kdcache(*DUMP, "--views", 3, "--dry-run", "--home", home, "--output", tmp_path / "a")
    assert told.status == 0
    assert "0.1 MB of logits, 0.2 MB in all, 3 shards" in told.err
    assert f"warning: {tmp_path / 'a'} needs 241.6 kB more, and its disk has 100.0 kB" in told.err
    assert not (tmp_path / "a").exists()
    assert "warning" not in kdcache(*DUMP, "--views", 3, "--dry-run", "--home", home, "--output", archive).err  # it is there
    made = kdcache(*DUMP, "--views", 3, "--home", home, "--output", tmp_path / "a")
    assert made.status == 0
    assert "warning" in made.err


def test_the_rows_of_a_shard_are_held_once():
    rows, classes, batch = 4096, 500, 128
    logits = np.zeros((batch, classes), np.float32)
    tracemalloc.start()
    try:
        collected = shards._ShardRows()
        for start in range(0, rows, batch):
            sample = np.arange(start, start + batch)
            collected.add((logits.copy(), sample, np.zeros(batch, np.uint32), np.zeros((batch, 16), np.uint8)), rows)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(collected) == rows
    assert peak < 1.1 * 4 * rows * classes


def test_a_shard_of_another_process_is_left_to_it(home, archive, kdcache):
    import filelock

    (archive / ".dump").mkdir()
    with filelock.FileLock(archive / ".dump/4-0.lock"):
        result = kdcache(*DUMP, "--views", 5, "--home", home)
        assert (result.status, result.out.strip()) == (0, str(archive))
        assert "1 shards are being written by other processes" in result.err
        assert open_archive(archive).num_views == 3
        assert kdcache("finalize", archive).status == 6
    assert kdcache(*DUMP, "--views", 5, "--home", home).status == 0
    assert open_archive(archive).num_views == 5


def test_a_shard_that_another_process_gave_up_is_written_after_all(home, archive, kdcache, monkeypatch):
    claim, refused = ArchiveWriter.claim, []

    @contextlib.contextmanager
    def claimed_by_another_at_first(self, view, block, **options):
        if (view, block) not in refused:
            refused.append((view, block))
            yield view != 3
        else:
            with claim(self, view, block, **options) as mine:
                yield mine

    monkeypatch.setattr(ArchiveWriter, "claim", claimed_by_another_at_first)
    assert kdcache(*DUMP, "--views", 5, "--home", home).status == 0
    assert refused == [(3, 0), (4, 0)]
    assert open_archive(archive).num_views == 5


class Constant(Forward):
    """A teacher of three classes that knows nothing."""

    def __init__(self):
        super().__init__(torch.nn.Identity(), Normalisation((0.5,) * 3, (0.5,) * 3), torch.device("cpu"), "fp32")

    def launch(self, views):
        return torch.zeros(len(views), 3)


def test_shards_are_claimed_when_their_turn_comes(tmp_path, canvas):
    policy = ViewPolicy.load("pets", size=16)
    writer = ArchiveWriter(
        tmp_path / "a", num_views=4, num_samples=len(canvas), class_names=list("abc"), shard_rows=8, policy=policy
    )
    claims, claim = [], writer.claim
    writer.claim = lambda view, block, **options: claims.append((view, block)) or claim(view, block, **options)
    seen = []

    class Counting(Constant):
        def launch(self, views):
            seen.append(len(claims))
            return super().launch(views)

    write_shards(writer, Counting(), canvas, batch_size=4, start_view=2)
    assert seen == [shard for shard in range(1, 13) for _ in range(2)]
    assert claims == [(view, block) for view in (2, 3, 0, 1) for block in range(3)]
    assert writer.finalize().verify().ok


@pytest.mark.exhaustive
def test_an_unfinished_dump_keeps_the_views_it_was_begun_with_and_says_so(home, kdcache, tmp_path):
    process = Started(*DUMP, "--views", 12, "--home", home, "--output", tmp_path / "a")
    while not list((tmp_path / "a/.dump/shards").glob("*.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("interrupted")
    result = kdcache(*DUMP, "--views", 2, "--home", home, "--output", tmp_path / "a")
    assert result.status == 0
    assert "was begun with 12 views" in result.err
    assert open_archive(tmp_path / "a").num_views == 12


@pytest.mark.exhaustive
def test_the_teachers_noise_is_measured_once_and_never_where_there_is_none(home, archive, kdcache, tmp_path, monkeypatch):
    noise = open_archive(archive).manifest.teacher.noise
    assert (noise.views, noise.reference) == (64, "float64")
    assert 0 < noise.max_logit_difference < 1e-4
    half = [*DUMP, "--precision", "bf16", "--home", home, "--output", tmp_path / "a"]
    assert kdcache(*half, "--views", 1).status == 0
    measured = open_archive(tmp_path / "a").manifest.teacher.noise
    assert 0 < measured.kl_max < 0.1
    monkeypatch.setattr(dump, "measured_noise", lambda *_: pytest.fail("measured again"))
    assert kdcache(*half, "--views", 2).status == 0
    assert open_archive(tmp_path / "a").manifest.teacher.noise == measured


@pytest.mark.parametrize("content", ["{}", "[]", "not JSON", '{"alias": "test_vit"}', ""])
def test_a_damaged_teacher_is_left_out_with_a_note(home, archive, kdcache, content):
    broken = home / "teachers/broken"
    broken.mkdir()
    (broken / "teacher.json").write_text(content)
    for command in ([*DUMP, "--views", 3], ["verify", archive, "--replay", 3]):
        result = kdcache(*command, "--home", home)
        assert result.status == 0, result.err
        assert f"teacher {broken} is left out" in result.err
    named = kdcache(*DUMP, "--teacher-folder", broken, "--home", home)
    assert named.status == 4
    assert str(broken) in named.err
    assert "rm -r" not in named.err


def test_a_teacher_whose_own_record_is_damaged_is_not_trained_over(home, kdcache):
    record = next((home / "teachers").glob("*/teacher.json"))
    record.write_text("{}")
    result = kdcache("train-teacher", "--teacher", "test_vit", "--dataset", "digits", "--epochs", 2, "--home", home)
    assert result.status == 4
    assert f"mv {record.parent} {record.parent}.aside" in result.err
    assert record.with_name("model.safetensors").is_file()


def test_a_place_that_cannot_hold_an_archive_is_noticed_before_training(trained, kdcache, tmp_path):
    (tmp_path / "archives").write_text("a file")
    result = kdcache(*DUMP, "--home", tmp_path, "--data-dir", trained / "data")
    assert result.status == 2
    assert f"{tmp_path / 'archives'} is a file" in result.err
    assert not (tmp_path / "teachers").exists()


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
    assert "is not the file that its record describes" in result.err


def test_dry_run_writes_no_archive(trained, kdcache, tmp_path):
    result = kdcache(*DUMP, "--views", 50, "--dry-run", "--home", trained, "--output", tmp_path / "none")
    assert result.status == 0
    assert "1.4 MB of logits" in result.err
    assert not (tmp_path / "none").exists()


def test_dry_run_with_a_canvas_names_the_archive_that_the_dump_then_writes(trained, kdcache):
    told = kdcache(*DUMP, "--views", 1, "--dry-run", "--home", trained).out.splitlines()[-1]
    made = kdcache(*DUMP, "--views", 1, "--home", trained).out.splitlines()[-1]
    assert told == made


def test_dry_run_builds_no_canvas(kdcache, tmp_path):
    result = kdcache(*DUMP, "--views", 50, "--dry-run", "--home", tmp_path)
    assert result.status == 0
    assert "50 views of 1438 samples, 10 classes: 1.4 MB of logits" in result.err
    assert "canvas: none yet" in result.err
    assert result.out.strip() == str(tmp_path / "archives/digits--test_vit--????????")
    assert not list(tmp_path.iterdir())


def test_a_licence_that_is_stated_when_the_archive_is_finished_is_told_to_be_too_late(few_home, few_archive, kdcache, tmp_path):
    spec = json.loads((few_archive / "kdcache.json").read_text())["provenance"]["dataset"]
    common = ["dump-teacher", "--teacher", "test_vit", "--canvas", 32, "--policy", "digits", "--views", 3, "--home", few_home]
    assert "nothing to do" in (unstated := kdcache(*common, "--dataset", spec)).err
    assert "--license" not in unstated.err
    stated = f"{spec.replace('arrays:', 'arrays:root=')},licence=Our own"
    for where in ([], ["--output", few_archive]):
        said = kdcache(*common, "--dataset", stated, *where)
        assert (said.status, said.out.strip()) == (0, str(few_archive))
        assert f"kdcache push {few_archive} DESTINATION --license 'data=Our own'" in said.err
    assert kdcache("push", few_archive, tmp_path / "out", "--license", "data=Our own,weights=MIT").status == 0
    assert open_archive(tmp_path / "out").manifest.known_licences.data == "Our own"


def test_no_finetune_makes_a_missing_teacher_an_error(trained, kdcache):
    result = kdcache("dump-teacher", "--teacher", "test_resnet", "--dataset", "digits", "--no-finetune", "--home", trained)
    assert result.status == 3
    assert "fix: kdcache train-teacher --teacher test_resnet --dataset digits" in result.err


@pytest.mark.parametrize("flags", [["--codec", "f32"], ["--policy", "crd"], ["--view-seed", "7"]])
def test_another_recipe_is_another_archive(home, kdcache, flags):
    assert kdcache(*DUMP, "--views", 1, *flags, "--home", home).status == 0
    assert len(list((home / "archives").iterdir())) == 2


def test_an_archive_knows_the_licence_of_weights_that_were_finetuned_from_timm(home, archive, kdcache, tmp_path):
    """A teacher that was trained from scratch is its owner's, whose terms nobody else can know."""
    assert open_archive(archive).manifest.known_licences == Licences(data="CC-BY-4.0")
    assert kdcache("push", archive, tmp_path / "out").status == 2
    [record] = home.glob("teachers/*/teacher.json")
    fields = json.loads(record.read_text())
    fields["training"]["start"] = "timm"
    del fields[seals.SEAL]  # as whoever changes a record on purpose is told
    record.write_text(json.dumps(fields))
    assert kdcache(*DUMP, "--views", 1, "--home", home, "--output", tmp_path / "finetuned").status == 0
    assert open_archive(tmp_path / "finetuned").manifest.known_licences == Licences(data="CC-BY-4.0", weights="apache-2.0")
    assert kdcache("push", tmp_path / "finetuned", tmp_path / "out").status == 0
    assert str(home) not in (tmp_path / "out" / "kdcache.json").read_text()


def test_a_first_dump_does_everything_once(tmp_path, monkeypatch):
    """The plan, each canvas, the dataset's name and the digest of the training images are made once and handed on."""
    counted = Counter()

    def counts(module, name):
        real = getattr(module, name)

        def counting(*arguments, **options):
            counted[name] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, counting)

    counts(dump, "plan_dump")
    counts(dump, "parse_dataset")
    counts(planning, "parse_dataset")
    counts(workspace_module, "load_canvas")
    counts(canvas_module, "_digest")
    config = DumpConfig(teacher="test_vit", dataset="digits", views=1, teacher_epochs=1, device="cpu")
    dump.dump_teacher(config, Workspace(tmp_path))
    # Each of the two canvases is hashed when it is built, and once more before it is used.
    assert counted == {"plan_dump": 1, "parse_dataset": 1, "load_canvas": 2, "_digest": 4}
