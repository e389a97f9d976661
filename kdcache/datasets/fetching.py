"""Download of datasets from their owners: fetched once, checked and unpacked; with advice where that is not possible."""

import hashlib
import shlex
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from kdcache.datasets import Images, Sample, Split, resolved
from kdcache.errors import IntegrityError, KdcacheError, NotFoundError, RetryError
from kdcache.system.files import set_aside
from kdcache.system.locks import locked_if_possible
from kdcache.system.progress import Progress, Silent
from kdcache.system.refusals import named
from kdcache.system.room import require_room

__all__ = ["Download", "Listed", "Rooted", "damaged_file", "find_or_fetch", "first_with", "pictures"]

_PIECE = 1 << 20


@dataclass(frozen=True)
class Download:
    """A file to download: `url`, size in `megabytes`, and the `md5` that its publishers state. Archives are unpacked."""

    url: str
    md5: str
    megabytes: int

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Rooted:
    """A source whose files are in `root`, or in the folder that they are fetched to."""

    root: str = ""

    def __post_init__(self) -> None:
        # The absolute path is the folder's one name, so that records and canvases that contain it are found again.
        object.__setattr__(self, "root", resolved(self.root) if self.root else "")


def find_or_fetch(
    name: str,
    root: str,
    data: Path,
    find: Callable[[Path], Path | None],
    layout: str,
    downloads: Sequence[Download],
    elsewhere: str,
    progress: Progress | None,
    fetch: bool,
) -> Path:
    """The files of dataset `name`, as `find` recognises them in `root`, or else in `data/name`.

    Missing files are fetched and unpacked. Raises NotFoundError instead if there are no `downloads`, if the user gave a
    `root`, or if `fetch` is False. The error says where to put which `layout`, or names `elsewhere` as another source.
    """
    place = Path(root) if root else data / name
    if listing := find(place):
        return listing
    by_hand = f"put {layout} into {place}"
    if root or not downloads:
        raise NotFoundError(
            f"dataset {name} is not in {place}",
            why=f"there is no {layout}" if root else "its owners let nobody fetch it without asking, or their server is gone",
            fix=f"{by_hand}; or use {elsewhere}",
        )
    size = sum(file.megabytes for file in downloads)
    if not fetch:
        raise NotFoundError(
            f"dataset {name} is not in {place} yet",
            why=f"nothing is fetched by this command; it would be {size:,} MB from {downloads[0].url}",
            fix=f"kdcache datasets --fetch {name} --data-dir {shlex.quote(str(data))}",
        )
    progress = progress or Silent()
    place.mkdir(parents=True, exist_ok=True)
    # A second process waits, and finds what the first one fetched. Without locks, what two processes fetched into one file
    # at once, its checksum would refuse.
    with locked_if_possible(place / ".fetching.lock"):
        if found := find(place):
            return found
        progress.say(f"dataset {name}: {size:,} MB from {downloads[0].url.rpartition('/')[0]} to {place}")
        require_room(
            place,
            3 * size * 10**6,  # packed files, and unpacked ones, twice for a moment
            "the dataset",
            why="its files are fetched packed, and then unpacked",
            elsewhere="put the data on another disk with --data-dir",
        )
        for file in downloads:
            try:
                packed = _fetch(file, place, progress)
            except RetryError as error:
                addresses = ", ".join(download.url for download in downloads)
                fix = f"repeat the command later; or download {addresses} by hand into {place}; or use {elsewhere}"
                raise RetryError(f"dataset {name} cannot be fetched: {error.what}", why=error.why, fix=fix) from None
            _unpack(packed, place)
        listing = find(place)
    if listing is None:
        raise IntegrityError(
            f"what was fetched for dataset {name} is not {layout}",
            why=f"the files in {place} are laid out in another way than when this was written",
            fix=f"look into {place}, and lay it out there as {layout}; or use {elsewhere}",
        )
    return listing


def first_with(*needed: str, below: Sequence[str] = ("",)) -> Callable[[Path], Path | None]:
    """A finder: it returns the first folder `below` a place that has all the `needed` files and folders."""

    def find(place: Path) -> Path | None:
        return next((place / sub for sub in below if all((place / sub / name).exists() for name in needed)), None)

    return find


def pictures(rows: Iterable[tuple[Path, int]], base: Path) -> list[Sample]:
    """Samples from (image file, label) rows. Keys are paths below `base`."""
    return [
        Sample(file.relative_to(base).as_posix(), label, lambda file=file: Image.open(file))  # type: ignore[misc]
        for file, label in rows
    ]


def _fetch(download: Download, folder: Path, progress: Progress) -> Path:
    """Download a file and check it. An interrupted download stays in `NAME.part`, and the next call continues it."""
    from kdcache.system.remote import open_remote

    file, part = folder / download.name, folder / f"{download.name}.part"
    if not file.is_file():
        remote = open_remote(download.url.rpartition("/")[0])
        total = remote.size(download.name)
        with named(part), part.open("ab") as out:
            progress.update(f"fetch {download.name}", out.tell(), total)
            for piece in remote.stream(download.name, out.tell()):
                out.write(piece)
                progress.update(f"fetch {download.name}", min(out.tell(), total), total, f"{out.tell() / 1e6:.0f} MB")
        part.replace(file)
    with named(file), file.open("rb") as stored:
        md5 = hashlib.file_digest(stored, "md5").hexdigest()
    if md5 != download.md5:
        raise IntegrityError(
            f"{file} has the md5 {md5}",
            why=f"{download.md5} was expected: it is damaged, or not the file that was published",
            fix=f"set it aside, and repeat the command: {set_aside(file)}",
        )
    return file


def _unpack(file: Path, place: Path) -> None:
    """Unpack a tar or zip archive beside it, then delete it. Other files stay unchanged."""
    aside = place / f".{file.name}.unpacking"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        if zipfile.is_zipfile(file):
            with named(aside), zipfile.ZipFile(file) as packed:
                packed.extractall(aside)
        elif tarfile.is_tarfile(file):
            with named(aside), tarfile.open(file) as tar:
                tar.extractall(aside, filter="data")  # refuses paths and links to outside, and devices
        else:
            return
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise damaged_file(file, str(error)) from None
    for entry in aside.iterdir():
        shutil.rmtree(place / entry.name, ignore_errors=True)
        entry.replace(place / entry.name)
    aside.rmdir()
    file.unlink()


def damaged_file(file: Path, why: str, *, fetched: bool = True) -> KdcacheError:
    """The error for a dataset's file with wrong contents; `fetched` ones can be got again, the user's own cannot."""
    return IntegrityError(
        f"{file} is damaged",
        why=" ".join(why.split())[:300] or "it ends too early",
        fix=f"set it aside, and fetch it again: {set_aside(file)}" if fetched else "restore it from a copy, or write it anew",
    )


class Listed(Images):
    """Images of classes `names`. `list_samples` lists a split's samples; `files` are the files that they are read from.

    `remarks` are said to the user, `unused` counts files of a split that are no samples, and `refused` says why only --force
    uses these images.
    """

    def __init__(
        self,
        base: Path,
        names: Sequence[str],
        list_samples: Callable[[Split], Sequence[Sample]],
        files: Iterable[Path],
        remarks: Sequence[str] = (),
        unused: Callable[[Split], Mapping[str, int]] = lambda split: {},
        refused: KdcacheError | None = None,
    ) -> None:
        self.remarks, self.unused, self.refused = remarks, unused, refused
        self._base, self._names, self._list, self._files = base, tuple(names), list_samples, sorted(files)

    def class_names(self) -> Sequence[str]:
        return self._names

    def samples(self, split: Split) -> Sequence[Sample]:
        return self._list(split)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for file in self._files:
            status = file.stat()
            digest.update(f"{file.relative_to(self._base).as_posix()} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()
