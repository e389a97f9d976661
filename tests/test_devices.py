"""Which device a process computes on: what is there, what is its own, and what is refused by name."""

import pytest
import torch

from kdcache.errors import UsageError
from kdcache.system.distributed import Rank, this_rank
from kdcache.training.devices import resolve_device

CLUSTERS = ("SLURM_PROCID", "SLURM_LOCALID", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch):
    """Set what a starter of processes tells them, and how many GPUs a process sees."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *CLUSTERS):
        monkeypatch.delenv(name, raising=False)

    def tell(visible: int = 0, **environment: int) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        real = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *shape, device: real(*shape))  # there is no GPU to try

    return tell


@pytest.mark.parametrize("name", ["cpu", "cpu:0", "auto"])
def test_a_cpu_is_one_device_however_it_is_called(told, name: str) -> None:
    told()
    assert resolve_device(name) == torch.device("cpu")


@pytest.mark.parametrize("name", ["mps", "mps:0", "xpu", "hpu:1", "privateuseone"])
def test_other_accelerators_are_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}' is not supported") as refused:
        resolve_device(name)
    assert refused.value.fix == "use --device cpu"


@pytest.mark.parametrize("name", ["meta", "cpu:1", "gpu", "", "cuda:x"])
def test_what_is_no_device_is_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=f"device '{name}' cannot be used"):
        resolve_device(name)


@pytest.mark.parametrize(
    ("environment", "visible", "own"),
    [
        ({}, 4, "cuda"),
        ({"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1}, 4, "cuda:1"),
        ({"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 3}, 1, "cuda:0"),  # SLURM with a GPU bound to each process
        ({"RANK": 5, "WORLD_SIZE": 8, "SLURM_PROCID": 5, "SLURM_LOCALID": 1}, 4, "cuda:1"),
        ({"RANK": 5, "WORLD_SIZE": 8, "OMPI_COMM_WORLD_RANK": 5, "OMPI_COMM_WORLD_LOCAL_RANK": 2}, 4, "cuda:2"),
        ({"RANK": 2, "WORLD_SIZE": 4}, 4, "cuda:2"),
        ({"RANK": 6, "WORLD_SIZE": 8}, 1, "cuda:0"),
    ],
)
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_has_a_gpu_of_its_own(told, environment: dict[str, int], visible: int, own: str, name: str) -> None:
    told(visible, **environment)
    assert resolve_device(name) == torch.device(own)
    assert resolve_device("cuda:0") == torch.device("cuda:0"), "what is asked for by number is what it is"


@pytest.mark.parametrize(
    ("environment", "visible", "said"),
    [
        ({"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 3}, 2, r"process 3 of this machine \(LOCAL_RANK\), and 2 visible GPUs"),
        ({"RANK": 5, "WORLD_SIZE": 8}, 4, "RANK=5 WORLD_SIZE=8 without LOCAL_RANK, and 4 visible GPUs"),
        # The number of a script's step, in which somebody started the processes by hand.
        ({"RANK": 5, "WORLD_SIZE": 8, "SLURM_PROCID": 0, "SLURM_LOCALID": 0}, 4, "without LOCAL_RANK"),
    ],
)
def test_a_gpu_that_may_be_anothers_is_not_taken(told, environment: dict[str, int], visible: int, said: str) -> None:
    told(visible, **environment)
    with pytest.raises(UsageError, match=said):
        resolve_device("auto")


def test_mpi_tells_how_many_processes_share_a_machine(told) -> None:
    names = {"OMPI_COMM_WORLD_RANK": 5, "OMPI_COMM_WORLD_LOCAL_RANK": 1, "OMPI_COMM_WORLD_LOCAL_SIZE": 4}
    told(RANK=5, WORLD_SIZE=8, **names)
    assert this_rank() == Rank(5, 8, 1, 4)


@pytest.mark.parametrize("wrong", [{"LOCAL_RANK": -1}, {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 0}, {"RANK": 8}])
def test_numbers_that_cannot_be_are_refused(told, wrong: dict[str, int]) -> None:
    told(**({"RANK": 5, "WORLD_SIZE": 8} | wrong))
    with pytest.raises(UsageError, match="WORLD_SIZE=8"):
        this_rank()
