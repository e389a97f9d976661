"""Commands about this machine: what it has, and how fast it is."""

import os
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from kdcache.cli.options import DataDirOption, HomeOption, JsonOption
from kdcache.cli.output import bars, print_json, print_table
from kdcache.errors import NotFoundError

__all__ = ["bench", "doctor"]

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
    which: Annotated[str, typer.Argument(help="startup, archive, views, dump, methods, distill, rival, study, or all.")] = "all",
    seconds: Annotated[float, typer.Option(min=1, help="Measuring time per benchmark.")] = 30.0,
    as_json: JsonOption = False,
) -> None:
    """Measure kdcache against what does the same work without it (the bare model, a memory map), as ratios within this run."""
    from kdcache.bench import run_benchmarks

    with bars() as progress:
        results = run_benchmarks(which, seconds, progress)
    if as_json:
        print_json([vars(result) for result in results])
        return
    print_table(
        ["benchmark", "measured", "against", "value", "bound", ""],
        [
            [r.name, r.measured, r.against, f"{r.value:.3f}", f"{r.bound:g}", "ok" if r.value <= r.bound else "MISSED"]
            for r in results
        ],
    )
