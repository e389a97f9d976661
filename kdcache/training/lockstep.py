"""Several models trained from one stream: each batch is rendered once, and every model that is due steps on it."""

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
    """Epoch by epoch until none trains any more: its number, its members, and its batches, each with those that are due.

    Each member keeps its own epoch: those that are behind go first, and one that has seen a batch before it was suspended
    does not see it again. The caller steps those that are due, and ends the epoch of its members.
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
    """Divide what was spent on all of these among them, rendering and tests included: in proportion to their own steps' time."""
    steps = sum(learner.uncharged for learner in learners)
    for learner in learners:
        learner.charge(spent * (learner.uncharged / steps if steps else 1 / len(learners)))


class Pace:
    """How far learners are, and how long the rest takes if it goes on as it has since this was made."""

    def __init__(self, learners: Sequence[Learner]) -> None:
        self._learners = learners
        self.total = sum(learner.total_steps for learner in learners)
        self._first, self._started = self.done, time.monotonic()

    @property
    def done(self) -> int:
        """Steps done, those that diverged learners will never do included."""
        return sum(learner.total_steps if learner.status == "diverged" else learner.steps for learner in self._learners)

    @property
    def seconds_left(self) -> float:
        return (time.monotonic() - self._started) * (self.total - self.done) / max(self.done - self._first, 1)
