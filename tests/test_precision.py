"""Protects float32: wherever it is meant, no library may use fewer bits, and what the caller had set comes back."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kdcache.system.precision import ieee_float32

backends: Any = torch.backends
PLACES = {
    "conv": backends.cudnn.conv,
    "rnn": backends.cudnn.rnn,
    "matmul": backends.cuda.matmul,
    "cpu conv": backends.mkldnn.conv,
    "cpu matmul": backends.mkldnn.matmul,
}
OLDER: dict[str, Callable[[], Any]] = {
    "cudnn": lambda: backends.cudnn.allow_tf32,
    "cuda": lambda: backends.cuda.matmul.allow_tf32,
    "matmul": torch.get_float32_matmul_precision,
}


def state() -> dict[str, Any]:
    """All that can be read, and which of the older settings torch refuses to read."""
    found = {name: place.fp32_precision for name, place in PLACES.items()}
    for name, read in OLDER.items():
        found[f"older {name}"] = "refused"
        with contextlib.suppress(RuntimeError):
            found[f"older {name}"] = read()
    return found


def each(precision: str, *names: str) -> None:
    for name in names:
        PLACES[name].fp32_precision = precision


BEFORE: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "tf32": lambda: each("tf32", "conv", "matmul"),
    "ieee": lambda: each("ieee", "conv", "rnn", "matmul"),
    "one": lambda: each("ieee", "conv"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "older cudnn": lambda: setattr(backends.cudnn, "allow_tf32", False),
    "older cuda": lambda: setattr(backends.cuda.matmul, "allow_tf32", False),
    "high, then older": lambda: [before() for before in (BEFORE["high"], BEFORE["older cuda"])],
    "all tf32": lambda: setattr(backends, "fp32_precision", "tf32"),
    "all ieee": lambda: setattr(backends, "fp32_precision", "ieee"),
}


@pytest.fixture(autouse=True)
def as_torch_begins() -> Iterator[None]:
    def reset() -> None:
        backends.fp32_precision = "none"
        backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("highest")
        each("none", "matmul", "cpu conv", "cpu matmul")

    reset()
    yield
    reset()


@pytest.mark.parametrize("before", BEFORE)
def test_float32_has_all_its_bits_inside_and_is_as_before_outside(before: str) -> None:
    BEFORE[before]()
    first = state()
    with warnings.catch_warnings(action="error"):
        for _ in range(2):
            with ieee_float32():
                assert {name: place.fp32_precision for name, place in PLACES.items()} == dict.fromkeys(PLACES, "ieee")
                assert [read() for read in OLDER.values()] == [False, False, "highest"]
                with ieee_float32():  # a model's own code may use it too
                    pass
                assert [read() for read in OLDER.values()] == [False, False, "highest"]
            assert state() == first


@pytest.mark.parametrize("allowed", [True, False])
def test_an_older_setting_that_cannot_be_read_comes_back(allowed: bool) -> None:
    backends.cudnn.allow_tf32 = allowed
    each("ieee" if allowed else "tf32", "conv")
    assert state()["older cudnn"] == "refused"
    with ieee_float32():
        pass
    each("tf32" if allowed else "ieee", "conv", "rnn")
    assert backends.cudnn.allow_tf32 == allowed


def test_what_follows_a_setting_of_all_still_does() -> None:
    each("none", *PLACES)
    for precision in ("ieee", "tf32"):
        backends.fp32_precision = precision
        with ieee_float32():
            pass
        assert [place.fp32_precision for place in PLACES.values()] == [precision] * len(PLACES)
