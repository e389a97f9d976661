"""What is said of a dataset's classes before long work begins: their number and names, and what looks like a mistake."""

import re
from collections.abc import Iterable, Sequence

from kdcache.datasets import DATASETS, Images, Source, UsersOwn
from kdcache.errors import KdcacheError, printable
from kdcache.system.progress import Progress

__all__ = ["doubts", "say_classes"]

_SHOWN = 5  # names at either end
_NO_CLASSES = {"train", "training", "test", "testing", "val", "valid", "validation", "images", "__macosx"}


def say_classes(
    source: Source, images: Images, progress: Progress, names: Sequence[str] | None = None, labels: Iterable[int] | None = None
) -> None:
    """Tell the number of classes, their first and last names, the images of each split, the licence, and doubts.

    `names` of the classes and `labels` of the training images are listed here unless they are known already.
    """
    names = list(images.class_names() if names is None else names)
    labels = [sample.label for sample in images.samples("train")] if labels is None else list(labels)
    try:
        test = f"{len(images.samples('test')):,} test"
    except KdcacheError as error:  # which the command may not need
        test = f"no test ({error.what})"
    label = getattr(source, "title", "") or DATASETS.spec(source)
    counts = f"{len(labels):,} train and {test} images"
    progress.say(printable(f"dataset {label}: {counts} of {len(names)} classes: {_shortened(names)}"))
    taught = set(labels)
    if untaught := [name for number, name in enumerate(names) if number not in taught]:
        progress.say(printable(f"warning: {len(untaught)} classes have no training image: {_shortened(untaught)}"))
    for text in (*doubts(names), *getattr(images, "remarks", ())):
        progress.say(printable(text))
    if isinstance(source, UsersOwn) and source.licence is None:
        spec = DATASETS.spec(source)
        progress.say(
            "its licence is unknown; results can be shared once it is stated, here or to push and export: "
            f"--dataset {spec}{',' if ':' in spec else ':'}licence=NAME"
        )


def _shortened(names: Sequence[str]) -> str:
    if len(names) <= 2 * _SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[:_SHOWN])}, ..., {', '.join(names[-_SHOWN:])}"


def doubts(names: Sequence[str]) -> list[str]:
    """What looks like a mistake in class names, a sentence each."""
    said = []
    for name in names:
        if name.strip().lower() in _NO_CLASSES:
            said.append(f"warning: a class is called {name!r}: is the root a folder too high, or too low?")
    numbers = [int(name) for name in names if re.fullmatch(r"[0-9]+", name)]
    if len(numbers) == len(names) and numbers != list(range(len(names))):
        at = next(i for i, number in enumerate(numbers) if number != i)
        said.append(
            f"warning: class names are numbers, and not those of their labels: label {at} is class {names[at]!r}"
            + (
                " (class folders are in the order of their letters, so that 10 comes before 2)"
                if numbers != sorted(numbers)
                else ""
            )
        )
    spelled: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[\s_-]+", "", name).casefold()
        if plain in spelled:
            said.append(f"warning: classes {spelled[plain]!r} and {name!r} differ by case or spaces only: are they the same?")
        spelled.setdefault(plain, name)
    return said
