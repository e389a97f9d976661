"""float32 as IEEE 754 has it. By default torch lets convolutions of NVIDIA GPUs since Ampere round their inputs to TF32."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["FLOAT32_ERROR", "float32_error", "ieee_float32", "repeatable"]

# As float32 rounds (2**-24) and sums; a TF32 or bfloat16 product is wrong by about 2**-11 or 2**-8 of itself.
FLOAT32_ERROR = 2.0**-16


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Inside, convolutions and matrix products of float32 tensors have the 24 bits of float32, on every device.

    The setting is the process's. TF32 keeps 11 bits, so that logits move by as much as in half precision. torch has it twice,
    as `fp32_precision` and as the older `allow_tf32`, and raises where the older one is read and the two differ: inside they
    agree, and outside both are as they were.
    """
    backends: Any = torch.backends
    places = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul)
    owners = (backends.cudnn, backends.cudnn, backends.cudnn, backends.mkldnn, backends.mkldnn)
    # A value that is the owner's is given back as the owner's, so that a place goes on to follow it.
    pairs = [(place.fp32_precision, owner.fp32_precision) for place, owner in zip(places, owners, strict=True)]
    before = ["none" if own == of_owner else own for own, of_owner in pairs]
    _set(places, ["ieee"] * len(places))
    precision = torch.get_float32_matmul_precision()  # which can be read now, whatever the places had
    allowed = _allowed_for_cudnn()
    try:
        backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        _set(places, ["ieee"] * len(places))
        yield
    finally:
        backends.cudnn.allow_tf32 = allowed  # first, as the older settings change the others
        torch.set_float32_matmul_precision(precision)
        _set(places, before)


def _set(places: Sequence[Any], precisions: Sequence[str]) -> None:
    for place, precision in zip(places, precisions, strict=True):
        place.fp32_precision = precision


def _allowed_for_cudnn() -> bool:
    """The older setting, by how it is to be read: beside places that are all of "tf32", only true can be."""
    cudnn: Any = torch.backends.cudnn
    _set([cudnn.conv, cudnn.rnn], ["tf32", "tf32"])
    try:
        return bool(cudnn.allow_tf32)
    except RuntimeError:
        return False


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
