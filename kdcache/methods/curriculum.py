"""A temperature that is learned against the student."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from kdcache.errors import UsageError
from kdcache.methods.base import METHODS, Positive, Squared, Weight, ZScored
from kdcache.system.lazy import lazy
from kdcache.targets import Targets

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kdcache.methods.states import State
else:
    torch = lazy("torch")

__all__ = ["CTKD", "ZCTKD"]

THETA = 1.0  # at the beginning


@METHODS.register("ctkd")
@dataclass(frozen=True, kw_only=True)
class CTKD(Squared):
    """T^2 <KL(p_T || q_T)> with T = t_start + t_end sigmoid(theta), theta learned to make the loss larger.

    Its gradient is multiplied by lambda, which falls from 0 to -1 over `lambda_epochs` as a half cosine: the adversary grows.
    It belongs into an SGD group of its own: AdamW would divide lambda out. tau is not used. Of its form with a temperature for
    each sample the network was never published with the code: `instance` is an error that says so.
    """

    t_start: Positive = 1.0
    t_end: Weight = 20.0
    lambda_epochs: Annotated[int, Field(ge=1)] = 10
    instance: bool = False

    source: ClassVar[str] = "curriculum temperature (AAAI 2023), global form of its code"
    needs: ClassVar[tuple[str, ...]] = ("state",)
    uses_tau: ClassVar[bool] = False

    @property
    def ramp_epochs(self) -> int:
        return self.lambda_epochs

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.instance:
            raise UsageError(
                "ctkd with instance=true",
                why="the network that gives every sample its temperature was never published with the code",
                fix="use the global form, ctkd",
            )

    def new_state(self) -> State:
        from kdcache.methods.states import LearnedTemperature

        return LearnedTemperature(THETA)

    def new_optimizer(self, state: State) -> torch.optim.Optimizer:
        return torch.optim.SGD(state.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)  # of the published student

    def gradient_factor(self, epoch: int) -> float:
        """lambda in `epoch`, counted from 1."""
        done = min(epoch / self.lambda_epochs, 1.0)
        return (math.cos(math.pi * done) + 1) / 2 - 1

    def temperature(self, state: State | None) -> Tensor | float:
        """T: a scalar whose gradient reaches theta reversed."""
        from kdcache.methods.states import LearnedTemperature, gradient_times

        if not isinstance(state, LearnedTemperature):
            return self.t_start + self.t_end / (1 + math.exp(-THETA))
        theta = gradient_times(state.theta, self.gradient_factor(state.epoch))
        return self.t_start + self.t_end * torch.sigmoid(theta)

    def distance(self, student: Tensor, teacher: Tensor, targets: Targets, state: State | None) -> Tensor:
        return self.kl(student, teacher, self.temperature(state)).mean()

    def figures(self, state: State) -> dict[str, Tensor]:
        temperature = self.temperature(state)
        return {"temperature": temperature.detach()} if isinstance(temperature, torch.Tensor) else {}


@METHODS.register("zctkd")
@dataclass(frozen=True, kw_only=True)
class ZCTKD(ZScored, CTKD):
    """ctkd of z-scores."""

    source: ClassVar[str] = "logit standardization (CVPR 2024), section 5, on CTKD"
