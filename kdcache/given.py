"""Arrays and tensors as callers give them. What NumPy would change without a word (fractions, masks, complex) is refused."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import UsageError

__all__ = ["as_array", "as_logits", "in_order", "stored_numbers", "whole_numbers"]


def as_array(values: Any, what: str) -> NDArray:
    """`values` as an array of their own dtype: arrays, tensors on any device, of any dtype, with or without gradients, and lists.

    Lists may hold lists, arrays and tensors. Raises UsageError for ragged lists, for values that are masked, wherever they lie,
    and for tensors that hold none.
    """
    if type(values) is np.ndarray:
        return values
    if isinstance(values, list | tuple):  # whose arrays NumPy would take without their masks
        values = [as_array(item, f"{what}[{i}]") if _holds_values(item) else item for i, item in enumerate(values)]
    elif _is_tensor(values):
        values = _of_tensor(values, what)
    if isinstance(values, np.ma.MaskedArray):
        if np.ma.getmaskarray(values).any():
            where = np.argwhere(np.ma.getmaskarray(values))[0].tolist()
            raise UsageError(
                f"{what} at {where} is masked", why="there is no value for it", fix="leave such rows out, or fill them in"
            )
        values = values.data
    try:
        return np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise UsageError(
            f"{what} are no array", why=str(error).splitlines()[0], fix="give an array, with rows of one length"
        ) from None


def _is_tensor(values: Any) -> bool:
    return hasattr(values, "detach") and hasattr(values, "cpu")


def _holds_values(item: Any) -> bool:
    return isinstance(item, list | tuple | np.ma.MaskedArray) or _is_tensor(item)


def _of_tensor(values: Any, what: str) -> Any:
    try:
        values = values.detach().cpu()
        if getattr(values, "is_quantized", False):
            values = values.dequantize()
        if str(getattr(values, "layout", "torch.strided")) != "torch.strided":
            values = values.to_dense()
        if "bfloat16" in str(values.dtype) or "float8" in str(values.dtype):  # which NumPy does not have
            values = values.float()
        return values.resolve_conj().resolve_neg().numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:  # as of tensors on "meta", or with rows of many lengths
        raise UsageError(
            f"{what} are a tensor that is no array", why=str(error).splitlines()[0], fix="give a dense tensor, or an array"
        ) from None


def in_order(values: Any, what: str) -> list[Any]:
    """`values` as a list. UsageError for what has no order of its own, such as sets and mappings, and for a single text."""
    if (
        isinstance(values, str | bytes | set | frozenset | dict)
        or not isinstance(values, Iterable)
        or getattr(values, "ndim", 1) == 0
    ):
        raise UsageError(
            f"{what} are a {type(values).__name__}",
            why="they are told by their places, and it is no list of them",
            fix="give a list, one entry for each, in the order of their numbers",
        )
    return list(values)


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


def whole_numbers(values: Any, what: str, *, listed: bool = False) -> NDArray[np.int64]:
    """Whole numbers, of any dtype, as int64. Raises UsageError, with the first that is none, for others.

    `listed` refuses shapes other than `[n]`.
    """
    array = as_array(values, what)
    if listed and array.ndim != 1:
        raise UsageError(
            f"{what} have the shape {list(array.shape)}", why="they are a list [n]", fix="give one axis: array.ravel()"
        )
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


def stored_numbers(values: Any, what: str, dtype: np.dtype, shape: tuple[int, ...]) -> NDArray:
    """Whole numbers of one `shape` in the `dtype` that they are stored in. UsageError for other shapes, and for what it lacks."""
    numbers = as_array(values, what)
    numbers = numbers if numbers.dtype == dtype else whole_numbers(numbers, what)
    if numbers.shape != shape:
        raise UsageError(
            f"{what} have the shape {list(numbers.shape)}", why=f"they are {list(shape)} here", fix="give one for every row"
        )
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    if numbers.dtype != dtype and (wrong := (numbers < low) | (numbers > high)).any():
        place = np.argwhere(wrong)[0].tolist()
        raise UsageError(
            f"{what} at {place} is {numbers[tuple(place)]}",
            why=f"they are whole numbers from {low} to {high}",
            fix=f"give an array of {dtype.name}",
        )
    return numbers.astype(dtype, copy=False)
