"""Processes that torchrun started together: which one this is, what they exchange, and how they agree."""

import contextlib
import datetime
import os
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdcache.errors import RetryError, UsageError
from kdcache.system.alarm import Alarm
from kdcache.system.interrupts import Stopped

__all__ = ["ALONE", "Rank", "Team", "joined", "this_rank"]

T = TypeVar("T")

PATIENCE = datetime.timedelta(minutes=30)  # of one exchange; what may take longer is waited for by `Team.wait`
CLOSING = 10.0  # seconds, after a failure
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# What starters other than torchrun call a process's number, and its number on its machine and how many there are.
STARTERS = (
    ("SLURM_PROCID", "SLURM_LOCALID", "LOCAL_WORLD_SIZE"),  # SLURM tells how many in a text for all nodes
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH and Intel MPI
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)


@dataclass(frozen=True)
class Rank:
    """Process `number` of `of`; `local` is its number on this machine, of `here`: None if nobody has told."""

    number: int = 0
    of: int = 1
    local: int | None = None
    here: int | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks for all, and makes what all of them need."""
        return self.number == 0

    @property
    def share(self) -> float | None:
        """This process's part of the resources that this machine's processes share; None if their number is unknown."""
        return None if self.here is None else 1 / self.here


def this_rank() -> Rank:
    """As RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE in the environment say; the only process where they are not set.

    Where the last two are missing, the variables of SLURM or MPI count, if they speak of the same RANK.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Rank(here=1)
    names = list(NAMES)
    if "LOCAL_RANK" not in os.environ:
        same = (others for number, *others in STARTERS if os.environ.get(number) == os.environ["RANK"])
        names[2:] = next((others for others in same if others[0] in os.environ), NAMES[2:])
    try:
        rank = Rank(*(int(os.environ[name]) if name in os.environ else None for name in names))  # type: ignore[arg-type]
        if not 0 <= rank.number < rank.of or (rank.here is not None and rank.here < 1) or (rank.local or 0) < 0:
            raise ValueError
    except ValueError:
        told = " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
        raise UsageError(
            f"{told} in the environment",
            why="they number the processes of a job, from 0 to WORLD_SIZE - 1",
            fix="unset RANK WORLD_SIZE LOCAL_RANK, or start the processes with torchrun",
        ) from None
    return rank


class Team:
    """Process `number` of `size`. Of one, nothing here costs anything.

    Each process holds an equal part of every batch, the parts in the order of the processes. All of them must call the
    methods in the same order.
    """

    def __init__(
        self, number: int = 0, size: int = 1, alarm: Alarm | None = None, connect: Callable[[int], None] = lambda meeting: None
    ) -> None:
        self.number, self.size, self._alarm, self._connect = number, size, alarm, connect

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes for all."""
        return self.number == 0

    def wait(self) -> None:
        """Until all are here, however long that takes. Raises the error of one that fails meanwhile."""
        if self._alarm is not None:
            self._alarm.wait()

    def apart(self) -> contextlib.AbstractContextManager[None]:
        """Work inside needs no other process, and goes on if one of them fails, unless its starter ends it then.

        torchrun does, by SIGTERM: training stops after a checkpoint, and the same command goes on from there.
        """
        return contextlib.nullcontext() if self._alarm is None else self._alarm.apart()

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process does what is inside, and then the others do, who find what it has made."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    @property
    def is_broken_up(self) -> bool:
        """Whether one of the processes has left what they did together."""
        return self._alarm is not None and self._alarm.is_broken_up

    def break_up(self) -> None:
        """Leave what is done together, unfinished: whatever others wait for there ends with a RuntimeError."""
        if self._alarm is not None:
            self._alarm.break_up()
            _break_off()

    def meet(self) -> None:
        """After that, and when nothing holds on to it any more, begin anew: all processes have to."""
        if self._alarm is not None:
            self._connect(self._alarm.meet())

    def shared(self, value: T) -> list[T]:
        """Everybody's `value`, in the order of the processes."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def any(self, mine: bool) -> bool:
        """Whether it is true for at least one."""
        if self.size == 1:
            return mine
        found = torch.tensor([float(mine)])
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found.item())

    def gather(self, part: Tensor) -> Tensor:
        """All parts of a batch, `[B, ...]` of `[B / size, ...]`.

        A loss of them has the same gradient in every process as if there was only one, after `wrap` has averaged over processes:
        each lets through what belongs to its own part, `size` times as large.
        """
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.detach().contiguous())
        if part.requires_grad:
            parts[self.number] = part
            part.register_hook(lambda gradient: gradient * self.size)  # type: ignore[no-untyped-call]
        return torch.cat(parts)

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model with gradients that are averaged over the processes as they are found (DistributedDataParallel).

        Batch normalisation is left as it is: it may see each process's part only. Then `average_buffers` makes the running
        statistics the same everywhere.
        """
        if self.size == 1:
            return model
        # Statistics that one process sends to others in the forward pass would be changed between the views of a step.
        devices = [device] if device.type == "cuda" else None
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # newer versions name that option otherwise
            return nn.parallel.DistributedDataParallel(
                model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def average_buffers(self, model: nn.Module) -> None:
        """Make running statistics, which each process has of its own parts, the mean over the processes."""
        if self.size == 1:
            return
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.size

    def checked(self, check: Callable[[], None]) -> Callable[[], None]:
        """A check that raises Stopped in all processes if one of them was asked to stop: none is left waiting for the others."""
        if self.size == 1:
            return check

        def together() -> None:
            try:
                check()
                asked = False
            except Stopped:
                asked = True
            if self.any(asked):
                if self._alarm is not None:
                    self._alarm.agree()
                raise Stopped

        return together


ALONE = Team()


@contextlib.contextmanager
def joined(rank: Rank, device: torch.device) -> Iterator[Team]:
    """The team of all processes of this job, through the rendezvous that torchrun has set up."""
    if rank.of == 1:
        yield ALONE
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UsageError(
            f"{rank.of} processes without {' and '.join(missing)}",
            why="RANK and WORLD_SIZE are set, but not where the processes meet",
            fix="start them with torchrun, for example: torchrun --nproc-per-node 8 -m kdcache distill ...",
        )
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, *_ = next(dist.rendezvous("env://", rank.number, rank.of, timeout=PATIENCE))  # type: ignore[attr-defined]
        aside = dist.PrefixStore("kdcache", store.clone())  # type: ignore[attr-defined] # a connection that torch never waits on
        dist.init_process_group(backend, store=store, rank=rank.number, world_size=rank.of, timeout=PATIENCE)
    except (RuntimeError, ValueError, OSError) as error:
        raise RetryError(
            f"process {rank.number} of {rank.of} did not meet the others",
            why=(str(error).splitlines() or [type(error).__name__])[0][:200],
            fix="see that MASTER_ADDR and MASTER_PORT can be reached from every node, and repeat the command",
        ) from error

    def connect(meeting: int) -> None:
        again = dist.PrefixStore(f"meeting {meeting}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=again, rank=rank.number, world_size=rank.of, timeout=PATIENCE)

    alarm = Alarm(rank.number, rank.of, aside, break_off=_abort)
    try:
        with alarm.watched():
            team = Team(rank.number, rank.of, alarm, connect)
            _require_own_gpus(team, device)
            yield team
            team.wait()
            alarm.agree()
    finally:
        if alarm.agreed:
            dist.destroy_process_group()
            if rank.first:
                alarm.linger()
        else:
            _break_off()


def _require_own_gpus(team: Team, device: torch.device) -> None:
    """Refuse two processes on one GPU, whatever they divide.

    NCCL cannot connect them for parts of a batch. With students or teachers of their own, which needs no NCCL, each would
    reckon with all of the GPU's memory, and count the energy of both as its own.
    """
    if device.type != "cuda":
        return
    own = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
    everybody = team.shared(own)
    if everybody.count(own) > 1:
        both = " and ".join(str(number) for number, other in enumerate(everybody) if other == own)
        raise UsageError(
            f"processes {both} have the same GPU, {device} of {socket.gethostname()}",
            why="NCCL connects no two processes on one GPU, and each would reckon with its whole memory and energy",
            fix="start as many processes on a machine as it has GPUs, each of which trains several models at once: "
            "torchrun --nproc-per-node gpu -m kdcache ...",
        )


def _break_off() -> None:
    """Leave the others without waiting for what they owe: on GPUs, leaving in order would."""

    def leave() -> None:
        with contextlib.suppress(Exception):
            _abort()
        with contextlib.suppress(Exception):
            dist.destroy_process_group()

    ending = threading.Thread(target=leave, daemon=True)
    ending.start()
    ending.join(CLOSING)


def _abort() -> None:
    """End what this process and its GPU wait for."""
    if dist.group.WORLD is not None:
        dist.group.WORLD.abort()
