"""A workspace with a small trained teacher and a finished archive, made once by the real commands."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from kdcache.archive import open_archive
from kdcache.archive.format.manifest import FOR_PEOPLE
from kdcache.cli import run

DUMP = ["dump-teacher", "--teacher", "test_vit", "--dataset", "digits"]
STUDENT = ["--student", "test_vit", "--epochs", "2", "--batch-size", "128"]  # the quickest; test_resnet is for what has buffers
FEW = ["--student", "test_vit", "--batch-size", "80"]  # of `few_home`: two steps an epoch


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


@pytest.fixture
def kdcache(capfd):
    """Run one command line in this process: exit status, stdout, stderr."""

    def call(*arguments: object) -> Outcome:
        capfd.readouterr()
        status = run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Outcome(status, captured.out, captured.err)

    return call


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    """Start one command line as a process of its own."""
    command = [sys.executable, "-m", "kdcache", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def until(reached: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait for something that a process that runs is to bring about."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A workspace with a teacher and one archive of 3 views; copy it (`home`) before changing it."""
    home = tmp_path_factory.mktemp("home")
    teacher = ["train-teacher", "--teacher", "test_vit", "--dataset", "digits", "--epochs", "2", "--home", str(home)]
    assert run(teacher) == 0
    assert run([*DUMP, "--views", "3", "--home", str(home)]) == 0
    return home


@pytest.fixture
def home(trained, tmp_path) -> Path:
    """A workspace of one's own, to do harm to."""
    copy = tmp_path / "home"
    shutil.copytree(trained, copy)
    return copy


@pytest.fixture(scope="session")
def few_trained(tmp_path_factory) -> Path:
    """As `trained`, of the first 200 digits: for what is the same with any number of them, and takes an eighth of the time."""
    folder = tmp_path_factory.mktemp("few")
    home, source = folder / "home", folder / "digits"
    source.mkdir()
    digits = load_digits()
    for split, part in (("train", slice(160)), ("test", slice(160, 200))):
        np.save(source / f"{split}_images.npy", np.rint(digits.images[part] * (255 / 16)).astype(np.uint8))
        np.save(source / f"{split}_labels.npy", digits.target[part])
    common = ["--teacher", "test_vit", "--dataset", f"arrays:{source}", "--canvas", "32", "--policy", "digits"]
    assert run(["train-teacher", *common, "--from-scratch", "--epochs", "1", "--home", str(home)]) == 0
    assert run(["dump-teacher", *common, "--views", "3", "--home", str(home)]) == 0
    return home


@pytest.fixture
def few_home(few_trained, tmp_path) -> Path:
    """`few_trained`, to do harm to."""
    copy = tmp_path / "home"
    shutil.copytree(few_trained, copy)
    return copy


@pytest.fixture
def few_archive(few_home) -> Path:
    return next((few_home / "archives").iterdir())


def with_images(archive: Path) -> list[str]:
    """An archive, and where its images are: a workspace that has never seen them has to be told."""
    return [str(archive), "--dataset", open_archive(archive).manifest.provenance["dataset"]]


@pytest.fixture(scope="session")
def trained_student(trained, tmp_path_factory) -> Path:
    """A workspace as `trained`, with a student at tau 4; copy it (`distilled`) before changing it."""
    home = tmp_path_factory.mktemp("distilled") / "home"
    shutil.copytree(trained, home)
    assert run(["distill", "--tau", "4", *STUDENT, "--home", str(home)]) == 0
    return home


@pytest.fixture
def distilled(trained_student, tmp_path) -> Path:
    """`home`, with a student."""
    copy = tmp_path / "home"
    shutil.copytree(trained_student, copy)
    return copy


@pytest.fixture
def archive(home) -> Path:
    return next((home / "archives").iterdir())


def data_files(folder: Path) -> dict[str, bytes]:
    """Every file of an archive that holds data, by name (the manifest also says who made it and when)."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in {"kdcache.json", *FOR_PEOPLE}
    }


def without_costs(row: dict[str, float]) -> None:
    """Leave the figures of an epoch that are never the same twice out of it."""
    for name in ("seconds", "device_seconds", "gpu_joules", "cpu_joules"):
        row.pop(name, None)
