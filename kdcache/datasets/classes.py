"""What is said of a data set's classes before long work begins: their number and names, and what looks like a mistake."""

import re
from collections.abc import Sequence

from kdcache.datasets import DATASETS, SPLITS, Images, Source, UsersOwn
from kdcache.errors import KdcacheError, printable
from kdcache.system.progress import Progress

__all__ = ["doubts", "say_classes"]

_SHOWN = 5  # names at either end
_NO_CLASSES = {"train", "training", "test", "testing", "val", "valid", "validation", "images", "__macosx"}


def say_classes(source: Source, images: Images, progress: Progress) -> None:
    """Tell the number of classes, their first and last names, the images of each split, the licence, and doubts."""
    names, counts = list(images.class_names()), {}
    labels: set[int] = set()
    for split in SPLITS:
        try:
            samples = images.samples(split)
            counts[split] = f"{len(samples):,} {split}"
            if split == "train":
                labels = {sample.label for sample in samples}
        except KdcacheError as error:  # of a split that the command may not need
            if split == "train":
                raise
            counts[split] = f"no {split} ({error.what})"
    label = getattr(source, "title", "") or DATASETS.spec(source)
    progress.say(
        printable(f"dataset {label}: {' and '.join(counts.values())} images of {len(names)} classes: {_shortened(names)}")
    )
    if untaught := [name for label, name in enumerate(names) if label not in labels]:
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
            f"warning: class names are numbers, and not those of their labels: label {at} is class {names[at]!r} "
            "(class folders are in the order of their letters, so that 10 comes before 2)"
        )
    spelled: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[\s_-]+", "", name).casefold()
        if plain in spelled:
            said.append(f"warning: classes {spelled[plain]!r} and {name!r} differ by case or spaces only: are they the same?")
        spelled.setdefault(plain, name)
    return said
