"""Rendering of views, by either of two renderers that give the same bytes.

Order: crop and resize, flip, shift, RandAugment, colour jitter, erasing, then MixUp or CutMix of the finished pair.
Everything is uint8 and integer or Pillow arithmetic, so equal canvases give equal bytes.
"""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.system.transfer import to_device
from kdcache.views import device, reference
from kdcache.views.policy import MIX_CUTMIX, MIX_MIXUP, UNIT, ViewTable

__all__ = ["Renderer", "picked", "render", "render_positions", "with_partners"]

Renderer = Literal["reference", "device"]


def render(images: Tensor, rows: ViewTable, renderer: Renderer = "device") -> Tensor:
    """Views of `images`, uint8 `[B, 3, R, R]`, with the draws `rows`: uint8 `[B, 3, S, S]`, on the device of `images`.

    `images[i]` is the canvas of sample `rows.sample[i]`. Mixing partners must be adjacent, as in any even-aligned range of
    positions. Raises ValueError otherwise; `render_positions` adds missing partners itself.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be uint8 [B, 3, R, R], got {images.dtype} {list(images.shape)}")
    if len(images) != len(rows):
        raise ValueError(f"{len(images)} images for {len(rows)} rows of draws")
    if renderer == "reference":
        return _mix(torch.from_numpy(reference.draw(images.cpu().numpy(), rows)).to(images.device), rows)
    return _mix(device.draw(images, rows), rows)


def render_positions(
    pixels: NDArray[np.uint8] | Tensor,
    table: ViewTable,
    positions: NDArray[np.int64],
    renderer: Renderer = "device",
    device: torch.device | str = "cpu",
) -> Tensor:
    """Views at any `positions`, in any order, from `pixels [N, 3, R, R]`: uint8 `[B, 3, S, S]`, on `device`.

    `table` holds all rows of the view. `pixels` may already be a tensor on `device`.
    """
    wanted = with_partners(table, positions)
    rows, device = table[wanted], torch.device(device)
    if isinstance(pixels, Tensor):
        views = render(to_device(pixels.index_select(0, to_device(rows.sample, pixels.device)), device), rows, renderer)
    elif renderer == "reference":  # it takes one image at a time, so no copy is needed
        drawn = reference.draw((pixels[sample] for sample in rows.sample), rows)
        views = _mix(to_device(drawn, device), rows)
    else:
        views = render(to_device(pixels[rows.sample], device), rows, renderer)
    return picked(views, wanted, positions)


def with_partners(table: ViewTable, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The positions to render for `positions`: they and those of their mixing partners, each once, in ascending order."""
    mixed = table.partner[positions] >= 0
    return np.unique(np.concatenate([positions, (positions ^ 1)[mixed]]))


def picked(views: Tensor, rendered: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
    """The views at `positions`, of `views` at the ascending positions `rendered`."""
    if np.array_equal(rendered, positions):
        return views
    return views.index_select(0, to_device(np.searchsorted(rendered, positions), views.device))


def _mix(views: Tensor, rows: ViewTable) -> Tensor:
    """Mix neighbours: lambda times the view plus the rest of its partner (MixUp), or with a box of the partner (CutMix)."""
    mixed = np.flatnonzero(rows.partner >= 0)
    if not len(mixed):
        return views
    # A partner is directly before or after its row; the sample numbers tell which.
    after = np.append(rows.sample[1:], -1)[mixed] == rows.partner[mixed]
    before = np.append([-1], rows.sample[:-1])[mixed] == rows.partner[mixed]
    if not (after | before).all():
        missing = rows.partner[mixed[~(after | before)][0]]
        raise ValueError(f"mixing partner (sample {missing}) is not beside its row; render even-aligned ranges of positions")
    beside = np.where(after, mixed + 1, mixed - 1)
    out = views.clone()
    for kind in (MIX_MIXUP, MIX_CUTMIX):
        chosen = rows.mix[mixed] == kind
        if not chosen.any():
            continue
        columns = mixed[chosen], beside[chosen], rows.lam_units[mixed[chosen]], rows.cut[mixed[chosen]]
        drawn = to_device(np.column_stack(columns), views.device)
        own, other, boxes = drawn[:, 0], drawn[:, 1], drawn[:, 3:]
        if kind == MIX_MIXUP:
            share = drawn[:, 2].int().view(-1, 1, 1, 1)
            # (a L + b (UNIT - L) + UNIT / 2) / UNIT, with b moved out of the division
            partner = views[other].int()
            blended = views[own].int().sub_(partner).mul_(share).add_(UNIT // 2).bitwise_right_shift_(16).add_(partner)
            out[own] = blended.to(torch.uint8)
        else:
            out[own] = torch.where(device.inside_boxes(boxes, views.shape[-1]), views[other], views[own])
    return out
