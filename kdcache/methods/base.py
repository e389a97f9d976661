"""What all methods share: options, widened logits, labels under mixing, and divergences that never overflow.

A method says what it asks of a batch, `distance`; its weight, the labels' cross entropy, the precision and the choice of
labels are decided here, alike for all of them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcache.errors import UsageError
from kdcache.targets import Targets

__all__ = [
    "LabelRule",
    "Labelled",
    "LogitMethod",
    "State",
    "ZScored",
    "cross_entropy",
    "entropy_rows",
    "from_largest",
    "kl_rows",
    "positive",
    "warm_up",
    "zscore",
]

LabelRule = Literal["teacher_argmax", "dominant", "pair"]


class State(nn.Module):
    """What a method keeps between steps: the `epoch`, counted from 1, and as parameters what it learns, if anything."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 1


@dataclass(frozen=True, kw_only=True)
class LogitMethod(ABC):
    """`kd_weight` times the method's own loss, and `ce_weight` times the labels' cross entropy at temperature 1.

    Losses are computed in float32 (float64 for float64 students), also under autocast.
    """

    kd_weight: float = 1.0
    ce_weight: float = 0.0

    source: ClassVar[str] = ""  # paper and equation
    needs: ClassVar[tuple[str, ...]] = ()  # "labels", "two views", "batch" (relations of its samples), "state" (it learns)
    uses_tau: ClassVar[bool] = True

    def __call__(self, student_logits: Tensor, targets: Targets, state: State | None = None) -> Tensor:
        """The loss of `student_logits [B, C]`, a scalar in float32 (or float64, for float64 logits).

        A method of two views wants the logits of both, `[2B, C]`, the first view's above the second's, and `targets.second`.
        Without a `state` what depends on the epoch is as it is in the end, and what is learned as it is at first.
        """
        with torch.autocast(student_logits.device.type, enabled=False):
            student = _wide(student_logits)
            loss = self.kd_weight * self.distance(student, targets.logits.to(student.dtype), targets, state)
            if self.ce_weight:
                loss = loss + self.ce_weight * cross_entropy(student, targets)
        return loss

    @property
    def views_per_step(self) -> int:
        """How many views of each sample a student is shown for one loss: 1 or 2."""
        return 1

    def new_state(self) -> State:
        """A state for the beginning of a training."""
        return State()

    def new_optimizer(self, state: State) -> torch.optim.Optimizer | None:
        """What learns the parameters of `state`, if it has any; its learning rate follows the student's schedule."""
        return None

    def scores(self, logits: Tensor) -> Tensor:
        """What of logits `[B, C]` is compared: they themselves, or their z-scores (see `ZScored`)."""
        return logits

    @abstractmethod
    def distance(self, student: Tensor, teacher: Tensor, targets: Targets, state: State | None) -> Tensor:
        """The method's own loss of logits `[B, C]` in one precision, a scalar."""


@dataclass(frozen=True, kw_only=True)
class Labelled(LogitMethod):
    """A method that asks for a label. Under mixing, `label_rule` says which.

    `dominant`: that of the larger share. `pair`: lam times the loss with the one and 1 - lam times that with the other.
    `teacher_argmax`: the teacher's top class, without looking at labels. By default `dominant`, or the teacher's top class
    where the targets have no labels.
    """

    label_rule: LabelRule | None = None

    needs: ClassVar[tuple[str, ...]] = ("labels",)

    def distance(self, student: Tensor, teacher: Tensor, targets: Targets, state: State | None) -> Tensor:
        label_a, label_b, lam = targets.label_a, targets.label_b, targets.lam
        if label_a is None and self.label_rule not in {None, "teacher_argmax"}:
            raise UsageError(
                f"label_rule {self.label_rule} without labels",
                why="the targets do not say which classes were mixed",
                fix="use label_rule=teacher_argmax, or an archive with labels",
            )
        if label_a is None or self.label_rule == "teacher_argmax":
            rows = self.rows(student, teacher, teacher.argmax(dim=1), targets.tau)
        elif label_b is None or lam is None:
            rows = self.rows(student, teacher, label_a, targets.tau)
        elif self.label_rule == "pair":
            share = lam.to(student.dtype)
            rows = share * self.rows(student, teacher, label_a, targets.tau)
            rows = rows + (1 - share) * self.rows(student, teacher, label_b, targets.tau)
        else:
            rows = self.rows(student, teacher, torch.where(lam >= 0.5, label_a, label_b), targets.tau)
        return self.schedule(state) * rows.mean()

    def schedule(self, state: State | None) -> float:
        """What the loss is multiplied by in the state's epoch."""
        return 1.0

    @abstractmethod
    def rows(self, student: Tensor, teacher: Tensor, label: Tensor, tau: float) -> Tensor:
        """The loss of every row, `[B]`, with `label` int64 `[B]`."""


@dataclass(frozen=True, kw_only=True)
class ZScored:
    """To be named before a method: it then compares z-scores of logits (logit standardization, CVPR 2024, algorithm 1).

    Algorithm 1 divides by the population's deviation, the published code by the sample's (C - 1): so does the default.
    """

    std: Literal["sample", "population"] = "sample"
    eps: float = 1e-7

    def scores(self, logits: Tensor) -> Tensor:
        return zscore(logits, self.std, self.eps)


def zscore(logits: Tensor, std: Literal["sample", "population"] = "sample", eps: float = 1e-7) -> Tensor:
    """(z - mean) / (std + eps) of every row of `logits [B, C]`. A constant row is 0 everywhere, and gets no gradient.

    (Its gradient in the published code is as large as 1 / eps, and that of its standard deviation NaN.)
    """
    shifted = from_largest(logits)  # a constant row is exactly 0 then
    centred = shifted - shifted.mean(dim=1, keepdim=True)
    variance = centred.square().sum(dim=1, keepdim=True) / (logits.shape[1] - (std == "sample"))
    constant = variance == 0
    deviation = variance.masked_fill(constant, 1.0).sqrt()
    return (centred / (deviation + eps)).masked_fill(constant, 0.0)


def from_largest(logits: Tensor) -> Tensor:
    """`logits [B, C]`, shifted so that each row's largest is 0: sums of exponentials are exact then, however far off it was."""
    return logits - logits.amax(dim=1, keepdim=True).detach()


def kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of every row in nats, `[B]`, from log probabilities `[B, C]`."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def entropy_rows(logits: Tensor, tau: float) -> Tensor:
    """H(softmax(z / tau)) of every row in nats, `[B]`."""
    log_p = torch.log_softmax(logits / tau, dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


def warm_up(state: State | None, epochs: int) -> float:
    """min(epoch / epochs, 1), the epoch counted from 1; 1 without a state."""
    return 1.0 if state is None or epochs <= 0 else min(state.epoch / epochs, 1.0)


def cross_entropy(student: Tensor, targets: Targets) -> Tensor:
    """Mean cross entropy of `student [B, C]` with the labels' mix, lam CE(a) + (1 - lam) CE(b); of two views, the sum of both."""
    rows = len(targets.logits)
    if targets.second is not None and len(student) > rows:
        return cross_entropy(student[:rows], targets) + cross_entropy(student[rows:], targets.second)
    if targets.label_a is None:
        raise UsageError(
            "ce_weight is set, but the targets have no labels",
            why="cross entropy is taken against the labels of the samples",
            fix="use an archive with labels, or a method without ce_weight",
        )
    loss = F.cross_entropy(student, targets.label_a, reduction="none")
    if targets.label_b is not None and targets.lam is not None:
        lam = targets.lam.to(loss.dtype)
        loss = lam * loss + (1 - lam) * F.cross_entropy(student, targets.label_b, reduction="none")
    return loss.mean()


def _wide(logits: Tensor) -> Tensor:
    """At least float32: bf16 / tau would lose most of a large tau's differences."""
    return logits if logits.dtype == torch.float64 else logits.float()


def positive(where: str, **options: Any) -> None:
    """UsageError for the first option that is not a number above 0."""
    for name, value in options.items():
        if not (isinstance(value, int | float) and value > 0):
            raise UsageError(f"{where} with {name}={value!r}", why="it is a number above 0", fix=f"{where}:{name}=1")
