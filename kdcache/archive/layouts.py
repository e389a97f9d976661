"""How rows lie in files. A layout turns the fields of a shard into named bytes, and reads them back by position.

Fields of a shard of `n` rows, all view-major in the archive (`[V, N, ...]`):

    logits        codec's dtype [n, C]    argmax  int32 [n]     sample  int32 [n]
    entropy       float32 [n]             entropy_rest float32 [n]   (relative, tau 1)
    digest        uint32 [n]              probe   uint8 [n, 16]
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from kdcache.archive.manifest import Plan
from kdcache.archive.store import LocalStore
from kdcache.codecs import codec
from kdcache.errors import IntegrityError, UsageError
from kdcache.registry import Registry

__all__ = ["FIELDS", "Layout", "ShardReader", "layout", "row_fields", "rows_sha256"]

FIELDS = ("logits", "argmax", "sample", "entropy", "entropy_rest", "digest", "probe")
PROBE_BYTES = 16


def row_fields(plan: Plan) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """dtype and shape of one row of every field."""
    return {
        "logits": (codec.from_dict(plan.codec).dtype, (plan.num_classes,)),
        "argmax": (np.dtype("<i4"), ()),
        "sample": (np.dtype("<i4"), ()),
        "entropy": (np.dtype("<f4"), ()),
        "entropy_rest": (np.dtype("<f4"), ()),
        "digest": (np.dtype("<u4"), ()),
        "probe": (np.dtype("u1"), (PROBE_BYTES,)),
    }


def rows_sha256(logits: NDArray[np.float32], fields: dict[str, NDArray]) -> str:
    """sha256 of a shard's decoded rows: the fields in `FIELDS` order, little-endian, logits as float32."""
    digest = hashlib.sha256()
    for name in FIELDS:
        digest.update(np.ascontiguousarray(logits if name == "logits" else fields[name]).tobytes())
    return digest.hexdigest()


class ShardReader(Protocol):
    def gather(self, field: str, view: int, block: int, rows: slice | NDArray[np.int64]) -> NDArray:
        """Stored numbers of `field` at `rows` of a shard, `[n, ...]`; raises IntegrityError for damaged bytes."""

    def labels(self) -> NDArray[np.int64] | None: ...
    def keys(self) -> list[str] | None: ...


class Layout(Protocol):
    @classmethod
    def fit(cls, row_bytes: int, num_samples: int) -> "Layout":
        """The layout with options that suit rows of logits of `row_bytes`, `num_samples` of them in a view."""

    @property
    def rows_per_unit(self) -> int:
        """A shard's rows must be a multiple of this (or be all rows of the view)."""

    def shard_files(self, plan: Plan, view: int, block: int, fields: Mapping[str, NDArray]) -> dict[str, bytes]:
        """Name and bytes of each file of one shard."""

    def closing_files(self, plan: Plan, labels: NDArray[np.int64] | None, keys: Sequence[str] | None) -> dict[str, bytes]:
        """All files that belong to no shard: labels and keys per sample, and what other software needs to find the arrays."""

    def reading_lines(self) -> str:
        """Two lines of Python that read the logits without kdcache, for the card."""

    def open(self, plan: Plan, store: LocalStore) -> ShardReader: ...


layout: Registry[Layout] = Registry("layout")


@layout.register("zarr")
@dataclass(frozen=True)
class ZarrLayout:
    """Zarr v3: one group, sharded logits in inner chunks of `inner_rows` rows, crc32c on everything, no compression."""

    inner_rows: int

    def __post_init__(self) -> None:
        if not isinstance(self.inner_rows, int) or self.inner_rows < 1:
            raise UsageError(
                f"layout zarr with inner_rows {self.inner_rows!r}",
                why="a chunk holds a whole number of rows, and at least one",
                fix="use inner_rows >= 1",
            )

    @classmethod
    def fit(cls, row_bytes: int, num_samples: int) -> "ZarrLayout":
        """Inner chunks of the power of two of rows that takes at most 128 kB, or of a whole view if that is less."""
        rows = max(1, (128 << 10) // row_bytes)
        return cls(inner_rows=min(1 << (rows.bit_length() - 1), num_samples))

    @property
    def rows_per_unit(self) -> int:
        return self.inner_rows

    def _group(self, plan: Plan) -> tuple[dict[str, Any], Any, dict[str, Any]]:
        """The files so far, group and arrays of `plan`, in memory: zarr itself encodes, and the files are taken from there."""
        import zarr
        from zarr.codecs import BytesCodec, Crc32cCodec

        memory: dict[str, Any] = {}
        group = zarr.create_group(zarr.storage.MemoryStore(memory), attributes={"kdcache_format_version": 1})
        arrays = {}
        for name, (dtype, shape) in row_fields(plan).items():
            sharded = name == "logits"
            block = (1, plan.shard_rows, *shape)
            arrays[name] = group.create_array(
                name,
                shape=(plan.num_views, plan.num_samples, *shape),
                dtype=dtype,
                chunks=(1, self.inner_rows, *shape) if sharded else block,
                shards=block if sharded else None,
                serializer=BytesCodec(),
                compressors=[Crc32cCodec()],
                filters=None,
                fill_value=0,
                attributes={**codec.from_dict(plan.codec).attributes} if sharded else {},
                dimension_names=("view", "position", *(("class",) if sharded else ("cell",) if shape else ())),
                config={"write_empty_chunks": True},
            )
        return memory, group, arrays

    def shard_files(self, plan: Plan, view: int, block: int, fields: Mapping[str, NDArray]) -> dict[str, bytes]:
        memory, _, arrays = self._group(plan)
        start = block * plan.shard_rows
        for name, rows in fields.items():
            arrays[name][view, start : start + plan.block_rows(block)] = rows
        return {name: buffer.to_bytes() for name, buffer in memory.items() if "/c/" in name}

    def closing_files(self, plan: Plan, labels: NDArray[np.int64] | None, keys: Sequence[str] | None) -> dict[str, bytes]:
        import zarr
        from zarr.codecs import Crc32cCodec

        memory, group, _ = self._group(plan)
        options: dict[str, Any] = {
            "shape": (plan.num_samples,),
            "chunks": (plan.num_samples,),
            "dimension_names": ("sample",),
            "compressors": [Crc32cCodec()],
            "config": {"write_empty_chunks": True},
        }
        if labels is not None:
            group.create_array("label", dtype="<i8", fill_value=0, **options)[:] = labels
        if keys is not None:
            group.create_array("key", dtype="str", **options)[:] = np.array(keys, dtype=object)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr notes that consolidated metadata is not in the v3 specification yet
            zarr.consolidate_metadata(group.store)
        return {name: buffer.to_bytes() for name, buffer in memory.items()}

    def reading_lines(self) -> str:
        return (
            'import zarr; a = zarr.open_group("PATH", mode="r")["logits"]\n'
            'logits = a[0, 0:256] * a.attrs.get("scale_factor", 1.0)  # view 0, positions 0 to 255'
        )

    def open(self, plan: Plan, store: LocalStore) -> "ZarrReader":
        return ZarrReader(plan, store, self.inner_rows)


class ZarrReader:
    """Reads raw shards through memory maps, without zarr; each inner chunk's crc32c is checked when it is first touched."""

    def __init__(self, plan: Plan, store: LocalStore, inner_rows: int) -> None:
        self._plan = plan
        self._store = store
        self._inner_rows = inner_rows
        self._fields = row_fields(plan)
        self._mapped = lru_cache(maxsize=1024)(self._map)
        if plan.shard_rows % inner_rows:
            raise IntegrityError(
                f"shards of {plan.shard_rows} rows in chunks of {inner_rows}",
                why="a shard is made of whole chunks; the manifest is damaged",
                fix="restore kdcache.json from a copy of the archive",
            )

    def gather(self, field: str, view: int, block: int, rows: slice | NDArray[np.int64]) -> NDArray:
        return self._mapped(field, view, block).gather(rows)

    def _map(self, field: str, view: int, block: int) -> "_MappedShard":
        dtype, shape = self._fields[field]
        name = "/".join([field, "c", str(view), str(block), *("0" for _ in shape)])
        sharded = field == "logits"
        return _MappedShard(
            self._store,
            name,
            dtype,
            shape,
            inner_rows=self._inner_rows if sharded else self._plan.shard_rows,
            chunks=self._plan.shard_rows // self._inner_rows if sharded else 1,
            used=-(-self._plan.block_rows(block) // self._inner_rows) if sharded else 1,
            indexed=sharded,
        )

    def labels(self) -> NDArray[np.int64] | None:
        labels: NDArray[np.int64] | None = self._per_sample("label")
        return labels

    def keys(self) -> list[str] | None:
        values = self._per_sample("key")
        return None if values is None else [str(key) for key in values]

    def _per_sample(self, name: str) -> Any:
        if not self._store.exists(f"{name}/zarr.json"):
            return None
        import zarr

        chunk = f"{name}/c/0"
        array = zarr.open_array(self._store.root / name, mode="r")
        # Labels take 8 bytes each and keys at least 4: what is on disk bounds what is read into memory.
        if array.shape != (self._plan.num_samples,) or self._store.size(chunk) < 4 * self._plan.num_samples:
            raise _damaged(chunk, f"does not hold {self._plan.num_samples:,} values")
        try:
            return array[:]
        except ValueError as error:
            raise _damaged(chunk, str(error)) from None


class _MappedShard:
    """One file of chunks of equal size, each followed by its crc32c, with zarr's shard index at the end if `indexed`."""

    def __init__(
        self,
        store: LocalStore,
        name: str,
        dtype: np.dtype,
        shape: tuple[int, ...],
        *,
        inner_rows: int,
        chunks: int,
        used: int,
        indexed: bool,
    ) -> None:
        self.name = name
        self._inner_rows = inner_rows
        self._payload = inner_rows * dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        stride = self._payload + 4
        index_bytes = chunks * 16 + 4 if indexed else 0
        expected = used * stride + index_bytes
        if store.size(name) != expected:
            raise self._damaged(f"has {store.size(name):,} bytes, expected {expected:,}")
        self._bytes = np.memmap(store.path(name), dtype=np.uint8, mode="r")
        if indexed:
            index = self._bytes[-index_bytes:].tobytes()
            if google_crc32c.value(index[:-4]) != int.from_bytes(index[-4:], "little"):
                raise self._damaged("has a damaged shard index")
            entries = np.frombuffer(index[:-4], "<u8").reshape(chunks, 2)[:used]
            if not np.array_equal(entries[:, 0], np.arange(used) * stride) or (entries[:, 1] != stride).any():
                raise self._damaged("does not hold its chunks in order")
        row_bytes = self._payload // inner_rows
        strides = (stride, row_bytes, *_inner_strides(shape, dtype.itemsize))
        self._rows = np.ndarray((used, inner_rows, *shape), dtype, buffer=self._bytes, strides=strides)
        self._checked = np.zeros(used, np.bool_)

    def gather(self, rows: slice | NDArray[np.int64]) -> NDArray:
        if isinstance(rows, slice):
            first, last = rows.start // self._inner_rows, -(-rows.stop // self._inner_rows)
            self._check(np.arange(first, last))
            whole = self._rows[first:last].reshape(-1, *self._rows.shape[2:])
            offset = first * self._inner_rows
            return whole[rows.start - offset : rows.stop - offset]
        chunk, inside = np.divmod(rows, self._inner_rows)
        self._check(chunk)
        result: NDArray = self._rows[chunk, inside]
        return result

    def _check(self, chunks: NDArray[np.int64]) -> None:
        for chunk in np.unique(chunks[~self._checked[chunks]]):
            start = int(chunk) * (self._payload + 4)
            data = self._bytes[start : start + self._payload + 4].tobytes()
            stored = int.from_bytes(data[-4:], "little")
            actual = google_crc32c.value(data[:-4])
            if actual != stored:
                raise self._damaged(f"chunk {chunk}: crc32c is {actual:08x}, stored beside it is {stored:08x}")
            self._checked[chunk] = True

    def _damaged(self, what: str) -> IntegrityError:
        return _damaged(self.name, what)


def _damaged(name: str, what: str) -> IntegrityError:
    return IntegrityError(
        f"{name}: {what}",
        why="the file's bytes are not those that were written",
        fix="restore this file from a copy, or delete the archive and run its dump again; kdcache verify lists all damage",
    )


def _inner_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides: list[int] = []
    for length in reversed(shape):
        strides.insert(0, itemsize)
        itemsize *= length
    return tuple(strides)
