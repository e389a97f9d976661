"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), in the binary form, which kdcache fetches, or in the Python form."""

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdcache.datasets import DATASETS, Counts, Images, Recipe, Sample, Split
from kdcache.datasets.fetching import Download, Listed, Rooted, damaged_file, find_or_fetch
from kdcache.system.progress import Progress

__all__ = ["CIFAR10", "CIFAR100"]

PIXELS = 3 * 32 * 32
SITE = "https://www.cs.toronto.edu/~kriz"


@dataclass(frozen=True)
class _Form:
    """One of the two forms: folder, files of each split, file of class names, and place of the labels."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    label_bytes: int  # label bytes before each image of the binary form, the last one counts; 0: the Python form
    label_key: str = ""
    names_key: str = ""

    def is_in(self, place: Path) -> bool:
        return all((place / self.folder / name).is_file() for name in (*self.train, *self.test, self.names))


@dataclass(frozen=True)
class _Cifar(Rooted):
    licence = None
    name: ClassVar[str]
    forms: ClassVar[tuple[_Form, _Form]]
    download: ClassVar[Download]
    hub: ClassVar[str]

    def open(self, data: Path, progress: Progress | None = None, *, fetch: bool = True) -> Images:
        def find(place: Path) -> Path | None:
            return next((place / form.folder for form in self.forms if form.is_in(place)), None)

        folder = find_or_fetch(
            self.name,
            self.root,
            data,
            find,
            f"the folder {' or '.join(form.folder for form in self.forms)} of {self.name}",
            [self.download],
            f"--dataset hf:{self.hub}",
            progress,
            fetch,
        )
        form = next(form for form in self.forms if form.folder == folder.name)
        names = _names(folder / form.names, form.names_key)

        def list_samples(split: Split) -> Sequence[Sample]:
            files = [folder / name for name in (form.train if split == "train" else form.test)]
            read = [_binary(file, form.label_bytes) if form.label_bytes else _python(file, form.label_key) for file in files]
            for file, (_, labels) in zip(files, read, strict=True):
                if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
                    raise damaged_file(file, f"it has labels from {labels.min()} to {labels.max()}, of {len(names)} classes")
            pairs = ((image, label) for images, labels in read for image, label in zip(images, labels.tolist(), strict=True))
            return [
                Sample(f"{split}/{i:05d}", label, lambda image=image: _picture(image))  # type: ignore[misc]
                for i, (image, label) in enumerate(pairs)
            ]

        return Listed(folder, names, list_samples, [folder / name for name in (*form.train, *form.test, form.names)])


@DATASETS.register("cifar10")
@dataclass(frozen=True)
class CIFAR10(_Cifar):
    """CIFAR-10: 50,000 and 10,000 images of 32 x 32 pixels, 10 classes."""

    recipe = Recipe(
        policy="cifar",
        canvas=32,
        teacher_epochs=40,
        student="test_resnet",
        student_epochs=512,
        pretrained=True,
        test_policy="none",
    )
    counts = Counts(50_000, 10_000, 10)
    name = "cifar10"
    hub = "uoft-cs/cifar10"
    download = Download(f"{SITE}/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", 170)
    forms = (
        _Form(
            "cifar-10-batches-bin",
            tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            ("test_batch.bin",),
            "batches.meta.txt",
            label_bytes=1,
        ),
        _Form(
            "cifar-10-batches-py",
            tuple(f"data_batch_{i}" for i in range(1, 6)),
            ("test_batch",),
            "batches.meta",
            label_bytes=0,
            label_key="labels",
            names_key="label_names",
        ),
    )


@DATASETS.register("cifar100")
@dataclass(frozen=True)
class CIFAR100(_Cifar):
    """CIFAR-100: 50,000 and 10,000 images of 32 x 32 pixels, 100 (fine) classes."""

    recipe = Recipe(
        policy="cifar",
        canvas=32,
        teacher_epochs=40,
        student="rn18",
        student_epochs=512,
        pretrained=True,
        test_policy="none",
        durations=(40, 100, 200, 400),
    )
    counts = Counts(50_000, 10_000, 100)
    name = "cifar100"
    hub = "uoft-cs/cifar100,label=fine_label"
    download = Download(f"{SITE}/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", 169)
    forms = (
        _Form("cifar-100-binary", ("train.bin",), ("test.bin",), "fine_label_names.txt", label_bytes=2),
        _Form(
            "cifar-100-python",
            ("train",),
            ("test",),
            "meta",
            label_bytes=0,
            label_key="fine_labels",
            names_key="fine_label_names",
        ),
    )


_LabelledImages = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images [N, 3072], labels [N]


def _binary(file: Path, label_bytes: int) -> _LabelledImages:
    width = label_bytes + PIXELS
    if file.stat().st_size % width:
        raise damaged_file(file, f"its {file.stat().st_size} bytes are not records of {width}")
    records = np.memmap(file, np.uint8, "r").reshape(-1, width)
    return records[:, label_bytes:], records[:, label_bytes - 1].astype(np.int64)


def _python(file: Path, label_key: str) -> _LabelledImages:
    content = _unpickled(file)
    try:
        images, labels = np.asarray(content["data"]), np.array(content[label_key], np.int64)
        if images.dtype != np.uint8 or images.shape != (len(labels), PIXELS):
            raise ValueError(f"its data are {images.dtype} {list(images.shape)} for {len(labels)} labels")
    except (KeyError, TypeError, ValueError) as error:
        raise damaged_file(file, str(error)) from None
    return images, labels


def _names(file: Path, key: str) -> list[str]:
    if not key:
        try:
            return [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
        except ValueError as error:
            raise damaged_file(file, str(error)) from None
    names = _unpickled(file).get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise damaged_file(file, f"it has no list {key!r} of names")
    return names


class _Plain(pickle.Unpickler):
    """An unpickler that builds only arrays and plain data, since pickles from strangers can run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy._core", "numpy.core"), name) == ("numpy.core.multiarray", "_reconstruct"):
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if module == "numpy" and name in {"ndarray", "dtype"}:
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # bytes in pickles of Python 2
            return lambda text, coding: text.encode("latin1")
        raise pickle.UnpicklingError(f"it wants to make a {module}.{name}, which is neither an array nor text")


def _unpickled(file: Path) -> dict[str, Any]:
    try:
        content = _Plain(io.BytesIO(file.read_bytes()), encoding="latin1").load()
        if not isinstance(content, dict):
            raise ValueError("it holds no mapping")
    except Exception as error:  # damaged pickles raise any error
        raise damaged_file(file, f"{type(error).__name__}: {error}") from None
    return {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}


def _picture(image: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image.reshape(3, 32, 32).transpose(1, 2, 0)))
