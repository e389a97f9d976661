"""The fixes of errors about the papers' studies, their methods and reports, followed."""

import dataclasses
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.archive import derive, open_archive, write_archive
from kdcache.methods import METHODS, Method
from kdcache.report import are_archives, write_archive_page
from kdcache.students.config import Grid
from kdcache.students.grid import plan_students
from kdcache.targets import Targets
from kdcache.training.outputs import KeptOutputs
from kdcache.workspace import Workspace
from tests.conftest import Dump
from tests.following import followed
from tests.test_archive_page import GOLDEN, make, no_figures  # noqa: F401 (a fixture)


def test_weights_of_a_mean_are_fitted(tmp_path: Path) -> None:
    archive, _ = make(tmp_path / "a")
    teacher = torch.randn(4, archive.num_classes)

    def mend(fix: str) -> Method:
        assert "method.fit(archive.spread_logits(), tau)" in fix
        return METHODS.parse("wttm-unit").fit(archive.spread_logits(), 4.0)

    loss = followed(lambda method: method(teacher, Targets(teacher, 4.0)), METHODS.parse("wttm-unit"), mend)
    assert torch.isfinite(loss)


def test_archives_and_runs_have_reports_of_their_own(tmp_path: Path) -> None:
    write_archive(tmp_path / "an archive", np.random.default_rng(0).normal(size=(1, 8, 3)), list("abc"))

    def mend(fix: str) -> list[Path]:
        runs, archives = (Path(shlex.split(command)[-1]) for command in fix.split(", or "))
        assert not are_archives([runs])
        return [archives]

    assert followed(are_archives, [tmp_path / "an archive", tmp_path], mend)


def test_a_page_of_archives_is_a_folder(tmp_path: Path) -> None:
    archive, _ = make(tmp_path / "a")
    (tmp_path / "page").touch()

    def mend(fix: str) -> Path:
        assert "another place" in fix
        return tmp_path / "other"

    assert followed(lambda out: write_archive_page([archive.path], out), tmp_path / "page", mend).html.is_file()


@pytest.mark.usefixtures("no_figures")
def test_statistics_alone_of_before_have_a_page_as_a_whole(tmp_path: Path) -> None:
    whole = open_archive(GOLDEN)
    part = derive(whole, tmp_path / "part", contents="statistics")

    def mend(fix: str) -> Path:
        assert "the whole archive" in fix
        return whole.path

    assert followed(lambda path: write_archive_page([path], tmp_path / "page"), part.path, mend).html.is_file()


def test_labels_alone_have_no_control(dump: Dump, tmp_path: Path) -> None:
    from kdcache.replay.subject import Subject

    def attempt(control: str) -> int:
        grid = Grid(method=("ce",), control=(control,), student=("test_vit",), epochs=1, batch_size=4)
        return len(plan_students(grid, Subject.of(dump.archive), Workspace(tmp_path), dataset="digits"))

    def mend(fix: str) -> str:
        found = re.search(r"--control (\w+)", fix)
        assert found is not None
        return found[1]

    assert followed(attempt, "ls-global", mend) == 1


def test_damaged_outputs_are_set_aside(tmp_path: Path) -> None:
    kept = KeptOutputs(np.arange(3, dtype=np.int32), np.zeros(3, np.int32), np.ones((3, 2), np.float32), None, "images")
    file = tmp_path / "test_outputs.safetensors"
    content = bytearray(b"".join(map(bytes, kept.as_file())))
    content[-1] ^= 1
    file.write_bytes(content)

    def mend(fix: str) -> Path:
        assert subprocess.run(fix.rpartition(": ")[2], shell=True, check=True).returncode == 0
        return file

    read = followed(lambda path: KeptOutputs.read(path) if path.is_file() else None, file, mend)
    assert read is None
    assert Path(f"{file}.aside").is_file()
    assert dataclasses.is_dataclass(kept)
