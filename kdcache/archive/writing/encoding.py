"""Encoding of logits to stored fields: codes, argmax and entropies, in cache-sized blocks on all cores."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from kdcache.codecs import Codec, UnstorableError
from kdcache.stats import entropies_and_argmax

__all__ = ["encode_rows"]

BLOCK = 1 << 18  # logits; they fill a core's second-level cache, and fewer would cost more allocations


def encode_rows(codec: Codec, logits: NDArray[np.float32]) -> dict[str, NDArray]:
    """Encode raw `logits`, float32 `[n, C]`; also `argmax`, `entropy` and `entropy_rest` `[n]` of the raw logits.

    Raises UnstorableError with the row's number in `logits`.
    """
    rows = max(1, BLOCK // logits.shape[1])
    starts = range(0, len(logits), rows)
    fields: dict[str, NDArray] = {name: np.empty(len(logits), np.float32) for name in ("entropy", "entropy_rest")}
    fields["argmax"] = np.empty(len(logits), np.int64)
    for name, kind in codec.encode(np.zeros((1, logits.shape[1]), np.float32)).items():
        fields[name] = np.empty((len(logits), *kind.shape[1:]), kind.dtype)

    def encode(start: int) -> None:
        block = slice(start, start + rows)
        try:
            stored = codec.encode(logits[block])
        except UnstorableError as error:
            raise UnstorableError(error.value, start + error.row, error.column, why=error.why, fix=error.fix) from None
        entropy, entropy_rest, argmax = entropies_and_argmax(logits[block])
        for name, values in {**stored, "entropy": entropy, "entropy_rest": entropy_rest, "argmax": argmax}.items():
            fields[name][block] = values

    with ThreadPoolExecutor(min(len(starts), os.cpu_count() or 1)) as pool:
        for _ in pool.map(encode, starts):  # raises the first error in row order
            pass
    return fields
