"""Which process this is of those that torchrun started together."""

import os
from dataclasses import dataclass

from kdcache.errors import UsageError

__all__ = ["Rank", "this_rank"]

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


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
        """Of what the processes on this machine use together, such as its CPUs; None if nobody has told how many there are."""
        return None if self.here is None else 1 / self.here


def this_rank() -> Rank:
    """As RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE in the environment say; the only process where they are not set."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Rank(here=1)
    try:
        rank = Rank(*(int(os.environ[name]) if name in os.environ else None for name in NAMES))  # type: ignore[arg-type]
        if not 0 <= rank.number < rank.of or rank.here == 0:
            raise ValueError
    except ValueError:
        told = " ".join(f"{name}={os.environ[name]}" for name in NAMES if name in os.environ)
        raise UsageError(
            f"{told} in the environment",
            why="they number the processes of a job, from 0 to WORLD_SIZE - 1",
            fix="unset RANK WORLD_SIZE LOCAL_RANK, or start the processes with torchrun",
        ) from None
    return rank
