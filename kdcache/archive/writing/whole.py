"""Writing an archive of logits that are all here already."""

import datetime
import os
import shutil
import warnings
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
from kdcache.given import as_logits, in_order, whole_numbers
from kdcache.system.files import set_aside

__all__ = ["are_probabilities", "write_archive"]

_ROWS = 4096  # that are looked at together


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
    """Write `logits` float32 `[V, N, C]`, computed elsewhere, as an archive; `sample [V, N]` says which sample each row is.

    Arrays may be tensors too. `labels [N]` are numbers of classes, or their names. Rows that are probabilities are stored as they
    are, and warned of (UserWarning): softmax of them at any temperature is nearly uniform. Raises UsageError for what is none of
    this, such as masked, complex or fractional numbers, and leaves no folder then.
    """
    logits = as_logits(logits)
    class_names = [str(name) if isinstance(name, str) else name for name in in_order(class_names, "class names")]
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
    sample = None if sample is None else whole_numbers(sample, "sample numbers")
    if sample is not None and sample.shape != logits.shape[:2]:
        raise UsageError(
            f"sample numbers of shape {list(sample.shape)} for logits {list(logits.shape)}",
            why="they must be [V, N]: which sample sits at each position of each view",
            fix="pass one row of numbers for every view",
        )
    if are_probabilities(logits):
        warnings.warn(
            "the rows of these logits are probabilities: they sum to 1. Their softmax is nearly uniform at any temperature. "
            "Give what the softmax was taken of, or logarithms: numpy.log(numpy.maximum(probabilities, 1e-12))",
            stacklevel=2,
        )
    existed = Path(path).exists()
    try:
        return _write_whole(path, logits, class_names, sample, labels, keys, codec, layout)
    except KdcacheError:
        if not existed:  # nothing to go on with: whoever mends the logits begins anew
            shutil.rmtree(path, ignore_errors=True)
        raise


def are_probabilities(logits: NDArray[np.float32]) -> bool:
    """Whether all rows of `logits` `[..., C]` are numbers from 0 to 1 that sum to 1, as far as float16 would tell."""
    rows = logits.reshape(-1, logits.shape[-1])
    return (
        bool(rows.size)
        and all(  # of logits, the first rows tell
            bool(((part >= 0) & (part <= 1)).all() and (np.abs(part.sum(axis=1, dtype=np.float64) - 1) < 1e-2).all())
            for part in (rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS))
        )
    )


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
