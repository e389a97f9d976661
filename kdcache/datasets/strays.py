"""Which files of a folder or tar file are images, and what becomes of all others.

A file is an image by its ending, or else by its first bytes. What computers leave beside images (thumbnails of a NAS, resource
forks) is known and no sample. An image that cannot be decoded here is a sample all the same, which the canvas names. All else is
counted, so that nothing is lost without a word.
"""

import functools
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Generic, NoReturn, TypeVar

from PIL import Image

__all__ = ["IMAGE_SUFFIXES", "Entry", "Strays", "folder_entries", "image_kind", "is_known", "undecodable", "walked"]

# Suffixes of image files. Pillow's own list contains formats that it cannot decode (.mpg, .eps, .h5), and it differs
# between versions, while a dataset must not change with the version.
# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pcx", ".pfm", ".pgm",
    ".png", ".pnm", ".ppm", ".sgi", ".tga", ".tif", ".tiff", ".webp",
})
# Suffixes of images that Pillow does not decode by itself, with the names of their formats.
_UNDECODABLE = {
    ".heic": "HEIC", ".heif": "HEIF", ".hif": "HEIF", ".jxl": "JPEG XL", ".jxr": "JPEG XR", ".wdp": "JPEG XR", ".dcm": "DICOM",
    ".dicom": "DICOM", ".exr": "OpenEXR", ".hdr": "Radiance HDR", ".psd": "Photoshop", ".svg": "SVG", ".svgz": "SVG",
}
# Raw photographs are TIFF files to Pillow, which would take the thumbnail inside for the picture.
_RAW = frozenset({
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".erf", ".iiq", ".kdc", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf",
    ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f",
})
# Text and the like: counted without opening them, as there may be one beside every image.
_NEVER = frozenset({
    ".cfg", ".cls", ".csv", ".htm", ".html", ".ini", ".json", ".jsonl", ".log", ".md", ".py", ".toml", ".tsv", ".txt", ".xml",
    ".yaml", ".yml",
})
# What computers leave in any folder. Compared in lower case; names with these beginnings are known, too.
_KNOWN = frozenset({
    ".ds_store", ".localized", ".nomedia", ".directory", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r",
    "zbthumbnail.info", ".picasa.ini", "picasa.ini", ".gitkeep", ".gitignore", ".gitattributes", ".keep", ".bridgesort",
})
_KNOWN_FOLDERS = frozenset({
    "@eadir", "#recycle", "#snapshot", "@tmp", "@recycle", "@recently-snapshot", "__macosx", "lost+found", "$recycle.bin",
    "system volume information", "__pycache__", ".appledouble", ".thumbnails", ".ipynb_checkpoints",
})
_KNOWN_BEGINNINGS = ("._", ".fuse_hidden", ".nfs", ".trash", "~$")
# fmt: on
_HEAD = 144  # bytes that tell every kind below
_HEADINGS = 20  # of counted files; a data set may have as many endings as files
_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_BMP_HEADERS = {12, 16, 40, 52, 56, 64, 108, 124}  # bytes

_HIDDEN = "a hidden folder"

_Place = TypeVar("_Place")


@dataclass(frozen=True)
class Entry(Generic[_Place]):
    """What has a `name` (with / between folders) in a folder or tar file; `head` reads its first bytes, or raises OSError.

    `problem`: why it has none, as it is no file.
    """

    name: str
    place: _Place
    head: Callable[[int], bytes]
    problem: str = ""


class Strays:
    """Counts files that are no samples, by what they are."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, heading: str) -> None:
        self._counts[heading] += 1

    def counts(self) -> dict[str, int]:
        """Numbers of files by heading, the largest first; a rest of many headings is one."""
        ordered = sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        kept, rest = dict(ordered[:_HEADINGS]), sum(count for _, count in ordered[_HEADINGS:])
        return kept | ({"others": kept.get("others", 0) + rest} if rest else {})


def is_known(name: str, *, folder: bool = False) -> bool:
    """Whether a file or folder of that name is no data for certain, but what an operating system or a NAS leaves."""
    lower = name.lower()
    if folder and lower in _KNOWN_FOLDERS:
        return True
    return lower in _KNOWN or lower.startswith(_KNOWN_BEGINNINGS)


def image_kind(head: bytes) -> tuple[str, bool] | None:
    """The format of an image that begins with `head`, and whether Pillow decodes it; None for what is no known image."""
    for start, name, decoded in (
        (b"\xff\xd8\xff", "JPEG", True),
        (b"\x89PNG\r\n\x1a\n", "PNG", True),
        (b"GIF87a", "GIF", True),
        (b"GIF89a", "GIF", True),
        (b"II*\0", "TIFF", True),
        (b"MM\0*", "TIFF", True),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000", True),
        (b"\xffO\xffQ", "JPEG 2000", True),
        (b"\xff\x0a", "JPEG XL", False),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL", False),
        (b"8BPS", "Photoshop", False),
        (b"v/1\x01", "OpenEXR", False),
        (b"#?RADIANCE", "Radiance HDR", False),
    ):
        if head.startswith(start):
            return name, decoded
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP", True
    if head[4:8] == b"ftyp":
        brands = {head[i : i + 4] for i in (8, *range(16, min(len(head), int.from_bytes(head[:4], "big")) - 3, 4))}
        if brands & {b"avif", b"avis"}:
            return "AVIF", True
        return ("HEIC", False) if brands & _BRANDS else None
    if head[:2] == b"BM" and head[6:10] == b"\0\0\0\0" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "BMP", True
    if re.match(rb"P[1-6]\s+(#|\d+\s)", head):
        return "PNM", True
    if head[128:132] == b"DICM":
        return "DICOM", False
    return None


def folder_entries(base: Path) -> Iterator[Entry[Path]]:
    """All that lies below `base`, but known strays. Links are followed, but not in circles. Raises OSError for the unreadable."""
    waiting = [(base, "", _inodes(base))]
    while waiting:
        folder, within, above = waiting.pop()
        with os.scandir(folder) as found:
            for entry in found:
                name, path = within + entry.name, folder / entry.name
                if is_known(entry.name, folder=entry.is_dir(follow_symlinks=False)):
                    continue
                try:
                    if entry.is_dir() and not entry.name.startswith("."):
                        if is_known(entry.name, folder=True) or _inode(path) in above:
                            continue
                        waiting.append((path, f"{name}/", above | (_inodes(path) if entry.is_symlink() else {_inode(path)})))
                        continue
                    problem = _HIDDEN if entry.is_dir() else "" if entry.is_file() else _no_file(path)
                except OSError as error:  # links in a circle, or too many
                    problem = f"a link that leads nowhere ({error.strerror})"
                yield Entry(name, path, functools.partial(_head_of, path), problem)


def _inode(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _inodes(folder: Path) -> frozenset[tuple[int, int]]:
    """A folder and all that it really lies in: whatever leads back to one of them is a circle."""
    real = folder.resolve()
    return frozenset(map(_inode, (real, *real.parents)))


def _no_file(path: Path) -> str:
    """What is at a path where there is no file."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return f"a link to {path.readlink()}, which is not there" if path.is_symlink() else "gone meanwhile"
    kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return f"{kinds.get(stat.S_IFMT(mode), 'something else')}, not a file"


def _head_of(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def walked(entries: Iterable[Entry[_Place]], strays: Strays) -> Iterator[Entry[_Place]]:
    """The images among `entries`, with the `problem` of those that cannot be decoded. The others are counted in `strays`."""
    for entry in entries:
        path = PurePosixPath(entry.name)
        parts = path.parts
        if is_known(path.name) or any(is_known(part, folder=True) for part in parts[:-1]):
            continue
        suffix = path.suffix.lower()
        by_name = suffix in IMAGE_SUFFIXES or suffix in _UNDECODABLE or suffix in _RAW
        if any(part.startswith(".") for part in parts if part != ".."):
            if by_name or entry.problem == _HIDDEN:
                strays.add("hidden images" if by_name else "hidden folders")
        elif entry.problem:
            if by_name:
                yield entry
            else:
                strays.add(_heading(suffix))
        elif suffix in IMAGE_SUFFIXES:
            yield entry
        elif suffix in _RAW:
            yield _with(entry, "a raw photograph, which is not decoded: convert it to TIFF or PNG")
        else:
            kind = image_kind(entry.head(_HEAD)) if suffix not in _NEVER else None
            if kind is None and suffix in _UNDECODABLE:
                kind = _UNDECODABLE[suffix], False
            if kind is None:
                strays.add(_heading(suffix))
            else:
                yield entry if kind[1] else _with(entry, f"{kind[0]}, which is not decoded: convert it to JPEG or PNG")


def _with(entry: Entry[_Place], problem: str) -> Entry[_Place]:
    return Entry(entry.name, entry.place, entry.head, problem)


def _heading(suffix: str) -> str:
    if not suffix:
        return "without an ending"
    return f"*{suffix}" if re.fullmatch(r"\.[a-z0-9_+-]{1,12}", suffix) else "with odd endings"


def undecodable(problem: str) -> Callable[[], Image.Image]:
    """What a sample is loaded by that has a `problem`: it raises ValueError, and the canvas names it with all of its kind."""

    def load() -> NoReturn:
        raise ValueError(problem)

    return load
