"""What the README tells people to type works as typed."""

import itertools
import os
import re
import shlex
import signal
from pathlib import Path

import pytest
import torch

import kdcache as package
from kdcache.datasets import DATASETS
from kdcache.models.creation import create_model
from kdcache.workspace import Workspace
from tests.end_to_end.conftest import DUMP, data_files, until
from tests.end_to_end.forks import Started

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


def test_the_toy_case_of_the_readme_prints_what_it_says(capsys):
    (block,) = re.findall(r"```python\n((?:(?!```).)*?0\.1749.*?)```", README, flags=re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"# ([\d. ]+)$", block, flags=re.MULTILINE)


def loops() -> list[str]:
    """The training loops; all but the first go on with what the first one made."""
    blocks = [block for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "for " in block]
    assert len(blocks) == 3
    assert all(len(block.splitlines()) <= 21 for block in blocks)
    return blocks


@pytest.mark.exhaustive
def test_the_loops_of_the_readme_run_as_they_stand_and_learn(home, archive, monkeypatch, capsys):
    monkeypatch.chdir(home)
    torch.manual_seed(0)
    plain, tasks, learned = loops()
    names: dict[str, object] = {}
    exec(plain.replace("archives/digits--test_vit--...", str(archive)), names)
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[2] < 0.6 * losses[0]
    stream, student = names["stream"], names["student"]
    assert len(stream) == 22
    before = {key: value.clone() for key, value in student.state_dict().items()}
    exec(tasks, names)
    assert names["result"].keys() == {"loss", "output"}
    assert names["result"]["output"].shape == (64, 10)
    assert any(not torch.equal(before[key], value) for key, value in student.state_dict().items())
    exec(learned, names)
    assert names["state"].theta.item() != 1.0


def test_timms_tasks_keep_an_average_of_a_student_from_the_cache(home, archive):
    from timm.task import ClassificationTask

    opened = package.open_archive(archive)
    canvas = Workspace(home).canvas(DATASETS.build("digits"), "train", opened.manifest.canvas.size)
    student, normalise = create_model("test_resnet", 10, input_size=32)
    task = ClassificationTask(student, criterion=package.methods.build("kd"), verbose=False)
    average = task.setup_ema(decay=0.5)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    stream = package.CachedTargets(opened, canvas, batch_size=64, seed=0)
    losses = []
    for images, targets in itertools.islice(stream.pairs(4.0, normalise), 6):
        loss = task(images, targets.to("cpu"))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.update_ema()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not all(torch.equal(a, b) for a, b in zip(average.module.parameters(), student.parameters(), strict=True))


@pytest.mark.exhaustive
def test_ctrl_c_keeps_what_is_finished(home, tmp_path, kdcache):
    arguments = [*DUMP, "--views", 12, "--home", home, "--output", tmp_path / "archive"]
    process = Started(*arguments)
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
