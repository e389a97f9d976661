"""Losses over the relations within a batch: what they are worth depends on which samples are in it together."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from kdcache.methods.base import METHODS, Positive, Squared, Weight, ZScored
from kdcache.system.lazy import lazy
from kdcache.targets import Targets

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kdcache.methods.states import State
else:
    torch = lazy("torch")

__all__ = ["DIST", "MLKD", "ZMLKD"]


def _split(value: Any) -> Any:
    """The numbers of `3+5+2+6`, or of a list, which is what JSON makes of a tuple."""
    if isinstance(value, str):
        return tuple(value.split("+"))
    return tuple(value) if isinstance(value, list) else value


Temperatures = Annotated[tuple[Positive, ...], BeforeValidator(_split), Field(min_length=1)]  # as text: 3+5+2+6


@METHODS.register("dist")
@dataclass(frozen=True, kw_only=True)
class DIST(Squared):
    """t^2 (beta inter + gamma intra): 1 - Pearson's correlation of tempered softmaxes, over rows and over columns (classes).

    A correlation has no scale that t^2 could make up for: loss and gradient grow as t^2 unless tau_squared is off. eps is
    added to the product of the norms, as published, and biases them at large tau and many classes (by 0.27 at tau 40, C = 1000).
    Rows and columns that are constant but for rounding have the correlation 0, and no gradient (1 / eps in the published code).
    """

    beta: Weight = 1.0
    gamma: Weight = 1.0
    eps: Weight = 1e-8

    source: ClassVar[str] = "DIST (NeurIPS 2022), dist_kd.py of its code"
    needs: ClassVar[tuple[str, ...]] = ("batch",)

    def distance(self, student: Tensor, teacher: Tensor, targets: Targets, state: State | None) -> Tensor:
        q, p = (torch.softmax(x / targets.tau, dim=1) for x in (student, teacher))
        inter = 1 - self._correlation(q, p, dim=1).mean()
        intra = 1 - self._correlation(q, p, dim=0).mean()
        loss: Tensor = self.scale(targets.tau) * (self.beta * inter + self.gamma * intra)
        return loss

    def _correlation(self, a: Tensor, b: Tensor, dim: int) -> Tensor:
        mean = a.mean(dim=dim, keepdim=True)
        a, b = a - mean, b - b.mean(dim=dim, keepdim=True)
        norm: Tensor = torch.linalg.vector_norm(a, dim=dim)
        rounding = torch.finfo(a.dtype).eps * mean.detach().squeeze(dim) * a.shape[dim] ** 0.5
        flat = norm.detach() <= 4 * rounding
        norms = (norm * torch.linalg.vector_norm(b, dim=dim) + self.eps).masked_fill(flat, 1.0)
        correlation: Tensor = ((a * b).sum(dim=dim) / norms).masked_fill(flat, 0.0)
        return correlation

    def doubts(self, taus: Collection[float], epochs: int) -> Iterator[str]:
        yield from super().doubts(taus, epochs)
        if self.tau_squared and len(taus) > 1:
            yield "a correlation has no scale, so t^2 makes its gradient grow with tau; compare temperatures with tau_squared=0"


@METHODS.register("mlkd")
@dataclass(frozen=True, kw_only=True)
class MLKD(Squared):
    """Multi-level: kd at tau and `temperatures` (no other t in it), the classes' relations P'P and the samples' PP'.

    f_s sum_T KD_T + f_c sum_T cc_T + f_s sum_T bc_T over T = tau and `temperatures`, cc = |P'P - Q'Q|^2 / C and
    bc = |PP' - QQ'|^2 / B. As in the published code, its masks of confident samples and classes only multiply by the fraction
    f that they let through. With two `views`, KD_T of the second one (the strong one, published with RandAugment) is added for
    tau and `temperatures`, but for the last two of those (2 and 6), which see the first; `views=1` is the form for one view.
    """

    temperatures: Temperatures = (3.0, 5.0, 2.0, 6.0)
    kd_weight: Weight = 0.9
    views: Annotated[int, Field(ge=1, le=2)] = 2

    only_at_tau: ClassVar[bool] = False
    source: ClassVar[str] = "multi-level logit distillation (CVPR 2023), KD_ours of its code; MLKD_NOAUG for one view"
    needs: ClassVar[tuple[str, ...]] = ("two views", "batch")

    @property
    def views_per_step(self) -> int:
        return self.views

    def distance(self, student: Tensor, teacher: Tensor, targets: Targets, state: State | None) -> Tensor:
        taus, rows = (targets.tau, *self.temperatures), len(teacher)
        weak, strong = student[:rows], student[rows:]
        confident = torch.softmax(teacher, dim=1)
        top, mass = confident.amax(dim=1), confident.sum(dim=0)
        of_samples, of_classes = ((x <= x.median()).to(student.dtype).mean() for x in (top, mass))
        loss = student.new_zeros(())
        for tau in taus:
            loss = loss + of_samples * self.kl(weak, teacher, tau).mean()
            classes, samples = relations(torch.softmax(teacher / tau, dim=1), torch.softmax(weak / tau, dim=1))
            loss = loss + of_classes * classes + of_samples * samples
        if self.views == 2 and targets.second is not None:
            other = targets.second.logits.to(student.dtype)
            for number, tau in enumerate(taus):
                mixed_up = number >= max(1, len(taus) - 2)  # as the published code does with its last two, 2 and 6
                loss = loss + (self.kl(weak, teacher, tau) if mixed_up else self.kl(strong, other, tau)).mean()
        return loss


@METHODS.register("zmlkd")
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
