"""dump-teacher: run the teacher once over every view and keep all of its logits."""

import contextlib
import datetime
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from kdcache.archive import (
    LAYOUTS,
    TEACHER_COST,
    TEACHER_ENTROPIES,
    Archive,
    ArchiveWriter,
    CanvasCard,
    Licences,
    TeacherCard,
    open_archive,
    recorded_plan,
    stored_bytes,
    sweep,
)
from kdcache.codecs import CODECS
from kdcache.datasets import DATASETS, Source, UsersOwn
from kdcache.datasets.canvas import canvas_path, require_intact
from kdcache.datasets.classes import how_classes_differ, say_classes
from kdcache.errors import IncompatibleError, NotFoundError, UsageError
from kdcache.models.classes import ClassMap, said_digest
from kdcache.models.creation import licence
from kdcache.models.names import folder_name, is_factory, is_reference, public_name, resolve
from kdcache.options import flag_of
from kdcache.system.distributed import ALONE, this_rank
from kdcache.system.files import set_aside, tidying, translated_os_errors
from kdcache.system.locks import has_locks, locked_if_possible
from kdcache.system.progress import Progress, Silent
from kdcache.system.room import free_bytes, sizes
from kdcache.teachers import as_is
from kdcache.teachers.config import DumpConfig, TeacherAndData, TeacherConfig, usual_dump
from kdcache.teachers.examination import examined
from kdcache.teachers.forward import Forward, suited_memory_format
from kdcache.teachers.noise import measured_noise
from kdcache.teachers.plans import DumpPlan, begun_once, folder_of, going_on, squashed_before
from kdcache.teachers.registry import Teacher, doubt, find_teacher, load_teacher, teacher_at
from kdcache.teachers.shards import write_shards
from kdcache.teachers.train import train_teachers
from kdcache.training.config import ViewOptions
from kdcache.training.devices import device_kind, enough_memory, metered, resolve_device
from kdcache.views.policy import ViewPolicy
from kdcache.workspace import Workspace, dataset_label, parse_dataset, require_writable, versions

__all__ = [
    "DumpPlan",
    "dump_teacher",
    "ensured_teacher",
    "existing_teacher",
    "plan_dump",
    "sketch_dump",
]

HEAD_START = 60.0  # seconds


def sketch_dump(config: DumpConfig, workspace: Workspace, progress: Progress) -> str:
    """Say what a dump would do, and build, train and write nothing. Returns the archive's folder.

    That ends in question marks where there is no canvas yet, on which its name depends.
    """
    source, recipe = parse_dataset(config.subject.dataset, progress), config.recipe
    resolve(config.subject.teacher, "teacher", run=False)
    for typed, what in ((config.subject.teacher, "teacher"), (getattr(source, "function", ""), "dataset")):
        if typed and is_factory(typed):
            progress.say(f"{what} {typed} is a function, which a dry run does not call: what depends on it is not known")
    if getattr(source, "function", "") or is_factory(config.subject.teacher):
        return str(
            config.output or workspace.archives / f"{dataset_label(source)}--{folder_name(config.subject.teacher)}--????????"
        )
    if canvas_path(source, "train", recipe.shown.canvas or source.recipe.canvas, workspace.data).is_dir():
        plan = plan_dump(config, workspace, progress)
        teacher = existing_teacher(plan, workspace, progress)
        plan = going_on(plan, teacher, workspace, progress) if teacher else plan
        path, views = folder_of(plan, teacher, workspace), plan.views
        samples, classes = len(plan.canvas), plan.canvas.card.class_names
        missing = "weights as they are would be tested first" if _epochs(config, source) == 0 else "it would be trained first"
        trained = teacher.folder if teacher else f"none yet: {missing}"
    else:
        resolve(config.subject.teacher, "teacher")
        ViewPolicy.draft(recipe.shown.policy or source.recipe.policy, size=recipe.shown.size, seed=recipe.view_seed)
        images = source.open(workspace.data, progress, fetch=False)
        say_classes(source, images, progress)
        samples, classes = len(images.samples("train")), tuple(images.class_names())
        name = f"{dataset_label(source)}--{folder_name(config.subject.teacher)}--????????"
        path, views = config.output or workspace.archives / name, recipe.views or source.recipe.student_epochs
        trained = "whether there is one is known once the canvas is built"
        progress.say("canvas: none yet; it would be built first, and completes the archive's name")
    rows = recipe.rows(views, samples, classes)
    logits = views * samples * len(classes) * CODECS.parse(recipe.codec).dtype.itemsize
    total = stored_bytes(rows)
    progress.say(f"teacher: {trained}")
    progress.say(
        f"{views} views of {samples} samples, {len(classes)} classes: {logits / 1e6:.1f} MB of logits, "
        f"{total / 1e6:.1f} MB in all, {views * rows.num_blocks} shards"
    )
    there = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0
    progress.say(f"free there: {sizes(free_bytes(path))[0]}")
    _warn_of_little_room(path, total - there, progress)
    return str(path)


def _warn_of_little_room(path: Path, needed: int, progress: Progress) -> None:
    free = free_bytes(path)
    if needed > free:
        wanted, there = sizes(needed, free)
        progress.say(
            f"warning: {path} needs {wanted} more, and its disk has {there}; "
            "what fits is kept, and the same command goes on once there is room"
        )


def plan_dump(config: DumpConfig, workspace: Workspace, progress: Progress | None = None) -> DumpPlan:
    """Resolve names and defaults. Builds the canvas if need be, trains nothing and writes no archive."""
    progress, recipe = progress or Silent(), config.recipe
    exact = resolve(config.subject.teacher, "teacher")
    device = resolve_device(config.runtime.device)
    _ = CODECS.parse(recipe.codec), LAYOUTS.parse(recipe.layout)  # an unknown name is better told before anything is trained
    others = {"checkpoint": config.checkpoint, "classes": config.classes, "teacher_epochs": config.teacher_epochs}
    given = [flag_of(name) for name, value in others.items() if value is not None]
    if config.teacher_folder is not None and given:
        raise UsageError(
            f"--teacher-folder {config.teacher_folder} with {given[0]}",
            why="a folder holds one teacher, whose weights and epochs are recorded in it",
            fix="leave one of them out",
        )
    source = parse_dataset(config.subject.dataset, progress)
    if config.classes is not None:
        said_digest(config.classes)  # raises where there is no such file
        as_is.require_use(config.classes, [_epochs(config, source)], flag="--teacher-epochs 0")
    policy = ViewPolicy.draft(recipe.shown.policy or source.recipe.policy, size=recipe.shown.size, seed=recipe.view_seed)
    if not this_rank().first:
        coming = canvas_path(source, "train", recipe.shown.canvas or source.recipe.canvas, workspace.data)
        _after_the_first(lambda: coming.is_dir() or coming.with_name(coming.name + ".lock").exists())
    canvas = workspace.canvas(
        source,
        "train",
        recipe.shown.canvas,
        progress,
        tell=this_rank().first,
        building=lambda: require_writable(config.output or workspace.archives),
    )
    usual, views = usual_dump(device.type), recipe.views or source.recipe.student_epochs
    precision, batch_size = recipe.precision or usual.precision, recipe.batch_size or usual.batch_size
    return DumpPlan(config, source, exact, policy, canvas, views, precision, batch_size)


def existing_teacher(plan: DumpPlan, workspace: Workspace, progress: Progress) -> Teacher | None:
    """The teacher of a dump, if it is trained already. IncompatibleError for a folder's that knows other classes."""
    config = plan.config
    if config.teacher_folder is None:
        as_they_are = config.checkpoint is not None or config.classes is not None
        return find_teacher(
            plan.exact,
            plan.canvas,
            plan.policy.size,
            workspace,
            progress,
            epochs=_epochs(config, plan.source) if as_they_are else config.teacher_epochs,
            checkpoint=config.checkpoint,
            classes=config.classes,
        )
    teacher, names = teacher_at(config.teacher_folder), plan.canvas.card.class_names
    if teacher.record["name"] != public_name(plan.exact):
        raise UsageError(
            f"--teacher {config.subject.teacher} with --teacher-folder {config.teacher_folder}",
            why=f"the folder's teacher is {teacher.record['name']}, not {public_name(plan.exact)}",
            fix=f"--teacher {shlex.quote(str(teacher.record['name']))}, or another --teacher-folder",
        )
    if difference := how_classes_differ(teacher.record["class_names"], names):
        subject = config.subject
        raise IncompatibleError(
            f"teacher {config.teacher_folder} has other classes than dataset {subject.dataset}",
            why=difference,
            fix=f"train one on this dataset: {_training(subject)}",
        )
    return teacher


def _training(subject: TeacherAndData) -> str:
    return shlex.join(["kdcache", "train-teacher", "--teacher", subject.teacher, "--dataset", subject.dataset])


def _epochs(config: DumpConfig, source: Source) -> int:
    """For how long a teacher that is missing would be trained, as far as this configuration and the dataset say."""
    if config.teacher_epochs is not None:
        return config.teacher_epochs
    return 0 if config.checkpoint or config.classes else source.recipe.teacher_epochs


def dump_teacher(config: DumpConfig, workspace: Workspace, progress: Progress | None = None) -> Path:
    """Write the archive that `config` describes, or finish it, or find it finished; returns its folder.

    It is not finished yet where other processes still write shards of it: the last one finishes it.
    """
    progress = progress or Silent()
    plan = plan_dump(config, workspace, progress)
    teacher = ensured_teacher(plan, workspace, progress)
    with begun_once(plan, teacher, workspace, progress) as plan:
        if note := squashed_before(plan, teacher):
            progress.say(note)
        path = folder_of(plan, teacher, workspace)
        if config.output is None and (path / "kdcache.json").is_file():  # a folder named by its recipe holds that recipe
            archive = open_archive(path)
            _require_own(archive, plan, teacher)
            if archive.num_views >= plan.views:
                with tidying():
                    sweep(path)
                progress.say(f"{path} is complete with {archive.num_views} views: nothing to do")
                _say_unrecorded(plan.source, archive, progress)
                progress.say(_top1(archive))
                return path
        require_writable(path)
        require_intact(plan.canvas)
        device = resolve_device(config.runtime.device)
        if device.index is not None:
            torch.cuda.set_device(device)  # else every process takes memory of the first GPU
        with enough_memory(
            f"no memory for the teacher on {device}", fix="end what else uses that memory, and repeat the command"
        ):
            writer, forward = _begun(plan, teacher, path, device, workspace, progress)
    share = _own_share(config.shard)
    if undivided := share is None and not has_locks(path):
        share = (this_rank().number, this_rank().of)
    with metered(device, share=this_rank().share) as meter:
        writer.count_costs(meter.lap, device_kind(device))
        write_shards(
            writer,
            forward,
            plan.canvas,
            batch_size=plan.batch_size,
            start_view=config.start_view,
            share=share,
            undivided=undivided,
            workers=config.runtime.workers,
            renderer=config.runtime.renderer,
            progress=progress,
        )
    if left := writer.missing():
        where = "left to" if config.shard else "being written by"
        progress.say(f"{path}: {len(left)} shards are {where} other processes, the last of which finishes the archive")
        return path
    archive = writer.finalize(progress)
    _say_unrecorded(plan.source, archive, progress)
    progress.say(f"{archive.path}: {archive.num_views} views of {archive.num_samples} samples, {archive.nbytes / 1e6:.1f} MB")
    progress.say(_top1(archive))
    return path


def _require_own(archive: Archive, plan: DumpPlan, teacher: Teacher) -> None:
    """Raise IncompatibleError for an archive in a folder that is named after another recipe: it was copied or renamed."""
    manifest, record = archive.manifest, teacher.record
    recipe = plan.config.recipe
    facts = {
        "teacher": (manifest.teacher and manifest.teacher.weights_sha256, record["weights_sha256"]),
        "views": (manifest.policy and manifest.policy.digest, plan.policy.digest),
        "images": (manifest.source and manifest.source.digest, plan.canvas.card.digest),
        "precision": (manifest.teacher and manifest.teacher.precision, plan.precision),
        "codec": (manifest.codec, CODECS.to_dict(CODECS.parse(recipe.codec))),
        "layout": (manifest.layout["name"], LAYOUTS.name_of(LAYOUTS.parse(recipe.layout))),
    }
    if other := [name for name, (theirs, ours) in facts.items() if theirs != ours]:
        first, second = (f"{fact}"[:24] for fact in facts[other[0]])
        raise IncompatibleError(
            f"{archive.location} is not the archive that its name says: it has another {' and other '.join(other)}",
            why=f"its {other[0]} is {first}, not {second}: the folder was copied, renamed or exchanged",
            fix=f"give it its own name again; or set it aside, and repeat the command: {set_aside(archive.path)}",
        )


def _require_size(plan: DumpPlan, teacher: Teacher) -> None:
    """Raise IncompatibleError for views of another size than the teacher was trained and tested on."""
    own, size, subject = teacher.record["input_size"], plan.policy.size, plan.config.subject
    if own == size:
        return
    command = ["kdcache", "train-teacher", "--teacher", subject.teacher, "--dataset", subject.dataset, "--size", str(size)]
    raise IncompatibleError(
        f"teacher {teacher.folder} sees images of {own} px, the views have {size} px",
        why="its top-1, and what is recorded of it, are of images of its own size",
        fix=f"--size {own}; or train one of that size: {shlex.join(command)}",
    )


def _begun(
    plan: DumpPlan, teacher: Teacher, path: Path, device: torch.device, workspace: Workspace, progress: Progress
) -> tuple[ArchiveWriter, Forward]:
    """The writer of the archive in `path`, begun or resumed, and the teacher; says which it is, and how much is missing."""
    config, recipe, record = plan.config, plan.config.recipe, teacher.record
    terms = record.get("weights_licence") or _timm_licence(record)
    progress.say(f"teacher: {config.subject.teacher} = {record['name']} from {teacher.folder}, {plan.precision}")
    progress.say(f"its weights: sha256 {record['weights_sha256'][:12]}..., licence {terms or 'unknown'}")
    if "classes" in record:
        for line in ClassMap.recorded(record["class_names"], record["classes"]).lines():
            progress.say(line)
    if text := doubt(teacher, plan.canvas.labels):
        progress.say(text)
    recorded = recorded_plan(path)
    begun = recorded.teacher if recorded else None
    if begun is None:
        _require_size(plan, teacher)
    model, normalise = load_teacher(teacher)
    model = model.to(device)
    suited = begun.memory_format if begun else suited_memory_format(model, plan.policy.size, device, plan.precision)
    forward = Forward(model, normalise, device, plan.precision, suited)
    accepted = begun.accepted if begun else examined(forward, plan, teacher, workspace, progress)
    stated = plan.source.licence if isinstance(plan.source, UsersOwn) else None
    writer = ArchiveWriter(
        path,
        num_views=plan.views,
        num_samples=len(plan.canvas),
        class_names=plan.canvas.card.class_names,
        labels=plan.canvas.labels,
        keys=plan.canvas.keys,
        codec=recipe.codec,
        layout=recipe.layout,
        shard_rows=recipe.shard_rows,
        policy=plan.policy,
        source=plan.canvas.card,
        canvas=CanvasCard.of(plan.canvas, plan.policy),
        teacher=TeacherCard(
            alias=public_name(config.subject.teacher),
            name=record["name"],
            weights_sha256=record["weights_sha256"],
            input_size=record["input_size"],
            mean=tuple(record["mean"]),
            std=tuple(record["std"]),
            precision=plan.precision,
            batch_size=plan.batch_size,
            memory_format=suited,
            training=record["training"],
            top1_clean=record["top1_clean"],
            top5_clean=record.get("top5_clean"),
            noise=begun.noise if begun else measured_noise(forward, plan.canvas, plan.policy, plan.batch_size, progress),
            weights_licence=terms,
            test_views=record.get("test_views"),
            accepted=accepted or None,
        ),
        licences=Licences(data=stated) if stated else None,
        provenance={
            "command": config.command,
            "dataset": DATASETS.spec(plan.source),  # as it is found from any working directory
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": device_kind(device),
            "versions": versions(),
            **({TEACHER_COST: record["cost"]} if "cost" in record else {}),
            **({TEACHER_ENTROPIES: record["entropies"]["clean"]} if "entropies" in record else {}),
        },
    )
    if writer.plan.num_views > plan.views:
        progress.say(f"{path} was begun with {writer.plan.num_views} views, and gets them all: views are never taken away")
    rows = sum(len(writer.positions(block)) for _, block in writer.missing())
    row_bytes = stored_bytes(writer.plan) // (writer.plan.num_views * writer.plan.num_samples)
    _warn_of_little_room(path, rows * row_bytes, progress)
    return writer, forward


def _say_unrecorded(source: Source, archive: Archive, progress: Progress) -> None:
    """A licence that is stated too late: a finished archive stays as it is."""
    stated = source.licence if isinstance(source, UsersOwn) else None
    if stated is not None and archive.manifest.known_licences.data is None:
        option = shlex.quote(f"data={stated}")
        progress.say(
            f"the licence {stated} is not in the finished archive; it is stated as the archive is shared: "
            f"kdcache push {shlex.quote(str(archive.path))} DESTINATION --license {option}"
        )


def _top1(archive: Archive) -> str:
    card, views = archive.manifest.teacher, archive.manifest.statistics.top1_views
    clean = card.top1_clean if card else None
    figures = ("unknown" if value is None else f"{value:.2f} %" for value in (clean, views))
    return "teacher's top-1: {} on clean test images, {} on these views (dominant label)".format(*figures)


def _timm_licence(record: Mapping[str, Any]) -> str | None:
    """Weights finetuned from timm's are under timm's licence; of others only their owner knows."""
    of_timm = record["training"].get("start") == "timm" and not is_reference(record["name"])
    return licence(record["name"]) if of_timm else None


def ensured_teacher(plan: DumpPlan, workspace: Workspace, progress: Progress) -> Teacher:
    """The teacher of a dump, which one process trains now if there is none, while others wait for it."""
    if (teacher := existing_teacher(plan, workspace, progress)) is not None:
        return teacher
    config, subject, size = plan.config, plan.config.subject, plan.policy.size
    require_writable(config.output or workspace.archives)
    epochs = _epochs(config, plan.source)
    if not config.finetune and epochs:
        raise NotFoundError(
            f"no teacher {subject.teacher!r} trained on {subject.dataset} at {size} px",
            why="--no-finetune forbids training one now",
            fix=f"{_training(subject)} --size {size}",
        )
    lock = workspace.teachers / f".{dataset_label(plan.source)}--{folder_name(subject.teacher)}.lock"
    _after_the_first(lock.exists)
    with contextlib.ExitStack() as held:
        with translated_os_errors(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(
                locked_if_possible(lock, waiting=lambda: progress.say("waiting for another process to train the teacher"))
            )
        if (teacher := existing_teacher(plan, workspace, progress)) is None:
            for_long = f" for {config.teacher_epochs} epochs" if config.teacher_epochs else ""
            wanted = f"{subject.teacher} trained on {subject.dataset} at {size} px{for_long}"
            first = "training it first" if epochs else "testing its weights as they are first"
            progress.say(f"no teacher {wanted} yet: {first}")
            shown = plan.config.recipe.shown
            usual = (config.teacher_epochs, config.checkpoint, config.classes) == (None, None, None)
            training = TeacherConfig(
                subject=subject,
                epochs=() if usual else (epochs,),
                checkpoint=config.checkpoint,
                classes=config.classes,
                views=ViewOptions(policy=shown.policy, size=size, canvas=shown.canvas),
                runtime=config.runtime,
                command=config.command,
            )
            (teacher,) = train_teachers(training, workspace, progress, source=plan.source, canvas=plan.canvas, team=ALONE)
        lock.unlink(missing_ok=True)
    return teacher


def _after_the_first(has_begun: Callable[[], bool]) -> None:
    """Let the first of torchrun's processes begin work that all of them need, since it alone shows progress."""
    deadline = time.monotonic() + HEAD_START
    while not (this_rank().first or has_begun()) and time.monotonic() < deadline:
        time.sleep(0.05)


def _own_share(share: tuple[int, int] | None) -> tuple[int, int] | None:
    """The share of this process: processes that torchrun started divide a share among them."""
    if share is None:
        return None
    rank = this_rank()
    return share[0] * rank.of + rank.number, share[1] * rank.of
