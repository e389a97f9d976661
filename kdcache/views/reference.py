"""The reference renderer: one image at a time with Pillow, like torchvision's transforms on PIL images.

It defines the bytes of a view. The device renderer must give the same bytes.
"""

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from kdcache.views.policy import JITTER_NONE, UNIT, RandAugment, ViewTable

__all__ = ["FILTERS", "augment", "draw", "inverse_matrix", "magnitudes"]

# A policy may use the first two. The others serve only the diagnosis of differing views.
FILTERS = {name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic", "nearest", "box", "hamming", "lanczos")}


def draw(images: Iterable[NDArray[np.uint8]], rows: ViewTable) -> NDArray[np.uint8]:
    """Views before mixing: one image uint8 `[3, R, R]` per row, to uint8 `[B, 3, S, S]`."""
    size = rows.policy.size
    out = np.empty((len(rows), 3, size, size), np.uint8)
    for i, pixels in enumerate(images):
        image = _draw_one(pixels, rows, i)
        for channel, band in enumerate("RGB"):
            out[i, channel] = np.frombuffer(image.tobytes("raw", band), np.uint8).reshape(size, size)
    return out


def _draw_one(pixels: NDArray[np.uint8], rows: ViewTable, i: int) -> Image.Image:
    policy = rows.policy
    image = _crop(pixels, rows, i)
    if policy.randaugment:
        for operation, sign in zip(rows.operations[i].tolist(), rows.signs[i].tolist(), strict=True):
            image = augment(image, operation, sign, policy.randaugment)
    for operation in rows.jitter[i].tolist():
        image = _jitter(image, operation, rows.factors[i])
    if policy.erase:
        left, top, right, bottom = rows.erase[i].tolist()
        image.paste(policy.erase.fill, (left, top, right, bottom))
    return image


def _crop(pixels: NDArray[np.uint8], rows: ViewTable, i: int) -> Image.Image:
    side, size = pixels.shape[-1], rows.policy.size
    # Pillow stores the box as float32; round to it here, so that Pillow uses exactly the given values.
    left, top, right, bottom = (float(np.float32(edge * side / UNIT)) for edge in rows.box[i].tolist())
    whole = Image.merge("RGB", [Image.fromarray(plane) for plane in pixels])
    image = whole.resize((size, size), FILTERS[rows.policy.filter], box=(left, top, right, bottom))
    if rows.flip[i]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    dx, dy = rows.shift[i].tolist()
    return image.crop((dx, dy, dx + size, dy + size)) if dx or dy else image


class Magnitudes(NamedTuple):
    """Strengths of RandAugment's operations at one magnitude bin and sign."""

    shear: float  # degrees
    shift: int  # pixels
    angle: float  # degrees
    strength: float  # factor of brightness, saturation, contrast, sharpness
    bits: int  # bits that posterize keeps
    threshold: int  # solarize inverts pixels from this value on


@lru_cache(maxsize=64)
def magnitudes(sign: int, options: RandAugment, size: int) -> Magnitudes:
    """Strengths of torchvision's RandAugment._augmentation_space, for views of `size` pixels."""
    return Magnitudes(
        shear=math.degrees(math.atan(sign * _linspace(0.0, 0.3, options))),
        shift=int(sign * _linspace(0.0, 150.0 / 331.0 * size, options)),
        angle=sign * _linspace(0.0, 30.0, options),
        strength=1.0 + sign * _linspace(0.0, 0.9, options),
        bits=8 - round(options.m / ((options.bins - 1) / 4)),
        threshold=math.ceil(_linspace(255.0, 0.0, options)),
    )


def _linspace(first: float, last: float, options: RandAugment) -> float:
    """Entry `m` of torchvision's `torch.linspace(first, last, bins)`, exact in float32.

    torch's own rounding depends on whether the processor fuses multiply and add. This function always fuses.
    """
    start, end = np.float32(first), np.float32(last)
    step = float((end - start) / np.float32(options.bins - 1))
    if options.m < options.bins // 2:
        return float(np.float32(float(start) + step * options.m))
    return float(np.float32(float(end) - step * (options.bins - 1 - options.m)))


def augment(image: Image.Image, operation: int, sign: int, options: RandAugment) -> Image.Image:
    """Apply one RandAugment operation to an image, like torchvision's RandAugment on PIL images."""
    amount = magnitudes(sign, options, image.width)
    if 1 <= operation <= 5:
        fill = options.fill if len(image.getbands()) == 1 else (options.fill,) * 3
        mode = Image.Resampling[options.interpolation.upper()]
        matrix = inverse_matrix(operation, sign, options, image.width)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, mode, fillcolor=fill)
    # Operations in the order of torchvision's RandAugment._augmentation_space.
    operations: dict[int, Callable[[], Image.Image]] = {
        0: lambda: image,
        6: lambda: ImageEnhance.Brightness(image).enhance(amount.strength),
        7: lambda: ImageEnhance.Color(image).enhance(amount.strength),
        8: lambda: ImageEnhance.Contrast(image).enhance(amount.strength),
        9: lambda: ImageEnhance.Sharpness(image).enhance(amount.strength),
        10: lambda: ImageOps.posterize(image, amount.bits),
        11: lambda: ImageOps.solarize(image, amount.threshold),
        12: lambda: ImageOps.autocontrast(image),
        13: lambda: ImageOps.equalize(image),
    }
    return operations[operation]()


def inverse_matrix(operation: int, sign: int, options: RandAugment, size: int) -> tuple[float, ...]:
    """Pillow's matrix `(a, b, c, d, e, f)` of the geometric operations 1 to 5, from view to source pixels."""
    amount = magnitudes(sign, options, size)
    if operation <= 2:
        tangent = math.tan(math.radians(amount.shear))
        return (1.0, tangent, 0.0, 0.0, 1.0, 0.0) if operation == 1 else (1.0, 0.0, 0.0, tangent, 1.0, 0.0)
    if operation <= 4:
        return (1.0, 0.0, float(-amount.shift if operation == 3 else 0), 0.0, 1.0, float(-amount.shift if operation == 4 else 0))
    angle = -math.radians(amount.angle % 360.0)  # as in Pillow's Image.rotate
    cos, sin, middle = round(math.cos(angle), 15), round(math.sin(angle), 15), size / 2
    return (cos, sin, cos * -middle + sin * -middle + middle, -sin, cos, -sin * -middle + cos * -middle + middle)


def _jitter(image: Image.Image, operation: int, factors: NDArray[np.int32]) -> Image.Image:
    """Apply one operation of torchvision's ColorJitter."""
    if operation == JITTER_NONE:
        return image
    if operation == 3:
        hue, saturation, value = image.convert("HSV").split()
        turned = Image.fromarray(np.asarray(hue) + factors[3].astype(np.uint8))  # wraps around, as in torchvision
        return Image.merge("HSV", (turned, saturation, value)).convert("RGB")
    enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[operation]
    return enhance(image).enhance(int(factors[operation]) / UNIT)
