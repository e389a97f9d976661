"""The machine without its GPUs: processors, memory, limits, disks, locks."""

import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kdcache.doctor.findings import Line, gigabytes, note, ok, problem
from kdcache.system.refusals import ROOM, remedy

__all__ = ["folder", "limits", "locks", "memory", "processors"]

LITTLE_MEMORY, LITTLE_DISK = 2e9, 5e9  # bytes
SHARED_MEMORY = 1e9  # a batch of 256 views of 224 px has 39 MB, and each worker keeps two ahead
OPEN_FILES = 1024


def processors() -> Iterator[Line]:
    usable, all_of_them = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), os.cpu_count()
    yield ok("processor", f"{_processor()}, {usable} of {all_of_them} cores usable")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def memory(available: int | None = None) -> Iterator[Line]:
    """`available`: bytes that this process may take within the limits of its control groups, if they are known."""
    import psutil

    found = psutil.virtual_memory()
    free = found.available if available is None else min(found.available, available)
    text = f"{gigabytes(found.total)}, {gigabytes(free)} free for this process"
    if free < LITTLE_MEMORY:
        yield note("memory", f"{text}, which is little", "end other programs, or ask the scheduler for more")
    else:
        yield ok("memory", text)


def limits() -> Iterator[Line]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES:
        fix = f"ulimit -n {OPEN_FILES if hard < 0 else min(hard, 8 * OPEN_FILES)}"
        yield note("open files", f"{soft} at once, too few for many workers", fix)
    else:
        yield ok("open files", f"{soft if soft >= 0 else 'any number'} at once")
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        if free < SHARED_MEMORY:
            text = f"{gigabytes(free)} free in {shared}, through which workers pass views: they may end with a bus error"
            yield problem("shared memory", text, "docker run --shm-size 8g ..., or --workers 0 (which is the default)")
        else:
            yield ok("shared memory", f"{gigabytes(free)} free in {shared}")


def folder(name: str, path: Path, other: str) -> Iterator[Line]:
    """A folder that kdcache writes to: whether it may, and free space. `other` says how to choose another."""
    shown, place = path.absolute(), _existing(path)
    if not place.is_dir():
        yield problem(name, f"{shown} cannot be a folder: {place} is a file", other)
        return
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        yield problem(name, f"{shown}: this user may not read and write {place}", other)
        return
    free = shutil.disk_usage(place).free
    text = f"{shown}{'' if place == shown else ' (not there yet)'}, {gigabytes(free)} free"
    if free < LITTLE_DISK:
        yield note(name, f"{text}, which is little", f"{ROOM}, or {other}")
    else:
        yield ok(name, text)


def _existing(path: Path) -> Path:
    """The path, or the nearest one above it that exists and can be seen."""
    absolute = path.absolute()
    return next(each for each in (absolute, *absolute.parents) if os.path.exists(each))  # noqa: PTH110  # no PermissionError


def locks(home: Path) -> Iterator[Line]:
    """Whether a second lock of a file is refused below `home`. The file is removed again."""
    from kdcache.system.locks import NoLocksError, locked

    place, name = _existing(home), "file locks"
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        yield note(name, "not tried, as nothing can be written there")
        return
    try:
        with tempfile.TemporaryDirectory(prefix=".kdcache-doctor-", dir=place) as made:
            file = Path(made) / "lock"
            with locked(file, wait=False) as first, locked(file, wait=False) as second:
                held = first and not second
    except NoLocksError:
        text = f"the file system of {place} has none: processes that share an archive must be told apart by --shard I/N"
        yield note(name, text, "mount it with locks (Lustre: -o flock), or choose another --home")
    except OSError as error:
        yield problem(name, f"{place}: {error.strerror}", f"{remedy(error, place) or 'mend the cause'}; or choose another --home")
    else:
        if held:
            yield ok(name, f"work in {place}")
        else:
            text = f"the file system of {place} grants a lock twice: two processes may write the same file"
            yield problem(name, text, "choose another --home, on a local disk")
