"""Whether the rows in a file are those that belong there.

Checksums within a file tell that its bytes are sound, but not whose they are: of two views' files that were exchanged, or
of another teacher's of the same shape, each is sound. So the table of shards records a digest of the checksums of each
shard's rows, field by field, and what is read is compared with it whenever a file is opened. That reads the checksums
only, once, and costs later reads nothing.

Older tables record none. There the argmax and the entropy that are stored of some rows are compared with their logits.
"""

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from kdcache.archive.format.manifest import ArchivePlan, ShardRecord
from kdcache.archive.format.store import as_bytes
from kdcache.archive.layouts import ShardReader, row_fields
from kdcache.archive.layouts.base import ShardRows
from kdcache.codecs import CODECS
from kdcache.errors import IntegrityError
from kdcache.stats import entropies_and_argmax

__all__ = ["BoundReader", "shard_checksums"]

OPEN = 2048  # fields of shards that stay open; a mapped file takes no descriptor
SOME = 8  # units whose checksums the first half of a digest covers; rows that are compared without checksums
HALF = 16  # hexadecimal digits
ENTROPY_NOISE = 1e-4  # of the arithmetic of those who computed the stored entropies


def shard_checksums(reader: ShardReader, plan: ArchivePlan, view: int, block: int) -> dict[str, str]:
    """The digest of the checksums of each field's rows in a shard, as the table of shards records them."""
    return {field: _digest(_open(reader, plan, field, view, block)) for field in row_fields(plan)}


def _digest(rows: ShardRows, *, some: bool = False) -> str:
    """16 digits for the checksums of a few units, then (unless `some`) 16 for those of all units."""
    parts = rows.checksums()
    few = [part[np.unique(np.linspace(0, len(part) - 1, SOME).astype(int))] for part in parts]
    return "".join(_hexdigest(chosen) for chosen in ([few] if some else [few, parts]))


def _hexdigest(parts: Iterable[NDArray[np.uint32]]) -> str:
    return str(blake3(b"".join(np.ascontiguousarray(part, "<u4").tobytes() for part in parts)).hexdigest(length=HALF // 2))


def _open(reader: ShardReader, plan: ArchivePlan, field: str, view: int, block: int) -> ShardRows:
    opening: Callable[[str, int, int], ShardRows] | None = getattr(reader, "rows", None)
    return opening(field, view, block) if opening else _WholeField(reader, plan, field, view, block)


class _WholeField:
    """Rows of a reader that opens nothing. The checksum of all of them is made by reading them."""

    def __init__(self, reader: ShardReader, plan: ArchivePlan, field: str, view: int, block: int) -> None:
        self._reader, self._place, self._count = reader, (field, view, block), plan.block_rows(block)
        self.name = ", ".join(reader.files(view, block))

    def gather(self, rows: slice | NDArray[np.int64]) -> NDArray:
        return self._reader.gather(*self._place, rows)

    def pieces(self, rows: slice) -> Iterator[NDArray]:
        return self._reader.pieces(*self._place, rows)

    def checksums(self) -> list[NDArray[np.uint32]]:
        return [np.frombuffer(blake3(as_bytes(self.gather(slice(0, self._count)))).digest(), "<u4")]


class BoundReader:
    """A layout's reader that refuses rows of another place than they are asked for at.

    `record_of` gives the record of a shard, and `records` all of them, for the message. `where` is the archive's location.
    `advice` gives the fix for shards (view, block) whose files do not hold what is recorded.
    """

    def __init__(
        self,
        reader: ShardReader,
        plan: ArchivePlan,
        where: str,
        record_of: Callable[[int, int], ShardRecord],
        records: Callable[[], Iterable[ShardRecord]],
        advice: Callable[[Sequence[tuple[int, int]]], str] | None = None,
    ) -> None:
        self._reader, self._plan, self._where = reader, plan, where
        self._record_of, self._records = record_of, records
        self._advice = advice or self._restore
        self._codec = CODECS.from_dict(plan.codec)
        self._rows = lru_cache(maxsize=OPEN)(self._checked)
        self.files, self.sample_files = reader.files, reader.sample_files
        self.labels, self.keys = reader.labels, reader.keys

    def gather(self, field: str, view: int, block: int, rows: slice | NDArray[np.int64]) -> NDArray:
        return self._rows(field, view, block).gather(rows)

    def pieces(self, field: str, view: int, block: int, rows: slice) -> Iterator[NDArray]:
        return self._rows(field, view, block).pieces(rows)

    def misplaced(self, record: ShardRecord) -> dict[str, IntegrityError]:
        """Files of a shard that hold other rows than are recorded there, or none, with what reading them raises.

        A few pages of each file are read, for any size of shards.
        """
        found: dict[str, IntegrityError] = {}
        for field in row_fields(self._plan):
            name = ""
            try:
                rows = self._open(field, record.view, record.block)
                name = rows.name
                self._compare(rows, record, field, some=True)
            except IntegrityError as error:
                found.setdefault(name or ", ".join(self.files(record.view, record.block)), error)
        return found

    def _open(self, field: str, view: int, block: int) -> ShardRows:
        return _open(self._reader, self._plan, field, view, block)

    def _checked(self, field: str, view: int, block: int) -> ShardRows:
        """The opened rows of a field in a shard, after they were compared with its record."""
        rows = self._open(field, view, block)
        self._compare(rows, self._record_of(view, block), field)
        return rows

    def _compare(self, rows: ShardRows, record: ShardRecord, field: str, *, some: bool = False) -> None:
        view, block = record.view, record.block
        if record.checksums is None:
            self._require_of_one_kind(rows, field, view, block)
            return
        recorded, found = record.checksums.get(field, ""), _digest(rows, some=some)
        if not recorded or not recorded.startswith(found):
            whole = _WholeField(self._reader, self._plan, field, view, block)  # as a reader that opened nothing recorded it
            if recorded != _digest(whole):
                raise self._elsewhere(rows.name, field, view, block, _digest(rows))

    def _elsewhere(self, name: str, field: str, view: int, block: int, found: str) -> IntegrityError:
        place = f"the {field} of view {view}, block {block}"
        for record in self._records():
            if (record.checksums or {}).get(field) == found:
                there = self._file_like(name, (view, block), (record.view, record.block))
                return IntegrityError(
                    f"{name} of {self._where} does not hold {place}",
                    why=f"it holds those of view {record.view}, block {record.block}, whose place is {there}",
                    fix=self._advice([(view, block), (record.view, record.block)]),
                )
        return IntegrityError(
            f"{name} of {self._where} does not hold {place}",
            why="its rows are sound, but of no shard of this archive: the file is of another one, or was written anew",
            fix=self._advice([(view, block)]),
        )

    def _restore(self, shards: Sequence[tuple[int, int]]) -> str:
        what = "both files" if len(shards) > 1 else "it"
        check = f"kdcache verify --quick {shlex.quote(self._where)}"
        return f"restore {what} from a copy of the archive; all that are out of place: {check}"

    def _file_like(self, name: str, here: tuple[int, int], there: tuple[int, int]) -> str:
        """The file at `there` that is what `name` is `here`."""
        names, others = self._reader.files(*here), self._reader.files(*there)
        return others[names.index(name)] if name in names and len(names) == len(others) else ", ".join(others)

    def _require_of_one_kind(self, rows: ShardRows, field: str, view: int, block: int) -> None:
        """Compare the argmax and the entropy that are stored of some rows with their logits, if `field` is one of those.

        Both were computed before the logits were encoded, so they may differ by as much as the codec changes a logit.
        """
        plan, codec = self._plan, self._codec
        names = ("logits", *codec.parameters, "argmax", "entropy", "entropy_rest")
        if field not in names or plan.contents != "all" or "converted_from" in plan.provenance:
            return
        some = np.unique(np.linspace(0, plan.block_rows(block) - 1, SOME).astype(np.int64))
        opened = {name: rows if name == field else self._open(name, view, block) for name in names}
        stored = {name: opened[name].gather(some) for name in names}
        logits = codec.decode(stored)
        if not np.isfinite(logits).all() or not ((stored["argmax"] >= 0) & (stored["argmax"] < plan.num_classes)).all():
            return  # those who use them refuse them, and verify names them
        off = codec.max_error(stored)
        low = np.take_along_axis(logits, stored["argmax"][:, None].astype(np.int64), axis=1)[:, 0]
        h, _, _ = entropies_and_argmax(logits)
        # A change e of every logit changes p log p by at most 2 e p (|log p| + H): of the relative entropy, 4 e and less.
        if (low + 2 * off < logits.max(axis=1)).any() or (np.abs(h - stored["entropy"]) > 4 * off + ENTROPY_NOISE).any():
            raise IntegrityError(
                f"{rows.name} of {self._where}: view {view}, block {block} has an argmax or entropy that is not its logits'",
                why="each file is sound, but one of them is of another view or archive",
                fix=self._advice([(view, block)]),
            )
