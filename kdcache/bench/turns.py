"""The measuring method of the benchmarks."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kdcache.system.progress import Progress

__all__ = ["Result", "taking_turns"]


@dataclass(frozen=True)
class Result:
    """A result. `value` is `measured` over `against` (medians of the turns), or has the unit that `against` names.

    The benchmark fails if `value` exceeds `bound`."""

    name: str
    measured: str
    against: str
    value: float
    bound: float


def taking_turns(task: str, seconds: float, progress: Progress, *sides: Callable[[], object]) -> list[float]:
    """Median seconds of each side, from at least three turns within `seconds`, after one unmeasured turn."""
    for side in sides:
        side()
    taken: list[list[float]] = [[] for _ in sides]
    begin = time.monotonic()
    while len(taken[0]) < 3 or time.monotonic() - begin < seconds:
        for side, times in zip(sides, taken, strict=True):
            started = time.perf_counter()
            side()
            times.append(time.perf_counter() - started)
        progress.update(task, min(int(time.monotonic() - begin), int(seconds) - 1), int(seconds))
    progress.update(task, int(seconds), int(seconds))
    return [float(np.median(times)) for times in taken]
