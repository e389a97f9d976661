"""Protects the archive as evidence: it resumes after anything, mixes with nothing else, and never passes damage in silence."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kdcache.archive import Archive, ArchiveWriter, open_archive, write_archive
from kdcache.archive.format import store as store_module
from kdcache.archive.format.manifest import FOR_PEOPLE, Manifest
from kdcache.archive.format.store import LocalStore
from kdcache.archive.writing import writer as writer_module
from kdcache.errors import (
    IncompatibleError,
    IncompleteError,
    IntegrityError,
    KdcacheError,
    NotFoundError,
    RetryError,
    UsageError,
)
from kdcache.views import ViewPolicy
from tests.archives import CLASSES, KEYS, LABELS, NAMES, SAMPLES, SHARD_ROWS, TEACHER, files, finish, logits, write_shard, writer
from tests.hostile import edit_manifest, edit_table

CHANGES: dict[str, Any] = {
    "class_names": [*NAMES[:-1], "another"],
    "codec": "f32",
    "num_samples": SAMPLES + 1,
    "shard_rows": 16,
    "policy": ViewPolicy(size=8),
    "teacher": TEACHER.model_copy(update={"weights_sha256": "cd" * 32}),
    "labels": LABELS[::-1].copy(),
    "keys": KEYS[::-1],
}


def shard_files(archive: Archive) -> dict[str, bytes]:
    names = [file.path for shard in archive.shards() for file in shard.files]
    return {name: (archive.path / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished archive. Shared: copy it before changing it."""
    return finish(writer(tmp_path_factory.mktemp("finished") / "a")).path


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


# ---------------------------------------------------------------- writing, stopping and going on


def test_an_interrupted_dump_goes_on_and_ends_as_if_never_interrupted(tmp_path: Path, finished: Path) -> None:
    path = tmp_path / "a"
    every = [(view, block) for view in range(2) for block in range(3)]
    for done, (view, block) in enumerate(every):
        session = writer(path)  # a new process each time
        assert session.missing() == every[done:]
        write_shard(session, view, block)
        assert session.missing() == every[done + 1 :]
    writer(path).finalize()
    assert files(path) == files(finished)


def test_a_dump_is_resumed_from_what_its_folder_says(tmp_path: Path, finished: Path) -> None:
    write_shard(writer(tmp_path / "a"), 1, 2)
    resumed = ArchiveWriter.resume(tmp_path / "a")
    assert (1, 2) not in resumed.missing()
    assert len(resumed.missing()) == 5
    finish(resumed)
    assert files(tmp_path / "a") == files(finished)


def test_there_is_nothing_to_resume_in_a_finished_or_empty_folder(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(NotFoundError, match="no unfinished dump"):
        ArchiveWriter.resume(tmp_path)
    with pytest.raises(NotFoundError, match="no unfinished dump") as caught:
        ArchiveWriter.resume(finished)
    assert "finished" in caught.value.why


def test_who_resumes_leaves_no_trace(tmp_path: Path, finished: Path) -> None:
    """The command and the noise measured anew are those of whoever began, so the archive is the same, byte for byte."""
    path = tmp_path / "a"
    write_shard(writer(path), 0, 0)
    assert TEACHER.noise is not None
    noise = TEACHER.noise.model_copy(update={"kl_max": 9e-6})
    finish(writer(path, teacher=TEACHER.model_copy(update={"noise": noise}), provenance={"command": "another"}))
    assert files(path) == files(finished)


def test_an_unfinished_archive_cannot_be_finalized_or_opened(tmp_path: Path) -> None:
    session = writer(tmp_path / "a")
    write_shard(session, 0, 1)
    with pytest.raises(IncompleteError) as caught:
        session.finalize()
    assert caught.value.exit_code == 6
    assert "5 of 6 shards" in caught.value.what
    assert "view 0 block 0" in caught.value.what
    assert caught.value.fix == "kdcache dump-teacher --teacher t"
    with pytest.raises(IncompleteError) as caught:
        open_archive(tmp_path / "a")
    assert caught.value.exit_code == 6
    assert "kdcache dump-teacher --teacher t" in caught.value.fix


def test_a_shard_is_finished_by_its_record_not_by_its_files(tmp_path: Path) -> None:
    session = writer(tmp_path / "a")
    write_shard(session, 0, 0)
    for record in (tmp_path / "a" / ".dump" / "shards").iterdir():
        record.unlink()  # as if killed between the last data file and the record
    assert len(writer(tmp_path / "a").missing()) == 6


def test_shards_of_several_writers_add_up(tmp_path: Path, finished: Path) -> None:
    one, other = writer(tmp_path / "a"), writer(tmp_path / "a")
    for view, block in one.missing():
        write_shard(one if (view + block) % 2 else other, view, block)
    assert one.missing() == other.missing() == []
    one.finalize()
    assert other.finalize().manifest.digest == open_archive(finished).manifest.digest
    assert files(tmp_path / "a") == files(finished)


def test_a_writer_that_comes_late_finds_everything_done(tmp_path: Path, finished: Path) -> None:
    late = writer(tmp_path / "a")
    finish(writer(tmp_path / "a"))
    with late.claim(1, 1) as mine:
        assert not mine
    assert late.missing() == []
    late.finalize()
    assert files(tmp_path / "a") == files(finished)


def test_finalizing_twice_changes_nothing(tmp_path: Path, finished: Path) -> None:
    finish(writer(tmp_path / "a"))
    assert writer(tmp_path / "a").finalize().num_views == 2
    assert files(tmp_path / "a") == files(finished)


@pytest.mark.grid
@pytest.mark.parametrize("stage", ["unfinished", "finished"])
@pytest.mark.parametrize("changed", CHANGES)
def test_another_dump_in_the_same_folder_is_refused_and_changes_nothing(tmp_path: Path, stage: str, changed: str) -> None:
    path = tmp_path / "a"
    if stage == "finished":
        finish(writer(path))
    else:
        write_shard(writer(path), 0, 0)
    before = files(path)
    with pytest.raises(IncompatibleError) as caught:
        writer(path, num_views=3, **{changed: CHANGES[changed]})
    named = "layout" if changed == "shard_rows" else changed.removeprefix("num_")  # a chunk is no longer than its shard
    assert named in str(caught.value)
    assert caught.value.exit_code == 5
    assert files(path) == before


def test_appended_views_leave_every_earlier_shard_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a"
    first = finish(writer(path))
    before = shard_files(first)
    more = writer(path, num_views=4)
    assert more.missing() == [(view, block) for view in (2, 3) for block in range(3)]
    write_shard(more, 2, 1)
    meanwhile = open_archive(path)  # the archive stays what it was until the new views are whole
    assert meanwhile.num_views == 2
    assert meanwhile.verify("full").ok
    grown = finish(writer(path, num_views=4))
    assert grown.num_views == 4
    assert {name: data for name, data in shard_files(grown).items() if name in before} == before
    for view in range(4):
        np.testing.assert_array_equal(open_archive(path).read(view, 0, SAMPLES).logits, logits(view))
    assert grown.verify("full").ok
    assert grown.manifest.digest != first.manifest.digest
    at_once = finish(writer(tmp_path / "b", num_views=4))
    assert files(path) == files(at_once.path)


def test_fewer_views_than_there_are_is_no_smaller_archive(tmp_path: Path) -> None:
    finish(writer(tmp_path / "a", num_views=3))
    again = writer(tmp_path / "a", num_views=1)
    assert again.missing() == []
    assert again.finalize().num_views == 3


@pytest.mark.parametrize(
    ("view", "block", "rows", "classes"),
    [(2, 0, 8, 4), (-1, 0, 8, 4), (0, 3, 8, 4), (0, -1, 8, 4), (0, 2, 8, 4), (0, 0, 7, 4), (0, 0, 8, 5)],
)
def test_rows_that_are_no_whole_shard_are_refused(tmp_path: Path, view: int, block: int, rows: int, classes: int) -> None:
    session = writer(tmp_path / "a")
    with pytest.raises(UsageError, match="shard"):
        session.write(view, block, np.zeros((rows, classes), np.float32))
    assert len(session.missing()) == 6


@pytest.mark.parametrize("sample", [np.arange(7), np.zeros(8, int), np.arange(14, 22), np.arange(-1, 7), 3])
def test_impossible_sample_numbers_are_refused(tmp_path: Path, sample: Any) -> None:
    session = writer(tmp_path / "a")
    with pytest.raises(UsageError, match="sample"):
        session.write(0, 0, np.zeros((8, CLASSES), np.float32), sample=sample)
    assert len(session.missing()) == 6


def test_logits_that_the_codec_cannot_hold_leave_the_shard_missing(tmp_path: Path) -> None:
    session = writer(tmp_path / "a")
    values = logits(0)[8:16]
    values[2, 3] = 70
    with pytest.raises(UsageError) as caught:
        session.write(0, 1, values)
    for part in ("view 0", "position 10", "sample 10", "class 3", "70"):
        assert part in caught.value.what
    assert (0, 1) in writer(tmp_path / "a").missing()


@pytest.mark.parametrize(
    ("values", "names"),
    [(np.zeros((3, 4)), 4), (np.zeros((1, 3, 4)), 5), (np.zeros((1, 3, 1)), 1), (np.full((1, 3, 4), np.nan), 4)],
    ids=["no-view-axis", "names-differ", "one-class", "nan"],
)
def test_write_archive_refuses_what_is_no_table_of_logits(tmp_path: Path, values: NDArray, names: int) -> None:
    with pytest.raises(UsageError):
        write_archive(tmp_path / "a", values, [str(i) for i in range(names)])


def test_labels_and_keys_must_be_one_per_sample(tmp_path: Path) -> None:
    for wrong in ({"labels": [1, 2]}, {"keys": ["a"]}):
        with pytest.raises(UsageError, match="3 samples"):
            write_archive(tmp_path / "a", np.zeros((1, 3, 4)), NAMES, **wrong)


@pytest.mark.parametrize("wrong", [-1, CLASSES, 1 << 40])
def test_labels_must_be_numbers_of_classes(tmp_path: Path, wrong: int) -> None:
    labels = LABELS.copy()
    labels[3] = wrong
    with pytest.raises(UsageError, match=f"label {wrong} with {CLASSES} classes"):
        writer(tmp_path / "a", labels=labels)
    assert not (tmp_path / "a").exists()


def test_class_names_must_differ(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the class 'class 1' twice"):
        write_archive(tmp_path / "a", np.zeros((1, 3, 3), np.float32), ["class 0", "class 1", "class 1"])
    assert not (tmp_path / "a").exists()


def test_an_archive_whose_views_lack_a_sample_is_never_finished_nor_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = ArchiveWriter(tmp_path / "a", num_views=1, num_samples=4, class_names=NAMES, shard_rows=2)
    for block in (0, 1):
        session.write(0, block, np.zeros((2, CLASSES), np.float32), sample=np.array([0, 1]))  # each shard alone is fine
    with pytest.raises(UsageError, match="view 0 does not hold sample 2"):
        session.finalize()
    monkeypatch.setattr(writer_module, "_require_every_sample_once", lambda *_: None)  # as somebody else's software may
    archive = session.finalize()
    with pytest.raises(IntegrityError, match="every sample once"):
        archive.find(0, np.array([1]))
    assert not archive.verify("full").ok


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"view": 0}', "another", "\xff"])
def test_a_shard_with_a_damaged_record_is_written_anew(tmp_path: Path, finished: Path, damage: str) -> None:
    path = tmp_path / "a"
    session = writer(path)
    write_shard(session, 0, 0)
    write_shard(session, 0, 1)
    records = path / ".dump/shards"
    damaged = (records / "0-1.json").read_bytes() if damage == "another" else damage.encode("latin-1")
    (records / "0-0.json").write_bytes(damaged)
    (records / "notes.json").write_bytes(b"{}")  # nobody's
    again = writer(path)
    assert again.missing() == [(0, 0), (0, 2), (1, 0), (1, 1), (1, 2)]
    with again.claim(0, 0) as mine:
        assert mine
        write_shard(again, 0, 0)
    finish(again)
    assert files(path) == files(finished)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 5000, b"codec"])
def test_a_damaged_plan_is_an_integrity_error_and_its_fix_works(tmp_path: Path, finished: Path, damage: bytes) -> None:
    path = tmp_path / "a b"
    write_shard(writer(path), 0, 0)
    plan = path / ".dump/plan.json"
    plan.write_bytes(plan.read_bytes().replace(b'"i16"', b'"i17"') if damage == b"codec" else damage)
    before = files(path)
    for attempt in (lambda: writer(path), lambda: ArchiveWriter.resume(path)):
        with pytest.raises(IntegrityError) as caught:
            attempt()
        assert str(plan) in caught.value.what
    assert files(path) == before
    command = caught.value.fix.partition("(")[2].partition(")")[0]
    assert command.startswith("mv ")
    subprocess.run(command, shell=True, check=True)
    assert files(finish(writer(path)).path) == files(finished)
    assert files(tmp_path / "a b.aside") == before


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"{}", b"\xff", b'{"labels": [1], "keys": null}', b'{"labels": 7, "keys": 7}']
)
def test_damaged_labels_and_keys_of_a_dump_are_an_integrity_error_and_the_fix_works(
    tmp_path: Path, finished: Path, damage: bytes
) -> None:
    path = tmp_path / "a b"
    session = writer(path)
    for view, block in session.missing():
        write_shard(session, view, block)
    samples = path / ".dump/samples.json"
    samples.write_bytes(damage)
    for attempt in (lambda: writer(path), lambda: ArchiveWriter.resume(path).finalize()):
        with pytest.raises(IntegrityError) as caught:
            attempt()
        assert str(samples) in caught.value.what
    remove, _, repeat = caught.value.fix.partition(";")
    assert "kdcache dump-teacher --teacher t" in repeat
    subprocess.run(remove, shell=True, check=True)
    again = writer(path)
    assert again.missing() == []
    again.finalize()
    assert files(path) == files(finished)


@pytest.mark.parametrize("appending", [False, True])
def test_the_fix_for_a_damaged_manifest_works(tmp_path: Path, finished: Path, appending: bool) -> None:
    path = tmp_path / "a b"
    finish(writer(path))
    if appending:
        write_shard(writer(path, num_views=3), 2, 0)
    (path / "kdcache.json").write_text("{")
    with pytest.raises(IntegrityError) as caught:
        open_archive(path)
    if appending:
        command = caught.value.fix.rpartition(": ")[2]
        assert command.endswith("&& kdcache finalize '" + str(path) + "'")
        subprocess.run(command.partition(" &&")[0], shell=True, check=True)
        with pytest.raises(IncompleteError, match="8 of 9 shards"):  # which has its own fix, to run the dump again
            ArchiveWriter.resume(path).finalize()
        assert finish(writer(path, num_views=3)).verify().ok
        return
    subprocess.run(caught.value.fix.rpartition(": ")[2], shell=True, check=True)
    assert (tmp_path / "a b.aside/README.md").is_file()
    assert files(finish(writer(path)).path) == files(finished)


@pytest.mark.parametrize(
    "command",
    [
        "rm -rf ~",
        "kdcache dump-teacher\n rm -rf ~",
        "kdcache dump-teacher \x1b[2J",
        "kdcache dump-teacher 'x",
        7,
        ["kdcache"],
        "k" * 9999,
    ],
)
def test_a_command_that_is_none_of_kdcaches_is_not_handed_on(tmp_path: Path, command: Any) -> None:
    session = writer(tmp_path / "a", provenance={"command": command})
    for attempt in (session.finalize, lambda: open_archive(tmp_path / "a")):
        with pytest.raises(IncompleteError) as caught:
            attempt()
        assert caught.value.fix == "run the same dump-teacher command again; it goes on where it stopped"


def test_a_recorded_command_is_quoted_before_it_is_handed_on(tmp_path: Path) -> None:
    writer(tmp_path / "a", provenance={"command": "kdcache dump-teacher --teacher t; rm -rf ~ $(id) `id` 'a b'"})
    with pytest.raises(IncompleteError) as caught:
        open_archive(tmp_path / "a")
    assert caught.value.fix == "kdcache dump-teacher --teacher 't;' rm -rf '~' '$(id)' '`id`' 'a b'"


class Killed(BaseException):
    """Instead of `kill -9`: nothing in kdcache catches it."""


@pytest.mark.exhaustive
def test_while_views_are_appended_the_old_archive_stays_whole_whenever_that_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = tmp_path / "a", LocalStore.write
    finish(writer(path))
    for num_views in (4, 5):  # the second time, some files are those of the first
        session = writer(path, num_views=num_views)
        for view, block in session.missing():
            write_shard(session, view, block)
        stops = 0
        while open_archive(path).num_views == 2:
            left = stops

            def dying(store: LocalStore, name: str, data: bytes) -> None:
                nonlocal left
                if not left:
                    raise Killed
                left -= 1
                write(store, name, data)

            monkeypatch.setattr(LocalStore, "write", dying)
            try:
                writer_again = ArchiveWriter.resume(path)
                writer_again.finalize()
            except Killed:
                pass
            monkeypatch.setattr(LocalStore, "write", write)
            stops += 1
            old = open_archive(path)
            if old.num_views == 2:
                assert old.verify("full").failures == []
                np.testing.assert_array_equal(old.labels(), LABELS)
                np.testing.assert_array_equal(old.read(1, 0, SAMPLES).logits, logits(1))
            if num_views == 4 and stops == 9:
                break
        assert stops > 8
    assert open_archive(path).verify("full").failures == []
    assert files(path) == files(finish(writer(tmp_path / "b", num_views=5)).path)


def test_a_damaged_file_is_reported_while_views_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "a"
    finish(writer(path))
    write_shard(writer(path, num_views=3), 2, 0)
    (path / ".dump/closing.jsonl").write_text("not a record\n")
    flip(path / "zarr.json", 30)
    assert [failure.where for failure in open_archive(path).verify("full").failures] == ["zarr.json"]


# ---------------------------------------------------------------- processes, kills and full disks


def hold_claim(path: Path, started: Any) -> None:
    with writer(path).claim(1, 2) as mine:
        started.send(mine)
        time.sleep(120)


def test_a_shard_claimed_by_another_process_is_left_to_it_until_that_ends(tmp_path: Path) -> None:
    session = writer(tmp_path / "a")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    other = context.Process(target=hold_claim, args=(tmp_path / "a", there))
    other.start()
    try:
        assert here.poll(60)
        assert here.recv() is True
        with session.claim(1, 2) as mine:
            assert mine is False
        with session.claim(1, 1) as mine:  # other shards are free
            assert mine is True
        other.kill()  # however it ends, its claim ends with it
        other.join(60)
        with session.claim(1, 2) as mine:
            assert mine is True
            write_shard(session, 1, 2)
        with session.claim(1, 2) as mine:  # finished
            assert mine is False
    finally:
        other.kill()
        other.join(60)


DUMP = """
import sys
from pathlib import Path
from tests.archives import finish, write_shard, writer
from kdcache.errors import KdcacheError
from tests.squares import squares
path, command = Path(sys.argv[1]), sys.argv[2]
try:
    if command.startswith("limit="):
        import resource
        session = writer(path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(command[6:]), int(command[6:])))
        finish(session)
    elif command == "dump":
        finish(writer(path))
    elif command == "slowly":
        session = writer(path)
        for view, block in session.missing():
            write_shard(session, view, block)
            print(view, block, flush=True)
        session.finalize()
except KdcacheError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def start(path: Path, command: str, **options: Any) -> subprocess.Popen[str]:
    root = Path(__file__).parent.parent
    return subprocess.Popen([sys.executable, "-c", DUMP, str(path), command], text=True, cwd=root, **options)


@pytest.mark.exhaustive
@pytest.mark.parametrize("limit", [40, 1500])  # too small for any array of a shard, or for the metadata at the end
def test_a_full_disk_is_a_retry_and_what_was_finished_is_kept(tmp_path: Path, finished: Path, limit: int) -> None:
    path = tmp_path / "a"
    process = start(path, f"limit={limit}", stderr=subprocess.PIPE)
    _, message = process.communicate(timeout=120)
    assert process.returncode == RetryError.exit_code == 75, message
    assert "cannot be written" in message
    assert "ulimit -f" in message
    assert not list(path.rglob("*.tmp"))
    with pytest.raises(IncompleteError):
        open_archive(path)
    assert len(writer(path).missing()) == (6 if limit == 40 else 0)
    process = start(path, "dump")
    assert process.wait(timeout=120) == 0
    assert files(path) == files(finished)


def test_a_kill_at_any_moment_loses_nothing_that_was_finished(tmp_path: Path, finished: Path) -> None:
    path = tmp_path / "a"
    rng = np.random.default_rng(0)
    kept = 0
    for lines in (1, 2, 1):
        process = start(path, "slowly", stdout=subprocess.PIPE)
        assert process.stdout is not None
        seen = sum(bool(process.stdout.readline()) for _ in range(lines))  # fewer where nothing was left to write
        assert seen or kept == 6
        time.sleep(float(rng.uniform(0, 0.02)))
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        process.stdout.close()
        left = len(writer(path).missing())
        assert 6 - left >= kept + seen
        kept = 6 - left
    finish(writer(path))
    leftovers = {name for name in files(path) if name.endswith(".tmp")}
    assert {name: data for name, data in files(path).items() if name not in leftovers} == files(finished)
    assert open_archive(path).verify("full").ok


def test_files_are_on_disk_before_they_get_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    replace = os.replace

    def fsync(handle: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")

    def rename(source: Any, target: Any) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    LocalStore(tmp_path).write("deep/name", b"data")
    assert events == ["folder", "file", "rename", "folder"]  # the first: "deep" is an entry in a folder, too
    assert (tmp_path / "deep" / "name").read_bytes() == b"data"


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    store.write("name", b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RetryError, match="no room"):
        store.write("name", b"new")
    assert files(tmp_path) == {"name": b"old"}


def test_stale_temporary_files_are_ignored_and_swept_away(tmp_path: Path, finished: Path) -> None:
    session = writer(tmp_path / "a")
    write_shard(session, 0, 0)
    shard = next(path for path in (tmp_path / "a" / "logits").rglob("0") if path.is_file())
    rubbish = [shard.with_name(f".{shard.name}.99-abcd.tmp"), tmp_path / "a" / ".dump" / "shards" / ".0-1.json.99-abcd.tmp"]
    for path in rubbish:
        path.write_bytes(b"half a file")
    assert len(writer(tmp_path / "a").missing()) == 5
    archive = finish(writer(tmp_path / "a"))
    assert archive.verify("full").ok
    assert files(tmp_path / "a") == files(finished)


def test_an_archive_can_be_sent_to_another_process(finished: Path) -> None:
    archive = open_archive(finished)
    archive.read(0, 0, 3)
    again = pickle.loads(pickle.dumps(archive))
    np.testing.assert_array_equal(again.read(1, 5, 20).logits, logits(1)[5:20])


# ---------------------------------------------------------------- damage


def names_of(path: Path) -> list[str]:
    return [name for name in files(path) if name != "kdcache.json"]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("where", [*(pytest.param(end, marks=pytest.mark.exhaustive) for end in ("first", "last")), "middle"])
def test_one_flipped_bit_in_any_file_is_reported_with_the_files_name(finished: Path, copy: Path, where: str) -> None:
    names = names_of(finished)
    assert len(names) > 40
    for name in names:
        size = (copy / name).stat().st_size
        flip(copy / name, {"first": 0, "middle": size // 2, "last": size - 1}[where])
        verification = open_archive(copy).verify("full")
        assert not verification.ok, name
        assert name in {failure.where for failure in verification.failures}
        with pytest.raises(IntegrityError) as caught:
            verification.raise_if_failed()
        assert caught.value.exit_code == 4
        shutil.copy2(finished / name, copy / name)
    assert open_archive(copy).verify("full").ok


def test_reading_damaged_rows_is_an_error_and_the_others_stay_readable(finished: Path, copy: Path) -> None:
    expected = open_archive(finished)
    for shard in expected.shards():
        first = shard.block * SHARD_ROWS
        for record in shard.files:
            flip(copy / record.path, record.bytes // 2)
            archive = open_archive(copy)
            with pytest.raises(IntegrityError) as caught:
                archive.read(shard.view, first, first + shard.rows).load()
            assert record.path in caught.value.what
            other = (shard.block + 1) % 3
            rows = archive.read(shard.view, other * SHARD_ROWS, other * SHARD_ROWS + 5)
            np.testing.assert_array_equal(rows.logits, logits(shard.view)[other * SHARD_ROWS : other * SHARD_ROWS + 5])
            shutil.copy2(finished / record.path, copy / record.path)


def test_damaged_labels_or_keys_are_never_handed_out(finished: Path, copy: Path) -> None:
    for record in open_archive(finished).manifest.files:
        if record.path in FOR_PEOPLE:
            continue
        for at in (record.bytes // 3, record.bytes // 2):
            flip(copy / record.path, at)
            archive = open_archive(copy)
            for read in (archive.labels, archive.keys):
                with pytest.raises(KdcacheError):
                    read()
            shutil.copy2(finished / record.path, copy / record.path)
    assert open_archive(copy).keys() == KEYS


@pytest.mark.parametrize("level", ["quick", pytest.param("full", marks=pytest.mark.exhaustive)])
def test_truncated_grown_and_deleted_files_are_reported_by_name(finished: Path, copy: Path, level: Any) -> None:
    for name in names_of(finished):
        data = (finished / name).read_bytes()
        for damaged in (data[:-1], data + b"\0", b"", None):
            if damaged is None:
                (copy / name).unlink()
            else:
                (copy / name).write_bytes(damaged)
            verification = open_archive(copy).verify(level)
            failures = {failure.where: failure for failure in verification.failures}
            assert name in failures, (name, None if damaged is None else len(damaged))
            if damaged is None:
                assert "does not exist" in failures[name].got
        (copy / name).write_bytes(data)
    assert open_archive(copy).verify(level).ok


def test_shards_that_changed_places_are_noticed(finished: Path, copy: Path) -> None:
    shards = {(shard.view, shard.block): shard.files for shard in open_archive(finished).shards()}
    for one, other in zip(shards[0, 0], shards[1, 0], strict=True):
        shutil.copy2(finished / one.path, copy / other.path)
        shutil.copy2(finished / other.path, copy / one.path)
    failures = {failure.where for failure in open_archive(copy).verify("full").failures}
    differing = {one.path for one, other in zip(shards[0, 0], shards[1, 0], strict=True) if one.sha256 != other.sha256}
    assert differing
    assert differing <= failures


MANIFEST_CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "digest": lambda m: m.update(digest=m["digest"][::-1]),
    "digest-length": lambda m: m.update(digest=m["digest"][:-1]),
    "table-sha256": lambda m: m["shards"].update(sha256="0" * 64),
    "table-bytes": lambda m: m["shards"].update(bytes=m["shards"]["bytes"] - 1),
    "table-path": lambda m: m["shards"].update(path="README.md"),
    "file-sha256": lambda m: m["files"][0].update(sha256="0" * 64),
    "fewer-views": lambda m: m.update(num_views=1),
    "more-views": lambda m: m.update(num_views=3),
    "no-views": lambda m: m.update(num_views=0),
    "fewer-samples": lambda m: m.update(num_samples=SAMPLES - 1),
    "more-samples": lambda m: m.update(num_samples=SAMPLES + 1),
    "shard-rows": lambda m: m.update(shard_rows=16),
    "odd-shard-rows": lambda m: m.update(shard_rows=7),
    "class-name": lambda m: m["class_names"].__setitem__(1, "cat"),
    "class-order": lambda m: m["class_names"].reverse(),
    "a-class-less": lambda m: m["class_names"].pop(),
    "codec": lambda m: m.update(codec={"name": "f32"}),
    "unknown-codec": lambda m: m.update(codec={"name": "top10"}),
    "nameless-codec": lambda m: m.update(codec={}),
    "codec-option": lambda m: m["codec"].update(step=1),
    "layout": lambda m: m.update(layout={"name": "paper"}),
    "layout-option": lambda m: m["layout"].update(inner_rows=4),
    "no-rows": lambda m: m["layout"].update(inner_rows=0),
    "words-for-rows": lambda m: m["layout"].update(inner_rows="many"),
    "fractional-rows": lambda m: m["layout"].update(inner_rows=8.5),
    "policy": lambda m: m["policy"].update(seed=1),
    "policy-and-digest": lambda m: (m["policy"].update(seed=1), m.update(policy_digest=ViewPolicy(size=16, seed=1).digest)),
    "no-policy": lambda m: m.update(policy=None, policy_digest=None),
    "weights": lambda m: m["teacher"].update(weights_sha256="00" * 32),
    "format": lambda m: m.update(format="zip"),
    "version-zero": lambda m: m.update(format_version=0),
    "unknown-key": lambda m: m.update(colour="red"),
    "unknown-inner-key": lambda m: m["teacher"].update(colour="red"),
    "missing-key": lambda m: m.pop("shards"),
    "huge-samples": lambda m: m.update(num_samples=10**15),
    "many-samples": lambda m: m.update(num_samples=2 * 10**9),
    "many-views": lambda m: m.update(num_views=2 * 10**9),
    "huge-number": lambda m: m.update(num_samples=10**400),
    "negative": lambda m: m.update(num_samples=-5),
    "many-in-one-shard": lambda m: m.update(num_samples=2 * 10**9, shard_rows=2 * 10**9),
}


@pytest.mark.parametrize("name", MANIFEST_CHANGES)
def test_a_changed_manifest_is_never_believed(copy: Path, name: str) -> None:
    edit_manifest(copy, MANIFEST_CHANGES[name])
    try:
        archive = open_archive(copy)
    except KdcacheError:
        return
    assert archive.verify("full").failures
    for read in (
        lambda: archive.read(0, 0, archive.num_samples),
        lambda: archive.find(0, np.array([0])),
        archive.labels,
        archive.keys,
    ):
        try:
            read()
        except KdcacheError:
            continue


TABLE_CHANGES: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "lost": lambda t: t.pop(),
    "twice": lambda t: t.append(t[0]),
    "replaced": lambda t: t.__setitem__(0, t[1]),
    "rows": lambda t: t[0].update(rows=7),
    "rows-sha256": lambda t: t[0].update(rows_sha256="0" * 64),
    "view": lambda t: t[0].update(view=9),
    "file-sha256": lambda t: t[0]["files"][0].update(sha256="0" * 64),
    "absolute": lambda t: t[0]["files"][0].update(path="/etc/hostname"),
    "upwards": lambda t: t[0]["files"][0].update(path="../secret"),
    "garbage": lambda t: t[0].update(view="x"),
    "empty": lambda t: t.clear(),
}


@pytest.mark.parametrize("name", TABLE_CHANGES)
def test_a_forged_table_of_shards_is_never_believed(copy: Path, name: str) -> None:
    edit_table(copy, TABLE_CHANGES[name])
    try:
        archive = open_archive(copy)
    except IntegrityError:
        assert name == "empty"  # no table of shards is as short as that
        return
    assert archive.verify("full").failures


@pytest.mark.parametrize("outside", ["../secret", "/SECRET", "a/../../secret", "..\\secret", "logits/../../secret"])
def test_paths_that_lead_out_of_the_archive_are_refused_and_not_read(
    copy: Path, outside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = copy.parent / "secret"
    secret.write_text("private")
    name = outside.replace("/SECRET", str(secret))
    record = {"path": name, "bytes": 7, "sha256": store_module.sha256(b"private")}
    opened: list[str] = []
    read_bytes = Path.read_bytes

    def watched(path: Path) -> bytes:
        opened.append(str(path.resolve()))
        return read_bytes(path)

    edit_manifest(copy, lambda m: m["files"].append(record))
    edit_table(copy, lambda t: t[0]["files"].append(record))
    monkeypatch.setattr(Path, "read_bytes", watched)
    archive = open_archive(copy)
    for level in ("quick", "full"):
        failures = {failure.where: failure.got for failure in archive.verify(level).failures}  # type: ignore[arg-type]
        assert "leads out" in failures[name]
        assert failures["view 0 block 0"] == name
    with pytest.raises(IntegrityError):
        archive.labels()
    assert all(path.startswith(str(copy.resolve())) for path in opened)
    edit_manifest(copy, lambda m: m["shards"].update(path=name))
    assert not open_archive(copy).verify("full").ok
    with pytest.raises(IntegrityError, match="leads out"):
        open_archive(copy).shards()
    assert all(path.startswith(str(copy.resolve())) for path in opened)


@pytest.mark.parametrize("name", ["", "/etc/passwd", "..", "a/../b", "a\\b", "a\0b"])
def test_a_store_gives_out_no_path_outside_its_folder(tmp_path: Path, name: str) -> None:
    for act in (LocalStore(tmp_path).path, LocalStore(tmp_path).read, LocalStore(tmp_path).exists, LocalStore(tmp_path).size):
        with pytest.raises(IntegrityError):
            act(name)


def test_a_newer_format_names_the_version_that_reads_it(copy: Path) -> None:
    edit_manifest(copy, lambda m: m.update(format_version=2, readable_by="0.7.0", something_new={"a": 1}))
    with pytest.raises(IncompatibleError) as caught:
        open_archive(copy)
    assert caught.value.exit_code == 5
    assert "format version 2" in caught.value.what
    assert "0.7.0" in caught.value.why
    assert "kdcache>=0.7.0" in caught.value.fix


def test_an_unknown_key_is_refused_and_an_optional_one_is_accepted(copy: Path) -> None:
    edit_manifest(copy, lambda m: m.update(optional={"colour": {"of": ["the", "cover"]}}))
    archive = open_archive(copy)
    assert archive.manifest.optional == {"colour": {"of": ["the", "cover"]}}
    assert archive.verify("full").ok
    edit_manifest(copy, lambda m: m.update(colour="red"))
    with pytest.raises(IntegrityError, match="colour"):
        open_archive(copy)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": "kdcache"}',
        b'{"format": "kdcache", "format_version": "x"}',
    ],
)
def test_a_manifest_that_is_none_is_an_integrity_error(copy: Path, text: bytes) -> None:
    (copy / "kdcache.json").write_bytes(text)
    with pytest.raises(IntegrityError, match=r"kdcache\.json"):
        open_archive(copy)


def test_a_manifest_beyond_all_measure_is_refused_before_it_is_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (copy / "kdcache.json").open("ab") as file:
        file.truncate(1 << 36)  # sparse: takes no room
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("it was read"))
    with pytest.raises(IntegrityError, match="bytes"):
        open_archive(copy)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """At most 4 GB more address space than now: an absurd allocation fails at once instead of filling the machine."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("samples", [10**9, 2**31 - 1, 10**12])
def test_an_absurd_number_of_samples_is_an_error_and_no_allocation(copy: Path, samples: int) -> None:
    def forge(path: Path) -> None:
        """The manifest and the label array both claim `samples` labels, and all checksums agree."""
        meta = json.loads((path / "label" / "zarr.json").read_text())
        meta["shape"] = meta["chunk_grid"]["configuration"]["chunk_shape"] = [samples]
        data = json.dumps(meta).encode()
        (path / "label" / "zarr.json").write_bytes(data)

        def change(manifest: dict[str, Any]) -> None:
            manifest["num_samples"] = samples
            manifest["shard_rows"] = samples // SHARD_ROWS * SHARD_ROWS  # so that the table need not be longer
            for record in manifest["files"]:
                if record["path"] == "label/zarr.json":
                    record.update(bytes=len(data), sha256=store_module.sha256(data))

        edit_manifest(path, change)

    forge(copy)
    try:
        archive = open_archive(copy)
    except IntegrityError:
        assert samples > 2**31 - 1
        return
    for act in (
        lambda: archive.read(0, 0, samples).load(),
        lambda: archive.find(0, np.array([samples - 1])).load(),
        lambda: archive.column("entropy", 0),
        archive.labels,
        lambda: archive.verify("full").raise_if_failed(),
    ):
        with pytest.raises(IntegrityError):
            act()


def test_what_is_no_archive_is_not_found(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(NotFoundError) as caught:
            open_archive(path)
        assert caught.value.exit_code == 3


def test_the_manifest_fits_its_published_schema(finished: Path) -> None:
    schema = Manifest.model_json_schema()
    stored = json.loads((finished / "kdcache.json").read_text())
    assert set(stored) <= set(schema["properties"])
    assert set(schema["required"]) <= set(stored)
    assert schema["additionalProperties"] is False


def test_the_statistics_in_the_manifest_are_those_of_the_logits(finished: Path) -> None:
    from scipy import special
    from scipy import stats as statistics

    manifest = open_archive(finished).manifest
    rows = np.concatenate([logits(0), logits(1)]).astype(np.float64)
    assert manifest.statistics.rows == len(rows)
    for found in manifest.statistics.per_tau:
        probs = special.softmax(rows / found.tau, axis=1)
        h = statistics.entropy(probs, axis=1) / np.log(CLASSES)
        assert found.entropy_mean == pytest.approx(h.mean(), rel=1e-9)
        np.testing.assert_allclose(found.entropy_quantiles, np.quantile(h, [0.05, 0.25, 0.5, 0.75, 0.95]), rtol=1e-9)
        sorted_mean = np.sort(probs, axis=1).mean(axis=0)
        assert found.sorted_mean_entropy == pytest.approx(statistics.entropy(sorted_mean) / np.log(CLASSES), rel=1e-9)
    assert [found.tau for found in manifest.statistics.per_tau] == [1, 2, 3, 4, 5, 7, 10, 20, 40]
    # Written without sample numbers, so row j is sample j; and a policy without mixing has no partner to count.
    hits = [logits(view).argmax(axis=1) == LABELS for view in (0, 1)]
    assert manifest.statistics.top1_views == pytest.approx(100 * np.mean(hits))


@pytest.mark.parametrize("name", ["pets", "cifar", "digits", "crd"])
def test_the_top1_over_views_counts_the_label_with_the_larger_share(tmp_path: Path, name: str) -> None:
    policy = ViewPolicy.load(name)
    session = writer(tmp_path / "a", policy=policy)
    hits = []
    for view, block in session.missing():
        rows = np.array(session.positions(block))
        table = policy.parameters(view, SAMPLES, np.ones((SAMPLES, 2), int))[rows]
        session.write(view, block, logits(view)[rows], sample=table.sample)
        dominant = np.where(table.lam >= 0.5, table.sample, table.partner)
        hits += list(LABELS[dominant] == logits(view)[rows].argmax(axis=1))
    assert session.finalize().manifest.statistics.top1_views == 100 * np.mean(hits)


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((0, 4, 3), {}, "0 views"),
        ((2, 0, 3), {}, "0 samples"),
        ((2, 4, 3), {"sample": np.arange(4)}, "sample numbers of shape"),
        ((2, 4, 3), {"keys": [1, 2, 3, 4]}, "key 1"),
        ((2, 4, 3), {"keys": ["a", "b", "c", "\udcff"]}, "key"),
        ((2, 4, 3), {"layout": "webdataset:0"}, "record_rows"),
        ((2, 4, 3), {"codec": "i16", "high": 100.0}, "100"),
    ],
)
def test_what_cannot_be_an_archive_is_refused_and_leaves_nothing(
    tmp_path: Path, shape: tuple[int, ...], options: dict[str, Any], words: str
) -> None:
    values = np.full(shape, options.pop("high", 0.0), np.float32)
    with pytest.raises(UsageError) as caught:
        write_archive(tmp_path / "a", values, ["a", "b", "c"], **options)
    assert words in caught.value.what
    assert not (tmp_path / "a").exists()


def test_an_edited_card_is_told_from_damage(copy: Path) -> None:
    (copy / "README.md").write_text("my own words")
    with pytest.raises(IntegrityError, match="for people") as caught:
        open_archive(copy).verify("full").raise_if_failed()
    assert "delete" not in caught.value.fix


def test_a_copy_that_lacks_the_manifest_yet_is_not_finished(copy: Path) -> None:
    (copy / "kdcache.json").unlink()
    with pytest.raises(IncompleteError, match="not complete"):
        open_archive(copy)
