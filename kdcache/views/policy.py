"""View policies: a declarative description of augmentation, and the table of its random draws. NumPy only.

The parameters of view `v` are a function of (policy, v, sample number, the sample's size) and of nothing else. Row `i` of
`Philox(key=[seed, v])`'s raw 64-bit stream, reshaped `[N, COLUMNS]`, belongs to sample `i`; NumPy promises that this raw
stream never changes. All results are integers, so that a last-bit difference of `exp` between processors cannot change
a pixel.

Version 2 draws crops in the geometry of the photograph, whose size the canvas records. Version 1 took every canvas for a
square photograph; its archives keep that meaning. The draws are the same, and so are the views of square photographs.
"""

import dataclasses
import hashlib
import json
import re
import shlex
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kdcache.errors import IncompatibleError, NotFoundError, UsageError, how_to_write, unknown_name
from kdcache.system.documents import DocumentError, parse_yaml, read_yaml
from kdcache.views.crops import UNIT, CenterCrop, Crop, InceptionCrop, PadCrop, Piece, check_ranges, crop_boxes

__all__ = [
    "COLUMNS",
    "JITTER_NONE",
    "MIX_CUTMIX",
    "MIX_MIXUP",
    "MIX_NONE",
    "PRESETS",
    "PROBE_VERSION",
    "UNIT",
    "CenterCrop",
    "ColorJitter",
    "Filter",
    "InceptionCrop",
    "Mix",
    "PadCrop",
    "RandAugment",
    "RandomErasing",
    "RendererChoice",
    "ViewPolicy",
    "ViewTable",
    "without_policy",
]

RendererChoice = Literal["auto", "reference", "device"]  # how views are drawn, all to the same bytes

PROBE_VERSION = 2  # of the digests of views that new archives hold; see probe.py
COLUMNS = 64  # draws per sample, fixed by the policy version
MIX_NONE, MIX_MIXUP, MIX_CUTMIX = 0, 1, 2
JITTER_NONE = 4  # no operation; the others are brightness 0, contrast 1, saturation 2, hue 3
RANDAUGMENT_OPERATIONS = 14
MAX_OPERATIONS = 4

# Column numbers of policy versions 1 and 2. The last column is spare: a later piece takes its draws there, and no present draw
# moves.
_ORDER = 0
_AREA = slice(1, 11)  # ten attempts at a crop, as torchvision's RandomResizedCrop
_RATIO = slice(11, 21)
_LEFT, _TOP, _FLIP = 21, 22, 23
_OPERATION = slice(24, 28)
_SIGN = slice(28, 32)
_MIX, _KIND, _LAMBDA, _CUT_X, _CUT_Y = 32, 33, 34, 35, 36
_FACTOR = slice(37, 40)
_HUE = 40
_JITTER_ORDER = slice(41, 45)
_JITTER, _ERASE, _ERASE_LEFT, _ERASE_TOP = 45, 46, 47, 48
_ERASE_AREA = slice(49, 56)  # seven attempts at a box (torchvision's RandomErasing: ten); the first one nearly always fits
_ERASE_RATIO = slice(56, 63)
_SUFFIXES = {".yaml", ".yml", ".json"}
Filter = Literal["bilinear", "bicubic"]


def _absent(value: object) -> bool:
    return value is None


class RandAugment(Piece):
    """`n` operations at magnitude bin `m`, with torchvision's operation space (Cubuk et al. 2020)."""

    n: int = Field(2, ge=1, le=MAX_OPERATIONS)
    m: int = Field(14, ge=0)
    bins: int = Field(31, ge=2, le=1000)
    interpolation: Literal["nearest", "bilinear"] = "nearest"
    fill: int = Field(0, ge=0, le=255)

    @model_validator(mode="after")
    def _within(self) -> "RandAugment":
        if self.m >= self.bins:
            raise ValueError(f"magnitude m={self.m} is outside the {self.bins} bins (0 to {self.bins - 1})")
        return self


class ColorJitter(Piece):
    """Brightness, contrast, saturation (factors 1 +- the strength) and hue (turned by up to that share of the circle).

    The order is random, as in torchvision's ColorJitter. A strength of 0 leaves its operation out.
    """

    brightness: float = Field(0.0, ge=0, le=10)
    contrast: float = Field(0.0, ge=0, le=10)
    saturation: float = Field(0.0, ge=0, le=10)
    hue: float = Field(0.0, ge=0, le=0.5)
    probability: float = Field(1.0, ge=0, le=1)


class RandomErasing(Piece):
    """A filled box of random area and aspect ratio, relative to the view (Zhong et al. 2020). It is drawn before mixing."""

    probability: float = Field(0.5, ge=0, le=1)
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)
    fill: tuple[Annotated[int, Field(ge=0, le=255)], ...] = Field((124, 116, 104), min_length=3, max_length=3)

    @model_validator(mode="after")
    def _ordered(self) -> "RandomErasing":
        check_ranges(self.scale, self.ratio)
        return self


class Mix(Piece):
    """MixUp or CutMix with the neighbouring position. Lambda is uniform on (0, 1), or from Beta(`beta`, `beta`)."""

    probability: float = Field(1.0, ge=0, le=1)
    cutmix: float = Field(0.5, ge=0, le=1)  # share of CutMix among the mixed views
    beta: float | None = Field(None, gt=0, le=1000, exclude_if=_absent)


class ViewPolicy(BaseModel):
    """The augmentation that makes a view of a sample, applied in field order. Frozen, JSON-able, identified by `digest`.

    With `filter` "auto" it is a draft: `settled` makes it a policy for a model, as `load` does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1, 2] = 2
    seed: int = Field(0, ge=0, lt=1 << 64)
    size: int = Field(224, ge=1, le=4096)  # side of a view in pixels
    crop: Crop = CenterCrop()
    # Newer pieces are left out of the JSON while they are absent, so that older policies keep their digests.
    # Interpolation of the antialiased resize; "auto": the one that the model's configuration states.
    filter: Literal["bilinear", "bicubic", "auto"] = Field("bilinear", exclude_if=lambda value: value == "bilinear")
    hflip: float = Field(0.5, ge=0, le=1)
    randaugment: RandAugment | None = None
    jitter: ColorJitter | None = Field(None, exclude_if=_absent)
    erase: RandomErasing | None = Field(None, exclude_if=_absent)
    mix: Mix | None = None

    @model_validator(mode="after")
    def _as_version_1_had_it(self) -> "ViewPolicy":
        resize = self.crop.resize if isinstance(self.crop, CenterCrop) else None
        if resize is not None and (self.version == 1 or resize < self.size):
            raise ValueError(
                "version 1 knows no crop.resize"
                if self.version == 1
                else f"crop.resize of {resize} pixels has no room for a view of {self.size}"
            )
        if self.version == 1 and isinstance(self.crop, CenterCrop):  # there were no modes, and every crop was squashed
            object.__setattr__(self, "crop", CenterCrop(fraction=self.crop.fraction))
        return self

    @property
    def needs_sizes(self) -> bool:
        """Whether views depend on the sizes of the photographs."""
        return self.version > 1 and not (isinstance(self.crop, CenterCrop) and self.crop.mode == "squash")

    @property
    def is_fixed(self) -> bool:
        """Whether nothing is left to chance: all views of a sample are the same."""
        random = (self.randaugment, self.jitter, self.erase, self.mix)
        return isinstance(self.crop, CenterCrop) and self.hflip in {0, 1} and not any(random)

    def as_version_1(self) -> "ViewPolicy":
        """The same policy of version 1, which squashes photographs; square ones have the same views in both."""
        return ViewPolicy.model_validate(self.model_dump() | {"version": 1})

    def settled(self, model_filter: Filter | None = None) -> "ViewPolicy":
        """This policy with `model_filter` in place of the filter "auto"; bilinear without a model, and always in version 1."""
        if self.filter != "auto":
            return self
        return self.model_copy(update={"filter": "bilinear" if self.version == 1 else model_filter or "bilinear"})

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON. Equal digests mean equal views of equal canvases. ValueError for a draft."""
        self._require_settled()
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def _require_settled(self) -> None:
        if self.filter == "auto":
            raise ValueError("filter auto stands for the filter of a model: use policy.settled(), or ViewPolicy.load()")

    @classmethod
    def load(cls, spec: str, model_filter: Filter | None = None, **overrides: Any) -> "ViewPolicy":
        """The policy `draft(spec, ...)`, settled for a model whose configuration states `model_filter`."""
        return cls.draft(spec, **overrides).settled(model_filter)

    @classmethod
    def draft(cls, spec: str, **overrides: Any) -> "ViewPolicy":
        """A preset or a YAML policy file, with single fields replaced: `pets:hflip=0,randaugment.m=9,mix=none`.

        Then `overrides` that are not None replace whole fields. Raises UsageError, which names the wrong field.
        """
        is_file = Path(spec).suffix in _SUFFIXES and "=" not in spec  # a file name may contain colons
        base, _, changes = (spec, "", "") if is_file else spec.partition(":")
        fields = PRESETS[base].model_dump() if base in PRESETS else _read(base)
        for change in re.split(r",(?![^\[{]*[\]}])", changes) if changes else []:  # commas in brackets are part of a value
            path, equals, text = change.partition("=")
            try:
                if not equals:
                    raise ValueError("no value")
                _assign(fields, path.strip().split("."), parse_yaml(text))
            except ValueError:
                raise UsageError(
                    f"view policy {spec!r} has the part {change!r}",
                    why="after the colon come fields with their values, written as in YAML",
                    fix=f"write for example: {base}:hflip=0,randaugment.m=9,crop.scale=[0.2,1]",
                ) from None
        try:
            return cls(**fields | {key: value for key, value in overrides.items() if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            raise UsageError(
                f"view policy {spec!r}: {'.'.join(map(str, first['loc']))} = {first['input']!r}",
                why=first["msg"],
                fix=f"{how_to_write([first])}; kdcache policy pets shows all fields",
            ) from None

    def parameters(self, view: int, num_samples: int, sizes: NDArray[np.integer[Any]] | None = None) -> "ViewTable":
        """All draws of one view: NumPy arrays of `num_samples` rows; row `j` is position `j`.

        `sizes [num_samples, 2]` are the (width, height) of the photographs in sample order, such as `canvas.sizes`. ValueError
        without them where views depend on them (`needs_sizes`).
        """
        if view < 0 or num_samples < 1:
            raise ValueError(f"need view >= 0 and at least one sample, got view {view} of {num_samples} samples")
        self._require_settled()
        aspect = self._aspects(num_samples, sizes)
        order_key = np.empty(num_samples, np.uint64)
        parts = []
        stream = np.random.Philox(key=np.array([self.seed, view], dtype=np.uint64))
        for start in range(0, num_samples, 1 << 16):  # in slices, as the raw draws of a million samples take 0.5 GB
            count = min(1 << 16, num_samples - start)
            raw = stream.random_raw(count * COLUMNS).reshape(count, COLUMNS)
            order_key[start : start + count] = raw[:, _ORDER]
            parts.append(self._draw(raw, aspect[start : start + count]))
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

    def _aspects(self, num_samples: int, sizes: NDArray[np.integer[Any]] | None) -> NDArray[np.float64]:
        """Width / height of every photograph, as far as views depend on it: float `[N]`."""
        if not self.needs_sizes:
            return np.ones(num_samples)
        if sizes is None:
            raise ValueError("crops are drawn in the photographs' own proportions: give their sizes, such as canvas.sizes")
        if sizes.shape != (num_samples, 2) or sizes.min() < 1:
            raise ValueError(f"sizes must be [{num_samples}, 2], width and height in pixels, got {list(sizes.shape)}")
        aspects: NDArray[np.float64] = sizes[:, 0] / sizes[:, 1]
        return aspects

    def _draw(self, raw: NDArray[np.uint64], aspect: NDArray[np.float64]) -> dict[str, NDArray]:
        """Turn raw columns `[n, COLUMNS]` into the columns of a `ViewTable`, still in sample order."""
        u: NDArray[np.float64] = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
        n = len(u)
        columns: dict[str, NDArray] = {
            "box": crop_boxes(self.crop, u[:, _AREA], u[:, _RATIO], u[:, [_LEFT, _TOP]], aspect, self.size),
            "shift": np.zeros((n, 2), np.int32),
            "flip": u[:, _FLIP] < self.hflip,
            "operations": np.zeros((n, 0), np.uint8),
            "signs": np.zeros((n, 0), np.int8),
            "jitter": np.zeros((n, 0), np.uint8),
            "factors": np.zeros((n, 0), np.int32),
            "erase": np.zeros((n, 0), np.int32),
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
        if self.jitter:
            columns["jitter"], columns["factors"] = _jitter(self.jitter, u)
        if self.erase:
            columns["erase"] = _erase_boxes(self.erase, self.size, u)
        if self.mix:
            mixed = u[:, _MIX] < self.mix.probability
            kind = np.where(u[:, _KIND] < self.mix.cutmix, MIX_CUTMIX, MIX_MIXUP)
            columns["mix"] = np.where(mixed, kind, MIX_NONE).astype(np.uint8)
            columns["lam_units"] = _lambda_units(u[:, _LAMBDA], self.mix.beta)
            # CutMix (Yun et al. 2019): a box of side sqrt(1 - lambda) around a uniform centre, clipped at the borders.
            half = np.floor(self.size * np.sqrt(1 - columns["lam_units"] / UNIT)).astype(np.int32) // 2
            centre = np.floor(u[:, [_CUT_X, _CUT_Y]] * self.size).astype(np.int32)
            columns["cut"] = np.clip(
                np.concatenate([centre - half[:, None], centre + half[:, None]], axis=1), 0, self.size
            ).astype(np.int32)
        return columns


def without_policy(location: str) -> IncompatibleError:
    """The error for an archive that does not say which views it has."""
    return IncompatibleError(
        f"archive {location} cannot be replayed",
        why="it was written without a view policy, so nobody knows which views its logits belong to",
        fix="make one with: kdcache dump-teacher",
    )


def _read(file: str) -> dict[str, Any]:
    """Read the fields of a policy file."""
    if Path(file).suffix not in _SUFFIXES:
        raise unknown_name("view policy", file, PRESETS)
    try:
        fields = read_yaml(Path(file))
    except FileNotFoundError:
        raise NotFoundError(
            f"policy file {file!r} does not exist",
            why="a name that ends in .yaml or .json is read as a file",
            fix=f"create it (kdcache policy pets > {shlex.quote(file)}), or use a preset: {', '.join(PRESETS)}",
        ) from None
    except (OSError, DocumentError) as error:
        raise UsageError(
            f"policy file {file!r} cannot be read", why=" ".join(str(error).split())[:200], fix="correct the file"
        ) from None
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise UsageError(
            f"policy file {file!r} does not hold a mapping",
            why="a policy is a mapping of fields such as size, crop, hflip",
            fix=f"begin with a preset: kdcache policy pets > {shlex.quote(file)}",
        )
    return fields


def _assign(fields: dict[str, Any], path: list[str], value: Any) -> None:
    """Set `fields[a][b]...`. The text `none` removes a piece. Another kind of crop starts from its own defaults."""
    for key in path[:-1]:
        inner = fields.get(key)
        fields[key] = dict(inner) if isinstance(inner, dict) else {}
        fields = fields[key]
    if path[-1] == "kind" and fields.get("kind") != value:
        fields.clear()
    fields[path[-1]] = None if value == "none" else value


def _lambda_units(u: NDArray[np.float64], beta: float | None) -> NDArray[np.int32]:
    """Lambda in 1/UNIT, rounded down: uniform, or from Beta(beta, beta) by its inverse distribution function."""
    if beta is None:
        return np.floor(u * UNIT).astype(np.int32)
    return np.searchsorted(_beta_thresholds(beta), u, side="right").astype(np.int32)


@lru_cache(maxsize=4)
def _beta_thresholds(beta: float) -> NDArray[np.float64]:
    """Distribution function of Beta(beta, beta) at 1/UNIT, ..., (UNIT - 1)/UNIT.

    Draws are compared with these values, not passed through an inverse, so that last bits of SciPy have no effect.
    """
    from scipy.special import betainc

    thresholds: NDArray[np.float64] = betainc(beta, beta, np.arange(1, UNIT) / UNIT)
    return thresholds


def _jitter(jitter: ColorJitter, u: NDArray[np.float64]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Colour operations in order `[n, 4]`, and their factors `[n, 4]`, with the ranges of torchvision's ColorJitter."""
    strengths = np.array([jitter.brightness, jitter.contrast, jitter.saturation])
    low, high = np.maximum(0, 1 - strengths), 1 + strengths
    factors = np.floor((low + u[:, _FACTOR] * (high - low)) * UNIT)
    hue = np.trunc((2 * u[:, [_HUE]] - 1) * jitter.hue * 255)
    order = np.argsort(u[:, _JITTER_ORDER], axis=1, kind="stable").astype(np.uint8)
    used = np.append(strengths > 0, jitter.hue > 0)[order] & (u[:, [_JITTER]] < jitter.probability)
    return np.where(used, order, JITTER_NONE).astype(np.uint8), np.concatenate([factors, hue], axis=1).astype(np.int32)


def _erase_boxes(erase: RandomErasing, size: int, u: NDArray[np.float64]) -> NDArray[np.int32]:
    """Erased boxes `[n, 4]` (left, top, right, bottom) in view pixels, as torchvision's RandomErasing draws them."""
    area = size * size * (erase.scale[0] + u[:, _ERASE_AREA] * (erase.scale[1] - erase.scale[0]))
    log_ratio = np.log(erase.ratio)
    ratio = np.exp(log_ratio[0] + u[:, _ERASE_RATIO] * (log_ratio[1] - log_ratio[0]))
    height, width = np.rint(np.sqrt(area * ratio)).astype(np.int64), np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (width < size) & (height < size)
    first = np.arange(len(u)), fits.argmax(axis=1)
    w, h = width[first], height[first]
    left, top = np.floor(u[:, _ERASE_LEFT] * (size - w + 1)), np.floor(u[:, _ERASE_TOP] * (size - h + 1))
    box = np.stack([left, top, left + w, top + h], axis=1).astype(np.int32)
    box[~fits.any(axis=1) | (u[:, _ERASE] >= erase.probability)] = 0
    return box


@dataclasses.dataclass(frozen=True)
class ViewTable:
    """Draws of one view, one row per position. Indexing with a slice or an integer array selects rows."""

    view: int
    policy: ViewPolicy
    sample: NDArray[np.int64]  # [n] sample at this position
    partner: NDArray[np.int64]  # [n] sample mixed into it, or -1
    box: NDArray[np.int32]  # [n, 4] left, top, right, bottom in 1/UNIT of the canvas side
    shift: NDArray[np.int32]  # [n, 2] x and y shift after resizing, view pixels
    flip: NDArray[np.bool_]  # [n]
    operations: NDArray[np.uint8]  # [n, k] RandAugment operations, in order
    signs: NDArray[np.int8]  # [n, k] -1 or 1
    jitter: NDArray[np.uint8]  # [n, 4] colour operations in order, JITTER_NONE where there is none; [n, 0] without jitter
    factors: NDArray[np.int32]  # [n, 4] brightness, contrast, saturation in 1/UNIT, and hue in 1/255 of the circle
    erase: NDArray[np.int32]  # [n, 4] erased box in view pixels, empty where nothing is; [n, 0] without erasing
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
        """Weight of the sample's own label, float `[n]`: lambda for MixUp, the uncovered area for CutMix, else 1."""
        left, top, right, bottom = self.cut.astype(np.int64).T
        uncovered = 1 - (right - left) * (bottom - top) / self.policy.size**2
        return np.where(self.mix == MIX_CUTMIX, uncovered, self.lam_units / UNIT)


_PAPER_MIX = Mix()
_PAPER_RANDAUGMENT = RandAugment()
PRESETS: dict[str, ViewPolicy] = {
    # No randomness: the whole image, made square; and the usual test crop of ImageNet models.
    "none": ViewPolicy(crop=CenterCrop(mode="squash"), hflip=0.0),
    "eval": ViewPolicy(crop=CenterCrop(fraction=0.875), filter="auto", hflip=0.0),
    # Temperature study, section 3.1: inception crop (Pets only), RandAugment(2, 14), flip, MixUp or CutMix.
    "pets": ViewPolicy(crop=InceptionCrop(), filter="auto", randaugment=_PAPER_RANDAUGMENT, mix=_PAPER_MIX),
    "cifar": ViewPolicy(size=32, randaugment=_PAPER_RANDAUGMENT, mix=_PAPER_MIX),
    "imagenet": ViewPolicy(crop=InceptionCrop(), filter="auto", randaugment=_PAPER_RANDAUGMENT, mix=_PAPER_MIX),
    # ImageNet as the distillation papers have it, and torchvision's weights: inception crop and flip, no more.
    "imagenet-plain": ViewPolicy(crop=InceptionCrop()),
    # The 240-epoch CIFAR recipe of the CRD model zoo.
    "crd": ViewPolicy(size=32, crop=PadCrop()),
    # Handwritten digits: no flip, as it makes another sign; and only crops that keep most of the digit.
    "digits": ViewPolicy(size=32, crop=InceptionCrop(scale=(0.6, 1.0)), hflip=0.0, mix=Mix()),
}
