"""What a dump took, and what was known of its teacher: in the archive's provenance, so that no digest covers it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdcache.system.energy import NOTHING, Spent

__all__ = ["COST", "TEACHER_COST", "TEACHER_ENTROPIES", "DumpCost"]

COST, TEACHER_COST = "cost", "teacher_cost"  # provenance keys: cost of the dump, cost of training its teacher
# Likewise: mean relative entropies (`entropy`, `entropy_rest`) of the teacher on the clean test images, at tau 1.
TEACHER_ENTROPIES = "teacher_entropies"


@dataclass(frozen=True)
class DumpCost:
    """Forward passes of a dump and what they took, rendering and writing included. A pass is one view of one sample.

    Seconds are summed over all processes. Shards that a kill cut short are not counted.
    """

    passes: int = 0
    spent: Spent = NOTHING

    def __add__(self, other: "DumpCost") -> "DumpCost":
        return DumpCost(self.passes + other.passes, self.spent + other.spent)

    def record(self) -> dict[str, Any]:
        return {"passes": self.passes, **self.spent.known()}

    @classmethod
    def of(cls, record: object) -> "DumpCost":
        """The cost in a record of unknown origin; no passes if the record is malformed."""
        passes = record.get("passes") if isinstance(record, Mapping) else None
        return cls(passes, Spent.of(record)) if type(passes) is int and passes > 0 else cls()
