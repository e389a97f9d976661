"""Protects the views: draws depend on (policy, view, sample) alone, and pixels are those of torchvision on Pillow."""

import dataclasses
import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy import stats as statistics
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import RandAugment as TorchvisionRandAugment
from torchvision.transforms.autoaugment import _apply_op

from kdcache.errors import KdcacheError
from kdcache.views import PRESETS, ViewPolicy, ViewTable, fingerprint, render, render_positions
from kdcache.views.policy import (
    COLUMNS,
    MIX_CUTMIX,
    MIX_MIXUP,
    MIX_NONE,
    UNIT,
    CenterCrop,
    InceptionCrop,
    Mix,
    PadCrop,
    RandAugment,
)
from kdcache.views.rendering import Renderer
from tests.squares import squares

PAPER = ViewPolicy.load("pets", size=16, seed=7)
RANDOM = sorted(set(PRESETS) - {"none"})
DRAWS = ("box", "shift", "flip", "operations", "signs")
P_VALUE = 1e-4  # of every statistical test; the seeds are fixed, so a test that passes always passes


def by_sample(table: ViewTable) -> dict[str, NDArray]:
    """The columns of a table in the order of sample numbers."""
    rank = np.argsort(table.sample)
    return {
        field.name: getattr(table, field.name)[rank]
        for field in dataclasses.fields(table)
        if field.name not in {"view", "policy"}
    }


def plain_row(policy: ViewPolicy, view: int, sample: int) -> list[float]:
    """All draws of one sample in [0, 1), by skipping what belongs to the samples before it, in plain Python."""
    raw = np.random.Philox(key=np.array([policy.seed, view], np.uint64)).random_raw((sample + 1) * COLUMNS)[-COLUMNS:]
    return [(int(word) >> 11) / 2**53 for word in raw]


# ---------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("name", RANDOM)
@given(view=st.integers(0, 2**40), few=st.integers(1, 40), more=st.integers(0, 40))
def test_a_samples_draws_do_not_depend_on_how_many_samples_there_are(name: str, view: int, few: int, more: int) -> None:
    policy = PRESETS[name].settled()
    small, large = (by_sample(policy.parameters(view, count, squares(count))) for count in (few, few + more))
    for column in DRAWS:
        np.testing.assert_array_equal(small[column], large[column][:few], err_msg=column)
    # Only the odd one out, which has no partner, is unmixed in one of the two and mixed in the other.
    both = (small["partner"] >= 0) & (large["partner"][:few] >= 0)
    assert both.sum() >= few - 2 or policy.mix is None
    for column in ("mix", "lam_units", "cut"):
        np.testing.assert_array_equal(small[column][both], large[column][:few][both], err_msg=column)


@given(view=st.integers(0, 1000), few=st.integers(1, 60), more=st.integers(0, 60))
def test_more_samples_only_insert_themselves_into_the_order(view: int, few: int, more: int) -> None:
    small, large = (PAPER.parameters(view, count, squares(count)).sample for count in (few, few + more))
    np.testing.assert_array_equal(small, large[large < few])


@pytest.mark.parametrize("sample", [0, 1, 65535, 65536, 65541])  # draws are made in slices of 65,536 samples
def test_draws_are_the_samples_own_row_of_the_raw_philox_stream(sample: int) -> None:
    policy = ViewPolicy(seed=3, size=100, crop=PadCrop(padding=4), hflip=0.5, randaugment=RandAugment(n=3, m=9), mix=Mix())
    table = policy.parameters(2, 65_544, squares(65_544))
    [at] = np.flatnonzero(table.sample == sample)
    row, u = table[at : at + 1], plain_row(policy, 2, sample)
    assert row.shift[0].tolist() == [int(u[21] * 9) - 4, int(u[22] * 9) - 4]
    assert bool(row.flip[0]) == (u[23] < 0.5)
    assert row.operations[0].tolist() == [int(x * 14) for x in u[24:27]]
    assert row.signs[0].tolist() == [-1 if x < 0.5 else 1 for x in u[28:31]]
    assert row.mix[0] == (MIX_CUTMIX if u[33] < 0.5 else MIX_MIXUP)
    assert row.lam_units[0] == int(u[34] * 65536)
    if row.mix[0] == MIX_CUTMIX:
        half = int(100 * math.sqrt(1 - row.lam_units[0] / 65536)) // 2
        x, y = int(u[35] * 100), int(u[36] * 100)
        assert row.cut[0].tolist() == [max(x - half, 0), max(y - half, 0), min(x + half, 100), min(y + half, 100)]


@given(view=st.integers(0, 2**63), count=st.integers(1, 200))
def test_the_order_is_a_permutation_and_neighbours_are_each_others_partners(view: int, count: int) -> None:
    table = PAPER.parameters(view, count, squares(count))
    np.testing.assert_array_equal(np.sort(table.sample), np.arange(count))
    paired = count - count % 2
    np.testing.assert_array_equal(table.partner[:paired], table.sample[np.arange(paired) ^ 1])
    if count % 2:
        assert (table.partner[-1], table.mix[-1], table.lam_units[-1], table.lam[-1]) == (-1, MIX_NONE, UNIT, 1.0)
        assert not table.cut[-1].any()


@given(
    view=st.integers(0, 100),
    probability=st.sampled_from([0.0, 0.4, 1.0]),
    cutmix=st.sampled_from([0.0, 0.5, 1.0]),
    size=st.integers(1, 64),
)
def test_mixing_draws_are_consistent_with_their_kind(view: int, probability: float, cutmix: float, size: int) -> None:
    table = ViewPolicy(size=size, mix=Mix(probability=probability, cutmix=cutmix)).parameters(view, 64, squares(64))
    unmixed, mixup, is_cutmix = (table.mix == kind for kind in (MIX_NONE, MIX_MIXUP, MIX_CUTMIX))
    assert (table.partner[unmixed] == -1).all()
    assert (table.lam[unmixed] == 1).all()
    assert (table.partner[~unmixed] >= 0).all()
    assert not table.cut[~is_cutmix].any()
    assert ((table.cut >= 0) & (table.cut <= size)).all()
    assert (table.cut[:, :2] <= table.cut[:, 2:]).all()
    assert ((table.lam >= 0) & (table.lam <= 1)).all()
    np.testing.assert_array_equal(table.lam[mixup], table.lam_units[mixup] / 65536)
    left, top, right, bottom = table.cut[is_cutmix].astype(float).T
    np.testing.assert_allclose(table.lam[is_cutmix], 1 - (right - left) * (bottom - top) / size**2, atol=1e-15)
    if probability == 0:
        assert unmixed.all()
    elif probability == 1:
        assert not unmixed.any()
        assert cutmix == 0.5 or is_cutmix.all() == (cutmix == 1)


@given(seed=st.integers(0, 2**64 - 2), view=st.integers(0, 2**62))
def test_another_seed_or_another_view_draws_other_parameters(seed: int, view: int) -> None:
    first = PAPER.model_copy(update={"seed": seed}).parameters(view, 16, squares(16))
    for other in (
        PAPER.model_copy(update={"seed": seed + 1}).parameters(view, 16, squares(16)),
        PAPER.model_copy(update={"seed": seed}).parameters(view + 1, 16, squares(16)),
    ):
        assert (by_sample(first)["box"] != by_sample(other)["box"]).any(axis=1).all()
        assert (first.sample != other.sample).any()


def test_seed_and_view_are_not_added_to_each_other() -> None:
    one, other = (PAPER.model_copy(update={"seed": s}).parameters(v, 16, squares(16)) for s, v in ((1, 2), (2, 1)))
    assert (by_sample(one)["box"] != by_sample(other)["box"]).any(axis=1).all()


@given(
    view=st.integers(0, 1000),
    scale=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)).map(sorted),
    ratio=st.tuples(st.floats(0.3, 3), st.floats(0.3, 3)).map(sorted),
)
def test_inception_boxes_lie_inside_the_canvas_with_allowed_area_and_ratio(
    view: int, scale: list[float], ratio: list[float]
) -> None:
    policy = ViewPolicy(crop=InceptionCrop(scale=tuple(scale), ratio=tuple(ratio)))
    box = policy.parameters(view, 200, squares(200)).box.astype(np.int64)
    assert ((box >= 0) & (box <= UNIT)).all()
    width, height = ((box[:, 2:] - box[:, :2]) / UNIT).T
    assert (width > 0).all()
    assert (height > 0).all()
    shape = width / height
    assert (shape > ratio[0] * (1 - 1e-3)).all()
    assert (shape < ratio[1] * (1 + 1e-3)).all()
    # Ten attempts may all stick out of the canvas; then it is the largest central box, whose area is another.
    nearest = min(max(1.0, ratio[0]), ratio[1])
    fallback = np.isclose(width, min(1, nearest), atol=1e-4) & np.isclose(height, min(1, 1 / nearest), atol=1e-4)
    area = (width * height)[~fallback]
    assert (area > scale[0] - 1e-4).all()
    assert (area < scale[1] + 1e-4).all()


@pytest.mark.parametrize(("ratio", "width", "height"), [(2.0, 1.0, 0.5), (0.5, 0.5, 1.0)])
def test_a_crop_that_never_fits_falls_back_to_the_largest_central_box(ratio: float, width: float, height: float) -> None:
    policy = ViewPolicy(crop=InceptionCrop(scale=(1.0, 1.0), ratio=(ratio, ratio)))
    expected = np.array([1 - width, 1 - height, 1 + width, 1 + height]) * (UNIT // 2)
    np.testing.assert_array_equal(policy.parameters(0, 5, squares(5)).box, np.tile(expected, (5, 1)))


def test_the_digest_tells_policies_apart_and_survives_json() -> None:
    policies = [
        *map(ViewPolicy.load, PRESETS),
        PAPER,
        PAPER.model_copy(update={"seed": 8}),
        ViewPolicy.load("pets", size=17, seed=7),
    ]
    digests = [policy.digest for policy in policies]
    assert len(set(digests)) == len(set(policies)) == len(policies) - 1  # pets and imagenet are the same policy
    assert [ViewPolicy.model_validate_json(policy.model_dump_json()).digest for policy in policies] == digests


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"size": 5000},
        {"hflip": 1.5},
        {"seed": -1},
        {"crop": {"kind": "inception", "scale": [0.9, 0.1]}},
        {"randaugment": {"m": 31}},
        {"randaugment": {"n": 5}},
        {"mix": {"probability": 2}},
        {"colour": 1},
        {"version": 3},
    ],
)
def test_a_policy_with_an_impossible_field_is_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(KdcacheError) as caught:
        ViewPolicy.load("pets", **wrong)
    assert next(iter(wrong)) in str(caught.value)
    assert caught.value.exit_code == 2


# ---------------------------------------------------------------- how it is distributed


@pytest.fixture(scope="module")
def many() -> dict[str, NDArray]:
    return by_sample(ViewPolicy.load("pets").parameters(0, 20_000, squares(20_000)))


def is_uniform(values: NDArray, below: float, bins: int) -> bool:
    counts, _ = np.histogram(values, bins=bins, range=(0, below))
    assert counts.sum() == len(values)
    return bool(statistics.chisquare(counts).pvalue > P_VALUE)


def test_crop_positions_are_uniform_over_the_room_that_is_left(many: dict[str, NDArray]) -> None:
    left, top, right, bottom = many["box"].astype(np.int64).T
    for start, length in ((left, right - left), (top, bottom - top)):
        roomy = length < UNIT * 0.9
        assert roomy.mean() > 0.5
        assert is_uniform((start[roomy] + 0.5) / (UNIT - length[roomy] + 1), 1, 20)


def test_crop_areas_and_log_ratios_are_uniform_where_no_attempt_is_rejected() -> None:
    policy = ViewPolicy(crop=InceptionCrop(scale=(0.1, 0.6), ratio=(0.7, 1 / 0.7)))
    left, top, right, bottom = policy.parameters(1, 20_000, squares(20_000)).box.astype(float).T / UNIT
    area, ratio = (right - left) * (bottom - top), (right - left) / (bottom - top)
    assert is_uniform(np.clip((area - 0.1) / 0.5, 0, 1), 1, 20)
    assert is_uniform(np.clip(np.log(ratio / 0.7) / np.log(1 / 0.49), 0, 1), 1, 20)


def test_each_operation_comes_equally_often_in_each_place_and_after_each_other(many: dict[str, NDArray]) -> None:
    first, second = many["operations"].astype(int).T
    assert statistics.chisquare(np.bincount(first * 14 + second, minlength=196)).pvalue > P_VALUE


def test_signs_flips_and_kinds_of_mixing_are_fair_coins(many: dict[str, NDArray]) -> None:
    for coin in (many["signs"][:, 0] > 0, many["signs"][:, 1] > 0, many["flip"], many["mix"] == MIX_CUTMIX):
        assert statistics.binomtest(int(coin.sum()), len(coin)).pvalue > P_VALUE


def test_lambda_is_uniform_for_either_kind_of_mixing(many: dict[str, NDArray]) -> None:
    for kind in (MIX_MIXUP, MIX_CUTMIX):
        assert is_uniform(many["lam_units"][many["mix"] == kind], UNIT, 32)


def test_cutmix_boxes_are_centred_anywhere(many: dict[str, NDArray]) -> None:
    small = (many["mix"] == MIX_CUTMIX) & (many["lam_units"] > 0.97 * UNIT)
    left, top, right, bottom = many["cut"][small].T
    for low, high in ((left, right), (top, bottom)):
        inside = (low > 0) & (high < 224)  # not clipped, so the middle is the drawn centre
        middle = (low + high)[inside] / 2
        assert is_uniform(middle[(middle >= 24) & (middle < 200)] - 24, 176, 8)


def test_the_order_is_spread_evenly() -> None:
    table = PAPER.parameters(0, 20_000, squares(20_000))
    assert abs(np.corrcoef(table.sample, np.arange(20_000))[0, 1]) < 4 / math.sqrt(20_000)
    assert abs(np.corrcoef(table.sample[:-1], table.sample[1:])[0, 1]) < 4 / math.sqrt(20_000)


def test_neighbouring_samples_and_views_are_uncorrelated() -> None:
    here, there = (by_sample(PAPER.parameters(view, 20_000, squares(20_000))) for view in (4, 5))
    columns = [
        (
            table["box"][:, 0],
            table["box"][:, 3],
            table["flip"],
            table["operations"][:, 0],
            table["signs"][:, 1],
            table["lam_units"],
        )
        for table in (here, there)
    ]
    bound = 4.5 / math.sqrt(20_000)
    for a, b in zip(*columns, strict=True):
        assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < bound
        assert abs(np.corrcoef(a, b)[0, 1]) < bound
    for one, other in ((2, 3), (2, 4), (2, 5), (3, 4), (3, 5), (4, 5)):  # and so are the draws of one view
        assert abs(np.corrcoef(columns[0][one], columns[0][other])[0, 1]) < bound


# ---------------------------------------------------------------- what is rendered


@pytest.fixture(params=get_args(Renderer))
def renderer(request: pytest.FixtureRequest) -> Renderer:
    """Each of the two in turn: what is said of pixels below holds for both."""
    renderer: Renderer = request.param
    return renderer


def to_pil(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def from_pil(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image).transpose(2, 0, 1)


def still(table: ViewTable, **columns: NDArray) -> ViewTable:
    """`table` with some columns replaced."""
    return dataclasses.replace(table, **columns)


def test_the_first_preset_draws_nothing_and_shows_the_whole_canvas(photos: NDArray[np.uint8], renderer: Renderer) -> None:
    table = ViewPolicy.load("none", size=40).parameters(5, len(photos), squares(len(photos)))
    views = render(torch.from_numpy(photos[table.sample]), table, renderer)
    np.testing.assert_array_equal(views.numpy(), photos[table.sample])


@pytest.mark.parametrize("size", [16, 40, 57])
def test_crop_is_pillows_resize_of_the_drawn_box(photos: NDArray[np.uint8], size: int, renderer: Renderer) -> None:
    policy = ViewPolicy(size=size, crop=InceptionCrop(), hflip=0.0)
    table = policy.parameters(0, len(photos), squares(len(photos)))
    views = render(torch.from_numpy(photos[table.sample]), table, renderer).numpy()
    for view, sample, box in zip(views, table.sample, table.box, strict=True):
        edges = tuple(float(np.float32(edge * 40 / 65536)) for edge in box.tolist())
        expected = to_pil(photos[sample]).resize((size, size), Image.Resampling.BILINEAR, box=edges)
        np.testing.assert_array_equal(view, from_pil(expected))


def test_a_crop_on_whole_pixels_is_torchvisions_resized_crop_away_from_its_border(
    photos: NDArray[np.uint8], renderer: Renderer
) -> None:
    table = ViewPolicy(size=24, crop=InceptionCrop(), hflip=0.0).parameters(0, 1, squares(1))
    for left, top, side in ((5, 10, 15), (0, 0, 40), (15, 5, 25)):  # multiples of 5 of 40 pixels are exact in 1/65536
        box = np.array([[left, top, left + side, top + side]], np.int32) * UNIT // 40
        view = render(torch.from_numpy(photos[:1]), still(table, box=box), renderer)[0].numpy()
        other = F.resized_crop(to_pil(photos[0]), top, left, side, side, [24, 24], InterpolationMode.BILINEAR)
        inner = (slice(None), slice(2, -2), slice(2, -2))  # at its border torchvision no longer sees what it cut away
        np.testing.assert_array_equal(view[inner], from_pil(other)[inner])


def test_flip_mirrors_the_crop_from_left_to_right(photos: NDArray[np.uint8], renderer: Renderer) -> None:
    images = torch.from_numpy(photos)
    table = ViewPolicy(size=32, crop=InceptionCrop(), hflip=0.5).parameters(0, len(photos), squares(len(photos)))
    table = still(table, sample=np.arange(len(photos)))
    straight, mirrored = (render(images, still(table, flip=np.full(len(photos), flip)), renderer) for flip in (False, True))
    assert torch.equal(mirrored, straight.flip(3))
    assert torch.equal(
        render(images, table, renderer), torch.where(torch.from_numpy(table.flip).view(-1, 1, 1, 1), mirrored, straight)
    )


def test_pad_crop_is_padding_with_black_and_cropping(photos: NDArray[np.uint8], renderer: Renderer) -> None:
    table = ViewPolicy(size=40, crop=PadCrop(padding=4), hflip=0.0).parameters(0, len(photos), squares(len(photos)))
    assert len(np.unique(table.shift)) > 4
    views = render(torch.from_numpy(photos[table.sample]), table, renderer).numpy()
    for view, sample, (dx, dy) in zip(views, table.sample, table.shift, strict=True):
        padded = np.pad(photos[sample], ((0, 0), (4, 4), (4, 4)))
        np.testing.assert_array_equal(view, padded[:, 4 + dy : 44 + dy, 4 + dx : 44 + dx])


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("bins", "interpolation", "fill", "size", "step"),
    [
        (31, "nearest", 0, 40, 1),
        (31, "nearest", 0, 331, 4),  # at 331 pixels shifts are whole before they are cut off, so the last bit decides
        (31, "bilinear", 0, 40, 5),
        (11, "nearest", 128, 40, 1),
        (5, "nearest", 0, 40, 1),
    ],
)
def test_every_operation_at_every_magnitude_and_sign_is_torchvisions(
    photos: NDArray[np.uint8], bins: int, interpolation: str, fill: int, size: int, step: int, renderer: Renderer
) -> None:
    reference = TorchvisionRandAugment(
        num_magnitude_bins=bins, interpolation=InterpolationMode(interpolation), fill=[float(fill)] * 3
    )
    space = reference._augmentation_space(bins, (size, size))
    names = list(space)
    cases = [(operation, sign) for operation in range(len(names)) for sign in (-1, 1)]
    picture = np.tile(photos[4], (1, 9, 9))[:, :size, :size]
    for m in range(0, bins, step):
        options = RandAugment(n=1, m=m, bins=bins, interpolation=interpolation, fill=fill)
        policy = ViewPolicy(size=size, hflip=0.0, randaugment=options)
        table = still(
            policy.parameters(0, len(cases), squares(len(cases))),
            operations=np.array([[operation] for operation, _ in cases], np.uint8),
            signs=np.array([[sign] for _, sign in cases], np.int8),
        )
        views = render(torch.from_numpy(np.repeat(picture[None], len(cases), axis=0)), table, renderer).numpy()
        for view, (operation, sign) in zip(views, cases, strict=True):
            magnitudes, signed = space[names[operation]]
            magnitude = float(magnitudes[m].item()) if magnitudes.ndim > 0 else 0.0
            expected = _apply_op(
                to_pil(picture),
                names[operation],
                sign * magnitude if signed else magnitude,
                reference.interpolation,
                reference.fill,
            )
            np.testing.assert_array_equal(view, from_pil(expected), err_msg=f"{names[operation]} m={m} sign={sign}")


def test_operations_are_applied_one_after_the_other_in_the_drawn_order(photos: NDArray[np.uint8], renderer: Renderer) -> None:
    policy = ViewPolicy(size=40, crop=InceptionCrop(), randaugment=RandAugment(n=4, m=14))
    table = policy.parameters(3, len(photos), squares(len(photos)))
    both = render(torch.from_numpy(photos[table.sample]), table, renderer)
    before = policy.model_copy(update={"randaugment": None})
    expected = render(torch.from_numpy(photos[table.sample]), still(table, policy=before), renderer)
    for step in range(4):
        one = ViewPolicy(size=40, hflip=0.0, randaugment=RandAugment(n=1, m=14))
        rows = still(
            one.parameters(0, len(photos), squares(len(photos))),
            operations=table.operations[:, [step]],
            signs=table.signs[:, [step]],
        )
        expected = render(expected, rows, renderer)
    assert torch.equal(both, expected)


def test_mixup_is_the_documented_integer_formula_and_cutmix_copies_a_box(photos: NDArray[np.uint8], renderer: Renderer) -> None:
    plain = ViewPolicy(size=20, crop=InceptionCrop(), seed=1)
    policy = plain.model_copy(update={"mix": Mix()})
    table = policy.parameters(0, len(photos), squares(len(photos)))
    canvas = torch.from_numpy(photos[table.sample])
    alone, mixed = (
        render(canvas, still(table, policy=plain, partner=np.full(len(photos), -1)), renderer).tolist(),
        render(canvas, table, renderer).tolist(),
    )
    assert {MIX_MIXUP, MIX_CUTMIX} == set(table.mix.tolist())
    for j in range(len(photos)):
        own, other, share = alone[j], alone[j ^ 1], int(table.lam_units[j])
        left, top, right, bottom = table.cut[j].tolist()
        for c in range(3):
            for y in range(20):
                for x in range(20):
                    a, b = own[c][y][x], other[c][y][x]
                    if table.mix[j] == MIX_MIXUP:
                        expected = (a * share + b * (65536 - share) + 32768) >> 16
                    else:
                        expected = b if left <= x < right and top <= y < bottom else a
                    assert mixed[j][c][y][x] == expected, (j, c, y, x)


def test_lam_is_the_share_of_the_samples_own_pixels(renderer: Renderer) -> None:
    table = ViewPolicy(size=32, hflip=0.0, mix=Mix()).parameters(0, 64, squares(64))
    white = np.where(np.arange(64) % 2 == 0, 255, 0).astype(np.uint8)  # by position: each pair is one white, one black
    views = render(torch.from_numpy(np.broadcast_to(white[:, None, None, None], (64, 3, 8, 8)).copy()), table, renderer)
    own = np.where(white > 0, views.double().mean(dim=(1, 2, 3)) / 255, 1 - views.double().mean(dim=(1, 2, 3)) / 255)
    is_cutmix = table.mix == MIX_CUTMIX
    np.testing.assert_allclose(own[is_cutmix], table.lam[is_cutmix], atol=1e-12)
    np.testing.assert_allclose(own[~is_cutmix], table.lam[~is_cutmix], atol=0.5 / 255 + 1e-9)


@pytest.mark.parametrize("count", [11, 12])
@given(data=st.data())
def test_any_subset_order_and_batching_of_positions_gives_the_same_views(
    photos: NDArray[np.uint8], count: int, data: st.DataObject, renderer: Renderer
) -> None:
    pixels, table = photos[:count], PAPER.model_copy(update={"mix": Mix(probability=0.8)}).parameters(1, count, squares(count))
    whole = render_positions(pixels, table, np.arange(count), renderer)
    positions = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=2 * count)))
    assert torch.equal(render_positions(pixels, table, positions, renderer), whole[torch.from_numpy(positions)])
    cut = data.draw(st.integers(0, len(positions)))
    parts = [render_positions(pixels, table, part, renderer) for part in (positions[:cut], positions[cut:]) if len(part)]
    assert torch.equal(torch.cat(parts), whole[torch.from_numpy(positions)])


def test_render_of_an_even_aligned_range_needs_no_others(photos: NDArray[np.uint8], renderer: Renderer) -> None:
    table = PAPER.parameters(1, len(photos), squares(len(photos)))
    rows = table[4:10]
    expected = render_positions(photos, table, np.arange(4, 10), renderer)
    assert torch.equal(render(torch.from_numpy(photos[rows.sample]), rows, renderer), expected)


@pytest.mark.parametrize("positions", [slice(1, 2), slice(0, 3), slice(1, 5), np.array([0, 2, 1, 3])])
def test_render_without_the_mixing_partner_is_refused(photos: NDArray[np.uint8], positions: slice | NDArray[np.int64]) -> None:
    rows = PAPER.parameters(1, len(photos), squares(len(photos)))[positions]
    with pytest.raises(ValueError, match="partner"):
        render(torch.from_numpy(photos[rows.sample]), rows)


def test_render_refuses_other_shapes_and_types(photos: NDArray[np.uint8]) -> None:
    rows = PAPER.parameters(0, 4, squares(4))
    images = torch.from_numpy(photos[:4])
    for wrong in (images.float(), images[:3], images[:, :1], images[..., :20], images[0]):
        with pytest.raises(ValueError, match="images"):
            render(wrong, rows)


# ---------------------------------------------------------------- fingerprints


def naive_fingerprint(view: NDArray[np.uint8], version: int) -> int:
    """The documented weighted sum modulo 2^64, one word at a time."""
    data, size = view.tobytes(), 4 * version
    data += b"\0" * (-len(data) % size)
    weights = np.random.Philox(key=np.array([0x6B64_6361_6368_6500, 1], np.uint64)).random_raw(len(data) // size)
    total = 0
    for i, weight in enumerate(weights.tolist()):
        total += int.from_bytes(data[size * i : size * (i + 1)], "little", signed=True) * (weight | 1)
    total %= 1 << 64
    return (total >> 32) ^ (total & 0xFFFFFFFF)


@pytest.mark.parametrize("version", [1, 2])
@given(side=st.integers(1, 21), seed=st.integers(0, 1000))
def test_the_digest_is_the_documented_sum_and_rows_do_not_influence_each_other(version: int, side: int, seed: int) -> None:
    views = np.random.default_rng(seed).integers(0, 256, (3, 3, side, side), dtype=np.uint8)
    digest, _ = fingerprint(torch.from_numpy(views), version)
    assert digest.tolist() == [naive_fingerprint(view, version) for view in views]


@pytest.mark.parametrize("version", [1, 2])
@given(side=st.integers(1, 21), data=st.data())
def test_the_digest_changes_when_any_single_byte_changes(version: int, side: int, data: st.DataObject) -> None:
    view = np.random.default_rng(side).integers(0, 256, (1, 3, side, side), dtype=np.uint8)
    where = data.draw(st.integers(0, view.size - 1))
    by = data.draw(st.integers(1, 255))
    changed = view.copy()
    changed.reshape(-1)[where] ^= by
    before, after = (fingerprint(torch.from_numpy(v), version)[0][0] for v in (view, changed))
    assert before != after


@given(side=st.integers(4, 40), seed=st.integers(0, 1000))
def test_the_grid_holds_the_floors_of_the_means_of_its_cells(side: int, seed: int) -> None:
    views = np.random.default_rng(seed).integers(0, 256, (2, 3, side, side), dtype=np.uint8)
    views[1] = 255
    _, grid = fingerprint(torch.from_numpy(views))
    edges = [side * i // 4 for i in range(5)]
    cells = [
        np.floor(views[:, :, top:bottom, left:right].reshape(2, -1).mean(axis=1) + 1e-9)
        for top, bottom in itertools.pairwise(edges)
        for left, right in itertools.pairwise(edges)
    ]
    np.testing.assert_array_equal(grid, np.stack(cells, axis=1))


def test_a_fingerprint_does_not_depend_on_how_the_tensor_lies_in_memory(photos: NDArray[np.uint8]) -> None:
    views = torch.from_numpy(photos)
    strided = views.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not strided.is_contiguous()
    for one, other in zip(fingerprint(views), fingerprint(strided), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_centre_crop_takes_the_middle(photos: NDArray[np.uint8], renderer: Renderer) -> None:
    table = ViewPolicy(size=20, crop=CenterCrop(fraction=0.5), hflip=0.0).parameters(0, 1, squares(1))
    assert table.box.tolist() == [[UNIT // 4, UNIT // 4, 3 * UNIT // 4, 3 * UNIT // 4]]
    view = render(torch.from_numpy(photos[:1]), table, renderer)[0].numpy()
    np.testing.assert_array_equal(view, photos[0, :, 10:30, 10:30])  # half of 40 pixels at 20 pixels: a plain copy


def test_views_that_begin_anywhere_in_memory_have_digests() -> None:
    views = torch.arange(4 * 3 * 8 * 8 + 1).to(torch.uint8)[1:].view(4, 3, 8, 8)
    np.testing.assert_array_equal(fingerprint(views)[0], fingerprint(views.clone())[0])
