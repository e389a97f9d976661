"""Trained teachers of a workspace: how to test, find, load and compare them, and warnings about poor ones."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache.datasets.canvas import Canvas
from kdcache.errors import NotFoundError
from kdcache.models.classes import said_digest
from kdcache.models.creation import Normalisation, load_weights, require_weights
from kdcache.models.names import kept, public_name, weights_identity
from kdcache.replay.prefetch import render_batches
from kdcache.stats import relative_entropy
from kdcache.system.distributed import ALONE, Team
from kdcache.system.files import write_atomically
from kdcache.system.progress import Progress
from kdcache.system.seals import sealed_record
from kdcache.teachers.as_is import create_recorded
from kdcache.teachers.forward import batches
from kdcache.training.evaluation import EvalSet
from kdcache.views.policy import ViewPolicy
from kdcache.workspace import Workspace, read_teacher

__all__ = ["Exam", "Teacher", "compared", "doubt", "find_teacher", "load_teacher", "registered", "teacher_at"]

REPORT_VIEWS = 1024  # training views for the measurement of a teacher's entropies


@dataclass(frozen=True)
class Teacher:
    """A trained teacher: its folder with `model.safetensors` and its record `teacher.json`."""

    folder: Path
    record: dict[str, Any]

    @property
    def weights(self) -> Path:
        return self.folder / "model.safetensors"


class Exam(EvalSet):
    """The clean test images, and some training views like a dump's, for an early measurement of the teacher's entropies.

    The temperature study does not state the images of its H^(p) and H^(p-bar). Its Fig. 4 averages training samples, and
    its values are well above the 0.18 of label smoothing with 37 classes, which fits augmented, mixed views. Archives
    contain such views too, so their own figures are close to these.
    """

    def __init__(
        self, test: Canvas, tested: ViewPolicy, train: Canvas, shown: ViewPolicy, ahead: Any, team: Team = ALONE
    ) -> None:
        super().__init__(test, tested, team=team, **ahead)
        items = [(0, rows) for rows in batches(range(min(REPORT_VIEWS, len(train))), 256)]
        self._views = [item.images for item in render_batches(train, shown, items, **ahead)]

    def metrics(self, logits: Tensor) -> dict[str, float]:
        return super().metrics(logits) | _entropies("test", logits)

    def on_views(self, predict: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Mean relative entropies on the training views, at tau 1."""
        return _entropies("views", torch.cat([predict(views) for views in self._views]))

    def of(self, predict: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """All metrics of a model that is not in training, on the test images and the training views."""
        clean = self._whole([predict(views) for views in self._kept or self._render()])
        return self.metrics(clean) | self.on_views(predict)


def _entropies(which: str, logits: Tensor) -> dict[str, float]:
    if not torch.isfinite(logits).all():
        return {f"{which}_entropy": math.nan, f"{which}_entropy_rest": math.nan}
    h, rest = relative_entropy(logits.cpu().numpy())
    return {f"{which}_entropy": float(h.mean()), f"{which}_entropy_rest": float(rest.mean())}


def compared(teachers: Sequence[Teacher]) -> list[str]:
    """Lines that compare teachers by top-1 and entropies, with an explanation of the entropies."""
    rows: list[tuple[str, ...]] = [("epochs", "start", "top-1", "H^(p)", "H^(p-bar)", "clean H^(p)", "H^(p-bar)")]
    for training, entropies, top1 in (
        (t.record["training"], t.record.get("entropies"), t.record["top1_clean"]) for t in teachers
    ):
        parts = [(entropies or {}).get(which, {}) for which in ("views", "clean")]
        figures = [f"{part[key]:.3f}" if key in part else "-" for part in parts for key in ("entropy", "entropy_rest")]
        alone = not training.get("epochs") and training.get("head_epochs")
        rows.append(
            ("head" if alone else str(training.get("epochs", "-")), str(training.get("start", "-")), f"{top1:.2f}", *figures)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [
        "top-1 on clean test images (%); relative entropies at tau 1 of training views as a dump has them and of clean images:",
        *lines,
        "longer finetuning lowers H^(p) and raises H^(p-bar) to 1, as of label smoothing: such teachers distil worse, "
        "and small tau catches up (temperature study, section 4.3)",
    ]


def doubt(teacher: Teacher, labels: NDArray) -> str | None:
    """A warning about a teacher whose accuracy is near that of always guessing the most frequent of `labels [N]`, or None.

    Near is three times as much, or two ninths of the way from there to 100 %, whichever is less: they are the same at 10 classes.
    """
    record, classes = teacher.record, len(teacher.record["class_names"])
    guessing = 100 * float(np.bincount(labels).max()) / len(labels)
    if record["top1_clean"] >= guessing + min(2 * guessing, (100 - guessing) * 2 / 9):
        return None
    if record["training"].get("epochs") == 0 and not record["training"].get("head_epochs"):
        why = (
            "its classes are in another order than the dataset's, or it wants pixels of another mean and std than "
            f"{_triple(record['mean'])} and {_triple(record['std'])} (train-teacher --mean, --std)"
        )
    else:
        why = "it was trained too briefly or at a wrong rate, or labels and images do not belong together"
    return (
        f"WARNING: teacher {teacher.folder} has a top-1 of {record['top1_clean']:.2f} % on clean test images, where guessing has "
        f"{guessing:.2f} % of {classes} classes: {why}. Students would learn from noise"
    )


def _triple(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def find_teacher(
    name: str,
    canvas: Canvas,
    size: int,
    workspace: Workspace,
    progress: Progress,
    *,
    epochs: int | None = None,
    checkpoint: Path | None = None,
    classes: Path | None = None,
) -> Teacher | None:
    """The newest teacher by exact name that was trained on this canvas for views of `size` pixels; None if there is none.

    `epochs`, `checkpoint` and `classes` restrict the search to teachers trained for so many epochs, made from that file, or
    with classes as that file says. Those of 0 epochs have weights as they are: not a head that was trained alone.
    """
    wanted: dict[str, Any] = {"canvas_digest": canvas.digest}
    wanted |= {} if epochs is None else {"epochs": epochs} if epochs else {"epochs": 0, "head_epochs": None}
    wanted |= {} if checkpoint is None else {"checkpoint_sha256": weights_identity(checkpoint)}
    said = None if classes is None else said_digest(classes)
    teachers = [
        Teacher(folder, record)
        for folder, record in workspace.teacher_records(progress)
        if (record["name"], record["input_size"]) == (public_name(name), size)
        and all(record["training"].get(key) == value for key, value in wanted.items())
        and (said is None or said in _said(record))
    ]
    if len(teachers) > 1:
        durations = ", ".join(str(teacher.record["training"].get("epochs", "?")) for teacher in teachers)
        progress.say(
            f"teacher: {teachers[0].folder}, the newest of {len(teachers)} (newest first, they had {durations} epochs; "
            "choose with --teacher-epochs or --teacher-folder)"
        )
    return teachers[0] if teachers else None


def _said(record: Mapping[str, Any]) -> list[str]:
    """Digests of all that `--classes` said when it came to this teacher."""
    said = record["training"].get("said_sha256", [])
    return [said] if isinstance(said, str) else list(said)


def registered(folder: Path, said: str | None) -> Teacher:
    """The teacher in a folder. `find_teacher` finds it from now on by what `--classes` said now, too (`said`, its digest)."""
    record = read_teacher(folder)
    if said is not None and said not in _said(record):
        record["training"]["said_sha256"] = [*_said(record), said]
        file = folder / "teacher.json"
        before = file.stat()
        write_atomically(file, sealed_record(record))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # by which teachers are the newest
    return Teacher(folder, record)


def teacher_at(folder: Path) -> Teacher:
    """The teacher in a folder. Raises NotFoundError if there is none."""
    if not (folder / "teacher.json").is_file():
        raise NotFoundError(
            f"no teacher at {folder}", why="there is no teacher.json in it", fix="train one: kdcache train-teacher --teacher ..."
        )
    return Teacher(folder, read_teacher(folder))


def load_teacher(teacher: Teacher) -> tuple[nn.Module, Normalisation]:
    """Load a teacher in evaluation mode. Raises IncompatibleError if its weights differ from its record."""
    record = teacher.record
    if not teacher.weights.is_file():
        raise NotFoundError(
            f"teacher {teacher.folder} has no weights",
            why="model.safetensors is missing",
            fix="train it again: kdcache train-teacher",
        )
    model, _ = create_recorded(kept(record["name"], teacher.folder), record)
    load_weights(model, teacher.weights)
    require_weights(model, record["weights_sha256"], teacher.weights)
    return model.eval().requires_grad_(False), Normalisation(tuple(record["mean"]), tuple(record["std"]))
