"""Layouts: how rows are stored in files. Each module registers one layout."""

from kdcache.archive.layouts import hdf5, webdataset, zarr  # noqa: F401  # registers them
from kdcache.archive.layouts.base import LAYOUTS, Buffers, Layout, ShardReader
from kdcache.archive.layouts.fields import row_fields, rows_digest
from kdcache.archive.layouts.zarr import COMPRESSIONS, Compression, compressed_bytes

__all__ = [
    "COMPRESSIONS",
    "LAYOUTS",
    "Buffers",
    "Compression",
    "Layout",
    "ShardReader",
    "compressed_bytes",
    "row_fields",
    "rows_digest",
]
