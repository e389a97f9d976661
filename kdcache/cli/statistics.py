"""How `kdcache stats` says what it found."""

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.archive import Archive, CodecFidelity, Statistics
from kdcache.cli.output import print_table
from kdcache.errors import UsageError, printable
from kdcache.report.advice import Advice, first_temperatures
from kdcache.system.files import write_changed

if TYPE_CHECKING:
    from kdcache.report.figures import Drawing  # brings matplotlib

__all__ = ["as_dict", "print_advice", "print_fidelity", "print_statistics", "write_figures"]

BARS = " ▁▂▃▄▅▆▇█"
WIDTH = 110


def print_statistics(archive: Archive, statistics: Statistics, recorded: bool) -> None:
    top1 = "unknown: no labels" if statistics.top1_views is None else f"{statistics.top1_views:.2f} %"
    rows: list[list[Any]] = [
        ["archive", archive.location],
        ["rows", f"{statistics.rows:,}, evenly spaced; " + ("recorded when it was finished" if recorded else "read now")],
        ["teacher's top-1 on all views", top1],
    ]
    if details := statistics.details:
        moments = details.moments
        for name, mean, (low, high) in (
            ("mean of a row's logits", moments.mean, moments.mean_range),
            ("standard deviation of a row's logits", moments.std, moments.std_range),
        ):
            rows.append([name, f"{mean:.3f} on average, {low:.3f} to {high:.3f}"])
    print_table(["", ""], rows)
    print_table(
        ["tau", "H^(p)", "5 %", "50 %", "95 %", "H^(p-bar)", "5 %", "50 %", "95 %"],
        [
            [f"{f.tau:g}", *_spread(f.entropy_mean, f.entropy_quantiles), *_spread(f.entropy_rest_mean, f.entropy_rest_quantiles)]
            for f in statistics.per_tau
        ],
        title="relative entropies: means and quantiles",
    )
    if details is None:
        return
    detailed = list(zip(statistics.per_tau, details.per_tau, strict=True))
    print_table(
        ["tau", "H^(p) from 0 to 1", "H^(p-bar) from 0 to 1"],
        [[f"{f.tau:g}", _bars(d.entropy_histogram), _bars(d.entropy_rest_histogram)] for f, d in detailed],
        title="rows by relative entropy",
    )
    sums = [detail.power_sum_mean for _, detail in detailed]
    print_table(
        ["tau", "U-bar"],
        [[f"{f.tau:g}", None if u is None else f"{u:.4f}"] for (f, _), u in zip(detailed, sums, strict=True)],
        title="mean power sum U, the mean weight of wttm: ttm's kd_weight / U-bar is wttm's"
        + ("" if None not in sums else ": not recorded in this archive; --rows N reads it from the logits"),
    )
    shown = [n for n, rank in enumerate(details.ranks) if rank in (1, 2, 3, 5, 10, 20, archive.num_classes)]
    print_table(
        ["tau", *(f"rank {details.ranks[n]}" for n in shown), "H^ of it", "alpha", "alpha of mean H^(p)"],
        [
            [
                f"{f.tau:g}",
                *(f"{d.sorted_mean[n]:.3g}" for n in shown),
                f"{f.sorted_mean_entropy:.4f}",
                f"{d.smoothing_sorted_mean:.5f}",
                f"{d.smoothing_mean_entropy:.5f}",
            ]
            for f, d in detailed
        ],
        title="mean sorted softmax, and label smoothing of the same entropy",
    )


def _spread(mean: float, quantiles: Sequence[float]) -> list[str]:
    return [f"{value:.4f}" for value in (mean, quantiles[0], quantiles[2], quantiles[4])]


def _bars(counts: Sequence[int]) -> str:
    """Counts as a line of bars; whatever is not empty can be seen."""
    most = max(counts)
    return "".join(BARS[-(-count * (len(BARS) - 1) // most)] for count in counts) + "|"


def print_advice(archive: Archive, pieces: Sequence[Advice]) -> None:
    listed = ",".join(f"{tau:g}" for tau in first_temperatures(pieces))
    print(f"Temperatures to try first: {listed}")
    where = shlex.quote(archive.location) if archive.manifest.contents == "all" else "THE_WHOLE_ARCHIVE"
    print(f"  kdcache distill --archive {where} --tau {listed}\n")
    for number, piece in enumerate(pieces, 1):
        applies = {"yes": "applies", "in part": "applies in part", "no": "does not apply"}[piece.applies]
        tried = f"; tau {', '.join(f'{tau:g}' for tau in piece.taus)}" if piece.taus else ""
        print(f"{number}. {piece.finding.title} ({applies}{tried})")
        for label, text in (
            ("found", f"{piece.finding.text} [{piece.finding.source}]"),
            ("here", piece.numbers),
            ("but" if piece.applies != "no" else "why not", piece.limits),
        ):
            print(textwrap.fill(printable(text), WIDTH, initial_indent=f"   {label + ':':8} ", subsequent_indent=" " * 12))
        print()


def print_fidelity(archive: Archive, found: Sequence[CodecFidelity]) -> None:
    name = archive.manifest.codec["name"]
    print(
        f"The truth are {found[0].rows:,} rows of {archive.location} as its codec {name} gives them back. What {name} itself "
        f"lost when they were written cannot be measured any more: no logit moved by more than {_bound(found, name):.3g}.\n"
    )
    compressions = list(dict.fromkeys(kind for codec in found for kind in codec.compressed))
    print_table(
        ["codec", "bytes a logit", *compressions, "|dz| max", "bound", "argmax moved", "rank corr. mean", "min"],
        [
            [
                codec.codec,
                f"{codec.bytes_per_logit:.3f}",
                *(f"{codec.compressed[kind]:.3f}" if kind in codec.compressed else None for kind in compressions),
                f"{codec.logit_max:.3g}",
                f"{codec.logit_bound:.3g}",
                codec.argmax_changes,
                None if codec.rank_mean is None else f"{codec.rank_mean:.6f}",
                None if codec.rank_min is None else f"{codec.rank_min:.6f}",
            ]
            for codec in found
            if not codec.refused
        ],
        title="codecs; rank correlation (Spearman) of the classes below the top one, the same at every tau",
    )
    print_table(
        ["codec", "tau", "KL mean", "KL max", "KL bound", "of bound", "|dp| max", "dH^(p) mean", "max", "dH^(p-bar) mean", "max"],
        [
            [
                codec.codec,
                f"{t.tau:g}",
                *(f"{value:.2g}" for value in (t.kl_mean, t.kl_max, t.kl_bound)),
                f"{100 * t.bound_share:.0f} %",
                *(
                    f"{v:.2g}"
                    for v in (t.probability_max, t.entropy_mean, t.entropy_max, t.entropy_rest_mean, t.entropy_rest_max)
                ),
            ]
            for codec in found
            for t in codec.per_tau
        ],
        title="divergence from the rows as they are, in nats, and changes of relative entropies",
    )
    for codec in found:
        if codec.refused:
            print(f"{codec.codec} cannot hold these rows: {printable(codec.refused)}")


def _bound(found: Sequence[CodecFidelity], name: str) -> float:
    return next(codec.logit_bound for codec in found if codec.codec == name)


def as_dict(piece: Advice) -> dict[str, Any]:
    fields = asdict(piece)
    return {**fields.pop("finding"), **fields}


def write_figures(drawings: "Sequence[Drawing]", place: str, target: Path) -> list[Path]:
    """All figures into a folder, as SVG and PNG; or on one page, where `target` is called .svg or .png."""
    from kdcache.report.archive_figures import one_page
    from kdcache.report.figures import render_figure

    if target.suffix.lower() in (".svg", ".png"):
        if target.is_dir() or not target.parent.is_dir():
            raise UsageError(
                f"--plot {target} cannot be written",
                why="it is a folder" if target.is_dir() else f"there is no folder {target.parent}",
                fix="name a file in a folder that exists, or a folder",
            )
        svg, png = render_figure(one_page(drawings, place), target.stem)
        write_changed(target, svg if target.suffix.lower() == ".svg" else png)
        return [target]
    if (target.exists() or target.suffix) and not target.is_dir():
        raise UsageError(
            f"--plot {target} is neither a figure's name nor a folder",
            why="it is a file" if target.exists() else "figures are .svg or .png",
            fix=f"--plot {shlex.quote(str(target.with_suffix('.svg')))}",
        )
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for drawing in drawings:
        for suffix, data in zip((".svg", ".png"), render_figure(drawing, drawing.name), strict=True):
            written.append(target / f"{drawing.name.replace(' ', '-')}{suffix}")
            write_changed(written[-1], data)
    return written
