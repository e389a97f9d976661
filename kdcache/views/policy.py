"""Which view a sample gets: a declarative policy, and the table of all its draws. NumPy only.

The parameters of view `v` are a function of (policy, v, sample number) and of nothing else. Row `i` of
`Philox(key=[seed, v])`'s raw 64-bit stream, reshaped `[N, COLUMNS]`, belongs to sample `i`; NumPy promises that this raw
stream never changes. All results are integers, so that a last-bit difference of `exp` between processors cannot
turn into other pixels.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kdcache.errors import NotFoundError, UsageError, unknown_name

__all__ = ["COLUMNS", "MIX_CUTMIX", "MIX_MIXUP", "MIX_NONE", "PRESETS", "UNIT", "ViewPolicy", "ViewTable"]

COLUMNS = 64  # draws per sample, fixed by policy version 1
UNIT = 1 << 16  # boxes are in 1/UNIT of the canvas side, lambda in 1/UNIT
MIX_NONE, MIX_MIXUP, MIX_CUTMIX = 0, 1, 2
CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
MAX_OPERATIONS = 4
RANDAUGMENT_OPERATIONS = 14

# Column numbers of policy version 1. Those from 37 on are spare: later pieces of a policy take theirs there,
# which leaves every present draw where it is.
_ORDER = 0
_AREA = slice(1, 11)
_RATIO = slice(11, 21)
_LEFT, _TOP, _FLIP = 21, 22, 23
_OPERATION = slice(24, 28)
_SIGN = slice(28, 32)
_MIX, _KIND, _LAMBDA, _CUT_X, _CUT_Y = 32, 33, 34, 35, 36


class _Piece(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CenterCrop(_Piece):
    """The middle `fraction` (of the side) of the canvas; 1 is the whole canvas."""

    kind: Literal["center"] = "center"
    fraction: float = Field(1.0, gt=0, le=1)


class InceptionCrop(_Piece):
    """A box of random area and aspect ratio (both relative to the canvas), as torchvision's RandomResizedCrop draws it."""

    kind: Literal["inception"] = "inception"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    @model_validator(mode="after")
    def _ordered(self) -> "InceptionCrop":
        if not (0 < self.scale[0] <= self.scale[1] <= 1 and 0 < self.ratio[0] <= self.ratio[1]):
            raise ValueError("scale must lie in (0, 1] and ratio above 0, each in ascending order")
        return self


class PadCrop(_Piece):
    """The whole canvas, shifted by up to `padding` view pixels each way; what comes in is black (CIFAR recipes)."""

    kind: Literal["pad"] = "pad"
    padding: int = Field(4, ge=0)


class RandAugment(_Piece):
    """`n` operations at magnitude bin `m`, with torchvision's operation space (Cubuk et al. 2020)."""

    n: int = Field(2, ge=1, le=MAX_OPERATIONS)
    m: int = Field(14, ge=0)
    bins: int = Field(31, ge=2)
    interpolation: Literal["nearest", "bilinear"] = "nearest"
    fill: int = Field(0, ge=0, le=255)

    @model_validator(mode="after")
    def _within(self) -> "RandAugment":
        if self.m >= self.bins:
            raise ValueError(f"magnitude m={self.m} is outside the {self.bins} bins (0 to {self.bins - 1})")
        return self


class Mix(_Piece):
    """MixUp or CutMix with the neighbouring position; lambda is uniform on (0, 1)."""

    probability: float = Field(1.0, ge=0, le=1)
    cutmix: float = Field(0.5, ge=0, le=1)  # share of CutMix among the mixed views


Crop = Annotated[CenterCrop | InceptionCrop | PadCrop, Field(discriminator="kind")]


class ViewPolicy(BaseModel):
    """What is done to a sample in each of its views; frozen, JSON-able, identified by `digest`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    seed: int = Field(0, ge=0, lt=1 << 64)
    size: int = Field(224, ge=1, le=4096)  # side of a view in pixels
    crop: Crop = CenterCrop()
    hflip: float = Field(0.5, ge=0, le=1)
    randaugment: RandAugment | None = None
    mix: Mix | None = None

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON: equal digests mean equal views of equal canvases."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def load(cls, name_or_file: str, **overrides: Any) -> "ViewPolicy":
        """A preset by name, or a YAML file that holds a policy; `overrides` replace single fields."""
        if name_or_file in PRESETS:
            fields = PRESETS[name_or_file].model_dump()
        elif Path(name_or_file).suffix in {".yaml", ".yml", ".json"}:
            try:
                fields = yaml.safe_load(Path(name_or_file).read_text())
            except FileNotFoundError:
                raise NotFoundError(
                    f"policy file {name_or_file!r} does not exist",
                    why="a name that ends in .yaml or .json is read as a file",
                    fix=f"create it, or use a preset: {', '.join(PRESETS)}",
                ) from None
            except yaml.YAMLError as error:
                raise UsageError(
                    f"policy file {name_or_file!r} is not YAML", why=str(error).replace("\n", " "), fix="correct the file"
                ) from None
        else:
            raise unknown_name("view policy", name_or_file, PRESETS)
        if not isinstance(fields, dict):
            raise UsageError(
                f"policy file {name_or_file!r} does not hold a mapping",
                why="a policy is a mapping of fields such as size, crop, hflip",
                fix="see the presets' fields with: kdcache info ARCHIVE --json",
            )
        try:
            return cls(**fields | {key: value for key, value in overrides.items() if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            raise UsageError(
                f"view policy {name_or_file!r}: {'.'.join(map(str, first['loc']))} = {first['input']!r}",
                why=first["msg"],
                fix="correct that field",
            ) from None

    def parameters(self, view: int, num_samples: int) -> "ViewTable":
        """All draws of one view, in the order of positions (row `j` is position `j`): NumPy arrays of `num_samples` rows."""
        if view < 0 or num_samples < 1:
            raise ValueError(f"need view >= 0 and at least one sample, got view {view} of {num_samples} samples")
        order_key = np.empty(num_samples, np.uint64)
        parts = []
        stream = np.random.Philox(key=np.array([self.seed, view], dtype=np.uint64))
        for start in range(0, num_samples, 1 << 16):  # in slices, so that a million samples need no gigabyte of draws
            count = min(1 << 16, num_samples - start)
            raw = stream.random_raw(count * COLUMNS).reshape(count, COLUMNS)
            order_key[start : start + count] = raw[:, _ORDER]
            parts.append(self._draw(raw))
        by_sample = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

        order = np.argsort(order_key, kind="stable").astype(np.int64)
        partner = np.full(num_samples, -1, np.int64)
        paired = num_samples - num_samples % 2
        partner[:paired] = order[np.arange(paired) ^ 1]
        table = ViewTable(view=view, policy=self, sample=order, partner=partner, **{k: v[order] for k, v in by_sample.items()})
        table.mix[partner < 0] = MIX_NONE
        unmixed = table.mix == MIX_NONE
        table.lam_units[unmixed] = UNIT
        table.partner[unmixed] = -1
        table.cut[table.mix != MIX_CUTMIX] = 0
        return table

    def _draw(self, raw: NDArray[np.uint64]) -> dict[str, NDArray]:
        """Turn raw columns `[n, COLUMNS]` into the columns of a `ViewTable`, still in sample order."""
        u: NDArray[np.float64] = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
        n = len(u)
        columns: dict[str, NDArray] = {
            "box": _crop_boxes(self.crop, u),
            "shift": np.zeros((n, 2), np.int32),
            "flip": u[:, _FLIP] < self.hflip,
            "operations": np.zeros((n, 0), np.uint8),
            "signs": np.zeros((n, 0), np.int8),
            "mix": np.zeros(n, np.uint8),
            "lam_units": np.full(n, UNIT, np.int32),
            "cut": np.zeros((n, 4), np.int32),
        }
        if isinstance(self.crop, PadCrop):
            pad = self.crop.padding
            columns["shift"] = (np.floor(u[:, [_LEFT, _TOP]] * (2 * pad + 1)) - pad).astype(np.int32)
        if self.randaugment:
            count = self.randaugment.n
            columns["operations"] = np.floor(u[:, _OPERATION][:, :count] * RANDAUGMENT_OPERATIONS).astype(np.uint8)
            columns["signs"] = np.where(u[:, _SIGN][:, :count] < 0.5, -1, 1).astype(np.int8)
        if self.mix:
            mixed = u[:, _MIX] < self.mix.probability
            kind = np.where(u[:, _KIND] < self.mix.cutmix, MIX_CUTMIX, MIX_MIXUP)
            columns["mix"] = np.where(mixed, kind, MIX_NONE).astype(np.uint8)
            columns["lam_units"] = np.floor(u[:, _LAMBDA] * UNIT).astype(np.int32)
            # CutMix (Yun et al. 2019): a box of side sqrt(1 - lambda) around a uniform centre, clipped at the borders.
            half = np.floor(self.size * np.sqrt(1 - columns["lam_units"] / UNIT)).astype(np.int32) // 2
            centre = np.floor(u[:, [_CUT_X, _CUT_Y]] * self.size).astype(np.int32)
            columns["cut"] = np.clip(
                np.concatenate([centre - half[:, None], centre + half[:, None]], axis=1), 0, self.size
            ).astype(np.int32)
        return columns


def _crop_boxes(crop: CenterCrop | InceptionCrop | PadCrop, u: NDArray[np.float64]) -> NDArray[np.int32]:
    """Crop boxes `[n, 4]` (left, top, right, bottom) in 1/UNIT of the canvas side."""
    n = len(u)
    if isinstance(crop, CenterCrop):
        side = max(1, round(crop.fraction * UNIT))
        edge = (UNIT - side) // 2
        return np.tile(np.array([edge, edge, edge + side, edge + side], np.int32), (n, 1))
    if isinstance(crop, PadCrop):
        return np.tile(np.array([0, 0, UNIT, UNIT], np.int32), (n, 1))
    area = crop.scale[0] + u[:, _AREA] * (crop.scale[1] - crop.scale[0])
    log_ratio = np.log(crop.ratio)
    ratio = np.exp(log_ratio[0] + u[:, _RATIO] * (log_ratio[1] - log_ratio[0]))
    width = np.rint(np.sqrt(area * ratio) * UNIT).astype(np.int64)
    height = np.rint(np.sqrt(area / ratio) * UNIT).astype(np.int64)
    fits = (width <= UNIT) & (height <= UNIT)
    first = np.arange(n), fits.argmax(axis=1)
    # No attempt fitted: the largest central box whose ratio is allowed, as torchvision does.
    nearest = min(max(1.0, crop.ratio[0]), crop.ratio[1])
    found = fits.any(axis=1)
    w: NDArray[np.int64] = np.where(found, width[first], round(min(1.0, nearest) * UNIT))
    h: NDArray[np.int64] = np.where(found, height[first], round(min(1.0, 1 / nearest) * UNIT))
    left = np.where(found, np.floor(u[:, _LEFT] * (UNIT - w + 1)), (UNIT - w) // 2).astype(np.int64)
    top = np.where(found, np.floor(u[:, _TOP] * (UNIT - h + 1)), (UNIT - h) // 2).astype(np.int64)
    return np.stack([left, top, left + w, top + h], axis=1).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class ViewTable:
    """Draws of one view, one row per position; index it with a slice or an integer array to get fewer rows."""

    view: int
    policy: ViewPolicy
    sample: NDArray[np.int64]  # [n] which sample sits at this position
    partner: NDArray[np.int64]  # [n] the sample mixed into it, or -1
    box: NDArray[np.int32]  # [n, 4] left, top, right, bottom in 1/UNIT of the canvas side
    shift: NDArray[np.int32]  # [n, 2] x and y shift after resizing, view pixels
    flip: NDArray[np.bool_]  # [n]
    operations: NDArray[np.uint8]  # [n, k] RandAugment operations, in order
    signs: NDArray[np.int8]  # [n, k] -1 or 1
    mix: NDArray[np.uint8]  # [n] MIX_NONE, MIX_MIXUP or MIX_CUTMIX
    lam_units: NDArray[np.int32]  # [n] drawn lambda in 1/UNIT (not yet corrected for the clipped box)
    cut: NDArray[np.int32]  # [n, 4] CutMix box in view pixels

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, rows: slice | NDArray) -> "ViewTable":
        arrays = {
            field.name: getattr(self, field.name)[rows]
            for field in dataclasses.fields(self)
            if field.name not in {"view", "policy"}
        }
        return ViewTable(view=self.view, policy=self.policy, **arrays)

    @property
    def lam(self) -> NDArray[np.float64]:
        """Weight of the sample's own label `[n]`: lambda for MixUp, the area left uncovered for CutMix, else 1."""
        left, top, right, bottom = self.cut.astype(np.int64).T
        uncovered = 1 - (right - left) * (bottom - top) / self.policy.size**2
        return np.where(self.mix == MIX_CUTMIX, uncovered, self.lam_units / UNIT)


_PAPER_MIX = Mix()
_PAPER_RANDAUGMENT = RandAugment()
PRESETS: dict[str, ViewPolicy] = {
    # Evaluation: nothing random.
    "none": ViewPolicy(hflip=0.0),
    # Temperature study, section 3.1: inception crop (Pets only), RandAugment(2, 14), flip, MixUp or CutMix.
    "pets": ViewPolicy(crop=InceptionCrop(), randaugment=_PAPER_RANDAUGMENT, mix=_PAPER_MIX),
    "cifar": ViewPolicy(size=32, randaugment=_PAPER_RANDAUGMENT, mix=_PAPER_MIX),
    "imagenet": ViewPolicy(crop=InceptionCrop(), randaugment=_PAPER_RANDAUGMENT, mix=_PAPER_MIX),
    # The 240-epoch CIFAR recipe of the CRD model zoo.
    "crd": ViewPolicy(size=32, crop=PadCrop()),
    # Handwritten digits: a mirrored digit is another sign, so no flip, and only crops that keep most of it.
    "digits": ViewPolicy(size=32, crop=InceptionCrop(scale=(0.6, 1.0)), hflip=0.0, mix=Mix()),
}
