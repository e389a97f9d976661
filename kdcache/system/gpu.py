"""A GPU's free memory, and its stream for work beside the model's."""

from functools import cache

import torch

__all__ = ["free_memory", "side_stream"]


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of this process on which work runs ahead of the model's.

    It is kept, since torch keeps the memory that work on a stream has used for later work on that stream only.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _side_stream(device)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on a GPU: the free ones, and those that torch keeps for it unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
