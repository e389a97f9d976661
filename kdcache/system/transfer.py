"""Copies between the host and a device that do not make the host wait."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Landing", "to_device"]

_BESIDE = frozenset({"cuda"})  # devices that copy to pinned memory beside the host; of others the host waits for the copy


def to_device(values: NDArray | Tensor, device: torch.device) -> Tensor:
    """`values` on `device`. They go to a GPU by way of pinned memory, as only from there a copy runs beside the host.

    Values that are on a device already are copied as they are. A CPU gets the very same memory.
    """
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.require(values, requirements=["C", "W"]))
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Landing:
    """Tensors of a device on their way to the host.

    The copies go to pinned memory, behind the work that computes the tensors. Torch keeps that memory for later copies once
    nobody uses it, so that a few blocks take turns.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        away = [tensor.device for tensor in tensors if tensor.device.type in _BESIDE]
        self._tensors = [_begun(tensor) for tensor in tensors]
        if away:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(away[0]))

    def wait(self) -> list[Tensor]:
        """The tensors on the host, once all of them are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


def _begun(tensor: Tensor) -> Tensor:
    if tensor.device.type not in _BESIDE:
        return tensor.cpu()
    return _pinned(tensor).copy_(tensor, non_blocking=True)


def _pinned(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
