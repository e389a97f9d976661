"""Commands about archives of others: bring them from one place to another, compare them with one's own."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from kdcache.cli.options import DryRunOption, HomeOption, JsonOption, find_archive, parsed, view_range, workspace
from kdcache.cli.output import bars, print_json, print_table
from kdcache.cli.reading import ArchiveArgument
from kdcache.errors import IncompatibleError, UsageError

LocalArchive = Annotated[str, typer.Argument(help="Folder or name of an archive.")]
ViewsOption = Annotated[str, typer.Option("--views", help="Only views FIRST:STOP, as in Python.")]
StatsOnlyOption = Annotated[
    bool, typer.Option("--stats-only", help="Only argmax, entropies, sample numbers and fingerprints: no logits.")
]


def push(
    archive: LocalArchive,
    destination: Annotated[str, typer.Argument(help="A folder, s3://BUCKET/FOLDER or hf://datasets/ORG/NAME[@BRANCH].")],
    views: ViewsOption = "",
    stats_only: StatsOnlyOption = False,
    licence: Annotated[
        str, typer.Option("--license", help="Licences that the archive does not know: data=cc-by-4.0,weights=apache-2.0")
    ] = "",
    private: Annotated[bool, typer.Option("--private", help="A dataset repository that is made for it is private.")] = False,
    dry_run: DryRunOption = False,
    home: HomeOption = Path(),
) -> None:
    """Share an archive: verified, with the licences of data and weights, without names of local places; goes on if repeated."""
    from kdcache.archive import derived_plan, stored_bytes
    from kdcache.sharing.push_pull import part_label, push, shipment

    declared = _licences(licence)
    with bars() as progress:
        opened = workspace(home).open_archive(archive, progress)
        part: dict[str, Any] = _part(opened, views, stats_only)
        if not dry_run:
            print(push(opened, destination, licences=declared, private=private, progress=progress, **part))
            return
        sending = shipment(opened, declared, progress)
        plan = derived_plan(opened, **part)
    licences = sending.manifest.known_licences
    what = "logits and statistics" if plan.contents == "all" else "statistics"
    rows: list[list[Any]] = [
        ["would send", f"{what} of views {plan.views.start} to {plan.views.stop - 1}"],
        ["to", destination],
        ["licences", f"data {licences.data}, teacher's weights {licences.weights}"],
        ["changed for it", ", ".join(sending.changed) or "nothing"],
    ]
    size = stored_bytes(plan) if part_label(opened, **part) else sending.nbytes
    rows.append(["size", f"{size / 1e6:,.1f} MB"])
    print_table(["", ""], rows)


def export(
    run: Annotated[str, typer.Argument(help="Folder of a run or of a teacher, or its name in the workspace.")],
    last: Annotated[
        bool, typer.Option("--last", help="The weights after the last epoch: what is exported if nothing is said.")
    ] = False,
    best: Annotated[bool, typer.Option("--best", help="Those of the epoch with the highest top-1 on the test images.")] = False,
    ema: Annotated[bool, typer.Option("--ema", help="The averaged ones, of runs with --model-ema-decay.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder [HOME/exports/NAME]")] = None,
    push: Annotated[str, typer.Option("--push", help="Send it to the Hub: ORG/NAME or hf://models/ORG/NAME.")] = "",
    licence: Annotated[
        str, typer.Option("--license", help="Licences that are not known: data=cc-by-4.0,weights=apache-2.0")
    ] = "",
    private: Annotated[bool, typer.Option("--private", help="A repository that is made for it is private.")] = False,
    dry_run: DryRunOption = False,
    home: HomeOption = Path(),
) -> None:
    """Write a trained model as a folder that timm loads as local-dir:FOLDER, with a model card.

    With --push it also goes to the Hugging Face Hub, from where timm loads it as hf-hub:ORG/NAME.
    """
    from kdcache.sharing.export import export, hub_repository, push_export, require_known, write_export

    chosen = [name for name, wanted in {"last": last, "best": best, "ema": ema}.items() if wanted]
    if len(chosen) > 1:
        raise UsageError(f"--{' --'.join(chosen)}", why="one set of weights is exported at a time", fix=f"use --{chosen[0]}")
    place = workspace(home)
    folder = next((f for f in (Path(run), place.runs / run, place.teachers / run) if run and f.is_dir()), Path(run))
    target = output or place.exports / folder.resolve().name
    repository = hub_repository(push) if push else None
    with bars() as progress:
        which: Any = chosen[0] if chosen else "last"
        made = export(folder, which=which, licences=_licences(licence), repository=repository, progress=progress)
        if repository:
            require_known(made, folder)
        if dry_run:
            terms = made.licences
            print_table(
                ["", ""],
                [
                    ["would write", f"{made.name}, {which} weights"],
                    ["to", target],
                    ["and send it to", f"hf://models/{repository}" if repository else "nobody"],
                    ["licences", f"data {terms.data or 'unknown'}, weights that it comes from {terms.weights or 'unknown'}"],
                    ["files", ", ".join(sorted(made.files))],
                    ["size", f"{made.nbytes / 1e6:,.1f} MB"],
                ],
            )
            return
        write_export(made, target)
        if repository:
            push_export(made, repository, private=private, progress=progress)
            progress.say(f"to use it: timm.create_model('hf-hub:{repository}', pretrained=True)")
    print(target)


def pull(
    source: ArchiveArgument,
    folder: Annotated[Path | None, typer.Argument(help="Where it is to be [HOME/archives/NAME]")] = None,
    views: ViewsOption = "",
    stats_only: StatsOnlyOption = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Trust the checks of each file on arrival.")] = False,
    home: HomeOption = Path(),
) -> None:
    """Bring an archive, or a part of it, to this machine and verify it; an interrupted pull goes on if repeated."""
    from kdcache.sharing.push_pull import part_label, pull

    opened = find_archive(source)
    part: dict[str, Any] = _part(opened, views, stats_only)
    target = folder or workspace(home).archives / "-".join(filter(None, (_name(source), part_label(opened, **part))))
    with bars() as progress:
        print(pull(opened, target, verify=not no_verify, progress=progress, **part).path)


def sign(
    archive: LocalArchive,
    key: Annotated[Path, typer.Option("--key", help="Private key in PEM, on the curve P-256, P-384 or P-521.")],
    home: HomeOption = Path(),
) -> None:
    """Sign an archive; who has the public key checks it with: kdcache verify ARCHIVE --signed-by pub.pem"""
    from kdcache.sharing.signing import sign_archive

    with bars() as progress:
        opened = workspace(home).open_archive(archive, progress)
    print(sign_archive(opened, key))


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
    from kdcache.archive import compare
    from kdcache.options import Temperatures

    taus = list(parsed(Temperatures, tau, "--tau"))
    with bars() as progress:
        found = compare(find_archive(a), find_archive(b), taus, rows, progress)
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


def _part(opened: Any, views: str, stats_only: bool) -> dict[str, Any]:
    contents = "statistics" if stats_only else opened.manifest.contents
    return {"views": view_range(views, opened.views) if views else opened.views, "contents": contents}


def _name(source: str) -> str:
    """The last part of where an archive comes from, without the revision of a repository."""
    name = source.rstrip("/").rpartition("/")[2].partition("@")[0]
    if name in {"", ".", ".."}:
        raise UsageError(
            f"{source!r} has no name to call a folder by",
            why="without a second argument the archive is named after where it comes from",
            fix=f"say where it is to be: kdcache pull {shlex.quote(source)} FOLDER",
        )
    return name


def _licences(text: str) -> Any:
    """`data=NAME,weights=NAME`, or one of the two."""
    from kdcache.archive import Licences

    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in Licences.model_fields or name in found or not 0 < len(value) <= 100 or not value.isprintable():
            raise UsageError(
                f"--license {text!r}", why=f"{part!r} is not data=NAME or weights=NAME", fix="--license data=cc-by-4.0"
            )
        if value.lower() in {"unknown", "none", "null", "?"}:
            raise UsageError(
                f"--license {text!r}",
                why="what is unknown cannot be passed on: those who get it must know the terms",
                fix="ask whoever made the data or the weights, and name their licence",
            )
        found[name] = value
    return Licences(**found)
