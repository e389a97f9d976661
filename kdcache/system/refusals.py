"""What the operating system refuses, and what mends each: one text for one cause, wherever it is told."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kdcache.errors import RetryError

__all__ = ["NOT_ALLOWED", "NO_LOCKS", "NO_ROOM", "ROOM", "Notice", "named", "refusal", "remedy"]


class Notice(RuntimeWarning):
    """A warning that users may want to know of, and that the command line shows in one line."""


_ENOTSUPP = 524  # the Linux kernel's own, which NFS lets through

NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, _ENOTSUPP}
_NETWORK = {errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN}

ROOM = "free some space (df -h shows where)"
_REMEDIES = {
    errno.EDQUOT: "free some of your quota (quota -s shows it)",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f unlimited)",
    errno.EMFILE: "raise the limit of open files (ulimit -n 65536, or what ulimit -Hn allows)",
    errno.ENFILE: "end programs that hold many files open, or have fs.file-max raised: the whole machine has no descriptor left",
    errno.EIO: "look at the disk (dmesg says what failed), and copy what is on it to another one",
    errno.EROFS: "choose another place: this file system is mounted read-only",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "mend the link that leads back to itself",
    errno.ESTALE: "mount that network disk again if it stays: the file was exchanged, or its server started anew",
    errno.ENOENT: "correct the path",
    errno.ENOTDIR: "correct the path: a part of it is a file",
    errno.EISDIR: "correct the path: it is a folder",
    errno.EEXIST: "choose another place: there is a file of that name",
    errno.ENOTEMPTY: "choose another place: there is something in that one",
    errno.ENOMEM: "end other programs, raise the limit (ulimit -v), or use a larger machine",
    errno.EAGAIN: "allow more processes and threads (ulimit -u)",
}


def remedy(error: OSError, path: str | os.PathLike[str] | None = None) -> str | None:
    """How to mend what the system refused for `path`; None for a cause that has no advice of its own."""
    number = error.errno or 0
    if number == errno.ENOSPC:
        return "free some inodes (df -i shows where): many small files take them" if _without_inodes(path) else ROOM
    if number in NO_LOCKS:
        of_hub = path is not None and "huggingface" in str(path)
        return f"{'export HF_HOME=FOLDER' if of_hub else 'choose a place'} on a disk with file locks (Lustre: mount -o flock)"
    if number in _NETWORK:
        return "look at the address and the network"
    if number in {errno.EACCES, errno.EPERM} and path is not None:
        return f"correct the permissions of {path} or of the folders above it"
    return _REMEDIES.get(number)


def refusal(error: OSError) -> RetryError:
    """The error for what the system refused anywhere, with the name of the file as far as it is known."""
    names = [str(name) for name in (error.filename, error.filename2) if name not in {None, ""}]
    return RetryError(
        ": ".join(filter(None, (os.strerror(error.errno or 0).lower(), " and ".join(names)))),
        why="the system refused it; what was finished before is kept",
        fix=f"{remedy(error, names[0] if names else None) or 'mend the cause'}, and repeat the command",
    )


@contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the system inside name this file, if they name none: those of an open file do not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _without_inodes(path: str | os.PathLike[str] | None) -> bool:
    """Whether the disk of `path`, which need not exist, has room for bytes and none for another file."""
    if path is None:
        return False
    with suppress(OSError, ValueError):
        place = Path(path).absolute()
        while not place.is_dir():
            place = place.parent
        left = os.statvfs(place)
        return left.f_files > 0 and left.f_favail == 0 and left.f_bavail > 0
    return False
