"""dump-teacher: run the teacher once over every view and keep all of its logits."""

import contextlib
import datetime
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.archive import (
    LAYOUTS,
    TEACHER_COST,
    Archive,
    ArchiveWriter,
    CanvasCard,
    Failure,
    Noise,
    Plan,
    TeacherCard,
    Verification,
    new_plan,
    open_archive,
    recorded_plan,
    stored_bytes,
    sweep,
    translated_os_errors,
)
from kdcache.codecs import CODECS
from kdcache.datasets import DATASETS
from kdcache.datasets.canvas import Canvas, canvas_path, require_intact
from kdcache.errors import IncompatibleError, NotFoundError, UsageError
from kdcache.models.creation import licence, resolve
from kdcache.models.names import folder_name, is_reference, public_name
from kdcache.replay.check import replay
from kdcache.replay.prefetch import RendererChoice, render_batches
from kdcache.system.distributed import this_rank
from kdcache.system.locks import NoLocksError, locked
from kdcache.system.progress import Progress, Silent
from kdcache.teachers.forward import Forward, Precision, batches, write_shards
from kdcache.teachers.registry import Teacher, doubt, find_teacher, load_teacher
from kdcache.teachers.train import TeacherConfig, train_teacher
from kdcache.training.learner import metered, resolve_device
from kdcache.views.policy import ViewPolicy
from kdcache.workspace import Workspace, dataset_label, parse_dataset, read_teacher, require_writable, versions

__all__ = [
    "DumpConfig",
    "DumpPlan",
    "dump_teacher",
    "free_bytes",
    "matching_teacher",
    "plan_dump",
    "replay_with_teacher",
    "rows_of_dump",
    "sketch_dump",
]

NOISE_VIEWS = 256
HEAD_START = 60.0  # seconds


@dataclass(frozen=True)
class DumpConfig:
    """What to dump. What decides on a logit identifies the archive: not who computes it, where, and how fast."""

    teacher: str
    dataset: str
    views: int | None = None  # the dataset's own number if not given
    policy: str | None = None
    view_seed: int | None = None
    size: int | None = None
    canvas: int | None = None
    batch_size: int = 64
    precision: Precision | None = None  # None: fp16 on a GPU, fp32 on a CPU
    codec: str = "i16"
    layout: str = "zarr"
    shard_rows: int | None = None
    finetune: bool = True
    teacher_folder: Path | None = None  # a certain trained teacher instead of the newest
    teacher_epochs: int | None = None  # one that was trained for so many epochs; 0: weights as they are
    checkpoint: Path | None = None  # one made from this file: its weights as they are, unless teacher_epochs says more
    output: Path | None = None
    start_view: int = 0
    share: tuple[int, int] | None = None  # (i, n): of the shards, those whose running number modulo n is i
    device: str = "auto"
    workers: int = 0
    renderer: RendererChoice = "auto"
    command: str = ""


@dataclass(frozen=True)
class DumpPlan:
    """What a dump would do."""

    path: Path
    teacher: Teacher | None  # None: it has to be trained first
    policy: ViewPolicy
    canvas: Canvas
    views: int
    precision: Precision


def sketch_dump(config: DumpConfig, workspace: Workspace, progress: Progress) -> str:
    """Say what a dump would do, and build, train and write nothing. Returns the archive's folder.

    That ends in question marks where there is no canvas yet, on which its name depends.
    """
    source = parse_dataset(config.dataset)
    size = config.canvas or source.recipe.canvas
    if canvas_path(source, "train", size, workspace.data).is_dir():
        plan = plan_dump(config, workspace, progress)
        path, samples, classes, views = plan.path, len(plan.canvas), plan.canvas.card.class_names, plan.views
        missing = "weights as they are would be tested first" if _epochs(config) == 0 else "it would be trained first"
        trained = plan.teacher.folder if plan.teacher else f"none yet: {missing}"
    else:
        resolve(config.teacher, "teacher")
        ViewPolicy.load(config.policy or source.recipe.policy, size=config.size, seed=config.view_seed)
        images = source.open(workspace.data, progress, fetch=False)
        samples, classes = len(images.samples("train")), tuple(images.class_names())
        name = f"{dataset_label(source)}--{folder_name(config.teacher)}--????????"
        path, views = config.output or workspace.archives / name, config.views or source.recipe.student_epochs
        trained = "whether there is one is known once the canvas is built"
        progress.say("canvas: none yet; it would be built first, and completes the archive's name")
    rows = rows_of_dump(config, views, samples, classes)
    logits = views * samples * len(classes) * CODECS.parse(config.codec).dtype.itemsize
    total = stored_bytes(rows)
    progress.say(f"teacher: {trained}")
    progress.say(
        f"{views} views of {samples} samples, {len(classes)} classes: {logits / 1e6:.1f} MB of logits, "
        f"{total / 1e6:.1f} MB in all, {views * rows.num_blocks} shards"
    )
    there = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0
    progress.say(f"free there: {free_bytes(path) / 1e9:.1f} GB")
    _warn_of_little_room(path, total - there, progress)
    return str(path)


def rows_of_dump(config: DumpConfig, views: int, samples: int, class_names: Sequence[str]) -> Plan:
    """The rows of the archive that a dump of so many views and samples would write."""
    return new_plan(
        num_views=views,
        num_samples=samples,
        class_names=class_names,
        codec=config.codec,
        layout=config.layout,
        shard_rows=config.shard_rows,
    )


def free_bytes(path: Path) -> int:
    """Of the disk that `path`, which need not exist, is or would be on."""
    return shutil.disk_usage(next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())).free


def _warn_of_little_room(path: Path, needed: int, progress: Progress) -> None:
    free = free_bytes(path)
    if needed > free:
        progress.say(
            f"warning: {path} needs {needed / 1e6:,.1f} MB more, and its disk has {free / 1e6:,.1f} MB; "
            "what fits is kept, and the same command goes on once there is room"
        )


def plan_dump(config: DumpConfig, workspace: Workspace, progress: Progress | None = None) -> DumpPlan:
    """Resolve names and defaults. Builds the canvas if need be, trains nothing and writes no archive."""
    progress = progress or Silent()
    exact = resolve(config.teacher, "teacher")
    device = resolve_device(config.device)
    require_writable(config.output or workspace.archives)
    _ = CODECS.parse(config.codec), LAYOUTS.parse(config.layout)  # an unknown name is better told before anything is trained
    source = parse_dataset(config.dataset)
    policy = ViewPolicy.load(config.policy or source.recipe.policy, size=config.size, seed=config.view_seed)
    canvas = workspace.canvas(source, "train", config.canvas, progress)
    label = dataset_label(source)
    teacher: Teacher | None
    if config.teacher_folder is not None and (config.teacher_epochs is not None or config.checkpoint is not None):
        raise UsageError(
            f"--teacher-folder {config.teacher_folder} with {'--checkpoint' if config.checkpoint else '--teacher-epochs'}",
            why="a folder holds one teacher, whose weights and epochs are recorded in it",
            fix="leave one of them out",
        )
    if config.teacher_folder is not None:
        teacher = _teacher_at(config.teacher_folder)
        if tuple(teacher.record["class_names"]) != canvas.card.class_names:
            raise IncompatibleError(
                f"teacher {config.teacher_folder} knows {len(teacher.record['class_names'])} classes, "
                f"dataset {config.dataset} has {len(canvas.card.class_names)}",
                why="the class names must be the same, in the same order",
                fix=f"train one on this dataset: kdcache train-teacher --teacher {config.teacher} --dataset {config.dataset}",
            )
    else:
        epochs = _epochs(config) if config.checkpoint else config.teacher_epochs
        teacher = find_teacher(exact, canvas, policy.size, workspace, progress, epochs=epochs, checkpoint=config.checkpoint)
    precision = config.precision or ("fp16" if device.type == "cuda" else "fp32")
    recipe = json.dumps(
        [
            canvas.card.digest,
            canvas.digest,
            policy.digest,
            teacher.record["weights_sha256"] if teacher else None,
            precision,
            config.batch_size,
            config.codec,
            config.layout,
            config.shard_rows,
        ]
    )
    name = f"{label}--{folder_name(config.teacher)}--{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    views = config.views or source.recipe.student_epochs
    return DumpPlan(config.output or workspace.archives / name, teacher, policy, canvas, views, precision)


def _epochs(config: DumpConfig) -> int:
    """For how long a teacher that is missing would be trained, as far as this configuration and the dataset say."""
    if config.teacher_epochs is not None:
        return config.teacher_epochs
    return 0 if config.checkpoint else parse_dataset(config.dataset).recipe.teacher_epochs


def dump_teacher(config: DumpConfig, workspace: Workspace, progress: Progress | None = None) -> Path:
    """Write the archive that `config` describes, or finish it, or find it finished; returns its folder.

    It is not finished yet where other processes still write shards of it: the last one finishes it.
    """
    progress = progress or Silent()
    share = _own_share(config.share)
    plan = _prepared(config, workspace, progress)
    assert plan.teacher is not None
    if config.output is None and (plan.path / "kdcache.json").is_file():  # a folder named by its recipe holds that recipe
        archive = open_archive(plan.path)
        if archive.num_views >= plan.views:
            sweep(plan.path)
            progress.say(f"{plan.path} is complete with {archive.num_views} views: nothing to do")
            progress.say(_top1(archive))
            return plan.path
    require_intact(plan.canvas)
    record = plan.teacher.record
    terms = record.get("weights_licence") or _timm_licence(record)
    progress.say(f"teacher: {config.teacher} = {record['name']} from {plan.teacher.folder}, {plan.precision}")
    progress.say(f"its weights: sha256 {record['weights_sha256'][:12]}..., licence {terms or 'unknown'}")
    if text := doubt(plan.teacher):
        progress.say(text)

    device = resolve_device(config.device)
    if device.index is not None:
        torch.cuda.set_device(device)  # else every process takes memory of the first GPU
    model, normalise = load_teacher(plan.teacher)
    model.to(device)
    forward = Forward(model, normalise, device, plan.precision)
    recorded = recorded_plan(plan.path)
    begun = recorded.teacher if recorded else None
    writer = ArchiveWriter(
        plan.path,
        num_views=plan.views,
        num_samples=len(plan.canvas),
        class_names=plan.canvas.card.class_names,
        labels=plan.canvas.labels,
        keys=plan.canvas.keys,
        codec=config.codec,
        layout=config.layout,
        shard_rows=config.shard_rows,
        policy=plan.policy,
        source=plan.canvas.card,
        canvas=CanvasCard(size=plan.canvas.size, digest=plan.canvas.digest),
        teacher=TeacherCard(
            alias=public_name(config.teacher),
            name=record["name"],
            weights_sha256=record["weights_sha256"],
            input_size=record["input_size"],
            mean=tuple(record["mean"]),
            std=tuple(record["std"]),
            precision=plan.precision,
            batch_size=config.batch_size,
            training=record["training"],
            top1_clean=record["top1_clean"],
            noise=begun.noise if begun and begun.noise else _noise(forward, plan, config.batch_size),
            weights_licence=terms,
        ),
        provenance={
            "command": config.command,
            "dataset": DATASETS.spec(parse_dataset(config.dataset)),  # as it is found from any working directory
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "versions": versions(),
            **({TEACHER_COST: record["cost"]} if "cost" in record else {}),
        },
    )
    if writer.plan.num_views > plan.views:
        progress.say(f"{plan.path} was begun with {writer.plan.num_views} views, and gets them all: views are never taken away")
    rows = sum(len(writer.positions(block)) for _, block in writer.missing())
    row_bytes = stored_bytes(writer.plan) // (writer.plan.num_views * writer.plan.num_samples)
    _warn_of_little_room(plan.path, rows * row_bytes, progress)
    with metered(device, share=this_rank().share) as meter:
        writer.count_costs(meter.lap)
        write_shards(
            writer,
            forward,
            plan.canvas,
            batch_size=config.batch_size,
            start_view=config.start_view,
            share=share,
            workers=config.workers,
            renderer=config.renderer,
            progress=progress,
        )
    if left := writer.missing():
        where = "left to" if share else "being written by"
        progress.say(f"{plan.path}: {len(left)} shards are {where} other processes, the last of which finishes the archive")
        return plan.path
    archive = writer.finalize(progress)
    progress.say(f"{archive.path}: {archive.num_views} views of {archive.num_samples} samples, {archive.nbytes / 1e6:.1f} MB")
    progress.say(_top1(archive))
    return plan.path


def _top1(archive: Archive) -> str:
    card, views = archive.manifest.teacher, archive.manifest.statistics.top1_views
    clean = card.top1_clean if card else None
    figures = ("unknown" if value is None else f"{value:.2f} %" for value in (clean, views))
    return "teacher's top-1: {} on clean test images, {} on these views (dominant label)".format(*figures)


def _timm_licence(record: Mapping[str, Any]) -> str | None:
    """Weights finetuned from timm's are under timm's licence; of others only their owner knows."""
    of_timm = record["training"].get("start") == "timm" and not is_reference(record["name"])
    return licence(record["name"]) if of_timm else None


def _prepared(config: DumpConfig, workspace: Workspace, progress: Progress) -> DumpPlan:
    """The plan of a dump that has a canvas and a teacher: one process makes what is missing of them, and others wait for it."""
    source = parse_dataset(config.dataset)
    if not this_rank().first:
        canvas = canvas_path(source, "train", config.canvas or source.recipe.canvas, workspace.data)
        _after_the_first(lambda: canvas.is_dir() or canvas.with_name(canvas.name + ".lock").exists())
    plan = plan_dump(config, workspace, progress)
    if plan.teacher is not None:
        return plan
    if not config.finetune and _epochs(config):
        raise NotFoundError(
            f"no teacher {config.teacher!r} trained on {config.dataset} at {plan.policy.size} px",
            why="--no-finetune forbids training one now",
            fix=f"kdcache train-teacher --teacher {config.teacher} --dataset {config.dataset} --size {plan.policy.size}",
        )
    lock = workspace.teachers / f".{dataset_label(source)}--{folder_name(config.teacher)}.lock"
    _after_the_first(lock.exists)
    with contextlib.ExitStack() as held:
        with translated_os_errors(lock), contextlib.suppress(NoLocksError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(lock, waiting=lambda: progress.say("waiting for another process to train the teacher")))
        plan = plan_dump(config, workspace, progress)
        if plan.teacher is None:
            for_long = f" for {config.teacher_epochs} epochs" if config.teacher_epochs else ""
            wanted = f"{config.teacher} trained on {config.dataset} at {plan.policy.size} px{for_long}"
            first = "training it first" if _epochs(config) else "testing its weights as they are first"
            progress.say(f"no teacher {wanted} yet: {first}")
            train_teacher(
                TeacherConfig(
                    teacher=config.teacher,
                    dataset=config.dataset,
                    epochs=() if (config.teacher_epochs, config.checkpoint) == (None, None) else (_epochs(config),),
                    checkpoint=config.checkpoint,
                    policy=config.policy,
                    size=plan.policy.size,
                    canvas=config.canvas,
                    device=config.device,
                    workers=config.workers,
                    renderer=config.renderer,
                    command=config.command,
                ),
                workspace,
                progress,
            )
            plan = plan_dump(config, workspace, progress)
        lock.unlink(missing_ok=True)
    return plan


def _after_the_first(has_begun: Callable[[], bool]) -> None:
    """Of processes that torchrun started, let the first begin what all of them need: it is the one that tells how far it is."""
    deadline = time.monotonic() + HEAD_START
    while not (this_rank().first or has_begun()) and time.monotonic() < deadline:
        time.sleep(0.05)


def _own_share(share: tuple[int, int] | None) -> tuple[int, int] | None:
    """This process's: processes that torchrun started divide a share among them."""
    if share is None:
        return None
    rank = this_rank()
    return share[0] * rank.of + rank.number, share[1] * rank.of


def _noise(forward: Forward, plan: DumpPlan, batch_size: int) -> Noise:
    """How far the precision of the dump is from float32, over the first few hundred views."""
    count = min(NOISE_VIEWS, len(plan.canvas))
    if forward.precision == "fp32" and forward.device.type == "cpu":  # the same computation, which a CPU repeats bit by bit
        return Noise(views=count, kl_mean=0.0, kl_max=0.0, max_logit_difference=0.0)
    exact = Forward(forward.model, forward.normalise, forward.device, "fp32")
    items = [(0, rows) for rows in batches(range(count), batch_size)]
    pairs = [(forward(r.images), exact(r.images)) for r in render_batches(plan.canvas, plan.policy, items, device=forward.device)]
    used, reference = (torch.from_numpy(np.concatenate(side)).double() for side in zip(*pairs, strict=True))
    log_p, log_q = reference.log_softmax(dim=1), used.log_softmax(dim=1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=1).clamp(min=0)
    return Noise(
        views=count,
        kl_mean=kl.mean().item(),
        kl_max=kl.max().item(),
        max_logit_difference=(reference - used).abs().max().item(),
    )


def _teacher_at(folder: Path) -> Teacher:
    if not (folder / "teacher.json").is_file():
        raise NotFoundError(
            f"no teacher at {folder}", why="there is no teacher.json in it", fix="train one: kdcache train-teacher --teacher ..."
        )
    return Teacher(folder, read_teacher(folder))


def replay_with_teacher(
    archive: Archive,
    canvas: Canvas,
    views: int,
    teacher: Teacher | None,
    progress: Progress | None = None,
    *,
    device: str = "cpu",
    renderer: RendererChoice = "auto",
) -> Verification:
    """Replay views; with the teacher at hand, recompute their logits too, and compare within its own noise and the codec."""
    result = replay(archive, canvas, views, progress=progress, renderer=renderer)
    card, policy = archive.manifest.teacher, archive.manifest.policy
    if result.failures:
        return result
    if teacher is None or card is None or policy is None:
        result.notes.append("logits were not recomputed: the teacher is not in this workspace")
        return result
    # The same batches as in the dump, since a batch's size may move a logit's last bits.
    rows = min(archive.manifest.block_rows(0), -(-views // card.batch_size) * card.batch_size)
    model, normalise = load_teacher(teacher)
    target = resolve_device(device)
    forward = Forward(model.to(target), normalise, target, card.precision)
    items = [(archive.views.start, batch) for batch in batches(range(rows), card.batch_size)]
    rendered = render_batches(canvas, policy, items, renderer=renderer, device=target)
    logits = np.concatenate([forward(item.images) for item in rendered])
    coding, view = CODECS.from_dict(archive.manifest.codec), archive.views.start
    stored = archive.stored(view, 0)
    noise = 2 * (card.noise.max_logit_difference if card.noise else 0) + 1e-3
    allowed = float(coding.max_error(stored).max()) + noise
    difference = float(np.abs(logits - coding.decode(stored)[:rows]).max())
    if difference > allowed:
        result.failures.append(
            Failure(f"view {view}", f"logits within {allowed:.2g} of the teacher's", f"a difference of {difference:.3g}")
        )
    result.notes.append(f"{rows} logit vectors recomputed: largest difference {difference:.2g}, allowed {allowed:.2g}")
    return result


def matching_teacher(archive: Archive, workspace: Workspace, progress: Progress | None = None) -> Teacher | None:
    """The trained teacher in the workspace whose weights the archive's logits came from."""
    card = archive.manifest.teacher
    for folder, record in workspace.teacher_records(progress or Silent()):
        if card is not None and record["weights_sha256"] == card.weights_sha256:
            return Teacher(folder, record)
    return None
