"""The contract of codecs: hostile logits come back within the stated bounds, or are refused by row, class and value."""

from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special

from kdcache.codecs import CODECS, Codec, kl_bound
from kdcache.errors import UsageError
from kdcache.registry import Registry
from kdcache.testing.components import ComponentContract

__all__ = ["CodecContract", "hostile"]

TAUS = (1, 4, 20, 40)


def hostile(classes: int) -> NDArray[np.float32]:
    """Rows `[16, classes]` that break careless codecs: constant, peaked, nearly tied, subnormal, and up to the usual limits."""
    rng = np.random.default_rng(classes)
    rows = [np.full(classes, value) for value in (0.0, -0.0, 63.5, -63.5, 1e-40, 1 / 1024)]
    peak = np.full(classes, -60.0)
    peak[rng.integers(classes)] = 60  # a gap of 120
    rows += [peak, -peak, np.linspace(-63.9, 63.9, classes), 7 + np.arange(classes) * 1e-6]
    rows += [rng.normal(0, scale, classes).clip(-63.9, 63.9) for scale in (1e-3, 0.3, 3, 20)]
    rows += [rng.choice([-63.9, 63.9], classes), (rng.integers(-32000, 32000, classes) + 0.5) / 512]
    return np.array(rows, np.float32)


class CodecContract(ComponentContract):
    """The codec `spec`."""

    registry: ClassVar[Registry[Any]] = CODECS

    @pytest.mark.parametrize("classes", [2, 3, 10, 37, 100, 2000, 21_841])
    def test_error_and_divergence_stay_within_the_stated_bounds(self, component: Codec, classes: int) -> None:
        logits = hostile(classes)
        stored = component.encode(logits)
        assert set(stored) == {"logits", *component.parameters}
        assert stored["logits"].dtype == component.dtype
        assert stored["logits"].shape == logits.shape
        for name in component.parameters:
            assert stored[name].dtype == np.dtype("<f4")
            assert stored[name].shape == (len(logits),)
        back, allowed = component.decode(stored), component.max_error(stored)
        assert back.dtype == np.float32
        assert (np.abs(back.astype(np.float64) - logits).max(axis=1) <= allowed).all()
        for tau in TAUS:
            log_p, log_q = (special.log_softmax(z.astype(np.float64) / tau, axis=1) for z in (logits, back))
            kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
            assert (kl <= kl_bound(allowed, tau) + 1e-12).all()
            assert (np.abs(log_p - log_q).max(axis=1) <= 2 * allowed / tau + 1e-12).all()

    def test_bounds_are_finite_and_shrink_with_the_temperature(self, component: Codec) -> None:
        allowed = component.max_error(component.encode(hostile(10)))
        bounds = np.array([kl_bound(allowed, tau) for tau in TAUS])
        assert np.isfinite(bounds).all()
        assert (np.diff(bounds, axis=0) <= 0).all()
        assert bounds.min() >= 0

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_is_refused_by_row_class_and_value(self, component: Codec, value: float) -> None:
        logits = hostile(10)
        logits[4, 7] = value
        with pytest.raises(UsageError) as caught:
            component.encode(logits)
        for named in ("row 4", "class 7", str(np.float32(value))):
            assert named in caught.value.what

    @pytest.mark.parametrize("value", [64.0, -64.0, 63.9990234375, 65.0, 1e3, 1e4, -65519.0, -1e5, 1e30, 3e38])
    def test_large_values_are_stored_within_the_bound_or_refused_and_never_clipped(self, component: Codec, value: float) -> None:
        logits = np.zeros((3, 10), np.float32)
        logits[2, 1] = value
        refused = ""
        try:
            stored = component.encode(logits)
        except UsageError as error:
            refused = error.what
        if refused:
            assert "row 2, class 1" in refused
            assert f"{np.float32(value):.6g}" in refused
        else:
            moved = np.abs(component.decode(stored).astype(np.float64) - logits).max(axis=1)
            assert (moved <= component.max_error(stored)).all()

    def test_at_least_the_range_of_trained_networks_is_accepted(self, component: Codec) -> None:
        component.encode(np.array([[-60.0, 60.0, 0.0]], np.float32))

    def test_other_software_decodes_with_the_recorded_attributes(self, component: Codec) -> None:
        logits = hostile(37)
        stored, attributes = component.encode(logits), component.attributes
        if not component.parameters:
            plain = stored["logits"] * attributes.get("scale_factor", 1.0) + attributes.get("add_offset", 0.0)
            np.testing.assert_array_equal(plain.astype(np.float32), component.decode(stored))
        written_out = eval(component.formula.format_map({key: key for key in stored}), {"np": np}, dict(stored))
        np.testing.assert_array_equal(written_out.astype(np.float32), component.decode(stored))

    def test_the_input_is_left_alone_and_need_not_lie_contiguously(self, component: Codec) -> None:
        logits = hostile(12)
        before = logits.copy()
        expected = component.encode(logits)
        np.testing.assert_array_equal(logits, before)
        for name, column in expected.items():
            np.testing.assert_array_equal(component.encode(np.asfortranarray(logits))[name], column)
            np.testing.assert_array_equal(component.encode(logits[::-1])[name], column[::-1])
        assert component.decode({name: column[:0] for name, column in expected.items()}).shape == (0, 12)

    def test_what_is_stored_is_left_alone_and_can_be_decoded_in_place(self, component: Codec) -> None:
        stored = component.encode(hostile(12))
        before = {name: column.copy() for name, column in stored.items()}
        expected, out = component.decode(stored), np.full((len(stored["logits"]), 12), np.nan, np.float32)
        assert component.decode(stored, out) is out
        np.testing.assert_array_equal(out, expected)
        expected += 1  # it is a copy
        for name, column in before.items():
            np.testing.assert_array_equal(stored[name], column)

    def test_stored_numbers_are_little_endian(self, component: Codec) -> None:
        assert component.dtype == component.dtype.newbyteorder("<")
