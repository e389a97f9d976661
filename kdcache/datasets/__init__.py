"""Where images come from. A source lists its samples in a fixed order; the canvas decodes them.

A source is a frozen dataclass registered under the dataset's name; opening it finds its files, or fetches them. Third parties
add theirs through the entry point group `kdcache.datasets`.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from kdcache.registry import Registry
from kdcache.system.progress import Progress

__all__ = ["DATASETS", "Counts", "Images", "Recipe", "Sample", "Source", "SourceCard", "Split", "build", "dataset", "source_card"]

Split = Literal["train", "test"]


class SourceCard(BaseModel):
    """What one split of a dataset is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    options: dict[str, str | int | float | bool | None] = {}
    split: Split
    num_samples: int = Field(ge=1)
    class_names: tuple[str, ...]
    licence: str | None  # SPDX name where there is one; None: unknown
    digest: str  # sha256 of the sample keys, labels and class names, in order; of the samples that are there
    # Keys of the images that could not be decoded and were left out. Cards without any are written as they always were.
    skipped: tuple[str, ...] = Field(default=(), exclude_if=lambda keys: not keys)


@dataclass(frozen=True)
class Sample:
    """One image: a stable key, its label, and how to get its pixels (called by the canvas, from several threads)."""

    key: str
    label: int
    load: Callable[[], Image.Image]


@dataclass(frozen=True)
class Recipe:
    """What a dataset suggests where the user says nothing."""

    policy: str  # preset of the views
    canvas: int  # side of the canvas in pixels
    teacher_epochs: int  # of finetuning; 0: published weights know the classes, and are taken as they are
    student: str
    student_epochs: int
    pretrained: bool  # whether ImageNet weights are a sensible start for a teacher
    durations: tuple[int, ...] = ()  # epochs of the teachers that the temperature study compares (its Table 1)


@dataclass(frozen=True)
class Counts:
    """How many images and classes a published dataset has; of a source that says so, as `counts`, costs are known without it."""

    train: int
    test: int
    classes: int


class Images(Protocol):
    """The samples of a dataset whose files are here."""

    def class_names(self) -> Sequence[str]: ...
    def samples(self, split: Split) -> Sequence[Sample]: ...
    def fingerprint(self) -> str: ...  # changes when the files may have changed; cheap


class Source(Protocol):
    @property
    def licence(self) -> str | None: ...
    @property
    def recipe(self) -> Recipe: ...
    def open(self, data: Path, progress: Progress | None = None, *, fetch: bool = True) -> Images:
        """Its images, whose files lie where its options say, or below the folder `data`, where they are fetched if missing.

        Raises NotFoundError, with the ways to get them, where they are not there and cannot be fetched or are not to be.
        """


DATASETS: Registry[Source] = Registry("dataset", entry_points="kdcache.datasets")
dataset = DATASETS  # its older name


def build(name: str, **options: Any) -> Source:
    """The dataset `name` with its options. Nothing is read or fetched before its images are asked for."""
    return DATASETS.build(name, **options)


def _is_place(option: object) -> bool:
    """Whether an option is a path of this machine, which says nothing elsewhere."""
    return isinstance(option, str) and (not option or Path(option).is_absolute())


def source_card(
    source: Source, names: Sequence[str], split: Split, samples: Sequence[Sample], skipped: tuple[str, ...] = ()
) -> SourceCard:
    """The card of a split that has classes of these `names` and these `samples`, and had the `skipped` ones."""
    names = tuple(names)
    digest = hashlib.sha256(json.dumps([split, names]).encode())
    for sample in samples:
        digest.update(f"{sample.label} {sample.key}\n".encode())
    described = DATASETS.to_dict(source)
    return SourceCard(
        name=described.pop("name"),
        options={key: value for key, value in described.items() if not _is_place(value)},
        split=split,
        num_samples=len(samples),
        class_names=names,
        licence=source.licence,
        digest=digest.hexdigest(),
        skipped=skipped,
    )


# They register themselves.
from kdcache.datasets import cifar as _cifar  # noqa: E402, F401
from kdcache.datasets import digits as _digits  # noqa: E402, F401
from kdcache.datasets import fine as _fine  # noqa: E402, F401
from kdcache.datasets import folder as _folder  # noqa: E402, F401
from kdcache.datasets import imagenet as _imagenet  # noqa: E402, F401
from kdcache.datasets import own as _own  # noqa: E402, F401
