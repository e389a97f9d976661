"""How much memory training is said to take, and to find, against what a process really takes and what Linux says."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import kdcache.training.memory
from kdcache.training.config import TrainConfig
from kdcache.training.memory import available_memory, fitting, footprint

MODEL, CLASSES, SIZE, STUDENTS = "resnet18", 100, 64, 2
CONFIG = TrainConfig(epochs=2, batch_size=16, opt="adamw", model_ema_decay=0.9)

# Trains students in lockstep, and prints by how much the process's own memory grew: at most, and in the end.
TRAIN = """
import ctypes, gc, json, sys, threading, time
from pathlib import Path
import torch, torch.nn.functional as F
from kdcache.models.creation import create_model
from kdcache.training.config import StudentRuntime, TrainConfig
from kdcache.training.learner import Learner

def own_memory():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def train(folder, model, size, count):
    views = torch.randint(0, 256, (config.batch_size, 3, size, size), dtype=torch.uint8)
    labels = torch.arange(config.batch_size) % classes
    learners = [
        Learner(Path(folder) / f"{model}{i}", *create_model(model, classes, input_size=size), config,
                steps_per_epoch=1, seed=i, device=torch.device("cpu"), runtime=StudentRuntime(checkpoint_interval=1e9))
        for i in range(count)
    ]
    for epoch in range(3):  # the last one is not ended: everything that they keep is there
        for learner in learners:
            learner.step(views, lambda logits: F.cross_entropy(logits, labels), lambda logits: {})
        if epoch < 2:
            for learner in learners:
                learner.end_epoch({"test_top1": epoch, "test_loss": 1.0})
    return learners

folder, model, classes, size, count, config = sys.argv[1:]
classes, size, count, config = int(classes), int(size), int(count), TrainConfig(**json.loads(config), epochs=3)
train(folder, "test_resnet", 64, 1)  # what libraries take for themselves
gc.collect()
before, peak, over = own_memory(), [0], threading.Event()

def watch():
    while not over.wait(0.002):
        peak[0] = max(peak[0], own_memory())

watcher = threading.Thread(target=watch)
watcher.start()
learners = train(folder, model, size, count)
over.set()
watcher.join()
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
print(json.dumps([peak[0] - before, own_memory() - before]))
"""


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux tells a process's own memory")
def test_students_take_what_their_footprint_says(tmp_path, run_python) -> None:
    said = footprint(MODEL, CLASSES, SIZE, CONFIG)
    options = CONFIG.model_dump_json(include={"batch_size", "opt", "model_ema_decay"})
    peak, kept = json.loads(run_python(TRAIN, tmp_path, MODEL, CLASSES, SIZE, STUDENTS, options).stdout)
    assert 0.9 <= STUDENTS * said.kept / kept <= 1.6
    assert 0.9 <= (STUDENTS * said.kept + said.passing) / peak <= 1.6


def test_settings_that_cost_memory_show() -> None:
    def of(views: int = 1, **changes: object) -> kdcache.training.memory.Footprint:
        config = TrainConfig(**{"epochs": 1, "batch_size": 8, "opt": "sgd", "momentum": 0.9} | changes)
        return footprint("test_resnet", 10, 64, config, views=views)

    plain = of()
    assert plain.optimizer == pytest.approx(plain.weights, rel=0.05)  # one momentum; buffers have none
    assert of(opt="adamw").optimizer == pytest.approx(2 * plain.weights, rel=0.05)
    assert of(opt="momentum", momentum=0.0).optimizer == 0
    assert of(model_ema_decay=0.99).average == plain.weights
    assert of(batch_size=16).activations == pytest.approx(2 * plain.activations, rel=0.05)
    assert of(batch_size=16).kept == plain.kept
    assert of(views=2).activations > 1.5 * plain.activations
    assert of(amp=True).activations < 0.8 * plain.activations
    assert of(lr=1.0, epochs=7) == plain


def test_students_that_fit() -> None:
    small = footprint("test_resnet", 10, 64, TrainConfig(epochs=1, batch_size=8))
    large = replace(small, device="cuda", weights=2 * small.weights)
    assert large.kept < 3 * small.kept  # the copy of the best weights is not on the GPU
    room = 3 * small.kept + small.passing
    assert [fitting([small] * 5, room), fitting([small] * 5, room - 1), fitting([small] * 2, room)] == [3, 2, 2]
    assert fitting([small], small.passing) == 0
    assert fitting([], room) == 0


def test_this_machine_has_memory() -> None:
    assert 0 < available_memory("cpu") <= psutil.virtual_memory().total


@pytest.fixture
def groups(tmp_path, monkeypatch) -> Iterator[Path]:
    """A system with 8 GiB available, its control groups to be filled in."""
    monkeypatch.setattr(kdcache.training.memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(kdcache.training.memory, "CGROUPS", tmp_path / "groups")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 << 30))
    return tmp_path


def _group(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


def _second(limit: object, used: int, reclaimable: int = 0) -> dict[str, object]:
    return {"memory.max": limit, "memory.current": used, "memory.stat": f"anon 1\ninactive_file {reclaimable}"}


def test_limits_of_control_groups_count(groups) -> None:
    (groups / "proc/self/cgroup").write_text("0::/slice/job\n")
    assert available_memory("cpu") == 8 << 30
    _group(groups / "groups/slice/job", _second("max", 5 << 30))
    assert available_memory("cpu") == 8 << 30
    _group(groups / "groups/slice/job", _second(4 << 30, 2 << 30, 1 << 30))
    assert available_memory("cpu") == 3 << 30
    _group(groups / "groups/slice", _second(6 << 30, 5 << 30))  # around it, with other jobs in it
    assert available_memory("cpu") == 1 << 30
    _group(groups / "groups/slice", _second(4 << 30, 5 << 30))
    assert available_memory("cpu") == 0


def test_limits_of_a_container_count(groups) -> None:
    """Its own group is mounted as the root, under a path that is not there."""
    (groups / "proc/self/cgroup").write_text("0::/docker/0123\n")
    _group(groups / "groups", _second(2 << 30, 1 << 30))
    assert available_memory("cpu") == 1 << 30


def test_limits_of_version_1_count(groups) -> None:
    (groups / "proc/self/cgroup").write_text("4:memory:/jobs/1\n1:cpu,cpuacct:/\n0::/\n")
    files = {"memory.limit_in_bytes": 3 << 30, "memory.usage_in_bytes": 2 << 30, "memory.stat": f"total_inactive_file {1 << 29}"}
    _group(groups / "groups/memory/jobs/1", files)
    _group(groups / "groups/memory", {**files, "memory.limit_in_bytes": 2**63 - 4096})  # none
    assert available_memory("cpu") == (1 << 30) + (1 << 29)
