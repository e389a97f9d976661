"""Protects replay: a view that is not the one the teacher saw stops training at the first batch, and the error says why."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kdcache.archive import ArchiveWriter
from kdcache.datasets.canvas import Canvas, load_canvas
from kdcache.datasets.folder import Folder
from kdcache.errors import IncompatibleError
from kdcache.replay.check import replay
from kdcache.replay.stream import Batch, CachedTargets
from kdcache.views import ViewPolicy, ViewTable, device, fingerprint, render_positions
from kdcache.views.policy import MIX_MIXUP
from tests.conftest import Dump

POLICY = ViewPolicy.load("pets", size=16)


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
    table = dump.archive.manifest.policy.parameters(view, 23, dump.canvas.sizes)
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
    table = dump.archive.manifest.policy.parameters(0, 23, dump.canvas.sizes)
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


# ---------------------------------------------------------------- every kind of drift, by its name


def swapped_partners(pixels: NDArray[np.uint8], table: ViewTable) -> Tensor:
    """Views mixed 0 with 2 and 1 with 3 of every four positions, with the drawn lambdas and boxes; in plain steps."""
    plain = dataclasses.replace(table, partner=np.full(len(table), -1), mix=np.zeros(len(table), np.uint8))
    alone = render_positions(pixels, plain, np.arange(len(table))).numpy().astype(np.int64)
    out = alone.copy()
    for j in range(len(table) - len(table) % 4):
        if table.mix[j] == MIX_MIXUP:
            share = int(table.lam_units[j])
            out[j] = (alone[j] * share + alone[j ^ 2] * (65536 - share) + 32768) >> 16
        else:
            left, top, right, bottom = table.cut[j].tolist()
            out[j, :, top:bottom, left:right] = alone[j ^ 2, :, top:bottom, left:right]
    return torch.from_numpy(out.astype(np.uint8))


OTHERWISE = {
    "policy: the stored views are those of resize filter bicubic, not bilinear": ViewPolicy.load("pets:filter=bicubic", size=16),
    "policy: the stored views are those of RandAugment magnitude m=9, not m=14": ViewPolicy.load("pets:randaugment.m=9", size=16),
    "policy: the stored views are those of RandAugment interpolation bilinear, not nearest": ViewPolicy.load(
        "pets:randaugment.interpolation=bilinear", size=16
    ),
    "policy: the stored views are those of no RandAugment": ViewPolicy.load("pets:randaugment=none", size=16),
    "is mixed by MixUp, not CutMix": ViewPolicy.load("pets:mix.cutmix=0", size=16),
    "is not mixed": ViewPolicy.load("pets:mix=none", size=16),
    "is mixed with position": swapped_partners,
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", OTHERWISE)
def test_views_drawn_otherwise_are_caught_at_the_first_batch_that_shows_it_and_named(
    name: str, tmp_path: Path, canvas: Canvas, make_dump: Callable[..., Dump]
) -> None:
    drawn_by = OTHERWISE[name]
    made = make_dump(tmp_path / "a", canvas, policy=POLICY, drawn_by=drawn_by, views=1)
    table = POLICY.parameters(0, len(canvas), canvas.sizes)
    expected = render_positions(canvas.pixels, table, np.arange(len(canvas)))
    if isinstance(drawn_by, ViewPolicy):
        other = render_positions(canvas.pixels, drawn_by.parameters(0, len(canvas), canvas.sizes), np.arange(len(canvas)))
    else:
        other = drawn_by(canvas.pixels, table)
    differs = (expected != other).flatten(1).any(dim=1).numpy()
    sound = make_dump(tmp_path / "b", canvas, policy=POLICY, views=1)
    shows = [bool(differs[batch.positions].any()) for batch in CachedTargets(sound.archive, canvas, 2).epoch(0)]
    count, error = until_error(CachedTargets(made.archive, canvas, 2).epoch(0))
    assert count == shows.index(True)
    assert name in error.why
    assert "--allow-drift" not in error.fix


def test_an_other_canvas_is_named_and_so_are_pixels_changed_since_it_was_built(dump: Dump) -> None:
    pixels = dump.canvas.pixels ^ 1
    brighter = dataclasses.replace(dump.canvas, pixels=pixels, digest="0" * 64)
    count, error = until_error(CachedTargets(dump.archive, brighter, 4).epoch(0))
    assert count == 0
    assert error.why.startswith("canvas: its images are not those of the dump")
    assert "--allow-drift 1 " in error.fix
    changed = dataclasses.replace(dump.canvas, pixels=pixels)  # under the same digest
    _, error = until_error(CachedTargets(dump.archive, changed, 4).epoch(0))
    assert error.why.startswith("canvas: its pixels were changed after it was built")
    assert "mv " in error.fix


def test_one_changed_pixel_names_the_sample_that_it_belongs_to(
    tmp_path: Path, canvas: Canvas, make_dump: Callable[..., Dump]
) -> None:
    made = make_dump(tmp_path / "a", canvas, policy=ViewPolicy(size=20, hflip=0.5), views=1)
    pixels = canvas.pixels.copy()
    pixels[7, 2, 3, 4] ^= 1
    good = list(CachedTargets(made.archive, canvas, 4).epoch(0))
    count, error = until_error(CachedTargets(made.archive, dataclasses.replace(canvas, pixels=pixels), 4).epoch(0))
    assert count == [7 in batch.sample for batch in good].index(True)
    assert error.why == "canvas: its pixels were changed after it was built (samples involved: 7)"
    assert canvas.keys[7] in error.what


def test_a_device_renderer_that_errs_is_told_from_everything_else(dump: Dump, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = device.draw
    monkeypatch.setattr(device, "draw", lambda images, rows: sound(images, rows) ^ 1)
    count, error = until_error(CachedTargets(dump.archive, dump.canvas, 4, renderer="device").epoch(0))
    assert count == 0
    assert error.why.startswith("renderer: the reference renderer draws these views as stored")
    assert "--renderer reference" in error.fix
    assert len(list(CachedTargets(dump.archive, dump.canvas, 4, renderer="reference").epoch(0))) == 5


def test_archives_with_digests_of_version_1_are_still_replayed_and_appended_to(
    tmp_path: Path, canvas: Canvas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcache.archive.writing.planning.PROBE_VERSION", 1)
    table, rows = POLICY.parameters(0, len(canvas), canvas.sizes), np.arange(len(canvas))
    options = {
        "num_samples": len(canvas),
        "class_names": canvas.card.class_names,
        "labels": canvas.labels,
        "keys": canvas.keys,
        "policy": POLICY,
        "source": canvas.card,
    }
    writer = ArchiveWriter(tmp_path / "a", num_views=1, **options)
    digest, probe = fingerprint(render_positions(canvas.pixels, table, rows), 1)
    logits = np.zeros((len(canvas), 3), np.float32)
    writer.write(0, 0, logits, sample=table.sample, digest=digest, probe=probe)
    archive = writer.finalize()
    assert "probe_version" not in (tmp_path / "a" / "kdcache.json").read_text()
    monkeypatch.undo()
    assert len(list(CachedTargets(archive, canvas, 4).epoch(0))) == 5
    assert replay(archive, canvas, views=10**6).ok
    assert ArchiveWriter(tmp_path / "a", num_views=2, **options).plan.probe_version == 1


def test_without_an_allowance_a_canvas_decoded_otherwise_is_refused_however_little_it_differs(
    tmp_path: Path, canvas: Canvas, make_dump: Callable[..., Dump]
) -> None:
    sound = make_dump(tmp_path / "a", canvas, policy=ViewPolicy(size=20, hflip=0.0), views=1)
    pixels = canvas.pixels.copy()
    pixels[4, 0, 0, :2] += np.array([1, -1]).astype(np.uint8)
    nearly = dataclasses.replace(canvas, pixels=pixels, digest="0" * 64)
    _, error = until_error(CachedTargets(sound.archive, nearly, 1).epoch(0))
    assert error.why.startswith("canvas")
