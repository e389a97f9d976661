"""Ctrl-C and SIGTERM, held back while something is done that should be done whole."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Stopped", "stopped_between_steps"]


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, raised at a moment when nothing is half done."""


@contextmanager
def stopped_between_steps() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C and SIGTERM back: the function that this gives raises Stopped if one came, and is to be called often.

    A second one interrupts at once. Python runs signal handlers in its main thread only; in others nothing is held back.
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
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # what a shell or `nohup` had ignored stays ignored
                before[number] = signal.signal(number, note)
    try:
        yield check
    except RuntimeError as error:
        if asked:  # the signal went to the loader's workers too, and torch reports their end
            raise Stopped from error
        raise
    finally:
        restore()
