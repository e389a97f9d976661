"""Commands about archives of others: how they differ from one's own."""

from typing import Annotated

import typer

from kdcache.cli.options import JsonOption, floats
from kdcache.cli.output import bars, print_json, print_table
from kdcache.errors import IncompatibleError, UsageError


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="An archive.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    tau: Annotated[str, typer.Option("--tau", help="Temperatures at which logits are compared.")] = "1,4,20",
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of logits to compare at most, evenly spaced.")] = 16384,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Exit with status 5 if views, teacher or logits differ; else it is 0 whatever differs."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare two archives: the same views, the same teacher, and how far apart are the logits?

    Codec, layout, shards and names may differ between archives of the same contents. Logits are compared where the views are
    the same, row by row.
    """
    from kdcache.archive import compare, open_archive

    taus = floats(tau, "--tau")
    if not taus or min(taus) <= 0:
        raise UsageError(f"--tau {tau!r}", why="a temperature is a positive number", fix="--tau 1,4,20")
    with bars() as progress:
        found = compare(open_archive(a), open_archive(b), taus, rows, progress)
    if as_json:
        print_json(found.to_dict())
    else:
        print_table(
            ["", "A", "B", ""],
            [
                [fact.name, *fact.shown, ", ".join(filter(None, ["same" if fact.same else "DIFFERS", fact.note]))]
                for fact in found.facts
            ],
        )
        if found.distances:
            print_table(
                ["tau", "KL(A||B)", "max", "KL(B||A)", "max", "max |dp|", "H^(A)", "H^(B)", "mean |dH^|", "corr H^"],
                [
                    [
                        f"{d.tau:g}",
                        *(f"{kl:.3g}" for kl in (d.kl_ab_mean, d.kl_ab_max, d.kl_ba_mean, d.kl_ba_max)),
                        f"{d.max_probability:.3g}",
                        f"{d.entropy_a:.4f}",
                        f"{d.entropy_b:.4f}",
                        f"{d.entropy_difference:.3g}",
                        None if d.entropy_correlation is None else f"{d.entropy_correlation:.4f}",
                    ]
                    for d in found.distances
                ],
                title=f"{found.rows} rows, the same top class in {found.agreement:.2f} % of them; KL in nats",
            )
        elif not found.views:
            print("No logits are compared: the archives have no view in common.")
        else:
            print(f"No logits are compared: {'one has none' if found.comparable else 'views or classes differ'}.")
    if strict and found.differences:
        raise IncompatibleError(
            f"{a} and {b} differ in {', '.join(fact.name for fact in found.differences)}",
            why="with --strict that is an error",
            fix="leave --strict out to compare them all the same",
        )
