"""WebDataset: one tar file a shard, one record for every few hundred rows, each field a NumPy array of its own.

A record is `KEY.logits.npy`, `KEY.sample.npy` and so on, with `KEY.crc32c.npy` behind them, so that
`webdataset.WebDataset(url).decode()` yields blocks of rows. All records of a shard but the last have one size, so the
tar file is an array with a stride. kdcache reads it through a memory map and never unpacks it.
"""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from fastcrc.crc32 import iscsi as crc32c
from numpy.typing import NDArray
from pydantic_core import from_json

from kdcache.archive.format.manifest import ArchivePlan
from kdcache.archive.format.store import Store, as_bytes
from kdcache.archive.layouts.base import LAYOUTS, Buffers, OpeningReader, unit_rows
from kdcache.archive.layouts.fields import RowType, row_fields
from kdcache.archive.layouts.mapped import MappedRows, Run, damaged, map_file
from kdcache.codecs import CODECS
from kdcache.errors import IntegrityError, UsageError

__all__ = ["WebDatasetLayout"]

BLOCK = 512  # bytes of a tar block
END = bytes(2 * BLOCK)
BATCH = 1024  # records whose headers are compared at a time
UNITS = 4  # units of a record; the tar headers of its fields are then 2 % of it
SAMPLES = "samples.tar"
INDEX = "index.json"
CRC32C: RowType = (np.dtype("<u4"), ())


@LAYOUTS.register("webdataset")
@dataclass(frozen=True)
class WebDatasetLayout:
    """Tar shards for webdataset pipelines; `record_rows` rows make a record (1: one record for every row)."""

    record_rows: int | None = None

    def __post_init__(self) -> None:
        if self.record_rows is not None and not (isinstance(self.record_rows, int) and self.record_rows >= 1):
            raise UsageError(
                f"layout webdataset with record_rows {self.record_rows!r}",
                why="a record holds a whole number of rows, and at least one",
                fix="--layout webdataset, or webdataset:1 for a record of each row",
            )

    def fit(self, plan: ArchivePlan) -> "WebDatasetLayout":
        return WebDatasetLayout(min(self.record_rows or UNITS * unit_rows(plan), plan.shard_rows))

    @property
    def _size(self) -> int:
        assert self.record_rows is not None, "a layout that was fitted to a plan"
        return self.record_rows

    def shard_files(self, plan: ArchivePlan, view: int, block: int, fields: Mapping[str, NDArray]) -> dict[str, Buffers]:
        columns = {name: np.ascontiguousarray(fields[name], dtype) for name, (dtype, _) in row_fields(plan).items()}
        parts: Buffers = []
        for number, start in enumerate(range(0, plan.block_rows(block), self._size)):
            record = {name: column[start : start + self._size] for name, column in columns.items()}
            crcs = [crc32c(as_bytes(column)) for column in record.values()]
            for name, array in {**record, "crc32c": np.array(crcs, "<u4")}.items():
                parts += _member(f"{_key(view, block, number)}.{name}.npy", _npy_header(array.dtype, array.shape), array)
        return {_shard(view, block): [*parts, END]}

    def closing_files(
        self, plan: ArchivePlan, labels: NDArray[np.int64] | None, keys: Sequence[str] | None
    ) -> dict[str, Buffers]:
        shards = [
            {"url": _shard(view, block), "nsamples": -(-plan.block_rows(block) // self._size)}
            for view in plan.views
            for block in range(plan.num_blocks)
        ]
        index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards}
        files: dict[str, Buffers] = {INDEX: [json.dumps(index, indent=1).encode()]}
        samples: Buffers = []
        if labels is not None:
            column = labels.astype("<i8")
            samples += _member("samples.label.npy", _npy_header(column.dtype, column.shape), column)
        if keys is not None:
            samples += _member("samples.key.json", b"", np.frombuffer(json.dumps(list(keys)).encode(), np.uint8))
        if samples:
            files[SAMPLES] = [*samples, END]
        return files

    def reading_lines(self, plan: ArchivePlan) -> str:
        shard = f'"PATH/{_shard(plan.first_view, 0)}"'
        opening = f"import webdataset; r = next(iter(webdataset.WebDataset({shard}, shardshuffle=False).decode()))"
        place = f"view {plan.first_view}, positions 0:{min(self._size, plan.block_rows(0))}"
        if plan.contents == "statistics":
            return f'{opening}\nentropy = r["entropy.npy"]  # {place}'
        names = ("logits", *CODECS.from_dict(plan.codec).parameters)
        logits = CODECS.from_dict(plan.codec).formula.format_map({name: f'r["{name}.npy"]' for name in names})
        return f"{opening}\nlogits = {logits}  # {place}"

    def open(self, plan: ArchivePlan, store: Store) -> "WebDatasetReader":
        if type(self.record_rows) is not int or not 1 <= self.record_rows <= plan.shard_rows:
            raise IntegrityError(
                f"shards of {plan.shard_rows} rows in records of {self.record_rows!r}",
                why="a shard has at least one record; the manifest is damaged",
                fix="restore kdcache.json from a copy of the archive",
            )
        return WebDatasetReader(plan, store, self.record_rows)


def _shard(view: int, block: int) -> str:
    return f"view-{view:05d}/shard-{block:05d}.tar"


def _key(view: int, block: int, record: int) -> str:
    return f"{view:05d}-{block:05d}-{record:06d}"


def _member(name: str, head: bytes, array: NDArray) -> Buffers:
    """One tar member: tar header, `head`, the array's bytes, and padding."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(head) + array.nbytes, 0o444
    padding = bytes(-info.size % BLOCK)
    parts: Buffers = [info.tobuf(tarfile.USTAR_FORMAT) + head, as_bytes(array)]
    return [*parts, padding] if padding else parts


@lru_cache(maxsize=256)
def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return out.getvalue()


@dataclass(frozen=True)
class _Places:
    """Offsets of the members of a record of `rows` rows, from the record's start, and the size of each."""

    rows: int
    heads: dict[str, bytes]  # NumPy's headers, which follow those of tar
    headers: dict[str, int]
    data: dict[str, int]
    sizes: dict[str, int]
    length: int

    @classmethod
    def of(cls, fields: Mapping[str, RowType], rows: int) -> "_Places":
        heads, headers, data, sizes, at = {}, {}, {}, {}, 0
        shapes = {name: (dtype, (rows, *shape)) for name, (dtype, shape) in fields.items()}
        for name, (dtype, shape) in {**shapes, "crc32c": (CRC32C[0], (len(fields),))}.items():
            heads[name] = _npy_header(dtype, shape)
            headers[name], data[name] = at, at + BLOCK + len(heads[name])
            sizes[name] = len(heads[name]) + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            at += BLOCK + sizes[name] + -sizes[name] % BLOCK
        return cls(rows, heads, headers, data, sizes, at)


class WebDatasetReader(OpeningReader):
    """Reads records at computed offsets, and compares the tar headers there with the expected ones."""

    def __init__(self, plan: ArchivePlan, store: Store, record_rows: int) -> None:
        self._plan, self._store, self._size = plan, store, record_rows
        self._fields = row_fields(plan)
        self._file = lru_cache(maxsize=512)(self._open)

    def files(self, view: int, block: int) -> list[str]:
        return [_shard(view, block)]

    def _records(self, block: int) -> list[tuple[int, int, _Places]]:
        """(first number, count, offsets) of the full records, and then of a last one that is not full, if any."""
        full, left = divmod(self._plan.block_rows(block), self._size)
        records = [(0, full, _Places.of(self._fields, self._size))] if full else []
        return [*records, (full, 1, _Places.of(self._fields, left))] if left else records

    def _open(self, view: int, block: int) -> NDArray[np.uint8]:
        name, records = _shard(view, block), self._records(block)
        expected = sum(count * places.length for _, count, places in records) + len(END)
        data = map_file(self._store, name, expected)
        start = 0
        for first, count, places in records:
            for begin in range(0, count, BATCH):
                keys = [_key(view, block, first + number) for number in range(begin, min(begin + BATCH, count))]
                for member, at in places.headers.items():
                    head = places.heads[member]
                    headers = np.ndarray((len(keys), BLOCK + len(head)), np.uint8, data, start + at, (places.length, 1))
                    _check_headers(name, headers, [f"{key}.{member}.npy" for key in keys], places.sizes[member], head)
                start += len(keys) * places.length
        return data

    def rows(self, field: str, view: int, block: int) -> MappedRows:
        data = self._file(view, block)
        number, start, runs = list(self._fields).index(field), 0, []
        for _, count, places in self._records(block):
            crcs = start + places.data["crc32c"] + 4 * number
            begin = start + places.data[field]
            runs.append(Run(count, places.rows, places.rows, begin, places.length, crcs, places.length))
            start += count * places.length
        return MappedRows(_shard(view, block), data, self._fields[field], runs)

    def sample_files(self) -> list[str]:
        return [SAMPLES]

    def labels(self) -> NDArray[np.int64] | None:
        data = self._sample_member("samples.label.npy")
        if data is None:
            return None
        head = _npy_header(np.dtype("<i8"), (self._plan.num_samples,))
        if data[: len(head)] != head or len(data) != len(head) + 8 * self._plan.num_samples:
            raise damaged(SAMPLES, f"does not hold {self._plan.num_samples:,} labels")
        labels: NDArray[np.int64] = np.frombuffer(data, "<i8", offset=len(head)).astype(np.int64)
        return labels

    def keys(self) -> list[str] | None:
        data = self._sample_member("samples.key.json")
        if data is None:
            return None
        try:
            keys = from_json(data)
        except ValueError:
            keys = None
        if not isinstance(keys, list) or len(keys) != self._plan.num_samples or not all(isinstance(key, str) for key in keys):
            raise damaged(SAMPLES, f"does not hold {self._plan.num_samples:,} keys")
        return keys

    def _sample_member(self, name: str) -> bytes | None:
        """One member of the file of labels and keys; None if it is absent."""
        if not self._store.exists(SAMPLES):
            return None
        data, at = map_file(self._store, SAMPLES), 0
        while at + BLOCK <= len(data) - len(END):
            try:
                info = tarfile.TarInfo.frombuf(data[at : at + BLOCK].tobytes(), "utf-8", "strict")
            except (tarfile.TarError, ValueError):
                raise damaged(SAMPLES, "is not a tar file") from None
            if info.type != tarfile.REGTYPE or not 0 <= info.size <= len(data) - at - BLOCK:
                raise damaged(SAMPLES, f"has a member {info.name!r} that is no plain file in it")
            if info.name == name:
                return data[at + BLOCK : at + BLOCK + info.size].tobytes()
            at += BLOCK + info.size + -info.size % BLOCK
        return None


def _check_headers(file: str, headers: NDArray[np.uint8], names: Sequence[str], size: int, head: bytes) -> None:
    """Check headers `[n, 512 + len(head)]`: each must be tar's for a plain file of this name and size, then NumPy's `head`.

    kdcache finds rows without them. The check makes sure that other software, which uses them, reads the same rows.
    """
    expected = np.array([name.encode() for name in names], "S100").view(np.uint8).reshape(-1, 100)
    sizes = np.frombuffer(f"{size:011o}\0".encode(), np.uint8)
    if sizes.size > 12:
        raise damaged(file, f"has members of {size:,} bytes, which tar cannot")
    wrong = (headers[:, :100] != expected).any(axis=1)
    wrong |= (headers[:, 124:136] != sizes).any(axis=1)
    wrong |= (headers[:, 156] != ord("0")) | (headers[:, 157:257] != 0).any(axis=1)
    wrong |= (headers[:, 345:BLOCK] != 0).any(axis=1)  # tar's prefix of the name
    wrong |= (headers[:, BLOCK:] != np.frombuffer(head, np.uint8)).any(axis=1)
    if wrong.any():
        raise damaged(file, f"has another header than that of {names[int(np.argmax(wrong))]} ({size:,} bytes)")
