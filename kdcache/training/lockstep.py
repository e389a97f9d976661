"""Lockstep training of several models from one stream: each batch is rendered once, for all models that are due."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from kdcache.replay.stream import Batch, ViewStream
from kdcache.system.energy import Spent
from kdcache.training.learner import Learner

__all__ = ["Pace", "charge", "in_lockstep"]

T = TypeVar("T")


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
