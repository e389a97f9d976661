"""torchvision's datasets of images with one label each, as sources: `torch/flowers102`, `torch/food101`, ...

torchvision finds, downloads and reads them. It is imported when the images of such a source are asked for.
"""

import contextlib
import copy
import errno
import functools
import hashlib
import http.client
import os
import re
import shlex
import shutil
import sys
import urllib.error
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdcache.datasets import DATASETS, SPLITS, Images, Licence, Recipe, Split, UsersOwn, resolved
from kdcache.datasets.cifar import CIFAR10, CIFAR100
from kdcache.datasets.fine import Cars, Flowers, Pets
from kdcache.datasets.folder import in_test_split
from kdcache.datasets.imagenet import ImageNet
from kdcache.datasets.mapstyle import MapStyle, Part, image_files, listed_labels, names_of
from kdcache.errors import IntegrityError, NotFoundError, RetryError, UsageError, unknown_name
from kdcache.system.files import set_aside
from kdcache.system.locks import locked_if_possible
from kdcache.system.progress import Progress, Silent

__all__ = ["SETS", "Torch"]

_PHOTOS = Recipe(policy="imagenet", canvas=256, teacher_epochs=20, student="rn18", student_epochs=100, pretrained=True)
_SMALL = replace(_PHOTOS, test_policy="none")  # with a canvas of their size
_SIGNS = replace(_SMALL, policy="digits", canvas=32, teacher_epochs=40)
_CLOTHES = replace(_SMALL, policy="cifar", canvas=32, student_epochs=240)
_FINE = Flowers.recipe
_PACKED = frozenset({".bz2", ".gz", ".tar", ".tgz", ".xz", ".zip"})


def _own_labels(attribute: str, column: int) -> Callable[[Any], list[int]]:
    return lambda dataset: [int(row[column]) for row in getattr(dataset, attribute)]


def _pcam_labels(dataset: Any) -> Any:
    with dataset.h5py.File(dataset._base_folder / dataset._FILES[dataset._split]["targets"][0]) as stored:
        return stored["y"][:].reshape(-1)


def _inaturalist_files(dataset: Any) -> list[str]:
    return [str(Path(dataset.root, dataset.all_categories[category], file)) for category, file in dataset.index]


@dataclass(frozen=True)
class Set:
    """One of torchvision's datasets: the class `kind`, and how its constructor and its attributes are to be understood."""

    kind: str
    recipe: Recipe
    argument: str | None = "split"  # which chooses the split; None: there is only one
    train: str = "train"
    test: str = "test"
    folder: str = ""  # below `root`; files in it decide on the fingerprint
    names: str | None = "classes"  # attribute with the class names; None: they have none but their numbers
    variant: tuple[str, Callable[[str], Any], str] | None = None  # constructor's argument, its type, and default
    labels: Callable[[Any], Any] | None = None
    files: Callable[[Any], list[str] | None] = image_files
    needs: tuple[str, ...] = ()  # folders without which torchvision would unpack archives, whatever it is asked for
    fetched: bool = True  # False: its owners let nobody download it, or torchvision cannot
    published_as: str = ""  # registered name of the same dataset, where it has a source of its own

    def make(self, name: str, split: str | None, place: Path, variant: str | None, *, download: bool) -> Any:
        """torchvision's object. Raises UsageError for a split or variant that it does not know."""
        import torchvision.datasets

        maker = getattr(torchvision.datasets, self.kind, None)
        if maker is None:
            raise UsageError(
                f"dataset torch/{name} is not in torchvision {torchvision.__version__}",
                why=f"it has no torchvision.datasets.{self.kind}",
                fix="pip install --upgrade torchvision",
            )
        if missing := [folder for folder in self.needs if not (place / folder).is_dir()]:
            raise FileNotFoundError(f"there is no {place / missing[0]}")
        options: dict[str, Any] = {"download": download} if self.fetched else {}
        if self.argument == "train":
            options["train"] = split == "train"
        elif self.argument is not None:
            options[self.argument] = split
        if self.variant is not None:
            argument, convert, default = self.variant
            options[argument] = convert(variant or default)
        return maker(str(place), **options)


def _yes(text: str) -> bool:
    if text.lower() not in {"true", "false"}:
        raise ValueError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


_mnist = functools.partial(Set, argument="train")
SETS: dict[str, Set] = {
    "caltech101": Set("Caltech101", _PHOTOS, None, folder="caltech101", names="categories"),
    "caltech256": Set("Caltech256", _PHOTOS, None, folder="caltech256", names="categories"),
    "cifar10": _mnist("CIFAR10", CIFAR10.recipe, folder="cifar-10-batches-py", published_as="cifar10"),
    "cifar100": _mnist("CIFAR100", CIFAR100.recipe, folder="cifar-100-python", published_as="cifar100"),
    "clevr": Set("CLEVRClassification", _PHOTOS, test="val", folder="clevr", names=None),
    "country211": Set("Country211", _PHOTOS, folder="country211"),
    "dtd": Set("DTD", _FINE, folder="dtd", variant=("partition", int, "1")),
    "emnist": _mnist("EMNIST", _SIGNS, folder="EMNIST", variant=("split", str, "balanced")),
    "eurosat": Set("EuroSAT", replace(_SMALL, canvas=64), None, folder="eurosat"),
    "fashion_mnist": _mnist("FashionMNIST", _CLOTHES, folder="FashionMNIST"),
    "fer2013": Set("FER2013", replace(_SMALL, canvas=48), folder="fer2013", names=None, fetched=False),
    "fgvc_aircraft": Set(
        "FGVCAircraft", _FINE, train="trainval", folder="fgvc-aircraft-2013b", variant=("annotation_level", str, "variant")
    ),
    "flowers102": Set("Flowers102", _FINE, folder="flowers-102", published_as="flowers"),
    "food101": Set("Food101", replace(_PHOTOS, canvas=336), folder="food-101"),
    "gtsrb": Set("GTSRB", replace(_SIGNS, canvas=48), folder="gtsrb", names=None),
    "imagenet": Set(
        "ImageNet", ImageNet.recipe, test="val", names="wnids", needs=("train", "val"), fetched=False, published_as="imagenet"
    ),
    "imagenette": Set("Imagenette", _PHOTOS, test="val", names="wnids", variant=("size", str, "full")),
    "inaturalist": Set(
        "INaturalist", _PHOTOS, "version", "2021_train", "2021_valid", names="all_categories",
        labels=_own_labels("index", 0), files=_inaturalist_files,
    ),
    "kmnist": _mnist("KMNIST", _SIGNS, folder="KMNIST"),
    "mnist": _mnist("MNIST", _SIGNS, folder="MNIST"),
    "oxford_iiit_pet": Set("OxfordIIITPet", Pets.recipe, train="trainval", folder="oxford-iiit-pet", published_as="pets"),
    "pcam": Set("PCAM", replace(_SMALL, canvas=96), folder="pcam", names=None, labels=_pcam_labels),
    "places365": Set("Places365", _PHOTOS, train="train-standard", test="val", variant=("small", _yes, "false")),
    "qmnist": _mnist("QMNIST", _SIGNS, folder="QMNIST", labels=_own_labels("targets", 0)),
    "rendered_sst2": Set("RenderedSST2", _PHOTOS, folder="rendered-sst2"),
    "semeion": Set("SEMEION", _SIGNS, None, names=None),
    "stanford_cars": Set("StanfordCars", Cars.recipe, folder="stanford_cars", fetched=False, published_as="cars"),
    "stl10": Set("STL10", replace(_SMALL, canvas=96), folder="stl10_binary"),
    "sun397": Set("SUN397", _PHOTOS, None, folder="SUN397"),
    "svhn": Set("SVHN", _SIGNS, names=None),
    "usps": _mnist("USPS", _SIGNS, names=None),
}  # fmt: skip
_OTHER_NAMES = {"inat": "inaturalist"}
# Sets with images and labels that are no split into training and test images of the same classes.
_UNFIT = {
    "fakedata": "its images are noise",
    "celeba": "an image has 40 labels",
    "imagefolder": "it is what dataset folder reads: --dataset folder:ROOT",
    "folder": "it is what dataset folder reads: --dataset folder:ROOT",
    "lfwpeople": "its test images are of other people than its training images",
    "omniglot": "its test images are of other alphabets than its training images",
    "lsun": "its images are in a database for each class; as folders they are: --dataset folder:ROOT",
}


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


@DATASETS.register("torch")
@dataclass(frozen=True)
class Torch(UsersOwn):
    """A dataset of torchvision's, which downloads and reads it: `torch/flowers102` is the same as `torch:flowers102`.

    `root` is where its files are, as torchvision lays them out. `train` and `test` are names of its splits, joined by + where
    several are meant (`train=train+val`). Where it has only one, `split_fraction` of the images is for testing, chosen by the
    hash of their keys. `variant` is EMNIST's split, DTD's partition, FGVCAircraft's annotation_level, Imagenette's size, or
    whether Places365 is small.
    """

    dataset: str = ""
    root: str = ""
    split_fraction: float | None = None
    train: str | None = None
    test: str | None = None
    variant: str | None = None
    licence: Licence | None = None

    recipe = _PHOTOS

    def __post_init__(self) -> None:
        if not self.dataset:
            raise UsageError(
                "dataset torch needs the name of one of torchvision's datasets",
                why=f"there are {', '.join(SETS)}",
                fix="--dataset torch/flowers102",
            )
        spelled = {_plain(name): name for name in SETS} | {_plain(kind.kind): name for name, kind in SETS.items()} | _OTHER_NAMES
        name = spelled.get(_plain(self.dataset))
        if name is None and (why := _UNFIT.get(_plain(self.dataset))):
            raise UsageError(f"dataset torch/{self.dataset} cannot be used", why=why, fix="kdcache datasets lists what there is")
        if name is None:
            raise unknown_name("dataset of torchvision", self.dataset, SETS, error=NotFoundError)
        kind = SETS[name]
        for field, value in {
            "dataset": name,
            "recipe": kind.recipe,
            "root": resolved(self.root) if self.root else "",
        }.items():
            object.__setattr__(self, field, value)
        if self.variant is not None and kind.variant is None:
            raise UsageError(
                f"dataset {self.title} with variant={self.variant}",
                why="it has no variants",
                fix=f"--dataset {self._typed(variant=None)}",
            )
        if kind.argument is None:
            self._require_fraction()
        elif self.split_fraction is not None:
            raise UsageError(
                f"dataset {self.title} with split_fraction={self.split_fraction}",
                why=f"it has splits of its own, {kind.train} and {kind.test} among them",
                fix=f"leave it out: --dataset {self._typed(split_fraction=None)}",
            )
        elif shared := set(self._splits("train")) & set(self._splits("test")):
            raise UsageError(
                f"dataset {self.title}: {shared.pop()} is for training and for testing",
                why="a figure on images that were trained on says nothing",
                fix=f"choose others, or leave train and test out: --dataset {self._typed(train=None, test=None)}",
            )

    def _require_fraction(self) -> None:
        fraction = self.split_fraction
        if fraction is None or not 0 < fraction < 1 or self.train or self.test:
            raise UsageError(
                f"dataset {self.title} has no splits of its own",
                why="a share of its images is to be kept for testing, between 0 and 1",
                fix=f"--dataset {self._typed(train=None, test=None, split_fraction=0.2)}",
            )

    @classmethod
    def listed(cls) -> Mapping[str, "Torch"]:
        """The sets that `kdcache datasets` lists, by the names that are typed."""
        return {
            f"torch/{name},split_fraction=0.2" if kind.argument is None else f"torch/{name}": cls(
                name, split_fraction=0.2 if kind.argument is None else None
            )
            for name, kind in SETS.items()
        }

    @property
    def title(self) -> str:
        return f"torch/{self.dataset}"

    def _typed(self, **changes: Any) -> str:
        """This dataset with other options, as it is typed; they are not checked."""
        other = copy.copy(self)
        for name, value in changes.items():
            object.__setattr__(other, name, value)
        return shlex.quote(f"torch/{DATASETS.spec(other).removeprefix('torch:').removeprefix('dataset=')}")

    @property
    def description(self) -> str:
        by_hand = "" if SETS[self.dataset].fetched else "; has to be got by hand"
        return f"torchvision's {SETS[self.dataset].kind}{by_hand}"

    @property
    def short_name(self) -> str:
        """For names of folders."""
        return "-".join(filter(None, ("torch", self.dataset, self.variant)))

    @property
    def published_as(self) -> str:
        """The registered name of the same dataset, or nothing."""
        return SETS[self.dataset].published_as

    def _splits(self, split: Split) -> tuple[str | None, ...]:
        kind = SETS[self.dataset]
        if kind.argument is None:
            return (None,)
        names = (self.train or kind.train) if split == "train" else (self.test or kind.test)
        return tuple(names.split("+"))

    def open(self, data: Path, progress: Progress | None = None, *, fetch: bool = True) -> Images:
        progress = progress or Silent()
        kind, place = SETS[self.dataset], Path(self.root) if self.root else data / "torch" / self.dataset
        wanted = list(dict.fromkeys(name for split in SPLITS for name in self._splits(split)))
        made = self._find_or_fetch(place, wanted, progress, fetch)
        parts = {name: self._part(made[name], name, place, progress) for name in wanted}
        names = self._names(made, parts, place)
        split_parts = {split: [parts[name] for name in self._splits(split)] for split in SPLITS}
        self._require_apart(split_parts)
        fraction, remarks = self.split_fraction, []
        if kind.names is None:
            remarks.append("torchvision does not name its classes: they are called by their numbers")
        return MapStyle(
            names,
            split_parts,
            _state(place / kind.folder),
            remarks=remarks,
            chosen=None if fraction is None else lambda key, split: in_test_split(key, fraction) == (split == "test"),
            threads=True,
        )

    def _require_apart(self, parts: Mapping[Split, Sequence[Part]]) -> None:
        train, test = ({key for part in parts[split] for key in part.keys} for split in SPLITS)
        if self.split_fraction is None and (shared := train & test):
            raise UsageError(
                f"dataset {DATASETS.spec(self)} has {len(shared)} images in both splits, {min(shared)} among them",
                why="a figure on images that were trained on says nothing",
                fix=f"choose other splits, or leave train and test out: --dataset {self._typed(train=None, test=None)}",
            )

    def _make(self, place: Path, wanted: list[str | None], *, download: bool) -> dict[str | None, Any]:
        kind = SETS[self.dataset]
        with contextlib.redirect_stdout(sys.stderr):  # torchvision's messages are no output of the command
            return {name: kind.make(self.dataset, name, place, self.variant, download=download) for name in wanted}

    def _find_or_fetch(self, place: Path, wanted: list[str | None], progress: Progress, fetch: bool) -> dict[str | None, Any]:
        kind, why = SETS[self.dataset], "there is no such folder"
        if place.is_dir():
            try:
                return self._make(place, wanted, download=False)
            except Exception as error:
                if not _is_of_missing_files(error):
                    raise self._refused(error, place) from None
                why = f"torchvision says: {_said(error)}"
        if self.root or not kind.fetched:
            layout = place / kind.folder if kind.folder else place
            reason = why if self.root or place.is_dir() else "its owners, or their server, let torchvision download it no more"
            raise NotFoundError(
                f"dataset {self.title} is not in {place}",
                why=reason,
                fix=f"put its files into {layout}, as the documentation of torchvision.datasets.{kind.kind} has them",
            )
        if not fetch:
            typed, data = shlex.quote(DATASETS.spec(self)), shlex.quote(str(place.parents[1]))
            raise NotFoundError(
                f"dataset {self.title} is not in {place} yet",
                why=f"nothing is fetched by this command ({why})",
                fix=f"kdcache datasets --fetch {typed} --data-dir {data}",
            )
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked_if_possible(
            place.with_name(f".{place.name}.lock"),
            waiting=lambda: progress.say(f"waiting for another process to fetch {self.title}"),
        ):
            if place.is_dir():
                with suppress(Exception):  # which the download tells
                    return self._make(place, wanted, download=False)  # another process has fetched it meanwhile
            self._fetch(place, wanted, progress)
        try:
            return self._make(place, wanted, download=False)
        except Exception as error:
            raise self._refused(error, place) from None

    def _fetch(self, place: Path, wanted: list[str | None], progress: Progress) -> None:
        """Let torchvision download to `place`: what has that name is whole, as it is downloaded and unpacked beside it."""
        aside = place if place.is_dir() else place.with_name(f".{place.name}.fetching")
        if aside != place:
            _keep_packed(aside)
        progress.say(f"dataset {self.title}: torchvision downloads it to {place}")
        by_hand = f"or put its files into {place} by hand, as torchvision.datasets.{SETS[self.dataset].kind} has them"
        try:
            self._make(aside, wanted, download=True)
        except UsageError:
            raise
        except Exception as error:
            if isinstance(error, ImportError) or "pip install" in str(error):
                raise UsageError(
                    f"dataset {self.title} cannot be fetched",
                    why=f"torchvision says: {_said(error)}",
                    fix=f"install that package, and repeat the command; {by_hand}",
                ) from None
            if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS}:
                raise
            if isinstance(error, urllib.error.HTTPError) and error.code in {401, 403, 404, 410}:
                raise NotFoundError(
                    f"dataset {self.title} cannot be fetched",
                    why=f"{error.url}: HTTP {error.code}, {error.reason}",
                    fix=f"upgrade torchvision, which may know where it is now; {by_hand}",
                ) from None
            if not isinstance(error, OSError | RuntimeError | http.client.HTTPException | EOFError):
                raise self._refused(error, aside) from None
            raise RetryError(
                f"dataset {self.title} cannot be fetched",
                why=f"torchvision says: {_said(error)}",
                fix=f"repeat the command when its server can be reached: whole archives are kept; {by_hand}",
            ) from None
        if aside != place:
            aside.rename(place)

    def _refused(self, error: Exception, place: Path) -> Exception:
        """The error for what a constructor of torchvision's raises, beside missing files."""
        if isinstance(error, UsageError) or (isinstance(error, OSError) and error.errno is not None):
            return error
        if isinstance(error, ValueError) and (self.train or self.test or self.variant):
            return UsageError(
                f"dataset {DATASETS.spec(self)} is not understood",
                why=f"torchvision says: {_said(error)}",
                fix="correct train, test or variant, or leave them out: "
                f"--dataset {self._typed(train=None, test=None, variant=None)}",
            )
        kind = SETS[self.dataset]
        return IntegrityError(
            f"dataset {self.title} in {place} is damaged",
            why=f"torchvision.datasets.{kind.kind} says: {type(error).__name__}: {_said(error)}",
            fix=f"set its files aside, and repeat the command: {self._aside(place)}",
        )

    def _aside(self, place: Path) -> str:
        """The command that sets this set's files aside: then they are fetched again, or it is said where they are to be put."""
        kind = SETS[self.dataset]
        return set_aside(place / kind.folder if kind.folder else place)

    def _part(self, dataset: Any, name: str | None, place: Path, progress: Progress) -> Part:
        kind = SETS[self.dataset]
        where = f"dataset {self.title}" + (f", {name}" if name else "")
        labels, digest, _ = listed_labels(dataset, where, progress, read=kind.labels)
        files = kind.files(dataset)
        if files is None:
            return Part(dataset, labels, [f"{name or 'all'}/{i:07d}" for i in range(len(labels))], digest)
        keys = [Path(os.path.relpath(file, place)).as_posix() for file in files]
        order = sorted(range(len(keys)), key=keys.__getitem__)  # some sets are listed in the order of the file system
        return Part(_Ordered(dataset, order), [labels[i] for i in order], [keys[i] for i in order], digest)

    def _names(self, made: Mapping[str | None, Any], parts: Mapping[str | None, Part], place: Path) -> tuple[str, ...]:
        kind = SETS[self.dataset]
        named = {names_of(dataset, f"dataset {self.title}", kind.names) for dataset in made.values()} if kind.names else {None}
        if len(named) > 1:
            raise IntegrityError(
                f"dataset {self.title} has other classes for training than for testing",
                why="a class folder or a list of classes is missing in one of them",
                fix=f"set its files aside, and repeat the command: {self._aside(place)}",
            )
        (names,) = named
        last = max(max(part.labels) for part in parts.values())
        if names is not None and last >= len(names):
            raise IntegrityError(
                f"dataset {self.title} has the label {last}",
                why=f"it names {len(names)} classes",
                fix=f"set its files aside, and repeat the command: {self._aside(place)}",
            )
        return names or tuple(str(number) for number in range(last + 1))


class _Ordered:
    """A dataset in another order."""

    def __init__(self, dataset: Any, order: list[int]) -> None:
        self._dataset, self._order = dataset, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, i: int) -> Any:
        return self._dataset[self._order[i]]


def _is_of_missing_files(error: Exception) -> bool:
    """Torchvision has no exception of its own for them."""
    if isinstance(error, FileNotFoundError):
        return True
    return isinstance(error, RuntimeError) and bool(re.search("not found|not exist|not present", str(error)))


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return text.replace(" You can use download=True to download it", "").replace(" You can set download=True to download it.", "")


def _keep_packed(folder: Path) -> None:
    """Remove all but archives from an interrupted download: a folder that is there is taken for a whole one by torchvision."""
    for place, folders, files in os.walk(folder, topdown=False):
        for name in files:
            if Path(name).suffix not in _PACKED:
                Path(place, name).unlink()
        for name in folders:
            if not any(Path(place, name).iterdir()):
                shutil.rmtree(Path(place, name))
    folder.mkdir(exist_ok=True)


def _state(folder: Path) -> str:
    """A digest of the names, sizes and times of all files in a folder."""
    digest = hashlib.sha256()
    for file in _files(folder):
        status = file.stat()
        digest.update(f"{file.relative_to(folder).as_posix()} {status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "replace"))
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(place, name) for name in sorted(files) if not name.startswith("."))
