"""Worker processes: how many there may be, and their end, whatever becomes of the process that started them."""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.process import BaseProcess

from kdcache.errors import KdcacheError, RetryError, UsageError
from kdcache.system.refusals import remedy

__all__ = ["most_workers", "require_workers", "starting_workers"]

_STARTED: set[BaseProcess] = set()


def most_workers() -> int:
    """The largest number of worker processes that is of any use on this machine."""
    return max(32, 4 * len(os.sched_getaffinity(0)))


def require_workers(count: int) -> None:
    """Raise UsageError for a number of worker processes that is surely a typing mistake."""
    if not 0 <= count <= most_workers():
        cores = len(os.sched_getaffinity(0))
        raise UsageError(
            f"--workers {count}",
            why=f"this machine has {cores} core{'s' * (cores != 1)} to use, for which there are at most {most_workers()} workers",
            fix=f"--workers {cores}",
        )


@contextmanager
def starting_workers(count: int) -> Iterator[None]:
    """Start `count` worker processes inside. Whatever fails there ends those that have started already.

    RetryError where the system gives no more of them. Those that are there at this process's end are killed then: they
    ignore signals, and Python would wait for them.
    """
    before = set(multiprocessing.active_children())
    try:
        yield
    except BaseException as error:
        begun = set(multiprocessing.active_children()) - before
        with _unnoticed():
            for worker in begun:
                worker.kill()
            for worker in begun:
                worker.join()
        if isinstance(error, KdcacheError) or not isinstance(error, OSError | RuntimeError | MemoryError):
            raise
        why = (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
        mend = (remedy(error) if isinstance(error, OSError) else None) or "allow more processes and threads (ulimit -u)"
        _forget(error)
        raise RetryError(
            f"{len(begun)} of {count} worker processes were started, and no more",
            why=why,
            fix=f"use fewer, --workers {max(0, min(len(begun), count - 1))}; or {mend}",
        ) from None
    _STARTED.update(set(multiprocessing.active_children()) - before)
    _STARTED.difference_update([worker for worker in _STARTED if not _alive(worker)])
    _killed_at_exit()


@contextmanager
def _unnoticed() -> Iterator[None]:
    """Workers may be killed inside: torch would say in the midst of it that they were, in place of what went wrong."""
    if threading.current_thread() is not threading.main_thread():  # signals are handled in the main one only
        yield
        return
    noticing = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, noticing or signal.SIG_DFL)


def _forget(error: BaseException) -> None:
    """Let go of what was half made when it failed. Its own end fails too, and Python would print that."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.unraisablehook = before


@cache
def _killed_at_exit() -> None:
    # What is registered last is called first: before multiprocessing waits for its processes.
    atexit.register(_kill)


def _kill() -> None:
    left = [worker for worker in _STARTED if _alive(worker)]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or torch would say that they were killed
    for worker in left:
        worker.kill()


def _alive(worker: BaseProcess) -> bool:
    try:
        return worker.is_alive()
    except (ValueError, AssertionError):  # closed; or this is a fork of the process that started it
        return False
