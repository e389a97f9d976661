"""Commands that make something: teachers, archives, students, reports."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kdcache.cli.commands import Of
from kdcache.cli.options import (
    AllowLargeOption,
    ConfigOption,
    DataDirOption,
    DryRunOption,
    ForceOption,
    HomeOption,
    JsonOption,
    SkipCorruptOption,
    command_line,
    view_range,
    workspace,
)
from kdcache.cli.output import bars, print_json, print_table
from kdcache.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from kdcache.students.config import DistillConfig
    from kdcache.students.distill import StudentResult
    from kdcache.teachers.config import DumpConfig, TeacherConfig


def quickstart(
    home: HomeOption = Path(),
    data_dir: DataDirOption = None,
    workers: Annotated[int, Of("Runtime", "workers")] = 0,
    device: Annotated[str, Of("Runtime", "device")] = "auto",
) -> None:
    """Everything once, on real handwritten digits: teacher, archive, students, report. A second run reuses all of it."""
    from kdcache.quickstart import quickstart as run
    from kdcache.training.config import Runtime

    with bars() as progress:
        runtime = Runtime(device=device, workers=workers)
        result = run(workspace(home, data_dir), progress, runtime=runtime, command=command_line())
    table = result.table
    print_table(
        ["control", *(f"tau {tau:g}" for tau in table.taus)],
        [[row.control, *(str(cell) if (cell := table.get(row, tau)) else None for tau in table.taus)] for row in table.rows],
        title=f"students' top-1 in % (teacher {result.teacher_top1:.2f}), mean ± std (seeds)",
    )
    print(result.report)


def train_teacher(
    options: "TeacherConfig",
    skip_corrupt: SkipCorruptOption = False,
    allow_large: AllowLargeOption = False,
    force: ForceOption = False,
    home: HomeOption = Path(),
    data_dir: DataDirOption = None,
    config: ConfigOption = None,
) -> None:
    """Finetune teachers, train them from scratch, or take trained weights. Prints each one's folder; nothing is trained twice."""
    from kdcache.system.distributed import this_rank
    from kdcache.teachers.train import train_teachers

    place, speaker = workspace(home, data_dir, skip_corrupt, allow_large, force=force), this_rank().first
    with bars(quiet=not speaker) as progress:
        teachers = train_teachers(options, place, progress)
    for teacher in teachers if speaker else ():
        print(teacher.folder)


def dump_teacher(
    options: "DumpConfig",
    skip_corrupt: SkipCorruptOption = False,
    allow_large: AllowLargeOption = False,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    home: HomeOption = Path(),
    data_dir: DataDirOption = None,
    config: ConfigOption = None,
) -> None:
    """Run a teacher over all views and keep its logits. The last line is the archive's folder; run again to resume."""
    from kdcache.system.distributed import this_rank
    from kdcache.teachers.dump import dump_teacher as dump
    from kdcache.teachers.dump import sketch_dump

    speaker = this_rank().first
    with bars(quiet=not speaker) as progress:
        place = workspace(home, data_dir, skip_corrupt, allow_large, force=force)
        path = str(sketch_dump(options, place, progress) if dry_run else dump(options, place, progress))
    if speaker:
        print(path)


def convert(
    archive: Annotated[str, typer.Argument(help="Folder, name or URL of an archive.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder [HOME/archives/NAME-WHAT]")] = None,
    layout: Annotated[
        str | None, typer.Option(help="zarr, zarr:bitshuffle or zarr:pcodec (to publish), hdf5, webdataset [as it is]")
    ] = None,
    codec: Annotated[str | None, typer.Option(help="i16, f16, f32 or u8; the lossy ones lose again [as it is]")] = None,
    views: Annotated[str | None, typer.Option(help="Keep the views FIRST:STOP only.")] = None,
    stats_only: Annotated[bool, typer.Option("--stats-only", help="Leave out the logits.")] = False,
    dry_run: DryRunOption = False,
    home: HomeOption = Path(),
    config: ConfigOption = None,
) -> None:
    """Write an archive in another layout (its digest stays), by another codec, or in part. Run again to resume."""
    from kdcache.archive import derive, derived_plan, stored_bytes
    from kdcache.sharing.push_pull import part_label

    place = workspace(home)
    with bars() as progress:
        source = place.open_archive(archive, progress)
        chosen = view_range(views, source.views) if views else None
        contents: Literal["all", "statistics"] = "statistics" if stats_only else "all"
        changed = [source.name, layout, codec, part_label(source, chosen, contents)]
        name = "-".join(re.sub(r"[^\w.+-]+", "-", word) for word in changed if word)
        path = output or place.archives / name
        if dry_run:
            plan = derived_plan(source, layout=layout, codec=codec, views=chosen, contents=contents)
            progress.say(f"{plan.num_views} views of {plan.num_samples} samples: {stored_bytes(plan) / 1e6:.1f} MB uncompressed")
        else:
            path = derive(source, path, layout=layout, codec=codec, views=chosen, contents=contents, progress=progress).path
    print(path)


def finalize(archive: Annotated[Path, typer.Argument(help="Folder of an unfinished archive.")]) -> None:
    """Write the manifest of an archive whose shards were dumped by several processes."""
    from kdcache.archive import ArchiveWriter, open_archive, sweep

    with bars() as progress:
        try:
            finished = ArchiveWriter.resume(archive).finalize(progress)
        except NotFoundError:  # nothing is being written there
            finished = open_archive(archive)
            sweep(archive)
            progress.say(f"{archive} is complete with {finished.num_views} views: nothing to do")
    print(finished.path)


def distill(
    options: "DistillConfig",
    skip_corrupt: SkipCorruptOption = False,
    allow_large: AllowLargeOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    home: HomeOption = Path(),
    data_dir: DataDirOption = None,
    config: ConfigOption = None,
) -> None:
    """Train students from an archive: every combination of the lists, all of one seed on one stream of views."""
    from kdcache.students.distill import distill as run
    from kdcache.students.distill import planned
    from kdcache.students.grid import doubts, open_archives
    from kdcache.system.distributed import this_rank

    place = workspace(home, data_dir, skip_corrupt, allow_large, force=options.grid.force)
    speaker = this_rank().first
    with bars(quiet=not speaker) as progress:
        if not dry_run:
            results = run(options, place, progress)
        else:
            archive, second = open_archives(options, place, progress)
            specs = planned(options, archive, second, place)
            epochs = specs[0].settings.epochs
            for doubt in doubts(specs, options.grid, archive.manifest.policy.size if archive.manifest.policy else 0):
                progress.say(doubt)
            trained = [(spec.folder / "summary.json").is_file() for spec in specs]
            number = f"{len(specs)} student{'s' * (len(specs) != 1)} of {epochs} epoch{'s' * (epochs != 1)}"
            progress.say(f"{number}, {sum(trained)} of them trained already")
    if not speaker:
        return
    if dry_run and as_json:
        print_json([{**_described(spec), "trained": done} for spec, done in zip(specs, trained, strict=True)])
    elif dry_run:
        rows = [[spec.title, "yes" if done else "no"] for spec, done in zip(specs, trained, strict=True)]
        print_table(["student", "trained"], rows)
    elif as_json:
        print_json([{**_described(result.spec), **result.summary} for result in results])
    else:
        _print_results(results)


def _described(spec: Any) -> dict[str, Any]:
    """One student for `--json`: its settings as they are typed, and its folder."""
    from kdcache.methods import METHODS
    from kdcache.targets import CONTROLS

    return {
        "student": spec.student,
        "method": METHODS.spec(spec.method),
        "control": CONTROLS.spec(spec.control),
        "tau": spec.tau,
        "seed": spec.seed,
        "init": spec.start.name,
        **spec.settings.model_dump(mode="json"),
        "run": str(spec.folder),
    }


def _print_results(results: "list[StudentResult]") -> None:
    rows = []
    for spec, summary in ((result.spec, result.summary) for result in results):
        shown, complete = _described(spec), summary["status"] == "complete"
        top1 = f"{summary['final_top1']:.2f}" if complete else summary["status"]
        best = f"{summary['best_top1']:.2f}" if summary["best_top1"] is not None else None
        rows.append([spec.student, shown["method"], shown["control"], spec.tau_text, spec.seed, top1, best, spec.folder])
    print_table(["student", "method", "control", "tau", "seed", "top-1", "best", "run"], rows)


def report(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run folders, or folders that hold some; or archives [HOME/runs]")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the report [HOME/reports/latest]")] = None,
    study: Annotated[
        str | None, typer.Option(help="A study's file or name: the report opens with what it asks and expects.")
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="The runs are of the study's smoke version; the report says so.")
    ] = False,
    home: HomeOption = Path(),
) -> None:
    """Write an offline HTML report, figures, LaTeX tables and a CSV file from finished runs, or from archives alone."""
    from kdcache.report import are_archives, write_archive_page, write_report

    experiment = None
    if study is not None:
        from kdcache.study.schema import find_study, load_study

        experiment = load_study(find_study(study)).experiment(smoke=smoke)
    elif smoke:
        raise UsageError("--smoke without --study", why="only a study has a smoke version", fix="name it: --study FILE")
    place = workspace(home)
    with bars() as progress:
        paths, out = runs or [place.runs], output or place.reports / "latest"
        if are_archives(paths):
            page = write_archive_page(paths, out, experiment=experiment, progress=progress).html
        else:
            page = write_report(paths, out, experiment=experiment, progress=progress).html
    print(page)
