"""Views on a GPU: whether they have the CPU's bytes, how many a second, and with how many launches."""

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.bench.gpu.measuring import Found, Setting, kernels
from kdcache.bench.pipeline import digits_canvas
from kdcache.bench.turns import Result, taking_turns
from kdcache.datasets.canvas import Canvas
from kdcache.replay.prefetch import render_batches
from kdcache.views.policy import (
    CenterCrop,
    ColorJitter,
    InceptionCrop,
    Mix,
    PadCrop,
    RandAugment,
    RandomErasing,
    ViewPolicy,
)
from kdcache.views.probe import digest_sums, digests
from kdcache.views.rendering import Renderer, render_positions

__all__ = ["equal_bytes", "launches", "random_policy", "streams", "views"]

VIEWS = 100_000  # compared
LAUNCHES = 60  # of a batch of 64
EPOCHS = 12
PRESETS = (("pets", 336, 256), ("imagenet", 336, 256), ("cifar", 40, 2048))  # side of the canvas, views
BATCH = 64


# ---------------------------------------------------------------- bytes


@dataclass(frozen=True)
class _Case:
    """Views to be drawn twice: by the GPU, and by a renderer of the CPU."""

    policy: ViewPolicy
    side: int
    count: int
    number: int
    renderer: Renderer


def random_policy(drawn: np.random.Generator, largest: int) -> tuple[ViewPolicy, int]:
    """Any policy, with the side of a canvas of at most `largest` pixels that it can be drawn from."""
    size = int(drawn.integers(1, max(2, largest * 7 // 10)))
    side = int(drawn.integers(1, min(largest, 25 * size) + 1))
    pieces: dict[str, Any] = {}
    if drawn.random() < 0.7:
        n, m, fill = (int(drawn.integers(*limits)) for limits in ((1, 4), (0, 31), (0, 256)))
        pieces["randaugment"] = RandAugment(n=n, m=m, interpolation=drawn.choice(["nearest", "bilinear"]), fill=fill)
    if drawn.random() < 0.5:
        strengths = {name: float(drawn.random()) for name in ("brightness", "contrast", "saturation")}
        pieces["jitter"] = ColorJitter(**strengths, hue=0.5)
    if drawn.random() < 0.5:
        pieces["erase"] = RandomErasing(probability=0.5)
    if drawn.random() < 0.6:
        pieces["mix"] = Mix(probability=0.8)
    crops = (CenterCrop(), InceptionCrop(), PadCrop(padding=int(drawn.integers(0, 6))))
    policy = ViewPolicy(
        size=size,
        filter=drawn.choice(["bilinear", "bicubic"]),
        crop=crops[drawn.integers(len(crops))],
        seed=int(drawn.integers(1 << 30)),
        hflip=float(drawn.random()),
        **pieces,
    )
    return policy, side


def _cases(views: int) -> Iterator[_Case]:
    """Presets at full size, and random policies until there are so many views. Small views are many, as a CPU draws them too."""
    done = 0
    for name, side, count in PRESETS:
        count = min(count, views // 100)
        done += count
        yield _Case(ViewPolicy.load(name), side, count, 0, "device")
    drawn = np.random.default_rng(20)
    for number in itertools.count():
        if done >= views:
            return
        small = number % 8 != 0
        policy, side = random_policy(drawn, 48 if small else 200)
        count = 128 if small else 24
        done += count
        yield _Case(policy, side, count, number, "reference" if number % 4 == 0 else "device")


def _pixels(case: _Case, drawn: np.random.Generator) -> NDArray[np.uint8]:
    pixels = drawn.integers(0, 256, (case.count, 3, case.side, case.side), dtype=np.uint8)
    return (pixels // 64 * 85).astype(np.uint8) if drawn.random() < 0.3 else pixels  # of few colours


def _different(case: _Case, device: torch.device) -> NDArray[np.bool_]:
    """Which views, in a random order, are other bytes or have other digests."""
    drawn = np.random.default_rng(case.number)
    pixels, sizes = _pixels(case, drawn), drawn.integers(1, 5000, (case.count, 2))
    table, positions = case.policy.parameters(case.number % 9, case.count, sizes), drawn.permutation(case.count)
    expected = render_positions(pixels, table, positions, case.renderer)
    source = torch.from_numpy(pixels).to(device) if drawn.random() < 0.5 else pixels
    found = render_positions(source, table, positions, "device", device)
    bytes_differ = (found.cpu() != expected).flatten(1).any(dim=1).numpy()
    return np.asarray(bytes_differ | (digests(found) != digests(expected)))


def equal_bytes(setting: Setting) -> Found:
    """Views of random policies and presets, as the GPU and as the CPU draws them, in as many threads as there are cores."""
    wanted = 600 if setting.tiny else VIEWS
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    views = policies = different = 0
    wrong: list[dict[str, Any]] = []
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            cases = list(_cases(wanted))
            for case, found in zip(cases, pool.map(lambda case: _different(case, setting.device), cases), strict=True):
                views, policies, different = views + case.count, policies + 1, different + int(found.sum())
                if found.any():
                    wrong.append({"policy": case.policy.model_dump(mode="json"), "side": case.side, "case": case.number})
                setting.progress.update("bench gpu: bytes", policies, len(cases), f"{views} views")
    finally:
        torch.set_num_threads(threads)
    result = Result(f"bytes of {views:,} views", "other than the CPU's", f"{policies} policies", different, 0)
    return Found([result], {"first": wrong[:5]})


# ---------------------------------------------------------------- speed


def views(setting: Setting) -> Found:
    """Views a second of the renderer with digests; and, without a bound, of batches rendered ahead as commands have them."""
    results, details = [], {}
    settings = ((224, 336, 512, 20_000), (32, 40, 16_384, 300_000))
    for size, side, batch, wanted in settings[1:] if setting.tiny else settings:
        batch = 64 if setting.tiny else batch
        canvas = digits_canvas(setting.folder, side, batch, setting.progress)
        policy = ViewPolicy(size=size, crop=InceptionCrop() if size == 224 else PadCrop(), randaugment=RandAugment(), mix=Mix())
        table, positions = policy.parameters(0, batch, canvas.sizes), np.arange(batch)
        pixels = torch.from_numpy(np.array(canvas.pixels)).to(setting.device)

        def render_all(pixels: Any = pixels, table: Any = table, positions: Any = positions) -> None:
            digest_sums(render_positions(pixels, table, positions, "device", setting.device))

        def render_ahead(canvas: Canvas = canvas, policy: ViewPolicy = policy, batch: int = batch) -> None:
            for _ in _batches(canvas, policy, batch, setting.device, 256):
                pass

        sides = [setting.waiting(side) for side in (render_all, render_ahead)]
        at_once, ahead = taking_turns(f"bench gpu: views {size} px", setting.seconds / 2, setting.progress, *sides)
        results.append(Result(f"views {size} px", "seconds of as many", f"{wanted} views/s", wanted * at_once / batch, 1.0))
        details[f"{size} px"] = {"views_per_s": round(batch / at_once), "in_batches_of_256": round(batch / ahead)}
    return Found(results, details)


def _batches(canvas: Canvas, policy: ViewPolicy, count: int, device: torch.device, size: int, view: int = 0) -> Iterator[Any]:
    items = [(view, np.arange(start, min(start + size, count))) for start in range(0, count, size)]
    return render_batches(canvas, policy, items, renderer="device", device=device)


def launches(setting: Setting, count: Callable[[Setting, Callable[[], object]], int] = kernels) -> Found:
    """Kernels and copies of a rendered batch of 64, digests included, over many batches."""
    results = []
    for name, side in (("cifar", 40),) if setting.tiny else (("pets", 336), ("cifar", 40)):
        batches = 4 if setting.tiny else 64
        canvas, policy = digits_canvas(setting.folder, side, BATCH * batches, setting.progress), ViewPolicy.load(name)

        def render(canvas: Canvas = canvas, policy: ViewPolicy = policy) -> None:
            for _ in _batches(canvas, policy, len(canvas), setting.device, BATCH):
                pass

        found = count(setting, render) / batches
        results.append(Result(f"launches, {policy.size} px", f"of a batch of {BATCH}", "kernels and copies", found, LAUNCHES))
    return Found(results)


def streams(setting: Setting) -> Found:
    """Memory that torch keeps after each of twelve epochs, and whether batches stay what they were while a model is slow."""
    samples = 32 if setting.tiny else 512
    canvas = digits_canvas(setting.folder, 40 if setting.tiny else 336, samples, setting.progress)
    policy = ViewPolicy.load("cifar" if setting.tiny else "pets")
    reserved = []
    for epoch in range(3 if setting.tiny else EPOCHS):
        for _ in _batches(canvas, policy, samples, setting.device, 256, view=epoch):
            pass
        setting.wait()
        reserved.append(torch.cuda.memory_reserved(setting.device) if setting.gpu else 1)
    growth = Result("memory after 12 epochs", "reserved", "after the second", reserved[-1] / reserved[1], 1.0)
    changed = _changed_batches(setting)
    kept = Result("batches of a slow model", "changed by later ones", "the CPU's", changed, 0)
    return Found([growth, kept], {"reserved_gb": [round(each / 1e9, 3) for each in reserved]})


def _changed_batches(setting: Setting) -> int:
    """Batches that are not the CPU's when a model gets to them, whose stream is busy with what came before."""
    samples = 128 if setting.tiny else 512
    canvas, policy = digits_canvas(setting.folder, 40, samples, setting.progress), ViewPolicy.load("imagenet", size=32)
    items = [(view, np.arange(start, start + 32)) for view in range(1 if setting.tiny else 6) for start in range(0, samples, 32)]
    side = 64 if setting.tiny else 4096
    busy, copies = torch.ones(side, side, device=setting.device), []
    for batch in render_batches(canvas, policy, items, renderer="device", device=setting.device):
        for _ in range(4):
            busy = busy @ busy * 1e-4
        copies.append((batch.images.clone(), batch.digest))
    expected = render_batches(canvas, policy, items, renderer="device")
    same = [
        torch.equal(images.cpu(), batch.images) and bool((digest == batch.digest).all())
        for (images, digest), batch in zip(copies, expected, strict=True)
    ]
    return same.count(False)
