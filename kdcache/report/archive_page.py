"""A page on archives without students: what the temperature leaves of what their teachers say (temperature study, Fig. 4)."""

import base64
import csv
import hashlib
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import kdcache
from kdcache.archive import MAX_ROWS, PAPER_TAUS, Archive, Statistics, measure_logits, open_archive
from kdcache.errors import IncompatibleError, UsageError
from kdcache.report.archive_figures import archive_drawings
from kdcache.report.experiment import Experiment
from kdcache.report.figures import Drawing, render_figure
from kdcache.report.heatmap import REST, WHOLE, TeacherFigures, teacher_figures
from kdcache.report.html import csv_cell, file_names, inline
from kdcache.report.latex import teachers_table
from kdcache.system.files import translated_os_errors, write_changed, written_alone
from kdcache.system.progress import Progress, Silent

__all__ = ["ArchivePage", "Left", "are_archives", "write_archive_page"]

HERE = Path(__file__).parent


@dataclass(frozen=True)
class ArchivePage:
    """The files that `write_archive_page` wrote."""

    html: Path
    csv: Path
    figures: tuple[Path, ...]


@dataclass(frozen=True)
class Left:
    """What one temperature leaves of one archive's mean sorted softmax: probabilities and relative entropies."""

    tau: float
    top: float
    second: float
    low: int  # the rank with which the figure ends
    bottom: float  # the probability at that rank minus that of the last one
    entropy: float
    entropy_rest: float

    @property
    def ahead(self) -> float:
        """By how much the top class is ahead of the second one."""
        return self.top - self.second


@dataclass(frozen=True)
class _Shown:
    known: TeacherFigures
    facts: str
    drawings: tuple[Drawing, ...]
    left: tuple[Left, ...]


def are_archives(paths: Sequence[Path]) -> bool:
    """Whether a report of `paths` is one of archives. UsageError for archives among folders of runs."""
    archives = [path for path in paths if (path / "kdcache.json").is_file()]
    if archives and len(archives) < len(paths):
        other = next(path for path in paths if path not in archives)
        raise UsageError(
            f"{archives[0]} is an archive, and {other} is none",
            why="a report is one of runs, which names their archives, or one of archives alone",
            fix=f"kdcache report {shlex.quote(str(other))}, or kdcache report {shlex.quote(str(archives[0]))}",
        )
    return bool(archives)


def write_archive_page(
    paths: Sequence[Path], out: Path, *, experiment: Experiment | None = None, progress: Progress | None = None
) -> ArchivePage:
    """Write `index.html`, `archives.csv`, `figures/` and `tables/` into `out`, for the archives in `paths`.

    Raises what `open_archive` does, and IncompatibleError for an archive that holds neither logits nor figures of them.
    """
    progress, out = progress or Silent(), Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", why="a report is a folder", fix="name another place for the report")
    archives = list({archive.digest: archive for archive in map(open_archive, dict.fromkeys(paths))}.values())
    parts = [_shown(archive, progress) for archive in archives]
    drawings = [drawing for part in parts for drawing in part.drawings]
    names = file_names([drawing.name for drawing in drawings])
    shown: dict[Drawing, Markup] = {}
    with translated_os_errors(out), written_alone(out):
        for folder in ("figures", "tables"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        for number, (drawing, name) in enumerate(zip(drawings, names, strict=True), 1):
            svg, png = render_figure(drawing, name)
            write_changed(out / f"figures/{name}.svg", svg)
            write_changed(out / f"figures/{name}.png", png)
            shown[drawing] = inline(svg.decode(), drawing.alt, f"f{number}-")
            progress.update("drawing figures", number, len(drawings))
        table = teachers_table([part.known for part in parts], kdcache.__version__)
        write_changed(out / "tables/teachers-and-archives.tex", table.encode())
        write_changed(out / "archives.csv", _csv(parts).encode())
        write_changed(out / "index.html", _page(experiment, parts, shown).encode())
    figures = tuple(out / f"figures/{name}.{kind}" for name in names for kind in ("svg", "png"))
    return ArchivePage(out / "index.html", out / "archives.csv", figures)


def _shown(archive: Archive, progress: Progress) -> _Shown:
    manifest, name = archive.manifest, archive.name
    statistics = _detailed(archive, progress)
    facts = [f"{archive.num_samples:,} samples in {archive.num_views:,} views each, {archive.num_classes} classes"]
    if card := manifest.teacher:
        facts.append(f"teacher {card.name}, {card.precision}")
    facts.append(f"figures of {statistics.rows:,} evenly spaced views")
    drawings = archive_drawings(statistics, archive.num_classes, name)
    by_name = {drawing.name: drawing for drawing in drawings}
    first = by_name.pop("sorted softmax")
    return _Shown(
        teacher_figures(name, archive.digest, "", archive),
        "; ".join(facts) + ".",
        tuple(replace(drawing, name=f"{drawing.name} {name}") for drawing in (first, *by_name.values())),
        tuple(_left(statistics, number) for number in range(len(statistics.per_tau))),
    )


def _detailed(archive: Archive, progress: Progress) -> Statistics:
    """The recorded figures, or those of logits of an archive that was written before there were details."""
    statistics = archive.manifest.statistics
    if statistics.details is not None:
        return statistics
    if archive.manifest.contents != "all":
        raise IncompatibleError(
            f"{archive.location} has no mean sorted softmax",
            why="it holds no logits, and was made before archives recorded that",
            fix="name the whole archive that it is a part of",
        )
    count = min(MAX_ROWS, archive.num_views * archive.num_samples)
    measured = measure_logits(archive.spread_logits(count), count, PAPER_TAUS, progress)
    return measured.model_copy(update={"top1_views": statistics.top1_views})


def _left(statistics: Statistics, number: int) -> Left:
    details, figures = statistics.details, statistics.per_tau[number]
    assert details is not None
    mean = details.per_tau[number].sorted_mean
    low = max(place for place, rank in enumerate(details.ranks) if rank <= 20)  # as the figure has them
    return Left(
        figures.tau,
        mean[0],
        mean[min(1, len(mean) - 1)],
        details.ranks[low],
        mean[low] - mean[-1],
        figures.entropy_mean,
        figures.entropy_rest_mean,
    )


def _page(experiment: Experiment | None, parts: Sequence[_Shown], shown: dict[Drawing, Markup]) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = (HERE / "page.js").read_text("utf-8")
    return environment.get_template("archives.html.j2").render(
        version=kdcache.__version__,
        style=Markup((HERE / "page.css").read_text("utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        experiment=experiment,
        parts=parts,
        shown=shown,
        entropies=(WHOLE, REST),
    )


def _csv(parts: Sequence[_Shown]) -> str:
    """One line for each archive and temperature."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["archive", "digest", "teacher", "tau", "top", "second", "rank", "rank_minus_last", "entropy", "entropy_rest"]
    )
    for part in parts:
        for left in part.left:
            values = (left.tau, left.top, left.second, left.low, left.bottom, left.entropy, left.entropy_rest)
            names = map(csv_cell, (part.known.name, part.known.digest, part.known.teacher))
            writer.writerow([*names, *(f"{value:.10g}" for value in values)])
    return text.getvalue()
