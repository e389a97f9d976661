"""Clipping of gradients, layer by layer, in a number of kernels that does not grow with the layers."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.system.transfer import to_device

__all__ = ["Clipping"]

BLOCK = 1024  # numbers that are scaled by one factor


class Clipping:
    """Scales the gradient of every parameter tensor to an L2 norm of at most `max_norm` (None: leaves it as it is)."""

    def __init__(self, parameters: Sequence[nn.Parameter], max_norm: float | None) -> None:
        self._parameters, self._max_norm = parameters, max_norm
        self._owners: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Clip the gradients that are there; returns the total norm before. On a GPU, `grad` is another tensor afterwards."""
        owners = [parameter for parameter in self._parameters if parameter.grad is not None]
        grads: list[Tensor] = [parameter.grad for parameter in owners if parameter.grad is not None]
        norms = torch.stack(torch._foreach_norm(grads))
        if self._max_norm is not None:
            scales = (self._max_norm / (norms + 1e-6)).clamp(max=1.0)
            if grads[0].device.type == "cpu" or len({grad.dtype for grad in grads}) > 1:
                torch._foreach_mul_(grads, scales.unbind())
            else:
                for parameter, scaled in zip(owners, self.scaled(grads, scales), strict=True):
                    parameter.grad = scaled
        return norms.square().sum().sqrt()

    def scaled(self, grads: Sequence[Tensor], scales: Tensor) -> list[Tensor]:
        """Each of `grads`, all of one dtype, times its own of `scales [n]`, as new tensors of the same strides.

        torch has no kernel that multiplies many tensors by a factor of each that is on the device: `_foreach_mul_` starts one
        for each tensor. So they are copied into one buffer, each to whole blocks of it, and blocks are multiplied.
        """
        blocks = tuple(-(-grad.numel() // BLOCK) for grad in grads)
        if blocks not in self._owners:
            self._owners[blocks] = to_device(np.repeat(np.arange(len(blocks)), blocks), grads[0].device)
        buffer = grads[0].new_empty(sum(blocks), BLOCK)
        first = np.cumsum((0, *blocks[:-1])) * BLOCK
        parts = [buffer.as_strided(grad.shape, _strides(grad), int(at)) for grad, at in zip(grads, first, strict=True)]
        torch._foreach_copy_(parts, list(grads))
        buffer *= scales.to(buffer.dtype).index_select(0, self._owners[blocks])[:, None]
        return parts


def _strides(grad: Tensor) -> tuple[int, ...]:
    """Those of `grad`, or of a dense tensor where it has gaps or overlaps."""
    return grad.stride() if grad.is_contiguous() else torch.empty_like(grad, device="meta").stride()
