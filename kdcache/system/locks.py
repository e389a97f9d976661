"""Locks between processes. They are the operating system's, and fall with the process that holds one, however it ends.

Nothing but such a lock counts as held: a file that is there says nothing. Where the file system has no locks, callers get
NoLocksError, or go on without one: a single process can, and several are told to divide their work.
"""

import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

import filelock

from kdcache.system.refusals import NO_LOCKS, Notice, named

__all__ = ["NoLocksError", "has_locks", "locked", "locked_by_family", "locked_if_possible", "say_no_locks"]


class NoLocksError(OSError):
    """The file system has no locks, as Lustre mounted without `flock` has none."""


@contextmanager
def locked(path: Path, *, wait: bool = True, waiting: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Hold the lock of the file `path` (made if missing): True; or False, without it, if another process does.

    With `wait` there is no False: `waiting` is called once, then the lock is waited for. The file stays; whoever holds the
    lock may delete it. Raises NoLocksError.
    """
    # In place of missing locks, filelock could make marker files: those outlive a killed process, and stop all others.
    lock = filelock.FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
    held = _acquire(lock)
    if not held and wait:
        waiting()
        held = _acquire(lock, timeout=-1)
    try:
        yield held
    finally:
        if held:
            lock.release()


@contextmanager
def locked_if_possible(path: Path, *, wait: bool = True, waiting: Callable[[], None] = lambda: None) -> Iterator[bool | None]:
    """As `locked`, but None where the file system has no locks, which is said once."""
    with ExitStack() as held:
        try:
            got: bool | None = held.enter_context(locked(path, wait=wait, waiting=waiting))
        except NoLocksError:
            say_no_locks()
            got = None
        yield got


def has_locks(folder: Path) -> bool:
    """Whether files of a folder can be locked. Where they cannot, that is said once."""
    path = folder / f".{os.getpid()}-{secrets.token_hex(4)}.lock"
    with locked_if_possible(path, wait=False) as held:
        path.unlink(missing_ok=True)
    return held is not None


@cache
def say_no_locks() -> None:
    """Say, once in a process, that others are not noticed."""
    text = (
        "the file system has no locks: other processes that write there are not noticed. Run one at a time; "
        "several dump-teacher divide one archive by --shard I/N"
    )
    warnings.warn(text, Notice, stacklevel=1)


@contextmanager
def locked_by_family(path: Path, *, wait: bool = True, waiting: Callable[[], None] = lambda: None) -> Iterator[int | None]:
    """As `locked`, but gives the lock's descriptor, or None; nobody may delete the file. Raises NoLocksError.

    A child that inherits the descriptor (`pass_fds`) holds the lock too, and goes on holding it when this process is killed.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with _told_apart(path):
            held = filelock.lock_descriptor(descriptor, blocking=False)
            if not held and wait:
                waiting()
                held = filelock.lock_descriptor(descriptor, poll_interval=1)
        yield descriptor if held else None
    finally:
        os.close(descriptor)  # and not unlocked: that would take it from a child, too


def _acquire(lock: filelock.BaseFileLock, timeout: float = 0) -> bool:
    try:
        with _told_apart(Path(lock.lock_file)):
            lock.acquire(timeout=timeout)
    except filelock.Timeout:
        return False
    return True


@contextmanager
def _told_apart(path: Path) -> Iterator[None]:
    """Raises NoLocksError where the file system has no locks."""
    try:
        with named(path):
            yield
    except OSError as error:
        if error.errno in NO_LOCKS:
            with suppress(OSError):
                if not path.stat().st_size:
                    path.unlink()  # which was made for this, and nobody can hold
            raise NoLocksError(error.errno, error.strerror, str(path)) from None
        raise
