"""Statistics of a teacher's logits, computed once when the archive is finished."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kdcache.archive.format.manifest import (
    ArchivePlan,
    EntropyHistogram,
    LogitMoments,
    Statistics,
    StatisticsDetails,
    TauDetail,
    TauStatistics,
)
from kdcache.archive.layouts import ShardReader
from kdcache.codecs import CODECS
from kdcache.errors import IntegrityError
from kdcache.stats import logit_moments, matched_smoothing, summarise_ranked
from kdcache.system.progress import Progress
from kdcache.views.policy import CenterCrop

__all__ = [
    "MAX_ROWS",
    "PAPER_TAUS",
    "compute_statistics",
    "entropy_histogram",
    "measure_logits",
    "moment_histogram",
    "spread",
    "spread_logits",
]

PAPER_TAUS = (1, 2, 3, 4, 5, 7, 10, 20, 40)  # temperature study, section 3
MAX_ROWS = 1 << 16
BLOCK = 1 << 12  # rows
BLOCK_LOGITS = 1 << 22  # 16 MB
BINS = 32
MOMENT_BINS = 24
RANKS = 64
FIRST_RANKS = 20  # the ranks in Fig. 4 of the temperature study
MIXING_ONLY = {"crop": CenterCrop(mode="squash"), "randaugment": None, "jitter": None, "erase": None}
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def compute_statistics(
    plan: ArchivePlan, reader: ShardReader, labels: NDArray[np.int64] | None, progress: Progress
) -> Statistics:
    """Figures per temperature from at most 65,536 evenly spaced rows, and top-1 from all views."""
    rows = min(plan.num_views * plan.num_samples, MAX_ROWS)
    measured = measure_logits(spread_logits(plan, reader), rows, PAPER_TAUS, progress)
    return measured.model_copy(update={"top1_views": _top1(plan, reader, labels)})


def measure_logits(blocks: Iterable[NDArray[np.float32]], rows: int, taus: Sequence[float], progress: Progress) -> Statistics:
    """Statistics at every tau of `blocks` of logits, float32 `[n, C]` with `rows` rows in all; without top-1.

    Memory holds one block at a time, two entropies per row and tau, and two moments per row.
    """
    entropies = np.empty((2, len(taus), rows))
    moments = np.empty((2, rows))
    powers = np.zeros(len(taus))
    totals = np.zeros(())
    done = 0
    for block in blocks:
        part = slice(done, done + len(block))
        moments[:, part] = logit_moments(block)
        ranked = np.sort(block, axis=1)[:, ::-1]
        summed = []
        at_one = np.exp(np.subtract(ranked, ranked[:, :1], dtype=np.float64)).sum(axis=1)
        for number, tau in enumerate(taus):
            entropies[0, number, part], entropies[1, number, part], total, mass = summarise_ranked(ranked, tau)
            summed.append(total)
            powers[number] += (mass * at_one ** (-1 / tau)).sum()  # as `power_sums` has them
        totals = totals + np.array(summed)
        done += len(block)
        progress.update("statistics", done, rows)
    if done != rows:
        raise ValueError(f"{done} rows, not {rows}")
    means = totals / rows
    classes = means.shape[1]
    ranks = spread_ranks(classes)
    per_tau, details = [], []
    for tau, h, rest, mean, power in zip(taus, *entropies, means, powers / rows, strict=True):
        positive = mean[mean > 0]
        whole = float(-(positive * np.log(positive)).sum() / np.log(classes))
        per_tau.append(
            TauStatistics(
                tau=tau,
                entropy_mean=float(h.mean()),
                entropy_quantiles=tuple(float(q) for q in np.quantile(h, QUANTILES)),
                entropy_rest_mean=float(rest.mean()),
                entropy_rest_quantiles=tuple(float(q) for q in np.quantile(rest, QUANTILES)),
                sorted_mean_entropy=whole,
            )
        )
        details.append(
            TauDetail(
                entropy_histogram=_histogram(h),
                entropy_rest_histogram=_histogram(rest),
                sorted_mean=tuple(float(p) for p in mean[np.array(ranks) - 1]),
                smoothing_sorted_mean=float(matched_smoothing(whole, classes)),
                smoothing_mean_entropy=float(matched_smoothing(h.mean(), classes)),
                power_sum_mean=float(power),
            )
        )
    statistics_details = StatisticsDetails(ranks=ranks, per_tau=tuple(details), moments=moment_histogram(*moments))
    return Statistics(rows=rows, per_tau=tuple(per_tau), top1_views=None, details=statistics_details)


def spread_ranks(classes: int) -> tuple[int, ...]:
    """Ranks at which the mean sorted softmax is kept: all up to 64 classes; else the first 20, then log-spaced ones."""
    if classes <= RANKS:
        return tuple(range(1, classes + 1))
    later = np.geomspace(FIRST_RANKS, classes, RANKS - FIRST_RANKS + 1).round().astype(int)
    return tuple(sorted({*range(1, FIRST_RANKS + 1), *later.tolist()}))


def _histogram(values: NDArray[np.float64]) -> tuple[int, ...]:
    return tuple(np.histogram(values, BINS, (0, 1))[0].tolist())


def moment_histogram(mean: NDArray[np.float64], std: NDArray[np.float64]) -> LogitMoments:
    """Histogram of rows by the mean and the standard deviation of their logits, float64 `[N]` each."""

    def extent(values: NDArray[np.float64]) -> tuple[float, float]:
        low, high = float(values.min()), float(values.max())
        return low, max(high, low + 1e-6 * max(1.0, abs(low)))  # bins need a width even if all values are equal

    ranges = extent(mean), extent(std)
    counts = np.histogram2d(mean, std, MOMENT_BINS, ranges)[0].astype(int)
    return LogitMoments(
        mean=float(mean.mean()),
        std=float(std.mean()),
        mean_range=ranges[0],
        std_range=ranges[1],
        counts=tuple(map(tuple, counts.tolist())),
    )


def entropy_histogram(relative: NDArray[np.float64], classes: int) -> EntropyHistogram:
    """Histogram of rows by their relative entropies `[N]` in [0, 1]."""
    within = np.clip(relative, 0, 1)  # as far as float32 rounds
    return EntropyHistogram(classes=classes, mean=float(within.mean()), counts=_histogram(within))


def spread(
    views: range, num_samples: int, most: int = MAX_ROWS, block: int = BLOCK
) -> Iterator[list[tuple[int, NDArray[np.int64]]]]:
    """At most `most` rows, evenly spaced over `views` and positions. Yields lists of (view, positions), `block` rows each."""
    total = len(views) * num_samples
    count = min(total, most)
    step, rest = divmod(total, count)
    for first in range(0, count, block):
        numbers = np.arange(first, min(first + block, count))
        rows = numbers * step + numbers * rest // count  # numbers * total could overflow for a stranger's num_samples
        view, position = np.divmod(rows, num_samples)
        starts = np.flatnonzero(np.diff(view, prepend=-1))
        yield [(views[view[i]], position[i:j]) for i, j in itertools.pairwise([*starts, len(rows)])]


def spread_logits(plan: ArchivePlan, reader: ShardReader, most: int = MAX_ROWS) -> Iterator[NDArray[np.float32]]:
    """Logits of at most `most` rows, evenly spaced over views and positions, in float32 blocks `[n, C]`.

    A block has at most 4096 rows and about 16 MB. Raises IntegrityError for logits that are not finite.
    """
    coding = CODECS.from_dict(plan.codec)
    step = max(1, min(BLOCK, BLOCK_LOGITS // plan.num_classes))
    for pairs in spread(plan.views, plan.num_samples, most, step):
        parts = [(view, *part) for view, positions in pairs for part in _by_block(positions, plan.shard_rows)]
        stored: dict[str, NDArray] = {
            name: np.concatenate([reader.gather(name, *part) for part in parts]) for name in ("logits", *coding.parameters)
        }
        logits = coding.decode(stored)
        if not np.isfinite(logits).all():
            raise _no_logits("logits that are not finite")
        yield logits


def _by_block(positions: NDArray[np.int64], shard_rows: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Ascending `positions` of a view, grouped by block: (block, rows within the block)."""
    block, inside = np.divmod(positions, shard_rows)
    starts = np.flatnonzero(np.diff(block, prepend=-1))
    return ((int(block[i]), inside[i:j]) for i, j in itertools.pairwise([*starts, len(block)]))


def _top1(plan: ArchivePlan, reader: ShardReader, labels: NDArray[np.int64] | None) -> float | None:
    """Percent of rows whose argmax is the label; a mixed view counts the sample with the larger share."""
    if labels is None:
        return None
    hits = 0
    for view in plan.views:
        blocks = [(b, slice(0, plan.block_rows(b))) for b in range(plan.num_blocks)]
        argmax, sample = (np.concatenate([reader.gather(name, view, *part) for part in blocks]) for name in ("argmax", "sample"))
        if not ((sample >= 0) & (sample < plan.num_samples)).all():
            raise _no_logits(f"sample numbers beyond {plan.num_samples:,} in view {view}")
        dominant = sample
        if plan.policy and plan.policy.mix:
            # Every draw has its own random column, so dropping the other pieces does not change order and mixing.
            table = plan.policy.model_copy(update=MIXING_ONLY).parameters(view, plan.num_samples)
            dominant = np.where(table.lam >= 0.5, table.sample, table.partner)
        hits += int((labels[dominant] == argmax).sum())
    return 100.0 * hits / (plan.num_views * plan.num_samples)


def _no_logits(nonsense: str) -> IntegrityError:
    return IntegrityError(
        f"the archive holds {nonsense}",
        why="kdcache writes none; who wrote these rows computed their checksums too",
        fix="do not use this archive; get it again from whoever made it",
    )
