"""Protects what an archive says about its teacher: figures equal to those from all rows at once, in bounded memory, and small."""

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import kdcache
from kdcache.archive import PAPER_TAUS, Statistics, measure_logits
from kdcache.archive.reading.statistics import spread_ranks
from kdcache.stats import label_smoothing, matched_smoothing, power_sums, relative_entropy, sorted_mean_softmax
from kdcache.system.progress import Silent

LOGITS = (np.random.default_rng(0).normal(0, 1500, (1000, 37)).round() / 512).astype(np.float32)  # what i16 keeps


def measured(logits: NDArray[np.float32] = LOGITS, block: int = 96) -> Statistics:
    blocks = (logits[start : start + block] for start in range(0, len(logits), block))
    return measure_logits(blocks, len(logits), PAPER_TAUS, Silent())


def test_figures_are_those_of_all_rows_at_once() -> None:
    statistics = measured()
    details = statistics.details
    assert details is not None
    assert details.ranks == tuple(range(1, 38))
    for tau, figures, detail in zip(PAPER_TAUS, statistics.per_tau, details.per_tau, strict=True):
        h, rest = relative_entropy(LOGITS, tau)
        assert (figures.entropy_mean, figures.entropy_rest_mean) == (pytest.approx(h.mean()), pytest.approx(rest.mean()))
        assert figures.entropy_quantiles == pytest.approx(np.quantile(h, (0.05, 0.25, 0.5, 0.75, 0.95)))
        assert detail.entropy_histogram == tuple(np.histogram(h, 32, (0, 1))[0])
        assert detail.entropy_rest_histogram == tuple(np.histogram(rest, 32, (0, 1))[0])
        assert detail.sorted_mean == pytest.approx(sorted_mean_softmax(LOGITS, tau))
        assert detail.smoothing_mean_entropy == pytest.approx(float(matched_smoothing(h.mean(), 37)))
        assert detail.power_sum_mean == pytest.approx(power_sums(LOGITS, tau).mean(), rel=1e-12)
        smoothed = label_smoothing(detail.smoothing_sorted_mean, 37)
        assert -(smoothed * np.log(smoothed)).sum() / np.log(37) == pytest.approx(figures.sorted_mean_entropy, abs=1e-9)
    moments, mean, std = details.moments, LOGITS.mean(axis=1), LOGITS.std(axis=1)
    assert (moments.mean, moments.std) == (pytest.approx(mean.mean(), abs=1e-6), pytest.approx(std.mean(), abs=1e-6))
    assert moments.mean_range == pytest.approx((mean.min(), mean.max()), abs=1e-6)
    assert moments.std_range == pytest.approx((std.min(), std.max()), abs=1e-6)
    along_mean, along_std = np.array(moments.counts).sum(axis=1), np.array(moments.counts).sum(axis=0)
    assert np.abs(along_mean - np.histogram(mean, 24)[0]).sum() <= 2  # float32 means may fall into the bin beside
    assert np.abs(along_std - np.histogram(std, 24)[0]).sum() <= 2
    assert along_mean.sum() == 1000


def test_every_row_is_in_every_histogram_also_where_all_are_alike() -> None:
    details = measured(np.full((7, 3), 2.5, np.float32)).details
    assert details is not None
    assert details.per_tau[0].entropy_histogram == (*[0] * 31, 7)
    assert np.array(details.moments.counts).sum() == 7
    assert details.per_tau[0].smoothing_sorted_mean == pytest.approx(1)


def test_ranks_are_the_first_twenty_and_few_of_the_others() -> None:
    assert spread_ranks(2) == (1, 2)
    assert spread_ranks(64) == tuple(range(1, 65))
    for classes in (65, 100, 1000, 21841):
        ranks = spread_ranks(classes)
        assert ranks[:20] == tuple(range(1, 21))
        assert ranks[-1] == classes
        assert list(ranks) == sorted(set(ranks))
        assert len(ranks) <= 64


def test_memory_and_manifest_stay_small_with_very_many_classes() -> None:
    rows, classes = 320, 21841

    def blocks() -> Iterator[NDArray[np.float32]]:
        for start in range(0, rows, 16):
            yield np.random.default_rng(start).normal(0, 3, (16, classes)).astype(np.float32)

    tracemalloc.start()
    statistics = measure_logits(blocks(), rows, PAPER_TAUS, Silent())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20  # all rows together are 28 MB of float32
    assert len(statistics.model_dump_json(indent=1)) < 40_000


def test_archives_record_them_and_older_manifests_keep_their_bytes(tmp_path: Path) -> None:
    archive = kdcache.write_archive(tmp_path / "a", LOGITS[None], [f"class {c}" for c in range(37)])
    assert archive.manifest.statistics == measured(block=4096)
    older = json.loads((Path(__file__).parents[1] / "data/golden/v1/kdcache.json").read_text("utf-8"))["statistics"]
    assert json.loads(Statistics.model_validate(older).model_dump_json()) == older


def test_rows_are_spread_over_the_whole_archive(tmp_path: Path) -> None:
    logits = np.arange(2 * 50 * 2, dtype=np.float32).reshape(2, 50, 2) / 10
    archive = kdcache.write_archive(tmp_path / "a", logits, ["a", "b"])
    rows = np.concatenate(list(archive.spread_logits(10)))
    np.testing.assert_allclose(rows[:, 0], np.arange(0, 200, 20) / 10, atol=2e-3)
