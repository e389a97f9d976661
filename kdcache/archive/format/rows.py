"""Rows of an archive, read lazily."""

import copy
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Rows", "count_of"]

ROW_FIELDS = ("logits", "sample", "argmax", "entropy", "entropy_rest", "digest", "probe")


class _RowSource(Protocol):
    """The archive that rows are read from."""

    def checked(self, name: str, view: int, rows: slice | NDArray[np.int64]) -> NDArray: ...
    def decoded(self, view: int, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]: ...


class Rows:
    """Rows of one view. Each field is read, checked and decoded at its first use. The arrays belong to the caller.

    Reading raises IntegrityError for damaged rows, and IncompatibleError for the logits of an archive without logits.
    """

    def __init__(self, archive: _RowSource, view: int, rows: slice | NDArray[np.int64]) -> None:
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
        """All fields by name."""
        return {name: getattr(self, name) for name in ROW_FIELDS}

    @cached_property
    def logits(self) -> NDArray[np.float32]:
        """The teacher's logits: float32 `[n, C]`."""
        return self._archive.decoded(self._view, self._where)

    @cached_property
    def sample(self) -> NDArray[np.int64]:
        """The sample number at each position: int64 `[n]`."""
        return self._column("sample").astype(np.int64)

    @cached_property
    def argmax(self) -> NDArray[np.int64]:
        """The argmax of the float32 logits before encoding: int64 `[n]`."""
        return self._column("argmax").astype(np.int64)

    @cached_property
    def entropy(self) -> NDArray[np.float32]:
        """Relative entropy H(p) / log C at tau 1: float32 `[n]`."""
        return self._column("entropy")

    @cached_property
    def entropy_rest(self) -> NDArray[np.float32]:
        """Relative entropy without the top class, H(p-bar) / log(C - 1), at tau 1: float32 `[n]`."""
        return self._column("entropy_rest")

    @cached_property
    def digest(self) -> NDArray[np.uint32]:
        """Digest of each view's pixels: uint32 `[n]`."""
        return self._column("digest")

    @cached_property
    def probe(self) -> NDArray[np.uint8]:
        """Mean grey of each view's 4 x 4 grid cells: uint8 `[n, 16]`."""
        return self._column("probe")

    def _column(self, name: str) -> NDArray:
        return self._archive.checked(name, self._view, self._where)


def count_of(rows: slice | NDArray[np.int64]) -> int:
    """Number of rows that a slice or an array of positions selects."""
    return int(rows.stop - rows.start) if isinstance(rows, slice) else len(rows)
