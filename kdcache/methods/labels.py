"""Training without a teacher: what a student becomes by itself, which the papers set beside what distillation makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from kdcache.methods.base import METHODS, LogitMethod, cross_entropy
from kdcache.system.lazy import lazy
from kdcache.targets import Targets

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kdcache.methods.states import State
else:
    torch = lazy("torch")

__all__ = ["CE"]


@METHODS.register("ce")
@dataclass(frozen=True, kw_only=True)
class CE(LogitMethod):
    """(1 - s) H(y, q) + s H(uniform, q): cross entropy of the labels alone, the row "student" of the papers' tables.

    It sees the same views in the same order as students with a teacher, whose logits it does not look at; `smoothing` is s.
    """

    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    needs: ClassVar[tuple[str, ...]] = ("labels",)
    uses_tau: ClassVar[bool] = False
    uses_teacher: ClassVar[bool] = False
    source: ClassVar[str] = "the papers' students; smoothing: transformed teacher matching (arXiv 2402.11148), eq. 5"

    def distance(self, student: Tensor, teacher: Tensor, targets: Targets, state: State | None) -> Tensor:
        loss = cross_entropy(student, targets)
        if self.smoothing:
            uniform = -torch.log_softmax(student, dim=1).mean()
            loss = (1 - self.smoothing) * loss + self.smoothing * uniform
        return loss
