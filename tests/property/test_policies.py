"""Protects what a policy says: the draws of colour jitter, erasing and Beta mixing, and policies written as text or in files."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats as statistics

from kdcache.errors import KdcacheError, NotFoundError, UsageError
from kdcache.views import PRESETS, ViewPolicy, ViewTable
from kdcache.views.policy import (
    JITTER_NONE,
    UNIT,
    CenterCrop,
    ColorJitter,
    InceptionCrop,
    Mix,
    PadCrop,
    RandAugment,
    RandomErasing,
)
from tests.property.test_renderers import POLICIES
from tests.property.test_views import P_VALUE, by_sample, is_uniform, plain_row
from tests.squares import squares

STRONG = ColorJitter(brightness=0.4, contrast=0.8, saturation=1.5, hue=0.3)
MANY = 20_000


def columns(policy: ViewPolicy, view: int = 0, count: int = MANY) -> dict[str, NDArray]:
    return by_sample(policy.parameters(view, count, squares(count)))


# ---------------------------------------------------------------- which draws


@pytest.mark.parametrize("sample", [0, 1, 2, 65535, 65536])
def test_draws_of_the_later_pieces_are_columns_37_to_62_of_the_samples_own_row(sample: int) -> None:
    policy = ViewPolicy(
        seed=3,
        size=100,
        jitter=STRONG.model_copy(update={"probability": 0.6}),
        erase=RandomErasing(probability=0.7, scale=(0.1, 0.9), ratio=(0.3, 3.3)),
        mix=Mix(beta=0.4),
    )
    table = policy.parameters(2, 65_538, squares(65_538))
    [at] = np.flatnonzero(table.sample == sample)
    row, u = table[at : at + 1], plain_row(policy, 2, sample)

    ranges = [(0.6, 1.4), (1 - 0.8, 1.8), (0.0, 2.5)]
    factors = [math.floor((low + x * (high - low)) * 65536) for (low, high), x in zip(ranges, u[37:40], strict=True)]
    assert row.factors[0].tolist() == [*factors, math.trunc((2 * u[40] - 1) * 0.3 * 255)]
    order = sorted(range(4), key=lambda i: u[41 + i])
    assert row.jitter[0].tolist() == (order if u[45] < 0.6 else [4, 4, 4, 4])

    box = [0, 0, 0, 0]
    for area_draw, ratio_draw in zip(u[49:56], u[56:63], strict=True):
        area, ratio = 10_000 * (0.1 + area_draw * 0.8), math.exp(math.log(0.3) + ratio_draw * math.log(11))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height < 100 and width < 100:
            left, top = int(u[47] * (100 - width + 1)), int(u[48] * (100 - height + 1))
            box = [left, top, left + width, top + height]
            break
    assert row.erase[0].tolist() == (box if u[46] < 0.7 else [0, 0, 0, 0])

    lam = row.lam_units[0] / 65536
    assert statistics.beta.cdf(lam, 0.4, 0.4) <= u[34] < statistics.beta.cdf(lam + 1 / 65536, 0.4, 0.4)


LATER: dict[str, tuple[Any, set[str]]] = {
    "jitter": (STRONG, {"jitter", "factors"}),
    "erase": (RandomErasing(), {"erase"}),
    "mix": (Mix(beta=0.2), {"mix", "partner", "lam_units", "cut"}),
    "randaugment": (RandAugment(n=4, m=3), {"operations", "signs"}),
    "filter": ("bicubic", set()),
    "crop": (PadCrop(), {"box", "shift"}),
}


@pytest.mark.parametrize("piece", LATER)
@given(view=st.integers(0, 2**40), seed=st.integers(0, 2**64 - 1))
def test_adding_a_piece_moves_no_other_draw(piece: str, view: int, seed: int) -> None:
    full = ViewPolicy(size=40, seed=seed, crop=InceptionCrop(), randaugment=RandAugment(), jitter=STRONG, erase=RandomErasing())
    for policy in (ViewPolicy(size=40, seed=seed), full.model_copy(update={"mix": Mix()})):
        added, its_own = LATER[piece]
        before, after = (columns(p, view, 41) for p in (policy, ViewPolicy.model_validate(policy.model_dump() | {piece: added})))
        assert before.keys() >= its_own
        for name in before.keys() - its_own:
            np.testing.assert_array_equal(before[name], after[name], err_msg=name)


def test_a_changed_strength_keeps_the_order_and_the_boxes_place_in_the_room() -> None:
    weak, strong = (columns(ViewPolicy(jitter=ColorJitter(brightness=s, hue=s)), count=100) for s in (0.1, 0.5))
    np.testing.assert_array_equal(weak["jitter"], strong["jitter"])
    assert (weak["factors"][:, 0] != strong["factors"][:, 0]).all()


# ---------------------------------------------------------------- colour jitter


def test_jitter_factors_are_uniform_in_their_ranges() -> None:
    factors = columns(ViewPolicy(jitter=STRONG))["factors"]
    for factor, (low, high) in zip(factors.T[:3], [(0.6, 1.4), (0.2, 1.8), (0.0, 2.5)], strict=True):
        assert is_uniform((factor + 0.5) / UNIT - low, high - low, 25)
    levels = np.bincount(factors[:, 3] + 76, minlength=153)  # 0.3 * 255 = 76.5: from -76 to 76
    expected = np.full(153, 1 / 153.0)
    expected[76] *= 2  # both -0.9 and 0.9 are cut off to 0
    expected[[0, 152]] /= 2
    assert statistics.chisquare(levels, expected / expected.sum() * MANY).pvalue > P_VALUE


def test_all_24_orders_of_the_jitter_come_equally_often() -> None:
    table = columns(ViewPolicy(jitter=STRONG))
    orders = {order: i for i, order in enumerate(itertools.permutations(range(4)))}
    counts = np.bincount([orders[tuple(order)] for order in table["jitter"].tolist()], minlength=24)
    assert statistics.chisquare(counts).pvalue > P_VALUE


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.8, 1.0])
def test_jitter_is_left_out_as_a_whole_and_as_often_as_asked(probability: float) -> None:
    operations = columns(ViewPolicy(jitter=STRONG.model_copy(update={"probability": probability})))["jitter"]
    absent = (operations == JITTER_NONE).sum(axis=1)
    assert set(absent.tolist()) <= {0, 4}
    assert statistics.binomtest(int((absent == 0).sum()), MANY, probability).pvalue > P_VALUE


@pytest.mark.parametrize("names", [("brightness",), ("contrast", "hue"), ("brightness", "saturation", "hue"), ()])
def test_operations_without_strength_are_left_out_and_the_others_keep_a_fair_order(names: tuple[str, ...]) -> None:
    used = {"brightness": 0, "contrast": 1, "saturation": 2, "hue": 3}
    operations = columns(ViewPolicy(jitter=ColorJitter(**dict.fromkeys(names, 0.2))))["jitter"]
    orders = list(itertools.permutations(used[name] for name in names))
    found = [tuple(x for x in row if x != JITTER_NONE) for row in operations.tolist()]
    assert set(found) == set(orders)
    if len(orders) > 1:
        assert statistics.chisquare([found.count(order) for order in orders]).pvalue > P_VALUE


# ---------------------------------------------------------------- erasing


@given(
    view=st.integers(0, 1000),
    size=st.integers(1, 64),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    ratio=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)).map(sorted),
)
def test_erased_boxes_lie_inside_the_view_with_allowed_area_and_ratio(
    view: int, size: int, scale: list[float], ratio: list[float]
) -> None:
    erase = RandomErasing(probability=1, scale=tuple(scale), ratio=tuple(ratio))
    box = ViewPolicy(size=size, erase=erase).parameters(view, 200, squares(200)).erase.astype(float)
    assert ((box >= 0) & (box <= size)).all()
    width, height = (box[:, 2:] - box[:, :2]).T
    assert (width >= 0).all()
    assert (height >= 0).all()
    there = box[:, 2:].any(axis=1)
    w, h = width[there], height[there]
    assert (w < size).all()
    assert (h < size).all()
    # Sides are rounded to whole pixels: half a pixel either way.
    assert ((w - 0.5).clip(0) * (h - 0.5).clip(0) <= scale[1] * size**2 * (1 + 1e-9)).all()
    assert ((w + 0.5) * (h + 0.5) >= scale[0] * size**2 * (1 - 1e-9)).all()
    assert ((h - 0.5).clip(0) <= ratio[1] * (w + 0.5)).all()
    assert ((h + 0.5) * (1 + 1e-9) >= ratio[0] * (w - 0.5)).all()


def erased(scale: tuple[float, float], ratio: tuple[float, float], size: int = 4096) -> tuple[NDArray, ...]:
    """Left, top, width, height of 20,000 erased boxes."""
    policy = ViewPolicy(size=size, erase=RandomErasing(probability=1, scale=scale, ratio=ratio))
    left, top, right, bottom = columns(policy, 1)["erase"].T
    return left, top, right - left, bottom - top


def test_erased_areas_and_log_ratios_are_uniform_where_no_attempt_is_rejected() -> None:
    _, _, width, height = erased((0.05, 0.45), (0.5, 2.0))
    assert is_uniform(np.clip((width * height / 4096**2 - 0.05) / 0.4, 0, 1), 1, 20)
    assert is_uniform(np.clip(np.log2(height / width) + 1, 0, 2), 2, 20)


def test_erased_boxes_are_anywhere_in_the_room_that_is_left() -> None:
    left, top, width, height = erased((0.02, 0.33), (0.3, 3.3))
    across, down = (left + 0.5) / (4096 - width + 1), (top + 0.5) / (4096 - height + 1)
    roomy = (width < 3500) & (height < 3500)
    assert roomy.mean() > 0.9
    assert is_uniform(across[roomy], 1, 20)
    assert is_uniform(down[roomy], 1, 20)
    assert abs(np.corrcoef(across, down)[0, 1]) < 4.5 / math.sqrt(MANY)


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_views_are_erased_as_often_as_asked(probability: float) -> None:
    box = columns(ViewPolicy(size=224, erase=RandomErasing(probability=probability)))["erase"]
    assert statistics.binomtest(int(box.any(axis=1).sum()), MANY, probability).pvalue > P_VALUE


# ---------------------------------------------------------------- lambda, independence


@pytest.mark.parametrize("beta", [0.2, 1.0, 3.0])
def test_lambda_has_the_beta_distribution_that_is_asked_for(beta: float) -> None:
    lam = columns(ViewPolicy(mix=Mix(beta=beta)))["lam_units"]
    assert lam.min() >= 0
    assert lam.max() < UNIT
    edges = np.linspace(0, UNIT, 33)
    counts, _ = np.histogram(lam, edges)
    expected = np.diff(statistics.beta.cdf(edges / UNIT, beta, beta)) * MANY
    assert statistics.chisquare(counts, expected).pvalue > P_VALUE
    # Far out as well, where the density of Beta(0.2, 0.2) is largest.
    for below in (1, 16, 256):
        for tail in (lam < below, lam >= UNIT - below):
            share = statistics.beta.cdf(below / UNIT, beta, beta)
            assert statistics.binomtest(int(tail.sum()), MANY, share).pvalue > P_VALUE


def test_beta_of_1_is_the_uniform_lambda() -> None:
    uniform, beta = (columns(ViewPolicy(mix=mix))["lam_units"] for mix in (Mix(), Mix(beta=1.0)))
    assert np.abs(uniform - beta).max() <= 1


def test_draws_of_the_later_pieces_are_uncorrelated_between_samples_views_and_with_each_other() -> None:
    policy = ViewPolicy(crop=InceptionCrop(), randaugment=RandAugment(), jitter=STRONG, erase=RandomErasing(probability=1))
    here, there = (
        np.column_stack([table["factors"], table["jitter"][:, [0, 3]], table["erase"][:, :2], table["box"][:, :2], table["flip"]])
        for table in (columns(policy, 6), columns(policy, 7))
    )
    bound = 4.5 / math.sqrt(MANY)
    width = here.shape[1]
    within = np.corrcoef(here.T)
    for i, j in itertools.combinations(range(width), 2):
        # Places within one order exclude each other, and so do large widths and heights of a box.
        if (i, j) not in {(4, 5), (6, 7), (8, 9)}:
            assert abs(within[i, j]) < bound, (i, j)
    assert np.abs(np.corrcoef(here.T, there.T)[:width, width:]).max() < bound
    assert np.abs(np.corrcoef(here[:-1].T, here[1:].T)[:width, width:]).max() < bound


# ---------------------------------------------------------------- policies as text


PETS = PRESETS["pets"].settled()
SQUASHED = CenterCrop(mode="squash")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("pets", PETS),
        ("pets:", PETS),
        (
            "pets:hflip=0,randaugment.m=9,mix=none,crop.scale=[0.2,1]",
            ViewPolicy(hflip=0, crop=InceptionCrop(scale=(0.2, 1.0)), randaugment=RandAugment(m=9)),
        ),
        (
            "pets: hflip=0, crop.scale=[0.2, 1]",
            PETS.model_copy(update={"hflip": 0.0, "crop": InceptionCrop(scale=(0.2, 1))}),
        ),
        ("pets:crop.kind=pad,crop.padding=2", PETS.model_copy(update={"crop": PadCrop(padding=2)})),
        ("pets:crop.kind=inception,size=32", PETS.model_copy(update={"size": 32})),
        ("cifar:crop.kind=inception", PETS.model_copy(update={"size": 32})),
        ("pets:version=1", PETS.model_copy(update={"version": 1})),
        ("none:version=1", ViewPolicy(version=1, hflip=0)),
        ("eval:crop.mode=squash", ViewPolicy(crop=CenterCrop(fraction=0.875, mode="squash"), hflip=0)),
        ("crd:crop.kind=center,crop.fraction=0.5", ViewPolicy(size=32, crop=CenterCrop(fraction=0.5))),
        ("eval:size=299,filter=bicubic", ViewPolicy(size=299, crop=CenterCrop(fraction=0.875), hflip=0, filter="bicubic")),
        ("none:randaugment.n=3", ViewPolicy(crop=SQUASHED, hflip=0, randaugment=RandAugment(n=3))),
        (
            "none:jitter.hue=0.1,jitter.brightness=0.4",
            ViewPolicy(crop=SQUASHED, hflip=0, jitter=ColorJitter(hue=0.1, brightness=0.4)),
        ),
        ("none:erase.fill=[0,1,2]", ViewPolicy(crop=SQUASHED, hflip=0, erase=RandomErasing(fill=(0, 1, 2)))),
        ("none:mix.beta=0.2", ViewPolicy(crop=SQUASHED, hflip=0, mix=Mix(beta=0.2))),
        ("pets:mix.beta=0.2,mix.beta=none", PETS),
        ("pets:jitter.hue=0.1,jitter=none", PETS),
    ],
)
def test_changes_after_the_colon_are_the_policy_with_those_fields(spec: str, expected: ViewPolicy) -> None:
    policy = ViewPolicy.load(spec)
    assert policy == expected
    assert policy.digest == expected.digest


def test_overrides_come_after_the_changes_and_those_that_are_none_change_nothing() -> None:
    assert ViewPolicy.load("pets:size=32,seed=1", size=16, seed=None) == PETS.model_copy(update={"size": 16, "seed": 1})


def test_loading_leaves_the_presets_as_they_are() -> None:
    before = {name: policy.model_dump_json() for name, policy in PRESETS.items()}
    ViewPolicy.load("pets:crop.scale=[0.5,1],randaugment.m=1,crop.kind=pad,mix.beta=3", size=7)
    assert {name: policy.model_dump_json() for name, policy in PRESETS.items()} == before


def three_lines(error: KdcacheError) -> dict[str, str]:
    lines = [line.split(": ", 1) for line in str(error).splitlines()]
    assert [key for key, _ in lines] == ["error", "why", "fix"]
    return dict(lines)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("pets:hflip=2", "hflip = 2"),
        ("pets:hflip=none", "hflip = None"),
        ("pets:colour=1", "colour = 1"),
        ("pets:randaugment.n=5", "randaugment.n = 5"),
        ("pets:randaugment.m=31", "randaugment = "),
        ("pets:randaugment.interpolation=cubic", "randaugment.interpolation = 'cubic'"),
        ("pets:randaugment=3", "randaugment = 3"),
        ("pets:crop.scale=[0.9,0.1]", "crop.inception = "),
        ("pets:crop.scale=[0.2]", "crop.inception.scale.1 = "),
        ("pets:crop.padding=3", "crop.inception.padding = 3"),
        ("pets:crop.kind=middle", "crop = "),
        ("pets:filter=lanczos", "filter = 'lanczos'"),
        ("pets:jitter.hue=0.6", "jitter.hue = 0.6"),
        ("pets:erase.fill=[1,2,256]", "erase.fill.2 = 256"),
        ("pets:erase.fill=[1,2]", "erase.fill = "),
        ("pets:erase.ratio=[2,1]", "erase = "),
        ("pets:mix.beta=0", "mix.beta = 0"),
        ("pets:size=big", "size = 'big'"),
        ("pets:version=3", "version = 3"),
        ("pets:hflip", "'hflip'"),
        ("pets:hflip=0,,size=3", "the part ''"),
        ("pets:hflip=.nan", "hflip = nan"),
    ],
)
def test_an_impossible_change_is_refused_in_three_lines_that_name_the_field(spec: str, named: str) -> None:
    with pytest.raises(UsageError) as caught:
        ViewPolicy.load(spec)
    lines = three_lines(caught.value)
    assert named in lines["error"]
    assert spec in lines["error"]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("spec", ["pets:crop.scale=[0.2", "pets:erase={probability: 0.5, fill: [1,2,3]", "pets:hflip=@"])
def test_a_value_that_is_not_yaml_is_refused_in_three_lines(spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        ViewPolicy.load(spec)
    assert spec in three_lines(caught.value)["error"]


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize(
    "field", ["crop.ratio=[1,.inf]", "crop.ratio=[1,1e+300]", "crop.scale=[1e-12,1e-11]", "erase.ratio=[1,.inf]"]
)
def test_a_policy_is_refused_or_draws_boxes_that_lie_inside(field: str) -> None:
    try:
        policy = ViewPolicy.load(f"pets:{field}")
    except UsageError:
        return
    table = policy.parameters(0, 200, squares(200))
    for box, whole in ((table.box, UNIT), (table.erase, policy.size)):
        assert ((box >= 0) & (box <= whole)).all()
    assert (table.box[:, :2] < table.box[:, 2:]).all()


@pytest.mark.parametrize(("name", "close"), [("pet", "pets"), ("imagnet", "imagenet"), ("crdd", "crd"), ("Eval:hflip=0", "eval")])
def test_an_unknown_preset_is_refused_with_the_closest_one(name: str, close: str) -> None:
    with pytest.raises(UsageError) as caught:
        ViewPolicy.load(name)
    lines = three_lines(caught.value)
    assert repr(name.partition(":")[0]) in lines["error"]
    assert close in lines["why"]
    assert close in lines["fix"]


# ---------------------------------------------------------------- policies in files


@given(policy=POLICIES)
def test_any_policy_written_to_a_file_and_loaded_is_the_same(policy: ViewPolicy, tmp_path: Path) -> None:
    for name in ("policy.yaml", "policy.yml", "policy.json"):
        (tmp_path / name).write_text(policy.model_dump_json(indent=2))
        again = ViewPolicy.load(str(tmp_path / name))
        assert again == policy
        assert again.digest == policy.digest


def test_a_yaml_file_can_be_changed_after_the_colon(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("size: 40\ncrop: {kind: inception, scale: [0.5, 1]}\nrandaugment:\n  m: 5\nmix: {}\n")
    expected = ViewPolicy(size=40, crop=InceptionCrop(scale=(0.5, 1)), randaugment=RandAugment(m=5), mix=Mix())
    assert ViewPolicy.load(str(file)) == expected
    changed = ViewPolicy.load(f"{file}:crop.ratio=[1,1],randaugment=none,erase.probability=1", seed=3)
    assert changed == ViewPolicy(
        size=40, seed=3, crop=InceptionCrop(scale=(0.5, 1), ratio=(1, 1)), erase=RandomErasing(probability=1), mix=Mix()
    )


@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
        b"\x00\x01\x02\x03",
        b"\xff\xfe\xfa",
        b"size: [1",
        b"- size\n- 3\n",
        b"",
        b"just text",
        b"3: 4",
    ],
)
def test_a_file_that_holds_no_policy_is_refused_by_its_name(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        ViewPolicy.load(str(file))
    assert str(file) in three_lines(caught.value)["error"]


def test_a_wrong_field_of_a_file_is_named_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("size: 32\njitter: {hue: 2}\n")
    with pytest.raises(UsageError) as caught:
        ViewPolicy.load(str(file))
    assert f"{str(file)!r}: jitter.hue = 2" in three_lines(caught.value)["error"]


def test_a_missing_policy_file_is_not_found_and_the_presets_are_offered(tmp_path: Path) -> None:
    file = tmp_path / "nowhere.yaml"
    with pytest.raises(NotFoundError) as caught:
        ViewPolicy.load(f"{file}:hflip=0")
    lines = three_lines(caught.value)
    assert repr(str(file)) in lines["error"]
    assert all(name in lines["fix"] for name in PRESETS)


def test_a_folder_in_the_place_of_a_policy_file_is_refused_in_three_lines(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(KdcacheError) as caught:
        ViewPolicy.load(str(tmp_path / "folder.yaml"))
    assert "folder.yaml" in three_lines(caught.value)["error"]


def test_plain_crops_of_imagenet_are_the_other_policys_without_what_comes_after_them() -> None:
    plain, other = ViewPolicy.load("imagenet-plain"), ViewPolicy.load("imagenet:filter=bilinear,randaugment=none,mix=none")
    assert plain == other
    assert plain.digest == other.digest
    whole = PRESETS["imagenet"].settled().parameters(3, 20, squares(20))
    table = plain.parameters(3, 20, squares(20))
    np.testing.assert_array_equal(table.box, whole.box)
    np.testing.assert_array_equal(table.flip, whole.flip)
    assert not table.mix.any()
    assert not table.operations.size


# ---------------------------------------------------------------- digests


def test_absent_pieces_are_not_in_the_json_so_that_older_digests_stay() -> None:
    old = {"version", "seed", "size", "crop", "hflip", "randaugment", "mix"}
    for name in PRESETS:
        policy = json.loads(ViewPolicy.load(f"{name}:version=1").model_dump_json())
        assert set(policy) == old, name
        assert set(policy["crop"]) <= {"kind", "fraction", "scale", "ratio", "padding"}
    assert set(json.loads(PRESETS["pets"].model_dump_json())["mix"]) == {"probability", "cutmix"}
    explicit = ViewPolicy.load("pets:jitter=none,erase=none,filter=bilinear,mix.beta=none")
    assert explicit.digest == PETS.digest


def test_every_later_piece_gives_another_digest() -> None:
    changes = ("filter=bicubic", "jitter.hue=0.1", "jitter.hue=0.2", "erase.probability=0.5", "mix.beta=1", "mix.beta=2")
    assert len({PETS.digest, *(ViewPolicy.load(f"pets:{change}").digest for change in changes)}) == 1 + len(changes)


def test_rows_of_a_table_keep_the_columns_of_the_later_pieces() -> None:
    table = ViewPolicy(jitter=STRONG, erase=RandomErasing(), mix=Mix()).parameters(0, 9, squares(9))
    picked = table[np.array([7, 0])]
    assert isinstance(picked, ViewTable)
    for field in dataclasses.fields(table):
        if field.name not in {"view", "policy"}:
            np.testing.assert_array_equal(getattr(picked, field.name), getattr(table, field.name)[[7, 0]])


@pytest.mark.parametrize("spec", ["pets:crop.kind=pad,crop.padding=3000000000", "pets:randaugment.bins=100000000"])
def test_fields_have_an_upper_bound(spec: str) -> None:
    with pytest.raises(UsageError):
        ViewPolicy.load(spec)


def test_a_spec_may_be_longer_than_a_file_name() -> None:
    changes = ",".join(f"mix.probability=0.{i:03d}" for i in range(30))
    assert ViewPolicy.load(f"pets:{changes}").mix == Mix(probability=0.029)


def test_a_deeply_nested_file_is_refused_in_three_lines(tmp_path: Path) -> None:
    file = tmp_path / "deep.yaml"
    file.write_text("a: " + "[" * 5000)
    with pytest.raises(UsageError) as caught:
        ViewPolicy.load(str(file))
    assert "deep.yaml" in three_lines(caught.value)["error"]
