"""Files that are written whole or not at all, and locks that fall with their holders: real files, real processes."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

from kdcache.archive import Archive, open_archive, write_archive
from kdcache.archive.format.manifest import FileRecord
from kdcache.archive.format.store import sha256
from kdcache.archive.reading.cache import ABANDONED, Cache
from kdcache.cli import run
from kdcache.datasets.canvas import load_canvas, require_intact
from kdcache.datasets.folder import Folder
from kdcache.errors import RetryError
from kdcache.sharing.push_pull import pull
from kdcache.system.files import create_atomically, sweep_temporaries, translated_os_errors, write_atomically, write_changed
from kdcache.system.locks import NoLocksError, locked, locked_by_family
from kdcache.system.refusals import NOT_ALLOWED, refusal
from kdcache.training.checkpoint import LOCK, own_folder
from tests.archives import files, finish, writer
from tests.test_writing import at_once

NO_LOCKS = [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, 524]

WRITER = """
import sys
from pathlib import Path
from kdcache.system.files import write_atomically
sys.stdin.readline()
for _ in range(60):
    write_atomically(Path(sys.argv[1]), sys.argv[2].encode() * 200_000)
"""

HOLDER = """
import sys, time
from pathlib import Path
from kdcache.system.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def start(code: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture(params=NO_LOCKS, ids=lambda number: errno.errorcode.get(number, str(number)))
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Lustre mounted without `flock`, and on some servers of NFS."""

    def refuse(handle: int, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


def leave_marker(file: Path) -> None:
    """What a process on another host, killed with -9, leaves where files are made in place of locks."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("4711\nanother-host\n")


# ---------------------------------------------------------------- writing


def test_processes_that_write_one_file_at_once_never_leave_a_torn_or_temporary_one(tmp_path: Path) -> None:
    file = tmp_path / "deep/file"
    writers = [start(WRITER, file, letter) for letter in "abc"]
    for process in writers:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    seen = set()
    while any(process.poll() is None for process in writers):
        if file.exists():
            data = file.read_bytes()
            assert len(data) == 200_000
            assert len(set(data)) == 1, "of two writers"
            seen.add(data[:1])
    assert [process.wait() for process in writers] == [0, 0, 0]
    assert seen
    assert names(file.parent) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(RetryError, match="no room to write") as caught:
        write_atomically(tmp_path / "file", b"new")
    assert caught.value.exit_code == 75
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_folder_that_may_not_be_written_to_is_a_retry_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "replace", forbidden)
    with pytest.raises(RetryError, match="not allowed to write") as caught:
        write_atomically(tmp_path / "file", b"new")
    assert str(tmp_path) in caught.value.fix


def test_a_file_is_synced_before_it_has_its_name_and_its_folder_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, replace = [], os.replace

    def sync(handle: int) -> None:
        steps.append(Path(f"/proc/self/fd/{handle}").readlink().name)

    def rename(old: Path, new: Path) -> None:
        steps.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    write_atomically(tmp_path / "file", [b"in", memoryview(b"pieces")])
    temporary, *later = steps
    assert temporary.startswith(".file.")
    assert temporary.endswith(".tmp")
    assert later == ["rename", tmp_path.name]
    assert (tmp_path / "file").read_bytes() == b"inpieces"


def test_what_is_to_be_made_once_is_never_replaced(tmp_path: Path) -> None:
    create_atomically(tmp_path / "file", b"first")
    with pytest.raises(FileExistsError):
        create_atomically(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first"
    assert names(tmp_path) == ["file"]


def test_what_a_killed_writer_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    kept = [tmp_path / "file.tmp", tmp_path / ".lock", tmp_path / "deep/.file"]
    for file in (*kept, tmp_path / ".file.1-ab.tmp", tmp_path / "deep/.file.1-ab.tmp"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    sweep_temporaries(tmp_path)
    assert {file for file in tmp_path.rglob("*") if file.is_file()} == set(kept)


# ---------------------------------------------------------------- locks


def test_a_lock_falls_with_a_process_that_is_killed(tmp_path: Path) -> None:
    holder = start(HOLDER, tmp_path / "lock")
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    with locked(tmp_path / "lock", wait=False) as held:
        assert not held
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    said: list[str] = []
    with locked(tmp_path / "lock", waiting=lambda: said.append("waits")) as held:
        assert held
    assert (tmp_path / "lock").is_file()
    assert not said


def test_a_file_that_is_there_is_no_lock(tmp_path: Path) -> None:
    leave_marker(tmp_path / "lock")
    with locked(tmp_path / "lock", wait=False) as held:
        assert held


def test_where_there_are_no_locks_none_is_made_up(tmp_path: Path, no_locks: None, recwarn: pytest.WarningsRecorder) -> None:
    for name in ("new", "old"):
        if name == "old":
            leave_marker(tmp_path / name)
        before = names(tmp_path)
        for take in (locked, locked_by_family):
            for wait in (True, False):
                with pytest.raises(NoLocksError), take(tmp_path / name, wait=wait):
                    pass
        assert names(tmp_path) == before, "nothing is left where nothing was, and what was there stays"
    assert not recwarn.list, "filelock says so when it falls back to marker files"


def test_a_run_belongs_to_one_process_until_it_is_given_back(tmp_path: Path) -> None:
    run = tmp_path / "run"
    leave_marker(run / LOCK)
    (run / ".checkpoint.pt.1-ab.tmp").touch()
    own = own_folder(run)
    assert names(run) == [LOCK], "what a killed process left is swept"
    with pytest.raises(RetryError, match="being trained by another process"):
        own_folder(run)
    with pytest.raises(filelock.Timeout):
        filelock.FileLock(run / LOCK, timeout=0).acquire()
    own.close()
    own_folder(run).close()


def test_a_run_is_trained_where_there_are_no_locks(tmp_path: Path, no_locks: None) -> None:
    run = tmp_path / "run"
    leave_marker(run / LOCK)
    (run / ".checkpoint.pt.1-ab.tmp").touch()
    own_folder(run).close()
    assert (run / ".checkpoint.pt.1-ab.tmp").exists(), "another process may be writing it"


# ---------------------------------------------------------------- canvases and fetched files without locks


def test_canvases_that_are_built_at_once_without_locks_are_whole(tmp_path: Path, image_folder: Path, no_locks: None) -> None:
    source = Folder(str(image_folder))
    expected = load_canvas(source, "train", 12, tmp_path / "alone")
    home = tmp_path / "shared"
    leave_marker(home / f"{expected.path.name}.lock")
    for canvas in at_once(*[lambda: load_canvas(source, "train", 12, home)] * 3):
        assert getattr(canvas, "digest", canvas) == expected.digest
        require_intact(canvas)  # type: ignore[arg-type]
    assert sorted(names(home)) == sorted([expected.path.name, f"{expected.path.name}.lock"])


def test_files_that_are_fetched_at_once_without_locks_are_whole(tmp_path: Path, no_locks: None) -> None:
    data = np.random.default_rng(0).bytes(300_000)
    record = FileRecord(path="file", bytes=len(data), sha256=sha256(data))

    def stream(begin: int) -> Iterator[bytes]:
        for position in range(begin, len(data), 1000):
            yield data[position : position + 1000]

    caches = [Cache(tmp_path, 10**6) for _ in range(3)]
    leave_marker(tmp_path / "locks" / record.sha256[:3])
    for path in at_once(*(lambda cache=cache: cache.fetch(record, "there", stream) for cache in caches)):
        assert isinstance(path, Path), path
        assert path.read_bytes() == data
    assert [path.name for path in tmp_path.glob("??/*")] == [record.sha256]


@pytest.mark.parametrize(("age", "kept"), [(0, True), (2 * ABANDONED, False)])
def test_without_locks_only_old_beginnings_of_files_make_room(tmp_path: Path, no_locks: None, age: int, kept: bool) -> None:
    part = tmp_path / "ab" / ("ab" * 32 + ".7-cd.part")
    part.parent.mkdir()
    part.write_bytes(bytes(900))
    now = part.stat().st_mtime
    os.utime(part, (now - age, now - age))
    data = b"x" * 800
    record = FileRecord(path="file", bytes=len(data), sha256=sha256(data))
    Cache(tmp_path, 1000).fetch(record, "there", lambda begin: iter([data[begin:]]))
    assert part.exists() == kept


def test_a_pull_without_locks_is_compared_with_its_digests_even_if_nobody_asked(
    tmp_path: Path, no_locks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = finish(writer(tmp_path / "a"))
    leave_marker(tmp_path / "b/.pull/lock")
    levels, verify = [], type(archive).verify

    def note(of: Archive, level: str, *arguments: Any) -> Any:
        levels.append(level)
        return verify(of, level, *arguments)

    monkeypatch.setattr(Archive, "verify", note)
    pull(open_archive(archive.path), tmp_path / "b", verify=False)
    assert "full" in levels, "two processes may have written into the same beginnings of files"
    assert files(tmp_path / "b") == files(tmp_path / "a")


# ---------------------------------------------------------------- what the system refuses

REMEDIES = {
    errno.ENOSPC: "df -h",
    errno.EDQUOT: "quota",
    errno.EFBIG: "ulimit -f",
    errno.EMFILE: "ulimit -n",
    errno.ENFILE: "fs.file-max",
    errno.ENOLCK: "file locks",
    524: "file locks",
    errno.EIO: "dmesg",
    errno.EACCES: "permissions",
    errno.EROFS: "read-only",
    errno.ENAMETOOLONG: "shorter path",
    errno.ELOOP: "link",
    errno.ESTALE: "mount",
    errno.EAGAIN: "ulimit -u",
    errno.ECONNRESET: "network",
    errno.EXDEV: "mend the cause",
}


@pytest.mark.parametrize("number", REMEDIES, ids=lambda number: errno.errorcode.get(number, str(number)))
def test_every_error_of_the_system_names_its_file_and_what_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    path = tmp_path / "archive"
    write_archive(path, np.zeros((1, 3, 4), np.float32), ["a", "b", "c", "d"])

    def refuse(self: Path, *arguments: object) -> bytes:
        raise OSError(number, os.strerror(number))  # as those of an open file, which name none

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert run(["info", str(path)]) in {4, 75}
    what, _, fix = capsys.readouterr().err.splitlines()
    assert str(path) in what
    monkeypatch.undo()

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises((RetryError, OSError)) as caught:
        write_atomically(tmp_path / "new", b"data")
    error = caught.value if isinstance(caught.value, RetryError) else refusal(caught.value)
    assert str(tmp_path / "new") in error.what
    if number not in NOT_ALLOWED:
        assert REMEDIES[number] in error.fix
    assert number == errno.ENOSPC or "df -h" not in error.fix + fix
    assert names(tmp_path) == ["archive"], "no temporary file is left"


def test_a_disk_without_inodes_is_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.statvfs_result((4096, 4096, 10**6, 10**5, 10**5, 1000, 0, 0, 0, 255))  # bytes are left, and no inode
    monkeypatch.setattr(os, "statvfs", lambda place: full)
    with pytest.raises(RetryError) as caught, translated_os_errors(tmp_path / "not/there"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "df -i" in caught.value.fix
    assert "df -h" not in caught.value.fix


def test_too_few_descriptors_are_told_as_such(
    tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    code = """
import os, resource, sys
from kdcache.system.files import write_atomically
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
try:
    while True:
        os.dup(0)
except OSError:
    pass
try:
    write_atomically(Path(sys.argv[1]) / "file", b"data")
except Exception as error:
    print(error)
"""
    said = run_python(code, tmp_path).stdout
    assert f"error: {tmp_path / 'file'} cannot be written" in said
    assert "ulimit -n" in said


def test_files_that_have_these_bytes_stay_as_they_are(tmp_path: Path) -> None:
    write_changed(tmp_path / "file", b"data")
    os.utime(tmp_path / "file", (1, 1))
    write_changed(tmp_path / "file", b"data")
    assert (tmp_path / "file").stat().st_mtime == 1
    write_changed(tmp_path / "file", b"more")
    assert (tmp_path / "file").read_bytes() == b"more"
