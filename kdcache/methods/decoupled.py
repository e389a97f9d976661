"""Losses that treat the label's class apart from the others.

The split of a softmax into the label's probability and the rest is computed from log odds, z_y - logsumexp(rest), and the
rest's own softmax without the label's logit: neither overflows where a probability underflows, as logarithms of summed ones do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kdcache.methods.base import METHODS, Epochs, Labelled, MaxLogitTau, Positive, Squared, Weight, ZScored, kl_rows
from kdcache.system.lazy import lazy

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")

__all__ = ["DKD", "NKD", "RLD", "WSLD", "ZDKD", "ZRLD", "MaxLogitDKD"]

FAR = -1e30  # a logit of what is left out


@METHODS.register("dkd")
@dataclass(frozen=True, kw_only=True)
class DKD(Labelled, Squared):
    """alpha TCKD + beta NCKD: t^2 <KL> of (label, all others), and of the softmaxes over the others.

    Grows from 0 over `warmup_epochs`, as published for CIFAR (ImageNet: 1).
    """

    alpha: Weight = 1.0
    beta: Weight = 8.0
    warmup_epochs: Epochs = 20

    source: ClassVar[str] = "decoupled knowledge distillation (CVPR 2022); dkd_loss of mdistiller"

    @property
    def ramp_epochs(self) -> int:
        return self.warmup_epochs

    def rows(self, student: Tensor, teacher: Tensor, label: Tensor, tau: Tensor | float) -> Tensor:
        """The loss of every row, `[B]`, at one temperature or at one of each row `[B, 1]`."""
        z, v = self.scores(student) / tau, self.scores(teacher) / tau
        log_p, log_q = (torch.log_softmax(without(x, label), dim=1) for x in (v, z))
        tckd = binary_rows(log_odds(v, label, log_p), log_odds(z, label, log_q))
        rows: Tensor = self.scale(tau) * (self.alpha * tckd + self.beta * kl_rows(log_p, log_q))
        return rows


@METHODS.register("zdkd")
@dataclass(frozen=True, kw_only=True)
class ZDKD(ZScored, DKD):
    """dkd of z-scores."""

    source: ClassVar[str] = "logit standardization (CVPR 2024), section 5, on DKD"


@METHODS.register("maxlogit-dkd")
@dataclass(frozen=True, kw_only=True)
class MaxLogitDKD(MaxLogitTau, DKD):
    """dkd of z-scores, with maxlogit's temperature of each row in both parts. In the paper it is zDKD+."""

    source: ClassVar[str] = "max-logit temperature (Matsuyama et al.), algorithms 1 and 2 on DKD"

    def rows(self, student: Tensor, teacher: Tensor, label: Tensor, tau: Tensor | float) -> Tensor:
        return super().rows(student, teacher, label, self.row_taus(student, teacher))


@METHODS.register("rld")
@dataclass(frozen=True, kw_only=True)
class RLD(Labelled, Squared):
    """alpha SCD + beta MCD: the teacher's confidence in its own top class becomes the student's in the label, and what the
    teacher says of classes that it finds less likely than the label is matched among these.

    SCD has a temperature of its own, `confidence_tau` (null: tau); the published configuration has 1. With the teacher's
    top class as label this is dkd.
    """

    alpha: Weight = 1.0
    beta: Weight = 8.0
    warmup_epochs: Epochs = 20
    confidence_tau: Positive | None = 1.0

    only_at_tau: ClassVar[bool] = False
    source: ClassVar[str] = "refined logit distillation (ICLR 2025), rld_loss of its code"

    @property
    def ramp_epochs(self) -> int:
        return self.warmup_epochs

    def doubts(self, taus: Collection[float], epochs: int) -> Iterator[str]:
        yield from super().doubts(taus, epochs)
        if self.label_rule == "teacher_argmax":
            yield "of the teacher's own top class, rld is dkd with TCKD at confidence_tau; dkd says so plainly"

    def rows(self, student: Tensor, teacher: Tensor, label: Tensor, tau: float) -> Tensor:
        z, v = self.scores(student), self.scores(teacher)
        own = tau if self.confidence_tau is None else self.confidence_tau
        confidence = binary_rows(log_odds(v / own, v.argmax(dim=1)), log_odds(z / own, label))
        left_out = v >= v.gather(1, label[:, None])  # ties with the label go too; where all go, both are uniform
        less, log_q = (v / tau).masked_fill(left_out, FAR), torch.log_softmax((z / tau).masked_fill(left_out, FAR), dim=1)
        # Not kl_rows: exponentials of FAR are slow.
        masked = (torch.softmax(less, dim=1) * (torch.log_softmax(less, dim=1) - log_q)).sum(dim=1)
        rows: Tensor = self.scale(own) * self.alpha * confidence + self.scale(tau) * self.beta * masked
        return rows


@METHODS.register("zrld")
@dataclass(frozen=True, kw_only=True)
class ZRLD(ZScored, RLD):
    """rld of z-scores, both parts at tau."""

    confidence_tau: Positive | None = None

    only_at_tau: ClassVar[bool] = True
    source: ClassVar[str] = "refined logit distillation (ICLR 2025), with --logit-stand"


@METHODS.register("nkd")
@dataclass(frozen=True, kw_only=True)
class NKD(Labelled, Squared):
    """<-p_y log q_y> at temperature 1, and gamma t^2 times the cross entropy of the softmaxes over the other classes."""

    gamma: Weight = 1.5

    only_at_tau: ClassVar[bool] = False
    source: ClassVar[str] = "normalized knowledge distillation (ICCV 2023); nkd of cls_KD"

    def rows(self, student: Tensor, teacher: Tensor, label: Tensor, tau: float) -> Tensor:
        target = F.cross_entropy(teacher, label, reduction="none").neg().exp() * F.cross_entropy(student, label, reduction="none")
        v, z = without(teacher / tau, label), without(student / tau, label)
        p, log_q = torch.softmax(v, dim=1), torch.log_softmax(z, dim=1)
        others = -(p * log_q).sum(dim=1)  # p is 0 where the label is
        rows: Tensor = target + self.scale(tau) * self.gamma * others
        return rows


@METHODS.register("wsld")
@dataclass(frozen=True, kw_only=True)
class WSLD(Labelled, Squared):
    """alpha t^2 <w_i CE(p_t, q_t)> with w = 1 - exp(-CE_student / (CE_teacher + eps)) at temperature 1, detached."""

    alpha: Weight = 2.25
    eps: Weight = 1e-7

    only_at_tau: ClassVar[bool] = False
    source: ClassVar[str] = "weighted soft labels (ICLR 2021); wsld of cls_KD"

    def rows(self, student: Tensor, teacher: Tensor, label: Tensor, tau: float) -> Tensor:
        student_ce, teacher_ce = (-F.logsigmoid(log_odds(x.detach(), label)) for x in (student, teacher))
        weights = -torch.expm1(-student_ce / (teacher_ce + self.eps))
        p, log_q = torch.softmax(teacher / tau, dim=1), torch.log_softmax(student / tau, dim=1)
        rows: Tensor = -self.scale(tau) * self.alpha * weights * (p * log_q).sum(dim=1)
        return rows


def without(logits: Tensor, label: Tensor) -> Tensor:
    """`logits [B, C]` with the label's so far below the others that a softmax has 0 there. It stays finite, as do products."""
    return logits.scatter(1, label[:, None], FAR)


def log_odds(logits: Tensor, label: Tensor, log_rest: Tensor | None = None) -> Tensor:
    """log p_y / (1 - p_y) of every row, `[B]`, for the softmax of `logits [B, C]`; `log_rest` is that of all but the label."""
    if log_rest is None:
        log_rest = torch.log_softmax(without(logits, label), dim=1)
    # z_y - logsumexp(rest), the latter from any class of the rest: its logit less its log probability.
    label = label[:, None]
    other = (label + 1) % logits.shape[1]
    return (logits.gather(1, label) - logits.gather(1, other) + log_rest.gather(1, other))[:, 0]


def binary_rows(odds_p: Tensor, odds_q: Tensor) -> Tensor:
    """KL of (p, 1 - p) and (q, 1 - q), `[B]`, from their log odds."""
    return odds_p.sigmoid() * (F.logsigmoid(odds_p) - F.logsigmoid(odds_q)) + (-odds_p).sigmoid() * (
        F.logsigmoid(-odds_p) - F.logsigmoid(-odds_q)
    )
