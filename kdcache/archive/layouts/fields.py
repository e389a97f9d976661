"""The fields of a row, which every layout stores, and the digest of rows, which is the same in every layout.

All fields are view-major in the archive, `[V, N, ...]`; a shard holds `n` rows of one view:

    logits        codec's dtype [n, C], with the codec's own float32 parameters [n] beside it, if it has any
    argmax        int32 [n]     argmax of the float32 logits, before encoding
    sample        int32 [n]     number of the sample at this position
    entropy       float32 [n]   entropy_rest float32 [n]: relative, tau 1, of the float32 logits
    digest        uint32 [n]    probe   uint8 [n, 16]: the view's fingerprint
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from kdcache.archive.format.manifest import ArchivePlan
from kdcache.archive.format.store import as_bytes
from kdcache.codecs import CODECS

__all__ = ["PROBE_BYTES", "RowType", "row_fields", "rows_digest"]

PROBE_BYTES = 16
RowType = tuple[np.dtype, tuple[int, ...]]
BESIDE: dict[str, RowType] = {
    "argmax": (np.dtype("<i4"), ()),
    "sample": (np.dtype("<i4"), ()),
    "entropy": (np.dtype("<f4"), ()),
    "entropy_rest": (np.dtype("<f4"), ()),
    "digest": (np.dtype("<u4"), ()),
    "probe": (np.dtype("u1"), (PROBE_BYTES,)),
}


def row_fields(plan: ArchivePlan) -> dict[str, RowType]:
    """dtype and row shape of every field, in stored order."""
    if plan.contents == "statistics":
        return dict(BESIDE)
    coding = CODECS.from_dict(plan.codec)
    parameters: dict[str, RowType] = {name: (np.dtype("<f4"), ()) for name in coding.parameters}
    return {"logits": (coding.dtype, (plan.num_classes,)), **parameters, **BESIDE}


def rows_digest(plan: ArchivePlan, fields: Mapping[str, NDArray]) -> str:
    """Digest of a shard's rows: the hash `plan.rows_hash` of the fields' little-endian bytes, one field after the other.

    Older archives (sha256) hash the decoded logits in place of the stored ones.
    """
    digest: Any = blake3() if plan.rows_hash == "blake3" else hashlib.sha256()
    for name in row_fields(plan):
        column = fields[name]
        if name == "logits" and plan.rows_hash == "sha256":
            column = CODECS.from_dict(plan.codec).decode(fields)
        elif name not in {"logits", *BESIDE} and plan.rows_hash == "sha256":
            continue  # the decoded logits already contain the codec's parameters
        digest.update(as_bytes(column))
    hexdigest: str = digest.hexdigest()
    return hexdigest
