"""Bytes by name, below one folder, each written whole or not at all."""

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from kdcache.errors import IntegrityError, RetryError

__all__ = ["LocalStore", "sha256", "translated_os_errors"]

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def translated_os_errors(path: Path) -> Iterator[None]:
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
                fix=f"make {path.parent} writable, or choose another place with --home",
            ) from error
        raise


class LocalStore:
    """A folder. Names are relative POSIX paths and never lead out of it."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def path(self, name: str) -> Path:
        pure = PurePosixPath(name)
        if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
            raise IntegrityError(
                f"file name {name!r} leads out of the archive",
                why="an archive may only name files below its own folder",
                fix="do not use this archive; get it again from whoever made it",
            )
        return self.root / pure

    def exists(self, name: str) -> bool:
        return self.path(name).is_file()

    def size(self, name: str) -> int:
        try:
            return self.path(name).stat().st_size
        except FileNotFoundError:
            raise self._missing(name) from None

    def read(self, name: str, limit: int | None = None) -> bytes:
        """The bytes of `name`; more than `limit` of them are refused before they are read."""
        size = self.size(name)
        if limit is not None and size > limit:
            raise IntegrityError(
                f"{self.path(name)} has {size:,} bytes",
                why=f"at most {limit:,} are expected there",
                fix="do not use this archive; get it again from whoever made it",
            )
        return self.path(name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """Write atomically: to a temporary name beside it, synced to disk, then renamed."""
        path = self.path(name)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        with translated_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            _sync_folder(path.parent)

    def names(self, folder: str, suffix: str) -> list[str]:
        """Names of the files directly in `folder` that end in `suffix`, sorted; temporary files are not among them."""
        try:
            found = list(self.path(folder).iterdir())
        except FileNotFoundError:  # never made, or swept away just now by the process that finished the archive
            return []
        return sorted(f"{folder}/{p.name}" for p in found if p.name.endswith(suffix) and not p.name.startswith("."))

    def _missing(self, name: str) -> IntegrityError:
        return IntegrityError(
            f"{self.path(name)} does not exist",
            why="the archive's manifest needs it",
            fix="restore it from a copy, or run the dump again",
        )


def _sync_folder(folder: Path) -> None:
    # A rename is durable only once its directory is; not every filesystem lets a directory be synced.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(handle)
