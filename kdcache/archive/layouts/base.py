"""What a layout is: it turns the fields of a shard into named bytes, and reads them back by position."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.archive.format.manifest import Plan
from kdcache.archive.format.store import Buffers, Store
from kdcache.codecs import CODECS
from kdcache.registry import Registry

__all__ = ["LAYOUTS", "Buffers", "Layout", "ShardReader", "unit_bytes_rows", "unit_rows"]

UNIT_BYTES = 128 << 10


class ShardReader(Protocol):
    def files(self, view: int, block: int) -> list[str]:
        """Names of the files of one shard."""

    def sample_files(self) -> list[str]:
        """Names of the files that labels and keys are read from, if the archive has any."""

    def gather(self, field: str, view: int, block: int, rows: slice | NDArray[np.int64]) -> NDArray:
        """Stored numbers of `field` at `rows` of a shard, `[n, ...]`; raises IntegrityError for damaged bytes."""

    def pieces(self, field: str, view: int, block: int, rows: slice) -> Iterator[NDArray]:
        """What `gather` gives for a slice, as it lies in the file, in pieces `[m, ...]` or `[units, rows, ...]`: no copies.

        Raises IntegrityError for damaged bytes by the end of the last piece, which must be waited for.
        """

    def labels(self) -> NDArray[np.int64] | None:
        """Stored label of every sample, `[N]`, whatever numbers these are."""

    def keys(self) -> list[str] | None: ...


class Layout(Protocol):
    def fit(self, plan: Plan) -> "Layout":
        """The layout with the sizes that suit `plan`; UsageError where the two do not go together."""

    def shard_files(self, plan: Plan, view: int, block: int, fields: Mapping[str, NDArray]) -> dict[str, Buffers]:
        """Name and bytes of each file of one shard, in pieces that need not be copied together."""

    def closing_files(self, plan: Plan, labels: NDArray[np.int64] | None, keys: Sequence[str] | None) -> dict[str, Buffers]:
        """All files that belong to no shard: labels and keys per sample, and what other software needs to find the rows."""

    def reading_lines(self, plan: Plan) -> str:
        """Two lines of Python that read the logits (or the entropies) of `PATH` without kdcache, for the card."""

    def open(self, plan: Plan, store: Store) -> ShardReader: ...


LAYOUTS: Registry[Layout] = Registry("layout", entry_points="kdcache.layouts")


def unit_bytes_rows(row_bytes: int) -> int:
    """The power of two of rows that takes at most 128 kB: what is checksummed, compressed and read together."""
    return 1 << (max(1, UNIT_BYTES // row_bytes).bit_length() - 1)


def unit_rows(plan: Plan) -> int:
    """Rows of a unit in shards of `plan`: `unit_bytes_rows`, or the next smaller number that divides a shard."""
    row_bytes = CODECS.from_dict(plan.codec).dtype.itemsize * plan.num_classes
    most = min(unit_bytes_rows(row_bytes), plan.shard_rows)
    return next(rows for rows in range(most, 0, -1) if plan.shard_rows % rows == 0)
