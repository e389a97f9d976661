"""Archives that strangers made, servers that refuse and values that are none: the fix of the error leads to what works."""

import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.archive import derive, open_archive
from kdcache.archive.format.manifest import FileRecord
from kdcache.archive.layouts import LAYOUTS
from kdcache.archive.reading import reader
from kdcache.archive.reading.cache import Cache, CachedStore
from kdcache.archive.writing import writer as writer_module
from kdcache.cli import run
from kdcache.codecs import CODECS
from kdcache.given import in_order, stored_numbers, whole_numbers
from kdcache.importing import load_function
from kdcache.methods import METHODS
from kdcache.report.records import collect
from kdcache.stats import entropy, softmax
from kdcache.system import attempts, remote
from kdcache.system.remote import open_remote
from kdcache.training.config import TrainConfig
from kdcache.views import ViewPolicy
from kdcache.workspace import Workspace, archive_source, require_writable
from tests.archives import finish, writer
from tests.following import followed, says, typed
from tests.hostile import build, edit_manifest, edit_table
from tests.reports import RunFolders
from tests.servers import Answer, Fault, FaultyServer, Request, fake_hub
from tests.sites import RECORD, note
from tests.test_attacks import write_labels, write_rows

Spoil = Callable[[Path], object]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDCACHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(attempts, "BACKOFF", 0.002)
    for name in ("HF_TOKEN", "KDCACHE_CACHE_LIMIT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound archives in folders of their layouts. Shared: copy them before changing them."""
    folder = tmp_path_factory.mktemp("sound")
    for layout in ("zarr", "hdf5", "webdataset"):
        build(folder / layout, layout)
    return folder


def everything(path: Any) -> bool:
    """Read all that an archive holds."""
    archive = open_archive(path)
    for view in archive.views:
        archive.find(view, np.arange(archive.num_samples)).load()
    archive.labels()
    archive.keys()
    return bool(list(archive.spread_logits()))


# ---------------------------------------------------------------- archives that strangers made


def option(**changed: Any) -> Spoil:
    """Change the options of the layout."""
    return lambda path: edit_manifest(path, lambda fields: fields["layout"].update(changed))


def table_at(place: str) -> Spoil:
    return lambda path: edit_manifest(path, lambda fields: fields["shards"].update(path=place))


def records(change: Callable[[list[dict[str, Any]]], object]) -> Spoil:
    return lambda path: edit_table(path, change)


def rows(name: str, place: Any, value: float) -> Spoil:
    """Another archive with a wrong number among its rows, and checksums that were computed of it."""

    def write(path: Path) -> None:
        shutil.rmtree(path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer_module, "_require_every_sample_once", lambda *_: None)
            write_rows(path, lambda stored: stored[name].__setitem__(place, value))

    return write


def another_teacher(path: Path) -> None:
    """The shard of another archive, whose bytes are as sound, in the place of one of this archive."""
    other = build(path.parent / "other", "zarr", num_views=3)
    (path / "logits/c/0/0/0").write_bytes((other / "logits/c/2/0/0").read_bytes())


def of_before(path: Path) -> None:
    """Shards of two views exchanged, in an archive whose table records no checksums yet."""
    edit_table(path, lambda shards: [shard.pop("checksums") for shard in shards])
    edit_manifest(path, lambda fields: fields.pop("manifest_sha256"))
    another_teacher(path)


def grown(path: Path) -> None:
    (table,) = path.glob("shards-*.jsonl")
    table.write_bytes(table.read_bytes() + b"\n")


def labelled(path: Path) -> None:
    labels = np.zeros(open_archive(path).num_samples, "<i8")
    labels[3] = 99
    write_labels(path, "zarr", labels)


def digest_of_rows(shards: list[dict[str, Any]]) -> None:
    shards[1]["rows_digest"] = "0" * 64


def derived(path: str, **options: Any) -> bool:
    shutil.rmtree("derived", ignore_errors=True)
    return derive(open_archive(path), "derived", **options).verify().ok


ANEW, VERIFY = "do not use this archive; get it again", "names the damage"
MANIFEST = "restore kdcache.json from a copy"
STRANGERS: dict[str, tuple[str, Spoil, Callable[[Any], bool], str]] = {
    "units of none": ("hdf5", option(unit_rows=0), everything, MANIFEST),
    "records of none": ("webdataset", option(record_rows=0), everything, f"if that does not help, {MANIFEST}"),
    "a compression of nothing": ("zarr", option(compression="lz5"), everything, f"if that does not help, {MANIFEST}"),
    "records that do not fit": ("webdataset", option(record_rows=100), everything, MANIFEST),
    "chunks that do not fit": ("zarr", option(inner_rows=3), everything, MANIFEST),
    "a name that leads out": ("zarr", table_at("../x"), everything, ANEW),
    "a table that has grown": ("zarr", grown, everything, ANEW),
    "a record that is none": ("zarr", records(lambda shards: shards[0].update(rows="x")), everything, ANEW),
    "a record twice": ("zarr", records(lambda shards: shards.__setitem__(1, shards[0])), everything, "restore it from a copy"),
    "a record too few": ("zarr", records(lambda shards: shards.pop()), derived, VERIFY),
    "another digest": ("zarr", records(digest_of_rows), partial(derived, codec="f32"), "names all damage; get the archive again"),
    "another teacher's shard": ("zarr", another_teacher, everything, "restore it from a copy of the archive; all that"),
    "the same, before": ("zarr", of_before, everything, "restore it from a copy of the archive; all that"),
    "a label of no class": ("zarr", labelled, everything, ANEW),
    "not finite": ("zarr", rows("logits", (0, 0), np.nan), lambda path: bool(list(open_archive(path).spread_logits())), ANEW),
    "a sample twice": ("zarr", rows("sample", 0, 5), everything, VERIFY),
    "a sample beyond": ("zarr", rows("sample", 0, 99), lambda path: bool(open_archive(path).read(0, 0, 4).load()), VERIFY),
}  # fmt: skip


@pytest.mark.parametrize("case", STRANGERS)
def test_what_strangers_made_is_read_when_it_was_got_again(
    case: str, sound: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    layout, spoil, attempt, words = STRANGERS[case]
    path = Path(shutil.copytree(sound / layout, tmp_path / "a"))
    spoil(path)

    def mend(fix: str) -> str:
        assert words in fix, fix
        if found := re.search(r"kdcache verify( --quick)?( \S+)?(?= names|$)", fix):
            assert run([*shlex.split(found[0])[1:], *([] if found[2] else ["a"])]) == 4
            assert capsys.readouterr().out
        shutil.rmtree(path)
        shutil.copytree(sound / layout, path)
        return "a"

    assert followed(attempt, "a", mend)


@pytest.mark.parametrize(("kind", "registry"), [("codec", CODECS), ("layout", LAYOUTS)])
def test_what_this_installation_does_not_know_is_known_with_the_plugin(
    kind: str, registry: Any, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_manifest(Path(shutil.copytree(sound / "zarr", "a")), lambda fields: fields[kind].update(name="plugged"))
    component = registry[getattr(open_archive(sound / "zarr").manifest, kind)["name"]]
    monkeypatch.setattr(registry, "_types", dict(registry._types))  # installed for this test alone

    def mend(fix: str) -> str:
        assert fix.startswith("upgrade kdcache, or install the plugin")
        about = Path("plugins/plugged-1.dist-info")
        about.mkdir(parents=True)
        (about / "METADATA").write_text("Name: plugged\nVersion: 1\n")
        named = f"plugged = {component.__module__}:{component.__qualname__}"
        (about / "entry_points.txt").write_text(f"[kdcache.{kind}s]\n{named}\n")
        monkeypatch.syspath_prepend("plugins")
        monkeypatch.setattr(registry, "_group", f"kdcache.{kind}s")  # as when a process begins
        return "a"

    assert followed(everything, "a", mend)


@pytest.mark.parametrize("way", ["another folder", "set aside"])
def test_parts_do_not_take_views_away(way: str, sound: Path) -> None:
    archive = open_archive(sound / "zarr")
    derive(archive, "b", contents="statistics")

    def mend(fix: str) -> str:
        if way == "another folder":
            assert fix.startswith("name another folder")
            return "c"
        typed(fix, "mv")
        return "b"

    assert followed(lambda path: derive(archive, path, views=range(1), contents="statistics"), "b", mend).verify().ok


@pytest.mark.parametrize("level", ["some", None, ["full"]])
def test_levels_of_verification_are_named(level: Any, sound: Path) -> None:
    archive = open_archive(sound / "zarr")
    for place in (0, 1):
        assert followed(lambda given: archive.verify(given).ok, level, lambda fix, place=place: chosen(fix)[place])


def chosen(fix: str) -> list[str]:
    return fix.partition("choose one of: ")[2].split(", ")


PLANS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "a wrong field": ({"provenance": "dumped"}, "correct it", {"provenance": {"command": "dumped"}}),
    "left out": ({"provenance": "dumped"}, "or leave it out", {}),
    "an array": ({"provenance": {"loss": np.float32(1)}}, "such as float(value)", {"provenance": {"loss": float(np.float32(1))}}),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans_are_made_of_what_the_fix_asks_for(case: str) -> None:
    wrong, words, right = PLANS[case]
    to = followed(lambda changes: writer(Path("a"), **changes), wrong, says(words, right))
    assert finish(to).verify().ok


# ---------------------------------------------------------------- values

MATRIX = np.zeros((2, 3), int)
DIGESTS = np.array([-1, 5], np.int64)
VALUES: dict[str, tuple[Callable[[Any], Any], Any, str, Any]] = {
    "not finite": (CODECS.parse("f32").encode, np.full((1, 3), np.nan, np.float32), "use another teacher", np.ones((1, 3))),
    "a set": (partial(in_order, what="names"), {"b", "a"}, "give a list, one entry for each", ["a", "b"]),
    "a text": (partial(in_order, what="names"), "ab", "give a list, one entry for each", ["a", "b"]),
    "a number": (partial(in_order, what="names"), 3, "give a list, one entry for each", ["a"]),
    "two axes": (partial(whole_numbers, what="labels", listed=True), MATRIX, "array.ravel()", MATRIX.ravel()),
    "another shape": (
        lambda given: stored_numbers(given, "digests", np.dtype(np.uint64), (2,)),
        np.zeros(3, int),
        "give one for every row",
        np.zeros(2, int),
    ),
    "below 0": (
        lambda given: stored_numbers(given, "digests", np.dtype(np.uint64), (2,)),
        DIGESTS,
        "give an array of uint64",
        DIGESTS.view(np.uint64),
    ),
    "on meta": (partial(whole_numbers, what="labels"), torch.zeros(3, device="meta", dtype=torch.int64), "dense", torch.zeros(3)),
    "nested": (
        partial(whole_numbers, what="labels"),
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        "or an array",
        np.zeros(3),
    ),
    "texts as logits": (partial(entropy, tau=1), np.array([["a", "b"]]), "float32", np.zeros((1, 2), np.float32)),
    "a single logit": (partial(softmax, tau=1), np.float32(3), "float32", np.zeros((1, 2), np.float32)),
    "tau 0": (partial(softmax, np.zeros((1, 2))), 0.0, "such as 1, 4 or 20", 20),
    "endless tau": (partial(entropy, np.zeros((1, 2))), np.inf, "such as 1, 4 or 20", 4),
    "no name": (METHODS.parse, 3, "choose one of: ", "kd"),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_values_are_used_when_they_are_given_as_the_fix_says(case: str) -> None:
    attempt, wrong, words, right = VALUES[case]
    assert followed(attempt, wrong, says(words, right)) is not None


def test_every_name_that_is_to_choose_from_is_one() -> None:
    for place in range(len(list(CODECS))):
        assert followed(CODECS.parse, None, lambda fix, place=place: chosen(fix)[place])


@pytest.mark.parametrize(("codec", "value"), [("i16", 70.0), ("f16", 70_000.0)])
def test_logits_that_are_too_large_are_stored_by_another_codec(codec: str, value: float) -> None:
    large = np.array([[value, 0, 0]], np.float32)

    def mend(fix: str) -> str:
        found = re.search(r"--codec (\w+)", fix)
        assert found, fix
        return found[1]

    stored = followed(lambda name: CODECS.parse(name).encode(large), codec, mend)
    assert stored["logits"].size == 3


def model(name: str) -> Any:
    return load_function(name, "model", forms="a name, or module:function", called="num_classes=...", listing="kdcache models")()


FUNCTIONS: dict[str, tuple[str, Callable[[str], str]]] = {
    "not understood": ("own model", says("list names with: kdcache models", "ownmodel:make")),
    "not installed": ("ownmodell:make", says("or correct the name; a model is", "ownmodel:make")),
    "elsewhere": ("othermodel:make", says("change to its folder", "othermodel:make", lambda: os.chdir("other"))),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_functions_are_found_as_the_fix_says(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ownmodel", "othermodel"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    Path("other").mkdir()
    Path("ownmodel.py").write_text("def make(): return 1")
    Path("other/othermodel.py").write_text("def make(): return 1")
    wrong, mend = FUNCTIONS[case]
    assert followed(model, wrong, mend) == 1


@pytest.mark.parametrize("case", ["missing", "unknown"])
def test_options_are_left_out_or_added(case: str) -> None:
    from pydantic import ValidationError

    from kdcache.options import wrong_option

    def config(given: dict[str, Any]) -> TrainConfig:
        try:
            return TrainConfig(**given)
        except ValidationError as error:
            raise wrong_option(error) from None

    def mend(fix: str) -> dict[str, Any]:
        if case == "missing":
            assert fix == "add --epochs ..."
        else:
            assert fix == "leave it out, or correct the name"
        return {"epochs": 3}

    assert followed(config, {} if case == "missing" else {"epochs": 3, "epoch": 3}, mend).epochs == 3


# ---------------------------------------------------------------- places


def test_reports_are_made_of_runs() -> None:
    RunFolders(Path("runs"))()

    def mend(fix: str) -> list[Path]:
        return [Path(word) for word in fix.removeprefix("kdcache report ").split()]

    assert followed(collect, [], mend)


def test_images_of_an_archive_that_names_none_are_named() -> None:
    finish(writer(Path("a"), policy=ViewPolicy(size=16)))
    archive, workspace = open_archive("a"), Workspace(Path("home"))

    def mend(fix: str) -> str:
        return fix.partition("--dataset ")[2].replace("NAME", "pets")

    assert followed(lambda spec: archive_source(archive, workspace, spec), None, mend)


def forked(act: Callable[[], object], folder: Path) -> None:
    """Do it in a process that was forked from this one, with what it records in a file that any user may write."""
    record = folder / "record"
    record.touch()
    record.chmod(0o666)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.environ[RECORD] = str(record)
            act()
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    note({json.loads(line) for line in record.read_text().splitlines()})


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("way", ["writable", "another place"])
def test_folders_that_may_not_be_written_are_made_writable(way: str) -> None:
    def mend(fix: str) -> Path:
        if way == "another place":
            assert "or choose another place with --home" in fix
            return Path("other/teachers").absolute()
        found = re.search(r"make (\S+) writable", fix)
        assert found, fix
        Path(found[1]).chmod(0o755)
        return Path("mine/teachers").absolute()

    def attempt(folder: Path) -> bool:
        require_writable(folder)
        folder.mkdir()
        return True

    def act() -> None:
        if os.getuid() == 0:  # which may write everywhere
            os.setgid(65534)
            os.setuid(65534)
        assert followed(attempt, Path("mine/teachers").absolute(), mend)

    with tempfile.TemporaryDirectory() as name:  # pytest's are for its user alone
        os.chdir(name)
        for folder in ("mine", "other"):
            Path(folder).mkdir()
            if os.getuid() == 0:
                os.chown(folder, 65534, 65534)
        Path("mine").chmod(0o555)
        Path(name).chmod(0o755)
        forked(act, Path(name))
        os.chdir("/")


# ---------------------------------------------------------------- servers


@pytest.fixture(scope="module")
def one_server(sound: Path) -> Iterator[FaultyServer]:
    with FaultyServer(sound) as server:
        yield server


@pytest.fixture
def server(one_server: FaultyServer) -> FaultyServer:
    one_server.forget()
    return one_server


def fetched(url: str) -> int:
    return len(b"".join(open_remote(url).stream("kdcache.json")))


REFUSALS: dict[str, tuple[Fault, str]] = {
    "forbidden": (Fault(status=403), "ask whoever runs the server for access"),
    "a circle": (Fault(redirect="/zarr/kdcache.json"), "or ask whoever runs the server"),
    "a teapot": (Fault(status=418), "or ask whoever runs the server"),
    "no length": (Fault(chunked=True), "serve the archive's files as they are"),
    "busy": (Fault(status=503), "then repeat the command"),
    "torn": (Fault(reset=True), "then repeat the command"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_servers_that_have_changed_their_minds_are_read(case: str, server: FaultyServer) -> None:
    fault, words = REFUSALS[case]
    server.faults = {"kdcache.json": fault}
    url = f"{server.url}/zarr"
    assert followed(fetched, url, says(words, url, server.forget))


@pytest.mark.parametrize("wrong", ["{server}/nothing", "http://%/zarr", "https://127.0.0.1:99999/zarr", "http://[::1/zarr"])
def test_addresses_are_corrected(wrong: str, server: FaultyServer) -> None:
    assert followed(fetched, wrong.format(server=server.url), says("correct the ", f"{server.url}/zarr"))


def test_certificates_are_trusted_as_the_fix_says(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyServer(sound, tls=tmp_path) as secure:

        def mend(fix: str) -> str:
            name, _, value = fix.partition("export ")[2].partition("=")
            monkeypatch.setenv(name, value.replace("THEIR-CERTIFICATES.pem", str(tmp_path / "authority.pem")))
            return f"{secure.url}/zarr"

        # Each attempt is made as in a process of its own.
        assert followed(lambda url: (remote._obstore.cache_clear(), fetched(url))[1], f"{secure.url}/zarr", mend)
    remote._obstore.cache_clear()


def test_what_a_server_has_damaged_is_uploaded_again(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{server.url}/zarr"
    server.faults = {"kdcache.json": Fault(short=300)}
    assert followed(everything, url, says("ask whoever published the archive to upload it again", url, server.forget))
    server.faults = {"kdcache.json": Fault(endless=True)}
    monkeypatch.setattr(reader, "MANIFEST_LIMIT", 1_000_000)
    assert followed(everything, url, says(ANEW, url, server.forget))


def test_files_that_an_archive_does_not_name_are_not_fetched(sound: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(sound / "zarr", tmp_path / "served/a"))
    edit_table(path, lambda shards: shards[0]["files"].pop(0))
    with FaultyServer(path.parent) as server:

        def got_again() -> None:
            shutil.rmtree(path)
            shutil.copytree(sound / "zarr", path)

        url = f"{server.url}/a"
        assert followed(everything, url, says("get the archive again from whoever made it", url, got_again))


def test_files_are_fetched_of_opened_archives(server: FaultyServer) -> None:
    url = f"{server.url}/zarr"

    def mend(fix: str) -> Any:
        assert fix == "open the archive with kdcache.open_archive"
        return open_archive(url).store

    assert followed(lambda store: store.local("logits/c/1/0/0"), CachedStore(open_remote(url)), mend).is_file()


def exported(monkeypatch: pytest.MonkeyPatch, fix: str) -> None:
    name, _, value = fix.partition("export ")[2].partition("=")
    monkeypatch.setenv(name, value.split(",")[0])


def test_views_that_do_not_fit_into_the_cache_are_fetched_with_the_limit_of_the_fix(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCACHE_CACHE_LIMIT", "10")
    url = f"{server.url}/hdf5"

    def mend(fix: str) -> str:
        exported(monkeypatch, fix)
        return url

    def attempt(url: str) -> bool:
        open_archive(url).fetch(0)
        return True

    assert followed(attempt, url, mend)


def test_files_that_others_give_up_are_kept_with_the_limit_of_the_fix(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCACHE_CACHE_LIMIT", "1MB")
    fetch = Cache.fetch

    def beside_others(cache: Cache, record: FileRecord, where: str, stream: Any) -> Path:
        path = fetch(cache, record, where, stream)
        if cache.limit < 10**9:  # another process makes room for a file of its own
            path.unlink()
        return path

    monkeypatch.setattr(Cache, "fetch", beside_others)

    def mend(fix: str) -> str:
        exported(monkeypatch, fix)
        return f"{server.url}/hdf5"

    assert followed(everything, f"{server.url}/hdf5", mend)


@pytest.mark.parametrize("kind", ["a folder in a file's place", "a file in a folder's place", "a file in the place of locks"])
def test_what_others_put_into_the_cache_is_moved_away_by_the_command_of_the_fix(kind: str, server: FaultyServer) -> None:
    archive = open_archive(f"{server.url}/zarr")
    path = archive.store.cache.path(archive._record_of("logits/c/1/0/0"))
    if kind.startswith("a folder"):
        path.mkdir(parents=True)
        (path / "theirs").touch()
    else:
        place = path.parent.parent / "locks" if "locks" in kind else path.parent
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()

    def mend(fix: str) -> Any:
        typed(fix, "mv")
        return archive

    assert followed(lambda archive: archive.read(1, 0, 3).load(), archive, mend)


# ---------------------------------------------------------------- object stores and the Hub


class Bucket:
    """What is put there, whoever asks; or nothing, until they say that they need no account."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def __call__(self, request: Request) -> Answer:
        if request.method == "PUT":
            self.files[request.path] = request.body
            return Answer(200, {"etag": '"1"'})
        data = self.files.get(request.path)
        if data is None:
            return Answer(404)
        about = {"etag": '"1"', "last-modified": "Tue, 01 Dec 2026 00:00:00 GMT"}
        return Answer(200, about, data)


@pytest.fixture
def bucket(sound: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    bucket = Bucket()
    bucket.files["/bucket/a/kdcache.json"] = (sound / "zarr/kdcache.json").read_bytes()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with FaultyServer(bucket) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9/169.254.169.254")  # which is nowhere
        remote._obstore.cache_clear()
        yield bucket
    remote._obstore.cache_clear()


CREDENTIALS = {
    "keys": ("set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}),
    "none": ("or AWS_SKIP_SIGNATURE=true for public data", {"AWS_SKIP_SIGNATURE": "true"}),
}


@pytest.mark.parametrize("case", CREDENTIALS)
def test_credentials_are_set_as_the_fix_says(case: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    words, environment = CREDENTIALS[case]

    def mend(fix: str) -> str:
        assert words in fix, fix
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        remote._obstore.cache_clear()
        return "s3://bucket/a"

    assert followed(fetched, "s3://bucket/a", mend)


def test_files_are_put_where_the_fix_says(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")

    def mend(fix: str) -> str:
        return fix.removeprefix("use a URL such as ").replace("BUCKET/FOLDER", "bucket/new")

    followed(lambda url: open_remote(url).put("x", b"some"), "http://127.0.0.1:9/a", mend)
    assert bucket.files["/bucket/new/x"] == b"some"


COMMIT = "c0ffee" * 6 + "cafe"
ON_THE_HUB: dict[str, tuple[str, str]] = {
    "no account": ("hf://datasets/team/logits/zarr", "or set HF_TOKEN"),
    "no revision": ("hf://datasets/team/logits@nope/zarr", "correct what follows @"),
    "no name": ("hf://datasets/team/lo..gits/zarr", "correct its name"),
}


@pytest.mark.parametrize("case", ON_THE_HUB)
def test_datasets_of_the_hub_are_read_as_the_fix_says(case: str, sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, words = ON_THE_HUB[case]
    folder = sound / "zarr"
    files = {f"zarr/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with FaultyServer(fake_hub({COMMIT: files}, {"main": COMMIT}, "secret")) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(Path("hub").resolve()))
        if case != "no account":
            monkeypatch.setenv("HF_TOKEN", "secret")
        set_token = partial(monkeypatch.setenv, "HF_TOKEN", "secret")
        assert followed(fetched, wrong, says(words, "hf://datasets/team/logits@main/zarr", set_token))


# ---------------------------------------------------------------- processes


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("way", ["before", "spawn"])
def test_files_are_put_before_a_fork_or_in_a_process_of_its_own(
    way: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    open_remote("s3://bucket/before").put("x", b"some")  # by this process, whose threads are lost to those that are forked

    def act() -> None:
        def attempt(how: str) -> None:
            put = open_remote(f"s3://bucket/{how}").put
            if how == "fork":
                put("x", b"some")
            elif how == "spawn":
                process = get_context("spawn").Process(target=put, args=("x", b"some"))
                process.start()
                process.join(60)
                assert process.exitcode == 0

        followed(attempt, "fork", says("do this before forking, or start the process by spawn", way))

    forked(act, tmp_path)
    assert bucket.files[f"/bucket/{way}/x"] == b"some"
    assert "/bucket/fork/x" not in bucket.files
