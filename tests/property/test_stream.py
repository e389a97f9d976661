"""Protects what a student sees: every sample once an epoch, and stored logits beside the very views they belong to."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kdcache.archive import ArchiveWriter, write_archive
from kdcache.canvas import Canvas, load_canvas
from kdcache.datasets import Folder
from kdcache.errors import IncompatibleError, UsageError
from kdcache.stream import BLOCK, Batch, CachedTargets, ViewStream, epoch_positions, epoch_view, render_batches, replay
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


# ---------------------------------------------------------------- staleness


def until_error(batches: Iterator[Batch]) -> tuple[int, IncompatibleError]:
    """How many batches came before the error, and the error."""
    count = 0
    try:
        for _ in batches:
            count += 1
    except IncompatibleError as error:
        return count, error
    raise AssertionError("nothing was noticed")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_changed_pixel_is_noticed_at_the_first_batch_that_shows_it(dump: Dump, workers: int) -> None:
    pixels = dump.canvas.pixels.copy()
    pixels[5] = 255 - pixels[5]
    stale = dataclasses.replace(dump.canvas, pixels=pixels)
    good = list(CachedTargets(dump.archive, dump.canvas, 4, seed=3).epoch(0))
    view = good[0].view
    table = dump.archive.manifest.policy.parameters(view, 23)
    shows = [
        any(5 in (table.sample[j], table.partner[j]) for j in batch.positions) for batch in good
    ]  # in its own view, and mixed into its partner's
    count, error = until_error(CachedTargets(dump.archive, stale, 4, seed=3, workers=workers).epoch(0))
    assert count == shows.index(True)
    shown = good[count].sample.tolist()
    assert f"view {view}" in error.what
    assert any(dump.canvas.keys[sample] in error.what for sample in shown)
    assert error.why.startswith("canvas")


def test_one_changed_byte_of_one_channel_is_enough(dump: Dump) -> None:
    table = dump.archive.manifest.policy.parameters(0, 23)
    at = int(np.flatnonzero(table.partner < 0)[0])  # the odd one out: nothing hides it
    left, top, right, bottom = (table.box[at] * 20 // 65536).tolist()
    pixels = dump.canvas.pixels.copy()
    pixels[table.sample[at], 1, (top + bottom) // 2, (left + right) // 2] ^= 128
    stale = dataclasses.replace(dump.canvas, pixels=pixels)
    verification = replay(dump.archive, stale, views=10**6)
    named = [failure for failure in verification.failures if failure.where.startswith("view 0")]
    assert not verification.ok
    assert len(named) == 1
    assert "(1 in all)" in named[0].got


def test_replay_of_every_view_of_a_sound_archive_finds_nothing(dump: Dump) -> None:
    verification = replay(dump.archive, dump.canvas, views=10**6)
    assert verification.ok
    assert verification.checked == 3 * 23
    assert replay(dump.archive, dump.canvas, views=7).checked == 7


def test_a_picture_replaced_on_disk_is_blamed_on_the_canvas(
    tmp_path: Path, image_folder: Path, make_dump: Callable[..., Dump]
) -> None:
    root = tmp_path / "images"
    shutil.copytree(image_folder, root)
    before = make_dump(
        tmp_path / "a", load_canvas(Folder(str(root)), "train", 20, tmp_path), policy=ViewPolicy.load("pets", size=16), views=1
    )
    victim = root / "train" / before.canvas.keys[3]
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(victim)
    after = load_canvas(Folder(str(root)), "train", 20, tmp_path)
    assert after.digest != before.canvas.digest
    _, error = until_error(CachedTargets(before.archive, after, 1).epoch(0))
    assert error.why.startswith("canvas")
    assert "view 0 of" in error.what
    accepted = CachedTargets(before.archive, after, 1, allow_drift=255)
    assert len(list(accepted.epoch(0))) == 23
    assert 1 <= accepted.drifted <= 2


def test_drift_that_moves_no_grid_mean_is_within_any_allowance(
    tmp_path: Path, canvas: Canvas, make_dump: Callable[..., Dump]
) -> None:
    sound = make_dump(tmp_path / "a", canvas, policy=ViewPolicy(size=20, hflip=0.0), views=1)
    pixels = canvas.pixels.copy()
    pixels[4, 0, 0, :2] += np.array([1, -1]).astype(np.uint8)  # same sum: another digest, the same grid
    nearly = dataclasses.replace(canvas, pixels=pixels, digest="0" * 64)
    _, error = until_error(CachedTargets(sound.archive, nearly, 1).epoch(0))
    assert canvas.keys[4] in error.what
    assert "up to 0 grey levels" in error.what
    assert "--allow-drift 1" in error.fix
    stream = CachedTargets(sound.archive, nearly, 1, allow_drift=1)
    assert len(list(stream.epoch(0))) == 23
    assert stream.drifted == 1


def test_drift_beyond_the_allowance_is_still_an_error(dump: Dump) -> None:
    stale = dataclasses.replace(dump.canvas, pixels=255 - dump.canvas.pixels)
    _, error = until_error(CachedTargets(dump.archive, stale, 4, allow_drift=3).epoch(0))
    assert "grey levels" in error.what


def test_views_drawn_by_another_policy_are_noticed_and_not_blamed_on_the_canvas(
    tmp_path: Path, canvas: Canvas, make_dump: Callable[..., Dump]
) -> None:
    policy = ViewPolicy.load("pets", size=16)
    other = policy.model_copy(update={"hflip": 0.0})  # the same order, other pixels
    stale = make_dump(tmp_path / "a", canvas, policy=policy, drawn_by=other, views=1)
    count, error = until_error(CachedTargets(stale.archive, canvas, 23).epoch(0))
    assert count == 0
    assert error.why.startswith("policy")
    assert "no horizontal flip" in error.why
    assert "view 0 of" in error.what
    assert any(key in error.what for key in canvas.keys)


def test_views_mixed_by_another_policy_are_blamed_on_the_mixing(
    tmp_path: Path, canvas: Canvas, make_dump: Callable[..., Dump]
) -> None:
    policy = ViewPolicy.load("pets", size=16)
    other = policy.model_copy(update={"mix": policy.mix.model_copy(update={"cutmix": 0.0})})
    stale = make_dump(tmp_path / "a", canvas, policy=policy, drawn_by=other, views=1)
    _, error = until_error(CachedTargets(stale.archive, canvas, 23).epoch(0))
    assert error.why.startswith("mixing")


def test_rows_in_another_order_are_blamed_on_the_order_and_never_accepted(
    tmp_path: Path, canvas: Canvas, make_dump: Callable[..., Dump]
) -> None:
    policy = ViewPolicy.load("pets", size=16)
    stale = make_dump(tmp_path / "a", canvas, policy=policy, drawn_by=policy.model_copy(update={"seed": 1}), views=1)
    for allowed in (0, 255):
        count, error = until_error(CachedTargets(stale.archive, canvas, 4, allow_drift=allowed).epoch(0))
        assert count == 0
        assert error.why.startswith("order")
        assert "allow-drift" not in error.fix


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
