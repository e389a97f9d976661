"""Transfer of files in parallel: with progress, a common stop, and resumption of each file."""

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.archive.format.manifest import PULL, FileRecord
from kdcache.archive.reading.cache import download
from kdcache.system.attempts import ending
from kdcache.system.files import translated_os_errors
from kdcache.system.progress import Progress
from kdcache.system.refusals import refusal
from kdcache.system.room import require_room

__all__ = ["ByteCounter", "FileTransfer", "TransferEnded", "bring", "in_parallel", "require_room_to_pull"]

WORKERS = 8  # parallel transfers


@dataclass(frozen=True)
class FileTransfer:
    """A file to transfer: its record, and a stream of its bytes from any offset."""

    record: FileRecord
    stream: Callable[[int], Iterator[bytes]]


def bring(files: Sequence[FileTransfer], folder: Path, task: str, progress: Progress) -> None:
    """Fetch all files below `folder`, and check each. Existing ones stay; beginnings in `.pull` are continued."""
    total = sum(file.record.bytes for file in files)
    require_room_to_pull(folder, _missing_bytes(files, folder))
    counter = ByteCounter()

    def bring_one(file: FileTransfer) -> None:
        target = folder / file.record.path
        try:
            with translated_os_errors(target):
                if _is(target, file.record):
                    counter.add(file.record.bytes)
                    return
                part = _part(folder, file.record)
                with download(file.record, file.record.path, part, counter.watched(file.stream)) as whole:
                    os.fsync(whole.fileno())
                target.parent.mkdir(parents=True, exist_ok=True)
                part.replace(target)
        except OSError as error:
            raise refusal(error) from error

    in_parallel(
        bring_one, files, counter, lambda: progress.update(task, min(counter.bytes, total - 1), total, counter.note(total))
    )
    progress.update(task, total, total)


def _part(folder: Path, record: FileRecord) -> Path:
    return folder / PULL / f"{hashlib.sha256(record.path.encode()).hexdigest()[:32]}.part"


def _is(target: Path, record: FileRecord) -> bool:
    if target.is_symlink() or not target.is_file() or target.stat().st_size != record.bytes:
        return False
    with target.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == record.sha256


def require_room_to_pull(folder: Path, needed: int) -> None:
    elsewhere = "choose a folder on another disk, or pull less: --views 0:10 or --stats-only"
    require_room(folder, needed, "the archive", why="what is there of it already was taken off", elsewhere=elsewhere)


def _missing_bytes(files: Sequence[FileTransfer], folder: Path) -> int:
    missing = 0
    for record in (file.record for file in files):
        held = next((p.stat().st_size for p in (folder / record.path, _part(folder, record)) if p.is_file()), 0)
        missing += max(0, record.bytes - held)
    return missing


class ByteCounter:
    """Counts the bytes that several threads transfer, and can stop them all."""

    def __init__(self) -> None:
        self.bytes = 0
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._began = time.monotonic()

    def add(self, count: int) -> None:
        with self._lock:
            self.bytes += count

    def watched(self, stream: Callable[[int], Iterator[bytes]]) -> Callable[[int], Iterator[bytes]]:
        counted = 0  # bytes of this file; it may restart

        def pieces(start: int) -> Iterator[bytes]:
            nonlocal counted
            self.add(start - counted)
            counted = start
            for piece in stream(start):
                if self.stop.is_set():
                    raise TransferEnded
                self.add(len(piece))
                counted += len(piece)
                yield piece

        return pieces

    def note(self, total: int) -> str:
        speed = self.bytes / max(time.monotonic() - self._began, 1e-9)
        return f"{self.bytes / 1e6:,.1f} of {total / 1e6:,.1f} MB, {speed / 1e6:,.1f} MB/s"


class TransferEnded(BaseException):
    """Internal: this file's transfer ended because another one failed, or because the caller stopped all of them."""


def in_parallel(action: Callable[[Any], None], items: Sequence[Any], counter: ByteCounter, report: Callable[[], None]) -> None:
    """Run `action` on all items, several at a time. The first error, or an interruption, ends all of them."""
    waiting, errors = deque(items), deque[BaseException]()

    def work() -> None:
        with suppress(IndexError):
            while not counter.stop.is_set() and not ending():
                item = waiting.popleft()
                try:
                    action(item)
                except BaseException as error:
                    errors.append(error)
                    counter.stop.set()

    # Plain threads: an executor would make an interrupted process wait for threads that retry a lost server for minutes.
    threads = [threading.Thread(target=work, name="kdcache-transfer") for _ in range(min(WORKERS, len(items)))]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads) and not errors:
            next(thread for thread in threads if thread.is_alive() or thread is threads[-1]).join(0.2)
            report()
    except BaseException:
        counter.stop.set()
        raise
    if errors:
        raise errors[0]
