"""Losses that treat the label's class apart from the others.

The split of a softmax into the label's probability and the rest is computed from log odds, z_y - lse(rest), and the rest's
own softmax from its own logsumexp: neither overflows where a probability underflows, as logarithms of summed ones do.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.methods import method
from kdcache.methods.base import Labelled, State, ZScored, positive, warm_up

__all__ = ["DKD", "NKD", "RLD", "WSLD", "ZDKD", "ZRLD"]


@method.register("dkd")
@dataclass(frozen=True, kw_only=True)
class DKD(Labelled):
    """alpha TCKD + beta NCKD: t^2 <KL> of (label, all others), and of the softmaxes over the others.

    Grows from 0 over `warmup_epochs`, as published for CIFAR (ImageNet: 1).
    """

    alpha: float = 1.0
    beta: float = 8.0
    warmup_epochs: int = 20
    tau_squared: bool = True

    source: ClassVar[str] = "decoupled knowledge distillation (CVPR 2022); dkd_loss of mdistiller"

    def schedule(self, state: State | None) -> float:
        return warm_up(state, self.warmup_epochs)

    def rows(self, student: Tensor, teacher: Tensor, label: Tensor, tau: float) -> Tensor:
        z, v = self.scores(student) / tau, self.scores(teacher) / tau
        rows = self.alpha * target_rows(v, z, label) + self.beta * rest_rows(v, z, _is(label, z))
        return rows * tau**2 if self.tau_squared else rows


@method.register("zdkd")
@dataclass(frozen=True, kw_only=True)
class ZDKD(ZScored, DKD):
    """dkd of z-scores."""

    source: ClassVar[str] = "logit standardization (CVPR 2024), section 5, on DKD"


@method.register("rld")
@dataclass(frozen=True, kw_only=True)
class RLD(Labelled):
    """alpha SCD + beta MCD: the teacher's confidence in its own top class becomes the student's in the label, and what the
    teacher says of classes that it finds less likely than the label is matched among these.

    SCD has a temperature of its own, `confidence_tau` (null: tau); the published configuration has 1. With the teacher's
    top class as label this is dkd.
    """

    alpha: float = 1.0
    beta: float = 8.0
    warmup_epochs: int = 20
    confidence_tau: float | None = 1.0
    tau_squared: bool = True

    source: ClassVar[str] = "refined logit distillation (ICLR 2025), rld_loss of its code"

    def __post_init__(self) -> None:
        if self.confidence_tau is not None:
            positive("rld", confidence_tau=self.confidence_tau)

    def schedule(self, state: State | None) -> float:
        return warm_up(state, self.warmup_epochs)

    def rows(self, student: Tensor, teacher: Tensor, label: Tensor, tau: float) -> Tensor:
        z, v = self.scores(student), self.scores(teacher)
        own = tau if self.confidence_tau is None else self.confidence_tau
        confidence = binary_rows(log_odds(v / own, v.argmax(dim=1)), log_odds(z / own, label))
        left_out = v >= v.gather(1, label[:, None])  # ties with the label go too
        masked = rest_rows(v / tau, z / tau, left_out)
        return (
            self.alpha * confidence * (own**2 if self.tau_squared else 1.0)
            + self.beta * masked * (tau**2 if self.tau_squared else 1.0)
        )  # fmt: skip


@method.register("zrld")
@dataclass(frozen=True, kw_only=True)
class ZRLD(ZScored, RLD):
    """rld of z-scores, both parts at tau."""

    confidence_tau: float | None = None

    source: ClassVar[str] = "refined logit distillation (ICLR 2025), with --logit-stand"


@method.register("nkd")
@dataclass(frozen=True, kw_only=True)
class NKD(Labelled):
    """<-p_y log q_y> at temperature 1, and gamma t^2 times the cross entropy of the softmaxes over the other classes."""

    gamma: float = 1.5
    tau_squared: bool = True

    source: ClassVar[str] = "normalized knowledge distillation (ICCV 2023); nkd of cls_KD"

    def rows(self, student: Tensor, teacher: Tensor, label: Tensor, tau: float) -> Tensor:
        target = -F.logsigmoid(log_odds(teacher, label)).exp() * F.logsigmoid(log_odds(student, label))
        left_out = _is(label, student)
        log_p, log_q = (rest_log_softmax(x / tau, left_out) for x in (teacher, student))
        others = -(log_p.exp() * log_q).sum(dim=1)  # log_q is 0 where the label is
        return target + self.gamma * others * (tau**2 if self.tau_squared else 1.0)


@method.register("wsld")
@dataclass(frozen=True, kw_only=True)
class WSLD(Labelled):
    """alpha t^2 <w_i CE(p_t, q_t)> with w = 1 - exp(-CE_student / (CE_teacher + eps)) at temperature 1, detached."""

    alpha: float = 2.25
    eps: float = 1e-7
    tau_squared: bool = True

    source: ClassVar[str] = "weighted soft labels (ICLR 2021); wsld of cls_KD"

    def rows(self, student: Tensor, teacher: Tensor, label: Tensor, tau: float) -> Tensor:
        student_ce, teacher_ce = (-F.logsigmoid(log_odds(x.detach(), label)) for x in (student, teacher))
        weights = -torch.expm1(-student_ce / (teacher_ce + self.eps))
        p, log_q = torch.softmax(teacher / tau, dim=1), torch.log_softmax(student / tau, dim=1)
        return -self.alpha * (tau**2 if self.tau_squared else 1.0) * weights * (p * log_q).sum(dim=1)


def log_odds(logits: Tensor, label: Tensor) -> Tensor:
    """log p_y / (1 - p_y) of every row, `[B]`, for the softmax of `logits [B, C]`."""
    rest = logits.masked_fill(_is(label, logits), -torch.inf).logsumexp(dim=1)
    return logits.gather(1, label[:, None])[:, 0] - rest


def binary_rows(odds_p: Tensor, odds_q: Tensor) -> Tensor:
    """KL of (p, 1 - p) and (q, 1 - q), `[B]`, from their log odds."""
    return odds_p.sigmoid() * (F.logsigmoid(odds_p) - F.logsigmoid(odds_q)) + (-odds_p).sigmoid() * (
        F.logsigmoid(-odds_p) - F.logsigmoid(-odds_q)
    )


def target_rows(v: Tensor, z: Tensor, label: Tensor) -> Tensor:
    """KL of (label, all others) in `v` and in `z` `[B, C]`, both tempered: `[B]`."""
    return binary_rows(log_odds(v, label), log_odds(z, label))


def rest_rows(v: Tensor, z: Tensor, left_out: Tensor) -> Tensor:
    """KL of the softmaxes over the classes that are not `left_out` (bool `[B, C]`); 0 where fewer than two are left: `[B]`."""
    log_p, log_q = (rest_log_softmax(x, left_out) for x in (v, z))
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def rest_log_softmax(logits: Tensor, left_out: Tensor) -> Tensor:
    """Log of the softmax over the classes that are not `left_out`, and 0 at those that are (whose terms then are 0 too)."""
    alone = left_out.all(dim=1, keepdim=True)  # then there is no rest, whose logsumexp would be -inf
    total = logits.masked_fill(left_out & ~alone, -torch.inf).logsumexp(dim=1, keepdim=True)
    return (logits - total).masked_fill(left_out, 0.0)


def _is(label: Tensor, logits: Tensor) -> Tensor:
    """Where the label's class is: bool `[B, C]`."""
    return torch.arange(logits.shape[1], device=logits.device) == label[:, None]
