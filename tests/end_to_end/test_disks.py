"""Disks as they are: read-only, without locks, in folders of odd names, and with what killed commands have left there."""

import ctypes
import errno
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from kdcache.cli import run
from kdcache.system.locks import say_no_locks
from tests.end_to_end.conftest import FEW, start, until

TOLD = ["--license", "data=cc0-1.0,weights=mit"]
NO_LOCKS = [errno.ENOLCK, errno.ENOTSUP, 524, errno.ENOSYS]


def commands(home: Path) -> dict[str, list[str]]:
    """What has been done in `few_home`, and more that can be done there."""
    archive = next((home / "archives").iterdir())
    dataset = json.loads((archive / "kdcache.json").read_text())["provenance"]["dataset"]
    common = ["--teacher", "test_vit", "--dataset", dataset, "--canvas", "32", "--policy", "digits"]
    return {
        "train-teacher": ["train-teacher", *common, "--from-scratch", "--epochs", "1"],
        "dump-teacher": ["dump-teacher", *common, "--views", "3"],
        "distill": ["distill", "--archive", str(archive), *FEW, "--epochs", "1"],
        "convert": ["convert", str(archive), "--layout", "hdf5", "--output", str(home / "hdf5")],
        "report": ["report"],
        "export": ["export", str(next(home.glob("runs/*/test_vit*"), home / "runs"))],
    }


@pytest.fixture(scope="module")
def full(few_trained, tmp_path_factory) -> Path:
    """A workspace in which all `commands` have been run. Copy it (`done`) before changing it."""
    home = tmp_path_factory.mktemp("full") / "home"
    shutil.copytree(few_trained, home)
    for name in commands(home):
        assert run([*commands(home)[name], "--home", str(home)]) == 0
    return home


@pytest.fixture
def done(full, tmp_path) -> Path:
    """`full`, to do harm to."""
    home = tmp_path / "full"
    shutil.copytree(full, home)
    return home


# ------------------------------------------------------------------------------------------------------- read-only


@contextmanager
def without_privileges() -> Iterator[None]:
    """The superuser may write anywhere: not in here."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    before, without = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    assert not libc.capget(header, before)
    without[:] = before
    without[0] &= ~0b1110  # effective: may override permissions, read anything, act as any owner
    assert not libc.capset(header, without)
    try:
        yield
    finally:
        assert not libc.capset(header, before)


@pytest.fixture
def read_only() -> Iterator[Callable[[Path], None]]:
    locked: list[Path] = []

    def lock(home: Path) -> None:
        for path in [home, *home.rglob("*")]:
            path.chmod(path.stat().st_mode & ~0o222)
        locked.append(home)

    with without_privileges():
        yield lock
    for home in locked:
        for path in [home, *home.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)


@pytest.mark.skipif(sys.platform != "linux", reason="privileges are Linux's")
def test_a_read_only_workspace_with_nothing_left_to_do_is_no_error(kdcache, full, read_only):
    wanted, done = commands(full), full
    lines = wanted | {
        "info": ["info", str(done / "hdf5")],
        "stats": ["stats", str(done / "hdf5")],
        "verify": ["verify", str(done / "hdf5")],
        "finalize": ["finalize", wanted["convert"][1]],
    }
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()}
    read_only(done)
    outcomes = {name: kdcache(*line, *(["--home", done] if name in wanted else [])) for name, line in lines.items()}
    assert {name: (outcome.status, outcome.err) for name, outcome in outcomes.items() if outcome.status} == {}
    for name in ("dump-teacher", "convert", "finalize"):
        assert "nothing to do" in outcomes[name].err
    assert before == {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()}
    for name, more in {"train-teacher": "2", "dump-teacher": "4", "distill": "2"}.items():
        refused = kdcache(*wanted[name][:-1], more, "--home", done)
        assert refused.status == 75
        assert "not allowed to write" in refused.err
    archive = wanted["convert"][1]
    for line in (
        ["push", archive, done / "sent", *TOLD],
        ["pull", archive, done / "pulled"],
        ["view", archive, "--sample", "1", "--out", done / "view.png", "--home", done],
        ["export", wanted["export"][1], "--output", done / "there"],
    ):
        refused = kdcache(*line)
        assert refused.status == 75
        assert "--home" not in refused.err.splitlines()[-1], "which is no option of where this goes"


# ------------------------------------------------------------------------------------------------------- leftovers


def test_what_killed_commands_left_is_swept_away_when_they_are_repeated(kdcache, done, tmp_path):
    wanted = commands(done)
    trained = Path(wanted["export"][1])
    teacher = next((done / "teachers").iterdir())
    canvas = next(path for path in (done / "data").iterdir() if path.is_dir())
    exported = done / "exports" / trained.name
    shutil.rmtree(exported, ignore_errors=True)
    exported.mkdir(parents=True)
    archive, target = Path(wanted["convert"][1]), tmp_path / "there"
    assert kdcache("push", archive, target, *TOLD).status == 0
    (target / ".pull").mkdir()
    left = [
        *(
            folder / name
            for folder in (trained, teacher)
            for name in (".lock", "checkpoint.pt", ".last.safetensors.7-0123abcd.tmp")
        ),
        canvas / "journal.jsonl",
        canvas.with_name(f"{canvas.name}.lock"),
        exported / ".model.safetensors.99-0123abcd.tmp",
        exported / ".README.md.tmp",
        done / "reports/latest/figures/.any.svg.99-0123abcd.tmp",
        target / ".kdcache.json.99-0123abcd.tmp",
        target / ".pull/lock",
    ]
    for path in left:
        path.write_bytes(b"half")
    for name in ("train-teacher", "distill", "report", "export"):
        outcome = kdcache(*wanted[name], "--home", done)
        assert outcome.status == 0, outcome.err
    assert kdcache("push", archive, target, *TOLD).status == 0
    assert [path for path in left if path.exists() and path.name != ".README.md.tmp"] == []
    assert not (target / ".pull").exists()
    (teacher / "teacher.json").unlink()  # as where it was killed while this was written
    (teacher / ".teacher.json.7-0123abcd.tmp").write_bytes(b"half")
    assert kdcache(*wanted["train-teacher"], "--home", done).status == 0
    assert not list(teacher.glob(".*"))
    (exported / "own.txt").write_text("mine")
    assert "is not empty" in kdcache(*wanted["export"], "--home", done).err


KILLED_EXPORT = """
import shutil, sys
from pathlib import Path
from kdcache.sharing.export import export, write_export
from tests.kills import in_a_fork
made, folder = export(Path(sys.argv[1])), Path(sys.argv[2])
step = 0
while in_a_fork(lambda: write_export(made, folder), step):
    write_export(made, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == dict(made.files), step
    shutil.rmtree(folder)
    step += 1
print(step)
"""


@pytest.mark.exhaustive
def test_an_export_may_be_killed_at_any_step_and_repeated(run_python, full, tmp_path):
    assert int(run_python(KILLED_EXPORT, commands(full)["export"][1], tmp_path / "exported").stdout) > 7


# ------------------------------------------------------------------------------------------------------- no locks


@pytest.mark.parametrize("number", NO_LOCKS, ids=str)
def test_a_single_process_works_without_locks_and_says_so_once(kdcache, few_home, tmp_path, monkeypatch, number):
    def refuse(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    wanted = commands(few_home)
    pull = ["pull", wanted["convert"][1], str(tmp_path / "pulled")]
    lines = [[*wanted["dump-teacher"][:-1], "4"], wanted["distill"], wanted["convert"], pull]
    if number == errno.ENOLCK:  # from the beginning
        for name in ("archives", "teachers", "data"):
            shutil.rmtree(few_home / name)
        lines = [wanted["train-teacher"], [*wanted["dump-teacher"], "--shard-rows", "40"]]
    for line in lines:
        say_no_locks.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outcome = kdcache(*line, "--home", few_home)
        assert outcome.status == 0, outcome.err
        assert sum("has no locks" in str(warning.message) for warning in caught) == 1, line
    assert not [path for path in few_home.rglob("*") if path.name.endswith(("lock", ".tmp"))]


WITHOUT_LOCKS = """
import errno, fcntl, os
def refuse(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
fcntl.flock = refuse
"""


def odd_python(folder: Path, code: str) -> dict[str, str]:
    """The environment of a process that first runs this code."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.exhaustive
@pytest.mark.slow
def test_without_locks_a_second_dump_is_told_to_divide_the_work(kdcache, few_home, tmp_path):
    environment = odd_python(tmp_path / "odd", WITHOUT_LOCKS)
    line = [*commands(few_home)["dump-teacher"][:-1], "300", "--shard-rows", "40", "--home", str(few_home)]
    both = [start(*line, env=environment) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    (refused,) = (text for text, process in zip(said, both, strict=True) if process.returncode)
    assert "--shard 0/2 and --shard 1/2" in refused
    line[line.index("300")] = "310"
    divided = [start(*line, "--shard", f"{i}/2", env=environment) for i in range(2)]
    assert [process.wait(timeout=300) for process in divided] == [0, 0]
    for path in (few_home / "archives").iterdir():
        assert kdcache("verify", path).status == 0


# ------------------------------------------------------------------------------------------------------- pipes


def test_what_would_be_waited_for_without_end_is_named(kdcache, done, tmp_path):
    """A shell puts a pipe in the place of `<(...)`; other programs leave some, and devices, in folders."""
    wanted, pipe = commands(done), tmp_path / "pipe"
    os.mkfifo(pipe)
    for line in (
        [*wanted["dump-teacher"], "--classes", pipe],
        [*wanted["dump-teacher"], "--checkpoint", pipe],
        [*wanted["distill"], "--init", pipe],
        ["study", "plan", pipe],
    ):
        refused = kdcache(*line, "--home", done)
        assert refused.status == 3, refused.err
        assert f"{pipe}" in refused.err.splitlines()[-3]
        assert "is a pipe" in refused.err
    for pattern, name in (("data/*-train-*/pixels.npy", "distill"), ("runs/*/*/metrics.jsonl", "report")):
        (file,) = done.glob(pattern)
        file.unlink()
        os.mkfifo(file)
        refused = kdcache(*wanted[name], "--tau", "9", "--home", done) if name == "distill" else kdcache("report", "--home", done)
        assert refused.status == 4, refused.err
        assert "not a regular file" in refused.err
        command = refused.err.strip().rpartition(": ")[2]
        subprocess.run(command, shell=True, check=True)
        if name == "distill":
            assert kdcache(*wanted[name], "--home", done).status == 0


# ------------------------------------------------------------------------------------------------------- workers

FEW_FORKS = """
import errno, os
left, fork = [2], os.fork
def limited():
    if not left[0]:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    left[0] -= 1
    return fork()
os.fork = limited
"""


NO_FEEDER = """
import threading
start = threading.Thread.start
def limited(self):
    if self.name == "QueueFeederThread":
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = limited
"""


def test_workers_that_no_thread_can_be_started_for_end_the_command(few_home, tmp_path):
    """What is told is the cause, and not that the workers were killed therefore."""
    line = [*commands(few_home)["dump-teacher"][:-1], "4", "--home", str(few_home)]
    process = start(*line, "--workers", 3, env=odd_python(tmp_path / "odd", NO_FEEDER))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "can't start new thread" in err
    assert "--workers 2" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_workers_that_cannot_be_started_end_the_command(kdcache, few_home, tmp_path):
    line = [*commands(few_home)["dump-teacher"][:-1], "4", "--home", str(few_home)]
    process = start(*line, "--workers", 5, env=odd_python(tmp_path / "odd", FEW_FORKS))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "error: 2 of 5 worker processes were started, and no more" in err
    assert "--workers 2" in err.splitlines()[-1]
    assert "Traceback" not in err
    for count in ("100000", "-1"):
        assert kdcache(*line, "--workers", count).status == 2
    refused = kdcache(*line, "--workers", 100000)
    fix = refused.err.splitlines()[-1].removeprefix("fix: ").split()
    assert "there are at most" in refused.err
    assert kdcache(*line, *fix).status == 0


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("seconds", [2, 3, 4, 5, 6])
def test_a_signal_ends_a_command_with_many_workers_at_any_time(few_home, seconds):
    line = [*commands(few_home)["dump-teacher"][:-1], "3000", "--home", few_home, "--workers", 12]
    process = start(*line, start_new_session=True)
    time.sleep(seconds)
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, check=False).stdout == b""


# ------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGHUP"])
def test_what_clusters_and_lost_terminals_send_stops_after_a_checkpoint(kdcache, few_home, monkeypatch, name):
    from kdcache.training.learner import Learner

    line = [*commands(few_home)["distill"][:-1], "4", "--home", few_home]
    step, steps = Learner.step, []

    def interrupted(self, *args):
        step(self, *args)
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), getattr(signal, name))

    before = signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        monkeypatch.setattr(Learner, "step", interrupted)
        assert kdcache(*line).status == 130
        (checkpoint,) = few_home.glob("runs/*/*/checkpoint.pt")
        assert kdcache(*line).status == 0
        assert not checkpoint.exists()
    finally:
        signal.signal(getattr(signal, name), before)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(("name", "ignored"), [("SIGUSR1", False), ("SIGHUP", False), ("SIGHUP", True)])
def test_a_dump_ends_at_such_a_signal_unless_it_was_ignored_at_its_start(few_home, name, ignored):
    line = shlex.join([sys.executable, "-m", "kdcache", *commands(few_home)["dump-teacher"][:-1], "400", "--home", str(few_home)])
    nohup = "trap '' HUP; exec " if ignored else "exec "
    process = subprocess.Popen(
        nohup + line,
        shell=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # tests may run under nohup themselves
    )
    until(lambda: len(list(few_home.glob("archives/*/.dump"))) > 0, process)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=120)
    assert process.returncode == (0 if ignored else 130), err


# ------------------------------------------------------------------------------------------------------- names


def test_a_tilde_is_the_home_folder_and_an_address_is_no_folder(kdcache, few_home, monkeypatch):
    monkeypatch.setenv("HOME", str(few_home.parent))
    monkeypatch.chdir(few_home)
    name = next((few_home / "archives").iterdir()).name
    before = sorted(few_home.iterdir())
    for line in (["ls", "--home=~/home"], ["info", f"~/home/archives/{name}"], ["verify", f"~/home/archives/{name}"]):
        assert name in kdcache(*line).out or line[0] == "verify"
    (few_home.parent / "c.yaml").write_text(f"archive: ~/home/archives/{name}\n")
    assert kdcache("distill", "--config", "~/c.yaml", "--home", "~/home", "--dry-run").status == 0
    monkeypatch.setenv("KDCACHE_HOME", "~/home")
    assert name in kdcache("ls").out
    assert kdcache("info", name).status == 0
    assert kdcache("convert", name, "--layout", "hdf5", "-o", "~/converted").status == 0
    assert (few_home.parent / "converted/kdcache.json").is_file()
    for line in (
        ["ls", "--home", "s3://bucket/folder"],
        ["convert", name, "-o", "hf://datasets/a/b"],
        ["pull", name, "https://host/folder"],
        ["report", "--output", "s3://bucket/folder"],
    ):
        refused = kdcache(*line)
        assert refused.status == 2
        assert line[-1] in refused.err
    assert sorted(few_home.iterdir()) == before, "no folder is called ~ or s3:"


ODD = ["a #b", "c: d", "e{z}f", "g%h", "i'j\"k", "n$HOME`x`", "p&q;r", "-o", "ü é"]


def study(folder: Path) -> Path:
    pytest.importorskip("snakemake")
    from tests.end_to_end.test_study import STUDY

    file = folder / "two.yaml"
    file.write_text(yaml.safe_dump(STUDY))
    return file


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_a_study_runs_in_a_workspace_of_any_name(kdcache, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    file = study(tmp_path)
    outcome = kdcache("study", "run", file, "--home", f"./{name}")
    assert outcome.status == 0, outcome.err
    again = kdcache("study", "run", file, "--home", f"./{name}")
    assert again.out == outcome.out
    assert "nothing to do" in again.err


def test_a_study_refuses_a_workspace_whose_name_breaks_a_line(kdcache, tmp_path):
    refused = kdcache("study", "run", study(tmp_path), "--home", tmp_path / "a\nb")
    assert refused.status == 2
    assert "breaks a line" in refused.err
    assert not (tmp_path / "a\nb").exists()
