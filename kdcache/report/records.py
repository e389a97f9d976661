"""Run folders, as `kdcache distill` leaves them, read back and checked."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from kdcache.archive import LogitMoments
from kdcache.errors import IntegrityError, NotFoundError
from kdcache.system.energy import NOTHING, UNKNOWN, Spent
from kdcache.system.progress import Progress, Silent

__all__ = ["ArchiveArgs", "Experiment", "RunArgs", "RunRecord", "Summary", "collect"]

ARGS, METRICS, SUMMARY, MOMENTS = "args.yaml", "metrics.jsonl", "summary.json", "logit_moments.json"
SAFELY_NESTED = 1000
_Text = Annotated[str, BeforeValidator(str)]  # YAML reads a bare date as one


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


_Number = Annotated[float | None, BeforeValidator(_finite)]


@dataclass(frozen=True)
class Experiment:
    """What runs were made for, as their study says; `smoke`: they are of its smoke version, and their numbers say nothing."""

    title: str
    paper: str
    question: str
    varies: str
    expected: str
    smoke: bool = False


class ArchiveArgs(BaseModel):
    """Where an archive was, its name, and what it was."""

    model_config = ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True)

    archive: str
    archive_digest: str
    archive_name: str


class RunArgs(ArchiveArgs):
    """`args.yaml`: the resolved configuration of a run. Keys that this version does not know are kept in `model_extra`."""

    model_config = ConfigDict(frozen=True, extra="allow", coerce_numbers_to_str=True)

    archives: tuple[ArchiveArgs, ...] = ()  # several, of which `archive` is the average
    average: str = ""
    second_archive: str = ""
    second_archive_digest: str = ""  # of where second views came from, if not from the same archives
    own_temperature: bool = False  # the method finds its temperature by itself: tau is not used
    dataset: str
    teacher: str
    student: str
    method: dict[str, Any]
    method_spec: str
    control: dict[str, Any]
    control_spec: str
    tau: float = Field(gt=0, allow_inf_nan=False)
    seed: int
    epochs: int = Field(ge=0)
    batch_size: int
    opt: str
    lr: float
    weight_decay: float
    device: str = ""
    command: str = ""
    kdcache_version: _Text = ""
    created: _Text = ""


class Summary(BaseModel):
    """`summary.json`, which a run writes last. Top-1 in percent."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    status: Literal["complete", "diverged"]
    epochs: int
    final_top1: _Number = None
    best_top1: _Number = None
    best_epoch: int | None = None
    final_loss: _Number = None
    seconds: _Number = None
    reason: str = ""

    @model_validator(mode="after")
    def _has_result(self) -> "Summary":
        if self.status == "complete" and self.final_top1 is None:
            raise ValueError("a complete run needs final_top1")
        return self


@dataclass(frozen=True, eq=False)
class RunRecord:
    """One run: one student trained at one tau with one seed."""

    folder: Path
    args: RunArgs
    curves: Mapping[str, NDArray[np.float64]]  # columns of metrics.jsonl, a value per finished epoch, NaN where there is none
    summary: Summary | None

    @property
    def status(self) -> Literal["complete", "diverged", "unfinished"]:
        return self.summary.status if self.summary else "unfinished"

    @property
    def final_top1(self) -> float | None:
        """Test top-1 after the last epoch, percent; None unless the run is complete."""
        return self.summary.final_top1 if self.summary and self.summary.status == "complete" else None

    @property
    def epochs_done(self) -> int:
        return len(self.curves["epoch"])

    @property
    def second_views(self) -> int:
        """Epochs in which it was shown a second view of every sample."""
        return int(np.isfinite(self.curves.get("second_view", np.empty(0))).sum())

    @property
    def second_archive(self) -> ArchiveArgs | None:
        """Where its second views came from, if not from the archive of the first ones."""
        args = self.args
        if not args.second_archive_digest or (self.epochs_done and not self.second_views):
            return None
        name = args.second_archive.rstrip("/").rpartition("/")[2]
        return ArchiveArgs(archive=args.second_archive, archive_digest=args.second_archive_digest, archive_name=name)

    @property
    def spent(self) -> Spent:
        """Its part of what the students that it was trained with took, over all of its epochs; known if every epoch logged it."""
        sums = {name: float(self.curves[name].sum()) for name in asdict(NOTHING) if name in self.curves}
        return Spent.of(sums) if self.epochs_done else UNKNOWN

    def logit_moments(self) -> LogitMoments | None:
        """Its logits' on training views of the last epoch, read anew; None where it left none. IntegrityError if damaged."""
        file = self.folder / MOMENTS
        return _parse(LogitMoments, file, json.loads) if file.is_file() else None


def collect(paths: Sequence[Path], *, progress: Progress | None = None) -> list[RunRecord]:
    """All runs at or below each of `paths`, in the order of their folders; unfinished ones too.

    Raises NotFoundError for a path without runs and IntegrityError, naming the file, for a damaged one.
    """
    progress = progress or Silent()
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        run_folders = {folder.resolve(): folder for folder in _run_folders(path)}
        if not run_folders:
            raise NotFoundError(
                f"no runs at {path}",
                why=f"no folder at or below it holds {ARGS}" if path.is_dir() else "that folder does not exist",
                fix="train some first with: kdcache distill --tau 1,4,20 --seed 0-2",
            )
        folders = run_folders | folders
    if not folders:
        raise NotFoundError("no folder of runs was given", why="a report is made of runs", fix="kdcache report runs")
    records = []
    for number, folder in enumerate(sorted(folders.values()), 1):
        records.append(_read_run(folder))
        progress.update("reading runs", number, len(folders))
    return records


def _run_folders(path: Path) -> Iterator[Path]:
    """Folders with any file of a run in them, so that a run which lost one is noticed."""

    def unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for folder, below, files in os.walk(path, onerror=unreadable):
        if not {ARGS, METRICS, SUMMARY}.isdisjoint(files):
            below.clear()
            yield Path(folder)


def _read_run(folder: Path) -> RunRecord:
    args = _parse(RunArgs, folder / ARGS, _load_yaml)
    summary = _parse(Summary, folder / SUMMARY, json.loads) if (folder / SUMMARY).exists() else None
    return RunRecord(folder, args, _read_metrics(folder / METRICS, finished=summary is not None), summary)


def _load_yaml(text: str) -> Any:
    """By the parser in C, which is eight times as fast, unless `text` may nest so deeply that it would overflow its stack."""
    deepest = sum(map(text.count, "[{-?\n"))
    return yaml.load(text, yaml.SafeLoader if deepest > SAFELY_NESTED else getattr(yaml, "CSafeLoader", yaml.SafeLoader))


_Model = TypeVar("_Model", bound=BaseModel)


def _parse(model: type[_Model], path: Path, load: Any) -> _Model:
    try:
        return model.model_validate(load(path.read_text("utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc'])) or 'its content'}: {first['msg']}") from None
    except FileNotFoundError:
        raise _damaged(path, "it does not exist") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _damaged(path, (str(error).splitlines() or ["unreadable"])[0]) from None


def _read_metrics(path: Path, *, finished: bool) -> dict[str, NDArray[np.float64]]:
    """Columns of a metrics.jsonl, ordered by epoch; an epoch that was repeated after a resume counts once, as last written."""
    if not path.exists() and not finished:
        return {"epoch": np.empty(0)}
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise _damaged(path, "it does not exist") from None
    if not finished:
        lines.pop()  # nothing, or the line that was being written when the run stopped
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = from_json(line)
                rows[int(row["epoch"])] = row
            except (ValueError, KeyError, TypeError, RecursionError):
                raise _damaged(path, f"line {number} is not a JSON object with an epoch") from None
    ordered = [rows[epoch] for epoch in sorted(rows)]
    names = {"epoch": None} | dict.fromkeys(name for row in ordered for name in row)
    try:
        return {name: np.array([row.get(name) for row in ordered], np.float64) for name in names}
    except (ValueError, TypeError):
        raise _damaged(path, "a value in it is not a number") from None


def _damaged(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"{path} is damaged",
        why=f"{why} (or it was not written by kdcache distill)",
        fix=f"restore it from a copy, or move {path.parent} out of the way and run its distill command again",
    )
