"""The report's page: one file that shows everything without a network, and the figures and numbers beside it."""

import base64
import csv
import hashlib
import html
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import kdcache
from kdcache.archive import Archive, TauStatistics, is_url, open_archive, translated_os_errors
from kdcache.errors import KdcacheError, UsageError
from kdcache.progress import Progress, Silent
from kdcache.report.figures import Drawing, control_dots, entropy_histograms, render, tau_curves, training_curves
from kdcache.report.records import ArchiveArgs, RunRecord, collect
from kdcache.report.table import ROW_FIELDS, UNPAIRED, Row, Table, answers, contrasts, rows_of, signed, summarise

__all__ = ["Report", "write_report"]

HERE = Path(__file__).parent
HISTOGRAM_ROWS = 100_000
SHEET = "views.png"


@dataclass(frozen=True)
class Report:
    """What `write_report` wrote, and the table it shows."""

    html: Path
    csv: Path
    figures: tuple[Path, ...]
    table: Table


@dataclass(frozen=True)
class _ArchivePart:
    """What the page shows of one archive. `drawing` and `sheet` may be missing; then the texts say why, if it has to be said."""

    name: str
    digest: str
    facts: str = ""
    entropies: tuple[TauStatistics, ...] = ()
    drawing: Drawing | None = None
    no_drawing: str = ""
    sheet: str = ""  # a data URI
    no_sheet: str = ""


def write_report(paths: Sequence[Path], out: Path, *, progress: Progress | None = None) -> Report:
    """Write `index.html`, `results.csv` and `figures/` into `out`, from all runs at or below `paths`.

    Raises NotFoundError where there are no runs and IntegrityError for damaged ones. A missing archive or contact sheet
    is said in the report.
    """
    progress, out = progress or Silent(), Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", why="a report is a folder", fix="name another place for the report")
    records = collect(paths, progress=progress)
    table = summarise(records)
    archives = _archive_parts(records)
    drawings = _drawings(table, archives)
    every = [drawing for kind in drawings.values() for drawing in kind]
    names = _file_names(every)
    shown: dict[Drawing, Markup] = {}
    with translated_os_errors(out):
        (out / "figures").mkdir(parents=True, exist_ok=True)
        for number, (drawing, name) in enumerate(zip(every, names, strict=True), 1):
            svg, png = render(drawing, name)
            (out / f"figures/{name}.svg").write_bytes(svg)
            (out / f"figures/{name}.png").write_bytes(png)
            shown[drawing] = _inline(svg.decode(), drawing.alt, f"f{number}-")
            progress.update("drawing figures", number, len(every))
        (out / "results.csv").write_text(_csv(records), "utf-8", newline="")
        (out / "index.html").write_text(_page(records, table, archives, drawings, shown), "utf-8", newline="")
    figures = tuple(out / f"figures/{name}.{kind}" for name in names for kind in ("svg", "png"))
    return Report(out / "index.html", out / "results.csv", figures, table)


def _drawings(table: Table, archives: Sequence[_ArchivePart]) -> dict[str, list[Drawing]]:
    """All figures by section, in the order of the page."""
    studies: dict[str, list[Row]] = {}
    for row in table.rows:
        studies.setdefault(f"{row.dataset}, teacher {row.teacher}", []).append(row)
    entropy = {part.digest: stats.entropy_mean for part in archives for stats in part.entropies if stats.tau == 1}
    return {
        "taus": [drawing for place, rows in studies.items() for drawing in tau_curves(table, rows, place)],
        "controls": [drawing for place, rows in studies.items() for drawing in control_dots(table, rows, place)],
        "teacher": [part.drawing for part in archives if part.drawing],
        "training": [drawing for place, rows in studies.items() for drawing in training_curves(table, rows, place, entropy)],
    }


def _by_archive(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    found: dict[str, list[RunRecord]] = {}
    for record in records:
        found.setdefault(record.args.archive_digest, []).append(record)
    return found


def _archive_parts(records: Sequence[RunRecord]) -> list[_ArchivePart]:
    """Every archive that students were trained from; averages of several are followed by these."""
    parts: dict[str, _ArchivePart] = {}
    members: dict[str, _ArchivePart] = {}
    for digest, runs in _by_archive(records).items():
        args = runs[0].args
        if args.archives:
            names = " and ".join(member.archive_name for member in args.archives)
            sheet: dict[str, Any] = _contact_sheet(runs)
            reason = f"it is the average of the {args.average} of {names}, which was never stored"
            parts[digest] = _ArchivePart(args.archive_name, digest, no_drawing=reason, **sheet)
            members |= {member.archive_digest: _archive_part(runs[0], member, {}) for member in args.archives}
        else:
            parts[digest] = _archive_part(runs[0], args, _contact_sheet(runs))
    return list((parts | {digest: part for digest, part in members.items() if digest not in parts}).values())


def _archive_part(run: RunRecord, args: ArchiveArgs, sheet: dict[str, str]) -> _ArchivePart:
    part: dict[str, Any] = {"name": args.archive_name, "digest": args.archive_digest, **sheet}
    archive, reason = _find_archive(run, args)
    try:
        return _ArchivePart(**part, **(_teacher(archive, args.archive_name) if archive else {"no_drawing": reason}))
    except (KdcacheError, OSError) as error:
        return _ArchivePart(**part, no_drawing=getattr(error, "what", str(error)))


def _find_archive(run: RunRecord, args: ArchiveArgs) -> tuple[Archive | None, str]:
    """An archive of a run, or why it cannot be shown. It may have moved together with the workspace of the run."""
    home = run.folder.resolve().parent.parent.parent
    reason = ""
    copy = home / "archives" / args.archive_name
    places: list[Path | str] = [copy, args.archive] if is_url(args.archive) else [Path(args.archive), home / args.archive, copy]
    for path in dict.fromkeys(places):
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
    """Facts, entropies per tau and the histograms of an archive, from a few evenly spaced views of it."""
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
            facts.append(f"its top-1 on clean test images {manifest.teacher.top1_clean:.2f} %")
    if manifest.statistics.top1_views is not None:
        facts.append(f"its top-1 on these views {manifest.statistics.top1_views:.2f} %")
    facts.append(f"histograms over {len(values['entropy']):,} views")
    return {
        "facts": "; ".join(facts) + ".",
        "entropies": manifest.statistics.per_tau,
        "drawing": entropy_histograms(name, values, means),
    }


def _contact_sheet(runs: Sequence[RunRecord]) -> dict[str, str]:
    for folder in dict.fromkeys(run.folder.parent for run in runs):
        if (folder / SHEET).is_file():
            data = (folder / SHEET).read_bytes()
            if not data.startswith(b"\x89PNG\r\n\x1a\n"):
                return {"no_sheet": f"{folder / SHEET} is not a PNG image"}
            return {"sheet": f"data:image/png;base64,{base64.b64encode(data).decode()}"}
    return {"no_sheet": f"there is no {runs[0].folder.parent / SHEET}"}


def _file_names(drawings: Sequence[Drawing]) -> list[str]:
    names: list[str] = []
    for drawing in drawings:
        name = stem = re.sub(r"[^A-Za-z0-9.-]+", "_", drawing.name)[:80].strip("._")
        while name in names:
            name = f"{stem}-{sum(n.startswith(stem) for n in names) + 1}"
        names.append(name)
    return names


def _inline(svg: str, alt: str, prefix: str) -> Markup:
    """An SVG file as an element of the page: no prolog, a spoken text, and ids that are its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)  # it would style the whole page
    svg = re.sub(r"<[^<>]+>", lambda tag: re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}", tag[0]), svg)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1))


def _page(
    records: Sequence[RunRecord],
    table: Table,
    archives: Sequence[_ArchivePart],
    drawings: dict[str, list[Drawing]],
    shown: dict[Drawing, Markup],
) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = (HERE / "page.js").read_text("utf-8")
    fields = [f for f in ROW_FIELDS if f == "control" or len({getattr(row, f) for row in table.rows}) > 1]
    rows = rows_of(records)
    records = sorted(records, key=lambda run: (rows[run].order, run.args.tau, run.args.seed, run.folder))
    folders = {run: run.folder.absolute() for run in records}
    base = Path(os.path.commonpath([folder.parent for folder in folders.values()]))  # folders are shown below it
    return environment.get_template("template.html.j2").render(
        version=kdcache.__version__,
        style=Markup((HERE / "page.css").read_text("utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        answers=answers(table),
        contrasts=contrasts(table),
        signed=signed,
        unpaired=UNPAIRED,
        archives=archives,
        drawings=drawings,
        shown=shown,
        base=base,
        fields=fields,
        distinct=lambda values: list(dict.fromkeys(values)),
        table=table,
        repeated=[(run, folders[run].relative_to(base)) for run in table.repeated],
        lines=[_line(table, row, fields) for row in table.rows],
        runs=[(run, folders[run].relative_to(base), [getattr(rows[run], field) for field in fields]) for run in records],
        commands=list(dict.fromkeys(run.args.command for run in records if run.args.command)),
        versions=sorted({run.args.kdcache_version for run in records} - {""}),
    )


def _line(table: Table, row: Row, fields: Sequence[str]) -> dict[str, Any]:
    ranked = table.ranked(row)
    return {
        "names": [getattr(row, field) for field in fields],
        "cells": [table.get(row, tau) for tau in table.taus],
        "best": ranked[0][1] if ranked else None,
    }


def _csv(records: Sequence[RunRecord]) -> str:
    """One line per run: what it was, how it ended, and its last epoch's numbers."""
    last = sorted({name for run in records for name in run.curves} - {"epoch", "seconds"})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    args = [name for name in type(records[0].args).model_fields if name not in {"method", "control", "archives"}]
    results = ("epochs", "final_top1", "best_top1", "best_epoch", "final_loss", "seconds", "reason")
    writer.writerow(["run_folder", "status", *args, "epochs_done", *results[1:], *(f"last_{name}" for name in last)])
    for run in records:
        line: list[Any] = [run.folder, run.status, *(getattr(run.args, name) for name in args), run.epochs_done]
        line += [getattr(run.summary, name) if run.summary else None for name in results[1:]]
        ends = [run.curves[name][-1] if run.epochs_done and name in run.curves else np.nan for name in last]
        writer.writerow([*line, *(None if np.isnan(value) else f"{value:.10g}" for value in ends)])
    return text.getvalue()
