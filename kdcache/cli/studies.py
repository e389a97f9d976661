"""`kdcache study`: experiments that are written down in a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcache.cli.options import DataDirOption, DryRunOption, HomeOption, JsonOption, command_line, workspace
from kdcache.cli.output import bars, print_json
from kdcache.errors import UsageError, printable

if TYPE_CHECKING:
    from kdcache.study.jobs import StudyPlan
    from kdcache.study.schema import Study
    from kdcache.workspace import Workspace

__all__ = ["job", "plan", "run"]

StudyArgument = Annotated[str, typer.Argument(metavar="FILE", help="A study: a YAML file, or the name of one of kdcache's own.")]
SmokeOption = Annotated[bool, typer.Option("--smoke", help="The same jobs in small: tiny models and few epochs, on a CPU.")]


def _planned(file: str, smoke: bool, where: "Workspace") -> "tuple[Path, Study, StudyPlan]":
    """The study's file, what it says, and its jobs."""
    from kdcache.study.jobs import plan_study
    from kdcache.study.schema import find_study, load_study

    found = find_study(file)
    study = load_study(found, smoke=smoke)
    return found, study, plan_study(study, found, where, smoke=smoke)


def run(
    file: StudyArgument,
    smoke: SmokeOption = False,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, help="Jobs that run at once [as many as GPUs have places for; with --profile, its own]"),
    ] = None,
    jobs_per_gpu: Annotated[
        str,
        typer.Option(
            "--jobs-per-gpu",
            metavar="N|auto",
            help="Jobs that share a GPU, as far as its memory is known to suffice. Their device-hours and energy are unknown, "
            "except with 1.",
        ),
    ] = "auto",
    profile: Annotated[str | None, typer.Option("--profile", help="A profile of Snakemake; slurm: kdcache's own.")] = None,
    dry_run: DryRunOption = False,
    home: HomeOption = Path(),
    data_dir: DataDirOption = None,
) -> None:
    """Run what is missing of a study. The last line is its report; after a change, run it again: only what is new is done."""
    from kdcache.study.running import run_study

    most = _jobs_per_gpu(jobs_per_gpu)
    place = workspace(home, data_dir)
    found, study, planned = _planned(file, smoke, place)
    if dry_run:
        _print_plan(study, planned, place, smoke)
        return
    with bars() as progress:
        progress.say(f"{study.title} ({study.paper}): {study.question}")
        made = run_study(
            planned, place, progress, file=found, jobs=jobs, jobs_per_gpu=most, profile=profile, command=command_line()
        )
    for path in made:
        print(path)


def _jobs_per_gpu(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or not int(text):
        raise UsageError(
            f"--jobs-per-gpu {text}",
            why="it is a number of jobs, from 1 on, or auto",
            fix="--jobs-per-gpu auto, or 1 for no sharing",
        )
    return int(text)


def plan(
    file: StudyArgument,
    smoke: SmokeOption = False,
    as_json: JsonOption = False,
    home: HomeOption = Path(),
    data_dir: DataDirOption = None,
) -> None:
    """List the jobs of a study. Each as a command line, and whether it is done; with students, bytes and GPU-hours."""
    from kdcache.study.running import command_of, study_place

    where = workspace(home, data_dir)
    found, study, planned = _planned(file, smoke, where)
    if not as_json:
        _print_plan(study, planned, where, smoke)
        return
    place = study_place(planned.name, where)
    print_json(
        {
            "study": str(found),
            "title": study.title,
            "students": planned.students,
            "student_images": planned.images,
            "archive_bytes": planned.archive_bytes,
            "gpu_hours": None if smoke else study.cost.gpu_hours,
            "missing": [error.what for error in planned.missing],
            "jobs": [
                {
                    "id": job.id,
                    "title": job.title,
                    "after": job.after,
                    "command": command_of(job, place, where),
                    "done": place.done(job.id),
                }
                for job in planned.jobs
            ],
        }
    )


def job(
    plan: Annotated[Path, typer.Argument(help="HOME/studies/NAME/plan.json, which run wrote.")],
    name: Annotated[str, typer.Argument(help="The job's name there.")],
) -> None:
    """Run one job, as Snakemake does. On a GPU that no other job has; its notes are in a log, its end is recorded."""
    from kdcache.study.running import run_job

    with bars() as progress:
        status = run_job(plan, name, progress)
    raise typer.Exit(status)


def _print_plan(study: "Study", planned: "StudyPlan", where: "Workspace", smoke: bool) -> None:
    """The plan as a shell script: what is known of it in comments, then every job's command line."""
    from kdcache.study.running import command_of, study_place

    place = study_place(planned.name, where)
    done = {job.id for job in planned.jobs if place.done(job.id)}
    lines = [f"{study.title} ({study.paper})", study.question, f"varies: {study.varies}", f"expected: {study.expected}"]
    archives = sum(job.kind == "dump" for job in planned.jobs)
    size = f"{(study.cost.archive_bytes if planned.archive_bytes is None else planned.archive_bytes) / 1e6:,.1f} MB"
    images = f", {planned.images / 1e6:,.2f} million images" if planned.images else ""
    source = ", as the study has it" if planned.archive_bytes is None else ""
    lines.append(f"{len(planned.jobs)} jobs, {len(done)} of them done; archives: {archives}, {size}{source}")
    lines.append(f"{planned.students} students{images}")
    if not smoke:
        lines.append(f"GPU-hours, as the study has it: {study.cost.gpu_hours:,g}; {study.cost.note}")
    lines += [f"missing: {error.what}" for error in planned.missing]
    for line in lines:
        print(f"# {printable(line)}")
    for job in planned.jobs:
        print(f"\n# {job.id}{' (done)' if job.id in done else ''}: {printable(job.title)}\n{command_of(job, place, where)}")
