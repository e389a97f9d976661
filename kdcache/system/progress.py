"""Progress of long work, reported by the library. Only the command line displays it."""

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    def update(self, task: str, done: int, total: int, note: str = "") -> None:
        """Report that `done` of `total` steps of `task` are finished. The task ends when the two are equal."""

    def say(self, text: str) -> None:
        """Report one line worth keeping: a decision, a resolved name, an estimate."""

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show the present state as a table. It replaces the last one; a table without rows removes it."""


class Silent:
    """Progress that displays nothing."""

    def update(self, task: str, done: int, total: int, note: str = "") -> None:
        return

    def say(self, text: str) -> None:
        return

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        return
