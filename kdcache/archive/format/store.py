"""Files of an archive by name, below one folder. Each file is written whole or not at all."""

import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.archive.format.manifest import FileRecord
from kdcache.errors import IntegrityError, RetryError
from kdcache.system.progress import Progress

__all__ = [
    "Buffers",
    "LocalStore",
    "Store",
    "as_bytes",
    "inner_name",
    "open_local",
    "sha256",
    "sha256_of",
    "translated_os_errors",
]

Buffers = list[bytes | memoryview]  # the bytes of a file, in pieces that need not be contiguous

PIECES = 1024  # pieces per writev call; every system allows this many (IOV_MAX)

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}


def as_bytes(array: NDArray) -> memoryview:
    """The bytes of an array; a contiguous array is not copied."""
    return memoryview(np.ascontiguousarray(array)).cast("B")  # type: ignore[arg-type]  # typeshed: arrays are buffers


def sha256(data: bytes | memoryview | Buffers) -> str:
    digest = hashlib.sha256()
    for piece in data if isinstance(data, list) else [data]:
        digest.update(piece)
    return digest.hexdigest()


def sha256_of(file: BufferedReader) -> str:
    """sha256 of a file, read in pieces."""
    return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def translated_os_errors(path: Path, *, elsewhere: str = "--home") -> Iterator[None]:
    """Translate OS errors such as a full disk or missing permission into kdcache's errors. Written files stay."""
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


# A relative path of portable characters. No part is empty, `.`, `..`, or too long for a file system.
_INNER = re.compile(r"(?=.{1,1000}\Z)(?:(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._+-]{1,200}(?:/(?!\Z)|\Z))+")


def inner_name(name: str) -> str:
    """Return `name` if it stays below the archive's folder on every system. Raises IntegrityError otherwise."""
    if not _INNER.fullmatch(name):
        raise IntegrityError(
            f"file name {name[:200]!r} leads out of the archive, or would on some systems",
            why="an archive may only name files below its own folder, in letters, digits and . _ + -",
            fix="do not use this archive; get it again from whoever made it",
        )
    return name


class Store(Protocol):
    """Read access to the files of an archive. Names are relative POSIX paths."""

    @property
    def name(self) -> str: ...  # folder or URL, for messages
    def exists(self, name: str) -> bool: ...
    def size(self, name: str) -> int: ...
    def read(self, name: str, limit: int | None = None) -> bytes:
        """The bytes of `name`; more than `limit` of them are refused before they are read."""

    def local(self, name: str) -> Path:
        """Path of a local file with the bytes of `name`, for memory mapping. Fetches and checks it if need be."""

    def prefetch(self, names: Iterable[str]) -> None:
        """Start fetching these files. Returns at once."""

    def fetch(self, names: Iterable[str], progress: Progress) -> None:
        """Wait until all these files are on this machine. Raises UsageError if the cache cannot hold them together."""

    def expect(self, record_of: Callable[[str], FileRecord]) -> None:
        """Check files against their records from now on; `record_of` returns the record of a name."""


def open_local(store: Store, name: str) -> BufferedReader:
    """Open a file of the archive. Its bytes stay readable even if a cache deletes the file."""
    for _ in range(3):
        path = store.local(name)
        try:
            return path.open("rb")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _unreadable(path, error) from None
    raise RetryError(
        f"{name} of {store.name} was fetched and given up again three times",
        why="the processes that share the cache read more files at a time than fit into it",
        fix="export KDCACHE_CACHE_LIMIT=200GB, or as much as there is room for",
    )


class LocalStore:
    """A folder on this machine. Names never lead out of it. Links inside may: what they lead to must match the records.

    Only regular files are read, since opening a pipe would block until something writes to it.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    @property
    def name(self) -> str:
        return str(self.root)

    def path(self, name: str) -> Path:
        return self.root / inner_name(name)

    def exists(self, name: str) -> bool:
        try:
            return stat.S_ISREG(self.path(name).stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise _unreadable(self.path(name), error) from None

    def size(self, name: str) -> int:
        path = self.path(name)
        try:
            status = path.stat()
        except OSError as error:
            raise _unreadable(self.path(name), error) from None
        if not stat.S_ISREG(status.st_mode):
            raise IntegrityError(
                f"{path} is not a file",
                why="a folder, pipe or device is in the place of a file of the archive",
                fix="do not use this archive; get it again from whoever made it",
            )
        return status.st_size

    def read(self, name: str, limit: int | None = None) -> bytes:
        """The bytes of `name`; more than `limit` of them are refused before they are read."""
        size = self.size(name)
        if limit is not None and size > limit:
            raise IntegrityError(
                f"{self.path(name)} has {size:,} bytes",
                why=f"at most {limit:,} are expected there",
                fix="do not use this archive; get it again from whoever made it",
            )
        try:
            return self.path(name).read_bytes()
        except OSError as error:
            raise _unreadable(self.path(name), error) from None

    def local(self, name: str) -> Path:
        self.size(name)
        return self.path(name)

    def prefetch(self, names: Iterable[str]) -> None:
        return  # the operating system already reads ahead

    def fetch(self, names: Iterable[str], progress: Progress) -> None:
        return

    def expect(self, record_of: Callable[[str], FileRecord]) -> None:
        return  # local files are checked by `Archive.verify`, and their rows when they are read

    def write(self, name: str, data: bytes | Buffers) -> None:
        """Write a file atomically: to a temporary file beside it, synced to disk, then renamed."""
        self._write(name, data, Path.replace)

    def create(self, name: str, data: bytes | Buffers) -> bool:
        """Write a file atomically unless it exists; return whether this process created it. At most one process does."""
        try:
            self._write(name, data, _link)
        except FileExistsError:
            if not self.exists(name):  # a parent folder could not be made
                raise
            return False
        return True

    def _write(self, name: str, data: bytes | Buffers, publish: Callable[[Path, Path], object]) -> None:
        path = self.path(name)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        with translated_os_errors(path):
            _make_folder(path.parent)
            try:
                with temporary.open("wb", buffering=0) as file:
                    _write_all(file.fileno(), [data] if isinstance(data, bytes) else data)
                    os.fsync(file.fileno())
                publish(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            _sync_folder(path.parent)

    def names(self, folder: str, suffix: str) -> list[str]:
        """Sorted names of the files directly in `folder` that end in `suffix`, without temporary files."""
        try:
            paths = list(self.path(folder).iterdir())
        except (FileNotFoundError, NotADirectoryError):  # never made, or removed by the process that finished the archive
            return []
        return sorted(f"{folder}/{p.name}" for p in paths if p.name.endswith(suffix) and not p.name.startswith("."))


def _unreadable(path: Path, error: OSError) -> IntegrityError:
    missing = isinstance(error, FileNotFoundError)
    return IntegrityError(
        f"{path} {'does not exist' if missing else 'cannot be read'}",
        why="the archive's manifest needs it" + ("" if missing else f"; {os.strerror(error.errno or 0).lower()}"),
        fix="restore it from a copy, or run the dump again",
    )


def _write_all(handle: int, data: Buffers) -> None:
    """Write many pieces per call. The system then caches the file in large pages, and readers have fewer page faults."""
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
    """Rename without overwriting an existing file. On file systems without hard links the last writer wins."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}:
            raise
        temporary.replace(path)
    else:
        temporary.unlink()


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents, and sync each parent: a new entry is durable only after that."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    # A rename is durable only after its directory is synced. Not every file system can sync a directory.
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # another process finished the archive and removed the folder
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(handle)
