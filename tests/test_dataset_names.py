"""Datasets as they are typed: names, folders, functions; and what is said of their classes and their licence."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.archive import Licences
from kdcache.cli import run
from kdcache.datasets import DATASETS, Source
from kdcache.datasets.classes import doubts, say_classes
from kdcache.errors import KdcacheError, NotFoundError, UsageError
from kdcache.students.grid import find_start
from kdcache.workspace import Workspace, dataset_label, parse_dataset
from tests import archives, miniatures
from tests.torch_miniatures import folders


class Said:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def update(self, task: str, done: int, total: int, note: str = "") -> None: ...

    def table(self, columns: Any, rows: Any) -> None: ...


@pytest.fixture
def here(tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `photos`, images in class folders in train/ and test/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(image_folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("typed", ["photos", "./photos", "~/photos", "{here}/photos", "photos/", "../{name}/photos"])
def test_a_folder_of_class_folders_is_taken_however_it_is_written(here: Path, typed: str) -> None:
    said = Said()
    source = parse_dataset(typed.format(here=here, name=here.name), said)
    assert source == DATASETS.build("folder", root="photos")
    assert DATASETS.spec(source) in said.lines[0]
    assert parse_dataset(DATASETS.spec(source)) == source


@pytest.mark.parametrize("name", ["val", "validation"])
def test_the_test_folder_may_have_its_other_names(here: Path, name: str) -> None:
    folders(here / "a,b" / "train", ["x", "y"], 1)
    folders(here / "a,b" / name, ["x", "y"], 1)
    assert len(parse_dataset("a,b").open(here).samples("test")) == 2


def test_more_class_folders_than_are_looked_at_are_not_told_as_their_number(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcache.datasets.naming._LOOKED_AT", 3)
    folders(here / "many/train", list("abcd"), 1)
    folders(here / "many/test", list("abc"), 1)
    (here / "many/test/.hidden").mkdir()
    said = Said()
    parse_dataset("many", said)
    assert "(3 or more class folders in train/, 3 in test/)" in said.lines[0]
    with pytest.raises(UsageError, match="it has 3 or more class folders"):
        parse_dataset("many/train")


def only_classes(root: Path) -> None:
    folders(root, ["a", "b"], 5)


def only_train(root: Path) -> None:
    folders(root / "train", ["a", "b"], 5)


@pytest.mark.parametrize("write", [only_classes, only_train, miniatures.arrays, miniatures.npz, miniatures.tars, miniatures.hub])
def test_a_folder_of_another_form_is_refused_with_the_name_that_fits(here: Path, write: Any) -> None:
    write(here / "it")
    with pytest.raises(UsageError, match="is a folder") as caught:
        parse_dataset("it")
    advised = caught.value.fix.removeprefix("--dataset ")
    images = parse_dataset(advised).open(here / "data", fetch=False)
    assert images.samples("train")
    assert images.samples("test")


def test_other_folders_and_files_are_refused_with_the_forms_that_there_are(here: Path) -> None:
    (here / "empty/train").mkdir(parents=True)
    (here / "empty/test").mkdir()
    (here / "notes.txt").write_text("")
    miniatures.npz(here / "packed")
    miniatures.tars(here / "shards")
    for typed, fix in (
        ("empty", "ROOT/train/CLASS"),
        ("notes.txt", "ROOT/train/CLASS"),
        ("packed/data.npz", f"--dataset arrays:{here}/packed/data.npz"),
        ("shards/train-000000.tar", f"--dataset tars:{here}/shards"),
    ):
        with pytest.raises(UsageError) as caught:
            parse_dataset(typed)
        assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("photo", "the folder ./photos"),
        ("./photo", "photos"),
        ("/no/where", "/ has no no/where"),
        ("~/nothing", "has no nothing"),
        ("~no_such_user/photos", "there is no such folder"),
        ("timm/oxford-iiit-pet", "hf:timm/oxford-iiit-pet"),
        ("cifar11", "cifar10"),
        ("foldr:photos", "folder:photos"),
        ("no_module:make", "install no_module"),
        ("", "unknown dataset"),
        ("a\0b", "unknown dataset"),
        ("x" * 5000, "unknown dataset"),
    ],
)
def test_what_is_not_there_is_told_with_what_may_be_meant(here: Path, typed: str, said: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        parse_dataset(typed)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


def test_a_registered_name_wins_over_a_folder_of_that_name_and_says_so(here: Path) -> None:
    shutil.copytree(here / "photos", here / "digits")
    shutil.copytree(here / "photos", here / "torch/mnist")
    for typed, name in (("digits", "digits"), ("torch/mnist", "torch")):
        said = Said()
        assert DATASETS.name_of(parse_dataset(typed, said)) == name
        assert f"./{typed}" in said.lines[0]
        assert DATASETS.name_of(parse_dataset(f"./{typed}")) == "folder"


@pytest.mark.parametrize("typed", ["my photos", "torch/dtd,variant=2", "digits"])
@pytest.mark.parametrize("init", ["finetuned", "target"])
def test_the_training_that_a_start_needs_is_told_with_the_dataset_as_it_is_found(here: Path, typed: str, init: str) -> None:
    (here / "my photos").symlink_to((here / "photos").resolve())
    source = parse_dataset(typed)
    with pytest.raises(NotFoundError) as caught:
        find_start(init, "test_vit", source, Workspace(here / "home"))
    words = shlex.split(caught.value.fix)
    assert parse_dataset(words[words.index("--dataset") + 1]) == source


def test_a_function_is_a_dataset_if_its_module_is_there(here: Path) -> None:
    (here / "of_mine.py").write_text("raise RuntimeError('imported')\n")
    assert parse_dataset("tests.mapstyle:pictures,licence=MIT").licence == "MIT"
    for typed in ("tests.mapstyle:pictures", "of_mine:make"):  # which is not imported before images are asked for
        source = parse_dataset(typed)
        assert DATASETS.spec(source) == f"factory:{typed}"
        assert dataset_label(source) == f"factory-{typed.replace(':', '-')}"
    with pytest.raises(KdcacheError, match="RuntimeError: imported"):
        source.open(here)


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize(
    ("names", "doubt"),
    [
        (["cat", "train"], "a class is called 'train'"),
        (["Cat", "dog", "cat"], "'Cat' and 'cat' differ by case or spaces only"),
        (["red fox", "red_fox"], "'red fox' and 'red_fox'"),
        (["1", "10", "2"], "label 0 is class '1'"),
        (["0", "1", "10", "2"], "label 2 is class '10'"),
    ],
)
def test_suspicious_class_names_are_told(names: list[str], doubt: str) -> None:
    assert doubt in " ".join(doubts(names))


@pytest.mark.parametrize(
    "names", [["cat", "dog"], ["0", "1", "2"], ["n01440764", "n01443537"], ["training day", "set 1", "set 2"]]
)
def test_usual_class_names_raise_no_doubt(names: list[str]) -> None:
    assert not doubts(names)


def lines_of(source: Source, data: Path) -> list[str]:
    said = Said()
    say_classes(source, source.open(data, fetch=False), said)
    return said.lines


def test_classes_are_told_with_their_number_the_outer_ones_and_the_images_of_each_split(tmp_path: Path) -> None:
    root = tmp_path / "arrays"
    miniatures.arrays(root)
    named, hint = lines_of(DATASETS.build("arrays", root=str(root)), tmp_path)
    assert named.endswith("9 train and 4 test images of 3 classes: left, right, straight on")
    assert f"--dataset arrays:{root},licence=NAME" in hint
    (root / "class_names.txt").write_text("".join(f"{i}\n" for i in range(109)))
    np.save(root / "train_labels.npy", np.arange(9) + 100)
    lines = lines_of(DATASETS.build("arrays", root=str(root), licence="MIT"), tmp_path)
    assert lines[0].endswith("109 classes: 0, 1, 2, 3, 4, ..., 104, 105, 106, 107, 108")
    assert "100 classes have no training image" in lines[1]
    assert not any("licence is unknown" in line for line in lines)
    (root / "class_names.txt").unlink()
    np.save(root / "train_labels.npy", np.arange(9))
    assert any("class_names.txt" in line for line in lines_of(DATASETS.build("arrays", root=str(root)), tmp_path))


def test_a_licence_is_recorded_with_the_views_that_are_added_and_stays(tmp_path: Path) -> None:
    for views, licences, known in ((1, None, None), (2, Licences(data="MIT"), "MIT"), (3, None, "MIT")):
        grown = archives.finish(archives.writer(tmp_path / "a", num_views=views, licences=licences))
        assert grown.manifest.known_licences.data == known


def test_each_of_two_licences_is_recorded_when_it_is_stated_and_stays(tmp_path: Path) -> None:
    """A later statement says nothing of the other licence."""
    both = Licences(data="MIT", weights="odbl")
    for views, licences, known in ((1, Licences(weights="odbl"), Licences(weights="odbl")), (2, Licences(data="MIT"), both)):
        grown = archives.finish(archives.writer(tmp_path / "a", num_views=views, licences=licences))
        assert grown.manifest.known_licences == known


def test_the_list_of_datasets_has_those_of_torchvision(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["datasets", "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert {"torch/flowers102", "torch/food101", "folder", "factory"} <= set(names)
    for name in names:
        if name.startswith("torch/"):
            parse_dataset(name)
