"""Archives made from archives: in another layout, with another codec, or with only some views or fields."""

import math
import os
import shlex
from pathlib import Path
from typing import Literal

from kdcache.archive.format.manifest import MANIFEST_NAME, ArchivePlan, Statistics, SubsetOf
from kdcache.archive.format.store import LocalStore
from kdcache.archive.layouts import LAYOUTS, row_fields, rows_digest
from kdcache.archive.reading.reader import Archive
from kdcache.archive.reading.statistics import compute_statistics
from kdcache.archive.writing.writer import ArchiveWriter
from kdcache.codecs import CODECS
from kdcache.errors import IncompatibleError, IncompleteError, IntegrityError, UsageError
from kdcache.system.files import set_aside
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
    """Write the contents of `source`, or a part of them, to an archive at `path`. An interrupted call can be repeated.

    layout, codec: specifications (`"hdf5"`, `"zarr:bitshuffle"`, `"u8"`); by default those of the source. Another layout
        keeps the rows and the digest. Another codec changes the stored numbers, and so the digest.
    views: numbers of the views to keep, a range without gaps. contents: `"statistics"` leaves the logits out.
    task: name of the task in `progress`.

    A part records its whole in `manifest.subset_of`. Raises UsageError for views that `source` does not have.
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
            fix=f"name another folder, or set that one aside: {set_aside(Path(path))}",
        )
    total, missing = plan.num_views * plan.num_blocks, writer.missing()
    if not missing and writer.store.exists(MANIFEST_NAME):
        progress.say(f"{path} is complete with {writer.plan.num_views} views: nothing to do")
    records = {(shard.view, shard.block): shard for shard in source.shards()} if missing else {}
    for number, (view, block) in enumerate(missing):
        if contents == "all":  # without logits, prefetching would mostly fetch unneeded files
            source.prefetch(*range(view, min(view + 2, plan.views.stop)))
        with writer.claim(view, block, owned=True) as mine:  # every process would write the same bytes
            if not mine:
                continue  # another process writes it
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
    """Check that the source's table has every shard, before anything is written. Raises IntegrityError otherwise."""
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
) -> ArchivePlan:
    """The plan of the archive that `derive` writes."""
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
    plan = ArchivePlan.model_validate({name: getattr(manifest, name) for name in ArchivePlan.model_fields}).model_copy(
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


def stored_bytes(plan: ArchivePlan) -> int:
    """Bytes of the rows of `plan`, before compression."""
    row = sum(dtype.itemsize * math.prod(shape) for dtype, shape in row_fields(plan).values())
    return row * plan.num_views * plan.num_samples


def _statistics(source: Archive, plan: ArchivePlan, progress: Progress) -> Statistics:
    """Statistics of the kept views, from the source's own logits."""
    if plan.views == source.views:
        return source.manifest.statistics
    return compute_statistics(
        plan.model_copy(update={"codec": source.manifest.codec, "contents": "all"}), source.reader, source.labels(), progress
    )
