"""The reference renderer: one image at a time, by Pillow and torchvision's functions on PIL images.

It defines what a view is; the device renderer must give the same bytes.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdcache.views.policy import JITTER_NONE, UNIT, RandAugment, ViewTable

__all__ = ["FILTERS", "augment", "crop", "draw", "inverse_matrix", "magnitudes"]

# A policy may name the first two; the others serve to find out what went wrong.
FILTERS = {name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic", "nearest", "box", "hamming", "lanczos")}


def draw(images: NDArray[np.uint8], rows: ViewTable) -> NDArray[np.uint8]:
    """Views before mixing: uint8 `[B, 3, R, R]` to uint8 `[B, 3, S, S]`."""
    size = rows.policy.size
    out = np.empty((len(rows), 3, size, size), np.uint8)
    for i, pixels in enumerate(images):
        out[i] = _draw_one(pixels, rows, i)
    return out


def _draw_one(pixels: NDArray[np.uint8], rows: ViewTable, i: int) -> NDArray[np.uint8]:
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
    return np.asarray(image).transpose(2, 0, 1)


def crop(pixels: NDArray[np.uint8], rows: ViewTable, i: int) -> NDArray[np.uint8]:
    """Row `i` of `rows` cropped, resized, mirrored and shifted: uint8 `[3, R, R]` to `[3, S, S]`."""
    return np.asarray(_crop(pixels, rows, i)).transpose(2, 0, 1)


def _crop(pixels: NDArray[np.uint8], rows: ViewTable, i: int) -> Image.Image:
    side, size = pixels.shape[-1], rows.policy.size
    # Pillow keeps the box as float32; so does this, so that what is passed is what is used.
    left, top, right, bottom = (float(np.float32(edge * side / UNIT)) for edge in rows.box[i].tolist())
    whole = Image.merge("RGB", [Image.fromarray(plane) for plane in pixels])
    image = whole.resize((size, size), FILTERS[rows.policy.filter], box=(left, top, right, bottom))
    if rows.flip[i]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    dx, dy = rows.shift[i].tolist()
    return image.crop((dx, dy, dx + size, dy + size)) if dx or dy else image


class Magnitudes(NamedTuple):
    """What RandAugment's operations do at one magnitude bin and sign."""

    shear: float  # degrees
    shift: int  # pixels
    angle: float  # degrees
    strength: float  # factor of brightness, saturation, contrast, sharpness
    bits: int  # kept by posterize
    threshold: float  # of solarize


def magnitudes(sign: int, options: RandAugment, size: int) -> Magnitudes:
    """Of torchvision's RandAugment._augmentation_space, for views of `size` pixels."""
    return Magnitudes(
        shear=math.degrees(math.atan(sign * _linspace(0.0, 0.3, options))),
        shift=int(sign * _linspace(0.0, 150.0 / 331.0 * size, options)),
        angle=sign * _linspace(0.0, 30.0, options),
        strength=1.0 + sign * _linspace(0.0, 0.9, options),
        bits=8 - round(options.m / ((options.bins - 1) / 4)),
        threshold=_linspace(255.0, 0.0, options),
    )


def _linspace(first: float, last: float, options: RandAugment) -> float:
    """Entry `m` of torchvision's `torch.linspace(first, last, bins)`, to the last bit of its float32.

    Written out, because torch's own rounding depends on whether the processor fuses multiply and add; this one does.
    """
    start, end = np.float32(first), np.float32(last)
    step = float((end - start) / np.float32(options.bins - 1))
    if options.m < options.bins // 2:
        return float(np.float32(float(start) + step * options.m))
    return float(np.float32(float(end) - step * (options.bins - 1 - options.m)))


def augment(image: Image.Image, operation: int, sign: int, options: RandAugment) -> Image.Image:
    """One RandAugment operation, by torchvision's own functions on PIL images, with its magnitudes and semantics."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    mode = InterpolationMode(options.interpolation)
    fill = [float(options.fill)] * len(image.getbands())
    amount = magnitudes(sign, options, image.width)

    def affine(**changes: Any) -> Callable[[], Any]:
        settings = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]} | changes
        return lambda: F.affine(image, **settings, interpolation=mode, fill=fill)

    # The order of torchvision's RandAugment._augmentation_space.
    operations: tuple[Callable[[], Any], ...] = (
        lambda: image,
        affine(shear=[amount.shear, 0.0], center=[0, 0]),
        affine(shear=[0.0, amount.shear], center=[0, 0]),
        affine(translate=[amount.shift, 0]),
        affine(translate=[0, amount.shift]),
        lambda: F.rotate(image, amount.angle, interpolation=mode, fill=fill),
        lambda: F.adjust_brightness(image, amount.strength),
        lambda: F.adjust_saturation(image, amount.strength),
        lambda: F.adjust_contrast(image, amount.strength),
        lambda: F.adjust_sharpness(image, amount.strength),
        lambda: F.posterize(image, amount.bits),
        lambda: F.solarize(image, amount.threshold),
        lambda: F.autocontrast(image),
        lambda: F.equalize(image),
    )
    result: Image.Image = operations[operation]()
    return result


def inverse_matrix(operation: int, sign: int, options: RandAugment, size: int) -> tuple[float, ...]:
    """The matrix `(a, b, c, d, e, f)` that the geometric operations 1 to 5 give to Pillow, from view to source pixels."""
    amount = magnitudes(sign, options, size)
    if operation <= 2:
        tangent = math.tan(math.radians(amount.shear))
        return (1.0, tangent, 0.0, 0.0, 1.0, 0.0) if operation == 1 else (1.0, 0.0, 0.0, tangent, 1.0, 0.0)
    if operation <= 4:
        return (1.0, 0.0, float(-amount.shift if operation == 3 else 0), 0.0, 1.0, float(-amount.shift if operation == 4 else 0))
    angle = -math.radians(amount.angle % 360.0)  # as Pillow's Image.rotate
    cos, sin, middle = round(math.cos(angle), 15), round(math.sin(angle), 15), size / 2
    return (cos, sin, cos * -middle + sin * -middle + middle, -sin, cos, -sin * -middle + cos * -middle + middle)


def _jitter(image: Image.Image, operation: int, factors: NDArray[np.int32]) -> Image.Image:
    """One operation of torchvision's ColorJitter."""
    from torchvision.transforms import functional as F

    if operation == JITTER_NONE:
        return image
    if operation == 3:
        hue, saturation, value = image.convert("HSV").split()
        turned = Image.fromarray(np.asarray(hue) + factors[3].astype(np.uint8))  # over the end and on, as in torchvision
        return Image.merge("HSV", (turned, saturation, value)).convert("RGB")
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[operation]
    result: Image.Image = adjust(image, int(factors[operation]) / UNIT)
    return result
