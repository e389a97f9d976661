"""LaTeX tables for papers, with booktabs. A comment names the run folders and archive of every number."""

import re
from collections.abc import Sequence

from kdcache.report.costs import ArchiveCosts
from kdcache.report.heatmap import CLEAN, REST, WHOLE, Heatmap, Line, Score, TeacherFigures
from kdcache.report.top_five import TopFive
from kdcache.system.energy import Spent

__all__ = ["costs_table", "heatmap_table", "latex_escaped", "savings_table", "teachers_table", "top_five_table"]

HEAD = r"""% {title}
% Written by kdcache {version}; needs \usepackage{{booktabs}}."""
# Each cell carries a shade for its score. It is invisible unless the paper redefines the command.
SHADES = r"""% For colours: \usepackage[table]{xcolor} and, before \input, \newcommand{\kdheat}[1]{\cellcolor{blue!#1}}
\providecommand{\kdheat}[1]{}"""
SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: "\\" + character for character in "&%$#_"},
}
MISSING = "--"


def latex_escaped(text: str) -> str:
    """`text` escaped for LaTeX, on one line."""
    text = re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in text))
    return "".join(SPECIAL.get(character, character) for character in text)


def heatmap_table(heatmap: Heatmap, version: str) -> str:
    """Scores over tau. The best of a line is bold, ties with it are underlined, missing scores are marked."""
    count = len(heatmap.fields)
    head = [
        *map(_field, heatmap.fields),
        *(rf"$\tau = {name}$" if heatmap.over == "tau" else latex_escaped(name) for name in heatmap.columns),
    ]
    counts = {score.cell.n for line in heatmap.lines for score in line.scores if score}
    with_counts = len(counts) > 1
    body = [
        " & ".join(
            [
                *map(latex_escaped, line.names),
                *(MISSING if score is None else _score(score, with_counts) for score in line.scores),
            ]
        )
        for line in heatmap.lines
    ]
    seeds = r"number of seeds in brackets" if with_counts else rf"$n = {counts.pop()}$" if counts else "no run is complete"
    note = (
        rf"\multicolumn{{{len(head)}}}{{l}}{{\scriptsize test top-1 (\%), mean\,$\pm$\,standard deviation over seeds, {seeds}}}"
    )
    comments = [text for line in heatmap.lines for text in _sources(heatmap, line)]
    caption = f"{heatmap.caption} Bold: best of the line; underlined: no significant difference from it, paired over seeds"
    return "\n".join(
        [_head(caption, version), SHADES, *_tabular("l" * count + "r" * len(heatmap.columns), head, body, note), *comments, ""]
    )


def teachers_table(teachers: Sequence[TeacherFigures], version: str) -> str:
    """Archives and their teachers, in the columns of the temperature study's Table 1."""
    known_by = ("archive", "digest", "teacher", "start", "epochs", "top-1 clean (%)", "top-1 views (%)")
    head = (*known_by, WHOLE, REST, WHOLE + CLEAN, REST + CLEAN)
    rows = [
        [
            known.name,
            known.digest[:8],
            known.teacher,
            known.start,
            _number(known.epochs, "d"),
            *(_number(value, ".2f") for value in (known.top1_clean, known.top1_views)),
            *(_number(value, ".3f") for value in _entropies(known)),
        ]
        for known in teachers
    ]
    return _plain("Archives and their teachers; relative entropies at tau 1", head, rows, "llllrrrrrrr", version)


def _entropies(known: TeacherFigures) -> tuple[float | None, ...]:
    return known.entropy, known.entropy_rest, known.entropy_clean, known.entropy_rest_clean


def costs_table(costs: Sequence[ArchiveCosts], version: str) -> str:
    """Costs of each archive, its teacher and its students."""
    head = ("archive", "digest", "teacher h", "teacher Wh", "dump h", "dump Wh", "MB", "students", "epochs", "students h", "Wh")
    rows = [
        [
            *_archive(cost),
            *_time_and_energy(cost.teacher),
            *_time_and_energy(cost.dump),
            _number(cost.bytes and cost.bytes / 1e6, ".1f"),
            _number(cost.students, "d"),
            _number(cost.epochs, "d"),
            *_time_and_energy(cost.distill),
        ]
        for cost in costs
    ]
    counted = sorted({spent.counted for cost in costs for spent in (cost.teacher, cost.dump, cost.distill)} - {""})
    of = f"; energy of whole {', or of '.join(counted)}" if counted else ""
    return _plain(f"Costs, as far as they were recorded: device-hours{of}", head, rows, "ll" + "r" * 9, version)


def savings_table(costs: Sequence[ArchiveCosts], version: str) -> str:
    """Passes and hours that each archive saved."""
    head = ("archive", "digest", "passes stored", "passes online", "saving", "dump h", "online h", "h saved", "break-even")
    rows = [
        [
            *_archive(cost),
            _number(cost.passes, "d"),
            _number(cost.online, "d"),
            _brief(cost.saving),
            *(_brief(hours) for hours in (cost.dump.hours, cost.reckoned.hours, cost.hours_saved)),
            _brief(cost.break_even),
        ]
        for cost in costs
    ]
    title = "Savings: passes are the teacher's; hours online are reckoned from the dump's time for a pass; break-even in students"
    return _plain(title, head, rows, "llrrrrrrr", version)


def top_five_table(lines: Sequence[TopFive], version: str) -> str:
    """Top-1 and top-5 of teachers and of students at their best tau."""
    head = ("", "runs", "tau", "top-1 (%)", "std", "top-5 (%)", "std", "seeds")
    rows = [
        [
            line.kind,
            line.name,
            _number(line.tau, "g"),
            *(_number(value, ".2f") for value in (line.top1, line.top1_std, line.top5, line.top5_std)),
            _number(line.seeds or None, "d"),
        ]
        for line in lines
    ]
    return _plain("Test top-1 and top-5 of the last epoch, students at their best tau", head, rows, "llrrrrrr", version)


def _archive(cost: ArchiveCosts) -> tuple[str, str]:
    return cost.name + (f", second views of {cost.second}" if cost.second else ""), cost.digest[:8]


def _time_and_energy(spent: Spent) -> tuple[str, str]:
    return _brief(spent.hours), _brief(spent.watt_hours)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _brief(value: float | None) -> str:
    """A number with three digits, or with all digits before the point."""
    return "" if value is None else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _plain(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], columns: str, version: str) -> str:
    """A table of texts. Empty texts are marked as missing."""
    body = [" & ".join(latex_escaped(value) or MISSING for value in row) for row in rows]
    return "\n".join([_head(title, version), *_tabular(columns, [_field(name) for name in head], body), ""])


def _head(title: str, version: str) -> str:
    return HEAD.format(title=_comment(title), version=version)


def _tabular(columns: str, head: Sequence[str], body: Sequence[str], note: str = "") -> list[str]:
    lines = [" & ".join(head), *body]
    rules = {0: r"\toprule", 1: r"\midrule"}
    rows = [text for number, line in enumerate(lines) for text in (*([rules[number]] if number in rules else []), line + r" \\")]
    rows += [r"\midrule", note + r" \\"] if note else []
    return [rf"\begin{{tabular}}{{{columns}}}", *rows, r"\bottomrule", r"\end{tabular}"]


def _field(name: str) -> str:
    """The head of a column, as a symbol where it has one."""
    symbols = {WHOLE: r"$\hat{H}(p)$", REST: r"$\hat{H}(\bar{p})$"}
    symbol = symbols.get(name.removesuffix(CLEAN))
    return latex_escaped(name) if symbol is None else symbol + (CLEAN if name.endswith(CLEAN) else "")


def _score(score: Score, seeds: bool) -> str:
    text = f"{score.cell.mean:.2f}"
    text = {"best": rf"\textbf{{{text}}}", "tied": rf"\underline{{{text}}}"}.get(score.mark, text)
    spread = rf"\,{{\scriptsize$\pm$\,{score.cell.std:.2f}}}" if score.cell.std is not None else ""
    count = rf"\,{{\scriptsize({score.cell.n})}}" if seeds else ""
    return rf"\kdheat{{{40 * score.shade:.0f}}}{text}{spread}{count}"


def _sources(heatmap: Heatmap, line: Line) -> list[str]:
    name = ", ".join(filter(None, line.names))
    return [
        "% " + _comment(f"{name}, {heatmap.over} {column}, n = {score.cell.n}: {score.cell.source}")
        for column, score in zip(heatmap.columns, line.scores, strict=True)
        if score
    ]


def _comment(text: str) -> str:
    """`text` as a one-line LaTeX comment."""
    return re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in text))
