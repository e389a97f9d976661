"""Evaluation of models in training, on clean images of the test split."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.archive import entropy_histogram
from kdcache.datasets.canvas import Canvas
from kdcache.replay.prefetch import Resident, render_batches
from kdcache.system.distributed import ALONE, Team
from kdcache.system.files import write_atomically
from kdcache.system.gpu import free_memory
from kdcache.system.transfer import to_device, to_host
from kdcache.training.learner import Learner
from kdcache.training.memory import SHARE
from kdcache.training.metrics import calibration_error, relative_entropies, share_in_top
from kdcache.views.policy import RendererChoice, ViewPolicy

__all__ = ["EvalSet", "EvalSets", "evaluated"]

KEPT_BYTES = 2 << 30
KEPT_ON_GPU = (1 - SHARE) / 2  # share of a GPU's free memory for views that are kept there: half of what models leave
TEST_ENTROPIES = "test_entropies.json"  # of the last test: rows by H(q)
LOGITS_BYTES = 512 << 20  # of a test, that stay on a GPU until its end


class EvalSets:
    """The test split under the test policies of several models: `evaluations[policy]`, each made at its first use.

    All of them together keep no more rendered views than one alone would.
    """

    def __init__(
        self,
        canvas: Canvas,
        *,
        workers: int = 0,
        renderer: RendererChoice = "auto",
        device: torch.device | str = "cpu",
        team: Team = ALONE,
    ) -> None:
        self.canvas, self._device, self._resident = canvas, torch.device(device), Resident()
        drawn: dict[str, Any] = {"workers": workers, "renderer": renderer, "resident": self._resident}
        self._options: Any = {**drawn, "device": device, "team": team, "entropies": True}
        self._made: dict[str, EvalSet] = {}

    def __getitem__(self, policy: ViewPolicy) -> "EvalSet":
        if policy.digest not in self._made:
            keep = KEPT_BYTES - sum(each.kept_bytes for each in self._made.values())
            self._made[policy.digest] = EvalSet(self.canvas, policy, keep=keep, **self._options)
        return self._made[policy.digest]

    @property
    def to_come(self) -> int:
        """Bytes of a GPU that the canvas is going to take, where it has more photographs than views are kept of."""
        nbytes = self.canvas.pixels.nbytes
        if self._device.type != "cuda" or nbytes <= KEPT_BYTES or self._resident.canvas is self.canvas:
            return 0
        return nbytes if self._resident.has_room(nbytes, self._device) else 0


class EvalSet:
    """The test split as the views of a test policy: rendered once and kept, or each time again above `keep` bytes.

    With `entropies`, a learner's last test leaves a histogram of the entropies of its outputs in its folder.
    Views for models on a GPU `device` are rendered there, and kept there if they take little of its memory, else in pinned
    memory of the host. Each process of a `team` tests a part of them, and all get the figures of the whole.
    """

    def __init__(
        self,
        canvas: Canvas,
        policy: ViewPolicy,
        *,
        batch_size: int = 256,
        workers: int = 0,
        renderer: RendererChoice = "auto",
        device: torch.device | str = "cpu",
        team: Team = ALONE,
        keep: int = KEPT_BYTES,
        resident: Resident | None = None,
        entropies: bool = False,
    ) -> None:
        self._entropies = entropies
        self.canvas, self._team, device = canvas, team, torch.device(device)
        self.labels = torch.from_numpy(canvas.labels)
        order = np.argsort(policy.parameters(0, len(canvas), canvas.sizes).sample)
        starts = range(0, len(canvas), batch_size)
        self._batches = len(starts)
        items = [(0, order[start : start + batch_size]) for start in starts[team.number :: team.size]]

        nbytes = len(canvas) * 3 * policy.size**2
        self.kept_bytes = nbytes if nbytes <= keep else 0
        # Views that are rendered only once need the canvas on a GPU only once.
        drawn: dict[str, Any] = {"workers": workers, "renderer": renderer, "device": device}
        drawn["resident"] = None if self.kept_bytes else resident or Resident()

        def render() -> Iterator[Tensor]:
            return (item.images for item in render_batches(canvas, policy, items, **drawn))

        self._render = render
        self._kept: list[Tensor] | None = None
        if self.kept_bytes:
            on_device = device.type == "cuda" and nbytes / team.size <= KEPT_ON_GPU * free_memory(device)
            self._kept = [to_device(views, device) if on_device else to_host(views) for views in render()]
            _settle(device)

    def tested(self, learners: Sequence[Learner], check: Callable[[], None] = lambda: None) -> list[dict[str, float]]:
        """`metrics` of each learner's model, `ema_top1` is the top-1 of its averaged weights, if it keeps any.

        `check` is called after each batch and may raise.
        """
        logits: list[list[Tensor]] = [[] for _ in learners]
        averaged: list[list[Tensor]] = [[] for _ in learners]
        device = learners[0].device
        for learner in learners:
            learner.settle()
        for views in self._kept or self._render():
            views = to_device(views, device)  # one copy for all learners
            for learner, part, other in zip(learners, logits, averaged, strict=True):
                part.append(self._until_the_end(learner.predict(views), len(learners)))
                if learner.average is not None:
                    other.append(self._until_the_end(learner.predict(views, averaged=True), len(learners)))
            if self._team.size == 1:  # processes with fewer batches would not take part in the check
                check()
        _settle(device)
        figures = []
        for part, learner in zip(logits, learners, strict=True):
            whole = self._whole(part)
            figures.append(self.metrics(whole))
            if self._entropies and self._team.first and learner.epoch + 1 == learner.config.epochs:
                self._write_entropies(whole, learner.folder)
        for row, other, learner in zip(figures, averaged, learners, strict=True):
            if learner.average is not None:
                row["ema_top1"] = self.metrics(self._whole(other))["test_top1"]
        return figures

    def _write_entropies(self, logits: Tensor, folder: Path) -> None:
        """Leave a histogram of the test images' entropies in a run's folder, unless its logits are not finite."""
        relative = relative_entropies(logits).double().cpu().numpy()
        if np.isfinite(relative).all():
            found = entropy_histogram(relative, logits.shape[1])
            write_atomically(folder / TEST_ENTROPIES, found.model_dump_json().encode())

    def _until_the_end(self, logits: Tensor, learners: int) -> Tensor:
        """Logits of a batch: where they are, or on their way to the host if all of the test would take much of a GPU's memory."""
        much = 4 * logits.shape[1] * len(self.labels) * learners > LOGITS_BYTES
        return to_host(logits) if much else logits

    def _whole(self, part: list[Tensor]) -> Tensor:
        """Logits `[N, C]` of all batches. Process r of n has computed the batches r, r + n, r + 2n, ..."""
        parts = [part] if self._team.size == 1 else self._team.shared([logits.cpu() for logits in part])
        return torch.cat([parts[batch % len(parts)][batch // len(parts)] for batch in range(self._batches)])

    def metrics(self, logits: Tensor) -> dict[str, float]:
        """Metrics of `logits [N, C]` on the test split; all NaN if a logit is not finite."""
        labels = to_device(self.labels, logits.device)
        figures = {
            "test_top1": 100.0 * share_in_top(logits, labels, 1).double(),
            "test_top5": 100.0 * share_in_top(logits, labels, 5).double(),
            "test_loss": F.cross_entropy(logits, labels).double(),
            "test_ece": calibration_error(logits, labels),
        }
        *values, finite = torch.stack([*figures.values(), torch.isfinite(logits).all().double()]).tolist()
        return dict(zip(figures, values if finite else [math.nan] * len(values), strict=True))


def _settle(device: torch.device) -> None:
    """Wait until what was copied to the host is there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def evaluated(
    evaluations: Sequence[EvalSet], learners: Sequence[Learner], check: Callable[[], None] = lambda: None
) -> list[dict[str, float]]:
    """Test each learner on its own of `evaluations`; those of one evaluation share its rendered views."""
    rows: dict[int, dict[str, float]] = {}
    for evaluation in dict.fromkeys(evaluations):
        chosen = [number for number, own in enumerate(evaluations) if own is evaluation]
        tested = evaluation.tested([learners[number] for number in chosen], check)
        rows |= dict(zip(chosen, tested, strict=True))
    return [rows[number] for number in range(len(learners))]
