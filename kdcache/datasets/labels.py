"""Labels and class names as people have them: one check for all data of users' own.

A class without training images moves every entropy of label smoothing, and a wrong number teaches another class, so that what is
doubtful is refused by name. Names that are given say that classes are meant, images or not.
"""

import itertools
import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.datasets import Split
from kdcache.errors import UsageError
from kdcache.given import as_array, in_order
from kdcache.system.documents import is_text

__all__ = [
    "NAMES_FILE",
    "classes_of",
    "composed",
    "label_numbers",
    "named_by",
    "read_names",
    "require_names",
    "require_taught",
    "same_images",
    "tested_on_training",
]

NAMES_FILE = "class_names.txt"
_SHOWN = 5  # numbers of classes in a message


def composed(name: str) -> str:
    """`name` in the one spelling (NFC) of those that look the same: systems differ in how they store an é."""
    return unicodedata.normalize("NFC", name)


def require_names(names: Sequence[Any], where: str) -> None:
    """Raise UsageError for class names that are no texts, empty, or the same as another, however they are spelled."""
    earlier: dict[str, int] = {}
    for number, name in enumerate(names):
        if not isinstance(name, str):
            raise UsageError(
                f"{where}: class {number} is called {name!r}, a {type(name).__name__}",
                why="classes are told by their names, which are texts",
                fix=f"give texts, such as {str(name)!r}" if name is not None else "give every class a name of its own",
            )
        if not name.strip() or not is_text(name):
            raise UsageError(
                f"{where}: class {number} has the name {name!a}",
                why="classes are told by their names, and those are text that UTF-8 can hold, without the character NUL",
                fix="give every class a name of its own",
            )
        if (first := earlier.setdefault(composed(name), number)) != number:
            raise UsageError(
                f"{where} has the class {name!r} twice: numbers {first} and {number}",
                why="classes are told by their names"
                if names[first] == name
                else "both names are one, spelled in two ways (NFC, NFD)",
                fix="rename one of them, or give both the same number",
            )


def read_names(file: Path) -> list[str]:
    """The class names in a file, one a line. Raises UsageError for a line without a name between others, or a name twice."""
    try:
        lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file} is no text in UTF-8", why=f"{error.reason} at byte {error.start}", fix="save it as UTF-8, one name a line"
        ) from None
    while lines and not lines[-1]:
        lines.pop()
    if "" in lines:
        raise UsageError(
            f"{file}: line {lines.index('') + 1} is empty",
            why="its lines name the classes from number 0 on, so that an empty one leaves open what the next one's number is",
            fix="write the name of that class, or take the line out",
        )
    require_names(lines, str(file))
    return lines


def classes_of(
    parts: Mapping[Split, Any], names: Sequence[str] | None, where: str, *, naming: str, by_value: bool = False
) -> tuple[dict[Split, list[int]], list[str]]:
    """Class numbers of each split's labels, and the class names, as `names` has them or as the labels do.

    Labels are whole numbers from 0 on, of any dtype, or texts: names, or else what names the classes. Texts that are all numbers
    are in the order of numbers. `naming` says how classes are named. `by_value`: numbers are values, as texts are, and no places
    in a list. Raises UsageError with the place and value of the first label that cannot be meant so.
    """
    read = {split: _plain(part, f"{where}: {split} label", by_value) for split, part in parts.items()}
    kinds = {type(value) for values in read.values() for value in values}
    if len(kinds) > 1:
        first = {
            kind: next((s, i, v) for s, values in read.items() for i, v in enumerate(values) if type(v) is kind) for kind in kinds
        }
        (split, i, value), (split_b, j, other) = sorted(first.values(), key=lambda found: isinstance(found[2], str))
        raise UsageError(
            f"{where}: {split} label {i} is the number {value}, {split_b} label {j} the text {other!r}",
            why="labels are all numbers, or all texts",
            fix="write all of them in one way",
        )
    if str in kinds or by_value:
        return _by_name(read, names, where, naming)
    if names is not None:
        require_names(names, where)
    numbered: dict[Split, list[int]] = {split: [int(value) for value in values] for split, values in read.items()}
    for split, values in numbered.items():
        _require_numbers(values, len(names) if names is not None else None, f"{where}: {split} label")
    if names is None:
        last = max(max(values) for values in numbered.values())
        require_taught(numbered["train"], last + 1, where, naming)
        return numbered, [str(number) for number in range(last + 1)]
    return numbered, list(names)


def label_numbers(labels: Any, names: Sequence[str], what: str) -> list[int]:
    """Labels as numbers: whole numbers of any dtype as they are, texts by their place in `names`. UsageError for others."""
    plain, number = _plain(labels, what, by_value=False), named_by(names)
    for i, label in enumerate(plain):
        if isinstance(label, str) and composed(label) not in number:
            raise UsageError(
                f"{what} {i} is {label!a}", why=f"it is none of the {len(names)} class names", fix="correct it, or name its class"
            )
    return [number[composed(label)] if isinstance(label, str) else label for label in plain]


def require_taught(train: Sequence[int], classes: int, where: str, naming: str) -> None:
    """Raise UsageError if one of the classes, whose number nobody but the labels says, has no training image."""
    taught = set(train)
    missing = list(itertools.islice((number for number in range(classes) if number not in taught), _SHOWN + 1))
    if not missing:
        return
    shown = ", ".join(map(str, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
    from_one = missing == [0]
    raise UsageError(
        f"{where}: labels go up to {classes - 1}, and no training image has the label {shown}",
        why="classes are numbered from 0 on"
        + (", and these seem to be from 1 on" if from_one else "")
        + "; a class without images would move the entropies of all others",
        fix=("subtract 1 from all labels" if from_one else "number the classes without gaps")
        + f"; if the gap is meant, name all {classes} classes: {naming}",
    )


def tested_on_training(where: str, why: str, fix: str) -> UsageError:
    """The error for a dataset whose test images are its training images: its images have it as `refused` (see `load_canvas`)."""
    return UsageError(
        f"{where} is to be tested on the images that it is trained on",
        why=f"{why}; a top-1 on training images says nothing of others",
        fix=f"{fix}; or, if that is meant, go on with --force",
    )


def same_images(what: str) -> str:
    """What is said where the images of both splits turn out to be the same."""
    return f"warning: {what} are the same images: a top-1 on training images says nothing of others"


def named_by(names: Sequence[str]) -> dict[str, int]:
    """Numbers of classes by name, in one spelling."""
    return {composed(name): number for number, name in enumerate(names)}


def _by_name(
    read: Mapping[Split, Sequence[Any]], names: Sequence[str] | None, where: str, naming: str
) -> tuple[dict[Split, list[int]], list[str]]:
    if names is None:
        values = {str(value) for value in read["train"]}
        plain = all(value.isascii() and value.isdigit() for value in values)
        signed = not plain and all(value.removeprefix("-").isascii() and value.removeprefix("-").isdigit() for value in values)
        names = sorted(values, key=(lambda value: (int(value), value)) if plain or signed else None)
        untaught, said = "no training image has that label", f"leave it out, or name all classes: {naming}"
    else:
        untaught, said = "it is none of the class names", f"correct it, or name all classes: {naming}"
    require_names(names, where)
    number = named_by(names)
    for split, labels in read.items():
        for i, label in enumerate(labels):
            if composed(str(label)) not in number:
                raise UsageError(f"{where}: {split} label {i} is {str(label)!a}", why=untaught, fix=said)
    return {split: [number[composed(str(label))] for label in labels] for split, labels in read.items()}, list(names)


def _require_numbers(labels: Sequence[int], classes: int | None, what: str) -> None:
    low, high = min(labels), max(labels)
    if low < 0:
        raise UsageError(
            f"{what} {labels.index(low)} is {low}",
            why="classes are numbered from 0 on; -1 often stands for a label that is kept back",
            fix="leave such images out, or take another split",
        )
    if classes is not None and high >= classes:
        from_one = low == 1 and high == classes
        raise UsageError(
            f"{what}s go from {low} to {high}, and there are {classes} class names",
            why="classes are numbered from 0 on" + (", and these seem to be from 1 on" if from_one else ""),
            fix="subtract 1 from all labels" if from_one else "name all classes, or correct the labels",
        )


def _plain(labels: Any, what: str, by_value: bool) -> list[Any]:
    """Labels as ints or texts. Raises UsageError for the first that is neither."""
    if isinstance(labels, np.ma.MaskedArray) or hasattr(labels, "detach"):
        labels = as_array(labels, f"{what}s")
    if not isinstance(labels, np.ndarray):
        labels = in_order(labels, f"{what}s")
    if isinstance(labels, np.ndarray):
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if labels.ndim != 1:
            raise UsageError(
                f"{what}s have the shape {list(labels.shape)}",
                why="an image has one label",
                fix="give the number of each image's class, [N]: labels.argmax(axis=1) if they are one-hot vectors",
            )
        if labels.dtype.kind in "iu":
            plain: list[Any] = labels.tolist()
            return plain
        labels = labels.tolist()
    return [_one(label, f"{what} {i}", by_value) for i, label in enumerate(labels)]


def _one(label: Any, what: str, by_value: bool) -> Any:
    if isinstance(label, np.generic) or (
        hasattr(label, "detach") and getattr(label, "ndim", None) == 0
    ):  # also of a list of tensors
        label = label.item()
    if isinstance(label, bytes):
        label = label.decode("utf-8", "replace")
    if isinstance(label, str):
        if not label.strip():
            raise UsageError(f"{what} is {label!r}", why="an empty text names no class", fix="write its class, or leave it out")
        return label
    if isinstance(label, bool):
        if by_value:
            return str(label)
        raise UsageError(f"{what} is {label}", why="a label is the number of a class", fix="write 0 and 1: labels.astype(int)")
    if isinstance(label, int) and abs(label) >> 63:
        raise UsageError(f"{what} is a number of {label.bit_length()} bits", why="no class has such a number", fix="correct it")
    if isinstance(label, int) or (isinstance(label, float) and math.isfinite(label) and label == int(label)):
        return int(label)
    if isinstance(label, float):
        why = "it is not a number" if math.isnan(label) else "a label is the whole number of a class"
    else:
        why = "it is missing" if label is None else f"a {type(label).__name__} is neither a number nor a text"
    shown = repr(label)[:80]
    raise UsageError(f"{what} is {shown}", why=why, fix="correct it, or leave such images out")
