"""Rows of an archive, as they are handed out."""

import copy
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Rows", "count_of"]

ROW_FIELDS = ("logits", "sample", "argmax", "entropy", "entropy_rest", "digest", "probe")


class _Source(Protocol):
    """What rows are read from: an archive."""

    def checked(self, name: str, view: int, rows: slice | NDArray[np.int64]) -> NDArray: ...
    def logits(self, view: int, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]: ...


class Rows:
    """Rows of one view. Each field is read, checked and decoded when it is first asked for; the arrays are the caller's own.

    Reading can raise IntegrityError, and IncompatibleError for the logits of an archive that has none.
    """

    def __init__(self, archive: _Source, view: int, rows: slice | NDArray[np.int64]) -> None:
        self._archive, self._view, self._where = archive, view, rows

    def __len__(self) -> int:
        return count_of(self._where)

    def __getstate__(self) -> dict[str, NDArray]:
        return self.fields()

    def with_logits(self, logits: NDArray[np.float32]) -> "Rows":
        """These rows with other `logits`, float32 `[n, ...]`."""
        changed = copy.copy(self)
        changed.__dict__["logits"] = logits
        return changed

    def load(self) -> "Rows":
        """Read all fields now."""
        self.fields()
        return self

    def fields(self) -> dict[str, NDArray]:
        """All fields by their names."""
        return {name: getattr(self, name) for name in ROW_FIELDS}

    @cached_property
    def logits(self) -> NDArray[np.float32]:
        """Float32 `[n, C]`."""
        return self._archive.logits(self._view, self._where)

    @cached_property
    def sample(self) -> NDArray[np.int64]:
        """Which sample sits at each position: int64 `[n]`."""
        return self._column("sample").astype(np.int64)

    @cached_property
    def argmax(self) -> NDArray[np.int64]:
        """Of the float32 logits, before they were stored: int64 `[n]`."""
        return self._column("argmax").astype(np.int64)

    @cached_property
    def entropy(self) -> NDArray[np.float32]:
        """H^(p) at tau 1, relative: float32 `[n]`."""
        return self._column("entropy")

    @cached_property
    def entropy_rest(self) -> NDArray[np.float32]:
        """H^(p-bar) at tau 1, relative: float32 `[n]`."""
        return self._column("entropy_rest")

    @cached_property
    def digest(self) -> NDArray[np.uint32]:
        """Of each view's pixels: uint32 `[n]`."""
        return self._column("digest")

    @cached_property
    def probe(self) -> NDArray[np.uint8]:
        """Grey means of each view on a 4 x 4 grid: uint8 `[n, 16]`."""
        return self._column("probe")

    def _column(self, name: str) -> NDArray:
        return self._archive.checked(name, self._view, self._where)


def count_of(rows: slice | NDArray[np.int64]) -> int:
    """How many rows a slice or a list of positions names."""
    return int(rows.stop - rows.start) if isinstance(rows, slice) else len(rows)
