"""Rendering of views, by either of two renderers that give the same bytes.

Order: crop and resize, flip, shift, RandAugment, colour jitter, erasing, then MixUp or CutMix of the finished pair.
Everything is uint8 and integer or Pillow arithmetic, so equal canvases give equal bytes.
"""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.views import device, reference
from kdcache.views.policy import MIX_CUTMIX, MIX_MIXUP, UNIT, ViewTable

__all__ = ["Renderer", "render", "render_positions"]

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
    positions = np.asarray(positions)
    alone = table.partner[positions] < 0
    wanted = np.unique(np.concatenate([positions, (positions ^ 1)[~alone]]))
    rows = table[wanted]
    if isinstance(pixels, Tensor):
        views = render(pixels[torch.from_numpy(rows.sample).to(pixels.device)].to(device), rows, renderer)
    elif renderer == "reference":  # it takes one image at a time, so no copy is needed
        drawn = reference.draw((pixels[sample] for sample in rows.sample), rows)
        views = _mix(torch.from_numpy(drawn).to(device), rows)
    else:
        views = render(torch.from_numpy(pixels[rows.sample]).to(device), rows, renderer)
    if np.array_equal(wanted, positions):
        return views
    return views[torch.from_numpy(np.searchsorted(wanted, positions)).to(views.device)]


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
        own, other = (torch.from_numpy(index[chosen]).to(views.device) for index in (mixed, beside))
        if kind == MIX_MIXUP:
            share = torch.from_numpy(rows.lam_units[mixed[chosen]]).to(views.device).view(-1, 1, 1, 1)
            # (a L + b (UNIT - L) + UNIT / 2) / UNIT, with b moved out of the division
            partner = views[other].int()
            blended = views[own].int().sub_(partner).mul_(share).add_(UNIT // 2).bitwise_right_shift_(16).add_(partner)
            out[own] = blended.to(torch.uint8)
        else:
            boxes = torch.from_numpy(rows.cut[mixed[chosen]]).to(views.device)
            out[own] = torch.where(device.inside_boxes(boxes, views.shape[-1]), views[other], views[own])
    return out
