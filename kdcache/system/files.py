"""Files written whole or not at all, and errors of the operating system as errors that say what to do.

Whoever is killed while a file is written leaves the old one, and at most a hidden temporary file beside it.
"""

import errno
import itertools
import os
import secrets
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kdcache.errors import RetryError

__all__ = [
    "Buffers",
    "create_atomically",
    "is_set_aside",
    "set_aside",
    "sweep_temporaries",
    "translated_os_errors",
    "unique",
    "write_atomically",
]

Buffers = list[bytes | memoryview]  # the bytes of a file, in pieces that lie anywhere

_ASIDE = ".aside"
PIECES = 1024  # that every system takes at a time (IOV_MAX)

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def translated_os_errors(path: Path, *, elsewhere: str = "--home") -> Iterator[None]:
    """Turn a full disk or a forbidden folder into an error that says so; what was written before stays."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise RetryError(
                f"no room to write {path}",
                why=f"{os.strerror(error.errno or 0)}; everything finished before this file is kept",
                fix="free some space (df -h shows where) and repeat the command: it goes on where it stopped",
            ) from error
        if error.errno in _NOT_ALLOWED:
            raise RetryError(
                f"not allowed to write {path}",
                why=os.strerror(error.errno or 0),
                fix=f"make {path.parent} writable, or choose another place with {elsewhere}",
            ) from error
        raise


def write_atomically(file: Path, data: bytes | Buffers) -> None:
    """Replace `file` by `data`, or leave it as it was; on return the bytes are on the disk. Missing folders are made.

    Several writers may be at it at once: the file is what one of them wrote, whole. RetryError for a full disk or a folder
    that cannot be written to.
    """
    _write(file, data, Path.replace)


def create_atomically(file: Path, data: bytes | Buffers) -> None:
    """As `write_atomically`, but raises FileExistsError where the file is there. Of several writers at once, one makes it.

    Where the file system has no links, the last one wins.
    """
    _write(file, data, _link)


def set_aside(path: Path) -> str:
    """The command that moves a file or folder to a free name beside it. Fixes say this, not "delete": nothing gets lost."""
    names = itertools.chain([_ASIDE], (f"{_ASIDE}-{number}" for number in itertools.count(2)))
    free = next(there for name in names if not (there := path.with_name(f"{path.name}{name}")).exists())
    return shlex.join(["mv", str(path), str(free)])


def is_set_aside(path: Path) -> bool:
    """Whether `path` has such a name: whoever lists what is in a folder leaves it out, as it may be damaged."""
    return path.suffix.partition("-")[0] == _ASIDE


def unique() -> str:
    """A part of a file's name that no other writer uses, on whatever machine it runs."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def sweep_temporaries(folder: Path) -> None:
    """Delete the temporary files that killed writers left in `folder` and below. Nobody may be writing there."""
    with suppress(FileNotFoundError):  # where there are no locks, another process may have swept a folder away
        for left in folder.rglob(".*.tmp"):
            left.unlink(missing_ok=True)


def _write(file: Path, data: bytes | Buffers, publish: Callable[[Path, Path], object]) -> None:
    """Write to a temporary name beside `file`, sync it to the disk, and `publish` it as `file`."""
    temporary = file.with_name(f".{file.name}.{unique()}.tmp")
    with translated_os_errors(file):
        _make_folder(file.parent)
        try:
            with temporary.open("wb", buffering=0) as opened:
                _write_all(opened.fileno(), [data] if isinstance(data, bytes) else data)
                os.fsync(opened.fileno())
            publish(temporary, file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(file.parent)


def _write_all(handle: int, data: Buffers) -> None:
    """Many pieces with each call: the system then keeps the file in large pages, which cost a reader few page faults."""
    left = [memoryview(piece).cast("B") for piece in data if len(piece)]
    while left:
        written = os.writev(handle, left[:PIECES])
        done = 0
        while done < len(left) and written >= left[done].nbytes:
            written -= left[done].nbytes
            done += 1
        del left[:done]
        if written:
            left[0] = left[0][written:]


def _link(temporary: Path, path: Path) -> None:
    """Rename, but never onto a file that is there."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}:
            raise
        temporary.replace(path)
    else:
        temporary.unlink()


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it. Each is an entry in another one, which is as good as nothing until it is synced."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    # A rename is durable only once its directory is; not every filesystem lets a directory be synced.
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # swept away by the process that has finished the archive meanwhile: nothing is left to be lost
        return
    except PermissionError:  # a folder that may be written to and not listed
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(handle)
