"""Files written whole or not at all, and errors of the operating system as errors that say what to do.

Whoever is killed while a file is written leaves the old one, and at most a hidden temporary file beside it.
"""

import errno
import itertools
import os
import re
import secrets
import shlex
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from kdcache.errors import RetryError, UsageError
from kdcache.system.locks import NoLocksError, locked
from kdcache.system.refusals import NO_ROOM, NOT_ALLOWED, named, remedy

__all__ = [
    "Buffers",
    "create_atomically",
    "is_set_aside",
    "is_temporary",
    "lacking",
    "local_path",
    "set_aside",
    "sweep_temporaries",
    "tidying",
    "translated_os_errors",
    "unique",
    "write_atomically",
    "write_changed",
    "written_alone",
]

Buffers = list[bytes | memoryview]  # the bytes of a file, in pieces that lie anywhere

_ASIDE = ".aside"
_TEMPORARY = re.compile(r"\.(.+)\.\d+-[0-9a-f]{8}\.tmp")  # of `_write`, with a `unique` part
PIECES = 1024  # that every system takes at a time (IOV_MAX)

_OWN_TEXT = {errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE}


@contextmanager
def translated_os_errors(path: Path, *, elsewhere: str = "") -> Iterator[None]:
    """Turn a full disk, a forbidden folder and the like into an error that says so; what was written before stays.

    elsewhere: what chooses another place, where one option or variable does.

    NoLocksError and what callers tell apart by its class pass, with the name of the file.
    """
    try:
        with named(path):
            yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise RetryError(
                f"no room to write {path}",
                why=f"{os.strerror(error.errno or 0)}; everything finished before this file is kept",
                fix=f"{remedy(error, path)} and repeat the command: it goes on where it stopped",
            ) from error
        if error.errno in _OWN_TEXT:
            raise RetryError(
                f"{path} cannot be written",
                why=f"{os.strerror(error.errno or 0)}; everything finished before this file is kept",
                fix=f"{remedy(error, path)}, and repeat the command: it goes on where it stopped",
            ) from error
        if error.errno in NOT_ALLOWED:
            raise RetryError(
                f"not allowed to write {path}",
                why=os.strerror(error.errno or 0),
                fix=f"make {path.parent} writable, or choose another place{f' with {elsewhere}' if elsewhere else ''}",
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
    path = path.resolve() if path.name in {"", ".."} else path  # a working folder has no name of its own
    free = next(there for name in names if not (there := path.with_name(f"{path.name}{name}")).exists())
    return shlex.join(["mv", str(path), str(free)])


def is_set_aside(path: Path) -> bool:
    """Whether `path` has such a name: whoever lists what is in a folder leaves it out, as it may be damaged."""
    return path.suffix.partition("-")[0] == _ASIDE


def write_changed(file: Path, data: bytes) -> None:
    """As `write_atomically`, but a file that has these very bytes stays as it is, also where nothing may be written."""
    try:
        if file.stat().st_size == len(data) and file.read_bytes() == data:
            return
    except OSError:  # which writing tells, if it stands in its way too
        pass
    write_atomically(file, data)


def local_path(place: str | os.PathLike[str], what: str, *, elsewhere: str = "name a folder of this machine") -> Path:
    """`place` with `~` as shells have it. UsageError for a URL, whose name a folder here would get; `what` says whose it is."""
    text = os.path.expanduser(os.fspath(place))  # noqa: PTH111  # Path's raises for users that there are not
    if re.match(r"[A-Za-z][\w.+-]+:/", text):
        address = re.sub(":/+", "://", text, count=1)  # which a Path has made shorter
        raise UsageError(f"{what} {address}", why="it is an address, and a place on this machine is needed", fix=elsewhere)
    return Path(text)


def lacking(path: Path) -> str:
    """What is in the place of a file that is to be read: nothing, a folder, or what would be waited for without end."""
    if path.is_dir():
        return "is a folder"
    return "is a pipe, a socket or a device, and not a file" if path.exists() else "does not exist"


def unique() -> str:
    """A part of a file's name that no other writer uses, on whatever machine it runs."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def sweep_temporaries(folder: Path) -> None:
    """Delete the temporary files that killed writers left in `folder` and below. Nobody may be writing there."""
    with suppress(FileNotFoundError):  # where there are no locks, another process may have swept a folder away
        for left in folder.rglob(".*.tmp"):
            left.unlink(missing_ok=True)


def is_temporary(file: Path, names: Collection[str]) -> bool:
    """Whether this is a temporary file of `write_atomically` for a file of one of these names."""
    found = _TEMPORARY.fullmatch(file.name)
    return found is not None and found[1] in names


@contextmanager
def written_alone(folder: Path) -> Iterator[None]:
    """Write several files of a folder, which is made, while others that do so wait; what killed ones left there is swept away.

    In a read-only folder, and where there are no locks, nothing is swept.
    """
    with translated_os_errors(folder):
        _make_folder(folder)
    lock = folder / ".lock"
    with ExitStack() as held:
        try:
            held.enter_context(locked(lock))
        except OSError as error:
            if not isinstance(error, NoLocksError) and error.errno not in NOT_ALLOWED:
                raise
        else:
            for left in folder.rglob(".*.tmp"):
                if _TEMPORARY.fullmatch(left.name):
                    left.unlink(missing_ok=True)
        try:
            yield
        finally:
            with tidying():
                lock.unlink(missing_ok=True)  # while it is held: later it may be another process's


@contextmanager
def tidying() -> Iterator[None]:
    """What is tidied up inside is of no use to anybody: where it cannot be deleted, as in a read-only folder, it stays."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_ALLOWED:
            raise


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
