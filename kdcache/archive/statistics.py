"""What a finished archive says about its teacher, computed once when it is finished."""

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kdcache.archive.layouts import ShardReader
from kdcache.archive.manifest import Plan, Statistics, TauStatistics
from kdcache.codecs import codec
from kdcache.progress import Progress
from kdcache.stats import relative_entropy, sorted_mean_softmax
from kdcache.views.policy import CenterCrop

__all__ = ["PAPER_TAUS", "compute_statistics", "spread", "spread_logits"]

PAPER_TAUS = (1, 2, 3, 4, 5, 7, 10, 20, 40)  # temperature study, section 3
MAX_ROWS = 1 << 16
BLOCK = 1 << 12
MIXING_ONLY = {"crop": CenterCrop(), "randaugment": None, "jitter": None, "erase": None}
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def compute_statistics(plan: Plan, reader: ShardReader, labels: NDArray[np.int64] | None, progress: Progress) -> Statistics:
    """Entropies per temperature over at most 65,536 evenly spaced rows, and top-1 over all views."""
    blocks = list(spread_logits(plan, reader))
    rows = sum(len(block) for block in blocks)
    per_tau = []
    for number, tau in enumerate(PAPER_TAUS):
        pairs = [relative_entropy(block, tau) for block in blocks]
        h, rest = (np.concatenate(side) for side in zip(*pairs, strict=True))
        mean = np.sum([sorted_mean_softmax(block, tau) * len(block) for block in blocks], axis=0) / rows
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
    return Statistics(rows=rows, per_tau=tuple(per_tau), top1_views=_top1(plan, reader, labels))


def spread(
    views: range, num_samples: int, most: int = MAX_ROWS, block: int = BLOCK
) -> Iterator[list[tuple[int, NDArray[np.int64]]]]:
    """At most `most` rows, evenly spaced over `views` and their positions, `block` at a time: (view, positions) pairs."""
    total = len(views) * num_samples
    count = min(total, most)
    for first in range(0, count, block):
        rows = np.arange(first, min(first + block, count)) * total // count
        view, position = np.divmod(rows, num_samples)
        starts = np.flatnonzero(np.diff(view, prepend=-1))
        yield [(views[view[i]], position[i:j]) for i, j in itertools.pairwise([*starts, len(rows)])]


def spread_logits(plan: Plan, reader: ShardReader) -> Iterator[NDArray[np.float32]]:
    """Logits float32 of at most 65,536 rows, evenly spaced over all views and positions, in blocks `[<= 4096, C]`."""
    coding = codec.from_dict(plan.codec)
    total = plan.num_views * plan.num_samples
    count = min(total, MAX_ROWS)
    for first in range(0, count, BLOCK):
        rows = np.arange(first, min(first + BLOCK, count)) * total // count
        view, position = np.divmod(rows, plan.num_samples)
        block, inside = np.divmod(position, plan.shard_rows)
        starts = np.flatnonzero(np.diff(view * plan.num_blocks + block, prepend=-1))
        stored: dict[str, NDArray] = {
            name: np.concatenate(
                [
                    reader.gather(name, plan.first_view + int(view[i]), int(block[i]), inside[i:j])
                    for i, j in zip(starts, [*starts[1:], len(rows)], strict=True)
                ]
            )
            for name in ("logits", *coding.parameters)
        }
        yield coding.decode(stored)


def _top1(plan: Plan, reader: ShardReader, labels: NDArray[np.int64] | None) -> float | None:
    """Percent of rows whose argmax is the label of the sample with the larger share of the view."""
    if labels is None:
        return None
    hits = 0
    for view in plan.views:
        blocks = [(b, slice(0, plan.block_rows(b))) for b in range(plan.num_blocks)]
        argmax, sample = (np.concatenate([reader.gather(name, view, *part) for part in blocks]) for name in ("argmax", "sample"))
        dominant = sample
        if plan.policy and plan.policy.mix:
            # Each draw has a column of its own, so leaving out all but order and mixing moves none of them.
            table = plan.policy.model_copy(update=MIXING_ONLY).parameters(view, plan.num_samples)
            dominant = np.where(table.lam >= 0.5, table.sample, table.partner)
        hits += int((labels[dominant] == argmax).sum())
    return 100.0 * hits / (plan.num_views * plan.num_samples)
