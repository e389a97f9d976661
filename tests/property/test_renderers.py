"""Protects the two renderers: the device renderer's bytes are the reference's, the reference's are Pillow's and torchvision's."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import functional as F

from kdcache.datasets.canvas import Canvas
from kdcache.errors import UsageError
from kdcache.replay import prefetch
from kdcache.replay.prefetch import Item, Rendered, choose_renderer, render_batches
from kdcache.views import PRESETS, ViewPolicy, ViewTable, render, render_positions
from kdcache.views.device import _to_hsv, _to_rgb
from kdcache.views.policy import (
    JITTER_NONE,
    MIX_CUTMIX,
    MIX_MIXUP,
    MIX_NONE,
    RANDAUGMENT_OPERATIONS,
    UNIT,
    CenterCrop,
    ColorJitter,
    InceptionCrop,
    Mix,
    PadCrop,
    RandAugment,
    RandomErasing,
)
from kdcache.views.rendering import Renderer
from kdcache.views.resample import crop_and_resize
from tests.squares import squares

RENDERERS = get_args(Renderer)
RADIUS = {"bilinear": 1, "bicubic": 2}
MAX_TAPS = 128
ALL_PIECES = ViewPolicy(
    size=24,
    seed=5,
    crop=InceptionCrop(),
    filter="bicubic",
    randaugment=RandAugment(n=2, m=9, interpolation="bilinear", fill=128),
    jitter=ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2, probability=0.8),
    erase=RandomErasing(),
    mix=Mix(probability=0.8, beta=0.2),
)


def pictures(count: int, side: int, seed: int = 0) -> NDArray[np.uint8]:
    """Noise, a smooth picture, one colour, a few values, noise, ... : uint8 `[count, 3, side, side]`."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    images = []
    for i in range(count):
        if i % 4 == 0:
            image = rng.integers(0, 256, (3, side, side))
        elif i % 4 == 1:
            a, b, c = rng.uniform(-300, 300, (3, 3, 1, 1))
            image = np.clip(128 + a * (x - 0.5) + b * (y - 0.5) + c * x * y, 0, 255)
        elif i % 4 == 2:
            image = np.broadcast_to(rng.integers(0, 256, (3, 1, 1)), (3, side, side))
        else:
            image = rng.choice([[0, 255], [0, 1, 254, 255], [100, 101, 102]][rng.integers(3)], (3, side, side))
        images.append(image.astype(np.uint8))
    return np.array(images)


def to_pil(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def from_pil(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image).transpose(2, 0, 1)


def assert_renderers_agree(images: NDArray[np.uint8], rows: ViewTable) -> None:
    expected, views = (render(torch.from_numpy(images[rows.sample]), rows, renderer) for renderer in RENDERERS)
    assert expected.shape == (len(rows), 3, rows.policy.size, rows.policy.size)
    different = (expected != views).flatten(1).any(dim=1).nonzero().flatten().tolist()
    assert not different, f"rows {different} of {rows}"


@pytest.fixture(params=RENDERERS)
def renderer(request: pytest.FixtureRequest) -> Renderer:
    renderer: Renderer = request.param
    return renderer


# ---------------------------------------------------------------- crop and resize


def edges(side: int) -> st.SearchStrategy[tuple[int, int]]:
    """The two ends of a box along one axis, in 1/UNIT of `side` pixels."""
    pixel = st.integers(0, side - 1)
    return st.one_of(
        st.tuples(st.integers(0, UNIT - 1), st.integers(1, UNIT)).map(lambda e: (min(e), max(max(e), min(e) + 1))),
        st.integers(0, UNIT - 1).map(lambda start: (start, start + 1)),
        pixel.map(lambda i: (i * UNIT // side, (i + 1) * UNIT // side)),
        st.tuples(pixel, pixel).map(lambda e: (min(e) * UNIT // side, (max(e) + 1) * UNIT // side)),
        st.just((0, UNIT)),
    )


def pillow(
    pixels: NDArray[np.uint8], box: list[int], flip: bool, shift: tuple[int, int], size: int, name: str
) -> NDArray[np.uint8]:
    """The box (in 1/UNIT) of one image, by Pillow; mirrored and shifted by NumPy."""
    side = pixels.shape[-1]
    exact = tuple(float(np.float32(edge * side / UNIT)) for edge in box)
    resized = from_pil(to_pil(pixels).resize((size, size), Image.Resampling[name.upper()], box=exact))
    return shifted(resized[..., ::-1] if flip else resized, shift)


def shifted(view: NDArray[np.uint8], shift: tuple[int, int]) -> NDArray[np.uint8]:
    size, reach = view.shape[-1], max(map(abs, shift))
    left, top = shift[0] + reach, shift[1] + reach
    return np.pad(view, ((0, 0), (reach, reach), (reach, reach)))[:, top : top + size, left : left + size]


def assert_crops_are_pillows(
    images: NDArray[np.uint8], box: NDArray, flip: NDArray, shift: NDArray, size: int, name: str
) -> None:
    views = crop_and_resize(torch.from_numpy(images), box.astype(np.int32), flip, shift.astype(np.int32), size, name).numpy()
    for i, view in enumerate(views):
        expected = pillow(images[i], box[i].tolist(), bool(flip[i]), tuple(shift[i].tolist()), size, name)
        np.testing.assert_array_equal(view, expected, err_msg=f"{name} {box[i]} of {images.shape[-1]} at {size}, {shift[i]}")


@pytest.mark.exhaustive
@settings(max_examples=300)
@given(
    name=st.sampled_from(sorted(RADIUS)),
    side=st.one_of(st.integers(1, 100), st.integers(1, 100), st.integers(1, 9), st.just(336)),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_crop_and_resize_is_pillows_resize_of_a_box_mirrored_and_shifted(name: str, side: int, seed: int, data: Any) -> None:
    size = data.draw(st.integers(math.ceil(2 * RADIUS[name] * side / (MAX_TAPS - 1)), 97), label="size")
    rows = data.draw(
        st.lists(
            st.tuples(edges(side), edges(side), st.booleans(), st.integers(-size - 1, size + 1), st.integers(-3, 3)),
            min_size=1,
            max_size=5,
        ),
        label="boxes, flips, shifts",
    )
    box = np.array([[x[0], y[0], x[1], y[1]] for x, y, *_ in rows])
    flip, shift = np.array([row[2] for row in rows]), np.array([row[3:] for row in rows])
    if data.draw(st.booleans(), label="unshifted"):
        shift = np.zeros_like(shift)
    assert_crops_are_pillows(pictures(len(rows), side, seed), box, flip, shift, size, name)


@pytest.mark.parametrize(("name", "size"), [("bilinear", 2), ("bicubic", 4)])
def test_crop_and_resize_is_pillows_up_to_128_taps_and_refuses_more(name: str, size: int) -> None:
    rng = np.random.default_rng(1)
    for side in range(120, 128):
        images = rng.integers(0, 256, (24, 3, side, side), dtype=np.uint8)
        images[8:16] = rng.choice([0, 255], (8, 3, side, side))
        images[16:20] = 255
        length = rng.integers(UNIT * 9 // 10, UNIT + 1, (24, 2))
        length[::3] = UNIT
        start = rng.integers(0, UNIT - length + 1)
        box = np.concatenate([start, start + length], axis=1)
        assert_crops_are_pillows(images, box, rng.random(24) < 0.5, np.zeros((24, 2), int), size, name)
    with pytest.raises(ValueError, match="129 lines"):
        crop_and_resize(
            torch.zeros(1, 3, 128, 128, dtype=torch.uint8),
            np.array([[0, 0, UNIT, UNIT]], np.int32),
            np.zeros(1, np.bool_),
            np.zeros((1, 2), np.int32),
            size,
            name,
        )


@pytest.mark.parametrize("name", sorted(RADIUS))
@pytest.mark.parametrize(("side", "size"), [(336, 224), (256, 224), (64, 64), (100, 300)])
def test_crop_and_resize_is_pillows_at_the_sizes_that_people_train_with(name: str, side: int, size: int) -> None:
    table = ViewPolicy(size=size, crop=InceptionCrop()).parameters(1, 6, squares(6))
    assert_crops_are_pillows(pictures(6, side), table.box, table.flip, table.shift, size, name)


# ---------------------------------------------------------------- device = reference


def spans(low: float, high: float) -> st.SearchStrategy[tuple[float, float]]:
    return st.tuples(st.floats(low, high), st.floats(low, high)).map(lambda pair: (min(pair), max(pair)))


SHARES = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0]))
CROPS = st.one_of(
    st.builds(CenterCrop, fraction=st.floats(0.01, 1)),
    st.builds(InceptionCrop, scale=spans(0.01, 1), ratio=spans(0.3, 3.3)),
    st.builds(PadCrop, padding=st.integers(0, 9)),
)
RANDAUGMENTS = st.integers(2, 40).flatmap(
    lambda bins: st.builds(
        RandAugment,
        n=st.integers(1, 4),
        m=st.integers(0, bins - 1),
        bins=st.just(bins),
        interpolation=st.sampled_from(["nearest", "bilinear"]),
        fill=st.integers(0, 255),
    )
)
STRENGTHS = st.one_of(st.just(0.0), st.floats(0, 1), st.floats(0, 10))
JITTERS = st.builds(
    ColorJitter, brightness=STRENGTHS, contrast=STRENGTHS, saturation=STRENGTHS, hue=st.floats(0, 0.5), probability=SHARES
)
BYTES = st.integers(0, 255)
ERASINGS = st.builds(
    RandomErasing, probability=SHARES, scale=spans(0.01, 1), ratio=spans(0.1, 10), fill=st.tuples(BYTES, BYTES, BYTES)
)
MIXES = st.builds(Mix, probability=SHARES, cutmix=SHARES, beta=st.one_of(st.none(), st.sampled_from([0.2, 1.0, 3.0])))
POLICIES = st.builds(
    ViewPolicy,
    seed=st.integers(0, 2**64 - 1),
    size=st.one_of(st.integers(1, 5), st.integers(1, 48)),
    crop=CROPS,
    filter=st.sampled_from(sorted(RADIUS)),
    hflip=SHARES,
    randaugment=st.one_of(st.none(), RANDAUGMENTS),
    jitter=st.one_of(st.none(), JITTERS),
    erase=st.one_of(st.none(), ERASINGS),
    mix=st.one_of(st.none(), MIXES),
)


@settings(max_examples=250)
@given(policy=POLICIES, view=st.integers(0, 2**40), count=st.integers(1, 9), data=st.data())
def test_both_renderers_give_the_same_bytes_for_any_policy(policy: ViewPolicy, view: int, count: int, data: Any) -> None:
    side = data.draw(
        st.one_of(st.just(policy.size), st.integers(1, 60)).map(lambda side: min(side, 31 * policy.size)), label="side"
    )
    assert_renderers_agree(pictures(count, side, view % 1000), policy.parameters(view, count, squares(count)))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_both_renderers_give_the_same_bytes_for_every_preset_at_its_own_size(name: str) -> None:
    policy = PRESETS[name].settled("bicubic")
    count, side = (200, 40) if policy.size < 100 else (10, 336)
    assert_renderers_agree(pictures(count, side), policy.parameters(2, count, squares(count)))


@pytest.mark.grid
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize(
    ("size", "bins", "step"), [(1, 31, 3), (2, 31, 3), (3, 31, 1), (16, 31, 1), (33, 31, 1), (40, 10, 1), (224, 31, 15)]
)
def test_both_renderers_give_the_same_bytes_for_every_operation_at_every_magnitude_and_sign(
    size: int, bins: int, step: int, interpolation: Any
) -> None:
    cases = np.array(list(itertools.product(range(RANDAUGMENT_OPERATIONS), (-1, 1), range(1 if size > 100 else 4))))
    images = pictures(4, size)[cases[:, 2]]
    for m in range(0, bins, step):
        options = RandAugment(n=1, m=m, bins=bins, interpolation=interpolation, fill=(m * 37) % 256)
        table = ViewPolicy(size=size, hflip=0.0, randaugment=options).parameters(0, len(cases), squares(len(cases)))
        rows = dataclasses.replace(
            table, sample=np.arange(len(cases)), operations=cases[:, :1].astype(np.uint8), signs=cases[:, 1:2].astype(np.int8)
        )
        assert_renderers_agree(images, rows)


# ---------------------------------------------------------------- colour jitter


def jittered(images: NDArray[np.uint8], operations: list[int], factors: list[int], renderer: Renderer) -> NDArray[np.uint8]:
    """`images` after the jitter `operations`, with the factors of brightness, contrast, saturation, hue."""
    policy = ViewPolicy(size=images.shape[-1], hflip=0.0, jitter=ColorJitter(brightness=1))
    rows = dataclasses.replace(
        policy.parameters(0, len(images), squares(len(images))),
        jitter=np.tile(np.array(operations, np.uint8), (len(images), 1)),
        factors=np.tile(np.array(factors, np.int32), (len(images), 1)),
    )
    return render(torch.from_numpy(images), rows, renderer).numpy()


def turn_hue(image: Image.Image, levels: int) -> Image.Image:
    """torchvision's adjust_hue by a number of levels; it cuts its factor times 255 off to whole levels."""
    return F.adjust_hue(image, (levels + math.copysign(0.5, levels)) / 255)


ADJUST: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    F.adjust_brightness,
    F.adjust_contrast,
    F.adjust_saturation,
    turn_hue,
)


@settings(max_examples=60)
@given(
    operation=st.integers(0, 2),
    factor=st.one_of(st.integers(0, 11 * UNIT), st.integers(0, 2 * UNIT), st.sampled_from([0, 1, UNIT - 1, UNIT, UNIT + 1])),
    side=st.integers(1, 20),
    seed=st.integers(0, 100),
)
def test_brightness_contrast_and_saturation_are_torchvisions_at_any_factor(
    operation: int, factor: int, side: int, seed: int, renderer: Renderer
) -> None:
    images = pictures(8, side, seed)
    factors = [factor if i == operation else 12345 for i in range(3)] + [0]
    views = jittered(images, [JITTER_NONE, operation, JITTER_NONE, JITTER_NONE], factors, renderer)
    for image, view in zip(images, views, strict=True):
        np.testing.assert_array_equal(view, from_pil(ADJUST[operation](to_pil(image), factor / UNIT)))


@pytest.mark.exhaustive
def test_hue_is_torchvisions_at_every_level(renderer: Renderer) -> None:
    images = pictures(8, 13)
    for levels in range(-127, 128):
        views = jittered(images, [3, JITTER_NONE, JITTER_NONE, JITTER_NONE], [0, 0, 0, levels], renderer)
        for image, view in zip(images, views, strict=True):
            np.testing.assert_array_equal(view, from_pil(turn_hue(to_pil(image), levels)), err_msg=f"{levels} levels")


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_jitter_applies_torchvisions_operations_in_the_given_order(order: tuple[int, ...], renderer: Renderer) -> None:
    images, factors = pictures(8, 11), [UNIT * 14 // 10, UNIT * 6 // 10, UNIT * 13 // 10, -31]
    views = jittered(images, list(order), factors, renderer)
    for image, view in zip(images, views, strict=True):
        expected = to_pil(image)
        for operation in order:
            expected = ADJUST[operation](expected, factors[3] if operation == 3 else factors[operation] / UNIT)
        np.testing.assert_array_equal(view, from_pil(expected))


def colours(first: int, count: int) -> NDArray[np.uint8]:
    """`count` triples of bytes `[3, count]`, which number all 2^24 from 0."""
    number = np.arange(first, first + count, dtype=np.uint32)
    return np.stack([number >> 16, number >> 8, number]).astype(np.uint8)


@pytest.mark.exhaustive
@pytest.mark.parametrize("start", ["RGB", "HSV"])
def test_hue_saturation_and_value_of_every_colour_are_pillows(start: str) -> None:
    """All 2^24 colours each way, since one level off in one of them is another view."""
    step = 1 << 20
    for first in range(0, 1 << 24, step):
        triples = colours(first, step)
        image = Image.fromarray(triples.T.reshape(1024, 1024, 3))
        if start == "HSV":
            image = Image.merge("HSV", image.split())
        expected = np.asarray(image.convert("HSV" if start == "RGB" else "RGB")).reshape(-1, 3).T
        for half in (slice(0, step // 2), slice(step // 2, step)):
            pixels = torch.from_numpy(triples[:, half]).view(1, 3, 512, 1024)
            found = torch.cat(_to_hsv(pixels), dim=1) if start == "RGB" else _to_rgb(*pixels.int().split(1, dim=1))
            np.testing.assert_array_equal(found.view(3, -1).to(torch.uint8).numpy(), expected[:, half])


# ---------------------------------------------------------------- erasing, order of the pieces


@pytest.mark.parametrize("size", [1, 2, 17, 40])
def test_erasing_is_torchvisions_erase_of_the_drawn_box(size: int, renderer: Renderer) -> None:
    plain = ViewPolicy(size=size, hflip=0.0)
    policy = plain.model_copy(update={"erase": RandomErasing(probability=0.7, scale=(0.02, 0.6), fill=(1, 200, 30))})
    images, table = pictures(60, size), policy.parameters(1, 60, squares(60))
    before = torch.from_numpy(images[table.sample])
    views = render(before, table, renderer)
    colour = torch.tensor([1, 200, 30], dtype=torch.uint8).view(3, 1, 1)
    for view, image, (left, top, right, bottom) in zip(views, before, table.erase.tolist(), strict=True):
        assert torch.equal(view, F.erase(image, top, left, bottom - top, right - left, colour))
    if size > 2:
        assert 20 < (views != before).flatten(1).any(dim=1).sum() < 60


def only(table: ViewTable, **pieces: Any) -> ViewTable:
    """`table` with nothing but `pieces`: whole canvas at the size of a view, no flip, shift or mixing."""
    policy, count = ViewPolicy(size=table.policy.size, hflip=0.0, **pieces), len(table)
    plain = dataclasses.replace(policy.parameters(0, count, squares(count)), sample=table.sample)
    kept = {
        "randaugment": ("operations", "signs"),
        "jitter": ("jitter", "factors"),
        "erase": ("erase",),
        "mix": ("partner", "mix", "lam_units", "cut"),
    }
    columns = {name: getattr(table, name) for piece in pieces for name in kept[piece]}
    alone = {} if "mix" in pieces else {"partner": np.full(count, -1), "mix": np.full(count, MIX_NONE, np.uint8)}
    return dataclasses.replace(plain, **columns | alone)


@pytest.mark.parametrize("view", [0, 1, 2])
def test_a_view_is_crop_flip_randaugment_jitter_erasing_and_mixing_one_after_the_other(view: int, renderer: Renderer) -> None:
    count = 24
    table = ALL_PIECES.parameters(view, count, squares(count))
    assert {MIX_NONE, MIX_MIXUP, MIX_CUTMIX} == set(table.mix.tolist())
    images = pictures(count, 40, view)[table.sample]
    steps = np.stack([pillow(images[i], table.box[i].tolist(), bool(table.flip[i]), (0, 0), 24, "bicubic") for i in range(count)])
    views = torch.from_numpy(steps)
    for piece in ("randaugment", "jitter", "erase", "mix"):
        changed = render(views, only(table, **{piece: getattr(ALL_PIECES, piece)}), renderer)
        assert (changed != views).flatten(1).any(dim=1).sum() >= 4, f"{piece} changes something"
        views = changed
    assert torch.equal(render(torch.from_numpy(images), table, renderer), views)


@pytest.mark.parametrize("share", [0, 1, 9830, UNIT // 4, UNIT // 2 - 1, UNIT // 2, UNIT // 2 + 1, UNIT - 1])
def test_mixup_of_any_two_bytes_is_rounded_half_up(share: int) -> None:
    own = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 256, 256))
    other = own.transpose(0, 2, 1)
    table = ViewPolicy(size=256, hflip=0.0, mix=Mix(cutmix=0)).parameters(0, 2, squares(2))
    rows = dataclasses.replace(table, lam_units=np.array([share, share], np.int32))
    view = render(torch.from_numpy(np.stack([own, other])), rows)[0].numpy()
    expected = (own.astype(np.int64) * share + other.astype(np.int64) * (UNIT - share) + UNIT // 2) // UNIT
    np.testing.assert_array_equal(view, expected)


# ---------------------------------------------------------------- what pixels do not depend on


@settings(max_examples=40)
@given(policy=POLICIES, view=st.integers(0, 2**40), count=st.integers(1, 9), data=st.data())
def test_views_of_any_policy_do_not_depend_on_batching_order_and_company(
    policy: ViewPolicy, view: int, count: int, data: Any, renderer: Renderer
) -> None:
    pixels, table = pictures(count, 21), policy.parameters(view, count, squares(count))
    whole = render_positions(pixels, table, np.arange(count), renderer)
    positions = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=2 * count), label="positions"))
    assert torch.equal(render_positions(pixels, table, positions, renderer), whole[torch.from_numpy(positions)])
    one = positions[:1]
    assert torch.equal(render_positions(torch.from_numpy(pixels), table, one, renderer), whole[torch.from_numpy(one)])


def test_rendering_leaves_canvas_and_draws_as_they_are(renderer: Renderer) -> None:
    table = ALL_PIECES.parameters(0, 12, squares(12))
    images = torch.from_numpy(pictures(12, 24)[table.sample])
    pixels, columns = images.clone(), [column.copy() for column in vars(table).values() if isinstance(column, np.ndarray)]
    render(images, table, renderer)
    whole = ALL_PIECES.model_copy(update={"crop": CenterCrop()})  # nothing to resize: views begin as copies of the canvas
    render(
        images, dataclasses.replace(whole.parameters(0, 12, squares(12)), sample=table.sample, partner=table.partner), renderer
    )
    assert torch.equal(images, pixels)
    for before, after in zip(columns, [c for c in vars(table).values() if isinstance(c, np.ndarray)], strict=True):
        np.testing.assert_array_equal(before, after)


BATCHES: list[Item] = [
    (1, np.arange(0, 8)),
    (1, np.arange(8, 23)),
    (0, np.array([22, 3, 4, 11])),
    (5, np.arange(22, -1, -1)),
    (1, np.array([7])),
]


def assert_same_batches(some: Iterator[Rendered], others: Iterator[Rendered]) -> None:
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one.images.cpu(), other.images.cpu())
        np.testing.assert_array_equal(one.digest, other.digest)
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_array_equal(one.rows.sample, other.rows.sample)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers_renderer_order_and_first_view(canvas: Canvas, workers: int, renderer: Renderer) -> None:
    expected = list(render_batches(canvas, ALL_PIECES, BATCHES, renderer="reference"))
    for (view, positions), batch in zip(BATCHES, expected, strict=True):
        table = ALL_PIECES.parameters(view, len(canvas), canvas.sizes)
        assert torch.equal(batch.images, render_positions(canvas.pixels, table, positions, "reference"))
    found = render_batches(canvas, ALL_PIECES, BATCHES[::-1], workers=workers, renderer=renderer)
    assert_same_batches(found, reversed(expected))


# ---------------------------------------------------------------- which renderer


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """The choice is made once for each policy and size; here it is made anew."""
    prefetch._fastest.cache_clear()
    yield
    prefetch._fastest.cache_clear()


CPU = torch.device("cpu")


def test_a_renderer_that_is_named_is_used(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("nothing need be measured")

    monkeypatch.setattr(prefetch, "_fastest", never)
    assert choose_renderer(renderer, ALL_PIECES, 40, 8, CPU) == renderer


@pytest.mark.usefixtures("fresh_choice")
@pytest.mark.parametrize(("reference", "device", "expected"), [(2.0, 1.0, "device"), (1.0, 2.0, "reference")])
def test_auto_is_the_faster_renderer(
    reference: float, device: float, expected: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, real = [0.0], prefetch.render_positions

    def timed(pixels: Any, table: ViewTable, positions: Any, renderer: Renderer, on: Any) -> torch.Tensor:
        clock[0] += {"reference": reference, "device": device}[renderer]
        return real(pixels, table, positions, renderer, on)

    monkeypatch.setattr(prefetch, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(prefetch, "render_positions", timed)
    assert choose_renderer("auto", ALL_PIECES, 40, 8, CPU) == expected


@pytest.mark.usefixtures("fresh_choice")
def test_auto_measures_once_per_policy_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    first = choose_renderer("auto", ALL_PIECES, 40, 8, CPU)
    assert first in RENDERERS
    monkeypatch.setattr(prefetch, "render_positions", None)
    assert choose_renderer("auto", ALL_PIECES, 40, 8, CPU) == first


@pytest.mark.usefixtures("fresh_choice")
def test_auto_warns_and_is_the_reference_where_the_device_renderer_differs(
    canvas: Canvas, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = prefetch.render_positions

    def one_level_off(pixels: Any, table: ViewTable, positions: Any, renderer: Renderer, on: Any = "cpu") -> torch.Tensor:
        views = real(pixels, table, positions, renderer, on).clone()
        if renderer == "device":
            views[-1, 2, -1, -1] ^= 1
        return views

    expected = [batch.images for batch in render_batches(canvas, ALL_PIECES, BATCHES, renderer="reference")]
    monkeypatch.setattr(prefetch, "render_positions", one_level_off)
    with pytest.warns(RuntimeWarning, match="device renderer differs from the reference"):
        assert choose_renderer("auto", ALL_PIECES, canvas.size, 23, CPU) == "reference"
    found = [batch.images for batch in render_batches(canvas, ALL_PIECES, BATCHES)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["devise", "pillow"])
def test_an_unknown_renderer_is_refused_with_the_known_ones(name: Any, canvas: Canvas) -> None:
    with pytest.raises(UsageError) as caught:
        choose_renderer(name, ALL_PIECES, 40, 8, CPU)
    assert "device" in str(caught.value)
    assert name in caught.value.what
    assert caught.value.fix == ("use 'device'" if name == "devise" else "choose one of: auto, device, reference")
    with pytest.raises(UsageError):
        next(render_batches(canvas, ALL_PIECES, BATCHES, renderer=name))


@pytest.mark.usefixtures("fresh_choice")
def test_auto_is_the_reference_where_views_are_too_small_for_the_device_renderer() -> None:
    assert choose_renderer("auto", ViewPolicy(size=2), 200, 4, CPU) == "reference"


@pytest.mark.usefixtures("fresh_choice")
def test_auto_is_the_reference_where_the_device_renderer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    real = prefetch.render_positions

    def fails(pixels: Any, table: ViewTable, positions: Any, renderer: Renderer, on: Any = "cpu") -> torch.Tensor:
        if renderer == "device":
            raise RuntimeError("out of memory")
        return real(pixels, table, positions, renderer, on)

    monkeypatch.setattr(prefetch, "render_positions", fails)
    with pytest.warns(RuntimeWarning, match="out of memory"):
        assert choose_renderer("auto", ALL_PIECES, 40, 8, CPU) == "reference"


@pytest.mark.usefixtures("fresh_choice")
def test_auto_is_measured_on_one_thread_where_workers_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    real, threads = prefetch.render_positions, []
    monkeypatch.setattr(prefetch, "render_positions", lambda *a: threads.append(torch.get_num_threads()) or real(*a))
    before = torch.get_num_threads()
    choose_renderer("auto", ALL_PIECES, 40, 8, CPU, workers=2)
    assert set(threads) == {1}
    assert torch.get_num_threads() == before
