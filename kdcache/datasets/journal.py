"""The journal of a canvas that is being built: which samples were decoded, and a digest of their pixels, chunk by chunk."""

import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from kdcache.system.documents import parse_json

__all__ = ["Outcome", "journal_line", "npy_header", "resume"]

Outcome = tuple[int, int] | str  # of one sample: original (width, height), or the reason why it cannot be decoded


def resume(folder: Path, identity: dict[str, str], size: int) -> list[Outcome]:
    """The outcomes in an earlier build's journal, with its files truncated to match; or a new empty build.

    Pixels and outcomes that are not what was written, by the digest of each line, are decoded again, and all after them.
    Journals of earlier versions have no digests.
    """
    pixels, journal = folder / "pixels.npy", folder / "journal.jsonl"
    outcomes: list[Outcome] = []
    try:
        first, *lines = journal.read_bytes().split(b"\n")[:-1]  # the last line may have been cut short
        end, listed = len(npy_header(0, size)), len(first) + 1
        with pixels.open("rb") as stored:
            stored.seek(end)
            for line in lines if parse_json(first) == identity else ():
                try:
                    entry = parse_json(line)
                    listing, digest = (entry, None) if isinstance(entry, list) else (entry["outcomes"], entry["blake3"])
                    finished = [each if isinstance(each, str) else _size(*each) for each in listing]
                except (ValueError, TypeError, KeyError):
                    break
                data = stored.read(length := 3 * size * size * sum(not isinstance(each, str) for each in finished))
                if len(data) != length or digest not in {None, _digest(finished, blake3(data))}:
                    break
                outcomes += finished
                end, listed = end + length, listed + len(line) + 1
        if outcomes:
            os.truncate(pixels, end)
            os.truncate(journal, listed)
            return outcomes
    except (FileNotFoundError, IsADirectoryError, ValueError):  # killed before anything was finished
        pass
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    pixels.write_bytes(npy_header(0, size))
    journal.write_text(json.dumps(identity) + "\n")
    return []


def journal_line(outcomes: Sequence[Outcome], pixels: Any) -> bytes:
    """The line of a chunk. `pixels` is the BLAKE3 of its pixels so far, which goes on with the outcomes."""
    return json.dumps({"outcomes": outcomes, "blake3": _digest(outcomes, pixels)}).encode() + b"\n"


def _digest(outcomes: Sequence[Outcome], pixels: Any) -> str:
    pixels.update(json.dumps(outcomes).encode())
    return str(pixels.hexdigest())


def _size(width: int, height: int) -> tuple[int, int]:
    if type(width) is not int or type(height) is not int:
        raise ValueError("the size of an image is two whole numbers")
    return width, height


def npy_header(rows: int, size: int) -> bytes:
    """The header of `pixels.npy`. NumPy pads it, so its length is the same for any number of rows."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (rows, 3, size, size)})
    return header.getvalue()
