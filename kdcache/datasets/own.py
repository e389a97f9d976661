"""The user's own images in other forms than folders: NumPy arrays and tar shards."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdcache.datasets import DATASETS, SPLITS, Images, Licence, Recipe, Sample, Split, UsersOwn
from kdcache.datasets.fetching import Listed, Rooted, damaged_file
from kdcache.datasets.labels import NAMES_FILE, classes_of, read_names, same_images, tested_on_training
from kdcache.datasets.pixels import as_bytes
from kdcache.datasets.strays import IMAGE_SUFFIXES, Strays, is_known
from kdcache.datasets.tars import compressed, samples_in_shard
from kdcache.errors import NotFoundError, UsageError
from kdcache.system.progress import Progress

__all__ = ["RECIPE", "Arrays", "Tars"]

RECIPE = Recipe(policy="imagenet", canvas=256, teacher_epochs=20, student="rn18", student_epochs=100, pretrained=True)

_PROBES = 8  # images that are compared


def _require_root(name: str, root: str, needed: str) -> None:
    if not root:
        raise UsageError(f"dataset {name} needs the place of the images", why=f"it reads {needed}", fix=f"--dataset {name}:ROOT")


def _not_there(name: str, root: str, needed: str) -> NotFoundError:
    return NotFoundError(f"{root!r} has no {needed}", why=f"dataset {name} reads them from there", fix="correct the path")


@DATASETS.register("arrays")
@dataclass(frozen=True)
class Arrays(Rooted, UsersOwn):
    """NumPy arrays: train_images.npy and test_images.npy, uint8 [N, H, W], [N, H, W, 1 or 3] or [N, 1 or 3, H, W], with
    *_labels.npy, numbers from 0 on or texts.

    `root` is a folder with the four files, or an .npz file with the four arrays. `class_names.txt` in the folder, or beside
    the .npz, names the classes, one a line; without it their names are their numbers or texts, and each needs a training image.
    """

    licence: Licence | None = None

    recipe = RECIPE

    def __post_init__(self) -> None:
        _require_root("arrays", self.root, "ROOT/train_images.npy, train_labels.npy, test_images.npy and test_labels.npy")
        super().__post_init__()

    def open(self, data: Path, progress: Progress | None = None, *, fetch: bool = True) -> Images:
        root = Path(self.root)
        wanted = [f"{split}_{content}" for split in SPLITS for content in ("images", "labels")]
        files = [root] if root.is_file() else [root / f"{name}.npy" for name in wanted]
        if missing := [file for file in files if not file.is_file()]:
            raise _not_there("arrays", self.root, missing[0].name)
        base = root.parent if root.is_file() else root
        arrays = {name: _array(root, name) for name in wanted}
        listing, remarks, names = base / NAMES_FILE, [], None
        if listing.is_file():
            names = read_names(listing)
            files.append(listing)
        labels: dict[Split, NDArray] = {split: arrays[f"{split}_labels"] for split in SPLITS}
        for split in SPLITS:
            _check_arrays(root, split, arrays[f"{split}_images"], labels[split])
        if _are_the_same(arrays):
            remarks.append(same_images("the train_ and the test_ arrays"))
        numbered, named = classes_of(labels, names, str(root), naming=f"{listing}, one name a line")
        if names is None and labels["train"].dtype.kind not in "USO":
            remarks.append(f"classes are called by their numbers: {listing} can name them, one a line")

        def list_samples(split: Split) -> Sequence[Sample]:
            images = arrays[f"{split}_images"]
            return [
                Sample(f"{split}/{i:07d}", label, lambda i=i: _picture(images[i]))  # type: ignore[misc]
                for i, label in enumerate(numbered[split])
            ]

        return Listed(base, named, list_samples, files, remarks)


def _array(root: Path, name: str) -> NDArray:
    file = root if root.is_file() else root / f"{name}.npy"
    try:
        if root.is_file():
            with np.load(root, allow_pickle=False) as arrays:
                if name not in arrays:
                    raise UsageError(
                        f"{root} has no array {name}",
                        why=f"it has {', '.join(sorted(arrays)) or 'none'}; images and labels of both splits are read",
                        fix="save it so: numpy.savez(FILE, train_images=..., train_labels=..., test_images=..., test_labels=...)",
                    )
                return np.asarray(arrays[name])
        return np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
    except UsageError:
        raise
    except Exception as error:  # damaged files fail in every way
        if "allow_pickle" in str(error) or "Python objects" in str(error):
            raise UsageError(
                f"{file}: {name} holds Python objects",
                why="they are pickles, which may run code and are never loaded",
                fix=f"save it as numbers, or as texts: numpy.array({name}.tolist())",
            ) from None
        raise damaged_file(file, f"{type(error).__name__}: {error}", fetched=False) from None


def _check_arrays(root: Path, split: Split, images: NDArray, labels: NDArray) -> None:
    what = f"{root}: {split}_images is {images.dtype} {list(images.shape)}"
    if images.ndim not in {3, 4} or (images.ndim == 4 and not {images.shape[1], images.shape[3]} & {1, 3}) or not images.size:
        alpha = images.ndim == 4 and 4 in {images.shape[1], images.shape[3]}
        channels = "[:, :3]" if alpha and images.shape[1] == 4 else "[..., :3]"
        raise UsageError(
            what,
            why="images are [N, H, W], [N, H, W, 1 or 3] or [N, 1 or 3, H, W], with at least one pixel",
            fix=f"keep the three channels of colour: {split}_images{channels}" if alpha else "save them in one of these shapes",
        )
    if images.dtype != np.uint8:
        raise UsageError(
            what, why="pixels are uint8, from 0 to 255", fix=f"save them as 8 bits: {as_bytes(images, split + '_images')}"
        )
    if labels.ndim < 1 or len(images) != len(labels):
        raise UsageError(
            f"{root}: {split}_images are {len(images)}, {split}_labels has {len(labels) if labels.ndim else 1} labels",
            why="an image has one label",
            fix="save as many labels as images, in their order",
        )


def _are_the_same(arrays: dict[str, NDArray]) -> bool:
    """Whether both splits are the same images, as far as some of them tell."""
    train, test = arrays["train_images"], arrays["test_images"]
    if train.shape != test.shape or len(train) < 2 or not np.array_equal(arrays["train_labels"], arrays["test_labels"]):
        return False
    looked = sorted({round(i) for i in np.linspace(0, len(train) - 1, _PROBES)})
    return all(np.array_equal(train[i], test[i]) for i in looked)


def _picture(image: NDArray[np.uint8]) -> Image.Image:
    if image.ndim == 3 and image.shape[2] != 3 and (image.shape[0] == 3 or image.shape[2] != 1):
        image = image.transpose(1, 2, 0)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    return Image.fromarray(np.ascontiguousarray(image))


@DATASETS.register("tars")
@dataclass(frozen=True)
class Tars(Rooted, UsersOwn):
    """Tar shards of images as webdataset has them: train*.tar and test*.tar with KEY.jpg and KEY.cls, its class's number or name.

    `class_names.txt` beside them names the classes, one a line. Shards are read in place.
    """

    licence: Licence | None = None

    recipe = RECIPE

    def __post_init__(self) -> None:
        _require_root("tars", self.root, "ROOT/train*.tar and ROOT/test*.tar (or val*.tar)")
        super().__post_init__()

    def open(self, data: Path, progress: Progress | None = None, *, fetch: bool = True) -> Images:
        base = Path(self.root)
        shards, others = _shards(base)
        for split, files in shards.items():
            if not files:
                raise next(filter(None, map(compressed, others)), None) or _not_there("tars", self.root, f"{split}*.tar")
        refused = None
        if twice := [file for file in shards["test"] if any(file.samefile(other) for other in shards["train"])]:
            refused = tested_on_training(
                f"dataset tars:{self.root}", f"{twice[0].name} is a training shard", "hold some of the shards out, as test*.tar"
            )
        listing = base / NAMES_FILE
        if not listing.is_file():
            raise NotFoundError(
                f"{self.root!r} has no {NAMES_FILE}",
                why="shards hold the numbers of classes, or their names, and the order of classes must be said",
                fix=f"write it, the names of the classes from number 0 on, one a line: {listing}",
            )
        names = read_names(listing)
        read: dict[Split, tuple[list[Sample], Strays]] = {}

        def samples(split: Split) -> tuple[list[Sample], Strays]:
            if split not in read:
                strays = Strays()
                read[split] = [sample for shard in shards[split] for sample in samples_in_shard(shard, names, strays)], strays
                for file in others if split == "test" else ():
                    strays.add(f"*{file.suffix.lower()} beside the shards")
            return read[split]

        def list_samples(split: Split) -> Sequence[Sample]:
            if not (listed := samples(split)[0]):
                raise NotFoundError(
                    f"the {split} shards in {base} hold no images",
                    why="images are members with a label, KEY.cls, beside them",
                    fix="check what is in them with: tar -tf " + shlex.quote(str(shards[split][0])),
                )
            return listed

        files = [listing, *shards["train"], *shards["test"]]
        return Listed(base, names, list_samples, files, unused=lambda split: samples(split)[1].counts(), refused=refused)


def _shards(base: Path) -> tuple[dict[Split, list[Path]], list[Path]]:
    """The shards of each split, and the other tar files and images in a folder. Raises UsageError for compressed shards."""
    shards: dict[Split, list[Path]] = {"train": [], "test": []}
    others: list[Path] = []
    for file in sorted(base.iterdir()) if base.is_dir() else ():
        name = file.name.lower()
        if is_known(file.name) or file.name.startswith(".") or file.is_dir():
            continue
        split: Split | None = "train" if name.startswith("train") else "test" if name.startswith(("test", "val")) else None
        packed = ".tar." in name or name.endswith((".tar", ".tgz", ".tbz2", ".txz"))
        if split and packed and not file.is_file():
            raise UsageError(
                f"{file} is no file",
                why="it is a link that leads nowhere, a named pipe, a socket or a device",
                fix="put the shard itself there, or move it elsewhere",
            )
        if split and name.endswith(".tar"):
            shards[split].append(file)
        elif split and packed and file.is_file() and (error := compressed(file)):
            raise error
        elif packed or file.suffix.lower() in IMAGE_SUFFIXES:
            others.append(file)
    # The order of before: of test shards, those called test are the first.
    shards["test"].sort(key=lambda file: (not file.name.lower().startswith("test"), file.name))
    return shards, [file for file in others if file.is_file()]
