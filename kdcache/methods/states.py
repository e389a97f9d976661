"""What methods keep between steps. These are modules of torch, so this module is imported when a state is made or used."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LearnedTemperature", "State", "gradient_times"]


class State(nn.Module):
    """What a method keeps between steps: the `epoch`, counted from 1, and as parameters what it learns, if anything."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 1


class LearnedTemperature(State):
    """`theta`, from which a temperature is made."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))


class _GradientTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def gradient_times(x: Tensor, factor: float) -> Tensor:
    """The same numbers as `x`; the gradient that reaches `x` is multiplied by `factor`."""
    same: Tensor = _GradientTimes.apply(x, factor)
    return same
