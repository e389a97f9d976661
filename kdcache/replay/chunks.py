"""Rendering on a GPU: many batches at once, on a stream beside the model's, and slices of them as they are asked for.

A GPU needs as many kernels for one batch of views as for a thousand views, and at that number they are what takes the time.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.archive import AnyArchive
from kdcache.datasets.canvas import Canvas
from kdcache.replay.rendered import DrawTables, Item, Rendered
from kdcache.system.gpu import free_memory, side_stream
from kdcache.system.transfer import to_device, to_host
from kdcache.views.policy import ViewPolicy, ViewTable
from kdcache.views.probe import digest_sums, fold, grid_means, grid_sums
from kdcache.views.rendering import picked, render, render_positions, with_partners

__all__ = ["Resident", "positions_at_once", "render_chunks", "rendering_memory", "seconds_on_gpu"]

_RESIDENT = 0.5  # share of a GPU's free memory that a canvas may take
_WORKING = 0.25  # share of it that is filled while views are rendered
_AT_ONCE = (1024, 4096)  # positions, fewer of large views; less memory gives fewer yet
_LARGE = 1024 * 3 * 224**2  # bytes of views above which the smaller number is rendered at once
_WORK_BYTES = 32  # for each byte of a view, while it is rendered
_READERS = 4  # threads that read a canvas for which a GPU has no room


def positions_at_once(size: int, canvas_size: int, free: int) -> int:
    """Number of views of `size` pixels that are rendered at once with that many bytes of memory `free`."""
    least, most = _AT_ONCE
    wanted = min(max(least, _LARGE // (3 * size**2)), most)
    return max(1, min(wanted, int(_WORKING * free) // _bytes_each(size, canvas_size)))


def seconds_on_gpu(policy: ViewPolicy, canvas_size: int, device: torch.device) -> float:
    """Seconds for a view when as many as usual are rendered at once, from a canvas on the GPU; fewer where memory is too little.

    Raises torch.OutOfMemoryError if it does not suffice for one.
    """
    count = positions_at_once(policy.size, canvas_size, free_memory(device))
    while True:
        try:
            return _seconds_of(count, policy, canvas_size, device) / count
        except torch.OutOfMemoryError:
            if count == 1:
                raise
        count //= 2
        torch.cuda.empty_cache()


def _seconds_of(count: int, policy: ViewPolicy, canvas_size: int, device: torch.device) -> float:
    table = policy.parameters(0, count, np.ones((count, 2), int))
    pixels = torch.zeros(1, 3, canvas_size, canvas_size, dtype=torch.uint8, device=device).expand(count, -1, -1, -1)
    seconds = []
    for _ in range(3):  # the first turn allocates memory
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        digest_sums(render_positions(pixels, table, np.arange(count), "device", device))
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def rendering_memory(samples: int, canvas_size: int, size: int, device: torch.device) -> int:
    """Bytes of a GPU that a canvas and rendering views of `size` pixels from it will take; 0 of other devices."""
    if device.type != "cuda":
        return 0
    free, canvas = free_memory(device), samples * 3 * canvas_size**2
    kept = canvas if canvas < _RESIDENT * free else 0
    return kept + positions_at_once(size, canvas_size, free - kept) * _bytes_each(size, canvas_size)


def _bytes_each(size: int, canvas_size: int) -> int:
    return 3 * (canvas_size**2 + _WORK_BYTES * size**2)


class Resident:
    """What a GPU keeps between calls: the pixels of a canvas, if they take at most half of its free memory, and how many
    positions it can render at once."""

    def __init__(self) -> None:
        self.canvas: Canvas | None = None  # the last one, whether it had room or not
        self._pixels: Tensor | None = None
        self.limit: int | None = None  # positions, where more were too many
        self._at_once = 0

    def began(self, positions: int) -> None:
        """So many are rendered at once now."""
        self._at_once = positions

    def halve(self) -> None:
        """Render half as many at once from now on, also in rendering that has begun: whoever uses the views lacks memory."""
        if self._at_once:
            self.limit = self._at_once = max(1, self._at_once // 2)

    @staticmethod
    def has_room(nbytes: int, device: torch.device) -> bool:
        """Whether a canvas of so many bytes would be kept on a GPU now."""
        return nbytes < _RESIDENT * free_memory(device)

    def pixels(self, canvas: Canvas, device: torch.device) -> Tensor | None:
        """The pixels on `device`, or None where they have no room there."""
        if self.canvas is not canvas:  # decided only once, as later the pixels themselves use the memory
            self.canvas, self._pixels = canvas, None
            if self.has_room(canvas.pixels.nbytes, device):
                with warnings.catch_warnings(action="ignore"):  # torch warns of the read-only canvas, which is only read here
                    self._pixels = torch.from_numpy(canvas.pixels).to(device)
        return self._pixels


def render_chunks(
    canvas: Canvas,
    policy: ViewPolicy,
    items: Iterator[Item],
    *,
    archive: AnyArchive | None,
    device: torch.device,
    probe_version: int,
    grid: bool,
    resident: Resident,
) -> Iterator[Rendered]:
    """The batches of `items`, each a slice of a chunk that was rendered at once on a stream beside the current one.

    A chunk is of one view. At most two are alive, unless a batch is a chunk of its own: that which batches come from, and the
    next, which is begun with the second batch. Items are read as far as chunks are begun, and one further. Where memory does
    not suffice, chunks are halved, down to one batch. Raises torch.OutOfMemoryError if that is too much.
    """
    with ExitStack() as stack:
        rendering = _Rendering(canvas, policy, items, device, probe_version, grid, resident, stack)
        chunk = rendering.next()
        while chunk is not None:
            following, last = None, len(chunk.batches) - 1
            for number, batch in enumerate(chunk.rendered(archive, device)):
                if number == min(1, last):  # not sooner, as whoever asked for batches may have the last chunk's until now
                    following = rendering.next()
                yield batch
            chunk = following


class _Chunks:
    """Consecutive items of one view, of at most `limit` positions together or one item alone."""

    def __init__(self, items: Iterator[Item], limit: int) -> None:
        self._items, self.limit = items, limit
        self._held: deque[Item] = deque()  # read, but not taken

    def take(self) -> list[Item]:
        """The next chunk; empty at the end."""
        chunk: list[Item] = []
        count = 0
        while self._held or self._read():
            view, positions = self._held[0]
            if chunk and (view != chunk[0][0] or count + len(positions) > self.limit):
                break
            chunk.append(self._held.popleft())
            count += len(positions)
            if count + len(positions) > self.limit:  # the next item is likely as large, and can wait
                break
        return chunk

    def give_back(self, chunk: list[Item]) -> None:
        """The last chunk that was taken is to be taken again."""
        self._held.extendleft(reversed(chunk))

    def _read(self) -> bool:
        self._held.extend(item for item in [next(self._items, None)] if item is not None)
        return bool(self._held)


@dataclass(frozen=True)
class _Plan:
    """A chunk's items, the rows to draw for it, and its part of the canvas: already asked for where it must be read."""

    items: list[Item]
    positions: NDArray[np.int64]
    drawn: NDArray[np.int64]  # positions that are drawn for them
    table: ViewTable
    rows: ViewTable  # of the drawn positions
    pixels: Callable[[], Tensor]


@dataclass(frozen=True)
class _Chunk:
    """A rendered chunk. What is of the host is there when `done` has happened."""

    images: Tensor
    sums: Tensor
    cells: Tensor | None
    rows: ViewTable
    batches: list[NDArray[np.int64]]
    done: torch.cuda.Event

    def rendered(self, archive: AnyArchive | None, device: torch.device) -> Iterator[Rendered]:
        """Its batches, on the stream that is current when one is asked for."""
        self.done.synchronize()  # digests need it; usually no wait, as rendering is ahead
        digest = fold(self.sums)
        grid = None if self.cells is None else grid_means(self.cells, self.images.shape[-1])
        stop = 0
        for positions in self.batches:
            part = slice(stop, stop := stop + len(positions))
            images = self.images[part]
            current = torch.cuda.current_stream(device)
            current.wait_event(self.done)
            images.record_stream(current)  # its memory, which is the chunk's, is not written again before that stream's work
            stored = archive.take(self.rows.view, positions).load() if archive else None
            yield Rendered(images, digest[part], self.rows[part], stored, positions, None if grid is None else grid[part])


class _Rendering:
    """Begins chunks, one at a time."""

    def __init__(
        self,
        canvas: Canvas,
        policy: ViewPolicy,
        items: Iterator[Item],
        device: torch.device,
        probe_version: int,
        grid: bool,
        resident: Resident,
        stack: ExitStack,
    ) -> None:
        self._tables, self._device, self._probe_version, self._grid = DrawTables(policy, canvas), device, probe_version, grid
        self._resident, self._pixels = resident, resident.pixels(canvas, device)
        self._reader = None if self._pixels is not None else _Reader(canvas.pixels, device, stack)
        self._chunks = _Chunks(items, positions_at_once(policy.size, canvas.size, free_memory(device)))
        self._planned: _Plan | None = None  # whose pixels are read while the last chunk is rendered and used
        self._stream = side_stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def next(self) -> _Chunk | None:
        """The next chunk, whose rendering has begun; None at the end."""
        while plan := self._planned or self._plan():
            self._planned = None
            if len(plan.positions) > self._limit() and len(plan.items) > 1:  # planned before that was too much
                self._chunks.give_back(plan.items)
                continue
            try:
                chunk = self._begun(plan)
            except torch.OutOfMemoryError:
                if len(plan.items) == 1:
                    raise
                self._chunks.give_back(plan.items)
                self._chunks.limit = self._resident.limit = len(plan.positions) // 2
            else:
                self._resident.began(len(plan.positions))
                if self._reader is not None:
                    self._planned = self._plan()
                return chunk
            del plan
            torch.cuda.empty_cache()
        return None

    def _limit(self) -> int:
        self._chunks.limit = min(self._chunks.limit, self._resident.limit or self._chunks.limit)
        return self._chunks.limit

    def _plan(self) -> _Plan | None:
        self._limit()
        items = self._chunks.take()
        if not items:
            return None
        table, positions = self._tables[items[0][0]], np.concatenate([positions for _, positions in items])
        drawn = with_partners(table, positions)
        rows = table[drawn]
        return _Plan(items, positions, drawn, table, rows, self._source(rows.sample))

    def _source(self, samples: NDArray[np.int64]) -> Callable[[], Tensor]:
        pixels = self._pixels
        if pixels is None:
            assert self._reader is not None
            return self._reader.read(samples)
        return lambda: pixels.index_select(0, to_device(samples, self._device))

    def _begun(self, plan: _Plan) -> _Chunk:
        with torch.cuda.stream(self._stream):
            images = picked(render(plan.pixels(), plan.rows), plan.drawn, plan.positions)
            sums = to_host(digest_sums(images, self._probe_version))
            cells = to_host(grid_sums(images)) if self._grid else None
            done = self._stream.record_event()
        return _Chunk(images, sums, cells, plan.table[plan.positions], [positions for _, positions in plan.items], done)


class _Reader:
    """Rows of a canvas in a memory map, read into pinned memory by threads and copied from there to a GPU."""

    def __init__(self, pixels: NDArray[np.uint8], device: torch.device, stack: ExitStack) -> None:
        self._pixels, self._device = pixels, device
        self._outer = stack.enter_context(ThreadPoolExecutor(1))
        self._inner = stack.enter_context(ThreadPoolExecutor(_READERS))

    def read(self, samples: NDArray[np.int64]) -> Callable[[], Tensor]:
        """Begin to read; what is returned waits for it, and gives the rows on the device."""
        whole = self._outer.submit(self._whole, samples)
        return lambda: to_device(whole.result(), self._device)

    def _whole(self, samples: NDArray[np.int64]) -> Tensor:
        # Pinned memory takes long to make, which is why it is made here. torch keeps it for the next of that size.
        rows = torch.empty(len(samples), *self._pixels.shape[1:], dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        into = rows.numpy()
        parts = np.array_split(np.arange(len(samples)), _READERS)
        reads: list[Future[None]] = [self._inner.submit(self._part, samples, into, part) for part in parts if len(part)]
        for read in reads:
            read.result()
        return rows

    def _part(self, samples: NDArray[np.int64], into: NDArray[np.uint8], part: NDArray[np.int64]) -> None:
        own = slice(part[0], part[-1] + 1)
        np.take(self._pixels, samples[own], axis=0, out=into[own], mode="clip")  # other modes copy once more
