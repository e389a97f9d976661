"""The command line: parses, calls, prints. Modules that need torch are imported inside the commands that use them."""

import codecs
import errno
import io
import os
import select
import shlex
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from kdcache.errors import KdcacheError, NotFoundError, RetryError, UsageError
from kdcache.system.interrupts import obey_like_ctrl_c

__all__ = ["main", "run"]

INTERRUPTED = 130


def main(argv: list[str] | None = None) -> None:
    """Entry point of `kdcache`: runs a command and exits with its documented status."""
    obey_like_ctrl_c()  # what ends jobs on clusters is an interruption
    warnings.formatwarning = _shown(warnings.formatwarning)
    status = run(sys.argv[1:] if argv is None else argv)
    if _unread():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python itself complains about what is still buffered
    sys.exit(status)


def run(argv: list[str]) -> int:
    """Run one command line; errors become three lines on stderr and an exit status."""
    _print_anything()
    if (unreadable := _not_text(argv)) is not None:
        return _report(unreadable, unreadable.exit_code)
    try:
        import typer

        from kdcache.cli.app import command
    except ImportError as error:
        return _report(_missing(error), NotFoundError.exit_code)

    debug = "--debug" in argv or bool(os.environ.get("KDCACHE_DEBUG"))
    arguments = [argument for argument in argv if argument != "--debug"]
    try:
        status = command().main(args=arguments or ["--help"], prog_name="kdcache", standalone_mode=False)
        if not arguments:
            return UsageError.exit_code
        if status == INTERRUPTED:  # typer's own handling of Ctrl-C
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except KdcacheError as error:
        if debug:
            raise
        return _report(error, error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return _report(f"interrupted; what was done is kept. To go on: {shlex.join(['kdcache', *argv])}", INTERRUPTED)
    except typer.TyperException as error:
        return _report(_usage(error), 2)
    except SystemExit:  # how typer ends where a pipe is broken
        if not _unread():
            raise
        return 0  # results are what is printed there, and whoever reads them (`| head`) has seen enough
    except Exception as error:
        if debug:
            raise
        if isinstance(error, ImportError) and not (error.name or "").startswith("kdcache"):
            return _report(_missing(error), NotFoundError.exit_code)
        from pydantic import ValidationError

        if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
            error = BlockingIOError(errno.EAGAIN, str(error))
        if isinstance(error, OSError) and error.errno is not None:
            from kdcache.system.refusals import refusal

            system = refusal(error)
            return _report(system, system.exit_code)
        if isinstance(error, MemoryError):
            memory = RetryError(
                "out of memory",
                why=str(error) or "the system gave no more",
                fix="end other programs, raise the limit (ulimit -v), or use a larger machine",
            )
            return _report(memory, memory.exit_code)
        if isinstance(error, ValidationError):
            from kdcache.options import wrong_option

            wrong = wrong_option(error)
            return _report(wrong, wrong.exit_code)
        fix = "repeat with --debug and report it, with what kdcache doctor prints"
        bug = f"error: {type(error).__name__}: {error}\nwhy: this is a bug in kdcache\nfix: {fix}"
        return _report(bug, 1)


def _shown(usually: Callable[..., str]) -> Callable[..., str]:
    """Warnings that are for users are one line, without the place in the code."""

    def shown(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
        from kdcache.system.refusals import Notice

        return f"{message}\n" if issubclass(category, Notice) else usually(message, category, *place, **line)

    return shown


def _print_anything() -> None:
    """Whatever is printed can be: characters that the output's encoding lacks are written as escapes, names as their bytes."""
    codecs.register_error("kdcache", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # one that has become a pipe since Python opened it stays as it is
                stream.reconfigure(errors="kdcache")


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeEncodeError) and "\udc80" <= error.object[error.start] <= "\udcff":
        return bytes([ord(error.object[error.start]) - 0xDC00]), error.start + 1
    return codecs.backslashreplace_errors(error)


def _not_text(argv: list[str]) -> UsageError | None:
    """The error for an argument, or a working directory, whose bytes are no text: records are UTF-8 and could not name it."""
    cwd = str(Path.cwd()) if Path().is_dir() else ""
    set_here = [(f"{name}={value!r}", value) for name, value in os.environ.items() if name.startswith("KDCACHE_")]
    arguments = [(f"argument {argument!r}", argument) for argument in argv]
    for what, text in (*arguments, *set_here, (f"the working directory {cwd!r}", cwd)):
        if any("\ud800" <= character <= "\udfff" for character in text):
            return UsageError(
                f"{what} is not UTF-8 text",
                why=f"file names are {sys.getfilesystemencoding()} here, and records of what is made hold paths as UTF-8",
                fix="set PYTHONUTF8=1; or, where the bytes are of another encoding, rename the folder, or name it through a "
                "link: ln -s",
            )
    return None


def _unread() -> bool:
    """Whether stdout is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _report(message: object, status: int) -> int:
    print(message, file=sys.stderr)
    return status


def _missing(error: ImportError) -> NotFoundError:
    """A library that kdcache requires and that is not there, or broken."""
    return NotFoundError(
        f"{error.name or 'a library'} cannot be imported",
        why=str(error) or type(error).__name__,
        fix=f"{sys.executable} -m pip install --upgrade kdcache; kdcache doctor says which libraries are missing or broken",
    )


def _usage(error: object) -> str:
    """An error of the command line in kdcache's three lines; typer's own text offers close matches for mistyped names."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "kdcache"
    text = " ".join(error.format_message().split())  # type: ignore[attr-defined]
    return f"error: {text}\nwhy: the command line is not one that {command} understands\nfix: {command} --help"
