"""Protects replay across machines: a GPU draws the very bytes that a CPU does, and batches rendered ahead on it are the same."""

import dataclasses
import itertools
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.datasets.canvas import Canvas
from kdcache.replay import chunks, prefetch
from kdcache.replay.prefetch import Rendered, choose_renderer, render_batches
from kdcache.targets import Targets, control, match_entropy
from kdcache.training import evaluation
from kdcache.training.evaluation import EvalSet
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
    policy = PRESETS[name].settled()
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
        for policy in (PRESETS["pets"].settled(), PRESETS["cifar"], ALL_PIECES):
            assert choose_renderer("auto", policy, 336 if policy.size > 100 else 40, 64, GPU) == "device"


@pytest.mark.parametrize("positions", [1, 9, 1000])
@pytest.mark.parametrize("resident", [0.5, 0.0])
@pytest.mark.parametrize("items", [BATCHES, BATCHES[-1:]], ids=["most of the canvas", "little of it"])
def test_batches_rendered_ahead_on_a_gpu_are_the_cpus(
    canvas: Canvas, items: list[prefetch.Item], resident: float, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever chunks end, and whether the canvas lies on the GPU or is read for each chunk by threads."""
    monkeypatch.setattr(chunks, "_RESIDENT", resident)
    monkeypatch.setattr(chunks, "_AT_ONCE", (positions, positions))
    expected = list(render_batches(canvas, ALL_PIECES, items, renderer="reference", grid=True))
    found = list(render_batches(canvas, ALL_PIECES, items, renderer="device", device=GPU, grid=True))
    assert all(batch.images.device.type == "cuda" and batch.images.is_contiguous() for batch in found)
    assert_same_batches(iter(found), iter(expected))
    for batch, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(batch.grid, other.grid)


def many(count: int, side: int) -> Any:
    """A canvas of so many pictures in memory."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    sized = SimpleNamespace(pixels=pixels, size=side, sizes=squares(count))
    return type("Many", (SimpleNamespace,), {"__len__": lambda self: count})(**vars(sized))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_thousand_shuffled_positions_are_rendered_at_once(name: str) -> None:
    """The sizes of chunks that are used, on which alone it may depend that a GPU's memory is read where it should be."""
    policy = PRESETS[name].settled()
    canvas = many(1500, 40)
    order = np.random.default_rng(1).permutation(1500)
    items = [(2, part) for part in np.split(order, range(64, 1500, 64))]
    found = torch.cat([batch.images.cpu() for batch in render_batches(canvas, policy, items, renderer="device", device=GPU)])
    table = policy.parameters(2, 1500, canvas.sizes)
    some = np.arange(0, 1500, 31)
    assert torch.equal(found[some], render_positions(canvas.pixels, table, order[some], "reference"))


def test_rendering_never_waits_for_the_gpu(canvas: Canvas) -> None:
    items = [(view, np.arange(23)) for view in range(4)]
    resident = chunks.Resident()

    def rendered() -> list[Rendered]:
        return list(render_batches(canvas, ALL_PIECES, items, renderer="device", device=GPU, grid=True, resident=resident))

    rendered()  # copies the canvas and what is kept for each operation
    torch.cuda.set_sync_debug_mode("error")
    try:
        rendered()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_epochs_share_one_stream_and_its_memory(canvas: Canvas) -> None:
    taken, resident = [], chunks.Resident()
    for epoch in range(5):
        items = [(epoch, np.arange(start, start + 2)) for start in range(0, 22, 2)]
        for batch in render_batches(canvas, ALL_PIECES, items, renderer="device", device=GPU, resident=resident):
            batch.images.float().sum()
        torch.cuda.synchronize()
        taken.append(torch.cuda.memory_reserved())
    assert taken[1:] == [taken[1]] * 4


def test_too_large_a_chunk_for_the_memory_is_halved() -> None:
    """Views of 224 px, a thousand of which take some GB while they are rendered, in 1 GB."""
    policy, canvas, resident = PRESETS["imagenet"].settled(), many(1024, 40), chunks.Resident()
    items = [(0, np.arange(start, start + 32)) for start in range(0, 1024, 32)]
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (1 << 30)) / total)
    try:
        batches = render_batches(canvas, policy, items, renderer="device", device=GPU, resident=resident)
        found = [batch.images[0].cpu() for batch in batches]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert resident.limit is not None
    assert 32 <= resident.limit < 1024
    starts = np.arange(0, 1024, 32)
    table = policy.parameters(0, 1024, canvas.sizes)
    assert torch.equal(torch.stack(found), render_positions(canvas.pixels, table, starts, "reference"))


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


@pytest.mark.parametrize("on_gpu", [True, False])
def test_tests_on_a_gpu_have_the_cpus_views_and_figures(canvas: Canvas, on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "KEPT_ON_GPU", 0.1 if on_gpu else 0.0)
    policy = ViewPolicy.load("none", size=16)
    here, there = EvalSet(canvas, policy, batch_size=5), EvalSet(canvas, policy, batch_size=5, device=GPU)
    assert there._kept is not None
    assert here._kept is not None
    assert all(views.is_cuda if on_gpu else views.is_pinned() for views in there._kept)
    assert torch.equal(torch.cat(there._kept).cpu(), torch.cat(here._kept))
    logits = torch.randn(len(canvas), 7)
    expected = here.metrics(logits)
    assert there.metrics(logits.to(GPU)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("classes", [2, 37, 1000])
def test_smoothing_on_a_gpu_is_the_cpus_and_waits_for_nothing(classes: int) -> None:
    deficits = torch.linspace(0, 1, 400, dtype=torch.float64).pow(8) * float(np.log(classes))
    expected = match_entropy(deficits, classes)
    there = deficits.to(GPU)
    torch.testing.assert_close(match_entropy(there, classes).cpu(), expected, rtol=1e-12, atol=0)
    chosen, targets = control("ls-instance"), Targets(torch.randn(64, classes, device=GPU), 4.0)
    keys = torch.zeros(64, 2, dtype=torch.int64, device=GPU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        smoothed = chosen(targets, keys)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = chosen(targets.to("cpu"), keys.cpu())
    torch.testing.assert_close(smoothed.logits.cpu(), on_cpu.logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [16, 24, 32, 45])
@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
def test_a_gpu_resizes_views_for_students_as_a_cpu_does(filter: str, size: int) -> None:
    views = torch.from_numpy(pictures(9, 32))
    assert torch.equal(resized(views.to(GPU), size, filter).cpu(), resized(views, size, filter))
