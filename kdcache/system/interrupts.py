"""Ctrl-C and SIGTERM, deferred until a step is complete; and SIGUSR1 and SIGHUP, which clusters and lost terminals send."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kdcache.errors import RetryError

__all__ = ["ENDING", "Stopped", "obey_like_ctrl_c", "stopped_between_steps"]

ENDING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # beside Ctrl-C


class Stopped(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or the like, raised between two steps, when nothing is half done."""


def obey_like_ctrl_c() -> None:
    """From now on, what ends a program interrupts it as Ctrl-C does; signals that are ignored or handled otherwise stay so."""
    for number in ENDING:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


@contextmanager
def stopped_between_steps() -> Iterator[Callable[[], None]]:
    """Defer Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP. Yields a function that raises Stopped if one arrived; call it after every step.

    Handlers that others have set for the last two stay.

    A second signal interrupts at once. Python runs signal handlers only in its main thread; in others nothing is deferred.
    """
    asked = False
    before: dict[int, Any] = {}

    def note(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        restore()

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def check() -> None:
        if asked:
            raise Stopped

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, *ENDING):
            present = signal.getsignal(number)
            if present in (signal.SIG_IGN, None):  # signals that a shell or `nohup` ignores stay ignored
                continue
            if number in {signal.SIGINT, signal.SIGTERM} or present in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, note)
    try:
        yield check
    except (RuntimeError, RetryError) as error:
        if asked:  # the signal also ended the loader's workers, and torch reports that
            raise Stopped from error
        raise
    finally:
        restore()
