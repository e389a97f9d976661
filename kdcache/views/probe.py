"""Fingerprints of views: a digest that differs when one bit differs, and a coarse grid that says by how much.

Both are exact integer reductions, so every device computes the same numbers.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.views.policy import MIX_NONE, ViewTable

__all__ = ["GRID", "Drift", "diagnose", "fingerprint"]

GRID = 4  # cells a side


@lru_cache(maxsize=16)
def _weights(words: int, device: torch.device) -> Tensor:
    """Odd 64-bit weights, one per word: odd, so that no single changed word can leave the sum as it was."""
    raw = np.random.Philox(key=np.array([0x6B64_6361_6368_6500, 1], np.uint64)).random_raw(words) | np.uint64(1)
    return torch.from_numpy(raw.view(np.int64)).to(device)


def fingerprint(views: Tensor) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Digest uint32 `[B]` and grid means uint8 `[B, 16]` of `views`, uint8 `[B, 3, S, S]`.

    The digest is the sum over the view's bytes, as little-endian int32 words (zero padded), of word times weight modulo
    2^64, its halves folded by xor. The grid is the floor of the mean over the channels and pixels of each of 4 x 4 cells.
    """
    batch, channels, side, _ = views.shape
    flat = views.reshape(batch, -1).contiguous()
    if flat.shape[1] % 4:
        flat = torch.nn.functional.pad(flat, (0, 4 - flat.shape[1] % 4))
    words = flat.view(torch.int32).to(torch.int64)
    total = (words * _weights(words.shape[1], views.device)).sum(dim=1).cpu().numpy().view(np.uint64)
    digest = ((total >> np.uint64(32)) ^ total).astype(np.uint32)

    edges = [side * i // GRID for i in range(GRID + 1)]
    planes = views.sum(dim=1, dtype=torch.int32)
    cells = []
    for top, bottom in itertools.pairwise(edges):
        for left, right in itertools.pairwise(edges):
            area = max((bottom - top) * (right - left), 1)
            cells.append(planes[:, top:bottom, left:right].sum(dim=(1, 2)) // (area * channels))
    grid = torch.stack(cells, dim=1).to(torch.uint8).cpu().numpy()
    return digest, grid


@dataclass(frozen=True)
class Drift:
    """What differs between the stored and the rendered views of one batch."""

    positions: NDArray[np.int64]
    levels: int  # largest difference of a grid mean, grey levels
    blame: str

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.positions[:8])) + (", ..." if len(self.positions) > 8 else "")
        return f"positions {shown} ({len(self.positions)} in all), grid means up to {self.levels} grey levels apart"


def diagnose(
    rows: ViewTable,
    positions: NDArray[np.int64],
    *,
    digest: NDArray[np.uint32],
    grid: NDArray[np.uint8],
    stored_sample: NDArray[np.int64],
    stored_digest: NDArray[np.uint32],
    stored_grid: NDArray[np.uint8],
    canvas_changed: Callable[[], bool],
) -> Drift | None:
    """Compare what was rendered with what was stored, `[B]` rows each; None where all digests agree.

    `canvas_changed` may be slow; it is only asked where something differs.
    """
    moved = rows.sample != stored_sample
    differs = (digest != stored_digest) | moved
    if not differs.any():
        return None
    levels = int(np.abs(grid.astype(int) - stored_grid.astype(int))[differs].max())
    unmixed = rows.mix == MIX_NONE
    if moved.any():
        blame = "order: other samples sit at these positions than when the archive was written"
    elif canvas_changed():
        blame = "canvas: its images are not those of the dump (files replaced or damaged, or decoded by another library)"
    elif unmixed.any() and not (differs & unmixed).any():
        blame = "mixing: only mixed views differ"
    else:
        blame = "rendering: this installation draws the policy differently (compare the library versions in the manifest)"
    return Drift(positions[differs], levels, blame)
