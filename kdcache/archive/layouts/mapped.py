"""Rows that lie uncompressed in files. They are memory-mapped, and checked against a crc32c when first read.

In every layout, a shard's rows of one field are a *run*: units of equal size at a fixed stride, each with a crc32c at a
known place. A shorter run follows if the last unit is not full. A reader needs no more than that: it neither loads the
libraries that wrote the files, nor trusts a structure inside them.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from fastcrc.crc32 import iscsi as crc32c
from numpy.typing import NDArray

from kdcache.archive.format.store import Store, open_local
from kdcache.archive.layouts.fields import RowType
from kdcache.errors import IntegrityError
from kdcache.system.mapping import map_readonly
from kdcache.system.refusals import named

__all__ = ["MappedRows", "Run", "damaged", "map_file"]

CACHED = 128 << 10  # bytes of a piece, so that it and the values decoded from it stay in a core's cache


@dataclass(frozen=True)
class Run:
    """`units` units of `rows` rows: start of the first one, stride between them, and the same of their crc32c, in bytes.

    Each unit stores `stored` rows; those beyond `rows` are padding, which the checksum covers.
    """

    units: int
    rows: int
    stored: int
    start: int
    stride: int
    crc_start: int
    crc_stride: int


def map_file(store: Store, name: str, expected: int | None = None) -> NDArray[np.uint8]:
    """Map the bytes of a file. Raises IntegrityError if it is empty or not `expected` bytes long."""
    with open_local(store, name) as file, named(f"{store.name}/{name}"):
        size = os.fstat(file.fileno()).st_size
        if not size or expected not in {None, size}:
            raise damaged(name, f"has {size:,} bytes" + ("" if expected is None else f", expected {expected:,}"))
        return np.frombuffer(map_readonly(file, size), np.uint8)


class MappedRows:
    """The rows of one field in one shard. The caller must have checked that all offsets of the runs lie within `data`."""

    def __init__(self, name: str, data: NDArray[np.uint8], row: RowType, runs: Sequence[Run]) -> None:
        self.name = name
        self._shape = row[1]
        self._runs = [_MappedRun(name, data, row, run) for run in runs]
        self._firsts = [0, *itertools.accumulate(run.units * run.rows for run in runs)]

    def checksums(self) -> list[NDArray[np.uint32]]:
        return [run.crcs for run in self._runs]

    def pieces(self, rows: slice) -> Iterator[NDArray]:
        """The rows of a slice as they lie in the file, `[m, ...]`, or `[units, rows, ...]` for several whole units.

        A piece fits into a core's cache. Its checksums are compared when the next piece is requested, so values computed
        from the pieces are sound only after the last one.
        """
        wanted = [
            run.pieces(max(rows.start - first, 0), min(rows.stop, last) - first)
            for run, (first, last) in zip(self._runs, itertools.pairwise(self._firsts), strict=True)
            if rows.start < last and rows.stop > first
        ]
        return wanted[0] if len(wanted) == 1 else itertools.chain.from_iterable(wanted)

    def gather(self, rows: slice | NDArray[np.int64]) -> NDArray:
        """The rows at a slice or an array of places, `[n, ...]`. A slice gives a view of the file where possible."""
        if isinstance(rows, slice):
            parts = [part.reshape(-1, *self._shape) for part in self.pieces(rows)]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        if len(self._runs) == 1:
            return self._runs[0].take(rows)
        which = np.searchsorted(self._firsts, rows, side="right") - 1
        parts = [run.take(rows[which == i] - self._firsts[i]) for i, run in enumerate(self._runs)]
        result = np.empty((len(rows), *parts[0].shape[1:]), parts[0].dtype)
        for i, part in enumerate(parts):
            result[which == i] = part
        return result


class _MappedRun:
    def __init__(self, name: str, data: NDArray[np.uint8], row: RowType, run: Run) -> None:
        self._name, self._run = name, run
        dtype, shape = row
        row_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        inner = np.ndarray(shape, dtype).strides
        self._payload = run.stored * row_bytes
        self._bytes = memoryview(data)  # type: ignore[arg-type]  # typeshed: arrays are buffers
        self.crcs = np.ndarray(run.units, "<u4", data, run.crc_start, (run.crc_stride,))
        self._rows = np.ndarray((run.units, run.rows, *shape), dtype, data, run.start, (run.stride, row_bytes, *inner))
        self._known = bytearray(run.units)  # 1 for units whose checksum was compared; faster than an array
        self._checked = np.frombuffer(self._known, np.bool_)
        self._together = max(1, CACHED // self._payload)

    def pieces(self, start: int, stop: int) -> Iterator[NDArray]:
        size = self._run.rows
        unit = start // size
        while unit * size < stop:
            inside = start - unit * size
            units = 1 if inside > 0 else min(max((stop - unit * size) // size, 1), self._together)
            yield self._rows[unit, max(inside, 0) : stop - unit * size] if units == 1 else self._rows[unit : unit + units]
            # Decoding has brought the piece into the cache, where a checksum takes a fifth of the time.
            if self._known.find(0, unit, unit + units) >= 0:
                self._check(unit, unit + units)
            unit += units

    def take(self, rows: NDArray[np.int64]) -> NDArray:
        unit, inside = np.divmod(rows, self._run.rows)
        if not self._checked[unit].all():
            for number in np.unique(unit[~self._checked[unit]]).tolist():
                self._check(number, number + 1)
        result: NDArray = self._rows[unit, inside]
        return result

    def _check(self, first: int, last: int) -> None:
        for unit, stored in enumerate(self.crcs[first:last].tolist(), first):
            start = self._run.start + unit * self._run.stride
            if not self._known[unit] and (actual := crc32c(self._bytes[start : start + self._payload])) != stored:
                raise damaged(self._name, f"chunk {unit}: crc32c is {actual:08x}, stored beside it is {stored:08x}")
            self._known[unit] = True


def damaged(name: str, damage: str) -> IntegrityError:
    return IntegrityError(
        f"{name}: {damage}",
        why="the file's bytes are not those that were written",
        fix="restore this file from a copy, or run the dump again with --output FOLDER; kdcache verify lists all damage",
    )
