"""Datasets as they are typed: a registered name with its options, a folder, `torch/NAME`, or `package.module:function`."""

import contextlib
import difflib
import importlib.util
import itertools
import os
import shlex
from pathlib import Path

from kdcache.datasets import DATASETS, Source, resolved
from kdcache.datasets.strays import Strays, folder_entries, walked
from kdcache.errors import NotFoundError, UsageError, unknown_name
from kdcache.importing import is_function_name, this_folder_too
from kdcache.system.progress import Progress, Silent

__all__ = ["find_source"]

_TESTS = ("test", "val", "validation")
_LOOKED_AT = 2000  # entries of a folder: enough to tell its layout, whatever its size


def find_source(spec: str, progress: Progress | None = None) -> Source:
    """The source that `spec` names. A folder that is clearly laid out as images in class folders is taken, and said.

    Raises NotFoundError, with close matches, for what there is not, and UsageError, which says how to name it, for other folders.
    """
    progress, typed = progress or Silent(), spec
    if spec.startswith("torch/"):
        spec = f"torch:{spec.removeprefix('torch/')}"
    name = spec.partition(":")[0]
    place = Path(resolved(typed)) if typed and "\0" not in typed else None
    is_folder, is_file = _kind(place)
    if name in DATASETS:
        if is_folder:
            progress.say(f"dataset {typed} is the registered one, not the folder of that name, which is ./{typed}")
        return DATASETS.parse(spec)
    if place and is_folder:
        return _of_folder(place, typed, progress)
    if place and is_file:
        raise _of_file(place, typed)
    if place and _looks_like_a_path(spec):
        raise _no_such_folder(place, spec)
    if is_function_name(spec.partition(",")[0]) and _is_module(name):
        return DATASETS.parse(f"factory:{spec}")
    folders = difflib.get_close_matches(spec, [each for each in _names(Path()) if Path(each).is_dir()], n=1)
    if folders and ":" not in spec:
        fix = f"use the folder ./{folders[0]}, or list what there is with: kdcache datasets"
    else:
        fix = _how_to_name(spec) or "list what there is with: kdcache datasets"
    raise unknown_name("dataset", name, DATASETS, error=NotFoundError, fix=fix)


def _kind(place: Path | None) -> tuple[bool, bool]:
    """Whether there is a folder, or a file, at a place."""
    try:
        return (place.is_dir(), place.is_file()) if place else (False, False)
    except OSError:  # a name that no file can have
        return False, False


def _is_module(name: str) -> bool:
    """Whether there is a top-level module of that name. Nothing is imported."""
    with this_folder_too(), contextlib.suppress(ImportError, ValueError):
        return importlib.util.find_spec(name.partition(".")[0]) is not None
    return False


def _how_to_name(spec: str) -> str:
    if not is_function_name(spec):
        return ""
    close = difflib.get_close_matches(spec.partition(":")[0], DATASETS, n=1, cutoff=0.6)
    if close:
        return f"use {close[0]}:{spec.partition(':')[2]}; or list what there is with: kdcache datasets"
    module = spec.partition(":")[0]
    return f"if it is a function, install {module} or change to its folder; else list what there is with: kdcache datasets"


def _looks_like_a_path(spec: str) -> bool:
    return spec.startswith(("/", "./", "../", "~")) or os.sep in spec.partition(":")[0] or spec in {".", ".."}


def _no_such_folder(place: Path, spec: str) -> NotFoundError:
    above = next((parent for parent in place.parents if parent.is_dir()), Path())
    close = difflib.get_close_matches(place.name, _names(above), n=3) if place.parent == above else []
    fix = f"use {above / close[0]}" if close else "correct the path, or list what there is by name with: kdcache datasets"
    owner, _, repository = spec.partition("/")
    if not close and owner and repository and "/" not in repository and owner[0] not in ".~":
        fix += f"; a dataset of the Hugging Face Hub is hf:{spec}"
    return NotFoundError(
        f"dataset {spec!r}: there is no such folder",
        why=f"{above} has " + (f"{', '.join(close)}" if close else f"no {place.relative_to(above)}"),
        fix=fix,
    )


def _names(folder: Path, more: int = 0) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(
                itertools.islice((entry.name for entry in entries if not entry.name.startswith(".")), _LOOKED_AT + more)
            )
    except OSError:
        return []


def _class_folders(folder: Path) -> list[str]:
    """Sub-folders that hold an image, at any depth, as far as is looked."""
    return [name for name in _names(folder) if (folder / name).is_dir() and _has_image(folder / name)]


def _number(found: list[str], folder: Path) -> str:
    """The number of class folders that were `found` in a folder, of which no more than `_LOOKED_AT` entries are looked at."""
    return f"{len(found):,}" + (" or more" if len(_names(folder, more=1)) > _LOOKED_AT else "")


def _has_image(folder: Path) -> bool:
    try:
        return any(True for _ in walked(itertools.islice(folder_entries(folder), _LOOKED_AT), Strays()))
    except OSError:  # which whoever reads the images tells
        return False


def _spec(name: str, **options: object) -> str:
    return DATASETS.spec(DATASETS.build(name, **options))


def _of_folder(place: Path, typed: str, progress: Progress) -> Source:
    """The source of images in class folders in `place`. Raises UsageError, which suggests the right one, for any other folder."""
    root, names = str(place.resolve()), _names(place)
    test = next((name for name in _TESTS if (place / name).is_dir()), None)
    if (place / "train").is_dir() and test:
        train_classes, test_classes = _class_folders(place / "train"), _class_folders(place / test)
        if len(train_classes) >= 2 and test_classes:
            source = DATASETS.build("folder", root=root)
            numbers = _number(train_classes, place / "train"), _number(test_classes, place / test)
            shown = f"{numbers[0]} class folders in train/, {numbers[1]} in {test}/"
            progress.say(f"dataset {typed} is a folder of images: {DATASETS.spec(source)} ({shown})")
            return source
    suggested, why = "", "it has no train/CLASS/*.jpg with test/CLASS/*.jpg (or val/, validation/)"
    if {"train_images.npy", "test_images.npy"} <= set(names):
        suggested, why = _spec("arrays", root=root), "it holds NumPy arrays"
    elif packed := next((name for name in names if name.endswith(".npz")), None):
        suggested, why = _spec("arrays", root=f"{root}/{packed}"), f"it holds the arrays {packed}"
    elif any(name.endswith(".tar") and name.startswith("train") for name in names):
        suggested, why = _spec("tars", root=root), "it holds tar shards"
    elif "dataset_dict.json" in names:
        why = "save_to_disk of `datasets` wrote it"
        suggested = "mymodule:make, a function that returns the rows of load_from_disk as (image, label)"
    elif any(name.endswith(".parquet") for name in (*names, *_names(place / "data"))):
        suggested, why = _spec("hf", repo=root), "it holds Parquet files, as a dataset of the Hub does"
    elif (place / "train").is_dir() and len(classes := _class_folders(place / "train")) >= 2:
        why = f"train/ has {_number(classes, place / 'train')} class folders, and there is no test/, val/ or validation/"
        suggested = _spec("folder", root=f"{root}/train", split_fraction=0.2)
    elif len(classes := _class_folders(place)) >= 2:
        why = f"it has {_number(classes, place)} class folders, and no split into train/ and test/"
        suggested = _spec("folder", root=root, split_fraction=0.2)
    raise UsageError(
        f"dataset {typed!r} is a folder", why=why, fix=f"--dataset {shlex.quote(suggested)}" if suggested else _LAYOUTS
    )


_LAYOUTS = "lay it out as ROOT/train/CLASS/*.jpg and ROOT/test/CLASS/*.jpg, or see the other forms with: kdcache datasets"


def _of_file(place: Path, typed: str) -> UsageError:
    root = str(place.resolve())
    if place.suffix == ".npz":
        fix = f"--dataset {shlex.quote(_spec('arrays', root=root))}"
    elif place.suffix == ".tar":
        fix = f"--dataset {shlex.quote(_spec('tars', root=str(place.resolve().parent)))}"
    else:
        fix = _LAYOUTS
    return UsageError(f"dataset {typed!r} is a file", why="a dataset is a name or a folder", fix=fix)
