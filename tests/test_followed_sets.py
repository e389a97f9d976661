"""Published datasets, the Hub's, and canvases: once the fix of an error was followed, the images are there."""

import hashlib
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdcache.cli import run
from kdcache.datasets import DATASETS, SPLITS, fetching
from kdcache.datasets.canvas import Canvas, load_canvas, require_intact
from kdcache.datasets.naming import find_source
from tests import miniatures
from tests.following import dataset_in, followed, typed
from tests.servers import Fault, FaultyServer
from tests.test_own_data import hub
from tests.torch_miniatures import MINIATURES as TORCH


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(spec: str, fetch: bool = True) -> int:
    images = find_source(spec).open(Path("data"), fetch=fetch)
    if refused := getattr(images, "refused", None):
        raise refused
    assert len(images.class_names()) >= 2
    return sum(len(images.samples(split)) for split in SPLITS)


# ---------------------------------------------------------------- torchvision

TORCH_SPECS = {  # which files lie in ./files, what was typed, and what else the fix says
    "no name": ("dtd", "torch", ""),
    "no such set": ("mnist", "torch/minst,root=files", ""),
    "unfit": ("mnist", "torch/omniglot,root=files", "kdcache datasets lists what there is"),
    "no variants": ("mnist", "torch/mnist,root=files,variant=small", ""),
    "a share of what is split": ("mnist", "torch/mnist,root=files,split_fraction=0.2", "leave it out"),
    "no splits": ("eurosat", "torch/eurosat,root=files", ""),
    "splits that it lacks": ("eurosat", "torch/eurosat,root=files,train=a,test=b", ""),
    "one split for both": ("dtd", "torch/dtd,root=files,train=train+val,test=val", "leave train and test out"),
    "images of both": ("fgvc_aircraft", "torch/fgvc_aircraft,root=files,test=val", "leave train and test out"),
    "no such variant": ("dtd", "torch/dtd,root=files,variant=one", "leave them out"),
    "nothing left": ("eurosat", "torch/eurosat,root=files,split_fraction=0.000001", "split_fraction, such as 0.2"),
}


@pytest.mark.parametrize("case", TORCH_SPECS)
def test_sets_of_torchvision_are_read_when_they_are_named_as_the_fix_says(case: str) -> None:
    made, spec, says = TORCH_SPECS[case]
    TORCH[made](Path("files"))
    if made == "eurosat":
        for name in ("River", "Forest"):
            for i in range(12):
                miniatures.save(Path(f"files/eurosat/2750/{name}/{name}_{i + 10}.jpg"))

    def mend(fix: str) -> str:
        assert says in fix, fix
        if case == "no name":
            assert dataset_in(fix) == "torch/flowers102"
            return "torch/dtd,root=files"
        if case == "no such set":
            return spec.replace("minst", fix.removeprefix("use ").strip("'"))
        if case == "unfit":
            assert run(["datasets"]) == 0
            return "torch/mnist,root=files"
        if case == "nothing left":
            return spec.replace("0.000001", fix.rpartition(" ")[2])
        assert "root=" in dataset_in(fix), "the files are where they were"
        return dataset_in(fix)

    assert followed(read, spec, mend) > 3


def test_files_of_torchvision_are_put_where_the_fix_says() -> None:
    TORCH["dtd"](Path("elsewhere"))
    Path("files").mkdir()

    def mend(fix: str) -> str:
        place = fix.partition("put its files into ")[2].partition(", as")[0]
        shutil.copytree("elsewhere/dtd", place)
        return "torch/dtd,root=files"

    assert followed(read, "torch/dtd,root=files", mend) > 3


def test_damaged_files_of_torchvision_are_set_aside() -> None:
    TORCH["mnist"](Path("files"))
    shutil.copytree("files", "copy")
    labels = Path("files/MNIST/raw/train-labels-idx1-ubyte")
    labels.write_bytes(labels.read_bytes()[:-1])

    def mend(fix: str) -> str:
        typed(fix, "mv")
        assert Path("files/MNIST.aside/raw").is_dir()
        shutil.copytree("copy/MNIST", "files/MNIST")  # they cannot be fetched here
        return "torch/mnist,root=files"

    assert followed(read, "torch/mnist,root=files", mend) > 3


# ---------------------------------------------------------------- the Hub

COLUMNS = {  # options, and the fix's words
    "no such split": (",train=training,test=test", ("train", "test"), ""),
    "no such test": (",test=dev", ("train", "test"), ""),
    "one split": (",train=training", ("train",), ""),
    "a share above 1": (",test=1.5", ("train",), "use test=0.2"),
    "no such column": (",label=image", ("train", "test"), "name it: --dataset"),
    "tests on training images": (",test=train", ("train",), "hold a part of it out: test=0.2"),
    "nothing left": (",test=0.999999", ("train",), "use another share, such as test=0.5"),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_sets_of_the_hub_are_read_when_they_are_named_as_the_fix_says(case: str) -> None:
    options, splits, says = COLUMNS[case]
    hub(Path("h"), ["a", "b"] * 6, splits=splits)

    def mend(fix: str) -> str:
        assert says in fix, fix
        if "--dataset" in fix:
            return dataset_in(fix)
        share = fix.partition("test=")[2].partition(",")[0]
        return f"hf:h,test={share}"

    assert followed(read, f"hf:h{options}", mend) >= 12


LABELS = {  # of texts, the fix's words, and the labels then
    "missing": (["a", None, "b", "a"], "leave such images out", ["a", "b", "a"]),
    "empty": (["a", "", "b", "a"], "write its class", ["a", "b", "b", "a"]),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_of_the_hub_are_used_when_they_are_as_the_fix_says(case: str) -> None:
    wrong, says, right = LABELS[case]
    hub(Path("h"), wrong)

    def mend(fix: str) -> str:
        assert says in fix, fix
        hub(Path("i"), right)
        return "hf:i"

    assert followed(read, "hf:h", mend) == 2 * len(right)


def test_a_column_that_is_missing_is_added() -> None:
    from datasets import Dataset

    for split in SPLITS:
        Path("h/data").mkdir(parents=True, exist_ok=True)
        Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).to_parquet(f"h/data/{split}-00000-of-00001.parquet")

    def mend(fix: str) -> str:
        assert fix.startswith("add such a column to it, an Image feature")
        hub(Path("i"), ["a", "b"])
        return "hf:i"

    assert followed(read, "hf:h", mend) == 4


def test_a_set_of_the_hub_that_is_not_there_is_named_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub(Path("h"), ["a", "b"])

    def mend(fix: str) -> str:
        assert "--dataset hf:" in fix or fix.startswith("correct its name"), fix
        return "hf:h"

    for wrong in ("hf:./nowhere", "hf:"):
        followed(read, wrong, mend)


# ---------------------------------------------------------------- what is fetched


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
        monkeypatch.setattr(DATASETS["cifar10"], "download", fetching.Download(f"{server.url}/cifar-10-binary.tar.gz", md5, 1))
        yield server


def test_what_is_not_fetched_yet_is_fetched_by_the_command_of_the_fix(site: FaultyServer) -> None:
    def mend(fix: str) -> str:
        assert run([*shlex.split(fix)[1:], "--home", "."]) == 0
        return "cifar10"

    assert followed(lambda spec: read(spec, fetch=False), "cifar10", mend) == 24


def test_a_wrong_file_is_set_aside_by_the_command_of_the_fix(site: FaultyServer) -> None:
    site.faults["cifar-10-binary.tar.gz"] = Fault(wrong=True)

    def mend(fix: str) -> str:
        typed(fix, "mv")
        site.forget()
        return "cifar10"

    assert followed(read, "cifar10", mend) == 24


def test_a_file_that_cannot_be_fetched_is_got_later_or_by_hand(site: FaultyServer) -> None:
    site.faults["cifar-10-binary.tar.gz"] = Fault(status=503)

    def mend(fix: str) -> str:
        address, _, place = fix.partition("download ")[2].partition(" by hand into ")
        packed = Path("served") / address.rpartition("/")[2]
        shutil.copy(packed, place.partition(";")[0])
        return "cifar10"

    assert followed(read, "cifar10", mend) == 24


def test_files_are_put_where_the_fix_says() -> None:
    def mend(fix: str) -> str:
        what, _, place = fix.removeprefix("put ").partition(" into ")
        miniatures.cifar10(Path(place.partition(";")[0]))
        assert what
        return "cifar10:root=c"

    Path("c").mkdir()
    assert followed(read, "cifar10:root=c", mend) == 24


def test_a_damaged_file_of_a_dataset_is_restored(datasets_in_small: Path) -> None:
    shutil.copytree(datasets_in_small / "cifar10", "c")
    file = next(Path("c").rglob("data_batch_1*"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])

    def mend(fix: str) -> str:
        assert str(file) in fix or "restore it from a copy" in fix
        if "mv " in fix:
            typed(fix, "mv")
        file.write_bytes(whole)
        return "cifar10:root=c"

    assert followed(read, "cifar10:root=c", mend) == 24


# ---------------------------------------------------------------- canvases


def pictures() -> None:
    for split in SPLITS:
        for name in ("cat", "dog"):
            for i in range(2):
                miniatures.save(Path(f"f/{split}/{name}/{i}.jpg"))


def built(options: dict[str, Any]) -> Canvas:
    given = {"size": 8, "split": "train"} | options
    canvas = load_canvas(DATASETS.parse("folder:f"), given.pop("split"), given.pop("size"), Path("canvases"), **given)
    require_intact(canvas)
    return canvas


def broken() -> None:
    Path("f/train/cat/0.jpg").write_bytes(b"\xff\xd8\xffno image")


def damaged(name: str) -> Callable[[], None]:
    def damage() -> None:
        file = built({}).path / name
        file.write_bytes(file.read_bytes()[:-3])

    return damage


def changed() -> None:
    file = built({}).path / "pixels.npy"
    pixels = np.load(file)
    pixels[0, 0, 0, 0] ^= 1
    np.save(file, pixels)


def exchanged() -> None:
    other = built({"split": "test"}).path
    path = built({}).path
    path.rename("kept")
    other.rename(path)


def no_cats() -> None:
    for i in range(2):
        Path(f"f/train/cat/{i}.jpg").write_bytes(b"\xff\xd8\xff")


def set_aside(fix: str) -> dict[str, Any]:
    typed(fix, "mv")
    return {}


def replaced(says: str, **options: Any) -> Callable[[str], dict[str, Any]]:
    def mend(fix: str) -> dict[str, Any]:
        assert says in fix, fix
        miniatures.save(Path("f/train/cat/0.jpg"))
        return options

    return mend


CANVASES: dict[str, tuple[dict[str, Any], Callable[[], None] | None, Callable[[str], dict[str, Any]]]] = {
    "a side of 0": ({"size": 0}, None, lambda fix: {"size": int(fix.rpartition(" ")[2])}),
    "an image that is none": ({}, broken, lambda fix: {"skip_corrupt": "repeat the command with --skip-corrupt" in fix}),
    "an image that was mended": ({}, broken, replaced("mend or convert these files")),
    "a class without images": ({"skip_corrupt": True}, no_cats, replaced("replace some of its files", skip_corrupt=True)),
    "cut pixels": ({}, damaged("pixels.npy"), set_aside),
    "cut labels": ({}, damaged("labels.npy"), set_aside),
    "other pixels": ({}, changed, set_aside),
    "another one": ({}, exchanged, set_aside),
}


@pytest.mark.parametrize("case", CANVASES)
def test_a_canvas_is_built_when_the_fix_is_followed(case: str) -> None:
    options, spoil, mend = CANVASES[case]
    pictures()
    if spoil is not None:
        spoil()
    assert len(followed(built, options, mend)) >= 3


def test_large_images_are_decoded_if_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    pictures()

    def mend(fix: str) -> dict[str, Any]:
        assert fix.startswith("repeat the command with --allow-large")
        return {"allow_large": True}

    assert len(followed(built, {}, mend)) == 4


def test_the_development_kit_of_imagenet_is_unpacked_by_the_command_of_the_fix() -> None:
    miniatures.imagenet_tars(Path("i"))
    subprocess.run("tar -czf ILSVRC2012_devkit_t12.tar.gz -C i ILSVRC2012_devkit_t12", shell=True, check=True)
    shutil.rmtree("i/ILSVRC2012_devkit_t12/data")

    def mend(fix: str) -> str:
        typed(fix, "tar")
        return "imagenet:root=i"

    assert followed(read, "imagenet:root=i", mend) > 3
