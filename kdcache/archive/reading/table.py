"""The table of an archive's shards: one record a line, in the order of views and blocks."""

import io
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property

from pydantic import ValidationError

from kdcache.archive.format.manifest import MANIFEST_NAME, TABLE_LIMIT, Manifest, ShardRecord, first_error
from kdcache.archive.format.store import Store, sha256
from kdcache.errors import IntegrityError

__all__ = ["ShardTable"]


class ShardTable:
    def __init__(self, manifest: Manifest, store: Store) -> None:
        self._manifest, self._store = manifest, store

    def read(self) -> list[bytes]:
        """The lines of the table, checked against the manifest. Raises IntegrityError."""
        table = self._manifest.shards
        data = self._store.read(table.path, limit=min(table.bytes, TABLE_LIMIT))
        if len(data) != table.bytes:
            raise _changed(f"{table.path} has {len(data):,} bytes, the manifest says {table.bytes:,}")
        if (found := sha256(data)) != table.sha256:
            raise _changed(f"{table.path}: sha256 is {found[:12]}..., the manifest says {table.sha256[:12]}...")
        lines, shards = list(io.BytesIO(data)), self._manifest.num_views * self._manifest.num_blocks
        if len(lines) > shards:  # told before each of them is parsed
            raise _changed(f"{table.path} has {len(lines):,} records of {shards:,} shards")
        return lines

    def records(self) -> Iterator[ShardRecord]:
        return iter([self._parsed(line) for line in self.read()])

    @cached_property
    def lines(self) -> list[bytes]:
        return self.read()

    @cached_property
    def _by_place(self) -> dict[tuple[int, int], ShardRecord]:
        records = map(self._parsed, self.lines)
        return {(record.view, record.block): record for record in records}

    def record(self, view: int, block: int) -> ShardRecord:
        """The record of one shard. Only its line is parsed, where that is where kdcache writes it."""
        place = (view - self._manifest.first_view) * self._manifest.num_blocks + block
        if place < len(self.lines) and (record := self._parsed(self.lines[place])).view == view and record.block == block:
            return record
        if (found := self._by_place.get((view, block))) is not None:
            return found
        raise IntegrityError(
            f"{self._manifest.shards.path} has no record of view {view}, block {block}",
            why="the table of shards is not that of its manifest",
            fix="restore it from a copy of the archive",
        )

    def _parsed(self, line: bytes) -> ShardRecord:
        try:
            record = ShardRecord.model_validate_json(line)
        except ValidationError as error:
            field, wrong, why = first_error(error)
            raise IntegrityError(
                f"{self._manifest.shards.path}: {why} ({field} = {wrong!r})",
                why="the table of shards was not written by kdcache",
                fix="do not use this archive; get it again from whoever made it",
            ) from None
        if record.checksums is not None and self._manifest.manifest_sha256 is None:
            raise self._unsealed()
        return record

    def require_seal(self) -> None:
        """Raise IntegrityError for a manifest without a digest of its own beside a table that was written with one.

        A table that cannot be read is told of where it is read.
        """
        lines: list[bytes] = []
        if self._manifest.manifest_sha256 is None:
            with suppress(IntegrityError):
                lines = self.lines
        if any(b'"checksums":' in line for line in lines):
            raise self._unsealed()

    def _unsealed(self) -> IntegrityError:
        return IntegrityError(
            f"{MANIFEST_NAME} of {self._store.name} has lost its manifest_sha256",
            why=f"{self._manifest.shards.path} is of a kdcache that writes one",
            fix=f"restore {MANIFEST_NAME} from a copy of the archive",
        )


def _changed(what: str) -> IntegrityError:
    return IntegrityError(
        what,
        why="the table of shards was changed after the archive was finished",
        fix="restore it from a copy of the archive",
    )
