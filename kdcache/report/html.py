"""The report's page: one file that works offline, with figures and tables as files beside it."""

import base64
import csv
import hashlib
import html
import io
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import kdcache
from kdcache.errors import UsageError
from kdcache.report.answers import answers, contrasts, method_contrasts, overview
from kdcache.report.archives import ArchivePart, archive_parts
from kdcache.report.costs import ArchiveCosts, costs
from kdcache.report.duration_figures import duration_drawings, of_several_durations
from kdcache.report.experiment import Experiment, published_for
from kdcache.report.figures import Drawing, control_dots, render_figure, tau_curves
from kdcache.report.heatmap import REST, WHOLE, Heatmap, TeacherFigures, heatmaps, results, teacher_figures
from kdcache.report.latex import costs_table, heatmap_table, savings_table, teachers_table, top_five_table
from kdcache.report.losses import scaling
from kdcache.report.method_figures import entropy_drawings, method_drawings
from kdcache.report.moment_figures import moment_drawings
from kdcache.report.output_figures import output_drawings
from kdcache.report.records import RunRecord, collect
from kdcache.report.table import UNPAIRED, Row, Table, signed, summarise
from kdcache.report.top_five import TopFive, top_five
from kdcache.report.training_figures import training_drawings
from kdcache.system.energy import NOTHING
from kdcache.system.files import translated_os_errors, write_changed, written_alone
from kdcache.system.progress import Progress, Silent

__all__ = ["Report", "csv_cell", "file_names", "inline", "write_report"]

HERE = Path(__file__).parent
MOST_SPOKEN = 4  # answers in sentences; more of them become a table


@dataclass(frozen=True)
class Report:
    """The files that `write_report` wrote, and its table of results."""

    html: Path
    csv: Path
    figures: tuple[Path, ...]
    tables: tuple[Path, ...]
    table: Table


@dataclass(frozen=True)
class _PageTables:
    """The tables of the page, without the table of runs."""

    results: Heatmap
    heatmaps: list[Heatmap]
    teachers: list[TeacherFigures]
    costs: list[ArchiveCosts]
    top_five: list[TopFive]


def write_report(
    paths: Sequence[Path], out: Path, *, experiment: Experiment | None = None, progress: Progress | None = None
) -> Report:
    """Write `index.html`, `results.csv`, `figures/` and `tables/` into `out`, from all runs at or below `paths`.

    Raises NotFoundError if there are no runs, and IntegrityError for damaged ones. The report mentions a missing archive
    or contact sheet.
    """
    progress, out = progress or Silent(), Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", why="a report is a folder", fix="name another place for the report")
    records = collect(paths, progress=progress)
    archives = archive_parts(records)
    teachers = _teachers(records, archives)
    table = summarise(records, {digest: teacher.training for digest, teacher in teachers.items()})
    tables = _tables(records, table, teachers, archives)
    drawings = _drawings(table, archives)
    every = [drawing for kind in drawings.values() for drawing in kind]
    names = file_names([drawing.name for drawing in every])
    shown: dict[Drawing, Markup] = {}
    with translated_os_errors(out), written_alone(out):
        for folder in ("figures", "tables"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        for number, (drawing, name) in enumerate(zip(every, names, strict=True), 1):
            svg, png = render_figure(drawing, name)
            write_changed(out / f"figures/{name}.svg", svg)
            write_changed(out / f"figures/{name}.png", png)
            shown[drawing] = inline(svg.decode(), drawing.alt, f"f{number}-")
            progress.update("drawing figures", number, len(every))
        write_changed(out / "results.csv", _csv(records).encode())
        written = _write_tables(tables, out / "tables")
        page = _page(experiment, records, table, tables, archives, drawings, shown)
        write_changed(out / "index.html", page.encode())
    figures = tuple(out / f"figures/{name}.{kind}" for name in names for kind in ("svg", "png"))
    return Report(out / "index.html", out / "results.csv", figures, written, table)


def _teachers(records: Sequence[RunRecord], archives: Sequence[ArchivePart]) -> dict[str, TeacherFigures]:
    """Teacher figures by archive digest."""
    aliases = {run.args.archive_digest: run.args.teacher for run in records}  # averages' members: see their cards
    return {part.digest: teacher_figures(part.name, part.digest, aliases.get(part.digest, ""), part.archive) for part in archives}


def _tables(
    records: Sequence[RunRecord], table: Table, teachers: dict[str, TeacherFigures], archives: Sequence[ArchivePart]
) -> _PageTables:
    return _PageTables(
        results(table),
        heatmaps(table, teachers),
        list(teachers.values()),
        costs(records, {part.digest: part.archive for part in archives}),
        top_five(table, teachers),
    )


def _write_tables(tables: _PageTables, folder: Path) -> tuple[Path, ...]:
    """Write each table as LaTeX; returns the files."""
    shown = [tables.results, *tables.heatmaps]
    texts = dict(
        zip(
            file_names([heatmap.name for heatmap in shown]),
            (heatmap_table(heatmap, kdcache.__version__) for heatmap in shown),
            strict=True,
        )
    )
    texts["teachers-and-archives"] = teachers_table(tables.teachers, kdcache.__version__)
    if tables.top_five:
        texts["top-5"] = top_five_table(tables.top_five, kdcache.__version__)
    texts["costs"] = costs_table(tables.costs, kdcache.__version__)
    texts["savings"] = savings_table(tables.costs, kdcache.__version__)
    for name, text in texts.items():
        write_changed(folder / f"{name}.tex", text.encode())
    return tuple(folder / f"{name}.tex" for name in texts)


def _drawings(table: Table, archives: Sequence[ArchivePart]) -> dict[str, list[Drawing]]:
    """All figures by section, in page order."""
    studies: dict[str, list[Row]] = {}
    for row in table.rows:
        studies.setdefault(f"{row.dataset}, teacher {row.teacher}", []).append(row)
    teachers = {part.digest: part.archive.manifest.statistics for part in archives if part.archive}
    cards = {part.digest: part.archive.manifest.teacher for part in archives if part.archive}
    weights = {digest: card.weights_sha256 for digest, card in cards.items() if card}
    return {
        "taus": [drawing for place, rows in studies.items() for drawing in _over_tau(table, rows, place)],
        "controls": [drawing for place, rows in studies.items() for drawing in control_dots(table, rows, place)],
        "teacher": [drawing for part in archives for drawing in part.drawings],
        "training": [drawing for place, rows in studies.items() for drawing in training_drawings(table, rows, place, teachers)],
        **output_drawings(table, studies, weights),
        "methods": method_drawings(table),
        "moments": [drawing for place, rows in studies.items() for drawing in moment_drawings(table, rows, place, teachers)],
        "entropies": entropy_drawings(table),
    }


def _over_tau(table: Table, rows: Sequence[Row], place: str) -> list[Drawing]:
    durations = set(of_several_durations(table, rows))
    others = [row for row in rows if row not in durations]
    return [*duration_drawings(table, rows, place), *tau_curves(table, others, place)]


def file_names(titles: Sequence[str]) -> list[str]:
    names: list[str] = []
    for title in titles:
        name = stem = re.sub(r"[^A-Za-z0-9.-]+", "_", title)[:80].strip("._")
        while name in names:
            name = f"{stem}-{sum(n.startswith(stem) for n in names) + 1}"
        names.append(name)
    return names


def inline(svg: str, alt: str, prefix: str) -> Markup:
    """An SVG file as an element of the page: without prolog, with alt text and unique ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)  # the style would apply to the whole page
    svg = re.sub(r"<[^<>]+>", lambda tag: re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}", tag[0]), svg)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1))


def _page(
    experiment: Experiment | None,
    records: Sequence[RunRecord],
    table: Table,
    tables: _PageTables,
    archives: Sequence[ArchivePart],
    drawings: dict[str, list[Drawing]],
    shown: dict[Drawing, Markup],
) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = (HERE / "page.js").read_text("utf-8")
    fields = tables.results.fields
    rows = table.row_of
    records = sorted(records, key=lambda run: (rows[run].order, run.args.tau, run.args.seed, run.folder))
    folders = {run: run.folder.absolute() for run in records}
    tau_answers = answers(table)
    base = Path(os.path.commonpath([folder.parent for folder in folders.values()]))  # the page shows folders relative to it
    return environment.get_template("template.html.j2").render(
        version=kdcache.__version__,
        style=Markup((HERE / "page.css").read_text("utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        experiment=experiment,
        published=published_for(experiment.published if experiment else ()),
        scaling=scaling(records),
        answers=tau_answers,
        overview=overview(tau_answers) if len(tau_answers) > MOST_SPOKEN else None,
        contrasts=contrasts(table),
        method_contrasts=method_contrasts(table),
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
        tables=tables,
        counted=sorted({spent.counted for cost in tables.costs for spent in (cost.teacher, cost.dump, cost.distill)} - {""}),
        entropies=(WHOLE, REST),
        places={run: number for number, run in enumerate(records, 1)},
        runs=[(run, folders[run].relative_to(base), [getattr(rows[run], field) for field in fields]) for run in records],
        commands=list(dict.fromkeys(run.args.command for run in records if run.args.command)),
        versions=sorted({run.args.kdcache_version for run in records} - {""}),
    )


def csv_cell(value: Any) -> Any:
    """A cell of a CSV file, which is read by spreadsheets: text that they would compute is marked as text by an apostrophe."""
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def _csv(records: Sequence[RunRecord]) -> str:
    """CSV with one line per run: its settings, its status, and the numbers of its last epoch."""
    costs = tuple(asdict(NOTHING))
    last = sorted({name for run in records for name in run.curves} - {"epoch", "seconds", *costs})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    args = [name for name in type(records[0].args).model_fields if name not in {"method", "control", "archives"}]
    results = ("epochs", "final_top1", "best_top1", "best_epoch", "final_loss", "seconds", "reason")
    columns = ["run_folder", "status", *args, "epochs_done", *results[1:], *costs, *(f"last_{name}" for name in last)]
    writer.writerow(map(csv_cell, columns))
    for run in records:
        line: list[Any] = [run.folder, run.status, *(getattr(run.args, name) for name in args), run.epochs_done]
        line += [getattr(run.summary, name) if run.summary else None for name in results[1:]]
        line += asdict(run.spent).values()
        ends = [run.curves[name][-1] if run.epochs_done and name in run.curves else np.nan for name in last]
        line += [None if np.isnan(value) else f"{value:.10g}" for value in ends]
        writer.writerow(map(csv_cell, line))
    return text.getvalue()
