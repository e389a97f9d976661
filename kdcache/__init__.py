"""Teacher logits, cached once and replayed exactly. The public names below load their modules when first used."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name is; modules are public as a whole.
_PUBLIC = {
    "Archive": "kdcache.archive",
    "ArchiveWriter": "kdcache.archive",
    "Batch": "kdcache.replay.stream",
    "CachedTargets": "kdcache.replay.stream",
    "Canvas": "kdcache.datasets.canvas",
    "Ensemble": "kdcache.archive",
    "ViewPolicy": "kdcache.views",
    "Workspace": "kdcache.workspace",
    "compare": "kdcache.archive",
    "open_archive": "kdcache.archive",
    "write_archive": "kdcache.archive",
}
_MODULES = ("datasets", "errors", "methods", "stats", "targets", "views")
__all__ = [
    "Archive",
    "ArchiveWriter",
    "Batch",
    "CachedTargets",
    "Canvas",
    "Ensemble",
    "ViewPolicy",
    "Workspace",
    "__version__",
    "compare",
    "datasets",
    "errors",
    "methods",
    "open_archive",
    "stats",
    "targets",
    "views",
    "write_archive",
]

if TYPE_CHECKING:
    from kdcache import datasets, errors, methods, stats, targets, views
    from kdcache.archive import Archive, ArchiveWriter, Ensemble, compare, open_archive, write_archive
    from kdcache.datasets.canvas import Canvas
    from kdcache.replay.stream import Batch, CachedTargets
    from kdcache.views import ViewPolicy
    from kdcache.workspace import Workspace
else:  # type checkers would take any name from a module with this function

    def __getattr__(name: str) -> Any:
        if name in _PUBLIC:
            return getattr(importlib.import_module(_PUBLIC[name]), name)
        if name in _MODULES:
            return importlib.import_module(f"kdcache.{name}")
        raise AttributeError(f"module 'kdcache' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
