"""Options that several commands share, and how their text is read."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kdcache.errors import NotFoundError, UsageError, unknown_name

__all__ = [
    "AllowLargeOption",
    "ConfigOption",
    "DataDirOption",
    "DryRunOption",
    "HomeOption",
    "JsonOption",
    "SkipCorruptOption",
    "command_line",
    "find_archive",
    "parsed",
    "view_range",
    "workspace",
]


def _load_config(context: typer.Context, file: Path | None) -> Path | None:
    """Take option values from a YAML mapping; flags and environment variables still win."""
    if file is None:
        return None
    from kdcache.system.documents import DocumentError, read_yaml
    from kdcache.system.files import local_path
    from kdcache.training.config import under_present_names

    file = local_path(file, "--config", elsewhere="name a file of this machine")
    try:
        values = read_yaml(file)
    except FileNotFoundError:
        raise NotFoundError(
            f"configuration {file} does not exist", why="--config names a YAML file", fix="correct the path"
        ) from None
    except (DocumentError, OSError) as error:
        raise UsageError(
            f"configuration {file} is not YAML",
            why=" ".join(str(error).split())[:200],
            fix="write for example: tau: [1, 4, 20]",
        ) from None
    if not isinstance(values, dict):
        raise UsageError(
            f"configuration {file} holds no mapping", why="it maps options to values", fix="write for example: tau: [1, 4, 20]"
        )
    known = {flag.lstrip("-"): param for param in context.command.params for flag in param.opts}
    defaults: dict[str, Any] = {}
    for key, value in under_present_names({str(key).replace("-", "_"): value for key, value in values.items()}).items():
        param = known.get(key.replace("_", "-"))
        if param is None or param.name is None:
            raise unknown_name(f"option in {file}", str(key), sorted(known))
        if getattr(param, "multiple", False):
            defaults[param.name] = list(map(str, value)) if isinstance(value, list) else [str(value)]
        else:
            defaults[param.name] = ",".join(map(str, value)) if isinstance(value, list) else value
    context.default_map = {**(context.default_map or {}), **defaults}
    return file


HomeOption = Annotated[
    Path,
    typer.Option(
        "--home", envvar="KDCACHE_HOME", help="Workspace with archives/, teachers/, runs/ and data/.", rich_help_panel="Common"
    ),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", envvar="KDCACHE_DATA_DIR", help="Where datasets and canvases lie [HOME/data].", rich_help_panel="Common"
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=_load_config,
        is_eager=True,
        help="YAML file with option values; flags win.",
        rich_help_panel="Common",
    ),
]
SkipCorruptOption = Annotated[
    bool,
    typer.Option("--skip-corrupt", help="Leave out images that cannot be decoded, and record which.", rich_help_panel="Common"),
]
AllowLargeOption = Annotated[
    bool, typer.Option("--allow-large", help="Decode images beyond 178 megapixels, too.", rich_help_panel="Common")
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Test on training images, where a dataset says so.", rich_help_panel="Common")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done, and do none of it.", rich_help_panel="Common")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel="Common")]


def workspace(
    home: Path, data_dir: Path | None = None, skip_corrupt: bool = False, allow_large: bool = False, *, force: bool = False
) -> Any:
    from kdcache.workspace import Workspace

    return Workspace(home, data_dir, skip_corrupt, allow_large, force)


def command_line() -> str:
    """The command as typed, to be stored with what it makes."""
    return shlex.join(["kdcache", *sys.argv[1:]])


def parsed(kind: Any, text: str, option: str) -> Any:
    """`text` as one of the types of `kdcache.options`. UsageError that names the option."""
    from pydantic import TypeAdapter, ValidationError

    from kdcache.options import wrong_option

    try:
        return TypeAdapter(kind).validate_python(text)
    except ValidationError as error:
        raise wrong_option(error, lambda name: option) from None


def find_archive(place: str) -> Any:
    """The archive in a folder, at a URL, or of a name below `archives/` of the workspace (KDCACHE_HOME, or this folder)."""
    from kdcache.archive import open_archive
    from kdcache.system.remote import is_url

    if not place:
        raise UsageError("an archive without a name", why="the argument is empty", fix="list the archives with: kdcache ls")
    named = Path(os.environ.get("KDCACHE_HOME") or ".").expanduser() / "archives" / place
    return open_archive(named if not is_url(place) and not Path(place).exists() and named.is_dir() else place)


def view_range(text: str, known: range, *, clip: bool = False) -> range:
    """`0:8`, `5:`, `:3` or `4` as numbers of views, among the `known` ones; `clip` takes those of them that there are."""
    first, colon, stop = text.partition(":")
    try:
        begin = int(first) if first else known.start
        end = (int(stop) if stop else known.stop) if colon else begin + 1
        chosen = range(begin, min(end, known.stop) if clip else end)
        if not chosen or chosen[0] not in known or chosen[-1] not in known:
            raise ValueError(text)
    except ValueError:
        raise UsageError(
            f"--views {text!r}",
            why=f"it takes FIRST:STOP as Python does, within the views {known.start}:{known.stop} that there are",
            fix=f"--views {known.start}:{min(known.start + 8, known.stop)}",
        ) from None
    return chosen
