"""Protects the meaning of rows: those of another view, block, teacher or archive are refused, however sound their bytes are."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.archive import Archive, ArchiveWriter, derive, open_archive, write_archive
from kdcache.archive.format.manifest import SEAL, load_manifest
from kdcache.archive.format.store import LocalStore
from kdcache.archive.reading import binding
from kdcache.archive.reading.cache import CachedStore
from kdcache.cli import run
from kdcache.errors import IntegrityError, KdcacheError, UsageError
from kdcache.sharing.push_pull import pull, push
from tests.golden.make import ARCHIVE as GOLDEN
from tests.hostile import LAYOUT_OPTIONS, SAMPLES, build, edit_manifest, edit_table, make_older
from tests.servers import FaultyServer

FIELDS = ("logits", "argmax", "sample", "entropy", "entropy_rest", "digest", "probe")


@pytest.fixture(scope="module", params=LAYOUT_OPTIONS)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """An archive in each layout, with views whose samples are in different orders. Not to be changed."""
    return open_archive(_mixed(build(tmp_path_factory.mktemp("sound") / "a", request.param), 1))


def _mixed(path: Path, seed: int) -> Path:
    """The archive at `path` with other numbers in every field, in its place."""
    archive = open_archive(path)
    rng = np.random.default_rng(seed)
    plan = archive.manifest
    writer = ArchiveWriter.of_plan(path.with_name(f"{path.name}-{seed}"), _plan(archive), archive.labels(), archive.keys())
    for view in plan.views:
        order = np.roll(np.arange(SAMPLES), view + seed)
        for block in range(plan.num_blocks):
            rows = np.array(writer.positions(block))
            digest = rng.integers(0, 2**32, len(rows), dtype=np.uint32)
            probe = rng.integers(0, 256, (len(rows), 16), dtype=np.uint8)
            logits = rng.normal(0, 2, (len(rows), plan.num_classes)).astype(np.float32)
            logits[np.arange(len(rows)), (rows + view + seed) % plan.num_classes] = 7 - view  # another argmax in every view
            writer.write(view, block, logits, order[rows], digest, probe)
    return writer.finalize().path


def _plan(archive: Archive) -> Any:
    from kdcache.archive import ArchivePlan

    return ArchivePlan.model_validate({name: getattr(archive.manifest, name) for name in ArchivePlan.model_fields})


@pytest.fixture
def copy(sound: Archive, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound.path, tmp_path / "copy"))


@pytest.fixture
def in_zarr(tmp_path: Path) -> Archive:
    """An archive whose fields have files of their own."""
    return open_archive(_mixed(build(tmp_path / "b", "zarr"), 1))


def read(archive: Archive, field: str, view: int, position: int) -> None:
    """Read a field at one position, and nothing else."""
    getattr(archive.take(view, np.array([position])), field)


def file_of(archive: Archive, field: str, view: int, block: int) -> str:
    names = archive.reader.files(view, block)
    return next((name for name in names if name.startswith(f"{field}/")), names[0])


def exchange(path: Path, one: str, other: str) -> None:
    aside = path / "aside"
    shutil.move(path / one, aside)
    shutil.move(path / other, path / one)
    shutil.move(aside, path / other)


def test_an_exchanged_file_is_named_with_its_right_place(sound: Archive, copy: Path) -> None:
    for field in FIELDS:
        here, there = (file_of(sound, field, view, 1) for view in (0, 1))
        exchange(copy, here, there)
        for view, wrong, right in ((0, here, there), (1, there, here)):
            with pytest.raises(IntegrityError) as caught:
                read(open_archive(copy), field, view, 6)
            assert wrong in caught.value.what
            if sound.manifest.layout["name"] != "webdataset":  # its own headers tell already
                assert right in caught.value.why
                assert f"view {1 - view}, block 1" in caught.value.why
        assert {failure.where for failure in open_archive(copy).verify("quick").failures} == {here, there}
        read(open_archive(copy), field, 0, 3)  # the other shards are as they were
        exchange(copy, here, there)
    assert open_archive(copy).verify("quick").ok


def test_another_teachers_file_is_refused_at_the_first_read(
    sound: Archive, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = open_archive(_mixed(Path(shutil.copytree(sound.path, tmp_path / "other")), 2))
    for field in FIELDS:
        name = file_of(sound, field, 1, 0)
        shutil.copy(other.path / name, copy / name)
        with pytest.raises(IntegrityError, match="of no shard of this archive") as caught:
            read(open_archive(copy), field, 1, 3)
        assert name in caught.value.what
        shutil.copy(sound.path / name, copy / name)
    shutil.copy(other.path / name, copy / name)
    for rows in (open_archive(copy).read(1, 0, 2), open_archive(copy).take(1, np.array([3, 0]))):
        with pytest.raises(IntegrityError, match="of no shard of this archive"):
            rows.load()
    assert run(["verify", "--quick", str(copy)]) == IntegrityError.exit_code
    assert name in capsys.readouterr().err
    with pytest.raises(IntegrityError):
        derive(open_archive(copy), tmp_path / "made", layout="hdf5")


def test_a_file_that_is_exchanged_later_is_noticed_when_it_is_opened_anew(
    in_zarr: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many shards there are, only so many stay open."""
    monkeypatch.setattr(binding, "OPEN", 2)
    archive = open_archive(in_zarr.path)
    read(archive, "logits", 0, 3)
    exchange(archive.path, file_of(archive, "logits", 0, 0), file_of(archive, "logits", 1, 0))
    for block in (0, 1):
        archive.reader.gather("probe", 1, block, slice(0, 1))
    with pytest.raises(IntegrityError, match="does not hold the logits"):
        read(archive, "logits", 0, 3)


def test_what_is_derived_or_appended_or_sent_records_whose_rows_it_holds(sound: Archive, tmp_path: Path) -> None:
    def covered(archive: Archive) -> bool:
        return all(set(shard.checksums or ()) >= set(FIELDS[1:]) for shard in archive.shards())

    assert covered(sound)
    here = tmp_path / "www"
    push(sound, str(here), licences=sound.manifest.licences or _terms())
    made = [
        open_archive(here),
        pull(open_archive(here), tmp_path / "pulled"),
        pull(open_archive(here), tmp_path / "views", views=range(1, 2)),
        pull(open_archive(here), tmp_path / "less", contents="statistics"),
        derive(sound, tmp_path / "hdf5", layout="hdf5"),
        derive(sound, tmp_path / "f32", codec="f32"),
        derive(derive(open_archive(GOLDEN), tmp_path / "new", layout="zarr:bitshuffle"), tmp_path / "newer", layout="zarr"),
    ]
    for archive in made:
        assert covered(archive), archive
        assert archive.manifest.manifest_sha256
        assert archive.verify("quick").ok


def _terms() -> Any:
    from kdcache.archive import Licences

    return Licences(data="mit", weights="mit")


def test_views_are_appended_to_an_older_archive(sound: Archive, copy: Path) -> None:
    make_older(copy)
    plan = _plan(open_archive(copy)).model_copy(update={"num_views": 3})
    writer = ArchiveWriter.of_plan(copy, plan, sound.labels(), sound.keys())
    for view, block in writer.missing():
        writer.write(view, block, np.eye(plan.block_rows(block), 5, dtype=np.float32))
    grown = writer.finalize()
    assert [shard.checksums is None for shard in grown.shards()] == [True] * 4 + [False] * 2
    assert grown.verify("quick").ok
    assert grown.verify("full").ok
    exchange(copy, file_of(sound, "logits", 1, 0), file_of(grown, "logits", 2, 0))
    with pytest.raises(IntegrityError):
        _ = open_archive(copy).read(2, 0, 4).logits


def test_an_archive_is_not_finished_with_files_in_other_places(in_zarr: Archive, tmp_path: Path) -> None:
    plan = _plan(in_zarr)
    writer = ArchiveWriter.of_plan(tmp_path / "new", plan, None, None)

    def write() -> None:
        for view, block in writer.missing():
            rng = np.random.default_rng(10 * view + block)
            writer.write(view, block, rng.normal(0, 2, (plan.block_rows(block), 5)).astype(np.float32))

    write()
    exchange(tmp_path / "new", file_of(in_zarr, "logits", 0, 0), file_of(in_zarr, "logits", 1, 0))
    with pytest.raises(IntegrityError, match=r"those of view 1, block 0") as caught:
        writer.finalize()
    asides, _, repeated = caught.value.fix.partition(": ")[2].partition("; ")
    assert repeated.startswith("kdcache dump-teacher --teacher t")
    subprocess.run(asides, shell=True, check=True)
    writer = ArchiveWriter.resume(tmp_path / "new")
    write()
    assert writer.finalize().verify("full").ok


def test_a_cached_file_that_is_exchanged_after_its_check_is_fetched_again(
    sound: Archive, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCACHE_CACHE", str(tmp_path / "cache"))
    with FaultyServer(copy.parent) as server:
        archive = open_archive(f"{server.url}/{copy.name}")
        assert isinstance(archive.store, CachedStore)
        for view in (0, 1):
            archive.fetch(view)
        one, other = (archive.store.local(file_of(archive, "logits", view, 0)) for view in (0, 1))
        aside = one.read_bytes()
        one.write_bytes(other.read_bytes()[: len(aside)].ljust(len(aside)))
        here, there = (each.take(0, np.array([3])).logits for each in (archive, sound))
        np.testing.assert_array_equal(here, there)


def test_what_is_no_file_in_the_cache_is_named_and_a_longer_beginning_is_fetched_anew(
    sound: Archive, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCACHE_CACHE", str(tmp_path / "cache"))
    with FaultyServer(copy.parent) as server:
        url = f"{server.url}/{copy.name}"
        archive = open_archive(url)
        archive.fetch(0)
        entry = archive.store.local(file_of(archive, "logits", 0, 0))
        data = entry.read_bytes()
        entry.unlink()
        entry.with_name(f"{entry.name}.part").write_bytes(data + b"more")
        np.testing.assert_array_equal(open_archive(url).read(0, 0, 7).logits, sound.read(0, 0, 7).logits)
        entry.unlink()
        entry.mkdir()
        with pytest.raises(UsageError, match="is a folder"):
            open_archive(url).read(0, 0, 7).load()
        shutil.rmtree(entry.parent)
        entry.parent.write_bytes(b"")
        with pytest.raises(UsageError, match="is no folder") as caught:
            open_archive(url).read(0, 0, 7).load()
        subprocess.run(caught.value.fix.partition(": ")[2].partition("; ")[0], shell=True, check=True)
        np.testing.assert_array_equal(open_archive(url).read(0, 0, 7).logits, sound.read(0, 0, 7).logits)


def test_plain_zarr_reads_a_lost_shard_as_nothing_that_is_stored(in_zarr: Archive, tmp_path: Path) -> None:
    """It does so without an error, and zeros would be believed."""
    import zarr

    labelled = write_archive(
        tmp_path / "l", np.full((2, 6, 3), 1.5, np.float32), ["a", "b", "c"], labels=np.ones(6, np.int64), codec="u8"
    )
    for path, impossible in ((in_zarr.path, {"logits": -(2**15)}), (labelled.path, {"scale": np.nan, "offset": np.nan})):
        archive = open_archive(path)
        expected = {"argmax": -(2**31), "sample": -(2**31), "entropy": np.nan, "entropy_rest": np.nan, **impossible}
        for name in expected:
            (path / file_of(archive, name, 1, 0)).unlink()
        group = zarr.open_group(str(path), mode="r")
        for name, value in expected.items():
            np.testing.assert_array_equal(group[name][1, :4], np.full_like(group[name][1, :4], value))
            assert np.isfinite(group[name][0]).all()
        (path / "label/c/0").unlink()
        assert (zarr.open_group(str(path), mode="r")["label"][:] == -1).all()


# ---------------------------------------------------------------------------------------------- older archives


def test_an_older_archive_is_refused_where_its_logits_are_not_those_of_its_argmax_and_entropy(in_zarr: Archive) -> None:
    path = in_zarr.path
    make_older(path)
    assert open_archive(path).verify("quick").ok
    for view in (0, 1):
        open_archive(path).read(view, 0, SAMPLES).load()
    for field in ("logits", "argmax", "entropy"):
        here, there = (file_of(in_zarr, field, view, 0) for view in (0, 1))
        exchange(path, here, there)
        for name in ("logits", field):
            with pytest.raises(IntegrityError, match="not its logits'"):
                read(open_archive(path), name, 1, 0)
        assert not open_archive(path).verify("quick").ok
        read(open_archive(path), "logits", 1, 5)
        exchange(path, here, there)


def test_older_archives_of_any_codec_are_read(tmp_path: Path) -> None:
    """What a codec changed of a row is no sign of another row; nor is what two codecs changed one after the other."""
    rng = np.random.default_rng(7)
    logits = rng.normal(0, 8, (1, 200, 12)).astype(np.float32)
    logits[0, ::3] = np.round(logits[0, ::3])  # ties
    logits[0, 1::3] *= 0.001
    for codec in ("i16", "f16", "f32", "u8"):
        path = write_archive(tmp_path / codec, logits, [f"{i}" for i in range(12)], codec=codec).path
        made = derive(open_archive(path), tmp_path / f"{codec}-f32", codec="f32").path
        for each in {path, made}:
            make_older(each)
            _ = open_archive(each).read(0, 0, 200).logits
            assert open_archive(each).verify("full").ok


# ---------------------------------------------------------------------------------------------- the manifest


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in _leaves(item, (*path, key))]
    if isinstance(value, list) and value:
        return [leaf for number, item in enumerate(value[:3]) for leaf in _leaves(item, (*path, number))]
    return [path]


def _changed(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return "x"
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value * 0.999 + 1e-9
    return f"{value[:-1]}{'0' if value[-1:] != '0' else '1'}" if isinstance(value, str) else "x"


def test_no_value_of_a_manifest_can_be_changed(tmp_path: Path) -> None:
    """The teacher's card and the statistics are among them, which nothing else covers."""
    path = derive(open_archive(GOLDEN), tmp_path / "a").path
    text = (path / "kdcache.json").read_text()
    leaves = _leaves(json.loads(text))
    assert {leaf[0] for leaf in leaves} >= {"teacher", "statistics", "shards", "provenance", "policy", "readable_by", SEAL}
    assert len(leaves) > 90
    for leaf in leaves:
        manifest = json.loads(text)
        place = manifest
        for key in leaf[:-1]:
            place = place[key]
        place[leaf[-1]] = _changed(place[leaf[-1]])
        with pytest.raises(KdcacheError):
            load_manifest(json.dumps(manifest).encode(), "here", fix="x")
    assert load_manifest(json.dumps(json.loads(text), sort_keys=True).encode(), "here", fix="x")  # its layout does not count


def test_a_changed_manifest_is_refused_by_every_command(sound: Archive, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive, text = open_archive(copy), (copy / "kdcache.json").read_text()
    assert sound.manifest.manifest_sha256
    (copy / "kdcache.json").write_text(text.replace('"entropy_mean": 0.', '"entropy_mean": 0.9', 1))
    for command in (["info"], ["stats"], ["verify"], ["verify", "--quick"]):
        assert run([*command, str(copy)]) == IntegrityError.exit_code
        assert "changed after it was written" in capsys.readouterr().err
    assert [failure.where for failure in archive.verify("quick").failures] == ["kdcache.json"]  # opened before that
    (copy / "kdcache.json").write_text(text)  # as the error advises
    assert run(["verify", str(copy)]) == 0


def test_a_manifest_does_not_lose_its_digest_unnoticed(copy: Path) -> None:
    edit_manifest(copy, lambda m: m.pop(SEAL))
    with pytest.raises(IntegrityError, match="lost its manifest_sha256"):
        open_archive(copy)
    with FaultyServer(copy.parent) as server, pytest.raises(IntegrityError, match="lost its manifest_sha256"):
        read(open_archive(f"{server.url}/{copy.name}"), "sample", 0, 0)


def test_archives_from_before_that_are_read_as_ever(copy: Path) -> None:
    before = open_archive(copy).read(1, 0, SAMPLES).fields()
    make_older(copy)
    archive = open_archive(copy)
    assert archive.manifest.manifest_sha256 is None
    for name, column in archive.read(1, 0, SAMPLES).fields().items():
        np.testing.assert_array_equal(column, before[name])
    assert archive.verify("full").ok


def test_the_size_of_the_table_counts(copy: Path) -> None:
    make_older(copy)
    edit_manifest(copy, lambda m: m["shards"].update(bytes=m["shards"]["bytes"] + 1))
    assert not open_archive(copy).verify("quick").ok


# ---------------------------------------------------------------------------------------------- many of them


def _lose_files(path: Path, count: int) -> None:
    record = {"bytes": 1, "sha256": 64 * "0"}
    edit_manifest(path, lambda m: m["files"].extend({"path": f"lost/{n}", **record} for n in range(count)))


def _repeat_shards(path: Path, count: int) -> None:
    edit_table(path, lambda shards: shards.extend(shards[-1:] * count))


def _turn_views(path: Path, count: int) -> None:
    first, *others = sorted((path / "logits/c").iterdir(), key=lambda folder: int(folder.name))
    for folder in others:
        exchange(path, str(first), str(folder))


@pytest.mark.parametrize("damage", [_lose_files, _repeat_shards, _turn_views])
def test_many_wrong_records_cost_no_more_than_each(
    tmp_path: Path, damage: Callable[[Path, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of 100,000 lost files once had the manifest parsed again."""
    path = build(tmp_path / "a", "zarr", num_views=20)
    damage(path, 300)
    read, names = LocalStore.read, []

    def counted(self: LocalStore, name: str, limit: int | None = None) -> bytes:
        names.append(name)
        return read(self, name, limit)

    monkeypatch.setattr(LocalStore, "read", counted)
    archive = open_archive(path)
    assert len(archive.verify("quick").failures) >= 1
    assert len(names) < 12
