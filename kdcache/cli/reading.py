"""Commands that only look: archives, lists."""

import dataclasses
import inspect
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from kdcache.cli.commands import Of
from kdcache.cli.options import (
    AllowLargeOption,
    DataDirOption,
    HomeOption,
    JsonOption,
    SkipCorruptOption,
    find_archive,
    parsed,
    view_range,
    workspace,
)
from kdcache.cli.output import bars, print_json, print_table
from kdcache.errors import IncompatibleError, KdcacheError, NotFoundError, UsageError, printable, unknown_name
from kdcache.system.files import write_changed

FIDELITY_ROWS = 4096
ArchiveArgument = Annotated[str, typer.Argument(help="Folder, name below archives/, or URL (https, s3, hf, ...) of an archive.")]


def info(archive: ArchiveArgument, as_json: JsonOption = False) -> None:
    """Say what an archive is. --json prints the whole manifest."""
    from kdcache.archive import shards_by_device

    opened = find_archive(archive)
    manifest = opened.manifest
    if as_json:
        print_json(manifest.model_dump(mode="json"))
        return
    source, teacher, policy, statistics = manifest.source, manifest.teacher, manifest.policy, manifest.statistics
    rows: list[list[Any]] = [
        ["archive", opened.location],
        ["digest", manifest.digest],
        ["views x samples x classes", f"{opened.num_views} x {opened.num_samples} x {opened.num_classes}"],
        ["size", f"{opened.nbytes / 1e6:.1f} MB, codec {manifest.codec['name']}, layout {manifest.layout['name']}"],
    ]
    if source:
        rows.append(["data", f"{source.name}, {source.split} split, licence {manifest.known_licences.data or 'unknown'}"])
    if teacher:
        rows.append(
            ["teacher", f"{teacher.alias} = {teacher.name}, {teacher.precision}, weights sha256 {teacher.weights_sha256[:12]}..."]
        )
        rows.append(
            ["teacher's top-1", f"{_percent(teacher.top1_clean)} clean, {_percent(statistics.top1_views)} on these views"]
        )
        rows.append(["teacher's test images", teacher.test_title])
        if noise := teacher.known_noise:
            better = noise.reference or "float32"
            rows.append(["teacher's noise", f"mean KL to {better} {noise.kl_mean:.2g} nats over {noise.views} views"])
        rows += [["accepted of the teacher", printable(found)] for found in (teacher.accepted or {}).values()]
    if kinds := shards_by_device(manifest):
        rows.append(["computed on", ", ".join(f"{kind} ({count:,} shards)" for kind, count in kinds.items())])
    known = manifest.known_licences
    rows.append(["licences", f"data {known.data or 'unknown'}, teacher's weights {known.weights or 'unknown'}"])
    if part := manifest.subset_of:
        whole = f"views {part.first_view} to {part.first_view + part.num_views - 1}"
        mine = f"views {opened.views.start} to {opened.views.stop - 1}" + ("" if manifest.contents == "all" else ", no logits")
        rows.append(["part of", f"{part.digest[:12]}... with {whole}: here are {mine}"])
    if policy:
        rows.append(
            ["views", f"{policy.size} px, crop {policy.crop.kind}, policy {policy.digest[:12]}... (version {policy.version})"]
        )
    if made_by := manifest.provenance.get("command"):
        rows.append(["made by", made_by])
    print_table(["", ""], rows)
    print_table(
        ["tau", "H^(p)", "H^(p-bar)"],
        [[f"{s.tau:g}", f"{s.entropy_mean:.4f}", f"{s.entropy_rest_mean:.4f}"] for s in statistics.per_tau],
        title=f"mean relative entropies over {statistics.rows} rows",
    )


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f} %"


def stats(
    archive: ArchiveArgument,
    tau: Annotated[str, typer.Option("--tau", help="Temperatures, such as 1,4,20 [those of the temperature study]")] = "",
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="Read this many rows, evenly spaced [65536; --fidelity: 4096]")
    ] = None,
    fidelity: Annotated[bool, typer.Option("--fidelity", help="Measure what other codecs would cost.")] = False,
    codec: Annotated[str, typer.Option("--codec", help="Codecs for --fidelity, such as i16,u8 [all]")] = "",
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the figures: a folder for all of them, or one .svg or .png.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what the teacher knows at each temperature, which to try first and why; or what a codec would cost."""
    from kdcache.archive import MAX_ROWS, PAPER_TAUS, measure_fidelity, measure_logits
    from kdcache.cli import statistics as show
    from kdcache.codecs import CODECS
    from kdcache.options import Temperatures
    from kdcache.report.advice import advise, first_temperatures

    opened = find_archive(archive)
    manifest, total = opened.manifest, opened.num_views * opened.num_samples
    taus = list(parsed(Temperatures, tau, "--tau")) if tau else list(PAPER_TAUS)
    if fidelity or codec:
        if plot or not fidelity:
            raise UsageError(
                "--plot with --fidelity" if plot else "--codec without --fidelity",
                why="figures are drawn of the archive as it is"
                if plot
                else "an archive has one codec, and only --fidelity tries others",
                fix="leave one of them out" if plot else f"kdcache stats {shlex.quote(archive)} --fidelity --codec {codec}",
            )
        named = [name.strip() for name in codec.split(",") if name.strip()]
        names = list(dict.fromkeys([manifest.codec["name"], *(named or CODECS)]))  # its own states what it may have lost
        count = min(total, rows or FIDELITY_ROWS)
        with bars() as progress:
            found = measure_fidelity(opened.spread_logits(count), count, names, taus, progress)
        if as_json:
            print_json(
                {"archive": opened.location, "codec": manifest.codec, "codecs": [dataclasses.asdict(one) for one in found]}
            )
        else:
            show.print_fidelity(opened, found)
        return
    # Archives made before there were details have logits to get them from; those that hold no logits have what they have.
    enough = manifest.statistics.details is not None or manifest.contents == "statistics"
    recorded = enough and not rows and {figures.tau for figures in manifest.statistics.per_tau} >= set(taus)
    if recorded:
        statistics = manifest.statistics.at(taus)
    else:
        count = min(total, rows or MAX_ROWS)
        with bars() as progress:
            measured = measure_logits(opened.spread_logits(count), count, taus, progress)
        statistics = measured.model_copy(update={"top1_views": manifest.statistics.top1_views})
    pieces = advise(manifest, statistics)
    figures: list[Path] = []
    if plot:
        from kdcache.report.archive_figures import archive_drawings

        name = opened.name
        figures = show.write_figures(archive_drawings(statistics, opened.num_classes, name), name, plot)
    if as_json:
        print_json(
            {
                "archive": opened.location,
                "digest": manifest.digest,
                "recorded": recorded,
                "statistics": statistics.model_dump(mode="json"),
                "try_first": first_temperatures(pieces),
                "advice": [show.as_dict(piece) for piece in pieces],
                "figures": [str(path) for path in figures],
            }
        )
        return
    show.print_statistics(opened, statistics, recorded)
    show.print_advice(opened, pieces)
    for path in figures:
        print(path)


def verify(
    archive: ArchiveArgument,
    quick: Annotated[bool, typer.Option("--quick", help="Compare sizes, and whose rows each file holds, only.")] = False,
    replay: Annotated[
        int,
        typer.Option("--replay", min=0, help="Also render this many views again (and recompute logits if the teacher is here)."),
    ] = 0,
    signed_by: Annotated[
        Path | None, typer.Option("--signed-by", help="Also check the signature, by this public key in PEM.")
    ] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", help="Where the images are now [as in the dump]")] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="module:function, of a teacher that a function makes: it is run.")
    ] = None,
    device: Annotated[str, Of("RenderOptions", "device")] = "auto",
    renderer: Annotated[Any, Of("RenderOptions", "renderer")] = "auto",
    skip_corrupt: SkipCorruptOption = False,
    allow_large: AllowLargeOption = False,
    as_json: JsonOption = False,
    home: HomeOption = Path(),
    data_dir: DataDirOption = None,
) -> None:
    """Check an archive against its manifest: sizes, sha256 of every file, digests of all rows, views rendered again."""
    from kdcache.sharing.signing import verify_signature

    opened = find_archive(archive)
    with bars() as progress:
        results = [verify_signature(opened, signed_by)] if signed_by else []
        results.append(opened.verify("quick" if quick else "full", progress))
        if replay:
            from kdcache.teachers.recomputed import matching_teacher, replay_with_teacher
            from kdcache.workspace import archive_source

            recorded, place = opened.manifest.canvas, workspace(home, data_dir, skip_corrupt, allow_large, force=True)
            canvas = place.canvas(archive_source(opened, place, dataset), "train", recorded.size if recorded else None, progress)
            found, how = matching_teacher(opened, place, progress), {"device": device, "renderer": renderer, "named": teacher}
            results.append(replay_with_teacher(opened, canvas, replay, found, progress, **how))
    if as_json:
        print_json(
            [
                {"level": r.level, "ok": r.ok, "checked": r.checked, "failures": list(map(str, r.failures)), "notes": r.notes}
                for r in results
            ]
        )
    else:
        for result in results:
            verdict = "ok" if result.ok else "DIFFERS" if result.error else "DAMAGED"
            print(f"{result.level}: {verdict}, {result.checked} checked")
            for line in [*map(str, result.failures), *result.notes]:
                print(f"  {line}")
    for result in results:
        result.raise_if_failed()


def view(
    archive: ArchiveArgument,
    sample: Annotated[str, typer.Option("--sample", help="Sample numbers, such as 0-3,12.")] = "0-3",
    views: Annotated[str, typer.Option("--views", help="Views FIRST:STOP, as in Python [the first eight]")] = "",
    out: Annotated[Path, typer.Option("--output", "-o", "--out", help="The PNG to write.")] = Path("sheet.png"),
    dataset: Annotated[str | None, typer.Option("--dataset", help="Where the images are now [as in the dump]")] = None,
    allow_drift: Annotated[int, Of("DistillConfig", "allow_drift")] = 0,
    skip_corrupt: SkipCorruptOption = False,
    allow_large: AllowLargeOption = False,
    home: HomeOption = Path(),
    data_dir: DataDirOption = None,
) -> None:
    """Draw a contact sheet: what the teacher saw, the mixing partner and lambda, and the teacher's top-3."""
    from kdcache.options import Integers
    from kdcache.replay.contact_sheet import contact_sheet
    from kdcache.workspace import archive_source

    opened = find_archive(archive)
    samples = list(dict.fromkeys(parsed(Integers, sample, "--sample")))
    chosen = view_range(views, opened.views, clip=True) if views else opened.views[:8]
    if max(samples) >= opened.num_samples:
        raise UsageError(
            f"--sample {sample}", why=f"the archive has samples 0 to {opened.num_samples - 1}", fix="choose within them"
        )
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(
            f"--output {out} cannot be written",
            why="it is a folder" if out.is_dir() else f"there is no folder {out.parent}",
            fix=f"name a file: --out {shlex.quote(str(out / 'sheet.png'))}"
            if out.is_dir()
            else f"mkdir -p {shlex.quote(str(out.parent))}",
        )
    recorded = opened.manifest.canvas
    with bars() as progress:
        place = workspace(home, data_dir, skip_corrupt, allow_large, force=True)
        canvas = place.canvas(archive_source(opened, place, dataset), "train", recorded.size if recorded else None, progress)
    write_changed(out, contact_sheet(opened, canvas, samples, chosen, allow_drift=allow_drift))
    print(out)


def policy(
    spec: Annotated[str, typer.Argument(help="A preset or YAML file, with changes if any: pets:hflip=0,mix=none")] = "",
    as_json: JsonOption = False,
) -> None:
    """Print a view policy as YAML, to start a file of your own; without a name, list the presets."""
    import yaml

    from kdcache.views import PRESETS, ViewPolicy

    if spec:
        fields = ViewPolicy.draft(spec).model_dump(mode="json")
        if as_json:
            print_json(fields)
        else:
            print(yaml.safe_dump(fields, sort_keys=False), end="")
        return
    presets = {name: preset.model_dump(mode="json") for name, preset in PRESETS.items()}
    if as_json:
        print_json(presets)
        return
    rows = []
    for name, fields in presets.items():
        kind, extent = list(fields["crop"].values())[:2]
        used = [f"{kind} crop {extent}", *(piece for piece in ("randaugment", "jitter", "erase", "mix") if fields.get(piece))]
        rows.append([name, fields["size"], fields["hflip"], ", ".join(used)])
    print_table(["preset", "size", "hflip", "pieces"], rows)


def ls(as_json: JsonOption = False, home: HomeOption = Path()) -> None:
    """List the archives of the workspace."""
    from kdcache.archive import open_archive

    rows: list[dict[str, Any]] = []
    for folder in workspace(home).archive_folders():
        if not (folder / "kdcache.json").is_file():
            rows.append({"archive": str(folder), "state": "unfinished"})
            continue
        try:
            manifest = open_archive(folder).manifest
        except KdcacheError as error:  # the others are to be listed all the same
            rows.append({"archive": str(folder), "state": "incompatible" if isinstance(error, IncompatibleError) else "damaged"})
            continue
        rows.append(
            {
                "archive": str(folder),
                "state": "complete",
                "views": manifest.num_views,
                "samples": manifest.num_samples,
                "classes": manifest.num_classes,
                "teacher": manifest.teacher.alias if manifest.teacher else None,
                "digest": manifest.digest[:12],
            }
        )
    if as_json:
        print_json(rows)
        return
    columns = ["archive", "state", "views", "samples", "classes", "teacher", "digest"]
    print_table(columns, [[row.get(column) for column in columns] for row in rows])


def models(
    pattern: Annotated[str, typer.Argument(help="Aliases and timm names that match, such as 'vit*'.")] = "",
    as_json: JsonOption = False,
) -> None:
    """List the papers' models with their aliases, or all models whose names match.

    Wherever a command wants a model, it also takes hf-hub:ORG/NAME[@REVISION], a timm model on the Hub; local-dir:PATH, a folder
    with timm's config.json and model.safetensors, such as kdcache export writes; and package.module:function, which is called
    with num_classes=... and returns an nn.Module.
    """
    from kdcache.models.creation import note
    from kdcache.models.names import ALIASES, find_aliases, list_models

    found = find_aliases(pattern) if pattern else ALIASES
    others = [name for name in list_models(pattern or "cifar_*") if name not in found.values()]
    if not (found or others):
        every = "list what there is with: kdcache models '*'"
        raise unknown_name("model", pattern, [*ALIASES, *list_models()], error=NotFoundError, fix=every)
    if as_json:
        print_json([*dict.fromkeys(found.values()), *others] if pattern else ALIASES)
        return
    rows = [*found.items(), *((None, name) for name in others)]
    print_table(["alias", "timm name", "note"], [[alias, name, note(name)] for alias, name in rows])


def datasets(
    fetch: Annotated[str, typer.Option("--fetch", help="Fetch these datasets now, such as pets,cifar100.")] = "",
    as_json: JsonOption = False,
    home: HomeOption = Path(),
    data_dir: DataDirOption = None,
) -> None:
    """List the datasets, with what they suggest where the command line says nothing; or fetch some."""
    from kdcache.datasets import DATASETS
    from kdcache.datasets.classes import say_classes
    from kdcache.options import names_in
    from kdcache.workspace import parse_dataset

    if fetch:
        with bars() as progress:
            for spec in names_in(fetch):
                source = parse_dataset(spec, progress)
                say_classes(source, source.open(workspace(home, data_dir).data, progress), progress)
        return
    names = ["name", "licence", "canvas", "policy", "teacher epochs", "student", "description"]
    rows = []
    sources: dict[str, Any] = {}
    for name in DATASETS:
        kind: Any = DATASETS[name]
        sources |= kind.listed() if hasattr(kind, "listed") else {name: kind}
    for name, listed in sources.items():
        recipe = listed.recipe
        described = getattr(listed, "description", "") or " ".join((listed.__doc__ or "").split("\n\n")[0].split())
        epochs = ", ".join(map(str, recipe.durations or (recipe.teacher_epochs,)))
        rows.append([name, listed.licence or "unknown", recipe.canvas, recipe.policy, epochs, recipe.student, described])
    if as_json:
        print_json([dict(zip(names, row, strict=True)) for row in rows])
    else:
        print_table(names, rows)


def methods(
    name: Annotated[str, typer.Argument(help="A method or control, to read all about it [all, in a list]")] = "",
    presets: Annotated[bool, typer.Option("--presets", help="List the published settings for distill --preset instead.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the methods and controls with their options and defaults, or the published settings of methods."""
    from kdcache.methods import METHODS
    from kdcache.methods.presets import PRESETS
    from kdcache.methods.published import published
    from kdcache.registry import Registry
    from kdcache.targets import CONTROLS

    registries: tuple[Registry[Any], ...] = (METHODS, CONTROLS)
    if name and not any(name in registry for registry in registries):
        raise unknown_name("method or control", name, [known for registry in registries for known in registry])
    columns = ["kind", "name", "options", "needs", "source", "description"]
    rows = [
        [
            registry.kind,
            known,
            registry.describe(known),
            ", ".join(registry[known].needs),
            registry[known].source,
            inspect.cleandoc(registry[known].__doc__ or ""),
        ]
        for registry in registries
        for known in registry
        if name in {"", known}
    ]
    if presets:
        columns = ["preset", "method", "tau", "source"]
        of = [found for found in PRESETS.values() if name in {"", found.name.split(":")[1]}]
        rows = [[found.name, found.method, f"{found.tau:.4g}", found.source] for found in of]
        if name or as_json:  # beside what was published
            columns[3:] = ["in the paper", "in its code", "note"]
            for row, found in zip(rows, of, strict=True):
                beside = published()[found.name]
                shown = (" ".join(f"{key}={value:g}" for key, value in values.items()) for values in (beside.paper, beside.code))
                row[3:] = [*shown, beside.note]
            columns, rows = [*columns, "source"], [[*row, found.source] for row, found in zip(rows, of, strict=True)]
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    elif name and not presets:
        print_table(["what", name], [list(pair) for pair in zip(columns, rows[0], strict=True)])
    else:  # in a list, the first paragraph will do
        print_table(columns, [[" ".join(str(cell).split("\n\n")[0].split()) for cell in row] for row in rows])
