"""Sources of images. A source lists its samples in a fixed order; the canvas decodes them.

A source is a frozen dataclass, registered under the dataset's name. Opening it finds its files or fetches them. Third parties
add sources through the entry point group `kdcache.datasets`.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from kdcache.registry import Registry
from kdcache.system.progress import Progress

__all__ = [
    "DATASETS",
    "SPLITS",
    "Counts",
    "Images",
    "Licence",
    "Recipe",
    "Sample",
    "Source",
    "SourceCard",
    "Split",
    "UsersOwn",
    "build",
    "dataset",
    "identity",
    "published_name",
    "resolved",
    "source_card",
]

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


class SourceCard(BaseModel):
    """Description of one split of a dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    options: dict[str, str | int | float | bool | None] = {}
    split: Split
    num_samples: int = Field(ge=1)
    class_names: tuple[str, ...]
    licence: str | None  # SPDX name where there is one; None: unknown, or stated by the user
    digest: str  # sha256 of the keys, labels and class names of the decoded samples, in order
    # Keys of images that could not be decoded and were left out. An empty list is not written, as in older cards.
    skipped: tuple[str, ...] = Field(default=(), exclude_if=lambda keys: not keys)
    # Numbers of files beside the samples that are none, by what they are. They decide on no sample; older cards have none.
    unused: dict[str, int] = Field(default={}, exclude_if=lambda counts: not counts)


@dataclass(frozen=True)
class Sample:
    """One image: a stable key, a label, and a function that opens it, which the canvas calls from several threads."""

    key: str
    label: int
    load: Callable[[], Image.Image]


@dataclass(frozen=True)
class Recipe:
    """A dataset's defaults for what the user leaves open."""

    policy: str  # preset of the views
    canvas: int  # side of the canvas in pixels
    teacher_epochs: int  # epochs of finetuning; 0: published weights know the classes and are used as they are
    student: str
    student_epochs: int
    pretrained: bool  # whether ImageNet weights are a sensible start for a teacher
    test_policy: str = "model"  # how test images are shown; none, the whole image, suits small square ones
    durations: tuple[int, ...] = ()  # teacher epochs that the temperature study compares (its Table 1)


@dataclass(frozen=True)
class Counts:
    """Numbers of images and classes of a published dataset. A source with `counts` allows cost estimates without its files."""

    train: int
    test: int
    classes: int


def _known(licence: str) -> str:
    if not licence.strip() or not licence.isprintable() or len(licence) > 100:
        raise PydanticCustomError("option", "the name of a licence", {"example": "licence=CC-BY-4.0"})
    if licence.lower() in {"unknown", "null", "none", "?"}:
        raise PydanticCustomError("option", "a licence that is known, or left out", {"example": "licence=CC-BY-4.0"})
    return licence


Licence = Annotated[str, AfterValidator(_known)]


class UsersOwn:
    """Marks a source of images whose licence nobody but the user can state, as its option `licence: Licence | None = None`.

    That is a statement about the images, which decides on none of them: canvases and digests are the same with and without it.
    """

    licence: Licence | None


class Images(Protocol):
    """The samples of a dataset whose files are on this machine.

    `unused(split)`, where there is such a method, gives the numbers of files that are no samples, by what they are.
    """

    def class_names(self) -> Sequence[str]: ...
    def samples(self, split: Split) -> Sequence[Sample]: ...
    def fingerprint(self) -> str: ...  # changes if the files may have changed; cheap to compute


class Source(Protocol):
    """A dataset. It may also have a `title` for cards, where its registered name says too little, a `short_name` for names of
    folders, a `description` in lists, and a class method `listed`, whose datasets are listed in its place. `published_as` is
    the registered name of the same dataset, whose defaults are this one's too.
    """

    @property
    def licence(self) -> str | None: ...
    @property
    def recipe(self) -> Recipe: ...
    def open(self, data: Path, progress: Progress | None = None, *, fetch: bool = True) -> Images:
        """Find the dataset's files where its options say, or below the folder `data`; missing ones are fetched to `data`.

        Raises NotFoundError, with ways to get them, if they are missing and cannot be fetched, or `fetch` is False.
        """


DATASETS: Registry[Source] = Registry("dataset", entry_points="kdcache.datasets")
dataset = DATASETS  # its older name


def build(name: str, **options: Any) -> Source:
    """The dataset `name` with its options. Nothing is read or fetched before its images are asked for."""
    return DATASETS.build(name, **options)


def published_name(source: Source) -> str:
    """The name by which papers and their recipes know a dataset: `pets` for torch/oxford_iiit_pet too."""
    return getattr(source, "published_as", "") or DATASETS.name_of(source)


def identity(source: Source) -> dict[str, Any]:
    """Name and options of a source, as far as they decide on its samples."""
    described = DATASETS.to_dict(source)
    if isinstance(source, UsersOwn):
        del described["licence"]
    return described


def resolved(place: str) -> str:
    """The one name of a file or folder: its absolute path, where `~` is the user's home."""
    with contextlib.suppress(RuntimeError):  # a user without a home
        place = str(Path(place).expanduser())
    return str(Path(place).resolve())


def _is_place(option: object) -> bool:
    """Whether an option is a path, which means nothing on other machines."""
    return isinstance(option, str) and (not option or Path(option).is_absolute())


def source_card(
    source: Source,
    names: Sequence[str],
    split: Split,
    samples: Sequence[Sample],
    skipped: tuple[str, ...] = (),
    unused: Mapping[str, int] | None = None,
) -> SourceCard:
    """The card of a split with class `names` and decoded `samples`; `skipped` ones could not be, `unused` files are none."""
    names = tuple(names)
    digest = hashlib.sha256(json.dumps([split, names]).encode())
    for sample in samples:
        digest.update(f"{sample.label} {sample.key}\n".encode())
    described = identity(source)
    name = described.pop("name")
    return SourceCard(
        name=getattr(source, "title", name),
        options={key: value for key, value in described.items() if not _is_place(value)},
        split=split,
        num_samples=len(samples),
        class_names=names,
        licence=None if isinstance(source, UsersOwn) else source.licence,
        digest=digest.hexdigest(),
        skipped=skipped,
        unused=dict(unused or {}),
    )


# These modules register the sources.
from kdcache.datasets import cifar as _cifar  # noqa: E402, F401
from kdcache.datasets import digits as _digits  # noqa: E402, F401
from kdcache.datasets import factory as _factory  # noqa: E402, F401
from kdcache.datasets import fine as _fine  # noqa: E402, F401
from kdcache.datasets import folder as _folder  # noqa: E402, F401
from kdcache.datasets import hub as _hub  # noqa: E402, F401
from kdcache.datasets import imagenet as _imagenet  # noqa: E402, F401
from kdcache.datasets import own as _own  # noqa: E402, F401
from kdcache.datasets import vision as _vision  # noqa: E402, F401
