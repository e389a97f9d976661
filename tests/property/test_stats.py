"""Protects the entropies and power sums that archives publish and controls match: against SciPy, and at the edges of float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import special
from scipy import stats as statistics

from kdcache.methods import METHODS
from kdcache.stats import (
    entropies_and_argmax,
    entropy,
    label_smoothing,
    logit_moments,
    matched_smoothing,
    power_sums,
    relative_entropy,
    softmax,
    sorted_mean_softmax,
    summarise_ranked,
)

TAUS = st.sampled_from([0.5, 1.0, 3.0, 4.0, 20.0, 40.0])


def power_sum(logits: NDArray[np.float64], tau: float) -> NDArray[np.float64]:
    """U = sum_c p_c^(1/tau) of every row, as wttm weighs samples (arXiv 2402.11148, section 3.3)."""
    weights = METHODS.build("wttm").weights(torch.from_numpy(logits), tau)  # type: ignore[attr-defined]
    u: NDArray[np.float64] = weights.numpy()
    return u


def rows(largest: float = 60.0, min_classes: int = 3) -> st.SearchStrategy[NDArray[np.float64]]:
    shape = st.tuples(st.integers(1, 4), st.integers(min_classes, 40))
    return shape.flatmap(lambda s: hnp.arrays(np.float64, s, elements=st.floats(-largest, largest)))


@given(logits=rows(), tau=TAUS)
def test_softmax_and_entropy_agree_with_scipy(logits: NDArray[np.float64], tau: float) -> None:
    probs = special.softmax(logits / tau, axis=1)
    np.testing.assert_allclose(softmax(logits, tau), probs, rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(entropy(logits, tau), statistics.entropy(probs, axis=1), rtol=1e-10, atol=1e-13)


@given(logits=rows(), tau=TAUS)
def test_relative_entropies_agree_with_scipy_on_the_softmax_with_and_without_the_top_class(
    logits: NDArray[np.float64], tau: float
) -> None:
    h, rest = relative_entropy(logits, tau)
    classes = logits.shape[1]
    for i, z in enumerate(logits):
        others = np.delete(z, z.argmax())
        whole = statistics.entropy(special.softmax(z / tau)) / math.log(classes)
        assert h[i] == pytest.approx(whole, rel=1e-10, abs=1e-13)
        without = statistics.entropy(special.softmax(others / tau)) / math.log(classes - 1)
        assert rest[i] == pytest.approx(without, rel=1e-10, abs=1e-13)


@given(logits=rows(largest=30), shift=st.floats(-1000, 1000), tau=TAUS)
def test_adding_a_constant_to_a_row_changes_nothing(logits: NDArray[np.float64], shift: float, tau: float) -> None:
    for one, other in zip(relative_entropy(logits, tau), relative_entropy(logits + shift, tau), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(power_sum(logits, tau), power_sum(logits + shift, tau), rtol=1e-9)


@given(logits=rows(largest=20), lift=st.floats(0, 1e4), tau=TAUS)
def test_h_rest_ignores_how_far_the_top_class_stands_out(logits: NDArray[np.float64], lift: float, tau: float) -> None:
    raised = logits.copy()
    raised[np.arange(len(logits)), logits.argmax(axis=1)] += lift
    np.testing.assert_allclose(relative_entropy(raised, tau)[1], relative_entropy(logits, tau)[1], rtol=1e-9, atol=1e-11)


@given(logits=rows(), seed=st.integers(0, 100), tau=TAUS)
def test_the_order_of_the_classes_does_not_matter(logits: NDArray[np.float64], seed: int, tau: float) -> None:
    shuffled = logits[:, np.random.default_rng(seed).permutation(logits.shape[1])]
    for one, other in zip(relative_entropy(logits, tau), relative_entropy(shuffled, tau), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(sorted_mean_softmax(logits, tau), sorted_mean_softmax(shuffled, tau), rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
@pytest.mark.parametrize("value", [0.0, -63.5, 1e4])
def test_a_uniform_row_has_relative_entropies_of_one_and_never_more(classes: int, value: float) -> None:
    for h in relative_entropy(np.full((2, classes), value)):
        np.testing.assert_allclose(h, 1.0, rtol=1e-12)
        assert (h <= 1).all()


def exact_entropies(row: NDArray, tau: float) -> tuple[float, float]:
    """Both relative entropies in extended precision (64-bit mantissa), from the definition."""
    wide = row.astype(np.longdouble) / np.longdouble(tau)

    def relative(z: NDArray[np.longdouble]) -> float:
        p = np.exp(z - z.max())
        p /= p.sum()
        p = p[p > 0]
        return float(-(p * np.log(p)).sum() / np.log(np.longdouble(len(z))))

    return relative(wide), relative(np.delete(wide, row.argmax())) if len(row) > 2 else 1.0


def hostile_rows(classes: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(classes)
    base = rng.normal(0, 3, (9, classes)).astype(np.float32)
    base[0] = 7.25  # constant
    base[1, [0, -1]] = base[1].max() + 1  # a tie at the top
    base[2, -1] += 120  # the rest underflows in float32
    base[3, 0] = 1e4
    base[4, 0] = -1e4
    base[5] = np.where(np.arange(classes) % 2, 50, -50)
    base[6] += 3000  # far from zero
    base[7] = np.linspace(0, 88, classes)
    base[8] *= 1e-5  # nearly uniform
    return base


@pytest.mark.parametrize("classes", [2, 3, 37, 1000, 21841])
@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0, 40.0])
def test_hostile_rows_agree_with_extended_precision(classes: int, tau: float) -> None:
    logits = hostile_rows(classes)
    h, rest, top = entropies_and_argmax(logits, tau)
    exact = np.array([exact_entropies(row, tau) for row in logits])
    np.testing.assert_allclose(h, exact[:, 0], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(rest, exact[:, 1], rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(top, logits.argmax(axis=1))


@given(logits=rows(min_classes=2), tau=TAUS)
def test_entropies_agree_with_extended_precision(logits: NDArray[np.float64], tau: float) -> None:
    h, rest, _ = entropies_and_argmax(logits, tau)
    exact = np.array([exact_entropies(row, tau) for row in logits])
    np.testing.assert_allclose(h, exact[:, 0], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(rest, exact[:, 1], rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("count", [0, 1, 700])
def test_rows_are_independent_of_the_blocks_they_are_computed_in(count: int) -> None:
    logits = np.random.default_rng(1).normal(0, 4, (count, 300)).astype(np.float32)  # 218 rows a block
    together = entropies_and_argmax(logits, 3.0)
    alone = [entropies_and_argmax(row, 3.0) for row in logits]
    for number, values in enumerate(together):
        np.testing.assert_array_equal(values, np.array([one[number] for one in alone], values.dtype))


@pytest.mark.parametrize("tau", [1.0, 40.0])
@pytest.mark.parametrize("gap", [1e4, 1e6])
def test_huge_gaps_stay_finite_and_between_zero_and_one(tau: float, gap: float) -> None:
    logits = np.array([[gap, 0, 0, 0], [0, -gap, gap, gap], [gap, gap / 2, 0, -gap]])
    for values in relative_entropy(logits, tau):
        assert np.isfinite(values).all()
        assert ((values >= 0) & (values <= 1)).all()
    assert relative_entropy(logits[:1], tau)[1] == pytest.approx(1.0)  # the rest of row 0 is uniform
    assert relative_entropy(logits[1:2], tau)[0] == pytest.approx(math.log(2) / math.log(4))
    u = power_sum(logits, tau)
    assert np.isfinite(u).all()
    assert (u >= 1 - 1e-12).all()


@given(logits=rows(largest=15), tau=TAUS)
def test_power_sum_is_the_sum_of_powers_of_the_softmax(logits: NDArray[np.float64], tau: float) -> None:
    expected = (special.softmax(logits, axis=1) ** (1 / tau)).sum(axis=1)
    np.testing.assert_allclose(power_sum(logits, tau), expected, rtol=1e-10)


def test_float32_rows_and_more_axes_are_taken_in_float64() -> None:
    logits = np.random.default_rng(0).normal(0, 5, (3, 4, 7)).astype(np.float32)
    h, rest = relative_entropy(logits, 4)
    assert h.shape == rest.shape == (3, 4)
    assert h.dtype == np.float64
    np.testing.assert_array_equal(h.reshape(-1), relative_entropy(logits.reshape(-1, 7).astype(np.float64), 4)[0])
    np.testing.assert_array_equal(logits, np.random.default_rng(0).normal(0, 5, (3, 4, 7)).astype(np.float32))  # not overwritten


def test_two_classes_leave_one_whose_relative_entropy_is_one_and_one_class_is_refused() -> None:
    h, rest = relative_entropy([[0.0, 3.0]])
    assert rest.tolist() == [1.0]
    assert h[0] == pytest.approx(statistics.entropy(special.softmax([0.0, 3.0])) / math.log(2))
    with pytest.raises(ValueError, match="2 classes"):
        relative_entropy([[1.0]])


@given(logits=rows(), tau=TAUS)
def test_sorted_mean_softmax_descends_and_sums_to_one(logits: NDArray[np.float64], tau: float) -> None:
    mean = sorted_mean_softmax(logits, tau)
    assert mean.sum() == pytest.approx(1)
    assert (np.diff(mean) <= 1e-15).all()
    assert mean[0] == pytest.approx(special.softmax(logits / tau, axis=1).max(axis=1).mean())


def test_logit_moments_are_the_population_mean_and_deviation() -> None:
    mean, deviation = logit_moments(np.array([[1, 2, 6], [4, 4, 4]], np.float32))
    np.testing.assert_allclose(mean, [3, 4])
    np.testing.assert_allclose(deviation, [math.sqrt(14 / 3), 0])


@given(logits=rows(min_classes=2), tau=TAUS)
def test_one_pass_over_sorted_rows_gives_what_three_functions_give(logits: NDArray[np.float64], tau: float) -> None:
    h, rest, total, mass = summarise_ranked(np.sort(logits, axis=1)[:, ::-1], tau)
    np.testing.assert_allclose(1 / mass, softmax(logits, tau).max(axis=1), rtol=1e-12)
    for one, other in zip((h, rest), relative_entropy(logits, tau), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(total / len(logits), sorted_mean_softmax(logits, tau), rtol=1e-12, atol=1e-300)


@given(logits=rows(min_classes=2), tau=TAUS)
def test_power_sums_are_those_of_the_softmax_between_their_bounds(logits: NDArray[np.float64], tau: float) -> None:
    """TTM (arXiv 2402.11148), section 4: U is 1 for a certain teacher and C^(1 - 1/tau) for a uniform one."""
    sums = power_sums(logits, tau)
    gamma = np.longdouble(1) / np.longdouble(tau)
    p = np.exp(logits.astype(np.longdouble) - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(sums, ((p / p.sum(axis=1, keepdims=True)) ** gamma).sum(axis=1).astype(float), rtol=1e-10)
    if tau >= 1:
        assert (sums > 1 - 1e-12).all()
        assert (sums <= logits.shape[1] ** (1 - 1 / tau) * (1 + 1e-12)).all()


def test_one_pass_over_sorted_rows_adds_up_over_its_blocks() -> None:
    logits = np.random.default_rng(2).normal(0, 4, (500, 700)).astype(np.float32)  # 93 rows a block
    h, _, total, _ = summarise_ranked(np.sort(logits, axis=1)[:, ::-1], 2.0)
    np.testing.assert_allclose(h, relative_entropy(logits, 2.0)[0], rtol=1e-13)
    np.testing.assert_allclose(total / 500, sorted_mean_softmax(logits, 2.0), rtol=1e-12)


def entropy_of(p: NDArray[np.float64]) -> float:
    wide = p[p > 0].astype(np.longdouble)
    return float(-(wide * np.log(wide)).sum())


@given(h=st.floats(0, 1), classes=st.sampled_from([2, 3, 37, 1000, 21841]))
def test_matched_smoothing_has_the_entropy_that_was_asked_for(h: float, classes: int) -> None:
    alpha = float(matched_smoothing(h, classes))
    assert 0 <= alpha <= 1
    smoothed = label_smoothing(alpha, classes)
    assert smoothed.sum() == pytest.approx(1, abs=1e-12)
    assert entropy_of(smoothed) == pytest.approx(h * math.log(classes), abs=1e-9)


@pytest.mark.parametrize("classes", [2, 37, 1000])
def test_matched_smoothing_at_its_ends_and_of_many_entropies(classes: int) -> None:
    h = np.array([[0.0, 1e-12, 0.25], [0.5, 1 - 1e-12, 1.0]])
    alpha = matched_smoothing(h, classes)
    assert alpha[0, 0] == pytest.approx(0, abs=1e-15)
    assert alpha[1, 2] == 1
    assert (np.diff(alpha.reshape(-1)) > 0).all()
    # Close to uniform the entropy falls as d^2 (C - 1) / 2: 1 - alpha is known there, though alpha is nearly 1.
    assert 1 - alpha[1, 1] == pytest.approx(math.sqrt(2e-12 * math.log(classes) / (classes - 1)), rel=1e-3)
