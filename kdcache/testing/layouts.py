"""The contract of layouts: any rows can be had back, with kdcache and without, and equal contents are known as equal."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from kdcache.archive import LAYOUTS, Archive, ArchiveWriter, Layout, open_archive, write_archive
from kdcache.codecs import CODECS
from kdcache.errors import IntegrityError, KdcacheError
from kdcache.registry import Registry
from kdcache.stats import relative_entropy
from kdcache.testing.components import ComponentContract

__all__ = ["CLASS_NAMES", "Content", "LayoutContract", "content", "kept", "reading_lines", "write"]

VIEWS, SAMPLES, CLASSES, SHARD_ROWS = 2, 217, 700, 64  # four shards a view, the last one not full
CLASS_NAMES = [f"class {i}" for i in range(CLASSES)]


@dataclass(frozen=True)
class Content:
    """What is written into an archive."""

    logits: NDArray[np.float32]
    sample: NDArray[np.int64]
    digest: NDArray[np.uint32]
    probe: NDArray[np.uint8]
    labels: NDArray[np.int64]
    keys: list[str]


def content() -> Content:
    """The same numbers every time; arrays of its own, which may be changed."""
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


def write(path: Path, written: Content, layout: str, codec: str, shard_rows: int | None = SHARD_ROWS) -> Archive:
    """An archive of these contents at `path`, written shard by shard, the last shard first."""
    writer = ArchiveWriter(
        path,
        num_views=VIEWS,
        num_samples=SAMPLES,
        class_names=CLASS_NAMES,
        labels=written.labels,
        keys=written.keys,
        codec=codec,
        layout=layout,
        shard_rows=shard_rows,
    )
    for view, block in reversed(writer.missing()):
        rows = np.array(writer.positions(block))
        writer.write(
            view,
            block,
            written.logits[view, rows],
            written.sample[view, rows],
            written.digest[view, rows],
            written.probe[view, rows],
        )
    return writer.finalize()


def kept(archive: Archive, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the archive's codec keeps of `logits [n, C]`."""
    coding = CODECS.from_dict(archive.manifest.codec)
    return coding.decode(coding.encode(logits)) if len(logits) else logits


def reading_lines(archive: Archive, path: Path) -> str:
    """The lines with which the archive's own card says that it can be read, for the copy at `path`."""
    [block] = re.findall(r"```python\n(.*?)```", (archive.path / "README.md").read_text(), flags=re.DOTALL)
    lines = block.strip().splitlines()
    assert len(lines) == 2
    assert "PATH" in block
    assert "kdcache" not in block
    return str(block).replace('"PATH"', repr(str(path))).replace("PATH", str(path))


READ = """
import sys, numpy
sys.modules["kdcache"] = None
names = {}
exec(sys.argv[1], names)
numpy.save(sys.argv[2], numpy.asarray(names["logits"]))
"""


def _ranges() -> Iterator[tuple[int, int, int]]:
    """View, first and last position of ranges: around the ends of shards, and anywhere."""
    yield from ((0, 0, SAMPLES), (1, 0, SAMPLES), (1, SAMPLES, SAMPLES), (0, 63, 65), (1, 64, 128), (0, 128, 192), (0, 191, 217))
    rng = np.random.default_rng(1)
    for _ in range(20):
        start, stop = sorted(rng.integers(0, SAMPLES + 1, 2).tolist())
        yield int(rng.integers(VIEWS)), start, stop


class LayoutContract(ComponentContract):
    """The layout `spec`, with logits stored by the codec of that name."""

    registry: ClassVar[Registry[Any]] = LAYOUTS
    codec: ClassVar[str] = "i16"

    @pytest.fixture(scope="class")
    @classmethod
    def names(cls) -> tuple[str, str]:
        """Layout and codec, as they are typed."""
        return cls.spec, cls.codec

    @pytest.fixture
    def component(self, names: tuple[str, str]) -> Layout:
        layout: Layout = self.registry.parse(names[0])
        return layout

    @pytest.fixture(scope="class")
    @classmethod
    def written(cls) -> Content:
        """What `archive` holds. Shared, and not to be changed."""
        return content()

    @pytest.fixture(scope="class")
    @classmethod
    def archive(cls, names: tuple[str, str], written: Content, tmp_path_factory: pytest.TempPathFactory) -> Archive:
        """An archive in this layout. Shared, and not to be changed."""
        archive = write(tmp_path_factory.mktemp("layout") / "a", written, *names)
        assert archive.manifest.layout["name"] == names[0].partition(":")[0]
        assert archive.manifest.num_blocks > 2
        return open_archive(archive.path)

    def test_any_range_of_positions_reads_what_was_written(self, archive: Archive, written: Content) -> None:
        for view, start, stop in _ranges():
            rows = archive.read(view, start, stop)
            here = (view, slice(start, stop))
            assert rows.logits.dtype == np.float32
            np.testing.assert_array_equal(rows.logits, kept(archive, written.logits[here]))
            np.testing.assert_array_equal(rows.sample, written.sample[here])
            np.testing.assert_array_equal(rows.argmax, written.logits[here].argmax(axis=1))
            np.testing.assert_array_equal(rows.digest, written.digest[here])
            np.testing.assert_array_equal(rows.probe, written.probe[here])
            for stored, computed in zip((rows.entropy, rows.entropy_rest), relative_entropy(written.logits[here]), strict=True):
                np.testing.assert_array_equal(stored, computed.astype(np.float32))  # of the logits before they were stored

    def test_any_positions_and_any_samples_are_found_in_the_asked_order(self, archive: Archive, written: Content) -> None:
        rng = np.random.default_rng(2)
        for size in (1, 2, 7, 40, SAMPLES, *rng.integers(1, 41, 15).tolist()):
            view, chosen = int(rng.integers(VIEWS)), rng.integers(0, SAMPLES, size)
            taken = archive.take(view, chosen)
            np.testing.assert_array_equal(taken.logits, kept(archive, written.logits[view, chosen]))
            np.testing.assert_array_equal(taken.sample, written.sample[view, chosen])
            found = archive.find(view, chosen)
            np.testing.assert_array_equal(found.sample, chosen)
            at = np.argsort(written.sample[view])[chosen]
            np.testing.assert_array_equal(found.logits, kept(archive, written.logits[view, at]))
            np.testing.assert_array_equal(found.digest, written.digest[view, at])

    def test_an_empty_range_is_no_rows(self, archive: Archive) -> None:
        for place in (0, 64, 100, SAMPLES):
            rows = archive.read(1, place, place)
            assert rows.logits.shape == (0, CLASSES)
            assert rows.sample.shape == (0,)

    def test_whole_columns_labels_and_keys_come_back(self, archive: Archive, written: Content) -> None:
        for view in range(VIEWS):
            np.testing.assert_array_equal(archive.column("sample", view), written.sample[view])
            np.testing.assert_array_equal(archive.column("probe", view), written.probe[view])
        np.testing.assert_array_equal(archive.labels(), written.labels)
        assert archive.keys() == written.keys
        assert list(archive.class_names) == CLASS_NAMES

    @pytest.mark.parametrize(
        ("view", "start", "stop"),
        [(-1, 0, 1), (VIEWS, 0, 1), (0, -1, 2), (0, 5, 4), (0, 0, SAMPLES + 1), (0, SAMPLES + 1, SAMPLES + 2)],
    )
    def test_a_range_that_is_not_there_is_an_index_error(self, archive: Archive, view: int, start: int, stop: int) -> None:
        with pytest.raises(IndexError):
            archive.read(view, start, stop)

    @pytest.mark.parametrize(("view", "row"), [(-1, 0), (VIEWS, 0), (0, -1), (1, SAMPLES)])
    def test_a_position_or_sample_that_is_not_there_is_an_index_error(self, archive: Archive, view: int, row: int) -> None:
        with pytest.raises(IndexError):
            archive.take(view, np.array([0, row]))
        with pytest.raises(IndexError):
            archive.find(view, np.array([0, row]))

    @pytest.mark.parametrize("level", ["quick", "full"])
    def test_a_sound_archive_verifies_and_every_file_in_it_is_recorded(self, archive: Archive, level: Any) -> None:
        verification = archive.verify(level)
        assert verification.ok, verification.failures
        on_disk = {path.relative_to(archive.path).as_posix() for path in archive.path.rglob("*") if path.is_file()}
        recorded = {record.path for record in archive.manifest.files} | {
            file.path for shard in archive.shards() for file in shard.files
        }
        assert on_disk == recorded | {"kdcache.json", archive.manifest.shards.path}
        assert verification.checked == len(recorded)
        assert archive.nbytes == sum((archive.path / name).stat().st_size for name in recorded)

    def test_equal_contents_have_equal_digests_and_equal_files(
        self, archive: Archive, names: tuple[str, str], written: Content, tmp_path: Path
    ) -> None:
        again = write(tmp_path / "again", written, *names)
        assert again.manifest.digest == archive.manifest.digest
        for path in archive.path.rglob("*"):
            if path.is_file():
                assert (again.path / path.relative_to(archive.path)).read_bytes() == path.read_bytes(), path.name

    def test_the_digest_is_the_same_as_in_zarr(
        self, archive: Archive, names: tuple[str, str], written: Content, tmp_path: Path
    ) -> None:
        assert write(tmp_path / "zarr", written, "zarr", names[1]).manifest.digest == archive.manifest.digest

    def test_any_other_content_has_another_digest(self, names: tuple[str, str], written: Content, tmp_path: Path) -> None:
        unchanged = write(tmp_path / "same", written, *names, shard_rows=None).manifest.digest
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

    def test_a_shard_in_anothers_place_is_refused(
        self, archive: Archive, names: tuple[str, str], written: Content, tmp_path: Path
    ) -> None:
        """Its bytes are sound, so that only the archive's records tell whose they are."""
        path = Path(shutil.copytree(archive.path, tmp_path / "copy"))
        other = write(tmp_path / "other", Content(**{**vars(written), "logits": written.logits[:, ::-1]}), *names)
        here, view, block = (archive.reader.files(*place) for place in ((0, 0), (1, 0), (0, 1)))
        for source, there, both in [
            (archive, view, True),
            (archive, view, False),
            (archive, block, True),
            (other, here, False),
        ]:
            for mine, theirs in zip(here, there, strict=True):
                shutil.copy(source.path / theirs, path / mine)
                if both:
                    shutil.copy(source.path / mine, path / theirs)
            with pytest.raises(IntegrityError) as caught:
                open_archive(path).read(0, 0, 1).load()
            assert any(name in str(caught.value) for name in here)
            assert any(here[0] in failure.where for failure in open_archive(path).verify("quick").failures)
            for name in (*here, *there):  # as the error advises
                shutil.copy(archive.path / name, path / name)
            assert open_archive(path).verify("quick").ok

    def test_the_cards_two_lines_read_the_logits_without_kdcache(
        self, archive: Archive, written: Content, tmp_path: Path
    ) -> None:
        moved = tmp_path / "an archive's copy"  # a plain copy, with nothing of the original left
        shutil.copytree(archive.path, moved)
        command = [sys.executable, "-c", READ, reading_lines(archive, moved), str(tmp_path / "logits.npy")]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert finished.returncode == 0, finished.stderr
        logits = np.load(tmp_path / "logits.npy")
        assert 1 <= len(logits) <= 256
        np.testing.assert_array_equal(logits.astype(np.float32), kept(archive, written.logits[0, : len(logits)]))

    def test_an_archive_of_nothing_but_zeros_is_written_in_full(self, names: tuple[str, str], tmp_path: Path) -> None:
        layout, codec = names
        zeros = np.zeros((2, 5, 3), np.float32)
        written = write_archive(tmp_path / "a", zeros, ["a", "b", "c"], labels=np.zeros(5, np.int64), layout=layout, codec=codec)
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

    def test_lost_files_are_errors_where_their_values_are_asked_for(self, names: tuple[str, str], tmp_path: Path) -> None:
        layout, codec = names
        logits, labels, keys = np.zeros((1, 6, 3), np.float32), np.zeros(6, np.int64), [str(i) for i in range(6)]
        classes = ["a", "b", "c"]
        path = write_archive(tmp_path / "a", logits, classes, labels=labels, keys=keys, layout=layout, codec=codec).path
        for record in open_archive(path).manifest.files:
            if record.path in {"README.md"}:
                continue
            copy = tmp_path / "copy"
            shutil.copytree(path, copy)
            (copy / record.path).unlink()
            archive = open_archive(copy)
            try:
                read, found, rows = archive.labels(), archive.keys(), archive.read(0, 0, 6)
            except KdcacheError:
                pass
            else:  # what could still be read is right
                np.testing.assert_array_equal(rows.logits, 0)
                assert read is not None
                np.testing.assert_array_equal(read, 0)
                assert found == keys
            shutil.rmtree(copy)

    @pytest.mark.parametrize(("samples", "classes"), [(1, 2), (2, 2), (3, 5)])
    def test_the_smallest_archives_work(self, names: tuple[str, str], samples: int, classes: int, tmp_path: Path) -> None:
        layout, codec = names
        logits = np.arange(samples * classes, dtype=np.float32).reshape(1, samples, classes)
        archive = write_archive(tmp_path / "a", logits, [str(c) for c in range(classes)], layout=layout, codec=codec)
        np.testing.assert_array_equal(archive.read(0, 0, samples).logits, kept(archive, logits[0]))
        assert archive.labels() is None
        assert archive.keys() is None
        assert archive.verify("full").ok

    @pytest.mark.parametrize("shard_rows", [1, 7, 32, 50, 74, 75, 1000, None])
    def test_any_wish_for_the_size_of_shards_keeps_pairs_together(
        self, names: tuple[str, str], shard_rows: int | None, written: Content, tmp_path: Path
    ) -> None:
        layout, codec = names
        count = 15 if shard_rows == 1 else 75
        writer = ArchiveWriter(
            tmp_path / "a",
            num_views=1,
            num_samples=count,
            class_names=CLASS_NAMES,
            codec=codec,
            layout=layout,
            shard_rows=shard_rows,
        )
        for view, block in writer.missing():
            writer.write(view, block, written.logits[0, np.array(writer.positions(block))])
        archive, plan = writer.finalize(), writer.plan
        assert plan.shard_rows % 2 == 0 or plan.num_blocks == 1  # mixing partners lie in one shard
        assert sum(plan.block_rows(block) for block in range(plan.num_blocks)) == count
        np.testing.assert_array_equal(archive.read(0, 0, count).logits, kept(archive, written.logits[0, :count]))
        assert archive.verify("full").ok
