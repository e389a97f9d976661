"""Datasets that a function returns: what is used of them, and everything else that it might return."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset
from torchvision import transforms as v1
from torchvision.transforms import v2

from kdcache.datasets import DATASETS, Images
from kdcache.datasets.canvas import load_canvas
from kdcache.datasets.mapstyle import picture
from kdcache.datasets.transforms import require_untransformed
from kdcache.errors import IncompatibleError, IntegrityError, KdcacheError, NotFoundError, UsageError
from kdcache.views.policy import CenterCrop, ColorJitter, InceptionCrop, RandAugment, RandomErasing, ViewPolicy
from tests.mapstyle import COUNTS, Pictures, targets


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Callable[[str], Any]], Images]:
    def by(make: Callable[[str], Any]) -> Images:
        monkeypatch.setattr("tests.mapstyle.mine", lambda split: make(split), raising=False)
        return DATASETS.parse("factory:tests.mapstyle:mine").open(tmp_path)

    return by


# ---------------------------------------------------------------- labels and names


def test_labels_are_read_from_an_attribute_and_few_images_are(opened: Any) -> None:
    made: list[Pictures] = []

    def make(split: str) -> Pictures:
        made.append(Pictures(split, targets=torch.tensor([i % 2 for i in range(1000)]), classes=("cat", "dog")))
        made[-1].pixels = np.full((1000, 4, 4, 3), len(made), np.uint8)
        return made[-1]

    images = opened(make)
    assert [sample.label for sample in images.samples("train")] == [i % 2 for i in range(1000)]
    assert images.class_names() == ("cat", "dog")
    assert all(len(dataset.read) < 20 for dataset in made)
    assert not images.remarks


@pytest.mark.parametrize("wrong", [[0] * 10, [0, 1], ["a"] * 10, None, [[0, 1]] * 10])
def test_labels_of_an_attribute_that_is_no_list_of_them_are_listed_by_reading(opened: Any, wrong: Any) -> None:
    images = opened(lambda split: Pictures(split, targets=wrong))
    assert [sample.label for sample in images.samples("train")] == targets("train")
    assert images.class_names() == ("0", "1")
    said = " ".join(images.remarks)
    assert "all 10 train images were read" in said
    assert "`classes`" in said


def test_a_label_that_changes_afterwards_is_found_when_its_image_is_decoded(opened: Any, tmp_path: Path) -> None:
    lying = [*targets("train")[:7], 0, *targets("train")[8:]]  # at an item that is not looked at
    opened(lambda split: Pictures(split, targets=lying if split == "train" else targets(split)))
    source = DATASETS.parse("factory:tests.mapstyle:mine")
    with pytest.raises(IntegrityError, match="its label is 1 now, and was 0"):
        load_canvas(source, "train", 8, tmp_path)


def test_subsets_and_concatenations_have_the_labels_and_names_of_what_they_hold(opened: Any) -> None:
    def make(split: str) -> Any:
        whole = Pictures(split, targets=targets(split), classes=["cat", "dog"])
        return ConcatDataset([Subset(whole, [5, 0, 2]), Subset(whole, [1])])

    images = opened(make)
    assert [sample.label for sample in images.samples("train")] == [1, 0, 0, 1]
    assert images.class_names() == ("cat", "dog")
    assert not images.remarks


def test_joined_data_sets_of_other_classes_are_refused(opened: Any) -> None:
    def make(split: str) -> Any:
        return ConcatDataset([Pictures(split, classes=["cat", "dog"]), Pictures(split, classes=["dog", "cat"])])  # type: ignore[list-item]

    with pytest.raises(UsageError, match="different classes"):
        opened(make)


@pytest.mark.parametrize("names", [["cat", "cat"], ["cat"], "cat", [1, 2], {"test": ["a", "b"], "train": ["b", "a"]}], ids=str)
def test_names_that_are_none_are_refused(opened: Any, names: Any) -> None:
    with pytest.raises(UsageError) as caught:
        opened(lambda split: Pictures(split, targets=targets(split), classes=names[split] if isinstance(names, dict) else names))
    assert caught.value.fix


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 1), (9, 7, 3), (1, 9, 7), (3, 9, 7)])
@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_pixels_of_any_order_are_the_same_picture(shape: tuple[int, ...], convert: Any) -> None:
    pixels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    image = picture(convert(pixels))
    assert image.size == (7, 9)
    last = pixels.transpose(1, 2, 0) if shape[0] in {1, 3} else pixels
    np.testing.assert_array_equal(np.asarray(image), last.squeeze(-1) if last.shape[-1] == 1 else last)


def test_where_both_ends_may_be_channels_a_tensor_has_them_first() -> None:
    pixels = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    assert picture(pixels).size == (5, 3)
    assert picture(torch.from_numpy(pixels)).size == (3, 5)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (lambda pixels, label: (pixels / np.float32(255), label), "float32 .* scaled or normalised"),
        (lambda pixels, label: (torch.from_numpy(pixels).to(torch.bfloat16), label), "bfloat16"),
        (lambda pixels, label: (pixels.astype(np.uint16), label), "uint16"),
        (lambda pixels, label: (np.zeros((4, 4, 4), np.uint8), label), r"uint8 \[4, 4, 4\]"),
        (lambda pixels, label: (np.zeros((0, 4, 3), np.uint8), label), r"uint8 \[0, 4, 3\]"),
        (lambda pixels, label: ("a.jpg", label), "its image is a str"),
        (lambda pixels, label: {"image": pixels, "label": label}, "it is a dict"),
        (lambda pixels, label: (pixels, label, 0), "tuple of 3"),
        (lambda pixels, label: (pixels, float(label)), "label is a float"),
        (lambda pixels, label: (pixels, bool(label)), "true or false"),
        (lambda pixels, label: (pixels, None), "NoneType"),
        (lambda pixels, label: (pixels, np.eye(2)[label]), r"ndarray \[2\]"),
        (lambda pixels, label: (pixels, -1), "-1"),
        (lambda pixels, label: 1 / 0, "ZeroDivisionError"),
        (lambda pixels, label: (np.random.default_rng().integers(0, 256, (4, 4, 3), np.uint8), label), "random"),
    ],
)
def test_items_that_are_no_image_and_label_are_refused_with_the_reason(opened: Any, item: Any, reason: str) -> None:
    for attributes in ({}, {"targets": [0] * 10}):
        with pytest.raises(UsageError, match=f"(?s){reason}") as caught:
            opened(lambda split: Pictures(split, item, **attributes))  # noqa: B023
        assert "tests.mapstyle:mine" in caught.value.what
        assert len(str(caught.value).splitlines()) == 3


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda split: Stream(), "IterableDataset"),
        (lambda split: DataLoader(Pictures(split)), "`dataset`"),  # type: ignore[arg-type]
        (lambda split: {"train": 1}, "map-style"),
        (lambda split: None, "map-style"),
        (lambda split: [], "empty"),
        (lambda: None, r"def mine\(split\)"),
        (lambda split: Pictures(split, transform=v1.ToTensor()), "ToTensor"),
        (lambda split: Subset(Pictures(split, transform=v1.ToTensor()), [0]), "ToTensor"),  # type: ignore[arg-type]
        (lambda split: Pictures(split, target_transform=str), "target_transform"),
    ],
)
def test_what_is_no_plain_map_style_data_set_is_refused(
    opened: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make: Any, reason: str
) -> None:
    monkeypatch.setattr("tests.mapstyle.mine", make, raising=False)
    with pytest.raises(UsageError, match=f"(?s){reason}"):
        DATASETS.parse("factory:tests.mapstyle:mine").open(tmp_path)


def fails(split: str) -> None:
    raise OSError("no disk")


def test_a_function_that_fails_or_is_missing_gives_no_traceback(opened: Any, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match=r"(?s)split='train'.*OSError: no disk"):
        opened(fails)
    for name, error in (("tests.mapstyle:mien", NotFoundError), ("tests.nowhere:make", NotFoundError)):
        with pytest.raises(error):
            DATASETS.build("factory", function=name).open(tmp_path)
    with pytest.raises(UsageError):
        DATASETS.build("factory", function="no function")


# ---------------------------------------------------------------- changes


def test_a_change_of_labels_names_version_pixels_or_source_makes_another_canvas(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "of_mine.py"
    module.write_text("import tests.mapstyle\nclass Mine(tests.mapstyle.Pictures): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import of_mine  # type: ignore[import-not-found]

    def state(**attributes: Any) -> str:
        given = {"targets": None, "classes": ["cat", "dog"]} | attributes
        return str(opened(lambda split: of_mine.Mine(split, **given)).fingerprint())

    states = [state(), state(version=2), state(classes=["cat", "hound"])]
    states.append(state(pixels=np.zeros((10, 12, 10, 3), np.uint8)))
    states.append(state(item=lambda pixels, label: (Image.fromarray(pixels), 1 - label)))
    module.write_text(module.read_text() + "# changed\n")
    states.append(state())
    assert len(set(states)) == len(states)
    assert state() == states[-1]
    del sys.modules["of_mine"]


# ---------------------------------------------------------------- transforms


def advice(*transforms: Any) -> tuple[ViewPolicy, str, KdcacheError]:
    """The policy and the size that an error advises instead of `transforms`, and the error."""
    with pytest.raises(UsageError) as caught:
        require_untransformed(Pictures("train", transform=v1.Compose(transforms)), "dataset x")
    words = caught.value.fix.partition("--policy ")[2].replace("'", "").replace(";", "").split()
    return ViewPolicy.load(words[0] if words else "none"), words[2] if "--size" in words else "", caught.value


@pytest.mark.parametrize("of", [v1, v2])
def test_torchvisions_transforms_become_the_policy_that_does_the_same(of: Any) -> None:
    policy, size, error = advice(
        of.RandomResizedCrop(96, scale=(0.25, 1), interpolation=of.InterpolationMode.BICUBIC),
        of.RandomHorizontalFlip(0.4),
        of.RandomApply([of.ColorJitter(0.4, 0.3, 0.2, 0.1)], p=0.8),
        of.RandAugment(3, 7),
        of.ToTensor() if of is v1 else of.ToImage(),
        of.Normalize([0.5, 0.4, 0.3], [0.2, 0.2, 0.25]),
        of.RandomErasing(0.25, scale=(0.05, 0.2)),
    )
    assert policy.crop == InceptionCrop(scale=(0.25, 1))
    assert policy.filter == "bicubic"
    assert policy.hflip == 0.4
    assert policy.jitter == ColorJitter(brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1, probability=0.8)
    assert policy.randaugment == RandAugment(n=3, m=7)
    assert policy.erase == RandomErasing(probability=0.25, scale=(0.05, 0.2))
    assert policy.mix is None
    assert size == "96"
    assert "--mean 0.5,0.4,0.3 --std 0.2,0.2,0.25" in error.fix
    assert "no policy has" not in error.why


def test_crops_of_tests_and_of_small_images_become_theirs() -> None:
    policy, size, _ = advice(v1.Resize(256), v1.CenterCrop(224), v1.ToTensor())
    assert policy.crop == CenterCrop(fraction=0.875)
    assert size == "224"
    assert advice(v1.Resize((256, 256)), v1.CenterCrop(224))[0].crop == CenterCrop(fraction=0.875, mode="squash")
    policy, size, _ = advice(v1.RandomCrop(32, padding=4))
    assert policy.crop.model_dump() == {"kind": "pad", "padding": 4}
    assert size == "32"


@pytest.mark.parametrize(
    "transform",
    [v1.GaussianBlur(3), v1.RandomCrop(32), v1.ColorJitter((0.5, 2)), v1.RandomApply([v1.Resize(8)]), v1.Lambda(abs), print],
)
def test_transforms_that_no_policy_has_are_named(transform: Any) -> None:
    _, _, error = advice(v1.RandomHorizontalFlip(), transform)
    name = "Resize" if isinstance(transform, v1.RandomApply) else type(transform).__name__
    assert f"no policy has {name}" in error.why
    assert "hflip=0.5" in error.fix
    assert "crop" not in error.fix


def test_the_counts_of_the_example_are_those_of_its_pictures() -> None:
    assert {split: len(Pictures(split)) for split in COUNTS} == COUNTS
