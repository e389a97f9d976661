"""Images in folders named after their classes."""

import functools
import hashlib
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from kdcache.datasets import DATASETS, SPLITS, Licence, Recipe, Sample, Split, UsersOwn, resolved
from kdcache.datasets.labels import composed, require_names, tested_on_training
from kdcache.datasets.strays import IMAGE_SUFFIXES, Entry, Strays, folder_entries, is_known, undecodable, walked
from kdcache.errors import NotFoundError, UsageError
from kdcache.system.progress import Progress

__all__ = ["Folder", "in_test_split"]


@DATASETS.register("folder")
@dataclass(frozen=True)
class Folder(UsersOwn):
    """Images in folders named after their classes.

    `root` holds `train/<class>/...` and `test/<class>/...` (or `val/`, `validation/`); or classes only, and then
    `split_fraction` of each class, chosen by the hash of the file's name, is for testing. Keys are paths below the split's
    folder, letter by letter as the file system has them. Files that are no images are counted, and images that cannot be decoded
    are named when the canvas is built.
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

    @property
    def refused(self) -> UsageError | None:
        train, test = self._split_folder("train"), self._split_folder("test")
        if self.split_fraction is not None or train is None or test is None or not train.samefile(test):
            return None
        return tested_on_training(
            f"dataset {DATASETS.spec(self)}",
            f"{train.name}/ and {test.name}/ are the same folder",
            f"split it: --dataset {_typed(self, root=str(train), split_fraction=0.2)}",
        )

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
                    fix=f"leave split_fraction out: --dataset {_typed(self, split_fraction=None)}",
                )
            return root
        base = self._split_folder(split)
        if base is None:
            whole = self._split_folder("test" if split == "train" else "train") or root  # where the folders of classes are
            raise NotFoundError(
                f"{self.root!r} has no {'train' if split == 'train' else 'test, val or validation'} folder",
                why="without split_fraction both splits must lie in folders of their own",
                fix=f"create it, or split by hash: --dataset {_typed(self, root=str(whole), split_fraction=0.2)}",
            )
        return base

    def class_names(self) -> Sequence[str]:
        base = self._base("train")
        names = sorted(
            entry.name
            for entry in base.iterdir()
            if not entry.name.startswith(".") and not is_known(entry.name, folder=True) and entry.is_dir()
        )
        if broken := sorted(e.name for e in base.iterdir() if not (e.suffix or e.name.startswith(".") or e.exists())):
            raise UsageError(
                f"class folder {base / broken[0]} is a link that leads nowhere",
                why="its class would be missing without a word",
                fix="make the place that it leads to available, or move the link elsewhere",
            )
        if len(names) < 2:
            raise UsageError(
                f"{base} has {len(names)} class folders",
                why="classification needs at least two, one sub-folder a class",
                fix="put the images of each class into a folder of its own",
            )
        require_names(names, f"{base}")
        return names

    def samples(self, split: Split) -> Sequence[Sample]:
        base, classes = self._base(split), {composed(name): i for i, name in enumerate(self.class_names())}
        samples, found = [], _images(base, Strays())
        for entry in found:
            key = entry.name
            if any(unicodedata.category(c) in {"Cc", "Cs"} for c in key):  # Cs: Python's stand-in for bytes that are not UTF-8
                raise UsageError(
                    f"image {key!a} has an unprintable name",
                    why="names are the samples' keys, and those are UTF-8 text",
                    fix="rename the file",
                )
            name = key.partition("/")[0]
            if composed(name) not in classes:
                raise UsageError(
                    f"{split} folder has the class {name!r}, the train folder does not",
                    why="labels are the train folder's sub-folders in alphabetical order",
                    fix=f"rename {base / name} as the train folder has it, or move it elsewhere",
                )
            if self.split_fraction is not None and in_test_split(key, self.split_fraction) != (split == "test"):
                continue
            load = undecodable(entry.problem) if entry.problem else functools.partial(Image.open, entry.place)
            samples.append(Sample(key, classes[composed(name)], load))
        taught = {sample.label for sample in samples}
        empty = [name for name in self.class_names() if classes[composed(name)] not in taught]
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

    def unused(self, split: Split) -> Mapping[str, int]:
        """Numbers of files below the split's folder that are no samples, and of images in folders beside the splits'."""
        strays = Strays()
        _images(self._base(split), strays)
        for folder in self._beside() if split == "test" else ():
            for _ in walked(folder_entries(folder), Strays()):
                strays.add(
                    f"images in {folder.name}/, which is neither split" if folder.name.isprintable() else "in other folders"
                )
        return strays.counts()

    def _beside(self) -> list[Path]:
        """Folders beside those of the splits, which may hold images all the same."""
        if self.split_fraction is not None:
            return []
        splits = {self._split_folder(split) for split in SPLITS}
        beside = (place for place in Path(self.root).iterdir() if not place.name.startswith("."))
        return sorted(p for p in beside if p not in splits and p.is_dir() and not is_known(p.name, folder=True))

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for split in SPLITS:
            for entry in _images(self._base(split), Strays()):
                status = entry.place.lstat() if entry.problem else entry.place.stat()
                line = f"{split} {entry.name} {status.st_size} {status.st_mtime_ns}\n"
                digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def _typed(folder: "Folder", **changes: Any) -> str:
    """The folder with other options, as it is typed."""
    return shlex.quote(DATASETS.spec(replace(folder, **changes)))


def _images(base: Path, strays: Strays) -> list[Entry[Path]]:
    """The images below the class folders of `base`, sorted by name."""
    found = []
    for entry in walked(folder_entries(base), strays):
        if "/" in entry.name:
            found.append(entry)
        else:
            strays.add("images in no class folder")
    return sorted(found, key=lambda entry: entry.name)


def in_test_split(key: str, fraction: float) -> bool:
    """Whether a sample is of the `fraction` that is for testing. Its key alone decides, so that new files move no others."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 < fraction
