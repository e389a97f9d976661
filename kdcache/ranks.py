"""Which process this is of those that torchrun started together."""

import os
from dataclasses import dataclass

from kdcache.errors import UsageError

__all__ = ["Rank", "this_rank"]


@dataclass(frozen=True)
class Rank:
    """Process `number` of `of`; `local` is its number on this machine, None if nobody has told."""

    number: int = 0
    of: int = 1
    local: int | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks for all, and makes what all of them need."""
        return self.number == 0


def this_rank() -> Rank:
    """As RANK, WORLD_SIZE and LOCAL_RANK in the environment say; the only process where they are not set."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Rank()
    try:
        rank = Rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", -1)))
        if not 0 <= rank.number < rank.of:
            raise ValueError
    except ValueError:
        told = " ".join(f"{name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ)
        raise UsageError(
            f"{told} in the environment",
            why="they number the processes of a job, from 0 to WORLD_SIZE - 1",
            fix="unset RANK WORLD_SIZE LOCAL_RANK, or start the processes with torchrun",
        ) from None
    return rank if rank.local != -1 else Rank(rank.number, rank.of)
