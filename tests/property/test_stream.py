"""Protects what a student sees: every sample once an epoch, and stored logits beside the very views they belong to."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdcache.archive import ArchiveWriter, write_archive
from kdcache.canvas import Canvas, load_canvas
from kdcache.datasets import Folder
from kdcache.errors import IncompatibleError, UsageError
from kdcache.prefetch import render_batches
from kdcache.stream import BLOCK, Batch, CachedTargets, ViewStream, epoch_positions, epoch_view
from kdcache.views import ViewPolicy, render_positions
from tests.conftest import Dump


@given(
    count=st.one_of(st.integers(1, 200), st.integers(BLOCK - 3, 3 * BLOCK)),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 10**6),
)
def test_an_epoch_visits_every_position_once_and_keeps_mixing_pairs_together(count: int, seed: int, epoch: int) -> None:
    positions = epoch_positions(count, seed, epoch)
    np.testing.assert_array_equal(np.sort(positions), np.arange(count))
    at = np.argsort(positions)
    paired = count - count % 2
    np.testing.assert_array_equal(at[1:paired:2], at[0:paired:2] + 1)


def test_positions_are_shuffled_within_blocks_so_that_reading_stays_local() -> None:
    positions = epoch_positions(3 * BLOCK + 10, 0, 0)
    blocks = positions // BLOCK
    assert (np.diff(blocks) != 0).sum() == 3
    assert (np.diff(positions) == 1).mean() < 0.51  # only the two of a pair follow each other


def test_seeds_and_epochs_have_their_own_orders() -> None:
    orders = {tuple(epoch_positions(100, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@given(views=st.integers(1, 30), seed=st.integers(0, 2**63), cycle=st.integers(0, 1000))
def test_every_cycle_of_epochs_shows_every_view_once(views: int, seed: int, cycle: int) -> None:
    shown = [epoch_view(views, seed, epoch) for epoch in range(cycle * views, (cycle + 1) * views)]
    assert sorted(shown) == list(range(views))


def test_cycles_differ_in_their_order() -> None:
    assert len({tuple(epoch_view(6, 0, 6 * cycle + i) for i in range(6)) for cycle in range(10)}) > 5


def epochs(stream: ViewStream, count: int) -> list[Batch]:
    return [batch for epoch in range(count) for batch in stream.epoch(epoch)]


def same(a: Batch, b: Batch) -> bool:
    tensors = ("images", "sample", "label_a", "label_b", "lam", "logits")
    return a.view == b.view and all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


def test_batches_hold_the_archives_logits_of_their_samples_and_the_views_of_the_policy(dump: Dump) -> None:
    policy = dump.archive.manifest.policy
    assert policy is not None
    stream = CachedTargets(dump.archive, dump.canvas, batch_size=4, seed=9)
    batches = epochs(stream, 3)
    assert len(batches) == 3 * len(stream) == 15
    assert {batch.view for batch in batches} == {0, 1, 2}
    for batch in batches:
        rows = dump.archive.find(batch.view, batch.sample.numpy())
        np.testing.assert_array_equal(batch.logits.numpy(), rows.logits)
        np.testing.assert_array_equal(rows.logits, dump.logits[batch.view, batch.positions])
        table = policy.parameters(batch.view, len(dump.canvas))
        np.testing.assert_array_equal(table.sample[batch.positions], batch.sample)
        np.testing.assert_allclose(batch.lam.numpy(), table.lam[batch.positions], rtol=1e-6)
        np.testing.assert_array_equal(batch.label_a.numpy(), dump.canvas.labels[batch.sample])
        mixed = table.partner[batch.positions] >= 0
        np.testing.assert_array_equal(batch.label_b.numpy()[mixed], dump.canvas.labels[table.partner[batch.positions][mixed]])
        assert torch.equal(batch.images, render_positions(dump.canvas.pixels, table, batch.positions))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_several_views_can_be_rendered_in_any_order(dump: Dump, workers: int) -> None:
    policy = dump.archive.manifest.policy
    items = [
        (view, np.array(positions)) for view, positions in ((2, [4, 5]), (0, [1]), (2, [0, 22]), (1, [7, 6, 5]), (0, [3, 2]))
    ]
    for item, (view, positions) in zip(
        render_batches(dump.canvas, policy, items, workers=workers, archive=dump.archive), items, strict=True
    ):
        table = policy.parameters(view, len(dump.canvas))
        assert item.rows.view == view
        np.testing.assert_array_equal(item.rows.sample, table.sample[positions])
        assert torch.equal(item.images, render_positions(dump.canvas.pixels, table, positions))
        np.testing.assert_array_equal(item.stored.logits, dump.logits[view, positions])


def test_worker_processes_change_nothing(dump: Dump) -> None:
    alone, helped = (epochs(CachedTargets(dump.archive, dump.canvas, 5, seed=1, workers=workers), 2) for workers in (0, 2))
    assert len(alone) == len(helped) == 8
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


def test_iterating_goes_on_with_the_next_epoch_and_any_epoch_can_be_had_again(dump: Dump) -> None:
    stream = CachedTargets(dump.archive, dump.canvas, 8, seed=2)
    first, second = list(stream), list(stream)
    assert not all(same(a, b) for a, b in zip(first, second, strict=True))
    again = CachedTargets(dump.archive, dump.canvas, 8, seed=2)
    assert all(same(a, b) for a, b in zip(second, again.epoch(1), strict=True))


def test_the_batch_size_changes_neither_the_order_nor_any_view(dump: Dump) -> None:
    whole = next(iter(CachedTargets(dump.archive, dump.canvas, 23, seed=4)))
    small = list(CachedTargets(dump.archive, dump.canvas, 3, seed=4))
    for name in ("images", "sample", "lam", "logits"):
        joined = torch.cat([getattr(batch, name) for batch in small])
        assert torch.equal(joined, getattr(whole, name)[: len(joined)])


def test_a_stream_without_targets_shows_the_views_of_its_epochs(dump: Dump) -> None:
    policy = ViewPolicy.load("digits", size=12)
    for epoch in (0, 5):
        batches = list(ViewStream(dump.canvas, policy, batch_size=6, seed=0).epoch(epoch))
        assert [batch.view for batch in batches] == [epoch] * 3
        assert all(batch.logits is None for batch in batches)
        table = policy.parameters(epoch, len(dump.canvas))
        assert torch.equal(batches[1].images, render_positions(dump.canvas.pixels, table, batches[1].positions))


@pytest.mark.parametrize("size", [0, -1, 24])
def test_a_batch_size_that_fills_no_batch_is_refused(dump: Dump, size: int) -> None:
    with pytest.raises(UsageError, match=f"batch size {size}"):
        CachedTargets(dump.archive, dump.canvas, size)


# ---------------------------------------------------------------- what is refused at once


def test_samples_in_another_order_are_refused_before_training(dump: Dump, tmp_path: Path, image_folder: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(image_folder, root)
    first = sorted((root / "train" / "class_0").iterdir())[0]
    first.rename(first.with_name("zz.png"))
    moved = load_canvas(Folder(str(root)), "train", 20, tmp_path)
    with pytest.raises(IncompatibleError, match="other images"):
        CachedTargets(dump.archive, moved, 4)


def test_a_swapped_label_file_is_refused_before_training(dump: Dump) -> None:
    swapped = dataclasses.replace(dump.canvas, labels=dump.canvas.labels[::-1].copy())
    with pytest.raises(IncompatibleError, match="label"):
        CachedTargets(dump.archive, swapped, 4)


def test_a_canvas_of_another_size_is_refused(dump: Dump, tmp_path: Path, image_folder: Path) -> None:
    larger = load_canvas(Folder(str(image_folder)), "train", 24, tmp_path)
    with pytest.raises(IncompatibleError, match="24 px") as caught:
        CachedTargets(dump.archive, larger, 4)
    assert "20" in caught.value.fix


def test_an_archive_of_fewer_samples_or_without_a_policy_is_refused(tmp_path: Path, canvas: Canvas) -> None:
    logits = np.zeros((1, 22, 3), np.float32)
    bare = write_archive(tmp_path / "bare", logits, canvas.card.class_names)
    with pytest.raises(IncompatibleError, match="cannot be replayed"):
        CachedTargets(bare, canvas, 4)
    writer = ArchiveWriter(
        tmp_path / "few", num_views=1, num_samples=22, class_names=canvas.card.class_names, policy=ViewPolicy.load("none", size=8)
    )
    writer.write(0, 0, logits[0])
    with pytest.raises(IncompatibleError, match="22 samples"):
        CachedTargets(writer.finalize(), canvas, 4)
