"""People's own images as they lie about: nothing of them is lost without a word."""

import os
import shutil
import socket
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.archive import open_archive
from kdcache.cli import run
from kdcache.datasets import DATASETS
from kdcache.datasets.canvas import Canvas, load_canvas
from kdcache.errors import IntegrityError, KdcacheError, UsageError
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
    spec = caught.value.fix.partition("--dataset ")[2]
    for split in ("train", "test"):
        assert len(canvas_of(spec, tmp_path / "home", split)[0])


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
