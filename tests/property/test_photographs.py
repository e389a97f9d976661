"""Photographs that are not square: crops in their own proportions, as torchvision and timm take them from the file itself."""

import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from kdcache.datasets.canvas import Canvas, load_canvas
from kdcache.datasets.folder import Folder
from kdcache.errors import IncompatibleError, IntegrityError, UsageError
from kdcache.models.creation import create_model
from kdcache.models.preprocessing import stated_by
from kdcache.training.config import HowTested
from kdcache.training.evaluation import EvalSet
from kdcache.training.tested import doubts, views_of_tests
from kdcache.views.policy import COLUMNS, PRESETS, UNIT, CenterCrop, InceptionCrop, PadCrop, ViewPolicy
from kdcache.views.rendering import render_positions
from kdcache.views.resample import resized
from kdcache.views.tested import WHOLE, TestViews
from tests.squares import squares

SHAPES = np.array([(300, 400), (640, 360), (333, 500), (100, 100), (1200, 90), (70, 1400), (5000, 100), (41, 37)])
sizes_of_any_shape = st.lists(st.tuples(st.integers(1, 6000), st.integers(1, 6000)), min_size=1, max_size=20)


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """A photograph without fine grain: noise of a tenth of the size, enlarged."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 10 + 2, width // 10 + 2, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def boxes(policy: ViewPolicy, view: int, sizes: NDArray[np.int64]) -> NDArray[np.int32]:
    """The boxes of a view in the order of the samples."""
    table = policy.parameters(view, len(sizes), sizes)
    return table.box[np.argsort(table.sample)]


def in_pixels(box: NDArray[np.int32], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    return box / UNIT * np.tile(sizes, 2)


# ---------------------------------------------------------------- square ones


@pytest.mark.parametrize("name", sorted(PRESETS))
@given(view=st.integers(0, 2**40), count=st.integers(1, 30), side=st.integers(1, 6000))
def test_square_photographs_have_the_boxes_of_version_1(name: str, view: int, count: int, side: int) -> None:
    policy = ViewPolicy.load(name)
    before = policy.as_version_1()
    assert (before.version, policy.version) == (1, 2)
    new, old = policy.parameters(view, count, squares(count) * side), before.parameters(view, count)
    for column in ("sample", "partner", "box", "shift", "flip", "operations", "signs", "jitter", "mix", "lam_units", "cut"):
        np.testing.assert_array_equal(getattr(new, column), getattr(old, column), err_msg=column)


@given(view=st.integers(0, 100), sizes=sizes_of_any_shape)
def test_proportions_change_nothing_but_the_boxes(view: int, sizes: list[tuple[int, int]]) -> None:
    policy = ViewPolicy.load("pets:jitter.hue=0.1,erase.probability=0.5")
    shaped, square = (policy.parameters(view, len(sizes), each) for each in (np.array(sizes), squares(len(sizes))))
    for column in ("sample", "partner", "flip", "operations", "signs", "jitter", "factors", "erase", "mix", "lam_units", "cut"):
        np.testing.assert_array_equal(getattr(shaped, column), getattr(square, column), err_msg=column)


@given(view=st.integers(0, 100), sizes=sizes_of_any_shape)
def test_version_1_does_not_look_at_sizes(view: int, sizes: list[tuple[int, int]]) -> None:
    policy = ViewPolicy.load("pets:version=1")
    np.testing.assert_array_equal(
        policy.parameters(view, len(sizes), np.array(sizes)).box, policy.parameters(view, len(sizes)).box
    )


@pytest.mark.parametrize("sizes", [None, np.ones((4, 2), int), np.ones((3, 3), int), np.array([(3, 4), (0, 5), (1, 1)])])
def test_missing_and_impossible_sizes_are_refused(sizes: NDArray[np.int64] | None) -> None:
    with pytest.raises(ValueError, match="sizes"):
        ViewPolicy.load("pets").parameters(0, 3, sizes)
    assert ViewPolicy.load("none").parameters(0, 3, None).box.max() == UNIT  # what is squashed needs none


def test_a_draft_with_the_filter_of_a_model_must_be_settled_first() -> None:
    draft = ViewPolicy.draft("pets")
    for use in (lambda: draft.digest, lambda: draft.parameters(0, 2, squares(2))):
        with pytest.raises(ValueError, match="settled"):
            use()
    assert draft.settled("bicubic") == ViewPolicy.load("pets", "bicubic") == ViewPolicy.load("pets:filter=bicubic")
    assert draft.as_version_1().settled("bicubic").filter == "bilinear"  # as its presets always were


# ---------------------------------------------------------------- torchvision's box


class _Draws:
    """Stands for torch in torchvision's RandomResizedCrop.get_params: the random numbers are the given ones."""

    def __init__(self, areas: NDArray, ratios: NDArray, left: float, top: float) -> None:
        self._uniform = deque(number for pair in zip(areas, ratios, strict=True) for number in pair)
        self._places = deque([top, left])  # torchvision draws the top first
        self.tensor, self.log, self.exp = torch.tensor, torch.log, torch.exp

    def empty(self, count: int) -> "_Draws":
        assert count == 1
        return self

    def uniform_(self, low: Any, high: Any) -> torch.Tensor:
        return torch.tensor([float(low) + self._uniform.popleft() * (float(high) - float(low))], dtype=torch.float64)

    def randint(self, low: int, high: int, size: tuple[int]) -> torch.Tensor:
        return torch.tensor([low + math.floor(self._places.popleft() * (high - low))])


@pytest.fixture
def torchvisions_box(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from torchvision.transforms import transforms

    def draw(draws: _Draws, width: int, height: int, crop: InceptionCrop) -> NDArray[np.float64]:
        monkeypatch.setattr(transforms, "torch", draws)
        image = Image.new("L", (width, height))
        top, left, tall, wide = RandomResizedCrop.get_params(image, list(crop.scale), list(crop.ratio))
        monkeypatch.undo()
        return np.array([left, top, left + wide, top + tall], float)

    return draw


@pytest.mark.parametrize("crop", [InceptionCrop(), InceptionCrop(scale=(0.5, 1.0), ratio=(0.9, 1.1))])
def test_crops_are_torchvisions_on_the_photograph_itself(crop: InceptionCrop, torchvisions_box: Any) -> None:
    """torchvision rounds sides and corners to whole pixels, so an edge may be one and a half pixels elsewhere."""
    sizes = np.tile(SHAPES, (50, 1))
    policy = ViewPolicy(crop=crop, seed=3)
    own = in_pixels(boxes(policy, 5, sizes), sizes)
    raw = np.random.Philox(key=np.array([3, 5], np.uint64)).random_raw(len(sizes) * COLUMNS).reshape(-1, COLUMNS)
    u = (raw >> np.uint64(11)).astype(float) * 2.0**-53
    theirs = [
        torchvisions_box(_Draws(row[1:11], row[11:21], row[21], row[22]), *map(int, size), crop)
        for row, size in zip(u, sizes, strict=True)
    ]
    # An attempt that sticks out by less than half a pixel fits after rounding; then the two take different ones.
    same = (np.abs(own - theirs) <= 1.5).all(axis=1)
    assert same.mean() > 0.98


@pytest.mark.parametrize(("width", "height", "expected"), [(5000, 100, (4 / 3, 1)), (100, 5000, (1, 4 / 3))])
def test_panoramas_get_the_largest_central_box(width: int, height: int, expected: tuple[float, float]) -> None:
    sizes = np.tile([(width, height)], (200, 1))
    box = in_pixels(boxes(ViewPolicy(crop=InceptionCrop(scale=(0.3, 1.0))), 0, sizes), sizes)
    shape = np.stack([box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]], axis=1) / 100
    np.testing.assert_allclose(shape, np.tile(expected, (200, 1)), rtol=2e-3)
    np.testing.assert_allclose(box[:, :2] + box[:, 2:], sizes, atol=0.2)  # it is central


@pytest.mark.parametrize("crop", [InceptionCrop(), CenterCrop(fraction=0.8), CenterCrop(), PadCrop()])
@given(view=st.integers(0, 100), sizes=sizes_of_any_shape)
def test_a_view_has_the_proportions_of_the_photograph(crop: Any, view: int, sizes: list[tuple[int, int]]) -> None:
    shapes = np.array(sizes)
    box = boxes(ViewPolicy(crop=crop), view, shapes)
    assert ((box >= 0) & (box <= UNIT)).all()
    assert (box[:, 2:] > box[:, :2]).all()
    width, height = (in_pixels(box, shapes)[:, 2:] - in_pixels(box, shapes)[:, :2]).T
    low, high = crop.ratio if isinstance(crop, InceptionCrop) else (1, 1)
    unit = shapes.max(axis=1) / UNIT  # boxes are whole units of the canvas side
    assert (width >= low * height - 2 * unit * max(1, low)).all()
    assert (width <= high * height + 2 * unit * max(1, high)).all()


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
@given(view=st.integers(0, 100), sizes=st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), min_size=1, max_size=6))
def test_both_renderers_give_the_same_bytes_of_any_shape(filter: Any, view: int, sizes: list[tuple[int, int]]) -> None:
    count = len(sizes)
    policy = ViewPolicy(size=20, crop=InceptionCrop(), filter=filter)
    pixels = np.random.default_rng(view).integers(0, 256, (count, 3, 33, 33), dtype=np.uint8)
    table = policy.parameters(view, count, np.array(sizes))
    reference, device = (render_positions(pixels, table, np.arange(count), which) for which in ("reference", "device"))
    assert torch.equal(reference, device)


def test_pixels_are_those_of_a_crop_from_a_canvas_of_the_photographs_own_proportions() -> None:
    """Up to the square canvas's own resampling: 3 grey levels on average, for sides that it does not shrink."""
    sizes = SHAPES[:4]
    pictures = [photograph(*map(int, size), seed) for seed, size in enumerate(sizes)]
    squares_of = np.stack([np.asarray(p.resize((640, 640), Image.Resampling.BILINEAR)).transpose(2, 0, 1) for p in pictures])
    policy = ViewPolicy(size=48, crop=InceptionCrop(), filter="bicubic", hflip=0)
    for view in range(5):
        table = policy.parameters(view, len(sizes), sizes)
        drawn = render_positions(squares_of, table, np.argsort(table.sample))
        for picture, size, box, view_pixels in zip(pictures, sizes, boxes(policy, view, sizes), drawn, strict=True):
            edges = tuple(in_pixels(box[None], size[None])[0])
            expected = np.asarray(picture.resize((48, 48), Image.Resampling.BICUBIC, box=edges)).transpose(2, 0, 1)
            assert np.abs(view_pixels.numpy().astype(int) - expected).mean() < 3


# ---------------------------------------------------------------- timm's test views


def test_the_box_of_a_test_is_timms_to_the_pixel() -> None:
    """Cut from the photograph itself, a test view has timm's bytes but for two grey levels of rounding."""
    for (width, height), (size, crop_pct) in zip(SHAPES[:7], [(24, 0.875), (32, 0.9), (40, 0.95), (24, 1.0)] * 2, strict=False):
        picture = photograph(int(width), int(height))
        for filter in ("bicubic", "bilinear"):
            theirs = timm.data.create_transform((3, size, size), crop_pct=crop_pct, interpolation=filter, normalize=False)
            stated = {"crop_pct": crop_pct, "interpolation": filter, "crop_mode": "center"}
            crop = CenterCrop(resize=math.floor(size / stated_by(stated, size).crop_pct))
            sizes = np.array([(width, height)])
            edges = tuple(in_pixels(boxes(ViewPolicy(size=size, crop=crop), 0, sizes), sizes)[0])
            own = picture.resize((size, size), Image.Resampling[filter.upper()], box=edges)
            difference = np.asarray(own).transpose(2, 0, 1).astype(int) - theirs(picture).numpy()
            assert np.abs(difference).max() <= 2, (width, height, size, filter)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Canvas, list[Image.Image]]:
    """Photographs of several shapes on a canvas that is large enough for them, and as they are in their files."""
    root = tmp_path_factory.mktemp("photographs")
    for split in ("train", "test"):
        for number, (width, height) in enumerate([(90, 120), (160, 90), (100, 100), (75, 110)]):
            file = root / "images" / split / "ab"[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            photograph(width, height, number).save(file)
    canvas = load_canvas(Folder(str(root / "images")), "test", 320, root / "data")
    return canvas, [Image.open(root / "images" / "test" / key) for key in canvas.keys]


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", "vit_small_patch16_224.augreg_in1k", "tf_efficientnet_lite0.in1k"])
def test_logits_of_tests_are_those_of_timms_own_preprocessing(name: str, photographs: tuple[Canvas, list[Image.Image]]) -> None:
    """Logit by logit, up to the resampling of the canvas: a tenth of their spread. Squashed images are far from that."""
    canvas, pictures = photographs
    torch.manual_seed(0)
    model, normalise = create_model("test_resnet", 10, input_size=64)
    model.eval()
    config = timm.data.resolve_data_config({"input_size": (3, 64, 64)}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    transform = timm.data.create_transform(**config, normalize=False)
    tested = views_of_tests(HowTested(test_policy="model"), name, 64)
    assert tested.timm_fields() == {key: config[key] for key in ("crop_pct", "crop_mode", "interpolation")}

    def shown(policy: ViewPolicy) -> torch.Tensor:
        (views,) = EvalSet(canvas, policy)._kept or ()
        with torch.inference_mode():
            return model(normalise(views))

    with torch.inference_mode():
        expected = model(normalise(torch.stack([transform(picture) for picture in pictures])))
    spread = expected.std(dim=0).mean()
    assert (shown(tested.policy) - expected).abs().mean() < 0.1 * spread
    assert (shown(WHOLE.policy.model_copy(update={"size": 64})) - expected).abs().mean() > 0.3 * spread


@pytest.mark.parametrize(
    ("options", "title"),
    [
        ({"test_policy": "model"}, "crop 0.95 of the short side, bicubic"),
        ({"test_policy": "model", "crop_pct": 0.8}, "crop 0.8 of the short side, bicubic"),
        ({"test_policy": "model", "interpolation": "bilinear"}, "crop 0.95 of the short side, bilinear"),
        ({"test_policy": "eval"}, "crop 0.875 of the short side, bicubic"),
        ({"test_policy": "eval:crop.mode=squash", "crop_pct": 1}, "whole image made square, bicubic"),
        ({"test_policy": "none"}, WHOLE.title),
    ],
)
def test_test_views_are_the_models_or_those_that_are_asked_for(options: dict[str, Any], title: str) -> None:
    tested = views_of_tests(HowTested(**options), "resnet18.a1_in1k", 224)
    assert tested.title == title
    assert TestViews.model_validate_json(tested.model_dump_json()) == tested


def test_at_its_test_size_a_model_has_the_test_crop() -> None:
    """As timm's published figures are made: resnet18.a1_in1k has 0.95 at 224 pixels, and the whole short side at 288."""
    titles = [views_of_tests(HowTested(test_policy="model"), "resnet18.a1_in1k", size).title for size in (224, 288)]
    assert titles == ["crop 0.95 of the short side, bicubic", "crop 1 of the short side, bicubic"]


@pytest.mark.parametrize("spec", ["pets", "eval:hflip=0.5", "crd", "none:mix.beta=1", "eval:randaugment.n=1"])
def test_a_random_test_policy_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="random"):
        views_of_tests(HowTested(test_policy=spec), "resnet18.a1_in1k", 224)


@pytest.mark.parametrize(
    "field",
    [{"crop_mode": "border"}, {"crop_pct": 1.15}, {"crop_pct": "all"}, {"crop_pct": 0.0001}, {"interpolation": "lanczos"}],
)
def test_a_configuration_that_cannot_be_drawn_is_refused_by_field(field: dict[str, Any], tmp_path: Path) -> None:
    import json

    config = {"architecture": "test_resnet", "pretrained_cfg": {"input_size": [3, 160, 160], **field}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(IncompatibleError) as raised:
        views_of_tests(HowTested(test_policy="model"), f"local-dir:{tmp_path}", 160)
    assert all(f"{part!r}" in str(raised.value) or str(part) in str(raised.value) for part in (*field, *field.values()))
    asked = views_of_tests(HowTested(test_policy="eval:filter=bilinear"), f"local-dir:{tmp_path}", 160)
    assert asked.policy.crop == CenterCrop(fraction=0.875)


def test_a_configuration_without_fields_gets_timms_defaults_and_says_so(
    tmp_path: Path, photographs: tuple[Canvas, list[Image.Image]]
) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "test_resnet", "num_classes": 3}')
    options = HowTested(test_policy="model")
    tested = views_of_tests(options, f"local-dir:{tmp_path}", 64)
    assert tested.title == "crop 0.875 of the short side, bicubic"
    (note,) = doubts(options, tested, f"local-dir:{tmp_path}", photographs[0])
    assert "states no crop_pct, crop_mode, interpolation" in note


def test_a_canvas_that_is_too_small_for_the_test_crop_is_said(
    photographs: tuple[Canvas, list[Image.Image]], tmp_path: Path
) -> None:
    options, canvas = HowTested(test_policy="model"), photographs[0]
    tested = views_of_tests(options, "resnet18.a1_in1k", 64)  # resizes to 67 pixels: 4/3 of that is 89
    assert not list(doubts(options, tested, "resnet18.a1_in1k", canvas))
    root = canvas.path.parent.parent / "images"
    small = load_canvas(Folder(str(root)), "test", 64, tmp_path)
    (note,) = doubts(options, tested, "resnet18.a1_in1k", small)
    assert "--canvas 96" in note


# ---------------------------------------------------------------- sizes of the canvas


def test_a_canvas_with_other_sizes_than_it_was_written_with_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / "images" / split / name).mkdir(parents=True)
            photograph(30, 40).save(tmp_path / "images" / split / name / "0.png")
    source = Folder(str(tmp_path / "images"))
    canvas = load_canvas(source, "train", 32, tmp_path / "data")
    file = canvas.path / "sizes.npy"
    for wrong in (canvas.sizes[:, ::-1], canvas.sizes[:1], canvas.sizes * 0, canvas.sizes.astype(float), np.ones((2, 3), int)):
        np.save(file, np.ascontiguousarray(wrong))
        with pytest.raises(IntegrityError, match="cannot be read"):
            load_canvas(source, "train", 32, tmp_path / "data")
    file.unlink()
    with pytest.raises(IntegrityError, match=r"sizes\.npy"):
        load_canvas(source, "train", 32, tmp_path / "data")
    np.save(file, canvas.sizes)
    assert load_canvas(source, "train", 32, tmp_path / "data").sizes_digest == canvas.sizes_digest


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
@given(side=st.integers(8, 40), size=st.integers(8, 60))
def test_views_of_another_size_are_pillows_resize_of_the_teachers(filter: str, side: int, size: int) -> None:
    views = np.random.default_rng(side).integers(0, 256, (3, 3, side, side), dtype=np.uint8)
    drawn = resized(torch.from_numpy(views), size, filter).numpy()
    for view, result in zip(views, drawn, strict=True):
        picture = Image.fromarray(view.transpose(1, 2, 0)).resize((size, size), Image.Resampling[filter.upper()])
        np.testing.assert_array_equal(result, np.asarray(picture).transpose(2, 0, 1))
