"""What commands print: results on stdout, notes and progress on stderr."""

import errno
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kdcache.errors import printable
from kdcache.system.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.table import Table

OTHER_LINES = 8  # of a terminal: bars, the table's head, and room to see what was said before

__all__ = ["Bars", "bars", "print_json", "print_table"]


class Bars:
    """Progress as rich bars on a terminal, and as a line every few seconds elsewhere (a log file, CI)."""

    def __init__(self) -> None:
        from rich.console import Console, RenderableType
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Table

        class Quietly(Console):
            def on_broken_pipe(self) -> None:
                self.quiet = True  # work goes on although nobody reads the notes any more

        class BelowTable(RichProgress):
            def get_renderables(bars) -> Iterator[RenderableType]:  # noqa: N805
                if self._table is not None:
                    yield self._table
                yield from super().get_renderables()

        self.console = Quietly(stderr=True, highlight=False)
        self._table: Table | None = None
        self.rich = BelowTable(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}
        self._printed: dict[str, float] = {}

    def update(self, task: str, done: int, total: int, note: str = "") -> None:
        if self.console.is_terminal:
            if task not in self._tasks:
                self._tasks[task] = self.rich.add_task(task, total=total, note=note)
            self.rich.update(self._tasks[task], completed=done, total=total, note="" if done >= total else note)
            if done >= total:
                # Its bar stays on the screen; the same work may well be done again later, with a bar of its own.
                del self._tasks[task]
            return
        now = time.monotonic()
        if done >= total or now - self._printed.setdefault(task, now) >= 10:
            self._printed[task] = now
            self.say(f"{task}: {done}/{total} {note if done < total else 'done'}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if not self.console.is_terminal:  # a log file has room for results, not for how they came about
            return
        shown = rows[: max(self.console.height - OTHER_LINES, 1)]
        self._table = _table(columns, shown) if rows else None
        if self._table is not None and len(shown) < len(rows):
            self._table.caption = f"and {len(rows) - len(shown)} more"
        self.rich.refresh()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


@contextmanager
def bars(*, quiet: bool = False) -> Iterator[Progress]:
    """Progress on stderr; none of it where another process shows its own."""
    if quiet:
        yield Silent()
        return
    shown = Bars()
    with shown.rich:
        yield shown


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


def print_table(columns: list[str], rows: list[list[Any]], *, title: str | None = None) -> None:
    """A table on stdout; cells that are None are left empty. Not cut to the width of a terminal when piped."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError(errno.EPIPE, "nobody reads the results")

    console = Output(highlight=False)
    if not console.is_terminal:
        console = Output(highlight=False, width=200)
    table = _table(columns, rows)
    table.title, table.title_justify = title, "left"
    console.print(table, markup=False)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        numeric = all(isinstance(row[number], int | float) or row[number] is None for row in rows) and bool(rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else Text(printable(cell)) for cell in row))
    return table
