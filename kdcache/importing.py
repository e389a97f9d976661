"""Functions of the user, named `package.module:function`: they are imported from installed packages, or from the working
directory."""

import contextlib
import difflib
import importlib
import operator
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kdcache.errors import IncompatibleError, NotFoundError, UsageError

__all__ = ["first_line", "is_function_name", "load_function", "this_folder_too", "unusable"]


@contextlib.contextmanager
def this_folder_too() -> Iterator[None]:
    """Allow imports from the working directory meanwhile. Installed modules come first."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def is_function_name(name: str) -> bool:
    """Whether `name` has the form `package.module:function`, whether or not there is such a function."""
    module, _, attribute = name.partition(":")
    return all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))


def load_function(name: str, kind: str, *, forms: str, called: str, listing: str) -> Callable[..., Any]:
    """The function behind `package.module:function`, which makes a `kind` ("model").

    Errors say in which `forms` such a thing is named, which command is for `listing` names, and how the function is `called`.
    Raises UsageError for another form, NotFoundError for a missing module or function, and IncompatibleError where the import
    fails.
    """
    module_name, _, attribute = name.partition(":")
    if not is_function_name(name):
        raise UsageError(f"{kind} {name!r} is not understood", why=f"a {kind} is {forms}", fix=f"list names with: {listing}")
    try:
        with this_folder_too():
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise unusable(name, kind, f"importing {module_name}", error) from error
        raise NotFoundError(
            f"{kind} {name!r}: there is no module {error.name}",
            why="it is neither installed nor in this folder",
            fix=f"install it here, change to its folder, or correct the name; a {kind} is {forms}",
        ) from None
    except (Exception, SystemExit) as error:
        raise unusable(name, kind, f"importing {module_name}", error) from error
    try:
        function = operator.attrgetter(attribute)(module)
    except AttributeError:
        close = difflib.get_close_matches(attribute, [key for key, value in vars(module).items() if callable(value)], n=3)
        raise NotFoundError(
            f"{kind} {name!r}: {module_name} has no {attribute}",
            why=f"close to it: {', '.join(close)}" if close else "nothing in it is called so",
            fix=f"use {module_name}:{close[0]}" if close else "correct what follows the colon",
        ) from None
    if not callable(function):
        raise UsageError(
            f"{kind} {name!r}: {attribute} is a {type(function).__name__}",
            why=f"it is to be called with {called}",
            fix="name a function or a class",
        )
    return function  # type: ignore[no-any-return]


def unusable(name: str, kind: str, trouble: str, error: BaseException) -> IncompatibleError:
    """The error for a function that fails in `trouble` ("calling it with ...")."""
    return IncompatibleError(
        f"{kind} {name!r}: {trouble} fails",
        why=f"{type(error).__name__}: {first_line(error)}",
        fix=f"mend it; try it with: python -c 'from {name.partition(':')[0]} import {name.partition(':')[2].partition('.')[0]}'",
    )
