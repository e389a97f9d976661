"""Protects what was already made: archives of format version 1, and views and orders that seeds of version 1 stand for."""

import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from kdcache.archive import LAYOUTS, open_archive
from kdcache.archive.layouts import rows_digest
from kdcache.codecs import CODECS
from kdcache.stats import relative_entropy
from kdcache.targets import row_keys
from kdcache.views.rendering import Renderer
from tests.golden import make
from tests.squares import squares

DIGEST = "2d4ccd29"  # of data/golden/v1, its beginning; the whole of it is checked by verify
DIGESTS = {  # of data/golden/layouts/*, their beginnings
    "zarr": "ce7b57f4",
    "zarr-bitshuffle": "1edf80e6",
    "zarr-pcodec": "8bfdade8",
    "hdf5": "1edf80e6",
    "webdataset": "86151a88",
    make.PART: "01f0de05",
}
HOW = (
    "The golden file {} is missing. Get it back from git; golden files are never made anew by a test "
    "(tests/golden/make.py says how they were made)."
)


@pytest.fixture(scope="module")
def path() -> Path:
    assert (make.ARCHIVE / "kdcache.json").is_file(), HOW.format(make.ARCHIVE)
    return make.ARCHIVE


def stored(file: Path) -> dict[str, Any]:
    assert file.is_file(), HOW.format(file)
    return dict(json.loads(file.read_text()))


@lru_cache
def computed(what: Callable[[Renderer], dict[str, Any]], renderer: Renderer) -> dict[str, Any]:
    """What this installation computes, as JSON would hold it."""
    return dict(json.loads(json.dumps(what(renderer))))


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return stored(make.VIEWS)


@pytest.fixture(scope="module")
def now() -> dict[str, Any]:
    return computed(make.views, "reference")


@pytest.fixture(scope="module")
def golden_pieces() -> dict[str, Any]:
    return stored(make.PIECES)


@pytest.fixture(scope="module")
def pieces_now() -> dict[str, Any]:
    return computed(make.pieces, "reference")


# ---------------------------------------------------------------- the archive


def test_the_golden_archive_is_whole(path: Path) -> None:
    archive = open_archive(path)
    for level in ("quick", "full"):
        assert archive.verify(level).failures == []  # type: ignore[arg-type]
    assert archive.manifest.digest.startswith(DIGEST)
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < 60_000


def test_the_golden_archive_reads_as_the_numbers_it_was_made_from(path: Path) -> None:
    archive = open_archive(path)
    assert (archive.num_views, archive.num_samples, archive.num_classes) == (2, 11, 5)
    assert archive.class_names == tuple(f"class {i}" for i in range(5))
    np.testing.assert_array_equal(archive.labels(), np.arange(11) * 3 % 5)
    assert archive.keys() == [f"picture/{i:02d}" for i in range(11)]
    policy = archive.manifest.policy
    assert policy is not None
    for view in (0, 1):
        rows = archive.read(view, 0, 11)
        np.testing.assert_array_equal(rows.logits, make.logits(view))
        np.testing.assert_array_equal(rows.argmax, make.logits(view).argmax(axis=1))
        np.testing.assert_array_equal(rows.sample, policy.parameters(view, 11, squares(11)).sample)
        for stored, computed in zip((rows.entropy, rows.entropy_rest), relative_entropy(make.logits(view)), strict=True):
            np.testing.assert_allclose(stored, computed, rtol=1e-6, atol=1e-9)
        for stored, made in zip((rows.digest, rows.probe), make.fingerprints(view), strict=True):
            np.testing.assert_array_equal(stored, made)
        np.testing.assert_array_equal(archive.find(view, rows.sample[3:6]).logits, make.logits(view)[3:6])


def test_the_golden_archive_is_read_by_zarr_alone(path: Path) -> None:
    import zarr

    array = zarr.open_group(path, mode="r")["logits"]
    for view in (0, 1):
        np.testing.assert_array_equal(array[view] * array.attrs["scale_factor"], make.logits(view))


def test_the_same_numbers_are_still_written_as_the_same_rows_and_bytes(path: Path, tmp_path: Path) -> None:
    """Then dumps that are resumed, appended to or compared across versions of kdcache still fit together."""
    old, new = open_archive(path), make.write_golden_archive(tmp_path / "a")
    for before, now in zip(old.shards(), new.shards(), strict=True):
        assert now.files == before.files
        # The first archives hashed their decoded rows, with sha256; how that is done is part of what they are.
        assert rows_digest(old.manifest, new.stored(now.view, now.block)) == before.rows_digest


def test_an_old_archive_can_be_appended_to(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(path, tmp_path / "a")
    monkeypatch.setattr(make, "NUM_VIEWS", 3)
    grown = make.write_golden_archive(tmp_path / "a")
    assert grown.num_views == 3
    assert grown.verify("full").ok
    assert list(grown.shards())[:6] == list(open_archive(path).shards())
    coding = CODECS.from_dict(grown.manifest.codec)
    np.testing.assert_array_equal(grown.read(2, 0, 11).logits, coding.decode(coding.encode(make.logits(2))))


# ---------------------------------------------------------------- one for every layout


@pytest.fixture(scope="module")
def layouts() -> Path:
    assert make.LAYOUTS.is_dir(), HOW.format(make.LAYOUTS)
    return make.LAYOUTS


def test_there_is_a_golden_archive_of_every_layout_and_codec(layouts: Path) -> None:
    manifests = [open_archive(layouts / name).manifest for name in DIGESTS]
    assert {manifest.layout["name"] for manifest in manifests} == set(LAYOUTS)
    assert {manifest.codec["name"] for manifest in manifests} == set(CODECS)
    assert {folder.name for folder in layouts.iterdir()} == {*DIGESTS}


@pytest.mark.parametrize("name", list(make.WRITTEN))
def test_golden_archives_of_every_layout_read_as_what_they_were_made_from(layouts: Path, name: str) -> None:
    archive = open_archive(layouts / name)
    assert archive.verify("full").failures == []
    assert archive.manifest.digest.startswith(DIGESTS[name])
    np.testing.assert_array_equal(archive.labels(), np.arange(11) * 3 % 5)
    assert archive.keys() == [f"picture/{i:02d}" for i in range(11)]
    coding = CODECS.from_dict(archive.manifest.codec)
    for view in (0, 1):
        rows = archive.read(view, 0, 11)
        np.testing.assert_array_equal(rows.logits, coding.decode(coding.encode(make.logits(view))))
        np.testing.assert_array_equal(rows.argmax, make.logits(view).argmax(axis=1))
        for stored, made in zip((rows.digest, rows.probe), make.fingerprints(view), strict=True):
            np.testing.assert_array_equal(stored, made)


@pytest.mark.parametrize("name", list(make.WRITTEN))
def test_every_layout_still_writes_the_same_rows(layouts: Path, name: str, tmp_path: Path) -> None:
    """The same bytes too, but where a library compresses or wraps them, which may do so otherwise one day."""
    old, new = open_archive(layouts / name), make.write_golden_archive(tmp_path / "a", *make.WRITTEN[name])
    assert new.manifest.digest == old.manifest.digest
    for before, now in zip(old.shards(), new.shards(), strict=True):
        assert now.rows_digest == before.rows_digest
        if name in {"zarr", "webdataset"}:
            assert now.files == before.files


def test_a_golden_part_says_what_it_is_a_part_of(layouts: Path) -> None:
    part, whole = (open_archive(layouts / name) for name in (make.PART, "hdf5"))
    assert part.verify("full").failures == []
    assert part.manifest.digest.startswith(DIGESTS[make.PART])
    assert part.manifest.subset_of is not None
    assert part.manifest.subset_of.digest == whole.manifest.digest
    assert part.views == range(1, 2)
    np.testing.assert_array_equal(part.column("entropy", 1), whole.column("entropy", 1))


# ---------------------------------------------------------------- views and orders


def test_presets_still_mean_the_same_policies(golden: dict[str, Any], now: dict[str, Any]) -> None:
    assert golden["policies"].items() <= now["policies"].items(), "another digest makes every archive of this preset another dump"


def test_draws_are_still_the_same_whole_numbers(golden: dict[str, Any], now: dict[str, Any]) -> None:
    assert now["parameters"] == golden["parameters"], "other draws need another policy version"


@pytest.mark.parametrize("picture", ["digits", "gradient"])
def test_bundled_pictures_are_still_the_same(picture: str, golden: dict[str, Any], now: dict[str, Any]) -> None:
    assert now["images"][picture] == golden["images"][picture], "the pictures changed, so the views below say nothing"


CHANGED = (
    "the pixels of views changed: kdcache draws differently (then it needs another policy version), or Pillow or "
    "torchvision does (then its version must be excluded, since no archive made before can be replayed with it)"
)


@pytest.mark.parametrize("renderer", get_args(Renderer))
@pytest.mark.parametrize("picture", ["digits", "gradient"])
@pytest.mark.parametrize("preset", make.SIZES)
def test_views_still_have_the_same_pixels(preset: str, picture: str, renderer: Renderer, golden: dict[str, Any]) -> None:
    assert computed(make.views, renderer)["views"][preset][picture] == golden["views"][preset][picture], CHANGED


@pytest.mark.parametrize("renderer", get_args(Renderer))
@pytest.mark.parametrize("picture", ["digits", "gradient"])
@pytest.mark.parametrize("name", make.PIECE_POLICIES)
def test_views_with_the_later_pieces_still_have_the_same_pixels(
    name: str, picture: str, renderer: Renderer, golden_pieces: dict[str, Any]
) -> None:
    assert computed(make.pieces, renderer)["views"][name][picture] == golden_pieces["views"][name][picture], CHANGED


def test_policies_with_the_later_pieces_still_have_the_same_digests_and_draws(
    golden_pieces: dict[str, Any], pieces_now: dict[str, Any]
) -> None:
    assert pieces_now["policies"] == golden_pieces["policies"], "another digest makes every archive of this policy another dump"
    assert pieces_now["parameters"] == golden_pieces["parameters"], "other draws need another policy version"


@pytest.mark.parametrize("renderer", get_args(Renderer))
def test_photographs_still_have_the_same_boxes_and_pixels(renderer: Renderer) -> None:
    golden = json.loads(make.PHOTOGRAPHS.read_text())
    assert make.photographs(renderer) == golden, CHANGED


def test_seeds_still_mean_the_same_orders_and_shuffles(golden: dict[str, Any], now: dict[str, Any]) -> None:
    assert now["orders"] == golden["orders"], "runs of an earlier version can no longer be repeated"
    of_samples = [1730665916399432775, -5700082632300381997, -3822483288148661232]
    assert row_keys("5" * 64, 3, torch.arange(3))[:, 1].tolist() == of_samples


def test_golden_files_hold_nothing_that_is_no_longer_checked(
    golden: dict[str, Any], now: dict[str, Any], golden_pieces: dict[str, Any], pieces_now: dict[str, Any]
) -> None:
    for file, found in ((golden, now), (golden_pieces, pieces_now)):
        assert file.keys() == found.keys()
        assert file["views"].keys() == found["views"].keys()


@pytest.mark.parametrize("what", ["archive", "views", "pieces", "photographs"])
def test_making_golden_files_never_overwrites_them(what: str) -> None:
    files = {"views": make.VIEWS, "pieces": make.PIECES, "photographs": make.PHOTOGRAPHS}
    target = files.get(what, make.ARCHIVE / "kdcache.json")
    before = target.read_bytes()
    with pytest.raises(SystemExit, match="not overwritten"):
        make.main([what])
    assert target.read_bytes() == before
