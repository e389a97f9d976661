"""Options that several commands share, and how their text is read."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kdcache.errors import NotFoundError, UsageError, unknown_name

__all__ = [
    "AMP",
    "CLIP_GRAD",
    "DECAY_EPOCHS",
    "DECAY_RATE",
    "MODEL_EMA",
    "MOMENTUM",
    "MOST",
    "SCHED",
    "VAL_INTERVAL",
    "WEIGHT_DECAY",
    "AllowDriftOption",
    "ConfigOption",
    "DataDirOption",
    "DatasetOption",
    "DeviceOption",
    "DryRunOption",
    "HomeOption",
    "JsonOption",
    "RendererOption",
    "SkipCorruptOption",
    "WorkersOption",
    "command_line",
    "floats",
    "integers",
    "share",
    "size_in_bytes",
    "specs",
    "workspace",
]


MOST = (1 << 64) - 1  # of a seed: one word of the random streams
MOST_NUMBERS = 10_000


def _load_config(context: typer.Context, file: Path | None) -> Path | None:
    """Take option values from a YAML mapping; flags and environment variables still win."""
    if file is None:
        return None
    import yaml

    try:
        values = yaml.safe_load(file.read_text("utf-8"))
    except FileNotFoundError:
        raise NotFoundError(
            f"configuration {file} does not exist", why="--config names a YAML file", fix="correct the path"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, OSError) as error:
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
    for key, value in values.items():
        param = known.get(str(key).replace("_", "-"))
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
DatasetOption = Annotated[str, typer.Option("--dataset", help="Dataset name, or folder:ROOT for your own images.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...", rich_help_panel="Common")]
SkipCorruptOption = Annotated[
    bool,
    typer.Option("--skip-corrupt", help="Leave out images that cannot be decoded, and record which.", rich_help_panel="Common"),
]
WorkersOption = Annotated[
    int,
    typer.Option("--workers", "-j", min=0, help="Processes that render views ahead; 0 renders inline.", rich_help_panel="Common"),
]
AllowDriftOption = Annotated[
    int, typer.Option("--allow-drift", min=0, help="Accept views whose grid means are this many grey levels off.")
]
RendererOption = Annotated[
    Literal["auto", "reference", "device"],
    typer.Option(
        "--renderer", help="How views are drawn, all to the same bytes; auto: the faster one here.", rich_help_panel="Common"
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done, and do none of it.", rich_help_panel="Common")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# How models are trained: students by numbers, teachers by those of a recipe unless they are given.
WEIGHT_DECAY = typer.Option("--weight-decay", min=0)
MOMENTUM = typer.Option("--momentum", min=0, help="Of SGD and its kin.")
SCHED = typer.Option("--sched", help="Half a period of a cosine, or --decay-rate at --decay-epochs.")
DECAY_EPOCHS = typer.Option("--decay-epochs", help="Epochs, such as 150,180,210.")
DECAY_RATE = typer.Option("--decay-rate", help="What the rate is multiplied by there.")
CLIP_GRAD = typer.Option("--clip-grad", min=0, help="Largest L2 norm of one layer's gradient; 0: no clipping.")
AMP = typer.Option("--amp", help="Run models in bf16 where that is safe.")
VAL_INTERVAL = typer.Option("--val-interval", min=1, help="Epochs from one test to the next.")
MODEL_EMA = typer.Option("--model-ema-decay", help="Also keep and test a moving average of the weights, such as 0.999.")


def workspace(home: Path, data_dir: Path | None = None, skip_corrupt: bool = False) -> Any:
    from kdcache.workspace import Workspace

    return Workspace(home, data_dir, skip_corrupt)


def command_line() -> str:
    """The command as typed, to be stored with what it makes."""
    return shlex.join(["kdcache", *sys.argv[1:]])


def floats(text: str, option: str) -> list[float]:
    """`1,4,20` as numbers."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"{option} {text!r}", why="it takes numbers separated by commas", fix=f"{option} 1,4,20") from None


def triple(text: str, option: str) -> tuple[float, float, float]:
    """`0.5,0.5,0.5`: one number for each of red, green and blue."""
    values = floats(text, option)
    if len(values) != 3 or not all(0 <= value <= 1 for value in values):
        raise UsageError(
            f"{option} {text!r}", why="it takes three numbers from 0 to 1, of red, green and blue", fix=f"{option} 0.5,0.5,0.5"
        )
    return values[0], values[1], values[2]


def temperatures(text: str) -> list[float]:
    """`1,4,20` as temperatures, each once."""
    taus = list(dict.fromkeys(floats(text, "--tau")))
    if not taus or not all(0 < tau < float("inf") for tau in taus):
        raise UsageError(f"--tau {text!r}", why="a temperature is a finite number above 0", fix="--tau 1,4,20")
    return taus


def find_archive(place: str) -> Any:
    """The archive in a folder, at a URL, or of a name below `archives/` of the workspace (KDCACHE_HOME, or this folder)."""
    from kdcache.archive import open_archive
    from kdcache.system.remote import is_url

    if not place:
        raise UsageError("an archive without a name", why="the argument is empty", fix="list the archives with: kdcache ls")
    named = Path(os.environ.get("KDCACHE_HOME") or ".") / "archives" / place
    return open_archive(named if not is_url(place) and not Path(place).exists() and named.is_dir() else place)


def integers(text: str, option: str) -> list[int]:
    """`0-2,5` as 0, 1, 2, 5. Raises UsageError for what is no ascending list of numbers that fit in 64 bits."""
    numbers: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            found = range(int(first), int(last if dash else first) + 1)
            if not 0 < len(found) <= MOST_NUMBERS - len(numbers) or found[-1] > MOST:
                raise ValueError(part)
            numbers += found
    except (ValueError, OverflowError):
        raise UsageError(
            f"{option} {text!r}",
            why=f"it takes whole numbers from 0 to 2^64 - 1 and ascending ranges of them, {MOST_NUMBERS:,} numbers at most",
            fix=f"{option} 0-2",
        ) from None
    return numbers


def share(text: str) -> tuple[int, int]:
    """`2/8`, the third of eight parts, as (2, 8)."""
    try:
        number, parts = text.split("/")
        chosen = int(number), int(parts)
        if not 0 <= chosen[0] < chosen[1] <= MOST_NUMBERS:
            raise ValueError(text)
    except ValueError:
        raise UsageError(
            f"--shard {text!r}",
            why=f"it takes I/N: the number of this process, from 0 to N - 1, and how many there are, {MOST_NUMBERS:,} at most",
            fix="--shard 0/8",
        ) from None
    return chosen


def size_in_bytes(text: str, option: str) -> int:
    """`12GB` as a number of bytes."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise UsageError(
            f"{option} {text!r}", why="it takes a number with a unit of memory, as in 500MB, 12GB or 1.5GiB", fix=f"{option} 12GB"
        ) from None


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


def specs(text: str, option: str = "") -> list[str]:
    """Component names separated by commas; `key=value` parts belong to the component before them.

    UsageError if there are none, for an `option` that wants some.
    """
    found: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if found and "=" in part and ":" not in part.partition("=")[0]:
            found[-1] += f",{part}"
        elif part:
            found.append(part)
    if option and not found:
        raise UsageError(
            f"{option} {text!r} names nothing", why="the grid of students would be empty", fix=f"give {option} a value"
        )
    return found
