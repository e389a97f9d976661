"""The interface of a layout: it turns the fields of a shard into files, and reads them back by position."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.archive.format.manifest import ArchivePlan
from kdcache.archive.format.store import Buffers, Store
from kdcache.codecs import CODECS
from kdcache.registry import Registry

__all__ = ["LAYOUTS", "Buffers", "Layout", "OpeningReader", "ShardReader", "ShardRows", "unit_bytes_rows", "unit_rows"]

UNIT_BYTES = 128 << 10


class ShardRows(Protocol):
    """The rows of one field in one shard, in an opened file."""

    name: str  # of the file

    def gather(self, rows: slice | NDArray[np.int64]) -> NDArray:
        """As `ShardReader.gather`."""

    def pieces(self, rows: slice) -> Iterator[NDArray]:
        """As `ShardReader.pieces`."""

    def checksums(self) -> Sequence[NDArray[np.uint32]]:
        """The checksums of all units of these rows, uint32 `[units]` in one or more parts, as the file holds them.

        Each unit is compared with its own when it is read, so they tell these rows from any other. The parts may be memory
        maps; only what is looked at is read.
        """


class ShardReader(Protocol):
    """Reads the rows of an archive. A reader that has `rows` as well (see `OpeningReader`) is not asked for each of them anew.

    kdcache makes sure, at the first read, that the rows of a shard are those that were written there: by the checksums
    that `rows` gives, or else by reading the field of the shard as a whole.
    """

    def files(self, view: int, block: int) -> list[str]:
        """Names of the files of one shard."""

    def sample_files(self) -> list[str]:
        """Names of the files that labels and keys are read from, if the archive has any."""

    def gather(self, field: str, view: int, block: int, rows: slice | NDArray[np.int64]) -> NDArray:
        """Stored values of `field` at `rows` of a shard, `[n, ...]`. Raises IntegrityError for damaged bytes."""

    def pieces(self, field: str, view: int, block: int, rows: slice) -> Iterator[NDArray]:
        """The rows of a slice, as `gather` gives them, in pieces `[m, ...]` or `[units, rows, ...]` that are not copied.

        Damaged bytes raise IntegrityError, at the end of the last piece at the latest: consume all pieces.
        """

    def labels(self) -> NDArray[np.int64] | None:
        """Stored label of every sample, `[N]`, not checked against the classes."""

    def keys(self) -> list[str] | None: ...


class OpeningReader:
    """Base of readers that open each field of a shard by `rows`. kdcache keeps what is opened, and checks it once."""

    def rows(self, field: str, view: int, block: int) -> ShardRows:
        """Open the rows of a field in a shard. Raises IntegrityError for a file that is damaged or missing."""
        raise NotImplementedError

    def gather(self, field: str, view: int, block: int, rows: slice | NDArray[np.int64]) -> NDArray:
        return self.rows(field, view, block).gather(rows)

    def pieces(self, field: str, view: int, block: int, rows: slice) -> Iterator[NDArray]:
        return self.rows(field, view, block).pieces(rows)


class Layout(Protocol):
    def fit(self, plan: ArchivePlan) -> "Layout":
        """This layout with its sizes fitted to `plan`. Raises UsageError if the two do not go together."""

    def shard_files(self, plan: ArchivePlan, view: int, block: int, fields: Mapping[str, NDArray]) -> dict[str, Buffers]:
        """Name and bytes of each file of one shard; the bytes come in pieces, to avoid a copy."""

    def closing_files(
        self, plan: ArchivePlan, labels: NDArray[np.int64] | None, keys: Sequence[str] | None
    ) -> dict[str, Buffers]:
        """The files that belong to no shard: labels and keys per sample, and metadata for other software."""

    def reading_lines(self, plan: ArchivePlan) -> str:
        """Two lines of Python for the card: they read the logits (or the entropies) of `PATH` without kdcache."""

    def open(self, plan: ArchivePlan, store: Store) -> ShardReader: ...


LAYOUTS: Registry[Layout] = Registry("layout", entry_points="kdcache.layouts")


def unit_bytes_rows(row_bytes: int) -> int:
    """Rows of a unit, a power of two of at most 128 kB. A unit is checksummed, compressed and read as one."""
    return 1 << (max(1, UNIT_BYTES // row_bytes).bit_length() - 1)


def unit_rows(plan: ArchivePlan) -> int:
    """Rows of a unit in shards of `plan`: `unit_bytes_rows`, or the next smaller number that divides a shard's rows."""
    row_bytes = CODECS.from_dict(plan.codec).dtype.itemsize * plan.num_classes
    most = min(unit_bytes_rows(row_bytes), plan.shard_rows)
    return next(rows for rows in range(most, 0, -1) if plan.shard_rows % rows == 0)
