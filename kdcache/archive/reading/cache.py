"""Remote archives, read through a local cache of fetched files.

    <cache>/ab/ab34...           a file, named by its sha256: the same shard of two archives is kept once
    <cache>/ab/ab34....part      what has arrived of one; the next download goes on there, whoever makes it
    <cache>/ab/ab34....9-ab.part the same where the file system has no locks: of one process, and nobody goes on there
    <cache>/locks/ab3            held by the process that downloads

Only regular files are read and gone on with, and no link is followed: others may be allowed to write into a shared cache.
What is mapped is the very file that was compared.

<cache> is $KDCACHE_CACHE, or kdcache below $XDG_CACHE_HOME (~/.cache). All processes of a user share it. Any of them may
delete a file at any moment; a process that misses a file fetches it again.
"""

import errno
import hashlib
import os
import re
import shlex
import stat
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from kdcache.archive.format.manifest import FileRecord
from kdcache.archive.format.store import inner_name, sha256_of
from kdcache.errors import IntegrityError, NotFoundError, UsageError
from kdcache.system.attempts import ending
from kdcache.system.files import set_aside, translated_os_errors, unique
from kdcache.system.locks import NoLocksError, locked
from kdcache.system.progress import Progress, Silent
from kdcache.system.refusals import Notice
from kdcache.system.remote import MissingError, Remote

__all__ = ["Cache", "CachedStore", "download"]

WORKERS = 8  # downloads at a time
READ_LIMIT = 64 << 20  # bytes of a file that is read into memory
DEFAULT_LIMIT = "50GB"
ABANDONED = 24 * 3600  # seconds without a byte, after which nobody is downloading into a file any more
FRESH = 10  # seconds: each mark has other processes compare the file again
Key = tuple[str, int]  # sha256 and size: what is downloaded once, under whatever names
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass
class Cache:
    """Fetched files by sha256, at most `limit` bytes in all. The least recently used files are deleted first."""

    root: Path
    limit: int

    def __post_init__(self) -> None:
        self._checked: dict[str, _Identity] = {}  # by sha256: the files that this process has compared, on arrival or later
        self._unsurveyed: int | None = None  # bytes that may be added before the next survey of the folder

    @classmethod
    def from_environment(cls) -> "Cache":
        text = os.environ.get("KDCACHE_CACHE_LIMIT") or DEFAULT_LIMIT
        limit = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
        if not limit:
            raise UsageError(
                f"KDCACHE_CACHE_LIMIT is {text!r}",
                why="it is the number of bytes that fetched files may take",
                fix=f"export KDCACHE_CACHE_LIMIT={DEFAULT_LIMIT}",
            )
        root = os.environ.get("KDCACHE_CACHE")
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return cls(Path(root or f"{base}/kdcache").expanduser().absolute(), int(float(limit[1]) * _UNITS[limit[2].upper()]))

    def path(self, record: FileRecord) -> Path:
        return self.root / record.sha256[:2] / record.sha256

    def open(self, record: FileRecord) -> BufferedReader | None:
        """The file of `record`, opened and compared, if the cache has it, else None. Marks it as just used.

        A link or anything else in its place is not followed but taken away, and so is a file of other contents.
        """
        path = self.path(record)
        self._require_folder(path.parent)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno not in {errno.ELOOP, errno.ENXIO, errno.EMLINK}:  # a link, a socket
                raise
            _take_away(path)
            return None
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            os.close(handle)
            _take_away(path)
        file = os.fdopen(handle, "rb")
        try:
            status = os.fstat(handle)
            if stat.S_ISREG(status.st_mode) and status.st_size == record.bytes and self._sound(file, record):
                if time.time() - status.st_mtime > FRESH:
                    with suppress(PermissionError):  # another user's file in a shared cache
                        os.utime(handle)
                self._checked[record.sha256] = _identity(handle)
                return file
        except BaseException:
            file.close()
            raise
        file.close()
        _take_away(path)
        return None

    def find(self, record: FileRecord) -> Path | None:
        """As `open`, but its path."""
        file = self.open(record)
        if file is None:
            return None
        file.close()
        return self.path(record)

    def fetch(self, record: FileRecord, where: str, stream: Callable[[int], Iterator[bytes]]) -> Path:
        """Path of the file of `record`, downloaded if missing. `stream(start)` yields its bytes from `start` on.

        One process downloads, and others that want the same file wait for it. Where there are no locks, each downloads for
        itself.
        """
        if record.bytes > self.limit:
            raise UsageError(
                f"{where} has {record.bytes:,} bytes",
                why=f"fetched files may take {self.limit:,} bytes on this machine",
                fix=f"export KDCACHE_CACHE_LIMIT={-(-2 * record.bytes // 10**9)}GB",
            )
        path = self.path(record)
        with translated_os_errors(path, elsewhere="KDCACHE_CACHE=FOLDER"):
            self._make_folder(path.parent)
            with self._begun(path) as part:
                if found := self.find(record):
                    return found
                with download(record, where, part, stream) as whole:
                    part.replace(path)
                    self._checked[record.sha256] = _identity(whole.fileno())
            self._make_room(path, record.bytes)
        return path

    def _sound(self, file: BufferedReader, record: FileRecord) -> bool:
        """Whether the open file holds what is recorded. It is read once, unless it is exchanged or changed meanwhile."""
        if self._checked.get(record.sha256) == _identity(file.fileno()):
            return True
        if sha256_of(file) != record.sha256:
            return False
        file.seek(0)
        return True

    def _require_folder(self, folder: Path) -> None:
        """Raise UsageError for a folder of the cache that is a link: what is fetched would be written elsewhere."""
        if folder.is_symlink():
            raise UsageError(
                f"{folder} is a link",
                why="folders of the cache for fetched files are folders, or others could have them written anywhere",
                fix=f"find out who made it, and set it aside: {set_aside(folder)}; or set KDCACHE_CACHE=FOLDER",
            )
        if folder.exists() and not folder.is_dir():
            raise UsageError(
                f"{folder} is no folder",
                why="the cache keeps fetched files in it",
                fix=f"set it aside: {set_aside(folder)}; or set KDCACHE_CACHE=FOLDER",
            )

    def _make_folder(self, folder: Path) -> None:
        with suppress(FileExistsError):  # a file, which is named
            folder.mkdir(parents=True, exist_ok=True)
        self._require_folder(folder)

    @contextmanager
    def _begun(self, path: Path) -> Iterator[Path]:
        """The file that `path` is downloaded into, which no other process writes to meanwhile."""
        with ExitStack() as held:
            part = path.with_name(f"{path.name}.part")
            try:
                held.enter_context(locked(self._lock(path)))
            except NoLocksError:
                part = path.with_name(f"{path.name}.{unique()}.part")
                held.callback(part.unlink, missing_ok=True)
            yield part

    def _lock(self, path: Path) -> Path:
        # A fixed set of lock files, which are never deleted: two files that share one are fetched one after the other.
        folder = self.root / "locks"
        self._make_folder(folder)
        return folder / path.name[:3]

    def _make_room(self, newest: Path, size: int) -> None:
        if self._unsurveyed is not None and self._unsurveyed >= size:
            self._unsurveyed -= size
            return
        files = []
        for folder in self.root.glob("[0-9a-f][0-9a-f]"):
            for entry in os.scandir(folder) if folder.is_dir() and not folder.is_symlink() else ():
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if not stat.S_ISDIR(status.st_mode):  # which nothing of kdcache makes there
                        files.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit:
                break
            if path != newest and self._give_up(path):
                total -= size
        self._unsurveyed = max(0, self.limit - total) // WORKERS  # other processes add files as well

    def _give_up(self, path: Path) -> bool:
        with suppress(FileNotFoundError):
            if path.suffix != ".part":
                path.unlink()  # processes that have mapped it keep its bytes
                return True
            with ExitStack() as held:
                try:
                    free = held.enter_context(locked(self._lock(path), wait=False))
                except NoLocksError:
                    free = time.time() - path.stat().st_mtime > ABANDONED
                if free:  # it is not being downloaded
                    path.unlink()
                return free
        return False


_Identity = tuple[int, int, int, int, int]


def _identity(handle: int) -> _Identity:
    """Tells an open file from one that is exchanged for it, and from its own changed contents."""
    status = os.fstat(handle)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _take_away(path: Path) -> None:
    """Delete what is in the place of a file: a link, but not what it leads to. A folder there stays, and is an error."""
    with suppress(FileNotFoundError):
        kind = path.lstat().st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            what = "a link" if stat.S_ISLNK(kind) else "no file"
            warnings.warn(f"{path} was {what}, which nothing of kdcache makes there; it is taken away", Notice, stacklevel=1)
        if stat.S_ISDIR(kind):
            raise UsageError(
                f"{path} is a folder", why="a file belongs there", fix=f"move it away: mv {shlex.quote(str(path))} ELSEWHERE"
            )
        path.unlink()


def _open_part(part: Path) -> BinaryIO:
    """Open the beginning of a file to go on with it. What others could write through or into is taken away, and begun anew."""
    flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with suppress(FileNotFoundError):
        try:
            handle = os.open(part, flags)
        except OSError as error:
            if error.errno not in {errno.ELOOP, errno.ENXIO, errno.EMLINK, errno.EACCES, errno.EISDIR}:
                raise
        else:
            status = os.fstat(handle)
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1:
                return os.fdopen(handle, "a+b")
            os.close(handle)
        _take_away(part)
    return os.fdopen(os.open(part, flags | os.O_CREAT | os.O_EXCL, 0o666), "a+b")


def download(record: FileRecord, where: str, part: Path, stream: Callable[[int], Iterator[bytes]]) -> BinaryIO:
    """Complete `part` to the bytes of `record`, and return it open. Never writes more bytes than recorded; refetches wrong bytes
    once.

    Raises IntegrityError if the server sends other bytes than recorded.
    """
    for last in (False, True):
        with ExitStack() as opened:
            file = opened.enter_context(_open_part(part))
            size, digest = _receive(record, where, file, stream)
            if size == record.bytes and digest == record.sha256:
                file.flush()
                opened.pop_all()
                return file
        part.unlink()  # damage on the way is repaired by a second download
        if last or size > record.bytes:
            wrong = size != record.bytes
            got = f"more than {record.bytes:,} bytes" if size > record.bytes else f"{size:,} bytes" if wrong else digest
            raise IntegrityError(
                f"{where}: {'the file has' if wrong else 'sha256 is'} {got}, "
                f"expected {f'{record.bytes:,} bytes' if wrong else record.sha256}",
                why="the server does not send what the archive's manifest records",
                fix="ask whoever published the archive to upload this file again",
            )
    raise AssertionError("the last of them has returned or raised")


def _receive(record: FileRecord, where: str, file: BinaryIO, stream: Callable[[int], Iterator[bytes]]) -> tuple[int, str]:
    """Append the missing bytes to `file`. Returns its size and its sha256."""
    digest, size = hashlib.sha256(), 0
    if file.seek(0, os.SEEK_END) > record.bytes:  # which no download of it leaves
        file.truncate(0)
    file.seek(0)
    while (held := file.read(1 << 20)) and size <= record.bytes:
        digest.update(held)
        size += len(held)
    if size < record.bytes:
        for piece in stream(size):
            size += len(piece)
            if size > record.bytes:
                break
            digest.update(piece)
            file.write(piece)
            if ending():
                raise KeyboardInterrupt
    return size, digest.hexdigest()


class _Downloads:
    """Tasks by key, in at most `WORKERS` threads. A thread ends when no task is left, or when the interpreter ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: dict[Key, Future[Path]] = {}
        self._waiting: OrderedDict[Key, Callable[[], Path]] = OrderedDict()
        self._threads = 0

    def begin(self, key: Key, task: Callable[[], Path], *, first: bool) -> Future[Path]:
        """The future of `task`, or of a running or waiting task with the same key. `first` puts it ahead of the queue."""
        with self._lock:
            if key not in self._futures:
                self._futures[key] = Future()
                self._waiting[key] = task
            if first and key in self._waiting:
                self._waiting.move_to_end(key, last=False)
            if self._waiting and self._threads < WORKERS:
                self._threads += 1
                threading.Thread(target=self._work, name="kdcache-fetch").start()
            return self._futures[key]

    def _work(self) -> None:
        while True:
            with self._lock:
                if ending():
                    while self._waiting:
                        self._futures.pop(self._waiting.popitem()[0]).cancel()
                if not self._waiting:
                    self._threads -= 1
                    return
                key, task = self._waiting.popitem(last=False)
                future = self._futures[key]
            try:
                result, error = task(), None
            except BaseException as caught:
                result, error = None, caught
            with self._lock:
                del self._futures[key]  # after a failed prefetch, a reader that needs the file tries again
            if error:
                future.set_exception(error)
            elif result:
                future.set_result(result)


class CachedStore:
    """Files of a remote archive. Each is fetched whole, checked on arrival and kept in the cache."""

    def __init__(self, remote: Remote, cache: Cache | None = None) -> None:
        self.remote = remote
        self.cache = cache or Cache.from_environment()
        self._record_of: Callable[[str], FileRecord] | None = None
        self._here: tuple[int, _Downloads] = (os.getpid(), _Downloads())

    @property
    def name(self) -> str:
        return self.remote.url

    def expect(self, record_of: Callable[[str], FileRecord]) -> None:
        self._record_of = record_of

    def exists(self, name: str) -> bool:
        """Whether the manifest records the file, or else the server has it."""
        inner_name(name)
        with suppress(IntegrityError):
            return bool(self._record(name))
        try:
            return self.remote.size(name) >= 0
        except MissingError:
            return False

    def size(self, name: str) -> int:
        """Size in bytes according to the server, even for a cached file."""
        try:
            return self.remote.size(inner_name(name))
        except NotFoundError as error:
            raise self._missing(error) from None

    def read(self, name: str, limit: int | None = None) -> bytes:
        """The bytes of a small file, from the server. Raises IntegrityError beyond `limit` bytes."""
        limit, data = READ_LIMIT if limit is None else limit, bytearray()
        for piece in self.remote.stream(inner_name(name)):
            if len(data) + len(piece) > limit:
                raise IntegrityError(
                    f"{self.name}/{name} has more than {limit:,} bytes",
                    why=f"at most {limit:,} are expected there",
                    fix="do not use this archive; get it again from whoever made it",
                )
            data += piece
        return bytes(data)

    def local(self, name: str) -> Path:
        record = self._record(name)
        return self.cache.find(record) or self._begin(name, record, first=True).result()

    def open(self, name: str) -> BufferedReader:
        record = self._record(name)
        for _ in range(2):
            if file := self.cache.open(record):
                return file
            self._begin(name, record, first=True).result()
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.cache.path(record)))

    def prefetch(self, names: Iterable[str]) -> None:
        """Start fetching these files in order, as many as fit into the cache together."""
        room = self.cache.limit
        for name in names:
            record = self._record(name)
            room -= record.bytes
            if room < 0:
                return
            if not self.cache.path(record).exists():
                self._begin(name, record, first=False)

    def fetch(self, names: Iterable[str], progress: Progress | None = None) -> None:
        """Fetch the missing ones of these files. Raises UsageError if the cache cannot hold all of them at once."""
        wanted = [(name, self._record(name)) for name in names]
        total = sum(record.bytes for _, record in wanted)
        if total > self.cache.limit:
            raise UsageError(
                f"{total:,} bytes of {self.name} are needed at a time",
                why=f"fetched files may take {self.cache.limit:,} bytes on this machine",
                fix=f"export KDCACHE_CACHE_LIMIT={-(-2 * total // 10**9)}GB",
            )
        coming = [(record, self._begin(name, record, first=False)) for name, record in wanted if not self.cache.find(record)]
        progress, done = progress or Silent(), total - sum(record.bytes for record, _ in coming)
        for record, future in coming:
            future.result()
            done += record.bytes
            progress.update(f"fetch {self.name}", done, total)

    def _begin(self, name: str, record: FileRecord, *, first: bool) -> Future[Path]:
        def task() -> Path:
            try:
                return self.cache.fetch(record, f"{self.name}/{name}", lambda start: self.remote.stream(name, start))
            except NotFoundError as error:
                raise self._missing(error) from None

        process, downloads = self._here
        if process != os.getpid():  # after a fork: threads and lock owners are not inherited
            downloads = _Downloads()
            self._here = (os.getpid(), downloads)
        return downloads.begin((record.sha256, record.bytes), task, first=first)

    def _record(self, name: str) -> FileRecord:
        if self._record_of is None:
            raise IntegrityError(
                f"{self.name}/{name} is not recorded",
                why="the archive's manifest has not been read yet",
                fix="open the archive with kdcache.open_archive",
            )
        return self._record_of(inner_name(name))

    def _missing(self, error: NotFoundError) -> IntegrityError:
        return IntegrityError(
            error.what,
            why=f"{error.why}; the archive's manifest needs this file",
            fix="ask whoever published the archive to upload this file again",
        )
