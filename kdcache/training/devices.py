"""Devices that models are trained on: which one, what it uses, and the states of its random numbers."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kdcache.errors import RetryError, UsageError
from kdcache.system.distributed import Rank, this_rank
from kdcache.system.energy import SHARED_GPU, Meter

__all__ = [
    "computes_in_bf16",
    "device_kind",
    "enough_memory",
    "lack_of_memory",
    "memory_elsewhere",
    "metered",
    "out_of_memory",
    "resolve_device",
    "rng_states",
    "rng_states_from",
    "seed_of_process",
    "seeded",
    "set_rng_states",
]

# Most of torch's allocators raise a plain RuntimeError: those of a CPU (on Linux and Windows), of cuBLAS, cuDNN and Metal.
_NO_MEMORY = ("you tried to allocate", "STATUS_ALLOC_FAILED", "out of memory")

# What other kinds of devices lack.
_UNSUPPORTED = {
    "mps": "Metal has no float64, and random numbers of its own",
    **dict.fromkeys(("xpu", "hpu", "xla", "npu", "mtia", "vulkan", "privateuseone"), "nothing has been tested there"),
}


def resolve_device(name: str) -> torch.device:
    """`auto` is a GPU if there is one; of processes that torchrun started, each gets its own for `auto` and `cuda`.

    Raises UsageError for a device that this machine lacks, and for kinds of devices other than "cpu" and "cuda".
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu:0":
        name = "cpu"
    kind = name.partition(":")[0]
    if kind in _UNSUPPORTED:
        raise UsageError(
            f"device {name!r} is not supported",
            why=f"{_UNSUPPORTED[kind]}; kdcache computes on CPUs, and on GPUs of NVIDIA and AMD (cuda)",
            fix="use --device cpu",
        )
    if name == "cuda" and torch.cuda.is_available():
        name = _own_gpu(this_rank(), torch.cuda.device_count())
    try:
        device = torch.device(name)
        if device.type not in {"cpu", "cuda"} or (device.type == "cpu" and device.index is not None):
            raise ValueError("it is none of cpu, cuda, cuda:0, cuda:1, ...")
        torch.zeros(1, device=device).item()
    except Exception as error:  # every backend has its own errors
        raise UsageError(
            f"device {name!r} cannot be used",
            why=(str(error).splitlines() or [type(error).__name__])[0][:200],
            fix="use --device cpu, or --device auto for whatever there is",
        ) from None
    return device


def device_kind(device: torch.device) -> str:
    """The name of a kind of device, such as `NVIDIA H100 80GB HBM3` or `cpu`: others may give other last bits."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _own_gpu(rank: Rank, visible: int) -> str:
    """The GPU of one of several processes, of those that it sees. UsageError where it cannot be told."""
    if rank.of == 1 and rank.local is None:
        return "cuda"
    if visible == 1:  # as SLURM binds one to each process
        return "cuda:0"
    if rank.local is not None and rank.local < visible:
        return f"cuda:{rank.local}"
    if rank.local is None and rank.of <= visible:  # no two have the same one, on whatever machines they are
        return f"cuda:{rank.number}"
    if rank.local is not None:
        raise UsageError(
            f"process {rank.local} of this machine (LOCAL_RANK), and {visible} visible GPUs",
            why="each process gets a GPU of its own: two on one would both reckon with its whole memory and energy",
            fix="start as many processes on a machine as it has GPUs: torchrun --nproc-per-node gpu -m kdcache ...",
        )
    raise UsageError(
        f"RANK={rank.number} WORLD_SIZE={rank.of} without LOCAL_RANK, and {visible} visible GPUs",
        why="which of these GPUs is this process's own depends on how many processes each machine has",
        fix="set LOCAL_RANK to its number on its machine (SLURM: export LOCAL_RANK=$SLURM_LOCALID), or start by torchrun",
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device, or the host, had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def lack_of_memory(error: BaseException) -> str:
    """The allocator's words, for an error that is `out_of_memory`."""
    # CUDA's text goes on with the allocator's counters and with settings of its own.
    words = " ".join(str(error).split()).partition(" Of the allocated memory")[0]
    return words[:400] or "the system gave no more memory"


@contextmanager
def enough_memory(what: str, fix: str) -> Iterator[None]:
    """Work inside that runs out of memory, of a device or the host, raises RetryError: `what`, the allocator's words, `fix`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise RetryError(what, why=lack_of_memory(error), fix=fix) from error


def memory_elsewhere(device: torch.device) -> str:
    """How to mend a lack of memory for work that any device can do."""
    other = "" if device.type == "cpu" else ", or compute on the CPU: --device cpu"
    return f"end what else uses that memory and repeat the command{other}"


def computes_in_bf16(device: torch.device) -> bool:
    """Whether it is a GPU with units for bf16, so that models are trained in it unless told otherwise."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def metered(device: torch.device, *, share: float | None = 1.0) -> Meter:
    """A meter of what is done on `device`: a GPU's joules, and those of this machine's CPU packages, or of a `share` of them.

    On a GPU that other jobs of a study may share, all is unknown: each job takes longer beside others, and the counters are
    those of all.
    """
    if SHARED_GPU in os.environ:
        return Meter(unknown=True)
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", "")) if device.type == "cuda" else ""
    return Meter([f"GPU-{uuid.removeprefix('GPU-')}"] if uuid else (), share=share)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Code that draws from torch's global generator (model initialisation) draws from `seed`, and disturbs nobody."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def seed_of_process(seed: int, number: int) -> int:
    """What dropout of a process other than the first draws from; seeds are never added to each other."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "little")


def rng_states(device: torch.device) -> list[Tensor]:
    """The states of torch's own generators: the host's, and a GPU's if it is one."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_rng_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def rng_states_from(recorded: list[Tensor], own: list[Tensor]) -> list[Tensor]:
    """`recorded` states, perhaps of a machine with or without a GPU, for one whose states are `own`: those that lack stay."""
    return [*recorded[: len(own)], *own[len(recorded) :]]
