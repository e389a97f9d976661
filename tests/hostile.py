"""What a stranger does to an archive, and the property that whatever is done to one must keep.

A stranger has the format's description and computes every checksum anew, so that only the structural defences are left.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.archive import Archive, ArchiveWriter, open_archive
from kdcache.archive.format.manifest import SEAL, ArchivePlan, ShardRecord, archive_digest, seal_of
from kdcache.archive.layouts import LAYOUTS, row_fields, rows_digest
from kdcache.archive.reading.binding import shard_checksums
from kdcache.archive.writing.derive import derive
from kdcache.codecs import CODECS
from kdcache.errors import KdcacheError

__all__ = [
    "CLASSES",
    "CODEC_OF",
    "LAYOUT_OPTIONS",
    "SAMPLES",
    "build",
    "edit_manifest",
    "edit_table",
    "exercise",
    "make_older",
    "reseal",
    "resealed",
]

VIEWS, SAMPLES, CLASSES, SHARD_ROWS = 2, 7, 5, 4  # two shards a view, the second not full; two units a shard
LAYOUT_OPTIONS: dict[str, dict[str, Any]] = {
    "zarr": {"name": "zarr", "compression": "none", "inner_rows": 2},
    "zarr:bitshuffle": {"name": "zarr", "compression": "bitshuffle", "inner_rows": 2},
    "zarr:pcodec": {"name": "zarr", "compression": "pcodec", "inner_rows": 2},
    "hdf5": {"name": "hdf5", "unit_rows": 2},
    "webdataset": {"name": "webdataset", "record_rows": 2},
}
CODEC_OF = {"zarr": "i16", "zarr:bitshuffle": "u8", "zarr:pcodec": "f32", "hdf5": "u8", "webdataset": "f16"}


def build(path: Path, layout: str, **changes: Any) -> Path:
    """A sound archive, with labels and keys; `changes` are fields of its plan."""
    fields: dict[str, Any] = {
        "num_views": VIEWS,
        "num_samples": SAMPLES,
        "class_names": tuple(f"class {i}" for i in range(CLASSES)),
        "codec": {"name": CODEC_OF[layout]},
        "layout": LAYOUT_OPTIONS[layout],
        "shard_rows": SHARD_ROWS,
        "rows_hash": "blake3",
        "provenance": {"command": "kdcache dump-teacher --teacher t"},
    } | changes
    plan = ArchivePlan(**fields)
    plan = plan.model_copy(update={"codec": CODECS.to_dict(CODECS.from_dict(plan.codec))})
    plan = plan.model_copy(update={"layout": LAYOUTS.to_dict(LAYOUTS.from_dict(plan.layout))})
    labels = np.arange(plan.num_samples) % plan.num_classes
    writer = ArchiveWriter.of_plan(path, plan, labels, [f"k/{i}" for i in range(plan.num_samples)])
    rng = np.random.default_rng(4)
    for view, block in writer.missing():
        rows = len(writer.positions(block))
        writer.write(view, block, rng.normal(0, 5, (rows, plan.num_classes)).astype(np.float32))
    return writer.finalize().path


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and the digest that it holds of itself."""
    manifest = json.loads((path / "kdcache.json").read_text())
    change(manifest)
    (path / "kdcache.json").write_text(json.dumps(resealed(manifest)))


def resealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with the digest of its fields as they are now, if it has one."""
    return manifest | ({SEAL: seal_of(manifest)} if SEAL in manifest else {})


def edit_table(path: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change the table of shards, and the manifest's record of it."""
    table = path / json.loads((path / "kdcache.json").read_text())["shards"]["path"]
    records = [json.loads(line) for line in table.read_text().splitlines()]
    change(records)
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    table.write_bytes(data)
    edit_manifest(path, lambda m: m["shards"].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))


def make_older(path: Path) -> None:
    """Turn an archive into one as kdcache wrote it before shards recorded checksums, and manifests their digest."""
    edit_table(path, lambda shards: [shard.pop("checksums") for shard in shards])
    edit_manifest(path, lambda m: m.pop(SEAL))


def reseal(path: Path) -> None:
    """Compute size and sha256 of every recorded file anew, all digests of rows that can be read, and the archive's."""

    def measure(records: list[dict[str, Any]]) -> None:
        for record in records:
            if (path / record["path"]).is_file():
                data = (path / record["path"]).read_bytes()
                record.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def measure_shards(shards: list[dict[str, Any]]) -> None:
        for shard in shards:
            measure(shard["files"])

    edit_manifest(path, lambda m: measure(m["files"]))
    edit_table(path, measure_shards)
    try:
        archive = open_archive(path)
        reader = LAYOUTS.from_dict(archive.manifest.layout).open(archive.manifest, archive.store)
    except KdcacheError:
        return  # there is no digest of what cannot be opened

    def rows(shards: list[dict[str, Any]]) -> None:
        for shard in shards:
            try:
                place = shard["view"], shard["block"]
                shard["checksums"] = shard_checksums(reader, archive.manifest, *place)
                rows = slice(0, archive.manifest.block_rows(place[1]))
                stored = {name: reader.gather(name, *place, rows) for name in row_fields(archive.manifest)}
                shard["rows_digest"] = rows_digest(archive.manifest, stored)
            except (KdcacheError, KeyError, IndexError, ValueError):
                continue

    edit_table(path, rows)
    records = [ShardRecord.model_validate_json(line) for line in (path / archive.manifest.shards.path).read_text().splitlines()]
    edit_manifest(path, lambda m: m.update(digest=archive_digest(archive.manifest, records)))


def exercise(path: Path | str, copy: Path | None = None) -> dict[str, object]:
    """Everything that reads an archive, at a path or URL; and what turns it into another one, at `copy`.

    Returns what each of them raised: a KdcacheError or None. Anything else passes through, and what is returned to the
    caller must be what the manifest promises.
    """
    outcome: dict[str, object] = {}

    def attempt(name: str, act: Callable[[], object]) -> None:
        try:
            act()
            outcome[name] = None
        except KdcacheError as error:
            outcome[name] = _three_lines(error)

    try:
        archive = open_archive(path)
    except KdcacheError as error:
        return {"open": _three_lines(error)}
    attempt("verify quick", lambda: archive.verify("quick").raise_if_failed())
    attempt("verify full", lambda: archive.verify("full").raise_if_failed())
    attempt("size", lambda: archive.nbytes)
    attempt("labels", lambda: _check_labels(archive))
    attempt("keys", lambda: _check_keys(archive))
    last = archive.num_samples - 1
    for view in {archive.views[0], archive.views[-1]}:
        attempt(f"read {view}", lambda view=view: _check_rows(archive, archive.read(view, 0, min(last + 1, 64))))
        attempt(f"all {view}", lambda view=view: _check_rows(archive, archive.read(view, 0, last + 1)))
        attempt(f"take {view}", lambda view=view: _check_rows(archive, archive.take(view, np.array([last, 0]))))
        attempt(f"find {view}", lambda view=view: _check_rows(archive, archive.find(view, np.array([last, 0]))))
        for column in ("entropy", "sample", "probe"):
            attempt(f"{column} {view}", lambda view=view, column=column: archive.column(column, view))
    attempt("spread", lambda: [block.shape for block in archive.spread_logits()])
    attempt("prefetch", lambda: archive.prefetch(archive.views[0]))
    if copy is not None:
        attempt("convert", lambda: derive(archive, copy / "whole", layout="hdf5"))
        attempt("part", lambda: derive(archive, copy / "part", layout="webdataset", views=archive.views[:1], codec="u8"))
    return outcome


def _three_lines(error: KdcacheError) -> KdcacheError:
    assert len(str(error).splitlines()) == 3
    assert len(str(error)) < 15_000
    return error


def _check_labels(archive: Archive) -> None:
    labels = archive.labels()
    if labels is not None:
        assert labels.dtype == np.int64
        assert labels.shape == (archive.num_samples,)
        assert labels.min() >= 0
        assert labels.max() < archive.num_classes


def _check_keys(archive: Archive) -> None:
    keys = archive.keys()
    if keys is not None:
        assert len(keys) == archive.num_samples
        assert all(isinstance(key, str) for key in keys)
        "".join(keys).encode()


def _check_rows(archive: Archive, rows: Any) -> None:
    fields = rows.fields()
    assert fields["logits"].dtype == np.float32
    assert fields["logits"].shape == (len(rows), archive.num_classes)
    assert {len(column) for column in fields.values()} == {len(rows)}
