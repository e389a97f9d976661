"""Locks between processes. They are the operating system's, and fall with the process that holds one, however it ends."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

__all__ = ["NoLocksError", "locked"]

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


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


def _acquire(lock: filelock.BaseFileLock, timeout: float = 0) -> bool:
    try:
        lock.acquire(timeout=timeout)
    except filelock.Timeout:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise NoLocksError(error.errno, error.strerror, lock.lock_file) from None
        raise
    return True
