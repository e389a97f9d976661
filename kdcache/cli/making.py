"""Commands that make something: teachers, archives, students, reports."""

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from kdcache.cli.options import (
    AMP,
    CLIP_GRAD,
    DECAY_EPOCHS,
    DECAY_RATE,
    MODEL_EMA,
    MOMENTUM,
    MOST,
    SCHED,
    VAL_INTERVAL,
    WEIGHT_DECAY,
    AllowDriftOption,
    ConfigOption,
    DataDirOption,
    DatasetOption,
    DeviceOption,
    DryRunOption,
    HomeOption,
    RendererOption,
    SkipCorruptOption,
    WorkersOption,
    command_line,
    floats,
    integers,
    share,
    size_in_bytes,
    specs,
    temperatures,
    triple,
    view_range,
    workspace,
)
from kdcache.cli.output import bars, print_table
from kdcache.errors import NotFoundError, UsageError

REFERENCES = "hf-hub:ORG/NAME[@REVISION], local-dir:PATH or package.module:function"
TeacherOption = Annotated[str, typer.Option("--teacher", help=f"Alias (vit_s, rn50, ...), timm name, {REFERENCES}.")]
PolicyOption = Annotated[
    str | None,
    typer.Option(
        "--policy", help="View policy: a preset or YAML file, with changes if any: pets:hflip=0,randaugment.m=9 [the dataset's]."
    ),
]
SizeOption = Annotated[int | None, typer.Option("--size", min=8, help="Side of a view in pixels [the policy's].")]
CanvasOption = Annotated[
    int | None, typer.Option("--canvas", min=8, help="Side of the decoded images in pixels [the dataset's].")
]
BatchOption = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images per step.")]


def quickstart(
    home: HomeOption = Path(),
    data_dir: DataDirOption = None,
    workers: WorkersOption = 0,
    device: DeviceOption = "auto",
) -> None:
    """Everything once, on real handwritten digits: teacher, archive, students, report. A second run reuses all of it."""
    from kdcache.quickstart import quickstart as run

    with bars() as progress:
        result = run(workspace(home, data_dir), progress, device=device, workers=workers, command=command_line())
    table = result.table
    print_table(
        ["control", *(f"tau {tau:g}" for tau in table.taus)],
        [[row.control, *(str(cell) if (cell := table.get(row, tau)) else None for tau in table.taus)] for row in table.rows],
        title=f"students' top-1 in % (teacher {result.teacher_top1:.2f}), mean ± std (seeds)",
    )
    print(result.report)


def train_teacher(
    teacher: TeacherOption,
    dataset: DatasetOption,
    epochs: Annotated[
        str,
        typer.Option(
            "--epochs",
            help="A teacher for each, such as 20,50,200,400, trained at once; paper: the temperature study's; 0: weights as they "
            "are [the recipe's, or the dataset's]",
        ),
    ] = "",
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", help="Published settings, where flags do not say otherwise: study, or crd [crd for CIFAR's own models]"
        ),
    ] = None,
    policy: PolicyOption = None,
    size: SizeOption = None,
    canvas: CanvasOption = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", "-b", min=1, help="Images per step [64]")] = None,
    opt: Annotated[str | None, typer.Option(help="Optimiser, a timm name [adamw]")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate [5e-4 for CNNs, 5e-5 for ViTs, 2e-3 from scratch]")] = None,
    momentum: Annotated[float | None, MOMENTUM] = None,
    sched: Annotated[Literal["cosine", "step"] | None, SCHED] = None,
    decay_epochs: Annotated[str, DECAY_EPOCHS] = "",
    decay_rate: Annotated[float | None, DECAY_RATE] = None,
    amp: Annotated[bool, AMP] = False,
    model_ema: Annotated[float | None, MODEL_EMA] = None,
    val_interval: Annotated[int, VAL_INTERVAL] = 1,
    weight_decay: Annotated[float | None, typer.Option(min=0, help="[0.05; 0.1 for ViTs]")] = None,
    clip_grad: Annotated[float | None, CLIP_GRAD] = None,
    smoothing: Annotated[float | None, typer.Option(min=0, max=1, help="Label smoothing [0.1]")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST)] = 0,
    from_scratch: Annotated[
        bool | None,
        typer.Option("--from-scratch/--pretrained", help="Start at random or from timm's weights [as suits the dataset]."),
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Start from these weights (.safetensors, .pth).")] = None,
    mean: Annotated[str, typer.Option(help="Of pixels in [0, 1], that the checkpoint was trained with [the model's]")] = "",
    std: Annotated[str, typer.Option(help="Likewise.")] = "",
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    renderer: RendererOption = "auto",
    skip_corrupt: SkipCorruptOption = False,
    home: HomeOption = Path(),
    data_dir: DataDirOption = None,
    config: ConfigOption = None,
) -> None:
    """Finetune teachers, train them from scratch, or take trained weights. Prints each one's folder; nothing is trained twice."""
    from kdcache.teachers.train import TeacherConfig, train_teachers

    settings = TeacherConfig(
        teacher=teacher,
        dataset=dataset,
        epochs="paper" if epochs == "paper" else integers(epochs, "--epochs") if epochs else (),
        recipe=recipe,
        policy=policy,
        size=size,
        canvas=canvas,
        batch_size=batch_size,
        opt=opt,
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        sched=sched,
        decay_epochs=integers(decay_epochs, "--decay-epochs") if decay_epochs else (),
        decay_rate=decay_rate,
        clip_grad=clip_grad,
        amp=amp,
        ema_decay=model_ema,
        val_interval=val_interval,
        smoothing=smoothing,
        seed=seed,
        from_scratch=from_scratch,
        checkpoint=checkpoint,
        mean=triple(mean, "--mean") if mean else None,
        std=triple(std, "--std") if std else None,
        device=device,
        workers=workers,
        renderer=renderer,
        command=command_line(),
    )
    with bars() as progress:
        trained = train_teachers(settings, workspace(home, data_dir, skip_corrupt), progress)
    for each in trained:
        print(each.folder)


def dump_teacher(
    teacher: TeacherOption,
    dataset: DatasetOption,
    views: Annotated[
        int | None, typer.Option(min=1, help="Views of every sample; more than before appends [the dataset's recipe]")
    ] = None,
    policy: PolicyOption = None,
    view_seed: Annotated[int | None, typer.Option(min=0, help="Seed of the views [0]")] = None,
    size: SizeOption = None,
    canvas: CanvasOption = None,
    batch_size: BatchOption = 64,
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"] | None, typer.Option(help="Of the teacher [fp16 on a GPU, fp32 on a CPU]")
    ] = None,
    codec: Annotated[str, typer.Option(help="How logits are stored: i16 or f16 (2 bytes), f32, u8 (1 byte).")] = "i16",
    layout: Annotated[str, typer.Option(help="How files are laid out: zarr, hdf5, webdataset.")] = "zarr",
    shard_rows: Annotated[int | None, typer.Option(min=1, help="Rows of a shard [64 MiB of logits]")] = None,
    finetune: Annotated[bool, typer.Option("--finetune/--no-finetune", help="Train the teacher first if there is none.")] = True,
    teacher_folder: Annotated[Path | None, typer.Option(help="This trained teacher, not the newest.")] = None,
    teacher_epochs: Annotated[
        int | None, typer.Option(min=0, help="The newest trained for so many epochs; 0: with weights as they are [any]")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="The teacher's weights, as they are unless --teacher-epochs says more (.safetensors, .pth)."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Archive folder [HOME/archives/NAME]")] = None,
    start_view: Annotated[int, typer.Option(min=0, help="View to begin with; changes nothing in the archive.")] = 0,
    shard: Annotated[
        str | None, typer.Option(help="I/N: write every N-th shard only, from number I on; for arrays of jobs [all shards]")
    ] = None,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    renderer: RendererOption = "auto",
    skip_corrupt: SkipCorruptOption = False,
    dry_run: DryRunOption = False,
    home: HomeOption = Path(),
    data_dir: DataDirOption = None,
    config: ConfigOption = None,
) -> None:
    """Run a teacher over all views and keep its logits. The last line is the archive's folder; run again to resume."""
    from kdcache.system.distributed import this_rank
    from kdcache.teachers.dump import DumpConfig, sketch_dump
    from kdcache.teachers.dump import dump_teacher as dump

    settings = DumpConfig(
        teacher=teacher,
        dataset=dataset,
        views=views,
        policy=policy,
        view_seed=view_seed,
        size=size,
        canvas=canvas,
        batch_size=batch_size,
        precision=precision,
        codec=codec,
        layout=layout,
        shard_rows=shard_rows,
        finetune=finetune,
        teacher_folder=teacher_folder,
        teacher_epochs=teacher_epochs,
        checkpoint=checkpoint,
        output=output,
        start_view=start_view,
        share=None if shard is None else share(shard),
        device=device,
        workers=workers,
        renderer=renderer,
        command=command_line(),
    )
    speaker = this_rank().first
    with bars(quiet=not speaker) as progress:
        place = workspace(home, data_dir, skip_corrupt)
        path = str(sketch_dump(settings, place, progress) if dry_run else dump(settings, place, progress))
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
    tau: Annotated[str | None, typer.Option("--tau", help="Temperatures, such as 1,4,20 [1, or the preset's]")] = None,
    method: Annotated[str | None, typer.Option("--method", help="Methods; see kdcache methods [kd, or the preset's]")] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="Published settings, paper:METHOD:DATASET; see kdcache methods --presets.")
    ] = None,
    control: Annotated[str, typer.Option("--control", help="none, ls-global, ls-instance, bottom:K, topk:K.")] = "none",
    student: Annotated[str, typer.Option("--student", help=f"Aliases, timm names, {REFERENCES} [the dataset's].")] = "",
    init: Annotated[
        str, typer.Option("--init", help="What students start from: random, pretrained, target, finetuned, or weights (a path).")
    ] = "random",
    seed: Annotated[str, typer.Option("--seed", help="Seeds, such as 0-2.")] = "0",
    archive: Annotated[
        list[str] | None,
        typer.Option("--archive", help="Archive folder or name [the only or newest one]; given several times: their average."),
    ] = None,
    average: Annotated[
        Literal["logits", "probabilities"],
        typer.Option("--average", help="Of several archives: their logits, or their softmaxes at each student's tau."),
    ] = "logits",
    second_archive: Annotated[
        str | None, typer.Option("--second-archive", help="Where mlkd's second views come from [the same archive]")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="[the dataset's recipe]")] = None,
    batch_size: BatchOption = 64,
    share_order: Annotated[
        bool, typer.Option("--share-order", help="Show all seeds the batches of seed 0, on one stream.")
    ] = False,
    opt: Annotated[
        str, typer.Option(help="Optimisers, timm names, with their own settings if any: adamw,sgd:lr=0.05,momentum=0.9.")
    ] = "adamw",
    lr: Annotated[str, typer.Option(help="Learning rates.")] = "0.002",
    momentum: Annotated[float, MOMENTUM] = 0.9,
    sched: Annotated[Literal["cosine", "step"], SCHED] = "cosine",
    decay_epochs: Annotated[str, DECAY_EPOCHS] = "",
    decay_rate: Annotated[float, DECAY_RATE] = 0.1,
    amp: Annotated[bool, AMP] = False,
    model_ema: Annotated[float | None, MODEL_EMA] = None,
    val_interval: Annotated[int, VAL_INTERVAL] = 1,
    weight_decay: Annotated[float, WEIGHT_DECAY] = 0.05,
    clip_grad: Annotated[float, CLIP_GRAD] = 1.0,
    dataset: Annotated[str | None, typer.Option("--dataset", help="Where the images are now [as in the dump]")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Do not choose between several archives.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Allow ttm and wttm beyond tau 10.")] = False,
    allow_drift: AllowDriftOption = 0,
    checkpoint_interval: Annotated[float, typer.Option(min=0, help="Seconds between checkpoints.")] = 30.0,
    memory: Annotated[
        str | None, typer.Option(help="What students trained at once may take, such as 12GB [most of what is free]")
    ] = None,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Keep a pixel's channels together; suits GPUs.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the students (torch.compile).")] = False,
    parallel: Annotated[
        Literal["auto", "students", "batches"],
        typer.Option(help="What torchrun's processes divide [students, if there are as many as processes, or else each batch]"),
    ] = "auto",
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    renderer: RendererOption = "auto",
    skip_corrupt: SkipCorruptOption = False,
    dry_run: DryRunOption = False,
    home: HomeOption = Path(),
    data_dir: DataDirOption = None,
    config: ConfigOption = None,
) -> None:
    """Train students from an archive: every combination of the lists, all of one seed on one stream of views."""
    from kdcache.students.distill import DistillConfig
    from kdcache.students.distill import distill as run
    from kdcache.students.grid import doubts, open_archives, plan_students
    from kdcache.system.distributed import this_rank

    settings = DistillConfig(
        archives=archive or (),
        average=average,
        second_archive=second_archive,
        taus=temperatures(tau) if tau is not None else (),
        methods=specs(method, "--method") if method is not None else (),
        presets=specs(preset, "--preset") if preset is not None else (),
        controls=specs(control),
        students=specs(student),
        inits=[part.strip() for part in init.split(",") if part.strip()],
        seeds=integers(seed, "--seed"),
        epochs=epochs,
        batch_size=batch_size,
        share_order=share_order,
        opts=specs(opt, "--opt"),
        lrs=floats(lr, "--lr"),
        weight_decay=weight_decay,
        clip_grad=clip_grad or None,
        momentum=momentum,
        sched=sched,
        decay_epochs=integers(decay_epochs, "--decay-epochs") if decay_epochs else (),
        decay_rate=decay_rate,
        amp=amp,
        ema_decay=model_ema,
        val_interval=val_interval,
        dataset=dataset,
        strict=strict,
        force=force,
        allow_drift=allow_drift,
        checkpoint_interval=checkpoint_interval,
        memory=None if memory is None else size_in_bytes(memory, "--memory"),
        channels_last=channels_last,
        compiled=compiled,
        parallel=parallel,
        device=device,
        workers=workers,
        renderer=renderer,
        command=command_line(),
    )
    place, speaker = workspace(home, data_dir, skip_corrupt), this_rank().first
    with bars(quiet=not speaker) as progress:
        if dry_run:
            planned = plan_students(settings, *open_archives(settings, place, progress), place)
            epochs = planned[0].settings.epochs
            for doubt in doubts(planned, epochs, settings):
                progress.say(doubt)
            done = [(spec.folder / "summary.json").is_file() for spec in planned]
            number = f"{len(planned)} student{'s' * (len(planned) != 1)} of {epochs} epoch{'s' * (epochs != 1)}"
            progress.say(f"{number}, {sum(done)} of them trained already")
        else:
            results = run(settings, place, progress)
    if not speaker:
        return
    if dry_run:
        print_table(["student", "trained"], [[spec.title, "yes" if d else "no"] for spec, d in zip(planned, done, strict=True)])
        return
    print_table(
        ["student", "method", "control", "tau", "seed", "top-1", "best", "run"],
        [
            [
                r.spec.student,
                _spec(r.spec.method),
                _control(r.spec.control),
                r.spec.tau_text,
                r.spec.seed,
                f"{r.summary['final_top1']:.2f}" if r.summary["status"] == "complete" else r.summary["status"],
                f"{r.summary['best_top1']:.2f}" if r.summary["best_top1"] is not None else None,
                r.spec.folder,
            ]
            for r in results
        ],
    )


def _spec(component: object) -> str:
    from kdcache.methods import METHODS

    return METHODS.spec(component)  # type: ignore[arg-type]


def _control(component: object) -> str:
    from kdcache.targets import CONTROLS

    return CONTROLS.spec(component)  # type: ignore[arg-type]


def report(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run folders, or folders that hold some [HOME/runs]")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the report [HOME/reports/latest]")] = None,
    study: Annotated[
        str | None, typer.Option(help="A study's file or name: the report opens with what it asks and expects.")
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="The runs are of the study's smoke version; the report says so.")
    ] = False,
    home: HomeOption = Path(),
) -> None:
    """Write an offline HTML report, figures, LaTeX tables and a CSV file from finished runs."""
    from kdcache.report import write_report

    experiment = None
    if study is not None:
        from kdcache.study.schema import find_study, load_study

        experiment = load_study(find_study(study)).experiment(smoke=smoke)
    elif smoke:
        raise UsageError("--smoke without --study", why="only a study has a smoke version", fix="name it: --study FILE")
    place = workspace(home)
    with bars() as progress:
        written = write_report(runs or [place.runs], output or place.reports / "latest", experiment=experiment, progress=progress)
    print(written.html)
