"""Teacher logits, cached once and replayed exactly. The public names below load their modules when first used."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "open_archive": "kdcache.archive",
    "Archive": "kdcache.archive",
    "ArchiveWriter": "kdcache.archive",
    "write_archive": "kdcache.archive",
    "Ensemble": "kdcache.archive",
    "compare": "kdcache.archive",
    "ViewPolicy": "kdcache.views",
    "CachedTargets": "kdcache.replay.stream",
    "Batch": "kdcache.replay.stream",
}
_MODULES = {"methods", "targets", "stats", "views"}
__all__ = [
    "Archive",
    "ArchiveWriter",
    "Batch",
    "CachedTargets",
    "Ensemble",
    "ViewPolicy",
    "__version__",
    "compare",
    "open_archive",
    "write_archive",
]

if TYPE_CHECKING:
    from kdcache.archive import Archive, ArchiveWriter, Ensemble, compare, open_archive, write_archive
    from kdcache.replay.stream import Batch, CachedTargets
    from kdcache.views import ViewPolicy


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"kdcache.{name}")
    raise AttributeError(f"module 'kdcache' has no attribute {name!r}")
