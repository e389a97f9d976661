"""Transfer of archives: `pull` fetches one, `push` sends one.

The manifest is written last, so that an unfinished transfer is never taken for an archive. A repeated call resumes an
interrupted transfer. Every received byte is checked against its record.

A folder that is being filled keeps beginnings of files in `.pull`. On an object store, `.push.json` names the archive that
is being pushed. A dataset repository on the Hub itself remembers the files that it received.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kdcache.archive.format.manifest import (
    FOR_PEOPLE,
    MANIFEST_LIMIT,
    MANIFEST_NAME,
    PULL,
    WORK,
    FileRecord,
    Licences,
    Manifest,
    load_manifest,
)
from kdcache.archive.format.store import LocalStore, inner_name, sha256
from kdcache.archive.reading.cache import CachedStore
from kdcache.archive.reading.reader import Archive, open_archive
from kdcache.archive.reading.verification import Failure, Verification
from kdcache.archive.writing.derive import derive, derived_plan, stored_bytes
from kdcache.errors import IntegrityError, NotFoundError, RetryError, UsageError
from kdcache.sharing.hub import OF_THE_HUB, quiet_hub, told_by_the_hub
from kdcache.sharing.publishing import CARD_LIMIT, public_files, read_here
from kdcache.sharing.signing import SIGNATURE_LIMIT, SIGNATURE_NAME
from kdcache.sharing.transfer import ByteCounter, FileTransfer, TransferEnded, bring, in_parallel, require_room_to_pull
from kdcache.system.files import sweep_temporaries, tidying, translated_os_errors
from kdcache.system.locks import NoLocksError, locked, say_no_locks
from kdcache.system.progress import Progress, Silent
from kdcache.system.remote import MissingError, hub_address, is_url, open_remote

__all__ = ["Shipment", "part_label", "pull", "push", "shipment"]

PIECE = 1 << 20
LONGEST_NAME = 240  # bytes of a file name that every file system supports
MARKER = ".push.json"
HUB_FILES, HUB_BYTES = 100, 4 << 30  # limits of one commit
Contents = Literal["all", "statistics"]


def part_label(archive: Archive, views: range | None, contents: Contents | None) -> str:
    """Label of a part of an archive, such as `views-0-10` or `statistics`; empty for the whole."""
    some = "" if views is None or views == archive.views else f"views-{views.start}-{views.stop}"
    less = "" if contents is None or contents == archive.manifest.contents else contents
    return "-".join(filter(None, (some, less)))


# ------------------------------------------------------------------------------------------------------------- pull


def pull(
    archive: Archive,
    folder: str | os.PathLike[str],
    *,
    views: range | None = None,
    contents: Contents | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> Archive:
    """Fetch `archive`, or some `views` of it, or its statistics (`contents`), to `folder`, and return the local archive.

    A repeated call resumes an interrupted pull, and does nothing after a finished one. Unless `verify` is False, every row
    is checked against its digest before the manifest is written. A part is an archive that records its whole.
    """
    folder, progress = Path(folder), progress or Silent()
    if part_label(archive, views, contents):
        kept: Any = {"views": views, "contents": contents or archive.manifest.contents}
        if not (folder / MANIFEST_NAME).is_file():
            _require_empty(folder, WORK)
            here = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            require_room_to_pull(folder, stored_bytes(derived_plan(archive, **kept)) - here)
        part = derive(archive, folder, **kept, progress=progress, task=f"pull {archive.name}")
        if verify:
            part.verify("full", progress).raise_if_failed()
        return part
    text = _own_manifest(archive)
    if _is_there(folder, archive.manifest, text):
        _tidy(folder)
        progress.say(f"{folder} is complete: nothing to do")
        return open_archive(folder)
    records = _records(archive)
    extras = {name: archive.store.read(name, limit=CARD_LIMIT) for name in sorted(FOR_PEOPLE & records.keys())}
    for name, data in extras.items():
        if sha256(data) != records.pop(name).sha256:
            progress.say(f"{name} was edited after the archive was finished, and is taken as it is now")
    with suppress(NotFoundError):  # a server that forbids listing may not report a missing file
        if archive.store.exists(SIGNATURE_NAME):
            extras[SIGNATURE_NAME] = archive.store.read(SIGNATURE_NAME, limit=SIGNATURE_LIMIT)
    files = [FileTransfer(record, _reader(archive, name)) for name, record in records.items()]
    closing = {**extras, MANIFEST_NAME: text}
    return _fill(folder, archive.manifest, files, closing, f"pull {archive.name}", verify=verify, progress=progress)


def _own_manifest(archive: Archive) -> bytes:
    """The bytes of the manifest. RetryError if it is not the one any more that the archive was opened with."""
    text = archive.store.read(MANIFEST_NAME, limit=MANIFEST_LIMIT)
    if load_manifest(text, archive.location, fix="repeat the command: a moment ago it was whole") != archive.manifest:
        raise RetryError(
            f"{archive.location} was changed while it was read",
            why="its manifest is another one than a moment ago",
            fix="repeat the command",
        )
    return text


def _records(archive: Archive) -> dict[str, FileRecord]:
    """Records of all files but the manifest. Raises IntegrityError for names that cannot coexist in one folder."""
    records: dict[str, FileRecord] = {}
    for record in archive.records():
        if records.setdefault(inner_name(record.path), record) != record:
            raise _impossible(archive, f"it records {record.path!r} twice, with different contents")
    folders = {parent for name in records for parent in _parents(name)}
    for name in records:
        if name in folders:
            raise _impossible(archive, f"it records {name!r} both as a file and as a folder")
        if name.startswith(".") or name in {MANIFEST_NAME, SIGNATURE_NAME}:
            raise _impossible(archive, f"it records {name!r}, a name that kdcache has another use for")
        if max(len(part.encode()) for part in name.split("/")) > LONGEST_NAME or len(name) > 4 * LONGEST_NAME:
            raise _impossible(archive, f"it records a name of {len(name)} characters, {name[:40]!r}...")
    return records


def _parents(name: str) -> Iterator[str]:
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name


def _impossible(archive: Archive, why: str) -> IntegrityError:
    return IntegrityError(
        f"{archive.location} cannot be kept in a folder",
        why=why,
        fix="do not use this archive; get it again from whoever made it",
    )


def _reader(archive: Archive, name: str) -> Callable[[int], Iterator[bytes]]:
    store = archive.store
    if isinstance(store, CachedStore):  # bypass the cache, which would keep a second copy
        return lambda start: store.remote.stream(name, start)
    return lambda start: _read_file(store.local(name), start)


def _read_file(path: Path, start: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while piece := file.read(PIECE):
            yield piece


def _is_there(folder: Path, manifest: Manifest, text: bytes) -> bool:
    """Whether `folder` already holds this archive. Raises UsageError if it holds anything else."""
    store = LocalStore(folder)
    if store.exists(MANIFEST_NAME):
        there = open_archive(folder)
        _require_same(str(folder), there.manifest, manifest)
        return store.read(MANIFEST_NAME, limit=MANIFEST_LIMIT) == text and not _damage(there.verify("quick"))
    _require_empty(folder, PULL)
    return False


def _require_empty(folder: Path, work: str) -> None:
    """Raise UsageError if `folder` holds files but no `work` folder of an unfinished transfer."""
    if folder.is_dir() and not (folder / work).is_dir() and any(folder.iterdir()):
        raise UsageError(
            f"{folder} is not empty",
            why="it holds neither this archive nor the beginning of it",
            fix="name a folder that does not exist yet",
        )


def _require_same(where: str, there: Manifest, coming: Manifest) -> None:
    if there.shards.sha256 != coming.shards.sha256:
        raise UsageError(
            f"{where} holds another archive, {there.digest[:12]}...",
            why=f"this one is {coming.digest[:12]}..., with other shards",
            fix="choose another place, or move that archive elsewhere first",
        )


def _fill(
    folder: Path,
    manifest: Manifest,
    files: Sequence[FileTransfer],
    closing: Mapping[str, bytes],
    task: str,
    *,
    verify: bool,
    progress: Progress,
) -> Archive:
    """Fetch all files to `folder`, then write the `closing` files in order; the manifest is the last."""
    store, work = LocalStore(folder), folder / PULL
    with translated_os_errors(folder), ExitStack() as held:
        work.mkdir(parents=True, exist_ok=True)
        alone = False  # which nobody knows where there are no locks
        try:
            free = alone = held.enter_context(locked(work / "lock", wait=False))
        except NoLocksError:
            say_no_locks()
            free = verify = True  # another process may write into the same beginnings of files
        if not free:
            raise RetryError(
                f"another process is filling {folder}", why="it holds the folder's lock", fix="wait for it, or stop it"
            )
        bring(files, folder, task, progress)
        *others, last = closing.items()
        for name, data in others:
            store.write(name, data)
        arrived = Archive(store, manifest)
        if verify:
            _require_sound(arrived.verify("full", progress))
        store.write(*last)
        if alone:
            sweep_temporaries(folder)
        shutil.rmtree(work, ignore_errors=True)
    return open_archive(folder)


def _tidy(folder: Path) -> None:
    """Delete what a transfer has left in a complete folder that was killed at its very end."""
    work = folder / PULL
    if not work.is_dir():
        return
    with tidying(), suppress(NoLocksError), locked(work / "lock", wait=False) as alone:
        if alone:
            sweep_temporaries(folder)
            shutil.rmtree(work, ignore_errors=True)


def _damage(result: Verification) -> list[Failure]:
    """The failures of a verification, without those of files for people, which may be edited."""
    return [failure for failure in result.failures if failure.where not in FOR_PEOPLE]


def _require_sound(result: Verification) -> None:
    result.failures = _damage(result)
    result.raise_if_failed()


# ------------------------------------------------------------------------------------------------------------- push


@dataclass(frozen=True)
class Shipment:
    """The contents of a push: unchanged `files`, then the `closing` files in order; the manifest is the last."""

    archive: Archive
    manifest: Manifest  # the public manifest
    files: Mapping[str, FileRecord]
    closing: Mapping[str, bytes]
    changed: tuple[str, ...]  # names of files whose public form differs from the local one

    @property
    def nbytes(self) -> int:
        return sum(record.bytes for record in self.files.values()) + sum(map(len, self.closing.values()))


def shipment(archive: Archive, licences: Licences, progress: Progress | None = None) -> Shipment:
    """The contents of a push of the whole archive. Raises UsageError for an unknown licence."""
    public = public_files(archive, licences, progress or Silent())
    store, records = LocalStore(archive.path), _records(archive)
    text = public.get(MANIFEST_NAME) or _own_manifest(archive)
    closing = {
        name: public.get(name) or read_here(store, name, CARD_LIMIT)
        for name in sorted(FOR_PEOPLE & (records.keys() | public.keys()))
    }
    if store.exists(SIGNATURE_NAME):
        closing[SIGNATURE_NAME] = read_here(store, SIGNATURE_NAME, SIGNATURE_LIMIT)
    return Shipment(
        archive,
        Manifest.model_validate_json(text),
        {name: record for name, record in records.items() if name not in FOR_PEOPLE},
        {**closing, MANIFEST_NAME: text},
        tuple(sorted(public)),
    )


def push(
    archive: Archive,
    destination: str,
    *,
    licences: Licences | None = None,
    views: range | None = None,
    contents: Contents | None = None,
    private: bool = False,
    progress: Progress | None = None,
) -> str:
    """Send a local archive, or a part of it as in `pull`, to a folder, `s3://BUCKET/FOLDER` or `hf://datasets/ORG/NAME[@BRANCH][/FOLDER]`.

    Raises UsageError unless the licences of data and weights are known, or declared by `licences`. Every row is first
    checked against its digest. `private`: a newly created repository is private. Returns the destination.
    """
    progress, licences = progress or Silent(), licences or Licences()
    _require_possible(archive, destination)
    if label := part_label(archive, views, contents):
        public_files(archive, licences, Silent())  # fail for an unknown licence before making the part
        beside = archive.path.with_name(f".{archive.name}.{label}.push")  # kept if interrupted
        kept: Any = {"views": views, "contents": contents or archive.manifest.contents}
        part = derive(archive, beside, **kept, progress=progress, task=f"cut {label}")
        sent = push(part, destination, licences=licences, private=private, progress=progress)
        # Under another name first: what is left of it by a kill is no archive any more.
        done = beside.with_name(f"{beside.name}ed")
        shutil.rmtree(done, ignore_errors=True)
        beside.rename(done)
        shutil.rmtree(done)
        return sent
    sending = shipment(archive, licences, progress)
    _require_sound(archive.verify("full", progress))
    if not is_url(destination):
        _push_to_folder(sending, Path(destination), progress)
    elif destination.startswith("hf://"):
        _push_to_hub(sending, destination, private, progress)
    else:
        _push_to_bucket(sending, destination, progress)
    return destination


def _require_possible(archive: Archive, destination: str) -> None:
    """Raise UsageError for an impossible destination, before all rows are read. Existing files there are checked later."""
    if not is_url(destination):
        if Path(destination).resolve() == archive.path.resolve():
            raise UsageError(f"{destination} is the archive itself", why="it is to be sent elsewhere", fix="name another folder")
        if not (Path(destination) / MANIFEST_NAME).is_file():
            _require_empty(Path(destination), PULL)
    elif not destination.startswith("hf://"):
        open_remote(destination).require_writable()


def _push_to_folder(sending: Shipment, folder: Path, progress: Progress) -> None:
    if _is_there(folder, sending.manifest, sending.closing[MANIFEST_NAME]):
        _tidy(folder)
        progress.say(f"{folder} is complete: nothing to do")
        return
    files = [FileTransfer(record, _reader(sending.archive, name)) for name, record in sending.files.items()]
    _fill(folder, sending.manifest, files, sending.closing, f"push {folder}", verify=False, progress=progress)


def _manifest_there(url: str) -> bytes | None:
    """The manifest of the archive at `url`; None without one."""
    try:
        return CachedStore(open_remote(url)).read(MANIFEST_NAME, limit=MANIFEST_LIMIT)
    except MissingError:
        return None


def _is_begun(sending: Shipment, url: str) -> bool | None:
    """Whether an earlier version of this archive is at `url`; None if this very version is, and nothing is left to do.

    Raises UsageError if another archive is there.
    """
    text = _manifest_there(url)
    if text is None:
        return False
    _require_same(url, load_manifest(text, url, fix="choose another place, or move what is there elsewhere"), sending.manifest)
    return None if text == sending.closing[MANIFEST_NAME] else True


def _require_free(url: str, foreign: Iterable[str]) -> None:
    """Raise UsageError if there are unrelated files at `url`."""
    if first := next(iter(foreign), None):
        raise UsageError(
            f"{url} is not empty",
            why=f"it holds {first!r}, which is no file of this archive",
            fix="choose a place where there is nothing yet",
        )


def _push_to_bucket(sending: Shipment, url: str, progress: Progress) -> None:
    """Push to an object store. Stores report only sizes, so a marker file records that the objects are this archive's."""
    remote = open_remote(url)
    begun = _is_begun(sending, url)
    mark = json.dumps({"shards": sending.manifest.shards.sha256}).encode()
    marked = _marked(url)
    if begun is None:
        if marked == mark:
            remote.delete(MARKER)  # of a push that was killed at its very end
        progress.say(f"{url} is complete: nothing to do")
        return
    there = set(remote.names())
    if marked not in {None, mark}:
        raise UsageError(
            f"{url} holds the beginning of another archive",
            why=f"{MARKER} there was left by a push that was interrupted",
            fix="finish that push, or choose another place",
        )
    if marked is None:
        _require_free(url, () if begun else sorted(there))
        remote.put(MARKER, mark)
    counter, task, total = ByteCounter(), f"push {url}", sum(record.bytes for record in sending.files.values())
    store = LocalStore(sending.archive.path)

    def send(record: FileRecord) -> None:
        if counter.stop.is_set():
            raise TransferEnded
        if record.path not in there or remote.size(record.path) != record.bytes:
            remote.put(record.path, store.path(record.path))
        counter.add(record.bytes)

    records = list(sending.files.values())
    in_parallel(send, records, counter, lambda: progress.update(task, min(counter.bytes, total - 1), total, counter.note(total)))
    for name, data in sending.closing.items():
        remote.put(name, data)
    remote.delete(MARKER)
    progress.update(task, total, total)


def _marked(url: str) -> bytes | None:
    try:
        return CachedStore(open_remote(url)).read(MARKER, limit=1 << 10)
    except MissingError:
        return None


def _push_to_hub(sending: Shipment, url: str, private: bool, progress: Progress) -> None:
    """Push to the Hub in commits of bounded size; the last one holds manifest and card.

    The Hub compares files by sha256 and requests only those that it lacks, so a repeated push sends nothing twice.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    repo, revision, folder = hub_address(url)
    api = HfApi()
    with told_by_the_hub(url), quiet_hub():
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, repo_type="dataset", branch=revision, exist_ok=True)
    begun = _is_begun(sending, url)
    if begun is None:
        progress.say(f"{url} is complete: nothing to do")
        return
    if not begun:
        ours = sending.files.keys() | OF_THE_HUB
        _require_free(url, (name for name in open_remote(url).names() if name not in ours))
    store, prefix = LocalStore(sending.archive.path), f"{folder}/" if folder else ""
    task, total, done = f"push {url}", sum(record.bytes for record in sending.files.values()), 0
    began = time.monotonic()

    def commit(files: Mapping[str, Path | bytes], message: str) -> None:
        additions = [CommitOperationAdd(path_in_repo=prefix + name, path_or_fileobj=data) for name, data in files.items()]
        with told_by_the_hub(url), quiet_hub():
            api.create_commit(repo, additions, commit_message=message, repo_type="dataset", revision=revision)

    for records in _batches(list(sending.files.values())):
        commit({record.path: store.path(record.path) for record in records}, f"Shards of {sending.manifest.digest[:12]}")
        done += sum(record.bytes for record in records)
        progress.update(task, done, total, f"{done / 1e6 / max(time.monotonic() - began, 1e-9):,.1f} MB/s")
    commit(sending.closing, f"Archive {sending.manifest.digest[:12]}")
    progress.update(task, total, total)


def _batches(records: Sequence[FileRecord]) -> Iterator[list[FileRecord]]:
    batch: list[FileRecord] = []
    for record in records:
        if batch and (len(batch) == HUB_FILES or sum(waiting.bytes for waiting in batch) + record.bytes > HUB_BYTES):
            yield batch
            batch = []
        batch.append(record)
    if batch:
        yield batch
