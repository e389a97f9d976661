"""What a finished archive says about its teacher, computed once when it is finished."""

import numpy as np
from numpy.typing import NDArray

from kdcache.archive.layouts import ShardReader
from kdcache.archive.manifest import Plan, Statistics, TauStatistics
from kdcache.codecs import codec
from kdcache.progress import Progress
from kdcache.stats import relative_entropy, sorted_mean_softmax

__all__ = ["PAPER_TAUS", "compute_statistics"]

PAPER_TAUS = (1, 2, 3, 4, 5, 7, 10, 20, 40)  # temperature study, section 3
MAX_ROWS = 1 << 16
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def compute_statistics(plan: Plan, reader: ShardReader, labels: NDArray[np.int64] | None, progress: Progress) -> Statistics:
    """Entropies per temperature over at most 65,536 evenly spaced rows, and top-1 over all views."""
    logits = _sample_logits(plan, reader)
    per_tau = []
    for number, tau in enumerate(PAPER_TAUS):
        h, rest = relative_entropy(logits, tau)
        mean = sorted_mean_softmax(logits, tau)
        positive = mean[mean > 0]
        per_tau.append(
            TauStatistics(
                tau=tau,
                entropy_mean=float(h.mean()),
                entropy_quantiles=tuple(float(q) for q in np.quantile(h, QUANTILES)),
                entropy_rest_mean=float(rest.mean()),
                entropy_rest_quantiles=tuple(float(q) for q in np.quantile(rest, QUANTILES)),
                sorted_mean_entropy=float(-(positive * np.log(positive)).sum() / np.log(plan.num_classes)),
            )
        )
        progress.update("statistics", number + 1, len(PAPER_TAUS))
    return Statistics(rows=len(logits), per_tau=tuple(per_tau), top1_views=_top1(plan, reader, labels))


def _sample_logits(plan: Plan, reader: ShardReader) -> NDArray[np.float32]:
    total = plan.num_views * plan.num_samples
    rows = np.arange(total) if total <= MAX_ROWS else np.arange(MAX_ROWS) * total // MAX_ROWS
    view, position = np.divmod(rows, plan.num_samples)
    block, inside = np.divmod(position, plan.shard_rows)
    shard = view * plan.num_blocks + block
    starts = np.flatnonzero(np.diff(shard, prepend=-1))
    parts = [
        reader.gather("logits", int(view[i]), int(block[i]), inside[i:j])
        for i, j in zip(starts, [*starts[1:], len(rows)], strict=True)
    ]
    return codec.from_dict(plan.codec).decode(np.concatenate(parts))


def _top1(plan: Plan, reader: ShardReader, labels: NDArray[np.int64] | None) -> float | None:
    """Percent of rows whose argmax is the label of the sample with the larger share of the view."""
    if labels is None:
        return None
    hits = 0
    for view in range(plan.num_views):
        blocks = [(b, slice(0, plan.block_rows(b))) for b in range(plan.num_blocks)]
        argmax, sample = (np.concatenate([reader.gather(name, view, *part) for part in blocks]) for name in ("argmax", "sample"))
        dominant = sample
        if plan.policy:
            table = plan.policy.parameters(view, plan.num_samples)
            dominant = np.where(table.lam >= 0.5, table.sample, table.partner)
        hits += int((labels[dominant] == argmax).sum())
    return 100.0 * hits / (plan.num_views * plan.num_samples)
