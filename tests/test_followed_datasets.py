"""People's own data, wrong in every way that has an error: once they have done what its fix says, the images are read."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.datasets import SPLITS
from kdcache.datasets.naming import find_source
from tests import miniatures
from tests.following import dataset_in, followed
from tests.miniatures import encoded
from tests.test_own_data import PAIR, arrays, folder, shard, tars


def read(spec: str) -> dict[str, int]:
    """What a dump asks of a dataset: its names, and each sample's key and label."""
    images = find_source(spec).open(Path("data"))
    if refused := getattr(images, "refused", None):
        raise refused
    assert len(images.class_names()) >= 2
    return {sample.key: sample.label for split in SPLITS for sample in images.samples(split)}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- arrays

LABELS = np.arange(6) % 3
OBJECTS = np.array(["a", "b", "c"] * 2, object)
PIXELS = np.random.default_rng(2).integers(0, 256, (6, 6, 5, 3), dtype=np.uint8)
ARRAYS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {  # what is wrong, the fix's words, what one then does
    "a fraction": ({"train_labels": LABELS + 0.5}, "correct it", {"train_labels": LABELS}),
    "missing": ({"train_labels": [0, 1, np.nan, 0, 1, 2]}, "correct it", {"train_labels": LABELS}),
    "below 0": (
        {"train_labels": [0, 1, -1, 0, 1, 2]},
        "leave such images out",
        {"train_labels": [0, 1, 0, 1, 2], "train_images": PIXELS[:5]},
    ),
    "from 1 on": (
        {"train_labels": LABELS + 1, "test_labels": [1, 2, 3, 3]},
        "subtract 1 from all labels",
        {"train_labels": LABELS, "test_labels": [0, 1, 2, 2]},
    ),
    "a gap": (
        {"train_labels": [0, 1, 3, 0, 1, 3], "test_labels": [0, 1, 3, 3]},
        "number the classes without gaps",
        {"train_labels": LABELS, "test_labels": [0, 1, 2, 2]},
    ),
    "truth": (
        {"train_labels": LABELS > 0, "test_labels": [0, 1, 1, 0]},
        "labels.astype(int)",
        {"train_labels": (LABELS > 0).astype(int)},
    ),
    "one-hot": (
        {"train_labels": np.eye(3, dtype=int)[LABELS]},
        "labels.argmax(axis=1)",
        {"train_labels": np.eye(3, dtype=int)[LABELS].argmax(axis=1)},
    ),
    "an empty text": (
        {"train_labels": ["a", "", "c"] * 2, "test_labels": [*"acca"]},
        "write its class",
        {"train_labels": [*"abc"] * 2},
    ),
    "numbers and texts": ({"train_labels": [*"abc"] * 2}, "write all of them in one way", {"test_labels": [*"abca"]}),
    "a class of tests only": (
        {"train_labels": [*"abc"] * 2, "test_labels": [*"abcd"]},
        "leave it out",
        {"test_labels": [*"abc"], "test_images": PIXELS[:3]},
    ),
    "fewer labels": ({"train_labels": [0, 1]}, "save as many labels as images", {"train_labels": LABELS}),
    "objects": (
        {"train_labels": OBJECTS, "test_labels": [*"abca"]},
        "numpy.array(",
        {"train_labels": np.array(OBJECTS.tolist())},
    ),
    "four channels": (
        {"train_images": np.concatenate([PIXELS, PIXELS[..., :1]], axis=3)},
        "train_images[..., :3]",
        {"train_images": PIXELS},
    ),
    "no images": ({"train_images": PIXELS[0, 0]}, "save them in one of these shapes", {"train_images": PIXELS}),
    "floats": ({"train_images": PIXELS / 255}, "(train_images * 255).round()", {"train_images": PIXELS}),
    "one name": (
        {"train_labels": np.array(["caf\xe9", "cafe\u0301", "b"] * 2), "test_labels": ["b"] * 4},
        "rename one of them",
        {"train_labels": ["caf\xe9", "tea", "b"] * 2},
    ),
}


def arrays_of(changed: dict[str, Any]) -> dict[str, int]:
    arrays(Path("a"), **{name: np.asarray(values) for name, values in changed.items()})
    return read("arrays:a")


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_are_read_when_they_are_saved_as_the_fix_says(case: str) -> None:
    wrong, says, right = ARRAYS[case]

    def mend(fix: str) -> dict[str, Any]:
        assert says in fix
        return wrong | right

    assert len(followed(arrays_of, wrong, mend)) >= 8


def names_in(fix: str) -> Path:
    """The file that a fix says names are to be written to."""
    return Path(fix.rpartition(": ")[2].partition(", one name a line")[0])


@pytest.mark.parametrize("labels", [[0, 1, 3] * 2, [*"abc"] * 2])
def test_classes_without_images_are_named_in_the_file_that_the_fix_tells(labels: list[Any]) -> None:
    changed = {"train_labels": labels, "test_labels": [3, 3, 1, 0] if 0 in labels else [*"abcd"]}

    def mend(fix: str) -> dict[str, Any]:
        names_in(fix).write_text("\n".join("abcd"))
        return changed

    followed(arrays_of, changed, mend)


# What stands in class_names.txt, the fix's words, and what then stands there.
LISTINGS = {
    "gap": (b"a\n\nc\n", "write the name of that class", "a\nb\nc\n"),
    "no line": (b"a\n\nb\nc\n", "take the line out", "a\nb\nc\n"),
    "twice": (b"a\nb\na\n", "rename one of them", "a\nb\nc\n"),
    "spelling": (b"caf\xc3\xa9\ncafe\xcc\x81\nx\n", "rename one of them", "a\nb\nc\n"),
    "encoding": ("é\nb\nc".encode("latin1"), "save it as UTF-8, one name a line", "é\nb\nc\n"),
    "too few": (b"a\nb\n", "name all classes", "a\nb\nc\n"),
}


@pytest.mark.parametrize("case", LISTINGS)
def test_class_names_are_read_when_they_are_written_as_the_fix_says(case: str) -> None:
    wrong, says, right = LISTINGS[case]
    arrays(Path("a"))
    listing = Path("a/class_names.txt")
    listing.write_bytes(wrong)

    def mend(fix: str) -> str:
        assert says in fix
        listing.write_text(right, encoding="utf-8")
        return "arrays:a"

    assert len(followed(read, "arrays:a", mend)) == 10


# ---------------------------------------------------------------- tar files


def entry(name: str, label: bytes, kind: str = "jpg") -> tuple[tuple[str, bytes], ...]:
    return (f"{name}.{kind}", encoded()), (f"{name}.cls", label)


TARS = {  # members, the fix's words, and the members then
    "doubled": ((*PAIR, *entry("1", b"1")), "rename one of the samples, with its label", (*PAIR, *entry("2", b"1"))),
    "a label of its own": ((*PAIR, ("2.cls", b"0")), "leave the label out", PAIR),
    "a label alone": ((*PAIR, ("2.cls", b"0")), "add the image to the same shard", (*PAIR, *entry("2", b"0"))),
    "an image alone": ((*PAIR, ("2.jpg", encoded())), "write one, with the number or the name", (*PAIR, *entry("2", b"a"))),
    "two images": (
        (*PAIR, ("2.a.jpg", encoded()), ("2.b.jpg", encoded()), ("2.cls", b"0")),
        "write a label for each, 2.a.cls",
        (*PAIR, *entry("2.a", b"0"), *entry("2.b", b"0")),
    ),
    "another class": ((*PAIR, *entry("2", b"2")), "correct the label", (*PAIR, *entry("2", b"1"))),
}


@pytest.mark.parametrize("case", TARS)
def test_shards_are_read_when_they_are_made_as_the_fix_says(case: str) -> None:
    wrong, says, right = TARS[case]
    tars(Path("t"), *wrong)

    def mend(fix: str) -> str:
        assert says in fix
        shard(Path("t/train-0.tar"), *right)
        return "tars:t"

    assert len(followed(read, "tars:t", mend)) == 2 + len(right) // 2


def test_further_classes_of_shards_are_named() -> None:
    tars(Path("t"), *PAIR, *entry("2", b"2"))

    def mend(fix: str) -> str:
        assert "name all classes in class_names.txt" in fix
        Path("t/class_names.txt").write_text("a\nb\nc\n")
        return "tars:t"

    assert len(followed(read, "tars:t", mend)) == 5


def test_names_of_the_classes_of_shards_are_written() -> None:
    tars(Path("t"), *PAIR)
    Path("t/class_names.txt").unlink()

    def mend(fix: str) -> str:
        Path(fix.rpartition(": ")[2]).write_text("a\nb\n")
        return "tars:t"

    assert len(followed(read, "tars:t", mend)) == 4


def test_shards_that_lead_nowhere_are_exchanged() -> None:
    tars(Path("t"), *PAIR)
    Path("t/train-1.tar").symlink_to("nowhere")

    def mend(fix: str) -> str:
        assert fix == "put the shard itself there, or move it elsewhere"
        Path("t/train-1.tar").rename("elsewhere")
        return "tars:t"

    assert len(followed(read, "tars:t", mend)) == 4


def test_shards_without_images_are_looked_into_with_tar() -> None:
    tars(Path("t"), ("readme.txt", b"nothing"))

    def mend(fix: str) -> str:
        listed = subprocess.run(fix.partition("with: ")[2], shell=True, check=True, capture_output=True, text=True)
        assert listed.stdout.split() == ["readme.txt"]
        shard(Path("t/train-0.tar"), *PAIR)
        return "tars:t"

    assert len(followed(read, "tars:t", mend)) == 4


def test_compressed_shards_are_unpacked_by_the_command_of_the_fix() -> None:
    tars(Path("t"), *PAIR)
    subprocess.run("gzip t/train-0.tar", shell=True, check=True)

    def mend(fix: str) -> str:
        subprocess.run(fix.partition(": ")[2].partition(", and keep")[0], shell=True, check=True)
        Path("t/train-0.tar.gz").rename("kept.tar.gz")
        return "tars:t"

    assert len(followed(read, "tars:t", mend)) == 4


# ---------------------------------------------------------------- folders


def after(says: str, *does: Callable[[], object], spec: str = "folder:f") -> Callable[[str], str]:
    def mend(fix: str) -> str:
        assert says in fix, fix
        for each in does:
            each()
        return spec

    return mend


def move(source: str, target: str) -> Callable[[], object]:
    return lambda: Path(source).rename(target)


def image(place: str) -> Callable[[], object]:
    return lambda: miniatures.save(Path(place))


def link(place: str, target: str) -> Callable[[], object]:
    return lambda: Path(place).symlink_to(target)


def away(place: str) -> Callable[[], object]:
    return lambda: shutil.move(place, "elsewhere")


def module(name: str = "my_data") -> None:
    Path(f"{name}.py").write_text("from tests.mapstyle import pictures as make\n")


def saved(fix: str) -> str:
    """Save arrays by the expression that a fix has, with one's own arrays in place of the dots."""
    expression = fix.partition(": ")[2].replace("FILE", "'x.npz'")
    exec(re.sub(r"(\w+)=\.\.\.", r"\1=\1", expression), {"numpy": np} | NPZ)
    return "arrays:x.npz"


def renamed(fix: str) -> str:
    """Two folders of one class become one."""
    wrong = Path(re.fullmatch(r"rename (.*) as the train folder has it, or move it elsewhere", fix)[1])  # type: ignore[index]
    for file in wrong.iterdir():
        file.rename(wrong.with_name("dog") / f"more-{file.name}")
    wrong.rmdir()
    return "folder:f"


NPZ = {"train_images": PIXELS, "train_labels": LABELS, "test_images": PIXELS[1:], "test_labels": LABELS[1:]}
Mend = Callable[[str], str]
FOLDERS: dict[str, tuple[str, list[Callable[[], object]], Mend]] = {  # its name, what is wrong with it, how that is mended
    "no root": ("folder", [], lambda fix: dataset_in(fix).replace("ROOT", "f")),
    "a share above 1": ("folder:root=f/train,split_fraction=2", [], lambda fix: f"folder:root=f/train,{fix.split()[-1]}"),
    "split already": ("folder:root=f,split_fraction=0.2", [], dataset_in),
    "not there": ("folder:g", [], after("correct the path")),
    "created": ("folder:g", [], after("or create the folder", move("f", "g"), spec="folder:g")),
    "no test folder": ("folder:f", [away("f/test")], dataset_in),
    "no train folder": ("folder:f", [away("f/train")], after("create it", move("elsewhere", "f/train"))),
    "neither": ("folder:f/train", [], dataset_in),
    "a link to nowhere": (
        "folder:f",
        [link("f/train/emu", "nowhere")],
        after(
            "make the place that it leads to available", lambda: Path("f/train/nowhere").mkdir(), image("f/train/nowhere/x.jpg")
        ),
    ),
    "moved elsewhere": ("folder:f", [link("f/train/emu", "nowhere")], after("move the link elsewhere", away("f/train/emu"))),
    "one class": (
        "folder:f",
        [away("f/train/dog"), lambda: shutil.rmtree("f/test/dog")],
        after("put the images of each class into a folder of its own", lambda: shutil.move("elsewhere", "f/train/dog")),
    ),
    "an empty class": ("folder:f", [lambda: Path("f/train/emu").mkdir()], after("add images to it", image("f/train/emu/x.jpg"))),
    "an empty class, moved": (
        "folder:f",
        [lambda: Path("f/train/emu").mkdir()],
        after("move the folder elsewhere", away("f/train/emu")),
    ),
    "no images": (
        "folder:f",
        [lambda: shutil.rmtree("f/test/cat"), lambda: shutil.rmtree("f/test/dog")],
        after("layout CLASS/FILE", image("f/test/dog/1.jpg")),
    ),
    "an unprintable name": (
        "folder:f",
        [image("f/train/cat/a\nb.jpg")],
        after("rename the file", move("f/train/cat/a\nb.jpg", "f/train/cat/ab.jpg")),
    ),
    "another class": ("folder:f", [image("f/test/Dog/1.jpg")], renamed),
    "a class of tests": ("folder:f", [image("f/test/emu/1.jpg")], after("or move it elsewhere", away("f/test/emu"))),
    "tests on training images": ("folder:f", [lambda: shutil.rmtree("f/test"), link("f/test", "train")], dataset_in),
    "a folder of classes": ("f/train", [], dataset_in),
    "a folder of trains": ("f", [away("f/test")], dataset_in),
    "arrays": ("a", [lambda: arrays(Path("a"))], dataset_in),
    "an npz": ("z", [lambda: Path("z").mkdir(), lambda: np.savez("z/x.npz", **NPZ)], dataset_in),
    "an npz file": ("./x.npz", [lambda: np.savez("x.npz", **NPZ)], dataset_in),
    "an npz of others": ("arrays:x.npz", [lambda: np.savez("x.npz", x_train=PIXELS)], saved),
    "tars": ("t", [lambda: tars(Path("t"), *PAIR)], dataset_in),
    "a tar": ("./t/train-0.tar", [lambda: tars(Path("t"), *PAIR)], dataset_in),
    "a close name": ("./ff", [], lambda fix: fix.split()[1]),
    "a close folder": ("fotos", [move("f", "photos")], lambda fix: fix.removeprefix("use the folder ").partition(",")[0]),
    "nothing in it": ("e", [lambda: Path("e").mkdir()], after("ROOT/test/CLASS/*.jpg", lambda: folder(Path("e")), spec="e")),
    "a text": ("./e.txt", [lambda: Path("e.txt").touch()], after("lay it out as ROOT/train/CLASS/*.jpg", spec="f")),
    "no arrays": ("arrays", [lambda: arrays(Path("a"))], lambda fix: dataset_in(fix).replace("ROOT", "a")),
    "arrays elsewhere": ("arrays:b", [lambda: arrays(Path("a"))], after("correct the path", spec="arrays:a")),
    "no tars": ("tars", [lambda: tars(Path("t"), *PAIR)], lambda fix: dataset_in(fix).replace("ROOT", "t")),
    "no function": (
        "factory:make",
        [lambda: module("our_data")],
        lambda fix: f"factory:{dataset_in(fix).replace('mymodule', 'our_data')}",
    ),
    "a module that is missing": (
        "my_data:make",
        [],
        after("install my_data or change to its folder", module, spec="my_data:make"),
    ),
    "a name with a slip": ("foldre:f", [], lambda fix: fix.split("use ")[1].partition(";")[0]),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_data_is_found_when_it_is_named_or_laid_out_as_the_fix_says(case: str) -> None:
    spec, spoil, mend = FOLDERS[case]
    folder(Path("f"), 12)
    for each in spoil:
        each()
    assert len(followed(read, spec, mend)) > 3
