"""What only a GPU can tell of kdcache: checks by name, each with its bounds, the most valuable first.

A check that raises is an entry of the report, and the others go on. The report is written anew after every check, so that a
run that is killed has left what it found.
"""

import gc
import importlib
import json
import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from kdcache.bench.gpu.measuring import Found, NotHereError, Setting
from kdcache.bench.turns import Result
from kdcache.errors import NotFoundError, UsageError, unknown_name
from kdcache.system.files import write_atomically
from kdcache.system.progress import Progress, Silent
from kdcache.workspace import versions

__all__ = ["CHECKS", "Check", "Outcome", "Report", "run_checks"]


@dataclass(frozen=True)
class Check:
    """A check is `function` of a module of this package; `usual` seconds are what it takes, as far as is known."""

    name: str
    module: str
    function: str
    usual: float

    def run(self, setting: Setting) -> Found:
        found: Found = getattr(importlib.import_module(f"kdcache.bench.gpu.{self.module}"), self.function)(setting)
        return found


CHECKS = (
    Check("bytes", "rendering", "equal_bytes", 120),
    Check("numerics", "teachers", "numerics", 20),
    Check("waits", "students", "no_waits", 10),
    Check("resume", "students", "resume", 10),
    Check("launches", "rendering", "launches", 20),
    Check("smoothing", "students", "smoothing", 10),
    Check("streams", "rendering", "streams", 20),
    Check("views", "rendering", "views", 40),
    Check("dump", "teachers", "dump", 60),
    Check("step", "students", "step", 40),
    Check("graph", "runs", "graph", 60),
    Check("packed", "runs", "packed", 60),
    Check("processes", "runs", "processes", 60),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a check: `found`, `left out` or `failed`, with the reason."""

    name: str
    state: Literal["found", "left out", "failed"]
    seconds: float = 0.0
    results: list[Result] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    reason: str = ""

    @property
    def missed(self) -> list[Result]:
        """The results beyond their bounds; one that is not a number is."""
        return [result for result in self.results if not result.value <= result.bound]


@dataclass
class Report:
    """The outcomes so far, and of which machine they are."""

    machine: dict[str, Any]
    outcomes: list[Outcome] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        checks = [asdict(outcome) | {"missed": [each.name for each in outcome.missed]} for outcome in self.outcomes]
        return {"machine": self.machine, "checks": checks}


def run_checks(
    only: Sequence[str],
    seconds: float,
    progress: Progress | None = None,
    *,
    budget: float | None = None,
    output: Path | None = None,
    device: str = "cuda",
    tiny: bool = False,
) -> Report:
    """Run all checks, or `only` some, each measuring for about `seconds`. `output` has the report as JSON after each of them.

    A check is begun only while the time that it usually takes is left of the `budget`, in seconds. Raises NotFoundError where
    there is no GPU, and UsageError for an unknown name. `device` and `tiny` are for tests.
    """
    chosen = _chosen(only)
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise NotFoundError(
            "no GPU on this machine",
            why="kdcache bench gpu measures what only a GPU can tell, and torch finds none",
            fix="kdcache doctor says why, if there is one; on a CPU: kdcache bench views, dump or distill",
        )
    progress, begun = progress or Silent(), time.monotonic()
    report = Report(_machine(where))
    _write(report, output)  # now, as the place may not be one to write to
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-gpu-") as folder:
        setting = Setting(where, Path(folder), seconds, progress, tiny)
        for check in chosen:
            left = None if budget is None else budget - (time.monotonic() - begun)
            if left is not None and left < check.usual:
                reason = f"{max(left, 0):.0f} s are left of --budget {budget:g}, and it takes about {check.usual:g} s"
                report.outcomes.append(Outcome(check.name, "left out", reason=reason))
            else:
                report.outcomes.append(_outcome(check, setting))
            _write(report, output)
    return report


def _chosen(only: Sequence[str]) -> list[Check]:
    known = {check.name: check for check in CHECKS}
    for name in only:
        if name not in known:
            raise unknown_name("check of bench gpu", name, known)
    return [check for check in CHECKS if not only or check.name in only]


def _outcome(check: Check, setting: Setting) -> Outcome:
    begun = time.monotonic()
    try:
        found = check.run(setting)
        outcome = Outcome(check.name, "found", results=found.results, details=found.details)
    except NotHereError as error:
        outcome = Outcome(check.name, "left out", reason=str(error))
    except Exception as error:  # whatever it is, the other checks may still tell something
        lines = str(error).strip().splitlines() or [""]
        outcome = Outcome(check.name, "failed", reason=f"{type(error).__name__}: {lines[0]}"[:500])
    if setting.gpu:  # the next check is to begin with what this one began with
        gc.collect()
        torch.cuda.empty_cache()
    return Outcome(**vars(outcome) | {"seconds": round(time.monotonic() - begun, 1)})


def _machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"device": str(device), "versions": versions(), "cuda": torch.version.cuda}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "gpus": torch.cuda.device_count(),
        }
    return found


def _write(report: Report, output: Path | None) -> None:
    if output is None:
        return
    if output.is_dir():
        raise UsageError(
            f"--output {output}",
            why="it is a folder, and the report is a file",
            fix=f"--output {shlex.quote(str(output / 'gpu.json'))}",
        )
    write_atomically(output, (json.dumps(report.as_json(), indent=1, default=str) + "\n").encode())
