"""The device renderer: views of a whole batch as tensors, on a CPU or a GPU, with the bytes of the reference renderer.

Pillow's 8-bit image operations reduce to integer arithmetic: gathers, lookup tables, and a float32 blend. The blend is a
multiplication and an addition, which must not be fused, as that rounds differently. There is no loop over samples.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kdcache.system.transfer import to_device
from kdcache.views import reference
from kdcache.views.policy import JITTER_NONE, RANDAUGMENT_OPERATIONS, UNIT, RandAugment, ViewTable
from kdcache.views.resample import crop_and_resize

__all__ = ["draw"]


def draw(images: Tensor, rows: ViewTable) -> Tensor:
    """Views before mixing: uint8 `[B, 3, R, R]` to uint8 `[B, 3, S, S]`, on the device of `images`."""
    policy = rows.policy
    batch = _GroupedViews(crop_and_resize(images, rows.box, rows.flip, rows.shift, policy.size, policy.filter))
    if policy.randaugment:
        for step in range(policy.randaugment.n):
            _randaugment(batch, rows.operations[:, step], rows.signs[:, step], policy.randaugment)
    for step in range(rows.jitter.shape[1]):
        _jitter(batch, rows.jitter[:, step], rows.factors)
    views = batch.views()
    return _erased(views, rows.erase, policy.erase.fill) if policy.erase else views


class _GroupedViews:
    """Views in an order in which those with the same operation are adjacent."""

    def __init__(self, views: Tensor) -> None:
        self._views = views
        self.rows = np.arange(len(views))  # row of the batch at each place

    def grouped(self, codes: NDArray) -> Iterator[tuple[int, slice, Tensor]]:
        """For each occurring code: the code, the places of its views, and the views, which may be changed in place."""
        self._move(np.argsort(codes, kind="stable"))
        values, starts = np.unique(codes[self.rows], return_index=True)
        for value, start, stop in zip(values.tolist(), starts, [*starts[1:], len(codes)], strict=True):
            yield value, slice(start, stop), self._views[start:stop]

    def views(self) -> Tensor:
        """All views in row order."""
        self._move(np.arange(len(self.rows)))
        return self._views

    def _move(self, rows: NDArray[np.int64]) -> None:
        if not np.array_equal(rows, self.rows):
            place = np.empty_like(rows)
            place[self.rows] = np.arange(len(rows))
            self._views = self._views.index_select(0, to_device(place[rows], self._views.device))
            self.rows = rows


def _number(value: float, like: Tensor) -> Tensor:
    """A divisor as a tensor. With a plain number, a GPU multiplies by the reciprocal, which rounds differently."""
    return torch.full((), value, dtype=like.dtype, device=like.device)


# ---------------------------------------------------------------- RandAugment


def _randaugment(batch: _GroupedViews, operations: NDArray[np.uint8], signs: NDArray[np.int8], options: RandAugment) -> None:
    """Apply one RandAugment operation to each view. Views with the same operation are done together."""
    positive = (signs > 0) & (operations <= _LAST_SIGNED)
    for code, _, views in batch.grouped(operations.astype(np.int64) * 2 + positive):
        operation, sign = code // 2, 2 * (code % 2) - 1
        if operation:
            views.copy_(_OPERATIONS[operation](views, operation, sign, options))


def _geometric(x: Tensor, operation: int, sign: int, options: RandAugment) -> Tensor:
    if options.interpolation == "bilinear":
        return _warp_bilinear(x, reference.inverse_matrix(operation, sign, options, x.shape[-1]), options.fill)
    source, outside = _nearest_map(operation, sign, options, x.shape[-1], x.device)
    flat = x.flatten(2)
    moved = flat.gather(2, source.expand(flat.shape))
    return moved.masked_fill_(outside, options.fill).view_as(x)


@lru_cache(maxsize=64)
def _nearest_map(operation: int, sign: int, options: RandAugment, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(source of each pixel, mask of pixels from outside). Found by applying the reference to an image of pixel numbers."""
    numbers = Image.fromarray(np.arange(size * size, dtype=np.int32).reshape(size, size))
    moved = np.asarray(reference.augment(numbers, operation, sign, options.model_copy(update={"fill": -1}))).reshape(-1)
    # Waited for, unlike all other copies: whatever stream uses the kept maps later finds them there.
    return torch.from_numpy(np.maximum(moved, 0).astype(np.int64)).to(device), torch.from_numpy(moved < 0).to(device)


def _warp_bilinear(x: Tensor, matrix: tuple[float, ...], fill: int) -> Tensor:
    """Pillow's affine transform with bilinear interpolation: float64 coordinates and sums, truncated to integers."""
    size = x.shape[-1]
    steps = torch.arange(size, dtype=torch.float64, device=x.device) + 0.5
    a, b, c, d, e, f = matrix
    xs = (a * steps)[None, :] + (b * steps)[:, None] + c
    ys = (d * steps)[None, :] + (e * steps)[:, None] + f
    outside = (xs < 0) | (xs >= size) | (ys < 0) | (ys >= size)
    xs, ys = xs - 0.5, ys - 0.5
    left, top = xs.floor(), ys.floor()
    right_share, bottom_share = (xs - left).view(-1), (ys - top).view(-1)
    columns = [(left + i).clamp(0, size - 1).long() for i in (0, 1)]
    rows = [(top + i).clamp(0, size - 1).long() for i in (0, 1)]
    flat = x.flatten(2)

    def at(row: Tensor, column: Tensor) -> Tensor:
        return flat[:, :, (row * size + column).view(-1)].double()

    upper, lower = ((left_pixel := at(row, columns[0])) + (at(row, columns[1]) - left_pixel) * right_share for row in rows)
    mixed = upper + (lower - upper) * bottom_share
    return mixed.to(torch.uint8).masked_fill_(outside.view(-1), fill).view_as(x)


def _strength(operation: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, int, int, RandAugment], Tensor]:
    """`operation` (a blend with a factor) as a RandAugment operation."""

    def apply(x: Tensor, _: int, sign: int, options: RandAugment) -> Tensor:
        factor = np.float32(reference.magnitudes(sign, options, x.shape[-1]).strength)
        return operation(x, torch.full((len(x), 1, 1, 1), float(factor), device=x.device))

    return apply


def _posterize(x: Tensor, operation: int, sign: int, options: RandAugment) -> Tensor:
    return x & (0xFF & ~((1 << (8 - reference.magnitudes(sign, options, x.shape[-1]).bits)) - 1))


def _solarize(x: Tensor, operation: int, sign: int, options: RandAugment) -> Tensor:
    return x ^ (x >= reference.magnitudes(sign, options, x.shape[-1]).threshold).to(torch.uint8).mul_(255)


def _autocontrast(x: Tensor, operation: int, sign: int, options: RandAugment) -> Tensor:
    """Each channel stretched to 0 to 255 by Pillow's float64 line."""
    low, high = x.amin(dim=(2, 3)).double()[..., None], x.amax(dim=(2, 3)).double()[..., None]
    scale = torch.full_like(low, 255.0) / (high - low)  # infinite for a channel with a single value
    values = torch.arange(256, dtype=torch.float64, device=x.device)
    stretched = (values * scale + -low * scale).trunc().clamp(0, 255)
    return _look_up(x.long(), torch.where(high > low, stretched, values).to(torch.uint8))


def _equalize(x: Tensor, operation: int, sign: int, options: RandAugment) -> Tensor:
    """Each channel's histogram equalized, by the integer steps of Pillow's ImageOps.equalize."""
    index = x.long().contiguous()
    channels = x.shape[0] * x.shape[1]
    flat = index.view(channels, -1)
    counts = torch.zeros(channels, 256, dtype=torch.int64, device=x.device)
    counts.scatter_add_(1, flat, torch.ones((), dtype=torch.int64, device=x.device).expand(flat.shape))
    values = torch.arange(256, device=x.device)
    last = (values * (counts > 0)).amax(dim=1, keepdim=True)
    step = (flat.shape[1] - counts.gather(1, last)) // 255
    divisor = step.clamp(min=1)
    flattened = ((divisor // 2 + counts.cumsum(dim=1) - counts) // divisor).clamp(max=255)
    return _look_up(index, torch.where(step > 0, flattened, values).to(torch.uint8).view(*x.shape[:2], 256))


def _look_up(index: Tensor, table: Tensor) -> Tensor:
    """`table [B, 3, 256]` at `index` int64 `[B, 3, S, S]`."""
    return table.gather(2, index.flatten(2)).view(index.shape)


# ---------------------------------------------------------------- blends


def _blend(degenerate: Tensor | float, x: Tensor, factor: Tensor) -> Tensor:
    """Pillow's Image.blend of float32 images, `degenerate + factor * (x - degenerate)`, clipped and truncated to uint8."""
    return (x - degenerate).mul_(factor).add_(degenerate).clamp_(0, 255).to(torch.uint8)


def _luma(x: Tensor) -> Tensor:
    """Pillow's grey of RGB: int32 `[B, 1, S, S]`."""
    red, green, blue = x.int().chunk(3, dim=1)
    return (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(1 << 15).bitwise_right_shift_(16)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(0, x.float(), factor)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    total = _luma(x).sum(dim=(1, 2, 3), keepdim=True, dtype=torch.int64).double()
    mean = total / _number(x.shape[-1] * x.shape[-2], total)
    return _blend((mean + 0.5).floor().float(), x.float(), factor)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(_luma(x).float(), x.float(), factor)


def _sharpness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with Pillow's SMOOTH filter: 3 x 3 ones with a 5 in the middle, divided by 13. Border pixels do not change."""
    if x.shape[-1] < 3:
        return x
    pixels = x.float()
    middle = pixels[:, :, 1:-1, 1:-1]
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    smooth = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(middle, alpha=4)
    smooth.add_(6).div_(_number(13, smooth)).floor_()  # rounds to nearest: an integer over 13 never lies half-way
    out = x.clone()
    out[:, :, 1:-1, 1:-1] = _blend(smooth, middle, factor)
    return out


def _identity(x: Tensor, operation: int, sign: int, options: RandAugment) -> Tensor:
    return x


_OPERATIONS: tuple[Callable[[Tensor, int, int, RandAugment], Tensor], ...] = (
    _identity,
    *[_geometric] * 5,
    _strength(_brightness),
    _strength(_saturation),
    _strength(_contrast),
    _strength(_sharpness),
    _posterize,
    _solarize,
    _autocontrast,
    _equalize,
)
assert len(_OPERATIONS) == RANDAUGMENT_OPERATIONS
_LAST_SIGNED = 9  # operations after it do the same whatever the sign


# ---------------------------------------------------------------- colour jitter, erasing


def _jitter(batch: _GroupedViews, operations: NDArray[np.uint8], factors: NDArray[np.int32]) -> None:
    """Apply one operation of the colour jitter to each view."""
    amounts: Tensor | None = None  # in the order of the grouped views
    for operation, places, views in batch.grouped(operations):
        if operation != JITTER_NONE:
            if amounts is None:
                own = np.take_along_axis(factors, operations.clip(max=3).astype(np.int64)[:, None], axis=1)
                amounts = to_device(own[batch.rows], views.device).view(-1, 1, 1, 1)
            amount = amounts[places]
            views.copy_(_hue(views, amount) if operation == 3 else _COLOURS[operation](views, amount / UNIT))


_COLOURS = (_brightness, _contrast, _saturation)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of Pillow's 8-bit HSV by `shift` 255ths of the circle, with Pillow's float rounding."""
    hue, saturation, value = _to_hsv(x)
    return _to_rgb((hue + shift) & 0xFF, saturation, value)


def _to_hsv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pillow's rgb2hsv: uint8 `[B, 3, S, S]` to three int32 `[B, 1, S, S]`; float32, with float64 where C promotes."""
    value, lowest = x.amax(dim=1, keepdim=True).int(), x.amin(dim=1, keepdim=True).int()
    spread = (value - lowest).float()
    red, green, blue = ((value - channel) / spread for channel in x.int().chunk(3, dim=1))
    is_red, is_green = (x[:, i : i + 1].int() == value for i in (0, 1))
    from_green, from_blue = (2.0 + red.double() - blue.double()).float(), (4.0 + green.double() - red.double()).float()
    sector = torch.where(is_red, blue - green, torch.where(is_green, from_green, from_blue))
    turned = (sector.double() / _number(6, sector.double()) + 1.0).fmod(1.0).float()
    grey = value == lowest
    hue = (turned.double() * 255.0).clamp_(0, 255).masked_fill_(grey, 0).int()
    saturation = ((spread / value.float()).double() * 255.0).clamp_(0, 255).masked_fill_(grey, 0).int()
    return hue, saturation, value


def _to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Pillow's hsv2rgb: three int32 `[B, 1, S, S]` to uint8 `[B, 3, S, S]`."""
    angle = hue.double() * 6.0 / _number(255, hue.double())
    sector = angle.floor()
    part = (angle - sector).float().double()
    share = (saturation.float() / _number(255, saturation.float())).double()
    level = value.double()

    def rounded(x: Tensor) -> Tensor:
        return (x + 0.5).floor().clamp(0, 255).int()  # C's round for positive numbers

    low, falling, rising = (rounded(level * (1.0 - s)) for s in (share, share * part, share * (1.0 - part)))
    sector = sector.int() % 6
    channels = []
    for choice in (
        (value, falling, low, low, rising, value),
        (rising, value, value, falling, low, low),
        (low, low, rising, value, value, falling),
    ):
        channels.append(torch.stack(choice).gather(0, sector.long()[None])[0])
    return torch.where(saturation == 0, value, torch.cat(channels, dim=1)).to(torch.uint8)


def _erased(views: Tensor, boxes: NDArray[np.int32], fill: tuple[int, ...]) -> Tensor:
    """Views with the boxes `[B, 4]` filled with `fill`."""
    colour = to_device(np.array(fill, np.uint8), views.device).view(1, 3, 1, 1)
    return torch.where(inside_boxes(to_device(boxes, views.device), views.shape[-1]), colour, views)


def inside_boxes(boxes: Tensor, size: int) -> Tensor:
    """Mask of the pixels inside the boxes `[B, 4]` (left, top, right, bottom): bool `[B, 1, size, size]`."""
    steps = torch.arange(size, device=boxes.device)
    across, down = ((steps >= boxes[:, i, None]) & (steps < boxes[:, i + 2, None]) for i in (0, 1))
    return (across[:, None, :] & down[:, :, None])[:, None]
