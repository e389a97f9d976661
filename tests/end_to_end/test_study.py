"""`kdcache study run`: real jobs through Snakemake; what is there is kept, what fails is told, and the others go on."""

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from kdcache import __version__
from kdcache.archive import write_archive
from kdcache.errors import UsageError
from kdcache.study.jobs import Job, StudyPlan, plan_study
from kdcache.study.running import run_study, study_place
from kdcache.study.schema import load_study, shipped_folder
from kdcache.study.slots import PATIENCE
from kdcache.system.locks import locked_by_family
from kdcache.workspace import Workspace
from tests.end_to_end.conftest import start, until

STUDY = {
    "title": "Two temperatures",
    "paper": "none",
    "question": "Does it run?",
    "varies": "temperature",
    "expected": "It runs.",
    "cost": {"gpu-hours": 0, "archive-bytes": "0.2 MB"},
    "archives": {"digits": {"dataset": "digits", "teacher": "test_vit", "train": {"epochs": 1}, "dump": {"views": 2}}},
    "students": [{"archive": "digits", "student": "test_vit", "tau": 1, "epochs": 1}],
}


def written(folder: Path, **sections: object) -> Path:
    file = folder / "two.yaml"
    file.write_text(yaml.safe_dump(STUDY | sections))
    return file


def records(home: Path) -> dict[str, dict[str, object]]:
    """The records of finished jobs by kind; of each kind there is one."""
    files = [file for file in (home / "studies/two").glob("*.json") if file.name != "plan.json"]
    return {file.name.partition("-")[0]: json.loads(file.read_text()) | {"file": file} for file in files}


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_study_runs_tells_what_failed_and_goes_on_with_what_is_missing(tmp_path, kdcache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken = STUDY["archives"]["digits"] | {"train": {"epochs": 1, "checkpoint": "not-there.safetensors"}}
    file = written(
        tmp_path,
        archives=STUDY["archives"] | {"broken": broken},
        students=[STUDY["students"][0] | {"archive": ["digits", "broken"]}],
    )
    planned = kdcache("study", "run", file, "--dry-run", "--home", tmp_path)
    assert planned.status == 0
    assert "7 jobs, 0 of them done" in planned.out
    assert planned.out.count("\nkdcache distill --archive '{dump-") == 2
    assert not (tmp_path / "studies").exists()

    first = kdcache("study", "run", file, "--jobs", 2, "--home", tmp_path)
    assert first.status == 6
    assert "error: 1 of 7 jobs of study two failed" in first.err
    assert "3 jobs wait for them" in first.err
    assert "not-there.safetensors" in first.err.partition("its log")[2]
    done = records(tmp_path)
    assert set(done) == {"train", "dump", "distill"}, "what did not need the failed job went on"
    log = (tmp_path / "studies/two/logs" / done["distill"]["file"].with_suffix(".log").name).read_text()
    assert log.startswith("$ kdcache distill --archive ")
    failed = [file for file in (tmp_path / "studies/two/logs").iterdir() if "not-there" in file.read_text()]
    assert failed[0].read_text().count("$ kdcache train-teacher") == 2, "it was tried again"

    file = written(tmp_path)
    second = kdcache("study", "run", file, "--home", tmp_path)
    assert second.status == 0, second.err
    assert "3 of 4 jobs are done already" in second.err
    assert {kind: record["ended"] for kind, record in records(tmp_path).items() if kind != "report"} == {
        kind: record["ended"] for kind, record in done.items()
    }, "a job was done again"
    assert second.out.splitlines() == [str(tmp_path / "reports/two/index.html")]
    assert (tmp_path / "reports/two/index.html").stat().st_size > 10_000

    planned = kdcache("study", "plan", file, "--json", "--home", tmp_path)
    assert [job["done"] for job in json.loads(planned.out)["jobs"]] == [True] * 4
    third = kdcache("study", "run", file, "--home", tmp_path)
    assert third.out == second.out
    assert "all 4 jobs are done already" in third.err

    (run,) = map(Path, done["distill"]["outputs"])
    run.rename(tmp_path / "elsewhere")
    planned = kdcache("study", "plan", file, "--json", "--home", tmp_path)
    assert [job["done"] for job in json.loads(planned.out)["jobs"]] == [True, True, False, True], "what was deleted is missing"

    (archive,) = map(Path, done["dump"]["outputs"])
    names = [str(number) for number in range(10)]
    shutil.copytree(tmp_path / "elsewhere", run)
    archive.rename(tmp_path / "own")
    write_archive(archive, np.zeros((1, 8, 10)), names)
    planned = kdcache("study", "plan", file, "--json", "--home", tmp_path)
    assert [job["done"] for job in json.loads(planned.out)["jobs"]] == [True, False, True, True], "it is another one"
    other = kdcache("study", "run", file, "--home", tmp_path)
    assert other.status == 6
    assert "is not the archive that its name says" in other.err


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_study_that_is_interrupted_ends_its_jobs_and_goes_on_later(tmp_path):
    file = written(tmp_path, archives={"digits": STUDY["archives"]["digits"] | {"train": {"epochs": 500}}})
    process = start("study", "run", file, "--home", tmp_path, cwd=tmp_path)
    until(lambda: list(tmp_path.glob("teachers/*/*")), process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "To go on: kdcache study run" in said
    assert not records(tmp_path)
    (log,) = (tmp_path / "studies/two/logs").iterdir()
    assert "interrupted" in log.read_text()


def version_study(home: Path) -> Callable[[], list[str]]:
    """A study of one cheap job, which prints the version; a file of that name is what it makes."""
    (home / f"kdcache {__version__}").touch()
    job = Job("report-00000000", "report", "version", ("--version",))
    plan = StudyPlan("version", (job,), 0, 0, 0, ())
    return partial(run_study, plan, Workspace(home), file=home / "version.yaml")


@pytest.mark.slow
def test_what_a_killed_study_has_started_is_not_started_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, folder = version_study(tmp_path), tmp_path / "studies/version"
    folder.mkdir(parents=True)
    with locked_by_family(folder / ".report-00000000.lock"):  # so the job waits
        code = f"from tests.end_to_end.test_study import *; version_study(Path({str(tmp_path)!r}))()"
        killed = subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        until(lambda: "version: runs already" in killed.stderr.readline(), killed)
        killed.kill()
        killed.wait()
        with pytest.raises(UsageError, match="study version is being run by another process"):
            run()
        assert not (folder / "report-00000000.json").exists()
    with locked_by_family(folder / ".lock"):
        assert (folder / "report-00000000.json").exists(), "what is left of the killed study went on"
    assert run() == [str(tmp_path / f"kdcache {__version__}")]
    assert (folder / "logs/report-00000000.log").read_text().count("$ kdcache --version") == 1


@pytest.mark.exhaustive
@pytest.mark.slow
def test_jobs_at_once_have_gpus_of_their_own_and_no_job_runs_twice(tmp_path):
    three = {"dataset": "digits", "teacher": ["test_vit", "test_resnet", "test_convnext"], "train": {"epochs": 500}}
    file = written(tmp_path, archives={"digits": three})
    plan = plan_study(load_study(file), file, Workspace(tmp_path))
    place = study_place("two", Workspace(tmp_path))
    place.folder.mkdir(parents=True)
    place.plan.write_text(json.dumps({"home": str(tmp_path), "data_dir": None, "directory": str(tmp_path)} | plan.as_json()))
    names = [job.id for job in plan.jobs if job.kind == "train"]
    two = os.environ | {"CUDA_VISIBLE_DEVICES": "5,GPU-abc", "TMPDIR": str(tmp_path)}
    jobs = [start("study", "job", place.plan, name, env=two) for name in names]
    started: set[psutil.Process] = set()

    def seen() -> dict[int, str]:
        """What the training of each job sees of the GPUs, by the number of the job."""
        found = {}
        for number, job in enumerate(jobs):
            with contextlib.suppress(psutil.NoSuchProcess):  # it may be ending
                for child in psutil.Process(job.pid).children():
                    if "train-teacher" in child.cmdline():
                        found[number] = child.environ()["CUDA_VISIBLE_DEVICES"]
                        started.add(child)
        return found

    try:
        until(lambda: len(seen()) == 2, jobs[0])
        first = seen()
        assert set(first.values()) == {"5", "GPU-abc"}
        (third,) = {0, 1, 2} - set(first)
        time.sleep(2 * PATIENCE)
        assert seen() == first, "a job did not wait for a GPU"
        ended, kept = first
        jobs[ended].terminate()
        until(lambda: third in seen(), jobs[third])
        assert seen() == {kept: first[kept], third: first[ended]}

        (orphan,) = psutil.Process(jobs[kept].pid).children()
        jobs[kept].kill()
        jobs[kept].wait()
        jobs.append(start("study", "job", place.plan, names[kept], env=two))
        assert "runs already; waits for that" in jobs[-1].stderr.readline()
        assert orphan.is_running()
        orphan.terminate()
        until(lambda: len(jobs) - 1 in seen(), jobs[-1])
    finally:
        for job in jobs:
            job.kill()
            job.communicate(timeout=60)
        for training in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                training.kill()


def on_slurm() -> bool:
    """Whether this machine is a node of a running SLURM."""
    node = ["scontrol", "show", "node", platform.node().partition(".")[0]]
    return shutil.which("sbatch") is not None and subprocess.run(node, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not on_slurm(), reason="this machine is no node of a SLURM")
def test_a_study_runs_on_slurm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    profile = yaml.safe_load((shipped_folder() / "profiles/slurm/config.yaml").read_text())
    profile["default-resources"] |= {"runtime": 5, "cpus_per_task": 1, "mem_mb": 1000}
    profile["slurm-init-seconds-before-status-checks"] = 10
    (tmp_path / "small").mkdir()
    (tmp_path / "small/config.yaml").write_text(yaml.safe_dump(profile))
    assert version_study(tmp_path)(profile="./small") == [str(tmp_path / f"kdcache {__version__}")]
    (log,) = (tmp_path / "studies/version/.snakemake/log").iterdir()
    assert "has been submitted with SLURM jobid" in log.read_text()
