"""People's own images as they lie about: nothing of them is lost without a word."""

import os
import shutil
import socket
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kdcache import stats
from kdcache.archive import ArchiveWriter, open_archive, write_archive
from kdcache.cli import run
from kdcache.datasets import DATASETS, Images
from kdcache.datasets.canvas import Canvas, load_canvas
from kdcache.errors import IntegrityError, KdcacheError, UsageError
from kdcache.targets import Targets
from tests import miniatures
from tests.miniatures import add, encoded


class Said:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def update(self, task: str, done: int, total: int, note: str = "") -> None: ...

    def table(self, columns: Any, rows: Any) -> None: ...


def canvas_of(spec: str, home: Path, split: Any = "train", **options: Any) -> tuple[Canvas, list[str]]:
    said = Said()
    return load_canvas(DATASETS.parse(spec), split, 8, home, said, **options), said.lines


def folder(root: Path, count: int = 2) -> Path:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for i in range(count):
                miniatures.save(root / split / name / f"{i}.jpg")
    return root


# ---------------------------------------------------------------- folders


def test_what_is_an_image_by_its_first_bytes_is_used_and_other_files_are_counted(tmp_path: Path) -> None:
    cat = folder(tmp_path / "f") / "train/cat"
    for name, kind in (
        ("noend", "jpeg"),
        ("a.JPEG_", "jpeg"),
        ("b.dat", "png"),
        ("c.12345", "webp"),
        ("d.heic", "jpeg"),
        ("e.x", "bmp"),
    ):
        (cat / name).write_bytes(encoded(kind))
    for name, kind in (("f", "gif"), ("g.bin", "tiff"), ("h", "jpeg2000"), ("i.avifs", "avif"), ("j", "ppm")):
        (cat / name).write_bytes(encoded(kind))
    for name, data in (
        ("notes.txt", b"x"),
        ("boxes.xml", b"<a/>"),
        ("clip.mp4", b"\0\0\0\x18ftypmp42\0\0\0\0isom"),
        ("LICENSE", b"MIT"),
    ):
        (cat / name).write_bytes(data)
    (cat / ".hidden.png").write_bytes(encoded("png"))
    (tmp_path / "f/train/loose.jpg").write_bytes(encoded())
    (tmp_path / "f/train/.cache").mkdir()
    canvas, said = canvas_of(f"folder:{tmp_path / 'f'}", tmp_path / "home")
    used = {key.partition("/")[2] for key in canvas.keys if key.startswith("cat/")}
    assert used == {"0.jpg", "1.jpg", "noend", "a.JPEG_", "b.dat", "c.12345", "d.heic", "e.x", "f", "g.bin", "h", "i.avifs", "j"}
    counted = {"*.txt": 1, "*.xml": 1, "*.mp4": 1, "without an ending": 1, "hidden images": 1, "images in no class folder": 1}
    assert canvas.card.unused == {**counted, "hidden folders": 1}
    assert any("7 files beside the train images are not used" in line and "1 *.mp4" in line for line in said)
    again, said = canvas_of(f"folder:{tmp_path / 'f'}", tmp_path / "home")
    assert again.path == canvas.path
    assert any("are not used" in line for line in said)


def test_what_systems_leave_beside_images_is_neither_a_sample_nor_a_class(tmp_path: Path) -> None:
    root = folder(tmp_path / "f")
    before, _ = canvas_of(f"folder:{root}", tmp_path / "a")
    for place in (root, root / "train", root / "train/cat", root / "test"):
        for name in ("@eaDir", "__MACOSX", ".AppleDouble", "#recycle", "lost+found", ".Trash-1000", "$RECYCLE.BIN"):
            (place / name / "cat").mkdir(parents=True)
            (place / name / "0.jpg").write_bytes(encoded())
            (place / name / "cat/1.jpg").write_bytes(encoded())
        for name in (".DS_Store", "._0.jpg", "Thumbs.db", "desktop.ini"):
            (place / name).write_bytes(encoded())
    after, said = canvas_of(f"folder:{root}", tmp_path / "b")
    assert after.card == before.card
    assert not after.card.unused
    assert not any("not used" in line for line in said)


def test_images_that_cannot_be_decoded_are_all_named_with_what_they_are(tmp_path: Path) -> None:
    root = folder(tmp_path / "f")
    cat = root / "train/cat"
    (cat / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (cat / "b.dng").write_bytes(encoded("tiff"))
    (cat / "c.bin").write_bytes(b"\xff\x0a" + bytes(50))
    (cat / "d.png").symlink_to(tmp_path / "gone.png")
    (cat / "e.png").symlink_to("e.png")
    os.mkfifo(cat / "f.png")
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        os.chdir(cat)  # its address has at most 108 bytes
        listening.bind("g.png")
        os.chdir(here)
    (cat / "h.dcm").write_bytes(bytes(128) + b"DICM" + bytes(50))
    os.mkfifo(cat / "i")
    reasons = {
        "a.heic": "HEIC", "b.dng": "raw photograph", "c.bin": "JPEG XL", "d.png": "gone.png, which is not there",
        "e.png": "nowhere", "f.png": "named pipe", "g.png": "socket", "h.dcm": "DICOM",
    }  # fmt: skip
    with pytest.raises(IntegrityError) as caught:
        canvas_of(f"folder:{root}", tmp_path / "home")
    for name, reason in reasons.items():
        assert f"cat/{name} (" in caught.value.what
        assert reason in caught.value.what.partition(f"cat/{name} (")[2].partition(")")[0] + ")", name
    assert "8 of 12" in caught.value.what
    canvas, _ = canvas_of(f"folder:{root}", tmp_path / "home", skip_corrupt=True)
    assert len(canvas) == 4
    assert canvas.card.skipped == tuple(f"cat/{name}" for name in reasons)
    assert canvas.card.unused == {"without an ending": 1}


def test_folders_beside_the_splits_are_told(tmp_path: Path) -> None:
    root = folder(tmp_path / "f")
    shutil.copytree(root / "test", root / "val")
    (root / "docs").mkdir()
    canvas, said = canvas_of(f"folder:{root}", tmp_path / "home", "test")
    assert canvas.card.unused == {"images in val/, which is neither split": 4}
    assert any("val/" in line for line in said)


def test_links_in_circles_of_several_folders_end(tmp_path: Path) -> None:
    root = folder(tmp_path / "f")
    (root / "train/cat/up").symlink_to(root)
    (root / "train/cat/dogs").symlink_to("../dog")
    (root / "train/dog/cats").symlink_to("../cat")
    keys = [sample.key for sample in DATASETS.parse(f"folder:{root}").open(tmp_path).samples("train")]
    assert keys == sorted([*(f"cat/{i}.jpg" for i in (0, 1)), *(f"cat/dogs/{i}.jpg" for i in (0, 1)),
                           *(f"dog/{i}.jpg" for i in (0, 1)), *(f"dog/cats/{i}.jpg" for i in (0, 1))])  # fmt: skip


def test_links_to_folders_that_are_not_there_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "f")
    (root / "train/cat/more").symlink_to(tmp_path / "unmounted")
    with pytest.raises(IntegrityError, match=r"cat/more .a link to .*unmounted"):
        canvas_of(f"folder:{root}", tmp_path / "home")
    (root / "train/bird").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UsageError, match="bird is a link that leads nowhere"):
        canvas_of(f"folder:{root}", tmp_path / "home")
    shutil.copytree(root / "train/dog", tmp_path / "unmounted")
    assert canvas_of(f"folder:{root}", tmp_path / "home")[0].card.class_names == ("bird", "cat", "dog")


def test_one_class_in_two_spellings_is_refused_and_test_folders_may_be_spelled_otherwise(tmp_path: Path) -> None:
    root = folder(tmp_path / "f")
    composed, apart = "caf\u00e9", "cafe\u0301"
    (root / "train/cat").rename(root / "train" / composed)
    (root / "test/cat").rename(root / "test" / apart)
    images = DATASETS.parse(f"folder:{root}").open(tmp_path)
    assert {sample.label for sample in images.samples("test")} == {0, 1}
    (root / "train/dog").rename(root / "train" / apart)
    with pytest.raises(UsageError, match="twice"):
        images.class_names()


def test_testing_on_the_training_images_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "f", 12)
    shutil.rmtree(root / "test")
    (root / "test").symlink_to("train")
    with pytest.raises(UsageError, match="trained on") as caught:
        canvas_of(f"folder:{root}", tmp_path / "home")
    spec = caught.value.fix.partition("--dataset ")[2].partition(";")[0]
    for split in ("train", "test"):
        assert len(canvas_of(spec, tmp_path / "home", split)[0])
    home = ["--home", str(tmp_path / "home")]
    common = ["--teacher", "test_vit", "--dataset", f"folder:{root}", "--size", "32", "--canvas", "32", *home]
    train = ["train-teacher", *common, "--from-scratch", "--epochs", "1", "--batch-size", "3"]
    assert run(train) == UsageError.exit_code
    assert run([*train, "--force"]) == 0  # as the error says
    dump = ["dump-teacher", *common, "--views", "1", "--no-finetune"]
    assert run(dump) == UsageError.exit_code
    assert run([*dump, "--force"]) == 0
    student = ["distill", "--student", "test_vit", "--epochs", "1", "--batch-size", "6", *home]
    assert run(student) == UsageError.exit_code
    assert run([*student, "--force"]) == 0
    archive = str(next((tmp_path / "home/archives").iterdir()))
    assert run(["verify", archive, "--replay", "4", *home]) == 0


def test_files_beside_the_images_change_no_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "f", 3)
    common = ["--teacher", "test_vit", "--dataset", f"folder:{root}", "--size", "32", "--canvas", "32", "--home"]
    assert run(["train-teacher", *common, str(tmp_path / "home"), "--from-scratch", "--epochs", "1", "--batch-size", "3"]) == 0
    teacher = next((tmp_path / "home/teachers").iterdir())
    dump = ["dump-teacher", *common, str(tmp_path / "home"), "--views", "1", "--no-finetune", "--output", str(tmp_path / "a")]
    assert run(dump) == 0
    (root / "train/cat/notes.txt").write_text("x")
    dump[dump.index(str(tmp_path / "home"))] = str(tmp_path / "other")  # where the canvas is built anew
    dump[dump.index("1")] = "2"
    capsys.readouterr()
    assert run([*dump, "--teacher-folder", str(teacher)]) == 0, capsys.readouterr().err
    assert "1 files beside the train images are not used" in capsys.readouterr().err
    assert open_archive(tmp_path / "a").num_views == 2


def test_sound_images_with_large_texts_and_profiles_are_decoded(tmp_path: Path) -> None:
    root = folder(tmp_path / "f")
    plain = miniatures.picture()
    texts = PngInfo()
    for i in range(3):
        texts.add_text(f"part {i}", "x" * (3 << 20), zip=True)
    texts.add_itxt("XML:com.adobe.xmp", "y" * (3 << 20), zip=True)
    plain.save(root / "train/cat/0.png", pnginfo=texts)
    plain.save(root / "train/cat/1.png", icc_profile=os.urandom(2 << 20))
    plain.save(root / "train/cat/2.png")
    canvas, _ = canvas_of(f"folder:{root}", tmp_path / "home")
    same = [canvas.pixels[canvas.keys.index(f"cat/{i}.png")] for i in range(3)]
    np.testing.assert_array_equal(same[0], same[2])
    np.testing.assert_array_equal(same[1], same[2])


def test_images_beyond_pillows_limit_are_decoded_if_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    root = folder(tmp_path / "f")
    miniatures.save(root / "train/cat/large.png", (40, 30))
    with pytest.raises(IntegrityError, match="it has 1,200 pixels: decoded with --allow-large") as caught:
        canvas_of(f"folder:{root}", tmp_path / "home")
    assert "--allow-large" in caught.value.fix
    canvas, _ = canvas_of(f"folder:{root}", tmp_path / "home", allow_large=True)  # behind what was decoded before
    assert canvas.sizes[canvas.keys.index("cat/large.png")].tolist() == [40, 30]
    assert Image.MAX_IMAGE_PIXELS == 400


@pytest.mark.exhaustive
def test_an_image_of_182_megapixels_is_dumped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "f")
    Image.new("L", (13500, 13500), 90).save(root / "train/cat/large.png")
    train = [
        "train-teacher",
        "--teacher",
        "test_vit",
        "--dataset",
        f"folder:{root}",
        "--size",
        "32",
        "--canvas",
        "32",
        "--from-scratch",
    ]
    train += ["--epochs", "1", "--batch-size", "3", "--home", str(tmp_path / "home")]
    assert run(train) == 4
    assert "182,250,000 pixels" in capsys.readouterr().err
    assert run([*train, "--allow-large"]) == 0


# ---------------------------------------------------------------- tar files


def shard(file: Path, *files: tuple[str, bytes]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, data in files:
            add(tar, name, data)
    return file


def tars(root: Path, *train: tuple[str, bytes], names: str = "a\nb\n") -> Path:
    """Training shard of these members, and a test shard of one sample of each class."""
    root.mkdir()
    (root / "class_names.txt").write_text(names)
    shard(root / "train-0.tar", *train)
    shard(root / "test-0.tar", ("x.jpg", encoded()), ("x.cls", b"0"), ("y.jpg", encoded()), ("y.cls", b"1"))
    return root


def keys_of(root: Path, split: Any = "train") -> dict[str, int]:
    return {sample.key: sample.label for sample in DATASETS.parse(f"tars:{root}").open(root).samples(split)}


PAIR = (("0.jpg", encoded()), ("0.cls", b"0"), ("1.jpg", encoded()), ("1.cls", b"1"))


def test_keys_with_dots_are_all_used(tmp_path: Path) -> None:
    members = [(f"img.{i}.{kind}", data) for i in range(4) for kind, data in (("jpg", encoded()), ("cls", b"%d" % (i % 2)))]
    assert keys_of(tars(tmp_path / "t", *members)) == {f"train-0/img.{i}": i % 2 for i in range(4)}


def test_webdatasets_keys_end_at_the_first_dot_and_further_images_of_a_sample_are_counted(tmp_path: Path) -> None:
    one = [(f"{i}.rgb.jpg", encoded()) for i in range(2)] + [(f"{i}.cls", b"%d" % i) for i in range(2)]
    assert keys_of(tars(tmp_path / "one", *one)) == {"train-0/0": 0, "train-0/1": 1}
    root = tars(tmp_path / "mask", *PAIR, ("0.seg.png", encoded("png")), ("1.seg.png", encoded("png")), ("0.json", b"{}"))
    assert keys_of(root) == {"train-0/0": 0, "train-0/1": 1}
    assert canvas_of(f"tars:{root}", tmp_path)[0].card.unused == {"further images of samples, *.seg.*": 2, "*.json": 1}
    with pytest.raises(UsageError, match=r"0.left.jpg and 0.right.jpg share the label 0.cls"):
        keys_of(tars(tmp_path / "two", ("0.left.jpg", encoded()), ("0.right.jpg", encoded()), ("0.cls", b"0"), *PAIR[2:]))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([("0.jpg", encoded())], "0.jpg is the second one of its kind for the key 0"),
        ([("0.png", encoded("png"))], "0.png is the second"),
        ([("0.cls", b"1")], "0.cls is the second"),
        ([("2.jpg", encoded())], "2.jpg has an image without a label"),
        ([("2.cls", b"0")], "2.cls has a label without an image"),
        ([("2.jpg", encoded()), ("2.cls", b"2")], "are they numbered from 1 on"),
        ([("2.jpg", encoded()), ("2.cls", b"-1")], "'-1'"),
        ([("2.jpg", encoded()), ("2.cls", b"0.5")], "'0.5'"),
        ([("2.jpg", encoded()), ("2.cls", b"")], "2.cls holds ''"),
        ([("2.jpg", encoded()), ("2.cls", b"c")], "'c'"),
        ([("2.jpg", encoded()), ("2.cls", b"9" * 5000)], "'999"),
    ],
)
def test_members_that_would_hide_others_or_have_no_partner_are_refused(tmp_path: Path, more: Any, said: str) -> None:
    with pytest.raises(KdcacheError) as caught:
        keys_of(tars(tmp_path / "t", *PAIR, *more))
    assert said in str(caught.value)
    assert not any(word in caught.value.fix.split() for word in ("rm", "delete"))


def test_members_of_any_ending_are_used_by_their_first_bytes_and_labels_may_be_names(tmp_path: Path) -> None:
    members = [
        ("0.img", encoded()),
        ("0.cls", b"a\n"),
        ("1", encoded("png")),
        ("1.cls", b" b"),
        ("./d/2.JPG", encoded()),
        ("./d/2.CLS", b"1"),
    ]
    strays = [("._0.img", encoded()), ("__MACOSX/0.jpg", encoded()), (".DS_Store", b"x"), ("readme.md", b"x")]
    root = tars(tmp_path / "t", *members, *strays)
    assert keys_of(root) == {"train-0/0": 0, "train-0/1": 1, "train-0/d/2": 1}
    assert canvas_of(f"tars:{root}", tmp_path)[0].card.unused == {"*.md": 1}


def test_links_are_followed_and_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    root = tars(tmp_path / "t", *PAIR)
    with tarfile.open(root / "train-0.tar", "a") as tar:
        for name, kind, target in (
            ("d/2.jpg", tarfile.LNKTYPE, "1.jpg"), ("d/3.jpg", tarfile.SYMTYPE, "../0.jpg"),
            ("4.jpg", tarfile.SYMTYPE, "/gone.jpg"), ("5.jpg", tarfile.FIFOTYPE, ""),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
            add(tar, name.replace(".jpg", ".cls"), b"1")
        add(tar, "6.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
        add(tar, "6.cls", b"1")
    with pytest.raises(IntegrityError) as caught:
        canvas_of(f"tars:{root}", tmp_path)
    for name, reason in (("4", "gone.jpg"), ("5", "not a file"), ("6", "HEIC")):
        assert reason in caught.value.what.partition(f"train-0/{name} (")[2].partition(")")[0]
    assert "3 of 7" in caught.value.what
    canvas, _ = canvas_of(f"tars:{root}", tmp_path, skip_corrupt=True)
    assert canvas.keys == ("train-0/0", "train-0/1", "train-0/d/2", "train-0/d/3")
    np.testing.assert_array_equal(canvas.pixels[2], canvas.pixels[1])
    np.testing.assert_array_equal(canvas.pixels[3], canvas.pixels[0])


def test_shards_that_were_joined_by_cat_are_read_to_their_end_and_damage_between_members_is_found(tmp_path: Path) -> None:
    root = tars(tmp_path / "t", *PAIR)
    other = shard(tmp_path / "other.tar", ("2.jpg", encoded()), ("2.cls", b"1"))
    whole = (root / "train-0.tar").read_bytes()
    (root / "train-0.tar").write_bytes(whole + other.read_bytes())
    assert len(keys_of(root)) == 3
    at = whole.index(b"1.jpg")
    (root / "train-0.tar").write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])  # its header's checksum fails
    with pytest.raises(IntegrityError, match="damaged") as caught:
        keys_of(root)
    assert "rm " not in caught.value.fix


def test_shards_that_are_no_files_are_refused(tmp_path: Path) -> None:
    for name, make in (("train-1.tar", os.mkfifo), ("val-1.tar", lambda path: path.symlink_to("gone.tar"))):
        root = tars(tmp_path / name, *PAIR)
        make(root / name)
        with pytest.raises(UsageError, match=f"{name} is no file"):
            keys_of(root)


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("name", ["train-0.tar.{}", "train-0.tar"])
def test_compressed_shards_are_refused_and_the_fix_works(tmp_path: Path, mode: str, name: str) -> None:
    root = tars(tmp_path / "t", *PAIR)
    packed = root / name.format(mode)
    with tarfile.open(tmp_path / "packed", f"w:{mode}") as tar:  # type: ignore[call-overload]
        for member, data in PAIR:
            add(tar, member, data)
    (root / "train-0.tar").rename(root / "train-1.tar")
    (tmp_path / "packed").rename(packed)
    with pytest.raises(UsageError, match="is compressed") as caught:
        keys_of(root)
    assert os.system(caught.value.fix.partition(": ")[2].partition(", and keep")[0]) == 0
    packed.rename(tmp_path / packed.name)
    assert len(keys_of(root)) == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a\n\nb\n", "line 2 is empty"),
        (b"a\nb\na\n", "'a' twice"),
        (b"caf\xc3\xa9\ncafe\xcc\x81\n", "NFC"),
        (b"\xff\xfea", "no text in UTF-8"),
    ],
)
def test_names_that_leave_numbers_open_are_refused(tmp_path: Path, text: bytes, said: str) -> None:
    for make in (miniatures.tars, miniatures.arrays):
        root = tmp_path / make.__name__
        make(root)
        (root / "class_names.txt").write_bytes(text)
        with pytest.raises(UsageError) as caught:
            DATASETS.parse(f"{make.__name__}:{root}").open(tmp_path).class_names()
        assert said in str(caught.value)
        (root / "class_names.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\nc\r\n\n")
        assert DATASETS.parse(f"{make.__name__}:{root}").open(tmp_path).class_names() == ("a", "b", "c")


# ---------------------------------------------------------------- labels and arrays


def arrays(root: Path, **changed: Any) -> Images:
    """Six training and four test images of three classes, with what is `changed`."""
    pixels = np.random.default_rng(5).integers(0, 256, (10, 6, 5, 3), dtype=np.uint8)
    parts = {
        "train_images": pixels[:6],
        "train_labels": np.arange(6) % 3,
        "test_images": pixels[6:],
        "test_labels": np.arange(4) % 3,
    }
    root.mkdir(exist_ok=True)
    for name, values in (parts | changed).items():
        np.save(root / f"{name}.npy", values)
    return DATASETS.parse(f"arrays:{root}").open(root)


def numbers(images: Images, split: Any = "train") -> list[int]:
    return [sample.label for sample in images.samples(split)]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64, np.uint64])
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_whole_numbers_of_any_type_are_labels(tmp_path: Path, dtype: Any, shape: Any) -> None:
    images = arrays(tmp_path / "a", train_labels=np.arange(6).astype(dtype).reshape(shape) % 3)
    assert numbers(images) == [0, 1, 2, 0, 1, 2]
    assert images.class_names() == ("0", "1", "2")


def test_texts_are_classes_and_those_that_are_numbers_are_in_their_order(tmp_path: Path) -> None:
    images = arrays(tmp_path / "a", train_labels=np.array([*"cabcab"]), test_labels=np.array([*"abcc"]))
    assert images.class_names() == ("a", "b", "c")
    assert numbers(images) == [2, 0, 1, 2, 0, 1]
    images = arrays(tmp_path / "a", train_labels=np.array(["10", "2", "1"] * 2), test_labels=np.array(["1", "2", "10", "1"]))
    assert images.class_names() == ("1", "2", "10")
    assert numbers(images, "test") == [0, 1, 2, 0]
    (tmp_path / "a/class_names.txt").write_text("10\n2\n1\n7\n")
    assert numbers(DATASETS.parse(f"arrays:{tmp_path / 'a'}").open(tmp_path)) == [0, 1, 2, 0, 1, 2]
    images = arrays(tmp_path / "b", train_labels=np.array([b"x", b"y"] * 3), test_labels=np.array([b"y"] * 4))
    assert images.class_names() == ("x", "y")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1, 2.5, 0, 1, 2], "train label 2 is 2.5"),
        ([0, 1, np.nan, 0, 1, 2], "train label 2 is nan"),
        ([0, 1, np.inf, 0, 1, 2], "train label 2 is inf"),
        ([0, 1, -1, 0, 1, 2], "train label 2 is -1"),
        ([1, 2, 3, 1, 2, 3], "these seem to be from 1 on"),
        ([0, 1, 3, 0, 1, 3], "no training image has the label 2"),
        ([0, 1, 10**12, 0, 1, 2], "no training image has the label 3, 4, 5, 6, 7, ..."),
        ([True, False] * 3, "train label 0 is True"),
        ([0, 1 + 1j, 2, 0, 1, 2], "a complex is neither"),
        (np.eye(6, dtype=int), "[6, 6]"),
        (["a", "", "b"] * 2, "train label 1 is ''"),
        (["a", " ", "b"] * 2, "train label 1 is ' '"),
        (["a", "b", "b"] * 2, "test label 0 is the number 0, train label 0 the text 'a'"),
        (np.array(["2020-01-01"] * 6, "M8[D]"), "date is neither"),
        ([0, 1], "train_labels has 2 labels"),
        (5, "has 1 labels"),
    ],
    ids=str,
)
def test_labels_that_name_no_class_are_refused(tmp_path: Path, labels: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        arrays(tmp_path / "a", train_labels=np.array(labels))
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


def test_a_gap_that_is_meant_is_said_by_names(tmp_path: Path) -> None:
    changed = {"train_labels": np.array([0, 1, 3] * 2), "test_labels": np.array([0, 1, 3, 3])}
    with pytest.raises(UsageError, match="the label 2") as caught:
        arrays(tmp_path / "a", **changed)
    listing = Path(caught.value.fix.rpartition(": ")[2].partition(",")[0])
    listing.write_text("a\nb\nc\nd\n")
    assert numbers(arrays(tmp_path / "a", **changed)) == [0, 1, 3, 0, 1, 3]
    with pytest.raises(UsageError, match="from 1 to 4") as caught:
        arrays(tmp_path / "a", train_labels=np.array([1, 2, 3, 4, 1, 2]))
    assert "subtract 1" in caught.value.fix
    with pytest.raises(UsageError, match="test label 0 is 'e'"):
        arrays(tmp_path / "a", train_labels=np.array([*"abcdab"]), test_labels=np.array([*"eabc"]))


@pytest.mark.parametrize("shape", [(6, 6, 5), (6, 6, 5, 1), (6, 1, 6, 5)])
def test_grey_arrays_of_any_shape_are_the_same_pictures(tmp_path: Path, shape: tuple[int, ...]) -> None:
    grey = np.random.default_rng(1).integers(0, 256, (6, 6, 5), dtype=np.uint8)
    image = arrays(tmp_path / "a", train_images=grey.reshape(shape)).samples("train")[3].load()
    assert image.mode == "L"
    np.testing.assert_array_equal(np.asarray(image), grey[3])


PIXELS = np.random.default_rng(2).integers(0, 256, (6, 6, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "pixels",
    [
        (PIXELS / 255).astype(np.float32), PIXELS / 255, PIXELS.astype(np.float32), PIXELS.astype(np.int64),
        PIXELS.astype(np.uint16) * 257, PIXELS.astype(np.uint16) * 16 + 3, PIXELS.astype(np.uint16),
        np.concatenate([PIXELS, PIXELS[..., :1]], axis=3),
        np.concatenate([PIXELS, PIXELS[..., :1]], axis=3).transpose(0, 3, 1, 2),
    ],
    ids=["float32", "float64", "float to 255", "int64", "16 bits", "12 bits", "uint16 to 255", "alpha", "alpha first"],
)  # fmt: skip
def test_the_fix_for_other_pixels_makes_the_same_pictures(tmp_path: Path, pixels: Any) -> None:
    with pytest.raises(UsageError, match="train_images is") as caught:
        arrays(tmp_path / "a", train_images=pixels)
    expression = caught.value.fix.partition(": ")[2].partition(", if")[0]
    images = arrays(tmp_path / "a", train_images=eval(expression, {"train_images": pixels}))
    for i, sample in enumerate(images.samples("train")):
        np.testing.assert_array_equal(np.asarray(sample.load()), PIXELS[i])


@pytest.mark.parametrize(
    "pixels", [PIXELS - 128.0, np.full(PIXELS.shape, np.nan), PIXELS * 1j, PIXELS.astype(str), PIXELS.astype(int) * -(10**6)]
)
def test_pixels_without_a_meaning_are_refused_without_a_guess(tmp_path: Path, pixels: Any) -> None:
    with pytest.raises(UsageError, match="train_images is") as caught:
        arrays(tmp_path / "a", train_images=pixels)
    assert not any(text in caught.value.fix for text in ("* 255).round().astype", "(images"))


def test_arrays_that_are_pickled_or_missing_are_told_as_such(tmp_path: Path) -> None:
    objects = np.array(["a", "b", "c"] * 2, object)
    with pytest.raises(UsageError, match="train_labels holds Python objects") as caught:
        arrays(tmp_path / "a", train_labels=objects)
    import numpy

    texts = eval(caught.value.fix.partition(": ")[2], {"numpy": numpy, "train_labels": objects})
    assert numbers(arrays(tmp_path / "a", train_labels=texts, test_labels=np.array([*"abca"]))) == [0, 1, 2, 0, 1, 2]
    np.savez(tmp_path / "x.npz", x_train=PIXELS)
    with pytest.raises(UsageError, match="no array train_images") as caught:
        DATASETS.parse(f"arrays:{tmp_path / 'x.npz'}").open(tmp_path)
    assert "it has x_train" in caught.value.why


def test_arrays_that_are_the_same_for_both_splits_are_said(tmp_path: Path) -> None:
    same = {
        f"{split}_{what}": values
        for split in ("train", "test")
        for what, values in (("images", PIXELS), ("labels", np.arange(6) % 3))
    }
    assert "are the same images" in " ".join(arrays(tmp_path / "a", **same).remarks)  # type: ignore[attr-defined]
    assert "are the same images" not in " ".join(arrays(tmp_path / "b").remarks)  # type: ignore[attr-defined]


# ---------------------------------------------------------------- the Hub's form


def hub(root: Path, labels: Any, feature: Any = None, splits: tuple[str, ...] = ("train", "test")) -> Callable[..., Images]:
    from datasets import Dataset, Features, Value
    from datasets import Image as Pictures

    features = Features({"image": Pictures(), "label": feature or Value("string")})
    (root / "data").mkdir(parents=True)
    for split in splits:
        rows = {"image": [miniatures.picture() for _ in labels], "label": labels}
        Dataset.from_dict(rows, features=features).to_parquet(root / f"data/{split}-00000-of-00001.parquet")
    return lambda options="": DATASETS.parse(f"hf:{root}{options}").open(root.parent / "home")


def test_texts_of_the_hub_that_are_numbers_are_in_their_order(tmp_path: Path) -> None:
    images = hub(tmp_path / "h", ["10", "9", "1", "10"])()
    assert images.class_names() == ["1", "9", "10"]
    assert numbers(images) == [2, 1, 0, 2]


@pytest.mark.parametrize(
    ("labels", "kind", "said"),
    [
        (["a", None, "b"], "string", "train label 1 is None"),
        (["a", "", "b"], "string", "train label 1 is ''"),
        ([0.5, 1.0, 2.0], "float64", "train label 0 is 0.5"),
        ([[0, 1], [1], [2]], "list", "a list is neither"),
        ([0, None, 1], "names", "train label 1 is None"),
        ([0, -1, 1], "names", "train label 1 is -1"),
    ],
)
def test_labels_of_the_hub_that_name_no_class_are_refused(tmp_path: Path, labels: Any, kind: str, said: str) -> None:
    from datasets import ClassLabel, List, Value

    feature = {"list": List(Value("int64")), "names": ClassLabel(names=["a", "b"])}.get(kind) or Value(kind)
    with pytest.raises(UsageError) as caught:
        hub(tmp_path / "h", labels, feature)()
    assert said in str(caught.value)


def test_without_a_test_split_a_part_is_held_out_and_said(tmp_path: Path) -> None:
    opened = hub(tmp_path / "h", ["a", "b"] * 30, splits=("train",))
    images = opened()
    train, test = ({sample.key for sample in images.samples(split)} for split in ("train", "test"))
    assert not train & test
    assert len(train | test) == 60
    assert 4 < len(test) < 22
    assert "0.2 of the images of split train are held out" in images.remarks[0]  # type: ignore[attr-defined]
    assert len(opened(",test=0.5").samples("test")) > len(test)
    assert opened(",test=0.5").fingerprint() != images.fingerprint()
    refused = opened(",test=train").refused  # type: ignore[attr-defined] # by `load_canvas`, without --force
    assert "trained on" in refused.what
    assert "test=0.2" in refused.fix
    for wrong, said in (("1.5", "between 0 and 1"), ("dev", "no split 'dev'")):
        with pytest.raises(UsageError) as caught:
            opened(f",test={wrong}")
        assert said in str(caught.value)
        assert "test=0.2" in caught.value.fix


# ---------------------------------------------------------------- logits that are computed elsewhere

LOGITS = np.random.default_rng(3).normal(0, 4, (2, 5, 3)).astype(np.float32)
NAMES = ["a", "b", "c"]


@pytest.mark.parametrize(
    "given",
    [
        lambda values: values.tolist(),
        lambda values: values.astype(np.float64),
        lambda values: np.ma.array(values, mask=False),
        lambda values: torch.from_numpy(values).requires_grad_(),
        lambda values: torch.from_numpy(values).double().requires_grad_() * 1,
        lambda values: torch.from_numpy(values).bfloat16(),
        lambda values: torch.from_numpy(values).half(),
        lambda values: torch.from_numpy(values).to_sparse(),
        lambda values: [torch.from_numpy(view).requires_grad_() for view in values],
        lambda values: tuple([torch.from_numpy(row) for row in view] for view in values),
        lambda values: (
            -torch.view_as_complex(torch.stack([torch.zeros(values.shape), torch.from_numpy(values)], -1)).conj().imag * -1
        ),
    ],
)
def test_logits_of_any_form_are_written_as_they_are(tmp_path: Path, given: Any) -> None:
    values = given(LOGITS)
    archive = write_archive(
        tmp_path / "a", values, NAMES, codec="f32", labels=torch.tensor([0, 1, 2, 0, 1]), keys=np.array([*"vwxyz"])
    )
    expected = values.detach().to_dense().float().numpy() if isinstance(values, torch.Tensor) else LOGITS
    assert write_archive(tmp_path / "b", values, NAMES, labels=[torch.tensor(2)] * 5).labels().tolist() == [2] * 5  # type: ignore[union-attr]
    np.testing.assert_array_equal([archive.logits(view, slice(0, 5)) for view in (0, 1)], expected)
    assert archive.keys() == [*"vwxyz"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"logits": LOGITS + 0j}, "complex"),
        ({"logits": np.ma.array(LOGITS, mask=LOGITS > 3)}, "is masked"),
        ({"logits": LOGITS.astype(str)}, "logits are <U"),
        ({"logits": LOGITS > 0}, "bool"),
        ({"logits": [[[1, 2, 3], [1, 2]]]}, "no array"),
        ({"logits": LOGITS.astype(object)}, "object"),
        ({"logits": LOGITS.astype(np.float64) * 1e300}, "inf"),
        ({"sample": np.tile(np.arange(5) + 0.5, (2, 1))}, "sample numbers at [0, 0] is 0.5"),
        ({"sample": np.full((2, 5), np.nan)}, "is nan"),
        (
            {"sample": np.ma.array(np.tile(np.arange(5), (2, 1)), mask=np.eye(2, 5, dtype=bool))},
            "sample numbers at [0, 0] is masked",
        ),
        ({"sample": np.tile(np.arange(5), (2, 1)) + 0j}, "complex"),
        ({"sample": np.array([[*"01234"]] * 2)}, "<U1"),
        ({"sample": [[0, 1], [2]]}, "no array"),
        ({"labels": np.array([[0, 1, 2, 0, 1]]).T.repeat(2, 1)}, "shape [5, 2]"),
        ({"labels": [0, 1, 1.5, 0, 1]}, "sample label 2 is 1.5"),
        ({"labels": [0, 1, None, 0, 1]}, "sample label 2 is None"),
        ({"labels": [0, 1, [1], 0, 1]}, "sample label 2 is [1]"),
        ({"labels": ["a", "b", "d", "a", "b"]}, "sample label 2 is 'd'"),
        ({"labels": np.ma.array([0, 1, 2, 0, 1], mask=[0, 0, 1, 0, 0])}, "sample labels at [2] is masked"),
        ({"labels": [0, 1, 3, 0, 1]}, "label 3 with 3 classes"),
        ({"class_names": [0, 1, 2]}, "class 0 is called 0, a int"),
        ({"class_names": ["a", None, "c"]}, "class 1 is called None"),
        ({"class_names": ["a", "\ud800", "c"]}, "class 1 has the name '\\ud800'"),
        ({"class_names": ["a", "", "c"]}, "class 1 has the name ''"),
        ({"class_names": ["caf\u00e9", "cafe\u0301", "c"]}, "spelled in two ways"),
        ({"keys": ["a", "b", "\udcff", "d", "e"]}, "UTF-8"),
        ({"keys": range(5)}, "key 0"),
        ({"logits": [np.ma.array(LOGITS[0], mask=LOGITS[0] > 3), LOGITS[1]]}, "logits[0] at [0, 0] is masked"),
        ({"logits": [LOGITS[0], [[1, 2, 3]] * 4 + [np.ma.array([1, 2, 3], mask=[0, 0, 1])]]}, "logits[1][4] at [2] is masked"),
        ({"logits": torch.from_numpy(LOGITS).to("meta")}, "a tensor that is no array"),
        ({"sample": [np.ma.array(range(5), mask=[0, 0, 1, 0, 0])] * 2}, "sample numbers[0] at [2] is masked"),
        ({"labels": {0: "a", 1: "b", 2: "c", 3: "a", 4: "b"}}, "sample labels are a dict"),
        ({"labels": {0, 1, 2, 3, 4}}, "sample labels are a set"),
        ({"labels": "abcab"}, "sample labels are a str"),
        ({"labels": [0, 1, 2, 0, 1 << 15_000]}, "sample label 4 is a number of 15001 bits"),
        ({"labels": 3}, "sample labels are a int"),
        ({"class_names": {"a", "b", "c"}}, "class names are a set"),
        ({"class_names": "abc"}, "class names are a str"),
        ({"class_names": None}, "class names are a NoneType"),
        ({"class_names": ["a\0", "b", "c"]}, "NUL"),
        ({"keys": set("vwxyz")}, "keys are a set"),
        ({"keys": "vwxyz"}, "keys are a str"),
        ({"keys": np.array("vwxyz")}, "keys are a ndarray"),
        ({"keys": ["a\0b", "c", "d", "e", "f"]}, "without the character NUL"),
        ({"codec": None}, "a NoneType is no name of one"),
        ({"layout": 3}, "a int is no name of one"),
    ],
)
def test_what_numpy_would_change_without_a_word_is_refused_and_leaves_nothing(tmp_path: Path, changed: Any, said: str) -> None:
    given = {"logits": LOGITS, "class_names": NAMES, "codec": "f32"} | changed
    with pytest.raises(UsageError) as caught:
        write_archive(tmp_path / "a", **given)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"digest": np.arange(5) + 0.5}, "digests at [0] is 0.5"),
        ({"digest": np.arange(5) - 1}, "digests at [0] is -1"),
        ({"digest": np.full(5, 2**32)}, "digests at [0] is 4294967296"),
        ({"digest": np.ma.array(range(5), mask=[0, 1, 0, 0, 0])}, "digests at [1] is masked"),
        ({"digest": np.arange(3)}, "digests have the shape [3]"),
        ({"digest": 7}, "digests have the shape []"),
        ({"digest": np.arange(5) * 1j}, "digests are complex128"),
        ({"digest": [*"abcde"]}, "digests are <U1"),
        ({"probe": np.full((5, 16), 256)}, "probes at [0, 0] is 256"),
        ({"probe": np.full((5, 16), 0.7)}, "probes at [0, 0] is 0.7"),
        ({"probe": np.zeros((5, 4), np.uint8)}, "probes have the shape [5, 4]"),
        ({"probe": np.zeros((16, 5), np.uint8)}, "probes have the shape [16, 5]"),
    ],
    ids=str,
)
def test_fingerprints_are_stored_as_they_are_or_refused(tmp_path: Path, changed: Any, said: str) -> None:
    writer = ArchiveWriter(tmp_path / "a", num_views=1, num_samples=5, class_names=NAMES)
    with pytest.raises(UsageError) as caught:
        writer.write(0, 0, LOGITS[0], **changed)
    assert said in str(caught.value)
    digest, probe = np.arange(5) * 800_000_000.0, torch.full((5, 16), 200)
    writer.write(0, 0, LOGITS[0], digest=digest, probe=probe)  # type: ignore[arg-type]
    rows = writer.finalize().read(0, 0, 5)
    assert rows.digest.tolist() == digest.tolist()
    assert rows.probe.tolist() == probe.tolist()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_views": 1.5}, "of 1.5 views"),
        ({"num_views": 0}, "of 0 views"),
        ({"num_samples": "5"}, "of '5' samples"),
        ({"num_samples": 2**31}, "of 2147483648 samples"),
        ({"shard_rows": -1}, "of -1 shard_rows"),
        ({"first_view": 0.5}, "of 0.5 first_view"),
        ({"provenance": {"a": np.float32(1)}}, "provenance that is no JSON"),
        ({"provenance": {"a": "\ud800"}}, "provenance that is no JSON"),
        ({"provenance": {"a": 1 << 15_000}}, "provenance that is no JSON"),
        ({"teacher": "vit"}, "with teacher 'vit'"),
    ],
)
def test_plans_that_no_manifest_could_hold_are_refused(tmp_path: Path, changed: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        ArchiveWriter(tmp_path / "a", **{"num_views": 1, "num_samples": 5, "class_names": NAMES} | changed)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3
    assert not (tmp_path / "a").exists()


def test_rows_that_an_archive_does_not_have_are_never_given(tmp_path: Path) -> None:
    writer = ArchiveWriter(tmp_path / "a", num_views=1, num_samples=5, class_names=NAMES, shard_rows=2)  # the last has padding
    for view, block in writer.missing():
        writer.write(view, block, LOGITS[0, writer.positions(block)])
    archive = writer.finalize()
    for rows in (np.array([5]), np.array([-1]), slice(4, 6), slice(-1, 5), slice(0, 5, 2), slice(None)):
        for read in (archive.logits, lambda view, rows: archive.gather("sample", view, rows)):
            with pytest.raises(IndexError):
                read(0, rows)
    with pytest.raises(UsageError, match="shape"):
        archive.take(0, np.zeros((2, 2), np.int64))
    with pytest.raises(TypeError):
        archive.read(0, 0.5, 2)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no such level"):
        archive.verify("ful")  # type: ignore[arg-type]


@pytest.mark.parametrize("of", [stats.softmax, stats.relative_entropy, stats.logit_moments, stats.entropy])
def test_statistics_are_of_real_numbers_that_are_all_there(of: Any) -> None:
    for wrong in (np.ma.array(LOGITS, mask=LOGITS > 3), LOGITS + 1j, LOGITS > 0, LOGITS.astype(str), [[None, 1.0]], 3.0):
        with pytest.raises(UsageError):
            of(wrong)
    for given in (LOGITS.tolist(), torch.from_numpy(LOGITS).requires_grad_(), [*torch.from_numpy(LOGITS)]):
        np.testing.assert_allclose(of(given), of(LOGITS))
    if of is not stats.logit_moments:
        for tau in (0, -1.0, float("nan"), float("inf")):
            with pytest.raises(UsageError, match="tau is"):
                of(LOGITS, tau)


def test_labels_may_be_names_and_names_may_be_numpys(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "a", LOGITS, np.array(NAMES), labels=np.array([*"cabca"]))  # type: ignore[arg-type]
    assert archive.manifest.class_names == ("a", "b", "c")
    labels = archive.labels()
    assert labels is not None
    assert labels.tolist() == [2, 0, 1, 2, 0]
    floats = write_archive(tmp_path / "b", LOGITS, NAMES, sample=np.tile([4.0, 3, 2, 1, 0], (2, 1)))
    assert floats.find(0, np.array([4.0])).sample.tolist() == [4]
    with pytest.raises(UsageError, match=r"at \[1\] is 2.5"):
        floats.find(0, np.array([4.0, 2.5]))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_probabilities_are_warned_of_and_the_advice_mends_it(tmp_path: Path, dtype: Any) -> None:
    probabilities = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=2, keepdims=True)
    with pytest.warns(UserWarning, match="are probabilities") as caught:
        write_archive(tmp_path / "a", probabilities.astype(dtype), NAMES)
    expression = str(caught[0].message).rpartition(": ")[2]
    mended = eval(expression, {"numpy": np, "probabilities": probabilities})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        archive = write_archive(tmp_path / "b", mended, NAMES)
        write_archive(tmp_path / "c", LOGITS, NAMES)
        write_archive(tmp_path / "d", np.zeros((1, 4, 3)), NAMES)
        write_archive(tmp_path / "e", np.concatenate([probabilities, LOGITS]), NAMES)
    back = np.exp(archive.logits(0, slice(0, 5)))
    np.testing.assert_allclose(back / back.sum(axis=1, keepdims=True), probabilities[0], atol=3e-3)


def test_targets_are_tensors_of_floats() -> None:
    for wrong in (LOGITS[0], torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.complex64)):
        with pytest.raises(ValueError, match="tensor of floats"):
            Targets(wrong, 1.0)  # type: ignore[arg-type]
