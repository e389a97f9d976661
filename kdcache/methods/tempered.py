"""Divergences of tempered softmaxes: one temperature for all rows, z-scores, one temperature a row, and the teacher's only."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from kdcache.methods.base import METHODS, LogitMethod, MaxLogitTau, Squared, ZScored, from_largest, kl_rows
from kdcache.registry import NEWER
from kdcache.system.lazy import lazy
from kdcache.targets import Targets

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kdcache.methods.states import State
else:
    torch = lazy("torch")

__all__ = ["KD", "LARGEST_TAU", "SMALLEST_TAU", "TTM", "WTTM", "ZKD", "MaxLogit"]

SMALLEST_TAU, LARGEST_TAU = 1e-2, 1e4
Temperature = Annotated[float, Field(ge=SMALLEST_TAU, le=LARGEST_TAU)]


@METHODS.register("kd")
@dataclass(frozen=True, kw_only=True)
class KD(Squared):
    """t^2 <KL(p_t || q_t)>: one shared, fixed temperature.

    The temperature study's eq. 1 has no t^2: that is tau_squared=0. Published code has it, so it is on by default. Without it
    the gradient per logit shrinks as 1/t^2, and with SGD that decides which temperature does best.
    With `student_tau` = s, tau is the teacher's alone and s the student's: t s <KL(p_t || q_s)>, whose gradient is as large as
    that of a shared temperature between the two.
    """

    student_tau: Temperature | None = field(default=None, metadata=NEWER)

    source: ClassVar[str] = "Hinton et al. 2015, section 2; temperature study (arXiv 2603.02430), eq. 1 and section 4.1"

    def distance(self, student: Tensor, teacher: Tensor, targets: Targets, state: State | None) -> Tensor:
        if self.student_tau is None:
            return self.kl(student, teacher, targets.tau).mean()
        log_p = torch.log_softmax(self.scores(teacher) / targets.tau, dim=1)
        log_q = torch.log_softmax(self.scores(student) / self.student_tau, dim=1)
        loss: Tensor = self.scale(math.sqrt(targets.tau * self.student_tau)) * kl_rows(log_p, log_q).mean()
        return loss

    def doubts(self, taus: Collection[float], epochs: int) -> Iterator[str]:
        yield from super().doubts(taus, epochs)
        if self.student_tau is not None and max(taus) >= 10 * self.student_tau:
            at = f"at tau {max(taus):g} the teacher is nearly uniform"
            yield f"{at}, and a student at {self.student_tau:g} is pushed there, as with ttm"


@METHODS.register("zkd")
@dataclass(frozen=True, kw_only=True)
class ZKD(ZScored, KD):
    """kd of z-scores: t^2 <KL(softmax(Z(v)/t) || softmax(Z(z)/t))>. Its t is a base temperature of scores of unit variance.

    The paper's Fig. 2 has the logits of a cat, a dog, a bird and a frog. The first student comes close to the teacher's and
    takes the dog for a bird, the second has a tenth of each. Only z-scores prefer the second one:

    >>> import torch, kdcache
    >>> teacher, students = [1.0, 3.0, 2.0, 0.0], [[1.0, 1.8, 2.0, 0.0], [0.1, 0.3, 0.2, 0.0]]
    >>> targets = kdcache.targets.Targets(torch.tensor([teacher]), tau=1.0)
    >>> losses = {name: [kdcache.methods.build(name)(torch.tensor([z]), targets) for z in students] for name in ("kd", "zkd")}
    >>> {name: [round(abs(loss.item()), 4) for loss in both] for name, both in losses.items()}
    {'kd': [0.1749, 0.3457], 'zkd': [0.0995, 0.0]}
    """

    source: ClassVar[str] = "logit standardization (CVPR 2024), section 4.3 with algorithms 1 and 2"


@METHODS.register("maxlogit")
@dataclass(frozen=True, kw_only=True)
class MaxLogit(MaxLogitTau, Squared):
    """<t_i^2 KL(softmax(Z(v)/t_i) || softmax(Z(z)/t_i))>: kd of z-scores, with (1 + sqrt 3)/2 of row i's largest one as t_i.

    The largest of the teacher's scores, or with which=both of both models'. In the paper it is zKD+.
    """

    source: ClassVar[str] = "max-logit temperature (Matsuyama et al.), algorithms 1 to 3"

    def distance(self, student: Tensor, teacher: Tensor, targets: Targets, state: State | None) -> Tensor:
        return self.kl(student, teacher, self.row_taus(student, teacher)).mean()


@METHODS.register("ttm")
@dataclass(frozen=True, kw_only=True)
class TTM(LogitMethod):
    """<KL(p_t || q_1)>: the teacher is tempered (its power transform with gamma = 1/t), the student is not. No t^2.

    At large tau the student, which is not tempered, is pushed to the uniform distribution: the paper's largest tau is 10.
    """

    largest_tau: ClassVar[float] = 10.0
    source: ClassVar[str] = "transformed teacher matching (arXiv 2402.11148), section 3.2 with eq. 9 and 15"

    def distance(self, student: Tensor, teacher: Tensor, targets: Targets, state: State | None) -> Tensor:
        log_p, log_q = torch.log_softmax(teacher / targets.tau, dim=1), torch.log_softmax(student, dim=1)
        return (self.weights(teacher, targets.tau) * kl_rows(log_p, log_q)).mean()

    def weights(self, teacher: Tensor, tau: float) -> Tensor | float:
        return 1.0


@METHODS.register("wttm")
@dataclass(frozen=True, kw_only=True)
class WTTM(TTM):
    """<U_i KL(p_t || q_1)> with the power sum U = sum_c p_c^(1/t) in [1, C^(1 - 1/t)]: smooth teachers weigh more."""

    only_at_tau: ClassVar[bool] = False
    source: ClassVar[str] = "transformed teacher matching (arXiv 2402.11148), section 3.3: U of the power transform"

    def weights(self, teacher: Tensor, tau: float) -> Tensor | float:
        # exp(lse(v / t) - lse(v) / t): nothing underflows, as p^(1/t) would.
        teacher = from_largest(teacher)
        return (torch.logsumexp(teacher / tau, dim=1) - torch.logsumexp(teacher, dim=1) / tau).exp()
