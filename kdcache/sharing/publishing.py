"""What leaves this machine when an archive is shared: with its licences, and without the places where things lie here."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

from kdcache.archive.format.manifest import FIGURE_NAME, FOR_PEOPLE, MANIFEST_NAME, FileRecord, Licences, Manifest, TeacherCard
from kdcache.archive.format.store import LocalStore, sha256
from kdcache.archive.layouts import LAYOUTS
from kdcache.archive.reading.reader import Archive
from kdcache.archive.writing.card import card_files
from kdcache.errors import IntegrityError, UsageError
from kdcache.sharing.signing import SIGNATURE_NAME
from kdcache.system.progress import Progress

__all__ = ["public_files", "read_here", "require_licences", "without_places"]

CARD_LIMIT = 16 << 20
# A path from the root or the home folder, or to a local model, up to the next option of a specification such as
# folder:root=/a b,split_fraction=0.2
_PLACE = re.compile(r"(?:(^|[=,'\"\s(]|:(?!//))(?:file://)?[/~]|(?<=local-dir:)[^,]*/).*?(?=,\w+=|$)", re.DOTALL)
_ELIDED = r"\1PATH"


def public_files(archive: Archive, declared: Licences, progress: Progress) -> dict[str, bytes]:
    """Name and bytes of the files that are not to be shared as they are, the manifest among them; none if all are.

    The digest stays the same, and what is made here is shared as it is the next time. Raises UsageError where a licence is
    unknown, or a signature would no longer fit.
    """
    manifest = archive.manifest
    earlier = manifest.licences or Licences()
    licences = Licences(data=declared.data or earlier.data, weights=declared.weights or earlier.weights)
    teacher = manifest.teacher
    public = manifest.model_copy(
        update={
            "licences": None if licences == Licences() else licences,
            "provenance": _public_provenance(manifest.provenance),
            "teacher": teacher and teacher.model_copy(update=_public_teacher(teacher)),
        }
    )
    require_licences(
        public.known_licences, archive.location, "logits say much of the images and of the teacher that they come from"
    )
    if manifest.source and without_places(manifest.source.options) != manifest.source.options:
        progress.say("the options of the dataset name a place on this machine; they are part of the archive's digest, and stay")
    cards = _cards(archive, public, progress)
    records = {record.path: record for record in manifest.files}
    records |= {name: FileRecord(path=name, bytes=len(data), sha256=sha256(data)) for name, data in cards.items()}
    public = public.model_copy(update={"files": tuple(records[name] for name in sorted(records))})
    if public == manifest:
        return {}
    if archive.store.exists(SIGNATURE_NAME):
        raise UsageError(
            f"{archive.location} is signed, and would be changed before it is shared",
            why="its manifest is to name licences and no places on this machine, and its signature covers the manifest",
            fix="push it to a folder, sign that one, and push it from there: kdcache push ARCHIVE FOLDER --license ... && "
            "kdcache sign FOLDER --key key.pem && kdcache push FOLDER DESTINATION",
        )
    return {**cards, MANIFEST_NAME: public.model_dump_json(indent=1).encode()}


def require_licences(known: Licences, what: str, because: str) -> None:
    """UsageError unless the licences of data and weights are known under which something is shared."""
    unknown = [name for name, value in known.model_dump().items() if not value]
    if unknown:
        declare = ",".join(f"{name}=NAME" for name in unknown)
        raise UsageError(
            f"the licence of the {' and of the '.join(unknown)} of {what} is unknown",
            why=f"{because}: whoever gets them must know the terms",
            fix=f"name it as SPDX or the Hugging Face Hub do, for example cc-by-4.0: --license {declare}",
        )


def _cards(archive: Archive, public: Manifest, progress: Progress) -> dict[str, bytes]:
    """The files for people that are to be recorded anew: as somebody has edited them, or made anew for other licences."""
    manifest, folder = archive.manifest, LocalStore(archive.path)
    recorded = {record.path: record for record in manifest.files if record.path in FOR_PEOPLE}
    edited = {}
    for name, record in recorded.items():
        data = read_here(folder, name, CARD_LIMIT)
        if sha256(data) != record.sha256:
            progress.say(f"{name} was edited after the archive was finished, and is shared as it is now")
            edited[name] = data
    if public.known_licences == manifest.known_licences and FIGURE_NAME in recorded:
        return edited
    described = [manifest.shards, *(record for record in manifest.files if record.path not in FOR_PEOPLE)]
    lines = LAYOUTS.from_dict(public.layout).reading_lines(public)
    return {**card_files(public, described, archive.shards(), lines), **edited}


def read_here(folder: LocalStore, name: str, limit: int) -> bytes:
    """A file without a checksum that is to be shared: a link could lead to anything on this machine, and is refused."""
    if folder.path(name).is_symlink():
        raise IntegrityError(
            f"{folder.path(name)} is a link",
            why="what it leads to is no part of the archive, and must not be shared by mistake",
            fix="replace it by the file that is meant",
        )
    return folder.read(name, limit=limit)


def _public_teacher(teacher: TeacherCard) -> dict[str, Any]:
    return {field: without_places(getattr(teacher, field)) for field in ("alias", "name", "training")}


def _public_provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    public = dict(without_places(dict(provenance)))
    if public.get("dataset") != provenance.get("dataset"):
        del public["dataset"]  # nobody else finds it there; where it is on their machine, they are asked
    command = provenance.get("command")
    if isinstance(command, str):
        try:
            public["command"] = shlex.join(without_places(word) for word in shlex.split(command))
        except ValueError:
            del public["command"]
    return public


def without_places(value: Any) -> Any:
    """The same with the word PATH for every path from the root or the home folder, in strings at any depth."""
    if isinstance(value, str):
        return _PLACE.sub(_ELIDED, value)
    if isinstance(value, Mapping):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item) for item in value]
    return value
