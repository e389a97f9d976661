"""The table of results over seeds, and tests whether a difference is more than seed noise."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
from numpy.typing import NDArray

from kdcache.report.records import STUDENT, RunArgs, RunRecord
from kdcache.training.config import TrainConfig
from kdcache.views.tested import WHOLE

__all__ = [
    "ONE_SEED",
    "ROW_FIELDS",
    "UNPAIRED",
    "Cell",
    "PairedDifference",
    "Row",
    "Table",
    "labels",
    "paired",
    "signed",
    "summarise",
]

ROW_FIELDS = ("dataset", "teacher", "student", "method", "control", "setting")
# Two runs are seeds of one experiment if they share these settings, the row and tau.
RECIPE = ("archive_digest", "second_archive_digest", "average", "epochs", "batch_size", "opt", "lr", "weight_decay")
FOLLOWS_OPT = ("lr", "weight_decay")
# Keys that would not change a result, or only tell what another key says already (weights that a seed draws, for one).
_HOW = {"workers", "threads", "processes", "compile", "channels_last", "val_interval", "host", "hostname", "graph"}
_WHERE = {"home", "data_dir", "out", "output", "run", "run_name", "folder"}
_SAID = {"init_top1", "student_weights_sha256", "student_licence", "teacher_name", "batch_order"}
HARMLESS = frozenset(_HOW | _WHERE | _SAID)
_SHOWN = {
    "archive_digest": "archive",
    "second_archive_digest": "second views",
    "init_sha256": "weights",
    "batch_size": "batch",
    "weight_decay": "wd",
}
_CONTROLS = ("none", "ls-global", "ls-instance")  # these come first, in this order
# For args.yaml of before, which lack the newer options, and for what is only written where it is not usual.
BEFORE = {
    **TrainConfig(epochs=1).model_dump(mode="json", exclude=set(RunArgs.model_fields)),
    "amp": False,  # where nobody asked, a run records what its device made of it
    "opt_betas": "",
    "head_init": "timm",
    "init": "random",
    "init_sha256": None,
    "share_order": False,
    "allow_drift": 0,
    "moved_from": None,
    "test": WHOLE.title,
    "student_size": "the teacher's",
}
CONFIDENCE = 0.95
UNPAIRED = "the two share no seed, so they cannot be paired"
ONE_SEED = "one seed: no spread can be given"


@dataclass(frozen=True)
class Row:
    """One line of the table. `setting` names what else differs between runs of this dataset and teacher."""

    dataset: str
    teacher: str
    student: str
    method: str
    control: str
    setting: str = ""

    @property
    def baseline(self) -> bool:
        """Whether these are the students that others are compared with: of the same recipe, from labels alone."""
        return self.method == STUDENT

    @property
    def order(self) -> tuple[object, ...]:
        first = _CONTROLS.index(self.control) if self.control in _CONTROLS else len(_CONTROLS)
        method = (not self.baseline, self.method != "kd", natural(self.method))
        return self.dataset, self.teacher, self.student, natural(self.setting), method, first, natural(self.control)


@dataclass(frozen=True, eq=False)
class Cell:
    """The complete runs of one row at one tau, one per seed, sorted by seed."""

    runs: tuple[RunRecord, ...]

    @cached_property
    def values(self) -> dict[int, float]:
        """Final test top-1 in percent, by seed."""
        return {run.args.seed: run.final_top1 for run in self.runs if run.final_top1 is not None}

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.values.values())))

    @property
    def std(self) -> float | None:
        """Standard deviation of top-1 over the seeds (ddof 1), in points; None for a single seed."""
        return float(np.std(list(self.values.values()), ddof=1)) if self.n > 1 else None

    @property
    def own_temperature(self) -> bool:
        """Whether the method finds its own temperature and ignores tau."""
        return all(run.args.own_temperature for run in self.runs)

    @property
    def without_teacher(self) -> bool:
        return all(run.args.without_teacher for run in self.runs)

    def curve(self, column: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(epochs at which every seed has a value of `column`, mean over the seeds)."""
        curves = [(run.curves["epoch"], run.curves.get(column, np.empty(0))) for run in self.runs]
        known = [epoch[: len(values)][np.isfinite(values)] for epoch, values in curves]
        shared = reduce(np.intersect1d, known)
        values = [values[np.isin(epoch[: len(values)], shared)] for epoch, values in curves]
        return shared, np.mean(values, axis=0)

    @property
    def source(self) -> str:
        """Origin of the numbers: run folders by seed, and digests of the archives."""
        folders = ", ".join(f"seed {run.args.seed} {'/'.join(run.folder.parts[-2:])}" for run in self.runs)
        return f"{folders}; archive {', '.join(dict.fromkeys(run.args.archive_digest for run in self.runs))}"

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" ± {self.std:.2f}" if self.std is not None else "") + f" ({self.n})"

    @property
    def spoken(self) -> str:
        return f"{self.mean:.2f}" + (f" ± {self.std:.2f}" if self.std is not None else "") + f" %, n = {self.n}"


@dataclass(frozen=True)
class Table:
    """Cells by row and tau. A cell without a complete run is missing."""

    rows: tuple[Row, ...]
    taus: tuple[float, ...]
    cells: Mapping[tuple[Row, float], Cell]
    row_of: Mapping[RunRecord, Row]
    repeated: tuple[RunRecord, ...] = ()  # complete runs that a newer run of the same row, tau and seed replaces

    def get(self, row: Row, tau: float) -> Cell | None:
        return self.cells.get((row, tau))

    def ranked(self, row: Row) -> list[tuple[float, Cell]]:
        """(tau, cell) pairs of a row, best mean first."""
        pairs = [(tau, self.cells[row, tau]) for tau in self.taus if (row, tau) in self.cells]
        return sorted(pairs, key=lambda item: -item[1].mean)

    def taus_of(self, rows: Iterable[Row]) -> list[float]:
        """Sorted taus at which any of `rows` has a result."""
        wanted = set(rows)
        return sorted({tau for row, tau in self.cells if row in wanted})


@dataclass(frozen=True)
class PairedDifference:
    """Mean difference of two cells over their shared seeds, in points, with its 95 % t interval (None for one seed)."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def significant(self) -> bool:
        return self.low is not None and self.high is not None and not self._no_spread and not self.low <= 0.0 <= self.high

    @property
    def _no_spread(self) -> bool:
        """Whether all seeds have the same difference. It can happen by chance: top-1 moves in steps of one test image."""
        return self.low is not None and self.high is not None and self.high - self.low < 1e-9

    @property
    def verdict(self) -> str:
        if self.low is None:
            return ONE_SEED
        if self._no_spread:
            return "the same in every seed: no spread to judge it by"
        return "more than seed noise" if self.significant else "no significant difference"

    @property
    def tied(self) -> bool:
        """Whether the cells tie: the mean is 0, or the interval contains 0. A single seed ties only with an equal value."""
        return self.mean == 0 or (self.low is not None and not self._no_spread and not self.significant)

    @property
    def interval(self) -> str:
        return f"{signed(self.low)} to {signed(self.high)}" if self.low is not None and self.high is not None else ""

    def __str__(self) -> str:
        interval = f"95 % t interval {self.interval} over {self.n} paired seeds: " if self.interval else ""
        return f"{signed(self.mean)} points, {interval}{self.verdict}"


def summarise(records: Sequence[RunRecord], training: Mapping[str, str] | None = None) -> Table:
    """Table of final test top-1 per row and tau, from complete runs only. Missing cells stay missing.

    `training` maps archive digests to the teacher's training, to name rows that differ only in their archive.
    """
    rows = _rows_of(records, training or {})
    cells: dict[tuple[Row, float], dict[int, RunRecord]] = defaultdict(dict)
    repeated = []
    for record in sorted(records, key=lambda r: (r.args.created, r.folder)):
        if record.status == "complete":
            seeds = cells[rows[record], record.args.tau]
            if record.args.seed in seeds:
                repeated.append(seeds[record.args.seed])
            seeds[record.args.seed] = record
    return Table(
        rows=tuple(sorted(set(rows.values()), key=lambda row: row.order)),
        taus=tuple(sorted({record.args.tau for record in records})),
        cells={key: Cell(tuple(seeds[seed] for seed in sorted(seeds))) for key, seeds in cells.items()},
        row_of=rows,
        repeated=tuple(repeated),
    )


def _rows_of(records: Sequence[RunRecord], training: Mapping[str, str]) -> dict[RunRecord, Row]:
    """The row of each run.

    Runs with different recipes are not seeds of one experiment, so the difference goes into the row's setting. So does
    any other key of args.yaml that alone distinguishes two runs of the same tau and seed. If every optimiser has one
    learning rate and one weight decay, the setting names only the optimiser.
    """
    seen: dict[tuple[object, ...], set[str]] = defaultdict(set)
    of_opt: dict[tuple[str, ...], set[float]] = defaultdict(set)
    for record in records:
        for name in FOLLOWS_OPT:
            of_opt[record.args.dataset, record.args.teacher, record.args.opt, name].add(getattr(record.args, name))
        for name, value in _facts(record).items():
            seen[_place(record, name)].add(value)
    rows = {}
    for record in records:
        args = record.args
        varied = {name: value for name, value in _facts(record).items() if len(seen[_place(record, name)]) > 1}
        if "opt" in varied:
            for name in FOLLOWS_OPT:
                if len(of_opt[args.dataset, args.teacher, args.opt, name]) == 1:
                    varied.pop(name, None)
        if varied.get("init_sha256") == "none":  # weights of no file
            del varied["init_sha256"]
        phrases = {name: f"{_SHOWN.get(name, name)} {value}" for name, value in varied.items() if value}  # others have it
        if "archive_digest" in phrases and (known := training.get(args.archive_digest)):
            phrases["archive_digest"] = f"{known} ({phrases['archive_digest']})"
        setting = ", ".join(phrases.values())
        rows[record] = Row(args.dataset, args.teacher, args.student, args.method_spec, args.control_spec, setting)
    return rows


def _facts(record: RunRecord) -> dict[str, str]:
    """Recipe keys, then the keys that kdcache.report does not know, as text."""
    facts = BEFORE | {name: getattr(record.args, name) for name in RECIPE} | (record.args.model_extra or {})
    facts |= {name: str(value)[:8] for name, value in facts.items() if value and name.endswith(("_digest", "_sha256"))}
    return {
        name: "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        for name, value in facts.items()
        if isinstance(value, str | int | float | None) and name not in HARMLESS
    }


def _place(record: RunRecord, name: str) -> tuple[object, ...]:
    """The group of runs within which a key must vary to count as a difference."""
    args = record.args
    study = (name, args.dataset, args.teacher)
    if name in RECIPE:
        return study
    recipe = (getattr(args, key) for key in RECIPE)
    return *study, args.student, args.method_spec, args.control_spec, args.tau, args.seed, *recipe


def paired(first: Cell, second: Cell) -> PairedDifference | None:
    """`first` minus `second` over their shared seeds; None if they share none."""
    from scipy.special import stdtrit  # Student's t; scipy.stats would take a second to import

    seeds = sorted(first.values.keys() & second.values.keys())
    if not seeds:
        return None
    difference = np.array([first.values[seed] - second.values[seed] for seed in seeds])
    mean, n = float(difference.mean()), len(seeds)
    if n == 1:
        return PairedDifference(mean, None, None, n)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * float(difference.std(ddof=1)) / math.sqrt(n)
    return PairedDifference(mean, mean - half, mean + half, n)


def labels(rows: Sequence[Row], fields: Sequence[str]) -> dict[Row, str]:
    """A short name for each row: its values of the `fields` in which the rows differ."""
    differ = [field for field in fields if len({getattr(row, field) for row in rows}) > 1]
    return {row: ", ".join(filter(None, (getattr(row, field) for field in differ))) for row in rows}


def natural(text: str) -> tuple[tuple[float, str], ...]:
    """Sort key that compares numbers by value: bottom:5 before bottom:20."""
    return tuple((float(part), "") if part[:1].isdigit() else (math.inf, part) for part in re.findall(r"\d+(?:\.\d+)?|\D+", text))


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
