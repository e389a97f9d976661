"""Logits to stored fields: codes, argmax and entropies, in blocks that stay in a core's cache, on all cores."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from kdcache.codecs import Codec, UnstorableError
from kdcache.stats import entropies_and_argmax

__all__ = ["encode_rows"]

BLOCK = 1 << 18  # logits: each block costs some fresh memory, and the second-level cache holds no more


def encode_rows(codec: Codec, logits: NDArray[np.float32]) -> dict[str, NDArray]:
    """What the codec stores of raw `logits [n, C]`, and `argmax`, `entropy` and `entropy_rest` `[n]` of them before that.

    Raises UnstorableError, with the row as counted here.
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
        for _ in pool.map(encode, starts):  # the first error in the order of the rows
            pass
    return fields
