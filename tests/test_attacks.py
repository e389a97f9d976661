"""Protects people who open archives of strangers: whatever is in the folder, they get an error in three lines, or right rows.

Every attack is a sound archive with one thing changed, and checksums that agree with the change wherever a stranger could
make them agree. It must be noticed where it matters, without a traceback, without following a name out of the folder,
without memory that the bytes on disk do not justify, and without waiting for ever.
"""

import functools
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastcrc.crc32 import iscsi as crc32c
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kdcache.archive import ArchiveWriter, open_archive
from kdcache.archive.format.manifest import ArchivePlan, ShardRecord, archive_digest
from kdcache.archive.format.store import LocalStore
from kdcache.archive.layouts import hdf5, webdataset
from kdcache.archive.writing import writer as writer_module
from kdcache.cli import run
from kdcache.errors import IncompatibleError, IncompleteError, IntegrityError, KdcacheError, NotFoundError
from tests.fuzz import VALUES, fuzz
from tests.hostile import CLASSES, LAYOUT_OPTIONS, SAMPLES, build, edit_manifest, edit_table, exercise, reseal
from tests.servers import FaultyServer

COMPRESSED = ["zarr:bitshuffle", "zarr:pcodec"]
DAMAGE = {3, 4, 5, 6}  # exit statuses: not found, integrity, incompatible, incomplete
SECONDS = 120  # of machines that do other things as well
Attack = Callable[[Path], object]
Json = dict[str, Any]


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A sound archive of a layout. Shared: copy it before changing it."""
    folder = tmp_path_factory.mktemp("sound")
    return functools.cache(lambda layout: build(folder / layout.replace(":", "-"), layout))


@pytest.fixture
def copy(sound: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda layout: Path(shutil.copytree(sound(layout), tmp_path / "archive"))


@pytest.fixture(autouse=True)
def _patience() -> Iterator[None]:
    """A test that waits for ever is ended, and has failed."""

    def end(*_: object) -> None:
        raise TimeoutError("it takes too long")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def endure(path: Path, *, megabytes: float | None = None, copies: bool = False) -> dict[str, KdcacheError | None]:
    """Everything that reads the archive: what each raised, none of it anything but an error of ours, and in how much memory."""
    if megabytes is None:
        return exercise(path, path.parent / "copies" if copies else None)
    tracemalloc.start()
    try:
        outcome = exercise(path, path.parent / "copies" if copies else None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < megabytes * 2**20, f"{peak:,} bytes were allocated"
    return outcome


def refused(path: Path, *acts: str, megabytes: float | None = None, copies: bool = False) -> str:
    """The archive must not pass `acts` ("labels", "read 0", ...), nor ever `verify`; returns the first refusal."""
    outcome = endure(path, megabytes=megabytes, copies=copies)
    if "open" in outcome:
        return str(outcome["open"])
    for act in (*acts, "verify full"):
        assert outcome[act] is not None, f"{act} notices nothing"
        assert isinstance(outcome[act], IntegrityError | IncompatibleError)
    return str(outcome[(*acts, "verify full")[0]])


def commands_fail(path: Path, capsys: pytest.CaptureFixture[str], *commands: str) -> None:
    """Each command ends with a status that tells of damage, in three lines."""
    for command in commands:
        capsys.readouterr()
        arguments = [*command.split(), str(path)]
        if command == "convert":
            arguments += ["--output", str(path.parent / "converted"), "--layout", "hdf5"]
        assert run(arguments) in DAMAGE, capsys.readouterr().err
        lines = capsys.readouterr().err.splitlines()
        assert [line.partition(":")[0] for line in lines[-3:]] == ["error", "why", "fix"]
        assert not any("Traceback" in line or "bug" in line for line in lines)


def manifest(path: Path) -> Json:
    fields: Json = json.loads((path / "kdcache.json").read_text())
    return fields


def table(path: Path) -> list[Json]:
    return [json.loads(line) for line in (path / manifest(path)["shards"]["path"]).read_text().splitlines()]


def shard_file(path: Path, field: str = "logits") -> Path:
    """The file with `field` of view 0, block 0."""
    names = [record["path"] for record in table(path)[0]["files"]]
    return path / next(name for name in names if len(names) == 1 or name.startswith(f"{field}/"))


def with_crc(data: bytes) -> bytes:
    return data + crc32c(data).to_bytes(4, "little")


# ------------------------------------------------------------------------------------------------------- names

NAMES = {
    "upwards": "../secret",
    "upwards-inside": "logits/../../secret",
    "dots": "..",
    "dot": "./README.md",
    "absolute": "/etc/hostname",
    "backslash": "..\\secret",
    "drive": "C:/secret",
    "drive-relative": "C:secret",
    "stream": "README.md:secret",
    "empty": "",
    "empty-part": "logits//c",
    "folder": "logits",
    "trailing-slash": "README.md/",
    "nul": "README.md\0.png",
    "newline": "README.md\n",
    "terminal": "\x1b]0;x\x07",
    "other-letters": "re\u0301adme.md",
    "half-a-character": "\ud800",
    "long": "a" * 100_000,
    "deep": "a/" * 5000 + "a",
    "device": "/dev/zero",
    "not-there": "nothing",
}


@pytest.mark.grid
@pytest.mark.parametrize("place", ["manifest", "table", "the table itself"])
@pytest.mark.parametrize("name", NAMES)
def test_no_name_leads_out_of_the_folder(
    copy: Callable[[str], Path], name: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy("hdf5")
    (path.parent / "secret").write_text("private")
    record = {"path": NAMES[name], "bytes": 7, "sha256": "0" * 64}
    if place == "manifest":
        edit_manifest(path, lambda m: m["files"].append(record))
    elif place == "table":
        edit_table(path, lambda t: t[0]["files"][0].update(path=NAMES[name]))
    else:
        edit_manifest(path, lambda m: m["shards"].update(path=NAMES[name]))
    opened: list[str] = []
    monkeypatch.setattr("io.open", watched(opened, open))  # what pathlib opens files with
    try:
        failures = open_archive(path).verify("full").failures
        assert failures
        assert all(len(str(failure)) < 250_000 for failure in failures)
        with pytest.raises(IntegrityError):
            list(open_archive(path).shards()), open_archive(path).labels(), open_archive(path).verify().raise_if_failed()
    except IntegrityError:
        assert name == "half-a-character" or (name, place) == ("long", "the table itself")
    assert opened
    assert all(Path(file).resolve().is_relative_to(path.resolve()) for file in opened)


def watched(opened: list[str], act: Callable[..., Any]) -> Callable[..., Any]:
    def watch(file: Any, *arguments: Any, **options: Any) -> Any:
        opened.append(str(file))
        return act(file, *arguments, **options)

    return watch


# ------------------------------------------------------------------------------------------------------- what is no file

PLACES = ["table", "shard", "labels", "manifest"]


def file_at(path: Path, place: str) -> Path:
    if place == "shard":
        return shard_file(path)
    labels = next(r["path"] for r in manifest(path)["files"] if r["path"] in {"samples.h5", "samples.tar"})
    return path / {"table": manifest(path)["shards"]["path"], "labels": labels, "manifest": "kdcache.json"}[place]


def _loop(file: Path) -> None:
    file.symlink_to(file.name)


IMPOSTORS: dict[str, Attack] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "link-to-itself": _loop,
    "link-to-a-device": lambda file: file.symlink_to("/dev/zero"),
    "link-to-a-terminal": lambda file: file.symlink_to("/dev/tty"),
    "link-to-nothing": lambda file: file.symlink_to("/nonexistent/file"),
    "link-to-a-pipe": lambda file: (os.mkfifo(file.with_name("pipe")), file.symlink_to("pipe")),
    "link-to-a-folder": lambda file: file.symlink_to("/"),
    "link-to-another-file": lambda file: file.symlink_to("/etc/passwd"),
    "socket-or-nothing": lambda file: None,
    "empty": lambda file: file.write_bytes(b""),
    "endless": lambda file: (file.write_bytes(b""), os.truncate(file, 1 << 42)),  # sparse: takes no room
}


@pytest.mark.grid
@pytest.mark.parametrize("impostor", IMPOSTORS)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file_is_never_waited_for(
    copy: Callable[[str], Path], place: str, impostor: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy("webdataset" if place == "shard" else "hdf5")
    file = file_at(path, place)
    file.unlink()
    IMPOSTORS[impostor](file)
    if place == "manifest":
        with pytest.raises((NotFoundError, IntegrityError, IncompleteError)):
            open_archive(path)
    else:
        refused(path, "verify quick", *{"table": ["size"], "shard": ["read 0", "all 0"], "labels": ["labels"]}.get(place, []))
    if impostor in {"pipe", "endless"}:
        commands_fail(path, capsys, "info" if place in {"manifest", "table"} else "verify --quick")


@pytest.mark.parametrize("layout", LAYOUT_OPTIONS)
def test_links_to_the_recorded_bytes_are_followed_and_never_written_through(copy: Callable[[str], Path], layout: str) -> None:
    """Hugging Face's cache is made of links. What they lead to is read, if it is what is recorded, and never changed."""
    path = copy(layout)
    outside = path.parent / "blobs"
    before = {}
    for number, file in enumerate(sorted(p for p in path.rglob("*") if p.is_file())):
        blob = outside / str(number)
        outside.mkdir(exist_ok=True)
        shutil.move(file, blob)
        blob.chmod(0o444)
        file.symlink_to(blob)
        before[blob] = blob.read_bytes()
    assert endure(path)["verify full"] is None
    LocalStore(path).write("README.md", b"mine")
    assert not (path / "README.md").is_symlink()
    assert {blob: blob.read_bytes() for blob in before} == before
    assert open_archive(path).verify("quick").failures


def test_hard_links_are_files_and_never_written_through(copy: Callable[[str], Path]) -> None:
    path = copy("hdf5")
    other = path.parent / "mine"
    other.hardlink_to(path / "README.md")
    content = other.read_bytes()
    LocalStore(path).write("README.md", b"another card")
    assert other.read_bytes() == content


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("place", PLACES)
def test_files_that_may_not_be_read(copy: Callable[[str], Path], place: str) -> None:
    path = copy("hdf5")
    file_at(path, place).chmod(0)
    assert any(endure(path).values())


# ------------------------------------------------------------------------------------------------------- numbers

MOST = 2**31 - 1
CLAIMS: dict[str, Json] = {
    "samples": {"num_samples": MOST},
    "samples-in-one-shard": {"num_samples": MOST, "shard_rows": 2**30 * 2 - 1},
    "samples-in-even-shards": {"num_samples": MOST, "shard_rows": 2**30},
    "samples-in-long-shards": {"num_samples": MOST, "shard_rows": MOST - 3},
    "views": {"num_views": MOST},
    "views-of-one-sample": {"num_views": MOST, "num_samples": 1, "shard_rows": 4},
    "late-views": {"first_view": MOST},
    "long-shards": {"shard_rows": MOST},
    "longer-shards": {"shard_rows": 28},
    "short-shards": {"shard_rows": 1},
    "everything": {"num_views": MOST, "num_samples": MOST, "shard_rows": MOST, "first_view": MOST},
    "beyond": {"num_samples": 2**63, "num_views": 2**64},
    "absurd": {"num_samples": 10**4000},
    "fractional": {"num_samples": 1e300},
    "negative": {"num_samples": -1},
    "none": {"num_views": 0},
    "words": {"shard_rows": "many"},
}


@pytest.mark.grid
@pytest.mark.parametrize("layout", LAYOUT_OPTIONS)
@pytest.mark.parametrize("claim", CLAIMS)
def test_what_a_manifest_claims_is_not_allocated(copy: Callable[[str], Path], claim: str, layout: str) -> None:
    path = copy(layout)
    edit_manifest(path, lambda m: m.update(CLAIMS[claim]))
    with suppress(IntegrityError):
        assert not open_archive(path).verify("quick").ok
    edit_manifest(path, lambda m: m["shards"].update(bytes=1 << 30))  # without, so many shards are not believed
    refused(path, megabytes=32, copies=layout == "hdf5")


@pytest.mark.grid
@pytest.mark.parametrize("layout", LAYOUT_OPTIONS)
@pytest.mark.parametrize(
    "option", ["x", None, 1.5, -1, 0, 2**31, 10**400, True, [], {}, "2", 4, 3, 44], ids=lambda value: str(value)[:9]
)
def test_options_of_a_layout_that_do_not_fit(copy: Callable[[str], Path], layout: str, option: Any) -> None:
    path = copy(layout)
    key = list(LAYOUT_OPTIONS[layout])[-1]
    edit_manifest(path, lambda m: m["layout"].update({key: option}))
    outcome = endure(path)
    assert "open" in outcome or outcome["read 0"], "rows are read in units that are not there"


@pytest.mark.grid
@pytest.mark.parametrize(
    "component",
    [
        {},
        {"name": "os.system"},
        {"name": ["i16"]},
        {"name": "i16", "step": 1},
        {"name": "x" * 10**6},
        {"name": "__class__"},
        [],
        "i16",
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("kind", ["codec", "layout"])
def test_names_of_code_are_names_of_what_is_known(copy: Callable[[str], Path], kind: str, component: Any) -> None:
    path = copy("hdf5")
    edit_manifest(path, lambda m: m.update({kind: component}))
    refused(path)
    with pytest.raises(KdcacheError):
        open_archive(path)


def test_millions_of_classes_take_what_their_names_take(copy: Callable[[str], Path]) -> None:
    path = copy("hdf5")
    names = [f"c{i}" for i in range(100_000)]
    edit_manifest(path, lambda m: (m.update(class_names=names), m["statistics"].pop("details")))
    size = (path / "kdcache.json").stat().st_size
    refused(path, "read 0", megabytes=60 * size / 2**20)


@pytest.mark.parametrize("wrong", ["names", "keys", "records"])
def test_a_million_errors_are_not_described(copy: Callable[[str], Path], wrong: str) -> None:
    path = copy("hdf5")
    count = 100_000
    changes: dict[str, Attack] = {
        "names": lambda m: m.update(class_names=[1] * count),
        "keys": lambda m: m.update({f"x{i}": 1 for i in range(count)}),
        "records": lambda m: m.update(files=[{}] * count),
    }
    edit_manifest(path, changes[wrong])
    size = (path / "kdcache.json").stat().st_size
    refused(path, megabytes=200 * size / 2**20)


# ------------------------------------------------------------------------------------------------------- JSON

DEEP = b"[" * 200_000
TEXTS: dict[str, bytes] = {
    "deep": DEEP,
    "deep-objects": b'{"a":' * 100_000,
    "deep-and-closed": b"[" * 5000 + b"]" * 5000,
    "nothing": b"",
    "nul": b"\0" * 1000,
    "not-utf8": b'{"a": "\xff\xfe"}',
    "utf16": '{"format": "kdcache"}'.encode("utf-16"),
    "half-a-character": b'{"format": "\\ud800"}',
    "long-number": b"1" * 1_000_000,
    "number": b"7",
    "list": b"[1, 2]",
}


@pytest.mark.grid
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("place", ["manifest", "table", "user block", "keys", "plan", "replaced"])
def test_json_that_is_made_to_break_its_reader(copy: Callable[[str], Path], place: str, text: str) -> None:
    path = copy("webdataset" if place == "keys" else "hdf5")
    if place == "manifest":
        (path / "kdcache.json").write_bytes(TEXTS[text])
        refused(path, megabytes=32)
    elif place == "table":
        data = TEXTS[text] + b"\n"
        (path / manifest(path)["shards"]["path"]).write_bytes(data)
        seal_table(path, data)
        refused(path, megabytes=32)
    elif place == "user block":
        file = shard_file(path)
        file.write_bytes(TEXTS[text][:1024].ljust(1024) + file.read_bytes()[1024:])
        reseal(path)
        refused(path, "read 0")
    elif place == "keys":
        member = webdataset._member("samples.key.json", b"", np.frombuffer(TEXTS[text], np.uint8))
        (path / "samples.tar").write_bytes(b"".join([*member, bytes(1024)]))
        reseal(path)
        outcome = endure(path)
        assert isinstance(outcome["keys"], IntegrityError)
    elif place == "plan":
        (path / "kdcache.json").unlink()
        (path / ".dump").mkdir()
        (path / ".dump/plan.json").write_bytes(TEXTS[text])
        with pytest.raises(IncompleteError):
            open_archive(path)
    else:
        (path / ".dump").mkdir()
        (path / ".dump/closing.jsonl").write_bytes(TEXTS[text])
        assert endure(path)["verify full"] is None


def seal_table(path: Path, data: bytes) -> None:
    edit_manifest(path, lambda m: m["shards"].update(bytes=max(len(data), 600), sha256=hashlib.sha256(data).hexdigest()))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(copy: Callable[[str], Path], value: str) -> None:
    """What JSON cannot hold would make the manifests of copies unreadable."""
    path = copy("hdf5")
    text = (path / "kdcache.json").read_text()
    edited = text.replace('"entropy_mean": ', f'"entropy_mean": {value}, "was": ', 1).replace('"was"', '"entropy_rest_mean"', 1)
    (path / "kdcache.json").write_text(edited)
    with pytest.raises(IntegrityError):
        open_archive(path)


def test_a_field_that_is_given_twice_counts_once(copy: Callable[[str], Path]) -> None:
    path = copy("hdf5")
    text = (path / "kdcache.json").read_text()
    (path / "kdcache.json").write_text(text.replace("{", '{"num_samples": 2000000000, "shard_rows": 1,', 1))
    assert endure(path)["verify full"] is None  # of two, the last counts, here as everywhere in Python
    (path / "kdcache.json").write_text(text.rstrip().removesuffix("}") + ', "num_samples": 6}')
    refused(path)


def test_half_characters_of_keys_are_refused(copy: Callable[[str], Path]) -> None:
    path = copy("webdataset")
    keys = json.dumps(["\ud800"] * SAMPLES).encode()
    (path / "samples.tar").write_bytes(
        b"".join([*webdataset._member("samples.key.json", b"", np.frombuffer(keys, np.uint8)), bytes(1024)])
    )
    reseal(path)
    assert isinstance(endure(path)["keys"], IntegrityError)


# ------------------------------------------------------------------------------------------------------- the table of shards


def _swap_rows(shards: list[Json]) -> None:
    """Exchange what two records say, but for which shard they are about."""
    for key in ("rows", "rows_digest", "files"):
        shards[0][key], shards[1][key] = shards[1][key], shards[0][key]


TABLES: dict[str, tuple[Callable[[list[Json]], object], str]] = {
    "missing": (lambda t: t.pop(), "4 shards"),
    "twice": (lambda t: t.append(t[0]), "4 shards"),
    "instead-of-another": (lambda t: t.__setitem__(0, t[1]), "4 shards"),
    "one-too-many": (lambda t: t.append({**t[0], "view": 7}), "4 shards"),
    "negative": (lambda t: t[0].update(view=-1), "view"),
    "swapped": (_swap_rows, "view 0 block 0"),
    "rows": (lambda t: t[0].update(rows=3), "4 rows"),
    "rows-beyond": (lambda t: t[0].update(rows=10**400), "rows"),
    "digest": (lambda t: t[0].update(rows_digest="0" * 64), "rows digest"),
    "no-files": (lambda t: t[0].update(files=[]), "view 0 block 0"),
    "files-of-another": (lambda t: t[0].update(files=t[1]["files"]), "view 0 block 0"),
    "a-file-too-many": (lambda t: t[0]["files"].append({"path": "README.md", "bytes": 1, "sha256": "0" * 64}), "README.md"),
    "a-file-twice": (lambda t: t[0]["files"].append(t[0]["files"][0]), "view 0 block 0"),
    "sizes-beyond": (lambda t: t[0]["files"][0].update(bytes=2**63), "bytes"),
    "large-sizes": (lambda t: t[0]["files"][0].update(bytes=2**63 - 1), "9,223,372,036,854,775,807 bytes"),
}


@pytest.mark.grid
@pytest.mark.parametrize("layout", ["zarr", "hdf5"])
@pytest.mark.parametrize("change", TABLES)
def test_tables_that_do_not_fit_the_shards(copy: Callable[[str], Path], layout: str, change: str) -> None:
    """The stranger computes the archive's digest anew, so that nothing but the shards themselves contradicts the table."""
    path = copy(layout)
    alter, named = TABLES[change]
    edit_table(path, alter)
    seal_digest(path)
    outcome = endure(path)
    assert named in str(outcome.get("open") or outcome["verify full"])


def seal_digest(path: Path) -> None:
    """Make the digest in the manifest that of the table."""
    try:
        records = [ShardRecord.model_validate(record) for record in table(path)]
        digest = archive_digest(open_archive(path).manifest, records)
    except ValueError:
        return
    edit_manifest(path, lambda m: m.update(digest=digest))


def test_the_order_of_the_table_does_not_matter(copy: Callable[[str], Path]) -> None:
    path = copy("hdf5")
    edit_table(path, lambda t: t.reverse())
    assert endure(path)["verify full"] is None


def swap_files(path: Path) -> None:
    """Exchange the files of view 0 and view 1, block 0."""
    one, other = (next(s for s in table(path) if (s["view"], s["block"]) == (view, 0)) for view in (0, 1))
    for first, second in zip(one["files"], other["files"], strict=True):
        data = (path / first["path"]).read_bytes()
        shutil.copyfile(path / second["path"], path / first["path"])
        (path / second["path"]).write_bytes(data)


@pytest.mark.parametrize("layout", [name for name in LAYOUT_OPTIONS if name != "webdataset"])
def test_swapped_shards_are_noticed_by_their_digests_and_by_the_archives(copy: Callable[[str], Path], layout: str) -> None:
    path = copy(layout)
    digest = manifest(path)["digest"]
    swap_files(path)
    assert "sha256" in refused(path)
    reseal(path)  # now they are the shards of another archive, which says so
    assert manifest(path)["digest"] != digest
    edit_manifest(path, lambda m: m.update(digest=digest))
    assert "kdcache.json: digest" in refused(path)


def test_swapped_tar_files_do_not_even_have_the_right_names(copy: Callable[[str], Path]) -> None:
    path = copy("webdataset")
    swap_files(path)
    reseal(path)
    assert "00000-00000-000000" in refused(path, "read 0")


# ------------------------------------------------------------------------------------------------------- rows that nobody writes


def write_rows(path: Path, change: Callable[[dict[str, NDArray]], object], codec: str = "f32", layout: str = "zarr") -> Path:
    """An archive whose first shard was changed before all checksums were computed."""
    sound = open_archive(build(path.parent / "before", layout, codec={"name": codec}))
    plan = ArchivePlan.model_validate({name: getattr(sound.manifest, name) for name in ArchivePlan.model_fields})
    writer = ArchiveWriter.of_plan(path, plan, sound.labels(), sound.keys())
    for view, block in writer.missing():
        stored = {name: np.array(values) for name, values in sound.stored(view, block).items()}
        if (view, block) == (0, 0):
            change(stored)
        writer.write_stored(view, block, stored)
    return writer.finalize(statistics=sound.manifest.statistics).path


ROWS: dict[str, tuple[str, Callable[[dict[str, NDArray]], object], str]] = {
    "nan": ("f32", lambda f: f["logits"].__setitem__((0, 0), np.nan), "spread"),
    "infinite": ("f16", lambda f: f["logits"].__setitem__((1, 2), -np.inf), "spread"),
    "infinite-scale": ("u8", lambda f: f["scale"].__setitem__(0, np.inf), "spread"),
    "large-scale": ("u8", lambda f: (f["scale"].__setitem__(0, 3e38), f["logits"].__setitem__(0, 255)), "spread"),
    "entropy": ("i16", lambda f: f["entropy"].__setitem__(0, np.nan), "verify full"),
    "sample-beyond": ("i16", lambda f: f["sample"].__setitem__(0, SAMPLES), "find 0"),
    "sample-below": ("i16", lambda f: f["sample"].__setitem__(0, -1), "find 0"),
    "sample-extreme": ("i16", lambda f: f["sample"].__setitem__(0, -(2**31)), "find 0"),
    "argmax-beyond": ("i16", lambda f: f["argmax"].__setitem__(0, CLASSES), "read 0"),
    "argmax-below": ("i16", lambda f: f["argmax"].__setitem__(0, -1), "all 0"),
    "sample-twice": ("i16", lambda f: f["sample"].__setitem__(0, 5), "find 0"),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("change", ROWS)
def test_rows_that_no_writer_writes_are_noticed(tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_require_every_sample_once", lambda *_: None)
    codec, alter, act = ROWS[change]
    refused(write_rows(tmp_path / "archive", alter, codec), act, copies=True)


@pytest.mark.grid
@pytest.mark.parametrize("layout", LAYOUT_OPTIONS)
@pytest.mark.parametrize("label", [-1, CLASSES, 2**63 - 1, -(2**63)])
def test_labels_of_no_class_are_refused(copy: Callable[[str], Path], layout: str, label: int) -> None:
    path = copy(layout)
    labels = np.zeros(SAMPLES, "<i8")
    labels[3] = label
    write_labels(path, layout, labels)
    outcome = endure(path)
    assert isinstance(outcome["labels"], IntegrityError)
    assert str(label) in outcome["labels"].what


def write_labels(path: Path, layout: str, labels: NDArray) -> None:
    if layout == "hdf5":
        (path / "samples.h5").write_bytes(b"".join(hdf5._file({"label": labels})))
    elif layout == "webdataset":
        head = webdataset._npy_header(labels.dtype, labels.shape)
        (path / "samples.tar").write_bytes(b"".join([*webdataset._member("samples.label.npy", head, labels), bytes(1024)]))
    else:
        (path / "label/c/0").write_bytes(with_crc(labels.tobytes()))
    reseal(path)


@pytest.mark.parametrize("layout", LAYOUT_OPTIONS)
def test_labels_that_nobody_recorded_are_not_read(copy: Callable[[str], Path], layout: str) -> None:
    """A manifest may be signed. Then files that lie beside it must not count."""
    path = copy(layout)
    unrecorded = [r["path"] for r in manifest(path)["files"] if r["path"].startswith(("label/", "key/", "samples."))]
    assert unrecorded
    edit_manifest(path, lambda m: m.update(files=[r for r in m["files"] if r["path"] not in unrecorded]))
    assert "records none" in refused(path, "labels", "keys")


def test_labels_are_not_replaced_by_an_append_that_never_was(copy: Callable[[str], Path]) -> None:
    path = copy("zarr")
    sealed = (path / "kdcache.json").read_bytes()
    write_labels(path, "zarr", np.ones(SAMPLES, "<i8"))
    record = next(r for r in manifest(path)["files"] if r["path"] == "label/c/0")
    (path / "kdcache.json").write_bytes(sealed)
    (path / ".dump").mkdir()
    (path / ".dump/closing.jsonl").write_text(json.dumps(record) + "\n")
    assert "label/c/0" in refused(path, "labels")


# ------------------------------------------------------------------------------------------------------- Zarr: the index


def set_index(file: Path, entries: list[tuple[int, int]]) -> None:
    """Replace the index of a shard of two chunks."""
    data = file.read_bytes()[: -(2 * 16 + 4)]
    index = b"".join(number.to_bytes(8, "little") for entry in entries for number in entry)
    file.write_bytes(data + with_crc(index))


TOP = 2**64
INDEXES: dict[str, Callable[[list[tuple[int, int]], int], list[tuple[int, int]]]] = {
    "overlapping": lambda e, room: [e[0], e[0]],
    "partly-overlapping": lambda e, room: [e[0], (e[1][0] - 1, e[1][1])],
    "swapped": lambda e, room: [e[1], e[0]],
    "beyond": lambda e, room: [e[0], (room, e[1][1])],
    "too-long": lambda e, room: [e[0], (e[1][0], room + 1)],
    "wraps-around": lambda e, room: [e[0], (TOP - 8, 16)],
    "wraps-around-in-length": lambda e, room: [e[0], (16, TOP - 8)],
    "sums-to-zero": lambda e, room: [(2**63, 2**63), (2**63, 2**63)],
    "left-out": lambda e, room: [e[0], (TOP - 1, TOP - 1)],
    "empty-chunk": lambda e, room: [e[0], (e[1][0], 0)],
    "only-a-checksum": lambda e, room: [e[0], (e[1][0], 4)],
    "into-the-index": lambda e, room: [e[0], (room - 4, 12)],
}


@pytest.mark.grid
@pytest.mark.parametrize("layout", ["zarr", *COMPRESSED])
@pytest.mark.parametrize("index", INDEXES)
def test_indexes_that_point_elsewhere(copy: Callable[[str], Path], layout: str, index: str) -> None:
    path = copy(layout)
    file = shard_file(path)
    data = file.read_bytes()
    numbers = np.frombuffer(data[-36:-4], "<u8").reshape(2, 2).tolist()
    set_index(file, INDEXES[index]([tuple(entry) for entry in numbers], len(data) - 36))
    reseal(path)
    refused(path, "read 0", "all 0")


@pytest.mark.parametrize("layout", ["zarr", *COMPRESSED])
def test_what_other_software_is_told_is_not_what_rows_are_read_by(copy: Callable[[str], Path], layout: str) -> None:
    """`zarr.json` may name codecs and shapes that nobody knows: rows are found by the manifest alone."""
    path = copy(layout)
    for file in path.rglob("zarr.json"):
        meta = json.loads(file.read_text())
        meta["codecs"], meta["shape"] = [{"name": "os.system", "configuration": {"cmd": "id"}}], [2**62]
        meta["storage_transformers"] = [{"name": "pickle"}]
        file.write_text(json.dumps(meta))
    reseal(path)
    assert endure(path)["verify full"] is None


# ------------------------------------------------------------------------------------------------------- decompression


def set_chunk(file: Path, encoded: bytes) -> None:
    """Replace the first chunk of a shard of two, with its checksum and the index."""
    data = file.read_bytes()
    (_, _), (start, length) = np.frombuffer(data[-36:-4], "<u8").reshape(2, 2).tolist()
    first, second = with_crc(encoded), data[start : start + length]
    index = np.array([(0, len(first)), (len(first), len(second))], "<u8").tobytes()
    file.write_bytes(first + second + with_crc(index))


def first_chunk(file: Path) -> bytes:
    data = file.read_bytes()
    start, length = np.frombuffer(data[-36:-20], "<u8").tolist()
    return data[start : start + length - 4]


def number(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + value.to_bytes(4, "little") + data[at + 4 :]


def blosc(values: NDArray, **options: Any) -> bytes:
    from numcodecs.blosc import BITSHUFFLE, Blosc

    given: Json = {"cname": "lz4", "clevel": 9, "shuffle": BITSHUFFLE, "typesize": values.itemsize} | options
    encoded: bytes = Blosc(**given).encode(values)
    return encoded


BLOSC: dict[str, Callable[[bytes], bytes]] = {
    "bomb": lambda d: blosc(np.zeros(50_000_000, "u1")),
    "claims-more": lambda d: number(d, 4, 2**31 - 1),
    "claims-less": lambda d: number(d, 4, 1),
    "claims-nothing": lambda d: number(d, 4, 0),
    "stored-more": lambda d: number(d, 12, 2**31 - 1),
    "blocks-of-nothing": lambda d: number(d, 8, 0),
    "huge-blocks": lambda d: number(d, 8, 2**31 - 1),
    "cut": lambda d: number(d[:-1], 12, len(d) - 1),
    "header-only": lambda d: number(d[:16], 12, 16),
    "half-a-header": lambda d: d[:7],
    "nothing": lambda d: b"\0",
    "another-compressor": lambda d: blosc(np.zeros(10, "u1"), cname="zstd"),
    "not-shuffled": lambda d: blosc(np.zeros(10, "u1"), shuffle=0),
    "another-type": lambda d: d[:3] + b"\xff" + d[4:],
    "no-type": lambda d: d[:3] + b"\0" + d[4:],
    "another-version": lambda d: b"\x05" + d[1:],
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("change", BLOSC)
def test_blosc_streams_that_are_made_to_overrun(copy: Callable[[str], Path], change: str) -> None:
    path = copy("zarr:bitshuffle")
    file = shard_file(path)
    set_chunk(file, BLOSC[change](first_chunk(file)))
    reseal(path)
    refused(path, "read 0", "all 0", megabytes=32)


def pco(values: NDArray) -> bytes:
    from numcodecs.pcodec import PCodec

    encoded: bytes = PCodec(level=8, mode_spec="classic", delta_spec="auto").encode(values)
    return encoded


@pytest.mark.parametrize("count", [0, 1, 9, 11, 1 << 20])
def test_pcodec_streams_of_another_length(copy: Callable[[str], Path], count: int) -> None:
    """Too few numbers would leave in the rows what was in memory before, from whatever this process has read."""
    path = copy("zarr:pcodec")
    set_chunk(shard_file(path), pco(np.arange(count, dtype="f4")))
    reseal(path)
    assert "decompressed" in refused(path, "read 0", "all 0", megabytes=32)


@pytest.mark.parametrize("layout", COMPRESSED)
def test_a_compressed_bomb_is_refused_by_its_size(tmp_path: Path, layout: str) -> None:
    """A file of a few hundred kilobytes whose chunks are all sound, and hold gigabytes."""
    path = build(tmp_path / "archive", layout, codec={"name": "i16"})
    classes, rows = 1 << 14, 1 << 17  # 4 GiB in one shard
    names = [str(i) for i in range(classes)]
    options = {"name": "zarr", "compression": layout.partition(":")[2], "inner_rows": 1 << 10}  # 32 MiB in a chunk
    edit_manifest(
        path, lambda m: m.update(class_names=names, num_views=1, num_samples=rows, shard_rows=rows, layout=options, files=[])
    )
    zeros = np.zeros((1 << 10, classes), "<i2")
    chunk = with_crc(pco(zeros) if layout == "zarr:pcodec" else blosc(zeros))
    if layout == "zarr:bitshuffle":
        chunk = chunk[: 1 << 10]  # lz4 alone cannot be so small; what a chunk claims is enough here
    edit_manifest(path, lambda m: m["statistics"].pop("details"))  # which are of another number of classes
    file = shard_file(path)
    index = np.array([(i * len(chunk), len(chunk)) for i in range(128)], "<u8").tobytes()
    file.write_bytes(chunk * 128 + with_crc(index))
    assert file.stat().st_size < 1 << 20
    outcome = endure(path, megabytes=64)
    assert "decompress" in str(outcome["read 0"])
    assert "decompress" in str(outcome["all 0"])
    assert outcome["spread"]


@pytest.mark.parametrize("layout", COMPRESSED)
def test_a_chunk_as_large_as_a_shard_may_be_is_not_allocated(tmp_path: Path, layout: str) -> None:
    path = build(tmp_path / "archive", layout, codec={"name": "i16"})
    edit_manifest(path, lambda m: m.update(num_samples=2**30, shard_rows=2**31 - 1, num_views=1))
    edit_manifest(path, lambda m: m["layout"].update(inner_rows=2**31 - 1))
    file = shard_file(path)
    chunk = with_crc(first_chunk(file))
    file.write_bytes(chunk + with_crc(np.array([0, len(chunk)], "<u8").tobytes()))
    assert "decompress" in refused(path, "read 0", megabytes=32)


# ------------------------------------------------------------------------------------------------------- HDF5: the user block


def edit_user_block(file: Path, change: Callable[[Json], object]) -> None:
    data = file.read_bytes()
    block = json.loads(data[:1024])
    change(block["datasets"])
    file.write_bytes(json.dumps(block).encode()[:1024].ljust(1024) + data[1024:])


BLOCKS: dict[str, Attack] = {
    "negative": lambda d: d["logits"].update(start=-1),
    "in-the-header": lambda d: d["logits"].update(start=0),
    "beyond": lambda d: d["logits"].update(start=2**40),
    "huge": lambda d: d["logits"].update(start=2**64),
    "absurd": lambda d: d["logits"].update(start=10**200),
    "fraction": lambda d: d["logits"].update(start=1e308),
    "not-a-number": lambda d: d["logits"].update(start=float("nan")),
    "infinite": lambda d: d["logits"].update(start=float("inf")),
    "word": lambda d: d["logits"].update(start="here"),
    "list": lambda d: d["logits"].update(start=[0]),
    "no-start": lambda d: d["logits"].pop("start"),
    "objects": lambda d: d["logits"].update(dtype="|O"),
    "wider": lambda d: d["logits"].update(dtype="<f8"),
    "big-endian": lambda d: d["entropy"].update(dtype=">f4"),
    "another-shape": lambda d: d["logits"].update(shape=[4, CLASSES + 1]),
    "negative-shape": lambda d: d["logits"].update(shape=[-4, -CLASSES]),
    "huge-shape": lambda d: d["logits"].update(shape=[2**62, 2**62]),
    "shape-of-words": lambda d: d["logits"].update(shape="wide"),
    "no-shape": lambda d: d["logits"].update(shape=None),
    "no-dataset": lambda d: d.pop("entropy"),
    "no-checksums": lambda d: d.pop("crc32c"),
    "checksums-beyond": lambda d: d["crc32c"].update(start=2**31),
    "overlapping": lambda d: d["entropy"].update(start=d["logits"]["start"]),
    "shifted": lambda d: d["logits"].update(start=d["logits"]["start"] + 1),
    "not-datasets": lambda d: (d.clear(), d.update(logits=7)),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("change", BLOCKS)
def test_user_blocks_that_lie(copy: Callable[[str], Path], change: str) -> None:
    path = copy("hdf5")
    edit_user_block(shard_file(path), BLOCKS[change])
    reseal(path)
    refused(path, megabytes=32)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["label"].update(start=-8),
        lambda d: d["label"].update(shape=[2**61]),
        lambda d: d["key_bytes"].update(shape=[2**62]),
        lambda d: d["key_bytes"].update(shape=[2**63]),
        lambda d: d["key_bytes"].update(shape=[2**64 - 1]),
        lambda d: d["key_bytes"].update(shape=[2**32, 2**32]),
        lambda d: d["key_bytes"].update(shape=[-1]),
        lambda d: d["key_bytes"].update(shape=[]),
        lambda d: d["key_bytes"].update(shape=[1, 1]),
        lambda d: d["key_end"].update(start=d["label"]["start"]),
    ],
)
def test_user_blocks_of_labels_and_keys_that_lie(copy: Callable[[str], Path], change: Attack) -> None:
    path = copy("hdf5")
    edit_user_block(path / "samples.h5", change)
    reseal(path)
    outcome = endure(path)
    assert outcome["labels"] or outcome["keys"]


@pytest.mark.parametrize("ends", [[2**62] * SAMPLES, [-1] * SAMPLES, list(range(SAMPLES))[::-1], [1] * SAMPLES])
def test_keys_of_hdf5_whose_ends_lie(copy: Callable[[str], Path], ends: list[int]) -> None:
    path = copy("hdf5")
    columns = {"key_end": np.array(ends, "<i8"), "key_bytes": np.frombuffer(b"\xff\xfe", "u1")}
    (path / "samples.h5").write_bytes(b"".join(hdf5._file(columns)))
    reseal(path)
    assert isinstance(endure(path)["keys"], IntegrityError)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x07\0\0\0",
        b"\xff\xff\xff\xff" * 12,
        (7).to_bytes(4, "little") + b"\xff\xff\xff\xff",
        b"\x07\0\0\0" + b"\1\0\0\0\xff" * 7,
    ],
    ids=["nothing", "no-lengths", "huge-number", "huge-length", "not-utf8"],
)
def test_keys_of_zarr_whose_lengths_lie(copy: Callable[[str], Path], data: bytes) -> None:
    path = copy("zarr")
    (path / "key/c/0").write_bytes(with_crc(data))
    reseal(path)
    assert isinstance(endure(path)["keys"], IntegrityError)


# ------------------------------------------------------------------------------------------------------- tar

HEADERS: dict[str, Callable[[tarfile.TarInfo], object]] = {
    "hard-link": lambda t: (setattr(t, "type", tarfile.LNKTYPE), setattr(t, "linkname", "/etc/passwd")),
    "link": lambda t: (setattr(t, "type", tarfile.SYMTYPE), setattr(t, "linkname", "../../x")),
    "device": lambda t: setattr(t, "type", tarfile.CHRTYPE),
    "pipe": lambda t: setattr(t, "type", tarfile.FIFOTYPE),
    "folder": lambda t: setattr(t, "type", tarfile.DIRTYPE),
    "sparse": lambda t: setattr(t, "type", tarfile.GNUTYPE_SPARSE),
    "extended": lambda t: setattr(t, "type", tarfile.XHDTYPE),
    "absolute": lambda t: setattr(t, "name", "/etc/cron.d/x"),
    "upwards": lambda t: setattr(t, "name", "../../x"),
    "another-name": lambda t: setattr(t, "name", "x.npy"),
    "pickle": lambda t: setattr(t, "name", t.name.replace(".npy", ".pyd").replace(".json", ".pickle")),
    "long-name": lambda t: setattr(t, "name", "x/" * 60 + t.name),
    "size": lambda t: setattr(t, "size", t.size + 512),
    "huge-size": lambda t: setattr(t, "size", 2**33 - 1),
    "no-size": lambda t: setattr(t, "size", 0),
}


@pytest.mark.grid
@pytest.mark.parametrize("change", HEADERS)
@pytest.mark.parametrize("place", ["shard", "samples"])
def test_tar_headers_that_are_not_those_of_plain_files(copy: Callable[[str], Path], place: str, change: str) -> None:
    path = copy("webdataset")
    file = shard_file(path) if place == "shard" else path / "samples.tar"
    data = file.read_bytes()
    info = tarfile.TarInfo.frombuf(data[:512], "utf-8", "strict")
    HEADERS[change](info)
    file.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + data[512:])
    reseal(path)
    outcome = endure(path)
    if place == "shard":
        assert isinstance(outcome["read 0"], IntegrityError)
        assert "00000-00000-000000" in str(outcome["verify full"])
    else:
        labels = open_archive(path).labels() if outcome["labels"] is None else None
        assert outcome["labels"] or labels is None  # a member of another name is none of ours


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80" + b"\0" * 10 + b"\1", b"7" * 12, b"-0000000001\0", b" " * 12])
def test_sizes_that_tar_cannot_mean(copy: Callable[[str], Path], size: bytes) -> None:
    path = copy("webdataset")
    header = bytearray((path / "samples.tar").read_bytes())
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header[:512]):06o}\0 ".encode()
    (path / "samples.tar").write_bytes(header)
    reseal(path)
    assert any(endure(path)[act] is not None or act == "keys" for act in ("labels", "keys"))


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.exhaustive if name in COMPRESSED else ()) for name in LAYOUT_OPTIONS]
)
def test_nothing_is_ever_unpickled(
    sound: Callable[[str], Path], layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pickles in the place of files, in arrays that claim to hold objects, and lying about under names that tools load."""
    mark = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(mark))
    head = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (7,), }".ljust(117) + b"\n"
    objects = head + pickle.dumps(np.array([Bomb(mark)] * SAMPLES, dtype=object))
    names = {p.relative_to(sound(layout)).as_posix() for p in sound(layout).rglob("*") if p.is_file()}
    chosen = [name for name in sorted(names) if "view-00001" not in name and "/c/1" not in name and not name.endswith(("1", "2"))]
    for number, name in enumerate(chosen):
        path = Path(shutil.copytree(sound(layout), tmp_path / "a" / str(number)))
        (path / name).write_bytes([bomb, objects, with_crc(bomb), with_crc(objects)][number % 4])
        for extra in ("data.pkl", "logits.npy", "conftest.py", "kdcache.pkl", "view-00000.pickle"):
            (path / extra).write_bytes(bomb)
        if name != "kdcache.json" and not name.endswith(".jsonl"):
            reseal(path)
        monkeypatch.chdir(path)
        exercise(path)
    with pytest.raises(ValueError, match="pickle"):
        np.lib.format.read_array(io.BytesIO(objects))  # whoever asked for it would have got it
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists()


@pytest.mark.parametrize("place", ["samples.tar", "shard"])
def test_arrays_of_objects_in_tar_files(copy: Callable[[str], Path], tmp_path: Path, place: str) -> None:
    path, mark = copy("webdataset"), tmp_path / "executed"
    file = path / "samples.tar" if place == "samples.tar" else shard_file(path)
    data = bytearray(file.read_bytes())
    at = data.index(b"'descr': '") + len("'descr': '")
    data[at : at + 3] = b"|O'"
    payload = pickle.dumps(Bomb(mark))
    data[640 : 640 + len(payload)] = payload
    file.write_bytes(data)
    reseal(path)
    assert isinstance(endure(path)["labels" if place == "samples.tar" else "read 0"], IntegrityError)
    assert not mark.exists()


# ------------------------------------------------------------------------------------------------------- elsewhere

SERVED: dict[str, tuple[Attack, list[str]]] = {
    "table-upwards": (lambda p: edit_table(p, lambda t: t[0]["files"][0].update(path="../../secret")), ["verify full"]),
    "table-of-others": (lambda p: edit_table(p, lambda t: t[0].update(files=t[1]["files"])), ["verify full", "read 0"]),
    "files-upwards": (lambda p: edit_manifest(p, lambda m: m["files"][0].update(path="/etc/passwd")), ["verify full", "labels"]),
    "unrecorded": (lambda p: edit_manifest(p, lambda m: m.update(files=m["files"][:1])), ["labels", "keys"]),
    "many-views": (lambda p: edit_manifest(p, lambda m: (m.update(num_views=MOST), m["shards"].update(bytes=1 << 30))), ["open"]),
    "large": (lambda p: edit_table(p, lambda t: t[0]["files"][0].update(bytes=2**62)), ["verify full", "read 0"]),
    "small": (lambda p: edit_table(p, lambda t: t[0]["files"][0].update(bytes=1)), ["verify full", "read 0"]),
    "cut": (lambda p: os.truncate(shard_file(p), 1100), ["verify full", "read 0"]),
    "long-table": (lambda p: seal_table(p, b"{}\n" * 100_000), ["size", "read 0", "verify full"]),
    "gone": (lambda p: shard_file(p).unlink(), ["verify full", "verify quick", "read 0"]),
}


@pytest.mark.parametrize("attack", SERVED)
def test_a_server_of_strangers_is_trusted_no_more_than_a_folder(
    copy: Callable[[str], Path], attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCACHE_CACHE", str(tmp_path / "cache"))
    path = copy("hdf5")
    (tmp_path / "secret").write_text("private")
    alter, acts = SERVED[attack]
    alter(path)
    with FaultyServer(tmp_path) as server:
        outcome = exercise(f"{server.url}/archive")
        asked = {request.path.lstrip("/") for request in server.requests}
    for act in acts if "open" not in outcome else ["open"]:
        assert outcome[act] is not None, f"{act} notices nothing"
    assert all(name.startswith("archive/") for name in asked), asked
    kept = [file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert b"private" not in kept


SECRETS = ["shard", "card", "signature", "labels", "table"]


@pytest.mark.parametrize("place", SECRETS)
def test_what_is_shared_is_what_is_recorded(copy: Callable[[str], Path], place: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A link to something private in the archive of a stranger does not carry it away when the archive is passed on."""
    path = copy("hdf5")
    edit_manifest(path, lambda m: m.update(licences={"data": "mit", "weights": "mit"}))  # nothing is to be changed for a push
    plain = {"signature": "kdcache.sig", "card": "README.md"}
    file = path / plain[place] if place in plain else file_at(path, place)
    secret = path.parent / "id_ed25519"
    secret.write_bytes(b"private ".ljust(file.stat().st_size if file.exists() else 100, b"!"))
    file.unlink(missing_ok=True)
    file.symlink_to(secret)
    target = path.parent / "shared"
    assert run(["push", str(path), str(target)]) == IntegrityError.exit_code
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()[-3:]] == ["error", "why", "fix"]
    assert not any(b"private" in found.read_bytes() for found in target.rglob("*") if found.is_file())


# ------------------------------------------------------------------------------------------------------- words for people


def test_words_of_strangers_do_not_steer_a_terminal(copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = copy("hdf5")
    words = "\x1b[2J\x1b]0;owned\x07\u202e[red]x[/nothing]\r\nerror: all is well"
    edit_manifest(path, lambda m: m.update(provenance={"command": words, words: words}, optional={words: words}))
    edit_manifest(path, lambda m: m.update(teacher={**TEACHER, "alias": words, "name": words}))
    for command in (
        ["info", str(path)],
        ["info", "--json", str(path)],
        ["verify", str(path)],
        ["ls", "--home", str(path.parent)],
    ):
        run(command)
        printed = "".join(capsys.readouterr())
        assert not set(printed) & {"\x1b", "\x07", "\r", "\u202e"}
        assert "\nerror: all is well" not in printed


TEACHER: Json = {
    "alias": "t",
    "name": "t",
    "weights_sha256": "ab" * 32,
    "input_size": 16,
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "precision": "fp32",
    "batch_size": 4,
}


@pytest.mark.parametrize(
    "reader", ["1'; touch owned #", "$(touch owned)", "`id`", "2.0' -r http://x/evil.txt '", 7, None, "1.0\n2", "x" * 99]
)
def test_the_version_to_install_is_a_version(copy: Callable[[str], Path], reader: Any) -> None:
    path = copy("hdf5")
    edit_manifest(path, lambda m: m.update(format_version=2, readable_by=reader))
    with pytest.raises(IncompatibleError) as caught:
        open_archive(path)
    assert caught.value.fix in {"pip install --upgrade 'kdcache'", "pip install --upgrade 'kdcache>=7'"}


def test_a_damaged_archive_hides_no_other(copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = copy("hdf5")
    home = path.parent / "home"
    for name, text in {"broken": b"{", "newer": b'{"format": "kdcache", "format_version": 9}', "deep": DEEP}.items():
        (home / "archives" / name).mkdir(parents=True)
        (home / "archives" / name / "kdcache.json").write_bytes(text)
    shutil.move(path, home / "archives" / "sound")
    os.mkfifo(home / "archives" / "pipe")
    assert run(["ls", "--json", "--home", str(home)]) == 0
    states = {Path(row["archive"]).name: row["state"] for row in json.loads(capsys.readouterr().out)}
    assert states == {"broken": "damaged", "newer": "incompatible", "deep": "damaged", "sound": "complete"}


@pytest.mark.parametrize("command", ["info", "verify", "verify --quick", "convert"])
def test_commands_say_it_in_three_lines(copy: Callable[[str], Path], command: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy("webdataset")
    edit_table(path, lambda t: (t[0]["files"][0].update(path="\x1b/../x"), t[1].update(view=9), t.pop()))
    if command == "info":
        edit_manifest(path, lambda m: m.update(num_samples=0))
    commands_fail(path, capsys, command)


def test_damage_is_reported_with_the_shard_what_was_expected_and_what_is_there(copy: Callable[[str], Path]) -> None:
    path = copy("hdf5")
    file = shard_file(path)
    data = bytearray(file.read_bytes())
    data[1500] ^= 1
    file.write_bytes(data)
    recorded = table(path)[0]["files"][0]
    [failure] = open_archive(path).verify("full").failures
    assert failure.where == recorded["path"] == "view-00000/shard-00000.h5"
    assert recorded["sha256"][:12] in failure.expected
    assert failure.got != failure.expected
    edit_table(path, lambda t: t[0].update(rows_digest="0" * 64))
    shutil.copymode(file, file)
    reseal_files_only(path)
    failures = {f.where: f for f in open_archive(path).verify("full").failures}
    assert (
        failures["view 0 block 0"].expected == "rows digest 000000000000..." or "readable" in failures["view 0 block 0"].expected
    )


def reseal_files_only(path: Path) -> None:
    def measure(shards: list[Json]) -> None:
        for record in (file for shard in shards for file in shard["files"]):
            data = (path / record["path"]).read_bytes()
            record.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    edit_table(path, measure)


# ------------------------------------------------------------------------------------------------------- at random

json_values = st.one_of(
    st.sampled_from(VALUES),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.recursive(
        st.none() | st.booleans(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner)
    ),
)


def places(tree: Any) -> list[tuple[Any, Any]]:
    found = []
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        found += [(tree, key), *places(value)]
    return found


@pytest.mark.exhaustive
@pytest.mark.parametrize("place", ["manifest", "table", "user block"])
@settings(max_examples=20)
@given(data=st.data())
def test_any_other_value_anywhere_in_json(sound: Callable[[str], Path], tmp_path: Path, place: str, data: st.DataObject) -> None:
    path = tmp_path / "archive"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(sound("hdf5"), path)

    def change(tree: Any) -> None:
        container, key = data.draw(st.sampled_from(places(tree)))
        container[key] = data.draw(json_values)

    if place == "manifest":
        edit_manifest(path, change)
    elif place == "table":
        edit_table(path, change)
    else:
        edit_user_block(shard_file(path), change)
        reseal_files_only(path)
    exercise(path)


@pytest.mark.parametrize("count", [20, pytest.param(100, marks=pytest.mark.exhaustive)])
def test_hundreds_of_random_changes_end_in_errors_of_ours(count: int) -> None:
    """The same as `python -m tests.fuzz`, for a moment; in a process of its own, which nothing may kill."""
    cases, slowest, findings = fuzz(first=0, count=count, seconds=100)
    assert findings == []
    assert cases == count
    assert slowest < 10
