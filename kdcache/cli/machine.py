"""Commands about this machine: what it has, and how fast it is."""

import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcache.cli.options import DataDirOption, HomeOption, JsonOption
from kdcache.cli.output import bars, print_json, print_table
from kdcache.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from kdcache.bench import Result

__all__ = ["bench", "doctor"]

COLUMNS = ("measured", "against", "value", "bound", "")
WIDTH, INDENT = 80, 28  # columns: what a bug report shows without wrapping; where a finding's text begins


def doctor(
    offline: Annotated[bool, typer.Option("--offline", help="Leave the network alone.")] = False,
    as_json: JsonOption = False,
    home: HomeOption = Path(),
    data_dir: DataDirOption = None,
) -> None:
    """Say what this machine has and what is wrong with it, to be pasted in a bug report.

    No secret is printed, and nothing is changed. The exit status is 3 if there is a problem; notes are none.
    """
    from kdcache.doctor import Finding, examine

    findings: list[Finding] = []
    for finding in examine(home, data_dir or home / "data", offline=offline, variables=_variables()):
        if not as_json:
            if not findings or findings[-1].part != finding.part:
                print(("\n" if findings else "") + finding.part)
            print(*_lines(finding.name, finding.state, finding.text, finding.fix), sep="\n", flush=True)
        findings.append(finding)
    problems = [finding for finding in findings if finding.state == "problem"]
    if as_json:
        print_json({"problems": len(problems), "findings": [vars(finding) for finding in findings]})
    if problems:
        several = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        raise NotFoundError(
            f"{several} on this machine: {', '.join(finding.name for finding in problems)}",
            why=f"{problems[0].name}: {problems[0].text}",
            fix=problems[0].fix,
        )


def _lines(name: str, state: str, text: str, fix: str) -> list[str]:
    """A finding in lines of at most 80 columns; a command to paste is not broken within a word."""
    margin = " " * INDENT
    head = f"  {state:8}{name}"
    begin = f"{head:{INDENT}}" if len(head) < INDENT else f"{head} "
    lines = textwrap.wrap(text, WIDTH, initial_indent=begin, subsequent_indent=margin, break_on_hyphens=False) or [head]
    if fix:
        lines += textwrap.wrap(
            f"fix: {fix}", WIDTH, initial_indent=margin, subsequent_indent=margin, break_long_words=False, break_on_hyphens=False
        )
    return lines


def _variables() -> set[str]:
    """Names of the environment variables that kdcache reads."""
    from kdcache.cli.app import command

    found = {"KDCACHE_CACHE", "KDCACHE_CACHE_LIMIT", "KDCACHE_DEBUG"}
    if not any(name.startswith("KDCACHE_") for name in os.environ.keys() - found):
        return set()  # which saves building every command
    for words, built in command().every_command():
        for parameter in built.params:
            own = parameter.envvar or f"KDCACHE_{words}_{parameter.name}".upper().replace(" ", "_").replace("-", "_")
            found |= {own} if isinstance(own, str) else set(own)
    return found


def bench(
    which: Annotated[
        str, typer.Argument(help="startup, archive, views, dump, methods, distill, rival, study; all of these; or gpu.")
    ] = "all",
    seconds: Annotated[float, typer.Option(min=1, help="Measuring time per benchmark.")] = 30.0,
    only: Annotated[str, typer.Option("--only", help="Of gpu: these checks, such as bytes,dump [all].")] = "",
    budget: Annotated[
        float | None,
        typer.Option("--budget", min=1, help="Of gpu: begin a check only while it fits into these seconds [no end]."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Of gpu: JSON file, written anew after every check [none].")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure kdcache against what does the same work without it (the bare model, a memory map), as ratios within this run.

    gpu: what only a GPU can tell, bytes and float32 included; exit status 3 where there is none.
    """
    if which == "gpu":
        _bench_gpu(seconds, only, budget, output, as_json)
        return
    for flag, given in (("--only", only), ("--budget", budget), ("--output", output)):
        if given:
            raise UsageError(
                f"{flag} with bench {which}", why="it is an option of bench gpu", fix=f"leave {flag} out, or: kdcache bench gpu"
            )
    from kdcache.bench import run_benchmarks

    with bars() as progress:
        results = run_benchmarks(which, seconds, progress)
    if as_json:
        print_json([vars(result) for result in results])
        return
    print_table(["benchmark", *COLUMNS], [[result.name, *_cells(result)] for result in results])


def _bench_gpu(seconds: float, only: str, budget: float | None, output: Path | None, as_json: bool) -> None:
    from kdcache.bench.gpu import run_checks
    from kdcache.options import names_in

    with bars() as progress:
        report = run_checks(names_in(only) if only else (), seconds, progress, budget=budget, output=output)
    if as_json:
        print_json(report.as_json())
        return
    rows: list[list[Any]] = []
    for outcome in report.outcomes:
        rows += [[outcome.name, result.name, *_cells(result)] for result in outcome.results]
        if outcome.reason:
            rows.append([outcome.name, outcome.reason, "", "", "", "", "FAILED" if outcome.state == "failed" else outcome.state])
    print_table(["check", "benchmark", *COLUMNS], rows, title=report.machine.get("gpu"))


def _cells(result: "Result") -> list[str]:
    state = "ok" if result.value <= result.bound else "MISSED"
    return [
        result.measured,
        result.against,
        f"{result.value:.3g}" if result.value < 0.001 else f"{result.value:.3f}",
        f"{result.bound:g}",
        state,
    ]
