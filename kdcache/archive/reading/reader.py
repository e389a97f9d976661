"""Archives: opening one, and reading its rows. This needs NumPy and no deep-learning framework."""

import operator
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.archive.format.manifest import (
    MANIFEST_LIMIT,
    MANIFEST_NAME,
    PULL,
    WORK,
    FileRecord,
    Manifest,
    ShardRecord,
    archive_digest,
    load_manifest,
    not_known,
)
from kdcache.archive.format.rows import Rows, count_of
from kdcache.archive.format.store import LocalStore, Store
from kdcache.archive.layouts import LAYOUTS, row_fields
from kdcache.archive.reading.binding import BoundReader
from kdcache.archive.reading.cache import CachedStore
from kdcache.archive.reading.statistics import MAX_ROWS, spread_logits
from kdcache.archive.reading.table import ShardTable
from kdcache.archive.reading.verification import Level, Verification, Verifier
from kdcache.codecs import CODECS
from kdcache.errors import IncompatibleError, IncompleteError, IntegrityError, KdcacheError, NotFoundError, UsageError
from kdcache.given import whole_numbers
from kdcache.system.documents import parse_json
from kdcache.system.files import set_aside
from kdcache.system.progress import Progress, Silent
from kdcache.system.remote import MissingError, is_url, open_remote

__all__ = ["Archive", "open_archive"]


def open_archive(path: str | os.PathLike[str]) -> "Archive":
    """Open a finished archive: a folder, or a URL such as https://HOST/FOLDER, s3://BUCKET/FOLDER or hf://datasets/ORG/NAME.

    Files of remote archives are fetched at their first use, checked, and kept in a cache. Raises NotFoundError,
    IncompleteError, IntegrityError, IncompatibleError, or RetryError if a server cannot be reached.
    """
    if is_url(path):
        return _open_remote(str(path))
    store = LocalStore(path)
    path = store.root
    if not store.exists(MANIFEST_NAME):
        if (Path(path) / WORK).is_dir():
            raise IncompleteError(
                f"archive {path} is not finished",
                why="its dump was stopped before the manifest was written",
                fix=_resume_command(store),
            )
        if any(Path(path).glob("shards-*.jsonl")):
            raise IncompleteError(
                f"archive {path} is not complete",
                why=f"its table of shards is there, and no {MANIFEST_NAME}, which comes last",
                fix="finish the copy or the command that made it",
            )
        if (Path(path) / PULL).is_dir():
            raise IncompleteError(
                f"archive {path} is not complete",
                why="the transfer that brings it here was stopped before the manifest was written",
                fix="repeat the kdcache pull or push command that began it; it goes on where it stopped",
            )
        raise NotFoundError(
            f"no archive at {path}",
            why=f"there is no {MANIFEST_NAME} in it" if Path(path).is_dir() else "that folder does not exist",
            fix="list the archives with: kdcache ls",
        )
    return Archive(store, load_manifest(store.read(MANIFEST_NAME, limit=MANIFEST_LIMIT), str(path), fix=_manifest_fix(store)))


def _open_remote(url: str) -> "Archive":
    store = CachedStore(open_remote(url))
    try:
        text = store.read(MANIFEST_NAME, limit=MANIFEST_LIMIT)
    except NotFoundError as error:
        if isinstance(error, MissingError) and _has_begun(store):
            raise IncompleteError(
                f"archive {url} is not finished",
                why=f"there are files, but no {MANIFEST_NAME}, which is written last",
                fix="finish its dump or upload, by repeating the command that began it",
            ) from None
        raise NotFoundError(f"no archive at {url}", why=f"{error.what}: {error.why}", fix=error.fix) from None
    fix = "ask whoever published the archive to upload it again"
    return Archive(store, load_manifest(text, store.name, fix=fix))


def _has_begun(store: CachedStore) -> bool:
    """Whether an archive without manifest has files on the server, as far as the server tells."""
    with suppress(NotFoundError):
        return any(True for _ in store.remote.names()) or store.exists(f"{WORK}/plan.json")
    return False


def _manifest_fix(store: LocalStore) -> str:
    """The advice for a damaged manifest."""
    if store.exists(f"{WORK}/plan.json"):  # the dump's records are there, so it can write the manifest again
        anew = f"{set_aside(store.path(MANIFEST_NAME))} && kdcache finalize {shlex.quote(str(store.root))}"
        return f"restore it from a copy, or write it anew: {anew}"
    return f"restore it from a copy; or get the archive anew, after setting this one aside: {set_aside(store.root)}"


def _resume_command(store: LocalStore) -> str:
    try:
        plan = parse_json(store.read(f"{WORK}/plan.json", limit=MANIFEST_LIMIT))
        return dump_command(plan["provenance"])
    except (KdcacheError, ValueError, KeyError, TypeError, RecursionError):
        return dump_command({})


def dump_command(provenance: Mapping[str, Any]) -> str:
    """The recorded command that continues a dump, if it is a command of kdcache.

    The record may come from a stranger. Its words are quoted again, so that a shell sees only arguments.
    """
    command = provenance.get("command") if isinstance(provenance, Mapping) else None
    if isinstance(command, str) and len(command) <= 1000 and command.isprintable():
        try:
            words = shlex.split(command)
        except ValueError:
            words = []
        if words[:2] in (["kdcache", "dump-teacher"], ["kdcache", "quickstart"]):
            share = [number for number, word in enumerate(words) if word == "--shard"]  # drop the share of a single process
            return shlex.join(word for number, word in enumerate(words) if number not in share and number - 1 not in share)
    return "run the same dump-teacher command again; it goes on where it stopped"


class Archive:
    """A finished archive. Rows of a view are addressed by position, or with `find` by sample number."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store = store
        self.manifest = manifest
        self.views = manifest.views  # the policy's numbers; those of a part of an archive may begin above 0
        self.num_views, self.num_samples, self.num_classes = manifest.num_views, manifest.num_samples, manifest.num_classes
        self.class_names = manifest.class_names
        self._codec = CODECS.from_dict(manifest.codec)
        try:
            arrangement = LAYOUTS.from_dict(manifest.layout)
        except KdcacheError as error:
            raise not_known(store.name, error) from None
        self._table = self._places = ShardTable(manifest, store)  # for places, of the archive as it has grown meanwhile
        if isinstance(store, LocalStore):  # else where the table is fetched
            self._table.require_seal()
        reader = arrangement.open(manifest, store)
        self.reader = BoundReader(reader, manifest, store.name, self._shard, self.shards)
        self._types = row_fields(manifest)
        self._files_checked = False
        self._position_of = lru_cache(maxsize=4)(self._positions)
        store.expect(self._record_of)

    def __repr__(self) -> str:
        size = f"V={self.num_views} N={self.num_samples} C={self.num_classes}"
        return f"<Archive {self.location} {size} {self.manifest.digest[:8]}>"

    def __reduce__(self) -> tuple[object, ...]:
        return open_archive, (self.location,)  # the receiving process maps the files again

    @property
    def digest(self) -> str:
        """The sha256 that identifies rows, teacher, policy and data. It is the same in every layout."""
        return self.manifest.digest

    @property
    def location(self) -> str:
        """The folder or URL from which the archive was opened."""
        return self.store.name

    @property
    def name(self) -> str:
        """The last part of the location, without a revision. Folders of runs are named after it."""
        last = self.location.rstrip("/").rpartition("/")[2]
        return last.partition("@")[0] if is_url(self.location) else last

    @property
    def path(self) -> Path:
        """The archive's folder. Raises UsageError for a remote archive."""
        if not isinstance(self.store, LocalStore):
            raise UsageError(
                f"{self.location} is no folder on this machine",
                why="its files are fetched one by one, as they are read",
                fix=f"kdcache pull {shlex.quote(self.location)}",
            )
        return self.store.root

    def labels(self) -> NDArray[np.int64] | None:
        """Label of every sample, int64 `[N]`; None if the archive has no labels."""
        self._check_files()
        labels = self.reader.labels()
        if labels is not None and (wrong := (labels < 0) | (labels >= self.num_classes)).any():
            raise IntegrityError(
                f"{self.location}: label {labels[wrong][0]} with {self.num_classes} classes",
                why="labels are numbers of classes; these were not written by kdcache",
                fix="do not use this archive; get it again from whoever made it",
            )
        return labels

    def keys(self) -> list[str] | None:
        """Key of every sample, `[N]`; None if the archive has no keys."""
        self._check_files()
        return self.reader.keys()

    def grown(self) -> "Archive | None":
        """The archive opened again if views were appended since it was opened; else None."""
        try:
            now = open_archive(self.location) if isinstance(self.store, LocalStore) else self
        except KdcacheError:
            return None
        return now if now.num_views > self.num_views else None

    def shards(self) -> Iterator[ShardRecord]:
        """The table of shards, checked against the manifest's sha256."""
        try:
            return self._table.records()
        except IntegrityError:
            if (grown := self._same_grown()) is None:
                raise
            return iter([shard for shard in grown.shards() if shard.view in self.views])

    def _same_grown(self) -> "Archive | None":
        """The archive with the views that were appended since it was opened, if its own shards are among those; else None."""
        if (grown := self.grown()) is None:
            return None
        mine = (shard for shard in grown.shards() if shard.view in self.views)
        return grown if archive_digest(self.manifest, mine) == self.manifest.digest else None

    def _shard(self, view: int, block: int) -> ShardRecord:
        """The record of one shard."""
        try:
            return self._places.record(view, block)
        except IntegrityError:
            if (grown := self._same_grown()) is None:
                raise
            self._places = grown._table
            return self._places.record(view, block)

    def read(self, view: int, start: int, stop: int) -> Rows:
        """Rows at positions `start` to `stop` (exclusive) of `view`, which are read at first use."""
        self._check_range(view, start, stop)
        return Rows(self, view, slice(start, stop))

    def take(self, view: int, positions: NDArray[np.int64]) -> Rows:
        """Rows at any `positions`, int64 `[n]`, of `view`, in the order of `positions`."""
        positions = whole_numbers(positions, "positions", listed=True)
        self._check_range(view, int(positions.min(initial=0)), int(positions.max(initial=-1)) + 1)
        return Rows(self, view, positions)

    def find(self, view: int, samples: NDArray[np.int64]) -> Rows:
        """Rows of any sample numbers `samples`, int64 `[n]`, in `view`, in the order of `samples`."""
        samples = whole_numbers(samples, "sample numbers", listed=True)
        if samples.size and not (samples.min() >= 0 and samples.max() < self.num_samples):
            raise IndexError(f"sample numbers must lie in 0..{self.num_samples - 1}")
        self._check_range(view, 0, 0)
        return self.take(view, self._position_of(view)[samples])

    def spread_logits(self, most: int = MAX_ROWS) -> Iterator[NDArray[np.float32]]:
        """Logits of at most `most` evenly spaced rows, in blocks float32 `[n, C]`, for averages over the archive."""
        self._require_logits()
        return spread_logits(self.manifest, self.reader, most)

    def column(self, name: str, view: int) -> NDArray:
        """One stored field of a whole view, `[N, ...]`: `entropy`, `entropy_rest`, `argmax`, `sample`, `digest` or `probe`."""
        self._check_range(view, 0, self.num_samples)
        return self.checked(name, view, slice(0, self.num_samples))

    def checked(self, name: str, view: int, rows: slice | NDArray[np.int64]) -> NDArray:
        """A copy of `gather`'s values, of positions that are known to be the archive's.

        Sample and class numbers are checked against their range, so they are safe as indices.
        """
        values = np.array(self._gathered(name, view, rows))
        numbers = {"sample": self.num_samples, "argmax": self.num_classes}.get(name)
        if numbers and values.size and not 0 <= values.min() <= values.max() < numbers:
            raise IntegrityError(
                f"{self.location}: view {view} has {name} {values[(values < 0) | (values >= numbers)][0]}",
                why=f"they are numbered 0 to {numbers - 1}; these were not written by kdcache",
                fix="kdcache verify names the damage",
            )
        return values

    def stored(self, view: int, block: int) -> dict[str, NDArray]:
        """The stored fields of one shard, `[n, ...]` each. The codec decodes them to logits."""
        rows = slice(0, self.manifest.block_rows(block))
        return {name: self.reader.gather(name, view, block, rows) for name in self._types}

    def prefetch(self, *views: int) -> None:
        """Start fetching the files of these views of a remote archive. Returns at once.

        Earlier views have priority; files that do not fit into the cache beside theirs are skipped.
        """
        self.store.prefetch(name for view in views for name in self._files_of(view))

    def fetch(self, view: int, progress: Progress | None = None) -> None:
        """Fetch all files of a view, so that any process on this machine can read it."""
        self.store.fetch(self._files_of(view), progress or Silent())

    def _files_of(self, view: int) -> Iterator[str]:
        return (name for block in range(self.manifest.num_blocks) for name in self.reader.files(view, block))

    def gather(self, name: str, view: int, rows: slice | NDArray[np.int64]) -> NDArray:
        """A stored field at a slice or an array of positions, `[n, ...]`. It may be a memory map: do not change it.

        Raises IndexError for positions that the view does not have, and for slices with a step.
        """
        self._check_rows(view, rows)
        return self._gathered(name, view, rows)

    def _gathered(self, name: str, view: int, rows: slice | NDArray[np.int64]) -> NDArray:
        shards = self._in_shards(rows) if isinstance(rows, slice) else self._scattered(rows)
        parts = [(where, self.reader.gather(name, view, block, inside)) for block, inside, where in shards]
        if len(parts) == 1:
            return parts[0][1]
        dtype, shape = self._types[name]
        gathered = np.empty((count_of(rows), *shape), dtype)
        for where, values in parts:
            gathered[where] = values
        return gathered

    def logits(self, view: int, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits at a slice or an array of positions: float32 `[n, C]`. See also `read`, `take` and `find`."""
        self._check_rows(view, rows)
        return self.decoded(view, rows)

    def decoded(self, view: int, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """As `logits`, of positions that are known to be the archive's."""
        self._require_logits()
        if isinstance(rows, slice):
            return self._slice_of_logits(view, rows)
        decoded = np.empty((len(rows), self.num_classes), np.float32)
        for block, inside, where in self._scattered(rows):
            stored = {name: self.reader.gather(name, view, block, inside) for name in ("logits", *self._codec.parameters)}
            decoded[where] = self._codec.decode(stored)
        return decoded

    def _slice_of_logits(self, view: int, rows: slice) -> NDArray[np.float32]:
        """Logits decoded piece by piece, while each is in the CPU's cache. Shards are opened before memory is allocated."""
        shards = [
            (
                self.reader.pieces("logits", view, block, inside),
                {name: self.reader.gather(name, view, block, inside) for name in self._codec.parameters},
            )
            for block, inside, _ in self._in_shards(rows)
        ]
        decoded = np.empty((rows.stop - rows.start, self.num_classes), np.float32)
        end = 0
        for pieces, beside in shards:
            first = end
            for piece in pieces:
                start, end = end, end + piece.size // self.num_classes
                stored = {name: values[start - first : end - first].reshape(piece.shape[:-1]) for name, values in beside.items()}
                self._codec.decode({"logits": piece, **stored}, decoded[start:end].reshape(piece.shape))
        return decoded

    def _in_shards(self, rows: slice) -> Iterator[tuple[int, slice, slice]]:
        """The shards that hold a slice of positions: (block, rows within the block, their places in the slice)."""
        size, at = self.manifest.shard_rows, rows.start
        while at < rows.stop:
            block, first = divmod(at, size)
            count = min(size - first, rows.stop - at)
            yield block, slice(first, first + count), slice(at - rows.start, at - rows.start + count)
            at += count

    def _scattered(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """`_in_shards` for an array of positions in any order."""
        blocks, inside = np.divmod(rows, self.manifest.shard_rows)
        for block in np.unique(blocks).tolist():
            where = np.flatnonzero(blocks == block)
            yield block, inside[where], where

    def _require_logits(self) -> None:
        if "logits" not in self._types:
            raise IncompatibleError(
                f"{self.location} holds no logits",
                why="it is the statistics of an archive, pulled or pushed with --stats-only",
                fix="get the whole archive, or some of its views: kdcache pull SOURCE --views 0:10",
            )

    def _check_files(self) -> None:
        """Check once that the files that belong to no shard match the manifest. Files for people may be edited."""
        if not self._files_checked:
            Verifier(self, "full").verify_files_of_no_shard().raise_if_failed()
            self._files_checked = True

    def _record_of(self, name: str) -> FileRecord:
        """The record of a file. Raises IntegrityError if the archive has none."""
        record = self._records.get(name)
        if record is None:
            raise IntegrityError(
                f"{name} is no file of {self.location}",
                why="neither its manifest nor its table of shards names it",
                fix="get the archive again from whoever made it",
            )
        return record

    def records(self) -> Iterator[FileRecord]:
        """The records of all files but the manifest."""
        yield self.manifest.shards
        yield from self.manifest.files
        for shard in self.shards():
            yield from shard.files

    @cached_property
    def _records(self) -> dict[str, FileRecord]:
        return {record.path: record for record in self.records()}

    def _positions(self, view: int) -> NDArray[np.int64]:
        """Position of each sample in a view, int64 `[N]`."""
        sample = self.gather("sample", view, slice(0, self.num_samples))
        positions = np.full(self.num_samples, -1)
        if not ((sample < 0) | (sample >= self.num_samples)).any():
            positions[sample] = np.arange(self.num_samples)
        if (positions < 0).any():
            raise IntegrityError(
                f"{self.location}: view {view} does not hold every sample once",
                why="its sample numbers are not a permutation",
                fix="kdcache verify names the damage",
            )
        return positions

    def _check_rows(self, view: int, rows: slice | NDArray[np.int64]) -> None:
        """Beyond the last position, a file may hold rows that fill its last unit up; and a step would be passed over."""
        if not isinstance(rows, slice):
            self._check_range(view, int(rows.min(initial=0)), int(rows.max(initial=-1)) + 1)
        elif rows.step not in {None, 1} or rows.start is None or rows.stop is None:
            raise IndexError(f"{rows} of an archive: give its first and its last position, or an array of positions")
        else:
            self._check_range(view, rows.start, rows.stop)

    def _check_range(self, view: int, start: int, stop: int) -> None:
        if operator.index(view) not in self.views:
            raise IndexError(f"view {view} of an archive with views {self.views.start}..{self.views.stop - 1}")
        if not 0 <= operator.index(start) <= operator.index(stop) <= self.num_samples:
            raise IndexError(f"positions {start}..{stop} of an archive with {self.num_samples} samples")

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all recorded files."""
        return sum(f.bytes for f in self.manifest.files) + sum(f.bytes for s in self.shards() for f in s.files)

    def verify(self, level: Level = "full", progress: Progress | None = None) -> Verification:
        """Compare the files with the manifest: `quick` compares sizes and whose rows files hold, `full` sha256 and every row."""
        return Verifier(self, level).verify(progress or Silent())
