"""The lines of the doctor's report."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from kdcache.errors import KdcacheError, printable

__all__ = ["Check", "Finding", "Line", "first_line", "gigabytes", "note", "ok", "problem", "safely"]

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """A line: `ok`; `note`, which limits what kdcache can do here or may explain something; or `problem`, with its `fix`."""

    part: str
    name: str
    state: State
    text: str
    fix: str = ""


Line = tuple[str, State, str, str]  # name, state, text, fix
Check = Callable[[], Iterator[Line]]


def ok(name: str, text: str) -> Line:
    return name, "ok", text, ""


def note(name: str, text: str, fix: str = "") -> Line:
    return name, "note", text, fix


def problem(name: str, text: str, fix: str) -> Line:
    return name, "problem", text, fix


def safely(part: str, name: str, check: Check) -> Iterator[Finding]:
    """The lines of a check. An error in it is a line, too: a broken library must not hide what the other checks find."""
    try:
        for line in check():
            yield Finding(part, *line)
    except KdcacheError as error:
        yield Finding(part, name, "problem", printable(f"{error.what}: {error.why}"), error.fix)
    except Exception as error:  # of any library, in any state
        system = isinstance(error, OSError) and error.errno is not None
        fix = (
            "see to that file or folder, and to its permissions"
            if system
            else "repair the installation; if it is sound, report this"
        )
        yield Finding(part, name, "problem", f"could not be examined: {first_line(error)}", fix)


def first_line(error: BaseException) -> str:
    """The type and the first line of an error."""
    text = next(iter(str(error).strip().splitlines()), "")
    return printable(f"{type(error).__name__}: {text}" if text else type(error).__name__)[:300]


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
