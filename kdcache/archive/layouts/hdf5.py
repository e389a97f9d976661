"""HDF5: one file a shard, every field one contiguous dataset without filters.

The bytes that libhdf5 writes around the data depend only on names, types and shapes. They are made once for all shards
of equal size, and the rows are inserted. Each file's user block (a part that HDF5 reserves for users) records where the
datasets start. Reading maps the rows from there, so libhdf5 never parses a stranger's file.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from fastcrc.crc32 import iscsi as crc32c
from numpy.typing import NDArray

from kdcache.archive.format.manifest import ArchivePlan
from kdcache.archive.format.store import Store, as_bytes
from kdcache.archive.layouts.base import LAYOUTS, Buffers, OpeningReader, unit_rows
from kdcache.archive.layouts.fields import RowType, row_fields
from kdcache.archive.layouts.mapped import MappedRows, Run, damaged, map_file
from kdcache.codecs import CODECS
from kdcache.errors import IntegrityError
from kdcache.registry import FITTED
from kdcache.system.documents import parse_json

__all__ = ["Hdf5Layout"]

USER_BLOCK = 1024
SAMPLES = "samples.h5"
CRC32C = "crc32c"  # the dataset [fields, units] of checksums


@LAYOUTS.register("hdf5")
@dataclass(frozen=True)
class Hdf5Layout:
    """HDF5 files, one a shard, with contiguous unfiltered datasets; a checksum for every `unit_rows` rows."""

    unit_rows: int = field(default=0, metadata=FITTED)

    def fit(self, plan: ArchivePlan) -> "Hdf5Layout":
        return replace(self, unit_rows=unit_rows(plan))

    def shard_files(self, plan: ArchivePlan, view: int, block: int, fields: Mapping[str, NDArray]) -> dict[str, Buffers]:
        columns = {name: np.ascontiguousarray(fields[name], dtype) for name, (dtype, _) in row_fields(plan).items()}
        units = range(0, plan.block_rows(block), self.unit_rows)
        columns[CRC32C] = np.array(
            [[crc32c(as_bytes(column[at : at + self.unit_rows])) for at in units] for column in columns.values()],
            "<u4",
        )
        return {_shard(view, block): _file(columns)}

    def closing_files(
        self, plan: ArchivePlan, labels: NDArray[np.int64] | None, keys: Sequence[str] | None
    ) -> dict[str, Buffers]:
        columns: dict[str, NDArray] = {}
        if labels is not None:
            columns["label"] = labels.astype("<i8")
        if keys is not None:
            # Keys are concatenated, since only libhdf5 can read HDF5's variable-length strings.
            encoded = [key.encode() for key in keys]
            columns["key_end"] = np.cumsum([len(key) for key in encoded]).astype("<i8")
            columns["key_bytes"] = np.frombuffer(b"".join(encoded) or b"\0", "u1")
        return {SAMPLES: _file(columns)} if columns else {}

    def reading_lines(self, plan: ArchivePlan) -> str:
        rows = f"0:{min(256, plan.block_rows(0))}"
        opening = f'import h5py; f = h5py.File("PATH/{_shard(plan.first_view, 0)}")'
        if plan.contents == "statistics":
            return f'{opening}\nentropy = f["entropy"][{rows}]  # of view {plan.first_view}'
        names = ("logits", *CODECS.from_dict(plan.codec).parameters)
        logits = CODECS.from_dict(plan.codec).formula.format_map({name: f'f["{name}"][{rows}]' for name in names})
        return f"{opening}\nlogits = {logits}  # view {plan.first_view}, positions {rows}"

    def open(self, plan: ArchivePlan, store: Store) -> "Hdf5Reader":
        return Hdf5Reader(plan, store, self.unit_rows)


def _shard(view: int, block: int) -> str:
    return f"view-{view:05d}/shard-{block:05d}.h5"


def _file(columns: Mapping[str, NDArray]) -> Buffers:
    """The bytes of a file with these datasets: those of a template of the same shapes, with the data inserted."""
    around, starts = _template(tuple((name, column.dtype.str, column.shape) for name, column in columns.items()))
    parts: Buffers = []
    at = 0
    for name in sorted(columns, key=lambda name: starts[name]):
        length = starts[name] - at
        parts += [around[:length], as_bytes(columns[name])]
        around, at = around[length:], starts[name] + columns[name].nbytes
    return [*parts, around] if around else parts


@lru_cache(maxsize=8)
def _template(shapes: tuple[tuple[str, str, tuple[int, ...]], ...]) -> tuple[bytes, dict[str, int]]:
    """The bytes around the datasets of a file, and where each dataset starts."""
    import h5py

    image = io.BytesIO()
    with h5py.File(image, "w", userblock_size=USER_BLOCK, libver=("earliest", "v108")) as file:
        for name, dtype, shape in shapes:
            contiguous = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            contiguous.set_layout(h5py.h5d.CONTIGUOUS)
            contiguous.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            contiguous.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            contiguous.set_obj_track_times(False)  # no times, so that equal rows give equal bytes
            space = h5py.h5s.create_simple(shape)
            h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), space, contiguous)
        starts = {name: file[name].id.get_offset() for name, _, _ in shapes}
    header = json.dumps(
        {
            "kdcache": 1,
            "datasets": {name: {"start": starts[name], "dtype": dtype, "shape": shape} for name, dtype, shape in shapes},
        }
    ).encode()
    assert len(header) <= USER_BLOCK, "the user block is too small for these datasets"
    data = header.ljust(USER_BLOCK) + image.getvalue()[USER_BLOCK:]
    ends = {name: starts[name] + np.dtype(dtype).itemsize * int(np.prod(shape)) for name, dtype, shape in shapes}
    data = data.ljust(max(ends.values()), b"\0")  # libhdf5 leaves out the bytes of an unwritten last dataset
    around, at = [], 0
    for name in sorted(starts, key=lambda name: starts[name]):
        around.append(data[at : starts[name]])
        at = ends[name]
    return b"".join([*around, data[at:]]), starts


class _Hdf5File:
    """A file whose user block says where the datasets start. Every statement of it is checked before use."""

    def __init__(self, store: Store, name: str) -> None:
        self.name = name
        self.data = map_file(store, name)
        try:
            datasets = parse_json(self.data[:USER_BLOCK].tobytes().rstrip(b"\0 "))["datasets"]
            self._datasets = {
                str(key): (int(value["start"]), str(value["dtype"]), tuple(int(n) for n in value["shape"]))
                for key, value in datasets.items()
            }
            if any(length < 0 for _, _, shape in self._datasets.values() for length in shape):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            raise damaged(name, "does not say in its user block where its rows are") from None

    def start(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> int:
        """Start of dataset `name`. Raises IntegrityError unless it has this type and shape and lies in the file."""
        dataset = self._datasets.get(name)
        if dataset is None or dataset[1:] != (dtype.str, shape):
            raise damaged(self.name, f"has dataset {name} as {dataset and dataset[1:]}, expected {(dtype.str, shape)}")
        size = dtype.itemsize * math.prod(shape)  # not NumPy's product, which overflows
        if not USER_BLOCK <= dataset[0] <= len(self.data) - size:
            raise damaged(self.name, f"has dataset {name} outside the file")
        return dataset[0]

    def column(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> NDArray:
        return np.ndarray(shape, dtype, self.data, self.start(name, dtype, shape))

    def __contains__(self, name: str) -> bool:
        return name in self._datasets

    def shape(self, name: str) -> tuple[int, ...]:
        return self._datasets[name][2]


class Hdf5Reader(OpeningReader):
    def __init__(self, plan: ArchivePlan, store: Store, unit: int) -> None:
        self._plan, self._store, self._unit = plan, store, unit
        self._fields = row_fields(plan)
        self._file = lru_cache(maxsize=512)(lambda view, block: _Hdf5File(store, _shard(view, block)))
        if type(unit) is not int or not 1 <= unit <= plan.shard_rows:
            raise IntegrityError(
                f"shards of {plan.shard_rows} rows in units of {unit}",
                why="a shard has at least one unit; the manifest is damaged",
                fix="restore kdcache.json from a copy of the archive",
            )

    def files(self, view: int, block: int) -> list[str]:
        return [_shard(view, block)]

    def rows(self, field: str, view: int, block: int) -> MappedRows:
        file, count = self._file(view, block), self._plan.block_rows(block)
        row: RowType = self._fields[field]
        dtype, shape = row
        row_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        units, left = divmod(count, self._unit)
        start = file.start(field, dtype, (count, *shape))
        all_units = units + bool(left)
        crcs = file.start(CRC32C, np.dtype("<u4"), (len(self._fields), all_units))
        crcs += 4 * all_units * list(self._fields).index(field)
        size = self._unit * row_bytes
        runs = [Run(units, self._unit, self._unit, start, size, crcs, 4)] if units else []
        if left:
            runs.append(Run(1, left, left, start + units * size, size, crcs + 4 * units, 4))
        return MappedRows(file.name, file.data, row, runs)

    def sample_files(self) -> list[str]:
        return [SAMPLES]

    def _samples(self, *names: str) -> _Hdf5File | None:
        if not self._store.exists(SAMPLES):
            return None
        file = _Hdf5File(self._store, SAMPLES)
        return file if all(name in file for name in names) else None

    def labels(self) -> NDArray[np.int64] | None:
        file = self._samples("label")
        return None if file is None else file.column("label", np.dtype("<i8"), (self._plan.num_samples,)).astype(np.int64)

    def keys(self) -> list[str] | None:
        file = self._samples("key_end", "key_bytes")
        if file is None:
            return None
        ends = file.column("key_end", np.dtype("<i8"), (self._plan.num_samples,)).tolist()
        text: Any = file.column("key_bytes", np.dtype("u1"), file.shape("key_bytes")).tobytes()
        starts = [0, *ends[:-1]]
        if not all(0 <= start <= end <= len(text) for start, end in zip(starts, ends, strict=True)):
            raise damaged(SAMPLES, "has keys outside their bytes")
        try:
            return [text[start:end].decode() for start, end in zip(starts, ends, strict=True)]
        except UnicodeDecodeError:
            raise damaged(SAMPLES, "has a key that is not UTF-8") from None
