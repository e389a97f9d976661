"""Whole runs on a GPU, by the functions of the commands: students packed, replayed as graphs, and divided among processes."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from kdcache.bench.gpu.measuring import Found, NotHereError, Setting, random_archive
from kdcache.bench.turns import Result
from kdcache.datasets import DATASETS
from kdcache.students.config import DistillConfig, Grid
from kdcache.students.distill import distill
from kdcache.training.config import StudentRuntime, StudentTraining
from kdcache.views.policy import ViewPolicy
from kdcache.workspace import Workspace

__all__ = ["different_tensors", "graph", "graph_state", "packed", "processes"]

TAUS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 20.0, 40.0)
PACKED = 0.3  # of the time of nine runs
BUSY = "too much else is done on this machine"
PATIENCE = 300  # seconds for a command of several processes
MANY = 10**6  # epochs from one test to the next: the last one is tested


def _archive(setting: Setting) -> Path:
    """An archive of the digits with random logits, made once for all checks in this folder."""
    path = setting.folder / "archive"
    if not (path / "kdcache.json").is_file():
        shutil.rmtree(path, ignore_errors=True)
        canvas = Workspace(setting.folder).canvas(DATASETS.build("digits"), "train", 32, setting.progress)
        random_archive(path, canvas, ViewPolicy.load("cifar"), views=1 if setting.tiny else 4)
    return path


def _run(setting: Setting, name: str, taus: tuple[float, ...], epochs: int, **runtime: Any) -> tuple[float, list[Path]]:
    """Train students, one for each tau, in a workspace `name`: seconds of all of it, and their folders."""
    archive, home = _archive(setting), setting.folder / name
    shutil.rmtree(home, ignore_errors=True)
    config = DistillConfig(
        archive=(str(archive),),
        dataset="digits",
        grid=Grid(
            tau=taus,
            student=("test_vit" if setting.tiny else "cifar_resnet8x4",),
            epochs=epochs,
            training=StudentTraining(batch_size=512 if setting.tiny else 64, val_interval=MANY),
        ),
        runtime=StudentRuntime(device=str(setting.device), checkpoint_interval=1e9, **runtime),
    )
    begun = time.perf_counter()
    results = distill(config, Workspace(home, setting.folder / "data"), setting.progress)
    setting.wait()
    return time.perf_counter() - begun, [result.spec.folder for result in results]


def _an_epoch(setting: Setting, name: str, taus: tuple[float, ...], **runtime: Any) -> tuple[float, list[Path]]:
    """Seconds of an epoch, without what a run does once; and the folders of the longest run.

    It is the difference of two runs, after one that is not measured.
    """
    short, long = (1, 4) if setting.tiny else (4, 24)
    _run(setting, f"{name}-first", taus, 1, **runtime)
    less, _ = _run(setting, f"{name}-short", taus, short, **runtime)
    more, folders = _run(setting, f"{name}-long", taus, long, **runtime)
    if more <= less:
        raise RuntimeError(f"{long} epochs took no longer than {short}: {BUSY}")
    return (more - less) / (long - short), folders


def packed(setting: Setting) -> Found:
    """Epochs of nine small students that are trained at once, against nine runs; without what each run does once."""
    taus = TAUS[:2] if setting.tiny else TAUS
    together, _ = _an_epoch(setting, "packed", taus)
    alone, _ = _an_epoch(setting, "single", taus[:1])
    name = f"{len(taus)} packed students"
    result = Result(name, "an epoch of all", f"{len(taus)} runs", together / (len(taus) * alone), PACKED)
    return Found([result], {"epoch_s": round(together, 4), "epoch_of_one_s": round(alone, 4)})


def graph(setting: Setting) -> Found:
    """Students whose steps are replayed as CUDA graphs against the same ones without: bits, and time of an epoch."""
    if not setting.gpu:
        raise NotHereError("CUDA graphs need a GPU")
    replayed, graphed = _an_epoch(setting, "graph", TAUS[:2], graph=True)
    plain, eager = _an_epoch(setting, "eager", TAUS[:2], graph=False)
    states = [graph_state(folder) for folder in graphed]
    results = [
        Result("graph, two students", "not replayed", "-", sum(state != "on" for state in states), 0),
        Result("graph, two students", "tensors of other bits", "eager", different_tensors(graphed, eager), 0),
        Result("graph, an epoch", "replayed", "eager", replayed / plain, 1.0),
    ]
    return Found(results, {"states": states, "speedup": round(plain / replayed, 2)})


def graph_state(run: Path) -> str:
    """What a run that was not resumed has recorded of its graph: "on", or "off" with the reason."""
    return str(yaml.safe_load((run / "args.yaml").read_text()).get("graph", "not recorded"))


def different_tensors(runs: Sequence[Path], others: Sequence[Path]) -> int:
    """Tensors of trained students that are not bit for bit those of `others`."""
    pairs = [[load_file(folder / "last.safetensors") for folder in pair] for pair in zip(runs, others, strict=True)]
    return sum(one.keys() != other.keys() or not torch.equal(one[key], other[key]) for one, other in pairs for key in one)


def processes(setting: Setting) -> Found:
    """Students whose batches two processes or more divide, started by torchrun: that they end, and as well as alone."""
    count = torch.cuda.device_count() if setting.gpu else 2
    if count < 2:
        raise NotHereError("there is one GPU, and NCCL wants one for each process")
    count = 4 if count >= 4 else 2  # parts of a batch of 64
    archive, home = _archive(setting), setting.folder / "processes"
    batch = ("--batch-size", "512") if setting.tiny else ()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", "kdcache"]
    command += ["distill", "--archive", str(archive), "--dataset", "digits", "--tau", "4", "--epochs", "1", *batch]
    command += ["--student", "test_vit", "--parallel", "batches", "--device", setting.device.type]
    command += ["--home", str(home), "--data-dir", str(setting.folder / "data")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    begun = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    taken, trained = time.perf_counter() - begun, list(home.rglob("last.safetensors"))
    result = Result(f"{count} processes", "students lost", "torchrun, --parallel batches", 1 - len(trained), 0)
    said = {} if trained else {"status": done.returncode, "said": done.stderr[-1500:]}
    return Found([result], {"seconds": round(taken, 1), **said})
