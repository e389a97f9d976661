"""What all methods share: options, widened logits, labels under mixing, and divergences that never overflow.

A method says what it asks of a batch, `distance`; its weight, the labels' cross entropy, the precision and the choice of
labels are decided here, alike for all of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kdcache.errors import UsageError
from kdcache.registry import NEWER, Registry
from kdcache.system.lazy import lazy
from kdcache.targets import Targets

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from kdcache.methods.states import State
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")

__all__ = [
    "METHODS",
    "Epochs",
    "LabelRule",
    "Labelled",
    "LogitMethod",
    "MaxLogitTau",
    "Method",
    "Positive",
    "Squared",
    "Standardized",
    "Weight",
    "ZScored",
    "cross_entropy",
    "entropy_rows",
    "from_largest",
    "kl_rows",
    "warm_up",
    "zscore",
]

LabelRule = Literal["teacher_argmax", "dominant", "pair"]

# Ranges of options, which the registry checks; all of them are finite.
Weight = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Epochs = Annotated[int, Field(ge=0)]


class Method(ABC):
    """A loss, and what training has to know of it. A subclass is a frozen dataclass of its options, and states what differs."""

    source: ClassVar[str] = ""  # paper and equation
    needs: ClassVar[tuple[str, ...]] = ()  # "labels", "two views", "batch" (relations of its samples), "state" (it learns)
    uses_tau: ClassVar[bool] = True
    uses_teacher: ClassVar[bool] = True
    only_at_tau: ClassVar[bool] = True  # else it also looks at the targets at temperatures of its own
    largest_tau: ClassVar[float] = math.inf  # beyond which it makes no sense

    @abstractmethod
    def __call__(self, student_logits: Tensor, targets: Targets, state: State | None = None) -> Tensor:
        """The loss of `student_logits [B, C]` (`[2B, C]` for two views), a scalar; `state` is what `new_state` has made."""

    def fit(self, blocks: Iterable[NDArray[np.float32]], tau: float) -> Self:
        """The method as it is to be used at `tau` with a teacher whose logits are the `blocks [n, C]`."""
        return self

    @property
    def views_per_step(self) -> int:
        """How many views of each sample a student is shown for one loss: 1 or 2."""
        return 1

    @property
    def unit_variance(self) -> bool:
        """Whether what it compares has unit variance: how far logits are apart does not matter then."""
        return False

    @property
    def ramp_epochs(self) -> int:
        """Epochs until the loss is as strong as it is meant to be."""
        return 0

    def doubts(self, taus: Collection[float], epochs: int) -> Iterator[str]:
        """What to know before comparing students that are trained with it at `taus` for so many epochs."""
        if epochs < self.ramp_epochs:
            yield f"its loss grows over {self.ramp_epochs} epochs, and there are {epochs}"
        if self.unit_variance and self.uses_tau and max(taus) >= 10:
            yield f"its scores have unit variance, so that tau {max(taus):g} is far softer than it is for kd"
        if max(taus) == self.largest_tau:
            yield f"tau {self.largest_tau:g} is the largest of its paper, with weights of its own: see kdcache methods --presets"

    def new_state(self) -> State:
        """A state for the beginning of a training."""
        from kdcache.methods.states import State

        return State()

    def new_optimizer(self, state: State) -> torch.optim.Optimizer | None:
        """The optimiser of the parameters of `state`, if it has any; its learning rate follows the student's schedule."""
        return None

    def figures(self, state: State) -> dict[str, Tensor]:
        """What has been learned so far, for the log: 0-d tensors."""
        return {}


METHODS: Registry[Method] = Registry("method", entry_points="kdcache.methods", base=Method)


@dataclass(frozen=True, kw_only=True)
class LogitMethod(Method):
    """`kd_weight` times the method's own loss, and `ce_weight` times the labels' cross entropy at temperature 1.

    Losses are computed in float32 (float64 for float64 students), also under autocast.
    """

    kd_weight: Weight = 1.0
    ce_weight: Weight = 0.0

    def __post_init__(self) -> None:
        if self.kd_weight == self.ce_weight == 0:
            raise UsageError(
                "a method with kd_weight=0 and ce_weight=0",
                why="its loss would always be 0",
                fix="give one of the two a weight above 0",
            )

    def __call__(self, student_logits: Tensor, targets: Targets, state: State | None = None) -> Tensor:
        """The loss of `student_logits [B, C]`, a scalar in float32 (or float64, for float64 logits).

        A method of two views wants the logits of both, `[2B, C]`, the first view's above the second's, and `targets.second`.
        Without a `state` what depends on the epoch is as it is in the end, and what is learned as it is at first.
        """
        _require_shapes(student_logits, targets, self.views_per_step)
        with torch.autocast(student_logits.device.type, enabled=False):
            student = _wide(student_logits)
            loss = self.kd_weight * self.distance(student, targets.logits.to(student.dtype), targets, state)
            if self.ce_weight:
                loss = loss + self.ce_weight * cross_entropy(student, targets)
        return loss

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
        rows = student.new_zeros(len(student))
        for label, share in self._labels(teacher, targets):
            rows = rows + share * self.rows(student, teacher, label, targets.tau)
        return self.schedule(state) * rows.mean()

    def _labels(self, teacher: Tensor, targets: Targets) -> Iterator[tuple[Tensor, Tensor | float]]:
        """Labels `[B]`, each with its share of the loss, a number or `[B]`."""
        label_a, label_b, lam = targets.label_a, targets.label_b, targets.lam
        if label_a is None and self.label_rule not in {None, "teacher_argmax"}:
            raise UsageError(
                f"label_rule {self.label_rule} without labels",
                why="the targets do not say which classes were mixed",
                fix="use label_rule=teacher_argmax, or an archive with labels",
            )
        if label_a is None or self.label_rule == "teacher_argmax":
            yield teacher.argmax(dim=1), 1.0
        elif label_b is None or lam is None:
            yield label_a, 1.0
        elif self.label_rule == "pair":
            yield label_a, lam.to(teacher.dtype)
            yield label_b, 1 - lam.to(teacher.dtype)
        else:
            yield torch.where(lam >= 0.5, label_a, label_b), 1.0

    def schedule(self, state: State | None) -> float:
        """What the loss is multiplied by in the state's epoch: it grows in equal steps over the `ramp_epochs`."""
        return warm_up(state, self.ramp_epochs)

    @abstractmethod
    def rows(self, student: Tensor, teacher: Tensor, label: Tensor, tau: float) -> Tensor:
        """The loss of every row, `[B]`, with `label` int64 `[B]`."""


@dataclass(frozen=True, kw_only=True)
class Squared(LogitMethod):
    """A method whose terms are multiplied by t^2, unless `tau_squared` is off."""

    tau_squared: bool = True

    def scale(self, tau: Any) -> Any:
        """t^2, or 1. Of temperatures of rows, `[B, 1]`, it is `[B]`."""
        per_row = tau.squeeze(-1) if isinstance(tau, torch.Tensor) else tau
        return per_row**2 if self.tau_squared else 1.0

    def kl(self, student: Tensor, teacher: Tensor, tau: Tensor | float) -> Tensor:
        """t^2 KL(p_t || q_t) of every row of logits `[B, C]`, as `scores` has them: `[B]`."""
        log_p, log_q = (torch.log_softmax(self.scores(x) / tau, dim=1) for x in (teacher, student))
        rows: Tensor = self.scale(tau) * kl_rows(log_p, log_q)
        return rows


@dataclass(frozen=True, kw_only=True)
class Standardized:
    """A base named before a method, which then compares z-scores of logits (logit standardization, CVPR 2024, algorithm 1).

    Algorithm 1 divides by the population's deviation, the published code by the sample's (C - 1): so does the default.
    """

    std: Literal["sample", "population"] = "sample"
    eps: Weight = 1e-7

    @property
    def unit_variance(self) -> bool:
        return True

    def scores(self, logits: Tensor) -> Tensor:
        return zscore(logits, self.std, self.eps)


@dataclass(frozen=True, kw_only=True)
class ZScored(Standardized):
    """The same, or with one of its two steps alone (its Table 4): `score` is z, centred (z - mean) or scaled (z / deviation).

    A softmax does not see a number that all logits of a row share: losses of centred scores are those of the logits, and losses
    of scaled ones those of z-scores, up to rounding.
    """

    score: Literal["z", "centred", "scaled"] = field(default="z", metadata=NEWER)

    @property
    def unit_variance(self) -> bool:
        return self.score != "centred"

    def scores(self, logits: Tensor) -> Tensor:
        if self.score == "centred":
            return logits - logits.mean(dim=1, keepdim=True)
        return zscore(logits, self.std, self.eps, centred=self.score == "z")


@dataclass(frozen=True, kw_only=True)
class MaxLogitTau(Standardized):
    """A base named before a method, which then compares z-scores at a temperature of each row, (1 + sqrt 3)/2 of its largest.

    `which`: the teacher's largest score (abstract and section 4.2; it can be cached) or the larger of both (algorithm 1).
    It is detached, and tau is not used.
    """

    which: Literal["teacher", "both"] = "teacher"
    std: Literal["sample", "population"] = "population"
    eps: Weight = 0.0

    uses_tau: ClassVar[bool] = False

    def row_taus(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The temperature of every row of logits `[B, C]`: `[B, 1]`."""
        with torch.no_grad():
            largest = self.scores(teacher).amax(dim=1, keepdim=True)
            if self.which == "both":
                largest = torch.maximum(largest, self.scores(student).amax(dim=1, keepdim=True))
            # The largest score of a constant row is 0: any temperature then means the uniform distribution.
            return (1 + math.sqrt(3)) / 2 * largest.masked_fill(largest == 0, 1.0)


def zscore(logits: Tensor, std: Literal["sample", "population"] = "sample", eps: float = 1e-7, *, centred: bool = True) -> Tensor:
    """(z - mean) / (std + eps) of every row of `logits [B, C]`; without `centred`, z / (std + eps).

    A constant row is 0 everywhere, and gets no gradient. (Its gradient in the published code is as large as 1 / eps, and that of
    its standard deviation NaN.)
    """
    shifted = from_largest(logits)  # a constant row is exactly 0 then
    deviations = shifted - shifted.mean(dim=1, keepdim=True)
    variance = deviations.square().sum(dim=1, keepdim=True) / (logits.shape[1] - (std == "sample"))
    constant = variance == 0
    deviation = variance.masked_fill(constant, 1.0).sqrt()
    return ((deviations if centred else logits) / (deviation + eps)).masked_fill(constant, 0.0)


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
            "cross entropy (ce, or ce_weight) is asked for, but the targets have no labels",
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


def _require_shapes(student_logits: Tensor, targets: Targets, views: int) -> None:
    rows, classes = targets.logits.shape
    second = targets.second is not None
    if student_logits.shape != (views * rows, classes) or (views == 2 and not second):
        raise UsageError(
            f"logits {list(student_logits.shape)} for targets [{rows}, {classes}]"
            + (" and no second view's" if views == 2 and not second else ""),
            why="a student's logits are [B, C]"
            if views == 1
            else "this method compares two views: logits are [2B, C], and the second view's targets are targets.second",
            fix="take the logits of the images that the targets are of"
            if views == 1
            else "a stream with CachedTargets(..., second=archive) brings two views; or give the method views=1",
        )
