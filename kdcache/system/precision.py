"""float32 as IEEE 754 has it. By default torch lets convolutions of NVIDIA GPUs since Ampere round their inputs to TF32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["ieee_float32"]


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Inside, convolutions and matrix products of float32 tensors have the 24 bits of float32, on every device.

    The setting is the process's. TF32 keeps 11 bits, so that logits move by as much as in half precision.
    """
    places: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
