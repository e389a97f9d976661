"""Pixels of views: the reference renderer, on Pillow, one image at a time.

Order: crop and resize, flip, shift, RandAugment, then MixUp or CutMix of the finished pair. Everything is uint8 and
integer or Pillow arithmetic, so equal canvases give equal bytes.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kdcache.views.policy import MIX_CUTMIX, MIX_MIXUP, UNIT, RandAugment, ViewTable

__all__ = ["render", "render_positions"]


def render(images: Tensor, rows: ViewTable) -> Tensor:
    """Views of `images`, uint8 `[B, 3, R, R]`, by the draws `rows`: uint8 `[B, 3, S, S]`.

    `images[i]` is the canvas of sample `rows.sample[i]`. Mixing partners must both be there, side by side, as they are
    in any even-aligned range of positions; ValueError otherwise (`render_positions` brings missing partners along).
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be uint8 [B, 3, R, R], got {images.dtype} {list(images.shape)}")
    if len(images) != len(rows):
        raise ValueError(f"{len(images)} images for {len(rows)} rows of draws")
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    size = rows.policy.size
    out = np.empty((len(rows), size, size, 3), np.uint8)
    for i in range(len(rows)):
        out[i] = _render_one(pixels[i], rows, i)
    return _mix(torch.from_numpy(out).permute(0, 3, 1, 2).contiguous(), rows)


def render_positions(pixels: NDArray[np.uint8], table: ViewTable, positions: NDArray[np.int64]) -> Tensor:
    """Views at `positions` (any, in any order) of a view's whole `table`, uint8 `[B, 3, S, S]`, from `pixels [N, 3, R, R]`."""
    positions = np.asarray(positions)
    alone = table.partner[positions] < 0
    wanted = np.unique(np.concatenate([positions, (positions ^ 1)[~alone]]))
    rows = table[wanted]
    views = render(torch.from_numpy(pixels[rows.sample]), rows)
    if np.array_equal(wanted, positions):
        return views
    return views[torch.from_numpy(np.searchsorted(wanted, positions))]


def _render_one(pixels: NDArray[np.uint8], rows: ViewTable, i: int) -> NDArray[np.uint8]:
    side, size, randaugment = len(pixels), rows.policy.size, rows.policy.randaugment
    # Pillow keeps the box as float32; so does this, so that what is passed is what is used.
    left, top, right, bottom = (float(np.float32(edge * side / UNIT)) for edge in rows.box[i])
    image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    if rows.flip[i]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    dx, dy = (int(shift) for shift in rows.shift[i])
    if dx or dy:
        image = image.crop((dx, dy, dx + size, dy + size))
    if randaugment:
        for operation, sign in zip(rows.operations[i], rows.signs[i], strict=True):
            image = _apply(image, int(operation), int(sign), randaugment)
    return np.asarray(image)


def _mix(views: Tensor, rows: ViewTable) -> Tensor:
    """Mix neighbours: `lambda` of the view itself and the rest of its partner (MixUp), or a box of the partner (CutMix)."""
    mixed = np.flatnonzero(rows.partner >= 0)
    if not len(mixed):
        return views
    # A partner sits right before or right after its row; which of the two shows in the sample numbers.
    after = np.append(rows.sample[1:], -1)[mixed] == rows.partner[mixed]
    before = np.append([-1], rows.sample[:-1])[mixed] == rows.partner[mixed]
    if not (after | before).all():
        missing = rows.partner[mixed[~(after | before)][0]]
        raise ValueError(f"mixing partner (sample {missing}) is not beside its row; render even-aligned ranges of positions")
    beside = np.where(after, mixed + 1, mixed - 1)
    out = views.clone()
    is_mixup = rows.mix[mixed] == MIX_MIXUP
    own, other = mixed[is_mixup], beside[is_mixup]
    if len(own):
        share = torch.from_numpy(rows.lam_units[own]).view(-1, 1, 1, 1)
        blended = views[own].int() * share + views[other].int() * (UNIT - share) + UNIT // 2
        out[own] = (blended >> 16).to(torch.uint8)
    for i, j in zip(mixed[~is_mixup], beside[~is_mixup], strict=True):
        assert rows.mix[i] == MIX_CUTMIX
        left, top, right, bottom = rows.cut[i]
        out[i, :, top:bottom, left:right] = views[j, :, top:bottom, left:right]
    return out


def _magnitude(first: float, last: float, options: RandAugment) -> float:
    """Entry `m` of torchvision's `torch.linspace(first, last, bins)`, to the last bit of its float32.

    Written out, because torch's own rounding depends on whether the processor fuses multiply and add; this one does.
    """
    start, end = np.float32(first), np.float32(last)
    step = float((end - start) / np.float32(options.bins - 1))
    if options.m < options.bins // 2:
        return float(np.float32(float(start) + step * options.m))
    return float(np.float32(float(end) - step * (options.bins - 1 - options.m)))


def _apply(image: Image.Image, operation: int, sign: int, options: RandAugment) -> Image.Image:
    """One RandAugment operation, by torchvision's own functions on PIL images, with its magnitudes and semantics."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    mode = InterpolationMode(options.interpolation)
    fill = [float(options.fill)] * 3

    def affine(**changes: Any) -> Callable[[], Any]:
        settings = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]} | changes
        return lambda: F.affine(image, **settings, interpolation=mode, fill=fill)

    shear = math.degrees(math.atan(sign * _magnitude(0.0, 0.3, options)))
    shift = int(sign * _magnitude(0.0, 150.0 / 331.0 * image.width, options))
    strength = 1.0 + sign * _magnitude(0.0, 0.9, options)
    # The order of torchvision's RandAugment._augmentation_space.
    operations: tuple[Callable[[], Any], ...] = (
        lambda: image,
        affine(shear=[shear, 0.0], center=[0, 0]),
        affine(shear=[0.0, shear], center=[0, 0]),
        affine(translate=[shift, 0]),
        affine(translate=[0, shift]),
        lambda: F.rotate(image, sign * _magnitude(0.0, 30.0, options), interpolation=mode, fill=fill),
        lambda: F.adjust_brightness(image, strength),
        lambda: F.adjust_saturation(image, strength),
        lambda: F.adjust_contrast(image, strength),
        lambda: F.adjust_sharpness(image, strength),
        lambda: F.posterize(image, 8 - round(options.m / ((options.bins - 1) / 4))),
        lambda: F.solarize(image, _magnitude(255.0, 0.0, options)),
        lambda: F.autocontrast(image),
        lambda: F.equalize(image),
    )
    result: Image.Image = operations[operation]()
    return result
