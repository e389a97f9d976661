"""Every codec: hostile logits come back within its stated bounds or are refused by row, class and value."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special

from kdcache.codecs import CODECS, kl_bound
from kdcache.errors import UsageError

TAUS = (1, 4, 20, 40)
NAMES = list(CODECS)


def hostile(classes: int) -> NDArray[np.float32]:
    """Rows that break careless codecs: constant, peaked, nearly tied, subnormal, and up to the usual limits."""
    rng = np.random.default_rng(classes)
    rows = [np.full(classes, value) for value in (0.0, -0.0, 63.5, -63.5, 1e-40, 1 / 1024)]
    peak = np.full(classes, -60.0)
    peak[rng.integers(classes)] = 60  # a gap of 120
    rows += [peak, -peak, np.linspace(-63.9, 63.9, classes), 7 + np.arange(classes) * 1e-6]
    rows += [rng.normal(0, scale, classes).clip(-63.9, 63.9) for scale in (1e-3, 0.3, 3, 20)]
    rows += [rng.choice([-63.9, 63.9], classes), (rng.integers(-32000, 32000, classes) + 0.5) / 512]
    return np.array(rows, np.float32)


@pytest.mark.grid
@pytest.mark.parametrize("classes", [2, 3, 10, 37, 100, 2000, 21_841])
@pytest.mark.parametrize("name", NAMES)
def test_error_and_divergence_stay_within_the_stated_bounds(name: str, classes: int) -> None:
    coding, logits = CODECS.build(name), hostile(classes)
    stored = coding.encode(logits)
    assert set(stored) == {"logits", *coding.parameters}
    assert stored["logits"].dtype == coding.dtype
    assert stored["logits"].shape == logits.shape
    assert all(stored[name].dtype == np.dtype("<f4") and stored[name].shape == (len(logits),) for name in coding.parameters)
    back, allowed = coding.decode(stored), coding.max_error(stored)
    assert back.dtype == np.float32
    assert (np.abs(back.astype(np.float64) - logits).max(axis=1) <= allowed).all()
    for tau in TAUS:
        log_p, log_q = (special.log_softmax(z.astype(np.float64) / tau, axis=1) for z in (logits, back))
        kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
        assert (kl <= kl_bound(allowed, tau) + 1e-12).all()
        assert (np.abs(log_p - log_q).max(axis=1) <= 2 * allowed / tau + 1e-12).all()


@pytest.mark.parametrize("name", NAMES)
def test_bounds_are_finite_and_shrink_with_the_temperature(name: str) -> None:
    coding = CODECS.build(name)
    allowed = coding.max_error(coding.encode(hostile(10)))
    bounds = np.array([kl_bound(allowed, tau) for tau in TAUS])
    assert np.isfinite(bounds).all()
    assert (np.diff(bounds, axis=0) <= 0).all()
    assert bounds.min() >= 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_is_refused_by_row_class_and_value(name: str, value: float) -> None:
    logits = hostile(10)
    logits[4, 7] = value
    with pytest.raises(UsageError) as caught:
        CODECS.build(name).encode(logits)
    for named in ("row 4", "class 7", str(np.float32(value))):
        assert named in caught.value.what


@pytest.mark.grid
@pytest.mark.parametrize("value", [64.0, -64.0, 63.9990234375, 65.0, 1e3, 1e4, -65519.0, -1e5, 1e30, 3e38])
@pytest.mark.parametrize("name", NAMES)
def test_large_values_are_stored_within_the_bound_or_refused_and_never_clipped(name: str, value: float) -> None:
    coding, logits = CODECS.build(name), np.zeros((3, 10), np.float32)
    logits[2, 1] = value
    refused = ""
    try:
        stored = coding.encode(logits)
    except UsageError as error:
        refused = error.what
    if refused:
        assert "row 2, class 1" in refused
        assert f"{np.float32(value):.6g}" in refused
    else:
        moved = np.abs(coding.decode(stored).astype(np.float64) - logits).max(axis=1)
        assert (moved <= coding.max_error(stored)).all()


@pytest.mark.parametrize("name", NAMES)
def test_at_least_the_range_of_trained_networks_is_accepted(name: str) -> None:
    CODECS.build(name).encode(np.array([[-60.0, 60.0, 0.0]], np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_other_software_decodes_with_the_recorded_attributes(name: str) -> None:
    coding, logits = CODECS.build(name), hostile(37)
    stored, attributes = coding.encode(logits), coding.attributes
    if not coding.parameters:
        plain = stored["logits"] * attributes.get("scale_factor", 1.0) + attributes.get("add_offset", 0.0)
        np.testing.assert_array_equal(plain.astype(np.float32), coding.decode(stored))
    written_out = eval(coding.formula.format_map({key: key for key in stored}), {}, dict(stored))
    np.testing.assert_array_equal(written_out.astype(np.float32), coding.decode(stored))


@pytest.mark.parametrize("name", NAMES)
def test_the_input_is_left_alone_and_need_not_lie_contiguously(name: str) -> None:
    coding, logits = CODECS.build(name), hostile(12)
    before = logits.copy()
    expected = coding.encode(logits)
    np.testing.assert_array_equal(logits, before)
    for name, column in expected.items():
        np.testing.assert_array_equal(coding.encode(np.asfortranarray(logits))[name], column)
        np.testing.assert_array_equal(coding.encode(logits[::-1])[name], column[::-1])
    assert coding.decode({name: column[:0] for name, column in expected.items()}).shape == (0, 12)


@pytest.mark.parametrize("name", NAMES)
def test_stored_numbers_are_little_endian(name: str) -> None:
    dtype = CODECS.build(name).dtype
    assert dtype == dtype.newbyteorder("<")
