"""Runs a study: Snakemake decides what runs when, and calls `run_job` for each job, which leaves a record when it is done.

Everything of a study is in HOME/studies/NAME: its plan, a record of each finished job, and each job's log.
"""

import datetime
import hashlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from kdcache.archive import open_archive
from kdcache.errors import IncompleteError, KdcacheError, NotFoundError, RetryError, UsageError, printable
from kdcache.report.records import SUMMARY
from kdcache.study.jobs import Job, StudyPlan
from kdcache.study.schema import shipped_folder
from kdcache.study.slots import JOBS_PER_GPU, gpu_slot, gpus, measured
from kdcache.system.energy import SHARED_GPU
from kdcache.system.files import translated_os_errors, write_atomically
from kdcache.system.locks import NoLocksError, locked_by_family, say_no_locks
from kdcache.system.peak import PEAK_FILE, read_peak
from kdcache.system.progress import Progress, Silent
from kdcache.system.refusals import named
from kdcache.workspace import Workspace, read_record, read_teacher

__all__ = ["Place", "command_of", "run_job", "run_study", "study_place"]

LAST_LINES = 8  # of a failed job's log
THREADS = "KDCACHE_THREADS"  # of each job
LIBRARIES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "GOTO_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


@dataclass(frozen=True)
class Place:
    """Where a study's jobs leave what they have to say."""

    folder: Path

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    def record(self, job: str) -> Path:
        return self.folder / f"{job}.json"

    def log(self, job: str) -> Path:
        return self.folder / "logs" / f"{job}.log"

    def peak(self, job: str) -> Path:
        """Where a running job leaves what it took of a GPU."""
        return self.folder / f".{job}.peak"

    def known(self, job: str) -> dict[str, Any] | None:
        """The record of a finished job."""
        return read_record(self.record(job)) if self.record(job).is_file() else None

    def outputs(self, job: str) -> list[str] | None:
        """What a finished job has made; None if it is not finished, or if any of that is not there any more.

        Nor is a job finished where something else has taken the place of what it made: its command, run again, says what.
        """
        if not self.record(job).is_file():
            return None
        record = read_record(self.record(job))
        paths = [str(path) for path in record.get("outputs", [])]
        made = record.get("made") or [None] * len(paths)  # records that were written before have none
        there = all(Path(path).exists() and own in {None, _made_of(Path(path))} for path, own in zip(paths, made, strict=True))
        return paths if there else None

    def done(self, job: str) -> bool:
        return self.outputs(job) is not None


def study_place(name: str, workspace: Workspace) -> Place:
    return Place(workspace.studies.absolute() / name)


def command_of(job: Job, place: Place, workspace: Workspace) -> str:
    """A job's command line to paste, where the outputs that it works on are there; else with the names of their jobs."""
    return shlex.join(["kdcache", *_arguments(job, place, workspace, missing=lambda needed: [f"{{{needed}}}"])])


def _arguments(job: Job, place: Place, workspace: Workspace, missing: Callable[[str], list[str]]) -> list[str]:
    arguments: list[str] = []
    for argument in job.arguments:
        of_job = re.fullmatch(r"\{(\w+-[0-9a-f]{8})\}", argument)
        arguments += (place.outputs(of_job[1]) or missing(of_job[1])) if of_job else [argument]
    if job.needs_gpu:  # what works on images
        arguments += ["--home", str(workspace.home.absolute())]
        arguments += ["--data-dir", str(workspace.data_dir.absolute())] if workspace.data_dir else []
    return arguments


def _made_of(output: Path) -> str | None:
    """What tells an archive, a teacher or a run in a folder from any other, however it grows or is moved.

    Empty for damaged ones, and None for a folder of another kind, such as a report, which may be made again at any time.
    """
    try:
        if (output / "kdcache.json").is_file():
            identity = json.dumps(open_archive(output).manifest.identity, sort_keys=True)
            return hashlib.sha256(identity.encode()).hexdigest()
        if (output / "teacher.json").is_file():
            return str(read_teacher(output)["weights_sha256"])
        if (output / SUMMARY).is_file():
            return hashlib.sha256((output / SUMMARY).read_bytes()).hexdigest()
    except KdcacheError:
        return ""
    return None


def _plain(text: str) -> str:
    return re.sub(r"[^\w.-]", "-", text)[:100]


# ---------------------------------------------------------------- all jobs


def run_study(
    plan: StudyPlan,
    workspace: Workspace,
    progress: Progress | None = None,
    *,
    file: Path,
    jobs: int | None = None,
    jobs_per_gpu: int | None = None,
    profile: str | None = None,
    command: str = "kdcache study run",
) -> list[str]:
    """Run what is missing of a study by Snakemake; what its last jobs made. IncompleteError if any job failed.

    jobs_per_gpu: how many may share a GPU, as far as its memory suffices; None: a few.
    """
    progress = progress or Silent()
    if importlib.util.find_spec("snakemake") is None:
        raise NotFoundError("Snakemake is not installed", why="it runs the jobs of a study", fix="pip install 'kdcache[grid]'")
    if plan.missing:
        raise plan.missing[0]
    for folder in filter(None, (workspace.home.absolute(), workspace.data_dir)):
        if len(str(folder).splitlines()) > 1:
            raise UsageError(
                f"--home or --data-dir {str(folder)!r} breaks a line",
                why="jobs of a study tell each other their folders in lines",
                fix="name another folder, or rename that one",
            )
    jobs_per_gpu = jobs_per_gpu or (JOBS_PER_GPU if profile is None else 1)  # a cluster gives each job a GPU of its own
    place = study_place(plan.name, workspace)
    if all(place.done(job.id) for job in plan.jobs):
        progress.say(f"all {len(plan.jobs)} jobs are done already: nothing to do")
        return _made(plan, place)
    lock = place.folder / ".lock"
    with translated_os_errors(lock):
        place.folder.mkdir(parents=True, exist_ok=True)
    with _family_lock(lock, wait=False) as held:
        if held is None:
            raise UsageError(
                f"study {plan.name} is being run by another process",
                why=f"both would start the same jobs in {place.folder}",
                fix=f"wait for it, or end it (fuser {lock} says which one it is), or copy the study to another name",
            )
        for job in plan.jobs:
            if not place.done(job.id):
                place.record(job.id).unlink(missing_ok=True)
        settings = {
            "study": str(file.absolute()),
            "home": str(workspace.home.absolute()),
            "data_dir": str(workspace.data_dir.absolute()) if workspace.data_dir else None,
            "directory": str(Path.cwd()),
            "jobs_per_gpu": jobs_per_gpu,
        }
        write_atomically(place.plan, json.dumps(settings | plan.as_json(), indent=1).encode())
        todo = [job for job in plan.jobs if not place.done(job.id)]
        progress.say(f"{len(plan.jobs) - len(todo)} of {len(plan.jobs)} jobs are done already; logs: {place.folder / 'logs'}")
        if todo:
            _snakemake(place, held, jobs, jobs_per_gpu, profile)
        failed = [job for job in plan.jobs if not place.done(job.id) and all(map(place.done, job.after))]
        if failed:
            _tell(failed, plan, place, workspace, progress, command)
    return _made(plan, place)


def _made(plan: StudyPlan, place: Place) -> list[str]:
    """What the last jobs of a study have made."""
    last = [job for job in plan.jobs if job.kind in {"stats", "report"}]
    return [path for job in last for path in place.outputs(job.id) or ()]


def _snakemake(place: Place, locks: Sequence[int], jobs: int | None, jobs_per_gpu: int, profile: str | None) -> None:
    slots = len(gpus()) * jobs_per_gpu  # those without room wait for it by themselves
    call = [sys.executable, "-m", "snakemake", "--snakefile", str(shipped_folder() / "Snakefile")]
    call += ["--directory", str(place.folder), "--config", f"plan={place.plan.name}"]
    # What is to be done again is decided by kdcache, which knows of every job whether its outputs are there.
    call += ["--keep-going", "--rerun-incomplete", "--rerun-triggers", "mtime", "--nolock"]
    environment = os.environ | threads_for(1)
    if profile is None:
        at_once = jobs or max(1, slots)
        environment |= threads_for(at_once)
        call += ["--cores", str(at_once), "--retries", "1", "--quiet", "all"]
        call += ["--resources", f"gpu={slots}"] if slots else []
    else:
        ours = shipped_folder() / "profiles" / profile
        call += ["--profile", str(ours) if ours.is_dir() and not Path(profile).is_dir() else profile]
        call += ["--jobs", str(jobs)] if jobs else []
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as a script has it that starts this with `&`
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # A group of its own: Ctrl-C reaches it through this process only, and once. If this process is killed, it goes on.
    process = subprocess.Popen(call, start_new_session=True, pass_fds=locks, env=environment)
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with process:
        try:
            process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGINT)  # at SIGTERM, Snakemake would wait for the jobs of a cluster
            process.wait()
            raise


def threads_for(jobs: int) -> dict[str, str]:
    """How many threads each job may have of those that run at once: as many as the user says, or else a part of the cores, since
    each would take all of them and wait for the others'; nothing, which is all, for a single one."""
    part = str(max(1, len(os.sched_getaffinity(0)) // jobs)) if jobs > 1 else ""
    return {THREADS: os.environ.get("OMP_NUM_THREADS", part)}


def _own_environment() -> dict[str, str]:
    """What a job's command sees: Snakemake has set every library's threads to one, whatever they were."""
    environment = dict(os.environ)
    if (threads := environment.pop(THREADS, None)) is not None:
        for name in LIBRARIES:
            environment.pop(name, None)
        environment |= {"OMP_NUM_THREADS": threads} if threads else {}
    return environment


@contextmanager
def _family_lock(
    path: Path, *, wait: bool = True, waiting: Callable[[], None] = lambda: None
) -> Iterator[tuple[int, ...] | None]:
    """The descriptor of a lock, which a child that inherits it holds too; none of it without locks, which is said once.

    None if another process holds it.
    """
    with ExitStack() as kept:
        try:
            with translated_os_errors(path):
                held = kept.enter_context(locked_by_family(path, wait=wait, waiting=waiting))
        except NoLocksError:
            say_no_locks()
            yield ()
            return
        yield None if held is None else (held,)


def _tell(failed: Sequence[Job], plan: StudyPlan, place: Place, workspace: Workspace, progress: Progress, command: str) -> None:
    """Say of every failed job what its log ends with. Raises IncompleteError."""
    for job in failed:
        progress.say(f"failed: {job.title}\n  {command_of(job, place, workspace)}\n  its log {place.log(job.id)} ends with")
        for line in _tail(place.log(job.id)) or ["(there is none: it was never started; Snakemake says above why)"]:
            progress.say(f"  | {printable(line)}")
    waiting = sum(not place.done(job.id) for job in plan.jobs) - len(failed)
    done = [path for job in plan.jobs if job.kind == "distill" for path in place.outputs(job.id) or ()]
    if done:
        parents = dict.fromkeys(str(Path(path).parent) for path in done)
        progress.say(f"a report of the students that are there: {shlex.join(['kdcache', 'report', *parents])}")
    raise IncompleteError(
        f"{len(failed)} of {len(plan.jobs)} jobs of study {plan.name} failed",
        why=f"see the end of each one's log above; {waiting} jobs wait for them" if waiting else "see the end of its log above",
        fix=f"mend the cause, then go on with what is missing: {command}",
    )


def _tail(log: Path) -> list[str]:
    if not log.is_file():
        return []
    with log.open(errors="replace") as file:
        return [line.rstrip() for line in deque(file, LAST_LINES)]


# ---------------------------------------------------------------- one job


def run_job(plan_file: Path, name: str, progress: Progress | None = None) -> int:
    """Run one job of a plan as a process of its own, with a place on a GPU; its exit status. 0: it is done and recorded."""
    progress = progress or Silent()
    plan, place = read_record(plan_file), Place(plan_file.absolute().parent)
    known = {field.name for field in fields(Job)}  # plans that were written before have more
    stored = (Job(**{key: value for key, value in each.items() if key in known}) for each in plan["jobs"])
    jobs = {each.id: each for each in stored}
    if (job := jobs.get(name)) is None:
        raise NotFoundError(f"no job {name}", why=f"{plan_file} has none of that name", fix="use one of those that it lists")

    def not_done(other: str) -> list[str]:
        raise IncompleteError(
            f"job {other} is not done",
            why=f"{name} works on what it makes",
            fix=f"kdcache study job {shlex.quote(str(plan_file))} {shlex.quote(other)}",
        )

    def students() -> None:
        progress.say(f"{job.title}: waits for a job with the same students")

    def twice() -> None:  # as what a killed study or job has left behind goes on
        progress.say(f"{job.title}: runs already; waits for that")

    for other in job.after:
        if not place.done(other):
            not_done(other)
    workspace = Workspace(Path(plan["home"]), Path(plan["data_dir"]) if plan["data_dir"] else None)
    arguments = _arguments(job, place, workspace, not_done) + (["--json"] if job.kind == "distill" else [])
    place.log(name).parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        own_lock = held.enter_context(_family_lock(place.folder / f".{name}.lock", waiting=twice))
        locks = own_lock or ()
        if place.done(name):
            return 0
        if job.alone:
            shared = place.folder / f".alone-{_plain(job.alone)}.lock"
            shared_lock = held.enter_context(_family_lock(shared, waiting=students))
            locks += shared_lock or ()
        begun = time.monotonic()

        def call(environment: dict[str, str], *more: int) -> tuple[int, str]:
            progress.say(f"started: {job.title} (log: {place.log(name)})")
            own = _own_environment() | {PEAK_FILE: str(place.peak(name))} | environment
            return _call(arguments, own, Path(plan["directory"]), place.log(name), [*locks, *more])

        devices = gpus() if job.needs_gpu else []
        if devices:
            needed = partial(measured, job, jobs, place.known)
            status, printed = _on_gpu(call, devices, needed, plan.get("jobs_per_gpu", 1), job.title, progress)
        else:
            status, printed = call({})
        peak = read_peak(place.peak(name))
        place.peak(name).unlink(missing_ok=True)
    if status:
        progress.say(f"failed with exit status {status}: {job.title} (log: {place.log(name)})")
        return status
    seconds = time.monotonic() - begun
    outputs = _outputs(job, arguments, printed, Path(plan["directory"]))
    record = {
        "command": shlex.join(["kdcache", *arguments]),
        "title": job.title,
        "outputs": outputs,
        "made": [_made_of(Path(output)) for output in outputs],
        "seconds": round(seconds, 1),
        **({} if peak is None else {"gpu_bytes": peak}),
        "ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_atomically(place.record(name), json.dumps(record, indent=1).encode())
    progress.say(f"done in {seconds:.0f} s: {job.title}")
    return 0


def _on_gpu(
    call: Callable[..., tuple[int, str]],
    devices: Sequence[str],
    needed: Callable[[], int | None],
    most: int,
    title: str,
    progress: Progress,
) -> tuple[int, str]:
    """Call with a place on a GPU; once more with a GPU to itself, if memory did not suffice beside other jobs."""
    with gpu_slot(devices, needed, most=most) as slot:
        shared = {} if slot.claim is None else {SHARED_GPU: "1"}
        status, printed = call({"CUDA_VISIBLE_DEVICES": slot.gpu} | shared, slot.lock)
    if slot.claim is None or status != RetryError.exit_code:
        return status, printed
    progress.say(f"exit status {status} beside other jobs on GPU {slot.gpu}; it is tried again on a GPU of its own: {title}")
    with gpu_slot(devices, needed, most=most, alone=True) as slot:
        return call({"CUDA_VISIBLE_DEVICES": slot.gpu}, slot.lock)


def _call(
    arguments: Sequence[str], environment: Mapping[str, str], directory: Path, log: Path, locks: Sequence[int]
) -> tuple[int, str]:
    """Exit status and stdout of a command line of kdcache; both what it prints and what it notes are added to the log.

    It holds `locks` as long as it runs, even if this process is killed.
    """
    with log.open("a") as file:
        with named(log):
            file.write(f"$ {shlex.join(['kdcache', *arguments])}\n")
            file.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", "kdcache", *arguments],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env=dict(environment),
            cwd=directory,
            pass_fds=locks,
            start_new_session=True,  # a signal reaches it once, from here: at a second one it would not finish its checkpoint
        )
        try:
            printed, _ = process.communicate()
        except KeyboardInterrupt:
            process.terminate()
            process.communicate()
            raise
        file.write(printed)
    return process.returncode, printed


def _outputs(job: Job, arguments: Sequence[str], printed: str, directory: Path) -> list[str]:
    """What a job has made, as absolute paths."""
    if job.kind == "distill":
        return [str(directory / run["run"]) for run in json.loads(printed)]
    if job.kind == "stats":
        return [arguments[arguments.index("--plot") + 1]]
    return [str(directory / printed.splitlines()[-1])]
