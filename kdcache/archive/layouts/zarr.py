"""Zarr v3: one group, logits in sharded chunks, everything else in one chunk a shard, crc32c on all of it.

Chunks are encoded and decoded here: zarr itself takes a thousand times as long to read a row. A raw shard is its chunks,
each followed by a checksum, and an index at the end. zarr writes the metadata, and tests compare every byte of a shard
with the bytes that zarr writes.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from fastcrc.crc32 import iscsi as crc32c
from numpy.typing import NDArray

from kdcache.archive.format.manifest import ArchivePlan
from kdcache.archive.format.store import Store, as_bytes
from kdcache.archive.layouts.base import LAYOUTS, Buffers, OpeningReader, unit_bytes_rows, unit_rows
from kdcache.archive.layouts.fields import row_fields
from kdcache.archive.layouts.mapped import MappedRows, Run, damaged, map_file
from kdcache.codecs import CODECS
from kdcache.errors import IntegrityError, UsageError
from kdcache.registry import FITTED

__all__ = ["COMPRESSIONS", "ZarrLayout", "compressed_bytes"]

CRC = 4
BLOSC_HEADER = 16
# A shard that decompresses to more than both of these is a bomb: logits shrink to a tenth, not to a thousandth.
MOST_EXPANSION, HARMLESS = 1024, 64 << 20
Compression = Literal["none", "bitshuffle", "pcodec"]
COMPRESSIONS: tuple[Compression, ...] = ("bitshuffle", "pcodec")


@LAYOUTS.register("zarr")
@dataclass(frozen=True)
class ZarrLayout:
    """Zarr v3 with sharded logits, which xarray and tensorstore decode unaided; raw (`none`) for training.

    `compression` is for publishing: `bitshuffle` (with lz4, read by every Zarr library) saves a fifth, `pcodec` (read by
    zarr-python with the package pcodec) saves more. `inner_rows` rows make a chunk.
    """

    compression: Compression = "none"
    inner_rows: int = field(default=0, metadata=FITTED)

    def __post_init__(self) -> None:
        if type(self.inner_rows) is not int or self.inner_rows < 0:
            raise UsageError(
                f"layout zarr with inner_rows {self.inner_rows!r}",
                why="a chunk holds a whole number of rows, and at least one",
                fix="use inner_rows >= 1",
            )
        if self.compression not in {"none", "bitshuffle", "pcodec"}:
            raise UsageError(
                f"layout zarr with compression {self.compression!r}",
                why="it is none, bitshuffle or pcodec",
                fix="--layout zarr:bitshuffle",
            )

    def fit(self, plan: ArchivePlan) -> "ZarrLayout":
        dtype = CODECS.from_dict(plan.codec).dtype
        if self.compression == "pcodec" and dtype.itemsize < 2:
            raise UsageError(
                f"layout zarr:pcodec with codec {plan.codec['name']}",
                why="pcodec compresses numbers of 16 or 32 bits, not single bytes",
                fix="--layout zarr:bitshuffle",
            )
        return ZarrLayout(self.compression, unit_rows(plan))

    # -------------------------------------------------------------------------------------------------------- writing

    def shard_files(self, plan: ArchivePlan, view: int, block: int, fields: Mapping[str, NDArray]) -> dict[str, Buffers]:
        files = {}
        for name, (dtype, shape) in row_fields(plan).items():
            column = np.ascontiguousarray(fields[name], dtype)
            if name == "logits":
                files[_chunk(plan, name, shape, view, block)] = self._shard(plan, column)
            else:
                padding = bytes((plan.shard_rows - len(column)) * dtype.itemsize * int(np.prod(shape, dtype=np.int64)))
                data = (as_bytes(column), padding) if padding else (as_bytes(column),)
                files[_chunk(plan, name, shape, view, block)] = [*data, _crc32c(*data)]
        return files

    def _shard(self, plan: ArchivePlan, logits: NDArray) -> Buffers:
        """The bytes of a shard: chunks, each with a checksum, and the index. Chunks beyond the view's end are left out."""
        parts: Buffers = []
        index = np.full((plan.shard_rows // self.inner_rows, 2), 2**64 - 1, "<u8")
        offset = 0
        for number, start in enumerate(range(0, len(logits), self.inner_rows)):
            chunk = logits[start : start + self.inner_rows]
            if len(chunk) < self.inner_rows:
                chunk = np.concatenate([chunk, np.zeros((self.inner_rows - len(chunk), *chunk.shape[1:]), chunk.dtype)])
            data = self._encode(chunk)
            parts += [data, _crc32c(data)]
            index[number] = offset, len(data) + CRC
            offset += len(data) + CRC
        return [*parts, index.tobytes(), _crc32c(index.tobytes())]

    def _encode(self, chunk: NDArray) -> memoryview | bytes:
        if self.compression == "none":
            return as_bytes(chunk)
        encoded: bytes = _compressor(self.compression, chunk.dtype.itemsize).encode(chunk)
        return encoded

    def closing_files(
        self, plan: ArchivePlan, labels: NDArray[np.int64] | None, keys: Sequence[str] | None
    ) -> dict[str, Buffers]:
        import zarr
        from zarr.codecs import Crc32cCodec

        memory, group = self._group(plan)
        options: dict[str, Any] = {
            "shape": (plan.num_samples,),
            "chunks": (plan.num_samples,),
            "dimension_names": ("sample",),
            "compressors": [Crc32cCodec()],
            "config": {"write_empty_chunks": True},
        }
        if labels is not None:
            group.create_array("label", dtype="<i8", fill_value=-1, **options)[:] = labels
        if keys is not None:
            group.create_array("key", dtype="str", **options)[:] = np.array(keys, dtype=object)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr notes that consolidated metadata is not in the v3 specification yet
            zarr.consolidate_metadata(group.store)
        return {name: [buffer.to_bytes()] for name, buffer in memory.items()}

    def _group(self, plan: ArchivePlan) -> tuple[dict[str, Any], Any]:
        """The group of `plan`, with arrays but no chunks, and its files, all in memory."""
        import zarr
        from zarr.codecs import BytesCodec, Crc32cCodec

        memory: dict[str, Any] = {}
        group = zarr.create_group(zarr.storage.MemoryStore(memory), attributes={"kdcache_format_version": 1})
        for name, (dtype, shape) in row_fields(plan).items():
            sharded = name == "logits"
            block = (1, plan.shard_rows, *shape)
            group.create_array(
                name,
                shape=(plan.num_views, plan.num_samples, *shape),
                dtype=dtype,
                chunks=(1, self.inner_rows, *shape) if sharded else block,
                shards=block if sharded else None,
                fill_value=_unwritten(dtype),
                attributes={**CODECS.from_dict(plan.codec).attributes} if sharded else {},
                dimension_names=("view", "position", *(("class",) if sharded else ("cell",) if shape else ())),
                config={"write_empty_chunks": True},
                filters=None,
                **(self._zarr_codecs(dtype) if sharded else {"serializer": BytesCodec(), "compressors": [Crc32cCodec()]}),
            )
        return memory, group

    def _zarr_codecs(self, dtype: np.dtype) -> dict[str, Any]:
        """zarr's codec arguments for the encoding that `_encode` does."""
        from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
        from zarr.codecs.numcodecs import PCodec

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr notes that numcodecs' codecs are not in the v3 specification
            serializer = PCodec(**PCODEC) if self.compression == "pcodec" else BytesCodec()
        blosc = BloscCodec(typesize=dtype.itemsize, cname="lz4", clevel=BLOSC_LEVEL, shuffle="bitshuffle")
        return {
            "serializer": serializer,
            "compressors": [*([blosc] if self.compression == "bitshuffle" else []), Crc32cCodec()],
        }

    # -------------------------------------------------------------------------------------------------------- reading

    def reading_lines(self, plan: ArchivePlan) -> str:
        rows = f"0:{min(256, plan.num_samples)}"
        opening = 'import zarr; g = zarr.open_group("PATH", mode="r")'
        if plan.contents == "statistics":
            return f'{opening}\nentropy = g["entropy"][0, {rows}]  # of view {plan.first_view}'
        logits = CODECS.from_dict(plan.codec).formula.format_map(_Named(f'g["{{}}"][0, {rows}]'))
        return f"{opening}\nlogits = {logits}  # view {plan.first_view}, positions {rows}"

    def open(self, plan: ArchivePlan, store: Store) -> "ZarrReader":
        return ZarrReader(plan, store, self)


def compressed_bytes(compression: Compression, codes: NDArray) -> int | None:
    """Bytes of `codes [n, C]` in compressed chunks. None if the compression is not installed, or cannot take this dtype."""
    if compression == "pcodec" and codes.dtype.itemsize < 2:
        return None
    try:
        compressor = _compressor(compression, codes.dtype.itemsize)
    except UsageError:
        return None
    rows = unit_bytes_rows(codes[:1].nbytes)
    return sum(len(compressor.encode(codes[start : start + rows])) for start in range(0, len(codes), rows))


BLOSC_LEVEL = 9  # the smallest result; lower levels are no faster
PCODEC: dict[str, Any] = {"level": 8, "mode_spec": "classic", "delta_spec": "auto"}


@lru_cache
def _compressor(compression: Compression, itemsize: int) -> Any:
    if compression == "pcodec":
        try:
            from numcodecs.pcodec import PCodec
        except ImportError:
            raise UsageError(
                "layout zarr:pcodec",
                why="the package pcodec is not installed",
                fix="pip install 'kdcache[pcodec]', or use --layout zarr:bitshuffle",
            ) from None
        return PCodec(**PCODEC)
    from numcodecs.blosc import BITSHUFFLE, Blosc

    return Blosc(cname="lz4", clevel=BLOSC_LEVEL, shuffle=BITSHUFFLE, typesize=itemsize)


def _unwritten(dtype: np.dtype) -> Any:
    """What plain zarr reads where a file is missing, without an error: nothing that kdcache writes, if the dtype has such.

    It is NaN for floats, and the lowest signed integer, which is no code of `i16`, no class and no sample.
    """
    return np.nan if dtype.kind == "f" else np.iinfo(dtype).min if dtype.kind == "i" else 0


def _crc32c(*parts: memoryview | bytes) -> bytes:
    value = 0
    for part in parts:
        value = crc32c(part, value)
    return int(value).to_bytes(CRC, "little")


def _chunk(plan: ArchivePlan, name: str, shape: tuple[int, ...], view: int, block: int) -> str:
    """File of the field `name` with rows of this shape."""
    return "/".join([name, "c", str(view - plan.first_view), str(block), *("0" for _ in shape)])


class _Named(dict[str, str]):
    """Maps every name to the Python expression that reads it."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self._pattern = pattern

    def __missing__(self, name: str) -> str:
        return self._pattern.format(name)


class ZarrReader(OpeningReader):
    """Reads shards without zarr: raw ones through memory maps, compressed ones chunk by chunk."""

    def __init__(self, plan: ArchivePlan, store: Store, arrangement: ZarrLayout) -> None:
        self._plan, self._store, self._layout = plan, store, arrangement
        self._fields = row_fields(plan)
        inner = arrangement.inner_rows
        if inner < 1 or plan.shard_rows % inner:
            raise IntegrityError(
                f"shards of {plan.shard_rows} rows in chunks of {inner}",
                why="a shard is made of whole chunks; the manifest is damaged",
                fix="restore kdcache.json from a copy of the archive",
            )

    def files(self, view: int, block: int) -> list[str]:
        return [_chunk(self._plan, name, shape, view, block) for name, (_, shape) in self._fields.items()]

    def rows(self, field: str, view: int, block: int) -> "MappedRows | _CompressedRows":
        plan, inner = self._plan, self._layout.inner_rows
        dtype, shape = self._fields[field]
        name = _chunk(plan, field, shape, view, block)
        row_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        rows = plan.block_rows(block)
        if field != "logits":
            size = plan.shard_rows * row_bytes
            data = map_file(self._store, name, size + CRC)
            run = Run(units=1, rows=rows, stored=plan.shard_rows, start=0, stride=size, crc_start=size, crc_stride=CRC)
            return MappedRows(name, data, (dtype, shape), [run])
        used, chunks, payload = -(-rows // inner), plan.shard_rows // inner, inner * row_bytes
        index_bytes = chunks * 16 + CRC
        if self._layout.compression != "none":
            data = map_file(self._store, name)
            if (decoded := used * payload) > max(HARMLESS, MOST_EXPANSION * len(data)):
                raise damaged(name, f"would decompress from {len(data):,} to {decoded:,} bytes")
            return _CompressedRows(name, data, _index(name, data, chunks, used), (dtype, shape), self._layout)
        stride = payload + CRC
        data = map_file(self._store, name, used * stride + index_bytes)
        index = _index(name, data, chunks, used)
        if not np.array_equal(index[:, 0], np.arange(used) * stride) or (index[:, 1] != stride).any():
            raise damaged(name, "does not hold its chunks in order")
        run = Run(units=used, rows=inner, stored=inner, start=0, stride=stride, crc_start=payload, crc_stride=stride)
        return MappedRows(name, data, (dtype, shape), [run])

    def sample_files(self) -> list[str]:
        return [f"{name}/{file}" for name in ("label", "key") for file in ("zarr.json", "c/0")]

    def labels(self) -> NDArray[np.int64] | None:
        data = self._per_sample("label")
        if data is None:
            return None
        if len(data) != 8 * self._plan.num_samples:
            raise damaged("label/c/0", f"does not hold {self._plan.num_samples:,} labels")
        labels: NDArray[np.int64] = data.view("<i8").astype(np.int64)
        return labels

    def keys(self) -> list[str] | None:
        """Zarr's vlen-utf8: the number of keys, and each key's length before its UTF-8 bytes, all uint32."""
        data = self._per_sample("key")
        if data is None:
            return None
        text, keys, at = data.tobytes(), [], 4
        try:
            if int.from_bytes(text[:4], "little") != self._plan.num_samples:
                raise ValueError
            for _ in range(self._plan.num_samples):
                end = at + 4 + int.from_bytes(text[at : at + 4], "little")
                if not at + 4 <= end <= len(text):
                    raise ValueError
                keys.append(text[at + 4 : end].decode())
                at = end
        except ValueError:
            raise damaged("key/c/0", f"does not hold {self._plan.num_samples:,} keys") from None
        return keys

    def _per_sample(self, name: str) -> NDArray[np.uint8] | None:
        """The bytes of an array with one chunk, after its checksum was compared."""
        if not self._store.exists(f"{name}/zarr.json"):
            return None
        chunk = f"{name}/c/0"
        data = map_file(self._store, chunk)
        if len(data) < CRC or crc32c(data[:-CRC].data) != int.from_bytes(data[-CRC:].tobytes(), "little"):
            raise damaged(chunk, "has another crc32c than is stored in it")
        return data[:-CRC]


def _index(name: str, data: NDArray[np.uint8], chunks: int, used: int) -> NDArray[np.int64]:
    """(offset, size) of the first `used` of a shard's `chunks`, int64 `[used, 2]`. Checks that each lies before the index."""
    size = chunks * 16 + CRC
    index = data[-size:]
    if len(data) < size or crc32c(index[:-CRC].data) != int.from_bytes(index[-CRC:].tobytes(), "little"):
        raise damaged(name, "has a damaged shard index")
    entries = index[:-CRC].view("<u8").reshape(chunks, 2)[:used]
    room = len(data) - size
    if len(entries) < used or (entries > room).any() or (entries.sum(axis=1) > room).any() or (entries[:, 1] <= CRC).any():
        raise damaged(name, "has chunks that lie outside the file")
    starts = entries[:, 0].astype(np.int64)
    if (starts[1:] < starts[:-1] + entries[:-1, 1].astype(np.int64)).any():
        raise damaged(name, "has chunks that overlap")
    return entries.astype(np.int64)


class _CompressedRows:
    """Rows in compressed chunks. Every chunk must decode to a known size, and no more memory is allocated for it."""

    def __init__(
        self,
        name: str,
        data: NDArray[np.uint8],
        index: NDArray[np.int64],
        row: tuple[np.dtype, tuple[int, ...]],
        arrangement: ZarrLayout,
    ) -> None:
        self.name, self._data, self._index, self._layout = name, data, index, arrangement
        self._dtype, self._shape = row

    def checksums(self) -> list[NDArray[np.uint32]]:
        ends = self._index.sum(axis=1)  # which hold each chunk's checksum
        return [self._data[ends[:, None] + np.arange(-CRC, 0)].view("<u4")[:, 0]]

    def pieces(self, rows: slice) -> Iterator[NDArray]:
        size = self._layout.inner_rows
        for number in range(rows.start // size, -(-rows.stop // size)):
            chunk = self._decode(range(number, number + 1))[0]
            yield chunk[max(rows.start - number * size, 0) : rows.stop - number * size]

    def gather(self, rows: slice | NDArray[np.int64]) -> NDArray:
        size = self._layout.inner_rows
        if isinstance(rows, slice):
            first, last = rows.start // size, -(-rows.stop // size)
            whole = self._decode(range(first, last)).reshape(-1, *self._shape)
            return whole[rows.start - first * size : rows.stop - first * size]
        unit, inside = np.divmod(rows, size)
        gathered = np.empty((len(rows), *self._shape), self._dtype)
        for number in np.unique(unit):
            gathered[unit == number] = self._decode(range(number, number + 1))[0, inside[unit == number]]
        return gathered

    def _decode(self, chunks: range) -> NDArray:
        out = np.empty((len(chunks), self._layout.inner_rows, *self._shape), self._dtype)
        for place, chunk in zip(out, chunks, strict=True):
            offset, length = self._index[chunk]
            data = self._data[offset : offset + length]
            if crc32c(data[:-CRC].data) != int.from_bytes(data[-CRC:].tobytes(), "little"):
                raise damaged(self.name, f"chunk {chunk} has another crc32c than is stored beside it")
            self._decompress(data[:-CRC].tobytes(), place, chunk)
        return out

    def _decompress(self, data: bytes, out: NDArray, chunk: int) -> None:
        """Decompress into `out`. The size that the data claim must be exactly the size of `out`."""
        compressor = _compressor(self._layout.compression, self._dtype.itemsize)
        try:
            if self._layout.compression == "bitshuffle":
                _require_blosc(data, out)
                compressor.decode(data, out=out.reshape(-1))
            else:
                from pcodec import standalone

                done = standalone.simple_decompress_into(data, out.reshape(-1))
                if not done.finished or done.n_processed != out.size:  # else part of `out` is uninitialised memory
                    raise ValueError
        except Exception as error:  # libraries have many errors for damaged bytes
            raise damaged(self.name, f"chunk {chunk} cannot be decompressed ({type(error).__name__})") from None


def _require_blosc(data: bytes, out: NDArray) -> None:
    """Raise ValueError unless the header has our version, lz4, bitshuffle, and sizes."""
    size, stored = (int.from_bytes(data[at : at + 4], "little") for at in (4, 12))
    flags = data[2] & 0xE5  # without the two flags that depend on the contents
    if len(data) < BLOSC_HEADER or (data[0], data[1], flags, data[3]) != (2, 1, 0x24, out.itemsize):
        raise ValueError
    if (size, stored) != (out.nbytes, len(data)):
        raise ValueError
