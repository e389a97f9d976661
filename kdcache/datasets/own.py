"""The user's own images in other forms than folders: NumPy arrays, tar shards, datasets of the Hugging Face Hub."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdcache.datasets import DATASETS, SPLITS, Images, Licence, Recipe, Sample, Split, UsersOwn, resolved
from kdcache.datasets.fetching import Listed, Rooted, damaged_file
from kdcache.datasets.folder import IMAGE_SUFFIXES
from kdcache.datasets.tars import in_tar, members
from kdcache.errors import IntegrityError, NotFoundError, RetryError, UsageError
from kdcache.system.progress import Progress

__all__ = ["Arrays", "Hub", "Tars"]

RECIPE = Recipe(policy="imagenet", canvas=256, teacher_epochs=20, student="rn18", student_epochs=100, pretrained=True)


def _require_root(name: str, root: str, needed: str) -> None:
    if not root:
        raise UsageError(f"dataset {name} needs the place of the images", why=f"it reads {needed}", fix=f"--dataset {name}:ROOT")


def _not_there(name: str, root: str, needed: str) -> NotFoundError:
    return NotFoundError(f"{root!r} has no {needed}", why=f"dataset {name} reads them from there", fix="correct the path")


@DATASETS.register("arrays")
@dataclass(frozen=True)
class Arrays(Rooted, UsersOwn):
    """NumPy arrays: train_images.npy and test_images.npy, uint8 [N, H, W], [N, H, W, 3] or [N, 3, H, W], with *_labels.npy.

    `root` is a folder with the four files, or an .npz file with the four arrays. `class_names.txt` in the folder, or beside
    the .npz, names the classes, one a line; without it their names are their numbers.
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
        labels = {split: arrays[f"{split}_labels"].reshape(-1).astype(np.int64) for split in SPLITS}
        listing, remarks = base / "class_names.txt", []
        if listing.is_file():
            names = [line.strip() for line in listing.read_text("utf-8").splitlines() if line.strip()]
            files.append(listing)
        else:
            remarks.append(f"classes are called by their numbers: {listing} can name them, one a line")
            names = [str(i) for i in range(int(max(part.max(initial=0) for part in labels.values())) + 1)]
        for split in SPLITS:
            _check_arrays(root, split, arrays[f"{split}_images"], labels[split], len(names))

        def list_samples(split: Split) -> Sequence[Sample]:
            images = arrays[f"{split}_images"]
            return [
                Sample(f"{split}/{i:07d}", int(label), lambda i=i: _picture(images[i]))  # type: ignore[misc]
                for i, label in enumerate(labels[split])
            ]

        return Listed(base, names, list_samples, files, remarks)


def _array(root: Path, name: str) -> NDArray:
    file = root if root.is_file() else root / f"{name}.npy"
    try:
        if root.is_file():
            with np.load(root, allow_pickle=False) as arrays:
                return np.asarray(arrays[name])
        return np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
    except Exception as error:  # damaged files fail in every way
        raise damaged_file(file, f"{type(error).__name__}: {error}") from None


def _check_arrays(root: Path, split: Split, images: NDArray, labels: NDArray[np.int64], classes: int) -> None:
    shaped = images.ndim == 3 or (images.ndim == 4 and (images.shape[3] == 3 or images.shape[1] == 3))
    if images.dtype != np.uint8 or not shaped or len(images) != len(labels) or not len(images):
        raise IntegrityError(
            f"{root}: {split}_images is {images.dtype} {list(images.shape)}, {split}_labels has {len(labels)} labels",
            why="images are uint8 [N, H, W], [N, H, W, 3] or [N, 3, H, W], with one label each",
            fix="save them so: numpy.save('train_images.npy', images.astype('uint8'))",
        )
    if not 0 <= labels.min() <= labels.max() < classes:
        raise IntegrityError(
            f"{root}: {split}_labels goes from {labels.min()} to {labels.max()}",
            why=f"there are {classes} classes, numbered from 0 on",
            fix="number the classes from 0 on, and name each of them in class_names.txt",
        )


def _picture(image: NDArray[np.uint8]) -> Image.Image:
    if image.ndim == 3 and image.shape[2] != 3:
        image = image.transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(image))


@DATASETS.register("tars")
@dataclass(frozen=True)
class Tars(Rooted, UsersOwn):
    """Tar shards of images as webdataset has them: train*.tar and test*.tar with KEY.jpg and KEY.cls, the number of its class.

    `class_names.txt` beside them names the classes, one a line. Shards are read in place.
    """

    licence: Licence | None = None

    recipe = RECIPE

    def __post_init__(self) -> None:
        _require_root("tars", self.root, "ROOT/train*.tar and ROOT/test*.tar (or val*.tar)")
        super().__post_init__()

    def open(self, data: Path, progress: Progress | None = None, *, fetch: bool = True) -> Images:
        base = Path(self.root)
        shards: dict[Split, list[Path]] = {
            "train": sorted(base.glob("train*.tar")),
            "test": sorted([*base.glob("test*.tar"), *base.glob("val*.tar")]),
        }
        for split, files in shards.items():
            if not files:
                raise _not_there("tars", self.root, f"{split}*.tar")
        listing = base / "class_names.txt"
        if not listing.is_file():
            raise _not_there("tars", self.root, "class_names.txt")
        names = [line.strip() for line in listing.read_text("utf-8").splitlines() if line.strip()]

        def list_samples(split: Split) -> Sequence[Sample]:
            return [sample for shard in shards[split] for sample in _in_shard(shard, len(names))]

        return Listed(base, names, list_samples, [listing, *shards["train"], *shards["test"]])


def _in_shard(shard: Path, classes: int) -> list[Sample]:
    labels: dict[str, int] = {}
    images: dict[str, Callable[[], Image.Image]] = {}
    for member in members(shard):
        path = PurePosixPath(member.name)
        stem, _, suffix = path.name.partition(".")
        key = str(path.parent / stem)
        if f".{suffix}".lower() in IMAGE_SUFFIXES:
            images[key] = in_tar(member)
        elif suffix == "cls":
            text = member.read().decode("ascii", "replace").strip()
            if not text.isdigit() or int(text) >= classes:
                raise damaged_file(shard, f"{member.name} holds {text[:40]!r}, not the number of one of {classes} classes")
            labels[key] = int(text)
    if unlabelled := sorted(images.keys() ^ labels.keys()):
        raise damaged_file(shard, f"{unlabelled[0]} has an image without a label, or a label without an image")
    return [Sample(f"{shard.stem}/{key}", labels[key], load) for key, load in images.items()]


@DATASETS.register("hf")
@dataclass(frozen=True)
class Hub(UsersOwn):
    """Any image classification dataset of the Hugging Face Hub, or a folder in its form: `hf:ORG/NAME`.

    It takes `pip install 'kdcache[hf]'`. `image` and `label` are the columns, by default those of that name, or the only ones of
    their kind; `train` and `test` the splits, the latter by default `test`, `validation`, `valid` or `val`. `revision` is a
    commit or branch, `config` one of several configurations.
    """

    repo: str = ""
    config: str | None = None
    revision: str | None = None
    image: str | None = None
    label: str | None = None
    train: str = "train"
    test: str | None = None
    licence: Licence | None = None

    recipe = RECIPE

    def __post_init__(self) -> None:
        if not self.repo:
            raise UsageError(
                "dataset hf needs a repository", why="it reads one dataset of the Hub", fix="--dataset hf:timm/oxford-iiit-pet"
            )
        if Path(folder := resolved(self.repo)).is_dir():
            object.__setattr__(self, "repo", folder)

    def open(self, data: Path, progress: Progress | None = None, *, fetch: bool = True) -> Images:
        try:
            import datasets
        except ImportError:
            raise UsageError(
                f"dataset hf:{self.repo} needs the package datasets", why="it is not installed", fix="pip install 'kdcache[hf]'"
            ) from None
        cache = data / "hf"
        download_config = datasets.DownloadConfig(local_files_only=not fetch, cache_dir=cache / "downloads")
        try:
            whole = datasets.load_dataset(
                self.repo, self.config, revision=self.revision, cache_dir=str(cache), download_config=download_config
            )
        except (ValueError, FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
            raise NotFoundError(
                f"dataset hf:{self.repo} is not there",
                why=" ".join(str(error).split())[:300],
                fix="correct its name, config or revision; log in with `hf auth login` if it is gated",
            ) from None
        except Exception as error:  # `datasets` raises errors of several download libraries
            raise RetryError(
                f"dataset hf:{self.repo} cannot be fetched",
                why=" ".join(f"{type(error).__name__}: {error}".split())[:300],
                fix="repeat the command when the Hub can be reached: what was fetched is kept",
            ) from None
        return _HubImages(self, whole)


class _HubImages(Images):
    """A `DatasetDict` with a column of images and one of labels."""

    def __init__(self, source: Hub, whole: Mapping[str, Any]) -> None:
        from datasets import ClassLabel
        from datasets import Image as Pictures

        tests = (source.test,) if source.test else ("test", "validation", "valid", "val")
        chosen = {"train": source.train, "test": next((name for name in tests if name in whole), tests[0])}
        for name in chosen.values():
            if name not in whole:
                raise UsageError(
                    f"dataset hf:{source.repo} has no split {name!r}",
                    why=f"its splits are {', '.join(whole)}",
                    fix=f"--dataset hf:{source.repo},train={next(iter(whole))},test=...",
                )
        features = whole[chosen["train"]].features
        self._image = _column(source, "image", source.image, [n for n, kind in features.items() if isinstance(kind, Pictures)])
        labels = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
        self._label = _column(source, "label", source.label, labels or [name for name in features if name == "label"])
        # Images stay encoded here; the canvas decodes each once.
        self._parts = {split: whole[name].cast_column(self._image, Pictures(decode=False)) for split, name in chosen.items()}
        kind = features[self._label]
        values = [value for part in self._parts.values() for value in part[self._label]]
        self._names = list(kind.names) if isinstance(kind, ClassLabel) else [str(value) for value in sorted(set(values))]
        self._number = {name: i for i, name in enumerate(self._names)}
        self._numbered = isinstance(kind, ClassLabel)

    def class_names(self) -> Sequence[str]:
        return self._names

    def samples(self, split: Split) -> Sequence[Sample]:
        part = self._parts[split]
        samples = []
        for i, value in enumerate(part[self._label]):
            label = int(value) if self._numbered else self._number[str(value)]
            if not 0 <= label < len(self._names):
                raise IntegrityError(
                    f"row {i} of the {split} split has the label {value}",
                    why=f"there are {len(self._names)} classes (-1 stands for a label that is kept back)",
                    fix="choose another split with test=NAME",
                )
            samples.append(Sample(f"{split}/{i:07d}", label, lambda i=i: _stored(part[i][self._image])))  # type: ignore[misc]
        return samples

    def fingerprint(self) -> str:
        return " ".join(part._fingerprint for part in self._parts.values())


def _column(source: Hub, role: str, chosen: str | None, fitting: Sequence[str]) -> str:
    if chosen in fitting:
        return str(chosen)
    if chosen is None and (role in fitting or len(fitting) == 1):
        return role if role in fitting else fitting[0]
    raise UsageError(
        f"dataset hf:{source.repo} has {len(fitting)} columns that may be the {role}"
        + (f", and {chosen!r} is not one" if chosen else ""),
        why=f"these may: {', '.join(fitting) or 'none'}",
        fix=f"name it: hf:{source.repo},{role}=" + (fitting[0] if fitting else "COLUMN"),
    )


def _stored(cell: Mapping[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(cell["bytes"]) if cell.get("bytes") is not None else cell["path"])
