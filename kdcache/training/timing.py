"""How long work takes where it is done. A GPU is given its work and does it later: a clock of the host would measure the giving,
and the waiting for what others gave it before."""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch

__all__ = ["DeviceTimer", "HostTimer", "Timer", "timer_of"]

MOST_PENDING = 1024  # pairs of events; beyond, the host is as far ahead as a GPU's queue lets it be


class Timer(ABC):
    """Sums up the seconds of pieces of work."""

    @abstractmethod
    def running(self) -> Any:
        """A context: the work that is begun inside counts."""

    @abstractmethod
    def read(self) -> float:
        """Seconds of all work since the last reading. Waits for work that is not done yet."""


class HostTimer(Timer):
    """For a device that works while the host waits: a CPU."""

    def __init__(self) -> None:
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    def read(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Event(Protocol):
    """What of `torch.cuda.Event` is used; `elapsed_time` is in milliseconds."""

    def record(self, stream: Any = None, /) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Any, /) -> float: ...


class DeviceTimer(Timer):
    """For a device that works through a queue: an event before and one after each piece of work, in the device's current
    stream.

    Events are read when they are over, without waiting for them, and used again: no more of them exist than the host is
    ahead by.
    """

    def __init__(self, new_event: Callable[[], Event], record: Callable[[Event], None] = lambda event: event.record()) -> None:
        self._new_event, self._record = new_event, record
        self._pending: deque[tuple[Event, Event]] = deque()
        self._spare: list[tuple[Event, Event]] = []
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        self._collect()
        start, end = self._spare.pop() if self._spare else (self._new_event(), self._new_event())
        self._record(start)
        yield
        self._record(end)
        self._pending.append((start, end))

    def read(self) -> float:
        if self._pending:
            self._pending[-1][1].synchronize()
        self._collect(wait=True)
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _collect(self, wait: bool = False) -> None:
        while self._pending and (wait or len(self._pending) >= MOST_PENDING or self._pending[0][1].query()):
            start, end = pair = self._pending.popleft()
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
            self._spare.append(pair)


def timer_of(device: torch.device) -> Timer:
    """The timer for work on `device`."""
    if device.type == "cuda":
        return DeviceTimer(
            lambda: cast(Event, torch.cuda.Event(enable_timing=True)),  # type: ignore[no-untyped-call]
            # By itself an event is recorded on the current device, which may be another GPU.
            lambda event: event.record(torch.cuda.current_stream(device)),
        )
    return HostTimer()
