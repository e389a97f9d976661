"""Rendering of batches ahead of the model: in worker processes on the CPU, or in chunks on a GPU."""

import itertools
import os
import re
import signal
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdcache.archive import AnyArchive
from kdcache.datasets.canvas import Canvas
from kdcache.errors import KdcacheError, RetryError, UsageError, unknown_name
from kdcache.replay.chunks import Resident, render_chunks, seconds_on_gpu
from kdcache.replay.rendered import DrawTables, Item, Rendered
from kdcache.system.interrupts import ENDING
from kdcache.system.progress import Progress, Silent
from kdcache.system.workers import require_workers, starting_workers
from kdcache.views.policy import PROBE_VERSION, RendererChoice, ViewPolicy
from kdcache.views.probe import digests, grids
from kdcache.views.rendering import Renderer, render_positions
from kdcache.views.resample import can_resize

__all__ = ["Item", "Rendered", "Resident", "choose_renderer", "render_batches"]

_CPU = torch.device("cpu")


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
    grid: bool = False,
    resident: Resident | None = None,
    progress: Progress | None = None,
) -> Iterator[Rendered]:
    """Render batches of (view, positions) in order, with the archive's rows if one is given, and grid means with `grid`.

    On a CPU, `workers` processes render ahead, and the images stay in host memory (pinned if `device` is a GPU). On a GPU, the
    device renderer renders some thousand positions at once ahead, from a canvas that `resident` keeps on it between calls,
    and each batch is a slice of them. With "auto", a GPU's views are rendered by workers on the CPU if these are faster, which
    `progress` is told. This process reads `items` only as far as rendering has got. Digests have the archive's probe
    version, or without an archive `probe_version`.
    """
    require_workers(workers)
    device, items = torch.device(device), iter(items)
    if archive:
        probe_version = archive.manifest.probe_version
    first = next(items, None)
    if first is None:
        return
    items = itertools.chain([first], items)
    where = _drawn_on(device, renderer, policy, canvas.size, workers, progress or Silent())
    chosen = choose_renderer(renderer, policy, canvas.size, len(first[1]), where, workers)
    if where.type == "cuda" and chosen == "device":
        options: dict[str, Any] = {"archive": archive, "device": where, "probe_version": probe_version, "grid": grid}
        yield from render_chunks(canvas, policy, items, resident=resident or Resident(), **options)
        return
    loader = DataLoader(
        _Renderings(canvas, policy, archive, chosen, probe_version, grid),
        batch_size=None,
        num_workers=workers,
        sampler=items,
        worker_init_fn=_outlive_signals,
        pin_memory=device.type == "cuda",
    )
    with starting_workers(workers) if workers else nullcontext():
        batches = iter(loader)
    try:
        for item in batches:
            if isinstance(item, KdcacheError):
                raise item
            yield item
    except RuntimeError as error:
        if not re.match(r"DataLoader worker \(pid", str(error)):
            raise
        raise RetryError(
            "a worker process has ended in the midst of its work",
            why=str(error).splitlines()[0],
            fix=f"use fewer of them: --workers {workers // 2}; if that does not help, look for what ended it (dmesg, ulimit -a)",
        ) from error


def _outlive_signals(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a worker: they often go to the whole job, and the main process ends its workers itself."""
    for number in (signal.SIGINT, *ENDING):
        signal.signal(number, signal.SIG_IGN)


class _Renderings(Dataset[Rendered | KdcacheError]):
    """Rendered batches as a dataset, indexed by (view, positions), for torch's worker processes."""

    def __init__(
        self,
        canvas: Canvas,
        policy: ViewPolicy,
        archive: AnyArchive | None,
        renderer: Renderer,
        probe_version: int,
        grid: bool,
    ) -> None:
        self._canvas, self._archive, self._renderer = canvas, archive, renderer
        self._probe_version, self._grid = probe_version, grid
        self._tables = DrawTables(policy, canvas)

    def __getitem__(self, item: Item) -> Rendered | KdcacheError:
        view, positions = item
        try:
            table = self._tables[view]
            stored = self._archive.take(view, positions).load() if self._archive else None
            images = render_positions(self._canvas.pixels, table, positions, self._renderer)
        except KdcacheError as error:
            # The error is returned, as the loader would re-raise it as another type in the main process.
            return error
        means = grids(images) if self._grid else None
        return Rendered(images, digests(images, self._probe_version), table[positions], stored, positions, means)


def choose_renderer(
    wanted: RendererChoice, policy: ViewPolicy, canvas_size: int, batch_size: int, device: torch.device, workers: int = 0
) -> Renderer:
    """The renderer to use: `auto` is the faster of the two on this machine, for batches of this size.

    Worker processes have one thread each. Both renderers should give the same bytes, which is checked here on a few views.
    If they do not (on an unusual processor), or if the device renderer fails, `auto` is the reference, with a warning. A GPU
    without memory for the trial is tried again at the next choice, and `auto` is the device renderer until then.
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
        return _fastest(policy, canvas_size, min(batch_size, _tried(policy)), device, torch.get_num_threads()).renderer
    except torch.OutOfMemoryError:  # the device renderer draws fewer views at once where memory is too little
        torch.cuda.empty_cache()
        return "device"
    finally:
        torch.set_num_threads(threads)


def _drawn_on(
    device: torch.device, renderer: RendererChoice, policy: ViewPolicy, canvas_size: int, workers: int, progress: Progress
) -> torch.device:
    """Where views for a model on `device` are drawn: on it if it is a GPU, unless "auto" finds the workers to be faster.

    Other accelerators lack float64 or are untested, so their views are drawn on the CPU.
    """
    if device.type != "cuda":
        return _CPU
    if renderer != "auto" or not workers or not can_resize(canvas_size, policy.size, policy.filter):
        return device
    return _CPU if _workers_are_faster(policy, canvas_size, device, workers, progress) else device


_SAID: set[tuple[str, int]] = set()  # policies and numbers of workers


def _workers_are_faster(policy: ViewPolicy, canvas_size: int, device: torch.device, workers: int, progress: Progress) -> bool:
    try:
        gpu = _fastest(policy, canvas_size, _tried(policy), device, torch.get_num_threads())
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False  # not known
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        cpu = _fastest(policy, canvas_size, _tried(policy), _CPU, 1)
    finally:
        torch.set_num_threads(threads)
    parallel = min(workers, max(1, (os.cpu_count() or 2) - 1))  # as one more core is this process's own
    faster = cpu.seconds / parallel < gpu.seconds
    if faster and (policy.digest, workers) not in _SAID:
        _SAID.add((policy.digest, workers))
        progress.say(
            f"views are drawn by {workers} processes on the CPU, {parallel / cpu.seconds:.0f} a second, as the GPU draws "
            f"{1 / gpu.seconds:.0f} (--renderer device draws them on the GPU)"
        )
    return faster


def _tried(policy: ViewPolicy) -> int:
    """Views that are drawn for a choice."""
    return 64 if policy.size <= 64 else 16


class _Fastest(NamedTuple):
    renderer: Renderer
    seconds: float  # for a view


@lru_cache(maxsize=64)
def _fastest(policy: ViewPolicy, canvas_size: int, batch_size: int, device: torch.device, threads: int) -> _Fastest:
    pixels = np.random.default_rng(0).integers(0, 256, (batch_size, 3, canvas_size, canvas_size), dtype=np.uint8)
    table, positions = policy.parameters(0, batch_size, np.ones((batch_size, 2), int)), np.arange(batch_size)

    def draw(renderer: Renderer) -> tuple[float, Tensor]:
        seconds = []
        for _ in range(2):  # the first turn includes compilation and imports
            started = time.perf_counter()
            views = render_positions(pixels, table, positions, renderer, device).cpu()
            seconds.append(time.perf_counter() - started)
        return min(seconds) / batch_size, views

    reference_seconds, expected = draw("reference")
    try:
        device_seconds, views = draw("device")
        wrong = "" if torch.equal(expected, views) else "differs from the reference"
    except torch.OutOfMemoryError:  # which says nothing of the renderer; what is raised is not cached
        raise
    except (RuntimeError, AttributeError) as error:  # such as an operation that this torch lacks
        wrong = f"fails ({error})"
    if wrong:
        text = f"the device renderer {wrong} on this {device.type}; the reference is used. Please report this."
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        return _Fastest("reference", reference_seconds)
    if device.type == "cuda":
        return _Fastest("device", seconds_on_gpu(policy, canvas_size, device))
    return min(_Fastest("device", device_seconds), _Fastest("reference", reference_seconds), key=lambda each: each.seconds)
