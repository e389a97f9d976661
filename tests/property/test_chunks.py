"""Protects rendering on GPUs without one: the branches of the device renderer that only GPUs take, run on the CPU, and the
chunks that batches are slices of, with the streams of a GPU that does nothing by itself.
"""

import itertools
import weakref
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from kdcache.datasets.canvas import Canvas
from kdcache.replay import chunks, prefetch
from kdcache.replay.chunks import Resident, positions_at_once, render_chunks, rendering_memory
from kdcache.replay.prefetch import Item, Rendered, render_batches
from kdcache.system import gpu
from kdcache.system.progress import Silent
from kdcache.training.memory import room
from kdcache.views import PRESETS, ViewPolicy, probe, render_positions, resample
from kdcache.views.policy import PROBE_VERSION, InceptionCrop, PadCrop, RandAugment
from kdcache.views.probe import digests, grids
from tests.property.test_renderers import ALL_PIECES, BATCHES, assert_same_batches, pictures
from tests.squares import squares
from tests.stand_ins import STAND_IN, Launches, Stream, launched, stand_in_gpu

CPU = torch.device("cpu")


@pytest.fixture
def gpu_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the device renderer and the probe do otherwise on a GPU, they do on the CPU."""
    monkeypatch.setattr(resample, "_on_host", lambda device: False)
    monkeypatch.setattr(probe, "_on_host", lambda words: False)


@pytest.fixture
def idle_gpu() -> Iterator[torch.device]:
    """A GPU's streams and memory, and none of its own from other tests."""
    gpu._side_stream.cache_clear()
    with stand_in_gpu() as device:
        yield device
    gpu._side_stream.cache_clear()


def chunked(canvas: Canvas, items: Iterable[Item], policy: ViewPolicy = ALL_PIECES, **options: Any) -> Iterator[Rendered]:
    """Chunks as on a GPU, with real pixels on the CPU."""
    usual: dict[str, Any] = {
        "archive": None,
        "device": CPU,
        "probe_version": PROBE_VERSION,
        "grid": False,
        "resident": Resident(),
    }
    return render_chunks(canvas, policy, iter(items), **usual | options)


def of_size(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    monkeypatch.setattr(chunks, "_AT_ONCE", (positions, positions))


# ---------------------------------------------------------------- the branches of a GPU


@pytest.mark.usefixtures("gpu_branches")
@settings(max_examples=12)
@given(
    side=st.integers(1, 60),
    size=st.integers(3, 40),
    filter=st.sampled_from(["bilinear", "bicubic"]),
    crop=st.sampled_from([InceptionCrop(), PadCrop(padding=3), ALL_PIECES.crop]),
    interpolation=st.sampled_from(["nearest", "bilinear"]),
    seed=st.integers(0, 1 << 30),
)
def test_what_only_gpus_do_gives_the_references_bytes(
    side: int, size: int, filter: Any, crop: Any, interpolation: Any, seed: int
) -> None:
    augment = RandAugment(n=2, m=seed % 31, interpolation=interpolation, fill=seed % 256)
    changed = {"size": size, "filter": filter, "crop": crop, "randaugment": augment, "seed": seed}
    policy, pixels = ALL_PIECES.model_copy(update=changed), pictures(12, side, seed)
    table, positions = policy.parameters(0, 12, squares(12)), np.arange(12)
    expected = render_positions(pixels, table, positions, "reference")
    views = render_positions(pixels, table, positions, "device")
    assert torch.equal(views, expected)
    for version in (1, 2):
        with pytest.MonkeyPatch.context() as host:
            host.setattr(probe, "_on_host", lambda words: True)
            on_host = digests(expected, version)
        np.testing.assert_array_equal(digests(views, version), on_host)


@pytest.mark.usefixtures("gpu_branches")
def test_a_gpus_parts_of_a_large_batch_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resample, "_AT_ONCE", (0, 12 * 40 * 40 * 3))  # three images at a time
    table = ALL_PIECES.parameters(0, 16, squares(16))
    views = [render_positions(pictures(16, 40), table, np.arange(16), renderer) for renderer in ("reference", "device")]
    assert torch.equal(*views)


# ---------------------------------------------------------------- batches are slices of chunks


@pytest.mark.usefixtures("gpu_branches", "idle_gpu")
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("positions", [1, 8, 23, 1000])
def test_batches_of_chunks_are_those_rendered_alone(
    canvas: Canvas, positions: int, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several views, arbitrary positions, batches larger than a chunk; the canvas on the GPU, or read for each chunk."""
    monkeypatch.setattr(chunks, "_RESIDENT", 0.5 if resident else 0.0)
    of_size(monkeypatch, positions)
    expected = list(render_batches(canvas, ALL_PIECES, BATCHES, renderer="reference", grid=True))
    found = list(chunked(canvas, BATCHES, grid=True))
    assert_same_batches(iter(found), iter(expected))
    for batch, other in zip(found, expected, strict=True):
        assert batch.images.is_contiguous()
        np.testing.assert_array_equal(batch.grid, other.grid)
        np.testing.assert_array_equal(batch.grid, grids(other.images))


@pytest.mark.usefixtures("gpu_branches", "idle_gpu")
@settings(max_examples=8)
@given(data=st.data())
def test_batches_do_not_depend_on_where_chunks_end(canvas: Canvas, data: st.DataObject) -> None:
    """Whatever lengths batches have, as when a run is resumed in the midst of an epoch or a shard ends."""
    order = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(len(canvas))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(canvas) - 1), max_size=8)))
    items = [(3, part) for part in np.split(order, cuts)]
    with pytest.MonkeyPatch.context() as context:
        of_size(context, data.draw(st.integers(1, 30)))
        found = torch.cat([batch.images for batch in chunked(canvas, items)])
    table = ALL_PIECES.parameters(3, len(canvas), canvas.sizes)
    assert torch.equal(found, render_positions(canvas.pixels, table, order, "device"))


@pytest.mark.usefixtures("idle_gpu")
def test_chunks_come_with_the_archives_rows(dump: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    of_size(monkeypatch, 9)
    items = [(2, np.array([5, 4, 9])), (2, np.array([8, 1])), (0, np.arange(23))]
    policy = dump.archive.manifest.policy
    found = chunked(dump.canvas, items, policy, archive=dump.archive, probe_version=dump.archive.manifest.probe_version)
    for batch, (view, positions) in zip(found, items, strict=True):
        assert batch.stored is not None
        np.testing.assert_array_equal(batch.digest, batch.stored.digest)
        np.testing.assert_array_equal(batch.stored.logits, dump.logits[view, positions])


def watched(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """References to the memory of all chunks that are rendered from now on."""
    seen: list[weakref.ref[Any]] = []
    real = chunks.picked

    def noted(*arguments: Any) -> Tensor:
        images = real(*arguments).clone()
        whole = images.numpy()  # which lives as long as the memory does
        seen.append(weakref.ref(whole))
        return torch.from_numpy(whole)

    monkeypatch.setattr(chunks, "picked", noted)
    return seen


@pytest.mark.usefixtures("idle_gpu")
@pytest.mark.parametrize("resident", [True, False])
def test_two_chunks_are_alive_and_items_are_read_one_further(
    canvas: Canvas, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_RESIDENT", 0.5 if resident else 0.0)
    of_size(monkeypatch, 8)  # four batches of two
    seen, read = watched(monkeypatch), 0

    def items() -> Iterator[Item]:
        nonlocal read
        for view, start in itertools.product(range(3), range(0, 16, 2)):
            read += 1
            yield view, np.arange(start, start + 2)

    for number, _ in enumerate(chunked(canvas, items())):
        assert sum(each() is not None for each in seen) <= 2, number
        assert read <= (number // 4 + (2 if resident else 3)) * 4 + 1, number
        if number == 0:
            assert read == (4 if resident else 8), "the second chunk is begun with the second batch"
    assert read == 24
    assert len(seen) == 6


@pytest.mark.usefixtures("gpu_branches", "idle_gpu")
def test_a_chunk_that_memory_does_not_suffice_for_is_halved(canvas: Canvas, monkeypatch: pytest.MonkeyPatch) -> None:
    real, tried = chunks.render, []

    def scarce(images: Tensor, rows: Any) -> Tensor:
        tried.append(len(images))
        if len(images) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(images, rows)

    monkeypatch.setattr(chunks, "render", scarce)
    items = [(view, np.arange(start, start + 2)) for view in range(2) for start in range(0, 22, 2)]
    expected = list(render_batches(canvas, ALL_PIECES, items, renderer="reference"))
    resident = Resident()
    for _ in range(2):  # another epoch
        assert_same_batches(chunked(canvas, items, resident=resident), iter(expected))
    assert tried.count(22) == 1, "what was too much is not tried again"
    assert max(tried[2:]) <= 6
    with pytest.raises(torch.OutOfMemoryError):
        list(chunked(canvas, [(0, np.arange(8))]))


@pytest.mark.usefixtures("gpu_branches", "idle_gpu")
@pytest.mark.parametrize("resident", [True, False])
def test_chunks_are_halved_where_whoever_uses_the_views_lacks_memory(
    canvas: Canvas, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_RESIDENT", 0.5 if resident else 0.0)
    of_size(monkeypatch, 8)
    real, tried, kept = chunks.render, [], Resident()
    kept.halve()
    assert kept.limit is None, "nothing is rendered yet"
    monkeypatch.setattr(chunks, "render", lambda images, rows: (tried.append(len(images)), real(images, rows))[1])
    items = [(0, np.arange(start, start + 2)) for start in range(0, 22, 2)]
    expected = render_batches(canvas, ALL_PIECES, items, renderer="reference")
    found = chunked(canvas, items, resident=kept)
    first = next(found)
    kept.halve()
    assert_same_batches(itertools.chain([first], found), expected)
    assert tried == [8, 4, 4, 4, 2]
    for _ in range(4):
        kept.halve()
    assert kept.limit == 1


@pytest.mark.usefixtures("idle_gpu")
def test_all_epochs_share_one_stream(canvas: Canvas) -> None:
    resident = Resident()
    for epoch in range(5):
        list(chunked(canvas, [(epoch, np.arange(8))], resident=resident))
    assert Stream.made == 1


def test_less_memory_and_larger_views_mean_smaller_chunks() -> None:
    assert positions_at_once(224, 336, 80 << 30) == 1024
    assert 200 < positions_at_once(224, 336, 8 << 30) < 1024
    assert positions_at_once(32, 32, 80 << 30) == 4096
    assert positions_at_once(224, 336, 0) == 1


def test_the_canvas_and_rendering_are_taken_from_the_memory_for_models(monkeypatch: pytest.MonkeyPatch) -> None:
    device, free = torch.device("cuda"), 40 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, 80 << 30))
    canvas = 50_000 * 3 * 256**2
    with_canvas = rendering_memory(50_000, 256, 224, device)
    assert canvas < with_canvas < canvas + free / 4
    assert 0 < rendering_memory(500_000, 256, 224, device) < free / 4, "what has no room on it is not kept there"
    assert rendering_memory(50_000, 256, 224, CPU) == 0
    assert room(device, None, with_canvas) == int(0.8 * (free - with_canvas))
    assert room(device, 1 << 30, with_canvas) == 1 << 30


# ---------------------------------------------------------------- what a GPU is asked to do


class Unread:
    """A canvas of so many photographs, without memory."""

    def __init__(self, count: int, size: int) -> None:
        self.size, self.sizes, self._count = size, squares(count), count
        self.pixels: NDArray[np.uint8] = np.broadcast_to(np.zeros((), np.uint8), (count, 3, size, size))

    def __len__(self) -> int:
        return self._count


def launches(policy: ViewPolicy, size: int, items: list[Item], count: int) -> Launches:
    """What the stand-in is asked to do for `items`, when the canvas and what is kept for each policy are on it."""
    canvas: Any = Unread(count, size)
    resident = Resident()

    def work(items: list[Item]) -> None:
        for _ in chunked(canvas, items, policy, device=STAND_IN, grid=True, resident=resident):
            pass

    launched(lambda: work([(0, np.concatenate([positions for _, positions in items[:2]]))]))
    return launched(lambda: work(items))


@pytest.mark.usefixtures("idle_gpu")
@pytest.mark.parametrize(("name", "size"), [("pets", 336), ("cifar", 32), ("digits", 32)])
def test_a_batch_of_64_is_few_kernels_and_no_wait(name: str, size: int) -> None:
    count = positions_at_once(PRESETS[name].size, size, 80 << 30)
    order = np.random.default_rng(0).permutation(count)
    items = [(0, part) for part in np.split(order, count // 64)]
    found = launches(PRESETS[name].settled(), size, items, count)
    assert not found.waits
    assert found.kernels / len(items) <= 60
    assert found.copies / len(items) <= 1


# ---------------------------------------------------------------- GPU or workers


@pytest.mark.parametrize(
    ("renderer", "workers", "gpu_seconds", "expected"),
    [
        ("auto", 4, 1.0, "cpu"),
        ("auto", 4, 0.01, "cuda"),
        ("auto", 1, 1.9, "cuda"),  # one process, whose view takes 2 seconds
        ("auto", 0, 9.0, "cuda"),  # there is nobody to render beside this process
        ("device", 4, 9.0, "cuda"),
        ("reference", 4, 9.0, "cuda"),  # which choose_renderer leaves to the CPU
    ],
)
def test_a_gpus_views_are_drawn_by_workers_where_these_are_faster(
    renderer: Any, workers: int, gpu_seconds: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fastest(policy: ViewPolicy, canvas_size: int, batch: int, device: torch.device, threads: int) -> prefetch._Fastest:
        return prefetch._Fastest("device", gpu_seconds if device.type == "cuda" else 2.0)

    said: list[str] = []
    progress: Any = SimpleNamespace(say=said.append)
    monkeypatch.setattr(prefetch, "_fastest", fastest)
    monkeypatch.setattr(prefetch, "_SAID", set())
    monkeypatch.setattr(prefetch.os, "cpu_count", lambda: 8)
    for _ in range(2):
        where = prefetch._drawn_on(torch.device("cuda"), renderer, ALL_PIECES, 40, workers, progress)
        assert where.type == expected
    assert len(said) == (expected == "cpu"), "said once"
    assert all("4 processes on the CPU, 2 a second" in text and "--renderer device" in text for text in said)


def test_a_gpu_without_memory_for_the_trial_draws_nevertheless_and_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real, full = prefetch.render_positions, True

    def scarce(pixels: Any, table: Any, positions: Any, renderer: Any, on: Any) -> Tensor:
        if full and on.type == "cuda" and renderer == "device":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(pixels, table, positions, renderer, "cpu")

    cuda = torch.device("cuda")
    prefetch._fastest.cache_clear()
    monkeypatch.setattr(prefetch, "render_positions", scarce)
    monkeypatch.setattr(prefetch, "seconds_on_gpu", lambda *_: 1e9)
    assert prefetch.choose_renderer("auto", ALL_PIECES, 40, 8, cuda) == "device"  # a warning would fail this test
    assert prefetch._drawn_on(cuda, "auto", ALL_PIECES, 40, 4, Silent()) == cuda
    full = False
    assert prefetch._drawn_on(cuda, "auto", ALL_PIECES, 40, 4, Silent()) == CPU, "now it is known to be slow"
    prefetch._fastest.cache_clear()


def test_a_gpu_is_timed_with_as_many_views_as_fit(idle_gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    real = chunks.render_positions

    def scarce(pixels: Tensor, table: Any, positions: Any, *more: Any) -> Tensor:
        tried.append(len(positions))
        if len(positions) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(pixels, table, positions, *more)

    monkeypatch.setattr(chunks, "render_positions", scarce)
    most = 1100
    assert 0 < chunks.seconds_on_gpu(ALL_PIECES, 40, idle_gpu) < 10
    assert tried == [4096, 2048, 1024, 1024, 1024]
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        chunks.seconds_on_gpu(ALL_PIECES, 40, idle_gpu)


def test_views_of_a_cpu_are_drawn_there() -> None:
    for device in ("cpu", "mps", "meta"):
        assert prefetch._drawn_on(torch.device(device), "auto", ALL_PIECES, 40, 4, Silent()) == CPU


def test_batches_for_a_gpu_are_pinned(canvas: Canvas, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's loader pins what has a method of that name."""
    pinned: list[int] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor, *_: pinned.append(len(tensor)) or tensor)
    [batch] = render_batches(canvas, ALL_PIECES, BATCHES[:1], renderer="reference")
    assert torch.equal(batch.pin_memory().images, batch.images)
    assert pinned == [8]
