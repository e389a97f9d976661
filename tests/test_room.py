"""Amounts in words: two that differ never look the same."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import RetryError
from kdcache.system.room import numbers, require_room, sizes


@given(st.integers(0, 1 << 50), st.integers(0, 1 << 50))
def test_sizes_that_differ_are_shown_so(a: int, b: int) -> None:
    x, y = sizes(a, b)
    assert (x == y) == (a == b)


@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_numbers_that_differ_are_shown_so(a: float, b: float) -> None:
    x, y = numbers(a, b)
    assert (x == y) == (a == b)


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ((1_500_000_000, 1_400_000_000), ["1.5 GB", "1.4 GB"]),
        ((1_500_000_001, 1_500_000_000), ["1,500,000,001 bytes", "1,500,000,000 bytes"]),
        ((1_504_000_000, 1_501_000_000), ["1.504 GB", "1.501 GB"]),
        ((999, 7), ["999 bytes", "7 bytes"]),
        ((5000,), ["5.0 kB"]),
    ],
)
def test_sizes_have_the_digits_that_they_need(counts: tuple[int, ...], shown: list[str]) -> None:
    assert sizes(*counts) == shown


def test_a_disk_that_lacks_one_byte_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcache.system.room.free_bytes", lambda path: 2_000_000_000)
    require_room(tmp_path, 2_000_000_000, "it", why="", elsewhere="")
    with pytest.raises(RetryError) as caught:
        require_room(tmp_path, 2_000_000_001, "the canvas", why="many", elsewhere="choose another disk with --data-dir")
    assert caught.value.what == f"the canvas needs 2,000,000,001 bytes more, {tmp_path} has 2,000,000,000 bytes"
