"""Knowledge distillation with one shared, fixed temperature (Hinton et al. 2015)."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.methods import method
from kdcache.targets import Targets

__all__ = ["KD"]


@method.register("kd")
@dataclass(frozen=True)
class KD:
    """kd_weight t^2 <KL(p_t || q_t)> + ce_weight <CE>, the mean taken over the batch.

    KL is the temperature study's eq. 1, which has no t^2; published code has it, so it is on by default. Without it
    the gradient per logit shrinks as 1/t^2. Cross entropy is against the labels' mix `lam`, at temperature 1.
    """

    tau_squared: bool = True
    kd_weight: float = 1.0
    ce_weight: float = 0.0

    def __call__(self, student_logits: Tensor, targets: Targets, state: Any = None) -> Tensor:
        tau = targets.tau
        student = student_logits.float()  # before the division: bf16 / tau loses most of a large tau's differences
        loss = F.kl_div(
            F.log_softmax(student / tau, dim=1),
            F.log_softmax(targets.logits.float() / tau, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        loss = loss * (self.kd_weight * (tau**2 if self.tau_squared else 1.0))
        return loss + self.ce_weight * cross_entropy(student, targets) if self.ce_weight else loss


def cross_entropy(student: Tensor, targets: Targets) -> Tensor:
    """Mean cross entropy of `student [B, C]` with the labels' mix: lam CE(a) + (1 - lam) CE(b)."""
    if targets.label_a is None:
        raise UsageError(
            "ce_weight is set, but the targets have no labels",
            why="cross entropy is taken against the labels of the samples",
            fix="use an archive with labels, or --method kd without ce_weight",
        )
    loss = F.cross_entropy(student, targets.label_a, reduction="none")
    if targets.label_b is not None and targets.lam is not None:
        lam = targets.lam.to(loss.dtype)
        loss = lam * loss + (1 - lam) * F.cross_entropy(student, targets.label_b, reduction="none")
    return loss.mean()
