"""Writing an archive: shard by shard, in any order, by any number of processes, surviving a kill at any moment.

Until it is finished an archive holds the folder `.dump` with the plan and one sidecar per finished shard. A shard is
finished when its sidecar is there, and the sidecar is written after all of the shard's files; nothing is inferred from
the presence of a data file. `finalize` turns the sidecars into the manifest, whose appearance makes the archive one.

Who begins, extends or finishes a dump holds the archive's lock meanwhile; who writes a shard holds the shard's.
"""

import itertools
import json
import operator
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from kdcache.archive.format.cost import COST, DumpCost
from kdcache.archive.format.devices import DEVICE, DEVICES, device_shards, device_table
from kdcache.archive.format.manifest import (
    CLOSING,
    MANIFEST_NAME,
    WORK,
    ArchivePlan,
    CanvasCard,
    FileRecord,
    Licences,
    Manifest,
    ShardRecord,
    Statistics,
    TeacherCard,
    archive_digest,
    sealed,
)
from kdcache.archive.format.store import LocalStore, sha256
from kdcache.archive.layouts import LAYOUTS, Buffers, ShardReader, row_fields, rows_digest
from kdcache.archive.reading.binding import BoundReader, shard_checksums
from kdcache.archive.reading.reader import Archive, dump_command, open_archive
from kdcache.archive.reading.statistics import compute_statistics
from kdcache.archive.writing.card import card_files
from kdcache.archive.writing.encoding import encode_rows
from kdcache.archive.writing.planning import (
    PLAN,
    SAMPLES,
    begun_plan,
    load_plan,
    load_samples,
    new_plan,
    recorded_plan,
    require_same,
    samples_record,
)
from kdcache.archive.writing.sweeping import LOCK, alone, sweep_finished
from kdcache.codecs import CODECS, UnstorableError
from kdcache.datasets import SourceCard
from kdcache.errors import IncompleteError, IntegrityError, NotFoundError, UsageError
from kdcache.given import as_logits, stored_numbers, whole_numbers
from kdcache.system.documents import parse_json
from kdcache.system.energy import Spent
from kdcache.system.files import set_aside, translated_os_errors
from kdcache.system.locks import NoLocksError, locked
from kdcache.system.progress import Progress, Silent
from kdcache.views.policy import ViewPolicy

__all__ = ["ArchiveWriter"]

SIDECARS = f"{WORK}/shards"
COSTS = f"{WORK}/costs"  # a file for each shard, which is replaced where the shard is written again
HASHERS = 2  # threads


class Origin(TypedDict, total=False):
    """What the logits of an archive come from."""

    policy: ViewPolicy | None
    source: SourceCard | None
    canvas: CanvasCard | None
    teacher: TeacherCard | None
    licences: Licences | None
    provenance: dict[str, Any] | None


class ArchiveWriter:
    """Writes logits computed anywhere. Opening the same path again resumes; more `num_views` than before appends.

    Parameters
    ----------
    path: folder of the archive; made if missing.
    num_views, num_samples, class_names: the archive is `[num_views, num_samples, len(class_names)]`.
    labels, keys: per sample, in the order of sample numbers; optional.
    codec, layout: specifications such as `"u8"`, `"hdf5"` or `"zarr:bitshuffle"`.
    shard_rows: rows of a shard; by default 64 MiB of logits, or all samples if that is less.
    first_view: number of the first view, where the archive holds only some of a policy's views.
    policy, source, canvas, teacher, licences, provenance: what the logits come from. Without a policy the archive cannot be
        replayed.

    Raises IncompatibleError if the folder holds a dump of something else.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        num_views: int,
        num_samples: int,
        class_names: Sequence[str],
        labels: NDArray[np.int64] | None = None,
        keys: Sequence[str] | None = None,
        codec: str = "i16",
        layout: str = "zarr",
        shard_rows: int | None = None,
        first_view: int = 0,
        **origin: Unpack[Origin],
    ) -> None:
        origin["provenance"] = origin.get("provenance") or {}
        plan = new_plan(
            num_views=num_views,
            num_samples=num_samples,
            class_names=class_names,
            codec=codec,
            layout=layout,
            shard_rows=shard_rows,
            first_view=first_view,
            **origin,
        )
        self._start(LocalStore(path), plan, samples_record(plan, labels, keys))

    @classmethod
    def of_plan(
        cls, path: str | os.PathLike[str], plan: ArchivePlan, labels: NDArray[np.int64] | None, keys: Sequence[str] | None
    ) -> "ArchiveWriter":
        """The writer of an archive that is planned already."""
        writer = cls.__new__(cls)
        writer._start(LocalStore(path), plan, samples_record(plan, labels, keys))
        return writer

    @classmethod
    def resume(cls, path: str | os.PathLike[str]) -> "ArchiveWriter":
        """The writer of an unfinished archive, from what the folder itself says."""
        store = LocalStore(path)
        if not store.exists(PLAN):
            raise NotFoundError(
                f"{path} holds no unfinished dump",
                why="there is no plan in it" + (", and it is finished" if store.exists(MANIFEST_NAME) else ""),
                fix="check the path with: kdcache ls",
            )
        writer = cls.__new__(cls)
        writer._start(store, load_plan(store), None)
        return writer

    def _start(self, store: LocalStore, plan: ArchivePlan, samples: dict[str, Any] | None) -> None:
        self.store = store
        self._lap: Callable[[], Spent] | None = None
        self._device: str | None = None
        self._done: dict[tuple[int, int], ShardRecord] = {}
        covered = store.exists(MANIFEST_NAME) and open_archive(store.root).num_views >= plan.num_views
        with nullcontext() if covered else alone(store):  # a finished archive may well be read-only
            self._begin(plan, samples)

    def _begin(self, plan: ArchivePlan, samples: dict[str, Any] | None) -> None:
        """Be the dump that the folder is, or is to be; begin it, or the appending of views, if nobody has."""
        store = self.store
        if store.exists(MANIFEST_NAME):
            self._done = {(shard.view, shard.block): shard for shard in open_archive(store.root).shards()}
        if (earlier := recorded_plan(store.root)) is not None:
            require_same(store, earlier, plan, samples)
            views, begun = max(plan.num_views, earlier.num_views), begun_plan(store)
            if begun is not None and views > earlier.num_views:  # another process appends, perhaps more of them
                views = max(views, begun.num_views)
            growing = begun is not None and begun.num_views > earlier.num_views
            if store.exists(MANIFEST_NAME) and views > earlier.num_views and not growing:
                shutil.rmtree(store.path(COSTS), ignore_errors=True)  # the manifest has them; left by who was killed after it
            # The process that began a dump is its maker, so a resumed dump has an uninterrupted one's bytes, all but its costs.
            plan = plan.model_copy(
                update={
                    "num_views": views,
                    "probe_version": earlier.probe_version,
                    "rows_hash": earlier.rows_hash,
                    "licences": plan.licences.otherwise(earlier.licences) if plan.licences else earlier.licences,
                    "teacher": earlier.teacher,
                    "provenance": dict(earlier.provenance),
                }
            )
        self.plan = plan
        self._codec = CODECS.from_dict(plan.codec)
        self._layout = LAYOUTS.from_dict(plan.layout)
        if self.missing() or not store.exists(MANIFEST_NAME):
            if samples is not None and not store.exists(SAMPLES):
                store.write(SAMPLES, json.dumps(samples).encode())
            text = plan.model_dump_json(indent=1).encode()
            if earlier is None and not store.create(PLAN, text):  # another process began it just now, without a lock
                self._begin(plan, samples)
            elif earlier is not None and begun_plan(store) != plan:
                store.write(PLAN, text)

    def count_costs(self, lap: Callable[[], Spent], device: str | None = None) -> None:
        """Record what each further shard takes: what `lap` gives each time that one is about to be finished.

        `device` is the kind of device that computes these shards.
        """
        self._lap, self._device = lap, device

    def _collect(self) -> None:
        """Take note of shards that were finished meanwhile, by this process or another."""
        present = set(self.store.names(SIDECARS, ".json"))
        for shard in self.shards():
            if shard not in self._done and _sidecar(*shard) in present and (found := self._read_sidecar(*shard)):
                self._done[shard] = found
        if self.store.exists(MANIFEST_NAME) and any(shard not in self._done for shard in self.shards()):
            # Another process has finished the archive meanwhile, and the sidecars are gone.
            for record in open_archive(self.store.root).shards():
                self._done.setdefault((record.view, record.block), record)

    def _read_sidecar(self, view: int, block: int) -> ShardRecord | None:
        """The record of a finished shard; None if there is none, or a damaged one: then the shard is written anew."""
        try:
            record = ShardRecord.model_validate_json(self.store.read(_sidecar(view, block)))
        except (IntegrityError, ValidationError):
            return None
        planned = (view, block, self.plan.block_rows(block))
        return record if (record.view, record.block, record.rows) == planned else None

    def shards(self) -> Iterator[tuple[int, int]]:
        """All (view, block) of the plan."""
        return ((view, block) for view in self.plan.views for block in range(self.plan.num_blocks))

    def missing(self) -> list[tuple[int, int]]:
        """(view, block) of the shards that are not finished, in order."""
        self._collect()
        return [shard for shard in self.shards() if shard not in self._done]

    def positions(self, block: int) -> range:
        """The positions of a view that block `block` holds."""
        start = block * self.plan.shard_rows
        return range(start, start + self.plan.block_rows(block))

    @contextmanager
    def claim(self, view: int, block: int, *, owned: bool = False) -> Iterator[bool]:
        """Own one shard while writing it: True, or False if another process has it or has finished it.

        The lock is the operating system's and ends with its process, however that ends. `owned` shards are no other
        process's by agreement: they are claimed even where there are no locks, which is a UsageError otherwise.
        """
        path = self.store.path(f"{WORK}/{view}-{block}.lock")
        with ExitStack() as held:
            try:
                with translated_os_errors(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    free = held.enter_context(locked(path, wait=False))
            except NoLocksError as error:
                if not owned:
                    raise UsageError(
                        f"the file system of {self.store.root} has no locks",
                        why=f"they keep two processes from writing one shard ({error.strerror})",
                        fix="say who writes what: --shard 0/1 for a single process, --shard 0/4 to --shard 3/4 for four of them",
                    ) from None
                free = True
            yield free and not self.finished(view, block)

    def finished(self, view: int, block: int) -> bool:
        """Whether a shard is written, by this process or another."""
        if self.store.exists(MANIFEST_NAME):  # another process may have finished the archive, and swept the records away
            self._collect()
        return (view, block) in self._done or self._read_sidecar(view, block) is not None

    def write(
        self,
        view: int,
        block: int,
        logits: NDArray[np.float32],
        sample: NDArray[np.int64] | None = None,
        digest: NDArray[np.uint32] | None = None,
        probe: NDArray[np.uint8] | None = None,
    ) -> None:
        """Write one shard whole: raw `logits` float32 `[n, C]` of the `positions(block)` of `view`, uncentred.

        `sample [n]` says which sample sits at each position (default: position j holds sample j); `digest [n]` and
        `probe [n, 16]` are the views' fingerprints. Raises UsageError for values that the codec cannot hold, for fingerprints
        that are no whole numbers of their dtype, and for other shapes.
        """
        rows = self.positions(operator.index(block))
        expected = (len(rows), self.plan.num_classes)
        logits = as_logits(logits)
        if logits.shape != expected or operator.index(view) not in self.plan.views or block not in range(self.plan.num_blocks):
            raise UsageError(
                f"shard (view {view}, block {block}) was given logits {list(logits.shape)}",
                why=f"the archive has {self.plan.num_views} views, and this block is {list(expected)}",
                fix="write whole shards: one row per position of writer.positions(block)",
            )
        sample = np.arange(rows.start, rows.stop) if sample is None else whole_numbers(sample, "sample numbers")
        fitting = sample.shape == expected[:1] and ((sample >= 0) & (sample < self.plan.num_samples)).all()
        if not fitting or len(np.unique(sample)) != len(rows):
            raise UsageError(
                f"shard (view {view}, block {block}) was given sample numbers {np.array2string(sample, threshold=6)}",
                why=f"each of its {len(rows)} rows belongs to another sample, numbered 0 to {self.plan.num_samples - 1}",
                fix="pass which sample sits at each position",
            )
        try:
            encoded = encode_rows(self._codec, logits)
        except UnstorableError as error:
            raise UsageError(
                f"view {view}, position {rows.start + error.row}: sample {sample[error.row]} has the logit {error.value:.6g} "
                f"for class {error.column}",
                why=error.why,
                fix=error.fix,
            ) from None
        given: dict[str, NDArray] = {"sample": sample}
        for name, values in (("digest", digest), ("probe", probe)):
            dtype, shape = row_fields(self.plan)[name]
            shape = (len(rows), *shape)
            given[name] = np.zeros(shape, dtype) if values is None else stored_numbers(values, f"{name}s", dtype, shape)
        self.write_stored(view, block, {**encoded, **given})

    def write_stored(self, view: int, block: int, fields: Mapping[str, NDArray]) -> None:
        """Write one shard whole from the `fields` of its rows as they are to be stored, `[n, ...]` each."""
        kept = {name: np.asarray(fields[name]).astype(dtype, copy=False) for name, (dtype, _) in row_fields(self.plan).items()}
        files = self._layout.shard_files(self.plan, view, block, kept)
        with ThreadPoolExecutor(HASHERS) as pool:  # hashing takes longer than writing, and neither needs the interpreter
            digest = pool.submit(rows_digest, self.plan, kept)
            records = [pool.submit(_record, name, data) for name, data in sorted(files.items(), key=lambda item: -_size(item[1]))]
            for name, data in files.items():
                self.store.write(name, data)
            record = ShardRecord(
                view=view,
                block=block,
                rows=self.plan.block_rows(block),
                rows_digest=digest.result(),
                files=tuple(sorted((found.result() for found in records), key=lambda found: found.path)),
                checksums=shard_checksums(self._layout.open(self.plan, self.store), self.plan, view, block),
            )
        if self._lap is not None:  # before the shard counts as finished, since then another process may finish the archive
            cost = DumpCost(record.rows, self._lap())
            taken = cost.record() | ({DEVICE: self._device} if self._device is not None else {})
            self.store.write(f"{COSTS}/{view}-{block}.json", json.dumps(taken).encode())
        self.store.write(_sidecar(view, block), record.model_dump_json().encode())
        self._done[view, block] = record

    def _taken(self) -> dict[str, Any]:
        """What all processes have recorded of these shards, and what was known of earlier views: costs, and kinds of device."""
        provenance, blocks, costs = self.plan.provenance, self.plan.num_blocks, []
        numbers = range(self.plan.views.start * blocks, self.plan.views.stop * blocks)
        kinds = dict.fromkeys(numbers, provenance.get(DEVICE, "unknown"))
        for kind, ranges in device_shards(provenance, numbers).items():
            kinds |= dict.fromkeys(itertools.chain(*ranges), kind)
        for name in self.store.names(COSTS, ".json"):
            with suppress(IntegrityError, ValueError):  # of passes whose record is damaged nothing is known
                record = parse_json(self.store.read(name))
                costs.append(DumpCost.of(record))
                view, block = map(int, Path(name).stem.split("-"))
                if isinstance(record, dict) and DEVICE in record:
                    kinds[view * blocks + block] = record[DEVICE]
        taken: dict[str, Any] = {}
        if costs:
            taken[COST] = sum(costs, DumpCost.of(provenance.get(COST))).record()
        if len(set(kinds.values())) > 1:
            taken[DEVICES] = device_table(kinds)
        return taken

    def finalize(self, progress: Progress | None = None, *, statistics: Statistics | None = None) -> Archive:
        """Write the manifest and return the archive. Raises IncompleteError while shards are missing.

        `statistics` are computed from the rows, unless they are known better than the rows can tell.
        """
        store = self.store
        if (done := self._finished()) and not store.path(WORK).is_dir() and not store.exists(LOCK):
            return done  # by another process, to the end
        with alone(store):  # processes that share a dump may all come here last; one of them does it
            try:
                archive = self._finished() or self._finalize(progress or Silent(), statistics)
            except (IntegrityError, OSError):
                # Where there are no locks, another may do it at the same time, and sweep away what this one has yet to read.
                if (done := self._finished()) is None:
                    raise
                archive = done
            sweep_finished(store, archive)
        return archive

    def _write_again(self, shards: Sequence[tuple[int, int]]) -> str:
        """The advice for an archive that cannot be finished, as files of these shards are not what was written."""
        asides = " && ".join(set_aside(self.store.path(_sidecar(*shard))) for shard in shards)
        return f"have them written again: {asides}; {dump_command(self.plan.provenance)}"

    def _finished(self) -> Archive | None:
        """The archive, if it is there with all views that are planned."""
        archive = open_archive(self.store.root) if self.store.exists(MANIFEST_NAME) else None
        return archive if archive is not None and archive.num_views >= self.plan.num_views else None

    def _finalize(self, progress: Progress, statistics: Statistics | None) -> Archive:
        missing, taken = self.missing(), self._taken()
        if missing:
            shown = ", ".join(f"view {view} block {block}" for view, block in missing[:4])
            raise IncompleteError(
                f"{self.store.root} lacks {len(missing)} of {self.plan.num_views * self.plan.num_blocks} shards ({shown}, ...)",
                why="the dump did not finish",
                fix=dump_command(self.plan.provenance),
            )
        shards = [self._done[shard] for shard in self.shards()]
        samples = load_samples(self.store, self.plan)
        labels = None if samples["labels"] is None else np.array(samples["labels"], np.int64)
        reader = BoundReader(
            self._layout.open(self.plan, self.store),
            self.plan,
            self.store.name,
            lambda view, block: self._done[view, block],
            self._done.values,
            self._write_again,
        )
        _require_every_sample_once(self.plan, reader)
        if statistics is None:
            statistics = compute_statistics(self.plan, reader, labels, progress)
        digest = archive_digest(self.plan, shards)
        # The table carries the digest in its name: while views are appended, the earlier manifest stays true.
        table_name = f"shards-{digest[:8]}.jsonl"
        table = "".join(shard.model_dump_json() + "\n" for shard in shards).encode()
        draft = Manifest(
            **dict(self.plan) | {"provenance": self.plan.provenance | taken},
            digest=digest,
            policy_digest=self.plan.policy.digest if self.plan.policy else None,
            files=(),
            shards=_record(table_name, [table]),
            statistics=statistics,
        )
        closing = self._layout.closing_files(self.plan, labels, samples["keys"])
        described = [draft.shards, *(_record(name, data) for name, data in sorted(closing.items()))]
        people = card_files(draft, described, shards, self._layout.reading_lines(draft))
        closing |= {name: [data] for name, data in people.items()}
        records = tuple(_record(name, data) for name, data in sorted(closing.items()))
        if self.store.exists(MANIFEST_NAME):
            # Views are appended: until the new manifest is there, the old one is to accept these files beside its own.
            known = self.store.read(CLOSING).decode().splitlines() if self.store.exists(CLOSING) else []
            known += [record.model_dump_json() for record in records]
            self.store.write(CLOSING, "\n".join(dict.fromkeys(known)).encode())
        closing[table_name] = [table]
        for name, data in closing.items():
            self.store.write(name, data)
        manifest = draft.model_copy(update={"files": records})
        self.store.write(MANIFEST_NAME, sealed(manifest))
        return open_archive(self.store.root)


def _require_every_sample_once(plan: ArchivePlan, reader: ShardReader) -> None:
    for view in plan.views:
        present = np.zeros(plan.num_samples, np.bool_)
        for block in range(plan.num_blocks):
            numbers = reader.gather("sample", view, block, slice(0, plan.block_rows(block)))
            present[numbers[(numbers >= 0) & (numbers < plan.num_samples)]] = True
        if not present.all():
            raise UsageError(
                f"view {view} does not hold sample {int(np.argmin(present))}",
                why="every view holds every sample once, in any order; this one holds others twice",
                fix="write to another folder, and pass which sample sits at each position of the whole view",
            )


def _sidecar(view: int, block: int) -> str:
    return f"{SIDECARS}/{view}-{block}.json"


def _size(data: Buffers) -> int:
    return sum(memoryview(piece).nbytes for piece in data)


def _record(name: str, data: Buffers) -> FileRecord:
    return FileRecord(path=name, bytes=_size(data), sha256=sha256(data))
