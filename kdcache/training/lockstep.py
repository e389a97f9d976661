"""Lockstep training of several models from one stream: each batch is rendered once, for all models that are due."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from kdcache.replay.stream import Batch, ViewStream
from kdcache.system.distributed import Team
from kdcache.system.energy import Spent
from kdcache.system.interrupts import Stopped
from kdcache.system.progress import Progress
from kdcache.training.devices import out_of_memory
from kdcache.training.learner import Learner

__all__ = ["Pace", "charge", "in_halves_if_needed", "in_lockstep", "suspended_at_errors"]

T = TypeVar("T")


def in_halves_if_needed(
    members: Sequence[T],
    train: Callable[[list[T]], None],
    over: Callable[[T], bool],
    name: str,
    team: Team,
    progress: Progress,
) -> None:
    """Train all `members` at once or, where their memory does not suffice, one half after the other.

    train: trains members to their end. It leaves a checkpoint of each, and no reference to any of them, if it fails.
    over: whether a member has been trained.
    name: of several members, as the user knows them.

    The several processes of a `team` could not agree to divide them, as the others wait for the one without memory in the
    midst of a step: its error ends all of them.
    """
    if team.size > 1:
        train(list(members))
        return
    groups = [list(members)]
    while groups:
        group = groups.pop(0)
        if not _ran_out(train, group):
            continue
        left = [member for member in group if not over(member)]
        half = -(-len(left) // 2)
        groups[:0] = [part for part in (left[:half], left[half:]) if part]
        sizes = " and then ".join(str(len(part)) for part in groups[: 1 + (len(left) > 1)])
        progress.say(f"out of memory with {len(group)} {name} at once: {sizes} go on from their last checkpoints")


def _ran_out(train: Callable[[list[T]], None], group: list[T]) -> bool:
    """Train a group; whether memory did not suffice for its several members, all of whose memory is given back then."""
    try:
        train(group)
    except (RuntimeError, MemoryError) as error:
        if len(group) == 1 or not out_of_memory(error):
            raise
    else:
        return False
    gc.collect()  # now, when nothing refers to the error any more, which refers to everything
    torch.cuda.empty_cache()  # nothing, where there is no GPU
    return True


def in_lockstep(
    members: Sequence[T], learner_of: Callable[[T], Learner], stream: ViewStream
) -> Iterator[tuple[int, list[T], Iterator[tuple[Batch, list[T]]]]]:
    """Yield (epoch, members, batches) until no member trains any more. Each batch comes with the members that are due.

    Each member has its own epoch. Members that are behind go first, and a resumed member skips the batches that it has
    seen. The caller steps the members that are due, and ends the epoch of all its members.
    """
    while training := [member for member in members if learner_of(member).status == "training"]:
        epoch = min(learner_of(member).epoch for member in training)
        active = [member for member in training if learner_of(member).epoch == epoch]
        yield epoch, active, _batches(active, learner_of, stream, epoch)


def _batches(
    active: list[T], learner_of: Callable[[T], Learner], stream: ViewStream, epoch: int
) -> Iterator[tuple[Batch, list[T]]]:
    behind = min(learner_of(member).steps_in_epoch for member in active)
    for number, batch in enumerate(stream.epoch(epoch, behind), behind):
        yield batch, [member for member in active if learner_of(member).steps_in_epoch == number]


def charge(learners: Sequence[Learner], spent: Spent) -> None:
    """Divide the common cost, rendering and tests included, among the learners in proportion to their steps' time."""
    steps = sum(learner.uncharged for learner in learners)
    for learner in learners:
        learner.charge(spent * (learner.uncharged / steps if steps else 1 / len(learners)))


@contextmanager
def suspended_at_errors(
    learners: Callable[[], Sequence[Learner]], team: Team, charged: Callable[[list[Learner]], None] = lambda learners: None
) -> Iterator[None]:
    """Write a checkpoint of all learners, and give their folders back, where work inside is stopped or runs out of memory.

    A learner in the midst of a step keeps its last checkpoint. `charged` is given those that still train, before that.
    """
    try:
        yield
    except (Stopped, RuntimeError, MemoryError) as error:
        if not isinstance(error, Stopped) and (team.size > 1 or not out_of_memory(error)):
            raise  # other processes are in the midst of a step
        charged([learner for learner in learners() if learner.status == "training"])
        for learner in learners():
            learner.suspend()
        raise


class Pace:
    """Progress of learners, and the remaining time at the pace since this object was made."""

    def __init__(self, learners: Sequence[Learner]) -> None:
        self._learners = learners
        self.total = sum(learner.total_steps for learner in learners)
        self._first, self._started = self.done, time.monotonic()

    @property
    def done(self) -> int:
        """Steps done. Diverged learners count as finished."""
        return sum(learner.total_steps if learner.status == "diverged" else learner.steps for learner in self._learners)

    @property
    def seconds_left(self) -> float:
        return (time.monotonic() - self._started) * (self.total - self.done) / max(self.done - self._first, 1)
