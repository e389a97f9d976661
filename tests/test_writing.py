"""Protects what is being written: from kills, full disks, other processes that write the same or something else, and readers."""

import contextlib
import errno
import fcntl
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.archive import ArchiveWriter, derive, open_archive, sweep
from kdcache.archive.format.store import LocalStore
from kdcache.errors import IncompatibleError, IncompleteError, NotFoundError, RetryError, UsageError
from kdcache.system.energy import Spent
from tests.archives import LABELS, SAMPLES, files, finish, logits, write_shard, writer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, bytes]]:
    """The files of an archive of so many views that nobody disturbed."""
    made: dict[int, dict[str, bytes]] = {}

    def of(views: int) -> dict[str, bytes]:
        if views not in made:
            made[views] = files(finish(writer(tmp_path_factory.mktemp("whole") / "a", num_views=views)).path)
        return made[views]

    return of


# ---------------------------------------------------------------- kills


@pytest.mark.parametrize("every", [pytest.param(1, marks=[pytest.mark.slow, pytest.mark.exhaustive]), 11])
def test_a_writer_killed_before_any_of_its_steps_ends_as_if_never_killed(tmp_path: Path, every: int) -> None:
    command = [sys.executable, "-m", "tests.kills", str(tmp_path), str(every)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = {name: int(count) for name, count in (line.split() for line in done.stdout.splitlines())}
    assert set(steps) == {"fresh", "append-zarr", "append-webdataset", "append-after-another", "derive"}
    assert min(steps.values()) > 25


PARENT_AND_CHILD = """
import os, sys
from tests.archives import writer
with writer(sys.argv[1]).claim(0, 1) as mine:
    if os.fork():
        print(mine, flush=True)
    sys.stdin.read()  # the child, as a worker that renders, outlives its parent, until nobody writes any more
"""


def test_a_claim_falls_with_its_process_even_where_that_leaves_workers_behind(tmp_path: Path) -> None:
    session = writer(tmp_path / "a")
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", PARENT_AND_CHILD, str(tmp_path / "a")], cwd=ROOT, **pipes) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "True\n"
        with session.claim(0, 1) as mine:
            assert not mine
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
        with session.claim(0, 1) as mine:
            assert mine
        process.stdin.close()  # ends the child


# ---------------------------------------------------------------- two processes


def at_once(*acts: Callable[[], Any]) -> list[Any]:
    """Run all at the same time, each in a thread; what each returned, or raised."""
    ready, outcomes = threading.Barrier(len(acts)), [None] * len(acts)

    def run(number: int) -> None:
        ready.wait()
        try:
            outcomes[number] = acts[number]()
        except Exception as error:
            outcomes[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return outcomes


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Lustre mounted without `flock`."""

    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("locks", [True, False])
def test_of_two_recipes_begun_at_once_in_one_folder_one_is_refused(
    tmp_path: Path, locks: bool, request: pytest.FixtureRequest
) -> None:
    if not locks:
        request.getfixturevalue("no_locks")
    for trial in range(8):
        path = tmp_path / str(trial)
        outcomes = at_once(*(partial(writer, path, codec=codec) for codec in ("i16", "f32", "u8")))
        begun = [outcome for outcome in outcomes if isinstance(outcome, ArchiveWriter)]
        assert len(begun) == 1, outcomes
        assert {type(outcome) for outcome in outcomes} == {ArchiveWriter, IncompatibleError}
        assert ArchiveWriter.resume(path).plan.codec == begun[0].plan.codec
        assert not list(path.rglob("*.tmp"))


def test_of_one_recipe_begun_twice_at_once_both_are_the_one_that_came_first(tmp_path: Path, no_locks: None) -> None:
    for trial in range(8):
        path = tmp_path / str(trial)
        outcomes = at_once(*(partial(writer, path, provenance={"command": who}) for who in "abc"))
        assert len({session.plan.provenance["command"] for session in outcomes}) == 1, outcomes


def test_a_dump_that_is_done_leaves_alone_what_another_appends(tmp_path: Path, whole: Any) -> None:
    path = tmp_path / "a"
    first = writer(path, num_views=2)
    for view, block in first.missing():
        write_shard(first, view, block)
    more, third = writer(path, num_views=4), writer(path, num_views=4)
    write_shard(third, 3, 1)
    half = path / "logits/c/2/0/.0.99-abcd.tmp"  # of a process that is writing
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half a file")
    assert first.finalize().num_views == 2
    assert open_archive(path).verify("full").ok
    assert half.exists()
    assert (3, 1) not in more.missing()
    assert writer(path, num_views=2).finalize().num_views == 2  # who asks for what there is sweeps nothing away either
    sweep(path)
    assert (3, 1) not in writer(path, num_views=4).missing()
    assert writer(path, num_views=3).plan.num_views == 4  # and who asks for less than the other appends joins it
    finish(more)
    assert files(path) == whole(4)


def test_a_finished_dump_is_swept_of_what_a_killed_writer_left(tmp_path: Path, whole: Any) -> None:
    path = finish(writer(tmp_path / "a")).path
    (path / ".dump/shards").mkdir(parents=True)
    for name in (".lock", ".dump/0-0.lock", ".dump/shards/0-0.json", ".zarr.json.99-abcd.tmp", "shards-01234567.jsonl"):
        (path / name).write_text("")
    sweep(path)
    assert files(path) == whole(2)
    assert not (path / ".dump").exists()


def test_a_folder_that_may_be_read_only_is_enough_for_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = finish(writer(tmp_path / "a")).path
    monkeypatch.setattr(LocalStore, "write", lambda *_: pytest.fail("something was written"))
    monkeypatch.setattr(fcntl, "flock", lambda *_: pytest.fail("something was locked"))
    session = writer(path)
    assert session.missing() == []
    assert session.finalize().num_views == 2


def test_a_shard_that_another_process_finished_is_not_written_again(tmp_path: Path) -> None:
    one, other = writer(tmp_path / "a"), writer(tmp_path / "a")
    with one.claim(0, 0, owned=True) as mine:
        assert mine
        assert not one.finished(0, 0)
        write_shard(other, 0, 0)  # where there are no locks, and two processes were told the same share
        assert one.finished(0, 0)
    finish(other)
    assert all(one.finished(view, block) for view, block in other.shards())


# ---------------------------------------------------------------- without locks


@pytest.mark.filterwarnings("ignore:Consolidated metadata")  # warnings are ignored for all threads or none
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_shards_are_claimed_by_agreement_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, whole: Any
) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "a"
    session = writer(path)
    with pytest.raises(UsageError, match="no locks") as caught, session.claim(0, 0):
        pass
    assert "--shard" in caught.value.fix
    for view, block in session.missing():
        mine = session if block % 2 else writer(path)
        with mine.claim(view, block, owned=True) as claimed:
            assert claimed
            write_shard(mine, view, block)
        with mine.claim(view, block, owned=True) as claimed:
            assert not claimed
    outcomes = at_once(*(ArchiveWriter.resume(path).finalize for _ in range(3)))  # all come last
    assert [getattr(outcome, "num_views", outcome) for outcome in outcomes] == [2, 2, 2]
    assert files(path) == whole(2)
    assert open_archive(path).verify("full").ok


def test_what_another_process_sweeps_away_while_this_one_finishes_is_not_missed(
    tmp_path: Path, no_locks: None, monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    path = tmp_path / "a"
    session, read = writer(path), LocalStore.read
    for view, block in session.missing():
        write_shard(session, view, block)

    def finish_meanwhile(store: LocalStore, name: str, limit: int | None = None) -> bytes:
        if name.endswith("samples.json"):
            monkeypatch.setattr(LocalStore, "read", read)
            ArchiveWriter.resume(path).finalize()
        return read(store, name, limit)

    monkeypatch.setattr(LocalStore, "read", finish_meanwhile)
    assert session.finalize().num_views == 2
    assert files(path) == whole(2)


def test_an_archive_is_converted_where_there_are_no_locks(tmp_path: Path, no_locks: None) -> None:
    source = finish(writer(tmp_path / "a"))
    assert derive(source, tmp_path / "b", layout="hdf5").manifest.digest == source.manifest.digest


# ---------------------------------------------------------------- readers


@pytest.mark.exhaustive
def test_readers_do_not_notice_that_views_are_appended(tmp_path: Path) -> None:
    path = finish(writer(tmp_path / "a", num_views=1)).path
    old, stop, seen = open_archive(path), threading.Event(), set()

    def append() -> None:
        for views in range(2, 12):
            finish(writer(path, num_views=views))

    def read() -> None:
        while not stop.is_set():
            archive = open_archive(path)
            result = archive.verify("full")
            assert result.failures == []
            np.testing.assert_array_equal(archive.labels(), LABELS)
            np.testing.assert_array_equal(archive.read(0, 0, SAMPLES).logits, logits(0))
            seen.add(archive.num_views)

    def append_and_stop() -> None:
        try:
            append()
        finally:
            stop.set()

    assert at_once(append_and_stop, read) == [None, None]
    assert len(seen) > 1
    # And who opened it before all that still has the archive that it was.
    assert open_archive(path).num_views == 11
    assert old.verify("full").failures == []
    assert [shard.view for shard in old.shards()] == [0, 0, 0]
    assert old.nbytes > 0


def test_an_unfinished_dump_is_neither_finished_nor_verified_by_mistake(tmp_path: Path, whole: Any) -> None:
    path = tmp_path / "a"
    session = writer(path)
    write_shard(session, 0, 0)
    with pytest.raises(IncompleteError):
        ArchiveWriter.resume(path).finalize()
    with pytest.raises(IncompleteError):
        open_archive(path)
    finish(session)
    assert files(path) == whole(2)


# ---------------------------------------------------------------- full disks and forbidden folders


@contextlib.contextmanager
def full_disk_at(step: int) -> Iterator[Callable[[], bool]]:
    """The `step`th file that is made, synced or begun finds no room. The context's value tells whether one did."""
    left, met = step, False

    def limited(call: Callable[..., Any], writes: Callable[..., bool] = lambda *_, **__: True) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal left, met
            if writes(*arguments, **options):
                left -= 1
                if left == -1:
                    met = True
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*arguments, **options)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", limited(os.fsync))
        patch.setattr(os, "mkdir", limited(os.mkdir, lambda path, *_, **__: not Path(path).exists()))
        patch.setattr(os, "open", limited(os.open, lambda file, flags, *_, **__: bool(flags & os.O_CREAT)))
        patch.setattr(io, "open", limited(io.open, lambda file, mode="r", *_, **__: "w" in mode))
        yield lambda: met


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.exhaustive), 7])
def test_a_disk_that_is_full_at_any_step_is_a_retry_and_nothing_half_written_counts(tmp_path: Path, every: int) -> None:
    def dump(path: Path) -> None:
        session = writer(path, num_views=1, layout="hdf5")
        for view, block in session.missing():
            with session.claim(view, block) as mine:
                assert mine
                write_shard(session, view, block)
        session.finalize()

    dump(tmp_path / "whole")
    expected = files(tmp_path / "whole")
    for step in range(0, 200, every):
        path = tmp_path / str(step)
        with full_disk_at(step) as met:
            refused = at_once(partial(dump, path))[0]
        if not met():
            assert refused is None
            break
        assert isinstance(refused, RetryError), refused
        assert "no room" in refused.what
        assert not list(path.rglob("*.tmp"))
        with contextlib.suppress(IncompleteError, NotFoundError):  # or all of it is there, if not synced
            assert open_archive(path).verify("full").failures == []
        dump(path)
        assert files(path) == expected
    assert 20 < step < 199


FORBIDDEN = """
import os, sys
from kdcache.errors import KdcacheError
from tests.archives import finish, writer
finish(writer("warm"))  # everything is imported before privileges are dropped
os.chdir(sys.argv[1])
if os.getuid() == 0:
    os.setgid(65534), os.setuid(65534)
try:
    finish(writer("a"))
except KdcacheError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_forbidden_folder_is_a_retry_and_what_is_there_is_kept(tmp_path: Path, whole: Any) -> None:
    path = tmp_path / "a"
    write_shard(writer(path), 0, 0)
    before = files(path)
    tmp_path.chmod(0o755)
    folders = [path, *(folder for folder in path.rglob("*") if folder.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    done = subprocess.run(
        [sys.executable, "-c", FORBIDDEN, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 75, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["error", "why", "fix"]
    assert "not allowed to write" in done.stdout
    for folder in folders:
        folder.chmod(0o755)
    assert files(path) == before
    finish(writer(path))
    assert files(path) == whole(2)


# ---------------------------------------------------------------- what writing took


def with_costs(path: Path, num_views: int = 2, **spent: float) -> ArchiveWriter:
    """A writer each of whose shards takes so much."""
    counting = writer(path, num_views=num_views)
    counting.count_costs(lambda: Spent(**spent))
    return counting


def cost(path: Path) -> object:
    return open_archive(path).manifest.provenance.get("cost")


def test_costs_of_all_processes_are_added_up_whoever_finishes(tmp_path: Path, whole: Callable[[int], dict[str, bytes]]) -> None:
    path = tmp_path / "a"
    one, other = (with_costs(path, device_seconds=seconds, cpu_joules=10.0) for seconds in (1.0, 2.0))
    for number, shard in enumerate(one.missing()):
        write_shard((one, other)[number % 2], *shard)
    ArchiveWriter.resume(path).finalize()
    assert cost(path) == {"passes": 2 * SAMPLES, "device_seconds": 3 * 1.0 + 3 * 2.0, "cpu_joules": 60.0}
    same = {name: data for name, data in whole(2).items() if name != "kdcache.json"}
    assert {name: data for name, data in files(path).items() if name != "kdcache.json"} == same


def test_costs_of_views_that_are_appended_are_added(tmp_path: Path) -> None:
    path = tmp_path / "a"
    finish(with_costs(path, device_seconds=1.0, gpu_joules=5.0))
    appending = with_costs(path, num_views=3, device_seconds=2.0)
    write_shard(appending, 2, 0)
    finish(with_costs(path, num_views=3, device_seconds=4.0))  # another process, after the first one's end
    assert cost(path) == {"passes": 3 * SAMPLES, "device_seconds": 6.0 + 2.0 + 4.0 + 4.0}, "of some joules are unknown"


def test_costs_are_counted_once_after_a_kill_between_the_manifest_and_its_sweeping(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdcache.archive.writing.writer.sweep_finished", lambda store, archive: None)
        finish(with_costs(path, device_seconds=1.0))
    assert (path / ".dump/costs").is_dir()
    finish(with_costs(path, num_views=3, device_seconds=2.0))
    assert cost(path) == {"passes": 3 * SAMPLES, "device_seconds": 6 * 1.0 + 3 * 2.0}


@pytest.mark.parametrize("damage", ["{", "[]", '{"passes": -3}', "\udcff"])
def test_a_damaged_record_of_costs_costs_no_archive(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a"
    begun = with_costs(path, device_seconds=1.0)
    write_shard(begun, 0, 0)
    (record,) = (path / ".dump/costs").iterdir()
    record.write_bytes(damage.encode(errors="surrogateescape"))
    finish(with_costs(path, device_seconds=2.0))
    assert cost(path) == {"passes": 2 * SAMPLES - 8, "device_seconds": 5 * 2.0}


def test_what_is_made_from_an_archive_keeps_what_that_took(tmp_path: Path) -> None:
    finish(with_costs(tmp_path / "a", device_seconds=1.0))
    derive(open_archive(tmp_path / "a"), tmp_path / "b", layout="hdf5")
    assert cost(tmp_path / "b") == cost(tmp_path / "a") == {"passes": 2 * SAMPLES, "device_seconds": 6.0}
