"""Crops: which box of a photograph a view shows. NumPy only.

A canvas holds every photograph as a square. Boxes are drawn in the geometry of the photograph, as torchvision draws them,
and then expressed in the square: a box that is square in the photograph is narrow in the canvas of a wide one, and becomes a
view with the photograph's own proportions.
"""

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["UNIT", "CenterCrop", "Crop", "InceptionCrop", "PadCrop", "Piece", "check_ranges", "crop_boxes"]

UNIT = 1 << 16  # boxes are in 1/UNIT of the canvas side


class Piece(BaseModel):
    """A part of a view policy. Newer fields are left out of the JSON at their defaults, so that older digests stay."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CenterCrop(Piece):
    """The central square of `fraction` of the photograph's short side; or of mode `squash`, which forgets the proportions:
    that fraction of each side, made square. `squash` with fraction 1 is the whole photograph.

    With `resize`, the box is the one of torchvision's Resize(resize) and CenterCrop of the view's size instead, whose whole
    pixels it keeps to; the fraction is then size / resize.
    """

    kind: Literal["center"] = "center"
    fraction: float = Field(1.0, gt=0, le=1)
    mode: Literal["center", "squash"] = Field("center", exclude_if=lambda mode: mode == "center")
    resize: int | None = Field(None, ge=1, le=1 << 19, exclude_if=lambda resize: resize is None)


class InceptionCrop(Piece):
    """A box of random area (relative to the photograph) and aspect ratio, as torchvision's RandomResizedCrop draws it."""

    kind: Literal["inception"] = "inception"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    @model_validator(mode="after")
    def _ordered(self) -> "InceptionCrop":
        check_ranges(self.scale, self.ratio)
        return self


class PadCrop(Piece):
    """The central square, shifted by up to `padding` view pixels each way, with black borders (CIFAR recipes)."""

    kind: Literal["pad"] = "pad"
    padding: int = Field(4, ge=0, le=4096)


Crop = Annotated[CenterCrop | InceptionCrop | PadCrop, Field(discriminator="kind")]


def check_ranges(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    """ValueError for ranges of areas and aspect ratios that no box can have."""
    if not (1e-4 <= scale[0] <= scale[1] <= 1 and 1e-3 <= ratio[0] <= ratio[1] <= 1e3):
        raise ValueError("scale must lie between 0.0001 and 1 and ratio between 0.001 and 1000, each in ascending order")


def crop_boxes(
    crop: CenterCrop | InceptionCrop | PadCrop,
    areas: NDArray[np.float64],
    ratios: NDArray[np.float64],
    places: NDArray[np.float64],
    aspect: NDArray[np.float64],
    size: int,
) -> NDArray[np.int32]:
    """Crop boxes `[n, 4]` (left, top, right, bottom) in 1/UNIT of the canvas side, for photographs of width / height `aspect`.

    `areas` and `ratios [n, 10]` and `places [n, 2]` (left, top) are draws in [0, 1); `size` is the view's side in pixels. An
    aspect of 1 gives the boxes of policy version 1, which took every canvas for a square photograph.
    """
    if isinstance(crop, InceptionCrop):
        return _inception_boxes(crop, areas, ratios, places, aspect)
    if isinstance(crop, CenterCrop) and crop.resize is not None:
        return _resized_boxes(crop.resize, size, aspect)
    fraction = crop.fraction if isinstance(crop, CenterCrop) else 1.0
    width = _units(fraction * np.minimum(1.0, 1 / aspect))
    height = _units(fraction * np.minimum(1.0, aspect))
    return _placed(width, height, (UNIT - width) // 2, (UNIT - height) // 2)


def _resized_boxes(resize: int, size: int, aspect: NDArray[np.float64]) -> NDArray[np.int32]:
    """torchvision's Resize(resize), which cuts the long side's pixels down to a whole number, and CenterCrop(size)."""
    longest = np.floor(resize * np.maximum(aspect, 1 / aspect) + 1e-9)  # which must not fall below a whole number by rounding
    width, height = np.where(aspect > 1, longest, resize), np.where(aspect < 1, longest, resize)
    left, top = np.rint((width - size) / 2), np.rint((height - size) / 2)
    box = np.stack([left / width, top / height, (left + size) / width, (top + size) / height], axis=1)
    return np.rint(box * UNIT).astype(np.int32)


def _inception_boxes(
    crop: InceptionCrop,
    areas: NDArray[np.float64],
    ratios: NDArray[np.float64],
    places: NDArray[np.float64],
    aspect: NDArray[np.float64],
) -> NDArray[np.int32]:
    """torchvision's RandomResizedCrop.get_params: the first of ten boxes that fits, or the largest central one allowed."""
    log_ratio = np.log(crop.ratio)
    nearest = np.clip(aspect, *crop.ratio)  # allowed ratio next to the photograph's own
    w, h = _units(np.minimum(1.0, nearest / aspect)), _units(np.minimum(1.0, aspect / nearest))
    open_rows = np.arange(len(aspect))
    for attempt in range(areas.shape[1]):  # each only for the rows that have no box yet: most have one after the first
        area = crop.scale[0] + areas[open_rows, attempt] * (crop.scale[1] - crop.scale[0])
        ratio = np.exp(log_ratio[0] + ratios[open_rows, attempt] * (log_ratio[1] - log_ratio[0]))
        ratio /= aspect[open_rows]  # of a box in the photograph, now of the same box in the canvas
        width = np.rint(np.sqrt(area * ratio) * UNIT).astype(np.int64)
        height = np.rint(np.sqrt(area / ratio) * UNIT).astype(np.int64)
        fits = (width <= UNIT) & (height <= UNIT)
        fitted = open_rows[fits]
        w[fitted], h[fitted] = np.maximum(width[fits], 1), np.maximum(height[fits], 1)
        open_rows = open_rows[~fits]
    left = np.floor(places[:, 0] * (UNIT - w + 1)).astype(np.int64)
    top = np.floor(places[:, 1] * (UNIT - h + 1)).astype(np.int64)
    left[open_rows], top[open_rows] = (UNIT - w[open_rows]) // 2, (UNIT - h[open_rows]) // 2
    return _placed(w, h, left, top)


def _units(share: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.maximum(1, np.rint(share * UNIT)).astype(np.int64)


def _placed(
    width: NDArray[np.int64], height: NDArray[np.int64], left: NDArray[np.int64], top: NDArray[np.int64]
) -> NDArray[np.int32]:
    return np.stack([left, top, left + width, top + height], axis=1).astype(np.int32)
