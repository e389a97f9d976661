"""Verification of an archive against its manifest."""

import io
import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from kdcache.archive.format.manifest import (
    CLOSING,
    FOR_PEOPLE,
    MANIFEST_LIMIT,
    MANIFEST_NAME,
    FileRecord,
    ShardRecord,
    archive_digest,
    load_manifest,
)
from kdcache.archive.format.store import LocalStore, open_local, sha256_of
from kdcache.archive.layouts import rows_digest
from kdcache.codecs import CODECS
from kdcache.errors import IntegrityError, KdcacheError, UsageError
from kdcache.system.progress import Progress

if TYPE_CHECKING:
    from kdcache.archive.reading.reader import Archive

__all__ = ["Failure", "Level", "Verification", "Verifier"]

Level = Literal["quick", "full"]
AHEAD = 4  # shards that are fetched while one is verified


@dataclass(frozen=True)
class Failure:
    """One deviation from a record."""

    where: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.where}: {self.got}, expected {self.expected}"


@dataclass
class Verification:
    """Result of `Archive.verify`."""

    level: str
    checked: int = 0  # files; in a replay: views
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: KdcacheError | None = None  # the error to raise, if failures mean something other than damage

    @property
    def ok(self) -> bool:
        return not self.failures

    def raise_if_failed(self) -> None:
        if self.error:
            raise self.error
        if self.failures and all(failure.where in FOR_PEOPLE for failure in self.failures):
            raise IntegrityError(
                f"verify ({self.level}) found {len(self.failures)} changed file(s) for people; first: {self.failures[0]}",
                why="all else is as recorded: the card or a figure was edited after the archive was finished",
                fix="if that was you, all is well: kdcache push records them anew; else do not trust their words",
            )
        if self.failures:
            raise IntegrityError(
                f"verify ({self.level}) found {len(self.failures)} damaged place(s); first: {self.failures[0]}",
                why="the archive is not what its manifest says",
                fix="restore the named files from a copy, or run its dump again to another folder (--output FOLDER)",
            )


class Verifier:
    """Compares an archive's files and rows with its manifest."""

    def __init__(self, archive: "Archive", level: Level) -> None:
        if level not in get_args(Level):
            raise UsageError(
                f"verify({level!r:.80})", why="there is no such level", fix=f"choose one of: {', '.join(get_args(Level))}"
            )
        self._archive, self._manifest, self._store = archive, archive.manifest, archive.store
        self._level = level
        self._result = Verification(level)

    def verify_files_of_no_shard(self) -> Verification:
        """Verify only the files that labels and keys are read from. Files for people may be edited."""
        needed = [record for record in self._manifest.files if record.path not in FOR_PEOPLE]
        self._store.prefetch(record.path for record in needed)
        for record in needed:
            self._verify_file(record)
        self._verify_no_others()
        return self._result

    def verify(self, progress: Progress) -> Verification:
        """Verify everything, at the verifier's level."""
        if self._level == "full" and not isinstance(self._store, LocalStore):
            self._result.notes.append(
                "files fetched before were compared as they lie in the cache; KDCACHE_CACHE=EMPTY_FOLDER fetches all anew"
            )
        result, level = self._result, self._level
        self._verify_manifest()
        try:
            shards = list(self._archive.shards())
        except KdcacheError as error:
            result.failures.append(Failure(self._manifest.shards.path, "the recorded table of shards", error.what))
            return result
        planned = self._manifest.num_views * self._manifest.num_blocks
        present = {(s.view, s.block) for s in shards if s.view in self._manifest.views and s.block < self._manifest.num_blocks}
        if not len(shards) == len(present) == planned:
            got = f"{len(present)} of them in {len(shards)} records"
            result.failures.append(Failure(self._manifest.shards.path, f"{planned} shards", got))
        actual = archive_digest(self._manifest, shards)
        if actual != self._manifest.digest:
            where = f"{MANIFEST_NAME}: digest"
            result.failures.append(Failure(where, f"{self._manifest.digest[:12]}...", f"the contents have {actual[:12]}..."))
        for record in self._manifest.files:
            self._verify_file(record)
        self._verify_no_others()
        samples: dict[int, list[NDArray]] = {}  # sample numbers per view, block by block
        for number, shard in enumerate(shards):
            if level == "full":
                self._store.prefetch(file.path for later in shards[number : number + AHEAD] for file in later.files)
            failures_before = len(result.failures)
            if (shard.view, shard.block) in present and self._verify_record(shard):
                present.discard((shard.view, shard.block))  # one that is recorded twice is verified once
                for record in shard.files:
                    self._verify_file(record)
                if len(result.failures) > failures_before:
                    pass  # one failure tells enough of a shard
                elif level == "full":
                    self._verify_rows(shard, samples.setdefault(shard.view, []))
                elif isinstance(self._store, LocalStore):  # what is fetched is compared with its sha256 as it arrives
                    self._verify_places(shard)
                if len(samples.get(shard.view, ())) == self._manifest.num_blocks:
                    self._verify_order(shard.view, samples.pop(shard.view))
            progress.update(f"verify {level}", number + 1, len(shards))
        return result

    def _verify_manifest(self) -> None:
        """Parse the manifest again, which compares it with its own digest. A transfer writes it after everything else."""
        try:
            if self._store.exists(MANIFEST_NAME):
                load_manifest(self._store.read(MANIFEST_NAME, limit=MANIFEST_LIMIT), self._store.name, fix="")
        except KdcacheError as error:
            self._result.failures.append(Failure(MANIFEST_NAME, "a sound manifest", error.what))

    def _replacing(self, path: str) -> list[FileRecord]:
        """The records that an unfinished append holds for a file. The file may match these or the manifest's record.

        An append replaces some files before its manifest. It never replaces labels and keys, as the samples stay the same.
        """
        return [] if path in self._archive.reader.sample_files() else self._appended.get(path, [])

    @cached_property
    def _appended(self) -> dict[str, list[FileRecord]]:
        """The records of an unfinished append by path. They are read once, for any number of files that differ."""
        records: list[FileRecord] = []
        try:
            for line in io.BytesIO(self._store.read(CLOSING, limit=MANIFEST_LIMIT) if self._store.exists(CLOSING) else b""):
                records.append(FileRecord.model_validate_json(line))
        except (IntegrityError, ValidationError):
            records = []
        if (grown := self._archive.grown()) is not None:
            records += grown.manifest.files
        by_path: dict[str, list[FileRecord]] = {}
        for record in records:
            by_path.setdefault(record.path, []).append(record)
        return by_path

    def _verify_no_others(self) -> None:
        """Fail for unrecorded files of labels and keys: readers would use them."""
        recorded = {record.path for record in self._manifest.files}
        for name in self._archive.reader.sample_files():
            if name not in recorded and self._store.exists(name):
                self._result.failures.append(Failure(name, "no such file, since the manifest records none", "a file"))

    def _verify_record(self, shard: ShardRecord) -> bool:
        """Check that a record names its shard's number of rows and its files; returns whether it does."""
        where, rows = f"view {shard.view} block {shard.block}", self._manifest.block_rows(shard.block)
        if shard.rows != rows:
            self._result.failures.append(Failure(where, f"{rows} rows", f"a record of {shard.rows}"))
            return False
        recorded, names = (
            sorted(record.path for record in shard.files),
            sorted(self._archive.reader.files(shard.view, shard.block)),
        )
        if recorded != names:
            got = ", ".join(name for name in recorded if name not in names) or "a record without them"
            expected = ", ".join(name for name in names if name not in recorded) or "each of its files once"
            self._result.failures.append(Failure(where, expected, got[:1000]))
            return False
        return True

    def _verify_file(self, record: FileRecord) -> None:
        self._result.checked += 1
        failure = self._difference(record)
        if failure is None or not all(self._difference(other) for other in self._replacing(record.path)):
            return
        self._result.failures.append(failure)

    def _difference(self, record: FileRecord) -> Failure | None:
        try:
            if self._level == "quick":
                size, actual = self._store.size(record.path), record.sha256
            else:
                with open_local(self._store, record.path) as file:
                    size = os.fstat(file.fileno()).st_size
                    actual = sha256_of(file) if size == record.bytes else ""  # do not read a file of another size: it may be huge
            if size != record.bytes:
                return Failure(record.path, f"{record.bytes:,} bytes", f"{size:,} bytes")
            if actual != record.sha256:
                return Failure(record.path, f"sha256 {record.sha256[:12]}...", f"sha256 {actual[:12]}...")
        except IntegrityError as error:
            return Failure(record.path, "a file of the archive", error.what)
        return None

    def _verify_places(self, shard: ShardRecord) -> None:
        """Compare whose rows the files of a shard hold with its record, by the checksums of some units."""
        expected = f"the rows of view {shard.view} block {shard.block}"
        for file, error in self._archive.reader.misplaced(shard).items():
            self._result.failures.append(Failure(file, expected, f"{error.what}: {error.why}"))

    def _verify_rows(self, shard: ShardRecord, samples: list[NDArray]) -> None:
        """Compare the rows of a shard with their digest, and append their sample numbers to `samples`."""
        where = f"view {shard.view} block {shard.block}"
        try:
            stored = self._archive.stored(shard.view, shard.block)
            actual = rows_digest(self._manifest, stored)
        except KdcacheError as error:
            self._result.failures.append(Failure(where, "readable rows", error.what))
            return
        if actual != shard.rows_digest:
            self._result.failures.append(
                Failure(where, f"rows digest {shard.rows_digest[:12]}...", f"rows digest {actual[:12]}...")
            )
        if not ((stored["argmax"] >= 0) & (stored["argmax"] < self._manifest.num_classes)).all():
            self._result.failures.append(
                Failure(where, f"argmax from 0 to {self._manifest.num_classes - 1}", "others among them")
            )
        numbers = [values for values in stored.values() if values.dtype.kind == "f"]
        coding = CODECS.from_dict(self._manifest.codec)
        if coding.parameters and "logits" in stored:
            numbers.append(coding.decode(stored))
        if not all(np.isfinite(values).all() for values in numbers):
            self._result.failures.append(Failure(where, "finite numbers", "others among them"))
        samples.append(np.array(stored["sample"]))

    def _verify_order(self, view: int, samples: list[NDArray]) -> None:
        if not np.array_equal(np.sort(np.concatenate(samples)), np.arange(self._manifest.num_samples)):
            self._result.failures.append(Failure(f"view {view}", "every sample once", "other sample numbers"))
