"""Datasets that a function of the user returns: `package.module:function`."""

import hashlib
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.datasets import DATASETS, SPLITS, Images, Licence, Recipe, Split, UsersOwn
from kdcache.datasets.labels import require_taught, same_images
from kdcache.datasets.mapstyle import MapStyle, Part, image_files, listed_labels, names_of, require_map_style
from kdcache.datasets.transforms import datasets_inside
from kdcache.errors import KdcacheError, UsageError
from kdcache.importing import first_line, is_function_name, load_function, this_folder_too, unusable
from kdcache.system.progress import Progress, Silent

__all__ = ["Factory"]

_FORMS = "a registered name, a folder of images, torch/NAME or package.module:function"


@DATASETS.register("factory")
@dataclass(frozen=True)
class Factory(UsersOwn):
    """Whatever map-style dataset a function returns: `package.module:function`, or `factory:package.module:function`.

    The function is called with split="train" and with split="test", and returns an object with `__len__` and `__getitem__`, whose
    items are (image, label): a PIL image, or uint8 pixels [H, W], [H, W, 3] or [3, H, W] of an array or tensor, and the number of
    a class. It is imported from where it is installed, or from the working directory; where its module has the name of a
    registered dataset, only the second form names it. Items are read one after another, not by several threads.

    Attributes of the object that are read: `classes` (names), `targets` or `labels` (else all items are read once to list the
    labels), `version`. Transforms are refused. A canvas is built anew when labels, names, `version`, the source file of the
    function or of the dataset, files in `samples`, or one of the 16 images that are looked at have changed. A change of other
    images shows in none of these: raise `version` with it.
    """

    function: str = ""
    licence: Licence | None = None

    recipe = Recipe(policy="imagenet", canvas=256, teacher_epochs=20, student="rn18", student_epochs=100, pretrained=True)

    def __post_init__(self) -> None:
        if not is_function_name(self.function):
            raise UsageError(
                f"dataset factory:{self.function} names no function",
                why="it is package.module:function, which is called with split='train' and split='test'",
                fix="--dataset mymodule:make",
            )

    @property
    def short_name(self) -> str:
        """For names of folders."""
        return re.sub(r"[^\w.+-]", "-", f"factory-{self.function}")

    def open(self, data: Path, progress: Progress | None = None, *, fetch: bool = True) -> Images:
        make = load_function(
            self.function,
            "dataset",
            forms=_FORMS,
            called="split='train' and split='test', and to return a map-style dataset",
            listing="kdcache datasets",
        )
        made = {split: self._made(make, split) for split in SPLITS}
        progress, parts, remarks = progress or Silent(), {}, []
        for split, dataset in made.items():
            labels, digest, by_reading = listed_labels(dataset, self._where(split), progress, twice=True)
            parts[split] = [Part(dataset, labels, [f"{split}/{i:07d}" for i in range(len(labels))], digest)]
            if by_reading:
                remarks.append(
                    f"all {len(labels)} {split} images were read to list their labels: give the dataset an attribute "
                    "`targets` with them to spare that"
                )
        (train,), (test,) = parts["train"], parts["test"]
        if (train.digest, train.labels) == (test.digest, test.labels) and len(set(train.labels)) > 1:
            remarks.append(same_images("split='train' and split='test'"))
        names = self._names(made, max(max(part.labels) for (part,) in parts.values()))
        if names[1]:
            naming = "an attribute `classes` of the dataset"
            require_taught(train.labels, len(names[0]), f"dataset {self.function}", naming)
        if names[1]:
            remarks.append("classes are called by their numbers: give the dataset an attribute `classes` to name them")
        versions = [str(getattr(dataset, "version", "")) for dataset in made.values()]
        return MapStyle(names[0], parts, f"{versions} {_sources(make, made.values())}", remarks=remarks, threads=False)

    def _where(self, split: Split) -> str:
        return f"dataset {self.function}, {split} split"

    def _made(self, make: Any, split: Split) -> Any:
        try:
            inspect.signature(make).bind(split=split)
        except TypeError as error:
            raise UsageError(
                f"dataset {self.function} cannot be called with split={split!r}",
                why=first_line(error),
                fix=f"give it that parameter: def {self.function.rpartition(':')[2]}(split): ...",
            ) from None
        except ValueError:  # a function in C has no signature
            pass
        try:
            with this_folder_too():
                dataset = make(split=split)
        except KdcacheError:
            raise
        except (Exception, SystemExit) as error:
            raise unusable(self.function, "dataset", f"calling it with split={split!r}", error) from error
        require_map_style(dataset, self._where(split))
        return dataset

    def _names(self, made: dict[Split, Any], last: int) -> tuple[Sequence[str], bool]:
        """Class names, and whether they are numbers for want of names."""
        train, test = (names_of(made[split], self._where(split)) for split in SPLITS)
        if train is not None and test is not None and train != test:
            first = next((pair for pair in zip(train, test, strict=False) if pair[0] != pair[1]), (len(train), len(test)))
            raise UsageError(
                f"dataset {self.function} names other classes for training than for testing: {first[0]!r} and {first[1]!r}",
                why="both splits number the same classes",
                fix="give both datasets the same `classes`",
            )
        names = train or test
        if names is None:
            return [str(number) for number in range(last + 1)], True
        if last >= len(names):
            raise UsageError(
                f"dataset {self.function} has the label {last}",
                why=f"its `classes` name {len(names)}, numbered from 0 on",
                fix="name them all, or correct the labels",
            )
        return names, False


def _sources(make: Any, made: Any) -> str:
    """A digest of the source files of a function and of the classes of what it made, and of the image files that these list."""
    digest = hashlib.sha256()
    modules = {getattr(inspect.unwrap(make), "__module__", None)}
    for dataset in made:
        for each in datasets_inside(dataset):
            modules.add(type(each).__module__)
            for name in image_files(each) or () if hasattr(each, "__len__") else ():
                file = Path(name)
                if file.is_file():
                    status = file.stat()
                    digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "replace"))
    for module in sorted(filter(None, modules)):
        source = getattr(sys.modules.get(module), "__file__", None)
        if source and Path(source).is_file():
            digest.update(f"{module} {hashlib.sha256(Path(source).read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
