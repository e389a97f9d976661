"""What the real files of datasets mean, and how they get here."""

import hashlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdcache.cli import run
from kdcache.datasets import DATASETS, Images, Source, fetching, source_card
from kdcache.errors import IntegrityError, KdcacheError, NotFoundError, RetryError, UsageError
from tests import miniatures
from tests.servers import Fault, FaultyServer


def opened(name: str, root: Path, **options: Any) -> Images:
    return DATASETS.build(name, root=str(root), **options).open(root.parent / "data", fetch=False)


def listed(images: Images, split: Any = "train") -> list[tuple[str, str]]:
    names = images.class_names()
    return [(sample.key, names[sample.label]) for sample in images.samples(split)]


# ---------------------------------------------------------------- formats


def test_both_forms_of_cifar10_are_the_same_samples_and_pixels(tmp_path: Path) -> None:
    batches = [miniatures.batch(4) for _ in range(6)]
    miniatures.cifar10(tmp_path / "a", batches)
    miniatures.cifar10_python(tmp_path / "b", batches)
    both = [opened("cifar10", tmp_path / form) for form in "ab"]
    cards = [
        source_card(DATASETS.build("cifar10"), images.class_names(), "train", images.samples("train")).digest for images in both
    ]
    assert cards[0] == cards[1]
    for split in ("train", "test"):
        pictures = [[np.asarray(sample.load()) for sample in images.samples(split)] for images in both]  # type: ignore[arg-type]
        assert len(pictures[0]) == (20 if split == "train" else 4)
        for a, b in zip(*pictures, strict=True):
            np.testing.assert_array_equal(a, b)
    third = both[0].samples("train")[6]  # the third image of the second batch
    assert third.key == "train/00006"
    assert both[0].class_names()[third.label] == "frog"
    np.testing.assert_array_equal(np.asarray(third.load())[:, :, 1].reshape(-1), batches[1][2, 1024:2048])  # the green plane


def test_cifar100_has_the_fine_classes(datasets_in_small: Path) -> None:
    for form in ("cifar100", "cifar100-python"):
        images = opened("cifar100", datasets_in_small / form)
        assert listed(images)[:3] == [("train/00000", "fine_00"), ("train/00001", "fine_09"), ("train/00002", "fine_18")]
        assert len(images.class_names()) == 100


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch evil",)


@pytest.mark.parametrize(
    "content",
    [
        {"data": _Evil(), "labels": [0] * 4},
        {"data": np.zeros((4, 3072), np.uint8)},
        {"data": np.zeros((4, 30), np.uint8), "labels": [0] * 4},
        {"data": np.zeros((4, 3072), np.uint8), "labels": [0, 1, 2, 10]},
        [1, 2],
    ],
    ids=["code", "no-labels", "small", "label", "list"],
)
def test_a_pickle_that_is_not_a_batch_is_damaged_and_runs_nothing(
    content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    miniatures.cifar10_python(tmp_path / "c")
    (tmp_path / "c/cifar-10-batches-py/data_batch_3").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(IntegrityError, match="data_batch_3"):
        opened("cifar10", tmp_path / "c").samples("train")
    assert not (tmp_path / "evil").exists()


def test_a_cut_binary_file_is_damaged(tmp_path: Path) -> None:
    miniatures.cifar10(tmp_path / "c")
    file = tmp_path / "c/cifar-10-batches-bin/test_batch.bin"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(IntegrityError, match="not records of 3073"):
        opened("cifar10", tmp_path / "c").samples("test")


def test_pets_are_those_of_the_listings_with_breeds_from_their_names(datasets_in_small: Path) -> None:
    images = opened("pets", datasets_in_small / "pets")
    assert images.class_names() == ("Abyssinian", "american_bulldog", "Bengal")
    assert listed(images)[:4] == [
        ("images/Abyssinian_1.jpg", "Abyssinian"),
        ("images/Abyssinian_10.jpg", "Abyssinian"),
        ("images/Abyssinian_2.jpg", "Abyssinian"),
        ("images/american_bulldog_1.jpg", "american_bulldog"),
    ]
    assert [key for key, _ in listed(images, "test")] == [f"images/{breed}_33.jpg" for breed in miniatures.BREEDS]


def test_flowers_train_on_both_of_the_small_sets(datasets_in_small: Path) -> None:
    images = opened("flowers", datasets_in_small / "flowers")
    assert listed(images) == [(f"jpg/image_{i:05d}.jpg", f"{(i - 1) % 3 + 1:03d}") for i in (1, 2, 3, 5, 9)]
    assert len(images.samples("test")) == 7


def test_cars_have_the_names_of_the_development_kit(datasets_in_small: Path) -> None:
    images = opened("cars", datasets_in_small / "cars")
    assert images.class_names() == miniatures.CARS
    assert listed(images, "test")[:2] == [
        ("cars_test/00001.jpg", miniatures.CARS[0]),
        ("cars_test/00002.jpg", miniatures.CARS[1]),
    ]


def test_tiny_imagenet_takes_test_labels_from_the_validation_listing(datasets_in_small: Path) -> None:
    images = opened("tiny-imagenet", datasets_in_small / "tiny-imagenet")
    assert images.class_names() == miniatures.WNIDS
    assert listed(images, "test")[3] == ("val/images/val_3.JPEG", "n01440764")
    assert [key for key, _ in listed(images)][:2] == [
        "train/n01440764/images/n01440764_0.JPEG",
        "train/n01440764/images/n01440764_1.JPEG",
    ]


@pytest.mark.parametrize(
    ("name", "file"), [("tiny-imagenet", "wnids.txt"), ("tiny-imagenet", "val_annotations.txt"), ("cifar10", "batches.meta.txt")]
)
def test_a_listing_that_is_no_text_is_damaged(datasets_in_small: Path, tmp_path: Path, name: str, file: str) -> None:
    copy = Path(shutil.copytree(datasets_in_small / name, tmp_path / name))
    found = next(iter(copy.rglob(file)), None)
    if found is None:
        pytest.skip(f"there is no {file} in this form of {name}")
    found.write_bytes(b"n0\xff\n")
    with pytest.raises(IntegrityError, match=file):
        opened(name, copy)


def test_imagenet_is_read_out_of_its_tars_with_labels_of_the_development_kit(datasets_in_small: Path) -> None:
    root = datasets_in_small / "imagenet-tars"
    images = opened("imagenet", root)
    assert images.class_names() == miniatures.WNIDS
    assert listed(images)[:4] == [
        ("n01440764/n01440764_1.JPEG", "n01440764"),
        ("n01440764/n01440764_10.JPEG", "n01440764"),
        ("n01440764/n01440764_2.JPEG", "n01440764"),
        ("n01443537/n01443537_1.JPEG", "n01443537"),
    ]
    # The kit's numbers are not those of the sorted names: 1, 2, 3, 3, 1 are the second, third, first, first and second.
    assert [name for _, name in listed(images, "test")] == [miniatures.WNIDS[i] for i in (1, 2, 0, 0, 1)]
    with tarfile.open(root / "ILSVRC2012_img_val.tar") as tar:
        stored = tar.extractfile("ILSVRC2012_val_00000002.JPEG")
        assert stored is not None
        expected = np.asarray(Image.open(stored))
    np.testing.assert_array_equal(np.asarray(images.samples("test")[1].load()), expected)


def test_tars_without_the_development_kit_say_what_is_missing(tmp_path: Path) -> None:
    miniatures.imagenet_tars(tmp_path / "i")
    truth = tmp_path / "i/ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("1\n2\n")
    with pytest.raises(IntegrityError, match="2 labels"):
        opened("imagenet", tmp_path / "i").samples("test")
    truth.unlink()
    with pytest.raises(NotFoundError) as caught:
        opened("imagenet", tmp_path / "i")
    assert "tar -xzf" in caught.value.fix


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: np.save(root / "train_images.npy", np.zeros((9, 4, 4), np.float32)), "float32"),
        (lambda root: np.save(root / "train_labels.npy", np.zeros(8, np.int64)), "8 labels"),
        (lambda root: np.save(root / "test_labels.npy", np.array([0, 1, 2, 3])), "go from 0 to 3"),
        (lambda root: (root / "test_images.npy").write_bytes(b"\x93NUMPY"), "damaged"),
        (lambda root: np.save(root / "train_labels.npy", np.array([print], object), allow_pickle=True), "Python objects"),
    ],
)
def test_arrays_that_do_not_go_together_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    miniatures.arrays(tmp_path / "a")
    change(tmp_path / "a")
    with pytest.raises((IntegrityError, UsageError), match=words):
        opened("arrays", tmp_path / "a").samples("train")


def test_arrays_of_any_of_the_three_shapes_are_the_same_pictures(tmp_path: Path) -> None:
    miniatures.arrays(tmp_path / "a")
    last = np.asarray(opened("arrays", tmp_path / "a").samples("train")[4].load())
    images = np.load(tmp_path / "a/train_images.npy")
    np.testing.assert_array_equal(last, images[4])
    np.save(tmp_path / "a/train_images.npy", images.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(np.asarray(opened("arrays", tmp_path / "a").samples("train")[4].load()), last)
    grey = opened("arrays", tmp_path / "a").samples("test")
    np.save(tmp_path / "a/test_images.npy", np.zeros((4, 6, 5), np.uint8))
    assert opened("arrays", tmp_path / "a").samples("test")[0].load().mode == "L"
    assert len(grey) == 4


def test_tar_shards_need_a_label_for_every_image(tmp_path: Path) -> None:
    miniatures.tars(tmp_path / "t")
    images = opened("tars", tmp_path / "t")
    assert listed(images)[:2] == [("train-000000/000000", "a"), ("train-000000/000001", "b")]
    assert len(images.samples("train")) == 7
    for name, content in (("000009.jpg", b"x"), ("000009.cls", b"7")):
        miniatures.tars(tmp_path / name)
        with tarfile.open(tmp_path / name / "train-000001.tar", "a") as tar:
            miniatures.add(tar, name, content)
        with pytest.raises(UsageError, match="000009"):
            opened("tars", tmp_path / name).samples("train")


def test_a_hub_datasets_columns_and_splits_can_be_named(datasets_in_small: Path, tmp_path: Path) -> None:
    repo = str(datasets_in_small / "hub")
    images = DATASETS.build("hf", repo=repo).open(tmp_path)
    assert listed(images, "test") == [(f"test/{i:07d}", ("cat", "dog", "newt")[i % 3]) for i in range(4)]
    swapped = DATASETS.parse(f"hf:{repo},image=image,label=label,train=test,test=train").open(tmp_path)
    assert len(swapped.samples("train")) == 4
    for options, words in (({"label": "image"}, "columns that may be the label"), ({"test": "dev"}, "no split 'dev'")):
        with pytest.raises(UsageError, match=words):
            DATASETS.build("hf", repo=repo, **options).open(tmp_path)
    with pytest.raises(NotFoundError, match="nowhere"):
        DATASETS.build("hf", repo=str(tmp_path / "nowhere")).open(tmp_path, fetch=False)


# ---------------------------------------------------------------- getting them


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """A server with a packed CIFAR-10 in small, in the place of the real one."""
    miniatures.cifar10(tmp_path / "made")
    (tmp_path / "served").mkdir()
    with tarfile.open(tmp_path / "served/cifar-10-binary.tar.gz", "w:gz", compresslevel=0) as tar:
        tar.add(tmp_path / "made/cifar-10-batches-bin", "cifar-10-batches-bin")
    md5 = hashlib.md5((tmp_path / "served/cifar-10-binary.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr("kdcache.system.attempts.BACKOFF", 0.01)
    with FaultyServer(tmp_path / "served") as server:
        moved = fetching.Download(f"{server.url}/cifar-10-binary.tar.gz", md5, 1)
        monkeypatch.setattr(DATASETS["cifar10"], "download", moved)
        yield server


class _Said:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.updates: list[tuple[int, int]] = []

    def update(self, task: str, done: int, total: int, note: str = "") -> None:
        self.updates.append((done, total))

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_a_dataset_is_fetched_once_checked_and_unpacked(site: FaultyServer, tmp_path: Path) -> None:
    source: Source = DATASETS.build("cifar10")
    said = _Said()
    images = source.open(tmp_path / "data", said)
    assert len(images.samples("train")) == 20
    assert said.updates[-1][0] == said.updates[-1][1] > 70_000
    assert str(tmp_path / "data/cifar10") in said.lines[0]
    left = {path.name for path in (tmp_path / "data/cifar10").iterdir() if path.suffix != ".lock"}
    assert left == {"cifar-10-batches-bin"}  # the packed file is of no further use
    asked = len(site.requests)
    assert source.open(tmp_path / "data").fingerprint() == images.fingerprint()
    assert len(site.requests) == asked


def test_a_broken_download_goes_on_where_it_stopped(site: FaultyServer, tmp_path: Path) -> None:
    source: Source = DATASETS.build("cifar10")
    part = tmp_path / "data/cifar10/cifar-10-binary.tar.gz.part"
    site.faults["cifar-10-binary.tar.gz"] = Fault(status=503)
    with pytest.raises(RetryError) as caught:
        source.open(tmp_path / "data")
    assert "by hand into" in caught.value.fix
    assert "hf:uoft-cs/cifar10" in caught.value.fix
    whole = (tmp_path / "served/cifar-10-binary.tar.gz").read_bytes()
    part.write_bytes(whole[:50_000])
    site.forget()
    site.faults["cifar-10-binary.tar.gz"] = Fault(times=2, cut=10_000)
    assert len(source.open(tmp_path / "data").samples("test")) == 4
    assert min(request.start for request in site.asked("gz")) == 50_000


def test_a_file_that_is_not_the_published_one_is_named_and_not_unpacked(site: FaultyServer, tmp_path: Path) -> None:
    site.faults["cifar-10-binary.tar.gz"] = Fault(wrong=True)
    with pytest.raises(IntegrityError, match="md5") as caught:
        DATASETS.build("cifar10").open(tmp_path / "data")
    file = tmp_path / "data/cifar10/cifar-10-binary.tar.gz"
    assert caught.value.fix.endswith(f"mv {file} {file}.aside")
    assert not (tmp_path / "data/cifar10/cifar-10-batches-bin").exists()
    site.forget()
    file.unlink()
    assert len(DATASETS.build("cifar10").open(tmp_path / "data").samples("test")) == 4


def test_a_file_that_was_got_by_hand_is_used(site: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "data/cifar10").mkdir(parents=True)
    packed = tmp_path / "served/cifar-10-binary.tar.gz"
    (tmp_path / "data/cifar10" / packed.name).write_bytes(packed.read_bytes())
    assert len(DATASETS.build("cifar10").open(tmp_path / "data").samples("train")) == 20
    assert not site.requests


def test_a_killed_download_is_taken_up_by_the_next_command(site: FaultyServer, tmp_path: Path) -> None:
    site.faults["cifar-10-binary.tar.gz"] = Fault(drip=(2_000, 0.05))
    download = DATASETS["cifar10"].download  # type: ignore[attr-defined]
    code = (
        "import sys, pathlib; from kdcache.datasets import DATASETS, fetching; "
        f"DATASETS['cifar10'].download = fetching.Download({download.url!r}, {download.md5!r}, 1); "
        f"DATASETS.build('cifar10').open(pathlib.Path({str(tmp_path / 'data')!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    part = tmp_path / "data/cifar10/cifar-10-binary.tar.gz.part"
    while not (part.is_file() and part.stat().st_size > 4_000):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    arrived = part.stat().st_size
    site.forget()
    assert len(DATASETS.build("cifar10").open(tmp_path / "data").samples("train")) == 20
    assert min(request.start for request in site.asked("gz")) == arrived


def test_what_has_to_be_got_by_hand_says_where_to_put_it(tmp_path: Path) -> None:
    for name in ("cars", "imagenet"):
        with pytest.raises(NotFoundError) as caught:
            DATASETS.build(name).open(tmp_path)
        assert str(tmp_path / name) in caught.value.fix
        assert "--dataset hf:" in caught.value.fix
    with pytest.raises(NotFoundError) as caught:  # a folder of one's own is not filled
        DATASETS.build("cifar10", root=str(tmp_path)).open(tmp_path)
    assert "cifar-10-batches-bin" in caught.value.why


def test_a_dry_run_fetches_nothing_and_says_how_to(
    site: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--teacher", "test_vit", "--dataset", "cifar10", "--dry-run", "--home", str(tmp_path)]
    assert run(["dump-teacher", *arguments]) == 3
    assert "fix: kdcache datasets --fetch cifar10" in capsys.readouterr().err
    assert not site.requests
    assert run(["datasets", "--fetch", "cifar10", "--home", str(tmp_path)]) == 0
    assert "cifar10: 20 train and 4 test images of 10 classes" in capsys.readouterr().err
    assert run(["dump-teacher", *arguments, "--size", "32"]) == 0


@pytest.mark.parametrize("name", ["../evil.txt", "/tmp/kdcache-evil.txt", "link"])
def test_packed_files_put_nothing_elsewhere(site: FaultyServer, tmp_path: Path, name: str, monkeypatch: Any) -> None:
    packed = tmp_path / "served/cifar-10-binary.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        if name == "link":
            info = tarfile.TarInfo("link")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
        else:
            miniatures.add(tar, name, b"evil")
    md5 = hashlib.md5(packed.read_bytes()).hexdigest()
    monkeypatch.setattr(DATASETS["cifar10"], "download", fetching.Download(f"{site.url}/{packed.name}", md5, 1))
    with pytest.raises(KdcacheError):
        DATASETS.build("cifar10").open(tmp_path / "data")
    assert not Path("/tmp/kdcache-evil.txt").exists()
    assert not (tmp_path / "data/evil.txt").exists()
    assert not (tmp_path / "data/cifar10/link").exists()


def test_the_published_checksums_and_addresses_are_those_of_torchvision() -> None:
    """Of the files that both fetch; the binary form of CIFAR is not among torchvision's."""
    from torchvision.datasets import Flowers102, OxfordIIITPet

    sources = Path(sys.modules["kdcache.datasets.fine"].__file__ or "").read_text()
    for url, md5 in OxfordIIITPet._RESOURCES:
        assert md5 in sources
        assert url.rpartition("/")[2] in sources
    for name, md5 in Flowers102._file_dict.values():
        assert f'{name}", "{md5}"' in sources
