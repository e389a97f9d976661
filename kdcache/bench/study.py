"""Benchmarks of whole studies: plan, report and smoke version, run as the user's commands."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from kdcache.archive import moment_histogram, write_archive
from kdcache.bench.turns import Result
from kdcache.system.progress import Progress

__all__ = ["study"]

TAUS, CONTROLS = (1, 2, 3, 4, 5, 7, 10, 20, 40), ("none", "ls-global", "ls-instance", "bottom:1", "bottom:5", "bottom:10")
STUDENTS, SEEDS, EPOCHS = ("rn18", "mnv4", "cn_p"), 3, 512  # times taus and controls: 486 runs
TEN_THOUSAND = {"tau": [1 + n / 2 for n in range(50)], "control": ["none", "ls-global", "bottom:2", "bottom:3"], "seed": "0-24"}


def study(seconds: float, folder: Path, progress: Progress) -> list[Result]:
    """Measure each command once, in wall seconds with the start of Python. `seconds` is ignored."""
    _write_study(folder / "ten-thousand.yaml")
    _write_runs(folder / "runs", folder / "archives/demo")
    work = (
        ("10,000 students planned", 10, ("study", "plan", folder / "ten-thousand.yaml", "--home", folder)),
        ("report over 486 runs of 512 epochs", 20, ("report", folder / "runs", "--output", folder / "report")),
        ("study controls in small", 360, ("study", "run", "controls", "--smoke", "--home", folder / "home")),
    )
    results = []
    for done, (name, bound, arguments) in enumerate(work, 1):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "kdcache", *map(str, arguments)], check=True, capture_output=True)
        results.append(Result(name, "the command", "wall seconds", time.perf_counter() - begun, bound))
        progress.update("bench study", done, len(work))
    return results


def _write_study(file: Path) -> None:
    text = dict.fromkeys(("title", "paper", "question", "varies", "expected"), "a benchmark")
    archive = {"dataset": "cifar100", "teacher": "resnet32x4", "dump": {"policy": "crd", "views": 240}}
    students: dict[str, Any] = {"archive": "one", "student": ["resnet8x4", "wrn16_2"], "method": "kd"} | TEN_THOUSAND
    cost = {"gpu-hours": 0, "archive-bytes": 0}
    file.write_text(yaml.safe_dump({**text, "cost": cost, "archives": {"one": archive}, "students": [students]}))


def _write_runs(runs: Path, archive: Path) -> None:
    """Write run folders in the form of `distill`, with random numbers."""
    drawn = np.random.default_rng(0)
    made = write_archive(archive, drawn.normal(size=(2, 2000, 37)).astype(np.float32), [f"class {n}" for n in range(37)])
    moments = moment_histogram(*drawn.normal([[0.5], [1.5]], 0.2, size=(2, 3000))).model_dump_json()
    shared: dict[str, Any] = {
        "archive": str(archive),
        "archive_digest": made.manifest.digest,
        "archive_name": "demo",
        "dataset": "pets",
    }
    shared |= {"teacher": "vit_s", "method": {"name": "kd"}, "method_spec": "kd", "epochs": EPOCHS, "batch_size": 64}
    shared |= {"opt": "adamw", "lr": 0.002, "weight_decay": 0.05}
    grid = (
        (tau, control, student, seed) for tau in TAUS for control in CONTROLS for student in STUDENTS for seed in range(SEEDS)
    )
    for number, (tau, control, student, seed) in enumerate(grid):
        run, top = runs / str(number), 80 + float(drawn.normal())
        run.mkdir(parents=True)
        own: dict[str, Any] = {"tau": tau, "control": {}, "control_spec": control, "student": student, "seed": seed}
        (run / "args.yaml").write_text(yaml.safe_dump(shared | own))
        rest = np.linspace(1, 0.2, EPOCHS)
        with (run / "metrics.jsonl").open("w") as file:
            for epoch, (accuracy, value) in enumerate(zip(np.linspace(10, top, EPOCHS), rest, strict=True)):
                row: dict[str, Any] = dict.fromkeys(
                    ("divergence", "agreement", "logit_mean", "logit_std", "student_entropy"), value
                )
                file.write(json.dumps({"epoch": epoch, "test_top1": accuracy, "seconds": 1.0} | row) + "\n")
        (run / "logit_moments.json").write_text(moments)
        (run / "summary.json").write_text(json.dumps({"status": "complete", "epochs": EPOCHS, "final_top1": top}))
