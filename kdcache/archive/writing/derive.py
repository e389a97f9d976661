"""Archives made from archives: in another layout, by another codec, or of a part of their views and fields."""

import math
import os
import shlex
from pathlib import Path
from typing import Literal

from kdcache.archive.format.manifest import Plan, Statistics, SubsetOf
from kdcache.archive.format.store import LocalStore
from kdcache.archive.layouts import LAYOUTS, row_fields, rows_digest
from kdcache.archive.reading.reader import Archive
from kdcache.archive.reading.statistics import compute_statistics
from kdcache.archive.writing.writer import ArchiveWriter
from kdcache.codecs import CODECS
from kdcache.errors import IncompatibleError, IncompleteError, IntegrityError, UsageError
from kdcache.system.progress import Progress, Silent

__all__ = ["derive", "derived_plan", "stored_bytes"]

Contents = Literal["all", "statistics"]


def derive(
    source: Archive,
    path: str | os.PathLike[str],
    *,
    layout: str | None = None,
    codec: str | None = None,
    views: range | None = None,
    contents: Contents = "all",
    progress: Progress | None = None,
    task: str = "convert",
) -> Archive:
    """Write an archive that holds what `source` holds, or a part of it, at `path`; goes on where it was stopped.

    layout, codec: specifications (`"hdf5"`, `"zarr:bitshuffle"`, `"u8"`); the source's own if not given. The rows of an
        archive are the same in every layout, and so is its digest; another codec stores other numbers.
    views: numbers of the views to keep, a range without gaps. contents: `"statistics"` leaves the logits out.
    task: what progress is shown as.

    A part says what it is a part of (`manifest.subset_of`). Raises UsageError for views that are not there.
    """
    progress = progress or Silent()
    if isinstance(source.store, LocalStore) and Path(path).resolve() == source.path.resolve():
        raise UsageError(f"{path} is the archive itself", why="it cannot be written while it is read", fix="name another folder")
    _require_whole(source)
    plan = derived_plan(source, layout=layout, codec=codec, views=views, contents=contents)
    encoder, decoder = CODECS.from_dict(plan.codec), CODECS.from_dict(source.manifest.codec)
    writer = ArchiveWriter.of_plan(path, plan, source.labels(), source.keys())
    if writer.plan.num_views != plan.num_views:
        raise UsageError(
            f"{path} holds {writer.plan.num_views} views of this archive already, not {plan.num_views}",
            why="views are never taken away",
            fix="name another folder, or delete that one",
        )
    total, missing = plan.num_views * plan.num_blocks, writer.missing()
    records = {(shard.view, shard.block): shard for shard in source.shards()} if missing else {}
    for number, (view, block) in enumerate(missing):
        if contents == "all":  # else most of what would be fetched ahead is not wanted
            source.prefetch(*range(view, min(view + 2, plan.views.stop)))
        with writer.claim(view, block, owned=True) as mine:  # whoever writes it writes the same bytes
            if not mine:
                continue  # another process has it
            stored = source.stored(view, block)
            if rows_digest(source.manifest, stored) != records[view, block].rows_digest:
                raise IntegrityError(
                    f"{source.location}: view {view} block {block} does not hold the rows that its table of shards records",
                    why="its bytes were changed after they were written, and their checksums with them",
                    fix=f"kdcache verify {shlex.quote(source.location)} names all damage; get the archive again",
                )
            if contents == "all" and encoder != decoder:
                stored.update(encoder.encode(decoder.decode(stored)))
            writer.write_stored(view, block, stored)
        progress.update(task, total - len(missing) + number + 1, total)
    if left := writer.missing():
        raise IncompleteError(
            f"{path}: {len(left)} shards are being written by other processes",
            why="the last of them finishes the archive",
            fix="wait for them, then repeat the command",
        )
    return writer.finalize(progress, statistics=_statistics(source, plan, progress))


def _require_whole(source: Archive) -> None:
    """Before anything is written, and before anybody counts shards that are only claimed."""
    planned, present = source.num_views * source.manifest.num_blocks, sum(1 for _ in source.shards())
    if present != planned:
        raise IntegrityError(
            f"{source.location} has {present:,} shards, not {planned:,}",
            why="its table of shards is not that of its manifest",
            fix=f"kdcache verify {shlex.quote(source.location)} names the damage",
        )


def derived_plan(
    source: Archive,
    *,
    layout: str | None = None,
    codec: str | None = None,
    views: range | None = None,
    contents: Contents = "all",
) -> Plan:
    """What `derive` would write."""
    manifest = source.manifest
    views = manifest.views if views is None else views
    if not views or views.step != 1 or views[0] not in manifest.views or views[-1] not in manifest.views:
        raise UsageError(
            f"views {views.start}:{views.stop}",
            why=f"{source.location} has views {manifest.views.start}:{manifest.views.stop}, of which a range is taken",
            fix=f"--views {manifest.views.start}:{manifest.views.stop}",
        )
    if manifest.contents == "statistics" and (contents == "all" or views != manifest.views):
        raise IncompatibleError(
            f"{source.location} holds no logits",
            why="it is the statistics of an archive, of which no part can be computed",
            fix="take the part from the archive itself",
        )
    whole = views == manifest.views and contents == manifest.contents
    part = SubsetOf(digest=manifest.digest, first_view=manifest.first_view, num_views=manifest.num_views)
    provenance = dict(manifest.provenance)
    coding = CODECS.from_dict(manifest.codec) if codec is None else CODECS.parse(codec)
    if CODECS.to_dict(coding) != CODECS.to_dict(CODECS.from_dict(manifest.codec)):
        provenance["converted_from"] = {"digest": manifest.digest, "codec": manifest.codec}
    plan = Plan.model_validate({name: getattr(manifest, name) for name in Plan.model_fields}).model_copy(
        update={
            "first_view": views.start,
            "num_views": len(views),
            "contents": contents,
            "codec": CODECS.to_dict(coding),
            "subset_of": manifest.subset_of if whole else part,
            "provenance": provenance,
        }
    )
    arrangement = LAYOUTS.from_dict(manifest.layout) if layout is None else LAYOUTS.parse(layout)
    return plan.model_copy(update={"layout": LAYOUTS.to_dict(arrangement.fit(plan))})


def stored_bytes(plan: Plan) -> int:
    """Bytes of the rows of `plan`, before compression."""
    row = sum(dtype.itemsize * math.prod(shape) for dtype, shape in row_fields(plan).values())
    return row * plan.num_views * plan.num_samples


def _statistics(source: Archive, plan: Plan, progress: Progress) -> Statistics:
    """Those of the views that are kept, from the logits as the source has them."""
    if plan.views == source.views:
        return source.manifest.statistics
    return compute_statistics(
        plan.model_copy(update={"codec": source.manifest.codec, "contents": "all"}), source.reader, source.labels(), progress
    )
