"""Images inside tar files, read in place. An index of the members' offsets is made once, and nothing is unpacked."""

import io
import os
import posixpath
import shlex
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from kdcache.datasets import Sample
from kdcache.datasets.fetching import damaged_file
from kdcache.datasets.labels import composed, named_by
from kdcache.datasets.strays import Entry, Strays, undecodable, walked
from kdcache.errors import KdcacheError, UsageError

__all__ = ["Member", "compressed", "in_tar", "members", "samples_in_shard"]

_BLOCK = 512
_PIECE = 1 << 20
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\0": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"\x04\x22\x4d\x18": "unlz4",
}

LARGEST_HEADER = 1 << 20  # bytes of a header's extension, as of a long name
LARGEST_MEMBER = 1 << 30  # bytes


@dataclass(frozen=True)
class Member:
    """The bytes of a regular file inside a tar file."""

    name: str
    file: Path
    offset: int
    size: int

    def read(self) -> bytes:
        self.require_small()
        return self.head(self.size)

    def head(self, count: int) -> bytes:
        """At most the first `count` bytes."""
        with self.file.open("rb") as tar:
            tar.seek(self.offset)
            return tar.read(min(count, self.size))

    def require_small(self) -> None:
        """Raises UsageError for what would take all memory to read."""
        if self.size > LARGEST_MEMBER:
            raise UsageError(
                f"{self.file} has a member {self.name!r} of {self.size:,} bytes",
                why=f"it would be read into memory, and no picture has more than {LARGEST_MEMBER:,} bytes",
                fix="make the tar file again without it",
            )


class _Headers(io.FileIO):
    """A file of which headers are read: a header that claims to be huge is refused before memory is taken for it."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= LARGEST_HEADER:
            raise tarfile.ReadError(f"a header at byte {self.tell():,} claims to have {size:,} bytes")
        return super().read(size) or b""


def members(file: Path, offset: int = 0, size: int | None = None) -> Iterator[Member]:
    """Regular files in an uncompressed tar file, or in an inner tar file of `size` bytes that begins at byte `offset` of `file`.

    Links count as the files that they lead to.
    """
    return (entry.place for entry in _entries(file, offset, size) if entry.place is not None)


def _entries(file: Path, offset: int = 0, size: int | None = None) -> Iterator[Entry[Member | None]]:
    """All members but folders. Files that were appended behind the end mark of another tar file are read too."""
    try:
        with _Headers(file) as whole:
            known: dict[str, Member] = {}
            length = os.fstat(whole.fileno()).st_size
            end = length if size is None else offset + size
            start = -1
            at: int | None = offset
            while at is not None:
                if at == start:
                    raise tarfile.ReadError(f"there is no header of a member at byte {at}")
                start = at
                whole.seek(at)  # tarfile starts at the present position; its offsets count from the file's start
                with tarfile.open(fileobj=whole, mode="r:") as tar:
                    for info in tar:
                        tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps all members, possibly millions
                        if not info.isdir():
                            if not info.issparse():  # whose size is that of the file before it was packed
                                _require_size(info, file, length)
                            yield _entry(info, file, known)
                    at = _next(whole, tar.offset, end)
    except (tarfile.TarError, EOFError) as error:
        raise compressed(file) or damaged_file(file, f"{type(error).__name__}: {error}", fetched=False) from None


def _entry(info: tarfile.TarInfo, file: Path, known: dict[str, Member]) -> Entry[Member | None]:
    name, member, problem = info.name, None, ""
    if info.issparse():
        problem = "a sparse file in a tar file: pack it with tar without --sparse"
    elif info.isreg():
        member = Member(name, file, info.offset_data, info.size)
    elif info.islnk() or info.issym():
        target = info.linkname if info.islnk() else posixpath.join(posixpath.dirname(name), info.linkname)
        found = known.get(posixpath.normpath(target))
        member = None if found is None else Member(name, file, found.offset, found.size)
        problem = "" if member else f"a link to {info.linkname}, which is not before it in the tar file"
    else:
        problem = "not a file"
    if member is not None:
        known[posixpath.normpath(name)] = member
    return Entry(name, member, member.head if member is not None else lambda count: b"", problem)


def _next(whole: io.RawIOBase, at: int, end: int) -> int | None:
    """Where another tar file begins behind the end mark, or what tarfile stopped at is damaged; None if there are but zeros."""
    whole.seek(at)
    while at < end:
        piece = whole.read(min(_PIECE, end - at))
        if not piece:
            return None
        if filled := piece.strip(b"\0"):
            return at + piece.index(filled[:1]) // _BLOCK * _BLOCK
        at += len(piece)
    return None


def compressed(file: Path) -> KdcacheError | None:
    """The error for a tar file that is compressed; None for others."""
    with file.open("rb") as opened:
        head = opened.read(8)
    program = next((program for start, program in _COMPRESSED.items() if head.startswith(start)), None)
    if program is None:
        return None
    plain = file.with_name(file.name.removesuffix(".tar").partition(".tar")[0].removesuffix(".tgz") + ".tar")
    if plain == file:
        plain = file.with_name(f"{file.name.removesuffix('.tar')}-plain.tar")
    return UsageError(
        f"{file} is compressed",
        why="images are read in place, which takes an uncompressed tar file; images hardly shrink",
        fix=f"write an uncompressed one: {program} -c < {shlex.quote(str(file))} > {shlex.quote(str(plain))}, "
        "and keep the other one elsewhere",
    )


def _require_size(member: tarfile.TarInfo, file: Path, length: int) -> None:
    """Refuse by its name a member that is not all there."""
    if member.size > length - member.offset_data:
        raise damaged_file(file, f"its member {member.name!r} claims {member.size:,} bytes, more than there are in the file")


def in_tar(member: Member) -> Callable[[], Image.Image]:
    """A function that opens the image inside a tar file. Raises UsageError for a member that is too large to be one."""
    member.require_small()
    return lambda: Image.open(io.BytesIO(member.read()))


def samples_in_shard(shard: Path, names: list[str], strays: Strays) -> list[Sample]:
    """The samples of a shard as webdataset has them: an image and a .cls with the number or name of its class under one key.

    A key is the name up to its last dot, or up to the first one, as webdataset has it, where that is no other image's. Members
    that are no samples are counted in `strays`. Raises UsageError for names that are there twice and for images without a label.
    """
    labels: dict[str, int] = {}
    images: dict[str, Entry[Member | None]] = {}
    others: list[Entry[Member | None]] = []
    number = named_by(names)
    for entry in _entries(shard):
        if PurePosixPath(entry.name).suffix.lower() == ".cls" and entry.place is not None and not _hidden(entry.name):
            key = _key(entry.name)
            if key in labels:
                raise _doubled(shard, key, entry.name, "a label")
            labels[key] = _label(shard, entry.place, number, len(names))
        else:
            others.append(entry)
    for entry in walked(others, strays):
        key = _key(entry.name)
        if key in images:
            raise _doubled(shard, key, entry.name, images[key].name)
        images[key] = entry
    keys = _matched(shard, images, labels, strays)
    return [
        Sample(
            f"{shard.stem}/{key}",
            label,
            undecodable(entry.problem) if entry.place is None or entry.problem else in_tar(entry.place),
        )
        for key, label, entry in keys
    ]


def _matched(
    shard: Path, images: dict[str, Entry[Member | None]], labels: dict[str, int], strays: Strays
) -> list[tuple[str, int, Entry[Member | None]]]:
    """(key, label, image) in the order of the images."""
    own = images.keys() & labels.keys()
    by_short: dict[str, list[str]] = {}
    for key in images:
        if key not in own and (short := _short(key)) in labels and short not in own:
            by_short.setdefault(short, []).append(key)
    samples, used = [], set(own)
    for key, entry in images.items():
        short = _short(key)
        if key in own:
            samples.append((key, labels[key], entry))
        elif short in own:  # of a sample that has its image: a mask or the like
            strays.add(f"further images of samples, *.{key.removeprefix(short).strip('.')}.*"[:60])
        elif short in labels:
            if len(by_short[short]) > 1:
                first, second = (images[each].name for each in by_short[short][:2])
                raise UsageError(
                    f"{shard}: {first} and {second} share the label {short}.cls",
                    why="a sample has one image; its key is the name up to a dot",
                    fix=f"write a label for each, {by_short[short][0]}.cls and so on, or one image of each sample",
                )
            used.add(short)
            samples.append((short, labels[short], entry))
        else:
            raise UsageError(
                f"{shard}: {entry.name} has an image without a label",
                why=f"there is no {key}.cls" + (f" nor {short}.cls" if short != key else "") + " in the same shard",
                fix="write one, with the number or the name of its class, or leave the image out",
            )
    if left := sorted(labels.keys() - used):
        raise UsageError(
            f"{shard}: {left[0]}.cls has a label without an image",
            why="no member of that key is an image, by its ending or its first bytes",
            fix="add the image to the same shard, or leave the label out",
        )
    return samples


def _hidden(name: str) -> bool:
    return any(part.startswith(".") and part != ".." for part in PurePosixPath(name).parts)


def _key(name: str) -> str:
    """A member's name without its ending."""
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix else str(path)


def _short(key: str) -> str:
    """A key as webdataset has it, up to the first dot of the file's name."""
    path = PurePosixPath(key)
    return str(path.parent / path.name.partition(".")[0])


def _doubled(shard: Path, key: str, name: str, earlier: str) -> UsageError:
    return UsageError(
        f"{shard}: {name} is the second one of its kind for the key {key}, after {earlier}",
        why="keys are the samples' names, and one would hide the other",
        fix="rename one of the samples, with its label",
    )


def _label(shard: Path, member: Member, number: dict[str, int], classes: int) -> int:
    text = member.head(4096).decode("utf-8", "replace").strip()
    if text.isascii() and text.isdigit() and len(text) <= 20 and int(text) < classes:
        return int(text)
    if composed(text) in number:
        return number[composed(text)]
    from_one = " (are they numbered from 1 on?)" if text == str(classes) else ""
    raise UsageError(
        f"{shard}: {member.name} holds {text[:40]!r}, not the number or name of one of {classes} classes",
        why=f"classes are numbered from 0 to {classes - 1}{from_one}, and named in class_names.txt",
        fix="correct the label, or name all classes in class_names.txt",
    )
