"""What the README tells people to type works as typed."""

import os
import re
import shlex
import signal
from pathlib import Path

import numpy as np
import torch

import kdcache as package
from kdcache.datasets import dataset
from kdcache.models import create_model
from kdcache.workspace import Workspace
from tests.end_to_end.conftest import DUMP, data_files, start, until

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_two_commands_are_there_and_ci_runs_the_second():
    assert "python3 -m pip install uv && uv run kdcache quickstart\npython3 -m pip install uv && uv run pytest\n" in README
    assert "python3 -m pip install uv && uv run pytest\n" in (Path(__file__).parents[2] / ".ci/run").read_text()


def test_every_command_line_of_the_readme_is_understood(home, archive, kdcache, tmp_path):
    lines = re.findall(r"^kdcache (.+)$", README, flags=re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        arguments = shlex.split(line)
        if arguments[0] == "report":
            continue  # needs finished runs; test_quickstart makes one
        if arguments[0] == "view":
            arguments = [str(archive) if a.startswith("archives/") else a for a in arguments[:-1]] + [str(tmp_path / "sheet.png")]
        else:
            arguments.append("--dry-run")
        result = kdcache(*arguments, "--home", home)
        assert result.status == 0, (line, result.err)


def test_every_command_is_in_the_readme(kdcache):
    commands = re.findall(r"^  ([a-z][a-z-]+)  ", kdcache("--help").out, flags=re.MULTILINE)
    assert "distill" in commands
    assert [name for name in commands if f"`{name}`" not in README] == []


def test_an_own_training_loop_learns_what_the_teacher_says(home, archive):
    opened = package.open_archive(archive)
    canvas = Workspace(home).canvas(dataset.build("digits"), "train", opened.manifest.canvas.size)
    stream = package.CachedTargets(opened, canvas, batch_size=64, seed=0)
    kd = package.methods.build("kd")
    torch.manual_seed(0)
    student, normalise = create_model("test_resnet", 10, input_size=32)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    means = []
    for _ in range(3):
        losses = []
        for batch in stream:
            targets = package.targets.Targets(batch.logits, tau=4.0)
            loss = kd(student(normalise(batch.images)), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        means.append(np.mean(losses))
    assert len(losses) == len(stream) == 22
    assert means[2] < 0.6 * means[0]


def test_ctrl_c_keeps_what_is_finished(home, tmp_path, kdcache):
    arguments = [*DUMP, "--views", 12, "--home", home, "--output", tmp_path / "archive"]
    process = start(*arguments)
    until(lambda: list((tmp_path / "archive/.dump/shards").glob("*.json")), process)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    finished = {name: data for name, data in data_files(tmp_path / "archive").items() if "/c/" in name}
    assert kdcache(*arguments).status == 0
    after = data_files(tmp_path / "archive")
    assert all(after[name] == data for name, data in finished.items())
