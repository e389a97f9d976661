"""Rendering of batches ahead of the model: in worker processes on the CPU, or on a side stream of the GPU."""

import itertools
import signal
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdcache.archive import AnyArchive, Rows
from kdcache.datasets.canvas import Canvas
from kdcache.errors import KdcacheError, UsageError, unknown_name
from kdcache.views.policy import PROBE_VERSION, RendererChoice, ViewPolicy, ViewTable
from kdcache.views.probe import digest_sums, digests, fold
from kdcache.views.rendering import Renderer, render_positions
from kdcache.views.resample import can_resize

__all__ = ["Item", "Rendered", "choose_renderer", "render_batches"]

Item = tuple[int, NDArray[np.int64]]  # a view, and positions in it

_AHEAD = 2  # batches that a GPU renders in advance
_RESIDENT = 0.5  # share of a GPU's free memory that a canvas may take


@dataclass(frozen=True)
class Rendered:
    """A batch without targets: `images` uint8 `[B, 3, S, S]`, their digests uint32 `[B]`, draws, and the archive's rows."""

    images: Tensor
    digest: NDArray[np.uint32]
    rows: ViewTable
    stored: Rows | None
    positions: NDArray[np.int64]


def render_batches(
    canvas: Canvas,
    policy: ViewPolicy,
    items: Iterable[Item],
    *,
    workers: int = 0,
    archive: AnyArchive | None = None,
    renderer: RendererChoice = "auto",
    device: torch.device | str = "cpu",
    probe_version: int = PROBE_VERSION,
    resident: "Resident | None" = None,
) -> Iterator[Rendered]:
    """Render batches of (view, positions) in order, with the archive's rows if one is given.

    On a CPU, `workers` processes render ahead, and the images stay in host memory. On a GPU, the device renderer renders
    ahead, from a canvas that `resident` keeps on it between calls. This process reads `items` only as far as rendering has
    got. Digests have the archive's probe version, or without an archive `probe_version`.
    """
    device, items = torch.device(device), iter(items)
    if device.type != "cuda":  # other accelerators lack float64 or are untested, so their views are rendered on the CPU
        device = torch.device("cpu")
    if archive:
        probe_version = archive.manifest.probe_version
    first = next(items, None)
    if first is None:
        return
    items = itertools.chain([first], items)
    chosen = choose_renderer(renderer, policy, canvas.size, len(first[1]), device, workers)
    if device.type == "cuda" and chosen == "device":
        yield from _on_gpu(canvas, policy, items, archive, device, probe_version, resident or Resident())
        return
    renderings = _Renderings(canvas, policy, archive, chosen, probe_version)
    loader = DataLoader(renderings, batch_size=None, num_workers=workers, sampler=items, worker_init_fn=_outlive_signals)
    for item in loader:
        if isinstance(item, KdcacheError):
            raise item
        yield item


def _outlive_signals(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a worker: they often go to the whole job, and the main process ends its workers itself."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _DrawTables:
    """Tables of draws by view. The last one is kept, since consecutive batches are of one view."""

    def __init__(self, policy: ViewPolicy, canvas: Canvas) -> None:
        self._policy, self._canvas = policy, canvas
        self._last: ViewTable | None = None

    def __getitem__(self, view: int) -> ViewTable:
        if self._last is None or self._last.view != view:
            self._last = self._policy.parameters(view, len(self._canvas), self._canvas.sizes)
        return self._last


class _Renderings(Dataset[Rendered | KdcacheError]):
    """Rendered batches as a dataset, indexed by (view, positions), for torch's worker processes."""

    def __init__(
        self, canvas: Canvas, policy: ViewPolicy, archive: AnyArchive | None, renderer: Renderer, probe_version: int
    ) -> None:
        self._canvas, self._archive, self._renderer, self._probe_version = canvas, archive, renderer, probe_version
        self._tables = _DrawTables(policy, canvas)

    def __getitem__(self, item: Item) -> Rendered | KdcacheError:
        view, positions = item
        try:
            table = self._tables[view]
            stored = self._archive.take(view, positions).load() if self._archive else None
            images = render_positions(self._canvas.pixels, table, positions, self._renderer)
        except KdcacheError as error:
            # The error is returned, as the loader would re-raise it as another type in the main process.
            return error
        return Rendered(images, digests(images, self._probe_version), table[positions], stored, positions)


class Resident:
    """The pixels of a canvas for a GPU: on it, if they take at most half of its free memory, else in host memory."""

    def __init__(self) -> None:
        self._pixels: Tensor | NDArray[np.uint8] | None = None

    def pixels(self, canvas: Canvas, device: torch.device) -> Tensor | NDArray[np.uint8]:
        if self._pixels is None:  # decide only once, as later the pixels themselves use the memory
            self._pixels = canvas.pixels
            if canvas.pixels.nbytes < _RESIDENT * torch.cuda.mem_get_info(device)[0]:
                with warnings.catch_warnings(action="ignore"):  # torch warns of the read-only canvas, which is only read here
                    self._pixels = torch.from_numpy(canvas.pixels).to(device)
        return self._pixels


def _on_gpu(
    canvas: Canvas,
    policy: ViewPolicy,
    items: Iterator[Item],
    archive: AnyArchive | None,
    device: torch.device,
    probe_version: int,
    resident: Resident,
) -> Iterator[Rendered]:
    """Render on a side stream, some batches ahead of the model's stream, which waits for each batch."""
    tables, pixels = _DrawTables(policy, canvas), resident.pixels(canvas, device)
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    started: deque[tuple[Tensor, Tensor, ViewTable, NDArray[np.int64], torch.cuda.Event]] = deque()

    def start(view: int, positions: NDArray[np.int64]) -> None:
        table = tables[view]
        with torch.cuda.stream(side):
            images = render_positions(pixels, table, positions, "device", device)
            sums = digest_sums(images, probe_version)
            on_host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True).copy_(sums, non_blocking=True)
            started.append((images, on_host, table[positions], positions, side.record_event()))

    for item in itertools.islice(items, 1 + _AHEAD):
        start(*item)
    while started:
        images, sums, rows, positions, done = started.popleft()
        stored = archive.take(rows.view, positions).load() if archive else None
        current = torch.cuda.current_stream(device)
        current.wait_event(done)
        images.record_stream(current)
        done.synchronize()  # digests need it; usually no wait, as rendering is ahead
        yield Rendered(images, fold(sums), rows, stored, positions)
        for item in itertools.islice(items, 1):
            start(*item)


def choose_renderer(
    wanted: RendererChoice, policy: ViewPolicy, canvas_size: int, batch_size: int, device: torch.device, workers: int = 0
) -> Renderer:
    """The renderer to use: `auto` is the faster of the two on this machine, for batches of this size.

    Worker processes have one thread each. Both renderers should give the same bytes, which is checked here on a few views.
    If they do not (on an unusual processor), or if the device renderer fails, `auto` is the reference, with a warning.
    Raises UsageError for an unknown name, and for `device` if it cannot shrink the canvas that much.
    """
    if wanted not in get_args(RendererChoice):
        raise unknown_name("renderer", wanted, get_args(RendererChoice))
    if not can_resize(canvas_size, policy.size, policy.filter):
        if wanted == "device":
            raise UsageError(
                f"the device renderer cannot shrink a canvas of {canvas_size} px to views of {policy.size} px",
                why="its sums are exact for up to 128 lines of the canvas to one of the view",
                fix="use --renderer reference, or a smaller canvas",
            )
        return "reference"
    if wanted != "auto":
        return wanted
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if workers else threads)
        return _fastest(policy, canvas_size, min(batch_size, 64 if policy.size <= 64 else 16), device, torch.get_num_threads())
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=64)
def _fastest(policy: ViewPolicy, canvas_size: int, batch_size: int, device: torch.device, threads: int) -> Renderer:
    pixels = np.random.default_rng(0).integers(0, 256, (batch_size, 3, canvas_size, canvas_size), dtype=np.uint8)
    table, positions = policy.parameters(0, batch_size, np.ones((batch_size, 2), int)), np.arange(batch_size)

    def draw(renderer: Renderer) -> tuple[float, Tensor]:
        seconds = []
        for _ in range(2):  # the first turn includes compilation and imports
            started = time.perf_counter()
            views = render_positions(pixels, table, positions, renderer, device).cpu()
            seconds.append(time.perf_counter() - started)
        return min(seconds), views

    reference_seconds, expected = draw("reference")
    try:
        device_seconds, views = draw("device")
        wrong = "" if torch.equal(expected, views) else "differs from the reference"
    except (RuntimeError, AttributeError) as error:  # out of memory, or an operation that this torch lacks
        wrong = f"fails ({error})"
    if wrong:
        text = f"the device renderer {wrong} on this {device.type}; the reference is used. Please report this."
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        return "reference"
    return "device" if device.type == "cuda" or device_seconds < reference_seconds else "reference"
