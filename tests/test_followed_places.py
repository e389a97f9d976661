"""Addresses, models, studies and signatures that are wrong: the fix of the error names what is then found."""

import shutil
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from kdcache.archive import open_archive
from kdcache.models.names import LOCAL, resolve
from kdcache.sharing.export import hub_repository
from kdcache.study.schema import find_study, load_study, shipped
from kdcache.system.files import local_path
from kdcache.system.remote import hub_address, open_remote
from tests.archives import finish, writer
from tests.following import followed

Mend = Callable[[str], Any]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDCACHE_CACHE", str(tmp_path / "cache"))


def says(words: str, value: Any, does: Callable[[], object] | None = None) -> Mend:
    def mend(fix: str) -> Any:
        assert words in fix, fix
        if does is not None:
            does()
        return value

    return mend


# ---------------------------------------------------------------- addresses

ADDRESSES: dict[str, tuple[str, Mend]] = {
    "a query": ("https://host/a?version=3", says("give the URL up to the question mark", "https://host/a")),
    "a password": ("https://me:secret@host/a", says("leave it out", "https://host/a")),
    "no host": ("https:///a", lambda fix: fix.replace("HOST/FOLDER", "host/a")),
    "another kind": (
        "ftp://host/a",
        lambda fix: f"{fix.removeprefix('use one of ').partition(',')[0].removesuffix('://')}://host/a",
    ),
}


@pytest.mark.parametrize("case", ADDRESSES)
def test_addresses_are_understood_as_the_fix_writes_them(case: str) -> None:
    wrong, mend = ADDRESSES[case]
    assert followed(open_remote, wrong, mend) is not None


def test_datasets_of_the_hub_are_named_as_the_fix_writes_them() -> None:
    def mend(fix: str) -> str:
        return fix.replace("ORGANISATION/NAME[@REVISION][/FOLDER]", "org/name")

    assert followed(hub_address, "hf://org", mend) == ("org/name", None, "")


def test_what_has_to_be_on_this_machine_is_named_as_the_fix_says() -> None:
    place = followed(
        lambda path: local_path(path, "--home", elsewhere="name a folder of this machine"),
        Path("s3://bucket/a"),
        says("name a folder of this machine", Path("a")),
    )
    assert place == Path("a")


@pytest.fixture
def served(tmp_path: Path) -> Any:
    """An archive in `tmp_path/served/a`, and the address of `served`."""
    finish(writer(tmp_path / "served/a"))

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "served")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def read(url: str) -> float:
    archive = open_archive(url)
    return float(archive.find(0, np.arange(archive.num_samples)).logits.sum())


def test_addresses_of_archives_are_corrected(served: str) -> None:
    assert followed(read, f"{served}/b", says("correct the address", f"{served}/a"))


def test_archives_that_are_fetched_have_a_folder_once_they_were_pulled(served: str) -> None:
    import shlex

    from kdcache.cli import run

    def mend(fix: str) -> str:
        assert run(shlex.split(fix)[1:]) == 0
        return "archives/a"

    followed(lambda place: open_archive(place).path, f"{served}/a", mend)


def test_an_unfinished_upload_is_finished(served: str) -> None:
    Path("served/a/kdcache.json").rename("kept")
    Path("served/a/.dump").mkdir()
    Path("served/a/.dump/plan.json").write_text("{}")

    def finished() -> None:
        Path("kept").rename("served/a/kdcache.json")

    followed(read, f"{served}/a", says("finish its dump or upload, by repeating the command", f"{served}/a", finished))


@pytest.mark.parametrize("case", ["other bytes", "missing", "cut"])
def test_what_a_server_has_wrongly_is_uploaded_again(served: str, case: str) -> None:
    files = [file for file in Path("served/a/logits/c").rglob("*") if file.is_file()]
    whole = {file: file.read_bytes() for file in files}
    for file in files:
        if case == "missing":
            file.unlink()
        else:
            file.write_bytes(b"x" * len(whole[file]) if case == "other bytes" else whole[file][:-9])

    def upload() -> None:
        for file, data in whole.items():
            file.write_bytes(data)

    followed(read, f"{served}/a", says("ask whoever published the archive to upload this file again", f"{served}/a", upload))


@pytest.mark.parametrize("limit", ["many", "1"])
def test_the_limit_of_the_cache_is_raised_by_the_command_of_the_fix(
    served: str, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCACHE_CACHE_LIMIT", limit)

    def mend(fix: str) -> str:
        name, _, value = fix.removeprefix("export ").partition("=")
        monkeypatch.setenv(name, value.partition(",")[0])
        return f"{served}/a"

    assert followed(read, f"{served}/a", mend)


@pytest.mark.parametrize("way", ["set aside", "elsewhere"])
def test_a_link_in_the_caches_place_is_set_aside(served: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.following import typed

    read(f"{served}/a")
    folder = next(path for path in Path("cache").iterdir() if path.is_dir())
    folder.rename("somewhere")
    folder.symlink_to("../somewhere")

    def mend(fix: str) -> str:
        if way == "set aside":
            typed(fix, "mv")
        else:
            assert "or set KDCACHE_CACHE=FOLDER" in fix
            monkeypatch.setenv("KDCACHE_CACHE", "other")
        return f"{served}/a"

    assert followed(read, f"{served}/a", mend)


# ---------------------------------------------------------------- models


def folder_of_model() -> None:
    import timm
    from safetensors.torch import save_file

    Path("m").mkdir()
    model = timm.create_model("test_vit", num_classes=3)
    save_file(model.state_dict(), "m/model.safetensors")
    Path("m/config.json").write_text('{"architecture": "test_vit", "num_classes": 3}')


def pointer() -> None:
    Path("m/model.safetensors").rename("whole")
    Path("m/model.safetensors").write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n")


def fetched(fix: str) -> str:
    assert fix == "fetch it: git -C m lfs pull" or fix.endswith("/m lfs pull"), fix
    Path("whole").replace("m/model.safetensors")
    return f"{LOCAL}m"


CONFIG = '{"architecture": "test_vit", "num_classes": 3}'
HERE = f"{LOCAL}m"


def config(text: str) -> Callable[[], object]:
    return lambda: Path("m/config.json").write_text(text)


def moved(source: str, target: str) -> Callable[[], object]:
    return lambda: Path(source).rename(target)


FILES = "name a folder with config.json and model.safetensors"
MODELS: dict[str, tuple[str, Callable[[], object] | None, Mend]] = {
    "not there": (f"{LOCAL}n", None, says(FILES, HERE)),
    "no weights": (HERE, moved("m/model.safetensors", "whole"), says(FILES, HERE, moved("whole", "m/model.safetensors"))),
    "a pointer": (HERE, pointer, fetched),
    "no configuration": (HERE, config("{"), says("restore it", HERE, config(CONFIG))),
    "another model": (HERE, config("{"), says("or use another model", "test_vit")),
    "of another library": (HERE, config('{"architecture": "nothing"}'), says("use a model of timm's", "test_vit")),
    "of transformers": (HERE, config('{"model_type": "gpt2"}'), says("use a model of timm", "test_vit")),
    "another state": (f"{HERE}@{'0' * 12}", None, lambda fix: fix.partition("as it is now: ")[2]),
    "a slip": ("test_vitt", None, lambda fix: "test_vit" if "test_vit" in fix or "kdcache models" in fix else ""),
    "nothing like it": ("zzzzzz", None, says("kdcache models", "test_vit")),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_are_found_as_the_fix_names_them(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, spoil, mend = MODELS[case]
    folder_of_model()
    if spoil is not None:
        spoil()
    assert followed(made, wrong, mend)


def made(name: str) -> Any:
    from kdcache.models.creation import create_model

    return create_model(resolve(name, "teacher"), 3, input_size=64)


def test_repositories_of_models_are_named_as_the_fix_says() -> None:
    for wrong in ("name", "s3://bucket/a"):
        assert followed(hub_repository, wrong, lambda fix: fix.split()[1].replace("ORG/NAME", "org/name"))
        assert followed(hub_repository, wrong, lambda fix: fix.split()[-1].replace("ORG/NAME", "org/name"))


# ---------------------------------------------------------------- studies


def study(change: Callable[[dict[str, Any]], object]) -> Callable[[], None]:
    def write() -> None:
        fields = yaml.safe_load(next(iter(shipped().values())).read_text())
        change(fields)
        Path("s.yaml").write_text(yaml.safe_dump(fields))

    return write


def students(fields: dict[str, Any], **changes: Any) -> dict[str, Any]:
    block = fields["students"][0]
    for name, value in changes.items():
        block[name.replace("_", "-")] = value
    return block


def text(content: str) -> Callable[[], object]:
    return lambda: Path("s.yaml").write_text(content)


def copied(fix: str) -> Path:
    return Path(shutil.copy(fix.partition("works: ")[2], "s.yaml"))


def shipped_one(fix: str) -> str:
    return fix.partition("kdcache's own: ")[2].split(",")[0]


def numbered(fix: str) -> str:
    study(lambda fields: students(fields, epochs=fix.rpartition(" ")[2]))()
    return "s.yaml"


def from_target(fields: dict[str, Any]) -> None:
    students(fields, init=["target"])
    fields["starts"] = {"target": {"epochs": 20}}


AS_SHIPPED = study(lambda fields: None)
STUDIES: dict[str, tuple[Callable[[], object], Mend]] = {
    "not there": (lambda: None, shipped_one),
    "a list": (text("- a"), copied),
    "no yaml": (text("a: ["), copied),
    "an unknown field": (study(lambda f: f.update(studets=f.pop("students"))), says("students", "s.yaml", AS_SHIPPED)),
    "an unknown field of students": (study(lambda f: students(f, tuu=[1])), says("tau", "s.yaml", AS_SHIPPED)),
    "a field that is missing": (study(lambda f: f.pop("varies")), says("add varies:", "s.yaml", AS_SHIPPED)),
    "a wrong value": (study(lambda f: students(f, epochs="many")), numbered),
    "starts that are missing": (
        study(lambda f: students(f, init=["target"])),
        says("starts: {target: {epochs: 20}}", "s.yaml", study(from_target)),
    ),
    "several starts": (
        study(lambda f: f.update(starts={"target": {"epochs": [20, 30]}})),
        says("keep one of them", "s.yaml", study(lambda f: f.update(starts={"target": {"epochs": 20}}))),
    ),
    "nothing to do": (
        study(lambda f: (f.pop("students", 0), f.pop("stats", 0))),
        says("add students: or stats:", "s.yaml", AS_SHIPPED),
    ),
}


@pytest.mark.parametrize("case", STUDIES)
def test_studies_are_read_when_they_are_written_as_the_fix_says(case: str) -> None:
    spoil, mend = STUDIES[case]
    spoil()
    assert followed(lambda name: load_study(find_study(name)), "s.yaml", mend)
