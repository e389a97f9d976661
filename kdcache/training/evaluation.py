"""Evaluation of models in training, on clean images of the test split."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.datasets.canvas import Canvas
from kdcache.replay.prefetch import render_batches
from kdcache.system.distributed import ALONE, Team
from kdcache.training.learner import Learner
from kdcache.training.metrics import calibration_error, top_k
from kdcache.views.policy import RendererChoice, ViewPolicy

__all__ = ["EvalSet", "EvalSets", "evaluated"]

KEPT_BYTES = 2 << 30


class EvalSets:
    """The test split under the test policies of several models: `evaluations[policy]`, each made at its first use.

    All of them together keep no more rendered views than one alone would.
    """

    def __init__(self, canvas: Canvas, *, workers: int = 0, renderer: RendererChoice = "auto", team: Team = ALONE) -> None:
        self.canvas, self._options = canvas, {"workers": workers, "renderer": renderer, "team": team}
        self._made: dict[str, EvalSet] = {}

    def __getitem__(self, policy: ViewPolicy) -> "EvalSet":
        if policy.digest not in self._made:
            keep = KEPT_BYTES - sum(each.kept_bytes for each in self._made.values())
            self._made[policy.digest] = EvalSet(self.canvas, policy, keep=keep, **self._options)  # type: ignore[arg-type]
        return self._made[policy.digest]


class EvalSet:
    """The test split as the views of a test policy: rendered once and kept, or each time again above `keep` bytes.

    Each process of a `team` tests a part of it, and all get the figures of the whole.
    """

    def __init__(
        self,
        canvas: Canvas,
        policy: ViewPolicy,
        *,
        batch_size: int = 256,
        workers: int = 0,
        renderer: RendererChoice = "auto",
        team: Team = ALONE,
        keep: int = KEPT_BYTES,
    ) -> None:
        self._team = team
        self.labels = torch.from_numpy(canvas.labels)
        order = np.argsort(policy.parameters(0, len(canvas), canvas.sizes).sample)
        starts = range(0, len(canvas), batch_size)
        self._batches = len(starts)
        items = [(0, order[start : start + batch_size]) for start in starts[team.number :: team.size]]

        def render() -> Iterator[Tensor]:
            return (item.images for item in render_batches(canvas, policy, items, workers=workers, renderer=renderer))

        self._render = render
        nbytes = len(canvas) * 3 * policy.size**2
        self.kept_bytes = nbytes if nbytes <= keep else 0
        self._kept = list(render()) if self.kept_bytes else None

    def tested(self, learners: Sequence[Learner], check: Callable[[], None] = lambda: None) -> list[dict[str, float]]:
        """`metrics` of each learner's model. `ema_top1` is the top-1 of its averaged weights, if it keeps any.

        `check` is called after each batch and may raise.
        """
        logits: list[list[Tensor]] = [[] for _ in learners]
        averaged: list[list[Tensor]] = [[] for _ in learners]
        for learner in learners:
            learner.settle()
        for views in self._kept or self._render():
            views = views.to(learners[0].device)  # one copy for all learners
            for learner, part, other in zip(learners, logits, averaged, strict=True):
                part.append(learner.predict(views))
                if learner.average is not None:
                    other.append(learner.predict(views, averaged=True))
            if self._team.size == 1:  # processes with fewer batches would not take part in the check
                check()
        figures = [self.metrics(self._whole(part)) for part in logits]
        for row, other, learner in zip(figures, averaged, learners, strict=True):
            if learner.average is not None:
                row["ema_top1"] = self.metrics(self._whole(other))["test_top1"]
        return figures

    def _whole(self, part: list[Tensor]) -> Tensor:
        """Logits `[N, C]` of all batches. Process r of n has computed the batches r, r + n, r + 2n, ..."""
        parts = self._team.shared(part)
        return torch.cat([parts[batch % len(parts)][batch // len(parts)] for batch in range(self._batches)])

    def metrics(self, logits: Tensor) -> dict[str, float]:
        """Metrics of `logits [N, C]` on the test split; all NaN if a logit is not finite."""
        if not torch.isfinite(logits).all():
            return dict.fromkeys(("test_top1", "test_top5", "test_loss", "test_ece"), math.nan)
        return {
            "test_top1": top_k(logits, self.labels, 1),
            "test_top5": top_k(logits, self.labels, 5),
            "test_loss": F.cross_entropy(logits, self.labels).item(),
            "test_ece": calibration_error(logits, self.labels),
        }


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
