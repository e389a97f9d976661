"""The dataset card of an archive, for people and for the Hugging Face Hub, with a figure.

Names of datasets, teachers and licences may come from strangers. In Markdown they are escaped and shortened; in the card's
YAML they are reduced to a safe alphabet, or quoted by the YAML writer.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from kdcache.archive.format.devices import shards_by_device
from kdcache.archive.format.manifest import (
    CARD_NAME,
    CROISSANT_NAME,
    FIGURE_NAME,
    FileRecord,
    Manifest,
    ShardRecord,
    TauStatistics,
)
from kdcache.archive.writing.croissant import croissant
from kdcache.errors import printable

__all__ = ["card_files", "code_span", "licence_fields", "markdown_escaped"]

LONGEST = 120  # characters of a name
# The values that the Hub knows for `license`. Any other licence is `other` with a name.
# fmt: off
HUB_LICENCES = frozenset({
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bigcode-openrail-m", "bigscience-bloom-rail-1.0",
    "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0",
    "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m", "deepfloyd-if-license", "ecl-2.0",
    "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1",
    "lgpl-3.0", "lgpl-lr", "llama2", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "openrail",
    "openrail++", "osl-3.0", "pddl", "postgresql", "unlicense", "wtfpl", "zlib",
})
# fmt: on


def card_files(
    manifest: Manifest, described: Sequence[FileRecord], shards: Iterable[ShardRecord], reading_lines: str
) -> dict[str, bytes]:
    """Name and bytes of the files for people. Equal archives give equal files, without dates and authors.

    `described`: all other files that belong to no shard. `reading_lines`: the layout's Python lines that read the rows.
    """
    return {
        CARD_NAME: _readme(manifest, reading_lines).encode(),
        FIGURE_NAME: _figure(manifest.statistics.per_tau).encode(),
        CROISSANT_NAME: croissant(manifest, _title(manifest), described, shards).encode(),
    }


def _title(manifest: Manifest) -> str:
    teacher, source = manifest.teacher, manifest.source
    contents = "Teacher logits" if manifest.contents == "all" else "Statistics of teacher logits"
    return f"{contents}: {_short(source.name if source else 'images')} seen by {_short(teacher.name if teacher else 'a teacher')}"


def _short(text: str) -> str:
    """A stranger's text on one line, shortened."""
    shown = printable(text)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}..."


def markdown_escaped(text: str) -> str:
    """A stranger's text as plain words in Markdown and HTML, on one line, shortened."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|&~-])", r"\\\1", _short(text))


def code_span(text: str) -> str:
    """A stranger's text as a Markdown code span that is safe inside a table."""
    return "`" + _short(text).replace("`", "'").replace("|", "\\|") + "`"


def _word(text: str) -> str:
    """A stranger's text as a tag or licence name: lower-case letters, digits, dots, pluses and dashes."""
    return re.sub(r"[^a-z0-9.+]+", "-", _short(text).lower()).strip("-.") or "unnamed"


def _readme(manifest: Manifest, reading_lines: str) -> str:
    teacher, source, policy, statistics = manifest.teacher, manifest.source, manifest.policy, manifest.statistics
    licences = manifest.known_licences
    title = _title(manifest)
    kept = "Raw logits" if manifest.contents == "all" else "Argmax and entropies of the logits (not the logits themselves)"
    rows = {"digest": f"`{manifest.digest}`"}
    if source:
        rows["data"] = f"{markdown_escaped(source.name)}, {source.split} split"
    rows["licence of the data"] = markdown_escaped(licences.data or "unknown")
    if teacher:
        rows["teacher"] = (
            f"{code_span(teacher.name)}, weights sha256 {code_span(teacher.weights_sha256[:16] + '...')}, {teacher.precision}"
        )
    rows["licence of the teacher's weights"] = markdown_escaped(licences.weights or "unknown")
    if teacher and teacher.top1_clean is not None:
        rows["teacher's top-1, clean test images"] = f"{teacher.top1_clean:.2f} % ({teacher.test_title})"
    if teacher and teacher.accepted:
        rows["accepted of the teacher"] = markdown_escaped("; ".join(teacher.accepted.values()))
    if statistics.top1_views is not None:
        rows["teacher's top-1, these views (dominant label)"] = f"{statistics.top1_views:.2f} %"
    if kinds := shards_by_device(manifest):
        rows["computed on"] = ", ".join(f"{markdown_escaped(kind)} ({count:,} shards)" for kind, count in kinds.items())
    if policy:
        rows["view policy"] = (
            f"version {policy.version}, digest `{policy.digest[:16]}...`, {policy.size} px, in full in `kdcache.json`"
        )
    rows["codec, layout"] = f"{code_span(str(manifest.codec['name']))}, {code_span(str(manifest.layout['name']))}"

    in_zarr = manifest.layout["name"] == "zarr"
    lines = [
        "---",
        yaml.safe_dump(_metadata(manifest, title), sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {markdown_escaped(title)}",
        "",
        f"{kept} of {manifest.num_samples:,} samples in {manifest.num_views:,} views each, {manifest.num_classes:,} classes, "
        f"made with [kdcache](https://pypi.org/project/kdcache) (archive format {manifest.format_version}).",
        "",
    ]
    if parent := manifest.subset_of:
        last = manifest.first_view + manifest.num_views - 1
        lines += [
            f"This is a subset: views {manifest.first_view} to {last} of the archive with digest `{parent.digest}`, which has "
            f"views {parent.first_view} to {parent.first_view + parent.num_views - 1}.",
            "",
        ]
    lines += [
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "## Entropies",
        "",
        f"![Mean relative entropies over the temperature]({FIGURE_NAME})",
        "",
        "Means over the views; H^(p) = H / log C, H^(p-bar) the same without the top class, over log(C - 1). The bands hold "
        f"the middle half of {statistics.rows:,} rows, evenly spaced over the archive.",
        "",
        "| tau | H^(p) | H^(p-bar) |",
        "|---|---|---|",
        *(f"| {s.tau:g} | {s.entropy_mean:.4f} | {s.entropy_rest_mean:.4f} |" for s in statistics.per_tau),
        "",
        "## Getting and checking it",
        "",
        "```sh",
        "kdcache pull SOURCE FOLDER   # hf://datasets/ORG/NAME, https://..., s3://... or a folder; an interrupted pull goes on",
        "kdcache verify FOLDER        # every file and every row against the digests that were recorded",
        "```",
        "",
    ]
    lines += [
        "## Reading it without kdcache",
        "",
        "```python",
        reading_lines,
        "```",
        "",
        "Row `[v, j]` is the view at position `j` of view `v`; `sample[v, j]` is the number of the sample that sits there, "
        "`label` and `key` are per sample."
        + (f" Index 0 of the Zarr arrays is view {manifest.first_view}." if manifest.first_view and in_zarr else ""),
        "",
    ]
    return "\n".join(lines)


def _metadata(manifest: Manifest, title: str) -> dict[str, Any]:
    """The card's YAML front matter, in the Hub's vocabulary."""
    tags = ["kdcache", "knowledge-distillation", "logits", "teacher"]
    tags += [_word(card.name) for card in (manifest.source, manifest.teacher) if card]
    return {
        "pretty_name": title,
        **licence_fields([manifest.known_licences.data, manifest.known_licences.weights]),
        "task_categories": ["image-classification"],
        "size_categories": [_size_category(manifest.num_views * manifest.num_samples)],
        "tags": list(dict.fromkeys(tags)),
        "viewer": False,  # the Hub's viewer cannot show arrays
    }


def licence_fields(licences: Sequence[str | None]) -> dict[str, Any]:
    """The card's `license` fields for a work derived from works under all these licences."""
    if None in licences:
        return {"license": "unknown"}
    words = list(dict.fromkeys(_word(licence) for licence in licences if licence))
    if set(words) <= HUB_LICENCES:
        return {"license": words[0] if len(words) == 1 else words}
    return {"license": "other", "license_name": "-and-".join(words)}


def _size_category(rows: int) -> str:
    """The Hub's category for a number of rows."""
    steps = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    above = [step for number, step in enumerate(steps) if rows >= 10 ** (number + 3)]
    if not above:
        return "n<1K"
    return "n>1T" if above[-1] == steps[-1] else f"{above[-1]}<n<{steps[len(above)]}"


WIDTH, HEIGHT = 560, 300  # pixels of the figure; the plot's edges follow
LEFT, RIGHT, TOP, BOTTOM = 56, 536, 40, 252
SERIES = (("H^(p)", "#0072B2", "entropy"), ("H^(p-bar)", "#D55E00", "entropy_rest"))  # Okabe and Ito's palette


def _figure(per_tau: Sequence[TauStatistics]) -> str:
    """SVG of the mean relative entropies over the temperature, with the middle half of the rows as bands.

    It is drawn without matplotlib, since equal archives must have equal figures whatever is installed.
    """
    span = math.log(per_tau[-1].tau / per_tau[0].tau) or 1.0

    def x(tau: float) -> float:
        return LEFT + (RIGHT - LEFT) * math.log(tau / per_tau[0].tau) / span

    def y(entropy: float) -> float:
        return BOTTOM + (TOP - BOTTOM) * entropy

    def points(pairs: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{x(tau):.1f},{y(entropy):.1f}" for tau, entropy in pairs)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        'font-family="sans-serif" font-size="12">',
        "<title>Mean relative entropies of the teacher over the temperature</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{RIGHT}" stroke="#e3e3e3"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for figures in per_tau:
        parts.append(f'<text x="{x(figures.tau):.1f}" y="{BOTTOM + 20}" text-anchor="middle">{figures.tau:g}</text>')
    parts.append(f'<text x="{(LEFT + RIGHT) / 2:.1f}" y="{BOTTOM + 40}" text-anchor="middle">temperature tau</text>')
    for number, (name, colour, field) in enumerate(SERIES):
        quantiles = [(figures.tau, getattr(figures, f"{field}_quantiles")) for figures in per_tau]
        band = [(tau, q[1]) for tau, q in quantiles] + [(tau, q[3]) for tau, q in reversed(quantiles)]
        mean = points((figures.tau, getattr(figures, f"{field}_mean")) for figures in per_tau)
        parts.append(f'<polygon points="{points(band)}" fill="{colour}" fill-opacity="0.15"/>')
        parts.append(f'<polyline points="{mean}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{LEFT + 110 * number}" y="{TOP - 18}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])
