"""dump-teacher: run the teacher once over every view and keep all of its logits."""

import collections
import contextlib
import datetime
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache.archive import (
    Archive,
    ArchiveWriter,
    CanvasCard,
    Failure,
    Noise,
    TeacherCard,
    Verification,
    layout,
    open_archive,
    recorded_plan,
)
from kdcache.canvas import Canvas, canvas_path, require_intact
from kdcache.codecs import codec as codecs
from kdcache.datasets import dataset
from kdcache.errors import IncompatibleError, NotFoundError
from kdcache.models import Normalisation, licence, resolve
from kdcache.prefetch import Rendered, RendererChoice, render_batches
from kdcache.progress import Progress, Silent
from kdcache.replay import replay
from kdcache.teacher import Teacher, TeacherConfig, find_teacher, load_teacher, train_teacher
from kdcache.training import resolve_device
from kdcache.views.policy import ViewPolicy
from kdcache.views.probe import grids
from kdcache.workspace import Workspace, dataset_label, parse_dataset, read_teacher, require_writable, versions

__all__ = [
    "DumpConfig",
    "DumpPlan",
    "DumpSketch",
    "Forward",
    "dump_teacher",
    "matching_teacher",
    "plan_dump",
    "replay_with_teacher",
    "sketch_dump",
    "write_shards",
]

Precision = Literal["fp32", "fp16", "bf16"]
NOISE_VIEWS = 256


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
    output: Path | None = None
    start_view: int = 0
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


@dataclass(frozen=True)
class DumpSketch:
    """What can be told of a dump without its canvas, on which the archive's name depends."""

    path: str  # with question marks for what is not known yet
    views: int
    samples: int
    classes: int


def sketch_dump(config: DumpConfig, workspace: Workspace) -> DumpSketch | None:
    """List the samples where there is no canvas of them yet; None where there is, and `plan_dump` says it all."""
    source = parse_dataset(config.dataset)
    size = config.canvas or source.recipe.canvas
    if canvas_path(source, "train", size, workspace.data).is_dir():
        return None
    resolve(config.teacher, "teacher")
    ViewPolicy.load(config.policy or source.recipe.policy, size=config.size, seed=config.view_seed)
    samples = source.samples("train")
    name = f"{dataset_label(source)}--{config.teacher.replace('/', '_')}--????????"
    views = config.views or source.recipe.student_epochs
    return DumpSketch(str(config.output or workspace.archives / name), views, len(samples), len(source.class_names()))


def plan_dump(config: DumpConfig, workspace: Workspace, progress: Progress | None = None) -> DumpPlan:
    """Resolve names and defaults. Builds the canvas if need be, trains nothing and writes no archive."""
    progress = progress or Silent()
    resolve(config.teacher, "teacher")
    device = resolve_device(config.device)
    require_writable(config.output or workspace.archives)
    _ = codecs.parse(config.codec), layout.parse(config.layout)  # an unknown name is better told before anything is trained
    source = parse_dataset(config.dataset)
    policy = ViewPolicy.load(config.policy or source.recipe.policy, size=config.size, seed=config.view_seed)
    canvas = workspace.canvas(source, "train", config.canvas, progress)
    label = dataset_label(source)
    teacher: Teacher | None
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
        teacher = find_teacher(config.teacher, canvas, policy.size, workspace, progress)
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
    name = f"{label}--{config.teacher.replace('/', '_')}--{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    views = config.views or source.recipe.student_epochs
    return DumpPlan(config.output or workspace.archives / name, teacher, policy, canvas, views, precision)


def dump_teacher(config: DumpConfig, workspace: Workspace, progress: Progress | None = None) -> Path:
    """Write the archive that `config` describes, or finish it, or find it finished; returns its folder.

    It is not finished yet where other processes still write shards of it: the last one finishes it.
    """
    progress = progress or Silent()
    plan = plan_dump(config, workspace, progress)
    if plan.teacher is None:
        if not config.finetune:
            raise NotFoundError(
                f"no teacher {config.teacher!r} trained on {config.dataset} at {plan.policy.size} px",
                why="--no-finetune forbids training one now",
                fix=f"kdcache train-teacher --teacher {config.teacher} --dataset {config.dataset} --size {plan.policy.size}",
            )
        progress.say(f"no teacher {config.teacher} trained on {config.dataset} at {plan.policy.size} px yet: training it first")
        train_teacher(
            TeacherConfig(
                teacher=config.teacher,
                dataset=config.dataset,
                policy=config.policy,
                size=config.size,
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
    assert plan.teacher is not None
    if config.output is None and (plan.path / "kdcache.json").is_file():  # a folder named by its recipe holds that recipe
        archive = open_archive(plan.path)
        if archive.num_views >= plan.views:
            progress.say(f"{plan.path} is complete with {archive.num_views} views: nothing to do")
            return plan.path
    require_intact(plan.canvas)
    record = plan.teacher.record
    progress.say(f"teacher: {config.teacher} = {record['name']} from {plan.teacher.folder}, {plan.precision}")

    device = resolve_device(config.device)
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
            alias=config.teacher,
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
            # Weights finetuned from timm's are under timm's licence; of others only their owner knows.
            weights_licence=licence(record["name"]) if record["training"].get("start") == "timm" else None,
        ),
        provenance={
            "command": config.command,
            "dataset": dataset.spec(parse_dataset(config.dataset)),  # as it is found from any working directory
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "versions": versions(),
        },
    )
    if writer.plan.num_views > plan.views:
        progress.say(f"{plan.path} was begun with {writer.plan.num_views} views, and gets them all: views are never taken away")
    write_shards(
        writer,
        forward,
        plan.canvas,
        batch_size=config.batch_size,
        start_view=config.start_view,
        workers=config.workers,
        renderer=config.renderer,
        progress=progress,
    )
    if left := writer.missing():
        progress.say(
            f"{plan.path}: {len(left)} shards are being written by other processes, the last of which finishes the archive"
        )
        return plan.path
    archive = writer.finalize(progress)
    progress.say(f"{archive.path}: {archive.num_views} views of {archive.num_samples} samples, {archive.nbytes / 1e6:.1f} MB")
    return plan.path


def write_shards(
    writer: ArchiveWriter,
    forward: "Forward",
    canvas: Canvas,
    *,
    batch_size: int,
    start_view: int = 0,
    workers: int = 0,
    renderer: RendererChoice = "auto",
    progress: Progress | None = None,
) -> None:
    """Write the missing shards, from `start_view` on and around, but for those that other processes have claimed.

    A shard is claimed when rendering, which runs ahead across shards, reaches it; no batch crosses a shard's border.
    """
    progress = progress or Silent()
    policy = writer.plan.policy
    assert policy is not None
    total = writer.plan.num_views * writer.plan.num_samples
    done = total - sum(len(writer.positions(block)) for _, block in writer.missing())
    started, at_start = time.monotonic(), done
    while missing := writer.missing():  # again, for shards of processes that ended before they had written them
        order = sorted(missing, key=lambda shard: (shard[0] < start_view, shard))
        with contextlib.ExitStack() as claims:
            claimed = _Claimed(writer, order, batch_size, claims)
            shard = _Shard()
            rendered = render_batches(
                canvas,
                policy,
                claimed,
                workers=workers,
                renderer=renderer,
                device=forward.device,
                probe_version=writer.plan.probe_version,
            )
            for item in rendered:
                shard.add(item, forward(item.images))
                view, block, claim = claimed.shards[0]
                size = len(writer.positions(block))
                if len(shard) < size:
                    continue
                writer.write(view, block, *shard.columns())
                claim.close()
                claimed.shards.popleft()
                shard = _Shard()
                done += size
                speed = (done - at_start) / max(time.monotonic() - started, 1e-9)
                progress.update("dump", done, total, f"{speed:.0f} views/s")
        if not claimed.any:
            break


class _Claimed:
    """Batches (view, positions) of all shards that can be claimed; each is when its first batch is asked for."""

    def __init__(
        self, writer: ArchiveWriter, order: Sequence[tuple[int, int]], batch_size: int, claims: contextlib.ExitStack
    ) -> None:
        self._writer, self._order, self._batch_size, self._claims = writer, order, batch_size, claims
        self.shards: collections.deque[tuple[int, int, contextlib.ExitStack]] = collections.deque()  # claimed, not written
        self.any = False

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        for view, block in self._order:
            claim = self._claims.enter_context(contextlib.ExitStack())
            if claim.enter_context(self._writer.claim(view, block)):
                self.any = True
                self.shards.append((view, block, claim))
                for rows in _batches(self._writer.positions(block), self._batch_size):
                    yield view, rows
            else:
                claim.close()


class _Shard:
    """Columns of a shard, collected batch by batch; the pixels are let go."""

    def __init__(self) -> None:
        self._parts: list[tuple[NDArray, ...]] = []

    def __len__(self) -> int:
        """Rows so far."""
        return sum(len(part[0]) for part in self._parts)

    def add(self, item: Rendered, logits: NDArray[np.float32]) -> None:
        self._parts.append((logits, item.rows.sample, item.digest, grids(item.images)))

    def columns(self) -> tuple[NDArray, ...]:
        """Logits, sample numbers, digests and grids of all rows."""
        return tuple(np.concatenate(column) for column in zip(*self._parts, strict=True))


def _batches(positions: range, batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Positions of a shard in batches counted from its start: restarts and other processes cannot move their borders."""
    for start in range(positions.start, positions.stop, batch_size):
        yield np.arange(start, min(start + batch_size, positions.stop))


class Forward:
    """Uint8 views to float32 logits, on the device, in the wanted precision, with the classifier head in float32."""

    def __init__(self, model: nn.Module, normalise: Normalisation, device: torch.device, precision: Precision) -> None:
        self.model, self.normalise, self.device = model, normalise, device
        self.precision: Precision = precision

    @torch.inference_mode()
    def __call__(self, views: Tensor) -> NDArray[np.float32]:
        """Logits float32 `[B, C]`; a batch that is not finite in half precision is repeated in float32."""
        x = self.normalise(views.to(self.device, non_blocking=True))
        if self.precision == "fp32":
            return self._numpy(self.model(x))
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype=dtype):
            features = self.model.forward_features(x)  # type: ignore[operator]
        logits = self.model.forward_head(features.float())  # type: ignore[operator]
        if not torch.isfinite(logits).all():
            logits = self.model(x)
        return self._numpy(logits)

    @staticmethod
    def _numpy(logits: Tensor) -> NDArray[np.float32]:
        array: NDArray[np.float32] = logits.float().cpu().numpy()
        return array


def _noise(forward: Forward, plan: DumpPlan, batch_size: int) -> Noise:
    """How far the precision of the dump is from float32, over the first few hundred views."""
    count = min(NOISE_VIEWS, len(plan.canvas))
    if forward.precision == "fp32" and forward.device.type == "cpu":  # the same computation, which a CPU repeats bit by bit
        return Noise(views=count, kl_mean=0.0, kl_max=0.0, max_logit_difference=0.0)
    exact = Forward(forward.model, forward.normalise, forward.device, "fp32")
    items = [(0, rows) for rows in _batches(range(count), batch_size)]
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
    items = [(archive.views.start, batch) for batch in _batches(range(rows), card.batch_size)]
    rendered = render_batches(canvas, policy, items, renderer=renderer, device=target)
    logits = np.concatenate([forward(item.images) for item in rendered])
    coding, view = codecs.from_dict(archive.manifest.codec), archive.views.start
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
