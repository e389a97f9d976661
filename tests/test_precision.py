"""Protects float32: wherever it is meant, no library may use fewer bits, and what the caller had set comes back."""

import pytest
import torch

from kdcache.system.precision import ieee_float32


@pytest.mark.parametrize("before", ["tf32", "ieee"])
def test_float32_has_all_its_bits_inside_and_is_as_before_outside(before: str) -> None:
    places = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    at_first = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = before
        with ieee_float32():
            assert [place.fp32_precision for place in places] == ["ieee", "ieee"]
        assert [place.fp32_precision for place in places] == [before, before]
    finally:
        for place, precision in zip(places, at_first, strict=True):
            place.fp32_precision = precision
