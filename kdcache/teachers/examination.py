"""What is asked of a teacher before its logits are kept: that they are logits, the same each time, in the classes' order."""

import dataclasses
import itertools
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.datasets.canvas import Canvas
from kdcache.errors import IncompatibleError
from kdcache.importing import first_line
from kdcache.models.names import is_factory
from kdcache.options import flag_of
from kdcache.replay.prefetch import render_batches
from kdcache.system.files import write_atomically
from kdcache.system.progress import Progress
from kdcache.teachers.forward import Forward, batches
from kdcache.teachers.order import class_order, exchanged, told_cycles, told_outputs
from kdcache.teachers.plans import DumpPlan
from kdcache.teachers.registry import Teacher
from kdcache.views.policy import ViewPolicy
from kdcache.views.tested import WHOLE, TestViews
from kdcache.workspace import Workspace

__all__ = ["examined", "tolerance"]

SAMPLE, LARGEST_SAMPLE = 512, 4096  # training images by which another order of classes is noticed: by the number of classes
OF_A_CLASS = 4  # of them at least, where there are so many: two for each half
CLOSER = 32  # of each class that may be another one
REPEATED = 64  # views that are computed again, at the least: rare noise shows in some of them
FLAT = 1e-3  # of a logit: differences below this are none
STEPS = {"fp32": 2**-23, "fp16": 2**-10, "bf16": 2**-7}


@dataclasses.dataclass(frozen=True)
class _Finding:
    option: str  # that accepts it
    what: str
    why: str
    mend: str


def tolerance(forward: Forward, logits: NDArray) -> float:
    """How far logits of the same views may be apart, whatever else is in their batch: some roundings of the largest."""
    return FLAT + 8 * STEPS[forward.precision] * float(np.abs(logits).max(initial=0.0))


def examined(forward: Forward, plan: DumpPlan, teacher: Teacher, workspace: Workspace, progress: Progress) -> dict[str, str]:
    """Examine a teacher on two batches of views and on some clean training images, before anything of it is kept.

    Returns what was found and is accepted by the plan's options: by option, in words. Raises IncompatibleError for what is not,
    and for logits that are not finite, or of another number than classes, which no option accepts.
    """
    accepted, options = {}, plan.config.accepted
    for finding in (*_of_views(forward, plan), *_of_order(forward, plan, teacher, workspace)):
        flag = flag_of(finding.option)
        if not getattr(options, finding.option):
            raise IncompatibleError(
                f"teacher {plan.config.subject.teacher}: {finding.what}",
                why=finding.why,
                fix=f"{finding.mend}; or, if that is meant, go on with {flag}, which the archive records",
            )
        progress.say(f"WARNING: {finding.what}, accepted by {flag}")
        accepted[finding.option] = finding.what
    return accepted


def _of_views(forward: Forward, plan: DumpPlan) -> Iterator[_Finding]:
    canvas, size = plan.canvas, plan.batch_size
    views = list(_views(forward, canvas, plan.policy, np.arange(min(2 * size, len(canvas))), size))
    first = views[0]
    logits = forward(first)
    _require_logits(logits, len(first), len(canvas.card.class_names), plan)
    repeats = -(-REPEATED // len(first))
    close, moved = tolerance(forward, logits), max(float(np.abs(forward(first) - logits).max()) for _ in range(repeats))
    if not moved <= close:
        yield _Finding(
            "accept_random_teacher",
            f"the same batch twice gives logits that are up to {moved:.3g} apart",
            "it computes with dropout, noise or a memory of earlier batches, though it is in evaluation mode",
            "make it heed eval(): nn.Dropout, or F.dropout(x, training=self.training)",
        )
    else:
        yield from _of_company(forward, first, views[1] if len(views) > 1 else None, logits, close)
    yield from _of_values(first, logits)


def _views(forward: Forward, canvas: Canvas, policy: ViewPolicy, positions: NDArray, size: int) -> Iterator[Tensor]:
    """Views uint8 `[B, 3, S, S]` at positions of view 0, in batches of `size`."""
    items = [(0, positions[rows]) for rows in batches(range(len(positions)), size)]
    return (item.images for item in render_batches(canvas, policy, items, device=forward.device))


def _require_logits(logits: NDArray, images: int, classes: int, plan: DumpPlan) -> None:
    what = f"teacher {plan.config.subject.teacher} gives"
    if logits.shape != (images, classes):
        raise IncompatibleError(
            f"{what} an array of {list(logits.shape)} for {images} images of {classes} classes",
            why="a teacher has one logit for each class of the dataset, in a row for each image",
            fix="use a model of these classes, or say which outputs they are: --classes FILE"
            if logits.shape[:1] == (images,)
            else "mend its forward(): a row of logits for each image, whatever the size of the batch",
        )
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).any(axis=1).sum())
        raise IncompatibleError(
            f"{what} logits that are not finite for {bad} of {images} views",
            why="its weights are broken, or it divides by zero; float32 was tried",
            fix="check its weights, or choose another teacher",
        )


def _of_company(forward: Forward, first: Tensor, second: Tensor | None, logits: NDArray, close: float) -> Iterator[_Finding]:
    """The second half of a batch once more, in other places of a batch with other views, and one view alone."""
    half = len(first) // 2
    others = first.flip(0)[half:] if second is None else second[:half]
    company = [(torch.cat([first[half:], others]), np.arange(half, len(first)))] if half else []
    for views, rows in (*company, (first[:1], np.arange(1))):
        why = "it computes with statistics of the batch: batch normalisation in training mode, or a capacity that images share"
        try:
            given = forward(views)[: len(rows)]
            moved = float(np.abs(given - logits[rows]).max()) if given.shape == logits[rows].shape else float("nan")
            what = f"views in another batch get logits that are up to {moved:.3g} apart, {close:.2g} would be rounding"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the model raises
            moved, what, why = float("nan"), f"it fails on a batch of {len(views)}", first_line(error)
        if not moved <= close:
            yield _Finding(
                "accept_batch_dependent_teacher",
                what,
                why,
                "make it compute each image by itself: layers that heed eval(), and no training=True",
            )
            return


def _of_values(first: Tensor, logits: NDArray) -> Iterator[_Finding]:
    values = logits.astype(np.float64)
    sums = values.sum(axis=1)
    if logits.shape[1] > 1 and (values >= 0).all() and np.abs(sums - 1).max() < 1e-2:
        yield _Finding(
            "accept_probabilities",
            f"its outputs are probabilities: none is below 0, and the sums of {len(values)} rows are 1",
            "a softmax of probabilities is nearly even, so that students would learn next to nothing",
            "take out its softmax, and let it return what enters that",
        )
    elif logits.shape[1] > 1 and (values <= 0).all() and np.abs(np.exp(values).sum(axis=1) - 1).max() < 1e-2:
        yield _Finding(
            "accept_probabilities",
            f"its outputs are logarithms of probabilities: of {len(values)} rows, the sums of their exponentials are 1",
            "a log-softmax has taken out each image's own level, which logits have",
            "take out its log-softmax, and let it return what enters that",
        )
    if logits.shape[1] > 1 and np.ptp(values, axis=1).max() < FLAT:
        what, why = "its logits are the same for all classes", "such logits say nothing, as of a head that was never trained"
    elif len(first) > 1 and bool((first != first[:1]).any()) and np.ptp(values, axis=0).max() < FLAT:
        what, why = f"its logits are the same for {len(values)} different views", "they do not depend on the image"
    else:
        return
    yield _Finding("accept_constant_teacher", what, why, "check its weights, and the mean and std of its pixels")


# ---------------------------------------------------------------- the order of classes


def _of_order(forward: Forward, plan: DumpPlan, teacher: Teacher, workspace: Workspace) -> Iterator[_Finding]:
    canvas, names = plan.canvas, plan.canvas.card.class_names
    if len(names) < 2:
        return
    stated = teacher.record.get("test_views")
    shown = TestViews.model_validate(stated).policy if stated else WHOLE.policy.model_copy(update={"size": plan.policy.size})
    places = np.argsort(shown.parameters(0, len(canvas), canvas.sizes).sample)

    def answers(samples: NDArray[np.int64]) -> NDArray[np.int64]:
        shown_batches = _views(forward, canvas, shown, places[samples], plan.batch_size)
        return np.concatenate([forward(images).argmax(axis=1) for images in shown_batches])

    samples = _sampled(canvas.labels, min(max(SAMPLE, OF_A_CLASS * len(names)), LARGEST_SAMPLE))
    predicted = answers(samples)
    order = class_order(predicted, canvas.labels[samples], len(names))
    cycles = [] if order.better else told_cycles(predicted, canvas.labels[samples], len(names))
    doubtful = sorted({*itertools.chain(*cycles), *(order.moved if order.suspect else ())})
    found = None
    if doubtful and len(more := _more_of(canvas.labels, doubtful, samples)):
        closer = answers(more)
        found = exchanged(closer, canvas.labels[more], cycles, len(names))
        samples, predicted = np.r_[samples, more], np.r_[predicted, closer]
        order = class_order(predicted, canvas.labels[samples], len(names))
    if order.better:
        told = told_outputs(predicted, canvas.labels[samples], len(names))
    elif found is not None:
        order, told = found, dict(enumerate(found.outputs))
    else:
        return
    mend = "" if plan.config.accepted.accept_class_order else _mended(plan, teacher, told, workspace)
    moved = [number for number, output in told.items() if output != number] or order.moved
    pairs = ", ".join(f"{names[i]!r} is its output of {names[told.get(i, order.outputs[i])]!r}" for i in moved[:3])
    yield _Finding(
        "accept_class_order",
        f"{len(moved)} of {len(names)} classes are in another order: {pairs}{', ...' if len(moved) > 3 else ''}",
        f"of {order.images} clean training images {order.as_is:.1f} % are right as they are, and {order.reordered:.1f} % in the "
        "order that other images suggest",
        mend,
    )


def _sampled(labels: NDArray, number: int) -> NDArray[np.int64]:
    """At most `number` samples, some of each class; where that are too few, of as many classes as get four."""
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    ordered = labels[by_class]
    place = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    rank = rng.permutation(int(labels.max()) + 1)[ordered]
    # Four of each class first, class after class; then one more of each, as long as there is room.
    order = np.lexsort((np.where(place < OF_A_CLASS, place, 0), rank, np.maximum(place, OF_A_CLASS - 1)))
    chosen: NDArray[np.int64] = np.sort(by_class[order[:number]])
    return chosen


def _more_of(labels: NDArray, classes: Sequence[int], known: NDArray[np.int64]) -> NDArray[np.int64]:
    """Further samples of these classes, at most 32 of each and 4,096 in all."""
    rest = np.setdiff1d(np.flatnonzero(np.isin(labels, classes)), known)
    rest = np.random.default_rng(1).permutation(rest)
    rest = rest[np.argsort(labels[rest], kind="stable")]
    place = np.arange(len(rest)) - np.searchsorted(labels[rest], labels[rest])
    chosen: NDArray[np.int64] = rest[np.argsort(place, kind="stable")][: min(CLOSER * len(classes), LARGEST_SAMPLE)]
    return chosen


def _mended(plan: DumpPlan, teacher: Teacher, told: Mapping[int, int], workspace: Workspace) -> str:
    """Write the mapping of classes to outputs, and say how it is given: by outputs of the weights that --classes speaks of.

    Classes whose images do not tell are left out, so that whoever uses the file is asked for them by name.
    """
    record, config, names = teacher.record, plan.config, plan.canvas.card.class_names
    file = workspace.teachers / f"{teacher.folder.resolve().name}.classes.json"
    training, mapping = record["training"], record.get("classes")
    as_is = training.get("epochs") == 0 and not training.get("head_epochs")
    checkpoint = config.checkpoint
    if not as_is or (checkpoint is None and training.get("start") == "checkpoint"):
        if mapping is not None and is_factory(plan.exact):
            return "name its checkpoint, and the classes of its outputs: --checkpoint FILE --classes FILE"
        checkpoint, mapping = teacher.weights, None
    known = {names[number]: output if mapping is None else mapping["outputs"][output] for number, output in told.items()}
    content = json.dumps(known, indent=1, ensure_ascii=False) + "\n"
    write_atomically(file, content.encode())
    weights = f"--checkpoint {shlex.quote(str(checkpoint))} " if checkpoint else ""
    without = " (without --teacher-folder)" if config.teacher_folder else ""
    weights += "--teacher-epochs 0 " if config.teacher_epochs else ""
    lacking = len(names) - len(known)
    added = f", after adding the {lacking} classes whose images do not tell their output" if lacking else ""
    return f"take its outputs in that order: {weights}--classes {shlex.quote(str(file))}{without}{added}"
