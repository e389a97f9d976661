"""Streams of batches for students and for teachers in training: views in shuffled order, with checked targets.

Batches depend only on (policy, seed, epoch), not on the number of workers or the batch at which training resumed.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from kdcache.archive import AnyArchive
from kdcache.datasets.canvas import Canvas
from kdcache.methods import Method
from kdcache.replay.check import check_views, require_replayable
from kdcache.replay.prefetch import Rendered, Resident, render_batches
from kdcache.replay.subject import Subject, require_batch_size, require_second
from kdcache.system.distributed import Team
from kdcache.system.progress import Progress
from kdcache.system.transfer import to_device
from kdcache.targets import Control, Targets, averaged, row_keys
from kdcache.views.policy import RendererChoice, ViewPolicy

__all__ = [
    "ORDER_VERSION",
    "Batch",
    "CachedTargets",
    "TargetPairs",
    "ViewStream",
    "epoch_positions",
    "epoch_view",
    "fit_control",
]

ORDER_VERSION = 1  # version of the order of views and positions that a seed gives
Fitted = TypeVar("Fitted", Control, Method)
BLOCK = 4096  # positions that are shuffled together; part of that order


@dataclass(frozen=True)
class Batch:
    """`images` uint8 `[B, 3, S, S]`; `sample`, `label_a`, `label_b` int64, `lam` float32 `[B]`; `logits` float32 `[B, C]`.

    For an `Ensemble` that averages probabilities, `logits` are `[B, K, C]`, for `kdcache.targets.averaged`. `second` is
    another view of the same samples in the same order, if the stream has second views.
    """

    images: Tensor
    sample: Tensor
    label_a: Tensor
    label_b: Tensor
    lam: Tensor  # weight of label_a
    view: int
    positions: NDArray[np.int64]
    logits: Tensor | None = None
    keys: Tensor | None = None  # int64 [B, 2], see `kdcache.targets.row_keys`
    second: "Batch | None" = None

    def targets(self, tau: float, control: Control | None = None) -> Targets:
        """The teacher's targets at `tau`, changed by `control` if given, with the labels and a second view's targets."""
        if self.logits is None or self.keys is None:
            raise ValueError("this batch has no logits: it is not of an archive")
        targets = Targets(averaged(self.logits, tau), tau, self.label_a, self.label_b, self.lam)
        targets = control(targets, self.keys) if control else targets
        return targets if self.second is None else replace(targets, second=self.second.targets(tau, control))

    def of_all(self, team: Team) -> "Batch":
        """The batch joined from the parts of all processes. Images and positions stay those of this process."""
        if team.size == 1:
            return self
        parts = {key: value for key, value in vars(self).items() if isinstance(value, Tensor) and key != "images"}
        whole: dict[str, Any] = {key: team.gather(value) for key, value in parts.items()}
        return replace(self, **whole)

    def to(self, device: torch.device) -> "Batch":
        moved: dict[str, Any] = {key: to_device(value, device) for key, value in vars(self).items() if isinstance(value, Tensor)}
        if self.second is not None:
            moved["second"] = self.second.to(device)
        return replace(self, **moved)


def epoch_view(num_views: int, seed: int, epoch: int, ahead: int = 0) -> int:
    """The view of epoch `epoch`, or the one `ahead` places later. Each cycle through the views has its own order."""
    cycle, turn = divmod(epoch, num_views)
    return int(np.argsort(_draws(seed, 0, cycle, num_views), kind="stable")[(turn + ahead) % num_views])


def epoch_positions(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """All positions in the order of epoch `epoch`, int64 `[N]`: blocks are shuffled, and mixing pairs within each block."""
    pairs = (num_samples + 1) // 2
    blocks = -(-num_samples // BLOCK)
    draws = _draws(seed, 1, epoch, pairs + blocks)
    pair_key, block_key = draws[:pairs], draws[pairs:]
    order = np.lexsort((pair_key, block_key[np.arange(pairs) // (BLOCK // 2)]))
    positions = (order[:, None] * 2 + np.arange(2)).reshape(-1)
    return positions[positions < num_samples]


def _draws(seed: int, purpose: int, number: int, count: int) -> NDArray[np.uint64]:
    # Seed, purpose and number are separate words of the key, so that different seeds never coincide.
    key = np.array([seed, (purpose << 32) | number], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, 0x6F72646572], np.uint64)).random_raw(count)


class ViewStream:
    """Batches of fresh views without targets, for training a teacher. Epoch `e` shows view `e`.

    With `part` (i, n), each batch is the i-th of its n equal parts.
    """

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
        progress: Progress | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        require_batch_size(batch_size, len(canvas), part[1])
        self.canvas, self.policy, self.part = canvas, policy, part
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.device = torch.device(device)
        self.renderer = renderer
        self._progress = progress
        self._resident = Resident()

    def __len__(self) -> int:
        """Number of batches per epoch, without a last smaller one."""
        return len(self.canvas) // self.batch_size

    def view(self, epoch: int) -> int:
        """The view of epoch `epoch`."""
        return epoch

    def order_digest(self, epoch: int) -> int:
        """A crc32 of an epoch's positions in their order and batches, on which relations within a batch depend."""
        shown = epoch_positions(len(self.canvas), self.seed, epoch)[: len(self) * self.batch_size]
        return zlib.crc32(shown.astype("<i8").tobytes(), self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch `start` on."""
        return self._batches(self.view(epoch), epoch_positions(len(self.canvas), self.seed, epoch), start)

    def _batches(self, view: int, positions: NDArray[np.int64], start: int) -> Iterator[Batch]:
        number, parts = self.part
        own = self.batch_size // parts
        worker = get_worker_info()  # of a DataLoader, which takes batches from its workers in turn
        mine = range(start, len(self)) if worker is None else range(start + worker.id, len(self), worker.num_workers)
        starts = (batch * self.batch_size + number * own for batch in mine)
        items = [(view, positions[begin : begin + own]) for begin in starts]
        for item in render_batches(
            self.canvas,
            self.policy,
            items,
            workers=self.workers if worker is None else 0,  # which may have no processes of its own
            archive=self.archive,
            renderer=self.renderer,
            device=self.device,
            resident=self._resident,
            progress=self._progress,
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


class _Epochs:
    """Counts the epochs that have begun, in numbers that a DataLoader's workers share without a lock.

    All workers of a pass get the same epoch: the first of them counts on, and writes beside the epoch whose pass it is. The last
    passes are kept, as a worker may begin one when others are in the next. The last epoch that each worker began is kept too: a
    pass that it has been in already, as by a seed that was set again, is a new one.
    """

    _BITS = 31
    _PASSES, _WORKERS = 64, 1024

    def __init__(self) -> None:
        self._state = torch.zeros(self._PASSES + self._WORKERS, dtype=torch.int64)
        with contextlib.suppress(RuntimeError):  # a machine without shared memory, where no DataLoader has workers
            self._state.share_memory_()  # type: ignore[no-untyped-call]
        self._own_passes = 0  # of this process

    def next(self) -> int:
        worker = get_worker_info()
        passes = [divmod(word, 1 << self._BITS) for word in self._state[: self._PASSES].tolist()]  # whose, and epochs with it
        self._own_passes += 1
        whose = known = 0
        if worker is not None:  # seeds are drawn anew for each set of workers, which counts its passes alike
            whose = zlib.crc32(f"{worker.seed - worker.id} {self._own_passes}".encode()) or 1
            last = int(self._state[self._PASSES + worker.id % self._WORKERS])
            known = max((epochs for of, epochs in passes if of == whose and epochs > last), default=0)
        epochs = known or 1 + max(epochs for _, epochs in passes)
        if worker is not None:
            self._state[self._PASSES + worker.id % self._WORKERS] = epochs
        if not known:  # in one number, and the same by whichever worker
            self._state[epochs % self._PASSES] = whose << self._BITS | epochs
        return epochs - 1


class CachedTargets(ViewStream, IterableDataset[Batch]):
    """Batches of an archive or ensemble: its views are rendered again from the canvas, and checked by fingerprint.

    Each `for batch in stream` yields the next epoch's batches; `epoch(e)` yields those of any epoch. In a DataLoader, made with
    `batch_size=None`, workers share the batches, and they come in the same order as without. Raises
    IncompatibleError, with a diagnosis, at the first view that differs from the teacher's. `allow_drift` accepts views of
    a canvas that was decoded differently, if their 4 x 4 grid means are within that many grey levels; `drifted` counts
    them.

    With `second`, an archive over the same samples, batches contain a second, different view of their samples from it. It
    may be the same archive: then the second view is the one half a cycle away.
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
        second: AnyArchive | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        policy = require_replayable(archive, canvas)
        options: dict[str, Any] = {
            "device": device,
            "workers": workers,
            "renderer": renderer,
            "progress": progress,
            "part": part,
        }
        super().__init__(canvas, policy, batch_size=batch_size, seed=seed, **options)
        self.archive = archive
        self.allow_drift = allow_drift
        self._drifted = 0
        self._epochs = _Epochs()
        self._second: CachedTargets | None = None
        if second is not None:
            require_second(Subject.of(archive), Subject.of(second))
            self._second = CachedTargets(second, canvas, batch_size, seed, allow_drift=allow_drift, **options)
            self._second._resident = self._resident

    @property
    def drifted(self) -> int:
        """Number of views accepted as drifted so far."""
        return self._drifted + (self._second.drifted if self._second else 0)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(self._epochs.next())

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch `start` on. A remote view is fetched first, and the next one in the background."""
        view, positions = self.view(epoch), epoch_positions(len(self.canvas), self.seed, epoch)
        self._fetch(view, self.view(epoch + 1))
        batches = self._batches(view, positions, start)
        if self._second is None:
            yield from batches
            return
        other = self.second_view(epoch)
        self._second._fetch(other, self.second_view(epoch + 1))
        theirs = np.argsort(self._second._samples(other))[self._samples(view)[positions]]  # positions of the same samples
        for batch, second in zip(batches, self._second._batches(other, theirs, start), strict=True):
            yield replace(batch, second=second)

    def pairs(
        self, tau: float, normalise: Callable[[Tensor], Tensor] | None = None, control: Control | None = None
    ) -> "TargetPairs":
        """The stream as `(input, target)` pairs: images after `normalise`, and `Targets` at `tau`.

        A `control` is first fitted to the archive.
        """
        fitted = fit_control(control, self.archive, tau) if control else None
        return TargetPairs(self, tau, normalise or _as_they_are, fitted)

    def view(self, epoch: int) -> int:
        return self.archive.views[epoch_view(self.archive.num_views, self.seed, epoch)]

    def second_view(self, epoch: int) -> int:
        """The second archive's view in epoch `epoch`."""
        assert self._second is not None
        views, first = self._second.archive.views, self.view(epoch)
        same = self._second.policy == self.policy  # then equal numbers are equal views
        ahead = len(views) // 2 if same and views == self.archive.views else 0
        turns = (views[epoch_view(len(views), self.seed, epoch, ahead + step)] for step in range(len(views)))
        return next(view for view in turns if not same or view != first)

    def _fetch(self, view: int, following: int) -> None:
        self.archive.fetch(view, self._progress)
        self.archive.prefetch(view, following)

    def _samples(self, view: int) -> NDArray[np.int64]:
        """The sample at each position of a view, int64 `[N]`."""
        return self.policy.parameters(view, len(self.canvas), self.canvas.sizes).sample

    def _batch(self, item: Rendered) -> Batch:
        self._drifted += check_views(item, self.archive, self.canvas, self.allow_drift)
        batch = super()._batch(item)
        return replace(batch, keys=row_keys(self.archive.digest, batch.view, batch.sample))


def _as_they_are(images: Tensor) -> Tensor:
    return images


@dataclass(frozen=True)
class TargetPairs(IterableDataset[tuple[Tensor, Targets]]):
    """`(images, Targets)` pairs of a stream's batches. Each iteration is the next epoch, in a DataLoader too.

    For a stream with second views, images are `[2B, 3, S, S]`: all first views, then all second ones.
    """

    stream: CachedTargets
    tau: float
    normalise: Callable[[Tensor], Tensor]
    control: Control | None

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[tuple[Tensor, Targets]]:
        return self._of(iter(self.stream))  # which counts the epoch now, not at its first batch

    def _of(self, batches: Iterator[Batch]) -> Iterator[tuple[Tensor, Targets]]:
        for batch in batches:
            images = [self.normalise(half.images) for half in (batch, batch.second) if half is not None]
            yield images[0] if len(images) == 1 else torch.cat(images), batch.targets(self.tau, self.control)


def fit_control(control: Fitted, archive: AnyArchive, tau: float) -> Fitted:
    """The control, or the method, fitted to `archive` at `tau`."""
    return control.fit((averaged(torch.from_numpy(block), tau).numpy() for block in archive.spread_logits()), tau)
