"""How processes of one job wait for each other without a limit, and yet not for one that has failed.

A collective operation of torch waits for a process that never comes, until its time limit. So a process that fails says why
in the store through which the processes have met, and a thread of every other one looks there: its process ends by itself
or, if it does not within seconds, is ended.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from kdcache.errors import KdcacheError, RetryError

__all__ = ["Alarm", "BrokenUpError", "Store"]

LOOK = 0.5  # seconds between two looks for a failure
LEAVE = 5.0  # seconds in which a process may end by itself after another one has failed; then what it waits for is broken off
LAST = 10.0  # seconds after that until it is ended
LINGER = 10.0  # seconds that a failed process waits for others to hear of it
LAST_ANSWERS = 60.0  # seconds that the process with the store waits for the others' last questions
LONGEST_PAUSE = 0.5  # seconds between two looks at a count

FAILED, HEARD, LEFT = "failed", "heard", "left"


class BrokenUpError(RuntimeError):
    """Another process has left what was done together, for a meeting."""


class Store(Protocol):
    """As much of `torch.distributed.Store` as is needed here."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def add(self, key: str, amount: int) -> int: ...
    def check(self, keys: list[str]) -> bool: ...


class Alarm:
    """That of process `number` of `of`, through a `store` that all of them have.

    break_off: makes operations that this process waits for end with an error.
    """

    def __init__(self, number: int, of: int, store: Store, break_off: Callable[[], None] = lambda: None) -> None:
        self._number, self._of, self._store, self._break_off = number, of, store, break_off
        self.agreed = False
        self._meetings = self._waits = 0
        self._apart = False
        self._heard, self._left = threading.Event(), threading.Event()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Work inside is cut short when another process fails; its own failure is told to the others.

        Errors that come of another's failure are replaced by that one, in a text that names the process.
        """
        threading.Thread(target=self._watch, name="kdcache-alarm", daemon=True).start()
        try:
            yield
        except BaseException as error:
            if not self.agreed and (failure := self._cause_of(error)) is not error:
                raise failure from error
            raise
        finally:
            self._left.set()
            with contextlib.suppress(RuntimeError):
                self._store.add(LEFT, 1)

    def agree(self) -> None:
        """All processes end now, and know it."""
        self.agreed = True

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Work inside needs no other process, and goes on if one fails. Whoever waits for that one afterwards is told.

        This is so as far as it is for kdcache to decide. Starters end all processes if one fails: torchrun sends the others
        SIGTERM, at which they stop after a checkpoint, and the same command goes on from there; mpirun kills them.
        """
        self._apart = True
        yield
        self._apart = False

    def wait(self) -> None:
        """Until all processes are here, however long that takes.

        Raises the error of one that fails meanwhile; BrokenUpError if one leaves what is done together.
        """
        self._waits += 1
        self._wait(f"wait/{self._meetings}/{self._waits}", lambda: self.is_broken_up)

    def break_up(self) -> None:
        """Let all processes leave what they do together, by BrokenUpError or any other RuntimeError, for the next meeting."""
        self._store.set(self._next_meeting, "asked for")

    @property
    def is_broken_up(self) -> bool:
        """Whether some process has asked for a meeting, at which this one is not yet."""
        return self._store.check([self._next_meeting])

    def meet(self) -> int:
        """Until all processes have left what they did together; the number of the meeting."""
        self._wait(f"{self._next_meeting}/here", lambda: False)
        self._meetings, self._waits = self._meetings + 1, 0
        return self._meetings

    @property
    def _next_meeting(self) -> str:
        return f"meeting/{self._meetings + 1}"

    def _wait(self, key: str, in_vain: Callable[[], bool]) -> None:
        self._store.add(key, 1)
        for _ in _looks():
            if self._store.add(key, 0) >= self._of:
                return
            if (failure := self._failure()) is not None:
                raise failure
            if in_vain():
                raise BrokenUpError("another process has left")

    def linger(self) -> None:
        """The process that has the store ends last: others may still have questions."""
        self._count(LEFT, self._of, LAST_ANSWERS)

    def _count(self, key: str, enough: int, seconds: float) -> None:
        with contextlib.suppress(RuntimeError):
            for _ in _looks(seconds):
                if self._store.add(key, 0) >= enough:
                    return

    def _cause_of(self, error: BaseException) -> BaseException:
        """The failure of another process that `error` comes of; or itself, which the others are told then."""
        other = self._failure()
        if other is not None:
            self._hear()
            if not self._apart:
                return error if isinstance(error, KdcacheError) else other
        cause = _gone(str(error)) if _is_lost(error) else error
        with contextlib.suppress(RuntimeError):
            self._store.set(FAILED, json.dumps(_described(cause) | {"number": self._number}))
        self._count(HEARD, self._of - 1, LINGER)  # the store may end with this process, and starters end all others then
        return cause

    def _failure(self) -> KdcacheError | None:
        """The failure of another process, if there is one."""
        try:
            if not self._store.check([FAILED]):
                return None
            told = json.loads(self._store.get(FAILED))
        except RuntimeError as error:
            return _gone(str(error))
        return None if told["number"] == self._number else _failure(told, self._of)

    def _hear(self) -> None:
        """Once, let the process that failed know that it was heard."""
        if not self._heard.is_set():
            self._heard.set()
            with contextlib.suppress(RuntimeError):
                self._store.add(HEARD, 1)

    def _watch(self) -> None:
        asked = 0.0  # seconds in which this process did not leave for a meeting
        while (failure := self._failure()) is None:
            if self._left.wait(LOOK):
                return
            with contextlib.suppress(RuntimeError):
                asked = asked + LOOK if self.is_broken_up else 0.0
            if LEAVE <= asked < LEAVE + LOOK:
                threading.Thread(target=self._break_off, daemon=True).start()
        self._hear()
        while self._apart:
            if self._left.wait(LOOK):
                return
        if self._left.wait(LEAVE):
            return
        threading.Thread(target=self._break_off, daemon=True).start()  # which may itself wait for ever
        if not self._left.wait(LAST) and not self.agreed:
            print(failure, file=sys.stderr, flush=True)
            os._exit(failure.exit_code)


def _looks(seconds: float = float("inf")) -> Iterator[None]:
    """Turns with growing pauses between them."""
    deadline, pause = time.monotonic() + seconds, 0.001
    while time.monotonic() < deadline:
        yield
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _described(error: BaseException) -> dict[str, str | int]:
    if isinstance(error, KdcacheError):
        return {"what": error.what, "why": error.why, "fix": error.fix, "status": error.exit_code}
    if isinstance(error, KeyboardInterrupt):
        return {"what": "it was interrupted"}
    return {"what": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}


def _failure(told: dict[str, str | int], of: int) -> KdcacheError:
    """What another process has told, as an error here."""
    who = f"process {told['number']} of {of}"
    kind = next((kind for kind in KdcacheError.__subclasses__() if kind.exit_code == told.get("status")), None)
    if kind is None:
        return RetryError(
            f"{who} failed: {told['what']}",
            why="this one cannot go on without it",
            fix=f"see what process {told['number']} printed, mend that, and repeat the command: it goes on from its checkpoint",
        )
    return kind(f"{who}: {told['what']}", why=str(told["why"]), fix=str(told["fix"]))


def _is_lost(error: BaseException) -> bool:
    """Whether an operation of several processes failed since a connection did."""
    return isinstance(error, RuntimeError) and (type(error).__name__.startswith("Dist") or "gloo/" in str(error))


def _gone(reason: str) -> KdcacheError:
    return RetryError(
        "another process of this job ended without a word, or cannot be reached",
        why=(reason.splitlines() or [""])[0][:200],
        fix="see what the other processes printed, and repeat the command: it goes on from the last checkpoint",
    )
