"""Files that carry the digest of their own bytes, so that a changed bit is noticed when they are read.

A seal is a BLAKE3 of all bytes of a file, computed with 64 zeros in its own place. It is part of the file, and so is written
with it or not at all. Files without one are of earlier versions, and are read as they are.
"""

import json
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from kdcache.system.files import Buffers

__all__ = [
    "SEAL",
    "WEIGHTS_SEALS",
    "BrokenSealError",
    "require_sealed",
    "seal_of",
    "sealed_record",
    "sealed_tensors",
    "sealed_zip",
    "unsealed",
    "unsealed_zip",
]

SEAL = "record_blake3"
WEIGHTS_SEALS = "weights_blake3"  # in the record of a folder: the seals of its weights, by the names of their files
_BLANK = b"0" * 64
_END_OF_ZIP, _END_SIZE = b"PK\x05\x06", 22  # the last record of a zip file, and its bytes without a comment
_COMMENT = f"{SEAL}:".encode()


class BrokenSealError(ValueError):
    """The bytes of a file are not those that were written."""

    def __init__(self) -> None:
        super().__init__("its bytes have changed since it was written: their BLAKE3 is not the one in it")


def _digest(data: Any, place: int) -> bytes:
    view = memoryview(data)
    digest = blake3(view[:place])
    digest.update(_BLANK)
    digest.update(view[place + len(_BLANK) :])
    view.release()
    return digest.hexdigest().encode()


def _sealed(data: bytes | bytearray, place: int) -> Buffers:
    view = memoryview(data)
    return [view[:place], _digest(data, place), view[place + len(_BLANK) :]]


def _require(data: Any, place: int) -> None:
    if place < 0 or data[place : place + len(_BLANK)] != _digest(data, place):
        raise BrokenSealError


def _named(names: Iterable[str]) -> bool:
    """Whether a seal is among the names of a record; BrokenSealError for a name in which a letter of it has changed."""
    names = list(names)
    if any(len(name) == len(SEAL) and sum(a != b for a, b in zip(name, SEAL, strict=True)) == 1 for name in names):
        raise BrokenSealError
    return SEAL in names


# ---------------------------------------------------------------- JSON


def sealed_record(record: Mapping[str, Any], *, indent: int | None = 1) -> bytes:
    """A record as JSON that ends with its seal."""
    data = (json.dumps({**record, SEAL: _BLANK.decode()}, indent=indent) + "\n").encode()
    return b"".join(_sealed(data, data.rindex(_BLANK)))


def unsealed(record: dict[str, Any], data: bytes) -> dict[str, Any]:
    """The `record` in the JSON text `data`, without its seal. BrokenSealError if it is not what was written."""
    if not _named(record):
        return record
    mark = f'"{SEAL}": "'.encode()
    found = data.rfind(mark)
    _require(data, found + len(mark) if found >= 0 else -1)
    return {key: value for key, value in record.items() if key != SEAL}


# ---------------------------------------------------------------- safetensors


def sealed_tensors(data: bytes, about: Mapping[str, str] | None = None) -> Buffers:
    """The bytes of a safetensors file without metadata, with `about` and its seal as those.

    safetensors itself writes several of them in an order that differs each time.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    metadata = {"format": "pt", **(about or {}), SEAL: _BLANK.decode()}  # the format is what transformers asks for
    stated = json.dumps({"__metadata__": metadata}, separators=(",", ":")).encode()
    tensors = data[8:end].strip()[1:]
    header = stated[:-1] + (b"," if tensors != b"}" else b"") + tensors
    header += b" " * (-len(header) % 8)
    head = len(header).to_bytes(8, "little") + header
    place, rest = head.rindex(_BLANK, 0, 8 + len(stated)), memoryview(data)[end:]
    digest = blake3(head)
    digest.update(rest)
    return [head[:place], digest.hexdigest().encode(), head[place + len(_BLANK) :], rest]


def require_sealed(file: Path) -> None:
    """BrokenSealError if a safetensors file is not what was written, by its seal. ValueError for a file of another kind."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError("it was cut off")
        header = opened.read(length)
        try:
            content = json.loads(header)
        except RecursionError:
            raise ValueError("its header is nested too deeply") from None
        metadata = content.get("__metadata__") if isinstance(content, dict) else None
        if not isinstance(metadata, dict) or not _named(metadata):
            return
        mark = f'"{SEAL}":"'.encode()
        found = header.find(mark)
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _require(data, 8 + found + len(mark) if found >= 0 else -1)


def seal_of(file: Path) -> str | None:
    """The seal in a safetensors file, which is not compared with its bytes; None if it has none, or is of another kind."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            metadata = json.loads(opened.read(length) if length <= file.stat().st_size else b"").get("__metadata__")
        except (ValueError, AttributeError):
            return None
    return metadata.get(SEAL) if isinstance(metadata, dict) else None


# ---------------------------------------------------------------- zip files, as torch.save writes them


def sealed_zip(data: bytes | memoryview) -> Buffers:
    """The bytes of a zip file without a comment, with its seal as the comment."""
    comment = _COMMENT + _BLANK
    whole = bytearray(data)
    whole[-2:] = len(comment).to_bytes(2, "little")
    whole += comment
    return _sealed(whole, len(whole) - len(_BLANK))


def unsealed_zip(data: bytes) -> bytes:
    """The same bytes. BrokenSealError for a zip file with a seal that is not what was written."""
    if data[-_END_SIZE : -_END_SIZE + 4] == _END_OF_ZIP and data[-2:] == b"\0\0":
        return data  # without a comment
    if not data.startswith(b"PK"):
        return data  # of another kind, which its reader says
    place = len(data) - len(_BLANK)
    _require(data, place if data[:place].endswith(_COMMENT) else -1)
    return data
