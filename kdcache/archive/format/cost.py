"""What making an archive took, as its provenance tells: no part of what the archive is, and never the same twice."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdcache.system.energy import NOTHING, Spent

__all__ = ["COST", "TEACHER_COST", "DumpCost"]

COST, TEACHER_COST = "cost", "teacher_cost"  # in a provenance: of the dump, and of training its teacher


@dataclass(frozen=True)
class DumpCost:
    """So many passes, each the teacher's answer to one view of one sample, and what they took: rendering and writing included.

    Seconds are those of all processes, one after another's. Shards that a kill has cut short are in neither.
    """

    passes: int = 0
    spent: Spent = NOTHING

    def __add__(self, other: "DumpCost") -> "DumpCost":
        return DumpCost(self.passes + other.passes, self.spent + other.spent)

    def record(self) -> dict[str, Any]:
        return {"passes": self.passes, **self.spent.known()}

    @classmethod
    def of(cls, record: object) -> "DumpCost":
        """What a record says, whoever wrote it; no passes, if it is none."""
        passes = record.get("passes") if isinstance(record, Mapping) else None
        return cls(passes, Spent.of(record)) if type(passes) is int and passes > 0 else cls()
