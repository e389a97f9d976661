"""Free space on disks, and amounts in words: two that differ are never shown as the same."""

import shutil
from pathlib import Path

from kdcache.errors import RetryError
from kdcache.system.refusals import ROOM

__all__ = ["free_bytes", "numbers", "require_room", "sizes"]

_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that `path`, which need not exist, is or would be on."""
    return shutil.disk_usage(next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())).free


def require_room(path: Path, needed: int, what: str, *, why: str, elsewhere: str) -> None:
    """Raises RetryError, before the work begins, if the disk of `path` has no room for `needed` bytes of `what`.

    elsewhere: how to choose another disk.
    """
    free = free_bytes(path)
    if needed > free:
        wanted, there = sizes(needed, free)
        raise RetryError(f"{what} needs {wanted} more, {path} has {there}", why=why, fix=f"{ROOM}, or {elsewhere}")


def sizes(*counts: float) -> list[str]:
    """Numbers of bytes in the unit of the largest, with as many digits as tell those apart that differ."""
    unit, size = next(((unit, size) for unit, size in _UNITS if max(counts) >= size), ("bytes", 1))
    for digits in range(1 if size > 1 else 0, 4):
        shown = [f"{count / size:,.{digits}f} {unit}" for count in counts]
        if len(set(shown)) == len(set(counts)):
            return shown
    return [f"{count:,.0f} bytes" for count in counts]


def numbers(*values: float) -> list[str]:
    """Numbers with at least three significant digits, and as many as tell those apart that differ."""
    for digits in range(3, 18):
        shown = [f"{value:.{digits}g}" for value in values]
        if len(set(shown)) == len(set(values)):
            break
    return shown
