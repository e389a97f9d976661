"""Archives that are damaged, unfinished or of other things: when the fix of the error was followed, they are read or written."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.archive import Archive, ArchiveWriter, derive, open_archive, write_archive
from kdcache.archive.layouts import LAYOUTS
from kdcache.archive.reading.ensemble import Ensemble
from kdcache.cli import run
from tests.archives import KEYS, LABELS, NAMES, finish, logits, write_shard, writer
from tests.following import followed, typed


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "a"
    finish(writer(folder, layout="zarr"))
    return folder


@pytest.fixture
def copy(whole: Path) -> Path:
    shutil.copytree(whole, "a")
    return Path("a")


def read(path: Any) -> Archive:
    archive = open_archive(path)
    for view in archive.views:
        assert archive.find(view, np.arange(archive.num_samples)).logits.size
    archive.labels()
    archive.keys()
    return archive


def restored(whole: Path) -> Callable[[str], Any]:
    """Do as most fixes of damage say: put back the copy that one has, or get the archive again."""

    def mend(fix: str) -> str:
        assert re.search(r"restore|from a copy|get (it|the archive) again|names the damage", fix), fix
        shutil.rmtree("a")
        shutil.copytree(whole, "a")
        return "a"

    return mend


QUOTES = "'"


def flipped(file: Path, at: float = 0.5) -> None:
    data = bytearray(file.read_bytes())
    data[int(len(data) * at)] ^= 0x55
    file.write_bytes(data)


def manifest(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        stored = json.loads((folder / "kdcache.json").read_text())
        for name, value in changes.items():
            stored.pop(name, None) if value is None else stored.update({name: value})
        (folder / "kdcache.json").write_text(json.dumps(stored))

    return change


def table(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (file,) = folder.glob("shards-*.jsonl")
        file.write_text("".join(change(file.read_text().splitlines(keepends=True))))

    return damage


def of(pattern: str, do: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for file in sorted(file for file in folder.rglob(pattern) if file.is_file())[:4]:
            do(file)

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a manifest that was cut": of("kdcache.json", lambda file: file.write_bytes(file.read_bytes()[:900])),
    "a changed name": manifest(class_names=["class 0", "class 1", "class 2", "x"]),
    "a field of nonsense": manifest(num_samples="many"),
    "no seal": manifest(manifest_sha256=None),
    "a changed table": table(lambda lines: [line.replace('"view":0', '"view":1') for line in lines]),
    "a table that was cut": table(lambda lines: lines[:-1]),
    "a shard that was changed": of("logits/c/**/*", flipped),
    "a shard that is missing": of("logits/c/**/*", Path.unlink),
    "a shard that is a folder": of("logits/c/**/*", lambda file: (file.unlink(), file.mkdir())),
    "changed labels": of("*label*/**/*", flipped),
    "a link in a shard's place": of("logits/c/**/*", lambda file: (file.unlink(), file.symlink_to(file.parent))),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_what_is_damaged_is_read_when_it_was_restored(case: str, copy: Path, whole: Path) -> None:
    DAMAGES[case](copy)
    assert followed(read, "a", restored(whole)).verify().ok


@pytest.mark.parametrize("level", ["quick", "full"])
@pytest.mark.parametrize("pattern", ["README.md", "logits/c/**/*"])
def test_what_verify_finds_is_restored_or_recorded(copy: Path, whole: Path, pattern: str, level: str) -> None:
    of(pattern, lambda file: file.write_bytes(file.read_bytes() + b"x"))(copy)

    def mend(fix: str) -> str:
        if pattern == "README.md":
            assert "kdcache push records them anew" in fix
            assert run(["push", "a", "pushed", "--license", "data=mit,weights=mit"]) == 0
            return "pushed"
        assert "restore the named files from a copy" in fix
        return str(restored(whole)(fix))

    def verified(path: str) -> None:
        open_archive(path).verify(level).raise_if_failed()  # type: ignore[arg-type]

    followed(verified, "a", mend)


def test_exchanged_shards_are_given_their_places_again(copy: Path, whole: Path) -> None:
    files = sorted(file for file in copy.glob("logits/c/**/*") if file.is_file())
    first, last = files[0], files[-1]
    first.rename("kept")
    last.rename(first)
    Path("kept").rename(last)

    def mend(fix: str) -> str:
        assert "give both their places again" in fix or "restore" in fix, fix
        Path(first).rename("kept")
        last.rename(first)
        Path("kept").rename(last)
        return "a"

    assert followed(read, "a", mend).verify().ok


# ---------------------------------------------------------------- what is not there, or not finished


def test_an_archive_that_is_not_there_is_in_the_list(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole, "home/archives/mine")

    def mend(fix: str) -> str:
        capsys.readouterr()
        assert run([*shlex.split(fix.partition("with: ")[2])[1:], "--home", "home"]) == 0
        assert "mine" in capsys.readouterr().out
        return "home/archives/mine"

    for wrong in ("home/archives/yours", "home/archives"):
        assert followed(read, wrong, mend).verify().ok


def begun(*, shards: int) -> ArchiveWriter:
    started = writer(Path("a"))
    for view, block in started.missing()[:shards]:
        write_shard(started, view, block)
    return started


def test_an_unfinished_archive_is_finished_by_the_command_of_the_fix() -> None:
    begun(shards=2)

    def mend(fix: str) -> str:
        assert fix == "kdcache dump-teacher --teacher t", "the command that is recorded"
        finish(writer(Path("a")))  # which is what that command does
        return "a"

    assert followed(read, "a", mend).verify().ok


def test_an_archive_that_lacks_shards_is_finalized_after_the_command_of_the_fix() -> None:
    started = begun(shards=2)

    def mend(fix: str) -> str:
        assert fix == "kdcache dump-teacher --teacher t"
        for view, block in started.missing():
            write_shard(started, view, block)
        return "a"

    assert followed(lambda path: ArchiveWriter.resume(path).finalize(), "a", mend).verify().ok


def test_a_copy_without_its_manifest_is_finished(copy: Path, whole: Path) -> None:
    (copy / "kdcache.json").unlink()

    def mend(fix: str) -> str:
        assert fix.startswith("finish the copy")
        shutil.copy(whole / "kdcache.json", "a")
        return "a"

    assert followed(read, "a", mend).verify().ok


def test_what_is_to_be_resumed_is_in_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    begun(shards=2)
    shutil.move("a", "home/archives/mine")

    def mend(fix: str) -> str:
        assert run([*shlex.split(fix.partition("with: ")[2])[1:], "--home", "home"]) == 0
        assert "mine" in "".join(capsys.readouterr())
        return "home/archives/mine"

    assert followed(ArchiveWriter.resume, "home/archives/yours", mend).missing()


@pytest.mark.parametrize("name", ["plan.json", "samples.json"])
def test_damaged_records_of_a_dump_are_set_aside_by_the_command_of_the_fix(name: str) -> None:
    begun(shards=2)
    (file,) = Path("a").rglob(name)
    file.write_bytes(file.read_bytes()[:20])

    def mend(fix: str) -> dict[str, Any]:
        found = re.search(r"mv \S+ \S+\.aside", fix)
        assert found
        typed(found[0], "mv")
        assert list(Path().rglob("*.aside"))
        return {}

    assert finish(followed(lambda options: writer(Path("a"), **options), {}, mend)).verify().ok


OTHERS: dict[str, dict[str, Any]] = {
    "classes": {"class_names": [*NAMES[:3], "x"]},
    "labels": {"labels": (LABELS + 1) % 4},
    "keys": {"keys": [*KEYS[:-1], "x"]},
    "a codec": {"codec": "f32"},
}


@pytest.mark.parametrize("way", ["another folder", "set aside"])
@pytest.mark.parametrize("case", OTHERS)
def test_another_dump_goes_to_another_folder(case: str, way: str) -> None:
    finish(writer(Path("a")))

    def mend(fix: str) -> str:
        assert fix.startswith("write to another folder")
        if way == "another folder":
            return "b"
        typed(fix, "mv")
        return "a"

    assert finish(followed(lambda path: writer(Path(path), **OTHERS[case]), "a", mend)).verify().ok
    assert open_archive("a" if way == "another folder" else "a.aside").verify().ok


def shard(given: dict[str, Any]) -> Path:
    to = writer(Path("a"))
    place = {"view": 0, "block": 0} | given
    rows = np.array(to.positions(place["block"]))
    values = place.pop("logits", None)
    to.write(logits=logits(0)[rows] if values is None else values, **place)
    return Path("a")


SHARDS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "too few rows": ({"logits": logits(0)[:3]}, "one row per position of writer.positions(block)", {"logits": logits(0)[:8]}),
    "no such view": ({"view": 7}, "write whole shards", {"view": 1}),
    "a sample twice": ({"sample": np.zeros(8, int)}, "which sample sits at each position", {"sample": np.arange(8)}),
    "not finite": ({"logits": logits(0)[:8] * np.nan}, "another teacher checkpoint", {"logits": logits(0)[:8]}),
}


@pytest.mark.parametrize("case", SHARDS)
def test_shards_are_written_of_what_the_fix_asks_for(case: str) -> None:
    wrong, says, right = SHARDS[case]

    def mend(fix: str) -> dict[str, Any]:
        assert says in fix, fix
        return right

    followed(shard, wrong, mend)


def test_views_that_lack_a_sample_are_written_again() -> None:
    def written(given: tuple[str, str]) -> Archive:
        folder, order = given
        to = writer(Path(folder), num_views=1)
        for view, block in to.missing():
            rows = np.array(to.positions(block))
            to.write(view, block, logits(view)[rows], sample=rows if order == "whole" else np.arange(len(rows)))
        return to.finalize()

    def mend(fix: str) -> tuple[str, str]:
        assert fix.startswith("write to another folder, and pass which sample sits at each position")
        return "b", "whole"

    assert followed(written, ("a", "twice"), mend).verify().ok


# ---------------------------------------------------------------- layouts, parts, several archives

LAYOUT_SPECS: dict[str, tuple[Callable[[Any], Any], Any, Callable[[str], Any]]] = {
    "a compression": (LAYOUTS.parse, "zarr:lz4", lambda fix: f"zarr:{fix.partition('use ')[2].partition(',')[0].strip(QUOTES)}"),
    "a compression of one's own": (
        lambda given: LAYOUTS["zarr"](compression=given),  # type: ignore[call-arg]
        "lz4",
        lambda fix: fix.partition("--layout zarr:")[2],
    ),
    "no chunks": (
        lambda given: LAYOUTS["zarr"](inner_rows=given),  # type: ignore[call-arg]
        -1,
        lambda fix: int(fix.rpartition(" ")[2]),
    ),
    "records of none": (LAYOUTS.parse, "webdataset:0", lambda fix: fix.partition("--layout ")[2].partition(",")[0]),
    "of each row": (LAYOUTS.parse, "webdataset:0", lambda fix: fix.partition("or ")[2].split()[0]),
    "no layout": (LAYOUTS.parse, "zaar", lambda fix: fix.partition("use ")[2].strip(QUOTES)),
}


@pytest.mark.parametrize("case", LAYOUT_SPECS)
def test_layouts_are_understood_as_the_fix_writes_them(case: str) -> None:
    attempt, wrong, mend = LAYOUT_SPECS[case]
    assert followed(attempt, wrong, mend)


def test_pcodec_with_bytes_is_exchanged() -> None:
    def written(layout: str) -> Archive:
        return write_archive("p", logits(0)[None], NAMES, codec="u8", layout=layout)

    assert followed(written, "zarr:pcodec", lambda fix: fix.partition("--layout ")[2]).verify().ok


def derived(given: dict[str, Any]) -> Archive:
    given = {"source": "a", "path": "b"} | given
    return derive(open_archive(given.pop("source")), given.pop("path"), **given)


def test_parts_of_archives_are_made_as_the_fix_says(copy: Path) -> None:
    def views(fix: str) -> dict[str, Any]:
        first, _, stop = fix.partition("--views ")[2].partition(":")
        return {"views": range(int(first), int(stop))}

    assert followed(derived, {"views": range(1, 7)}, views).verify().ok
    assert followed(derived, {"path": "a"}, lambda fix: {"path": "c"} if fix == "name another folder" else {}).verify().ok

    def aside(fix: str) -> dict[str, Any]:
        typed(fix, "mv")
        return {"path": "b", "views": range(0, 1)}

    followed(derived, {"path": "b", "views": range(0, 1)}, aside)
    derived({"path": "s", "contents": "statistics"})

    def whole_one(fix: str) -> dict[str, Any]:
        assert fix == "take the part from the archive itself"
        return {"path": "d", "codec": "f32"}

    followed(derived, {"source": "s", "path": "d", "codec": "f32"}, whole_one)


def test_statistics_have_no_logits(copy: Path) -> None:
    derived({"path": "s", "contents": "statistics"})

    def mend(fix: str) -> str:
        command = fix.partition("kdcache ")[2].replace("SOURCE", "a pulled").replace("0:10", "0:1")
        assert run(shlex.split(command)) == 0
        return "pulled"

    assert followed(read, "s", mend).verify().ok


def averaged(paths: tuple[str, ...]) -> Ensemble:
    together = Ensemble([open_archive(path) for path in paths])
    together.take(together.views.start, np.arange(together.num_samples))
    return together


def test_archives_that_do_not_go_together_are_exchanged() -> None:
    def made(name: str, seed: int, **changes: Any) -> None:
        to = writer(Path(name), **changes)
        for view, block in to.missing():
            rows = np.array(to.positions(block))
            to.write(
                view, block, logits(view + seed)[rows], digest=rows.astype(np.uint64), probe=np.zeros((len(rows), 16), np.uint8)
            )
        to.finalize()

    made("a", 0)
    made("b", 10)
    made("c", 20, first_view=2)
    made("d", 30, class_names=[*NAMES[:3], "x"])
    shutil.copytree("a", "e")
    cases = [
        (("a", "e"), "name either of them once, or another teacher's archive"),
        (("a", "c"), "dump the same views with each teacher"),
        (("a", "d"), "dump each teacher with the same --dataset"),
    ]
    for wrong, says in cases:

        def mend(fix: str, says: str = says) -> tuple[str, ...]:
            assert says in fix, fix
            return ("a", "b")

        assert followed(averaged, wrong, mend)


def test_a_newer_format_says_how_to_upgrade(copy: Path, whole: Path) -> None:
    manifest(format_version=99)(copy)

    def mend(fix: str) -> str:
        assert re.fullmatch(r"pip install --upgrade 'kdcache.*'", fix), fix
        shutil.rmtree("a")
        shutil.copytree(whole, "a")
        return "a"

    followed(read, "a", mend)
