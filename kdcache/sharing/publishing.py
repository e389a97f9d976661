"""The public form of an archive: with its licences, and without paths of this machine."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

from kdcache.archive.format.manifest import (
    FIGURE_NAME,
    FOR_PEOPLE,
    MANIFEST_NAME,
    FileRecord,
    Licences,
    Manifest,
    TeacherCard,
    sealed,
)
from kdcache.archive.format.store import LocalStore, sha256
from kdcache.archive.layouts import LAYOUTS
from kdcache.archive.reading.reader import Archive
from kdcache.archive.writing.card import card_files
from kdcache.errors import IntegrityError, UsageError
from kdcache.sharing.signing import SIGNATURE_NAME
from kdcache.system.files import set_aside
from kdcache.system.progress import Progress

__all__ = ["public_files", "read_here", "require_licences", "without_places"]

CARD_LIMIT = 16 << 20
# An absolute path, a path in a home folder, or a local model's path. It ends before the next option of a specification
# such as folder:root=/a b,split_fraction=0.2
_PLACE = re.compile(r"(?:(^|[=,'\"\s(]|:(?!//))(?:file://)?[/~]|(?<=local-dir:)[^,]*/).*?(?=,\w+=|$)", re.DOTALL)
_ELIDED = r"\1PATH"


def public_files(archive: Archive, declared: Licences, progress: Progress) -> dict[str, bytes]:
    """Name and bytes of the files that must change before sharing, the manifest among them; empty if none must.

    The digest stays the same. A file made here needs no change when it is shared again. Raises UsageError for an unknown
    licence, or if the change would invalidate a signature.
    """
    manifest = archive.manifest
    licences = declared.otherwise(manifest.licences)
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
        place = shlex.quote(str(archive.path))
        terms = ",".join(f"{name}={value}" for name, value in public.known_licences.model_dump().items())
        raise UsageError(
            f"{archive.location} is signed, and would be changed before it is shared",
            why="its manifest is to name licences and no places on this machine, and its signature covers the manifest",
            fix="push it without its signature to a folder, sign that one, and push it from there: "
            f"{set_aside(archive.path / SIGNATURE_NAME)} && kdcache push {place} FOLDER --license {shlex.quote(terms)} && "
            "kdcache sign FOLDER --key key.pem && kdcache push FOLDER DESTINATION",
        )
    return {**cards, MANIFEST_NAME: sealed(public)}


def require_licences(known: Licences, subject: str, because: str) -> None:
    """Raise UsageError unless the licences of data and weights of the shared work are known."""
    unknown = [name for name, value in known.model_dump().items() if not value]
    if unknown:
        declare = ",".join(f"{name}=NAME" for name in unknown)
        raise UsageError(
            f"the licence of the {' and of the '.join(unknown)} of {subject} is unknown",
            why=f"{because}: whoever gets them must know the terms",
            fix=f"name it as SPDX or the Hugging Face Hub do, for example cc-by-4.0: --license {declare}",
        )


def _cards(archive: Archive, public: Manifest, progress: Progress) -> dict[str, bytes]:
    """The files for people that need new records: edited ones, or all of them remade for other licences."""
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
    """Read a file that has no checksum, for sharing. Links are refused, as they could lead to any file of this machine."""
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
        del public["dataset"]  # the path is useless to others; kdcache asks them for theirs
    command = provenance.get("command")
    if isinstance(command, str):
        try:
            public["command"] = shlex.join(without_places(word) for word in shlex.split(command))
        except ValueError:
            del public["command"]
    return public


def without_places(value: Any) -> Any:
    """`value` with PATH in place of every absolute or home path, in strings at any depth."""
    if isinstance(value, str):
        return _PLACE.sub(_ELIDED, value)
    if isinstance(value, Mapping):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item) for item in value]
    return value
