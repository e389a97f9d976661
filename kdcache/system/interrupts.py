"""Ctrl-C and SIGTERM, deferred until a step is complete."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kdcache.errors import RetryError

__all__ = ["Stopped", "stopped_between_steps"]


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, raised between two steps, when nothing is half done."""


@contextmanager
def stopped_between_steps() -> Iterator[Callable[[], None]]:
    """Defer Ctrl-C and SIGTERM. Yields a function that raises Stopped if one arrived; call it after every step.

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
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # signals that a shell or `nohup` ignores stay ignored
                before[number] = signal.signal(number, note)
    try:
        yield check
    except (RuntimeError, RetryError) as error:
        if asked:  # the signal also ended the loader's workers, and torch reports that
            raise Stopped from error
        raise
    finally:
        restore()
