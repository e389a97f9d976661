"""The report's section on the archives that students were trained from."""

import base64
import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.archive import Archive, open_archive
from kdcache.errors import KdcacheError
from kdcache.report.archive_figures import moments_drawing, sorted_softmax
from kdcache.report.figures import Drawing, entropy_histograms
from kdcache.report.records import SHEET, ArchiveArgs, RunRecord
from kdcache.system.remote import is_url

__all__ = ["ArchivePart", "archive_parts"]

HISTOGRAM_ROWS = 100_000


@dataclass(frozen=True)
class ArchivePart:
    """One archive on the page. Where `archive` or `sheet` is missing, the texts give the reason, if there is one to give."""

    name: str
    digest: str
    archive: Archive | None = None
    facts: str = ""
    drawings: tuple[Drawing, ...] = ()
    no_drawing: str = ""
    sheet: str = ""  # a data URI
    no_sheet: str = ""


def _by_archive(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    runs_by_archive: dict[str, list[RunRecord]] = {}
    for record in records:
        runs_by_archive.setdefault(record.args.archive_digest, []).append(record)
    return runs_by_archive


def archive_parts(records: Sequence[RunRecord]) -> list[ArchivePart]:
    """Every archive that students were trained from, then the members of averages, then the archives of second views."""
    parts: dict[str, ArchivePart] = {}
    members: dict[str, ArchivePart] = {}
    for digest, runs in _by_archive(records).items():
        args = runs[0].args
        if args.archives:
            names = " and ".join(member.archive_name for member in args.archives)
            sheet: dict[str, Any] = _contact_sheet(runs)
            reason = f"it is the average of the {args.average} of {names}, which was never stored"
            parts[digest] = ArchivePart(args.archive_name, digest, no_drawing=reason, **sheet)
            members |= {member.archive_digest: _archive_part(runs[0], member, {}) for member in args.archives}
        else:
            parts[digest] = _archive_part(runs[0], args, _contact_sheet(runs))
        seconds = {run.second_archive.archive_digest: (run, run.second_archive) for run in runs if run.second_archive}
        members |= {digest: _archive_part(run, second, {}) for digest, (run, second) in seconds.items()}
    return list((parts | {digest: part for digest, part in members.items() if digest not in parts}).values())


def _archive_part(run: RunRecord, args: ArchiveArgs, sheet: dict[str, str]) -> ArchivePart:
    part: dict[str, Any] = {"name": args.archive_name, "digest": args.archive_digest, **sheet}
    archive, reason = _find_archive(run, args)
    try:
        return ArchivePart(**part, **(_teacher(archive, args.archive_name) if archive else {"no_drawing": reason}))
    except (KdcacheError, OSError) as error:
        return ArchivePart(**part, no_drawing=getattr(error, "what", str(error)))


def _find_archive(run: RunRecord, args: ArchiveArgs) -> tuple[Archive | None, str]:
    """An archive of a run, or the reason why it cannot be shown. It may have moved together with the run's workspace."""
    home = run.folder.resolve().parent.parent.parent
    reason = ""
    copy = home / "archives" / args.archive_name
    if is_url(args.archive):  # nothing is fetched because a record says so, which may be a stranger's
        reason = f"it is not in {copy.parent}, where kdcache pull {shlex.quote(args.archive)} puts it"
    for path in dict.fromkeys([copy] if is_url(args.archive) else [Path(args.archive), home / args.archive, copy]):
        try:
            archive = open_archive(path)
        except (KdcacheError, OSError) as error:
            reason = reason or getattr(error, "what", str(error))
            continue
        if archive.manifest.digest == args.archive_digest:
            return archive, ""
        reason = f"the archive at {path} now has digest {archive.manifest.digest[:8]}, so it is not the one that was used"
    return None, reason


def _teacher(archive: Archive, name: str) -> dict[str, Any]:
    """Facts and figures of an archive. Its entropy histograms come from a few evenly spaced views."""
    manifest = archive.manifest
    count = min(archive.num_views, max(1, HISTOGRAM_ROWS // archive.num_samples))
    views = np.unique(np.linspace(archive.views.start, archive.views.stop - 1, count).astype(int))
    columns = ("entropy", "entropy_rest")
    values = {column: np.concatenate([archive.column(column, int(v)) for v in views]).astype(float) for column in columns}
    means = {column: float(data.mean()) for column, data in values.items()}
    facts = [f"{archive.num_samples:,} samples in {archive.num_views:,} views each, {archive.num_classes} classes"]
    if manifest.teacher:
        facts.append(f"teacher {manifest.teacher.name}, {manifest.teacher.precision}")
        if manifest.teacher.top1_clean is not None:
            facts.append(f"its top-1 on clean test images {manifest.teacher.top1_clean:.2f} % ({manifest.teacher.test_title})")
    if manifest.statistics.top1_views is not None:
        facts.append(f"its top-1 on these views {manifest.statistics.top1_views:.2f} %")
    facts.append(f"histograms over {len(values['entropy']):,} views")
    drawings = [entropy_histograms(name, values, means)]
    if manifest.statistics.details:
        more = (sorted_softmax(manifest.statistics, archive.num_classes, name), moments_drawing(manifest.statistics, name))
        drawings += [dataclasses.replace(drawing, name=f"{drawing.name} {name}") for drawing in more]
    return {"archive": archive, "facts": "; ".join(facts) + ".", "drawings": tuple(drawings)}


def _contact_sheet(runs: Sequence[RunRecord]) -> dict[str, str]:
    for folder in dict.fromkeys(run.folder.parent for run in runs):
        if (folder / SHEET).is_file():
            data = (folder / SHEET).read_bytes()
            if not data.startswith(b"\x89PNG\r\n\x1a\n"):
                return {"no_sheet": f"{folder / SHEET} is not a PNG image"}
            return {"sheet": f"data:image/png;base64,{base64.b64encode(data).decode()}"}
    return {"no_sheet": f"there is no {runs[0].folder.parent / SHEET}"}
