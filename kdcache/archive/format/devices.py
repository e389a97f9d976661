"""Which kind of device computed which shards, in the archive's provenance. Other kinds of device may give other last bits.

No digest covers it. It is recorded only where shards were computed by others than the kind of device that began the dump.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from kdcache.archive.format.manifest import ArchivePlan

__all__ = ["DEVICE", "DEVICES", "device_shards", "device_table", "shards_by_device"]

DEVICE, DEVICES = "device", "devices"  # provenance keys: the kind of device that began the dump; all kinds and their shards


def device_table(kinds: Mapping[int, str]) -> dict[str, list[list[int]]]:
    """The record: of each kind the ranges [first, last] of its shards' numbers.

    The number of a shard is its view times the number of shards of a view, plus its block.
    """
    table: dict[str, list[list[int]]] = {}
    for number, kind in sorted(kinds.items()):
        ranges = table.setdefault(kind, [])
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return table


def device_shards(provenance: Mapping[str, Any], shards: range) -> dict[str, list[range]]:
    """The numbers of each kind of device's shards among `shards`, from a record of unknown origin; empty without one."""
    table = provenance.get(DEVICES)
    found = {str(kind): list(_clipped(ranges, shards)) for kind, ranges in (table if isinstance(table, dict) else {}).items()}
    return {kind: ranges for kind, ranges in found.items() if ranges}


def shards_by_device(plan: ArchivePlan) -> dict[str, int]:
    """The numbers of shards by the kind of device that computed them; empty unless there are several kinds."""
    numbers = range(plan.views.start * plan.num_blocks, plan.views.stop * plan.num_blocks)
    counts = {kind: sum(map(len, ranges)) for kind, ranges in device_shards(plan.provenance, numbers).items()}
    return counts if len(counts) > 1 else {}


def _clipped(ranges: object, shards: range) -> Iterator[range]:
    for pair in ranges if isinstance(ranges, list) else []:
        if isinstance(pair, list) and [type(end) for end in pair] == [int, int]:
            clipped = range(max(pair[0], shards.start), min(pair[1] + 1, shards.stop))
            if clipped:
                yield clipped
