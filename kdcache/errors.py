"""Every error that kdcache raises on purpose.

    KdcacheError            1   never raised itself
    ├── UsageError          2   an option or argument is wrong: change the call
    ├── NotFoundError       3   a dataset, model, archive or file is not there: get it, or correct its name
    ├── IntegrityError      4   stored bytes are not what their record says: restore or rebuild them
    ├── IncompatibleError   5   two sound things do not fit together (classes, policy, format version)
    ├── IncompleteError     6   an archive is not finished: run its dump again
    └── RetryError         75   the machine was in the way (disk, limits, network): mend what it says, then repeat the command

The number is the exit status of the command line. Each error says what happened (with the offending value), why, and
how to mend it; `str(error)` is those three lines, ready to be printed.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "IncompatibleError",
    "IncompleteError",
    "IntegrityError",
    "KdcacheError",
    "NotFoundError",
    "RetryError",
    "UsageError",
    "how_to_write",
    "printable",
    "unknown_name",
]


_LINE = 4000  # longest line of a message, in characters


class KdcacheError(Exception):
    """Base of all: `what` happened, `why`, and the `fix` (a command to paste, where there is one)."""

    exit_code = 1

    def __init__(self, what: str, *, why: str, fix: str) -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return f"error: {printable(self.what)}\nwhy: {printable(self.why)}\nfix: {printable(self.fix)}"

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders, and default pickling loses keyword-only arguments.
        return (_rebuild, (type(self), self.what, self.why, self.fix))


class UsageError(KdcacheError):
    exit_code = 2


class NotFoundError(KdcacheError):
    exit_code = 3


class IntegrityError(KdcacheError):
    exit_code = 4


class IncompatibleError(KdcacheError):
    exit_code = 5


class IncompleteError(KdcacheError):
    exit_code = 6


class RetryError(KdcacheError):
    exit_code = 75


def _rebuild(kind: type[KdcacheError], what: str, why: str, fix: str) -> KdcacheError:
    return kind(what, why=why, fix=fix)


def printable(text: object) -> str:
    """`text` on one line, at most 4000 characters, without control characters: texts in archives come from strangers."""
    shown = str(text)
    shown = shown if len(shown) <= _LINE else f"{shown[:_LINE]}..."
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in shown)


def unknown_name(
    kind: str, name: str, known: Iterable[str], *, error: type[KdcacheError] = UsageError, fix: str = ""
) -> KdcacheError:
    """The error for an unknown name; it offers the closest known names."""
    names, name = sorted(known), name[:200]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    shown = ", ".join(close or names[:20]) + (", ..." if not close and len(names) > 20 else "")
    why = f"there is no {kind} of that name"
    if close:
        return error(f"unknown {kind} {name!r}", why=f"{why}; close to it: {shown}", fix=fix or f"use {close[0]!r}")
    return error(f"unknown {kind} {name!r}", why=f"{why}; known: {shown}" if fix else why, fix=fix or f"choose one of: {shown}")


# Advice by prefix of pydantic's error types.
_WRITTEN = {
    "literal_error": "use {expected}",
    "union_tag_invalid": "use one of {expected_tags}",
    "greater_than_equal": "give a number that is at least {ge:g}",
    "greater_than": "give a number above {gt:g}",
    "less_than_equal": "give a number that is at most {le:g}",
    "less_than": "give a number below {lt:g}",
    "finite_number": "give a finite number, such as 0.5",
    "int_": "give a whole number, such as 3",
    "float_": "give a number, such as 0.5",
    "bool_": "give true or false",
    "string_pattern": "write what {pattern} matches",
    "string_type": "give a text",
    "byte_size": "give bytes, such as 17 GB",
    "too_short": "give at least {min_length}",
    "list_type": "give a list, such as [a, b]",
    "tuple_type": "give a list, such as [a, b]",
    "option": "write for example {example}",
}


def how_to_write(errors: Iterable[Mapping[str, Any]]) -> str:
    """Advice on the values that pydantic refused, from `ValidationError.errors()`."""
    fixes = [
        next((text.format_map(error.get("ctx", {})) for kind, text in _WRITTEN.items() if error["type"].startswith(kind)), None)
        for error in errors
    ]
    return ", or ".join(dict.fromkeys(fix for fix in fixes if fix)) or "correct that value"
