"""Losses over the relations within a batch: what they are worth depends on which samples are in it together."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.methods import method
from kdcache.methods.base import LogitMethod, State, ZScored
from kdcache.targets import Targets

__all__ = ["DIST", "MLKD", "ZMLKD"]


@method.register("dist")
@dataclass(frozen=True, kw_only=True)
class DIST(LogitMethod):
    """t^2 (beta inter + gamma intra): 1 - Pearson's correlation of tempered softmaxes, over rows and over columns (classes).

    A correlation has no scale that t^2 could make up for: loss and gradient grow as t^2 unless tau_squared is off. eps is
    added to the product of the norms, as published, and biases them at large tau and many classes (by 0.27 at tau 40, C = 1000).
    """

    beta: float = 1.0
    gamma: float = 1.0
    eps: float = 1e-8
    tau_squared: bool = True

    source: ClassVar[str] = "DIST (NeurIPS 2022), dist_kd.py of its code"
    needs: ClassVar[tuple[str, ...]] = ("batch",)

    def distance(self, student: Tensor, teacher: Tensor, targets: Targets, state: State | None) -> Tensor:
        q, p = (torch.softmax(x / targets.tau, dim=1) for x in (student, teacher))
        inter = 1 - self._correlation(q, p, dim=1).mean()
        intra = 1 - self._correlation(q, p, dim=0).mean()
        loss = self.beta * inter + self.gamma * intra
        return loss * targets.tau**2 if self.tau_squared else loss

    def _correlation(self, a: Tensor, b: Tensor, dim: int) -> Tensor:
        a, b = (x - x.mean(dim=dim, keepdim=True) for x in (a, b))
        norms = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
        correlation: Tensor = (a * b).sum(dim=dim) / (norms + self.eps)
        return correlation


@method.register("mlkd")
@dataclass(frozen=True, kw_only=True)
class MLKD(LogitMethod):
    """Multi-level: kd at tau and `temperatures` (no other t in it), the classes' relations P'P and the samples' PP'.

    f_s sum_T KD_T + f_c sum_T cc_T + f_s sum_T bc_T over T = tau and `temperatures`, cc = |P'P - Q'Q|^2 / C and
    bc = |PP' - QQ'|^2 / B. As in the published code, its masks of confident samples and classes only multiply by the fraction
    f that they let through. With two `views`, KD_T of the second one (the strong one, published with RandAugment) is added for
    tau and `temperatures`, but for the last two of those (2 and 6), which see the first; `views=1` is the form for one view.
    """

    temperatures: str = "3+5+2+6"
    kd_weight: float = 0.9
    views: int = 2
    tau_squared: bool = True  # of the kd terms; the relations have none

    source: ClassVar[str] = "multi-level logit distillation (CVPR 2023), KD_ours of its code; MLKD_NOAUG for one view"
    needs: ClassVar[tuple[str, ...]] = ("two views", "batch")

    @property
    def views_per_step(self) -> int:
        return self.views

    def __post_init__(self) -> None:
        if self.views not in {1, 2}:
            raise UsageError(
                f"mlkd with views={self.views}", why="it is defined for one view and for two", fix="mlkd:views=2 or mlkd:views=1"
            )
        try:
            fine = all(float(text) > 0 for text in self.temperatures.split("+"))
        except ValueError:
            fine = False
        if not fine:
            raise UsageError(
                f"mlkd with temperatures={self.temperatures!r}", why="they are numbers above 0", fix="mlkd:temperatures=3+5+2+6"
            )

    def distance(self, student: Tensor, teacher: Tensor, targets: Targets, state: State | None) -> Tensor:
        taus = [targets.tau, *map(float, self.temperatures.split("+"))]
        rows = len(teacher)
        if len(student) != self.views * rows or (self.views == 2 and targets.second is None):
            raise UsageError(
                f"mlkd of {self.views} view(s) got {len(student)} rows of logits for {rows} targets"
                + ("" if targets.second is not None or self.views == 1 else " without those of a second view"),
                why="with two views, logits are [2B, C], and the second view's targets are targets.second",
                fix="a stream with CachedTargets(..., second=archive) brings two views of a sample; or use mlkd:views=1",
            )
        weak, strong = student[:rows], student[rows:]
        confident = torch.softmax(teacher, dim=1)
        top, mass = confident.amax(dim=1), confident.sum(dim=0)
        of_samples, of_classes = ((x <= x.median()).to(student.dtype).mean() for x in (top, mass))
        loss = student.new_zeros(())
        for tau in taus:
            loss = loss + of_samples * self._kd(weak, teacher, tau)
            classes, samples = relations(torch.softmax(teacher / tau, dim=1), torch.softmax(weak / tau, dim=1))
            loss = loss + of_classes * classes + of_samples * samples
        if self.views == 2 and targets.second is not None:
            other = targets.second.logits.to(student.dtype)
            for number, tau in enumerate(taus):
                late = number >= len(taus) - 2 and number > 0  # the published code mixes the views up here
                loss = loss + (self._kd(weak, teacher, tau) if late else self._kd(strong, other, tau))
        return loss

    def _kd(self, student: Tensor, teacher: Tensor, tau: float) -> Tensor:
        log_p, log_q = (torch.log_softmax(self.scores(x) / tau, dim=1) for x in (teacher, student))
        loss = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        return loss * tau**2 if self.tau_squared else loss


@method.register("zmlkd")
@dataclass(frozen=True, kw_only=True)
class ZMLKD(ZScored, MLKD):
    """mlkd with z-scores in its kd terms; the relations are those of the logits."""

    source: ClassVar[str] = "logit standardization (CVPR 2024), section 5, on MLKD"


def relations(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """|P'P - Q'Q|^2 / C and |PP' - QQ'|^2 / B of probabilities `[B, C]`: differences of the classes' and the samples' relations.

    With D = P - Q and S = P + Q both differences are symmetric parts of products with D, so that nothing cancels; and the
    first, a C x C matrix, is never formed: its square is (<SS', DD'> + <SD', DS'>) / 2, of B x B matrices.
    """
    rows, classes = p.shape
    difference, total = p - q, p + q
    cross = total @ difference.T
    of_samples = (cross + cross.T).square().sum() / 4
    of_classes = ((total @ total.T) * (difference @ difference.T) + cross * cross.T).sum() / 2
    return of_classes / classes, of_samples / rows
