"""Codecs: the encoding of logits as stored numbers, with a known bound on the loss.

If no logit of a row changes by more than e, then KL(p || p^) <= e^2 / (2 tau^2) nats at temperature tau, for any number of
classes (Hoeffding's lemma, errors in [-e, e]), and every probability stays within a factor exp(2 e / tau). Each codec gives
e for every stored row, and refuses logits that it cannot store within its bound.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdcache.errors import UsageError
from kdcache.registry import Registry

__all__ = ["CODECS", "Codec", "UnstorableError", "kl_bound"]

Stored = Mapping[str, NDArray]


class UnstorableError(UsageError):
    """A codec refuses a logit: `value`, at row `row` and class `column` of the input."""

    def __init__(self, value: float, row: int, column: int, *, why: str, fix: str) -> None:
        super().__init__(f"logit of row {row}, class {column} is {value:.6g}", why=why, fix=fix)
        self.value, self.row, self.column = value, row, column


class Codec(Protocol):
    """Encodes logits, float32 `[n, C]`, to stored numbers and back, row by row."""

    @property
    def dtype(self) -> np.dtype: ...  # dtype of the stored numbers [n, C]
    @property
    def parameters(self) -> tuple[str, ...]: ...  # names of the float32 numbers stored with each row
    @property
    def attributes(self) -> dict[str, float]: ...  # CF metadata, from which other software decodes
    @property
    def formula(self) -> str: ...  # Python expression that decodes, with array names in braces; for people without kdcache
    def encode(self, logits: NDArray[np.float32]) -> dict[str, NDArray]:
        """Encode to `{"logits": [n, C]}` and each of the `parameters`, `[n]`. Raises UnstorableError for an unfit logit."""

    def decode(self, stored: Stored, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Decode to logits float32 `[n, C]` (or with more axes before the last), into `out` if given."""

    def max_error(self, stored: Stored) -> NDArray[np.float64]:
        """Bound on the change of a logit by the codec, per row: float64 `[n]`."""


CODECS: Registry[Codec] = Registry("codec", entry_points="kdcache.codecs")
I16_STEP = 2.0**-9
_I16_STEP = np.float32(I16_STEP)


def kl_bound(max_error: ArrayLike, tau: float) -> NDArray[np.float64]:
    """Bound on KL(p || p^) in nats, at temperature `tau`, if no logit changed by more than `max_error`."""
    bound: NDArray[np.float64] = np.square(np.asarray(max_error, np.float64)) / (2 * tau**2)
    return bound


def _finite(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    logits = np.asarray(logits, dtype=np.float32)
    # A finite sum proves that all terms are finite. Only if it is not finite are the terms examined.
    with np.errstate(over="ignore", invalid="ignore"):
        suspect = not np.isfinite(logits.sum())
    if suspect and (bad := ~np.isfinite(logits)).any():
        row, column = map(int, np.argwhere(bad)[0])
        raise UnstorableError(
            float(logits[row, column]),
            row,
            column,
            why="an archive holds finite logits only; the teacher diverged or overflowed its precision",
            fix="use another teacher checkpoint, or dump with --precision fp32",
        )
    return logits


def _within(logits: NDArray[np.float32], limit: float, name: str, fix: str) -> None:
    """Raise for the first logit beyond +-`limit`, which codec `name` cannot store."""
    if max(logits.max(initial=0), -logits.min(initial=0)) <= limit:
        return
    row, column = map(int, np.argwhere(np.abs(logits) > limit)[0])
    raise UnstorableError(
        float(logits[row, column]),
        row,
        column,
        why=f"codec {name} stores logits within +-{limit:g}, and never clips",
        fix=fix,
    )


def _as_float32(numbers: NDArray, out: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """A float32 copy, in `out` if given. Stored numbers are memory-mapped, so callers must get a copy."""
    if out is None:
        return numbers.astype(np.float32)
    out[...] = numbers
    return out


@CODECS.register("i16")
@dataclass(frozen=True)
class I16:
    """int16 in steps of 2^-9: +-64, 2 bytes a logit, KL <= 4.8e-7 / tau^2 nats."""

    parameters = ()
    formula = f"{{logits}} * {I16_STEP!r}"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<i2")

    @property
    def attributes(self) -> dict[str, float]:
        return {"scale_factor": I16_STEP, "add_offset": 0.0}

    def encode(self, logits: NDArray[np.float32]) -> dict[str, NDArray]:
        logits = _finite(logits)
        _within(logits, 63.99902, "i16", "dump with --codec f32")  # 32767 steps, and not quite a half
        steps = logits * np.float32(1 / I16_STEP)
        return {"logits": np.rint(steps, out=steps).astype(self.dtype)}

    def decode(self, stored: Stored, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        logits = _as_float32(stored["logits"], out)
        logits *= _I16_STEP  # faster than one multiplication of two types
        return logits

    def max_error(self, stored: Stored) -> NDArray[np.float64]:
        return np.full(len(stored["logits"]), I16_STEP / 2)


@CODECS.register("f16")
@dataclass(frozen=True)
class F16:
    """float16: +-65504, 2 bytes a logit, off by half its spacing at a row's largest logit (at 16: KL <= 3.1e-5 / tau^2)."""

    parameters = ()
    formula = "{logits}"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<f2")

    @property
    def attributes(self) -> dict[str, float]:
        return {}

    def encode(self, logits: NDArray[np.float32]) -> dict[str, NDArray]:
        logits = _finite(logits)
        _within(logits, 65504.0, "f16", "dump with --codec f32")
        return {"logits": logits.astype(self.dtype)}

    def decode(self, stored: Stored, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        return _as_float32(stored["logits"], out)

    def max_error(self, stored: Stored) -> NDArray[np.float64]:
        largest = np.abs(stored["logits"]).max(axis=1, initial=0)
        half: NDArray[np.float64] = np.spacing(largest).astype(np.float64) / 2
        return half


@CODECS.register("f32")
@dataclass(frozen=True)
class F32:
    """float32 as it is: 4 bytes a logit, nothing lost."""

    parameters = ()
    formula = "{logits}"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<f4")

    @property
    def attributes(self) -> dict[str, float]:
        return {}

    def encode(self, logits: NDArray[np.float32]) -> dict[str, NDArray]:
        return {"logits": _finite(logits).astype(self.dtype, copy=False)}

    def decode(self, stored: Stored, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        return _as_float32(stored["logits"], out)

    def max_error(self, stored: Stored) -> NDArray[np.float64]:
        return np.zeros(len(stored["logits"]))


@CODECS.register("u8")
@dataclass(frozen=True)
class U8:
    """256 equal steps between a row's smallest and largest logit: 1 byte a logit, KL <= step^2 / (8 tau^2) nats.

    The step of each row is stored (`scale`), so every row's bound is known: a row that spans 20 has a step of 0.08, and
    KL <= 7.7e-4 / tau^2.
    """

    parameters = ("scale", "offset")
    formula = "{logits} * {scale}[:, None] + {offset}[:, None]"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("u1")

    @property
    def attributes(self) -> dict[str, float]:
        return {}

    def encode(self, logits: NDArray[np.float32]) -> dict[str, NDArray]:
        logits = _finite(logits)
        _within(logits, 1e38, "u8", "dump with --codec f32")  # beyond it, a row's span overflows float32
        low, high = logits.min(axis=1), logits.max(axis=1)
        scale = ((high.astype(np.float64) - low) / 255).astype("<f4")
        steps = np.where(scale > 0, scale, np.float32(1)).astype(np.float64)[:, None]
        codes = np.rint((logits - low[:, None].astype(np.float64)) / steps).clip(0, 255)
        return {"logits": codes.astype(self.dtype), "scale": scale, "offset": low.astype("<f4")}

    def decode(self, stored: Stored, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        logits = _as_float32(stored["logits"], out)
        with np.errstate(over="ignore", invalid="ignore"):  # a stranger's scales may overflow; `verify` reports them
            logits *= stored["scale"][..., None]
            logits += stored["offset"][..., None]
        return logits

    def max_error(self, stored: Stored) -> NDArray[np.float64]:
        scale, offset = (stored[name].astype(np.float64) for name in self.parameters)
        # Half a step, plus the float32 rounding of step, product and sum; at least float32's smallest number.
        return scale / 2 + (510 * scale + np.abs(offset)) * 2.0**-23 + 2.0**-126
