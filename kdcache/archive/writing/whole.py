"""Writing an archive of logits that are all here already."""

import datetime
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdcache.archive.format.manifest import MANIFEST_NAME
from kdcache.archive.format.store import LocalStore
from kdcache.archive.reading.reader import Archive
from kdcache.archive.writing.planning import PLAN
from kdcache.archive.writing.writer import ArchiveWriter
from kdcache.errors import KdcacheError, UsageError
from kdcache.system.files import set_aside

__all__ = ["write_archive"]


def write_archive(
    path: str | os.PathLike[str],
    logits: NDArray[np.float32],
    class_names: Sequence[str],
    *,
    sample: NDArray[np.int64] | None = None,
    labels: NDArray[np.int64] | None = None,
    keys: Sequence[str] | None = None,
    codec: str = "i16",
    layout: str = "zarr",
) -> Archive:
    """Write `logits` float32 `[V, N, C]`, computed elsewhere, as an archive; `sample [V, N]` says which sample each row is."""
    logits = np.asarray(logits, np.float32)
    if logits.ndim != 3 or logits.shape[2] != len(class_names):
        raise UsageError(
            f"logits of shape {list(logits.shape)} with {len(class_names)} class names",
            why="they must be [V, N, C] with one name per class",
            fix="add the view axis with logits[None], or correct the names",
        )
    if LocalStore(path).exists(MANIFEST_NAME) or LocalStore(path).exists(PLAN):
        raise UsageError(
            f"{path} already holds an archive",
            why="these logits cannot be compared with those that made it",
            fix=f"write to another folder, or set that one aside: {set_aside(Path(path))}",
        )
    if sample is not None and np.shape(sample) != logits.shape[:2]:
        raise UsageError(
            f"sample numbers of shape {list(np.shape(sample))} for logits {list(logits.shape)}",
            why="they must be [V, N]: which sample sits at each position of each view",
            fix="pass one row of numbers for every view",
        )
    existed = Path(path).exists()
    try:
        return _write_whole(path, logits, class_names, sample, labels, keys, codec, layout)
    except KdcacheError:
        if not existed:  # nothing to go on with: whoever mends the logits begins anew
            shutil.rmtree(path, ignore_errors=True)
        raise


def _write_whole(
    path: str | os.PathLike[str],
    logits: NDArray[np.float32],
    class_names: Sequence[str],
    sample: NDArray[np.int64] | None,
    labels: NDArray[np.int64] | None,
    keys: Sequence[str] | None,
    codec: str,
    layout: str,
) -> Archive:
    writer = ArchiveWriter(
        path,
        num_views=logits.shape[0],
        num_samples=logits.shape[1],
        class_names=class_names,
        labels=labels,
        keys=keys,
        codec=codec,
        layout=layout,
        provenance={"created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")},
    )
    for view, block in writer.missing():
        rows = slice(writer.positions(block).start, writer.positions(block).stop)
        writer.write(view, block, logits[view, rows], sample=None if sample is None else sample[view, rows])
    return writer.finalize()
