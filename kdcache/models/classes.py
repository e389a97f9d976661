"""Which output of a model is which class of a dataset: matched by name or WordNet id, or as a file says. Needs no torch.

A name is matched in this order, and only where exactly one output fits:

1. the output's name, letter by letter;
2. a WordNet id, which may be followed by words (`n02085620-Chihuahua`);
3. the output's name, its description, or one of the synonyms in that, whatever the case, spaces and punctuation
   (`great_white_shark`). If several outputs fit, the one is taken that has the word as its whole name, provided that other
   classes of the dataset take the rest.

ImageNet's ids and synonyms are timm's (`timm.data.ImageNetInfo`, WordNet 3.0), which is imported when they are asked for.
"""

import difflib
import hashlib
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Self

from kdcache.errors import KdcacheError, NotFoundError, UsageError
from kdcache.models.names import timm_with_zoo
from kdcache.system.documents import DocumentError, DoubledNameError, parse_json
from kdcache.system.files import lacking

__all__ = [
    "WNID",
    "ClassMap",
    "Match",
    "Outputs",
    "Stated",
    "imagenet",
    "labelled",
    "listed",
    "match",
    "read_classes",
    "said_digest",
]

WNID = re.compile(r"(n\d{8})(?:[\s_.,:;-]+(.*))?", re.DOTALL)
BACKGROUND = "background"
SHOWN = 3  # pairs at the beginning of a mapping
LISTS = ("imagenet-1k", "imagenet-12k", "imagenet-21k-miil", "imagenet-22k", "imagenet-22k-ms", "imagenet-21k-goog")
SAME = "dataset"


@dataclass(frozen=True)
class Outputs:
    """What the outputs of a model are called: for each its name, and a description, synonyms with commas between, or ""."""

    names: tuple[str, ...]
    described: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def description(self, output: int) -> str:
        return self.described[output] if self.described else ""

    def called(self, output: int) -> str:
        """An output for people: `n01440764 tench`."""
        first = self.description(output).partition(",")[0]
        return f"{self.names[output]} {first}" if first and first != self.names[output] else self.names[output]


@cache
def imagenet(kind: int | str) -> Outputs | None:
    """ImageNet's classes as timm orders them, of a subset's name or a number of outputs; None where there is no such subset.

    1001 outputs are TensorFlow's: background, then the 1000 classes.
    """
    data = timm_with_zoo().data
    if kind == 1001:
        thousand = imagenet(1000)
        assert thousand is not None
        return Outputs((BACKGROUND, *thousand.names), ("", *thousand.described))
    subset = data.infer_imagenet_subset({"num_classes": kind}) if isinstance(kind, int) else kind
    if subset is None:
        return None
    info = data.ImageNetInfo(subset)
    return Outputs(tuple(info.label_names()), tuple(info.label_descriptions()))


@cache
def _synonyms() -> Mapping[str, str]:
    """The description of every synset that timm knows, by WordNet id."""
    described: dict[str, str] = {}
    for name in LISTS:
        if (known := imagenet(name)) is not None:
            described.update(zip(known.names, known.described, strict=True))
    return described


def spoken(name: str) -> str:
    """The name of a class in plain words: `tench` of n01440764, `great white shark` of great_white_shark."""
    wnid, words = _parts(name)
    if WNID.fullmatch(name):
        name = (words or _synonyms().get(wnid, wnid)).partition(",")[0]
    return " ".join(name.replace("_", " ").split())


@cache
def _meanings() -> Mapping[str, frozenset[str]]:
    """The synsets that a word may mean."""
    synsets: dict[str, set[str]] = defaultdict(set)
    for wnid, described in _synonyms().items():
        for word in described.split(", "):
            synsets[_key(word)].add(wnid)
    return {word: frozenset(ids) for word, ids in synsets.items()}


def labelled(labels: Sequence[str], described: Sequence[str] = ()) -> Outputs:
    """Outputs by the labels in a model's configuration.

    Labels that agree with those of ImageNet at every place, as ids or in words, are ImageNet's classes, known by their ids.
    """
    labels = tuple(map(str, labels))
    if any(map(WNID.fullmatch, labels)):
        parts = [_parts(label) for label in labels]
        return Outputs(tuple(name for name, _ in parts), tuple(words or _synonyms().get(name, "") for name, words in parts))
    known = imagenet(len(labels))
    if known is not None and all(_agree(*pair) for pair in zip(labels, known.names, known.described, strict=True)):
        return Outputs(known.names, labels)
    return Outputs(labels, tuple(map(str, described)) if len(described) == len(labels) else ())


def _agree(label: str, name: str, described: str) -> bool:
    words = {_key(word) for word in (name, *described.split(", "))}
    return _key(label) == _key(described) or any(_key(word) in words for word in label.split(","))


def _parts(label: str) -> tuple[str, str]:
    """(name, description) of a label: `n01440764 tench, Tinca tinca` has both."""
    found = WNID.fullmatch(label)
    return (found[1], (found[2] or "").strip()) if found else (label, "")


def _key(word: str) -> str:
    """A word without case, spaces and punctuation."""
    plain = word if word.isascii() else unicodedata.normalize("NFKC", word)
    return re.sub(r"[\W_]", "", plain.casefold())


# ---------------------------------------------------------------- matching


@dataclass(frozen=True)
class Match:
    """What matching came to: the output of each class and how it was recognised, and the classes where that is not certain."""

    outputs: Mapping[str, int]
    by: Mapping[str, str]
    missing: tuple[str, ...]
    ambiguous: Mapping[str, tuple[int, ...]]
    doubled: tuple[tuple[str, str], ...]  # classes with the same output

    @property
    def certain(self) -> bool:
        return not (self.missing or self.ambiguous or self.doubled)


def match(names: Sequence[str], outputs: Outputs, chosen: Mapping[str, int] | None = None) -> Match:
    """Match the classes of a dataset to outputs. `chosen` are those that the user chose."""
    index, found, by = _index(outputs), dict(chosen or {}), dict.fromkeys(chosen or {}, "--classes")
    open_: dict[str, tuple[int, ...]] = {}
    for name in names:
        if name not in found:
            how, fitting = index.fitting(name)
            if len(fitting) == 1:
                found[name], by[name] = fitting[0], how
            else:
                open_[name] = fitting
    taken = set(found.values())
    for name, fitting in list(open_.items()):
        whole = [output for output in fitting if output in index.whole.get(_key(name), ())]
        if len(whole) == 1 and whole[0] not in taken and taken.issuperset({*fitting} - {*whole}):
            found[name], by[name] = whole[0], "name"
            del open_[name]
    first: dict[int, str] = {}
    doubled = [(first[output], name) for name, output in found.items() if first.setdefault(output, name) != name]
    return Match(
        {name: found[name] for name in names if name in found},
        by,
        tuple(name for name, fitting in open_.items() if not fitting),
        {name: fitting for name, fitting in open_.items() if fitting},
        tuple(doubled),
    )


class _Index:
    """Outputs by name, and by the words that may mean them."""

    def __init__(self, outputs: Outputs) -> None:
        self.exact: dict[str, list[int]] = defaultdict(list)
        self.whole: dict[str, list[int]] = defaultdict(list)
        self.words: dict[str, list[int]] = defaultdict(list)
        for output, name in enumerate(outputs.names):
            described = outputs.description(output)
            self.exact[name].append(output)
            for key in {_key(name), _key(described)} - {""}:
                self.whole[key].append(output)
            for key in {_key(name), _key(described), *map(_key, described.split(","))} - {""}:
                self.words[key].append(output)

    def fitting(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(how, outputs) that `name` may mean."""
        identified = WNID.fullmatch(name)
        if name in self.exact:
            return "WordNet id" if identified else "name", tuple(self.exact[name])
        if identified:
            return "WordNet id", tuple(self.exact.get(identified[1], ()))
        return "name", tuple(self.words.get(_key(name), ()))


_index = lru_cache(maxsize=4)(_Index)


# ---------------------------------------------------------------- the mapping


@dataclass(frozen=True)
class ClassMap:
    """The output of a model for each class of a dataset."""

    names: tuple[str, ...]  # the dataset's, in its order
    outputs: tuple[int, ...]
    num_outputs: int
    called: tuple[str, ...] = ()  # the model's names of these outputs, as far as it has any
    by: Mapping[str, str] = field(default_factory=dict)  # how each class was recognised; nothing for their mere order

    @classmethod
    def in_order(cls, names: Sequence[str], known: Outputs | None = None) -> Self:
        """Class i is output i."""
        called = tuple(map(known.called, range(len(known)))) if known else ()
        return cls(tuple(names), tuple(range(len(names))), len(names), called)

    @classmethod
    def of(cls, names: Sequence[str], found: Match, known: Outputs | None, num_outputs: int) -> Self:
        outputs = tuple(found.outputs[name] for name in names)
        called = tuple(map(known.called, outputs)) if known else ()
        return cls(tuple(names), outputs, num_outputs, called, found.by)

    @property
    def whole(self) -> bool:
        """Whether the model is used as it is, all of its outputs in their own order."""
        return self.outputs == tuple(range(self.num_outputs))

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.num_outputs, self.outputs]).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """The mapping as teacher.json has it."""
        by = [self.by.get(name, "order") for name in self.names]
        return {"num_outputs": self.num_outputs, "outputs": list(self.outputs), "called": list(self.called), "by": by}

    @classmethod
    def recorded(cls, names: Sequence[str], record: Mapping[str, Any]) -> Self:
        by = dict(zip(names, record["by"], strict=True))
        return cls(tuple(names), tuple(record["outputs"]), record["num_outputs"], tuple(record["called"]), by)

    def lines(self) -> list[str]:
        """The mapping for people: how many classes were recognised and how, then the first of them and the last."""
        ways = [self.by.get(name, "order") for name in self.names]
        counted = ", ".join(f"{ways.count(way)} by {way}" for way in dict.fromkeys(ways))
        unused = self.num_outputs - len(self.outputs)
        lines = [f"classes: {len(self.names)} of {self.num_outputs} outputs, {counted}; {unused} outputs are not used"]
        lines += [f"  {self._pair(i)}" for i in range(min(SHOWN, len(self.names)))]
        if len(self.names) > SHOWN + 1:
            lines.append("  ...")
        if len(self.names) > SHOWN:
            lines.append(f"  {self._pair(len(self.names) - 1)}")
        if several := self._of_several_meanings():
            shown = ", ".join(self._pair(i) for i in several[:SHOWN]) + (", ..." if len(several) > SHOWN else "")
            lines.append(f"  {len(several)} taken by a name that has other meanings too: {shown}")
        return lines

    def _pair(self, i: int) -> str:
        name, called = self.names[i], self.called[i] if self.called else ""
        identified, _, word = called.partition(" ")
        shown = f"{name} {word}" if name == identified and word else name
        return f"{shown} -> output {self.outputs[i]}" + (f" ({called})" if called not in {"", shown, name} else "")

    def _of_several_meanings(self) -> list[int]:
        """Classes that were recognised by a word which may mean something else than their output."""
        by_word = [i for i, name in enumerate(self.names) if self.by.get(name) == "name" and self.called]
        by_word = [i for i in by_word if WNID.fullmatch(self.called[i])]
        return [i for i in by_word if len(_meanings().get(_key(self.names[i]), ())) > 1]


# ---------------------------------------------------------------- what the user says


@dataclass(frozen=True)
class Stated:
    """What `--classes` says: what the outputs are called, or for some classes of the dataset which output they are."""

    outputs: Outputs | None = None
    chosen: Mapping[str, int | str] = field(default_factory=dict)
    in_order: bool = False  # output i is the dataset's class i

    def resolved(self, known: Outputs | None, num_outputs: int, file: Path) -> dict[str, int]:
        """The output of each class that was chosen."""
        return {name: self._output(name, choice, known, num_outputs, file) for name, choice in self.chosen.items()}

    def _output(self, name: str, choice: int | str, known: Outputs | None, num_outputs: int, file: Path) -> int:
        if isinstance(choice, int):
            if 0 <= choice < num_outputs:
                return choice
            raise UsageError(
                f"--classes {file}: {name!r} is output {choice}",
                why=f"the model has {num_outputs} outputs, numbered from 0",
                fix=f"give a number from 0 to {num_outputs - 1}",
            )
        if known is None:
            raise UsageError(
                f"--classes {file}: {name!r} is {choice!r}",
                why="the model does not say what its outputs are called",
                fix=f"give the number of the output, from 0 to {num_outputs - 1}",
            )
        _, fitting = _index(known).fitting(choice)
        if len(fitting) == 1:
            return fitting[0]
        if not fitting:
            words = {word for i, own in enumerate(known.names) for word in (own, known.description(i).partition(",")[0])}
            raise _unknown(f"--classes {file}: {name!r} is {choice!r}", "no output is called so", choice, words)
        raise UsageError(
            f"--classes {file}: {name!r} is {choice!r}",
            why=f"{len(fitting)} outputs are called so: {listed(known, fitting)}",
            fix=f"give its number, such as {fitting[0]}, or its id",
        )


def _unknown(what: str, why: str, name: str, known: Iterable[str]) -> UsageError:
    close = difflib.get_close_matches(name[:200], sorted(known), n=3)
    if close:
        return UsageError(what, why=f"{why}; close to it: {', '.join(close)}", fix=f"use {close[0]!r}")
    return UsageError(what, why=why, fix="correct the name")


def listed(known: Outputs, outputs: Iterable[int]) -> str:
    """Outputs with what they are called, as text."""
    return ", ".join(f"{output} ({called})" if (called := known.called(output)) else str(output) for output in outputs)


def said_digest(file: Path) -> str:
    """sha256 of what `--classes` says: the file, or the name of a list. Raises NotFoundError."""
    if file.is_file():
        return hashlib.sha256(file.read_bytes()).hexdigest()
    if str(file) in {SAME, *LISTS}:
        return hashlib.sha256(str(file).encode()).hexdigest()
    raise NotFoundError(
        f"--classes {file} {lacking(file)}",
        why="it is to be a file, or the name of a list",
        fix=f"correct the path, or name a list: {', '.join(LISTS)}, or {SAME} for the dataset's own order",
    )


def read_classes(file: Path, names: Sequence[str]) -> Stated:
    """Read `--classes`, for a dataset with classes `names`.

    - A text file has the name of an output in each line, in order: a WordNet id, words, or both (`n01440764 tench`).
    - A JSON list likewise; or an object by number, as `id2label` in models' configurations.
    - A JSON object by classes of the dataset has the number or name of each one's output. Classes that it lacks are matched
      by name.
    - The name of a list that timm knows (imagenet-1k, imagenet-22k, ...), or `dataset`: output i is the dataset's class i.

    Raises NotFoundError or UsageError.
    """
    said_digest(file)  # raises where there is none
    if not file.is_file():
        return Stated(in_order=True) if str(file) == SAME else Stated(imagenet(str(file)))
    try:
        text = file.read_bytes().decode("utf-8-sig")
        content = parse_json(text, finite=True) if text.lstrip()[:1] in {"{", "["} else None
    except OSError as error:
        raise _wrong(file, "cannot be read", error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        raise _wrong(file, "is not UTF-8 text", f"byte {error.start} belongs to another encoding") from None
    except DoubledNameError as error:
        raise _wrong(file, f"has {error.name!r} twice", "a class has one output") from None
    except DocumentError as error:
        raise _wrong(file, "is not JSON, with which it begins", str(error).splitlines()[0]) from None
    if content is None:
        return Stated(_in_lines(file, text.splitlines()))
    if isinstance(content, list):
        return Stated(_in_lines(file, [_label(file, label) for label in content]))
    return _by_key(file, content, names)


def _wrong(file: Path, what: str, why: str) -> KdcacheError:
    return UsageError(
        f"--classes {file} {what}",
        why=why,
        fix='write the name of an output in each line, or JSON: {"class of the dataset": number or name of the output}',
    )


def _label(file: Path, label: Any) -> str:
    """A label; of a list, as imagenet_class_index.json has them, its parts."""
    if isinstance(label, list) and label and all(isinstance(part, str) for part in label):
        label = " ".join(label)
    if not isinstance(label, str):
        raise _wrong(file, f"has {json.dumps(label)[:100]} for an output's name", "a name is text")
    return label


def _in_lines(file: Path, lines: Sequence[str]) -> Outputs:
    lines = [line.strip() for line in lines]
    for number, line in enumerate(lines, start=1):
        if not line:
            raise _wrong(file, f"has no name in line {number} of {len(lines)}", "every output has a name")
    if not lines:
        raise _wrong(file, "is empty", "every output has a name")
    return labelled(lines)


def _by_key(file: Path, content: dict[str, Any], names: Sequence[str]) -> Stated:
    numbers = [str(number) for number in range(len(content))]
    if content and not content.keys() <= set(names) and content.keys() == set(numbers):
        return Stated(_in_lines(file, [_label(file, content[number]) for number in numbers]))
    if content.keys().isdisjoint(names) and content and all(re.fullmatch(r"\d+", key) for key in content):
        raise _wrong(
            file, f"names {len(content)} outputs by number, but not those from 0 to {len(content) - 1}", "one is missing"
        )
    for name, choice in content.items():
        if name not in names:
            raise _unknown(f"--classes {file} has the class {name!r}", "the dataset has none of that name", name, names)
        if isinstance(choice, bool) or not isinstance(choice, int | str):
            raise _wrong(file, f"has {json.dumps(choice)[:100]} for {name!r}", "an output is a number or a name")
    return Stated(chosen=content)
