"""A teacher's pass over all views of a canvas, shard by shard, into an archive."""

import collections
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.archive import ArchiveWriter
from kdcache.datasets.canvas import Canvas
from kdcache.errors import UsageError
from kdcache.replay.prefetch import Rendered, Resident, render_batches
from kdcache.system.interrupts import Stopped, stopped_between_steps
from kdcache.system.progress import Progress, Silent
from kdcache.system.transfer import Landing
from kdcache.teachers.forward import Forward, batches
from kdcache.training.devices import enough_memory
from kdcache.views.policy import RendererChoice

__all__ = ["write_shards"]


def write_shards(
    writer: ArchiveWriter,
    forward: Forward,
    canvas: Canvas,
    *,
    batch_size: int,
    start_view: int = 0,
    share: tuple[int, int] | None = None,
    undivided: bool = False,
    workers: int = 0,
    renderer: RendererChoice = "auto",
    progress: Progress | None = None,
) -> None:
    """Write the missing shards that no other process has claimed, from `start_view` on and then from the first view.

    A shard is claimed when rendering, which runs ahead across shards, reaches it. No batch crosses a shard's border. With
    `share` (i, n), only shards whose running number modulo n is i are written; other processes leave these alone. If that is
    `undivided`, not agreed upon but the only way where there are no locks, a process that writes them as well is a UsageError.
    RetryError where there is too little memory for a batch.
    """
    policy = writer.plan.policy
    assert policy is not None
    number, parts = share or (0, 1)
    mine = set(itertools.islice(writer.shards(), number, None, parts))
    progress = progress or Silent()
    told = _Told(writer, mine, progress)
    resident = Resident()
    fix = "end what else uses that memory, and repeat the command: written shards are kept"
    if batch_size > 1:
        fix += f". The archive's batch size is fixed: -b {batch_size // 2} makes another one (with --output, name another folder)"
    with enough_memory(f"no memory for batches of {batch_size} views on {forward.device}", fix=fix):
        while missing := mine.intersection(writer.missing()):  # repeat for shards that another process left unwritten
            order = sorted(missing, key=lambda shard: (shard[0] < start_view, shard))
            with stopped_between_steps() as check, contextlib.ExitStack() as claims, _Writing(writer, told, undivided) as writing:
                claimed = _Claimed(writer, order, batch_size, claims, owned=share is not None, undivided=undivided)
                rows = _ShardRows()
                rendered = render_batches(
                    canvas,
                    policy,
                    claimed,
                    workers=workers,
                    renderer=renderer,
                    device=forward.device,
                    probe_version=writer.plan.probe_version,
                    grid=True,
                    resident=resident,
                    progress=progress,
                )
                for batch in _answered(rendered, forward, resident, check):
                    view, block, claim = claimed.shards[0]
                    size = len(writer.positions(block))
                    rows.add(batch, size)
                    if len(rows) == size:
                        claimed.shards.popleft()
                        writing.put(view, block, rows.columns, claim)
                        rows = _ShardRows()
                    writing.check()
            if not claimed.any:
                break


# The columns of a batch's rows: logits float32 [B, C], sample numbers [B], digests uint32 [B], grid means uint8 [B, 16].
Columns = tuple[NDArray, ...]


def _answered(rendered: Iterable[Rendered], forward: Forward, resident: Resident, check: Callable[[], None]) -> Iterator[Columns]:
    """The columns of each batch, while the device computes the next one. What it has begun when it is stopped is given too."""
    begun: _Begun | None = None
    try:
        for item in rendered:
            check()
            before, begun = begun, _begin(item, forward, resident)
            if before is not None:
                yield before.columns()
            before = None  # with it goes the last use of the chunk before this one, which the next needs room of
    except Stopped:
        if begun is not None:
            yield begun.columns()
        raise
    if begun is not None:
        yield begun.columns()


def _begin(item: Rendered, forward: Forward, resident: Resident) -> "_Begun":
    """The batch, begun. Where memory does not suffice, fewer views are rendered ahead from now on, and it is begun once more."""
    try:
        return _Begun(item, forward)
    except torch.OutOfMemoryError:
        resident.halve()
    torch.cuda.empty_cache()  # here, where nothing holds what failed any more
    return _Begun(item, forward)


class _Begun:
    """A batch that the device computes. Its images stay until all of its logits are known to be finite."""

    def __init__(self, item: Rendered, forward: Forward) -> None:
        self._item, self._forward = item, forward
        logits = forward.launch(item.images)
        self._landing = Landing(logits, forward.finite(logits))

    def columns(self) -> Columns:
        """Wait for the results. Where some are not finite, repeat the batch in float32."""
        item = self._item
        assert item.grid is not None
        logits, finite = self._landing.wait()
        if not finite:
            logits = self._forward.in_float32(item.images).cpu()
        return logits.numpy(), item.rows.sample, item.digest, item.grid


class _ShardRows:
    """The rows of one shard, collected batch by batch. Each row is copied once; pixels are not kept."""

    def __init__(self) -> None:
        self.columns: Columns = ()
        self._filled = 0

    def __len__(self) -> int:
        """Number of rows so far."""
        return self._filled

    def add(self, batch: Columns, size: int) -> None:
        """Add the next batch of a shard of `size` rows."""
        if not self.columns:
            self.columns = tuple(np.empty((size, *part.shape[1:]), part.dtype) for part in batch)
        rows = slice(self._filled, self._filled + len(batch[0]))
        for column, part in zip(self.columns, batch, strict=True):
            column[rows] = part
        self._filled = rows.stop


class _Claimed:
    """Batches (view, positions) of all shards that can be claimed. A shard is claimed at its first batch."""

    def __init__(
        self,
        writer: ArchiveWriter,
        order: Sequence[tuple[int, int]],
        batch_size: int,
        claims: contextlib.ExitStack,
        *,
        owned: bool,
        undivided: bool,
    ) -> None:
        self._undivided = undivided
        self._writer, self._order, self._batch_size, self._claims, self._owned = writer, order, batch_size, claims, owned
        self.shards: collections.deque[tuple[int, int, contextlib.ExitStack]] = collections.deque()  # claimed, not complete
        self.any = False

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        for view, block in self._order:
            claim = self._claims.enter_context(contextlib.ExitStack())
            if claim.enter_context(self._writer.claim(view, block, owned=self._owned)):
                self.any = True
                self.shards.append((view, block, claim))
                for rows in batches(self._writer.positions(block), self._batch_size):
                    yield view, rows
            elif self._undivided:
                raise _beside_another(self._writer)
            else:
                claim.close()


def _beside_another(writer: ArchiveWriter) -> UsageError:
    return UsageError(
        f"another process writes {writer.store.root}, too",
        why="its file system has no locks, so each of them has to be told which shards it writes",
        fix="stop them, and start each with its part, of two for example: --shard 0/2 and --shard 1/2",
    )


class _Told:
    """Tells how many rows of some shards are written, and how fast."""

    def __init__(self, writer: ArchiveWriter, shards: set[tuple[int, int]], progress: Progress) -> None:
        self._writer, self._progress = writer, progress
        rows = {shard: len(writer.positions(shard[1])) for shard in shards}
        self._total = sum(rows.values())
        self._at_start = self._done = self._total - sum(rows[shard] for shard in shards.intersection(writer.missing()))
        self._started = time.monotonic()

    def written(self, block: int) -> None:
        self._done += len(self._writer.positions(block))
        speed = (self._done - self._at_start) / max(time.monotonic() - self._started, 1e-9)
        self._progress.update("dump", self._done, self._total, f"{speed:.0f} views/s")


class _Writing:
    """Encodes and writes complete shards in a thread of its own, one at a time: so at most two are in memory.

    What fails there is raised here, by the next call or at the end. A shard that is being written when work ends is finished.
    """

    def __init__(self, writer: ArchiveWriter, told: _Told, undivided: bool) -> None:
        self._writer, self._told, self._undivided = writer, told, undivided
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kdcache-dump")
        self._current: tuple[int, Future[None]] | None = None

    def __enter__(self) -> "_Writing":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._wait()
        finally:
            self._thread.shutdown(wait=False)

    def put(self, view: int, block: int, columns: Columns, claim: contextlib.ExitStack) -> None:
        """Write a shard, and give its claim up once it is there; first wait for the shard before it."""
        self._wait()
        self._current = block, self._thread.submit(self._write, view, block, columns, claim)

    def check(self) -> None:
        """Take note of a shard that is written meanwhile. Raises what its writing raised."""
        if self._current is not None and self._current[1].done():
            self._wait()

    def _wait(self) -> None:
        if self._current is not None:
            block, written = self._current
            self._current = None
            written.result()
            self._told.written(block)

    def _write(self, view: int, block: int, columns: Columns, claim: contextlib.ExitStack) -> None:
        if not self._writer.finished(view, block):  # another process may finish it where locks do not exclude that
            self._writer.write(view, block, *columns)
        elif self._undivided:
            raise _beside_another(self._writer)
        claim.close()
