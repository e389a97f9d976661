"""What is said of a dataset's classes before long work begins: their number and names, and what looks like a mistake."""

import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kdcache.datasets import DATASETS, Images, Source, UsersOwn
from kdcache.errors import KdcacheError, printable
from kdcache.system.progress import Progress

__all__ = ["doubts", "first_differing_class", "how_classes_differ", "how_samples_differ", "say_classes"]

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


@dataclass(frozen=True)
class Differing:
    """The first class in which two lists of names differ; `a` or `b` is None where a list has ended."""

    number: int
    a: str | None
    b: str | None
    kind: str  # of the difference, in words


def first_differing_class(a: Sequence[str], b: Sequence[str]) -> Differing | None:
    pairs = enumerate(itertools.zip_longest(a, b))
    number, (x, y) = next(((number, pair) for number, pair in pairs if pair[0] != pair[1]), (0, (None, None)))
    if x is y is None:
        return None
    if x and y and unicodedata.normalize("NFC", x) == unicodedata.normalize("NFC", y):
        return Differing(number, x, y, f"the same letters in other Unicode characters: {x!a} and {y!a}")
    return Differing(number, x, y, "the same names in another order" if sorted(a) == sorted(b) else "other names")


def how_classes_differ(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """The first difference of two lists of class names, in a line; empty if there is none."""
    if (first := first_differing_class(theirs, ours)) is None:
        return ""
    a, b = ("none" if name is None else repr(name) for name in (first.a, first.b))
    counts = "" if len(theirs) == len(ours) else f"{len(theirs)} classes there, {len(ours)} here; "
    return f"{counts}class {first.number} is {a} there, {b} here ({first.kind})"


def how_samples_differ(
    theirs: tuple[Sequence[str], Sequence[int]], ours: tuple[Sequence[str], Sequence[int]], names: Sequence[str]
) -> str:
    """Which samples were added, removed and relabelled, in a line; empty if none was.

    theirs, ours: the keys and labels of a split, then and now.
    names: of the classes.
    """
    then, now = (dict(zip(*split, strict=True)) for split in (theirs, ours))
    kinds = {
        "added": [key for key in now if key not in then],
        "removed": [key for key in then if key not in now],
        "relabelled": [
            f"{key} (from {names[then[key]]!r} to {names[now[key]]!r})" for key in now if then.get(key, now[key]) != now[key]
        ],
    }
    said = [
        f"{len(keys)} {kind}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}" for kind, keys in kinds.items() if keys
    ]
    return "; ".join(said) or ("" if list(then) == list(now) else "the same samples in another order")


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
