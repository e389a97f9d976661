"""How logits become stored numbers, with a stated bound on what is lost.

A quantisation step D changes every logit by at most D/2, and by Hoeffding's lemma KL(p || p^) <= D^2 / (8 tau^2) nats
at temperature tau, whatever the number of classes. Every codec refuses what it cannot store within its bound.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import UsageError
from kdcache.registry import Registry

__all__ = ["Codec", "codec"]


class Codec(Protocol):
    """Logits `float32 [n, C]` to stored numbers `[n, C]` and back, row by row."""

    @property
    def dtype(self) -> np.dtype: ...  # of the stored numbers
    @property
    def attributes(self) -> dict[str, float]: ...  # CF metadata with which other readers decode
    def encode(self, logits: NDArray[np.float32]) -> NDArray: ...
    def decode(self, stored: NDArray) -> NDArray[np.float32]: ...
    def max_error(self) -> float: ...  # largest change of one logit
    def kl_bound(self, tau: float) -> float: ...  # nats


codec: Registry[Codec] = Registry("codec")
I16_STEP = 2.0**-9


def _finite(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    logits = np.asarray(logits, dtype=np.float32)
    bad = ~np.isfinite(logits)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise UsageError(
            f"logit of row {row}, class {column} is {logits[row, column]}",
            why="an archive holds finite logits only; the teacher diverged or overflowed its precision",
            fix="use another teacher checkpoint, or dump with --precision fp32",
        )
    return logits


@codec.register("i16")
@dataclass(frozen=True)
class I16:
    """int16 in steps of 2^-9: +-64, 2 bytes a logit, KL <= 4.8e-7 / tau^2 nats."""

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<i2")

    @property
    def attributes(self) -> dict[str, float]:
        return {"scale_factor": I16_STEP, "add_offset": 0.0}

    def encode(self, logits: NDArray[np.float32]) -> NDArray:
        logits = _finite(logits)
        with np.errstate(over="ignore"):  # infinity is out of range as well, and is reported below
            codes = np.rint(logits * np.float32(1 / I16_STEP))
        bad = np.abs(codes) > 32767
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise UsageError(
                f"logit of row {row}, class {column} is {logits[row, column]:.6g}",
                why="codec i16 stores logits within +-63.99, and never clips",
                fix="dump with --codec f32",
            )
        stored: NDArray = codes.astype(self.dtype)
        return stored

    def decode(self, stored: NDArray) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = np.multiply(stored, np.float32(I16_STEP), dtype=np.float32)
        return logits

    def max_error(self) -> float:
        return I16_STEP / 2

    def kl_bound(self, tau: float) -> float:
        return I16_STEP**2 / (8 * tau**2)


@codec.register("f32")
@dataclass(frozen=True)
class F32:
    """float32 as it is: 4 bytes a logit, nothing lost."""

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<f4")

    @property
    def attributes(self) -> dict[str, float]:
        return {}

    def encode(self, logits: NDArray[np.float32]) -> NDArray:
        return _finite(logits).astype(self.dtype, copy=False)

    def decode(self, stored: NDArray) -> NDArray[np.float32]:
        return np.asarray(stored, dtype=np.float32)

    def max_error(self) -> float:
        return 0.0

    def kl_bound(self, tau: float) -> float:
        return 0.0
