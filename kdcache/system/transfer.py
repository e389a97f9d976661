"""Copies between the host and a device that do not make the host wait."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Landing", "to_device", "to_host"]


def to_device(values: NDArray | Tensor, device: torch.device) -> Tensor:
    """`values` on `device`. They go to a GPU by way of pinned memory, as only from there a copy runs beside the host.

    Values that are on a device already are copied as they are. A CPU gets the very same memory; of a GPU's values, a copy that
    is waited for.
    """
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.require(values, requirements=["C", "W"]))
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "cpu")  # a copy in host memory is read without a further wait


def to_host(values: Tensor) -> Tensor:
    """`values` in host memory: those of a GPU in pinned memory, and there when the work so far on this stream is done."""
    if values.device.type == "cpu":
        return values
    pinned = values.device.type == "cuda"
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned).copy_(values, non_blocking=True)


class Landing:
    """Tensors of a device on their way to the host.

    The copies go to pinned memory, behind the work that computes the tensors. Torch keeps that memory for later copies once
    nobody uses it, so that a few blocks take turns.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensors = [to_host(tensor) for tensor in tensors]
        if away := [tensor.device for tensor in tensors if tensor.device.type != "cpu"]:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(away[0]))

    def wait(self) -> list[Tensor]:
        """The tensors on the host, once all of them are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
