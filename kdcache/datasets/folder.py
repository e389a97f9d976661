"""Images in folders named after their classes."""

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from kdcache.datasets import DATASETS, SPLITS, Licence, Recipe, Sample, Split, UsersOwn, resolved
from kdcache.errors import NotFoundError, UsageError
from kdcache.system.progress import Progress

__all__ = ["IMAGE_SUFFIXES", "Folder", "in_test_split"]

# Suffixes of image files. Pillow's own list contains formats that it cannot decode (.mpg, .eps, .h5), and it differs
# between versions, while a dataset must not change with the version.
# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pcx", ".pfm", ".pgm",
    ".png", ".pnm", ".ppm", ".sgi", ".tga", ".tif", ".tiff", ".webp",
})
# fmt: on


@DATASETS.register("folder")
@dataclass(frozen=True)
class Folder(UsersOwn):
    """Images in folders named after their classes.

    `root` holds `train/<class>/...` and `test/<class>/...` (or `val/`, `validation/`); or classes only, and then
    `split_fraction` of each class, chosen by the hash of the file's name, is for testing. Keys are paths below the split's
    folder, letter by letter as the file system has them.
    """

    root: str = ""
    split_fraction: float | None = None
    licence: Licence | None = None

    recipe = Recipe(policy="imagenet", canvas=256, teacher_epochs=20, student="rn18", student_epochs=100, pretrained=True)

    def __post_init__(self) -> None:
        if not self.root:
            raise UsageError(
                "dataset folder needs the place of the images",
                why="it reads ROOT/train/CLASS/*.jpg and ROOT/test/CLASS/*.jpg",
                fix="--dataset folder:ROOT  (or folder:root=ROOT,split_fraction=0.2)",
            )
        if self.split_fraction is not None and not 0 < self.split_fraction < 1:
            raise UsageError(
                f"split_fraction {self.split_fraction} is not between 0 and 1",
                why="it is the share of each class that is kept for testing",
                fix="use for example split_fraction=0.2",
            )
        # The absolute path is the folder's one name, so that records and canvases that contain it are found again.
        object.__setattr__(self, "root", resolved(self.root))

    def open(self, data: Path, progress: Progress | None = None, *, fetch: bool = True) -> "Folder":
        return self

    def _split_folder(self, split: Split) -> Path | None:
        names = ("train",) if split == "train" else ("test", "val", "validation")
        return next((Path(self.root) / name for name in names if (Path(self.root) / name).is_dir()), None)

    def _base(self, split: Split) -> Path:
        root = Path(self.root)
        if not root.is_dir():
            raise NotFoundError(
                f"image folder {self.root!r} does not exist",
                why="dataset folder reads it as ROOT/train/CLASS/*.jpg",
                fix="correct the path, or create the folder",
            )
        if self.split_fraction is not None:
            train, test = self._split_folder("train"), self._split_folder("test")
            if train and test:
                raise UsageError(
                    f"{self.root!r} is split already, into {train.name}/ and {test.name}/",
                    why="with split_fraction these two would be taken for classes",
                    fix=f"leave split_fraction out: --dataset {DATASETS.spec(replace(self, split_fraction=None))}",
                )
            return root
        base = self._split_folder(split)
        if base is None:
            raise NotFoundError(
                f"{self.root!r} has no {'train' if split == 'train' else 'test, val or validation'} folder",
                why="without split_fraction both splits must lie in folders of their own",
                fix=f"create it, or split by hash: --dataset {DATASETS.spec(replace(self, split_fraction=0.2))}",
            )
        return base

    def class_names(self) -> Sequence[str]:
        base = self._base("train")
        names = sorted(entry.name for entry in base.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if len(names) < 2:
            raise UsageError(
                f"{base} has {len(names)} class folders",
                why="classification needs at least two, one sub-folder a class",
                fix="put the images of each class into a folder of its own",
            )
        return names

    def samples(self, split: Split) -> Sequence[Sample]:
        base, classes = self._base(split), {name: i for i, name in enumerate(self.class_names())}
        samples = []
        for path in _image_files(base):
            key = path.relative_to(base).as_posix()
            if any(unicodedata.category(c) in {"Cc", "Cs"} for c in key):  # Cs: Python's stand-in for bytes that are not UTF-8
                raise UsageError(
                    f"image {key!a} has an unprintable name",
                    why="names are the samples' keys, and those are UTF-8 text",
                    fix="rename the file",
                )
            name = key.partition("/")[0]
            if name not in classes:
                raise UsageError(
                    f"{split} folder has the class {name!r}, the train folder does not",
                    why="labels are the train folder's sub-folders in alphabetical order",
                    fix=f"rename {base / name}, or move it elsewhere",
                )
            if self.split_fraction is not None and in_test_split(key, self.split_fraction) != (split == "test"):
                continue
            samples.append(Sample(key, classes[name], lambda path=path: Image.open(path)))  # type: ignore[misc]
        empty = sorted(classes.keys() - {sample.key.partition("/")[0] for sample in samples})
        if samples and empty and split == "train":
            raise UsageError(
                f"class folder {base / empty[0]} holds no training images ({len(empty)} such class(es))",
                why="a teacher cannot learn a class without samples",
                fix="add images to it, or move the folder elsewhere",
            )
        if not samples:
            raise NotFoundError(
                f"{base} holds no images for the {split} split",
                why=f"files below class folders are looked for that end in {', '.join(sorted(IMAGE_SUFFIXES))}",
                fix="check the path and the layout CLASS/FILE",
            )
        return samples

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for split in SPLITS:
            base = self._base(split)
            for path in _image_files(base):
                status = path.stat()
                digest.update(f"{split} {path.relative_to(base).as_posix()} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def _image_files(base: Path) -> list[Path]:
    """Image files below the class folders of `base`, sorted by name. Links are followed, but not in circles."""
    image_files = []

    def unreadable(error: OSError) -> None:
        raise error  # os.walk would silently skip the folder

    for folder, folders, files in os.walk(base, followlinks=True, onerror=unreadable):
        here = Path(folder).resolve()
        folders[:] = [name for name in folders if not name.startswith(".") and not here.is_relative_to((here / name).resolve())]
        if Path(folder) != base:
            image_files += [Path(folder) / f for f in files if Path(f).suffix.lower() in IMAGE_SUFFIXES and not f.startswith(".")]
    return sorted(image_files, key=lambda path: path.relative_to(base).as_posix())


def in_test_split(key: str, fraction: float) -> bool:
    """Whether a sample is of the `fraction` that is for testing. Its key alone decides, so that new files move no others."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 < fraction
