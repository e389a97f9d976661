"""Data and classes that are not those of the dump: the error names what was added, removed, relabelled or renamed."""

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from kdcache.archive import ArchiveWriter
from kdcache.datasets.canvas import load_canvas
from kdcache.datasets.classes import how_classes_differ, how_samples_differ
from kdcache.datasets.folder import Folder
from kdcache.errors import IncompatibleError
from kdcache.replay.check import require_replayable
from kdcache.views.policy import ViewPolicy
from tests.conftest import Dump, save_folder


@pytest.fixture
def dumped(tmp_path: Path, photos, make_dump: Callable[..., Dump]) -> SimpleNamespace:
    """A folder of images of one's own, its archive, and what the archive is compared with next."""
    root = tmp_path / "images"
    save_folder(root, photos)
    canvas = load_canvas(Folder(str(root)), "train", 20, tmp_path / "canvases")
    archive = make_dump(tmp_path / "a", canvas, policy=ViewPolicy.load("pets", size=16), views=1).archive

    def now() -> str:
        again = load_canvas(Folder(str(root)), "train", 20, tmp_path / "canvases")
        with pytest.raises(IncompatibleError) as caught:
            require_replayable(archive, again)
        with pytest.raises(IncompatibleError) as also:  # and so it is said to whoever goes on with the dump
            ArchiveWriter(
                archive.path,
                num_views=2,
                num_samples=len(again),
                class_names=again.card.class_names,
                labels=again.labels,
                keys=again.keys,
                shard_rows=8,
                policy=archive.manifest.policy,
                source=again.card,
            )
        assert also.value.why in caught.value.why
        return caught.value.why

    return SimpleNamespace(root=root, now=now)


def test_added_removed_and_relabelled_samples_are_named(dumped: SimpleNamespace) -> None:
    train = dumped.root / "train"
    (train / "class_0/00.png").rename(train / "class_0/renamed.png")
    (train / "class_1/01.png").rename(train / "class_2/01.png")
    said = dumped.now()
    assert "2 added: class_0/renamed.png, class_2/01.png" in said
    assert "2 removed: class_0/00.png, class_1/01.png" in said
    assert "relabelled" not in said


def test_many_are_counted_and_the_first_are_named(dumped: SimpleNamespace, photos) -> None:
    save_folder(dumped.root, photos.repeat(2, axis=0), classes=3)
    assert "12 added: class_0/12.png, class_0/15.png, class_0/18.png, ..." in dumped.now()


def test_a_renamed_class_is_named(dumped: SimpleNamespace) -> None:
    for split in ("train", "test"):
        (dumped.root / split / "class_1").rename(dumped.root / split / "moth")
    assert "class 1 is 'class_1' there, 'class_2' here" in dumped.now()


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        (["a", "b"], ["a", "b"], ""),
        (["a", "b"], ["b", "a"], "class 0 is 'a' there, 'b' here (the same names in another order)"),
        (["a", "b"], ["a", "b", "c"], "2 classes there, 3 here; class 2 is none there, 'c' here (other names)"),
        (["a", "b"], ["a", "x"], "class 1 is 'b' there, 'x' here (other names)"),
        (["1", "2", "10"], ["1", "10", "2"], "class 1 is '2' there, '10' here (the same names in another order)"),
    ],
)
def test_the_first_difference_of_classes_is_named(theirs: Sequence[str], ours: Sequence[str], said: str) -> None:
    assert how_classes_differ(theirs, ours) == said


def test_relabelled_samples_are_named_with_both_classes() -> None:
    then, now = (["x", "y", "z"], [0, 1, 0]), (["x", "y", "z"], [0, 0, 0])
    assert how_samples_differ(then, now, ["cat", "dog"]) == "1 relabelled: y (from 'dog' to 'cat')"
    assert how_samples_differ(then, then, ["cat", "dog"]) == ""
    assert how_samples_differ(then, (["y", "x", "z"], [1, 0, 0]), ["cat", "dog"]) == "the same samples in another order"


def test_names_that_look_alike_are_told_apart() -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    said = how_classes_differ([composed], [decomposed])
    assert "other Unicode characters: 'caf\\xe9' and 'cafe\\u0301'" in said
