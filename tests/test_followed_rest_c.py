"""Archives and models that are passed on, studies and teachers: what follows the fix of an error ends well."""

import contextlib
import http.client
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest

from kdcache.archive import Archive, Licences, open_archive
from kdcache.cli import run
from kdcache.sharing.export import Export, push_export
from kdcache.sharing.push_pull import pull, push, shipment
from kdcache.sharing.signing import MAKE_KEYS, sign_archive
from kdcache.system.remote import open_remote
from tests.archives import finish, logits, writer
from tests.following import followed, typed
from tests.hostile import edit_manifest
from tests.hub import WritableHub
from tests.servers import Fault, FaultyServer, faulty_s3

TERMS = Licences(data="cc-by-4.0", weights="mit")
Act = Callable[[], object]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDCACHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("kdcache.system.attempts.BACKOFF", 0.002)


def says(words: str, value: Any = None, does: Act | None = None) -> Callable[[str], Any]:
    def mend(fix: str) -> Any:
        assert words in fix, fix
        if does is not None:
            does()
        return value

    return mend


# ---------------------------------------------------------------- archives that are pushed and pulled


def made(name: str = "a") -> Archive:
    return finish(writer(Path(name)))


def another(name: str = "b") -> Archive:
    """An archive of another teacher's logits."""
    to = writer(Path(name))
    for view, block in to.missing():
        to.write(view, block, logits(view + 9)[list(to.positions(block))])
    return to.finalize()


def sent(archive: Archive, place: str = "out") -> Archive:
    return open_archive(push(archive, place, licences=TERMS))


CHANGED: dict[str, Callable[[bytes], bytes]] = {
    "damaged": lambda whole: whole[:-9],
    "another": lambda whole: Path("b/kdcache.json").read_bytes(),
}


@pytest.mark.parametrize("now", CHANGED)
@pytest.mark.parametrize(
    "act", [lambda archive: pull(archive, "here"), lambda archive: shipment(archive, Licences())], ids=["pull", "push"]
)
def test_what_changes_while_it_is_passed_on_is_passed_on_again(act: Callable[[Archive], object], now: str) -> None:
    another()
    archive = sent(made())
    file = archive.path / "kdcache.json"
    whole = file.read_bytes()
    file.write_bytes(CHANGED[now](whole))

    def again(fix: str) -> Archive:
        assert fix.startswith("repeat the command"), fix
        file.write_bytes(whole)  # whoever writes it is done
        return open_archive(archive.path)

    assert followed(act, archive, again)


def test_an_archive_with_impossible_names_is_got_again() -> None:
    for name in ("a", "b"):
        made(name)
    edit_manifest(Path("a"), lambda m: m["files"].append({"path": ".pull", "bytes": 1, "sha256": "0" * 64}))
    followed(lambda name: pull(open_archive(name), "here"), "a", says("get it again from whoever made it", "b"))


def test_a_folder_that_another_process_fills_is_waited_for() -> None:
    archive = made()
    Path("here/.pull").mkdir(parents=True)
    held = filelock.FileLock("here/.pull/lock")
    held.acquire()
    followed(lambda folder: pull(archive, folder), "here", says("wait for it", "here", held.release))


def test_a_folder_in_which_something_is_in_the_way_is_left() -> None:
    archive = made()
    for folder in (".pull", "zarr.json"):
        Path("here", folder).mkdir(parents=True)
    followed(lambda folder: pull(archive, folder), "here", says("correct the path: it is a folder", "there"))


def test_a_link_is_replaced_by_the_file_that_is_meant() -> None:
    archive = made()
    card = archive.path / "README.md"
    card.rename("card")
    card.symlink_to(Path("card").absolute())

    def meant() -> None:
        card.unlink()
        Path("card").rename(card)

    followed(lambda place: sent(archive, place), "out", says("replace it by the file that is meant", "out", meant))


@pytest.fixture
def key() -> str:
    assert subprocess.run(MAKE_KEYS.removesuffix(" makes a pair"), shell=True, capture_output=True, check=True)
    return "key.pem"


def test_an_archive_that_is_signed_is_signed_anew_for_others(key: str) -> None:
    archive = made()
    sign_archive(archive, Path(key))

    def public(fix: str) -> Archive:
        aside, *first, last = fix.partition("push it from there: ")[2].replace("FOLDER", "folder").split(" && ")
        typed(aside, "mv")
        for command in first:
            assert run(shlex.split(command)[1:]) == 0
        assert last == "kdcache push folder DESTINATION"
        return open_archive("folder")

    assert (followed(lambda archive: sent(archive), archive, public).path / "kdcache.sig").is_file()


def test_signatures_are_made_once_their_package_is_there(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = made()
    monkeypatch.setitem(sys.modules, "model_signing", None)

    def installed(fix: str) -> Archive:
        assert fix == "pip install 'kdcache[sign]'"
        monkeypatch.delitem(sys.modules, "model_signing")
        return archive

    assert followed(lambda archive: sign_archive(archive, Path(key)), archive, installed).is_file()


# ---------------------------------------------------------------- the Hub and buckets

URL = "hf://datasets/team/logits"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FaultyServer, WritableHub]]:
    content = WritableHub("secret")
    with FaultyServer(content) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "secret")
        yield server, content


Hub = tuple[FaultyServer, WritableHub]


HUB_SAYS: dict[str, tuple[Fault, str]] = {
    "refuses": (Fault(status=422), "correct what it says, and repeat the command"),
    "fails": (Fault(status=500), "repeat the command when it can"),
    "hangs up": (Fault(reset=True), "repeat the command when it can"),
}


@pytest.mark.parametrize("case", HUB_SAYS)
def test_what_the_hub_does_not_take_is_pushed_again(hub: Hub, case: str) -> None:
    server, _ = hub
    archive = made()
    server.faults[""], words = HUB_SAYS[case]
    assert followed(lambda url: sent(archive, url), URL, says(words, URL, server.forget)).num_views == 2


def test_the_hub_takes_what_is_pushed_with_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = made()
    monkeypatch.setenv("HF_TOKEN", "wrong")

    def logged_in(fix: str) -> str:
        name = fix.rpartition("or set ")[2]
        monkeypatch.setenv(name, "secret")
        return URL

    assert followed(lambda url: sent(archive, url), URL, logged_in).num_views == 2


def test_names_that_the_hub_does_not_allow_are_corrected(hub: Hub) -> None:
    archive = made()
    wrong = "hf://datasets/team/log--its"
    assert followed(lambda url: sent(archive, url), wrong, says("correct its name", URL)).num_views == 2


def test_what_is_on_the_hub_stays_there(hub: Hub) -> None:
    _, content = hub
    archive = made()
    whole = {"kdcache.json": b"{}", "cat.jpg": b"meow"}
    content.repos["team/logits"] = {"main": dict(whole)}
    elsewhere = "hf://datasets/team/others"
    assert followed(lambda url: sent(archive, url), URL, says("choose another place", elsewhere))
    del content.repos["team/logits"]["main"]["kdcache.json"]
    nothing_yet = f"{URL}/sub"
    assert followed(lambda url: sent(archive, url), URL, says("choose a place where there is nothing yet", nothing_yet))
    assert content.repos["team/logits"]["main"]["cat.jpg"] == b"meow"

    def place(name: str) -> str:
        push_export(Export("test_vit", {"config.json": b"{}"}, TERMS), name)
        return name

    content.repos["team/model"] = {"main": {"notes.txt": b"mine"}}
    assert followed(place, "team/model", says("name a repository that does not exist yet", "team/new")) == "team/new"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with faulty_s3() as server:
        for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "REGION": "us-east-1"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        with contextlib.closing(http.client.HTTPConnection(server.url.removeprefix("http://"))) as connection:
            connection.request("PUT", "/bucket")
            assert connection.getresponse().status == 200
        yield "s3://bucket"


def test_the_beginning_of_another_archive_is_finished_or_left(bucket: str) -> None:
    one, other = made(), another()
    mark = json.dumps({"shards": sent(other, "public").manifest.shards.sha256}).encode()
    open_remote(f"{bucket}/a").put(".push.json", mark)
    words = "finish that push, or choose another place"
    assert followed(lambda url: sent(one, url), f"{bucket}/a", says(words, f"{bucket}/b")).num_views == 2
    finished = followed(lambda given: sent(*given), (one, f"{bucket}/a"), says(words, (other, f"{bucket}/a")))
    assert finished.manifest.digest == other.manifest.digest
