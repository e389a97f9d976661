"""Pillow's antialiased resize of a crop box on batches of tensors, exact to the last bit.

Pillow filters 8-bit images with 22-bit integer weights, first along x, then along y, and rounds to uint8 after each.
Here each weight is split in two, `high * 256 + low`. Each half is applied by an embedding bag: a weighted sum of table
rows, which are the lines of the image. Its float32 sums are exact because they stay below 2^24.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from kdcache.system.transfer import to_device
from kdcache.views.policy import UNIT

__all__ = ["can_resize", "crop_and_resize", "resized"]

_BITS = 22  # bits of Pillow's weights
_LOW_BITS = 8  # bits of a weight's lower half; they leave room for 128 taps
_MAX_TAPS = 128
_AT_ONCE = (1 << 20, 1 << 29)  # bytes of sums at a time: a cache's worth, and what a GPU can spare
_WIDTHS = 32  # sums are compiled per line width, so widths are rounded up to multiples of this many pixels


def _triangle(x: Tensor) -> Tensor:
    return (1 - x).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:
    a = -0.5
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, far.masked_fill_(x >= 2, 0))


_FILTERS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {"bilinear": (1.0, _triangle), "bicubic": (2.0, _cubic)}


def can_resize(side: int, size: int, filter: str) -> bool:
    """Whether every crop of an image of `side` pixels can be resized here. A view's line takes at most 128 image lines."""
    return _most_taps(side / size, filter) <= _MAX_TAPS


def _on_host(device: torch.device) -> bool:
    """Whether work for the host is done in the way that suits it. Both ways give the same bytes."""
    return device.type == "cpu"


def _most_taps(scale: float, filter: str) -> int:
    return math.ceil(2 * _FILTERS[filter][0] * max(1.0, scale)) + 1


def crop_and_resize(
    images: Tensor, box: NDArray[np.int32], flip: NDArray[np.bool_], shift: NDArray[np.int32], size: int, filter: str
) -> Tensor:
    """Boxes of `images`, uint8 `[B, 3, R, R]`, resized, mirrored and shifted: uint8 `[B, 3, size, size]`.

    `box` `[B, 4]` holds left, top, right and bottom in 1/UNIT of R, `shift` `[B, 2]` view pixels (x, y); borders are black.
    `filter` is `bilinear` or `bicubic`. Raises ValueError if a line of a view needs more than 128 lines of the image.
    """
    side, device = images.shape[-1], images.device
    if side == size and (box == [0, 0, UNIT, UNIT]).all():
        return _moved(images, flip, shift)  # the weights below give the same, only slower
    widest = (box[:, 2:] - box[:, :2]).max(axis=0)
    left, top, right, bottom, dx, dy, mirrored = to_device(np.column_stack([box, shift, flip]), device).unbind(1)
    across = _taps((left, right), int(widest[0]), dx, mirrored, side, size, filter)
    down = _taps((top, bottom), int(widest[1]), dy, None, side, size, filter)
    out = torch.empty(len(images), 3, size, size, dtype=torch.uint8, device=device)
    step = max(1, _AT_ONCE[not _on_host(device)] // (12 * side * max(side, size)))
    tables = _LineSums(device)
    for start in range(0, len(images), step):
        chunk = slice(start, start + step)
        x_taps, columns = across.window(chunk, side)
        y_taps, rows = down.window(chunk, side)
        lines = images[chunk, :, rows, columns].permute(0, 3, 1, 2)  # [B, R (x), 3, R (y)]
        lines = tables.sums(lines, x_taps).permute(0, 3, 2, 1)  # [B, R (y), 3, size (x)]
        out[chunk] = tables.sums(lines, y_taps).permute(0, 2, 1, 3)
    return out


def resized(images: Tensor, size: int, filter: str) -> Tensor:
    """Whole square `images`, uint8 `[B, 3, S, S]`, at `size` pixels, antialiased: the same bytes on every device."""
    if images.shape[-1] == size:
        return images
    count = len(images)
    whole = np.tile(np.array([0, 0, UNIT, UNIT], np.int32), (count, 1))
    return crop_and_resize(images, whole, np.zeros(count, bool), np.zeros((count, 2), np.int32), size, filter)


def _moved(images: Tensor, flip: NDArray[np.bool_], shift: NDArray[np.int32]) -> Tensor:
    """Images mirrored and shifted, with black borders."""
    side = images.shape[-1]
    shift = shift.clip(-side, side)  # larger shifts give the same black view
    reach = int(np.abs(shift).max())
    turned, x, y = to_device(np.column_stack([flip, shift + reach]).astype(np.int64), images.device).unbind(1)
    mirrored = torch.where(turned.bool().view(-1, 1, 1, 1), images.flip(3), images)
    if not reach:
        return mirrored
    windows = F.pad(mirrored, [reach] * 4).unfold(2, side, 1).unfold(3, side, 1)  # [B, 3, shifts, shifts, side, side]
    return windows[torch.arange(len(images), device=images.device), :, y, x]


@dataclass(frozen=True)
class _Taps:
    """Taps along one axis: for each of `S` output lines, the first input line, and the halves of the weights from there.

    Weight 0 belongs to a constant, not to a line. The constant moves each half's sum to where float32 rounds as wanted:
    the upper sum lies between 2^23 and 2^24, where float32 has only integers, and the lower sum is 1/2 (minus half a
    step) too small. Adding the two rounds the lower half down, and the mantissa is the result.
    """

    first: Tensor  # int32 [B, S]
    high: Tensor  # float32 [B, S, 1 + taps]
    low: Tensor
    used: NDArray[np.int64]  # [B] number of taps that are not zero
    below: int  # offset that keeps negative sums above zero, in units of the upper half

    def window(self, chunk: slice, side: int) -> tuple["_Taps", slice]:
        """(taps of a part of the batch, the range of the `side` lines that it uses). Its taps count from the range's start."""
        first, high, low, used = self.first[chunk], self.high[chunk], self.low[chunk], self.used[chunk]
        if not _on_host(first.device):  # reading the values would make the host wait
            return _Taps(first, high, low, used, self.below), slice(0, side)
        taps, begin = max(1, int(used.max())), int(first.min())
        count = min(-(-(int(first.max()) + taps - begin) // _WIDTHS) * _WIDTHS, side)
        begin = min(begin, side - count)
        return _Taps(first - begin, high[..., : 1 + taps], low[..., : 1 + taps], used, self.below), slice(begin, begin + count)


def _taps(
    edges: tuple[Tensor, Tensor], widest: int, shift: Tensor, flip: Tensor | None, side: int, size: int, filter: str
) -> _Taps:
    """Pillow's weights for boxes with these `edges` (int32 `[B]` each, at most `widest` apart), in the order of the shifted
    and mirrored lines.

    All float64 operations are in Pillow's order (precompute_coeffs in Resample.c), so that each rounds alike.
    """
    radius, weight = _FILTERS[filter]
    device, count, pixels = shift.device, len(shift), widest / UNIT * side
    taps = _most_taps(pixels / size, filter)
    if taps > _MAX_TAPS:
        raise ValueError(f"a crop box of {pixels:.0f} pixels needs {taps} lines for one of a view of {size} pixels")
    low_edge, high_edge = ((edge.double() * side / UNIT).float() for edge in edges)  # float32, as in Pillow
    # The divisor is a tensor, since a GPU would multiply by the reciprocal of a plain number, and that rounds differently.
    scale = ((high_edge - low_edge).double() / torch.full((), size, dtype=torch.float64, device=device))[:, None]
    stretch = scale.clamp(min=1.0)
    support = radius * stretch
    line = torch.arange(size, device=device) + shift[:, None]
    inside = (line >= 0) & (line < size)
    if flip is not None:
        line = torch.where(flip.bool()[:, None], size - 1 - line, line)
    center = low_edge.double()[:, None] + (line + 0.5) * scale
    first = (center - support + 0.5).trunc().clamp(min=0)
    last = (center + support + 0.5).trunc().clamp(max=side)
    position = torch.arange(taps, dtype=torch.float64, device=device) + first[..., None]
    weights = weight(((position - center[..., None] + 0.5) * (1.0 / stretch)[..., None]).abs())
    weights.masked_fill_(position >= last[..., None], 0)
    total = torch.zeros_like(first)
    for tap in range(taps):  # in order, since the rounding of a float64 sum depends on it
        total += weights[..., tap]
    scaled = weights / total.masked_fill_(total == 0, 1)[..., None] * (1 << _BITS)
    whole = ((scaled + scaled.sign() * 0.5).trunc() * inside[..., None]).int()

    below = 0 if filter == "bilinear" else 1 << 21
    half = 1 << (_BITS - _LOW_BITS - 1)
    step = 1 / (1 << _LOW_BITS)
    if _on_host(device):
        used = ((whole != 0).any(dim=1) * torch.arange(1, taps + 1)).amax(dim=1).numpy()
    else:
        used = np.full(count, taps)
    return _Taps(
        first.clamp(max=side - 1).int(),
        F.pad((whole >> _LOW_BITS).float(), (1, 0), value=(1 << 23) + below + half),
        F.pad((whole & (1 << _LOW_BITS) - 1).float() * step, (1, 0), value=(step - 1) / 2),
        used,
        below,
    )


class _LineSums:
    """Weighted sums of lines. On a CPU it keeps its tables of lines from chunk to chunk."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[tuple[int, int], Tensor] = {}

    def sums(self, lines: Tensor, taps: _Taps) -> Tensor:
        """Sums of lines, uint8 `[B, L, 3, D]`, divided by 2^22 and rounded half up: uint8 `[B, S, 3, D]`."""
        batch, length = lines.shape[:2]
        size, count = taps.high.shape[1:]
        rows = torch.arange(1, 1 + batch * length, length, device=self._device, dtype=torch.int32)[:, None] + taps.first
        index = rows[..., None] + torch.arange(-1, count - 1, device=self._device, dtype=torch.int32)
        index.clamp_(max=batch * length)  # beyond the last line all weights are zero
        index[..., 0] = 0  # the row of ones
        total, fraction = self._bags(lines, index, taps.high, taps.low)
        pixels = total.add_(fraction).view(torch.int32).bitwise_right_shift_(_BITS - _LOW_BITS)
        if taps.below:
            pixels.bitwise_and_(0x1FF).sub_(taps.below >> (_BITS - _LOW_BITS)).clamp_(0, 255)
        return pixels.to(torch.uint8).view(batch, size, *lines.shape[2:])  # the low eight bits

    def _bags(self, lines: Tensor, index: Tensor, *weights: Tensor) -> list[Tensor]:
        """For each of `weights`: weighted sums of table rows `index [B, S, 1 + taps]`, float32 `[B * S, 3 * D]`."""
        rows, columns, bag_size = lines.shape[0] * lines.shape[1], lines.shape[2] * lines.shape[3], index.shape[-1]
        if not _on_host(self._device):
            table = torch.ones(1 + rows, columns, device=self._device)
            table[1:].view(lines.shape).copy_(lines)
            index = index.view(-1, bag_size)
            return [F.embedding_bag(index, table, mode="sum", per_sample_weights=w.view(index.shape)) for w in weights]
        # The byte table of quantised embeddings, whose rows end with a float32 scale and a float32 offset.
        if (rows, columns) not in self._kept:
            table = torch.zeros(1 + rows, columns + 8, dtype=torch.uint8)
            table[0, columns:] = torch.tensor([0.0, 1.0]).view(torch.uint8)
            table[1:, columns:] = torch.tensor([1.0, 0.0]).view(torch.uint8)
            self._kept[rows, columns] = table
        table = self._kept[rows, columns]
        table[1:, :columns].view(lines.shape).copy_(lines)
        offsets = torch.arange(0, index.numel() + 1, bag_size, dtype=torch.int32)
        bag = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
        return [bag(table, index.view(-1), offsets, False, 0, False, w.reshape(-1), None, True) for w in weights]
