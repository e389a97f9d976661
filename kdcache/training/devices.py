"""Devices that models are trained on: which one, what it uses, and the states of its random numbers."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.system.distributed import this_rank
from kdcache.system.energy import Meter

__all__ = [
    "computes_in_bf16",
    "metered",
    "resolve_device",
    "rng_states",
    "rng_states_from",
    "seed_of_process",
    "seeded",
    "set_rng_states",
]


def resolve_device(name: str) -> torch.device:
    """`auto` is a GPU if there is one; of processes that torchrun started, each gets its own for `auto` and `cuda`.

    Raises UsageError for a device that this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and (local := this_rank().local) is not None:
        name = f"cuda:{local}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # `meta` makes tensors, but has nothing in them
    except Exception as error:  # every backend has its own errors
        raise UsageError(
            f"device {name!r} cannot be used",
            why=(str(error).splitlines() or [type(error).__name__])[0][:200],
            fix="use --device cpu, or --device auto for whatever there is",
        ) from None
    return device


def computes_in_bf16(device: torch.device) -> bool:
    """Whether it is a GPU with units for bf16, so that models are trained in it unless told otherwise."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def metered(device: torch.device, *, share: float | None = 1.0) -> Meter:
    """A meter of what is done on `device`: a GPU's joules, and those of this machine's CPU packages, or of a `share` of them."""
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
