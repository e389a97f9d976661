"""Batches of views as they are asked for, and as they are rendered."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdcache.archive import Rows
from kdcache.datasets.canvas import Canvas
from kdcache.views.policy import ViewPolicy, ViewTable

__all__ = ["DrawTables", "Item", "Rendered"]

Item = tuple[int, NDArray[np.int64]]  # a view, and positions in it


@dataclass(frozen=True)
class Rendered:
    """A batch without targets: `images` uint8 `[B, 3, S, S]`, their digests uint32 `[B]`, draws, and the archive's rows.

    `grid` are their grid means, uint8 `[B, 16]`, if they were asked for.
    """

    images: Tensor
    digest: NDArray[np.uint32]
    rows: ViewTable
    stored: Rows | None
    positions: NDArray[np.int64]
    grid: NDArray[np.uint8] | None = None

    def pin_memory(self) -> "Rendered":
        """With images in pinned memory, from where they go to a GPU beside other work. torch's DataLoader calls it."""
        return replace(self, images=self.images.pin_memory())


class DrawTables:
    """Tables of draws by view. The last one is kept, since consecutive batches are of one view."""

    def __init__(self, policy: ViewPolicy, canvas: Canvas) -> None:
        self._policy, self._canvas = policy, canvas
        self._last: ViewTable | None = None

    def __getitem__(self, view: int) -> ViewTable:
        if self._last is None or self._last.view != view:
            self._last = self._policy.parameters(view, len(self._canvas), self._canvas.sizes)
        return self._last
