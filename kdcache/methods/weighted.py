"""Weights of the samples: by entropies, on kd and on dkd; and wttm's power sums, with a mean of 1."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import UsageError
from kdcache.methods.base import METHODS, Positive, Squared, entropy_rows
from kdcache.methods.decoupled import DKD
from kdcache.methods.tempered import WTTM
from kdcache.registry import FITTED
from kdcache.stats import power_sums
from kdcache.system.lazy import lazy
from kdcache.targets import Targets

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kdcache.methods.states import State
else:
    torch = lazy("torch")

__all__ = ["EADKD", "EAKD", "WTTMUnit"]


@dataclass(frozen=True, kw_only=True)
class _EntropyAware(Squared):
    """w_i = (H_T + H_T H_S / H_ub) / 2 of the row's entropies at `entropy_tau`, detached, not normalised.

    The bound `entropy_bound` of the entropies is log C; the published code has 100 in its place for all data but ImageNet,
    which nearly takes the student out.
    """

    entropy_tau: Positive = 3.0
    entropy_bound: Literal["logC"] | Positive = "logC"

    only_at_tau: ClassVar[bool] = False

    def weights(self, student: Tensor, teacher: Tensor) -> Tensor:
        """w_i of every row of logits `[B, C]`: `[B]`."""
        with torch.no_grad():
            of_teacher, of_student = (entropy_rows(x, self.entropy_tau) for x in (teacher, student))
            bound = math.log(student.shape[1]) if isinstance(self.entropy_bound, str) else self.entropy_bound
            return (of_teacher + of_teacher * of_student / bound) / 2


@METHODS.register("eakd")
@dataclass(frozen=True, kw_only=True)
class EAKD(_EntropyAware):
    """<w_i t^2 KL(p_t || q_t)>: kd in which rows weigh more where teacher and student are unsure."""

    source: ClassVar[str] = "EA-KD (ICCV 2025), KD.py of its code"

    def distance(self, student: Tensor, teacher: Tensor, targets: Targets, state: State | None) -> Tensor:
        return (self.weights(student, teacher) * self.kl(student, teacher, targets.tau)).mean()


@METHODS.register("eadkd")
@dataclass(frozen=True, kw_only=True)
class EADKD(_EntropyAware, DKD):
    """dkd with the same weights."""

    source: ClassVar[str] = "EA-KD (ICCV 2025), DKD.py of its code"

    def rows(self, student: Tensor, teacher: Tensor, label: Tensor, tau: Tensor | float) -> Tensor:
        return self.weights(student, teacher) * super().rows(student, teacher, label, tau)


@METHODS.register("wttm-unit")
@dataclass(frozen=True, kw_only=True)
class WTTMUnit(WTTM):
    """<U_i / U-bar KL(p_t || q_1)>: wttm whose weights have a mean of 1, so that its kd_weight is that of ttm.

    U-bar is the mean over the teacher's logits, found when training begins (`kdcache stats` prints it); under a control, it
    stays that of the teacher.
    """

    mean: float | None = dataclasses.field(default=None, metadata=FITTED)  # at the tau it was fitted for; found by `fit`

    source: ClassVar[str] = "transformed teacher matching (arXiv 2402.11148), section 5.3: beta = 36 / U-bar"

    def fit(self, blocks: Iterable[NDArray[np.float32]], tau: float) -> Self:
        sums = [power_sums(block, tau) for block in blocks]
        if not sum(map(len, sums)):
            raise ValueError("wttm-unit needs at least one row to average")
        return dataclasses.replace(self, mean=float(np.concatenate(sums).mean()))

    def weights(self, teacher: Tensor, tau: float) -> Tensor | float:
        if self.mean is None:
            raise UsageError(
                "method wttm-unit was not fitted",
                why="its weights are divided by their mean over an archive's logits at tau",
                fix="use what method.fit(archive.spread_logits(), tau) gives",
            )
        return super().weights(teacher, tau) / self.mean
