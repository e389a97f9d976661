"""Weights in the folder of a run or teacher, against the record beside them."""

from collections.abc import Mapping
from pathlib import Path

from kdcache.errors import IncompatibleError
from kdcache.system.documents import read_record
from kdcache.system.files import set_aside
from kdcache.system.seals import WEIGHTS_SEALS, seal_of

__all__ = ["require_recorded"]

RECORDS = ("teacher.json", "summary.json")  # which say what weights are beside them


def require_recorded(file: Path) -> None:
    """Raise IncompatibleError for weights in the folder of a run or teacher that are not those of the record beside them.

    Seals are compared; `kdcache.models.checkpoints.read_weights` compares the bytes with their seal too.
    """
    for record in RECORDS:
        try:
            seals = read_record(file.parent / record).get(WEIGHTS_SEALS)
        except (OSError, ValueError):  # it is none of kdcache's, or one that its own reader refuses
            continue
        if isinstance(seals, Mapping) and file.stem in seals and seals[file.stem] != seal_of(file):
            raise IncompatibleError(
                f"{file} is not the file that its record describes",
                why=f"the BLAKE3 of these weights differs from {record}: they were exchanged, or written by another program",
                fix=f"restore the file from a copy; or set the folder aside, and train it again: {set_aside(file.parent)}",
            )
