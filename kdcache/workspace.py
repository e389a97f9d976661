"""The workspace: folders `archives/ teachers/ runs/ data/ reports/ exports/ studies/` below one home folder."""

import errno
import os
import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from kdcache.archive import AnyArchive, Archive, Average, Ensemble, open_archive
from kdcache.datasets import DATASETS, Source, Split, UsersOwn
from kdcache.datasets.canvas import Canvas, canvases_of, load_canvas
from kdcache.datasets.naming import find_source
from kdcache.errors import IntegrityError, KdcacheError, NotFoundError, RetryError, UsageError, printable
from kdcache.system import documents
from kdcache.system.files import is_set_aside, local_path, set_aside
from kdcache.system.progress import Progress, Silent
from kdcache.system.remote import is_url
from kdcache.system.seals import SEAL
from kdcache.views.policy import ViewPolicy, without_policy

__all__ = [
    "Workspace",
    "archive_source",
    "damaged_record",
    "dataset_label",
    "parse_dataset",
    "read_record",
    "read_teacher",
    "recorded_source",
    "require_writable",
    "unknown_source",
    "versions",
]


def parse_dataset(spec: str, progress: Progress | None = None) -> Source:
    """A dataset source from its command-line form: see `kdcache.datasets.naming`. A guess is said to `progress`."""
    return find_source(spec, progress)


def unknown_source(location: str, policy: ViewPolicy | None) -> KdcacheError:
    """The error for an archive that names no images, or, without a policy, does not even say which views of them it has."""
    if policy is None:
        return without_policy(location)
    return UsageError(
        f"archive {location} does not say where its images are",
        why="it was not written by dump-teacher",
        fix="name them: --dataset NAME",
    )


def archive_source(archive: AnyArchive, workspace: "Workspace", spec: str | None = None) -> Source:
    """The source of an archive's images: `spec`, or the one that its dump recorded. Raises UsageError without either.

    What an archive records may be a stranger's: a repository, a function, and a place outside the workspace are taken from it
    only if this workspace has a canvas of that very source already, whose digest is the one that the archive records, or a
    teacher that was made for it.
    """
    if spec is not None:
        return parse_dataset(spec)
    spec = archive.manifest.provenance.get("dataset")
    if not isinstance(spec, str):
        raise unknown_source(archive.location, archive.manifest.policy)
    source = recorded_source(spec)
    known = _stays_inside, _seen_before, _taught
    if source is not None and any(is_known(source, archive, workspace) for is_known in known):
        return source
    raise UsageError(
        f"archive {archive.location} says that its images are {spec}",
        why="that is outside this workspace, which has no canvas of them yet, and an archive may be a stranger's",
        fix=f"if you trust it, name them yourself: --dataset {shlex.quote(spec)}",
    )


def recorded_source(spec: str) -> Source | None:
    """The source of a record, which has a registered name and options; None for any other text. Reads nothing."""
    if spec.partition(":")[0] not in DATASETS:
        return None
    return DATASETS.parse(spec)


def _stays_inside(source: Source, archive: AnyArchive, workspace: "Workspace") -> bool:
    """Whether a source reads below the workspace only, or is one that kdcache knows by name."""
    if getattr(source, "repo", "") or getattr(source, "function", ""):
        return False
    if not isinstance(source, UsersOwn):
        root = str(getattr(source, "root", ""))
        return not root or _below(root, workspace)
    places = [str(value) for value in vars(source).values() if isinstance(value, str) and os.sep in value]
    places += [str(source.root)] if hasattr(source, "root") else []
    return bool(places) and all(_below(place, workspace) for place in places)


def _below(place: str, workspace: "Workspace") -> bool:
    found = Path(place).expanduser().resolve()
    return any(found.is_relative_to(folder.resolve()) for folder in (workspace.home, workspace.data))


def _seen_before(source: Source, archive: AnyArchive, workspace: "Workspace") -> bool:
    card = archive.manifest.source
    return card is not None and any(each.card.digest == card.digest for each in canvases_of(source, "train", workspace.data))


def _taught(source: Source, archive: AnyArchive, workspace: "Workspace") -> bool:
    """Whether a teacher of this workspace, which only the user's own commands make, was trained or tested on this source."""
    spec = DATASETS.spec(source)
    return any(record.get("dataset") == spec for _, record in workspace.teacher_records(Silent()))


def read_record(file: Path) -> dict[str, Any]:
    """Read a JSON record that kdcache wrote. Raises IntegrityError if it is damaged."""
    try:
        return documents.read_record(file)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in {None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR}:
            raise  # which says nothing of the record
        raise damaged_record(file, str(error).splitlines()[0]) from None


class _TeacherRecord(BaseModel):
    """Required fields of `teacher.json`. The record itself stays a mapping with all its fields."""

    class _Training(BaseModel):
        canvas_digest: str

    alias: str
    name: str
    class_names: list[str]
    input_size: int
    mean: list[float]
    std: list[float]
    weights_sha256: str
    top1_clean: float
    training: _Training


def read_teacher(folder: Path) -> dict[str, Any]:
    """Read the record of a trained teacher. Raises IntegrityError if `teacher.json` is damaged."""
    file = folder / "teacher.json"
    record = read_record(file)
    try:
        _TeacherRecord.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        raise damaged_record(file, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return record


def damaged_record(file: Path, why: str) -> IntegrityError:
    """The error for a file in the folder of a teacher or run that is not what kdcache wrote."""
    aside = f"set the folder aside and repeat the command that made it: {set_aside(file.parent)}"
    meant = f", or take its field {SEAL} out if it was changed on purpose" if "BLAKE3" in why else ""
    return IntegrityError(
        f"{file} is not the record that kdcache wrote",
        why=why,
        fix=f"restore it from a copy{meant}; or {aside}",
    )


def require_writable(folder: Path) -> None:
    """Raise the error of writing to `folder` before hours of work, not after them. The folder need not exist."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise UsageError(f"{folder} cannot be a folder", why=f"{place} is a file", fix="choose another place with --home")
    if not os.access(place, os.W_OK | os.X_OK):
        raise RetryError(
            f"not allowed to write {folder}",
            why=f"{place} is read-only for this user",
            fix=f"make {place} writable, or choose another place with --home",
        )


def dataset_label(source: Source) -> str:
    """A short name for folders: the dataset's name, and that of its folder or repository if it has one."""
    if short := getattr(source, "short_name", ""):
        return str(short)
    name = DATASETS.name_of(source)
    place = getattr(source, "root", "") or getattr(source, "repo", "")
    return f"{name}-{Path(place).name}" if place else name


def versions() -> dict[str, str]:
    """Versions of the libraries and the machine, on which results depend."""
    version_of = {"python": platform.python_version(), "platform": platform.platform(), "processor": platform.machine()}
    for package in ("kdcache", "torch", "torchvision", "timm", "numpy", "pillow", "zarr"):
        try:
            version_of[package] = version(package)
        except PackageNotFoundError:
            version_of[package] = "absent"
    return version_of


@dataclass(frozen=True, init=False)
class Workspace:
    """The folders below `home`. Each is made at the first write to it.

    `skip_corrupt`: canvases built here leave out images that cannot be decoded. `allow_large`: they have images of any size.
    `force`: of datasets that are tested on their training images, too.
    """

    home: Path
    data_dir: Path | None = None
    skip_corrupt: bool = False
    allow_large: bool = False
    force: bool = False

    def __init__(
        self,
        home: Path | str,
        data_dir: Path | str | None = None,
        skip_corrupt: bool = False,
        allow_large: bool = False,
        force: bool = False,
    ) -> None:
        here = "name a folder of this machine; an archive goes elsewhere by: kdcache push ARCHIVE DESTINATION"
        object.__setattr__(self, "home", local_path(home, "--home", elsewhere=here))
        object.__setattr__(self, "data_dir", None if data_dir is None else local_path(data_dir, "--data-dir"))
        object.__setattr__(self, "skip_corrupt", skip_corrupt)
        object.__setattr__(self, "allow_large", allow_large)
        object.__setattr__(self, "force", force)

    @property
    def archives(self) -> Path:
        return self.home / "archives"

    @property
    def teachers(self) -> Path:
        return self.home / "teachers"

    @property
    def runs(self) -> Path:
        return self.home / "runs"

    @property
    def reports(self) -> Path:
        return self.home / "reports"

    @property
    def exports(self) -> Path:
        return self.home / "exports"

    @property
    def studies(self) -> Path:
        return self.home / "studies"

    @property
    def data(self) -> Path:
        return self.data_dir or self.home / "data"

    def canvas(
        self,
        source: Source,
        split: Split,
        size: int | None,
        progress: Progress | None = None,
        *,
        tell: bool = False,
        building: Callable[[], None] = lambda: None,
    ) -> Canvas:
        """The canvas of a split, at `size` pixels or the dataset's default size. With `tell`, the classes are told first.

        `building` is called before one is built, and may raise.
        """
        size = size or source.recipe.canvas
        taken = {"skip_corrupt": self.skip_corrupt, "allow_large": self.allow_large, "force": self.force}
        return load_canvas(source, split, size, self.data, progress, tell=tell, building=building, **taken)

    def archive_folders(self) -> list[Path]:
        """Folders with a finished or unfinished archive, sorted by name."""
        if not self.archives.is_dir():
            return []
        return sorted(
            folder
            for folder in self.archives.iterdir()
            if any((folder / name).exists() for name in ("kdcache.json", ".dump", ".pull")) and not is_set_aside(folder)
        )

    def open_archive(self, name: str | None, progress: Progress, *, strict: bool = False) -> Archive:
        """The archive `name` (a URL, a folder, or a name below `archives/`); without a name, the only or newest finished one.

        `strict` raises an error instead of choosing between several.
        """
        if name == "":
            raise UsageError("an archive without a name", why="the option is empty", fix="list the archives with: kdcache ls")
        if name is not None and is_url(name):
            return open_archive(name)
        if name is not None:
            if (self.archives / name).is_dir() and not Path(name).is_dir():
                return open_archive(self.archives / name)
            # Run folders contain the name of the archive's folder, so `.` and `..` are resolved.
            return open_archive(Path(name).resolve() if Path(name).name in {"", ".."} else name)
        folders = self.archive_folders()
        finished = [folder for folder in folders if (folder / "kdcache.json").is_file()]
        if not finished:
            if folders:
                return open_archive(folders[-1])  # raises IncompleteError, which says how to continue
            raise NotFoundError(
                f"no archive below {self.archives}",
                why="students are trained from a teacher's cached logits",
                fix="make one first, for example: kdcache dump-teacher --teacher vit_s --dataset pets",
            )
        if len(finished) > 1:
            if strict:
                raise UsageError(
                    f"{len(finished)} archives below {self.archives}",
                    why="--strict forbids choosing one of them",
                    fix=f"name it: --archive {shlex.quote(str(finished[0]))}",
                )
            newest = max(finished, key=lambda folder: (folder / "kdcache.json").stat().st_mtime)
            progress.say(f"archive: {newest} (the newest of {len(finished)}; choose with --archive)")
            return open_archive(newest)
        progress.say(f"archive: {finished[0]}")
        return open_archive(finished[0])

    def open_ensemble(self, names: Sequence[str], average: Average, progress: Progress, *, strict: bool = False) -> Ensemble:
        """The archives `names` as one ensemble; without names, the archive that `open_archive` finds."""
        ensemble = Ensemble([self.open_archive(name, progress, strict=strict) for name in names or (None,)], average)
        for archive in ensemble.members:
            if archive.views != ensemble.views:
                progress.say(f"{archive.location} has {archive.num_views} views; the {ensemble.num_views} that all have are used")
        return ensemble

    def teacher_records(self, progress: Progress) -> Sequence[tuple[Path, dict[str, Any]]]:
        """(folder, record) of every trained teacher, newest first. Damaged ones are reported and left out."""
        records = []
        for file in sorted(self.teachers.glob("*/teacher.json"), key=lambda file: file.stat().st_mtime, reverse=True):
            if is_set_aside(file.parent):
                continue
            try:
                records.append((file.parent, read_teacher(file.parent)))
            except IntegrityError as error:
                progress.say(f"teacher {file.parent} is left out: {printable(f'{error.what} ({error.why})')}")
        return records
