"""Protects replay across machines: a GPU draws the very bytes that a CPU does, and batches rendered ahead on it are the same."""

import dataclasses
import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.datasets.canvas import Canvas
from kdcache.replay import chunks, prefetch
from kdcache.replay.prefetch import choose_renderer, render_batches
from kdcache.views import PRESETS, ViewPolicy, fingerprint, render, render_positions
from kdcache.views.device import _to_hsv, _to_rgb
from kdcache.views.policy import RANDAUGMENT_OPERATIONS, UNIT, ColorJitter, Mix, RandAugment, RandomErasing
from kdcache.views.resample import crop_and_resize, resized
from tests.property.test_renderers import ALL_PIECES, BATCHES, assert_same_batches, colours, pictures
from tests.squares import squares

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GPU = torch.device("cuda")


def assert_gpu_draws_the_same(policy: ViewPolicy, side: int, count: int, view: int = 0) -> None:
    pixels, table, positions = pictures(count, side, view), policy.parameters(view, count, squares(count)), np.arange(count)
    expected = render_positions(pixels, table, positions, "device")
    for source in (pixels, torch.from_numpy(pixels).to(GPU)):
        views = render_positions(source, table, positions, "device", GPU)
        assert views.device.type == "cuda"
        different = (views.cpu() != expected).flatten(1).any(dim=1).nonzero().flatten().tolist()
        assert not different, f"positions {different} of {table}"
    for one, other in zip(fingerprint(views), fingerprint(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_gpu_draws_the_presets_as_a_cpu_does(name: str) -> None:
    policy = PRESETS[name]
    for view in range(3):
        assert_gpu_draws_the_same(policy, *((40, 101) if policy.size < 100 else (336, 24)), view=view)


@pytest.mark.parametrize(("side", "size"), [(336, 224), (224, 224), (64, 96), (48, 24), (33, 17), (5, 3), (1, 1), (9, 1)])
@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_a_gpu_draws_all_pieces_as_a_cpu_does(side: int, size: int, filter: Any, interpolation: Any) -> None:
    augment = RandAugment(n=4, m=11, interpolation=interpolation, fill=90)
    policy = ALL_PIECES.model_copy(update={"size": size, "filter": filter, "randaugment": augment})
    for view in range(3):
        assert_gpu_draws_the_same(policy, side, 17, view)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize(("size", "step"), [(2, 5), (32, 1), (33, 1), (224, 5)])
def test_a_gpu_does_every_operation_at_every_magnitude_and_sign_as_a_cpu_does(size: int, step: int, interpolation: Any) -> None:
    cases = np.array(list(itertools.product(range(RANDAUGMENT_OPERATIONS), (-1, 1), range(4))))
    images = torch.from_numpy(pictures(4, size)[cases[:, 2]])
    for m in range(0, 31, step):
        policy = ViewPolicy(size=size, hflip=0.0, randaugment=RandAugment(n=1, m=m, interpolation=interpolation, fill=77))
        rows = dataclasses.replace(
            policy.parameters(0, len(cases), squares(len(cases))),
            operations=cases[:, :1].astype(np.uint8),
            signs=cases[:, 1:2].astype(np.int8),
        )
        different = (render(images.to(GPU), rows).cpu() != render(images, rows)).flatten(1).any(dim=1).numpy()
        assert not different.any(), f"m={m}, (operation, sign, picture) {cases[different].tolist()}"


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_a_gpu_crops_any_boxes_as_a_cpu_does(name: str) -> None:
    rng = np.random.default_rng(2)
    for _ in range(150):
        side = int(rng.integers(1, 200))
        size = int(rng.integers(max(1, side // 30), 100))
        images = torch.from_numpy(pictures(16, side))
        ends = rng.integers(0, UNIT, (16, 2, 2))
        box = np.concatenate([ends.min(axis=1), ends.max(axis=1) + 1], axis=1).astype(np.int32)
        flip, shift = rng.random(16) < 0.5, rng.integers(-3, 4, (16, 2)).astype(np.int32)
        views = crop_and_resize(images.to(GPU), box, flip, shift, size, name).cpu()
        assert torch.equal(views, crop_and_resize(images, box, flip, shift, size, name)), (side, size)


def test_a_gpu_turns_every_colour_into_hue_and_back_as_a_cpu_does() -> None:
    step = 1 << 19
    for first in range(0, 1 << 24, step):
        pixels = torch.from_numpy(colours(first, step)).view(1, 3, 512, 1024)
        for cpu, gpu in zip(_to_hsv(pixels), _to_hsv(pixels.to(GPU)), strict=True):
            assert torch.equal(cpu, gpu.cpu())
        planes = pixels.int().split(1, dim=1)
        assert torch.equal(_to_rgb(*planes), _to_rgb(*(plane.to(GPU) for plane in planes)).cpu())


@pytest.mark.parametrize("operation", range(4))
def test_a_gpu_does_every_jitter_operation_at_many_factors_as_a_cpu_does(operation: int) -> None:
    rng = np.random.default_rng(operation)
    count = 256
    rows = ViewPolicy(size=40, hflip=0.0, jitter=ColorJitter(brightness=1)).parameters(0, count, squares(count))
    factors = rng.integers(0, 3 * UNIT, (count, 4))
    factors[:, 3] = np.arange(count) - 128
    rows = dataclasses.replace(rows, jitter=np.full((count, 1), operation, np.uint8), factors=factors.astype(np.int32))
    images = torch.from_numpy(pictures(count, 40))
    assert torch.equal(render(images.to(GPU), rows).cpu(), render(images, rows))


def test_a_gpu_erases_and_mixes_the_same_pixels_in_any_batch() -> None:
    policy = ViewPolicy(size=32, erase=RandomErasing(probability=0.5), mix=Mix(probability=0.8, beta=0.4))
    pixels, table = pictures(51, 32), policy.parameters(0, 51, squares(51))
    whole = render_positions(pixels, table, np.arange(51), "reference")
    for positions in (np.arange(50, -1, -1), np.array([3]), np.array([50, 0, 7, 7, 21])):
        views = render_positions(pixels, table, positions, "device", GPU).cpu()
        assert torch.equal(views, whole[torch.from_numpy(positions)])


def test_auto_is_the_device_renderer_on_a_gpu() -> None:
    prefetch._fastest.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # the two renderers differ
        for policy in (PRESETS["pets"], PRESETS["cifar"], ALL_PIECES):
            assert choose_renderer("auto", policy, 336 if policy.size > 100 else 40, 64, GPU) == "device"


@pytest.mark.parametrize("resident", [0.5, 0.0])
@pytest.mark.parametrize("items", [BATCHES, BATCHES[-1:]], ids=["most of the canvas", "little of it"])
def test_batches_rendered_ahead_on_a_gpu_are_the_cpus(
    canvas: Canvas, items: list[prefetch.Item], resident: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the canvas lies on the GPU (all of it, when there is room and use for it) or only what a batch needs."""
    monkeypatch.setattr(chunks, "_RESIDENT", resident)
    expected = list(render_batches(canvas, ALL_PIECES, items, renderer="reference"))
    found = list(render_batches(canvas, ALL_PIECES, items, renderer="device", device=GPU))
    assert all(batch.images.device.type == "cuda" for batch in found)
    assert_same_batches(iter(found), iter(expected))


def test_batches_stay_what_they_were_while_later_ones_are_rendered(canvas: Canvas) -> None:
    """The side stream must not write into memory that the model's stream still reads."""
    items = [(view, np.arange(23)) for view in range(40)]
    busy, copies = torch.ones(2048, 2048, device=GPU), []
    for batch in render_batches(canvas, ALL_PIECES, items, renderer="device", device=GPU):
        for _ in range(20):
            busy = busy @ busy * 1e-4  # so that the copy below is made when the next batches are long rendered
        copies.append(batch.images.clone())
    expected = render_batches(canvas, ALL_PIECES, items, renderer="reference")
    for copy, batch in zip(copies, expected, strict=True):
        assert torch.equal(copy.cpu(), batch.images)


def test_batches_on_a_gpu_come_with_the_archives_rows(dump: Any) -> None:
    policy = dump.archive.manifest.policy
    items = [(2, np.array([5, 4, 9])), (0, np.arange(23))]
    for batch, (view, positions) in zip(
        render_batches(dump.canvas, policy, items, archive=dump.archive, renderer="device", device=GPU), items, strict=True
    ):
        assert batch.stored is not None
        np.testing.assert_array_equal(batch.digest, batch.stored.digest)
        np.testing.assert_array_equal(batch.stored.logits, dump.logits[view, positions])


@pytest.mark.parametrize("size", [16, 24, 32, 45])
@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
def test_a_gpu_resizes_views_for_students_as_a_cpu_does(filter: str, size: int) -> None:
    views = torch.from_numpy(pictures(9, 32))
    assert torch.equal(resized(views.to(GPU), size, filter).cpu(), resized(views, size, filter))
