"""How rows lie in files: one module a layout, each of which registers itself."""

from kdcache.archive.layouts import hdf5, webdataset, zarr  # noqa: F401  # registers them
from kdcache.archive.layouts.base import Buffers, Layout, ShardReader, layout
from kdcache.archive.layouts.fields import row_fields, rows_digest

__all__ = ["Buffers", "Layout", "ShardReader", "layout", "row_fields", "rows_digest"]
