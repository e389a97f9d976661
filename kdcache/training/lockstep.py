"""Lockstep training of several models from one stream: each batch is rendered once, for all models that are due."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch

from kdcache.errors import RetryError
from kdcache.replay.stream import Batch, ViewStream
from kdcache.system.distributed import Team
from kdcache.system.energy import Spent
from kdcache.system.interrupts import Stopped
from kdcache.system.progress import Progress
from kdcache.training.devices import lack_of_memory, out_of_memory
from kdcache.training.learner import Learner

__all__ = ["Pace", "charge", "in_halves_if_needed", "in_lockstep", "raise_unfit", "smaller_batches", "suspended_at_errors"]

T = TypeVar("T")


def in_halves_if_needed(
    members: Sequence[T],
    train: Callable[[list[T]], None],
    over: Callable[[T], bool],
    too_large: Callable[[T], tuple[str, str]],
    name: str,
    team: Team,
    progress: Progress,
) -> list[RetryError]:
    """Train all `members` at once or, where their memory does not suffice, one half after the other.

    train: trains members to their end. It leaves a checkpoint of each, and no reference to any of them, if it fails.
    over: whether a member has been trained.
    too_large: what happened to a member that does not fit into memory by itself, and how to mend it.
    name: of several members, as the user knows them.

    Returns an error for each member that does not fit by itself, after all others have been trained.

    The processes of a `team` divide their members together, if one of them runs out of memory: all go back to the members'
    last checkpoints, as the others were in the midst of a step.
    """
    groups = [list(members)]
    unfit = []
    while groups:
        group = groups.pop(0)
        if (lack := _lack(train, group, team)) is None:
            continue
        if len(group) == 1:
            what, fix = too_large(group[0])
            unfit.append(RetryError(what, why=lack, fix=fix))
            continue
        is_over = team.shared([over(member) for member in group])[0]
        left = [member for member, done in zip(group, is_over, strict=True) if not done]
        half = -(-len(left) // 2)
        parts = [part for part in (left[:half], left[half:]) if part]
        sizes = " and then ".join(str(len(part)) for part in parts)
        progress.say(f"out of memory with {len(group)} {name} at once: {sizes} go on from their last checkpoints")
        groups[:0] = parts
    return unfit


def _lack(train: Callable[[list[T]], None], group: list[T], team: Team) -> str | None:
    """Train a group; the allocator's words if memory did not suffice, all of which is given back then."""
    lack = None
    try:
        train(group)
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            lack = lack_of_memory(error)
        elif not team.is_broken_up:
            raise
    else:
        return None
    team.break_up()
    gc.collect()  # now, when nothing refers to the error any more, which refers to everything
    torch.cuda.empty_cache()  # nothing, where there is no GPU
    team.meet()
    return next(filter(None, team.shared(lack)))


def smaller_batches(size: int, team: Team) -> str:
    """What a model that does not fit with batches of this size may be trained on instead, to follow "train it on"."""
    smaller = max(2 // team.size, size // 2 // team.size, 1) * team.size  # processes have equal parts of a batch
    if smaller < size:
        return f"smaller batches: --batch-size {smaller}"
    return "a device with more memory: there are no smaller batches" + (f" for {team.size} processes" if team.size > 1 else "")


def raise_unfit(unfit: Sequence[RetryError], of: int, name: str) -> None:
    """Raise the first error of members that do not fit into memory, if there are any; it tells how many more there are."""
    if not unfit:
        return
    first, number = unfit[0], len(unfit)
    others = f" (nor do {number - 1} more of {of} {name}; all others are trained)" if number > 1 else ""
    raise RetryError(f"{first.what}{others}", why=first.why, fix=first.fix)


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

    A learner in the midst of a step keeps its last checkpoint, as all of a team do that has no memory. `charged` is given
    those that still train, before that. If some cannot be written, all others are, and the first one's error is raised.
    """
    try:
        yield
    except (Stopped, RuntimeError, MemoryError) as error:
        whole = isinstance(error, Stopped) or (out_of_memory(error) and team.size == 1)
        with ExitStack() as each:  # it calls all of them, the last one first, and raises the error of the first one that fails
            for learner in learners():
                each.callback(learner.suspend if whole else learner.abandon)  # of a team, others are in the midst of a step
            if whole:
                charged([learner for learner in learners() if learner.status == "training"])
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
