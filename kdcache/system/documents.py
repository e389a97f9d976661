"""YAML and JSON from people, other programs and disks, read within limits.

A short text can stand for billions of values, nest deeper than a program's stack, or hold numbers and characters that cannot
be printed again. All of that is refused here, with the line it is in, before anybody walks through what the text says.
"""

import json
import re
import stat
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from kdcache.system.seals import unsealed

__all__ = [
    "NO_FILE",
    "DocumentError",
    "DoubledNameError",
    "is_text",
    "parse_json",
    "parse_yaml",
    "read_json",
    "read_record",
    "read_yaml",
]

LARGEST = 64 << 20  # bytes of a document
MOST_VALUES = 1_000_000  # of a YAML text, each alias counted as what it stands for
DEEPEST = 100  # collections, one in another
MOST_DIGITS = 400  # of a number: more than the largest float has

NO_FILE = "it is not a regular file"

_BAD_CHARACTER = re.compile("[\0\ud800-\udfff]")
_NUMBER = re.compile(r"[-+]?[0-9][0-9a-fA-FxXobB_:.]*")


class DocumentError(ValueError):
    """A document that cannot be read, or is beyond the limits; its text says why, with the line."""


class DoubledNameError(DocumentError):
    """A `name` is twice in one mapping."""

    def __init__(self, name: str, place: str = "") -> None:
        super().__init__(f"{place}{name!r} is there twice")
        self.name = name


def read_yaml(file: Path, *, limit: int = LARGEST) -> Any:
    """The value of a YAML file. Raises DocumentError, and OSError where the file cannot be read."""
    return parse_yaml(_bytes(file, limit))


def read_json(file: Path, *, limit: int = LARGEST, finite: bool = False) -> Any:
    """The value of a JSON file. Raises DocumentError, and OSError where the file cannot be read."""
    return parse_json(_bytes(file, limit), finite=finite)


def read_record(file: Path, *, limit: int = LARGEST) -> dict[str, Any]:
    """The mapping in a JSON file that kdcache wrote, checked by its seal if it has one. Raises as `read_json`."""
    data = _bytes(file, limit)
    record = parse_json(data)
    if not isinstance(record, dict):
        raise DocumentError("it holds no mapping")
    return unsealed(record, data)


def parse_json(text: str | bytes, *, finite: bool = False) -> Any:
    """The value of a JSON text; with `finite`, NaN and infinities are refused, which JSON does not have.

    Raises DocumentError for what is not JSON, a name twice in one object, and all that is beyond the limits.
    """
    decoded = _decoded(text)

    def constant(name: str) -> float:
        if finite:
            raise DocumentError(f"{name} is no number of JSON")
        return float(name)

    try:
        value = json.loads(decoded, object_pairs_hook=_once, parse_int=_integer, parse_constant=constant)
    except RecursionError:
        raise DocumentError(_TOO_DEEP) from None
    except json.JSONDecodeError as error:
        raise DocumentError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    if "\\u" in decoded or decoded.count("[") + decoded.count("{") > DEEPEST:
        _require_plain(value)
    return value


def parse_yaml(text: str | bytes) -> Any:
    """The value of a YAML text, of plain values only. Raises DocumentError as `parse_json` does; aliases count as copies."""
    import yaml

    decoded = _decoded(text)
    try:
        _require_small(yaml.parse(decoded, Loader=_loader()))
        return yaml.load(decoded, Loader=_loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise DocumentError(f"{place}{error.problem or error.context or 'not YAML'}") from None
    except yaml.YAMLError as error:
        raise DocumentError(" ".join(str(error).split())) from None
    except RecursionError:
        raise DocumentError(_TOO_DEEP) from None
    except (ValueError, OverflowError, TypeError, AttributeError, KeyError) as error:  # of values that are no dates or numbers
        raise error if isinstance(error, DocumentError) else DocumentError(" ".join(str(error).split())[:200]) from None


_TOO_DEEP = f"more than {DEEPEST} collections are nested in one another"


def _bytes(file: Path, limit: int) -> bytes:
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise DocumentError("it is a folder" if stat.S_ISDIR(found.st_mode) else NO_FILE)
    with file.open("rb") as opened:
        data = opened.read(limit + 1)
    if len(data) > limit:
        raise DocumentError(f"it has more than {limit:,} bytes")
    return data


def _decoded(text: str | bytes) -> str:
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise DocumentError(f"line {line}: it is not UTF-8 text, byte {error.start} belongs to another encoding") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DoubledNameError(twice)
    return content


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise DocumentError(f"a number has {len(digits):,} digits")
    return int(digits)


def _require_plain(value: Any) -> None:
    """Refuse texts that cannot be written again, and what is nested too deeply. Works without recursion."""
    level: list[Any] = [value]
    for depth in range(DEEPEST + 2):
        below: list[Any] = []
        for each in level:
            parts: Iterable[Any] = (each,)
            if isinstance(each, dict):
                parts = (*each.keys(), *each.values())
            elif isinstance(each, list):
                parts = each
            for part in parts:
                if isinstance(part, str):
                    _require_text(part)
                elif isinstance(part, dict | list) and part is not each:
                    below.append(part)
        if not below:
            return
        if depth > DEEPEST:
            break
        level = below
    raise DocumentError(_TOO_DEEP)


def is_text(text: str) -> bool:
    """Whether documents can hold it: it has neither NUL nor halves of a character."""
    return _BAD_CHARACTER.search(text) is None


def _require_text(text: str, place: str = "") -> None:
    if (found := _BAD_CHARACTER.search(text)) is not None:
        raise DocumentError(f"{place}it has the character U+{ord(found[0]):04X}, which is not in any text")


def _require_small(events: Iterable[Any]) -> None:
    """Count the values that YAML's events make, and refuse those that are too many, too deep or too long."""
    import yaml

    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []  # (anchor, values so far) of collections that have not ended

    def add(count: int, line: int) -> None:
        anchor, before = opened.pop() if opened else (None, 0)
        if before + count > MOST_VALUES:
            raise DocumentError(f"line {line}: it stands for more than {MOST_VALUES:,} values")
        opened.append((anchor, before + count))

    opened.append((None, 0))  # the document
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise DocumentError(f"line {line}: *{event.anchor} stands for what it is a part of, or for nothing")
            add(sizes[event.anchor], line)
        elif isinstance(event, yaml.ScalarEvent):
            _require_text(event.value, f"line {line}: ")
            if event.implicit[0] and len(event.value) > MOST_DIGITS and _NUMBER.fullmatch(event.value):
                raise DocumentError(f"line {line}: a number has {len(event.value):,} digits")
            if event.anchor:
                sizes[event.anchor] = 1
            add(1, line)
        elif isinstance(event, yaml.CollectionStartEvent):
            if len(opened) > DEEPEST:
                raise DocumentError(f"line {line}: {_TOO_DEEP}")
            sizes.pop(event.anchor or "", None)
            opened.append((event.anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, count = opened.pop()
            if anchor:
                sizes[anchor] = count
            add(count, line)


@cache
def _loader() -> Any:
    """PyYAML's loader of plain values, in C where there is one, that refuses a key twice in one mapping."""
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[Any] = set()
            for key, _ in node.value:
                name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
                if name in seen and key.tag != "tag:yaml.org,2002:merge":
                    raise DoubledNameError(str(key.value), f"line {key.start_mark.line + 1}: ")
                seen |= {name} - {None}
            return super().construct_mapping(node, deep)

    return Loader
