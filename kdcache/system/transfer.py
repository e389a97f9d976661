"""Copies between the host and a device that do not make the host wait."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["to_device", "to_host"]


def to_device(values: NDArray | Tensor, device: torch.device) -> Tensor:
    """`values` on `device`. They go to a GPU by way of pinned memory, as only from there a copy runs beside the host.

    Values that are on a device already are copied as they are. A CPU gets the very same memory.
    """
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.require(values, requirements=["C", "W"]))
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_host(values: Tensor) -> Tensor:
    """`values` in host memory: those of a GPU in pinned memory, and there when the work so far on this stream is done."""
    if values.device.type == "cpu":
        return values
    pinned = values.device.type == "cuda"
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned).copy_(values, non_blocking=True)
