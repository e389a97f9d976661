"""Archives made from archives: nothing is lost between layouts, and a part says what it is a part of."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kdcache.archive import Archive, ArchiveWriter, derive, open_archive, stored_bytes, write_archive
from kdcache.cli import run
from kdcache.codecs import CODECS, kl_bound
from kdcache.errors import IncompatibleError, IntegrityError, KdcacheError, UsageError
from kdcache.views.policy import ViewPolicy
from tests.contracts.test_layouts import SPECS
from tests.hostile import make_older
from tests.squares import squares

VIEWS, SAMPLES, CLASSES = 4, 50, 30
ALL = range(VIEWS)


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def logits() -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(0, 4, (VIEWS, SAMPLES, CLASSES)).astype(np.float32)


@pytest.fixture(scope="module")
def source(logits: NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """Under a mixing policy, in several shards a view."""
    rng = np.random.default_rng(2)
    writer = ArchiveWriter(
        tmp_path_factory.mktemp("derive") / "a",
        num_views=VIEWS,
        num_samples=SAMPLES,
        class_names=[f"class {i}" for i in range(CLASSES)],
        labels=rng.integers(0, CLASSES, SAMPLES),
        keys=[f"bild {i}.jpg" for i in range(SAMPLES)],
        shard_rows=16,
        policy=ViewPolicy.load("digits", size=16),
        provenance={"command": "kdcache dump-teacher"},
    )
    for view, block in writer.missing():
        rows = np.array(writer.positions(block))
        order = writer.plan.policy.parameters(view, SAMPLES, squares(SAMPLES)).sample if writer.plan.policy else rows
        marks = rng.integers(0, 2**32, len(rows), dtype=np.uint32), rng.integers(0, 256, (len(rows), 16), dtype=np.uint8)
        writer.write(view, block, logits[view, rows], order[rows], *marks)
    return writer.finalize()


def same_rows(one: Archive, other: Archive, views: range) -> None:
    for view in views:
        for field, values in one.read(view, 0, SAMPLES).fields().items():
            np.testing.assert_array_equal(getattr(other.read(view, 0, SAMPLES), field), values)


@pytest.mark.exhaustive
def test_an_archive_goes_through_every_layout_and_comes_back_byte_for_byte(source: Archive, tmp_path: Path) -> None:
    latest = source
    for number, layout in enumerate([*SPECS, *reversed(SPECS), "zarr"]):
        latest = derive(latest, tmp_path / str(number), layout=layout)
        assert latest.manifest.digest == source.manifest.digest
        assert latest.labels().tolist() == source.labels().tolist()  # type: ignore[union-attr]
        assert latest.keys() == source.keys()
        assert latest.verify("full").ok
        same_rows(source, latest, ALL)
    assert contents(latest.path) == contents(source.path)


@pytest.mark.parametrize("layout", SPECS)
def test_some_of_the_views_are_an_archive_that_says_so(source: Archive, tmp_path: Path, layout: str) -> None:
    part = derive(source, tmp_path / "part", views=range(1, 3), layout=layout)
    assert part.views == range(1, 3)
    assert part.num_views == 2
    same_rows(source, part, range(1, 3))
    origin = part.manifest.subset_of
    assert origin is not None
    assert (origin.digest, origin.first_view, origin.num_views) == (source.manifest.digest, 0, VIEWS)
    assert part.manifest.digest != source.manifest.digest
    assert part.verify("full").ok
    for view in (0, 3):
        with pytest.raises(IndexError):
            part.read(view, 0, 1)
    # Its statistics are its own: of these views, not of all.
    found = {tau.tau: tau.entropy_mean for tau in part.manifest.statistics.per_tau}[1]
    assert math.isclose(found, np.mean([part.column("entropy", view).mean() for view in part.views]), rel_tol=1e-3)


def test_the_first_views_of_an_archive_are_the_archive_with_fewer_views(source: Archive, tmp_path: Path) -> None:
    """What a dump of two views gives is what the first two views of a longer one are."""
    part = derive(source, tmp_path / "part", views=range(2))
    again = derive(part, tmp_path / "again", layout="hdf5")
    assert again.manifest.digest == part.manifest.digest
    assert again.manifest.subset_of == part.manifest.subset_of, "a copy of a part is a part of the same"


@pytest.mark.parametrize("layout", SPECS)
def test_the_statistics_alone_are_an_archive_without_logits(source: Archive, tmp_path: Path, layout: str) -> None:
    part = derive(source, tmp_path / "part", contents="statistics", layout=layout)
    assert part.verify("full").ok
    for view in part.views:
        for name in ("entropy", "entropy_rest", "argmax", "sample", "digest", "probe"):
            np.testing.assert_array_equal(part.column(name, view), source.column(name, view))
    assert part.manifest.statistics == source.manifest.statistics
    assert part.manifest.subset_of is not None
    assert stored_bytes(part.manifest) == VIEWS * SAMPLES * 36
    for read in (lambda: part.read(0, 0, 1), lambda: part.take(0, np.array([1])), lambda: part.find(0, np.array([1]))):
        with pytest.raises(IncompatibleError, match="holds no logits"):
            _ = read().logits
    with pytest.raises(IncompatibleError, match="holds no logits"):
        derive(part, tmp_path / "more", views=range(1))
    assert derive(part, tmp_path / "copy", contents="statistics").manifest.digest == part.manifest.digest


@pytest.mark.parametrize("name", list(CODECS))
def test_another_codec_keeps_logits_within_its_bound_and_says_where_they_came_from(
    source: Archive, tmp_path: Path, name: str
) -> None:
    other = derive(source, tmp_path / "other", codec=name)
    assert other.verify("full").ok
    for view in other.views:
        was, now = source.read(view, 0, SAMPLES), other.read(view, 0, SAMPLES)
        coding = CODECS.build(name)
        bound = coding.max_error(coding.encode(was.logits))
        assert (np.abs(was.logits - now.logits).max(axis=1) <= bound).all()
        assert (kl_bound(bound, 20) <= 2e-4).all()
        for field in ("argmax", "entropy", "entropy_rest", "sample", "digest", "probe"):  # of the teacher, not of the codes
            np.testing.assert_array_equal(getattr(now, field), getattr(was, field))
    converted = other.manifest.provenance.get("converted_from")
    assert (converted is None) == (name == "i16")
    assert (other.manifest.digest == source.manifest.digest) == (name == "i16")


def test_a_conversion_that_was_stopped_goes_on_and_ends_the_same(
    source: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = derive(source, tmp_path / "whole", layout="hdf5")
    write, calls = ArchiveWriter.write_stored, []

    def stopped(self: ArchiveWriter, *arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        write(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ArchiveWriter, "write_stored", stopped)
    with pytest.raises(KeyboardInterrupt):
        derive(source, tmp_path / "part", layout="hdf5")
    derive(source, tmp_path / "part", layout="hdf5")
    assert len(calls) == 17  # sixteen shards, one of them tried twice
    assert contents(tmp_path / "part") == contents(whole.path)


@pytest.mark.parametrize("views", [range(0), range(2, 6), range(5, 6), range(0, 4, 2)])
def test_views_that_are_not_there_are_refused(source: Archive, tmp_path: Path, views: range) -> None:
    with pytest.raises(UsageError, match="views"):
        derive(source, tmp_path / "part", views=views)
    assert not (tmp_path / "part").exists()


def test_an_archive_is_never_written_over_itself_nor_over_another(source: Archive, tmp_path: Path) -> None:
    before = contents(source.path)
    with pytest.raises(UsageError, match="itself"):
        derive(source, source.path, layout="hdf5")
    other = write_archive(tmp_path / "other", np.zeros((1, 4, 3), np.float32), ["a", "b", "c"])
    kept = contents(other.path)
    derive(source, tmp_path / "part", views=range(2))
    for path in (other.path, tmp_path / "part"):
        with pytest.raises(KdcacheError):
            derive(source, path)
    assert contents(source.path) == before
    assert contents(other.path) == kept
    assert open_archive(tmp_path / "part").num_views == 2


def test_convert_on_the_command_line(source: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = ["--home", str(tmp_path)]
    assert run(["convert", str(source.path), "--layout", "webdataset", *home]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "archives" / "a-webdataset"
    assert open_archive(path).manifest.digest == source.manifest.digest
    assert run(["convert", str(source.path), "--layout", "webdataset", *home]) == 0  # nothing to do
    assert run(["convert", path.name, "--views", "1:3", "--stats-only", "-o", str(tmp_path / "b"), *home]) == 0
    assert json.loads((tmp_path / "b" / "kdcache.json").read_text())["subset_of"]["digest"] == source.manifest.digest
    capsys.readouterr()
    assert run(["convert", path.name, "--codec", "u8", "--dry-run", *home]) == 0
    assert not (tmp_path / "archives" / "a-webdataset-u8").exists()
    for arguments, words in (
        (["--layout", "zarr:publish"], "'none', 'bitshuffle' or 'pcodec'"),
        (["--layout", "zip"], "close to it"),
        (["--layout", "zarr:pcodec", "--codec", "u8"], "single bytes"),
        (["--views", "3:9"], "0:4"),
    ):
        capsys.readouterr()
        assert run(["convert", path.name, *arguments, *home]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") >= 3
        assert words in error or "known" in error


@pytest.mark.parametrize("older", [False, True])
def test_rows_that_were_changed_are_not_made_into_another_archive(source: Archive, tmp_path: Path, older: bool) -> None:
    """With their checksum changed as well, so that only the recorded digest tells."""
    from fastcrc.crc32 import iscsi as crc32c

    path = Path(shutil.copytree(source.path, tmp_path / "changed"))
    if older:
        make_older(path)
    file = path / "digest/c/1/0"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    data[-4:] = crc32c(bytes(data[:-4])).to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"view 1,? block 0"):
        derive(open_archive(path), tmp_path / "made", layout="hdf5")
    assert not (tmp_path / "made" / "kdcache.json").exists()
