"""Protects work that runs out of memory: it ends as an error that says what to do and can be repeated, on every device."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kdcache.errors import RetryError
from kdcache.training.devices import enough_memory

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 3.00 GiB is free. "
    "Of the allocated memory 70.00 GiB is allocated by PyTorch, and 1.00 GiB is reserved by PyTorch but unallocated."
)


def on_a_gpu() -> None:
    raise torch.OutOfMemoryError(CUDA)


def in_a_library() -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def on_a_cpu() -> None:
    torch.empty(1 << 50)


def in_numpy() -> None:
    np.empty(1 << 50)


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (on_a_gpu, "3.00 GiB is free."),
        (in_a_library, "CUBLAS_STATUS_ALLOC_FAILED"),
        (on_a_cpu, "you tried to allocate 4503599627370496 bytes"),
        (in_numpy, "Unable to allocate"),
    ],
)
def test_what_runs_out_of_memory_can_be_repeated(work: Callable[[], None], words: str) -> None:
    with pytest.raises(RetryError) as caught, enough_memory("no memory for 256 views", "use -b 128"):
        work()
    assert (caught.value.what, caught.value.fix) == ("no memory for 256 views", "use -b 128")
    assert words in caught.value.why
    assert "reserved by PyTorch" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


def test_other_errors_are_not_called_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shape"), enough_memory("no memory", "use less"):
        raise RuntimeError("shape mismatch")
