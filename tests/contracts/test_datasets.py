"""Every dataset keeps its contract; and folders of images, whatever is in them."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdcache.datasets import DATASETS, Source, Split
from kdcache.datasets.canvas import load_canvas
from kdcache.datasets.folder import Folder
from kdcache.errors import IntegrityError, KdcacheError, NotFoundError, UsageError
from kdcache.testing import DatasetContract
from tests.contracts.examples import cases, with_files

SPLITS: tuple[Split, ...] = ("train", "test")


class TestEveryDataset(DatasetContract):
    @pytest.fixture(params=cases("dataset"))
    def component(self, request: pytest.FixtureRequest, datasets_in_small: Path) -> Source:
        name, options = request.param
        made: Source = self.registry.build(name, **with_files(options, datasets_in_small))
        return made


# ---------------------------------------------------------------- folders


@pytest.fixture
def root(tmp_path: Path, image_folder: Path) -> Path:
    """A copy of the image folder that a test may change."""
    shutil.copytree(image_folder, tmp_path / "images")
    return tmp_path / "images"


def test_labels_are_the_class_folders_in_the_order_of_their_names(root: Path) -> None:
    (root / "train" / "class_1").rename(root / "train" / "zebra")
    (root / "test" / "class_1").rename(root / "test" / "zebra")
    source = Folder(str(root))
    assert source.class_names() == ["class_0", "class_2", "zebra"]
    assert {sample.key.partition("/")[0]: sample.label for sample in source.samples("test")} == {
        "class_0": 0,
        "class_2": 1,
        "zebra": 2,
    }


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_the_test_split_may_have_either_name(root: Path, name: str) -> None:
    (root / "test").rename(root / name)
    assert len(Folder(str(root)).samples("test")) == 23


def test_hidden_and_other_files_are_no_samples_and_folders_may_be_nested(root: Path) -> None:
    train = root / "train"
    before = [sample.key for sample in Folder(str(root)).samples("train")]
    (train / "class_0" / ".hidden.png").write_bytes(b"")
    (train / "class_0" / "notes.txt").write_text("no picture")
    (train / ".cache").mkdir()
    (train / "loose.png").write_bytes(b"")
    (train / "class_0" / "deep").mkdir()
    Image.new("RGB", (4, 4)).save(train / "class_0" / "deep" / "x.PNG")
    after = [sample.key for sample in Folder(str(root)).samples("train")]
    assert after == sorted([*before, "class_0/deep/x.PNG"])


def test_a_fraction_splits_each_picture_by_its_name_alone(root: Path) -> None:
    source = Folder(str(root / "train"), split_fraction=0.4)
    before = {split: [sample.key for sample in source.samples(split)] for split in SPLITS}
    assert not set(before["train"]) & set(before["test"])
    assert len(before["train"]) + len(before["test"]) == 23
    for i in range(30):
        Image.new("RGB", (4, 4)).save(root / "train" / "class_0" / f"new{i}.png")
    for split in SPLITS:
        assert set(before[split]) <= {sample.key for sample in source.samples(split)}


def test_a_changed_or_added_file_makes_another_canvas(root: Path, tmp_path: Path) -> None:
    source = Folder(str(root))
    first = load_canvas(source, "train", 8, tmp_path / "c")
    Image.new("RGB", (20, 20), (1, 2, 3)).save(root / "train" / "class_0" / "00.png")
    second = load_canvas(source, "train", 8, tmp_path / "c")
    assert second.digest != first.digest
    assert second.card.digest == first.card.digest  # the same names and labels
    Image.new("RGB", (20, 20)).save(root / "train" / "class_0" / "zz.png")
    assert load_canvas(source, "train", 8, tmp_path / "c").card.digest != first.card.digest


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16", "CMYK"])
def test_pictures_of_any_mode_become_rgb(root: Path, tmp_path: Path, mode: str) -> None:
    suffix = "tif" if mode == "CMYK" else "png"
    Image.new(mode, (6, 9), 1 if mode in {"P", "1"} else None).save(root / "train" / "class_0" / f"aa.{suffix}")
    canvas = load_canvas(Folder(str(root)), "train", 8, tmp_path / "c")
    at = canvas.keys.index(f"class_0/aa.{suffix}")
    assert canvas.pixels[at].shape == (3, 8, 8)
    assert tuple(canvas.sizes[at]) == (6, 9)


def test_a_picture_is_turned_as_its_exif_says(root: Path, tmp_path: Path) -> None:
    picture = Image.new("RGB", (16, 8))
    picture.paste((255, 255, 255), (0, 0, 8, 8))  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: the left becomes the top
    picture.save(root / "train" / "class_0" / "aa.png", exif=exif)
    canvas = load_canvas(Folder(str(root)), "train", 8, tmp_path / "c")
    at = canvas.keys.index("class_0/aa.png")
    assert canvas.pixels[at, :, 0].min() > 200
    assert canvas.pixels[at, :, -1].max() < 50
    assert tuple(canvas.sizes[at]) == (8, 16)


def test_every_picture_that_cannot_be_decoded_is_named_and_no_canvas_is_left(root: Path, tmp_path: Path) -> None:
    whole = (root / "train" / "class_1" / "01.png").read_bytes()
    (root / "train" / "class_1" / "01.png").write_bytes(whole[: len(whole) // 2])
    (root / "train" / "class_2" / "02.png").write_bytes(b"not a picture")
    with pytest.raises(IntegrityError) as caught:
        load_canvas(Folder(str(root)), "train", 8, tmp_path / "c")
    assert "2 of 23" in caught.value.what
    assert "class_1/01.png" in caught.value.what
    assert "class_2/02.png" in caught.value.what
    assert not [path for path in (tmp_path / "c").iterdir() if path.is_dir() and not path.name.startswith(".")]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("pixels.npy", b""),
        ("labels.npy", b"x"),
        ("canvas.json", b"{}"),
        ("canvas.json", b"[]"),
        ("canvas.json", b"\xff"),
        ("sizes.npy", None),
    ],
)
def test_a_damaged_canvas_says_how_to_build_it_again(root: Path, tmp_path: Path, name: str, damage: bytes | None) -> None:
    canvas = load_canvas(Folder(str(root)), "train", 8, tmp_path / "c")
    if damage is None:
        (canvas.path / name).unlink()
    else:
        (canvas.path / name).write_bytes(damage)
    with pytest.raises(IntegrityError) as caught:
        load_canvas(Folder(str(root)), "train", 8, tmp_path / "c")
    assert f"mv {canvas.path} " in caught.value.fix


def test_a_canvas_without_digest_or_with_other_pixels_is_damaged(root: Path, tmp_path: Path) -> None:
    canvas = load_canvas(Folder(str(root)), "train", 8, tmp_path / "c")
    record, whole = canvas.path / "canvas.json", (canvas.path / "canvas.json").read_text()
    record.write_text(whole.replace('"digest": "' + canvas.digest, '"other": "' + canvas.digest))
    with pytest.raises(IntegrityError):
        load_canvas(Folder(str(root)), "train", 8, tmp_path / "c")
    record.write_text(whole)
    np.save(canvas.path / "pixels.npy", np.zeros((23, 3, 8, 7), np.uint8))
    with pytest.raises(IntegrityError, match="cannot be read"):
        load_canvas(Folder(str(root)), "train", 8, tmp_path / "c")


def test_pickled_arrays_in_a_canvas_are_not_loaded(root: Path, tmp_path: Path) -> None:
    canvas = load_canvas(Folder(str(root)), "train", 8, tmp_path / "c")
    np.save(canvas.path / "labels.npy", np.array([os.getcwd] * 23, dtype=object), allow_pickle=True)
    with pytest.raises(IntegrityError):
        load_canvas(Folder(str(root)), "train", 8, tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda root: shutil.rmtree(root), NotFoundError),
        (lambda root: shutil.rmtree(root / "test"), NotFoundError),
        (lambda root: [shutil.rmtree(root / "train" / f"class_{i}") for i in (1, 2)], UsageError),
        (lambda root: (root / "test" / "class_2").rename(root / "test" / "stranger"), UsageError),
        (lambda root: [path.unlink() for path in (root / "test").rglob("*.png")], NotFoundError),
    ],
    ids=["no-root", "no-test", "one-class", "unknown-class", "no-images"],
)
def test_a_folder_of_another_layout_is_refused_with_advice(root: Path, change: Any, error: type[KdcacheError]) -> None:
    change(root)
    with pytest.raises(error) as caught:
        Folder(str(root)).samples("test")
    assert caught.value.fix


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_a_fraction_of_a_root_that_is_split_already_is_refused_with_the_right_command(root: Path, name: str) -> None:
    (root / "test").rename(root / name)
    with pytest.raises(UsageError, match=f"train/ and {name}/") as caught:
        Folder(str(root), split_fraction=0.2).samples("train")
    advised = DATASETS.parse(caught.value.fix.partition("--dataset ")[2])
    assert len(advised.samples("train")) == 23


@pytest.mark.parametrize("name", ["plain", "a,b", "k=v", "back\\slash", "\\,=", "with space", "ä:é"])
def test_a_root_is_found_again_from_its_command_line_form_in_any_working_directory(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "train").rename(root.parent / name)
    monkeypatch.chdir(root.parent)
    source = Folder(name, split_fraction=0.4)
    spec = DATASETS.spec(source)
    monkeypatch.chdir(root)
    assert DATASETS.parse(spec) == source
    assert len(DATASETS.parse(spec).samples("train")) == len(source.samples("train"))


@pytest.mark.parametrize("options", [{}, {"root": "x", "split_fraction": 0.0}, {"root": "x", "split_fraction": 1.5}])
def test_impossible_options_of_a_folder_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        DATASETS.build("folder", **options)


def test_digits_are_scikit_learns_and_every_fifth_is_for_testing() -> None:
    source = DATASETS.build("digits")
    train, test = source.samples("train"), source.samples("test")
    assert (len(train), len(test)) == (1438, 359)
    assert not {sample.key for sample in train} & {sample.key for sample in test}
    assert [sample.label for sample in test][:5] == [4, 9, 4, 9, 4]
    assert test[0].key == "digits/0004"
