"""Every layout with every codec: any rows can be had back, with kdcache and without, and equal contents are known as equal."""

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kdcache.archive import LAYOUTS, Archive, ArchiveWriter, open_archive, write_archive
from kdcache.codecs import CODECS
from kdcache.errors import KdcacheError
from kdcache.stats import relative_entropy
from tests.contracts.examples import examples

VIEWS, SAMPLES, CLASSES, SHARD_ROWS = 2, 217, 700, 64  # four shards a view, the last one not full
SPECS = [LAYOUTS.spec(LAYOUTS.build(*example.values[:1], **example.values[1])) for example in examples("layout")]
# Every layout with a codec that has parameters and one that has none; every codec. (Single bytes are not for pcodec.)
PAIRS = [pair for pair in itertools.product(SPECS, CODECS) if pair[0] == "zarr" or pair[1] in {"i16", "u8"}]
PAIRS.remove(("zarr:pcodec", "u8"))
# Each layout and each codec; the other pairs are exhaustive.
QUICK = {
    *(("zarr", "f16"), ("zarr", "f32"), ("zarr", "i16"), ("zarr:bitshuffle", "u8"), ("zarr:pcodec", "i16")),
    *(("hdf5", "i16"), ("webdataset", "u8"), ("webdataset:1", "i16"), ("webdataset:24", "u8")),
}
MARKS = {pair: () if pair in QUICK else pytest.mark.exhaustive for pair in PAIRS}
CASES = [pytest.param(*pair, marks=MARKS[pair]) for pair in PAIRS]
NAMES = [f"class {i}" for i in range(CLASSES)]


@dataclass(frozen=True)
class Content:
    """What is written into the archives of this module."""

    logits: NDArray[np.float32]
    sample: NDArray[np.int64]
    digest: NDArray[np.uint32]
    probe: NDArray[np.uint8]
    labels: NDArray[np.int64]
    keys: list[str]


def content() -> Content:
    rng = np.random.default_rng(8)
    logits = rng.normal(0, 5, (VIEWS, SAMPLES, CLASSES)).clip(-60, 60).astype(np.float32)
    logits[0, 3] = 0
    logits[1, 200, 1:] = -60
    return Content(
        logits,
        np.stack([rng.permutation(SAMPLES) for _ in range(VIEWS)]),
        rng.integers(0, 2**32, (VIEWS, SAMPLES), dtype=np.uint32),
        rng.integers(0, 256, (VIEWS, SAMPLES, 16), dtype=np.uint8),
        rng.integers(0, CLASSES, SAMPLES),
        [f"ordner/käfer {i}\u2028.jpg" if i % 7 == 0 else f"{i}" for i in range(SAMPLES)],
    )


def write(path: Path, what: Content, layout: str, codec: str, shard_rows: int | None = SHARD_ROWS) -> Archive:
    """Write shard by shard, last shard first."""
    writer = ArchiveWriter(
        path,
        num_views=VIEWS,
        num_samples=SAMPLES,
        class_names=NAMES,
        labels=what.labels,
        keys=what.keys,
        codec=codec,
        layout=layout,
        shard_rows=shard_rows,
    )
    for view, block in reversed(writer.missing()):
        rows = np.array(writer.positions(block))
        writer.write(
            view, block, what.logits[view, rows], what.sample[view, rows], what.digest[view, rows], what.probe[view, rows]
        )
    return writer.finalize()


@pytest.fixture(scope="module")
def what() -> Content:
    return content()


@pytest.fixture(scope="module", params=[pytest.param(pair, marks=MARKS[pair], id="-".join(pair)) for pair in PAIRS])
def written(request: pytest.FixtureRequest, what: Content, tmp_path_factory: pytest.TempPathFactory) -> tuple[Archive, Content]:
    layout_name, codec_name = request.param
    archive = write(tmp_path_factory.mktemp("layout") / "a", what, layout_name, codec_name)
    assert archive.manifest.layout["name"] == layout_name.partition(":")[0]
    assert archive.manifest.num_blocks > 2
    return open_archive(archive.path), what


def kept(archive: Archive, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the archive's codec keeps of `logits [n, C]`."""
    coding = CODECS.from_dict(archive.manifest.codec)
    return coding.decode(coding.encode(logits)) if len(logits) else logits


def specifications(archive: Archive) -> tuple[str, str]:
    """Layout and codec of an archive as they are typed."""
    return LAYOUTS.spec(LAYOUTS.from_dict(archive.manifest.layout)), CODECS.spec(CODECS.from_dict(archive.manifest.codec))


@given(data=st.data())
def test_any_range_of_positions_reads_what_was_written(written: tuple[Archive, Content], data: st.DataObject) -> None:
    archive, what = written
    view = data.draw(st.integers(0, VIEWS - 1))
    start, stop = sorted(data.draw(st.tuples(st.integers(0, SAMPLES), st.integers(0, SAMPLES))))
    rows = archive.read(view, start, stop)
    here = (view, slice(start, stop))
    assert rows.logits.dtype == np.float32
    np.testing.assert_array_equal(rows.logits, kept(archive, what.logits[here]))
    np.testing.assert_array_equal(rows.sample, what.sample[here])
    np.testing.assert_array_equal(rows.argmax, what.logits[here].argmax(axis=1))
    np.testing.assert_array_equal(rows.digest, what.digest[here])
    np.testing.assert_array_equal(rows.probe, what.probe[here])
    for stored, computed in zip((rows.entropy, rows.entropy_rest), relative_entropy(what.logits[here]), strict=True):
        np.testing.assert_array_equal(stored, computed.astype(np.float32))  # of the logits before they were stored


@given(data=st.data())
def test_any_positions_and_any_samples_are_found_in_the_asked_order(
    written: tuple[Archive, Content], data: st.DataObject
) -> None:
    archive, what = written
    view = data.draw(st.integers(0, VIEWS - 1))
    chosen = np.array(data.draw(st.lists(st.integers(0, SAMPLES - 1), min_size=1, max_size=40)))
    taken = archive.take(view, chosen)
    np.testing.assert_array_equal(taken.logits, kept(archive, what.logits[view, chosen]))
    np.testing.assert_array_equal(taken.sample, what.sample[view, chosen])
    found = archive.find(view, chosen)
    np.testing.assert_array_equal(found.sample, chosen)
    at = np.argsort(what.sample[view])[chosen]
    np.testing.assert_array_equal(found.logits, kept(archive, what.logits[view, at]))
    np.testing.assert_array_equal(found.digest, what.digest[view, at])


def test_an_empty_range_is_no_rows(written: tuple[Archive, Content]) -> None:
    archive, _ = written
    for place in (0, 64, 100, SAMPLES):
        rows = archive.read(1, place, place)
        assert rows.logits.shape == (0, CLASSES)
        assert rows.sample.shape == (0,)


def test_whole_columns_labels_and_keys_come_back(written: tuple[Archive, Content]) -> None:
    archive, what = written
    for view in range(VIEWS):
        np.testing.assert_array_equal(archive.column("sample", view), what.sample[view])
        np.testing.assert_array_equal(archive.column("probe", view), what.probe[view])
    np.testing.assert_array_equal(archive.labels(), what.labels)
    assert archive.keys() == what.keys
    assert list(archive.class_names) == NAMES


@pytest.mark.parametrize(
    ("view", "start", "stop"),
    [(-1, 0, 1), (VIEWS, 0, 1), (0, -1, 2), (0, 5, 4), (0, 0, SAMPLES + 1), (0, SAMPLES + 1, SAMPLES + 2)],
)
def test_a_range_that_is_not_there_is_an_index_error(written: tuple[Archive, Content], view: int, start: int, stop: int) -> None:
    with pytest.raises(IndexError):
        written[0].read(view, start, stop)


@pytest.mark.parametrize(("view", "row"), [(-1, 0), (VIEWS, 0), (0, -1), (1, SAMPLES)])
def test_a_position_or_sample_that_is_not_there_is_an_index_error(written: tuple[Archive, Content], view: int, row: int) -> None:
    with pytest.raises(IndexError):
        written[0].take(view, np.array([0, row]))
    with pytest.raises(IndexError):
        written[0].find(view, np.array([0, row]))


@pytest.mark.parametrize("level", ["quick", "full"])
def test_a_sound_archive_verifies_and_every_file_in_it_is_recorded(written: tuple[Archive, Content], level: str) -> None:
    archive, _ = written
    verification = archive.verify(level)
    assert verification.ok, verification.failures
    on_disk = {path.relative_to(archive.path).as_posix() for path in archive.path.rglob("*") if path.is_file()}
    recorded = {record.path for record in archive.manifest.files} | {
        file.path for shard in archive.shards() for file in shard.files
    }
    assert on_disk == recorded | {"kdcache.json", archive.manifest.shards.path}
    assert verification.checked == len(recorded)
    assert archive.nbytes == sum((archive.path / name).stat().st_size for name in recorded)


def test_equal_contents_have_equal_digests_and_equal_files(written: tuple[Archive, Content], tmp_path: Path) -> None:
    archive, what = written
    again = write(tmp_path / "again", what, *specifications(archive))
    assert again.manifest.digest == archive.manifest.digest
    for path in archive.path.rglob("*"):
        if path.is_file():
            assert (again.path / path.relative_to(archive.path)).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("codec_name", list(CODECS))
def test_the_digest_is_the_same_in_every_layout(what: Content, tmp_path: Path, codec_name: str) -> None:
    digests = {write(tmp_path / name, what, name, codec_name).manifest.digest for name in SPECS if (name, codec_name) in PAIRS}
    assert len(digests) == 1


def test_any_other_content_has_another_digest(written: tuple[Archive, Content], what: Content, tmp_path: Path) -> None:
    archive, _ = written
    names = specifications(archive)
    unchanged = write(tmp_path / "same", what, *names, shard_rows=None).manifest.digest
    changes: dict[str, Callable[[Content], None]] = {
        "a logit": lambda c: c.logits.__setitem__((1, 216, 699), 1.5),
        "a sample number": lambda c: c.sample.__setitem__((0, [4, 5]), c.sample[0, [5, 4]]),
        "a fingerprint": lambda c: c.digest.__setitem__((0, 70), c.digest[0, 70] ^ 1),
        "a grid": lambda c: c.probe.__setitem__((1, 0, 15), c.probe[1, 0, 15] ^ 1),
    }
    for name, change in changes.items():
        other = content()
        change(other)
        assert write(tmp_path / name, other, *names, shard_rows=None).manifest.digest != unchanged, name


def reading_lines(archive: Archive, path: Path) -> str:
    """The lines with which the archive's own card says that it can be read, for the copy at `path`."""
    [block] = re.findall(r"```python\n(.*?)```", (archive.path / "README.md").read_text(), flags=re.DOTALL)
    lines = block.strip().splitlines()
    assert len(lines) == 2
    assert "PATH" in block
    assert "kdcache" not in block
    return str(block.replace("PATH", str(path)))


READ = """
import json, sys, numpy
sys.modules['kdcache'] = None
for lines, output in json.load(open(sys.argv[1])):
    names = {}
    exec(lines, names)
    numpy.save(output, numpy.asarray(names["logits"]))
assert not [name for name in sys.modules if name.startswith('kdcache.')]
"""


def test_the_cards_two_lines_read_the_logits_without_kdcache(
    what: Content, tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    archives, tasks = [], []
    for number, names in enumerate(PAIRS):
        archive = write(tmp_path / str(number), what, *names)
        moved = tmp_path / f"an archive's copy {number}"  # a plain copy, with nothing of the original left
        shutil.copytree(archive.path, moved)
        archives.append(archive)
        tasks.append((reading_lines(archive, moved).replace(f'"{moved}"', repr(str(moved))), str(tmp_path / f"{number}.npy")))
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    run_python(READ, tmp_path / "tasks.json")  # one process for all: what takes the time is to start it
    for names, archive, (_, output) in zip(PAIRS, archives, tasks, strict=True):
        logits = np.load(output)
        rows = len(logits)
        assert 1 <= rows <= 256, names
        np.testing.assert_array_equal(logits.astype(np.float32), kept(archive, what.logits[0, :rows]), err_msg=str(names))


@pytest.mark.parametrize(("layout_name", "codec_name"), CASES)
def test_an_archive_of_nothing_but_zeros_is_written_in_full(layout_name: str, codec_name: str, tmp_path: Path) -> None:
    zeros = np.zeros((2, 5, 3), np.float32)
    written = write_archive(
        tmp_path / "a", zeros, ["a", "b", "c"], labels=np.zeros(5, np.int64), layout=layout_name, codec=codec_name
    )
    archive = open_archive(written.path)
    for view in (0, 1):
        np.testing.assert_array_equal(archive.read(view, 0, 5).logits, 0)
        np.testing.assert_array_equal(archive.read(view, 0, 5).entropy, 1)
    np.testing.assert_array_equal(archive.labels(), 0)
    assert archive.verify("full").ok
    # Zeros that were never written look the same as zeros that were lost; so losing any file must be noticed.
    for record in (*archive.manifest.files, *(file for shard in archive.shards() for file in shard.files)):
        copy = tmp_path / "copy"
        shutil.copytree(archive.path, copy)
        (copy / record.path).unlink()
        verification = open_archive(copy).verify("quick")
        assert [failure.where for failure in verification.failures] == [record.path]
        shutil.rmtree(copy)


@pytest.mark.parametrize(("layout_name", "codec_name"), CASES)
def test_lost_files_are_errors_where_their_values_are_asked_for(layout_name: str, codec_name: str, tmp_path: Path) -> None:
    logits = np.zeros((1, 6, 3), np.float32)
    keys = [str(i) for i in range(6)]
    path = write_archive(
        tmp_path / "a", logits, ["a", "b", "c"], labels=np.zeros(6, np.int64), keys=keys, layout=layout_name, codec=codec_name
    ).path
    for record in open_archive(path).manifest.files:
        if record.path in {"README.md"}:
            continue
        copy = tmp_path / "copy"
        shutil.copytree(path, copy)
        (copy / record.path).unlink()
        archive = open_archive(copy)
        try:
            labels, found, rows = archive.labels(), archive.keys(), archive.read(0, 0, 6)
        except KdcacheError:
            pass
        else:  # what could still be read is right
            np.testing.assert_array_equal(rows.logits, 0)
            assert labels is not None
            np.testing.assert_array_equal(labels, 0)
            assert found == keys
        shutil.rmtree(copy)


@pytest.mark.grid
@pytest.mark.parametrize(("layout_name", "codec_name"), CASES)
@pytest.mark.parametrize(("samples", "classes"), [(1, 2), (2, 2), (3, 5)])
def test_the_smallest_archives_work(layout_name: str, codec_name: str, samples: int, classes: int, tmp_path: Path) -> None:
    logits = np.arange(samples * classes, dtype=np.float32).reshape(1, samples, classes)
    archive = write_archive(tmp_path / "a", logits, [str(c) for c in range(classes)], layout=layout_name, codec=codec_name)
    np.testing.assert_array_equal(archive.read(0, 0, samples).logits, kept(archive, logits[0]))
    assert archive.labels() is None
    assert archive.keys() is None
    assert archive.verify("full").ok


@pytest.mark.grid
@pytest.mark.parametrize(("layout_name", "codec_name"), CASES)
@pytest.mark.parametrize("shard_rows", [1, 7, 32, 50, 74, 75, 1000, None])
def test_any_wish_for_the_size_of_shards_keeps_pairs_together(
    layout_name: str, codec_name: str, shard_rows: int | None, what: Content, tmp_path: Path
) -> None:
    count = 15 if shard_rows == 1 else 75
    writer = ArchiveWriter(
        tmp_path / "a",
        num_views=1,
        num_samples=count,
        class_names=NAMES,
        codec=codec_name,
        layout=layout_name,
        shard_rows=shard_rows,
    )
    for view, block in writer.missing():
        writer.write(view, block, what.logits[0, np.array(writer.positions(block))])
    archive, plan = writer.finalize(), writer.plan
    assert plan.shard_rows % 2 == 0 or plan.num_blocks == 1  # mixing partners lie in one shard
    assert sum(plan.block_rows(block) for block in range(plan.num_blocks)) == count
    np.testing.assert_array_equal(archive.read(0, 0, count).logits, kept(archive, what.logits[0, :count]))
    assert archive.verify("full").ok
