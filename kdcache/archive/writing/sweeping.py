"""What writers leave behind in an archive, and the lock of who begins, extends or finishes it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from kdcache.archive.format.manifest import WORK
from kdcache.archive.format.store import LocalStore
from kdcache.archive.reading.reader import Archive, open_archive
from kdcache.archive.writing.planning import begun_plan
from kdcache.system.files import sweep_temporaries, translated_os_errors
from kdcache.system.locks import locked_if_possible

__all__ = ["LOCK", "alone", "sweep", "sweep_finished"]

LOCK = ".lock"  # not in WORK, which is deleted under it


def sweep(path: str | os.PathLike[str]) -> None:
    """Delete what a killed writer has left behind in a finished archive; nothing while views are appended to it."""
    store = LocalStore(path)
    if store.path(WORK).is_dir() or store.exists(LOCK):
        with alone(store):
            sweep_finished(store, open_archive(path))


def sweep_finished(store: LocalStore, archive: Archive) -> None:
    begun = begun_plan(store)
    if begun is not None and begun.num_views > archive.num_views:
        return
    for old in store.root.glob("shards-*.jsonl"):
        if old.name != archive.manifest.shards.path:
            old.unlink(missing_ok=True)
    sweep_temporaries(store.root)
    shutil.rmtree(store.path(WORK), ignore_errors=True)


@contextmanager
def alone(store: LocalStore) -> Iterator[None]:
    """Be the only process that begins, extends or finishes an archive.

    Where there are no locks, all go on at once: processes of one dump write the same bytes, each file whole.
    """
    path = store.path(LOCK)
    with ExitStack() as held:
        with translated_os_errors(path):
            store.root.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked_if_possible(path))
        try:
            yield
        finally:
            if not store.path(WORK).is_dir():  # nothing is being written any more
                path.unlink(missing_ok=True)
