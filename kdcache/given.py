"""Arrays and tensors as callers give them. What NumPy would change without a word (fractions, masks, complex) is refused."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import UsageError

__all__ = ["as_array", "as_logits", "whole_numbers"]


def as_array(values: Any, what: str) -> NDArray:
    """`values` as an array of their own dtype: arrays, lists, and tensors on any device, of any dtype, with or without gradients.

    Raises UsageError for ragged lists and for arrays in which values are masked.
    """
    if hasattr(values, "detach") and hasattr(values, "cpu"):
        values = values.detach().cpu()
        if "bfloat16" in str(values.dtype) or "float8" in str(values.dtype):  # which NumPy does not have
            values = values.float()
        if getattr(values, "is_sparse", False):
            values = values.to_dense()
        values = values.resolve_conj().resolve_neg().numpy()
    if isinstance(values, np.ma.MaskedArray):
        if np.ma.getmaskarray(values).any():
            where = np.argwhere(np.ma.getmaskarray(values))[0].tolist()
            raise UsageError(
                f"{what} at {where} is masked", why="there is no value for it", fix="leave such rows out, or fill them in"
            )
        values = values.data
    try:
        return np.asarray(values)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{what} are no array", why=str(error).splitlines()[0], fix="give an array, with rows of one length"
        ) from None


def as_logits(values: Any, what: str = "logits") -> NDArray[np.float32]:
    """Real numbers as float32. Raises UsageError for complex numbers, texts and objects."""
    array = as_array(values, what)
    if array.dtype.kind not in "fiu":
        raise UsageError(
            f"{what} are {array.dtype} {list(array.shape)}",
            why="logits are real numbers",
            fix="give the real part, logits.real, if that is meant" if array.dtype.kind == "c" else "give an array of float32",
        )
    with np.errstate(over="ignore"):  # infinity is refused where its row is known
        return array.astype(np.float32, copy=False)


def whole_numbers(values: Any, what: str) -> NDArray[np.int64]:
    """Whole numbers, of any dtype, as int64. Raises UsageError, with the first that is none, for others."""
    array = as_array(values, what)
    if (array.dtype.kind in "iu" and array.dtype.itemsize < 8) or array.dtype == np.int64:
        return array.astype(np.int64, copy=False)
    if array.dtype.kind not in "fiu":
        if not array.size:
            return array.astype(np.int64)
        raise UsageError(
            f"{what} are {array.dtype} {list(array.shape)}", why="they are whole numbers", fix="give an array of int64"
        )
    wrong = ~((array == np.floor(array)) & (np.abs(array) < 2.0**63))
    if wrong.any():
        place = np.argwhere(wrong)[0].tolist()
        raise UsageError(
            f"{what} at {place} is {array[tuple(place)]}", why="they are whole numbers", fix="correct it: nothing is rounded here"
        )
    return array.astype(np.int64)
