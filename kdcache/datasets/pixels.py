"""What makes 8-bit pixels of arrays that are none."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["as_bytes"]

_CHUNK = 1 << 24  # numbers that are looked at at once, since arrays may be larger than memory


def as_bytes(pixels: NDArray, name: str) -> str:
    """The expression that makes uint8 pixels of the array called `name`, as far as its dtype and values tell what they mean."""
    kind = pixels.dtype.kind
    if kind == "b":
        return f"{name}.astype('uint8') * 255"
    if kind not in "iuf":
        return f"there are no pixels in {name}, of dtype {pixels.dtype}"
    low, high = _range(pixels)
    if kind == "f" and low >= 0 and high <= 1:
        return f"({name} * 255).round().astype('uint8')"
    if low >= 0 and high <= 255:
        return f"{name}.round().astype('uint8')" if kind == "f" else f"{name}.astype('uint8')"
    if kind in "iu" and low >= 0 and high < 1 << 16:
        bits = 12 if high < 1 << 12 else 16  # cameras have 12 bits or all
        return f"({name} >> {bits - 8}).astype('uint8'), if these are pixels of {bits} bits"
    if kind in "iu" or not (np.isfinite(low) and np.isfinite(high)):
        return f"({name}.clip(0, 255)).astype('uint8'), once it is known what its values from {low} to {high} mean"
    return (
        f"(({name} * std + mean) * 255).round().clip(0, 255).astype('uint8'), with the mean and std that they were normalised by"
    )


def _range(pixels: NDArray) -> tuple[float, float]:
    """The smallest and the largest value; NaN where there is one."""
    rows = max(1, _CHUNK // max(1, pixels[0].size))
    ends = [(part.min(), part.max()) for start in range(0, len(pixels), rows) if (part := pixels[start : start + rows]).size]
    return min(low for low, _ in ends), max(high for _, high in ends)
