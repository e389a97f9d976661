"""Protects what a student sees: every sample once an epoch, and stored logits beside the very views they belong to."""

import copy
import dataclasses
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from kdcache.archive import ArchiveWriter, derive, write_archive
from kdcache.datasets.canvas import Canvas, load_canvas
from kdcache.datasets.folder import Folder
from kdcache.errors import IncompatibleError, UsageError
from kdcache.methods import build
from kdcache.replay import stream as stream_module
from kdcache.replay.prefetch import render_batches
from kdcache.replay.stream import BLOCK, Batch, CachedTargets, ViewStream, _Epochs, epoch_positions, epoch_view
from kdcache.targets import Targets, control, row_keys
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
        table = policy.parameters(batch.view, len(dump.canvas), dump.canvas.sizes)
        np.testing.assert_array_equal(table.sample[batch.positions], batch.sample)
        np.testing.assert_allclose(batch.lam.numpy(), table.lam[batch.positions], rtol=1e-6)
        np.testing.assert_array_equal(batch.label_a.numpy(), dump.canvas.labels[batch.sample])
        mixed = table.partner[batch.positions] >= 0
        np.testing.assert_array_equal(batch.label_b.numpy()[mixed], dump.canvas.labels[table.partner[batch.positions][mixed]])
        assert torch.equal(batch.images, render_positions(dump.canvas.pixels, table, batch.positions))


@pytest.mark.exhaustive
@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_view_is_another_one_of_the_same_samples(dump: Dump, workers: int) -> None:
    policy = dump.archive.manifest.policy
    assert policy is not None
    stream = CachedTargets(dump.archive, dump.canvas, batch_size=4, seed=9, second=dump.archive, workers=workers)
    plain = CachedTargets(dump.archive, dump.canvas, batch_size=4, seed=9)
    for epoch in range(3):
        batches = list(stream.epoch(epoch))
        assert all(map(same, batches, plain.epoch(epoch)))  # the first view is what it is without a second one
        for batch in batches:
            other = batch.second
            assert other is not None
            assert batch.view != other.view == stream.second_view(epoch)
            assert torch.equal(batch.sample, other.sample)
            np.testing.assert_array_equal(other.logits, dump.archive.find(other.view, other.sample.numpy()).logits)
            table = policy.parameters(other.view, len(dump.canvas), dump.canvas.sizes)
            assert torch.equal(other.images, render_positions(dump.canvas.pixels, table, other.positions))
            assert torch.equal(other.label_a, batch.label_a)
        if epoch == 1:  # from the middle of an epoch on, both go on where they were
            assert all(map(same, [b.second for b in stream.epoch(1, 2)], [b.second for b in batches[2:]]))


def test_second_views_of_a_cycle_are_all_the_views_and_half_a_cycle_away(dump: Dump) -> None:
    for views in (2, 3, 6):
        shown = [(epoch_view(views, 5, epoch), epoch_view(views, 5, epoch, views // 2)) for epoch in range(views)]
        assert sorted(second for _, second in shown) == list(range(views))
        assert all(first != second for first, second in shown)


def test_second_views_may_come_from_another_archive_and_are_checked_too(
    dump: Dump, make_dump: Callable[..., Dump], tmp_path: Path
) -> None:
    policy = dump.archive.manifest.policy
    assert policy is not None
    seeded = {seed: policy.model_copy(update={"seed": seed}) for seed in (98, 99)}
    other = make_dump(tmp_path / "strong", dump.canvas, policy=seeded[99], views=1).archive
    stream = CachedTargets(dump.archive, dump.canvas, batch_size=4, seed=1, second=other)
    batch = next(stream.epoch(0))
    assert batch.second is not None
    assert batch.second.view == 0  # its only one
    assert torch.equal(batch.sample, batch.second.sample)
    assert not torch.equal(batch.images, batch.second.images)
    moved = batch.to(torch.device("cpu"))
    assert moved.second is not None
    wrong = make_dump(tmp_path / "wrong", dump.canvas, policy=seeded[99], drawn_by=seeded[98]).archive
    with pytest.raises(IncompatibleError, match="not what the teacher saw"):
        next(CachedTargets(dump.archive, dump.canvas, batch_size=4, seed=1, second=wrong).epoch(0))
    with pytest.raises(UsageError, match="holds one view"):
        CachedTargets(other, dump.canvas, batch_size=4, seed=1, second=other)
    smaller = make_dump(tmp_path / "small", dump.canvas, policy=policy.model_copy(update={"size": 12})).archive
    with pytest.raises(IncompatibleError, match="do not go with"):
        CachedTargets(dump.archive, dump.canvas, batch_size=4, seed=1, second=smaller)


@pytest.mark.exhaustive
@pytest.mark.grid
@pytest.mark.parametrize("views", [(0, 1, 2), (1, 2), (2, 1), (0, 3), (2,)])
@pytest.mark.parametrize("same", [True, False])
def test_no_sample_is_ever_shown_the_same_view_twice_in_a_step(
    dump: Dump, make_dump: Callable[..., Dump], tmp_path: Path, views: tuple[int, ...], same: bool
) -> None:
    """Also where the second archive is another teacher's of the same views, or has only some of them."""
    policy = dump.archive.manifest.policy
    assert policy is not None
    other = make_dump(tmp_path / "other", dump.canvas, policy=policy if same else policy.model_copy(update={"seed": 99}), views=4)
    part = derive(other.archive, tmp_path / "part", codec="f32", views=range(min(views), max(views) + 1))
    if same and len(views) == 1:
        with pytest.raises(UsageError, match="which is also in"):
            CachedTargets(dump.archive, dump.canvas, batch_size=4, seed=1, second=part)
        return
    for seed in range(3):
        stream = CachedTargets(dump.archive, dump.canvas, batch_size=4, seed=seed, second=part)
        for epoch in range(6):
            batch = next(stream.epoch(epoch))
            assert batch.second is not None
            assert not torch.equal(batch.images, batch.second.images)
            assert torch.equal(batch.sample, batch.second.sample)


def test_pairs_of_two_views_have_both_one_below_the_other(dump: Dump) -> None:
    stream = CachedTargets(dump.archive, dump.canvas, batch_size=4, seed=3, second=dump.archive)
    images, targets = next(iter(stream.pairs(4.0, lambda images: images.float(), control("ls-global"))))  # fitted by the way
    batch = next(stream.epoch(0))
    assert batch.second is not None
    assert torch.equal(images, torch.cat([batch.images, batch.second.images]).float())
    assert targets.second is not None
    logits = torch.randn(8, targets.logits.shape[1], generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(build("mlkd", ce_weight=0.1)(logits, targets))
    with pytest.raises(ValueError, match="not of an archive"):
        next(ViewStream(dump.canvas, stream.policy, batch_size=4, seed=0).epoch(0)).targets(1.0)


def test_pairs_are_images_and_targets_of_one_epoch_after_the_other(dump: Dump) -> None:
    stream = CachedTargets(dump.archive, dump.canvas, batch_size=4, seed=3)
    shuffle = control("bottom", k=1, per="sample")
    pairs = stream.pairs(4.0, lambda images: images.float() / 255, shuffle)
    batches = list(stream.epoch(0))
    assert len(pairs) == len(batches)
    for (images, targets), batch in zip(pairs, batches, strict=True):
        assert torch.equal(images, batch.images.float() / 255)
        assert targets.tau == 4.0
        assert torch.equal(targets.label_a, batch.label_a)
        keys = row_keys(dump.archive.manifest.digest, batch.view, batch.sample)
        assert torch.equal(targets.logits, shuffle(Targets(batch.logits, 4.0), keys).logits)
    following = next(iter(stream.pairs(1.0)))
    assert torch.equal(following[1].logits, next(stream.epoch(1)).logits)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_several_views_can_be_rendered_in_any_order(dump: Dump, workers: int) -> None:
    policy = dump.archive.manifest.policy
    items = [
        (view, np.array(positions)) for view, positions in ((2, [4, 5]), (0, [1]), (2, [0, 22]), (1, [7, 6, 5]), (0, [3, 2]))
    ]
    for item, (view, positions) in zip(
        render_batches(dump.canvas, policy, items, workers=workers, archive=dump.archive), items, strict=True
    ):
        table = policy.parameters(view, len(dump.canvas), dump.canvas.sizes)
        assert item.rows.view == view
        np.testing.assert_array_equal(item.rows.sample, table.sample[positions])
        assert torch.equal(item.images, render_positions(dump.canvas.pixels, table, positions))
        np.testing.assert_array_equal(item.stored.logits, dump.logits[view, positions])


def test_worker_processes_change_nothing(dump: Dump) -> None:
    alone, helped = (epochs(CachedTargets(dump.archive, dump.canvas, 5, seed=1, workers=workers), 2) for workers in (0, 2))
    assert len(alone) == len(helped) == 8
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


@pytest.mark.parametrize(
    ("workers", "options"),
    [
        (0, {}),
        (1, {}),
        (2, {}),
        (3, {"persistent_workers": True}),
        (7, {"persistent_workers": True}),  # more than there are batches
        pytest.param(2, {"multiprocessing_context": "spawn"}, marks=pytest.mark.exhaustive),
        pytest.param(2, {"multiprocessing_context": "spawn", "persistent_workers": True}, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_loaders_workers_share_the_batches_of_each_epoch(
    dump: Dump, workers: int, options: dict[str, Any], pairs: bool
) -> None:
    """They come once each and in order, with the next epoch each time, as without workers."""
    expected = epochs(CachedTargets(dump.archive, dump.canvas, batch_size=4, seed=9), 3)
    stream = CachedTargets(dump.archive, dump.canvas, batch_size=4, seed=9, workers=2 if workers == 3 else 0)
    loader = DataLoader(stream.pairs(tau=2.0) if pairs else stream, batch_size=None, num_workers=workers, **options)
    assert len(loader) == len(stream) == 5
    shown = []
    for _ in range(3):
        torch.manual_seed(0)  # as users do who want each epoch to be the same again
        shown += list(loader)
    assert len(shown) == len(expected) == 15
    for found, batch in zip(shown, expected, strict=True):
        if pairs:
            assert torch.equal(found[0], batch.images)
            assert torch.equal(found[1].logits, batch.targets(2.0).logits)
        else:
            assert same(found, batch)


def test_a_stream_goes_to_other_processes(dump: Dump) -> None:
    stream = CachedTargets(dump.archive, dump.canvas, batch_size=4, seed=9)
    next(iter(stream))
    there = pickle.loads(pickle.dumps(stream.pairs(2.0)))
    for (images, _), batch in zip(there, stream.epoch(1), strict=True):
        assert torch.equal(images, batch.images)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_an_epoch_that_is_left_early_is_followed_by_the_next(dump: Dump) -> None:
    stream = CachedTargets(dump.archive, dump.canvas, batch_size=4, seed=9)
    epoch = 0
    for options in ({"num_workers": 2, "persistent_workers": True}, {"num_workers": 3}, {}):
        loader: Any = DataLoader(stream, batch_size=None, **options)
        for _ in range(3):
            first = next(iter(loader))
            assert same(first, next(stream.epoch(epoch)))
            epoch += 1


@given(data=st.data(), workers=st.integers(1, 4), passes=st.integers(1, 6))
def test_workers_that_are_late_are_in_the_epoch_of_their_pass(data: st.DataObject, workers: int, passes: int) -> None:
    """Persistent workers begin their passes in any order: some may be in the next one before others have begun this one."""
    shared = _Epochs()
    before = shared.next()  # of the program itself
    of_worker = [copy.copy(shared) for _ in range(workers)]  # as in processes: the tensor is one, the rest each one's own
    turns = data.draw(st.permutations([number for number in range(workers) for _ in range(passes)]))
    begun: dict[int, list[int]] = {number: [] for number in range(workers)}
    for number in turns:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stream_module, "get_worker_info", lambda n=number: SimpleNamespace(id=n, seed=1234 + n))
            begun[number].append(of_worker[number].next())
    assert all(epochs == [before + 1 + turn for turn in range(passes)] for epochs in begun.values())
    assert shared.next() == before + 1 + passes


def test_workers_share_the_part_that_a_process_of_several_has(dump: Dump) -> None:
    parts = []
    for number in range(2):
        stream = CachedTargets(dump.archive, dump.canvas, batch_size=4, seed=9, part=(number, 2))
        parts += [batch.positions for batch in DataLoader(stream, batch_size=None, num_workers=2)]
    assert sorted(np.concatenate(parts).tolist()) == sorted(epoch_positions(len(dump.canvas), 9, 0)[:20].tolist())


def test_workers_share_second_views_too(dump: Dump) -> None:
    stream = CachedTargets(dump.archive, dump.canvas, batch_size=4, seed=9, second=dump.archive)
    expected = list(stream.epoch(0))
    for found, batch in zip(DataLoader(stream, batch_size=None, num_workers=2), expected, strict=True):
        assert same(found, batch)
        assert same(found.second, batch.second)  # type: ignore[arg-type]


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
        table = policy.parameters(epoch, len(dump.canvas), dump.canvas.sizes)
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


def test_parts_of_batches_make_whole_batches(dump: Dump) -> None:
    """As several processes have them; mixing partners may sit in different parts."""
    whole = epochs(CachedTargets(dump.archive, dump.canvas, batch_size=9, seed=3), 2)
    parts = [epochs(CachedTargets(dump.archive, dump.canvas, batch_size=9, seed=3, part=(i, 3)), 2) for i in range(3)]
    assert len(whole) == len(parts[0]) > 1
    for batch, *three in zip(whole, *parts, strict=True):
        for name in ("images", "sample", "label_a", "label_b", "lam", "logits", "keys"):
            assert torch.equal(torch.cat([getattr(part, name) for part in three]), getattr(batch, name)), name
    with pytest.raises(UsageError, match="batch size 9 with 2 processes"):
        CachedTargets(dump.archive, dump.canvas, batch_size=9, seed=3, part=(0, 2))
