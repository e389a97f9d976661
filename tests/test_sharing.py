"""Archives that are passed on: whole or in parts, to folders, object stores and the Hub, stopped anywhere and taken up again."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

from kdcache.archive import LAYOUTS, Archive, ArchivePlan, ArchiveWriter, Licences, open_archive, stored_bytes
from kdcache.archive.format.manifest import FOR_PEOPLE, FileRecord
from kdcache.cli import run
from kdcache.datasets import SourceCard
from kdcache.errors import IncompleteError, IntegrityError, KdcacheError, NotFoundError, RetryError, UsageError
from kdcache.sharing import push_pull as sharing_module
from kdcache.sharing.publishing import without_places
from kdcache.sharing.push_pull import pull, push, shipment
from kdcache.sharing.signing import sign_archive, verify_signature
from kdcache.system import attempts
from kdcache.system.remote import open_remote
from kdcache.views import ViewPolicy
from tests.archives import teacher_card
from tests.golden.make import ARCHIVE as GOLDEN
from tests.hostile import resealed
from tests.hub import WritableHub
from tests.servers import Answer, Fault, FaultyServer, Request, faulty_s3
from tests.squares import squares

VIEWS, SAMPLES, CLASSES, SHARD_ROWS = 4, 300, 40, 150  # two shards a view, of some 12 kB
NAMES = tuple(f"class {i}" for i in range(CLASSES))
TERMS = Licences(data="cc-by-4.0", weights="apache-2.0")
SECRET = "/home/somebody/very secret"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of each test's own, and no patience."""
    monkeypatch.setenv("KDCACHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(attempts, "BACKOFF", 0.002)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def write(path: Path, layout: str = "zarr", seed: int = 1, licence: str | None = None, weights: str | None = None) -> Archive:
    """An archive as a dump leaves it, with the places of this machine in its records."""
    rng = np.random.default_rng(seed)
    writer = ArchiveWriter(
        path,
        num_views=VIEWS,
        num_samples=SAMPLES,
        class_names=NAMES,
        labels=rng.integers(0, CLASSES, SAMPLES),
        keys=[f"picture/{i}" for i in range(SAMPLES)],
        layout=layout,
        shard_rows=SHARD_ROWS,
        policy=ViewPolicy.load("pets", size=16),
        source=SourceCard(name="folder", split="train", num_samples=SAMPLES, class_names=NAMES, licence=licence, digest="1" * 64),
        teacher=teacher_card(
            training={"start": "checkpoint", "from": [f"{SECRET}/weights.safetensors"]}, weights_licence=weights
        ),
        provenance={
            "command": f"kdcache dump-teacher --teacher t --dataset 'folder:root={SECRET}/x,split_fraction=0.2' --home ~/work",
            "dataset": f"folder:root={SECRET}/photos,split_fraction=0.2",
            "versions": {"python": "3.11", "note": f"in {SECRET}"},
        },
    )
    for view, block in writer.missing():
        rows = len(writer.positions(block))
        sample = writer.plan.policy.parameters(view, SAMPLES, squares(SAMPLES)).sample[writer.positions(block)]  # type: ignore[union-attr]
        writer.write(view, block, rng.normal(0, 3, (rows, CLASSES)).astype(np.float32), sample)
    return writer.finalize()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """Whose licences nobody knows. Shared: do not change its files."""
    return write(tmp_path_factory.mktemp("made") / "a")


@pytest.fixture
def copy(made: Archive, tmp_path: Path) -> Archive:
    shutil.copytree(made.path, tmp_path / "copy")
    return open_archive(tmp_path / "copy")


@pytest.fixture(scope="module")
def public(made: Archive, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """The same as it was pushed to a folder. Shared: do not change its files."""
    return open_archive(push(made, str(tmp_path_factory.mktemp("public") / "team" / "a"), licences=TERMS))


@pytest.fixture(scope="module")
def one_server(public: Archive) -> Iterator[FaultyServer]:
    with FaultyServer(public.path.parent) as server:
        yield server


@pytest.fixture
def server(one_server: FaultyServer) -> FaultyServer:
    one_server.forget()
    return one_server


class Notes:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.done: dict[str, tuple[int, int]] = {}

    def update(self, task: str, done: int, total: int, note: str = "") -> None:
        assert 0 <= done <= total
        assert done >= self.done.get(task, (0, 0))[0]
        self.done[task] = (done, total)

    def say(self, text: str) -> None:
        self.said.append(text)


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same_rows(one: Archive, other: Archive) -> None:
    for view in one.views:
        ours, theirs = (archive.read(view, 0, SAMPLES).fields() for archive in (one, other))
        for name, values in theirs.items():
            np.testing.assert_array_equal(ours[name], values, err_msg=name)


# ---------------------------------------------------------------- what is shared


@pytest.mark.parametrize(
    ("declared", "missing"),
    [
        (Licences(), "data and of the weights"),
        (Licences(data="mit"), "the weights"),
        (Licences(weights="mit"), "the data"),
    ],
)
def test_nothing_is_shared_under_unknown_terms(made: Archive, tmp_path: Path, declared: Licences, missing: str) -> None:
    with pytest.raises(UsageError, match=f"the licence of .*{missing} of .* is unknown") as caught:
        push(made, str(tmp_path / "out"), licences=declared)
    assert "--license" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_terms_that_data_and_model_bring_along_need_no_declaration(tmp_path: Path) -> None:
    known = write(tmp_path / "a", licence="CC-BY-SA-4.0", weights="apache-2.0")
    public = open_archive(push(known, str(tmp_path / "out")))
    assert public.manifest.licences is None
    assert public.manifest.known_licences == Licences(data="CC-BY-SA-4.0", weights="apache-2.0")


def test_what_is_shared_says_its_terms_and_is_the_same_archive(made: Archive, public: Archive) -> None:
    assert public.manifest.digest == made.manifest.digest
    assert public.manifest.known_licences == TERMS
    card = (public.path / "README.md").read_text()
    assert "license:\n- cc-by-4.0\n- apache-2.0\n" in card
    assert public.verify("full").ok
    ours, theirs = files_of(made.path), files_of(public.path)
    assert {name for name in ours if ours[name] != theirs[name]} == {"kdcache.json", "README.md", "croissant.json"}
    assert ours.keys() == theirs.keys()
    assert_same_rows(public, made)


def test_terms_are_no_part_of_what_makes_two_dumps_the_same(made: Archive, public: Archive) -> None:
    """Views can be appended to what was begun before kdcache took note of licences, and to what was pulled."""

    def identity(archive: Archive, weights: str | None) -> dict[str, Any]:
        teacher = made.manifest.teacher
        assert teacher is not None
        noted = archive.manifest.model_copy(update={"teacher": teacher.model_copy(update={"weights_licence": weights})})
        return {name: value for name, value in noted.identity.items() if name in ArchivePlan.model_fields}

    assert identity(made, None) == identity(made, "mit") == identity(public, "mit")


def test_places_on_this_machine_stay_here(made: Archive, public: Archive) -> None:
    assert any(SECRET.encode() in data for data in files_of(made.path).values())
    for name, data in files_of(public.path).items():
        assert b"secret" not in data, name
        assert b"~/" not in data, name
    provenance = public.manifest.provenance
    assert provenance["command"] == ("kdcache dump-teacher --teacher t --dataset folder:root=PATH,split_fraction=0.2 --home PATH")
    assert "dataset" not in provenance  # whoever pulls it is asked where the images are
    assert provenance["versions"] == {"python": "3.11", "note": "in PATH"}
    assert public.manifest.teacher is not None
    assert public.manifest.teacher.training == {"start": "checkpoint", "from": ["PATH"]}


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/", "PATH"),
        ("/home/me/a b", "PATH"),
        ("~/x", "PATH"),
        ("--home=/a/b", "--home=PATH"),
        ("folder:/a/b", "folder:PATH"),
        ("folder:root=/a b/c,split_fraction=0.2", "folder:root=PATH,split_fraction=0.2"),
        ("file:///home/me", "PATH"),
        ("'/quoted path/x'", "'PATH"),
        ("https://host/a/b", "https://host/a/b"),
        ("hf:org/name", "hf:org/name"),
        ("relative/path", "relative/path"),
        ("1/2", "1/2"),
        ({"a": ["/x", 3, None, ("/y",)]}, {"a": ["PATH", 3, None, ["PATH"]]}),
    ],
)
def test_absolute_paths_are_left_out_wherever_they_stand(text: Any, public: Any) -> None:
    assert without_places(text) == public


def test_what_was_shared_once_is_shared_unchanged_from_then_on(public: Archive, tmp_path: Path) -> None:
    assert shipment(public, Licences()).changed == ()
    again = push(public, str(tmp_path / "again"))
    assert files_of(Path(again)) == files_of(public.path)


def test_a_card_that_somebody_edited_is_shared_as_they_left_it(copy: Archive, tmp_path: Path) -> None:
    edited = (copy.path / "README.md").read_text() + "\nAsk the authors for the images.\n"
    (copy.path / "README.md").write_text(edited)
    notes = Notes()
    shared = open_archive(push(copy, str(tmp_path / "out"), licences=TERMS, progress=notes))
    assert (shared.path / "README.md").read_text() == edited
    assert any("README.md was edited" in line for line in notes.said)
    assert shared.verify("full").ok


def test_a_card_that_leads_elsewhere_is_not_shared(copy: Archive, tmp_path: Path) -> None:
    (tmp_path / "private.txt").write_text("not for you")
    (copy.path / "README.md").unlink()
    (copy.path / "README.md").symlink_to(tmp_path / "private.txt")
    with pytest.raises(IntegrityError, match="is a link"):
        push(copy, str(tmp_path / "out"), licences=TERMS)
    assert not (tmp_path / "out").exists()


def test_a_damaged_archive_is_not_shared(copy: Archive, tmp_path: Path) -> None:
    shard = next(copy.path.glob("logits/c/1/*/*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    with pytest.raises(IntegrityError, match="damaged"):
        push(copy, str(tmp_path / "out"), licences=TERMS)
    assert not (tmp_path / "out").exists()


def test_an_archive_of_the_first_version_gets_a_card_for_the_hub_on_its_way(tmp_path: Path) -> None:
    old = open_archive(GOLDEN)
    shared = open_archive(push(old, str(tmp_path / "out"), licences=Licences(weights="mit")))
    assert shared.manifest.digest == old.manifest.digest
    assert (shared.path / "README.md").read_text().startswith("---\npretty_name:")
    assert (shared.path / "entropies.svg").is_file()
    assert shared.verify("full").ok


# ---------------------------------------------------------------- whole archives, over HTTP


@pytest.mark.parametrize("layout_name", list(LAYOUTS))
def test_what_is_pulled_is_what_was_pushed_in_every_layout(tmp_path: Path, layout_name: str) -> None:
    source = write(tmp_path / "source" / "a", layout_name)
    published = Path(push(source, str(tmp_path / "www" / "a"), licences=TERMS))
    with FaultyServer(tmp_path / "www") as server:
        notes = Notes()
        pulled = pull(open_archive(f"{server.url}/a"), tmp_path / "here", progress=notes)
        assert notes.done["pull a"][0] == notes.done["pull a"][1] > 0
    assert files_of(pulled.path) == files_of(published)
    assert pulled.manifest.digest == source.manifest.digest
    assert_same_rows(pulled, source)


def test_a_complete_archive_is_not_pulled_again(server: FaultyServer, public: Archive, tmp_path: Path) -> None:
    there = open_archive(f"{server.url}/a")
    pull(there, tmp_path / "here")
    server.forget()
    notes = Notes()
    pull(there, tmp_path / "here", progress=notes)
    assert any("nothing to do" in line for line in notes.said)
    assert {request.path for request in server.asked()} == {"/a/kdcache.json"}
    # One that lost a file meanwhile gets that file, and no other.
    lost = next((tmp_path / "here").glob("logits/c/2/0/*"))
    lost.unlink()
    server.forget()
    assert pull(there, tmp_path / "here").verify("full").ok
    fetched = {request.path.removeprefix("/a/") for request in server.asked("")}
    assert fetched & {record.path for shard in public.shards() for record in shard.files} == {"logits/c/2/0/0"}


@pytest.mark.parametrize("fault", ["cut", "reset", "status", "wrong", "no_ranges", "short"])
def test_faults_that_pass_are_survived(server: FaultyServer, public: Archive, tmp_path: Path, fault: str) -> None:
    faults = {
        "cut": Fault(times=2, cut=5000),
        "reset": Fault(times=2, reset=True),
        "status": Fault(times=2, status=503),
        "wrong": Fault(times=1, wrong=True),
        "no_ranges": Fault(no_ranges=True, cut=7000, times=1),
        "short": Fault(times=1, short=10),
    }
    there = open_archive(f"{server.url}/a")
    server.faults = {"logits/c/1/0/0": faults[fault], "logits/c/3/1/0": faults[fault]}
    assert files_of(pull(there, tmp_path / "here").path) == files_of(public.path)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(wrong=True), IntegrityError),
        (Fault(short=10), IntegrityError),
        (Fault(endless=True), IntegrityError),
        (Fault(status=404), KdcacheError),
        (Fault(status=500), RetryError),
    ],
)
def test_a_file_that_is_not_what_the_manifest_says_leaves_no_archive(
    server: FaultyServer, public: Archive, tmp_path: Path, fault: Fault, error: type[KdcacheError]
) -> None:
    there = open_archive(f"{server.url}/a")
    server.faults = {"logits/c/1/0/0": fault}
    with pytest.raises(error, match="logits/c/1/0/0"):
        pull(there, tmp_path / "here")
    with pytest.raises(IncompleteError, match="not complete"):
        open_archive(tmp_path / "here")
    server.forget()
    assert files_of(pull(there, tmp_path / "here").path) == files_of(public.path)


def test_rows_that_are_not_what_the_digest_says_are_noticed_although_every_file_is(tmp_path: Path, public: Archive) -> None:
    """Somebody changed a shard and recorded the change, but the digest, by which people know the archive, tells."""
    www = tmp_path / "www" / "a"
    shutil.copytree(public.path, www)
    manifest, table = json.loads((www / "kdcache.json").read_text()), www / public.manifest.shards.path
    lines = table.read_text().splitlines()
    record = json.loads(lines[0])
    name = next(file["path"] for file in record["files"] if file["path"].startswith("sample/"))
    data = bytearray((www / name).read_bytes())
    data[:4] = data[4:8]
    (www / name).write_bytes(data)
    update = {"bytes": len(data), "sha256": _sha256(data)}
    record["files"] = [{**file, **(update if file["path"] == name else {})} for file in record["files"]]
    table.write_text("\n".join([json.dumps(record), *lines[1:]]) + "\n")
    manifest["shards"] |= {"bytes": table.stat().st_size, "sha256": _sha256(table.read_bytes())}
    (www / "kdcache.json").write_text(json.dumps(resealed(manifest)))
    with FaultyServer(tmp_path / "www") as server, pytest.raises(IntegrityError, match="verify"):
        pull(open_archive(f"{server.url}/a"), tmp_path / "here")
    assert not (tmp_path / "here" / "kdcache.json").exists()


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def test_a_server_that_forbids_what_is_missing_has_no_signature(server: FaultyServer, public: Archive, tmp_path: Path) -> None:
    server.faults = {"kdcache.sig": Fault(status=403)}
    assert files_of(pull(open_archive(f"{server.url}/a"), tmp_path / "here").path) == files_of(public.path)


def test_a_card_that_was_edited_at_its_source_is_taken_as_it_is(tmp_path: Path, public: Archive) -> None:
    www = tmp_path / "www" / "a"
    shutil.copytree(public.path, www)
    (www / "README.md").write_text("# Edited on the web page\n")
    notes = Notes()
    with FaultyServer(tmp_path / "www") as server:
        pulled = pull(open_archive(f"{server.url}/a"), tmp_path / "here", progress=notes)
    assert (pulled.path / "README.md").read_text() == "# Edited on the web page\n"
    assert any("README.md was edited" in line for line in notes.said)
    assert_same_rows(pulled, public)


# ---------------------------------------------------------------- parts


def test_some_views_are_an_archive_that_says_what_it_is_a_part_of(
    server: FaultyServer, public: Archive, made: Archive, tmp_path: Path
) -> None:
    part = pull(open_archive(f"{server.url}/a"), tmp_path / "part", views=range(1, 3))
    assert part.views == range(1, 3)
    assert part.manifest.subset_of is not None
    assert part.manifest.subset_of.digest == made.manifest.digest
    assert part.manifest.known_licences == TERMS
    for view in part.views:
        np.testing.assert_array_equal(part.read(view, 0, SAMPLES).logits, made.read(view, 0, SAMPLES).logits)
    card = (part.path / "README.md").read_text()
    assert f"views 1 to 2 of the archive with digest `{made.manifest.digest}`, which has views 0 to 3." in card
    fetched = {request.path for request in server.asked() if "/logits/c/" in request.path}
    assert {path.split("/")[4] for path in fetched} == {"1", "2"}
    # Repeating it does nothing, more views are added, and it is no beginning of another part.
    server.forget()
    assert pull(open_archive(f"{server.url}/a"), tmp_path / "part", views=range(1, 3)).manifest == part.manifest
    assert not [request for request in server.asked() if "/logits/c/" in request.path]
    assert pull(open_archive(f"{server.url}/a"), tmp_path / "part", views=range(1, 4)).views == range(1, 4)
    with pytest.raises(KdcacheError):
        pull(open_archive(f"{server.url}/a"), tmp_path / "part", views=range(0, 3))


def test_statistics_travel_without_the_logits(server: FaultyServer, made: Archive, tmp_path: Path) -> None:
    there = open_archive(f"{server.url}/a")
    part = pull(there, tmp_path / "part", contents="statistics")
    assert part.manifest.contents == "statistics"
    assert part.manifest.subset_of is not None
    assert part.manifest.subset_of.digest == made.manifest.digest
    for view in part.views:
        np.testing.assert_array_equal(part.column("entropy", view), made.column("entropy", view))
        np.testing.assert_array_equal(part.column("argmax", view), made.column("argmax", view))
    assert part.manifest.statistics == made.manifest.statistics
    assert not list(part.path.glob("logits*"))
    assert stored_bytes(part.manifest) < 0.4 * stored_bytes(made.manifest)


def test_parts_are_pushed_as_archives_of_their_own(made: Archive, tmp_path: Path) -> None:
    before = sorted(made.path.parent.iterdir())
    part = open_archive(push(made, str(tmp_path / "part"), licences=TERMS, views=range(2, 4)))
    assert (part.views, part.manifest.known_licences) == (range(2, 4), TERMS)
    assert part.verify("full").ok
    assert not any(b"secret" in data for data in files_of(part.path).values())
    statistics = open_archive(push(made, str(tmp_path / "statistics"), licences=TERMS, contents="statistics"))
    assert statistics.manifest.contents == "statistics"
    assert open_archive(push(statistics, str(tmp_path / "again"))).manifest == statistics.manifest
    assert sorted(made.path.parent.iterdir()) == before  # nothing is left beside the archive
    with pytest.raises(UsageError):
        push(made, str(tmp_path / "none"), views=range(2, 4))
    assert sorted(made.path.parent.iterdir()) == before


# ---------------------------------------------------------------- folders


def test_only_an_empty_folder_is_filled(public: Archive, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    some = range(1, 3)
    for transfer in (lambda to: pull(public, to), lambda to: pull(public, to, views=some), lambda to: push(public, str(to))):
        with pytest.raises(UsageError, match="is not empty"):
            transfer(tmp_path / "photos")
    assert files_of(tmp_path / "photos") == {"cat.jpg": b"meow"}
    with pytest.raises(UsageError, match="is the archive itself"):
        push(public, str(public.path))


def test_another_archive_is_never_overwritten(public: Archive, tmp_path: Path) -> None:
    other = write(tmp_path / "other", seed=2)
    before = files_of(other.path)
    for transfer in (lambda: pull(public, other.path), lambda: push(public, str(other.path))):
        with pytest.raises(UsageError, match="holds another archive"):
            transfer()
    assert files_of(other.path) == before


def test_other_terms_for_the_same_archive_replace_its_manifest_and_card(made: Archive, tmp_path: Path) -> None:
    push(made, str(tmp_path / "out"), licences=TERMS)
    logits = (tmp_path / "out/logits/c/0/0/0").stat().st_ino
    again = open_archive(push(made, str(tmp_path / "out"), licences=Licences(data="odbl", weights="mit")))
    assert again.manifest.known_licences == Licences(data="odbl", weights="mit")
    assert again.verify("full").ok
    assert (tmp_path / "out/logits/c/0/0/0").stat().st_ino == logits  # the shards are left as they are


def test_a_disk_without_room_is_told_before_anything_is_fetched(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = open_archive(f"{server.url}/a")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))  # type: ignore[attr-defined]
    for views in (None, range(1, 3)):
        with pytest.raises(RetryError, match=r"the archive needs .* more, .* has 5\.0 kB") as caught:
            pull(there, tmp_path / "here" / f"{views}", views=views)
        assert "--views" in caught.value.fix
    assert not server.asked("logits/c/0/0/0")


def test_two_processes_do_not_fill_one_folder(public: Archive, tmp_path: Path) -> None:
    (tmp_path / "here/.pull").mkdir(parents=True)
    with filelock.FileLock(tmp_path / "here/.pull/lock"), pytest.raises(RetryError, match="another process is filling"):
        pull(public, tmp_path / "here")
    assert files_of(pull(public, tmp_path / "here").path) == files_of(public.path)


# ---------------------------------------------------------------- strangers


def forged(public: Archive, records: list[FileRecord], www: Path) -> None:
    """The public archive, with `records` among the files that its manifest names."""
    shutil.copytree(public.path, www)
    fields = json.loads((www / "kdcache.json").read_text())
    fields["files"] += [record.model_dump() for record in records]
    (www / "kdcache.json").write_text(json.dumps(resealed(fields)))


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/outside",
        "a/../../outside",
        "..",
        "a\\b",
        "kdcache.json",
        "kdcache.sig",
        ".pull/lock",
        ".dump/plan.json",
        "zarr.json/inside",
        "logits",
        "zarr.json",
        "n" * 300,
        "a//b",
    ],
)
def test_no_name_of_a_stranger_leads_out_of_the_folder(tmp_path: Path, public: Archive, name: str) -> None:
    data = b"a stranger's bytes"
    forged(public, [FileRecord(path=name, bytes=len(data), sha256=_sha256(data))], tmp_path / "www" / "a")

    def content(request: Request) -> Answer:
        file = tmp_path / "www" / request.path.lstrip("/")
        body = file.read_bytes() if ".." not in request.path and file.is_file() else data
        return Answer(200, {}, body)

    with FaultyServer(content) as server, pytest.raises(KdcacheError):
        pull(open_archive(f"{server.url}/a"), tmp_path / "x" / "here")
    outside = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(tmp_path / "www")]
    assert not any(p.read_bytes() == data for p in outside)
    assert not (tmp_path / "x" / "here" / "kdcache.json").exists()


def test_links_in_the_folder_are_replaced_and_not_followed(public: Archive, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"precious")
    (tmp_path / "here/.pull").mkdir(parents=True)
    (tmp_path / "here/zarr.json").symlink_to(tmp_path / "mine")
    pull(public, tmp_path / "here")
    assert (tmp_path / "mine").read_bytes() == b"precious"
    assert not (tmp_path / "here/zarr.json").is_symlink()


def test_a_size_that_no_disk_holds_is_refused(tmp_path: Path, public: Archive) -> None:
    forged(public, [FileRecord(path="huge", bytes=10**18, sha256="0" * 64)], tmp_path / "www" / "a")
    with FaultyServer(tmp_path / "www") as server, pytest.raises(RetryError, match="needs 1,000,000,0"):
        pull(open_archive(f"{server.url}/a"), tmp_path / "here")


# ---------------------------------------------------------------- object stores


@pytest.fixture(scope="module")
def one_s3() -> Iterator[FaultyServer]:
    with faulty_s3() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "REGION": "us-east-1"}.items():
            patch.setenv(f"AWS_{name}", value)
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        with contextlib.closing(http.client.HTTPConnection(server.url.removeprefix("http://"))) as connection:
            connection.request("PUT", "/bucket")
            assert connection.getresponse().status == 200
        yield server


@pytest.fixture
def s3(one_s3: FaultyServer) -> FaultyServer:
    one_s3.forget()
    return one_s3


def test_a_bucket_gives_back_what_it_was_given(s3: FaultyServer, made: Archive, public: Archive, tmp_path: Path) -> None:
    url = "s3://bucket/round/a"
    assert push(made, url, licences=TERMS) == url
    puts = [request.path.removeprefix("/bucket/round/a/") for request in s3.asked("", "PUT")]
    assert puts[0] == ".push.json"
    assert puts[-1] == "kdcache.json"
    assert set(open_remote(url).names()) == files_of(public.path).keys()
    s3.forget()
    notes = Notes()
    push(made, url, licences=TERMS, progress=notes)
    assert any("nothing to do" in line for line in notes.said)
    assert not s3.asked("", "PUT")
    assert files_of(pull(open_archive(url), tmp_path / "here").path) == files_of(public.path)
    with pytest.raises(UsageError, match="holds another archive"):
        push(write(tmp_path / "other", seed=2), url, licences=TERMS)


def test_other_terms_are_sent_to_a_bucket_without_the_shards(s3: FaultyServer, made: Archive) -> None:
    url = "s3://bucket/terms/a"
    push(made, url, licences=TERMS)
    s3.forget()
    push(made, url, licences=Licences(data="odbl", weights="mit"))
    assert open_archive(url).manifest.known_licences == Licences(data="odbl", weights="mit")
    shards = {file.path for shard in made.shards() for file in shard.files}
    assert not shards & {request.path.removeprefix("/bucket/terms/a/") for request in s3.asked("", "PUT")}
    assert ".push.json" not in open_remote(url).names()


@pytest.mark.exhaustive
def test_a_push_to_a_bucket_that_failed_goes_on_where_it_stopped(s3: FaultyServer, made: Archive, tmp_path: Path) -> None:
    url = "s3://bucket/failed/a"
    s3.faults = {"logits/c/2/1/0": Fault(status=403)}
    with pytest.raises(KdcacheError):
        push(made, url, licences=TERMS)
    with pytest.raises(IncompleteError, match="not finished"):
        open_archive(url)
    sent = {request.path for request in s3.asked("", "PUT")}
    assert len(sent) > 4
    with pytest.raises(UsageError, match="beginning of another archive"):
        push(write(tmp_path / "other", seed=2), url, licences=TERMS)
    s3.forget()
    push(made, url, licences=TERMS)
    again = {request.path for request in s3.asked("", "PUT")}
    shards = {f"/bucket/failed/a/{file.path}" for shard in made.shards() for file in shard.files}
    assert {path for path in again & sent & shards if not path.endswith("logits/c/2/1/0")} == set()
    assert open_archive(url).verify("full").ok


def test_a_server_that_takes_nothing_is_told_apart(server: FaultyServer, public: Archive) -> None:
    with pytest.raises(UsageError, match="cannot be written to"):
        push(public, f"{server.url}/elsewhere")
    with pytest.raises(UsageError, match="unknown kind of URL"):
        push(public, "ftp://host/x")


# ---------------------------------------------------------------- the Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FaultyServer, WritableHub]]:
    content = WritableHub("secret")
    with FaultyServer(content) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # LFS over HTTP, as where there is no Xet
        monkeypatch.setenv("HF_TOKEN", "secret")
        yield server, content


def test_the_hub_gives_back_what_it_was_given(hub: Any, made: Archive, public: Archive, tmp_path: Path) -> None:
    _, content = hub
    url = "hf://datasets/team/logits"
    push(made, url, licences=TERMS, private=True)
    assert content.private == {"team/logits": True}
    assert content.repos["team/logits"]["main"].keys() - {".gitattributes"} == files_of(public.path).keys()
    assert content.repos["team/logits"]["main"].items() >= files_of(public.path).items()
    *shards, (message, closing) = content.commits
    assert set(closing) == {"kdcache.json", *FOR_PEOPLE}
    assert made.manifest.digest[:12] in message
    assert not any("kdcache.json" in names for _, names in shards)
    assert files_of(pull(open_archive(url), tmp_path / "here").path) == files_of(public.path)
    notes = Notes()
    push(made, url, licences=TERMS, progress=notes)
    assert any("nothing to do" in line for line in notes.said)
    assert len(content.commits) == len(shards) + 1


def test_a_push_to_the_hub_that_failed_goes_on_where_it_stopped(
    hub: Any, made: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, content = hub
    url = "hf://datasets/team/logits@v2/sub/a"
    monkeypatch.setattr(sharing_module, "HUB_FILES", 8)
    uploads = 0

    def full(request: Request) -> Answer:
        nonlocal uploads
        if request.method == "PUT":
            uploads += 1
            if uploads > 3:
                return Answer(400)
        return content(request)

    server.content = full
    with pytest.raises(RetryError, match="cannot be reached"):
        push(made, url, licences=TERMS)
    with pytest.raises(IncompleteError):
        open_archive(url)
    kept = set(content.blobs)
    assert kept
    server.content = content
    server.forget()
    push(made, url, licences=TERMS)
    assert not kept & {request.path.removeprefix("/lfs/") for request in server.asked("", "PUT")}
    pulled = pull(open_archive(url), tmp_path / "here")
    assert pulled.manifest.digest == made.manifest.digest
    assert content.repos["team/logits"]["main"].keys() == {".gitattributes"}  # the other branch is left alone


def test_data_of_others_are_left_alone(hub: Any, s3: FaultyServer, public: Archive) -> None:
    _, content = hub
    content.repos["team/photos"] = {"main": {"README.md": b"# Photos", "train/cat.jpg": b"meow"}}
    open_remote("s3://bucket/photos").put("train/cat.jpg", b"meow")
    for url in ("hf://datasets/team/photos", "s3://bucket/photos"):
        with pytest.raises(UsageError, match="is not empty"):
            push(public, url)
    assert content.repos["team/photos"]["main"] == {"README.md": b"# Photos", "train/cat.jpg": b"meow"}
    assert list(open_remote("s3://bucket/photos").names()) == ["train/cat.jpg"]
    push(public, "hf://datasets/team/photos/logits")  # beside them there is room
    assert open_archive("hf://datasets/team/photos/logits").manifest == public.manifest


def test_whoever_may_not_write_to_the_hub_is_told_so(hub: Any, public: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "another")
    with pytest.raises(UsageError, match="not allowed to write") as caught:
        push(public, "hf://datasets/team/logits")
    assert "hf auth login" in caught.value.fix
    for wrong in ("hf://team/logits", "hf://datasets/logits", "hf://datasets/te am/lo!gits"):
        with pytest.raises(UsageError, match="is not a dataset on the Hub"):
            push(public, wrong)


# ---------------------------------------------------------------- kill -9


def start(*arguments: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "kdcache", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for(process: "subprocess.Popen[bytes]", condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_pull_that_was_killed_goes_on_where_it_stopped(server: FaultyServer, public: Archive, tmp_path: Path) -> None:
    here = tmp_path / "here"
    size = (public.path / "logits/c/3/1/0").stat().st_size
    server.faults = {"logits/c/3/1/0": Fault(drip=(300, 0.02)), "logits/c/2/0/0": Fault(stall=30)}
    process = start("pull", f"{server.url}/a", here)
    try:
        wait_for(process, lambda: server.sent.get("/a/logits/c/3/1/0", 0) > 10_000 and (here / "logits/c/1/1/0").is_file())
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    with pytest.raises(IncompleteError, match="not complete"):
        open_archive(here)
    finished = {name for name in files_of(here) if not name.startswith(".pull")}
    assert "logits/c/3/1/0" not in finished
    server.forget()
    assert run(["pull", f"{server.url}/a", str(here)]) == 0
    assert files_of(here) == files_of(public.path)
    assert server.sent["/a/logits/c/3/1/0"] < size - 5000  # what had arrived of it was kept
    shards = {file.path for shard in public.shards() for file in shard.files}
    assert not finished & shards & {path.removeprefix("/a/") for path in server.sent}


@pytest.mark.exhaustive
def test_a_push_that_was_killed_goes_on_where_it_stopped(s3: FaultyServer, public: Archive, tmp_path: Path) -> None:
    url = "s3://bucket/killed/a"
    content, blocked = s3.content, "/bucket/killed/a/logits/c/3/1/0"

    def slow(request: Request) -> Answer:
        if request.method == "PUT" and request.path == blocked:
            time.sleep(5)
            return Answer(500)
        return content(request)

    s3.content = slow
    process = start("push", public.path, url)
    try:
        wait_for(process, lambda: any(r.path == blocked for r in s3.asked("", "PUT")) and len(s3.asked("", "PUT")) > 20)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        s3.content = content
    with pytest.raises(IncompleteError, match="not finished"):
        open_archive(url)
    there = set(open_remote(url).names())
    s3.forget()
    push(public, url)
    shards = {file.path for shard in public.shards() for file in shard.files}
    again = {request.path.removeprefix("/bucket/killed/a/") for request in s3.asked("", "PUT")}
    assert again & shards == shards - there
    assert files_of(pull(open_archive(url), tmp_path / "here").path) == files_of(public.path)


# ---------------------------------------------------------------- signatures


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs of keys, one.pem and two.pem with the public halves one.pub and two.pub; locked.pem is encrypted."""
    pytest.importorskip("model_signing")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("keys")
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    for name in ("one", "two", "locked"):
        key = ec.generate_private_key(ec.SECP256R1())
        lock = serialization.BestAvailableEncryption(b"pw") if name == "locked" else serialization.NoEncryption()
        (folder / f"{name}.pem").write_bytes(key.private_bytes(pem, pkcs8, lock))
        half = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pub").write_bytes(half)
    return folder


@pytest.fixture
def signed(public: Archive, keys: Path, tmp_path: Path) -> Archive:
    shutil.copytree(public.path, tmp_path / "signed")
    archive = open_archive(tmp_path / "signed")
    assert sign_archive(archive, keys / "one.pem") == archive.path / "kdcache.sig"
    return archive


def test_a_signature_tells_whose_archive_it_is(signed: Archive, keys: Path) -> None:
    assert verify_signature(signed, keys / "one.pub").ok
    assert signed.verify("full").ok
    other = verify_signature(signed, keys / "two.pub")
    assert not other.ok
    with pytest.raises(IntegrityError, match=r"is not what the owner of .*two\.pub signed"):
        other.raise_if_failed()


@pytest.mark.parametrize("name", ["kdcache.json", "README.md", "kdcache.sig"])
def test_no_signed_byte_can_be_changed(signed: Archive, keys: Path, name: str) -> None:
    data = (signed.path / name).read_text()
    terms = json.loads((signed.path / "kdcache.json").read_text().replace('"cc-by-4.0"', '"mit"'))
    changes = {
        "kdcache.json": json.dumps(resealed(terms)),
        "README.md": data + " ",
        "kdcache.sig": data.replace('"payload":"', '"payload":"A') if '"payload":"' in data else data[:-40],
    }
    assert changes[name] != data
    (signed.path / name).write_text(changes[name])
    assert not verify_signature(open_archive(signed.path), keys / "one.pub").ok


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"verificationMaterial": 3}', "\0", "9" * 5000])
def test_a_signature_of_nonsense_is_a_failure_and_no_crash(signed: Archive, keys: Path, text: str) -> None:
    (signed.path / "kdcache.sig").write_text(text)
    assert not verify_signature(signed, keys / "one.pub").ok


def test_a_signature_covers_the_shards_through_their_checksums(signed: Archive, keys: Path) -> None:
    shard = next(signed.path.glob("logits/c/1/*/*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    assert run(["verify", str(signed.path), "--signed-by", str(keys / "one.pub")]) == IntegrityError.exit_code


def test_a_signature_travels_with_its_archive(signed: Archive, keys: Path, tmp_path: Path) -> None:
    sent = push(signed, str(tmp_path / "www" / "a"))
    with FaultyServer(tmp_path / "www") as server:
        there = open_archive(f"{server.url}/a")
        assert verify_signature(there, keys / "one.pub").ok
        pulled = pull(there, tmp_path / "here")
    assert verify_signature(pulled, keys / "one.pub").ok
    assert files_of(pulled.path) == files_of(Path(sent)) == files_of(signed.path)


def test_a_signed_archive_is_not_changed_on_its_way(copy: Archive, keys: Path, tmp_path: Path) -> None:
    sign_archive(copy, keys / "one.pem")
    with pytest.raises(UsageError, match="is signed, and would be changed"):
        push(copy, str(tmp_path / "out"), licences=TERMS)
    assert not (tmp_path / "out").exists()


def test_what_cannot_sign_or_verify_is_told_apart(signed: Archive, public: Archive, keys: Path, tmp_path: Path) -> None:
    for key in ("locked.pem", "one.pub"):
        with pytest.raises(UsageError, match="is not a key that can sign"):
            sign_archive(signed, keys / key)
    with pytest.raises(UsageError, match="is not a public key"):
        verify_signature(signed, keys / "one.pem")
    with pytest.raises(NotFoundError, match="does not exist"):
        sign_archive(signed, tmp_path / "no.pem")
    with pytest.raises(NotFoundError, match="is not signed"):
        verify_signature(public, keys / "one.pub")


def test_without_the_extra_people_are_told_what_to_install(
    public: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(UsageError, match="model-signing") as caught:
        sign_archive(public, tmp_path / "key.pem")
    assert caught.value.fix == "pip install 'kdcache[sign]'"


# ---------------------------------------------------------------- the command line


def test_the_commands_say_where_the_archive_is_now(
    server: FaultyServer, public: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    for options, name in (
        ([], "a"),
        (["--views", "1:3"], "a-views-1-3"),
        (["--views", "0", "--stats-only"], "a-views-0-1-statistics"),
    ):
        assert run(["pull", f"{server.url}/a", "--home", str(home), *options]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == str(home / "archives" / name)
        assert open_archive(home / "archives" / name).manifest.known_licences == TERMS
    assert run(["push", "a", str(tmp_path / "out"), "--home", str(home)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
    assert run(["info", str(home / "archives" / "a-views-1-3")]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"part of +{public.manifest.digest[:12]}... with views 0 to 3: here are views 1 to 2", shown)
    assert "data cc-by-4.0, teacher's weights apache-2.0" in shown


def test_a_dry_run_sends_nothing(made: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terms = "data=cc-by-4.0,weights=apache-2.0"
    assert run(["push", str(made.path), str(tmp_path / "out"), "--license", terms, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "cc-by-4.0" in shown
    assert "kdcache.json" in shown
    assert not (tmp_path / "out").exists()
    assert run(["push", str(made.path), str(tmp_path / "out"), "--dry-run"]) == UsageError.exit_code


@pytest.mark.parametrize(
    "options",
    [
        ["--license", "cc-by-4.0"],
        ["--license", "data=mit,data=mit"],
        ["--license", "data="],
        ["--license", "data=unknown,weights=mit"],
        ["--license", f"data={'x' * 200}"],
        ["--views", "3:9"],
        ["--views", "2:2"],
        ["--views", "x"],
    ],
)
def test_options_that_mean_nothing_are_refused(
    made: Archive, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["push", str(made.path), str(tmp_path / "out"), *options]) == UsageError.exit_code
    assert options[1].partition(",")[0][:20] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
