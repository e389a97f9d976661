"""Sizes of photographs for tests that draw views without a canvas."""

import numpy as np
from numpy.typing import NDArray


def squares(count: int) -> NDArray[np.int64]:
    """The sizes of `count` square photographs, whose views are the same in all versions of policies."""
    return np.ones((count, 2), np.int64)
