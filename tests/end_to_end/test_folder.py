"""Dataset `folder`: people's own images, from files to students, and files that are not images."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from kdcache.archive import open_archive
from tests.end_to_end.conftest import with_images

CLASSES = ("bright", "dark", "striped")


def write_images(root, split, count, seed):
    rng = np.random.default_rng(seed)
    for number, name in enumerate(CLASSES):
        folder = root / split / name if split else root / name
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 60, (40, 52, 3)) + (180 if number == 0 else 0)
            if number == 2:
                pixels[:, ::4] = 255
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}-{i:02d}.jpg", quality=95)


SMALL = ["--size", "32", "--canvas", "40", "--epochs", "3", "--batch-size", "16"]


def test_own_images_from_files_to_students(tmp_path, kdcache):
    images, home = tmp_path / "blöcke", tmp_path / "home"
    write_images(images, "train", 20, 0)
    write_images(images, "val", 6, 1)
    trained = kdcache("train-teacher", "--teacher", "test_vit", "--dataset", images, "--from-scratch", *SMALL, "--home", home)
    assert trained.status == 0, trained.err
    assert f"folder:{images}" in trained.err.splitlines()[0]
    told = "60 train and 18 test images of 3 classes: bright, dark, striped"
    assert -1 < trained.err.find(told) < trained.err.find("canvas folder/train")
    assert "licence is unknown" in trained.err
    dataset = f"folder:{images},licence=CC0-1.0"
    dump = ["dump-teacher", "--teacher", "test_vit", "--dataset", dataset, "--size", 32, "--canvas", 40, "--views", 2]
    dumped = kdcache(*dump, "--home", home)
    assert dumped.status == 0, dumped.err
    assert dumped.err.count(told) == 1
    assert "licence is unknown" not in dumped.err
    assert open_archive(dumped.out.strip()).manifest.known_licences.data == "CC0-1.0"
    result = kdcache("distill", "--tau", 4, "--student", "test_resnet", "--epochs", 4, "--batch-size", 16, "--home", home)
    assert result.status == 0, result.err
    sheet = tmp_path / "sheet.png"
    assert kdcache("view", dumped.out.strip(), "--out", sheet, "--home", home).status == 0
    with Image.open(sheet) as drawn:
        assert min(drawn.size) > 300

    # A changed image is noticed: the file is new, the canvas is built again, and the stored views no longer match.
    victim = next((images / "train/dark").iterdir())
    Image.new("RGB", (40, 52), (200, 10, 10)).save(victim)
    changed = kdcache("distill", "--tau", 7, "--student", "test_resnet", "--epochs", 4, "--batch-size", 16, "--home", home)
    assert changed.status == 5
    assert "canvas" in changed.err

    # Other classes are refused before anything is trained.
    (images / "train/dark").rename(images / "train/gloomy")
    (images / "val/dark").rename(images / "val/gloomy")
    other = kdcache("distill", "--tau", 7, "--batch-size", 16, "--home", home)
    assert other.status == 5
    assert "class" in other.err


def test_one_folder_splits_by_name(tmp_path):
    from kdcache.datasets import DATASETS

    write_images(tmp_path, "", 30, 0)
    source = DATASETS.build("folder", root=str(tmp_path), split_fraction=0.3)
    train, test = ({sample.key for sample in source.samples(split)} for split in ("train", "test"))
    assert not train & test
    assert len(train | test) == 90
    assert 10 < len(test) < 45
    (tmp_path / "dark/new.jpg").write_bytes((tmp_path / "dark/dark-00.jpg").read_bytes())
    assert {sample.key for sample in source.samples("test")} - {"dark/new.jpg"} == test  # nobody changed sides


def test_files_that_are_no_images_are_all_named_at_once(tmp_path, kdcache):
    images = tmp_path / "images"
    write_images(images, "train", 4, 0)
    write_images(images, "test", 2, 1)
    (images / "train/dark/dark-01.jpg").write_bytes(b"not an image")
    whole = (images / "train/bright/bright-02.jpg").read_bytes()
    (images / "train/bright/bright-02.jpg").write_bytes(whole[: len(whole) // 2])
    result = kdcache(
        "train-teacher", "--teacher", "test_vit", "--dataset", f"folder:{images}", *SMALL, "--home", tmp_path / "home"
    )
    assert result.status == 4
    assert "dark/dark-01.jpg" in result.err
    assert "bright/bright-02.jpg" in result.err
    assert not [path for path in (tmp_path / "home/data").glob("folder-train*") if path.is_dir()]


@pytest.mark.parametrize(
    ("make", "status", "words"),
    [
        (lambda root: None, 3, "does not exist"),
        (lambda root: [(root / folder).mkdir(parents=True) for folder in ("train/a", "test/a")], 2, "class folders"),
        (lambda root: [(root / folder).mkdir(parents=True) for folder in ("train/a", "train/b", "test/a")], 3, "no images"),
    ],
)
def test_a_folder_without_images_says_what_is_missing(tmp_path, kdcache, make, status, words):
    make(tmp_path / "images")
    spec = f"folder:{tmp_path / 'images'}"
    result = kdcache("train-teacher", "--teacher", "test_vit", "--dataset", spec, *SMALL, "--home", tmp_path)
    assert result.status == status
    assert words in result.err


def test_a_checkpoint_of_other_classes_starts_a_new_head(tmp_path, kdcache, trained):
    images = tmp_path / "images"
    write_images(images, "train", 8, 0)
    write_images(images, "test", 2, 1)
    weights = next((trained / "teachers").glob("*/model.safetensors"))
    command = ["train-teacher", "--teacher", "test_vit", "--dataset", f"folder:{images}", "--checkpoint", weights]
    result = kdcache(*command, *SMALL, "--home", tmp_path / "home")
    assert result.status == 0, result.err
    assert "start at zero" in result.err
    dumped = kdcache(
        "dump-teacher", "--teacher", "test_vit", "--dataset", f"folder:{images}", "--canvas", 40, "--size", 32,
        "--teacher-folder", weights.parent, "--home", tmp_path / "home",
    )  # fmt: skip
    assert dumped.status == 5
    assert "10 classes" in dumped.err


def test_every_kind_of_image_becomes_the_same_three_channels(tmp_path):
    from kdcache.datasets import DATASETS
    from kdcache.datasets.canvas import load_canvas

    folder = tmp_path / "images/train/einfärbig"
    folder.mkdir(parents=True)
    (tmp_path / "images/train/zwei").mkdir()
    Image.fromarray(np.full((8, 8), 100, np.uint8)).save(tmp_path / "images/train/zwei/j.png")
    (tmp_path / "images/test").mkdir()
    shape = (30, 40)
    grey = np.full(shape, 100, np.uint8)
    colour = np.stack([grey, grey, grey], axis=2)
    Image.fromarray(colour).save(folder / "a-rgb.png")
    Image.fromarray(grey).save(folder / "b-grey.png")
    Image.fromarray(np.dstack([colour, np.full(shape, 30, np.uint8)])).save(folder / "c-rgba.png")
    Image.fromarray(colour).convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "d-palette.png")
    Image.fromarray(colour).convert("CMYK").save(folder / "e-cmyk.tiff")
    Image.fromarray(np.full(shape, 100 * 257, np.uint16)).save(folder / "f-16-bit.png")
    Image.fromarray(grey[:, :1]).save(folder / "g-one-pixel-wide.png")
    Image.fromarray(colour).save(folder / "h-日本.JPEG", quality=100)
    Image.fromarray(grey).save(folder / ".hidden.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(colour).save(folder / "i-rotated.jpg", exif=exif, quality=100)
    (folder / "notes.txt").write_text("not an image, and not one by its name")
    canvas = load_canvas(DATASETS.build("folder", root=str(tmp_path / "images")), "train", 16, tmp_path / "data")
    assert [key.split("/")[1][0] for key in canvas.keys] == list("abcdefghij")
    for key, pixels in zip(canvas.keys, canvas.pixels, strict=True):
        assert np.abs(pixels.astype(int) - 100).max() <= 2, key
    assert canvas.sizes[8].tolist() == [30, 40]  # width and height after the rotation


@pytest.mark.exhaustive
def test_corrupt_images_are_left_out_by_every_command_and_relative_odd_paths_are_found_again(tmp_path, kdcache, monkeypatch):
    name, home = "eigene, bilder=2", tmp_path / "home"
    images = tmp_path / name
    write_images(images, "train", 12, 0)
    write_images(images, "test", 4, 1)
    (images / "train/dark/dark-01.jpg").write_bytes(b"")
    (images / "test/bright/bright-02.jpg").write_bytes(b"text")
    monkeypatch.chdir(tmp_path)
    common = ["--teacher", "test_vit", "--dataset", r"folder:eigene\, bilder\=2", "--home", home]
    refused = kdcache("train-teacher", *common, "--from-scratch", *SMALL)
    assert refused.status == 4
    assert "--skip-corrupt" in refused.err.splitlines()[-1]
    trained = kdcache("train-teacher", *common, "--from-scratch", *SMALL, "--skip-corrupt")
    assert trained.status == 0, trained.err
    assert "1 of 36 train images are left out, they cannot be decoded: dark/dark-01.jpg" in trained.err
    assert "1 of 12 test images are left out, they cannot be decoded: bright/bright-02.jpg" in trained.err
    dumped = kdcache("dump-teacher", *common, "--size", 32, "--canvas", 40, "--views", 1, "--no-finetune")  # the same canvas
    assert dumped.status == 0, dumped.err
    archive = dumped.out.strip()
    source = json.loads(kdcache("info", "--json", archive).out)["source"]
    assert (source["num_samples"], source["skipped"]) == (35, ["dark/dark-01.jpg"])

    # Another place, and a workspace that has to build its own canvases, for which the archive's place of the images is repeated.
    monkeypatch.chdir(home)
    archive, fresh = with_images(tmp_path / archive), ["--home", tmp_path / "fresh"]
    verified = kdcache("verify", *archive, "--replay", 9, "--skip-corrupt", *fresh)
    assert verified.status == 0, verified.err
    assert "replay 9: ok, 9 checked" in verified.out
    assert kdcache("view", *archive, "--out", tmp_path / "sheet.png", "--skip-corrupt", "--home", tmp_path / "third").status == 0
    students = ["distill", "--archive", *archive, "--student", "test_resnet", "--epochs", 1, "--batch-size", 16, *fresh]
    refused = kdcache(*students)
    assert refused.status == 4
    assert "bright-02.jpg" in refused.err
    assert kdcache(*students, "--skip-corrupt").status == 0


@pytest.mark.parametrize("size", [4097, 1_000_000])
def test_a_canvas_of_absurd_size_is_three_lines(tmp_path, kdcache, size):
    result = kdcache("dump-teacher", "--teacher", "test_vit", "--dataset", "digits", "--canvas", size, "--home", tmp_path)
    assert result.status == 2
    assert f"{size} px" in result.err
    assert [line.partition(":")[0] for line in result.err.splitlines()[-3:]] == ["error", "why", "fix"]


def test_a_place_that_cannot_be_written_is_three_lines(tmp_path, kdcache):
    (tmp_path / "file").touch()
    result = kdcache(
        "dump-teacher", "--teacher", "test_vit", "--dataset", "digits", "--home", tmp_path, "--data-dir", tmp_path / "file/data"
    )
    assert result.status == 75
    assert str(tmp_path / "file/data") in result.err
    assert [line.partition(":")[0] for line in result.err.splitlines()[-3:]] == ["error", "why", "fix"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write to any folder")
def test_a_folder_without_permission_is_three_lines(tmp_path, kdcache):
    (tmp_path / "data").mkdir(mode=0o500)
    result = kdcache("dump-teacher", "--teacher", "test_vit", "--dataset", "digits", "--home", tmp_path)
    assert result.status == 75
    assert "permission denied" in result.err
    assert [line.partition(":")[0] for line in result.err.splitlines()[-3:]] == ["error", "why", "fix"]


def test_linked_class_folders_count_and_empty_ones_are_refused(tmp_path):
    from kdcache.datasets import DATASETS
    from kdcache.errors import UsageError

    write_images(tmp_path / "real", "", 3, 0)
    train = tmp_path / "images/train"
    train.mkdir(parents=True)
    (tmp_path / "images/test").mkdir()
    for name in CLASSES:
        (train / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real/dark/loop").symlink_to(tmp_path / "real/dark")
    source = DATASETS.build("folder", root=str(tmp_path / "images"))
    assert len(source.samples("train")) == 9
    (train / "empty").mkdir()
    with pytest.raises(UsageError, match="empty"):
        source.samples("train")
