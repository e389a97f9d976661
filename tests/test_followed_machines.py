"""Limits of a machine, its environment and its disks, as far as they can be brought about: they are lifted as the fix says."""

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.archive import open_archive
from kdcache.cli import run
from kdcache.datasets import tars as tar_files
from kdcache.replay.contact_sheet import contact_sheet
from kdcache.replay.prefetch import choose_renderer
from kdcache.replay.subject import Subject, require_batch_size, require_second
from kdcache.sharing.push_pull import pull
from kdcache.sharing.signing import MAKE_KEYS, sign_archive, verify_signature
from kdcache.system.distributed import joined, this_rank
from kdcache.system.files import translated_os_errors
from kdcache.system.refusals import refusal
from kdcache.system.room import require_room
from kdcache.system.workers import require_workers
from kdcache.views import ViewPolicy
from tests.archives import finish, logits, writer
from tests.end_to_end.conftest import Outcome
from tests.following import followed, followed_by_command, says
from tests.test_own_data import PAIR, keys_of, tars


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDCACHE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("rank", ["a", "7", "-1"])
def test_processes_are_numbered_by_nothing_once_that_is_unset(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)

    def mend(fix: str) -> None:
        for name in fix.removeprefix("unset ").partition(",")[0].split():
            monkeypatch.delenv(name)

    assert followed(lambda _: this_rank(), None, mend).of == 1


def test_processes_that_do_not_know_where_to_meet_are_started_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    one = this_rank()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)

    def attempt(rank: Any) -> bool:
        with joined(rank, torch.device("cpu")):
            return True

    assert followed(attempt, this_rank(), says("start them with torchrun", one))  # which sets the place, or numbers one


FULL: dict[int, str] = {
    errno.ENOSPC: "free",
    errno.EDQUOT: "free some of your quota",
    errno.EMFILE: "ulimit -n",
    errno.EFBIG: "ulimit -f unlimited",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EACCES: "make",
    errno.EROFS: "or choose another place",
}


@pytest.mark.parametrize("number", FULL, ids=errno.errorcode.get)
def test_writing_goes_on_when_the_cause_that_is_named_is_gone(number: int) -> None:
    def attempt(cause: int | None) -> bool:
        with translated_os_errors(Path("file")):
            if cause is not None:
                raise OSError(cause, os.strerror(cause))
            Path("file").touch()
        return True

    assert followed(attempt, number, says(FULL[number]))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOENT, errno.ELOOP, errno.EAGAIN], ids=errno.errorcode.get)
def test_what_the_system_refuses_is_repeated_when_it_does_not(number: int) -> None:
    def attempt(cause: int | None) -> bool:
        if cause is not None:
            raise refusal(OSError(cause, os.strerror(cause), "file"))
        return True

    assert followed(attempt, number, says("and repeat the command"))


def test_a_disk_without_room_is_left_or_freed() -> None:
    def attempt(needed: int) -> bool:
        require_room(Path(), needed, "it", why="it is large", elsewhere="another --home")
        return True

    assert followed(attempt, 1 << 60, says("free some space", 1))


def test_workers_and_batches_are_as_many_as_the_fix_says() -> None:
    followed(require_workers, 5000, lambda fix: int(fix.split()[1]))
    followed(require_workers, -1, lambda fix: int(fix.split()[1]))

    def number(fix: str) -> tuple[int, int]:
        return int(re.findall(r"--batch-size (\d+)", fix)[0]), 3

    followed(lambda given: require_batch_size(given[0], 100, given[1]), (16, 3), number)
    followed(lambda given: require_batch_size(given[0], 100, given[1]), (16, 3), says("or --parallel students", (16, 1)))
    followed(lambda size: require_batch_size(size, 100), 500, lambda fix: int(fix.split()[-1]))


def test_a_canvas_that_the_device_cannot_shrink_is_drawn_otherwise() -> None:
    policy = ViewPolicy.load("pets", size=8)

    def choose(given: tuple[Any, int]) -> Any:
        return choose_renderer(given[0], policy, given[1], 2, torch.device("cpu"))

    assert followed(choose, ("device", 8 * 200), lambda fix: (fix.split("--renderer ")[1].split(",")[0], 8 * 200)) == "reference"
    assert followed(choose, ("device", 8 * 200), says("or a smaller canvas", ("device", 16))) == "device"
    assert followed(choose, ("devise", 16), lambda fix: (fix.removeprefix("use ").strip("'"), 16)) == "device"


def test_a_sheet_has_room_for_fewer_samples(dump: Any) -> None:
    assert followed(
        lambda count: contact_sheet(dump.archive, dump.canvas, [0] * count, [0]), 500, says("draw fewer", 2)
    ).startswith(b"\x89PNG")


def test_second_views_are_of_other_archives_or_more_views(dump: Any, make_dump: Any, tmp_path: Path) -> None:
    policy = ViewPolicy.load("pets", size=16)
    three = Subject.of(dump.archive)
    one = Subject.of(make_dump(tmp_path / "one", dump.canvas, policy=policy, views=1).archive)
    other = Subject.of(make_dump(tmp_path / "other", dump.canvas, policy=ViewPolicy.load("pets", size=24), views=2).archive)

    def attempt(given: tuple[Subject, Subject]) -> bool:
        require_second(*given)
        return True

    assert followed(attempt, (one, one), says("dump more with --views", (three, three)))
    assert followed(attempt, (one, one), says("another archive of the same images", (one, three)))
    assert followed(attempt, (three, other), says("with the same --size", (three, three)))


def test_archives_are_signed_and_verified_as_the_fix_says() -> None:
    finish(writer(Path("a")))
    archive = open_archive("a")

    def keys(name: str) -> Callable[[str], Path]:
        def mend(fix: str) -> Path:
            command = fix[fix.index("openssl") :].removesuffix(" makes a pair")
            assert os.system(f"({command}) 2> log") == 0
            return Path(name)

        return mend

    followed(lambda key: sign_archive(archive, key), Path("no.pem"), keys("key.pem"))
    Path("none.pem").write_text("none")
    assert followed(lambda key: verify_signature(archive, key), Path("none.pem"), keys("pub.pem")) is not None
    sign_archive(archive, Path("key.pem"))
    shutil.copy("pub.pem", "theirs.pem")
    assert os.system(f"({MAKE_KEYS.removesuffix(' makes a pair')}) 2> log") == 0

    def verified(key: Path) -> bool:
        verify_signature(archive, key).raise_if_failed()
        return True

    assert followed(verified, Path("pub.pem"), says("ask which key they sign with", Path("theirs.pem")))


def test_a_pull_that_was_stopped_is_repeated() -> None:
    finish(writer(Path("a")))
    pull(open_archive("a"), "b")
    Path("b/.pull").mkdir()
    Path("b/kdcache.json").unlink()
    Path("b").joinpath(next(file.name for file in Path("b").glob("shards-*.jsonl"))).unlink()

    def repeat() -> None:
        pull(open_archive("a"), "b")

    followed(open_archive, "b", says("repeat the kdcache pull or push command", "b", repeat))


def test_views_that_other_teachers_saw_are_looked_at() -> None:
    from kdcache.archive.reading.ensemble import Ensemble

    for name, seed, shift in (("a", 0, 0), ("b", 10, 0), ("c", 20, 1)):
        to = writer(Path(name))
        for view, block in to.missing():
            rows = np.array(to.positions(block))
            digest = (rows + shift).astype(np.uint64)
            to.write(view, block, logits(view + seed)[rows], digest=digest, probe=np.zeros((len(rows), 16), np.uint8))
        to.finalize()

    def attempt(names: tuple[str, ...]) -> bool:
        together = Ensemble([open_archive(name) for name in names])
        return bool(together.take(0, np.arange(21)).logits.size)

    assert followed(attempt, ("a", "c"), says("dump the other again", ("a", "b")))


def test_a_member_that_is_too_large_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_files, "LARGEST_MEMBER", 5000)
    tars(Path("t"), *PAIR, ("2.jpg", b"\xff\xd8\xff" + bytes(6000)), ("2.cls", b"0"))

    def again() -> None:
        shutil.rmtree("t")
        tars(Path("t"), *PAIR)

    assert len(followed(keys_of, Path("t"), says("make the tar file again without it", Path("t"), again))) == 2


@pytest.fixture
def kdcache(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run one command line in this process."""

    def call(*command: str) -> Outcome:
        capfd.readouterr()
        status = run(list(command))
        captured = capfd.readouterr()
        return Outcome(status, captured.out, captured.err)

    return call


def test_names_that_are_no_text_are_reached_by_a_link(kdcache: Callable[..., Outcome]) -> None:
    finish(writer(Path("a")))
    odd = os.fsdecode(b"\xff")
    Path("a").rename(odd)

    def mend(command: list[str], told: str) -> list[str]:
        assert told.endswith("name it through a link: ln -s")
        Path("link").symlink_to(odd)
        return ["info", "link"]

    followed_by_command(kdcache, ["info", odd], mend)


def test_an_archive_without_a_name_is_pulled_to_the_folder_that_is_said(
    kdcache: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(writer(Path("a")))
    monkeypatch.chdir("a")

    def mend(command: list[str], told: str) -> list[str]:
        return told.rpartition("kdcache ")[2].replace("FOLDER", "../pulled").split()

    followed_by_command(kdcache, ["pull", "."], mend)
