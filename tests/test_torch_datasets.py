"""torchvision's datasets as sources: every one from its own files, and what is missing, damaged or misspelled."""

import email.message
import gzip
import hashlib
import os
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.cli import run
from kdcache.datasets import DATASETS, SPLITS, Images, Source, published_name
from kdcache.datasets.canvas import load_canvas
from kdcache.datasets.vision import SETS
from kdcache.errors import IntegrityError, KdcacheError, NotFoundError, RetryError, UsageError
from kdcache.teachers.recipes import teacher_recipe
from kdcache.workspace import dataset_label, parse_dataset
from tests.following import dataset_in
from tests.miniatures import save
from tests.servers import Fault, FaultyServer
from tests.torch_miniatures import MINIATURES


@pytest.fixture(autouse=True)
def any_file_is_intact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some sets are known to torchvision by the MD5 of their files, which random images cannot have."""
    import torchvision.datasets

    for name, module in list(sys.modules.items()):
        if name.startswith(torchvision.datasets.__name__) and hasattr(module, "check_integrity"):
            monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())


def spec(name: str, root: Path, **options: Any) -> str:
    fraction = {"split_fraction": 0.4} if SETS[name].argument is None else {}
    return DATASETS.spec(DATASETS.build("torch", dataset=name, root=str(root), **fraction, **options))


def made(name: str, tmp_path: Path, **options: Any) -> tuple[Source, Images]:
    MINIATURES[name](tmp_path / "files")
    source = parse_dataset(spec(name, tmp_path / "files", **options))
    return source, source.open(tmp_path / "data", fetch=False)


@pytest.mark.parametrize("name", SETS)
def test_labels_names_and_images_are_those_of_torchvision(name: str, tmp_path: Path) -> None:
    source, images = made(name, tmp_path)
    import torchvision.datasets

    kind, names = SETS[name], images.class_names()
    assert len(set(names)) == len(names) >= 2
    keys: set[str] = set()
    for split in SPLITS:
        samples = images.samples(split)
        assert samples
        assert not keys & {sample.key for sample in samples}
        keys |= {sample.key for sample in samples}
        assert {sample.label for sample in samples} <= set(range(len(names)))
        own = kind.make(
            name,
            (kind.train if split == "train" else kind.test) if kind.argument else None,
            tmp_path / "files",
            None,
            download=False,
        )
        assert isinstance(own, getattr(torchvision.datasets, kind.kind))
        theirs = sorted((label, np.asarray(image.convert("RGB")).tobytes()) for image, label in (own[i] for i in range(len(own))))
        ours = sorted((sample.label, np.asarray(sample.load().convert("RGB")).tobytes()) for sample in samples)
        assert ours == theirs if kind.argument else set(ours) < set(theirs)
    canvas = load_canvas(source, "test", 8, tmp_path / "data")
    assert canvas.card.name == f"torch/{name}"
    assert canvas.card.licence is None
    assert dataset_label(source) == f"torch-{name}"
    assert images.fingerprint() == source.open(tmp_path / "data", fetch=False).fingerprint()


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("torch/flowers102", "flowers102"),
        ("torch:Food101", "food101"),
        ("torch/FashionMNIST", "fashion_mnist"),
        ("torch/inat", "inaturalist"),
        ("torch/OxfordIIITPet", "oxford_iiit_pet"),
        ("torch/fgvc-aircraft", "fgvc_aircraft"),
    ],
)
def test_a_set_has_one_name_however_it_is_spelled(typed: str, name: str) -> None:
    source = parse_dataset(typed)
    assert DATASETS.spec(source) == f"torch:{name}"
    assert parse_dataset(DATASETS.spec(source)) == source
    assert Path(dataset_label(source)).name == f"torch-{name}"


def test_small_images_are_tested_whole() -> None:
    recipes = {name: kind.recipe for name, kind in SETS.items()} | {name: DATASETS[name].recipe for name in DATASETS}
    small = {name: recipe.test_policy for name, recipe in recipes.items() if recipe.canvas <= 96}
    assert {"mnist", "stl10", "digits", "tiny-imagenet"} <= small.keys()
    assert set(small.values()) == {"none"}


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("torch/cifar10", "cifar10"),
        ("torch/cifar100", "cifar100"),
        ("torch/oxford_iiit_pet", "pets"),
        ("torch/stanford_cars", "cars"),
        ("torch/flowers102", "flowers"),
        ("torch/imagenet", "imagenet"),
        ("torch/imagenet,train=val,test=train", "imagenet"),
    ],
)
def test_a_published_set_has_the_same_recipes_however_it_is_read(name: str, published: str) -> None:
    source, same = parse_dataset(name), parse_dataset(published)
    assert source.recipe == same.recipe
    for model in ("resnet18.a1_in1k", "cifar_resnet20"):
        recipes = [teacher_recipe(None, model, published_name(each)) for each in (source, same)]
        assert recipes[0] == recipes[1]


def test_other_sets_of_torchvision_are_known_by_no_other_name() -> None:
    assert published_name(parse_dataset("torch/food101")) == "torch"


def test_splits_can_be_joined_and_variants_chosen(tmp_path: Path) -> None:
    _, joined = made("dtd", tmp_path, train="train+val", variant="2")
    assert len(joined.samples("train")) == 6
    files = {f"{name}/{name}_{i:04d}.jpg" for name in ("banded", "blotchy") for i in (6, 7)}
    assert {sample.key for sample in joined.samples("test")} == {f"dtd/dtd/images/{file}" for file in files}
    _, letters = made("emnist", tmp_path / "e", variant="letters")
    assert letters.class_names()[:3] == ("N/A", "a", "b")
    assert [sample.label for sample in letters.samples("test")] == [1, 2, 3, 4]
    _, families = made("fgvc_aircraft", tmp_path / "f", variant="family")
    assert families.class_names() == ("Boeing 707", "A310")
    assert len(families.samples("train")) == 6  # trainval


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        ("torch", UsageError, "flowers102"),
        ("torch/flowers", NotFoundError, "flowers102"),
        ("torch/omniglot", UsageError, "alphabets"),
        ("torch/folder", UsageError, "folder:ROOT"),
        ("torch/eurosat", UsageError, "torch/eurosat,split_fraction=0.2"),
        ("torch/eurosat,split_fraction=2", UsageError, "between 0 and 1"),
        ("torch/mnist,split_fraction=0.2", UsageError, "splits of its own"),
        ("torch/mnist,variant=small", UsageError, "no variants"),
        ("torch/dtd,train=train+val,test=val", UsageError, "for training and for testing"),
        ("torch/dtd,classes=3", UsageError, "unknown option"),
    ],
)
def test_impossible_options_are_refused_with_what_is_possible(spec: str, error: type[KdcacheError], said: str) -> None:
    with pytest.raises(error) as caught:
        parse_dataset(spec)
    assert said in str(caught.value)


def test_splits_that_share_images_or_are_left_empty_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 images in both splits"):
        made("fgvc_aircraft", tmp_path, test="val")
    MINIATURES["eurosat"](tmp_path)
    images = parse_dataset(f"torch:eurosat,split_fraction=0.000001,root={tmp_path}").open(tmp_path)
    with pytest.raises(UsageError, match="no image is left for the test split"):
        images.samples("test")


def test_imagenets_archives_are_not_unpacked_unasked(tmp_path: Path) -> None:
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(b"")
    with pytest.raises(NotFoundError, match="there is no"):
        parse_dataset(f"torch:imagenet,root={tmp_path}").open(tmp_path)


def test_a_split_or_variant_that_torchvision_lacks_is_refused_in_its_words(tmp_path: Path) -> None:
    for options in ({"train": "training"}, {"variant": "one"}):
        with pytest.raises(UsageError, match="torchvision says") as caught:
            made("dtd", tmp_path / str(options), **options)
        assert dataset_in(caught.value.fix).startswith("torch/dtd,root=")


# ---------------------------------------------------------------- files


def test_missing_files_are_told_with_torchvisions_reason(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        parse_dataset("torch/dtd").open(tmp_path, fetch=False)
    assert caught.value.fix == f"kdcache datasets --fetch torch:dtd --data-dir {tmp_path}"
    with pytest.raises(NotFoundError, match="put its files") as caught:
        parse_dataset("torch/fer2013").open(tmp_path)  # which torchvision cannot download
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(NotFoundError, match="Dataset not found") as caught:
        parse_dataset(spec("dtd", tmp_path / "elsewhere")).open(tmp_path)
    assert str(tmp_path / "elsewhere/dtd") in caught.value.fix
    assert "download=True" not in str(caught.value)


def test_damaged_files_are_told_with_torchvisions_reason(tmp_path: Path) -> None:
    source, _ = made("mnist", tmp_path)
    labels = tmp_path / "files/MNIST/raw/train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"(?s)torch/mnist.*damaged.*MNIST says"):
        source.open(tmp_path, fetch=False)


def test_images_that_cannot_be_decoded_are_left_to_the_canvas_which_names_them_all(tmp_path: Path) -> None:
    source, images = made("food101", tmp_path)
    lost = [images.samples("train")[i].key for i in (0, 1)]
    for key, data in zip(lost, (b"no image", (tmp_path / "files" / lost[1]).read_bytes()[:300]), strict=True):
        (tmp_path / "files" / key).write_bytes(data)
    with pytest.raises(IntegrityError) as caught:
        load_canvas(source, "train", 8, tmp_path / "data")
    assert all(key in caught.value.what for key in lost)
    assert load_canvas(source, "train", 8, tmp_path / "data", skip_corrupt=True).card.skipped == tuple(lost)


def test_a_changed_or_added_file_makes_another_canvas(tmp_path: Path) -> None:
    source, images = made("eurosat", tmp_path)
    states = [images.fingerprint()]
    save(tmp_path / "files/eurosat/2750/Forest/Tile_10.jpg")
    states.append(source.open(tmp_path).fingerprint())
    os.utime(tmp_path / "files/eurosat/2750/Forest/Tile_2.jpg", (1, 1))
    states.append(source.open(tmp_path).fingerprint())
    assert len(set(states)) == 3


def test_images_are_in_the_order_of_their_names_whatever_the_file_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, images = made("sun397", tmp_path)
    keys = [sample.key for sample in images.samples("train")]
    assert keys == sorted(keys)
    found = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(found(self, pattern))))
    again = source.open(tmp_path).samples("train")
    assert [(s.key, s.label) for s in again] == [(s.key, s.label) for s in images.samples("train")]


# ---------------------------------------------------------------- getting them


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """A server of Fashion-MNIST in small, in the place of the real one."""
    import torchvision.datasets

    monkeypatch.undo()  # checksums are right here
    MINIATURES["fashion_mnist"](tmp_path / "made")
    (tmp_path / "served").mkdir()
    resources = []
    for file in sorted((tmp_path / "made/FashionMNIST/raw").iterdir()):
        packed = tmp_path / f"served/{file.name}.gz"
        packed.write_bytes(gzip.compress(file.read_bytes()))
        resources.append((packed.name, hashlib.md5(packed.read_bytes()).hexdigest()))
    with FaultyServer(tmp_path / "served") as server:
        monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [f"{server.url}/"])
        monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", resources)
        yield server


def test_torchvision_downloads_a_set_once_into_the_data_folder(
    site: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["datasets", "--fetch", "torch/fashion_mnist", "--home", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert not told.out
    assert "torch/fashion_mnist: 6 train and 4 test images of 10 classes: T-shirt/top" in told.err
    assert "licence is unknown" in told.err
    asked = len(site.requests)
    assert asked
    assert len(parse_dataset("torch/fashion_mnist").open(tmp_path / "data").samples("test")) == 4
    assert len(site.requests) == asked
    assert [path.name for path in (tmp_path / "data/torch").iterdir() if path.is_dir()] == ["fashion_mnist"]


def test_an_interrupted_download_is_taken_up_and_never_taken_for_a_whole_one(site: FaultyServer, tmp_path: Path) -> None:
    last = "/train-labels-idx1-ubyte.gz"
    site.faults[last] = Fault(reset=True)
    source = parse_dataset("torch/fashion_mnist")
    with pytest.raises(RetryError, match="torchvision says"):
        source.open(tmp_path / "data")
    with pytest.raises(NotFoundError):
        source.open(tmp_path / "data", fetch=False)
    del site.faults[last]
    site.requests.clear()
    assert len(source.open(tmp_path / "data").samples("train")) == 6
    assert {request.path for request in site.requests} == {last}


def test_a_file_that_is_gone_is_not_found(site: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise urllib.error.HTTPError(f"{site.url}/dtd.tar.gz", 404, "Not Found", email.message.Message(), None)

    monkeypatch.setattr("torchvision.datasets.dtd.download_and_extract_archive", gone)
    with pytest.raises(NotFoundError, match="HTTP 404"):
        parse_dataset("torch/dtd").open(tmp_path)
