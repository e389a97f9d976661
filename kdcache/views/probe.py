"""Fingerprints of views: a digest that changes with any bit, and a coarse grid that shows the size of a change.

Both are exact integer reductions, so every device computes the same numbers. The digest is computed for every training
batch, the grid when an archive is written and when digests differ.
"""

import itertools
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.views.policy import PROBE_VERSION

__all__ = ["GRID", "digest_sums", "digests", "fingerprint", "fold", "grid_means", "grid_sums", "grids"]

GRID = 4  # cells a side


@lru_cache(maxsize=16)
def _weights(words: int, device: torch.device) -> Tensor:
    """One odd 64-bit weight per word. Odd weights make sure that a change of one word changes the sum."""
    raw = np.random.Philox(key=np.array([0x6B64_6361_6368_6500, 1], np.uint64)).random_raw(words) | np.uint64(1)
    return torch.from_numpy(raw.view(np.int64)).to(device)  # waited for, so that any stream may use the kept weights later


def fingerprint(views: Tensor, version: int = PROBE_VERSION) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Digest uint32 `[B]` and grid means uint8 `[B, 16]` of `views`, uint8 `[B, 3, S, S]`."""
    return digests(views, version), grids(views)


def digests(views: Tensor, version: int = PROBE_VERSION) -> NDArray[np.uint32]:
    """Digest uint32 `[B]` of `views`, uint8 `[B, 3, S, S]`.

    The digest is the sum of word times weight modulo 2^64, over the view's bytes as little-endian words (zero padded),
    with its halves folded by xor. Words have 32 bits in version 1 and 64 bits in version 2, which is three times as fast.
    """
    return fold(digest_sums(views, version))


def digest_sums(views: Tensor, version: int = PROBE_VERSION) -> Tensor:
    """The sums of `digests`, int64 `[B]`, on the device of `views`."""
    word = torch.int32 if version == 1 else torch.int64
    flat = views.reshape(len(views), -1).contiguous()
    if missing := -flat.shape[1] % word.itemsize:
        flat = torch.nn.functional.pad(flat, (0, missing))
    elif flat.storage_offset() % word.itemsize:
        flat = flat.clone()
    words = flat.view(word)
    weights = _weights(words.shape[1], views.device)
    if _on_host(words):  # several times as fast as torch, which copies all words
        return torch.from_numpy(np.einsum("bw,w->b", words.numpy(), weights.numpy()))
    return (words.long() * weights).sum(dim=1)


def _on_host(words: Tensor) -> bool:
    return words.device.type == "cpu"


def fold(sums: Tensor) -> NDArray[np.uint32]:
    """The halves of 64-bit sums combined by xor: uint32 `[B]`."""
    total = sums.cpu().numpy().view(np.uint64)
    folded: NDArray[np.uint32] = ((total >> np.uint64(32)) ^ total).astype(np.uint32)
    return folded


def grids(views: Tensor) -> NDArray[np.uint8]:
    """Means of the 4 x 4 grid cells of `views`, uint8 `[B, 3, S, S]`, over channels and pixels, floored: uint8 `[B, 16]`."""
    return grid_means(grid_sums(views), views.shape[-1])


def grid_sums(views: Tensor) -> Tensor:
    """The sums of `grids` over each cell, int64 `[B, 4, 4]`, on the device of `views`."""
    edges = _edges(views.shape[-1])
    columns = torch.stack([views[..., a:b].sum(dim=3, dtype=torch.int32) for a, b in itertools.pairwise(edges)], dim=3)
    return torch.stack([columns[:, :, a:b].sum(dim=(1, 2)) for a, b in itertools.pairwise(edges)], dim=1)


def grid_means(sums: Tensor, side: int) -> NDArray[np.uint8]:
    """Floored means uint8 `[B, 16]` of the `sums [B, 4, 4]` over the cells of views with that `side`."""
    spans = np.diff(_edges(side))
    areas = np.maximum(spans[:, None] * spans[None, :], 1) * 3
    means: NDArray[np.uint8] = (sums.cpu().numpy() // areas).astype(np.uint8)
    return means.reshape(len(sums), GRID * GRID)


def _edges(side: int) -> list[int]:
    return [side * i // GRID for i in range(GRID + 1)]
