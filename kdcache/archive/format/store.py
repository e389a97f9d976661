"""Files of an archive by name, below one folder. Each file is written whole or not at all."""

import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.archive.format.manifest import FileRecord
from kdcache.errors import IntegrityError, KdcacheError, RetryError
from kdcache.system.files import Buffers, create_atomically, write_atomically
from kdcache.system.progress import Progress
from kdcache.system.refusals import refusal

__all__ = [
    "Buffers",
    "LocalStore",
    "Store",
    "as_bytes",
    "inner_name",
    "open_local",
    "sha256",
    "sha256_of",
]


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


# Letters that mean the same on every system, in parts that are neither empty nor `.` or `..`, nor too long for a file system.
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
        """Path of a local file with the bytes of `name`. Fetches and checks it if need be."""

    def open(self, name: str) -> BufferedReader:
        """That file, opened: of a remote archive, the very file that was checked. FileNotFoundError if it is given up again."""

    def prefetch(self, names: Iterable[str]) -> None:
        """Start fetching these files. Returns at once."""

    def fetch(self, names: Iterable[str], progress: Progress) -> None:
        """Wait until all these files are on this machine. Raises UsageError if the cache cannot hold them together."""

    def expect(self, record_of: Callable[[str], FileRecord]) -> None:
        """Check files against their records from now on; `record_of` returns the record of a name."""


def open_local(store: Store, name: str) -> BufferedReader:
    """Open a file of the archive, at its beginning. Its bytes stay readable even if a cache deletes the file."""
    for _ in range(3):
        with suppress(FileNotFoundError):
            return store.open(name)
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
        self.root = Path(os.path.expanduser(root))  # noqa: PTH111  # Path's raises for users that there are not

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

    def open(self, name: str) -> BufferedReader:
        path = self.local(name)
        try:
            return path.open("rb")
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _unreadable(path, error) from None

    def prefetch(self, names: Iterable[str]) -> None:
        return  # the operating system already reads ahead

    def fetch(self, names: Iterable[str], progress: Progress) -> None:
        return

    def expect(self, record_of: Callable[[str], FileRecord]) -> None:
        return  # local files are checked by `Archive.verify`, and their rows when they are read

    def write(self, name: str, data: bytes | Buffers) -> None:
        """Write atomically: to a temporary name beside it, synced to disk, then renamed."""
        write_atomically(self.path(name), data)

    def create(self, name: str, data: bytes | Buffers) -> bool:
        """Write a file atomically unless it exists; return whether this process created it. At most one process does."""
        try:
            create_atomically(self.path(name), data)
        except FileExistsError:
            if not self.exists(name):  # a parent folder could not be made
                raise
            return False
        return True

    def names(self, folder: str, suffix: str) -> list[str]:
        """Sorted names of the files directly in `folder` that end in `suffix`, without temporary files."""
        try:
            paths = list(self.path(folder).iterdir())
        except (FileNotFoundError, NotADirectoryError):  # never made, or removed by the process that finished the archive
            return []
        return sorted(f"{folder}/{p.name}" for p in paths if p.name.endswith(suffix) and not p.name.startswith("."))


_OF_THE_MACHINE = {errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE}


def _unreadable(path: Path, error: OSError) -> KdcacheError:
    if error.errno in _OF_THE_MACHINE:  # which says nothing of the archive
        error.filename = error.filename or str(path)
        return refusal(error)
    missing = isinstance(error, FileNotFoundError)
    return IntegrityError(
        f"{path} {'does not exist' if missing else 'cannot be read'}",
        why="the archive's manifest needs it" + ("" if missing else f"; {os.strerror(error.errno or 0).lower()}"),
        fix="restore it from a copy, or run the dump again",
    )
