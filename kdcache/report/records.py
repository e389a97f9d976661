"""Reading and checking of run folders that `kdcache distill` wrote."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from kdcache.archive import EntropyHistogram, LogitMoments
from kdcache.errors import IntegrityError, NotFoundError
from kdcache.system.documents import NO_FILE, read_json, read_record, read_yaml
from kdcache.system.energy import NOTHING, UNKNOWN, Spent
from kdcache.system.files import is_set_aside, set_aside
from kdcache.system.progress import Progress, Silent
from kdcache.training.config import under_present_names
from kdcache.training.outputs import TEACHER_OUTPUTS, TEST_OUTPUTS, KeptOutputs
from kdcache.views.tested import WHOLE

__all__ = ["ArchiveArgs", "RunArgs", "RunRecord", "Summary", "collect"]

ARGS, METRICS, SUMMARY, MOMENTS = "args.yaml", "metrics.jsonl", "summary.json", "logit_moments.json"
ENTROPIES = "test_entropies.json"
STUDENT = "ce"  # the method that learns from labels alone
SHEET = "views.png"  # beside the runs of an archive
BESIDE = frozenset({SHEET, TEACHER_OUTPUTS})
_Text = Annotated[str, BeforeValidator(str)]  # YAML parses an unquoted date as a date


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


_Number = Annotated[float | None, BeforeValidator(_finite)]


class ArchiveArgs(BaseModel):
    """Place, name and digest of an archive."""

    model_config = ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True)

    archive: str
    archive_digest: str
    archive_name: str


class RunArgs(ArchiveArgs):
    """`args.yaml`: the resolved configuration of a run. Keys that this version does not know are kept in `model_extra`."""

    model_config = ConfigDict(frozen=True, extra="allow", coerce_numbers_to_str=True)

    archives: tuple[ArchiveArgs, ...] = ()  # the members, if `archive` is an average
    average: str = ""
    second_archive: str = ""
    second_archive_digest: str = ""  # digest of the archive of second views, if it is another one
    own_temperature: bool = False  # the method finds its own temperature and ignores tau
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

    @property
    def without_teacher(self) -> bool:
        """Whether it was trained on labels alone."""
        return self.method.get("name") == STUDENT

    @property
    def test_title(self) -> str:
        """How test images were shown, in words."""
        return str((self.model_extra or {}).get("test", WHOLE.title))

    @property
    def start(self) -> str:
        """What the student started from."""
        return str((self.model_extra or {}).get("init", "random"))

    @property
    def start_top1(self) -> float | None:
        """Test top-1 in percent of the start itself, where it was recorded."""
        value = (self.model_extra or {}).get("init_top1")
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    @model_validator(mode="before")
    @classmethod
    def _present_names(cls, data: Any) -> Any:
        return under_present_names(data) if isinstance(data, Mapping) else data


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
    curves: Mapping[str, NDArray[np.float64]]  # columns of metrics.jsonl, one value per finished epoch, NaN if absent
    summary: Summary | None

    @property
    def status(self) -> Literal["complete", "diverged", "unfinished"]:
        return self.summary.status if self.summary else "unfinished"

    @property
    def final_top1(self) -> float | None:
        """Test top-1 after the last epoch, in percent; None for an incomplete run."""
        return self.summary.final_top1 if self.summary and self.summary.status == "complete" else None

    @property
    def epochs_done(self) -> int:
        return len(self.curves["epoch"])

    @property
    def second_views(self) -> int:
        """Number of epochs with a second view of every sample."""
        return int(np.isfinite(self.curves.get("second_view", np.empty(0))).sum())

    @property
    def second_archive(self) -> ArchiveArgs | None:
        """The archive of second views, if it is not the archive of the first ones."""
        args = self.args
        if not args.second_archive_digest or (self.epochs_done and not self.second_views):
            return None
        name = args.second_archive.rstrip("/").rpartition("/")[2]
        return ArchiveArgs(archive=args.second_archive, archive_digest=args.second_archive_digest, archive_name=name)

    @property
    def spent(self) -> Spent:
        """The run's share of the cost of its group of students, over all its epochs. Unknown if an epoch did not log it."""
        sums = {name: float(self.curves[name].sum()) for name in asdict(NOTHING) if name in self.curves}
        return Spent.of(sums) if self.epochs_done else UNKNOWN

    def logit_moments(self) -> LogitMoments | None:
        """Moments of the student's logits on training views of the last epoch; None if the run has none.

        Reads the file at each call. Raises IntegrityError if it is damaged.
        """
        file = self.folder / MOMENTS
        return _parse(LogitMoments, file, read_json) if file.is_file() else None

    def outputs(self) -> KeptOutputs | None:
        """What the student says of some test images; None if the run kept nothing. Reads and raises as above."""
        file = self.folder / TEST_OUTPUTS
        return KeptOutputs.read(file) if file.is_file() else None

    def teacher_outputs(self) -> KeptOutputs | None:
        """What its teacher says of some test images; None if that is not beside the run. Reads and raises as above."""
        file = self.folder.parent / TEACHER_OUTPUTS
        return KeptOutputs.read(file) if file.is_file() else None

    def test_entropies(self) -> EntropyHistogram | None:
        """Test images by the entropy of the student's output after its last epoch; None if the run has none.

        Reads the file at each call. Raises IntegrityError if it is damaged.
        """
        file = self.folder / ENTROPIES
        return _parse(EntropyHistogram, file, read_json) if file.is_file() else None


def collect(paths: Sequence[Path], *, progress: Progress | None = None) -> list[RunRecord]:
    """All runs at or below `paths`, finished or not, sorted by folder.

    Raises NotFoundError for a path without runs, and IntegrityError, naming the file, for a damaged run.
    """
    progress = progress or Silent()
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        if path.name in BESIDE and path.is_file():  # of runs/*/*
            continue
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
    """Folders with any file of a run, so that a run with a missing file is noticed."""

    def unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for folder, below, files in os.walk(path, onerror=unreadable):
        below[:] = [name for name in below if not is_set_aside(Path(name))]
        if not {ARGS, METRICS, SUMMARY}.isdisjoint(files):
            below.clear()
            yield Path(folder)


def _read_run(folder: Path) -> RunRecord:
    args = _parse(RunArgs, folder / ARGS, read_yaml)
    summary = _parse(Summary, folder / SUMMARY, read_record) if (folder / SUMMARY).exists() else None
    return RunRecord(folder, args, _read_metrics(folder / METRICS, finished=summary is not None), summary)


_Model = TypeVar("_Model", bound=BaseModel)


def _parse(model: type[_Model], path: Path, load: Any) -> _Model:
    try:
        return model.model_validate(load(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc'])) or 'its content'}: {first['msg']}") from None
    except FileNotFoundError:
        raise _damaged(path, "it does not exist") from None
    except ValueError as error:
        raise _damaged(path, (str(error).splitlines() or ["unreadable"])[0]) from None


def _read_metrics(path: Path, *, finished: bool) -> dict[str, NDArray[np.float64]]:
    """Columns of a metrics.jsonl, sorted by epoch. The last line of an epoch counts, since a resume may repeat epochs."""
    if not path.exists() and not finished:
        return {"epoch": np.empty(0)}
    if path.exists() and not path.is_file():
        raise _damaged(path, NO_FILE)
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise _damaged(path, "it does not exist") from None
    if not finished:
        lines.pop()  # empty, or cut off when the run stopped
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
        fix=f"restore it from a copy, or set this run aside and run its distill command again: {set_aside(path.parent)}",
    )
