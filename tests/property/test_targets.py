"""Protects the controls: equal entropies where they promise them, and shuffles that depend on nothing but their key."""

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import special
from scipy import stats as statistics

from kdcache.errors import UsageError
from kdcache.stats import matched_smoothing
from kdcache.targets import Control, Targets, averaged, control, match_entropy, row_keys
from tests.stand_ins import launched, stand_in_gpu

PAPER_TAUS = (1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 20.0, 40.0)  # of the temperature study
TAUS = st.sampled_from(PAPER_TAUS)
AVERAGES = ("sorted-mean", "mean-entropy", "plain-mean")


def rows(largest: float = 15.0, min_classes: int = 3) -> st.SearchStrategy[NDArray[np.float32]]:
    shape = st.tuples(st.integers(1, 6), st.integers(min_classes, 50))
    return shape.flatmap(lambda s: hnp.arrays(np.float32, s, elements=st.floats(-largest, largest, width=32)))


def entropy(logits: NDArray | torch.Tensor, tau: float) -> NDArray[np.float64]:
    result: NDArray[np.float64] = statistics.entropy(special.softmax(np.asarray(logits, np.float64) / tau, axis=1), axis=1)
    return result


def keys(count: int, view: int = 0) -> torch.Tensor:
    return row_keys("ab" * 32, view, torch.arange(count))


# ---------------------------------------------------------------- several teachers


@given(logits=rows(largest=60), teachers=st.integers(2, 4), tau=TAUS, seed=st.integers(0, 99))
def test_averaged_targets_have_the_mean_of_the_teachers_softmaxes(
    logits: NDArray[np.float32], teachers: int, tau: float, seed: int
) -> None:
    stacked = np.random.default_rng(seed).permuted(np.repeat(logits[:, None], teachers, axis=1), axis=2)
    found = averaged(torch.from_numpy(stacked), tau)
    assert found.dtype == torch.float32
    mean = special.softmax(stacked.astype(np.float64) / tau, axis=2).mean(axis=1)
    np.testing.assert_allclose(Targets(found, tau).probs, mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(special.softmax(found.double().numpy() / tau, axis=1), mean, rtol=1e-4, atol=0)


@pytest.mark.parametrize("tau", [1.0, 3.0, 40.0])
def test_averages_of_teachers_who_contradict_each_other_by_120_stay_finite(tau: float) -> None:
    """Each is certain of another class, and a third has next to no probability: its log is still right, not -inf."""
    logits = torch.tensor([[[120.0, 0.0, -1.0], [0.0, 120.0, -3.0]]])
    found = averaged(logits, tau)[0]
    z = logits[0].double().numpy() / tau
    expected = tau * (special.logsumexp(z - special.logsumexp(z, axis=1, keepdims=True), axis=0) - math.log(2))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_targets_of_one_teacher_are_its_logits() -> None:
    logits = torch.randn(4, 5)
    assert averaged(logits, 7.0) is logits


# ---------------------------------------------------------------- label smoothing


@given(logits=rows(largest=60), tau=TAUS)
def test_match_entropy_finds_the_label_smoothing_of_the_same_entropy(logits: NDArray[np.float32], tau: float) -> None:
    classes = logits.shape[1]
    log_p = special.log_softmax(logits.astype(np.float64) / tau, axis=1)
    deficit = (np.exp(log_p) * (log_p + math.log(classes))).sum(axis=1)
    d = match_entropy(torch.from_numpy(deficit), classes).numpy()
    assert ((d >= 0) & (d <= 1)).all()
    smoothed = np.repeat((1 - d)[:, None] / classes, classes, axis=1)
    smoothed[:, 0] += d
    np.testing.assert_allclose(statistics.entropy(smoothed, axis=1), entropy(logits, tau), rtol=0, atol=1e-9)


def exact_deficit(d: Any, classes: int) -> Any:
    rest = classes - 1
    return ((1 + d * rest) * mpmath.log(1 + d * rest) + rest * (1 - d) * mpmath.log(1 - d)) / classes


@given(classes=st.integers(2, 21841), magnitude=st.floats(-60, 36))
def test_match_entropy_is_exact_at_any_strength(classes: int, magnitude: float) -> None:
    """From a d that float64 sums lose entirely (deficits of 1e-50 and less) to an alpha at float64's last bit."""
    with mpmath.workdps(130):
        d = 1 / (1 + mpmath.exp(-mpmath.mpf(magnitude)))
        deficit = exact_deficit(d, classes)
        given = float(deficit)
        found = match_entropy(torch.tensor([given], dtype=torch.float64), classes).item()
        # What the rounding of the deficit itself moves, to either side.
        slope = (classes - 1) / mpmath.mpf(classes) * (mpmath.log(1 + d * (classes - 1)) - mpmath.log(1 - d))
        rounding = abs(mpmath.mpf(given) - deficit) / slope
        assert abs(found - d) <= 1e-13 * d + 2 * rounding


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_match_entropy_is_at_least_as_accurate_as_bisection(classes: int) -> None:
    """For deficits from 1e-14, of a large tau, to log C."""
    deficits = np.geomspace(1e-14, math.log(classes) * (1 - 1e-12), 40)
    found = match_entropy(torch.from_numpy(deficits), classes).tolist()
    with mpmath.workdps(60):
        for deficit, d in zip(deficits, found, strict=True):
            low, high = mpmath.mpf(-60), mpmath.mpf(0)  # log d
            for _ in range(80):
                middle = (low + high) / 2
                low, high = (middle, high) if exact_deficit(mpmath.exp(middle), classes) < deficit else (low, middle)
            assert d == pytest.approx(float(mpmath.exp(high)), rel=1e-12, abs=0)


def test_smoothing_is_few_kernels_and_no_wait() -> None:
    fitted = control("ls-global").fit([np.random.default_rng(0).normal(0, 3, (9, 1000)).astype(np.float32)], 4.0)
    with stand_in_gpu() as gpu:
        targets = Targets(torch.empty(64, 1000, device=gpu), 4.0)
        for chosen, most in ((control("ls-instance"), 40), (fitted, 5)):
            chosen(targets, keys(64))  # puts the table on the device, once
            found = launched(lambda chosen=chosen: chosen(targets, keys(64)))
            assert found.kernels <= most
            assert found.copies == 0
            assert not found.waits


@pytest.mark.parametrize("classes", [2, 37, 1000])
def test_the_control_and_the_archives_statistics_smooth_alike(classes: int) -> None:
    h = np.linspace(0.01, 0.999, 40)
    d = match_entropy(torch.from_numpy((1 - h) * math.log(classes)), classes).numpy()
    np.testing.assert_allclose(matched_smoothing(h, classes), 1 - d, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("classes", [3, 10, 1000])
def test_match_entropy_is_right_at_both_ends_and_increases_in_between(classes: int) -> None:
    deficits = torch.linspace(0, math.log(classes), 500, dtype=torch.float64)
    d = match_entropy(deficits, classes)
    assert d[0] == 0
    assert d[-1] == pytest.approx(1)
    assert (d.diff() > 0).all()
    beyond = match_entropy(torch.tensor([-1e-9, math.log(classes) + 1e-9]), classes)  # rounding may lead out of the range
    assert beyond.tolist() == pytest.approx([0, 1])


@given(logits=rows(), tau=TAUS)
def test_ls_instance_has_each_samples_own_entropy_and_top_class(logits: NDArray[np.float32], tau: float) -> None:
    smoothed = control("ls-instance")(Targets(torch.from_numpy(logits), tau), keys(len(logits))).logits
    assert smoothed.dtype == torch.float32
    np.testing.assert_allclose(entropy(smoothed, tau), entropy(logits, tau), rtol=2e-6)
    for z, s in zip(logits, smoothed.numpy(), strict=True):
        others = np.delete(s, z.argmax())
        assert (others == others[0]).all()
        assert s[z.argmax()] >= others[0]
        assert s[z.argmax()] > others[0] or np.ptp(z) < 1e-6


@pytest.mark.grid
@pytest.mark.parametrize("tau", PAPER_TAUS)
@pytest.mark.parametrize("classes", [3, 37, 100, 1000])
def test_smoothed_targets_have_the_entropy_they_are_matched_to_within_a_nanonat(classes: int, tau: float) -> None:
    """Of targets in float64; those in float32 differ by their logits' rounding."""
    rng = np.random.default_rng(int(tau))
    logits = rng.normal(0, rng.uniform(0.1, 12, (64, 1)), (64, classes))
    instance = control("ls-instance")(Targets(torch.from_numpy(logits), tau), keys(64)).logits
    assert instance.dtype == torch.float64
    np.testing.assert_allclose(entropy(instance, tau), entropy(logits, tau), rtol=0, atol=1e-9)
    sorted_mean = np.sort(special.softmax(logits / tau, axis=1), axis=1).mean(axis=0)
    fitted = control("ls-global").fit([logits], tau)
    whole = fitted(Targets(torch.from_numpy(logits), tau), keys(64)).logits
    np.testing.assert_allclose(entropy(whole, tau), statistics.entropy(sorted_mean), rtol=0, atol=1e-9)


@pytest.mark.parametrize("classes", [2, 3, 37, 1000, 21841])
@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0, 40.0])
def test_ls_instance_of_a_smoothed_label_is_that_label(classes: int, tau: float) -> None:
    """However confident: float64 has no log C - H of a row whose top logit is 37 tau, but it has H."""
    tops = torch.cat([torch.linspace(1, 64, 64), torch.tensor([128.0, 240.0])]).double()
    logits = torch.zeros(len(tops), classes, dtype=torch.float64)
    logits[:, 1] = tops
    smoothed = control("ls-instance")(Targets(logits, tau), keys(len(tops))).logits
    np.testing.assert_allclose(smoothed, logits, rtol=0, atol=4e-6)  # at large tau the softmax itself is rounded
    confident = tops >= 20 * tau
    np.testing.assert_allclose(smoothed[confident], logits[confident], rtol=0, atol=1e-9)
    in_float32 = control("ls-instance")(Targets(logits.float(), tau), keys(len(tops))).logits
    np.testing.assert_allclose(in_float32, logits, rtol=2e-6, atol=0)


def test_ls_instance_of_ever_more_confident_rows_has_no_leap() -> None:
    tops = torch.linspace(0, 1000, 2001).double()
    for tau, ragged in ((0.5, 0.0), (1.0, 2.0), (7.0, 5.0)):
        logits = torch.cat([tops[:, None] + 6, torch.linspace(-ragged, ragged, 9).expand(len(tops), 9)], dim=1)
        found = control("ls-instance")(Targets(logits, tau), keys(len(tops))).logits[:, 0]
        assert (found.diff() >= 0).all()
        assert float(found.diff().max()) < 0.6


def test_ls_global_of_an_archive_of_certain_teachers_is_as_strong_as_float64_can_tell() -> None:
    certain = np.zeros((4, 10), np.float32)
    certain[:, 3] = 60
    for average in AVERAGES[:2]:
        fitted = control("ls-global", average=average).fit([certain], 1.0)
        assert 36 < float(fitted(Targets(torch.from_numpy(certain), 1.0), keys(4)).logits[0, 3]) < 45


def test_ls_instance_of_extreme_rows_is_finite() -> None:
    logits = torch.tensor([[0.0, 0, 0, 0], [120.0, 0, 0, 0], [-60.0, 60, 60, 60], [63.9, -63.9, -63.9, -63.9]])
    for tau in (1.0, 4.0, 40.0):
        smoothed = control("ls-instance")(Targets(logits, tau), keys(4)).logits
        assert torch.isfinite(smoothed).all()
        np.testing.assert_allclose(entropy(smoothed, tau), entropy(logits, tau), atol=1e-9, rtol=2e-6)


@pytest.mark.parametrize("average", AVERAGES)
@given(logits=rows(), tau=TAUS, cut=st.integers(0, 6))
def test_ls_global_has_the_entropy_of_the_average_whatever_the_blocks(
    average: str, logits: NDArray[np.float32], tau: float, cut: int
) -> None:
    classes = logits.shape[1]
    probs = special.softmax(logits.astype(np.float64) / tau, axis=1)
    expected = {
        "sorted-mean": statistics.entropy(np.sort(probs, axis=1).mean(axis=0)),
        "mean-entropy": statistics.entropy(probs, axis=1).mean(),
        "plain-mean": statistics.entropy(probs.mean(axis=0)),
    }[average]
    blocks = [block for block in (logits[:cut], logits[cut:]) if len(block)]
    fitted = control("ls-global", average=average).fit(iter(blocks), tau)
    batch = np.random.default_rng(0).normal(0, 3, (5, classes)).astype(np.float32)
    smoothed = fitted(Targets(torch.from_numpy(batch), tau), keys(5)).logits
    np.testing.assert_allclose(entropy(smoothed, tau), expected, rtol=2e-6, atol=1e-9)
    if np.ptp(probs, axis=1).max() > 1e-3 and average != "plain-mean":
        np.testing.assert_array_equal(smoothed.argmax(dim=1), batch.argmax(axis=1))


@pytest.mark.parametrize("average", AVERAGES)
def test_ls_global_says_that_it_must_be_fitted_first(average: str) -> None:
    with pytest.raises(UsageError, match="fitted"):
        control("ls-global", average=average)(Targets(torch.zeros(2, 3), 1.0), keys(2))
    with pytest.raises(ValueError, match="at least one row"):
        control("ls-global", average=average).fit([], 1.0)


# ---------------------------------------------------------------- bottom N-k


@given(logits=rows(), data=st.data())
def test_bottom_keeps_the_top_k_in_place_and_permutes_the_rest(logits: NDArray[np.float32], data: st.DataObject) -> None:
    classes = logits.shape[1]
    k = data.draw(st.integers(1, max(1, classes - 2)))
    seed = data.draw(st.integers(0, 2**31))
    made = control("bottom", k=k, seed=seed)(Targets(torch.from_numpy(logits), 4.0), keys(len(logits))).logits.numpy()
    for before, after in zip(logits, made, strict=True):
        top = np.argsort(-before, kind="stable")[:k]  # ties at rank k: the smaller class number is kept
        np.testing.assert_array_equal(after[top], before[top])
        np.testing.assert_array_equal(np.sort(after), np.sort(before))
    for tau in (1.0, 40.0):
        np.testing.assert_allclose(entropy(made, tau), entropy(logits, tau), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2])
def test_bottom_moves_every_class_everywhere_equally_often(k: int) -> None:
    rest = 4
    logits = torch.arange(k + rest, 0, -1).float().repeat(24_000, 1)
    made = control("bottom", k=k)(Targets(logits, 1.0), keys(24_000)).logits[:, k:].long()
    code = (made * torch.tensor([125, 25, 5, 1])).sum(dim=1)
    orders, counts = torch.unique(code, return_counts=True)
    assert len(orders) == math.factorial(rest)
    assert statistics.chisquare(counts.numpy()).pvalue > 1e-4


@given(seed=st.integers(0, 2**63 - 1), view=st.integers(0, 1000), data=st.data())
def test_bottom_depends_on_the_rows_key_and_not_on_its_batch_or_tau(seed: int, view: int, data: st.DataObject) -> None:
    logits = torch.from_numpy(np.random.default_rng(1).normal(0, 3, (9, 30)).astype(np.float32))
    samples = torch.arange(100, 109)
    shuffle = control("bottom", k=3, seed=seed)
    whole = shuffle(Targets(logits, 1.0), row_keys("cd" * 32, view, samples)).logits
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=12)))
    part = shuffle(Targets(logits[chosen], 40.0), row_keys("cd" * 32, view, samples[chosen])).logits
    assert torch.equal(part, whole[chosen])


@given(seed=st.integers(0, 2**32 - 2), view=st.integers(0, 10**6), sample=st.integers(0, 10**7))
def test_another_seed_view_sample_or_archive_is_another_shuffle(seed: int, view: int, sample: int) -> None:
    row = torch.arange(40).float()[None]

    def shuffled(seed: int = seed, view: int = view, sample: int = sample, archive: str = "ef" * 32) -> torch.Tensor:
        key = row_keys(archive, view, torch.tensor([sample]))
        made: torch.Tensor = control("bottom", k=1, seed=seed)(Targets(row, 1.0), key).logits
        return made

    first = shuffled()
    assert torch.equal(first, shuffled())
    for other in (shuffled(seed=seed + 1), shuffled(view=view + 1), shuffled(sample=sample + 1), shuffled(archive="fe" * 32)):
        assert (first == other).sum() < 12  # of 40 fixed points, one is expected


def test_shuffles_of_one_sample_in_different_views_have_nothing_in_common() -> None:
    made = [
        control("bottom", k=1)(Targets(torch.arange(50).float()[None], 1.0), row_keys("0" * 64, view, torch.tensor([7]))).logits
        for view in range(40)
    ]
    agreement = torch.stack([(a == b).float()[0, :-1].mean() for i, a in enumerate(made) for b in made[:i]])
    assert float(agreement.mean()) < 0.03  # 1/49 by chance


def test_seeds_of_the_shuffle_are_not_traded_for_sample_numbers() -> None:
    row = torch.arange(60).float().repeat(20, 1)
    made = [control("bottom", k=1, seed=seed)(Targets(row, 1.0), keys(20)).logits for seed in range(10)]
    every = {tuple(line.tolist()) for block in made for line in block}
    assert len(every) == 200


@pytest.mark.parametrize(("k", "classes"), [(9, 10), (10, 10), (12, 10), (1, 2)])
def test_bottom_refuses_a_k_that_leaves_nothing_to_permute(k: int, classes: int) -> None:
    for name in ("bottom", "topk"):
        made = control(name, k=k)
        with pytest.raises(UsageError, match=f"{name}:{k} with {classes} classes"):
            made.check(classes)
        with pytest.raises(UsageError, match=f"{name}:{k} with {classes} classes"):
            made(Targets(torch.zeros(3, classes), 1.0), keys(3))
        made.check(k + 2)


def test_bottom_refuses_to_keep_nothing() -> None:
    for name in ("bottom", "topk"):
        with pytest.raises(UsageError, match=f"{name}:0"):
            control(name, k=0)


def test_a_shuffle_per_sample_is_the_same_in_every_view() -> None:
    row, other = torch.arange(50).float()[None], torch.randn(1, 50, generator=torch.Generator().manual_seed(3))
    fixed, fresh = control("bottom", k=1, per="sample"), control("bottom", k=1)

    def made(how: Control, view: int, sample: int = 7, logits: torch.Tensor = row) -> torch.Tensor:
        return how(Targets(logits, 1.0), row_keys("0" * 64, view, torch.tensor([sample]))).logits

    first = made(fixed, 0)
    assert all(torch.equal(made(fixed, view), first) for view in range(1, 20))
    assert not torch.equal(made(fixed, 0, sample=8), first)
    assert not torch.equal(made(fresh, 0), made(fresh, 1))
    # Of other logits in another view it is the same permutation of ranks among the bottom classes' places.
    assert sorted(made(fixed, 3, logits=other)[0].tolist()) == sorted(other[0].tolist())


# ---------------------------------------------------------------- what sparse caches keep


@given(logits=rows(min_classes=4), data=st.data())
def test_topk_keeps_the_largest_probabilities_and_spreads_the_rest_evenly(
    logits: NDArray[np.float32], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, logits.shape[1] - 2))
    made = control("topk", k=k)(Targets(torch.from_numpy(logits), 20.0), keys(len(logits))).logits.double().numpy()
    before, after = (special.softmax(x.astype(np.float64), axis=1) for x in (logits, made))
    for row, p, q in zip(logits, before, after, strict=True):
        top = np.argsort(-row, kind="stable")[:k]
        bottom = np.setdiff1d(np.arange(len(row)), top)
        np.testing.assert_allclose(q[top], p[top], rtol=1e-5)
        np.testing.assert_allclose(q[bottom], p[bottom].sum() / len(bottom), rtol=1e-5)


def test_topk_loses_most_of_what_a_large_tau_shows() -> None:
    logits = np.random.default_rng(0).normal(0, 2, (256, 100)).astype(np.float32)
    sparse = control("topk", k=10)(Targets(torch.from_numpy(logits), 1.0), keys(256)).logits.numpy()
    for tau, least in ((1.0, 0.0), (20.0, 0.5)):
        p, q = (special.softmax(x / tau, axis=1) - 0.01 for x in (logits, sparse))  # less the uniform part, which says nothing
        assert np.abs(p - q).sum() / np.abs(p).sum() > least


# ---------------------------------------------------------------- targets themselves


@given(logits=rows(), tau=TAUS)
def test_probabilities_of_targets_are_the_tempered_softmax(logits: NDArray[np.float32], tau: float) -> None:
    expected = special.softmax(logits.astype(np.float64) / tau, axis=1)
    np.testing.assert_allclose(Targets(torch.from_numpy(logits), tau).probs.numpy(), expected, rtol=1e-5, atol=1e-12)


def test_targets_of_another_shape_or_temperature_are_refused() -> None:
    with pytest.raises(ValueError, match="logits"):
        Targets(torch.zeros(3), 1.0)
    for tau in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="tau"):
            Targets(torch.zeros(2, 3), tau)
