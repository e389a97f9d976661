"""The presets beside what was published: the table in PRESETS.md, read, and the presets' own values under its names."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kdcache.methods.presets import Preset

__all__ = ["Published", "ours", "published"]

TABLE = Path(__file__).with_name("PRESETS.md")
Values = dict[str, float]


@dataclass(frozen=True)
class Published:
    """A row of the table. `paper` and `code` are empty where nothing is stated there, or it could not be read.

    `differs`: the values in which the preset is not as published; `note` says why, or what to know of the source.
    """

    preset: str
    paper: Values
    code: Values
    ours: Values  # as the table says; a test compares it with the preset
    note: str
    differs: tuple[str, ...] = ()


@cache
def published() -> dict[str, Published]:
    """The table by name of the preset."""
    lines = [line for line in TABLE.read_text("utf-8").splitlines() if line.startswith("| paper:")]
    return {row.preset: row for row in map(_row, lines)}


def _row(line: str) -> Published:
    name, paper, code, here, note = line.strip("| ").split(" | ")
    return Published(name, _values(paper), _values(code), _values(here), note, _differs(note))


def _values(text: str) -> Values:
    return {key: float(value) for key, value in (item.split("=") for item in text.split() if item != "-")}


def _differs(note: str) -> tuple[str, ...]:
    found = re.match(r"differs: ([\w, ]+)\.", note)
    return tuple(found[1].split(", ")) if found else ()


def ours(preset: Preset) -> Values:
    """A preset's values under the names of the table."""
    built: Any = preset.build()
    if preset.name.split(":")[1] in {"ttm", "wttm"}:
        return {"gamma": 1 / preset.tau, "beta": built.kd_weight, "ce": built.ce_weight}
    values = {"kd": built.kd_weight, "ce": built.ce_weight} | ({"tau": preset.tau} if built.uses_tau else {})
    own = {"warmup": "warmup_epochs", "ramp": "lambda_epochs", "te": "entropy_tau", "bound": "entropy_bound"}
    for name in ("alpha", "beta", "gamma", *own):
        value = getattr(built, own.get(name, name), None)
        if isinstance(value, int | float):
            values[name] = value
    return values
