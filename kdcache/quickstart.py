"""quickstart: the whole way once, on real handwritten digits, by the same functions as the commands."""

from dataclasses import dataclass
from pathlib import Path

from kdcache.archive import open_archive
from kdcache.report import Table, collect, summarise, write_report
from kdcache.students.config import DistillConfig, Grid
from kdcache.students.distill import distill
from kdcache.system.progress import Progress
from kdcache.teachers.config import DumpConfig, DumpRecipe, TeacherAndData
from kdcache.teachers.dump import dump_teacher
from kdcache.training.config import Runtime, StudentRuntime
from kdcache.workspace import Workspace

__all__ = ["QuickstartResult", "quickstart"]

TEACHER, DATASET, VIEWS = "test_vit", "digits", 8
STUDENT, EPOCHS = "test_resnet", 4
TAUS, CONTROLS, SEEDS = (1.0, 4.0, 20.0), ("none", "ls-global", "ls-instance", "bottom:3"), (0, 1)


@dataclass(frozen=True)
class QuickstartResult:
    """The students' `table`, the teacher's top-1 on clean test images in percent, and the report's path."""

    table: Table
    teacher_top1: float
    report: Path


def quickstart(
    workspace: Workspace, progress: Progress, *, runtime: Runtime | None = None, command: str = "kdcache quickstart"
) -> QuickstartResult:
    """Train a small teacher, dump 8 views, train 24 students of it and write the report; what is there already is reused."""
    progress.say("1 of 4: a teacher, and its logits of 8 views of every training image")
    runtime = runtime or Runtime()
    subject, recipe = TeacherAndData(teacher=TEACHER, dataset=DATASET), DumpRecipe(views=VIEWS)
    dump = DumpConfig(subject=subject, recipe=recipe, runtime=runtime, command=command)
    archive = open_archive(dump_teacher(dump, workspace, progress))
    students = len(TAUS) * len(CONTROLS) * len(SEEDS)
    progress.say(
        f"2 of 4: {students} students on {len(SEEDS)} streams: tau {', '.join(f'{t:g}' for t in TAUS)} x {', '.join(CONTROLS)}"
    )
    results = distill(
        DistillConfig(
            archive=(str(archive.path),),
            grid=Grid(tau=TAUS, control=CONTROLS, student=(STUDENT,), seed=SEEDS, epochs=EPOCHS),
            runtime=StudentRuntime(**runtime.given()),
            command=command,
        ),
        workspace,
        progress,
    )
    progress.say("3 of 4: every stored view and file is what it says it is")
    archive.verify("full", progress).raise_if_failed()
    progress.say("4 of 4: the report")
    folders = [result.spec.folder for result in results]
    report = write_report(folders, workspace.reports / "quickstart", progress=progress)
    teacher = archive.manifest.teacher
    top1 = teacher.top1_clean if teacher and teacher.top1_clean is not None else float("nan")
    return QuickstartResult(summarise(collect(folders)), top1, report.html)
