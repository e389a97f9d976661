"""float32 as IEEE 754 has it. By default torch lets convolutions of NVIDIA GPUs since Ampere round their inputs to TF32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["FLOAT32_ERROR", "float32_error", "ieee_float32", "repeatable"]

# As float32 rounds (2**-24) and sums; a TF32 or bfloat16 product is wrong by about 2**-11 or 2**-8 of itself.
FLOAT32_ERROR = 2.0**-16


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


def float32_error(device: torch.device) -> float:
    """The largest error of a convolution and a matrix product in float32, as a share of what is summed in absolute values."""
    drawn = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=drawn).to(device) for _ in range(2))
    images, weights = (torch.randn(shape, generator=drawn).to(device) for shape in ((2, 16, 16, 16), (16, 16, 3, 3)))
    with torch.inference_mode(), ieee_float32():
        pairs = [
            (a @ b, a.double() @ b.double(), a.abs() @ b.abs()),
            (
                torch.conv2d(images, weights),
                torch.conv2d(images.double(), weights.double()),
                torch.conv2d(images.abs(), weights.abs()),
            ),
        ]
        return max(float(((found.double() - exact).abs() / size).max()) for found, exact, size in pairs)


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside, cuDNN computes convolutions and their gradients in ways that give the same bits each time."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before
