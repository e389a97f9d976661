"""Following the `fix:` of an error as a person would: what can be typed is typed, and the second attempt has to end well."""

import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest

from kdcache.errors import KdcacheError
from tests.sites import note, sites_of

__all__ = ["amended", "dataset_in", "fix_of", "followed", "followed_by_command", "says", "told_sites", "typed"]

T = TypeVar("T")
X = TypeVar("X")


@contextmanager
def told_sites() -> Iterator[dict[str, set[str]]]:
    """By text, the errors that are made in here, with the sites of the source that made them."""
    import sys

    made: dict[str, set[str]] = {}
    usual = KdcacheError.__init__

    def noted(error: KdcacheError, what: str, *, why: str, fix: str) -> None:
        usual(error, what, why=why, fix=fix)
        made.setdefault(str(error), set()).update(sites_of(sys._getframe(1)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KdcacheError, "__init__", noted)
        yield made


def followed(attempt: Callable[[X], T], wrong: X, mend: Callable[[str], X]) -> T:
    """What `attempt` gives for what `mend` makes of the fix of the error that it raised for `wrong`."""
    with told_sites() as made, pytest.raises(KdcacheError) as caught:
        attempt(wrong)
    result = attempt(mend(caught.value.fix))
    note(made[str(caught.value)])
    return result


def says(words: str, value: Any = None, does: Callable[[], object] | None = None) -> Callable[[str], Any]:
    """What gives `value`, once the fix has these words and `does` has done what they say."""

    def mend(fix: str) -> Any:
        assert words in fix, fix
        if does is not None:
            does()
        return value

    return mend


def followed_by_command(kdcache: Callable[..., Any], command: list[str], mend: Callable[[list[str], str], list[str]]) -> Any:
    """The outcome of a command line after what its error says was done to it: three lines first, then status 0."""
    with told_sites() as made:
        told = kdcache(*command)
    assert told.status not in {0, 1}, told
    error = told.err[told.err.index("error: ") :].strip()
    assert len(error.splitlines()) == 3, told.err
    assert not error.endswith("--help"), error  # which is of a mistake in the test itself
    mended = mend(command, error)
    result = kdcache(*mended)
    assert result.status == 0, (mended, result.err, told.err)
    note(made.get(error, set()))
    return result


def dataset_in(fix: str) -> str:
    """What a fix says to write behind --dataset."""
    return shlex.split(fix.partition("--dataset ")[2])[0].rstrip(";,")


def fix_of(told: str) -> str:
    return told.rpartition("fix: ")[2].strip()


def typed(fix: str, program: str) -> None:
    """Run the part of a fix that begins with this program of the shell."""
    found = re.search(rf"(?<![\w-]){program} .*?(?=$|; |, and | && )", fix)
    assert found, fix
    subprocess.run(found[0], shell=True, check=True)


def amended(command: list[str], told: str) -> list[str]:
    """The command as the error says that it should be.

    Folders are made and files set aside; else it is another command, or an option is left out or set, or a wrong value is
    exchanged for another.
    """
    fix = fix_of(told)
    for program in ("mkdir", "mv"):
        if re.search(rf"(?<![\w-]){program} ", fix):
            typed(fix, program)
            return command
    if fix.startswith("kdcache "):
        return shlex.split(re.split(r"; |, or ", fix)[0])[1:]
    if left := re.search(r"\bleave (--[a-z-]+) out", fix):
        place = command.index(left[1])
        valued = place + 1 < len(command) and not command[place + 1].startswith("--")
        return command[:place] + command[place + 1 + valued :]
    options = re.findall(r"(--[a-z-]+) ('[^']*'|[^\s,;)][^\s;)]*)", fix)
    if not options:
        wrong, right = re.search(r"error: .*'([^'\n]+)'", told), re.search(r"(?:use|such as) '?([^\s',]+)'?", fix)
        assert wrong, told
        assert right, told
        return [word.replace(wrong[1], right[1]) for word in command]
    for option, value in options[:1] if " or " in fix or "; or" in fix else options:
        value = shlex.split(value.rstrip(","))[0]
        if option in command:
            place = len(command) - 1 - command[::-1].index(option)  # the last one counts
            command = [*command[: place + 1], value, *command[place + 2 :]]
        else:
            command = [*command, option, value]
    return command
