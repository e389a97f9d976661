"""Protects the stated bounds of the codecs: whatever they accept comes back within them, and nothing is ever clipped."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import special

from kdcache.codecs import CODECS, UnstorableError, kl_bound
from kdcache.errors import UsageError

NAMES = list(CODECS)
LOGITS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(2, 60)),
    elements=st.floats(-63.9375, 63.9375, width=32, allow_subnormal=True),
)
ANY = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(2, 20)),
    elements=st.one_of(
        st.floats(width=32, allow_nan=False),
        st.sampled_from([0.0, 120.0, -120.0, 1e4, -1e4, 65504.0, 65520.0, 1e38]).map(np.float32),
    ),
)


def kl(p_logits: NDArray, q_logits: NDArray, tau: float) -> NDArray[np.float64]:
    """KL(p || q) in nats of the softmaxes at tau, float64."""
    log_p, log_q = (special.log_softmax(np.asarray(z, np.float64) / tau, axis=-1) for z in (p_logits, q_logits))
    result: NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return result


@pytest.mark.parametrize("name", NAMES)
@given(logits=LOGITS)
def test_what_comes_back_is_within_the_stated_error_of_what_went_in(name: str, logits: NDArray[np.float32]) -> None:
    coding = CODECS.build(name)
    stored = coding.encode(logits)
    back, allowed = coding.decode(stored), coding.max_error(stored)
    assert back.dtype == np.float32
    assert (np.abs(back.astype(np.float64) - logits).max(axis=1) <= allowed).all()
    for tau in (1, 4, 20, 40):
        assert (kl(logits, back, tau) <= kl_bound(allowed, tau) + 1e-12).all()


@pytest.mark.parametrize("name", NAMES)
@given(logits=ANY)
def test_logits_of_any_size_come_back_within_the_stated_error_or_are_refused(name: str, logits: NDArray[np.float32]) -> None:
    coding = CODECS.build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused = None
        try:
            stored = coding.encode(logits)
        except UnstorableError as error:
            refused = error
        if refused:
            assert logits[refused.row, refused.column] == np.float32(refused.value)
            return
        back = coding.decode(stored)
    assert np.isfinite(back).all()
    assert (np.abs(back.astype(np.float64) - logits).max(axis=1) <= coding.max_error(stored)).all()


@pytest.mark.parametrize("name", NAMES)
@given(logits=LOGITS)
def test_a_second_round_changes_nothing_more(name: str, logits: NDArray[np.float32]) -> None:
    coding = CODECS.build(name)
    once = coding.decode(coding.encode(logits))
    if coding.parameters:  # a row's step may be rounded to another last digit, no more
        changes = np.abs(coding.decode(coding.encode(once)) - once).max(axis=1)
        assert (changes <= 1e-6 * np.abs(once).max(axis=1) + 1e-30).all()
    else:
        np.testing.assert_array_equal(coding.decode(coding.encode(once)), once)


@pytest.mark.parametrize("name", NAMES)
@given(logits=LOGITS)
def test_rows_are_stored_independently_of_each_other(name: str, logits: NDArray[np.float32]) -> None:
    coding = CODECS.build(name)
    together = coding.encode(logits)
    for i in range(len(logits)):
        for field, alone in coding.encode(logits[i : i + 1]).items():
            np.testing.assert_array_equal(alone[0], together[field][i])


@given(value=st.floats(64, 2.0**127, width=32), sign=st.sampled_from([-1, 1]), row=st.integers(0, 4), column=st.integers(0, 6))
def test_i16_refuses_what_does_not_fit_by_row_class_and_value(value: float, sign: int, row: int, column: int) -> None:
    logits = np.zeros((5, 7), np.float32)
    logits[row, column] = sign * value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UsageError) as caught:
            CODECS.build("i16").encode(logits)
    assert f"row {row}, class {column} is {logits[row, column]:.6g}" in caught.value.what
    assert "f32" in caught.value.fix


def test_i16_accepts_everything_up_to_its_last_step_and_the_next_is_an_error() -> None:
    coding = CODECS.build("i16")
    last = np.float32(32767 / 512)
    edge = np.array([[last, -last, np.nextafter(last + np.float32(1 / 1024), np.float32(0)), 0]], np.float32)
    back = coding.decode(coding.encode(edge))
    np.testing.assert_array_equal(back, [[last, -last, last, 0]])
    for beyond in (last + 1 / 512, -last - 1 / 512, 64, -64):
        with pytest.raises(UsageError):
            coding.encode(np.array([[beyond, 0]], np.float32))
