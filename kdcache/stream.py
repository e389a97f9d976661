"""The stream of batches that students (and teachers in training) see: views in a shuffled order, with checked targets.

What a batch holds depends on (policy, seed, epoch) alone: neither on the number of workers nor on where training started.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.archive import AnyArchive
from kdcache.canvas import Canvas
from kdcache.errors import UsageError
from kdcache.prefetch import Rendered, RendererChoice, Resident, render_batches
from kdcache.progress import Progress
from kdcache.replay import check_views, require_replayable
from kdcache.views.policy import ViewPolicy

__all__ = ["Batch", "CachedTargets", "ViewStream", "epoch_positions", "epoch_view"]

BLOCK = 4096  # positions that are shuffled together; fixed, since it is part of what a seed means


@dataclass(frozen=True)
class Batch:
    """`images` uint8 `[B, 3, S, S]`; `sample`, `label_a`, `label_b` int64, `lam` float32 `[B]`; `logits` float32 `[B, C]`.

    Of an `Ensemble` that averages probabilities, `logits` are `[B, K, C]`: `kdcache.targets.averaged` is what to make of them.
    """

    images: Tensor
    sample: Tensor
    label_a: Tensor
    label_b: Tensor
    lam: Tensor  # share of label_a
    view: int
    positions: NDArray[np.int64]
    logits: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        moved: dict[str, Any] = {
            key: value.to(device, non_blocking=True) for key, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def epoch_view(num_views: int, seed: int, epoch: int) -> int:
    """The view that epoch `epoch` shows: each cycle through the views has its own order."""
    cycle, turn = divmod(epoch, num_views)
    return int(np.argsort(_draws(seed, 0, cycle, num_views), kind="stable")[turn])


def epoch_positions(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """All positions in the order of epoch `epoch`: blocks are shuffled, and mixing pairs within each block."""
    pairs = (num_samples + 1) // 2
    blocks = -(-num_samples // BLOCK)
    draws = _draws(seed, 1, epoch, pairs + blocks)
    pair_key, block_key = draws[:pairs], draws[pairs:]
    order = np.lexsort((pair_key, block_key[np.arange(pairs) // (BLOCK // 2)]))
    positions = (order[:, None] * 2 + np.arange(2)).reshape(-1)
    return positions[positions < num_samples]


def _draws(seed: int, purpose: int, number: int, count: int) -> NDArray[np.uint64]:
    # One word each for seed, purpose and number: seeds are never added to each other.
    key = np.array([seed, (purpose << 32) | number], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, 0x6F72646572], np.uint64)).random_raw(count)


class ViewStream:
    """Batches of fresh views without targets, for training a teacher. Epoch `e` shows view `e`."""

    archive: AnyArchive | None = None

    def __init__(
        self,
        canvas: Canvas,
        policy: ViewPolicy,
        *,
        batch_size: int,
        seed: int,
        device: str = "cpu",
        workers: int = 0,
        renderer: RendererChoice = "auto",
    ) -> None:
        _check_batch_size(batch_size, len(canvas))
        self.canvas, self.policy = canvas, policy
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.device = torch.device(device)
        self.renderer = renderer
        self._resident = Resident()

    def __len__(self) -> int:
        """Batches of an epoch; the last, smaller one is left out."""
        return len(self.canvas) // self.batch_size

    def view(self, epoch: int) -> int:
        """The view that epoch `epoch` shows."""
        return epoch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch `start` on."""
        view, positions = self.view(epoch), epoch_positions(len(self.canvas), self.seed, epoch)
        items = [(view, positions[i * self.batch_size : (i + 1) * self.batch_size]) for i in range(start, len(self))]
        for item in render_batches(
            self.canvas,
            self.policy,
            items,
            workers=self.workers,
            archive=self.archive,
            renderer=self.renderer,
            device=self.device,
            resident=self._resident,
        ):
            yield self._batch(item).to(self.device)

    def _batch(self, item: Rendered) -> Batch:
        rows = item.rows
        partner = np.where(rows.partner >= 0, rows.partner, rows.sample)
        return Batch(
            images=item.images,
            sample=torch.from_numpy(rows.sample),
            label_a=torch.from_numpy(self.canvas.labels[rows.sample]),
            label_b=torch.from_numpy(self.canvas.labels[partner]),
            lam=torch.from_numpy(rows.lam.astype(np.float32)),
            view=rows.view,
            positions=item.positions,
            logits=None if item.stored is None else torch.from_numpy(item.stored.logits),
        )


class CachedTargets(ViewStream):
    """Batches of an archive, or an ensemble: its views rendered again from the canvas, each checked against its fingerprint.

    Iterating yields epoch after epoch's batches (`for batch in stream` is one epoch; `epoch(e)` is any). Raises
    IncompatibleError at the first view that is not the one the teacher saw, with a diagnosis. `allow_drift` accepts
    views of a canvas that was decoded otherwise, if their 4 x 4 grid means are within that many grey levels; `drifted`
    counts them.
    """

    archive: AnyArchive

    def __init__(
        self,
        archive: AnyArchive,
        canvas: Canvas,
        batch_size: int = 64,
        seed: int = 0,
        device: str = "cpu",
        *,
        workers: int = 0,
        renderer: RendererChoice = "auto",
        allow_drift: int = 0,
        progress: Progress | None = None,
    ) -> None:
        policy = require_replayable(archive, canvas)
        super().__init__(canvas, policy, batch_size=batch_size, seed=seed, device=device, workers=workers, renderer=renderer)
        self.archive = archive
        self.allow_drift = allow_drift
        self._progress = progress
        self.drifted = 0
        self._next_epoch = 0

    def __iter__(self) -> Iterator[Batch]:
        epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        yield from self.epoch(epoch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch `start` on. A remote archive's view is fetched first, the next one meanwhile."""
        view = self.view(epoch)
        self.archive.fetch(view, self._progress)
        self.archive.prefetch(view, self.view(epoch + 1))
        yield from super().epoch(epoch, start)

    def view(self, epoch: int) -> int:
        return self.archive.views[epoch_view(self.archive.num_views, self.seed, epoch)]

    def _batch(self, item: Rendered) -> Batch:
        self.drifted += check_views(item, self.archive, self.canvas, self.allow_drift)
        return super()._batch(item)


def _check_batch_size(batch_size: int, num_samples: int) -> None:
    if not 1 <= batch_size <= num_samples:
        raise UsageError(
            f"batch size {batch_size} with {num_samples} samples",
            why="an epoch needs at least one full batch",
            fix=f"use --batch-size {max(1, min(64, num_samples))}",
        )
