"""How long work tells its caller where it is. The library calls it; only the command line draws anything."""

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    def update(self, task: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` steps of `task` are finished; a task is over when the two are equal."""

    def say(self, text: str) -> None:
        """One line worth keeping: a decision taken, a name resolved, an estimate."""

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """How things stand now. It takes the place of the last such table; one without rows clears it away."""


class Silent:
    """Progress that nobody watches."""

    def update(self, task: str, done: int, total: int, note: str = "") -> None:
        return

    def say(self, text: str) -> None:
        return

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        return
